"""The KV cache of a layer: where a pass stores its keys and values, and what it attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SPARE_POSITIONS = 16  # of each cache row, after max_seq_len: room for the padding of a row that is nearly full


@dataclass(frozen=True)
class CachePositions:
    """The rows and positions of a pass in the KV cache, for rows that do not share one int `start_pos`.

    Attributes:
        start: (bsz,) int64, the position of each row's first token. Padding after a row's tokens may reach up to
            `SPARE_POSITIONS` beyond max_seq_len.
        kv_len: number of cached positions to attend to; above the position of every token that is not padding.
        rows: (bsz,) int64, the cache row of each sequence; None for the first bsz rows.
        from_zero: whether all rows start at position 0. Attention then needs only the keys of the pass itself, and is
            causal without a mask tensor.
        slots: (bsz * seqlen * n_local_kv_heads,) int64, where the keys of each token and head are stored in the cache
            when it is viewed as (-1, head_dim). `Transformer.forward` computes it once for all layers.
    """

    start: Tensor
    kv_len: int
    rows: Tensor | None = None
    from_zero: bool = False
    slots: Tensor | None = None


class KVCache(nn.Module):
    """The keys and values of one layer: stores them in each pass, and returns all to attend to.

    Attributes:
        keys, values: (max_batch_size, n_local_kv_heads, max_seq_len + SPARE_POSITIONS, head_dim); None where the memory
            was freed, until the next pass.
        shape: the shape of each.
        lacks_graph: whether a pass with gradients stored what the cache holds, without its graph.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, max_batch_size: int, n_local_kv_heads: int, max_seq_len: int, head_dim: int) -> None:
        super().__init__()
        self.shape = (max_batch_size, n_local_kv_heads, max_seq_len + SPARE_POSITIONS, head_dim)
        self.lacks_graph = False
        self.register_buffer("keys", torch.zeros(self.shape), persistent=False)
        self.register_buffer("values", torch.zeros(self.shape), persistent=False)

    def forward(self, xk: Tensor, xv: Tensor, start_pos: int | CachePositions | None) -> tuple[Tensor, Tensor]:
        """Stores keys and values, and returns all those up to the last stored position.

        The cache is detached: gradients flow through the returned tensors, and what earlier passes stored is constant.

        Args:
            xk, xv: (bsz, n_local_kv_heads, seqlen, head_dim).
            start_pos: as in `Attention.forward`.

        Returns:
            Keys and values, each (bsz, n_local_kv_heads, kv_len, head_dim).

        Raises:
            RuntimeError: gradients would have to flow through what an earlier pass stored.
        """
        if start_pos is None:
            return xk, xv
        keys, values = self._buffers_like(xk)
        if isinstance(start_pos, CachePositions):
            return self._update_rows(xk, xv, start_pos)
        bsz, end = xk.size(0), start_pos + xk.size(2)
        requires_grad = xk.requires_grad or xv.requires_grad
        if start_pos > 0 and requires_grad and self.lacks_graph:
            raise RuntimeError(
                f"gradients cannot flow through the KV cache, got start_pos={start_pos} after a pass with gradients; "
                "pass all tokens from start_pos=0, or compute the earlier ones under torch.no_grad(), as constants"
            )
        self.lacks_graph = requires_grad or (start_pos > 0 and self.lacks_graph)
        keys[:bsz, :, start_pos:end] = xk.detach()
        values[:bsz, :, start_pos:end] = xv.detach()
        if start_pos == 0:
            return xk, xv
        if requires_grad:
            cached = (keys[:bsz, :, :start_pos], values[:bsz, :, :start_pos])
            return torch.cat((cached[0], xk), dim=2), torch.cat((cached[1], xv), dim=2)
        return keys[:bsz, :, :end], values[:bsz, :, :end]

    def _buffers_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, in the dtype and on the device of x; zeros in place of those that were freed."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            with torch.inference_mode(False):
                self.keys = keys = x.new_zeros(self.shape) if keys is None else keys
                self.values = values = x.new_zeros(self.shape) if values is None else values
        is_frozen = keys.is_inference() or values.is_inference()  # cannot be written to outside of inference mode
        if keys.dtype != x.dtype or keys.device != x.device or is_frozen:
            with torch.inference_mode(False):
                self.keys, self.values = (t.to(x, copy=True) for t in (keys, values))
        return self.keys, self.values

    def _update_rows(self, xk: Tensor, xv: Tensor, positions: CachePositions) -> tuple[Tensor, Tensor]:
        if not positions.from_zero and (xk.requires_grad or xv.requires_grad):
            raise RuntimeError(
                "start_pos must be an int when gradients are required, got a position per row; pass rows with the same "
                "start_pos, or use torch.no_grad()"
            )
        assert positions.slots is not None
        for cached, new in ((self.keys, xk), (self.values, xv)):
            vectors = new.detach().transpose(1, 2).flatten(0, 2)  # in the order of the slots: by row, token, head
            cached.view(-1, cached.size(-1)).index_copy_(0, positions.slots, vectors)
        if positions.from_zero:
            return xk, xv
        rows = slice(xk.size(0)) if positions.rows is None else positions.rows
        return self.keys[rows, :, : positions.kv_len], self.values[rows, :, : positions.kv_len]

    def slots(self, positions: Tensor, rows: Tensor | None) -> Tensor:
        """Computes `CachePositions.slots` for the positions (bsz, seqlen) of the tokens, and the cache row of each."""
        _, n_kv_heads, n_positions, _ = self.shape
        rows = torch.arange(positions.size(0), device=positions.device) if rows is None else rows
        heads = (n_kv_heads * rows).view(-1, 1, 1) + torch.arange(n_kv_heads, device=positions.device)
        return (heads * n_positions + positions.unsqueeze(-1)).flatten()

    def assign(self, name: str, cache: Tensor | None) -> None:
        """Copies `cache`, which has Meta's axes, into the buffer `name`: "keys" or "values". None frees it.

        The buffer is replaced by a new one if the number of rows, the dtype or the device differ.

        Raises:
            ValueError: another axis has the wrong size.
        """
        if cache is None:
            setattr(self, name, None)
            return
        _, n_kv_heads, n_positions, head_dim = self.shape
        sizes = (n_positions - SPARE_POSITIONS, n_kv_heads, head_dim)
        if cache.dim() != 4 or cache.shape[1:] != sizes:
            shape = ", ".join(map(str, ("max_batch_size", *sizes)))
            raise ValueError(f"the cache must have shape ({shape}), got {tuple(cache.shape)}")
        buffer = getattr(self, name)
        if buffer is not None:
            current = with_metas_axes(buffer)
            if cache.data_ptr() == current.data_ptr() and cache.stride() == current.stride():
                return  # `self.cache_k = self.cache_k.to(x)`, as in Meta's code, with nothing to convert
        if buffer is None or (len(cache), cache.dtype, cache.device) != (len(buffer), buffer.dtype, buffer.device):
            self.shape = (len(cache), n_kv_heads, n_positions, head_dim)
            with torch.inference_mode(False):
                buffer = torch.zeros(self.shape, dtype=cache.dtype, device=cache.device)
            setattr(self, name, buffer)
        with_metas_axes(buffer).copy_(cache.detach())

    def extra_repr(self) -> str:
        max_batch_size, n_kv_heads, n_positions, head_dim = self.shape
        return f"{max_batch_size}, {n_kv_heads}, {n_positions - SPARE_POSITIONS}, {head_dim}"


def with_metas_axes(cache: Tensor) -> Tensor:
    """A view (max_batch_size, max_seq_len, n_local_kv_heads, head_dim) of a buffer, without the spare positions."""
    if cache is None:  # freed
        return cache
    return cache[:, :, :-SPARE_POSITIONS].transpose(1, 2).as_subclass(_CacheView)


def cache_view(name: str) -> property:
    """The attribute of an attention that is its cache's buffer `name` with Meta's axes: see `KVCache.assign`."""
    return property(
        lambda attention: with_metas_axes(getattr(attention.cache, name)),
        lambda attention, cache: attention.cache.assign(name, cache),
        lambda attention: attention.cache.assign(name, None),
    )


class _CacheView(Tensor):
    """A view of the KV cache, a plain tensor for every operation; what is assigned to `data` is copied into it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor).data

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.copy_(value.view(self.shape))  # of this very shape: not broadcast

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)
