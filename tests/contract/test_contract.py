"""What you see is what runs: hooks, edits, replaced modules, gradients and threads count, whatever the fast path.

Each contract is tested for every build: the packed and the unpacked bfloat16 ones of a CPU, float32, and the steps that
CUDA takes, eager and captured, as far as they run on a CPU. Tests compare with the oracle on weights with which the
plain network would compute the same, for example a hook that multiplies an output by four with a weight four times as
large; and each of them makes sure that the unedited weights would not have passed.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import llama.generation
from llama import Llama, Transformer
from llama.checkpoint import loading
from llama.engine.cuda_graphs import StaticStepper
from llama.layers.kernels import Kernels, can_pack, can_quantize
from llama.layers.linear import packable_layers
from llama.model import Attention, FeedForward, RMSNorm, TransformerBlock
from tests.support import oracle
from tests.support.cuda_graph import RecordedStepper
from tests.support.ranks import run_ranks

SMALL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-8,  # so little that scaling a norm's input is nothing but that
}
MAX_SEQ_LEN = 32
PROMPTS = [[5, 17, 9], [300, 44, 21, 8, 77, 5, 123], [60, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1, 99], [12, 410], [7] * 6]
N_NEW = 3
# Of log-probabilities, against the oracle in float32 with the same weights.
TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}


@cache
def packs() -> bool:
    """Whether this CPU packs. Not asked at import: ranks are forked, and threads of torch do not survive that."""
    return can_pack(torch.device("cpu"), torch.bfloat16)


@dataclass(frozen=True)
class Build:
    """One way to build the network.

    Attributes:
        kernels: what the probe of the processor finds; None for what it finds here.
    """

    dtype: str
    max_batch_size: int = 4
    file_dtype: torch.dtype = torch.float32
    kernels: Kernels | None = None
    stepper: Callable[[Transformer], StaticStepper] | None = None
    quantize: str | None = None


BUILDS = {
    "bfloat16, four rows": Build("bfloat16"),
    "bfloat16, one row": Build("bfloat16", 1, kernels=Kernels()),
    "bfloat16, one packed row": Build("bfloat16", 1, kernels=Kernels(True, True, packs_one_row=True)),
    "bfloat16 from a float16 file": Build("bfloat16", file_dtype=torch.float16),
    "float32": Build("float32"),
    "static steps": Build("float32", stepper=lambda model: StaticStepper(model, graphs=False)),
    "captured steps": Build("float32", stepper=RecordedStepper),
    "int8": Build("float32", quantize="int8"),
}


@dataclass
class Built:
    """A network that was built, and what to compare it with."""

    build: Build
    llama: Llama
    params: dict[str, Any]

    def __post_init__(self) -> None:
        self.original = self.weights()

    @property
    def model(self) -> Any:
        return self.llama.model

    @model.setter
    def model(self, model: Any) -> None:
        self.llama.model = model

    @property
    def dtype(self) -> torch.dtype:
        """That of the computation; other weights may have the file's."""
        return next(self.model.norm.parameters()).dtype

    @property
    def tolerance(self) -> float:
        return TOLERANCES[torch.bfloat16 if self.build.quantize else self.dtype]

    def weights(self) -> oracle.State:
        """Copies of the weights that `state_dict()` shows, rounded to the dtype of the computation."""
        return {name: w.detach().clone().to(self.dtype).float() for name, w in self.model.state_dict().items()}

    def assert_computes(self, weights: oracle.State) -> None:
        """Prefill and decoding give the oracle's log-probabilities, and would not have done so with the original."""
        tolerance = self.tolerance
        got, expected, unedited = self._logprobs(), self._expected(weights), self._expected(self.original)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
        for place, what in ((slice(1), "prefill"), (slice(1, None), "decoding")):
            gap = (got[:, place] - unedited[:, place]).abs().max()
            assert gap > 2 * tolerance, f"the test shows nothing about {what}: the edit changes {gap:.3f} at most"

    def assert_unedited(self) -> None:
        got = self._logprobs()
        torch.testing.assert_close(got, self._expected(self.original), rtol=0, atol=self.tolerance)

    def _logprobs(self) -> Tensor:
        """Those of the greedy tokens, (bsz, N_NEW)."""
        tokens, logprobs = self.llama.generate(PROMPTS, N_NEW, temperature=0, logprobs=True)
        assert logprobs is not None and [len(row) for row in tokens] == [N_NEW] * len(PROMPTS)
        self._tokens = tokens
        return torch.tensor(logprobs)

    def _expected(self, weights: oracle.State) -> Tensor:
        rows = [torch.tensor([*prompt, *new[:-1]]) for prompt, new in zip(PROMPTS, self._tokens, strict=True)]
        logits = oracle.logits(weights, self.params, nn.utils.rnn.pad_sequence(rows, batch_first=True))
        ends = [logits[i, len(row) - N_NEW : len(row)].log_softmax(-1) for i, row in enumerate(rows)]
        return torch.stack([end[range(N_NEW), new] for end, new in zip(ends, self._tokens, strict=True)])


@pytest.fixture(scope="module")
def small(params: dict[str, Any]) -> dict[str, Any]:
    return params | SMALL


@pytest.fixture(scope="module")
def folders(write_checkpoint: Callable[..., Path], small: dict[str, Any]) -> dict[torch.dtype, Path]:
    """The same random weights, in files of two dtypes."""
    state = oracle.random_state(small, seed=4)
    for name in state:
        if "wq" in name or "wk" in name:
            state[name] *= 1.5  # attention that is sharp enough for a change of it to show
    dtypes = (torch.float32, torch.float16)
    return {dtype: write_checkpoint(small, {name: w.to(dtype) for name, w in state.items()}) for dtype in dtypes}


@pytest.fixture(scope="module")
def make(folders: dict[torch.dtype, Path], tokenizer_path: Path, small: dict[str, Any]) -> Callable[[str], Built]:
    def build_one(name: str) -> Built:
        build = BUILDS[name]
        if build.quantize and not can_quantize(torch.device("cpu")):
            pytest.skip("needs a CPU with int8 products (VNNI)")
        with pytest.MonkeyPatch.context() as patch:
            if build.kernels is not None:
                patch.setattr(loading, "measure_kernels", lambda *_, **__: build.kernels)
            llama = Llama.build(
                folders[build.file_dtype],
                tokenizer_path,
                MAX_SEQ_LEN,
                build.max_batch_size,
                device="cpu",
                dtype=build.dtype,
                quantize=build.quantize,
            )
        llama.tokenizer.eos_id = -1  # no row ends early
        if build.stepper is not None:
            llama.stepper = build.stepper(llama.model)
        built = Built(build, llama, small)
        built.assert_unedited()  # from here on, what is captured is captured
        return built

    return build_one


