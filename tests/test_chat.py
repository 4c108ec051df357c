"""The chat template, against layouts written out by hand, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama, Tokenizer
from llama.chat import ChatFormat, StepChatFormat, built_in_format, check_dialog, dialog_prompt_tokens
from llama.errors import PromptError

BOS, EOS = 1, 2
TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """SentencePiece's own ids of a text, without BOS and EOS."""
    return list(tokenizer.sp_model.encode(text))


def encode(tokenizer: Tokenizer, *dialog: dict[str, str]) -> list[int]:
    return ChatFormat().encode(dialog, tokenizer)  # type: ignore[arg-type]


def test_a_finished_pair_stands_alone_between_bos_and_eos(tokenizer: Tokenizer) -> None:
    """With one space behind the answer."""
    dialog = [user("one"), assistant("two"), user("three"), assistant("four"), user("five")]
    assert encode(tokenizer, *dialog) == [
        *[BOS, *ids(tokenizer, "[INST] one [/INST] two "), EOS],
        *[BOS, *ids(tokenizer, "[INST] three [/INST] four "), EOS],
        *[BOS, *ids(tokenizer, "[INST] five [/INST]")],
    ]


def test_a_system_message_is_folded_into_the_first_turn(tokenizer: Tokenizer) -> None:
    folded = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST]"
    assert encode(tokenizer, system("Be brief."), user("hi")) == [BOS, *ids(tokenizer, folded)]
    assert encode(tokenizer, system("Be brief."), user("hi"), assistant("ho"), user("hu")) == [
        *[BOS, *ids(tokenizer, folded + " ho "), EOS],
        *[BOS, *ids(tokenizer, "[INST] hu [/INST]")],
    ]


def test_texts_are_stripped(tokenizer: Tokenizer) -> None:
    for before, after in itertools.product(("", " ", "\n\t  "), repeat=2):
        dialog = [user(f"{before}a  b{after}"), assistant(f"{before}c\n{after}"), user(f"{before}d{after}")]
        assert encode(tokenizer, *dialog) == encode(tokenizer, user("a  b"), assistant("c"), user("d"))


def test_a_folded_turn_is_stripped_as_a_whole(tokenizer: Tokenizer) -> None:
    """What stands inside it keeps its spaces."""
    text = "[INST] <<SYS>>\n  be \n\n<</SYS>>\n\n  hi [/INST]"
    assert encode(tokenizer, system("  be \n"), user("  hi \n")) == [BOS, *ids(tokenizer, text)]
    nothing = "[INST] <<SYS>>\n\n<</SYS>> [/INST]"
    assert encode(tokenizer, system(""), user("  ")) == [BOS, *ids(tokenizer, nothing)]


def test_an_empty_turn_is_encoded(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, user("")) == [BOS, *ids(tokenizer, "[INST]  [/INST]")]


def test_encoding_leaves_the_dialog_alone(tokenizer: Tokenizer) -> None:
    dialog = [system(" s "), user(" u "), assistant(" a "), user(" v ")]
    copy = [dict(message) for message in dialog]
    ChatFormat().encode(dialog, tokenizer)  # type: ignore[arg-type]
    assert dialog == copy


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("at", range(4))
def test_a_tag_in_any_message_is_unsafe(tag: str, at: int) -> None:
    dialog = [system("s"), user("u"), assistant("a"), user("v")]
    assert not ChatFormat().is_unsafe(dialog)  # type: ignore[arg-type]
    for text in (tag, f"before{tag}", f"\n{tag} behind"):
        dialog[at]["content"] = text
        assert ChatFormat().is_unsafe(dialog)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[inst]", "INST", "[ INST ]", "<SYS>", "<< SYS >>", "<</SYS>", "[/ INST]", "[]"])
def test_what_only_looks_like_a_tag_is_safe(text: str) -> None:
    assert not ChatFormat().is_unsafe([user(text)])  # type: ignore[list-item]


def test_turns_are_refused_unless_in_order() -> None:
    """All sequences of up to five roles; the message at fault is the first that cannot stand where it does."""
    makers = {"s": system, "u": user, "a": assistant}
    names = {"s": "system", "u": "user", "a": "assistant"}
    for roles in (r for n in range(1, 6) for r in itertools.product("sua", repeat=n)):
        dialog: Any = [makers[role]("text") for role in roles]
        body = roles[1:] if roles[0] == "s" else roles
        due = ["ua"[i % 2] for i in range(len(body))]
        wrong = [i for i, (got, takes) in enumerate(zip(body, due, strict=True)) if got != takes]
        offset = len(roles) - len(body)
        if wrong:
            (at, message) = wrong[0], f"must have role {names[due[wrong[0]]]!r}, got {names[body[wrong[0]]]!r}"
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                check_dialog(dialog, "dialogs[7]")
            assert str(caught.value).startswith(f"dialogs[7][{at + offset}] {message}")
        elif roles[-1] == "u":
            check_dialog(dialog, "dialogs[7]")
        else:
            with pytest.raises(ValueError, match=r"the last message, must have role 'user', got") as caught:
                check_dialog(dialog, "dialogs[7]")
            assert str(caught.value).startswith(f"dialogs[7][{len(roles) - 1}], ")
            assert repr(names[roles[-1]]) in str(caught.value)


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], " must have at least one message from the user, got none"),
        ((), " must have at least one message from the user, got none"),
        ("hello", " must be a list of messages, got str"),
        (user("hello"), " must be a list of messages, got dict"),
        (None, " must be a list of messages, got NoneType"),
        (5, " must be a list of messages, got int"),
        (["hello"], "[0] must be a dict with the keys 'role' and 'content', got 'hello'"),
        ([user("a"), {"role": "user"}], "[1] must be a dict with the keys 'role' and 'content', got {'role': 'user'}"),
        ([{"content": "a"}], "[0] must be a dict with the keys 'role' and 'content', got {'content': 'a'}"),
        ([{"role": "tool", "content": "a"}], "[0] must have role 'system', 'user' or 'assistant', got 'tool'"),
        ([{"role": ["user"], "content": "a"}], "[0] must have role 'system', 'user' or 'assistant', got ['user']"),
        ([{"role": np.array(["user", "x"]), "content": "a"}], "[0] must have role 'system', 'user' or 'assistant', "),
        ([user("a"), {"role": "assistant", "content": None}], "[1] must have content of type str, got NoneType"),
        ([{"role": "user", "content": b"a"}], "[0] must have content of type str, got bytes"),
        ([system("a")], "[0], the last message, must have role 'user', got 'system'"),
    ],
)
def test_what_is_no_dialog_is_refused(dialog: Any, message: str) -> None:
    with pytest.raises(PromptError, match="^" + re.escape(f"dialogs[3]{message}")):
        check_dialog(dialog, "dialogs[3]")


