"""The one case list: every Function of functions.py beside its torch twin, with inputs; grid_cases.py has the others.

Activation rows are read off the sheet, with their twins, so a new row is a new case.
`cases_of(sizes)` is the same list in other sizes: a new case has them too.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

from manual_mlp import functional as F
from manual_mlp import functions, modules
from manual_mlp.formulas import ACTIVATIONS, Row

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """ours and twin take the same inputs; inputs(dtype) draws the same numbers each time, all requiring gradients."""

    name: str
    ours: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], Inputs]
    has_rows_of_its_own: bool = False  # beside the inputs, such as labels

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sizes:
    """leading: the dimensions before the last; rows of a cost: their product. No two of the defaults are equal."""

    leading: tuple[int, ...] = (3,)
    inputs: int = 2
    outputs: int = 4

    @property
    def rows(self) -> int:
        return math.prod(self.leading)


# Beside the default values of a row's parameters, these are tried; for a row that is not here, their doubles.
TRIED = {
    "leaky_relu": [(0.2,), (-0.01,), (-0.3,)],
    "softplus": [(2.0, 25.0), (1.0, 2.0), (0.5, 1.0)],
}


def _rows() -> Iterator[Row]:
    for row in ACTIVATIONS.values():
        yield row
        doubles = [tuple(2 * value for value in row.values)] if row.parameters else []
        yield from (row.bind(*values) for values in TRIED.get(row.name, doubles))


def label(row: Row) -> str:
    return row.name + "".join(f"{value:+g}" for value in row.values)


ROWS = list(_rows())
"""Every row of the sheet as it is used, in each letter that it saves."""
rows = pytest.mark.parametrize("row", ROWS, ids=label)


def ours_of(row: Row, **more: Any) -> nn.Module:
    """Our module of a row."""
    return modules.OURS[row.module](**dict(row.options), **dict(row.parameters), **more)


def _torchs() -> Iterator[nn.Module]:
    """Yield torch's modules of all rows; written in place too, except with a negative slope, which torch refuses."""
    for row in ROWS:
        yield row.twin()
        if hasattr(twin := row.twin(), "inplace") and row.saves == ACTIVATIONS[row.name].saves:
            twin.inplace = True
            yield twin


TORCHS = list(_torchs())


def twin_of(row: Row) -> Callable[[Tensor], Tensor]:
    """torch's own module of a row; a copy for the identity, which would be the input itself."""
    return torch.clone if row.name == "identity" else row.twin()


