"""Random programs: a net in training, changed between its steps in every way a program may, beside plain autograd.

After each operation both sides train: the parameters and the cost are the same, or ours refused in a sentence, trained
nothing, and the operation is undone. `python -m tests.test_sequences 17` prints the operations of sequence 17.
"""

import copy
import functools
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

import manual_mlp as mm
from manual_mlp.network import network_loss

double = torch.float64
Undo = Callable[[], object] | None
Operation = Callable[["Side"], Undo]
"""A change to one side, which gives back what undoes it, or None: then a refusal leaves it, on both sides."""


@dataclass
class Side:
    """A model in training, by the engine or by autograd."""

    model: nn.Sequential
    optimizer: Any
    ours: bool
    loss: str = "quadratic"
    clip: float | None = None
    engine: Any = None
    schedulers: tuple[Any, ...] = ()
    handles: tuple[Any, ...] = ()

    def train(self, way: str, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """One step, or an epoch of steps → the cost."""
        torch.default_generator.manual_seed(seed)
        batch_size = 4 if way in ("epoch", "batches") else len(x)
        if self.ours and way in ("network", "network twice"):
            return self.by_autograd(way, x, y, lambda: network_loss(self.model, x, y, self.loss))
        if self.ours:
            engine = self.made()
            if way == "step":
                return engine.step(x, y)  # type: ignore[no-any-return]
            if way == "gradients":
                self.zero_grad()
                cost = engine.compute_gradients(x, y)
                self.stepped()
                return cost  # type: ignore[no-any-return]
            generator = torch.Generator().manual_seed(seed)
            return (  # type: ignore[no-any-return]
                engine.train_epoch(x, y, batch_size, generator)
                if way == "epoch"
                else engine.train_batches(x, y, batch_size)
            )
        if way not in ("epoch", "batches"):
            return self.by_autograd(way, x, y, lambda: LOSSES[self.loss](self.model(x), y))
        order = torch.arange(len(x))
        if way == "epoch":
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        costs = torch.zeros((), dtype=x.dtype)
        for rows in order.split(batch_size):
            cost = self.by_autograd(way, x, y, lambda rows=rows: LOSSES[self.loss](self.model(x[rows]), y[rows]))  # type: ignore[misc]
            costs += cost * len(rows) / len(x)
        return costs

    def by_autograd(self, way: str, x: Tensor, y: Tensor, cost_of: Callable[[], Tensor]) -> Tensor:
        self.zero_grad()
        cost = cost_of()
        (cost if way != "network twice" else cost * 2 - cost.square()).backward()
        self.stepped()
        return cost.detach()

    def zero_grad(self) -> None:
        """Also of parameters that were taken out of the optimizer: they count where gradients are clipped."""
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def stepped(self) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()

    def made(self) -> Any:
        if self.engine is None:
            self.engine = mm.BackpropEngine(self.model, self.optimizer, self.loss, self.clip)
        return self.engine

    def kept(self, handle: Any) -> Undo:
        """A hook's handle, which `remove_hooks` removes; and what undoes it."""
        self.handles += (handle,)

        def undo() -> None:
            handle.remove()
            self.handles = tuple(other for other in self.handles if other is not handle)

        return undo

    @property
    def affine(self) -> list[Any]:
        """The layers that hold parameters."""
        return [module for module in self.model if hasattr(module, "weight")]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quadratic": lambda a, y: (a - y).square().sum() / (2 * len(a)),
    "mse": torch_functional.mse_loss,
}
WAYS = ("step", "step", "epoch", "batches", "gradients", "network", "network twice")
NAMES = ("sigmoid", "tanh", "relu", "softplus", "silu", "gelu", "identity")
NETS: tuple[Callable[[], nn.Sequential], ...] = (
    lambda: mm.MLP([4, 5, 5, 3], "tanh", dtype=double),
    lambda: mm.MLP([4, 5, 5, 3], ["gelu", "sigmoid"], "identity", dtype=double),
    lambda: mm.MLP([4, 5, 5, 3], "sigmoid", dropout=0.2, dtype=double),
    lambda: nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.LeakyReLU(0.1), nn.Dropout(0.2), nn.Linear(5, 3), nn.Sigmoid()
    ).double(),
    lambda: nn.Sequential(
        nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 5, bias=False), nn.GELU(), nn.Linear(5, 3)
    ).double(),
    lambda: mm.convert(nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3), nn.Tanh()).double()),  # type: ignore[return-value]
)


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.01}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1)
    if kind == "momentum":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.5)
    return torch.optim.AdamW(groups, lr=0.01) if kind == "adamw" else torch.optim.Adam(groups, lr=0.01)


