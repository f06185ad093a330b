"""`network_loss`: a whole net and its cost as one node of autograd's graph.

Its gradients work in any optimizer, in DistributedDataParallel, with clipping and accumulation. For small batches it
takes steps 1 to 4 in the forward pass, in buffers that are kept (`plan.py`). For others it keeps what steps 2 to 4
read, and nothing else (`program.py`): for silu and gelu only z, from which it computes a again.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, repeat
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manual_mlp import checks, functional, functions, kernels
from manual_mlp.plan import Plan, Sink, Weighed, run, weigh
from manual_mlp.program import Add, Affine, Program, cost_of, read
from manual_mlp.snapshot import Snapshot

_PLANS = 4  # batch shapes whose buffers are kept for a model
_KEPT = 1 << 21  # numbers in all layers of a batch, beyond which its buffers are not kept

# Without this, torch's operators would pass autograd's dispatch although nothing is recorded: 3 µs for two layers.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


class Reading:
    """A model read as a program, with the plans for its last batch shapes.

    last_checked   the key of the last batch that was checked, the factors of its cost, and whether it gets a plan
    """

    def __init__(self, model: nn.Module, grids: bool = False) -> None:
        self.program, self.snapshot = read(model, grids), Snapshot(model)
        self.plans: dict[object, LossPlan] = {}
        self.last_checked: tuple[object, Any, bool] = None, None, False


_READINGS: WeakKeyDictionary[nn.Module, Reading] = WeakKeyDictionary()


def reading_of(model: nn.Module, grids: bool = False) -> Reading:
    """Return the model as it was read, read again after a change. Raises InputError as `program.read`."""
    reading = _READINGS.get(model) if isinstance(model, nn.Module) else None
    if reading is None or reading.snapshot.changed(model):
        reading = Reading(model, grids)
        if model._modules:  # a lone layer owns its parameters, so its reading would keep it alive
            _READINGS[model] = reading
    if reading.program.grids and not grids:
        read(model)  # which raises
    return reading


def parameters_of(model: nn.Module, program: Program) -> list[Any]:
    """Return the parameters of a model's program. Raises InputError for a weight that is no parameter any more."""
    try:
        return program.parameters()
    except KeyError:
        read(model, grids=True)
        raise


