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
from benchmarks.report import Line, Round, cpu_model, engine_lines, in_turn, page, spread
from benchmarks.worker import (
    ROOT,
    Figures,
    Job,
    environment,
    left_out_if_it_fails,
    numbers,
    peer_pythons,
    prepare,
    say,
)
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


def figures_of(tokens: int, seconds: float, **times: Sequence[float]) -> Figures:
    """How many tokens were generated and at what rate, and the median and the 95th percentile of some times."""
    figures = {"tokens": tokens, "rate": tokens / seconds}
    for name, values in times.items():
        if values:
            figures[name] = statistics.median(values)
            figures[f"{name}_p95"] = sorted(values)[round(0.95 * (len(values) - 1))]
    return figures


def _ids(draw: random.Random, n: int, vocab_size: int) -> list[int]:
    return [draw.randrange(3, vocab_size) for _ in range(n)]


def random_requests(n: int, output_median: int, vocab_size: int) -> Requests:
    """Most are short, a few many times longer, as real ones are."""
    draw = random.Random(0)

    def length(median: int) -> int:
        return min(LONGEST, max(1, round(draw.lognormvariate(math.log(median), 1.0))))

    return [(_ids(draw, length(PROMPT_MEDIAN), vocab_size), length(output_median)) for _ in range(n)]


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
        return [*command, "--max_seq_len", str(MAX_SEQ_LEN), "--max_batch_size", n_rows]
    if name == "llama_cpp":  # it answers one request at a time; by default, a new one would end the one that runs
        command = [python, "-m", "llama_cpp.server", "--model", str(gguf_file(job)), "--model_alias", "model"]
        command += ["--n_ctx", str(MAX_SEQ_LEN), "--interrupt_requests", "false", "--verbose", "false"]
        return [*command, "--n_threads", threads, "--n_threads_batch", threads]
    command = [str(Path(python).parent / "transformers"), "serve", str(job.hf_folder)]
    return [*command, "--device", "cpu", "--dtype", job.dtype, *["--continuous-batching"] * (name == "hf_batching")]


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
    peers: str = "",
    peer_python: str = "",
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
        ways: dict[str, Callable[[], Figures]] = {
            REFERENCE: lambda: in_calls(llama, requests, len(requests)),
            f"calls of {batch}": lambda: in_calls(llama, requests, batch),
            f"calls of {batch}, rows stay": lambda: in_calls(llama, requests, batch, rows_stay=True),
            f"{N_THREADS} Python threads": lambda: in_threads(llama, requests),
        }
        ways[REFERENCE]()  # warms up
        if counts := [n for n in numbers(clients) if n]:
            ways |= _over_http(stack, job, counts, requests, pythons)
        rounds = measure(ways, repeats)
    print(f"{n_requests} requests\n{page(engine_lines(rounds), rate_ratios(rounds, list(ways)))}")
    print(json.dumps({"benchmark": "serving", "shape": shape, "rounds": rounds}))


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
