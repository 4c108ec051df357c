"""Llama 2 as Hugging Face's transformers writes it.

Tensor names, the order of query and key rows, and `config.json`, each mapping with an inverse; and the folder that has
them, whose weights are read one tensor at a time from safetensors files or, where there are none, from
`pytorch_model*.bin`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.checkpoint.format import tensor_shapes
from llama.checkpoint.reading import read_shard, same_bits, tensor_faults
from llama.errors import missing_extra, printable, quote, read_json_object
from llama.model import ModelArgs
from llama.tokenizer import ADDED_TOKENS_FILES, Tokenizer

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_OTHER_NAMES = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
}
_SETTINGS = "tokenizer_config.json"
_TOKEN_SETTINGS = ("added_tokens_decoder", "legacy")  # and those whose names end in _token or _tokens
INDEX_SUFFIX = ".index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or an index of that name, which lists several files
_KNOWN_EXTRA = "rotary_emb.inv_freq"  # older folders carry it, once or in each layer; it follows from config.json

# The values that these fields of config.json may have; the first is a missing field's.
_TAKEN: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "tie_word_embeddings": (False, True),
}
_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_RELEASED_WIDTHS = ((256, None), (4096, 1.3))  # multiple_of and ffn_dim_multiplier; the second are the 70B's
_MAX_SIZE = 2**31 - 1  # of a size in config.json


def hf_name(name: str) -> str:
    """Hugging Face's name of the tensor that the released files call `name`; no two share one."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    _, layer, in_layer = name.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_NAMES[in_layer]}"


def rotated_heads(name: str, args: ModelArgs) -> int | None:
    """Number of heads in the rows of the tensor `name` (a released name) if rotary embedding applies; else None."""
    if name.endswith("attention.wq.weight"):
        return args.n_heads
    return args.kv_heads if name.endswith("attention.wk.weight") else None


def to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of wq or wk, reordered for transformers' rotary embedding.

    In released weights the rotated pairs of a head's n rows are (0, 1), (2, 3), ...; in transformers' they are
    (0, n/2), (1, n/2 + 1), ...
    """
    rows, width = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    rows, width = weight.shape
    return weight.view(n_heads, 2, rows // n_heads // 2, width).transpose(1, 2).reshape(rows, width)


def args_to_config(args: ModelArgs) -> dict[str, Any]:
    """The fields of `config.json` that describe the network."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(args, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": args.kv_heads,
        "intermediate_size": args.hidden_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def config_to_args(config: Mapping[str, Any]) -> ModelArgs:
    """The network that a `config.json` describes.

    Raises:
        ValueError: this library does not support it; the message names the field.
    """
    _check_architecture(config)
    sizes = {ours: _whole_number(config, theirs) for ours, theirs in _SIZES.items()}
    hidden_dim = _whole_number(config, "intermediate_size")
    all_heads = config.get("num_key_value_heads") is None
    kv_heads = sizes["n_heads"] if all_heads else _whole_number(config, "num_key_value_heads")
    args = ModelArgs(
        **sizes, n_kv_heads=kv_heads, norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=_rope_theta(config)
    )
    args.validate()
    if config.get("head_dim") not in (None, args.head_dim):
        raise ValueError(
            f"head_dim must be hidden_size / num_attention_heads = {args.head_dim}, got {quote(config['head_dim'])}"
        )
    return with_hidden_dim(args, hidden_dim)


def with_hidden_dim(args: ModelArgs, hidden_dim: int) -> ModelArgs:
    """`args` with a multiple_of and, where needed, a ffn_dim_multiplier that give exactly this hidden size."""
    for multiple, multiplier in (*_RELEASED_WIDTHS, (hidden_dim, None)):
        found = replace(args, multiple_of=multiple, ffn_dim_multiplier=multiplier)
        if found.hidden_dim == hidden_dim:
            return found
    unscaled = replace(args, multiple_of=1, ffn_dim_multiplier=None).hidden_dim
    return replace(args, multiple_of=1, ffn_dim_multiplier=(hidden_dim + 0.5) / unscaled)  # the fraction is cut off


def carried_tokens(folder: Path, tokenizer: Tokenizer, n_rows: int) -> dict[str, dict[str, Any]]:
    """By file, what a folder says of the tokenizer's special and added tokens.

    A padding token that the embedding has no row for is left out: it pads batches in training, and is never a prompt's.

    Raises:
        ValueError: there is no row for another token.
    """
    files = {name: read_json_object(folder / name) for name in ADDED_TOKENS_FILES if (folder / name).is_file()}
    padding = {_content(content.get("pad_token")) for content in files.values()}
    without_row = {name for name, token in tokenizer.added_tokens.items() if token >= n_rows}
    n_known = tokenizer.n_words - len(without_row & padding)
    if n_known > n_rows:
        raise ValueError(
            f"the model's vocabulary must be at least the tokenizer's {n_known} pieces and added tokens, got {n_rows}; "
            f"use the tokenizer of this model, or correct {', '.join(ADDED_TOKENS_FILES)}"
        )
    carried = {}
    for file, content in files.items():
        if file == _SETTINGS:
            content = {k: v for k, v in content.items() if k in _TOKEN_SETTINGS or k.endswith(("_token", "_tokens"))}
            described = content.get("added_tokens_decoder", {}).items()
            content["added_tokens_decoder"] = {k: v for k, v in described if _content(v) not in without_row}
        kept = {k: v for k, v in content.items() if k not in without_row and _content(v) not in without_row}
        carried[file] = kept
    return carried


