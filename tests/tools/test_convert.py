"""Conversion to and from Hugging Face's folders, against transformers' own model and the oracle."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import Llama, ModelArgs, Tokenizer
from llama.checkpoint.format import tensor_shapes
from llama.checkpoint.huggingface import config_to_args, hf_name, with_hidden_dim
from llama.text.tokenizer_json import load_tokenizer
from llama.tools import convert
from llama.tools.convert import from_hf, to_hf
from llama.tools.reshard import reshard
from llama.tools.verify import verify
from tests.support import oracle

transformers = pytest.importorskip("transformers", reason="needs the [test] extra")

Write = Callable[..., Path]
State = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
}


def hf_model(**changes: Any) -> Any:
    """transformers' own random model; its norms are not all ones."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(CONFIG | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0.1 * torch.randn(weight.shape) if "norm" in name else torch.randn(weight.shape) / 8)
    return model


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """A good folder that a test may change, written without transformers."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shapes = tensor_shapes(config_to_args(CONFIG), 1)
    torch.manual_seed(1)
    save_file({hf_name(name): torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def load(folder: Path) -> list[State]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]


def params_of(folder: Path) -> dict[str, Any]:
    params: dict[str, Any] = json.loads((folder / "params.json").read_text())
    return params


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))


def assert_refused(kind: type[Exception], message: str, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """The call raises, with these words, and leaves the disk as it was: the folder to make is the last argument."""
    before = sorted(Path(args[-1]).parent.rglob("*"))
    with pytest.raises(kind, match=message):
        call(*args, **kwargs)
    assert sorted(Path(args[-1]).parent.rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"tie_word_embeddings": True, "num_key_value_heads": 8},
        {"intermediate_size": 203, "rms_norm_eps": 1e-3, "num_key_value_heads": 1},
    ],
)
def test_a_converted_folder_runs_with_the_logits_of_transformers(
    tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = hf_model(vocab_size=tokenizer.n_words, **changes)
    model.save_pretrained(tmp_path / "hf")
    shutil.copy(tokenizer_path, tmp_path / "hf" / "tokenizer.model")
    from_hf(tmp_path / "hf", tmp_path / "out")
    llama = Llama.build(tmp_path / "out", tmp_path / "out" / "tokenizer.model", 64, 2, device="cpu", dtype="float32")
    ids = tokens(tokenizer.n_words)
    with torch.no_grad():
        torch.testing.assert_close(llama.model(ids, 0), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_foreign_chat_template_goes_with_the_checkpoint(
    hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    (hf_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    from_hf(hf_dir, tmp_path / "one")
    assert "chat_format.json has it" in capsys.readouterr().err
    reshard(tmp_path / "one", tmp_path / "two", 2, quiet=True)
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / "chat_format.json").read_text())["chat_template"] == template


def test_all_ids_that_end_an_answer_go_there_and_back(checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """`to_hf` wrote the tokenizer's EOS alone."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9, 5]}')
    to_hf(folder, tokenizer_path, tmp_path / "hf")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [2, 5, 9]
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back" / "tokenizer.model", tmp_path / "back").more_stop_ids == {2, 5, 9}


@pytest.mark.parametrize("n_files", [1, 2])
def test_to_hf_gives_transformers_our_logits(
    write_checkpoint: Write, params: dict[str, Any], state: State, tokenizer_path: Path, tmp_path: Path, n_files: int
) -> None:
    params = params | {"rope_theta": 5e5} if n_files == 2 else params
    to_hf(write_checkpoint(params, state, n_files), tokenizer_path, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.float32 and model.config.eos_token_id == 2
    ids = tokens(params["vocab_size"])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, oracle.logits(state, params, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "n_files"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 4)])