@pytest.fixture(params=BUILDS)
def built(request: pytest.FixtureRequest, make: Callable[[str], Built]) -> Built:
    return make(request.param)


def scaled(state: oracle.State, names: str, by: float) -> oracle.State:
    """The state with all weights multiplied whose names begin with one of these words."""
    return {name: w * by if name.startswith(tuple(names.split())) else w for name, w in state.items()}


def stream_scaled(state: oracle.State, n_blocks: int, by: float) -> oracle.State:
    """As if the residual stream were multiplied in front of block `n_blocks`: norms keep the blocks before alike."""
    names = [f"layers.{i}.{name}" for i in range(n_blocks) for name in ("attention.wo", "feed_forward.w2")]
    return scaled(state, " ".join(["tok_embeddings", *names]), by)


FACTOR = 4.0  # exact in every dtype
LINEAR = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2")
LINEAR = (*LINEAR, "feed_forward.w3")
Equal = Callable[[oracle.State], oracle.State]


def output_cases() -> dict[str, tuple[float, Equal]]:
    """For each module a factor for its output, and the weights that do the same; of the blocks, for one alone."""
    cases: dict[str, tuple[float, Equal]] = {
        "": (FACTOR, lambda state: scaled(state, "output", FACTOR)),
        "tok_embeddings": (FACTOR, lambda state: scaled(state, "tok_embeddings", FACTOR)),
        "layers.0": (FACTOR, lambda state: stream_scaled(state, 1, FACTOR)),
        "layers.1": (-1.0, lambda state: scaled(state, "norm", -1.0)),
        "norm": (FACTOR, lambda state: scaled(state, "norm", FACTOR)),
        "output": (FACTOR, lambda state: scaled(state, "output", FACTOR)),
    }
    same_as = {name: name for name in (*LINEAR, "attention_norm", "ffn_norm")}
    same_as |= {"attention": "attention.wo", "attention.cache": "attention.wo", "feed_forward": "feed_forward.w2"}
    for name, weight in same_as.items():
        cases[f"layers.1.{name}"] = (FACTOR, lambda state, w=f"layers.1.{weight}.": scaled(state, w, FACTOR))
    return cases


def times(by: float, out: Any) -> Any:
    """A module's output times a factor; of a KV cache, the values to attend to."""
    return (out[0], by * out[1]) if isinstance(out, tuple) else by * out


def input_cases() -> dict[str, tuple[float, Equal]]:
    """For each module a factor for its input, and the weights that do the same. Tokens are added to instead."""
    cases: dict[str, tuple[float, Equal]] = {
        "": (1, lambda state: state | {"tok_embeddings.weight": state["tok_embeddings.weight"].roll(-1, 0)}),
        "layers.0": (FACTOR, lambda state: stream_scaled(state, 0, FACTOR)),
        "layers.1": (FACTOR, lambda state: stream_scaled(state, 1, FACTOR)),
        "norm": (-1.0, lambda state: scaled(state, "norm", -1.0)),
        "output": (FACTOR, lambda state: scaled(state, "output", FACTOR)),
    }
    cases["tok_embeddings"] = cases[""]
    same_as = {name: (FACTOR, [name]) for name in LINEAR}
    same_as |= {"attention_norm": (-1.0, ["attention_norm"]), "ffn_norm": (-1.0, ["ffn_norm"])}
    same_as |= {"attention": (FACTOR, ["attention.wq", "attention.wk", "attention.wv"])}
    same_as |= {"attention.cache": (FACTOR, ["attention.wk"])}
    same_as |= {"feed_forward": (FACTOR, ["feed_forward.w1", "feed_forward.w3"])}
    for name, (by, weights) in same_as.items():
        names = " ".join(f"layers.1.{weight}." for weight in weights)
        cases[f"layers.1.{name}"] = (by, lambda state, names=names, by=by: scaled(state, names, by))
    return cases


def skip_rounded(built: Built) -> None:
    if built.build.quantize:
        pytest.skip("sharper attention multiplies the errors of int8; test_quantize.py has its own test of hooks")


def changed_input(args: tuple[Any, ...], by: float) -> tuple[Any, ...]:
    if args[0].dtype == torch.int64:
        return ((args[0] + 1) % 512, *args[1:])
    return (by * args[0], *args[1:])


def test_the_cases_are_all_modules(built: Built) -> None:
    modules = {name for name, module in built.model.named_modules() if not isinstance(module, nn.ModuleList)}
    in_first_layer = {name for name in modules if name.startswith("layers.0.")}  # which is as the other one
    assert modules - in_first_layer == output_cases().keys() == input_cases().keys()


def test_what_a_forward_hook_returns_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in output_cases().items():
        handle = built.model.get_submodule(name).register_forward_hook(lambda _, args, out, by=by: times(by, out))
        built.assert_computes(equal(built.original))
        handle.remove()
    built.assert_unedited()


def test_what_a_forward_pre_hook_returns_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in input_cases().items():
        module = built.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args, by=by: changed_input(args, by))
        built.assert_computes(equal(built.original))
        handle.remove()
    built.assert_unedited()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_each_module_is_hooked_once_in_prefill_and_once_per_step(built: Built, register: str) -> None:
    modules = {name: m for name, m in built.model.named_modules() if not isinstance(m, nn.ModuleList)}
    seen: dict[str, list[int]] = {name: [] for name in modules}
    for name, module in modules.items():
        axis = 2 if name.endswith("cache") else 1  # keys and values come with their heads first
        getattr(module, register)(lambda _, args, *out, name=name, axis=axis: seen[name].append(args[0].size(axis)))
    built.llama.generate([[1, 2, 3]], N_NEW, temperature=0)
    for name, widths in seen.items():
        if built.llama.stepper is not None:
            widths = widths[:N_NEW]  # a step that is ahead of the host may be computed for nothing
        assert widths == ([1] * N_NEW if name == "output" else [3] + [1] * (N_NEW - 1)), name


