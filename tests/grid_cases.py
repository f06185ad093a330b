"""Convolution, pooling, norms and softmax beside their torch twins: cases as in `cases.py`, in a size of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from manual_mlp import functional as F
from tests.cases import Case, random

M, S = torch.tensor([0.3, -1.2, 0.1]), torch.tensor([0.4, 2.0, 1.1])  # running statistics


def _case(name: str, label: str, shapes: list[tuple[int, ...]], *arguments: Any, **more: Any) -> Case:
    """A function of this name in both namespaces, its tensors first."""

    def call(home: Any) -> Any:
        return lambda *tensors: getattr(home, name)(*tensors, *arguments, **more)

    return Case(f"{name}-{label}", call(F), call(torch_functional), random(*shapes))


def _norm(label: str, shape: tuple[int, ...], affine: bool, training: bool) -> Case:
    """Batch norm; without its running statistics in training, because vmap refuses to write them."""

    def call(home: Any) -> Any:
        def run(x: Tensor, *parameters: Tensor) -> Tensor:
            running = (None, None) if training else (M.to(x), S.to(x))
            return home.batch_norm(x, *running, *parameters, training=training)

        return run

    return Case(f"batch_norm-{label}", call(F), call(torch_functional), random(shape, *[(3,), (3,)] * affine))


GRIDS = [
    _case("conv2d", "plain", [(2, 2, 3, 3), (2, 2, 2, 2), (2,)]),
    _case("conv2d", "general", [(2, 2, 4, 4), (4, 1, 2, 2), (4,)], (3, 2), (1, 0), (1, 2), 2),
    _case("conv2d", "depthwise_nobias", [(2, 3, 4, 3), (3, 1, 3, 2)], stride=2, padding=1, groups=3),
    Case(
        "conv2d-same",  # torch warns of an even kernel
        lambda *tensors: F.conv2d(*tensors, padding="same"),
        lambda x, *others: torch_functional.conv2d(torch_functional.pad(x, (1, 1, 0, 1)), *others),
        random((2, 1, 3, 3), (2, 1, 2, 3), (2,)),
    ),
    _case("max_pool2d", "plain", [(2, 1, 5, 4)], 2),
    _case("max_pool2d", "general", [(2, 1, 5, 4)], 3, 2, 1, (1, 2), True),
    _case("avg_pool2d", "plain", [(2, 1, 5, 4)], 2),
    _case("avg_pool2d", "general", [(2, 1, 5, 4)], 3, 2, 1, True, False),
    _norm("rows", (5, 3), True, True),
    _norm("images", (3, 3, 2, 3), True, True),
    _norm("none", (4, 3, 2), False, True),
    _norm("running", (4, 3, 2, 2), True, False),
    _case("layer_norm", "none", [(4, 2, 3)], (3,)),
    Case(
        "layer_norm-affine",
        lambda x, weight, bias: F.layer_norm(x, (2, 3), weight, bias),
        lambda x, weight, bias: torch_functional.layer_norm(x, (2, 3), weight, bias),
        random((4, 2, 3), (2, 3), (2, 3)),
    ),
    _case("softmax", "last", [(5, 4)], -1),
    _case("softmax", "first_of_three", [(3, 2, 4)], 0),
]
"""Every Function of grid_functions.py."""


def _plain_norm(over: tuple[int, ...]) -> Callable[..., Tensor]:
    """A norm in torch's elementary operations: torch's third derivatives of its own norms are wrong."""

    def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        centred = x - x.mean(over, keepdim=True)
        y = centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt()
        shape = (1, -1, *(1,) * (x.dim() - 2)) if over[0] == 0 else x.shape[1:]
        return y if weight is None or bias is None else y * weight.reshape(shape) + bias.reshape(shape)

    return norm


PLAIN = {
    "batch_norm-rows": _plain_norm((0,)),
    "batch_norm-images": _plain_norm((0, 2, 3)),
    "batch_norm-none": _plain_norm((0, 2)),
    "layer_norm-none": _plain_norm((-1,)),
    "layer_norm-affine": _plain_norm((-2, -1)),
}
"""For third derivatives, another twin than torch's own."""
