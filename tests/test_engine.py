"""The engine beside autograd and torch.optim: 100 steps to 1e-12; and what it notices, honours and refuses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

import manual_mlp as mm
from manual_mlp import formulas as sheet
from manual_mlp.engine import BackpropEngine
from manual_mlp.formulas import ACTIVATIONS, Activation
from tests.cases import TWINS, row_parameters

double = torch.float64
Optimizer = Callable[[Any], torch.optim.Optimizer]


class Twin(nn.Module):
    """An activation by torch's own function."""

    def __init__(self, name: str, parameters: tuple[float, ...]) -> None:
        super().__init__()
        self.name, self.parameter_values = name, parameters

    def forward(self, z: Tensor) -> Tensor:
        return TWINS[self.name](z, *self.parameter_values)


def quadratic(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum() / (2 * len(prediction))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quadratic": quadratic,
    "mse": torch_functional.mse_loss,
    "bce": torch_functional.binary_cross_entropy_with_logits,
    "cross_entropy": torch_functional.cross_entropy,
}


def net(row: str = "sigmoid", parameters: tuple[float, ...] = (), loss: str = "quadratic", bias: bool = True) -> Any:
    """Ours, 4-5-6-3, the row in every layer but before a logits cost."""
    last = row if loss in ("quadratic", "mse") else "identity"
    sizes = [4, 5, 6, 3]
    layers = [mm.AffineActivation(i, o, "identity", bias, dtype=double) for i, o in itertools.pairwise(sizes)]
    for layer, name in zip(layers, (row, row, last), strict=True):
        layer.activation, layer.parameter_values = name, parameters if name == row else ()
    return nn.Sequential(*layers)


def torch_twin(ours: Any) -> nn.Sequential:
    """The same net of torch's own layers, with copies of the parameters."""
    layers: list[nn.Module] = []
    for layer in ours:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=double)
        linear.load_state_dict(layer.state_dict())
        layers += [linear, Twin(layer.activation, layer.parameter_values)]
    return nn.Sequential(*layers)


def batches(loss: str = "quadratic", n: int = 7, count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, n, 4, generator=generator, dtype=double)
    y = torch.rand(count, n, 3, generator=generator, dtype=double)
    if loss == "cross_entropy":
        y = y / y.sum(-1, keepdim=True)
    return list(zip(x, y, strict=True))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def train_torch(model: nn.Module, optimizer: Any, data: Any, loss: str, steps: int, clip: float | None = None) -> Any:
    costs = []
    for step in range(steps):
        input, target = data[step % len(data)]
        optimizer.zero_grad()
        cost = LOSSES[loss](model(input), target)
        cost.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        costs.append(cost.detach())
    return torch.stack(costs)


def train_ours(engine: BackpropEngine, data: Any, steps: int) -> Tensor:
    return torch.stack([engine.step(*data[step % len(data)]) for step in range(steps)])


def assert_same(ours: nn.Module, twin: nn.Module, tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def compare(ours: Any, make: Optimizer, loss: str = "quadratic", clip: float | None = None, data: Any = None) -> None:
    """100 steps: the same costs, parameters and optimizer state."""
    twin = torch_twin(ours)
    mine, theirs = make(ours.parameters()), make(twin.parameters())
    data = data or batches(loss)
    costs = train_ours(BackpropEngine(ours, mine, loss, max_grad_norm=clip), data, 100)
    torch.testing.assert_close(costs, train_torch(twin, theirs, data, loss, 100, clip), rtol=1e-12, atol=1e-12)
    assert_same(ours, twin)
    states = mine.state_dict()["state"], theirs.state_dict()["state"]
    torch.testing.assert_close(*states, rtol=1e-11, atol=1e-12)


ROWS = [(row, parameters) for row in ACTIVATIONS.values() for parameters in row_parameters(row)]
rows = pytest.mark.parametrize(("row", "parameters"), ROWS, ids=[f"{row.name}{p or ''}" for row, p in ROWS])


@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_in_place_form_is_the_row(row: Activation, parameters: tuple[float, ...], dtype: torch.dtype) -> None:
    """G_ and delta_ beside G and delta over −40 … 40, where an infinite g passes or stops as it does there."""
    eps = 1e-12 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    z = torch.cat([torch.linspace(-40, 40, 1601, dtype=double), torch.zeros(1, dtype=double)]).to(dtype)
    g = torch.linspace(-2, 3, len(z), dtype=double).to(dtype)
    expected_a = row.G(z, *parameters)
    expected = row.delta(g, expected_a if row.saves == "a" else z, *parameters)
    G_, delta_ = sheet.in_place(row)
    z_ = z.clone()
    a = z_ if row.saves == "a" else torch.full_like(z, torch.nan)
    G_(z_, *parameters, out=a)
    torch.testing.assert_close(a, expected_a, rtol=eps, atol=eps)
    work, mask = torch.full_like(z, torch.nan), torch.ones_like(z, dtype=torch.bool)
    delta_(g, a, None if row.saves == "a" else z_, work, mask, *parameters)
    torch.testing.assert_close(g, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "identity"])
