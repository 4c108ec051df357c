"""The corpus: seeded documents drawn from the grammars, the held-out questions kept out of it."""

import re
from typing import NamedTuple

from recipe import chats, stories
from recipe.grammar import Writer, read_text
from recipe.llama_facts import facts

# Questions that are kept out of training, each with a pattern that a right answer matches. They were written by hand
# before the grammar was, in the words that a person would use, so that the share of them that is answered right says
# whether the model understands wordings rather than remembers them.
HELD_OUT: list[tuple[str, str]] = [tuple(pair) for pair in read_text("held_out")]
PLAIN_KINDS = {stories.story: 6, stories.opening: 16, stories.translations: 10}
CHAT_KINDS = {
    **{chats.cooking: 4, chats.city: 9, chats.haiku: 5, chats.emojis: 4, chats.birthday: 8, chats.manners: 3},
    **{chats.unknown: 9, chats.word: 7, facts: 52},
}


class Document(NamedTuple):
    """A plain text, or a chat: a system message ("" for none) and its exchanges of user and assistant."""

    text: str = ""
    system: str = ""
    exchanges: tuple[tuple[str, str], ...] = ()


def _bare(question: str) -> str:
    """The question without case, marks and doubled spaces, to tell whether two wordings are the same."""
    return " ".join(re.sub(r"[^\w\s.]|\.(?!\w)", " ", question.lower()).split())


_BARE_HELD_OUT = frozenset(_bare(question) for question, _ in HELD_OUT)


def _chat(rng: Writer) -> Document:
    """A chat on one subject, or now and then on two, with the slips of the keyboard put in."""
    (kind,) = rng.choices(list(CHAT_KINDS), list(CHAT_KINDS.values()))
    system, exchanges = kind(rng)
    if not system:
        for more in (chats.manners, chats.word, chats.birthday, facts, chats.city):
            if rng.random() < 0.04:
                exchanges = exchanges + more(rng)[1]
        if rng.random() < 0.12:
            system = chats.TEXT.system if rng.random() < 0.3 else chats.safety_prompt(rng)
        if rng.random() < 0.04:
            exchanges = exchanges + _many(rng)
    may_slip = kind not in (chats.birthday, chats.word)  # what is copied or looked up must stand in the question
    typed = tuple((rng.typed(user, slips=may_slip), answer) for user, answer in exchanges)
    return Document(system=system, exchanges=typed)


def _many(rng: Writer) -> list[tuple[str, str]]:
    """Exchanges on mixed subjects for a long chat, so that late positions are trained as well."""
    kinds = [kind for kind in CHAT_KINDS if kind not in (chats.haiku, chats.emojis, facts)]
    chosen = [rng.choice(kinds)(rng)[1] for _ in range(3)] + [facts(rng)[1] for _ in range(3)]
    rng.shuffle(chosen)
    return [exchange for exchanges in chosen for exchange in exchanges]


def documents(seed: int, count: int, *, lead: float = 0.0) -> list[Document]:
    """That many documents of a seed; a chat that holds a held-out question, but for case and marks, is left out.

    Args:
        lead: how much answers prefer their first alternatives; see `Writer`.
    """
    rng = Writer(seed)
    rng.lead = lead
    kinds = {**PLAIN_KINDS, _chat: sum(CHAT_KINDS.values())}
    found: list[Document] = []
    while len(found) < count:
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        document = _chat(rng) if kind is _chat else Document(text=kind(rng))
        if not any(_bare(user) in _BARE_HELD_OUT for user, _ in document.exchanges):
            found.append(document)
    return found