class LossPlan(Plan):
    """Steps 1 to 4 on buffers; the gradients are new tensors. It keeps neither the parameters nor views of them."""

    def __init__(self, program: Program, tensors: Sequence[Any], weighed: Weighed, needs: Sequence[bool]) -> None:
        cost, self.total_weight, self.delta_weight = weighed
        super().__init__(program, cost, tensors[0])
        self.shapes = _shapes(tensors)
        operands = [None if tensor is None else place for place, tensor in enumerate(tensors)]
        self.compile(operands, [Sink(place) if needed else None for place, needed in enumerate(needs)])
        self.nothing: list[Tensor | None] = [None] * len(needs)

    def gradients(
        self, tensors: Sequence[Any], target: Tensor, predictions: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return C, and the gradients of x and the parameters, None where not needed."""
        gradients = self.nothing.copy()
        run(self.up, tensors, gradients)
        if predictions is not None:  # step 2 may write over it
            predictions.append(self.prediction.clone(memory_format=torch.contiguous_format))
        self.both(self.prediction, target, self.out)
        self.delta.mul_(self.delta_weight)
        run(self.down, tensors, gradients)
        return self.cost * self.total_weight, gradients


def _shapes(tensors: Sequence[Any]) -> list[Any]:
    return [*map(getattr, tensors, repeat("shape"), repeat(None))]


def _at_once(
    reading: Reading, key: Any, weighed: Weighed, target: Tensor, tensors: Any, predictions: list[Tensor] | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return what the plan for such batches computes. While it runs, other threads make one of their own."""
    plan = reading.plans.pop(key, None)
    if plan is None or _shapes(tensors) != plan.shapes:
        for oldest in list(reading.plans)[: len(reading.plans) + 1 - _PLANS]:
            reading.plans.pop(oldest, None)
        with torch.inference_mode(False):  # a backward may run in inference mode, and later ones outside
            plan = LossPlan(reading.program, tensors, weighed, key[1])
    with _below_autograd():
        result = plan.gradients(tensors, target, predictions)
    if type(plan.cost) is Tensor:  # not a fake tensor, made while torch traces shapes
        reading.plans[key] = plan
    return result


class NetworkCost(functions.ManualFunction):
    """C of a whole net as one node.  target, x (N, n_1), then the parameters of all nodes → scalar C.

    It appends a^L (N, n_L) to the list `predictions`, without a history; a second output would cost more.

    A batch with a plan takes all steps at once, and holds the gradients until backward multiplies them by g. Any other
    saves target, x, the parameters, the masks and the slots that backward needs. For a second derivative it computes
    the slots again from x, because what was saved has no history.
    """

    @staticmethod
    def forward(
        ctx: Any,
        reading: Reading,
        key: object,
        weighed: Weighed,
        masks: Sequence[Any],
        predictions: list[Tensor] | None,
        target: Tensor,
        *tensors: Any,
    ) -> Tensor:
        program, needs = reading.program, ctx.needs_input_grad[6:]
        if key is not None and any(needs):
            ctx.of, ctx.masks = (reading, weighed, (key, needs)), ()
            ctx.save_for_backward(target, *tensors)
            value, ctx.gradients = _at_once(reading, (key, needs), weighed, target, tensors, predictions)
            return value
        slots = program.forward([*tensors, *masks])
        if program.grids:
            checks.rows_of(slots[-1], target, weighed[0].name)
            program.observe(slots, [*tensors, *masks])
        ctx.of, ctx.masks = (reading, weighed, None), masks[1::2]
        ctx.save_for_backward(target, *tensors, *masks[::2], *slots[1:])
        if predictions is not None:
            predictions.append(slots[-1])
        cost, total_weight, _ = weighed
        return (kernels.total(cost, slots[-1], target) * total_weight).to(slots[-1].dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (reading, weighed, key), keeps, needs = ctx.of, ctx.masks, ctx.needs_input_grad[6:]
        program, count = reading.program, len(needs)
        target, *saved = ctx.saved_tensors  # which refuses what has changed since, or is gone
        tensors, drawn, slots = saved[:count], saved[count : count + len(keeps)], saved[count + len(keeps) :]
        if key is not None and kernels.plain(g):
            gradients, ctx.gradients = ctx.gradients, None  # given away, they become .grad without a copy
            if gradients is None:  # backward for the second time
                _, gradients = _at_once(reading, key, weighed, target, tensors, None)
            if g.item() != 1:
                torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], g)
            return *(None,) * 6, *gradients
        tensors += chain.from_iterable(zip(drawn, keeps, strict=True))
        if torch.is_grad_enabled() or not slots:  # create_graph: what was saved has no history
            slots = program.forward(tensors)[1:]
        cost, _, delta_weight = weighed
        g = kernels.COST_KERNELS[cost.name].delta(slots[-1], target) * (g * delta_weight)
        _, gradients = program.backward(g, [tensors[0], *slots], tensors, needs)
        return *(None,) * 6, *gradients


def network_loss(model: nn.Module, input: Tensor, target: Tensor, loss: str = "quadratic") -> Tensor:
    """C of the model's prediction, the whole net and its cost as one node of the graph.

    input (N, n_1), target (N, n_L), or class indices (N,) for "cross_entropy" → scalar. It equals
    `functional.COSTS[loss](model(input), target)`, and calls that under autocast, a compiler or a transform, with a
    target that requires a gradient, and for tensors of other dimensions.

    A batch on the CPU takes steps 1 to 4 in the forward pass, if the net has no dropout, every activation saves a, and
    all its layers together have at most 2 million numbers. Between the passes it holds the gradients, which are as
    large as the parameters. Buffers for the last four batch shapes stay allocated. If you only need the value, use
    torch.no_grad().
    Raises InputError as `program.read`, for an unknown loss, a logits cost after an activation, and as the loss itself.

    >>> import torch, manual_mlp as mm
    >>> net, x, target = mm.MLP([2, 3, 1]), torch.ones(4, 2), torch.zeros(4, 1)
    >>> cost = mm.network.network_loss(net, x, target)
    >>> torch.allclose(cost, mm.QuadraticLoss()(net(x), target)), type(cost.grad_fn).__name__
    (True, 'NetworkCostBackward')
    """
    return _cost(model, input, target, loss, None)


