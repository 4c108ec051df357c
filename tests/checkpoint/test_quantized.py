"""Quantized checkpoints: they compute what quantizing while loading computes, and what they hold is what counts."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import loading
from llama.checkpoint.format import is_linear, read_params, scales_of, stored_quantize
from llama.checkpoint.memory import MemoryPlan
from llama.checkpoint.reading import read_shard
from llama.distributed.groups import init_process_groups
from llama.layers.kernels import can_quantize
from llama.layers.linear import own, packable_layers
from llama.tools.convert import to_hf
from llama.tools.memory import memory_table
from llama.tools.quantize import quantize
from llama.tools.reshard import reshard
from llama.tools.verify import verify
from tests.support import oracle
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not can_quantize(CPU), reason="needs a CPU with int8 products (VNNI)")
Write = Callable[..., Path]


def unrotated(values: Tensor, scales: Tensor) -> Tensor:
    """The oracle: numbers times scales, each block of 32 inputs (or what divides them) rotated back, in float64."""
    block = next(size for size in (32, 16, 8, 4, 2, 1) if values.size(1) % size == 0)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    blocks = (values.double() * scales.double().unsqueeze(1)).view(len(values), -1, block)
    return (blocks @ torch.tensor(signs, dtype=torch.float64)).flatten(1).float()


def plain_state(folder: Path) -> oracle.State:
    """The weights that a quantized checkpoint of one file stands for."""
    stored = read_shard(folder / "consolidated.00.pth")
    return {
        name: unrotated(tensor, stored[scales_of(name)]) if is_linear(name) else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(".scales")
    }


@pytest.fixture(scope="module")
def originals(write_checkpoint: Write, params: dict[str, Any], state: oracle.State) -> dict[int, Path]:
    """The same checkpoint in one, two and four files."""
    weights = {name: weight.bfloat16() for name, weight in state.items()}
    return {n: write_checkpoint(params, weights, n) for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def folders(originals: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """They, quantized."""
    made = {n: tmp_path_factory.mktemp("int8") / f"mp{n}" for n in originals}
    for n, folder in made.items():
        quantize(originals[n], folder, quiet=True)
    return made


def build(folder: Path, tokenizer_path: Path, dtype: str = "float32", **options: Any) -> Llama:
    return Llama.build(folder, tokenizer_path, 64, 4, device="cpu", dtype=dtype, **options)


PROMPTS = [[5, 17, 9], [300, 44, 21, 8, 77, 5, 123], [60]]


# What is written


def test_a_quantized_checkpoint_is_half_as_large_and_close_to_the_original(
    originals: dict[int, Path], folders: dict[int, Path], params: dict[str, Any]
) -> None:
    for n, folder in folders.items():
        assert stored_quantize(folder) == "int8" and stored_quantize(originals[n]) is None
        assert read_params(folder) == read_params(originals[n]) | {"quantize": "int8"}
        assert verify(folder, quiet=True).problems == []
        files = sorted(folder.glob("*.pth"))
        assert [path.name for path in files] == [f"consolidated.{rank:02d}.pth" for rank in range(n)]
        for path in files:
            quantized, original = read_shard(path), read_shard(originals[n] / path.name)
            assert quantized.keys() - original.keys() == {scales_of(name) for name in original if is_linear(name)}
            for name, weight in original.items():
                if not is_linear(name):
                    assert torch.equal(quantized[name], weight)
                    continue
                values, scales = quantized[name], quantized[scales_of(name)]
                assert values.dtype == torch.int8 and scales.dtype == torch.float32
                error = (unrotated(values, scales) - weight.float()).norm() / weight.float().norm()
                assert 1e-4 < error < 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm.scales": torch.ones(64)}, "but has norm.scales"),
        ({"layers.0.attention.wo.scales": None}, "but lacks layers.0.attention.wo.scales"),
        ({"output.scales": torch.ones(3)}, "got output.scales of (3,), not ("),
        ({"output.scales": "double"}, "dense tensors of float32, got output.scales (torch.float64,"),
        ({"output.scales": "nan"}, "NaN or infinite values in output.scales"),
        ({"output.weight": "double"}, "dense tensors of int8, got output.weight (torch.float64,"),
    ],
)
def test_verify_names_what_is_wrong_in_a_quantized_checkpoint(
    folders: dict[int, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "params.json").write_bytes((folders[1] / "params.json").read_bytes())
    state = {name: tensor.clone() for name, tensor in read_shard(folders[1] / "consolidated.00.pth").items()}
    for name, change in changes.items():
        if change is None:
            del state[name]
        elif isinstance(change, Tensor):
            state[name] = change
        else:
            state[name] = state[name].double() if change == "double" else state[name] * torch.nan
    torch.save(state, tmp_path / "consolidated.00.pth")
    problems = verify(tmp_path, quiet=True).problems
    assert len(problems) == 1 and words in problems[0]


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(
    originals: dict[int, Path], folders: dict[int, Path], tmp_path: Path
) -> None:
    for folder, form, message in (
        (folders[1], "int8", "must have plain weights for this, got int8 weights"),
        (originals[1], "int4", "form must be int8, got 'int4'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(folder, tmp_path / "new", form, quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="output_dir must be a new or an empty folder"):
        quantize(originals[1], tmp_path / "full", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_quantize_names_a_tensor_that_is_not_finite(
    write_checkpoint: Callable[..., Path], params: dict[str, Any], state: dict[str, Tensor], tmp_path: Path
) -> None:
    for value in (torch.nan, -torch.inf):
        weight = state["layers.1.feed_forward.w2.weight"].clone()
        weight[3, 5] = value
        folder = write_checkpoint(params, state | {"layers.1.feed_forward.w2.weight": weight})
        with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w2\.weight must be finite, got 1 values"):
            quantize(folder, tmp_path / "new", quiet=True)
        assert list(tmp_path.iterdir()) == []


def test_what_describes_tokens_and_chats_is_copied_and_the_sums_are_listed(
    originals: dict[int, Path], tmp_path: Path
) -> None:
    """The file that keeps chats from the wrong template used to be left behind."""
    shutil.copytree(originals[1], tmp_path / "original")
    names = ("chat_format.json", "added_tokens.json", "generation_config.json")
    for name in names:
        (tmp_path / "original" / name).write_text("{}")
    quantize(tmp_path / "original", tmp_path / "new", quiet=True)
    assert all((tmp_path / "new" / name).read_text() == "{}" for name in names)
    assert len((tmp_path / "new" / "checklist.chk").read_text().splitlines()) == 2
    assert not any("checksums" in note for note in verify(tmp_path / "new", quiet=True).notes)


def test_tools_for_plain_weights_refuse_a_quantized_checkpoint(
    folders: dict[int, Path], tokenizer_path: Path, tmp_path: Path
) -> None:
    message = r"must have plain weights for this, got int8 weights; use the checkpoint that it was made from"
    with pytest.raises(ValueError, match=message):
        reshard(folders[2], tmp_path / "new", 1, quiet=True)
    with pytest.raises(ValueError, match=message):
        to_hf(folders[1], tokenizer_path, tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_form_that_is_not_known_is_refused(folders: dict[int, Path], tmp_path: Path) -> None:
    params = json.loads((folders[1] / "params.json").read_text())
    for form in ("int3", 8, None):
        (tmp_path / "params.json").write_text(json.dumps(params | {"quantize": form}))
        with pytest.raises(ValueError, match=r"params\.json: quantize must be 'int8', got .*; use the version"):
            read_params(tmp_path)


# Memory


def test_the_memory_command_plans_for_a_quantized_checkpoint(
    originals: dict[int, Path], folders: dict[int, Path]
) -> None:
    for n in (1, 2):
        quantized, original = memory_table(folders[n]), memory_table(originals[n], quantize="int8")
        assert quantized.splitlines()[1:] == original.splitlines()[1:] and f"float16, int8, MP={n}" in quantized
    with pytest.raises(ValueError, match="must be the number of files of a quantized checkpoint, 2, got 1; reshard"):
        memory_table(folders[2], model_parallel_size=1)


# What is computed


@needs_int8
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_gives_exactly_what_quantizing_while_loading_gives(
    originals: dict[int, Path], folders: dict[int, Path], tokenizer_path: Path, dtype: str
) -> None:
    expected = build(originals[1], tokenizer_path, dtype, quantize="int8").generate(PROMPTS, 20, 0.0, logprobs=True)
    for options in ({}, {"quantize": "int8"}):
        assert build(folders[1], tokenizer_path, dtype, **options).generate(PROMPTS, 20, 0.0, logprobs=True) == expected
    assert build(originals[1], tokenizer_path, dtype).generate(PROMPTS, 20, 0.0, logprobs=True) != expected


def _logits_of_ranks(rank: int, folders: list[Path], tokenizer_path: Path) -> list[Tensor]:
    torch.set_num_threads(1)
    tokens = torch.tensor([[5, 17, 9, 300], [44, 21, 8, 77]])
    options = {"device": "cpu", "dtype": "float32", "quantize": "int8"}
    return [Llama.build(folder, tokenizer_path, 16, 2, **options).model(tokens, 0) for folder in folders]


@needs_int8
def test_two_ranks_give_exactly_what_quantizing_while_loading_gives(
    originals: dict[int, Path], folders: dict[int, Path], tokenizer_path: Path
) -> None:
    for while_loading, stored in run_ranks(2, _logits_of_ranks, [originals[2], folders[2]], tokenizer_path):
        assert torch.equal(while_loading, stored)


@needs_int8
def test_a_processor_that_lacks_the_products_is_told_to_use_the_original(
    folders: dict[int, Path], tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"'int8' weights, as .* has, must be used on a CPU or CUDA, got device mps; use the"
    ):
        loading.choose_quantize(None, folders[1], torch.device("mps"))
    monkeypatch.setattr(loading, "can_quantize", lambda device: False)
    with pytest.raises(ValueError, match=r"must have a processor .* is needed\); use the checkpoint that it was made"):
        build(folders[1], tokenizer_path)


# On CUDA: as much of it as a CPU can show


@pytest.mark.parametrize("stored", ["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_holds_numbers_and_scales_and_nothing_else_of_the_linear_layers(
    originals: dict[int, Path], folders: dict[int, Path], params: dict[str, Any], stored: str, dtype: torch.dtype
) -> None:
    path = (originals if stored == "plain" else folders)[1] / "consolidated.00.pth"
    assert loading.choose_quantize("int8", path.parent, torch.device("cuda:0")) == "int8"
    state, quantized = dict(read_shard(path)), read_shard(folders[1] / path.name)
    loading.load_to_device(state, device=CPU, dtype=dtype, quantize=True)
    init_process_groups(1, CPU)
    args = ModelArgs(**params, max_batch_size=2, max_seq_len=16)
    model = Transformer.from_state(args, state, cache_dtype=dtype)
    got = model.state_dict()
    for name, tensor in quantized.items():
        is_int8 = is_linear(name) or name.endswith(".scales")
        assert torch.equal(got.pop(name), tensor if is_int8 else tensor.to(dtype))
    assert not got and model.layers[0].attention.cache_k.dtype == dtype
    held = sum(tensor.nbytes for tensor in model.parameters())
    assert held == MemoryPlan(args, 1, dtype, "int8", "cuda").weights
    assert_computes(model, plain_state(folders[1]), params, 0.02)


def test_the_plan_for_cuda_has_room_for_the_largest_weight_in_the_dtype(params: dict[str, Any]) -> None:
    args = ModelArgs(**params, max_batch_size=1, max_seq_len=8)
    cpu, cuda = (MemoryPlan(args, 1, torch.float16, "int8", device).activations for device in ("cpu", "cuda"))
    assert cuda - cpu == 2 * max(args.vocab_size, args.hidden_dim) * args.dim


# What you see is what runs


@pytest.fixture
def model(folders: dict[int, Path], params: dict[str, Any]) -> Transformer:
    """The network of the checkpoint's tensors, not packed: it computes with what they stand for, on any processor."""
    init_process_groups(1, CPU)
    args = ModelArgs(**params, max_batch_size=2, max_seq_len=16)
    return Transformer.from_state(args, dict(read_shard(folders[1] / "consolidated.00.pth")), cache_dtype=torch.float32)


