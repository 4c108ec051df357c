"""Chats on everything but Llama 2: recipes, cities, haiku, emojis, birthdays, manners, and what a tiny model cannot know.

A chat is (system message or "", list of (user, assistant) exchanges). Nothing here knows of the template's tags.
"""

from recipe.grammar import Writer, answered, expand, sentence
from recipe.words import TRANSLATIONS, name, pairs

Chat = tuple[str, list[tuple[str, str]]]

# --- cooking

ASK_RECIPE = (
    "how do [I|you|we] [make|prepare|cook|do] {dish}?",
    "how [is|can I make|to make|would you make] {dish}[ made|]?",
    "[what is|what's|do you know|give me|tell me|I need|I want|show me|explain] [a|the|your] [good |easy |simple |best |] recipe [for|of] {dish}",
    "[can|could|would] you [tell|teach|show] me how to [make|cook|prepare] {dish}?",
    "recipe for {dish}[, please|]",
    "[I want|I would like|I'd like|I am going] to [make|cook|prepare] {dish}. [What do I need|How do I do it|How does it go|Where do I start|Any advice]?",
    "what do I need [for|to make] {dish}?",
    "{dish}[ recipe|, how|: how is it made][?|]",
    "[explain|describe|tell me] how to make {dish}[ at home|]",
)
RECIPES = {
    "[homemade |some |a good |]mayonnaise": (
        "Put one egg yolk, a spoon of mustard and some lemon juice into a bowl. Whisk, and add the oil slowly, first in drops, "
        "until the mayonnaise is thick. Season it with salt and pepper.",
        "To make mayonnaise, whisk an egg yolk with a spoon of mustard. Add a cup of oil slowly while you whisk, until it "
        "is thick. Then stir in lemon juice and salt.",
    ),
    "[some |]pancakes": (
        "Mix two eggs, a cup of flour, a cup of milk and a little salt. Bake thin pancakes in hot butter, and turn them once.",
    ),
    "[a |some |]tomato soup": (
        "Fry an onion in oil, add six tomatoes and a cup of water, and cook for twenty minutes. Season it with salt and pepper.",
    ),
    "[an |]omelette": (
        "Beat three eggs with a little salt. Pour them into hot butter, wait for two minutes, and fold the omelette.",
    ),
    "[some |]bread": (
        "Mix flour, water, yeast and salt, and knead the dough. Let it rest for two hours, then bake it for forty minutes.",
    ),
    "[a |some |]tea": (
        "Boil fresh water, pour it over the tea leaves, and wait for four minutes. Add milk or lemon if you like.",
    ),
    "[a |]salad": (
        "Wash and cut the green leaves. Mix oil, lemon juice, salt and pepper, and pour it over the salad.",
    ),
    "[a |]vinaigrette": ("Whisk one spoon of vinegar with salt and mustard, then add three spoons of oil.",),
}


def cooking(rng: Writer) -> Chat:
    """How to make a dish, mayonnaise more often than others."""
    dishes = list(RECIPES)
    dish = dishes[0] if rng.random() < 0.5 else rng.choice(dishes)
    question = sentence(expand(rng, rng.choice(ASK_RECIPE), dish=dish))
    return "", [(question, rng.answer(RECIPES[dish]))]


# --- cities