def test_a_hook_on_all_modules_of_the_process_counts(built: Built) -> None:
    def negate_norms(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return -out if isinstance(module, RMSNorm) else None

    handle = nn.modules.module.register_module_forward_hook(negate_norms)
    try:
        built.assert_computes({name: -w if "norm" in name else w for name, w in built.original.items()})
    finally:
        handle.remove()


def test_a_forward_hook_on_the_model_sees_each_pass(built: Built) -> None:
    seen: list[tuple[int, ...]] = []
    handle = built.model.register_forward_hook(lambda _, args, logits: seen.append(tuple(logits.shape)))
    built.llama.generate([[1, 2, 3]], N_NEW, temperature=0)
    handle.remove()
    assert seen[:N_NEW] == [(1, 1, 512)] * N_NEW


# ---- modules that are replaced


class Times(nn.Module):
    """Any module, its output multiplied."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner = inner
        self.by = by

    def forward(self, *args: Any) -> Any:
        return times(self.by, self.inner(*args))


class LoRA(nn.Module):
    """base(x) + x A^T B^T, as adapters are written."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        n_out, n_in = base.weight.shape
        generator = torch.Generator().manual_seed(n_out)
        self.base = base
        self.a = nn.Parameter(torch.randn((rank, n_in), generator=generator) / n_in**0.5)
        self.b = nn.Parameter(torch.randn((n_out, rank), generator=generator) / rank**0.5)

    def delta(self) -> Tensor:
        return (self.b @ self.a).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def test_a_module_wrapped_in_another_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in output_cases().items():
        if name:
            inner = built.model.get_submodule(name)
            built.model.set_submodule(name, Times(inner, by))
            built.assert_computes(equal(built.original))
            built.model.set_submodule(name, inner)
    built.assert_unedited()


def test_lora_in_the_place_of_layers_counts(built: Built) -> None:
    expected = dict(built.original)
    for layer_id, layer in enumerate(built.model.layers):
        layer.attention.wq, layer.attention.wv = LoRA(layer.attention.wq), LoRA(layer.attention.wv)
        for name in ("wq", "wv"):
            weight = f"layers.{layer_id}.attention.{name}.weight"
            expected[weight] = expected[weight] + getattr(layer.attention, name).delta()
    built.assert_computes(expected)


def test_an_output_of_ones_own_counts(built: Built) -> None:
    plain = nn.Linear(32, 512, bias=False, dtype=built.dtype)
    built.model.output = plain
    built.assert_computes(built.original | {"output.weight": plain.weight.detach().float()})


def test_a_feed_forward_of_ones_own_counts(built: Built) -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    built.model.layers[1].feed_forward = Nothing()
    built.assert_computes(scaled(built.original, "layers.1.feed_forward.w2", 0.0))


def test_an_attention_of_ones_own_counts(built: Built) -> None:
    """It knows what Meta's code passes: an int start_pos."""

    class Nothing(nn.Module):
        def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
            assert isinstance(start_pos, int) and freqs_cis.shape == (x.size(1), 4)
            assert (mask is None) == (x.size(1) == 1)
            return torch.zeros_like(x)

    built.model.layers[0].attention = Nothing()
    built.assert_computes(scaled(built.original, "layers.0.attention.wo", 0.0))


def test_a_block_of_another_network_counts(built: Built, make: Callable[[str], Built]) -> None:
    block = copy.deepcopy(built.model.layers[0])
    block.attention.wv.weight.neg_()
    built.model.layers[0] = block
    built.assert_computes(scaled(built.original, "layers.0.attention.wv", -1.0))


def test_blocks_that_were_left_out_or_swapped_do_not_count(built: Built) -> None:
    first, second = built.model.layers
    built.model.layers = nn.ModuleList([first])
    without = scaled(built.original, "layers.1.attention.wo layers.1.feed_forward.w2", 0.0)
    built.assert_computes(without)
    built.model.layers = nn.ModuleList([second, first])
    swap = {"0": "1", "1": "0"}
    built.assert_computes(
        {".".join(swap.get(part, part) for part in name.split(".")): w for name, w in built.original.items()}
    )


# ---- weights that are edited

EDITED = (
    "tok_embeddings",
    "layers.0.attention.wq",
    "layers.0.attention.wo",
    "layers.1.attention_norm",
    "layers.1.feed_forward.w2",
    "output",
)


def _negate_data(module: nn.Module) -> None:
    module.weight.data.neg_()


def _assign_data(module: nn.Module) -> None:
    module.weight.data = -module.weight.data


def _negate_in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.weight.neg_()


def _negate_rows(module: nn.Module) -> None:
    for row in range(len(module.weight)):
        module.weight[row] *= -1


def _negate_detached(module: nn.Module) -> None:
    module.weight.detach().view(-1).neg_()


def _assign_parameter(module: nn.Module) -> None:
    module.weight = nn.Parameter(-module.weight.detach())


def _register_parameter(module: nn.Module) -> None:
    weight = -module.weight
    del module.weight
    module.register_parameter("weight", nn.Parameter(weight))


def _load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({"weight": -module.weight})


def _load_state_dict_by_assignment(module: nn.Module) -> None:
    module.load_state_dict({"weight": -module.weight}, assign=True)


def _negate_a_state_dict(module: nn.Module) -> None:
    module.state_dict()["weight"].neg_()


def _negate_by_dlpack(module: nn.Module) -> None:
    torch.from_dlpack(module.weight).neg_()


def _copy_into_the_storage(module: nn.Module) -> None:
    storage = module.weight.untyped_storage()
    torch.empty(0, dtype=module.weight.dtype).set_(storage, 0, module.weight.shape).neg_()


def _set_from_a_vector(module: nn.Module) -> None:
    torch.nn.utils.vector_to_parameters(-module.weight.detach().flatten(), [module.weight])


def _swap_tensors(module: nn.Module) -> None:
    torch.utils.swap_tensors(module.weight, nn.Parameter(-module.weight.detach(), requires_grad=False))


def _foreach(module: nn.Module) -> None:
    torch._foreach_neg_([module.weight])


def _parametrize(module: nn.Module) -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    parametrize.register_parametrization(module, "weight", Negated(), unsafe=True)
    parametrize.remove_parametrizations(module, "weight")


def _step_of_an_optimizer(module: nn.Module) -> None:
    module.weight.requires_grad_()
    module.weight.grad = 2 * module.weight.detach()
    torch.optim.SGD([module.weight], lr=1.0).step()
    module.weight.requires_grad_(False)


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda module: module.weight.neg_(),
    "in inference mode": _negate_in_inference_mode,
    "row by row": _negate_rows,
    "detached": _negate_detached,
    "through data": _negate_data,
    "data assigned": _assign_data,
    "a Parameter assigned": _assign_parameter,
    "a Parameter registered": _register_parameter,
    "load_state_dict": _load_state_dict,
    "load_state_dict(assign=True)": _load_state_dict_by_assignment,
    "the tensors of state_dict()": _negate_a_state_dict,
    "dlpack": _negate_by_dlpack,
    "the storage": _copy_into_the_storage,
    "vector_to_parameters": _set_from_a_vector,
    "swap_tensors": _swap_tensors,
    "foreach": _foreach,
    "a parametrization, removed": _parametrize,
    "an optimizer's step": _step_of_an_optimizer,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "name", ["bfloat16, four rows", "bfloat16, one packed row", "bfloat16 from a float16 file", "captured steps"]
)
def test_an_edited_weight_counts_and_is_in_the_state_dict(make: Callable[[str], Built], name: str, edit: str) -> None:
    built = make(name)
    for name in EDITED:
        EDITS[edit](built.model.get_submodule(name))
    expected = scaled(built.original, " ".join(EDITED), -1.0)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)
    built.assert_computes(expected)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)


