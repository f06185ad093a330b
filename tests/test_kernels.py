"""Each kernel beside its row of the sheet: the quicker form computes the written one."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from manual_mlp import formulas as sheet
from manual_mlp import grids, kernels
from manual_mlp.formulas import Cost, Row
from tests.cases import ROWS, label, rows

EXACT = (torch.float64, torch.float32)
DTYPES = (*EXACT, *kernels.ROUNDED)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# relu branches at few elements, where tests are, and works on bits at many.
FORMS: list[tuple[str, Row, Callable[..., Tensor]]] = [(label(row), row, kernels.kernel(row).delta) for row in ROWS]
FORMS += [("relu of many", sheet.ACTIVATIONS["relu"], partial(kernels.KERNELS["relu", "a"].delta, many=0))]
forms = pytest.mark.parametrize(("row", "delta"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
INPLACE = [(label(row), row, kernels.kernel(row).G_, kernels.kernel(row).delta_) for row in ROWS]
_relu = kernels.KERNELS["relu", "a"]
INPLACE += [("relu of many", sheet.ACTIVATIONS["relu"], _relu.G_, partial(_relu.delta_, many=0))]
inplace = pytest.mark.parametrize(
    ("row", "G_", "delta_"), [form[1:] for form in INPLACE], ids=[form[0] for form in INPLACE]
)


def hard(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs of g and z: a wide range, and every pair of numbers that are easily got wrong."""
    smallest = torch.finfo(dtype).smallest_normal
    kinds = [-torch.inf, -40.0, -2.0, -smallest, -0.0, 0.0, smallest, 0.3, 20.0, 40.0, torch.inf, torch.nan, -torch.nan]
    z, g = torch.tensor(list(itertools.product(kinds, kinds)), dtype=dtype).t()
    wide = torch.linspace(-40, 40, 801, dtype=torch.float64).to(dtype)
    return torch.cat([g, torch.linspace(-2, 3, 801, dtype=torch.float64).to(dtype)]), torch.cat([z, wide])


def saved_of(row: Row, z: Tensor) -> Tensor:
    return kernels.kernel(row).G(z, *row.values) if row.saves == "a" else z


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """NaN, of either sign, where NaN is expected; else the number, −0 apart from 0."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


def expected_of(row: Row, g: Tensor, saved: Tensor) -> Tensor:
    """δ by the row; in half precision, the row in float32 rounded once, or an operation a rounding where torch does."""
    kernel = kernels.KERNELS.get((row.name, row.saves))
    if g.dtype not in kernels.ROUNDED or (kernel is not None and g.dtype in kernel.rounds):
        return row.delta(g, saved, *row.values)
    return row.delta(g.float(), saved.float(), *row.values).to(g.dtype)


@forms
@dtypes
def test_delta_has_the_bits_of_its_row(row: Row, delta: Callable[..., Tensor], dtype: torch.dtype) -> None:
    g, z = hard(dtype)
    saved = saved_of(row, z)
    expected = expected_of(row, g, saved)
    with torch.no_grad():
        assert_same_bits(delta(g, saved, *row.values), expected)
    recorded = g.clone().requires_grad_()
    assert_same_bits(delta(recorded, saved, *row.values).detach(), expected)


@forms
@dtypes
def test_delta_of_every_layout(row: Row, delta: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Strided, transposed, expanded, negated by a bit."""
    g, z = (values[:960].reshape(24, 40) for values in hard(dtype))
    saved = saved_of(row, z)
    for given, kept in (
        (g.t(), saved.t()),
        (g[:, ::2], saved[:, 1::2]),
        (g[3, 5].expand(24, 40), saved),
        (torch._neg_view(g), saved),
        (g, saved[:1].expand(24, 40)),
    ):
        before = given.clone(), kept.clone()
        with torch.no_grad():
            found = delta(given, kept, *row.values)
        assert_same_bits(found, expected_of(row, given, kept))
        assert_same_bits(given.clone(), before[0])
        assert_same_bits(kept.clone(), before[1])


@forms
def test_delta_where_something_follows(row: Row, delta: Callable[..., Tensor]) -> None:
    """Under vmap, legacy vmap, a fake mode and a recorded graph: the row's own values and derivatives."""
    g, z = torch.randn(2, 6, 8, dtype=torch.float64)
    saved = saved_of(row, z)
    expected = row.delta(g, saved, *row.values)
    with torch.no_grad():
        mapped = torch.vmap(lambda one, kept: delta(one, kept, *row.values))(g, saved)
    torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-12)
    with FakeTensorMode() as mode, torch.no_grad():
        fake = delta(mode.from_tensor(g), mode.from_tensor(saved), *row.values)
    assert fake.shape == g.shape
    for formula in (delta, row.delta):
        leaves = [g.clone().requires_grad_(), saved.clone().requires_grad_()]
        first = torch.autograd.grad(
            formula(*leaves, *row.values).square().sum(), leaves, create_graph=True, allow_unused=True
        )
        (batched,) = torch.autograd.grad(
            formula(*leaves, *row.values), leaves[:1], torch.stack([g, 2 * g]), is_grads_batched=True
        )
        torch.testing.assert_close(batched[1], row.delta(2 * g, saved, *row.values), rtol=1e-12, atol=1e-12)
        derivatives = [gradient for gradient in first if gradient is not None]
        if formula is delta:
            mine = derivatives
    for found, theirs in zip(mine, derivatives, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)


