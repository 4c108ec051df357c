"""Code written for Meta's `llama` package runs: its public names, signatures and defaults, and programs that use them.

`SIGNATURES` is the interface as its users call it. The programs below it are written the way theirs are.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fairscale_groups
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

import llama
import llama.generation
import llama.model
import llama.tokenizer
from llama import LLaMA, Llama
from llama.generation import sample_top_p
from llama.model import (
    Attention,
    FeedForward,
    ModelArgs,
    RMSNorm,
    Transformer,
    TransformerBlock,
    apply_rotary_emb,
    precompute_freqs_cis,
    repeat_kv,
    reshape_for_broadcast,
)
from llama.tokenizer import Tokenizer
from tests.support import oracle

ROOT = Path(__file__).parents[2]
# Each callable's parameters in Meta's order, with their defaults. Ours may have more behind them, by keyword only.
SIGNATURES = {
    "generation.Llama.build": "ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size=None, seed=1",
    "generation.Llama.__init__": "model, tokenizer",
    "generation.Llama.generate": "prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, logprobs=False, echo=False, "
    "stop_token=None",  # Code Llama's
    "generation.Llama.text_infilling": "prefixes, suffixes, temperature=0.6, top_p=0.9, max_gen_len=None, "
    "logprobs=False, suffix_first=False",
    "generation.infilling_prompt_tokens": "tokenizer, pre, suf, suffix_first=False",
    "generation.dialog_prompt_tokens": "tokenizer, dialog",
    "generation.Llama.text_completion": "prompts, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False, "
    "echo=False",
    "generation.Llama.chat_completion": "dialogs, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False",
    "generation.LLaMA.generate": "prompts, max_gen_len, temperature=0.8, top_p=0.95",  # Llama 1's
    "generation.sample_top_p": "probs, p",
    "tokenizer.Tokenizer.__init__": "model_path",
    "tokenizer.Tokenizer.encode": "s, bos, eos",
    "tokenizer.Tokenizer.decode": "t",
    "tokenizer.Tokenizer.token_piece": "t",
    "tokenizer.Tokenizer.encode_infilling": "s",
    "tokenizer.Tokenizer.decode_infilling": "t",
    "model.RMSNorm.__init__": "dim, eps=1e-6",
    "model.RMSNorm.forward": "x",
    "model.precompute_freqs_cis": "dim, end, theta=10000.0",
    "model.reshape_for_broadcast": "freqs_cis, x",
    "model.apply_rotary_emb": "xq, xk, freqs_cis",
    "model.repeat_kv": "x, n_rep",
    "model.Attention.__init__": "args",
    "model.Attention.forward": "x, start_pos, freqs_cis, mask",
    "model.FeedForward.__init__": "dim, hidden_dim, multiple_of, ffn_dim_multiplier",
    "model.FeedForward.forward": "x",
    "model.TransformerBlock.__init__": "layer_id, args",
    "model.TransformerBlock.forward": "x, start_pos, freqs_cis, mask",
    "model.Transformer.__init__": "params",
    "model.Transformer.forward": "tokens, start_pos",
}
ARGS = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": None,
    "vocab_size": -1,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "max_batch_size": 32,
    "max_seq_len": 2048,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_metas_with_more_by_keyword_only(name: str) -> None:
    function = llama
    for part in name.split("."):
        function = getattr(function, part)
    metas = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None")).parameters
    ours = {key: value for key, value in inspect.signature(function).parameters.items() if key != "self"}
    assert [key for key, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == list(metas)
    for key, p in ours.items():
        if key in metas:
            assert p.default == metas[key].default, key
        else:
            assert p.kind is p.VAR_KEYWORD or p.default is not p.empty, key


def test_the_hyperparameters_and_their_defaults_are_metas() -> None:
    """With rope_theta besides, by name; Code Llama's files have it."""
    fields = {field.name: field.default for field in dataclasses.fields(ModelArgs)}
    assert fields.pop("rope_theta") == 10000.0
    assert fields == ARGS and list(fields) == list(ARGS)
    assert llama.ModelArgs is ModelArgs and llama.Tokenizer is Tokenizer and llama.Llama is Llama


