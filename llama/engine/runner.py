"""One pass of the network: tokens in, logits out, keys and values in the cache; and what a prefill's passes hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llama.distributed.device import to_device
from llama.engine.lock import lock_of
from llama.layers.cache import CachePositions, KVCache
from llama.model import Attention, ModelArgs, Transformer, TransformerBlock

_LOGIT_POSITIONS = 512  # maximum number of positions whose logits are in memory at a time
# Fixed cost of a prefill pass, in positions: reading the weights and, on a GPU, launching kernels.
PASS_COST = {"cpu": 32}
_CHUNK_IN_PASS_COSTS = 16  # chunked prefill costs at most 1/16 more


# The original functions, to detect patched classes as well as patched instances.
_FORWARDS = (Transformer.forward, TransformerBlock.forward, Attention.forward, KVCache.forward)


class Stepper(Protocol):
    """A way to run decode steps.

    Attributes:
        looks_ahead: whether to start the next step before the tokens of the current one are on the host.
    """

    looks_ahead: bool

    def serves(self, model: object) -> bool:
        """Whether this stepper computes what calling `model` would now. Checked before new sequences start."""

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Feeds tokens to the cache's first rows.

        Args:
            tokens: (bsz, width) int64, on the model's device. Rows with fewer tokens are right-padded.
            lengths: number of tokens that each row of the cache already holds; all have room for one more.

        Returns:
            Logits (bsz, width, vocab_size); the next call may overwrite them. None if the network is to be called.
        """


class ModelRunner:
    """Runs passes of a network.

    Args:
        model: a `Transformer`, or any object with `forward(tokens, start_pos)` and `params`.
        stepper: runs the decode passes of an unmodified network; None to call the network directly.

    Attributes:
        one_position: whether all rows of a pass must be at the same position.
        looks_ahead: whether to start the next decode pass before the tokens of the current one are on the host.
    """

    def __init__(self, model: Any, stepper: Stepper | None = None) -> None:
        self.model = model
        self._call = model if callable(model) else model.forward
        self.one_position = not takes_cache_positions(model)
        self.device = device_of(model)
        self._args = ModelArgs.of(model.params)
        self._pass_cost = PASS_COST.get(self.device.type, 512)
        self._stepper = None if self.one_position else stepper
        self.looks_ahead = self._stepper is not None and self._stepper.looks_ahead
        self.max_batch_size = self._args.max_batch_size
        self.max_seq_len = self._args.max_seq_len
        self._lock = lock_of(model)
        self._mark = object()
        self._seen: list[object] = []  # state of the cache after this runner's last pass

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for runners of one network that do the same."""
        return self.one_position, self._stepper, self.device, self.max_batch_size, self.max_seq_len

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int],
        starts: Sequence[int] | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Computes tokens of several rows in one pass.

        Args:
            tokens: for each row, the tokens that follow those in the cache.
            starts: for each row, the number of tokens in the cache; None for 0.
            all_logits: whether to return the logits after all tokens.

        Returns:
            Logits (bsz, vocab) float32 after the last token of each row, or (bsz, seqlen, vocab).
        """
        starts = starts or [0] * len(rows)
        padded = self.pad(tokens)
        start_pos: int | CachePositions = starts[0]
        if not self.one_position and (len(set(starts)) > 1 or list(rows) != list(range(len(rows)))):
            start_pos = CachePositions(
                start=to_device(starts, self.device),
                kv_len=max(start + len(row) for start, row in zip(starts, tokens, strict=True)),
                rows=to_device(rows, self.device),
                from_zero=not any(starts),
            )
        self._lock.last_writer = None  # if the pass is interrupted, nobody's keys are there
        if all_logits or self.one_position or padded.size(1) == 1:
            logits: Tensor = self._call(padded, start_pos)
        else:
            last = to_device([len(row) - 1 for row in tokens], self.device)
            logits = self._call(padded, start_pos, last=last)
        self._note_cache()
        return (logits if all_logits else logits[:, -1]).float()  # without `last`, rows have no padding

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Feeds tokens (bsz, width) to the first bsz rows of the cache, which already hold `lengths` tokens.

        Returns:
            Logits (bsz, width, vocab) float32.
        """
        logits = self._stepper(tokens, lengths) if self._stepper else None
        if logits is None:
            end = max(lengths) + tokens.size(1)
            start_pos: int | CachePositions = lengths[0]
            if len(set(lengths)) > 1 or end > self.max_seq_len:  # where all rows share it, an int as in Meta's code
                start_pos = CachePositions(to_device(lengths, tokens.device), kv_len=end)
            logits = self._call(tokens, start_pos)
        self._note_cache()
        return logits.float()

    def next_group(
        self, lengths: Sequence[int], *, in_chunks: bool = False, all_logits: bool = False
    ) -> tuple[list[int], int]:
        """The part of a prefill that the next pass computes, given how many tokens each of several rows lacks.

        Args:
            in_chunks: whether other sequences are to be decoded between the passes.
            all_logits: whether the logits after all positions are needed, which take much memory.

        Returns:
            The indices of the rows that share the pass, among them the first, and the maximum number of tokens of each.
        """
        limit = self._args.prefill_tokens
        if in_chunks:
            limit = min(limit, _CHUNK_IN_PASS_COSTS * self._pass_cost)
        if all_logits:
            limit = min(limit, _LOGIT_POSITIONS)
        group = next(group for group in prefill_groups(lengths, limit, self._pass_cost) if 0 in group)
        return group, min(max(lengths[i] for i in group), limit)

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Right-pads rows to a tensor (bsz, longest) int64.

        Causal attention hides the padding from the tokens before it, and its keys and values in the cache are
        overwritten before a later token attends to them.
        """
        width = max(map(len, rows))
        flat = [token for row in rows for token in (*row, *[0] * (width - len(row)))]
        return to_device(flat, self.device).view(len(rows), width)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of cache row `source` to row `target`, in every layer."""
        if self.has_lost_cache():
            return  # the engine will recompute the row in its new place
        for cache in _caches(self.model):
            cache[target, :length] = cache[source, :length]
        self._note_cache()

    def clear_row(self, row: int) -> None:
        """Fills a row of the cache with zeros, in every layer. To be called right after this runner's pass."""
        for cache in _caches(self.model):
            cache[row].zero_()
        self._note_cache()

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Exchanges the first `length` positions of two rows of the cache, in every layer."""
        if self.has_lost_cache():
            return
        for cache in _caches(self.model):
            cache[[a, b], :length] = cache[[b, a], :length]
        self._note_cache()

    def has_lost_cache(self) -> bool:
        """Whether anyone else has written to the cache since this runner's last pass."""
        return self._lock.last_writer is not self._mark or self._seen != self._cache_state()

    def _note_cache(self) -> None:
        self._lock.last_writer = self._mark
        self._seen = self._cache_state()

    def _cache_state(self) -> list[object]:
        """A value that changes whenever the KV cache is written to or replaced."""
        if self.one_position:  # may be any network: look for caches in all of its modules
            return [(k.data_ptr(), None if k.is_inference() else k._version) for k in _caches(self.model)]
        caches: list[Tensor | None] = []
        for layer in self.model.layers:
            cache = getattr(getattr(layer, "attention", None), "cache", None)  # None in a module of another's
            caches += (getattr(cache, "keys", None), getattr(cache, "values", None))  # None where they were freed
        return [(id(cache), None if cache is None or cache.is_inference() else cache._version) for cache in caches]


