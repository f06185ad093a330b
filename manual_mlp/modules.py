"""The counterpart of torch.nn: modules whose derivatives come from the sheet.

`Affine` and the activations are their torch counterparts with another forward, so `isinstance`, arguments, printing,
initialisation and state_dict are torch's own.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from manual_mlp import checks, functional, functions
from manual_mlp import formulas as sheet
from manual_mlp.checkpoint import read_checkpoint
from manual_mlp.errors import InputError


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return module.weight and module.bias. For ordinary parameters nn.Module's __getattr__ would take 0.5 µs each.

    Pruning, parametrizations and the like take a parameter out of `_parameters` and put an attribute in its place.
    """
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]  # type: ignore[return-value]
    return module.weight, module.bias  # type: ignore[return-value]


class Affine(nn.Linear):
    """z = a Wᵀ + b: an nn.Linear whose forward and backward are ours.

    input (…, in_features) → (…, out_features); weight (out_features, in_features), bias (out_features,).
    Same names, shapes, initialisation (the same bits from the same seed) and state_dict as nn.Linear.
    Raises InputError for a size below 0, and from forward for an input that does not fit.

    >>> import torch, manual_mlp as mm
    >>> affine = mm.Affine(2, 1)
    >>> _ = affine.load_state_dict({"weight": torch.tensor([[2.0, -1.0]]), "bias": torch.tensor([0.5])})
    >>> affine(torch.tensor([[1.0, 3.0]])).item()  # 2 · 1 − 1 · 3 + 0.5
    -0.5
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        n_in, n_out = checks.count("in_features", in_features, 0), checks.count("out_features", out_features, 0)
        super().__init__(n_in, n_out, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return z = input Wᵀ + b: (…, in_features) → (…, out_features)."""
        return functional.apply_affine(functions.Affine, input, *_weight_and_bias(self))


# torch's classes to ours, and activations of both to their rows; a subclass may compute something else.
OURS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Affine}
ACTIVATION_MODULES: dict[type[nn.Module], sheet.Row] = {}


