"""The template language of the corpus: choices, slots, names, and the slips of people who type."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


def read_text(name: str) -> Any:
    """What `recipe/text/NAME.json` holds: templates in the notation of `Writer.expand`, and lists of words."""
    return json.loads((Path(__file__).parent / "text" / f"{name}.json").read_text(encoding="utf-8"))


WORDS = SimpleNamespace(**read_text("words"))


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


class Writer(random.Random):
    """A stream of random numbers, and how settled the writer is on what to answer.

    Attributes:
        lead: the share of draws in which an answer takes its first alternative outright. Without it alternatives are
            equally likely, and which one a greedy model takes would hang on rounding.
    """

    lead: float = 0.0

    def expand(
        self, template: str, *, pick: Callable[[Sequence[str]], str] | None = None, **slots: str | Sequence[str]
    ) -> str:
        """Draw a text: `[a|b|]` picks an alternative (they nest), `{name}` puts in a slot, one template or several."""
        pick = pick or self.choice

        def fill(match: re.Match[str]) -> str:
            value = slots[match[1]]
            return value if isinstance(value, str) else pick(value)

        while _SLOT.search(template) or _CHOICE.search(template):
            template = _CHOICE.sub(lambda match: pick(match[1].split("|")), template)
            if not _CHOICE.search(template):
                template = _SLOT.sub(fill, template)
        return re.sub(r" +", " ", template).strip(" ")

    def ask(self, templates: Sequence[str], **slots: str | Sequence[str]) -> str:
        """A sentence of one of the templates."""
        return sentence(self.expand(self.choice(templates), **slots))

    def first_or_any(self, options: Sequence[str], share: float) -> str:
        """The first option in that share of draws, otherwise any."""
        return options[0] if self.random() < share else self.choice(options)

    def answer(self, options: Sequence[str]) -> str:
        """One of the alternatives for a piece of an answer."""
        return self.first_or_any(options, self.lead)

    def answered(self, template: str, **slots: str | Sequence[str]) -> str:
        """`expand` for answers, which may prefer their first alternatives."""
        return self.expand(template, pick=self.answer, **slots)

    def name(self) -> str:
        """A first name; one in three is made up, so that names are copied from the prompt rather than recalled."""
        if self.random() < 0.67:
            return self.choice(WORDS.names)
        start, middle, end = map(self.choice, WORDS.syllables)
        return start + (middle if self.random() < 0.6 else "") + end

    def translations(self, count: int) -> list[tuple[str, str]]:
        """Different (English, French) words."""
        return self.sample(list(WORDS.translations.items()), count)

    def typed(self, text: str, *, slips: bool) -> str:
        """The text as some people would type it: lower case, no final mark, now and then a slip, a gap or a shout."""
        if slips and self.random() < 0.12:
            text = self._reworded(text)
        draw = self.random()
        if draw < 0.22:
            text = text.lower()
        elif draw < 0.24:
            text = text.upper()
        draw = self.random()
        if draw < 0.25:
            text = text.rstrip("?.!")
        elif draw < 0.29:
            text = text.rstrip("?.!") + self.choice(("??", "...", "!", " ?", "."))
        if slips and self.random() < 0.12:
            words = text.split(" ")
            i = self.randrange(len(words))
            words[i] = self._mistyped(words[i])
            text = " ".join(words)
        return text.replace("'", "") if self.random() < 0.1 else text

    def _reworded(self, text: str) -> str:
        """The text with a small word left out, or a filler put in, as in hasty writing."""
        words = text.split(" ")
        if len(words) < 4:
            return text
        small = [i for i, word in enumerate(words) if word.lower() in WORDS.small]
        if small and self.random() < 0.6:
            del words[self.choice(small)]
        else:
            words.insert(self.randrange(1, len(words)), self.choice(WORDS.fillers))
        return " ".join(words)

    def _mistyped(self, word: str) -> str:
        """One letter left out, doubled or swapped; words with digits or code stay as they are."""
        if len(word) < 4 or not word.isalpha():
            return word
        i = self.randrange(1, len(word) - 1)
        swapped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        return self.choice((word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], swapped))
