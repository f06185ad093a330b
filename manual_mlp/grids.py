"""THE SECOND PAGE OF THE SHEET: convolution, pooling, batch norm, layer norm and softmax, forward and backward.

The letters of `formulas.py` hold. Beside them:

    a                   a grid of numbers for each sample and channel   (N, C, H, W)
    W, b                kernels and biases of a convolution             (O, C/m, k, k), (O,)
    p, k                a place of the output, a place of the kernel    one for each axis
    s, q, d, m          stride, padding, dilation (for each axis), number of groups
    i                   the place in its plane that a largest number was taken from
    x̂ = (x − μ) r       x normalised over a set of n elements: mean μ, biased variance v, r = 1/√(v + ε)
    γ, β                weight and bias of a norm

The convolution closes under differentiation: T(a, W, g) = Σ g · (a ∗ W) is linear in each of the three, and its partial
derivatives are `conv`, `conv_input` and `conv_weight`. Derivatives of any order are these three again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, rsqrt
from torch.nn import functional as F

Axes = tuple[int, int]

# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)  # and no tuple, in which torch.func would look for tensors
class Geometry:
    """The places that a kernel reads: output place p and kernel place k meet at input place s p + d k − q.

    size and kernel are (H, W) of the input and of the kernel; end is the padding at the end of each axis beyond q;
    last: the weight lies in memory with its channels last, and so does its gradient.
    """

    s: Axes
    q: Axes
    d: Axes
    m: int
    size: Axes
    kernel: Axes
    end: Axes = (0, 0)
    last: bool = False


def padded(a: Tensor, at: Geometry) -> Tensor:
    """Return a with zeros at the end of its axes."""
    return F.pad(a, (0, at.end[1], 0, at.end[0])) if any(at.end) else a


def conv(a: Tensor, weight: Tensor, bias: Tensor | None, at: Geometry) -> Tensor:
    """z_{n,o,p} = Σ_{c,k} a_{n,c,sp+dk−q} W_{o,c,k} + b_o, (N, C, H, W) → (N, O, H′, W′)."""
    return F.conv2d(padded(a, at), weight, bias, at.s, at.q, at.d, at.m)


def conv_input(weight: Tensor, g: Tensor, at: Geometry) -> Tensor:
    """∂C/∂a = g ∗ᵀ W, (N, O, H′, W′) → (N, C, H, W). r: the cells at the end of an axis that the stride left unread."""
    if weight.numel() == 0 or g.numel() == 0:
        return g.new_zeros(g.shape[0], weight.shape[1] * at.m, *at.size)
    sizes = [size + end for size, end in zip(at.size, at.end, strict=True)]
    axes = zip(sizes, g.shape[2:], at.s, at.q, at.d, at.kernel, strict=True)
    r = [size - ((places - 1) * s - 2 * q + d * (k - 1) + 1) for size, places, s, q, d, k in axes]
    whole = F.conv_transpose2d(g, weight, None, at.s, at.q, r, at.m, at.d)
    # No view, because torch asserts that a Function returns none under forward over reverse.
    return whole.narrow(2, 0, at.size[0]).narrow(3, 0, at.size[1]).contiguous() if any(at.end) else whole


def conv_weight(a: Tensor, g: Tensor, at: Geometry) -> Tensor:
    """∂C/∂W_{o,c,k} = Σ_{n,p} g_{n,o,p} a_{n,c,sp+dk−q}: conv with s and d, rows and channels exchanged."""
    a = padded(a, at)
    n, channels, *size = a.shape
    c, outputs = channels // at.m, g.shape[1]
    if a.numel() == 0 or g.numel() == 0:
        return g.new_zeros(outputs, c, *at.kernel)
    by_group = a.reshape(n, at.m, c, *size).permute(2, 1, 0, 3, 4).reshape(c, at.m * n, *size)
    products = F.conv2d(by_group, g.transpose(0, 1), None, at.d, at.q, at.s, at.m)
    products = products.narrow(2, 0, at.kernel[0]).narrow(3, 0, at.kernel[1]).transpose(0, 1)
    return products.contiguous(memory_format=torch.channels_last if at.last else torch.contiguous_format)


def conv_bias(g: Tensor) -> Tensor:
    """∂C/∂b_o = Σ_{n,p} g_{n,o,p}."""
    return g.sum((0, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Pooling
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The places that a pooling's windows read: output place p and window place k meet at input place s p + d k − q.

    size and kernel are (H, W) of the plane and of a window; with ceil a last window may overhang.
    """

    kernel: Axes
    s: Axes
    q: Axes
    d: Axes
    ceil: bool
    size: Axes


def places(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, C, H W)."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def largest(a: Tensor, at: Windows) -> tuple[Tensor, Tensor]:
    """a′_{n,c,p} = max_k a_{n,c,sp+dk−q}, and i, the place in its plane of the first that is largest, or NaN."""
    return F.max_pool2d(a, at.kernel, at.s, at.q, at.d, at.ceil, return_indices=True)