def test_in_place_form_at_infinity(name: str) -> None:
    row = ACTIVATIONS[name]
    parameters = row_parameters(row)[0]
    a, g = torch.tensor([-1.0, 0.0, 2.0, torch.nan]), torch.full((4,), torch.inf)
    expected = row.delta(g, a, *parameters)
    sheet.in_place(row)[1](g, a, None, torch.empty(4), torch.empty(4, dtype=torch.bool), *parameters)
    torch.testing.assert_close(g, expected, equal_nan=True)


def test_a_row_without_forms_of_its_own_is_copied() -> None:
    row = Activation("cube", lambda z: z**3, lambda g, z: g * (3 * z * z), "z", "z**3", "g*3*z**2")
    G_, delta_ = sheet.in_place(row)
    z, a, g = torch.linspace(-1, 1, 5), torch.empty(5), torch.ones(5)
    G_(z, out=a)
    delta_(g, a, z, torch.empty(5), torch.empty(5, dtype=torch.bool))
    torch.testing.assert_close(a, z**3)
    torch.testing.assert_close(g, 3 * z * z)


@rows
@pytest.mark.parametrize("loss", LOSSES)
def test_a_hundred_steps(row: Activation, parameters: tuple[float, ...], loss: str) -> None:
    compare(net(row.name, parameters, loss), sgd, loss)


OPTIMIZERS: dict[str, Optimizer] = {
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    "tensor_lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1, dtype=double)),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    compare(net("tanh"), OPTIMIZERS[name])


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_clipping(name: str) -> None:
    compare(net("relu"), OPTIMIZERS.get(name, sgd), clip=0.05)


def test_without_bias() -> None:
    compare(net("sigmoid", bias=False), sgd)


def test_class_indices() -> None:
    data = [(x, torch.randint(0, 3, (len(x),))) for x, _ in batches()]
    compare(net("relu", loss="cross_entropy"), sgd, "cross_entropy", data=data)


def test_batches_of_several_sizes() -> None:
    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(count=9) + batches(count=3), range(1, 8), strict=False)]
    compare(net("tanh"), sgd, data=data)


def test_groups_and_schedulers() -> None:
    """The learning rates are read at each step; a scheduler doesn't complain."""
    ours = net("tanh")
    twin = torch_twin(ours)

    def make(model: Any) -> Any:
        weights = [p for p in model.parameters() if p.dim() == 2]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 1]}]
        optimizer = torch.optim.SGD(groups, lr=0.2)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)

    (mine, my_schedule), (theirs, their_schedule) = make(ours), make(twin)
    engine = BackpropEngine(ours, mine)
    for _ in range(5):
        train_ours(engine, batches(), 4)
        my_schedule.step()
        train_torch(twin, theirs, batches(), "quadratic", 4)
        their_schedule.step()
    assert_same(ours, twin)
    assert mine.state_dict() == theirs.state_dict()
