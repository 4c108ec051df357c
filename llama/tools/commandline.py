"""Runs a function as a command: its arguments are flags (by fire); a user's mistake is one line on stderr."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import functools
import gc
import inspect
import io
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import fire
import torch
from fire import decorators, docstrings
from fire.core import FireExit

from llama.checkpoint.reading import find_tokenizer, list_shards, model_args
from llama.checkpoint.tokenizer_files import load_tokenizer
from llama.distributed import groups
from llama.errors import NonFiniteLogitsError, RankError, printable, quote
from llama.generation import Llama
from llama.inputs import SamplingParams, check_speculative
from llama.tokenizer import Tokenizer
from llama.tools.toy import toy_checkpoint

MISTAKES = (ValueError, AssertionError, MemoryError, OSError, ImportError, NonFiniteLogitsError)
Commands: TypeAlias = "Callable[..., Any] | dict[str, Callable[..., Any]]"
Function = TypeVar("Function", bound=Callable[..., Any])
INTERRUPTED = 130  # status that a shell reports for a program that Ctrl-C ended
_MAX_MESSAGE = 4000  # characters of an error that are printed
_COLON = "\ua789"  # MODIFIER LETTER COLON, for a colon that fire would take for the end of an argument's name
_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # SIGHUP: the terminal was closed


def with_flags_of(callee: Callable[..., Any], **defaults: Any) -> Callable[[Function], Function]:
    """Gives a command the optional arguments of `callee` as flags, by their names, defaults and documentation.

    The function gets those that are given as keywords, and passes them on. A flag of the function's own goes before
    the callee's of that name. The arguments have to be the last section of its docstring.

    Args:
        defaults: other defaults than the callee's, which the function then gets too.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        given = inspect.signature(callee).parameters.values()
        optional = [p for p in given if p.default is not p.empty and p.name not in signature.parameters]
        added = [p.replace(kind=p.KEYWORD_ONLY, default=defaults.get(p.name, p.default)) for p in optional]

        @functools.wraps(function)
        def with_defaults(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **(defaults | kwargs))

        flagged = cast(Function, with_defaults if defaults else function)
        flagged.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
        if flagged.__doc__ and callee.__doc__:  # not under python -OO
            parsed = docstrings.parse(_protect_colons(callee.__doc__)).args
            texts = {argument.name: argument.description.replace(_COLON, ":") for argument in parsed}
            lines = [f"        {p.name}: {texts[p.name]}" for p in added]
            flagged.__doc__ = "\n".join([flagged.__doc__.rstrip(), *lines, "    "])
        return flagged

    return decorate


def with_build_flags(function: Function, **defaults: Any) -> Function:
    """Gives a command the optional arguments of `Llama.build` as flags; see `with_flags_of`."""
    return with_flags_of(Llama.build, **defaults)(function)


def _protect_colons(doc: str) -> str:
    """Replace the colons in the continuation lines of arguments, at which fire ends a description."""
    lines = inspect.cleandoc(doc).splitlines()
    return "\n".join(line.replace(":", _COLON) if line.startswith(" " * 8) else line for line in lines)


def checkpoint_paths(ckpt_dir: str | None, tokenizer_path: str | None) -> tuple[str, str]:
    """The folder and the tokenizer that a command uses: by default the toy checkpoint's, and that of the folder."""
    folder = ckpt_dir or toy_checkpoint()
    return folder, tokenizer_path or str(find_tokenizer(folder))


def checked_sampling(build: Mapping[str, Any], **sampling: Any) -> dict[str, Any]:
    """Returns sampling parameters, after raising what a call would raise over them once the weights are loaded."""
    max_gen_len = sampling.get("max_gen_len")
    SamplingParams(**(sampling | {"max_gen_len": 1 if max_gen_len is None else max_gen_len}))
    check_speculative(sampling["speculative"], build)
    return sampling


