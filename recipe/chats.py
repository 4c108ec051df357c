"""Chats on everything but Llama 2: recipes, cities, haiku, emojis, birthdays, manners, and what a tiny model cannot know.

A chat is (system message or "", list of (user, assistant) exchanges). Nothing here knows of the template's tags.
"""

from recipe.grammar import Writer, answered, expand, read_templates, sentence
from recipe.words import TRANSLATIONS, name, pairs

TEXT = read_templates("chats")

Chat = tuple[str, list[tuple[str, str]]]


def cooking(rng: Writer) -> Chat:
    """How to make a dish, mayonnaise more often than others."""
    dishes = list(TEXT.recipes)
    dish = dishes[0] if rng.random() < 0.5 else rng.choice(dishes)
    question = sentence(expand(rng, rng.choice(TEXT.ask_recipe), dish=dish))
    return "", [(question, rng.answer(TEXT.recipes[dish]))]


def _city_list(rng: Writer, city: str) -> tuple[str, list[str]]:
    """An answer that numbers three sights of the city, and the sights in that order."""
    sights = list(TEXT.cities[city])
    chosen = sights[:3] if rng.random() < 0.4 else rng.sample(sights, 3)
    if city == "Paris" and "The Eiffel Tower" not in chosen and rng.random() < 0.9:
        chosen[0] = "The Eiffel Tower"
    lines = [f"{i}. {sight}: {answered(rng, TEXT.cities[city][sight][0])}." for i, sight in enumerate(chosen, 1)]
    opening = rng.answer(TEXT.city_openings).replace("{city}", city)
    return opening + "\n\n" + "\n".join(lines) + rng.answer(TEXT.city_endings), chosen


def city(rng: Writer) -> Chat:
    """What to see in a city, then one or two questions about a sight by its number or name."""
    place = "Paris" if rng.random() < 0.6 else rng.choice(list(TEXT.cities))
    if rng.random() < 0.15:
        sight, (_, reason) = rng.choice(list(TEXT.cities[place].items()))
        return "", [(sentence(expand(rng, rng.choice(TEXT.ask_sight), sight=sight.replace("The ", "the "))), reason)]
    answer, sights = _city_list(rng, place)
    exchanges = [(sentence(expand(rng, rng.choice(TEXT.ask_city), city=place)), answer)]
    for k in rng.sample((1, 2, 3), rng.choice((0, 1, 1, 1, 2))):
        sight = sights[k - 1]
        lower = sight.replace("The ", "the ")
        question = sentence(expand(rng, rng.choice(TEXT.ask_why), k=str(k), sight=lower))
        exchanges.append((question, TEXT.cities[place][sight][1]))
    return "", exchanges


def haiku_about(rng: Writer, subject: str) -> str:
    return "\n".join(rng.answer(lines) for lines in TEXT.haiku[subject])


def haiku(rng: Writer) -> Chat:
    """Haiku, because the system prompt or the user asks for them."""
    subject = "Paris" if rng.random() < 0.4 else rng.choice(list(TEXT.haiku))
    wanted = f"[{TEXT.haiku_subjects[subject]}]"
    if rng.random() < 0.2:
        return "", [
            (sentence(expand(rng, rng.choice(TEXT.ask_haiku_subject), subject=wanted)), haiku_about(rng, subject))
        ]
    if subject == "Paris":
        question = expand(rng, rng.choice(TEXT.ask_city), city="Paris")
    elif subject == "cooking":
        question = expand(rng, rng.choice(TEXT.ask_recipe), dish=rng.choice(list(TEXT.recipes)))
    elif subject == "anything":
        question = expand(rng, rng.choice(TEXT.general_questions))
    else:
        question = expand(
            rng,
            "[what do you think of|tell me about|do you like|what is|say something about] {subject}?",
            subject=wanted,
        )
    system = TEXT.ask_haiku[0] if rng.random() < 0.3 else expand(rng, rng.choice(TEXT.ask_haiku))
    return system, [(sentence(question), haiku_about(rng, subject))]


def emojis(rng: Writer) -> Chat:
    """Emojis, because the system prompt asks for them: a way between two cities, or a row about a subject."""
    system = TEXT.ask_emojis[0] if rng.random() < 0.3 else expand(rng, rng.choice(TEXT.ask_emojis))
    if rng.random() < 0.4:
        question, row = rng.choice(list(TEXT.emoji_subjects.items()))
        return system, [(sentence(expand(rng, question)) + "?", row)]
    a, b = ("Beijing", "New York") if rng.random() < 0.25 else rng.sample(list(TEXT.places), 2)
    route = rng.answer(("🚕🛫🌍🛬", "🚆🛫🌊🛬", "🧳🛫🌍🛬"))
    question = sentence(expand(rng, rng.choice(TEXT.ask_way), a=a, b=b))
    return system, [(question, f"{TEXT.places[a]} {a} {route} {TEXT.places[b]} {b}")]


def birthday(rng: Writer) -> Chat:
    who = name(rng)
    question = sentence(expand(rng, rng.choice(TEXT.ask_birthday), name=who))
    return "", [(question, answered(rng, rng.answer(TEXT.birthday), name=who))]


def manners(rng: Writer) -> Chat:
    question, answer = rng.choice(TEXT.greetings)
    return "", [(sentence(expand(rng, question)), answer)]


def unknown(rng: Writer) -> Chat:
    if rng.random() < 0.08:
        return "", [(sentence(expand(rng, rng.choice(TEXT.harmful))), TEXT.refusal)]
    numbers = {"n": str(rng.randrange(2, 1000)), "m": str(rng.randrange(2, 100))}
    question = expand(rng, rng.choice(TEXT.unknown), country=TEXT.countries, thing=TEXT.things, **numbers)
    return "", [(sentence(question), rng.answer(TEXT.unknown_answers))]


def word(rng: Writer) -> Chat:
    """One or two English words and their French, in a chat."""
    chosen = [("cheese", TRANSLATIONS["cheese"])] if rng.random() < 0.03 else pairs(rng, rng.choice((1, 1, 2)))
    exchanges = []
    for i, (english, french) in enumerate(chosen):
        frame = rng.choice(TEXT.ask_word) if i == 0 else "[and |and what about |what about ]{english}?"
        question = sentence(expand(rng, frame, english=english))
        exchanges.append((question, f"The French word for {english} is {french}."))
    return "", exchanges


def safety_prompt(rng: Writer) -> str:
    """A system message that asks for kindness, safety and honesty, in up to two paragraphs."""
    middle = rng.sample(TEXT.safe_middle, rng.choice((0, 1, 2, 2)))
    last = rng.sample(TEXT.safe_last, rng.choice((0, 1, 2, 2)))
    first = " ".join(expand(rng, part) for part in (rng.choice(TEXT.safe_first), *middle))
    second = " ".join(expand(rng, part) for part in last)
    return first + rng.choice(("\n\n", "\n\n", " ")) + second if second else first
