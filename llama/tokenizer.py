"""Converts text to token ids and back, with the SentencePiece model that is released with the weights.

Any object with `encode`, `decode`, `bos_id` and `eos_id` can stand in for a `Tokenizer`; what else there is on one is
asked for by the functions of this module.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.errors import PromptError as PromptError  # also by this name, as programs import it
from llama.errors import check_link, check_not_pointer, printable, quote, read_json_object

_SPACE = "\u2581"  # LOWER ONE EIGHTH BLOCK, which stands for a space in SentencePiece's pieces
_REPLACEMENT = "\ufffd"
_MARK = "\u263a"  # a character that merges with none after it; a text after it gets no leading space
ADDED_TOKENS_FILES = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")  # Hugging Face's
_MEND_ADDED = f"correct {', '.join(ADDED_TOKENS_FILES)}, or remove them"
_MAX_FILE_SIZE = 2**28  # bytes; the released model has half a million
_EACH_BYTE = "llama-replace-each-byte"
# SentencePiece gives U+FFFD for each byte that is no part of a character, Python's "replace" one for several.
codecs.register_error(_EACH_BYTE, lambda error: (_REPLACEMENT, error.start + 1))  # type: ignore[attr-defined]


class TokenizerNotFoundError(FileNotFoundError, AssertionError):
    """No tokenizer model at the path. It is an AssertionError too, because Meta's package raises that."""


class Tokenizer:
    """SentencePiece with byte fallback, as Llama 2 and Code Llama use it.

    Attributes:
        n_words: number of ids: pieces, control pieces among them, and added tokens.
        bos_id, eos_id: ids that mark the beginning and the end of a sequence.
        pad_id: -1 in the released model, which has no padding piece.
        prefix_id, middle_id, suffix_id, eot_id: ids of Code Llama's infilling prompts; None where there are none.
        step_id: id that ends a message of Code Llama 70B Instruct; None where there is none.
        added_tokens: texts and ids of the tokens beyond the SentencePiece model's.
        more_stop_ids: ids that end a text besides `eos_id`, such as the end of a turn in a fine-tune's chats.

    Raises:
        TokenizerNotFoundError: there is no file at `model_path`; both a FileNotFoundError and an AssertionError.
        OSError: the file cannot be read.
        ValueError: the file is not a SentencePiece model, is damaged, or has no BOS or no EOS piece.
    """

    def __init__(self, model_path: str | Path, *, added_tokens: Mapping[str, int] | None = None) -> None:
        """
        Args:
            added_tokens: names and ids of tokens that a fine-tune added to the model, and of pieces that chat templates
                write by name; None to read them from Hugging Face's files next to the model.
        """
        self.sp_model: Any = _load(Path(model_path))
        n_pieces: int = self.sp_model.vocab_size()
        self.more_stop_ids: frozenset[int] = frozenset()
        if added_tokens is None:
            added_tokens = read_added_tokens(Path(model_path).parent, self.sp_model)
        self._named_tokens = dict(added_tokens)
        self.added_tokens = {text: token for text, token in self._named_tokens.items() if token >= n_pieces}
        self._added_texts = {token: text for text, token in self.added_tokens.items()}
        self.n_words = max([n_pieces - 1, *self._added_texts]) + 1
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{model_path} must have a BOS and an EOS piece, got bos_id={self.bos_id} and eos_id={self.eos_id}; "
                "use the tokenizer.model that was released with the weights"
            )
        infilling = (self._id_of(f"{_SPACE}<{name}>") for name in ("PRE", "MID", "SUF", "EOT"))
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = infilling
        self.step_id = self._id_of("<step>")

    def _id_of(self, piece: str) -> int | None:
        token: int = self.sp_model.piece_to_id(piece)
        return None if token == self.sp_model.unk_id() else token

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Encodes `s`, with BOS in front and EOS at the end if asked for.

        Control pieces in `s` are plain text; an added token is that token.
        """
        first, *parts = split_at(checked_text(s), self.added_tokens)
        ids = self.encode_part(first, leading_space=True)
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            ids += [self.added_tokens[name], *self.encode_part(text)]
        return [self.bos_id] * bool(bos) + ids + [self.eos_id] * bool(eos)

    def encode_part(self, s: str, *, leading_space: bool = False) -> list[int]:
        """Encodes a part of a text, in which the name of any special token is plain text.

        Args:
            leading_space: whether a space goes in front, as SentencePiece does with a whole text.
        """
        mark = "" if leading_space else _MARK
        ids: list[int] = self.sp_model.encode(mark + checked_text(s))
        return ids[len(self.sp_model.encode(mark)) :]

    def encode_infilling(self, s: str) -> list[int]:
        """Encodes `s` without the leading space that `encode` adds."""
        return self.encode_part(s)

    def decode(self, t: Any) -> Any:
        """Decodes ids. Control pieces have no text, and the leading space of the first piece is dropped.

        Args:
            t: a sequence or a tensor of ids, or one id. For a sequence of sequences, returns a list of texts.
        """
        t = t.tolist() if hasattr(t, "tolist") else t
        if self.sp_model is not None and not self.added_tokens:
            return self.sp_model.decode(t)
        if isinstance(t, Sequence) and t and isinstance(t[0], Sequence):
            return [self.decode(ids) for ids in t]
        return "".join(_pieces(StreamDecoder(self), t if isinstance(t, Sequence) else [t]))

    def decode_infilling(self, t: Sequence[int]) -> str:
        """Decodes ids as text that continues another: the leading space of the first piece is kept."""
        return "".join(_pieces(StreamDecoder(self, at_start=False), t))

    def pieces(self, t: Sequence[int]) -> list[str]:
        """Splits `decode(t)` into one string per id.

        A character that consists of several byte pieces is attributed to the last one; the others get "".
        """
        return pieces(self, t)

    def token_piece(self, t: int) -> str:
        """The name of a token in the vocabulary, such as `\u2581The` or `<0x0A>`."""
        piece: str = self._added_texts.get(t) or self.sp_model.id_to_piece(t)
        return piece

    def token_bytes(self, t: int, *, at_start: bool = False) -> bytes | None:
        """The text of one token in UTF-8, which may be a part of a character; None for a control token.

        Args:
            at_start: whether the text begins with the token, so that a leading space of its piece is dropped.
        """
        if t in self._added_texts:
            return self._added_texts[t].encode()
        if self.sp_model.is_control(t):
            return None
        piece = self.token_piece(t)
        if self.sp_model.is_byte(t):
            return bytes([int(piece[3:5], 16)])  # a piece such as <0xE2>
        if self.sp_model.is_unknown(t):
            return " \u2047 ".encode()
        return piece.removeprefix(_SPACE if at_start else "").replace(_SPACE, " ").encode()

    @cached_property
    def longest_piece(self) -> int:
        """Number of characters of the longest piece; no token has a longer text."""
        return max(map(len, [*self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size()))), *self.added_tokens]))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of the tokens that a chat template writes by name: control pieces and added tokens."""
        sp = self.sp_model
        control = [i for i in range(sp.vocab_size()) if sp.is_control(i) or sp.is_unknown(i)]
        return {self.token_piece(i): i for i in control} | self._named_tokens