def test_there_and_back_is_exact_to_the_bit(
    write_checkpoint: Write,
    params: dict[str, Any],
    state: State,
    tokenizer_path: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    n_files: int,
) -> None:
    folder = write_checkpoint(params, {name: weight.to(dtype) for name, weight in state.items()}, n_files)
    to_hf(folder, tokenizer_path, tmp_path / "hf", quiet=True)
    from_hf(tmp_path / "hf", tmp_path / "out", n_files)
    for ours, theirs in zip(load(tmp_path / "out"), load(folder), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    back, there = params_of(tmp_path / "out"), params_of(folder)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    assert ModelArgs(**back).hidden_dim == ModelArgs(**there).hidden_dim
    assert {**back, "multiple_of": 0, "ffn_dim_multiplier": 0} == {**there, "multiple_of": 0, "ffn_dim_multiplier": 0}


@pytest.mark.parametrize("file_bytes", [30_000, 1])
def test_large_weights_are_spread_over_files_with_an_index(
    checkpoint: Path, state: State, params: dict[str, Any], tokenizer_path: Path, tmp_path: Path, file_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "MAX_FILE_BYTES", file_bytes)
        to_hf(checkpoint, tokenizer_path, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert all(len(load_file(tmp_path / "hf" / file)) >= 1 for file in files)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, state["output.weight"])
    from_hf(tmp_path / "hf", tmp_path / "out")
    assert all(torch.equal(load(tmp_path / "out")[0][name], state[name]) for name in state)


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_model_bin_is_read_too(hf_dir: Path, tmp_path: Path, shards: int) -> None:
    from_hf(hf_dir, tmp_path / "expected")
    weights = load_file(hf_dir / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as in folders of 2023
    (hf_dir / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, hf_dir / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(weights)}
        for file in set(files.values()):
            torch.save({name: weights[name] for name in weights if files[name] == file}, hf_dir / file)
        (hf_dir / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    from_hf(hf_dir, tmp_path / "out")
    (ours,), (theirs,) = load(tmp_path / "out"), load(tmp_path / "expected")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dtype_converts(hf_dir: Path, checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    from_hf(hf_dir, tmp_path / "out", dtype="bfloat16")
    weights = load_file(hf_dir / "model.safetensors")
    ours = load(tmp_path / "out")[0]
    assert torch.equal(ours["output.weight"], weights["lm_head.weight"].bfloat16())
    to_hf(checkpoint, tokenizer_path, tmp_path / "hf16", dtype="float16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf16" / "model.safetensors").values()} == {torch.float16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf16").dtype == torch.float16
    assert_refused(ValueError, "dtype must be .*, got 'int8'", from_hf, hf_dir, tmp_path / "no", dtype="int8")
    save_file(weights | {"model.norm.weight": torch.full((64,), 7e4)}, hf_dir / "model.safetensors")
    message = "norm.weight must have values within float16"
    assert_refused(ValueError, message, from_hf, hf_dir, tmp_path / "no", dtype="float16")


def test_each_name_of_transformers_belongs_to_one_released_tensor() -> None:
    names = list(tensor_shapes(ModelArgs(dim=8, n_heads=2, n_layers=12, vocab_size=3), 1))
    theirs = {hf_name(name): name for name in names}
    assert [theirs[hf_name(name)] for name in names] == names
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=12, vocab_size=3)
    with torch.device("meta"):
        assert transformers.LlamaForCausalLM(config).state_dict().keys() == theirs.keys()


@pytest.mark.parametrize(
    ("dim", "n_heads", "hidden_dim", "expected"),
    [
        (4096, 32, 11008, (256, None)),  # 7B
        (5120, 40, 13824, (256, None)),  # 13B
        (6656, 52, 17920, (256, None)),  # 33B of the first Llama
        (8192, 64, 28672, None),  # 70B
        (8192, 64, 22016, (256, None)),  # Code Llama 34B
        (2048, 32, 5632, (256, None)),  # TinyLlama
        (3200, 32, 8640, None),  # OpenLLaMA 3B
    ],
)
def test_hidden_sizes_of_published_models(
    dim: int, n_heads: int, hidden_dim: int, expected: tuple[int, float | None] | None
) -> None:
    args = with_hidden_dim(ModelArgs(dim=dim, n_heads=n_heads), hidden_dim)
    assert args.hidden_dim == hidden_dim
    assert expected is None or (args.multiple_of, args.ffn_dim_multiplier) == expected


def test_any_hidden_size_is_met_exactly() -> None:
    draw = random.Random(0)
    for _ in range(300):
        dim, hidden_dim = 2 * draw.randint(1, 5000), draw.randint(1, 40000)
        assert with_hidden_dim(ModelArgs(dim=dim, n_heads=1), hidden_dim).hidden_dim == hidden_dim
        dim, hidden_dim = 2 ** draw.randint(3, 31), draw.randint(1, 2 ** draw.randint(1, 31) - 1)
        assert with_hidden_dim(ModelArgs(dim=dim, n_heads=4), hidden_dim).hidden_dim == hidden_dim


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("sliding_window", 4096),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("head_dim", 16),
        ("hidden_size", "64"),
        ("intermediate_size", 0),
        ("num_hidden_layers", True),
        ("num_attention_heads", 2.0),
        ("vocab_size", -1),
        ("rope_theta", -1),
        ("tie_word_embeddings", "yes"),
        ("hidden_size", 2**31),
        ("intermediate_size", 2**53 + 1),  # from where on floating point does not tell numbers apart
        ("num_attention_heads", 10**4000),
    ],
)
def test_what_is_not_llama_2_is_refused_by_the_fields_name(
    hf_dir: Path, tmp_path: Path, field: str, value: Any
) -> None:
    (hf_dir / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    assert_refused(ValueError, rf"config.json.*{field}", from_hf, hf_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "config.json must be JSON") for content in ("", "nonsense", "[" * 100_000, '{"a":' * 100_000)),
        ("[]", "config.json must hold a JSON object"),
        ("{}", "config.json: model_type must be"),
        (json.dumps(CONFIG | {"rms_norm_eps": "small"}), "config.json.*norm_eps"),
        (json.dumps(CONFIG | {"num_key_value_heads": 3}), "config.json.*n_kv_heads"),
    ],
)
def test_a_broken_config_is_refused(hf_dir: Path, tmp_path: Path, content: str, message: str) -> None:
    (hf_dir / "config.json").write_text(content)
    assert_refused(ValueError, message, from_hf, hf_dir, tmp_path / "out")


