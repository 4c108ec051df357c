"""Completes a file of requests: `torchrun --nproc_per_node N -m llama.tools.batch --input FILE --output FILE`.

Requests and results are lines in OpenAI's batch format (see `batch_file`). A run that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from llama import Llama, runtime
from llama.checkpoint import find_tokenizer
from llama.quoting import quote
from llama.tools import commandline
from llama.tools.batch_file import Reader
from llama.tools.batch_results import Progress, Results, compare, read_requests
from llama.tools.batch_work import Coordinator, Replica, Worker, complete_jobs
from llama.tools.toy import toy_checkpoint

T = TypeVar("T")
_PLAIN_S = 10.0  # between two updates of the progress bar where stderr is no terminal


def fingerprint(llama: Llama, tokenizer_path: str | Path, seed: int) -> str:
    """Identifies what results depend on besides the request: checkpoint, tokenizer, dtype, length, seed.

    It does not depend on the model-parallel size.
    """
    norm = llama.model.norm.weight.detach()  # whole on every rank
    params = llama.model.params
    parts = (params.dim, params.n_layers, params.n_heads, params.vocab_size, params.max_seq_len, str(norm.dtype), seed)
    digest = hashlib.sha256(repr(parts).encode())
    digest.update(norm.float().cpu().numpy().tobytes())
    digest.update(Path(tokenizer_path).read_bytes())
    return f"fp_{digest.hexdigest()[:16]}"


def _check_fingerprint(progress: Progress, mark: str, output: Path) -> None:
    for other, number in progress.fingerprints.items():
        if other != mark:
            raise ValueError(
                f"--output must be a new file, or results of the same checkpoint, tokenizer, dtype, max_seq_len and "
                f"seed, got {output}, whose line {number} is a result of others (system_fingerprint {quote(other)}, "
                f"now {mark})"
            )


def _open(input: Path, output: Path) -> tuple[Results, Progress]:
    _tqdm()  # if it is missing, that is said before any work
    if not input.is_file():
        raise FileNotFoundError(f"--input must be a file of requests, got {input}, where there is none")
    if output.exists() and (not output.is_file() or output.samefile(input)):
        raise ValueError(f"--output must be a file other than --input, got {output}")
    results = Results(output)
    try:
        return results, compare(input, results, output)
    except BaseException:
        results.close()
        raise


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'the progress bar needs tqdm, of the extra [batch]; install it with: pip install -e ".[batch]"'
        ) from error
    return tqdm


def _progress_bar(progress: Progress) -> Any:
    interval = 0.2 if sys.stderr.isatty() else _PLAIN_S
    n_done = len(progress.done)
    return _tqdm()(total=progress.n_lines, initial=n_done, unit=" requests", smoothing=0, mininterval=interval)


def _first_rank_does(work: Callable[[], T]) -> T | None:
    """What `work` returns on the first rank, None on the others. Its error ends all ranks, and is printed once."""
    done: T | None = None
    error: Exception | None = None
    if runtime.is_first_rank():
        try:
            done = work()
        except commandline.MISTAKES as problem:
            error = problem
    if runtime.broadcast_object(error is not None):
        raise error or SystemExit(1)
    return done


def main(
    input: str,
    output: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    model: str | None = None,
    seed: int = 1,
    dtype: str | None = None,
    device: str | None = None,
    model_parallel_size: int | None = None,
) -> None:
    """Completes the requests of a file in OpenAI's batch format. The same command goes on after an interruption.

    Args:
        input: path of the requests, one JSON object per line.
        output: path of the results, to which they are appended as they come.
        ckpt_dir: folder of params.json and consolidated.NN.pth; by default the toy checkpoint of the repository.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        max_seq_len: maximum number of tokens of a prompt and its completion.
        max_batch_size: number of requests that each replica works on at a time.
        model: name of the checkpoint in requests and results; by default that of its folder.
        seed: of requests that have none: each gets its own, derived from this one and its custom_id.
        dtype: float16, bfloat16 or float32.
        device: cpu, cuda, cuda:N or mps; by default the fastest available.
        model_parallel_size: number of processes that share a network; with fewer than there are, replicas of it share
            the requests. By default all of them.
    """
    ckpt_dir = ckpt_dir or toy_checkpoint()
    tokenizer_path = tokenizer_path or str(find_tokenizer(ckpt_dir))
    name = model or Path(ckpt_dir).resolve().name
    chosen = runtime.select_device(device)
    runtime.init_process_groups(runtime.resolve_model_parallel_size(model_parallel_size), chosen)
    opened = _first_rank_does(lambda: _open(Path(input), Path(output)))
    with closing(opened[0]) if opened else nullcontext():
        if runtime.broadcast_object(opened[1].is_complete if opened else None):
            if opened:
                print(f"{output}: all {opened[1].n_lines} requests have results already")
            return
        llama = Llama.build(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed, device=device, dtype=dtype
        )
        mark = fingerprint(llama, tokenizer_path, seed)
        _first_rank_does(lambda: _check_fingerprint(opened[1], mark, Path(output)) if opened else None)
        if opened:
            read = Reader(llama.tokenizer, llama.model.params.vocab_size, max_seq_len, name, seed)
            _lead(llama, Path(input), read, *opened, mark)
        else:
            _follow(llama)


def _lead(llama: Llama, input: Path, read: Reader, results: Results, progress: Progress, mark: str) -> None:
    """The first rank's part."""
    lines = (line for line in read_requests(input) if line.number not in progress.done)
    started = time.monotonic()
    with runtime.rank_errors(), _progress_bar(progress) as bar:
        n_ahead = 2 * llama.model.params.max_batch_size
        desk = Coordinator(lines, read, results, mark, n_ahead, bar)
        complete_jobs(Replica(llama), desk)
        desk.finish()
    seconds = time.monotonic() - started
    n_new, n_prompt = desk.n_new_tokens, desk.n_prompt_tokens
    print(
        f"{progress.n_lines - len(progress.done)} requests, {desk.n_errors} of them refused: {n_prompt} prompt tokens, "
        f"{n_new} new tokens in {seconds:.1f} s ({n_new / seconds:.0f} tokens/s)"
    )


def _follow(llama: Llama) -> None:
    """The other ranks' part."""
    with runtime.rank_errors():
        complete_jobs(Replica(llama), Worker(runtime.replica()[0]) if runtime.is_first_of_group() else None)


if __name__ == "__main__":
    commandline.run(main)
