"""The sheet's formulas as text, read from the code that runs, so that no page can say anything else."""

import ast
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from manual_mlp import formulas as sheet

# What the code of the sheet leaves to torch, as Python.
PRIMITIVES = {"σ": "1 / (1 + exp(-z))", "softplus": "log(1 + exp(z))"}
PARTS = ("co_code", "co_consts", "co_names", "co_varnames")  # in which two formulas of one line differ


@functools.cache
def _tree(file: str) -> ast.Module:
    with open(file, encoding="utf-8") as source:
        return ast.parse(source.read())


def expression(formula: Callable[..., Any]) -> ast.expr:
    """Return what a lambda, or a function that only returns, computes, as a syntax tree."""
    code = formula.__code__
    for node in ast.walk(_tree(inspect.getsourcefile(code) or code.co_filename)):
        if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno:
            compiled = compile(ast.Expression(node), "", "eval").co_consts[0]
            if all(getattr(compiled, part) == getattr(code, part) for part in PARTS):
                return node.body
        elif isinstance(node, ast.FunctionDef) and (node.lineno, node.name) == (code.co_firstlineno, code.co_name):
            returned = node.body[-1]
            assert isinstance(returned, ast.Return)
            assert returned.value is not None
            return returned.value
    raise LookupError(f"{formula} is not in {code.co_filename}")


def text(formula: Callable[..., Any]) -> str:
    """Return the formula as Python: `g * (1 - a * a)`."""
    return ast.unparse(expression(formula))


def letters(row: sheet.Row) -> dict[str, str]:
    """Return the letter that each parameter of a row has in its formulas: {"negative_slope": "s"}."""
    return dict(zip((name for name, _ in row.parameters), row.G.__code__.co_varnames[1:], strict=True))


def meanings(*formulas: Callable[..., Any]) -> dict[str, str]:
    """Return what the sheet's own functions in these formulas stand for: {"φ(z)": "exp(-z * z / 2) * …"}."""
    found: dict[str, str] = {}
    for formula in formulas:
        for name in formula.__code__.co_names:
            meaning: Any = getattr(sheet, name, None)
            if name in PRIMITIVES:
                found[f"{name}(z)"] = PRIMITIVES[name]
            elif getattr(meaning, "__module__", None) == sheet.__name__:
                found[f"{name}({', '.join(inspect.signature(meaning).parameters)})"] = text(meaning)
                found |= meanings(meaning)
            elif isinstance(meaning, float) and name != "pi":
                found[name] = repr(meaning)
    return found


def written(formula: Callable[..., Any], argument: str) -> str:
    """Return the formula of a cost as on paper, with `argument` for the prediction: "½ (a³ − ŷ)²"."""
    body = expression(formula)
    is_sum = isinstance(body, ast.BinOp) and isinstance(body.op, ast.Add | ast.Sub)
    line = re.sub(rf"\b{formula.__code__.co_varnames[0]}\b", argument, ast.unparse(body))
    line = f"({line})" if is_sum else line
    for python, paper in ((" ** 2", "²"), ("-", "−"), ("0.5 * ", "½ "), ("*", "·")):
        line = line.replace(python, paper)
    return line