def assigned(owner: Any, **values: Any) -> Undo:
    """setattr, and back."""
    old = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    return lambda: [setattr(owner, name, value) for name, value in old.items()]


def updated(group: dict[str, Any], **values: Any) -> Undo:
    old = {name: group[name] for name in values}
    group.update(values)
    return lambda: group.update(old)


# ---------------------------------------------------------------------------------------------------------------------
# Operations whose right value can be had: none may be refused
# ---------------------------------------------------------------------------------------------------------------------


def set_option(rng: random.Random) -> Operation:
    index, kind = rng.randrange(2), rng.randrange(4)
    value = rng.uniform(0.01, 0.2)

    def run(side: Side) -> Undo:
        group = side.optimizer.param_groups[index % len(side.optimizer.param_groups)]
        values: dict[str, Any] = {"lr": value}
        if kind == 1:
            values = {"weight_decay": value}
        elif kind == 2:
            values = {"maximize": not group["maximize"], "lr": value / 10}
        elif kind == 3 and "momentum" in group:
            values = {"momentum": value}
        return updated(group, **values)

    return run


def freeze(rng: random.Random) -> Operation:
    which = rng.randrange(6)

    def run(side: Side) -> Undo:
        parameters = list(side.model.parameters())
        one = parameters[which % len(parameters)]
        if one.requires_grad and sum(parameter.requires_grad for parameter in parameters) == 1:
            return None
        one.requires_grad_(not one.requires_grad)
        return lambda: one.requires_grad_(not one.requires_grad)

    return run


def activate(rng: random.Random) -> Operation:
    which, name, number = rng.randrange(4), rng.choice(NAMES), rng.uniform(0.1, 2.0)

    def run(side: Side) -> Undo:
        fused = [module for module in side.model if isinstance(module, mm.AffineActivation)]
        if fused:
            values = (number, 20.0) if name == "softplus" else ()
            return assigned(fused[which % len(fused)], activation=name, parameter_values=values)
        for module in side.model:
            for attribute in ("negative_slope", "beta"):
                if hasattr(module, attribute):
                    return assigned(module, **{attribute: number})
            if hasattr(module, "approximate"):
                return assigned(module, approximate="tanh" if module.approximate == "none" else "none")
        return None

    return run


def move_parameter(rng: random.Random) -> Operation:
    which = rng.randrange(8)

    def run(side: Side) -> Undo:
        one, other = side.optimizer.param_groups[:2]
        one, other = (one, other) if len(one["params"]) >= len(other["params"]) else (other, one)
        parameter = one["params"].pop(which % len(one["params"]))
        other["params"].append(parameter)
        return None

    return run


def rearrange_groups(rng: random.Random) -> Operation:
    kind, lr = rng.randrange(3), rng.uniform(0.01, 0.1)

    def run(side: Side) -> Undo:
        groups = side.optimizer.param_groups
        if kind == 0:
            groups.reverse()
        elif kind == 1:
            groups[0] = {**groups[0], "params": list(groups[0]["params"]), "lr": lr}
        else:
            side.optimizer.param_groups = [{**group, "params": group["params"][::-1]} for group in groups]
        return None

    return run


def swap_data(rng: random.Random) -> Operation:
    which, kind = rng.randrange(6), rng.randrange(4)

    def run(side: Side) -> Undo:
        parameters = list(side.model.parameters())
        one = parameters[which % len(parameters)]
        if kind == 0:
            one.data = one.data * 0.9
        elif kind == 1 and one.dim() == 2:
            one.data = one.data.t().contiguous().t()
        elif kind == 2:
            wider = torch.zeros(*one.shape, 2, dtype=one.dtype)
            wider[..., 0] = one.data
            one.data = wider[..., 0]
        else:
            one.data.mul_(0.9)
        return None

    return run