def cost_and_prediction(model: nn.Module, input: Tensor, target: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Return `network_loss`, and the prediction a^L (N, n_L) that it came from, without a history.

    >>> import torch, manual_mlp as mm
    >>> net, x = mm.MLP([2, 1], output_activation="identity"), torch.ones(4, 2)
    >>> cost, prediction = mm.network.cost_and_prediction(net, x, net(x).detach(), "quadratic")
    >>> cost.item(), torch.equal(prediction, net(x))
    (0.0, True)
    """
    predictions: list[Tensor] = []
    cost = _cost(model, input, target, loss, predictions)
    return cost, predictions[0]


def _cost(model: nn.Module, input: Tensor, target: Tensor, loss: str, predictions: list[Tensor] | None) -> Tensor:
    reading = reading_of(model, grids=True)
    flat = parameters_of(model, reading.program)
    try:
        special = kernels.transforming() or torch.compiler.is_compiling() or target.requires_grad
        special = special or input.dim() not in ((2, 4) if reading.program.grids else (2,))
    except AttributeError:
        checks.tensors(input=input, target=target)
        raise
    if special or functional.autocasting(input):
        cost_of(loss, reading.program)
        prediction = model(input)
        if predictions is not None:
            predictions.append(prediction.detach())
        return functional.COSTS[loss](prediction, target)
    key, weighed, planned = _checked(reading, flat, input, target, loss)
    masks = reading.program.draw(input)
    if not planned or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        key = None
    try:
        return NetworkCost.direct(reading, key, weighed, masks, predictions, target, input, *flat)
    except (IndexError, RuntimeError):
        outputs = len(reading.program.affine[-1].weight)
        read(model, grids=True)  # `p.data =` can leave layers that do not fit each other
        if not reading.program.grids:
            checks.batch(flat[0], outputs, input, target, loss)
        checks.batch_labels(outputs, target, loss)
        checks.trainable(flat)
        raise


def _checked(reading: Reading, flat: Sequence[Any], input: Tensor, target: Tensor, loss: str) -> tuple[Any, Any, bool]:
    """Return the key of such batches, the cost with its factors, and whether they get a plan. Checks a new key only."""
    last = reading.program.affine[-1].weight if reading.program.grids else flat[-2]
    key = (
        *(type(input), input.shape, input.dtype, input.device, input.layout),
        *(type(target), target.shape, target.dtype),
        *(type(last), last.shape, loss),
    )
    if reading.last_checked[0] == key:
        return reading.last_checked
    cost = cost_of(loss, reading.program)
    if not reading.program.grids:
        checks.batch(flat[0], len(last), input, target, loss)
    checked = key, weigh(cost, len(input), len(last), input.dtype), _has_plan(reading, flat, input, target)
    if type(checked[1][1]) in (Tensor, float):  # not a fake tensor, made while torch traces shapes
        reading.last_checked = checked
    return checked


def _has_plan(reading: Reading, flat: Sequence[Any], input: Tensor, target: Tensor) -> bool:
    """Return True if buffers pay for such batches: large ones would gain little time and hold much memory.

    Not in half precision: loss scaling arrives with g, after δ has underflowed. Not for rows that save z: their a would
    take memory, too.
    """
    program = reading.program
    saves_z = any(rule.saves == "input" and not rule.names for rule, _, _ in program.nodes)
    if program.has_dropout or program.grids or saves_z:
        return False
    tensors = [input, target, *(own for own in flat if own is not None)]
    if any(type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu for tensor in tensors):
        return False
    widths = zip(program.nodes, program.widths(input)[1:], strict=True)
    neurons = sum(width for node, width in widths if isinstance(node.rule, Affine | Add))
    return input.dtype in (torch.float32, torch.float64) and 0 < len(input) * neurons <= _KEPT


class NetworkLoss(nn.Module):
    """`network_loss` as a module: (input, target) ↦ C. The model stays a child, and can be called by itself.

    >>> import torch, manual_mlp as mm
    >>> cost = mm.network.NetworkLoss(mm.MLP([2, 3, 1]))
    >>> cost(torch.ones(4, 2), torch.zeros(4, 1)).backward()
    >>> [parameter.grad is not None for parameter in cost.parameters()]
    [True, True, True, True]
    """

    def __init__(self, model: nn.Module, loss: str = "quadratic") -> None:
        super().__init__()
        cost_of(loss, reading_of(model, grids=True).program)
        self.model, self.loss = model, loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return C of the prediction: input (N, n_1), target (N, n_L) or class indices (N,) → scalar."""
        return network_loss(self.model, input, target, self.loss)