def test_a_weight_edited_through_numpy_counts(make: Callable[[str], Built]) -> None:
    for name in ("float32", "bfloat16, four rows", "captured steps"):
        built = make(name)
        weights = [built.model.get_submodule(name).weight for name in EDITED]
        for weight in weights:
            if weight.dtype == torch.float32:  # numpy has no bfloat16
                weight.numpy()[:] *= -1
            else:
                weight.neg_()
        built.assert_computes(scaled(built.original, " ".join(EDITED), -1.0))


def test_data_that_was_handed_out_before_may_be_edited_later(built: Built) -> None:
    data = [built.model.get_submodule(name).weight.data for name in EDITED]
    built.assert_unedited()
    for each in data:
        each.neg_()
    built.assert_computes(scaled(built.original, " ".join(EDITED), -1.0))


def test_a_second_edit_counts_as_the_first_did(built: Built) -> None:
    weight = built.model.layers[0].attention.wo.weight
    for factor in (-1.0, 3.0):
        weight.mul_(factor)
        built.assert_computes(built.weights())
    weight.data.div_(-3.0)
    torch.testing.assert_close(built.weights(), built.original, rtol=0.02, atol=1e-3)
    built.assert_unedited()


def test_packing_anew_after_an_edit_counts(built: Built) -> None:
    if built.build.dtype != "bfloat16" or not packs():
        pytest.skip("only bfloat16 is packed, on a CPU whose oneDNN takes it")
    for name in EDITED:
        built.model.get_submodule(name).weight.data.neg_()
    built.model.pack()
    expected = scaled(built.original, " ".join(EDITED), -1.0)
    built.assert_computes(expected)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)
    assert all(layer.packed_form is not None for layer in packable_layers(built.model))
    built.model.output.weight.neg_()
    built.assert_computes(scaled(expected, "output", -1.0))


def test_zeroing_the_weights_of_every_layer_changes_everything(built: Built) -> None:
    """This went unnoticed on the default build of a CPU."""
    for layer in built.model.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()
    built.assert_computes(scaled(built.original, "layers.0 layers.1", 0.0))
    built.model.output.weight.zero_()
    _, logprobs = built.llama.generate(PROMPTS, N_NEW, temperature=0, logprobs=True)
    uniform = torch.full((len(PROMPTS), N_NEW), 1 / 512).log()
    torch.testing.assert_close(torch.tensor(logprobs), uniform)


def test_load_state_dict_of_the_whole_network_counts(built: Built) -> None:
    """It said "All keys matched" and changed nothing."""
    other = oracle.random_state(built.params, seed=5)
    assert str(built.model.load_state_dict(other)) == "<All keys matched successfully>"
    built.assert_computes(built.weights())
    for name, w in built.weights().items():
        torch.testing.assert_close(w, other[name], rtol=0.01, atol=1e-3)


def test_a_lora_delta_added_and_taken_away_counts(built: Built) -> None:
    expected = dict(built.original)
    deltas = {}
    for name in ("layers.0.attention.wq", "layers.1.attention.wv"):
        deltas[name] = LoRA(built.model.get_submodule(name)).delta()
        built.model.get_submodule(name).weight += deltas[name]
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + deltas[name]
    built.assert_computes(expected)
    for name, delta in deltas.items():
        built.model.get_submodule(name).weight.data -= delta
    built.assert_unedited()


def test_a_pruned_weight_counts(built: Built) -> None:
    """Pruning makes the weight a product that a pre-hook computes."""
    module, mask = built.model.layers[0].feed_forward.w3, torch.ones(96, 32)
    mask[::2] = 0
    assert module.weight.shape == mask.shape
    prune.custom_from_mask(module, "weight", mask)
    name = "layers.0.feed_forward.w3.weight"
    built.assert_computes(built.original | {name: built.original[name] * mask})


def test_a_parametrized_weight_counts(built: Built) -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    parametrize.register_parametrization(built.model.layers[0].attention.wv, "weight", Negated())
    built.assert_computes(scaled(built.original, "layers.0.attention.wv", -1.0))


def test_weights_put_in_for_one_call_count_in_it(built: Built) -> None:
    """`torch.func.functional_call` leaves the module's own weights as they are."""
    tokens = torch.tensor([[5, 6, 7, 8]])
    name = "layers.0.attention.wv.weight"
    with torch.no_grad():
        logits = torch.func.functional_call(built.model, {name: -built.model.state_dict()[name]}, (tokens, 0))
    expected = oracle.logits(built.original | {name: -built.original[name]}, built.params, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=built.tolerance)
    assert (expected - oracle.logits(built.original, built.params, tokens)).abs().max() > 4 * built.tolerance
    built.assert_unedited()