def check_prompts(
    encode: Callable[[Tokenizer, int], object], ckpt_dir: str, tokenizer_path: str, max_seq_len: int
) -> None:
    """Calls `encode` with the tokenizer and `max_seq_len`, so that its errors come before the weights are loaded."""
    list_shards(ckpt_dir)  # the error of a wrong folder is not that its tokenizer is missing
    tokenizer = load_tokenizer(tokenizer_path, ckpt_dir)
    sizes = {"max_batch_size": 1, "max_seq_len": max_seq_len}
    encode(tokenizer, model_args(ckpt_dir, tokenizer.n_words, **sizes, tokenizer_path=tokenizer_path).max_seq_len)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that runs after fire has parsed the whole command line, so that a mistyped flag is an error before it."""

    run: Callable[[], Any]


def run(
    commands: Callable[..., Any] | dict[str, Callable[..., Any]],
    *,
    name: str | None = None,
    n_threads: int | None = None,
) -> None:
    """Run a function with the arguments of the command line.

    A text that it returns is printed; a number is the exit status. Ctrl-C, SIGTERM and SIGHUP raise an exception in it,
    so that it can clean up; under nohup, SIGHUP stays ignored. Characters that stdout cannot encode are escaped.

    Args:
        commands: the function, or several by name, of which the first argument of the command line chooses one.
        name: what the help calls the command; "": the name of the script.
        n_threads: number of threads of torch; None leaves it unchanged. Commands that copy files pass 1, since more
            threads slow the disk down.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    call = _parse(commands, name or Path(sys.argv[0]).name)
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    atexit.register(gc.freeze)  # else the interpreter searches all of torch for garbage at its end, for 0.4 s
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        result = call()
    except (*MISTAKES, RankError) as error:  # the rank that a RankError names reports its own error
        stop(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        groups.report_to_launcher(error)
        raise
    if isinstance(result, str):
        print(result)
    sys.exit(result if isinstance(result, int) else 0)


def stop(error: Exception, status: int = 1) -> NoReturn:
    """End the program with the error as one line: on stderr or, under torchrun, in torchrun's report."""
    error.__traceback__, error.__cause__, error.__suppress_context__ = None, None, True  # the report shows the message
    if not groups.report_to_launcher(error):
        message = printable("; ".join(str(error).splitlines()) or type(error).__name__, _MAX_MESSAGE)
        print(f"{'stopped' if isinstance(error, RankError) else 'error'}: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def extra_imports(module: str) -> Iterator[None]:
    """Context manager for a tool's imports that need an extra: if the tool is the program, a missing one ends it."""
    try:
        yield
    except ImportError as error:
        if module != "__main__":
            raise
        stop(error)


def _parse(commands: Commands, name: str) -> Callable[[], Any]:
    """Return the call that the command line asks for; print the help, or stop, if it does not ask for one."""
    decorators.FIRE_METADATA = "_fire_metadata"  # private: fire's help would list the attribute as a command
    functions = commands if isinstance(commands, dict) else {"": commands}
    deferred = {key: _deferred(function) for key, function in functions.items()}
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments) and "--" not in arguments:
        arguments = [*(arguments[:1] if arguments[0] in functions else []), "--", "--help"]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            call = fire.Fire(deferred if isinstance(commands, dict) else deferred[""], arguments, name, lambda _: None)
    except FireExit as exit:
        if exit.code == 0:
            print(_wrapped(shown.getvalue().replace(shlex.quote(name), name)))
            sys.exit(0)
        stop(ValueError(_explained(exit.trace.elements[-1].ErrorAsStr(), arguments, functions, name)), status=2)
    if not isinstance(call, _Call):
        stop(ValueError(f"one of {', '.join(functions)} must be given; {name} --help says what they do"), status=2)
    return call.run


def _explained(message: str, arguments: list[str], functions: dict[str, Callable[..., Any]], name: str) -> str:
    """Say what fire found wrong with the command line in the terms of its user."""
    function = functions.get(arguments[0] if arguments and arguments[0] in functions else "")
    what, _, value = message.partition(": ")
    hint = f"{name} --help lists the flags"
    if function is None:
        return f"one of {', '.join(functions)} must be given, got {quote(value)}{did_you_mean(value, functions)}"
    if "required argument" in what:
        return f"--{value} must be given; {hint}"
    if what != "Could not consume arg":
        return f"{message}; {hint}"
    flag = value.lstrip("-").partition("=")[0].replace("-", "_")
    if not value.startswith("-"):
        return f"flags must be written as --NAME VALUE, got {quote(value)}; {hint}"
    guess = did_you_mean(flag, inspect.signature(function).parameters, prefix="--")
    return f"there is no flag --{flag}{guess or f'; {hint}'}"


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" for the name that is nearest to a mistyped one, "" if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _wrapped(text: str) -> str:
    """Wrap fire's help, which has every description in one line, and give its colons back."""
    lines = []
    for line in text.rstrip().replace(_COLON, ":").splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(line, 110, subsequent_indent=indent, break_long_words=False) or [""]
    return "\n".join(lines)


def _deferred(function: Callable[..., Any]) -> Callable[..., _Call]:
    """A function with the same flags that returns the call. Parameters of type str get their text unchanged."""

    @functools.wraps(function)
    def defer(*args: Any, **kwargs: Any) -> _Call:
        given = signature.bind(*args, **kwargs).arguments  # fire passes some flags by position

        def call() -> Any:
            _check_values(given, texts)
            return function(*args, **kwargs)

        return _Call(call)

    if function.__doc__:  # not under python -OO
        defer.__doc__ = _protect_colons(function.__doc__)
    signature = inspect.signature(function)
    kinds = {name: str(p.annotation) for name, p in signature.parameters.items()}
    texts = [name for name, kind in kinds.items() if "str" in kind and "bool" not in kind]
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
