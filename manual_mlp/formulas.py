"""THE SHEET: every formula of the package, forward and δ, on plain tensors. No autograd, no modules, no state.

Letters and indices, here and in all code that calls this file (L layers, the input layer is layer 1, N rows):

    a^1 = x             input                                           (N, n_1)
    W^l, b^l            weight and bias between layer l and layer l+1   (n_{l+1}, n_l), (n_{l+1},)
    z^{l+1} = a^l W^lᵀ + b^l   input of the neurons of layer l+1        (N, n_{l+1})
    a^l = G(z^l)        activation, componentwise                       (N, n_l)
    y = a^L, ŷ          prediction and target                           (N, n_L)
    C                   cost                                            scalar
    δ^l = ∂C/∂z^l       backpropagated error (`delta`)                  (N, n_l)
    g                   ∂C/∂(output): what arrives from downstream

The five steps of backpropagation:

    1. forward          z^{l+1} = a^l W^lᵀ + b^l,  a^{l+1} = G(z^{l+1})             affine, Activation.G
    2. output error     δ^L = ∂C/∂a^L ⊙ G′(z^L)                                     the cost's delta, Activation.delta
    3. right to left    δ^l = (δ^{l+1} W^l) ⊙ G′(z^l)                               grad_input, Activation.delta
    4. gradients        ∂C/∂W^l = (δ^{l+1})ᵀ a^l,  ∂C/∂b^l = Σ_N δ^{l+1}            grad_weight, grad_bias
    5. update           w := w − LR · ∂C/∂w, every δ taken with the old weights

Leading dimensions: N stands for any number of them, as in torch.nn.Linear. Every backward formula is out of place and
made of ordinary tensor operations, so that it can itself be differentiated, vmapped and compiled; relu and leaky_relu
have a quicker form where nothing of this is asked (`plain`).

Source: the lecture "Neural Networks – The essentials", which writes the prediction y and the true label ŷ.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from manual_mlp.errors import InputError

ROUNDED = (torch.bfloat16, torch.float16)  # their formulas are evaluated in float32 and rounded once

# ---------------------------------------------------------------------------------------------------------------------
# The affine map (steps 1, 3 and 4)
# ---------------------------------------------------------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """(…, n) as (N, n). With explicit N: −1 is ambiguous for an empty batch, and legacy vmap has no `flatten`."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def affine(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z = a Wᵀ + b, (…, n_in) → (…, n_out)."""
    return F.linear(a, weight, bias)


def turned(like: Tensor, n: int, outputs: int) -> bool:
    """Whether z (N, n_out) is sooner there as (W aᵀ)ᵀ, column by column.

    The product of a few neurons and many rows takes MKL 0.4 to 1.0 of the time in this order, but of 16 to 20 neurons.
    """
    if not like.is_cpu or like.dtype in ROUNDED or not torch.backends.mkl.is_available():
        return False
    return n >= 32 and (1 < outputs < 16 or 20 < outputs < 32)


