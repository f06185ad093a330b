"""The quicker forms of the sheet's formulas, and what they know of dtypes, layouts and autograd.

Out of place, G is torch's own operator, and δ has the bits of its row. In place, for executors that keep no graph, both
equal the row to 1e-12. A row without a form of its own is computed by its formulas.

Half precision: δ is evaluated in float32 and rounded once, as torch's own kernels do.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from manual_mlp import formulas as sheet
from manual_mlp import grids
from manual_mlp.formulas import Cost, Formula, Row

_nn: Any = torch._C._nn  # torch.nn.functional's own operators, whose stubs don't know out=
InPlace = Callable[..., Any]

# ---------------------------------------------------------------------------------------------------------------------
# Dtypes, constants, and what follows a tensor
# ---------------------------------------------------------------------------------------------------------------------

ROUNDED = (torch.bfloat16, torch.float16)


def rounded_once(formula: Formula) -> Formula:
    """Return the formula evaluated in float32 and rounded once, where its first argument has half precision."""

    @functools.wraps(formula)
    def evaluate(x: Tensor, *more: Any) -> Tensor:
        if x.dtype in ROUNDED:
            return formula(x.float(), *(m.float() if isinstance(m, Tensor) else m for m in more)).to(x.dtype)
        return formula(x, *more)

    return evaluate


# The formulas below write these numbers out: torch.compile(dynamic=True) takes a global float for a changing input.
_FLOATS = (
    *(0.0, 0.5, 1.0, 2.0, -0.5),
    *(-0.7071067811865476, 0.3989422804014327),  # of gelu: −1/√2 and 1/√(2π)
    *(0.7978845608028654, 2 * 0.7978845608028654, 0.044715, 3 * 0.044715),  # of gelu_tanh: √(2/π) and the cubic term's
)
_CONSTANTS = {torch.float32: _FLOATS, torch.float64: _FLOATS, torch.int32: (1, 31), torch.int64: (1, 63)}
with torch.inference_mode(False):  # this file may be imported in inference mode
    _NUMBERS = {
        (value, dtype): torch.tensor(value, dtype=dtype, device="cpu")
        for dtype, values in _CONSTANTS.items()
        for value in values
    }


def number(value: float, like: Tensor) -> Any:
    """Return a constant as a tensor: torch wraps and casts a Python number at every call, 1 µs each.

    Return the number itself for a GPU, for a tensor that traces, beside which no other tensor may stand, and in half
    precision, where a tensor would be rounded.
    """
    if type(like) is not Tensor or not like.is_cpu or torch.compiler.is_compiling():
        return value
    return _NUMBERS.get((value, like.dtype), value)


def plain(x: Tensor) -> bool:
    """Return True if x is an ordinary CPU tensor, and no graph, transform or compiler records what is done with it."""
    if type(x) is not Tensor or not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not transforming() and not is_legacy_batchedtensor(x) and not x.is_neg()  # whose bits are not its values


def transforming() -> bool:
    """Return True if a torch.func transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _device_type(tensor: Tensor) -> str:
    """Return the device whose autocast counts; torch has none for meta."""
    device = tensor.device.type
    return "cpu" if device == "meta" else device


def autocasting(tensor: Tensor) -> bool:
    """Return True if autocast is on for the tensor's device. Asks for any device first: naming the device is slow."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(_device_type(tensor))


def cast(tensor: Any) -> Any:
    """Return a tensor in autocast's dtype, as torch casts for a linear layer: floating point but not float64."""
    if tensor is None or not tensor.dtype.is_floating_point or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(_device_type(tensor)))


def on_gpu_autocasting(tensor: Tensor) -> bool:
    """Return True under a GPU's autocast. There torch computes softplus, softmax and layer norms in float32."""
    return autocasting(tensor) and _device_type(tensor) != "cpu"


def in_gpus_dtype(tensor: Tensor) -> Tensor:
    """Return the input of a softplus, softmax or layer norm in the dtype in which torch computes it."""
    return tensor.float() if tensor.dtype in ROUNDED and on_gpu_autocasting(tensor) else tensor


