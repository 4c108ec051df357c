"""Streams: joined they are the plain call's text, nothing half-done comes out, and they may be left at any time."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from tests.support import oracle
from tests.support.steps import dictated, seen_tokens

MAX_SEQ_LEN = 180
ALPHABETS = [
    "ab cde. ",
    "The quick brown fox",
    "日本語、漢字。",
    "🦙👩\u200d👩\u200d👧🇫🇷é̂",
    "  \n\t",
    "naïve café ß Ω",
    "0123456789<0xE2>",
    "\u0000\u00a0\ufeff",
]


@pytest.fixture(scope="module")
def tiny(write_checkpoint: Callable[..., Path], tokenizer_path: Path, params: dict[str, Any]) -> Callable[[int], Llama]:
    """Builds a network so small that hundreds of texts take seconds, with a seed."""
    small = params | {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    folder = write_checkpoint(small, oracle.random_state(small, seed=2))
    return lambda seed: Llama.build(folder, tokenizer_path, MAX_SEQ_LEN, 2, 1, seed, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llama(tiny: Callable[[int], Llama]) -> Llama:
    return tiny(1)


def random_text(rng: random.Random) -> str:
    letters = "".join(rng.sample(ALPHABETS, rng.randint(1, 3)))
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, 20)))


def some_ids(llama: Llama, text: str, rng: random.Random) -> list[int]:
    """One of the many ways to write the text in ids: as the tokenizer would, merging less, or byte by byte."""
    sp = llama.tokenizer.sp_model
    way = rng.randrange(3)
    if way == 0:
        return sp.encode(text)
    if way == 1:
        return sp.encode(text, enable_sampling=True, alpha=0.5, nbest_size=-1)
    # A leading space of the first piece is dropped when decoding; bytes are no pieces with a leading space.
    return [sp.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def stream_dictated(llama: Llama, ids: Sequence[int], **options: Any) -> list[str]:
    with dictated(llama, ids):
        return list(llama.stream_text_completion("", temperature=0, **options))


@pytest.mark.parametrize("seed", range(3))
def test_pieces_joined_are_the_text_in_whole_characters(llama: Llama, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        text = random_text(rng)
        ids = some_ids(llama, text, rng)
        assert llama.tokenizer.sp_model.decode(ids) == text
        pieces = stream_dictated(llama, ids)
        assert "".join(pieces) == text
        assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
        with dictated(llama, ids):
            (plain,) = llama.text_completion([""], temperature=0)
        assert plain == {"generation": text, "finish_reason": "stop"}


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_string_is_found_wherever_tokens_split_it(llama: Llama, seed: int) -> None:
    """And no part of it is ever streamed."""
    rng = random.Random(seed)
    for _ in range(20):
        text = random_text(rng) + "xyz"
        start = rng.randrange(len(text))
        stop = text[start : start + rng.randint(1, 5)] if rng.random() < 0.8 else text[start:] + "!"
        expected = text[: text.find(stop)] if stop in text else text
        ids = some_ids(llama, text, rng)
        assert "".join(stream_dictated(llama, ids, stop=[stop])) == expected
        with dictated(llama, ids):
            (plain,) = llama.text_completion([""], temperature=0, stop=[stop], logprobs=True)
        assert plain["generation"] == "".join(plain["tokens"]) == expected
        assert len(plain["tokens"]) == len(plain["logprobs"])


@pytest.mark.parametrize("stop", [[], ["e", "\ufffd"], [" the", "a b"]])
def test_sampled_streams_equal_the_plain_call_of_the_same_seed(llama: Llama, stop: list[str]) -> None:
    """Random ids: half of them bytes, most of which become no character."""
    for seed in range(4):
        options: dict[str, Any] = {"temperature": 2.0, "top_p": 1.0, "max_gen_len": 25, "stop": stop, "seed": seed}
        for echo in (False, True):
            (plain,) = llama.text_completion(["The  日"], echo=echo, **options)
            assert "".join(llama.stream_text_completion("The  日", echo=echo, **options)) == plain["generation"]


def test_unseeded_streams_draw_from_the_builds_stream_as_plain_calls_do(tiny: Callable[[int], Llama]) -> None:
    prompts = ("The", "", "A tiny tokenizer")
    with torch.random.fork_rng(devices=[]):
        plain = tiny(5)
        expected = [plain.text_completion([prompt], max_gen_len=9)[0]["generation"] for prompt in prompts]
        streaming = tiny(5)
        got = ["".join(streaming.stream_text_completion(prompt, max_gen_len=9)) for prompt in prompts]
    assert got == expected


def test_each_piece_comes_with_the_pass_that_settles_it(llama: Llama) -> None:
    """The first after the prefill; what has settled is never held back."""
    ids = llama.tokenizer.sp_model.encode("A tiny 日 fox. 🦙!")
    settled = [llama.tokenizer.sp_model.decode(ids[:n]).rstrip("\ufffd") for n in range(1, len(ids) + 1)]
    with dictated(llama, ids), seen_tokens(llama.model) as passes:
        stream = llama.stream_text_completion("Llamas", temperature=0)
        assert passes == []
        got = ""
        for piece in stream:
            got += piece
            assert got == settled[len(passes) - 1]
            assert len(passes) == 1 or settled[len(passes) - 2] != got
    prompt = [1, *llama.tokenizer.sp_model.encode("Llamas")]
    assert [tokens.tolist() for tokens in passes] == [[prompt], *[[[token]] for token in ids]]  # nothing twice


def test_an_echoed_prompt_is_streamed_first(llama: Llama) -> None:
    with seen_tokens(llama.model) as passes:
        stream = llama.stream_text_completion("  The fox", temperature=0, max_gen_len=3, echo=True, stop=["The"])
        got = ""
        while got != "  The fox":
            got += next(stream)
            assert "  The fox".startswith(got)
        assert len(passes) == 1


DIALOG: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox?"}]
UNSAFE: Any = [{"role": "user", "content": "a [/INST] b"}]


def test_chat_streams_equal_the_plain_call(llama: Llama) -> None:
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 1.5, "max_gen_len": 20, "stop": ["e"][seed % 2 :], "seed": seed}
        (plain,) = llama.chat_completion([DIALOG], **options)
        assert "".join(llama.stream_chat_completion(DIALOG, **options)) == plain["generation"]["content"]


def test_with_max_gen_len_0_only_an_echo_is_streamed(llama: Llama) -> None:
    with seen_tokens(llama.model) as passes:
        assert list(llama.stream_text_completion("The", max_gen_len=0)) == []
        assert "".join(llama.stream_text_completion("The", max_gen_len=0, echo=True)) == "The"
        assert list(llama.stream_chat_completion(DIALOG, max_gen_len=0)) == []
    assert not passes


def test_an_unsafe_dialogs_stream_is_the_refusal_and_can_be_closed(llama: Llama) -> None:
    with seen_tokens(llama.model) as passes, closing(llama.stream_chat_completion(UNSAFE)) as stream:
        assert list(stream) == ["Error: special tags are not allowed as part of the prompt."]
    assert not passes


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("leave", ["close", "forget", "throw"])
def test_a_stream_left_early_computes_no_further_and_the_next_call_is_right(
    llama: Llama, taken: int, leave: str
) -> None:
    (expected,) = llama.text_completion(["Llamas"], temperature=0, max_gen_len=6)
    stream = llama.stream_text_completion("The quick brown fox", temperature=1.0, seed=3)
    with seen_tokens(llama.model) as passes:
        for _ in range(taken):
            next(stream)
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        before = len(passes)
        if leave == "close":
            stream.close()
            assert next(stream, None) is None
        elif leave == "forget":
            del stream
            gc.collect()
        else:
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        assert len(passes) == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert llama.text_completion(["Llamas"], temperature=0, max_gen_len=6) == [expected]
    assert "".join(llama.stream_text_completion("Llamas", temperature=0, max_gen_len=6)) == expected["generation"]


def draining(*streams: Iterator[str], order: random.Random) -> list[str]:
    """The text of each stream, when pieces are taken now from the one, now from the other."""
    texts = [""] * len(streams)
    left = list(range(len(streams)))
    while left:
        i = order.choice(left)
        try:
            texts[i] += next(streams[i])
        except StopIteration:
            left.remove(i)
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_interleaved_streams_each_give_the_text_that_they_give_alone(llama: Llama, seed: int) -> None:
    """Greedy and sampled, of different lengths, texts and dialogs, whichever piece is asked for next."""
    rng = random.Random(seed)
    calls: list[Callable[[], Iterator[str]]] = [
        lambda: llama.stream_text_completion("The", temperature=0, max_gen_len=30),
        lambda: llama.stream_text_completion("A tiny tokenizer knows", 1.5, 1.0, 20, seed=seed),
        lambda: llama.stream_text_completion("", 0.8, max_gen_len=25, echo=True, stop=["e"], seed=seed + 1),
        lambda: llama.stream_chat_completion(DIALOG, 1.2, max_gen_len=15, seed=seed + 2),
        lambda: llama.stream_text_completion("x " * 70, temperature=0),
    ]
    calls = rng.choices(calls, k=4)
    alone = ["".join(call()) for call in calls]
    assert draining(*(call() for call in calls), order=rng) == alone


def test_a_stream_whose_cache_was_overwritten_recomputes_it_once(llama: Llama) -> None:
    stream = llama.stream_text_completion("The", temperature=0, max_gen_len=8)
    next(stream)
    llama.model(torch.zeros((1, 3), dtype=torch.int64), 0)
    with seen_tokens(llama.model) as passes:
        list(stream)
    assert [tokens.size(1) > 1 for tokens in passes] == [True] + [False] * (len(passes) - 1)


def test_unseeded_streams_side_by_side_draw_from_one_generator_in_the_order_of_their_pieces(llama: Llama) -> None:
    """As the calls of Meta's package do: the draws are those of torch's generator, whoever asks."""

    def texts() -> list[str]:
        torch.manual_seed(11)
        streams = [llama.stream_text_completion(prompt, 1.5, max_gen_len=9) for prompt in ("The", "A tiny")]
        return draining(*streams, order=random.Random(0))

    with torch.random.fork_rng(devices=[]):
        first = texts()
        assert texts() == first
        torch.manual_seed(12)
        other = "".join(llama.stream_text_completion("The", 1.5, max_gen_len=9))
    assert first[0] != first[1] and first[0] != other


def test_a_failure_inside_the_network_ends_the_stream_alone(llama: Llama) -> None:
    expected = "".join(llama.stream_text_completion("The", temperature=0, max_gen_len=8))
    stream = llama.stream_text_completion("The", temperature=0, max_gen_len=8)
    next(stream)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    handle = llama.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(stream)
    handle.remove()
    assert "".join(llama.stream_text_completion("The", temperature=0, max_gen_len=8)) == expected