def affine_(a: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
    """z := a Wᵀ + b, (N, n_in) → (N, n_out)."""
    _nn.linear(a, weight, bias, out=z)


def affine_by_columns_(a_t: Tensor, weight: Tensor, bias: Tensor | None, z_t: Tensor) -> None:
    """zᵀ := W aᵀ + b, (n_in, N) → (n_out, N), for a z that lies by columns, as `turned` says."""
    if bias is None:
        torch.mm(weight, a_t, out=z_t)
    else:
        torch.addmm(bias.unsqueeze(1), weight, a_t, out=z_t)


def grad_input(delta: Tensor, weight: Tensor) -> Tensor:
    """∂C/∂a = δ W, (…, n_out) → (…, n_in)."""
    return torch.mm(delta, weight) if delta.dim() == 2 else delta @ weight  # of two dimensions mm is the quicker call


def grad_weight(delta: Tensor, a: Tensor) -> Tensor:
    """∂C/∂W = δᵀ a, summed over the batch: the dyadic product δ aᵀ of the lecture, (n_out, n_in)."""
    return torch.mm(rows(delta).t(), rows(a))


def grad_bias(delta: Tensor) -> Tensor:
    """∂C/∂b = Σ_N δ, (n_out,)."""
    return rows(delta).sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Activations: G(z), and δ = g ⊙ G′ written in what is saved
# ---------------------------------------------------------------------------------------------------------------------


def rounded_once(delta: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Half precision: evaluate in float32 and round once, as torch's own kernels do."""

    @functools.wraps(delta)
    def evaluate(g: Tensor, saved: Tensor, *parameters: float) -> Tensor:
        if g.dtype in ROUNDED:
            return delta(g.float(), saved.float(), *parameters).to(g.dtype)
        return delta(g, saved, *parameters)

    return evaluate


_CONSTANTS = (
    *(0.0, 0.5, 1.0, 2.0, -0.5),
    *(-0.7071067811865476, 0.3989422804014327),  # of gelu: −1/√2 and 1/√(2π)
    *(0.7978845608028654, 2 * 0.7978845608028654, 0.044715, 3 * 0.044715),  # of gelu_tanh: √(2/π) and the cubic term's
)
with torch.inference_mode(False):  # in which this may be imported
    _NUMBERS = {
        (value, dtype): torch.tensor(value, dtype=dtype, device="cpu")
        for value in _CONSTANTS
        for dtype in (torch.float32, torch.float64, *ROUNDED)
        if dtype not in ROUNDED or value in (0, 0.5, 1)  # those of gelu would be rounded, as a number is not
    }


def number(value: float, like: Tensor) -> Any:
    """A constant as a tensor: of a number torch makes one and casts it, which takes a tenth of a small layer's time.

    Not on a GPU, which takes the number itself, nor beside a tensor that traces, which takes no other tensor.
    """
    if type(like) is not Tensor or not like.is_cpu or torch.compiler.is_compiling():
        return value
    return _NUMBERS.get((value, like.dtype), value)


_INTEGERS = {  # of the same width as a float: 1, and the shift that spreads the sign over all bits
    dtype: torch.tensor([1, bits - 1], dtype=integer, device="cpu").unbind()
    for dtype, integer, bits in (
        (torch.float32, torch.int32, 32),
        (torch.float64, torch.int64, 64),
        (torch.float16, torch.int16, 16),
        (torch.bfloat16, torch.int16, 16),
    )
}


def plain(x: Tensor) -> bool:
    """Whether only numbers are asked of x, on the CPU: no graph, transform or compiler follows what is done with it."""
    if type(x) is not Tensor or not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not transforming() and not is_legacy_batchedtensor(x) and not x.is_neg()  # whose bits are not its values


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def sigmoid(z: Tensor) -> Tensor:
    """a = 1/(1 + e^−z)."""
    return torch.sigmoid(z)


def sigmoid_delta(g: Tensor, a: Tensor) -> Tensor:
    """δ = (g · (1 − a)) · a. In this order, and no other, the bits are those of torch's own sigmoid."""
    # As `rounded_once`, but for float16 on the CPU, where torch's kernel rounds at each operation.
    if g.dtype == torch.bfloat16 or (g.dtype == torch.float16 and g.is_cuda):
        return sigmoid_delta(g.float(), a.float()).to(g.dtype)
    return (g * (number(1, a) - a)) * a


@rounded_once
def tanh_delta(g: Tensor, a: Tensor) -> Tensor:
    """δ = g (1 − a²)."""
    return g * (number(1, a) - a * a)


# torch.where and masked_fill_ branch at every element; of many, arithmetic takes as little as a twentieth of the time.
_MANY = 1 << 12


def relu_delta(g: Tensor, a: Tensor) -> Tensor:
    """δ = 0 where a ≤ 0, else g: so 0 at 0, and NaN passes."""
    if plain(g) and g.numel() >= _MANY:
        passing = _bits_that_pass(a, torch.empty_like(a))
        return passing.bitwise_and_(g.view(passing.dtype)).view(g.dtype)
    zero = number(0, a)
    return torch.where(a <= zero, zero, g)


def _bits_that_pass(a: Tensor, work: Tensor) -> Tensor:
    """All bits where relu passes g, none where a ≤ 0, as integers in `work`: of 0.0 and of 1.0, less 1, the sign."""
    one, shift = _INTEGERS[a.dtype]
    return torch.le(a, number(0, a), out=work).view(one.dtype).sub_(one).bitwise_right_shift_(shift)


def leaky_relu_delta(g: Tensor, a: Tensor, negative_slope: float) -> Tensor:
    """δ = g where a > 0, else s g. For s ≥ 0 a and z have the same sign; for s < 0 it is written in z."""
    if plain(g) and _is_factor(negative_slope, a):
        return torch.sign(a).clamp_min_(negative_slope).mul_(g)
    return torch.where(a > number(0, a), g, g * negative_slope)


def _is_factor(negative_slope: float, a: Tensor) -> bool:
    """Whether max(sign a, s) is 1 and s. In half precision s would be rounded too."""
    return 0 <= negative_slope <= 1 and a.dtype not in ROUNDED


@rounded_once
def softplus_delta(g: Tensor, a: Tensor, beta: float, threshold: float) -> Tensor:
    """δ = g · (−expm1(−βa)), and g where G is linear: βz > threshold.

    From a alone that place is known only up to log1p(e^−threshold), which is 2e-9 at the default threshold of 20; the
    smallest a that is certainly beyond it decides, widened by a few eps because a was rounded. For lower thresholds see
    `softplus_delta_in_z`.
    """
    return g * -torch.expm1(F.threshold(a * -beta, -_softplus_end(a, threshold), -math.inf))


def _softplus_end(a: Tensor, threshold: float) -> float:
    return (threshold + math.log1p(math.exp(-threshold))) * (1 + 8 * torch.finfo(a.dtype).eps)


@rounded_once
def softplus_delta_in_z(g: Tensor, z: Tensor, beta: float, threshold: float) -> Tensor:
    """δ = g σ(βz), and g where βz > threshold."""
    return torch.where(z * beta > threshold, g, g * torch.sigmoid(z * beta))


@rounded_once
def silu_delta(g: Tensor, z: Tensor) -> Tensor:
    """δ = g σ(z) (1 + z (1 − σ(z)))."""
    s, one = torch.sigmoid(z), number(1, z)
    return g * (s * (one + z * (one - s)))


@rounded_once
def gelu_delta(g: Tensor, z: Tensor) -> Tensor:
    """δ = g (Φ(z) + z φ(z)), with Φ by erfc, which keeps the lower tail."""
    # Written out here: torch.compile takes a module's constant for a symbol, and fails on the second layer with it.
    cdf = torch.erfc(z * number(-0.7071067811865476, z)) * number(0.5, z)
    density = torch.exp(z * z * number(-0.5, z)) * number(0.3989422804014327, z)
    return g * (cdf + z * density)


@rounded_once
def gelu_tanh_delta(g: Tensor, z: Tensor) -> Tensor:
    """δ = g (s + 2 z s (1 − s) u′), s = σ(2u), u = √(2/π)(z + 0.044715 z³); s = ½(1 + tanh u), but keeps the tail."""
    root, cubic = 0.7978845608028654, 0.044715  # written out as in `gelu_delta`
    square, one = z * z, number(1, z)
    s = torch.sigmoid(z * (one + square * number(cubic, z)) * number(2 * root, z))
    slope = (one + square * number(3 * cubic, z)) * number(root, z)
    return g * (s + number(2, z) * z * s * (one - s) * slope)


@dataclass(frozen=True, slots=True)
class Activation:
    """One row of the activation table.

    name        what `activation=` takes
    G           z, *parameters ↦ a, componentwise
    delta       g, saved, *parameters ↦ δ = g ⊙ G′; G′ itself is delta(1, saved)
    saves       which of "a" or "z" G′ is written in
    G_text, delta_text   the same two formulas as text, with a, z, g, the parameters' names and SYMBOLS
    parameters  names and defaults of what follows z
    tail        z in this interval: G′ is exact to a relative 1e-12; beyond it, to an absolute 4 eps
    """

    name: str
    G: Callable[..., Tensor]
    delta: Callable[..., Tensor]
    saves: str
    G_text: str
    delta_text: str
    parameters: tuple[tuple[str, float], ...] = ()
    tail: tuple[float, float] = (-40.0, 40.0)


# What the formula texts use beside a, z, g, a row's parameters and SymPy's own function names.
SYMBOLS = {
    "σ(z)": "1/(1 + exp(-z))",
    "Φ(z)": "(1 + erf(z/sqrt(2)))/2",
    "φ(z)": "exp(-z**2/2)/sqrt(2*pi)",
    "u(z)": "sqrt(2/pi)*(z + 0.044715*z**3)",
}

_SOFTPLUS_TEXT = "where(beta*z > threshold, z, log(1 + exp(beta*z))/beta)"


def _identity_delta(g: Tensor, a: Tensor) -> Tensor:
    return g


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("identity", lambda z: z, _identity_delta, "a", "z", "g"),
        Activation("sigmoid", sigmoid, sigmoid_delta, "a", "1/(1 + exp(-z))", "(g*(1 - a))*a", tail=(-40, 5)),
        Activation("tanh", torch.tanh, tanh_delta, "a", "tanh(z)", "g*(1 - a**2)", tail=(-2.5, 2.5)),
        Activation("relu", torch.relu, relu_delta, "a", "where(z <= 0, 0, z)", "where(a <= 0, 0, g)"),
        Activation(
            "leaky_relu",
            F.leaky_relu,
            leaky_relu_delta,
            "a",
            "where(z > 0, z, negative_slope*z)",
            "where(a > 0, g, g*negative_slope)",
            (("negative_slope", 0.01),),
        ),
        # The row that leaky_relu becomes when its slope is negative.
        Activation(
            "leaky_relu_in_z",
            F.leaky_relu,
            leaky_relu_delta,
            "z",
            "where(z > 0, z, negative_slope*z)",
            "where(z > 0, g, g*negative_slope)",
            (("negative_slope", -0.01),),
        ),
        Activation(
            "softplus",
            F.softplus,
            softplus_delta,
            "a",
            _SOFTPLUS_TEXT,
            "where(beta*a > threshold, g, g*(1 - exp(-beta*a)))",
            (("beta", 1.0), ("threshold", 20.0)),
        ),
        # The row that softplus becomes when its threshold is so low that a no longer tells on which side of it z was.
        Activation(
            "softplus_in_z",
            F.softplus,
            softplus_delta_in_z,
            "z",
            _SOFTPLUS_TEXT,
            "where(beta*z > threshold, g, g*σ(beta*z))",
            (("beta", 1.0), ("threshold", 2.0)),
        ),
        Activation("silu", F.silu, silu_delta, "z", "z*σ(z)", "g*σ(z)*(1 + z*(1 - σ(z)))"),
        Activation("gelu", F.gelu, gelu_delta, "z", "z*Φ(z)", "g*(Φ(z) + z*φ(z))"),
        Activation(
            "gelu_tanh",
            lambda z: F.gelu(z, approximate="tanh"),
            gelu_tanh_delta,
            "z",
            "z*(1 + tanh(u(z)))/2",
            "g*(σ(2*u(z)) + 2*z*σ(2*u(z))*(1 - σ(2*u(z)))*sqrt(2/pi)*(1 + 3*0.044715*z**2))",
        ),
    )
}


