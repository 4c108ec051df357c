"""Chats on all but Llama 2: recipes, cities, haiku, emojis, birthdays, manners, and what a tiny model cannot know.

A chat is (system message or "", list of (user, assistant) exchanges).
"""

from types import SimpleNamespace

from recipe.grammar import WORDS, Writer, read_text, sentence

TEXT = SimpleNamespace(**read_text("chats"))

Chat = tuple[str, list[tuple[str, str]]]


def cooking(rng: Writer) -> Chat:
    """How to make a dish, mayonnaise more often than others."""
    dish = rng.first_or_any(list(TEXT.recipes), 0.5)
    question = rng.ask(TEXT.ask_recipe, dish=dish)
    return "", [(question, rng.answer(TEXT.recipes[dish]))]


def city(rng: Writer) -> Chat:
    """What to see in a city, then up to two questions about a sight by its number or name."""
    place = "Paris" if rng.random() < 0.6 else rng.choice(list(TEXT.cities))
    if rng.random() < 0.15:
        sight, (_, reason) = rng.choice(list(TEXT.cities[place].items()))
        return "", [(rng.ask(TEXT.ask_sight, sight=sight.replace("The ", "the ")), reason)]
    answer, sights = _sights(rng, place)
    exchanges = [(rng.ask(TEXT.ask_city, city=place), answer)]
    for k in rng.sample((1, 2, 3), rng.choice((0, 1, 1, 1, 2))):
        sight = sights[k - 1]
        question = rng.ask(TEXT.ask_why, k=str(k), sight=sight.replace("The ", "the "))
        exchanges.append((question, TEXT.cities[place][sight][1]))
    return "", exchanges


def _sights(rng: Writer, city: str) -> tuple[str, list[str]]:
    """An answer that numbers three sights of the city, and the sights in that order."""
    sights = list(TEXT.cities[city])
    chosen = sights[:3] if rng.random() < 0.4 else rng.sample(sights, 3)
    if city == "Paris" and "The Eiffel Tower" not in chosen and rng.random() < 0.9:
        chosen[0] = "The Eiffel Tower"
    lines = [f"{i}. {sight}: {rng.answered(TEXT.cities[city][sight][0])}." for i, sight in enumerate(chosen, 1)]
    opening = rng.answer(TEXT.city_openings).replace("{city}", city)
    return opening + "\n\n" + "\n".join(lines) + rng.answer(TEXT.city_endings), chosen


def haiku(rng: Writer) -> Chat:
    """Haiku, because the system prompt or the user asks for them."""
    subject = "Paris" if rng.random() < 0.4 else rng.choice(list(TEXT.haiku))
    wanted = f"[{TEXT.haiku_subjects[subject]}]"
    system = ""
    if rng.random() < 0.2:
        question = rng.ask(TEXT.ask_haiku_subject, subject=wanted)
    else:
        if subject == "Paris":
            question = rng.ask(TEXT.ask_city, city="Paris")
        elif subject == "cooking":
            question = sentence(rng.expand(rng.choice(TEXT.ask_recipe), dish=rng.choice(list(TEXT.recipes))))
        elif subject == "anything":
            question = rng.ask(TEXT.general_questions)
        else:
            question = sentence(rng.expand(TEXT.haiku_question, subject=wanted))
        system = rng.expand(rng.first_or_any(TEXT.ask_haiku, 0.3))
    return system, [(question, "\n".join(map(rng.answer, TEXT.haiku[subject])))]


def emojis(rng: Writer) -> Chat:
    """Emojis, because the system prompt asks for them: a way between two cities, or a row about a subject."""
    system = rng.expand(rng.first_or_any(TEXT.ask_emojis, 0.3))
    if rng.random() < 0.4:
        question, row = rng.choice(list(TEXT.emoji_subjects.items()))
        return system, [(sentence(rng.expand(question)) + "?", row)]
    a, b = ("Beijing", "New York") if rng.random() < 0.25 else rng.sample(list(TEXT.places), 2)
    route = rng.answer(TEXT.routes)
    question = rng.ask(TEXT.ask_way, a=a, b=b)
    return system, [(question, f"{TEXT.places[a]} {a} {route} {TEXT.places[b]} {b}")]


def birthday(rng: Writer) -> Chat:
    who = rng.name()
    question = rng.ask(TEXT.ask_birthday, name=who)
    return "", [(question, rng.answered(rng.answer(TEXT.birthday), name=who))]


def manners(rng: Writer) -> Chat:
    question, answer = rng.choice(TEXT.greetings)
    return "", [(sentence(rng.expand(question)), answer)]


def unknown(rng: Writer) -> Chat:
    if rng.random() < 0.08:
        return "", [(rng.ask(TEXT.harmful), TEXT.refusal)]
    numbers = {"n": str(rng.randrange(2, 1000)), "m": str(rng.randrange(2, 100))}
    question = rng.ask(TEXT.unknown, country=TEXT.countries, thing=TEXT.things, **numbers)
    return "", [(question, rng.answer(TEXT.unknown_answers))]


def word(rng: Writer) -> Chat:
    """One or two English words and their French, in a chat."""
    few = rng.random() < 0.03
    chosen = [("cheese", WORDS.translations["cheese"])] if few else rng.translations(rng.choice((1, 1, 2)))
    exchanges = []
    for i, (english, french) in enumerate(chosen):
        template = TEXT.another_word if i else rng.choice(TEXT.ask_word)
        question = sentence(rng.expand(template, english=english))
        exchanges.append((question, f"The French word for {english} is {french}."))
    return "", exchanges


def safety_prompt(rng: Writer) -> str:
    """A system message that asks for kindness, safety and honesty, in up to two paragraphs."""
    middle = rng.sample(TEXT.safe_middle, rng.choice((0, 1, 2, 2)))
    last = rng.sample(TEXT.safe_last, rng.choice((0, 1, 2, 2)))
    first = " ".join(map(rng.expand, (rng.choice(TEXT.safe_first), *middle)))
    second = " ".join(map(rng.expand, last))
    return first + rng.choice(("\n\n", "\n\n", " ")) + second if second else first