class _Activation(nn.Module):
    """A class of torch with the forward and backward of a row: arguments, printing and state_dict stay torch's."""

    inplace = False  # nn.Module takes 1 µs to find that it has no such attribute

    def __init_subclass__(cls, row: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if row:
            theirs = sheet.ACTIVATIONS[row].module
            OURS[theirs] = cls
            ACTIVATION_MODULES[theirs] = ACTIVATION_MODULES[cls] = sheet.ACTIVATIONS[row]

    def forward(self, input: Tensor) -> Tensor:
        """Return a = G(z) of each element of the input z: (…) → (…). Backward it gives δ = g ⊙ G′(z)."""
        name, values = name_and_values(self)
        return functional.activation(name, input, *values, inplace=self.inplace)


class Identity(_Activation, nn.Identity, row="identity"):
    """a = z, the linear neuron.

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> a = mm.Identity()(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([-1.0, 0.0, 2.0], [1.0, 1.0, 1.0])
    """


class Sigmoid(_Activation, nn.Sigmoid, row="sigmoid"):
    """a = 1/(1 + e^−z), δ = (g · (1 − a)) · a.

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> a = mm.Sigmoid()(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([0.2689, 0.6225, 0.8808], [0.1966, 0.235, 0.105])
    """


class Tanh(_Activation, nn.Tanh, row="tanh"):
    """a = tanh z, δ = g (1 − a²).

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> a = mm.Tanh()(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([-0.7616, 0.4621, 0.964], [0.42, 0.7864, 0.0707])
    """


class ReLU(_Activation, nn.ReLU, row="relu"):
    """a = max(z, 0), δ = 0 where a ≤ 0, else g.

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> a = mm.ReLU()(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([0.0, 0.5, 2.0], [0.0, 1.0, 1.0])
    """


class LeakyReLU(_Activation, nn.LeakyReLU, row="leaky_relu"):
    """a = z where z > 0, else s z; δ = g, or s g.

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> a = mm.LeakyReLU(0.1)(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([-0.1, 0.5, 2.0], [0.1, 1.0, 1.0])
    """


class Softplus(_Activation, nn.Softplus, row="softplus"):
    """a = log(1 + e^βz)/β, linear above the threshold; δ = g · (−expm1(−βa)).

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> a = mm.Softplus()(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([0.3133, 0.9741, 2.1269], [0.2689, 0.6225, 0.8808])
    """


class SiLU(_Activation, nn.SiLU, row="silu"):
    """a = z σ(z), δ = g σ(z)(1 + z(1 − σ(z))).

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> a = mm.SiLU()(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([-0.2689, 0.3112, 1.7616], [0.0723, 0.74, 1.0908])
    """


class GELU(_Activation, nn.GELU, row="gelu"):
    """a = z Φ(z), δ = g (Φ(z) + z φ(z)); or the tanh form of both.

    >>> import torch, manual_mlp as mm
    >>> z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> a = mm.GELU()(z)
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in z.grad.tolist()]  # a and G′(z)
    ([-0.1587, 0.3457, 1.9545], [-0.0833, 0.8675, 1.0852])
    """


class Dropout(nn.Dropout):
    """a ⊙ m / (1 − p) in training, the input in evaluation; δ = g ⊙ m / (1 − p).

    >>> import torch, manual_mlp as mm
    >>> a = mm.Dropout(0.75)(torch.ones(1000))
    >>> a.unique().tolist()  # 0, or 1 / (1 − p), so that the mean stays about 1
    [0.0, 4.0]
    >>> mm.Dropout(0.75).eval()(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return input ⊙ m / (1 − p), the mask m drawn anew by each call in training; else the input: (…) → (…)."""
        return functional.dropout(input, self.p, self.training, self.inplace)


class Sum(nn.ModuleList):
    """a = Σ_k F_k(x) of its branches F_k; ∂C/∂x = Σ_k (what F_k sends back for g).

    With nn.Sequential it makes every net whose branches part and meet again. Its children have the keys of an
    nn.ModuleList: 0, 1, …. Raises InputError for no branches, for what is no module, and from forward for branches
    that give different shapes.

    >>> import torch, manual_mlp as mm
    >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> a = mm.Sum(mm.Identity(), mm.Identity(), mm.Tanh())(x)  # x + x + tanh x
    >>> a.sum().backward()
    >>> [round(value, 4) for value in a.tolist()], [round(value, 4) for value in x.grad.tolist()]
    ([0.0, 2.7616], [3.0, 2.42])
    """

    def __init__(self, *branches: nn.Module) -> None:
        if not branches or not all(isinstance(branch, nn.Module) for branch in branches):
            came = ", ".join(type(branch).__name__ for branch in branches) or "none"
            raise InputError(f"expected one or more modules as branches, such as mm.Sum(a, b); got {came}")
        super().__init__(branches)

    def __getitem__(self, index: Any) -> Any:
        """Return a branch; for a slice, the Sum of those branches."""
        return Sum(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def forward(self, input: Tensor) -> Tensor:
        """Return Σ_k F_k(input): (…) → the one shape that all branches F_k give."""
        return functional.add(*[branch(input) for branch in self])


class Residual(Sum):
    """a = x + F(x), F the chain of these layers: `Sum(Identity(), nn.Sequential(*layers))`. ∂C/∂x = g + (F's for g).

    >>> import torch, manual_mlp as mm
    >>> block = mm.Residual(mm.Affine(2, 8), mm.Tanh(), mm.Affine(8, 2))
    >>> x = torch.randn(5, 2)
    >>> torch.equal(block(x), x + block[1](x))
    True
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(Identity(), nn.Sequential(*layers))


def activation_row(activation: Any) -> sheet.Row:
    """Return the row of an activation, with its values, from what `name_and_values` takes."""
    return functional.bound_row(*name_and_values(activation))


def activation_module(activation: Any) -> nn.Module:
    """Return a new module of ours for an activation, from what `name_and_values` takes."""
    module = activation_row(activation).twin()
    module.__class__ = OURS[type(module)]
    return module


def name_and_values(activation: Any) -> tuple[str, tuple[float, ...]]:
    """Return a row's name and values, from its name, or from a module of torch's or ours with its arguments.

    Raises InputError for anything else.
    """
    row = ACTIVATION_MODULES.get(type(activation))
    if row is not None:
        name = row.name
        for option, value in row.options:
            if getattr(activation, option) != value:
                name, _ = functional.name_and_values(name, {option: getattr(activation, option)})
        return name, tuple([float(getattr(activation, parameter)) for parameter, _ in row.parameters])
    if isinstance(activation, str):
        return functional.name_and_values(activation, {})
    kind = type(activation)
    hint = ": call it, as in nn.ReLU()" if kind is type else checks.meant(kind.__name__, sheet.ACTIVATIONS)
    raise InputError(
        f"expected the name of an activation or an activation module, one of {', '.join(sheet.ACTIVATIONS)}; "
        f"got {checks.brief(activation)}{hint}"
    )


class AffineActivation(nn.Module):
    """a^{l+1} = G(a Wᵀ + b) as one node of the graph: less to keep, and less to call, than two layers.

    input (…, in_features) → (…, out_features). activation: a name, or an activation module with its arguments.
    Parameters, initialisation and state_dict as nn.Linear; it is not an nn.Linear itself, because tools that replace
    one would drop the activation. Raises InputError as `Affine`, and for an unknown activation.

    >>> import torch, manual_mlp as mm
    >>> neuron = mm.AffineActivation(2, 1, "tanh")
    >>> x = torch.tensor([[1.0, 3.0]])
    >>> torch.allclose(neuron(x), torch.tanh(x @ neuron.weight.T + neuron.bias))
    True
    """

    bias: Tensor | None
    activation: str
    parameter_values: tuple[float, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str | nn.Module = "sigmoid",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.count("in_features", in_features, 0)
        self.out_features = checks.count("out_features", out_features, 0)
        self.activation = activation  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set another activation, by name or module, with the values of its parameters."""
        if name == "activation":
            value, self.parameter_values = name_and_values(value)
        super().__setattr__(name, value)

    @property
    def row(self) -> sheet.Row:
        """Return the activation's row of the sheet, with the values of its parameters.

        >>> import torch, manual_mlp as mm
        >>> mm.AffineActivation(2, 1, torch.nn.LeakyReLU(0.2)).row.parameters
        (('negative_slope', 0.2),)
        """
        return functional.bound_row(self.activation, self.parameter_values)

    def reset_parameters(self) -> None:
        """Draw the parameters as nn.Linear does.

        >>> import torch, manual_mlp as mm
        >>> neurons = mm.AffineActivation(4, 100)
        >>> neurons.reset_parameters()
        >>> bool(neurons.weight.abs().max() <= 1 / 4**0.5)  # uniform within 1/√n_in
        True
        """
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """Return G(input Wᵀ + b): (…, in_features) → (…, out_features)."""
        return functional.apply_fused(self.activation, self.parameter_values, input, *_weight_and_bias(self))

    def extra_repr(self) -> str:
        parameters = "".join(f", {name}={value:g}" for name, value in self.row.parameters)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation!r}"
            f"{parameters}, bias={self.bias is not None}"
        )