@pytest.mark.parametrize("cast", ["float", "bfloat16", "half", "double"])
def test_a_network_cast_to_another_dtype_computes_in_it(built: Built, cast: str) -> None:
    getattr(built.model, cast)()
    dtype = getattr(torch, cast)
    assert {weight.dtype for weight in built.model.state_dict().values()} == {dtype}
    built.original = built.weights()  # float32 files hold more than a bfloat16 network computes with
    built.assert_unedited()
    built.model.layers[0].attention.wv.weight.neg_()
    built.assert_computes(built.weights())


def test_a_network_cast_there_and_back_computes_the_same(built: Built) -> None:
    dtype = built.dtype
    built.model.to(torch.float64).to(dtype)
    built.assert_unedited()


def test_to_the_dtype_that_it_has_changes_nothing(built: Built) -> None:
    built.model.to(device="cpu", dtype=built.dtype)
    built.assert_unedited()


def _through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_a_file,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_computes_the_same_and_is_independent(built: Built, way: str) -> None:
    original, expected = built.model, scaled(built.original, "layers.0.attention.wv output", -1.0)
    copied = COPIES[way](original)
    assert torch.equal(copied.state_dict()["output.weight"], original.state_dict()["output.weight"])
    for name in ("output", "layers.0.attention.wv"):
        copied.get_submodule(name).weight.neg_()
    built.assert_unedited()
    built.model = copied
    built.assert_computes(expected)
    for layer in original.layers:
        layer.attention.wv.weight.zero_()
    built.assert_computes(expected)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_an_edited_network_has_the_edit(built: Built, way: str) -> None:
    for name in EDITED:
        built.model.get_submodule(name).weight.data.neg_()
    built.model = COPIES[way](built.model)
    built.assert_computes(scaled(built.original, " ".join(EDITED), -1.0))


def test_a_whole_llama_can_be_copied(built: Built) -> None:
    if built.llama.stepper is not None:
        pytest.skip("graphs belong to one network")
    built.llama = copy.deepcopy(built.llama)
    built.llama.tokenizer.eos_id = -1
    built.assert_unedited()


def test_edited_memory_never_reverts_to_the_file(built: Built) -> None:
    """Pages of a mapped file were given back to the kernel under edited weights: the file's values came back."""
    built.model.output.weight.neg_()
    built.model.layers[0].attention.wv.weight.data.neg_()
    expected = scaled(built.original, "output layers.0.attention.wv", -1.0)
    for _ in range(2):
        built.assert_computes(expected)
        torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)
        if built.build.dtype == "bfloat16" and packs():
            built.model.pack()


def test_an_edit_before_anything_was_computed_counts(built: Built, make: Callable[[str], Built]) -> None:
    fresh = make(next(name for name, build in BUILDS.items() if build is built.build))
    fresh.model.output.weight.data.neg_()
    fresh.model.pack() if packs() and built.build.dtype == "bfloat16" else None
    fresh.assert_computes(scaled(built.original, "output", -1.0))


def test_layers_take_the_working_dtype_whatever_the_file_had(built: Built) -> None:
    """The logit lens: what each block's output would say if it were the last."""
    hidden: list[Tensor] = []
    handle = built.model.layers[0].register_forward_hook(lambda _, args, h: hidden.append(h))
    tokens = torch.tensor([[5, 17, 9, 300]])
    built.model(tokens, 0)
    handle.remove()
    seen = built.model.output(built.model.norm(hidden[0]))
    assert seen.dtype == hidden[0].dtype == built.dtype
    expected = oracle.logits(built.original, built.params | {"n_layers": 1}, tokens)
    torch.testing.assert_close(seen.float(), expected, rtol=0, atol=built.tolerance)
    assert (expected - oracle.logits(built.original, built.params, tokens)).abs().max() > 4 * built.tolerance
    for layer in packable_layers(built.model):
        x = torch.randn((2, 3, layer.weight.size(1)), dtype=built.dtype)
        torch.testing.assert_close(layer(x).float(), x.float() @ layer.weight.float().T, rtol=0.02, atol=0.05)


# ---- forwards that are patched, overridden or compiled


def patched(forward: Callable[..., Any], by: float) -> Callable[..., Any]:
    return lambda *args, **kwargs: times(by, forward(*args, **kwargs))


def test_a_patched_forward_of_any_module_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in output_cases().items():
        module = built.model.get_submodule(name)
        module.forward = patched(module.forward, by)
        built.assert_computes(equal(built.original))
        del module.forward
    built.assert_unedited()


