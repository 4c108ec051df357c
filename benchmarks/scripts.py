"""Texts for speculative.py: scripts of token ids with as much repetition as kinds of real texts have, and prompts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_FIRST_ID = 259  # past control pieces and bytes
_NGRAM = 8


@dataclass(frozen=True)
class Script:
    """A prompt and the completion that it shall get."""

    prompt: list[int]
    output: list[int]


def repeated_ngrams(script: Script, size: int = _NGRAM) -> float:
    """The share of the output's n-grams that occurred before, in the prompt or the output."""
    text, n_prompt = script.prompt + script.output, len(script.prompt)
    seen: set[tuple[int, ...]] = set()
    repeated = n = 0
    for end in range(size, len(text) + 1):
        gram = tuple(text[end - size : end])
        if end > n_prompt:
            n += 1
            repeated += gram in seen
        seen.add(gram)
    return repeated / max(1, n)


def fresh(draw: random.Random, vocab_size: int, n: int) -> list[int]:
    """Words as frequent as those of a language (Zipf's law): pairs of them recur by chance, long n-grams do not."""
    return [_FIRST_ID - 1 + int((vocab_size - _FIRST_ID) ** draw.random()) for _ in range(n)]


def _quote(draw: random.Random, text: list[int], low: int, high: int) -> list[int]:
    n = draw.randint(low, high)
    start = draw.randrange(max(1, len(text) - n))
    return text[start : start + n]


def without_repetition(draw: random.Random, vocab_size: int, n_prompt: int, n_tokens: int) -> Script:
    return Script(fresh(draw, vocab_size, n_prompt), fresh(draw, vocab_size, n_tokens))


def quoting_summary(draw: random.Random, vocab_size: int, n_prompt: int, n_tokens: int) -> Script:
    """Own words and quotes of the prompt in turn."""
    prompt, output = fresh(draw, vocab_size, n_prompt), []
    while len(output) < n_tokens:
        output += fresh(draw, vocab_size, draw.randint(6, 14)) + _quote(draw, prompt, 20, 36)
    return Script(prompt, output[:n_tokens])


def code_edit(draw: random.Random, vocab_size: int, n_prompt: int, n_tokens: int) -> Script:
    """The prompt again, with a few tokens changed here and there."""
    prompt, output, at = fresh(draw, vocab_size, n_prompt), [], 0
    while len(output) < n_tokens:
        n = draw.randint(15, 45)
        output += (prompt * 2)[at : at + n] + fresh(draw, vocab_size, draw.randint(1, 6))
        at = (at + n + draw.randint(0, 6)) % len(prompt)
    return Script(prompt, output[:n_tokens])


def list_after_examples(draw: random.Random, vocab_size: int, n_prompt: int, n_tokens: int) -> Script:
    """Records that share their frame, and have a few words of their own."""
    frame = [fresh(draw, vocab_size, n) for n in (4, 12, 6)]
    text: list[int] = []
    while len(text) < n_prompt + n_tokens:
        for part in frame:
            text += part + fresh(draw, vocab_size, draw.randint(1, 4))
    return Script(text[:n_prompt], text[n_prompt : n_prompt + n_tokens])


def dialog(draw: random.Random, vocab_size: int, n_prompt: int, n_tokens: int) -> Script:
    """Half of what is said was said before, by either side."""
    prompt, output = fresh(draw, vocab_size, n_prompt), []
    while len(output) < n_tokens:
        output += fresh(draw, vocab_size, draw.randint(4, 16)) + _quote(draw, prompt + output, 16, 32)
    return Script(prompt, output[:n_tokens])


SCRIPTS: dict[str, Callable[[random.Random, int, int, int], Script]] = {
    "quoting summary": quoting_summary,
    "code edit": code_edit,
    "list after examples": list_after_examples,
    "dialog": dialog,
    "without repetition": without_repetition,
}

_STORY = (
    "The harbour master kept a ledger of every ship that entered the bay. On the third of May the brig Fortune came in "
    "with a cargo of salt and a broken mast. Her captain, a quiet man from the north, asked for timber and was told to "
    "wait. The harbour master wrote down the hour, the cargo and the broken mast, and closed the ledger."
)
_CODE = (
    "def total(items):\n    result = 0\n    for item in items:\n        result = result + item.price * item.count\n"
    "    return result\n\n\ndef average(items):\n    if not items:\n        return 0\n"
    "    return total(items) / len(items)\n"
)
SPEAKING_PROMPTS = {
    "quoting summary": f"{_STORY}\n\nRepeat the text above word for word:\n\nThe harbour master",
    "code edit": f"{_CODE}\n\nThe same code with type annotations:\n\n{_CODE[:17]}",
    "list after examples": "Country: France. Capital: Paris. Continent: Europe.\nCountry: Japan. Capital: Tokyo. "
    "Continent: Asia.\nCountry: Kenya. Capital: Nairobi. Continent: Africa.\nCountry:",
    "dialog": "User: What is the capital of France?\nAssistant: The capital of France is Paris.\nUser: What is the "
    "capital of Italy?\nAssistant: The capital of Italy is Rome.\nUser: What is the capital of Spain?\nAssistant:",
    "without repetition": "My favourite walk begins behind the old mill and",
}