@rows
@dtypes
def test_G_is_torchs_operator(row: Row, dtype: torch.dtype) -> None:
    """torch rounds it in another order: a few eps; where the row keeps a tail that torch's gelu loses, absolutely."""
    _, z = hard(dtype)
    z = z[z.isfinite() | z.isnan()]
    found, expected = kernels.kernel(row).G(z, *row.values), row.G(z.double(), *row.values)
    assert found.dtype == dtype
    eps = 8 * torch.finfo(dtype).eps  # 1 + erf, of torch's gelu, cancels: the error is of the order of z eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=eps, equal_nan=True)


@inplace
@dtypes
def test_in_place_forms_are_the_row(
    row: Row, G_: Callable[..., Tensor], delta_: Callable[..., None], dtype: torch.dtype
) -> None:
    """a and δ beside the row's: infinite and NaN, too, where a saved number is finite."""
    eps = 1e-12 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    g, z = hard(dtype)
    keep = z.isfinite() & (z.abs() <= 40)
    g, z = g[keep], z[keep]
    a = z.clone() if row.saves == "a" else torch.full_like(z, torch.nan)
    kept = a if row.saves == "a" else z.clone()
    G_(kept, *row.values, **({} if a is kept else {"out": a}))
    torch.testing.assert_close(a, kernels.kernel(row).G(z, *row.values), rtol=eps, atol=eps)
    expected, before = expected_of(row, g, saved_of(row, z)), a.clone()
    work, mask = torch.full_like(z, torch.nan), torch.ones_like(z, dtype=torch.bool)
    written = g.clone()
    delta_(written, a, None if row.saves == "a" else kept, work, mask, *row.values)
    ordinary = g.isfinite()  # of an infinite g, g − g a² is NaN where g (1 − a²) is infinite
    torch.testing.assert_close(written[ordinary], expected[ordinary], rtol=eps, atol=eps)
    if row.name in ("relu", "leaky_relu", "identity"):
        assert_same_bits(written, expected)
    if row.saves == "a":
        assert torch.equal(a, before)


@inplace
def test_in_place_forms_of_columns(row: Row, G_: Callable[..., Tensor], delta_: Callable[..., None]) -> None:
    """All buffers column by column, as the plan lays narrow layers."""
    g, z, work = torch.randn(3, 8, 6, dtype=torch.float64).transpose(1, 2)
    mask = torch.empty(8, 6, dtype=torch.bool).t()
    expected = row.delta(g, saved_of(row, z), *row.values)
    a = z.clone() if row.saves == "a" else torch.empty_like(z)
    kept = a if row.saves == "a" else z.clone()
    G_(kept, *row.values, **({} if a is kept else {"out": a}))
    written = g.clone()
    assert written.stride() == (1, 6)
    delta_(written, a, None if row.saves == "a" else kept, work, mask, *row.values)
    torch.testing.assert_close(written, expected, rtol=1e-12, atol=1e-12)


def test_every_kernel_is_taken() -> None:
    """A kernel without a row would be dead, and so would one that is not its row's."""
    forms = {(row.name, row.saves): row for of in sheet.ACTIVATIONS.values() for row in of.forms}
    assert kernels.KERNELS.keys() <= forms.keys()
    for form, kernel in kernels.KERNELS.items():
        assert kernels.kernel(forms[form]) is kernel
    assert kernels.COST_KERNELS.keys() == sheet.COSTS.keys()


def cube(saves: str) -> Row:
    return Row(
        "cube", lambda z, s: s * z**3, lambda g, z, s: g * (3 * s * z * z), saves, torch.nn.Identity, (("s", 2.0),)
    )


def test_a_row_without_a_kernel_is_its_formulas() -> None:
    """In half precision too in float32, rounded once."""
    row = cube("z")
    G, delta, G_, delta_, *_ = kernels.kernel(row)
    z, g = torch.linspace(-1, 1, 5), torch.full((5,), 0.7)
    a, written = torch.empty(5), g.clone()
    G_(z, *row.values, out=a)
    delta_(written, a, z, torch.empty(5), torch.empty(5, dtype=torch.bool), *row.values)
    torch.testing.assert_close(a, 2 * z**3)
    torch.testing.assert_close(written, 0.7 * 6 * z * z)
    for dtype in kernels.ROUNDED:
        half, g_half = z.to(dtype), g.to(dtype)
        assert torch.equal(G(half, 2.0), (2 * half.float() ** 3).to(dtype))
        expected = (g_half.float() * (6 * half.float() * half.float())).to(dtype)
        assert torch.equal(delta(g_half, half, 2.0), expected)
        G_(half, 2.0, out=(a_half := torch.empty_like(half)))
        delta_(g_half, a_half, half, torch.empty_like(half), torch.empty_like(half, dtype=torch.bool), 2.0)
        assert torch.equal(a_half, (2 * half.float() ** 3).to(dtype))
        assert torch.equal(g_half, expected)