def gather(a: Tensor, i: Tensor) -> Tensor:
    """a′_{n,c,p} = a_{n,c,i(p)}, (N, C, H, W) → (N, C, H′, W′): the largest number of each window, by its place."""
    return places(a).gather(2, places(i)).reshape(i.shape)


def scatter(g: Tensor, i: Tensor, size: Axes) -> Tensor:
    """∂C/∂a_j = Σ_{p: i(p)=j} g_p, (N, C, H′, W′) → (N, C, H, W)."""
    plane = g.new_zeros(*g.shape[:2], size[0] * size[1])
    return plane.scatter_add(2, places(i), places(g)).reshape(*g.shape[:2], *size)


def average(a: Tensor, at: Windows, with_padding: bool, divisor: int | None) -> Tensor:
    """a′ = S a / D, (N, C, H, W) → (N, C, H′, W′): S sums windows, D counts their cells."""
    return F.avg_pool2d(a, at.kernel, at.s, at.q, at.ceil, with_padding, divisor)


def counts(windows: int, s: int, k: int, q: int, size: int, with_padding: bool) -> list[int]:
    """Return how many cells each of the windows along one axis counts, with or without the padding's."""
    low, high = (-q, size + q) if with_padding else (0, size)
    return [min(p * s - q + k, high) - max(p * s - q, low) for p in range(windows)]


def shared(g: Tensor, at: Windows, with_padding: bool, divisor: int | None) -> Tensor:
    """g / D."""
    axes = zip(g.shape[2:], at.s, at.kernel, at.q, at.size, strict=True)
    rows, columns = (counts(*axis, with_padding) for axis in axes)
    if divisor is None and ({*rows}, {*columns}) != ({at.kernel[0]}, {at.kernel[1]}):
        cells = [[row * column for column in columns] for row in rows]
        return g / torch.tensor(cells, dtype=g.dtype, device=g.device)
    return g / (divisor or at.kernel[0] * at.kernel[1])


def spread(g: Tensor, at: Windows, with_padding: bool, divisor: int | None) -> Tensor:
    """Sᵀ (g / D), (N, C, H′, W′) → (N, C, H, W): each cell gets what the windows send that read it."""
    n, c, *places = g.shape
    cells, windows = at.kernel[0] * at.kernel[1], places[0] * places[1]
    g = shared(g, at, with_padding, divisor).reshape(n, c, 1, windows).expand(n, c, cells, windows)
    h, w = ((count - 1) * s + k for count, s, k in zip(places, at.s, at.kernel, strict=True))
    whole = F.fold(g.reshape(n, c * cells, windows), (h, w), at.kernel, stride=at.s)
    (top, left), (height, width) = at.q, at.size
    return F.pad(whole, (-left, left + width - w, -top, top + height - h))


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation: batch norm takes the set of a channel, layer norm that of a row
# ---------------------------------------------------------------------------------------------------------------------

Dims = tuple[int, ...]


def moments(x: Tensor, over: Dims, ε: float) -> tuple[Tensor, Tensor]:
    """μ = mean x, r = 1/√(v + ε), v = mean (x − μ)² over the set."""
    μ = x.mean(over, keepdim=True)
    return μ, reciprocal(((x - μ) ** 2).mean(over, keepdim=True), ε)


def reciprocal(v: Tensor, ε: float) -> Tensor:
    """r = 1/√(v + ε)."""
    return rsqrt(v + ε)


def normalised(x: Tensor, μ: Tensor, r: Tensor) -> Tensor:
    """x̂ = (x − μ) r."""
    return (x - μ) * r


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ x + β, of those that are there."""
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def P(u: Tensor, x̂: Tensor, over: Dims) -> Tensor:
    """P u = u − mean u − x̂ mean(u x̂): ∂x̂/∂x = r P. It is symmetric, so backward and tangent are the same line."""
    return u - u.mean(over, keepdim=True) - x̂ * (u * x̂).mean(over, keepdim=True)


def norm_input(g: Tensor, x̂: Tensor, r: Tensor, weight: Tensor | None, over: Dims | None) -> Tensor:
    """∂C/∂x = r P(γ g); where μ and r are given numbers, and no set is, r γ g."""
    u = scaled(g, weight, None)
    return (u if over is None else P(u, x̂, over)) * r


def total(x: Tensor, rows: Dims) -> Tensor:
    """Σ x over the rows, of which there may be none: torch would sum over all dimensions."""
    return x.sum(rows) if rows else x


def norm_weight(g: Tensor, x̂: Tensor, rows: Dims) -> Tensor:
    """∂C/∂γ = Σ g x̂."""
    return total(g * x̂, rows)


def norm_bias(g: Tensor, rows: Dims) -> Tensor:
    """∂C/∂β = Σ g."""
    return total(g, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------------------------------


def softmax(z: Tensor, dim: int) -> Tensor:
    """a = e^z / Σ_c e^z, the sum over the classes c along one dimension."""
    return torch.softmax(z, dim)


def softmax_delta(g: Tensor, a: Tensor, dim: int) -> Tensor:
    """δ = (g − Σ_c g a) a."""
    return (g - (g * a).sum(dim, keepdim=True)) * a
