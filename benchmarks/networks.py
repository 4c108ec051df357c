"""The networks that are measured: their files, with random weights, and what follows from their sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from benchmarks.worker import Job
from llama import ModelArgs, Tokenizer
from llama.checkpoint.format import QUANTIZE, SCALES, is_linear, tensor_shapes
from llama.distributed.device import DTYPES
from llama.tools.convert import to_hf

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32},
    "110m": {"dim": 768, "n_layers": 10, "n_heads": 12, "n_kv_heads": 4, "vocab_size": 32000, "multiple_of": 256},
    "200m": {"dim": 1024, "n_layers": 12, "n_heads": 16, "n_kv_heads": 4, "vocab_size": 32000, "multiple_of": 256},
    "1b": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": 32000, "multiple_of": 256},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256},
    "13b": {"dim": 5120, "n_layers": 40, "n_heads": 40, "vocab_size": 32000, "multiple_of": 256},
    "70b": {
        **{"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "vocab_size": 32000, "multiple_of": 4096},
        **{"ffn_dim_multiplier": 1.3, "quantize": "int8"},  # for one card
    },
}
_SIZES = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "norm_eps", "rope_theta")
_FIRST_CHARACTER = 0x20000  # of a plane with more ideographs than any vocabulary has pieces
_CONTROL_PIECES = 3


def _random_state(args: ModelArgs, dtype: torch.dtype, quantize: str | None) -> dict[str, Tensor]:
    """Random weights at MP 1.

    Every layer has the first one's numbers, shifted by a few places: drawing billions of them would take minutes, and
    engines keep equal tensors only once, which would make them look smaller than they are. Quantized ones, which this
    library alone reads, are not shifted: the file has one layer.
    """
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, size in tensor_shapes(args, 1, quantize).items():
        first = name if not name.startswith("layers.") else f"layers.0.{name.split('.', 2)[2]}"
        if name.endswith(SCALES):
            state[name] = torch.full(size, 5e-5)
        elif len(size) == 1:
            state[name] = torch.ones(size, dtype=dtype)
        elif quantize and first in state:
            state[name] = state[first]
        elif quantize and is_linear(name):
            state[name] = torch.randint(-127, 128, size, dtype=torch.int8, generator=generator)
        elif first in state:
            state[name] = state[first].roll(int(name.split(".")[1]), dims=0)
        else:
            state[name] = torch.empty(size, dtype=dtype).normal_(0, 0.02, generator=generator)
    return state


def write_tokenizer(path: Path, n_pieces: int) -> None:
    """A SentencePiece model of that many pieces, for `Llama.build`: one rare character each, after the control ones."""
    characters = [chr(_FIRST_CHARACTER + i) for i in range(n_pieces - _CONTROL_PIECES)]
    SentencePieceTrainer.train(
        sentence_iterator=iter("".join(characters[i : i + 1000]) for i in range(0, len(characters), 1000)),
        model_prefix=str(path.with_suffix("")),
        model_type="char",
        vocab_size=n_pieces,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        pad_id=-1,
        minloglevel=2,
    )


def make_job(shape: str, folder: Path, dtype: str = "bfloat16", **sizes: Any) -> Job:
    """A job, with these further fields, for a network of random weights, whose files and tokenizer it writes."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    args = ModelArgs(**{name: size for name, size in SHAPES[shape].items() if name != QUANTIZE})
    form = SHAPES[shape].get(QUANTIZE)
    checkpoint, tokenizer = folder / "checkpoint", folder / "tokenizer.model"
    checkpoint.mkdir(parents=True)
    (checkpoint / "params.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    torch.save(_random_state(args, DTYPES[dtype], form), checkpoint / "consolidated.00.pth")
    write_tokenizer(tokenizer, args.vocab_size)
    sizes |= {"form": form or ""}
    sizes |= {name: getattr(args, name) for name in _SIZES}
    return Job(str(checkpoint), str(tokenizer), str(folder), n_kv_heads=args.kv_heads, dtype=dtype, **sizes)


def write_hf_folder(job: Job) -> None:
    """The checkpoint as transformers reads it, written on the first call, with a tokenizer of single characters."""
    if job.hf_folder.exists():
        return
    to_hf(job.ckpt_dir, job.tokenizer_path, job.hf_folder, dtype=job.dtype, quiet=True)
    (job.hf_folder / "tokenizer.model").unlink()  # transformers cannot read SentencePiece models of this type
    tokenizer = Tokenizer(job.tokenizer_path)
    pieces = [tokenizer.sp_model.id_to_piece(i) for i in range(tokenizer.n_words)]
    flags = {"special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], **flags} for i in range(_CONTROL_PIECES)],
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "unk_token": pieces[0], "vocab": {p: i for i, p in enumerate(pieces)}, "merges": []},
    }
    (job.hf_folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    names = dict(zip(("unk_token", "bos_token", "eos_token"), pieces[:_CONTROL_PIECES], strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (job.hf_folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def bytes_per_decode_step(job: Job, form: str = "") -> float:
    """Bytes that one decode step has to read at batch 1, with weights in the `form` of an engine, but for their scales.

    The form of the checkpoint counts where the engine has none.

    Every weight but the embedding table, of which it reads one row, and the keys and values that are there in the
    middle of the timed steps.
    """
    itemsize = DTYPES[job.dtype].itemsize
    head_dim = job.dim // job.n_heads
    per_layer = job.dim * (2 * job.dim + 2 * job.n_kv_heads * head_dim + 3 * job.hidden_dim + 2)
    weights = job.n_layers * per_layer + job.vocab_size * job.dim + job.dim
    cached = 2 * job.n_layers * job.n_kv_heads * head_dim * (job.decode_prompt + job.decode_steps / 2)
    return {"int8": 1, "int4": 0.5}.get(form or job.form, itemsize) * weights + itemsize * cached
