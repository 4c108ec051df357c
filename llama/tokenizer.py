"""Text to token ids and back, by the SentencePiece model that is released beside the weights.

Knows nothing of chats, batches or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

_SPACE = "\u2581"  # SentencePiece writes a space as LOWER ONE EIGHTH BLOCK
_REPLACEMENT = "\ufffd"


class PromptError(ValueError, AssertionError):
    """A prompt or an argument that a call does not take. Where Meta's package raises, it is an AssertionError."""


class Tokenizer:
    """SentencePiece with byte fallback, as Llama 2 uses it.

    Attributes:
        n_words: number of pieces, control pieces included.
        bos_id, eos_id: begin and end of a sequence.
        pad_id: -1 in the released model, which has no padding piece.

    Raises:
        FileNotFoundError: there is no file at `model_path`.
        ValueError: the file is not a SentencePiece model.
    """

    def __init__(self, model_path: str | Path) -> None:
        if not Path(model_path).is_file():
            raise FileNotFoundError(f"no tokenizer model at {model_path}; give the path of a tokenizer.model file")
        try:
            self.sp_model = SentencePieceProcessor(model_file=str(model_path))
        except RuntimeError as error:
            raise ValueError(f"{model_path} is not a SentencePiece model ({error}); is it cut short?") from error
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, with BOS in front and EOS behind where asked. Control pieces in `s` stay plain text."""
        if not isinstance(s, str):
            raise ValueError(f"text to encode is a {type(s).__name__}; it takes a str")
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text to encode is not Unicode: it has half of a surrogate pair ({error})") from error
        ids: list[int] = self.sp_model.encode(s)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int]) -> str:
        """The text of the ids; control pieces give none, and the first piece's leading space is dropped."""
        text: str = self.sp_model.decode(list(t))
        return text

    def pieces(self, t: Sequence[int]) -> list[str]:
        """Each id's own share of `decode(t)`: as many strings as ids, which joined give that text.

        A character spread over several byte pieces belongs to the last of them; the others get "".
        """
        decoder = StreamDecoder(self)
        texts = [decoder.push(token) for token in t]
        if texts:
            texts[-1] += decoder.flush()
        return texts


class StreamDecoder:
    """Decodes ids one by one: what `push` and the final `flush` return, joined, is `Tokenizer.decode` of all ids.

    Text comes out as soon as it is settled: bytes that could still become a character wait for the next ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sp = tokenizer.sp_model
        self._bytes = b""
        self._at_start = True

    def push(self, token: int) -> str:
        """The text that this id settles; often a word, sometimes nothing."""
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
        """What is still held back, with U+FFFD for each byte that no character came of."""
        return self._settle(final=True)

    def _text(self, token: int) -> str:
        if self._sp.is_unknown(token):
            return " \u2047 "
        text: str = self._sp.id_to_piece(token).replace(_SPACE, " ")
        return text[1:] if self._at_start and text.startswith(" ") else text

    def _settle(self, *, final: bool) -> str:
        """Takes whole characters, and bytes that cannot begin one, off the held bytes (one U+FFFD a bad byte)."""
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
