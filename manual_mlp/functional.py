"""The counterpart of torch.nn.functional: same argument names and meaning, derivatives from the sheet.

A function here adds two things to its Function: the casts of autocast, and a sentence for an input that can't be right.
It leaves to torch the checks that torch makes anyway, and puts them into words only after torch has refused.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manual_mlp import checks, functions, grid_functions, kernels
from manual_mlp.errors import InputError
from manual_mlp.formulas import ACTIVATIONS, Row
from manual_mlp.functions import ManualFunction, apply
from manual_mlp.grids import Axes, Geometry, Windows
from manual_mlp.kernels import autocasting, cast

if TYPE_CHECKING:  # the arguments of what `_of_row` makes
    from torch.nn.functional import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh  # noqa: F401

Size = int | Sequence[int]

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
    return apply_fused(name, values, input, weight, bias)


def apply_fused(name: str, values: tuple[float, ...], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Call the Function of an affine map and this activation; under a GPU's autocast softplus has its own dtype."""
    if name == "softplus" and kernels.on_gpu_autocasting(input):
        return activation(name, affine(input, weight, bias), *values)
    return apply_affine(functions.fused(name, values), input, weight, bias, *values)


def apply_affine(
    function: type[ManualFunction], input: Tensor, weight: Tensor, bias: Tensor | None, *values: float
) -> Tensor:
    """Call an affine Function, with autocast and errors around it."""
    if autocasting(input):
        input, weight, bias = cast(input), cast(weight), cast(bias)
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
        came = f"{checks.brief(name)}{hint}"
        raise InputError(f"expected the name of an activation, one of {', '.join(ACTIVATIONS)}; got {came}")
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
    if name == "softplus":
        input = kernels.in_gpus_dtype(input)
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
# Grids, norms, softmax
# ---------------------------------------------------------------------------------------------------------------------


