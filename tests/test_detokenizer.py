"""IncrementalDetokenizer, against an oracle that decodes all tokens at each step and cuts at the first stop string."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llama import Tokenizer
from llama.tokenizer import IncrementalDetokenizer
from tests.test_tokenizer import byte_ids, random_ids, settled_text

ALPHABET = "ab é€🙂"


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string of a text begins."""
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)


def expected(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], prefix: Sequence[int] = ()
) -> tuple[str, int, bool]:
    """The completion's text, how many ids it took, and whether it was stopped."""
    before = len(settled_text(tokenizer, prefix))
    for n in range(1, len(ids) + 1):
        text = settled_text(tokenizer, [*prefix, *ids[:n]])[before:]
        if (at := first_stop(text, stops)) is not None:
            return text[:at], n, True
    text = tokenizer.decode([*prefix, *ids])[before:]
    at = first_stop(text, stops)
    return text[:at], len(ids), at is not None


def surely_text(text: str, stops: Sequence[str]) -> str:
    """The longest beginning of an unstopped text behind which no stop string can begin any more."""
    starts = range(len(text) + 1)
    return text[: next(at for at in starts if at == len(text) or any(stop.startswith(text[at:]) for stop in stops))]


def random_case(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[str]]:
    """Ids and stop strings that often meet: both of few characters, some of which are several tokens."""
    if rng.random() < 0.2:
        ids = random_ids(tokenizer, rng) + random_ids(tokenizer, rng)
        text = tokenizer.decode(ids)
    else:
        text = "".join(rng.choices(ALPHABET, k=rng.randint(0, 12)))
        whole = tokenizer.encode(text, bos=False, eos=False)
        ids = whole if rng.random() < 0.5 else byte_ids(tokenizer, text.encode())
    stops = []
    for _ in range(rng.randint(0, 3)):
        if text and rng.random() < 0.5:
            start = rng.randrange(len(text))
            stops.append(text[start : start + rng.randint(1, 5)])
        else:
            stops.append("".join(rng.choices(ALPHABET + "\ufffd", k=rng.randint(1, 4))))
    return ids, stops


def run(text: IncrementalDetokenizer, ids: Sequence[int]) -> tuple[list[str], int]:
    """Pushes ids until the text is stopped; what came out each time, the end's included, and how many were pushed."""
    out = []
    for token in ids:
        out.append(text.push(token))
        if text.stopped:
            break
    n = len(out)
    return [*out, text.finish()], n


def test_streamed_text_is_final_and_as_early_as_it_can_be(tokenizer: Tokenizer) -> None:
    """After each id, what came out is all that no stop string can take back, and the final text begins with it."""
    rng = random.Random(1)
    for _ in range(1000):
        ids, stops = random_case(tokenizer, rng)
        final, _, _ = expected(tokenizer, ids, stops)
        growing = IncrementalDetokenizer(tokenizer, stops)
        out = ""
        for n, token in enumerate(ids, start=1):
            out += growing.push(token)
            assert final.startswith(out), (ids, stops)
            if growing.stopped:
                break
            assert out == surely_text(settled_text(tokenizer, ids[:n]), stops), (ids, stops)
        assert out + growing.finish() == final


def test_text_pieces_and_their_end_match_the_oracle(tokenizer: Tokenizer) -> None:
    """After a prefix too, which is not searched for stop strings; of a token behind the cut there is no piece."""
    rng = random.Random(4)
    stopped = 0
    for _ in range(3000):
        prefix = random_ids(tokenizer, rng) if rng.random() < 0.5 else []
        ids, stops = random_case(tokenizer, rng)
        growing = IncrementalDetokenizer(tokenizer, stops, prefix)
        out, n = run(growing, ids)
        if not ids:
            assert not growing.stopped and "".join(growing.prefix_pieces) == tokenizer.decode(prefix)
            continue
        assert ("".join(out), n, growing.stopped) == expected(tokenizer, ids, stops, prefix), (prefix, ids, stops)
        pieces = growing.prefix_pieces + growing.pieces
        whole = tokenizer.pieces([*prefix, *ids])
        assert "".join(growing.pieces) == "".join(out)
        assert not growing.stopped or growing.pieces[-1:] != [""]
        assert pieces[:-1] == whole[: len(pieces[:-1])] if growing.stopped else pieces == whole
        stopped += growing.stopped
    assert 1000 < stopped < 2500
