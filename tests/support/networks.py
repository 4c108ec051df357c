"""A small random network, for tests of what runs it."""

from __future__ import annotations

from typing import Any

import torch

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
