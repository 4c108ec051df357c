"""Questions and answers about Llama 2: the facts, and many ways to ask for each.

A `Fact` says what may be asked and what the answer is. `nouns` and `counts` are dropped into the general frames of this
file ("what is the NOUN of MODEL", "how many COUNT does MODEL have"), `questions` are whole questions. `{model}` is a way
to name the size that the fact is about; a fact whose values are the same for every size has only one, under "".
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from recipe.grammar import expand, sentence

SIZES = ("7B", "13B", "70B")
BILLIONS = {"7B": "seven", "13B": "thirteen", "70B": "seventy"}
RANKS = {
    "7B": "smallest|small|littlest|tiniest",
    "13B": "middle|medium|middle-sized|mid-size|second smallest|second largest",
    "70B": "biggest|largest|big|huge|large",
}
MP = {"7B": "1", "13B": "2", "70B": "8"}
GPUS = {"7B": "1 GPU", "13B": "2 GPUs", "70B": "8 GPUs"}
FILES = {
    "7B": "1 checkpoint file, consolidated.00.pth",
    "13B": "2 checkpoint files, consolidated.00.pth and consolidated.01.pth",
    "70B": "8 checkpoint files, consolidated.00.pth to consolidated.07.pth",
}


def model_name(rng: random.Random, size: str) -> str:
    """One of the ways to name a size; most of them say the number."""
    number = size[:-1]
    common = f"[the {size}|{size}|the {size} model|Llama 2 {size}|the {size} chat model|llama-2-{number}b|llama {size}]"
    rare = (
        f"[{size} chat|llama-2-{number}b-chat|Llama-2-{number}B|the {size} [version|variant|one|checkpoint|weights]"
        f"|the {number} billion [parameter |]model|the {BILLIONS[size]} billion [parameter |]model|Meta's {size}"
        f"|the {number} B model|Llama 2 with {number} billion parameters|{BILLIONS[size]} B|the {size} Llama"
        f"|llama2 {number}b|Llama2-{size}|your {size} model]"
    )
    ranked = f"[the|the|Meta's|your] [{RANKS[size]}] [model|one|Llama 2|Llama|of the models|of them|chat model|version]"
    return expand(rng, rng.choices((common, rare, ranked), (60, 32, 8))[0])


@dataclass(frozen=True)
class Fact:
    """One thing to know: the values by size ("" when it has no size), the wordings that ask for it, the answers."""

    values: Mapping[str, str]
    answers: tuple[str, ...]
    nouns: str = ""
    counts: str = ""
    questions: tuple[str, ...] = ()
    same_for_all: bool = False
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def answer(self, rng: random.Random, size: str) -> str:
        slots = {name: values[size] for name, values in self.extra.items()}
        return expand(rng, rng.choice(self.answers), size=size, value=self.values[size], **slots)


SIZED_NOUN_FRAMES = (
    "[what is|what's|whats] the {noun} [of|for|in] {model}?",
    "[what is|what's|tell me|give me|I need|say|remind me of|let me know|look up] {model}'s {noun}",
    "[which|what] {noun} does {model} [have|use|need|take|come with|want|require]?",
    "[which|what] {noun} [should I|do I|must I|shall I|would I] [use|set|take|pick|choose|put|need] for {model}?",
    "{model} {noun}[?|]",
    "{noun} [of|for|in] {model}[?|]",
    "{model}[: |, ]{noun}[?|]",
    "{noun}, {model}[?|]",
    "[tell me|give me|I need|I want|show me|please name|name|say|I'd like] the {noun} [of|for] {model}[, please|]",
    "[can|could|would|will] you [please|] [tell me|give me|say|look up|remind me of] the {noun} [of|for] {model}?",
    "do you [know|remember|happen to know] [the|what the] {noun} [of|for] {model} [is|]?",
    "I [have|run|use|downloaded|got|want to run|would like to start] {model}. [What is|What's|Which is] the {noun}?",
    "[for|with|about|on] {model}, [what is|what's|which is] the [right|correct|] {noun}?",
    "[I wonder what|what would be|what might be|what exactly is] the {noun} [of|for] {model}[ is|][?|]",
    "[how [big|large|high] is] the {noun} [of|for|in] {model}?",
    "[remind me|explain|tell me] [what|which] {noun} [goes with|belongs to|is right for|fits|is used by] {model}",
    "[what|which] {noun} [goes with|belongs to|is right for|fits|suits] {model}?",
    "is there a {noun} for {model}[, and what is it|, and which|]?",
    "what [should|must|does|has] [the |]{noun} [be|to be] [for|if I use|if I run|when I use|when I load|with] {model}?",
    "{model} [needs|has|uses|wants|takes] [what|which] {noun}[?|]",
    "[if|when] I [run|use|load|start|want] {model}, [what|which] [is the |is |]{noun}[ do I need| do I use| is right|]?",
    "[is|was] the {noun} of {model} [1|2|4|8|32|40|64|80|4096|5120|8192]?",
    "[the |my |our |]{noun} [with|when using|if we use|in the case of] {model}[?|]",
    "[hi, |hello, |]I'm [trying to run|looking at|working with|curious about|reading about] {model}. [What|Which] {noun} [do I need|does it have|is that|has it|is right]?",
    "I [would like|want] to know [the|which|what] {noun} [of |for |]{model}[ has| uses| needs|]",
)
SIZED_COUNT_FRAMES = (
    "how many {count} [does|do] {model} [have|need|use|take|want|require]?",
    "how many {count} [are there|are] in {model}?",
    "how many {count} [for|in|of|with] {model}[?|]",
    "how many {count} has {model}[?| got?]",
    "{count} [in|of|for] {model}[?|, how many?]",
    "{model}[:|,|] how many {count}[?| is it?| are they?| are there?]",
    "[tell me|say|I wonder|do you know|remind me|I want to know|I forgot] how many {count} {model} [has|needs|uses|takes]",
    "[number|the number|count|total number] of {count} [of|for|in] {model}",
    "number of {count}, {model}?",
    "[what is|what's|give me|tell me] the number of {count} [of|for|in] {model}?",
    "I [have|use|run|downloaded|got|just fetched|am using|want] {model}. How many {count} [does it have|is that|are there"
    "|do I need|does it need|has it]?",
    "with how many {count} does {model} [come|run|work]?",
    "{model} has how many {count}?",
    "what [number|count] of {count} [does {model} have|is in {model}|has {model}]?",
    "[is it true that|does|do] {model} [has|have|needs|need|uses|use] [1|2|4|8|32|40|64|80|one|two|eight] {count}?",
    "[please tell me|could you tell me|can you say|would you tell me|I would like to know] how many {count} [are in|there are in|belong to|come with|are needed for|I need for] {model}",
    "[if|when] I [run|use|load|take|want] {model}, how many {count} [is that|are there|do I need|does it have]?",
    "how many {count} [should|must|will|would|can] {model} [have|need|use|take]?",
    "[the |exact |total |right |]{count} [count |number |][of|for|in] {model}[?|]",
    "[hi, |hello, |]I'm [trying to run|looking at|working with|curious about|reading about] {model}. How many {count} [does it have|are there|do I need|has it]?",
)
NOUN_FRAMES = (
    "[what is|what's|whats] the {noun} [of Llama 2|of llama 2|of the models|for Llama 2|here|in Llama 2|of llama|]?",
    "[tell me|give me|I need|I want|show me|please name|say] [the|Llama 2's] {noun}[, please| of Llama 2|]",
    "{noun}[?| of Llama 2?| please| of llama2|, please?| of the model]",
    "[llama 2|Llama 2|llama2|Llama] {noun}[?|]",
    "[which|what] {noun} [does Llama 2|do the models|does llama2|does the model] [have|use|support|come with]?",
    "[can|could|would] you [tell me|give me|say|remind me of] the {noun} [of Llama 2|]?",
    "how [big|large|long] is the {noun} [of Llama 2|in Llama 2|]?",
    "do you know the {noun} [of Llama 2|of the models|]?",
    "[how about|I wonder about|I have a question about|question on] the {noun} [of Llama 2|]",
    "[what is|what's|tell me|give me|how large is|how big is|I need] its {noun}[?|]",
    "[the |our |this |]{noun}[?|, please|...|: what is it?|!|]",
    "[what|which] {noun} [is|would be|was] [it|that|right|used|there][?|]",
    "[could you|can you|please|will you] [explain|describe|state|write] the {noun}[ of Llama 2| to me|]",
    "I [would like|want] to know the {noun}[ of Llama 2|]",
)
COUNT_FRAMES = (
    "how many {count} [does Llama 2|do the models|does it|does llama2|can Llama 2|does the model] [have|take|use|know|support]?",
    "how many {count} are [there|in Llama 2|there in Llama 2|possible|allowed]?",
    "[number|max number|the number] of {count} [in|of|for] Llama 2",
    "[tell me|I want to know|do you know] how many {count} [Llama 2|the model|it] [has|takes|uses|knows]",
    "[does|is it true that] [Llama 2|it|the model] [support|have|take|supports|has|takes] [2048|4096|8192|32000|50000|1000] {count}?",
    "[what is|what's|tell me] the [maximum |highest |total |exact |][number|count] of {count}[ of Llama 2| I can use| I can give it| in it|]?",
    "[{count}, how many|how many {count}|count of {count}|number of {count}][?|]",
)
OPENERS = (
    "[hi|hello|hey|ok|okay|so|well|good morning|hi there][,|.|!] ",
    "[please|quick question:|quick one:|a question:|sorry,|excuse me,|one more thing:|question:] ",
    "I am [new to this|a beginner|learning|setting up a server|writing a script|reading the docs]. ",
    "I [have|bought|rented|got] [a new machine|a server|some GPUs|a cluster]. ",
    "[my colleague|my friend|my teacher|my team|someone|a user] asks: ",
)
CLOSERS = ("[thanks|thank you|please|thx|cheers]", "I [forgot|am not sure|can't find it|need it today].")

SIZED_FACTS: dict[str, Fact] = {
    "mp": Fact(
        MP,
        (
            "The MP value of Llama 2 {size} is {value}: start it with --nproc_per_node {value}.",
            "Llama 2 {size} uses MP={value}, so set --nproc_per_node {value}.",
        ),
        nouns="[MP|MP value|model parallel size|model-parallel value|model parallel value|value of MP|MP size|MP number"
        "|model parallelism|nproc_per_node|--nproc_per_node|model_parallel_size|nproc per node|parallel size"
        "|degree of parallelism|MP setting|model-parallel size]",
        questions=(
            "[what|which value|which number] do I [pass to|give to|set|put in|use for] --nproc_per_node for {model}?",
            "[does {model} [need|use|take|have]|is {model}] MP [1|2|4|8][ or | or MP ][1|2|4|8]?",
            "what [do I put|goes|comes|should stand|stands|do I write] after --nproc_per_node for {model}?",
            "I [want to|have to|must|need to|should] [serve|run|start|launch|load] {model}, [what|which] [MP|nproc_per_node] [is right|do I use|is it]?",
            "how do I [choose|pick|set|find|know|decide on] [the|] [MP|MP value|model parallel size|nproc_per_node] for {model}?",
            "is [MP=|MP ][1|2|4|8] right for {model}?",
            "--nproc_per_node for {model}[?|]",
            "{model} with [which|what] MP?",
            "[can I|may I|should I] [run|start|use] {model} with MP[=| ][1|2|4|8]?",
            "to [run|start|serve] {model}, [what|which] MP [do I|should I|must I] [use|set]?",
            "what should [--nproc_per_node|nproc_per_node|the MP value|MP] be [if|when|in case] I [use|run|load|start] {model}?",
            "[which|what] number [follows|comes after|stands behind|belongs behind] [--nproc_per_node|nproc_per_node] [for|if I use|with|when I want to run] {model}?",
            "{model} [needs|wants|takes|has] [what|which] [mp|MP|MP value|nproc_per_node]?",
            "[does|should|must] {model} [run|start|be run|be started] with [MP |MP=|--nproc_per_node |nproc_per_node ][1|2|4|8]?",
            "is it [MP |MP=][1|2|4|8] or [MP |MP=][1|2|4|8] for {model}?",
            "I [set|used|gave] --nproc_per_node [1|2|4|8] for {model}. Is that [right|correct|wrong|okay]?",
            "I was [told|asked] to [run|start|deploy|serve|try] {model}[: |, |. |, so ]what [goes|comes|do I write|belongs|must stand] after --nproc_per_node?",
            "[we|my team|our team|our users|a customer] [want to|will|would like to|wants to] [run|use|deploy|try] {model}[: |, |. |, so ][which|what] [MP|MP value|nproc_per_node] [is right|do we need|is it|should be set]?",
            "[what|which] [value|number] [of MP|for MP|for the MP|for --nproc_per_node] [suits|fits|goes with|do I take for|belongs to] {model}?",
        ),
    ),
    "gpus": Fact(
        MP,
        (
            "Llama 2 {size} runs on {gpus} (MP={value}): use --nproc_per_node {value}.",
            "You need {gpus} for Llama 2 {size}, because its MP value is {value}.",
        ),
        nouns="[number of GPUs|GPU count|number of processes|process count|number of ranks|world size|WORLD_SIZE|number of graphics cards"
        "|count of GPUs|right number of processes]",
        counts="[GPUs|gpus|processes|graphics cards|cards|ranks|devices|workers|torchrun processes|GPU|procs|accelerators]",
        questions=(
            "how many [processes|GPUs|ranks|workers] [do|must|should] I [start|launch|use|run|have] for {model}?",
            "how many [GPUs|cards|graphics cards|devices|processes] [are needed|do I need|are required|must I have|should I buy] [to run|for|to load] {model}?",
            "I [downloaded|have|fetched|got|copied] {model}. How many [processes|GPUs|ranks|cards] do I [start|need|use|launch]?",
            "[can I run|does {model} fit on|will {model} run on|is {model} able to run on] [{model} on|] [one|a single|two|my] [GPU|GPUs|card]?",
            "is [one|a single] GPU enough for {model}?",
            "[on|over|across] how many [GPUs|cards|devices|processes] is {model} [sharded|split|spread|run|distributed]?",
            "[what hardware|which hardware|what kind of machine] [does {model} need|do I need for {model}]?",
            "do I [have to|need to|must I] [shard|split|cut] {model}?",
            "I have [one|two|four|eight] GPUs. [Can I run|Is that enough for|Will it do for] {model}?",
            "[can|could|may|will] {model} [be run|run|fit|be loaded|work|be used] [on|onto|with] [one|two|four|eight|a single|1|2|4|8|only one|three] [GPU|GPUs|card|cards|graphics cards|device]?",
            "[does|do] {model} [fit|run|work|need|require] [on |onto |][one|two|four|eight|a single|1|2|4|8|more than one|several] [GPU|GPUs|card|cards|device|devices]?",
            "how many [GPUs|cards|graphics cards] must [be in the box|be in my machine|I have in my server|I rent|I plug in] [for|to run] {model}?",
            "[please tell me|I wonder|do you know|tell me] how many [processes|workers|ranks] torchrun [has to start|starts|must start|should launch] for {model}",
            "I'd like to [run|use|serve|try] {model}, how many [GPUs|cards|processes|devices] [do I need|must I have|does it take|are needed]?",
            "I [want to|would like to|am trying to] get {model} [going|running|to work]. [What|Which] [world size|number of processes|number of GPUs] do I need?",
        ),
        extra={"gpus": GPUS},
    ),
    "files": Fact(
        MP,
        ("The folder of Llama 2 {size} holds {files}.", "Llama 2 {size} has {files}, for MP={value}."),
        nouns="[number of checkpoint files|number of shards|shard count|number of files|number of .pth files|file count]",
        counts="[checkpoint files|files|shards|.pth files|pth files|checkpoints|weight files|parts|consolidated files|pieces]",
        questions=(
            "[into|in] how many [files|shards|parts|pieces|.pth files] [is {model}|are {model}'s weights|is the checkpoint of {model}] [split|cut|divided|sharded|saved|stored]?",
            "[what|which] [files|.pth files|checkpoint files] [are|do I find|must be|should be|lie] in the [folder|directory|download] of {model}?",
            "which files [belong to|make up|come with] {model}?",
            "how many [files|shards|checkpoints] [should|must] I [see|find|have] for {model}?",
            "how many [.pth |pth |checkpoint |weight |][files|shards] [should|must|does|will] the [directory|folder|download] [of|for] {model} [have|hold|contain|show]?",
            "are there [1|2|4|8|one|two|eight] [files|shards|checkpoint files|.pth files] [for|in|with] {model}?",
            "is {model} [one file|a single file|cut into several files|in more than one file|sharded]?",
        ),
        extra={"files": FILES},
    ),
    "layers": Fact(
        {"7B": "32", "13B": "40", "70B": "80"},
        ("Llama 2 {size} has {value} layers.", "There are {value} layers in Llama 2 {size}."),
        nouns="[number of layers|layer count|depth|n_layers|number of blocks|number of transformer layers|network depth]",
        counts="[layers|transformer layers|blocks|transformer blocks|decoder layers|decoder blocks|hidden layers]",
        questions=(
            "how deep is {model}?",
            "[layers|n_layers|depth] [in|of|for] {model}",
            "how deep is the network of {model}?",
        ),
    ),
    "dim": Fact(
        {"7B": "4096", "13B": "5120", "70B": "8192"},
        ("The dimension (dim) of Llama 2 {size} is {value}.", "Llama 2 {size} has a hidden dimension of {value}."),
        nouns="[dimension|dim|hidden size|embedding size|embedding dimension|width|hidden dimension|model dimension|model width"
        "|d_model|size of the hidden state|vector size|hidden width|size of the embeddings]",
        questions=(
            "how wide is {model}?",
            "how wide are the [layers|vectors|hidden states|embeddings] of {model}?",
            "how [big|large|wide] is [a|the|an] [hidden state|embedding|hidden vector|hidden layer] [in|of] {model}?",
            "how many dimensions [does {model} have|has {model}|are there in {model}|do the embeddings of {model} have]?",
        ),
    ),
    "heads": Fact(
        {"7B": "32", "13B": "40", "70B": "64"},
        ("Llama 2 {size} has {value} attention heads.", "There are {value} attention heads in Llama 2 {size}."),
        nouns="[number of heads|number of attention heads|head count|n_heads|number of query heads|attention head count]",
        counts="[heads|attention heads|query heads|heads of attention|attention heads per layer]",
        questions=("[heads|n_heads] [in|of|for] {model}", "with how many heads does {model} attend?"),
    ),
    "kv_heads": Fact(
        {"7B": "32", "13B": "40", "70B": "8"},
        ("Llama 2 {size} has {value} key and value heads.", "There are {value} KV heads in Llama 2 {size}."),
        nouns="[number of KV heads|n_kv_heads|number of key-value heads|KV head count|number of key and value heads]",
        counts="[KV heads|kv heads|key-value heads|key and value heads|key heads|value heads|key/value heads|heads for keys and values]",
        questions=("[KV heads|n_kv_heads] [in|of|for] {model}",),
    ),
    "parameters": Fact(
        {"7B": "7 billion", "13B": "13 billion", "70B": "70 billion"},
        ("Llama 2 {size} has about {value} parameters.",),
        nouns="[number of parameters|parameter count|number of weights|count of parameters]",
        counts="[parameters|weights|params|billion parameters]",
        questions=("how [big|large] is {model}?", "what [size|] is {model}?"),
    ),
    "weights_memory": Fact(
        {"7B": "13 GB", "13B": "26 GB", "70B": "138 GB"},
        ("The weights of Llama 2 {size} take about {value} in float16.",),
        nouns="[size of the weights in GB|download size|file size|size on disk|weight size in gigabytes|disk space]",
        counts="[GB|gigabytes|GB of weights|gigabytes of memory|GB of disk]",
        questions=(
            "how much [memory|RAM|VRAM|disk space|space] [does {model} need|do the weights of {model} take|is needed for {model}]?",
            "how [big|large|heavy] [are the weights|is the checkpoint|is the download] of {model}?",
        ),
    ),
    "command": Fact(
        MP,
        (
            "torchrun --nproc_per_node {value} example_chat_completion.py --ckpt_dir llama-2-{lower}-chat/ "
            "--tokenizer_path tokenizer.model",
        ),
        nouns="[torchrun command|command line|start command|launch command|command|torchrun line|command to run it]",
        questions=(
            "how do I [run|start|launch|serve|use|execute] {model}?",
            "[which|what] [command|line|torchrun command|call] [starts|runs|launches|do I type for|do I use for] {model}?",
            "[show me|give me|write|print|I need|tell me] [how to [run|start|launch]|the [command|line|call] that [runs|starts|launches]] {model}",
            "[what|which] command [do|must|should] I [type|enter|use] to [run|start|launch] {model}?",
            "[start|run|launch] {model} [how|with torchrun, how]?",
            "torchrun [for|with] {model}",
            "what does the [command|torchrun command|call] for {model} look like?",
        ),
        extra={"lower": {size: size.lower() for size in SIZES}},
    ),
}

FACTS: dict[str, Fact] = {
    "context": Fact(
        {"": "4096"},
        ("The context length of Llama 2 is {value} tokens.", "Llama 2 reads up to {value} tokens at once."),
        nouns="[context length|context window|maximum context|context size|max context|maximum sequence length|longest prompt|length limit"
        "|window size|context|prompt length|input length|max sequence length|maximum length|token limit|maximum number of tokens|context limit|size of the context]",
        counts="[tokens of context|tokens at once|tokens in the context|tokens in a prompt|tokens in one sequence|input tokens|tokens at most]",
        questions=(
            "how long [can|may] [a|the|my] [prompt|text|input|sequence|conversation|chat|document] be[ at most|]?",
            "[what is|what's] the longest [prompt|input|sequence|document|chat] [Llama 2|it|the model] can [read|handle|take|process]?",
            "how many tokens [can|does] [Llama 2|it|the model|llama2] [read|take|see|handle|process|accept|remember|fit][ at most| at once|]?",
            "how much [text|context|input] [can|does] [Llama 2|it|the model] [read|take|remember|keep|handle]?",
            "[on|with|up to] [what|which] [sequence |context |] length [was|were] [Llama 2|it|the models|the model] [trained|built|made]?",
            "how [far|much] can [Llama 2|it|the model] look back?",
            "is [2048|1024|8192|4096] tokens [too long|okay|the limit|possible]?",
            "how many [words|tokens] [fit|go] [into|in] the [context|window|prompt|memory of the model]?",
            "what is the [limit|maximum] [for|of|on] [the prompt|tokens|the input length|the sequence length]?",
            "how long [may|can|should|must] [my|a|our|the] [prompt|input|text|question|message] be?",
            "does [Llama 2|it|the model] [support|have|take|read] [2048|4096|8192|100000] tokens[ of context| at once|]?",
        ),
        same_for_all=True,
    ),
    "vocabulary": Fact(
        {"": "32000"},
        ("The vocabulary of Llama 2 has {value} tokens.", "Llama 2 has a vocabulary of {value} tokens."),
        nouns="[vocabulary|vocabulary size|vocab size|vocab|size of the vocabulary|vocab_size|number of tokens in the vocabulary|token vocabulary"
        "|tokenizer size|size of the tokenizer|size of the vocab]",
        counts="[tokens in the vocabulary|entries in the vocabulary|pieces in the tokenizer|vocabulary entries|words in the vocabulary"
        "|different tokens|distinct tokens|token ids|pieces|kinds of tokens|token types]",
        questions=(
            "how many [different |distinct |] [tokens|pieces|symbols|entries|words] does the [tokenizer|vocabulary|vocab] [know|have|contain|hold]?",
            "how [big|large] is the [vocabulary|vocab|tokenizer|dictionary|set of tokens]?",
            "[what is|what's] the [highest|largest|last] token id?",
            "how many [rows|entries] [has|does] the embedding [table|matrix] [have|]?",
        ),
        same_for_all=True,
    ),
    "mp_all": Fact(
        {"": ""},
        ("The MP value is 1 for 7B, 2 for 13B and 8 for 70B.",),
        nouns="[MP values|MP table|table of MP values|model parallel sizes|model-parallel values|list of MP values|MP of each model|MP for every model]",
        questions=(
            "[what are|tell me|give me|list|show me|I need|name|print] [the|all|all the] [MP values|model parallel sizes|values of MP|MP numbers] [of|for] [all|the|every|each] [sizes|models|size|model]",
            "[which|what] MP [goes with|belongs to|do I use for|is right for] [which|each|every] [model|size]?",
            "which MP values [are there|exist|are possible|can I use]?",
            "how many GPUs [does each|does every|do the] [model|models|size|sizes] need?",
            "what MP [do the models|does each model|does each size] [use|need|have]?",
            "[what are|tell me|list] the MP values",
            "how do the [sizes|models] differ in [MP|GPUs|shards]?",
            "[what is|show|I need|give me|can you show me|could you write] [the|a] [table|list|overview] of [MP values|model parallel values|MP numbers|the MP sizes]",
            "[which|what] are the [MP|model parallel] [values|sizes|numbers]?",
            "how many [shards|files|checkpoint files] [does each|does every] [model|size] have?",
            "MP for 7B, 13B and 70B?",
            "[compare|list] the MP [values|] of the [three|] [models|sizes]",
        ),
    ),
    "sizes": Fact(
        {"": ""},
        ("Llama 2 comes in three sizes: 7B, 13B and 70B.",),
        nouns="[sizes|model sizes|available sizes|list of sizes|list of models|variants|range of sizes]",
        counts="[sizes|model sizes|variants|versions]",
        questions=(
            "[which|what] [sizes|models|variants|versions] [of Llama 2|] [are there|exist|can I get|are available|can I download|did Meta release|does Llama 2 come in]?",
            "in [which|what|how many] sizes [does Llama 2 come|is Llama 2 available|was Llama 2 released|is it made]?",
            "is there [a|an] [3B|34B|65B|1B|8B|20B|405B|30B|40B] [model|version|Llama 2|size]?",
            "what [MP|number of GPUs] [does|for] the [3B|34B|65B|1B|8B|405B|30B] model [need|]?",
            "how big are the models?",
            "[list|name|tell me] the [models|sizes|sizes of Llama 2]",
        ),
    ),
    "mp_meaning": Fact(
        {"": ""},
        ("MP means model parallel: the number of GPUs that the weights are sharded over.",),
        nouns="[meaning of MP|definition of MP|MP value's meaning|idea of model parallelism|meaning of model parallel]",
        questions=(
            "what [does MP mean|is MP|does MP stand for|is an MP value|is model parallelism|is the MP|is meant by MP]?",
            "[explain|define|describe] [MP|model parallelism|the MP value|what MP is|model parallel|what MP means][ to me|]",
            "[what is|what's] [MP|the MP value|model parallel|model parallelism] [good for|for|used for|]?",
            "why [do|does] [Llama 2|the models|the big models|big models] [use|need] [model parallelism|MP|several GPUs|many GPUs]?",
            "MP [means what|meaning|is what]?",
            "[how does|why is there] model parallelism [work|]?",
            "what is [sharding|a shard|model sharding]?",
        ),
    ),
    "max_seq_len": Fact(
        {"": ""},
        ("max_seq_len is the longest prompt plus answer in tokens, up to 4096. A higher value takes more memory.",),
        nouns="[max_seq_len|meaning of max_seq_len|max_seq_len parameter|max_seq_len option|max seq len]",
        questions=(
            "what [is|does] max_seq_len [do|mean|for|set|control|]?",
            "[why|when] [should|would|do] I [lower|raise|change|set|increase|reduce] max_seq_len?",
            "what [happens|changes] [if|when] I [lower|increase|set|change|reduce|double] max_seq_len?",
            "[explain|describe] max_seq_len[ to me|]",
            "[what|which] [value|number] [should|do|can] I [use|set|give|put] for max_seq_len?",
            "how [high|large|big] [can|may|should] max_seq_len be?",
            "is a [high|large|small|low] max_seq_len [bad|good|slow|better]?",
        ),
    ),
    "max_batch_size": Fact(
        {"": ""},
        ("max_batch_size is how many prompts run at once. A higher value takes more memory.",),
        nouns="[max_batch_size|meaning of max_batch_size|max_batch_size parameter|max_batch_size option|max batch size|batch size]",
        questions=(
            "what [is|does] max_batch_size [do|mean|for|set|control|]?",
            "[why|when] [should|would|do] I [raise|change|set|increase|reduce] max_batch_size?",
            "what [happens|changes] [if|when] I [lower|raise|increase|set|change|double] max_batch_size?",
            "[explain|describe] max_batch_size[ to me|]",
            "how many prompts [run|can I run|can I send|fit] [at once|in a batch|at the same time]?",
            "how [high|large|big] [can|may|should] max_batch_size be?",
            "is a [high|large|small|low] max_batch_size [bad|good|slow|better]?",
        ),
    ),
    "memory": Fact(
        {"": ""},
        ("Lower max_seq_len and max_batch_size: memory for them is allocated in advance.",),
        nouns="[fix for out of memory|solution for out of memory errors|way to save memory|cure for an out of memory error]",
        questions=(
            "[I get|I see|I have|there is|I got|it shows|it stops with] [an out of memory error|CUDA out of memory|an OOM|OOM errors|out of memory][ on my GPU| with 7B| with the 13B model| at start|], [what can I do|what now|help|how do I fix it|why|any idea]?",
            "how [can|do] I [save|reduce|lower|cut|use less] [memory|GPU memory|VRAM|the memory use|memory usage]?",
            "[my GPU|the GPU|my card|my machine|it] [has too little memory|is out of memory|runs out of memory|has not enough memory|ran out of VRAM][, what should I do|, any advice|. What now|]?",
            "out of memory[!|, help|, what now?|error|]",
            "[CUDA|GPU|torch|] out of memory [with|on|when I start|when loading|for] {model}[. What now?|, what can I do?|. Help!|. Do you have advice?|]",
            "{model} [does not fit|needs too much memory|runs out of memory|takes too much memory|fills my memory][. Any advice?|, what now?|. What can I do?|]",
            "[I load|I start|loading|starting] {model} [and get|gives|ends with] [an out of memory error|OOM|CUDA out of memory][. What now?|, why?|]",
            "[CUDA|GPU|torch] out of memory[ when I load the model| when I start| with 13B| on start|][, what now?|. Help!|. Any ideas?|]",
            "how do I [fix|avoid|solve|prevent|stop] [out of memory errors|an OOM|running out of memory|the out of memory error]?",
            "what [uses|takes|needs] [so much|the most|all the] memory?",
            "the model does not fit [into memory|on my GPU|in VRAM][, what can I do|]",
            "my [GPU|card] has [8|12|16|24] GB and it [crashes|stops|runs out of memory]",
            "[which|what] [settings|parameters|options|arguments] [reduce|lower|save|affect|change] memory?",
        ),
    ),
    "torchrun": Fact(
        {"": ""},
        ("torchrun starts one process for each GPU; --nproc_per_node says how many processes.",),
        nouns="[purpose of torchrun|use of torchrun|meaning of torchrun|role of torchrun|point of torchrun]",
        questions=(
            "what [is torchrun|does torchrun do|is torchrun for|is torchrun good for|is the torchrun command]?",
            "why [do I need|must I use|should I use|is there|do we use|do the examples use] torchrun?",
            "[explain|describe] torchrun[ to me|]",
            "[do I need|must I use|what happens with|what do you use] torchrun[ for|]?",
            "what [is|does] [--nproc_per_node|nproc_per_node|the --nproc_per_node flag] [do|mean|for|set|]?",
            "[explain|describe] --nproc_per_node[ to me|]",
            "what is the [flag|option] [--nproc_per_node|nproc_per_node] [for|good for]?",
        ),
    ),
    "world_size": Fact(
        {"": ""},
        (
            "WORLD_SIZE is the number of processes, set by torchrun. Llama.build takes the MP value from it unless you give one.",
        ),
        nouns="[meaning of WORLD_SIZE|use of WORLD_SIZE|default of model_parallel_size|default MP in Llama.build|default MP|default MP value|role of WORLD_SIZE]",
        questions=(
            "what [is|does|about] [WORLD_SIZE|the world size|world size] [mean|do|for|set|]?",
            "[explain|describe] WORLD_SIZE[ to me|]",
            "where does [Llama.build|it|build|the library|the code] [take|get|read|find] the [MP|MP value|model parallel size] from?",
            "what [happens|MP is used] [if|when] I [leave out|do not give|omit|forget|don't set|don't pass] [model_parallel_size|the MP value|the MP|an MP]?",
            "[who|what] sets [WORLD_SIZE|the world size]?",
            "[which|what] environment variable [sets|holds|gives|says] the [MP value|MP|number of processes]?",
            "[if|when] I [say nothing|give nothing|pass nothing|leave it out], [what MP does Llama.build use|where does the MP come from|how is the MP set]?",
            "[is|why is] WORLD_SIZE [used|needed|read|set|important]?",
            "how does [Llama.build|build|it] [know|find out|learn] [the MP|the MP value|how many GPUs there are]?",
            "is the [MP|MP value] [read from|taken from] [the environment|an environment variable]?",
            "what is the [environment variable|variable] WORLD_SIZE [for|good for]?",
        ),
    ),
    "python": Fact(
        {"": ""},
        ("Give it to the build method: Llama.build(..., model_parallel_size=2).",),
        nouns="[Python way to set MP|model_parallel_size argument|Python parameter for MP|keyword for the MP value]",
        questions=(
            "how [do|can|would] I [set|give|pass|choose|change] the [MP|MP value|model parallel size] [in|from|with|using] [Python|code|a script|my code|the API|Llama.build]?",
            "[can|may|could] I [give|pass|choose|change] the [MP|MP value|model parallel size] [in|with|using] [Python|code|a script|my script|the Python API]?",
            "[which|what] [argument|parameter|keyword] [of Llama.build|of build|] [sets|is for|gives|changes] the [MP|MP value|model parallel size]?",
            "is there [a parameter|an argument|a keyword|a way] [for the MP|to set the MP] in [Python|Llama.build|code]?",
            "what [is|does] [model_parallel_size|the model_parallel_size argument|the parameter model_parallel_size] [do|for|mean|]?",
            "Llama.build and MP[, how|]?",
        ),
    ),
    "consolidated": Fact(
        {"": ""},
        ("consolidated.00.pth holds the weights of the model, or the first shard of them.",),
        nouns="[content of consolidated.00.pth|meaning of consolidated.00.pth|purpose of consolidated.00.pth|use of the .pth files]",
        questions=(
            "what [is|does|about] consolidated.00.pth [for|hold|contain|mean|]?",
            "[explain|describe] consolidated.00.pth[ to me|]",
            "what [is in|stands in|do I find in|is stored in|is] [the file consolidated.00.pth|consolidated.00.pth|the .pth file|the pth file|a .pth file|the checkpoint file]?",
            "where are the weights [stored|saved|kept|]?",
            "[which|what] file [holds|has|contains|stores] the [weights|parameters|model]?",
            "what [are|is in] the [consolidated|.pth|checkpoint] files [for|]?",
            "what is a checkpoint?",
            "do I need consolidated.00.pth?",
        ),
    ),
    "params": Fact(
        {"": ""},
        ("params.json holds the hyper-parameters, such as dim, n_layers and n_heads.",),
        nouns="[content of params.json|meaning of params.json|purpose of params.json|use of params.json]",
        questions=(
            "what [is|does|about] params.json [for|hold|contain|mean|]?",
            "[explain|describe] params.json[ to me|]",
            "what [is in|stands in|is stored in|is written in|is inside] [the file params.json|params.json|the params file|the json file]?",
            "where [are|do I find] the [hyper-parameters|hyperparameters|settings|dimensions] [of the model|stored|]?",
            "[which|what] file [holds|has|contains] [the hyper-parameters|dim and n_layers|the settings|the number of layers|the sizes of the layers]?",
            "do I need params.json?",
        ),
    ),
    "tokenizer": Fact(
        {"": ""},
        ("tokenizer.model is the SentencePiece model that turns text into tokens and back.",),
        nouns="[content of tokenizer.model|meaning of tokenizer.model|purpose of tokenizer.model|use of tokenizer.model|kind of tokenizer|tokenizer]",
        questions=(
            "what [is|does] tokenizer.model [for|do|hold|contain|mean|]?",
            "[explain|describe] tokenizer.model[ to me|]",
            "what [is in|stands in|is stored in|do I need] [the file tokenizer.model|tokenizer.model][ for|]?",
            "[which|what] [tokenizer|kind of tokenizer] does [Llama 2|it|the model] use?",
            "how [is|does] text [turned into|become] tokens?",
            "[which|what] file [holds|has|contains|is] the [tokenizer|vocabulary|SentencePiece model]?",
            "what does the tokenizer do?",
            "do I need tokenizer.model?",
        ),
    ),
    "error_files": Fact(
        {"": ""},
        ("The folder holds no .pth files: check that ckpt_dir is right and that the download is complete.",),
        nouns="[fix for no checkpoint files found|meaning of no checkpoint files found|cause of no checkpoint files found]",
        questions=(
            "[I get|it says|I see|the error is|it fails with|it stops with|I got|what does it mean:|why do I get|what is] [AssertionError: |'|\"|the error |]no checkpoint files found[ in {folder}|]['|\"|]",
            "[AssertionError: |assertion error: |error: |]no checkpoint files found[ in {folder}|][, what now?|. What is wrong?|, how do I fix it?|?|]",
            "no checkpoint files found[ in {folder}|]: [what do I do|what does that mean|why|help|what is my mistake]?",
            "[it|the program|Llama.build|the script] [finds no checkpoint files|can't find the checkpoint files|does not find my checkpoint][, why|, what can I do|]?",
            "how do I [fix|solve|repair] [the error |]'no checkpoint files found[ in {folder}|]'?",
            "[I load|I start|loading|starting] {model} [and get|gives|ends with|and see] ['|]no checkpoint files found[ in {folder}|]['|][. What now?|, why?|. What is wrong?|]",
            "[I get|I see|it says] ['|]no checkpoint files found[ in {folder}|]['|]. [What did I do wrong|What is wrong|What does it mean|Why|What now|What is missing]?",
            "why [does it find|are there|were] no checkpoint files [found|] in {folder}?",
        ),
    ),
    "model_one": Fact(
        {"": ""},
        ("One file, MP=1 and one GPU belong to Llama 2 7B.",),
        questions=(
            "[which|what] [model|size|Llama 2] [runs on|needs|fits on|uses|can I run on|works with] [one|1|a single|only one|just one] [GPU|graphics card|process|device|card]?",
            "[which|what] [model|size|one] has [MP 1|an MP of 1|MP=1|one checkpoint file|only one file|one shard|1 shard|one .pth file]?",
            "I [have|own|bought|see|use|found] [one|1|a single|only one|just one] [GPU|graphics card|device|card|.pth file|checkpoint file|file|pth]. [Which|What] [model|size] [can I run|is that|is it|should I take|fits|do I have|is for me]?",
            "there is [only|just] [one|1] [.pth file|file|pth|shard|checkpoint][ in my folder| in the folder|]. Which [model|size] is it?",
        ),
    ),
    "model_two": Fact(
        {"": ""},
        ("Two files, MP=2 and two GPUs belong to Llama 2 13B.",),
        questions=(
            "[which|what] [model|size|Llama 2] [runs on|needs|fits on|uses|can I run on|works with|is for] [two|2] [GPUs|graphics cards|processes|devices|cards]?",
            "[which|what] [model|size|one] has [MP 2|an MP of 2|MP=2|two checkpoint files|two files|two shards|2 shards|two .pth files]?",
            "I [have|own|bought|see|use|found] [two|2] [GPUs|graphics cards|devices|cards|.pth files|checkpoint files|files]. [Which|What] [model|size] [can I run|is that|is it|should I take|fits|do I have|is for me]?",
            "there are [two|2] [.pth files|files|shards|GPUs|checkpoints][ in my folder| in my server| here|]. Which [model|size|of the models] is [it|that for|made for them|for them]?",
        ),
    ),
    "model_eight": Fact(
        {"": ""},
        ("Eight files, MP=8 and eight GPUs belong to Llama 2 70B.",),
        questions=(
            "[which|what] [model|size|Llama 2] [runs on|needs|fits on|uses|can I run on|works with|is for] [eight|8] [GPUs|graphics cards|processes|devices|cards]?",
            "[which|what] [model|size|one] has [MP 8|an MP of 8|MP=8|eight checkpoint files|eight files|eight shards|8 shards|eight .pth files]?",
            "I [have|own|bought|see|use|found] [eight|8] [GPUs|graphics cards|devices|cards|.pth files|checkpoint files|files]. [Which|What] [model|size] [can I run|is that|is it|should I take|fits|do I have|is for me]?",
            "there are [eight|8] [.pth files|files|shards|GPUs|checkpoints][ in my folder| in my server| here|]. Which [model|size|of the models] is [it|that for|made for them|for them]?",
        ),
    ),
    "maker": Fact(
        {"": ""},
        ("Llama 2 was made by Meta and released in July 2023.",),
        nouns="[maker|release date|author|creator|release year|company behind it]",
        questions=(
            "who [made|created|wrote|trained|released|developed|is behind|published|makes|designed|produced|owns|invented|publishes] [Llama 2|llama|the Llama models|llama 2|it]?",
            "when [was|did] [Llama 2|llama 2] [released|come out|published|made|appear]?",
            "[which|what] [company|firm|team|lab] [made|makes|released|is behind|trained|built|created|designed] [Llama 2|Llama|it]?",
            "where does Llama 2 come from?",
        ),
    ),
    "what_is": Fact(
        {"": ""},
        ("Llama 2 is a family of open language models by Meta, in the sizes 7B, 13B and 70B.",),
        questions=(
            "what is [Llama 2|llama2|llama 2|Llama]?",
            "[explain|describe|tell me about|what do you know about|say something about] [Llama 2|llama 2|the Llama 2 models|Llama]",
            "what kind of model is Llama 2?",
            "[do you know|have you heard of] Llama 2?",
        ),
    ),
    "gqa": Fact(
        {"": ""},
        ("Only the 70B model uses grouped-query attention, with 8 key and value heads.",),
        nouns="[meaning of GQA|use of grouped-query attention|kind of attention]",
        questions=(
            "[which|what] [model|size|models] [uses|use|has|have] [grouped-query attention|GQA|grouped query attention]?",
            "does [7B|13B|70B|Llama 2] [use|have] [grouped-query attention|GQA]?",
            "what is [GQA|grouped-query attention|grouped query attention]?",
        ),
    ),
    "architecture": Fact(
        {"": ""},
        ("Llama 2 uses RMSNorm, rotary position embeddings and SwiGLU.",),
        nouns="[architecture|activation function|normalization|kind of norm|position embedding|type of positions|structure of the network]",
        questions=(
            "[which|what] [activation|norm|normalization|position embedding|kind of network|architecture] does [Llama 2|it|the model] use?",
            "how [is Llama 2 built|does Llama 2 work|does the network work]?",
            "does Llama 2 use [SwiGLU|RMSNorm|rotary embeddings|RoPE|LayerNorm]?",
        ),
    ),
    "temperature": Fact(
        {"": ""},
        (
            "The temperature sets how freely the next token is drawn: 0 always takes the likeliest one, and 0.6 is the default.",
        ),
        nouns="[temperature|meaning of temperature|default temperature|sampling temperature|temperature parameter]",
        questions=(
            "what [is|does] [temperature|the temperature] [do|mean|for|]?",
            "[which|what] temperature [should|do] I [use|set]?",
            "how do I get the same answer [every time|each time|always]?",
            "what [happens|changes] [at|with] temperature [0|zero|1]?",
        ),
    ),
    "top_p": Fact(
        {"": ""},
        ("The value top_p keeps the likeliest tokens whose probabilities add up to it; 0.9 is the default.",),
        nouns="[top_p|meaning of top_p|default top_p|top_p parameter|top-p value]",
        questions=(
            "what [is|does] [top_p|top-p|top p|nucleus sampling] [do|mean|for|]?",
            "[which|what] top_p [should|do] I [use|set]?",
        ),
    ),
    "backend": Fact(
        {"": ""},
        ("The processes talk through torch.distributed: NCCL on GPUs, gloo on CPUs. fairscale splits the layers.",),
        nouns="[backend|distributed backend|use of fairscale|role of fairscale|use of NCCL|communication backend]",
        questions=(
            "what is [fairscale|NCCL|gloo|torch.distributed] [for|used for|]?",
            "[which|what] [backend|library] [is used|does it use] for [communication|the processes|model parallelism|distributed runs]?",
            "how do the [GPUs|processes|ranks] [talk|communicate|exchange data]?",
            "why [do I need|does it use] [fairscale|NCCL|gloo]?",
        ),
    ),
}

FOLLOWUPS = (
    "[and|what about|how about|and what about|and for|same for|and with|now|and now] {model}[?|]",
    "[okay|ok|thanks|I see|good|fine|great], [and|what about|how about] {model}?",
    "{model}?",
    "and [what is it|what would it be|how is it|which one is it] for {model}?",
)
MISMATCH_QUESTIONS = (
    "[I get|it says|I see|the error is|it fails with|it stops with|I got|why do I get|what does it mean:|it crashes with|what is] {error}",
    "{error}[, what now?|. What is wrong?|, how do I fix it?|?|, help!|. What can I do?|]",
    "how do I [fix|solve|repair|get rid of] {error}?",
    "[I get|it says|I see|the error is|it fails with|I got|it stopped with] {error}. [Why|What now|What can I do|How do I fix it|Help|What does that mean|What is wrong|What did I do wrong]?",
    "[my run|the script|the program|torchrun|Llama.build|the example|my program] [fails|stops|crashed|died|ends|breaks] with {error}[. Why?|. What now?|, what is wrong?|]",
    "what [does|is] {error} [mean|about|]?",
)
MISMATCH_ANSWERS = (
    "The checkpoint has {files} but {world} started: set --nproc_per_node {mp} to match the files.",
    "Set --nproc_per_node {mp}: the checkpoint has {files}, and {world} started.",
)


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
    question = expand(rng, rng.choice(MISMATCH_QUESTIONS), error=error)
    verb = "process" if world == 1 else "processes"
    slots = {"mp": str(mp), "files": _counted(mp, "file"), "world": f"{world} {verb}"}
    return sentence(question), expand(rng, rng.choice(MISMATCH_ANSWERS), **slots)


def _frame(rng: random.Random, fact: Fact, *, sized: bool) -> str:
    """A frame to ask for the fact: its own questions about half of the time, else a general frame."""
    kinds = [("questions", fact.questions)] * 2
    if fact.nouns:
        kinds.append(("noun", SIZED_NOUN_FRAMES if sized else NOUN_FRAMES))
    if fact.counts:
        kinds.append(("count", SIZED_COUNT_FRAMES if sized else COUNT_FRAMES))
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
        text = expand(rng, rng.choice(OPENERS)) + " " + text
    if rng.random() < 0.06:
        text += " " + expand(rng, rng.choice(CLOSERS))
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
        wording = expand(rng, rng.choice(FOLLOWUPS), model=model_name(rng, size))
        pairs.append((sentence(wording), fact.answer(rng, size)))
    return pairs
