"""The chat template and the end-of-turn tokens beside a checkpoint, and chats with it through every door."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.chat import ChatFormat
from llama.errors import PromptError
from llama.serving.batch import read_body, read_line
from llama.serving.jobs import Planner
from llama.text import chat_format
from llama.text.chat_format import (
    CHAT_FORMAT_FILE,
    TemplateChatFormat,
    copy_chat_format,
    read_chat_format,
    read_stop_ids,
)
from llama.tools import chat
from tests.support.templates import CHATML, LLAMA2, MISTRAL, VICUNA, write_settings

QUESTION: Any = [{"role": "user", "content": "Hi"}]


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
def test_a_template_is_recorded_and_used_unless_it_is_llama_2s(template: Any, is_foreign: bool, tmp_path: Path) -> None:
    write_settings(tmp_path, template)
    assert (read_chat_format(tmp_path) is not None) == is_foreign
    converted = tmp_path / "converted"
    converted.mkdir()
    assert copy_chat_format(tmp_path, converted) == is_foreign
    assert (converted / CHAT_FORMAT_FILE).exists() == (read_chat_format(converted) is not None) == is_foreign


def test_a_conversion_keeps_what_belongs_to_the_template(tmp_path: Path) -> None:
    write_settings(tmp_path, CHATML, eos_token="<|im_end|>", legacy=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (converted := tmp_path / "converted").mkdir()
    copy_chat_format(tmp_path, converted)
    for folder in (tmp_path, converted):
        found = read_chat_format(folder)
        assert isinstance(found, TemplateChatFormat)
        assert found.source == CHATML and found.spaces
        assert found.variables == {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
        assert read_stop_ids([folder], {"<|im_end|>": 9}) == {2, 7, 9}


def test_a_template_has_its_own_file_before_the_settings(tmp_path: Path) -> None:
    write_settings(tmp_path, LLAMA2)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": MISTRAL}))
    assert read_chat_format(tmp_path).source == MISTRAL  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert read_chat_format(tmp_path).source == CHATML  # type: ignore[union-attr]
    (tmp_path / CHAT_FORMAT_FILE).write_text(json.dumps({"chat_template": VICUNA}))
    assert read_chat_format(tmp_path).source == VICUNA  # type: ignore[union-attr]


def test_a_folder_without_settings_has_nothing_to_say(tmp_path: Path) -> None:
    assert not copy_chat_format(tmp_path, tmp_path) and read_chat_format(tmp_path) is None
    assert read_stop_ids([tmp_path], {}) == frozenset()


@pytest.mark.parametrize("eos", [7, [7], [7, "8", None, 2.5]])
def test_generation_config_names_ids_that_end_an_answer(eos: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert read_stop_ids([tmp_path], {}) == {7}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be JSON"):
        read_chat_format(tmp_path)


def test_the_template_that_others_are_compared_with_gives_the_librarys_ids(llama: Llama) -> None:
    template = TemplateChatFormat(chat_format.LLAMA2, spaces=True)
    for dialog in (chat_format._TURN, [{"role": "system", "content": "Be brief."}, *chat_format._TURNS]):
        ids = template.encode(dialog, llama.tokenizer)  # type: ignore[arg-type]
        assert ids == ChatFormat().encode(dialog, llama.tokenizer)  # type: ignore[arg-type]


@pytest.fixture
def foreign(checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> Path:
    """A checkpoint that was tuned on Vicuna's template, and stops at a token of its own besides EOS."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text(VICUNA)
    return folder


def build(folder: Path) -> Llama:
    return Llama.build(folder, folder / "tokenizer.model", 64, 2, device="cpu", dtype="float32")


def test_every_door_answers_in_the_checkpoints_own_template(foreign: Path) -> None:
    llama = build(foreign)
    ids = llama.tokenizer.encode("", bos=True, eos=False) + llama.tokenizer.encode_part("A chat. USER: Hi ASSISTANT:")
    (row,), _ = llama.generate([ids], 20, temperature=0)
    text = llama.tokenizer.decode(row)
    assert text != llama.tokenizer.decode(llama.generate([ChatFormat().encode(QUESTION, llama.tokenizer)], 20, 0)[0][0])
    (answer,) = llama.chat_completion([QUESTION], temperature=0, max_gen_len=20)
    assert answer["generation"] == {"role": "assistant", "content": text}
    assert "".join(llama.stream_chat_completion(QUESTION, 0, max_gen_len=20)) == text

    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": QUESTION}}
    job = read_body(read_line(1, json.dumps(line).encode()), Planner(llama, 8, "llama"), 1).job  # the server's, too
    assert (job.prompts, job.params.stop_ids) == ([ids], frozenset({2}))

    history = chat.History.empty("", None, llama.chat_format, llama.tokenizer, llama.model.params.max_seq_len)
    assert history.chat_format.encode(history.with_question("Hi"), llama.tokenizer) == ids


def test_an_answer_ends_at_each_id_that_generation_config_names(foreign: Path) -> None:
    free, _ = build(foreign).generate([[1, 5, 6]], 12, temperature=0, stop_token=-1)
    (foreign / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[0][4]]}))
    llama = build(foreign)
    assert llama.generate([[1, 5, 6]], 12, temperature=0)[0] == [free[0][: free[0].index(free[0][4])]]


def test_a_damaged_template_refuses_chats_and_not_texts(foreign: Path) -> None:
    (foreign / "chat_template.jinja").write_text("{% for")
    llama = build(foreign)
    for call in (lambda: llama.chat_completion([QUESTION]), lambda: llama.stream_chat_completion(QUESTION)):
        with pytest.raises(PromptError, match="the chat template must"):
            call()
    assert llama.text_completion(["Hi"], max_gen_len=2)


def test_the_chat_tool_refuses_a_damaged_template_before_it_loads(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (foreign / "chat_template.jinja").write_text("{% for")
    monkeypatch.setattr(Llama, "build", None)
    with pytest.raises(ValueError, match="the chat template must"):
        chat.main(str(foreign), str(foreign / "tokenizer.model"))


def test_a_missing_jinja2_names_the_extra_where_a_template_is_used_alone(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_format.compiled.cache_clear()
    monkeypatch.delitem(sys.modules, "llama.text.sandbox", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    llama = build(foreign)
    assert llama.text_completion(["Hi"], max_gen_len=2)
    with pytest.raises(ImportError, match=r"the extra \[chat\] must be installed"):
        llama.chat_completion([QUESTION])
