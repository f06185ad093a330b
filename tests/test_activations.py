"""Every row of the activation table: proven by SymPy, and its G′ over a wide range of z, tails included."""

import mpmath
import pytest
import sympy
import torch
from sympy.parsing.sympy_parser import parse_expr, rationalize, standard_transformations
from torch import Tensor
from torch.autograd import forward_ad

from manual_mlp.formulas import ACTIVATIONS, SYMBOLS, Activation
from tests.cases import TWINS, row_parameters

ROWS = [(row, parameters) for row in ACTIVATIONS.values() for parameters in row_parameters(row)]
z, a, g = sympy.symbols("z a g", real=True)
# Enough for 1 − erf(40) not to cancel.
DIGITS = 400
wide = torch.linspace(-40, 40, 1601, dtype=torch.float64)


def rows(test):
    return pytest.mark.parametrize(
        ("row", "parameters"), ROWS, ids=[f"{row.name}{parameters or ''}" for row, parameters in ROWS]
    )(test)


def expression(text: str, row: Activation, parameters: tuple[float, ...], where: object) -> sympy.Expr:
    """A formula of the sheet as SymPy reads it."""
    letters: dict[str, object] = {"z": z, "a": a, "g": g, "where": where}
    letters |= {name: sympy.nsimplify(value) for (name, _), value in zip(row.parameters, parameters, strict=True)}
    for symbol, meaning in SYMBOLS.items():
        of_z = parse_expr(meaning, {"z": z}, (*standard_transformations, rationalize))
        letters[symbol.removesuffix("(z)")] = sympy.Lambda(z, of_z)
    return parse_expr(text, letters, (*standard_transformations, rationalize))


def piecewise(condition: sympy.Basic, x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    return sympy.Piecewise((x, condition), (y, True))


@rows
def test_sympy_proves_the_derivative(row: Activation, parameters: tuple[float, ...]) -> None:
    """G differentiated by SymPy is the row's δ with g = 1, on either side of its `where`."""
    for side in (1, 2):
        chosen = {1: lambda condition, x, y: x, 2: lambda condition, x, y: y}[side]
        G = expression(row.G_text, row, parameters, chosen)
        delta = expression(row.delta_text, row, parameters, chosen).subs({a: G, g: 1})
        difference = (sympy.diff(G, z) - delta).rewrite(sympy.exp)
        assert sympy.simplify(difference) == 0


def evaluated(text: str, row: Activation, parameters: tuple[float, ...], points: Tensor, g_value: int = 1) -> list:
    """The formula at each point, to DIGITS digits; a is G(z) at the same precision."""
    with mpmath.workdps(DIGITS):
        G = sympy.lambdify(z, expression(row.G_text, row, parameters, piecewise), "mpmath")
        formula = sympy.lambdify((z, a, g), expression(text, row, parameters, piecewise), "mpmath")
        values = [mpmath.mpf(value) for value in points.tolist()]
        return [mpmath.mpf(formula(value, G(value), g_value)) for value in values]


# Where a row changes its formula, one side of the edge is as right as the other: keep clear of it.
points = torch.cat([wide[::16] + 0.013, torch.linspace(-6, 6, 49, dtype=torch.float64) + 0.007])


@rows
def test_the_code_is_the_proven_expression(row: Activation, parameters: tuple[float, ...]) -> None:
    """The texts, evaluated to DIGITS digits, against G and delta."""
    activation = row.G(points, *parameters)
    saved = activation if row.saves == "a" else points
    incoming = torch.full_like(points, 3.0)
    delta = row.delta(incoming, saved, *parameters)
    for text, code in ((row.G_text, activation), (row.delta_text, delta)):
        exact = torch.tensor(
            [float(value) for value in evaluated(text, row, parameters, points, 3)], dtype=torch.float64
        )
        torch.testing.assert_close(code, exact, rtol=1e-12, atol=1e-12)


@rows
def test_derivative_against_high_precision(row: Activation, parameters: tuple[float, ...]) -> None:
    """G′ to a relative 1e-12 inside the row's tail, and an absolute 4 eps beyond."""
    with mpmath.workdps(DIGITS):
        G_prime = sympy.diff(expression(row.G_text, row, parameters, piecewise), z)
        exact_of = sympy.lambdify(z, G_prime, "mpmath")
        exact = [mpmath.mpf(exact_of(mpmath.mpf(value))) for value in points.tolist()]
        activation = row.G(points, *parameters)
        code = row.delta(torch.ones_like(points), activation if row.saves == "a" else points, *parameters)
        low, high = row.tail
        smallest = torch.finfo(torch.float64).tiny  # below it float64 has no digits left
        for at, mine, value in zip(points.tolist(), code.tolist(), exact, strict=True):
            error = abs(mpmath.mpf(mine) - value)
            bound = max(1e-12 * abs(value), smallest) if low <= at <= high else 4 * torch.finfo(torch.float64).eps
            assert error <= bound, f"{row.name} at z = {at}: G′ = {mine}, exactly {mpmath.nstr(value, 20)}"


@rows
def test_derivative_against_the_twin(row: Activation, parameters: tuple[float, ...]) -> None:
    """G′ from −40 to 40, kinks included, against torch's own; a tail of torch's own is coarser than the sheet's."""
    mine_in, twin_in = (wide.clone().requires_grad_() for _ in range(2))
    (twin,) = torch.autograd.grad(TWINS[row.name](twin_in, *parameters).sum(), twin_in)
    activation = row.G(mine_in.detach(), *parameters)
    saved = activation if row.saves == "a" else mine_in.detach()
    mine = row.delta(torch.ones_like(saved), saved, *parameters)
    torch.testing.assert_close(mine, twin, rtol=1e-12, atol=1e-12)


@rows
def test_a_tangent_passes_through_delta(row: Activation, parameters: tuple[float, ...]) -> None:
    """δ is linear in g, and its tangent δ of g's, where no graph is recorded too."""
    g, tangent = torch.randn(2, len(wide), dtype=torch.float64)
    saved = row.G(wide, *parameters) if row.saves == "a" else wide
    with torch.no_grad(), forward_ad.dual_level():
        given = row.delta(forward_ad.make_dual(g, tangent), saved, *parameters)
        through = forward_ad.unpack_dual(given).tangent
    torch.testing.assert_close(through, row.delta(tangent, saved, *parameters), rtol=1e-12, atol=1e-12)


@rows
def test_nan_passes(row: Activation, parameters: tuple[float, ...]) -> None:
    nan = torch.full((3,), torch.nan, dtype=torch.float64)
    assert row.G(nan, *parameters).isnan().all()
    assert row.delta(nan, nan, *parameters).isnan().all()
