"""Mixed precision and dtypes: under autocast the bits of torch's own layers, every real dtype, complex refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import manual_mlp as mm
from tests.cases import Case

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
DEVICES = ["cpu", CUDA]
HALF = [torch.bfloat16, torch.float16]
# Softplus is not among them: it saves a where torch saves z, and a is rounded otherwise.
SAME_BITS = [
    nn.Identity(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.LeakyReLU(-0.2),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
]


def net(activation: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), activation, nn.Linear(32, 8), nn.Sigmoid()).to(device, dtype)


def rows(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(33, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def step(model: nn.Module, x: Tensor, dtype: torch.dtype, backward_inside: bool = False) -> list[Tensor]:
    """Output, and gradients of the input and all parameters, under autocast."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype):
        output = model(x)
        cost = (output.float() - 1).square().mean()
        if backward_inside:
            gradients = torch.autograd.grad(cost, [x, *model.parameters()])
    if not backward_inside:
        gradients = torch.autograd.grad(cost, [x, *model.parameters()])
    return [output, *gradients]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", SAME_BITS, ids=str)
@pytest.mark.parametrize("fuse", [False, True])
def test_autocast_equals_torch(activation: nn.Module, dtype: torch.dtype, fuse: bool, device: str) -> None:
    """Every bit of outputs and gradients, with the backward outside of autocast, as it should be, or inside.

    On a GPU the library sums a product in an order of its own: there half precision may round to another number.
    """
    twin = net(activation, device)
    model = mm.convert(copy.deepcopy(twin), fuse=fuse)
    for inside in (False, True):
        ours, theirs = (step(each, rows(device), dtype, inside) for each in (model, twin))
        assert ours[0].dtype == dtype
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine.dtype == expected.dtype
            if device == "cpu":
                assert torch.equal(mine, expected)
            else:
                assert (mine - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


ROWS = ("sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu", "gelu")
OURS, TORCHS = mm.functional, nn.functional
UNDER_AUTOCAST: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    **{name: (getattr(OURS, name), getattr(TORCHS, name), ((4, 6),)) for name in ROWS},
    **{
        f"affine, {name}": (
            lambda x, w, b, name=name: OURS.affine_activation(x, w, b, name),
            lambda x, w, b, name=name: getattr(TORCHS, name)(TORCHS.linear(x, w, b)),
            ((4, 6), (5, 6), (5,)),
        )
        for name in ROWS
    },
    "affine": (OURS.affine, TORCHS.linear, ((4, 6), (5, 6), (5,))),
    "conv2d": (OURS.conv2d, TORCHS.conv2d, ((4, 2, 6, 6), (3, 2, 3, 3), (3,))),
    "layer_norm": (lambda x: OURS.layer_norm(x, (6,)), lambda x: TORCHS.layer_norm(x, (6,)), ((4, 6),)),
    "batch_norm": (
        lambda x: OURS.batch_norm(x, None, None, training=True),
        lambda x: TORCHS.batch_norm(x, None, None, training=True),
        ((4, 6, 3, 3),),
    ),
    "softmax": (lambda x: OURS.softmax(x, -1), lambda x: TORCHS.softmax(x, -1), ((4, 6),)),
    "avg_pool2d": (lambda x: OURS.avg_pool2d(x, 2), lambda x: TORCHS.avg_pool2d(x, 2), ((4, 2, 6, 6),)),
    "mse_loss": (OURS.mse_loss, TORCHS.mse_loss, ((4, 6), (4, 6))),
    "cross_entropy": (OURS.cross_entropy, TORCHS.cross_entropy, ((4, 6), (4, 6))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_autocast_of_a_gpu_gives_torchs_dtypes(name: str, dtype: torch.dtype) -> None:
    """Asked of tensors without numbers, so without a GPU: its autocast has other rules than the CPU's."""
    ours, theirs, shapes = UNDER_AUTOCAST[name]
    torch._C._ensureCUDADeviceGuardSet()
    with FakeTensorMode(), torch.no_grad():
        given = [
            torch.empty(shape, device="cuda", dtype=torch.float32 if n else dtype) for n, shape in enumerate(shapes)
        ]
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for a GPU
        try:
            assert ours(*given).dtype == theirs(*given).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", [nn.Softplus(), nn.Softplus(2.0, 1.0)], ids=str)
def test_autocast_of_softplus(activation: nn.Module, dtype: torch.dtype) -> None:
    twin = net(activation)
    model = mm.convert(copy.deepcopy(twin))
    for mine, expected in zip(step(model, rows(), dtype), step(twin, rows(), dtype), strict=True):
        # what is saved is rounded to the half dtype, here a and there z: two eps of the largest entry
        bound = 2 * torch.finfo(dtype).eps * expected.abs().max()
        assert (mine - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_leaves_float64_alone(dtype: torch.dtype) -> None:
    twin = net(nn.Sigmoid(), dtype=torch.float64)
    model = mm.convert(copy.deepcopy(twin))
    with torch.autocast("cpu", dtype):
        assert torch.equal(model(rows(dtype=torch.float64)), twin(rows(dtype=torch.float64)))


LOSSES: dict[str, tuple[nn.Module, nn.Module]] = {
    "mse": (mm.MSELoss(), nn.MSELoss()),
    "bce": (mm.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()),
    "cross_entropy": (mm.CrossEntropyLoss(), nn.CrossEntropyLoss()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_costs_are_float32_under_autocast(name: str) -> None:
    ours, theirs = LOSSES[name]
    target = rows()[:, :8].softmax(-1)
    gradients = []
    for loss in (ours, theirs):
        model = net(nn.Sigmoid())[:3]
        with torch.autocast("cpu", torch.bfloat16):
            cost = loss(model(rows()), target)
        assert cost.dtype == torch.float32
        gradients.append([cost, *torch.autograd.grad(cost, [*model.parameters()])])
    for mine, expected in zip(*gradients, strict=True):
        # a last bit of δ in float32 may round to the other bfloat16 before it is summed
        torch.testing.assert_close(mine, expected, rtol=2**-7, atol=1e-5)


def test_quadratic_cost_under_autocast() -> None:
    prediction = rows().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cost = mm.functional.quadratic_loss(prediction, torch.zeros(33, 64))
    assert cost.dtype == torch.float32
    (delta,) = torch.autograd.grad(cost, prediction)
    torch.testing.assert_close(delta, (prediction.detach().float() / 33).bfloat16(), rtol=0, atol=0)


def test_autocast_after_an_inference_mode_call_and_with_a_frozen_weight() -> None:
    """Autocast keeps the casts of weights: one made without a gradient must not serve a call that needs one."""
    model, twin = mm.MLP([64, 8]), nn.Sequential(nn.Linear(64, 8), nn.Sigmoid())
    twin.load_state_dict(model.state_dict())
    gradients = []
    for each in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                each(rows())
            output = each(rows())
        gradients.append(torch.autograd.grad(output.float().sum(), [*each.parameters()]))
    for mine, expected in zip(*gradients, strict=True):
        assert torch.equal(mine, expected)


def test_grad_scaler_skips_an_overflow_and_scales_back() -> None:
    """Two trajectories, ours and torch's, through a step that overflows."""

    def train(model: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        scales = []
        for number in range(6):
            x = rows() * (1e4 if number == 2 else 1)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                output = model(x)
                cost = output.square().sum() * (1e4 if number == 2 else 1)
            scaler.scale(cost).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(torch.tensor(scaler.get_scale()))
        return [*scales, *model.parameters()]

    twin = net(nn.Tanh())
    ours, theirs = train(mm.convert(copy.deepcopy(twin))), train(twin)
    assert min(theirs[:6]) < max(theirs[:6])
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


# Half precision rounds what is saved, and each operation, to 2^-11: some of them in a row, on numbers of order 1.
FLOAT16 = {"rtol": 2**-8, "atol": 2**-8}


def test_float16(case: Case) -> None:
    """On the CPU, against the twin in float64 on the same numbers."""
    inputs = case.inputs(torch.float16)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    gradients = []
    for function, arguments in ((case.ours, inputs), (case.twin, exact)):
        output = function(*arguments)
        gradients.append([output, *torch.autograd.grad(output.mean(), arguments)])
    for mine, expected in zip(*gradients, strict=True):
        assert mine.dtype == torch.float16
        torch.testing.assert_close(mine.double(), expected, **FLOAT16)


def test_complex_is_refused_or_right(case: Case) -> None:
    """Never silently wrong: the sheet's formulas have no conjugates."""
    inputs = tuple(tensor.detach().to(torch.complex128) * (1 + 1j) for tensor in case.inputs(torch.float64))
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    if case.name in ("dropout", "sum"):  # linear with real factors: right as it is
        ours, theirs = (function(*inputs) for function in (case.ours, case.twin))
        g = torch.randn_like(theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g))
        return
    # torch has no kernel for some of them, and says so itself
    with pytest.raises((mm.InputError, NotImplementedError), match=r"[cC]omplex"):
        case.ours(*inputs)


PUBLIC: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(mm.functional, name)
        for name in ("sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu", "gelu", "dropout")
    },
    "affine": lambda x: mm.functional.affine(x, x, None),
    "affine_activation": lambda x: mm.functional.affine_activation(x, x, None),
    "quadratic_loss": lambda x: mm.functional.quadratic_loss(x, x),
    "mse_loss": lambda x: mm.functional.mse_loss(x, x),
    "binary_cross_entropy_with_logits": lambda x: mm.functional.binary_cross_entropy_with_logits(x, x),
    "cross_entropy": lambda x: mm.functional.cross_entropy(x, torch.tensor([0, 1, 2])),
}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("grad", [True, False])
def test_complex_is_refused_in_a_sentence(name: str, grad: bool) -> None:
    sentence = r"expected .*; got torch.complex64: split it"
    with torch.set_grad_enabled(grad), pytest.raises(mm.InputError, match=sentence):
        PUBLIC[name](torch.ones(3, 3, dtype=torch.complex64))


@pytest.mark.parametrize("name", [name for name in PUBLIC if name in ("dropout", "cross_entropy") or "loss" in name])
def test_integers_are_refused_in_a_sentence(name: str) -> None:
    """Where torch would refuse them, or average them."""
    with pytest.raises(mm.InputError, match=r"expected .*; got torch.int64: call \.float\(\)"):
        PUBLIC[name](torch.arange(9).reshape(3, 3))


def outcome(function: Callable[..., Tensor], *arguments: Any, **more: Any) -> Any:
    try:
        return function(*arguments, **more)
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu", "gelu", "linear"])
def test_integers_do_as_in_torch(name: str, dtype: torch.dtype, grad: bool) -> None:
    """They are promoted, kept or refused; in place, too."""
    numbers = torch.arange(9).reshape(3, 3).sub(4).to(dtype)
    ours, theirs = getattr(mm.functional, "affine" if name == "linear" else name), getattr(nn.functional, name)
    arguments = (numbers, numbers) if name == "linear" else (numbers,)
    with torch.set_grad_enabled(grad):
        for more in ({}, {"inplace": True}) if name in ("relu", "leaky_relu", "silu") else ({},):
            copies = [[argument.clone() for argument in arguments] for _ in range(2)]
            found, expected = outcome(ours, *copies[0], **more), outcome(theirs, *copies[1], **more)
            if isinstance(expected, Tensor):
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)
            else:
                assert isinstance(found, type)  # of an error: torch's own, or an InputError
