"""Llama's calls, from prompts to results: against the oracle, the published sampling, and themselves."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.chat import ChatFormat
from llama.checkpoint import loading
from llama.errors import PromptError
from tests.engine.test_sampling import published
from tests.support import oracle
from tests.support.steps import dictated, seen_tokens

MAX_SEQ_LEN = 64  # the `llama` fixture's
NO_EOS = -1
Build = Callable[..., Llama]
Forward = Callable[[Sequence[Sequence[int]]], Tensor]
# Runs a test in float32 and in the default build of the CPU, bfloat16 with packed weights. Tests without it ask for
# more than roundings leave, such as equal tokens in batches of other sizes.
both_builds = pytest.mark.parametrize("llama", ["float32", None], indirect=True, ids=["float32", "default"])
both_wide_builds = pytest.mark.parametrize("wide", ["float32", None], indirect=True, ids=["float32", "default"])


@pytest.fixture
def no_eos(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.tokenizer, "eos_id", NO_EOS)


@pytest.fixture(scope="module")
def build(checkpoint: Path, tokenizer_path: Path) -> Build:
    """Llama.build on the random checkpoint; keyword arguments take the place of the fixture's."""

    def build(**changes: Any) -> Llama:
        arguments: dict[str, Any] = {
            "ckpt_dir": checkpoint,
            "tokenizer_path": tokenizer_path,
            "max_seq_len": MAX_SEQ_LEN,
            "max_batch_size": 4,
            "device": "cpu",
            "dtype": "float32",
        }
        return Llama.build(**arguments | changes)

    return build


@pytest.fixture(scope="module")
def built(build: Build) -> Callable[[int, str | None], Llama]:
    """Builds of a length and a dtype, each made once."""
    return cache(lambda max_seq_len, dtype: build(max_seq_len=max_seq_len, dtype=dtype, seed=None))


@pytest.fixture
def llama(built: Callable[..., Llama], request: pytest.FixtureRequest) -> Llama:
    """In float32 unless `both_builds` says otherwise. Pass `seed=` when sampling."""
    return built(MAX_SEQ_LEN, getattr(request, "param", "float32"))


@pytest.fixture
def wide(built: Callable[..., Llama], request: pytest.FixtureRequest) -> Llama:
    """With room for dialogs."""
    return built(200, getattr(request, "param", "float32"))


def is_exact(llama: Llama) -> bool:
    """Whether it computes in float32."""
    dtype: torch.dtype = llama.model.layers[0].attention.cache_k.dtype
    return dtype == torch.float32


def tolerance(llama: Llama) -> float:
    """How far a logit, of about 1, may be from the oracle's."""
    return 1e-4 if is_exact(llama) else 0.3


@pytest.fixture(scope="module")
def forward(state: oracle.State, params: dict[str, Any]) -> Forward:
    """The oracle's logits (bsz, seqlen, vocab) for prompts of one length."""
    return lambda tokens: oracle.logits(state, params, torch.tensor(tokens))


def random_prompts(n: int, longest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 500) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def rescored(forward: Forward, prompt: list[int], answer: list[int]) -> list[float]:
    """The oracle's log-probability of each token of the answer."""
    logprobs = forward([prompt + answer])[0].log_softmax(-1)
    return [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]


def is_greedy(forward: Forward, prompt: list[int], answer: list[int], tolerance: float = 1e-4) -> bool:
    logits = forward([prompt + answer])[0, len(prompt) - 1 :]
    return all(row[token] > row.max() - tolerance for row, token in zip(logits, answer, strict=False))


# ---- build ----


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_model_parallel_size_that_the_world_is_no_multiple_of(build: Build, size: int) -> None:
    with pytest.raises(ValueError, match=rf"(?s)(?=.*world size)(?=.*\b{size}\b)"):
        build(model_parallel_size=size)


