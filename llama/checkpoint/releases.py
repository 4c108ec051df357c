"""The published sizes of Llama 2 and Code Llama."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llama.model import ModelArgs

TRAINED_SEQ_LEN = 4096  # positions that Llama 2 was trained for
_CODE_LLAMA_SEQ_LEN, _CODE_LLAMA_THETA = 16384, 1e6
_VOCAB_SIZE = 32000


@dataclass(frozen=True)
class Release:
    """A published network, and the number of files (and processes) that it was published for."""

    args: ModelArgs
    model_parallel_size: int


_7B = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=_VOCAB_SIZE)
_13B = ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=_VOCAB_SIZE)
_34B = ModelArgs(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, vocab_size=_VOCAB_SIZE, ffn_dim_multiplier=1.0)
_70B = replace(_34B, n_layers=80, multiple_of=4096, ffn_dim_multiplier=1.3)


_CODE: dict[str, Any] = {"vocab_size": 32016, "rope_theta": _CODE_LLAMA_THETA}  # 16 pieces are of infilling
RELEASES = {
    "7B": Release(_7B, 1),
    "13B": Release(_13B, 2),
    "70B": Release(_70B, 8),
    "CodeLlama-7b": Release(replace(_7B, **_CODE), 1),
    "CodeLlama-13b": Release(replace(_13B, **_CODE), 2),
    "CodeLlama-34b": Release(replace(_34B, rope_theta=_CODE_LLAMA_THETA), 4),
    "CodeLlama-70b": Release(replace(_70B, **_CODE), 8),
}


def trained_seq_len(args: ModelArgs) -> int:
    """The number of positions that a network was trained for: of Llama 2, or of Code Llama by its `rope_theta`."""
    return _CODE_LLAMA_SEQ_LEN if args.rope_theta == _CODE_LLAMA_THETA else TRAINED_SEQ_LEN


def find_release(args: ModelArgs) -> tuple[str, Release] | None:
    """The published network whose sizes these are, and its name."""

    def sizes(args: ModelArgs) -> tuple[float, ...]:
        return args.dim, args.n_layers, args.n_heads, args.kv_heads, args.hidden_dim, args.rope_theta

    found = ((name, release) for name, release in RELEASES.items() if sizes(release.args) == sizes(args))
    return next(found, None)
