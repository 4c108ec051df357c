"""The baseline of the ragged batch: how Meta's published code gets prompts of different lengths to their first token.

The prompts are prefilled together up to the shortest one's end; from there on the whole batch advances by one position
per pass, and longer prompts are fed their own tokens. Logits are computed for every position, keys and values are
repeated for each query head, layers are plain linear ones. Written independently, with plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.job import Job


class PublishedWay:
    batches = ()
    ragged = True

    def __init__(self, state: dict[str, Tensor], job: Job) -> None:
        self.state = state
        self.job = job
        shape = (job.n_layers, 2, len(job.ragged_lengths), job.max_seq_len, job.n_kv_heads, job.head_dim)
        like = state["norm.weight"]
        self.cache = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.rotations = _rotations(job).to(like.device)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        tokens = torch.zeros((len(prompts), longest + n_tokens), dtype=torch.int64, device=self.cache.device)
        given = torch.zeros(tokens.shape, dtype=torch.bool, device=self.cache.device)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
            given[i, : len(prompt)] = True
        start = 0
        for end in range(shortest, longest + n_tokens):
            chosen = self.forward(tokens[:, start:end], start)[:, -1].argmax(-1)
            tokens[:, end] = torch.where(given[:, end], tokens[:, end], chosen)
            start = end
            if end >= longest:
                tokens[:, end].tolist()
                tick()

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        """(bsz, seqlen) ids that follow `start` cached positions -> (bsz, seqlen, vocab_size) float32 logits."""
        h = F.embedding(tokens, self.state["tok_embeddings.weight"])
        for i in range(self.job.n_layers):
            name = f"layers.{i}"
            h = h + self.attention(i, self.norm(f"{name}.attention_norm", h), start)
            normed = self.norm(f"{name}.ffn_norm", h)
            gate = F.silu(self.linear(f"{name}.feed_forward.w1", normed))
            up = self.linear(f"{name}.feed_forward.w3", normed)
            h = h + self.linear(f"{name}.feed_forward.w2", gate * up)
        return self.linear("output", self.norm("norm", h)).float()

    def attention(self, layer: int, x: Tensor, start: int) -> Tensor:
        bsz, seqlen, _ = x.shape
        name, end = f"layers.{layer}.attention", start + seqlen
        rotations = self.rotations[start:end]
        query, key, value = (self.linear(f"{name}.{w}", x).view(bsz, seqlen, -1, self.job.head_dim) for w in _QKV)
        query, key = _rotate(query, rotations), _rotate(key, rotations)
        self.cache[layer, :, :bsz, start:end] = torch.stack((key, value))
        groups = self.job.n_heads // self.job.n_kv_heads
        keys, values = self.cache[layer, :, :bsz, :end].repeat_interleave(groups, dim=3).transpose(2, 3)
        scores = query.transpose(1, 2) @ keys.transpose(2, 3) / self.job.head_dim**0.5
        if seqlen > 1:
            hidden = torch.ones(seqlen, end, dtype=torch.bool, device=x.device).triu(start + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        mixed = F.softmax(scores.float(), dim=-1).type_as(values) @ values
        return self.linear(f"{name}.wo", mixed.transpose(1, 2).reshape(bsz, seqlen, -1))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.job.norm_eps)
        return normed.type_as(x) * self.state[f"{name}.weight"]


_QKV = ("wq", "wk", "wv")


def _rotations(job: Job) -> Tensor:
    """(max_seq_len, head_dim / 2) complex64."""
    frequencies = job.rope_theta ** (-torch.arange(0, job.head_dim, 2).float() / job.head_dim)
    angles = torch.outer(torch.arange(job.max_seq_len).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _rotate(x: Tensor, rotations: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(3).type_as(x)


def version(job: Job, variant: str) -> str:
    return f"torch {torch.__version__}"


def prepare(job: Job, variant: str) -> None:
    """Nothing: the checkpoint is read as it is."""


def load(job: Job, variant: str) -> PublishedWay:
    shard = next(Path(job.ckpt_dir).glob("*.pth"))
    state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    dtype = getattr(torch, job.dtype)
    return PublishedWay({name: tensor.to(job.device, dtype) for name, tensor in state.items()}, job)
