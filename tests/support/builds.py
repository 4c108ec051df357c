"""Ways to build a small network, and what to compare it with, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama, Transformer
from llama.engine.cuda_graphs import StaticStepper
from llama.layers.kernels import Kernels, can_pack
from tests.support import oracle
from tests.support.cuda_graph import RecordedStepper

SMALL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-8,  # so little that scaling a norm's input is nothing but that
}
MAX_SEQ_LEN = 32
PROMPTS = [[5, 17, 9], [300, 44, 21, 8, 77, 5, 123], [60, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1, 99], [12, 410], [7] * 6]
N_NEW = 3
# Of log-probabilities, against the oracle in float32 with the same weights.
TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}


@cache
def packs() -> bool:
    """Whether this CPU packs. Not asked at import: ranks are forked, and threads of torch do not survive that."""
    return can_pack(torch.device("cpu"), torch.bfloat16)


@dataclass(frozen=True)
class Build:
    """One way to build the network.

    Attributes:
        kernels: what the probe of the processor finds; None for what it finds here.
    """

    dtype: str
    max_batch_size: int = 4
    file_dtype: torch.dtype = torch.float32
    kernels: Kernels | None = None
    stepper: Callable[[Transformer], StaticStepper] | None = None
    quantize: str | None = None


BUILDS = {
    "bfloat16, four rows": Build("bfloat16"),
    "bfloat16, one row": Build("bfloat16", 1, kernels=Kernels()),
    "bfloat16, one packed row": Build("bfloat16", 1, kernels=Kernels(True, True, packs_one_row=True)),
    "bfloat16 from a float16 file": Build("bfloat16", file_dtype=torch.float16),
    "float32": Build("float32"),
    "static steps": Build("float32", stepper=lambda model: StaticStepper(model, graphs=False)),
    "captured steps": Build("float32", stepper=RecordedStepper),
    "int8": Build("float32", quantize="int8"),
}


@dataclass
class Built:
    """A network that was built, and what to compare it with."""

    build: Build
    llama: Llama
    params: dict[str, Any]

    def __post_init__(self) -> None:
        self.original = self.weights()

    @property
    def model(self) -> Any:
        return self.llama.model

    @model.setter
    def model(self, model: Any) -> None:
        self.llama.model = model

    @property
    def dtype(self) -> torch.dtype:
        """That of the computation; other weights may have the file's."""
        return next(self.model.norm.parameters()).dtype

    @property
    def tolerance(self) -> float:
        return TOLERANCES[torch.bfloat16 if self.build.quantize else self.dtype]

    def weights(self) -> oracle.State:
        """Copies of the weights that `state_dict()` shows, rounded to the dtype of the computation."""
        return {name: w.detach().clone().to(self.dtype).float() for name, w in self.model.state_dict().items()}

    def assert_computes(self, weights: oracle.State) -> None:
        """Prefill and decoding give the oracle's log-probabilities, and would not have done so with the original."""
        tolerance = self.tolerance
        got, expected, unedited = self._logprobs(), self._expected(weights), self._expected(self.original)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
        for place, what in ((slice(1), "prefill"), (slice(1, None), "decoding")):
            gap = (got[:, place] - unedited[:, place]).abs().max()
            assert gap > 2 * tolerance, f"the test shows nothing about {what}: the edit changes {gap:.3f} at most"

    def assert_unedited(self) -> None:
        got = self._logprobs()
        torch.testing.assert_close(got, self._expected(self.original), rtol=0, atol=self.tolerance)

    def _logprobs(self) -> Tensor:
        """Those of the greedy tokens, (bsz, N_NEW)."""
        tokens, logprobs = self.llama.generate(PROMPTS, N_NEW, temperature=0, logprobs=True)
        assert logprobs is not None and [len(row) for row in tokens] == [N_NEW] * len(PROMPTS)
        self._tokens = tokens
        return torch.tensor(logprobs)

    def _expected(self, weights: oracle.State) -> Tensor:
        rows = [torch.tensor([*prompt, *new[:-1]]) for prompt, new in zip(PROMPTS, self._tokens, strict=True)]
        logits = oracle.logits(weights, self.params, nn.utils.rnn.pad_sequence(rows, batch_first=True))
        ends = [logits[i, len(row) - N_NEW : len(row)].log_softmax(-1) for i, row in enumerate(rows)]
        return torch.stack([end[range(N_NEW), new] for end, new in zip(ends, self._tokens, strict=True)])


def scaled(state: oracle.State, names: str, by: float) -> oracle.State:
    """The state with all weights multiplied whose names begin with one of these words."""
    return {name: w * by if name.startswith(tuple(names.split())) else w for name, w in state.items()}


