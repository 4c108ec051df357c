"""Compiled steps: the network's own logits and tokens, and the network itself where they would not be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import Llama, Transformer
from llama import model as network
from llama.distributed import groups
from llama.engine import compiled as compiling
from llama.engine import compiler
from llama.engine.compiled import CAN_COMPILE, CompiledStepper, compiled_stepper
from llama.engine.compiler import Compiled, Job, export_job, has_cpp_compiler
from llama.engine.cuda_graphs import StaticStepper
from llama.engine.network_state import NetworkState
from llama.engine.runner import ModelRunner, Stepper
from llama.engine.sampling import Sampler
from llama.engine.sequence import TokenResult
from llama.layers import attention
from llama.layers.kernels import Kernels, can_pack, can_quantize, quantize_values
from llama.layers.linear import packable_layers
from tests.support import networks
from tests.support.steps import Traced, decode

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="needs torch 2.9")

CPU = torch.device("cpu")
PARAMS = networks.PARAMS | {"dim": 64, "multiple_of": 64}
MAX_SEQ_LEN = 20
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12]]


def make(dtype: torch.dtype = torch.float32) -> Transformer:
    return networks.make_network(4, MAX_SEQ_LEN, params=PARAMS, dtype=dtype)


def run(
    model: Transformer, stepper: Stepper | None, prompts: Sequence[Sequence[int]] = PROMPTS
) -> list[list[TokenResult]]:
    sampler = Sampler(0.0, 1.0, 1, torch.Generator())
    by_prompt: list[list[TokenResult]] = [[] for _ in prompts]
    for step in decode(model, prompts, sampler, rows=[0], max_gen_len=12, eos_id=-1, logprobs=True, stepper=stepper):
        by_prompt[step.sequence].append(step)
    return by_prompt


def assert_same_steps(got: list[list[TokenResult]], expected: list[list[TokenResult]]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert [step.token for step in mine] == [step.token for step in theirs]
        assert [step.logprob for step in mine] == pytest.approx([step.logprob for step in theirs], abs=1e-4)


def logits(model: Transformer, stepper: Stepper | None, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Those of one step after prompts that are longer than `lengths`."""
    with torch.inference_mode():
        model(torch.arange(len(tokens) * 15).view(-1, 15) % 60, 0)
        return ModelRunner(model, stepper).decode(torch.tensor(tokens).unsqueeze(1), lengths).clone()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The library's own."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("llama") and r.levelno >= logging.WARNING]


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "Compiler", Traced)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of compiled code. Whether the C++ compiler knows this processor is not tried, which takes long."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
        yield folder


@pytest.fixture(scope="module")
def compiled(cache_dir: Path) -> tuple[Transformer, CompiledStepper]:
    """A network whose two graphs have been compiled, and its stepper."""
    if not has_cpp_compiler():
        pytest.skip("needs a C++ compiler: install g++, or name one by CXX")
    model = make()
    stepper = CompiledStepper(model)
    for n_rows in (1, 4):
        assert stepper._has_graph(n_rows)
    return model, stepper


