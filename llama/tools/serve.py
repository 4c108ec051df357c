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
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama import Llama, Tokenizer
from llama.checkpoint.loading import choose_quantize
from llama.checkpoint.memory import available_memory, largest, plan_memory
from llama.checkpoint.reading import list_shards, model_args
from llama.checkpoint.releases import trained_seq_len
from llama.distributed import groups
from llama.distributed.device import processes_on, select_device, select_dtype
from llama.errors import missing_extra, quote
from llama.serving.service import Service
from llama.tools import commandline

with commandline.extra_imports(__name__):
    from llama.tools.batch import fingerprint

if TYPE_CHECKING:
    from llama.serving.app import Server

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_BACKLOG = 2048  # connections that wait to be accepted
_LAST_EVENTS_S = 3.0  # after the grace time, in which clients are told that the server ends
_USED_MEMORY = 0.9  # of what is available, where the context is chosen by it


class FirstRank:
    """Runs HTTP in this thread and the network in a second one.

    Args:
        server: the state that the routes share.
        build: loads the network; called in the second thread.
        max_waiting: as in `Service`.
        grace_s: time to finish requests after a signal.
    """

    def __init__(self, server: Server, build: Callable[[], Llama], *, max_waiting: int, grace_s: float) -> None:
        self._server = server
        self._build = build
        self._max_waiting = max_waiting
        self._grace_s = grace_s
        self._worker = threading.Thread(target=self._work, name="llama", daemon=True)
        self._service: Service | None = None
        self._error: BaseException | None = None
        self._has_ended = threading.Event()
        self._end_http: Callable[[], None] = lambda: None

    def serve(self, listener: socket.socket) -> None:
        """Serves until a signal comes; raises the error that ended the network, if that came first."""
        asyncio.run(self._listen(listener))
        if not self._service and not self._error:  # nothing can interrupt the loading
            sys.stderr.flush()
            os._exit(128 + signal.SIGTERM)
        if self._service:
            self._service.stop()
        self._worker.join()
        if self._error:
            raise self._error

    async def _listen(self, listener: socket.socket) -> None:
        import uvicorn

        from llama.serving.app import make_app
        from llama.serving.connections import IDLE_S, Connection, raise_file_limit

        Connection.limit = raise_file_limit()
        config = uvicorn.Config(
            make_app(self._server),
            http=Connection,
            timeout_keep_alive=round(IDLE_S),
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=round(self._grace_s + _LAST_EVENTS_S),
        )
        http = uvicorn.Server(config)
        http.capture_signals = nullcontext  # type: ignore[method-assign, assignment]  # see below
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(Connection.troubles.handle)

        def end_http() -> None:
            http.should_exit = True

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

        self._end_http = lambda: _call_soon(loop, end_http)
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, end, number)
        self._worker.start()
        await http.serve(sockets=[listener])

    def _stop_service(self) -> None:
        if self._service:
            self._service.stop()

    def _work(self) -> None:
        """The second thread: loads the network and serves on it."""
        try:
            service = Service(self._build(), max_waiting=self._max_waiting)
            self._server.ready(service)
            self._service = service
            print("ready", file=sys.stderr, flush=True)
            service.run()
        except BaseException as error:
            self._error = error
            self._server.failed(error)
        finally:
            self._end_http()


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has been closed
        loop.call_soon_threadsafe(function)


def _follow(build: Callable[[], Llama]) -> None:
    """The part of the other ranks. Signals reach all ranks; the first rank decides when they end."""
    llama = build()
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


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


