"""The engine's max_sample_norm beside a loop over the samples by autograd: each gradient clipped, then their mean."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp.engine import BackpropEngine
from manual_mlp.formulas import Row
from tests.cases import rows
from tests.test_engine import LOSSES, OPTIMIZERS, assert_same, batches, net, sgd, torch_twin
from tests.test_graph import Draw

double = torch.float64
C = 0.05  # of norms of about 0.02 to 0.3, so that some samples are clipped and others are not


def clipped_step(
    twin: nn.Module, optimizer: Any, x: Tensor, target: Tensor, loss: str, c: float, clip: float | None = None
) -> tuple[Tensor, list[bool]]:
    """One step by the definition. Return the cost, and which samples were clipped."""
    cost = LOSSES[loss](twin(x), target).detach()
    trained = [p for p in twin.parameters() if p.requires_grad]
    total, clipped = [torch.zeros_like(p) for p in trained], []
    for n in range(len(x)):
        gradients = torch.autograd.grad(LOSSES[loss](twin(x[n : n + 1]), target[n : n + 1]), trained)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        clipped.append(norm > c)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient * min(1.0, c / norm if norm else 1.0) / len(x)
    for parameter, gradient in zip(trained, total, strict=True):
        parameter.grad = gradient
    if clip is not None:
        nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    return cost, clipped


def compare(ours: Any, make: Any, loss: str, data: Any, steps: int = 10, c: float = C, **more: Any) -> None:
    twin = torch_twin(ours)
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        theirs.requires_grad_(mine.requires_grad)
    mine, theirs = (make([p for p in of.parameters() if p.requires_grad]) for of in (ours, twin))
    engine, clipped = BackpropEngine(ours, mine, loss, max_sample_norm=c, **more), []
    for step in range(steps):
        batch = data[step % len(data)]
        cost, of_step = clipped_step(twin, theirs, *batch, loss, c, more.get("max_grad_norm"))
        torch.testing.assert_close(engine.step(*batch), cost, rtol=1e-12, atol=1e-12)
        clipped += of_step
    assert_same(ours, twin)
    assert True in clipped or c != C, "no sample was clipped: choose a smaller c"


@rows
@pytest.mark.parametrize("n", [7, 40])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_row_and_cost(row: Row, loss: str, n: int) -> None:
    """Of many rows the engine keeps narrow layers column by column."""
    torch.manual_seed(0)
    compare(net(row.twin(), loss), sgd, loss, batches(loss, n, 2), 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    """Weight decay, momentum and the rest come after the clipping."""
    torch.manual_seed(0)
    compare(net(), OPTIMIZERS[name], "quadratic", batches())


def test_beside_max_grad_norm() -> None:
    torch.manual_seed(0)
    compare(net(), sgd, "quadratic", batches(), max_grad_norm=0.03)


def test_without_bias() -> None:
    torch.manual_seed(0)
    compare(net(bias=False), sgd, "quadratic", batches())


FROZEN = [("0.weight",), ("0.bias", "1.weight"), ("0.weight", "0.bias"), ("2.weight", "2.bias")]


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_are_not_in_the_norm(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    ours = net("tanh")
    for name in frozen:
        ours.get_parameter(name).requires_grad_(False)
    compare(ours, sgd, "quadratic", batches())


def test_equal_to_curvature() -> None:
    torch.manual_seed(0)
    ours, (x, target) = net("silu"), batches()[0]
    expected = mm.curvature(ours, x, target).clipped(C)
    engine = BackpropEngine(ours, sgd(ours.parameters()), max_sample_norm=C)
    engine.compute_gradients(x, target)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_epochs(optimizer: str, activation: str) -> None:
    """train_epoch, the last batch a shorter one: the same steps as `step` makes."""
    torch.manual_seed(0)
    by_epoch = net(activation)
    by_step = copy.deepcopy(by_epoch)
    x, target = torch.randn(23, 4, dtype=double), torch.rand(23, 3, dtype=double)
    engines = [
        BackpropEngine(of, getattr(torch.optim, optimizer)(of.parameters(), lr=0.1), max_sample_norm=C)
        for of in (by_epoch, by_step)
    ]
    engines[0].train_epoch(x, target, 5, torch.Generator().manual_seed(1))
    for index in torch.randperm(23, generator=torch.Generator().manual_seed(1)).split(5):
        engines[1].step(x[index], target[index])
    assert_same(by_epoch, by_step, 1e-15)


@pytest.mark.parametrize("c", [1e9, math.inf])
def test_a_bound_that_nothing_reaches(c: float) -> None:
    """The same bits as without it."""
    torch.manual_seed(0)
    ours = net("tanh")
    plain, data = copy.deepcopy(ours), batches()
    bounds = ((ours, c), (plain, None))
    engines = [BackpropEngine(of, sgd(of.parameters()), max_sample_norm=longest) for of, longest in bounds]
    for x, target in data:
        costs = [engine.step(x, target) for engine in engines]
        assert costs[0] == costs[1]
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_gradient_of_zero() -> None:
    """A perfect prediction is not divided by its norm."""
    ours = net("identity")
    before, (x, _) = copy.deepcopy(ours.state_dict()), batches()[0]
    BackpropEngine(ours, sgd(ours.parameters()), max_sample_norm=C).step(x, ours(x).detach())
    assert_all = zip(ours.state_dict().values(), before.values(), strict=True)
    assert all(after.isfinite().all() and (after - was).abs().max() < 1e-15 for after, was in assert_all)


def test_dropout() -> None:
    """The mask belongs to the sample: with the same draws by autograd the same step."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    twin, (x, target) = copy.deepcopy(ours), batches()[0]
    torch.manual_seed(1)
    BackpropEngine(ours, sgd(ours.parameters()), max_sample_norm=C).step(x, target)
    torch.manual_seed(1)
    mask = torch.empty(7, 6, dtype=torch.bool).bernoulli_(0.5).double() * 2
    gradients = []
    for n in range(7):
        prediction = twin[3](twin[1](twin[0](x[n : n + 1])) * mask[n])
        parts = torch.autograd.grad(LOSSES["quadratic"](prediction, target[n : n + 1]), [*twin.parameters()])
        norm = torch.cat([part.flatten() for part in parts]).norm()
        gradients.append([part * (C / norm).clamp(max=1) / 7 for part in parts])
    for parameter, *parts in zip(twin.parameters(), *gradients, strict=True):
        parameter.data -= 0.1 * torch.stack(parts).sum(0)
    assert_same(ours, twin)


