"""Renders Jinja templates of untrusted origin, as transformers renders chat templates, in bounded time and memory.

A template is a program. Jinja's sandbox keeps it from the interpreter; here it also has a budget of steps: one for each
pass of a loop and each value that is made, several for a large one. No value is made that could be huge. A budget of
steps, unlike a timeout, gives the same result on every rank. To import this module needs the extra [chat].
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, MappingView, Sequence
from contextvars import ContextVar
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

from llama.errors import PromptError, missing_extra, printable

try:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer
except ImportError as error:
    raise missing_extra("chat", error) from error

MAX_TEMPLATE_CHARS = 200_000
_MAX_STEPS = 500_000  # of one rendering: about a second
_MAX_SIZE = 2**22  # of a value, in characters
_MAX_RESULT = 2**26  # what a function may make of its arguments
_MAX_EXPONENT = 64
_ELEMENT = 16  # characters that an element of a list counts as
_SIZE_PER_STEP = 256
_UNMEASURED = ("length", "count")  # which templates take of all messages, at each of them
_CONTAINERS = (list, tuple, dict, set, frozenset, range, MappingView)

_steps_left: ContextVar[int] = ContextVar("steps_left", default=_MAX_STEPS)


class TemplateError(PromptError):
    """A template that cannot be used, or that refuses what it is to render."""


class Template:
    """A compiled template. May be rendered in several threads at a time.

    Args:
        source: the Jinja text.

    Raises:
        TemplateError: the text is not a template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"a chat template must have at most {MAX_TEMPLATE_CHARS} characters, got {len(source)}")
        self._template = _within_budget(lambda: _environment().from_string(source))

    def render(self, **variables: Any) -> str:
        """Renders the template; raises TemplateError if it fails, refuses, or takes too long."""
        text: str = _within_budget(lambda: self._template.render(**variables))
        return text


def _within_budget(work: Callable[[], Any]) -> Any:
    token = _steps_left.set(_MAX_STEPS)
    try:
        return work()
    except Exception as error:  # a template is a program: it may fail in any way
        reason = printable(error, 300) or type(error).__name__
        raise TemplateError(f"the chat template must take the messages, got its error: {reason}") from error
    finally:
        _steps_left.reset(token)


def _spend(size: int = 0) -> None:
    left = _steps_left.get() - 1 - size // _SIZE_PER_STEP
    if left < 0:
        raise TimeoutError(f"it took more than {_MAX_STEPS} steps")
    _steps_left.set(left)


def _size(value: Any) -> int:
    """The characters in a text, or in all that a container holds, as often as it holds it."""
    size, held = 0, [(value, 1)]
    while held:
        value, depth = held.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, _CONTAINERS):
            size += len(value) * depth * _ELEMENT  # JSON indents an element by its depth
            if size <= _MAX_SIZE and not isinstance(value, range):
                elements: Any = chain.from_iterable(value.items()) if isinstance(value, dict) else value
                held += [(element, depth + 1) for element in elements]
        if size > _MAX_SIZE:
            raise OverflowError(f"a value must have a size of at most {_MAX_SIZE}, got more")
    return size


def _measured(value: Any) -> Any:
    _spend(_size(value))
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    """The elements that a loop passes over."""
    for value in values:
        _spend()
        yield value


def _check_arguments(name: str, values: Sequence[Any]) -> None:
    """Refuses arguments of which a function could make a huge value, such as a width, before it makes it."""
    sizes = [_size(value) for value in values]
    _spend(sum(sizes))
    if name in ("do_format", "format", "format_map", "%") and isinstance(values[0], (str, bytes)):
        form = str(values[0])
        if re.search(r"\*|{[^}]*{", form):
            raise OverflowError(f"a format must have its widths in its text, got {printable(form)}")
        sizes[0] += sum(map(int, re.findall(r"\d+", form)))
    else:
        sizes = [abs(x) if isinstance(x, int) else size for x, size in zip(values, sizes, strict=True)]
    *others, largest = sorted(sizes) or [0]
    if largest * max(1, sum(others)) > _MAX_RESULT:
        raise OverflowError(f"{name} must be called with smaller values")


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its arguments checked and its result measured."""

    @functools.wraps(function)  # keeps the mark by which Jinja passes a context
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(function.__name__, (*args, *kwargs.values()))
        return _measured(function(*args, **kwargs))

    return call


class _Budgeted(NodeTransformer):
    """Passes what loops, literals, slices and comparisons take through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "__counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "__measured")
        return node

    def visit_Getitem(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        is_assigned = getattr(node, "ctx", "load") == "store"
        return node if is_assigned else _filtered(node, "__measured")

    visit_List = visit_Tuple = visit_Dict = visit_Getitem


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """The tag that marks what an assistant said, for training: its body is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may hold it


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Budgeted().visit(tree)
        return tree.set_environment(self)  # type: ignore[return-value]

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        receiver = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        _check_arguments(getattr(function, "__name__", "a function"), (receiver, *args, *kwargs.values()))
        if isinstance(function, LoopContext):  # a recursive loop over its argument
            args = tuple(map(_counted, args))
        return _measured(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > _MAX_EXPONENT:
            raise OverflowError(f"an exponent must be at most {_MAX_EXPONENT}, got more")
        if operator != "+" and not (operator == "%" and isinstance(left, int)):
            _check_arguments(operator, (left, right))
        return _measured(super().call_binop(context, operator, left, right))


def _raise_exception(message: Any) -> NoReturn:
    raise ValueError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> _Environment:
    """Jinja's sandbox with transformers' settings, functions and tags, and with the budget."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_measured,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    tables: list[dict[str, Any]] = [environment.filters, environment.tests]
    for functions in tables:
        functions |= {name: _checked(function) for name, function in functions.items() if name not in _UNMEASURED}
    environment.filters |= {"__counted": _counted, "__measured": _measured}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "namespace": _Namespace}
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
