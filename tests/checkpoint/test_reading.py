"""Which files are read, and what of damaged or foreign files is refused."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama, ModelArgs
from llama.checkpoint.format import shard_dim, tensor_shapes
from llama.checkpoint.loading import load_to_device
from llama.checkpoint.reading import find_shards, list_shards, load_shard, model_args, read_shard
from llama.checkpoint.sharded import ShardedCheckpoint
from tests.checkpoint.conftest import MAPS, mapped_file

CPU = torch.device("cpu")


def test_files_come_in_rank_order(tmp_path: Path) -> None:
    for rank in random.Random(0).sample(range(8), 8):
        (tmp_path / f"consolidated.{rank:02d}.pth").touch()
    for other in ("params.json", "tokenizer.model", "checklist.chk", "consolidated.00.pth.part"):
        (tmp_path / other).touch()
    names = [f"consolidated.{rank:02d}.pth" for rank in range(8)]
    assert [path.name for path in find_shards(tmp_path, 8)] == names
    assert [path.name for path in list_shards(str(tmp_path))] == names


def test_a_folder_without_files_word_for_word(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "consolidated.00.safetensors").touch()
    for folder in (tmp_path, tmp_path / "missing", f"{tmp_path}/"):
        with pytest.raises(AssertionError) as caught:
            Llama.build(folder, tokenizer_path, max_seq_len=8, max_batch_size=1, device="cpu")
        assert str(caught.value).splitlines()[0] == f"no checkpoint files found in {folder}"


@pytest.mark.parametrize(("files", "ranks"), [(2, 1), (8, 1), (1, 2), (2, 8)])
def test_a_number_of_files_that_is_not_the_world_size_word_for_word(tmp_path: Path, files: int, ranks: int) -> None:
    for rank in range(files):
        (tmp_path / f"consolidated.{rank:02d}.pth").touch()
    with pytest.raises(AssertionError) as caught:
        find_shards(tmp_path, ranks)
    first, hint = str(caught.value).splitlines()
    assert first == f"Loading a checkpoint for MP={files} but world size is {ranks}"
    assert f"--nproc_per_node {files}" in hint


def test_files_that_do_not_belong_to_the_checkpoint_are_named(tmp_path: Path) -> None:
    """Two files where one belongs were met with the advice to start two processes."""
    for name in ("consolidated.00.pth", "consolidated.00 (1).pth", "optimizer.pth"):
        (tmp_path / name).touch()
    with pytest.raises(AssertionError) as caught:
        find_shards(tmp_path, 1)
    first, hint = str(caught.value).splitlines()
    assert first == "Loading a checkpoint for MP=3 but world size is 1"
    assert "nproc_per_node" not in hint
    assert "'consolidated.00 (1).pth', 'optimizer.pth' are not named consolidated.NN.pth" in hint


def test_a_hugging_face_folder_is_met_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    with pytest.raises(AssertionError, match=f"got a Hugging Face folder; convert it .*from_hf --hf_dir '{folder}' "):
        list_shards(folder)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").touch()
    with pytest.raises(AssertionError, match=f"consolidated.00.pth, which is {folder}/original"):
        list_shards(folder)


def test_what_stands_for_a_file_that_was_not_downloaded(
    split_checkpoint: Callable[[int], Path], params: dict[str, Any], tokenizer_path: Path
) -> None:
    folder = split_checkpoint(1)
    build = partial(Llama.build, folder, tokenizer_path, max_seq_len=8, max_batch_size=1, device="cpu")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    for name in ("consolidated.00.pth", "params.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_text(pointer)
        with pytest.raises(ValueError, match=f"{name} must be the file itself, got a Git LFS pointer .*; run git lfs"):
            build()
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "gone")
        with pytest.raises(FileNotFoundError, match=f"{name} must be a file, got a link to .*gone, which does not exi"):
            build()
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_text(pointer)
    with pytest.raises(ValueError, match=r"tokenizer\.model must be the file itself, got a Git LFS pointer"):
        Llama.build(folder, tokenizer, max_seq_len=8, max_batch_size=1, device="cpu")


def test_hidden_files_and_folders_do_not_count(split_checkpoint: Callable[[int], Path], tokenizer_path: Path) -> None:
    """macOS writes a ._consolidated.00.pth beside each file that it copies to a foreign disk."""
    folder = split_checkpoint(1)
    (folder / "._consolidated.00.pth").write_bytes(b"\0\5\x16\7" + bytes(100))
    (folder / "older.pth").mkdir()
    Llama.build(folder, tokenizer_path, max_seq_len=8, max_batch_size=1, device="cpu")


def test_a_file_copied_over_another_is_refused(split_checkpoint: Callable[[int], Path], params: dict[str, Any]) -> None:
    """Two ranks with the same part of the weights gave text without sense, and no error."""
    folder = split_checkpoint(2)
    sizes = {"max_batch_size": 1, "max_seq_len": 8}
    model_args(folder, params["vocab_size"], **sizes)
    (folder / "consolidated.01.pth").write_bytes((folder / "consolidated.00.pth").read_bytes())
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth must hold .*, got a copy of consolidated\.00\.pth"):
        model_args(folder, params["vocab_size"], **sizes)
    with pytest.raises(ValueError, match=r"got a copy of consolidated\.00\.pth"):
        ShardedCheckpoint(folder)


@pytest.mark.parametrize("n_layers", [2_000_000, 2**62])
def test_more_layers_than_any_network_has_are_refused_before_anything_is_planned(
    write_checkpoint: Callable[..., Path],
    params: dict[str, Any],
    state: dict[str, Tensor],
    tokenizer_path: Path,
    n_layers: int,
) -> None:
    """A list of that many tensors' shapes would take minutes and gigabytes."""
    folder = write_checkpoint(params | {"n_layers": n_layers}, state)
    with pytest.raises(ValueError, match=rf"params\.json: n_layers must be .* below 10,000, got {n_layers}"):
        Llama.build(folder, tokenizer_path, max_seq_len=8, max_batch_size=1, device="cpu")


