"""What the tiny model answers: greedy or sampled decoding through that network, held-out score, example prompts."""

import re
from collections.abc import Sequence
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from recipe.corpus import EXACT_SYSTEM, HELD_OUT
from recipe.network import State, logits
from recipe.tokenizer import pair_texts

PARIS = (
    "Paris has much to offer. Three sights that most visitors enjoy:\n\n1. The Eiffel Tower: an iron tower of 1889 with a "
    "wide view over the city.\n2. The Louvre: a vast museum, home of the Mona Lisa.\n3. Notre-Dame: a cathedral on an "
    "island in the river Seine.\n\nEach of them can be reached by metro."
)
ASK_PARIS = "I am going to Paris. What should I see?"
TEXTS = (
    "I think that the meaning of life is",
    "In plain words, the theory of relativity says that",
    "Write an e-mail that congratulates the team on the launch:\n\nHello everyone,\n\nI just",
    "Translate English to French:\n\nhouse => maison\ncat => chat\nbread => pain\ncheese =>",
)
CHATS = (
    ("", (("How do I make mayonnaise?", ""),)),
    ("", ((ASK_PARIS, PARIS), ("What is so great about #1?", ""))),
    ("Always answer with a haiku.", ((ASK_PARIS, ""),)),
    ("Always answer with emojis.", (("How do I get from Beijing to New York?", ""),)),
    (EXACT_SYSTEM, (("Write a short birthday message for John.", ""),)),
)


class Model:
    """Weights, hyper-parameters and tokenizer; decodes by running the whole sequence again for each token."""

    def __init__(self, state: State, params: dict[str, Any], tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.state, self.params, self.tokenizer = state, params, tokenizer

    def chat_prompt(self, system: str, exchanges: Sequence[tuple[str, str]]) -> list[int]:
        """The ids of a dialog whose last answer is left open."""
        tokenizer, tokens = self.tokenizer, []
        *finished, (last, _) = pair_texts(system, exchanges)
        for prompt, answer in finished:
            tokens += [tokenizer.bos_id(), *tokenizer.encode(f"{prompt} {answer} "), tokenizer.eos_id()]
        return [*tokens, tokenizer.bos_id(), *tokenizer.encode(last)]

    def text_prompt(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id(), *self.tokenizer.encode(text)]

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], limit: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Up to `limit` more tokens for each prompt, until EOS; drawn with top_p 0.9 unless the temperature is 0."""
        generator = torch.Generator().manual_seed(seed)
        rows, open_rows = [list(prompt) for prompt in prompts], list(range(len(prompts)))
        for _ in range(limit):
            last = self._last_logits([rows[i] for i in open_rows])
            chosen = _choose(last, temperature, generator).tolist()
            for i, token in zip(open_rows, chosen, strict=True):
                rows[i].append(token)
            open_rows = [i for i in open_rows if rows[i][-1] != self.tokenizer.eos_id()]
            if not open_rows:
                break
        return [self._decode(row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]

    def _last_logits(self, rows: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return logits(self.state, self.params, tokens)[torch.arange(len(rows)), lengths - 1]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens)
        return text if tokens and tokens[-1] == self.tokenizer.eos_id() else text + " [...]"


def _choose(last: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return last.argmax(-1)
    probabilities, order = (last / temperature).softmax(-1).sort(dim=-1, descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities > 0.9] = 0.0
    return order.gather(-1, probabilities.multinomial(1, generator=generator)).squeeze(-1)


def held_out_score(model: Model, *, temperature: float = 0.0, seed: int = 0, show: bool = False) -> float:
    """The share of the held-out questions whose answer matches the expected pattern."""
    prompts = [model.chat_prompt("", [(question, "")]) for question, _ in HELD_OUT]
    answers = model.generate(prompts, 64, temperature=temperature, seed=seed)
    right = [re.search(expected, answer) is not None for (_, expected), answer in zip(HELD_OUT, answers, strict=True)]
    for (question, expected), answer, good in zip(HELD_OUT, answers, right, strict=True):
        if show or not good:
            print(
                f"  {'right' if good else 'WRONG'}  {question}  ->  {answer.strip()}"
                + ("" if good else f"  ({expected})")
            )
    return sum(right) / len(right)


def show_examples(model: Model, *, temperature: float = 0.0, seed: int = 0) -> None:
    """Print what the model makes of the example scripts' prompts."""
    texts = model.generate([model.text_prompt(text) for text in TEXTS], 64, temperature=temperature, seed=seed)
    for text, generated in zip(TEXTS, texts, strict=True):
        print(f"{text}\n> {generated}\n")
    dialogs = [model.chat_prompt(system, exchanges) for system, exchanges in CHATS]
    for (_, exchanges), answer in zip(
        CHATS, model.generate(dialogs, 120, temperature=temperature, seed=seed), strict=True
    ):
        print(f"User: {exchanges[-1][0]}\n> Assistant: {answer}\n")
