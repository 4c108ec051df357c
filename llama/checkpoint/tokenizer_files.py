"""Loads a checkpoint's tokenizer with what the files beside it say of it."""

from __future__ import annotations

from pathlib import Path

from llama.checkpoint.chat_format import read_stop_ids
from llama.text.tokenizer_json import JsonTokenizer
from llama.tokenizer import Tokenizer


def load_tokenizer(
    tokenizer_path: str | Path, ckpt_dir: str | Path, tokenizer_class: type[Tokenizer] = Tokenizer
) -> Tokenizer:
    """The tokenizer, with the tokens that end an answer; errors as in `Tokenizer` and `JsonTokenizer`."""
    path = Path(tokenizer_path)
    tokenizer = JsonTokenizer(path) if _is_json(path) else tokenizer_class(path)
    folders = [path.parent, ckpt_dir]
    tokenizer.more_stop_ids = read_stop_ids(folders, tokenizer.special_tokens)
    return tokenizer


def _is_json(path: Path) -> bool:
    """Whether a file begins as a JSON object does; a SentencePiece model begins with another byte."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")