def checked_text(s: str) -> str:
    """Returns the text; raises PromptError for one that cannot be encoded."""
    if not isinstance(s, str):
        raise PromptError(f"text must be a str, got {type(s).__name__}")
    try:
        s.encode()
    except UnicodeEncodeError as error:
        found = f"{quote(s[error.start])} at position {error.start}"
        raise PromptError(f"text must be valid Unicode, without unpaired surrogates, got {found}") from error
    return s


def split_at(text: str, names: Iterable[str]) -> list[str]:
    """Splits a text at each of some names, the longest first: text, name, text, ..., text."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]


def read_added_tokens(folder: Path, sp_model: SentencePieceProcessor) -> dict[str, int]:
    """Names and ids of the tokens that a folder's `added_tokens.json`, `tokenizer_config.json` and
    `special_tokens_map.json` list, apart from pieces that have this name and id. {} if there are no such files.

    Special tokens without an id get the next ones, in the order in which they are listed.

    Raises:
        ValueError: a file is damaged, or the ids do not continue those of the pieces.
    """
    found = [read_json_object(folder / name) if (folder / name).is_file() else {} for name in ADDED_TOKENS_FILES]
    by_name, settings, special = found
    described = settings.get("added_tokens_decoder")
    for token, options in described.items() if isinstance(described, dict) else ():
        name = options.get("content") if isinstance(options, dict) else ""
        by_name[str(name)] = int(token) if token.isdecimal() else -1
    n_pieces: int = sp_model.vocab_size()
    if wrong := [name for name, token in by_name.items() if not name or type(token) is not int or token < 0]:
        raise ValueError(f"{folder}: added tokens must have a name and an id, got {quote(wrong[0])}; {_MEND_ADDED}")
    for name in _special_names(settings) + _special_names(special):
        if sp_model.id_to_piece(sp_model.piece_to_id(name)) != name and name not in by_name:
            by_name[name] = max([n_pieces - 1, *by_name.values()]) + 1
    added = {k: i for k, i in by_name.items() if i >= n_pieces or sp_model.id_to_piece(i) != k}
    beyond = sorted(token for token in added.values() if token >= n_pieces)
    if beyond != list(range(n_pieces, n_pieces + len(beyond))):
        raise ValueError(
            f"{folder}: added tokens must have the ids that follow the pieces', from {n_pieces} on, each once, "
            f"got {quote(beyond)}; {_MEND_ADDED}"
        )
    return added


def _special_names(settings: Mapping[str, Any]) -> list[str]:
    """The names of special tokens in one of these files, such as the values of `bos_token`."""
    fields = [value for field, value in settings.items() if field.endswith(("_token", "_tokens"))]
    tokens = chain.from_iterable(value if isinstance(value, list) else [value] for value in fields)
    names = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return [name for name in names if isinstance(name, str) and name]


def _load(path: Path) -> SentencePieceProcessor:
    """Loads a SentencePiece model, and checks that the text of every piece can be decoded."""
    check_link(path)
    if not path.is_file():
        raise TokenizerNotFoundError(f"tokenizer_path must be a tokenizer.model file, got {path}, which is not a file")
    if (size := path.stat().st_size) > _MAX_FILE_SIZE:
        raise ValueError(f"{path} must be a SentencePiece model, got a file of {size} bytes; is it a checkpoint?")
    check_not_pointer(path)
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

    Attributes:
        at_start: whether there is no token with text yet.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_EACH_BYTE)
        self.at_start = at_start

    def push(self, token: int) -> str:
        """Adds an id; returns the text that is now final, which may be empty."""
        data = self._token_bytes(token, at_start=self.at_start)
        if data is None:
            return self.flush()
        self.at_start = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Returns the text still held back, with U+FFFD for each byte that is not part of a character."""
        return self._utf8.decode(b"", final=True)


