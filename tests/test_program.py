"""The two executors of a list of nodes, on nets that read a slot twice; where the steps are written."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp.formulas import ACTIVATIONS, COSTS
from manual_mlp.network import LossPlan
from manual_mlp.plan import weigh
from manual_mlp.program import Activate, Affine, Drop, Node, Program
from manual_mlp.program import Add as Sum

double = torch.float64
PACKAGE = Path(mm.__file__).parent


class Add:
    """A rule of this test: a + b."""

    names, saves = (), "nothing"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def backward(self, g: Tensor, saved: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return g, g


class Multiply:
    """A rule of this test, which needs its inputs again: a · b."""

    names, saves = (), "input"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def backward(self, g: Tensor, saved: tuple[Tensor, Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
        a, b = saved
        return g * b, g * a


def affine(n_in: int, n_out: int, reads: int, bias: bool = True) -> Node:
    return Node(Affine(), (reads,), nn.Linear(n_in, n_out, bias, dtype=double))


def activate(name: str, reads: int) -> Node:
    return Node(Activate(ACTIVATIONS[name]), (reads,))


# A residual block, a slot read three times, the input read twice, a product of two slots, z read beside its own G.
NETS = {
    "residual": lambda: [affine(4, 6, 0), activate("tanh", 1), affine(6, 6, 2), Node(Add(), (2, 3)), affine(6, 3, 4)],
    "three readers": lambda: [
        *(affine(4, 5, 0), activate("sigmoid", 1), affine(5, 5, 2), activate("silu", 3), affine(5, 5, 2, False)),
        *(Node(Add(), (4, 5)), Node(Add(), (2, 6)), affine(5, 3, 7), activate("sigmoid", 8)),
    ],
    "input twice": lambda: [affine(4, 5, 0), affine(4, 5, 0), Node(Multiply(), (1, 2)), affine(5, 3, 3)],
    "squared": lambda: [affine(4, 5, 0), activate("relu", 1), Node(Multiply(), (2, 2)), affine(5, 3, 3)],
    "z beside G": lambda: [affine(4, 5, 0), activate("sigmoid", 1), Node(Add(), (1, 2)), affine(5, 3, 3)],
    "affine beside silu's z": lambda: [
        *(affine(4, 5, 0), affine(5, 5, 1), activate("silu", 1), Node(Add(), (2, 3)), affine(5, 3, 4)),
    ],
    "a dropout that hands on": lambda: [
        *(affine(4, 5, 0), Node(Drop(nn.Dropout(0.0)), (1,)), activate("sigmoid", 2), Node(Add(), (1, 3))),
        affine(5, 3, 4),
    ],
    "G of the input": lambda: [activate("silu", 0), affine(4, 5, 1), activate("tanh", 2), affine(5, 3, 3)],
    "σ of the input": lambda: [activate("sigmoid", 0), affine(4, 3, 1), activate("gelu", 2)],
    "tanh of tanh": lambda: [affine(4, 5, 0), activate("tanh", 1), activate("tanh", 2), affine(5, 3, 3)],
    "tanh of tanh of the input": lambda: [activate("tanh", 0), activate("tanh", 1), affine(4, 3, 2)],
    "silu of tanh of the input": lambda: [activate("tanh", 0), activate("silu", 1), affine(4, 3, 2)],
    "silu of tanh": lambda: [affine(4, 5, 0), activate("tanh", 1), activate("silu", 2), affine(5, 3, 3)],
    "a sum of one slot thrice": lambda: [affine(4, 5, 0), affine(5, 5, 1), Node(Sum(), (1, 2, 2)), affine(5, 3, 3)],
    "a sum of the input": lambda: [Node(Sum(), (0, 0, 0)), Node(Sum(), (1,)), affine(4, 3, 2)],
    "a relu beside an identity": lambda: [
        *(affine(4, 5, 0), affine(5, 5, 1), activate("relu", 2), Node(Sum(), (1, 3)), activate("relu", 4)),
        affine(5, 3, 5),
    ],
    "gelu beside z": lambda: [affine(4, 5, 0), activate("gelu", 1), Node(Multiply(), (1, 2)), affine(5, 3, 3)],
}


def net_of(name: str) -> tuple[Program, list[Any], Tensor, Tensor]:
    torch.manual_seed(0)
    program = Program(NETS[name]())
    return program, program.parameters(), torch.randn(40, 4, dtype=double), torch.rand(40, 3, dtype=double)


def by_autograd(program: Program, flat: list[Any], x: Tensor, target: Tensor) -> tuple[Tensor, list[Any]]:
    slots = program.forward([x.requires_grad_(), *flat], every=True)
    cost = (slots[-1] - target).square().sum() / (2 * len(x))
    tensors = [x, *(own for own in flat if own is not None)]
    gradients = iter(torch.autograd.grad(cost, tensors))
    return cost.detach(), [next(gradients), *(None if own is None else next(gradients) for own in flat)]


def assert_same(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_program_equals_autograd(name: str, every: bool) -> None:
    program, flat, x, target = net_of(name)
    _, expected = by_autograd(program, flat, x, target)
    with torch.no_grad():
        slots = program.forward([x, *flat], every)
        assert [slot for slot, value in enumerate(slots) if value is not None] == (
            list(range(len(slots))) if every else sorted(program.kept)
        )
        needs = [True, *(own is not None for own in flat)]
        _, gradients = program.backward((slots[-1] - target) / len(x), slots, [x, *flat], needs, every)
    assert_same(gradients, expected)


@pytest.mark.parametrize("name", NETS)
def test_program_can_be_differentiated(name: str) -> None:
    """The backward pass is made of ordinary operations: its own derivative is autograd's second derivative."""
    program, flat, x, target = net_of(name)
    needs = [True, *(own is not None for own in flat)]
    v = torch.randn_like(x)

    def gradient(x: Tensor) -> Tensor:
        slots = program.forward([x, *flat])
        return program.backward((slots[-1] - target) / len(x), slots, [x, *flat], needs)[1][0]

    def cost(x: Tensor) -> Tensor:
        slots = program.forward([x, *flat], every=True)
        return (slots[-1] - target).square().sum() / (2 * len(x))

    x.requires_grad_()
    (ours,) = torch.autograd.grad((gradient(x) * v).sum(), x)
    (first,) = torch.autograd.grad(cost(x), x, create_graph=True)
    (theirs,) = torch.autograd.grad((first * v).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_plan_equals_autograd(name: str, needs_input: bool) -> None:
    program, flat, x, target = net_of(name)
    cost, expected = by_autograd(program, flat, x, target)
    needs = [needs_input, *(own is not None for own in flat)]
    with torch.no_grad():
        plan = LossPlan(program, [x, *flat], weigh(COSTS["quadratic"], 40, 3, double), needs)
        for _ in range(2):  # the second run finds the buffers as the first one left them
            c, gradients = plan.gradients([x, *flat], target, None)
            torch.testing.assert_close(c, cost, rtol=1e-13, atol=0)
            assert_same(gradients, expected if needs_input else [None, *expected[1:]])


def test_a_frozen_branch_costs_no_product() -> None:
    program, flat, x, _ = net_of("residual")
    needs = [False, *(place >= 4 and own is not None for place, own in enumerate(flat))]  # the last layer alone
    plan = LossPlan(program, [x, *flat], weigh(COSTS["quadratic"], 40, 3, double), needs)
    assert len(plan.down) == 2  # ∂C/∂W and ∂C/∂b


# ---------------------------------------------------------------------------------------------------------------------
# Where the steps are written
# ---------------------------------------------------------------------------------------------------------------------

PRODUCTS = {"mm", "addmm", "addmm_", "mv", "addmv", "addmv_", "bmm", "baddbmm", "matmul", "linear", "einsum", "@"}


def uses(file: str, names: set[str], of: str = "") -> list[str]:
    """Return the attributes of these names that a file reads (of one object, if named), and "@" for each product."""
    found = []
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Attribute) and node.attr in names and of in ("", ast.unparse(node.value)):
            found.append(node.attr)
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult) and "@" in names:
            found.append("@")
    return sorted(found)


def test_steps_3_and_4_are_called_once_in_each_executor() -> None:
    steps = {"grad_input", "grad_weight", "grad_bias"}
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    found = {file: names for file in files if (names := uses(file, steps, "sheet"))}
    assert found == {"functions.py": sorted(steps), "program.py": sorted(steps)}
    assert uses("plan.py", {"_step_3", "_step_4"}) == ["_step_3", "_step_4"]


def test_products_are_written_on_the_sheet_and_in_the_plan() -> None:
    """No third recursion can hide: elsewhere in the core no matrices are multiplied, but for one sum of squares."""
    core = [path.name for path in PACKAGE.glob("*.py") if path.name not in ("benchmark.py",)]
    found = {file: names for file in core if (names := uses(file, PRODUCTS))}
    assert found.keys() == {"formulas.py", "kernels.py", "plan.py"}
    assert found["kernels.py"] == ["mv"]
