"""The sheet's formulas as C: torch.fx writes down each operation of a row, in the row's order.

Every Python number that meets one of them becomes an argument of the call. So one C function serves all slopes, β and
thresholds, and what Python computes from these, such as `end(t)`, torch and C get alike.
"""

import functools
import hashlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.nn.functional import softplus

from manual_mlp import formulas as sheet

OPERATIONS: dict[Any, str] = {
    **{operator.add: "{} + {}", operator.sub: "{} - {}", operator.mul: "{} * {}", operator.truediv: "{} / {}"},
    **{operator.lt: "{} < {}", operator.le: "{} <= {}", operator.gt: "{} > {}", operator.ge: "{} >= {}"},
    **{operator.neg: "-{}", operator.pow: "{0} * {0}", torch.where: "{} ? {} : {}", torch.sqrt: "SQRT({})"},
    **{torch.exp: "exp_({})", torch.expm1: "expm1_({})", torch.log1p: "log1p_({})", torch.erfc: "erfc_({})"},
    **{torch.sigmoid: "sigmoid_({})", torch.tanh: "tanh_({})", softplus: "softplus_({})"},
}
# What sums over the row of x or y: what is computed from it first, and then each number.
BY_ROW: dict[Any, tuple[tuple[str, ...], str]] = {
    "sum": (("sum",), "{0}_sum"),
    torch.softmax: (("most", "all"), "exp_({0}[i] - {0}_most) / {0}_all"),
    torch.log_softmax: (("most", "all"), "{0}[i] - {0}_most - log_({0}_all, 0)"),
}
# The arguments after the first, with which alone C has these.
FIXED: dict[Any, tuple[Any, ...]] = {operator.pow: (2,), softplus: (1.0, 40.0), "sum": (-1, True)}
FIXED |= {torch.softmax: (-1,), torch.log_softmax: (-1,)}
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


def _graph(formula: Callable[..., Any], values: tuple[float, ...], inputs: int) -> tuple[Graph, Any]:
    """Return the operations of a formula, and the operation or number that is its result."""
    graph = Graph()
    tracer = GraphAppendingTracer(graph)
    try:
        result = formula(*(Proxy(graph.placeholder(name), tracer) for name in "xy"[:inputs]), *values)
    except TraceError:
        raise NotInC("a branch") from None
    except (AttributeError, RuntimeError, TypeError) as error:
        raise NotInC(str(error)) from error
    return graph, result.node if isinstance(result, Proxy) else result


@functools.lru_cache(256)
def compiled(formula: Callable[..., Any], *values: float, inputs: int) -> Compiled:
    """Return a formula of x, or of x and y, and of these parameters, in C. Raises NotInC."""
    graph, result = _graph(formula, values, inputs)
    texts: dict[Node, str] = {}
    numbers: list[float] = []
    sums: list[str] = []
    lines: list[str] = []

    def text(operand: Any) -> str:
        if isinstance(operand, Node):
            return texts[operand]
        if isinstance(operand, int | float):
            numbers.append(float(operand))
            return f"v[{len(numbers) - 1}]"
        raise NotInC(f"a {type(operand).__name__}")

    for node in graph.nodes:
        if node.op == "placeholder":
            texts[node] = f"{node.target}[i]"
            continue
        fixed, given = FIXED.get(node.target, ()), (*node.args, *node.kwargs.values())
        operands = given[: len(given) - len(fixed)]
        has = given[len(operands) :] == fixed
        if has and node.target in OPERATIONS:
            line = OPERATIONS[node.target].format(*map(text, operands))
        elif has and node.target in BY_ROW and operands[0].op == "placeholder":
            needed, line = BY_ROW[node.target]
            sums += [SUMS[name].format(operands[0].target) for name in needed]
            line = line.format(operands[0].target)
        else:
            name = getattr(node.target, "__name__", node.target)
            raise NotInC(f"{name}({', '.join(map(str, given))})")
        texts[node] = f"t{len(lines)}"
        lines.append(f"const __auto_type {texts[node]} = {line};")
    body = "\n".join(
        [*(f"    {line}" for line in dict.fromkeys(sums)), "    EACH_AT_ONCE {"]
        + [f"        {line}" for line in lines]
        + [f"        out[i] = {text(result)};", "    }"]
    )
    name = f"f_{hashlib.sha256(body.encode()).hexdigest()[:12]}"
    code = f"void {name}(long n, const T *v, const T *x, const T *y, T *out) {{\n{body}\n}}\n"
    return Compiled(code, name, tuple(numbers), bool(sums))


@functools.cache
def of_the_sheet() -> dict[str, str]:
    """Return the C functions of all rows and costs of the sheet by name, so that one build serves every net."""
    rows = [form for row in sheet.ACTIVATIONS.values() for form in row.forms]
    found = [compiled(row.G, *row.values, inputs=1) for row in rows]
    found += [compiled(row.delta, *row.values, inputs=2) for row in rows]
    found += [compiled(formula, inputs=2) for cost in sheet.COSTS.values() for formula in (cost.C, cost.delta)]
    return {each.name: each.code for each in found}
