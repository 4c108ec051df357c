"""Whether a network is the original, or what it was: its modules, code and attributes, its weights, and no hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from llama import model as network
from llama.layers import attention


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of the modules runs forward hooks."""
    global_hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return any(global_hooks) or any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def fixed_parts(model: nn.Module) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """What a recorded pass depends on: code, modules and their attributes by name, and where their tensors are."""
    objects: list[Any] = [*vars(network).values(), *vars(attention).values()]
    places = []
    for module in model.modules():
        named = [vars(module), module._parameters, module._buffers, module._modules]
        parts = [part for names in named for part in names.values()]
        objects += [module, type(module), type(module).forward, *(name for names in named for name in names), *parts]
        places += [
            (part.data_ptr(), part.dtype, part.shape, part.stride())
            for part in parts
            if isinstance(part, Tensor) and part.layout is torch.strided
        ]
    return objects, places


def same_objects(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists hold the same objects, compared by identity."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class NetworkState:
    """Notices that a network is no longer what it was when this object was made, or that it has hooks.

    A weight that is written to through `.data` of a parameter that is not packed is not noticed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._parameters = list(model.parameters())
        self._objects, self._places = fixed_parts(model)
        self._versions = self._versions_now()
        self._is_same = not has_hooks(self._modules)

    def _versions_now(self) -> list[int]:
        return [0 if parameter.is_inference() else parameter._version for parameter in self._parameters]

    def is_same(self, *, thorough: bool) -> bool:
        """Whether nothing has changed since this object was made; once False, it stays so.

        Args:
            thorough: also compares modules, code, attributes and the places of tensors, which takes two milliseconds.
        """
        self._is_same = self._is_same and not has_hooks(self._modules) and self._versions_now() == self._versions
        if self._is_same and thorough:
            objects, places = fixed_parts(self._model)
            self._is_same = same_objects(objects, self._objects) and places == self._places
        return self._is_same
