"""Nets and their initial parameters, by the names that a config gives."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from manual_mlp import formulas
from manual_mlp.errors import InputError

T = TypeVar("T")


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


def build_net(make_net: Callable[..., nn.Module], initialisation: str, **arguments: object) -> nn.Module:
    """make_net(**arguments), its parameters initialised. Raises InputError for a name that is not known."""
    initialise = choose(initialisation, INITIALISATIONS, "model.initialisation")
    net = make_net(**arguments)
    for parameter in net.parameters():
        initialise(parameter)
    return net


def choose(name: str, known: Mapping[str, T], option: str) -> T:
    """known[name], or an InputError that lists what is known."""
    if name not in known:
        raise InputError(f"expected {option} to be one of {', '.join(known)}, but got {name!r}; correct it")
    return known[name]
