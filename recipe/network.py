"""The network as plain float32 functions over a state dict with the released names, which training runs through.

It shares nothing with `llama/model.py`: no cache, sharding or modules, one formula per line. The tests compare the two.
`params` is the content of a `params.json`; dim, n_layers and n_heads must stand in it, and for `shapes` vocab_size too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Params = dict[str, Any]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(weight.dtype) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of x (bsz, seqlen, heads, head_dim) by position * theta^(-2i/head_dim)."""
    seqlen, head_dim = x.shape[1], x.shape[3]
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seqlen, dtype=torch.float32), frequencies)[None, :, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the positions up to each one's own; all (bsz, heads, seqlen, head_dim)."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


def attention(state: State, params: Params, name: str, x: Tensor) -> Tensor:
    bsz, seqlen, dim = x.shape
    n_heads, n_kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    theta = params.get("rope_theta") or 10000.0
    q = F.linear(x, state[f"{name}.wq.weight"]).view(bsz, seqlen, n_heads, -1)
    k = F.linear(x, state[f"{name}.wk.weight"]).view(bsz, seqlen, n_kv_heads, -1)
    v = F.linear(x, state[f"{name}.wv.weight"]).view(bsz, seqlen, n_kv_heads, -1)
    q, k = rotate(q, theta).to(v.dtype), rotate(k, theta).to(v.dtype)
    k, v = (t.repeat_interleave(n_heads // n_kv_heads, dim=2) for t in (k, v))  # query head h reads KV head h // group
    out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return F.linear(out.transpose(1, 2).reshape(bsz, seqlen, dim), state[f"{name}.wo.weight"])


def feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    gate = F.silu(F.linear(x, state[f"{name}.w1.weight"]))
    return F.linear(gate * F.linear(x, state[f"{name}.w3.weight"]), state[f"{name}.w2.weight"])


def hidden(state: State, params: Params, tokens: Tensor) -> Tensor:
    """The normed last hidden state (bsz, seqlen, dim)."""
    eps = params["norm_eps"]
    x = F.embedding(tokens, state["tok_embeddings.weight"])
    for i in range(params["n_layers"]):
        name = f"layers.{i}"
        normed = rms_norm(x, state[f"{name}.attention_norm.weight"], eps)
        x = x + attention(state, params, f"{name}.attention", normed)
        x = x + feed_forward(state, f"{name}.feed_forward", rms_norm(x, state[f"{name}.ffn_norm.weight"], eps))
    return rms_norm(x, state["norm.weight"], eps)


def logits(state: State, params: Params, tokens: Tensor) -> Tensor:
    """Logits (bsz, seqlen, vocab) in float32 of tokens (bsz, seqlen) int64."""
    return F.linear(hidden(state, params, tokens), state["output.weight"]).float()


def shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Every parameter's released name and shape at MP 1."""
    dim, vocab, head_dim = params["dim"], params["vocab_size"], params["dim"] // params["n_heads"]
    kv_dim = (params.get("n_kv_heads") or params["n_heads"]) * head_dim
    width = int((params.get("ffn_dim_multiplier") or 1.0) * int(2 * (4 * dim) / 3))
    width = -(-width // params["multiple_of"]) * params["multiple_of"]
    found: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(params["n_layers"]):
        for name, rows in (("wq", dim), ("wk", kv_dim), ("wv", kv_dim), ("wo", dim)):
            found[f"layers.{i}.attention.{name}.weight"] = (rows, dim)
        for name, shape in (("w1", (width, dim)), ("w2", (dim, width)), ("w3", (width, dim))):
            found[f"layers.{i}.feed_forward.{name}.weight"] = shape
        found |= {f"layers.{i}.{norm}.weight": (dim,) for norm in ("attention_norm", "ffn_norm")}
    return found | {"output.weight": (vocab, dim)}
