"""The HTTP servers that serving.py measures: this library's and others', on the same random weights.

Every token of their vocabulary is one character, so that texts are counted in tokens, whichever server sends them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.job import Job
from benchmarks.rounds import ROOT, peer_pythons, prepare, say

START_S = 300.0


@dataclass(frozen=True)
class ServerSpec:
    """How a server is started.

    Attributes:
        command: the command line and the model's name, from an interpreter, the job, a port.
        engine: whose files it reads, one of `job.ENGINES`.
        imports: what its environment must have.
        install: what to give to pip for it.
    """

    command: Callable[[str, Job, int], tuple[list[str], str]]
    engine: str
    imports: str
    install: str


def _ours(python: str, job: Job, port: int) -> tuple[list[str], str]:
    command = [python, "-m", "llama.tools.serve", "--ckpt_dir", job.ckpt_dir, "--port", str(port)]
    command += ["--tokenizer_path", job.tokenizer_path, "--model_name", "model", "--dtype", job.dtype]
    return [*command, "--max_seq_len", str(job.max_seq_len), "--max_batch_size", str(job.max_batch_size)], "model"


def _llama_cpp(python: str, job: Job, port: int) -> tuple[list[str], str]:
    """It answers one request at a time; by default, a new request would end the one that runs."""
    gguf, threads = str(Path(job.folder) / f"model-{job.dtype}.gguf"), str(job.threads)
    command = [python, "-m", "llama_cpp.server", "--model", gguf, "--port", str(port), "--model_alias", "model"]
    command += ["--n_ctx", str(job.max_seq_len), "--n_threads", threads, "--n_threads_batch", threads]
    return [*command, "--interrupt_requests", "false", "--verbose", "false"], "model"


def _hf(python: str, job: Job, port: int) -> tuple[list[str], str]:
    folder = str(job.hf_folder)
    command = [str(Path(python).parent / "transformers"), "serve", folder, "--port", str(port), "--device", "cpu"]
    return [*command, "--dtype", job.dtype], folder


def _hf_batching(python: str, job: Job, port: int) -> tuple[list[str], str]:
    command, model = _hf(python, job, port)
    return [*command, "--continuous-batching"], model


SERVERS = {
    "ours": ServerSpec(_ours, "ours", "fastapi", "llama[serve]"),
    "llama_cpp": ServerSpec(_llama_cpp, "llama_cpp", "llama_cpp.server", "llama-cpp-python[server] gguf"),
    "hf": ServerSpec(_hf, "hf", "transformers, fastapi", "transformers[serving]"),
    "hf_batching": ServerSpec(_hf_batching, "hf", "transformers, fastapi", "transformers[serving]"),
}


def installed(peers: str | Sequence[str], peer_python: str | Sequence[str]) -> dict[str, str]:
    """The peers that can run here, and their interpreters; prints what the others lack."""
    found = {}
    for name, python in peer_pythons(peers, peer_python, SERVERS).items():
        imports, install = SERVERS[name].imports, SERVERS[name].install
        if subprocess.run([python, "-c", f"import {imports}"], capture_output=True, check=False).returncode:
            say(f"{name}: left out, {python} has no {imports}; pip install -c constraints.txt '{install}'")
        else:
            found[name] = python
    return found


class RunningServer:
    """A server that answers. `with` ends it.

    Attributes:
        name: the engine's.
        url: its address, without /v1.
        model: the model's name there.
    """

    def __init__(self, name: str, python: str, job: Job) -> None:
        job_file = Path(job.folder) / "job.json"
        job.write(job_file)
        prepare(SERVERS[name].engine, python, job, job_file)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        command, self.model = SERVERS[name].command(python, job, port)
        self._log = Path(job.folder) / f"{name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)

    def __enter__(self) -> RunningServer:
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"{self.name} does not answer: {self._log.read_text()[-1000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        body = {"model": self.model, "prompt": chr(0x20000), "max_tokens": 1}
        try:
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False