def test_the_names_of_prompts_and_results_are_metas() -> None:
    names = "Role Message Dialog CompletionPrediction ChatPrediction"
    constants = "B_INST E_INST B_SYS E_SYS SPECIAL_TAGS UNSAFE_ERROR"
    assert all(hasattr(llama.generation, name) for name in f"{names} {constants} sample_top_p Llama".split())
    g = llama.generation
    assert (g.B_INST, g.E_INST, g.B_SYS, g.E_SYS) == ("[INST]", "[/INST]", "<<SYS>>\n", "\n<</SYS>>\n\n")
    assert list(g.SPECIAL_TAGS) == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert g.UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."  # word for word
    assert set(get_args(g.Role)) == {"system", "user", "assistant"}
    assert g.Message(role="user", content="a") == {"role": "user", "content": "a"}
    assert list(get_type_hints(g.Message)) == ["role", "content", "destination"]  # the last is Code Llama 70B's
    assert {"generation", "tokens", "logprobs"} <= get_type_hints(g.CompletionPrediction).keys()
    assert {"generation", "tokens", "logprobs"} <= get_type_hints(g.ChatPrediction).keys()
    namespace: dict[str, Any] = {}
    exec("from llama import *", namespace)
    assert namespace["Llama"] is Llama and namespace["Dialog"] is g.Dialog


# ---- the network's parts


@pytest.fixture(scope="module", autouse=True)
def _groups(llama: Llama) -> None:
    """A group of one process is there, as `build` leaves it."""


def small_args(**changes: Any) -> ModelArgs:
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 50, "multiple_of": 16}
    return ModelArgs(**sizes | {"max_batch_size": 3, "max_seq_len": 16} | changes)


def small_params(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps")}


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight.size(1) ** -0.5, generator=generator)
    return module


def causal_mask(seqlen: int, start_pos: int = 0) -> Tensor:
    """As such code makes it: -inf above the diagonal, behind zeros for what is cached."""
    mask = torch.triu(torch.full((seqlen, seqlen), float("-inf")), diagonal=1)
    return torch.hstack([torch.zeros((seqlen, start_pos)), mask])


def test_hyperparameters_can_be_assigned_compared_and_subclassed() -> None:
    args = ModelArgs(64, 1, 4)
    args.vocab_size, args.max_seq_len = 20, 8
    assert args == ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=20, max_seq_len=8)
    assert ModelArgs(**json.loads(json.dumps(dataclasses.asdict(args)))) == args

    @dataclass
    class WithAdapter(ModelArgs):
        lora_rank: int = 8

    model = Transformer(WithAdapter(dim=64, n_layers=1, n_heads=4, vocab_size=20, max_seq_len=8, lora_rank=2))
    assert model.params.lora_rank == 2


def test_another_projects_arguments_are_taken() -> None:
    fields = vars(small_args()) | {"dropout": 0.1}
    for config in (argparse.Namespace(**fields), SimpleNamespace(**fields)):
        model = fill(Transformer(config))
        assert model.params is config
        state, tokens = dict(model.state_dict()), torch.tensor([[1, 2, 3]])
        torch.testing.assert_close(model(tokens, 0), oracle.logits(state, small_params(config), tokens))


def test_a_transformer_has_metas_attributes() -> None:
    args = small_args()
    model = Transformer(args)
    assert (model.params, model.vocab_size, model.n_layers) == (args, 50, 2)
    assert model.freqs_cis.shape == (2 * args.max_seq_len, 4) and model.freqs_cis.dtype == torch.complex64
    assert isinstance(model.tok_embeddings, ParallelEmbedding) and isinstance(model.layers, nn.ModuleList)
    assert isinstance(model.output, ColumnParallelLinear) and isinstance(model.norm, RMSNorm)
    assert set(model.state_dict()) == set(oracle.shapes(small_params(args) | vars(args)))
    block = model.layers[1]
    assert (block.layer_id, block.n_heads, block.dim, block.head_dim) == (1, 8, 64, 8)
    a = block.attention
    assert (a.n_kv_heads, a.n_local_heads, a.n_local_kv_heads, a.n_rep, a.head_dim) == (2, 8, 2, 4, 8)
    assert isinstance(a.wq, ColumnParallelLinear) and isinstance(a.wo, RowParallelLinear)
    assert isinstance(block.feed_forward.w1, ColumnParallelLinear)
    assert a.cache_k.shape == a.cache_v.shape == (3, 16, 2, 8)
    assert (block.attention_norm.eps, RMSNorm(4).eps) == (args.norm_eps, 1e-6)


