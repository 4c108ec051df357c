"""Converts text to token ids and back, with the SentencePiece model that is released with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.errors import PromptError as PromptError  # also by this name, as programs import it
from llama.errors import printable, quote

_SPACE = "\u2581"  # LOWER ONE EIGHTH BLOCK, which stands for a space in SentencePiece's pieces
_REPLACEMENT = "\ufffd"
_MAX_FILE_SIZE = 2**28  # bytes; the released model has half a million


class TokenizerNotFoundError(FileNotFoundError, AssertionError):
    """No tokenizer model at the path. It is an AssertionError too, because Meta's package raises that."""


class Tokenizer:
    """SentencePiece with byte fallback, as Llama 2 uses it.

    Attributes:
        n_words: number of pieces, including control pieces.
        bos_id, eos_id: ids that mark the beginning and the end of a sequence.
        pad_id: -1 in the released model, which has no padding piece.

    Raises:
        TokenizerNotFoundError: there is no file at `model_path`; both a FileNotFoundError and an AssertionError.
        OSError: the file cannot be read.
        ValueError: the file is not a SentencePiece model, is damaged, or has no BOS or no EOS piece.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.sp_model = _load(Path(model_path))
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{model_path} must have a BOS and an EOS piece, got bos_id={self.bos_id} and eos_id={self.eos_id}; "
                "use the tokenizer.model that was released with the weights"
            )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Encodes `s`, with BOS in front and EOS at the end if asked for. Control pieces in `s` are plain text."""
        if not isinstance(s, str):
            raise PromptError(f"text must be a str, got {type(s).__name__}")
        try:
            s.encode()
        except UnicodeEncodeError as error:
            found = f"{quote(s[error.start])} at position {error.start}"
            raise PromptError(f"text must be valid Unicode, without unpaired surrogates, got {found}") from error
        ids: list[int] = self.sp_model.encode(s)
        return [self.bos_id] * bool(bos) + ids + [self.eos_id] * bool(eos)

    def decode(self, t: Any) -> Any:
        """Decodes ids. Control pieces have no text, and the leading space of the first piece is dropped.

        Args:
            t: a sequence or a tensor of ids, or one id. For a sequence of sequences, returns a list of texts.
        """
        return self.sp_model.decode(t.tolist() if hasattr(t, "tolist") else t)

    def pieces(self, t: Sequence[int]) -> list[str]:
        """Splits `decode(t)` into one string per id.

        A character that consists of several byte pieces is attributed to the last one; the others get "".
        """
        decoder = StreamDecoder(self)
        texts = [decoder.push(token) for token in t]
        if texts:
            texts[-1] += decoder.flush()
        return texts


def _load(path: Path) -> SentencePieceProcessor:
    """Loads a SentencePiece model, and checks that the text of every piece can be decoded."""
    if not path.is_file():
        raise TokenizerNotFoundError(f"tokenizer_path must be a tokenizer.model file, got {path}, which is not a file")
    if (size := path.stat().st_size) > _MAX_FILE_SIZE:
        raise ValueError(f"{path} must be a SentencePiece model, got a file of {size} bytes; is it a checkpoint?")
    try:
        sp_model = SentencePieceProcessor()
        sp_model.LoadFromSerializedProto(path.read_bytes())
        sp_model.id_to_piece(list(range(sp_model.vocab_size())))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be a SentencePiece model, got a file that is damaged, truncated or in another format "
            f"({printable(error)})"
        ) from error
    return sp_model


class StreamDecoder:
    """Decodes ids one at a time.

    Text is returned as soon as it is final; bytes of an incomplete character are held back. The concatenated return
    values of `push` and of a final `flush` equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sp = tokenizer.sp_model
        self._bytes = b""
        self._at_start = True

    def push(self, token: int) -> str:
        """Adds an id; returns the text that is now final, which may be empty."""
        if self._sp.is_byte(token):
            self._at_start = False
            self._bytes += bytes([int(self._sp.id_to_piece(token)[3:5], 16)])  # a piece such as <0xE2>
            return self._decode_bytes(final=False)
        if self._sp.is_control(token):
            return self.flush()
        text = self.flush() + self._text(token)
        self._at_start = False
        return text

    def flush(self) -> str:
        """Returns the text still held back, with U+FFFD for each byte that is not part of a character."""
        return self._decode_bytes(final=True)

    def _text(self, token: int) -> str:
        if self._sp.is_unknown(token):
            return " \u2047 "
        text: str = self._sp.id_to_piece(token).replace(_SPACE, " ")
        return text[1:] if self._at_start and text.startswith(" ") else text

    def _decode_bytes(self, *, final: bool) -> str:
        """Removes complete characters from the held bytes; a byte that cannot start a character gives U+FFFD."""
        text = ""
        while self._bytes:
            try:
                whole, length = self._bytes.decode(), len(self._bytes)
            except UnicodeDecodeError as error:
                if error.start:
                    whole, length = self._bytes[: error.start].decode(), error.start
                elif error.reason == "unexpected end of data" and not final:
                    break
                else:
                    whole, length = _REPLACEMENT, 1
            text += whole
            self._bytes = self._bytes[length:]
        return text


class IncrementalDetokenizer:
    """Decodes a completion one id at a time, and ends it before a stop string.

    The concatenated return values of `push` and of a final `finish` are the completion's text. Text that could still
    become a stop string is held back.

    Attributes:
        prefix_pieces: the text of each prefix token.
        pieces: the text of each pushed token, up to the stop string; tokens after that have no entry.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prefix: Sequence[int] = ()) -> None:
        """
        Args:
            stop: stop strings; none may be empty.
            prefix: ids before the completion. They are not searched for stop strings; if there are any, the leading
                space of the completion's first piece is kept.
        """
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.prefix_pieces = [self._decoder.push(token) for token in prefix]
        self.pieces: list[str] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds an id; returns the text that is now final, which may be empty."""
        piece = self._decoder.push(token)
        self.pieces.append(piece)
        return self._release(piece, final=False)

    def finish(self) -> str:
        """Returns the text still held back. To be called after the last id."""
        if self.stopped:
            return ""
        rest = self._decoder.flush()
        if not self.pieces:
            self.prefix_pieces[-1:] = [piece + rest for piece in self.prefix_pieces[-1:]]
            return rest
        self.pieces[-1] += rest
        return self._release(rest, final=True)

    def _release(self, text: str, *, final: bool) -> str:
        """Adds text to what is held back; returns the part that cannot become a stop string any more."""
        held = self._held + text
        starts = [start for stop in self._stop if (start := held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            self._cut(len(held) - min(starts))
            released = held[: min(starts)]
        else:
            released = held if final else held[: len(held) - self._possible_stop(held)]
        self._held = held[len(released) :]
        return released

    def _possible_stop(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=0))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        return next(ends, 0)

    def _cut(self, n_chars: int) -> None:
        """Removes the last `n_chars` characters of `pieces`, and any empty pieces that are then last."""
        while n_chars or (self.pieces and not self.pieces[-1]):
            piece = self.pieces.pop()
            kept = max(0, len(piece) - n_chars)
            n_chars -= len(piece) - kept
            if kept:
                self.pieces.append(piece[:kept])
