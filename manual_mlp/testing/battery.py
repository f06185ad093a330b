"""Run the checks on anything differentiable, report them, a row a check, and make pytest tests of them."""

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manual_mlp import tables
from manual_mlp.checks import brief
from manual_mlp.errors import InputError
from manual_mlp.testing.checks import (
    CHECKS,
    FIRST,
    Inputs,
    Level,
    NotApplicableError,
    Subject,
    WrongError,
    is_real,
    leaves,
    sentence,
)

LEVELS: dict[Level, str] = {"wrong": "Wrong", "unsafe": "Unsafe", "unsupported": "Not supported"}


@dataclass(frozen=True)
class Row:
    """One check: its outcome, what was seen, the worst error and where, and what usually causes a failure.

    level   the weight of a failure: "wrong", a wrong number comes out; "unsafe", something around it is written, kept,
            wasted or fails; "unsupported", what torch's own layers can do and this function refuses, such as a jvp

    >>> import torch, manual_mlp as mm
    >>> report = mm.testing.check_gradients(mm.functional.tanh, torch.tensor([[0.5, -1.0]]))
    >>> row = report["first derivative"]
    >>> row.outcome, row.error < 1e-8
    ('passed', True)
    """

    check: str
    outcome: Literal["passed", "failed", "n/a"]
    seen: str = ""
    error: float | None = None
    where: str = ""
    cause: str = ""
    level: Level = ""


class GradientError(AssertionError):
    """A check of the battery failed; the message is the failed rows.

    >>> import torch, manual_mlp as mm
    >>> report = mm.testing.check_gradients(lambda x: x.detach() * x, torch.tensor([[0.5, -1.0]]))  # half of (x²)′
    >>> try:
    ...     report.raise_if_failed()
    ... except mm.testing.GradientError as error:
    ...     print("first derivative" in str(error))
    True
    """


@dataclass(frozen=True)
class Report:
    """The rows of one battery. Prints as a verdict and a table; `raise_if_failed` makes it a test.

    >>> import torch, manual_mlp as mm
    >>> report = mm.testing.check_gradients(mm.functional.tanh, torch.tensor([[0.5, -1.0]]))
    >>> report.failed, report["second derivative"].outcome
    ((), 'passed')
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        """Return the rows of all checks that failed.

        >>> import torch, manual_mlp as mm
        >>> half = lambda x: x.detach() * x  # half of (x²)′
        >>> report = mm.testing.check_gradients(half, torch.tensor([[0.5, -1.0]]))
        >>> "first derivative" in [row.check for row in report.failed]
        True
        """
        return tuple(row for row in self.rows if row.outcome == "failed")

    def __getitem__(self, check: str) -> Row:
        return next(row for row in self.rows if row.check == check)

    def counted(self) -> tuple[Row, ...]:
        """Return the failures that count: those at level "wrong" or "unsafe".

        >>> import torch, manual_mlp as mm
        >>> report = mm.testing.check_gradients(mm.functional.tanh, torch.tensor([[0.5, -1.0]]))
        >>> report.counted()
        ()
        """
        return tuple(row for row in self.failed if row.level != "unsupported")

    def raise_if_failed(self) -> None:
        """Raise GradientError with the failures that count.

        >>> import torch, manual_mlp as mm
        >>> report = mm.testing.check_gradients(mm.functional.tanh, torch.tensor([[0.5, -1.0]]))
        >>> report.raise_if_failed()  # passes silently
        >>> report["first derivative"].outcome
        'passed'
        """
        if failed := self.counted():
            raise GradientError("\n".join([f"{self.name}: {len(failed)} checks failed", *lines(failed, 100)]))

    @property
    def verdict(self) -> str:
        """Return if the derivative is right, wrong or not judged; then what is unsafe, and what is not supported.

        >>> import torch, manual_mlp as mm
        >>> report = mm.testing.check_gradients(mm.functional.tanh, torch.tensor([[0.5, -1.0]]))
        >>> report.verdict
        'The derivative is right.'
        """
        levels = {level: "; ".join(row.check for row in self.failed if row.level == level) for level in LEVELS}
        first, said = self[FIRST], [] if levels["wrong"] else ["The derivative is right."]
        if first.outcome == "n/a":
            said = [f"The derivative is not judged: {first.seen}."]
        return " ".join([*said, *(f"{LEVELS[level]}: {checks}." for level, checks in levels.items() if checks)])

    def __str__(self) -> str:
        width = min(shutil.get_terminal_size().columns, 100)
        verdict = textwrap.wrap(f"{self.name}: {self.verdict}", width, subsequent_indent="  ")
        return "\n".join([*verdict, *lines(self.rows, width), self.totals()])

    def totals(self) -> str:
        """Return how many checks ended how, in one line.

        >>> import torch, manual_mlp as mm
        >>> half = lambda x: x.detach() * x  # half of (x²)′
        >>> report = mm.testing.check_gradients(half, torch.tensor([[0.5, -1.0]]))
        >>> " wrong, " in report.totals()
        True
        """
        found: list[str] = [row.level or row.outcome for row in self.rows]
        counts = {name: found.count(name) for name in ("passed", *LEVELS, "n/a")}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def lines(rows: Sequence[Row], width: int) -> Iterator[str]:
    """Yield the rows as a table; what a failure means goes below it."""
    cells = [[row.check, row.level or row.outcome, "" if row.error is None else f"{row.error:.1e}"] for row in rows]
    for row, line in zip(rows, tables.text(cells, align="llr", gap=" ").split("\n"), strict=False):
        yield line
        if row.outcome != "passed":
            for more in (row.seen, row.where and f"at {row.where}", row.cause and f"Usual cause: {row.cause}"):
                yield from textwrap.wrap(more, width, initial_indent="      ", subsequent_indent="      ")


def run(name: str, subject: Subject) -> Row:
    """Run one check and return its row: whatever it raises is the row's failure."""
    if name not in subject.rows:
        subject.rows[name] = _row(name, subject)
    return subject.rows[name]


def _row(name: str, subject: Subject) -> Row:
    check = CHECKS[name]
    try:
        if subject.unfit is not None:
            only, why, failure = subject.unfit
            raise failure if name == only else NotApplicableError(why)
        for needed in check.needs:
            if run(needed, subject).outcome != "passed":
                raise NotApplicableError(f"it builds on the {needed}, which has not passed")
        error, where = check.run(subject) or (None, "")
    except NotApplicableError as reason:
        return Row(name, "n/a", str(reason))
    except WrongError as wrong:
        return Row(name, "failed", str(wrong), wrong.error, wrong.where, check.cause, wrong.level or check.level)
    except Exception as failure:
        return Row(name, "failed", sentence(failure), None, "", check.cause, check.raised)
    return Row(name, "passed", "", error, where)


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
    return report_of(_subject(function, inputs, reference, compile))


def report_of(subject: Subject) -> Report:
    """Run every check."""
    return Report(subject.name, tuple(run(name, subject) for name in CHECKS))


def _subject(
    function: Any, inputs: Iterable[Any], reference: Callable[..., Any] | None = None, compile: bool = False
) -> Subject:
    if not isinstance(inputs, Iterable):
        raise InputError(f"expected a tensor or a tuple of what the function takes; got {brief(inputs)}")
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