def test_a_block_built_by_hand_is_called_as_metas_is() -> None:
    args = small_args()
    block, params = fill(TransformerBlock(0, args)), small_params(args)
    state = {f"layers.0.{name}": w for name, w in block.state_dict().items()}
    x, freqs_cis = torch.randn((2, 6, 64), generator=torch.Generator().manual_seed(1)), precompute_freqs_cis(8, 32)
    normed = oracle.rms_norm(x, torch.ones(64), 1e-5)
    attended = x + oracle.attention(state, params, "layers.0.attention", normed)
    expected = attended + oracle.feed_forward(
        state, "layers.0.feed_forward", oracle.rms_norm(attended, torch.ones(64), 1e-5)
    )
    whole = block(x, 0, freqs_cis[:6], causal_mask(6))
    four_dimensions = block.forward(x=x, start_pos=0, freqs_cis=freqs_cis[:6], mask=causal_mask(6)[None, None])
    first = block(x[:, :3], 0, freqs_cis[:3], causal_mask(3))
    chunk = block(x[:, 3:5], 3, freqs_cis[3:5], causal_mask(2, 3))
    last = block(x[:, 5:], 5, freqs_cis[5:6], None)
    for got in (whole, four_dimensions, torch.cat([first, chunk, last], dim=1)):
        torch.testing.assert_close(got, expected)


