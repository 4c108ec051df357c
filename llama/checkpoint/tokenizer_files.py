"""Loads a checkpoint's tokenizer with what the files beside it say of it."""

from __future__ import annotations

from pathlib import Path

from llama.checkpoint.chat_format import read_stop_ids
from llama.tokenizer import Tokenizer


def load_tokenizer(tokenizer_path: str | Path, ckpt_dir: str | Path) -> Tokenizer:
    """The tokenizer, with the tokens that end an answer; errors as in `Tokenizer`."""
    tokenizer = Tokenizer(tokenizer_path)
    folders = [Path(tokenizer_path).parent, ckpt_dir]
    tokenizer.more_stop_ids = read_stop_ids(folders, tokenizer.special_tokens)
    return tokenizer
