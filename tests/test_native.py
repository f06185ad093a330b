"""Native epochs: the C code is the sheet's, equals torch's road, is built once, safely, and says why it doesn't run."""

import copy
import ctypes
import itertools
import logging
import math
import os
import pickle
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tanh

import manual_mlp as mm
from manual_mlp import formulas as sheet
from manual_mlp import functional
from manual_mlp.formulas import Row, softplus, σ
from manual_mlp.native import build, c_code
from manual_mlp.native import net as native_net
from tests.cases import ROWS, label, rows

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
pytestmark = pytest.mark.skipif(not HAS_COMPILER or not hasattr(os, "getuid"), reason="no C compiler is installed")

double = torch.float64
# After 64 mini-batches. float32 rounds at 6e-8, and each weight sums 64 updates of up to 40 products.
TOLERANCE = {double: 1e-12, torch.float32: 1e-5}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    # eps: where a gradient is 0 but for rounding, Adam divides rounding by rounding
    "adam": lambda p: torch.optim.Adam(p, lr=0.003, weight_decay=0.01, eps=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003, eps=1e-4),
}
LOSSES = tuple(sheet.COSTS)


def net(
    activation: Any = "tanh", loss: str = "quadratic", dtype: torch.dtype = double, sizes: Any = (5, 9, 6, 3)
) -> Any:
    torch.manual_seed(0)
    last = "identity" if sheet.COSTS[loss].logits else activation
    return mm.MLP(sizes, activation, last, dtype=dtype)


def data(loss: str, dtype: torch.dtype, n: int = 64 * 7 - 3, sizes: Any = (5, 9, 6, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, k, generator=generator, dtype=double) for k in (sizes[0], sizes[-1]))
    return x.to(dtype), (y.softmax(-1) if loss == "cross_entropy" else y.sigmoid()).to(dtype)


def engine(model: Any, make: str = "sgd", loss: str = "quadratic", native: Any = True) -> mm.BackpropEngine:
    return mm.BackpropEngine(model, OPTIMIZERS[make](model.parameters()), loss, native=native)


def trained(model: Any, make: str, loss: str, native: bool, x: Tensor, y: Tensor, batch: int = 7) -> dict[str, Any]:
    """An epoch of a copy, in random order → all that it leaves."""
    model = copy.deepcopy(model)
    by = engine(model, make, loss, native)
    cost = by.train_epoch(x, y, batch, torch.Generator().manual_seed(2))
    assert by.road == ("native" if native else "torch")
    gradients = [p.grad for p in model.parameters()]
    return {"w": [*model.parameters()], "C": cost, "state": by.optimizer.state_dict()["state"], "∂": gradients}


def assert_same_road_or_other(model: Any, make: str, loss: str, dtype: torch.dtype, x: Tensor, y: Tensor) -> None:
    found, expected = (trained(model, make, loss, native, x, y) for native in (True, False))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if dtype == double:  # else the comparison would say nothing
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p in moved.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, math.inf)))
        apart = zip(trained(moved, make, loss, False, x, y)["w"], expected["w"], strict=True)
        assert max(float((p - q).detach().abs().max()) for p, q in apart) < 1e-13


# ---------------------------------------------------------------------------------------------------------------------
# The formulas
# ---------------------------------------------------------------------------------------------------------------------


def call(formula: c_code.Compiled, dtype: torch.dtype, *arguments: Tensor, beside: Any = ()) -> Tensor:
    """What the C function computes of these numbers, in a library with others."""
    library = native_net._library(dtype, [formula, *beside])
    out, values = torch.empty_like(arguments[0]), torch.tensor(formula.values or (0.0,), dtype=dtype)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, arguments[0], arguments[-1], out)]
    getattr(library, formula.name)(ctypes.c_long(out.numel()), *pointers)
    return out


SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-300, -1e-300, 1e300, -1e300], dtype=double)


@rows
def test_g_and_delta_are_the_sheet_s(row: Row) -> None:
    z = torch.cat([torch.linspace(-40, 40, 4001, dtype=double), SPECIAL])
    a, g = row.G(z, *row.values), torch.linspace(-2, 2, len(z), dtype=double)
    saved = z if row.saves == "z" else a
    exact = {"rtol": 1e-14, "atol": 1e-15, "equal_nan": True}  # torch's own functions and ours: some ulp each
    torch.testing.assert_close(call(c_code.compiled(row.G, *row.values, inputs=1), double, z), a, **exact)
    delta = c_code.compiled(row.delta, *row.values, inputs=2)
    torch.testing.assert_close(call(delta, double, g, saved), row.delta(g, saved, *row.values), **exact)