def without_autocast(args: tuple[Any, ...]) -> torch.autocast:
    """Leave autocast for the device of these tensors: what torch casts has been cast, and all else keeps its dtype."""
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    return torch.autocast(_device_type(tensor), enabled=False)


def draw_(mask: Tensor, keep: float) -> Tensor:
    """Fill a bool tensor with ones of probability `keep`. As in torch's dropout, keep = 0 draws nothing."""
    values = mask.values() if mask.is_nested else mask
    values.bernoulli_(keep) if keep > 0 else values.zero_()
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# The affine map
# ---------------------------------------------------------------------------------------------------------------------


def by_columns(like: Tensor, n: int, outputs: int) -> bool:
    """Return True if computing z (N, n_out) transposed, as (W aᵀ)ᵀ, is faster.

    For narrow layers MKL is up to 2.5× faster in this order, except for 16 to 20 neurons.
    """
    if not like.is_cpu or like.dtype in ROUNDED or not torch.backends.mkl.is_available():
        return False
    return n >= 32 and (1 < outputs < 16 or 20 < outputs < 32)


# ---------------------------------------------------------------------------------------------------------------------
# Activations out of place
# ---------------------------------------------------------------------------------------------------------------------

MANY = 1 << 12  # elements from which arithmetic on bits is faster than a branch at each element


def sigmoid_delta(g: Tensor, a: Tensor) -> Tensor:
    """δ = (g · (1 − a)) · a."""
    # Rounded once, except in float16 on the CPU, where torch's kernel rounds at each operation.
    if g.dtype == torch.bfloat16 or (g.dtype == torch.float16 and g.is_cuda):
        return sigmoid_delta(g.float(), a.float()).to(g.dtype)
    return (g * (number(1, a) - a)) * a


@rounded_once
def _tanh_delta(g: Tensor, a: Tensor) -> Tensor:
    return g * (number(1, a) - a * a)


def _relu_delta(g: Tensor, a: Tensor, many: int = MANY) -> Tensor:
    if g.numel() >= many and plain(g):
        passing = _bits_that_pass(a, torch.empty_like(a))
        return passing.bitwise_and_(g.view(passing.dtype)).view(g.dtype)
    zero = number(0, a)
    return torch.where(a <= zero, zero, g)


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, **dict.fromkeys(ROUNDED, torch.int16)}


def _bits_that_pass(a: Tensor, work: Tensor) -> Tensor:
    """Return a bit mask in `work`: zero where a ≤ 0, all ones elsewhere and at NaN.

    The sign of an integer is spread over all its bits: of the bits of 0.0, less 1, and of those of 1.0, less 1.
    """
    bits = torch.le(a, number(0, a), out=work).view(_INTEGERS[a.dtype])
    return bits.sub_(number(1, bits)).bitwise_right_shift_(number(8 * a.element_size() - 1, bits))


def _leaky_relu_delta(g: Tensor, a: Tensor, s: float) -> Tensor:
    if _is_factor(s, a) and plain(g):
        return torch.sign(a).clamp_min_(s).mul_(g)
    return torch.where(a > number(0, a), g, g * s)


def _is_factor(s: float, a: Tensor) -> bool:
    """Return True if max(sign a, s) is 1 or s: half precision would round s."""
    return 0 <= s <= 1 and a.dtype not in ROUNDED


@rounded_once
def _softplus_delta(g: Tensor, a: Tensor, β: float, t: float) -> Tensor:
    return g * -torch.expm1(F.threshold(a * -β, -sheet.end(t), -math.inf))


_softplus_delta_in_z = rounded_once(sheet.ACTIVATIONS["softplus"].forms[1].delta)


@rounded_once
def _silu_delta(g: Tensor, z: Tensor) -> Tensor:
    s, one = torch.sigmoid(z), number(1, z)
    return g * (s * (one + z * (one - s)))


