"""One decode step of the network: each row's newest tokens in, the logits after each of them out.

A plain step has one token per row. With speculative decoding, drafted tokens follow it.

Two ways that give the same logits: the plain one, and a static one, in which neither shapes nor addresses nor the
control flow change from token to token, so that a GPU can replay it as a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from llama import model as network
from llama.model import CachePositions, Transformer, takes_cache_positions
from llama.runtime import to_device

KV_BUCKET = 256  # positions; a static step attends to a whole number of these, past the rows' ends by a mask
MAX_WIDTH = 16  # tokens per row of a step

logger = logging.getLogger(__name__)


class Stepper(Protocol):
    """A way to take a step.

    Attributes:
        looks_ahead: whether the next step shall start before the tokens of this one have reached the host.
    """

    looks_ahead: bool

    def serves(self, model: object) -> bool:
        """Whether its steps are those that `model` would take now; asked before each call."""

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Feeds tokens to the cache's first rows.

        Args:
            tokens: (bsz, width) int64, on the model's device. Rows with fewer tokens are padded at their end.
            lengths: the number of tokens that each row's cache holds already; all have room for `width` more.

        Returns:
            (bsz, width, vocab_size); the next call may overwrite it.
        """


class PlainStepper:
    """Calls the network with just the positions that are there: an int `start_pos` where all rows have the same one."""

    looks_ahead = False

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self._call = call

    def serves(self, model: object) -> bool:
        return True

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        longest = max(lengths)
        start_pos: int | CachePositions = longest
        if longest != min(lengths):
            start_pos = CachePositions(to_device(lengths, tokens.device), kv_len=longest + tokens.size(1))
        return self._call(tokens, start_pos)


class StaticStepper:
    """Takes tokens and positions from buffers on the device; rows are padded to a power of two, the prefix to buckets.

    Args:
        model: the network.
        graphs: whether each (rows, width, prefix) is captured as a CUDA graph when it first comes up, and replayed from
            then on: one launch in place of hundreds. Where that fails, one warning is logged, and each kernel is
            launched.
    """

    looks_ahead = True

    def __init__(self, model: Transformer, *, graphs: bool) -> None:
        device = model.norm.weight.device
        self._model = model
        self._tokens = torch.zeros(model.params.max_batch_size * MAX_WIDTH, dtype=torch.int64, device=device)
        self._positions = torch.zeros(model.params.max_batch_size, dtype=torch.int64, device=device)
        self._graphs = graphs
        self._pool = torch.cuda.graph_pool_handle() if graphs else None  # the graphs never run at the same time
        self._steps: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        self._captured: tuple[list[Any], list[int]] = ([], [])  # what the graphs hold for good: see `_fixed_parts`

    def serves(self, model: object) -> bool:
        """Hooks need Python, so they rule graphs out. Graphs of code, modules or memory replaced since are dropped."""
        if model is not self._model or not self._graphs:
            return model is self._model
        if _has_hooks(self._model):
            return False
        objects, addresses = _fixed_parts(self._model)
        known, known_addresses = self._captured
        same = len(objects) == len(known) and all(a is b for a, b in zip(objects, known, strict=True))
        if not same or addresses != known_addresses:
            self._steps.clear()
            self._captured = objects, addresses
        return True

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        (n_rows, width), params = tokens.shape, self._model.params
        # Padding goes to the last positions of the rows behind, which are free, or whose prefill has not come that far.
        bsz = min(_power_of_two(n_rows), params.max_batch_size)
        kv_len = min(_whole(max(lengths) + width, KV_BUCKET), params.max_seq_len)
        self._tokens[: tokens.numel()].copy_(tokens.flatten())
        self._positions[:bsz].copy_(
            to_device([*lengths, *[params.max_seq_len - width] * (bsz - n_rows)], tokens.device)
        )
        sizes = bsz, width, kv_len
        if sizes not in self._steps:
            self._steps[sizes] = self._make_step(*sizes)
        return self._steps[sizes]()[:n_rows]

    def _make_step(self, bsz: int, width: int, kv_len: int) -> Callable[[], Tensor]:
        """The step for these sizes, with the buffers as its input."""
        tokens = self._tokens[: bsz * width].view(bsz, width)

        def step() -> Tensor:
            positions = CachePositions(self._positions[:bsz], kv_len=kv_len)
            logits: Tensor = self._model(tokens, positions)
            return logits

        if not self._graphs:
            return step
        try:
            return self._capture(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._graphs = False
            logger.warning("CUDA graphs are off, which makes each token slower; capturing one failed: %s", error)
            return step

    def _capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        device = self._tokens.device
        warm_up = torch.cuda.Stream(device)
        warm_up.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(warm_up):
            step()  # libraries allocate and choose their kernels when first used, which no capture allows
        torch.cuda.current_stream(device).wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, go on talking to the device meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def choose_stepper(model: Any, *, cuda_graphs: bool) -> Stepper | None:
    """The stepper that serves the model's device best; None for plain calls."""
    on_cuda = takes_cache_positions(model) and model.norm.weight.device.type == "cuda"
    return StaticStepper(model, graphs=cuda_graphs) if on_cuda else None


def _has_hooks(model: nn.Module) -> bool:
    """Whether hooks run when the model is called."""
    global_hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return any(global_hooks) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _fixed_parts(model: nn.Module) -> tuple[list[Any], list[int]]:
    """What a captured graph holds for good: code, modules, their attributes, and the memory of their tensors."""
    objects: list[Any] = list(vars(network).values())
    addresses = []
    for module in model.modules():
        parts = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
        objects += [module, type(module).forward, *parts]
        addresses += [part.data_ptr() for part in parts if isinstance(part, Tensor)]
    return objects, addresses


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def _whole(n: int, unit: int) -> int:
    """The least multiple of `unit` that is not below n."""
    return -(-n // unit) * unit
