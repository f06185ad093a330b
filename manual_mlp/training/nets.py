"""What `backprop` chooses between: the same net and cost, differentiated by hand or by torch's autograd."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp.errors import InputError

T = TypeVar("T")

TORCH_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


class TorchQuadraticLoss(nn.Module):
    """The quadratic cost (1/N) Σ_N Σ_i ½ (a_i − ŷ_i)² as torch operations, for autograd to differentiate."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(prediction, target, reduction="sum") / (2 * len(prediction))


def torch_mlp(
    sizes: list[int], activation: str | list[str], output_activation: str, bias: bool = True, dropout: float = 0.0
) -> nn.Sequential:
    """The twin of `manual_mlp.MLP` in torch's own layers: same arguments, same state_dict keys, same initial bits."""
    mm.MLP(sizes, activation, output_activation, bias, dropout, device="meta")  # refuses what is to be refused
    hidden = [activation] * (len(sizes) - 2) if isinstance(activation, str) else list(activation)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, name in enumerate([*hidden, output_activation]):
        layers[str(2 * index)] = nn.Linear(sizes[index], sizes[index + 1], bias=bias)
        function = choose(name, TORCH_ACTIVATIONS, "activation")()
        drops = dropout > 0 and index < len(hidden)  # shares the key of its activation, so later keys don't shift
        layers[str(2 * index + 1)] = nn.Sequential(function, nn.Dropout(dropout)) if drops else function
    return nn.Sequential(layers)


NETS: dict[str, Callable[..., nn.Module]] = {"layers": mm.MLP, "autograd": torch_mlp}
COSTS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "layers": {
        "quadratic": mm.QuadraticLoss,
        "mse": mm.MSELoss,
        "bce": mm.BCEWithLogitsLoss,
        "cross_entropy": mm.CrossEntropyLoss,
    },
    "autograd": {
        "quadratic": TorchQuadraticLoss,
        "mse": nn.MSELoss,
        "bce": nn.BCEWithLogitsLoss,
        "cross_entropy": nn.CrossEntropyLoss,
    },
}
LOGIT_COSTS = ("bce", "cross_entropy")


def _glorot(parameter: Tensor) -> None:
    if parameter.ndim == 2:
        nn.init.xavier_uniform_(parameter)
    else:
        nn.init.zeros_(parameter)


def _keep(parameter: Tensor) -> None:
    """torch's own initialisation, which the layers have made already."""


INITIALISATIONS: dict[str, Callable[[Tensor], object]] = {
    "torch": _keep,
    "glorot": _glorot,  # weights uniform with variance 2 / (fan in + fan out), biases 0
    "nielsen": nn.init.normal_,  # weights and biases from N(0, 1)
}


def build_net(backprop: str, initialisation: str, **arguments: object) -> nn.Module:
    """The net for `backprop`, with initialised parameters. Raises InputError for a name that is not known."""
    initialise = choose(initialisation, INITIALISATIONS, "model.initialisation")
    net = choose(backprop, NETS, "backprop")(**arguments)
    for parameter in net.parameters():
        initialise(parameter)
    return net


def build_cost(backprop: str, loss: str) -> nn.Module:
    """The cost for `backprop`. Raises InputError for a name that is not known."""
    return choose(loss, choose(backprop, COSTS, "backprop"), "model.loss")()


def choose(name: str, known: dict[str, T], option: str) -> T:
    """known[name], or an InputError that lists what is known."""
    if name not in known:
        raise InputError(f"expected {option} to be one of {', '.join(known)}, but got {name!r}; correct it")
    return known[name]
