"""Many requests at a time: over HTTP, by clients in closed loops, and in one process.

    python benchmarks/serving.py --peers llama_cpp,hf
    python benchmarks/serving.py --clients 0

Requests have prompts and outputs of log-normal lengths and are greedy, on random weights whose tokens are one character
each. In each round the servers and numbers of clients take turns, and with them the same requests without HTTP: in one
call, which keeps the batch full; in calls of as many prompts as there are rows, where a row that ends leaves the batch,
or stays until the longest one is through, as in the published code; and in one call per request from 8 Python threads.
"""

from __future__ import annotations

import json
import math
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import httpx
import torch

from benchmarks.networks import make_job, write_hf_folder
from benchmarks.peers import gguf_file, greedy_steps
from benchmarks.report import Line, Round, cpu_model, engine_lines, in_turn, page
from benchmarks.worker import ROOT, Figures, Job, environment, left_out_if_it_fails, numbers, prepare, pythons_of, say
from llama import Llama, Tokenizer
from llama.distributed.device import available_cores
from llama.tools.commandline import run

MAX_SEQ_LEN = 1024
PROMPT_MEDIAN, LONGEST = 32, 255  # tokens of a prompt; of a prompt or an output
LONGEST_S, START_S = 600.0, 300.0
N_THREADS = 8  # of Python
REFERENCE = "kept full"

Requests = list[tuple[list[int], int]]  # prompts, and how many tokens to generate


def figures_of(tokens: int, seconds: float, **times: Sequence[float]) -> Figures:
    """How many tokens were generated and at what rate, and the median and the 95th percentile of some times."""
    figures = {"tokens": tokens, "rate": tokens / seconds}
    for name, values in times.items():
        if values:
            figures[name] = statistics.median(values)
            figures[f"{name}_p95"] = sorted(values)[round(0.95 * (len(values) - 1))]
    return figures


def random_requests(n: int, output_median: int, vocab_size: int, common: int = 0) -> Requests:
    """Most are short, a few many times longer, as real ones are; all begin with the same `common` tokens."""
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(n)]

    def length(median: int) -> int:
        return min(LONGEST, max(1, round(draw.lognormvariate(math.log(median), 1.0))))

    prefix = ids(common)
    return [(prefix + ids(length(PROMPT_MEDIAN)), length(output_median)) for _ in range(n)]


def in_calls(llama: Llama, requests: Requests, size: int, *, rows_stay: bool = False) -> Figures:
    """All requests, in calls of that many, whose rows may stay until the longest one is through."""
    started = time.perf_counter()
    for start in range(0, len(requests), size):
        prompts, targets = zip(*requests[start : start + size], strict=True)
        wanted = [max(targets)] * len(targets) if rows_stay else targets
        assert sum(1 for _ in greedy_steps(llama, prompts, wanted)) == sum(wanted)
    return figures_of(sum(n_tokens for _, n_tokens in requests), time.perf_counter() - started)


def in_threads(llama: Llama, requests: Requests) -> Figures:
    """All requests, one call each, by `N_THREADS` Python threads of one process."""
    started = time.perf_counter()
    with ThreadPoolExecutor(N_THREADS) as pool:
        answers = list(pool.map(lambda r: llama.generate([r[0]], r[1], temperature=0)[0][0], requests))
    return figures_of(sum(map(len, answers)), time.perf_counter() - started)


