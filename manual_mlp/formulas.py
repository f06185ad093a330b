"""THE SHEET: the formulas of the package, forward and δ, on plain tensors. No autograd, no modules, no state.

This is its first page: affine map, activations, costs, their second derivatives, dropout, the perceptron, pretraining.
The second page is `grids.py`: convolution, max and mean pooling, batch norm, layer norm, softmax of any dimension.

Letters and indices, here and in all code that calls this file (L layers, the input layer is layer 1, N rows):

    a^1 = x             input                                           (N, n_1)
    W^l, b^l            weight and bias between layer l and layer l+1   (n_{l+1}, n_l), (n_{l+1},)
    z^{l+1} = a^l W^lᵀ + b^l   input of the neurons of layer l+1        (N, n_{l+1})
    a^l = G(z^l)        activation, componentwise                       (N, n_l)
    y = a^L, ŷ          prediction and target                           (N, n_L)
    C                   cost                                            scalar
    δ^l = ∂C/∂z^l       backpropagated error (`delta`)                  (N, n_l)
    g                   ∂C/∂(output): what arrives from downstream
    z^l = Σ_k a^k       a sum, the layer where branches meet            (N, n_l)

The five steps of backpropagation:

    1. forward          z^{l+1} = a^l W^lᵀ + b^l,  a^{l+1} = G(z^{l+1})             affine, Row.G
    2. output error     δ^L = ∂C/∂a^L ⊙ G′(z^L)                                     Cost.delta, Row.delta
    3. right to left    δ^l = (δ^{l+1} W^l) ⊙ G′(z^l)                               grad_input, Row.delta
    4. gradients        ∂C/∂W^l = (δ^{l+1})ᵀ a^l,  ∂C/∂b^l = Σ_N δ^{l+1}            grad_weight, grad_bias
    5. update           w := w − LR · ∂C/∂w, every δ taken with the old weights

In a graph a^l goes to several layers, and ∂C/∂a^l adds up what each of them sends back: δ^m W from an affine map with
δ^m, and δ^m itself from a sum. A residual connection a^{l+1} = a^l + F(a^l) thus sends back g + (what F sends for g).

Leading dimensions: N stands for any number of them, as in torch.nn.Linear. Every formula is out of place and made of
ordinary tensor operations, so that it can itself be differentiated, vmapped and compiled. `kernels.py` has quicker
forms of the same formulas, and the tests hold each of them to its formula here.

Source: the lecture "Neural Networks – The essentials", which writes the prediction y and the true label ŷ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi, sqrt

import torch
from torch import Tensor, erfc, exp, expm1, log1p, nn, tanh, where
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# The affine map (steps 1, 3 and 4)
# ---------------------------------------------------------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """(…, n) as (N, n). With explicit N: −1 is ambiguous for an empty batch, and legacy vmap has no `flatten`."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def affine(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z = a Wᵀ + b, (…, n_in) → (…, n_out)."""
    return F.linear(a, weight, bias)


def grad_input(delta: Tensor, weight: Tensor) -> Tensor:
    """∂C/∂a = δ W, (…, n_out) → (…, n_in)."""
    return torch.matmul(delta, weight)


def grad_weight(delta: Tensor, a: Tensor) -> Tensor:
    """∂C/∂W = δᵀ a, summed over the batch: the dyadic product δ aᵀ of the lecture, (n_out, n_in)."""
    return torch.mm(rows(delta).t(), rows(a))


def grad_bias(delta: Tensor) -> Tensor:
    """∂C/∂b = Σ_N δ, (n_out,)."""
    return rows(delta).sum(0)


def add(*terms: Tensor) -> Tensor:
    """z = Σ_k a^k, from the first term on. Its derivative by each term is 1, so each gets g as it is."""
    return sum(terms[1:], terms[0])


# ---------------------------------------------------------------------------------------------------------------------
# Activations: a = G(z), and δ = g ⊙ G′ and G″ written in a or in z, whichever is saved
# ---------------------------------------------------------------------------------------------------------------------

Formula = Callable[..., Tensor]
Curved = Callable[..., Tensor | int]


