"""From what callers pass to checked ids: what is encoded how, and errors that name the argument."""

from __future__ import annotations

import random
import re
from collections import deque
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from llama import Tokenizer
from llama.engine.sampled import common_length
from llama.errors import PromptError
from llama.inputs import check_prompts, encode_continuations, encode_dialogs, encode_texts

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
        torch.tensor([[1, 2], [3, 4]]),
        np.array([[1, 2], [3, 4]], dtype=np.uint16),
        [[np.int64(7)], [torch.tensor(8)], np.arange(3, dtype=np.uint64)],
        deque([[1], [2]]),
    ],
    ids=repr,
)
def test_ids_come_as_lists_of_int(prompts: Any) -> None:
    checked = check_prompts(prompts, VOCAB_SIZE, MAX_SEQ_LEN)
    assert checked == [[int(token) for token in prompt] for prompt in prompts]
    assert {type(token) for prompt in checked for token in prompt} == {int}


def test_prompts_may_be_read_only_once() -> None:
    assert check_prompts((iter(prompt) for prompt in ([1, 2], [3])), VOCAB_SIZE, MAX_SEQ_LEN) == [[1, 2], [3]]


def test_checked_ids_are_a_copy() -> None:
    prompts = [[1, 2]]
    check_prompts(prompts, VOCAB_SIZE, MAX_SEQ_LEN)[0].append(3)
    assert prompts == [[1, 2]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], " must have at least one element, got none"),
        ((), " must have at least one element, got none"),
        (None, " must be a list of prompts, got NoneType"),
        ("text", " must be a list of prompts, got str"),
        (b"text", " must be a list of prompts, got bytes"),
        (bytearray(b"text"), " must be a list of prompts, got bytearray"),
        (7, " must be a list of prompts, got int"),
        ([1, 2, 3], "[0] must be a list of token ids, got 1"),
        (torch.tensor([1, 2, 3]), "[0] must be a list of token ids, got 1"),
        (torch.tensor(1), " must be a list of prompts, got int"),
        (torch.empty((2, 3), device="meta"), " must be a list of prompts, got tensor("),
        ([[1], torch.empty(3, device="meta")], "[1] must be a list of token ids, got tensor("),
        ([[1], "text"], "[1] must be a list of token ids, got 'text'"),
        ([[1], None], "[1] must be a list of token ids, got None"),
        ([[1], [2, 3.0]], "[1] must be a list of token ids, got [2, 3.0]"),
        ([[1], torch.tensor([2.0])], "[1] must be a list of token ids, got tensor([2.])"),
        ([[1], [[2]]], "[1] must be a list of token ids, got [[2]]"),
        ([[1], ["2"]], "[1] must be a list of token ids, got ['2']"),
        ([[1], []], "[1] must have at least one token, such as BOS, got none"),
        ([[1], [2] * 9], "[1] must have at most max_seq_len=8 tokens, got 9"),
        ([[1], [2, -1]], "[1] must have ids from 0 to 99, got -1"),
        ([[1], [2, 100]], "[1] must have ids from 0 to 99, got 100"),
        ([[1], [2, 100, 101]], "[1] must have ids from 0 to 99, got 100"),
        ([[1], [10**30]], "[1] must have ids from 0 to 99, got 1000000000000000000000000000000"),
        ([[1], [10**5000]], "[1] must have ids from 0 to 99, got "),
    ],
)
def test_wrong_ids_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(PromptError, match="^" + re.escape(f"prompt_tokens{message}")):
        check_prompts(prompts, VOCAB_SIZE, MAX_SEQ_LEN)


