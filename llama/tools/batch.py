"""Completes a file of requests: `llama batch --input FILE --output FILE`.

Requests and results are lines in OpenAI's batch format (see `serving.batch`). An interrupted run continues where
it stopped.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llama import Llama
from llama.distributed import groups
from llama.distributed.device import select_device
from llama.inputs import check_speculative
from llama.tools import commandline
from llama.tools.progress import showing

with commandline.extra_imports(__name__, "batch"):
    from llama.serving.batch import MAX_CHOICES, Result, Results, complete_lines
    from llama.serving.jobs import Planner
    from llama.serving.settings import fingerprint

T = TypeVar("T")


def _first_rank_does(work: Callable[[], T]) -> T | None:
    """The result of `work` on the first rank, None on the others. Its error ends all ranks, and is printed once."""
    done: T | None = None
    error: Exception | None = None
    if groups.is_first_rank():
        try:
            done = work()
        except commandline.MISTAKES as problem:
            error = problem
    if groups.broadcast_object(error is not None):
        raise error or SystemExit(1)
    return done


@partial(commandline.with_build_flags, reuse_prefixes=True, compile="background")
def main(
    input: str,
    output: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    model: str | None = None,
    seed: int = 1,
    speculative: str | None = None,
    **build: Any,
) -> None:
    """Complete the requests of a file in OpenAI's batch format. After an interruption, the same command continues.

    Args:
        input: path of the requests, one JSON object per line.
        output: path of the results, which are appended as they come.
        ckpt_dir: folder of params.json and consolidated.NN.pth; by default the toy one.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        max_seq_len: maximum number of tokens of a prompt and its completion.
        max_batch_size: maximum number of completions that each replica generates at a time.
        model: name of the checkpoint in requests and results; by default the name of its folder.
        seed: for requests without a seed: each gets one derived from this and its custom_id.
        speculative: prompt_lookup, or draft with draft_ckpt_dir, verifies several drafted tokens per pass: the
            same text, often in less time.
    """
    check_speculative(speculative, build)
    ckpt_dir, tokenizer_path = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    name = model or Path(ckpt_dir).resolve().name
    mp = groups.resolve_model_parallel_size(build.get("model_parallel_size"))
    groups.init_process_groups(mp, select_device(build.get("device")))
    results = _first_rank_does(lambda: Results(Path(input), Path(output)))
    with closing(results) if results else nullcontext():
        if groups.broadcast_object(not results.pending if results else None):
            if results:
                print(f"{output}: all {results.n_lines} requests have results already, {results.n_refused} refused")
            return
        llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **build)
        mark = fingerprint(llama, tokenizer_path, seed, build.get("quantize"))
        _first_rank_does(lambda: results.check_fingerprint(mark) if results else None)
        planner = Planner(llama, MAX_CHOICES, name, mark, speculative=speculative)
        if results:
            _lead(llama, planner, seed, results)
        else:
            complete_lines(llama, (), planner, seed, lambda result: None)


def _lead(llama: Llama, planner: Planner, seed: int, results: Results) -> None:
    """The part of rank 0."""
    started, n_to_do, counts = time.monotonic(), len(results.pending), Counter[str]()

    def write(result: Result) -> None:
        results.append(result.text)
        results.pending.pop(result.line)
        counts.update(refused=result.is_refused, prompt=result.n_prompt_tokens, new=result.n_new_tokens)
        add(1, f"{counts['new'] / max(time.monotonic() - started, 1e-9):.0f} tokens/s")

    with showing("batch", results.n_lines, unit=" requests", done=results.n_lines - n_to_do) as add:
        complete_lines(llama, results.remaining(), planner, seed, write)
    results.check()
    seconds = time.monotonic() - started
    print(
        f"{n_to_do} requests, {counts['refused']} of them refused: {counts['prompt']} prompt tokens, "
        f"{counts['new']} new tokens in {seconds:.1f} s ({counts['new'] / seconds:.0f} tokens/s)"
    )


if __name__ == "__main__":
    commandline.run(main, name="llama batch")
