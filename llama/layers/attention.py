"""Attention: the product of scores and values, and the causal mask, by the kernels that are fastest for each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_POSITIONS = 16  # with more, copying keys for each query head of a group costs little in proportion
# Before torch 2.9 a CPU's fused kernel takes no groups: slower code that holds all scores at a time runs in its place.
_CPU_KERNEL_TAKES_GROUPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
    """Computes softmax(q k^T / sqrt(head_dim) + mask) v.

    Args:
        queries: (bsz, n_heads, seqlen, head_dim).
        keys, values: (bsz, n_kv_heads, kv_len, head_dim); n_heads / n_kv_heads query heads share each of them.
        mask: broadcastable to (bsz, n_heads, seqlen, kv_len); None for no mask.
        is_causal: applies a causal mask; kv_len must equal seqlen.

    Returns:
        (bsz, n_heads, seqlen, head_dim).
    """
    bsz, n_heads, seqlen, head_dim = queries.shape
    n_kv_heads = keys.size(1)
    n_rep = n_heads // n_kv_heads
    if mask is not None and mask.is_floating_point():
        mask = mask.to(queries.dtype)
    per_head = mask is not None and mask.dim() == 4 and mask.size(1) > 1
    is_short = isinstance(seqlen, int) and seqlen <= _FEW_POSITIONS  # not of a symbolic length, in an export
    if n_rep == 1 or not is_short or is_causal or per_head:
        if n_rep > 1 and queries.device.type == "cpu" and not _CPU_KERNEL_TAKES_GROUPS:
            return _attend_by_group(queries, keys, values, mask, is_causal)
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal, enable_gqa=n_rep > 1)
    # The query heads of a group are treated as further positions of one head, so that keys need not be copied.
    grouped = queries.reshape(bsz, n_kv_heads, n_rep * seqlen, head_dim)
    if mask is not None and seqlen > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), n_rep, 1)
    return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(queries.shape)


def _attend_by_group(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """`attend` by one product per key/value head, which its group shares without a copy."""
    n_kv_heads = keys.size(1)
    n_rep = queries.size(1) // n_kv_heads
    shared = (x.unsqueeze(2).expand(-1, -1, n_rep, -1, -1).unbind(1) for x in (keys, values))
    per_head = mask is not None and mask.dim() == 4 and mask.size(1) > 1
    masks = mask.split(n_rep, 1) if mask is not None and per_head else [mask] * n_kv_heads
    groups = zip(queries.split(n_rep, 1), *shared, masks, strict=True)
    heads = [F.scaled_dot_product_attention(q, k, v, m, is_causal=is_causal) for q, k, v, m in groups]
    return torch.cat(heads, 1)


def causal_mask(seqlen: int, start_pos: int, h: Tensor) -> Tensor:
    """A mask (seqlen, start_pos + seqlen) in the dtype of h: 0 up to each token's own position, -inf after it."""
    with torch.inference_mode(False):  # inference tensors do not count their edits
        positions = torch.arange(start_pos + seqlen, device=h.device)
        visible = positions <= positions[start_pos:].unsqueeze(1)
        mask = torch.full(visible.shape, -math.inf, dtype=h.dtype, device=h.device).masked_fill_(visible, 0.0)
    if start_pos == 0 and not torch.compiler.is_compiling():
        mask.unedited = id(mask), mask._version  # type: ignore[attr-defined]
    return mask


def is_causal_mask(mask: Tensor | None) -> bool:
    """Whether a mask comes from `causal_mask`, from position 0, unedited: kernels for causal attention are faster."""
    unedited = getattr(mask, "unedited", None)
    return mask is not None and unedited is not None and unedited[0] == id(mask) and unedited[1] == mask._version
