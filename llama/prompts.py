"""From what callers pass, texts, dialogs or ids, to checked prompts: lists of token ids that the cache has room for.

Errors call each prompt by the argument that it came in. Knows nothing of generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

from llama.chat import Dialog, check_dialog, encode_dialog, is_unsafe
from llama.tokenizer import Tokenizer


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """Prompts of ids, as lists of int.

    Raises:
        ValueError: there are none, or one is empty, too long, or has an id outside the vocabulary.
    """
    _check_list(prompts, "prompt_tokens", "prompts")
    checked = []
    for i, prompt in enumerate(prompts):
        name = f"prompt_tokens[{i}]"
        try:
            ids = [index(token) for token in prompt]
        except TypeError as error:
            raise ValueError(f"{name} is {prompt!r:.80}; it takes a list of token ids") from error
        _check_length(ids, name, max_seq_len)
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise ValueError(f"{name} has the id {wrong}; it takes ids from 0 to {vocab_size - 1}")
        checked.append(ids)
    return checked


def encode_text(text: str, name: str, tokenizer: Tokenizer, max_seq_len: int) -> list[int]:
    """The ids of a text, with BOS in front."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}; it takes a str")
    try:
        ids = tokenizer.encode(text, bos=True, eos=False)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    _check_length(ids, name, max_seq_len)
    return ids


def encode_texts(texts: Sequence[str], name: str, tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """The ids of texts, each with BOS in front."""
    _check_list(texts, name, "str")
    return [encode_text(text, f"{name}[{i}]", tokenizer, max_seq_len) for i, text in enumerate(texts)]


def encode_checked_dialog(dialog: Dialog, name: str, tokenizer: Tokenizer, max_seq_len: int) -> list[int] | None:
    """The ids of a dialog; None for one that must not be run, since it holds the template's own tags."""
    check_dialog(dialog, name)
    if is_unsafe(dialog):
        return None
    try:
        ids = encode_dialog(list(dialog), tokenizer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    _check_length(ids, name, max_seq_len)
    return ids


def encode_dialogs(dialogs: Sequence[Dialog], tokenizer: Tokenizer, max_seq_len: int) -> list[list[int] | None]:
    """The ids of dialogs, None for those that must not be run."""
    _check_list(dialogs, "dialogs", "dialogs")
    return [encode_checked_dialog(dialog, f"dialogs[{i}]", tokenizer, max_seq_len) for i, dialog in enumerate(dialogs)]


def encode_continuations(
    contexts: Sequence[str], texts: Sequence[str], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[list[int]], list[int]]:
    """The ids of each context and its text as one string, and how many of them are the context's own."""
    _check_list(contexts, "contexts", "str")
    _check_list(texts, "texts", "str")
    if len(contexts) != len(texts):
        raise ValueError(f"there are {len(texts)} texts and {len(contexts)} contexts; it takes as many")
    heads = encode_texts(contexts, "contexts", tokenizer, max_seq_len)
    encode_texts(texts, "texts", tokenizer, max_seq_len)
    joined = [context + text for context, text in zip(contexts, texts, strict=True)]
    whole = encode_texts(joined, "contexts + texts", tokenizer, max_seq_len)
    return whole, [_common_length(head, ids) for head, ids in zip(heads, whole, strict=True)]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of ids that two sequences begin with in common."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _check_list(values: object, name: str, of: str) -> None:
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is a {type(values).__name__}; it takes a list of {of}")
    if not values:
        raise ValueError(f"{name} is empty; it takes a list of at least one")


def _check_length(ids: Sequence[int], name: str, max_seq_len: int) -> None:
    if not ids:
        raise ValueError(f"{name} is empty; it takes at least one token, such as BOS")
    if len(ids) > max_seq_len:
        raise ValueError(f"{name} has {len(ids)} tokens; it takes up to max_seq_len={max_seq_len}")