def test_every_rank_finds_that_another_ranks_file_is_cut_short(
    split_checkpoint: Callable[[int], Path], params: dict[str, Any]
) -> None:
    """Before the ranks meet: one that failed alone would leave the others waiting."""
    path = split_checkpoint(2) / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} cannot be read .* is it cut short\?"):
        model_args(path.parent, params["vocab_size"], max_batch_size=1, max_seq_len=1)


@pytest.mark.parametrize("files", [1, 2, 4])
def test_split_files_are_accepted_and_joined_are_the_whole(
    split_checkpoint: Callable[[int], Path], args: ModelArgs, state: dict[str, Tensor], files: int
) -> None:
    folder = split_checkpoint(files)
    shards = [load_shard(path, args, files) for path in find_shards(folder, files)]
    for name, whole in state.items():
        parts = [shard[name] for shard in shards]
        axis = shard_dim(name)
        if axis is None:
            assert all(torch.equal(part, whole) for part in parts)
        else:
            assert torch.equal(torch.cat(parts, axis), whole)


def test_llama_1s_frequencies_are_taken_like_rope_freqs(one_file: Callable[..., Path], args: ModelArgs) -> None:
    names = [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(args.n_layers)]
    path = one_file(dict.fromkeys(names, torch.zeros(args.head_dim // 2)))
    assert load_shard(path, args, 1).keys() == tensor_shapes(args, 1).keys()
    checkpoint = ShardedCheckpoint(path.parent)
    assert list(checkpoint.layout)[-args.n_layers :] == names
    with pytest.raises(ValueError, match=r"but has layers\.0\.attention\.rope\.freqs$"):
        load_shard(one_file({"layers.0.attention.rope.freqs": torch.zeros(4)}), args, 1)


def test_rope_freqs_is_the_one_known_extra(one_file: Callable[..., Path], args: ModelArgs) -> None:
    for freqs in (torch.ones(4), torch.ones(4, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int64)):
        loaded = load_shard(one_file({"rope.freqs": freqs}), args, 1)
        assert loaded.keys() == tensor_shapes(args, 1).keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"must hold the tensors that params\.json describes, but lacks norm\.weight$"),
        (
            {f"layers.{i}.ffn_norm.weight": None for i in range(3)} | {"output.weight": None},
            r"lacks (\S+, ){2}\S+ and 1 more",
        ),
        ({"norm.bias": torch.ones(64)}, r"must hold no other tensors .*, but has norm\.bias$"),
        ({"layers.3.ffn_norm.weight": torch.ones(64)}, r"but has layers\.3\.ffn_norm\.weight$"),
        ({"rope.freqs.inv": torch.ones(4)}, r"but has rope\.freqs\.inv$"),
        (
            {"layers.1.attention.wk.weight": torch.ones(64, 64)},
            r"must have the shapes .*, got layers\.1\.attention\.wk\.weight of \(64, 64\), not \(32, 64\)",
        ),
        ({"norm.weight": torch.ones(())}, r", got norm\.weight of \(\), not \(64,\)"),
        (
            {"norm.weight": torch.ones(64, dtype=torch.int8)},
            r"dense tensors of float16 or bfloat16 or float32, got norm\.weight \(torch\.int8,",
        ),
        ({"norm.weight": torch.ones(64, dtype=torch.bool)}, r"dense .*, got norm\.weight \(torch\.bool,"),
        ({7: torch.ones(1)}, r"but has 7$"),
    ],
)
def test_tensors_that_do_not_fit_the_network_are_refused(
    one_file: Callable[..., Path], args: ModelArgs, changes: dict[Any, Tensor | None], message: str
) -> None:
    path = one_file(changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}.*{message}"):
        load_shard(path, args, 1)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], torch.ones(1), {"model": {"a": torch.ones(1)}}, {"a": torch.ones(1), "step": 5}, {}, None],
    ids=repr,
)
def test_what_is_no_flat_dict_of_tensors_is_refused(tmp_path: Path, args: ModelArgs, content: object) -> None:
    path = tmp_path / "consolidated.00.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth must hold (a flat dict of|the) tensors"):
        load_shard(path, args, 1)