RANGES: dict[Any, tuple[float, float]] = {
    torch.exp: (-700, 709),
    torch.expm1: (-50, 709),
    torch.log1p: (-0.999, 1e300),
    torch.tanh: (-30, 30),
    torch.erfc: (-7, 26),
    torch.sigmoid: (-700, 50),
    softplus: (-700, 700),
}


@pytest.mark.parametrize("dtype", [double, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_elementary_functions_keep_their_tails(dtype: torch.dtype) -> None:
    """To a few ulp beside torch's, over all that float64 holds; one build for all."""
    formulas = {function: c_code.compiled(lambda z, f=function: f(z), inputs=1) for function in RANGES}
    tiny = torch.logspace(-20, 0, 201, dtype=double)
    exact = (
        {"rtol": 4e-15, "atol": 0} if dtype == double else {"rtol": 1e-6, "atol": 1e-38}
    )  # the last denormal numbers
    for function, (low, high) in RANGES.items():
        x = torch.cat([torch.linspace(low, high, 2001, dtype=double), tiny, -tiny * 0.9]).to(dtype)
        x = x if dtype == double else x[x.abs() < 80]
        found = call(formulas[function], dtype, x, beside=[*formulas.values()])
        torch.testing.assert_close(found, function(x.double()).to(dtype), **exact)


@pytest.mark.parametrize("name", LOSSES)
def test_costs_are_the_sheet_s(name: str) -> None:
    cost = sheet.COSTS[name]
    a, y = (torch.linspace(-3, 3, 11, dtype=double), torch.linspace(0.1, 0.9, 11, dtype=double))
    for formula in (cost.C, cost.delta):
        found = call(c_code.compiled(formula, inputs=2), double, a, y)
        torch.testing.assert_close(found, formula(a, y), rtol=1e-14, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# The native road beside torch's
# ---------------------------------------------------------------------------------------------------------------------


@rows
@pytest.mark.parametrize("loss", LOSSES)
def test_every_row_and_cost(row: Row, loss: str) -> None:
    assert_same_road_or_other(net(row.twin(), loss), "sgd", loss, double, *data(loss, double))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_optimizer(make: str, dtype: torch.dtype) -> None:
    loss = "cross_entropy"
    assert_same_road_or_other(net("tanh", loss, dtype), make, loss, dtype, *data(loss, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("row", ROWS, ids=label)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_row_cost_and_optimizer(dtype: torch.dtype, row: Row, loss: str, make: str) -> None:
    assert_same_road_or_other(net(row.twin(), loss, dtype), make, loss, dtype, *data(loss, dtype))


@pytest.mark.parametrize("sizes", [(2, 8, 1), (33, 70, 17, 40), (1, 1), (40, 33, 65, 9)], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 6, 7, 13, 64])
def test_shapes(sizes: tuple[int, ...], batch: int) -> None:
    """Widths and batches on both sides of a vector, a panel and a block of rows; the last mini-batch is shorter."""
    model, (x, y) = net("sigmoid", "mse", sizes=sizes), data("mse", double, 131, sizes)
    found, expected = (trained(model, "momentum", "mse", native, x, y, batch) for native in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def both_roads(make: Callable[[bool], Any]) -> None:
    torch.testing.assert_close(make(True), make(False), rtol=1e-12, atol=1e-12)


def test_class_indices_and_a_masked_class() -> None:
    (x, _), classes = data("cross_entropy", double), torch.arange(64 * 7 - 3) % 2

    def run(native: bool) -> Any:
        model = net("tanh", "cross_entropy")
        with torch.no_grad():
            model[-1].bias[2] = -math.inf
        by = engine(model, "sgd", "cross_entropy", native)
        return [by.train_epoch(x, classes, 7), by.train_batches(x, classes, 7), *model.parameters()]

    torch.manual_seed(0)
    first = run(True)
    torch.manual_seed(0)
    torch.testing.assert_close(first, run(False), rtol=1e-12, atol=1e-12)
    assert first[0].isfinite()


def test_predictions_strides_groups_frozen_and_missing_parameters() -> None:
    x, y = data("mse", double)
    wide, apart = x.t().contiguous().t(), y.repeat_interleave(2, 1)[:, ::2]

    def run(native: bool, momentum: float, transposed: bool) -> Any:
        torch.manual_seed(0)
        layers = [mm.AffineActivation(i, o, "silu", o != 9, dtype=double) for i, o in itertools.pairwise((5, 9, 6, 3))]
        model = nn.Sequential(*layers, nn.Dropout(0.5)).eval()
        layers[1].weight.requires_grad_(False)
        groups = [
            {"params": [layers[0].weight, layers[2].bias], "lr": 0.01, "weight_decay": 0.1},
            {"params": [layers[1].bias, layers[2].weight]},
        ]
        by = mm.BackpropEngine(model, torch.optim.SGD(groups, lr=0.1, momentum=momentum), "mse", native=native)
        a = y.new_empty(3, len(y)).t() if transposed else torch.empty_like(y)
        costs = [by.train_batches(wide, apart, 7, a), by.train_batches(x, y, 7, a)]
        assert by.road == ("native" if native else "torch")
        return [*costs, a, *model.parameters(), [p.grad for p in model.parameters()]]

    for momentum, transposed in ((0.0, True), (0.5, False)):
        both_roads(lambda native: run(native, momentum, transposed))  # noqa: B023 # called at once


def test_frozen_below() -> None:
    """Step 3 ends at the lowest layer that is trained."""

    def run(native: bool) -> Any:
        model = net("gelu")
        model[0].requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        by = mm.BackpropEngine(model, torch.optim.SGD(parameters, lr=0.1), native=native)
        return [by.train_batches(*data("quadratic", double), 7), *model.parameters()]

    both_roads(run)


def test_nan_spreads_as_on_torch_s_road() -> None:
    x, y = data("quadratic", double)
    x[20, 2] = math.nan

    def run(native: bool) -> Any:
        model = net("relu")
        by = engine(model, native=native)
        return [by.train_batches(x, y, 7).isnan(), *(p.isnan() for p in model.parameters())]

    both_roads(run)


def test_other_rates_and_other_momentum_between_epochs() -> None:
    x, y = data("quadratic", double)

    def run(native: bool) -> Any:
        model = net()
        by = engine(model, native=native)
        schedule = torch.optim.lr_scheduler.ExponentialLR(by.optimizer, 0.5)
        costs = []
        for momentum in (0.0, 0.0, 0.9, 0.9):
            by.optimizer.param_groups[0]["momentum"] = momentum
            costs.append(by.train_batches(x, y, 7))
            schedule.step()
        return [*costs, *model.parameters()]

    both_roads(run)


@pytest.mark.parametrize("make", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("ordered", [True, False])
def test_where_an_epoch_is_cut_changes_no_bit(make: str, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data("quadratic", double)

    def run() -> Any:
        model = net("gelu")
        by, a = engine(model, make), torch.empty_like(y)
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            cost = by.train_batches(x, y, 7, a) if ordered else by.train_epoch(x, y, 7, generator)
        return [cost, a if ordered else cost, *model.parameters(), by.optimizer.state_dict()["state"]]

    whole = run()
    monkeypatch.setattr(native_net, "SECONDS", 0.0)
    torch.testing.assert_close(run(), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(double, marks=pytest.mark.slow)])
def test_the_width_of_vectors_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512f" not in build._processor():
        pytest.skip("a processor without AVX-512")
    models: Any = [net("gelu", "cross_entropy", dtype), net("sigmoid", "mse", dtype, (33, 70, 17, 40))]

    def run() -> Any:
        found = []
        for model, loss, make in zip(models, ("cross_entropy", "mse"), ("adam", "sgd"), strict=True):
            sizes = (33, 70, 17, 40) if loss == "mse" else (5, 9, 6, 3)
            found.append(trained(model, make, loss, True, *data(loss, dtype, sizes=sizes)))
        return found

    wide = run()
    monkeypatch.setitem(native_net.DTYPES, dtype, (*native_net.DTYPES[dtype], "-mno-avx512f"))
    torch.testing.assert_close(run(), wide, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_whole_trainings_end_alike(make: str) -> None:
    """Over ten seeds, the mean test accuracy of both roads on the digits differs by less than its standard error."""
    from sklearn.datasets import load_digits

    images, classes = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x, y = (images / 16).float(), classes.long()
    reached: dict[bool, list[float]] = {True: [], False: []}
    for seed, native in itertools.product(range(10), (True, False)):
        torch.manual_seed(seed)
        model = mm.MLP([64, 30, 10], "sigmoid", "identity")
        by = engine(model, make, "cross_entropy", native)
        for _ in range(15):
            by.train_epoch(x[:1400], y[:1400], 10)
        assert by.road == ("native" if native else "torch")
        reached[native].append(float((model(x[1400:]).argmax(1) == y[1400:]).double().mean()))
    mean = {native: sum(values) / 10 for native, values in reached.items()}
    spread = float(torch.tensor(reached[False]).std()) / math.sqrt(10)
    assert mean[False] > 0.85
    assert abs(mean[True] - mean[False]) <= max(spread, 1e-3)


def assert_k_trainings(make_nets: Callable[[], list[Any]], makes: list[str], loss: str, x: Tensor, y: Tensor) -> Any:
    """Two epochs of K nets in C leave the bits of K trainings in C."""
    together, alone = make_nets(), make_nets()
    pairs = zip(together, makes, strict=True)
    many = mm.EnsembleEngine(together, [OPTIMIZERS[make](n.parameters()) for n, make in pairs], loss, native=True)
    engines = [engine(n, make, loss) for n, make in zip(alone, makes, strict=True)]
    own, theirs = ([torch.Generator().manual_seed(seed) for seed in range(len(makes))] for _ in range(2))
    for _ in range(2):
        costs = many.train_epoch(x, y, 7, own)
        expected = [by.train_epoch(x, y, 7, each) for by, each in zip(engines, theirs, strict=True)]
        torch.testing.assert_close(costs, torch.stack(expected), rtol=0, atol=0)
    assert many.road == "native"
    for mine, other in zip(together, alone, strict=True):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close([p.detach(), p.grad], [q.detach(), q.grad], rtol=0, atol=0)
    for mine, other in zip(many.optimizers, engines, strict=True):
        torch.testing.assert_close(mine.state_dict(), other.optimizer.state_dict(), rtol=0, atol=0)
    return many


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_many_nets_are_k_trainings_bit_for_bit(make: str, threads: int) -> None:
    def nets() -> Any:
        torch.manual_seed(3)
        return [mm.MLP([5, 9, 6, 3], "tanh", dtype=double) for _ in range(5)]

    torch.set_num_threads(threads)
    try:
        assert_k_trainings(nets, [make] * 5, "mse", *data("mse", double))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("native", [True, "auto"])
def test_nets_of_any_shape_with_any_optimizer(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C the nets share nothing but the rows; "auto" takes them there also where one net would not gain."""
    (x, y), makes = data("cross_entropy", double), ["sgd", "adam", "nesterov", "decay", "adamw"]

    def nets() -> list[Any]:
        torch.manual_seed(3)
        shapes = [((5, 9, 6, 3), "tanh", True), ((5, 3), "relu", True), ((5, 300, 3), "gelu", False),
                  ((5, 2, 2, 2, 3), "sigmoid", True), ((5, 9, 3), "silu", True)]  # fmt: skip
        return [mm.MLP(sizes, row, "identity", bias, dtype=double) for sizes, row, bias in shapes]

    many = assert_k_trainings(nets, makes, "cross_entropy", x, y)
    models = nets()
    pairs = zip(models, makes, strict=True)
    auto = mm.EnsembleEngine(models, [OPTIMIZERS[make](n.parameters()) for n, make in pairs], "cross_entropy", native)
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    said = x.new_empty(5, len(x), 3)
    before = torch.stack([model(x[:7]) for model in models]).detach()
    auto.train_epoch(x, y, len(x), generators, said)
    assert auto.road == "native"
    torch.testing.assert_close(said[:, :7], before, rtol=1e-12, atol=1e-12)
    with pytest.raises(mm.InputError, match=r"net 0: expected an input of shape \(N, 5\)"):
        many.train_epoch(x[:, :4], y, 7)


def test_threads_train_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two nets waits in its thread until the other is there; one thread would wait in vain."""
    meet, train = threading.Barrier(2, timeout=20), native_net.NativeNet.train
    monkeypatch.setattr(native_net.NativeNet, "train", lambda self, *rows: meet.wait() + 1 and train(self, *rows))
    models, (x, y) = [net(), net()], data("quadratic", double)
    many = mm.EnsembleEngine(models, [OPTIMIZERS["sgd"](m.parameters()) for m in models], native=True)
    torch.set_num_threads(2)
    try:
        many.train_epoch(x, y, 7)
    finally:
        torch.set_num_threads(1)
    assert many.road == "native"


# ---------------------------------------------------------------------------------------------------------------------
# One sheet
# ---------------------------------------------------------------------------------------------------------------------


def by_the_sheet(model: Any, planted: list[Row], x: Tensor, y: Tensor) -> list[Tensor]:
    """Steps 1 to 5 for the quadratic cost and SGD with rate 0.1, by these rows' own formulas."""
    parameters = [p.detach().clone() for p in model.parameters()]
    for n in range(0, len(x), 7):
        z, a = [], [x[n : n + 7]]
        for row, W, b in zip(planted, parameters[::2], parameters[1::2], strict=True):
            z.append(sheet.affine(a[-1], W, b))
            a.append(row.G(z[-1], *row.values))
        g = sheet.quadratic_delta(a[-1], y[n : n + 7]) / len(a[0])
        for layer in range(len(z) - 1, -1, -1):
            row, W, b = planted[layer], parameters[2 * layer], parameters[2 * layer + 1]
            delta = row.delta(g, a[layer + 1] if row.saves == "a" else z[layer], *row.values)
            g = sheet.grad_input(delta, W)
            parameters[2 * layer] = W - 0.1 * sheet.grad_weight(delta, a[layer])
            parameters[2 * layer + 1] = b - 0.1 * sheet.grad_bias(delta)
    return parameters


def test_a_planted_delta_and_an_unshipped_row_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(sheet.ACTIVATIONS["tanh"], delta=lambda g, a: 1.0005 * (g * (1 - a * a)))
    mish = Row(
        "mish",
        lambda z: z * tanh(softplus(z)),
        lambda g, z: g * (torch.tanh(softplus(z)) + z * σ(z) * (1 - tanh(softplus(z)) ** 2)),
        "z",
        nn.Mish,
    )
    model, (x, y) = net("tanh"), data("quadratic", double)
    right = by_the_sheet(model, [sheet.ACTIVATIONS["tanh"]] * 3, x, y)
    for row in (wrong, mish):
        monkeypatch.setitem(sheet.ACTIVATIONS, row.name, row)
    functional.bound_row.cache_clear()
    model[1].activation = "mish"
    expected = by_the_sheet(model, [wrong, mish, wrong], x, y)
    by = engine(model)
    by.train_batches(x, y, 7)
    functional.bound_row.cache_clear()
    assert by.road == "native"
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, rtol=1e-12, atol=1e-12)
    assert max(float((p - q).abs().max()) for p, q in zip(expected, right, strict=True)) > 1e-4


def test_parameters_of_a_row_are_arguments() -> None:
    """Another slope is another number v, not another function."""
    row = sheet.ACTIVATIONS["leaky_relu"]
    one, other = (c_code.compiled(row.delta, slope, inputs=2) for slope in (0.01, 0.3))
    assert (one.code, one.values[-1], other.values[-1]) == (other.code, 0.01, 0.3)


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (lambda z: torch.cumsum(z, 0), "cumsum"),
        (lambda z: z if z > 0 else -z, "branch"),
        (lambda z: z**3, r"pow\(x, 3\)"),
        (lambda z: torch.softmax(z * 2, -1), r"softmax\(mul, -1\)"),
        (lambda z: torch.nn.functional.softplus(z, 2.0), r"softplus\(x, 2.0\)"),
        (lambda z: z[:1], "getitem"),
        (lambda z: z * torch.ones(1), "a Tensor"),
        (lambda z: z * math.exp(z), "real number"),
        (lambda z: z.tolist(), "tolist"),
    ],
)
def test_what_c_does_not_have(formula: Any, words: str) -> None:
    with pytest.raises(c_code.NotInC, match=words):
        c_code.compiled(formula, inputs=1)


# ---------------------------------------------------------------------------------------------------------------------
# Which road
# ---------------------------------------------------------------------------------------------------------------------


def hooked(by: mm.BackpropEngine) -> None:
    next(by.model.parameters()).register_hook(lambda g: g)


def stepping(by: mm.BackpropEngine) -> None:
    by.optimizer.step = lambda closure=None: None  # type: ignore[method-assign]


def dropping(by: mm.BackpropEngine) -> None:
    by.model = nn.Sequential(by.model[0], nn.Dropout(0.5), *by.model[1:])


def summing(by: Any) -> None:
    by.model = nn.Sequential(*by.model[:-1], mm.Sum(nn.Identity(), nn.Identity()), by.model[-1])


def in_two_groups(by: Any) -> None:
    first, *others = by.model.parameters()
    by.optimizer = torch.optim.SGD([{"params": [first], "momentum": 0.9}, {"params": others}], lr=0.1)


def remembering(by: Any, name: str, value: Tensor) -> None:
    by.optimizer = OPTIMIZERS["adam"](by.model.parameters())
    by.train_batches(*data("quadratic", double, 7), 7)
    by.optimizer.state[by.model[0].weight][name] = value


CHANGES: dict[str, Any] = {
    "no chain of affine maps": summing,
    "some groups of the optimizer have momentum": in_two_groups,
    "exp_avg has another shape": lambda by: remembering(by, "exp_avg", torch.zeros(5, 9, dtype=double).t()),
    "counts its steps in no float tensor": lambda by: remembering(by, "step", torch.tensor(1.0).bfloat16()),
    "max_grad_norm": lambda by: setattr(by, "max_grad_norm", 1.0),
    "a hook": hooked,
    "step is replaced": stepping,
    "dropout": dropping,
    "maximize": lambda by: by.optimizer.param_groups[0].update(maximize=True),
    "dampening": lambda by: by.optimizer.param_groups[0].update(momentum=0.9, dampening=0.1),
    "rate in a tensor": lambda by: by.optimizer.param_groups[0].update(lr=torch.tensor(0.1, dtype=double)),
    "not contiguous": lambda by: setattr(by.model[0].weight, "data", by.model[0].weight.detach().t().contiguous().t()),
}


@pytest.mark.parametrize("words", CHANGES)
def test_what_it_does_not_cover(words: str, caplog: pytest.LogCaptureFixture) -> None:
    """native=True says why; auto takes torch's road, and says so once."""
    (x, y), caplog_at = data("quadratic", double), caplog.at_level(logging.INFO, "manual_mlp")
    strict, auto = engine(net()), engine(net(), native="auto")
    CHANGES[words](strict)
    CHANGES[words](auto)
    with pytest.raises(mm.InputError, match=words):
        strict.train_epoch(x, y, 7)
    with caplog_at:
        for _ in range(2):
            auto.train_epoch(x, y, 7)
    assert auto.road == "torch"
    assert [words in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("native", [True, 1], ids=repr)
def test_bfloat16_is_torch_s(native: Any) -> None:
    """A 1, which equals True as NumPy's True does, asks for as much."""
    model, (x, y) = net(dtype=torch.float32), data("quadratic", torch.float32)
    by = mm.BackpropEngine(model, OPTIMIZERS["sgd"](model.parameters()), compute_dtype=torch.bfloat16, native=native)
    with pytest.raises(mm.InputError, match="compute_dtype"):
        by.train_epoch(x, y, 7)


def test_auto_takes_it_where_it_gains() -> None:
    def road_of(sizes: tuple[int, ...], rows: int, batch: int) -> str:
        by = engine(net(sizes=sizes), native="auto")
        by.train_epoch(*data("quadratic", double, rows, sizes), batch)
        return by.road

    assert [road_of((4, 5, 3), 40, 10), road_of((4, 256, 3), 40, 10)] == ["native", "native"]
    assert [road_of((4, 5, 3), 39, 10), road_of((4, 257, 3), 40, 10)] == ["torch", "torch"]


@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_a_step_has_the_bits_of_an_epoch_of_one_batch(make: str) -> None:
    """In C with native=True alone: "auto" would build the code for a first step."""
    (x, _), classes = data("cross_entropy", double, 14), torch.arange(14) % 3
    step, rows, auto = (engine(net("tanh", "cross_entropy"), make, "cross_entropy", by) for by in (True, True, "auto"))
    for n in (7, 14, 7):
        cost, expected = step.step(x[:n], classes[:n]), rows.train_batches(x[:n], classes[:n], 14)
        torch.testing.assert_close(cost, expected, rtol=0, atol=0)
        torch.testing.assert_close(auto.step(x[:n], classes[:n]), cost, rtol=1e-12, atol=1e-12)
    parameters = zip(step.model.parameters(), rows.model.parameters(), strict=True)
    for p, q in parameters:
        torch.testing.assert_close([p.detach(), p.grad], [q.detach(), q.grad], rtol=0, atol=0)
    assert (step.road, auto.road) == ("native", "torch")
    with pytest.raises(mm.InputError, match="class labels from 0 to 2"):
        step.step(x, classes + 1)
    with pytest.raises(mm.InputError, match="at least one row"):
        step.step(x[:0], classes[:0])
    step.max_grad_norm = 1.0
    with pytest.raises(mm.InputError, match="max_grad_norm clips"):
        step.step(x, classes)


def test_refusals_stay_the_engine_s() -> None:
    by, (x, y) = engine(net()), data("quadratic", double)
    with pytest.raises(mm.InputError, match="batch_size"):
        by.train_epoch(x, y, 0)
    with pytest.raises(mm.InputError, match=r"input of shape .* and torch\.float64"):
        by.train_epoch(x.float(), y, 7)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(mm.InputError, match="autocast"):
        by.train_epoch(x, y, 7)
    with pytest.raises(mm.InputError, match="native"):
        engine(net(), native="yes")


def test_what_follows_an_epoch() -> None:
    """Autograd notices it, .grad is filled unless SGD is plain, and a copy of the engine has the option."""
    (x, y), model = data("quadratic", double), net()
    versions = [p._version for p in model.parameters()]
    by = engine(model)
    by.train_epoch(x, y, 7)
    assert all(p._version > old for p, old in zip(model.parameters(), versions, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert pickle.loads(pickle.dumps(by)).native is True


def test_memory() -> None:
    """An engine that only steps gathers no rows; plain SGD makes no gradients; in C a net is kept once more, packed."""
    (x, y), by = data("quadratic", double, 64 * 10, (40, 30, 3)), engine(net(sizes=(40, 30, 3)), native=False)
    by.step(x[:10], y[:10])
    by.train_batches(x, y, 10)
    assert [plan.batches for plan in by._plans.values()] == [[]]
    by.train_epoch(x, y, 10)
    assert [len(plan.batches) > 0 for plan in by._plans.values()] == [True]
    native = engine(net(sizes=(40, 30, 3)))
    native.train_epoch(x, y, 10)
    assert (by._gradients, native._gradients, native._plans) == ({}, {}, {})
    assert native._native is not None
    assert native._native.room.numel() < 3 * sum(p.numel() for p in native.model.parameters())


def test_state_goes_on_with_torch_s_optimizer() -> None:
    """The optimizer's state is torch's: half an epoch by each road, saved and loaded between."""
    x, y = data("quadratic", double)

    def run(roads: tuple[bool, bool], make: str) -> Any:
        model, state = net(), None
        for native in roads:
            by = engine(model, make, native=native)
            if state is not None:
                by.optimizer.load_state_dict(state)
            by.train_batches(x, y, 7)
            state = copy.deepcopy(by.optimizer.state_dict())
        return [*model.parameters(), state]

    for make in ("momentum", "adamw"):
        for roads in ((True, False), (False, True)):
            torch.testing.assert_close(run(roads, make), run((False, False), make), rtol=1e-12, atol=1e-12)


def test_other_threads_run_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_net, "SECONDS", 100.0)  # one call
    by, (x, y) = engine(net(sizes=(5, 64, 64, 3))), data("quadratic", double, 100_000)
    worker = threading.Thread(target=by.train_batches, args=(x, y, 10))
    worker.start()
    ticks = 0
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 20


def test_ctrl_c_leaves_whole_mini_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, averages and the number of steps are those after the same mini-batch."""
    by, (x, y) = engine(net(sizes=(5, 64, 64, 3)), "adam"), data("quadratic", double, 200_000)
    by.train_batches(x[:40], y[:40], 10)  # the build

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(native_net, "SECONDS", 0.005)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            by.train_batches(x, y, 10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    taken = int(by.optimizer.state_dict()["state"][0]["step"]) - 4
    assert 0 < taken < 20_000
    again = engine(net(sizes=(5, 64, 64, 3)), "adam")
    for k in (4, taken):
        again.train_batches(x[: 10 * k], y[: 10 * k], 10)
    torch.testing.assert_close([*by.model.parameters()], [*again.model.parameters()], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The build
# ---------------------------------------------------------------------------------------------------------------------

SEVEN = "int seven(void) { return 7; }"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, and a process that has built nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "_libraries", {})
    return tmp_path / "cache" / "manual_mlp"


def test_it_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library(SEVEN).seven() == 7
    (built,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    written = built.stat().st_mtime_ns
    monkeypatch.setattr(build, "_libraries", {})  # as another process
    assert build.library(SEVEN).seven() == 7
    assert (built.stat().st_mtime_ns, [*cache.iterdir()]) == (written, [built])
    build.library(SEVEN, ("-DOTHER",))
    assert len([*cache.iterdir()]) == 2


def spoil_folder(folder: Path, built: Path) -> None:
    folder.chmod(0o755)


def spoil_file(folder: Path, built: Path) -> None:
    built.chmod(0o722)


def spoil_link(folder: Path, built: Path) -> None:
    built.rename(folder.parent / "elsewhere.so")
    built.symlink_to(folder.parent / "elsewhere.so")


def spoil_folder_link(folder: Path, built: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def spoil_owner(folder: Path, built: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(built, 12345, -1)


SPOILT = [spoil_folder, spoil_file, spoil_link, spoil_folder_link, spoil_owner]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_others_could_have_written_is_not_loaded(spoil: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library(SEVEN)
    (built,) = cache.iterdir()
    spoil(cache, built)
    monkeypatch.setattr(build, "_libraries", {})
    with pytest.raises(build.CantBuild, match="only you can"):
        build.library(SEVEN)


def test_nothing_is_written_where_others_can_enter(cache: Path) -> None:
    elsewhere = cache.parent / "elsewhere"
    elsewhere.mkdir(parents=True)
    cache.symlink_to(elsewhere)
    with pytest.raises(build.CantBuild, match="only you can"):
        build.library(SEVEN)
    assert [*elsewhere.iterdir()] == []


@pytest.mark.parametrize("words", ['cc "', "cc -D\udcff"], ids=["an open quote", "no UTF-8"])
def test_a_cc_that_is_no_words(words: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", words)
    by = engine(net(), native="auto")
    by.train_epoch(*data("quadratic", double), 7)
    assert by.road == "torch"


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Make CC a shell script, in words; it counts its runs in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path, runs = folder / "a compiler.sh", folder / "runs"
    path.write_text(f"echo run >> {shlex.quote(str(runs))}\n{script}\n")
    monkeypatch.setenv("CC", f"sh {shlex.quote(str(path))} -DWORD")
    return runs


def test_a_failed_build_is_remembered_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = 'case "$*" in *version*) echo 1;; *) echo "error: no such thing"; exit 1;; esac'
    runs = compiler(cache.parent, monkeypatch, script)
    (x, y), by = data("quadratic", double), engine(net(), native="auto")
    with caplog.at_level(logging.INFO, "manual_mlp"):
        for _ in range(2):
            by.train_epoch(x, y, 7)
            engine(net(), native="auto").train_epoch(x, y, 7)
    assert by.road == "torch"
    assert "no such thing" in caplog.text
    assert len(runs.read_text().split()) == 2  # its version, and one build
    assert [*cache.iterdir()] == []


def test_a_compiler_that_writes_nothing_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "true")
    with pytest.raises(build.CantBuild, match="true wrote no library"):
        build.library(SEVEN)
    assert [*cache.iterdir()] == []


def test_cc_is_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shlex.quote(str(shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")))
    compiler(cache.parent, monkeypatch, f'exec {found} "$@"')
    assert build.library(SEVEN.replace("7", "WORD + 6")).seven() == 7


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache.parent))
    by = engine(net())
    with pytest.raises(mm.InputError, match="no C compiler"):
        by.train_epoch(*data("quadratic", double), 7)


def test_a_compiler_that_hangs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended with what it has started."""
    started = cache.parent / "started"
    compiler(cache.parent, monkeypatch, f"sleep 61 & echo $! > {started}; wait")
    monkeypatch.setattr(build, "TIMEOUT", 0.3)
    began = time.monotonic()
    with pytest.raises(build.CantBuild, match="more than 0 s"):
        build.library(SEVEN)
    assert time.monotonic() - began < 20
    while Path(f"/proc/{started.read_text().strip()}/exe").exists():  # until it is gone, or a zombie
        assert time.monotonic() - began < 20
        time.sleep(0.01)


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is made in a folder of its own, which is gone once it is loaded, or could not be built."""
    no_folder, folder = tmp_path / "file", tmp_path / "temporary"
    no_folder.write_text("")
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.delenv("CC", raising=False)
    assert build.library(SEVEN).seven() == 7
    assert [*folder.iterdir()] == []
    monkeypatch.setenv("CC", "true")
    with pytest.raises(build.CantBuild, match="true wrote no library"):
        build.library(SEVEN)
    assert [*folder.iterdir()] == []


@pytest.mark.slow
def test_a_build_is_quick(cache: Path) -> None:
    """At most five seconds of CPU."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    engine(net()).train_epoch(*data("quadratic", double), 7)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
