"""The network against the oracle: without a cache, through the cache in every way, gradients, and each part alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import ModelArgs, Transformer
from llama.distributed.groups import init_process_groups
from llama.layers.kernels import can_pack
from llama.layers.linear import packable_layers
from llama.model import (
    SPARE_POSITIONS,
    Attention,
    CachePositions,
    RMSNorm,
    apply_rotary_emb,
    attend,
    precompute_freqs_cis,
)
from tests.support import oracle

MULTI_HEAD: dict[str, Any] = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 6,
    "vocab_size": 80,
    "multiple_of": 16,
    "norm_eps": 1e-5,
}
GROUPED: dict[str, Any] = MULTI_HEAD | {"n_kv_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": MULTI_HEAD,
    "grouped-query": GROUPED,
    "multi-query": MULTI_HEAD | {"n_kv_heads": 1},
    "ffn_dim_multiplier": GROUPED | {"ffn_dim_multiplier": 1.7, "multiple_of": 8},
    "rope_theta": GROUPED | {"rope_theta": 1e6},
    "norm_eps": GROUPED | {"norm_eps": 1e-6},
}
MAX_BATCH_SIZE = 4
MAX_SEQ_LEN = 24


@pytest.fixture(scope="module", autouse=True)
def groups() -> None:
    """fairscale's layers need a model-parallel group."""
    init_process_groups(1, torch.device("cpu"))


def random_state(params: dict[str, Any]) -> oracle.State:
    """Weights under which each hyper-parameter shows: embeddings so small that `norm_eps` counts."""
    state = oracle.random_state(params, seed=5)
    return state | {"tok_embeddings.weight": 2e-3 * state["tok_embeddings.weight"]}


def make(params: dict[str, Any], state: oracle.State, dtype: torch.dtype = torch.float32, **sizes: int) -> Transformer:
    """A network whose cache is full of what an earlier call left: noise that must never be attended to."""
    args = ModelArgs(**params, **{"max_batch_size": MAX_BATCH_SIZE, "max_seq_len": MAX_SEQ_LEN} | sizes)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    model = Transformer.from_state(args, weights, cache_dtype=dtype)
    for attention in attentions(model):
        attention.cache.keys.normal_(std=100.0)
        attention.cache.values.normal_(std=100.0)
    return model


def random_tokens(bsz: int, seqlen: int, seed: int = 0) -> Tensor:
    return torch.randint(80, (bsz, seqlen), generator=torch.Generator().manual_seed(seed))


def random_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def attentions(model: Transformer) -> list[Attention]:
    return [layer.attention for layer in model.layers]


@pytest.fixture(scope="module")
def state() -> oracle.State:
    return random_state(GROUPED)


@pytest.fixture
def model(state: oracle.State) -> Transformer:
    return make(GROUPED, state)


