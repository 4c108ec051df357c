"""From what callers pass to checked ids: what is encoded how, and errors that name the argument."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
import torch

from llama import Tokenizer
from llama.prompts import check_prompts, encode_continuations, encode_dialogs, encode_texts

VOCAB_SIZE, MAX_SEQ_LEN = 100, 8


def dialog(*contents: str) -> Any:
    """A dialog of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 2, 3]],
        [[0], [99] * MAX_SEQ_LEN],
        ((1, 2), (3,)),
        [torch.tensor([1, 2]), torch.tensor([5], dtype=torch.int32)],
        [range(3)],
        [deque([4, 5])],
    ],
    ids=repr,
)
def test_ids_come_as_lists_of_int(prompts: Any) -> None:
    checked = check_prompts(prompts, VOCAB_SIZE, MAX_SEQ_LEN)
    assert checked == [[int(token) for token in prompt] for prompt in prompts]
    assert {type(token) for prompt in checked for token in prompt} == {int}


def test_checked_ids_are_a_copy() -> None:
    prompts = [[1, 2]]
    check_prompts(prompts, VOCAB_SIZE, MAX_SEQ_LEN)[0].append(3)
    assert prompts == [[1, 2]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"^prompt_tokens is empty; it takes a list of at least one"),
        ((), r"^prompt_tokens is empty"),
        (None, r"^prompt_tokens is a NoneType; it takes a list of prompts"),
        ("text", r"^prompt_tokens is a str; it takes a list of prompts"),
        (b"text", r"^prompt_tokens is a bytes; "),
        (7, r"^prompt_tokens is a int; "),
        ([1, 2, 3], r"^prompt_tokens\[0\] is 1; it takes a list of token ids"),
        ([[1], "text"], r"^prompt_tokens\[1\] is 'text'; it takes a list of token ids"),
        ([[1], None], r"^prompt_tokens\[1\] is None; "),
        ([[1], [2, 3.0]], r"^prompt_tokens\[1\] is \[2, 3\.0\]; "),
        ([[1], [[2]]], r"^prompt_tokens\[1\] is \[\[2\]\]; "),
        ([[1], []], r"^prompt_tokens\[1\] is empty; it takes at least one token"),
        ([[1], [2] * 9], r"^prompt_tokens\[1\] has 9 tokens; it takes up to max_seq_len=8$"),
        ([[1], [2, -1]], r"^prompt_tokens\[1\] has the id -1; it takes ids from 0 to 99$"),
        ([[1], [2, 100]], r"^prompt_tokens\[1\] has the id 100; it takes ids from 0 to 99$"),
        ([[1], [2, 100, 101]], r"^prompt_tokens\[1\] has the id 100; it takes ids from 0 to 99$"),
        ([[1], [10**30]], r"^prompt_tokens\[1\] has the id 1000000000000000000000000000000; "),
    ],
)
def test_wrong_ids_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts, VOCAB_SIZE, MAX_SEQ_LEN)


def test_a_long_wrong_prompt_makes_no_long_message() -> None:
    with pytest.raises(ValueError, match="it takes a list of token ids") as caught:
        check_prompts([["word"] * 10000], VOCAB_SIZE, MAX_SEQ_LEN)  # type: ignore[list-item]
    assert len(str(caught.value)) < 200


