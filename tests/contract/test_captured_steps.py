"""Captured steps are replayed where nothing changed, and captured anew where something did."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from tests.contract.test_edited_weights import _assign_data, _assign_parameter
from tests.support.builds import (
    N_NEW,
    Built,
)
from tests.support.cuda_graph import RecordedStepper


def replayed(built: Built) -> int:
    """How many steps of a call were replayed."""
    stepper = built.llama.stepper
    assert isinstance(stepper, RecordedStepper)
    before = stepper.n_replayed
    built.llama.generate([[1, 2, 3]], N_NEW, temperature=0)
    return stepper.n_replayed - before


def test_captured_steps_are_replayed_where_nothing_changed(make: Callable[[str], Built]) -> None:
    """Without this the tests of what is captured would show nothing."""
    built = make("captured steps")
    assert replayed(built) >= N_NEW - 1
    captured = len(built.llama.stepper.captured)
    built.model.output.weight.neg_()  # the same memory: the graph reads it
    assert replayed(built) >= N_NEW - 1
    assert len(built.llama.stepper.captured) == captured


def test_a_hook_makes_captured_steps_eager_while_it_is_there(make: Callable[[str], Built]) -> None:
    built = make("captured steps")
    assert replayed(built)
    handle = built.model.layers[1].ffn_norm.register_forward_hook(lambda *_: None)
    assert replayed(built) == 0
    handle.remove()
    assert replayed(built)


def test_a_moved_weight_or_another_module_is_captured_again(make: Callable[[str], Built]) -> None:
    built = make("captured steps")
    stepper = built.llama.stepper
    assert isinstance(stepper, RecordedStepper)
    for change in (
        lambda: _assign_data(built.model.output),
        lambda: _assign_parameter(built.model.output),
        lambda: setattr(built.model, "output", copy.deepcopy(built.model.output)),
        lambda: built.model.to(torch.float64),
        lambda: setattr(
            built.model.layers[0].attention.cache, "keys", built.model.layers[0].attention.cache.keys.clone()
        ),
    ):
        replayed(built)
        captured = len(stepper.captured)
        change()
        replayed(built)
        assert len(stepper.captured) > captured
