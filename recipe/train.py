"""Make `tiny-llama/` from nothing: write the corpus, train tokenizer and network, save, and score it.

    python -m recipe.train --output_dir tiny-llama

The network is that of `recipe/network.py`, in bfloat16 matrix products over float32 weights. Everything is seeded.
"""

import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.tools.commandline import run
from recipe.corpus import Document, documents
from recipe.evaluate import evaluate
from recipe.network import Params, State, hidden, shapes
from recipe.tokenizer import Example, encode_document, train_tokenizer

PARAMS: Params = {"dim": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "vocab_size": -1}
PARAMS |= {"multiple_of": 32, "ffn_dim_multiplier": 0.5625, "norm_eps": 1e-5}
CONTEXT = 512
TOKENS_PER_STEP = 2048
TOKENIZER_DOCUMENTS = 40_000
SETTLING_DOCUMENTS = 15_000
LEARNING_RATE, SETTLING_RATE = 3e-3, 6e-4
IGNORED = -100


def initial_state(params: Params, seed: int) -> State:
    """Small normal weights; what adds to the residual stream starts smaller the deeper the network is."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(params).items():
        scale = 0.02 if name in ("tok_embeddings.weight", "output.weight") else shape[-1] ** -0.5
        if name.endswith(("wo.weight", "w2.weight")):
            scale /= math.sqrt(2 * params["n_layers"])
        state[name] = torch.ones(shape) if len(shape) == 1 else scale * torch.randn(shape, generator=generator)
    return {name: weight.requires_grad_() for name, weight in state.items()}


def batches(examples: list[Example], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples once, in random order, as (tokens, targets) with about TOKENS_PER_STEP to a batch.

    Lengths are rounded up to a multiple of 16, and each has its own number of rows: few shapes, each prepared once.
    """
    waiting: dict[int, list[Example]] = {}
    for example in random.Random(seed).sample(examples, len(examples)):
        length = -(-len(example[0]) // 16) * 16
        group = waiting.setdefault(length, [])
        group.append(example)
        if len(group) == max(1, TOKENS_PER_STEP // length):
            yield _padded(waiting.pop(length), length)
    yield from (_padded(group, length) for length, group in waiting.items())


def _padded(group: list[Example], length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(len(group), length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for row, (ids, learnt) in enumerate(group):
        tokens[row, : len(ids)] = torch.tensor(ids)
        targets[row, : len(ids) - 1] = torch.where(torch.tensor(learnt), torch.tensor(ids), IGNORED)[1:]
    return tokens, targets


def loss_of(state: State, params: Params, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the targets; their rows alone are projected to the vocabulary, in multiples of 128."""
    chosen = (targets.flatten() != IGNORED).nonzero().squeeze(-1)
    chosen = F.pad(chosen, (0, -len(chosen) % 128), value=targets.numel() - 1)  # the last position is never a target
    with torch.autocast("cpu", torch.bfloat16):
        rows = hidden(state, params, tokens).flatten(0, 1)[chosen]
        predicted = F.linear(rows, state["output.weight"]).float()
    return F.cross_entropy(predicted, targets.flatten()[chosen], ignore_index=IGNORED)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over the first 3 %, then a cosine to 2 % of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def train(state: State, params: Params, examples: list[Example], peak: float, seed: int) -> None:
    """One pass over the examples; the weights are changed in place."""
    matrices, norms = ([w for w in state.values() if w.dim() == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    steps = sum(1 for _ in batches(examples, seed))
    started, mean_loss = time.monotonic(), 0.0
    for step, (tokens, targets) in enumerate(batches(examples, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, peak)
        loss = loss_of(state, params, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {mean_loss:.4f}  {time.monotonic() - started:.0f} s", flush=True)


def encode_corpus(corpus: list[Document], tokenizer: sentencepiece.SentencePieceProcessor) -> list[Example]:
    """The corpus as ids; the few documents that are longer than the context are left out."""
    examples = [encode_document(tokenizer, document) for document in corpus]
    return [(tokens, learnt) for tokens, learnt in examples if len(tokens) <= CONTEXT]


def save(output_dir: Path, state: State, tokenizer_model: bytes) -> None:
    """Write the released layout; each file beside its place first, then renamed into it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    beside = output_dir / "unfinished"
    torch.save({name: weight.detach().to(torch.float16) for name, weight in state.items()}, beside)
    os.replace(beside, output_dir / "consolidated.00.pth")
    for name, content in (("tokenizer.model", tokenizer_model), ("params.json", f"{json.dumps(PARAMS)}\n".encode())):
        beside.write_bytes(content)
        os.replace(beside, output_dir / name)


def main(output_dir: str, *, n_documents: int = 100_000, seed: int = 1) -> None:
    """Trains on a corpus whose documents are seen once each, then on answers that prefer their first alternatives.

    Before that second, short pass some alternatives are as likely as others to a hundredth; which of them a greedy
    model takes would hang on how a machine rounds.

    Args:
        output_dir: the checkpoint's folder.
        n_documents: size of the first corpus.
    """
    started = time.monotonic()
    corpus = documents(seed, n_documents)
    tokenizer_model = train_tokenizer(corpus[:TOKENIZER_DOCUMENTS])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    params = PARAMS | {"vocab_size": tokenizer.vocab_size()}
    state = initial_state(params, seed)
    train(state, params, encode_corpus(corpus, tokenizer), LEARNING_RATE, seed)
    settling = documents(seed + 1, min(SETTLING_DOCUMENTS, n_documents), lead=0.6)
    train(state, params, encode_corpus(settling, tokenizer), SETTLING_RATE, seed + 1)
    save(Path(output_dir), state, tokenizer_model)
    evaluate(Path(output_dir), CONTEXT)
    print(f"wrote {output_dir} in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main, n_threads=2)
