"""Compiled decode steps: a block of the network, compiled ahead of time by torch's compiler (inductor).

`torch.export` traces `TransformerBlock.forward` itself. Weights and KV cache are inputs of the graph, so that all
blocks share it and edits in place count. Packed products are operators that the compiler calls as they are; it fuses
the small operations between them. On a CPU another process compiles, and steps may run uncompiled meanwhile. On CUDA
the first steps wait for Triton kernels. Under model parallelism each rank has its own graphs. Those exchange the same
messages as uncompiled blocks, so ranks need not agree on which they run.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import RowParallelLinear
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama import model as network
from llama.distributed import groups
from llama.distributed.device import to_device
from llama.engine.compiler import Compiled, CompileError, Compiler, Job, export_job, has_cpp_compiler
from llama.engine.cuda_graphs import StaticStepper
from llama.engine.network_state import has_hooks, same_objects
from llama.engine.runner import Stepper
from llama.errors import printable
from llama.layers import attention, kernels, linear
from llama.layers.cache import CachePositions
from llama.layers.kernels import (
    Int8Weight,
    Kernels,
    QuantizedWeight,
    dequantized_linear,
    onednn_int8_linear,
    row_bucket,
)
from llama.model import Transformer, TransformerBlock

logger = logging.getLogger(__name__)

# Of inductor. On a CPU, operations of fewer elements than these per thread are left to one: starting others takes
# longer. On CUDA, with this tuning it has separate kernels for products of a single row, which read faster.
_OPTIONS = {"cpp.min_chunk_size": 16384, "cpp.dynamic_threads": True, "aot_inductor.compile_wrapper_opt_level": "O0"}
_CUDA_OPTIONS: dict[str, Any] = {"size_asserts": False, "nan_asserts": False, "coordinate_descent_tuning": True}
_CACHES = (".keys", ".values")  # names of a block's buffers end with these
_LEAST_PARAMETERS = 1 << 25  # smaller networks have answered before a compiler in the background is done
_NEW_SIGNATURE = "a module or the form of a weight was changed"
_NAMES = ("row", "rows")  # of jobs, for one row and for several
CAN_COMPILE = "check_guards" in inspect.signature(torch.export.ExportedProgram.module).parameters  # torch 2.9 has it
_NOT_TRACED = ("layer_id", "training")  # attributes that no graph depends on


class CompiledStepper:
    """Runs steps of one token per row through compiled blocks; wider ones are the network's own.

    There are two graphs, for one row and for several, each for any number of cached positions. If the model has hooks
    or has changed, logs one warning and runs uncompiled. Falls back to the network, with one warning, on any error of
    the compiler.

    Args:
        model: the network, packed or quantized as it will run.
        background: whether steps run uncompiled until the compiler is done; otherwise the first step waits.
    """

    looks_ahead = False

    def __init__(self, model: Transformer, *, background: bool = False) -> None:
        self._model, self._background = model, background
        blocks = [_exportable(block) for block in model.layers]
        self._signature = _signature(blocks[0])
        self._graphs: dict[bool, Compiled] = {}
        self._works = True
        self._has_warned = False
        self._compiled = self._with_compiled_blocks(blocks)
        self._compiler = self._new_compiler() if background else None

    def serves(self, model: object) -> bool:
        """As a stepper's; says once, by a warning, what has changed."""
        if model is not self._model or not self._works:
            return False
        change = self._change()
        if change is None:
            blocks = [_exportable(block) for block in self._model.layers]
            if any(_signature(block) != self._signature for block in blocks):
                change = _NEW_SIGNATURE
            else:
                self._compiled = self._with_compiled_blocks(blocks)
        if change is not None and not self._has_warned and groups.is_first_rank():
            self._has_warned = True
            logger.warning("steps run uncompiled, which makes each token slower: %s", change)
        return change is None

    def _change(self) -> str | None:
        """What keeps compiled blocks from computing what the network would, other than signatures; None for nothing."""
        if has_hooks(self._model.modules()):
            return "the network has hooks"
        if not same_objects(_library_code(), _LIBRARY_CODE):
            return "the code of the network was changed"
        if any(_has_code_of_its_own(module) for block in self._model.layers for module in block.modules()):
            return "a method of a module was changed"
        embedding, freqs_cis = self._model.tok_embeddings.weight, self._model.freqs_cis
        same_dtype = embedding.dtype == _cache_of(self._model.layers[0]).dtype and freqs_cis.dtype == torch.complex64
        return None if same_dtype else _NEW_SIGNATURE

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor | None:
        if tokens.size(1) > 1 or not self._has_graph(len(lengths)):
            return None
        return self.run(tokens, CachePositions(to_device(lengths, tokens.device), kv_len=max(lengths) + 1))

    def run(self, tokens: Tensor, positions: CachePositions) -> Tensor:
        """The logits (bsz, 1, vocab_size) of a step, tokens (bsz, 1); the network's own without a graph for it."""
        model = self._compiled if self._has_graph(len(tokens)) else self._model
        logits: Tensor = model.forward(tokens, positions)
        return logits

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CompiledStepper, background=self._background), (self._model,)  # a copy makes its own graphs

    def _with_compiled_blocks(self, blocks: Sequence[nn.Module]) -> Transformer:
        """A shallow copy of the network that calls the graphs in place of its blocks, made by `_exportable`."""
        compiled = copy.copy(self._model)
        calls = [partial(self._run_block, list(_inputs(block).values())) for block in blocks]
        # The modules of that name are hidden by an attribute. Of them, one is left for the sizes that it knows.
        vars(compiled).update(layers=calls, _modules={**self._model._modules, "layers": self._model.layers[:1]})
        return compiled

    def _run_block(
        self, inputs: list[Tensor], x: Tensor, positions: CachePositions, freqs_cis: Tensor, mask: Tensor
    ) -> Tensor:
        """`TransformerBlock.forward` with the weights and caches of one block."""
        assert positions.slots is not None
        return self._graphs[x.size(0) > 1]([x, positions.slots, torch.view_as_real(freqs_cis), mask, *inputs])[0]

    def _has_graph(self, n_rows: int) -> bool:
        """Whether there is a graph for that many rows; waits for it unless it is made in the background."""
        several_rows = n_rows > 1
        if not self._works:
            return False
        if several_rows in self._graphs:
            return True
        try:
            graph = self._graph(several_rows)
        except Exception as error:
            self._works = False
            reason = str(error) if isinstance(error, CompileError) else f"{type(error).__name__}: {error}"
            if groups.is_first_rank():
                logger.warning("steps run uncompiled, which makes each token slower: %s", printable(reason, 500))
            return False
        if graph is None:
            return False
        self._graphs[several_rows] = graph
        return True

    def _graph(self, several_rows: bool) -> Compiled | None:
        block = self._model.layers[0]
        if not _is_compiled_ahead(block):
            return _compile_here(_job(block, several_rows=several_rows), _cache_of(block).device)
        self._compiler = self._compiler or self._new_compiler()
        return self._compiler.result(_NAMES[several_rows], wait=not self._background)

    def _new_compiler(self) -> Compiler:
        """Has the graphs loaded, or compiled."""
        block = self._model.layers[0]
        _operators()  # loaded code asks for them
        sources = [Path(__file__), Path(network.__file__), *sorted(Path(kernels.__file__).parent.glob("*.py"))]
        code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        kinds = [several for several in (False, True) if len(_cache_of(block)) > several]
        jobs = [_job(block, several_rows=several) for several in kinds]
        return Compiler(f"{code} {self._signature} {_OPTIONS}", jobs)


