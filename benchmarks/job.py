"""What a run asks of every engine, which engines there are, and the lines that their processes exchange with it.

Standard library only: every engine's environment imports it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EngineSpec:
    """Where an engine's code is, and what it needs.

    Attributes:
        module: has `version`, `prepare` and `load`, which take the job and the variant.
        variant: of the module's engine.
        imports: packages that the engine's environment must have.
        install: what to give to pip for them, besides torch.
        cpu_only: whether it is measured on CPUs only.
        quantized: whether it has weights of fewer bits than the job's dtype.
    """

    module: str
    variant: str = ""
    imports: tuple[str, ...] = ()
    install: str = ""
    cpu_only: bool = False
    quantized: bool = False


def _peer(module: str, imports: str, install: str, variant: str = "", **options: bool) -> EngineSpec:
    return EngineSpec(f"benchmarks.peers.{module}", variant, ("torch", *imports.split()), install, **options)


OURS = {
    "ours": EngineSpec("benchmarks.ours"),
    "ours_max_batch_1": EngineSpec("benchmarks.ours", "max_batch_1"),
    "ours_compiled": EngineSpec("benchmarks.ours", "compiled"),
    "ours_int8": EngineSpec("benchmarks.ours", "int8", quantized=True),
    "ours_int8_compiled": EngineSpec("benchmarks.ours", "int8_compiled", quantized=True),
    "ours_int4": EngineSpec("benchmarks.ours", "int4", quantized=True),
    "ours_int4_compiled": EngineSpec("benchmarks.ours", "int4_compiled", quantized=True),
}
_LLAMA_CPP = ("llama_cpp", "llama_cpp gguf", "gguf llama-cpp-python")
_OPENVINO = ("openvino", "openvino optimum.intel", "openvino nncf optimum-intel")
PEERS = {
    "ours_eager": EngineSpec("benchmarks.ours", "eager", ("torch", "fairscale"), "fairscale"),
    "hf": _peer("hf", "transformers safetensors", "transformers safetensors"),
    "hf_compiled": _peer("hf", "transformers safetensors", "transformers safetensors", "compiled"),
    "llama_cpp": _peer(*_LLAMA_CPP, cpu_only=True),
    "llama_cpp_q8_0": _peer(*_LLAMA_CPP, "q8_0", cpu_only=True, quantized=True),
    "llama_cpp_q4_0": _peer(*_LLAMA_CPP, "q4_0", cpu_only=True, quantized=True),
    "openvino": _peer(*_OPENVINO, cpu_only=True),
    "openvino_int8": _peer(*_OPENVINO, "int8", cpu_only=True, quantized=True),
    "openvino_int4": _peer(*_OPENVINO, "int4", cpu_only=True, quantized=True),
    "ctranslate2": _peer(
        "ctranslate2", "ctranslate2 transformers", "ctranslate2 transformers", cpu_only=True, quantized=True
    ),
}
PUBLISHED = "published"  # the way of Meta's published code, for the ragged batch alone
ENGINES = {**OURS, **PEERS, PUBLISHED: EngineSpec("benchmarks.published")}


@dataclass(frozen=True)
class Job:
    """One network, one checkpoint, one machine setting, and the sizes to measure.

    Attributes:
        shape: what the report calls the network.
        ckpt_dir: a checkpoint in the released format, in one file.
        tokenizer_path: the `tokenizer.model` that `Llama.build` asks for; nothing is encoded with it.
        folder: where engines put files in their own formats.
        n_kv_heads, hidden_dim, vocab_size: as they come out, never None or -1.
        cpu_time: whether processes measure the CPU time that they took, in place of the time that passed.
        prefill_lengths: prompt lengths of the prefill figures, batch 1.
        decode_batches, decode_prompt, decode_steps: batch sizes of the decode figures, their prompts' length, and the
            number of timed steps.
        ragged_lengths: prompt lengths of the ragged batch.
    """

    shape: str
    ckpt_dir: str
    tokenizer_path: str
    folder: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    device: str = "cpu"
    dtype: str = "bfloat16"
    threads: int = 1
    cpu_time: bool = False
    prefill_lengths: tuple[int, ...] = (16, 128, 512)
    decode_batches: tuple[int, ...] = (1, 4, 8, 16)
    decode_prompt: int = 128
    decode_steps: int = 48
    ragged_lengths: tuple[int, ...] = (8, 16, 32, 64, 96, 128, 192, 256)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def clock(self) -> Callable[[], float]:
        """What figures are timed with, in seconds."""
        return time.process_time if self.cpu_time else time.perf_counter

    @property
    def max_batch_size(self) -> int:
        return max(*self.decode_batches, len(self.ragged_lengths))

    @property
    def max_seq_len(self) -> int:
        """Room for the longest run of any figure."""
        longest = max(*self.prefill_lengths, *self.ragged_lengths, self.decode_prompt + self.decode_steps)
        return longest + 2

    @property
    def hf_folder(self) -> Path:
        """The checkpoint as transformers reads it, which other engines convert from."""
        return Path(self.folder) / "hf"

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        """Random ids past the control pieces, the same in every process."""
        source = random.Random(0)
        return [[source.randrange(3, self.vocab_size) for _ in range(length)] for length in lengths]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Job:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return Job(**fields)


_OVER = json.dumps({"turn": "over"})


def emit(name: str, value: float | str) -> None:
    """Prints one figure, in SI units: seconds, bytes, tokens or bytes per second."""
    print(json.dumps({"figure": name, "value": value}), flush=True)


def emit_over() -> None:
    """Prints that the turn's figures are complete."""
    print(_OVER, flush=True)


def is_over(line: str) -> bool:
    return line.strip() == _OVER


def parse(line: str) -> tuple[str, float | str] | None:
    """The figure of a line; None for the output of other programs."""
    try:
        fields = json.loads(line)
        return fields["figure"], fields["value"]
    except (ValueError, KeyError, TypeError):
        return None
