"""Every way to change the weight of a layer, and to copy a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


def _edit_in_inference_mode(layer: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight.mul_(-1)


def _edit_a_view_in_inference_mode(layer: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight.detach()[3].zero_()


def negate_by_a_parametrization(layer: nn.Module) -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    parametrize.register_parametrization(layer, "weight", Negated())


def _bake_a_parametrization_in(layer: nn.Module) -> None:
    negate_by_a_parametrization(layer)
    parametrize.remove_parametrizations(layer, "weight")


def _register(layer: nn.Module) -> None:
    weight = -layer.weight
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def _optimize(optimizer: type[torch.optim.Optimizer], **options: bool) -> Callable[[nn.Module], None]:
    """A training step that differentiates through another graph than the layer's forward."""

    def edit(layer: nn.Module) -> None:
        layer.requires_grad_()
        steps = optimizer(layer.parameters(), lr=0.5, **options)  # type: ignore[call-arg]
        factors = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(7))
        with torch.enable_grad():
            (layer.weight * factors).sum().backward()
        steps.step()
        layer.requires_grad_(False)

    return edit


def _optimize_a_frozen_weight(layer: nn.Module) -> None:
    layer.weight.grad = torch.randn(layer.weight.shape).to(layer.weight.dtype)
    torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True).step()


# The first ones only negate the weight.
NEGATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda layer: layer.weight.mul_(-1),
    "row by row": lambda layer: [row.neg_() for row in layer.weight],
    "a detached view": lambda layer: layer.weight.detach().mul_(-1),
    "the state dict's tensor": lambda layer: layer.state_dict()["weight"].mul_(-1),
    "out=": lambda layer: torch.neg(layer.weight, out=layer.weight),
    "in inference mode": _edit_in_inference_mode,
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], -1.0),
    "set_": lambda layer: layer.weight.set_(-layer.weight),
    ".data, edited": lambda layer: layer.weight.data.mul_(-1),
    ".data, assigned": lambda layer: setattr(layer.weight, "data", -layer.weight.detach()),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(-layer.weight.flatten(), [layer.weight]),
    "from_dlpack": lambda layer: torch.from_dlpack(layer.weight).mul_(-1),
    "storage": lambda layer: layer.weight.untyped_storage().copy_((-layer.weight).untyped_storage()),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": -layer.weight}),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict({"weight": -layer.weight}, assign=True),
    "a new Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(-layer.weight.detach(), False)),
    "a registered Parameter": _register,
    "swap_tensors": lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(-layer.weight.detach(), False)),
    "a parametrization, baked in": _bake_a_parametrization_in,
}
EDITS = NEGATIONS | {
    "one entry": lambda layer: layer.weight.__setitem__((0, 0), 99.0),
    "a transposed view": lambda layer: layer.weight.T[3].zero_(),
    "another dtype's view": lambda layer: layer.weight.view(torch.int32).zero_(),
    "a view in inference mode": _edit_a_view_in_inference_mode,
    "an initializer": lambda layer: nn.init.constant_(layer.weight, 0.5),
    ".data, a row": lambda layer: layer.weight.data[3].zero_(),
    "numpy": lambda layer: layer.weight.numpy().fill(0.5),
    "numpy, forced": lambda layer: layer.weight.numpy(force=True).fill(0.5),
    "numpy.asarray": lambda layer: np.asarray(layer.weight).fill(0.5),
    "a parametrization": negate_by_a_parametrization,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.9),
    "another dtype": lambda layer: layer.float().weight.detach().mul_(-1),
    "SGD": _optimize(torch.optim.SGD, foreach=False),
    "SGD, foreach": _optimize(torch.optim.SGD, foreach=True),
    "SGD, fused": _optimize(torch.optim.SGD, fused=True),
    "AdamW, foreach": _optimize(torch.optim.AdamW, foreach=True),
    "AdamW, fused": _optimize(torch.optim.AdamW, fused=True),
    "a fused step on a frozen weight": _optimize_a_frozen_weight,
}
# After which the layer has no weight that could be packed.
UNPACKABLE = ("a parametrization", "pruning")


def _through_a_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _through_a_file,
}
