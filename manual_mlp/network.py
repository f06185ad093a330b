"""The whole net at once: its layers, the δ recursion over them (steps 1 to 4), and net and cost as one Function.

`layers_of(model)` reads a model as a list of layers. `network_loss(model, input, target)` is one node of autograd: its
gradients work in any optimizer, in DistributedDataParallel, with clipping and accumulation. It saves for backward what
steps 2 to 4 read and nothing else: of silu and gelu z alone, from which a is recomputed.
"""

from collections.abc import Callable, Iterator, Sequence
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

    steps   of each layer: G, G_, delta, delta_ for a row that saves a, and whether z is saved
    owners  of each layer: the _parameters of the module that owns W^l and b^l
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = layers_of(model)
        self.steps = [_step(layer.row, layer.parameters) for layer in self.layers]
        self.owners = [layer.affine._parameters for layer in self.layers]
        self.accepted: tuple[object, Any] = None, None  # the kind of the last batch that was checked, and its weights
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
        if any(self.hooks) or list(map(tuple, map(dict.values, self.parents))) != self.modules:
            return True
        return bool(self.adjustable) and [modules.activation_row(module) for module in self.adjustable] != self.rows

    def forward(
        self, x: Tensor, weights: Some, biases: Some, masks: Masks, zs: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Step 1: a or z of each layer, whichever its row saves, and the prediction a^L; each z goes to `zs`."""
        a, saved, in_place = x, [], zs is None and not torch.is_grad_enabled()
        for layer, (G, G_, _, _, saves_z) in enumerate(self.steps):
            z = sheet.affine(a, weights[layer], biases[layer])
            a = G_(z, out=z) if in_place and not saves_z else G(z)
            saved.append(z if saves_z else a)
            if zs is not None:
                zs.append(z)
            if masks:
                a = _dropped(a, masks[layer])
        if a is not saved[-1]:
            saved.append(a)
        return saved

    def input_of(self, layer: int, x: Tensor, saved: Some, masks: Masks) -> Tensor:
        """a^l as the layer reads it, after G and dropout, from what was saved."""
        if layer == 0:
            return x
        G, _, _, _, saves_z = self.steps[layer - 1]
        a = G(saved[layer - 1]) if saves_z else saved[layer - 1]
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
        lowest = 0 if needs[0] or needs[1] else min((i - 1) % n for i, needed in enumerate(needs) if needed)
        for layer in range(n - 1, lowest - 1, -1):
            if masks:
                delta = _dropped(delta, masks[layer])
            _, _, delta_of, delta_, _ = self.steps[layer]
            if in_place and delta_ is not None:
                delta_(delta, saved[layer], None, None, None)
            else:
                delta = delta_of(delta, saved[layer])
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
    def bound(formula: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *args, **out: formula(*args, *parameters, **out)) if parameters else formula

    G_, delta_ = map(bound, sheet.in_place(row))
    return bound(row.G), G_, bound(row.delta), delta_ if row.saves == "a" else None, row.saves == "z"


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


Weighed = tuple[Cost, Tensor | float, Tensor | float]
"""A cost, and for batches of one shape the weights of its sum and of its derivative."""


def weigh(cost: Cost, n: int, outputs: int, dtype: torch.dtype) -> Weighed:
    """Beside a tensor of less than 32 bits a number keeps its digits, and beside others a tensor is quicker."""
    weights = cost.total_weight(n, outputs), cost.delta_weight(n, outputs)
    if dtype in sheet.ROUNDED:
        return cost, *weights
    with torch.inference_mode(False):  # it may come from a validation, and is kept for the training
        total, delta = torch.tensor(weights, dtype=dtype, device="cpu").unbind()
    return cost, total, delta


class NetworkCost(functions.ManualFunction):
    """C of a whole net as one node.  target, x (N, n_1), then all W^l and all b^l (or None) → scalar C.

    a^L (N, n_L) is put into the list `predictions`, without a history; as a second output it would cost more.

    Saves target, x, parameters, the masks, the prediction, and a or z of each layer. A second derivative is taken of
    the same recursion, recorded, its activations computed again from x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: Net,
        weighed: Weighed,
        masks: Masks,
        predictions: list[Tensor],
        target: Tensor,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        n = len(net.steps)
        saved = net.forward(x, parameters[:n], parameters[n:], masks)
        drawn, keeps = zip(*(mask or (None, None) for mask in masks), strict=True) if masks else ((), ())
        ctx.of = net, weighed, keeps
        ctx.save_for_backward(target, x, *parameters, *drawn, *saved)
        predictions.append(saved[-1])
        cost, total_weight, _ = weighed
        return cost.total(saved[-1], target) * total_weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        net, (cost, _, delta_weight), keeps = ctx.of
        target, x, *saved = ctx.saved_tensors
        n = len(net.steps)
        masks: Masks = []
        weights, biases, saved = saved[:n], saved[n : 2 * n], saved[2 * n :]
        if keeps:
            masks = [None if mask is None else (mask, keep) for mask, keep in zip(saved, keeps, strict=False)]
            saved = saved[n:]
        if torch.is_grad_enabled():  # create_graph: what was saved has no history
            saved = net.forward(x, weights, biases, masks)
        delta = cost.delta(saved[-1], target) * (g * delta_weight)
        return *(None,) * 5, *net.recursion(delta, x, weights, saved, masks, ctx.needs_input_grad[5:])


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
    weights, biases = [owner["weight"] for owner in net.owners], [owner["bias"] for owner in net.owners]
    try:
        kind = type(input), input.shape, input.dtype, target.shape, target.dtype, weights[-1].shape, loss
        special = sheet.transforming() or torch.compiler.is_compiling() or target.requires_grad or input.dim() != 2
    except AttributeError:
        functional.check_tensors(input=input, target=target)
        raise
    if special or functional.autocasting(input):
        cost_of(loss, net.layers)
        prediction = model(input)
        return functional.COSTS[loss](prediction, target), prediction.detach()
    last, weighed = net.accepted
    if kind != last:
        row = cost_of(loss, net.layers)
        check_batch(weights[0], len(weights[-1]), input, target, loss)
        weighed = weigh(row, len(input), len(weights[-1]), input.dtype)
        net.accepted = kind, weighed
    masks = draw_masks(net.layers, input) if net.drops else []
    predictions: list[Tensor] = []
    try:
        cost = NetworkCost.direct(net, weighed, masks, predictions, target, input, *weights, *biases)
    except (IndexError, RuntimeError):
        check_batch(weights[0], len(weights[-1]), input, target, loss)
        check_labels(len(weights[-1]), target, loss)
        raise
    return cost, predictions[0]


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


def check_labels(classes: int, target: Tensor, loss: str) -> None:
    """Raises InputError for class labels out of range. On a GPU it waits for them."""
    if loss != "cross_entropy" or target.dim() != 1 or len(target) == 0:
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"expected class labels from 0 to {classes - 1}; got labels from {low} to {high}: "
            "renumber them, or leave out the rows to be ignored"
        )


class NetworkLoss(nn.Module):
    """`network_loss` as a module: (input, target) ↦ C. The model stays a child, and can be called by itself."""

    def __init__(self, model: nn.Module, loss: str = "quadratic") -> None:
        super().__init__()
        cost_of(loss, net_of(model).layers)
        self.model, self.loss = model, loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return network_loss(self.model, input, target, self.loss)
