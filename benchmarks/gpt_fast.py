"""The network as gpt-fast writes it, for `torch.compile`: to measure how near to it this library comes.

A layer has one product for wq, wk and wv and one for w1 and w3, the cache has its full size from the start, and a
decode step is one graph from token to token. All sequences are at the same position.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.worker import Job


class Network(nn.Module):
    """Reads the weights of a job's checkpoint.

    Args:
        bsz: number of sequences, for which it has a cache.
    """

    def __init__(self, job: Job, bsz: int) -> None:
        super().__init__()
        self.job, self.head_dim = job, job.dim // job.n_heads
        self.sizes = [job.dim, *[job.n_kv_heads * self.head_dim] * 2]
        shard = next(Path(job.ckpt_dir).glob("*.pth"))
        state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        dtype, device = getattr(torch, job.dtype), torch.device(job.device)

        def of(*names: str) -> Tensor:
            return torch.cat([state[f"{name}.weight"].to(device, dtype) for name in names])

        self.embedding, self.norm, self.output = of("tok_embeddings"), of("norm"), of("output")
        self.layers = []
        for i in range(job.n_layers):
            a, f = (f"layers.{i}.{part}" for part in ("attention", "feed_forward"))
            products = of(f"{a}.wq", f"{a}.wk", f"{a}.wv"), of(f"{a}.wo"), of(f"{f}.w1", f"{f}.w3"), of(f"{f}.w2")
            self.layers.append((of(f"layers.{i}.attention_norm"), of(f"layers.{i}.ffn_norm"), *products))
        powers = torch.arange(0, self.head_dim, 2, device=device) / self.head_dim
        angles = torch.outer(torch.arange(job.max_seq_len, device=device), job.rope_theta**-powers)
        self.rotations = torch.stack((angles.cos(), angles.sin()), -1)  # (max_seq_len, head_dim / 2, 2)
        self.mask = torch.ones(job.max_seq_len, job.max_seq_len, dtype=torch.bool, device=device).tril()
        cache = job.n_layers, bsz, job.n_kv_heads, job.max_seq_len, self.head_dim
        self.register_buffer("keys", torch.zeros(cache, dtype=dtype, device=device))
        self.register_buffer("values", torch.zeros(cache, dtype=dtype, device=device))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The greedy next token of each sequence (bsz, 1), after tokens (bsz, n) at `positions` (n,)."""
        x = F.embedding(tokens, self.embedding)
        for i, (attention_norm, ffn_norm, wqkv, wo, w13, w2) in enumerate(self.layers):
            qkv = F.linear(self._norm(x, attention_norm), wqkv).split(self.sizes, dim=-1)
            queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
            keys, values = self._rotated(keys, positions).transpose(1, 2), values.transpose(1, 2)
            cached = self.keys[i].index_copy_(2, positions, keys), self.values[i].index_copy_(2, positions, values)
            out = F.scaled_dot_product_attention(
                self._rotated(queries, positions).transpose(1, 2), *cached, self.mask[positions], enable_gqa=True
            )
            x = x + F.linear(out.transpose(1, 2).flatten(2), wo)
            gate, up = F.linear(self._norm(x, ffn_norm), w13).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, w2)
        return F.linear(self._norm(x[:, -1:], self.norm), self.output).argmax(-1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.job.norm_eps).type_as(x) * weight

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (bsz, n, heads, head_dim), whose neighbors are pairs, rotated by their positions."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.rotations[positions].unsqueeze(1).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)
