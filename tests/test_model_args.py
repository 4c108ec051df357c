"""ModelArgs: the sizes that follow from params.json, and what it refuses."""

from __future__ import annotations

import json
import math
import random
import re
import types
from typing import Any

import pytest

from llama import ModelArgs

MORE_70B = {"n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}
RELEASED: dict[str, tuple[dict[str, Any], int, int, int]] = {  # fields, hidden size, key/value heads, files
    "7B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, 11008, 32, 1),
    "13B": ({"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256}, 13824, 40, 2),
    "70B": ({"dim": 8192, "n_layers": 80, "n_heads": 64, **MORE_70B}, 28672, 8, 8),
}
WHOLE = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_batch_size", "max_seq_len"]
REAL = ["ffn_dim_multiplier", "norm_eps", "rope_theta"]


def test_released_sizes() -> None:
    for fields, hidden_dim, kv_heads, files in RELEASED.values():
        args = ModelArgs(**fields, vocab_size=32000)
        assert (args.hidden_dim, args.head_dim, args.kv_heads) == (hidden_dim, 128, kv_heads)
        args.check_shards(files)


def test_hidden_size_is_the_first_multiple_that_holds_the_scaled_width() -> None:
    rng = random.Random(0)
    for _ in range(500):
        dim, multiple_of = 8 * rng.randint(1, 2000), rng.choice([1, 2, 16, 100, 256, 4096])
        scale = rng.choice([None, 1.0, 1.3, round(rng.uniform(0.5, 3.0), 2)])
        width = 8 * dim // 3
        if scale is not None:
            width = math.floor(scale * width)
        hidden = ModelArgs(dim=dim, n_heads=4, multiple_of=multiple_of, ffn_dim_multiplier=scale).hidden_dim
        assert hidden % multiple_of == 0
        assert hidden - multiple_of < width <= hidden


def test_arguments_of_another_class_are_taken_by_the_names_of_their_fields() -> None:
    others = types.SimpleNamespace(dim=64, n_heads=4, max_seq_len=16, unrelated="x")
    assert ModelArgs.of(others) == ModelArgs(dim=64, n_heads=4, max_seq_len=16)
    others.dim = "64"
    with pytest.raises(ValueError, match=r"^dim must be an integer"):
        ModelArgs.of(others)


def validated(**fields: Any) -> ModelArgs:
    args = ModelArgs(**fields)
    args.validate()
    return args


@pytest.mark.parametrize("name", WHOLE + REAL)
@pytest.mark.parametrize("value", [0, -2, "4096", True, [1], {}, math.nan, math.inf, -math.inf], ids=repr)
def test_a_bad_field_is_named_with_what_it_got(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}$"):
        validated(**{name: value})


def test_a_whole_number_is_no_fraction_but_a_real_one_may_be_whole() -> None:
    for name in WHOLE:
        with pytest.raises(ValueError, match=rf"^{name} must be an integer, got 2\.0$"):
            validated(**{name: 2.0})
    for name in REAL:
        assert getattr(validated(**{name: 1}), name) == 1


def test_only_two_fields_may_be_none_and_the_vocabulary_alone_minus_one() -> None:
    assert validated(n_kv_heads=None, ffn_dim_multiplier=None) == validated(vocab_size=-1) == ModelArgs()
    for name in {*WHOLE, *REAL} - {"n_kv_heads", "ffn_dim_multiplier"}:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got None$"):
            validated(**{name: None})
    with pytest.raises(ValueError, match=r"^dim must be above 0 .*, got -1$"):
        validated(dim=-1)


@pytest.mark.parametrize("name", ["dim", "norm_eps"])
def test_a_number_beyond_all_bounds_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*below 2\*\*63, got 1000") as caught:
        validated(**{name: json.loads("1" + 400 * "0")})
    assert len(str(caught.value)) < 200


def test_sizes_near_the_bound_have_an_exact_hidden_size() -> None:
    """Floating point would round them, or overflow."""
    args = validated(dim=2**62, n_heads=4, multiple_of=3, ffn_dim_multiplier=2.0**62)
    assert args.hidden_dim % 3 == 0 and args.hidden_dim > 2**124


def test_a_feed_forward_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match="ffn_dim_multiplier"):
        validated(dim=64, n_heads=4, ffn_dim_multiplier=1e-6)


def test_heads_of_no_whole_even_size_or_that_groups_do_not_share_evenly_are_refused() -> None:
    for dim, n_heads in ((4096, 3), (64, 128), (30, 10), (8, 8)):
        with pytest.raises(ValueError, match=rf"^dim={dim} divided by n_heads={n_heads} must be a whole, even "):
            validated(dim=dim, n_heads=n_heads)
    for n_heads, n_kv_heads in ((8, 3), (8, 16), (32, 64)):
        with pytest.raises(ValueError, match=rf"^n_heads={n_heads} must be a multiple of n_kv_heads={n_kv_heads}$"):
            validated(n_heads=n_heads, n_kv_heads=n_kv_heads)


def test_shards_are_refused_exactly_when_some_size_leaves_a_rest() -> None:
    rng = random.Random(1)
    seen = set()
    for _ in range(500):
        n_kv_heads = rng.choice([1, 2, 3, 4, 8])
        n_heads = n_kv_heads * rng.choice([1, 2, 3])
        args = ModelArgs(
            dim=n_heads * rng.choice([2, 4, 64]),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocab_size=rng.choice([510, 512, 32000, 32016]),
            multiple_of=rng.choice([1, 2, 3, 256]),
        )
        parts = rng.choice([1, 2, 3, 4, 8])
        sizes = (args.n_heads, n_kv_heads, args.hidden_dim, args.dim, args.vocab_size)
        splits = not any(size % parts for size in sizes)
        seen.add((parts > 1, splits))
        if splits:
            args.check_shards(parts)
        else:
            with pytest.raises(ValueError, match=rf"\(\d+\) must be a multiple of the model-parallel size \({parts}\)"):
                args.check_shards(parts)
    assert seen == {(False, True), (True, True), (True, False)}


def test_a_pass_of_a_prefill_holds_the_longest_prompt_and_no_more_than_the_cache() -> None:
    rng = random.Random(2)
    for _ in range(200):
        args = ModelArgs(max_batch_size=rng.randint(1, 64), max_seq_len=rng.randint(1, 8192))
        assert min(args.max_seq_len, 8192) <= args.prefill_tokens <= args.max_batch_size * args.max_seq_len
