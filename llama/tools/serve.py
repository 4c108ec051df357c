"""An OpenAI-compatible HTTP server: `llama serve --ckpt_dir ...`.

The first rank listens, the other ranks follow it. docs/serving.md has the API and the limits.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from llama import Llama
from llama.checkpoint.reading import list_shards
from llama.distributed import groups
from llama.distributed.device import select_device
from llama.errors import quote
from llama.serving.service import Service
from llama.serving.settings import ServerSettings, names_in
from llama.tools import commandline

with commandline.extra_imports(__name__, "serve"):
    import uvicorn

    from llama.serving.access import LOOPBACK_HOSTS
    from llama.serving.app import Server, make_app
    from llama.serving.connections import IDLE_S, Connection, raise_file_limit

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BACKLOG = 2048  # connections that wait to be accepted
_LAST_EVENTS_S = 3.0  # after the grace time, in which clients are told that the server ends


class FirstRank:
    """Runs HTTP in this thread and the network in a second one.

    Args:
        server: the state that the routes share.
        load: loads the network; called in the second thread.
    """

    def __init__(self, server: Server, load: Callable[[], tuple[Llama, str]]) -> None:
        self._server = server
        self._load = load
        self._grace_s = server.settings.grace_s
        Connection.limit = raise_file_limit()
        config = uvicorn.Config(
            make_app(server),
            http=Connection,
            timeout_keep_alive=round(IDLE_S),
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=round(self._grace_s + _LAST_EVENTS_S),
        )
        self._http = uvicorn.Server(config)
        self._http.capture_signals = nullcontext  # type: ignore[method-assign, assignment]  # see `_listen`

    def serve(self, listener: socket.socket) -> None:
        """Serves until a signal comes; raises the error that ended the network, if that came first."""
        worker = threading.Thread(target=self._work, name="llama", daemon=True)
        asyncio.run(self._listen(listener, worker))
        if not self._server.service and not self._server.error:  # nothing can interrupt the loading
            sys.stderr.flush()
            os._exit(128 + signal.SIGTERM)
        self._stop_service()
        worker.join()
        if self._server.error:
            raise self._server.error

    async def _listen(self, listener: socket.socket, worker: threading.Thread) -> None:
        loop, http = asyncio.get_running_loop(), self._http
        loop.set_exception_handler(Connection.troubles.handle)

        def leave_stuck() -> None:
            """Lets go of clients that do not read that the server ends, before uvicorn reports them as errors."""
            for connection in list(http.server_state.connections):
                connection.transport.abort()

        def end(number: int) -> None:
            if http.should_exit and number == signal.SIGINT:  # the second Ctrl-C
                self._stop_service()
                http.force_exit = True
            elif not http.should_exit:
                print("shutting down; running requests may finish", file=sys.stderr, flush=True)
                loop.call_later(self._grace_s, self._stop_service)
                loop.call_later(self._grace_s + _LAST_EVENTS_S / 2, leave_stuck)
                http.should_exit = True

        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, end, number)
        worker.start()
        await http.serve(sockets=[listener])

    def _stop_service(self) -> None:
        if self._server.service:
            self._server.service.stop()

    def _work(self) -> None:
        """The second thread: loads the network and serves on it."""
        try:
            llama, fingerprint = self._load()
            service = Service(llama, max_waiting=self._server.settings.max_waiting)
            self._server.ready(service, fingerprint)
            print("ready", file=sys.stderr, flush=True)
            service.run()
        except BaseException as error:
            self._server.error = error
        finally:
            self._http.should_exit = True


def _follow(load: Callable[[], tuple[Llama, str]]) -> None:
    """The part of the other ranks. Signals reach all ranks; the first rank decides when they end."""
    llama, _ = load()
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    Service(llama).follow()


def _open_port(host: str, port: int) -> socket.socket:
    """A socket that listens at an address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # without it, asyncio would not set TCP_NODELAY
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host and --port must be free to listen on, got {quote(host)} and {port}: {error}") from error
    return listener


def _check_ranks(ckpt_dir: str, model_parallel_size: int | None) -> None:
    """Raises ValueError if there would be several replicas of the network."""
    n_ranks = groups.world_size()
    size = model_parallel_size or len(list_shards(ckpt_dir))
    if size < n_ranks:
        raise ValueError(
            f"a server must have one process per checkpoint file, {size}, got {n_ranks} processes; for replicas, start "
            f"one server each, with torchrun --nproc_per_node {size} and a --port of its own"
        )


@partial(commandline.with_build_flags, reuse_prefixes=True, compile="background")
@partial(commandline.with_flags_of, ServerSettings)
def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    allowed_hosts: str = "",
    **flags: Any,
) -> None:
    """Serve OpenAI's API for completions and chats, and a chat page at /. SIGTERM or Ctrl-C ends it.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth; by default the toy one.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        host: address to listen on; 0.0.0.0 for all addresses of this machine.
        port: port to listen on; 0 for a free one, which is printed.
        allowed_hosts: names that the header Host may have, with commas between them. By default every name, but on a
            loopback address without a key only the names of this machine, so that web pages cannot use the server.
    """
    settings = ServerSettings.taken_from(flags)
    if type(port) is not int or not 0 <= port <= 65535:
        raise ValueError(f"--port must be a number from 0 to 65535, got {quote(port)}")
    ckpt_dir, tokenizer_path = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    server = Server.of(settings, ckpt_dir)
    _check_ranks(ckpt_dir, flags.get("model_parallel_size"))
    if groups.world_size() > 1:
        groups.init_process_groups(groups.world_size(), select_device(flags.get("device")))
    load = settings.loader(ckpt_dir, tokenizer_path, flags)
    if groups.world_size() > 1 and not groups.is_first_rank():
        return _follow(load)

    with _open_port(host, port) as listener:
        is_loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        is_open = not server.api_keys and not is_loopback
        if is_open:
            print("warning: everybody who can reach this address can use it; set LLAMA_API_KEY", file=sys.stderr)
        address = f"[{host}]" if ":" in host else host
        if allowed_hosts or not (server.api_keys or is_open):
            server.allowed_hosts = {*LOOPBACK_HOSTS, address, *names_in(allowed_hosts)}
        print(f"{server.model_name} at http://{address}:{listener.getsockname()[1]}, once it is loaded", flush=True)
        FirstRank(server, load).serve(listener)


if __name__ == "__main__":
    commandline.run(main, name="llama serve")
