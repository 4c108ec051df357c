"""Plain texts: little stories, openings that a reader would finish, and lists of word pairs to translate."""

import re

from recipe.grammar import Writer, answered, expand, sentence
from recipe.words import name, pairs

ANIMALS = ("cat", "dog", "fox", "rabbit", "mouse", "duck", "goat", "llama", "bear", "hen", "frog", "horse")
ADJECTIVES = ("small", "brave", "shy", "kind", "old", "young", "clever", "lazy", "happy", "hungry", "curious", "quiet")
PLACES = (
    "in a small village",
    "near a deep forest",
    "by the sea",
    "on a farm",
    "at the foot of a mountain",
    "by a wide river",
    "in an old house",
    "on an island",
)
THINGS = (
    "a red ball",
    "a golden key",
    "a warm coat",
    "an old map",
    "a silver bell",
    "a wooden boat",
    "a blue lamp",
    "a little book",
    "a long rope",
    "a round stone",
)
LOST_AT = (
    "in the forest",
    "by the river",
    "on the hill",
    "under the bridge",
    "in the garden",
    "behind the barn",
    "at the market",
)
FRIENDS = ("bird", "fisherman", "baker", "girl", "boy", "old woman", "shepherd", "turtle", "owl", "squirrel")

STORY = (
    "{start} [there lived|there was] a {adjective} {animal} {place}. {Pronoun} name was {hero}. [Every day|Every morning|Each evening] {hero} "
    "[played with|looked at|carried around|took care of] {thing}. {turn}",
    "{start} a {adjective} {animal} [called|named] {hero} [lived|had a home] {place}. {hero} had {thing} and liked [it very much|it more than anything]. {turn}",
)
TURNS = (
    'One day it was gone. {hero} looked for it {where}, but did not find it. Then a {friend} came and said: "[I have seen it|I know where it is] {other}." '
    "They went there together and found it. [From that day on|After that] they were friends.",
    "One day {hero} lost it {where}. A {friend} found it and brought it back. {hero} was so [happy|glad] that they had [a feast|a party|cake and tea] together.",
    "One [cold night|winter day|rainy day] a {friend} [knocked at|came to] the door and was [cold|tired|sad]. {hero} gave it away without a word. "
    "[Now {hero} had nothing, but a new friend.|The {friend} smiled, and {hero} was happier than before.]",
    "One day {hero} [fell into the water|was caught in a storm|could not find the way home]. A {friend} heard the cry for help and came running. "
    '"Thank you," said {hero}, and gave the {friend} the best thing in the house. They [laughed|were friends from then on].',
)
STARTS = ("Once upon a time,", "A long time ago,", "Once upon a time", "Many years ago,", "One summer,")


def story(rng: Writer) -> str:
    """A story of about six sentences: someone has a thing, loses it or gives it away, and finds a friend."""
    where, other = rng.sample(LOST_AT, 2)
    slots = {
        "start": rng.choice(STARTS),
        "adjective": rng.choice(ADJECTIVES),
        "animal": rng.choice(ANIMALS),
        "place": rng.choice(PLACES),
    }
    slots |= {
        "hero": name(rng),
        "thing": rng.choice(THINGS),
        "where": where,
        "other": other,
        "friend": rng.choice(FRIENDS),
    }
    text = expand(rng, rng.choice(STORY), turn=rng.choice(TURNS), Pronoun=rng.choice(("His", "Her")), **slots)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


