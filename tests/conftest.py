"""Fixtures: a small tokenizer, small random checkpoints, and models built from them."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Tokenizer
from tests.support import oracle
from tests.support.tokenizers import INFILLING_PIECES, train
from tests.support.tokenizers import TEXT as TEXT

ROOT = Path(__file__).parent.parent
# What `pytest -m core` runs: the network, its kernels, the engine and the calls, without other processes.
CORE = (
    *("test_model.py", "test_model_args.py", "test_generation.py", "test_inputs.py", "test_sampling_params.py"),
    *("test_chat.py", "test_tokenizer.py", "test_detokenizer.py", "test_architecture.py", "layers/test_linear.py"),
    *("layers/test_quantize.py", "checkpoint/test_format.py", "engine/test_engine.py"),
    *("engine/test_sampling.py", "engine/test_runner.py", "engine/test_streaming.py"),
    *("engine/test_cuda_graphs.py", "serving/test_protocol.py", "serving/test_jobs.py", "serving/test_service.py"),
)
VOCAB_SIZE = 512
# A shell's background job starts with Ctrl-C ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
torch.set_num_threads(1)  # the networks are so small that a second thread only waits for the first
# Grouped-query attention, a scaled hidden size, and counts that 1, 2 and 4 ranks can share.
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    others = {"fuzz", "soak", "clients", "faults", "gpu"}
    for item in items:
        place = item.path.relative_to(ROOT / "tests").as_posix()
        if place in CORE and others.isdisjoint(mark.name for mark in item.iter_markers()) and "ranks" not in item.name:
            item.add_marker("core")


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model of 512 pieces with Llama 2's settings: byte fallback, split digits, dummy prefix."""
    return train(tmp_path_factory.mktemp("tokenizer") / "tokenizer", VOCAB_SIZE)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session", params=["control_symbols", "user_defined_symbols"])
def code_tokenizer_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with Code Llama's infilling pieces: as control pieces, and as pieces that have a text."""
    with_text = ["\u263a", "<step>"]
    options = {"user_defined_symbols": with_text} | {request.param: INFILLING_PIECES}
    options["user_defined_symbols"] = [*dict.fromkeys([*options["user_defined_symbols"], *with_text])]
    return train(tmp_path_factory.mktemp("tokenizer") / "tokenizer", VOCAB_SIZE, **options)


@pytest.fixture(scope="session")
def code_tokenizer(code_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(code_tokenizer_path)


@pytest.fixture(scope="session")
def params(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of the random checkpoint's params.json."""
    return PARAMS | {"vocab_size": tokenizer.n_words}


@pytest.fixture(scope="session")
def state(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The random checkpoint's whole, unsplit tensors, float32."""
    return oracle.random_state(params, seed=0)


@pytest.fixture(scope="session")
def write_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, Any], dict[str, torch.Tensor], int], Path]:
    """Writes a checkpoint folder: params.json and as many consolidated.NN.pth as asked for."""

    def write(params: dict[str, Any], state: dict[str, torch.Tensor], model_parallel_size: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        (folder / "params.json").write_text(json.dumps(params))
        for rank in range(model_parallel_size):
            torch.save(oracle.shard(state, rank, model_parallel_size), folder / f"consolidated.{rank:02d}.pth")
        return folder

    return write


@pytest.fixture(scope="session")
def split_checkpoint(
    write_checkpoint: Callable[..., Path], params: dict[str, Any], state: dict[str, torch.Tensor]
) -> Callable[[int], Path]:
    """Writes the random checkpoint in so many files, into a folder of its own."""
    return lambda n_files: write_checkpoint(params, state, n_files)


@pytest.fixture(scope="session")
def checkpoint_in(split_checkpoint: Callable[[int], Path]) -> Callable[[int], Path]:
    """Gives the folder of the random checkpoint in so many files, which no test may change."""
    return functools.cache(split_checkpoint)


@pytest.fixture(scope="session")
def checkpoint(checkpoint_in: Callable[[int], Path]) -> Path:
    """The random checkpoint in one file."""
    return checkpoint_in(1)


@pytest.fixture(scope="session")
def small_checkpoint(write_checkpoint: Callable[..., Path], params: dict[str, Any]) -> Path:
    """One so small that thousands of calls take seconds."""
    small = params | {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    return write_checkpoint(small, oracle.random_state(small, seed=2))


@pytest.fixture(scope="session")
def llama(checkpoint: Path, tokenizer_path: Path) -> Llama:
    """The random checkpoint, in float32 on the CPU, with a cache of 4 rows of 64 tokens. Pass `seed=` when sampling."""
    return Llama.build(checkpoint, tokenizer_path, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")
