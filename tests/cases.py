"""The one case list: every Function of the package beside its torch twin, with inputs. Everything is tested from here.

Activation rows are read off the sheet, so a new row is a new case; without a twin in TWINS the collection fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from manual_mlp import functional as F
from manual_mlp import functions
from manual_mlp.formulas import ACTIVATIONS, Activation

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """ours and twin take the same inputs; inputs(dtype) draws the same numbers each time, all requiring gradients."""

    name: str
    ours: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], Inputs]

    def __str__(self) -> str:
        return self.name


TWINS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z.clone(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": torch_functional.leaky_relu,
    "leaky_relu_in_z": torch_functional.leaky_relu,
    "softplus": torch_functional.softplus,
    "softplus_in_z": torch_functional.softplus,
    "silu": torch_functional.silu,
    "gelu": torch_functional.gelu,
    "gelu_tanh": lambda z: torch_functional.gelu(z, approximate="tanh"),
}
# Beside a row's default parameters, these are tried.
OTHER_PARAMETERS = {
    "leaky_relu": (0.2,),
    "leaky_relu_in_z": (-0.3,),
    "softplus": (2.0, 25.0),
    "softplus_in_z": (0.5, 1.0),
}


def random(*shapes: tuple[int, ...], seed: int = 0) -> Callable[[torch.dtype], Inputs]:
    """Standard normal inputs of these shapes; drawn in float64, so that every dtype sees the same numbers."""

    def draw(dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return tuple(tensor.to(dtype).requires_grad_() for tensor in drawn)

    return draw


def row_parameters(row: Activation) -> list[tuple[float, ...]]:
    defaults = tuple(default for _, default in row.parameters)
    return [defaults, OTHER_PARAMETERS[row.name]] if row.parameters else [()]


def _label(name: str, parameters: tuple[float, ...]) -> str:
    return name + "".join(f"-{parameter:g}" for parameter in parameters)


def _activation_cases() -> list[Case]:
    cases = []
    for name, row in ACTIVATIONS.items():
        if name == "identity":  # has no node of its own; it is fused below
            continue
        for parameters in row_parameters(row):

            def ours(z: Tensor, name: str = name, parameters: tuple[float, ...] = parameters) -> Tensor:
                return functions.apply(functions.ACTIVATION[name], z, *parameters)

            def twin(z: Tensor, name: str = name, parameters: tuple[float, ...] = parameters) -> Tensor:
                return TWINS[name](z, *parameters)

            cases.append(Case(_label(name, parameters), ours, twin, random((5, 4))))
            if row.parameters == () or parameters == row_parameters(row)[0]:
                cases.append(_inplace_case(name, parameters))
    return cases


def _inplace_case(name: str, parameters: tuple[float, ...]) -> Case:
    """In place on a copy, since a leaf that requires a gradient can't be written."""
    return Case(
        f"{name}-inplace",
        lambda z: F._activation(name, z.clone(), *parameters, inplace=True),
        lambda z: TWINS[name](z, *parameters),
        random((5, 4)),
    )


def _affine_cases() -> list[Case]:
    def case(label: str, *shapes: tuple[int, ...]) -> Case:
        return Case(f"affine-{label}", F.affine, torch_functional.linear, random(*shapes))

    return [
        case("bias", (5, 3), (4, 3), (4,)),
        case("nobias", (5, 3), (4, 3)),
        case("one_dimension", (3,), (4, 3), (4,)),
        case("four_dimensions", (2, 1, 3, 3), (4, 3), (4,)),
        case("one_output", (5, 3), (1, 3), (1,)),
    ]


def _fused_cases() -> list[Case]:
    cases = []
    for name, row in ACTIVATIONS.items():
        for parameters in row_parameters(row):
            for label, shapes in {
                "bias": ((5, 3), (4, 3), (4,)),
                "nobias": ((5, 3), (4, 3)),
                "three_dimensions": ((2, 3, 3), (4, 3), (4,)),
            }.items():

                def ours(
                    input: Tensor,
                    weight: Tensor,
                    bias: Tensor | None = None,
                    name: str = name,
                    parameters: tuple[float, ...] = parameters,
                ) -> Tensor:
                    return F.apply_affine(functions.AFFINE_ACTIVATION[name], input, weight, bias, *parameters)

                def twin(
                    input: Tensor,
                    weight: Tensor,
                    bias: Tensor | None = None,
                    name: str = name,
                    parameters: tuple[float, ...] = parameters,
                ) -> Tensor:
                    return TWINS[name](torch_functional.linear(input, weight, bias), *parameters)

                cases.append(Case(f"affine_{_label(name, parameters)}-{label}", ours, twin, random(*shapes)))
    return cases


