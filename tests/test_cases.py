"""Every Function beside its torch twin, through the battery that this package ships."""

import pytest
import torch

from manual_mlp import grid_functions
from manual_mlp.functions import ManualFunction
from manual_mlp.testing import check_gradients
from manual_mlp.testing.graph import nodes_of
from tests.cases import CASES, Case
from tests.grid_cases import GRIDS


def test_battery(case: Case) -> None:
    """Finite differences, the twin to 1e-12, transforms, strides, dtypes, memory, threads: first and second order."""
    report = check_gradients(case.ours, case.inputs(torch.float64), case.twin)
    # A target, a mask or a weight of each row is part of these cases, and stays when the inputs have no rows.
    alright = {"empty batch"} if case.has_rows_of_its_own else set()
    assert {row.check for row in report.failed} <= alright, str(report)


def test_equal_to_the_twin_at_zero(case: Case) -> None:
    """Where the kinks are, and where a net starts whose last layer is initialised with zeros."""
    zeros = tuple(torch.zeros_like(tensor).requires_grad_() for tensor in case.inputs(torch.float64))
    results = []
    for function in (case.ours, case.twin):
        output = function(*zeros)
        g = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
        first = torch.autograd.grad(output, zeros, g, create_graph=True)
        # With the output itself, so that a first and a second derivative arrive at the same node.
        squares = sum((gradient.square().sum() for gradient in first), output.square().sum())
        results.append([output, *first, *torch.autograd.grad(squares, zeros)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


FILES = {ManualFunction.__module__, grid_functions.__name__}


def test_every_function_is_a_case() -> None:
    """Each Function of the package is a node of some case's graph: none is without all these proofs.

    Picked appears in the backward of a max pool only.
    """
    outputs = [case.ours(*case.inputs(torch.float64)) for case in [*CASES, *GRIDS]]
    seen = {type(node)._forward_cls for output in outputs for node in nodes_of(output) if hasattr(node, "_forward_cls")}
    ours = {cls for cls in ManualFunction.__subclasses__() if cls.__module__ in FILES}
    assert ours - {grid_functions.Picked} <= seen


# A handful of operations, each rounded to half an eps, on numbers of order 1, summed over at most 16 terms: 16 eps. In
# bfloat16 what is saved is itself rounded, and torch rounds intermediate results that the sheet keeps in float32 (and
# the other way round): 4 eps of 2^-7 relative to the largest entry, which dominates a sum's error.
LOW_PRECISION = {torch.float32: 16, torch.bfloat16: 4}


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """float32 and bfloat16 against the twin in float64 on the same numbers: closer than the battery asks."""
    inputs = case.inputs(dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    results = []
    for function, given in ((case.ours, inputs), (case.twin, exact)):
        output = function(*given)
        g = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
        results.append([output, *torch.autograd.grad(output, given, g)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == dtype
        bound = LOW_PRECISION[dtype] * torch.finfo(dtype).eps * max(1.0, theirs.abs().max().item())
        assert (mine.double() - theirs).abs().max().item() <= bound
