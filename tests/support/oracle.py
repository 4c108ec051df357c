"""What the network is compared with: the recipe's own, which shares no code with it; and random weights.

`params` is the content of a `params.json`.
"""

import torch

from recipe.network import Params as Params
from recipe.network import State as State
from recipe.network import attention as attention
from recipe.network import feed_forward as feed_forward
from recipe.network import logits as logits
from recipe.network import rms_norm as rms_norm
from recipe.network import rotate as rotate
from recipe.network import shapes as shapes


def random_state(params: Params, seed: int) -> State:
    """Random float32 weights of the right shapes; norms near 1, so that a norm left out shows."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes(params).items()}
    return {name: 1 + 0.1 * w if w.dim() == 1 else w / w.shape[1] ** 0.5 for name, w in state.items()}


def shard(state: State, rank: int, n_ranks: int) -> State:
    """A rank's part of whole tensors, as released: norms whole; wo, w2 and the embedding by columns; others by rows."""
    part = {}
    for name, whole in state.items():
        dim = 1 if any(key in name for key in ("wo.", "w2.", "tok_embeddings.")) else 0
        part[name] = whole if "norm" in name else whole.chunk(n_ranks, dim)[rank].clone()
    return part
