"""The HTTP server under closed-loop clients: each sends its next request when the last one is answered.

    python benchmarks/serving.py

64 requests by 1, 4 and 8 clients over loopback, prompts and outputs of log-normal lengths, greedy, streamed, on a
network of random weights. In each round the clients' numbers take turns, and with them the same work in one process
without HTTP, the batch kept full (see batching.py). `--url` measures another server of OpenAI's API instead.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.batching import complete, random_model, skewed_lengths, timed
from llama import Tokenizer, runtime
from llama.args import ModelArgs
from llama.checkpoint import tensor_shapes
from llama.tools.commandline import run
from llama.tools.toy import toy_checkpoint

LONGEST_S = 600.0


@dataclass
class Round:
    """What one round of one number of clients measured.

    Attributes:
        seconds: from the first request to the last answer.
        tokens: that were generated.
        first: seconds to the first token of each request.
        per_token: seconds between the tokens after it, the mean of each request that had several.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)


def write_checkpoint(folder: Path, args: ModelArgs, dtype: torch.dtype) -> None:
    """Random weights in the released layout."""
    numbers = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=numbers)
        for name, shape in tensor_shapes(args, 1).items()
    }
    torch.save(state, folder / "consolidated.00.pth")
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps")
    (folder / "params.json").write_text(json.dumps({name: getattr(args, name) for name in names}))


@contextmanager
def started_server(folder: Path, args: ModelArgs, dtype: str) -> Iterator[str]:
    """The address of a server of this library's."""
    command = [sys.executable, "-m", "llama.tools.serve", "--ckpt_dir", str(folder), "--port", "0", "--dtype", dtype]
    command += ["--tokenizer_path", str(Path(toy_checkpoint()) / "tokenizer.model"), "--model_name", "model"]
    command += ["--max_seq_len", str(args.max_seq_len), "--max_batch_size", str(args.max_batch_size)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        assert server.stdout
        line = server.stdout.readline()
        url = line[line.index("http://") :].partition(",")[0]
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


async def ask(web: httpx.AsyncClient, model: str, prompt: list[int], max_tokens: int, results: Round) -> None:
    """One streamed request."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    sent = time.perf_counter()
    first = last = None
    n_tokens = 0
    async with web.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"the server answered {answer.status_code}: {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if chunk["choices"]:
                    last = time.perf_counter()
                    first = first or last
                elif chunk.get("usage"):
                    n_tokens = chunk["usage"]["completion_tokens"]
    results.tokens += n_tokens
    if first is not None and last is not None:
        results.first.append(first - sent)
        if n_tokens > 1:
            results.per_token.append((last - first) / (n_tokens - 1))


async def closed_loop(url: str, model: str, n_clients: int, requests: list[tuple[list[int], int]]) -> Round:
    """All requests, by that many clients."""
    results, waiting = Round(), list(reversed(requests))

    async def client(web: httpx.AsyncClient) -> None:
        while waiting:
            await ask(web, model, *waiting.pop(), results)

    async with httpx.AsyncClient(base_url=url, timeout=LONGEST_S, trust_env=False) as web:
        started = time.perf_counter()
        await asyncio.gather(*(client(web) for _ in range(n_clients)))
        results.seconds = time.perf_counter() - started
    return results


def measure_round(url: str, model: str, requests: list[tuple[list[int], int]], rounds: dict[int, list[Round]]) -> None:
    """Adds one round to those of each number of clients."""
    for n_clients, measured in rounds.items():
        result = asyncio.run(closed_loop(url, model, n_clients, requests))
        print(f"{n_clients} clients: {result.tokens / result.seconds:.1f} tok/s", file=sys.stderr)
        measured.append(result)


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, round(q * (len(values) - 1)))]


def report(n_clients: int, rounds: list[Round], references: list[float]) -> str:
    """A line: the median over the rounds of the rate; over all requests of the times."""
    rates = [each.tokens / each.seconds for each in rounds]
    first = [1000 * t for each in rounds for t in each.first]
    gaps = [1000 * t for each in rounds for t in each.per_token]
    line = (
        f"{n_clients:3} clients {statistics.median(rates):7.1f} tok/s ({min(rates):.1f} to {max(rates):.1f})   "
        f"first token {statistics.median(first):6.0f} ms, p95 {percentile(first, 0.95):6.0f}   "
        f"per token {statistics.median(gaps):5.1f} ms, p95 {percentile(gaps, 0.95):5.1f}"
    )
    if references:
        ratios = [rate / reference for rate, reference in zip(rates, references, strict=True)]
        line += f"   {statistics.median(ratios):.2f} of kept full ({min(ratios):.2f} to {max(ratios):.2f})"
    return line


def main(
    dim: int = 1024,
    n_layers: int = 12,
    n_requests: int = 64,
    clients: str = "1,4,8",
    batch: int = 8,
    prompt_median: int = 32,
    output_median: int = 32,
    repeats: int = 3,
    dtype: str = "bfloat16",
    url: str | None = None,
    model: str = "model",
) -> None:
    """Prints for each number of clients tokens a second, time to the first token and per token, and a JSON line.

    Args:
        url: of a server that runs already, without /v1; by default one of this library is started.
        model: its name there.
    """
    n_words = Tokenizer(Path(toy_checkpoint()) / "tokenizer.model").n_words
    args = ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=16, n_kv_heads=4, vocab_size=n_words, max_batch_size=batch, max_seq_len=512
    )
    draw = random.Random(0)
    prompts = [
        [1, *(draw.randrange(259, n_words) for _ in range(length))]
        for length in skewed_lengths(n_requests, prompt_median, 255, seed=1)
    ]
    targets = skewed_lengths(n_requests, output_median, 255, seed=2)
    requests = list(zip(prompts, targets, strict=True))
    counts = [int(n) for n in clients.split(",")]
    rounds: dict[int, list[Round]] = {n: [] for n in counts}
    references: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        if url is None:
            write_checkpoint(Path(folder), args, runtime.DTYPES[dtype])
            with started_server(Path(folder), args, dtype) as own:
                network = random_model(args, runtime.DTYPES[dtype])
                complete(network, prompts[:batch], [4] * batch)
                for _ in range(repeats):
                    references.append(sum(targets) / timed(lambda: complete(network, prompts, targets)))
                    print(f"kept full: {references[-1]:.1f} tok/s", file=sys.stderr)
                    measure_round(own, model, requests, rounds)
        else:
            for _ in range(repeats):
                measure_round(url, model, requests, rounds)
    print(f"{n_requests} requests, prompts of up to {max(map(len, prompts))} tokens, outputs of up to {max(targets)}")
    if references:
        print(f"kept full, without HTTP: {statistics.median(references):.1f} tok/s")
    for n in counts:
        print(report(n, rounds[n], references))
    figures = {n: [[each.tokens, each.seconds] for each in rounds[n]] for n in counts}
    print(json.dumps({"benchmark": "serving", "cores": os.cpu_count(), "rounds": figures, "kept_full": references}))


if __name__ == "__main__":
    run(main)
