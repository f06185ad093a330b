"""The English of docstrings, comments, messages, options and pages is plain; no docstring begins with Whether."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.readme import PAGES, ROOT

# Write instead: faster, earlier; transposed, changed; says, names, prints; has, takes; NaN; without its; gives them
# equal weight; silently; because.
AVOIDED = re.compile(
    r"\b(sooner|turned|tells?|told|(is|are|was|were) had|no numbers?|less (its|their)|[wW]eighs? (it|them|all)|"
    r"in silence)\b|[,;] since\b|^Since\b"
)
NO_BEGINNING = re.compile(r"(Of|Whether|What|Whose|Whom?|How|Where|When|Which|If|As)\b")
PYTHON = {str(path.relative_to(ROOT)): path for path in [*sorted(ROOT.glob("manual_mlp/**/*.py")), ROOT / "train.py"]}
TEXT = {
    str(path.relative_to(ROOT)): path
    for pattern in ("conf/**/*.yaml", "manual_mlp/**/*.html", "pyproject.toml", "Makefile", "CHANGELOG.md")
    for path in sorted(ROOT.glob(pattern))
}


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                yield first.value


def faults(path: Path) -> list[str]:
    """Return what is wrong with the English of a file, by line."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [
            f"{path.name}:{number}: {found[0]!r}"
            for number, line in enumerate(source.splitlines(), 1)
            for found in AVOIDED.finditer(line)
        ]
    tree = ast.parse(source)
    strings = [(node.lineno, node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    wrong = [
        f"{path.name}:{number}: {found[0]!r}"
        for number, text in strings + comments
        if isinstance(text, str)
        for found in AVOIDED.finditer(text)
    ]
    for docstring in docstrings(tree):
        if found := NO_BEGINNING.match(str(docstring.value).strip()):
            wrong.append(f"{path.name}:{docstring.lineno}: begins with {found[0]!r}")
    return wrong


@pytest.mark.parametrize("name", PYTHON | TEXT | PAGES)
def test_plain_english(name: str) -> None:
    assert not (found := faults((PYTHON | TEXT | PAGES)[name])), "\n".join(found)


def test_faults_are_found(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text('"""Whether it turns."""\nx = f"{1} sooner"  # it tells\n\n\ndef f():\n    """Return it."""\n')
    assert faults(file) == ["file.py:2: 'sooner'", "file.py:2: 'tells'", "file.py:1: begins with 'Whether'"]