def test_a_rows_letter_follows_from_its_values() -> None:
    leaky, softplus = sheet.ACTIVATIONS["leaky_relu"], sheet.ACTIVATIONS["softplus"]
    assert [leaky.bind(s).saves for s in (0.2, 0.0, -0.2)] == ["a", "a", "z"]
    assert [softplus.bind(*v).saves for v in ((1.0, 20.0), (1.0, 19.9), (0.0, 20.0), (3.0, 25.0))] == [
        "a",
        "z",
        "z",
        "a",
    ]
    assert leaky.bind(0.2) == leaky.bind(0.2) != leaky.bind(0.3)
    assert hash(leaky.bind(0.2)) == hash(leaky.bind(0.2))
    assert leaky.bind(0.01) == leaky


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


def batch(cost: Cost, dtype: torch.dtype, n: int, m: int, classes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction, the kernel's target, and the target as the row takes it."""
    prediction = 3 * torch.randn(n, m, dtype=torch.float64)
    target = torch.rand(n, m, dtype=torch.float64)
    if not classes:
        return prediction.to(dtype), target.to(dtype), target.to(dtype)
    labels = torch.randint(m, (n,))
    return prediction.to(dtype), labels, torch.nn.functional.one_hot(labels, m).to(dtype)


SUMS = [(cost, False, False) for cost in sheet.COSTS.values()]
SUMS += [(cost, False, True) for cost in sheet.COSTS.values() if not cost.logits]  # the others are copied to rows
SUMS += [(sheet.COSTS["cross_entropy"], True, False)]


@pytest.mark.parametrize(
    ("cost", "classes", "columns"), SUMS, ids=[f"{c.name}{' classes' * k}{' columns' * t}" for c, k, t in SUMS]
)
@pytest.mark.parametrize("n", [7, 1300])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_sums_are_the_costs(cost: Cost, classes: bool, columns: bool, n: int, dtype: torch.dtype) -> None:
    """Both ways, of few elements and of many, in buffers by rows and by columns."""
    eps = 1e-12 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps  # sums of 1,300 rows
    m, kernel = 4, kernels.COST_KERNELS[cost.name]
    prediction, target, onehot = batch(cost, dtype, n, m, classes)
    total_weight, delta_weight = kernels.weights(cost, n, m)
    per = n if cost.per == "N" else n * m
    C, delta = cost.C(prediction, onehot).double().sum() / per, cost.delta(prediction, onehot) / per
    buffer = torch.empty(m, n, dtype=dtype).t() if columns else torch.empty(n, m, dtype=dtype)
    out = torch.empty(1, dtype=dtype)
    kernel.both(buffer)(prediction, target, out)
    for total, found in ((out.squeeze(), buffer), (kernel.total(prediction, target), kernel.delta(prediction, target))):
        torch.testing.assert_close((total * total_weight).double(), C, rtol=eps, atol=eps)
        torch.testing.assert_close(found * delta_weight, delta, rtol=eps, atol=eps)


def test_the_mean_of_nothing_is_nan() -> None:
    for cost in sheet.COSTS.values():
        assert all(weight != weight for weight in kernels.weights(cost, 0, 3))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("c", [0.3, 1e9, torch.inf])
def test_clip_factor_is_the_sheets(dtype: torch.dtype, c: float) -> None:
    norms = torch.tensor([0.0, 1e-12, 0.2, 0.3, 0.4, 7.0, torch.nan], dtype=dtype)
    found = norms.square()
    kernels.clip_factor_(found, found.new_tensor(c))
    # 1e-6 in float32: three roundings of numbers up to 1.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, sheet.clip_factor(norms, c), rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(7, 3), (1, 4), (4, 3, 5, 2), (0, 3)])
@pytest.mark.parametrize("affine", [True, False])
def test_channel_gradients_are_the_sheets(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    over = tuple(d for d in range(x.dim()) if d != 1)
    weight = torch.randn(shape[1], *(1,) * (x.dim() - 2), dtype=torch.float64) if affine else None
    μ, r = grids.moments(x, over, 1e-5)
    x̂ = grids.normalised(x, μ, r)
    expected = grids.norm_input(g, x̂, r, weight, over), grids.norm_weight(g, x̂, over), grids.norm_bias(g, over)
    found = kernels.channel_gradients(g, x̂.clone(), r, weight, over, True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    no_input, *others = kernels.channel_gradients(g, x̂.clone(), r, weight, over, False)
    assert no_input is None
    torch.testing.assert_close(others, list(expected[1:]), rtol=1e-12, atol=1e-12)