def load(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        side.model.load_state_dict({key: value * 0.9 for key, value in side.model.state_dict().items()})
        return None

    return run


def through_float32(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        side.model.float().double()
        return None

    return run


def toggle_mode(rng: random.Random) -> Operation:
    kind, p = rng.randrange(3), rng.choice([0.0, 0.3, 0.6])

    def run(side: Side) -> Undo:
        if kind < 2:
            side.model.train(not side.model.training)
            return lambda: side.model.train(not side.model.training)
        dropouts = [module for module in side.model if isinstance(module, nn.Dropout)]
        return assigned(dropouts[0], p=p) if dropouts else None

    return run


def zero_grad(rng: random.Random) -> Operation:
    to_none = rng.random() < 0.5

    def run(side: Side) -> Undo:
        side.optimizer.zero_grad(set_to_none=to_none)
        return None

    return run


def stale_gradients(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        for parameter in side.model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        return None

    return run


def copied(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        if side.handles or side.schedulers:
            return None
        side.model, side.optimizer = copy.deepcopy((side.model, side.optimizer))
        side.engine = None
        return None

    return run


def copied_with_its_engine(rng: random.Random) -> Operation:
    """An engine's copy trains its own model. A refused copy is no change."""

    def run(side: Side) -> Undo:
        if side.handles or side.schedulers:
            return None
        try:
            side.model, side.optimizer, side.engine = copy.deepcopy((side.model, side.optimizer, side.engine))
        except mm.InputError:
            side.model, side.optimizer = copy.deepcopy((side.model, side.optimizer))
            side.engine = None
        return None

    return run


def new_optimizer(rng: random.Random) -> Operation:
    kind = rng.choice(["sgd", "momentum", "adam", "adamw"])

    def run(side: Side) -> Undo:
        side.optimizer, side.schedulers, side.engine = optimizer_of(kind, side.model), (), None
        return None

    return run


def new_layer(rng: random.Random) -> Operation:
    """A layer in the place of another, or one less, and an optimizer over what is there now."""
    remove, kind, seed = rng.random() < 0.3, rng.choice(["sgd", "adam"]), rng.randrange(100)

    def run(side: Side) -> Undo:
        if side.handles:
            return None
        torch.default_generator.manual_seed(seed)
        places = [name for name, module in side.model.named_children() if hasattr(module, "weight")]
        if remove and len(places) == 3:
            for name in list(side.model._modules):  # with its activation and dropout
                if int(places[1]) <= int(name) < int(places[2]):
                    del side.model._modules[name]
        else:
            layer = side.model._modules[places[0]]
            assert layer is not None
            other: Any = copy.deepcopy(layer)
            other.reset_parameters()
            side.model._modules[places[0]] = other
        side.optimizer, side.schedulers, side.engine = optimizer_of(kind, side.model), (), None
        return None

    return run


def schedule(rng: random.Random) -> Operation:
    kind = rng.randrange(3)

    def run(side: Side) -> Undo:
        lr_scheduler = torch.optim.lr_scheduler
        makes: list[Callable[[], Any]] = [
            lambda: lr_scheduler.ExponentialLR(side.optimizer, 0.9),
            lambda: lr_scheduler.StepLR(side.optimizer, 2),
            lambda: lr_scheduler.LambdaLR(side.optimizer, lambda t: 1 / (1 + t)),
        ]
        if len({len(side.optimizer.param_groups), 2}) == 1 and not side.schedulers:
            side.schedulers = (makes[kind](),)
        return None

    return run


def reload_optimizer(rng: random.Random) -> Operation:
    clear = rng.random() < 0.5

    def run(side: Side) -> Undo:
        held = {parameter for group in side.optimizer.param_groups for parameter in group["params"]}
        if clear or not held >= side.optimizer.state.keys():  # torch can't save a state whose parameter was taken out
            side.optimizer.state.clear()
        else:
            side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))
        return None

    return run


def look(rng: random.Random) -> Operation:
    """A cost without a step, in another mode."""
    mode = rng.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])

    def run(side: Side) -> Undo:
        x, y = batch(0, 6)
        with mode():
            if side.ours:
                network_loss(side.model, x, y, side.loss)
            else:
                side.model(x)
        return None

    return run


def optimizer_hook(rng: random.Random) -> Operation:
    after = rng.random() < 0.5

    def pre(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)

    def post(optimizer: Any, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)

    def run(side: Side) -> Undo:
        optimizer = side.optimizer
        handle = optimizer.register_step_post_hook(post) if after else optimizer.register_step_pre_hook(pre)
        return handle.remove  # type: ignore[no-any-return]

    return run


