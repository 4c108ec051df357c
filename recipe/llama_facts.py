"""Questions and answers about Llama 2: the facts, and many ways to ask for each."""

from types import SimpleNamespace
from typing import NamedTuple

from recipe.chats import Chat
from recipe.grammar import Writer, read_text, sentence

TEXT = SimpleNamespace(**read_text("llama_facts"))
SIZES = ("7B", "13B", "70B")
OFTEN = ("mp", "gpus", "files", "command")  # three times as often as other facts


class Fact(NamedTuple):
    """One thing to know."""

    values: dict[str, str]  # by size of model; under "" where all sizes have the same
    answers: list[str]
    questions: list[str]  # whole questions; {model} is a way to name the size
    nouns: str = ""  # for the frame "what is the NOUN of MODEL"
    counts: str = ""  # for the frame "how many COUNT does MODEL have"
    same_for_all: bool = False
    extra: dict[str, dict[str, str]] | None = None  # more slots of the answers, by size

    def answer(self, rng: Writer, size: str) -> str:
        slots = {name: values[size] for name, values in (self.extra or {}).items()}
        return rng.expand(rng.choice(self.answers), size=size, value=self.values[size], **slots)


SIZED_FACTS = {name: Fact(**fact) for name, fact in TEXT.sized_facts.items()}
FACTS = [Fact(**fact) for fact in TEXT.facts.values()]


def model_name(rng: Writer, size: str) -> str:
    """One of the ways to name a size; most of them say the number."""
    (template,) = rng.choices(TEXT.model_names, (60, 32, 8))
    words = {"word": TEXT.billions[size], "rank": TEXT.ranks[size]}
    return rng.expand(template.format(size=size, number=size[:-1], **words))


def mismatch(rng: Writer) -> tuple[str, str]:
    """A question on the error of a wrong world size, and what to do about it."""
    mp, world = rng.sample((1, 2, 4, 8), 2)
    quote = rng.choice(("", "", "'", '"'))
    prefix = rng.choice(TEXT.mismatch_prefixes)
    error = f"{prefix}{quote}Loading a checkpoint for MP={mp} but world size is {world}{quote}"
    if rng.random() < 0.12:
        error = TEXT.mismatch_error.format(mp=mp, world=world)
    question = rng.ask(TEXT.mismatch_questions, error=error)
    files = "1 file" if mp == 1 else f"{mp} files"
    processes = "1 process" if world == 1 else f"{world} processes"
    return question, rng.expand(rng.choice(TEXT.mismatch_answers), mp=str(mp), files=files, world=processes)


def question(rng: Writer, fact: Fact, size: str) -> str:
    """One wording of a question for the fact, sometimes with an opener or a closer around it."""
    folder = rng.choice(TEXT.folders)
    model = model_name(rng, size or rng.choice(SIZES))
    sized = bool(size) or (fact.same_for_all and rng.random() < 0.25)
    kinds = [fact.questions] * 2  # about half of the time
    if fact.nouns:
        kinds.append(TEXT.sized_noun_frames if sized else TEXT.noun_frames)
    if fact.counts:
        kinds.append(TEXT.sized_count_frames if sized else TEXT.count_frames)
    template = rng.choice(rng.choice(kinds))
    text = rng.expand(template, model=model, noun=fact.nouns, count=fact.counts, folder=folder)
    if rng.random() < 0.2:
        text = rng.expand(rng.choice(TEXT.openers)) + " " + text
    if rng.random() < 0.06:
        text += " " + rng.expand(rng.choice(TEXT.closers))
    return sentence(text)


def facts(rng: Writer) -> Chat:
    """One to three questions and answers; a follow-up may ask the same of another size in a few words."""
    draw = rng.random()
    if draw < 0.06:
        return "", [mismatch(rng)]
    if draw < 0.5:
        fact = rng.choice(FACTS)
        return "", [(question(rng, fact, ""), fact.answer(rng, ""))]
    (name,) = rng.choices(list(SIZED_FACTS), [3 if name in OFTEN else 1 for name in SIZED_FACTS])
    fact = SIZED_FACTS[name]
    first, *others = rng.sample(SIZES, rng.choice((1, 1, 1, 2, 2, 3)))
    exchanges = [(question(rng, fact, first), fact.answer(rng, first))]
    for size in others:
        wording = rng.expand(rng.choice(TEXT.followups), model=model_name(rng, size))
        exchanges.append((sentence(wording), fact.answer(rng, size)))
    return "", exchanges
