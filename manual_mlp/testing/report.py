"""The report of a battery: a verdict in one line, then one row a check, printed as a table."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from manual_mlp import tables

FIRST, DETERMINISTIC = "first derivative", "deterministic"
Level = Literal["", "wrong", "unsafe", "unsupported"]
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