@partial(commandline.with_build_flags, reuse_prefixes=True)
def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_seq_len: int | None = None,
    max_batch_size: int = 8,
    model_name: str | None = None,
    api_key: str | None = None,
    api_key_file: str | None = None,
    max_waiting: int = 256,
    max_body_bytes: int | None = None,
    timeout_s: float = 600,
    grace_s: float = 20,
    allowed_hosts: str = "",
    allowed_origins: str = "",
    unknown_fields: str = "refuse",
    log_requests: bool = False,
    log_format: str = "text",
    speculative: str | None = None,
    **build: Any,
) -> None:
    """Serve OpenAI's API for completions and chats, and a chat page at /. SIGTERM or Ctrl-C ends it.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth; by default the toy one.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        host: address to listen on; 0.0.0.0 for all addresses of this machine.
        port: port to listen on; 0 for a free one, which is printed.
        max_seq_len: maximum number of tokens of a prompt and its completion; by default what the checkpoint was trained
            for, 4096 for Llama 2 and 16384 for Code Llama, or less where the memory is too small for that.
        max_batch_size: maximum number of completions that are generated at a time.
        model_name: name of the network in requests; by default that of ckpt_dir.
        api_key: key that clients must send; by default that of the environment variable LLAMA_API_KEY, which other
            users of this machine cannot see, else none.
        api_key_file: file of further keys, one per line.
        max_waiting: maximum number of completions that wait for a slot; further ones are refused.
        max_body_bytes: maximum size of a request; by default what max_seq_len and max_batch_size need, at least 1 MiB.
        timeout_s: maximum time of a request in seconds, waiting included.
        grace_s: time in seconds to finish requests after SIGTERM or Ctrl-C.
        allowed_hosts: names that the header Host may have, with commas between them. By default every name, but on a
            loopback address without a key only localhost, 127.0.0.1 and [::1], so that web pages cannot use the server.
        allowed_origins: origins of web pages that may use the server, such as http://localhost:3000, with commas
            between them; * for all. By default its own chat page alone.
        unknown_fields: refuse requests with fields that nobody knows, or ignore these fields.
        log_requests: write a line per request to stderr.
        log_format: text, or json for lines of JSON.
        speculative: prompt_lookup, or draft with draft_ckpt_dir, has tokens drafted and verified several at a time: the
            same text, often in less time.
    """
    try:
        from llama.serving.access import LOOPBACK_HOSTS
        from llama.serving.app import Server
    except ImportError as error:
        raise missing_extra("serve", error) from error
    _check_limits(max_waiting=max_waiting, timeout_s=timeout_s, grace_s=grace_s)
    if max_body_bytes is not None:
        _check_limits(max_body_bytes=max_body_bytes)
    _check_choice("unknown_fields", unknown_fields, ("refuse", "ignore"))
    _check_choice("log_format", log_format, ("text", "json"))
    if type(port) is not int or not 0 <= port <= 65535:
        raise ValueError(f"--port must be a number from 0 to 65535, got {quote(port)}")
    keys = _api_keys(api_key, api_key_file)
    commandline.check_speculative(speculative, build)
    ckpt_dir, tokenizer_path = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    _check_ranks(ckpt_dir, build.get("model_parallel_size"))
    if groups.world_size() > 1:
        groups.init_process_groups(groups.world_size(), select_device(build.get("device")))
    if max_seq_len is None:
        max_seq_len = _choose_context(ckpt_dir, tokenizer_path, max_batch_size, build)
    load = partial(Llama.build, ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, **build)
    if groups.world_size() > 1 and not groups.is_first_rank():
        return _follow(load)
    name = model_name or Path(ckpt_dir).resolve().name
    server = Server(
        name,
        api_keys=keys,
        max_body_bytes=max_body_bytes,
        timeout_s=timeout_s,
        speculative=speculative,
        allowed_origins=_names(allowed_origins),
        ignore_unknown=unknown_fields == "ignore",
        log=log_format if log_requests else None,
    )

    def build_first() -> Llama:
        llama = load()
        server.fingerprint = fingerprint(llama, tokenizer_path, build.get("seed", 1), build.get("quantize"))
        return llama

    with _open_port(host, port) as listener:
        is_open = not keys and not _is_loopback(listener)
        if is_open:
            print("warning: everybody who can reach this address can use it; set LLAMA_API_KEY", file=sys.stderr)
        address = f"[{host}]" if ":" in host else host
        if allowed_hosts or not (keys or is_open):
            server.allowed_hosts = {*LOOPBACK_HOSTS, address, *_names(allowed_hosts)}
        print(f"{name} at http://{address}:{listener.getsockname()[1]}, once it is loaded", flush=True)
        FirstRank(server, build_first, max_waiting=max_waiting, grace_s=grace_s).serve(listener)


def _choose_context(ckpt_dir: str, tokenizer_path: str, max_batch_size: int, build: dict[str, Any]) -> int:
    """The positions that the checkpoint was trained for, or as many as the memory has room for. Equal on all ranks."""
    size = build.get("model_parallel_size") or len(list_shards(ckpt_dir))
    device = select_device(build.get("device"))
    dtype = select_dtype(build.get("dtype"), device)
    n_words = Tokenizer(tokenizer_path).n_words
    folders = [ckpt_dir, *([build["draft_ckpt_dir"]] if build.get("draft_ckpt_dir") else [])]
    networks = [
        (
            model_args(folder, n_words, max_batch_size=max_batch_size, max_seq_len=1),
            choose_quantize(build.get("quantize"), folder, device),
        )
        for folder in folders
    ]
    trained = min(trained_seq_len(args) for args, _ in networks)
    memory = int(_USED_MEMORY * available_memory(device) / processes_on(device))

    def fits(n: int) -> bool:
        plans = [plan_memory(replace(args, max_seq_len=n), size, dtype, quantize=form) for args, form in networks]
        return sum(plan.total for plan in plans) <= memory

    chosen = largest(trained, fits) or trained  # if nothing fits, `build` says so
    if groups.world_size() > 1:
        chosen = groups.broadcast_object(chosen)
    if groups.is_first_rank():
        why = "for which the checkpoint was trained" if chosen == trained else f"of {trained}: the memory has no room"
        print(f"--max_seq_len {chosen}, {why}", file=sys.stderr, flush=True)
    return chosen


def _api_keys(api_key: str | None, api_key_file: str | None) -> list[str]:
    """The keys that clients may have.

    Raises:
        ValueError: one has characters that no header can carry, such as a newline at its end.
    """
    keys = [("LLAMA_API_KEY", os.environ.get("LLAMA_API_KEY", "")) if api_key is None else ("--api_key", api_key)]
    if api_key_file is not None:
        lines = Path(api_key_file).read_text(encoding="utf-8").splitlines()
        keys += [(f"--api_key_file, line {number},", line.strip()) for number, line in enumerate(lines, start=1)]
        if not any(key for _, key in keys[1:]):
            raise ValueError(f"--api_key_file must have a key per line, got {api_key_file}, which has none")
    for where, key in keys:
        if key != key.strip() or not key.isprintable():
            raise ValueError(
                f"{where} must have no spaces, newlines or control characters at its ends or in it, got a key of "
                f"{len(key)} characters that has some"
            )
    return [key for _, key in keys if key]


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"--{name} must be {' or '.join(choices)}, got {quote(value)}")


def _check_limits(**limits: Any) -> None:
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ValueError(f"--{name} must be a number above 0, got {quote(value)}")


def command() -> None:
    commandline.run(main, name="llama serve")


if __name__ == "__main__":
    command()