def test_no_mask_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each position attends to all that are there, the ones behind it too."""
    args = small_args(n_heads=4, n_kv_heads=4)
    attention = fill(Attention(args))
    x, freqs_cis = torch.randn((1, 5, 64), generator=torch.Generator().manual_seed(1)), precompute_freqs_cis(16, 5)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3) / 16**0.5).softmax(-1) @ v

    state = {f"a.{name}": w for name, w in attention.state_dict().items()}
    monkeypatch.setattr("recipe.network.causal_attention", attend)
    expected = oracle.attention(state, {"n_heads": 4}, "a", x)
    torch.testing.assert_close(attention(x, 0, freqs_cis, None), expected)


def test_the_pieces_of_the_forward_can_be_called_one_by_one() -> None:
    model = fill(Transformer(small_args()))
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    expected = model(tokens, 0)
    h = model.tok_embeddings(tokens)
    for layer in model.layers:
        freqs_cis = model.freqs_cis[:4]
        h = h + layer.attention.forward(layer.attention_norm(h), 0, freqs_cis, causal_mask(4))
        h = h + layer.feed_forward.forward(layer.ffn_norm(h))
    torch.testing.assert_close(model.output(model.norm(h)).float(), expected)


def test_positions_and_tokens_of_any_integer_type_are_taken() -> None:
    model = fill(Transformer(small_args()))
    tokens = torch.tensor([[1, 2, 3]])
    expected = model.forward(tokens=tokens, start_pos=0)
    for start_pos in (np.int64(0), torch.tensor(0), torch.tensor([0])):
        assert torch.equal(model(tokens, start_pos), expected)
    assert torch.equal(model(tokens.int(), 0), expected)


def test_the_cache_is_read_saved_restored_reordered_and_replaced() -> None:
    model = fill(Transformer(small_args()))
    caches = [layer.attention for layer in model.layers]
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    expected = model(tokens, 0)[:, 3:]

    def prefill() -> None:
        with torch.no_grad():
            model(tokens[:, :3], 0)

    prefill()
    saved = [(cache.cache_k.clone(), cache.cache_v.clone()) for cache in caches]
    assert all(k[:2, :3].abs().amin((1, 2, 3)).gt(0).all() and not k[2:].any() for k, _ in saved)
    for cache in caches:
        cache.cache_k.zero_()
        cache.cache_v = torch.zeros_like(cache.cache_v)
    assert not torch.allclose(model(tokens[:, 3:], 3), expected)
    for cache, (k, v) in zip(caches, saved, strict=True):
        cache.cache_k, cache.cache_v = k, v
    torch.testing.assert_close(model(tokens[:, 3:], 3), expected)
    prefill()  # a beam search gives each beam the cache of its parent
    beams = torch.tensor([1, 0])
    for cache in caches:
        cache.cache_k[:2], cache.cache_v[:2] = cache.cache_k[beams], cache.cache_v[beams]
    torch.testing.assert_close(model(tokens[beams, 3:], 3), expected[beams])
    for cache in caches:
        cache.cache_k, cache.cache_v = (torch.zeros((5, 16, 2, 8)) for _ in range(2))
    model.params.max_batch_size = 5
    torch.testing.assert_close(model(tokens[[0, 1, 0, 1, 0]], 0)[:2, 3:], expected)


def test_the_functions_on_rotations_take_metas_shapes() -> None:
    x = torch.randn((2, 5, 4, 8), generator=torch.Generator().manual_seed(1))
    freqs_cis = precompute_freqs_cis(dim=8, end=5, theta=10000.0)
    assert reshape_for_broadcast(freqs_cis, torch.view_as_complex(x.unflatten(-1, (4, 2)))).shape[-3:] == (5, 1, 4)
    xq, xk = apply_rotary_emb(xq=x, xk=x[:, :, :2], freqs_cis=freqs_cis)
    torch.testing.assert_close(xq, oracle.rotate(x, 10000.0))
    assert torch.equal(xk, xq[:, :, :2]) and xq.is_contiguous() and xk.is_contiguous()
    assert [out.dtype for out in apply_rotary_emb(x.bfloat16(), x, freqs_cis)] == [torch.bfloat16, torch.float32]
    assert torch.equal(repeat_kv(x=x, n_rep=3), x.repeat_interleave(3, dim=2)) and repeat_kv(x, 1) is x
    with pytest.raises(AssertionError):
        reshape_for_broadcast(freqs_cis[:4], torch.view_as_complex(x.unflatten(-1, (4, 2))))


def test_the_feed_forward_has_metas_width() -> None:
    assert FeedForward(64, 256, 32, None).w1.weight.shape == (192, 64)  # 2/3 of 256, rounded up
    assert FeedForward(dim=64, hidden_dim=256, multiple_of=32, ffn_dim_multiplier=1.3).w2.weight.shape == (64, 224)


def test_sample_top_p_keeps_metas_set() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.05, 0.05]])
    drawn = torch.cat([sample_top_p(probs, 0.6) for _ in range(100)], dim=1)
    assert drawn.shape == (2, 100) and set(drawn[0].tolist()) == {1, 2} and set(drawn[1].tolist()) == {0}
    assert sample_top_p(probs, p=0.0).tolist() == [[1], [0]]


# ---- programs


@pytest.fixture(scope="module")
def toy() -> Llama:
    """The toy, as a program builds it: bfloat16 on a CPU."""
    return toy_of()


def toy_of(**options: Any) -> Llama:
    folder = ROOT / "tiny-llama"
    return Llama.build(
        ckpt_dir=str(folder),
        tokenizer_path=str(folder / "tokenizer.model"),
        **{"max_seq_len": 64, "max_batch_size": 4, "device": "cpu"} | options,
    )


def greedy(llama: Llama, prompts: list[str], n: int = 8) -> list[str]:
    return [result["generation"] for result in llama.text_completion(prompts, temperature=0, max_gen_len=n)]


PROMPTS = ["I think that the", "What"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_built_and_loaded_by_hand(dtype: torch.dtype) -> None:
    """As such code does it: the default dtype set, groups made by fairscale, `strict=False`."""
    folder = ROOT / "tiny-llama"
    if not fairscale_groups.model_parallel_is_initialized():
        fairscale_groups.initialize_model_parallel(1)
    tokenizer = Tokenizer(model_path=str(folder / "tokenizer.model"))
    args = ModelArgs(max_seq_len=64, max_batch_size=2, **json.loads((folder / "params.json").read_text()))
    args.vocab_size = tokenizer.n_words
    torch.set_default_dtype(dtype)
    try:
        model = Transformer(args)
    finally:
        torch.set_default_dtype(torch.float32)
    model.load_state_dict(torch.load(folder / "consolidated.00.pth", map_location="cpu"), strict=False)
    assert {weight.dtype for weight in model.parameters()} == {dtype} == {model.layers[0].attention.cache_k.dtype}
    built = toy_of(dtype=dtype, max_batch_size=2)
    assert greedy(Llama(model, tokenizer), PROMPTS) == greedy(built, PROMPTS)


def test_a_custom_generation_loop(toy: Llama) -> None:
    """All rows go on from the shortest prompt; the longer ones are fed token by token."""
    model, tokenizer = toy.model, toy.tokenizer
    prompts = [tokenizer.encode(text, bos=True, eos=False) for text in PROMPTS]
    shortest, total = min(map(len, prompts)), max(map(len, prompts)) + 8
    tokens = torch.full((len(prompts), total), tokenizer.pad_id, dtype=torch.long)
    for k, prompt in enumerate(prompts):
        tokens[k, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    given, previous = tokens != tokenizer.pad_id, 0
    for current in range(shortest, total):
        with torch.inference_mode():
            logits = model.forward(tokens[:, previous:current], previous)
        newest = torch.argmax(logits[:, -1], dim=-1)
        tokens[:, current] = torch.where(given[:, current], tokens[:, current], newest)
        previous = current
    expected = toy.generate(prompts, 8, temperature=0)[0]
    for prompt, row, new in zip(prompts, tokens.tolist(), expected, strict=True):
        assert row[: len(prompt)] == prompt and row[len(prompt) :][: len(new)] == new


def test_subclasses_of_llama(toy: Llama) -> None:
    class WithoutInit(Llama):
        def __init__(self, model: Any, tokenizer: Any) -> None:
            self.model = model
            self.tokenizer = tokenizer

    class WithGenerate(Llama):
        def generate(  # type: ignore[override]
            self,
            prompt_tokens: list[list[int]],
            max_gen_len: int,
            temperature: float = 0.6,
            top_p: float = 0.9,
            logprobs: bool = False,
            echo: bool = False,
        ) -> Any:
            rows = [self.tokenizer.encode("Hello", bos=False, eos=False) for _ in prompt_tokens]
            return rows, [[0.5] * len(row) for row in rows] if logprobs else None

    class WithSuper(Llama):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            self.seen = kwargs
            return super().generate(*args, **kwargs)

    expected = greedy(toy, PROMPTS)
    assert greedy(WithoutInit(toy.model, toy.tokenizer), PROMPTS) == expected
    assert "".join(WithoutInit(toy.model, toy.tokenizer).stream_text_completion(PROMPTS[0], 0, max_gen_len=8))
    fixed = WithGenerate(toy.model, toy.tokenizer)
    assert greedy(fixed, ["a", "b"]) == ["Hello", "Hello"]
    assert fixed.chat_completion([[{"role": "user", "content": "a"}]])[0]["generation"]["content"] == "Hello"
    assert set(fixed.text_completion(["a"], logprobs=True)[0]["logprobs"]) == {0.5}
    calling = WithSuper(toy.model, toy.tokenizer)
    assert greedy(calling, PROMPTS) == expected
    assert {"prompt_tokens", "max_gen_len", "temperature", "top_p", "logprobs"} <= calling.seen.keys()


def test_a_patched_generate_counts_in_an_instance_and_in_the_class(toy: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def hello(self: Any = None, prompt_tokens: Any = None, **_: Any) -> Any:
        return [toy.tokenizer.encode("Hello", bos=False, eos=False)], None

    other = Llama(toy.model, toy.tokenizer)
    other.generate = hello  # type: ignore[method-assign]
    assert greedy(other, ["a"]) == ["Hello"] != greedy(toy, ["a"])
    monkeypatch.setattr(Llama, "generate", hello)
    assert greedy(toy, ["a"]) == ["Hello"]


def test_a_model_of_forward_and_params_alone(toy: Llama) -> None:
    class Wrapped:
        def __init__(self, inner: Any) -> None:
            self.inner = inner
            self.params = inner.params

        def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
            assert isinstance(start_pos, int)
            return self.inner.forward(tokens, start_pos)

    class Successor(nn.Module):
        """Each token is followed by the next number; it has no cache and no parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.params = SimpleNamespace(max_batch_size=2, max_seq_len=16, vocab_size=1536)

        def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
            return F.one_hot((tokens + 1) % 1536, 1536).float()

    wrapped = Llama(Wrapped(toy.model), toy.tokenizer)
    assert greedy(wrapped, PROMPTS) == greedy(toy, PROMPTS)
    assert "".join(wrapped.stream_text_completion(PROMPTS[0], 0, max_gen_len=8)) == greedy(toy, PROMPTS)[0]
    tokens, _ = Llama(Successor(), toy.tokenizer).generate([[5], [9, 10], [3]], 4, temperature=0, echo=True)
    assert tokens == [[5, 6, 7, 8, 9], [9, 10, 11, 12, 13, 14], [3, 4, 5, 6, 7]]


