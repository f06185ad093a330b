"""The whole net at once: its layers, the δ recursion over them (steps 1 to 4), and net and cost as one Function.

`layers_of(model)` reads a model as a list of layers. `network_loss(model, input, target)` is one node of autograd: its
gradients work in any optimizer, in DistributedDataParallel, with clipping and accumulation. It saves for backward what
steps 2 to 4 read and nothing else: of silu and gelu z alone, from which a is recomputed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manual_mlp import formulas as sheet
from manual_mlp import functional, functions, modules
from manual_mlp.errors import InputError
from manual_mlp.formulas import COSTS, Activation, Cost


@dataclass
class Layer:
    """z^{l+1} = a^l W^lᵀ + b^l, a^{l+1} = G(z^{l+1}), and the dropout that follows it, if any.

    affine      the module that owns W^l (n_{l+1}, n_l) and b^l (n_{l+1},) or None
    row, parameters   the activation's row of the sheet and the values of its parameters
    """

    affine: Any
    row: Activation = sheet.ACTIVATIONS["identity"]
    parameters: tuple[float, ...] = ()
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
    if any(_hooks(module)):
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


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _read(layers: list[Layer], name: str, module: nn.Module) -> None:
    """Append a layer, or complete the last one with an activation or a dropout."""
    kind, last = type(module), layers[-1] if layers else None
    if kind in _AFFINE:
        layers.append(Layer(module))
    elif isinstance(module, modules.AffineActivation) and kind is modules.AffineActivation:
        row = sheet.ACTIVATIONS[module.activation]
        layers.append(Layer(module, row, module.parameter_values, activated=True))
    elif kind in (nn.Identity, modules.Identity):
        pass
    elif kind in modules.ACTIVATION_MODULES and last is not None and not last.activated and last.dropout is None:
        last.row, last.parameters = modules.activation_row(module)
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


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 4, out of place
# ---------------------------------------------------------------------------------------------------------------------


Some = Sequence[Any]
Masks = list[tuple[Tensor, float] | None]
"""Of the dropout after each layer: m and 1 − p, or None where none is drawn; empty if there are none at all."""


class Net:
    """A model as the recursion needs it, beside its parameters: layer l leads from a^l to a^{l+1}, counted from 0 here.

    steps   of each layer: G, G_, delta, delta_ for a row that saves a, the row's parameters, and whether z is saved
    owners  of each layer: the _parameters of the module that owns W^l and b^l
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = layers_of(model)
        self.steps = [_step(layer.row, layer.parameters) for layer in self.layers]
        self.owners = [layer.affine._parameters for layer in self.layers]
        self.drops = any(layer.dropout is not None for layer in self.layers)
        # What is kept for a model must not keep the model itself, but what it is made of.
        self.children = tuple(model._modules.values())
        everything = list(model.modules())
        self.parents = [module._modules for module in everything if module._modules]
        self.modules = [tuple(of.values()) for of in self.parents]
        self.hooks = [hooks for module in everything for hooks in _hooks(module)]
        kinds = modules.ACTIVATION_MODULES
        self.adjustable = [m for m in everything if type(m) in kinds and hasattr(m, "__constants__")]
        self.rows = [modules.activation_row(module) for module in self.adjustable]

    def changed(self) -> bool:
        """Whether the model has other layers than it had, other activations, or hooks."""
        return (
            any(self.hooks)
            or [tuple(of.values()) for of in self.parents] != self.modules
            or [modules.activation_row(module) for module in self.adjustable] != self.rows
        )

    def forward(
        self, x: Tensor, weights: Some, biases: Some, masks: Masks, zs: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Step 1: a or z of each layer, whichever its row saves, and the prediction a^L; each z goes to `zs`."""
        a, saved, keeps_z = x, [], torch.is_grad_enabled() or zs is not None
        for layer, (G, G_, _, _, parameters, saves_z) in enumerate(self.steps):
            z = sheet.affine(a, weights[layer], biases[layer])
            a = G(z, *parameters) if saves_z or keeps_z else G_(z, *parameters, out=z)
            if zs is not None:
                zs.append(z)
            saved.append(z if saves_z else a)
            if masks:
                a = _dropped(a, masks[layer])
        return [*saved, a]

    def input_of(self, layer: int, x: Tensor, saved: Some, masks: Masks) -> Tensor:
        """a^l as the layer reads it, after G and dropout, from what was saved."""
        if layer == 0:
            return x
        G, _, _, _, parameters, saves_z = self.steps[layer - 1]
        a = G(saved[layer - 1], *parameters) if saves_z else saved[layer - 1]
        return _dropped(a, masks[layer - 1]) if masks else a

    def recursion(
        self,
        delta: Tensor,
        x: Tensor,
        weights: Some,
        saved: Some,
        masks: Masks,
        needs: Sequence[bool],
        deltas: list[Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Steps 2 to 4 from delta = ∂C/∂a^L, overwritten: ∂C/∂x, all ∂C/∂W^l and all ∂C/∂b^l, None where not needed.

        Each δ^l goes to `deltas`, from right to left.
        """
        n = len(self.steps)
        in_place = not torch.is_grad_enabled() and delta.dtype not in sheet.ROUNDED
        gradients: list[Tensor | None] = [None] * len(needs)
        lowest = 0 if needs[0] else min((i - 1) % n for i, needed in enumerate(needs) if needed)
        for layer in range(n - 1, lowest - 1, -1):
            if masks:
                delta = _dropped(delta, masks[layer])
            _, _, delta_of, delta_, parameters, _ = self.steps[layer]
            if in_place and delta_ is not None:
                delta_(delta, saved[layer], None, None, None, *parameters)
            else:
                delta = delta_of(delta, saved[layer], *parameters)
            if deltas is not None:
                deltas.append(delta)
            if needs[1 + layer]:
                gradients[1 + layer] = sheet.grad_weight(delta, self.input_of(layer, x, saved, masks))
            if needs[1 + n + layer]:
                gradients[1 + n + layer] = sheet.grad_bias(delta)
            if layer > lowest or needs[0]:
                delta = sheet.grad_input(delta, weights[layer])
        gradients[0] = delta if needs[0] else None
        return tuple(gradients)


def _step(row: Activation, parameters: tuple[float, ...]) -> tuple[Any, ...]:
    G_, delta_ = sheet.in_place(row)
    return row.G, G_, row.delta, delta_ if row.saves == "a" else None, parameters, row.saves == "z"


_NETS: WeakKeyDictionary[nn.Module, Net] = WeakKeyDictionary()


def net_of(model: nn.Module) -> Net:
    """The model as a Net, read again only after a change. Raises InputError as `layers_of`, and for no module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model, an mm.MLP or an nn.Sequential; got {type(model).__name__}")
    net = _NETS.get(model)
    if net is None or net.changed():
        net = Net(model)
        if net.children:  # a lone layer would be kept by what is kept for it
            _NETS[model] = net
    return net


def _dropped(a: Tensor, mask: tuple[Tensor, float] | None) -> Tensor:
    return a if mask is None else sheet.dropout(a, *mask)


class NetworkCost(functions.ManualFunction):
    """C of a whole net as one node.  x (N, n_1), target, then all W^l and all b^l (or None) → scalar C, a^L (N, n_L).

    Only C has a derivative; a^L is there to be looked at.

    Saves x, target, parameters, the masks, the prediction, and a or z of each layer. A second derivative is taken of
    the same recursion, recorded, its activations computed again from x.
    """

    @staticmethod
    def forward(
        ctx: Any, net: Net, cost: Cost, masks: Masks, x: Tensor, target: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        n = len(net.steps)
        saved = net.forward(x, parameters[:n], parameters[n:], masks)
        ctx.net, ctx.cost, ctx.keeps = net, cost, [None if mask is None else mask[1] for mask in masks]
        ctx.save_for_backward(x, target, *parameters, *(None if mask is None else mask[0] for mask in masks), *saved)
        prediction = saved[-1]
        ctx.mark_non_differentiable(prediction)
        ctx.set_materialize_grads(False)
        return cost.total(prediction, target) * cost.total_weight(*prediction.shape), prediction

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:  # nothing depends on C
            return (None,) * len(ctx.needs_input_grad)
        net: Net = ctx.net
        n = len(net.steps)
        x, target, *tensors = ctx.saved_tensors
        weights, biases, tensors = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        masks: Masks = [None if keep is None else (mask, keep) for mask, keep in zip(tensors, ctx.keeps, strict=False)]
        saved = tensors[len(masks) :]
        if torch.is_grad_enabled():  # create_graph: what was saved has no history
            saved = net.forward(x, weights, biases, masks)
        prediction = saved[-1]
        delta = ctx.cost.delta(prediction, target) * (g * ctx.cost.delta_weight(*prediction.shape))
        _, _, _, needs_x, _, *needs = ctx.needs_input_grad
        grad_x, *gradients = net.recursion(delta, x, weights, saved, masks, (needs_x, *needs))
        return None, None, None, grad_x, None, *gradients


def network_loss(model: nn.Module, input: Tensor, target: Tensor, loss: str = "quadratic") -> Tensor:
    """C of the model's prediction, the whole net and its cost as one node of the graph.

    input (N, n_1), target (N, n_L), or class indices (N,) for "cross_entropy" → scalar, as
    `functional.COSTS[loss](model(input), target)`: which it is under autocast, a compiler or a transform, with a
    target that requires a gradient, and on tensors of other dimensions.
    Raises InputError as `layers_of`, for an unknown loss, a logits cost after an activation, and as the loss itself.
    """
    return cost_and_prediction(model, input, target, loss)[0]


def cost_and_prediction(model: nn.Module, input: Tensor, target: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """`network_loss`, and the prediction a^L (N, n_L) that it came from, without a history."""
    net = net_of(model)
    cost = cost_of(loss, net.layers)
    functional.check_tensors(input=input, target=target)
    special = functions.transforming() or torch.compiler.is_compiling() or target.requires_grad or input.dim() != 2
    if special or functional.autocasting(input):
        prediction = model(input)
        return functional.COSTS[loss](prediction, target), prediction.detach()
    weights, biases = [owner["weight"] for owner in net.owners], [owner["bias"] for owner in net.owners]
    check_batch(weights[0], weights[-1].shape[0], input, target, loss)
    masks = draw_masks(net.layers, input) if net.drops else []
    return NetworkCost.direct(net, cost, masks, input, target, *weights, *biases)


def draw_masks(layers: list[Layer], input: Tensor) -> Masks:
    """The masks that functional.dropout draws, in the same order."""

    def mask(layer: Layer) -> tuple[Tensor, float] | None:
        if not layer.drops or layer.dropout is None:
            return None
        keep = 1 - layer.dropout.p
        shape = (input.shape[0], layer.weight.shape[0])
        return torch.empty(shape, dtype=torch.bool, device=input.device).bernoulli_(keep), keep or 1.0

    return [mask(layer) for layer in layers] if any(layer.drops for layer in layers) else []


def check_batch(weight: Tensor, outputs: int, input: Tensor, target: Tensor, loss: str) -> None:
    """Raises InputError for an input (N, n_1) or a target that the first W^l and the cost can't take."""
    if input.dim() != 2 or input.shape[1] != weight.shape[1]:
        raise InputError(f"expected an input of shape (N, {weight.shape[1]}); got {tuple(input.shape)}: .flatten(1) it")
    if input.dtype != weight.dtype or input.device != weight.device:
        raise InputError(
            f"expected an input of {weight.dtype} on {weight.device}, as the weights; "
            f"got {input.dtype} on {input.device}: call .to() on it"
        )
    if loss == "cross_entropy" and target.dim() == 1:
        fits = target.dtype == torch.int64 and target.shape == input.shape[:1]
    else:
        fits = target.dtype == input.dtype and target.shape == (input.shape[0], outputs)
    if not fits or target.device != input.device:
        indices = f", or class indices ({input.shape[0]},) of torch.int64" if loss == "cross_entropy" else ""
        raise InputError(
            f"expected a target of shape ({input.shape[0]}, {outputs}) and {input.dtype}{indices}, on {input.device}; "
            f"got {tuple(target.shape)} of {target.dtype} on {target.device}: reshape it, or call .to() on it"
        )


class NetworkLoss(nn.Module):
    """`network_loss` as a module: (input, target) ↦ C. The model stays a child, and can be called by itself."""

    def __init__(self, model: nn.Module, loss: str = "quadratic") -> None:
        super().__init__()
        cost_of(loss, net_of(model).layers)
        self.model, self.loss = model, loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return network_loss(self.model, input, target, self.loss)
