"""Print rows of cells as a table: aligned text, Markdown, LaTeX; the same number in the same digits everywhere.

rows: sequences of strings, all of one length. align: a letter for each column, l or r; what it leaves out is l.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

Rows = Iterable[Sequence[str]]
LONGEST = 8  # characters of a figure
ERRORS = ("loss", "rmse")  # ends of names of figures of which less is better


def text(rows: Rows, align: str = "", indent: str = "  ", gap: str = "  ") -> str:
    """Return columns under each other. A cell may have several lines."""
    lines = [line for row in rows for line in zip_longest(*(cell.split("\n") for cell in row), fillvalue="")]
    columns = list(zip(*lines, strict=True))
    padded = [
        [cell.rjust(width) if side == "r" else cell.ljust(width) for cell in column]
        for column, side in zip(columns, align.ljust(len(columns), "l"), strict=False)  # no rows have no columns
        for width in [max(map(len, column))]
    ]
    return "\n".join((indent + gap.join(line)).rstrip() for line in zip(*padded, strict=True))


def width(table: str) -> int:
    """Return how many characters wide a printed table is."""
    return max(map(len, table.split("\n")))


def markdown(rows: Rows, align: str = "") -> str:
    """Return a table of Markdown, the first row as its header."""
    header, *body = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(header), "l")]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


def latex(rows: Rows, environment: str = "array") -> str:
    """Return an environment of LaTeX. The cells are formulas already."""
    lines = [" & ".join(row) for row in rows]
    columns = f"{{{'l' * (1 + lines[0].count(' & '))}}}" if environment == "array" else ""
    return f"\\begin{{{environment}}}{columns}\n" + " \\\\\n".join(lines) + f"\n\\end{{{environment}}}"


def words(name: str) -> str:
    """Return "val cost" for val_loss: the names of figures are Lightning's, but C is the cost."""
    return name.replace("_", " ", 1).removesuffix("loss") + "cost" * name.endswith("loss")


def figure(name: str, value: float | None) -> str:
    """Return accuracies in per cent, others in four digits, fewer where they are longer than eight characters."""
    if value is None:
        return ""
    if name.endswith("accuracy"):
        return f"{100 * value:.2f} %"
    forms = (f"{value:{form}}" for form in (".4g", ".2e", ".1e"))
    return min(forms, key=lambda form: max(len(form), LONGEST))