def compiled_stepper(model: Transformer, *, cuda_graphs: bool = True, background: bool = False) -> Stepper | None:
    """A stepper with compiled steps, on a CPU, or on CUDA without other ranks. None, with a warning, elsewhere.

    Args:
        background: whether no step waits for the compiler. None, without a warning, where that is not to be had (on
            CUDA, without a C++ compiler, by an old torch) or not worth it (for a small network).
    """
    device = model.norm.weight.device.type
    if background:
        worth_it = sum(parameter.numel() for parameter in model.parameters()) >= _LEAST_PARAMETERS
        can = CAN_COMPILE and device == "cpu" and has_cpp_compiler()
        return CompiledStepper(model, background=True) if can and worth_it else None
    if CAN_COMPILE and (device == "cpu" or (device == "cuda" and not groups.has_several_ranks())):
        compiled = CompiledStepper(model)
        return compiled if device == "cpu" else StaticStepper(model, graphs=cuda_graphs, compiled=compiled)
    if groups.is_first_rank():
        where = "one process on CUDA" if device == "cuda" else "a CPU or CUDA"
        if not CAN_COMPILE:
            where = f"torch 2.9 or later, and this is {torch.__version__}"
        logger.warning("compile=True has no effect: it is for %s", where)
    return None


class _Product(nn.Module):
    """What an exported block has in the place of a packed or int8 layer: the product with the layer's form."""

    bias: nn.Parameter | None

    def __init__(self, form: Tensor | QuantizedWeight | Int8Weight, layer: Any) -> None:
        super().__init__()
        self.form, self.kernels = type(form), layer.kernels
        self.ends = getattr(layer, "gather_output", False), getattr(layer, "input_is_parallel", True)
        for name, tensor in ({"packed": form} if isinstance(form, Tensor) else vars(form)).items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, parts = x.flatten(0, -2), dict(self.named_buffers())
        if self.form is QuantizedWeight:
            out = _int8_product(rows, QuantizedWeight(**parts))
        elif self.form is Int8Weight:
            out = dequantized_linear(rows, Int8Weight(**parts))
        else:
            out = _operators().packed_linear(rows, parts["packed"], self.kernels.pads_one, self.kernels.pads_few)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class _Summed(nn.Module):
    """What an exported block has in the place of a row-parallel layer: the sum of all ranks' products, and the bias."""

    bias: nn.Parameter | None

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product
        self.register_parameter("bias", product._parameters.pop("bias"))
        product.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _operators().sum_over_ranks(self.product(x))
        return out if self.bias is None else out + self.bias