WRONG_BUILDS: list[tuple[str, Any]] = [
    *(("model_parallel_size", value) for value in (0, -1, 1.0, "1", True)),
    *((name, value) for name in ("max_seq_len", "max_batch_size") for value in (0, 2.5, "8")),
    *(("seed", value) for value in (1.5, "1", True, 2**64, -(2**63) - 1)),
    *(("threads", value) for value in (0, 1.5, "2", True)),
    *(("compile", value) for value in ("yes", 2, None)),
    *(("quantize", value) for value in ("int3", "", True, 8)),
]


@pytest.mark.parametrize(("name", "value"), WRONG_BUILDS)
def test_a_wrong_argument_of_build_is_refused_before_anything_is_loaded(
    build: Build, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    monkeypatch.delattr(loading.reading, "load_shard")
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}"):
        build(**{name: value})
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_the_network_computes_in_the_dtype(build: Build, forward: Forward, dtype: Any, expected: torch.dtype) -> None:
    other = build(dtype=dtype)
    attentions = [layer.attention for layer in other.model.layers]
    assert {buffer.dtype for attention in attentions for buffer in (attention.cache_k, attention.cache_v)} == {expected}
    tokens = torch.randint(500, (4, 40), generator=torch.Generator().manual_seed(0))
    exact, got = forward(tokens.tolist()), other.model.forward(tokens, 0)
    error, eps = (got - exact).abs().max() / exact.std(), torch.finfo(expected).eps
    assert eps < error < 60 * eps


