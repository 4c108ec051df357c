"""Speculative decoding: whatever is drafted, each call gives what it gives without."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama, generation
from llama.engine.cuda_graphs import MAX_WIDTH
from llama.engine.runner import ModelRunner
from llama.engine.sampling import Sampler
from llama.engine.sequence import Call, Sequence
from llama.engine.speculative import Acceptance, PassCosts, PromptLookup, Speculator
from llama.errors import PromptError
from tests.support import oracle

WAYS = ("prompt_lookup", "draft")
FREE = {1: 1.0, 128: 1.0}  # a pass of any size costs the same
SMALL = {1: 0.01, 128: 0.01}
EMAIL = [5, 6, 7, 8, 9, 10, 11]


def costs_of(seconds: dict[int, float]) -> PassCosts:
    costs = PassCosts()
    for n_positions in seconds:
        costs.observe(n_positions, 0)  # the first one does not count
        costs.observe(n_positions, seconds[n_positions])
    return costs


def with_fixed_costs(
    monkeypatch: pytest.MonkeyPatch, llama: Llama, costs: dict[int, float], draft_costs: dict[int, float]
) -> None:
    """Has the engine draft as if passes took so long, whatever they take."""
    speculator = Speculator(torch.device("cpu"), llama.engine.draft)
    speculator.costs, speculator.draft_costs = costs_of(costs), costs_of(draft_costs)
    for fixed in (speculator.costs, speculator.draft_costs):
        monkeypatch.setattr(fixed, "observe", lambda n_positions, seconds: None)
    monkeypatch.setattr(llama.engine, "_speculator", speculator)


@pytest.fixture(autouse=True)
def drafts_always_pay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = request.getfixturevalue("llama")
    with_fixed_costs(monkeypatch, llama, FREE, SMALL)


@pytest.fixture(scope="module")
def llama(
    checkpoint: Path,
    write_checkpoint: Callable[..., Path],
    params: dict[str, Any],
    state: dict[str, Tensor],
    tokenizer_path: Path,
) -> Llama:
    """Its draft model is the network without its last layer, which often agrees with the whole one."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("layers.2.")}
    draft_checkpoint = write_checkpoint(params | {"n_layers": 2}, kept)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "draft_ckpt_dir": draft_checkpoint}
    return Llama.build(checkpoint, tokenizer_path, max_seq_len=64, max_batch_size=4, **options)


def repeating_prompts(rng: random.Random, n: int, longest: int = 64) -> list[list[int]]:
    """Prompts that repeat parts of themselves, as quotes and lists do."""
    prompts = []
    for _ in range(n):
        part = [rng.randrange(3, 500) for _ in range(rng.randint(1, 9))]
        prompts.append((part * 20)[: rng.randint(1, longest)])
    return prompts


def counted(llama: Llama, *args: Any, **options: Any) -> tuple[Any, int, int]:
    """`generate`'s result, and how many tokens were drafted and accepted meanwhile."""
    before = llama.engine.draft_counts
    drafted, accepted = before.drafted, before.accepted
    result = llama.generate(*args, **options)
    after = llama.engine.draft_counts
    return result, after.drafted - drafted, after.accepted - accepted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_tokens_match_plain_decoding(llama: Llama, way: str, temperature: float) -> None:
    """Greedy, and sampled with the same seed; any number of prompts, of any lengths, up to the end of the cache."""
    rng = random.Random(1)
    n_drafted = n_accepted = 0
    for seed in range(5):
        prompts = repeating_prompts(rng, rng.choice([1, 2, 4, 7]))
        options: dict[str, Any] = {"temperature": temperature, "top_p": 0.95, "seed": seed, "logprobs": True}
        tokens, logprobs = llama.generate(prompts, rng.choice([1, 5, 60]), **options)
        (got, got_logprobs), drafted, accepted = counted(llama, prompts, 60, **options, speculative=way)
        for i, row in enumerate(tokens):
            assert got[i][: len(row)] == row
            assert got_logprobs[i][: len(row)] == pytest.approx(logprobs[i], abs=1e-4)
        n_drafted, n_accepted = n_drafted + drafted, n_accepted + accepted
    assert 0 < n_accepted <= n_drafted


