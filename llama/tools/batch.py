"""Completes a file of requests: `llama batch --input FILE --output FILE`.

Requests and results are lines in OpenAI's batch format (see `batch_file`). An interrupted run continues where
it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llama import Llama
from llama.distributed import groups
from llama.distributed.device import select_device
from llama.errors import first_few, missing_extra, quote
from llama.inputs import check_speculative
from llama.tools import commandline
from llama.tools.progress import Progress

with commandline.extra_imports(__name__):
    try:
        from llama.serving.batch_file import MAX_CHOICES, BatchWork, Reader, Result, read_requests
        from llama.serving.batch_results import Results
        from llama.serving.jobs import Planner
        from llama.serving.settings import fingerprint
    except ImportError as error:
        raise missing_extra("batch", error) from error

T = TypeVar("T")


def _check_fingerprint(results: Results, mark: str, output: Path) -> None:
    for other, number in results.fingerprints.items():
        if other != mark:
            raise ValueError(
                f"--output must be a new file, or results of the same checkpoint, tokenizer, dtype, quantize, "
                f"max_seq_len and seed, got {output}, whose line {number} is a result of others (system_fingerprint "
                f"{quote(other)}, now {mark})"
            )


def _open(input: Path, output: Path) -> Results:
    if not input.is_file():
        raise FileNotFoundError(f"--input must be a file of requests, got {input}, where there is none")
    if output.exists() and (not output.is_file() or output.samefile(input)):
        raise ValueError(f"--output must be a file other than --input, got {output}")
    results = Results(output)
    try:
        results.compare(input)
    except BaseException:
        results.close()
        raise
    return results


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
    results = _first_rank_does(lambda: _open(Path(input), Path(output)))
    with closing(results) if results else nullcontext():
        if groups.broadcast_object(not results.pending if results else None):
            if results:
                print(f"{output}: all {results.n_lines} requests have results already")
            return
        llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **build)
        mark = fingerprint(llama, tokenizer_path, seed, build.get("quantize"))
        _first_rank_does(lambda: _check_fingerprint(results, mark, Path(output)) if results else None)
        read = Reader(Planner(llama, MAX_CHOICES, name, mark, speculative=speculative), seed)
        if results:
            _lead(llama, Path(input), read, results)
        else:
            BatchWork(llama, (), read, lambda done: None).run()


class _Writer:
    """Writes results as they come, and counts them."""

    def __init__(self, results: Results, progress: Progress) -> None:
        self._results = results
        self._progress = progress
        self._started = time.monotonic()
        self.n_refused = self.n_prompt_tokens = self.n_new_tokens = 0

    def __call__(self, done: Result) -> None:
        self._results.append(done.text)
        self._results.pending.pop(done.line)
        self.n_refused += done.is_refused
        self.n_prompt_tokens += done.n_prompt_tokens
        self.n_new_tokens += done.n_new_tokens
        speed = self.n_new_tokens / max(time.monotonic() - self._started, 1e-9)
        self._progress.add(1, f"{speed:.0f} tokens/s")


def _lead(llama: Llama, input: Path, read: Reader, results: Results) -> None:
    """The part of rank 0."""
    pending, started = results.pending, time.monotonic()
    n_to_do = len(pending)
    with Progress("batch", results.n_lines, unit=" requests", done=results.n_lines - n_to_do) as progress:
        write = _Writer(results, progress)
        BatchWork(llama, (line for line in read_requests(input) if line.number in pending), read, write).run()
    results.check()
    if missing := list(pending.values()):
        raise ValueError(
            f"--input must not change while the command runs, got {input}, in which {len(missing)} requests are gone, "
            f"such as {first_few([quote(custom_id) for custom_id in missing])}; start the command again"
        )
    seconds = time.monotonic() - started
    n_new = write.n_new_tokens
    print(
        f"{n_to_do} requests, {write.n_refused} of them refused: {write.n_prompt_tokens} prompt tokens, "
        f"{n_new} new tokens in {seconds:.1f} s ({n_new / seconds:.0f} tokens/s)"
    )


if __name__ == "__main__":
    commandline.run(main, name="llama batch")
