"""What a run of the benchmark asks of every engine, passed to their processes as JSON.

Standard library only: every engine's environment imports it.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One network, one checkpoint, one machine setting, and the sizes to measure.

    Attributes:
        shape: what the report calls the network.
        ckpt_dir: a checkpoint in the released format, in one file.
        tokenizer_path: the `tokenizer.model` that `Llama.build` asks for; nothing is encoded with it.
        folder: where engines put files in their own formats.
        n_kv_heads, hidden_dim, vocab_size: as they come out, never None or -1.
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
    prefill_lengths: tuple[int, ...] = (16, 128, 512)
    decode_batches: tuple[int, ...] = (1, 4, 8, 16)
    decode_prompt: int = 128
    decode_steps: int = 48
    ragged_lengths: tuple[int, ...] = (8, 16, 32, 64, 96, 128, 192, 256)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def max_batch_size(self) -> int:
        return max(*self.decode_batches, len(self.ragged_lengths))

    @property
    def max_seq_len(self) -> int:
        """Room for the longest run of any figure."""
        longest = max(*self.prefill_lengths, *self.ragged_lengths, self.decode_prompt + self.decode_steps)
        return longest + 2

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