@rounded_once
def _gelu_delta(g: Tensor, z: Tensor) -> Tensor:
    Φ = torch.erfc(z * number(-0.7071067811865476, z)) * number(0.5, z)
    φ = torch.exp(z * z * number(-0.5, z)) * number(0.3989422804014327, z)
    return g * (Φ + z * φ)


@rounded_once
def _gelu_tanh_delta(g: Tensor, z: Tensor) -> Tensor:
    root, cubic = 0.7978845608028654, 0.044715
    square, one = z * z, number(1, z)
    s = torch.sigmoid(z * (one + square * number(cubic, z)) * number(2 * root, z))
    slope = (one + square * number(3 * cubic, z)) * number(root, z)
    return g * (s + number(2, z) * z * s * (one - s) * slope)


# ---------------------------------------------------------------------------------------------------------------------
# Activations in place: δ overwrites g
# ---------------------------------------------------------------------------------------------------------------------


def _sigmoid_delta_(g: Tensor, a: Tensor, z: None, work: Tensor, mask: Tensor) -> None:
    """δ = g · (a − a²)."""
    g.mul_(torch.addcmul(a, a, a, value=-1, out=work))


def _tanh_delta_(g: Tensor, a: Tensor, z: None, work: Tensor, mask: Tensor) -> None:
    """δ = g − g a²."""
    g.addcmul_(g, torch.mul(a, a, out=work), value=-1)


def _relu_delta_(g: Tensor, a: Tensor, z: None, work: Tensor, mask: Tensor, many: int = MANY) -> None:
    """δ = 0 where a ≤ 0, else g; not by a product, in which an infinite g would become NaN."""
    if g.numel() >= many and g.is_cpu:
        passing = _bits_that_pass(a, work)
        g.view(passing.dtype).bitwise_and_(passing)
    else:
        g.masked_fill_(torch.le(a, 0, out=mask), 0)


def _leaky_relu_delta_(g: Tensor, a: Tensor, z: Tensor | None, work: Tensor, mask: Tensor, s: float) -> None:
    """δ = g where a (or z) > 0, else s g."""
    saved = a if z is None else z
    if _is_factor(s, a):
        g.mul_(torch.sign(saved, out=work).clamp_min_(s))
    else:
        torch.where(torch.gt(saved, 0, out=mask), g, torch.mul(g, s, out=work), out=g)


def _softplus_delta_(g: Tensor, a: Tensor, z: None, work: Tensor, mask: Tensor, β: float, t: float) -> None:
    """δ = g · (−expm1(−βa)), and g beyond the end of the curve."""
    slope = torch.threshold_(torch.mul(a, -β, out=work), -sheet.end(t), -math.inf)
    g.mul_(slope.expm1_().neg_())


def _softplus_delta_in_z_(g: Tensor, a: Tensor, z: Tensor, work: Tensor, mask: Tensor, β: float, t: float) -> None:
    """δ = g σ(βz), and g where βz > t."""
    torch.gt(z.mul_(β), t, out=mask)
    g.mul_(z.sigmoid_().masked_fill_(mask, 1))


def _silu_delta_(g: Tensor, a: Tensor, z: Tensor, work: Tensor, mask: Tensor) -> None:
    """δ = g (s + a (1 − s)), s = σ(z), a = z s."""
    s = z.sigmoid_()
    g.mul_(a.addcmul_(a, s, value=-1).add_(s))


def _gelu_delta_(g: Tensor, a: Tensor, z: Tensor, work: Tensor, mask: Tensor) -> None:
    """δ = g (Φ(z) + z φ(z))."""
    Φ = torch.mul(z, number(-0.7071067811865476, z), out=a).erfc_().mul_(number(0.5, z))
    φ = torch.mul(z, z, out=work).mul_(number(-0.5, z)).exp_().mul_(number(0.3989422804014327, z))
    g.mul_(Φ.addcmul_(z, φ))


