"""Completes four texts with a base model.

    torchrun --nproc_per_node 1 example_text_completion.py

runs the toy checkpoint of this repository; add `--ckpt_dir llama-2-7b/` for a released one.
"""

from functools import partial
from typing import Any

from llama import Llama
from llama.distributed.groups import is_first_rank
from llama.inputs import encode_texts
from llama.tools import commandline

PROMPTS = [
    "I think that the meaning of life is",
    "In plain words, the theory of relativity says that",
    "Write an e-mail that congratulates the team on the launch:\n\nHello everyone,\n\nI just",
    # Few-shot: the examples show what is wanted.
    "Translate English to French:\n\nhouse => maison\ncat => chat\nbread => pain\ncheese =>",
]


@commandline.with_build_flags
def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int | None = 64,
    max_batch_size: int = 4,
    speculative: str | None = None,
    **build: Any,
) -> None:
    """Print each prompt and its completion.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth; start one process per file. By default the toy one.
        tokenizer_path: the checkpoint's tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        temperature: of sampling; 0 for greedy decoding.
        top_p: samples from the smallest set of tokens whose probability mass exceeds it (nucleus sampling).
        max_seq_len: maximum number of tokens of a prompt and its completion.
        max_gen_len: maximum number of tokens of a completion.
        max_batch_size: maximum number of prompts that run at a time.
        speculative: prompt_lookup, or draft with draft_ckpt_dir, verifies several drafted tokens per pass: the
            same text, often in less time.
    """
    sampling = commandline.checked_sampling(
        build, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, speculative=speculative
    )
    ckpt_dir, tokenizer_path = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    commandline.check_prompts(partial(encode_texts, PROMPTS, "prompts"), ckpt_dir, tokenizer_path, max_seq_len)
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        **build,
    )
    results = generator.text_completion(PROMPTS, **sampling)
    if is_first_rank():
        for prompt, result in zip(PROMPTS, results, strict=True):
            print(prompt)
            print(f"> {result['generation']}")
            print("\n==================================\n")


if __name__ == "__main__":
    commandline.run(main)