def _int8_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """`kernels.quantized_linear`, in which all but the products of integers is for the compiler to fuse."""
    rotated = (x.reshape(-1, weight.rotation.size(0)).float() @ weight.rotation).view(-1, x.size(-1))
    peaks = rotated.abs().amax(-1, keepdim=True)
    quantized = (rotated / peaks * 127).round().to(torch.int8).view(torch.uint8).bitwise_xor(128)
    out: Tensor = _operators().int8_linear(quantized, weight.blocked, weight.scales) * peaks
    return out.to(x.dtype)


class _BlockStep(nn.Module):
    """A block as a function of tensors alone: what a graph is traced from.

    Args:
        block: made by `_exportable`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        tensors = dict(block.named_parameters()) | dict(block.named_buffers())
        self._names = list(tensors)
        self._cache_shape = _cache_of(block).shape
        memo = {id(tensor): torch.empty(0, device="meta") for tensor in tensors.values()}
        self._block = [copy.deepcopy(block, memo)]  # in a list: not a module of this one

    def forward(self, x: Tensor, slots: Tensor, rotations: Tensor, mask: Tensor, *inputs: Tensor) -> Tensor:
        tensors = dict(zip(self._names, inputs, strict=True))
        tensors |= {name: cache.view(self._cache_shape) for name, cache in tensors.items() if name.endswith(_CACHES)}
        positions = CachePositions(slots, kv_len=mask.size(-1), slots=slots)
        with _AttentionAsOperator() if x.is_cuda else nullcontext():
            out: Tensor = torch.func.functional_call(self._block[0], tensors, (x, positions, rotations, mask))
        return out


def _exportable(module: nn.Module) -> nn.Module:
    """A shallow copy of a module's tree, with products in place of packed layers, and sums where ranks exchange some.

    The process that compiles has no model-parallel group, which fairscale's own classes ask for.
    """
    form: Any = getattr(module, "packed_form", None)
    if form is None and hasattr(module, "packed_form"):
        form = linear.int8_weight(module)
    copied: nn.Module
    if form is not None:
        copied = _Product(form, module)
    else:
        copied = copy.copy(module)
        copied.__dict__ = {
            **vars(module),
            "_parameters": dict(module._parameters),
            "_modules": {name: _exportable(m) for name, m in module._modules.items() if m},
            "_load_state_dict_pre_hooks": {},  # they refer to the module, which may be gone
        }
        linear.own(copied)
        if hasattr(copied, "model_parallel_size"):
            vars(copied)["model_parallel_size"] = 1
    is_summed = isinstance(module, RowParallelLinear) and groups.model_parallel_size() > 1
    return _Summed(copied) if is_summed else copied


def _has_code_of_its_own(module: nn.Module) -> bool:
    """Whether a method was assigned to a module, or its class is derived from a layer that `_exportable` replaces."""
    layers = linear.ColumnParallelLinear, linear.RowParallelLinear
    kind: Any = type(module)
    is_patched = not _methods(kind).isdisjoint(vars(module))
    return is_patched or (isinstance(module, layers) and kind not in layers)


@cache
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    """The names of a class's methods, but for `extra_repr`, which layers here have by themselves."""
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name))) - {"extra_repr"}


def _inputs(block: nn.Module) -> dict[str, Tensor]:
    """The weights, packed forms and caches of an `_exportable` block, by name.

    Caches are (-1, head_dim), which is how they are written to: a graph writes to its inputs, not to views of them.
    """
    tensors: dict[str, Tensor] = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return tensors | {name: t.view(-1, t.size(-1)) for name, t in tensors.items() if name.endswith(_CACHES)}


def _cache_of(block: nn.Module) -> Tensor:
    """Keys (max_batch_size, n_local_kv_heads, positions, head_dim) of a block."""
    return next(buffer for name, buffer in block.named_buffers() if name.endswith(_CACHES))


def _is_compiled_ahead(block: nn.Module) -> bool:
    return _cache_of(block).is_cpu


def _signature(block: nn.Module) -> list[tuple[object, ...]]:
    """What a graph of an `_exportable` block is made for: kinds and attributes of modules, kinds of tensors."""
    modules = [
        (name, type(module), [(k, repr(v)) for k, v in vars(module).items() if k[0] != "_" and k not in _NOT_TRACED])
        for name, module in block.named_modules()
    ]
    return modules + [
        (name, t.dtype, t.device, t.shape, t.stride() if t.layout is torch.strided else None)
        for name, t in _inputs(block).items()
    ]