class Conv2d(nn.Conv2d):
    """z_{n,o,p} = Σ_{c,k} a_{n,c,sp+dk−q} W_{o,c,k} + b_o: an nn.Conv2d whose forward and backward are ours.

    input (N, in_channels, H, W) or (in_channels, H, W) → (N, out_channels, H′, W′) or (out_channels, H′, W′).
    Same names, shapes, initialisation and state_dict as nn.Conv2d. Raises InputError for a padding_mode other than
    "zeros", and from forward as `functional.conv2d`.

    >>> import torch, manual_mlp as mm
    >>> layer = mm.Conv2d(1, 6, kernel_size=5, padding=2)
    >>> layer(torch.rand(8, 1, 28, 28)).shape, list(layer.state_dict())
    (torch.Size([8, 6, 28, 28]), ['weight', 'bias'])
    """

    def reset_parameters(self) -> None:
        """Draw the parameters as nn.Conv2d does, in whose __init__ it comes last.

        >>> import torch, manual_mlp as mm
        >>> layer = mm.Conv2d(4, 8, kernel_size=5)
        >>> layer.reset_parameters()
        >>> bool(layer.weight.abs().max() <= 1 / (4 * 5 * 5) ** 0.5)  # uniform within 1/√(what a neuron reads)
        True
        """
        checks.padding_mode(self.padding_mode)
        super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return z_{n,o,p} = Σ_{c,k} a_{n,c,sp+dk−q} W_{o,c,k} + b_o: (N, C, H, W) → (N, out_channels, H′, W′)."""
        checks.padding_mode(self.padding_mode)
        places = self.stride, self.padding, self.dilation, self.groups
        return functional.conv2d(input, self.weight, self.bias, *places)


class MaxPool2d(nn.MaxPool2d):
    """The largest number of each window, the first of equals; δ goes where it came from. Arguments as nn.MaxPool2d.

    >>> import torch, manual_mlp as mm
    >>> mm.MaxPool2d(2)(torch.tensor([[[1.0, 5.0, 0.0, 7.0], [4.0, 2.0, 0.0, 0.0]]]))
    tensor([[[5., 7.]]])
    """

    def forward(self, input: Tensor) -> Any:
        """Return a_{n,c,p} = max_k input_{n,c,sp+dk−q}: (N, C, H, W) → (N, C, H′, W′), with return_indices also k."""
        places: Any = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        return functional.max_pool2d(input, *places)


class AvgPool2d(nn.AvgPool2d):
    """The mean of each window; δ spreads evenly over it. Arguments as nn.AvgPool2d.

    >>> import torch, manual_mlp as mm
    >>> mm.AvgPool2d(2)(torch.tensor([[[1.0, 5.0, 0.0, 8.0], [4.0, 2.0, 0.0, 0.0]]]))
    tensor([[[3., 2.]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return a_{n,c,p} = mean_k input_{n,c,sp+k−q}: (N, C, H, W) → (N, C, H′, W′)."""
        places: Any = self.kernel_size, self.stride, self.padding, self.ceil_mode
        divisor: Any = self.count_include_pad, self.divisor_override
        return functional.avg_pool2d(input, *places, *divisor)


def counted(norm: Any) -> float:
    """Count one more batch of a batch norm, and return κ, the share that it has in the running statistics."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean of all batches so far
            return 1 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """γ x̂ + β over the set of each channel; in evaluation by the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """Return γ x̂ + β, x̂ = (input − μ)/√(v + ε), μ and v of each channel: (N, num_features, …) → the same shape."""
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats
        κ = counted(self) if tracks else 0.0
        m, s = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        training = self.training or (m is None and s is None)
        return functional.batch_norm(input, m, s, self.weight, self.bias, training, κ, self.eps)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """γ x̂ + β, x̂ = (x − μ)/√(v + ε) over the rows of each channel; δ = γ r (g − mean g − x̂ mean(g x̂)).

    input (N, num_features) or (N, num_features, places). Arguments, buffers and state_dict as nn.BatchNorm1d; the
    running variance is unbiased, v is not. Raises InputError as `functional.batch_norm`.

    >>> import torch, manual_mlp as mm
    >>> layer = mm.BatchNorm1d(1, eps=1e-12)
    >>> layer(torch.tensor([[1.0], [3.0]])).flatten().tolist(), layer.running_mean
    ([-1.0, 1.0], tensor([0.2000]))
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """γ x̂ + β, x̂ = (x − μ)/√(v + ε) over the rows and places of each channel: input (N, num_features, H, W).

    Else as `BatchNorm1d`.

    >>> import torch, manual_mlp as mm
    >>> mm.BatchNorm2d(1, eps=1e-12)(torch.tensor([[[[1.0, 3.0]]]])).flatten().tolist()
    [-1.0, 1.0]
    """


class LayerNorm(nn.LayerNorm):
    """γ ⊙ x̂ + β, x̂ = (x − μ)/√(v + ε) over the last dimensions of each row; δ = r P(γ g). Arguments as nn.LayerNorm.

    >>> import torch, manual_mlp as mm
    >>> mm.LayerNorm(2, eps=1e-12)(torch.tensor([[1.0, 3.0], [10.0, 50.0]])).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return γ ⊙ x̂ + β, x̂ = (input − μ)/√(v + ε): (…, normalized_shape) → the same shape."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Softmax(nn.Softmax):
    """a = e^z / Σ_c e^z along `dim`; δ = (g − Σ_c g a) a. A cost of logits holds it already: don't put both.

    >>> import torch, manual_mlp as mm
    >>> mm.Softmax(dim=1)(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return a = e^z / Σ_c e^z along `dim` of the input z: (…) → (…)."""
        return functional.softmax(input, self.dim, _stacklevel=5)


_GRIDS = (Conv2d, MaxPool2d, AvgPool2d, BatchNorm1d, BatchNorm2d, LayerNorm, Softmax)
OURS |= {kind.__bases__[-1]: kind for kind in _GRIDS}


class QuadraticLoss(nn.Module):
    """C = (1/N) Σ_N Σ_i ½ (a_i − ŷ_i)², the lecture's cost; nn.MSELoss is 2/m of it for m outputs.

    prediction and target (…, n_L) → scalar. Raises InputError as `functional.quadratic_loss`.

    >>> import torch, manual_mlp as mm
    >>> prediction, target = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> mm.QuadraticLoss()(prediction, target).item()  # (0 + ½ (0.25 + 0.25)) / 2
    0.125
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return C = (1/N) Σ_N Σ_i ½ (a_i − ŷ_i)²: input a, the prediction, and target ŷ, both (…, n_L) → scalar."""
        return functional.quadratic_loss(input, target)


class MSELoss(nn.MSELoss):
    """(a − ŷ)², its mean or sum: torch.nn.MSELoss, without its silent broadcast.

    >>> import torch, manual_mlp as mm
    >>> prediction, target = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> mm.MSELoss()(prediction, target).item()  # (0 + 0 + 0.25 + 0.25) / 4
    0.125
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the mean or sum of (a − ŷ)², or each for reduction "none": input a and target ŷ of one shape."""
        return functional.mse_loss(input, target, reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """softplus(z) − ŷ z, δ = σ(z) − ŷ: torch.nn.BCEWithLogitsLoss and its arguments.

    >>> import torch, manual_mlp as mm
    >>> z = torch.zeros(1, 1, requires_grad=True)
    >>> cost = mm.BCEWithLogitsLoss()(z, torch.ones(1, 1))
    >>> cost.backward()
    >>> round(cost.item(), 4), z.grad.item()  # log 2, and σ(0) − 1
    (0.6931, -0.5)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return softplus(z) − ŷ z, reduced as in `reduction`: input z, the logits, and target ŷ of one shape."""
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """−log softmax(z)_class, δ = softmax(z) − onehot: torch.nn.CrossEntropyLoss and its arguments.

    >>> import torch, manual_mlp as mm
    >>> z = torch.zeros(1, 4, requires_grad=True)
    >>> cost = mm.CrossEntropyLoss()(z, torch.tensor([2]))
    >>> cost.backward()
    >>> round(cost.item(), 4), z.grad.tolist()  # log 4, and softmax(z) − onehot
    (1.3863, [[0.25, 0.25, -0.75, 0.25]])
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return −log softmax(z)_class, reduced as in `reduction`: input z (N, classes) or (N, classes, …).

        target: class indices (N,) or (N, …), or a probability for each class, of the input's shape.
        """
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class _Chain(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        """Return the prediction a^L, layer by layer, a^{l+1} = G(z^{l+1}): input (…, n_1) → (…, n_L)."""
        return super().forward(input)


class MLP(_Chain):
    """A multi-layer perceptron of fused layers: sizes [n_1, …, n_L], input (…, n_1) → prediction (…, n_L).

    activation: a name or an activation module, or a list with one for each hidden layer; output_activation likewise.
    dropout: its probability after each hidden layer. Layers carry the keys of
    nn.Sequential(nn.Linear, activation, nn.Linear, …): 0.weight, 2.weight, …, so state_dicts go both ways; a dropout
    sits under the odd key after its layer and shifts none.
    residual: each hidden layer but the first is added to what it reads, a^{l+1} = a^l + G(a^l Wᵀ + b), as `Residual`
    does; its keys are then those of a Residual, such as 2.1.0.weight.
    batch_norm: each hidden layer is G(BatchNorm1d(a Wᵀ)); β of the norm takes the place of b, and the keys are those of
    an nn.Sequential in the place of the layer, such as 2.0.weight and 2.1.running_mean.
    Raises InputError for fewer than two sizes, a size below 1, an unknown activation, or a list of the wrong length,
    with residual for hidden layers of several widths, or fewer than two, and with batch_norm for none.

    >>> import torch, manual_mlp as mm
    >>> net = mm.MLP([64, 30, 10], activation="tanh", output_activation="identity")
    >>> net(torch.zeros(5, 64)).shape, list(net.state_dict())
    (torch.Size([5, 10]), ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | nn.Module | Sequence[str | nn.Module] = "sigmoid",
        output_activation: str | nn.Module = "sigmoid",
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        residual: bool = False,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = _checked_sizes(sizes)
        activations = [*_one_per_hidden_layer(activation, len(self.sizes) - 2), output_activation]
        checks.fraction("dropout probability", dropout)
        checks.hidden_layers(self.sizes[1:-1], residual, batch_norm)
        for index, (n_in, n_out, G) in enumerate(zip(self.sizes, self.sizes[1:], activations, strict=False)):
            hidden = index < len(activations) - 1
            drops = [Dropout(dropout)] if dropout > 0 and hidden else []
            layers: list[nn.Module] = [AffineActivation(n_in, n_out, G, bias, device, dtype)]
            if batch_norm and hidden:
                layers = [Affine(n_in, n_out, False, device, dtype), BatchNorm1d(n_out, device=device, dtype=dtype)]
                layers.append(activation_module(G))
            if residual and hidden and index > 0:
                self.add_module(str(2 * index), Residual(*layers, *drops))
                continue
            self.add_module(str(2 * index), nn.Sequential(*layers) if len(layers) > 1 else layers[0])
            for drop in drops:
                self.add_module(str(2 * index + 1), drop)

    def __getitem__(self, index: Any) -> Any:
        """Return a layer; for a slice, an nn.Sequential of those layers, under their keys."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str], map_location: Any = "cpu", member: int | None = None) -> "MLP":
        """Return the net of a checkpoint that train.py wrote, for any `backprop`, in evaluation mode.

        member: which one, from 0, of a training of several; with its parameters of its best epoch.
        It takes features as it was trained on them: standardised ones, if data.standardise was on
        (`mm.Predictor` standardises them itself). For raw rows of a table, with text and gaps, take
        `predictor.standardised(predictor.prepared(frame))`. Raises InputError as `read_checkpoint`.

        >>> import manual_mlp as mm
        >>> net = mm.MLP.from_checkpoint("best.ckpt")  # of a run with data=iris model.hidden=[4]
        >>> net.sizes, net.training
        ([4, 4, 3], False)
        """
        return restored(mlp_of, path, map_location, member, convolutions=False)

    def to_torch(self) -> nn.Sequential:
        """Return the net in torch's own layers, nn.Linear, nn.Sigmoid, …: same keys, the same tensors as parameters.

        torch.nn has no sum, so a residual block is a torch.fx.GraphModule, which needs no manual_mlp either.

        >>> import torch, manual_mlp as mm
        >>> net, x = mm.MLP([2, 3, 1]), torch.ones(1, 2)
        >>> theirs = net.to_torch()
        >>> [type(layer).__name__ for layer in theirs], torch.allclose(theirs(x), net(x))
        (['Linear', 'Sigmoid', 'Linear', 'Sigmoid'], True)
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for key, layer in self.named_children():
            first, *G = in_torch([layer])
            # A dropout joins its activation, whose key it has, so that later keys don't shift.
            layers[key] = nn.Sequential(layers[key], first) if key in layers else first
            layers.update({str(int(key) + 1): of_layer for of_layer in G})
        return nn.Sequential(layers).train(self.training)


def mlp_of(values: Mapping[str, Any]) -> MLP:
    """Make the MLP that these hyper-parameters of a training describe."""
    return MLP([values["input_size"], *values["hidden"], values["output_size"]], **of_layers(values))


def of_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `MLP` beside its sizes, from the hyper-parameters of a training."""
    own = {name: values[name] for name in ("activation", "output_activation", "bias", "dropout")}
    return own | {name: values.get(name, False) for name in ("residual", "batch_norm")}


def restored(
    make: Callable[..., Any],
    path: str | PathLike[str],
    map_location: Any = "cpu",
    member: int | None = None,
    convolutions: bool | None = None,
) -> Any:
    """Return the net of a checkpoint in evaluation mode. make(hyper-parameters) builds it.

    convolutions: with or without them; None for both. Raises InputError as `read_checkpoint`, for the other kind of
    net, and for a member that the training did not have.
    """
    content = read_checkpoint(path, map_location)
    values: dict[str, Any] = content["hyper_parameters"]
    if convolutions not in (None, bool(values.get("channels"))):
        wanted, found = ("LeNet", "MLP") if convolutions else ("MLP", "LeNet")
        raise InputError(f"expected an mm.{wanted} in {path}; got an mm.{found}: take mm.{found}.from_checkpoint")
    members = values.get("members", 1)
    if member not in (range(members) if members > 1 else (None, 0)):
        which = f"a member from 0 to {members - 1}" if members > 1 else "no member, or 0, because there is one net"
        raise InputError(f"expected {which} in {path}; got member={member}: mm.Predictor takes all together")
    with rebuilding(path):
        net = make(values)
        net.load_state_dict(tensors_of(content, f"net.{member}." if members > 1 else "net."), assign=True)
        if members > 1 and content["state_dict"]["net.kept_cost"][member].isfinite():
            fill(net, content["state_dict"]["net.kept"][member])
    return net.eval()


@contextmanager
def rebuilding(path: object) -> Iterator[None]:
    """Let the net that a checkpoint describes be built on the device "meta", to take the checkpoint's tensors.

    So a file gets no memory for what it only claims. Raises InputError if they are not the tensors of that net.
    """
    try:
        with torch.device("meta"):
            yield
    except (TypeError, RuntimeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()  # torch lists what does not fit
        raise InputError(
            f"expected the parameters of this net in {path}, but {reason:.300}; take another one"
        ) from error


def tensors_of(content: Mapping[str, Any], prefix: str = "net.") -> dict[str, Tensor]:
    """Return the tensors that a checkpoint has under a prefix; metrics may have states, too."""
    states = content["state_dict"].items()
    return {name.removeprefix(prefix): tensor for name, tensor in states if name.startswith(prefix)}


@torch.no_grad()
def fill(net: nn.Module, flat: Tensor) -> None:
    """Copy numbers that torch.nn.utils.parameters_to_vector has laid out into the parameters of a net."""
    parameters = list(net.parameters())
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))


def in_torch(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield each layer in torch's own class, with the same tensors; of a fused one two, an nn.Linear before its G."""
    for layer in layers:
        if isinstance(layer, AffineActivation):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias  # type: ignore[assignment]
            yield from (linear, layer.row.twin())
            continue
        if isinstance(layer, nn.Sequential):
            yield nn.Sequential(*in_torch(layer))
            continue
        if isinstance(layer, Residual):
            yield _sum_in_torch(*in_torch(layer[1]))
            continue
        kind: Any = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch."))
        theirs = kind.__new__(kind)
        nn.Module.__init__(theirs)
        vars(theirs).update({name: value for name, value in vars(layer).items() if name not in vars(theirs)})
        theirs._parameters.update(layer._parameters)
        theirs._buffers.update(layer._buffers)
        yield theirs


def _sum_in_torch(*layers: nn.Module) -> nn.Module:
    """Return the module x + F(x), with the keys of `Residual`."""
    graph = torch.fx.Graph()
    x = graph.placeholder("input")
    branches = graph.call_module("0", (x,)), graph.call_module("1", (x,))
    graph.output(graph.call_function(operator.add, branches))
    return torch.fx.GraphModule(nn.ModuleList([nn.Identity(), nn.Sequential(*layers)]), graph)


def _checked_sizes(sizes: Sequence[int]) -> list[int]:
    if not hasattr(sizes, "__len__") or isinstance(sizes, str) or len(sizes) < 2:
        raise InputError(
            f"expected at least two sizes, of the input and the output, such as [784, 30, 10]; got {sizes}"
        )
    return [checks.count(f"sizes[{index}]", size) for index, size in enumerate(sizes)]


def _one_per_hidden_layer(
    activation: str | nn.Module | Sequence[str | nn.Module], hidden: int
) -> list[str | nn.Module]:
    if isinstance(activation, list | tuple):
        if len(activation) != hidden:
            raise InputError(
                f"expected one activation for each of the {hidden} hidden layers; got {len(activation)}: {activation}"
            )
        return list(activation)
    name_and_values(activation)  # refused here, even without a hidden layer
    return [activation] * hidden  # type: ignore[list-item]
