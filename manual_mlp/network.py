"""The whole net at once: its layers, the δ recursion over them (steps 1 to 4), and net and cost as one Function.

`layers_of(model)` reads a model as a list of layers. `network_loss(model, input, target)` is one node of autograd: its
gradients work in any optimizer, in DistributedDataParallel, with clipping and accumulation. Of small batches it takes
steps 1 to 4 at once, in forward, in buffers that are kept; of others it saves for backward what steps 2 to 4 read and
nothing else: of silu and gelu z alone, from which a is recomputed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manual_mlp import formulas as sheet
from manual_mlp import functional, functions, kernels, modules
from manual_mlp.errors import InputError
from manual_mlp.formulas import Row
from manual_mlp.layers import Layer, Weighed, cost_of, hooks_of, layers_of, weigh
from manual_mlp.plan import SHAPE, Plan

# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 4, out of place
# ---------------------------------------------------------------------------------------------------------------------

_PLANS = 4  # kinds of batches whose buffers are kept for a model
_KEPT = 1 << 21  # numbers that all a^l of a batch have at most, if its buffers are kept

# Inside a Function autograd keeps no books, but its kernels are passed all the same: 3 µs of a pass over two layers.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)

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
        self.steps = [_step(layer.row) for layer in self.layers]
        self.owners = [layer.affine._parameters for layer in self.layers]
        # The kind of the last batch that was checked, its weights, and whether it has a plan.
        self.accepted: tuple[object, Any, bool] = None, None, False
        self.plans: dict[object, GradientPlan] = {}
        self.drops = any(layer.dropout is not None for layer in self.layers)
        # What is kept for a model must not keep the model itself, but what it is made of.
        self.children = tuple(model._modules.values())
        everything = list(model.modules())
        self.parents = [m._modules for m in everything if m._modules or isinstance(m, nn.Sequential)]
        self.modules = self._modules_now()
        self.hooks = [hooks for module in everything for hooks in hooks_of(module)]
        kinds = modules.ACTIVATION_MODULES
        self.adjustable = [m for m in everything if type(m) in kinds and hasattr(m, "__constants__")]
        self.rows = [modules.activation_row(module) for module in self.adjustable]

    def changed(self) -> bool:
        """Whether the model has other layers than it had, other activations, or hooks."""
        if any(self.hooks) or self._modules_now() != self.modules:
            return True
        return bool(self.adjustable) and [modules.activation_row(module) for module in self.adjustable] != self.rows

    def _modules_now(self) -> list[Any]:
        """All children in one list, after how many of them each parent has."""
        return [*map(len, self.parents), *chain.from_iterable(map(dict.values, self.parents))]

    def at_once(
        self, key: Any, weighed: Weighed, target: Tensor, x: Tensor, parameters: Some, predictions: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """C and the gradients by the plan for such batches. Other threads make one of their own in the meantime."""
        n = len(self.steps)
        weights, biases = parameters[:n], parameters[n:]
        plan = self.plans.pop(key, None)
        if plan is None or list(map(SHAPE, weights)) != plan.shapes:
            for oldest in list(self.plans)[: len(self.plans) + 1 - _PLANS]:
                self.plans.pop(oldest, None)
            with torch.inference_mode(False):  # a backward may run in inference mode, and later ones outside
                plan = GradientPlan(weighed, self, x, weights, key[1])
        with _below_autograd():
            result = plan.run(x, target, weights, biases, predictions)
        if type(plan.cost) is Tensor:  # not made under a mode in which all tensors are fake
            self.plans[key] = plan
        return result

    def forward(
        self, x: Tensor, weights: Some, biases: Some, masks: Masks, zs: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Step 1: a or z of each layer, whichever its row saves, and the prediction a^L; each z goes to `zs`."""
        a, saved, in_place = x, [], zs is None and not torch.is_grad_enabled()
        for layer, (G, G_, _, _, saves_z) in enumerate(self.steps):
            z = sheet.affine(a, weights[layer], biases[layer])
            a = G_(z) if in_place and not saves_z else G(z)
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
        in_place = not torch.is_grad_enabled() and delta.dtype not in kernels.ROUNDED and kernels.plain(delta)
        gradients: list[Tensor | None] = [None] * len(needs)
        lowest = _lowest(needs, n)
        for layer in range(n - 1, lowest - 1, -1):
            if masks:
                delta = _dropped(delta, masks[layer])
            _, _, delta_of, delta_, _ = self.steps[layer]
            if in_place and delta_ is not None:
                work, mask = torch.empty_like(delta), torch.empty_like(delta, dtype=torch.bool)
                delta_(delta, saved[layer], None, work, mask)
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


def _lowest(needs: Sequence[bool], n: int) -> int:
    """The layer down to which δ goes, of n layers; needs: of x, all W^l and all b^l."""
    return 0 if needs[0] else min((i - 1) % n for i, needed in enumerate(needs) if needed)


