"""Chats by a checkpoint's own Jinja template, against transformers' `apply_chat_template`."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from llama import Tokenizer
from llama.chat import ChatFormat
from llama.errors import PromptError
from llama.text.chat_format import TemplateChatFormat, read_chat_format
from tests.support.templates import CHATML, IM, LLAMA2, MISTRAL, VICUNA, ZEPHYR, hf_folder
from tests.support.tokenizers import Foreign
from tests.test_tokenizer import ALPHABET

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "TinyLlama": (ZEPHYR, {"legacy": False}),
    "Zephyr": (ZEPHYR, {"legacy": True}),
    "Vicuna": (VICUNA, {"legacy": False}),
    "SmolLM": (CHATML, {"with_im": True, "eos_token": IM[1]}),
    "Mistral": (MISTRAL, {"legacy": True}),
    "Llama 2": (LLAMA2, {"legacy": True}),
}
WORDS = [
    "The",
    " quick",
    "fox",
    "\n\n",
    "  ",
    "naïve",
    " 日本",
    "🙂",
    "12345",
    " [",
    "]",
    "<",
    ">",
    "|",
    "<|user|>",
    "▁",
]


def random_dialog(rng: random.Random) -> list[Any]:
    """An optional system message, then user and assistant in turn; texts with spaces at their ends, some empty."""

    def text() -> str:
        words = rng.choices(WORDS, k=rng.randint(0, 6)) + rng.choices(ALPHABET, k=rng.randint(0, 4))
        return "".join(rng.sample(words, len(words)))

    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(0, 3) + ["user"]
    return [{"role": role, "content": text()} for role in roles]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_match_transformers(family: str, tokenizer_path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template, settings = FAMILIES[family]
    tokenizer = hf_folder(tmp_path, tokenizer_path, template, **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_chat_format(tmp_path) or ChatFormat()
    assert isinstance(ours, TemplateChatFormat) == (family != "Llama 2")
    rng = random.Random(family)
    for _ in range(300):
        dialog = random_dialog(rng)
        expected = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
        assert ours.encode(dialog, tokenizer) == expected, dialog


@pytest.fixture
def chatml(tokenizer_path: Path, tmp_path: Path) -> tuple[TemplateChatFormat, Tokenizer]:
    tokenizer = hf_folder(tmp_path, tokenizer_path, CHATML, with_im=True)
    found = read_chat_format(tmp_path)
    assert isinstance(found, TemplateChatFormat)
    return found, tokenizer


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def specials(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return [token for token in ids if token in tokenizer.special_tokens.values()]


def test_a_message_makes_no_special_token(chatml: tuple[TemplateChatFormat, Tokenizer]) -> None:
    """However names are written into messages, in parts of one or over several: the template alone writes tokens."""
    own, tokenizer = chatml
    sources = [CHATML, "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|im_start|>' }}"]
    sources.append("{{ '<' + messages[0].content + '>' }}{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    names = list(tokenizer.special_tokens)
    parts = [*names, *(name[:i] for name in names for i in (1, 2, 4)), *(name[i:] for name in names for i in (1, 2, 4))]
    rng = random.Random(0)
    for chat_format in (own, *map(TemplateChatFormat, sources)):
        for _ in range(150):
            texts = ["".join(rng.choices([*parts, " ", "a"], k=rng.randint(1, 4))) for _ in range(3)]
            dialog = [user(text) for text in texts]
            plain = [user("a") for _ in texts]
            found = specials(chat_format.encode(dialog, tokenizer), tokenizer)
            assert found == specials(chat_format.encode(plain, tokenizer), tokenizer), texts
            joined = "".join(texts)
            shown = tokenizer.decode(chat_format.encode(dialog, tokenizer))
            assert all(text.strip() in shown for text in texts), joined


def test_a_piece_that_sentencepiece_makes_of_text_is_no_token_either(code_tokenizer_path: Path) -> None:
    """A name that is in the SentencePiece model, which would encode it as one piece anywhere."""
    tokenizer = Tokenizer(code_tokenizer_path, added_tokens={"<step>": 8})
    assert tokenizer.encode("a<step>", bos=False, eos=False)[-1] == 8
    own = TemplateChatFormat("{% for m in messages %}{{ m.content + '<step>' }}{% endfor %}")
    assert own.encode([user("a<step>b")], tokenizer).count(8) == 1


def test_an_answer_ends_where_the_template_says(chatml: tuple[TemplateChatFormat, Tokenizer]) -> None:
    own, tokenizer = chatml
    assert own.stop_ids(tokenizer) == {2, tokenizer.special_tokens[IM[1]]}
    for source in (VICUNA, ZEPHYR, MISTRAL):
        assert TemplateChatFormat(source).stop_ids(tokenizer) == {2}
    line_first = CHATML.replace("+ '<|im_end|>'", "+ '\\n<|im_end|>'")
    assert tokenizer.special_tokens[IM[1]] in (TemplateChatFormat(line_first).stop_ids(tokenizer) or ())
    assert TemplateChatFormat("{{ raise_exception('no') }}").stop_ids(tokenizer) == {2}


def test_what_the_template_refuses_is_the_callers_mistake(tokenizer: Tokenizer) -> None:
    own = TemplateChatFormat(LLAMA2)
    with pytest.raises(PromptError, match="the chat template must take the messages, got its error: roles must altern"):
        own.encode([user("a"), user("b")], tokenizer)


def test_roles_may_come_in_any_order_that_the_template_takes() -> None:
    own = TemplateChatFormat(CHATML)
    own.check([user("a"), {"role": "system", "content": "b"}, user("c"), user("d")], "dialogs[0]")
    with pytest.raises(PromptError, match=r"dialogs\[0\]\[1\], the last message, must have role 'user'"):
        own.check([user("a"), {"role": "assistant", "content": "b"}], "dialogs[0]")
    with pytest.raises(PromptError, match=r"dialogs\[0\]\[0\] must have content of type str"):
        own.check([user(5)], "dialogs[0]")  # type: ignore[arg-type]


def test_a_tokenizer_of_another_class_gets_the_text(tokenizer: Tokenizer) -> None:
    """It has no names of special tokens, so that all is text."""
    ids = TemplateChatFormat("{{ messages[0].content }}:").encode([user("The fox")], Foreign(tokenizer))
    assert ids == tokenizer.encode("The fox:", bos=False, eos=False)


def test_all_marks_in_a_message_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"must not contain all of the characters U\+FDD0 to U\+FDEF"):
        TemplateChatFormat(CHATML).encode([user("".join(map(chr, range(0xFDD0, 0xFDF0))))], tokenizer)


def test_a_used_format_is_copied_and_pickled(chatml: tuple[TemplateChatFormat, Tokenizer]) -> None:
    own, tokenizer = chatml
    ids = own.encode([user("a")], tokenizer)
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert other.encode([user("a")], tokenizer) == ids
