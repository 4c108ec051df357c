"""Runs a function as a command: its arguments are flags (by fire); a user's mistake is one line on stderr, status 1."""

from __future__ import annotations

import atexit
import functools
import gc
import inspect
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn, TypeVar

import fire
import torch
from fire import decorators, docstrings

from llama.checkpoint.reading import find_tokenizer
from llama.errors import RankError, printable, quote
from llama.generation import Llama
from llama.inputs import SPECULATIVE
from llama.tools.toy import toy_checkpoint

MISTAKES = (ValueError, AssertionError, MemoryError, OSError, ImportError)
Function = TypeVar("Function", bound=Callable[..., Any])
INTERRUPTED = 130  # status that a shell reports for a program that Ctrl-C ended
_MAX_MESSAGE = 4000  # characters of an error that are printed
_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # SIGHUP: the terminal was closed


def with_build_flags(function: Function) -> Function:
    """Gives a command `Llama.build`'s optional arguments as flags, by their names, defaults and documentation.

    The function gets those that are given as `**build`, and passes them on. A flag of the function's own goes before
    `build`'s of that name. The arguments have to be the last section of its docstring.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    of_build = inspect.signature(Llama.build).parameters.values()
    optional = [p for p in of_build if p.default is not p.empty and p.name not in signature.parameters]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in optional]
    function.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
    if function.__doc__ and Llama.build.__doc__:  # not under python -OO
        texts = {argument.name: argument.description for argument in docstrings.parse(Llama.build.__doc__).args}
        lines = [f"        {p.name}: {texts[p.name]}" for p in added]
        function.__doc__ = "\n".join([function.__doc__.rstrip(), *lines, "    "])
    return function


def checkpoint_paths(ckpt_dir: str | None, tokenizer_path: str | None) -> tuple[str, str]:
    """The folder and the tokenizer that a command uses: by default the toy checkpoint's, and that of the folder."""
    folder = ckpt_dir or toy_checkpoint()
    return folder, tokenizer_path or str(find_tokenizer(folder))


def check_speculative(speculative: str | None, build: Mapping[str, Any]) -> None:
    """Raises ValueError unless `--speculative` is a way to draft tokens, with `--draft_ckpt_dir` if it needs one."""
    if speculative not in (None, *SPECULATIVE):
        raise ValueError(f"--speculative must be {' or '.join(SPECULATIVE)}, got {quote(speculative)}")
    if (speculative == "draft") != (build.get("draft_ckpt_dir") is not None):
        got = "no --draft_ckpt_dir" if speculative == "draft" else f"--draft_ckpt_dir and --speculative {speculative}"
        raise ValueError(f"--speculative draft and --draft_ckpt_dir must be given together, got {got}")


class _Call:
    """A call that runs after fire has parsed the whole command line, so that a mistyped flag is an error before it."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run


def run(commands: Callable[..., Any] | dict[str, Callable[..., Any]], *, n_threads: int | None = None) -> None:
    """Runs a function with the arguments of the command line.

    A text that it returns is printed; a number is the exit status. Ctrl-C, SIGTERM and SIGHUP raise an exception in it,
    so that it can clean up; under nohup, SIGHUP stays ignored.

    Args:
        commands: the function, or several by name, of which the first argument of the command line chooses one.
        n_threads: number of threads of torch; None leaves it unchanged. Commands that copy files pass 1, since more
            threads slow the disk down.
    """
    decorators.FIRE_METADATA = "_fire_metadata"  # private: fire's help would list the attribute as a command
    if isinstance(commands, dict):
        component: Any = {name: _deferred(function) for name, function in commands.items()}
    else:
        component = _deferred(commands)
    call = fire.Fire(component, serialize=lambda result: None if isinstance(result, _Call) else result)
    if not isinstance(call, _Call):
        return
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    atexit.register(gc.freeze)  # else the interpreter searches all of torch for garbage at its end, for 0.4 s
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        result = call._run()
    except MISTAKES as error:
        message = "; ".join(str(error).splitlines()) or type(error).__name__
        sys.exit(f"error: {printable(message, _MAX_MESSAGE)}")
    except RankError as error:  # the rank that the message names prints its own error
        sys.exit(f"stopped: {printable(str(error), _MAX_MESSAGE)}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if isinstance(result, str):
        print(result)
    sys.exit(result if isinstance(result, int) else 0)


def _deferred(function: Callable[..., Any]) -> Callable[..., _Call]:
    """A function with the same flags that returns the call. Parameters of type str get their text unchanged."""

    @functools.wraps(function)
    def defer(*args: Any, **kwargs: Any) -> _Call:
        given = signature.bind(*args, **kwargs).arguments  # fire passes some flags by position

        def call() -> Any:
            _check_values(given, texts)
            return function(*args, **kwargs)

        return _Call(call)

    signature = inspect.signature(function)
    texts = [name for name, p in signature.parameters.items() if "str" in str(p.annotation)]
    deferred: Callable[..., _Call] = decorators.SetParseFns(**dict.fromkeys(texts, str))(defer)
    return deferred


def _check_values(given: dict[str, Any], texts: list[str]) -> None:
    """Raises ValueError for a flag that needs a text and was given none: fire passes "True" for it."""
    typed = [argument.rpartition("=")[2] for argument in sys.argv[1:]]
    for name in texts:
        if given.get(name) in ("True", "False") and given[name] not in typed:
            raise ValueError(f"--{name} must have a value, got none; write --{name} VALUE")


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    for number in _ENDING:  # a second signal must not interrupt the clean-up
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + signum)