TOKENS = torch.tensor([[5, 17, 9, 300], [44, 21, 8, 77]])


def assert_computes(model: Transformer, state: oracle.State, params: dict[str, Any], tolerance: float) -> None:
    expected = oracle.logits(state, params, TOKENS)
    with torch.no_grad():
        error = (model(TOKENS, 0) - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("packs", [False, pytest.param(True, marks=needs_int8)])
def test_the_state_dict_is_the_file_and_what_is_computed_with(
    model: Transformer, folders: dict[int, Path], params: dict[str, Any], packs: bool
) -> None:
    model.to(torch.float32)  # norms and embedding; numbers and scales stay
    if packs:
        model.pack()
        assert all(layer._packed is not None for layer in packable_layers(model))
    stored, state = read_shard(folders[1] / "consolidated.00.pth"), model.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor.float() if tensor.dtype == torch.bfloat16 else tensor)
    assert_computes(model, plain_state(folders[1]), params, 0.03 if packs else 1e-5)


EDITS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "numbers in place": (lambda layer: layer.weight.neg_(), lambda q, s: unrotated(-q, s)),
    "numbers by data": (lambda layer: layer.weight.data.neg_(), lambda q, s: unrotated(-q, s)),
    "scales in place": (lambda layer: layer.scales.mul_(3), lambda q, s: unrotated(q, 3 * s)),
    "scales by data": (lambda layer: layer.scales.data.mul_(3), lambda q, s: unrotated(q, 3 * s)),
    "scales by numpy": (lambda layer: layer.scales.numpy().__imul__(3), lambda q, s: unrotated(q, 3 * s)),
    "other scales": (
        lambda layer: setattr(layer, "scales", nn.Parameter(3 * layer.scales, requires_grad=False)),
        lambda q, s: unrotated(q, 3 * s),
    ),
    "a plain weight": (
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.full(layer.weight.shape, 0.1), False)),
        lambda q, s: torch.full(q.shape, 0.1),
    ),
    "a state dict": (
        lambda layer: layer.load_state_dict({"weight": layer.weight.neg(), "scales": 2 * layer.scales}),
        lambda q, s: unrotated(-q, 2 * s),
    ),
    "a plain state dict": (
        lambda layer: layer.load_state_dict({"weight": torch.full(layer.weight.shape, 0.1)}, assign=True),
        lambda q, s: torch.full(q.shape, 0.1),
    ),
}


