"""Incremental detokenizing: the text of a completion while its tokens arrive, and stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence

from llama.tokenizer import StreamDecoder, Tokenizer


class GrowingText:
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
