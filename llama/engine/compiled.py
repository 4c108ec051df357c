"""Compiled decode steps: a block of the network as a graph that torch's compiler (inductor) turns into C++ or Triton.

The graph is traced from `TransformerBlock.forward` itself. It takes the weights and the KV cache as inputs, so that all
blocks share it and edits in place count. Packed and quantized products, and attention on CUDA, are operators that the
compiler calls as they are; it fuses the small operations between them, and on CUDA computes the products of a single
row itself. Nothing of the compiler is imported before the first step.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama import model as network
from llama.distributed import groups
from llama.distributed.device import to_device
from llama.engine.cuda_graphs import PlainStepper, StaticStepper, Stepper
from llama.engine.network_state import has_hooks
from llama.errors import printable
from llama.layers import kernels
from llama.layers.int4 import Int4Weight, int4_linear
from llama.layers.kernels import PADDED_ROWS, Kernels, QuantizedWeight, onednn_int8_linear, row_bucket
from llama.model import CachePositions, Transformer, TransformerBlock

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import GraphModule

logger = logging.getLogger(__name__)

# Of inductor. On a CPU, operations of fewer elements than these per thread are left to one: starting others takes
# longer. On CUDA, with this tuning it computes products of a single row by kernels of its own, which read faster.
_OPTIONS = {"size_asserts": False, "nan_asserts": False, "cpp.min_chunk_size": 16384}
_CUDA_OPTIONS = {"size_asserts": False, "nan_asserts": False, "coordinate_descent_tuning": True}
_CACHES = ("attention.cache.keys", "attention.cache.values")
_Graph = Callable[..., Sequence[Tensor]]


class CompiledStepper:
    """Takes steps of one token per row through compiled blocks. Wider ones are the network's own.

    There are two graphs, for one row and for several, each for any number of cached positions. A graph is compiled when
    it is first needed, which takes seconds, and on CUDA half a minute. Inductor keeps the result on disk, in the folder
    that `TORCHINDUCTOR_CACHE_DIR` names, from which the next process loads it. Where this fails, one warning is logged,
    and all steps are the network's own.

    Args:
        model: the network as it was built. As long as it has hooks, or its code, modules or the form of its weights
            are not those of now, one warning is logged, and its steps are its own.
    """

    looks_ahead = False

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._plain = PlainStepper(model, model.params.max_seq_len)
        self._graphs: dict[bool, _Graph] = {}
        self._works = True
        self._code = _code_of(model)
        self._signature = _signature(model.layers[0])
        self._has_warned = False
        self._compiled = self._with_compiled_blocks()

    def serves(self, model: object) -> bool:
        if model is not self._model or not self._works:
            return False
        change = self._change()
        if change is None:
            self._compiled = self._with_compiled_blocks()
        elif not self._has_warned:
            self._has_warned = True
            logger.warning("compile=True has no effect, which makes each token slower: %s", change)
        return change is None

    def _change(self) -> str | None:
        """What keeps compiled blocks from computing what the network would; None for nothing."""
        if has_hooks(self._model):
            return "the network has hooks"
        code = _code_of(self._model)
        if len(code) != len(self._code) or any(a is not b for a, b in zip(code, self._code, strict=True)):
            return "a module, or its code, was changed"
        if any(_signature(block) != self._signature for block in self._model.layers):
            return "a weight was changed"
        return None

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        if tokens.size(1) > 1 or not self._has_graph(len(lengths)):
            return self._plain(tokens, lengths)
        return self.run(tokens, CachePositions(to_device(lengths, tokens.device), kv_len=max(lengths) + 1))

    def run(self, tokens: Tensor, positions: CachePositions) -> Tensor:
        """The logits (bsz, 1, vocab_size) of a step, tokens (bsz, 1); the network's own without a graph for it."""
        model = self._compiled if self._has_graph(len(tokens)) else self._model
        logits: Tensor = model.forward(tokens, positions)
        return logits

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledStepper, (self._model,)  # a copy makes graphs of its own

    def _with_compiled_blocks(self) -> Transformer:
        """A shallow copy of the network that calls the graphs in place of its blocks."""
        compiled = copy.copy(self._model)
        blocks = [partial(self._run_block, list(_inputs(block).values())) for block in self._model.layers]
        # The modules of that name are hidden by an attribute. Of them, one is left for the sizes that it knows.
        vars(compiled).update(layers=blocks, _modules={**self._model._modules, "layers": self._model.layers[:1]})
        return compiled

    def _run_block(
        self, inputs: list[Tensor], x: Tensor, positions: CachePositions, freqs_cis: Tensor, mask: Tensor
    ) -> Tensor:
        """`TransformerBlock.forward` with the weights and caches of one block."""
        graph = self._graphs[x.size(0) > 1]
        return graph(x, positions.slots, torch.view_as_real(freqs_cis), mask, *inputs)[0]

    def _has_graph(self, n_rows: int) -> bool:
        """Whether there is a graph for that many rows; compiles it when it is first asked for."""
        several_rows = n_rows > 1
        if not self._works or several_rows in self._graphs:
            return self._works
        started = time.perf_counter()
        try:
            self._graphs[several_rows] = _compile_block(self._model, several_rows=several_rows)
        except Exception as error:  # whatever the compiler comes upon, the network itself is there
            self._works = False
            reason = printable(f"{type(error).__name__}: {error}", 500)
            if self._model.norm.weight.is_cpu and not _has_cpp_compiler():
                reason = "a C++ compiler must be installed, such as g++, or named by CXX; got none that works"
            logger.warning("compile=True has no effect, which makes each token slower: %s", reason)
        else:
            rows = "several rows" if several_rows else "one row"
            logger.info("Compiled the step of %s in %.1f seconds", rows, time.perf_counter() - started)
        return self._works


