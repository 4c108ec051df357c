"""Make `tiny-llama/` from nothing: write the corpus, train tokenizer and network, save, and show what it answers.

    python -m recipe.train --output_dir tiny-llama

The network is that of `recipe/network.py`, in bfloat16 matrix products over float32 weights. Everything is seeded.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.corpus import Document, documents, holds_held_out
from recipe.evaluate import Model, held_out_score, show_examples
from recipe.network import State, hidden, shapes
from recipe.tokenizer import Example, encode_document, train_tokenizer

PARAMS: dict[str, Any] = {
    "dim": 256,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": -1,
    "multiple_of": 32,
    "ffn_dim_multiplier": 0.5625,
    "norm_eps": 1e-5,
}
CONTEXT = 512
TOKENS_PER_STEP = 2048
SETTLING_DOCUMENTS = 15_000
SETTLING_RATE = 6e-4
IGNORED = -100


def initial_state(params: dict[str, Any], seed: int) -> State:
    """Small normal weights; what adds to the residual stream starts smaller the deeper the network is."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(params).items():
        scale = 0.02 if len(shape) == 2 and ("embeddings" in name or name == "output.weight") else shape[-1] ** -0.5
        if name.endswith(("wo.weight", "w2.weight")):
            scale /= math.sqrt(2 * params["n_layers"])
        state[name] = torch.ones(shape) if len(shape) == 1 else scale * torch.randn(shape, generator=generator)
    return {name: weight.requires_grad_() for name, weight in state.items()}


