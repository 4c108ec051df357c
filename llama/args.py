"""The hyperparameters of a Llama 2 network, and all sizes derived from them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llama.errors import quote

PREFILL_TOKENS = 1024  # enough to be compute-bound; more would only take more memory


@dataclass
class ModelArgs:
    """The hyperparameters in `params.json`, and the two sizes of the KV cache.

    Field names and defaults are those of Meta's package. Fields may be assigned, and a subclass may add more;
    `validate` is called when a network is created.

    Attributes:
        vocab_size: number of tokens; -1 means the tokenizer's, and must be replaced before a network is created.
        max_batch_size, max_seq_len: number of rows and of positions in the KV cache.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None for n_heads (multi-head attention)
    vocab_size: int = -1
    multiple_of: int = 256  # the hidden size of the feed-forward is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    max_batch_size: int = 32
    max_seq_len: int = 2048

    @classmethod
    def of(cls, params: object) -> ModelArgs:
        """Returns `params` if it is a `ModelArgs`, else a `ModelArgs` made from its attributes of the same names.

        Raises:
            ValueError: a field has the wrong type or range, or the head counts do not divide each other.
        """
        if isinstance(params, ModelArgs):
            args = params
        else:
            args = cls(**{f.name: getattr(params, f.name) for f in fields(cls) if hasattr(params, f.name)})
        args.validate()
        return args

    def validate(self) -> None:
        """Checks each field's type and range, and that the fields are consistent.

        Raises:
            ValueError: a check failed; the message names the field and its value.
        """
        for field in fields(ModelArgs):
            _check_field(field.name, field.type, getattr(self, field.name))
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} divided by n_heads={self.n_heads} must be a whole, even head size, "
                "which rotary embedding requires"
            )
        if self.hidden_dim < 1:
            raise ValueError(
                f"ffn_dim_multiplier={self.ffn_dim_multiplier} must give the feed-forward at least one hidden unit"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads; with grouped-query attention it is less than `n_heads`."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward."""
        return feed_forward_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def prefill_tokens(self) -> int:
        """Maximum number of positions, over all rows, in one prefill pass; it bounds the memory of activations."""
        return min(self.max_batch_size * self.max_seq_len, max(self.max_seq_len, PREFILL_TOKENS))

    def check_shards(self, model_parallel_size: int) -> None:
        """Raises ValueError unless the network can be sharded evenly over `model_parallel_size` ranks."""
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
                    f"{name} ({size}) must be a multiple of the model-parallel size ({model_parallel_size}) "
                    "for this network to be sharded over that many ranks"
                )


def feed_forward_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """2/3 of `hidden_dim`, times `ffn_dim_multiplier` if given, rounded up to a multiple of `multiple_of`.

    SwiGLU has three matrices instead of two; 2/3 of the width keeps the number of weights the same.
    """
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * -(-width // multiple_of)  # rounded up in integers: exact at any size


def _check_field(name: str, annotation: object, value: object) -> None:
    """Checks a field's type and range. `annotation` is a string, due to `from __future__ import annotations`."""
    if value is None and "None" in str(annotation):
        return
    takes_float = "float" in str(annotation)
    number = isinstance(value, (int, float) if takes_float else int) and not isinstance(value, bool)
    if not number:
        raise ValueError(f"{name} must be {'a number' if takes_float else 'an integer'}, got {quote(value)}")
    assert isinstance(value, (int, float))
    if name == "vocab_size" and value == -1:
        return
    if not 0 < value < 2**63:
        raise ValueError(f"{name} must be above 0 and below 2**63, got {quote(value)}")
