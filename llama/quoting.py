"""Values in error messages: one line of printable characters, of bounded length.

What a message quotes can come from a file or a request that someone else made. A tensor may be named by a terminal's
escape sequence, a key of `params.json` may have a gigabyte.
"""

from __future__ import annotations

import reprlib

LIMIT = 80  # characters of a value that a message shows
_short = reprlib.Repr()
_short.maxtuple = _short.maxlist = 8
_short.maxstring = _short.maxother = _short.maxlong = LIMIT


def quote(value: object) -> str:
    """`repr(value)`, shortened and escaped."""
    if isinstance(value, str):
        return repr(value) if len(value) <= LIMIT else f"{value[:LIMIT]!r}... ({len(value)} characters)"
    try:
        return printable(_short.repr(value))
    except ValueError:  # Python refuses to write out an int of thousands of digits
        return f"a {type(value).__name__} too large to show"


def printable(text: object, limit: int = LIMIT) -> str:
    """`str(text)` without quotes, its first `limit` characters; others than printable ones are escaped as by `repr`."""
    whole = str(text)
    shown = whole if len(whole) <= limit else whole[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
