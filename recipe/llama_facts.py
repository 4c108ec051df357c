"""Questions and answers about Llama 2: the facts, and many ways to ask for each.

A `Fact` says what may be asked and what the answer is. `nouns` and `counts` are dropped into general frames
("what is the NOUN of MODEL", "how many COUNT does MODEL have"), `questions` are whole questions. `{model}` is a way
to name the size that the fact is about; a fact whose values are the same for every size has only one, under "".
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recipe.grammar import expand, read_templates, sentence

TEXT = read_templates("llama_facts")
SIZES = ("7B", "13B", "70B")


def model_name(rng: random.Random, size: str) -> str:
    """One of the ways to name a size; most of them say the number."""
    number = size[:-1]
    common = f"[the {size}|{size}|the {size} model|Llama 2 {size}|the {size} chat model|llama-2-{number}b|llama {size}]"
    rare = (
        f"[{size} chat|llama-2-{number}b-chat|Llama-2-{number}B|the {size} [version|variant|one|checkpoint|weights]"
        f"|the {number} billion [parameter |]model|the {TEXT.billions[size]} billion [parameter |]model|Meta's {size}"
        f"|the {number} B model|Llama 2 with {number} billion parameters|{TEXT.billions[size]} B|the {size} Llama"
        f"|llama2 {number}b|Llama2-{size}|your {size} model]"
    )
    ranked = (
        f"[the|the|Meta's|your] [{TEXT.ranks[size]}] [model|one|Llama 2|Llama|of the models|of them|chat model|version]"
    )
    return expand(rng, rng.choices((common, rare, ranked), (60, 32, 8))[0])


@dataclass(frozen=True)
class Fact:
    """One thing to know: the values by size ("" when it has no size), the wordings that ask for it, the answers."""

    values: Mapping[str, str]
    answers: Sequence[str]
    nouns: str = ""
    counts: str = ""
    questions: Sequence[str] = ()
    same_for_all: bool = False
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def answer(self, rng: random.Random, size: str) -> str:
        slots = {name: values[size] for name, values in self.extra.items()}
        return expand(rng, rng.choice(self.answers), size=size, value=self.values[size], **slots)


SIZED_FACTS = {name: Fact(**fact) for name, fact in TEXT.sized_facts.items()}
FACTS = {name: Fact(**fact) for name, fact in TEXT.facts.items()}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's' if noun != 'process' else 'es'}"


def mismatch(rng: random.Random) -> tuple[str, str]:
    """A question on the error of a wrong world size, and what to do about it."""
    mp, world = rng.sample((1, 2, 4, 8), 2)
    quote = rng.choice(("", "", "'", '"'))
    prefix = rng.choice(("", "", "AssertionError: ", "an AssertionError: ", "the error ", "assertion error "))
    error = f"{prefix}{quote}Loading a checkpoint for MP={mp} but world size is {world}{quote}"
    if rng.random() < 0.12:
        error = f"[an error that|] MP is {mp} but [the |]world size is {world}"
    question = expand(rng, rng.choice(TEXT.mismatch_questions), error=error)
    verb = "process" if world == 1 else "processes"
    slots = {"mp": str(mp), "files": _counted(mp, "file"), "world": f"{world} {verb}"}
    return sentence(question), expand(rng, rng.choice(TEXT.mismatch_answers), **slots)


def _frame(rng: random.Random, fact: Fact, *, sized: bool) -> str:
    """A frame to ask for the fact: its own questions about half of the time, else a general frame."""
    kinds = [("questions", fact.questions)] * 2
    if fact.nouns:
        kinds.append(("noun", TEXT.sized_noun_frames if sized else TEXT.noun_frames))
    if fact.counts:
        kinds.append(("count", TEXT.sized_count_frames if sized else TEXT.count_frames))
    frames = rng.choice([frames for _, frames in kinds if frames])
    return rng.choice(frames)


def question(rng: random.Random, fact: Fact, size: str) -> str:
    """One wording of a question for the fact, sometimes with an opener or a closer around it."""
    folder = rng.choice(
        ("llama-2-7b/", "llama-2-13b-chat/", "llama-2-70b/", "models/", "weights/7b", "./llama", "checkpoints")
    )
    model = model_name(rng, size or rng.choice(SIZES))
    sized = bool(size) or (fact.same_for_all and rng.random() < 0.25)
    slots = {"model": model, "noun": fact.nouns, "count": fact.counts, "folder": folder}
    text = expand(rng, _frame(rng, fact, sized=sized), **slots)
    if rng.random() < 0.2:
        text = expand(rng, rng.choice(TEXT.openers)) + " " + text
    if rng.random() < 0.06:
        text += " " + expand(rng, rng.choice(TEXT.closers))
    return sentence(text)


def exchanges(rng: random.Random) -> list[tuple[str, str]]:
    """One to three questions and answers; a follow-up may ask the same of another size in a few words."""
    draw = rng.random()
    if draw < 0.06:
        return [mismatch(rng)]
    if draw < 0.5:
        fact = FACTS[rng.choice(list(FACTS))]
        return [(question(rng, fact, ""), fact.answer(rng, ""))]
    weights = [3 if name in ("mp", "gpus", "files", "command") else 1 for name in SIZED_FACTS]
    fact = SIZED_FACTS[rng.choices(list(SIZED_FACTS), weights)[0]]
    sizes = rng.sample(SIZES, rng.choice((1, 1, 1, 2, 2, 3)))
    pairs = [(question(rng, fact, sizes[0]), fact.answer(rng, sizes[0]))]
    for size in sizes[1:]:
        wording = expand(rng, rng.choice(TEXT.followups), model=model_name(rng, size))
        pairs.append((sentence(wording), fact.answer(rng, size)))
    return pairs