# What `activation=` takes.
NAMES = tuple(name for name in ACTIVATIONS if not name.endswith("_in_z"))


def activation(name: str, **parameters: float | str) -> tuple[Activation, tuple[float, ...]]:
    """The row of an activation and the values of its parameters, by torch's names for both.

    Raises InputError for an unknown name or parameter.
    """
    if name == "gelu" and (form := parameters.pop("approximate", "none")) != "none":
        if form != "tanh":
            raise InputError(f"expected gelu's approximate to be 'none' or 'tanh'; got {form!r}")
        name = "gelu_tanh"
    if name not in NAMES:
        raise InputError(f"expected the name of an activation, one of {', '.join(NAMES)}; got {name!r}")
    row = ACTIVATIONS[name]
    if unknown := parameters.keys() - dict(row.parameters).keys():
        takes = ", ".join(dict(row.parameters)) or "no parameters"
        raise InputError(f"activation {name!r} takes {takes}; got {', '.join(sorted(unknown))}")
    values = tuple(float(parameters.get(parameter, default)) for parameter, default in row.parameters)
    if (name == "softplus" and (values[1] < 20 or values[0] == 0)) or (name == "leaky_relu" and values[0] < 0):
        row = ACTIVATIONS[f"{name}_in_z"]
    return row, values