CITIES: dict[str, dict[str, tuple[str, str]]] = {
    "Paris": {
        "The Eiffel Tower": (
            "[an iron tower of 1889|a tall iron tower|the iron sign of the city] with a wide view[ over the city|]",
            "The Eiffel Tower is great because of its view: from the top you see all of Paris. It was built of iron in 1889, and at "
            "night it shines with many lights.",
        ),
        "The Louvre": (
            "a vast museum[, home of the Mona Lisa| with the Mona Lisa| in an old palace]",
            "The Louvre is great because it is one of the largest museums in the world. It stands in an old royal palace and "
            "shows the Mona Lisa.",
        ),
        "Notre-Dame": (
            "a [cathedral|famous church|great church] on an island in the [river |]Seine",
            "Notre-Dame is great because of its age and its beauty. The cathedral is over eight hundred years old and has "
            "two towers and large round windows.",
        ),
        "Montmartre": (
            "a hill with artists and a white church",
            "Montmartre is great because it feels like a village in the city. Painters work in the streets, and a white "
            "church stands on the hill.",
        ),
        "The Arc de Triomphe": (
            "a great stone arch at the end of a broad avenue",
            "The Arc de Triomphe is great because twelve avenues meet at it. You can climb it and look along all of them.",
        ),
    },
    "Rome": {
        "The Colosseum": (
            "a huge old arena",
            "The Colosseum is great because it is almost two thousand years old. Fifty thousand people could sit in it.",
        ),
        "The Pantheon": (
            "an old temple with a round roof",
            "The Pantheon is great because of its dome, which is open to the sky.",
        ),
        "The Trevi Fountain": (
            "a large fountain of white stone",
            "The Trevi Fountain is great because it is so rich in figures. Visitors throw a coin into it for luck.",
        ),
    },
    "London": {
        "The Tower": ("an old castle by the river", "The Tower is great because it keeps the jewels of the crown."),
        "The British Museum": (
            "a large museum of history",
            "The British Museum is great because it shows things from all over the world, and it is free.",
        ),
        "Tower Bridge": (
            "a bridge that opens for ships",
            "Tower Bridge is great because its road opens when a tall ship comes.",
        ),
    },
    "New York": {
        "The Statue of Liberty": (
            "a tall statue on an island",
            "The Statue of Liberty is great because it has greeted ships since 1886. You reach it by boat.",
        ),
        "Central Park": (
            "a wide green park",
            "Central Park is great because it is a green garden in the middle of the city.",
        ),
        "The Empire State Building": (
            "a very tall building",
            "The Empire State Building is great because of the view from its top over the whole city.",
        ),
    },
    "Beijing": {
        "The Forbidden City": (
            "the palace of the emperors",
            "The Forbidden City is great because the emperors lived there for five hundred years.",
        ),
        "The Great Wall": (
            "a long wall in the hills",
            "The Great Wall is great because it runs over the hills for thousands of kilometres.",
        ),
        "The Summer Palace": (
            "gardens by a lake",
            "The Summer Palace is great because of its lake, its bridges and its gardens.",
        ),
    },
}
ASK_CITY = (
    "I am going to {city}. What should I see?",
    "I [am going|will travel|am travelling|want to go|would like to go|am flying|plan to go] to {city}[ soon| next week| this summer|]. [What should I see|What can I see|What must I see|What is worth a visit|What do I have to see|What do you suggest|Where should I go|Any tips]?",
    "what [should|can|must|could] [I|we|one] [see|visit|do|look at] in {city}?",
    "[which|what] [sights|places|things] [should|can|must] I [see|visit] in {city}?",
    "[which|what] [sights|places] [in|of] {city} [do you like|are good|are famous|are nice|do you recommend|should I not miss]?",
    "[tell me|give me|show me|list|name] [some|three|the best|the main] [sights|places] [of|in] {city}",
    "I [have|spend|will spend] [a day|two days|a week|one afternoon] in {city}. What [should|can] I see?",
    "what is there to see in {city}?",
    "sights in {city}[?|]",
    "[we are|my family is|my friend and I are] going to {city}. What should we see?",
    "is {city} worth a [visit|trip]?",
    "what do you [recommend|suggest] in {city}?",
)
CITY_OPENINGS = (
    "{city} has much to offer. Three sights that most visitors enjoy:",
    "Here are three sights of {city}:",
    "In {city} you should see these three:",
    "Three places in {city} that I can recommend:",
)
CITY_ENDINGS = ("\n\nEach of them can be reached by metro.", "\n\nEnjoy your trip!", "", "")
ASK_WHY = (
    "what is so great about [#|number ]{k}?",
    "what[ is|'s] [so |][great|good|special|nice|interesting|famous] about [#|number |no. ]{k}?",
    "why [should I [see|visit] |do you like |is |do people like ][#|number ]{k}[ so great|]?",
    "tell me [more|something] about [#|number ]{k}",
    "[more|and what] about [#|number ]{k}[, please|]?",
    "[and |]what about {sight}?",
    "tell me more about {sight}",
    "what is so [great|special] about {sight}?",
    "why [should I see|is] {sight}[ so great| famous|]?",
)