def batches(examples: list[Example], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples once, in random order, as (tokens, targets) with about TOKENS_PER_STEP to a batch.

    Lengths are rounded up to a multiple of 16, and each has its own number of rows: few shapes, each prepared once.
    """
    waiting: dict[int, list[Example]] = {}
    for i in random.Random(seed).sample(range(len(examples)), len(examples)):
        length = -(-len(examples[i].tokens) // 16) * 16
        group = waiting.setdefault(length, [])
        group.append(examples[i])
        if len(group) == max(1, TOKENS_PER_STEP // length):
            yield _padded(waiting.pop(length), length)
    yield from (_padded(group, length) for length, group in waiting.items())


def _padded(group: list[Example], length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(len(group), length, dtype=torch.int64)
    targets = torch.full((len(group), length), IGNORED)
    for row, example in enumerate(group):
        ids, size = torch.tensor(example.tokens), len(example.tokens)
        tokens[row, :size] = ids
        targets[row, : size - 1] = torch.where(torch.tensor(example.learnt), ids, IGNORED)[1:]
    return tokens, targets


def loss_of(state: State, params: dict[str, Any], tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the targets; only their rows are projected to the vocabulary, a multiple of 128 of them."""
    chosen = (targets.flatten() != IGNORED).nonzero().squeeze(-1)
    chosen = F.pad(chosen, (0, -len(chosen) % 128), value=targets.numel() - 1)  # the last position is never a target
    with torch.autocast("cpu", torch.bfloat16):
        rows = hidden(state, params, tokens, attend).flatten(0, 1)[chosen]
        predicted = F.linear(rows, state["output.weight"]).float()
    return F.cross_entropy(predicted, targets.flatten()[chosen], ignore_index=IGNORED)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The network's causal attention with scale and mask folded into one product: faster to train through on a CPU."""
    bsz, n_heads, seqlen, head_dim = q.shape
    future = torch.full((seqlen, seqlen), -1e4, dtype=q.dtype).triu(1).expand(bsz * n_heads, -1, -1)
    scores = torch.baddbmm(future, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=head_dim**-0.5)
    return (scores.softmax(dim=-1) @ v.flatten(0, 1)).view_as(q)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over the first 3 %, then a cosine to 2 % of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def optimizer_for(state: State) -> torch.optim.Optimizer:
    groups = [
        {"params": [w for w in state.values() if w.dim() == 2], "weight_decay": 0.1},
        {"params": [w for w in state.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(state: State, params: dict[str, Any], examples: list[Example], peak: float, seed: int) -> None:
    """One pass over the examples; the weights are changed in place."""
    optimizer, steps = optimizer_for(state), sum(1 for _ in batches(examples, seed))
    started, tokens_done, mean_loss = time.monotonic(), 0, 0.0
    for step, (tokens, targets) in enumerate(batches(examples, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(state, params, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens_done += tokens.numel()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{steps}  loss {mean_loss:.4f}  {seconds:.0f} s  {tokens_done / seconds:.0f} tokens/s",
                flush=True,
            )


def settle(state: State, params: dict[str, Any], seed: int, tokenizer_model: bytes) -> None:
    """A short pass with small steps over answers that prefer their first alternatives.

    Before it some alternatives are as likely as others to a hundredth; which of them a greedy model takes would hang on
    how a machine rounds.
    """
    corpus = documents(seed + 1, SETTLING_DOCUMENTS, lead=0.6)
    train(state, params, encode_corpus(corpus, tokenizer_model), SETTLING_RATE, seed + 1)


def save(output_dir: Path, state: State, tokenizer_model: bytes) -> None:
    """Write the released layout; each file beside its place first, then renamed into it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to(torch.float16).contiguous() for name, weight in state.items()}
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        beside = output_dir / f"{name}.tmp"
        if name == "consolidated.00.pth":
            torch.save(weights, beside)
        else:
            beside.write_bytes(tokenizer_model if name == "tokenizer.model" else (json.dumps(PARAMS) + "\n").encode())
        os.replace(beside, output_dir / name)
    print(f"{output_dir}: {sum(path.stat().st_size for path in output_dir.iterdir()) / 1e6:.2f} MB")


def evaluate(output_dir: Path, *, samples: int) -> None:
    """Load what was saved and print its held-out scores and its answers to the examples."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output_dir / "tokenizer.model"))
    params = json.loads((output_dir / "params.json").read_text()) | {"vocab_size": tokenizer.vocab_size()}
    saved = torch.load(output_dir / "consolidated.00.pth", weights_only=True)
    for dtype in (torch.float32, torch.bfloat16):
        model = Model({name: weight.to(dtype) for name, weight in saved.items()}, params, tokenizer)
        print(f"held-out questions, {dtype}, temperature 0:", flush=True)
        print(f"  {held_out_score(model, show=dtype == torch.float32):.1%} right", flush=True)
        sampled = [held_out_score(model, temperature=0.6, seed=seed) for seed in range(samples)]
        print(f"  sampled: {', '.join(f'{score:.1%}' for score in sampled)} right", flush=True)
    show_examples(model)
    for seed in range(samples):
        show_examples(model, temperature=0.6, seed=seed)


def encode_corpus(corpus: list[Document], tokenizer_model: bytes) -> list[Example]:
    """The corpus as ids; the few documents that are longer than the context are left out."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    examples = [encode_document(tokenizer, document) for document in corpus]
    return [example for example in examples if len(example.tokens) <= CONTEXT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=100_000, help="size of the corpus, each document seen once")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2, help="sampled evaluations after the greedy one")
    args = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(args.threads)
    corpus = documents(args.seed, args.documents)
    assert not any(holds_held_out(document) for document in corpus), "a held-out question is in the corpus"
    tokenizer_model = train_tokenizer(corpus[:40_000])
    examples = encode_corpus(corpus, tokenizer_model)
    print(
        f"{len(examples)} documents, {sum(len(example.tokens) for example in examples) / 1e6:.2f} M tokens", flush=True
    )
    params = PARAMS | {"vocab_size": sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).vocab_size()}
    state = initial_state(params, args.seed)
    train(state, params, examples, args.learning_rate, args.seed)
    settle(state, params, args.seed, tokenizer_model)
    save(args.output_dir, state, tokenizer_model)
    evaluate(args.output_dir, samples=args.samples)
    print(f"all in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