# ---------------------------------------------------------------------------------------------------------------------
# The same rows written in place, for the engine, which keeps no graph: equal to 1e-12, not to the bit
# ---------------------------------------------------------------------------------------------------------------------

_nn: Any = torch._C._nn  # torch.nn.functional's own operators, whose stubs don't know out=
InPlace = Callable[..., Any]
"""What both forms of a row in place look like; every tensor (N, n_l):

    G_(z, *parameters)                           z := G(z), of a row that saves a
    G_(z, *parameters, out=a)                    a := G(z), of a row that saves z
    delta_(g, a, z, work, mask, *parameters)     g := δ; work and mask (bool) are scratch

A row that saves a leaves it as it is, and takes None for z, work and mask; or a itself for work, which destroys it.
A row that saves z may destroy a and z.
"""


def _identity_delta_(g: Tensor, *_: Any) -> None:
    """δ = g, which it is already."""


def _sigmoid_delta_(g: Tensor, a: Tensor, z: None, work: Tensor | None, mask: Tensor | None) -> None:
    """δ = g · (a − a²)."""
    g.mul_(torch.addcmul(a, a, a, value=-1, out=work))


def _tanh_delta_(g: Tensor, a: Tensor, z: None, work: Tensor | None, mask: Tensor | None) -> None:
    """δ = g − g a²."""
    g.addcmul_(g, torch.mul(a, a, out=work), value=-1)


