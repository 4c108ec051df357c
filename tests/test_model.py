"""The network against the oracle: without a cache, through the cache in every way, and number by number in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama import ModelArgs, Transformer, runtime
from llama.model import KVCache, RMSNorm, apply_rotary_emb, attend, precompute_freqs_cis
from llama.projection import can_pack
from tests import oracle

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
    runtime.init_process_groups(1, torch.device("cpu"))


def random_state(params: dict[str, Any]) -> oracle.State:
    """Weights under which each hyper-parameter shows: embeddings so small that `norm_eps` counts."""
    state = oracle.random_state(params, seed=5)
    return state | {"tok_embeddings.weight": 2e-3 * state["tok_embeddings.weight"]}


def make(params: dict[str, Any], state: oracle.State, dtype: torch.dtype = torch.float32, **sizes: int) -> Transformer:
    args = ModelArgs(**params, **{"max_batch_size": MAX_BATCH_SIZE, "max_seq_len": MAX_SEQ_LEN} | sizes)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    return Transformer.from_state(args, weights, cache_dtype=dtype)


def random_tokens(bsz: int, seqlen: int, seed: int = 0) -> Tensor:
    return torch.randint(80, (bsz, seqlen), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def state() -> oracle.State:
    return random_state(GROUPED)


@pytest.fixture
def model(state: oracle.State) -> Transformer:
    """Its cache is full of what an earlier call left: noise that must never be attended to."""
    model = make(GROUPED, state)
    for cache in model.caches:
        cache.k.normal_(std=100.0)
        cache.v.normal_(std=100.0)
    return model


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
def test_float32_logits_equal_the_oracles(params: dict[str, Any]) -> None:
    state, tokens = random_state(params), random_tokens(3, MAX_SEQ_LEN)
    got = make(params, state).forward(tokens, 0)
    assert got.dtype == torch.float32
    assert got.shape == (3, MAX_SEQ_LEN, 80)
    close(got, oracle.logits(state, params, tokens))


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("rope_theta", {"rope_theta": 10000.0}),
        ("norm_eps", {"norm_eps": 1e-5}),
        ("grouped-query", {"n_heads": 3, "n_kv_heads": 1}),
    ],
)
def test_a_hyper_parameter_left_out_would_show(variant: str, changed: dict[str, Any]) -> None:
    """The tests above can only fail if the weights make each hyper-parameter count."""
    params = VARIANTS[variant]
    state, tokens = random_state(params), random_tokens(3, MAX_SEQ_LEN)
    difference = oracle.logits(state, params, tokens) - oracle.logits(state, params | changed, tokens)
    assert difference.abs().max() > 1e-2


def test_rope_theta_defaults_to_10000_and_heads_to_multi_head() -> None:
    params, tokens = MULTI_HEAD, random_tokens(2, 20)
    weights = random_state(params)
    explicit = params | {"rope_theta": 10000.0, "n_kv_heads": 6, "ffn_dim_multiplier": 1.0}
    assert torch.equal(make(params, weights).forward(tokens, 0), make(explicit, weights).forward(tokens, 0))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("chunks", [[7, *[1] * 17], [1, 5, 1, 1, 16], [12, 12], [24]], ids=str)
@pytest.mark.parametrize("variant", ["multi-head", "grouped-query", "multi-query"])
def test_cached_logits_equal_uncached_ones(variant: str, chunks: list[int], as_tensor: bool) -> None:
    """Prefill and steps, of one or of several tokens, from a start_pos of either kind."""
    params = VARIANTS[variant]
    state, tokens = random_state(params), random_tokens(3, MAX_SEQ_LEN, seed=1)
    model = make(params, state)
    for cache in model.caches:  # as an earlier call might leave it
        cache.k.fill_(100.0)
        cache.v.fill_(100.0)
    got, start = [], 0
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
    before = [cache.k[2:].clone() for cache in model.caches]
    tokens = random_tokens(2, 10)
    model.forward(tokens[:, :6], 0)
    close(model.forward(tokens[:, 6:], 6), oracle.logits(state, GROUPED, tokens)[:, 6:])
    assert all(torch.equal(cache.k[2:], old) for cache, old in zip(model.caches, before, strict=True))


def test_a_pass_over_named_rows_leaves_the_others_as_they_are(model: Transformer, state: oracle.State) -> None:
    tokens = random_tokens(4, 8, seed=3)
    model.forward(tokens, 0)
    kept = [(cache.k[[0, 2]].clone(), cache.v[[0, 2]].clone()) for cache in model.caches]
    fresh = random_tokens(2, 8, seed=4)
    h = model.hidden_states(fresh, 0, kv_len=8, rows=torch.tensor([3, 1]))
    close(model.logits(h), oracle.logits(state, GROUPED, fresh))
    for cache, (k, v) in zip(model.caches, kept, strict=True):
        assert torch.equal(cache.k[[0, 2]], k) and torch.equal(cache.v[[0, 2]], v)
    step = random_tokens(4, 2, seed=5)
    texts = torch.cat([torch.stack([tokens[0], fresh[1], tokens[2], fresh[0]]), step], dim=1)
    close(model.forward(step, 8), oracle.logits(state, GROUPED, texts)[:, 8:])
    again = model.hidden_states(step[[3, 0]], 8, kv_len=10, rows=torch.tensor([3, 0]))
    close(model.logits(again), oracle.logits(state, GROUPED, texts[[3, 0]])[:, 8:])


def test_a_moved_row_goes_on_in_its_new_place(model: Transformer, state: oracle.State) -> None:
    tokens = random_tokens(3, 9, seed=6)
    model.forward(tokens[:, :8], 0)
    for cache in model.caches:
        behind = cache.k[0, :, 8:].clone()
        cache.move_row(2, 0, 8)
        assert torch.equal(cache.k[0, :, 8:], behind)
    got = model.forward(tokens[2:, 8:], 8)
    close(got, oracle.logits(state, GROUPED, tokens[2:])[:, 8:])


def test_the_cache_is_allocated_once_at_its_full_size(model: Transformer) -> None:
    def places() -> list[int]:
        return [buffer.data_ptr() for cache in model.caches for buffer in (cache.k, cache.v)]

    before = places()
    model.forward(random_tokens(4, 9), 0)
    model.forward(random_tokens(4, 1), torch.tensor([9, 3, 9, 1]))
    assert places() == before
    for cache in model.caches:
        assert isinstance(cache, KVCache)
        assert cache.k.shape == cache.v.shape == (MAX_BATCH_SIZE, 2, MAX_SEQ_LEN, 8)


@pytest.mark.parametrize(
    ("bsz", "seqlen", "start_pos"),
    [
        (MAX_BATCH_SIZE + 1, 1, 0),
        (1, MAX_SEQ_LEN + 1, 0),
        (2, 1, MAX_SEQ_LEN),
        (2, 3, torch.tensor([0, MAX_SEQ_LEN - 2])),
    ],
)
def test_a_pass_beyond_the_cache_is_an_error_and_leaves_it_usable(
    model: Transformer, state: oracle.State, bsz: int, seqlen: int, start_pos: int | Tensor
) -> None:
    tokens = random_tokens(4, 10)
    model.forward(tokens[:, :9], 0)
    with pytest.raises(ValueError, match=rf"batch of {bsz} .*max_batch_size=4 and max_seq_len=24"):
        model.forward(random_tokens(bsz, seqlen), start_pos)
    close(model.forward(tokens[:, 9:], 9), oracle.logits(state, GROUPED, tokens)[:, 9:])


def test_the_whole_cache_can_be_filled(model: Transformer, state: oracle.State) -> None:
    tokens = random_tokens(MAX_BATCH_SIZE, MAX_SEQ_LEN)
    full = oracle.logits(state, GROUPED, tokens)
    close(model.forward(tokens, 0), full)
    starts = torch.tensor([MAX_SEQ_LEN - 1, 0, 5, MAX_SEQ_LEN - 1])
    got = model.forward(tokens.gather(1, starts.unsqueeze(1)), starts)
    close(got[:, 0], full[torch.arange(MAX_BATCH_SIZE), starts])


def test_parameters_bear_the_released_names_and_shapes(model: Transformer) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == oracle.shapes(GROUPED)


def test_a_transformer_made_plainly_takes_a_state_dict(state: oracle.State) -> None:
    args = ModelArgs(**GROUPED, max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN)
    model = Transformer(args)
    model.load_state_dict(state)
    tokens = random_tokens(2, 12)
    assert torch.equal(model.forward(tokens, 0), make(GROUPED, state).forward(tokens, 0))
    close(model.forward(tokens[:, 11:], 11), oracle.logits(state, GROUPED, tokens)[:, 11:])


def test_a_state_that_lacks_a_tensor_is_an_error(state: oracle.State) -> None:
    args = ModelArgs(**GROUPED, max_batch_size=1, max_seq_len=8)
    lacking = {name: tensor for name, tensor in state.items() if name != "layers.1.ffn_norm.weight"}
    with pytest.raises(RuntimeError, match=r"layers\.1\.ffn_norm\.weight"):
        Transformer.from_state(args, lacking, cache_dtype=torch.float32)


class _Allocations(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation returns in this machine's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        made = isinstance(out, Tensor) and out.device.type == "cpu"
        if made and all(out.data_ptr() != arg.data_ptr() for arg in args if isinstance(arg, Tensor)):
            self.sizes.append(out.numel())
        return out


def test_from_state_keeps_the_very_tensors_and_allocates_nothing_of_their_size() -> None:
    params = GROUPED | {"vocab_size": 6000}
    state = oracle.random_state(params, seed=0)
    args = ModelArgs(**params, max_batch_size=1, max_seq_len=4)
    with _Allocations() as allocations:
        model = Transformer.from_state(args, state, cache_dtype=torch.float32)
    assert max(allocations.sizes) < 500 < min(w.numel() for name, w in state.items() if "norm" not in name)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert places == {name: tensor.data_ptr() for name, tensor in state.items()}


def test_from_state_makes_an_empty_cache_in_the_dtype_asked_for(state: oracle.State) -> None:
    model = make(GROUPED, state, torch.bfloat16)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(not cache.k.any() and not cache.v.any() for cache in model.caches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_a_short_dtype_are_float32_and_close(dtype: torch.dtype) -> None:
    params = GROUPED
    state = {name: tensor.to(dtype).float() for name, tensor in oracle.random_state(params, seed=5).items()}
    tokens = random_tokens(4, MAX_SEQ_LEN)
    exact = oracle.logits(state, params, tokens)
    model = make(params, state, dtype)
    prefilled = model.forward(tokens, 0)
    stepped = torch.cat([model.forward(tokens[:, i : i + 1], i) for i in range(MAX_SEQ_LEN)], dim=1)
    for got in (prefilled, stepped):
        assert got.dtype == torch.float32
        assert (got - exact).abs().max() < 20 * torch.finfo(dtype).eps * exact.std()


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="needs a CPU that multiplies bfloat16")
@pytest.mark.parametrize("on_disk", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packed_weights_are_the_same_network_in_bfloat16(on_disk: torch.dtype) -> None:
    state = {name: tensor.bfloat16().to(on_disk) for name, tensor in oracle.random_state(GROUPED, seed=5).items()}
    places = sorted(tensor.data_ptr() for name, tensor in state.items() if "norm" not in name and "tok" not in name)
    args = ModelArgs(**GROUPED, max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN)
    model = Transformer.from_state(args, state, cache_dtype=torch.bfloat16)
    released: list[int] = []
    model.pack(torch.bfloat16, lambda weight: released.append(weight.data_ptr()))
    assert sorted(released) == places

    tokens = random_tokens(4, MAX_SEQ_LEN)
    exact = oracle.logits({name: tensor.float() for name, tensor in state.items()}, GROUPED, tokens)
    prefilled = model.forward(tokens, 0)
    stepped = torch.cat([model.forward(tokens[:, i : i + 1], i) for i in range(MAX_SEQ_LEN)], dim=1)
    for got in (prefilled, stepped):
        assert got.dtype == torch.float32
        assert (got - exact).abs().max() < 20 * torch.finfo(torch.bfloat16).eps * exact.std()
    assert {tensor.dtype for tensor in state.values()} == {on_disk}


def test_forward_records_no_gradient(model: Transformer) -> None:
    assert torch.is_grad_enabled()
    assert not model.forward(random_tokens(1, 3), 0).requires_grad
    assert torch.is_grad_enabled()


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
@pytest.mark.parametrize("seqlen", [1, 6])
def test_attention_equals_its_formula(seqlen: int, n_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(2, heads, 6, 8, generator=generator, dtype=torch.float64) for heads in (4, n_kv_heads, n_kv_heads)
    )
    queries = queries[:, :, 6 - seqlen :]
    group = 4 // n_kv_heads
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys.repeat_interleave(group, 1)) / math.sqrt(8)
    allowed = torch.ones(seqlen, 6, dtype=torch.bool).tril(6 - seqlen)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    expected = torch.einsum("bhqk,bhkd->bhqd", weights, values.repeat_interleave(group, 1)).float()
    short = [t.float() for t in (queries, keys, values)]
    close(attend(*short, None), expected, 1e-5)
    close(attend(*short, allowed.expand(2, 1, seqlen, 6)), expected, 1e-5)


@pytest.mark.parametrize("seqlen", [1, 2])
def test_attention_scores_are_float32_under_bfloat16(seqlen: int) -> None:
    """Scores of 200.5 and 200, which bfloat16 cannot tell apart, share the weight as softmax(0.5, 0) does."""
    query = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, seqlen, 4).bfloat16()
    keys = torch.tensor([[400.0, 1.0, 0.0, 0.0], [400.0, 0.0, 0.0, 0.0]]).view(1, 1, 2, 4).bfloat16()
    values = torch.tensor([[1.0] * 4, [0.0] * 4]).view(1, 1, 2, 4).bfloat16()
    got = attend(query, keys, values, None)[0, 0, -1]
    close(got.float(), torch.full((4,), 1 / (1 + math.exp(-0.5))), 4e-3)