class OwnAttention(nn.Module):
    """Attention as others write it for this network, of fairscale's layers, with a cache in an attribute."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        n_kv_heads = args.n_kv_heads or args.n_heads
        self.n_rep, self.head_dim = args.n_heads // n_kv_heads, args.dim // args.n_heads
        options: dict[str, Any] = {"bias": False, "init_method": lambda weight: weight}
        width, kv_width = args.n_heads * self.head_dim, n_kv_heads * self.head_dim
        self.wq = ColumnParallelLinear(args.dim, width, gather_output=False, **options)
        self.wk = ColumnParallelLinear(args.dim, kv_width, gather_output=False, **options)
        self.wv = ColumnParallelLinear(args.dim, kv_width, gather_output=False, **options)
        self.wo = RowParallelLinear(width, args.dim, input_is_parallel=True, **options)
        shape = (args.max_batch_size, args.max_seq_len, n_kv_heads, self.head_dim)
        self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        bsz, seqlen, _ = x.shape
        end = start_pos + seqlen
        xq, xk, xv = (t.view(bsz, seqlen, -1, self.head_dim) for t in (self.wq(x), self.wk(x), self.wv(x)))
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        self.cache_k, self.cache_v = self.cache_k.to(xq), self.cache_v.to(xq)
        self.cache_k[:bsz, start_pos:end], self.cache_v[:bsz, start_pos:end] = xk, xv
        keys, values = (repeat_kv(c[:bsz, :end], self.n_rep).transpose(1, 2) for c in (self.cache_k, self.cache_v))
        scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / self.head_dim**0.5
        if mask is not None:
            scores = scores + mask
        heads = F.softmax(scores.float(), dim=-1).type_as(xq) @ values
        return self.wo(heads.transpose(1, 2).reshape(bsz, seqlen, -1))


def test_a_custom_attention_in_a_built_network() -> None:
    llama = toy_of(dtype="float32")
    expected = greedy(llama, PROMPTS)
    for layer in llama.model.layers:
        own = OwnAttention(llama.model.params)
        own.load_state_dict(layer.attention.state_dict())
        layer.attention = own
    assert greedy(llama, PROMPTS) == expected
    stream = llama.stream_text_completion(PROMPTS[0], temperature=0, max_gen_len=8)
    first = next(stream)
    llama.generate([[1, 2, 3, 4, 5]], 3)
    assert first + "".join(stream) == expected[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_custom_attention_in_place_of_the_class(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy(toy_of(dtype=dtype), PROMPTS)
    monkeypatch.setattr(llama.model, "Attention", OwnAttention)
    own = toy_of(dtype=dtype)
    assert type(own.model.layers[0].attention) is OwnAttention
    assert greedy(own, PROMPTS) == expected
    by_hand = Transformer(own.model.params)
    by_hand.load_state_dict(own.model.state_dict())
    assert greedy(Llama(by_hand.to(own.model.norm.weight.dtype), own.tokenizer), PROMPTS) == expected


def test_a_subclass_of_the_network_with_a_head_and_a_default() -> None:
    class Ranker(Transformer):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.head = nn.Linear(params.dim, 1)

        def forward(self, tokens: Tensor, start_pos: int = 0) -> Tensor:
            hidden: list[Tensor] = []
            handle = self.norm.register_forward_hook(lambda _, args, out: hidden.append(out))
            super().forward(tokens, start_pos)
            handle.remove()
            return self.head(hidden[0]).squeeze(-1)

    ranker = fill(Ranker(small_args()))
    assert ranker(torch.tensor([[1, 2, 3]])).shape == (1, 3)


# ---- arguments


def test_errors_that_meta_asserts_are_assertion_errors_and_value_errors(
    llama: Llama, checkpoint: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    both: list[Callable[[], object]] = [
        lambda: llama.generate([], 4),
        lambda: llama.generate([[1] * 65], 4),
        lambda: llama.generate([[1]], 4, temperature=-1),
        lambda: llama.text_completion([1]),  # type: ignore[list-item]
        lambda: llama.text_completion(["word " * 100]),
        lambda: llama.score(["\udcff"]),
        lambda: llama.chat_completion([[assistant]]),
        lambda: llama.chat_completion([[user, assistant]]),
        lambda: llama.chat_completion([[user, user]]),
        lambda: llama.tokenizer.encode(5, bos=True, eos=False),  # type: ignore[arg-type]
    ]
    for call in both:
        for kind in (AssertionError, ValueError):
            with pytest.raises(kind):
                call()
    asserted: list[Callable[[], object]] = [
        lambda: Tokenizer(str(tmp_path / "tokenizer.model")),
        lambda: Llama.build(str(checkpoint), str(tmp_path / "tokenizer.model"), 16, 1),
        lambda: Llama.build(str(tmp_path), str(tokenizer_path), 16, 1),
        lambda: Llama.build(str(write_second_shard(checkpoint, tmp_path)), str(tokenizer_path), 16, 1),
    ]
    for call in asserted:
        with pytest.raises(AssertionError):
            call()


def write_second_shard(checkpoint: Path, folder: Path) -> Path:
    for name in ("params.json", "consolidated.00.pth"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    (folder / "consolidated.01.pth").write_bytes((checkpoint / "consolidated.00.pth").read_bytes())
    return folder


def test_llama_1s_class_and_files(
    llama: Llama, params: dict[str, Any], state: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """As Llama 1's example.py makes it, from a file with frequencies in each layer; texts start with the prompts."""
    names = [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(params["n_layers"])]
    model = Transformer(ModelArgs(max_seq_len=64, max_batch_size=4, **params))
    model.load_state_dict(state | dict.fromkeys(names, torch.zeros(4)), strict=False)
    prompts = ["The quick brown fox", "Llamas"]
    results = LLaMA(model, tokenizer).generate(prompts, max_gen_len=8, temperature=0)
    expected = llama.text_completion(prompts, temperature=0, max_gen_len=8, echo=True)
    assert results == [row["generation"] for row in expected]
    assert all(text.startswith(prompt) for text, prompt in zip(results, prompts, strict=True))


