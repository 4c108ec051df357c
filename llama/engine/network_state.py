"""Whether a network is the original, or what it was: its modules, code and attributes, its weights, and no hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from llama import model as network
from llama.layers import attention


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of the modules runs forward hooks."""
    global_hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return any(global_hooks) or any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def fixed_parts(model: nn.Module) -> tuple[list[Any], list[int]]:
    """What a recorded pass depends on: code, modules and their attributes, and kinds and addresses of their tensors."""
    objects: list[Any] = [*vars(network).values(), *vars(attention).values()]
    addresses = []
    for module in model.modules():
        parts = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
        objects += [module, type(module), type(module).forward, *parts, *map(type, module._parameters.values())]
        addresses += [part.data_ptr() for part in parts if isinstance(part, Tensor)]
    return objects, addresses


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
        self._objects, self._addresses = fixed_parts(model)
        self._versions = self._versions_now()
        self._is_same = not has_hooks(self._modules)

    def _versions_now(self) -> list[int]:
        return [0 if parameter.is_inference() else parameter._version for parameter in self._parameters]

    def is_same(self, *, thorough: bool) -> bool:
        """Whether nothing has changed since this object was made; once False, it stays so.

        Args:
            thorough: also compares modules, code, attributes and addresses, which takes a millisecond.
        """
        self._is_same = self._is_same and not has_hooks(self._modules) and self._versions_now() == self._versions
        if self._is_same and thorough:
            objects, addresses = fixed_parts(self._model)
            self._is_same = same_objects(objects, self._objects) and addresses == self._addresses
        return self._is_same
