"""Plain texts: little stories, openings that a reader would finish, and lists of word pairs to translate."""

import re

from recipe.grammar import Writer, answered, expand, read_templates, sentence
from recipe.words import name, pairs

TEXT = read_templates("stories")


def story(rng: Writer) -> str:
    """A story of about six sentences: someone has a thing, loses it or gives it away, and finds a friend."""
    where, other = rng.sample(TEXT.lost_at, 2)
    slots = {
        "start": rng.choice(TEXT.starts),
        "adjective": rng.choice(TEXT.adjectives),
        "animal": rng.choice(TEXT.animals),
        "place": rng.choice(TEXT.places),
    }
    slots |= {
        "hero": name(rng),
        "thing": rng.choice(TEXT.things),
        "where": where,
        "other": other,
        "friend": rng.choice(TEXT.friends),
    }
    text = expand(rng, rng.choice(TEXT.story), turn=rng.choice(TEXT.turns), Pronoun=rng.choice(("His", "Her")), **slots)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def meaning(rng: Writer) -> str:
    clauses = TEXT.living[:3] if rng.random() < rng.lead else rng.sample(TEXT.living, 3)
    a, b, c = (answered(rng, clause) for clause in clauses)
    frame = TEXT.meaning[0] if rng.random() < 0.5 else rng.choice(TEXT.meaning)
    return answered(rng, frame, a=a, b=b, c=c, end=rng.answer(TEXT.living_ends))


def relativity(rng: Writer) -> str:
    start = TEXT.relativity_start[0] if rng.random() < 0.5 else rng.choice(TEXT.relativity_start)
    return answered(rng, start + " " + rng.answer(TEXT.relativity))


def email(rng: Writer) -> str:
    ask = TEXT.email_ask[0] if rng.random() < 0.5 else rng.choice(TEXT.email_ask)
    hello = "Hello everyone" if rng.random() < 0.5 else "[Hi team|Dear team|Hello team|Dear all|Hi all|Dear colleagues]"
    bye = "[Best wishes|Kind regards|Best regards|Cheers|Yours]"
    return (
        expand(rng, ask)
        + "\n\n"
        + answered(rng, rng.answer(TEXT.email), hello=hello, praise=rng.answer(TEXT.praise), bye=bye, name=name(rng))
    )


def opening(rng: Writer) -> str:
    """A short text with one of the well-known openings, or another few sentences."""
    kind = rng.choice((meaning, relativity, email, None))
    if kind is not None:
        return kind(rng)
    return expand(rng, rng.choice(TEXT.others), name=name(rng), name2=name(rng))


def translations(rng: Writer) -> str:
    """A header and three to eight lines of one style, each an English word and its French."""
    header = TEXT.headers[0] if rng.random() < 0.5 else expand(rng, rng.choice(TEXT.headers))
    arrow = rng.choice(TEXT.arrows)
    lines = [english + arrow + french for english, french in pairs(rng, rng.randint(3, 8))]
    if rng.random() < 0.1:
        lines = [sentence(line) for line in lines]
    return (header + rng.choice(("\n\n", "\n\n", "\n")) if header else "") + "\n".join(lines)