def _relu_delta_(g: Tensor, a: Tensor, z: None, work: Tensor | None, mask: Tensor | None) -> None:
    """δ = 0 where a ≤ 0, else g; not by a product, in which an infinite g would become NaN."""
    if plain(g) and g.numel() >= _MANY:
        passing = _bits_that_pass(a, torch.empty_like(a) if work is None else work)
        g.view(passing.dtype).bitwise_and_(passing)
    else:
        g.masked_fill_(torch.le(a, 0, out=mask), 0)


def _leaky_relu_delta_(
    g: Tensor, a: Tensor, z: Tensor | None, work: Tensor | None, mask: Tensor | None, negative_slope: float
) -> None:
    """δ = g where a (or z) > 0, else s g."""
    if plain(g) and _is_factor(negative_slope, a):
        g.mul_(torch.sign(a if z is None else z, out=work).clamp_min_(negative_slope))
        return
    positive = torch.gt(a if z is None else z, 0, out=mask)
    scaled = torch.mul(g, negative_slope, out=work)
    if work is None:  # legacy vmap, of is_grads_batched, has no out=
        g.copy_(torch.where(positive, g, scaled))
    else:
        torch.where(positive, g, scaled, out=g)


def _softplus_delta_(
    g: Tensor, a: Tensor, z: None, work: Tensor | None, mask: Tensor | None, beta: float, threshold: float
) -> None:
    """δ = g · (−expm1(−βa)), and g beyond the certain end of the curve: see `softplus_delta`."""
    slope = torch.threshold_(torch.mul(a, -beta, out=work), -_softplus_end(a, threshold), -math.inf)
    g.mul_(slope.expm1_().neg_())


def _softplus_delta_in_z_(
    g: Tensor, a: Tensor, z: Tensor, work: Tensor, mask: Tensor, beta: float, threshold: float
) -> None:
    """δ = g σ(βz), and g where βz > threshold."""
    torch.gt(z.mul_(beta), threshold, out=mask)
    g.mul_(z.sigmoid_().masked_fill_(mask, 1))


def _silu_delta_(g: Tensor, a: Tensor, z: Tensor, *_: Any) -> None:
    """δ = g (s + a (1 − s)), s = σ(z), a = z s."""
    s = z.sigmoid_()
    g.mul_(a.addcmul_(a, s, value=-1).add_(s))


def _gelu_delta_(g: Tensor, a: Tensor, z: Tensor, work: Tensor, mask: Tensor) -> None:
    """δ = g (Φ(z) + z φ(z))."""
    cdf = torch.mul(z, number(-0.7071067811865476, z), out=a).erfc_().mul_(number(0.5, z))
    density = torch.mul(z, z, out=work).mul_(number(-0.5, z)).exp_().mul_(number(0.3989422804014327, z))
    g.mul_(cdf.addcmul_(z, density))


def _gelu_tanh_delta_(g: Tensor, a: Tensor, z: Tensor, work: Tensor, mask: Tensor) -> None:
    """δ = g (s + 2 z s (1 − s) u′): see `gelu_tanh_delta`."""
    root, cubic = 0.7978845608028654, 0.044715
    one, twice = number(1, z), number(2 * root, z)
    square = torch.mul(z, z, out=work)
    s = torch.mul(square, number(cubic, z), out=a).add_(one).mul_(z).mul_(twice).sigmoid_()
    slope = square.mul_(number(3 * cubic, z)).add_(one).mul_(z).mul_(twice)
    product = torch.mul(s, s, out=z).neg_().add_(s)
    g.mul_(s.addcmul_(product, slope))


_IN_PLACE: dict[str, tuple[InPlace, InPlace]] = {
    "identity": (lambda z: z, _identity_delta_),
    "sigmoid": (torch.sigmoid_, _sigmoid_delta_),
    "tanh": (torch.tanh_, _tanh_delta_),
    "relu": (functools.partial(torch.clamp_min_, min=0), _relu_delta_),
    "leaky_relu": (_nn.leaky_relu_, _leaky_relu_delta_),
    "leaky_relu_in_z": (_nn.leaky_relu, _leaky_relu_delta_),
    "softplus": (lambda z, *parameters: _nn.softplus(z, *parameters, out=z), _softplus_delta_),
    "softplus_in_z": (_nn.softplus, _softplus_delta_in_z_),
    "silu": (_nn.silu, _silu_delta_),
    "gelu": (_nn.gelu, _gelu_delta_),
    "gelu_tanh": (functools.partial(_nn.gelu, approximate="tanh"), _gelu_tanh_delta_),
}