@dataclass(frozen=True)
class Row:
    """One activation: two or three formulas, and the class of torch that computes the same.

    name        what `activation=` takes
    G           z, *values ↦ a, componentwise
    delta       g, saved, *values ↦ δ = g ⊙ G′; so G′ itself is delta(1, saved)
    saves       "a" or "z": the letter in which delta and curvature are written
    module      torch's class, of which `mm.Name` is a subclass
    parameters  names (torch's) and values of what follows z
    options     what else torch's class needs to compute this row
    tail        z in this interval: G′ is exact to a relative 1e-12; beyond it, to an absolute 4 eps
    when_z      values ↦ whether a does not determine G′, and delta and curvature for that case, written in z
    curvature   saved, *values ↦ G″; 0 for a row of straight pieces. Only second derivatives need it: it may be None
    """

    name: str
    G: Formula
    delta: Formula
    saves: str
    module: type[nn.Module]
    parameters: tuple[tuple[str, float], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    tail: tuple[float, float] = (-40.0, 40.0)
    when_z: tuple[Callable[..., bool], Formula] | tuple[Callable[..., bool], Formula, Curved] | None = None
    curvature: Curved | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """The values of the parameters, as G and delta take them."""
        return tuple(value for _, value in self.parameters)

    def saves_with(self, *values: float) -> str:
        """Return "a" or "z", what the row saves with these values."""
        return "z" if self.when_z is not None and self.when_z[0](*values) else self.saves

    @property
    def forms(self) -> tuple["Row", ...]:
        """The row, and the row written in z if some values need that."""
        if self.when_z is None:
            return (self,)
        _, delta, *curvature = self.when_z
        return self, replace(self, delta=delta, saves="z", when_z=None, curvature=curvature[0] if curvature else None)

    def twin(self) -> nn.Module:
        """Return torch's own module of this row."""
        return self.module(**dict(self.options), **dict(self.parameters))

    def bind(self, *values: float) -> "Row":
        """Return the row with these values, written in what it saves with them."""
        (form,) = (form for form in self.forms if form.saves == self.saves_with(*values))
        names = (name for name, _ in self.parameters)
        return replace(form, parameters=tuple(zip(names, values, strict=True)))


σ = torch.sigmoid  # 1/(1 + e^−z)


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z). Beyond z = 40 e^−z is below the last digit of z, so torch's threshold there changes no bit."""
    return F.softplus(z, 1.0, 40.0)


def Φ(z: Tensor) -> Tensor:
    """The normal distribution, by erfc, which keeps the lower tail."""
    return erfc(z * (-sqrt(2) / 2)) / 2


def φ(z: Tensor) -> Tensor:
    """The normal density, Φ′."""
    return exp(-z * z / 2) * (1 / sqrt(2 * pi))


κ = 0.044715


def u(z: Tensor) -> Tensor:
    """√(2/π) (z + κ z³): Φ(z) is almost ½(1 + tanh u) = σ(2u), and σ keeps the lower tail."""
    return z * (1 + z * z * κ) * sqrt(2 / pi)


def du(z: Tensor) -> Tensor:
    """u′ = √(2/π) (1 + 3 κ z²)."""
    return (1 + z * z * (3 * κ)) * sqrt(2 / pi)


def ddu(z: Tensor) -> Tensor:
    """u″ = √(2/π) 6 κ z."""
    return z * (6 * κ * sqrt(2 / pi))


def end(t: float) -> float:
    """The smallest βa of softplus that is certainly beyond βz = t, where a is linear; widened, because a is rounded."""
    return (t + math.log1p(math.exp(-t))) * (1 + 2e-15)


