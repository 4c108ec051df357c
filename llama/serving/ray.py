"""Ray Serve runs the server: replicas that are started again and scaled, on one machine or several.

`serve run llama.serving.ray:app ckpt_dir=/models/llama-2-13b-chat num_replicas=2`; docs/deploying.md has the rest.
Rank 0 of each replica is Ray Serve's own actor. The other ranks are actors in its placement group, which follow it.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fire.parser import DefaultParseValue

from llama import Llama
from llama.checkpoint.reading import find_tokenizer, list_shards
from llama.distributed import groups
from llama.distributed.device import select_device
from llama.errors import missing_extra, printable, quote
from llama.serving.service import Service
from llama.serving.settings import ServerSettings

try:
    import ray
    from ray import serve
    from ray.util import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

    from llama.serving.app import Server, make_app
except ImportError as error:
    raise missing_extra("ray", error) from error

_LAST_EVENTS_S = 0.1  # after a lost rank, in which its streams get their error
_MORE_REQUESTS = 100  # beyond those that the network has room for: it refuses them, where Ray would let them wait


def app(args: Mapping[str, Any]) -> serve.Application:
    """Make the application. Ray Serve calls this with the NAME=VALUE arguments of `serve run`, or `args` of its YAML.

    Args:
        args: `ckpt_dir`, the flags of `llama serve` but for its address, the optional arguments of `Llama.build`, and
            `num_replicas` (1), `num_cpus` (1) and `num_gpus` of each rank (1 if the cluster has any, else 0).

    Raises:
        ValueError: an argument is unknown, or its value is wrong.
    """
    flags = _read(args)
    settings = ServerSettings.taken_from(flags)
    n_gpus = flags.pop("num_gpus", None)
    if n_gpus is None:
        n_gpus = 1 if flags.get("device") != "cpu" and ray.cluster_resources().get("GPU") else 0
    each = {"num_cpus": flags.pop("num_cpus", 1), "num_gpus": n_gpus}
    size = flags.setdefault("model_parallel_size", len(list_shards(flags["ckpt_dir"])))
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="llama",
        num_replicas=flags.pop("num_replicas", 1),
        ray_actor_options=each,
        placement_group_bundles=[{"CPU": each["num_cpus"], "GPU": n_gpus}] * size,
        placement_group_strategy="STRICT_PACK",  # all ranks on one machine
        max_ongoing_requests=settings.max_batch_size + settings.max_waiting + _MORE_REQUESTS,
        graceful_shutdown_timeout_s=settings.grace_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        max_constructor_retry_count=3,
    )
    return deployment.bind(settings, flags, each)


def _read(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as values: texts are parsed as on the command line, unless the parameter is one."""
    parameters = [p for taker in (Llama.build, ServerSettings) for p in inspect.signature(taker).parameters.values()]
    known = {p.name: str(p.annotation) for p in parameters}
    known |= {"num_replicas": "int", "num_cpus": "float", "num_gpus": "float"}
    if unknown := [name for name in args if name not in known]:
        raise ValueError(f"the arguments must be among {', '.join(known)}, got {', '.join(map(quote, unknown))}")
    if not args.get("ckpt_dir"):
        raise ValueError("ckpt_dir must be given, a checkpoint's folder that exists on every machine")
    is_parsed = {name: isinstance(value, str) and "str" not in known[name] for name, value in args.items()}
    values = {name: DefaultParseValue(value) if is_parsed[name] else value for name, value in args.items()}
    return {"reuse_prefixes": True} | values


class Replica:
    """Rank 0 of one copy of the network, and the routes. What its loading raises leaves the constructor."""

    def __init__(self, settings: ServerSettings, flags: dict[str, Any], each: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group, ranks = get_current_placement_group(), range(1, flags["model_parallel_size"])
        places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in ranks]
        # Both lists are kept: Ray ends an actor, or drops its result, once nobody refers to it.
        self._followers = [ray.remote(Follower).options(**each, scheduling_strategy=place).remote() for place in places]
        rest = (port, settings, flags, each)
        self._results = [actor.follow.remote(rank, *rest) for rank, actor in zip(ranks, self._followers, strict=True)]
        _join(0, port, flags, each)
        self._server = Server.of(settings, flags["ckpt_dir"])
        llama, fingerprint = _load(settings, flags)
        self._service = Service(llama, max_waiting=settings.max_waiting)
        self._server.ready(self._service, fingerprint)
        self._worker = threading.Thread(target=_run, args=(self._server, self._service), name="llama", daemon=True)
        self._worker.start()

    def __serve_build_asgi_app__(self) -> Starlette:
        routes = make_app(self._server)
        routes.add_middleware(_HoldAfterFailure, server=self._server)
        return routes

    def check_health(self) -> None:
        """Raise an error if the network can no longer be used. Called by Ray Serve."""
        self._server.parts()

    async def __del__(self) -> None:
        """End the other ranks. Called by Ray Serve once all requests have ended, or after `grace_s`."""
        if hasattr(self, "_worker"):
            self._service.stop()
            await asyncio.to_thread(self._worker.join)


@dataclass(frozen=True)
class _HoldAfterFailure:
    """Holds requests that come once the network has failed. A replica that refused them at once would attract more."""

    app: ASGIApp
    server: Server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.server.failure is not None:  # before its clients are told so
            await asyncio.sleep(10 * _LAST_EVENTS_S)  # the process ends before
        await self.app(scope, receive, send)


class Follower:
    """Another rank of a replica, in another actor, which Ray ends with the replica."""

    def follow(
        self, rank: int, port: int, settings: ServerSettings, flags: dict[str, Any], each: dict[str, Any]
    ) -> None:
        _join(rank, port, flags, each)
        Service(_load(settings, flags)[0]).follow()


def _join(rank: int, port: int, flags: dict[str, Any], each: dict[str, Any]) -> None:
    """Set in this process what a launcher would set. A rank has one GPU at most, which is its first."""
    size = str(flags["model_parallel_size"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray's; the library would take it for torchrun's
    torch.set_num_threads(max(1, int(each["num_cpus"])))


def _load(settings: ServerSettings, flags: dict[str, Any]) -> tuple[Llama, str]:
    build = dict(flags)
    ckpt_dir = build.pop("ckpt_dir")
    tokenizer_path = str(build.pop("tokenizer_path", None) or find_tokenizer(ckpt_dir))
    if flags["model_parallel_size"] > 1:
        groups.init_process_groups(flags["model_parallel_size"], select_device(flags.get("device")))
    return settings.loader(ckpt_dir, tokenizer_path, build)()


def _run(server: Server, service: Service) -> None:
    """Serve until the service is stopped. If a rank is lost, end the process, so that Ray starts the replica again."""
    try:
        service.run()
    except BaseException as error:
        server.error = error
        print(f"stopped: {printable(error)}", file=sys.stderr, flush=True)
        time.sleep(_LAST_EVENTS_S)
        os._exit(1)
