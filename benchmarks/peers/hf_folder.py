"""A checkpoint as the folder that Hugging Face transformers reads, which other engines convert from.

Needs torch and safetensors; knows no engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from benchmarks.job import Job
from benchmarks.peers.state import read_state

_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NAMES_IN_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def write_hf_folder(job: Job) -> Path:
    """The folder, written on the first call."""
    folder = Path(job.folder) / "hf"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        state = {_hf_name(name): _hf_tensor(name, tensor, job) for name, tensor in read_state(job).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config(job)), encoding="utf-8")
    return folder


def _hf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, layer, in_layer = name.split(".", 2)
    return f"model.layers.{layer}.{_NAMES_IN_LAYER[in_layer]}"


def _hf_tensor(name: str, tensor: Tensor, job: Job) -> Tensor:
    """Rotary pairs lie side by side in the released files and half a head apart in transformers."""
    if name.endswith(("wq.weight", "wk.weight")):
        pairs = tensor.view(-1, job.head_dim // 2, 2, job.dim)
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    return tensor.contiguous()


def _config(job: Job) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": job.dim,
        "num_hidden_layers": job.n_layers,
        "num_attention_heads": job.n_heads,
        "num_key_value_heads": job.n_kv_heads,
        "head_dim": job.head_dim,
        "intermediate_size": job.hidden_dim,
        "vocab_size": job.vocab_size,
        "rms_norm_eps": job.norm_eps,
        "rope_theta": job.rope_theta,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": job.dtype,
        "torch_dtype": job.dtype,
    }
