"""The corpus: seeded documents drawn from the grammars, the held-out questions kept out of it."""

import re
from dataclasses import dataclass

from recipe import chats, llama_facts, stories
from recipe.grammar import Writer, noisy, read_text

# Questions that are kept out of training, each with a pattern that a right answer matches. They were written by hand
# before the grammar was, in the words that a person would use, so that the share of them that is answered right says
# whether the model understands wordings rather than remembers them.
HELD_OUT: list[tuple[str, str]] = [tuple(pair) for pair in read_text("held_out")]


@dataclass(frozen=True)
class Document:
    """A plain text, or a chat: a system message ("" for none) and its exchanges of user and assistant."""

    text: str = ""
    system: str = ""
    exchanges: tuple[tuple[str, str], ...] = ()


def bare(question: str) -> str:
    """The question without case, marks and doubled spaces, to tell whether two wordings are the same."""
    return " ".join(re.sub(r"[^\w\s.]|\.(?!\w)", " ", question.lower()).split())


BARE_HELD_OUT = frozenset(bare(question) for question, _ in HELD_OUT)
PLAIN_KINDS = {stories.story: 6, stories.opening: 16, stories.translations: 10}
CHAT_KINDS = {
    chats.cooking: 4, chats.city: 9, chats.haiku: 5, chats.emojis: 4, chats.birthday: 8, chats.manners: 3, chats.unknown: 9,
    chats.word: 7,
}  # fmt: skip
LLAMA_WEIGHT = 52
EXACT_SYSTEM = (
    "You are a kind, respectful and honest assistant. Help as well as you can, and stay safe while you do. Your "
    "answers must not "
    "contain anything harmful, hateful, dangerous or against the law, and they should be fair and friendly to "
    "everyone.\n\n"
    "When a question makes no sense or does not fit the facts, say why instead of guessing. When you do not know an "
    "answer, "
    "say so rather than make one up."
)


def _chat(rng: Writer) -> Document:
    """A chat on one subject, or now and then on two, with the slips of the keyboard put in."""
    kinds = {**CHAT_KINDS, None: LLAMA_WEIGHT}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    system, exchanges = ("", llama_facts.exchanges(rng)) if kind is None else kind(rng)
    if not system:
        for more in (chats.manners, chats.word, chats.birthday, llama_facts.exchanges, chats.city):
            if rng.random() < 0.04:
                found = more(rng)
                exchanges = exchanges + (found if isinstance(found, list) else found[1])
        if rng.random() < 0.12:
            system = EXACT_SYSTEM if rng.random() < 0.3 else chats.safety_prompt(rng)
        if rng.random() < 0.04:
            exchanges = exchanges + _many(rng)
    may_slip = kind not in (chats.birthday, chats.word)  # what is copied or looked up must stand in the question
    noised = tuple((noisy(rng, user, typos=may_slip), answer) for user, answer in exchanges)
    return Document(system=system, exchanges=noised)


def _many(rng: Writer) -> list[tuple[str, str]]:
    """Exchanges on mixed subjects for a long chat, so that late positions are trained as well."""
    kinds = [kind for kind in CHAT_KINDS if kind not in (chats.haiku, chats.emojis)]
    chosen = [rng.choice(kinds)(rng)[1] for _ in range(3)] + [llama_facts.exchanges(rng) for _ in range(3)]
    rng.shuffle(chosen)
    return [exchange for exchanges in chosen for exchange in exchanges]


def _document(rng: Writer) -> Document:
    total = LLAMA_WEIGHT + sum(CHAT_KINDS.values())
    kinds = {**PLAIN_KINDS, None: total}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    return _chat(rng) if kind is None else Document(text=kind(rng))


def holds_held_out(document: Document) -> bool:
    """Whether one of the document's questions is a held-out one, but for case and marks."""
    return any(bare(user) in BARE_HELD_OUT for user, _ in document.exchanges)


def documents(seed: int, count: int, *, lead: float = 0.0) -> list[Document]:
    """That many documents of a seed; a chat that holds a held-out question is left out.

    Args:
        lead: how much answers prefer their first alternatives; see `Writer`.
    """
    rng = Writer(seed)
    rng.lead = lead
    found: list[Document] = []
    while len(found) < count:
        document = _document(rng)
        if not holds_held_out(document):
            found.append(document)
    return found