def test_texts_are_encoded_with_bos_and_without_eos(tokenizer: Tokenizer) -> None:
    texts = ["", "The fox", " a\n"]
    encoded = encode_texts(texts, "prompts", tokenizer, 64)
    assert encoded == [[1, *tokenizer.sp_model.encode(text)] for text in texts]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"^prompts must have at least one element, got none$"),
        ("one text", r"^prompts must be a list of str, got str$"),
        (None, r"^prompts must be a list of str, got NoneType$"),
        ({"a": 1}, r"^prompts must be a list of str, got dict$"),
        (["a", 5], r"^prompts\[1\] must be a str, got int$"),
        (["a", None], r"^prompts\[1\] must be a str, got NoneType$"),
        (["a", b"b"], r"^prompts\[1\] must be a str, got bytes$"),
    ],
)
def test_what_are_no_texts_are_refused(tokenizer: Tokenizer, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_texts(texts, "prompts", tokenizer, 64)


def test_a_text_may_fill_the_whole_length_and_no_more(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox"
    n = 1 + len(tokenizer.sp_model.encode(text))
    assert len(encode_texts([text], "prompts", tokenizer, n)[0]) == n
    with pytest.raises(ValueError, match=rf"^prompts\[1\] must have at most max_seq_len={n - 1} tokens, got {n}$"):
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
        ([], r"^dialogs must have at least one element, got none$"),
        ("text", r"^dialogs must be a list of dialogs, got str$"),
        ([dialog("a"), []], r"^dialogs\[1\] must have at least one element, got none$"),
        (
            [dialog("[INST]"), dialog("b", "c")],
            r"^dialogs\[1\]\[1\], the last message, must have role 'user', got 'ass",
        ),
        ([dialog("a"), dialog(200 * "b")], r"^dialogs\[1\] must have at most max_seq_len=64 tokens, got \d+$"),
    ],
)
def test_wrong_dialogs_are_refused(tokenizer: Tokenizer, dialogs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_dialogs(dialogs, tokenizer, 64)


def test_a_dialog_may_be_a_deque_and_a_message_any_mapping_with_further_keys(tokenizer: Tokenizer) -> None:
    """As a chat may hold its history, to drop the oldest turns."""
    turns = dialog("a", "b", "c")
    others = deque(MappingProxyType(message | {"name": "Ann"}) for message in turns)
    assert encode_dialogs([others], tokenizer, 64) == encode_dialogs([turns], tokenizer, 64)


def test_a_context_and_its_text_are_encoded_as_one(tokenizer: Tokenizer) -> None:
    """All ids of the context that stand in the whole too are the context's; at least BOS is."""
    rng = random.Random(0)
    merged = 0
    for _ in range(300):
        context, text = ("".join(rng.choices("The quick fox é🙂", k=rng.randint(0, 8))) for _ in range(2))
        ((before,), (ids,)) = encode_continuations([context], [text], tokenizer, 64)
        known = common_length(before, ids)
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
        (["a"], ["a", "b"], r"^contexts must have one element per text, got 1 contexts and 2 texts$"),
        ([], ["a"], r"^contexts must have at least one element, got none$"),
        (["a"], [], r"^texts must have at least one element, got none$"),
        ("a", ["b"], r"^contexts must be a list of str, got str$"),
        (["a"], "b", r"^texts must be a list of str, got str$"),
        (["a", 1], ["b", "c"], r"^contexts\[1\] must be a str, got int$"),
        (["a", "b"], ["c", None], r"^texts\[1\] must be a str, got NoneType$"),
        (["a", 99 * "b"], ["c", "d"], r"^contexts\[1\] must have at most max_seq_len=64 tokens, got \d+$"),
        (["a", "b"], ["c", 99 * "d"], r"^texts\[1\] must have at most max_seq_len=64 tokens, got \d+$"),
        (["a", 40 * "é"], ["c", 40 * "1"], r"^contexts \+ texts\[1\] must have at most max_seq_len=64 tokens, got \d"),
    ],
)
def test_wrong_continuations_are_refused(tokenizer: Tokenizer, contexts: Any, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_continuations(contexts, texts, tokenizer, 64)


def test_a_text_that_no_encoding_takes_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^prompts\[1\].* surrogate"):
        encode_texts(["a", "\udcff"], "prompts", tokenizer, 64)
    with pytest.raises(ValueError, match=r"^dialogs\[1\].* surrogate"):
        encode_dialogs([dialog("a"), dialog("b", "c", "\udcff")], tokenizer, 64)