def stream_scaled(state: oracle.State, n_blocks: int, by: float) -> oracle.State:
    """As if the residual stream were multiplied in front of block `n_blocks`: norms keep the blocks before alike."""
    names = [f"layers.{i}.{name}" for i in range(n_blocks) for name in ("attention.wo", "feed_forward.w2")]
    return scaled(state, " ".join(["tok_embeddings", *names]), by)


FACTOR = 4.0  # exact in every dtype
LINEAR = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
LINEAR += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
Equal = Callable[[oracle.State], oracle.State]


def output_cases() -> dict[str, tuple[float, Equal]]:
    """For each module a factor for its output, and the weights that do the same; of the blocks, for one alone."""
    cases: dict[str, tuple[float, Equal]] = {
        "": (FACTOR, lambda state: scaled(state, "output", FACTOR)),
        "tok_embeddings": (FACTOR, lambda state: scaled(state, "tok_embeddings", FACTOR)),
        "layers.0": (FACTOR, lambda state: stream_scaled(state, 1, FACTOR)),
        "layers.1": (-1.0, lambda state: scaled(state, "norm", -1.0)),
        "norm": (FACTOR, lambda state: scaled(state, "norm", FACTOR)),
        "output": (FACTOR, lambda state: scaled(state, "output", FACTOR)),
    }
    same_as = {name: name for name in (*LINEAR, "attention_norm", "ffn_norm")}
    same_as |= {"attention": "attention.wo", "attention.cache": "attention.wo", "feed_forward": "feed_forward.w2"}
    for name, weight in same_as.items():
        cases[f"layers.1.{name}"] = (FACTOR, lambda state, w=f"layers.1.{weight}.": scaled(state, w, FACTOR))
    return cases


def times(by: float, out: Any) -> Any:
    """A module's output times a factor; of a KV cache, the values to attend to."""
    return (out[0], by * out[1]) if isinstance(out, tuple) else by * out


def input_cases() -> dict[str, tuple[float, Equal]]:
    """For each module a factor for its input, and the weights that do the same. Tokens are added to instead."""
    cases: dict[str, tuple[float, Equal]] = {
        "": (1, lambda state: state | {"tok_embeddings.weight": state["tok_embeddings.weight"].roll(-1, 0)}),
        "layers.0": (FACTOR, lambda state: stream_scaled(state, 0, FACTOR)),
        "layers.1": (FACTOR, lambda state: stream_scaled(state, 1, FACTOR)),
        "norm": (-1.0, lambda state: scaled(state, "norm", -1.0)),
        "output": (FACTOR, lambda state: scaled(state, "output", FACTOR)),
    }
    cases["tok_embeddings"] = cases[""]
    same_as = {name: (FACTOR, [name]) for name in LINEAR}
    same_as |= {"attention_norm": (-1.0, ["attention_norm"]), "ffn_norm": (-1.0, ["ffn_norm"])}
    same_as |= {"attention": (FACTOR, ["attention.wq", "attention.wk", "attention.wv"])}
    same_as |= {"attention.cache": (FACTOR, ["attention.wk"])}
    same_as |= {"feed_forward": (FACTOR, ["feed_forward.w1", "feed_forward.w3"])}
    for name, (by, weights) in same_as.items():
        names = " ".join(f"layers.1.{weight}." for weight in weights)
        cases[f"layers.1.{name}"] = (by, lambda state, names=names, by=by: scaled(state, names, by))
    return cases


def skip_rounded(built: Built) -> None:
    if built.build.quantize:
        pytest.skip("sharper attention multiplies the errors of int8; test_quantize.py has its own test of hooks")


def changed_input(args: tuple[Any, ...], by: float) -> tuple[Any, ...]:
    if args[0].dtype == torch.int64:
        return ((args[0] + 1) % 512, *args[1:])
    return (by * args[0], *args[1:])


class LoRA(nn.Module):
    """base(x) + x A^T B^T, as adapters are written."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        n_out, n_in = base.weight.shape
        generator = torch.Generator().manual_seed(n_out)
        self.base = base
        self.a = nn.Parameter(torch.randn((rank, n_in), generator=generator) / n_in**0.5)
        self.b = nn.Parameter(torch.randn((n_out, rank), generator=generator) / rank**0.5)

    def delta(self) -> Tensor:
        return (self.b @ self.a).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def patched(forward: Callable[..., Any], by: float) -> Callable[..., Any]:
    return lambda *args, **kwargs: times(by, forward(*args, **kwargs))
