"""Word lists: English and French pairs, people's names, and made-up names that teach copying."""

import random

from recipe.grammar import read_text

_TEXT = read_text("words")
TRANSLATIONS: dict[str, str] = _TEXT["translations"]
NAMES: list[str] = _TEXT["names"]
_SYLLABLES = (
    "Ba Be Bo Da De Do Fa Ga Jo Ka Ke La Le Li Lo Ma Me Mi Na Ne No Pa Ra Re Ro Sa Se Ta Te To Va Vi Wa Za El Al Ol",
    "ri li na va do mi ra la vi ne ta lo di ni re",
    "na ra n l s ia a o e la ne tta nd rt y ck",
)


def name(rng: random.Random) -> str:
    """A first name; one in three is made up, so that names are copied from the prompt rather than recalled."""
    if rng.random() < 0.67:
        return rng.choice(NAMES)
    start, middle, end = (rng.choice(syllables.split()) for syllables in _SYLLABLES)
    return start + (middle if rng.random() < 0.6 else "") + end


def pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different (English, French) words."""
    return rng.sample(list(TRANSLATIONS.items()), count)
