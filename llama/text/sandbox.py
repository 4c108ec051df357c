"""Renders Jinja templates of untrusted origin, as transformers renders chat templates, in bounded time and memory.

A template is a program. Jinja's sandbox keeps it from the interpreter; here it also has a budget, spent on each pass of
a loop, each call and filter, and on the size of each value. A budget of steps, unlike a timeout, gives the same result
on every rank.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from llama.errors import PromptError, missing_extra, printable

MAX_TEMPLATE_CHARS = 200_000
_MAX_STEPS = 500_000  # of one rendering: about a second
_MAX_SIZE = 2**22  # characters of a text, elements of a list
_MAX_PRODUCT = 2**26  # of the sizes and numbers that a function takes, which its result may be as large as
_MAX_BITS = 2**12  # of an integer
_CHARS_PER_STEP = 256

_steps_left: ContextVar[int] = ContextVar("steps_left", default=_MAX_STEPS)


class TemplateError(PromptError):
    """A template that cannot be used, or that refuses what it is to render."""


class Template:
    """A compiled template. May be rendered in several threads at a time.

    Args:
        source: the Jinja text.

    Raises:
        ImportError: jinja2 is not installed.
        TemplateError: the text is not a template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"a chat template must have at most {MAX_TEMPLATE_CHARS} characters, got {len(source)}")
        self._template = _bounded(lambda: _environment().from_string(source))

    def render(self, **variables: Any) -> str:
        """Renders the template; raises TemplateError if it fails, refuses, or takes too long."""
        text: str = _bounded(lambda: self._template.render(**variables))
        return text


def _bounded(work: Callable[[], Any]) -> Any:
    token = _steps_left.set(_MAX_STEPS)
    try:
        return work()
    except ImportError:
        raise
    except Exception as error:  # a template is a program: it may fail in any way
        reason = printable(error, 300) or type(error).__name__
        raise TemplateError(f"the chat template must take the messages, got its error: {reason}") from error
    finally:
        _steps_left.reset(token)


def _spend(*values: Any) -> None:
    """Takes one step, and more for large values, off the budget of this rendering."""
    steps = 1
    for value in values:
        if isinstance(value, (str, bytes, list, tuple, dict, range)):
            if len(value) > _MAX_SIZE:
                raise OverflowError(f"a value must have a size of at most {_MAX_SIZE}, got {len(value)}")
            steps += len(value) // _CHARS_PER_STEP if isinstance(value, (str, bytes)) else len(value)
    left = _steps_left.get() - steps
    if left < 0:
        raise TimeoutError(f"it took more than {_MAX_STEPS} steps")
    _steps_left.set(left)


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    """The elements that a loop passes over."""
    for value in values:
        _spend()
        yield value


def _concatenated(values: list[Any]) -> str:
    texts = [str(value) for value in values]
    _spend(*texts)
    return "".join(texts)


def _printed(value: Any) -> Any:
    _spend(value)
    return value


def _check_arguments(function: Any, arguments: Sequence[Any]) -> None:
    """Refuses arguments with which a function could make a huge value, such as a width, before it makes it."""
    receiver = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    values = [receiver, *arguments] if isinstance(receiver, str) else arguments
    _spend(*values)
    if math.prod(max(1, _size(value)) for value in values) > _MAX_PRODUCT:
        raise OverflowError(f"{getattr(function, '__name__', 'a function')} must be called with smaller values")
    if getattr(function, "__name__", "") in ("do_format", "format", "format_map"):
        _check_format(str(values[0]))


def _size(value: Any, depth: int = 2) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, (list, tuple, range)) and depth:
        return sum(_size(element, depth - 1) for element in value) + 1
    if isinstance(value, dict) and depth:
        return sum(_size(element, depth - 1) for element in value.values()) + 1
    return abs(value) if isinstance(value, int) else 1


def _check_format(text: str) -> None:
    if re.search(r"[0-9]{5}|\*|{[^}]*{", text):
        raise OverflowError(f"a format must have widths of at most 4 digits, got {printable(text)}")


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the mark by which Jinja passes a context
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(function, (*args, *kwargs.values()))
        result = function(*args, **kwargs)
        _spend(result)
        return result

    return call


def _binary(operator: str, left: Any, right: Any) -> None:
    """Refuses an operation whose result would be huge."""
    sizes = [len(x) if isinstance(x, (str, list, tuple)) else None for x in (left, right)]
    bits = [abs(x).bit_length() if isinstance(x, int) else 1 for x in (left, right)]
    if operator == "%" and isinstance(left, str):
        _check_format(left)
    elif operator == "**" and bits[0] * abs(right) > _MAX_BITS:
        raise OverflowError("a power must be small")
    elif operator == "*":
        factors = [x if size is None else size for x, size in zip((left, right), sizes, strict=True)]
        if sum(bits) > _MAX_BITS or (sizes != [None, None] and factors[0] * factors[1] > _MAX_SIZE):
            raise OverflowError("a product must be small")
    _spend(left, right)


def _raise_exception(message: Any) -> NoReturn:
    raise ValueError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> Any:
    """Jinja's sandbox with transformers' settings, functions and tags, and with the budget."""
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.visitor import NodeTransformer
    except ImportError as error:
        raise missing_extra("chat", error) from error

    class Budgeted(NodeTransformer):
        """Passes the values of loops and of the operator ~ through filters that count."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "__counted", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            values = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(values, "__concatenated", [], [], None, None, lineno=node.lineno)

    class Generation(Extension):
        """The tag that marks what an assistant said, for training: its body is rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "+", "%"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = super()._parse(source, name, filename)
            Budgeted().visit(tree)
            return tree.set_environment(self)

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            _check_arguments(function, (*args, *kwargs.values()))
            result = super().call(context, function, *args, **kwargs)
            _spend(result)
            return result

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _binary(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_printed, extensions=[Generation, loopcontrols]
    )
    filters: Mapping[str, Callable[..., Any]] = environment.filters | {"tojson": _tojson}
    environment.filters = {name: _bounded_filter(function) for name, function in filters.items()}
    environment.filters |= {"__counted": _counted, "__concatenated": _concatenated}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment
