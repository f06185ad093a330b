"""A model read as a list of layers, for the recursion over the whole net."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import formulas as sheet
from manual_mlp import kernels, modules
from manual_mlp.errors import InputError
from manual_mlp.formulas import COSTS, Cost, Row


@dataclass
class Layer:
    """z^{l+1} = a^l W^lᵀ + b^l, a^{l+1} = G(z^{l+1}), and the dropout that follows it, if any.

    affine      the module that owns W^l (n_{l+1}, n_l) and b^l (n_{l+1},) or None
    row         the activation's row of the sheet, with the values of its parameters
    """

    affine: Any
    row: Row = sheet.ACTIVATIONS["identity"]
    dropout: nn.Dropout | None = None
    activated: bool = field(default=False, repr=False)

    @property
    def weight(self) -> Tensor:
        return self.affine.weight

    @property
    def bias(self) -> Tensor | None:
        return self.affine.bias

    @property
    def drops(self) -> float:
        """The probability with which the dropout draws now, 0 for none."""
        return self.dropout.p if self.dropout is not None and self.dropout.training else 0.0


_AFFINE = (nn.Linear, modules.Affine)
_DROPOUT = (nn.Dropout, modules.Dropout)


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of an mm.MLP, or of an nn.Sequential (nested ones too) of affine maps, activations and dropouts.

    Each activation follows an affine map, each dropout an activation or an affine map. Raises InputError for anything
    else in it, for hooks, which would not be called, and for layers that don't fit each other.
    """
    layers: list[Layer] = []
    for name, module in _leaves(model, ""):
        _read(layers, name, module)
    if not layers:
        raise InputError("expected a net with at least one affine layer; got none: add an mm.Affine or an nn.Linear")
    for before, after in pairwise(layers):
        if before.weight.shape[0] != after.weight.shape[1]:
            raise InputError(
                f"expected a layer of in_features={before.weight.shape[0]} after {before.affine}; got {after.affine}"
            )
    return layers


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a nested nn.Sequential calls, in order, by qualified name."""
    if any(hooks_of(module)):
        raise InputError(f"expected layers without hooks, since none would be called; got one on {name!r}: remove it")
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    inherited = getattr(module, "plain", type(module))  # of a converted one, the class it was
    if inherited.forward is not nn.Sequential.forward or "forward" in vars(module):
        raise InputError(f"expected an nn.Sequential with its own forward; {name or 'the model'!r} has replaced it")
    for key, child in module._modules.items():
        assert child is not None
        yield from _leaves(child, f"{name}.{key}" if name else key)


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _read(layers: list[Layer], name: str, module: nn.Module) -> None:
    """Append a layer, or complete the last one with an activation or a dropout."""
    kind, last = type(module), layers[-1] if layers else None
    if kind in _AFFINE:
        layers.append(Layer(module))
    elif isinstance(module, modules.AffineActivation) and kind is modules.AffineActivation:
        layers.append(Layer(module, module.row, activated=True))
    elif kind in (nn.Identity, modules.Identity):
        pass
    elif kind in modules.ACTIVATION_MODULES and last is not None and not last.activated and last.dropout is None:
        last.row = modules.activation_row(module)
        last.activated = True
    elif isinstance(module, nn.Dropout) and kind in _DROPOUT and last is not None and last.dropout is None:
        last.dropout = module
    else:
        raise InputError(
            "expected affine maps, each with at most one activation and one dropout after it; "
            f"got {kind.__name__} at {name or 'the model itself'!r}: leave such a net to its layers and autograd"
        )


def cost_of(loss: str, layers: list[Layer]) -> Cost:
    """The row of a cost. Raises InputError for an unknown name, and for a logits cost after an activation."""
    if loss not in COSTS:
        raise InputError(f"expected a loss, one of {', '.join(COSTS)}; got {loss!r}")
    if COSTS[loss].logits and layers[-1].row.name != "identity":
        raise InputError(
            f"expected a net that gives logits, for the loss {loss!r}; got one that ends in {layers[-1].row.name}, "
            'which would train wrongly: take output_activation="identity"'
        )
    return COSTS[loss]


Weighed = tuple[Cost, Tensor | float, Tensor | float]
"""A cost, and for batches of one shape the weights of its sum and of its derivative."""


def weigh(cost: Cost, n: int, outputs: int, dtype: torch.dtype) -> Weighed:
    """Beside a tensor of less than 32 bits a number keeps its digits, and beside others a tensor is quicker."""
    weights = kernels.weights(cost, n, outputs)
    if dtype in kernels.ROUNDED:
        return cost, *weights
    with torch.inference_mode(False):  # it may come from a validation, and is kept for the training
        total, delta = torch.tensor(weights, dtype=dtype, device="cpu").unbind()
    return cost, total, delta
