"""The packed form of the weights: the same products as the plain layers, and no more than a form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama import Llama, ModelArgs, Transformer, projection, runtime
from llama.projection import can_pack
from tests import oracle
from tests.ranks import run_ranks

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="needs a CPU with bfloat16 in oneDNN")


def networks(params: dict[str, Any]) -> tuple[Transformer, Transformer]:
    """The same bfloat16 weights, plain and packed."""
    args = ModelArgs(**params, max_batch_size=4, max_seq_len=64)
    state = {name: tensor.bfloat16() for name, tensor in oracle.random_state(params, seed=3).items()}
    plain, packed = (Transformer.from_state(args, dict(state)) for _ in range(2))
    packed.pack(torch.bfloat16, lambda weight: None)
    return plain, packed


@needs_packing
@pytest.mark.parametrize("seqlen", [1, 3, 40])
def test_packed_and_plain_give_the_same_logits(llama: Llama, params: dict[str, Any], seqlen: int) -> None:
    plain, packed = networks(params)
    tokens = torch.randint(params["vocab_size"], (4, seqlen), generator=torch.Generator().manual_seed(0))
    for start_pos, part in ((0, tokens), (seqlen, tokens[:, :1])):
        expected = plain.forward(part, start_pos)
        torch.testing.assert_close(packed.forward(part, start_pos), expected, rtol=0, atol=0.05 * expected.std().item())


@needs_packing
def test_each_weight_is_released_once_and_stays_readable(llama: Llama, params: dict[str, Any]) -> None:
    args = ModelArgs(**params, max_batch_size=1, max_seq_len=8)
    state = oracle.random_state(params, seed=3)
    model = Transformer.from_state(args, state, cache_dtype=torch.bfloat16)
    released: list[torch.Tensor] = []
    model.pack(torch.bfloat16, released.append)
    matrices = [name for name in state if "norm" not in name and "embeddings" not in name]
    assert {weight.data_ptr() for weight in released} == {state[name].data_ptr() for name in matrices}
    assert len(released) == len(matrices)
    held = model.state_dict()
    assert all(held[name] is not None and torch.equal(held[name], state[name]) for name in matrices)
    assert model.forward(torch.tensor([[1, 2]]), 0).isfinite().all()


def _two_ranks(rank: int, params: dict[str, Any]) -> list[torch.Tensor]:
    runtime.init_process_groups(2, CPU)
    args = ModelArgs(**params, max_batch_size=2, max_seq_len=16)
    shapes = {name: tensor.shape for name, tensor in Transformer(args).state_dict().items()}
    stream = torch.Generator().manual_seed(rank)
    state = {name: (0.1 * torch.randn(shape, generator=stream)).bfloat16() for name, shape in shapes.items()}
    outputs = []
    for packs in (False, True):
        model = Transformer.from_state(args, dict(state))
        if packs:
            model.pack(torch.bfloat16, lambda weight: None)
        outputs.append(model.forward(torch.tensor([[1, 2, 3], [4, 5, 6]]), 0))
    return outputs


@needs_packing
def test_packed_and_plain_agree_on_two_ranks(params: dict[str, Any]) -> None:
    for plain, packed in run_ranks(2, _two_ranks, params):
        torch.testing.assert_close(packed, plain, rtol=0, atol=0.05 * plain.std().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_joined_layers_give_the_same_logits_and_keep_their_weights(
    llama: Llama, params: dict[str, Any], dtype: torch.dtype
) -> None:
    args = ModelArgs(**params, max_batch_size=4, max_seq_len=64)
    state = {name: tensor.to(dtype) for name, tensor in oracle.random_state(params, seed=3).items()}
    plain, joined = (Transformer.from_state(args, dict(state)) for _ in range(2))
    joined.join()
    tokens = torch.randint(params["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(0))
    expected = plain.forward(tokens, 0)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(joined.forward(tokens, 0), expected, rtol=0, atol=tolerance * expected.std().item())
    held = joined.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in state.items())


def test_joining_holds_no_weight_twice(llama: Llama, params: dict[str, Any]) -> None:
    args = ModelArgs(**params, max_batch_size=1, max_seq_len=8)
    state = oracle.random_state(params, seed=3)
    n_bytes = sum(tensor.nbytes for tensor in state.values())
    model = Transformer.from_state(args, state)
    model.join()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == n_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_row_and_several_give_the_same_and_leave_the_switch_of_onednn(
    llama: Llama, params: dict[str, Any], dtype: torch.dtype
) -> None:
    """The matrix-vector kernel is taken for one row only."""
    plain = Transformer.from_state(
        ModelArgs(**params, max_batch_size=4, max_seq_len=64),
        {name: tensor.to(dtype) for name, tensor in oracle.random_state(params, seed=3).items()},
    )
    tokens = torch.randint(params["vocab_size"], (4, 1), generator=torch.Generator().manual_seed(0))
    together = plain.forward(tokens, 0)
    enabled = torch._C._get_mkldnn_enabled()
    for row in range(4):
        alone = plain.forward(tokens[row : row + 1], 0)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=tolerance * together.std().item())
    assert torch._C._get_mkldnn_enabled() == enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_not_packed(dtype: torch.dtype) -> None:
    assert not can_pack(CPU, dtype)


def test_other_devices_are_not_packed() -> None:
    assert not can_pack(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, None])
def test_operators_that_are_gone_or_wrong_are_found_out(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    """As in a build of torch without oneDNN, or one that gives these private operators another meaning."""

    def linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        if error:
            raise error
        return torch.zeros(len(x), 64, dtype=x.dtype)

    monkeypatch.setattr(projection, "packed_linear", linear)
    assert not can_pack(CPU, torch.bfloat16)
