"""What a message quotes is one line of printable characters, however long or strange the value is."""

from __future__ import annotations

import random

import pytest

from llama.errors import LIMIT, printable, quote

ESCAPES = "\x1b[2J\x1b]0;title\x07\r\n\u202e\u2028\x85\x00\ud800"


@pytest.mark.parametrize("value", ["norm.weight", "naïve 語", "it's", "", 7, -1.5, None, True, [1], (64, 64), {"a": 1}])
def test_short_values_are_shown_as_python_writes_them(value: object) -> None:
    assert quote(value) == repr(value)
    assert printable(value) == str(value)


@pytest.mark.parametrize("show", [quote, printable])
def test_what_would_move_a_terminals_cursor_is_escaped(show: type) -> None:
    shown = str(show(ESCAPES))
    assert shown.isprintable() and r"\x1b[2J" in shown and r"\n" in shown and r"\u202e" in shown


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**7,
        ["x" * 10**6] * 1000,
        {str(i): i for i in range(10**5)},
        10**4000,
        1 << 10**6,
        (1,) * 10**6,
        b"\0" * 10**6,
    ],
    ids=["str", "list", "dict", "int", "larger int", "tuple", "bytes"],
)
def test_long_values_are_cut(value: object) -> None:
    assert 0 < len(quote(value)) < 20 * LIMIT
    assert quote(value).isprintable()
    assert quote("x" * 1000) == repr("x" * LIMIT) + "... (1000 characters)"
    assert printable("x" * 1000) == "x" * LIMIT + "..."


def test_random_texts_become_one_line() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(rng.choice([rng.randrange(256), rng.randrange(0x110000)])) for _ in range(rng.randrange(200))
        )
        assert printable(text).isprintable() and quote(text).isprintable()
        assert len(printable(text)) <= 10 * LIMIT + 3
