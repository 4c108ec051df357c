"""The Llama 2 network (Touvron et al., 2023): its hyperparameters, its parts, the blocks, then the whole network.

Names, signatures and call order are as in Meta's `llama.model`; parameters have the names of the released
checkpoints. Each rank of the model-parallel group holds its shard of every layer. Every module in the tree is called in
every pass: hooks run, and replaced modules and edited weights take effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from operator import index
from typing import Any, cast

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from torch import Tensor, nn

from llama.errors import quote
from llama.layers.attention import attend, causal_mask, is_causal_mask
from llama.layers.cache import SPARE_POSITIONS, CachePositions, KVCache, cache_view
from llama.layers.linear import EmptyOnMeta, pack_layers, packable_layers, sharded, without_autograd_functions

PREFILL_TOKENS = 1024  # enough to be compute-bound; more would only take more memory
LONGEST_PREFILL = 8192  # longer prompts are prefilled in parts, since masks grow with the square of the length


@dataclass
class ModelArgs:
    """The hyperparameters in `params.json`, and the two sizes of the KV cache.

    Field names and defaults are the same as in Meta's package. Fields may be assigned, and a subclass may add more;
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
        """Returns `params` if it is a `ModelArgs`, else one made from its attributes of the same names, validated."""
        given = {field.name: getattr(params, field.name) for field in fields(cls) if hasattr(params, field.name)}
        args = params if isinstance(params, ModelArgs) else cls(**given)
        args.validate()
        return args

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless each has its type and range, and they are consistent."""
        for field in fields(ModelArgs):
            name, value = field.name, getattr(self, field.name)
            if (value is None and "None" in str(field.type)) or (name == "vocab_size" and value == -1):
                continue
            is_float = "float" in str(field.type)  # the name of the type, by `from __future__ import annotations`
            kind: Any = Real if is_float else Integral
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} must be {'a number' if is_float else 'an integer'}, got {quote(value)}")
            # a list of the tensors of more layers would take too long to make
            below, shown = (10_000, "10,000") if name == "n_layers" else (2**63, "2**63")
            if not 0 < value < below:
                raise ValueError(f"{name} must be above 0 and below {shown}, got {quote(value)}")
            if not isinstance(value, (int, float)):  # of numpy
                setattr(self, name, int(value) if isinstance(value, Integral) else float(value))
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
        return min(self.max_batch_size * self.max_seq_len, max(min(self.max_seq_len, LONGEST_PREFILL), PREFILL_TOKENS))

    def check_shards(self, model_parallel_size: int) -> None:
        """Raises ValueError unless the network can be sharded evenly over `model_parallel_size` ranks."""
        sizes = {"n_heads": self.n_heads, "n_kv_heads": self.kv_heads, "dim": self.dim, "vocab_size": self.vocab_size}
        sizes["the feed-forward's hidden size"] = self.hidden_dim
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


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, 2019); x / rms(x) is computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * self.weight

    def _norm(self, x: Tensor) -> Tensor:
        # Without the weight: x / rms(x) is rounded to the dtype of x before the multiplication, as in Meta's code.
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.size(0)}, eps={self.eps}"


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """Computes the rotations exp(i * position * theta^(-2j/dim)) for positions 0 to `end` - 1.

    Args:
        dim: size of a head.
        end: number of positions.
        theta: base of the frequencies.

    Returns:
        (end, dim / 2) complex64, on the CPU.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    positions = torch.arange(end, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, 1.0 / theta**exponents)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """Views `freqs_cis`, (seqlen, d) or (bsz, seqlen, d), as (1 or bsz, seqlen, 1, d) for x (bsz, seqlen, heads, d)."""
    expected = (x.size(0), x.size(1), x.size(-1))[-freqs_cis.ndim :]
    if tuple(freqs_cis.shape) != expected:
        raise AssertionError(f"freqs_cis must have shape {expected}, got {tuple(freqs_cis.shape)}")
    bsz = freqs_cis.size(0) if freqs_cis.ndim == 3 else 1
    return freqs_cis.view(bsz, x.size(1), *[1] * (x.ndim - 3), x.size(-1))


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... of each head (Su et al., 2021), in float32.

    Args:
        xq, xk: (bsz, seqlen, number of heads, head_dim).
        freqs_cis: (seqlen, head_dim / 2) or (bsz, seqlen, head_dim / 2) complex64, the rotation for each position; or
            (bsz, seqlen, head_dim / 2, 2) float32, its cosines and sines, which compilers fuse.

    Returns:
        The rotated `xq` and `xk`, contiguous, in their dtypes.
    """
    rotated_xq, rotated_xk = (_rotated(x.float().unflatten(-1, (-1, 2)), freqs_cis) for x in (xq, xk))
    return rotated_xq.type_as(xq).contiguous(), rotated_xk.type_as(xk).contiguous()


def _rotated(pairs: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotates pairs (bsz, seqlen, heads, head_dim / 2, 2); returns (bsz, seqlen, heads, head_dim)."""
    if freqs_cis.is_complex():
        numbers = torch.view_as_complex(pairs.contiguous())
        return torch.view_as_real(numbers * reshape_for_broadcast(freqs_cis, numbers)).flatten(3)
    (x, y), (cos, sin) = pairs.unbind(-1), freqs_cis.unsqueeze(2).unbind(-1)
    return torch.stack((x * cos - y * sin, x * sin + y * cos), -1).flatten(3)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeats each head of x (bsz, seqlen, heads, head_dim) `n_rep` times: (bsz, seqlen, heads * n_rep, head_dim).

    Part of Meta's interface; `Attention` does not use it, because `attend` lets query heads share a key/value head.
    """
    return x.repeat_interleave(n_rep, dim=2) if n_rep > 1 else x


class Attention(nn.Module):
    """Multi-head attention; grouped-query attention (Ainslie et al., 2023) if n_kv_heads < n_heads.

    Attributes:
        cache: the KV cache.
        cache_k, cache_v: views of the KV cache with Meta's axes, (max_batch_size, max_seq_len, n_local_kv_heads,
            head_dim). An assigned tensor is copied; None, or `del`, frees the memory until the next pass.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        sizes = ModelArgs.of(args)
        model_parallel_size = get_model_parallel_world_size()
        self.n_heads = sizes.n_heads
        self.n_kv_heads = sizes.kv_heads
        self.n_local_heads = self.n_heads // model_parallel_size
        self.n_local_kv_heads = self.n_kv_heads // model_parallel_size
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = sizes.head_dim
        dim, kv_dim = sizes.dim, self.n_kv_heads * self.head_dim
        self.wq = sharded(ColumnParallelLinear, dim, dim, bias=False, gather_output=False)
        self.wk = sharded(ColumnParallelLinear, dim, kv_dim, bias=False, gather_output=False)
        self.wv = sharded(ColumnParallelLinear, dim, kv_dim, bias=False, gather_output=False)
        self.wo = sharded(RowParallelLinear, dim, dim, bias=False, input_is_parallel=True)
        self.cache = KVCache(sizes.max_batch_size, self.n_local_kv_heads, sizes.max_seq_len, self.head_dim)

    def forward(
        self, x: Tensor, start_pos: int | CachePositions | None, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Stores the keys and values of `x` in the cache, and attends to all cached positions.

        Args:
            x: (bsz, seqlen, dim).
            start_pos: position of the first token in the cache's first bsz rows, or each row's own row and position;
                None for position 0 without the cache.
            freqs_cis: (seqlen, head_dim / 2) or (bsz, seqlen, head_dim / 2) complex64.
            mask: added to the attention scores (..., seqlen, kv_len); None for no mask.

        Returns:
            (bsz, seqlen, dim).
        """
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        # (bsz, seqlen, n_local_heads or n_local_kv_heads, head_dim)
        xq, xk, xv = (t.unflatten(-1, (-1, self.head_dim)) for t in (xq, xk, xv))
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        keys, values = self.cache(xk.transpose(1, 2), xv.transpose(1, 2), start_pos)
        is_causal = start_pos.from_zero if isinstance(start_pos, CachePositions) else is_causal_mask(mask)
        heads = attend(xq.transpose(1, 2), keys, values, None if is_causal else mask, is_causal=is_causal)
        out: Tensor = self.wo(heads.transpose(1, 2).flatten(2))
        return out

    cache_k, cache_v = cache_view("keys"), cache_view("values")


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x).

    Args:
        dim: size of inputs and outputs.
        hidden_dim: hidden size before scaling, usually 4 * dim; 2/3 of it is used, because there are three matrices.
        multiple_of: the hidden size is rounded up to a multiple of this.
        ffn_dim_multiplier: scales the hidden size before rounding; None for 1.
    """

    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> None:
        super().__init__()
        width = feed_forward_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = sharded(ColumnParallelLinear, dim, width, bias=False, gather_output=False)
        self.w2 = sharded(RowParallelLinear, width, dim, bias=False, input_is_parallel=True)
        self.w3 = sharded(ColumnParallelLinear, dim, width, bias=False, gather_output=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each with RMSNorm on its input and a residual connection."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        sizes = ModelArgs.of(args)
        self.layer_id = layer_id
        self.n_heads = sizes.n_heads
        self.dim = sizes.dim
        self.head_dim = sizes.head_dim
        self.attention = Attention(args)
        self.feed_forward = FeedForward(sizes.dim, 4 * sizes.dim, sizes.multiple_of, sizes.ffn_dim_multiplier)
        self.attention_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.ffn_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.requires_grad_(False)  # a pass keeps no graph unless gradients are asked for

    def forward(
        self, x: Tensor, start_pos: int | CachePositions | None, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Takes and returns the same as `Attention.forward`."""
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Transformer(nn.Module):
    """The decoder. Requires an initialized model-parallel group. Weights are uninitialized until a shard is loaded.

    Parameters do not require gradients; call `model.requires_grad_()` for training.

    Args:
        params: a `ModelArgs`, or another object with the same field names.

    Attributes:
        params: the constructor's argument; its `max_batch_size` and `max_seq_len` are the size of the KV cache.
        freqs_cis: (2 * max_seq_len, head_dim / 2) complex64, the rotation for each position; more if that is less
            than max_seq_len + `SPARE_POSITIONS`.
    """

    layers: MutableSequence[TransformerBlock]  # a ModuleList, of whose items type checkers know no attributes

    @torch.inference_mode(False)  # inference tensors could not be used outside of inference mode
    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        sizes = ModelArgs.of(params)
        if sizes.vocab_size < 1:
            raise ValueError(f"vocab_size must be the tokenizer's number of pieces, got {sizes.vocab_size}")
        sizes.check_shards(get_model_parallel_world_size())
        self.params = params
        self.vocab_size = sizes.vocab_size
        self.n_layers = sizes.n_layers
        self.tok_embeddings = sharded(ParallelEmbedding, sizes.vocab_size, sizes.dim)
        blocks = nn.ModuleList(TransformerBlock(layer_id, params) for layer_id in range(sizes.n_layers))
        self.layers = cast("MutableSequence[TransformerBlock]", blocks)
        self.norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.output = sharded(ColumnParallelLinear, sizes.dim, sizes.vocab_size, bias=False, gather_output=True)
        # Twice max_seq_len, as in Meta's code; positions reach half of it, and padding a little further. Not a buffer:
        # `module.to(dtype)` would discard the imaginary parts.
        end = sizes.max_seq_len + max(sizes.max_seq_len, SPARE_POSITIONS)
        self.freqs_cis = precompute_freqs_cis(sizes.head_dim, end, sizes.rope_theta)
        self.requires_grad_(False)

    def forward(
        self,
        tokens: Tensor,
        start_pos: int | Tensor | CachePositions,
        *,
        last: Tensor | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Computes the logits after each token, and stores the tokens' keys and values in the cache.

        Args:
            tokens: (bsz, seqlen) int64.
            start_pos: position of the first token in the cache's first bsz rows: an int, or a tensor (bsz,) int64 with
                one per row; or a `CachePositions`. All earlier positions must be in the cache.
            last: (bsz,) int64, the index in `tokens` of the one token per row whose logits are returned; None for all.
            use_cache: False leaves the KV cache alone: any number of rows, from `start_pos` 0. Blocks then get None as
                their `start_pos`.

        Returns:
            (bsz, seqlen, vocab_size) float32; (bsz, 1, vocab_size) if `last` is given.

        Raises:
            ValueError: the batch or the last position exceeds the cache.
        """
        if use_cache:
            return self._logits(tokens, self._checked(start_pos, tokens), last)
        if isinstance(start_pos, CachePositions) or start_pos != 0:
            raise ValueError(f"start_pos must be 0 with use_cache=False, got {start_pos}")
        if tokens.size(1) > self.params.max_seq_len:
            got = tokens.size(1)
            raise ValueError(f"rows must have at most max_seq_len={self.params.max_seq_len} tokens, got {got}")
        with without_autograd_functions(self):
            return self._logits(tokens, None, last)

    def _logits(self, tokens: Tensor, start: int | CachePositions | None, last: Tensor | None) -> Tensor:
        seqlen = tokens.size(1)
        h = self.tok_embeddings(tokens)
        if self.freqs_cis.device != h.device:
            with torch.inference_mode(False):  # an inference tensor could not be used in training later
                self.freqs_cis = self.freqs_cis.to(h.device)
        if isinstance(start, CachePositions):
            start, freqs_cis, mask = self._prepare(start, seqlen, h)
        else:
            first = start or 0
            freqs_cis = self.freqs_cis[first : first + seqlen]
            mask = causal_mask(seqlen, first, h) if seqlen > 1 else None
        for layer in self.layers:
            h = layer(h, start, freqs_cis, mask)
        h = self.norm(h)
        if last is not None:
            h = h[torch.arange(h.size(0), device=h.device), last].unsqueeze(1)
        logits: Tensor = self.output(h)
        return logits.float()

    def _checked(self, start_pos: int | Tensor | CachePositions, tokens: Tensor) -> int | CachePositions:
        """Converts `start_pos` to an int or a `CachePositions`, and checks that the tokens fit in the cache."""
        if isinstance(start_pos, CachePositions):
            return start_pos  # made by the engine, which ensures that it fits
        bsz, seqlen = tokens.shape
        starts = start_pos.flatten().tolist() if isinstance(start_pos, Tensor) else [index(start_pos)]
        if len(starts) not in (1, bsz):
            raise ValueError(f"start_pos must be an int or a tensor of {bsz} ints, one per row, got {len(starts)}")
        first, end = min(starts), max(starts) + seqlen
        max_batch_size, max_seq_len = self.params.max_batch_size, self.params.max_seq_len
        if first < 0 or bsz > max_batch_size or end > max_seq_len:
            raise ValueError(
                f"the batch must fit in the KV cache of max_batch_size={max_batch_size} and max_seq_len={max_seq_len}, "
                f"got {bsz} rows from position {first} to {end}"
            )
        if not isinstance(start_pos, Tensor) or len(starts) == 1:
            return starts[0]
        return CachePositions(start=start_pos, kv_len=end)

    def _prepare(
        self, positions: CachePositions, seqlen: int, h: Tensor
    ) -> tuple[CachePositions, Tensor, Tensor | None]:
        """Computes what all layers share in a pass with a position per row: cache slots, rotations and mask."""
        cache = next(module for module in self.modules() if isinstance(module, KVCache))
        pos = positions.start.unsqueeze(1) + torch.arange(seqlen, device=h.device)  # (bsz, seqlen)
        pos = pos.clamp(max=cache.shape[2] - 1)  # padding may go past the last position
        mask = None
        if not positions.from_zero:
            hidden = torch.arange(positions.kv_len, device=h.device) > pos.unsqueeze(-1)
            mask = torch.where(hidden, -math.inf, 0.0).unsqueeze(1).to(h.dtype)  # (bsz, 1, seqlen, kv_len)
        return replace(positions, slots=cache.slots(pos, positions.rows)), self.freqs_cis[pos], mask

    @classmethod
    def from_state(
        cls, params: ModelArgs, state: dict[str, Tensor], *, cache_dtype: torch.dtype | None = None
    ) -> Transformer:
        """Creates the network with the tensors of `state` as its parameters, without copying or allocating weights.

        Args:
            cache_dtype: dtype of the KV cache; None for the tensors' dtype. Its device is the tensors' device.
        """
        weight = state.get("norm.weight", next(iter(state.values())))
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(cache_dtype or weight.dtype)
        try:  # caches get their final dtype and device, also in a replaced Attention class; parameters get no memory
            with torch.device(weight.device), EmptyOnMeta():
                model = cls(params)
        finally:
            torch.set_default_dtype(default_dtype)
        model.load_state_dict(state, assign=True)
        model.freqs_cis = model.freqs_cis.to(weight.device)
        return model.eval()

    def pack(self, dtype: torch.dtype | None = None, *, release: Callable[[Tensor], None] | None = None) -> None:
        """Packs the current weights of the linear layers into a faster layout, replacing earlier packed forms.

        `Llama.build` calls this where it makes the network faster. An edited layer computes unpacked until this is
        called again. Writes through aliases obtained before (`.data`, `numpy`) are not detected. Requires a CPU for
        which `kernels.can_pack` is true.

        Args:
            dtype: dtype of the computation; None for the dtype of the norms.
            release: called with each weight after it is packed, to free memory-mapped pages, which can be read again.
        """
        dtype = dtype or next(self.norm.parameters()).dtype
        layers = packable_layers(self)
        for module in set(self.modules()).difference(layers):
            for weight in module.parameters(recurse=False):
                if weight.is_floating_point() and not weight.requires_grad:  # weights in training keep their dtype
                    weight.data = weight.data.to(dtype)
        pack_layers(layers, dtype, release)