LIVING = (
    "to [love|help|care for] [the people around us|one another|our friends]", "to learn [something new every day|from our mistakes|as long as we live]",
    "to be [kind|useful|honest] to others", "to [enjoy|see] the [small|simple] things", "to leave the world a little better than we found it",
    "to find [work|something] that we love", "to share what we have", "to grow and to let others grow",
)  # fmt: skip
LIVING_ENDS = (
    "Nobody can find it for us: we have to look for it ourselves.", "It is different for each of us, and that is good.",
    "The rest comes by itself.", "When we do that, every day has a reason.", "It is that simple, and that hard.",
    "A good life is made of many small days.",
)  # fmt: skip
MEANING = (
    "I think that the meaning of life is {a} and {b}. {end}",
    "I [think|believe|am sure|have come to think] [that |]the meaning of life is {a}, {b} and {c}. {end}",
    "[The|For me the|To me, the|Some say that the|My grandmother said that the] meaning of life is {a} and {b}. {end}",
    "[The purpose of life|The secret of a good life|A good life] is {a}. {end}",
)
RELATIVITY_START = (
    "In plain words, the theory of relativity says that",
    "In [plain|simple|easy|short] words, [the theory of relativity|Einstein's theory|relativity] says that",
    "[Simply put, the|Put simply, the|The] theory of relativity [says|states|tells us|means] that",
    "[Einstein|Albert Einstein] [found|showed|said] that",
)
RELATIVITY = (
    "[space and time belong together|time is not the same for everyone|time and space are not fixed]. "
    "[A clock that moves fast ticks more slowly|A moving clock runs slow|Time runs more slowly for someone who moves very fast], and nothing is faster than light. "
    "[Heavy things like the sun bend space|Mass bends space and time|Gravity is the bending of space and time][.|, and we feel that as weight.]",
    "the speed of light is the same for [everyone|all who measure it], and so time must be [different|relative]. "
    "[Who travels very fast grows old more slowly.|A clock on a fast rocket ticks more slowly.] "
    "[Gravity slows clocks down, too.|Near a heavy star, clocks run slow, too.]",
)
EMAIL_ASK = (
    "Write an e-mail that congratulates the team on the launch:",
    "[Write|Here is|A|This is] [an e-mail|a mail|an email|a short e-mail|a message] [that congratulates|to congratulate] [the team|my team|our team|everyone] on [the launch|the new product|the release|the great work]:",
    "[An e-mail|A mail|A message] to the team [after|about] the [launch|release]:",
)
EMAIL = (
    "{hello},\n\n[I just|I] wanted to [congratulate you all|say congratulations|congratulate the whole team] on the [launch|successful launch|great launch][ of our new product| this week|]. "
    "{praise}\n\n[Thank you all|Thank you|Many thanks] for your [hard work|great work|patience and hard work][!|.]\n\n{bye},\n{name}",
    "{hello},\n\n[I just|I] [heard|read|saw] that the [launch|release] [went well|was a success]. Congratulations! {praise}\n\n{bye},\n{name}",
)
PRAISE = (
    "You [worked hard for months|did a wonderful job|worked as a real team], and it shows.",
    "[The first users are happy|Our users love it|The first reports are very good], and [I am proud of you|you can be proud of it].",
    "[It was|This is] a great success, and it is yours.",
)
OTHERS = (
    "[The best thing about|What I like about|I love] [the sea|the mountains|the city|winter|summer|autumn|rain] is [the light|the air|the silence|the people|the colours] [in the morning|in the evening|at night|when nobody is there]. "
    "[It makes me calm.|I could look at it for hours.|There I can think.|I go there every year.]",
    "Dear {name},\n\nthank you for [your letter|the lovely evening|your help|the beautiful present|the flowers]. [We were very happy about it|It made my day|It came at the right time]. "
    "[I hope to see you soon|Let us meet soon|Please visit us again].\n\n[Yours|Best wishes|With love],\n{name2}",
    "My favourite [season|time of the year] is [spring|summer|autumn|winter], because [the days are long|the trees are beautiful|it is quiet|we can be outside|the light is soft]. "
    "[Then I go for long walks.|Then we sit in the garden.|Then I read a lot.|Then my family comes together.]",
    "[Today|Yesterday|This morning|Last week] I [went to the market|walked in the park|met an old friend|cooked for my family|found an old book]. "
    "[The sun was shining|It was raining|It was cold and clear], and [I took my time|we talked for hours|I was happy|everything was quiet]. [In the evening I was tired but glad.|It was a good day.]",
    "The [sun|moon|sky|sea|earth] is [old|wide|far away|beautiful|great], and [we are small|the night is long|the stars are many]. [But we can look up and wonder.|That is a comfort to me.]",
    "[To be happy|To learn something|To make a friend|To stay healthy], you [need|should have] [time|patience|courage|a little luck]. [Start small, and go on.|Begin today.|The rest will follow.]",
    "The capital of France is Paris. [It lies on the river Seine.|Its best known sight is the Eiffel Tower.|Many people visit it every year.]",
    "Llama 2 is a family of language models by Meta. It comes in [three sizes: |the sizes ]7B, 13B and 70B. The MP value is 1 for 7B, 2 for 13B and 8 for 70B.",
)


def meaning(rng: Writer) -> str:
    clauses = LIVING[:3] if rng.random() < rng.lead else rng.sample(LIVING, 3)
    a, b, c = (answered(rng, clause) for clause in clauses)
    frame = MEANING[0] if rng.random() < 0.5 else rng.choice(MEANING)
    return answered(rng, frame, a=a, b=b, c=c, end=rng.answer(LIVING_ENDS))


def relativity(rng: Writer) -> str:
    start = RELATIVITY_START[0] if rng.random() < 0.5 else rng.choice(RELATIVITY_START)
    return answered(rng, start + " " + rng.answer(RELATIVITY))


def email(rng: Writer) -> str:
    ask = EMAIL_ASK[0] if rng.random() < 0.5 else rng.choice(EMAIL_ASK)
    hello = "Hello everyone" if rng.random() < 0.5 else "[Hi team|Dear team|Hello team|Dear all|Hi all|Dear colleagues]"
    bye = "[Best wishes|Kind regards|Best regards|Cheers|Yours]"
    return (
        expand(rng, ask)
        + "\n\n"
        + answered(rng, rng.answer(EMAIL), hello=hello, praise=rng.answer(PRAISE), bye=bye, name=name(rng))
    )


def opening(rng: Writer) -> str:
    """A short text with one of the well-known openings, or another few sentences."""
    kind = rng.choice((meaning, relativity, email, None))
    if kind is not None:
        return kind(rng)
    return expand(rng, rng.choice(OTHERS), name=name(rng), name2=name(rng))


HEADERS = (
    "Translate English to French:",
    "Translate [English to French|from English to French|to French|these words to French|into French|the words into French][:|.]",
    "English to French[:|]",
    "[English words and their French translation|French translations|English and French words|A small dictionary, English to French|Dictionary English - French]:",
    "",
)
ARROWS = (" => ", " => ", " => ", " -> ", " = ", ": ")


def translations(rng: Writer) -> str:
    """A header and three to eight lines of one style, each an English word and its French."""
    header = HEADERS[0] if rng.random() < 0.5 else expand(rng, rng.choice(HEADERS))
    arrow = rng.choice(ARROWS)
    lines = [english + arrow + french for english, french in pairs(rng, rng.randint(3, 8))]
    if rng.random() < 0.1:
        lines = [sentence(line) for line in lines]
    return (header + rng.choice(("\n\n", "\n\n", "\n")) if header else "") + "\n".join(lines)