def _content(token: Any) -> str | None:
    """The text of a token, which these files give alone or with options."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _check_architecture(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "llama":
        raise ValueError(f"model_type must be 'llama', got {quote(config.get('model_type'))}")
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures not in (["LlamaForCausalLM"], ["LLaMAForCausalLM"]):  # the second: of 2023's first conversions
        raise ValueError(f"architectures must be ['LlamaForCausalLM'], got {quote(architectures)}")
    for field, taken in _TAKEN.items():
        value = config.get(field, taken[0])
        if value not in taken:
            raise ValueError(f"{field} must be {' or '.join(map(repr, taken))} for Llama 2, got {quote(value)}")


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """The base of the rotary frequencies. transformers 5 has it inside `rope_parameters`."""
    theta = config.get("rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        settings = config.get(field) or {}
        kind = settings.get("rope_type", settings.get("type", "default")) if isinstance(settings, dict) else settings
        if kind != "default":
            raise ValueError(f"{field} must be 'default': Llama 2 does not scale rotary embeddings; got {quote(kind)}")
        theta = settings.get("rope_theta", theta)
    return 10000.0 if theta is None else theta


def _whole_number(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"{field} must be an integer from 1 to {_MAX_SIZE}, got {quote(value)}")
    return value


class HuggingFaceFolder:
    """The network of a folder, whose tensors have the names and the order of rows of the released files here.

    Attributes:
        args: the network.
        layout: every tensor, without values (on the meta device).

    Raises:
        FileNotFoundError: `config.json` or weights are missing.
        ValueError: a file is damaged or of another format, or the network is not of Llama 2's architecture.
        ImportError: there are safetensors files, but no safetensors package.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            got = f"no config.json in {folder}" if folder.is_dir() else f"no folder {folder}"
            raise FileNotFoundError(f"hf_dir must be the folder of a downloaded Hugging Face model, got {got}")
        config = read_json_object(folder / "config.json")
        try:
            self.args = config_to_args(config)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        self._paths: dict[str, Path] = {}  # of each tensor
        tensors = self._map(folder)
        shapes = tensor_shapes(self.args, 1)
        self._names = {name: hf_name(name) for name in shapes}
        is_tied = config.get("tie_word_embeddings")
        if is_tied:
            self._names["output.weight"] = EMBEDDING
        needed = {theirs: shapes[ours] for ours, theirs in self._names.items()}
        unused = {name for name in tensors if name.endswith(_KNOWN_EXTRA) or (is_tied and name == OUTPUT)}
        used = {name: tensor for name, tensor in tensors.items() if name not in unused}
        if faults := tensor_faults(folder, used, needed, {}, described_by="config.json"):
            raise ValueError(faults[0])
        if OUTPUT in unused and not same_bits(tensors[EMBEDDING], tensors[OUTPUT]):
            raise ValueError(
                f"{folder}: {OUTPUT} must equal {EMBEDDING}, as config.json has tie_word_embeddings, got other values"
            )
        self.layout = {ours: tensors[theirs].to("meta") for ours, theirs in self._names.items()}

    def _map(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of all files, by their names there."""
        tensors: dict[str, Tensor] = {}
        for path in _weight_files(folder):
            mapped = _mapped(path)
            if twice := sorted(mapped.keys() & tensors.keys()):
                raise ValueError(f"{path} must not repeat tensors of another file, got {printable(twice[0])}")
            tensors |= mapped
            self._paths |= dict.fromkeys(mapped, path)
        return tensors

    def whole(self, name: str) -> Tensor:
        """The tensor `name`."""
        theirs, n_heads = self._names[name], rotated_heads(name, self.args)
        tensor = _mapped(self._paths[theirs])[theirs]  # mapped for this tensor alone: its memory is freed with it
        return tensor if n_heads is None else to_interleaved(tensor, n_heads)


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, views of it."""
    if path.suffix != ".safetensors":
        return {str(name): tensor for name, tensor in read_shard(path).items()}
    try:
        import safetensors
    except ImportError as error:
        raise missing_extra("convert", error) from error
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except safetensors.SafetensorError as error:
        reason = printable(error, limit=200)
        raise ValueError(f"{path} cannot be read ({reason}); is it cut short? Compare its checksum") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights, of the first kind found."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}{INDEX_SUFFIX}").is_file():
            return _listed_files(folder / f"{name}{INDEX_SUFFIX}", suffix=Path(name).suffix)
    raise FileNotFoundError(
        f"no weights in {folder}, which must hold {' or '.join(_WEIGHTS)}, or an index of such files"
    )


def _listed_files(index: Path, *, suffix: str) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a weight_map, which names the file of each tensor; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise ValueError(f"{index} must list {suffix} files beside it, got {quote(file)}")
    paths = [index.parent / file for file in sorted(set(weight_map.values()))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{index} lists {printable(missing[0])}, which is missing; download the folder again")
    return paths