def in_place(row: Activation) -> tuple[InPlace, InPlace]:
    """G_ and delta_ of a row; of one that has none of its own, its formulas and a copy."""

    def G_(z: Tensor, *parameters: float, out: Tensor | None = None) -> Tensor:
        return (z if out is None else out).copy_(row.G(z, *parameters))

    def delta_(g: Tensor, a: Tensor, z: Tensor | None, work: Tensor, mask: Tensor, *parameters: float) -> None:
        g.copy_(row.delta(g, a if z is None else z, *parameters))

    return _IN_PLACE.get(row.name, (G_, delta_))


# ---------------------------------------------------------------------------------------------------------------------
# Costs: C of each element or sample, and its derivative, before the reduction multiplies by 1/N
# ---------------------------------------------------------------------------------------------------------------------


def divisor(shape: torch.Size, reduction: str, weight: Tensor | None = None) -> Tensor | int:
    """What the sum over all elements is divided by.

    "samples": N, the product of the leading dimensions; "mean": the number of elements, or Σ weight; "sum": 1.
    """
    if reduction == "samples":
        return math.prod(shape[:-1])
    if reduction == "mean":
        return math.prod(shape) if weight is None else weight.sum()
    return 1


def reduce(elements: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Σ elements / divisor, or the elements themselves for "none". NaN at N = 0, as in torch."""
    if reduction == "none":
        return elements
    if weight is None and reduction != "sum":
        # By way of the mean, since a sum overflows in float16.
        mean = elements.mean()
        return mean * elements.shape[-1] if reduction == "samples" else mean
    return elements.sum() / divisor(elements.shape, reduction, weight)


def share(g: Tensor, shape: torch.Size, reduction: str, weight: Tensor | None = None) -> Tensor:
    """What arrives at each element when g arrives at their reduction: g / divisor."""
    return g / divisor(shape, reduction, weight) if reduction in ("mean", "samples") else g


def quadratic(prediction: Tensor, target: Tensor) -> Tensor:
    """½ (a − ŷ)² of each element; the lecture's C is (1/N) of its sum."""
    return (prediction - target).square() * number(0.5, prediction)


def quadratic_delta(prediction: Tensor, target: Tensor) -> Tensor:
    """∂C/∂a^L = a − ŷ (and ∂C/∂ŷ = −(a − ŷ)), before 1/N."""
    return prediction - target


def softplus_exact(z: Tensor) -> Tensor:
    """log(1 + e^z): beyond z = 40 e^−z is below the last digit of z, so torch's threshold there changes no bit."""
    return F.softplus(z, 1.0, 40.0)


def binary_cross_entropy(z: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """softplus(z) − ŷ z of each element; with weight p on the positives ŷ p softplus(−z) + (1 − ŷ) softplus(z)."""
    if pos_weight is None:
        return softplus_exact(z) - target * z
    return target * pos_weight * softplus_exact(-z) + (1 - target) * softplus_exact(z)


def binary_cross_entropy_delta(z: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """δ^L = σ(z) − ŷ: the G′ of the sigmoid cancels. With weight p on the positives σ(z) (1 − ŷ + ŷ p) − ŷ p."""
    if pos_weight is None:
        return torch.sigmoid(z) - target
    positive = target * pos_weight
    return torch.sigmoid(z) * (1 - target + positive) - positive


def binary_cross_entropy_delta_target(z: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """∂C/∂ŷ = −z; with weight p on the positives p softplus(−z) − softplus(z)."""
    return -z if pos_weight is None else pos_weight * softplus_exact(-z) - softplus_exact(z)


def cross_entropy_of_class(z: Tensor, target: Tensor) -> Tensor:
    """−log softmax(z)_class of each sample: z (…, classes), class index (…).

    Gathered rather than multiplied by onehot, so that a class masked by a logit of −inf costs nothing.
    """
    return -torch.log_softmax(z, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def onehot(z: Tensor, target: Tensor) -> Tensor:
    """1 at each sample's class, 0 elsewhere, in z's shape and dtype. Scattered: a class out of range is an error."""
    return torch.zeros_like(z).scatter(-1, target.unsqueeze(-1), 1)


def cross_entropy_delta_of_class(z: Tensor, target: Tensor) -> Tensor:
    """δ^L = softmax(z) − onehot."""
    return torch.softmax(z, -1) - onehot(z, target)


def class_shares(target: Tensor, class_weight: Tensor | None, smoothing: float) -> Tensor:
    """t_c = w_c ((1 − ε) ŷ_c + ε/classes): the target of each class, weighted and smoothed."""
    shares = target if smoothing == 0 else target * (1 - smoothing) + smoothing / target.shape[-1]
    return shares if class_weight is None else shares * class_weight


def cross_entropy(z: Tensor, shares: Tensor) -> Tensor:
    """−Σ_c t_c log softmax(z)_c of each sample: z and t (…, classes)."""
    return -(shares * torch.log_softmax(z, -1)).sum(-1)


def cross_entropy_delta(z: Tensor, shares: Tensor) -> Tensor:
    """δ^L = softmax(z) Σ_c t_c − t; where t is a onehot, softmax(z) − onehot."""
    return torch.softmax(z, -1) * shares.sum(-1, keepdim=True) - shares


def cross_entropy_delta_target(z: Tensor, class_weight: Tensor | None, smoothing: float) -> Tensor:
    """∂C/∂ŷ_c = −w_c (1 − ε) log softmax(z)_c."""
    delta = torch.log_softmax(z, -1) * (smoothing - 1)
    return delta if class_weight is None else delta * class_weight


# ---------------------------------------------------------------------------------------------------------------------
# Costs of a whole net: prediction (N, n_L) ↦ C and δ^L, and both at once in place
# ---------------------------------------------------------------------------------------------------------------------


Flat = tuple[Tensor, Tensor]
_FEW = 1 << 12


@dataclass(frozen=True, slots=True)
class Cost:
    """One row of the table of costs: sums, and the weights that make the cost and its derivative of them.

    total   prediction, target ↦ C / total_weight, a scalar
    delta   prediction, target ↦ ∂C/∂a^L / delta_weight, (N, n_L)
    both_   prediction, target, delta, flat, work, column, out: both in place, in delta and out (1,); flat is delta as
            one row and as one vector, work (N, n_L) and column (N, 1) are scratch
    total_weight, delta_weight   N, n_L ↦ a constant
    text, delta_text, per   C = 1/per Σ text, ∂C/∂a^L = 1/per delta_text, with a, ŷ, N and m = n_L
    logits  whether the prediction is z^L: the output activation is then the identity
    """

    total: Callable[[Tensor, Tensor], Tensor]
    delta: Callable[[Tensor, Tensor], Tensor]
    both_: Callable[..., None]
    total_weight: Callable[[int, int], float]
    delta_weight: Callable[[int, int], float]
    text: str
    delta_text: str
    per: str
    logits: bool


def _per_sample(n: int, outputs: int) -> float:
    return 1 / n if n else math.nan  # the mean of nothing


def _per_element(n: int, outputs: int) -> float:
    return _per_sample(n * outputs, 1)


def _quadratic_(
    prediction: Tensor, target: Tensor, delta: Tensor, flat: Flat, work: Tensor, column: Tensor, out: Tensor
) -> None:
    """delta := a − ŷ, out := Σ (a − ŷ)²."""
    torch.sub(prediction, target, out=delta)
    row, vector = flat
    if delta.numel() <= _FEW:  # half of dot's time; of many elements it is the less exact sum
        torch.mv(row, vector, out=out)
    else:
        torch.dot(vector, vector, out=out.view(()))


def _binary_cross_entropy_(
    z: Tensor, target: Tensor, delta: Tensor, flat: Flat, work: Tensor, column: Tensor, out: Tensor
) -> None:
    """delta := σ(z) − ŷ, out := Σ softplus(z) − ŷ z."""
    torch.sigmoid(z, out=delta).sub_(target)
    _nn.softplus(z, 1.0, 40.0, out=work).addcmul_(target, z, value=-1)
    torch.sum(work.view(1, -1), 1, out=out)


def _cross_entropy_(
    z: Tensor, target: Tensor, delta: Tensor, flat: Flat, work: Tensor, column: Tensor, out: Tensor
) -> None:
    """delta := softmax(z) Σ t − t, out := −Σ t log softmax(z); t a onehot, if the target is of class indices."""
    torch.log_softmax(z, 1, out=work)
    torch.exp(work, out=delta)
    if target.dim() == 1:
        index = target.unsqueeze(1)
        torch.gather(work, 1, index, out=column)
        delta.scatter_(1, index, -1, reduce="add")
        torch.sum(column, 0, out=out)
    else:
        torch.sum(target, 1, keepdim=True, out=column)
        delta.mul_(column).sub_(target)
        torch.sum(work.mul_(target).view(1, -1), 1, out=out)
    out.neg_()


def _cross_entropy_sum(z: Tensor, target: Tensor) -> Tensor:
    return (cross_entropy_of_class if target.dim() == 1 else cross_entropy)(z, target).sum()


def _cross_entropy_delta(z: Tensor, target: Tensor) -> Tensor:
    return (cross_entropy_delta_of_class if target.dim() == 1 else cross_entropy_delta)(z, target)


def _squares(prediction: Tensor, target: Tensor) -> Tensor:
    return _nn.mse_loss(prediction, target, 2)  # F.mse_loss(…, reduction="sum"), less its Python


def _binary_cross_entropy_sum(z: Tensor, target: Tensor) -> Tensor:
    return binary_cross_entropy(z, target).sum()


COSTS: dict[str, Cost] = {
    "quadratic": Cost(
        _squares,
        quadratic_delta,
        _quadratic_,
        lambda n, outputs: 0.5 * _per_sample(n, outputs),
        _per_sample,
        "½ (a − ŷ)²",
        "(a − ŷ)",
        "N",
        logits=False,
    ),
    "mse": Cost(
        _squares,
        quadratic_delta,
        _quadratic_,
        _per_element,
        lambda n, outputs: 2 * _per_element(n, outputs),
        "(a − ŷ)²",
        "2 · (a − ŷ)",
        "(N m)",
        logits=False,
    ),
    "bce": Cost(
        _binary_cross_entropy_sum,
        binary_cross_entropy_delta,
        _binary_cross_entropy_,
        _per_element,
        _per_element,
        "(softplus(a) − ŷ · a)",
        "(σ(a) − ŷ)",
        "(N m)",
        logits=True,
    ),
    "cross_entropy": Cost(
        _cross_entropy_sum,
        _cross_entropy_delta,
        _cross_entropy_,
        _per_sample,
        _per_sample,
        "−ŷ · log softmax(a)",
        "(softmax(a) − ŷ)",
        "N",
        logits=True,
    ),
}


def probability(prediction: Tensor, loss: str) -> Tensor:
    """P(class | x) of each class, from a prediction (N, n_L) → (N, n_L), rows of sum 1.

    Cross-entropy: softmax(z). The other costs train each output by itself towards P (under the quadratic cost
    a_i → E[ŷ_i | x], the share of class i), so a row need not sum to 1: p_i / Σ_j p_j, with p = σ(z) under bce and
    p = a cut off at 0 and 1 otherwise; equal shares where all p are 0.
    """
    if loss == "cross_entropy":
        return torch.softmax(prediction, -1)
    p = torch.sigmoid(prediction) if COSTS[loss].logits else prediction.clamp(0, 1)
    total = p.sum(-1, keepdim=True)
    return torch.where(total > 0, p / total, 1 / prediction.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Penalty
# ---------------------------------------------------------------------------------------------------------------------


def l1_gradient(weight: Tensor, strength: float) -> Tensor:
    """∂/∂W λ Σ |W_ij| = λ sign W; at 0, where there is no derivative, 0, as torch's own abs."""
    return strength * torch.sign(weight)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


def dropout(a: Tensor, mask: Tensor, keep: float) -> Tensor:
    """a ⊙ m / (1 − p), m ∈ {0, 1} (bool). It is linear in a, so the backward is the same map: δ = g ⊙ m / (1 − p)."""
    return a * (mask.to(a.dtype) / keep)


# ---------------------------------------------------------------------------------------------------------------------
# The threshold neuron, where the history starts: it has no derivative, and learns by Rosenblatt's rule
# ---------------------------------------------------------------------------------------------------------------------


def threshold(z: Tensor) -> Tensor:
    """y = 1 where z ≥ 0, else 0 (McCulloch and Pitts, 1943)."""
    return (z >= 0).to(z.dtype)


def perceptron_step(prediction: Tensor, target: Tensor, a: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """What one sample adds to W and b: LR (ŷ − y) xᵀ and LR (ŷ − y) (Rosenblatt, 1958).

    prediction, target (n_out,), a = x (n_in,) → (n_out, n_in), (n_out,).
    """
    correction = rate * (target - prediction)
    return torch.outer(correction, a), correction