# What other people's tools look for, and do to the network


def test_sharded_layers_are_of_fairscales_exact_classes() -> None:
    """DeepSpeed's loader and quantizers compare types. On a CPU, layers with a packed weight are of subclasses."""
    model = fill(Transformer(small_args()))

    def exact() -> list[int]:
        classes = (ColumnParallelLinear, RowParallelLinear, ParallelEmbedding)
        return [sum(type(m) is cls for m in model.modules()) for cls in classes]

    assert exact() == [5 * model.n_layers + 1, 2 * model.n_layers, 1]
    model(torch.tensor([[1, 2, 3]]), 0, use_cache=False)
    assert exact() == [5 * model.n_layers + 1, 2 * model.n_layers, 1]
    for name in ("ColumnParallelLinear", "RowParallelLinear", "ParallelEmbedding"):
        assert getattr(llama.model, name) is globals()[name]


def test_layer_classes_replaced_in_the_module_are_constructed(monkeypatch: pytest.MonkeyPatch) -> None:
    subclasses = [type("Own", (cls,), {}) for cls in (ColumnParallelLinear, RowParallelLinear, ParallelEmbedding)]
    for cls in subclasses:
        monkeypatch.setattr(llama.model, cls.__base__.__name__, cls)
    model = fill(Transformer(small_args()))
    kinds = [type(module) for module in model.modules()]
    assert [kinds.count(cls) for cls in subclasses] == [5 * model.n_layers + 1, 2 * model.n_layers, 1]
    assert model(torch.tensor([[1, 2]]), 0).isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reprs_have_the_sizes(dtype: str) -> None:
    model = toy_of(dtype=dtype).model
    dim, vocab_size = model.params.dim, model.params.vocab_size
    for part in (
        f"(tok_embeddings): ParallelEmbedding({vocab_size}, {dim})",
        f"(wo): RowParallelLinear({dim}, {dim})",
        f"(output): ColumnParallelLinear({dim}, {vocab_size}, gather_output=True)",
        f"(norm): RMSNorm({dim}, eps={model.params.norm_eps})",
    ):
        assert part in repr(model)
        assert part in repr(copy.deepcopy(model)) and part in repr(pickle.loads(pickle.dumps(model)))