def test_tokens_and_logits_match_the_network(compiled: tuple[Transformer, CompiledStepper]) -> None:
    """In float32, for one row and several, at any lengths, to the cache's last position."""
    model, stepper = compiled
    assert_same_steps(run(model, stepper), run(model, None))
    long = [[*range(18)], [*range(9)], [1]]
    assert_same_steps(run(model, stepper, long), run(model, None, long))
    for tokens, lengths in (([7], [3]), ([7], [14]), ([1, 2], [5, 5]), ([1, 2, 3, 4], [14, 1, 9, 3])):
        got, expected = (logits(model, each, tokens, lengths) for each in (stepper, None))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_what_is_compiled_serves_any_number_of_rows_and_positions(
    compiled: tuple[Transformer, CompiledStepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stepper = compiled
    monkeypatch.setattr(stepper, "_graph", _fail)
    for n_rows in (1, 2, 3, 4):
        run(model, stepper, PROMPTS[:n_rows])
    assert stepper.serves(model) and stepper._works


def test_another_start_loads_what_is_compiled(
    compiled: tuple[Transformer, CompiledStepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background too, where the first steps may be the network's own."""
    monkeypatch.setattr(compiler.Compiler, "_compile", _fail)
    model = make()
    stepper = CompiledStepper(model, background=True)
    assert stepper._compiler is not None
    stepper._compiler._thread.join()
    assert_same_steps(run(model, stepper), run(model, None))
    assert set(stepper._graphs) == {False, True}


def test_the_cache_is_written_in_place(compiled: tuple[Transformer, CompiledStepper]) -> None:
    """A step stores its keys and values at its own positions, and nothing else."""
    model, stepper = compiled
    caches = [cache for layer in model.layers for cache in (layer.attention.cache.keys, layer.attention.cache.values)]
    logits(model, None, [7, 8], [6, 2])
    expected = [cache.clone() for cache in caches]
    for cache in caches:
        cache[0, :, 6], cache[1, :, 2] = 100.0, 100.0
    addresses = [cache.data_ptr() for cache in caches]
    with torch.inference_mode():
        stepper(torch.tensor([[7], [8]]), [6, 2])
    for cache, values in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, values, atol=1e-4, rtol=0)
    assert [cache.data_ptr() for cache in caches] == addresses


CAN_USE = {
    "bfloat16": can_pack(CPU, torch.bfloat16),
    "int8": can_quantize(CPU),
    "int8 numbers": True,
}
FORMS: dict[str, tuple[str, Kernels]] = {
    "bfloat16": ("bfloat16", Kernels()),
    "bfloat16, one row padded": ("bfloat16", Kernels(pads_one=True)),
    "int8": ("int8", Kernels()),
    "int8 numbers, as on CUDA": ("int8 numbers", Kernels()),
}


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("form", FORMS)
def test_products_match_the_layers(form: str) -> None:
    name, form_kernels = FORMS[form]
    if not CAN_USE[name]:
        pytest.skip(f"needs a processor with fast products in {name}")
    model = make(torch.float32 if name == "int8" else torch.bfloat16)
    for layer in packable_layers(model):
        layer.kernels = form_kernels
        if name == "int8 numbers":
            values, scales = quantize_values(layer.weight)
            layer.load_state_dict({"weight": values, "scales": scales}, assign=True)
        elif name != "bfloat16":
            layer.quantize = name
    if name != "int8 numbers":
        model.pack()
    stepper = CompiledStepper(model)
    for tokens, lengths in (([7], [3]), ([1, 2, 3], [14, 1, 9])):
        got, expected = (logits(model, each, tokens, lengths) for each in (stepper, None))
        torch.testing.assert_close(got, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    assert set(stepper._graphs) == {False, True}


def _patch(feed_forward: nn.Module) -> None:
    forward = feed_forward.forward
    feed_forward.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def _patch_norm(block: nn.Module) -> None:
    norm = block.ffn_norm._norm
    block.ffn_norm._norm = lambda x: 2 * norm(x)  # type: ignore[method-assign]


def _override(layer: nn.Module, method: str = "forward") -> None:
    kind = type(layer)
    layer.__class__ = type("Doubled", (kind,), {method: lambda self, *x: 2 * getattr(kind, method)(self, *x)})


def _double(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)


# With whether the graphs still serve.
CHANGES: dict[str, tuple[Callable[[Any], object], bool]] = {
    "a weight edited in place": (lambda model: model.layers[1].feed_forward.w2.weight.mul_(2), True),
    "a weight assigned": (lambda model: _double(model.layers[0].attention.wq), True),
    "a norm's weight": (lambda model: model.layers[1].ffn_norm.weight.mul_(2), True),
    "a module replaced": (lambda model: setattr(model.layers[1], "ffn_norm", nn.LayerNorm(64)), False),
    "a forward patched": (lambda model: _patch(model.layers[0].feed_forward), False),
    "another method patched": (lambda model: _patch_norm(model.layers[0]), False),
    "a layer's forward patched": (lambda model: _patch(model.layers[1].attention.wo), False),
    "a layer's forward overridden": (lambda model: _override(model.layers[1].attention.wo), False),
    "an attribute": (lambda model: setattr(model.layers[1].attention_norm, "eps", 10.0), False),
}


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_counts(change: str, caplog: pytest.LogCaptureFixture) -> None:
    """Through the graphs where these read it, else because they stand aside, which is said once."""
    edit, still_serves = CHANGES[change]
    model = make()
    stepper = CompiledStepper(model)
    before = run(model, stepper)
    assert stepper.serves(model) and stepper._graphs
    edit(model)
    for _ in range(2):
        assert stepper.serves(model) == still_serves
        after = run(model, stepper)
        assert_same_steps(after, run(model, None))
        assert [[s.logprob for s in steps] for steps in after] != [[s.logprob for s in steps] for steps in before]
    assert [message.count("steps run uncompiled") for message in warnings_of(caplog)] == [1] * (not still_serves)


@pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="needs a CPU with bfloat16 in oneDNN")
@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("change", [_patch, _override, partial(_override, method="linear")])
def test_the_forward_of_packed_layers_counts(change: Callable[[nn.Module], None]) -> None:
    """Also in a stepper that is made when all blocks have it."""
    model = make(torch.bfloat16)
    model.pack()
    before = CompiledStepper(model)
    assert before.serves(model)
    for block in model.layers:
        change(block.attention.wo)
    assert not before.serves(model) and not CompiledStepper(model).serves(model)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("where", ["FeedForward.forward", "KVCache.forward", "attend"])
def test_patched_code_counts(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a class or in the network's module."""
    model = make()
    stepper = CompiledStepper(model)
    assert stepper.serves(model)
    *of, name = where.split(".")
    owner = getattr(network, of[0]) if of else network
    original = getattr(owner, name)
    called: list[None] = []

    def patched(*args: Any, **kwargs: Any) -> Any:
        called.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)
    assert not stepper.serves(model)
    run(model, stepper, PROMPTS[:1])
    assert len(called) == 12 * PARAMS["n_layers"]


@pytest.mark.usefixtures("_uncompiled")
def test_a_kernel_that_is_patched_where_attention_calls_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    stepper, state = CompiledStepper(model), NetworkState(model)
    assert stepper.serves(model)
    assert state.is_same(thorough=True)
    monkeypatch.setattr(attention, "F", SimpleNamespace(**vars(attention.F)))
    assert not stepper.serves(model)
    assert not state.is_same(thorough=True)


def _swap_norms(block: nn.Module) -> None:
    attention_norm, ffn_norm = block.attention_norm, block.ffn_norm
    del block.attention_norm, block.ffn_norm
    block.ffn_norm, block.attention_norm = attention_norm, ffn_norm


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: setattr(layers[0].attention.wq.weight, "data", layers[0].attention.wq.weight.data.t()),
        lambda layers: layers[1].register_buffer("sparse", torch.eye(2).to_sparse()),
        lambda layers: _swap_norms(layers[0]),
        lambda layers: layers.append(layers[0]),
        lambda layers: setattr(layers[0].attention.wo, "__class__", type("Own", (type(layers[0].attention.wo),), {})),
    ],
    ids=["a transposed weight", "a sparse buffer", "swapped norms", "a layer twice", "a subclass"],
)
def test_a_network_of_the_same_tensors_is_another_one(change: Callable[[Any], object]) -> None:
    model = make()
    state = NetworkState(model)
    assert state.is_same(thorough=True)
    change(model.layers)
    assert not state.is_same(thorough=True)
    assert NetworkState(model).is_same(thorough=True)


@pytest.mark.usefixtures("_uncompiled")
def test_hooks_run_and_the_graphs_are_back_without_them(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    stepper = CompiledStepper(model)
    expected = run(model, stepper, PROMPTS[:1])
    called: list[None] = []
    handle = model.layers[1].attention.wo.register_forward_hook(lambda *_: called.append(None))
    assert_same_steps(run(model, stepper, PROMPTS[:1]), expected)
    assert len(called) == 12
    assert warnings_of(caplog) == ["steps run uncompiled, which makes each token slower: the network has hooks"]
    handle.remove()
    assert stepper.serves(model)
    assert_same_steps(run(model, stepper, PROMPTS[:1]), expected)
    assert len(called) == 12


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.skipif(not CAN_USE["bfloat16"], reason="needs a processor with fast products in bfloat16")
@pytest.mark.parametrize("edit", [lambda weight: weight.mul_(2), lambda weight: weight.data.mul_(2)])
def test_a_packed_weight_that_is_edited_counts(edit: Callable[[Tensor], object]) -> None:
    model = make(torch.bfloat16)
    model.pack()
    stepper = CompiledStepper(model)
    run(model, stepper)
    assert stepper.serves(model)
    edit(model.layers[1].feed_forward.w2.weight)
    assert not stepper.serves(model)
    model.pack()
    assert stepper.serves(model)
    got, expected = (logits(model, each, [1, 2], [3, 9]) for each in (stepper, None))
    torch.testing.assert_close(got, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.usefixtures("_uncompiled")
def test_a_static_step_is_compiled_as_long_as_nothing_changes() -> None:
    """What CUDA graphs capture, on a CPU."""
    model = make()
    compiled = CompiledStepper(model)
    stepper = StaticStepper(model, graphs=False, compiled=compiled)
    for change in ("a weight edited in place", "a forward patched"):
        assert stepper.serves(model)
        assert_same_steps(run(model, stepper), run(model, None))
        assert stepper._is_compiled and set(compiled._graphs) == {False, True}
        CHANGES[change][0](model)
    assert stepper.serves(model) and not stepper._is_compiled
    assert_same_steps(run(model, stepper), run(model, None))


def test_attention_is_one_operator_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "nullcontext", compiling._AttentionAsOperator)  # which a CPU has in its place
    model = make()
    traced: list[Any] = []

    def trace(job: Job, device: torch.device) -> Compiled:
        traced.append(export_job(job, CPU))
        module = torch.compile(traced[-1].module(check_guards=False), dynamic=True, backend="eager")
        return lambda inputs: [module(*inputs)]

    monkeypatch.setattr(compiling, "_compile_here", trace)
    monkeypatch.setattr(compiling, "_is_compiled_ahead", lambda block: False)
    stepper = CompiledStepper(model)
    for tokens, lengths in (([7], [3]), ([7], [9]), ([1, 2, 3], [14, 1, 9]), ([1, 2], [7, 1])):
        got, expected = (logits(model, each, tokens, lengths) for each in (stepper, None))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert len(traced) == 2
    for graph in traced:
        names = [str(node.target) for node in graph.graph.nodes]
        assert names.count("llama.attention.default") == 1
        assert not [name for name in names if "scaled_dot_product" in name or "softmax" in name]


def _fail(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("no such operation\nin this compiler")


def test_what_cannot_be_compiled_is_said_once_and_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "Compiler", _fail)
    model = make()
    stepper = CompiledStepper(model)
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert run(model, stepper, prompts) == run(model, None, prompts)
    (message,) = warnings_of(caplog)
    assert "steps run uncompiled" in message and "NotImplementedError: no such operation" in message
    assert not stepper.serves(model)


@pytest.mark.parametrize("background", [False, True])
def test_a_compiler_that_fails_is_said_once(
    background: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a file"))
    (tmp_path / "a file").touch()
    model = make()
    stepper = CompiledStepper(model, background=background)
    if stepper._compiler is not None:
        stepper._compiler._thread.join()
    for _ in range(2):
        assert run(model, stepper) == run(model, None)
    (message,) = warnings_of(caplog)
    assert message.startswith("steps run uncompiled, which makes each token slower: the folder of compiled code")


def test_on_cuda_several_ranks_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    monkeypatch.setattr(groups, "has_several_ranks", lambda: True)
    assert isinstance(compiled_stepper(model), CompiledStepper)
    norm = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    assert compiled_stepper(SimpleNamespace(norm=norm)) is None  # type: ignore[arg-type]
    assert warnings_of(caplog) == ["compile=True has no effect: it is for one process on CUDA"]


def test_in_the_background_only_what_is_worth_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "Compiler", Traced)
    monkeypatch.setattr(compiling, "has_cpp_compiler", lambda: True)
    model = make()
    assert compiled_stepper(model, background=True) is None
    monkeypatch.setattr(compiling, "_LEAST_PARAMETERS", 1)
    assert isinstance(compiled_stepper(model, background=True), CompiledStepper)
    monkeypatch.setattr(compiling, "has_cpp_compiler", lambda: False)
    assert compiled_stepper(model, background=True) is None


def test_steps_run_uncompiled_until_the_compiler_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the compiled ones go on where these stopped, within one answer."""

    class Late(Traced):
        n_asked = 0

        def result(self, name: str, *, wait: bool) -> Compiled | None:
            assert not wait
            Late.n_asked += 1
            return super().result(name, wait=wait) if Late.n_asked > 5 else None

    monkeypatch.setattr(compiling, "Compiler", Late)
    model = make()
    stepper = CompiledStepper(model, background=True)
    assert_same_steps(run(model, stepper), run(model, None))
    assert Late.n_asked > 5 and True in stepper._graphs


@pytest.mark.usefixtures("_uncompiled")
def test_texts_are_the_same(llama: Llama, checkpoint: Path, tokenizer_path: Path) -> None:
    built = Llama.build(checkpoint, tokenizer_path, 64, 4, device="cpu", dtype="float32", compile=True)
    prompts = ["The quick brown fox", "Llamas", "the"]
    for options in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 5}):
        expected = llama.text_completion(prompts, max_gen_len=24, **options)  # type: ignore[arg-type]
        assert built.text_completion(prompts, max_gen_len=24, **options) == expected  # type: ignore[arg-type]
    assert isinstance(built.stepper, CompiledStepper) and built.stepper._graphs
