"""Runs a function as a command: its arguments are flags (by fire); a user's mistake is one line on stderr."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import functools
import gc
import inspect
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import fire
import torch
from fire import decorators
from fire.core import FireExit

from llama.checkpoint.reading import find_tokenizer, list_shards, model_args
from llama.distributed import groups
from llama.distributed.device import check_threads
from llama.errors import NonFiniteLogitsError, RankError, missing_extra, printable, quote
from llama.generation import Llama
from llama.inputs import SamplingParams, check_speculative
from llama.text.tokenizer_json import load_tokenizer
from llama.tokenizer import Tokenizer

MISTAKES = (ValueError, AssertionError, MemoryError, OSError, ImportError, NonFiniteLogitsError)
Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")
_MAX_MESSAGE = 4000  # characters of an error that are printed
_TOY_PLACES = (Path(__file__).parents[1], Path(__file__).parents[2])  # the package of a wheel, the root of a clone
_ENDING = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed


def with_flags_of(callee: Callable[..., Any], function: Function, **defaults: Any) -> Function:
    """Gives a command the optional arguments of `callee` as flags, by their names, defaults and documentation.

    The function gets those that are given as keywords, and passes them on. A flag of the function's own goes before
    the callee's of that name. Its docstring ends with the arguments.

    Args:
        defaults: other defaults than the callee's, which the function then gets too.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    given = inspect.signature(callee).parameters.values()
    optional = [p for p in given if p.default is not p.empty and p.name not in signature.parameters]
    added = [p.replace(kind=p.KEYWORD_ONLY, default=defaults.get(p.name, p.default)) for p in optional]

    @functools.wraps(function)
    def with_defaults(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **(defaults | kwargs))

    texts = _documented(callee)
    if function.__doc__ and texts:  # not under python -OO
        lines = [f"    {p.name}: {texts[p.name]}" for p in added]
        # Python 3.13 takes the indentation off every docstring, earlier versions none
        with_defaults.__doc__ = "\n".join([inspect.cleandoc(function.__doc__), *lines])
    with_defaults.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
    return cast(Function, with_defaults)


with_build_flags = functools.partial(with_flags_of, Llama.build)


def _limit_threads(threads: int | None = None) -> None:
    """Set the number of torch's threads, which stays.

    Args:
        threads: number of CPU threads; None: torch's choice.
    """
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def _with_threads(function: Callable[..., Any], default: int | None) -> Callable[..., Any]:
    """Give a command the flag `--threads`, unless it has one."""
    if "threads" in inspect.signature(function).parameters:
        return function

    @functools.wraps(function)
    def limited(*args: Any, threads: int | None, **kwargs: Any) -> Any:
        _limit_threads(threads)
        return function(*args, **kwargs)

    return with_flags_of(_limit_threads, limited, threads=default)


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    """The text of each argument in a docstring."""
    section = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {argument[1]: " ".join(argument[2].split()) for argument in found}


def toy_checkpoint() -> str:
    """The folder of the toy checkpoint, `tiny-llama`, in the installed package or at the root of the repository."""
    for place in _TOY_PLACES:
        if (place / "tiny-llama" / "params.json").is_file():
            return str(place / "tiny-llama")
    raise FileNotFoundError(
        f"--ckpt_dir must be given: the toy checkpoint, its default, is neither in {_TOY_PLACES[0]} nor in "
        f"{_TOY_PLACES[1]}; pass the folder that holds params.json and consolidated.00.pth"
    )


def checkpoint_paths(ckpt_dir: str | None, tokenizer_path: str | None) -> tuple[str, str]:
    """The folder and the tokenizer that a command uses: by default the toy checkpoint, and the folder's tokenizer."""
    folder = ckpt_dir or toy_checkpoint()
    return folder, tokenizer_path or str(find_tokenizer(folder))


def checked_sampling(build: Mapping[str, Any], **sampling: Any) -> dict[str, Any]:
    """Returns sampling parameters, after raising what a call would raise over them once the weights are loaded."""
    max_gen_len = sampling.get("max_gen_len")
    SamplingParams(**(sampling | {"max_gen_len": 1 if max_gen_len is None else max_gen_len}))
    check_speculative(sampling["speculative"], build)
    return sampling