def meta_attention_forward(self: Any, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as somebody would write it for Meta's package: an int start_pos, cache_k and cache_v, no fast path."""
    bsz, seqlen, _ = x.shape
    xq = self.wq(x).view(bsz, seqlen, self.n_local_heads, self.head_dim)
    xk = self.wk(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
    xv = self.wv(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
    xq, xk = llama.model.apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
    self.cache_k = self.cache_k.to(xq)
    self.cache_v = self.cache_v.to(xq)
    self.cache_k[:bsz, start_pos : start_pos + seqlen] = xk
    self.cache_v[:bsz, start_pos : start_pos + seqlen] = xv
    keys = llama.model.repeat_kv(self.cache_k[:bsz, : start_pos + seqlen], self.n_rep).transpose(1, 2)
    values = llama.model.repeat_kv(self.cache_v[:bsz, : start_pos + seqlen], self.n_rep).transpose(1, 2)
    scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / self.head_dim**0.5
    if mask is not None:
        scores = scores + mask
    out = scores.float().softmax(-1).type_as(xq) @ values
    return -self.wo(out.transpose(1, 2).reshape(bsz, seqlen, -1))


def meta_block_forward(self: Any, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
    assert isinstance(start_pos, int)
    h = x + -self.attention.forward(self.attention_norm(x), start_pos, freqs_cis, mask)
    return h + self.feed_forward.forward(self.ffn_norm(h))


def meta_model_forward(self: Any, tokens: Tensor, start_pos: int) -> Tensor:
    h = self.tok_embeddings(tokens)
    freqs_cis = self.freqs_cis.to(h.device)[start_pos : start_pos + tokens.size(1)]
    mask = None
    if tokens.size(1) > 1:
        mask = torch.full((1, 1, tokens.size(1), tokens.size(1)), float("-inf"))
        mask = torch.triu(mask, diagonal=start_pos + 1).type_as(h)
    for layer in self.layers:
        h = layer(h, start_pos, freqs_cis, mask)
    return -self.output(self.norm(h)).float()


CLASS_PATCHES: dict[str, tuple[type[nn.Module], Callable[..., Any], Equal]] = {
    "Attention": (Attention, meta_attention_forward, lambda s: scaled(s, _each("attention.wo"), -1.0)),
    "TransformerBlock": (TransformerBlock, meta_block_forward, lambda s: scaled(s, _each("attention.wo"), -1.0)),
    "Transformer": (Transformer, meta_model_forward, lambda s: scaled(s, "output", -1.0)),
    "FeedForward": (
        FeedForward,
        lambda self, x: -self.w2(F.silu(self.w1(x)) * self.w3(x)),
        lambda s: scaled(s, _each("feed_forward.w2"), -1.0),
    ),
    "RMSNorm": (
        RMSNorm,
        lambda self, x: -self.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, True) + 1e-8)).type_as(x),
        lambda s: {name: -w if "norm" in name else w for name, w in s.items()},
    ),
}


def _each(name: str) -> str:
    return f"layers.0.{name} layers.1.{name}"


@pytest.mark.parametrize("name", CLASS_PATCHES)
def test_a_forward_patched_in_its_class_counts(built: Built, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, forward, equal = CLASS_PATCHES[name]
    monkeypatch.setattr(cls, "forward", forward)
    built.assert_computes(equal(built.original))
    monkeypatch.undo()
    built.assert_unedited()


@pytest.mark.parametrize("name", CLASS_PATCHES)
def test_a_forward_overridden_in_a_subclass_counts(built: Built, name: str) -> None:
    cls, forward, equal = CLASS_PATCHES[name]
    subclass = type(f"My{name}", (cls,), {"forward": forward})
    for module in built.model.modules():
        if type(module) is cls:
            module.__class__ = subclass
    built.assert_computes(equal(built.original))


@pytest.mark.parametrize("how", ["model.compile()", "torch.compile(model)", "model.forward", "a layer"])
def test_a_compiled_network_counts(make: Callable[[str], Built], how: str) -> None:
    """By a backend that counts; each shape is compiled, which takes long."""
    built, calls = make("captured steps" if how == "model.forward" else "bfloat16, four rows"), []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *args: calls.append(1) or graph(*args)

    model, options = built.model, {"backend": counting, "dynamic": True}
    model.layers = model.layers[:1]
    model.layers[0].attention.wo.weight.neg_()
    weights = built.weights()
    torch._dynamo.reset()
    if how == "model.compile()":
        model.compile(**options)
    elif how == "torch.compile(model)":
        built.model = torch.compile(model, **options)
    elif how == "model.forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        model.layers[0].attention.wv.compile(**options)
    prompt = [[5, 17, 9]]
    tokens, logprobs = built.llama.generate(prompt, 2, temperature=0, logprobs=True)
    torch._dynamo.reset()
    logits = oracle.logits(weights, built.params | {"n_layers": 1}, torch.tensor([[*prompt[0], *tokens[0]]]))
    expected = logits[0, 2:4].log_softmax(-1)[range(2), tokens[0]]
    torch.testing.assert_close(torch.tensor(logprobs[0]), expected, rtol=0, atol=built.tolerance)
    assert len(calls) >= 2, "the compiled code did not run in each pass"


def test_rotations_of_ones_own_count(built: Built) -> None:
    built.model.freqs_cis = llama.model.precompute_freqs_cis(8, 2 * MAX_SEQ_LEN, theta=10.0)
    built.params = built.params | {"rope_theta": 10.0}
    got, theta_10 = built._logprobs(), built._expected(built.original)
    torch.testing.assert_close(got, theta_10, rtol=0, atol=built.tolerance)
    built.params = built.params | {"rope_theta": 10000.0}
    assert (got - built._expected(built.original)).abs().max() > built.tolerance


def test_an_attribute_of_a_module_counts(built: Built) -> None:
    built.model.norm.eps = 15 * built.original["norm.weight"].square().mean().item()
    got, unedited = built._logprobs(), built._expected(built.original)
    for place in (slice(1), slice(1, None)):
        assert (got[:, place] - unedited[:, place]).abs().max() > 2 * built.tolerance


def test_a_patched_function_of_the_network_counts(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As code does that records attention patterns, or changes them."""
    attend = llama.model.attend
    monkeypatch.setattr(llama.model, "attend", lambda *args, **kwargs: -attend(*args, **kwargs))
    built.assert_computes(scaled(built.original, _each("attention.wo"), -1.0))


# ---- sampling


def test_a_replaced_sample_top_p_is_called(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], float]] = []

    def always_seven(probs: Tensor, p: float) -> Tensor:
        seen.append((tuple(probs.shape), p))
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
        return torch.full((len(probs), 1), 7)

    monkeypatch.setattr(llama.generation, "sample_top_p", always_seven)
    tokens, _ = built.llama.generate([[5, 6]], 3, temperature=0.7, top_p=0.8)
    assert tokens == [[7, 7, 7]]
    assert seen[:3] == [((1, 512), 0.8)] * 3
    assert built.llama.generate([[5, 6]], 3, temperature=0)[0] != [[7, 7, 7]], "greedy decoding draws nothing"


# ---- gradients


def train(model: Any, tokens: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1], 0).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_three_steps_of_sgd_are_the_oracles(built: Built) -> None:
    tokens = torch.randint(512, (built.build.max_batch_size, 12), generator=torch.Generator().manual_seed(1))
    assert not any(weight.requires_grad for weight in built.model.parameters())
    assert not built.model(tokens, 0).requires_grad
    built.model.requires_grad_()
    # A file's dtype may differ from the computation's: the oracle starts at the weights as they are.
    state = {name: w.detach().clone().float().requires_grad_() for name, w in built.model.state_dict().items()}
    losses = train(built.model, tokens, 3)
    optimizer, expected = torch.optim.SGD(state.values(), lr=0.5), []
    for _ in range(3):
        optimizer.zero_grad()
        logits = oracle.logits(state, built.params, tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert expected[2] < expected[0] - 0.3
    assert losses == pytest.approx(expected, abs=built.tolerance)
    for name, weight in built.model.named_parameters():
        start, end = built.original[name], state[name].detach()
        change, theirs = weight.detach().float() - start, end - start
        if built.build.dtype == "float32":
            torch.testing.assert_close(change, theirs, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert F.cosine_similarity(change.flatten(), theirs.flatten(), dim=0) > 0.9, name
    built.model.requires_grad_(False)
    built.assert_computes(built.weights())


def test_gradients_flow_to_inputs_alone(built: Built) -> None:
    """Attribution: the gradient of a logit with respect to a hidden state, with frozen weights."""
    hidden: list[Tensor] = []

    def leaf(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        hidden.append(out.detach().requires_grad_())
        return hidden[0]

    handle = built.model.tok_embeddings.register_forward_hook(leaf)
    tokens = torch.tensor([[5, 17, 9, 300, 4]])
    built.model(tokens, 0)[0, -1, 7].backward()
    handle.remove()
    embedded = built.original["tok_embeddings.weight"].clone().requires_grad_()
    oracle.logits(built.original | {"tok_embeddings.weight": embedded}, built.params, tokens)[0, -1, 7].backward()
    got, expected = hidden[0].grad[0].float(), embedded.grad[tokens[0]]
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > (
        0.9999 if built.dtype == torch.float32 else 0.98
    )


def test_training_only_an_adapter_leaves_the_base_alone(built: Built) -> None:
    adapter = LoRA(built.model.layers[0].attention.wq)
    built.model.layers[0].attention.wq = adapter
    tokens = torch.randint(512, (1, 12), generator=torch.Generator().manual_seed(1))
    before = adapter.a.detach().clone()
    optimizer = torch.optim.SGD([weight for weight in built.model.parameters() if weight.requires_grad], lr=0.5)
    F.cross_entropy(built.model(tokens[:, :-1], 0)[0], tokens[0, 1:]).backward()
    optimizer.step()
    assert not torch.equal(adapter.a, before)
    weight = "layers.0.attention.wq.weight"
    expected = {name.replace(".base", ""): w for name, w in built.weights().items() if not name.endswith((".a", ".b"))}
    for name, w in expected.items():
        assert torch.equal(w, built.original[name]), name
    built.assert_computes(expected | {weight: expected[weight] + adapter.delta()})


def test_generation_after_training_and_training_after_generation(built: Built) -> None:
    """No tensor that generation made in inference mode is in the way."""
    built.model.requires_grad_()
    tokens = torch.tensor([[5, 17, 9, 300, 4]])
    for _ in range(2):
        train(built.model, tokens, 1)
        built.llama.generate(PROMPTS, 2)
    model = copy.deepcopy(built.model)
    model.to(torch.float64)
    with torch.inference_mode():
        model(tokens, 0)
    train(model, tokens, 1)


# ---- captured steps


def replayed(built: Built) -> int:
    """How many steps of a call were replayed."""
    stepper = built.llama.stepper
    assert isinstance(stepper, RecordedStepper)
    before = stepper.n_replayed
    built.llama.generate([[1, 2, 3]], N_NEW, temperature=0)
    return stepper.n_replayed - before


def test_captured_steps_are_replayed_where_nothing_changed(make: Callable[[str], Built]) -> None:
    """Without this the tests of what is captured would show nothing."""
    built = make("captured steps")
    assert replayed(built) >= N_NEW - 1
    captured = len(built.llama.stepper.captured)
    built.model.output.weight.neg_()  # the same memory: the graph reads it
    assert replayed(built) >= N_NEW - 1
    assert len(built.llama.stepper.captured) == captured


def test_a_hook_makes_captured_steps_eager_while_it_is_there(make: Callable[[str], Built]) -> None:
    built = make("captured steps")
    assert replayed(built)
    handle = built.model.layers[1].ffn_norm.register_forward_hook(lambda *_: None)
    assert replayed(built) == 0
    handle.remove()
    assert replayed(built)


def test_a_moved_weight_or_another_module_is_captured_anew(make: Callable[[str], Built]) -> None:
    built = make("captured steps")
    stepper = built.llama.stepper
    assert isinstance(stepper, RecordedStepper)
    for change in (
        lambda: _assign_data(built.model.output),
        lambda: _assign_parameter(built.model.output),
        lambda: setattr(built.model, "output", copy.deepcopy(built.model.output)),
        lambda: built.model.to(torch.float64),
        lambda: setattr(
            built.model.layers[0].attention.cache, "keys", built.model.layers[0].attention.cache.keys.clone()
        ),
    ):
        replayed(built)
        captured = len(stepper.captured)
        change()
        replayed(built)
        assert len(stepper.captured) > captured


# ---- threads, and streams beside other calls

TEXTS = ["The quick brown", "Llamas", "A tiny tokenizer knows", "bytes do the rest", "eat grass", "12345", "dog", "in"]


@pytest.fixture(params=["bfloat16, one row", "float32", "static steps", "captured steps"])
def shared(request: pytest.FixtureRequest, make: Callable[[str], Built]) -> Built:
    """One network for several threads. Packed builds round otherwise where a stream's cache is computed anew."""
    return make(request.param)


def all_calls(llama: Llama, i: int) -> list[Any]:
    """What one user asks for, with results that differ from user to user."""
    options: dict[str, Any] = {"temperature": 0.9, "seed": i, "max_gen_len": 5}
    return [
        "".join(llama.stream_text_completion(TEXTS[i], **options)),
        llama.generate([PROMPTS[i % 6], PROMPTS[i % 5]], 5, temperature=0.9, seed=i, logprobs=True)[0],
        llama.text_completion(TEXTS[i : i + 3], **options),
        "".join(llama.stream_chat_completion([{"role": "user", "content": TEXTS[i]}], **options)),
        llama.score(TEXTS[i : i + 2])[0]["tokens"],
    ]


def at_once(n_threads: int, call: Callable[[int], Any]) -> list[Any]:
    """The results of `call(i)` in as many threads."""
    together = threading.Barrier(n_threads)

    def start(i: int) -> Any:
        together.wait()
        return call(i)

    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(start, range(n_threads)))


@pytest.mark.parametrize("name", ["float32", "captured steps"])
def test_eight_threads_get_what_each_gets_alone(make: Callable[[str], Built], name: str) -> None:
    """Two threads on one Llama got each other's text."""
    shared = make(name).llama
    alone = [all_calls(shared, i) for i in range(8)]
    assert len({str(result) for result in alone}) == 8
    assert at_once(8, lambda i: all_calls(shared, i)) == alone


def test_two_threads_get_what_each_gets_alone_in_every_build(built: Built) -> None:
    def call(i: int) -> list[Any]:
        return [built.llama.generate([PROMPTS[i]], 6, temperature=0) for _ in range(5)]

    alone = [call(0), call(1)]
    assert alone[0] != alone[1]
    assert at_once(2, call) == alone


def test_llamas_that_share_a_network_take_turns_too(make: Callable[[str], Built]) -> None:
    first = make("float32").llama
    second = Llama(first.model, first.tokenizer)
    alone = first.generate(PROMPTS, 12, temperature=0)
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(each.generate, PROMPTS, 12, temperature=0) for each in (first, second) * 4]
    assert all(each.result() == alone for each in work)


def interrupted(llama: Llama, between: Callable[[], object], **options: Any) -> str:
    pieces = []
    for piece in llama.stream_text_completion(TEXTS[0], max_gen_len=6, **options):
        pieces.append(piece)
        between()
    return "".join(pieces)


BETWEEN: dict[str, Callable[[Llama], object]] = {
    "model.forward": lambda llama: llama.model.forward(torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 1] * 3]), 0),
    "model": lambda llama: llama.model(torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 1] * 3]), 0),
    "one position": lambda llama: llama.model(torch.tensor([[9]]), 2),
    "in inference mode": torch.inference_mode()(lambda llama: llama.model(torch.tensor([[9, 8, 7]]), 0)),
    "generate": lambda llama: llama.generate([[9] * 20], 3, seed=1),
    "another stream": lambda llama: list(llama.stream_text_completion(TEXTS[1], max_gen_len=5, seed=1)),
    "score": lambda llama: llama.score(TEXTS[:1]),
    "the cache overwritten": lambda llama: llama.model.layers[0].attention.cache_k.fill_(9.0),
    "the cache assigned": lambda llama: setattr(
        llama.model.layers[1].attention, "cache_v", torch.ones_like(llama.model.layers[1].attention.cache_v)
    ),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_stream_goes_on_whatever_comes_between_its_pieces(shared: Built, what: str) -> None:
    """`model.forward` between two pieces corrupted the stream."""
    # A cache that is computed anew in bfloat16 may round differently.
    options: dict[str, Any] = {"temperature": 0.0 if shared.dtype == torch.bfloat16 else 0.9, "seed": 3}
    expected = interrupted(shared.llama, lambda: None, **options)
    assert interrupted(shared.llama, lambda: BETWEEN[what](shared.llama), **options) == expected
    assert interrupted(shared.llama, lambda: None, **options) == expected