def _step(row: Row) -> tuple[Any, ...]:
    values = row.values

    def bound(formula: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *args, **out: formula(*args, *values, **out)) if values else formula

    G_, delta_ = map(bound, kernels.in_place(row))
    G, delta = bound(kernels.G(row)), bound(kernels.delta(row))
    return G, G_, delta, delta_ if row.saves == "a" else None, row.saves == "z"


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


class GradientPlan(Plan):
    """Steps 1 to 4 in kept buffers; the gradients alone are new tensors. On the CPU, for rows that save a.

    It is of shapes alone: the parameters are read at each run, and neither they nor views of them are kept.
    """

    def __init__(self, weighed: Weighed, net: Net, x: Tensor, weights: Some, needs: Sequence[bool]) -> None:
        cost, self.total_weight, self.delta_weight = weighed
        super().__init__(net.layers, cost, x)
        self.shapes = list(map(SHAPE, weights))
        n, before = len(weights), [None, *self.stages[:-1]]
        self.up, down = [], []
        lowest = _lowest(needs, n)
        for layer, (stage, one_before) in enumerate(zip(self.stages, before, strict=True)):
            activate = step_2 = None
            if stage.row.name != "identity":
                G_, delta_ = kernels.in_place(stage.row)
                activate = partial(G_, stage.a, *stage.row.values)
                step_2 = partial(delta_, stage.delta, stage.a, None, stage.work, stage.mask, *stage.row.values)
            a, into = (None, None) if one_before is None else (one_before.a, one_before.delta)
            z_t = stage.z.t() if stage.by_columns else None
            self.up.append((stage.z, z_t, None if a is None else a.t(), activate, stage.a))
            places = (1 + layer) * needs[1 + layer], (1 + n + layer) * needs[1 + n + layer]  # 0 where not needed
            down.append((layer, step_2, stage.delta, stage.delta_t, into if layer > lowest else None, a, *places))
        self.down = down[lowest:][::-1]
        self.nothing: list[Tensor | None] = [None] * len(needs)
        self.last_delta = self.stages[0].delta if needs[0] else None

    def run(
        self, x: Tensor, target: Tensor, weights: Some, biases: Some, predictions: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """C, and ∂C/∂x, all ∂C/∂W^l and all ∂C/∂b^l, None where not needed."""
        a, ones, gradients = x, self.ones, self.nothing.copy()
        for (z, z_t, a_t, activate, after), weight, bias in zip(self.up, weights, biases, strict=True):
            if z_t is None:
                kernels.affine_(a, weight, bias, z)
            else:
                kernels.affine_by_columns_(x.t() if a_t is None else a_t, weight, bias, z_t)
            if activate is not None:
                activate()
            a = after
        if self.copied:
            self.prediction.copy_(a)
        if predictions is not None:  # step 2 overwrites it
            predictions.append(self.prediction.clone(memory_format=torch.contiguous_format))
        self.cost_(self.prediction, target, self.out)
        self.delta.mul_(self.delta_weight)
        if self.copied:
            self.stages[-1].delta.copy_(self.delta)
        for layer, step_2, delta, delta_t, into, a_before, of_weight, of_bias in self.down:
            if step_2 is not None:
                step_2()
            if into is not None:
                torch.mm(delta, weights[layer], out=into)
            if of_weight:
                gradients[of_weight] = torch.mm(delta_t, x if a_before is None else a_before)
            if of_bias:
                gradients[of_bias] = torch.mv(delta_t, ones)
        if self.last_delta is not None:
            gradients[0] = torch.mm(self.last_delta, weights[0])
        return self.cost * self.total_weight, gradients


class NetworkCost(functions.ManualFunction):
    """C of a whole net as one node.  target, x (N, n_1), then all W^l and all b^l (or None) → scalar C.

    a^L (N, n_L) is put into the list `predictions`, without a history; as a second output it would cost more.

    A kind of batch with a plan takes all steps at once, and holds the gradients until backward, for which they are
    multiplied by g. Others save target, x, parameters, the masks, the prediction, and a or z of each layer. A second
    derivative is taken of the same recursion, its activations computed again from x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: Net,
        kind: object,
        weighed: Weighed,
        masks: Masks,
        predictions: list[Tensor] | None,
        target: Tensor,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        n, needs = len(net.steps), ctx.needs_input_grad[6:]
        if kind is not None and any(needs):
            ctx.of = net, weighed, (), (plan := (kind, needs))
            ctx.save_for_backward(target, x, *parameters)
            cost, ctx.gradients = net.at_once(plan, weighed, target, x, parameters, predictions)
            return cost
        saved = net.forward(x, parameters[:n], parameters[n:], masks)
        drawn, keeps = zip(*(mask or (None, None) for mask in masks), strict=True) if masks else ((), ())
        ctx.of = net, weighed, keeps, None
        ctx.save_for_backward(target, x, *parameters, *drawn, *saved)
        if predictions is not None:
            predictions.append(saved[-1])
        row, total_weight, _ = weighed
        return kernels.cost_kernel(row).total(saved[-1], target) * total_weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        net, weighed, keeps, plan = ctx.of
        target, x, *saved = ctx.saved_tensors  # which refuses what has changed since, or is gone
        if plan is not None and kernels.plain(g):
            gradients, ctx.gradients = ctx.gradients, None  # given away, they become .grad without a copy
            if gradients is None:  # a second time
                _, gradients = net.at_once(plan, weighed, target, x, saved, None)
            return *(None,) * 6, *_times(gradients, g)
        n = len(net.steps)
        masks: Masks = []
        weights, biases, saved = saved[:n], saved[n : 2 * n], saved[2 * n :]
        if keeps:
            masks = [None if mask is None else (mask, keep) for mask, keep in zip(saved, keeps, strict=False)]
            saved = saved[n:]
        if torch.is_grad_enabled() or not saved:  # create_graph: what was saved has no history
            saved = net.forward(x, weights, biases, masks)
        cost, _, delta_weight = weighed
        delta = kernels.cost_kernel(cost).delta(saved[-1], target) * (g * delta_weight)
        return *(None,) * 6, *net.recursion(delta, x, weights, saved, masks, ctx.needs_input_grad[6:])


def _times(gradients: list[Tensor | None], g: Tensor) -> list[Tensor | None]:
    if g.item() != 1:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(g)
    return gradients


def network_loss(model: nn.Module, input: Tensor, target: Tensor, loss: str = "quadratic") -> Tensor:
    """C of the model's prediction, the whole net and its cost as one node of the graph.

    input (N, n_1), target (N, n_L), or class indices (N,) for "cross_entropy" → scalar, as
    `functional.COSTS[loss](model(input), target)`: which it is under autocast, a compiler or a transform, with a
    target that requires a gradient, and on tensors of other dimensions.
    Without dropout, on the CPU, where every activation saves a, a batch whose layers together have at most 2 million
    numbers takes steps 1 to 4 in the forward pass: between the passes lie the gradients, as large as the parameters,
    and with the model stay buffers for the last 4 kinds of batches. A cost without a gradient is had by torch.no_grad.
    Raises InputError as `layers_of`, for an unknown loss, a logits cost after an activation, and as the loss itself.
    """
    return _cost(model, input, target, loss, None)


def cost_and_prediction(model: nn.Module, input: Tensor, target: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """`network_loss`, and the prediction a^L (N, n_L) that it came from, without a history."""
    predictions: list[Tensor] = []
    cost = _cost(model, input, target, loss, predictions)
    return cost, predictions[0]


def _cost(model: nn.Module, input: Tensor, target: Tensor, loss: str, predictions: list[Tensor] | None) -> Tensor:
    net = net_of(model)
    try:
        weights, biases = [owner["weight"] for owner in net.owners], [owner["bias"] for owner in net.owners]
    except KeyError:
        layers_of(model)  # a parametrization is refused by name
        raise
    try:
        last = weights[-1]
        kind = (
            *(type(input), input.shape, input.dtype, input.device),
            *(type(target), target.shape, target.dtype),
            *(type(last), last.shape, loss),
        )
        special = kernels.transforming() or torch.compiler.is_compiling() or target.requires_grad or input.dim() != 2
    except AttributeError:
        functional.check_tensors(input=input, target=target)
        raise
    if special or functional.autocasting(input):
        cost_of(loss, net.layers)
        prediction = model(input)
        if predictions is not None:
            predictions.append(prediction.detach())
        return functional.COSTS[loss](prediction, target)
    accepted, weighed, planned = net.accepted
    if kind != accepted:
        row = cost_of(loss, net.layers)
        check_batch(weights[0], len(last), input, target, loss)
        weighed = weigh(row, len(input), len(last), input.dtype)
        planned = has_plan(net, input, target)
        if type(weighed[1]) in (Tensor, float):  # as in `at_once`
            net.accepted = kind, weighed, planned
    masks = draw_masks(net.layers, input) if net.drops else []
    plan_of = kind if planned and torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else None
    try:
        return NetworkCost.direct(net, plan_of, weighed, masks, predictions, target, input, *weights, *biases)
    except (IndexError, RuntimeError):
        check_batch(weights[0], len(last), input, target, loss)
        check_labels(len(last), target, loss)
        raise


def has_plan(net: Net, input: Tensor, target: Tensor) -> bool:
    """Whether such batches are worth buffers that are kept: large ones would gain little time and hold much memory.

    Not of half precision, whose small δ a scaled g keeps from 0; nor of rows that save z, whose a takes memory too.
    """
    tensors = [input, target, *(p for of in net.owners for p in (of["weight"], of["bias"]) if p is not None)]
    if (
        not net.children
        or net.drops
        or any(saves_z for *_, saves_z in net.steps)
        or input.dtype not in (torch.float32, torch.float64)
    ):
        return False
    if any(type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu for tensor in tensors):
        return False
    return 0 < len(input) * sum(layer.weight.shape[0] for layer in net.layers) <= _KEPT


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
