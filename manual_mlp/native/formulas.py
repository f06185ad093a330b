"""The sheet's formulas as C: the code of a row runs on numbers that write down each operation, in the row's order.

Every Python number that meets one of them becomes an argument of the call. So one C function serves all slopes, β and
thresholds, and what Python computes from these, such as `end(t)`, torch and C get alike.
"""

import builtins
import functools
import hashlib
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from manual_mlp import formulas as sheet

ONE_BY_ONE = {
    torch.sigmoid: "sigmoid_({})",
    torch.tanh: "tanh_({})",
    torch.exp: "exp_({})",
    torch.expm1: "expm1_({})",
    torch.log1p: "log1p_({})",
    torch.erfc: "erfc_({})",
    torch.sqrt: "SQRT({})",
    sheet.softplus: "softplus_({})",
}
# What sums over the row of x or y: what is computed from it first, and then each number.
BY_ROW = {
    sheet.Σ: (("sum",), "{0}_sum"),
    sheet.softmax: (("most", "all"), "exp_({0}[i] - {0}_most) / {0}_all"),
    sheet.log_softmax: (("most", "all"), "{0}[i] - {0}_most - log_({0}_all, 0)"),
}
SUMS = {
    "sum": "T {0}_sum = 0; EACH(i, n) {0}_sum += {0}[i];",
    "most": "T {0}_most = -(T)INFINITY; EACH(i, n) {0}_most = {0}[i] > {0}_most ? {0}[i] : {0}_most;",
    "all": "T {0}_all = 0; EACH(i, n) {0}_all += exp_({0}[i] - {0}_most);",
}


class NotInC(Exception):
    """A formula calls what the C code doesn't have."""


class Compiled(NamedTuple):
    """One formula: its C function, the function's name, the numbers v that it gets, and if it sums over a row."""

    code: str
    name: str
    values: tuple[float, ...]
    by_row: bool


class _Trace:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: list[float] = []
        self.sums: list[str] = []

    def number(self, text: str) -> "_Number":
        """Write down an operation, and return its result."""
        self.lines.append(f"const T t{len(self.lines)} = {text};")
        return _Number(self, f"t{len(self.lines) - 1}")

    def text(self, operand: Any) -> str:
        if isinstance(operand, _Number):
            return operand.text
        if isinstance(operand, int | float):
            self.values.append(float(operand))
            return f"v[{len(self.values) - 1}]"
        raise NotInC(f"a {type(operand).__name__}")

    def by_row(self, function: Any, of: "_Number") -> "_Number":
        if of.text not in ("x[i]", "y[i]"):
            raise NotInC(f"{function.__name__} of a formula")
        sums, text = BY_ROW[function]
        self.sums += [line for name in sums if (line := SUMS[name].format(of.text[0])) not in self.sums]
        return self.number(text.format(of.text[0]))


def _operator(text: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def operate(x: "_Number", y: Any) -> Any:
        return x.trace.number(f"{x.text} {text} {x.trace.text(y)}")

    def reflected(x: "_Number", y: Any) -> Any:
        return x.trace.number(f"{x.trace.text(y)} {text} {x.text}")

    return operate, reflected


def _comparison(text: str) -> Callable[..., Any]:
    return lambda x, y: _Number(x.trace, f"{x.text} {text} {x.trace.text(y)}")


class _Number:
    """A number of the C code, by its text. Python's operators on it write C."""

    def __init__(self, trace: _Trace, text: str) -> None:
        self.trace, self.text = trace, text

    __add__, __radd__ = _operator("+")
    __sub__, __rsub__ = _operator("-")
    __mul__, __rmul__ = _operator("*")
    __truediv__, __rtruediv__ = _operator("/")
    __lt__, __le__ = _comparison("<"), _comparison("<=")
    __gt__, __ge__ = _comparison(">"), _comparison(">=")

    def __neg__(self) -> Any:
        return self.trace.number(f"-{self.text}")

    def __pow__(self, exponent: Any) -> Any:
        if exponent != 2:
            raise NotInC(f"** {exponent}")
        return self * self

    def __bool__(self) -> bool:
        raise NotInC("a branch")


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, _Number):
        return x if condition else y
    return condition.trace.number(f"{condition.text} ? {condition.trace.text(x)} : {condition.trace.text(y)}")


def _in_c(value: Any) -> Any:
    """Return what stands in C's place for something that a formula calls."""
    if value is torch.where:
        return _where
    try:
        if value in ONE_BY_ONE:
            return lambda x: x.trace.number(ONE_BY_ONE[value].format(x.text))
        if value in BY_ROW:
            return lambda x: x.trace.by_row(value, x)
    except TypeError:  # not hashable
        return value
    if isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "torch":
        return _Torch(value)
    if isinstance(value, FunctionType) and value.__module__.partition(".")[0] != "torch":
        return lambda *arguments: _executed(value, arguments)
    return value


class _Torch:
    """A module of torch, whose functions write C."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return _in_c(getattr(self.module, name))


def _executed(formula: Any, arguments: Any) -> Any:
    """Execute a formula's code with C's names."""
    names = {
        name: _in_c(formula.__globals__[name]) for name in formula.__code__.co_names if name in formula.__globals__
    }
    names["__builtins__"] = builtins
    cells = tuple(CellType(_in_c(cell.cell_contents)) for cell in formula.__closure__ or ())
    defaults = tuple(map(_in_c, formula.__defaults__ or ()))
    return FunctionType(formula.__code__, names, None, defaults, cells)(*arguments)


def compiled(formula: Callable[..., Any], *values: float, inputs: int) -> Compiled:
    """Return a formula of x, or of x and y, and of these parameters, in C. Raises NotInC."""
    trace = _Trace()
    numbers = [_Number(trace, text) for text in ("x[i]", "y[i]")[:inputs]]
    try:
        result = trace.text(_executed(formula, [*numbers, *values]))
    except (AttributeError, TypeError) as error:
        raise NotInC(str(error)) from error
    body = "\n".join(
        [*(f"    {line}" for line in trace.sums), "    EACH_AT_ONCE {"]
        + [f"        {line}" for line in trace.lines]
        + [f"        out[i] = {result};", "    }"]
    )
    name = f"f_{hashlib.sha256(body.encode()).hexdigest()[:12]}"
    code = f"void {name}(long n, const T *v, const T *x, const T *y, T *out) {{\n{body}\n}}\n"
    return Compiled(code, name, tuple(trace.values), bool(trace.sums))


@functools.cache
def of_the_sheet() -> dict[str, str]:
    """Return the C functions of all rows and costs of the sheet by name, so that one build serves every net."""
    rows = [form for row in sheet.ACTIVATIONS.values() for form in row.forms]
    found = [compiled(row.G, *row.values, inputs=1) for row in rows]
    found += [compiled(row.delta, *row.values, inputs=2) for row in rows]
    found += [compiled(formula, inputs=2) for cost in sheet.COSTS.values() for formula in (cost.C, cost.delta)]
    return {each.name: each.code for each in found}
