"""The Llama 2 network (Touvron et al., 2023), read top-down: parts first, the blocks and the whole at the end.

Names, signatures and call order are those of Meta's `llama.model`; parameters have the names of the released
checkpoints. Each rank of the model-parallel group holds its shard of every layer. Every module in the tree is called at
every pass: hooks run, and a replaced module or an edited weight counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ParallelEmbedding
from torch import Tensor, nn

from llama.args import ModelArgs, feed_forward_width
from llama.layers import (
    EmptyOnMeta,
    column_parallel,
    leave_undefined,
    packable_layers,
    row_parallel,
)

_FEW_POSITIONS = 16  # for more, the copies of keys for groups of query heads cost little beside the products


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, 2019), the quotient in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Rounded to the working dtype before the weight, which is why `rms_norm` does not get it.
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """The rotations exp(i * position * theta^(-2j/dim)) of positions 0 to `end` - 1.

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
    """Views rotations (seqlen, d) or (bsz, seqlen, d) such that they broadcast over x (bsz, seqlen, heads, d)."""
    expected = (x.size(0), x.size(1), x.size(-1))[-freqs_cis.ndim :]
    if tuple(freqs_cis.shape) != expected:
        raise AssertionError(f"freqs_cis must have shape {expected}, got {tuple(freqs_cis.shape)}")
    return freqs_cis.unsqueeze(-2)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... of each head (Su et al., 2021), in float32.

    Args:
        xq, xk: (bsz, seqlen, number of heads, head_dim).
        freqs_cis: (seqlen, head_dim / 2) or (bsz, seqlen, head_dim / 2) complex64, the rotation of each position.

    Returns:
        Both, rotated, in their own dtype.
    """
    heads = torch.cat((xq, xk), dim=2)
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs)).flatten(3).type_as(heads)
    return rotated[:, :, : xq.size(2)], rotated[:, :, xq.size(2) :]


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeats each head of x (bsz, seqlen, heads, head_dim) `n_rep` times: (bsz, seqlen, heads * n_rep, head_dim).

    The network itself has no need of it: its attention lets a group of query heads share a key/value head.
    """
    return x.repeat_interleave(n_rep, dim=2) if n_rep > 1 else x


