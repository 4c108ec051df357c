"""Chat templates of well-known fine-tunes, in other words, and Hugging Face folders that have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llama import Tokenizer

# As the Llama 2 chat checkpoints have it on Hugging Face.
LLAMA2 = (
    "{% set has_system = messages[0].role == 'system' %}"
    "{% for m in messages[has_system | int:] %}"
    "{% if (m.role == 'user') != loop.index0 is even %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first and has_system %}"
    "{% set text = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' + m.content %}"
    "{% else %}{% set text = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# SmolLM's and other ChatML.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# TinyLlama's and Zephyr's: tags that are plain text, EOS after each message, blocks on lines of their own.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{{ messages[0]['content'] | trim + ' ' }}{% else %}{% set rest = messages %}{{ 'A chat. ' }}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] | trim + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Mistral's later form: the system message goes before the last question; a macro and a namespace.
MISTRAL = (
    "{%- macro ask(text) -%}[INST] {{ text }} [/INST]{%- endmacro -%}"
    "{%- set ns = namespace(system='') -%}{{- bos_token -}}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.system = m.content ~ '\\n\\n' -%}"
    "{%- elif m.role == 'user' -%}{{- ask(((ns.system if loop.last else '') ~ m.content)) -}}"
    "{%- else -%}{{- ' ' + m.content|trim + eos_token -}}{%- endif -%}{%- endfor -%}"
)
IM = ("<|im_start|>", "<|im_end|>")


def write_settings(folder: Path, template: Any, n_words: int = 0, **settings: Any) -> dict[str, int]:
    """Writes tokenizer_config.json with a template and, unless `n_words` is 0, ChatML's tokens as added ones, which
    it returns."""
    added = {name: n_words + i for i, name in enumerate(IM)} if n_words else {}
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2} | added
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    content = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": {"__type": "AddedToken", "content": "<unk>"} | flags,
        "added_tokens_decoder": {str(token): {"content": name} | flags for name, token in tokens.items()},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content | settings))
    return added


def hf_folder(
    folder: Path, tokenizer_path: Path, template: str, *, with_im: bool = False, **settings: Any
) -> Tokenizer:
    """Makes a folder that transformers loads a tokenizer from; returns the same tokenizer."""
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    n_words = Tokenizer(tokenizer_path).n_words
    added = write_settings(folder, template, n_words if with_im else 0, **settings)
    return Tokenizer(tokenizer_path, added_tokens=added)