def compiled_stepper(model: Transformer, *, cuda_graphs: bool = True) -> Stepper | None:
    """A stepper with compiled steps, on a CPU or CUDA and without other ranks. None, with a warning, elsewhere."""
    device = model.norm.weight.device.type
    if device in ("cpu", "cuda") and not groups.has_several_ranks():
        compiled = CompiledStepper(model)
        return compiled if device == "cpu" else StaticStepper(model, graphs=cuda_graphs, compiled=compiled)
    if groups.is_first_rank():
        where = "one process" if device in ("cpu", "cuda") else "a CPU or CUDA"
        logger.warning("compile=True has no effect: it is for %s", where)
    return None


def _compile_block(model: Transformer, *, several_rows: bool) -> _Graph:
    """A function of x, slots, rotations as real numbers, mask and the tensors of `_inputs`; returns a tuple of one."""
    from torch._inductor import standalone_compile
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    block = model.layers[0]
    assert isinstance(block, TransformerBlock)
    inputs = _inputs(block)

    on_cuda = block.attention.cache.keys.device.type == "cuda"

    def run(x: Tensor, slots: Tensor, rotations: Tensor, mask: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        traceable = _traceable(block, dict(zip(inputs, tensors, strict=True)))
        positions = CachePositions(slots, kv_len=mask.size(-1), slots=slots)
        with _AttentionAsOperator() if on_cuda else nullcontext():
            return (traceable(x, positions, torch.view_as_complex(rotations), mask),)

    fake = FakeTensorMode(shape_env=ShapeEnv())
    with torch.inference_mode(False), torch.no_grad():
        args: list[Any] = _example_step(fake, block, several_rows=several_rows)
        symbols: list[Any] = [size for size in (args[0].size(0), args[3].size(-1)) if isinstance(size, torch.SymInt)]
        args += [fake.from_tensor(tensor, static_shapes=True) for tensor in inputs.values()]
        traced = make_fx(run, _allow_non_fake_inputs=True)(*args)
        _drop_views_of_views(traced)
        _rotate_in_real_numbers(traced)
        with torch._guards.tracing(torch._guards.TracingContext(fake)):
            compiled = standalone_compile(
                traced,
                args,
                dynamic_shapes="from_tracing_context",
                options={"config_patches": _CUDA_OPTIONS if on_cuda else _OPTIONS},
            )
    if any(symbol.node.maybe_as_int() is not None for symbol in symbols):
        raise RuntimeError(f"the graph must serve any number of rows and positions, got one for {symbols}")
    return compiled


def _example_step(fake: FakeTensorMode, block: TransformerBlock, *, several_rows: bool) -> list[Tensor]:
    """The first inputs of a block's graph, without data, with symbols for the numbers of rows and positions.

    A size that all but fills the cache stands for any; one that filled it would be seen as a special case.
    """
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    def any_size(most: int) -> Any:
        if most <= 2:
            return most  # the only one
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        return fake.from_tensor(torch.empty(most - 1, device="meta"), symbolic_context=context).size(0)

    attention, keys = block.attention, block.attention.cache.keys
    bsz = any_size(keys.size(0)) if several_rows else 1
    kv_len = any_size(keys.size(2))
    with fake, torch.device(keys.device):
        return [
            torch.empty((bsz, 1, block.dim), dtype=keys.dtype),
            torch.empty((bsz * attention.n_local_kv_heads,), dtype=torch.int64),
            torch.empty((bsz, 1, attention.head_dim // 2, 2), dtype=torch.float32),
            torch.empty((bsz, 1, 1, kv_len), dtype=keys.dtype),
        ]


def _inputs(block: nn.Module) -> dict[str, Tensor]:
    """What a block's graph reads and writes, by name: parameters, caches, and packed forms in their weights' places.

    Caches are (-1, head_dim), which is how they are written to: torch before 2.13 copies an input to write to a view.
    """
    inputs: dict[str, Tensor] = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    inputs |= {name: cache.view(-1, cache.size(-1)) for name, cache in inputs.items() if name in _CACHES}
    for name, layer in block.named_modules():
        form = getattr(layer, "packed_form", None)
        if form is None:
            continue
        for parameter in layer._parameters:
            inputs.pop(f"{name}.{parameter}", None)
        if isinstance(form, QuantizedWeight):
            inputs |= {f"{name}.int8.{part}": tensor for part, tensor in vars(form).items()}
        elif isinstance(form, Int4Weight):
            inputs |= {f"{name}.int4.{part}": tensor for part, tensor in vars(form).items()}
        else:
            inputs[f"{name}.packed"] = form
    return inputs


def _signature(block: nn.Module) -> list[tuple[object, ...]]:
    """What a graph is made for: kinds of modules and tensors."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    return modules + [
        (name, type(t), t.dtype, t.device, t.shape, t.stride() if t.layout is torch.strided else None)
        for name, t in _inputs(block).items()
    ]


def _code_of(model: Transformer) -> list[object]:
    """All that a graph was traced from but tensors: functions, modules and their attributes."""
    objects = [value for name, value in vars(network).items() if not name.startswith("__")]
    for module in model.modules():
        objects.append(module)
        objects += [
            v for k, v in vars(module).items() if k not in ("_packed", "training") and not isinstance(v, Tensor)
        ]
    for kind in dict.fromkeys(
        base for module in model.modules() for base in type(module).__mro__ if base not in (nn.Module, object)
    ):
        objects += [value for value in vars(kind).values() if callable(value)]
    return objects


def _traceable(block: TransformerBlock, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of a block that holds these tensors, and whose products are operators."""
    unused = torch.empty(0, device="meta")
    tensors = tensors | {name: tensors[name].view(block.get_buffer(name).shape) for name in _CACHES}
    held = [*block.named_parameters(), *block.named_buffers()]
    traceable = copy.deepcopy(block, {id(tensor): tensors.get(name, unused) for name, tensor in held})
    for name, layer in traceable.named_modules():
        if f"{name}.packed" in tensors:
            layer.linear = partial(_packed_linear, blocked=tensors[f"{name}.packed"], kernels=layer.kernels)
        elif f"{name}.int8.blocked" in tensors:
            weight = QuantizedWeight(*(tensors[f"{name}.int8.{part.name}"] for part in fields(QuantizedWeight)))
            layer.linear = partial(_quantized_linear, weight=weight)
        elif f"{name}.int4.packed" in tensors:
            int4 = Int4Weight(*(tensors[f"{name}.int4.{part.name}"] for part in fields(Int4Weight)))
            layer.linear = partial(_int4_linear, weight=int4, kernels=layer.kernels)
        elif hasattr(layer, "kernels") and layer.weight.dtype == block.attention.cache.keys.dtype:
            layer.linear = partial(_plain_linear, weight=layer.weight)
    return traceable


def _packed_linear(x: Tensor, bias: None, *, blocked: Tensor, kernels: Kernels) -> Tensor:
    """`kernels.packed_linear`; the copies that pad one row are made by what computes it."""
    if x.size(0) > 1 or not kernels.pads_one:
        out: Tensor = _operators().packed_linear(x, blocked, kernels.pads_few)
        return out
    rows = x.reshape(1, -1).expand(PADDED_ROWS, -1)
    padded: Tensor = _operators().packed_linear(rows, blocked, kernels.pads_few)
    return padded[:1].view(*x.shape[:-1], -1)


def _plain_linear(x: Tensor, bias: None, *, weight: Tensor) -> Tensor:
    # Not by F.linear, which torch before 2.12 cannot trace for any number of rows.
    return (x.flatten(0, 1) @ weight.t()).unsqueeze(1)


def _quantized_linear(x: Tensor, bias: None, *, weight: QuantizedWeight) -> Tensor:
    """`kernels.quantized_linear`, in which all but the products of integers is for the compiler to fuse."""
    rotated = (x.reshape(-1, weight.rotation.size(0)).float() @ weight.rotation).view(-1, x.size(-1))
    peaks = rotated.abs().amax(-1, keepdim=True)
    quantized = (rotated / peaks * 127).round().to(torch.int8).view(torch.uint8).bitwise_xor(128)
    out: Tensor = _operators().int8_linear(quantized, weight.blocked, weight.scales)
    return (out * peaks).to(x.dtype).view(*x.shape[:-1], -1)


def _int4_linear(x: Tensor, bias: None, *, weight: Int4Weight, kernels: Kernels) -> Tensor:
    out: Tensor = _operators().int4_linear(x, weight.packed, weight.scales_and_zeros, kernels.dequantized_rows)
    return out


@cache
def _operators() -> Any:
    """The products as operators of torch, `torch.ops.llama`: the compiler sees their sizes alone."""
    library = torch.library.Library("llama", "FRAGMENT")
    library.define("packed_linear(Tensor x, Tensor blocked, bool pads_few) -> Tensor")
    library.define("int8_linear(Tensor x, Tensor blocked, Tensor scales) -> Tensor")
    library.define("int4_linear(Tensor x, Tensor packed, Tensor scales_and_zeros, int? dequantized_rows) -> Tensor")
    library.define("attention(Tensor queries, Tensor keys, Tensor values, Tensor? mask) -> Tensor")

    def packed_linear(x: Tensor, blocked: Tensor, pads_few: bool) -> Tensor:
        return kernels.packed_linear(x, blocked, _PADDING[pads_few])

    def int8_linear(x: Tensor, blocked: Tensor, scales: Tensor) -> Tensor:
        padding = row_bucket(len(x)) - len(x)
        return onednn_int8_linear(F.pad(x, (0, 0, 0, padding)) if padding else x, blocked, scales)[: len(x)]

    def of_int4(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, dequantized_rows: int | None) -> Tensor:
        return int4_linear(x, Int4Weight(packed, scales_and_zeros), dequantized_rows)

    def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, mask).contiguous()

    def shape(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.size(0)))

    def int8_shape(x: Tensor, blocked: Tensor, scales: Tensor) -> Tensor:
        return scales.new_empty((x.size(0), scales.size(0)))

    for name, kernel, meta in (
        ("packed_linear", packed_linear, shape),
        ("int8_linear", int8_linear, int8_shape),
        ("int4_linear", of_int4, shape),
    ):
        for key in ("CPU", "MkldnnCPU"):
            library.impl(name, kernel, key)
        library.impl(name, meta, "Meta")
    for key in ("CPU", "CUDA"):
        library.impl("attention", attention, key)
    library.impl("attention", lambda queries, *_: queries.new_empty(queries.shape), "Meta")
    _libraries.append(library)
    return torch.ops.llama


_libraries: list[torch.library.Library] = []  # operators live as long as these
_PADDING = {pads: Kernels(pads_few=pads) for pads in (False, True)}


class _AttentionAsOperator(TorchFunctionMode):
    """Traces attention as one operator: which of torch's kernels computes it is decided by sizes at each call."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            queries, keys, values, mask = args
            return _operators().attention(queries, keys, values, mask)
        return func(*args, **(kwargs or {}))


def _drop_views_of_views(traced: GraphModule) -> None:
    """Replaces views by the inputs that they are views of, where they have their shape again."""
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        source = node
        while source.target is torch.ops.aten.view.default:
            source = source.args[0]
        if source.op == "placeholder" and source.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(source)


def _rotate_in_real_numbers(traced: GraphModule) -> None:
    """Replaces the products of complex numbers, which inductor does not fuse, by what they are made of."""
    from torch.fx.subgraph_rewriter import replace_pattern

    aten = torch.ops.aten

    def complex_product(pairs: Tensor, rotations: Tensor) -> Any:
        factors = aten.unsqueeze.default(aten.view_as_complex.default(rotations), -2)
        return aten.view_as_real.default(aten.mul.Tensor(aten.view_as_complex.default(pairs), factors))

    def real_product(pairs: Tensor, rotations: Tensor) -> Any:
        x, y = aten.select.int(pairs, -1, 0), aten.select.int(pairs, -1, 1)
        factors = aten.unsqueeze.default(rotations, -3)
        cos, sin = aten.select.int(factors, -1, 0), aten.select.int(factors, -1, 1)
        return aten.stack.default([x * cos - y * sin, x * sin + y * cos], -1)

    replace_pattern(traced, complex_product, real_product)


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