def test_tensors_that_do_not_fit_the_config_are_refused(hf_dir: Path, tmp_path: Path) -> None:
    good = load_file(hf_dir / "model.safetensors")
    norm, bias = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
    for changed, message in (
        ({name: w for name, w in good.items() if name != norm}, f"config.json describes, but lacks {norm}"),
        (
            good | {norm: torch.zeros(63)},
            rf"must have the shapes of .*, got {norm} of \(63,\), not \(64,\)",
        ),
        (
            good | {norm: torch.zeros(64, dtype=torch.int32)},
            rf"dense tensors of .*, got {norm} \(torch.int32,",
        ),
        (good | {bias: torch.zeros(64)}, f"no other tensors than the network's, but has {bias}"),
    ):
        save_file(changed, hf_dir / "model.safetensors")
        assert_refused(ValueError, message, from_hf, hf_dir, tmp_path / "out")
    save_file(good, hf_dir / "model.safetensors")
    (hf_dir / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    message = "must equal model.embed_tokens.weight, as config.json has tie_word_embeddings"
    assert_refused(ValueError, message, from_hf, hf_dir, tmp_path / "out")


def test_missing_things_are_named(hf_dir: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(FileNotFoundError, "no folder", from_hf, tmp_path / "nowhere", tmp_path / "out")
    assert_refused(
        FileNotFoundError, "must be a tokenizer.model file", to_hf, checkpoint, tmp_path / "nowhere", tmp_path / "out"
    )
    (hf_dir / "model.safetensors").unlink()
    assert_refused(FileNotFoundError, "no weights in", from_hf, hf_dir, tmp_path / "out")
    (hf_dir / "config.json").unlink()
    assert_refused(FileNotFoundError, "no config.json", from_hf, hf_dir, tmp_path / "out")


def test_truncated_and_overwritten_safetensors_are_refused(hf_dir: Path, tmp_path: Path) -> None:
    path = hf_dir / "model.safetensors"
    content = path.read_bytes()
    draw = random.Random(0)
    cuts = [0, 7, 8, 100, len(content) - 1, *(draw.randrange(len(content)) for _ in range(4))]
    for broken in [*(content[:n] for n in cuts), *(draw.randbytes(500) for _ in range(4)), b"\x02" + bytes(7) + b"{}"]:
        path.write_bytes(broken)
        assert_refused(ValueError, "model.safetensors|describes, but lacks", from_hf, hf_dir, tmp_path / "out")


class Bomb:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("bomb went off",)


def test_a_pickle_that_runs_code_is_refused(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (hf_dir / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, hf_dir / "pytorch_model.bin")
    assert_refused(ValueError, "must hold tensors alone", from_hf, hf_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"lm_head.weight": "../model.safetensors"}, r"must list .* files beside it, got '\.\./model"),
        ({"lm_head.weight": "/etc/model.safetensors"}, "must list .* files beside it, got '/etc"),
        ({"lm_head.weight": "..\\model.safetensors"}, "must list .* files beside it, got"),
        ({"lm_head.weight": "model.bin"}, "must list .* files beside it, got 'model.bin'"),
        ({"lm_head.weight": 3}, "must list .* files beside it, got 3"),
        ({"lm_head.weight": "missing.safetensors"}, "lists missing.safetensors, which is missing"),
        ({"lm_head.weight": "more.safetensors"}, "that config.json describes, but lacks model.embed"),
        ({}, "must have a weight_map"),
        (["part.safetensors"], "must have a weight_map"),
        (
            {"lm_head.weight": "part.safetensors", "model.norm.weight": "more.safetensors"},
            "part.safetensors must not repeat .* lm_head.weight",
        ),
    ],
)
def test_a_hostile_index_is_refused(hf_dir: Path, tmp_path: Path, weight_map: Any, message: str) -> None:
    (hf_dir / "model.safetensors").rename(hf_dir / "part.safetensors")
    save_file({"lm_head.weight": torch.zeros(320, 64)}, hf_dir / "more.safetensors")
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused((ValueError, FileNotFoundError), message, from_hf, hf_dir, tmp_path / "out")


