"""Many requests at a time: over HTTP, by clients in closed loops, and in one process.

    python benchmarks/serving.py --peers llama_cpp,hf
    python benchmarks/serving.py --clients 0
    python benchmarks/serving.py --prefixes

Requests have prompts and outputs of log-normal lengths and are greedy, on random weights whose tokens are one character
each. In each round the servers and numbers of clients take turns, and with them the same requests without HTTP: in one
call, which keeps the batch full; in calls of as many prompts as there are rows, where a row that ends leaves the batch,
or stays until the longest one is through, as in the published code; and in one call per request from 8 Python threads.
`--prefixes` measures the next turn of a chat, and requests with one system prompt, with and without prefix reuse.
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import httpx
import torch

from benchmarks.networks import make_job, write_hf_folder
from benchmarks.peers import gguf_file, greedy_steps
from benchmarks.report import cpu_model, in_turn, spread
from benchmarks.worker import ROOT, Job, environment, left_out_if_it_fails, numbers, peer_pythons, prepare, say
from llama import Llama, Tokenizer
from llama.distributed.device import available_cores
from llama.tools.commandline import run

MAX_SEQ_LEN = 512
PROMPT_MEDIAN, LONGEST = 32, 255  # tokens of a prompt; of a prompt or an output
LONGEST_S, START_S = 600.0, 300.0
N_THREADS = 8  # of Python
REFERENCE = "kept full"
TURNS, CHAT_TOKENS, ANSWER_TOKENS = 5, 1000, 100  # of the chat: turns, tokens of it all and of each answer
SYSTEM_TOKENS, SHARING_CLIENTS = 500, 16

Requests = list[tuple[list[int], int]]  # prompts, and how many tokens to generate


@dataclass
class Round:
    """What one round of one way to answer the requests measured.

    Attributes:
        seconds: from the first request to the last answer.
        tokens: that were generated.
        first: seconds to the first token of each request over HTTP.
        per_token: seconds between the tokens after it, the mean of each request that had several.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def _ids(draw: random.Random, n: int, vocab_size: int) -> list[int]:
    return [draw.randrange(3, vocab_size) for _ in range(n)]


def random_requests(n: int, output_median: int, vocab_size: int) -> Requests:
    """Most are short, a few many times longer, as real ones are."""
    draw = random.Random(0)

    def length(median: int) -> int:
        return min(LONGEST, max(1, round(draw.lognormvariate(math.log(median), 1.0))))

    return [(_ids(draw, length(PROMPT_MEDIAN), vocab_size), length(output_median)) for _ in range(n)]


def in_calls(llama: Llama, requests: Requests, size: int, *, rows_stay: bool = False) -> Round:
    """All requests, in calls of that many.

    Args:
        rows_stay: whether all rows of a call go on until its longest one is through.
    """
    started = time.perf_counter()
    for start in range(0, len(requests), size):
        prompts, targets = zip(*requests[start : start + size], strict=True)
        wanted = [max(targets)] * len(targets) if rows_stay else targets
        assert sum(1 for _ in greedy_steps(llama, prompts, wanted)) == sum(wanted)
    return Round(time.perf_counter() - started, sum(n_tokens for _, n_tokens in requests))


def in_threads(llama: Llama, requests: Requests) -> Round:
    """All requests, one call each, by `N_THREADS` Python threads of one process."""

    def answer(request: tuple[list[int], int]) -> int:
        return len(llama.generate([request[0]], request[1], temperature=0)[0][0])

    started = time.perf_counter()
    with ThreadPoolExecutor(N_THREADS) as pool:
        tokens = sum(pool.map(answer, requests))
    return Round(time.perf_counter() - started, tokens)


def closed_loop(url: str, model: str, n_clients: int, requests: Sequence[tuple[str, int]]) -> Round:
    """All requests, by clients that each send the next one when the last one is answered. A character is a token."""
    results = Round()

    def ask(web: httpx.Client, prompt: str, max_tokens: int) -> None:
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
        with lock:
            results.tokens += n_tokens
            if n_tokens:
                results.first.append(times[1] - times[0])
            if n_tokens > 1:
                results.per_token.append((times[-1] - times[1]) / (n_tokens - 1))

    lock, started = threading.Lock(), time.perf_counter()
    with httpx.Client(base_url=url, timeout=LONGEST_S, trust_env=False) as web, ThreadPoolExecutor(n_clients) as pool:
        list(pool.map(lambda request: ask(web, *request), requests))
    results.seconds = time.perf_counter() - started
    return results


def _ours(python: str, job: Job) -> list[str]:
    command = [python, "-m", "llama.tools.serve", "--ckpt_dir", job.ckpt_dir, "--dtype", job.dtype]
    command += ["--tokenizer_path", job.tokenizer_path, "--model_name", "model"]
    return [*command, "--max_seq_len", str(MAX_SEQ_LEN), "--max_batch_size", str(max(job.decode_batches))]


