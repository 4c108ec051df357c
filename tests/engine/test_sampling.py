"""Sampling, against top-p in exact fractions and against the published algorithm on `torch.multinomial`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from llama.engine.sampling import Sampler, sample_top_p


@pytest.fixture(autouse=True)
def _default_stream_is_restored() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def published(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """What Meta's code computes a step, from torch's default generator."""
    ordered, order = torch.sort(torch.softmax(logits / temperature, dim=-1), dim=-1, descending=True)
    cumulative = torch.cumsum(ordered, dim=-1)
    ordered[cumulative - ordered > top_p] = 0.0
    ordered.div_(ordered.sum(dim=-1, keepdim=True))
    return torch.gather(order, -1, torch.multinomial(ordered, num_samples=1)).squeeze(-1)


def nucleus(weights: Sequence[int], top_p: Fraction) -> list[int]:
    """The token ids that may be drawn, likeliest first: each whose mass before it is at most `top_p`."""
    total = sum(weights)
    kept, before = [], Fraction(0)
    for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
        if before <= top_p and weights[token]:
            kept.append(token)
        before += Fraction(weights[token], total)
    return kept


def take(sampler: Sampler, step: int, logits: Tensor) -> Tensor:
    """The tokens of all of the sampler's rows at one step."""
    n = len(logits)
    return sampler(logits, range(n), [step] * n)


def drawable(probs: Tensor, p: float) -> list[int]:
    """The ids that `sample_top_p` gives when each of the sorted places in turn gets a head start."""
    n = len(probs)
    noise = torch.full((n, n), 1e15)
    noise.fill_diagonal_(1e-15)
    winners = sample_top_p(probs.expand(n, n), p, noise=noise).squeeze(-1)
    return sorted(set(winners.tolist()))


def binary_fractions(rng: random.Random, n: int) -> list[int]:
    """Different weights that add up to 1024, so that every mass is exact in float32."""
    while True:
        cuts = sorted(rng.sample(range(1, 1024), n - 1))
        weights = [b - a for a, b in zip([0, *cuts], [*cuts, 1024], strict=True)]
        if len(set(weights)) == n:
            return weights


def test_the_set_matches_exact_arithmetic() -> None:
    """Edges included: `p` is often just the mass before some token, which then stays."""
    rng = random.Random(0)
    for _ in range(500):
        weights = binary_fractions(rng, rng.randint(1, 12))
        masses = [sum(sorted(weights, reverse=True)[:n]) for n in range(1, len(weights) + 1)]
        p = Fraction(rng.choice([0, *masses, rng.randint(1, 1024)]), 1024)
        probs = torch.tensor([weight / 1024 for weight in weights])
        assert drawable(probs, float(p)) == sorted(nucleus(weights, p)), (weights, p)


def test_a_token_of_no_probability_is_never_drawn() -> None:
    assert drawable(torch.tensor([0.0, 0.5, 0.0, 0.5]), 1.0) == [1, 3]


def tokens_as_published(steps: Tensor, temperature: float, top_p: float) -> Tensor:
    """The tokens of each step and row, checked to be those of the published algorithm with the same seed."""
    torch.manual_seed(7)
    theirs = torch.stack([published(logits, temperature, top_p) for logits in steps])
    sampler = Sampler(temperature, top_p, steps.size(1), generator(7))
    ours = torch.stack([take(sampler, i, logits) for i, logits in enumerate(steps)])
    assert torch.equal(ours, theirs)
    return ours


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.6, 0.9), (1.0, 1.0), (1.7, 0.5), (0.05, 0.95), (1.0, 1e-6), (1.5, 0.0)]
)
@pytest.mark.parametrize(("bsz", "vocab_size", "n_steps"), [(1, 50, 40), (5, 500, 40), (4, 32000, 2)])
def test_tokens_match_the_published_algorithm(
    temperature: float, top_p: float, bsz: int, vocab_size: int, n_steps: int
) -> None:
    tokens_as_published(torch.randn(n_steps, bsz, vocab_size, generator=generator(0)) * 4, temperature, top_p)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 0.99), (1.0, 1.0)])
def test_tokens_of_equal_probability_are_drawn_as_published(temperature: float, top_p: float) -> None:
    """Logits in bfloat16 are often equal; which of them comes first in the order decides who gets which number."""
    tokens_as_published((torch.randn(40, 3, 8000, generator=generator(4)) * 4).bfloat16().float(), temperature, top_p)


def test_the_least_likely_tokens_are_drawn_as_published() -> None:
    """Together they have a 50th of the mass, each too little to be sorted at first, and top_p leaves none out."""
    logits = torch.zeros(8, 2000)
    logits[:, 7] = 11.5
    logits += torch.rand(logits.shape, generator=generator(0)) / 10
    assert 5 < (tokens_as_published(logits.expand(100, -1, -1), 1.0, 1.0) != 7).sum() < 50


def test_the_stream_is_the_same_where_exponentials_are_not_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Intel's CPUs, where torch leaves them to MKL."""
    steps = torch.randn(20, 2, 300, generator=generator(4)) * 3

    def tokens() -> list[list[int]]:
        sampler = Sampler(0.8, 0.9, 2, generator(9))
        return [take(sampler, i, logits).tolist() for i, logits in enumerate(steps)]

    expected = tokens()
    monkeypatch.setattr("llama.engine.sampling._exponentials_are_logarithms", lambda: False)
    assert tokens() == expected