def test_build_and_calls_change_no_global(
    build: Build, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def globals_now() -> list[Any]:
        return [
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            random.getstate(),
        ]

    before, generator = globals_now(), torch.get_rng_state()
    other = build(seed=None)
    other.generate([[1, 2], [3]], 4, seed=3)
    other.generate([[1, 2], [3]], 4, temperature=0)
    other.text_completion(["a"], max_gen_len=4, seed=3)
    list(other.stream_text_completion("a", max_gen_len=4, seed=3))
    other.score(["a b"])
    assert torch.equal(torch.get_rng_state(), generator)
    other.generate([[1, 2], [3]], 4)
    assert globals_now() == before
    assert capfd.readouterr() == ("", "")


def test_the_torch_default_dtype_and_device_do_not_reach_in(build: Build, llama: Llama) -> None:
    """A program that works in float64 by default gets the same model."""
    torch.set_default_dtype(torch.float64)
    try:
        other = build()
        assert other.generate([[1, 9, 4]], 9, temperature=0) == llama.generate([[1, 9, 4]], 9, temperature=0)
        assert other.generate([[1, 9, 4]], 9, seed=1) == llama.generate([[1, 9, 4]], 9, seed=1)
        assert other.model.forward(torch.tensor([[1, 2]]), 0).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_time_is_logged(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llama"):
        build()
    assert re.search(r"Loaded in \d+\.\d+ seconds", caplog.text)


def test_a_second_build_works_next_to_the_first(
    build: Build, write_checkpoint: Callable[..., Path], params: dict[str, Any], llama: Llama, forward: Forward
) -> None:
    other_params = params | {"n_layers": 1, "n_kv_heads": 8}
    other_state = oracle.random_state(other_params, seed=9)
    other = build(ckpt_dir=write_checkpoint(other_params, other_state), max_batch_size=1)
    for prompt in random_prompts(3, 20, seed=1):  # in turn, so that each finds the other's traces
        assert is_greedy(forward, prompt, llama.generate([prompt], 8, temperature=0)[0][0])
        answer = other.generate([prompt], 8, temperature=0)[0][0]
        assert is_greedy(lambda rows: oracle.logits(other_state, other_params, torch.tensor(rows)), prompt, answer)


# ---- generate: rows, limits, EOS, log-probabilities ----


@both_builds
@pytest.mark.usefixtures("no_eos")
def test_any_number_of_prompts_gives_single_calls_results_in_order(llama: Llama, forward: Forward) -> None:
    prompts = [*random_prompts(11, 30, seed=2), [5] * MAX_SEQ_LEN]
    answers, logprobs = llama.generate(prompts, 20, temperature=0)
    assert logprobs is None
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == min(20, MAX_SEQ_LEN - len(prompt))
        assert is_greedy(forward, prompt, answer, tolerance(llama))
        if is_exact(llama):
            assert llama.generate([prompt], 20, temperature=0)[0] == [answer]


@both_builds
def test_an_eos_inside_the_prompt_ends_nothing(llama: Llama, forward: Forward) -> None:
    prompts = [[1, 2, 50, 2], [2], [2, 9], [1, 2, 2, 7]]
    answers, _ = llama.generate(prompts, 9, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 9 and 2 not in answer
        assert is_greedy(forward, prompt, answer, tolerance(llama))
    expected = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    assert llama.generate(prompts, 9, temperature=0, echo=True)[0] == expected


@both_builds
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_equal_rescoring(llama: Llama, forward: Forward, echo: bool, temperature: float) -> None:
    """Of each returned token given what precedes it, also where the prompts fill the whole length."""
    prompts = [*random_prompts(5, 30, seed=4), [7], [8] * MAX_SEQ_LEN, [9] * (MAX_SEQ_LEN - 1)]
    plain, _ = llama.generate(prompts, 9, temperature=temperature, seed=5)
    rows, logprobs = llama.generate(prompts, 9, temperature=temperature, logprobs=True, echo=echo, seed=5)
    assert logprobs is not None
    for prompt, answer, row, scores in zip(prompts, plain, rows, logprobs, strict=True):
        assert row == (prompt + answer if echo else answer)
        expected = [0.0, *rescored(forward, prompt[:1], prompt[1:])] if echo else []
        assert scores == pytest.approx(expected + rescored(forward, prompt, answer), abs=tolerance(llama))
        assert not echo or scores[0] == 0.0


# ---- sampling and seeds ----


def published_rows(
    forward: Forward,
    prompts: list[list[int]],
    max_gen_len: int,
    temperature: float,
    top_p: float,
    eos_id: int,
    got: list[list[int]] | None = None,
) -> list[list[int]]:
    """Sampling as published, for prompts of one length: torch's default generator, all rows at every step.

    Where another rounding of the logits gives the token of `got`, the row goes on with that.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    while len(rows[0]) < max_gen_len and not all(eos_id in row for row in rows):
        logits = forward([prompt + row for prompt, row in zip(prompts, rows, strict=True)])[:, -1]
        noise = torch.get_rng_state()
        tokens = published(logits, temperature, top_p).tolist()
        for i, row in enumerate(rows):
            other = got[i][len(row)] if got and len(row) < len(got[i]) else tokens[i]
            is_tie = other != tokens[i] and other in published_of_near(logits, noise, temperature, top_p)[i]
            row.append(other if is_tie else tokens[i])
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def published_of_near(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> list[list[int]]:
    """The tokens of each row with the same noise and logits, of about 1, that are a few float32 roundings off."""
    generator, tokens = torch.Generator().manual_seed(0), []
    for _ in range(16):
        near = logits + 1e-5 * (2 * torch.rand(logits.shape, generator=generator) - 1)
        torch.set_rng_state(noise)
        tokens.append(published(near, temperature, top_p))
    return torch.stack(tokens, 1).tolist()


@pytest.mark.parametrize("bsz", [1, 2, 4])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 1.0), (1.4, 0.3), (0.05, 0.9)])
def test_a_seed_gives_the_published_tokens(
    llama: Llama, forward: Forward, monkeypatch: pytest.MonkeyPatch, bsz: int, temperature: float, top_p: float
) -> None:
    prompts = [prompt[:6] for prompt in random_prompts(20, 30, seed=6) if len(prompt) >= 6][:bsz]
    for seed, eos_id in ((1, NO_EOS), (12345, NO_EOS), (2, 336)):
        monkeypatch.setattr(llama.tokenizer, "eos_id", eos_id)
        got, _ = llama.generate(prompts, 16, temperature, top_p, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = published_rows(forward, prompts, 16, temperature, top_p, eos_id, got)
        assert got == expected


def test_a_builds_seed_and_torchs_give_the_published_sequence_of_calls(build: Build, forward: Forward) -> None:
    """Calls without a seed draw from torch's default generator, which `build(seed=)` and `torch.manual_seed` seed."""
    calls = [([[1, 5, 6]], 7), ([[1, 9], [4, 4], [7, 8]], 5), ([[300]], 6)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        expected = [published_rows(forward, prompts, n, 0.6, 0.9, 2) for prompts, n in calls]
        other = build(seed=77)
        assert [other.generate(prompts, n)[0] for prompts, n in calls] == expected
        torch.manual_seed(77)
        got = []
        for prompts, n in calls:  # what draws elsewhere, or does not draw, leaves the generator as it is
            other.generate([[8], [3, 4]], 9, seed=5)
            other.generate([[8]], 9, temperature=0)
            other.score(["a b c"])
            with pytest.raises(ValueError, match="top_p"):
                other.generate([[8]], 9, top_p=2)
            got.append(other.generate(prompts, n)[0])
        assert got == expected
        assert build(seed=78).generate(*calls[0])[0] != expected[0]
        assert build(seed=1).generate(*calls[0]) == build().generate(*calls[0])


def test_a_build_with_seed_none_leaves_torchs_generator_as_it_is(build: Build) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = build(seed=5).generate([[1, 9]], 9)
        torch.manual_seed(5)
        assert build(seed=None).generate([[1, 9]], 9) == expected


@both_builds
def test_a_calls_seed_counts_whatever_ran_before(llama: Llama) -> None:
    prompts = random_prompts(9, 30, seed=7)
    dialog: Any = [{"role": "user", "content": "a"}]

    def calls() -> list[Any]:
        return [
            llama.generate(prompts, 12, temperature=1.0, seed=4),
            llama.text_completion(["The", "A tiny"], max_gen_len=9, seed=4),
            llama.chat_completion([dialog], max_gen_len=9, seed=4),
        ]

    expected = calls()
    llama.generate(prompts[:3], 5)
    assert calls() == expected
    assert llama.generate(prompts, 12, temperature=1.0, seed=5) != expected[0]


# ---- errors ----

USER = {"role": "user", "content": "  Where do llamas live? "}
ANSWER = {"role": "assistant", "content": " In the mountains.\n"}
WRONG_CALLS: dict[str, Callable[[Any], object]] = {
    "prompt_tokens[1] must have at least one token": lambda llama: llama.generate([[1], []], 4),
    "max_gen_len must be": lambda llama: llama.generate([[1]], -1),
    "temperature must be": lambda llama: llama.text_completion(["a"], temperature=math.nan),
    "top_p must be": lambda llama: llama.stream_text_completion("a", top_p=1.001),
    "seed must be": lambda llama: llama.chat_completion([[USER]], seed=2**64),
    "stop must be a list of non-empty strings": lambda llama: llama.stream_text_completion("a", stop="end"),
    "prompts[1] must be a str": lambda llama: llama.text_completion(["a", None]),
    "prompt must be a str": lambda llama: llama.stream_text_completion(["a"]),
    "texts[1] must have at most max_seq_len": lambda llama: llama.score(["a", "a " * MAX_SEQ_LEN]),
    "contexts must have one element per text": lambda llama: llama.score(["a", "b"], ["a"]),
    "dialogs[1][1], the last message": lambda llama: llama.chat_completion([[USER], [USER, ANSWER]]),
    "dialog must have at least one": lambda llama: llama.stream_chat_completion([]),
}


@both_builds
@pytest.mark.parametrize("message", WRONG_CALLS)
def test_a_wrong_argument_is_an_error_of_the_call_before_any_compute(llama: Llama, message: str) -> None:
    """Of a stream too, not of its first piece."""
    with seen_tokens(llama.model) as passes, pytest.raises(PromptError, match="^" + re.escape(message)):
        WRONG_CALLS[message](llama)
    assert not passes


def test_an_unknown_keyword_is_an_error_that_names_the_known_ones(llama: Llama) -> None:
    with pytest.raises(
        TypeError, match=r"^chat_completion\(\) got .* 'max_tokens'; it takes .*max_gen_len, .*top_k"
    ) as error:
        llama.chat_completion([[USER]], max_tokens=3)  # type: ignore[call-arg]
    assert "stop_ids" not in str(error.value)


@both_builds
@pytest.mark.parametrize("temperature", [1e-320, 2**64, 1e39, 1e308])
def test_any_temperature_there_is_gives_tokens(llama: Llama, temperature: float) -> None:
    """2**64 was refused by torch after the prefill."""
    (row,), _ = llama.generate([[1, 9]], 5, temperature, 1.0, seed=1)
    assert 1 <= len(row) <= 5
    if temperature > 1:  # as good as uniform
        assert (row,) == (*llama.generate([[1, 9]], 5, 1e30, 1.0, seed=1)[0],)


# ---- texts ----

TEXTS = ["The quick", "", "  two spaces", "naïve café 12\n\n345", "日本 🦙", "A tiny tokenizer knows", "x" * 20]


@both_builds
@pytest.mark.parametrize("echo", [False, True])
def test_texts_are_encoded_with_bos_and_decoded_whole(llama: Llama, echo: bool) -> None:
    prompts = [[1, *llama.tokenizer.sp_model.encode(text)] for text in TEXTS]
    rows, logprobs = llama.generate(prompts, 30, temperature=1.2, echo=echo, seed=6, logprobs=True)
    results = llama.text_completion(TEXTS, temperature=1.2, max_gen_len=30, echo=echo, seed=6)
    for row, result in zip(rows, results, strict=True):
        assert result == {"generation": llama.tokenizer.sp_model.decode(row), "finish_reason": result["finish_reason"]}
    assert logprobs is not None
    with_logprobs = llama.text_completion(TEXTS, 1.2, 0.9, 30, True, echo, seed=6)
    for row, scores, plain, result in zip(rows, logprobs, results, with_logprobs, strict=True):
        assert set(result) == {"generation", "finish_reason", "tokens", "logprobs"}
        assert result["generation"] == plain["generation"]
        assert "".join(result["tokens"]) == result["generation"]
        assert len(result["tokens"]) == len(row)
        assert result["logprobs"] == scores


@both_builds
@pytest.mark.usefixtures("no_eos")
def test_max_gen_len_defaults_to_the_longest_there_is(llama: Llama) -> None:
    (alone, long) = llama.text_completion(["", "The quick brown fox"], logprobs=True, seed=1)
    n_prompt = len(llama.tokenizer.sp_model.encode("The quick brown fox")) + 1
    assert (len(alone["tokens"]), len(long["tokens"])) == (MAX_SEQ_LEN - 1, MAX_SEQ_LEN - n_prompt)


def test_the_smallest_cache_works(build: Build) -> None:
    tiny = build(max_seq_len=1, max_batch_size=1)
    assert tiny.text_completion(["", ""], logprobs=True)[1]["tokens"] == []
    assert tiny.generate([[1], [2]], 3) == ([[], []], None)


@both_builds
def test_finish_reasons(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """`length` at the limit asked for and at the end of the cache, `stop` at EOS and at a stop string."""
    monkeypatch.setattr(llama.tokenizer, "eos_id", NO_EOS)
    (row,), _ = llama.generate([[1, *llama.tokenizer.sp_model.encode("The")]], 12, temperature=0)

    def reason(n: int | None, **options: Any) -> str:
        return llama.text_completion(["The"], temperature=0, max_gen_len=n, **options)[0]["finish_reason"]

    assert reason(5) == reason(None) == "length"
    assert reason(12, stop=[llama.tokenizer.pieces(row)[3]]) == "stop"
    assert reason(12, stop=["never there"]) == "length"
    monkeypatch.setattr(llama.tokenizer, "eos_id", row[6])
    assert reason(12) == "stop"
    assert reason(row.index(row[6])) == "length"  # the limit comes first


@both_builds
def test_a_stop_string_in_bytes_that_became_no_character_counts(llama: Llama) -> None:
    """Half a character at the limit comes out as U+FFFD only once no token follows."""
    half = llama.tokenizer.sp_model.piece_to_id("<0xF0>")
    with dictated(llama, [*llama.tokenizer.sp_model.encode("The"), half]):
        n = len(llama.tokenizer.sp_model.encode("The")) + 1
        (result,) = llama.text_completion([""], temperature=0, max_gen_len=n, stop=["e\ufffd"])
    assert result == {"generation": "Th", "finish_reason": "stop"}


@both_builds
@pytest.mark.usefixtures("no_eos")
def test_a_stop_string_ends_the_computing_too(llama: Llama) -> None:
    (free,) = llama.text_completion(["The"], temperature=0, max_gen_len=30, logprobs=True)
    with seen_tokens(llama.model) as passes:
        llama.text_completion(["The"], temperature=0, max_gen_len=30, stop=[free["generation"][:3]])
    pieces = free["tokens"]
    assert len(passes) <= next(i for i in range(31) if len("".join(pieces[:i])) >= 3)


@both_builds
def test_an_echoed_prompt_is_not_searched_for_stop_strings(llama: Llama) -> None:
    (result,) = llama.text_completion(["The lazy dog"], temperature=0, max_gen_len=6, echo=True, stop=["lazy"])
    assert result["generation"].startswith("The lazy dog")


# ---- dialogs ----

SYSTEM = {"role": "system", "content": " Be brief. "}
MORE = {"role": "user", "content": "And alpacas?"}
DIALOGS: list[Any] = [[USER], [SYSTEM, USER], [USER, ANSWER, MORE], [SYSTEM, USER, ANSWER, MORE]]
UNSAFE: list[Any] = [[USER | {"content": f"a {tag} b"}] for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")]
REFUSAL = "Error: special tags are not allowed as part of the prompt."


@both_wide_builds
def test_dialogs_run_as_their_template_and_unsafe_ones_not_at_all(wide: Llama) -> None:
    prompts = [ChatFormat().encode(dialog, wide.tokenizer) for dialog in DIALOGS]
    dialogs = [dialog for safe, unsafe in zip(DIALOGS, UNSAFE, strict=False) for dialog in (unsafe, safe)]
    with seen_tokens(wide.model) as passes:
        results = wide.chat_completion(dialogs, 0, 0.9, 8, True)
    prefilled = sorted(row for tokens in passes if tokens.size(1) > 1 for row in tokens.tolist())
    assert [row[: len(prompt)] for row, prompt in zip(prefilled, sorted(prompts), strict=True)] == sorted(prompts)
    answers, logprobs = wide.generate(prompts, 8, temperature=0, logprobs=True)
    assert logprobs is not None
    for result, answer, scores in zip(results[1::2], answers, logprobs, strict=True):
        text = wide.tokenizer.sp_model.decode(answer)
        assert result["generation"] == {"role": "assistant", "content": text}
        assert "".join(result["tokens"]) == text and len(result["tokens"]) == len(answer)
        assert result["logprobs"] == scores
    for result in results[::2]:
        assert result["generation"] == {"role": "assistant", "content": REFUSAL}
        assert result["tokens"] == [] and result["logprobs"] == []


def test_any_number_of_dialogs_with_stop_and_seed(wide: Llama) -> None:
    dialogs = DIALOGS * 3
    free = wide.chat_completion(dialogs, temperature=0, max_gen_len=10)
    stop = free[2]["generation"]["content"][2:4]
    for dialog, result, plain in zip(
        dialogs, wide.chat_completion(dialogs, temperature=0, max_gen_len=10, stop=[stop]), free, strict=True
    ):
        whole = plain["generation"]["content"]
        cut = whole[: whole.find(stop)] if stop in whole else whole
        assert result["generation"] == {"role": "assistant", "content": cut}
        assert wide.chat_completion([dialog], temperature=0, max_gen_len=10) == [plain]
    assert wide.chat_completion(dialogs, max_gen_len=10, seed=3) == wide.chat_completion(
        dialogs, max_gen_len=10, seed=3
    )


# ---- scoring ----


@both_builds
def test_scores_of_texts_equal_the_oracles(llama: Llama, forward: Forward) -> None:
    with seen_tokens(llama.model) as passes:
        scores = llama.score(TEXTS)
    assert sum(len(tokens) for tokens in passes) == len(TEXTS)  # one row a text, and no decoding
    for text, score in zip(TEXTS, scores, strict=True):
        ids = llama.tokenizer.sp_model.encode(text)
        assert score["logprobs"] == pytest.approx(rescored(forward, [1], ids), abs=tolerance(llama))
        assert score["logprob"] == pytest.approx(sum(score["logprobs"]))
        assert isinstance(score["logprob"], float) or not ids
        assert "".join(score["tokens"]) == text and len(score["tokens"]) == len(ids)


@both_builds
def test_rows_of_one_token_have_a_score_of_nothing(llama: Llama, forward: Forward) -> None:
    """Also where all rows of a batch are such, for which the network has nothing to compute."""
    nothing = {"logprob": 0.0, "tokens": [], "logprobs": []}
    assert llama.score([""]) == [nothing]
    assert llama.score([""] * 9) == [nothing] * 9
    assert llama.score([""], [""]) == [nothing]
    assert llama.score_tokens([[1]]) == llama.score_tokens([[9]]) == [[0.0]]
    hello = llama.tokenizer.sp_model.encode("hello")
    expected = pytest.approx(rescored(forward, [1], hello), abs=tolerance(llama))
    scores = llama.score(["hello", "", "", "", "", "hello"])
    assert scores[1:5] == [nothing] * 4
    assert scores[0]["logprobs"] == expected and scores[5]["logprobs"] == expected
    alone, with_hello = llama.score_tokens([[1], [1, *hello]])
    assert alone == [0.0] and with_hello[0] == 0.0 and with_hello[1:] == expected


@both_builds
def test_with_max_gen_len_0_echo_and_logprobs_score_the_prompts(llama: Llama) -> None:
    prompts = [*random_prompts(6, 30, seed=12), [1], [5] * MAX_SEQ_LEN]
    rows, logprobs = llama.generate(prompts, 0, logprobs=True, echo=True)
    assert rows == prompts
    assert logprobs == llama.score_tokens(prompts)
    assert llama.generate(prompts, 0) == ([[] for _ in prompts], None)
    (result,) = llama.text_completion(["The"], max_gen_len=0)
    assert result == {"generation": "", "finish_reason": "length"}


@both_builds
def test_scores_of_completions_equal_the_oracles(llama: Llama, forward: Forward) -> None:
    """Context and text are encoded as one string; the tokens after the context's own are scored, a merged one too."""
    contexts = ["The quick brown", "", "Llamas", "日", "The", "The quick brown", "The qu"]
    texts = [" fox jumps", "A tiny", " and alpacas live", "本 🦙", "", " dog", "ick"]
    for context, text, score in zip(contexts, texts, llama.score(texts, contexts), strict=True):
        head = [1, *llama.tokenizer.sp_model.encode(context)]
        whole = [1, *llama.tokenizer.sp_model.encode(context + text)]
        n_known = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), len(head))
        assert (n_known < len(head)) == (context == "The qu")
        expected = rescored(forward, whole[:n_known], whole[n_known:])
        assert score["logprobs"] == pytest.approx(expected, abs=tolerance(llama))
        assert score["logprob"] == pytest.approx(sum(score["logprobs"]))
        assert "".join(score["tokens"]).endswith(text)
