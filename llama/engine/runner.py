"""Runs prefill and decode passes of a network, and detects when others have written to its KV cache.

In an unmodified network each row of a pass has its own position. A network whose `forward`, blocks or attention were
replaced is called as in Meta's code, `model(tokens, start_pos)` with an int, with rows of equal length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.engine.cuda_graphs import PlainStepper, Stepper
from llama.engine.lock import lock_of
from llama.engine.prefill import PrefillPass, plan_prefill
from llama.model import CachePositions, takes_cache_positions

# Fixed cost of a prefill pass, in positions: reading the weights and, on a GPU, launching kernels.
PASS_COST = {"cpu": 32}
_CHUNK_IN_PASS_COSTS = 16  # chunked prefill costs at most 1/16 more


class ModelRunner:
    """Runs passes of a network for one call.

    Args:
        model: a `Transformer`, or any object with `forward(tokens, start_pos)` and `params`.
        stepper: runs the decode steps of an unmodified network; None to call the network directly.

    Attributes:
        model: the network.
        one_position: whether all rows of a pass must be at the same position.
        looks_ahead: whether to start the next step before the tokens of the current one are on the host.
        device: the device of the network's parameters.
        max_batch_size, max_seq_len: size of the KV cache.
    """

    def __init__(self, model: Any, stepper: Stepper | None = None) -> None:
        self.model = model
        self._call = model if callable(model) else model.forward
        self.one_position = not takes_cache_positions(model)
        self._stepper = stepper if stepper and not self.one_position else PlainStepper(self._call)
        self.looks_ahead = self._stepper.looks_ahead
        self.device = device_of(model)
        self._args = ModelArgs.of(model.params)
        self.max_batch_size = self._args.max_batch_size
        self.max_seq_len = self._args.max_seq_len
        self._lock = lock_of(model)
        self._mark = object()
        self._seen: list[object] = []  # state of the cache after this runner's last pass

    def run(self, tokens: Tensor, start_pos: int | CachePositions) -> Tensor:
        """Runs one pass; returns the logits (bsz, seqlen or 1, vocab) float32."""
        logits: Tensor = self._call(tokens, start_pos)
        self._note_cache()
        return logits.float()

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Prefills prompts into these rows of the cache; returns the logits after their last tokens, (bsz, vocab)."""
        if self.one_position:  # the rows are then the first ones, and the prompts have equal lengths
            return self.run(self.pad(prompts), 0)[:, -1]
        logits: dict[int, Tensor] = {}
        for one_pass in self.plan_prefill([len(prompt) for prompt in prompts]):
            logits |= self.prefill_pass(one_pass, prompts, rows)
        return torch.stack([logits[i] for i in range(len(prompts))])

    def plan_prefill(self, lengths: Sequence[int], *, in_chunks: bool = False) -> list[PrefillPass]:
        """Plans the passes that prefill prompts of these lengths.

        Args:
            in_chunks: whether to split long prompts, so that other sequences can take steps between the passes.
        """
        pass_cost = PASS_COST.get(self.device.type, 512)
        chunk = min(self._args.prefill_tokens, _CHUNK_IN_PASS_COSTS * pass_cost) if in_chunks else None
        return plan_prefill(lengths, self._args.prefill_tokens, pass_cost, chunk)

    def prefill_pass(
        self, one_pass: PrefillPass, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> dict[int, Tensor]:
        """Runs one pass of a prefill.

        Returns:
            For each prompt that the pass completes, by its index: the logits (vocab,) after its last token.
        """
        start, end, n_prompts = one_pass.start, one_pass.end, len(one_pass.places)
        tokens = self.pad([prompts[i][start:end] for i in one_pass.places])
        last = [min(len(prompts[i]), end) - 1 - start for i in one_pass.places]
        positions = CachePositions(
            start=torch.full((n_prompts,), start, dtype=torch.int64, device=self.device),
            kv_len=start + tokens.size(1),
            rows=torch.tensor([rows[i] for i in one_pass.places], device=self.device),
            from_zero=start == 0,
            last=torch.tensor(last, device=self.device),
        )
        logits = self.run(tokens, positions)[:, 0]
        return {i: row for i, row in zip(one_pass.places, logits, strict=True) if len(prompts[i]) <= end}

    def step(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Feeds tokens (bsz, width) to the first bsz rows of the cache, which already hold `lengths` tokens.

        Returns:
            Logits (bsz, width, vocab) float32.
        """
        logits = self._stepper(tokens, lengths)
        self._note_cache()
        return logits.float()

    def pad(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Right-pads prompts to a tensor (bsz, longest) int64.

        Causal attention hides the padding from the tokens before it, and its keys and values in the cache are
        overwritten before a later token attends to them.
        """
        width = max(map(len, prompts))
        return torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of cache row `source` to row `target`, in every layer."""
        if self.has_lost_cache():
            return  # the engine will recompute the row in its new place
        for cache in _caches(self.model):
            cache[target, :length] = cache[source, :length]
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
            caches = _caches(self.model)
            return [(k.data_ptr(), None if k.is_inference() else k._version) for k in caches]
        caches = [cache for layer in self.model.layers for cache in (layer.attention.keys, layer.attention.values)]
        return [(id(cache), None if cache.is_inference() else cache._version) for cache in caches]


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
