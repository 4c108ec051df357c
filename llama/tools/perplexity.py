"""The perplexity of a text under a checkpoint: `llama perplexity --text FILE`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama import Llama
from llama.distributed.groups import is_first_rank
from llama.errors import quote
from llama.tokenizer import Tokenizer
from llama.tools import commandline


def windows(tokens: Sequence[int], size: int, stride: int, bos_id: int) -> Iterator[tuple[list[int], int]]:
    """Overlapping windows of a text that together score each token once.

    Every window is BOS and up to `size - 1` tokens; the first scores all of them, each later one the up to `stride`
    tokens that are new in it, so that these have at least `size - 1 - stride` tokens before them.

    Yields:
        A window, and how many tokens at its end are to be scored.
    """
    scored = 0
    while scored < len(tokens):
        end = min(len(tokens), scored + (stride if scored else size - 1))
        yield [bos_id, *tokens[max(0, end - (size - 1)) : end]], end - scored
        scored = end


def perplexity(llama: Llama, text: str, *, stride: int | None = None) -> tuple[float, int]:
    """exp of the mean negative log-probability of a text's tokens, over windows of `max_seq_len`.

    Args:
        stride: number of tokens from one window to the next, up to `max_seq_len - 1`; None: half of `max_seq_len`.
            A smaller stride gives each token more context and takes longer.

    Returns:
        The perplexity, and the number of tokens.
    """
    cut = _cut(text, stride, llama.tokenizer, llama.model.params.max_seq_len)
    scores = llama.score_tokens([window for window, _ in cut])
    total = math.fsum(logprob for row, (_, n) in zip(scores, cut, strict=True) for logprob in row[-n:])
    n_tokens = sum(n for _, n in cut)
    return math.exp(-total / n_tokens), n_tokens


def _cut(text: str, stride: int | None, tokenizer: Tokenizer, max_seq_len: int) -> list[tuple[list[int], int]]:
    """The windows of a text; see `windows`."""
    stride = max(1, max_seq_len // 2) if stride is None else stride
    if type(stride) is not int or not 1 <= stride < max_seq_len:
        raise ValueError(f"stride must be from 1 to {max_seq_len - 1}, one less than max_seq_len, got {quote(stride)}")
    tokens = tokenizer.encode(text, bos=False, eos=False)
    if not tokens:
        raise ValueError("the text must have at least one token, got an empty text")
    return list(windows(tokens, max_seq_len, stride, tokenizer.bos_id))


@commandline.with_build_flags
def main(
    text: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    stride: int | None = None,
    **build: Any,
) -> None:
    """Print the perplexity of a text file.

    Args:
        text: path of a text file in UTF-8.
        ckpt_dir: folder of params.json and consolidated.NN.pth; by default the toy one.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        max_seq_len: size of the windows.
        max_batch_size: maximum number of windows that are scored at a time.
        stride: number of tokens from one window to the next; by default half of max_seq_len.
    """
    content = Path(text).read_text(encoding="utf-8")
    paths = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    commandline.check_prompts(partial(_cut, content, stride), *paths, max_seq_len)
    llama = Llama.build(*paths, max_seq_len, max_batch_size, **build)
    value, n_tokens = perplexity(llama, content, stride=stride)
    if is_first_rank():
        print(f"perplexity {value:.4f} over {n_tokens} tokens, windows of {max_seq_len}")


if __name__ == "__main__":
    commandline.run(main, name="llama perplexity")