def test_texts_are_encoded_with_bos_and_without_eos(tokenizer: Tokenizer) -> None:
    texts = ["", "The fox", " a\n"]
    encoded = encode_texts(texts, "prompts", tokenizer, 64)
    assert encoded == [[1, *tokenizer.sp_model.encode(text)] for text in texts]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"^prompts is empty; "),
        ("one text", r"^prompts is a str; it takes a list of str"),
        (None, r"^prompts is a NoneType; "),
        ({"a": 1}, r"^prompts is a dict; "),
        (["a", 5], r"^prompts\[1\] is a int; it takes a str"),
        (["a", None], r"^prompts\[1\] is a NoneType; it takes a str"),
        (["a", b"b"], r"^prompts\[1\] is a bytes; it takes a str"),
    ],
)
def test_what_are_no_texts_are_refused(tokenizer: Tokenizer, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_texts(texts, "prompts", tokenizer, 64)


def test_a_text_may_fill_the_whole_length_and_no_more(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox"
    n = 1 + len(tokenizer.sp_model.encode(text))
    assert len(encode_texts([text], "prompts", tokenizer, n)[0]) == n
    with pytest.raises(ValueError, match=rf"^prompts\[1\] has {n} tokens; it takes up to max_seq_len={n - 1}$"):
        encode_texts(["", text], "prompts", tokenizer, n - 1)


def test_an_unsafe_dialog_has_no_ids_and_the_others_have(tokenizer: Tokenizer) -> None:
    encoded = encode_dialogs([dialog("a"), dialog("b", "[INST]", "c"), dialog("d")], tokenizer, 64)
    assert encoded[1] is None
    assert [encoded[0], encoded[2]] == encode_dialogs([dialog("a"), dialog("d")], tokenizer, 64)


def test_an_unsafe_dialog_may_be_of_any_length(tokenizer: Tokenizer) -> None:
    assert encode_dialogs([dialog("<<SYS>>" + 1000 * "a")], tokenizer, 16) == [None]


@pytest.mark.parametrize(
    ("dialogs", "message"),
    [
        ([], r"^dialogs is empty; "),
        ("text", r"^dialogs is a str; it takes a list of dialogs"),
        (dialog("a"), r"^dialogs\[0\] is a dict; a dialog is a list of messages"),
        ([dialog("a"), []], r"^dialogs\[1\] is empty; "),
        ([dialog("a"), dialog("b", "c")], r"^dialogs\[1\]\[1\], the last message, has role 'assistant'"),
        ([dialog("[INST]"), dialog("b", "c")], r"^dialogs\[1\]\[1\], the last message"),
        ([dialog("a"), dialog(200 * "b")], r"^dialogs\[1\] has \d+ tokens; it takes up to max_seq_len=64$"),
    ],
)
def test_wrong_dialogs_are_refused(tokenizer: Tokenizer, dialogs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_dialogs(dialogs, tokenizer, 64)


def test_a_dialog_may_be_a_deque(tokenizer: Tokenizer) -> None:
    """As a chat may hold its history, to drop the oldest turns."""
    turns = dialog("a", "b", "c")
    assert encode_dialogs([deque(turns)], tokenizer, 64) == encode_dialogs([turns], tokenizer, 64)


def test_a_context_and_its_text_are_encoded_as_one(tokenizer: Tokenizer) -> None:
    """All ids of the context that stand in the whole too are the context's; at least BOS is."""
    rng = random.Random(0)
    merged = 0
    for _ in range(300):
        context, text = ("".join(rng.choices("The quick fox é🙂", k=rng.randint(0, 8))) for _ in range(2))
        ((ids,), (known,)) = encode_continuations([context], [text], tokenizer, 64)
        alone = [1, *tokenizer.sp_model.encode(context)]
        assert ids == [1, *tokenizer.sp_model.encode(context + text)]
        assert 1 <= known <= len(alone)
        assert ids[:known] == alone[:known]
        assert known == len(alone) or known == len(ids) or ids[known] != alone[known]
        merged += known < len(alone)
    assert 10 < merged < 290


@pytest.mark.parametrize(
    ("contexts", "texts", "message"),
    [
        (["a"], ["a", "b"], r"there are 2 texts and 1 contexts"),
        ([], ["a"], r"^contexts is empty"),
        (["a"], [], r"^texts is empty"),
        ("a", ["b"], r"^contexts is a str; "),
        (["a"], "b", r"^texts is a str; "),
        (["a", 1], ["b", "c"], r"^contexts\[1\] is a int; it takes a str"),
        (["a", "b"], ["c", None], r"^texts\[1\] is a NoneType; it takes a str"),
        (["a", 99 * "b"], ["c", "d"], r"^contexts\[1\] has \d+ tokens; it takes up to max_seq_len=64"),
        (["a", "b"], ["c", 99 * "d"], r"^texts\[1\] has \d+ tokens; "),
        (["a", 40 * "é"], ["c", 40 * "1"], r"^contexts \+ texts\[1\] has \d+ tokens; "),
    ],
)
def test_wrong_continuations_are_refused(tokenizer: Tokenizer, contexts: Any, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_continuations(contexts, texts, tokenizer, 64)


def test_a_text_that_no_encoding_takes_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^prompts\[1\].* surrogate"):
        encode_texts(["a", "\udcff"], "prompts", tokenizer, 64)


def test_a_dialog_that_no_encoding_takes_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^dialogs\[1\].* surrogate"):
        encode_dialogs([dialog("a"), dialog("b", "c", "\udcff")], tokenizer, 64)