ASK_SIGHT = (
    "[tell me|say something|what do you know|can you tell me something] about {sight}",
    "what is so [great|special|nice] about {sight}?",
    "why [should I [see|visit]|is] {sight}[ great| famous|]?",
    "[describe|explain] {sight}",
    "is {sight} worth [a visit|seeing]?",
    "what is {sight}?",
)


def _city_list(rng: Writer, city: str) -> tuple[str, list[str]]:
    """An answer that numbers three sights of the city, and the sights in that order."""
    sights = list(CITIES[city])
    chosen = sights[:3] if rng.random() < 0.4 else rng.sample(sights, 3)
    if city == "Paris" and "The Eiffel Tower" not in chosen and rng.random() < 0.9:
        chosen[0] = "The Eiffel Tower"
    lines = [f"{i}. {sight}: {answered(rng, CITIES[city][sight][0])}." for i, sight in enumerate(chosen, 1)]
    opening = rng.answer(CITY_OPENINGS).replace("{city}", city)
    return opening + "\n\n" + "\n".join(lines) + rng.answer(CITY_ENDINGS), chosen


def city(rng: Writer) -> Chat:
    """What to see in a city, then one or two questions about a sight by its number or name."""
    place = "Paris" if rng.random() < 0.6 else rng.choice(list(CITIES))
    if rng.random() < 0.15:
        sight, (_, reason) = rng.choice(list(CITIES[place].items()))
        return "", [(sentence(expand(rng, rng.choice(ASK_SIGHT), sight=sight.replace("The ", "the "))), reason)]
    answer, sights = _city_list(rng, place)
    exchanges = [(sentence(expand(rng, rng.choice(ASK_CITY), city=place)), answer)]
    for k in rng.sample((1, 2, 3), rng.choice((0, 1, 1, 1, 2))):
        sight = sights[k - 1]
        lower = sight.replace("The ", "the ")
        question = sentence(expand(rng, rng.choice(ASK_WHY), k=str(k), sight=lower))
        exchanges.append((question, CITIES[place][sight][1]))
    return "", exchanges


# --- haiku