def takes_cache_positions(model: Any) -> bool:
    """Whether `model` is a `Transformer` that accepts `CachePositions`.

    False if the model, a block, an attention or a KV cache was replaced, or its `forward` was patched, overridden or
    compiled: such code may support only Meta's int `start_pos`.
    """
    whole, block, attention, cache = _FORWARDS
    return _runs(model, whole) and all(
        _runs(x, block) and _runs(x.attention, attention) and _runs(x.attention.cache, cache) for x in model.layers
    )


def _runs(module: Any, forward: Callable[..., object]) -> bool:
    """Whether calling the module runs exactly the function `forward`."""
    is_original = getattr(type(module), "forward", None) is forward and "forward" not in vars(module)
    return is_original and module._compiled_call_impl is None


def prefill_groups(lengths: Sequence[int], max_positions: int, pass_cost: int) -> list[list[int]]:
    """Groups prompts by length so that the total cost of padding and passes is minimal.

    Args:
        max_positions: maximum number of positions per pass, including padding; a pass of one prompt may exceed it.
        pass_cost: fixed cost of a pass, in positions.

    Returns:
        The indices of each group's prompts, in ascending order.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[int, list[list[int]]]] = [(0, [])]  # for the first n prompts in order: minimum cost, groups
    for end in range(1, len(order) + 1):
        cost, start = min(
            (best[start][0] + positions + pass_cost, start)
            for start in range(end)
            if (positions := lengths[order[start]] * (end - start)) <= max_positions or end - start == 1
        )
        best.append((cost, [*best[start][1], sorted(order[start:end])]))
    return best[-1][1]


def device_of(model: Any) -> torch.device:
    """The device of a network's parameters; the CPU if it has none."""
    parameters: Iterable[Tensor] = model.parameters() if hasattr(model, "parameters") else ()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def dtype_of(model: Any) -> torch.dtype:
    """The dtype of a network's parameters; float32 if it has none."""
    parameters: Iterable[Tensor] = model.parameters() if hasattr(model, "parameters") else ()
    return next((parameter.dtype for parameter in parameters), torch.float32)


def _caches(model: Any) -> list[Tensor]:
    """The KV caches of all layers, with Meta's axes (max_batch_size, max_seq_len, n_local_kv_heads, head_dim)."""
    modules: Iterable[Any] = model.modules() if hasattr(model, "modules") else ()
    owners = [module for module in modules if isinstance(getattr(module, "cache_k", None), Tensor)]
    return [cache for owner in owners for cache in (owner.cache_k, owner.cache_v)]
