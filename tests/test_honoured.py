"""Nothing that stands beside a model, its optimizer, its engine or its batch is ignored silently.

Each change is made to two sides: one trained by the engine or by `network_loss`, the other by autograd and torch.optim.
Then both train on. Ours must have the other's parameters, or refuse in a sentence before anything is trained.
"""

import copy
import functools
import io
import pickle
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import manual_mlp as mm
from manual_mlp.network import network_loss

double = torch.float64
# A few dozen steps of a few roundings each, in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def cases(names: Any, *more: Any) -> Any:
    """Return a parameter for each name, under the name that pytest prints."""
    return [pytest.param(name, *rest, id="-".join([name, *rest])) for name in names for rest in (more or [()])]


# ---------------------------------------------------------------------------------------------------------------------
# Two sides
# ---------------------------------------------------------------------------------------------------------------------


def quadratic(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum() / (2 * len(prediction))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quadratic": quadratic,
    "mse": torch_functional.mse_loss,
    "bce": torch_functional.binary_cross_entropy_with_logits,
    "cross_entropy": torch_functional.cross_entropy,
}


@dataclass
class Side:
    """A model in training. log: what hooks have seen; undo: what ends with the test."""

    model: Any
    optimizer: Any
    loss: str = "quadratic"
    clip: float | None = None
    engine: Any = None
    log: list[Any] = field(default_factory=list)
    undo: list[Callable[[], object]] = field(default_factory=list)

    def patch(self, owner: Any, name: str, value: Any) -> None:
        """setattr that ends with the test."""
        own = vars(owner).get(name)
        self.undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))
        setattr(owner, name, value)

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    @property
    def first(self) -> Any:
        return self.model[0]

    @property
    def last(self) -> Any:
        return next(module for module in reversed(self.model) if hasattr(module, "weight"))


NETS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: mm.MLP([4, 5, 3], "tanh", dtype=double),
    "dropout": lambda: mm.MLP([4, 5, 3], "tanh", dropout=0.3, dtype=double),
    "leaky_relu": lambda: mm.MLP([4, 5, 3], "leaky_relu", dtype=double),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 3), nn.Sigmoid())
    ).double(),
    **{
        f"nn.{kind}": lambda kind=kind: nn.Sequential(  # type: ignore[misc]
            nn.Linear(4, 5), getattr(nn, kind)(), nn.Dropout(0.0), nn.Linear(5, 3), nn.Identity()
        ).double()
        for kind in ("Tanh", "ReLU", "LeakyReLU", "Softplus", "GELU")
    },
}


def two_groups(model: Any, **arguments: Any) -> torch.optim.Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.01, "weight_decay": 0.1}], **arguments)


def all_but_a_bias(model: Any) -> torch.optim.Optimizer:
    model[0].bias.requires_grad_(False)
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.2)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.2),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
    "two groups": lambda model: two_groups(model, lr=0.2),
    "two groups, momentum": lambda model: two_groups(model, lr=0.2, momentum=0.9),
    "all but a bias": all_but_a_bias,
}


def side_of(net: str = "mlp", optimizer: str = "sgd", loss: str = "quadratic") -> Side:
    """The same numbers each time."""
    torch.manual_seed(0)
    model = NETS[net]()
    return Side(model, OPTIMIZERS[optimizer](model), loss)


def batch(seed: int = 0, n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=double), torch.rand(n, 3, generator=generator, dtype=double)


def by_autograd(side: Side, x: Tensor, y: Tensor) -> Tensor:
    side.optimizer.zero_grad()
    cost = LOSSES[side.loss](side.model(x), y)
    cost.backward()
    return stepped(side, cost)


def by_network(side: Side, x: Tensor, y: Tensor) -> Tensor:
    side.optimizer.zero_grad()
    cost = network_loss(side.model, x, y, side.loss)
    cost.backward()
    return stepped(side, cost)


def stepped(side: Side, cost: Tensor) -> Tensor:
    if side.clip is not None:
        nn.utils.clip_grad_norm_(side.model.parameters(), side.clip)
    side.optimizer.step()
    return cost.detach()


def by_gradients(side: Side, x: Tensor, y: Tensor) -> Tensor:
    engine = made(side)
    side.optimizer.zero_grad()
    return stepped(side, engine.compute_gradients(x, y))


def made(side: Side) -> Any:
    if side.engine is None:
        side.engine = mm.BackpropEngine(side.model, side.optimizer, side.loss, side.clip)
    return side.engine


WAYS: dict[str, Callable[[Side, Tensor, Tensor], Tensor]] = {
    "autograd": by_autograd,
    "step": lambda side, x, y: made(side).step(x, y),
    "batches": lambda side, x, y: made(side).train_batches(x, y, 50),  # all at once
    "gradients": by_gradients,
    "network": by_network,
}
ENGINE = ("step", "batches", "gradients")
OURS = (*ENGINE, "network")


def train(side: Side, way: str, seeds: range) -> None:
    for seed in seeds:
        torch.default_generator.manual_seed(seed)  # of dropouts
        WAYS[way](side, *batch(seed))


def numbers(side: Side) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in side.model.state_dict().values()]


def same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(mine, theirs, **CLOSE)


def a_sentence(error: BaseException) -> None:
    assert isinstance(error, mm.InputError), repr(error)
    assert str(error).startswith("expected "), error
    assert len(str(error)) > 40


@dataclass
class Change:
    """refusal: whether a sentence is as right as the right value."""

    make: Callable[[Side], object]
    net: str = "mlp"
    optimizer: str = "sgd"
    loss: str = "quadratic"
    refusal: bool = False
    ways: tuple[str, ...] = OURS


@dataclass
class Outcome:
    """The numbers before the change and at the end, what hooks have seen, and what was raised."""

    before: list[Tensor]
    after: list[Tensor]
    log: list[Any]
    error: Exception | None = None
    changed: list[Tensor] | None = None


