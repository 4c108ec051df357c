"""What fairscale's sharded linear layers become when they own a faster form of their weight.

A network is made of fairscale's own classes, which other code looks for; `packable_layers` turns them into the
subclasses of this module.

On a CPU, a weight in a blocked layout (packed), as bfloat16 or quantized to int8, is read faster than a plain
one. The packed form is derived from the layer's own parameter and stands aside for good when that parameter changes,
whichever way; the layer then computes with the parameter itself. Nothing outside a layer knows which form served.

A layer of a quantized checkpoint, or one quantized on CUDA, has int8 numbers as its weight, and their scales as a
second parameter.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, partialmethod
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel import mappings
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from llama.layers.kernels import (
    DEFAULT_KERNELS,
    Int8Weight,
    Kernels,
    QuantizedWeight,
    block_quantized,
    dequantized_linear,
    pack_weight,
    packed_linear,
    quantize_values,
    quantized_linear,
    rotation_of,
    use_huge_pages,
)

_PRODUCT_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
QUANTIZED_FORMS = ("int8",)  # what a layer's `quantize` may be, other than None
_Form: TypeAlias = Tensor | QuantizedWeight

logger = logging.getLogger(__name__)


class PackedParameter(nn.Parameter):
    """A parameter that a packed form was made from.

    It turns into a plain `nn.Parameter` where its memory is handed out, or replaced, in a way that its version counter
    does not see, and where training begins: fused optimizers do not count versions. `_version` and this type together
    therefore tell whether it can have changed.
    """

    @property
    def data(self) -> Tensor:
        return self._plain().data

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:  # `module.to()` assigns a parameter to itself where it has nothing to convert
            self._plain().data = value

    def requires_grad_(self, requires_grad: bool = True) -> PackedParameter:
        self.requires_grad = requires_grad
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if (name == "requires_grad" and value) or (name == "grad" and value is not None):
            self._plain()
        nn.Parameter.__setattr__(self, name, value)

    def _plain(self) -> nn.Parameter:
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = nn.Parameter(self.detach().clone(), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


def _hand_out(parameter: PackedParameter, method: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(parameter._plain(), method)(*args, **kwargs)


for _name in ("numpy", "__array__", "__dlpack__", "storage", "untyped_storage", "share_memory_"):
    setattr(PackedParameter, _name, partialmethod(_hand_out, _name))


class _Packed:
    """A weight in a blocked layout: bfloat16 (opaque: no operation but the packed product takes it) or int8.

    Args:
        weight, scales: what it was made from; scales only if that is quantized itself.
        dtype: of the products.
    """

    def __init__(self, weight: nn.Parameter, scales: nn.Parameter | None, form: _Form, dtype: torch.dtype) -> None:
        for parameter in (weight, scales):
            if type(parameter) is nn.Parameter:
                parameter.__class__ = PackedParameter
        self.form, self.dtype = form, dtype
        self._weight, self._version = weight, weight._version
        self._scales, self._scales_version = scales, None if scales is None else scales._version

    def is_of(self, weight: Tensor, layer: nn.Module) -> bool:
        """Whether the layer's parameters still are what this was made from. A step asks it for each product."""
        if not (weight is self._weight and type(weight) is PackedParameter and weight._version == self._version):
            return False
        if weight.dtype is not torch.int8:
            return True
        scales = layer.scales
        return scales is self._scales and type(scales) is PackedParameter and scales._version == self._scales_version

    def product(self, x: Tensor, kernels: Kernels) -> Tensor | None:
        """x (..., in) times the weight, transposed; None where the form is not for the dtype of x."""
        if isinstance(self.form, QuantizedWeight):
            return quantized_linear(x, self.form)
        if x.dtype != torch.bfloat16:
            return None
        return packed_linear(x, self.form, kernels)


