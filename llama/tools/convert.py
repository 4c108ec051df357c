"""Between Hugging Face's folders and the released layout: `llama convert from_hf|to_hf ...`.

See `llama.checkpoint.huggingface` for what is renamed, reordered and derived.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint import huggingface
from llama.checkpoint.format import split_tensor, tensor_shapes
from llama.checkpoint.reading import check_range, magnitude
from llama.checkpoint.releases import TRAINED_SEQ_LEN
from llama.checkpoint.sharded import ShardedCheckpoint
from llama.checkpoint.writing import TensorFile, lay_out_safetensors, write_shards
from llama.distributed.device import select_dtype
from llama.errors import printable, read_json_object
from llama.model import ModelArgs
from llama.text.chat_format import CHAT_FORMAT_FILE, copy_chat_format, read_stop_ids
from llama.text.tokenizer_json import load_tokenizer
from llama.tokenizer import Tokenizer
from llama.tools.commandline import run
from llama.tools.progress import writing
from llama.tools.reshard import check_count, check_places, with_even_vocabulary

_CPU = torch.device("cpu")
MAX_FILE_BYTES = 5 * 10**9  # of a safetensors file; beyond, the weights are spread over several
_PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")


def from_hf(
    hf_dir: str | Path,
    output_dir: str | Path,
    model_parallel_size: int = 1,
    *,
    dtype: str | None = None,
    quiet: bool = False,
) -> None:
    """Writes a Hugging Face Llama folder in the released layout, which `Llama.build` loads.

    Args:
        hf_dir: folder of config.json and `*.safetensors` (or `pytorch_model*.bin`); tokenizer.model is copied if it is
            there, with what is said of added tokens, and a chat template if it is not Llama 2's (see
            `llama.text.chat_format`).
        output_dir: folder to make; it appears when it is complete.
        model_parallel_size: number of files to write, one per process (GPU) that will run the model. Where the
            vocabulary is no multiple of it, tokens of zeros are added, which are never sampled.
        dtype: float16, bfloat16 or float32; by default each tensor's own.
        quiet: shows no progress bar.
    """
    check_places(hf_dir, output_dir)
    check_count(model_parallel_size)
    target_dtype = None if dtype is None else select_dtype(dtype, _CPU)
    source = huggingface.HuggingFaceFolder(Path(hf_dir))
    args = source.args
    places = [Path(hf_dir) / name for name in ("tokenizer.model", "tokenizer.json")]
    tokenizer = next((path for path in places if path.exists()), None)
    described = {}
    if tokenizer:
        described = huggingface.carried_tokens(Path(hf_dir), load_tokenizer(tokenizer, hf_dir), args.vocab_size)
    args = with_even_vocabulary(args, model_parallel_size)
    split = partial(split_tensor, parts=model_parallel_size, vocab_size=args.vocab_size)
    layout = {name: _cast(name, split(name, whole)[0], target_dtype) for name, whole in source.layout.items()}
    n_bytes = model_parallel_size * sum(part.nbytes for part in layout.values())
    with writing("convert", output_dir, n_bytes, quiet=quiet) as (folder, add):
        _write_json(folder / "params.json", _params(args))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / tokenizer.name)
        elif not quiet:
            print(f"{printable(hf_dir)} has no tokenizer.model, which inference needs; copy it there", file=sys.stderr)
        for name, content in described.items():
            _write_json(folder / name, content)
        if copy_chat_format(Path(hf_dir), folder) and not quiet:
            print(f"the chat template is not Llama 2's: {CHAT_FORMAT_FILE} has it, for chats", file=sys.stderr)
        values = ((name, split(name, _cast(name, source.whole(name), target_dtype))) for name in layout)
        write_shards(folder, layout, model_parallel_size, values, add)


def to_hf(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | None = None,
    max_position_embeddings: int = TRAINED_SEQ_LEN,
    quiet: bool = False,
) -> None:
    """Writes a checkpoint as a Hugging Face folder, which `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth, any number of them.
        tokenizer_path: its tokenizer.model.
        output_dir: folder to make; it appears when it is complete.
        dtype: float16, bfloat16 or float32; by default each tensor's own.
        max_position_embeddings: length of the context in config.json; params.json does not have it.
        quiet: shows no progress bar.
    """
    check_places(ckpt_dir, output_dir)
    target_dtype = None if dtype is None else select_dtype(dtype, _CPU)
    source = ShardedCheckpoint(ckpt_dir)
    tokenizer = Tokenizer(tokenizer_path)
    tokenizer.more_stop_ids = read_stop_ids([ckpt_dir, Path(tokenizer_path).parent], tokenizer.special_tokens)
    described = huggingface.carried_tokens(Path(tokenizer_path).parent, tokenizer, source.args.vocab_size)
    names = list(tensor_shapes(source.args, 1))
    layout = {huggingface.hf_name(name): _cast(name, source.layout[name], target_dtype) for name in names}
    n_bytes = sum(tensor.nbytes for tensor in layout.values())
    with writing("convert", output_dir, n_bytes, n_passes=1, quiet=quiet) as (folder, add), ExitStack() as stack:
        config = huggingface.args_to_config(source.args) | {"max_position_embeddings": max_position_embeddings}
        for name, content in described.items():
            _write_json(folder / name, content)
        settings = described.get("tokenizer_config.json", {})
        if (recorded := Path(ckpt_dir) / CHAT_FORMAT_FILE).is_file():
            settings["chat_template"] = read_json_object(recorded).get("chat_template")
        _write_descriptions(folder, config, tokenizer, layout[huggingface.EMBEDDING].dtype, settings)
        shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
        files: dict[str, TensorFile] = {}
        for path, tensors in _spread(folder, layout).items():
            files |= dict.fromkeys(tensors, stack.enter_context(lay_out_safetensors(path, tensors)))
        for name in names:
            n_heads = huggingface.rotated_heads(name, source.args)
            whole = source.whole(name)
            whole = _cast(name, whole if n_heads is None else huggingface.to_half_split(whole, n_heads), target_dtype)
            add(files[huggingface.hf_name(name)].write(huggingface.hf_name(name), whole))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype`, or in its own if that is None."""
    if dtype is None:
        return tensor
    if not tensor.is_meta:
        check_range({name: magnitude(tensor, dtype)}, dtype)
    return tensor.to(dtype)


def _params(args: ModelArgs) -> dict[str, Any]:
    """The content of params.json. It has rope_theta only if not the default, since Meta's Llama 2 code rejects it."""
    params = {name: getattr(args, name) for name in _PARAMS if getattr(args, name) is not None}
    return params if args.rope_theta == ModelArgs.rope_theta else params | {"rope_theta": args.rope_theta}