OTHERS = {"rope_theta": {"rope_theta": 1e4}, "norm_eps": {"norm_eps": 1e-5}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_equal_the_oracles(variant: str) -> None:
    params = VARIANTS[variant]
    state, tokens = random_state(params), random_tokens(3, MAX_SEQ_LEN)
    got, expected = make(params, state).forward(tokens, 0), oracle.logits(state, params, tokens)
    assert got.dtype == torch.float32
    close(got, expected)
    if variant in OTHERS:  # left out, the hyper-parameter would show
        assert (oracle.logits(state, params | OTHERS[variant], tokens) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("chunks", [[7, *[1] * 17], [1, 5, 1, 1, 16], [12, 12]], ids=str)
@pytest.mark.parametrize("variant", ["multi-head", "grouped-query", "multi-query"])
def test_cached_logits_equal_uncached_ones(variant: str, chunks: list[int], as_tensor: bool) -> None:
    """Prefill and steps, of one or of several tokens, from a start_pos of either kind."""
    params = VARIANTS[variant]
    state, tokens = random_state(params), random_tokens(3, MAX_SEQ_LEN, seed=1)
    model, got, start = make(params, state), [], 0
    for length in chunks:
        start_pos = torch.full((3,), start) if as_tensor else start
        got.append(model.forward(tokens[:, start : start + length], start_pos))
        start += length
    close(torch.cat(got, dim=1), oracle.logits(state, params, tokens))


@pytest.mark.parametrize("seqlen", [1, 3])
def test_rows_go_on_from_their_own_positions(model: Transformer, state: oracle.State, seqlen: int) -> None:
    """A right-padded prefill, then steps of `seqlen` tokens, each row at its own start_pos."""
    lengths, n_steps = [1, 9, 4, 13], 3
    texts = random_tokens(4, MAX_SEQ_LEN, seed=2)
    full = oracle.logits(state, GROUPED, texts)
    prompts = torch.full((4, max(lengths)), 7)
    for row, length in enumerate(lengths):
        prompts[row, :length] = texts[row, :length]
    prefilled = model.forward(prompts, 0)
    for row, length in enumerate(lengths):
        close(prefilled[row, :length], full[row, :length])
    for step in range(n_steps):
        starts = [length + step * seqlen for length in lengths]
        tokens = torch.stack([texts[row, start : start + seqlen] for row, start in enumerate(starts)])
        got = model.forward(tokens, torch.tensor(starts))
        for row, start in enumerate(starts):
            close(got[row], full[row, start : start + seqlen])


def test_a_smaller_batch_uses_the_first_rows_alone(model: Transformer, state: oracle.State) -> None:
    before = [attention.cache.keys[2:].clone() for attention in attentions(model)]
    tokens = random_tokens(2, 10)
    model.forward(tokens[:, :6], 0)
    close(model.forward(tokens[:, 6:], 6), oracle.logits(state, GROUPED, tokens)[:, 6:])
    assert all(torch.equal(a.cache.keys[2:], old) for a, old in zip(attentions(model), before, strict=True))


def positions(start: int, seqlen: int, rows: list[int]) -> CachePositions:
    return CachePositions(
        torch.full((len(rows),), start), kv_len=start + seqlen, rows=torch.tensor(rows), from_zero=start == 0
    )


def test_a_pass_over_named_rows_leaves_the_others_as_they_are(model: Transformer, state: oracle.State) -> None:
    tokens = random_tokens(4, 8, seed=3)
    model.forward(tokens, 0)
    kept = [(a.cache.keys[[0, 2]].clone(), a.cache.values[[0, 2]].clone()) for a in attentions(model)]
    fresh = random_tokens(2, 8, seed=4)
    close(model.forward(fresh, positions(0, 8, [3, 1])), oracle.logits(state, GROUPED, fresh))
    for attention, (k, v) in zip(attentions(model), kept, strict=True):
        assert torch.equal(attention.cache.keys[[0, 2]], k) and torch.equal(attention.cache.values[[0, 2]], v)
    step = random_tokens(4, 2, seed=5)
    texts = torch.cat([torch.stack([tokens[0], fresh[1], tokens[2], fresh[0]]), step], dim=1)
    close(model.forward(step, 8), oracle.logits(state, GROUPED, texts)[:, 8:])
    again = model.forward(step[[3, 0]], positions(8, 2, [3, 0]))
    close(again, oracle.logits(state, GROUPED, texts[[3, 0]])[:, 8:])


@pytest.mark.parametrize("kv_len", [10, 17, MAX_SEQ_LEN])
def test_a_pass_may_look_at_more_positions_than_are_filled(
    model: Transformer, state: oracle.State, kv_len: int
) -> None:
    """A mask hides those behind each row's end: what the cache holds there is noise."""
    tokens = random_tokens(3, 10, seed=3)
    model.forward(tokens[:, :7], 0)
    model.forward(tokens[:1, 7:9], 7)
    starts = torch.tensor([9, 7, 7])
    step = tokens.gather(1, starts.unsqueeze(1))
    got = model.forward(step, CachePositions(starts, kv_len=kv_len))
    close(got[:, 0], oracle.logits(state, GROUPED, tokens)[torch.arange(3), starts])


@pytest.mark.parametrize("as_int", [True, False], ids=["int", "rows"])
@pytest.mark.parametrize("start", [0, 5])
def test_only_the_wanted_position_of_each_row_is_projected(
    model: Transformer, state: oracle.State, start: int, as_int: bool
) -> None:
    projected: list[torch.Size] = []
    model.output.register_forward_pre_hook(lambda module, args: projected.append(args[0].shape))
    tokens = random_tokens(3, start + 6)
    if start:
        model.forward(tokens[:, :start], 0)
    last = torch.tensor([5, 0, 3])
    got = model.forward(tokens[:, start:], start if as_int else positions(start, 6, [0, 1, 2]), last=last)
    assert got.shape == (3, 1, 80) and projected[-1] == (3, 1, 48)
    close(got[:, 0], oracle.logits(state, GROUPED, tokens)[torch.arange(3), start + last])


@pytest.mark.parametrize("max_seq_len", [2, 5, MAX_SEQ_LEN])
def test_padding_may_reach_into_the_spare_positions(state: oracle.State, max_seq_len: int) -> None:
    """A row that is all but full stands beside a wide one, and beside a padding row; no other row is written to."""
    model = make(GROUPED, state, max_seq_len=max_seq_len)
    tokens, end = random_tokens(3, max_seq_len, seed=6), max_seq_len - 1
    full = oracle.logits(state, GROUPED, tokens)
    model(tokens[:, :end], 0)
    before = [attention.cache_k[1:, :].clone() for attention in attentions(model)]
    starts = torch.tensor([end, max_seq_len])  # the second row is padding alone
    wide = torch.cat([tokens[:2, end:], torch.zeros((2, SPARE_POSITIONS - 1), dtype=torch.int64)], dim=1)
    got = model(wide, CachePositions(starts, kv_len=max_seq_len), last=torch.tensor([0, 0]))
    close(got[0, 0], full[0, end])
    for attention, kept in zip(attentions(model), before, strict=True):
        assert torch.equal(attention.cache_k[1:], kept)
    got = model(tokens[1:, end:], CachePositions(torch.tensor([end, end]), max_seq_len, torch.tensor([1, 2])))
    close(got[:, 0], full[1:, end])


def test_the_cache_is_allocated_once_at_its_full_size(model: Transformer) -> None:
    def places() -> list[tuple[int, torch.Size]]:
        return [(b.data_ptr(), b.shape) for a in attentions(model) for b in (a.cache_k, a.cache_v)]

    before = places()
    model.forward(random_tokens(4, 9), 0)
    model.forward(random_tokens(4, 1), torch.tensor([9, 3, 9, 1]))
    assert places() == before and {shape for _, shape in before} == {(MAX_BATCH_SIZE, MAX_SEQ_LEN, 2, 8)}


def test_an_assigned_cache_is_a_copy(model: Transformer) -> None:
    """Two layers never share one cache: what one of them stores would be what the other attends to."""
    first, second = attentions(model)
    second.cache_k, second.cache_v = first.cache_k, first.cache_v
    held = second.cache.keys.data_ptr()
    assert torch.equal(second.cache_k, first.cache_k) and torch.equal(second.cache_v, first.cache_v)
    first.cache_k.zero_()
    assert second.cache_k.any() and held != first.cache.keys.data_ptr()
    with torch.inference_mode():
        second.cache_k = torch.ones(2, MAX_SEQ_LEN, 2, 8).bfloat16()  # other rows, another dtype: another buffer
    assert second.cache.keys.dtype == torch.bfloat16 and len(second.cache.keys) == 2
    second.cache_k[:] = 0.0


def test_a_cache_of_another_shape_is_refused(model: Transformer) -> None:
    attention = attentions(model)[0]
    before = attention.cache_v.clone()
    for shape in ((4, MAX_SEQ_LEN - 1, 2, 8), (4, MAX_SEQ_LEN, 1, 8), (4, 2, MAX_SEQ_LEN, 8), (4, 384)):
        with pytest.raises(ValueError, match=r"the cache must have shape \(max_batch_size, 24, 2, 8\), got \("):
            attention.cache_v = torch.zeros(shape)
    assert torch.equal(attention.cache_v, before)


@pytest.mark.parametrize("free", ["None", "del"])
def test_a_freed_cache_is_there_again_at_the_next_pass(model: Transformer, state: oracle.State, free: str) -> None:
    tokens = random_tokens(2, 8)
    for attention in attentions(model):
        if free == "del":
            del attention.cache_k, attention.cache_v
        else:
            attention.cache_k = attention.cache_v = None
        assert attention.cache_k is None and not list(attention.cache.buffers())
    with torch.inference_mode():
        close(model(tokens[:, :7], torch.tensor([0, 0])), oracle.logits(state, GROUPED, tokens)[:, :7])
    close(model(tokens[:, 7:], 7), oracle.logits(state, GROUPED, tokens)[:, 7:])
    attentions(model)[0].cache_k = None
    attentions(model)[0].cache_k = torch.ones(4, MAX_SEQ_LEN, 2, 8)
    assert attentions(model)[0].cache_k.eq(1.0).all()


def test_gradients_through_what_an_earlier_pass_stored_are_refused(model: Transformer) -> None:
    """They would lack the part of the earlier tokens, which a pass under `no_grad` holds constant on purpose."""
    tokens = random_tokens(2, 8)
    model.requires_grad_()
    model(tokens[:, :4], 0)
    with pytest.raises(RuntimeError, match="gradients cannot flow through the KV cache, got start_pos=4 after a pass"):
        model(tokens[:, 4:], 4)
    with torch.no_grad():
        model(tokens[:, 4:], 4)
        model(tokens[:, :4], 0)
    assert model(tokens[:, 4:6], 4).requires_grad
    with pytest.raises(RuntimeError, match="got start_pos=6 after a pass with gradients"):
        model(tokens[:, 6:], 6)


def test_a_pass_without_the_cache_takes_any_number_of_rows(model: Transformer, state: oracle.State) -> None:
    tokens = random_tokens(3 * MAX_BATCH_SIZE, 10, seed=8)
    before = [a.cache.keys.clone() for a in attentions(model)]
    close(model(tokens, 0, use_cache=False), oracle.logits(state, GROUPED, tokens))
    last = torch.full((len(tokens),), 9)
    close(model(tokens, 0, last=last, use_cache=False), oracle.logits(state, GROUPED, tokens)[:, 9:])
    close(model(tokens[:, :1], 0, use_cache=False), oracle.logits(state, GROUPED, tokens[:, :1]))
    assert all(torch.equal(a.cache.keys, old) for a, old in zip(attentions(model), before, strict=True))
    with pytest.raises(ValueError, match="start_pos must be 0 with use_cache=False, got 3"):
        model(tokens, 3, use_cache=False)
    with pytest.raises(ValueError, match="at most max_seq_len=24 tokens, got 25"):
        model(random_tokens(1, 25), 0, use_cache=False)


def test_what_is_made_in_inference_mode_works_outside_of_it(state: oracle.State) -> None:
    args = ModelArgs(**GROUPED, max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN)
    tokens = random_tokens(2, 8)
    with torch.inference_mode():
        by_hand = Transformer(args)
        copied = copy.deepcopy(make(GROUPED, state))
    by_hand.load_state_dict(state)
    for model in (by_hand, copied):
        close(model(tokens[:, :7], 0), oracle.logits(state, GROUPED, tokens)[:, :7])
        close(model(tokens[:, 7:], 7), oracle.logits(state, GROUPED, tokens)[:, 7:])


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("edit", ["replaced", "in place", "in place in a view", "deep copy"])
def test_a_mask_that_a_hook_changes_counts(model: Transformer, state: oracle.State, edit: str, inference: bool) -> None:
    """Also at position 0, where the network's own mask, unedited, is left to a kernel for causal attention."""
    tokens = random_tokens(1, 9)
    others = tokens.index_fill(1, torch.tensor([1]), int(tokens[0, 1]) // 2)

    def hide_position_1(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, start_pos, freqs_cis, mask = args
        mask = {"replaced": mask.clone, "deep copy": lambda: copy.deepcopy(mask)}.get(edit, lambda: mask)()
        if edit == "in place in a view":
            mask[2:][:, 1] = -math.inf
        else:
            mask[2:, 1] = -math.inf
        return None if edit.startswith("in place") else (x, start_pos, freqs_cis, mask)

    with torch.inference_mode(inference):
        close(model(tokens, 0), oracle.logits(state, GROUPED, tokens))
        for layer in model.layers:
            layer.register_forward_pre_hook(hide_position_1)
        close(model(tokens, 0)[:, 2:], model(others, 0)[:, 2:])


def test_a_pass_beyond_the_cache_is_an_error_and_leaves_it_usable(model: Transformer, state: oracle.State) -> None:
    tokens = random_tokens(4, 10)
    model.forward(tokens[:, :9], 0)
    for bsz, seqlen, start_pos, first, end in (
        (MAX_BATCH_SIZE + 1, 1, 0, 0, 1),
        (1, MAX_SEQ_LEN + 1, 0, 0, 25),
        (2, 1, MAX_SEQ_LEN, 24, 25),
        (2, 1, -1, -1, 0),
        (2, 3, torch.tensor([0, MAX_SEQ_LEN - 2]), 0, 25),
        (2, 1, torch.tensor([-2, 4]), -2, 5),
    ):
        sizes = rf"max_batch_size=4 and max_seq_len=24, got {bsz} rows from position {first} to {end}"
        with pytest.raises(ValueError, match=f"must fit in the KV cache of {sizes}"):
            model.forward(random_tokens(bsz, seqlen), start_pos)
    close(model.forward(tokens[:, 9:], 9), oracle.logits(state, GROUPED, tokens)[:, 9:])
    with pytest.raises(ValueError, match=r"start_pos must be an int or a tensor of 3 ints, one per row, got 2"):
        model.forward(random_tokens(3, 1), torch.tensor([1, 2]))


def test_a_state_that_lacks_a_tensor_is_an_error(state: oracle.State) -> None:
    args = ModelArgs(**GROUPED, max_batch_size=1, max_seq_len=8)
    lacking = {name: tensor for name, tensor in state.items() if name != "layers.1.ffn_norm.weight"}
    with pytest.raises(RuntimeError, match=r"layers\.1\.ffn_norm\.weight"):
        Transformer.from_state(args, lacking, cache_dtype=torch.float32)


def test_from_state_keeps_the_very_tensors_and_makes_an_empty_cache_in_the_dtype_asked_for(state: oracle.State) -> None:
    args = ModelArgs(**GROUPED, max_batch_size=1, max_seq_len=4)
    model = Transformer.from_state(args, dict(state), cache_dtype=torch.bfloat16)
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in model.state_dict().items())
    assert all(buffer.dtype == torch.bfloat16 and not buffer.any() for buffer in model.buffers())
    assert not any(module.training for module in model.modules())


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="needs a CPU that multiplies bfloat16")
@pytest.mark.parametrize("on_disk", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packed_weights_are_the_same_network_in_bfloat16(on_disk: torch.dtype) -> None:
    state = {name: tensor.bfloat16().to(on_disk) for name, tensor in oracle.random_state(GROUPED, seed=5).items()}
    places = sorted(tensor.data_ptr() for name, tensor in state.items() if "norm" not in name and "tok" not in name)
    args = ModelArgs(**GROUPED, max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN)
    model = Transformer.from_state(args, state, cache_dtype=torch.bfloat16)
    released: list[int] = []
    model.pack(torch.bfloat16, release=lambda weight: released.append(weight.data_ptr()))
    assert sorted(released) == places

    tokens = random_tokens(4, MAX_SEQ_LEN)
    exact = oracle.logits({name: tensor.float() for name, tensor in state.items()}, GROUPED, tokens)
    prefilled = model.forward(tokens, 0)
    stepped = torch.cat([model.forward(tokens[:, i : i + 1], i) for i in range(MAX_SEQ_LEN)], dim=1)
    for got in (prefilled, stepped):
        assert got.dtype == torch.float32
        assert (got - exact).abs().max() < 20 * torch.finfo(torch.bfloat16).eps * exact.std()
    assert {tensor.dtype for tensor in state.values()} == {on_disk}
    assert all(layer._packed for layer in packable_layers(model))  # they were what computed
    held = model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in state.items() if "norm" not in name)


def test_gradients_flow_through_the_tokens_of_a_later_pass(state: oracle.State) -> None:
    """What an earlier pass left in the cache is a constant: the gradient is that of a function of the new tokens."""
    tokens = random_tokens(2, 10)
    name = "layers.1.attention.wk.weight"

    def loss(model: Transformer) -> Tensor:
        return model(tokens[:, 6:], 6).square().mean()

    model = make(GROUPED, state)
    model(tokens[:, :6], 0)
    model.requires_grad_()
    loss(model).backward()
    weight = model.get_parameter(name)
    assert weight.grad is not None
    direction = random_normal(*weight.shape)
    numbers = []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(direction, alpha=1e-2 * sign)
            numbers.append(loss(model))
            weight.sub_(direction, alpha=1e-2 * sign)
    slope = (numbers[0] - numbers[1]) / 2e-2
    assert (weight.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.02)


def test_gradients_with_rows_at_different_positions_are_refused(model: Transformer) -> None:
    model.requires_grad_()
    with pytest.raises(RuntimeError, match="start_pos must be an int when gradients are required"):
        model(random_tokens(2, 1), torch.tensor([3, 5]))


@pytest.mark.parametrize("shape", [(2, 0), (0, 1)])
def test_an_empty_pass_gives_empty_logits(model: Transformer, shape: tuple[int, int]) -> None:
    assert model(torch.zeros(shape, dtype=torch.int64), 0).shape == (*shape, 80)


def test_gradients_are_recorded_only_where_they_are_asked_for(state: oracle.State) -> None:
    by_hand = Transformer(ModelArgs(**GROUPED, max_batch_size=1, max_seq_len=8))
    by_hand.load_state_dict(state)
    loaded = make(GROUPED, state)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    for model in (by_hand, loaded):
        assert not model(random_tokens(1, 3), 0).requires_grad
        assert model.requires_grad_()(random_tokens(1, 3), 0).requires_grad
        with torch.no_grad():
            assert not model(random_tokens(1, 3), 0).requires_grad


def test_rms_norm_casts_before_the_weight_multiplies() -> None:
    """In bfloat16 the order shows in the last bit; `x / rms(x)` itself is float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator).bfloat16()
    norm = RMSNorm(64, eps=1e-5)
    norm.weight = torch.nn.Parameter((1 + 0.3 * torch.randn(64, generator=generator)).bfloat16())
    quotient = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = quotient.float().bfloat16() * norm.weight
    multiplied_first = (quotient * norm.weight.double()).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) != expected).float().mean() < 0.01  # a quotient on the edge between two bfloat16 numbers
    assert (norm(x) != multiplied_first).float().mean() > 0.1


def test_rotations_are_exact_over_the_released_context() -> None:
    """Against float64, for 4096 positions of the released head size."""
    freqs_cis = precompute_freqs_cis(128, 4096, 10000.0)
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    angles = torch.outer(torch.arange(4096, dtype=torch.float64), frequencies)
    exact = torch.complex(angles.cos(), angles.sin())
    assert freqs_cis.dtype == torch.complex64
    assert (freqs_cis - exact).abs().max() < 1e-3


def test_rotary_embedding_turns_interleaved_pairs_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    xq, xk = (torch.randn(2, 500, heads, 8, generator=generator).bfloat16() for heads in (3, 1))
    rotated = apply_rotary_emb(xq, xk, precompute_freqs_cis(8, 500, 10000.0))
    for got, x in zip(rotated, (xq, xk), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, oracle.rotate(x.float(), 10000.0).bfloat16(), atol=2**-9, rtol=2**-8)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seqlen", [1, 6, 20])
@pytest.mark.parametrize("takes_groups", [True, False])
def test_attention_equals_its_formula(
    monkeypatch: pytest.MonkeyPatch, takes_groups: bool, seqlen: int, n_kv_heads: int
) -> None:
    monkeypatch.setattr("llama.layers.attention._CPU_KERNEL_TAKES_GROUPS", takes_groups)
    generator, kv_len = torch.Generator().manual_seed(0), max(seqlen, 6)
    queries, keys, values = (
        torch.randn(2, heads, kv_len, 8, generator=generator, dtype=torch.float64)
        for heads in (4, n_kv_heads, n_kv_heads)
    )
    queries = queries[:, :, kv_len - seqlen :]
    group = 4 // n_kv_heads
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys.repeat_interleave(group, 1)) / math.sqrt(8)
    allowed = torch.ones(seqlen, kv_len, dtype=torch.bool).tril(kv_len - seqlen)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    expected = torch.einsum("bhqk,bhkd->bhqd", weights, values.repeat_interleave(group, 1)).float()
    short = [t.float() for t in (queries, keys, values)]
    close(attend(*short, None, is_causal=seqlen > 1), expected, 1e-5)
    close(attend(*short, allowed.expand(2, 1, seqlen, kv_len)), expected, 1e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # of what is added
        added = torch.zeros(seqlen, kv_len, dtype=dtype).masked_fill(~allowed, -math.inf)
        close(attend(*short, added), expected, 1e-5)
    unmasked = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), values.repeat_interleave(group, 1)).float()
    close(attend(*short, None), unmasked, 1e-5)
    added = torch.randn(2, 4, seqlen, kv_len, generator=generator)  # another for each head
    biased = torch.einsum("bhqk,bhkd->bhqd", (scores + added).softmax(-1), values.repeat_interleave(group, 1)).float()
    close(attend(*short, added), biased, 1e-5)


@pytest.mark.parametrize("seqlen", [1, 2])
def test_attention_scores_are_float32_under_bfloat16(seqlen: int) -> None:
    """Scores of 200.5 and 200, which bfloat16 cannot tell apart, share the weight as softmax(0.5, 0) does."""
    query = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, seqlen, 4).bfloat16()
    keys = torch.tensor([[400.0, 1.0, 0.0, 0.0], [400.0, 0.0, 0.0, 0.0]]).view(1, 1, 2, 4).bfloat16()
    values = torch.tensor([[1.0] * 4, [0.0] * 4]).view(1, 1, 2, 4).bfloat16()
    got = attend(query, keys, values, None)[0, 0, -1]
    close(got.float(), torch.full((4,), 1 / (1 + math.exp(-0.5))), 4e-3)