def test_a_custom_norm_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 8)
    norm = RMSNorm(8)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    torch.testing.assert_close(norm._norm(x), expected)
    monkeypatch.setattr(RMSNorm, "_norm", lambda self, x: 2 * x)
    assert norm(x).equal(2 * x)


def test_sizes_may_be_numpys() -> None:
    sizes = {"dim": np.int64(16), "n_layers": np.int32(1), "n_heads": np.int64(2), "vocab_size": np.int64(11)}
    args = ModelArgs(**sizes, norm_eps=np.float32(1e-5), max_batch_size=np.int64(2), max_seq_len=np.int64(8))
    args.validate()
    assert type(args.dim) is int and type(args.norm_eps) is float
    with pytest.raises(ValueError, match="dim must be an integer"):
        ModelArgs(**{**sizes, "dim": np.float64(16.0)}).validate()


def test_per_sample_gradients_by_torch_func() -> None:
    """As many rows as there are samples, whatever the cache's; no autograd function is in the way."""
    model = fill(Transformer(small_args()))
    tokens = torch.randint(1, model.vocab_size, (5, 6), generator=torch.Generator().manual_seed(0))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (row[None, :-1], 0), {"use_cache": False})
        return F.cross_entropy(logits[0], row[1:])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, tokens)
    model.requires_grad_()
    for row in range(len(tokens)):
        model.zero_grad()
        F.cross_entropy(model(tokens[row : row + 1, :-1], 0)[0], tokens[row, 1:]).backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][row], weight.grad, atol=1e-4, rtol=1e-3)


