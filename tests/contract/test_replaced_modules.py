"""Modules that are put in the place of the network's count: wrappers, LoRA, blocks of other networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.builds import Built, LoRA, output_cases, scaled, skip_rounded, times


class Times(nn.Module):
    """Any module, its output multiplied."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner = inner
        self.by = by

    def forward(self, *args: Any) -> Any:
        return times(self.by, self.inner(*args))


def test_a_module_wrapped_in_another_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in output_cases().items():
        if name:
            inner = built.model.get_submodule(name)
            built.model.set_submodule(name, Times(inner, by))
            built.assert_computes(equal(built.original))
            built.model.set_submodule(name, inner)
    built.assert_unedited()


def test_lora_in_the_place_of_layers_counts(built: Built) -> None:
    expected = dict(built.original)
    for layer_id, layer in enumerate(built.model.layers):
        layer.attention.wq, layer.attention.wv = LoRA(layer.attention.wq), LoRA(layer.attention.wv)
        for name in ("wq", "wv"):
            weight = f"layers.{layer_id}.attention.{name}.weight"
            expected[weight] = expected[weight] + getattr(layer.attention, name).delta()
    built.assert_computes(expected)


def test_a_custom_output_counts(built: Built) -> None:
    plain = nn.Linear(32, 512, bias=False, dtype=built.dtype)
    built.model.output = plain
    built.assert_computes(built.original | {"output.weight": plain.weight.detach().float()})


def test_a_custom_feed_forward_counts(built: Built) -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    built.model.layers[1].feed_forward = Nothing()
    built.assert_computes(scaled(built.original, "layers.1.feed_forward.w2", 0.0))


def test_a_custom_attention_counts(built: Built) -> None:
    """It knows what Meta's code passes: an int start_pos."""

    class Nothing(nn.Module):
        def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
            assert isinstance(start_pos, int) and freqs_cis.shape == (x.size(1), 4)
            assert (mask is None) == (x.size(1) == 1)
            return torch.zeros_like(x)

    built.model.layers[0].attention = Nothing()
    built.assert_computes(scaled(built.original, "layers.0.attention.wo", 0.0))


def test_a_block_of_another_network_counts(built: Built, make: Callable[[str], Built]) -> None:
    block = copy.deepcopy(built.model.layers[0])
    block.attention.wv.weight.neg_()
    built.model.layers[0] = block
    built.assert_computes(scaled(built.original, "layers.0.attention.wv", -1.0))


def test_blocks_that_were_left_out_or_swapped_do_not_count(built: Built) -> None:
    first, second = built.model.layers
    built.model.layers = nn.ModuleList([first])
    without = scaled(built.original, "layers.1.attention.wo layers.1.feed_forward.w2", 0.0)
    built.assert_computes(without)
    built.model.layers = nn.ModuleList([second, first])
    swap = {"0": "1", "1": "0"}
    built.assert_computes(
        {".".join(swap.get(part, part) for part in name.split(".")): w for name, w in built.original.items()}
    )