def _gelu_tanh_delta_(g: Tensor, a: Tensor, z: Tensor, work: Tensor, mask: Tensor) -> None:
    """δ = g (s + 2 z s (1 − s) u′), s = σ(2u)."""
    root, cubic = 0.7978845608028654, 0.044715
    one, twice = number(1, z), number(2 * root, z)
    square = torch.mul(z, z, out=work)
    s = torch.mul(square, number(cubic, z), out=a).add_(one).mul_(z).mul_(twice).sigmoid_()
    slope = square.mul_(number(3 * cubic, z)).add_(one).mul_(z).mul_(twice)
    product = torch.mul(s, s, out=z).neg_().add_(s)
    g.mul_(s.addcmul_(product, slope))


# ---------------------------------------------------------------------------------------------------------------------
# The table of kernels
# ---------------------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """The forms of one row, by its name and what it saves.

    G        z, *values ↦ a: torch's own operator
    delta    g, saved, *values ↦ δ, with the bits of the row
    G_       z, *values: z := G(z) for a row that saves a;  z, *values, out=a: a := G(z) for a row that saves z
    delta_   g, a, z, work, mask, *values: g := δ. All are (N, n_l); work and mask (bool) are scratch. A row that saves
             a leaves a as it is, and its z is None; a row that saves z may overwrite a and z
    rounds   the half-precision dtypes in which delta rounds more than once, as torch does
    """

    G: Formula
    delta: Formula
    G_: InPlace
    delta_: InPlace
    rounds: tuple[torch.dtype, ...] = ()


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _softplus_(z: Tensor, *values: float) -> Tensor:
    return _nn.softplus(z, *values, out=z)


KERNELS = {
    ("sigmoid", "a"): Kernel(torch.sigmoid, sigmoid_delta, torch.sigmoid_, _sigmoid_delta_, (torch.float16,)),
    ("tanh", "a"): Kernel(torch.tanh, _tanh_delta, torch.tanh_, _tanh_delta_),
    ("relu", "a"): Kernel(torch.relu, _relu_delta, partial(torch.clamp_min_, min=0), _relu_delta_),
    ("leaky_relu", "a"): Kernel(F.leaky_relu, _leaky_relu_delta, _nn.leaky_relu_, _leaky_relu_delta_),
    ("leaky_relu", "z"): Kernel(F.leaky_relu, _leaky_relu_delta, _nn.leaky_relu, _leaky_relu_delta_),
    ("softplus", "a"): Kernel(F.softplus, _softplus_delta, _softplus_, _softplus_delta_),
    ("softplus", "z"): Kernel(F.softplus, _softplus_delta_in_z, _nn.softplus, _softplus_delta_in_z_),
    ("silu", "z"): Kernel(F.silu, _silu_delta, _nn.silu, _silu_delta_),
    ("gelu", "z"): Kernel(F.gelu, _gelu_delta, _nn.gelu, _gelu_delta_),
    ("gelu_tanh", "z"): Kernel(_gelu_tanh, _gelu_tanh_delta, partial(_nn.gelu, approximate="tanh"), _gelu_tanh_delta_),
}


def kernel(row: Row) -> Kernel:
    """Return the forms of a row; of one without a kernel, its formulas and copies."""
    if (row.name, row.saves) in KERNELS:
        return KERNELS[row.name, row.saves]
    G, delta = rounded_once(row.G), rounded_once(row.delta)

    def G_(z: Tensor, *values: float, out: Tensor | None = None) -> Tensor:
        return (z if out is None else out).copy_(G(z, *values))

    def delta_(g: Tensor, a: Tensor, z: Tensor | None, work: Tensor, mask: Tensor, *values: float) -> None:
        g.copy_(delta(g, a if z is None else z, *values))

    return Kernel(G, delta, G_, delta_)


# ---------------------------------------------------------------------------------------------------------------------
# Costs of a whole net: prediction (N, n_L) ↦ a sum, and δ at once in place; of K nets (K, N, n_L) ↦ K sums
# ---------------------------------------------------------------------------------------------------------------------

FEW = 1 << 12  # elements up to which mv takes half of dot's time; of more it is the less exact sum
Both = Callable[[Tensor, Tensor, Tensor], None]


class CostKernel(NamedTuple):
    """The forms of one cost.

    total        prediction, target ↦ Σ, a scalar: C = total_share/per Σ
    delta        prediction, target ↦ per/delta_share · ∂C/∂a^L
    both         a buffer (N, n_L) ↦ the function that fills it with the same, and out (1,) with Σ; of K nets
                 (K, N, n_L), and out (K,)
    total_share, delta_share   factors that the sums leave out: one product holds them and 1/per

    The target of cross-entropy may be class indices (N,).
    """

    total: Formula
    delta: Formula
    both: Callable[[Tensor], Both]
    total_share: float = 1.0
    delta_share: float = 1.0


def _sum_of_squares(prediction: Tensor, target: Tensor) -> Tensor:
    return _nn.mse_loss(prediction, target, 2)  # F.mse_loss(…, reduction="sum") without its Python wrapper


def _by_net(x: Tensor) -> Tensor:
    """Return (N, m) as (1, N m), and (K, N, m) as (K, N m)."""
    return x.reshape(math.prod(x.shape[:-2]), -1)


def _both_of_squares(delta: Tensor, few: int = FEW) -> Both:
    """delta := a − ŷ, out := Σ (a − ŷ)²."""
    flat = (delta if delta.is_contiguous() else delta.t()).view(-1)
    row, small = flat.view(1, -1), flat.numel() <= few
    nets = _by_net(delta) if delta.dim() == 3 else None

    def both(prediction: Tensor, target: Tensor, out: Tensor) -> None:
        torch.sub(prediction, target, out=delta)
        if nets is not None:
            torch.linalg.vecdot(nets, nets, out=out)
        elif small:
            torch.mv(row, flat, out=out)
        else:
            torch.dot(flat, flat, out=out.view(()))

    return both


def _both_of_binary_cross_entropy(delta: Tensor) -> Both:
    """delta := σ(z) − ŷ, out := Σ softplus(z) − ŷ z."""
    work = torch.empty_like(delta, memory_format=torch.contiguous_format)
    flat = _by_net(work)

    def both(z: Tensor, target: Tensor, out: Tensor) -> None:
        torch.sigmoid(z, out=delta).sub_(target)
        _nn.softplus(z, 1.0, 40.0, out=work).addcmul_(target, z, value=-1)
        torch.sum(flat, 1, out=out)

    return both


def _sum_of_cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    if target.dim() == 1:
        return sheet.cross_entropy_of_class(z, target).sum()
    return sheet.COSTS["cross_entropy"].C(z, target).sum(-1).sum()


def _cross_entropy_delta(z: Tensor, target: Tensor) -> Tensor:
    of_shares = sheet.COSTS["cross_entropy"].delta
    return sheet.cross_entropy_delta_of_class(z, target) if target.dim() == 1 else of_shares(z, target)


def _both_of_cross_entropy(delta: Tensor) -> Both:
    """delta := softmax(z) Σ t − t, out := −Σ t log softmax(z); t a onehot, if the target is of class indices."""
    work = torch.empty_like(delta, memory_format=torch.contiguous_format)
    column, flat = work.new_empty(*work.shape[:-1], 1), _by_net(work)
    costs = _by_net(column)

    def both(z: Tensor, target: Tensor, out: Tensor) -> None:
        torch.log_softmax(z, -1, out=work)
        torch.exp(work, out=delta)
        if target.dim() < delta.dim():
            index = target.unsqueeze(-1)
            torch.gather(work, -1, index, out=column)
            delta.scatter_(-1, index, -1, reduce="add")
            torch.sum(costs, 1, out=out)
        else:
            torch.sum(target, -1, keepdim=True, out=column)
            delta.mul_(column).sub_(target)
            work.mul_(target)
            torch.sum(flat, 1, out=out)
        out.neg_()

    return both


_bce = sheet.COSTS["bce"]
COST_KERNELS = {
    "quadratic": CostKernel(_sum_of_squares, sheet.quadratic_delta, _both_of_squares, total_share=0.5),
    "mse": CostKernel(_sum_of_squares, sheet.quadratic_delta, _both_of_squares, delta_share=2.0),
    "bce": CostKernel(lambda z, ŷ: _bce.C(z, ŷ).sum(), _bce.delta, _both_of_binary_cross_entropy),
    "cross_entropy": CostKernel(_sum_of_cross_entropy, _cross_entropy_delta, _both_of_cross_entropy),
}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a cost before 1/per: a sum overflows in float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def total(cost: Cost, prediction: Tensor, target: Tensor) -> Tensor:
    """Return the cost's sum, in `sum_dtype`."""
    if prediction.dtype == torch.float16:
        prediction, target = prediction.float(), target.float() if target.is_floating_point() else target
    return COST_KERNELS[cost.name].total(prediction, target)


