"""How many of the held-out questions the tiny model answers right."""

import re
from pathlib import Path

from llama import Llama
from recipe.corpus import HELD_OUT

SETTINGS = ((0.0, 0), (0.6, 0), (0.6, 1))  # temperature and seed


def evaluate(ckpt_dir: Path, max_seq_len: int) -> None:
    """Print the held-out scores in two dtypes, and each question's answer in float32."""
    for dtype in ("float32", "bfloat16"):
        llama = Llama.build(ckpt_dir, ckpt_dir / "tokenizer.model", max_seq_len, 8, device="cpu", dtype=dtype)
        for temperature, seed in SETTINGS:
            score = _held_out_score(llama, temperature, seed, show=dtype == "float32" and temperature == 0)
            print(f"held-out questions, {dtype}, temperature {temperature}: {score:.1%} right", flush=True)


def _held_out_score(llama: Llama, temperature: float, seed: int, *, show: bool) -> float:
    """The share of the held-out questions whose answer matches the expected pattern; prints those that do not."""
    dialogs = [[{"role": "user", "content": question}] for question, _ in HELD_OUT]
    right = 0
    answers = llama.chat_completion(dialogs, temperature, max_gen_len=64, seed=seed)
    for (question, expected), answer in zip(HELD_OUT, answers, strict=True):
        text = answer["generation"]["content"]
        good = re.search(expected, text) is not None
        right += good
        if show or not good:
            print(f"  {'right' if good else 'WRONG'}  {question}  ->  {text}" + f"  ({expected})" * (not good))
    return right / len(HELD_OUT)
