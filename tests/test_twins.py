"""Every Function beside its torch twin: values, derivatives, dtypes, and what its backward does with its inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manual_mlp.functions import ManualFunction
from manual_mlp.testing.checks import nodes_of
from tests.cases import CASES, Case


def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], second: bool) -> list[Tensor]:
    """The output, its gradients for a fixed g, and the gradients of the sum of squares of all of these."""
    output = function(*inputs)
    g = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    first = torch.autograd.grad(output, inputs, g, create_graph=second)
    if not second:
        return [output, *first]
    squares = sum((gradient.square().sum() for gradient in first), torch.zeros((), dtype=output.dtype))
    # With the output itself, so that a first and a second derivative arrive at the same node.
    more = torch.autograd.grad(squares + output.square().sum(), inputs)
    return [output, *first, *more]


def test_equal_to_the_twin(case: Case) -> None:
    """Values, first and second derivatives, to 1e-12 in float64."""
    ours = run(case.ours, case.inputs(torch.float64), second=True)
    twin = run(case.twin, case.inputs(torch.float64), second=True)
    for mine, theirs in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_equal_to_the_twin_at_zero(case: Case) -> None:
    """Where the kinks are, and where a net starts whose last layer is initialised with zeros."""
    zeros = tuple(torch.zeros_like(tensor).requires_grad_() for tensor in case.inputs(torch.float64))
    for mine, theirs in zip(*(run(function, zeros, second=True) for function in (case.ours, case.twin)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_every_function_is_a_case() -> None:
    """Each Function of functions.py is a node of some case's graph: none is without all these proofs."""
    outputs = [case.ours(*case.inputs(torch.float64)) for case in CASES]
    seen = {type(node)._forward_cls for output in outputs for node in nodes_of(output) if hasattr(node, "_forward_cls")}
    assert {cls for cls in ManualFunction.__subclasses__() if cls.__module__ == ManualFunction.__module__} <= seen


# A handful of operations, each rounded to half an eps, on numbers of order 1, summed over at most 16 terms: 16 eps. In
# bfloat16 what is saved is itself rounded, and torch rounds intermediate results that the sheet keeps in float32 (and
# the other way round): 4 eps of 2^-7 relative to the largest entry, which dominates a sum's error.
LOW_PRECISION = {torch.float32: 16, torch.bfloat16: 4}


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """float32 and bfloat16 against the twin in float64 on the same numbers."""
    inputs = case.inputs(dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    ours, twin = run(case.ours, inputs, second=False), run(case.twin, exact, second=False)
    for mine, theirs in zip(ours, twin, strict=True):
        assert mine.dtype == dtype
        bound = LOW_PRECISION[dtype] * torch.finfo(dtype).eps * max(1.0, theirs.abs().max().item())
        assert (mine.double() - theirs).abs().max().item() <= bound


def test_incoming_gradient_and_inputs_are_not_written(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    output = case.ours(*inputs)
    g = torch.randn_like(output)
    before = [tensor.detach().clone() for tensor in (g, *inputs)]
    torch.autograd.grad(output, inputs, g)
    for tensor, copy in zip((g, *inputs), before, strict=True):
        assert torch.equal(tensor, copy)


def test_strided_incoming_gradients(case: Case) -> None:
    """Expanded (as sum sends), transposed, and narrowed (as cat sends) gradients."""
    inputs = case.inputs(torch.float64)
    output = case.ours(*inputs)
    expanded = torch.ones((), dtype=output.dtype).expand_as(output)
    wide = torch.randn(*output.shape, 3, dtype=output.dtype)[..., 1]
    transposed = torch.randn(output.shape[::-1], dtype=output.dtype).permute(list(reversed(range(output.dim()))))
    for g in (expanded, wide, transposed):
        strided = torch.autograd.grad(output, inputs, g, retain_graph=True)
        plain = torch.autograd.grad(output, inputs, g.clone(memory_format=torch.contiguous_format), retain_graph=True)
        for mine, theirs in zip(strided, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_only_needed_gradients(case: Case) -> None:
    """An input that needs no gradient gets none, and the others the same as before."""
    inputs = case.inputs(torch.float64)
    full = torch.autograd.grad(case.ours(*inputs).sum(), inputs)
    for index, tensor in enumerate(inputs):
        alone = [other.detach().requires_grad_(other is tensor) for other in inputs]
        case.ours(*alone).sum().backward()
        for position, other in enumerate(alone):
            assert (other.grad is None) == (position != index)
        torch.testing.assert_close(alone[index].grad, full[index], rtol=1e-12, atol=1e-12)


class Products(TorchDispatchMode):
    """Counts the matrix products and the sums that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.sum)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("affine", [case for case in CASES if case.name.startswith("affine")], ids=str)
def test_needs_input_grad_is_read(affine: Case) -> None:
    """One product or sum for each gradient that somebody needs, and none for a frozen input, weight or bias."""
    inputs = affine.inputs(torch.float64)
    for index in range(len(inputs)):
        alone = [tensor.detach().requires_grad_(position == index) for position, tensor in enumerate(inputs)]
        output = affine.ours(*alone)
        with Products() as products:
            torch.autograd.grad(output, alone[index], torch.ones_like(output))
        assert products.count == 1
