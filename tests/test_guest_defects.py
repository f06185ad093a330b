"""Defects of torch itself that reach this package. A test says when torch has mended one: then drop what it names."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import grad, jacfwd, jacrev, jvp

import manual_mlp as mm
from tests.grid_cases import GRIDS, PLAIN


class Cube(torch.autograd.Function):
    """x³, written as torch's documentation says."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * x_t


class Wrong(torch.autograd.Function):
    """x, with a derivative that tells who computed it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 7 * g


def compiled(function: Any) -> tuple[Any, set[str]]:
    """The function, compiled, and the operators of the graphs that will be made of it."""
    found: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    return torch.compile(function, fullgraph=True, backend=backend), found


def sigmoid_sum(x: Tensor) -> Tensor:
    return mm.functional.sigmoid(x).sum()


def test_compiled_grad_transform_drops_a_custom_backward() -> None:
    """pytorch#193279: torch.compile(torch.func.grad(f)) differentiates the forward and never calls the backward.

    The values are right, since torch differentiates the same forward; the formula is not ours. Mended when this fails:
    then drop the warning in functions.py.
    """
    x = torch.randn(3)
    wrong = grad(lambda x: Wrong.apply(x).sum())
    assert torch.equal(wrong(x), 7 * torch.ones(3))
    assert torch.equal(compiled(wrong)[0](x), torch.ones(3))

    slope, operators = compiled(grad(sigmoid_sum))
    torch.testing.assert_close(slope(x), grad(sigmoid_sum)(x))
    assert "aten.sigmoid_backward.default" in operators


def test_the_way_around_compiled_grad() -> None:
    """Compile the function, and call backward outside."""
    cost, operators = compiled(sigmoid_sum)
    cost(torch.randn(3, requires_grad=True)).backward()
    assert "aten.rsub.Scalar" in operators  # 1 − a
    assert "aten.sigmoid_backward.default" not in operators


def test_nested_forward_mode_is_zero_through_a_function() -> None:
    """pytorch#197867. Mended when this fails: then drop `_nesting` and `primals` in functions.py."""
    x = torch.tensor(2.0)
    assert jacfwd(Cube.apply)(x) == 12
    assert jacfwd(jacfwd(Cube.apply))(x) == 0


def test_dynamo_refuses_a_function_with_a_jvp() -> None:
    """pytorch#180284. Mended when this fails: then one Function will do, and `dual` can go."""
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="custom jvp"):
        torch.compile(lambda x: Cube.apply(x), fullgraph=True, backend="eager")(torch.ones(3, requires_grad=True))


def test_forward_over_reverse_of_torchs_mse_loss_fails() -> None:
    """pytorch#123996. Mended when this fails: then the tests' twins can be forward over reverse, too."""
    x, target = torch.randn(3), torch.randn(3)
    with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
        jvp(grad(lambda x: torch.nn.functional.mse_loss(x, target)), (x,), (x,))
    jvp(grad(lambda x: mm.functional.mse_loss(x, target)), (x,), (x,))


@pytest.mark.parametrize("name", ["batch_norm-rows", "layer_norm-none"])
def test_torchs_third_derivatives_of_norms_are_wrong(name: str) -> None:
    """Central differences tell. Mended when this fails: then drop `PLAIN` in grid_cases.py, and the end of formulas.md.

    Ours are compared with the norm in elementary operations, see test_guest_transforms.
    """
    (case,) = (case for case in GRIDS if case.name == name)
    x, *others = (tensor.detach() for tensor in case.inputs(torch.float64))
    direction, weight = torch.randn_like(x), torch.randn_like(x)

    def along(function: Any) -> Any:
        return lambda t: (function(x + t * direction, *others) * weight).sum()

    plain, h = along(PLAIN[name]), 1e-3
    ends = [plain(t).item() for t in (2 * h, h, -h, -2 * h)]
    difference = (ends[0] - 2 * ends[1] + 2 * ends[2] - ends[3]) / (2 * h**3)
    zero = torch.zeros((), dtype=torch.float64)
    ours, torchs = (jacrev(jacrev(jacrev(along(function))))(zero).item() for function in (case.ours, case.twin))
    assert ours == pytest.approx(difference, rel=1e-3)  # the error of such differences
    assert abs(torchs - difference) > 0.1 * abs(difference)