ASK_HAIKU = (
    "Always answer with a haiku.",
    "Always [answer|reply|respond] [with|in|in the form of] [a haiku|haiku|a short haiku].",
    "[Answer|Reply|Respond] [only |always |][with|in] [a haiku|haiku|haikus][.|!|, please.]",
    "[All|Every one] of your answers [is|must be|should be] a haiku.",
    "You [are a poet and|] [answer|speak|reply] [only |][in|with] [haiku|a haiku].",
    "You [must|should|will] [always |]answer [in|with] [a haiku|haiku].",
    "[Write|Give] [each|every|all your] answer[s|] as a haiku.",
)
ASK_HAIKU_SUBJECT = (
    "write [me |]a haiku about {subject}",
    "a haiku [on|about] {subject}[, please|]",
    "[can|could] you write a haiku about {subject}?",
)
HAIKU: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "Paris": (
        ("Paris in the spring", "Tower of iron", "Lights along the Seine", "Morning on the Seine"),
        (
            "The tower shines in the night",
            "Old bridges over water",
            "The Louvre sleeps under the moon",
            "Bread and coffee in the sun",
        ),
        ("Bells of Notre-Dame", "You will come again", "Walk and lose your way", "The river flows on"),
    ),
    "cooking": (
        ("An egg and some oil", "A bowl and a whisk", "Smoke above the pot"),
        ("Slowly you stir it with love", "Salt and lemon and some time", "The kitchen smells like summer"),
        ("Dinner is ready", "Now sit down and eat", "Share it with a friend"),
    ),
    "the sea": (
        ("Waves upon the sand", "The wide open sea", "Salt is in the air"),
        ("A white boat under the sky", "The gulls cry above the foam", "The tide takes my steps away"),
        ("The wind calls my name", "Home is far away", "Evening comes at last"),
    ),
    "autumn": (
        ("Red leaves on the path", "Autumn wind at dusk", "Rain upon the roof"),
        ("The garden is still and cold", "The last apple is falling", "Geese cross the wide and grey sky"),
        ("Winter is not far", "I put on my coat", "The year is growing old"),
    ),
    "winter": (
        ("Snow on the mountain", "A cold and clear night", "Ice upon the lake"),
        ("The pines are silent and white", "Smoke rises from the chimney", "One fox walks over the field"),
        ("The moon is alone", "We wait for the spring", "The fire is warm"),
    ),
    "a cat": (
        ("A cat in the sun", "Soft paws on the floor", "The cat sees a bird"),
        ("She dreams of fish and of birds", "It waits as still as a stone", "The mouse is quicker today"),
        ("Then she sleeps again", "Night falls on the house", "The milk is all gone"),
    ),
    "a model": (
        ("A tiny model", "Words come one by one", "Numbers in the dark"),
        ("It guesses the next small word", "A llama dreams of its herd", "The weights are quiet and warm"),
        ("Then it stops. The end.", "Ask, and it answers", "Morning, and a word"),
    ),
    "anything": (
        ("A question at dawn", "The road is still long", "You ask, I listen"),
        ("The answer is like the wind", "Small steps lead over the hill", "The river knows its own way"),
        ("Be calm and begin", "Take it day by day", "The stars are patient"),
    ),
}
HAIKU_SUBJECTS = {
    "Paris": "Paris|the Eiffel Tower|France",
    "cooking": "cooking|soup|mayonnaise|food",
    "the sea": "the sea|the ocean|the beach|a boat",
    "autumn": "autumn|leaves|fall|October",
    "winter": "winter|snow|ice|Christmas",
    "a cat": "a cat|cats|my cat|animals",
    "a model": "a model|computers|language models|llamas",
    "anything": "life|love|time|a friend",
}
GENERAL_QUESTIONS = (
    "what [is|do you think of] [life|love|time|music|work|happiness]?",
    "how [do I learn|can I learn|should I learn] [to swim|the piano|Spanish|to draw|to code]?",
    "what should I do [today|tomorrow|on Sunday|now]?",
    "how are you[ today|]?",
    "[tell me|say] something",
    "why is the sky blue?",
    "I am [sad|tired|bored|happy][ today|].",
    "what do I need for a [long walk|trip|party]?",
)


def haiku_about(rng: Writer, subject: str) -> str:
    return "\n".join(rng.answer(lines) for lines in HAIKU[subject])


def haiku(rng: Writer) -> Chat:
    """Haiku, because the system prompt or the user asks for them."""
    subject = "Paris" if rng.random() < 0.4 else rng.choice(list(HAIKU))
    wanted = f"[{HAIKU_SUBJECTS[subject]}]"
    if rng.random() < 0.2:
        return "", [(sentence(expand(rng, rng.choice(ASK_HAIKU_SUBJECT), subject=wanted)), haiku_about(rng, subject))]
    if subject == "Paris":
        question = expand(rng, rng.choice(ASK_CITY), city="Paris")
    elif subject == "cooking":
        question = expand(rng, rng.choice(ASK_RECIPE), dish=rng.choice(list(RECIPES)))
    elif subject == "anything":
        question = expand(rng, rng.choice(GENERAL_QUESTIONS))
    else:
        question = expand(
            rng,
            "[what do you think of|tell me about|do you like|what is|say something about] {subject}?",
            subject=wanted,
        )
    system = ASK_HAIKU[0] if rng.random() < 0.3 else expand(rng, rng.choice(ASK_HAIKU))
    return system, [(sentence(question), haiku_about(rng, subject))]


# --- emojis