def _dropout_case() -> Case:
    """With a mask drawn beforehand: vmap refuses random numbers inside it, torch's as ours."""
    mask = torch.rand((5, 4), generator=torch.Generator().manual_seed(1)) < 0.6
    return Case(
        "dropout",
        lambda a: functions.apply(functions.Dropout, a, mask, 0.6),
        lambda a: a * mask.to(a.dtype).div(0.6),
        random((5, 4)),
    )


def _quadratic_twin(prediction: Tensor, target: Tensor) -> Tensor:
    """The lecture's formula in torch's own operations."""
    return (prediction - target).pow(2).mul(0.5).sum() / prediction[..., 0].numel()


def _cost_cases() -> list[Case]:
    both = random((5, 4), (5, 4))
    cases = [
        Case("quadratic_loss", F.quadratic_loss, _quadratic_twin, both),
        Case("quadratic_loss-three_dimensions", F.quadratic_loss, _quadratic_twin, random((2, 3, 4), (2, 3, 4))),
    ]
    weight = torch.tensor([[0.5], [2.0], [1.0], [3.0], [0.0]], dtype=torch.float64)  # of each row
    cases += [
        Case(
            "quadratic_loss_weight",
            lambda prediction, target: F.quadratic_loss(prediction, target, weight),
            lambda prediction, target: (prediction - target).pow(2).mul(0.5).mul(weight.to(target.dtype)).sum() / 5,
            both,
        )
    ]
    for reduction in ("none", "sum", "mean"):
        cases += _costs_with(reduction, both)
    return cases


def _costs_with(reduction: str, both: Callable[[torch.dtype], Inputs]) -> list[Case]:
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    classes = torch.tensor([0, 3, -100, 2, 1])

    def case(label: str, ours: Callable[..., Tensor], twin: Callable[..., Tensor], **arguments: Any) -> Case:
        return Case(
            f"{label}-{reduction}",
            lambda z, target: ours(z, target, reduction=reduction, **_as(z.dtype, arguments)),
            lambda z, target: twin(z, target, reduction=reduction, **_as(z.dtype, arguments)),
            both,
        )

    def of_class(label: str, **arguments: Any) -> Case:
        return Case(
            f"cross_entropy_of_class{label}-{reduction}",
            lambda z: F.cross_entropy(z, classes, reduction=reduction, **_as(z.dtype, arguments)),
            lambda z: torch_functional.cross_entropy(z, classes, reduction=reduction, **_as(z.dtype, arguments)),
            random((5, 4)),
        )

    bce, torch_bce = F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits
    entropy, torch_entropy = F.cross_entropy, torch_functional.cross_entropy
    images = torch.tensor([[[0, 3], [1, 2]], [[2, 2], [-100, 0]]])
    return [
        case("mse_loss", F.mse_loss, torch_functional.mse_loss),
        case("bce", bce, torch_bce),
        case("bce_weights", bce, torch_bce, weight=weight, pos_weight=weight.flip(0)),
        case("cross_entropy", entropy, torch_entropy),
        case("cross_entropy_smooth_weight", entropy, torch_entropy, weight=weight, label_smoothing=0.1),
        of_class(""),
        of_class("_weight", weight=weight),
        of_class("_smooth_weight", weight=weight, label_smoothing=0.1),
        Case(
            f"cross_entropy_of_class_images-{reduction}",
            lambda z: F.cross_entropy(z, images, reduction=reduction),
            lambda z: torch_functional.cross_entropy(z, images, reduction=reduction),
            random((2, 4, 2, 2)),
        ),
    ]


def _as(dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in arguments.items()}


CASES: list[Case] = [
    *_affine_cases(),
    *_activation_cases(),
    *_fused_cases(),
    _dropout_case(),
    *_cost_cases(),
]
