"""What `backprop` chooses between: the same net and cost, differentiated by hand or by torch's autograd."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp import formulas, functional
from manual_mlp.errors import InputError

T = TypeVar("T")


def torch_quadratic_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The quadratic cost (1/N) Σ_N Σ_i ½ (a_i − ŷ_i)² as torch operations, for autograd to differentiate."""
    return nn.functional.mse_loss(prediction, target, reduction="sum") / (2 * len(prediction))


def torch_mlp(
    sizes: list[int], activation: str | list[str], output_activation: str, bias: bool = True, dropout: float = 0.0
) -> nn.Sequential:
    """The twin of `manual_mlp.MLP` in torch's own layers: same arguments, same state_dict keys, same initial bits."""
    return mm.MLP(sizes, activation, output_activation, bias, dropout).to_torch()


NETS: dict[str, Callable[..., nn.Module]] = {"layers": mm.MLP, "autograd": torch_mlp}
COSTS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "layers": functional.COSTS,
    "autograd": {
        "quadratic": torch_quadratic_loss,
        "mse": nn.functional.mse_loss,
        "bce": nn.functional.binary_cross_entropy_with_logits,
        "cross_entropy": nn.functional.cross_entropy,
    },
}
LOGIT_COSTS = [name for name, cost in formulas.COSTS.items() if cost.logits]


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


def choose_cost(backprop: str, loss: str) -> Callable[..., Tensor]:
    """The cost for `backprop`: (prediction, target) ↦ scalar. Raises InputError for a name that is not known."""
    return choose(loss, choose(backprop, COSTS, "backprop"), "model.loss")


def choose(name: str, known: Mapping[str, T], option: str) -> T:
    """known[name], or an InputError that lists what is known."""
    if name not in known:
        raise InputError(f"expected {option} to be one of {', '.join(known)}, but got {name!r}; correct it")
    return known[name]