@dataclass(frozen=True)
class CachePositions:
    """Where the rows of a pass stand in the KV cache, in place of an int `start_pos` that is the same for all rows.

    Attributes:
        start: (bsz,) int64, the position of each row's first token.
        kv_len: the largest position of any row, plus one, or more: the cached positions that a pass looks at.
        rows: (bsz,) int64, the cache rows of the sequences; None for the first ones.
        from_zero: whether all rows start at position 0, where the keys of the pass itself are all there is. Attention
            is causal then, and no mask is made.
        last: (bsz,) int64, each row's position in this pass whose logits are wanted; None for all positions.
        slots: (bsz * seqlen * n_local_kv_heads,) int64, where the keys of each token and head go in a cache that is
            seen as vectors of head_dim. `Transformer.forward` works it out once for all layers.
    """

    start: Tensor
    kv_len: int
    rows: Tensor | None = None
    from_zero: bool = False
    last: Tensor | None = None
    slots: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention; grouped-query (Ainslie et al., 2023) where there are fewer key/value heads.

    Attributes:
        keys, values: the KV cache, each (max_batch_size, n_local_kv_heads, max_seq_len, head_dim).
        cache_k, cache_v: the same with Meta's axes, (max_batch_size, max_seq_len, n_local_kv_heads, head_dim): views.
            What is assigned is copied.
    """

    keys: Tensor
    values: Tensor

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
        self.wq = column_parallel(sizes.dim, self.n_heads * self.head_dim)
        self.wk = column_parallel(sizes.dim, self.n_kv_heads * self.head_dim)
        self.wv = column_parallel(sizes.dim, self.n_kv_heads * self.head_dim)
        self.wo = row_parallel(self.n_heads * self.head_dim, sizes.dim)
        cache = (sizes.max_batch_size, self.n_local_kv_heads, sizes.max_seq_len, self.head_dim)
        self.register_buffer("keys", torch.zeros(cache), persistent=False)
        self.register_buffer("values", torch.zeros(cache), persistent=False)

    def forward(self, x: Tensor, start_pos: int | CachePositions, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """Attends to the cached positions and those of `x`, whose keys and values are stored.

        Args:
            x: (bsz, seqlen, dim).
            start_pos: the position of the first token, for the cache's first bsz rows, or each row's own place.
            freqs_cis: (seqlen, head_dim / 2) or (bsz, seqlen, head_dim / 2) complex64.
            mask: added to the scores (..., seqlen, kv_len); None for none.

        Returns:
            (bsz, seqlen, dim).
        """
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        # (bsz, seqlen, n_local_heads or n_local_kv_heads, head_dim)
        xq, xk, xv = (t.unflatten(-1, (-1, self.head_dim)) for t in (xq, xk, xv))
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        keys, values = self.update_cache(xk.transpose(1, 2), xv.transpose(1, 2), start_pos)
        is_causal = isinstance(start_pos, CachePositions) and start_pos.from_zero
        heads = attend(xq.transpose(1, 2), keys, values, mask, is_causal=is_causal)
        out: Tensor = self.wo(heads.transpose(1, 2).flatten(2))
        return out

    def update_cache(self, xk: Tensor, xv: Tensor, start_pos: int | CachePositions) -> tuple[Tensor, Tensor]:
        """Stores keys and values (bsz, n_local_kv_heads, seqlen, head_dim); returns those to attend to.

        The cache holds no gradients: they flow through what is returned.
        """
        if self.keys.dtype != xk.dtype or self.keys.device != xk.device:
            with torch.inference_mode(False):  # a cache made in it could not be written to outside of it
                self.keys, self.values = self.keys.to(xk), self.values.to(xk)
        if isinstance(start_pos, CachePositions):
            return self._update_rows(xk, xv, start_pos)
        bsz, end = xk.size(0), start_pos + xk.size(2)
        self.keys[:bsz, :, start_pos:end] = xk.detach()
        self.values[:bsz, :, start_pos:end] = xv.detach()
        if start_pos == 0:
            return xk, xv
        if xk.requires_grad or xv.requires_grad:
            cached = (self.keys[:bsz, :, :start_pos], self.values[:bsz, :, :start_pos])
            return torch.cat((cached[0], xk), dim=2), torch.cat((cached[1], xv), dim=2)
        return self.keys[:bsz, :, :end], self.values[:bsz, :, :end]

    def _update_rows(self, xk: Tensor, xv: Tensor, positions: CachePositions) -> tuple[Tensor, Tensor]:
        if not positions.from_zero and (xk.requires_grad or xv.requires_grad):
            raise RuntimeError("gradients need an int start_pos; pass rows of one start_pos, or use torch.no_grad()")
        assert positions.slots is not None
        for cached, new in ((self.keys, xk), (self.values, xv)):
            vectors = new.detach().transpose(1, 2).flatten(0, 2)  # by row, token, head, as the slots are
            cached.flatten(0, 2).index_copy_(0, positions.slots, vectors)
        if positions.from_zero:
            return xk, xv
        rows = slice(xk.size(0)) if positions.rows is None else positions.rows
        return self.keys[rows, :, : positions.kv_len], self.values[rows, :, : positions.kv_len]

    @property
    def cache_k(self) -> Tensor:
        return self.keys.transpose(1, 2)

    @cache_k.setter
    def cache_k(self, cache: Tensor) -> None:
        self.keys = cache.transpose(1, 2).contiguous()

    @property
    def cache_v(self) -> Tensor:
        return self.values.transpose(1, 2)

    @cache_v.setter
    def cache_v(self, cache: Tensor) -> None:
        self.values = cache.transpose(1, 2).contiguous()


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v.

    Args:
        queries: (bsz, n_heads, seqlen, head_dim).
        keys, values: (bsz, n_kv_heads, kv_len, head_dim); each serves n_heads / n_kv_heads query heads.
        mask: broadcasts to (bsz, n_heads, seqlen, kv_len).
        is_causal: as if a causal mask were given; kv_len is seqlen then.

    Returns:
        (bsz, n_heads, seqlen, head_dim).
    """
    bsz, n_heads, seqlen, head_dim = queries.shape
    n_kv_heads = keys.size(1)
    n_rep = n_heads // n_kv_heads
    if mask is not None and mask.is_floating_point():
        mask = mask.to(queries.dtype)
    if seqlen == n_rep == 1 and queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        # Two equal queries take half the time of one: for a single row, torch leaves the kernel's blocked products.
        return F.scaled_dot_product_attention(queries.expand(-1, -1, 2, -1), keys, values, mask)[:, :, :1]
    per_head = mask is not None and mask.dim() == 4 and mask.size(1) > 1
    if n_rep == 1 or seqlen > _FEW_POSITIONS or is_causal or per_head:
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal, enable_gqa=n_rep > 1)
    # The query heads of a group stand in for more positions, so that no key is copied for each of them.
    grouped = queries.reshape(bsz, n_kv_heads, n_rep * seqlen, head_dim)
    if mask is not None and seqlen > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), n_rep, 1)
    return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(queries.shape)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x).

    Args:
        dim: size of inputs and outputs.
        hidden_dim: that of a feed-forward with two matrices, 4 * dim; this one, with three, takes 2/3 of it.
        multiple_of: the hidden size is rounded up to a multiple of this.
        ffn_dim_multiplier: scales the hidden size before it is rounded; None for 1.
    """

    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> None:
        super().__init__()
        width = feed_forward_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = column_parallel(dim, width)
        self.w2 = row_parallel(width, dim)
        self.w3 = column_parallel(dim, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

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

    def forward(self, x: Tensor, start_pos: int | CachePositions, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """Arguments and result as in `Attention.forward`."""
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Transformer(nn.Module):
    """The decoder. It needs an initialized model-parallel group; its weights are undefined until a shard is loaded.

    Args:
        params: a `ModelArgs`, or other arguments with the same field names.

    Attributes:
        params: what it was made with; `max_batch_size` and `max_seq_len` are the KV cache's.
        freqs_cis: (2 * max_seq_len, head_dim / 2) complex64, the rotation of each position.
    """

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        sizes = ModelArgs.of(params)
        if sizes.vocab_size < 1:
            raise ValueError(f"vocab_size must be the tokenizer's number of pieces, got {sizes.vocab_size}")
        sizes.check_shards(get_model_parallel_world_size())
        self.params = params
        self.vocab_size = sizes.vocab_size
        self.n_layers = sizes.n_layers
        self.tok_embeddings = ParallelEmbedding(sizes.vocab_size, sizes.dim, init_method=leave_undefined)
        self.layers = nn.ModuleList(TransformerBlock(layer_id, params) for layer_id in range(sizes.n_layers))
        self.norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.output = column_parallel(sizes.dim, sizes.vocab_size, gather_output=True)
        # Not a buffer: a module's change of dtype would drop the imaginary parts.
        self.freqs_cis = precompute_freqs_cis(sizes.head_dim, 2 * sizes.max_seq_len, sizes.rope_theta)

    def forward(self, tokens: Tensor, start_pos: int | Tensor | CachePositions) -> Tensor:
        """Computes the logits of tokens, and stores their keys and values in the cache.

        Args:
            tokens: (bsz, seqlen) int64.
            start_pos: the position of the first token in the cache's first bsz rows; a tensor (bsz,) int64 for the
                position of each row; or a `CachePositions`. All earlier positions must be in the cache.

        Returns:
            (bsz, seqlen, vocab_size) float32; (bsz, 1, vocab_size) where `CachePositions.last` chooses a position.

        Raises:
            ValueError: the batch or the last position exceeds the cache.
        """
        seqlen = tokens.size(1)
        start_pos = self._checked(start_pos, tokens)
        h = self.tok_embeddings(tokens)
        if self.freqs_cis.device != h.device:
            with torch.inference_mode(False):  # a tensor made in it could not be used in training later
                self.freqs_cis = self.freqs_cis.to(h.device)
        if isinstance(start_pos, CachePositions):
            start_pos, freqs_cis, mask = self._prepare(start_pos, seqlen, h)
        else:
            freqs_cis = self.freqs_cis[start_pos : start_pos + seqlen]
            mask = _causal_mask(seqlen, start_pos, h) if seqlen > 1 else None
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        h = self.norm(h)
        if isinstance(start_pos, CachePositions) and start_pos.last is not None:
            h = h[torch.arange(h.size(0), device=h.device), start_pos.last].unsqueeze(1)
        logits: Tensor = self.output(h)
        return logits.float()

    def _checked(self, start_pos: int | Tensor | CachePositions, tokens: Tensor) -> int | CachePositions:
        """`start_pos` as an int or a `CachePositions`, within the cache."""
        if isinstance(start_pos, CachePositions):
            return start_pos  # the generation loop's own, which fits by its making
        bsz, seqlen = tokens.shape
        starts = start_pos.flatten().tolist() if isinstance(start_pos, Tensor) else [index(start_pos)]
        if len(starts) not in (1, bsz):
            raise ValueError(f"start_pos must be an int or a tensor of {bsz} ints, one per row, got {len(starts)}")
        first, end = min(starts), max(starts) + seqlen
        max_batch_size, max_seq_len = self.params.max_batch_size, self.params.max_seq_len
        if first < 0 or bsz > max_batch_size or end > max_seq_len:
            raise ValueError(
                f"the batch must fit into the cache of max_batch_size={max_batch_size} and max_seq_len={max_seq_len}, "
                f"got {bsz} rows from position {first} to {end}"
            )
        if not isinstance(start_pos, Tensor) or len(starts) == 1:
            return starts[0]
        return CachePositions(start=start_pos, kv_len=end)

    def _prepare(
        self, positions: CachePositions, seqlen: int, h: Tensor
    ) -> tuple[CachePositions, Tensor, Tensor | None]:
        """What all layers share in a pass of rows at places of their own: cache slots, rotations, mask."""
        bsz, device = h.size(0), h.device
        pos = positions.start.unsqueeze(1) + torch.arange(seqlen, device=device)  # (bsz, seqlen)
        mask = None
        if not positions.from_zero:
            hidden = torch.arange(positions.kv_len, device=device) > pos.unsqueeze(-1)
            mask = torch.where(hidden, -math.inf, 0.0).unsqueeze(1).to(h.dtype)  # (bsz, 1, seqlen, kv_len)
        _, n_heads, max_seq_len, _ = self._attentions[0].keys.shape
        rows = torch.arange(bsz, device=device) if positions.rows is None else positions.rows
        heads = (n_heads * rows).view(-1, 1, 1) + torch.arange(n_heads, device=device)
        slots = (heads * max_seq_len + pos.unsqueeze(-1)).flatten()
        return replace(positions, slots=slots), self.freqs_cis[pos], mask

    @property
    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    @classmethod
    def from_state(
        cls, params: ModelArgs, state: dict[str, Tensor], *, cache_dtype: torch.dtype | None = None
    ) -> Transformer:
        """Makes the network with `state`'s own tensors as its parameters; nothing of their size is allocated.

        The parameters do not require gradients: `model.requires_grad_()` turns them on for training.

        Args:
            cache_dtype: of the KV cache, which is made on the tensors' device; None for that of the tensors.
        """
        weight = state.get("norm.weight", next(iter(state.values())))
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(cache_dtype or weight.dtype)
        try:  # caches are made as they stay, those of a replaced Attention class too; parameters get no memory
            with torch.device(weight.device), EmptyOnMeta():
                model = cls(params)
        finally:
            torch.set_default_dtype(default_dtype)
        model.requires_grad_(False).load_state_dict(state, assign=True)
        model.freqs_cis = model.freqs_cis.to(weight.device)
        return model.eval()

    def pack(
        self,
        dtype: torch.dtype | None = None,
        *,
        release: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Makes the packed forms of the linear layers' weights as they are now, replacing those of before.

        `Llama.build` calls it where it pays. Call it after edits, from which on a layer computes unpacked. It needs a
        CPU on which `kernels.can_pack` holds. What is later written to memory that was handed out before (by `.data`,
        by `numpy`) is not seen.

        Args:
            dtype: of the computation, for weights of another dtype; None for that of the norms.
            release: called with each weight once it is packed, to give back memory that can be read again.
        """
        dtype = dtype or next(self.norm.parameters()).dtype
        layers = packable_layers(self)
        for module in set(self.modules()).difference(layers):
            for weight in module.parameters(recurse=False):
                if weight.is_floating_point() and not weight.requires_grad:  # those in training keep their own
                    weight.data = weight.data.to(dtype)
        scratch = None
        if any(layer.weight.dtype != dtype for layer in layers):
            scratch = torch.empty(max(layer.weight.numel() for layer in layers), dtype=dtype)
        for layer in layers:
            layer.pack(dtype, scratch)
            if release is not None:
                release(layer.weight.detach())


# As they are here: a patch counts in a class as it does in an instance.
_FORWARDS = (Transformer.forward, TransformerBlock.forward, Attention.forward)


def takes_cache_positions(model: Any) -> bool:
    """Whether a model is a `Transformer` whose own code handles `start_pos` all the way down.

    It does not where the `forward` of the model, a block or an attention was patched, overridden or compiled, or where
    one of them was replaced: such code may know only Meta's int.
    """
    whole, block, attention = _FORWARDS
    return _runs(model, whole) and all(_runs(x, block) and _runs(x.attention, attention) for x in model.layers)


def _runs(module: Any, forward: Callable[..., Tensor]) -> bool:
    """Whether calling the module calls this function and no other."""
    has_own = getattr(type(module), "forward", None) is forward and "forward" not in vars(module)
    return has_own and module._compiled_call_impl is None


def _causal_mask(seqlen: int, start_pos: int, h: Tensor) -> Tensor:
    """(seqlen, start_pos + seqlen) in h's dtype: 0 where a token attends, -inf at the positions after its own."""
    positions = torch.arange(start_pos + seqlen, device=h.device)
    return torch.where(positions > positions[start_pos:].unsqueeze(1), -math.inf, 0.0).to(h.dtype)
