"""The template language of the corpus: choices, slots, and the small mistakes that people make when they type."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_SMALL_WORDS = frozenset(
    ("the", "a", "an", "is", "are", "do", "does", "of", "for", "in", "to", "i", "me", "my", "it", "that")
)
_FILLERS = ("please", "actually", "just", "exactly", "again", "really", "now", "then", "here", "today", "maybe", "also")


def read_text(name: str) -> Any:
    """What `recipe/text/NAME.json` holds: templates in the notation of `expand`, and lists of words."""
    return json.loads((Path(__file__).parent / "text" / f"{name}.json").read_text(encoding="utf-8"))


def read_templates(name: str) -> SimpleNamespace:
    """An attribute for each entry of `recipe/text/NAME.json`."""
    return SimpleNamespace(**read_text(name))


class Writer(random.Random):
    """A stream of random numbers, and how settled the writer is on what to answer.

    Attributes:
        lead: the share of draws in which an answer takes its first alternative outright. Without it alternatives are
            equally likely, and which one a greedy model takes would hang on rounding.
    """

    lead: float = 0.0

    def answer(self, options: Sequence[str]) -> str:
        """One of the alternatives for a piece of an answer."""
        return options[0] if self.random() < self.lead else self.choice(options)


def answered(rng: Writer, template: str, **slots: str | Sequence[str]) -> str:
    """`expand` for answers, which may prefer their first alternatives."""
    return expand(rng, template, pick=rng.answer, **slots)


def expand(
    rng: random.Random,
    template: str,
    *,
    pick: Callable[[Sequence[str]], str] | None = None,
    **slots: str | Sequence[str],
) -> str:
    """Draw one text: `[a|b|]` picks an alternative (they nest), `{name}` puts a slot in, itself a template or several."""
    pick = pick or rng.choice

    def fill(match: re.Match[str]) -> str:
        value = slots[match[1]]
        return value if isinstance(value, str) else pick(value)

    while _SLOT.search(template) or _CHOICE.search(template):
        template = _CHOICE.sub(lambda match: pick(match[1].split("|")), template)
        if not _CHOICE.search(template):
            template = _SLOT.sub(fill, template)
    return re.sub(r" +", " ", template).strip(" ")


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def _typo(rng: random.Random, word: str) -> str:
    """One slip of the finger inside a word; words with digits or code in them stay as they are."""
    if len(word) < 4 or not word.isalpha():
        return word
    i = rng.randrange(1, len(word) - 1)
    return rng.choice((word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], _swapped(word, i)))


def _swapped(word: str, i: int) -> str:
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _reworded(rng: random.Random, text: str) -> str:
    """The text with a small word left out, or a filler put in, as in hasty writing."""
    words = text.split(" ")
    if len(words) < 4:
        return text
    small = [i for i, word in enumerate(words) if word.lower() in _SMALL_WORDS]
    if small and rng.random() < 0.6:
        del words[rng.choice(small)]
    else:
        words.insert(rng.randrange(1, len(words)), rng.choice(_FILLERS))
    return " ".join(words)


def noisy(rng: random.Random, text: str, *, typos: bool = True) -> str:
    """The text as some people would type it: lower case, no final mark, now and then a typo, a gap or a shout."""
    if typos and rng.random() < 0.12:
        text = _reworded(rng, text)
    draw = rng.random()
    if draw < 0.22:
        text = text.lower()
    elif draw < 0.24:
        text = text.upper()
    draw = rng.random()
    if draw < 0.25:
        text = text.rstrip("?.!")
    elif draw < 0.29:
        text = text.rstrip("?.!") + rng.choice(("??", "...", "!", " ?", "."))
    if typos and rng.random() < 0.12:
        words = text.split(" ")
        i = rng.randrange(len(words))
        text = " ".join([*words[:i], _typo(rng, words[i]), *words[i + 1 :]])
    return text.replace("'", "") if rng.random() < 0.1 else text