def _write_descriptions(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, dtype: torch.dtype, settings: Mapping[str, Any]
) -> None:
    """The small files that transformers reads with the weights; `settings` override the tokenizer's."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _write_json(folder / "config.json", {**config, **ids, "torch_dtype": str(dtype).removeprefix("torch.")})
    ends = sorted(tokenizer.more_stop_ids - {tokenizer.eos_id})
    _write_json(folder / "generation_config.json", ids | ({"eos_token_id": [tokenizer.eos_id, *ends]} if ends else {}))
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.sp_model.unk_id()}
    pieces = {name: tokenizer.sp_model.id_to_piece(token) for name, token in special.items()}
    own = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    _write_json(folder / "tokenizer_config.json", own | pieces | dict(settings))


def _spread(folder: Path, layout: Mapping[str, Tensor]) -> dict[Path, dict[str, Tensor]]:
    """Which tensors go into which file; the index of several is written."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in layout.items():
        if groups[-1] and sum(other.nbytes for other in groups[-1].values()) + tensor.nbytes > MAX_FILE_BYTES:
            groups.append({})
        groups[-1][name] = tensor
    if len(groups) == 1:
        return {folder / "model.safetensors": groups[0]}
    paths = [folder / f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    weight_map = {name: path.name for path, tensors in zip(paths, groups, strict=True) for name in tensors}
    total = sum(tensor.nbytes for tensor in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / f"model.safetensors{huggingface.INDEX_SUFFIX}", index)
    return dict(zip(paths, groups, strict=True))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run({"from_hf": from_hf, "to_hf": to_hf}, n_threads=1, name="llama convert")