# fmt: off
ACTIVATIONS = {row.name: row for row in (
    Row("identity", lambda z: z, lambda g, a: g, "a", nn.Identity, curvature=lambda a: 0),
    # In this order, and no other, the bits are those of torch's own sigmoid.
    Row("sigmoid", lambda z: σ(z), lambda g, a: (g * (1 - a)) * a, "a", nn.Sigmoid, tail=(-40, 5),
        curvature=lambda a: a * (1 - a) * (1 - 2 * a)),
    Row("tanh", lambda z: tanh(z), lambda g, a: g * (1 - a * a), "a", nn.Tanh, tail=(-2.5, 2.5),
        curvature=lambda a: -2 * a * (1 - a * a)),
    # 0 at 0, and NaN passes.
    Row("relu", lambda z: where(z <= 0, 0, z), lambda g, a: where(a <= 0, 0, g), "a", nn.ReLU, curvature=lambda a: 0),
    # For s ≥ 0 a and z have the same sign.
    Row("leaky_relu", lambda z, s: where(z > 0, z, s * z), lambda g, a, s: where(a > 0, g, g * s), "a", nn.LeakyReLU,
        parameters=(("negative_slope", 0.01),), curvature=lambda a, s: 0,
        when_z=(lambda s: s < 0, lambda g, z, s: where(z > 0, g, g * s), lambda z, s: 0)),
    # a does not say where G becomes linear to more than e^−t, which is 2e-9 at the default t = 20.
    Row("softplus", lambda z, β, t: where(β * z > t, z, log1p(exp(β * z)) / β),
        lambda g, a, β, t: where(β * a >= end(t), g, g * -expm1(-β * a)), "a", nn.Softplus,
        parameters=(("beta", 1.0), ("threshold", 20.0)),
        curvature=lambda a, β, t: where(β * a >= end(t), 0, β * exp(-β * a) * -expm1(-β * a)),
        when_z=(lambda β, t: t < 20 or β == 0, lambda g, z, β, t: where(β * z > t, g, g * σ(β * z)),
                lambda z, β, t: where(β * z > t, 0, β * σ(β * z) * σ(-β * z)))),
    Row("silu", lambda z: z * σ(z), lambda g, z: g * (σ(z) * (1 + z * (1 - σ(z)))), "z", nn.SiLU,
        curvature=lambda z: σ(z) * σ(-z) * (2 + z * (1 - 2 * σ(z)))),
    Row("gelu", lambda z: z * Φ(z), lambda g, z: g * (Φ(z) + z * φ(z)), "z", nn.GELU,
        options=(("approximate", "none"),), curvature=lambda z: φ(z) * (2 - z * z)),
    Row("gelu_tanh", lambda z: z * σ(2 * u(z)),
        lambda g, z: g * (σ(2 * u(z)) + 2 * z * σ(2 * u(z)) * (1 - σ(2 * u(z))) * du(z)), "z", nn.GELU,
        options=(("approximate", "tanh"),), curvature=lambda z: 2 * σ(2 * u(z)) * σ(-2 * u(z)) * (
            2 * du(z) + z * (2 * (1 - 2 * σ(2 * u(z))) * du(z) ** 2 + ddu(z)))),
)}
# fmt: on

sigmoid, sigmoid_delta = ACTIVATIONS["sigmoid"].G, ACTIVATIONS["sigmoid"].delta  # the lesson calls them by name

# ---------------------------------------------------------------------------------------------------------------------
# Costs: C of each element, and δ before the reduction multiplies by 1/N
# ---------------------------------------------------------------------------------------------------------------------


def Σ(x: Tensor) -> Tensor:
    """The sum over the classes of each sample, (…, classes) → (…, 1)."""
    return x.sum(-1, keepdim=True)


def softmax(z: Tensor) -> Tensor:
    """e^z / Σ e^z, (…, classes)."""
    return torch.softmax(z, -1)


def log_softmax(z: Tensor) -> Tensor:
    """z − log Σ e^z, (…, classes)."""
    return torch.log_softmax(z, -1)


@dataclass(frozen=True)
class Cost:
    """One cost: C = 1/per Σ C(a, ŷ), with the sum over samples and outputs.

    C             prediction, target, *constants ↦ the cost of each element
    delta         the same ↦ per · ∂C/∂a
    delta_target  the same ↦ per · ∂C/∂ŷ
    per           "N" or "N m", with N samples of m outputs
    logits        whether the prediction is z^L: the output activation is then the identity
    H             prediction, target, v ↦ per · H v: the second derivative by the prediction, along v
    root          prediction, target, v ↦ √per · S v, where H = S Sᵀ

    Only second derivatives need H and root: they may be None.
    """

    name: str
    C: Formula
    delta: Formula
    delta_target: Formula
    per: str
    logits: bool = False
    H: Formula | None = None
    root: Formula | None = None


