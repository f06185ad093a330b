"""The counterpart of torch.nn.functional: same argument names and meaning, derivatives from the sheet.

What a wrapper adds to its Function: the casts of autocast, and a sentence for an input that can't be right. The checks
that torch makes anyway are left to it, and put in words only once it has refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manual_mlp import formulas as sheet
from manual_mlp import functions, kernels
from manual_mlp.errors import InputError
from manual_mlp.formulas import Row
from manual_mlp.functions import ManualFunction, apply

# ---------------------------------------------------------------------------------------------------------------------
# Affine maps and activations
# ---------------------------------------------------------------------------------------------------------------------


def affine(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z = a Wᵀ + b.

    input (…, n_in), weight (n_out, n_in), bias (n_out,) → (…, n_out). Leading dimensions as torch.nn.functional.linear.
    Raises InputError for sizes, dtypes or devices that do not fit each other, and for complex tensors.
    """
    return apply_affine(functions.Affine, input, weight, bias)


def affine_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid", **parameters: float | str
) -> Tensor:
    """G(a Wᵀ + b) as one node of the graph; shapes and errors as `affine`.

    activation: a name of the activation table; parameters: its parameters, such as negative_slope=0.2.
    """
    name, values = name_and_values(activation, parameters)
    return apply_affine(functions.fused(name, values), input, weight, bias, *values)


def apply_affine(
    function: type[ManualFunction], input: Tensor, weight: Tensor, bias: Tensor | None, *parameters: float
) -> Tensor:
    """One affine Function, autocast and errors around it."""
    if autocasting(input):
        input, weight, bias = _autocast(input), _autocast(weight), None if bias is None else _autocast(bias)
    # What torch would take: complex numbers, and shapes that broadcast.
    if weight.dtype.is_complex or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError(_affine_problem(input, weight, bias))
    try:
        output = apply(function, input, weight, bias, *parameters)
    except RuntimeError as error:
        if problem := _affine_problem(input, weight, bias):
            raise InputError(problem) from error
        raise
    return output[0] if isinstance(output, tuple) else output


def _affine_problem(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """What is wrong with the arguments of an affine map, in a sentence; None if it is something else."""
    named = [("input", input), ("weight", weight), *([] if bias is None else [("bias", bias)])]
    for name, tensor in named:
        if not tensor.dtype.is_floating_point:
            return _not_real(f"{name} of an affine map", tensor)
    if weight.dim() != 2:
        return f"expected a weight of shape (out_features, in_features); got shape {tuple(weight.shape)}"
    n_out, n_in = weight.shape
    if input.dim() == 0 or input.shape[-1] != n_in:
        fix = "transpose the input" if n_in in input.shape else "flatten or select the features, or change in_features"
        return (
            f"expected an input whose last dimension is in_features={n_in}; got shape {tuple(input.shape)} "
            f"for a weight of shape {tuple(weight.shape)}: {fix}"
        )
    if bias is not None and bias.shape != (n_out,):
        return f"expected a bias of shape ({n_out},), one for each output; got shape {tuple(bias.shape)}"
    return _mix_problem(named)


def _mix_problem(named: list[tuple[str, Tensor]]) -> str | None:
    """Tensors of different dtypes or devices, in a sentence."""
    for what, of in (("dtype", lambda tensor: tensor.dtype), ("device", lambda tensor: tensor.device)):
        if len({of(tensor) for _, tensor in named}) > 1:
            came = ", ".join(f"{name} {of(tensor)}" for name, tensor in named)
            first = named[0]
            return f"expected one {what} for all tensors; got {came}: call .to({of(named[-1][1])}) on the {first[0]}"
    return None


def check_tensors(**named: object) -> None:
    """Raises InputError for what is no tensor, such as an array of NumPy (a tracer's proxy has what a tensor has)."""
    for name, value in named.items():
        if not hasattr(value, "requires_grad"):
            raise InputError(
                f"expected a torch.Tensor as {name}; got {type(value).__name__}: call torch.as_tensor() on it"
            )


def _check_real(name: str, tensor: Tensor) -> None:
    try:
        if tensor.dtype.is_floating_point:
            return
    except AttributeError:
        check_tensors(**{name: tensor})
        raise
    raise InputError(_not_real(name, tensor))


def _not_real(name: str, tensor: Tensor) -> str:
    fix = "split it into its real and imaginary parts" if tensor.dtype.is_complex else "call .float() on it"
    return f"expected a real floating-point {name}; got {tensor.dtype}: {fix}"


def _device_type(tensor: Tensor) -> str:
    """The device autocast is asked for; torch has no autocast to ask about on meta."""
    device = tensor.device.type
    return "cpu" if device == "meta" else device


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; first whether it is for any, since naming the device is slow."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(_device_type(tensor))


def _autocast(tensor: Tensor) -> Tensor:
    """To autocast's dtype, as torch does for a linear layer: floating point but not float64."""
    if not tensor.dtype.is_floating_point or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(_device_type(tensor)))