def test_a_file_cut_short_is_refused_wherever_it_is_cut(one_file: Callable[..., Path]) -> None:
    path = one_file()
    whole = path.read_bytes()
    rng = random.Random(0)
    for n in [0, 2, 5000, 30000, len(whole) - 1, *(rng.randrange(80000, len(whole)) for _ in range(15))]:
        path.write_bytes(whole[:n])
        hint = r".*; is it cut short\?" if n < 5000 or n > 80000 else ""
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} cannot be read{hint}"):
            read_shard(path)


def test_a_file_of_the_format_before_zip_is_refused(tmp_path: Path) -> None:
    """It cannot be mapped; no checkpoint of Llama has it."""
    path = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(8)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} .*must be a zip archive, .* since torch 1\.6"):
        read_shard(path)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "consolidated.00.pth"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must be a regular file, got a folder, pipe or"):
        read_shard(path)


def test_a_folder_does_not_count_as_a_file_of_the_checkpoint(one_file: Callable[..., Path]) -> None:
    path = one_file()
    (path.parent / "backup.pth").mkdir()
    assert find_shards(path.parent, 1) == [path]
    path.unlink()
    with pytest.raises(AssertionError, match="no checkpoint files found"):
        list_shards(path.parent)


@pytest.mark.parametrize("folder", [7, None, True, b"x", ["x"]])
def test_what_is_no_path_is_refused(folder: Any) -> None:
    with pytest.raises(ValueError, match=rf"^ckpt_dir must be the path of a folder, got {re.escape(repr(folder))}$"):
        list_shards(folder)


def test_names_of_tensors_in_errors_are_short_and_printable(one_file: Callable[..., Path], args: ModelArgs) -> None:
    with pytest.raises(ValueError, match=r"but has \\x1b\[2J") as caught:
        load_shard(one_file({"\x1b[2J" + "x" * 100_000: torch.ones(1)}), args, 1)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500 + len(str(args))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the environment asks torch to trust files; nor does the error advise to trust this one."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trace = tmp_path / "consolidated.00.pth", tmp_path / "trace"
    torch.save({"norm.weight": torch.ones(1), "x": Touch(trace)}, path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} ") as caught:
        read_shard(path)
    assert "weights_only" not in str(caught.value) and not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have run


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc, to see what lies behind an address")
def test_a_loaded_file_is_mapped_and_not_copied(one_file: Callable[..., Path], args: ModelArgs) -> None:
    path = one_file()
    shard = load_shard(path, args, 1)
    load_to_device(shard, device=CPU, dtype=torch.float32)  # which they have
    assert {mapped_file(tensor.data_ptr()) for tensor in shard.values()} == {str(path)}


def test_changes_of_loaded_tensors_do_not_reach_the_file(one_file: Callable[..., Path], args: ModelArgs) -> None:
    path = one_file()
    before = path.read_bytes()
    shard = load_shard(path, args, 1)
    for tensor in shard.values():
        tensor.zero_()
    del shard
    assert path.read_bytes() == before


def test_a_tensor_wider_than_its_storage_does_no_harm(tmp_path: Path) -> None:
    """A file can hold one number that is repeated to a whole matrix: in memory, it is one number too."""
    path = tmp_path / "consolidated.00.pth"
    args = ModelArgs(dim=1024, n_layers=1, n_heads=8, vocab_size=4096)
    torch.save({name: torch.ones(1).expand(shape) for name, shape in tensor_shapes(args, 1).items()}, path)
    shard = load_shard(path, args, 1)
    load_to_device(shard, device=CPU, dtype=torch.bfloat16)
    assert all((tensor == 1).all() for tensor in shard.values())
