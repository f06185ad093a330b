"""The counterpart of torch.nn: modules whose derivatives come from the sheet.

`Affine` and the activations are their torch counterparts with another forward, so `isinstance`, arguments, printing,
initialisation and state_dict are torch's own.
"""

import operator
from collections import OrderedDict
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import formulas as sheet
from manual_mlp import functional, functions
from manual_mlp.checkpoint import read_checkpoint
from manual_mlp.errors import InputError


def _size(name: str, size: Any) -> int:
    """Return a number of neurons, given in any whole type (NumPy's too)."""
    if isinstance(size, bool) or not hasattr(size, "__index__") or operator.index(size) < 1:
        raise InputError(f"expected {name} to be a positive whole number of neurons; got {size!r}")
    return operator.index(size)


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
    Raises InputError for a size below 1, and from forward for an input that does not fit.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(_size("in_features", in_features), _size("out_features", out_features), bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.apply_affine(functions.Affine, input, *_weight_and_bias(self))


class Identity(nn.Identity):
    """a = z, the linear neuron."""


class Sigmoid(nn.Sigmoid):
    """a = 1/(1 + e^−z), δ = (g · (1 − a)) · a."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class Tanh(nn.Tanh):
    """a = tanh z, δ = g (1 − a²)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)


class ReLU(nn.ReLU):
    """a = max(z, 0), δ = 0 where a ≤ 0, else g."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """a = z where z > 0, else s z; δ = g, or s g."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class Softplus(nn.Softplus):
    """a = log(1 + e^βz)/β, linear above the threshold; δ = g · (−expm1(−βa))."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softplus(input, self.beta, self.threshold)


class SiLU(nn.SiLU):
    """a = z σ(z), δ = g σ(z)(1 + z(1 − σ(z)))."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class GELU(nn.GELU):
    """a = z Φ(z), δ = g (Φ(z) + z φ(z)); or the tanh form of both."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)


class Dropout(nn.Dropout):
    """a ⊙ m / (1 − p) in training, the input in evaluation; δ = g ⊙ m / (1 − p)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)


# torch's activation classes to ours, and both to the names of their rows; a subclass may compute something else.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    kind.__mro__[1]: kind for kind in (Identity, Sigmoid, Tanh, ReLU, LeakyReLU, Softplus, SiLU, GELU)
}
_ROWS = {row.module: row.name for row in reversed(sheet.ACTIVATIONS.values())}
ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    kind: _ROWS[theirs] for theirs, ours in OURS.items() for kind in (theirs, ours)
}


def activation_row(activation: str | nn.Module) -> sheet.Row:
    """Return the row of an activation, with its values, from what `name_and_values` takes."""
    return functional.bound_row(*name_and_values(activation))


def name_and_values(activation: str | nn.Module) -> tuple[str, tuple[float, ...]]:
    """Return a row's name and values, from its name, or from a module of torch's or ours with its arguments.

    Raises InputError for anything else.
    """
    if isinstance(activation, str):
        return functional.name_and_values(activation, {})
    kind = type(activation)
    if kind not in ACTIVATION_MODULES:
        raise InputError(
            "expected the name of an activation or an activation module, one of "
            f"{', '.join(sheet.ACTIVATIONS)}; "
            f"got {activation!r}" + (": call it, as in nn.ReLU()" if isinstance(activation, type) else "")
        )
    names = set(getattr(kind, "__constants__", ())) - {"inplace"}
    return functional.name_and_values(ACTIVATION_MODULES[kind], {key: getattr(activation, key) for key in names})


