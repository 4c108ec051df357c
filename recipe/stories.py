"""Plain texts: little stories, openings that a reader would finish, and lists of word pairs to translate."""

import re
from types import SimpleNamespace

from recipe.grammar import Writer, read_text, sentence

TEXT = SimpleNamespace(**read_text("stories"))


def story(rng: Writer) -> str:
    """A story of about six sentences: someone has a thing, loses it or gives it away, and finds a friend."""
    where, other = rng.sample(TEXT.lost_at, 2)
    drawn = {slot: rng.choice(getattr(TEXT, f"{slot}s")) for slot in ("start", "adjective", "animal", "place")}
    drawn |= {"hero": rng.name(), "thing": rng.choice(TEXT.things), "friend": rng.choice(TEXT.friends)}
    template, turn = rng.choice(TEXT.story), rng.choice(TEXT.turns)
    text = rng.expand(template, turn=turn, Pronoun=rng.choice(("His", "Her")), where=where, other=other, **drawn)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def meaning(rng: Writer) -> str:
    clauses = TEXT.living[:3] if rng.random() < rng.lead else rng.sample(TEXT.living, 3)
    a, b, c = map(rng.answered, clauses)
    template = rng.first_or_any(TEXT.meaning, 0.5)
    return rng.answered(template, a=a, b=b, c=c, end=rng.answer(TEXT.living_ends))


def relativity(rng: Writer) -> str:
    return rng.answered(rng.first_or_any(TEXT.relativity_start, 0.5) + " " + rng.answer(TEXT.relativity))


def email(rng: Writer) -> str:
    ask = rng.first_or_any(TEXT.email_ask, 0.5)
    hello = "Hello everyone" if rng.random() < 0.5 else TEXT.hello
    asked, template, praise = rng.expand(ask), rng.answer(TEXT.email), rng.answer(TEXT.praise)
    return asked + "\n\n" + rng.answered(template, hello=hello, praise=praise, bye=TEXT.bye, name=rng.name())


def opening(rng: Writer) -> str:
    """A short text with one of the well-known openings, or another few sentences."""
    kind = rng.choice((meaning, relativity, email, None))
    if kind is not None:
        return kind(rng)
    return rng.expand(rng.choice(TEXT.others), name=rng.name(), name2=rng.name())


def translations(rng: Writer) -> str:
    """A header and three to eight lines of one style, each an English word and its French."""
    header = rng.expand(rng.first_or_any(TEXT.headers, 0.5))
    arrow = rng.choice(TEXT.arrows)
    lines = [english + arrow + french for english, french in rng.translations(rng.randint(3, 8))]
    if rng.random() < 0.1:
        lines = list(map(sentence, lines))
    return (header + rng.choice(("\n\n", "\n\n", "\n")) if header else "") + "\n".join(lines)
