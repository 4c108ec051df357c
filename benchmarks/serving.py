"""HTTP servers under closed-loop clients: each client sends its next request when the last one is answered.

    python benchmarks/serving.py --peers llama_cpp,hf

64 requests over loopback by 1, 4, 8 and 16 clients, prompts and outputs of log-normal lengths, greedy, streamed, on a
network of random weights whose tokens are one character each. In each round the servers and the numbers of clients take
turns, and with them the same requests in one process without HTTP: the batch kept full (see batching.py), and one call
per request from 8 Python threads.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import httpx
import torch

from benchmarks.batching import MAX_SEQ_LEN, complete, random_requests
from benchmarks.machine import cpu_model, seconds
from benchmarks.servers import RunningServer, installed
from benchmarks.shapes import make_job
from llama import Llama, Tokenizer
from llama.distributed.device import available_cores
from llama.tools.commandline import run

LONGEST_S = 600.0
N_THREADS = 8  # of Python, in the reference without HTTP

Requests = list[tuple[list[int], int]]  # prompts, and how many tokens to generate


@dataclass
class Round:
    """What one round of one server and one number of clients measured.

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

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


async def ask(web: httpx.AsyncClient, model: str, prompt: str, max_tokens: int, results: Round) -> None:
    """One streamed request. A character is a token."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    sent = time.perf_counter()
    first = last = sent
    n_tokens = 0
    async with web.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"the server answered {answer.status_code}: {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            choices = json.loads(line[6:]).get("choices") if line.startswith("data: {") else None
            if choices and choices[0].get("text"):
                last = time.perf_counter()
                first = last if n_tokens == 0 else first
                n_tokens += len(choices[0]["text"])
    results.tokens += n_tokens
    if n_tokens:
        results.first.append(first - sent)
    if n_tokens > 1:
        results.per_token.append((last - first) / (n_tokens - 1))


async def closed_loop(server: RunningServer, n_clients: int, requests: Sequence[tuple[str, int]]) -> Round:
    """All requests, by that many clients."""
    results, waiting = Round(), list(reversed(requests))

    async def client(web: httpx.AsyncClient) -> None:
        while waiting:
            await ask(web, server.model, *waiting.pop(), results)

    async with httpx.AsyncClient(base_url=server.url, timeout=LONGEST_S, trust_env=False) as web:
        started = time.perf_counter()
        await asyncio.gather(*(client(web) for _ in range(n_clients)))
        results.seconds = time.perf_counter() - started
    return results


def in_threads(llama: Llama, requests: Requests) -> Round:
    """All requests, one call each, by `N_THREADS` Python threads of one process."""
    results, waiting = Round(), list(reversed(requests))

    def work() -> None:
        while waiting:
            try:
                prompt, n_tokens = waiting.pop()
            except IndexError:  # another thread was faster
                return
            (tokens,), _ = llama.generate([prompt], n_tokens, temperature=0)
            results.tokens += len(tokens)

    threads = [threading.Thread(target=work) for _ in range(N_THREADS)]

    def all_of_them() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    results.seconds = seconds(all_of_them)
    return results


def kept_full(llama: Llama, requests: Requests) -> Round:
    """All requests in one call."""
    prompts, targets = [prompt for prompt, _ in requests], [n_tokens for _, n_tokens in requests]
    return Round(seconds(lambda: complete(llama, prompts, targets)), sum(targets))


def measure(ways: dict[str, Callable[[], Round]], repeats: int) -> dict[str, list[Round]]:
    """The rounds of each way of answering the requests, all in turn, each time with another one first."""
    rounds: dict[str, list[Round]] = {name: [] for name in ways}
    for i in range(repeats):
        names = list(ways)
        first = i % len(names)
        for name in names[first:] + names[:first]:
            rounds[name].append(ways[name]())
            print(f"round {i + 1}/{repeats}  {name}: {rounds[name][-1].rate:.1f} tok/s", file=sys.stderr, flush=True)
    return rounds


def percentile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, round(q * (len(values) - 1)))]


def report(rounds: dict[str, list[Round]], reference: str, n_ours: str) -> str:
    """A line per way: the median over the rounds of its rate, over all requests of the times; ratios within rounds."""
    lines = [f"{'':22}    tok/s              first token, p95        per token, p95   of {reference}"]
    for name, measured in rounds.items():
        rates = [each.rate for each in measured]
        line = f"{name:22} {statistics.median(rates):8.1f} ({min(rates):.1f} to {max(rates):.1f})".ljust(50)
        first = [1000 * t for each in measured for t in each.first]
        gaps = [1000 * t for each in measured for t in each.per_token]
        line += f"{statistics.median(first):7.0f} {percentile(first, 0.95):7.0f} ms" if first else " " * 18
        line += f"{statistics.median(gaps):9.1f} {percentile(gaps, 0.95):7.1f} ms" if gaps else " " * 20
        ratios = [each.rate / full.rate for each, full in zip(measured, rounds[reference], strict=True)]
        lines.append(f"{line}   {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for name, measured in rounds.items():
        server, _, clients = name.partition(", ")
        if clients and server != n_ours:
            pairs = zip(rounds[f"{n_ours}, {clients}"], measured, strict=True)
            ratios = [ours.rate / theirs.rate for ours, theirs in pairs]
            span = f"({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"{n_ours} is {statistics.median(ratios):.2f} times as fast as {name} {span}")
    return "\n".join(lines)


def main(
    shape: str = "200m",
    *,
    n_requests: int = 64,
    clients: Sequence[int] = (1, 4, 8, 16),
    batch: int = 8,
    prompt_median: int = 32,
    output_median: int = 32,
    repeats: int = 3,
    dtype: str = "bfloat16",
    threads: int | None = None,
    peers: str | Sequence[str] = "",
    peer_python: str | Sequence[str] = "",
) -> None:
    """Prints for each server and number of clients tokens per second, time to the first token and per token.

    Args:
        shape: tiny, 200m, 1b, 7b or 13b, of random weights.
        batch: `max_batch_size` of this library.
        threads: of every server; None for as many as there are cores.
        peers: of llama_cpp (llama-cpp-python's server), hf (`transformers serve`) and hf_batching (with its continuous
            batching), those to run in turn with it; those that are not installed are left out.
        peer_python: NAME=PYTHON,...: the interpreters of peers that live in environments of their own.
    """
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    counts = [clients] if isinstance(clients, int) else list(clients)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        _, job = make_job(shape, None, Path(folder), dtype)
        job = replace(job, threads=threads, decode_batches=(batch,), ragged_lengths=(MAX_SEQ_LEN - 2,))
        requests = random_requests(n_requests, prompt_median, output_median, job.vocab_size)
        tokenizer = Tokenizer(job.tokenizer_path)
        texts = [(tokenizer.decode(prompt), n_tokens) for prompt, n_tokens in requests]
        servers = [
            stack.enter_context(RunningServer(name, python, job))
            for name, python in {"ours": sys.executable, **installed(peers, peer_python)}.items()
        ]
        llama = Llama.build(job.ckpt_dir, job.tokenizer_path, MAX_SEQ_LEN, batch, device="cpu", dtype=dtype)
        ways: dict[str, Callable[[], Round]] = {
            "kept full": lambda: kept_full(llama, requests),
            f"{N_THREADS} Python threads": lambda: in_threads(llama, requests),
        }
        for server in servers:
            asyncio.run(closed_loop(server, batch, texts[: 2 * batch]))  # warms up
            for n in counts:
                ways[f"{server.name}, {n} clients"] = _bound(server, n, texts)
        ways["kept full"]()
        rounds = measure(ways, repeats)
    longest = max(len(prompt) for prompt, _ in requests)
    print(f"{cpu_model()}, {shape}, {dtype}, {n_requests} requests, prompts of up to {longest} tokens")
    print(report(rounds, "kept full", "ours"))
    figures = {name: [[each.tokens, each.seconds] for each in measured] for name, measured in rounds.items()}
    print(json.dumps({"benchmark": "serving", "shape": shape, "rounds": figures}))


def _bound(server: RunningServer, n_clients: int, texts: Sequence[tuple[str, int]]) -> Callable[[], Round]:
    return lambda: asyncio.run(closed_loop(server, n_clients, texts))


if __name__ == "__main__":
    run(main)