def random(*shapes: tuple[int, ...], seed: int = 0) -> Callable[[torch.dtype], Inputs]:
    """Standard normal inputs of these shapes; drawn in float64, so that every dtype sees the same numbers."""

    def draw(dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return tuple(tensor.to(dtype).requires_grad_() for tensor in drawn)

    return draw


def _activation_cases(sizes: Sizes) -> list[Case]:
    cases, z = [], random((*sizes.leading, sizes.outputs))
    for row in ROWS:
        if row.name == "identity":  # has no node of its own; it is fused below
            continue

        def ours(z: Tensor, row: Row = row, values: tuple[float, ...] = row.values) -> Tensor:
            return F.activation(row.name, z, *values)

        def in_place(z: Tensor, row: Row = row, values: tuple[float, ...] = row.values) -> Tensor:
            """On a copy, since a leaf that requires a gradient can't be written."""
            return F.activation(row.name, z.clone(), *values, inplace=True)

        cases.append(Case(label(row), ours, twin_of(row), z))
        if row == next(other for other in ROWS if (other.name, other.saves) == (row.name, row.saves)):
            cases.append(Case(f"{label(row)}-inplace", in_place, twin_of(row), z))
    return cases


def _affine_cases(sizes: Sizes) -> list[Case]:
    n, m = sizes.inputs, sizes.outputs

    def case(label: str, *shapes: tuple[int, ...]) -> Case:
        return Case(f"affine-{label}", F.affine, torch_functional.linear, random(*shapes))

    return [
        case("bias", (*sizes.leading, n), (m, n), (m,)),
        case("nobias", (*sizes.leading, n), (m, n)),
        case("one_dimension", (n,), (m, n), (m,)),
        case("four_dimensions", (2, 1, 3, n), (m, n), (m,)),
        case("one_output", (*sizes.leading, n), (1, n), (1,)),
    ]


def _fused_cases(sizes: Sizes) -> list[Case]:
    cases: list[Case] = []
    n, m = sizes.inputs, sizes.outputs
    for row in ROWS:
        for form, shapes in {
            "bias": ((*sizes.leading, n), (m, n), (m,)),
            "nobias": ((*sizes.leading, n), (m, n)),
            "three_dimensions": ((2, 2, n), (m, n), (m,)),
        }.items():

            def ours(
                input: Tensor,
                weight: Tensor,
                bias: Tensor | None = None,
                row: Row = row,
                values: tuple[float, ...] = row.values,
            ) -> Tensor:
                function = functions.AFFINE_ACTIVATION[row.name, row.saves]
                return F.apply_affine(function, input, weight, bias, *values)

            def twin(input: Tensor, weight: Tensor, bias: Tensor | None = None, row: Row = row) -> Tensor:
                return twin_of(row)(torch_functional.linear(input, weight, bias))

            cases.append(Case(f"affine_{label(row)}-{form}", ours, twin, random(*shapes)))
    return cases


def _dropout_case(sizes: Sizes) -> Case:
    """With a mask drawn beforehand: vmap refuses random numbers inside it, torch's as ours."""
    shape = (*sizes.leading, sizes.outputs)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    return Case(
        "dropout",
        lambda a: functions.apply(functions.Dropout, a, False, mask, 0.6),
        lambda a: a * mask.to(a.dtype).div(0.6),
        random(shape),
        has_rows_of_its_own=True,
    )


def _sum_case(sizes: Sizes) -> Case:
    both = random(*[(*sizes.leading, sizes.outputs)] * 2)
    return Case("sum", lambda *terms: functions.apply(functions.Sum, *terms), torch.add, both)


def _quadratic_twin(prediction: Tensor, target: Tensor) -> Tensor:
    """The lecture's formula in torch's own operations."""
    return (prediction - target).pow(2).mul(0.5).sum() / prediction[..., 0].numel()


def _cost_cases(sizes: Sizes) -> list[Case]:
    both = random(*[(sizes.rows, sizes.outputs)] * 2)
    deep = random(*[(2, *sizes.leading, sizes.outputs)] * 2)
    cases = [
        Case("quadratic_loss", F.quadratic_loss, _quadratic_twin, both),
        Case("quadratic_loss-three_dimensions", F.quadratic_loss, _quadratic_twin, deep),
    ]
    weight = torch.arange(sizes.rows, dtype=torch.float64).sub(0.7).abs().unsqueeze(-1)  # of each row
    cases += [
        Case(
            "quadratic_loss_weight",
            lambda prediction, target: F.quadratic_loss(prediction, target, weight),
            lambda prediction, target: (
                (prediction - target).pow(2).mul(0.5).mul(weight.to(target.dtype)).sum() / len(target)
            ),
            both,
            has_rows_of_its_own=True,
        )
    ]
    for reduction in ("none", "sum", "mean"):
        cases += _costs_with(reduction, sizes, both)
    return cases


def _costs_with(reduction: str, sizes: Sizes, both: Callable[[torch.dtype], Inputs]) -> list[Case]:
    rows, m = sizes.rows, sizes.outputs
    weight = torch.arange(m, dtype=torch.float64).sub(1.7).square()  # whose sum over the rows is not their number
    classes, images = _classes((rows,), m), _classes((rows, 2, 2), m)

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
            random((rows, m)),
            has_rows_of_its_own=True,
        )

    bce, torch_bce = F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits
    entropy, torch_entropy = F.cross_entropy, torch_functional.cross_entropy
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
            random((rows, m, 2, 2)),
            has_rows_of_its_own=True,
        ),
    ]


def _classes(shape: tuple[int, ...], classes: int) -> Tensor:
    """A label for each place, some of them to be ignored."""
    labels = torch.arange(math.prod(shape)).mul(3).remainder(classes)
    labels[2::5] = -100
    return labels.reshape(shape)


def _as(dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in arguments.items()}


@functools.lru_cache(maxsize=64)
def cases_of(sizes: Sizes) -> dict[str, Case]:
    """Every case by name, in these sizes."""
    cases = [
        *_affine_cases(sizes),
        *_activation_cases(sizes),
        *_fused_cases(sizes),
        _dropout_case(sizes),
        _sum_case(sizes),
        *_cost_cases(sizes),
    ]
    return {case.name: case for case in cases}


CASES: list[Case] = list(cases_of(Sizes()).values())


# One code leaves the bias out, or takes three dimensions, for all rows; the lesson's own Function has its own code.
# `make test` asks both codes; `make test-all` asks every fused Function.
FORMS, ASKED = ("nobias", "three_dimensions"), ("affine", "affine_sigmoid", "affine_silu", "quadratic_loss")


def asks_again(case: Case) -> bool:
    kind, _, form = case.name.rpartition("-")
    return form in FORMS and kind not in ASKED


def sampled(cases: Iterable[Case]) -> list[Any]:
    """Return the cases as parameters of a test, those that ask again as slow ones."""
    slow = pytest.mark.slow
    return [pytest.param(case, marks=[slow] if asks_again(case) else [], id=str(case)) for case in cases]