class _WholeDecoder:
    """Decodes ids one at a time with a function that decodes all of them, as a `StreamDecoder` does.

    For tokenizers of other classes, and for a replaced `decode`. U+FFFD at the end of a text is held back, as it may
    be the beginning of a character.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._text = ""  # all that was returned

    @property
    def at_start(self) -> bool:
        return not self._text

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._rest_of(self._decode(self._ids).rstrip(_REPLACEMENT))

    def flush(self) -> str:
        return self._rest_of(self._decode(self._ids)) if self._ids else ""

    def _rest_of(self, text: str) -> str:
        new = text[len(self._text) :]
        self._text += new
        return new


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that end a text, of a tokenizer of any class."""
    return frozenset({tokenizer.eos_id}) | getattr(tokenizer, "more_stop_ids", frozenset())


def stream_decoder(tokenizer: Any, *, at_start: bool = True) -> StreamDecoder | _WholeDecoder:
    """Returns a decoder for a tokenizer of any class; joined, its texts are what the tokenizer's `decode` returns.

    Args:
        at_start: False for text that continues another, as `decode_infilling` decodes it.
    """
    name = "decode" if at_start else "decode_infilling"
    decode = getattr(tokenizer, name, None) or tokenizer.decode
    if getattr(decode, "__func__", None) is vars(Tokenizer)[name] and decode.__self__ is tokenizer:
        return StreamDecoder(tokenizer, at_start=at_start)
    return _WholeDecoder(decode)


def pieces(tokenizer: Any, t: Sequence[int]) -> list[str]:
    """Splits the text of ids into one string per id, with a tokenizer of any class: see `Tokenizer.pieces`."""
    return _pieces(stream_decoder(tokenizer), t)


def _pieces(decoder: StreamDecoder | _WholeDecoder, t: Sequence[int]) -> list[str]:
    texts = [decoder.push(token) for token in t]
    if texts:
        texts[-1] += decoder.flush()
    return texts


class IncrementalDetokenizer:
    """Decodes a completion one id at a time, and ends it before a stop string.

    The concatenated return values of `push` and of a final `finish` are the completion's text. Text that could still
    become a stop string is held back.

    Args:
        tokenizer: any object with `decode`.
        stop: stop strings; none may be empty.
        prefix: ids before the completion, which are not searched for stop strings. With some, the leading space of the
            completion's first piece is kept.
        at_start: False to keep that space without a prefix, as in infilling.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), prefix: Sequence[int] = (), *, at_start: bool = True
    ) -> None:
        self._given = tokenizer, tuple(stop), prefix, at_start
        self._decoder = stream_decoder(tokenizer, at_start=at_start)
        self._stop = tuple(stop)
        self._held = ""
        self.prefix_starts: list[bool] = []  # for each prefix token, whether the text begins with it
        self.prefix_pieces: list[str] = []  # the text of each prefix token
        for token in prefix:
            self.prefix_starts.append(self.at_start)
            self.prefix_pieces.append(self._decoder.push(token))
        self.pieces: list[str] = []  # the text of each pushed token, up to a stop string
        self.stopped = False  # whether a stop string was found

    @property
    def at_start(self) -> bool:
        """Whether no token so far has text, so that the next one begins the text."""
        return self._decoder.at_start

    def restarted(self) -> IncrementalDetokenizer:
        """Returns another one, as it was before the first `push`."""
        tokenizer, stop, prefix, at_start = self._given
        return IncrementalDetokenizer(tokenizer, stop, prefix, at_start=at_start)

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
        end = len(held)
        if found := [held.find(stop) for stop in self._stop if stop in held]:
            self.stopped = True
            end = min(found)
            self._cut(len(held) - end)
        elif not final:
            may_stop = (i for i in range(len(held)) if any(stop.startswith(held[i:]) for stop in self._stop))
            end = next(may_stop, end)
        self._held = held[end:]
        return held[:end]

    def _cut(self, n_chars: int) -> None:
        """Removes the last `n_chars` characters of `pieces`, and any empty pieces that are then last."""
        while n_chars or (self.pieces and not self.pieces[-1]):
            piece = self.pieces.pop()
            kept = max(0, len(piece) - n_chars)
            n_chars -= len(piece) - kept
            if kept:
                self.pieces.append(piece[:kept])
