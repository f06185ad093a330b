"""The sheet as SymPy reads it: the same code objects, with SymPy's functions for torch's."""

import types
from collections.abc import Callable
from typing import Any

import sympy
from sympy.parsing.sympy_parser import parse_expr

from manual_mlp import formulas as sheet
from manual_mlp import notation

z, a, g = sympy.symbols("z a g", real=True)


def piecewise(condition: Any, x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    return sympy.Piecewise((x, condition), (y, True))


def names(where: Callable[..., Any] = piecewise) -> dict[str, Any]:
    """What the formulas' names mean: SymPy's functions, and the sheet's own functions on these."""
    found: dict[str, Any] = {name: getattr(sympy, name) for name in vars(sheet) if hasattr(sympy, name)}
    found |= {"where": where, "log1p": lambda x: sympy.log(1 + x), "expm1": lambda x: sympy.exp(x) - 1}
    found["math"] = types.SimpleNamespace(log1p=found["log1p"], exp=sympy.exp)
    for name, value in vars(sheet).items():
        if name in notation.PRIMITIVES:
            found[name] = sympy.Lambda(z, parse_expr(notation.PRIMITIVES[name], {"z": z}))
        elif isinstance(value, types.FunctionType) and value.__module__ == sheet.__name__:
            found[name] = types.FunctionType(value.__code__, found)
        elif type(value) is float and name != "pi":
            found[name] = sympy.Rational(repr(value))
    return found


def read(formula: Callable[..., Any], where: Callable[..., Any] = piecewise) -> Callable[..., Any]:
    """The formula on symbols: its own code object, in SymPy's names."""
    return types.FunctionType(formula.__code__, names(where))


def exactly(values: tuple[float, ...]) -> list[sympy.Rational]:
    return [sympy.Rational(repr(value)) for value in values]
