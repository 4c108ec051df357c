"""Replicas under Ray Serve, on a cluster of this machine's loopback: what clients see while replicas end and start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, TEXT
from tests.support.load import CLIENTS, Load
from tests.support.processes import free_port

pytest.importorskip("ray", reason="needs the extra [ray]")
import ray
from ray import serve

from llama.serving.ray import app

pytestmark = pytest.mark.faults
SLOW_S = 120.0  # on a machine whose cores are busy
FLAGS = {"device": "cpu", "dtype": "float32", "max_seq_len": "128", "max_batch_size": "4", "model_name": "llama"}


class Cluster:
    """Ray, with as many CPUs as replicas need, whatever this machine has.

    Attributes:
        url: address of Ray Serve.
        home: HOME of its processes, by which they are recognized.
    """

    def __init__(self, home: str) -> None:
        self.home = home
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        address = {"address": "local", "_temp_dir": f"{home}/ray", "_node_ip_address": "127.0.0.1"}
        ray.init(**address, num_cpus=8, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})

    def run(self, **flags: str) -> None:
        """Starts replicas, or replaces those that run, one after the other."""
        serve.run(app(FLAGS | flags), name="llama")

    def n_running(self) -> int:
        state = serve.status().applications["llama"]
        return sum(n for d in state.deployments.values() for name, n in d.replica_states.items() if name == "RUNNING")

    def pids(self, title: str) -> set[int]:
        """The processes of the cluster with this title."""
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"HOME={self.home}".encode() in (process / "environ").read_bytes().split(b"\0")
                if is_ours and title.encode() in (process / "cmdline").read_bytes():
                    found.add(int(process.name))
            except OSError:  # it has just ended
                continue
        return found

    def wait(self, holds: Callable[[], bool], seconds: float) -> float:
        """Waits until something holds; returns how many seconds that took."""
        start = time.monotonic()
        while not holds():
            assert time.monotonic() - start < seconds, serve.status()
            time.sleep(0.1)
        return time.monotonic() - start

    def metric(self, name: str, n_replicas: int) -> float:
        """The largest value of a metric that is seen in some answers, each of which is one replica's."""
        texts = [httpx.get(f"{self.url}/metrics").text for _ in range(4 * n_replicas)]
        lines = [line.split() for text in texts for line in text.splitlines()]
        return max(float(line[1]) for line in lines if line[0] == name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as home:
        patch.setenv("HOME", home)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        try:
            yield Cluster(home)
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(params=[1, 2], ids=["one process", "two ranks"])
def replicas(
    request: pytest.FixtureRequest, cluster: Cluster, checkpoint_in: Callable[[int], Path], tokenizer_path: Path
) -> Iterator[dict[str, str]]:
    """Two replicas of one rank or of two; yields the flags that they were started with."""
    flags = {"ckpt_dir": str(checkpoint_in(request.param)), "tokenizer_path": str(tokenizer_path), "num_replicas": "2"}
    cluster.run(**flags)
    yield flags
    serve.delete("llama")


def kill_one(cluster: Cluster, title: str) -> float:
    """Kills one of the two processes with this title; returns how many seconds its replica took to come back."""
    killed, other = sorted(cluster.pids(title))
    os.kill(killed, signal.SIGKILL)
    start = time.monotonic()
    cluster.wait(lambda: cluster.n_running() == 2 and len(cluster.pids(title) - {killed}) == 2, SLOW_S)
    assert other in cluster.pids(title), "the other replica was left alone"
    return time.monotonic() - start


def test_replicas_that_are_killed_come_back_and_updates_lose_nothing(
    cluster: Cluster, replicas: dict[str, str]
) -> None:
    n_ranks = len(list(Path(replicas["ckpt_dir"]).glob("*.pth")))
    ranks = ["ServeReplica:llama:llama", "Follower"][:n_ranks]
    for title in ranks:
        with Load(cluster.url) as load:
            load.wait_for(CLIENTS, SLOW_S)
            back_s = kill_one(cluster, title)
            load.wait_for(CLIENTS, SLOW_S)
        print(f"{title} killed: back after {back_s:.1f} s, {dict(load.ended)}")
        assert load.ended.total() - load.ended["answered"] <= CLIENTS, "at most what was open"
    with Load(cluster.url) as load:
        load.wait_for(CLIENTS, SLOW_S)
        cluster.run(**replicas, max_waiting="200")
        load.wait_for(CLIENTS, SLOW_S)
    print(f"updated: {dict(load.ended)}")
    assert set(load.ended) == {"answered"}


def test_a_client_that_leaves_frees_its_slot(cluster: Cluster, replicas: dict[str, str]) -> None:
    body = {"prompt": TEXT[0], "max_tokens": 120, "n": 4, "stream": True}
    for _ in range(4):
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_raw())
    cluster.wait(lambda: cluster.metric("llama_sequences_running", 2) == 0, 20)
    assert cluster.metric("llama_generated_tokens_total", 2) < 4 * 4 * 120 / 2


