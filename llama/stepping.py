"""One decode step of the network: each row's newest token in, the logits of its next one out.

Two ways that give the same logits: the plain one, and a static one, in which neither shapes nor addresses nor the
control flow change from token to token, so that a GPU can replay it. Knows nothing of prompts or sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama.model import Transformer
from llama.runtime import to_device

KV_BUCKET = 256  # positions; a static step attends to a whole number of these, past the rows' ends by a mask

logger = logging.getLogger(__name__)


class Stepper(Protocol):
    """A way to take a step.

    Attributes:
        looks_ahead: whether the next step shall start before the tokens of this one have reached the host.
    """

    looks_ahead: bool

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Feeds tokens to the cache's first rows.

        Args:
            tokens: (bsz,) int64, on the model's device.
            lengths: the number of tokens that each row's cache holds already.

        Returns:
            (bsz, vocab_size) float32; the next call may overwrite it.
        """


class PlainStepper:
    """Attends to just the positions that are there: the cheapest where a call costs nothing to prepare."""

    looks_ahead = False

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        longest = max(lengths)
        start_pos = longest if longest == min(lengths) else to_device(lengths, tokens.device)
        h = self._model.hidden_states(tokens.unsqueeze(1), start_pos, kv_len=longest + 1)
        return self._model.logits(h[:, -1])


class StaticStepper:
    """Takes tokens and positions from buffers on the device; rows are padded to a power of two, the prefix to buckets.

    Args:
        model: the network.
        graphs: whether each (rows, prefix) is captured as a CUDA graph when it first comes up, and replayed from then
            on: one launch in place of hundreds. Where that fails, one warning is logged and the kernels are launched
            one by one.
    """

    looks_ahead = True

    def __init__(self, model: Transformer, *, graphs: bool) -> None:
        device = model.norm.weight.device
        self._model = model
        self._tokens = torch.zeros((model.params.max_batch_size, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros(model.params.max_batch_size, dtype=torch.int64, device=device)
        self._graphs = graphs
        self._pool = torch.cuda.graph_pool_handle() if graphs else None  # the graphs never run at the same time
        self._steps: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        n_rows, params = len(lengths), self._model.params
        # The rows behind are free: what padding leaves at their first position is overwritten by their next prompt.
        bsz = min(_power_of_two(n_rows), params.max_batch_size)
        kv_len = min(_whole(max(lengths) + 1, KV_BUCKET), params.max_seq_len)
        self._tokens[:n_rows, 0].copy_(tokens)
        self._positions[:bsz].copy_(to_device([*lengths, *[0] * (bsz - n_rows)], tokens.device))
        if (bsz, kv_len) not in self._steps:
            self._steps[bsz, kv_len] = self._make_step(bsz, kv_len)
        return self._steps[bsz, kv_len]()[:n_rows]

    def _make_step(self, bsz: int, kv_len: int) -> Callable[[], Tensor]:
        """The step for these sizes, with the buffers as its input."""

        def step() -> Tensor:
            h = self._model.hidden_states(self._tokens[:bsz], self._positions[:bsz], kv_len=kv_len)
            return self._model.logits(h[:, -1])

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


def choose_stepper(model: Transformer, *, cuda_graphs: bool) -> Stepper | None:
    """The stepper that serves the model's device best; None where that is a plain one."""
    return StaticStepper(model, graphs=cuda_graphs) if model.norm.weight.device.type == "cuda" else None


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def _whole(n: int, unit: int) -> int:
    """The least multiple of `unit` that is not below n."""
    return -(-n // unit) * unit