def both(cost: Cost, delta: Tensor) -> Both:
    """Return the function that fills delta and out with what `CostKernel.both` says, out in `sum_dtype`."""
    both = COST_KERNELS[cost.name].both(delta)
    if delta.dtype != torch.float16:
        return both

    def in_float16(prediction: Tensor, target: Tensor, out: Tensor) -> None:
        both(prediction, target, delta.new_empty(1))
        out.copy_(total(cost, prediction, target))

    return in_float16


def weights(cost: Cost, n: int, outputs: int) -> tuple[float, float]:
    """Return what C and ∂C/∂a^L are of the sums of the cost's kernel, for N samples of `outputs`: NaN for none."""
    per, kernel = n if cost.per == "N" else n * outputs, COST_KERNELS[cost.name]
    of_each = 1 / per if per else math.nan  # the mean of nothing
    return kernel.total_share * of_each, kernel.delta_share * of_each


def clip_factor_(squares: Tensor, c: Tensor) -> None:
    """squares := min(1, c/√squares): the sheet's `clip_factor`, from squared norms."""
    squares.rsqrt_().mul_(c).clamp_max_(number(1, squares))


# ---------------------------------------------------------------------------------------------------------------------
# The second page
# ---------------------------------------------------------------------------------------------------------------------

_FEW = 1 << 21  # products up to which ∂C/∂W is summed in float64; of up to 2^18 this is the quicker way, too


