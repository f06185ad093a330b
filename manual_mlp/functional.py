"""The counterpart of torch.nn.functional: same argument names and meaning, derivatives from the sheet.

A function here adds two things to its Function: the casts of autocast, and a sentence for an input that can't be right.
It leaves to torch the checks that torch makes anyway, and puts them into words only after torch has refused.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manual_mlp import checks, functions, kernels
from manual_mlp.autocast import autocasting, cast
from manual_mlp.errors import InputError
from manual_mlp.formulas import ACTIVATIONS, Row
from manual_mlp.functions import ManualFunction, apply
from manual_mlp.grid_functional import *  # noqa: F403

if TYPE_CHECKING:  # the arguments of what `_of_row` makes
    from torch.nn.functional import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh  # noqa: F401

# ---------------------------------------------------------------------------------------------------------------------
# Affine maps
# ---------------------------------------------------------------------------------------------------------------------


def affine(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z = a Wᵀ + b.

    input (…, n_in), weight (n_out, n_in), bias (n_out,) → (…, n_out). Leading dimensions as torch.nn.functional.linear.
    Raises InputError for sizes, dtypes or devices that do not fit each other, and for complex tensors.

    >>> import torch
    >>> from manual_mlp import functional
    >>> functional.affine(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, -1.0]]), torch.tensor([0.5])).item()
    -0.5
    """
    return apply_affine(functions.Affine, input, weight, bias)


def affine_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid", **parameters: float | str
) -> Tensor:
    """G(a Wᵀ + b) as one node of the graph; shapes and errors as `affine`.

    activation: a name of the activation table; parameters: its parameters, such as negative_slope=0.2.

    >>> import torch
    >>> from manual_mlp import functional
    >>> a, weight = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, -1.0]])
    >>> round(functional.affine_activation(a, weight, activation="leaky_relu", negative_slope=0.2).item(), 4)
    -0.2
    """
    name, values = name_and_values(activation, parameters)
    return apply_affine(functions.fused(name, values), input, weight, bias, *values)


def apply_affine(
    function: type[ManualFunction], input: Tensor, weight: Tensor, bias: Tensor | None, *values: float
) -> Tensor:
    """Call an affine Function, with autocast and errors around it."""
    if autocasting(input):
        input, weight, bias = cast(input), cast(weight), None if bias is None else cast(bias)
    # torch would take these: complex numbers, and shapes that broadcast. torch.jit.trace warns if shapes are compared.
    compared = None if torch._C._get_tracing_state() else bias
    if weight.dtype.is_complex or weight.dim() != 2 or (compared is not None and compared.shape != (weight.shape[0],)):
        checks.affine(input, weight, bias)
    try:
        output = apply(function, input, weight, bias, *values)
    except RuntimeError:
        checks.affine(input, weight, bias)
        raise
    return output[0] if isinstance(output, tuple) else output


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def bound_row(name: str, values: tuple[float, ...]) -> Row:
    """Return the row of this name with these values."""
    return ACTIVATIONS[name].bind(*values)


def name_and_values(name: str, given: dict[str, float | str]) -> tuple[str, tuple[float, ...]]:
    """Return the name of a row and the values of its parameters, from torch's names for both.

    Raises InputError for an unknown name, parameter or option.
    """
    if name not in ACTIVATIONS:
        hint = checks.meant(name, ACTIVATIONS)
        raise InputError(f"expected the name of an activation, one of {', '.join(ACTIVATIONS)}; got {name!r}{hint}")
    row = ACTIVATIONS[name]
    if not given:
        return name, row.values
    given = dict(given)
    for option in dict(row.options).keys() & given.keys():
        rows = {dict(other.options)[option]: other for other in ACTIVATIONS.values() if other.module is row.module}
        if (value := given.pop(option)) not in rows:
            raise InputError(f"expected {name}'s {option} to be {' or '.join(map(repr, rows))}; got {value!r}")
        row = rows[str(value)]
    if unknown := given.keys() - dict(row.parameters).keys():
        takes = ", ".join(dict(row.parameters)) or "no parameters"
        raise InputError(f"activation {name!r} takes {takes}; got {', '.join(sorted(unknown))}")
    return row.name, tuple(float(given.get(parameter, default)) for parameter, default in row.parameters)


