"""Loads a checkpoint's tokenizer: SentencePiece's, or a `tokenizer.json` of byte-level BPE, as SmolLM has it, with the
package tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llama.errors import missing_extra, printable, quote, read_json_object
from llama.text.chat_format import read_settings, read_stop_ids, token_names
from llama.tokenizer import Tokenizer, checked_text

_MAX_BYTES = 2**28  # vocabularies of 256,000 tokens have some 2**25


def load_tokenizer(
    tokenizer_path: str | Path, ckpt_dir: str | Path, tokenizer_class: type[Tokenizer] = Tokenizer
) -> Tokenizer:
    """The tokenizer, with the tokens that end an answer; errors as in `Tokenizer` and `JsonTokenizer`."""
    path = Path(tokenizer_path)
    is_json = False
    if path.is_file():
        with path.open("rb") as file:
            is_json = file.read(64).lstrip().startswith(b"{")  # a SentencePiece model begins with another byte
    tokenizer = JsonTokenizer(path) if is_json else tokenizer_class(path)
    tokenizer.more_stop_ids = read_stop_ids([path.parent, ckpt_dir], tokenizer.special_tokens)
    return tokenizer


class JsonTokenizer(Tokenizer):
    """Byte-level BPE. Any id is some bytes, so that no space is added in front of a text, and none is dropped.

    Attributes:
        bos_id: as the files next to it name it; `eos_id` if they name none.
        adds_bos: whether texts begin with BOS. Where they do not, only the empty text does.

    Raises:
        ImportError: the package tokenizers is not installed.
        OSError: the file cannot be read.
        ValueError: the file is damaged or no byte-level BPE, or no file beside it names EOS.
    """

    def __init__(self, path: str | Path) -> None:
        whole = _read(Path(path))
        self.sp_model = None
        added = whole.get("added_tokens") or ()
        self.added_tokens = {token["content"]: int(token["id"]) for token in added}
        self._controls = {int(token["id"]) for token in added if token.get("special")}
        self._added_texts = {token: text for text, token in self.added_tokens.items()}
        self._named_tokens = self.added_tokens
        # Without the added tokens their names are plain text: which of them are tokens is for the caller to say.
        self._bpe = _load(Path(path), {**whole, "added_tokens": [], "post_processor": None, "truncation": None})
        vocabulary: dict[str, int] = self._bpe.get_vocab()
        self._pieces = {token: piece for piece, token in vocabulary.items()} | self._added_texts
        self.n_words = max(self._pieces, default=-1) + 1
        ids_by_text = vocabulary | self.added_tokens
        names = token_names(read_settings(Path(path).parent)).items()
        ids = {name: ids_by_text[text] for name, text in names if text in ids_by_text}
        if "eos_token" not in ids:
            raise ValueError(
                f"{path} must have an EOS token that a file beside it names, got none; add tokenizer_config.json with "
                "its eos_token"
            )
        self.eos_id = ids["eos_token"]
        self.bos_id = ids.get("bos_token", self.eos_id)
        self.pad_id = ids.get("pad_token", -1)
        first = _load(Path(path), whole).encode("a").ids[:1]
        self.adds_bos = first == [ids.get("bos_token")]
        self.more_stop_ids = frozenset()
        self.prefix_id = self.middle_id = self.suffix_id = self.eot_id = self.step_id = None

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        ids = super().encode(s, bos=False, eos=False)
        starts = bos and (self.adds_bos or not ids)
        return [self.bos_id] * bool(starts) + ids + [self.eos_id] * bool(eos)

    def encode_part(self, s: str, *, leading_space: bool = False) -> list[int]:
        ids: list[int] = self._bpe.encode(checked_text(s)).ids
        return ids

    def token_piece(self, t: int) -> str:
        return self._pieces[t]

    def token_bytes(self, t: int, *, at_start: bool = False) -> bytes | None:
        if t in self._added_texts:
            return None if t in self._controls else self._added_texts[t].encode()
        return bytes(_BYTES[char] for char in self._pieces.get(t, ""))

    @cached_property
    def longest_piece(self) -> int:
        return max(map(len, self._pieces.values()))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        return self.added_tokens


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself where it is visible, one above 255 where it is not."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _read(path: Path) -> dict[str, Any]:
    whole = read_json_object(path, _MAX_BYTES)
    model = whole.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE" or not any('"ByteLevel"' in json.dumps(whole.get(part)) for part in ("pre_tokenizer", "decoder")):
        raise ValueError(
            f"{path} must be a byte-level BPE tokenizer, got {quote(kind)} of another form; use the tokenizer.model "
            "that was released with the weights"
        )
    return whole


def _load(path: Path, whole: Mapping[str, Any]) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing_extra("chat", error) from error
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(whole))
    except Exception as error:  # the package has no exception type
        raise ValueError(
            f"{path} must be a tokenizer of the package tokenizers, got one that is damaged ({printable(error)})"
        ) from error
