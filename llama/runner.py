"""Calls of the network: a prefill, a decode step, and who has written to the KV cache last.

An unmodified network gets rows at places of their own. One whose `forward`, blocks or attention were replaced is called
as Meta's code calls it: `model(tokens, start_pos)` with an int, for rows of one length.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.model import CachePositions, takes_cache_positions
from llama.prefill import PrefillPass, plan_prefill
from llama.stepping import PlainStepper, Stepper

# What a prefill pass costs whatever its size, in positions: reading the weights, and on a GPU launching the kernels.
PASS_COST = {"cpu": 32}
_CHUNK_IN_PASS_COSTS = 16  # a prefill in chunks costs at most a sixteenth more


class ModelLock:
    """What all users of one network share: whose turn it is, and who wrote to its KV cache last.

    Attributes:
        lock: held by a call while it computes.
        holder: the thread that holds it.
        engine: a weak reference to the engine that they share, which holds the network.
        last_writer: the mark of the `ModelRunner` that ran last; not the runner, which would keep the network alive.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None
        self.engine: ReferenceType[Any] | None = None
        self.last_writer: object = None
        self._first_thread: int | None = None

    def check_thread(self, *, several_ranks: bool) -> None:
        """Raises RuntimeError in a second thread where ranks would have to agree on the order of their calls."""
        self._first_thread = self._first_thread or threading.get_ident()
        if several_ranks and self._first_thread != threading.get_ident():
            raise RuntimeError(
                "under model parallelism all calls must come from one thread, so that the ranks make them in the same "
                "order; got a call from a second one"
            )

    def __enter__(self) -> None:
        if self.holder == threading.get_ident():
            raise RuntimeError("this call was made from inside of another one, such as by a hook; wait for that to end")
        self.lock.acquire()
        self.holder = threading.get_ident()

    def try_enter(self) -> bool:
        """Enters unless this or another thread is inside; whether it did."""
        if self.holder == threading.get_ident() or not self.lock.acquire(blocking=False):
            return False
        self.holder = threading.get_ident()
        return True

    def __exit__(self, *exc_info: object) -> None:
        self.holder = None
        self.lock.release()


_uses: WeakKeyDictionary[Any, ModelLock] = WeakKeyDictionary()
_uses_lock = threading.Lock()


def lock_of(model: Any) -> ModelLock:
    """The one `ModelLock` of a network."""
    with _uses_lock:
        try:
            return _uses.setdefault(model, ModelLock())
        except TypeError:  # an object of a class that cannot be a key, as one that compares by value
            use: ModelLock = vars(model).setdefault("_use", ModelLock())
            return use


class ModelRunner:
    """Runs passes of a network for one call.

    Args:
        model: a `Transformer`, or any object with `forward(tokens, start_pos)` and `params`.
        stepper: takes the decode steps of an unmodified network; None for plain calls.

    Attributes:
        model: the network.
        one_position: whether all rows of a pass have to stand at the same position.
        looks_ahead: whether the next step shall start before the tokens of this one have reached the host.
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
        self._seen: list[object] = []  # the cache as this runner left it

    def run(self, tokens: Tensor, start_pos: int | CachePositions) -> Tensor:
        """The logits (bsz, seqlen or 1, vocab) float32 of one pass."""
        logits: Tensor = self._call(tokens, start_pos)
        self._note_cache()
        return logits.float()

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Puts prompts into those rows of the cache; returns the logits after their last tokens, (bsz, vocab)."""
        if self.one_position:  # the rows are the first ones, and of one length
            return self.run(self.pad(prompts), 0)[:, -1]
        logits: dict[int, Tensor] = {}
        for one_pass in self.plan_prefill([len(prompt) for prompt in prompts]):
            logits |= self.prefill_pass(one_pass, prompts, rows)
        return torch.stack([logits[i] for i in range(len(prompts))])

    def plan_prefill(self, lengths: Sequence[int], *, in_chunks: bool = False) -> list[PrefillPass]:
        """The passes that put prompts into the cache.

        Args:
            in_chunks: bounds the time of each pass, for steps of other sequences in between.
        """
        pass_cost = PASS_COST.get(self.device.type, 512)
        chunk = min(self._args.prefill_tokens, _CHUNK_IN_PASS_COSTS * pass_cost) if in_chunks else None
        return plan_prefill(lengths, self._args.prefill_tokens, pass_cost, chunk)

    def prefill_pass(
        self, one_pass: PrefillPass, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> dict[int, Tensor]:
        """Takes one pass of a prefill; returns the logits (vocab,) after the last token of each prompt that it ends."""
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
        """Feeds tokens (bsz, width) to the first rows, which hold `lengths` tokens.

        Returns the logits (bsz, width, vocab) float32.
        """
        logits = self._stepper(tokens, lengths)
        self._note_cache()
        return logits.float()

    def pad(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The prompts right-padded, (bsz, longest) int64.

        Causal attention keeps the tokens from the padding behind them; what it leaves in the cache is overwritten
        before any later token attends there.
        """
        width = max(map(len, prompts))
        return torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one cache row over those of another, in every layer."""
        if self.has_lost_cache():
            return  # it will be computed anew where the row stands then
        for cache in _caches(self.model):
            cache[target, :length] = cache[source, :length]
        self._note_cache()

    def has_lost_cache(self) -> bool:
        """Whether the cache has been written to by anybody else since this runner's last pass."""
        return self._lock.last_writer is not self._mark or self._seen != self._cache_state()

    def _note_cache(self) -> None:
        self._lock.last_writer = self._mark
        self._seen = self._cache_state()

    def _cache_state(self) -> list[object]:
        """Changes whenever something is written to the cache of `Attention` layers, or of others that are like them."""
        if self.one_position:  # any network: whatever of its modules has a cache
            caches = _caches(self.model)
            return [(k.data_ptr(), None if k.is_inference() else k._version) for k in caches]
        caches = [cache for layer in self.model.layers for cache in (layer.attention.keys, layer.attention.values)]
        return [(id(cache), None if cache.is_inference() else cache._version) for cache in caches]


def device_of(model: Any) -> torch.device:
    """That of a network's parameters; the CPU for one without."""
    parameters: Iterable[Tensor] = model.parameters() if hasattr(model, "parameters") else ()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def dtype_of(model: Any) -> torch.dtype:
    """That of a network's parameters; float32 for one without."""
    parameters: Iterable[Tensor] = model.parameters() if hasattr(model, "parameters") else ()
    return next((parameter.dtype for parameter in parameters), torch.float32)


def _caches(model: Any) -> list[Tensor]:
    """The KV cache of every layer, with Meta's axes."""
    modules: Iterable[Any] = model.modules() if hasattr(model, "modules") else ()
    owners = [module for module in modules if isinstance(getattr(module, "cache_k", None), Tensor)]
    return [cache for owner in owners for cache in (owner.cache_k, owner.cache_v)]