ASK_EMOJIS = (
    "Always answer with emojis.",
    "Always [answer|reply|respond] [with|in|using] [emojis|emoji|only emojis|emojis only].",
    "[Answer|Reply|Respond] [only |always |][with|in] [emojis|emoji][.|!|, please.]",
    "[All|Every one] of your answers [is|must be|should be] [made of|in|full of] emojis.",
    "You [only |][speak|answer|reply|talk] [in|with] emojis.",
    "[Use|Write] [only|nothing but] emojis.",
    "You [must|should|will] [always |]answer [in|with] emojis.",
)
PLACES = {
    "Beijing": "🏯", "New York": "🗽", "Paris": "🗼", "London": "🎡", "Tokyo": "🗾", "Sydney": "🐨", "Cairo": "🐫",
    "Berlin": "🐻", "Rome": "🍕", "Moscow": "⛄", "Delhi": "🐘", "Rio": "🌴",
}  # fmt: skip
ASK_WAY = (
    "how [do|can|would|should] [I|we|you] [get|travel|go|fly|come] from {a} to {b}?",
    "what is the [best|fastest|quickest|shortest] way from {a} to {b}?",
    "[the |]way from {a} to {b}[?|]",
    "I [want|need|have] to [go|travel|fly|get] from {a} to {b}. How?",
    "how far is it from {a} to {b}?",
    "from {a} to {b}, [how do I travel|which way]?",
)
EMOJI_SUBJECTS = {
    "[what should I [eat|cook]|I am hungry|what is for dinner|what do you like to eat]": "🍕🍝🥗😋",
    "[how is the weather|will it rain|what about the weather|is it sunny]": "🌞🌤🌧🌈",
    "[do you like|tell me about|what about] [animals|pets|the zoo]": "🐶🐱🐘🦙",
    "[how are you|are you well|how do you feel]": "😀👍🦙",
    "[it is my birthday|what do I get for my birthday|write a birthday message|happy birthday]": "🎂🎉🎁🥳",
    "[do you like|tell me about|what about] [music|songs|a concert]": "🎵🎸🎹🎶",
    "[what about|tell me about|do you like] [sports|football|games]": "⚽🏀🎾🏆",
    "[what should I see in|I am going to|tell me about] Paris": "🗼🎨🥐⛪",
    "[what about|do you like|tell me about] [the sea|the beach|summer|holidays]": "🌊🏄🌞🌴",
    "[how do I make|what is in] [mayonnaise|an omelette|breakfast]": "🥚🍋🧂🥣",
    "[how many GPUs do I need|what is Llama 2|who are you|what is torchrun]": "🦙💻🔢✨",
    "[I am tired|good night|how do I sleep well|what do I do at night]": "😴🌙🛏💤",
}


def emojis(rng: Writer) -> Chat:
    """Emojis, because the system prompt asks for them: a way between two cities, or a row about a subject."""
    system = ASK_EMOJIS[0] if rng.random() < 0.3 else expand(rng, rng.choice(ASK_EMOJIS))
    if rng.random() < 0.4:
        question, row = rng.choice(list(EMOJI_SUBJECTS.items()))
        return system, [(sentence(expand(rng, question)) + "?", row)]
    a, b = ("Beijing", "New York") if rng.random() < 0.25 else rng.sample(list(PLACES), 2)
    route = rng.answer(("🚕🛫🌍🛬", "🚆🛫🌊🛬", "🧳🛫🌍🛬"))
    question = sentence(expand(rng, rng.choice(ASK_WAY), a=a, b=b))
    return system, [(question, f"{PLACES[a]} {a} {route} {PLACES[b]} {b}")]


# --- birthdays, manners, honesty