@functools.lru_cache(maxsize=1024)
def bound_row(name: str, values: tuple[float, ...]) -> Row:
    """Return the row of this name with these values."""
    return sheet.ACTIVATIONS[name].bind(*values)


def name_and_values(name: str, given: dict[str, float | str]) -> tuple[str, tuple[float, ...]]:
    """Return the name of a row and the values of its parameters, from torch's names for both.

    Raises InputError for an unknown name, parameter or option.
    """
    if name not in sheet.ACTIVATIONS:
        known = ", ".join(sheet.ACTIVATIONS)
        raise InputError(f"expected the name of an activation, one of {known}; got {name!r}")
    row, parameters = sheet.ACTIVATIONS[name], dict(given)
    for option, _ in row.options:
        if option in parameters:
            row = _with_option(row, option, parameters.pop(option))
    if unknown := parameters.keys() - dict(row.parameters).keys():
        takes = ", ".join(dict(row.parameters)) or "no parameters"
        raise InputError(f"activation {name!r} takes {takes}; got {', '.join(sorted(unknown))}")
    return row.name, tuple(float(parameters.get(parameter, default)) for parameter, default in row.parameters)


def _with_option(row: Row, option: str, value: Any) -> Row:
    """Return the row that computes what row.module computes with this option."""
    rows = {dict(other.options)[option]: other for other in sheet.ACTIVATIONS.values() if other.module is row.module}
    if value not in rows:
        raise InputError(f"expected {row.name}'s {option} to be {' or '.join(map(repr, rows))}; got {value!r}")
    return rows[value]


def _activation(name: str, input: Tensor, *values: float, inplace: bool = False) -> Tensor:
    """One componentwise Function; refuses what torch would promote or differentiate without conjugates."""
    _check_real("input of an activation", input)
    form = name, sheet.ACTIVATIONS[name].saves_with(*values)
    if not inplace:
        return apply(functions.ACTIVATION[form], input, *values)
    if form in functions.INPLACE and not torch.compiler.is_compiling() and not kernels.transforming():
        return apply(functions.INPLACE[form], input, *values)
    # A row in z keeps a copy of it, as torch does. And under transforms copy_ is the way to write that composes.
    return input.copy_(apply(functions.ACTIVATION[form], input.clone(), *values))


def identity(input: Tensor) -> Tensor:
    """a = z, the linear neuron: the input itself, any shape."""
    return input


def sigmoid(input: Tensor) -> Tensor:
    """a = 1/(1 + e^−z), componentwise, any shape. Raises InputError for integer or complex input, as all of these."""
    return _activation("sigmoid", input)


def tanh(input: Tensor) -> Tensor:
    """a = tanh z, componentwise, any shape."""
    return _activation("tanh", input)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """a = max(z, 0), componentwise, any shape."""
    return _activation("relu", input, inplace=inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """a = z where z > 0, else negative_slope · z, componentwise, any shape."""
    return _activation("leaky_relu", input, float(negative_slope), inplace=inplace)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """a = log(1 + e^βz)/β, and z where βz > threshold, componentwise, any shape."""
    return _activation("softplus", input, float(beta), float(threshold))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """a = z σ(z), componentwise, any shape."""
    return _activation("silu", input, inplace=inplace)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """a = z Φ(z), or its tanh form for approximate="tanh", componentwise, any shape."""
    name, _ = name_and_values("gelu", {"approximate": approximate})
    return _activation(name, input)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """a ⊙ m / (1 − p) with P(m = 0) = p, any shape; draws the mask that torch.nn.functional.dropout draws on the CPU.

    Raises InputError for p outside [0, 1], and for integer or complex input.
    """
    if not 0 <= p <= 1:
        raise InputError(f"expected a dropout probability between 0 and 1; got {p}")
    _check_real("input of dropout", input)
    if not training or p == 0:
        return input
    mask = torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - p)
    # At p = 1 the mask is 0 everywhere and there is nothing to rescale.
    output = apply(functions.Dropout, input, mask, 1 - p or 1.0)
    return input.copy_(output) if inplace else output


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