def conv_weight(a: Tensor, g: Tensor, at: grids.Geometry) -> Tensor:
    """∂C/∂W; in float32 on the CPU by a sum of few products in float64, rounded once."""
    products = g.numel() * at.kernel[0] * at.kernel[1] * (a.shape[1] // at.m)
    if g.dtype == torch.float32 and g.is_cpu and products <= _FEW:
        return grids.conv_weight(a.double(), g.double(), at).float()
    return grids.conv_weight(a, g, at)


def conv_bias(g: Tensor) -> Tensor:
    """∂C/∂b; in float32 on the CPU by a sum of few numbers in float64, rounded once."""
    if g.dtype == torch.float32 and g.is_cpu and g.numel() <= _FEW // 64:
        return grids.conv_bias(g.double()).float()
    return grids.conv_bias(g)


def channel_gradients(
    g: Tensor, x̂: Tensor, r: Tensor, weight: Tensor | None, over: grids.Dims, needs_input: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """∂C/∂x, ∂C/∂γ, ∂C/∂β of a norm whose sets are the channels: γ is one number of a set, so r P(γ g) = γ r P g.

    The means of P are those of ∂C/∂γ and ∂C/∂β. x̂ is overwritten, because a batch of images is larger than the cache.
    """
    products = g * x̂
    of_weight, of_bias = (grids.total(terms, over) for terms in (products, g))
    if not needs_input:
        return None, of_weight, of_bias
    share = len(of_bias) / max(g.numel(), 1)  # 1/n
    of_set = (1, -1, *(1,) * (g.dim() - 2))
    centred = torch.sub(g, of_bias.view(of_set), alpha=share, out=products)
    input = centred.sub_(x̂.mul_(of_weight.view(of_set)), alpha=share)
    return input.mul_(r if weight is None else weight * r), of_weight, of_bias
