"""A stand-in for CUDA graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from llama import Transformer
from llama.engine.cuda_graphs import StaticStepper


class RecordedStepper(StaticStepper):
    """Records the operations of a step when it first comes up, and runs the record from then on, as a CUDA graph does:
    the same operations on the same memory, whatever Python would do by now.

    Attributes:
        captured: rows, width and length of the prefix of each step that was recorded.
        n_replayed: number of steps that were run from a record.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__(model, graphs=False)
        self._graphs = True
        self.captured: list[tuple[int, int, int]] = []
        self.n_replayed = 0

    def _make_step(self, bsz: int, width: int, kv_len: int) -> Callable[[], Tensor]:
        self.captured.append((bsz, width, kv_len))
        return super()._make_step(bsz, width, kv_len)

    def _capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with _Record() as record:
            logits = step()

        def replay() -> Tensor:
            self.n_replayed += 1
            return logits.copy_(record.replay()[id(logits)])

        return replay


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_flatten(out)[0]))
        return out

    def replay(self) -> dict[int, Tensor]:
        """The new values of each recorded tensor, by its id."""
        new: dict[int, Tensor] = {}

        def current(tensor: Tensor) -> Tensor:
            return new.get(id(tensor), tensor)

        for func, args, kwargs, outs in self.calls:
            args, kwargs = tree_map_only(Tensor, current, (args, kwargs))
            new |= {id(old): out for old, out in zip(outs, tree_flatten(func(*args, **kwargs))[0], strict=True)}
        return new
