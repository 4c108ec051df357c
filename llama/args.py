"""The hyper-parameters of a Llama 2 network, validated, and every size that follows from them.

Knows nothing of tensors, files or processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

PREFILL_TOKENS = 1024  # enough to keep the arithmetic units busy; more cost memory


@dataclass(frozen=True)
class ModelArgs:
    """What `params.json` says of a network, with the two sizes that a run adds.

    Field names are those of the released `params.json`. `vocab_size=-1` stands for "the tokenizer's" and has to be
    replaced before a network is built. `max_batch_size` and `max_seq_len` size the KV cache.

    Raises:
        ValueError: a field has the wrong type or range, or the head counts do not divide each other.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads (multi-head attention)
    vocab_size: int = -1
    multiple_of: int = 256  # the hidden size of the feed-forward is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(field.name, field.type, getattr(self, field.name))
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} over n_heads={self.n_heads} does not give heads of a whole, even size, "
                "which rotary embedding needs"
            )
        if self.hidden_dim < 1:
            raise ValueError(f"ffn_dim_multiplier={self.ffn_dim_multiplier} leaves the feed-forward no hidden size")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads; fewer than `n_heads` under grouped-query attention."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: 2/3 of 4 `dim`, scaled, rounded up to `multiple_of` (the released recipe)."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    @property
    def prefill_tokens(self) -> int:
        """Most positions that one pass of a prefill computes; more rows are taken in groups, to bound activations."""
        return min(self.max_batch_size * self.max_seq_len, max(self.max_seq_len, PREFILL_TOKENS))

    def check_shards(self, model_parallel_size: int) -> None:
        """Raises ValueError, with the numbers, unless each of `model_parallel_size` ranks gets an equal whole part."""
        sizes = {
            "n_heads": self.n_heads,
            "n_kv_heads": self.kv_heads,
            "the feed-forward's hidden size": self.hidden_dim,
            "dim": self.dim,
            "vocab_size": self.vocab_size,
        }
        for name, size in sizes.items():
            if size % model_parallel_size:
                raise ValueError(
                    f"{name} ({size}) is not a multiple of the model-parallel size ({model_parallel_size}), "
                    "so this network cannot be split over that many ranks"
                )


def _check_field(name: str, annotation: object, value: object) -> None:
    """One field's type and range. Annotations are strings here: `from __future__ import annotations`."""
    if value is None and "None" in str(annotation):
        return
    takes_float = "float" in str(annotation)
    number = isinstance(value, (int, float) if takes_float else int) and not isinstance(value, bool)
    if not number:
        raise ValueError(f"{name} is {value!r}; it takes {'a number' if takes_float else 'a whole number'}")
    assert isinstance(value, (int, float))
    if name == "vocab_size" and value == -1:
        return
    if not 0 < value < 2**63:
        raise ValueError(f"{name} is {value!r}; it takes a number above zero, below 2**63")