def activation(name: str, input: Tensor, *values: float, inplace: bool = False) -> Tensor:
    """a = G(z) of a row. Integers do as in torch: they are promoted, kept or refused."""
    if name == "identity":
        return input
    checks.real("input of an activation", input, whole=True)
    row = ACTIVATIONS[name]
    form = name, row.saves_with(*values) if values else row.saves
    if not inplace:
        return apply(functions.ACTIVATION[form], input, *values)
    if form in functions.INPLACE and not torch.compiler.is_compiling() and not kernels.transforming():
        return apply(functions.INPLACE[form], input, *values)
    # A row in z keeps a copy of it, as torch does. And under transforms copy_ is the way to write that composes.
    return input.copy_(apply(functions.ACTIVATION[form], input.clone(), *values))


def _of_row(row: Row) -> Callable[..., Tensor]:
    """Return sigmoid(input), leaky_relu(input, negative_slope=0.01, inplace=False), …: with torch's arguments."""
    defaults: dict[str, Any] = {**dict(row.parameters), **dict(row.options)}
    if "inplace" in inspect.signature(row.module).parameters:
        defaults["inplace"] = False
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    arguments = inspect.Signature(names)

    def function(input: Tensor, *args: Any, **named: Any) -> Tensor:
        given = arguments.bind(*args, **named).arguments if args or named else {}
        inplace = given.pop("inplace", False)
        name, values = name_and_values(row.name, given)
        return activation(name, input, *values, inplace=inplace)

    function.__signature__ = arguments.replace(parameters=[inspect.Parameter("input", kind), *names])  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = row.name
    function.__doc__ = f"""a = G(z) of the row {row.name!r}, componentwise, any shape.

    Raises InputError if it is complex.

    >>> import torch
    >>> from manual_mlp import functional
    >>> z = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    >>> torch.autograd.gradcheck(functional.{row.name}, z)  # G′ is the limit of the difference quotient
    True
    """
    return function


# One function for each row: sigmoid, tanh, relu, …
globals().update({name: _of_row(row) for name, row in ACTIVATIONS.items()})


def add(*terms: Tensor) -> Tensor:
    """Σ_k a^k of terms of one shape, from the first term on; a single term is returned as it is.

    Terms of several dtypes are added in the widest, as torch adds them. Raises InputError for no terms, and for
    several shapes.

    >>> import torch
    >>> from manual_mlp import functional
    >>> functional.add(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]), torch.tensor([3.0, 4.0])).tolist()
    [4.5, 6.5]
    """
    if not terms:
        raise InputError("expected at least one term to add; got none: add a branch to the Sum")
    checks.tensors(**{f"term {index}": term for index, term in enumerate(terms)})
    checks.one_shape(terms)
    if torch.compiler.is_compiling():  # dynamo refuses a tensor that a Function gets twice, as in x + x
        terms = tuple(
            term.view_as(term) if any(term is before for before in terms[:index]) else term
            for index, term in enumerate(terms)
        )
    return apply(functions.Sum, *terms) if len(terms) > 1 else terms[0]


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """a ⊙ m / (1 − p) with P(m = 0) = p, any shape; draws the mask that torch.nn.functional.dropout draws on the CPU.

    Raises InputError for p outside [0, 1], for complex input, and for integers in training.

    >>> import torch
    >>> from manual_mlp import functional
    >>> functional.dropout(torch.ones(1000), p=0.5).unique().tolist()
    [0.0, 2.0]
    >>> functional.dropout(torch.ones(2), p=0.5, training=False).tolist()
    [1.0, 1.0]
    """
    checks.fraction("dropout probability", p)
    checks.real("input of dropout", input, whole=not training or p == 0)
    if not training or p == 0:
        return input
    mask = kernels.draw_(torch.empty_like(input, dtype=torch.bool), 1 - p)
    # At p = 1 the mask is 0 everywhere and there is nothing to rescale.
    output = apply(functions.Dropout, input, False, mask, 1 - p or 1.0)
    return input.copy_(output) if inplace else output


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


