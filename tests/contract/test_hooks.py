"""What hooks return and see counts, on every module, the model and all modules of the process."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from llama.model import RMSNorm
from tests.support.builds import N_NEW, Built, changed_input, input_cases, output_cases, skip_rounded, times


def test_the_cases_are_all_modules(built: Built) -> None:
    modules = {name for name, module in built.model.named_modules() if not isinstance(module, nn.ModuleList)}
    in_first_layer = {name for name in modules if name.startswith("layers.0.")}  # which is as the other one
    assert modules - in_first_layer == output_cases().keys() == input_cases().keys()


def test_what_a_forward_hook_returns_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in output_cases().items():
        handle = built.model.get_submodule(name).register_forward_hook(lambda _, args, out, by=by: times(by, out))
        built.assert_computes(equal(built.original))
        handle.remove()
    built.assert_unedited()


def test_what_a_forward_pre_hook_returns_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in input_cases().items():
        module = built.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args, by=by: changed_input(args, by))
        built.assert_computes(equal(built.original))
        handle.remove()
    built.assert_unedited()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_each_module_is_hooked_once_in_prefill_and_once_per_step(built: Built, register: str) -> None:
    modules = {name: m for name, m in built.model.named_modules() if not isinstance(m, nn.ModuleList)}
    seen: dict[str, list[int]] = {name: [] for name in modules}
    for name, module in modules.items():
        axis = 2 if name.endswith("cache") else 1  # keys and values come with their heads first
        getattr(module, register)(lambda _, args, *out, name=name, axis=axis: seen[name].append(args[0].size(axis)))
    built.llama.generate([[1, 2, 3]], N_NEW, temperature=0)
    for name, widths in seen.items():
        if built.llama.stepper is not None:
            widths = widths[:N_NEW]  # a step that is ahead of the host may be computed for nothing
        assert widths == ([1] * N_NEW if name == "output" else [3] + [1] * (N_NEW - 1)), name


def test_a_hook_on_all_modules_of_the_process_counts(built: Built) -> None:
    def negate_norms(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return -out if isinstance(module, RMSNorm) else None

    handle = nn.modules.module.register_module_forward_hook(negate_norms)
    try:
        built.assert_computes({name: -w if "norm" in name else w for name, w in built.original.items()})
    finally:
        handle.remove()