def test_without_noise_it_draws_from_the_default_stream() -> None:
    probs = torch.softmax(torch.randn(4, 300, generator=generator(1)) * 3, dim=-1)
    torch.manual_seed(3)
    drawn = [sample_top_p(probs, 0.9) for _ in range(20)]
    assert {tuple(tokens.shape) for tokens in drawn} == {(4, 1)}
    torch.manual_seed(3)
    assert [tokens.squeeze(-1).tolist() for tokens in drawn] == [
        published(probs.log(), 1.0, 0.9).tolist() for _ in range(20)
    ]


def test_rows_that_are_missing_do_not_shift_the_others_numbers() -> None:
    """A subset of the rows, in any order, draws what it draws in the whole batch, step after step."""
    rng = random.Random(1)
    n_rows, vocab_size = 6, 40
    for seed in range(30):
        whole, part = (Sampler(1.0, 0.95, n_rows, generator(seed)) for _ in range(2))
        for step in range(8):
            logits = torch.randn(n_rows, vocab_size, generator=generator(rng.randrange(10**6)))
            rows = rng.sample(range(n_rows), rng.randint(1, n_rows))
            tokens = take(whole, step, logits)
            assert part(logits[rows], rows, [step] * len(rows)).tolist() == tokens[rows].tolist()


def test_rows_may_stand_at_different_steps() -> None:
    """Each draws with the noise of its own step, in any order and again, until that is released."""
    whole, ragged = (Sampler(1.0, 0.95, 3, generator(2)) for _ in range(2))
    logits = torch.randn(6, 3, 50, generator=generator(3))
    tokens = torch.stack([take(whole, step, logits[step]) for step in range(6)])
    rows, steps = [2, 0, 1, 2, 2], [5, 0, 3, 4, 5]
    for _ in range(2):
        assert ragged(logits[steps, rows], rows, steps).tolist() == tokens[steps, rows].tolist()
    assert take(ragged, 3, logits[3]).tolist() == tokens[3].tolist()
    assert torch.equal(whole.generator.get_state(), ragged.generator.get_state())


@pytest.mark.parametrize("bsz", [1, 4])
def test_temperature_zero_takes_the_likeliest_token(bsz: int) -> None:
    logits = torch.randn(bsz, 100, generator=generator(2))
    sampler = Sampler(0, 0.9, bsz, generator(0))
    tokens = take(sampler, 0, logits)
    assert tokens.tolist() == [max(range(100), key=row.__getitem__) for row in logits.tolist()]
    sampler.rewind()
    assert torch.equal(sampler.generator.get_state(), generator(0).get_state())


def test_a_generator_of_the_callers_is_drawn_from_alone_and_the_logits_are_left_alone() -> None:
    logits = torch.randn(3, 50, generator=generator(0))
    before, state = logits.clone(), torch.get_rng_state()
    take(Sampler(0.6, 0.9, 3, generator(1)), 0, logits)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30, 1e-40, 1e-300])
def test_a_low_temperature_nears_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[3.0, 20.0, -5.0, 19.0]])
    assert take(Sampler(temperature, 1.0, 1, generator(0)), 0, logits).item() == 1


def test_a_replacement_of_sample_top_p_draws_instead() -> None:
    """It gets the probabilities at the temperature, and draws from a stream of its own; greedy steps do without it."""
    logits = torch.randn(3, 50, generator=generator(0))
    calls: list[tuple[Tensor, float]] = []

    def draw(probs: Tensor, p: float) -> Tensor:
        calls.append((probs, p))
        return torch.tensor([[7], [8], [9]])

    stream = generator(1)
    tokens = take(Sampler(0.5, 0.9, 3, stream, draw), 0, logits)
    assert tokens.tolist() == [7, 8, 9]
    ((probs, p),) = calls
    assert p == 0.9
    torch.testing.assert_close(probs, (2 * logits).exp() / (2 * logits).exp().sum(-1, keepdim=True))
    assert torch.equal(stream.get_state(), generator(1).get_state())
    assert take(Sampler(0, 0.9, 3, stream, draw), 0, logits).tolist() == logits.argmax(-1).tolist()
    assert len(calls) == 1


def test_what_was_drawn_ahead_is_given_back_to_the_stream() -> None:
    """It comes again; the used steps stay drawn."""
    logits = torch.zeros(2, 1000)
    sampler = Sampler(1.0, 1.0, 2, generator(3))
    first, second, _ = (take(sampler, step, logits) for step in range(3))
    sampler.mark_used(0, 1)
    assert (sampler.steps, sampler.used) == (3, 1)
    sampler.rewind()
    sampler.rewind()
    assert sampler.steps == 1
    assert torch.equal(take(sampler, 1, logits), second)
    assert not torch.equal(first, second)


def test_nothing_is_given_back_once_others_have_drawn() -> None:
    """The stream may be torch's default one: setting it back would give others the same numbers again."""
    stream = generator(3)
    sampler = Sampler(1.0, 1.0, 2, stream)
    take(sampler, 0, torch.zeros(2, 1000))
    torch.rand(1, generator=stream)
    state = stream.get_state()
    sampler.rewind()
    assert sampler.steps == 1 and torch.equal(stream.get_state(), state)


def test_skipping_leaves_the_stream_where_steps_would_have() -> None:
    logits = torch.zeros(2, 1000)
    stepped, skipped = (Sampler(1.0, 1.0, 2, generator(3)) for _ in range(2))
    for step in range(4):
        take(stepped, step, logits)
    take(skipped, 0, logits)
    skipped.skip_to(4, 1000)
    assert torch.equal(stepped.generator.get_state(), skipped.generator.get_state())
    assert (stepped.steps, skipped.steps) == (4, 4)
