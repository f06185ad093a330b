"""On a GPU: Functions, nets and trainings as on the CPU, autocast as torch's, the engine's step as a CUDA graph."""

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
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


NETS: dict[str, Callable[[], tuple[nn.Module, int]]] = {  # a net, and the numbers of a row
    "sigmoid": lambda: (mm.MLP([12, 9, 7, 4]), 12),
    "rows": lambda: (mm.MLP([12, 9, 9, 9, 9, 9, 4], ["gelu", "silu", "softplus", "tanh", "relu"], "identity"), 12),
    "softplus last": lambda: (mm.MLP([12, 9, 4], "relu", "softplus"), 12),
    "residual": lambda: (mm.MLP([12, 8, 8, 4], residual=True, output_activation="identity"), 12),
    "batch norm": lambda: (mm.MLP([12, 9, 7, 4], batch_norm=True), 12),
    "LeNet": lambda: (mm.LeNet((14, 14), [3, 4], [20, 4], kernel=3), 196),
    "LeNet, batch norm": lambda: (mm.LeNet((14, 14), [3, 4], [20, 4], 3, "relu", batch_norm=True), 196),
    "layer norm": lambda: (
        nn.Sequential(mm.Affine(12, 8), mm.LayerNorm(8), mm.GELU(), mm.Affine(8, 4), mm.Softmax(dim=-1)),
        12,
    ),
}
nets = pytest.mark.parametrize("name", NETS)


def net_and_batch(name: str, device: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net, numbers = NETS[name]()
    x, target = torch.rand(16, numbers, dtype=dtype), torch.rand(16, 4, dtype=dtype)
    return net.to(device, dtype), x.to(device), target.to(device)


def gradients(net: nn.Module, cost: Tensor) -> list[Tensor]:
    return [cost, *torch.autograd.grad(cost, [*net.parameters()]), *net.buffers()]


def same_on_both(results: Callable[[str], Iterable[Tensor]], bound: float = 1e-11) -> None:
    """Compare what the CPU and the GPU give: sums in another order, another library's exponential."""
    for mine, expected in zip(results(DEVICE), results("cpu"), strict=True):
        torch.testing.assert_close(mine.detach().cpu(), expected.detach(), rtol=bound, atol=bound)


@nets
@pytest.mark.parametrize("way", ["layers", "network", "trace", "compiled"])
def test_nets_as_on_the_cpu(name: str, way: str) -> None:
    def results(device: str) -> list[Tensor]:
        net, x, target = net_and_batch(name, device)
        if way == "trace":
            trace = mm.trace(net, x[:3], target[:3])
            return [*trace.z.values(), *trace.a.values(), *trace.delta.values()]
        if way == "network":
            return gradients(net, mm.network.network_loss(net, x, target))
        called = torch.compile(net, fullgraph=True) if way == "compiled" and device == DEVICE else net
        return gradients(net, mm.QuadraticLoss()(called(x), target))

    torch.compiler.reset()
    same_on_both(results)


@nets
def test_nets_by_the_battery(name: str) -> None:
    net, x, _ = net_and_batch(name, DEVICE)
    mm.testing.assert_manual_backward(net, x[:4])


def test_curvature_and_pretraining_as_on_the_cpu() -> None:
    def results(device: str) -> Iterator[Tensor]:
        net, x, target = net_and_batch("sigmoid", device)
        curvature = mm.curvature(net, x, target)
        yield curvature.norms
        yield from curvature.variance.values()
        yield from curvature.ggn_diagonal().values()
        yield from curvature.hvp({key: torch.ones_like(p) for key, p in net.named_parameters()}).values()

    same_on_both(results)
    net, x, _ = net_and_batch("sigmoid", DEVICE)
    errors = mm.pretrain(net, x, epochs=3, batch_size=4, generator=torch.Generator(DEVICE).manual_seed(0))
    assert errors.isfinite().all()


# How far half precision may be from torch's: each rounds after sums in its own order.
HALF = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@nets
def test_autocast_as_torch(name: str, inside: bool, dtype: torch.dtype) -> None:
    """Dtypes and values of output and gradients, with the backward outside of autocast, as it should be, or inside."""
    net, x, target = net_and_batch(name, DEVICE, torch.float32)
    results = []
    for model in (net, mm.revert(copy.deepcopy(net))):
        inputs = x.clone().requires_grad_()
        with torch.autocast(DEVICE, dtype):
            output = model(inputs)
            with torch.autocast(DEVICE, enabled=inside, dtype=dtype):
                cost = (output.float() - target).square().mean()
                results.append([output, *torch.autograd.grad(cost, [inputs, *model.parameters()])])
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype
        assert (mine - expected).abs().max() <= 8 * HALF[dtype] * max(expected.abs().max(), 1e-5)


@pytest.mark.parametrize("backprop", ["layers", "network", "autograd", "engine", "engine of three"])
def test_training(backprop: str, tmp_path: Path) -> None:
    """The CPU's parameters; a run that goes on ends with the whole one's bits; the CPU predicts by its checkpoint."""
    pytest.importorskip("hydra")
    pytest.importorskip("lightning")
    from manual_mlp.training import run as training
    from tests.configs import configured

    def run(folder: str, *overrides: str) -> dict[str, Any]:
        words = f"backprop={backprop.split()[0]}", *(["members=3"] if "three" in backprop else [])
        common = "data=iris", "model.hidden=[16]", "trainer.precision=64-true", "native=false"
        training.run(configured(tmp_path / folder, *common, *words, *overrides))
        return torch.load(tmp_path / folder / "last.ckpt", weights_only=True, map_location="cpu")

    whole = run("whole", "trainer.accelerator=gpu", "trainer.max_epochs=3")
    cpu = run("cpu", "trainer.accelerator=cpu", "trainer.max_epochs=3")
    run("halves", "trainer.accelerator=gpu", "trainer.max_epochs=1")
    more = f"ckpt_path={tmp_path}/halves/last.ckpt"
    rest = run("halves", "trainer.accelerator=gpu", "trainer.max_epochs=3", more)
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(value, cpu["state_dict"][key], rtol=1e-9, atol=1e-9)  # float64, 21 steps of rate 5
        assert torch.equal(value, rest["state_dict"][key])
    predictor = mm.Predictor.from_checkpoint(tmp_path / "whole" / "best.ckpt")
    rows = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(predictor).to(DEVICE)(rows.to(DEVICE)).cpu(), predictor(rows))


def test_dropout_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """The masks are the GPU's, and its generator goes on, too."""
    pytest.importorskip("hydra")
    from manual_mlp.training import run as training
    from tests.configs import configured

    def run(folder: str, *overrides: str) -> dict[str, Tensor]:
        common = "data=iris", "model.dropout=0.2", "trainer.accelerator=gpu"
        training.run(configured(tmp_path / folder, *common, *overrides))
        return torch.load(tmp_path / folder / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]

    whole = run("whole", "trainer.max_epochs=2")
    run("halves", "trainer.max_epochs=1")
    rest = run("halves", "trainer.max_epochs=2", f"ckpt_path={tmp_path}/halves/last.ckpt")
    assert all(map(torch.equal, whole.values(), rest.values()))


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
