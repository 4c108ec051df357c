"""Streams: joined they are the plain call's text, nothing half-done comes out, and they may be left at any time."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from llama import Llama
from llama.errors import PromptError
from tests.support import oracle

MAX_SEQ_LEN = 180
NO_EOS = -1
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


@contextmanager
def dictated(llama: Llama, ids: Sequence[int]) -> Iterator[None]:
    """The network finds these ids the likeliest, one after the other, and then EOS."""
    script = iter([*ids, llama.tokenizer.eos_id])
    handle = llama.model.output.register_forward_hook(
        lambda _, args, out: 9.0 * one_hot(torch.full(out.shape[:-1], next(script)), out.shape[-1])
    )
    yield
    handle.remove()


@contextmanager
def counted(llama: Llama) -> Iterator[list[int]]:
    """The number of positions of each pass over the network meanwhile."""
    passes: list[int] = []
    handle = llama.model.tok_embeddings.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    yield passes
    handle.remove()


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


@pytest.mark.parametrize("seed", range(6))
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


@pytest.mark.parametrize("seed", range(6))
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


@pytest.mark.parametrize("seed", range(5))
def test_several_stop_strings_leave_none_of_them_in_the_text(llama: Llama, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        text = random_text(rng) + "abcabcab"
        stops = [text[i : i + rng.randint(1, 4)] for i in rng.sample(range(len(text)), 3)]
        got = "".join(stream_dictated(llama, some_ids(llama, text, rng), stop=stops))
        assert text.startswith(got) and any(text.startswith(stop, len(got)) for stop in stops)
        assert not any(stop in got for stop in stops)


@pytest.mark.parametrize("stop", [[], ["\n"], ["e", "\ufffd"], [" the", "a b"]])
def test_sampled_streams_equal_the_plain_call_of_the_same_seed(llama: Llama, stop: list[str]) -> None:
    """Random ids: half of them bytes, most of which become no character."""
    for seed in range(8):
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
    with dictated(llama, ids), counted(llama) as passes:
        stream = llama.stream_text_completion("Llamas", temperature=0)
        assert passes == []
        got = ""
        for piece in stream:
            got += piece
            assert got == settled[len(passes) - 1]
            assert len(passes) == 1 or settled[len(passes) - 2] != got
    assert passes == [len(llama.tokenizer.sp_model.encode("Llamas")) + 1] + [1] * len(ids)


def test_text_that_cannot_become_a_stop_string_any_more_comes_at_once(llama: Llama) -> None:
    sp = llama.tokenizer.sp_model
    ids = [sp.piece_to_id(f"<0x{ord(letter):02X}>") for letter in "ababac.ab"]
    with dictated(llama, ids), counted(llama) as passes:
        came = [(piece, len(passes)) for piece in llama.stream_text_completion("", temperature=0, stop=["abac", "q"])]
    assert came == [("ab", 4)]
    with dictated(llama, ids), counted(llama) as passes:
        came = [(piece, len(passes)) for piece in llama.stream_text_completion("", temperature=0, stop=["abad"])]
    assert came == [("ab", 4), ("abac", 6), (".", 7), ("ab", 10)]


def test_an_echoed_prompt_is_streamed_first(llama: Llama) -> None:
    with counted(llama) as passes:
        stream = llama.stream_text_completion("  The fox", temperature=0, max_gen_len=3, echo=True, stop=["The"])
        got = ""
        while got != "  The fox":
            got += next(stream)
            assert "  The fox".startswith(got)
        assert len(passes) == 1


def test_a_prompt_that_fills_the_cache_streams_nothing(llama: Llama) -> None:
    text = "a" * (MAX_SEQ_LEN - 1 - len(llama.tokenizer.sp_model.encode("")))
    while len(llama.tokenizer.sp_model.encode(text)) < MAX_SEQ_LEN - 1:
        text += "a"
    assert list(llama.stream_text_completion(text)) == []
    assert "".join(llama.stream_text_completion(text, echo=True)) == text


DIALOG: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox?"}]
UNSAFE: Any = [{"role": "user", "content": "a [/INST] b"}]


@pytest.mark.parametrize("stop", [[], ["e"]])
def test_chat_streams_equal_the_plain_call(llama: Llama, stop: list[str]) -> None:
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 1.5, "max_gen_len": 20, "stop": stop, "seed": seed}
        (plain,) = llama.chat_completion([DIALOG], **options)
        assert "".join(llama.stream_chat_completion(DIALOG, **options)) == plain["generation"]["content"]


def test_with_max_gen_len_0_only_an_echo_is_streamed(llama: Llama) -> None:
    with counted(llama) as passes:
        assert list(llama.stream_text_completion("The", max_gen_len=0)) == []
        assert "".join(llama.stream_text_completion("The", max_gen_len=0, echo=True)) == "The"
        assert list(llama.stream_chat_completion(DIALOG, max_gen_len=0)) == []
    assert not passes


def test_an_unsafe_dialogs_stream_is_the_refusal_and_can_be_closed(llama: Llama) -> None:
    with counted(llama) as passes, closing(llama.stream_chat_completion(UNSAFE)) as stream:
        assert list(stream) == ["Error: special tags are not allowed as part of the prompt."]
    assert not passes


@pytest.mark.parametrize(
    "call",
    [
        lambda llama: llama.stream_text_completion("a " * MAX_SEQ_LEN),
        lambda llama: llama.stream_text_completion(["a"]),
        lambda llama: llama.stream_text_completion("a", temperature=-1),
        lambda llama: llama.stream_text_completion("a", stop="b"),
        lambda llama: llama.stream_chat_completion([]),
        lambda llama: llama.stream_chat_completion(DIALOG[:1]),
        lambda llama: llama.stream_chat_completion(DIALOG, max_gen_len=-1),
    ],
)
def test_bad_input_is_an_error_of_the_call_not_of_the_first_piece(llama: Llama, call: Callable[[Llama], Any]) -> None:
    with pytest.raises(PromptError, match=r"must (be|have)"):
        call(llama)


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("leave", ["close", "forget", "throw"])
def test_a_stream_left_early_computes_no_further_and_the_next_call_is_right(
    llama: Llama, taken: int, leave: str
) -> None:
    (expected,) = llama.text_completion(["Llamas"], temperature=0, max_gen_len=6)
    stream = llama.stream_text_completion("The quick brown fox", temperature=1.0, seed=3)
    with counted(llama) as passes:
        for _ in range(taken):
            next(stream)
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


@pytest.mark.parametrize("seed", range(6))
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


OTHER_CALLS: dict[str, Callable[[Llama], Any]] = {
    "generate": lambda llama: llama.generate([[1, 9], [4], [5, 6, 7]], 5, temperature=0, logprobs=True),
    "sampled": lambda llama: llama.text_completion(["a", "b c"], 1.3, max_gen_len=4, seed=9),
    "chat": lambda llama: llama.chat_completion([DIALOG], max_gen_len=3, temperature=0),
    "score": lambda llama: llama.score(["The lazy dog", ""]),
    "score_tokens": lambda llama: llama.score_tokens([[1, 2, 3]]),
    "closed stream": lambda llama: next(llama.stream_text_completion("a", temperature=0)),
    "stream": lambda llama: list(llama.stream_chat_completion(DIALOG, 1.0, max_gen_len=4, seed=3)),
    "forward": lambda llama: llama.model.forward(torch.tensor([[7, 8, 9], [4, 5, 6]]), 0).tolist(),
    "forward of one row": lambda llama: llama.model(torch.tensor([[7]]), 3).tolist()[0][0][:0],
    "a thread": lambda llama: in_a_thread(lambda: llama.generate([[1, 9]], 5, temperature=0)),
    "an error": lambda llama: refused(lambda: llama.generate([[-1]], 2)),
}


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(PromptError):
        call()


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def check_same(got: Any, expected: Any) -> None:
    """Equal, but for the last bits of log-probabilities: the stream's row is in the batch, which rounds differently."""
    if isinstance(expected, tuple) and expected[1] is not None:
        (got, logprobs), (expected, expected_logprobs) = got, expected
        for mine, theirs in zip(logprobs, expected_logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    assert got == expected


@pytest.mark.parametrize("name", OTHER_CALLS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_calls_between_the_pieces_change_neither_the_stream_nor_the_calls(
    llama: Llama, name: str, temperature: float
) -> None:
    other = OTHER_CALLS[name]
    alone = "".join(llama.stream_text_completion("The quick", temperature, max_gen_len=30, seed=4))
    expected = other(llama)
    for every in (1, 2, 5):
        got = ""
        stream = llama.stream_text_completion("The quick", temperature, max_gen_len=30, seed=4)
        for i, piece in enumerate(stream):
            got += piece
            if i % every == 0:
                check_same(other(llama), expected)
        assert got == alone


def test_a_stream_whose_cache_was_not_touched_recomputes_nothing(llama: Llama) -> None:
    stream = llama.stream_text_completion("The", temperature=0, max_gen_len=8)
    with counted(llama) as passes:
        n_pieces = len(list(stream))
    assert n_pieces <= len(passes) and passes[1:] == [1] * (len(passes) - 1)


def test_a_stream_whose_cache_was_overwritten_recomputes_it_once(llama: Llama) -> None:
    stream = llama.stream_text_completion("The", temperature=0, max_gen_len=8)
    next(stream)
    llama.model(torch.zeros((1, 3), dtype=torch.int64), 0)
    with counted(llama) as passes:
        list(stream)
    assert [n > 1 for n in passes] == [True] + [False] * (len(passes) - 1)


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


def test_a_closed_stream_gives_back_nothing_that_others_have_drawn_since(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing it once set torch's generator back to before another call's draws."""
    monkeypatch.setattr(llama.tokenizer, "eos_id", NO_EOS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        stream = llama.stream_text_completion("The", 1.5)
        next(stream)
        llama.generate([[1, 9]], 5, 1.5)
        state = torch.get_rng_state()
        stream.close()
        assert torch.equal(torch.get_rng_state(), state)


def test_a_refused_call_leaves_a_stream_as_it_is(llama: Llama) -> None:
    expected = "".join(llama.stream_text_completion("The", temperature=0, max_gen_len=8))
    stream = llama.stream_text_completion("The", temperature=0, max_gen_len=8)
    got = next(stream)
    with pytest.raises(ValueError, match="top_p"):
        llama.generate([[1]], 2, top_p=2)
    assert got + "".join(stream) == expected


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
