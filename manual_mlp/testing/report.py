"""What a battery returns: one row a check, printed as a table."""

import shutil
import textwrap
from dataclasses import dataclass

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "n/a"


@dataclass(frozen=True)
class Row:
    """One check: its outcome, what was seen, the worst error and where, and what usually causes a failure."""

    check: str
    outcome: str
    seen: str = ""
    error: float | None = None
    where: str = ""
    cause: str = ""


class GradientError(AssertionError):
    """A check of the battery failed; the message is the failed rows."""


@dataclass(frozen=True)
class Report:
    """The rows of one battery. Prints as a table; `raise_if_failed` makes it a test."""

    name: str
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.outcome == FAILED)

    def __getitem__(self, check: str) -> Row:
        return next(row for row in self.rows if row.check == check)

    def raise_if_failed(self) -> None:
        """Raises GradientError with the rows that failed."""
        if self.failed:
            text = [line for row in self.failed for line in lines(row, 100)]
            raise GradientError("\n".join([f"{self.name}: {len(self.failed)} checks failed", *text]))

    def __str__(self) -> str:
        width = min(shutil.get_terminal_size().columns, 100)
        return "\n".join([self.name, *(line for row in self.rows for line in lines(row, width)), self.totals()])

    def totals(self) -> str:
        count = {
            outcome: sum(row.outcome == outcome for row in self.rows) for outcome in (PASSED, FAILED, NOT_APPLICABLE)
        }
        return f"{count[PASSED]} passed, {count[FAILED]} failed, {count[NOT_APPLICABLE]} not applicable"


def lines(row: Row, width: int) -> list[str]:
    """A row as text; what a failure means goes below it."""
    error = "" if row.error is None else f"{row.error:.1e}"
    text = [f"  {row.check:<32} {row.outcome:<6} {error:>8}".rstrip()]
    if row.outcome != PASSED:
        for more in (row.seen, row.where and f"at {row.where}", row.cause and f"Usual cause: {row.cause}"):
            text += textwrap.wrap(more, width, initial_indent="      ", subsequent_indent="      ")
    return text
