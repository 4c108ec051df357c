"""Small random networks, for tests of what runs them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llama import ModelArgs, Transformer
from llama.distributed.groups import init_process_groups
from tests.support import oracle

PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 60,
    "multiple_of": 16,
    "norm_eps": 1e-5,
}
MAX_SEQ_LEN = 20


def make_network(
    max_batch_size: int,
    max_seq_len: int = MAX_SEQ_LEN,
    *,
    params: dict[str, Any] = PARAMS,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """A network of `oracle.random_state(params, seed)`, whose cache is full of what an earlier call left."""
    init_process_groups(1, torch.device("cpu"))
    args = ModelArgs(**params, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    state = {name: tensor.to(dtype) for name, tensor in oracle.random_state(params, seed=seed).items()}
    model = Transformer.from_state(args, state, cache_dtype=dtype)
    for layer in model.layers:
        layer.attention.cache.keys.fill_(100.0)
        layer.attention.cache.values.fill_(100.0)
    return model


class ForwardOnly:
    """All that Meta's own loop asks of a network: `params`, and `forward` with one int position for all rows."""

    def __init__(self, state: oracle.State, max_batch_size: int) -> None:
        self.params = SimpleNamespace(**PARAMS, max_batch_size=max_batch_size, max_seq_len=MAX_SEQ_LEN)
        self._state = state
        self._seen = torch.zeros((max_batch_size, MAX_SEQ_LEN), dtype=torch.int64)

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        assert type(start_pos) is int
        bsz, end = tokens.size(0), start_pos + tokens.size(1)
        self._seen[:bsz, start_pos:end] = tokens
        return oracle.logits(self._state, PARAMS, self._seen[:bsz, :end])[:, start_pos:]


def patched(model: Transformer) -> Transformer:
    """The network with a `forward` that takes an int start_pos, as Meta's does."""
    forward = model.forward

    def int_forward(tokens: Tensor, start_pos: int) -> Tensor:
        assert type(start_pos) is int
        return forward(tokens, start_pos)

    model.forward = int_forward  # type: ignore[method-assign, assignment]
    return model
