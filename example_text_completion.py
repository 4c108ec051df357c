"""Completes four texts.

    torchrun --nproc_per_node 1 example_text_completion.py

runs the toy checkpoint of this repository; `--ckpt_dir llama-2-7b/ --tokenizer_path tokenizer.model` runs a released
one.
"""

import logging
from pathlib import Path

import fire

from llama import Llama
from llama.runtime import is_first_rank

TINY_LLAMA = Path(__file__).parent / "tiny-llama"
PROMPTS = [
    "I think that the meaning of life is",
    "In plain words, the theory of relativity says that",
    "Write an e-mail that congratulates the team on the launch:\n\nHello everyone,\n\nI just",
    # Few-shot: the examples show what is wanted.
    "Translate English to French:\n\nhouse => maison\ncat => chat\nbread => pain\ncheese =>",
]


def main(
    ckpt_dir: str = str(TINY_LLAMA),
    tokenizer_path: str = str(TINY_LLAMA / "tokenizer.model"),
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int | None = 64,
    max_batch_size: int = 4,
) -> None:
    """Prints each prompt and its completion.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth; one process a file.
        tokenizer_path: the checkpoint's tokenizer.model.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: samples from the smallest set of tokens whose mass exceeds it.
        max_seq_len: most tokens of a prompt and its completion.
        max_gen_len: most tokens of a completion.
        max_batch_size: most prompts worked on at a time.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    generator = Llama.build(
        ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, max_seq_len=max_seq_len, max_batch_size=max_batch_size
    )
    results = generator.text_completion(PROMPTS, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
    if is_first_rank():
        for prompt, result in zip(PROMPTS, results, strict=True):
            print(prompt)
            print(f"> {result['generation']}")
            print("\n==================================\n")


if __name__ == "__main__":
    fire.Fire(main)