@functools.cache
def outcome(name: str, way: str, first: bool) -> Outcome:
    """A side that trains, is changed and trains on; with first it is changed before anything else."""
    change = CHANGES[name]
    side, error, changed = side_of(change.net, change.optimizer, change.loss), None, None
    try:
        if not first:
            train(side, way, range(2))
        before = numbers(side)
        try:
            change.make(side)
            changed = numbers(side)
            train(side, way, range(2, 4))
        except Exception as raised:
            error = raised
    finally:
        for undo in reversed(side.undo):
            undo()
    return Outcome(before, numbers(side), side.log, error, changed)


def honoured(name: str, way: str, first: bool) -> None:
    """Ours has the twin's numbers; or refuses in a sentence, and has trained nothing since the change."""
    ours, twin = outcome(name, way, first), outcome(name, "autograd", first)
    same(ours.before, twin.before)
    if isinstance(ours.error, mm.InputError):
        a_sentence(ours.error)
        assert CHANGES[name].refusal or twin.error is not None, f"refused: {ours.error}"
        if ours.changed is not None:
            torch.testing.assert_close(ours.after, ours.changed, rtol=0, atol=0)
        return
    assert type(ours.error) is type(twin.error), f"{ours.error!r} instead of {twin.error!r}"
    if twin.error is None:
        same(ours.after, twin.after)
        assert ours.log == twin.log


# ---------------------------------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------------------------------


def halved(gradient: Tensor) -> Tensor:
    return gradient * 0.5


def halve_gradient(parameter: Any) -> None:
    parameter.grad.mul_(0.5)