def check_prompts(
    encode: Callable[[Tokenizer, int], Result], ckpt_dir: str, tokenizer_path: str, max_seq_len: int
) -> Result:
    """Returns what `encode` makes of the tokenizer and `max_seq_len`; its errors come before the weights are loaded."""
    list_shards(ckpt_dir)  # the error of a wrong folder is not that its tokenizer is missing
    tokenizer = load_tokenizer(tokenizer_path, ckpt_dir)
    sizes = {"max_batch_size": 1, "max_seq_len": max_seq_len}
    args = model_args(ckpt_dir, tokenizer.n_words, **sizes, tokenizer_path=tokenizer_path)
    return encode(tokenizer, args.max_seq_len)


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
        name: what the help calls the command; None: the name of the script.
        n_threads: the default of `--threads`, which commands get that do not have it; None leaves the number unchanged.
            Commands that copy files pass 1, since more threads slow the disk down.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    functions = commands if isinstance(commands, dict) else {"": commands}
    functions = {key: _with_threads(function, n_threads) for key, function in functions.items()}
    call = _parse(functions, name or Path(sys.argv[0]).name)
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    atexit.register(gc.freeze)  # else the interpreter searches all of torch for garbage at its end, for 0.4 s
    try:
        result = call()
    except (*MISTAKES, RankError) as error:  # the rank that a RankError names reports its own error
        stop(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # as a shell reports a program that Ctrl-C ended
    except Exception as error:
        groups.report_to_launcher(error)
        raise
    if isinstance(result, str):
        print(result)
    sys.exit(result if isinstance(result, int) else 0)


def stop(error: Exception, status: int = 1) -> NoReturn:
    """End the program with the error as one line: on stderr or, under torchrun, in torchrun's report."""
    error.__cause__, error.__suppress_context__ = None, True
    try:
        raise error.with_traceback(None)  # Python 3.10 keeps a traceback apart from the exception that is handled
    except type(error):
        error.__traceback__ = None  # the report shows the message
        is_reported = groups.report_to_launcher(error)
    if not is_reported:
        message = printable("; ".join(str(error).splitlines()) or type(error).__name__, _MAX_MESSAGE)
        print(f"{'stopped' if isinstance(error, RankError) else 'error'}: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def extra_imports(module: str, extra: str) -> Iterator[None]:
    """Context manager for a tool's imports of an extra: if it is missing, and the tool is the program, this ends it."""
    try:
        yield
    except ImportError as error:
        missing = missing_extra(extra, error)
        if module != "__main__":
            raise missing from error
        stop(missing)


def _parse(functions: dict[str, Callable[..., Any]], name: str) -> Callable[[], Any]:
    """Return the call that the command line asks for; print the help, or stop, if it does not ask for one."""
    arguments = sys.argv[1:]
    chosen = "" if "" in functions else next(iter(arguments), "")
    if {"-h", "--help"} & set(arguments):
        try:
            print(_help({chosen: functions[chosen]} if chosen in functions else functions, name), flush=True)
        except BrokenPipeError:  # the reader has seen enough, such as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails too
        sys.exit(0)
    if chosen not in functions:
        got = f", got {quote(chosen)}{did_you_mean(chosen, functions)}" if chosen else f"; see {name} --help"
        stop(ValueError(f"one of {', '.join(functions)} must be given{got}"), status=2)
    function = functions[chosen]
    signature = inspect.signature(function)
    kinds = {parameter: str(p.annotation) for parameter, p in signature.parameters.items()}
    texts = [parameter for parameter, kind in kinds.items() if "str" in kind and "bool" not in kind]
    calls: list[inspect.BoundArguments] = []

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> None:  # runs before fire has parsed all flags: some may be mistyped
        calls.append(signature.bind(*args, **kwargs))

    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            takes_texts = decorators.SetParseFns(**dict.fromkeys(texts, str))  # as they are
            fire.Fire(takes_texts(record), arguments[bool(chosen) :], serialize=lambda _: None)
    except FireExit as exit:
        if exit.code == 0:  # a flag of fire's own, such as `-- --trace`
            print(shown.getvalue())
            sys.exit(0)
        stop(ValueError(_explained(exit.trace.elements[-1].ErrorAsStr(), function, name)), status=2)
    typed = [argument.rpartition("=")[2] for argument in arguments]
    for text in texts:  # fire passes "True" for a flag without a value
        if (given := calls[0].arguments.get(text)) in ("True", "False") and given not in typed:
            stop(ValueError(f"--{text} must have a value, got none; write --{text} VALUE"))
    return functools.partial(function, *calls[0].args, **calls[0].kwargs)


def _help(functions: dict[str, Callable[..., Any]], name: str) -> str:
    """How a command is used: its purpose and its flags; of several, the purpose of each."""
    purposes = {key: inspect.cleandoc(of.__doc__ or "").partition("\n\nArgs:")[0] for key, of in functions.items()}
    if len(functions) > 1:
        lines = [f"  {key:<12}{next(iter(purpose.splitlines()), '')}" for key, purpose in purposes.items()]
        return "\n".join([f"usage: {name} {'|'.join(functions)} [FLAGS]", "", *lines])
    ((chosen, function),) = functions.items()
    parameters = inspect.signature(function).parameters.values()
    needed = [f"--{p.name} VALUE" for p in parameters if p.default is p.empty]
    lines = ["usage: " + " ".join(filter(None, [name, chosen, *needed, "[FLAGS]"])), "", purposes[chosen], ""]
    texts = _documented(function)
    for p in parameters:
        kind = str(p.annotation)
        value = " VALUE" if "bool" not in kind else "" if kind == "bool" else " [VALUE]"
        default = "" if p.default in (p.empty, None, "") or p.default is False else f" (default: {p.default})"
        default = f" (default; --no{p.name} turns it off)" if p.default is True else default
        indent = " " * 6
        text = textwrap.fill(texts.get(p.name, ""), 110, initial_indent=indent, subsequent_indent=indent)
        lines += [f"  --{p.name}{value}{default}", text]
    return "\n".join(lines)


def _explained(message: str, function: Callable[..., Any], name: str) -> str:
    """Say what fire found wrong with the command line in the terms of its user."""
    what, _, value = message.partition(": ")
    hint = f"{name} --help lists the flags"
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


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    for number in _ENDING:  # a second signal must not interrupt the clean-up
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + signum)