# fmt: off
COSTS = {cost.name: cost for cost in (
    Cost("quadratic", lambda a, ŷ: 0.5 * (a - ŷ) ** 2, lambda a, ŷ: a - ŷ, lambda a, ŷ: ŷ - a, per="N",
         H=lambda a, ŷ, v: v, root=lambda a, ŷ, v: v),
    Cost("mse", lambda a, ŷ: (a - ŷ) ** 2, lambda a, ŷ: 2 * (a - ŷ), lambda a, ŷ: 2 * (ŷ - a), per="N m",
         H=lambda a, ŷ, v: 2 * v, root=lambda a, ŷ, v: sqrt(2) * v),
    # The G′ of the sigmoid cancels.
    Cost("bce", lambda z, ŷ: softplus(z) - ŷ * z, lambda z, ŷ: σ(z) - ŷ, lambda z, ŷ: -z, per="N m", logits=True,
         H=lambda z, ŷ, v: σ(z) * σ(-z) * v, root=lambda z, ŷ, v: (σ(z) * σ(-z)) ** 0.5 * v),
    # Where ŷ is a onehot, Σ(ŷ) = 1: δ^L = softmax(z) − ŷ.
    Cost("cross_entropy", lambda z, ŷ: -ŷ * log_softmax(z), lambda z, ŷ: softmax(z) * Σ(ŷ) - ŷ,
         lambda z, ŷ: -log_softmax(z), per="N", logits=True,
         H=lambda z, ŷ, v: Σ(ŷ) * softmax(z) * (v - Σ(softmax(z) * v)),
         root=lambda z, ŷ, v: Σ(ŷ) ** 0.5 * (softmax(z) ** 0.5 * v - softmax(z) * Σ(softmax(z) ** 0.5 * v))),
)}
# With a weight p on the positives.
WEIGHTED_BCE = Cost(
    "bce", lambda z, ŷ, p: ŷ * p * softplus(-z) + (1 - ŷ) * softplus(z),
    lambda z, ŷ, p: σ(z) * (1 - ŷ + ŷ * p) - ŷ * p, lambda z, ŷ, p: p * softplus(-z) - softplus(z),
    per="N m", logits=True,
)
# fmt: on

quadratic_delta = COSTS["quadratic"].delta


def cross_entropy_of_class(z: Tensor, target: Tensor) -> Tensor:
    """−log softmax(z)_class of each sample: z (…, classes), class index (…).

    Gathered rather than multiplied by onehot, so that a class masked by a logit of −inf costs nothing.
    """
    return -log_softmax(z).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def cross_entropy_delta_of_class(z: Tensor, target: Tensor) -> Tensor:
    """δ^L = softmax(z) − onehot."""
    return softmax(z) - onehot(z, target)


def onehot(z: Tensor, target: Tensor) -> Tensor:
    """1 at each sample's class, 0 elsewhere, in z's shape and dtype. Scattered: a class out of range is an error."""
    return torch.zeros_like(z).scatter(-1, target.unsqueeze(-1), 1)


def class_shares(target: Tensor, class_weight: Tensor | None, smoothing: float) -> Tensor:
    """t_c = w_c ((1 − ε) ŷ_c + ε/classes): the target of each class, weighted and smoothed."""
    shares = target if smoothing == 0 else target * (1 - smoothing) + smoothing / target.shape[-1]
    return shares if class_weight is None else shares * class_weight


def divisor(shape: torch.Size, reduction: str, weight: Tensor | None = None) -> Tensor | int:
    """Return what the sum over all elements is divided by.

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
    if weight is None and reduction != "sum":  # by way of the mean, because a sum overflows in float16
        mean = elements.mean()
        return mean * elements.shape[-1] if reduction == "samples" else mean
    return elements.sum() / divisor(elements.shape, reduction, weight)


def share(g: Tensor, shape: torch.Size, reduction: str, weight: Tensor | None = None) -> Tensor:
    """g / divisor: what arrives at each element when g arrives at their reduction."""
    return g / divisor(shape, reduction, weight) if reduction in ("mean", "samples") else g


def probability(prediction: Tensor, loss: str) -> Tensor:
    """P(class | x) of each class, from a prediction (N, n_L) → (N, n_L), rows of sum 1. NaN stays NaN.

    Cross-entropy: softmax(z). The other costs train each output by itself towards P (under the quadratic cost
    a_i → E[ŷ_i | x], the share of class i), so a row need not sum to 1: p_i / Σ_j p_j, with p = σ(z) under bce and
    p = a cut off at 0 and 1 otherwise; equal shares where all p are 0.
    """
    if loss == "cross_entropy":
        return softmax(prediction)
    p = σ(prediction) if COSTS[loss].logits else prediction.clamp(0, 1)
    return where(Σ(p) == 0, 1 / prediction.shape[-1], p / Σ(p))


def committee(predictions: Tensor, loss: str) -> Tensor:
    """The prediction of K nets together, (K, N, n_L) → (N, n_L): its P(class | x) is the mean of theirs, p̄.

    Cross-entropy: log p̄; bce: log p̄/(1 − p̄), whose σ is p̄; otherwise p̄ itself.
    """
    p = probability(predictions, loss).mean(0)
    if loss == "cross_entropy":
        return torch.log(p)
    return torch.logit(p) if COSTS[loss].logits else p


# ---------------------------------------------------------------------------------------------------------------------
# Each sample by itself: δ_n = ∂C_n/∂z_n of the sample's own cost C_n, where C = (1/N) Σ_n C_n
# ---------------------------------------------------------------------------------------------------------------------


def sample_gradients(delta: Tensor, a: Tensor) -> Tensor:
    """∂C_n/∂W = δ_n a_nᵀ of each sample, (N, n_out), (N, n_in) → (N, n_out, n_in). ∂C_n/∂b is δ_n itself."""
    return delta.unsqueeze(-1) * a.unsqueeze(-2)


def squared_norms(x: Tensor) -> Tensor:
    """‖x_n‖² of each row, (N, n) → (N,). ‖∂C_n/∂W‖² = ‖δ_n‖² ‖a_n‖², and ‖∂C_n/∂b‖² = ‖δ_n‖²."""
    return (x * x).sum(-1)


def clip_factor(norms: Tensor, c: float) -> Tensor:
    """c_n = min(1, c/‖g_n‖), the factor that shortens g_n to the length c at most. 1 at a norm of 0."""
    return (c / norms).clamp(max=1)


def variances(delta: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(1/N) Σ_n (∂C_n/∂W)² − (∂C/∂W)² and the same of b, (n_out, n_in) and (n_out,).

    δ = δ̄ + d and a = ā + α, and the products are of d and α: of large equal gradients the means would cancel. What is
    left of a rounding error below 0 becomes 0.
    """
    n = len(delta)
    mean_delta, mean_a = delta.mean(0), a.mean(0)
    d, α = delta - mean_delta, a - mean_a
    of_d, of_α, both = (d * d).mean(0), (α * α).mean(0), grad_weight(d, α) / n
    row, column = mean_a, mean_delta.unsqueeze(1)
    total = grad_weight(d * d, α * α) / n - both * both + 2 * column * row * both
    total = total + column * (column * of_α + 2 * grad_weight(d, α * α) / n)
    total = total + row * (row * of_d.unsqueeze(1) + 2 * grad_weight(d * d, α) / n)
    return total.clamp(min=0), of_d