def quadratic_loss(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """C = (1/N) Σ_N Σ_i w ½ (a_i − ŷ_i)², the lecture's cost where w is 1.

    input (the prediction) and target (…, n_L), N the product of the leading dimensions, weight broadcastable to them,
    such as (N, 1) → scalar. Raises InputError for different shapes or dtypes, for a one-dimensional prediction, which
    has no N, and for a weight that requires a gradient.

    >>> import torch
    >>> from manual_mlp import functional
    >>> prediction = torch.tensor([[0.5], [1.0]], requires_grad=True)
    >>> cost = functional.quadratic_loss(prediction, torch.tensor([[1.0], [1.0]]))
    >>> cost.backward()
    >>> cost.item(), prediction.grad.tolist()  # ½ (0.5 − 1)² / 2, and (a − ŷ) / 2
    (0.0625, [[-0.25], [0.0]])
    """
    checks.tensors(prediction=input)
    checks.samples(input)
    input, target = _pair(input, target)
    return apply(functions.Quadratic, input, target, _factor("weight", weight, input), "samples")


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """(a − ŷ)² of each element, its sum or its mean: twice the quadratic cost, over all elements instead of N.

    input and target of the same shape → scalar, or that shape for reduction "none". Raises InputError as above.

    >>> import torch
    >>> from manual_mlp import functional
    >>> functional.mse_loss(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0]), reduction="none").tolist()
    [0.25, 0.0]
    """
    checks.reduction(reduction)
    input, target = _pair(input, target)
    return apply(functions.MeanSquares, input, target, None, reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """softplus(z) − ŷ z of each element, its sum or its mean; δ = σ(z) − ŷ.

    input (the logits) and target (…) of the same shape; weight and pos_weight broadcastable to it → scalar, or that
    shape for "none". Raises InputError for different shapes or dtypes, and for a weight that requires a gradient.

    >>> import torch
    >>> from manual_mlp import functional
    >>> z = torch.zeros(2, requires_grad=True)
    >>> functional.binary_cross_entropy_with_logits(z, torch.tensor([0.0, 1.0]), reduction="sum").backward()
    >>> z.grad.tolist()  # σ(0) − ŷ
    [0.5, -0.5]
    """
    checks.reduction(reduction)
    input, target = _pair(input, target)
    weight, pos_weight = _factor("weight", weight, input), _factor("pos_weight", pos_weight, input)
    if pos_weight is None:
        return apply(functions.BinaryCrossEntropy, input, target, weight, reduction)
    return apply(functions.WeightedBinaryCrossEntropy, input, target, weight, reduction, pos_weight)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """−log softmax(z)_class of each sample, its sum or its weighted mean; δ = softmax(z) − onehot.

    input (the logits) (classes,), (N, classes) or (N, classes, d_1, …); target either class indices, the same shape
    without the classes, or a probability for each class, the input's shape; weight (classes,).
    → scalar, or the shape without the classes for "none". As torch.nn.functional.cross_entropy.
    Raises InputError for shapes or dtypes that do not fit, labels out of range, a smoothing outside [0, 1].

    >>> import torch
    >>> from manual_mlp import functional
    >>> z = torch.zeros(1, 2, requires_grad=True)
    >>> functional.cross_entropy(z, torch.tensor([1])).backward()
    >>> z.grad.tolist()  # softmax(z) − onehot
    [[0.5, -0.5]]
    """
    checks.reduction(reduction)
    checks.fraction("label_smoothing", label_smoothing)
    checks.tensors(prediction=input, target=target)
    input, class_dim = _real_cost(input), min(1, input.dim() - 1)
    checks.logits(input, class_dim, weight)
    checks.target_of_logits(input, class_dim, target, ignore_index)
    z = input.movedim(class_dim, -1)
    weight = _factor("weight", weight, z)
    if target.dtype.is_floating_point:
        target = _pair(input, target)[1].movedim(class_dim, -1)
    try:
        return apply(functions.CrossEntropy, z, target, weight, ignore_index, label_smoothing, reduction)
    except (IndexError, RuntimeError):
        if not target.dtype.is_floating_point:
            checks.labels(target, z.shape[-1], ignore_index)
        raise


def _real_cost(input: Tensor) -> Tensor:
    """Return the prediction, in float32 under autocast, as torch computes a cost."""
    checks.real("prediction", input)
    return input.float() if input.dtype in kernels.ROUNDED and autocasting(input) else input


def _pair(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return prediction and target, which must agree in shape, dtype and device: nothing is broadcast or promoted."""
    checks.tensors(prediction=input, target=target)
    checks.same_shape(input, target)
    input, target = _real_cost(input), _real_cost(target) if target.dtype.is_floating_point else target
    if input.dtype != target.dtype or input.device != target.device:
        checks.one_kind(target=target, prediction=input)
    return input, target


def _factor(name: str, weight: Tensor | None, input: Tensor) -> Tensor | None:
    """Return a weight of a cost in the prediction's dtype."""
    if weight is None:
        return None
    checks.factor(name, weight, input)
    return weight.to(input.dtype)


COSTS: dict[str, Callable[..., Any]] = {
    "quadratic": quadratic_loss,
    "mse": mse_loss,
    "bce": binary_cross_entropy_with_logits,
    "cross_entropy": cross_entropy,
}