def _llama_cpp(python: str, job: Job) -> list[str]:
    """It answers one request at a time; by default, a new request would end the one that runs."""
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf_file(job)), "--model_alias", "model"]
    command += ["--n_ctx", str(MAX_SEQ_LEN), "--interrupt_requests", "false", "--verbose", "false"]
    return [*command, "--n_threads", str(job.threads), "--n_threads_batch", str(job.threads)]


def _hf(python: str, job: Job) -> list[str]:
    command = [str(Path(python).parent / "transformers"), "serve", str(job.hf_folder)]
    return [*command, "--device", "cpu", "--dtype", job.dtype]


def _hf_batching(python: str, job: Job) -> list[str]:
    return [*_hf(python, job), "--continuous-batching"]


# By name: the command line but for the port, the engine of `peers.ENGINES` whose files the server reads, and what to
# give to pip for it.
SERVERS = {
    "ours": (_ours, "ours", "'llama-reference[serve]'"),
    "llama_cpp": (_llama_cpp, "llama_cpp", "'llama-cpp-python[server]' gguf"),
    "hf": (_hf, "hf", "'transformers[serving]'"),
    "hf_batching": (_hf_batching, "hf", "'transformers[serving]'"),
}


@contextmanager
def running(name: str, python: str, job: Job) -> Iterator[tuple[str, str]]:
    """The URL of a server that answers, and the model's name there."""
    command_of, engine, _ = SERVERS[name]
    if name != "ours":
        write_hf_folder(job)
    prepare(engine, python, job)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, model = f"http://127.0.0.1:{port}", str(job.hf_folder) if engine == "hf" else "model"
    command = [*command_of(python, job), "--port", str(port)]
    path = Path(job.folder) / f"{name}.log"
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
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str, model: str) -> bool:
    body = {"model": model, "prompt": chr(0x20000), "max_tokens": 1}
    try:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def measure(ways: dict[str, Callable[[], Round]], repeats: int) -> dict[str, list[Round]]:
    """The rounds of each way of answering the requests, all in turn, each time with another one first."""
    rounds: dict[str, list[Round]] = {name: [] for name in ways}
    for i in range(repeats):
        for name in in_turn(list(ways), i):
            rounds[name].append(ways[name]())
            say(f"round {i + 1}/{repeats}  {name}: {rounds[name][-1].rate:.1f} tok/s")
    return rounds


def report(rounds: dict[str, list[Round]]) -> str:
    """A line per way: the median over the rounds of its rate, over all requests of the times; ratios within rounds."""
    lines = [f"{'':24}    tok/s              first token, p95        per token, p95   of {REFERENCE}"]
    for name, measured in rounds.items():
        line = f"{name:24} {spread([each.rate for each in measured], 1)}".ljust(52)
        line += _times([t for each in measured for t in each.first], 0)
        line += _times([t for each in measured for t in each.per_token], 1)
        lines.append(f"{line}   {_ratios(measured, rounds[REFERENCE])}")
    for name, measured in rounds.items():
        server, _, clients = name.partition(", ")
        if clients.endswith("clients") and server != "ours":
            lines.append(f"ours is {_ratios(rounds[f'ours, {clients}'], measured)} times as fast as {name}")
    return "\n".join(lines)


def _times(seconds: list[float], digits: int) -> str:
    if not seconds:
        return " " * 20
    late = sorted(seconds)[min(len(seconds) - 1, round(0.95 * (len(seconds) - 1)))]
    return f"{1000 * statistics.median(seconds):9.{digits}f} {1000 * late:7.{digits}f} ms"


def _ratios(ours: Sequence[Round], theirs: Sequence[Round]) -> str:
    return spread([a.rate / b.rate for a, b in zip(ours, theirs, strict=True)])


