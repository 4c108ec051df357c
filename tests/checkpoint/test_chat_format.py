"""A checkpoint that was tuned on another chat template than Llama 2's answers no chats, wherever they are asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama import Llama
from llama.chat import CHAT_FORMAT_FILE, chat_error, encode_dialog
from llama.checkpoint import chat_format
from llama.checkpoint.chat_format import copy_chat_format
from llama.errors import PromptError
from llama.serving.app import Server, make_app
from llama.serving.batch_file import Reader, read_line
from llama.serving.errors import ApiError
from llama.serving.jobs import Planner
from llama.serving.service import Service
from llama.tools import chat

# As the Llama 2 chat checkpoints have it on Hugging Face, in other words.
LLAMA2 = (
    "{% set has_system = messages[0].role == 'system' %}"
    "{% for m in messages[has_system | int:] %}"
    "{% if (m.role == 'user') != loop.index0 is even %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and has_system %}{{ '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Like Llama 2's for one question, but without a system prompt and with other spaces.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
QUESTION: Any = [{"role": "user", "content": "Hi"}]


def write_settings(folder: Path, template: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


@pytest.mark.parametrize(
    ("template", "is_foreign"),
    [
        (LLAMA2, False),
        (None, False),
        ([{"name": "tool_use", "template": CHATML}, {"name": "default", "template": LLAMA2}], False),
        (CHATML, True),
        (MISTRAL, True),
        ([{"name": "default", "template": CHATML}], True),
        ("{{ no such syntax", True),
        ("{% for m in messages %}{{ m.__class__.__mro__ }}{% endfor %}", True),
        ("{{ 1 // 0 }}", True),
    ],
)
def test_a_template_is_recorded_unless_it_is_llama_2s(template: Any, is_foreign: bool, tmp_path: Path) -> None:
    write_settings(tmp_path, template)
    assert copy_chat_format(tmp_path, tmp_path) == is_foreign
    assert (tmp_path / CHAT_FORMAT_FILE).exists() == (chat_error(tmp_path) is not None) == is_foreign


def test_a_template_in_a_file_of_its_own_goes_before_the_settings(tmp_path: Path) -> None:
    write_settings(tmp_path, LLAMA2)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert copy_chat_format(tmp_path, tmp_path)
    assert json.loads((tmp_path / CHAT_FORMAT_FILE).read_text()) == {"chat_template": CHATML}


def test_a_folder_without_settings_has_nothing_to_record(tmp_path: Path) -> None:
    assert not copy_chat_format(tmp_path, tmp_path) and chat_error(tmp_path) is None


def test_the_texts_that_templates_are_compared_with_are_the_librarys(llama: Llama) -> None:
    sp = llama.tokenizer.sp_model
    for messages, text in chat_format._EXAMPLES:
        dialog: Any = [{"role": role, "content": content} for role, content in messages]
        parts = [part.removesuffix("</s>") for part in text.split("<s>")[1:]]
        ids = [[sp.bos_id(), *sp.encode(part), sp.eos_id()] for part in parts]
        assert [token for part in ids for token in part][:-1] == encode_dialog(dialog, llama.tokenizer)


@pytest.fixture
def foreign(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that was tuned on another chat template."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    write_settings(tmp_path, CHATML)
    copy_chat_format(tmp_path, folder)
    return folder


def test_the_chat_tool_refuses_before_it_loads(
    foreign: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama, "build", None)
    with pytest.raises(ValueError, match="not the Llama 2 chat template") as refused:
        chat.main(str(foreign), str(tokenizer_path))
    assert str(foreign / CHAT_FORMAT_FILE) in str(refused.value)


def test_batch_files_and_the_server_refuse_chats_and_complete_texts(foreign: Path, llama: Llama) -> None:
    reader = Reader(Planner(llama, 8, chat_error=chat_error(foreign)), "llama", 1)
    lines = [
        {"custom_id": "a", "method": "POST", "url": f"/v1/{url}", "body": body}
        for url, body in (("chat/completions", {"messages": QUESTION}), ("completions", {"prompt": "Hi"}))
    ]
    with pytest.raises(ApiError, match="not the Llama 2 chat template") as refused:
        reader(read_line(1, json.dumps(lines[0]).encode()))
    assert (refused.value.status, refused.value.code) == (400, "unsupported_chat_format")
    assert reader(read_line(2, json.dumps(lines[1]).encode())).job.prompts

    state = Server("llama", chat_error=chat_error(foreign))
    state.ready(Service(llama))
    answer = TestClient(make_app(state)).post("/v1/chat/completions", json={"messages": QUESTION})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_chat_format")


def test_a_build_of_it_refuses_chats_and_completes_texts(foreign: Path, tokenizer_path: Path) -> None:
    llama = Llama.build(foreign, tokenizer_path, max_seq_len=16, max_batch_size=1, device="cpu")
    for call in (lambda: llama.chat_completion([QUESTION]), lambda: llama.stream_chat_completion(QUESTION)):
        with pytest.raises(PromptError, match="not the Llama 2 chat template"):
            call()
    assert llama.text_completion(["Hi"], max_gen_len=2)
