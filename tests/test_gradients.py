"""Every Function against finite differences, with every flag of gradcheck on."""

import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.cases import Case

# Twenty times stricter than gradcheck's defaults in rtol, a thousand times in atol: a G′ off by 0.001 % fails.
TOLERANCES = {"atol": 1e-8, "rtol": 1e-6}


def test_gradcheck(case: Case) -> None:
    """Backward and forward mode, batched, with undefined gradients and checked dtypes."""
    assert gradcheck(
        case.ours,
        case.inputs(torch.float64),
        **TOLERANCES,
        check_undefined_grad=True,
        check_grad_dtypes=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


def test_gradgradcheck(case: Case) -> None:
    """Second derivatives: reverse over reverse and forward over reverse."""
    assert gradgradcheck(
        case.ours,
        case.inputs(torch.float64),
        **TOLERANCES,
        gen_non_contig_grad_outputs=True,
        check_undefined_grad=True,
        check_grad_dtypes=True,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )
