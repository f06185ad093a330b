"""One printer for every table: columns under each other, Markdown and LaTeX that stay tables whatever a cell holds."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manual_mlp import tables

CELLS = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=6)
TABLES = st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=4))
ROWS = [["run", "lr", "val_loss"], ["* 0", "0.01235", "0.5"], ["1", "a,\nb", ""]]


def test_text() -> None:
    assert tables.text(ROWS, align="lr").split("\n") == [
        "  run       lr  val_loss",
        "  * 0  0.01235  0.5",
        "  1         a,",
        "             b",
    ]
    assert tables.text(ROWS[:2], indent="", gap=" ") == "run lr      val_loss\n* 0 0.01235 0.5"
    assert tables.width(tables.text(ROWS)) == 24
    assert tables.text([], align="lr") == ""
    with pytest.raises(ValueError, match="shorter"):
        tables.text([["a", "b"], ["c"]])


def test_markdown() -> None:
    assert tables.markdown(ROWS, align="lr").split("\n") == [
        "| run | lr | val_loss |",
        "| --- | ---: | --- |",
        "| * 0 | 0.01235 | 0.5 |",
        "| 1 | a, b |  |",
    ]
    assert tables.markdown([["a|b"]]).startswith("| a\\|b |")


def test_latex() -> None:
    assert tables.latex([["l", r"W^{l}"], ["1", "2"]]) == "\\begin{array}{ll}\nl & W^{l} \\\\\n1 & 2\n\\end{array}"
    assert tables.latex([["1"], ["2"]], "pmatrix") == "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}"


@given(TABLES)
def test_columns_stand_under_each_other_and_none_is_lost(rows: list[list[str]]) -> None:
    lines = [line.ljust(99) for line in tables.text(rows, indent="", gap="\t").split("\n")]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        at = 0
        for column, cell in enumerate(row):
            assert line[at:].startswith(cell)
            at += max(len(other[column]) for other in rows) + 1
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in tables.markdown(rows).split("\n")]
    assert {len(cells) for cells in split} == {len(rows[0])}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("val_accuracy", 0.98765, "98.77 %"),
        ("accuracy", 1.0, "100.00 %"),
        ("loss", 0.0061512, "0.006151"),
        ("test_loss", 2e-9, "2e-09"),
        ("rmse", -1.2345e-30, "-1.2e-30"),
        ("r2", float("nan"), "nan"),
        ("r2", None, ""),
    ],
)
def test_figure(name: str, value: float | None, text: str) -> None:
    assert tables.figure(name, value) == text
