"""The network and greedy generation against Hugging Face's LlamaForCausalLM on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from tests.support import oracle

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[test]'")

MULTI_HEAD: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": MULTI_HEAD,
    "grouped-query": MULTI_HEAD | {"n_kv_heads": 2, "norm_eps": 1e-6},
    "ffn_dim_multiplier": MULTI_HEAD | {"ffn_dim_multiplier": 1.3, "multiple_of": 8},
    "rope_theta": MULTI_HEAD | {"n_kv_heads": 4, "rope_theta": 1e6},
}
MAX_SEQ_LEN = 96
# Ours to theirs, a suffix of the name each.
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """From rotary pairs side by side (0, 1), (2, 3), ... to pairs half a head apart, as Hugging Face has them."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def hugging_face_state(state: oracle.State, params: dict[str, Any]) -> oracle.State:
    n_heads = {"wq": params["n_heads"], "wk": params.get("n_kv_heads", params["n_heads"])}
    translated = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if not stem.startswith("layers."):
            translated[f"{WHOLE[stem]}.weight"] = tensor
            continue
        _, layer, part = stem.split(".", 2)
        if (last := part.rpartition(".")[2]) in n_heads:
            tensor = half_split(tensor, n_heads[last])
        translated[f"model.layers.{layer}.{NAMES[part]}.weight"] = tensor
    return translated


def hugging_face_model(state: oracle.State, params: dict[str, Any]) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=state["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads", params["n_heads"]),
        rms_norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
        max_position_embeddings=MAX_SEQ_LEN,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    if hasattr(config, "rope_parameters"):  # transformers 5 keeps rope_theta here
        config.rope_parameters = {"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)}
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(hugging_face_state(state, params), strict=True)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_generation_equal_hugging_faces(
    variant: str, write_checkpoint: Callable[..., Path], tokenizer_path: Path, params: dict[str, Any]
) -> None:
    params = VARIANTS[variant] | {"vocab_size": params["vocab_size"]}
    state = oracle.random_state(params, seed=8)
    theirs = hugging_face_model(state, params)
    ours = Llama.build(
        write_checkpoint(params, state), tokenizer_path, MAX_SEQ_LEN, 4, model_parallel_size=1, dtype="float32"
    )
    tokens = torch.randint(params["vocab_size"], (4, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(ours.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)

    prompts = [row[:length].tolist() for row, length in zip(tokens, (1, 20, 7, 33), strict=True)]
    eos_id = ours.tokenizer.eos_id
    got, _ = ours.generate(prompts, max_gen_len=24, temperature=0)
    for prompt, row in zip(prompts, got, strict=True):
        whole = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=eos_id, pad_token_id=0
        )
        answer = whole[0, len(prompt) :].tolist()
        assert row == (answer[: answer.index(eos_id)] if eos_id in answer else answer)