def closed_loop(url: str, model: str, n_clients: int, requests: Sequence[tuple[str, int]]) -> Figures:
    """All requests, by clients that each send the next one when the last one is answered. A character is a token."""

    def ask(prompt: str, max_tokens: int) -> tuple[int, list[float]]:
        """The number of tokens of an answer, and the times of the request and of each piece of text."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        n_tokens, times = 0, [time.perf_counter()]
        with web.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"the server answered {answer.status_code}: {answer.read()[:200]!r}")
            for line in answer.iter_lines():
                choices = json.loads(line[6:]).get("choices") if line.startswith("data: {") else None
                if choices and choices[0].get("text"):
                    times.append(time.perf_counter())
                    n_tokens += len(choices[0]["text"])
        return n_tokens, times

    started = time.perf_counter()
    with httpx.Client(base_url=url, timeout=LONGEST_S, trust_env=False) as web, ThreadPoolExecutor(n_clients) as pool:
        answers = list(pool.map(ask, *zip(*requests, strict=True)))
    seconds = time.perf_counter() - started
    first_token = [times[1] - times[0] for n, times in answers if n]
    between_tokens = [(times[-1] - times[1]) / (n - 1) for n, times in answers if n > 1]
    return figures_of(sum(n for n, _ in answers), seconds, first_token=first_token, between_tokens=between_tokens)


SERVERS = {  # by name: what to give to pip
    "ours": "'llama-reference[serve]'",
    "llama_cpp": "'llama-cpp-python[server]' gguf",
    "hf": "'transformers[serving]'",
    "hf_batching": "'transformers[serving]'",
}


def _command(name: str, python: str, job: Job) -> list[str]:
    """The command line of a server but for its port."""
    threads, n_rows = str(job.threads), str(max(job.decode_batches))
    if name == "ours":
        command = [python, "-m", "llama.tools.serve", "--ckpt_dir", job.ckpt_dir, "--dtype", job.dtype]
        command += ["--tokenizer_path", job.tokenizer_path, "--model_name", "model"]
        return [*command, "--max_seq_len", str(MAX_SEQ_LEN), "--max_batch_size", n_rows, "--device", job.device]
    if name == "llama_cpp":  # it answers one request at a time; by default, a new one would end the one that runs
        command = [python, "-m", "llama_cpp.server", "--model", str(gguf_file(job)), "--model_alias", "model"]
        command += ["--n_ctx", str(MAX_SEQ_LEN), "--interrupt_requests", "false", "--verbose", "false"]
        return [*command, "--n_threads", threads, "--n_threads_batch", threads]
    command = [str(Path(python).parent / "transformers"), "serve", str(job.hf_folder)]
    command += ["--device", job.device, "--dtype", job.dtype]
    return [*command, *["--continuous-batching"] * (name == "hf_batching")]


@contextmanager
def running(name: str, python: str, job: Job) -> Iterator[tuple[str, str]]:
    """The URL of a server that answers, and the model's name there."""
    engine = name.removesuffix("_batching")  # of `peers.ENGINES`, whose files the server reads
    if name != "ours":
        write_hf_folder(job)
    prepare(engine, python, job)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, model = f"http://127.0.0.1:{port}", str(job.hf_folder) if engine == "hf" else "model"
    command = [*_command(name, python, job), "--port", str(port)]
    path = Path(job.folder) / f"{name}_server.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment(job))
    try:
        deadline = time.monotonic() + START_S
        while not _answers(url, model):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not answer: {path.read_text()[-1000:]}")
            time.sleep(0.2)
        yield url, model
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _answers(url: str, model: str) -> bool:
    body = {"model": model, "prompt": chr(0x20000), "max_tokens": 1}
    try:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def busy(n: int) -> Iterator[None]:
    """That many processes that do nothing but use a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(ways: dict[str, Callable[[], Figures]], repeats: int) -> list[Round]:
    """The figures of each way of answering the requests, all in turn, each time with another one first."""
    rounds: list[Round] = []
    for i in range(repeats):
        rounds.append({})
        for name in in_turn(list(ways), i):
            rounds[-1][name] = ways[name]()
            say(f"round {i + 1}/{repeats}  {name}: {rounds[-1][name]['rate']:.1f} tok/s")
    return rounds


def rate_ratios(rounds: Sequence[Round], names: Sequence[str]) -> list[Line]:
    """Of each way to the reference, and of ours to each server with as many clients."""
    pairs = [(name, REFERENCE) for name in names if name != REFERENCE]
    servers = [(name.partition(", "), name) for name in names if name.endswith("clients")]
    pairs += [(f"ours, {clients}", name) for (server, _, clients), name in servers if server != "ours"]
    return [Line("rate", f"{a} / {b}", "x", [r[a]["rate"] / r[b]["rate"] for r in rounds]) for a, b in pairs]


def main(
    shape: str = "200m",
    *,
    n_requests: int = 64,
    clients: Sequence[int] = (1, 4, 8, 16),
    batch: int = 8,
    output_median: int = 32,
    repeats: int = 3,
    threads: int | None = None,
    peers: str = "",
    device: str = "cpu",
    common: int = 0,
    busy_loops: int = 0,
) -> None:
    """Prints for each way to answer the requests tokens per second, time to the first token and per token.

    Args:
        shape: tiny, 110m, 200m, 1b, 7b or 13b, of random weights, in bfloat16.
        clients: numbers of clients; 0 leaves HTTP out.
        batch: `max_batch_size` of this library.
        threads: of every server; None for as many as there are cores.
        peers: NAME or NAME=PYTHON,...: what runs in turn with this library, if it is installed, with its interpreter:
            llama_cpp (llama-cpp-python's server), hf (`transformers serve`), hf_batching (its continuous batching).
        device: "cpu" or "cuda"; llama_cpp stays on the CPU.
        common: number of tokens that all prompts begin with, up to 512; if above 0, prefix reuse is measured too.
        busy_loops: number of other programs that keep cores busy meanwhile.
    """
    pythons = {"ours": sys.executable, **pythons_of(peers, SERVERS)}
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    print(f"{cpu_model()}, {device}, {shape}, max_batch_size {batch}, {busy_loops} busy loops")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        job = make_job(shape, Path(folder), device=device, threads=threads, decode_batches=(batch,))
        requests = random_requests(n_requests, output_median, job.vocab_size, common)
        sizes = (job.ckpt_dir, job.tokenizer_path, MAX_SEQ_LEN, batch)
        llama = Llama.build(*sizes, device=device, dtype=job.dtype)
        ways: dict[str, Callable[[], Figures]] = {
            REFERENCE: lambda: in_calls(llama, requests, len(requests)),
            f"calls of {batch}": lambda: in_calls(llama, requests, batch),
            f"calls of {batch}, rows stay": lambda: in_calls(llama, requests, batch, rows_stay=True),
            f"{N_THREADS} Python threads": lambda: in_threads(llama, requests),
        }
        if common:
            reusing = Llama.build(*sizes, device=device, dtype=job.dtype, reuse_prefixes=True)
            ways["prefixes reused"] = lambda: in_calls(reusing, requests, len(requests))
            ways["prefixes reused"]()  # warms up, as the next line does
        ways[REFERENCE]()
        stack.enter_context(busy(busy_loops))
        if counts := [n for n in numbers(clients) if n]:
            ways |= _over_http(stack, job, counts, requests, pythons)
        rounds = measure(ways, repeats)
    print(f"{n_requests} requests\n{page(engine_lines(rounds), rate_ratios(rounds, list(ways)))}")
    print(json.dumps({"benchmark": "serving", "shape": shape, "device": device, "rounds": rounds}))


def _over_http(
    stack: ExitStack, job: Job, counts: Sequence[int], requests: Requests, pythons: dict[str, str]
) -> dict[str, Callable[[], Figures]]:
    """The ways over HTTP: each server that can run here, with each number of clients."""
    tokenizer = Tokenizer(job.tokenizer_path)
    texts = [(tokenizer.decode(prompt), n_tokens) for prompt, n_tokens in requests]
    ways: dict[str, Callable[[], Figures]] = {}
    for name, python in list(pythons.items()):
        with left_out_if_it_fails(name, SERVERS[name], pythons):
            url, model = stack.enter_context(running(name, python, job))
            closed_loop(url, model, max(counts), texts[: 2 * max(counts)])  # warms up
            for n in counts:
                ways[f"{name}, {n} clients"] = partial(closed_loop, url, model, n, texts)
    return ways


if __name__ == "__main__":
    run(main)
