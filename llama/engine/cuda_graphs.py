"""Runs a decode step of the network: feeds each row's newest token, and returns the logits after it.

With speculative decoding, drafted tokens follow the newest one. `StaticStepper` gives the network's logits with shapes,
addresses and control flow that do not change from step to step, so that a GPU can replay a step as a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.distributed.device import to_device
from llama.engine.network_state import fixed_parts, has_hooks, same_objects
from llama.engine.runner import Stepper, takes_cache_positions
from llama.layers.cache import SPARE_POSITIONS, CachePositions
from llama.model import Transformer

KV_BUCKET = 256  # a static step attends to a multiple of this many positions; those past a row's end are masked
MAX_WIDTH = SPARE_POSITIONS  # maximum number of tokens per row in a decode pass; padding goes to spare positions

logger = logging.getLogger(__name__)


class StaticStepper:
    """Reads tokens and positions from fixed buffers on the device.

    The number of rows is padded to a power of two, and the number of cached positions to a multiple of `KV_BUCKET`.

    Args:
        graphs: whether to capture a CUDA graph for each (rows, width, positions) on first use and replay it afterwards,
            with one launch instead of hundreds. If capturing fails, logs a warning and launches kernels one by one.
        compiled: a `CompiledStepper`, which computes the steps of one token per row as long as it serves the model;
            None for the model itself.
    """

    looks_ahead = True

    def __init__(self, model: Transformer, *, graphs: bool, compiled: Any = None) -> None:
        device = model.norm.weight.device
        self._model = model
        self._tokens = torch.zeros(model.params.max_batch_size * MAX_WIDTH, dtype=torch.int64, device=device)
        self._positions = torch.zeros(model.params.max_batch_size, dtype=torch.int64, device=device)
        self._graphs = graphs
        self._compiled = compiled
        self._is_compiled = compiled is not None
        self._pool = torch.cuda.graph_pool_handle() if graphs else None  # shared: graphs never run at the same time
        self._steps: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        self._captured: tuple[list[Any], list[Any]] = ([], [])  # what the graphs depend on: see `fixed_parts`

    def serves(self, model: object) -> bool:
        """False for a model with hooks, which a graph cannot run. Drops graphs if code, modules or memory changed."""
        if model is not self._model:
            return False
        is_compiled = self._compiled is not None and self._compiled.serves(model)
        if is_compiled != self._is_compiled:
            self._steps.clear()
            self._is_compiled = is_compiled
        if not self._graphs:
            return True
        if has_hooks(self._model.modules()):
            return False
        objects, places = fixed_parts(self._model)
        known, known_places = self._captured
        if not same_objects(objects, known) or places != known_places:
            self._steps.clear()
            self._captured = objects, places
        return True

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        (n_rows, width), params = tokens.shape, self._model.params
        bsz = min(1 << (n_rows - 1).bit_length(), params.max_batch_size)
        kv_len = min(-(-(max(lengths) + width) // KV_BUCKET) * KV_BUCKET, params.max_seq_len + SPARE_POSITIONS)
        self._tokens[: tokens.numel()].copy_(tokens.flatten())
        self._positions[:bsz].copy_(
            to_device([*lengths, *[params.max_seq_len] * (bsz - n_rows)], tokens.device)  # spare positions for padding
        )
        sizes = bsz, width, kv_len
        if sizes not in self._steps:
            self._steps[sizes] = self._make_step(*sizes)
        return self._steps[sizes]()[:n_rows]

    def _make_step(self, bsz: int, width: int, kv_len: int) -> Callable[[], Tensor]:
        """Returns a function that runs a step of these sizes on the buffers."""
        tokens = self._tokens[: bsz * width].view(bsz, width)

        def step() -> Tensor:
            positions = CachePositions(self._positions[:bsz], kv_len=kv_len)
            run = self._compiled.run if width == 1 and self._is_compiled else self._model
            logits: Tensor = run(tokens, positions)
            return logits

        if not self._graphs:
            return step
        try:
            return self._capture(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._graphs = False
            logger.warning("CUDA graphs are disabled, which makes decoding slower; capturing one failed: %s", error)
            return step

    def _capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        device = self._tokens.device
        warm_up = torch.cuda.Stream(device)
        warm_up.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(warm_up):
            step()  # on first use libraries allocate memory and select kernels, which is not allowed during capture
        torch.cuda.current_stream(device).wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # thread_local, because other threads, such as NCCL's watchdog, use the device during the capture.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def choose_stepper(model: Any, *, cuda_graphs: bool) -> Stepper | None:
    """Returns the best stepper for the model's device; None to call the network directly."""
    on_cuda = takes_cache_positions(model) and model.norm.weight.device.type == "cuda"
    return StaticStepper(model, graphs=cuda_graphs) if on_cuda else None
