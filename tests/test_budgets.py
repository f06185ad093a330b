"""Small is a feature: the package has at most so many lines of code, and the ceilings only fall.

A line counts if it holds a token of code; blank lines, comments and docstrings do not. Code in strings, templates and
the lecture's page counts.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.readme import ROOT

PACKAGE = ROOT / "manual_mlp"
WHOLE = 11679  # to be 6000
CORE = 3595  # to be 1850
LARGEST = 406
# What the nets, the derivatives and the training engine are made of.
CORE_FILES = {"errors", "formulas", "functions", "functional", "modules", "plan", "network", "engine"}
CORE_FILES |= {"grids", "grid_functions", "grid_rules"}
CORE_FILES |= {"cuda_graph", "conversion", "kernels", "checks", "program", "snapshot"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FILES = {
    str(path.relative_to(PACKAGE)): path
    for path in sorted(PACKAGE.rglob("*"))
    if path.suffix in (".py", ".md", ".html")
}


def code_lines(source: str) -> int:
    """Count the lines of Python that hold code; a string that is no docstring counts with all its lines."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, described) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    blank = {number for number, line in enumerate(source.splitlines(), 1) if not line.strip()}
    return len(lines - docstrings - blank)


def size(path: Path) -> int:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return code_lines(source)
    if path.suffix == ".md":
        return sum(map(code_lines, re.findall(r"^```python.*?\n(.*?)^```$", source, re.MULTILINE | re.DOTALL)))
    return sum(bool(line.strip()) for line in source.splitlines())


SIZES = {name: size(path) for name, path in FILES.items()}


def test_whole() -> None:
    assert sum(SIZES.values()) <= WHOLE


def test_core() -> None:
    assert sum(SIZES.get(f"{name}.py", 0) for name in CORE_FILES) <= CORE


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_large(name: str) -> None:
    assert SIZES[name] <= LARGEST


def test_what_counts() -> None:
    source = '"""Doc\n\nstring."""\n\n# comment\nx = """two\nlines"""  #\n\ndef f(\n    a,\n):\n    """No."""\n'
    assert code_lines(source) == 5


if __name__ == "__main__":  # `python -m tests.test_budgets`
    print(*(f"{lines:6} {name}" for name, lines in SIZES.items()), f"{sum(SIZES.values()):6} whole", sep="\n")