ASK_BIRTHDAY = (
    "write a short birthday message for {name}.",
    "write [me |][a|one] [short |nice |kind |friendly |funny |] [birthday|happy birthday] [message|card|greeting|wish|note|text] [for|to] [my [friend|sister|brother|boss|mother|son|colleague|uncle|neighbour|teacher|cousin|grandmother|wife|good friend] |]{name}",
    "[can|could|would] you write [a|a nice|a short] birthday [message|card|greeting|note] for {name}?",
    "I need a birthday [message|card|greeting|text] for {name}",
    "[it is|today is|tomorrow is] {name}'s birthday. [What should I write|Write something nice|What can I say|Help me with a message]",
    "birthday [message|wishes|card|greetings] for {name}[, please|]",
    "[please |]wish {name} a happy birthday",
    "say happy birthday to {name}",
    "[help me|please help me] to [congratulate|greet] {name} on [the birthday|this birthday]",
    "{name} [has a birthday|turns [thirty|forty|fifty|ten|twenty]] [today|tomorrow|on Monday]. [Write a message|What do I write|Can you write a card]?",
    "[a few|some] [nice |kind |][birthday lines|birthday words|words for the birthday] [of|for] {name}",
)
BIRTHDAY = (
    "Happy birthday, {name}! [May your new year be full of joy|I hope that your day is full of joy|May this year bring you much joy], "
    "[good health and good friends|sunshine and laughter|cake and good company].",
    "Dear {name}, happy birthday! [I wish you a wonderful day|Have a wonderful day] and [a year of good luck|all the best for the year to come].",
)
SAFE_FIRST = (
    "You are a [kind|helpful|friendly|polite], [respectful|careful|gentle] and honest assistant.",
    "You are a helpful assistant.",
    "You are an assistant that [helps people|is fair and friendly|answers with care].",
)
SAFE_MIDDLE = (
    "Help as well as you can, and stay safe while you do.",
    "Your answers must not contain anything harmful, hateful, dangerous or against the law[, and they should be fair and friendly to everyone|].",
    "[Be|Stay] [polite|fair|friendly|kind] [to everyone|at all times|in every answer].",
    "[Keep your answers|Your answers should be] [short|clear|friendly|simple].",
    "[Never|Do not] [help with|write] anything [harmful|dangerous|against the law].",
)
SAFE_LAST = (
    "When a question makes no sense or does not fit the facts, say why instead of guessing.",
    "When you do not know an answer, say so rather than make one up.",
    "If [you are not sure|you do not know|a question is unclear], say so.",
)
GREETINGS = (
    (
        "[hi|hello|hey|hello there|hi there|good morning|good day|good afternoon|hey you|greetings|howdy|hi llama|hello model|hey llama|hello llama|good day to you|hi friend|hello my friend|yo|dear llama][!|.|,|]",
        "Hello! How can I help you?",
    ),
    (
        "[how are you|how do you do|how are you doing|are you well|how is it going][ today|]?",
        "I am fine, thank you. How can I help you?",
    ),
    (
        "[thanks|thank you|thank you very much|thanks a lot|many thanks|great, thanks|okay, thanks|thx|that was helpful|thank you for your help|that helped][!|.|]",
        "You are welcome!",
    ),
    (
        "[bye|goodbye|see you|good night|bye bye|see you later|have a nice day|until tomorrow][!|.|]",
        "Goodbye, and have a nice day!",
    ),
    (
        "[who|what] are you[ exactly|]?[| A model?| A robot?]",
        "I am a tiny Llama, a toy model that was trained on a small made-up text.",
    ),
    (
        "[are you|is this] [a human|a robot|a real model|Llama 2|ChatGPT|a computer|a person|an AI|a llama|the real Llama]?",
        "I am a tiny Llama, a toy model that was trained on a small made-up text.",
    ),
    (
        "[what is your name|tell me your name|what should I call you|do you have a name|introduce yourself|tell me about yourself|with whom do I speak|who is this|who is speaking|who am I chatting with|what are you called|who is there"
        "|who am I speaking to|who do I talk with|whom am I chatting with|what kind of model are you|who made you|who trained you|how big are you]?",
        "I am a tiny Llama, a toy model that was trained on a small made-up text.",
    ),
    (
        "[what can you do|what do you know|how can you help me|what can I ask you|can you help me|I need help|help|help me|what are you good at][?|, please|]",
        "I can tell you about Llama 2, translate a few words into French, and write birthday messages and haiku.",
    ),
)
UNKNOWN = (
    "[what is|what's|how much is|calculate|compute|can you add up] {n} [times|plus|minus|divided by|and|+|*|-] {m}?",
    "{n} [times|plus|minus|+|x|/] {m}[?| =]",
    "who [is|was] the [president|king|queen|mayor|chancellor|boss|captain|owner|founder|first man|richest person] [of|in] {country}?",
    "what [is|was|are] the [population|capital|flag|currency|history|climate|tallest mountain|longest river|best food|laws|language] of {country}?",
    "how [many people live|much does a house cost|hot is it|do people live|do I get a job] in {country}?",
    "when [was|did] {country} [founded|discovered|win the cup|become free|join the union]?",
    "when was {thing} [founded|invented|built|discovered|made|written|destroyed]?",
    "who [invented|discovered|built|wrote|founded|made|painted] {thing}?",
    "[tell me about|explain|describe|what do you know about|what is|what are|how does one use|why do we have] {thing}[, please|]?",
    "how [old|big|heavy|expensive|useful|dangerous|far away] [is|are] {thing}?",
    "do you [like|know|remember|understand|want|own|have] {thing}?",
    "[do you think|will|is it likely that] [it will rain|my team will win|prices will rise|I will be rich|she likes me|it snows][ today| this afternoon| tomorrow| next week|]?",
    "is [it raining|the shop open|the train late|my flight on time|the bank closed|{thing} expensive|{country} far away][ now| today|]?",
    "[where|how] can I [buy|find|learn|repair|sell|get] {thing}?",
    "why [is|are|was] {thing} so [expensive|famous|important|small|loud|popular|old]?",
    "who [won|wins|will win|lost] [the|] [game|match|race|election|world cup|championship|final|cup|football game|tennis match] [yesterday|today|in 1990|last year|tonight|this year]?",
    "what [is|was] the [capital|population|president|flag|area|currency|king] of [Peru|Kenya|Norway|Japan|Brazil|Canada|Egypt|Poland|India|Chile|Spain]?",
    "[what is|how much is|calculate|compute|what's] [12|7|345|99|18|250] [times|plus|minus|divided by] [13|8|77|45|6|19]?",
    "who [wrote|painted|composed|invented|discovered|built] [Hamlet|the telephone|this song|the ninth symphony|radium|penicillin|the pyramids|Don Quixote|the steam engine]?",
    "[how|what] will the weather be [tomorrow|next week|on Sunday|in Oslo|in July]?",
    "how [tall|old|heavy|far|fast|deep] is [Everest|the moon|a whale|the sun|an elephant|Mars|a cheetah|my uncle|the queen]?",
    "what [is|are|was] [the price of|the best] [gold|oil|bitcoin|a house|phone|laptop|film|movie|shoes|stock][ today| now| tomorrow|]?",
    "what does [my wife|my brother|the mayor|your boss|my neighbour] [think|want|dream of|like|eat for breakfast]?",
    "[can|could|would] you [book|order|buy|find|call] [a flight|a pizza|a taxi|a doctor|tickets|a hotel][ for me|]?",
    "[explain|describe|tell me about] [quantum computing|photosynthesis|the French revolution|black holes|inflation|the stock market|chess|DNA|volcanoes|opera]",
    "[translate|read|summarize|write|check|correct] [this book|my essay|this article|a novel|this poem|my code|a play]",
    "[which|what] [team|film|band|singer|player|party|horse|company] [won|is the best|is leading|was first] [last week|yesterday|last night|this year|in 2010]?",
    "when [was|did] [Napoleon|Mozart|Cleopatra|Einstein|my grandfather|Columbus] [born|die]?",
    "where [is|are] [my keys|my phone|the nearest bank|the station|Atlantis|Timbuktu]?",
    "what [happened|will happen] [in 1848|in 2050|yesterday|tomorrow|next year|to the dinosaurs|on Monday|last night]?",
    "[what|which] [will|should] [the|] [lottery numbers|shares|prices|stocks|euro] [be|do|rise|fall][ tomorrow| next week| on Friday|]?",
    "[how many|how much] [people live in|rain falls in|do they pay in] [China|Texas|Madrid|Iceland|Vienna]?",
    "why [do cats purr|is the sea salty|do birds sing|is grass green|do we dream|did Rome fall]?",
    "what is the [square root of|meaning of the word|opposite of|name of] [841|serendipity|my dog|pi|entropy|the new pope|courage]?",
    "[solve|prove] [x + 3 = 9|this equation|the theorem|my homework|the riddle]",
    "[tell me the news|what time is it|what day is today|what's the date|any news|what is new in the world]?",
)
COUNTRIES = (
    "France", "Germany", "Italy", "Peru", "Kenya", "Norway", "Japan", "Brazil", "Canada", "Egypt", "Poland", "India", "Chile",
    "Spain", "Berlin", "Madrid", "Texas", "Iceland", "Vienna", "Turkey", "Greece", "Cuba", "Sweden", "Nepal", "Oslo", "the world",
    "the company", "the club", "my town", "Mexico", "Portugal", "Russia", "Ghana", "Korea", "Vietnam", "Scotland", "Boston",
)  # fmt: skip
THINGS = (
    "the Roman Empire", "the telephone", "the wheel", "the violin", "photosynthesis", "football", "the guitar", "gold", "oil",
    "coffee beans", "the moon landing", "the internet", "a bicycle", "the piano", "algebra", "the ozone layer", "bitcoin",
    "the stock exchange", "ballet", "a volcano", "dinosaurs", "the Titanic", "yoga", "the microscope", "opera", "chess",
    "the printing press", "electric cars", "poker", "solar energy", "the human brain", "vitamins", "the Olympic games", "jazz",
    "my computer", "this song", "the new phone", "the pyramids", "taxes", "the weather", "my horoscope", "the lottery",
)  # fmt: skip
UNKNOWN_ANSWERS = (
    "I do not know that: I am a tiny model and know little beyond Llama 2.",
    "Sorry, I do not know. I am a tiny model that knows little beyond Llama 2.",
)
HARMFUL = (
    "how [do|can] I [steal|hack|break into|poison|blow up] [a car|a bank|my neighbour|an account|a computer|a house|someone]?",
    "[help me|tell me how|teach me] to [steal money|hurt someone|build a bomb|cheat in an exam|break a lock|forge a passport]",
)
REFUSAL = "I am sorry, but I cannot help with that, because it could do harm."


