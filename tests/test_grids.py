"""Convolution, pooling, norms, softmax: torch's samples, bits, bytes, published digits, and the traps on the way."""

import copy
import itertools
import json
import math
import sys
import types
import unittest
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as T
from torch.utils._python_dispatch import TorchDispatchMode

import manual_mlp as mm
from manual_mlp import functional as F
from manual_mlp import grids as sheet
from manual_mlp.grid_rules import RULES
from tests.cases import Case
from tests.grid_cases import GRIDS
from tests.test_guest_memory import bytes_kept

double = torch.float64
# The same sums in other orders, on numbers of order 10: some eps of float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("Conv2d", "MaxPool2d", "AvgPool2d", "BatchNorm1d", "BatchNorm2d", "LayerNorm", "Softmax")
grids = pytest.mark.parametrize("case", GRIDS, ids=str)


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(list(ours), list(theirs), **EXACT)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = double) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=double).to(dtype)


def results(function: Callable[..., Any], *inputs: Any, second: bool = True) -> list[Tensor]:
    """Output (and places), first derivatives, and second ones, of each input that is differentiable."""
    inputs = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )
    outputs = function(*inputs)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    g = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    first = torch.autograd.grad(output, leaves, g, create_graph=second)
    found = [*(outputs if isinstance(outputs, tuple) else [output]), *first]
    if second:
        squares = sum((gradient.square().sum() for gradient in first), output.square().sum())
        found += torch.autograd.grad(squares, leaves)
    return [x.detach() for x in found]


def both(name: str, tensors: Sequence[Tensor], *arguments: Any, second: bool = True, **more: Any) -> list[list[Tensor]]:
    """The results of our function of that name, and of torch's."""

    def call(home: Any) -> Callable[..., Any]:
        return lambda *x: getattr(home, name)(*x, *arguments, **more)

    return [results(call(home), *tensors, second=second) for home in (F, T)]


# ---------------------------------------------------------------------------------------------------------------------
# torch's own samples
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_torch() -> Any:
    """torch's lists of samples. They take seconds to import, and ask for a package that they use only to test torch."""
    if "expecttest" not in sys.modules:
        stub = types.ModuleType("expecttest")
        stub.TestCase, stub.assert_expected_inline = unittest.TestCase, None  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub
    from torch.testing._internal import common_methods_invocations, common_modules

    return types.SimpleNamespace(modules=common_modules.module_db, operators=common_methods_invocations.op_db)


def module_samples(module_db: Any, name: str) -> Iterator[tuple[Any, Any]]:
    info = next(info for info in module_db if info.module_cls is getattr(nn, name))
    for training in (True, False):
        for sample in info.module_inputs_func(info, "cpu", double, requires_grad=False, training=training):
            yield training, sample


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_torchs_samples_of_modules(name: str, of_torch: Any) -> None:
    """The same draws, printing, state, values, derivatives and buffers, with every argument that torch samples."""
    count = 0
    for training, sample in module_samples(of_torch.modules, name):
        arguments, inputs = sample.constructor_input, sample.forward_input
        models = []
        for home in (mm, nn):
            torch.manual_seed(0)
            models.append(getattr(home, name)(*arguments.args, dtype=double, **arguments.kwargs).train(training)
                          if name not in ("MaxPool2d", "AvgPool2d", "Softmax")
                          else getattr(home, name)(*arguments.args, **arguments.kwargs).train(training))  # fmt: skip
        ours, theirs = models
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        same(ours.state_dict().values(), theirs.state_dict().values())
        found = []
        for model in models:
            parameters = dict(model.named_parameters())

            def call(x: Tensor, *values: Tensor, model: Any = model, names: Any = tuple(parameters)) -> Any:
                return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

            found.append([*results(call, *inputs.args, *parameters.values()), *model.buffers()])
        same(*found)
        count += 1
    assert count > 3


