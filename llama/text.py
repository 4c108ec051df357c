"""The text of a completion while it grows: characters as they settle, and stop strings.

Knows nothing of how the tokens come about.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama.tokenizer import StreamDecoder, Tokenizer


class GrowingText:
    """Token ids in, settled text out; ends before the first stop string.

    What `push` and the final `finish` return, joined, is the completion's text. No part of a stop string comes out:
    text that could still become one waits.

    Attributes:
        prefix_pieces: the text of each prefix token.
        pieces: the text of each pushed token, cut at a stop string; tokens that lie behind the cut have none.
        stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prefix: Sequence[int] = ()) -> None:
        """
        Args:
            prefix: ids that stand before the completion, without being searched for stop strings. They decide whether
                the completion's first space is kept.
        """
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.prefix_pieces = [self._decoder.push(token) for token in prefix]
        self.pieces: list[str] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this id settles."""
        piece = self._decoder.push(token)
        self.pieces.append(piece)
        return self._settle(piece, final=False)

    def finish(self) -> str:
        """The text still held back, once no id follows."""
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
        """Length of the longest end of `text` with which a stop string could begin."""
        longest = min(len(text), max(map(len, self._stop), default=0))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        return next(ends, 0)

    def _cut(self, n_chars: int) -> None:
        """Takes characters off the end of the pieces, and the tokens of their first bytes, which have no text."""
        while n_chars or (self.pieces and not self.pieces[-1]):
            piece = self.pieces.pop()
            kept = max(0, len(piece) - n_chars)
            n_chars -= len(piece) - kept
            if kept:
                self.pieces.append(piece[:kept])
