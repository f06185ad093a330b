"""The engine's step as a CUDA graph sees it, on the CPU: fixed memory, rates in tensors, recorded once and replayed.

A graph runs again what was launched while it was captured, on the same addresses and with the same numbers. So does
`Recorded`, with torch's operators in the place of kernels: what a graph would bake in, it bakes in too.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import manual_mlp as mm
from manual_mlp import engine as engine_module
from manual_mlp.cuda_graph import Launch
from manual_mlp.engine import BackpropEngine
from tests.test_engine import OPTIMIZERS, batches, sgd

double = torch.float64


class Record(TorchDispatchMode):
    def __init__(self, tape: list[Any]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tape.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


class Recorded(Launch):
    """First as it is, then recorded, then replayed."""

    calls_made = 0

    def __call__(self) -> None:
        self.calls_made += 1
        if self.calls_made == 1:
            self.calls()
        elif self.calls_made == 2:
            self.tape: list[Any] = []
            with Record(self.tape):
                self.calls()
        else:
            for function, args, kwargs in self.tape:
                function(*args, **kwargs)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "Launch", Recorded)


def fixed_engine(*arguments: Any, **more: Any) -> BackpropEngine:
    engine = BackpropEngine(*arguments, **more)
    engine._graphed = True
    return engine


def net(loss: str = "quadratic", **arguments: Any) -> Any:
    torch.manual_seed(0)
    last = "sigmoid" if loss in ("quadratic", "mse") else "identity"
    more = {"activation": ["tanh", "gelu"], "output_activation": last, "dtype": double}
    return mm.MLP([4, 5, 6, 3], **{**more, **arguments})


def groups(model: Any) -> torch.optim.Optimizer:
    """Weights decay, biases don't; the rates differ."""
    weights, biases = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    return torch.optim.SGD([{"params": weights, "weight_decay": 0.1, "lr": 0.2}, {"params": biases}], lr=0.05)


def by_name(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda model: OPTIMIZERS.get(name, sgd)(model.parameters())


def assert_equal_training(
    model: Any,
    make: Callable[[Any], torch.optim.Optimizer] = groups,
    data: Any = None,
    tolerance: float = 1e-12,
    **more: Any,
) -> None:
    """40 steps beside the ordinary engine, the learning rate another at each."""
    trained = []
    for of in (BackpropEngine, fixed_engine):
        mine = copy.deepcopy(model)
        engine = of(mine, optimizer := make(mine), **more)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
        torch.manual_seed(1)
        costs = []
        for input, target in (data or batches(more.get("loss", "quadratic"))) * 8:
            costs.append(engine.step(input, target))
            schedule.step()
        trained.append([torch.stack(costs), *mine.parameters(), engine.compute_gradients(input, target)])
        trained[-1] += [parameter.grad for parameter in mine.parameters()]
    for ordinary, fixed in zip(*trained, strict=True):
        assert not fixed.is_inference()
        torch.testing.assert_close(fixed, ordinary, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", ["quadratic", "mse", "bce", "cross_entropy"])
def test_costs(loss: str) -> None:
    assert_equal_training(net(loss), loss=loss)


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "leaky_relu", "softplus", "silu"])
def test_activations(activation: str) -> None:
    assert_equal_training(net(activation=activation))


@pytest.mark.parametrize("name", ["sgd", "decay", "momentum", "adam"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_optimizers(name: str, clip: float | None) -> None:
    assert_equal_training(net(), by_name(name), max_grad_norm=clip)


def test_class_indices_and_batches_of_several_sizes() -> None:
    data = [(x[:n], torch.randint(0, 3, (n,))) for n in (7, 3, 7, 5) for x, _ in batches()[:1]]
    assert_equal_training(net("cross_entropy"), data=data, loss="cross_entropy")


def test_a_layer_that_lies_by_columns() -> None:
    """As one does that was trained on a GPU and then moved: 2 to 31 neurons and 32 rows or more."""
    ours, theirs = net(), net()
    input, target = torch.randn(40, 4, dtype=double), torch.rand(40, 3, dtype=double)
    engine, plain = fixed_engine(ours, sgd(ours.parameters())), BackpropEngine(theirs, sgd(theirs.parameters()))
    for _ in range(3):
        torch.testing.assert_close(engine.step(input, target), plain.step(input, target), rtol=1e-12, atol=0)


def test_without_bias_and_with_dropout() -> None:
    assert_equal_training(net(bias=False), by_name("decay"))
    assert_equal_training(net(dropout=0.3))


def test_dropout_that_changes_is_captured_again() -> None:
    model, (input, target) = net(dropout=0.3), batches()[0]
    engine = fixed_engine(model, sgd(model.parameters()))
    for p in (0.3, 0.3, 0.3, 1.0, 1.0, 1.0):
        model[1].p = model[3].p = p
        torch.manual_seed(3)
        expected = mm.functional.quadratic_loss(model(input), target).detach()
        torch.manual_seed(3)
        torch.testing.assert_close(engine.step(input, target), expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_products() -> None:
    data = [(x.float(), y.float()) for x, y in batches(n=64)]
    assert_equal_training(net(dtype=torch.float32), data=data, tolerance=1e-2, compute_dtype=torch.bfloat16)


def test_bfloat16_parameters_keep_their_rate() -> None:
    """A rate in a bfloat16 tensor would be rounded: such a net takes the optimizer's own step."""
    data = [(x.bfloat16(), y.bfloat16()) for x, y in batches(n=64)]
    assert_equal_training(net(dtype=torch.bfloat16), data=data, tolerance=2e-2)


def test_epochs() -> None:
    x, y = torch.randn(45, 4, dtype=double), torch.rand(45, 3, dtype=double)
    costs = []
    for of in (BackpropEngine, fixed_engine):
        model = net()
        engine, prediction = of(model, groups(model)), torch.empty_like(y)
        means = [engine.train_epoch(x, y, 8, torch.Generator().manual_seed(seed)) for seed in range(3)]
        means.append(engine.train_batches(x, y, 8, prediction))
        costs.append([*means, *model.parameters(), prediction])
    torch.testing.assert_close(*costs, rtol=1e-12, atol=1e-12)


def test_parameters_elsewhere_are_captured_again() -> None:
    model, (input, target) = net(), batches()[0]
    engine = fixed_engine(model, sgd(model.parameters()))
    for step in range(12):
        if step % 4 == 3:
            for parameter in model.parameters():
                parameter.data = parameter.data * 0.9
        expected = mm.functional.quadratic_loss(model(input), target).detach()
        torch.testing.assert_close(engine.step(input, target), expected, rtol=1e-12, atol=1e-12)


def test_a_batch_that_a_copy_would_convert_is_refused() -> None:
    model, (input, target) = net(), batches()[0]
    engine = fixed_engine(model, sgd(model.parameters()))
    engine.step(input, target)
    with pytest.raises(mm.InputError, match=r"an input of shape .* and torch\.float64"):
        engine.step(input.float(), target)
    with pytest.raises(mm.InputError, match=r"a target of shape .* and torch\.float64"):
        engine.step(input, target.float())


def test_the_tape_bakes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rates as numbers the proofs above would fail."""

    def number(self: Any, *arguments: Any) -> Any:
        self.rates_lie_in_tensors = False
        sink = original(self, *arguments)
        self.rates_lie_in_tensors = True
        return sink

    original = engine_module.BoundPlan._sink
    monkeypatch.setattr(engine_module.BoundPlan, "_sink", number)
    with pytest.raises(AssertionError, match="not close"):
        assert_equal_training(net())