def test_replicas_follow_the_load(cluster: Cluster, checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """By a configuration file, which `serve run` reads: two replicas become three, then one."""
    scaling = {"initial_replicas": 2, "min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2}
    scaling |= {"upscale_delay_s": 1, "downscale_delay_s": 1, "metrics_interval_s": 0.5, "look_back_period_s": 1}
    application = {
        "name": "llama",
        "route_prefix": "/",
        "import_path": "llama.serving.ray:app",
        "args": FLAGS | {"ckpt_dir": str(checkpoint), "tokenizer_path": str(tokenizer_path)},
        "deployments": [{"name": "llama", "num_replicas": "auto", "autoscaling_config": scaling}],
    }
    config = tmp_path / "serve.yaml"
    config.write_text(json.dumps({"applications": [application]}))  # JSON is YAML
    serve_command = str(Path(sys.executable).with_name("serve"))
    address = ray.get_runtime_context().gcs_address
    subprocess.run([serve_command, "run", "--non-blocking", "--address", address, str(config)], cwd=ROOT, check=True)
    cluster.wait(lambda: "llama" in serve.status().applications and cluster.n_running() == 2, SLOW_S)
    with Load(cluster.url) as load:
        up_s = cluster.wait(lambda: cluster.n_running() == 3, SLOW_S)
        load.wait_for(CLIENTS, SLOW_S)
    down_s = cluster.wait(lambda: cluster.n_running() == 1, SLOW_S)
    print(f"three replicas after {up_s:.1f} s, one after {down_s:.1f} s, {dict(load.ended)}")
    assert set(load.ended) == {"answered"}
    serve.delete("llama")


def test_arguments_are_checked_before_anything_starts(cluster: Cluster, checkpoint: Path) -> None:
    good = {"ckpt_dir": str(checkpoint), "device": "cpu"}
    for wrong, message in (
        ({"max_batch_sise": "8"}, "the arguments must be among ckpt_dir, .*, got 'max_batch_sise'"),
        ({"ckpt_dir": ""}, "ckpt_dir must be given"),
        ({"timeout_s": "-1"}, "timeout_s must be a number above 0, got -1"),
        ({"unknown_fields": "keep"}, "unknown_fields must be refuse or ignore, got 'keep'"),
        ({"speculative": "draft"}, "must be given together, got no --draft_ckpt_dir"),
    ):
        with pytest.raises(ValueError, match=message):
            app(good | wrong)


def test_what_the_loading_raises_is_reported(cluster: Cluster, checkpoint: Path, tokenizer_path: Path) -> None:
    flags = {"ckpt_dir": str(checkpoint), "tokenizer_path": str(tokenizer_path), "max_seq_len": "-5"}
    with pytest.raises(RuntimeError, match="Deploying application llama failed"):
        cluster.run(**flags)
    reported = serve.status().applications["llama"].deployments["llama"].message
    assert "max_seq_len" in reported
    serve.delete("llama")
