"""How a file's tensors reach their device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama, ModelArgs
from llama.checkpoint import loading
from llama.checkpoint.loading import load_to_device
from llama.checkpoint.reading import load_shard
from tests.checkpoint.conftest import MAPS, mapped_file
from tests.conftest import ROOT

CPU = torch.device("cpu")


def test_both_errors_are_raised_under_python_o(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        (tmp_path / "two" / name).touch()
    code = f"""
assert not __debug__, "has no effect under -O"
from llama import Llama
for folder in ("none", "two"):
    try:
        Llama.build({str(tmp_path)!r} + "/" + folder, {str(tokenizer_path)!r}, 8, 1)
    except AssertionError as error:
        print(str(error).splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"no checkpoint files found in {tmp_path}/none",
        "Loading a checkpoint for MP=2 but world size is 1",
    ], done.stderr


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc, to see what lies behind an address")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moved_tensors_are_copies_in_the_new_dtype(
    one_file: Callable[..., Path], args: ModelArgs, state: dict[str, Tensor], dtype: torch.dtype
) -> None:
    path = one_file()
    shard = load_shard(path, args, 1)
    mapped = dict(shard)
    load_to_device(shard, device=CPU, dtype=dtype)
    for name, tensor in shard.items():
        assert torch.equal(tensor, state[name].to(dtype))
        assert mapped_file(tensor.data_ptr()) != str(path)
        assert torch.equal(mapped[name], state[name])  # what was given back is read from the file again


class FakeEvent:
    """Stands in for a CUDA event: the copy that it was recorded behind is over once it was waited for."""

    recorded = 0

    def __init__(self) -> None:
        self.pending = False

    def record(self, stream: object) -> None:
        self.pending = True
        FakeEvent.recorded += 1

    def synchronize(self) -> None:
        self.pending = False


@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (64,), (3, 50)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_staging_copies_every_byte(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tensors smaller and larger than its buffers, contiguous and not; on the CPU, with CUDA's parts stood in for."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **kwargs: empty(*sizes, **kwargs))
    copy = loading._PinnedCopy(torch.device("cpu"), buffer_bytes=64)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for source in (tensor, tensor.t() if tensor.dim() == 2 else tensor, tensor):
        FakeEvent.recorded = 0
        copied = copy(source)
        assert torch.equal(copied, source) and copied.dtype == dtype and copied.data_ptr() != source.data_ptr()
        assert FakeEvent.recorded == -(-tensor.nbytes // 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_beyond_float16_is_refused_at_load(
    one_file: Callable[..., Path], tokenizer_path: Path, dtype: Any
) -> None:
    """It became infinite, and every answer NaN, without a word."""
    weight = torch.zeros(64)
    weight[3] = -1e5
    path = one_file({"layers.1.ffn_norm.weight": weight.to(dtype)})
    build = partial(Llama.build, path.parent, tokenizer_path, max_seq_len=8, max_batch_size=1, device="cpu")
    message = r"layers\.1\.ffn_norm\.weight must have values within float16's range, got 99\d+|got 100000"
    with pytest.raises(ValueError, match=message):
        build(dtype="float16")
    build(dtype="bfloat16")


def test_the_largest_values_of_float16_are_taken(one_file: Callable[..., Path]) -> None:
    largest = torch.full((64,), torch.finfo(torch.float16).max)
    path = one_file({"norm.weight": largest})
    shard = {"norm.weight": torch.load(path)["norm.weight"], "inf": torch.tensor([torch.inf, 1.0])}
    load_to_device(shard, device=CPU, dtype=torch.float16)
    assert torch.equal(shard["norm.weight"].float(), largest)
