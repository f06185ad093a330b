"""Run the checks on anything differentiable, and as pytest tests."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp.errors import InputError
from manual_mlp.testing.checks import CHECKS, Inputs, Subject, is_real, leaves, run, sentence
from manual_mlp.testing.report import Report


def check_gradients(
    function: Callable[..., Any],
    inputs: Iterable[Any],
    reference: Callable[..., Any] | None = None,
    *,
    compile: bool = False,
) -> Report:
    """Run the battery on a differentiable function, an autograd.Function (its class or its apply) or a module.

    inputs: a tensor, or a tuple of what the function takes; the first has the rows; floating-point tensors are copied
    to float64 and differentiated, everything else is passed on. Keep them small: finite differences visit each element.
    A module's parameters are inputs too. reference: a function of the same inputs that must agree to 1e-12 with its
    derivatives. compile: ask torch.compile too, which takes seconds.

    Raises InputError for no floating-point input, or a function that fails on these inputs, returns no tensor, or
    returns NaN or ∞.

    >>> import torch, manual_mlp as mm
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> mm.testing.check_gradients(mm.functional.tanh, x, reference=torch.tanh).verdict
    'The derivative is right.'
    >>> mm.testing.check_gradients(lambda x: x.detach() * x, x)["first derivative"].level  # half of (x²)′
    'wrong'
    """
    subject = _subject(function, inputs, reference, compile)
    return Report(subject.name, tuple(run(name, subject) for name in CHECKS))


def _subject(
    function: Any, inputs: Iterable[Any], reference: Callable[..., Any] | None = None, compile: bool = False
) -> Subject:
    if not isinstance(inputs, Iterable):
        raise InputError(f"expected a tensor or a tuple of what the function takes; got {inputs!r}")
    values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        function = function.apply
    if isinstance(function, nn.Module):
        function, values = _of_parameters(function, values)
        if isinstance(reference, nn.Module):
            reference, _ = _of_parameters(reference, ())
    subject = Subject(name, function, values, reference, compile)
    if not leaves(subject.inputs()):
        raise InputError(f"expected inputs with a floating-point tensor to differentiate; got {len(values)} others")
    try:
        output = subject(*subject.inputs())
    except Exception as error:
        raise InputError(f"expected {name} to run on float64 copies of these inputs, but: {sentence(error)}") from error
    if not output.requires_grad:
        raise InputError(f"expected {name} to be differentiable; its output requires no gradient: is it detached?")
    if not output.isfinite().all():
        raise InputError(f"expected inputs where {name} is finite; it returned NaN or ∞ there: choose others")
    return subject


def _of_parameters(module: nn.Module, inputs: Inputs) -> tuple[Callable[..., Any], Inputs]:
    """Return a module as a function of its inputs and its parameters."""
    state = {name: value.detach() for name, value in module.named_parameters()}
    buffers = {name: value.detach() for name, value in module.named_buffers()}
    names = list(state)

    def function(*values: Any) -> Any:
        split = len(values) - len(names)
        dtype = next((value.dtype for value in values if is_real(value)), torch.float64)
        held = {name: value.to(dtype) if is_real(value) else value for name, value in buffers.items()}
        given = dict(zip(names, values[split:], strict=True))
        return torch.func.functional_call(module, {**held, **given}, values[:split])

    return function, (*inputs, *state.values())


def gradient_tests(
    function: Callable[..., Any],
    make_inputs: Callable[[], Iterable[Any]],
    reference: Callable[..., Any] | None = None,
    *,
    compile: bool = False,
) -> Callable[[str], None]:
    """Return a pytest test for each check: `test_mine = gradient_tests(mine, make_inputs)` in a test file.

    make_inputs gives the inputs anew for each. A check that does not apply, or asks for what the function does not
    support, is skipped with its reason.

    >>> import torch, manual_mlp as mm
    >>> test_tanh = mm.testing.gradient_tests(mm.functional.tanh, lambda: torch.randn(4, 2), torch.tanh)
    >>> test_tanh("first derivative")  # pytest calls it for each check; it passes silently
    >>> test_tanh.pytestmark[0].args[1][0]
    'first derivative'
    """
    import pytest

    @pytest.mark.parametrize("check", list(CHECKS))
    def test(check: str) -> None:
        row = run(check, _subject(function, make_inputs(), reference, compile))
        report = Report(getattr(function, "__name__", "function"), (row,))
        report.raise_if_failed()
        if row.outcome != "passed":
            pytest.skip(f"{row.level or row.outcome}: {row.seen}")

    return test