def step_replaced(rng: random.Random) -> Operation:
    factor = rng.choice([0.5, 2.0, 0.0])

    def run(side: Side) -> Undo:
        old = side.optimizer.step

        def step(self: Any, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            return old(closure)

        side.optimizer.step = MethodType(step, side.optimizer)
        return None

    return run


def change_clip(rng: random.Random) -> Operation:
    """Another engine, with another bound; `engine.max_grad_norm = …` is among what may be refused."""
    to = rng.choice([None, 0.01, 1.0])

    def run(side: Side) -> Undo:
        side.clip, side.engine = to, None
        return None

    return run


def train_on(rng: random.Random) -> Operation:
    return lambda side: None


GENTLE: tuple[Callable[[random.Random], Operation], ...] = (
    train_on, train_on, set_option, set_option, freeze, activate, activate, move_parameter, rearrange_groups, swap_data,
    load, through_float32, toggle_mode, zero_grad, stale_gradients, copied, copied_with_its_engine, new_optimizer,
    new_layer, schedule, schedule, reload_optimizer, look, optimizer_hook, step_replaced, change_clip,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Operations that may be refused
# ---------------------------------------------------------------------------------------------------------------------


def parameter_hook(rng: random.Random) -> Operation:
    which, post = rng.randrange(6), rng.random() < 0.5

    def halve(parameter: Any) -> None:
        parameter.grad.mul_(0.5)

    def run(side: Side) -> Undo:
        trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
        one = trained[which % len(trained)]
        handle = one.register_post_accumulate_grad_hook(halve) if post else one.register_hook(lambda g: g * 0.5)
        return side.kept(handle)

    return run


def module_hook(rng: random.Random) -> Operation:
    which, kind = rng.randrange(8), rng.randrange(3)

    def run(side: Side) -> Undo:
        modules = [side.model, *side.model]
        one = modules[which % len(modules)]
        registers: list[Callable[[], Any]] = [
            lambda: one.register_forward_hook(lambda m, i, o: o * 1.5),
            lambda: one.register_forward_pre_hook(lambda m, i: (i[0] * 1.5,)),
            lambda: one.register_full_backward_pre_hook(lambda m, o: (o[0] * 1.5,)),
        ]
        handle = registers[kind]()
        return side.kept(handle)

    return run


def remove_hooks(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        for handle in side.handles:
            handle.remove()
        side.handles = ()
        return None

    return run


def forward_replaced(rng: random.Random) -> Operation:
    which = rng.randrange(8)

    def run(side: Side) -> Undo:
        modules = [side.model, *side.model]
        one = modules[which % len(modules)]
        forward = one.forward
        one.forward = lambda a: forward(a) * 1.5
        return lambda: vars(one).pop("forward", None)

    return run


def take_out(rng: random.Random) -> Operation:
    which = rng.randrange(4)

    def run(side: Side) -> Undo:
        parameters = side.optimizer.param_groups[0]["params"]
        if not parameters:
            return None
        index = which % len(parameters)
        parameter = parameters.pop(index)
        return lambda: parameters.insert(index, parameter)

    return run


def weight_replaced(rng: random.Random) -> Operation:
    """The optimizer still holds the old one."""

    def run(side: Side) -> Undo:
        layer = side.affine[0]
        return assigned(layer, weight=nn.Parameter(layer.weight.detach() * 0.9))

    return run


def loaded_by_assignment(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        old = dict(side.model.named_parameters())
        state = {key: value.detach() * 0.9 for key, value in side.model.state_dict().items()}
        side.model.load_state_dict(state, assign=True)
        return lambda: [side.model.get_submodule(key.split(".")[0]).register_parameter(key.split(".")[1], value)
                        for key, value in old.items()]  # fmt: skip

    return run


def another_module(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        if "99" in side.model._modules:
            return None
        side.model.add_module("99", nn.ELU())
        return lambda: side.model._modules.pop("99")

    return run


def change_loss(rng: random.Random) -> Operation:
    def run(side: Side) -> Undo:
        to = "mse" if side.loss == "quadratic" else "quadratic"

        def assign(loss: str) -> None:
            if side.engine is not None:
                side.engine.loss = loss
            side.loss = loss

        old = side.loss
        assign(to)
        return lambda: assign(old)

    return run


def change_engines_clip(rng: random.Random) -> Operation:
    to = rng.choice([None, 0.02, 0.5])

    def run(side: Side) -> Undo:
        old = side.clip
        if side.engine is not None:
            side.engine.max_grad_norm = to
        side.clip = to

        def back() -> None:
            side.clip, side.engine = old, None

        return back

    return run


def wrong_batch(rng: random.Random) -> Operation:
    """Refused, whatever there is; and the next right batch is trained as if it had not been."""
    kind, way = rng.randrange(4), rng.choice(["step", "epoch", "gradients", "network"])

    def run(side: Side) -> Undo:
        if side.ours:
            x, y = batch(0, 6)
            wrong: list[tuple[Any, Any]] = [(x.numpy(), y), (x, np.asarray(y)), (x[:, :2], y), (x, y[:, :2])]
            with pytest.raises(mm.InputError):
                side.train(way, *wrong[kind], seed=0)
        return None

    return run


ROUGH = (
    *GENTLE, parameter_hook, module_hook, remove_hooks, remove_hooks, forward_replaced, take_out, weight_replaced,
    loaded_by_assignment, another_module, change_loss, change_engines_clip, wrong_batch, wrong_batch,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------------------------------


def batch(seed: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=double), torch.rand(n, 3, generator=generator, dtype=double)


@functools.cache
def refusals(number: int, length: int = 10, say: Callable[[str], object] = lambda line: None) -> int:
    """How often ours refused in the sequence of that number. Raises AssertionError at the first difference."""
    rng = random.Random(number)
    gentle, kind, net = number % 5 < 3, rng.choice(["sgd", "sgd", "momentum", "adam"]), rng.choice(NETS)
    torch.default_generator.manual_seed(number)
    model = net()
    twin = copy.deepcopy(model)
    ours, theirs = Side(model, optimizer_of(kind, model), True), Side(twin, optimizer_of(kind, twin), False)
    count = 0
    say(f"{kind} {model}")
    for index in range(length):
        make, way, n = rng.choice(GENTLE if gentle else ROUGH), rng.choice(WAYS), rng.choice([1, 6, 6, 9, 40])
        operation, x_y, seed = make(rng), batch(rng.randrange(1000), n), rng.randrange(1000)
        if n == 40 and way in ("epoch", "batches"):
            x_y = (x_y[0][:10], x_y[1][:10])
        say(f"{index}: {make.__name__}, {way} of {n}")
        undo: Undo = None
        before = None
        try:
            undo = operation(ours)
            before = [parameter.detach().clone() for parameter in ours.model.parameters()]
            cost = ours.train(way, *x_y, seed)
        except mm.InputError as error:
            say(f"   refused: {error}")
            refused_rightly(error, gentle, ours, before)
            if undo is not None:
                undo()
            elif before is not None:  # the operation itself was not refused
                operation(theirs)
            count += 1
            continue
        operation(theirs)
        expected = theirs.train(way, *x_y, seed)
        mine, other = ([p.detach() for p in side.model.parameters()] for side in (ours, theirs))
        torch.testing.assert_close([cost, *mine], [expected, *other], rtol=1e-9, atol=1e-9, equal_nan=True)
        for scheduler in itertools.chain(ours.schedulers, theirs.schedulers):
            scheduler.step()
    return count


def refused_rightly(error: mm.InputError, gentle: bool, side: Side, before: list[Tensor] | None) -> None:
    """In a sentence, in a sequence where that may be, and before anything was trained."""
    assert str(error).startswith("expected "), error
    assert not gentle, error
    if before is not None:
        torch.testing.assert_close([p.detach() for p in side.model.parameters()], before, rtol=0, atol=0)


@pytest.mark.parametrize("number", range(60))
def test_sequence(number: int) -> None:
    refusals(number)


def half_are_not_refused(numbers: range) -> None:
    refused = sum(refusals(number) > 0 for number in numbers)
    assert len(numbers) - refused >= len(numbers) / 2


def test_half_of_the_sequences_are_not_refused() -> None:
    half_are_not_refused(range(60))


# torch says so to both sides, where an operation replaces optimizer.step below a scheduler
@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")
@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_sequences(block: int) -> None:
    half_are_not_refused(range(60 + 300 * block, 360 + 300 * block))


if __name__ == "__main__":
    refusals(int(sys.argv[1]), say=print)
