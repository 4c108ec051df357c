"""What you see is what runs: hooks, edits, replaced modules, gradients and threads count, whatever the fast path.

Each contract is tested for every build: the packed and the unpacked bfloat16 ones of a CPU, float32, and the steps that
CUDA takes, eager and captured, as far as they run on a CPU. Tests compare with the oracle on weights with which the
plain network would compute the same, for example a hook that multiplies an output by four with a weight four times as
large; and each of them makes sure that the unedited weights would not have passed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoint import loading
from llama.layers.kernels import can_quantize
from tests.support import oracle
from tests.support.builds import BUILDS, MAX_SEQ_LEN, SMALL, Built
from tests.support.cuda_graph import RecordedStepper


@pytest.fixture(scope="module")
def small(params: dict[str, Any]) -> dict[str, Any]:
    return params | SMALL


@pytest.fixture(scope="module")
def folders(write_checkpoint: Callable[..., Path], small: dict[str, Any]) -> dict[torch.dtype, Path]:
    """The same random weights, in files of two dtypes."""
    state = oracle.random_state(small, seed=4)
    for name in state:
        if "wq" in name or "wk" in name:
            state[name] *= 1.5  # attention that is sharp enough for a change of it to show
    dtypes = (torch.float32, torch.float16)
    return {dtype: write_checkpoint(small, {name: w.to(dtype) for name, w in state.items()}) for dtype in dtypes}


@pytest.fixture(scope="module")
def make(folders: dict[torch.dtype, Path], tokenizer_path: Path, small: dict[str, Any]) -> Callable[[str], Built]:
    def build_one(name: str) -> Built:
        build = BUILDS[name]
        if build.quantize and not can_quantize(torch.device("cpu")):
            pytest.skip("needs a CPU with int8 products (VNNI)")
        with pytest.MonkeyPatch.context() as patch:
            if build.kernels is not None:
                patch.setattr(loading, "measure_kernels", lambda *_, **__: build.kernels)
            llama = Llama.build(
                folders[build.file_dtype],
                tokenizer_path,
                MAX_SEQ_LEN,
                build.max_batch_size,
                device="cpu",
                dtype=build.dtype,
                quantize=build.quantize,
            )
        llama.tokenizer.eos_id = -1  # no row ends early
        if build.stepper is not None:
            llama.stepper = build.stepper(llama.model)
        built = Built(build, llama, small)
        built.assert_unedited()  # from here on, what is captured is captured
        if isinstance(llama.stepper, RecordedStepper):
            assert llama.stepper.n_replayed, "nothing was replayed, so that the tests would show nothing"
        return built

    return build_one


@pytest.fixture(params=BUILDS)
def built(request: pytest.FixtureRequest, make: Callable[[str], Built]) -> Built:
    return make(request.param)