@pytest.mark.parametrize("packs", [False, pytest.param(True, marks=needs_int8)])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_numbers_and_scales_count(
    folders: dict[int, Path], model: Transformer, packs: bool, edit: str
) -> None:
    name = "layers.0.attention.wo"
    layer = model.get_submodule(name)
    values, scales = (getattr(layer, which).detach().clone() for which in ("weight", "scales"))
    layer.load_state_dict({"weight": values.clone(), "scales": scales.clone()}, assign=True)  # memory of its own
    if packs:
        layer.pack(torch.float32)
    x = torch.randn(3, values.size(1), generator=torch.Generator().manual_seed(0))
    change, equal = EDITS[edit]
    with torch.no_grad():
        before = layer(x)
        change(layer)
        expected = F.linear(x, equal(values, scales))
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
        assert (before - expected).norm() > 0.5 * before.norm()
        if packs:
            own(layer)
            layer.pack(torch.float32)
            assert (layer(x) - expected).norm() < 0.05 * expected.norm()


def test_numbers_are_not_copied_into_plain_weights_nor_the_reverse(model: Transformer) -> None:
    layer = model.layers[0].attention.wo
    plain = Transformer(ModelArgs(**vars(model.params))).requires_grad_(False).layers[0].attention.wo
    for target, source in ((plain, layer), (layer, plain)):
        with pytest.raises(RuntimeError, match="take each other's place with assign=True only"):
            target.load_state_dict(source.state_dict(), strict=False)
    assert "scales" not in plain.state_dict()
    plain.load_state_dict(layer.state_dict(), assign=True)
    assert plain.scales is not None and plain.weight.dtype == torch.int8


def test_gradients_reach_inputs_and_scales_and_numbers_cannot_be_trained(model: Transformer) -> None:
    layer = model.layers[0].attention.wo
    x = torch.randn(3, layer.weight.size(1)).requires_grad_()
    layer.scales.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, unrotated(layer.weight, layer.scales.detach()).sum(0).expand(3, -1))
    assert layer.scales.grad is not None and layer.scales.grad.norm() > 0
    with pytest.raises(RuntimeError, match="floating point"):
        model.requires_grad_()


@needs_int8
def test_a_copy_computes_the_same_and_can_be_packed(model: Transformer) -> None:
    model.to(torch.float32).pack()
    copied = copy.deepcopy(model)
    assert not any(layer._packed for layer in packable_layers(copied))
    with torch.no_grad():
        packed, plain = model(TOKENS, 0), copied(TOKENS, 0)
        assert 1e-4 < (packed - plain).norm() / plain.norm() < 0.03
        copied.pack()
        assert torch.equal(copied(TOKENS, 0), packed)