def last_turn(llama: Llama, draw: random.Random) -> float:
    """Seconds from the last question of a chat to its first token."""
    history: list[int] = []
    for _ in range(TURNS - 1):
        history += _ids(draw, CHAT_TOKENS // TURNS - ANSWER_TOKENS, llama.model.vocab_size)
        history += llama.generate([history], ANSWER_TOKENS, 0.0, ignore_eos=True)[0][0]
    history += _ids(draw, CHAT_TOKENS // TURNS - ANSWER_TOKENS, llama.model.vocab_size)
    started = time.perf_counter()
    llama.generate([history], 1, 0.0)
    return time.perf_counter() - started


def with_one_system_prompt(llama: Llama, draw: random.Random) -> float:
    """Seconds for requests from many threads whose prompts begin alike."""
    system = _ids(draw, SYSTEM_TOKENS, llama.model.vocab_size)
    prompts = [system + _ids(draw, 20, llama.model.vocab_size) for _ in range(SHARING_CLIENTS)]
    started = time.perf_counter()
    with ThreadPoolExecutor(SHARING_CLIENTS) as pool:
        list(pool.map(lambda prompt: llama.generate([prompt], 16, 0.0, ignore_eos=True), prompts))
    return time.perf_counter() - started


def compare_prefixes(job: Job, batch: int, repeats: int) -> None:
    """Prints both with prefix reuse and without, in turn, after a round that warms up."""
    reusing, plain = (
        Llama.build(job.ckpt_dir, job.tokenizer_path, 1200, batch, device="cpu", dtype=job.dtype, reuse_prefixes=reuse)
        for reuse in (True, False)
    )
    works = {
        f"first token of turn {TURNS} of a chat of {CHAT_TOKENS} tokens": last_turn,
        f"{SHARING_CLIENTS} requests, {SYSTEM_TOKENS} tokens in common": with_one_system_prompt,
    }
    for name, work in works.items():
        seeds = range(repeats + 1)
        pairs = [(work(reusing, random.Random(seed)), work(plain, random.Random(seed))) for seed in seeds][1:]
        reused, fresh = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = spread([b / a for a, b in pairs])
        print(f"{name}: {reused:.3f} s, {fresh:.3f} s without reuse, {ratios} times as fast", flush=True)


def main(
    shape: str = "200m",
    *,
    n_requests: int = 64,
    clients: Sequence[int] = (1, 4, 8, 16),
    batch: int = 8,
    output_median: int = 32,
    repeats: int = 3,
    threads: int | None = None,
    peers: str | Sequence[str] = "",
    peer_python: str | Sequence[str] = "",
    prefixes: bool = False,
) -> None:
    """Prints for each way to answer the requests tokens per second, time to the first token and per token.

    Args:
        shape: tiny, 110m, 200m, 1b, 7b or 13b, of random weights, in bfloat16.
        clients: numbers of clients; 0 leaves HTTP out.
        batch: `max_batch_size` of this library.
        threads: of every server; None for as many as there are cores.
        peers: of llama_cpp (llama-cpp-python's server), hf (`transformers serve`) and hf_batching (with its continuous
            batching), those to run in turn with it; those that are not installed are left out.
        peer_python: NAME=PYTHON,...: the interpreters of peers that live in environments of their own.
        prefixes: measures prefix reuse in place of all that.
    """
    pythons = {"ours": sys.executable, **peer_pythons(peers, peer_python, SERVERS)}
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    print(f"{cpu_model()}, {shape}, max_batch_size {batch}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        job = make_job(shape, Path(folder), threads=threads, decode_batches=(batch,))
        if prefixes:
            compare_prefixes(job, batch, repeats)
            return
        requests = random_requests(n_requests, output_median, job.vocab_size)
        llama = Llama.build(job.ckpt_dir, job.tokenizer_path, MAX_SEQ_LEN, batch, device="cpu", dtype=job.dtype)
        ways: dict[str, Callable[[], Round]] = {
            REFERENCE: lambda: in_calls(llama, requests, len(requests)),
            f"calls of {batch}": lambda: in_calls(llama, requests, batch),
            f"calls of {batch}, rows stay": lambda: in_calls(llama, requests, batch, rows_stay=True),
            f"{N_THREADS} Python threads": lambda: in_threads(llama, requests),
        }
        ways[REFERENCE]()  # warms up
        if counts := [n for n in numbers(clients) if n]:
            ways |= _over_http(stack, job, counts, requests, pythons)
        rounds = measure(ways, repeats)
    print(f"{n_requests} requests\n{report(rounds)}")
    figures = {name: [[each.tokens, each.seconds] for each in measured] for name, measured in rounds.items()}
    print(json.dumps({"benchmark": "serving", "shape": shape, "rounds": figures}))


def _over_http(
    stack: ExitStack, job: Job, counts: Sequence[int], requests: Requests, pythons: dict[str, str]
) -> dict[str, Callable[[], Round]]:
    """The ways over HTTP: each server that can run here, with each number of clients."""
    tokenizer = Tokenizer(job.tokenizer_path)
    texts = [(tokenizer.decode(prompt), n_tokens) for prompt, n_tokens in requests]
    ways: dict[str, Callable[[], Round]] = {}
    for name, python in list(pythons.items()):
        with left_out_if_it_fails(name, SERVERS[name][-1], pythons):
            url, model = stack.enter_context(running(name, python, job))
            closed_loop(url, model, max(counts), texts[: 2 * max(counts)])  # warms up
            for n in counts:
                ways[f"{name}, {n} clients"] = partial(closed_loop, url, model, n, texts)
    return ways


if __name__ == "__main__":
    run(main)