def quadratic_loss(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """C = (1/N) Σ_N Σ_i w ½ (a_i − ŷ_i)², the lecture's cost where w is 1.

    input (the prediction) and target (…, n_L), N the product of the leading dimensions, weight broadcastable to them,
    such as (N, 1) → scalar. Raises InputError for different shapes or dtypes, for a one-dimensional prediction, which
    has no N, and for a weight that requires a gradient.
    """
    check_tensors(prediction=input)
    if input.dim() < 2:
        raise InputError(
            f"expected a prediction of shape (N, outputs); got {tuple(input.shape)}, "
            "whose 1/N would be lost: call .unsqueeze(-1) for one output, .unsqueeze(0) for one sample"
        )
    input, target = _pair(input, target)
    return apply(functions.Quadratic, input, target, _factor("weight", weight, input), "samples")


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """(a − ŷ)² of each element, its sum or its mean: twice the quadratic cost, over all elements instead of N.

    input and target of the same shape → scalar, or that shape for reduction "none". Raises InputError as above.
    """
    _check_reduction(reduction)
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
    """
    _check_reduction(reduction)
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
    """
    _check_reduction(reduction)
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"expected a label_smoothing between 0 and 1; got {label_smoothing}")
    input = _real_cost(input)
    weight = _constant("weight", weight, input)
    if target.dtype.is_floating_point and ignore_index >= 0:
        raise InputError(f"expected class indices beside ignore_index={ignore_index}; got a probability for each class")
    class_dim = min(1, input.dim() - 1)
    if input.dim() == 0 or (weight is not None and weight.shape != (input.shape[class_dim],)):
        came = f"{tuple(input.shape)}" + ("" if weight is None else f" with a weight of shape {tuple(weight.shape)}")
        raise InputError(f"expected logits (N, classes) and a weight (classes,); got {came}")
    z = input.movedim(class_dim, -1)
    if target.dtype.is_floating_point:
        if target.shape != input.shape:
            raise InputError(_target_problem(input, target))
        _, target = _pair(input, target)
        return apply(functions.CrossEntropy, z, target.movedim(class_dim, -1), weight, label_smoothing, reduction)
    return _cross_entropy_of_class(z, target, weight, ignore_index, reduction, label_smoothing)


def _cross_entropy_of_class(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    if target.dtype not in (torch.int64, torch.uint8) or target.shape != z.shape[:-1]:
        raise InputError(_target_problem(z, target))
    try:
        return apply(functions.CrossEntropyOfClass, z, target, weight, ignore_index, label_smoothing, reduction)
    except (IndexError, RuntimeError) as error:
        if problem := _labels_problem(z, target, ignore_index):
            raise InputError(problem) from error
        raise


def _target_problem(input: Tensor, target: Tensor) -> str:
    return (
        f"expected class indices (int64, the shape of the logits {tuple(input.shape)} without the classes) or "
        f"probabilities of the logits' shape and dtype; got {target.dtype} of shape {tuple(target.shape)}: "
        "call .long() on class indices, .squeeze(-1) on a column of them"
    )


def _labels_problem(z: Tensor, target: Tensor, ignore_index: int) -> str | None:
    classes = z.shape[-1]
    target = torch.where(target != ignore_index, target, 0)
    if target.numel() == 0 or (int(target.min()) >= 0 and int(target.max()) < classes):
        return None
    return (
        f"expected class labels from 0 to {classes - 1} (or ignore_index {ignore_index}); "
        f"got labels from {int(target.min())} to {int(target.max())}: renumber them from 0"
    )


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise InputError(f"expected a reduction of 'none', 'mean' or 'sum'; got {reduction!r}")


def _real_cost(input: Tensor) -> Tensor:
    """A cost is computed in float32 under autocast, as torch does."""
    _check_real("prediction", input)
    if input.dtype in (torch.bfloat16, torch.float16) and autocasting(input):
        return input.float()
    return input


def _pair(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and target, which must agree in shape, dtype and device: nothing is broadcast or promoted."""
    check_tensors(prediction=input, target=target)
    if input.shape != target.shape:
        fix = "the target" if input.dim() > target.dim() else "the prediction"
        hint = f": call .unsqueeze(-1) on {fix}" if abs(input.dim() - target.dim()) == 1 else ""
        raise InputError(
            f"expected prediction and target of the same shape; got {tuple(input.shape)} and "
            f"{tuple(target.shape)}, which would broadcast to something else{hint}"
        )
    input, target = _real_cost(input), target if not target.dtype.is_floating_point else _real_cost(target)
    if input.dtype != target.dtype or input.device != target.device:
        raise InputError(str(_mix_problem([("target", target), ("prediction", input)])))
    return input, target


def _constant(name: str, factor: Tensor | None, input: Tensor) -> Tensor | None:
    """A weight of a cost: a constant, in the prediction's dtype and on its device."""
    if factor is None:
        return None
    if factor.requires_grad:
        raise InputError(
            f"expected a {name} without a gradient, as torch takes it; got one that requires it: .detach()"
        )
    if factor.device != input.device:
        raise InputError(str(_mix_problem([(name, factor), ("prediction", input)])))
    return factor.to(input.dtype)


def _factor(name: str, factor: Tensor | None, input: Tensor) -> Tensor | None:
    """A constant for each element of the prediction, or broadcastable to that."""
    if factor is not None and not _broadcasts(factor.shape, input.shape):
        raise InputError(
            f"expected a {name} that broadcasts to the input's shape {tuple(input.shape)}; got {tuple(factor.shape)}"
        )
    return _constant(name, factor, input)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(to[len(to) - len(shape) :]), strict=True)
    )


COSTS: dict[str, Callable[..., Any]] = {
    "quadratic": quadratic_loss,
    "mse": mse_loss,
    "bce": binary_cross_entropy_with_logits,
    "cross_entropy": cross_entropy,
}