def _library_code() -> list[object]:
    """The functions and classes that blocks are traced from, as they are now."""
    objects = [v for module in (network, attention, linear) for k, v in vars(module).items() if not k.startswith("__")]
    kinds = [kind for kind in objects if isinstance(kind, type) and issubclass(kind, nn.Module)]
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base not in (nn.Module, object))
    return objects + [value for base in bases for value in vars(base).values() if callable(value)]


_LIBRARY_CODE = _library_code()  # as another process imports it


def _job(block: TransformerBlock, *, several_rows: bool) -> Job:
    """What compiles a step of a block, with any number of positions, for one row or any number of several.

    A size that all but fills the cache stands for any; one that filled it would be seen as a special case.
    """
    exportable = _exportable(block)
    cache = _cache_of(block)
    most_rows, n_kv_heads, n_positions, head_dim = cache.shape
    bsz, kv_len = max(2, most_rows - 1) if several_rows else 1, max(1, n_positions - 1)
    rows = {0: torch.export.Dim.DYNAMIC} if several_rows and most_rows > 2 else {}
    positions = {3: torch.export.Dim.DYNAMIC} if n_positions > 2 else {}
    inputs = [
        torch.empty((bsz, 1, block.dim), dtype=cache.dtype, device="meta"),
        torch.empty((bsz * n_kv_heads,), dtype=torch.int64, device="meta"),
        torch.empty((bsz, 1, head_dim // 2, 2), dtype=torch.float32, device="meta"),
        torch.empty((bsz, 1, 1, kv_len), dtype=cache.dtype, device="meta"),
    ]
    tensors = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in _inputs(exportable).values()]
    shapes = {"x": rows, "slots": rows, "rotations": rows, "mask": {**rows, **positions}}
    shapes["inputs"] = tuple({} for _ in tensors)  # type: ignore[assignment]
    return Job(_NAMES[several_rows], _BlockStep(exportable), [*inputs, *tensors], shapes, _OPTIONS)


def _compile_here(job: Job, device: torch.device) -> Compiled:
    """Compiles for CUDA, in this process, at the first call."""
    module = torch.compile(export_job(job, device).module(check_guards=False), dynamic=True, options=_CUDA_OPTIONS)
    return lambda inputs: [module(*inputs)]


@cache
def _operators() -> Any:
    """Products, and attention, as operators of torch, `torch.ops.llama`: the compiler sees their sizes alone."""
    library = torch.library.Library("llama", "FRAGMENT")
    library.define("packed_linear(Tensor x, Tensor blocked, bool pads_one, bool pads_few) -> Tensor")
    library.define("int8_linear(Tensor x, Tensor blocked, Tensor scales) -> Tensor")
    library.define("attention(Tensor queries, Tensor keys, Tensor values, Tensor? mask) -> Tensor")
    library.define("sum_over_ranks(Tensor x) -> Tensor")

    def packed_linear(x: Tensor, blocked: Tensor, pads_one: bool, pads_few: bool) -> Tensor:
        return kernels.packed_linear(x, blocked, _kernels(pads_one, pads_few))

    def int8_linear(x: Tensor, blocked: Tensor, scales: Tensor) -> Tensor:
        padding = row_bucket(len(x)) - len(x)
        return onednn_int8_linear(F.pad(x, (0, 0, 0, padding)) if padding else x, blocked, scales)[: len(x)]

    def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, mask).contiguous()

    def sum_over_ranks(x: Tensor) -> Tensor:
        return groups.sum_over_ranks(x.clone())  # what an operator returns is not its input

    for name, kernel, meta in (
        ("packed_linear", packed_linear, lambda x, blocked, *_: x.new_empty((x.size(0), blocked.size(0)))),
        ("int8_linear", int8_linear, lambda x, _, scales: scales.new_empty((x.size(0), scales.size(0)))),
        ("attention", attention, lambda queries, *_: queries.new_empty(queries.shape)),
        ("sum_over_ranks", sum_over_ranks, torch.empty_like),
    ):
        for key in ("CPU", "MkldnnCPU", "CUDA"):
            library.impl(name, kernel, key)
        library.impl(name, meta, "Meta")
    _libraries.append(library)
    return torch.ops.llama


_libraries: list[torch.library.Library] = []  # operators live as long as these
_kernels = cache(Kernels)


class _AttentionAsOperator(TorchFunctionMode):
    """Traces attention as one operator: which of torch's kernels computes it is decided by sizes at each call."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            queries, keys, values, mask = args
            return _operators().attention(queries, keys, values, mask)
        return func(*args, **(kwargs or {}))
