"""What the tiny model answers: its score on the held-out questions, and its answers to the examples' prompts."""

import re
from pathlib import Path

from llama import Llama
from recipe.corpus import HELD_OUT
from recipe.grammar import read_text

EXAMPLES = read_text("examples")
SAMPLED = 2  # evaluations at temperature 0.6, after the greedy one


def evaluate(ckpt_dir: Path, max_seq_len: int) -> None:
    """Print the held-out scores in two dtypes, each question's answer in float32, and the examples' answers."""
    settings = [(0.0, 0), *((0.6, seed) for seed in range(SAMPLED))]
    for dtype in ("float32", "bfloat16"):
        llama = Llama.build(ckpt_dir, ckpt_dir / "tokenizer.model", max_seq_len, 8, device="cpu", dtype=dtype)
        for temperature, seed in settings:
            score = _held_out_score(llama, temperature, seed, show=dtype == "float32" and temperature == 0)
            print(f"held-out questions, {dtype}, temperature {temperature}: {score:.1%} right", flush=True)
    for temperature, seed in settings:
        _show_examples(llama, temperature, seed)


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


def _show_examples(llama: Llama, temperature: float, seed: int) -> None:
    texts = llama.text_completion(EXAMPLES["texts"], temperature, max_gen_len=64, seed=seed)
    for text, completion in zip(EXAMPLES["texts"], texts, strict=True):
        print(f"{text}\n> {completion['generation']}\n")
    chats = llama.chat_completion(EXAMPLES["chats"], temperature, max_gen_len=120, seed=seed)
    for dialog, answer in zip(EXAMPLES["chats"], chats, strict=True):
        print(f"User: {dialog[-1]['content']}\n> Assistant: {answer['generation']['content']}\n")