def halve_gradients(optimizer: Any, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


def clip_weights(optimizer: Any, *_: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-0.2, 0.2)


def step_in_backward(side: Side) -> None:
    """An optimizer that runs inside backward, as torch's tutorial has it."""

    def update(parameter: Tensor) -> None:
        parameter.data.add_(parameter.grad, alpha=-0.5)
        parameter.grad = None

    side.first.weight.register_post_accumulate_grad_hook(update)


def on_global(register: Callable[..., Any], run: Callable[..., Any], of: str) -> Callable[[Side], None]:
    """A global hook that answers for one side's layer, or optimizer, alone."""

    def make(side: Side) -> None:
        def hook(owner: Any, *arguments: Any) -> Any:
            return run(side, owner, *arguments) if owner is getattr(side, of) else None

        side.undo.append(register(hook).remove)

    return make


def seen(side: Side, *_: Any) -> None:
    side.log.append("seen")


HOOKS: dict[str, Callable[[Side], object]] = {
    "hook halves the first weight": lambda s: s.first.weight.register_hook(halved),
    "hook halves the first bias": lambda s: s.first.bias.register_hook(halved),
    "hook halves the last weight": lambda s: s.last.weight.register_hook(halved),
    "hook halves the last bias": lambda s: s.last.bias.register_hook(halved),
    "hook looks at a weight": lambda s: s.first.weight.register_hook(lambda g: seen(s)),
    "hook looks at a bias": lambda s: s.last.bias.register_hook(lambda g: s.log.append(tuple(g.shape))),
    "post hook halves a weight": lambda s: s.first.weight.register_post_accumulate_grad_hook(halve_gradient),
    "post hook halves a bias": lambda s: s.last.bias.register_post_accumulate_grad_hook(halve_gradient),
    "post hook looks at a weight": lambda s: s.last.weight.register_post_accumulate_grad_hook(lambda p: seen(s)),
    "post hook steps": step_in_backward,
    "forward hook": lambda s: s.first.register_forward_hook(lambda m, i, o: o * 2),
    "forward hook that looks": lambda s: s.first.register_forward_hook(lambda m, i, o: seen(s)),
    "forward hook of the model": lambda s: s.model.register_forward_hook(lambda m, i, o: o * 2),
    "forward pre hook": lambda s: s.last.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "backward hook": lambda s: s.last.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
    "backward pre hook": lambda s: s.last.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,)),
    "backward hook of the model": lambda s: s.model.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,)),
    "global forward hook": on_global(
        global_hooks.register_module_forward_hook, lambda s, m, i, o: o * 2, "first"
    ),
    "global forward hook that looks": on_global(global_hooks.register_module_forward_hook, seen, "last"),
    "global forward pre hook": on_global(
        global_hooks.register_module_forward_pre_hook, lambda s, m, i: (i[0] * 2,), "last"
    ),
    "global forward pre hook that looks": on_global(global_hooks.register_module_forward_pre_hook, seen, "first"),
    "global backward hook": on_global(
        global_hooks.register_module_full_backward_hook, lambda s, m, i, o: (i[0] * 2,), "last"
    ),
    "global backward hook that looks": on_global(global_hooks.register_module_full_backward_hook, seen, "last"),
    "global backward pre hook": on_global(
        global_hooks.register_module_full_backward_pre_hook, lambda s, m, o: (o[0] * 2,), "first"
    ),
    "optimizer pre hook": lambda s: s.optimizer.register_step_pre_hook(halve_gradients),
    "optimizer post hook": lambda s: s.optimizer.register_step_post_hook(clip_weights),
    "optimizer hook that looks": lambda s: s.optimizer.register_step_post_hook(lambda *_: seen(s)),
    "global optimizer pre hook": on_global(
        register_optimizer_step_pre_hook, lambda s, o, *_: halve_gradients(o), "optimizer"
    ),
    "global optimizer post hook": on_global(
        register_optimizer_step_post_hook, lambda s, o, *_: clip_weights(o), "optimizer"
    ),
    "global optimizer hook that looks": on_global(register_optimizer_step_post_hook, seen, "optimizer"),
}  # fmt: skip
CHANGES = {name: Change(make, refusal="optimizer" not in name) for name, make in HOOKS.items()}
# What is called while nothing is trained is no reason to refuse.
CHANGES |= {
    "state_dict hooks": Change(lambda s: s.model.register_state_dict_post_hook(lambda *_: None)),
    "state_dict pre hooks": Change(lambda s: s.first.register_state_dict_pre_hook(lambda *_: None)),
    "load_state_dict hooks": Change(lambda s: s.first.register_load_state_dict_post_hook(lambda *_: None)),
    "optimizer state_dict hooks": Change(lambda s: s.optimizer.register_state_dict_post_hook(lambda *_: None)),
    "a hook that was removed": Change(lambda s: s.first.weight.register_hook(halved).remove()),
    "a post hook that was removed": Change(
        lambda s: s.last.bias.register_post_accumulate_grad_hook(lambda p: p.grad.zero_()).remove()
    ),
    "a forward hook that was removed": Change(lambda s: s.first.register_forward_hook(lambda m, i, o: o * 2).remove()),
    "a global hook that was removed": Change(
        lambda s: global_hooks.register_module_forward_hook(lambda m, i, o: o * 2).remove()
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# The optimizer's step, and a layer's forward, replaced
# ---------------------------------------------------------------------------------------------------------------------


def replace_step(side: Side, before: Callable[[Any], None] = halve_gradients, skip: bool = False) -> None:
    """A step of the instance's own, over the one it has."""
    old = side.optimizer.step

    def step(self: Any, closure: Any = None) -> Any:
        before(self)
        return None if skip else old(closure)

    side.optimizer.step = MethodType(step, side.optimizer)


def class_step(side: Side) -> None:
    old = torch.optim.SGD.step

    def step(self: Any, closure: Any = None) -> Any:
        halve_gradients(self)
        return old(self, closure)

    side.patch(torch.optim.SGD, "step", step)


def twice(module: Any) -> None:
    forward = module.forward
    module.forward = lambda a: forward(a) * 2


def twice_of(kind: Any, name: str = "forward") -> Callable[[Side], None]:
    """The class's own, for all its modules."""

    def make(side: Side) -> None:
        old = getattr(kind, name)
        side.patch(kind, name, lambda self, a: old(self, a) * 2)

    return make


CHANGES |= {
    "step replaced": Change(replace_step),
    "step replaced, momentum": Change(replace_step, optimizer="momentum"),
    "step that is skipped": Change(lambda s: replace_step(s, skip=True)),
    "step that looks": Change(lambda s: replace_step(s, before=lambda _: seen(s))),
    "step of the class": Change(class_step),
    "scheduler": Change(lambda s: torch.optim.lr_scheduler.ExponentialLR(s.optimizer, 0.5)),
    "scheduler of two groups": Change(
        lambda s: torch.optim.lr_scheduler.LambdaLR(s.optimizer, [lambda t: 0.5, lambda t: 2.0]), optimizer="two groups"
    ),
    "scheduler of momentum": Change(
        lambda s: torch.optim.lr_scheduler.OneCycleLR(s.optimizer, 0.3, total_steps=50), optimizer="momentum"
    ),
    "two schedulers": Change(
        lambda s: [torch.optim.lr_scheduler.StepLR(s.optimizer, 1), torch.optim.lr_scheduler.StepLR(s.optimizer, 2)]
    ),
    "scheduler over a replaced step": Change(
        lambda s: [replace_step(s), torch.optim.lr_scheduler.ExponentialLR(s.optimizer, 0.5)]
    ),
    "replaced step over a scheduler": Change(
        lambda s: [torch.optim.lr_scheduler.ExponentialLR(s.optimizer, 0.5), replace_step(s)]
    ),
    "forward of the first layer": Change(lambda s: twice(s.first), refusal=True),
    "forward of the last layer": Change(lambda s: twice(s.last), refusal=True),
    "forward of the model": Change(lambda s: twice(s.model), refusal=True),
    "forward of a nested model": Change(lambda s: twice(s.model[1]), net="nested", refusal=True),
    "forward of a nested layer": Change(lambda s: twice(s.model[1][0]), net="nested", refusal=True),
    "forward of an activation": Change(lambda s: twice(s.model[1]), net="nn.ReLU", refusal=True),
    "forward of a dropout": Change(lambda s: twice(s.model[2]), net="nn.ReLU", refusal=True),
    "forward of an identity": Change(lambda s: twice(s.model[4]), net="nn.ReLU", refusal=True),
    "forward of our dropout": Change(lambda s: twice(s.model[1]), net="dropout", refusal=True),
    "forward of the class Linear": Change(twice_of(nn.Linear), net="nn.Tanh", refusal=True),
    "forward of the class Tanh": Change(twice_of(nn.Tanh), net="nn.Tanh", refusal=True),
    "forward of the class Identity": Change(twice_of(nn.Identity), net="nn.Tanh", refusal=True),
    "forward of the class Dropout": Change(twice_of(nn.Dropout), net="nn.Tanh", refusal=True),
    "forward of the class Sequential": Change(twice_of(nn.Sequential), net="nn.Tanh", refusal=True),
    "forward of the class MLP": Change(twice_of(mm.MLP), refusal=True),
    "forward of the class AffineActivation": Change(twice_of(mm.AffineActivation), refusal=True),
    "call of the class Linear": Change(twice_of(nn.Linear, "__call__"), net="nn.Tanh", refusal=True),
    "call of the class MLP": Change(twice_of(mm.MLP, "__call__"), refusal=True),
    "compiled model": Change(lambda s: s.model.compile(backend="eager")),
    "compiled layer": Change(lambda s: s.first.compile(backend="eager")),
}

# ---------------------------------------------------------------------------------------------------------------------
# Activations and their parameters
# ---------------------------------------------------------------------------------------------------------------------


def put(owner: Callable[[Side], Any], **values: Any) -> Callable[[Side], None]:
    """setattr."""

    def make(side: Side) -> None:
        for name, value in values.items():
            setattr(owner(side), name, value)

    return make


def first(side: Side) -> Any:
    return side.first


def last(side: Side) -> Any:
    return side.last


def second(side: Side) -> Any:
    return side.model[1]


CHANGES |= {
    "activation of the first layer": Change(put(first, activation="relu")),
    "activation of the last layer": Change(put(last, activation="tanh")),
    "activation that saves z": Change(put(first, activation="gelu")),
    "activation identity": Change(put(first, activation="identity")),
    "activation with a parameter": Change(put(first, activation="leaky_relu", parameter_values=(0.3,))),
    "activation's parameter": Change(put(first, parameter_values=(0.5,)), net="leaky_relu"),
    "activation in z": Change(put(first, activation="leaky_relu_in_z", parameter_values=(-0.3,)), net="leaky_relu"),
    "activation that is none": Change(put(first, activation="nonsense"), refusal=True),
    "negative_slope": Change(put(second, negative_slope=0.5), net="nn.LeakyReLU"),
    "negative_slope below 0": Change(put(second, negative_slope=-0.5), net="nn.LeakyReLU"),
    "beta": Change(put(second, beta=3.0), net="nn.Softplus"),
    "threshold": Change(put(second, threshold=0.5), net="nn.Softplus"),
    "threshold below any z": Change(put(second, threshold=-100.0), net="nn.Softplus"),
    "approximate": Change(put(second, approximate="tanh"), net="nn.GELU"),
    "inplace": Change(put(second, inplace=True), net="nn.ReLU"),
    "p": Change(put(second, p=0.6), net="dropout"),
    "p = 0": Change(put(second, p=0.0), net="dropout"),
    "p = 1": Change(put(second, p=1.0), net="dropout"),
    "p of torch's": Change(put(lambda s: s.model[2], p=0.4), net="nn.ReLU"),
    "inplace of a dropout": Change(put(lambda s: s.model[2], p=0.4, inplace=True), net="nn.GELU"),
    "eval": Change(lambda s: s.model.eval(), net="dropout"),
    "eval of the dropout": Change(lambda s: s.model[1].eval(), net="dropout"),
    "another activation": Change(lambda s: s.model.__setitem__(1, nn.Sigmoid()), net="nn.ReLU"),
    "another activation of ours": Change(lambda s: s.model.__setitem__(1, mm.GELU()), net="nn.ReLU"),
    "another kind of activation": Change(lambda s: s.model.__setitem__(1, nn.ELU()), net="nn.ReLU", refusal=True),
    "an activation more": Change(lambda s: s.model.append(nn.Tanh()), net="nn.ReLU"),
    "two activations": Change(lambda s: s.model.insert(1, nn.Tanh()), net="nn.ReLU", refusal=True),
    "an activation less": Change(lambda s: s.model.__delitem__(1), net="nn.ReLU"),
    "a dropout more": Change(lambda s: s.model.append(nn.Dropout(0.5)), net="nn.ReLU"),
    "the class of an activation": Change(lambda s: setattr(s.model[1], "__class__", nn.Tanh), net="nn.ReLU"),
    "converted": Change(lambda s: mm.convert(s.model), net="nn.ReLU"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Parameters and groups
# ---------------------------------------------------------------------------------------------------------------------


def move(side: Side, index: int = 0) -> None:
    one, other = side.groups
    other["params"].append(one["params"].pop(index))


def swap_data(side: Side, change: Callable[[Tensor], Tensor]) -> None:
    side.first.weight.data = change(side.first.weight.data)


def as_loaded(side: Side, assign: bool) -> None:
    state = {key: value.detach() * 0.5 for key, value in side.model.state_dict().items()}
    side.model.load_state_dict(state, assign=assign)


def with_frozen(side: Side, *parameters: Any) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def thawed(side: Side) -> None:
    side.first.bias.requires_grad_(True)
    side.optimizer.add_param_group({"params": [side.first.bias], "lr": 0.5})


def other_state(side: Side) -> None:
    """Another run's state: other buffers, another step."""
    other = copy.deepcopy(side.optimizer)
    for state in other.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.mul_(0.5)
    other.param_groups[0]["lr"] = 0.03
    side.optimizer.load_state_dict(other.state_dict())


def new_groups(side: Side, **values: Any) -> list[dict[str, Any]]:
    return [{**group, **values, "params": list(group["params"])} for group in side.groups]


def regroup(side: Side) -> None:
    side.groups[:] = new_groups(side, lr=0.5)


def group(**values: Any) -> Callable[[Side], None]:
    return lambda side: side.groups[0].update(values)


CHANGES |= {
    "weight moved to another group": Change(move, optimizer="two groups"),
    "last weight moved to another group": Change(lambda s: move(s, 1), optimizer="two groups"),
    "moved to another group with momentum": Change(move, optimizer="two groups, momentum"),
    "groups reversed": Change(lambda s: s.groups.reverse(), optimizer="two groups"),
    "group put in the place of another": Change(
        lambda s: s.groups.__setitem__(0, {**s.groups[0], "lr": 0.9}), optimizer="two groups"
    ),
    "groups edited in place": Change(regroup, optimizer="two groups"),
    "groups replaced": Change(lambda s: setattr(s.optimizer, "param_groups", new_groups(s, lr=0.5))),
    "list of parameters replaced": Change(lambda s: s.groups[0].update(params=s.groups[0]["params"][::-1])),
    "parameter taken out": Change(lambda s: s.groups[0]["params"].pop(0), refusal=True),
    "bias taken out": Change(lambda s: s.groups[0]["params"].pop(), refusal=True),
    "group taken out": Change(lambda s: s.groups.pop(), optimizer="two groups", refusal=True),
    "parameter added": Change(thawed, optimizer="all but a bias"),
    "parameter of no layer added": Change(
        lambda s: s.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}), refusal=True
    ),
    "frozen": Change(lambda s: with_frozen(s, s.first.weight)),
    "frozen with momentum": Change(lambda s: with_frozen(s, s.first.bias), optimizer="momentum"),
    "frozen with Adam": Change(lambda s: with_frozen(s, s.last.bias, s.first.weight), optimizer="adam"),
    "all frozen": Change(lambda s: with_frozen(s, *s.model.parameters()), refusal=True),
    "thawed": Change(lambda s: s.first.bias.requires_grad_(True), optimizer="all but a bias", refusal=True),
    "lr": Change(group(lr=0.7)),
    "lr = 0": Change(group(lr=0.0)),
    "lr of one group": Change(group(lr=0.7), optimizer="two groups"),
    "lr of Adam": Change(group(lr=0.7), optimizer="adam"),
    "lr as a tensor": Change(group(lr=torch.tensor(0.4, dtype=double))),
    "momentum": Change(group(momentum=0.5)),
    "momentum of one group": Change(group(momentum=0.5), optimizer="two groups"),
    "dampening": Change(group(dampening=0.5), optimizer="momentum"),
    "nesterov": Change(group(nesterov=True), optimizer="momentum"),
    "weight_decay": Change(group(weight_decay=0.3)),
    "maximize": Change(group(maximize=True)),
    "maximize of one group": Change(group(maximize=True), optimizer="two groups"),
    "maximize of Adam": Change(group(maximize=True), optimizer="adam"),
    "betas": Change(group(betas=(0.5, 0.6)), optimizer="adam"),
    "eps": Change(group(eps=0.1), optimizer="adam"),
    "foreach": Change(group(foreach=True)),
    "foreach of Adam": Change(group(foreach=True), optimizer="adam"),
    "differentiable": Change(group(differentiable=True), refusal=True),
    "differentiable Adam": Change(group(differentiable=True), optimizer="adam", refusal=True),
    "capturable": Change(group(capturable=True), optimizer="adam", refusal=True),
    "state of another run": Change(other_state, optimizer="momentum"),
    "state of another run of Adam": Change(other_state, optimizer="adam"),
    "state cleared": Change(lambda s: s.optimizer.state.clear(), optimizer="momentum"),
    "state replaced": Change(lambda s: setattr(s.optimizer, "state", defaultdict(dict)), optimizer="momentum"),
    "data replaced": Change(lambda s: swap_data(s, lambda w: w * 0.5)),
    "data turned": Change(lambda s: swap_data(s, lambda w: w.t().contiguous().t())),
    "data of another size": Change(lambda s: swap_data(s, lambda w: torch.cat([w, w])[:4]), refusal=True),
    "data in place": Change(lambda s: s.first.weight.data.mul_(0.5)),
    "data of all in float32": Change(lambda s: s.model.float(), refusal=True),
    "weight replaced": Change(
        lambda s: setattr(s.first, "weight", nn.Parameter(s.first.weight.detach() * 0.5)), refusal=True
    ),
    "bias removed": Change(lambda s: setattr(s.first, "bias", None), refusal=True),
    "loaded": Change(lambda s: as_loaded(s, assign=False)),
    "loaded by assignment": Change(lambda s: as_loaded(s, assign=True), refusal=True),
    "gradients there": Change(lambda s: [setattr(p, "grad", torch.full_like(p, 100.0)) for p in s.model.parameters()]),
    "gradients there of a frozen one": Change(
        lambda s: [setattr(s.first.bias, "grad", torch.full_like(s.first.bias, 100.0)), with_frozen(s, s.first.bias)],
        optimizer="momentum",
    ),
    "tied": Change(lambda s: setattr(s.model[1][0], "bias", s.model[0][0].bias), net="nested", refusal=True),
    "layer replaced": Change(lambda s: s.model.__setitem__(0, copy.deepcopy(s.first)), net="nn.ReLU", refusal=True),
    "layer taken out": Change(lambda s: s.model.__delitem__(4), net="nn.ReLU"),
    "weight is a buffer": Change(lambda s: as_buffer(s.first, "weight"), refusal=True),
    "bias is a buffer": Change(lambda s: as_buffer(s.first, "bias"), refusal=True),
    "last weight is a buffer": Change(lambda s: as_buffer(s.last, "weight"), refusal=True),
    "weight is a plain tensor": Change(lambda s: as_tensor(s.first, "weight"), refusal=True),
    "bias is a plain tensor": Change(lambda s: as_tensor(s.last, "bias"), refusal=True),
    "weight is pruned": Change(lambda s: prune.l1_unstructured(s.first, "weight", 3), net="nn.ReLU", refusal=True),
    "weight is parametrized": Change(lambda s: parametrizations.weight_norm(s.first), net="nn.ReLU", refusal=True),
}


def as_buffer(layer: Any, name: str) -> None:
    value = getattr(layer, name).detach().clone()
    delattr(layer, name)
    layer.register_buffer(name, value)


def as_tensor(layer: Any, name: str) -> None:
    value = getattr(layer, name).detach().clone()
    delattr(layer, name)
    setattr(layer, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# The engine's own attributes
# ---------------------------------------------------------------------------------------------------------------------


def change_loss(side: Side) -> None:
    side.loss = "mse"
    if side.engine is not None:
        side.engine.loss = "mse"


def change_clip(to: float | None) -> Callable[[Side], None]:
    def make(side: Side) -> None:
        side.clip = to
        if side.engine is not None:
            side.engine.max_grad_norm = to

    return make


def change_optimizer(kind: str) -> Callable[[Side], None]:
    def make(side: Side) -> None:
        side.optimizer = OPTIMIZERS[kind](side.model)
        if side.engine is not None:
            side.engine.optimizer = side.optimizer

    return make


def change_model(side: Side) -> None:
    """Another net over the same parameters: one that squares its costs otherwise."""
    side.model = nn.Sequential(*[copy.copy(layer) for layer in side.model])
    side.model[0].activation = "relu"
    if side.engine is not None:
        side.engine.model = side.model


def change_model_and_optimizer(side: Side) -> None:
    side.model = copy.deepcopy(side.model)
    change_optimizer("momentum")(side)
    if side.engine is not None:
        side.engine.model = side.model


CHANGES |= {
    name: Change(make, refusal=True, ways=ENGINE)
    for name, make in {
        "engine.loss": change_loss,
        "engine.max_grad_norm": change_clip(0.01),
        "engine.optimizer": change_optimizer("momentum"),
        "engine.optimizer of the same kind": lambda s: (change_optimizer("sgd")(s), s.groups[0].update(lr=0.9)),
        "engine.model": change_model,
        "engine.model and optimizer": change_model_and_optimizer,
    }.items()
}

EVERY = [(name, way) for name, change in CHANGES.items() for way in change.ways]


@pytest.mark.parametrize(("name", "way"), [case for name, way in EVERY for case in cases([name], (way,))])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_change(name: str, way: str) -> None:
    honoured(name, way, first=False)
    if way in ("step", "network"):
        honoured(name, way, first=True)


# ---------------------------------------------------------------------------------------------------------------------
# Memory that is shared
# ---------------------------------------------------------------------------------------------------------------------


def square(side: Side) -> tuple[Tensor, Tensor]:
    """Batches whose shape is that of the parameters of 4-4-4."""
    x, y = batch(9, 4)
    return x, torch.cat([y, y[:, :1]], 1)


SQUARE = {"sgd": "square", "momentum": "square gelu"}
NETS["square"] = lambda: mm.MLP([4, 4, 4], "tanh", dtype=double)
NETS["square gelu"] = lambda: mm.MLP([4, 4, 4], ["gelu"], "identity", dtype=double)

# What a batch may share its memory with: (input, target) of a side of 4-4-4.
SHARED: dict[str, Callable[[Side], tuple[Any, Any]]] = {
    "input, first weight": lambda s: (s.first.weight.detach(), square(s)[1]),
    "input, first weight's data": lambda s: (s.first.weight.data[:3], square(s)[1][:3]),
    "input, first weight turned": lambda s: (s.first.weight.detach().t(), square(s)[1]),
    "input, first weight by NumPy": lambda s: (torch.from_numpy(s.first.weight.detach().numpy()), square(s)[1]),
    "input, first weight flattened": lambda s: (s.first.weight.detach().view(-1)[2:14].view(3, 4), square(s)[1][:3]),
    "input, first bias": lambda s: (s.first.bias.detach().expand(4, 4), square(s)[1]),
    "input, last weight": lambda s: (s.last.weight.detach(), square(s)[1]),
    "input, last bias": lambda s: (s.last.bias.detach().expand(3, 4), square(s)[1][:3]),
    "target, last weight": lambda s: (square(s)[0], s.last.weight.detach()),
    "target, last weight turned": lambda s: (square(s)[0], s.last.weight.data.t()),
    "target, last bias": lambda s: (square(s)[0], s.last.bias.detach().expand(4, 4)),
    "target, first weight": lambda s: (square(s)[0], s.first.weight.detach()),
    "both, one weight": lambda s: (s.first.weight.detach(), s.first.weight.detach()),
    "input, target": lambda s: (square(s)[0],) * 2,
    "input, a gradient": lambda s: (gradient_of(s.last.weight), square(s)[1]),
    "target, a gradient": lambda s: (square(s)[0], gradient_of(s.first.weight)),
}


def gradient_of(parameter: Tensor) -> Tensor:
    """The tensor that lies in .grad since the last step; the same numbers on both sides, by whatever way they came."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.copy_(torch.linspace(-1, 1, 16, dtype=double).view(4, 4))
    return parameter.grad


def epoch(side: Side, way: str, x: Any, y: Any) -> None:
    """Batches of two rows, in random order."""
    if way != "autograd":
        made(side).train_epoch(x, y, 2, torch.Generator().manual_seed(0))
        return
    for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(2):
        by_autograd(side, x[rows], y[rows])


def in_twos(side: Side, way: str, x: Any, y: Any) -> None:
    if way != "autograd":
        made(side).train_batches(x, y, 2)
        return
    for input, target in zip(x.split(2), y.split(2), strict=True):
        by_autograd(side, input, target)


def once(side: Side, way: str, x: Any, y: Any) -> None:
    WAYS[way](side, x, y)


SHARING = [(name, way, optimizer) for name in SHARED for way in (*OURS, "epoch", "in twos") for optimizer in SQUARE]


@pytest.mark.parametrize(
    ("name", "way", "optimizer"), [case for name, *rest in SHARING for case in cases([name], rest)]
)
def test_shared_memory(name: str, way: str, optimizer: str) -> None:
    """The step that plain autograd takes, which reads the batch before it writes a parameter; or a refusal."""
    run = {"epoch": epoch, "in twos": in_twos}.get(way, once)
    ours, twin = (side_of(SQUARE[optimizer], optimizer) for _ in range(2))
    WAYS[way if way in OURS else "step"](ours, *square(ours))
    by_autograd(twin, *square(twin))
    before = numbers(ours)
    try:
        run(ours, way, *SHARED[name](ours))
    except mm.InputError as error:
        a_sentence(error)
        assert name != "input, target"
        torch.testing.assert_close(numbers(ours), before, rtol=0, atol=0)
        return
    run(twin, "autograd", *SHARED[name](twin))
    same(numbers(ours), numbers(twin))


# ---------------------------------------------------------------------------------------------------------------------
# The prediction's buffer
# ---------------------------------------------------------------------------------------------------------------------

FITS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: torch.full((7, 3), torch.nan, dtype=double),
    "turned": lambda: torch.full((3, 7), torch.nan, dtype=double).t(),
    "every second column": lambda: torch.full((7, 6), torch.nan, dtype=double)[:, ::2],
    "part of a wider one": lambda: torch.full((9, 5), torch.nan, dtype=double)[1:8, 1:4],
}
UNFIT: dict[str, Callable[[], Any]] = {
    "too wide": lambda: torch.zeros(7, 4, dtype=double),
    "twice as wide": lambda: torch.zeros(7, 6, dtype=double),
    "too narrow": lambda: torch.zeros(7, 2, dtype=double),
    "one column": lambda: torch.zeros(7, 1, dtype=double),
    "too long": lambda: torch.zeros(8, 3, dtype=double),
    "too short": lambda: torch.zeros(6, 3, dtype=double),
    "one row": lambda: torch.zeros(1, 3, dtype=double),
    "no row": lambda: torch.zeros(0, 3, dtype=double),
    "of one dimension": lambda: torch.zeros(7, dtype=double),
    "of three dimensions": lambda: torch.zeros(7, 3, 3, dtype=double),
    "of float32": lambda: torch.zeros(7, 3),
    "of integers": lambda: torch.zeros(7, 3, dtype=torch.long),
    "of bools": lambda: torch.zeros(7, 3, dtype=torch.bool),
    "complex": lambda: torch.zeros(7, 3, dtype=torch.complex128),
    "expanded": lambda: torch.zeros(1, 3, dtype=double).expand(7, 3),
    "overlapping": lambda: torch.zeros(9, dtype=double).as_strided((7, 3), (1, 1)),
    "on meta": lambda: torch.zeros(7, 3, dtype=double, device="meta"),
    "that requires a gradient": lambda: torch.zeros(7, 3, dtype=double, requires_grad=True),
    "of NumPy": lambda: np.zeros((7, 3)),
    "a list": lambda: [[0.0] * 3] * 7,
}
ROWS = {"rows at once": 7, "rows in threes": 3}


@pytest.mark.parametrize(("name", "rows"), [case for rows in ROWS for case in cases(FITS, (rows,))])
def test_prediction_is_filled(name: str, rows: str) -> None:
    ours, twin = side_of(), side_of()
    (x, y), buffer = batch(), FITS[name]()
    engine = made(ours)
    for _ in range(2):
        engine.train_batches(x, y, ROWS[rows], buffer)
        expected = []
        for input, target in zip(x.split(ROWS[rows]), y.split(ROWS[rows]), strict=True):
            expected.append(twin.model(input).detach())
            by_autograd(twin, input, target)
        same([buffer], [torch.cat(expected)])
    same(numbers(ours), numbers(twin))


@pytest.mark.parametrize("name", cases(UNFIT))
def test_prediction_that_does_not_fit(name: str) -> None:
    ours = side_of()
    train(ours, "batches", range(2))
    before = numbers(ours)
    with pytest.raises(mm.InputError) as caught:
        ours.engine.train_batches(*batch(), 3, UNFIT[name]())
    a_sentence(caught.value)
    torch.testing.assert_close(numbers(ours), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", cases(["prediction, target", "prediction, last weight", "prediction, input"]))
def test_prediction_that_shares_memory(name: str) -> None:
    """The numbers that a buffer of its own would hold, or a refusal."""
    ours, twin = side_of("square"), side_of("square")
    x, y = square(ours)
    other = {"target": y, "input": x, "last weight": ours.last.weight.detach()}[name.split(", ")[1]]
    before = numbers(ours)
    try:
        made(ours).train_batches(x, y, 2, other)
    except mm.InputError as error:
        a_sentence(error)
        torch.testing.assert_close(numbers(ours), before, rtol=0, atol=0)
        return
    assert "weight" not in name
    expected = []
    for input, target in zip(*(data.split(2) for data in square(twin)), strict=True):
        expected.append(twin.model(input).detach())
        by_autograd(twin, input, target)
    same([other, *numbers(ours)], [torch.cat(expected), *numbers(twin)])


# ---------------------------------------------------------------------------------------------------------------------
# Batches that are none, copies of an engine, modes, threads
# ---------------------------------------------------------------------------------------------------------------------

NONE: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "input of NumPy": lambda x, y: (x.numpy(), y),
    "target of NumPy": lambda x, y: (x, y.numpy()),
    "both of NumPy": lambda x, y: (x.numpy(), y.numpy()),
    "float32 of NumPy": lambda x, y: (x.float().numpy(), y),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "target a list": lambda x, y: (x, y.tolist()),
    "input None": lambda x, y: (None, y),
    "target None": lambda x, y: (x, None),
    "target a number": lambda x, y: (x, 1.0),
    "input a memoryview": lambda x, y: (memoryview(x.numpy()), y),
    "input of integers": lambda x, y: (x.long(), y),
    "input complex": lambda x, y: (x.to(torch.complex128), y),
    "input of float32": lambda x, y: (x.float(), y),
    "target of float32": lambda x, y: (x, y.float()),
    "target of integers": lambda x, y: (x, y.long()),
    "input too wide": lambda x, y: (torch.cat([x, x], 1), y),
    "input too narrow": lambda x, y: (x[:, :2], y),
    "input of one dimension": lambda x, y: (x[0], y),
    "target too wide": lambda x, y: (x, torch.cat([y, y], 1)),
    "target of one column": lambda x, y: (x, y[:, :1]),
    "target too short": lambda x, y: (x, y[:3]),
    "input on meta": lambda x, y: (x.to("meta"), y),
    "no rows": lambda x, y: (x[:0], y[:0]),
    "sparse": lambda x, y: (x.to_sparse(), y),
}
WRONG = [(name, way) for name in NONE for way in (*OURS, "epoch")]


@pytest.mark.parametrize(("name", "way"), [case for name, way in WRONG for case in cases([name], (way,))])
def test_what_is_no_batch(name: str, way: str) -> None:
    """It is refused, before there is a plan and after, and the training goes on as if nothing had been."""
    if (name, way) == ("no rows", "network"):
        return  # NaN, as of torch's costs
    ours, twin = side_of(), side_of()
    run = epoch if way == "epoch" else once
    for seed in range(2):
        before = numbers(ours)
        with pytest.raises(mm.InputError) as caught:
            run(ours, way, *NONE[name](*batch(seed)))
        a_sentence(caught.value)
        torch.testing.assert_close(numbers(ours), before, rtol=0, atol=0)
        run(ours, way, *batch(seed))
        run(twin, "autograd", *batch(seed))
    same(numbers(ours), numbers(twin))


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda engine: pickle.loads(pickle.dumps(engine)),
    "torch.save": lambda engine: saved_and_loaded(engine),
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda engine: copy.deepcopy([engine.model, engine.optimizer, engine])[2],
    "copy": copy.copy,
}


def saved_and_loaded(engine: Any) -> Any:
    file = io.BytesIO()
    torch.save(engine, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIED = [(name, used) for name in COPIES for used in ("unused", "used", "used with momentum")]


@pytest.mark.parametrize(("name", "used"), [case for name, used in COPIED for case in cases([name], (used,))])
def test_copies_of_an_engine(name: str, used: str) -> None:
    """A copy trains its own model and leaves the first alone, or it is refused in a sentence."""
    ours, twin = (side_of(optimizer="momentum" if "momentum" in used else "sgd") for _ in range(2))
    made(ours)
    if used != "unused":
        train(ours, "step", range(2))
        train(twin, "autograd", range(2))
    try:
        other = Side(None, None, engine=COPIES[name](ours.engine))
    except mm.InputError as error:
        a_sentence(error)
        return
    other.model = other.engine.model
    if name != "copy":
        before = numbers(ours)
        train(other, "step", range(2, 5))
        torch.testing.assert_close(numbers(ours), before, rtol=0, atol=0)
        further = copy.deepcopy([twin.model, twin.optimizer])
        train(Side(*further), "autograd", range(2, 5))
        same(numbers(other), numbers(Side(*further)))
    else:
        train(other, "step", range(2, 4))
        train(twin, "autograd", range(2, 4))
    train(ours, "step", range(5, 8))
    train(twin, "autograd", range(5, 8))
    same(numbers(ours), numbers(twin))


MODES: dict[str, Callable[[], Any]] = {"inference mode": torch.inference_mode, "no_grad": torch.no_grad}
ENTERED = [(mode, way, net) for mode in MODES for way in OURS for net in ("mlp", "nn.GELU")]


@pytest.mark.parametrize(("mode", "way", "net"), [case for mode, *rest in ENTERED for case in cases([mode], rest)])
def test_first_step_inside_a_mode(mode: str, way: str, net: str) -> None:
    """The engine needs no graph: it trains there, or refuses; outside all goes on as if it had not been inside."""
    ours, twin = side_of(net), side_of(net)
    with MODES[mode]():
        try:
            if way == "network":
                network_loss(ours.model, *batch(0))
            else:
                train(ours, way, range(1))
                with torch.enable_grad(), torch.inference_mode(False):
                    train(twin, "autograd", range(1))
        except mm.InputError as error:
            a_sentence(error)
    for seeds in (range(1, 3), range(3, 5)):
        train(ours, way, seeds)
        train(twin, "autograd", seeds)
        same(numbers(ours), numbers(twin))
        with MODES[mode]():
            same([network_loss(ours.model, *batch(9))], [LOSSES["quadratic"](twin.model(batch(9)[0]), batch(9)[1])])


@pytest.mark.parametrize("name", cases(f"made in inference mode, {way}" for way in OURS))
def test_a_model_made_in_inference_mode(name: str) -> None:
    """Its parameters can't be trained: torch says so in an error, and ours in a sentence."""
    with torch.inference_mode():
        ours = side_of()
    with pytest.raises(mm.InputError) as caught:
        train(ours, name.split(", ")[1], range(1))
    a_sentence(caught.value)


class Paused(TorchDispatchMode):
    """Another thread's work, done in the middle of this one's: before its operator of that number."""

    def __init__(self, number: int, work: Callable[[], None]) -> None:
        super().__init__()
        self.left, self.work = number, work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            thread = threading.Thread(target=self.work)
            thread.start()
            thread.join(0.3)  # whoever waits for a lock goes on afterwards
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("at", cases(["paused early", "paused late"]))
def test_threads(at: str) -> None:
    """Two threads share an engine: each has the cost of its own batch, or a refusal in a sentence."""
    assert "thread" in (mm.BackpropEngine.__doc__ or ""), "the docstring says nothing of threads"
    side = side_of()
    data = batch(1), batch(2)
    expected = [LOSSES["quadratic"](side.model(x), y).detach() for x, y in data]
    costs: list[Any] = [None, None]
    engine = made(side)
    for x, y in data:
        engine.compute_gradients(x, y)

    def run(index: int) -> None:
        try:
            costs[index] = engine.compute_gradients(*data[index])
        except mm.InputError as error:
            a_sentence(error)

    with Paused(3 if at == "paused early" else 6, lambda: run(1)):
        run(0)
    for _ in range(100):
        if costs[1] is not None:
            break
        threading.Event().wait(0.01)
    assert costs != [None, None]
    for cost, right in zip(costs, expected, strict=True):
        if cost is not None:
            same([cost], [right])


@pytest.mark.parametrize("to", cases(["engine.compute_dtype bfloat16", "engine.compute_dtype None"]))
def test_compute_dtype_is_changed(to: str) -> None:
    """As an engine that is made with it, or a refusal."""
    dtypes = {"bfloat16": torch.bfloat16, "None": None}
    dtype = dtypes[to.split()[1]]
    (old,) = set(dtypes.values()) - {dtype}
    torch.manual_seed(0)
    model = mm.MLP([4, 5, 3], "tanh")
    twin = copy.deepcopy(model)
    x, y = (data.float() for data in batch())
    engines = [
        mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), 0.2), compute_dtype=old) for net in (model, twin)
    ]
    for engine in engines:
        engine.step(x, y)
    try:
        engines[0].compute_dtype = dtype
        engines[0].step(x, y)
    except mm.InputError as error:
        a_sentence(error)
        return
    mm.BackpropEngine(twin, engines[1].optimizer, compute_dtype=dtype).step(x, y)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)