@pytest.mark.parametrize("way", WAYS)
def test_the_default_stream_is_left_as_plain_decoding_leaves_it(llama: Llama, way: str) -> None:
    prompts = repeating_prompts(random.Random(3), 3, longest=30)
    torch.manual_seed(5)
    expected = [llama.generate(prompts, 20, 0.8)[0] for _ in range(2)]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert [llama.generate(prompts, 20, 0.8, speculative=way)[0] for _ in range(2)] == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", WAYS)
def test_the_distribution_matches_plain_decoding_with_any_sampling(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A replaced `sample_top_p` draws noise of its own, so that tokens differ; their frequencies do not.

    It draws one of three tokens by the masses of parts of the vocabulary. A chi-square test of the nine pairs of
    tokens that a draft may decide against plain decoding's, with 8 degrees of freedom: above 40 a few times in a
    million.
    """

    def draw(probs: Tensor, top_p: float) -> Tensor:
        quarter = probs.size(-1) // 4
        classes = torch.stack(
            [probs[:, :quarter].sum(-1), probs[:, quarter : 2 * quarter].sum(-1), probs[:, 2 * quarter :].sum(-1)], 1
        )
        return 40 + torch.multinomial(classes, 1)

    monkeypatch.setattr(generation, "sample_top_p", draw)
    torch.manual_seed(1)
    prompt = [40, 41, 42, 40, 41, 40, 42, 41]

    (rows, _), _, _ = counted(llama, [prompt] * 480, 3, 1.0)
    plain = Counter(tuple(row[1:]) for row in rows)
    (rows, _), n_drafted, n_accepted = counted(llama, [prompt] * 480, 3, 1.0, speculative=way)
    drafted = Counter(tuple(row[1:]) for row in rows)
    assert n_drafted > n_accepted > 50
    chi_square = sum((plain[t] - drafted[t]) ** 2 / (plain[t] + drafted[t]) for t in plain | drafted)
    assert chi_square < 40


@pytest.mark.parametrize("way", WAYS)
def test_texts_streams_and_stop_strings_match_plain_decoding(llama: Llama, way: str) -> None:
    texts = ["The quick brown fox. The quick brown fox. The quick", "12 12 12 12 12", "naïve café, naïve"]
    for stop in ([], ["fox", "o"]):
        options: dict[str, Any] = {"temperature": 0.7, "seed": 4, "stop": stop}
        expected = llama.text_completion(texts, logprobs=True, **options)
        got = llama.text_completion(texts, logprobs=True, **options, speculative=way)
        assert [row["generation"] for row in got] == [row["generation"] for row in expected]
        assert [row["finish_reason"] for row in got] == [row["finish_reason"] for row in expected]
        assert [row["tokens"] for row in got] == [row["tokens"] for row in expected]
        plain = "".join(llama.stream_text_completion(texts[0], **options))
        assert "".join(llama.stream_text_completion(texts[0], **options, speculative=way)) == plain
    dialog: Any = [{"role": "user", "content": "fox fox fox fox"}]
    expected_answer = llama.chat_completion([dialog], 0)
    assert llama.chat_completion([dialog], 0, speculative=way) == expected_answer
    answer = "".join(llama.stream_chat_completion(dialog, 0, speculative=way))
    assert answer == expected_answer[0]["generation"]["content"]


def test_calls_with_and_without_drafts_share_a_batch(llama: Llama) -> None:
    prompts = repeating_prompts(random.Random(6), 6, longest=30)
    expected = [llama.generate([prompt], 20, 0.0)[0] for prompt in prompts]

    def call(i: int) -> list[list[int]]:
        return llama.generate([prompts[i]], 20, 0.0, speculative=(None, *WAYS)[i % 3])[0]

    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert list(pool.map(call, range(6))) == expected


def test_hooks_see_the_drafted_tokens_and_count(llama: Llama) -> None:
    prompts = [[5, 6, 7] * 8]
    widths: list[int] = []

    def shift(module: Any, args: Any, output: Tensor) -> Tensor:
        widths.append(output.size(1))
        return output.roll(1, -1)

    handle = llama.model.output.register_forward_hook(shift)
    try:
        expected = llama.generate(prompts, 20, 0.0)
        assert llama.generate(prompts, 20, 0.0, speculative="prompt_lookup") == expected
    finally:
        handle.remove()
    assert max(widths) > 1


def test_a_patched_network_is_called_as_without_drafts(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may know only Meta's int `start_pos`."""
    attention = llama.model.layers[1].attention
    forward, starts = attention.forward, []

    def patched(x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        starts.append(start_pos)
        return forward(x, start_pos, freqs_cis, mask)

    prompts = [[5, 6, 7] * 8]
    expected = llama.generate(prompts, 10, 0.0)
    monkeypatch.setattr(attention, "forward", patched)
    assert llama.generate(prompts, 10, 0.0, speculative="draft") == expected
    assert starts == [0, *range(24, 33)]


def test_direct_calls_of_either_network_do_no_harm(llama: Llama) -> None:
    prompt = [5, 6, 7, 8] * 4
    expected = "".join(llama.stream_text_completion("fox fox fox", 0, 0.9, 30))
    with torch.no_grad():
        pieces = []
        for piece in llama.stream_text_completion("fox fox fox", 0, 0.9, 30, speculative="draft"):
            pieces.append(piece)
            llama.model(torch.tensor([prompt]), 0)
            llama.draft_model(torch.tensor([prompt]), 0)
    assert "".join(pieces) == expected


def test_a_sequence_that_gets_another_row_keeps_what_the_draft_model_knows_of_it(llama: Llama) -> None:
    prompts = [list(range(5, 30)), list(range(40, 65))]
    (_, expected), _ = llama.generate(prompts, 30, 0.0, stop_token=-1)
    widths: list[int] = []
    handle = llama.draft_model.tok_embeddings.register_forward_hook(
        lambda module, args, out: widths.extend([args[0].size(1)] * args[0].size(0))
    )
    calls = []
    for prompt, n in zip(prompts, (3, 30), strict=True):  # the second one moves when the first has ended
        sampler = Sampler(0.0, 1.0, 1, torch.Generator())
        calls.append(Call([Sequence(prompt, sampler, 0, n, frozenset(), speculative="draft")]))
        llama.engine.add(calls[-1])
    while not llama.engine.is_idle:
        llama.engine.advance()
    handle.remove()
    assert [result.token for result in calls[1].results] == expected
    assert len([width for width in widths if width > MAX_WIDTH]) == 2


def test_an_error_in_the_draft_model_ends_the_call_alone(llama: Llama) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("broken")

    expected = llama.generate([EMAIL], 9, 0.0)
    handle = llama.draft_model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        llama.generate([EMAIL], 9, 0.0, speculative="draft")
    handle.remove()
    assert llama.generate([EMAIL], 9, 0.0, speculative="draft") == expected


def test_wrong_ways_are_refused(llama: Llama, checkpoint: Path, tokenizer_path: Path) -> None:
    with pytest.raises(PromptError, match="speculative must be None, 'prompt_lookup' or 'draft', got 'medusa'"):
        llama.generate([EMAIL], 3, speculative="medusa")
    alone = Llama(llama.model, llama.tokenizer)
    with pytest.raises(PromptError, match=r"must have a draft model, got none; give draft_ckpt_dir to Llama.build"):
        alone.chat_completion([[{"role": "user", "content": "a"}]], speculative="draft")


def test_a_draft_of_another_vocabulary_is_refused(
    checkpoint: Path, write_checkpoint: Callable[..., Path], params: dict[str, Any], tokenizer_path: Path
) -> None:
    other = params | {"vocab_size": params["vocab_size"] - 1}
    folder = write_checkpoint(other, oracle.random_state(other, seed=1))
    with pytest.raises(ValueError, match="vocab_size"):
        Llama.build(checkpoint, tokenizer_path, 16, 1, draft_ckpt_dir=folder)


def test_a_draft_in_another_number_of_files_or_none_is_refused(
    checkpoint: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    for path in checkpoint.iterdir():
        shutil.copy(path, tmp_path / path.name)
    shutil.copy(checkpoint / "consolidated.00.pth", tmp_path / "consolidated.01.pth")
    with pytest.raises(AssertionError, match="draft_ckpt_dir must hold as many checkpoint files as ckpt_dir, 1, got 2"):
        Llama.build(checkpoint, tokenizer_path, 16, 1, draft_ckpt_dir=tmp_path)
    with pytest.raises(AssertionError, match="draft_ckpt_dir must be the folder that holds"):
        Llama.build(checkpoint, tokenizer_path, 16, 1, draft_ckpt_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="draft_ckpt_dir must be the path of a folder, got 5"):
        Llama.build(checkpoint, tokenizer_path, 16, 1, draft_ckpt_dir=5)  # type: ignore[arg-type]


# How many tokens are drafted


@pytest.mark.parametrize(("per_position", "drafts"), [(0.0, True), (0.02, True), (1.0, False)])
def test_nothing_is_drafted_where_a_pass_costs_as_much_as_it_has_positions(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, per_position: float, drafts: bool
) -> None:
    costs = {n: 1 + per_position * (n - 1) for n in (1, 2, 4, 8, 16, 32, 64, 128)}
    with_fixed_costs(monkeypatch, llama, costs, SMALL)
    _, drafted, _ = counted(llama, [EMAIL * 4], 20, 0.0, speculative="prompt_lookup")
    assert (drafted > 0) == drafts


def test_costs_are_learned_from_the_passes_that_run(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size is tried before it is known; drafting ends where passes turn out to cost as much as they have tokens."""
    monkeypatch.setattr(llama.engine, "_speculator", learning := Speculator(torch.device("cpu")))
    clock = [0.0]
    monkeypatch.setattr("llama.engine.engine.time.perf_counter", lambda: clock[0])
    decode = ModelRunner.decode

    def slow(self: ModelRunner, tokens: Tensor, lengths: Any) -> Tensor:
        clock[0] += tokens.numel()
        return decode(self, tokens, lengths)

    monkeypatch.setattr(ModelRunner, "decode", slow)
    expected = llama.generate([EMAIL * 4], 30, 0.0)
    assert llama.generate([EMAIL * 4], 30, 0.0, speculative="prompt_lookup") == expected
    assert learning.costs(1) == 1.0
    _, drafted, _ = counted(llama, [EMAIL * 4], 30, 0.0, speculative="prompt_lookup")
    assert drafted == 0


def test_drafting_ends_where_drafts_are_rejected_and_is_tried_again() -> None:
    acceptance = Acceptance()
    first = acceptance.rate(8)
    for _ in range(10):
        acceptance.observe(8, 4, 0)
    rejected = acceptance.rate(8)
    assert rejected < 0.2 < first
    for _ in range(500):
        acceptance.observe(8, 0, 0)
    assert acceptance.rate(8) == pytest.approx(first, abs=0.1)
    for _ in range(10):
        acceptance.observe(8, 4, 4)
    assert acceptance.rate(8) > 0.9


def test_costs_between_observed_ones_lie_between_them() -> None:
    costs = costs_of({1: 1, 2: 1.5, 4: 1.2, 8: 2, 16: 3, 128: 24})
    assert [costs(n) for n in (1, 2, 4, 8, 128, 256)] == [1, 1.2, 1.2, 2, 24, 24]
    values = [costs(n) for n in range(1, 300)]
    assert values == sorted(values)


def test_one_disturbed_pass_changes_no_cost() -> None:
    costs = PassCosts()
    assert costs(1) is None
    for seconds in (50.0, 1.0, 1.1, 30.0, 0.9):  # the first sets up kernels
        costs.observe(1, seconds)
    assert costs(1) == pytest.approx(1.05)


# Prompt lookup


def longest_match(tokens: list[int]) -> int:
    """Brute force: the most tokens before any earlier place that equal the last ones."""
    matches = [0]
    for end in range(1, len(tokens)):
        n = 0
        while n < end and tokens[end - 1 - n] == tokens[-1 - n]:
            n += 1
        matches.append(n)
    return max(matches)


def test_the_draft_follows_the_longest_match() -> None:
    rng = random.Random(4)
    for _ in range(200):
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 14))]
        lookup = PromptLookup()
        if len(tokens) > 3:
            lookup.propose(tokens[:3], 2)  # what was seen before may have been less
        draft, matched = lookup.propose(tokens, 5)
        assert matched == longest_match(tokens)
        assert len(draft) == (5 if matched else 0)
        if matched:
            text, whole = tokens[-matched:], tokens + draft
            ends = [end for end in range(matched, len(tokens)) if tokens[end - matched : end] == text]
            assert any(whole[end : end + 5] == draft for end in ends)