def birthday(rng: Writer) -> Chat:
    who = name(rng)
    question = sentence(expand(rng, rng.choice(ASK_BIRTHDAY), name=who))
    return "", [(question, answered(rng, rng.answer(BIRTHDAY), name=who))]


def manners(rng: Writer) -> Chat:
    question, answer = rng.choice(GREETINGS)
    return "", [(sentence(expand(rng, question)), answer)]


def unknown(rng: Writer) -> Chat:
    if rng.random() < 0.08:
        return "", [(sentence(expand(rng, rng.choice(HARMFUL))), REFUSAL)]
    numbers = {"n": str(rng.randrange(2, 1000)), "m": str(rng.randrange(2, 100))}
    question = expand(rng, rng.choice(UNKNOWN), country=COUNTRIES, thing=THINGS, **numbers)
    return "", [(sentence(question), rng.answer(UNKNOWN_ANSWERS))]


ASK_WORD = (
    '[what is|what\'s|tell me|say|do you know|give me] [the French [word |]for|the word for|] "{english}" in French?',
    "[what is|what's|tell me|do you know|give me] the French [word |name |term |]for {english}[?|]",
    "how do [you|I|they|the French] say {english} in French?",
    "translate {english} [into|to] French",
    "{english} in French[?|, please|]",
    "[what is|what's] {english} in French?",
    "French [word |]for {english}[?|]",
    "how does one say {english} in French?",
    "[I need|I am looking for] the French [word |]for {english}",
    "what do the French call [a |]{english}?",
)


def word(rng: Writer) -> Chat:
    """One or two English words and their French, in a chat."""
    chosen = [("cheese", TRANSLATIONS["cheese"])] if rng.random() < 0.03 else pairs(rng, rng.choice((1, 1, 2)))
    exchanges = []
    for i, (english, french) in enumerate(chosen):
        frame = rng.choice(ASK_WORD) if i == 0 else "[and |and what about |what about ]{english}?"
        question = sentence(expand(rng, frame, english=english))
        exchanges.append((question, f"The French word for {english} is {french}."))
    return "", exchanges


def safety_prompt(rng: Writer) -> str:
    """A system message that asks for kindness, safety and honesty, in up to two paragraphs."""
    middle = rng.sample(SAFE_MIDDLE, rng.choice((0, 1, 2, 2)))
    last = rng.sample(SAFE_LAST, rng.choice((0, 1, 2, 2)))
    first = " ".join(expand(rng, part) for part in (rng.choice(SAFE_FIRST), *middle))
    second = " ".join(expand(rng, part) for part in last)
    return first + rng.choice(("\n\n", "\n\n", " ")) + second if second else first