class AffineActivation(nn.Module):
    """a^{l+1} = G(a Wᵀ + b) as one node of the graph: less to keep, and less to call, than two layers.

    input (…, in_features) → (…, out_features). activation: a name, or an activation module with its arguments.
    Parameters, initialisation and state_dict as nn.Linear; it is not an nn.Linear itself, because tools that replace
    one would drop the activation. Raises InputError as `Affine`, and for an unknown activation.
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
        self.in_features, self.out_features = _size("in_features", in_features), _size("out_features", out_features)
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
        """Return the activation's row of the sheet, with the values of its parameters."""
        return functional.bound_row(self.activation, self.parameter_values)

    def reset_parameters(self) -> None:
        """Draw the parameters as nn.Linear does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        function = functions.fused(self.activation, self.parameter_values)
        return functional.apply_affine(function, input, *_weight_and_bias(self), *self.parameter_values)

    def extra_repr(self) -> str:
        parameters = "".join(f", {name}={value:g}" for name, value in self.row.parameters)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation!r}"
            f"{parameters}, bias={self.bias is not None}"
        )


class QuadraticLoss(nn.Module):
    """C = (1/N) Σ_N Σ_i ½ (a_i − ŷ_i)², the lecture's cost; nn.MSELoss is 2/m of it for m outputs.

    prediction and target (…, n_L) → scalar. Raises InputError as `functional.quadratic_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.quadratic_loss(input, target)


class MSELoss(nn.MSELoss):
    """(a − ŷ)², its mean or sum: torch.nn.MSELoss, without its silent broadcast."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """softplus(z) − ŷ z, δ = σ(z) − ŷ: torch.nn.BCEWithLogitsLoss and its arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """−log softmax(z)_class, δ = softmax(z) − onehot: torch.nn.CrossEntropyLoss and its arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MLP(nn.Sequential):
    """A multi-layer perceptron of fused layers: sizes [n_1, …, n_L], input (…, n_1) → prediction (…, n_L).

    activation: a name or an activation module, or a list with one for each hidden layer; output_activation likewise.
    dropout: its probability after each hidden layer. Layers carry the keys of
    nn.Sequential(nn.Linear, activation, nn.Linear, …): 0.weight, 2.weight, …, so state_dicts go both ways; a dropout
    sits under the odd key after its layer and shifts none.
    Raises InputError for fewer than two sizes, a size below 1, an unknown activation, or a list of the wrong length.
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
    ) -> None:
        super().__init__()
        self.sizes = _checked_sizes(sizes)
        activations = [*_one_per_hidden_layer(activation, len(self.sizes) - 2), output_activation]
        if not 0 <= dropout <= 1:
            raise InputError(f"expected a dropout probability between 0 and 1; got {dropout}")
        for index, (n_in, n_out, G) in enumerate(zip(self.sizes, self.sizes[1:], activations, strict=False)):
            layer = AffineActivation(n_in, n_out, G, bias, device, dtype)
            self.add_module(str(2 * index), layer)
            if dropout > 0 and index < len(activations) - 1:
                self.add_module(str(2 * index + 1), Dropout(dropout))

    def __getitem__(self, index: Any) -> Any:
        """Return a layer; for a slice, an nn.Sequential of those layers, under their keys."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str], map_location: Any = "cpu") -> "MLP":
        """Return the net of a checkpoint that train.py wrote, for any `backprop`, in evaluation mode.

        It takes features as it was trained on them: standardised ones, if data.standardise was on
        (`mm.Predictor` standardises them itself). Raises InputError as `read_checkpoint`.
        """
        content = read_checkpoint(path, map_location)
        values: dict[str, Any] = content["hyper_parameters"]
        prefix = "net."
        parameters = {
            key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)
        }
        try:
            dtype, device = next((tensor.dtype, tensor.device) for tensor in parameters.values())
            mlp = cls(
                [values["input_size"], *values["hidden"], values["output_size"]],
                **{key: values[key] for key in ("activation", "output_activation", "bias", "dropout")},
                device=device,
                dtype=dtype,
            )
            mlp.load_state_dict(parameters)
        except (StopIteration, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it has no parameters"
            raise InputError(f"expected the parameters of an MLP in {path}, but {reason}; take another one") from error
        return mlp.eval()

    def to_torch(self) -> nn.Sequential:
        """Return the net in torch's own layers, nn.Linear, nn.Sigmoid, …: same keys, the same tensors as parameters."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for key, layer in self.named_children():
            if isinstance(layer, AffineActivation):
                layers[key], layers[str(int(key) + 1)] = _in_torch(layer)
            elif isinstance(layer, Dropout):  # under the key of its activation, so that later keys don't shift
                layers[key] = nn.Sequential(layers[key], nn.Dropout(layer.p))
        return nn.Sequential(layers).train(self.training)


def _in_torch(layer: AffineActivation) -> tuple[nn.Linear, nn.Module]:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias  # type: ignore[assignment]
    return linear, layer.row.twin()


def _checked_sizes(sizes: Sequence[int]) -> list[int]:
    if not hasattr(sizes, "__len__") or isinstance(sizes, str) or len(sizes) < 2:
        raise InputError(
            f"expected at least two sizes, of the input and the output, such as [784, 30, 10]; got {sizes}"
        )
    return [_size(f"sizes[{index}]", size) for index, size in enumerate(sizes)]


def _one_per_hidden_layer(
    activation: str | nn.Module | Sequence[str | nn.Module], hidden: int
) -> list[str | nn.Module]:
    if isinstance(activation, list | tuple):
        if len(activation) != hidden:
            raise InputError(
                f"expected one activation for each of the {hidden} hidden layers; got {len(activation)}: {activation}"
            )
        return list(activation)
    activation_row(activation)  # type: ignore[arg-type] # refused here, in its words, even without a hidden layer
    return [activation] * hidden  # type: ignore[list-item]