OPERATORS = {
    "conv2d": "nn.functional.conv2d", "max_pool2d": "nn.functional.max_pool2d", "softmax": "softmax",
    "avg_pool2d": "nn.functional.avg_pool2d", "batch_norm": "nn.functional.batch_norm",
    "layer_norm": "nn.functional.layer_norm",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_torchs_samples_of_functions(name: str, of_torch: Any) -> None:
    """Values, first and second derivatives; small planes only, and what torch refuses is refused."""
    info = next(op for op in of_torch.operators if op.name == OPERATORS[name])
    ours, theirs = getattr(F, name), getattr(T, name)
    samples = list(info.sample_inputs("cpu", double))
    for sample in samples[:: max(1, len(samples) // 60)]:
        found = []
        for function in (ours, theirs):
            held = copy.deepcopy(sample)
            call = lambda *tensors, function=function, held=held: function(*tensors, **held.kwargs)  # noqa: E731
            try:
                found.append(results(call, held.input, *held.args))
            except (RuntimeError, ValueError) as error:
                found.append(type(error))
        if isinstance(found[1], type):
            assert issubclass(found[0], found[1]) or issubclass(found[0], mm.InputError), (sample, found)
        else:
            assert isinstance(found[0], list), (found[0], sample.input.shape, sample.args, sample.kwargs)
            # torch's samples reach 10: of the norm of one number, whose second derivative is 0, rounding remains
            torch.testing.assert_close(*found, rtol=1e-12, atol=1e-11)
    for wrong in info.error_inputs("cpu") if info.error_inputs_func is not None else ():
        held = wrong.sample_input
        with pytest.raises((RuntimeError, ValueError)):
            ours(held.input, *held.args, **held.kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Hand-derived, to the third order
# ---------------------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@grids
def test_no_derivative_of_any_order_is_torchs(case: Case) -> None:
    inputs = case.inputs(double)
    with Operators() as operators:
        derivative = case.ours(*inputs)
        for order in range(3):
            gradients = torch.autograd.grad(derivative.square().sum(), inputs, create_graph=order < 2)
            derivative = sum(gradient.sum() ** 2 for gradient in gradients)
    assert [name for name in operators.names if "backward" in name] == []
    with Operators() as operators:
        torch.autograd.grad(case.twin(*inputs).square().sum(), inputs)
    assert [name for name in operators.names if "backward" in name]  # the question finds torch's


# ---------------------------------------------------------------------------------------------------------------------
# Bits and bytes
# ---------------------------------------------------------------------------------------------------------------------

BITS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "conv": (lambda *x: F.conv2d(*x, padding=2), lambda *x: T.conv2d(*x, padding=2),
             ((8, 1, 12, 12), (6, 1, 5, 5), (6,))),
    "max": (lambda x: F.max_pool2d(x, 2), lambda x: T.max_pool2d(x, 2), ((8, 6, 12, 12),)),
    "max, overlap": (lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: T.max_pool2d(x, 3, 2, 1), ((8, 6, 12, 12),)),
    "average": (lambda x: F.avg_pool2d(x, 2), lambda x: T.avg_pool2d(x, 2), ((8, 6, 12, 12),)),
    "batch norm": (lambda *x: F.batch_norm(x[0], None, None, *x[1:], True),
                   lambda *x: T.batch_norm(x[0], None, None, *x[1:], True), ((8, 6, 5, 5), (6,), (6,))),
    "layer norm": (lambda *x: F.layer_norm(x[0], (20,), *x[1:]), lambda *x: T.layer_norm(x[0], (20,), *x[1:]),
                   ((8, 20), (20,), (20,))),
    "softmax": (lambda x: F.softmax(x, 1), lambda x: T.softmax(x, 1), ((8, 10),)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BITS)
def test_bits(name: str, dtype: torch.dtype) -> None:
    """The output has torch's bits always; δ of the pools and of a convolution of stride 1, and ∂b in float64, too."""
    ours, theirs, shapes = BITS[name]
    inputs = [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    if name.startswith("max"):
        inputs = [x.clamp_min(0) for x in inputs]  # as after a relu: ties
    mine, expected = (results(function, *inputs, second=False) for function in (ours, theirs))
    assert torch.equal(mine[0], expected[0])
    if name in ("conv", "max", "average") or (name == "max, overlap" and dtype != torch.bfloat16):
        assert torch.equal(mine[1], expected[1])
    if name == "conv" and dtype == double:
        assert torch.equal(mine[3], expected[3])


def test_bytes_kept() -> None:
    x = randn(64, 6, 28, 28, dtype=torch.float32).requires_grad_()
    assert 3 * bytes_kept(mm.MaxPool2d(2), x) <= bytes_kept(nn.MaxPool2d(2), x)
    assert bytes_kept(mm.AvgPool2d(2), x) == 0
    for name, arguments in {"Conv2d": (6, 4, 3), "BatchNorm2d": (6,), "LayerNorm": (28,), "Softmax": (1,)}.items():
        assert bytes_kept(getattr(mm, name)(*arguments), x) <= bytes_kept(getattr(nn, name)(*arguments), x)
    conv = mm.Conv2d(6, 4, 3)
    conv.weight.requires_grad_(False)
    assert bytes_kept(conv, x) == conv.weight.untyped_storage().nbytes()
    assert bytes_kept(conv, x.detach()) == 0


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_convolution_is_as_exact_as_torchs_in_float32(count: int) -> None:
    """Error of ∂W and ∂b against float64, of the same inputs: in no convolution larger than torch's."""
    generator, ratios = np.random.default_rng(0), []
    for _ in range(count):
        n, c, o, m = (int(generator.choice(x)) for x in ([1, 4, 16], [1, 2, 4], [1, 3, 8], [1, 2]))
        k, s, q, d = (int(generator.choice(x)) for x in ([1, 2, 3, 5], [1, 2, 3], [0, 1, 2], [1, 2]))
        shapes = (n, c * m, 14, 13), (o * m, c, k, k), (o * m,)
        inputs = [randn(*shape, seed=seed).float() for seed, shape in enumerate(shapes)]
        g = randn(*T.conv2d(*inputs, s, q, d, m).shape, seed=3).float()
        exact, mine, theirs = (
            torch.autograd.grad(home.conv2d(*leaves, s, q, d, m), leaves[1:], g.to(dtype))
            for home, dtype in ((T, double), (F, torch.float32), (T, torch.float32))
            for leaves in [[x.to(dtype).requires_grad_() for x in inputs]]
        )
        errors = [[(x - y).abs().max().item() for x, y in zip(each, exact, strict=True)] for each in (mine, theirs)]
        assert errors[0][0] <= errors[1][0]
        assert errors[0][1] <= errors[1][1]
        ratios.append(errors[0][0] / (errors[1][0] or 1))
    print(sorted(ratios)[count // 2])  # docs/formulas.md quotes it


# ---------------------------------------------------------------------------------------------------------------------
# Published numbers
# ---------------------------------------------------------------------------------------------------------------------


def line(start: float, end: float, *shape: int) -> Tensor:
    return torch.linspace(start, end, math.prod(shape), dtype=double).reshape(shape)


def test_cs231n_convolution() -> None:
    """Stanford CS231n, assignment 2."""
    z = F.conv2d(line(-0.1, 0.5, 2, 3, 4, 4), line(-0.2, 0.3, 3, 3, 4, 4), line(-0.1, 0.2, 3), stride=2, padding=1)
    expected = [[[[-.08759809, -.10987781], [-.18387192, -.2109216]],
                 [[.21027089, .21661097], [.22847626, .23004637]],
                 [[.50813986, .54309974], [.64082444, .67101435]]],
                [[[-.98053589, -1.03143541], [-1.19128892, -1.24695841]],
                 [[.69108355, .66880383], [.59480972, .56776003]],
                 [[2.36270298, 2.36904306], [2.38090835, 2.38247847]]]]  # fmt: skip
    torch.testing.assert_close(z, torch.tensor(expected, dtype=double), rtol=0, atol=1e-8)


def test_cs231n_max_pool() -> None:
    a = F.max_pool2d(line(-0.3, 0.4, 2, 3, 4, 4), 2)
    first = [[-0.26315789, -0.24842105], [-0.20421053, -0.18947368]]
    last = [[0.32631579, 0.34105263], [0.38526316, 0.4]]
    torch.testing.assert_close(a[0, 0], torch.tensor(first, dtype=double), rtol=0, atol=1e-8)
    torch.testing.assert_close(a[-1, -1], torch.tensor(last, dtype=double), rtol=0, atol=1e-8)


def test_cs231n_batch_norm() -> None:
    numbers = np.random.RandomState(231)
    x, first, second = (numbers.randn(*shape) for shape in ((200, 50), (50, 60), (60, 3)))
    a = torch.tensor(np.maximum(0, x @ first) @ second)
    torch.testing.assert_close(
        a.mean(0), torch.tensor([-2.3814598, -13.18038246, 1.91780462], dtype=double), rtol=1e-8, atol=0
    )
    expected = torch.tensor([27.18502186, 34.21455511, 37.68611762], dtype=double)
    torch.testing.assert_close(a.std(0, correction=0), expected, rtol=1e-8, atol=0)
    γ, β = torch.tensor([1.0, 2.0, 3.0], dtype=double), torch.tensor([11.0, 12.0, 13.0], dtype=double)
    y = F.batch_norm(a, None, None, γ, β, training=True)
    torch.testing.assert_close(y.mean(0), β, rtol=0, atol=1e-8)
    expected = torch.tensor([0.99999999, 1.99999999, 2.99999999], dtype=double)
    torch.testing.assert_close(y.std(0, correction=0), expected, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Traps: convolution and pools
# ---------------------------------------------------------------------------------------------------------------------


def test_no_rows_and_no_channels() -> None:
    same(*both("conv2d", [randn(0, 2, 5, 5), randn(3, 2, 2, 2), randn(3)]))
    for name in ("avg_pool2d", "max_pool2d"):
        same(*both(name, [randn(0, 2, 5, 5)], 2))
    with pytest.raises(mm.InputError, match="at least one channel"):  # where torch fails in the backward
        F.conv2d(randn(2, 0, 5, 5), randn(3, 0, 2, 2))


FORMS = [*itertools.product((torch.contiguous_format, torch.channels_last), repeat=2)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layouts_of_memory(form: tuple[torch.memory_format, ...]) -> None:
    """z lies as torch's, ∂a as a, and ∂W as W, or DDP warns of it."""
    found = []
    for home in (F, T):
        x = randn(2, 4, 6, 5).contiguous(memory_format=form[0]).requires_grad_()
        weight = randn(3, 4, 2, 2).contiguous(memory_format=form[1]).requires_grad_()
        z = home.conv2d(x, weight)
        found.append([z, *torch.autograd.grad(z.square().sum(), (x, weight))])
    same(*found)
    z, a_grad, weight_grad = found[0]
    assert z.stride() == found[1][0].stride()
    assert weight_grad.stride() == weight.stride()
    if form[0] == torch.channels_last or form[1] != torch.channels_last:
        assert a_grad.stride() == x.stride()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_same_padding() -> None:
    """With an even kernel, where torch pads one more at the end; in one dimension fewer, and as "valid"."""
    for kernel, d in itertools.product((1, 2, 3, 4), (1, 2)):
        weight = randn(2, 2, kernel, 3)
        for x in (randn(2, 2, 5, 4), randn(2, 5, 4)):
            same(*both("conv2d", [x, weight], padding="same", dilation=d))
    same(*both("conv2d", [randn(2, 2, 5, 4), randn(2, 2, 2, 3)], padding="valid"))


def test_largest_of_nan_ties_zeros_and_infinity() -> None:
    """NaN wins, the first of equals does, −0 equals 0, and −inf beside the padding points inside."""
    nan, inf = math.nan, math.inf
    x = torch.tensor([[nan, 2.0, 1.0, 1.0], [0.0, -0.0, 1.0, 1.0], [-0.0, 0.0, -inf, -inf], [0.0, 0.0, -inf, nan]])
    for arguments in ((2,), (2, 1), (3, 2, 1), (2, 2, 1)):
        found = both("max_pool2d", [x[None, None]], *arguments, return_indices=True, second=False)
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    y, places = F.max_pool2d(torch.full((1, 1, 2, 2), -inf), 2, 2, 1, return_indices=True)
    assert places.flatten().tolist() == [0, 1, 2, 3]
    assert y.eq(-inf).all()


def test_windows_of_every_kind() -> None:
    """Kernel, stride, padding, ceil_mode, dilation and divisors, also where windows overhang or leave gaps."""
    x = randn(2, 2, 7, 6)
    for k, s, q, ceil, d in itertools.product((2, 3, (3, 2)), (None, 1, (2, 3), 4), (0, 1), (False, True), (1, 2)):
        same(*both("max_pool2d", [x], k, s, q, d, ceil, True))
        for include, divisor in ((True, None), (False, None), (True, 5)) if d == 1 else ():
            same(*both("avg_pool2d", [x], k, s, q, ceil, include, divisor))


# ---------------------------------------------------------------------------------------------------------------------
# Traps: norms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None], ids=str)
def test_running_statistics(momentum: float | None) -> None:
    """The same bits as torch's over many batches, one of them without rows."""
    ours, theirs = mm.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for number in range(100):
        x = torch.randn(4 * (number != 7), 3, 2, 2, generator=torch.Generator().manual_seed(number)) * 3 + number
        for model in (ours, theirs):
            model(x)
    for mine, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(("variance", "mean"), [(1e-7, 0.0), (1.0, 1e3), (1.0, 1e5)])
def test_tiny_variance_and_large_mean(variance: float, mean: float) -> None:
    """In float32: the running variance as torch's, and the gradients no further from float64 than torch's."""
    x = (randn(64, 4) * variance**0.5 + mean).float()
    parameters = [randn(4).float(), randn(4, seed=1).float()]
    errors, running = [], []
    exact = results(_normed(T, None, None), x.double(), *map(Tensor.double, parameters), second=False)
    for home in (F, T):
        m, s = torch.zeros(4), torch.ones(4)
        found = results(_normed(home, m, s), x, *parameters, second=False)
        errors.append([(a - b).abs().max().item() for a, b in zip(found, exact, strict=True)])
        running.append([m, s])
    assert all(map(torch.equal, *running))
    for mine, other in zip(*errors, strict=True):
        assert mine <= 2 * other + 1e-6  # both are a few roundings of numbers up to 10


def _normed(home: Any, m: Tensor | None, s: Tensor | None) -> Callable[..., Tensor]:
    return lambda x, *parameters: home.batch_norm(x, m, s, *parameters, True, 1.0)


def test_one_number_for_a_channel_is_refused() -> None:
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(mm.InputError, match="more than one number for each channel"):
            F.batch_norm(randn(*shape), None, None, training=True)
    with pytest.raises(mm.InputError, match="under vmap"):
        torch.func.vmap(lambda x: F.batch_norm(x.unsqueeze(0), None, None, training=True))(randn(5, 3))
    same(*both("batch_norm", [randn(1, 3)], torch.zeros(3).double(), torch.ones(3).double()))


def _evaluated(buffers: Sequence[Tensor], training: bool, x: Tensor, *parameters: Tensor) -> Tensor:
    return F.batch_norm(x, *buffers, *parameters, training)


def test_a_batch_without_rows() -> None:
    for shape in ((0, 3), (0, 3, 2, 2)):
        buffers = torch.zeros(3, dtype=double), torch.ones(3, dtype=double)
        for training in (True, False):
            found = results(partial(_evaluated, buffers, training), randn(*shape), randn(3), randn(3), second=False)
            assert found[0].shape == shape
            assert all(gradient.eq(0).all() for gradient in found[1:])
        same(buffers, (torch.zeros(3, dtype=double), torch.ones(3, dtype=double)))
    layer = mm.LayerNorm(3, dtype=double)
    assert layer(randn(0, 3)).shape == (0, 3)


def test_a_bias_before_a_batch_norm_has_no_gradient() -> None:
    """Σ_N ∂C/∂x = 0."""
    layer, norm = mm.Affine(4, 3, dtype=double), mm.BatchNorm1d(3, dtype=double)
    norm(layer(randn(50, 4))).pow(3).sum().backward()
    assert layer.bias.grad is not None
    assert layer.bias.grad.abs().max() < 1e-12
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_parameters_in_float32(dtype: torch.dtype) -> None:
    """As torch mixes them: statistics and gradients of γ and β stay in float32, and are no further from the truth."""
    x = randn(33, 4, dtype=dtype)
    for name, argument in (("BatchNorm1d", 4), ("LayerNorm", 4)):
        found = []
        for home, kind in ((mm, dtype), (nn, dtype), (nn, double)):
            model = getattr(home, name)(argument, dtype=double if kind == double else torch.float32)
            input = x.to(kind).requires_grad_()
            y = model(input)
            gradients = torch.autograd.grad((y.to(double) ** 3).sum(), [input, *model.parameters()])
            found.append([y, *gradients, *model.buffers()])
        for mine, torchs, exact in zip(*found, strict=True):
            assert mine.dtype == torchs.dtype
            bound = 1.5 * (torchs.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps
            assert (mine.double() - exact).abs().max() <= bound


def test_buffers_are_written_by_the_module_alone() -> None:
    """functional_call writes the buffers that it is given, a compiled module its own; evaluation writes none."""
    model, twin = mm.BatchNorm1d(3, dtype=double), nn.BatchNorm1d(3, dtype=double)
    given = [{name: value.clone() for name, value in each.state_dict().items()} for each in (model, twin)]
    for each, state in zip((model, twin), given, strict=True):
        torch.func.functional_call(each, state, (randn(5, 3),))
    same(given[0].values(), given[1].values())
    same(model.state_dict().values(), nn.BatchNorm1d(3, dtype=double).state_dict().values())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for each in (compiled, twin):
        each(randn(5, 3))
        each.eval()
        each(randn(5, 3))
    same(model.state_dict().values(), twin.state_dict().values())


# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision, refusals, conversion
# ---------------------------------------------------------------------------------------------------------------------


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 84), nn.LayerNorm(84), nn.ReLU(),
        nn.Linear(84, 10), nn.Softmax(1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_casts_as_torchs(dtype: torch.dtype) -> None:
    """The dtype of every layer's output, its values to a rounding, and the gradients."""
    plain = lenet()
    ours = mm.convert(copy.deepcopy(plain))
    seen: list[list[Tensor]] = [[], []]
    for model, outputs in zip((ours, plain), seen, strict=True):
        for layer in model:
            layer.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(randn(4, 1, 28, 28, dtype=torch.float32))
        (output.float() * torch.linspace(-1, 2, 10)).sum().backward()
    for mine, expected in zip(*seen, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    scale = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-18  # sums of up to 3,136 terms
    for parameter, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert (parameter.grad - other.grad).abs().max() <= scale * max(1.0, other.grad.abs().max())


def test_convert_and_revert() -> None:
    plain = lenet().double()
    ours = mm.convert(copy.deepcopy(plain))
    assert [type(layer).__module__.split(".")[0] for layer in ours if not isinstance(layer, nn.Flatten)] == [
        "manual_mlp"
    ] * 12
    assert mm.left_alone(ours) == {}
    x = randn(4, 1, 28, 28)
    mm.testing.assert_manual_backward(ours, x)
    same(*(results(lambda x, *_, model=model: model(x), x) for model in (ours, copy.deepcopy(plain))))
    plain.load_state_dict(ours.state_dict())
    assert [type(layer) for layer in mm.revert(ours)] == [type(layer) for layer in plain]
    odd = nn.Sequential(nn.Conv2d(1, 2, 3, padding_mode="reflect"), nn.Conv2d(2, 2, 3))
    assert "padding_mode" in mm.left_alone(odd)["0"]
    assert type(mm.convert(odd)[0]) is nn.Conv2d


# ---------------------------------------------------------------------------------------------------------------------
# A whole net
# ---------------------------------------------------------------------------------------------------------------------


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    """Small nets of grids with 5 outputs, and 4 samples for each."""
    torch.manual_seed(0)
    images, rows = randn(4, 2, 6, 6), randn(4, 7)
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "lenet": (nn.Sequential(
            nn.Conv2d(2, 3, 3, padding="same"), nn.BatchNorm2d(3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, 1, 1),
            nn.GELU(), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(16, 5)), images),
        "ours": (nn.Sequential(
            mm.Conv2d(2, 4, 3, 2, bias=False), mm.BatchNorm2d(4, momentum=None), mm.ReLU(), nn.Flatten(),
            mm.AffineActivation(16, 6), mm.LayerNorm(6), mm.Dropout(0.5), mm.Affine(6, 5)), images),
        "rows": (nn.Sequential(
            mm.Affine(7, 6, bias=False), mm.BatchNorm1d(6, affine=False), mm.Sigmoid(), mm.Dropout(0.3),
            mm.Affine(6, 5), mm.Softmax(1)), rows),
        "residual": (nn.Sequential(
            mm.Conv2d(2, 3, 3, padding=1), mm.Residual(mm.BatchNorm2d(3), mm.Tanh(), mm.Conv2d(3, 3, 3, padding=1)),
            nn.Flatten(), mm.Affine(108, 5)), images),
    }  # fmt: skip
    return {name: (model.double(), x) for name, (model, x) in made.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["lenet", "ours", "rows", "residual"])
def test_network_loss(name: str, training: bool) -> None:
    """C, its first and its second derivatives, as layer by layer; none of a grid is torch's."""
    model, x = nets()[name]
    model.train(training)
    twin, target, found = copy.deepcopy(model), randn(4, 5), []
    of_grids = ("conv", "pool", "norm", "softmax", "slice", "gather")  # second derivatives of activations are torch's
    for each in (model, twin):
        leaves = [x.clone().requires_grad_(), *each.parameters()]
        torch.manual_seed(1)
        with Operators() as operators:
            if each is model:
                cost = mm.network.network_loss(each, leaves[0], target)
                assert type(cost.grad_fn).__name__ == "NetworkCostBackward"
            else:
                cost = F.quadratic_loss(each(leaves[0]), target)
            first = torch.autograd.grad(cost, leaves, create_graph=True)
            squares = sum(gradient.square().sum() for gradient in first)
            second = torch.autograd.grad(squares, leaves, allow_unused=True, materialize_grads=True)
        names = [name for name in operators.names if "_backward" in name]
        assert each is twin or not [name for name in names if any(map(name.__contains__, of_grids))]
        found.append([cost, *first, *second])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)  # sums of some hundred products


def test_network_loss_updates_statistics_once_a_step() -> None:
    for name in ("lenet", "ours", "rows"):
        model, x = nets()[name]
        twin = copy.deepcopy(model)
        for _ in range(3):
            torch.manual_seed(1)
            mm.network.network_loss(model, x, randn(4, 5)).backward()
            torch.manual_seed(1)
            F.quadratic_loss(twin(x), randn(4, 5)).backward()
        same(model.state_dict().values(), twin.state_dict().values())
        same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_evaluation_between_the_passes_changes_nothing() -> None:
    model, x = nets()["lenet"]
    cost = mm.network.network_loss(model, x, randn(4, 5))
    expected = torch.autograd.grad(cost, [*model.parameters()], retain_graph=True)
    model.eval()
    model[1].running_mean.add_(1)  # type: ignore[operator, union-attr]
    same(torch.autograd.grad(cost, [*model.parameters()]), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["lenet", "ours", "rows", "residual"])
def test_trace(name: str, training: bool) -> None:
    """z and δ of each layer as autograd's, its gradients and new weights; the model stays as it is."""
    model, x = nets()[name]
    model.train(training)
    twin, target, outputs = copy.deepcopy(model), randn(4, 5), []
    kinds = (nn.Linear, mm.AffineActivation, *RULES)
    for layer in (layer for layer in twin.modules() if isinstance(layer, kinds)):
        layer.register_forward_hook(lambda layer, _, output: outputs.append((layer, output)) or output.retain_grad())
    torch.manual_seed(1)
    F.quadratic_loss(twin(x), target).backward()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    traced = mm.trace(model, x, target, lr=0.5)
    same(before.values(), model.state_dict().values())
    of_modules = [layer for layer, rule in traced.rule.items() if rule != "sum"]
    for l, (layer, output) in zip(of_modules, outputs, strict=True):  # noqa: E741
        fused = isinstance(layer, mm.AffineActivation)
        same([traced.a[l] if fused else traced.z[l]], [output])
        same([traced.delta[l]], [output.grad * traced.slope[l] if fused else output.grad])
    pairs = [(getattr(traced, f"{kind}weight"), getattr(traced, f"{kind}bias")) for kind in ("grad_", "new_")]
    found, new = ([v for l in w for v in (w[l], b[l]) if v is not None] for w, b in pairs)  # noqa: E741
    same(found, [parameter.grad for parameter in twin.parameters()])
    same(new, [parameter - 0.5 * parameter.grad for parameter in twin.parameters()])
    header, *lines = str(traced).split("\n\n")[1].splitlines()
    assert header.split()[:2] == ["l", "from"]
    assert [line.split()[0] for line in lines] == [*map(str, traced.a)]
    assert all(rule in line for rule, line in zip(traced.rule.values(), lines[1:], strict=True))
    json.dumps(traced.to_dict())
    assert r"\text{rule}" in traced.to_latex()


@pytest.mark.parametrize("training", [True, False])
def test_each_line_of_a_trace_of_norms_is_true(training: bool) -> None:
    """The printed formulas, worked out in the sheet's letters."""
    torch.manual_seed(0)
    net = nn.Sequential(mm.Affine(2, 3, False), mm.BatchNorm1d(3), mm.Tanh(), mm.LayerNorm(3), mm.Softmax(1)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x, ŷ = randn(4, 2), randn(4, 3)
    net(x)
    traced = mm.trace(net.train(training), x, ŷ)
    lines = {symbol: (formula, value) for _, step in traced.formulas() for symbol, formula, value in step}
    z, a, δ = traced.z, traced.a, traced.delta
    if training:
        μ, r = a[2].mean(0), (a[2].var(0, unbiased=False) + 1e-5).rsqrt()
    else:
        μ, r = net[1].running_mean, (net[1].running_var + 1e-5).rsqrt()  # type: ignore[operator]
    x̂ = (a[2] - μ) * r
    r4 = (a[3].var(1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    x̂4 = (a[3] - a[3].mean(1, keepdim=True)) * r4
    γ2, β2, γ3, β3 = (parameter.detach() for parameter in [*net.parameters()][1:])
    rP = r * sheet.P(γ2 * δ[3], x̂, (0,)) if training else r * γ2 * δ[3]
    expected = {
        "z³": ("γ² ⊙ norm(a²) + β²", γ2 * x̂ + β2),
        "z⁴": ("γ³ ⊙ norm(a³) + β³", γ3 * x̂4 + β3),
        "z⁵": ("softmax(a⁴)", a[4].softmax(1)),
        "δ⁴": ("(z⁵ ⊙ (δ⁵ − Σ δ⁵ ⊙ z⁵))", z[5] * (δ[5] - (δ[5] * z[5]).sum(1, keepdim=True))),
        "δ³": ("(r P(γ³ ⊙ δ⁴)) ⊙ tanh′(z³)", r4 * sheet.P(γ3 * δ[4], x̂4, (1,)) * (1 - a[3] ** 2)),
        "δ²": ("(r P(γ² ⊙ δ³))" if training else "(r γ² ⊙ δ³)", rP),
        "∂C/∂γ²": ("Σ δ³ ⊙ norm(a²)", (δ[3] * x̂).sum(0)),
        "∂C/∂β³": ("Σ δ⁴", δ[4].sum(0)),
        "new γ³": ("γ³ − LR · ∂C/∂γ³", γ3 - (δ[4] * x̂4).sum(0)),
    }
    for symbol, (formula, value) in expected.items():
        assert lines[symbol][0] == formula
        torch.testing.assert_close(lines[symbol][1], value, rtol=1e-12, atol=1e-12)
    assert all(f"{symbol} = {formula}" in str(traced) for symbol, (formula, _) in expected.items())
    panels = [axes.get_title() for axes in mm.plots.flow(traced).axes]
    name = r"\mathrm{batch\ norm}" if training else r"\mathrm{running\ norm}"
    told = [panel for panel in panels if f"{name}(a^2)" in panel or rf"{name}^T(\delta^3)" in panel]
    assert told == [panels[1], panels[7]]
    assert len(mm.plots.network(traced).axes) == 1


def test_softmax_without_a_dimension() -> None:
    """As torch chooses one, with torch's warning."""
    z = randn(3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        same([F.softmax(z), mm.Softmax()(z)], [z.softmax(1)] * 2)


def test_what_a_trace_of_grids_refuses() -> None:
    model, x = nets()["lenet"]
    for input, target, sentence in (
        (x[:, :1], randn(4, 5), r"for an input of shape \(4, 1, 6, 6\)"),
        (x[:, :, :3, :3], randn(4, 5), r"an input that fits the layers; got \(4, 2, 3, 3\)"),
        (x.float(), randn(4, 5), "expected .*dtype"),
        (x, randn(4, 4), "a target of shape"),
        (x[:0], randn(0, 5), "at least one row"),
    ):
        with pytest.raises(mm.InputError, match=sentence):
            mm.trace(model, input, target)
    model.eval()  # a batch of one
    assert mm.trace(model, x[0], randn(5)).to_dict() == mm.trace(model, x[:1], randn(1, 5)).to_dict()
    with pytest.raises(mm.InputError, match="draw its histograms"):
        mm.plots.flow(mm.trace(model, x, randn(4, 5)))
    norm = mm.LayerNorm(5)
    with pytest.raises(mm.InputError, match="weight' twice, a tied one"):
        mm.trace(nn.Sequential(mm.Affine(2, 5), norm, norm).double(), randn(4, 2), randn(4, 5))


def test_unflatten() -> None:
    """Rows of numbers as images, in both executors; second derivatives too."""
    images = nn.Sequential(nn.Unflatten(1, (2, 3, 3)), mm.Conv2d(2, 2, 2), nn.Flatten(), mm.Affine(8, 5)).double()
    x, target = randn(4, 18), randn(4, 5)
    leaves = [x.requires_grad_(), *images.parameters()]
    same([mm.network.network_loss(images, x, target)], [F.quadratic_loss(images(x), target)])
    costs = mm.network.network_loss(images, x, target), F.quadratic_loss(images(x), target)
    torch.testing.assert_close(*(torch.autograd.grad(cost, leaves) for cost in costs), rtol=1e-12, atol=1e-12)
    assert mm.trace(images, x.detach(), target).rule[2] == "reshape"


def test_who_takes_grids_and_who_refuses() -> None:
    model, x = nets()["lenet"]
    target = randn(4, 5)
    sentence = r"got Conv2d at '0': mm\.trace and mm\.network\.network_loss \(backprop=network\) run it"
    with pytest.raises(mm.InputError, match=sentence):
        mm.BackpropEngine(model, torch.optim.SGD(model.parameters(), 0.1))
    for target, sentence in (
        (randn(4, 4), "target of shape"),
        (torch.arange(4), "target of shape"),
        (randn(4, 5).float(), "target of shape"),
    ):  # fmt: skip
        with pytest.raises(mm.InputError, match=sentence):
            mm.network.network_loss(model, x, target)
    with pytest.raises(mm.InputError, match="labels from 0 to 4"):
        mm.network.network_loss(model, x, torch.tensor([0, 1, 2, 5]), "cross_entropy")
    with pytest.raises(mm.InputError, match=r"got \(3, 2, 3, 3\)"):
        mm.network.network_loss(model, randn(4, 3, 6, 6), randn(4, 5))
    with pytest.raises(mm.InputError, match=r"put an nn\.Flatten before"):
        mm.network.network_loss(nn.Sequential(mm.Conv2d(2, 3, 1), mm.Affine(6, 5)).double(), x, randn(4, 5))
    with pytest.raises(mm.InputError, match="ends in softmax"):
        mm.network.network_loss(nets()["rows"][0], randn(4, 7), randn(4, 5), "cross_entropy")
    dropped = nn.Sequential(mm.Conv2d(2, 3, 1), mm.Tanh(), nn.Dropout(), nn.Flatten(), mm.Affine(108, 5)).double()
    with pytest.raises(mm.InputError, match=r"follows a grid: only its own layers run it \(backprop=layers\)"):
        mm.network.network_loss(dropped, x, randn(4, 5))
    with pytest.raises(mm.InputError, match="backprop=layers"):
        mm.network.network_loss(nn.Sequential(nn.Linear(7, 7), nn.RNN(7, 5)).double(), randn(4, 7), randn(4, 5))

    images = nn.Sequential(mm.Conv2d(2, 3, 1), mm.Tanh(), nn.Flatten(), mm.Affine(108, 1)).double()
    for target in (torch.arange(4), torch.zeros(4, 1, dtype=torch.complex128)):
        with pytest.raises(mm.InputError, match=r"a target of shape \(4, 1\) and torch.float64"):
            mm.network.network_loss(images, x, target)


def test_a_dropout_of_rows_beside_a_grid() -> None:
    """Rows become a grid behind it, or in another branch: what it reads has a known width."""
    grid = nn.Sequential(nn.Unflatten(1, (1, 3, 3)), mm.Conv2d(1, 1, 3, padding=1), nn.Flatten())
    x, target = randn(4, 9), randn(4, 2)
    for before in (
        (mm.LayerNorm(9), nn.Dropout(), grid),
        (mm.Sum(nn.Identity(), grid), nn.Dropout()),
        (mm.Sum(grid, nn.Sequential(nn.Dropout(), mm.Affine(9, 9))),),
    ):
        model = nn.Sequential(*before, mm.Affine(9, 2)).double()
        costs = []
        for cost in (mm.network.network_loss, lambda net, x, target: mm.functional.quadratic_loss(net(x), target)):
            torch.manual_seed(0)
            costs.append(cost(model, x, target))
        torch.testing.assert_close(*costs, rtol=0, atol=1e-12)
    wrong = nn.Sequential(mm.Sum(grid, mm.Affine(9, 9), mm.Affine(8, 9)), mm.Affine(9, 2)).double()
    with pytest.raises(mm.InputError, match=r"in_features=9 at '0\.2', as wide"):
        mm.network.network_loss(wrong, x, target)


def test_a_batch_norm_without_its_counter() -> None:
    for ours, theirs in ((mm.BatchNorm1d(3), nn.BatchNorm1d(3)), (mm.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3))):
        theirs.momentum = ours.momentum
        ours.num_batches_tracked = theirs.num_batches_tracked = None
        x = torch.randn(5, 3)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_a_sparse_target_of_a_grid_is_refused() -> None:
    """Its cost was 0: a product with a sparse tensor of zeros holds nothing to sum."""
    model = nn.Sequential(mm.Conv2d(1, 2, 2), nn.Flatten(), mm.Affine(8, 4)).double()
    for target in (randn(5, 4).to_sparse(), torch.zeros(5, dtype=torch.int64).to_sparse()):
        with pytest.raises(mm.InputError, match=r"dense tensors; got a sparse one as target: call \.to_dense"):
            mm.network.network_loss(model, randn(5, 1, 3, 3), target, "cross_entropy")


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "complex conv": (lambda: F.conv2d(torch.ones(1, 1, 3, 3) * 1j, torch.ones(1, 1, 2, 2) * 1j), "imaginary parts"),
    "complex max": (lambda: F.max_pool2d(torch.ones(1, 3, 3) * 1j, 2), "imaginary parts"),
    "complex average": (lambda: F.avg_pool2d(torch.ones(1, 3, 3) * 1j, 2), "imaginary parts"),
    "complex norm": (lambda: F.batch_norm(torch.ones(3, 3) * 1j, None, None, training=True), "imaginary parts"),
    "complex layer norm": (lambda: F.layer_norm(torch.ones(3, 3) * 1j, (3,)), "imaginary parts"),
    "complex softmax": (lambda: F.softmax(torch.ones(3, 3) * 1j, 1), "imaginary parts"),
    "channels": (lambda: mm.Conv2d(3, 2, 2)(randn(1, 4, 3, 3).float()), "got .2, 3, 2, 2."),
    "dtypes": (lambda: mm.Conv2d(3, 2, 2)(randn(1, 3, 3, 3)), "one dtype"),
    "rows": (lambda: mm.Conv2d(3, 2, 2)(torch.ones(3, 4)), "shape .N, C, H, W."),
    "pool of rows": (lambda: mm.MaxPool2d(2)(torch.ones(3, 4)), "shape .N, C, H, W."),
    "bias": (lambda: F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(2, 1, 2, 2), torch.ones(3)), "bias of shape .2,."),
    "axes": (lambda: F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(2, 1, 2, 2), stride=(1, 1, 1)), "two axes"),
    "padding": (lambda: F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(2, 1, 2, 2), padding="full"), "'valid', 'same'"),
    "stride": (lambda: F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(2, 1, 2, 2), None, 2, "same"), "stride of 1"),
    "padding mode": (lambda: mm.Conv2d(1, 1, 2, padding_mode="circular"), "padding_mode='zeros'"),
    "no statistics": (lambda: F.batch_norm(torch.ones(3, 3), None, None), "training=True"),
    "statistics": (lambda: F.batch_norm(torch.ones(3, 3), torch.ones(2), torch.ones(3)), "running_mean of shape .3,."),
    "eps": (lambda: F.batch_norm(torch.ones(3, 3), None, None, training=True, eps=0.0), "positive eps"),
    "one dimension": (lambda: F.batch_norm(torch.ones(3), None, None, training=True), "N, C"),
    "normalized shape": (lambda: mm.LayerNorm(4)(torch.ones(2, 3)), "input of shape"),
    "weight": (lambda: F.layer_norm(torch.ones(2, 3), (3,), torch.ones(2)), "weight of shape .3,."),
    "whole numbers": (lambda: F.softmax(torch.ones(2, 3).long(), 1), "call .float.. on it"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_sentence_for_each_mistake(name: str) -> None:
    wrong, sentence = WRONG[name]
    with pytest.raises(mm.InputError, match=sentence) as caught:
        wrong()
    assert str(caught.value).startswith("expected ")


@pytest.mark.parametrize("height", [1, 2])
def test_a_window_that_jumps_over_the_plane_is_refused(height: int) -> None:
    """torch's own layer takes −∞ from nowhere, and its backward writes beyond the plane."""
    pool, a = mm.MaxPool2d((2, 1), padding=(1, 0), dilation=(2, 1)), torch.randn(1, 1, height, 5, requires_grad=True)
    if height == 1:
        with pytest.raises(mm.InputError, match="each meet a number"):
            pool(a)
    else:
        pool(a).sum().backward()
        assert a.grad is not None
        assert a.grad.sum() == pool(a).numel()
