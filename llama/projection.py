"""Matrix products with fairscale's sharded layers, in the fastest form that the device has for them.

The layers stay the model's parameters. Those that take the same input can be joined to one product. On a CPU that
multiplies bfloat16, the weights can be held in oneDNN's blocked layout, which serves several rows 1.5 times as fast as
`F.linear`; a single row is served a little faster by the weights as they are. Knows nothing of what the layers are for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor, nn

Release = Callable[[Tensor], None]
# oneDNN's packed product reads the weights a quarter slower for one to three rows than for four to six.
_FEWEST_ROWS = 5
# Where torch's own matrix-vector product was measured to be the faster one; that of older versions may be a plain loop.
_HAS_FAST_MATRIX_VECTOR = torch.__version__ >= "2.13"


class Projection:
    """The outputs of layers that take the same input: what calling each of them gives.

    The layers are called, and hooks on them run, only where none of the faster forms serves.

    Args:
        layers: column-parallel ones, or a single row-parallel one.
    """

    def __init__(self, *layers: ColumnParallelLinear | RowParallelLinear) -> None:
        self.layers = layers
        self._product: Callable[[Tensor], Tensor] | None = None  # of all layers at once
        self._sizes = [layer.weight.size(0) for layer in layers]
        self._is_split = get_model_parallel_world_size() > 1

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self._product is not None:
            product = self._product(x)
            parts = tuple(product.split_with_sizes(self._sizes, -1)) if len(self._sizes) > 1 else (product,)
        elif _is_one_row(x):
            parts = _products_of_one_row(x, [layer.weight for layer in self.layers])
        else:
            return tuple(layer(x) for layer in self.layers)
        return tuple(map(self._over_ranks, parts)) if self._is_split else parts

    def join(self) -> None:
        """Makes the weights parts of one matrix, in memory of its own, so that the product is one kernel on a GPU."""
        if len(self.layers) == 1:
            return
        joined = torch.cat([layer.weight.detach() for layer in self.layers])
        for layer, weight in zip(self.layers, joined.split(self._sizes), strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        self._product = partial(F.linear, weight=joined)

    @property
    def n_weights(self) -> int:
        """Elements of all layers' weights together."""
        return sum(layer.weight.numel() for layer in self.layers)

    def pack(self, scratch: Tensor, release: Release) -> None:
        """Makes the packed form, of scratch's dtype, and uses it from now on; later changes of the weights don't count.

        Args:
            scratch: memory to join or convert the weights in, (at least `n_weights`,): new memory for each projection
                would take longer to get than to fill.
            release: called with each weight when it is not needed any more, to give back its memory.
        """
        weights = [layer.weight.detach() for layer in self.layers]
        whole = weights[0]
        if len(weights) > 1 or whole.dtype != scratch.dtype:
            whole = torch.cat(weights, out=scratch[: self.n_weights].view(-1, whole.size(1)))
        self._product = partial(packed_linear, packed=pack(whole))
        for weight in weights:
            release(weight)

    def _over_ranks(self, out: Tensor) -> Tensor:
        """What the layer makes of its ranks' parts of the output."""
        layer = self.layers[0]
        if isinstance(layer, RowParallelLinear):
            out = reduce_from_model_parallel_region(out)
        elif layer.gather_output:
            out = gather_from_model_parallel_region(out)
        return out


def _is_one_row(x: Tensor) -> bool:
    """Whether torch's own product with a vector serves: it reads bfloat16 weights 1.7 times as fast as oneDNN's.

    With more rows oneDNN's is the faster one.
    """
    one_row = x.numel() == x.size(-1) and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return one_row and _HAS_FAST_MATRIX_VECTOR


def _products_of_one_row(x: Tensor, weights: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """torch has no other way to choose its own product than a global switch, which is put back.

    Calling the layers instead would add 7 percent to a step of 1.1B weights.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return tuple(F.linear(x, weight) for weight in weights)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators, which torch does not promise, are there: tried out on a small product."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    weight = torch.linspace(-1, 1, 64 * 32).view(64, 32).to(dtype)
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        products = [(x, packed_linear(x, pack(weight))) for x in (weight[:1], weight[:8])]
    except (AttributeError, RuntimeError):
        return False
    return all(torch.allclose(y, x @ weight.T, rtol=0.02, atol=0.02) for x, y in products)


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's blocked layout; an opaque tensor, for `packed_linear` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """x (..., in) times the packed weight, transposed: (..., out)."""
    n_rows = x.numel() // x.size(-1)
    if n_rows >= _FEWEST_ROWS:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return out
    padded = F.pad(x.flatten(0, -2), (0, 0, 0, _FEWEST_ROWS - n_rows))
    return packed_linear(padded, packed)[:n_rows].view(*x.shape[:-1], -1)
