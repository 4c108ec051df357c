"""Fills gaps in four texts with Code Llama 7B or 13B.

    torchrun --nproc_per_node 1 example_infilling.py --ckpt_dir CodeLlama-7b/

The toy checkpoint of this repository was not trained for it.
"""

from functools import partial
from typing import Any

from llama import Llama
from llama.distributed.groups import is_first_rank
from llama.inputs import encode_infillings
from llama.tools import commandline

GAP = "<FILL>"
TEXTS = [
    f'def strip_accents(text: str) -> str:\n    """{GAP}\n    return plain\n',
    f"# How to run it\n\n```bash\n{GAP}\n```\n\nThe server then listens on port 8000.\n",
    f"class Stack:\n    def __init__(self):\n        {GAP}\n\n    def push(self, x):\n        self.items.append(x)\n",
    f"SELECT country, {GAP}\nFROM customers\nGROUP BY country\nORDER BY n_customers DESC;\n",
]


@commandline.with_build_flags
def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 192,
    max_gen_len: int | None = 128,
    max_batch_size: int = 4,
    suffix_first: bool = False,
    speculative: str | None = None,
    **build: Any,
) -> None:
    """Print each text, and again with its gap filled.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth; start one process per file. By default the toy one.
        tokenizer_path: the checkpoint's tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        temperature: of sampling; 0 for greedy decoding.
        top_p: samples from the smallest set of tokens whose probability mass exceeds it (nucleus sampling).
        max_seq_len: maximum number of tokens of a text and what fills its gap.
        max_gen_len: maximum number of tokens that fill a gap.
        max_batch_size: maximum number of texts that run at a time.
        suffix_first: whether what follows the gap stands in front in the prompt.
        speculative: prompt_lookup, or draft with draft_ckpt_dir, verifies several drafted tokens per pass: the
            same text, often in less time.
    """
    prefixes, suffixes = zip(*(text.split(GAP) for text in TEXTS), strict=True)
    sampling = commandline.checked_sampling(
        build, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, speculative=speculative
    )
    ckpt_dir, tokenizer_path = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    commandline.check_prompts(
        partial(encode_infillings, prefixes, suffixes, suffix_first=suffix_first), ckpt_dir, tokenizer_path, max_seq_len
    )
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        **build,
    )
    results = generator.text_infilling(prefixes, suffixes, suffix_first=suffix_first, **sampling)
    if is_first_rank():
        for text, result in zip(TEXTS, results, strict=True):
            print(f"{text}\n> filled:\n\n{result['full_text']}")
            print("\n==================================\n")


if __name__ == "__main__":
    commandline.run(main)
