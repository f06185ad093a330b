"""On a GPU: every Function as on the CPU, and mixed precision there."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import manual_mlp as mm
from tests.cases import CASES, Case

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