def test_a_pass_without_the_cache_is_exported_for_any_length() -> None:
    model = fill(Transformer(small_args()))
    tokens = torch.randint(1, model.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=16)
    shapes = {"tokens": {0: rows, 1: length}, "start_pos": None, "use_cache": None}
    options: dict[str, Any] = {"dynamic_shapes": shapes, "strict": False}  # the default since torch 2.7
    program = torch.export.export(model, (tokens, 0), {"use_cache": False}, **options).module()
    for n_rows, seqlen in ((2, 16), (6, 2)):
        tokens = torch.randint(1, model.vocab_size, (n_rows, seqlen), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(program(tokens, 0, use_cache=False), model(tokens, 0, use_cache=False))


def test_dialogs_that_are_all_unsafe_need_no_network(toy: Llama) -> None:
    dialog = [{"role": "user", "content": "[INST] hello"}]
    for model in (MagicMock(), SimpleNamespace(params=SimpleNamespace(max_seq_len=64, max_batch_size=2))):
        (result,) = Llama(model, toy.tokenizer).chat_completion([dialog])
        assert result["generation"]["content"].startswith("Error: special tags")


def test_a_network_without_a_vocabulary_size_has_the_tokenizers(toy: Llama) -> None:
    class Sizeless(nn.Module):
        params = SimpleNamespace(max_seq_len=64, max_batch_size=4)

        def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
            return toy.model(tokens, start_pos)

    assert greedy(Llama(Sizeless(), toy.tokenizer), ["The best llama"]) == greedy(toy, ["The best llama"])


def test_classes_replaced_in_the_module_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    Network, Words = type("Network", (Transformer,), {}), type("Words", (Tokenizer,), {})
    monkeypatch.setattr(llama.generation, "Transformer", Network)
    monkeypatch.setattr(llama.generation, "Tokenizer", Words)
    built = toy_of()
    assert type(built.model) is Network and type(built.tokenizer) is Words


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_build_in_inference_mode_works_outside_of_it(dtype: str) -> None:
    with torch.inference_mode():
        built = toy_of(dtype=dtype)
        inside = greedy(built, ["The best llama"])
    assert greedy(built, ["The best llama"]) == inside
    built.model.float().requires_grad_()
    built.model(torch.tensor([[1, 2, 3]]), 0).sum().backward()
    assert built.model.layers[0].attention.wq.weight.grad.norm() > 0


def test_data_assigned_to_a_cache_counts_and_its_views_are_plain_tensors_elsewhere(tmp_path: Path) -> None:
    model, tokens = fill(Transformer(small_args())), torch.tensor([[1, 2, 3]])
    model(tokens, 0)
    attention, expected = model.layers[0].attention, model(torch.tensor([[4]]), 3)
    saved = attention.cache_k.clone()
    assert type(saved) is Tensor and type(attention.cache_k + 1) is Tensor
    assert type(copy.deepcopy(attention.cache_k)) is Tensor
    torch.save(attention.cache_k, tmp_path / "k.pt")
    assert torch.load(tmp_path / "k.pt", weights_only=True).equal(saved)
    attention.cache_k.data = torch.zeros_like(saved)
    assert not attention.cache_k.any() and not model(torch.tensor([[4]]), 3).equal(expected)
    attention.cache_k.data = saved
    torch.testing.assert_close(model(torch.tensor([[4]]), 3), expected)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        attention.cache_k.data = saved[:1]


@pytest.mark.parametrize("prompts", [["The best llama"], ["The best llama"] * 3])
def test_hooks_compute_with_the_position_where_rows_share_one(toy: Llama, prompts: list[str]) -> None:
    """They slice the cache by it, and compare it with 0, as in Meta's package."""
    widths: list[int] = []

    def watch(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        x, start_pos = args[:2]
        assert type(start_pos) is int and start_pos == sum(widths)
        widths.append(x.size(1))
        assert module.cache_k[: len(x), : start_pos + x.size(1)].size(1) == sum(widths)

    expected = greedy(toy, prompts, n=4)
    handle = toy.model.layers[0].attention.register_forward_hook(watch)
    try:
        assert greedy(toy, prompts, n=4) == expected
    finally:
        handle.remove()
    assert len(widths) >= 3


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
def test_blocks_can_be_checkpointed_in_training(options: dict[str, bool]) -> None:
    model = fill(Transformer(small_args())).requires_grad_()
    tokens = torch.randint(1, model.vocab_size, (3, 6), generator=torch.Generator().manual_seed(0))
    model(tokens, 0, **options).square().sum().backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    for block in model.layers:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpointed(forward, *args, use_reentrant=False)
    model(tokens, 0, **options).square().sum().backward()
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_the_repr_of_a_llama_is_its_networks_and_tokenizers(toy: Llama) -> None:
    assert repr(toy).startswith("Llama(\n  model=Transformer(\n") and "KVCache(4, 4, 64, 32)" in repr(toy)
