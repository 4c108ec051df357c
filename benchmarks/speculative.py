"""Speculative decoding and plain decoding in turn: tokens per pass, acceptance, tokens per second.

    python benchmarks/speculative.py
    python benchmarks/speculative.py --ckpt_dir tiny-llama --draft_ckpt_dir tiny-llama

Without `--ckpt_dir` the weights are random, and the texts scripted: a hook raises the logit of the scripted token, at
every position that the network computes, so that all the work is done. The texts repeat their prompt and themselves as
summaries that quote, edits of code, lists after examples and dialogs do, or hardly at all. A draft model of a tenth of
the size agrees with the script in a given share of positions. With `--ckpt_dir` the network writes its own texts.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch import Tensor, nn

from benchmarks.networks import make_job
from benchmarks.report import cpu_model, in_turn, spread
from llama import Llama
from llama.distributed.device import available_cores
from llama.model import CachePositions
from llama.tools.commandline import run

DRAFT_SHAPE = "110m"  # a tenth of 1b
MAX_SEQ_LEN = 2048
N_PROMPT = 200  # tokens of a scripted prompt
FIRST_ID = 259  # past control pieces and bytes
HEADER = f"{'':34}  8-grams  plain   spec.  ratio, range      per pass accepted same text"

KINDS = ("quoting summary", "code edit", "list after examples", "dialog", "without repetition")  # of scripts


class Script(NamedTuple):
    """A prompt and the completion that it shall get; an empty one is up to the network."""

    prompt: list[int]
    output: list[int]


def write_script(kind: str, seed: int, vocab_size: int, n_prompt: int, n_tokens: int) -> Script:
    """A text of one of the `KINDS`, in words as frequent as those of a language (Zipf's law).

    Pairs of fresh words recur by chance, long n-grams do not.
    """
    draw = random.Random(seed)

    def words(n: int) -> list[int]:
        return [FIRST_ID - 1 + int((vocab_size - FIRST_ID) ** draw.random()) for _ in range(n)]

    def quote(text: list[int], low: int, high: int) -> list[int]:
        n = draw.randint(low, high)
        start = draw.randrange(max(1, len(text) - n))
        return text[start : start + n]

    prompt, at = words(n_prompt), 0
    text = prompt.copy()
    while len(text) < n_prompt + n_tokens:
        if kind == "quoting summary":
            text += words(draw.randint(6, 14)) + quote(prompt, 20, 36)
        elif kind == "code edit":  # the prompt again, with a few tokens changed here and there
            start, n = at, draw.randint(15, 45)
            at = (at + n + draw.randint(0, 6)) % len(prompt)
            text += (prompt * 2)[start : start + n] + words(draw.randint(1, 6))
        elif kind == "list after examples":  # records that share their frame; the first ones are the prompt's end
            for part in (prompt[-22:-18], prompt[-18:-6], prompt[-6:]):
                text += part + words(draw.randint(1, 4))
        elif kind == "dialog":
            text += words(draw.randint(4, 16)) + quote(text, 16, 32)
        else:
            text += words(16)
    return Script(prompt, text[n_prompt : n_prompt + n_tokens])


def repeated_ngrams(script: Script, size: int = 8) -> float:
    """The share of the output's n-grams that occurred before, in the prompt or the output."""
    text = script.prompt + script.output
    grams = [tuple(text[end - size : end]) for end in range(size, len(text) + 1)]
    ends = [i for i in range(len(grams)) if i + size > len(script.prompt)]
    first = {gram: i for i, gram in reversed(list(enumerate(grams)))}
    return sum(first[grams[i]] < i for i in ends) / max(1, len(ends))


class Scripted:
    """A forward hook that has a network choose the tokens of a script; others beyond a share of `agreement`."""

    def __init__(self, network: nn.Module) -> None:
        self.tokens: list[int] = []
        self.agreement = 1.0
        self.remove = network.register_forward_hook(self._force, with_kwargs=True).remove

    def start(self, script: Script) -> None:
        """Begins a text."""
        draw = random.Random(sum(script.prompt))  # other positions in each text
        self.tokens = [t if draw.random() < self.agreement else t - 1 for t in script.prompt + script.output]

    def _force(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor) -> None:
        start_pos, last = args[1], kwargs.get("last")
        first = int(start_pos.start[0]) if isinstance(start_pos, CachePositions) else start_pos
        first += 0 if last is None else int(last[0])
        for place, token in enumerate(self.tokens[first + 1 : first + 1 + logits.size(1)]):
            logits[:, place, token] = 1e4


class Run(NamedTuple):
    """One text, decoded once."""

    tokens: list[int]  # of the completion
    rate: float  # tokens per second after the first one
    per_pass: float  # tokens per pass of the network after the first one
    accepted: float | None  # share of the drafted tokens that were accepted; None if there were none


def decode(llama: Llama, prompt: list[int], n_tokens: int, speculative: str | None) -> Run:
    """Completes a prompt greedily."""
    ends: list[float] = []  # of the passes
    before = replace(llama.engine.draft_counts)
    hook = llama.model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    (tokens,), _ = llama.generate([prompt], n_tokens, temperature=0, speculative=speculative)
    ended = time.perf_counter()
    hook.remove()
    counts = llama.engine.draft_counts
    drafted, accepted = counts.drafted - before.drafted, counts.accepted - before.accepted
    n_more, n_passes = max(1, len(tokens) - 1), max(1, len(ends) - 1)
    return Run(tokens, n_more / (ended - ends[0]), n_more / n_passes, accepted / drafted if drafted else None)


def compare(
    llama: Llama,
    name: str,
    texts: Sequence[Script],
    way: str,
    n_tokens: int,
    repeats: int,
    hooks: Sequence[Scripted] = (),
) -> None:
    """Decodes each text plainly and speculatively, in turn, each time the other one first, and prints a row."""
    runs: dict[str, list[Run]] = {"": [], way: []}
    for text in texts:
        for hook in hooks:
            hook.start(text)
        for i in range(repeats):
            for each in in_turn(list(runs), i):
                runs[each].append(decode(llama, text.prompt, n_tokens, each or None))
    plain, drafted = runs.values()
    written = [Script(text.prompt, text.output or plain[i * repeats].tokens) for i, text in enumerate(texts)]
    accepted = [r.accepted for r in drafted if r.accepted is not None]
    columns = [
        f"{name:34}{statistics.mean(map(repeated_ngrams, written)):7.0%} ",
        f"{statistics.median(r.rate for r in plain):8.1f}{statistics.median(r.rate for r in drafted):8.1f}   ",
        spread([b.rate / a.rate for a, b in zip(plain, drafted, strict=True)]),
        f"{statistics.median(r.per_pass for r in drafted):7.2f}",
        f"{statistics.median(accepted):7.0%}" if accepted else "      -",
        f"{sum(a.tokens == b.tokens for a, b in zip(plain, drafted, strict=True)):5}/{len(plain)}",
    ]
    print("".join(columns), flush=True)


def compare_scripted(llama: Llama, agreements: Sequence[float], n_texts: int, n_tokens: int, repeats: int) -> None:
    """Prompt lookup on every kind of script, and a draft model at several shares of agreement on fresh words."""
    hooks = [Scripted(llama.model), Scripted(llama.draft_model)]
    texts: list[Script] = []
    for kind in KINDS:  # the last of them without repetition
        texts = [write_script(kind, seed, llama.model.vocab_size, N_PROMPT, n_tokens) for seed in range(n_texts)]
        compare(llama, f"prompt lookup, {kind}", texts, "prompt_lookup", n_tokens, repeats, hooks)
    for agreement in agreements:
        hooks[1].agreement = agreement
        compare(llama, f"draft, agreement {agreement}", texts, "draft", n_tokens, repeats, hooks)


def compare_own(llama: Llama, prompts: dict[str, str | list[int]], n_tokens: int, repeats: int) -> None:
    """Texts that the network itself writes, by prompt lookup and, if it has one, its draft model."""
    for name, prompt in prompts.items():
        ids = llama.tokenizer.encode(prompt, bos=True, eos=False) if isinstance(prompt, str) else prompt
        for way in ["prompt_lookup"] + ["draft"] * (llama.draft_model is not None):
            compare(llama, f"{way.replace('_', ' ')}, {name}", [Script(ids, [])], way, n_tokens, max(2, repeats))


def main(
    shape: str = "1b",
    ckpt_dir: str | None = None,
    *,
    draft_ckpt_dir: str | None = None,
    prompts: str = str(Path(__file__).parent / "prompts.json"),
    n_tokens: int = 128,
    n_texts: int = 3,
    repeats: int = 1,
    agreements: float | Sequence[float] = (0.5, 0.7, 0.8, 0.9),
) -> None:
    """Prints a row per kind of text: tokens per second without and with drafts, their ratio, tokens per pass.

    Args:
        shape: tiny, 110m, 200m or 1b, of random weights, whose texts are scripted.
        ckpt_dir: a checkpoint with its tokenizer.model, that writes its own texts instead.
        draft_ckpt_dir: its draft model; None for prompt lookup alone.
        prompts: a JSON file, an object of names and prompts (strings, or lists of ids), for `ckpt_dir`.
        n_tokens: tokens that are generated.
        n_texts: scripted texts of each kind.
        repeats: of each text.
        agreements: of the draft model with the script.
    """
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch 1\n{HEADER}")
    with tempfile.TemporaryDirectory() as folder:
        paths = (ckpt_dir, str(Path(ckpt_dir) / "tokenizer.model")) if ckpt_dir else None
        if paths is None:
            job = make_job(shape, Path(folder, "job"))
            paths = job.ckpt_dir, job.tokenizer_path
            draft_ckpt_dir = make_job("tiny" if shape == "tiny" else DRAFT_SHAPE, Path(folder, "draft")).ckpt_dir
        options: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "draft_ckpt_dir": draft_ckpt_dir}
        llama = Llama.build(*paths, MAX_SEQ_LEN, 8, **options)
    for speculative in (None, "prompt_lookup"):  # warms up: the first speculative call times passes
        llama.generate([[llama.tokenizer.bos_id]], 2, temperature=0, speculative=speculative)
    if ckpt_dir:
        compare_own(llama, json.loads(Path(prompts).read_text(encoding="utf-8")), n_tokens, repeats)
    else:
        shares = [agreements] if isinstance(agreements, float) else agreements
        compare_scripted(llama, shares, n_texts, n_tokens, repeats)


if __name__ == "__main__":
    run(main, n_threads=available_cores())
