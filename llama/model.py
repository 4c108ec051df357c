"""The Llama 2 network (Touvron et al., 2023), read top-down: blocks at the end, their parts first.

Parameters bear the names of the released checkpoints. Each rank of the model-parallel group holds its shard of every
layer. Knows nothing of text, files or processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama.args import ModelArgs
from llama.projection import Projection, Release


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, 2019), the quotient in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Rounded to the working dtype before the weight, which is why `rms_norm` does not get it.
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight


def precompute_freqs_cis(head_dim: int, seqlen: int, theta: float) -> Tensor:
    """The rotations exp(i * position * theta^(-2j/head_dim)): (seqlen, head_dim / 2) complex64, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    positions = torch.arange(seqlen, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, 1.0 / theta**exponents)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... of each head (Su et al., 2021), in float32.

    Args:
        xq, xk: (bsz, seqlen, number of heads, head_dim).
        freqs_cis: (seqlen, head_dim / 2) or (bsz, seqlen, head_dim / 2) complex64, the rotation of each position.
    """
    heads = torch.cat((xq, xk), dim=2)
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * freqs_cis.unsqueeze(-2)).flatten(3).type_as(heads)
    return rotated[:, :, : xq.size(2)], rotated[:, :, xq.size(2) :]


@dataclass(frozen=True)
class Window:
    """Where one pass over the network stands: worked out once, used by every layer.

    Attributes:
        slots: (bsz * seqlen * n_local_kv_heads,) int64, where the keys of each token and head go in a cache that is
            seen as vectors of head_dim.
        freqs_cis: (bsz, seqlen, head_dim / 2) complex64, the rotation of each token's position.
        rows: the cache rows of the sequences: the first ones as a slice, of which a view serves; or (bsz,) int64.
        kv_len: number of cached positions to attend to; 0 where the pass starts at position 0 and the keys and values
            of the pass itself are all there is.
        mask: (bsz, 1, seqlen, kv_len) in the working dtype, 0 where a token attends and -inf elsewhere; None if a
            causal mask, or none at all, will do.
    """

    slots: Tensor
    freqs_cis: Tensor
    rows: slice | Tensor
    kv_len: int
    mask: Tensor | None


class KVCache(nn.Module):
    """Keys and values of one layer: two buffers (max_batch_size, n_local_kv_heads, max_seq_len, head_dim)."""

    k: Tensor
    v: Tensor

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(shape), persistent=False)
        self.register_buffer("v", torch.zeros(shape), persistent=False)

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Replaces the buffers by zeros of that device and dtype."""
        self.k = torch.zeros(self.k.shape, device=device, dtype=dtype)
        self.v = torch.zeros(self.v.shape, device=device, dtype=dtype)

    def update(self, xk: Tensor, xv: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Stores (bsz, seqlen, n_local_kv_heads, head_dim) in the window's slots.

        Returns:
            The keys and values to attend to, each (bsz, n_local_kv_heads, kv_len or seqlen, head_dim).
        """
        for cached, new in ((self.k, xk), (self.v, xv)):
            cached.flatten(0, 2).index_copy_(0, window.slots, new.flatten(0, 2))
        if not window.kv_len:
            return xk.transpose(1, 2), xv.transpose(1, 2)
        return self.k[window.rows, :, : window.kv_len], self.v[window.rows, :, : window.kv_len]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one row over those of another."""
        self.k[target, :, :length] = self.k[source, :, :length]
        self.v[target, :, :length] = self.v[source, :, :length]


class Attention(nn.Module):
    """Multi-head attention; grouped-query (Ainslie et al., 2023) where there are fewer key/value heads."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        mp = get_model_parallel_world_size()
        self.head_dim = args.head_dim
        self.wq = _column_parallel(args.dim, args.n_heads * args.head_dim)
        self.wk = _column_parallel(args.dim, args.kv_heads * args.head_dim)
        self.wv = _column_parallel(args.dim, args.kv_heads * args.head_dim)
        self.wo = _row_parallel(args.n_heads * args.head_dim, args.dim)
        self.qkv = Projection(self.wq, self.wk, self.wv)
        self.out = Projection(self.wo)
        self.cache = KVCache((args.max_batch_size, args.kv_heads // mp, args.max_seq_len, args.head_dim))

    def forward(self, x: Tensor, window: Window) -> Tensor:
        # (bsz, seqlen, dim) -> (bsz, seqlen, n_local_heads or n_local_kv_heads, head_dim)
        xq, xk, xv = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv(x))
        xq, xk = apply_rotary_emb(xq, xk, window.freqs_cis)
        keys, values = self.cache.update(xk, xv, window)
        heads = attend(xq.transpose(1, 2), keys, values, window.mask)
        (out,) = self.out(heads.transpose(1, 2).flatten(2))
        return out


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; without a mask, several queries attend causally, a single one to all keys.

    Args:
        queries: (bsz, n_heads, seqlen, head_dim).
        keys, values: (bsz, n_kv_heads, kv_len, head_dim); a key/value head serves n_heads / n_kv_heads queries' heads.
        mask: (bsz, 1, seqlen, kv_len), as in `Window`, or bool, True where a token attends.

    Returns:
        (bsz, n_heads, seqlen, head_dim).
    """
    bsz, n_heads, seqlen, head_dim = queries.shape
    n_kv_heads = keys.size(1)
    if seqlen > 1:
        return F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, enable_gqa=n_kv_heads < n_heads
        )
    # One position: the queries of a group stand in for a sequence, so that no key is copied for each of them.
    grouped = queries.reshape(bsz, n_kv_heads, n_heads // n_kv_heads, head_dim)
    return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(bsz, n_heads, 1, head_dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = _column_parallel(args.dim, args.hidden_dim)
        self.w2 = _row_parallel(args.hidden_dim, args.dim)
        self.w3 = _column_parallel(args.dim, args.hidden_dim)
        self.gate_and_up = Projection(self.w1, self.w3)
        self.down = Projection(self.w2)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x)
        (out,) = self.down(F.silu(gate).mul_(up))
        return out


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, window: Window) -> Tensor:
        h = x + self.attention(self.attention_norm(x), window)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Transformer(nn.Module):
    """The decoder. Needs an initialized model-parallel group; its weights are undefined until a shard is loaded.

    Attributes:
        params: the sizes it was made with, `max_batch_size` and `max_seq_len` of the cache among them.
    """

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        params.check_shards(get_model_parallel_world_size())
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim, init_method=_leave_undefined)
        self.layers = nn.ModuleList(TransformerBlock(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = _column_parallel(params.dim, params.vocab_size, gather_output=True)
        self.to_logits = Projection(self.output)
        # No buffer: a module's change of dtype would break it.
        self.freqs_cis = precompute_freqs_cis(params.head_dim, params.max_seq_len, params.rope_theta)

    @property
    def caches(self) -> list[KVCache]:
        """The key/value cache of each layer."""
        return [module for module in self.modules() if isinstance(module, KVCache)]

    @property
    def projections(self) -> list[Projection]:
        """Every product with sharded weights."""
        return [value for module in self.modules() for value in vars(module).values() if isinstance(value, Projection)]

    def join(self) -> None:
        """Makes layers that take the same input one product. See `Projection.join`."""
        for projection in self.projections:
            projection.join()

    def pack(self, dtype: torch.dtype, release: Release) -> None:
        """Computes in `dtype` from now on, with the weights of every projection in their fastest form.

        These weights themselves stay as they are. See `Projection.pack`.
        """
        for module in self.modules():
            if isinstance(module, (RMSNorm, ParallelEmbedding)):
                module.to(dtype)
        scratch = torch.empty(max(projection.n_weights for projection in self.projections), dtype=dtype)
        for projection in self.projections:
            projection.pack(scratch, release)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int | Tensor) -> Tensor:
        """Logits of every position, after storing its keys and values in the cache.

        Args:
            tokens: (bsz, seqlen) int64, for the cache's first bsz rows.
            start_pos: the position of the first token, or (bsz,) int64, that of each row. All earlier positions have
                to be in the cache.

        Returns:
            (bsz, seqlen, vocab_size) float32.

        Raises:
            ValueError: the batch or the last position exceeds the cache.
        """
        bsz, seqlen = tokens.shape
        kv_len = int(start_pos.max() if isinstance(start_pos, Tensor) else start_pos) + seqlen
        first = int(start_pos.min() if isinstance(start_pos, Tensor) else start_pos)
        if first < 0 or bsz > self.params.max_batch_size or kv_len > self.params.max_seq_len:
            raise ValueError(
                f"a batch of {bsz} from position {first} to {kv_len} exceeds the cache of max_batch_size="
                f"{self.params.max_batch_size} and max_seq_len={self.params.max_seq_len}"
            )
        return self.logits(self.hidden_states(tokens, start_pos, kv_len=kv_len))

    @classmethod
    def from_state(
        cls, params: ModelArgs, state: dict[str, Tensor], *, cache_dtype: torch.dtype | None = None
    ) -> Transformer:
        """The network with `state`'s own tensors as its parameters: nothing of their size is allocated on the way.

        Args:
            cache_dtype: of the KV cache, which is made on the tensors' device; None for that of the tensors.
        """
        with torch.device("meta"), _EmptyOnMeta():
            model = cls(params)
        model.load_state_dict(state, assign=True)
        for cache in model.caches:
            cache.allocate(model.norm.weight.device, cache_dtype or model.norm.weight.dtype)
        return model.eval()

    def hidden_states(
        self, tokens: Tensor, start_pos: int | Tensor, *, kv_len: int, rows: Tensor | None = None
    ) -> Tensor:
        """The normed outputs of the last block, (bsz, seqlen, dim), in the working dtype.

        Args:
            tokens, start_pos: as in `forward`.
            kv_len: the last position that a row reaches, plus one; more will do where `start_pos` is a tensor (a
                number on the host: the tensor's maximum would wait for the device).
            rows: (bsz,) int64, the rows of the cache; None for its first ones.
        """
        window = self._window(tokens, start_pos, kv_len, rows)
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, window)
        normed: Tensor = self.norm(h)
        return normed

    def logits(self, h: Tensor) -> Tensor:
        """The vocabulary projection of hidden states (..., dim): (..., vocab_size) float32."""
        (logits,) = self.to_logits(h)
        return logits.float()

    def _window(self, tokens: Tensor, start_pos: int | Tensor, kv_len: int, rows: Tensor | None) -> Window:
        bsz, seqlen = tokens.shape
        device = tokens.device
        self.freqs_cis = self.freqs_cis.to(device)
        start = torch.as_tensor(start_pos, device=device).expand(bsz)
        positions = start.unsqueeze(1) + torch.arange(seqlen, device=device)
        at_zero = isinstance(start_pos, int) and start_pos == 0
        whole_prefix = seqlen == 1 and isinstance(start_pos, int)  # every row sees all of kv_len
        mask = None
        if not (at_zero or whole_prefix):
            hidden = torch.arange(kv_len, device=device) > positions.unsqueeze(-1)
            mask = torch.where(hidden, -math.inf, 0.0).unsqueeze(1).to(self.norm.weight.dtype)
        n_heads, max_seq_len = self.params.kv_heads // get_model_parallel_world_size(), self.params.max_seq_len
        first_head = n_heads * (torch.arange(bsz, device=device) if rows is None else rows)
        heads = first_head.view(-1, 1, 1) + torch.arange(n_heads, device=device)
        return Window(
            slots=(heads * max_seq_len + positions.unsqueeze(-1)).flatten(),
            freqs_cis=self.freqs_cis[positions],
            rows=slice(bsz) if rows is None else rows,
            kv_len=0 if at_zero else kv_len,
            mask=mask,
        )


class _EmptyOnMeta(TorchDispatchMode):
    """Sends every new tensor to the meta device: fairscale's layers allocate in a way that `torch.device` misses."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its whole compiler here, which takes longer than loading a model

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.empty.memory_format:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def _leave_undefined(weight: Tensor) -> Tensor:
    """fairscale's layers take an initializer; a checkpoint overwrites the weights, so none is needed."""
    return weight


def _column_parallel(in_features: int, out_features: int, *, gather_output: bool = False) -> ColumnParallelLinear:
    """A linear layer split by output, which stays split unless gathered."""
    return ColumnParallelLinear(
        in_features, out_features, bias=False, gather_output=gather_output, init_method=_leave_undefined
    )


def _row_parallel(in_features: int, out_features: int) -> RowParallelLinear:
    """A linear layer split by input, which comes split already; the parts' results are summed over the ranks."""
    return RowParallelLinear(
        in_features, out_features, bias=False, input_is_parallel=True, init_method=_leave_undefined
    )
