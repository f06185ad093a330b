"""On a GPU: every Function as on the CPU, mixed precision there, and the engine's step as a CUDA graph."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import manual_mlp as mm
from manual_mlp.engine import BackpropEngine
from tests.cases import CASES, Case
from tests.test_engine import OPTIMIZERS, sgd

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Of the others the mask, the classes or the weights are on the CPU.
ON_ANY_DEVICE = [
    case for case in CASES if not {"dropout", "class", "weight", "weights"} & set(case.name.split("-")[0].split("_"))
]


def inputs_on_device(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().to(DEVICE).requires_grad_() for tensor in case.inputs(dtype))


@pytest.mark.parametrize("case", ON_ANY_DEVICE, ids=str)
def test_gradcheck(case: Case) -> None:
    inputs = inputs_on_device(case, torch.float64)
    assert gradcheck(case.ours, inputs, atol=1e-8, rtol=1e-6, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(case.ours, inputs, atol=1e-8, rtol=1e-6, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ON_ANY_DEVICE, ids=str)
def test_as_on_the_cpu(case: Case, dtype: torch.dtype) -> None:
    results = []
    for inputs in (case.inputs(dtype), inputs_on_device(case, dtype)):
        output = case.ours(*inputs)
        results.append([tensor.cpu() for tensor in (output, *torch.autograd.grad(output.square().sum(), inputs))])
    # another library's transcendental functions and another order of the sums
    bound = 64 * torch.finfo(dtype).eps
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=bound, atol=bound)


def test_costs_with_weights_and_classes() -> None:
    weight, classes = torch.rand(4, device=DEVICE), torch.tensor([0, 3, -100, 2, 1], device=DEVICE)
    target = torch.rand(5, 4, device=DEVICE)
    for name, arguments, labels in (
        ("BCEWithLogitsLoss", {"weight": weight, "pos_weight": weight}, target),
        ("CrossEntropyLoss", {"weight": weight}, classes),
        ("CrossEntropyLoss", {"weight": weight, "label_smoothing": 0.1}, classes),
        ("CrossEntropyLoss", {"weight": weight, "label_smoothing": 0.1}, target),
    ):
        results = []
        for module in (mm, nn):
            z = target.logit().requires_grad_()
            cost = getattr(module, name)(**arguments).to(DEVICE)(z, labels)
            results.append([cost, *torch.autograd.grad(cost, z)])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fuse", [False, True])
def test_autocast_equals_torch(dtype: torch.dtype, fuse: bool) -> None:
    """nn.Linear and nn.Sigmoid, every bit of outputs and gradients."""
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 8), nn.Sigmoid()).to(DEVICE)
    x = torch.randn(33, 64, device=DEVICE)
    results = []
    for model in (mm.convert(copy.deepcopy(twin), fuse=fuse), twin):
        with torch.autocast(DEVICE, dtype):
            output = model(x)
        cost = (output.float() - 1).square().mean()
        results.append([output, *torch.autograd.grad(cost, [*model.parameters()])])
    assert all(map(torch.equal, *results))


def test_grad_scaler() -> None:
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).to(DEVICE)
    trained = []
    for model in (mm.convert(copy.deepcopy(twin)), twin):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.5), torch.amp.GradScaler(DEVICE)
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.float16):
                cost = model(torch.ones(3, 64, device=DEVICE)).square().mean()
            scaler.scale(cost).backward()
            scaler.step(optimizer)
            scaler.update()
        trained.append([torch.tensor(scaler.get_scale()), *(parameter.cpu() for parameter in model.parameters())])
    for mine, expected in zip(*trained, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)  # float16 products


def test_devices_that_differ_are_told() -> None:
    with pytest.raises(mm.InputError, match="expected one device for all tensors"):
        mm.Affine(4, 3, device=DEVICE)(torch.randn(2, 4))


def trained(device: str, name: str = "sgd", loss: str = "quadratic", steps: int = 30, **more: Any) -> list[Tensor]:
    """Parameters, gradients and costs after steps of two batch sizes, each with another rate, and an epoch."""
    torch.manual_seed(0)
    last = "identity" if loss == "cross_entropy" else "sigmoid"
    dtype = torch.float32 if more else torch.float64
    model = mm.MLP([4, 16, 16, 3], ["tanh", "gelu"], last, dtype=dtype).to(device)
    x, y = torch.randn(40, 4, dtype=dtype), torch.rand(40, 3, dtype=dtype)
    x, y = x.to(device), (y.argmax(1) if loss == "cross_entropy" else y).to(device)
    optimizer = OPTIMIZERS.get(name, sgd)(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    engine, costs = BackpropEngine(model, optimizer, loss, **more), []
    for step in range(steps):
        rows = slice(0, 8 if step % 2 else 5)
        costs.append(engine.step(x[rows], y[rows]))
        schedule.step()
    costs.append(engine.train_epoch(x, y, 16, torch.Generator().manual_seed(1)))
    costs.append(engine.compute_gradients(x, y))
    return [tensor.detach().cpu() for p in model.parameters() for tensor in (p, p.grad)] + [c.cpu() for c in costs]


@pytest.mark.parametrize("loss", ["quadratic", "cross_entropy"])
@pytest.mark.parametrize("name", ["sgd", "decay", "momentum", "adam"])
def test_engine_as_on_the_cpu(name: str, loss: str) -> None:
    for mine, expected in zip(trained(DEVICE, name, loss), trained("cpu", name, loss), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)  # other sums, 32 steps


def test_engine_in_bfloat16() -> None:
    more = {"compute_dtype": torch.bfloat16}
    for mine, expected in zip(trained(DEVICE, **more), trained("cpu", **more), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-2)


def test_engine_clips() -> None:
    more = {"max_grad_norm": 0.05}
    for mine, expected in zip(trained(DEVICE, **more), trained("cpu", **more), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)  # float32, 32 steps


def test_engine_dropout_draws_anew_at_each_replay() -> None:
    """The layers' masks, from the device's generator, also after the capture."""
    model = mm.MLP([4, 64, 3], dropout=0.5, dtype=torch.float64).to(DEVICE)
    x, y = torch.randn(8, 4, dtype=torch.float64, device=DEVICE), torch.rand(8, 3, dtype=torch.float64, device=DEVICE)
    engine = BackpropEngine(model, torch.optim.SGD(model.parameters(), lr=0.0))
    costs = []
    for seed in range(6):
        torch.manual_seed(seed)
        costs.append(engine.step(x, y))
    assert len({cost.item() for cost in costs}) == 6
    torch.manual_seed(5)
    torch.testing.assert_close(costs[5], mm.functional.quadratic_loss(model(x), y).detach(), rtol=1e-11, atol=1e-11)


def test_engine_beside_a_thread_that_pins_memory() -> None:
    """As a DataLoader's does: a capture must not fail for it."""
    model = mm.MLP([4, 16, 3], dtype=torch.float64).to(DEVICE)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4).double(), torch.rand(64, 3).double())
    engine = BackpropEngine(model, sgd(model.parameters()))
    for x, y in torch.utils.data.DataLoader(data, batch_size=8, pin_memory=True):
        assert engine.step(x.to(DEVICE), y.to(DEVICE)).isfinite()


def test_many_nets_as_on_the_cpu() -> None:
    """K nets by batched products, a step as one CUDA graph: as the same nets on the CPU."""
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.rand(64, 3, dtype=torch.float64)
    results = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        nets = [mm.MLP([4, 5, 3], dtype=torch.float64).to(device) for _ in range(3)]
        optimizers = [
            torch.optim.SGD(net.parameters(), lr=0.1 * (1 + k), weight_decay=0.01) for k, net in enumerate(nets)
        ]
        ensemble = mm.EnsembleEngine(nets, optimizers, native=False)
        generators = [torch.Generator().manual_seed(k) for k in range(3)]
        costs = [ensemble.train_epoch(x.to(device), y.to(device), 8, generators).cpu() for _ in range(3)]
        results.append([*costs, *(parameter.detach().cpu() for net in nets for parameter in net.parameters())])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)  # sums in another order