class _OwnsPackedForm(nn.Module):
    """`linear(x)`: the local product of a sharded layer, in its fastest form that is true to the weight.

    Attributes:
        kernels: which products it takes, equal but for their speed; `Llama.build` measures them, and any others may be
            assigned at any time.
        quantize: which form `pack` makes of a weight that is not quantized: None for bfloat16, or one of
            `QUANTIZED_FORMS`.
        scales: (out,) float32, if the weight is int8 numbers; None otherwise.
    """

    weight: nn.Parameter
    scales: nn.Parameter | None
    bias: nn.Parameter | None
    kernels: Kernels = DEFAULT_KERNELS
    quantize: str | None = None
    _packed: _Packed | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_parallel_size: int = get_model_parallel_world_size()
        self.register_parameter("scales", None)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times the weight, transposed, plus the bias: (..., out), in the dtype of x."""
        weight = self.weight
        if not torch.compiler.is_compiling() and _is_cpu_inference(x, weight):
            packed = self._current(weight)
            out = None if packed is None else packed.product(x, self.kernels)
            if out is not None:
                return out if bias is None else out + bias
        if (numbers := int8_weight(self)) is not None:
            out = dequantized_linear(x, numbers)
            return out if bias is None else out + bias
        return F.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), bias)

    @property
    def packed_form(self) -> _Form | None:
        """What the layer computes with in place of its weight; None if that is the weight itself."""
        packed = self._current(self.weight)
        return None if packed is None else packed.form

    def _current(self, weight: Tensor) -> _Packed | None:
        """The packed form and its sources, or None, dropping it, if the weight has changed."""
        # Torch 2.6 cannot trace a `PackedParameter`: it runs `linear` as it is, and may then trace this function alone.
        packed = None if torch.compiler.is_compiling() else self._packed
        if packed is None or packed.is_of(weight, self):
            return packed
        self._packed = None
        kind = _ORIGINALS.get(type(self))
        if kind and weight.dtype == packed.dtype and self.scales is None:  # fairscale's do not convert their weight
            _disown(self, kind)
        logger.info("a packed weight was changed, or its memory handed out; its layer computes unpacked from now on")
        return None

    def pack(self, dtype: torch.dtype, scratch: Tensor | None = None) -> None:
        """Makes the packed form of the weight as it is now, by `quantize` in bfloat16 or int8.

        Without effect where a parametrization makes the weight, or where it requires gradients: it will be trained.

        Args:
            dtype: of the products that are not quantized. The weight itself stays as it is, also where it has another
                dtype.
            scratch: memory of that dtype to convert or quantize the weight in, with at least as many elements: getting
                new memory for each layer takes longer than filling it.
        """
        weight = self._parameters.get("weight")
        if weight is None or weight.requires_grad:
            return
        form: _Form
        scales = self.scales if weight.dtype == torch.int8 else None
        if scales is not None:
            form = block_quantized(weight.detach(), scales.detach())
        elif self.quantize:
            form = block_quantized(*quantize_values(weight, scratch))
        else:
            values = weight.detach()
            if values.dtype != dtype and scratch is not None:
                values = scratch[: values.numel()].view(values.shape).copy_(values)
            form = pack_weight(values.to(dtype))
        self._packed = _Packed(weight, scales, form, dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles go without: the packed form is tied to this very parameter, and nothing can copy it.
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def int8_weight(layer: Any) -> Int8Weight | None:
    """A layer's weight with its scales, if it is int8 numbers."""
    weight: Tensor = layer.weight
    if weight.dtype != torch.int8 or layer.scales is None:
        return None
    return Int8Weight(weight, layer.scales, rotation_of(weight.size(1), weight.device))


class ColumnParallelLinear(_OwnsPackedForm, fairscale_layers.ColumnParallelLinear):  # type: ignore[misc]
    """A linear layer whose outputs are split over the ranks; fairscale's, with a packed form."""

    def forward(self, x: Tensor) -> Tensor:
        if self.model_parallel_size == 1:
            return self.linear(x, self.bias)
        out = self.linear(mappings.copy_to_model_parallel_region(x), self.bias)
        return cast(Tensor, mappings.gather_from_model_parallel_region(out)) if self.gather_output else out


class RowParallelLinear(_OwnsPackedForm, fairscale_layers.RowParallelLinear):  # type: ignore[misc]
    """A linear layer whose inputs are split over the ranks, and its outputs summed; fairscale's, with a packed form."""

    def forward(self, x: Tensor) -> Tensor:
        if self.model_parallel_size == 1:
            return self.linear(x, self.bias)
        part = x if self.input_is_parallel else mappings.scatter_to_model_parallel_region(x)
        out: Tensor = mappings.reduce_from_model_parallel_region(self.linear(part))
        return out if self.bias is None else out + self.bias


class _ParallelEmbedding(fairscale_layers.ParallelEmbedding):  # type: ignore[misc]
    def forward(self, tokens: Tensor) -> Tensor:
        options = self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        return F.embedding(tokens, self.weight, *options)


_OWNERS: dict[type[nn.Module], type[nn.Module]] = {
    fairscale_layers.ColumnParallelLinear: ColumnParallelLinear,
    fairscale_layers.RowParallelLinear: RowParallelLinear,
}
_ORIGINALS = {owner: kind for kind, owner in _OWNERS.items()}


def own(layer: nn.Module, owners: Mapping[type[nn.Module], type[nn.Module]] = _OWNERS) -> None:
    """Makes a layer of fairscale's own class one that can own a form of its weight."""
    owner = owners.get(type(layer))
    if owner is not None:
        layer.model_parallel_size = get_model_parallel_world_size()
        layer.register_parameter("scales", None)
        layer.__class__ = owner


