"""`params.json`, and the names and shapes of tensors."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import ModelArgs
from llama.checkpoint.format import read_params, tensor_shapes
from llama.checkpoint.reading import model_args
from tests.support import oracle
from tests.test_model_args import RELEASED


def write_params(folder: Path, params: object) -> Path:
    text = params if isinstance(params, str | bytes) else json.dumps(params)
    (folder / "params.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_every_released_key_is_known(tmp_path: Path) -> None:
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": -1}
    params = sizes | {"multiple_of": 16, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-06, "rope_theta": 1000000}
    assert read_params(write_params(tmp_path, params)) == params
    args = model_args(str(tmp_path), 500, max_batch_size=3, max_seq_len=7)
    assert args == ModelArgs(**(params | {"vocab_size": 500}), max_batch_size=3, max_seq_len=7)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_both_sizes(tmp_path: Path) -> None:
    write_params(tmp_path, {"vocab_size": 32000})
    with pytest.raises(
        ValueError, match=r"params\.json: vocab_size must be .*, got 32000 where the tokenizer has 32016 pieces"
    ):
        model_args(tmp_path, 32016, max_batch_size=1, max_seq_len=1)
    assert model_args(tmp_path, 32000, max_batch_size=1, max_seq_len=1).vocab_size == 32000


def test_rows_beyond_the_tokenizers_pieces_are_taken(tmp_path: Path) -> None:
    """Fine-tunes add tokens, and pad their number to a multiple of 64."""
    write_params(tmp_path, {"dim": 64, "n_heads": 8})
    assert model_args(tmp_path, 123, max_batch_size=1, max_seq_len=1).vocab_size == 123
    write_params(tmp_path, {"vocab_size": 32064})
    assert model_args(tmp_path, 32001, max_batch_size=1, max_seq_len=1).vocab_size == 32064
    write_params(tmp_path, {"dim": 64, "n_heads": 8, "n_layers": 1})
    torch.save({"tok_embeddings.weight": torch.zeros(40, 64)}, tmp_path / "consolidated.00.pth")
    assert model_args(tmp_path, 37, max_batch_size=1, max_seq_len=1).vocab_size == 40


def test_a_byte_order_mark_is_taken(tmp_path: Path) -> None:
    assert read_params(write_params(tmp_path, '\ufeff{"dim": 64}')) == {"dim": 64}


def test_keys_of_another_architecture_are_not_advised_to_be_removed(tmp_path: Path) -> None:
    write_params(tmp_path, {"dim": 64, "use_scaled_rope": True})
    with pytest.raises(ValueError, match=r"got 'use_scaled_rope'; this library runs .* belong to another one") as error:
        read_params(tmp_path)
    assert "remove" not in str(error.value)


def test_params_that_are_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "params.json").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(FileNotFoundError, match=r"params\.json must be a file, got a link to .*gone, which does not"):
        read_params(tmp_path)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": 64, "n_head": 8}, r"keys must be among dim, .*, got 'n_head'; "),
        ({"b": 1, "a": 2}, r"keys must be .*, got 'a', 'b'; "),
        ({"max_seq_len": 64}, r"keys must be .*, got 'max_seq_len'"),
        ("", r"must be JSON, got an error: "),
        ('{"dim": 64', r"must be JSON, got an error: "),
        ([{"dim": 64}], r"must hold a JSON object, got list;"),
        ("null", r"must hold a JSON object, got NoneType;"),
        ("[" * 100_000, r"must be JSON, got an error: "),
        ('{"a":' * 100_000, r"must be JSON, got an error: "),
        ('{"dim": ' + "9" * 5000 + "}", r"must be JSON, got an error: "),
        (b"\xff\xfe{\x00}\x00", r"must be JSON"),
        ({"dim": "4096"}, r"dim must be an integer, got '4096'"),
        ('{"rope_theta": NaN}', r"rope_theta must be above 0 .*, got nan"),
        ({"n_heads": 8, "n_kv_heads": 3}, r"n_heads=8 must be a multiple of n_kv_heads=3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_file_of_params_is_refused(tmp_path: Path, params: object, message: str) -> None:
    """With its name; a wrong value, with its key."""
    write_params(tmp_path, params)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/params\.json:? {message}"):
        model_args(tmp_path, 512, max_batch_size=1, max_seq_len=1)


def test_a_file_of_params_of_many_megabytes_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.json must have at most 4194304 bytes, got 5000011"):
        read_params(write_params(tmp_path, json.dumps({"dim": "x" * 5_000_000})))


def test_unknown_keys_in_errors_are_short_and_printable(tmp_path: Path) -> None:
    write_params(tmp_path, {"\x1b[2J": 1, "y" * 100_000: 2, "z": 3, "zz": 4})
    with pytest.raises(ValueError, match=r"got '\\x1b\[2J', 'yyy.* \(100000 characters\), 'z' and 1 more;") as caught:
        read_params(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_missing_file_of_params_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^no params\.json in {re.escape(str(tmp_path))};"):
        read_params(tmp_path)


@pytest.mark.parametrize("name", ["max_batch_size", "max_seq_len"])
def test_a_wrong_size_of_the_run_is_not_put_down_to_the_file(tmp_path: Path, name: str) -> None:
    write_params(tmp_path, {"dim": 64, "n_heads": 8})
    with pytest.raises(ValueError, match=rf"^{name} must be above 0 .*, got 0"):
        model_args(tmp_path, 512, **({"max_batch_size": 1, "max_seq_len": 1} | {name: 0}))


def random_params(rng: random.Random) -> dict[str, Any]:
    kv_heads = rng.choice([4, 8])
    heads = kv_heads * rng.choice([1, 2])
    return {
        "dim": heads * rng.choice([2, 8]),
        "n_layers": rng.randint(1, 3),
        "n_heads": heads,
        "n_kv_heads": rng.choice([kv_heads, heads]),
        "vocab_size": rng.choice([32, 512]),
        "multiple_of": rng.choice([4, 16]),
        "ffn_dim_multiplier": rng.choice([None, 1.0, 1.3]),
        "norm_eps": 1e-5,
    }


def test_tensors_and_shapes_match_the_oracle() -> None:
    rng = random.Random(0)
    for _ in range(50):
        params = random_params(rng)
        assert tensor_shapes(ModelArgs(**params), 1) == oracle.shapes(params)


@pytest.mark.parametrize(
    ("size", "name", "shape"),
    [
        ("13B", "tok_embeddings.weight", (32000, 2560)),
        ("13B", "layers.39.attention.wo.weight", (5120, 2560)),
        ("70B", "layers.79.attention.wq.weight", (1024, 8192)),
        ("70B", "layers.79.attention.wk.weight", (128, 8192)),
        ("70B", "layers.79.feed_forward.w2.weight", (8192, 3584)),
        ("70B", "output.weight", (4000, 8192)),
        ("70B", "norm.weight", (8192,)),
    ],
)
def test_shapes_in_the_released_files(size: str, name: str, shape: tuple[int, ...]) -> None:
    fields, _, _, files = RELEASED[size]
    assert tensor_shapes(ModelArgs(**fields, vocab_size=32000), files)[name] == shape