@pytest.mark.parametrize("row", ["sigmoid", "silu"])
def test_compute_dtype(row: str) -> None:
    """bfloat16 products, norms in float32: the update of float32 to two digits, and no sample's is longer than c."""
    torch.manual_seed(0)
    ours = net(row).float()
    before, (x, target) = copy.deepcopy(ours), [tensor.float() for tensor in batches()[0]]
    exact = mm.curvature(ours, x, target).clipped(C)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    BackpropEngine(ours, optimizer, compute_dtype=torch.bfloat16, max_sample_norm=C).step(x, target)
    for name, parameter in ours.named_parameters():
        found = before.get_parameter(name) - parameter
        assert (found - exact[name]).norm() < 0.05 * exact[name].norm()  # bfloat16 has 8 bits


def test_float16() -> None:
    """Squares of 1e-4 would be 0 in float16."""
    torch.manual_seed(0)
    ours = mm.MLP([4, 5, 3]).half()
    x, target = torch.randn(7, 4).half() * 0.01, torch.full((7, 3), 0.5).half()
    exact = mm.curvature(copy.deepcopy(ours).float(), x.float(), target.float())
    c = exact.norms.median().item()
    engine = BackpropEngine(ours, torch.optim.SGD(ours.parameters(), lr=0.1), max_sample_norm=c)
    engine.compute_gradients(x, target)
    for name, expected in exact.clipped(c).items():
        found = ours.get_parameter(name).grad
        assert (found.float() - expected).norm() < 0.05 * expected.norm() + 1e-6  # float16 is coarse below 6e-5


def test_changed_between_steps() -> None:
    """engine.max_sample_norm = … holds from the next step on, and a pickled engine keeps it."""
    torch.manual_seed(0)
    ours = net("tanh")
    twin, data = torch_twin(ours), batches()
    engine = BackpropEngine(ours, sgd(ours.parameters()), max_sample_norm=C)
    optimizer = sgd(twin.parameters())
    for c, (x, target) in zip((C, 2 * C, 0.5 * C), data, strict=False):
        engine.max_sample_norm = c
        engine.step(x, target)
        clipped_step(twin, optimizer, x, target, "quadratic", c)
    assert_same(ours, twin)
    copied = pickle.loads(pickle.dumps(engine))
    assert copied.max_sample_norm == 0.5 * C
    copied.step(*data[0])
    clipped_step(twin, optimizer, *data[0], "quadratic", 0.5 * C)
    assert_same(copied.model, twin)


@pytest.mark.parametrize("c", [0, -1.0, math.nan, "1", torch.ones(())])
def test_refused(c: Any) -> None:
    ours = net()
    with pytest.raises(mm.InputError, match="max_sample_norm above 0"):
        BackpropEngine(ours, sgd(ours.parameters()), max_sample_norm=c)


@pytest.mark.parametrize("n", [7, 40])
@pytest.mark.parametrize("seed", range(12))
def test_sums(seed: int, n: int) -> None:
    """Branches share a δ, and each map's step 4 waits: no buffer may be written before."""
    ours: Any = Draw(seed, tied=False).net()
    plain, parameters = copy.deepcopy(ours), list(ours.parameters())
    x, target = torch.randn(n, 4, dtype=double), torch.rand(n, 3, dtype=double)
    of = mm.curvature(plain, x, target)
    c = of.norms.median().item()
    engine = BackpropEngine(ours, torch.optim.SGD(parameters, lr=1.0, weight_decay=0.1), max_sample_norm=c)
    for _ in range(2):  # the second step finds the buffers as the first one left them
        expected = mm.curvature(plain, x, target).clipped(c)
        engine.step(x, target)
        for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
            with torch.no_grad():
                theirs.mul_(0.9).sub_(expected[name])
            assert (mine - theirs).norm() <= 1e-12 * theirs.norm() + 1e-15, name


def test_native_epochs_leave_it_to_torch() -> None:
    """The C code does not clip: "auto" does not take it, and native=True is refused."""
    torch.manual_seed(0)
    ours, x, target = mm.MLP([4, 5, 3]), torch.randn(200, 4), torch.rand(200, 3)
    engine = BackpropEngine(ours, sgd(ours.parameters()), max_sample_norm=C)
    engine.train_epoch(x, target, 4)
    assert engine.road == "torch"
    engine.native = True
    with pytest.raises(mm.InputError, match="max_sample_norm clips each sample's gradient"):
        engine.train_epoch(x, target, 4)
