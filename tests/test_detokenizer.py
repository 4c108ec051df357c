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


def test_text_and_its_end_match_the_oracle(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    stopped = 0
    for _ in range(3000):
        ids, stops = random_case(tokenizer, rng)
        growing = IncrementalDetokenizer(tokenizer, stops)
        out, n = run(growing, ids)
        assert ("".join(out), n, growing.stopped) == expected(tokenizer, ids, stops), (ids, stops)
        stopped += growing.stopped
    assert 1000 < stopped < 2500


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


def test_pieces_joined_are_the_text(tokenizer: Tokenizer) -> None:
    """They are the ids' own pieces, the last one perhaps cut."""
    rng = random.Random(2)
    for _ in range(1500):
        ids, stops = random_case(tokenizer, rng)
        growing = IncrementalDetokenizer(tokenizer, stops)
        out, n = run(growing, ids)
        whole = tokenizer.pieces(ids)
        assert "".join(growing.pieces) == "".join(out), (ids, stops)
        if growing.stopped:
            assert len(growing.pieces) <= n
            assert growing.pieces[:-1] == whole[: max(0, len(growing.pieces) - 1)]
        else:
            assert growing.pieces == whole


def test_a_stop_string_is_found_at_every_split(tokenizer: Tokenizer) -> None:
    """Every part of a text of two pieces, as the stop string: inside the first, inside the second, and across."""
    rng = random.Random(3)
    sp = tokenizer.sp_model
    words = [i for i in range(tokenizer.n_words) if len(tokenizer.decode([i])) > 2 and not sp.is_byte(i)]
    for _ in range(60):
        ids = rng.choices(words, k=2)
        text = tokenizer.decode(ids)
        first = len(tokenizer.decode(ids[:1]))
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                stop = text[start:end]
                growing = IncrementalDetokenizer(tokenizer, [stop])
                out, n = run(growing, ids)
                assert growing.stopped
                assert "".join(out) == text[: text.find(stop)]
                assert n == (1 if text.find(stop) + len(stop) <= first else 2)


def test_a_stop_string_over_many_tokens_is_found(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "one €🙂 stop two".encode())
    for stop in ("€🙂 stop", "one €🙂 stop two", "🙂", "o"):
        growing = IncrementalDetokenizer(tokenizer, [stop])
        out, _ = run(growing, ids)
        assert "".join(out) == "one €🙂 stop two".split(stop)[0]


def test_a_beginning_of_a_stop_string_that_does_not_go_on_comes_out(tokenizer: Tokenizer) -> None:
    growing = IncrementalDetokenizer(tokenizer, ["aab"])
    out, _ = run(growing, byte_ids(tokenizer, b"aaab"))
    assert out == ["", "", "a", "", ""]
    growing = IncrementalDetokenizer(tokenizer, ["aab"])
    out, _ = run(growing, byte_ids(tokenizer, b"aac"))
    assert out == ["", "", "aac", ""]
    growing = IncrementalDetokenizer(tokenizer, ["aab"])
    out, _ = run(growing, byte_ids(tokenizer, b"caa"))
    assert out == ["c", "", "", "aa"]


def test_of_two_stop_strings_the_first_in_the_text_counts(tokenizer: Tokenizer) -> None:
    (word,) = (i for i in range(tokenizer.n_words) if tokenizer.sp_model.id_to_piece(i) == "\u2581lazy")
    for stops in (["z", "a"], ["a", "z"]):
        growing = IncrementalDetokenizer(tokenizer, stops)
        out, _ = run(growing, [word])
        assert "".join(out) == "l"


def test_a_prefix_is_not_searched_for_stop_strings(tokenizer: Tokenizer) -> None:
    """Not even for the beginning of one."""
    growing = IncrementalDetokenizer(tokenizer, ["ab"], prefix=byte_ids(tokenizer, b"ab a"))
    out, _ = run(growing, byte_ids(tokenizer, b"b ab"))
    assert ("".join(out), growing.stopped) == ("b ", True)
    assert "".join(growing.prefix_pieces) == "ab a"


def test_a_completion_after_a_prefix_matches_the_oracle(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(1500):
        prefix = random_ids(tokenizer, rng)
        ids, stops = random_case(tokenizer, rng)
        if not ids:
            continue
        growing = IncrementalDetokenizer(tokenizer, stops, prefix)
        out, n = run(growing, ids)
        assert ("".join(out), n, growing.stopped) == expected(tokenizer, ids, stops, prefix), (prefix, ids, stops)
        assert growing.prefix_pieces == tokenizer.pieces(prefix)[: len(prefix) - 1] + growing.prefix_pieces[-1:]
        assert "".join(growing.pieces) == "".join(out)
        if not growing.stopped:
            assert growing.prefix_pieces + growing.pieces == tokenizer.pieces([*prefix, *ids])


def test_the_first_space_is_kept_after_a_prefix_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("fox", bos=False, eos=False)
    alone, _ = run(IncrementalDetokenizer(tokenizer), ids)
    behind, _ = run(IncrementalDetokenizer(tokenizer, prefix=tokenizer.encode("quick", bos=True, eos=False)), ids)
    behind_bos, _ = run(IncrementalDetokenizer(tokenizer, prefix=[tokenizer.bos_id]), ids)
    assert ("".join(alone), "".join(behind), "".join(behind_bos)) == ("fox", " fox", "fox")


def test_without_ids_there_is_no_text(tokenizer: Tokenizer) -> None:
    growing = IncrementalDetokenizer(tokenizer, ["a"], prefix=tokenizer.encode("a fox", bos=True, eos=False))
    assert growing.finish() == ""
    assert (growing.pieces, growing.stopped) == ([], False)
    assert "".join(growing.prefix_pieces) == "a fox"


def test_the_rest_of_a_prefix_is_not_searched_for_stop_strings(tokenizer: Tokenizer) -> None:
    """A prefix that ends inside a character, and no id after it."""
    growing = IncrementalDetokenizer(tokenizer, ["\ufffd"], prefix=byte_ids(tokenizer, "€".encode()[:2]))
    growing.finish()
    assert not growing.stopped
    assert "".join(growing.prefix_pieces) == "\ufffd\ufffd"


def test_a_token_after_the_cut_has_no_piece(tokenizer: Tokenizer) -> None:
    """All three bytes of the stop string's character lie behind the cut, not just the last."""
    growing = IncrementalDetokenizer(tokenizer, ["€"])
    run(growing, byte_ids(tokenizer, "a€".encode()))
    assert growing.pieces == ["a"]
