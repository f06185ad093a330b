"""The counterpart of torch.nn.functional for grids and norms: see `functional.py`, which these are part of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manual_mlp import checks, grid_functions
from manual_mlp.autocast import autocasting, cast
from manual_mlp.errors import InputError
from manual_mlp.functions import apply
from manual_mlp.grids import Axes, Geometry, Windows

__all__ = ["avg_pool2d", "batch_norm", "conv2d", "layer_norm", "max_pool2d", "softmax"]  # for functional.py

Size = int | Sequence[int]


def _pair(name: str, value: Any) -> Axes:
    """Return one number for each axis, from one for both or from two."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, 2):
        checks.pair(name, value)
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
        input, weight, bias = cast(input), cast(weight), None if bias is None else cast(bias)
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
    s, d, kernel = _pair("stride", stride), _pair("dilation", dilation), (weight.shape[2], weight.shape[3])
    q, end = _padding(padding, s, d, kernel)
    last = weight.shape[1] > 1 and weight.stride(1) == 1
    return Geometry(s, q, d, groups, (a.shape[-2], a.shape[-1]), kernel, end, last)


def _padding(padding: Any, s: Axes, d: Axes, kernel: Axes) -> tuple[Axes, Axes]:
    """Return the padding of each axis, and how much more is at its end: "same" under an even kernel needs one more."""
    if not isinstance(padding, str):
        return _pair("padding", padding), (0, 0)
    if padding == "valid":
        return (0, 0), (0, 0)
    checks.same_padding(padding, s)
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
    kernel = _pair("kernel_size", kernel_size)
    s = _pair("stride", stride) if stride or isinstance(stride, int) else kernel
    plane = a.shape[-2], a.shape[-1]
    at = Windows(kernel, s, _pair("padding", padding), _pair("dilation", dilation), ceil_mode, plane)
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
    shape = tuple(normalized_shape)
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
        dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)  # type: ignore[attr-defined]
    input = input if dtype is None else input.to(dtype)
    checks.real("input of softmax", input)
    return apply(grid_functions.Softmax, input, dim)