def _disown(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer._parameters.pop("scales", None)
    layer.__class__ = kind


@contextmanager
def without_autograd_functions(module: nn.Module) -> Iterator[None]:
    """On one rank, lets fairscale's layers in a module's tree compute without autograd functions for the duration.

    These are identities there, but `torch.func` and `torch.export` do not take them.
    """
    owners = {**_OWNERS, fairscale_layers.ParallelEmbedding: _ParallelEmbedding}
    alone = get_model_parallel_world_size() == 1 and not torch.compiler.is_dynamo_compiling()
    layers = [(layer, type(layer)) for layer in module.modules() if alone and type(layer) in owners]
    try:
        for layer, _ in layers:
            own(layer, owners)
        yield
    finally:
        for layer, kind in layers:
            _disown(layer, kind)


def sharded(cls: Any, n_in: int, n_out: int, **options: Any) -> Any:
    """A layer of one of fairscale's classes; its weight is undefined until it is loaded, and may be quantized then."""
    layer = cls(n_in, n_out, init_method=lambda weight: weight, **options)
    layer.register_load_state_dict_pre_hook(_prepare_load)
    shown = [f"gather_output={options['gather_output']}"] if "gather_output" in options else []
    layer.extra_repr = partial(str, ", ".join([str(n_in), str(n_out), *shown]))  # fairscale's lacks the sizes
    return layer


def _prepare_load(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Has a layer quantized if its part of `state_dict` is."""
    values, scales = (state_dict.get(prefix + name) for name in ("weight", "scales"))
    weight = layer._parameters.get("weight")
    if values is not None and weight is not None and (values.dtype == torch.int8) != (weight.dtype == torch.int8):
        if not local_metadata.get("assign_to_params_buffers", False):
            raise RuntimeError(
                f"{prefix}weight must have dtype {weight.dtype}, as it has here, got {values.dtype}; "
                "numbers with scales and plain weights take each other's place with assign=True only"
            )
        if scales is None:
            layer._parameters.pop("scales", None)
            layer.register_parameter("scales", None)
    if scales is not None:
        own(layer)
        if layer._parameters.get("scales") is None:
            layer._parameters["scales"] = nn.Parameter(torch.empty_like(scales), requires_grad=False)


def packable_layers(module: nn.Module) -> list[_OwnsPackedForm]:
    """The layers in a module's tree that can own a packed form, as instances of this module's classes."""
    for layer in module.modules():
        own(layer)
    return [layer for layer in module.modules() if isinstance(layer, _OwnsPackedForm)]


def pack_layers(
    layers: Sequence[_OwnsPackedForm], dtype: torch.dtype, release: Callable[[Tensor], None] | None = None
) -> None:
    """Packs layers side by side, each in a single thread, in as many as torch has for an operation.

    Threads that share the many small operations of a layer would wait for each other after each of them, above all
    where other programs use the processor. A thread of the caller's own that calls torch for the first time in the
    meantime gets one thread for its operations.

    Args:
        dtype: as for a layer's `pack`.
        release: called with each weight once it is packed.
    """
    memory = threading.local()  # to convert weights in: freed pieces between the packed ones would add up
    converted = [layer for layer in layers if layer.quantize or layer.weight.dtype != dtype]
    size = max((layer.weight.numel() for layer in converted), default=0)

    def pack(layer: _OwnsPackedForm) -> None:
        if size and not hasattr(memory, "scratch"):
            memory.scratch = torch.empty(size, dtype=dtype, device="cpu")  # costs nothing until it is written to
        layer.pack(dtype, getattr(memory, "scratch", None))
        if release is not None:
            release(layer.weight.detach())

    n_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in pool.map(pack, layers):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)  # torch keeps a number for the process and one per thread
    forms = [layer.packed_form for layer in layers]
    use_huge_pages([form.blocked if isinstance(form, QuantizedWeight) else form for form in forms if form is not None])


def _is_cpu_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's operators, which have no gradients, may stand in for F.linear."""
    return (
        x.dtype in _PRODUCT_DTYPES
        and type(x) is Tensor
        and x.is_cpu
        and x.numel() > 0
        and x.shape[-1] == weight.shape[-1]  # if not, F.linear says so
        and forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


class EmptyOnMeta(TorchDispatchMode):
    """Sends new tensors to the meta device: fairscale's layers allocate in a way that `torch.device("meta")` misses."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its whole compiler here, which takes longer than loading a model

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.empty.memory_format:
            kwargs["device"] = torch.device("meta")
        if func is torch.ops.aten.cat.out:  # of a rank's part: nothing to copy, and on meta it imports the compiler too
            return kwargs["out"]
        return func(*args, **kwargs)
