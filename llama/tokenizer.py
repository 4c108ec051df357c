"""Text to token ids and back, with the SentencePiece model that is released beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.quoting import printable, quote

_SPACE = "\u2581"  # SentencePiece writes a space as LOWER ONE EIGHTH BLOCK
_REPLACEMENT = "\ufffd"
_MAX_FILE_SIZE = 2**28  # bytes; the released model has half a million


class PromptError(ValueError, AssertionError):
    """A prompt or an argument that a call does not take. Where Meta's package raises, it is an AssertionError."""


class TokenizerNotFoundError(FileNotFoundError, AssertionError):
    """There is no tokenizer model at the path. Meta's package raises AssertionError."""


class Tokenizer:
    """SentencePiece with byte fallback, as Llama 2 uses it.

    Attributes:
        n_words: number of pieces, control pieces included.
        bos_id, eos_id: begin and end of a sequence.
        pad_id: -1 in the released model, which has no padding piece.

    Raises:
        FileNotFoundError: there is no file at `model_path`. It is an AssertionError too, as in Meta's package.
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
                f"{model_path} must have a BOS and an EOS piece, as Llama's tokenizers have, got bos_id={self.bos_id} "
                f"and eos_id={self.eos_id}"
            )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, with BOS in front and EOS behind if asked for. Control pieces in `s` stay plain text."""
        if not isinstance(s, str):
            raise PromptError(f"text must be a str, got {type(s).__name__}")
        try:
            s.encode()
        except UnicodeEncodeError as error:
            found = f"{quote(s[error.start])} at position {error.start}"
            raise PromptError(f"text must be without halves of surrogate pairs, got {found}") from error
        ids: list[int] = self.sp_model.encode(s)
        return [self.bos_id] * bool(bos) + ids + [self.eos_id] * bool(eos)

    def decode(self, t: Any) -> Any:
        """The text of ids; control pieces give none, and the first piece's leading space is dropped.

        Args:
            t: a sequence or a tensor of ids, or one id. A sequence of sequences gives a list of texts.
        """
        return self.sp_model.decode(t.tolist() if hasattr(t, "tolist") else t)

    def pieces(self, t: Sequence[int]) -> list[str]:
        """The part of `decode(t)` that each id brings: as many strings as ids, which joined give that text.

        A character made of several byte pieces belongs to the last of them; the others get "".
        """
        decoder = StreamDecoder(self)
        texts = [decoder.push(token) for token in t]
        if texts:
            texts[-1] += decoder.flush()
        return texts


def _load(path: Path) -> SentencePieceProcessor:
    """The SentencePiece model in a file, with every piece's text checked."""
    if not path.is_file():
        raise TokenizerNotFoundError(f"tokenizer_path must be a tokenizer.model file, got {path}, where there is none")
    if (size := path.stat().st_size) > _MAX_FILE_SIZE:
        raise ValueError(f"{path} must be a SentencePiece model, got a file of {size} bytes; is it a checkpoint?")
    try:
        sp_model = SentencePieceProcessor()
        sp_model.LoadFromSerializedProto(path.read_bytes())
        sp_model.id_to_piece(list(range(sp_model.vocab_size())))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be a SentencePiece model, got a file that is damaged, cut short or something else "
            f"({printable(error)})"
        ) from error
    return sp_model


class StreamDecoder:
    """Decodes ids one by one: what `push` and the final `flush` return, joined, is `Tokenizer.decode` of all ids.

    Text is returned as soon as it is final: bytes that could still become a character wait for the next ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sp = tokenizer.sp_model
        self._bytes = b""
        self._at_start = True

    def push(self, token: int) -> str:
        """The text that this id makes final; often a word, sometimes nothing."""
        if self._sp.is_byte(token):
            self._at_start = False
            self._bytes += bytes([int(self._sp.id_to_piece(token)[3:5], 16)])  # a piece such as <0xE2>
            return self._settle(final=False)
        if self._sp.is_control(token):
            return self.flush()
        text = self.flush() + self._text(token)
        self._at_start = False
        return text

    def flush(self) -> str:
        """What is still held back, with U+FFFD for each byte that is part of no character."""
        return self._settle(final=True)

    def _text(self, token: int) -> str:
        if self._sp.is_unknown(token):
            return " \u2047 "
        text: str = self._sp.id_to_piece(token).replace(_SPACE, " ")
        return text[1:] if self._at_start and text.startswith(" ") else text

    def _settle(self, *, final: bool) -> str:
        """Takes whole characters off the held bytes, and U+FFFD for each byte that cannot begin one."""
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
    """An incremental detokenizer: takes token ids, returns the text that is final, and ends before a stop string.

    What `push` and the final `finish` return, joined, is the completion's text. It never contains a part of a stop
    string: text that could still become one is held back.

    Attributes:
        prefix_pieces: the text of each prefix token.
        pieces: the text of each pushed token, cut at a stop string; tokens after the cut have none.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prefix: Sequence[int] = ()) -> None:
        """
        Args:
            prefix: ids before the completion, which are not searched for stop strings. After them, the leading space
                of the completion's first piece is kept.
        """
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.prefix_pieces = [self._decoder.push(token) for token in prefix]
        self.pieces: list[str] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this id makes final."""
        piece = self._decoder.push(token)
        self.pieces.append(piece)
        return self._settle(piece, final=False)

    def finish(self) -> str:
        """The text still held back, to be called when no id follows."""
        if self.stopped:
            return ""
        rest = self._decoder.flush()
        if not self.pieces:
            self.prefix_pieces[-1:] = [piece + rest for piece in self.prefix_pieces[-1:]]
            return rest
        self.pieces[-1] += rest
        return self._settle(rest, final=True)

    def _settle(self, text: str, *, final: bool) -> str:
        held = self._held + text
        starts = [start for stop in self._stop if (start := held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            self._cut(len(held) - min(starts))
            settled = held[: min(starts)]
        else:
            settled = held if final else held[: len(held) - self._possible_stop(held)]
        self._held = held[len(settled) :]
        return settled

    def _possible_stop(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=0))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        return next(ends, 0)

    def _cut(self, n_chars: int) -> None:
        """Removes characters from the end of the pieces, and the tokens of their first bytes, which have no text."""
        while n_chars or (self.pieces and not self.pieces[-1]):
            piece = self.pieces.pop()
            kept = max(0, len(piece) - n_chars)
            n_chars -= len(piece) - kept
            if kept:
                self.pieces.append(piece[:kept])