def test_quoted_values_are_short_and_printable(hf_dir: Path, tmp_path: Path) -> None:
    for changes in ({"hidden_act": "\x1b[2J" * 10**5}, {"rope_scaling": {"type": ["\x1b[2J"] * 10**5}}):
        (hf_dir / "config.json").write_text(json.dumps(CONFIG | changes))
        with pytest.raises(ValueError, match=r"\\x1b\[2J") as caught:
            from_hf(hf_dir, tmp_path / "out")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_counts_and_places_are_checked(hf_dir: Path, checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for n_files, message in ((8, r"n_kv_heads \(4\).*\(8\)"), (0, "must be an integer of at least 1, got 0")):
        assert_refused(ValueError, message, lambda *a, n=n_files: from_hf(*a, n), hf_dir, out)
    assert_refused(ValueError, "must not be the input folder", from_hf, hf_dir, hf_dir)
    assert_refused(ValueError, "must not be the input folder", to_hf, checkpoint, tokenizer_path, checkpoint)
    for call in (lambda *a: from_hf(hf_dir, *a), lambda *a: to_hf(checkpoint, tokenizer_path, *a)):
        assert_refused(FileExistsError, "must be a new or an empty folder, got", call, tokenizer_path.parent)


def test_a_tokenizer_of_another_vocabulary_is_refused(
    hf_dir: Path, checkpoint: Path, tokenizer_path: Path, params: dict[str, Any], tmp_path: Path
) -> None:
    (hf_dir / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    message = f"must be at least the tokenizer's {params['vocab_size']} pieces and added tokens, got 320"
    assert_refused(ValueError, message, from_hf, hf_dir, tmp_path / "out")
    (tmp_path / "broken.model").write_bytes(b"broken")
    assert_refused(
        ValueError, "must be a SentencePiece", to_hf, checkpoint, tmp_path / "broken.model", tmp_path / "out"
    )


def test_without_safetensors_the_error_names_the_extra(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert_refused(ImportError, r"the extra \[convert\] must be installed", from_hf, hf_dir, tmp_path / "out")


def widen(hf_dir: Path, n_rows: int, tokenizer_path: Path, files: Mapping[str, Any]) -> State:
    """Gives the folder a tokenizer, files beside it, and an embedding of as many rows; returns its tensors."""
    tensors = load_file(hf_dir / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(n_rows, 64)
    save_file(tensors, hf_dir / "model.safetensors")
    shutil.copyfile(tokenizer_path, hf_dir / "tokenizer.model")
    for name, content in ({"config.json": CONFIG | {"vocab_size": n_rows}} | dict(files)).items():
        (hf_dir / name).write_text(json.dumps(content))
    return tensors


CHATML = {
    "added_tokens.json": {"<|im_start|>": 512, "<|im_end|>": 513},
    "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}, "pad_token": "</s>"},
    "tokenizer_config.json": {
        "legacy": False,
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {
            "512": {"content": "<|im_start|>", "special": False},
            "513": {"content": "<|im_end|>", "special": True},
        },
    },
}


@pytest.mark.parametrize(("n_rows", "n_files"), [(514, 1), (515, 1), (514, 4), (515, 2), (576, 4)])
def test_added_tokens_go_there_and_back_at_any_number_of_files(
    hf_dir: Path, tokenizer_path: Path, tmp_path: Path, n_rows: int, n_files: int
) -> None:
    tensors = widen(hf_dir, n_rows, tokenizer_path, CHATML)
    from_hf(hf_dir, tmp_path / "out", n_files, quiet=True)
    assert params_of(tmp_path / "out")["vocab_size"] == -(-n_rows // n_files) * n_files
    there = Tokenizer(tmp_path / "out" / "tokenizer.model")
    assert there.added_tokens == CHATML["added_tokens.json"]
    assert verify(tmp_path / "out", quiet=True).problems == []
    to_hf(tmp_path / "out", tmp_path / "out" / "tokenizer.model", tmp_path / "back", quiet=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(back[name][: len(tensor)], tensor)
        assert not back[name][len(tensor) :].any()
    for name in ("added_tokens.json", "special_tokens_map.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == CHATML[name]
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    expected: Any = CHATML["tokenizer_config.json"]
    assert {name: settings[name] for name in expected} == expected
    assert Tokenizer(tmp_path / "back" / "tokenizer.model").n_words == 514


def test_transformers_encodes_alike(hf_dir: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model by protobuf")
    widen(hf_dir, 514, tokenizer_path, CHATML)
    from_hf(hf_dir, tmp_path / "out", quiet=True)
    to_hf(tmp_path / "out", tmp_path / "out" / "tokenizer.model", tmp_path / "back", quiet=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ours = Tokenizer(tmp_path / "out" / "tokenizer.model")
    for text in ("<|im_start|>user the fox<|im_end|>\n<|im_start|>x", "the<|im_end|> fox", "naïve café 123\n\n  deep"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, bos=False, eos=False)
        assert theirs(text).input_ids == ours.encode(text, bos=True, eos=False)


def test_a_padding_token_without_a_row_is_left_out(hf_dir: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """Published folders name one that only training used; another token without a row is an error."""
    files = {"added_tokens.json": {"<pad>": 512}, "special_tokens_map.json": {"pad_token": "<pad>"}}
    widen(hf_dir, 512, tokenizer_path, files)
    from_hf(hf_dir, tmp_path / "out", quiet=True)
    assert Tokenizer(tmp_path / "out" / "tokenizer.model").n_words == 512
    files["special_tokens_map.json"] = {}
    widen(hf_dir, 512, tokenizer_path, files)
    assert_refused(
        ValueError, "at least the tokenizer's 513 pieces and ad.*, got 512", from_hf, hf_dir, tmp_path / "no"
    )


def test_llama_1s_frequencies_are_left_out(
    write_checkpoint: Write, params: dict[str, Any], state: State, tokenizer_path: Path, tmp_path: Path
) -> None:
    extra = {f"layers.{i}.attention.inner_attention.rope.freqs": torch.zeros(4) for i in range(params["n_layers"])}
    folder = write_checkpoint(params, state)
    torch.save(state | extra, folder / "consolidated.00.pth")
    to_hf(folder, tokenizer_path, tmp_path / "hf", quiet=True)
    assert len(load_file(tmp_path / "hf" / "model.safetensors")) == len(state)