def noise_scale(trace: Tensor, square: Tensor, n: int) -> Tensor:
    """tr Σ/(‖G‖² − tr Σ/N): trace = tr Σ with 1/(N − 1), square = ‖G‖², from which the noise in G is taken away."""
    return trace / (square - trace / n)


def moved_delta(first: Tensor, g: Tensor, curvature: Tensor | int, moved_z: Tensor) -> Tensor:
    """R{δ} = R{g} ⊙ G′ + g ⊙ G″ ⊙ R{z}, from its first term; R{x} is the derivative of x along a direction of all w."""
    return first + g * curvature * moved_z


# ---------------------------------------------------------------------------------------------------------------------
# Penalty, dropout
# ---------------------------------------------------------------------------------------------------------------------


def l1_gradient(weight: Tensor, strength: float) -> Tensor:
    """∂/∂W λ Σ |W_ij| = λ sign W; at 0, where there is no derivative, 0, as torch's own abs."""
    return strength * torch.sign(weight)


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
    """LR (ŷ − y) xᵀ and LR (ŷ − y): what one sample adds to W and b (Rosenblatt, 1958).

    prediction, target (n_out,), a = x (n_in,) → (n_out, n_in), (n_out,).
    """
    correction = rate * (target - prediction)
    return torch.outer(correction, a), correction


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining: a layer and its input as a restricted Boltzmann machine, with steps 1, 3 and 4 for its products
# ---------------------------------------------------------------------------------------------------------------------


def contrastive_divergence(
    v: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor, drawn: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ΔW = (hᵀ v − h₁ᵀ v₁)/N, Δb = (1/N) Σ_N (h − h₁), Δc = (1/N) Σ_N (v − v₁), and v₁ (Hinton, 2002).

    h = P(h = 1 | v) = σ(v Wᵀ + b), s ∈ {0, 1} is drawn from it, v₁ = P(v = 1 | s) = σ(s W + c), h₁ = σ(v₁ Wᵀ + b).

    v (N, n_in) in [0, 1], c (n_in,) the bias of the input, drawn (N, n_out) uniform in [0, 1).
    """
    h = sigmoid(affine(v, weight, bias))
    s = (drawn < h).to(v.dtype)
    v_1 = sigmoid(grad_input(s, weight) + c)
    h_1 = sigmoid(affine(v_1, weight, bias))
    weight_step = (grad_weight(h, v) - grad_weight(h_1, v_1)) / len(v)
    return weight_step, grad_bias(h - h_1) / len(v), grad_bias(v - v_1) / len(v), v_1