def test_a_stream_of_a_network_with_its_own_forward_goes_on_too(shared: Built) -> None:
    model = shared.model
    model.forward = patched(model.forward, 1.0)
    for what in ("generate", "another stream", "score", "model"):
        expected = interrupted(shared.llama, lambda: None, temperature=0.0)
        assert interrupted(shared.llama, lambda what=what: BETWEEN[what](shared.llama), temperature=0.0) == expected


def test_a_stream_closed_late_does_not_rewind_the_generator(shared: Built) -> None:
    """It set the generator back to where it stood before a call that had drawn from it since."""
    torch.manual_seed(0)
    stream = shared.llama.stream_text_completion(TEXTS[0], temperature=1.0, max_gen_len=12)
    next(stream)
    torch.rand(3)
    shared.llama.generate([[1, 2, 3]], 3, temperature=1.0)
    before = torch.get_rng_state()
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_from_inside_of_another_is_refused(shared: Built) -> None:
    """A hook that generates would otherwise wait for itself."""
    handle = shared.model.register_forward_hook(lambda *_: shared.llama.generate([[1]], 1) and None)
    with pytest.raises(RuntimeError, match="from inside another"):
        shared.llama.generate([[1, 2]], 2)
    handle.remove()
    shared.assert_unedited()


def test_two_threads_leave_onednns_switch_on(make: Callable[[str], Built]) -> None:
    """Each turned it off for a single row's product; the second one took "off" for the state to put back."""
    layer = make("bfloat16, one row").model.output
    assert torch._C._get_mkldnn_enabled()
    x = torch.randn((1, 32), dtype=torch.bfloat16)
    expected = layer(x)

    @torch.inference_mode()
    def multiply(_: int) -> bool:
        return all(torch.equal(layer(x), expected) for _ in range(2000))

    assert at_once(2, multiply) == [True, True]
    assert torch._C._get_mkldnn_enabled()


