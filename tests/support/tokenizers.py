"""The tests' tokenizers: SentencePiece models trained in a fraction of a second, and an object of another class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from llama import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "A tiny tokenizer knows little; bytes do the rest: naïve café, 12345.",
    "Llamas and alpacas live in the mountains and eat grass all day long.",
]
INFILLING_PIECES = ["\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"]


def train(prefix: Path, vocab_size: int = 512, text: Sequence[str] = TEXT, **options: Any) -> Path:
    """Trains a BPE model with Llama 2's settings: byte fallback, split digits, dummy prefix. Returns its path."""
    SentencePieceTrainer.train(
        sentence_iterator=iter([*text] * 20),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


class Foreign:
    """A tokenizer of another class, with the four names that any has: `encode`, `decode`, `bos_id` and `eos_id`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        sp_model = tokenizer.sp_model
        self.bos_id, self.eos_id = sp_model.bos_id(), sp_model.eos_id()
        self.encode = lambda s, bos, eos: [self.bos_id] * bos + sp_model.encode(s) + [self.eos_id] * eos
        self.decode = lambda t: sp_model.decode(list(t))