def _axes(name: str, value: Any) -> Axes:
    """Return one number for each axis, from one for both or from two."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, 2):
        raise InputError(f"expected one number as {name}, or one for each of the two axes; got {value!r}")
    return values[0], values[-1]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """z_{n,o,p} = Σ_{c,k} a_{n,c,sp+dk−q} W_{o,c,k} + b_o, as torch.nn.functional.conv2d.

    input (N, C, H, W) or (C, H, W), weight (O, C/groups, k, k), bias (O,) → (N, O, H′, W′) or (O, H′, W′).
    padding: numbers, "valid" or "same". Raises InputError for sizes, dtypes or devices that do not fit each other, and
    for complex tensors.

    >>> import torch, manual_mlp as mm
    >>> edge = torch.tensor([[[[-1.0, 1.0]]]])
    >>> mm.functional.conv2d(torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]]), edge)
    tensor([[[[0., 1., 0.]]]])
    """
    if autocasting(input):
        input, weight, bias = cast(input), cast(weight), cast(bias)
    if input.dim() not in (3, 4) or input.shape[-3] == 0 or weight.dim() != 4 or weight.dtype.is_complex:
        checks.convolution(input, weight, bias, groups)
    at = geometry(input, weight, stride, padding, dilation, groups)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    try:
        z = apply(grid_functions.Convolution, grid_functions.OUTPUT, batch, weight, None, bias, at)
    except RuntimeError:
        checks.convolution(input, weight, bias, groups)
        raise
    return z if input.dim() == 4 else z.squeeze(0)


def geometry(a: Tensor, weight: Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int) -> Geometry:
    """Return where the kernels of a convolution read."""
    s, d, kernel = _axes("stride", stride), _axes("dilation", dilation), (weight.shape[2], weight.shape[3])
    q, end = _padding(padding, s, d, kernel)
    last = weight.shape[1] > 1 and weight.stride(1) == 1
    return Geometry(s, q, d, groups, (a.shape[-2], a.shape[-1]), kernel, end, last)


def _padding(padding: Any, s: Axes, d: Axes, kernel: Axes) -> tuple[Axes, Axes]:
    """Return the padding of each axis, and how much more is at its end: "same" under an even kernel needs one more."""
    if not isinstance(padding, str):
        return _axes("padding", padding), (0, 0)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise InputError(f"expected a padding of 'valid', 'same' or numbers; got {padding!r}")
    if s != (1, 1):
        raise InputError(f"expected a stride of 1 for padding='same'; got {s}: give the padding in numbers")
    total = d[0] * (kernel[0] - 1), d[1] * (kernel[1] - 1)
    return (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest number of each window, the first of equals; δ goes where it came from.

    input (N, C, H, W) or (C, H, W) → (N, C, H′, W′) or (C, H′, W′), and its places in the plane for return_indices.
    stride None: the kernel's size. As torch.nn.functional.max_pool2d. Raises InputError for a complex input and for a
    shape that is no image's.

    >>> import torch, manual_mlp as mm
    >>> a = torch.tensor([[[1.0, 5.0], [5.0, 2.0]]], requires_grad=True)
    >>> mm.functional.max_pool2d(a, 2).sum().backward()
    >>> a.grad
    tensor([[[0., 1.],
             [0., 0.]]])
    """
    batch, at = _windows(input, kernel_size, stride, padding, dilation, ceil_mode)
    output, places = apply(grid_functions.Largest, batch, at)
    if input.dim() == 3:
        output, places = output.squeeze(0), places.squeeze(0)
    return (output, places) if return_indices else output


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window; δ spreads evenly over it. As torch.nn.functional.avg_pool2d.

    input (N, C, H, W) or (C, H, W) → (N, C, H′, W′) or (C, H′, W′). stride None: the kernel's size.
    count_include_pad: the padding counts in the mean; divisor_override: instead of the count. Raises InputError for a
    complex input and for a shape that is no image's.

    >>> import torch, manual_mlp as mm
    >>> mm.functional.avg_pool2d(torch.tensor([[[1.0, 5.0], [4.0, 2.0]]]), 2)
    tensor([[[3.]]])
    """
    batch, at = _windows(input, kernel_size, stride, padding, 1, ceil_mode)
    output: Tensor = apply(grid_functions.Average, batch, False, None, at, count_include_pad, divisor_override)
    return output.squeeze(0) if input.dim() == 3 else output


def _windows(
    input: Tensor, kernel_size: Size, stride: Any, padding: Size, dilation: Size, ceil_mode: bool
) -> tuple[Tensor, Windows]:
    checks.real("input of a pooling", input, whole=True)
    checks.image("input of a pooling", input)
    at = windows(input, kernel_size, stride, padding, dilation, ceil_mode)
    return input if input.dim() == 4 else input.unsqueeze(0), at


def windows(a: Tensor, kernel_size: Size, stride: Any, padding: Size, dilation: Size, ceil_mode: bool) -> Windows:
    """Return where the windows of a pooling lie."""
    kernel = _axes("kernel_size", kernel_size)
    s = _axes("stride", stride) if stride or isinstance(stride, int) else kernel
    plane = a.shape[-2], a.shape[-1]
    at = Windows(kernel, s, _axes("padding", padding), _axes("dilation", dilation), ceil_mode, plane)
    if at.d != (1, 1) and any(map(_jumps, plane, kernel, s, at.q, at.d, (ceil_mode, ceil_mode))):
        raise InputError(
            f"expected windows that each meet a number; got dilation={at.d} and padding={at.q}, which jump over "
            f"a plane of {at.size}: take less dilation or padding"
        )
    return at


def _jumps(size: int, kernel: int, s: int, q: int, d: int, ceil: bool) -> bool:
    """Return True if a window that begins in the padding has no place inside. torch would write beyond the plane."""
    last = size + q - d * (kernel - 1) - 1 + (s - 1) * ceil
    return s > 0 and d > 1 and any(start % d >= size for start in range(-q, min(0, last + 1), s))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """γ x̂ + β over the rows (and places) of each channel, as torch.nn.functional.batch_norm.

    input (N, C, …), all others (C,) → (N, C, …). In training μ and v are the batch's, and the running statistics, if
    given, are written: m := (1 − κ) m + κ μ, s := (1 − κ) s + κ v n/(n − 1). Otherwise these are taken for μ and v.
    No sample has a gradient of its own through a batch's statistics: under vmap each batch is a batch norm's own.
    Raises InputError for shapes that do not fit, a batch with one number for a channel, and complex tensors.

    >>> import torch, manual_mlp as mm
    >>> m, s = torch.zeros(1), torch.ones(1)
    >>> y = mm.functional.batch_norm(torch.tensor([[1.0], [3.0]]), m, s, training=True, momentum=0.5, eps=1e-12)
    >>> y.flatten(), m, s
    (tensor([-1.,  1.]), tensor([1.]), tensor([1.5000]))
    """
    checks.real("input of a norm", input)
    checks.batch_norm(input, running_mean, running_var, weight, bias, training, eps)
    if not training:
        return apply(grid_functions.RunningNorm, input, weight, bias, 0, eps, running_mean, running_var)
    of_batches = running_mean, running_var, momentum
    y, _, _, *running = apply(grid_functions.BatchNorm, input, weight, bias, 0, eps, *of_batches)
    if running and input.numel():
        with torch.no_grad():
            running_mean.copy_(running[0])  # type: ignore[union-attr]
            running_var.copy_(running[1])  # type: ignore[union-attr]
    return y


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """γ x̂ + β over the last dimensions of each row, as torch.nn.functional.layer_norm.

    input (…, *normalized_shape), weight and bias of that shape → the input's shape. Raises InputError for shapes that
    do not fit, and for complex tensors.

    >>> import torch, manual_mlp as mm
    >>> mm.functional.layer_norm(torch.tensor([[1.0, 3.0], [10.0, 50.0]]), (2,))
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    """
    checks.real("input of a norm", input)
    shape, input = tuple(normalized_shape), kernels.in_gpus_dtype(input)
    checks.layer_norm(input, shape, weight, bias)
    return apply(grid_functions.LayerNorm, input, weight, bias, len(shape), eps)[0]


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """e^z / Σ_c e^z along one dimension; δ = (g − Σ_c g a) a. As torch.nn.functional.softmax.

    dtype: cast the input to it first. Raises InputError for a complex input.

    >>> import torch, manual_mlp as mm
    >>> mm.functional.softmax(torch.tensor([0.0, 0.0, 0.0, 0.0]), 0)
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if dim is None:
        dim = torch.nn.functional._get_softmax_dim("softmax", input.dim(), _stacklevel)  # type: ignore[attr-defined]
    input = input if dtype is None else input.to(dtype)
    checks.real("input of softmax", input)
    return apply(grid_functions.Softmax, kernels.in_gpus_dtype(input) if dtype is None else input, dim)


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
    input, target = _pair(input, target)
    checks.samples(input)
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
    checks.classes(input, class_dim, weight, target, ignore_index)
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