def step_ids(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """The ids of texts, each encoded on its own; <step> stands for the token."""
    step = tokenizer.sp_model.piece_to_id("<step>")
    return [BOS, *itertools.chain.from_iterable([step] if part == "<step>" else ids(tokenizer, part) for part in parts)]


ANSWER = [" Source: assistant\nDestination: user", "\n\n "]


def test_code_llama_70b_puts_an_empty_system_message_in_front(code_tokenizer: Tokenizer) -> None:
    expected = step_ids(code_tokenizer, " Source: system", "<step>", " Source: user", "\n\n hi", "<step>", *ANSWER)
    assert StepChatFormat().encode([user(" hi\n")], code_tokenizer) == expected  # type: ignore[list-item]
    assert dialog_prompt_tokens(code_tokenizer, [system(""), user("hi")]) == expected  # type: ignore[list-item]


def test_code_llama_70b_encodes_header_and_body_of_each_message(code_tokenizer: Tokenizer) -> None:
    dialog = [system("Be brief."), user("one"), assistant("two") | {"destination": " user "}, user("  ")]
    expected = step_ids(
        code_tokenizer,
        *[" Source: system", "\n\n Be brief.", "<step>"],
        *[" Source: user", "\n\n one", "<step>"],
        *[" Source: assistant\nDestination: user", "\n\n two", "<step>"],
        *[" Source: user", "\n\n ", "<step>"],
        *ANSWER,
    )
    assert dialog_prompt_tokens(code_tokenizer, dialog) == expected  # type: ignore[arg-type]


def test_the_format_follows_the_tokenizer(code_tokenizer: Tokenizer, tokenizer: Tokenizer) -> None:
    assert type(built_in_format(tokenizer)) is ChatFormat and built_in_format(tokenizer).stop_ids(tokenizer) is None
    step = built_in_format(code_tokenizer)
    assert type(step) is StepChatFormat and step.stop_ids(code_tokenizer) == {code_tokenizer.step_id}
    assert step.answer("a") == {"role": "assistant", "destination": "user", "content": "a"}
    with pytest.raises(AssertionError, match="must have a piece <step>"):
        dialog_prompt_tokens(tokenizer, [user("a")])  # type: ignore[list-item]


@pytest.mark.parametrize("tag", [*TAGS, "<step>"])
def test_a_tag_is_unsafe_in_code_llama_70b_too(tag: str) -> None:
    assert StepChatFormat().is_unsafe([user(f"a{tag}b")])  # type: ignore[list-item]
    with pytest.raises(PromptError, match=r"dialogs\[0\]\[1\] must have a destination of type str, without tags"):
        StepChatFormat().check([user("a"), assistant("b") | {"destination": tag}, user("c")], "dialogs[0]")  # type: ignore[list-item]


def test_a_chat_with_code_llama_70b_ends_at_its_step(
    code_tokenizer: Tokenizer,
    code_tokenizer_path: Path,
    params: dict[str, Any],
    state: dict[str, torch.Tensor],
    write_checkpoint: Callable[..., Path],
) -> None:
    folder = write_checkpoint(params | {"vocab_size": code_tokenizer.n_words}, state)
    llama = Llama.build(folder, code_tokenizer_path, 128, 2, device="cpu", dtype="float32")
    prompt = dialog_prompt_tokens(llama.tokenizer, [user("hi")])  # type: ignore[list-item]
    free, _ = llama.generate([prompt], 30, temperature=0, stop_token=-1)
    (result,) = llama.chat_completion([[user("hi")]], temperature=0, max_gen_len=30)  # type: ignore[list-item]
    assert result["generation"]["destination"] == "user"
    assert result["generation"]["content"] == llama.tokenizer.decode(free[0])
    llama.tokenizer.step_id = free[0][5]  # as if the network ended its message there
    prompt = dialog_prompt_tokens(llama.tokenizer, [user("hi")])  # type: ignore[list-item]
    (cut,), _ = llama.generate([prompt], 30, temperature=0, stop_token=llama.tokenizer.step_id)
    (result,) = llama.chat_completion([[user("hi")]], temperature=0, max_gen_len=30)  # type: ignore[list-item]
    assert result["generation"]["content"] == llama.tokenizer.decode(cut)
    assert "".join(llama.stream_chat_completion([user("hi")], 0, max_gen_len=30)) == llama.tokenizer.decode(cut)  # type: ignore[list-item]