def _calls_from_two_threads(rank: int, folder: Path, tokenizer_path: Path) -> list[str]:
    llama = Llama.build(folder, tokenizer_path, MAX_SEQ_LEN, 2, 2, device="cpu", dtype="float32")
    calls: list[Callable[[], object]] = [
        lambda: llama.generate([[1, 2]], 2, temperature=0),
        lambda: llama.text_completion(["a"], temperature=0, max_gen_len=2),
        lambda: list(llama.stream_text_completion("a", temperature=0, max_gen_len=2)),
        lambda: llama.score(["a b"]),
    ]
    first = [str(call()) for call in calls]
    messages = []
    for call in calls:
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(call).exception(timeout=60)
        messages.append(f"{type(error).__name__}: {error}")
    assert [str(call()) for call in calls] == first  # the ranks are still in step
    return messages


def test_under_model_parallelism_a_second_thread_is_refused(
    write_checkpoint: Callable[..., Path], tokenizer_path: Path, small: dict[str, Any]
) -> None:
    folder = write_checkpoint(small, oracle.random_state(small, seed=4), 2)
    for messages in run_ranks(2, _calls_from_two_threads, folder, tokenizer_path):
        for message in messages:
            assert message.startswith("RuntimeError: under model parallelism all calls must come from one thread")
