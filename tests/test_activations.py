"""Every row of the sheet: proven by SymPy from the code that runs, and G′, G″ over a wide range of z."""

import mpmath
import numpy as np
import pytest
import sympy
import torch
from sympy import symbols
from torch import Tensor
from torch.autograd import forward_ad

from manual_mlp import formulas as sheet
from manual_mlp import kernels
from manual_mlp.formulas import Cost, Row
from tests.cases import ROWS, label, rows, twin_of
from tests.sympy_sheet import a, exactly, g, names, read, z

# Enough for 1 − erf(40) not to cancel.
DIGITS = 400
wide = torch.linspace(-40, 40, 1601, dtype=torch.float64)
# Where a row changes its formula, one side of the edge is as right as the other: keep clear of it.
points = torch.cat([wide[::16] + 0.013, torch.linspace(-6, 6, 49, dtype=torch.float64) + 0.007])


def saved_of(row: Row, z: Tensor) -> Tensor:
    return row.G(z, *row.values) if row.saves == "a" else z


@rows
@pytest.mark.parametrize("side", [1, 2])
def test_sympy_proves_the_derivative(row: Row, side: int) -> None:
    """G differentiated by SymPy is the row's δ with g = 1, on either side of its `where`."""

    def chosen(condition: object, x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        return (x, y)[side - 1]

    values = exactly(row.values)
    G = sympy.sympify(read(row.G, chosen)(z, *values))
    delta = sympy.sympify(read(row.delta, chosen)(g, a if row.saves == "a" else z, *values)).subs({a: G, g: 1})
    assert sympy.simplify((sympy.diff(G, z) - delta).rewrite(sympy.exp)) == 0


curved = pytest.mark.parametrize("row", [row for row in ROWS if row.curvature is not None], ids=label)


@curved
@pytest.mark.parametrize("side", [1, 2])
def test_sympy_proves_the_second_derivative(row: Row, side: int) -> None:
    """δ with g = 1, which is G′, differentiated by SymPy is the row's G″, on either side of its `where`."""

    def chosen(condition: object, x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        return (x, y)[side - 1]

    values, letter = exactly(row.values), a if row.saves == "a" else z
    G = sympy.sympify(read(row.G, chosen)(z, *values))
    curvature = sympy.sympify(read(row.curvature, chosen)(letter, *values)).subs(a, G)
    assert sympy.simplify((sympy.diff(G, z, 2) - curvature).rewrite(sympy.exp)) == 0


@curved
def test_second_derivative_against_high_precision(row: Row) -> None:
    """G″ to an absolute 16 eps: a row in a is as coarse in its tail as its G′ is."""
    with mpmath.workdps(DIGITS):
        second = sympy.diff(sympy.sympify(read(row.G)(z, *exactly(row.values))), z, 2)
        exact_of = sympy.lambdify(z, second, "mpmath")
        exact = torch.tensor([float(exact_of(mpmath.mpf(value))) for value in points.tolist()], dtype=torch.float64)
    found = torch.zeros_like(points) + row.curvature(saved_of(row, points), *row.values)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=16 * torch.finfo(torch.float64).eps)


def evaluated(row: Row, g_value: int) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """G and delta of the row at each point, to DIGITS digits; a is G(z) at the same precision."""
    values = exactly(row.values)
    with mpmath.workdps(DIGITS):
        G = sympy.lambdify(z, read(row.G)(z, *values), "mpmath")
        delta = sympy.lambdify((g, a, z), read(row.delta)(g, a if row.saves == "a" else z, *values), "mpmath")
        at = [mpmath.mpf(value) for value in points.tolist()]
        activations = [mpmath.mpf(G(value)) for value in at]
        return activations, [mpmath.mpf(delta(g_value, *both)) for both in zip(activations, at, strict=True)]


@rows
def test_the_code_is_the_proven_expression(row: Row) -> None:
    """The code object, evaluated by SymPy to DIGITS digits, against what torch computes by it and by its kernels."""
    incoming = torch.full_like(points, 3.0)
    for exact, *found in zip(
        evaluated(row, 3),
        (row.G(points, *row.values), row.delta(incoming, saved_of(row, points), *row.values)),
        (
            kernels.kernel(row).G(points, *row.values),
            kernels.kernel(row).delta(incoming, saved_of(row, points), *row.values),
        ),
        strict=True,
    ):
        expected = torch.tensor([float(value) for value in exact], dtype=torch.float64)
        for values in found:
            torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@rows
def test_derivative_against_high_precision(row: Row) -> None:
    """G′ to a relative 1e-12 inside the row's tail, and an absolute 4 eps beyond."""
    with mpmath.workdps(DIGITS):
        G_prime = sympy.diff(sympy.sympify(read(row.G)(z, *exactly(row.values))), z)
        exact_of = sympy.lambdify(z, G_prime, "mpmath")
        exact = [mpmath.mpf(exact_of(mpmath.mpf(value))) for value in points.tolist()]
        code = kernels.kernel(row).delta(torch.ones_like(points), saved_of(row, points), *row.values)
        low, high = row.tail
        smallest = torch.finfo(torch.float64).tiny  # below it float64 has no digits left
        for at, mine, value in zip(points.tolist(), code.tolist(), exact, strict=True):
            error = abs(mpmath.mpf(mine) - value)
            bound = max(1e-12 * abs(value), smallest) if low <= at <= high else 4 * torch.finfo(torch.float64).eps
            assert error <= bound, f"{row.name} at z = {at}: G′ = {mine}, exactly {mpmath.nstr(value, 20)}"


@rows
def test_derivative_against_the_twin(row: Row) -> None:
    """G′ from −40 to 40, kinks included, against torch's own; a tail of torch's own is coarser than the sheet's."""
    twin_in = wide.clone().requires_grad_()
    (twin,) = torch.autograd.grad(twin_of(row)(twin_in).sum(), twin_in)
    mine = row.delta(torch.ones_like(wide), saved_of(row, wide), *row.values)
    torch.testing.assert_close(mine, twin, rtol=1e-12, atol=1e-12)


@rows
def test_a_tangent_passes_through_delta(row: Row) -> None:
    """δ is linear in g, and its tangent δ of g's, where no graph is recorded too."""
    incoming, tangent = torch.randn(2, len(wide), dtype=torch.float64)
    saved = saved_of(row, wide)
    with torch.no_grad(), forward_ad.dual_level():
        given = kernels.kernel(row).delta(forward_ad.make_dual(incoming, tangent), saved, *row.values)
        through = forward_ad.unpack_dual(given).tangent
    torch.testing.assert_close(through, row.delta(tangent, saved, *row.values), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------

ELEMENTWISE = [cost for cost in sheet.COSTS.values() if cost.name != "cross_entropy"] + [sheet.WEIGHTED_BCE]


@pytest.mark.parametrize("cost", ELEMENTWISE, ids=lambda cost: f"{cost.name}{cost.C.__code__.co_argcount}")
def test_sympy_proves_the_cost(cost: Cost) -> None:
    letters = symbols("a y p", real=True)[: cost.C.__code__.co_argcount]
    C = read(cost.C)(*letters)
    for letter, delta in zip(letters, (cost.delta, cost.delta_target), strict=False):
        difference = sympy.diff(C, letter) - read(delta)(*letters)
        assert sympy.simplify(sympy.nsimplify(difference).rewrite(sympy.exp)) == 0
    if cost.H is not None:  # its root twice is H, which is the derivative of δ
        v = sympy.Symbol("v", real=True)
        second = sympy.diff(read(cost.delta)(*letters), letters[0]) * v
        for H in (read(cost.H)(*letters, v), read(cost.root)(*letters, read(cost.root)(*letters, v))):
            assert sympy.simplify(sympy.nsimplify(second - H).rewrite(sympy.exp)) == 0


def test_sympy_proves_cross_entropy() -> None:
    """For three classes: vectors of symbols in NumPy's arrays, on which the code object does as on tensors."""
    exp, log = np.frompyfunc(sympy.exp, 1, 1), sympy.log
    meanings = names() | {
        "Σ": lambda x: x.sum(),
        "softmax": lambda x: exp(x) / exp(x).sum(),
        "log_softmax": lambda x: x - log(exp(x).sum()),
    }
    cost = sheet.COSTS["cross_entropy"]
    logits, target = (np.array(symbols(f"{letter}0:3", real=True), dtype=object) for letter in "zy")
    C, delta, delta_target = (
        type(read)(formula.__code__, meanings)(logits, target) for formula in (cost.C, cost.delta, cost.delta_target)
    )
    for letters, derivatives in ((logits, delta), (target, delta_target)):
        for letter, derivative in zip(letters, derivatives, strict=True):
            assert sympy.simplify(sympy.diff(C.sum(), letter) - derivative) == 0
    H, root = (type(read)(formula.__code__, meanings) for formula in (cost.H, cost.root))
    of_units = [root(logits, target, unit) for unit in np.eye(3, dtype=int)]
    for i, unit in enumerate(np.eye(3, dtype=int)):
        for j, (entry, derivative) in enumerate(zip(H(logits, target, unit), delta, strict=True)):
            assert sympy.simplify(sympy.diff(derivative, logits[i]) - entry) == 0
            assert sympy.simplify(sympy.nsimplify(sum(S[i] * S[j] for S in of_units) - entry)) == 0


def test_probability_keeps_nan() -> None:
    """Equal shares are for a row of zeros alone: a row that overflowed is not one that knows nothing."""
    rows = torch.tensor([[torch.nan, 0.5], [torch.nan, torch.nan], [0.0, 0.0], [0.2, 0.6]])
    for loss in sheet.COSTS:
        P = sheet.probability(rows, loss)
        assert P[:2].isnan().all(), loss
        torch.testing.assert_close(P[2:].sum(-1), torch.ones(2))
    torch.testing.assert_close(sheet.probability(rows, "quadratic")[2:], torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
