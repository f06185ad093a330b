"""The pages of the documentation, and their parts that code makes. `python -m tests.readme` writes these anew."""

import ast
import inspect
import os
import tempfile
from collections.abc import Callable
from contextlib import chdir
from graphlib import TopologicalSorter
from pathlib import Path
from types import FunctionType

import manual_mlp as mm
from manual_mlp import grids, notation
from manual_mlp.formulas import ACTIVATIONS
from manual_mlp.lecture import PAGE, executed

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), PAGE]}


def formula_table() -> str:
    """Return one line for each row of the sheet and each letter that it saves, read from the code that runs."""
    lines = ["| name | G(z) | δ = g ⊙ G′ | G″ | keeps |", "|---|---|---|---|---|"]
    used = []
    for row in [form for of in ACTIVATIONS.values() for form in of.forms]:
        letters = notation.letters(row)
        parameters = "".join(f", {letters[name]} = {name} = {default:g}" for name, default in row.parameters)
        if row.saves != ACTIVATIONS[row.name].saves:
            parameters = f" where {notation.text(ACTIVATIONS[row.name].when_z[0])}"
        keeps = "–" if row.name == "identity" else row.saves
        formulas = [row.G, row.delta, *([] if row.curvature is None else [row.curvature])]
        cells = [*(f"`{notation.text(formula)}`" for formula in formulas), "–"][:3]
        lines.append(f"| {row.name}{parameters} | {' | '.join(cells)} | {keeps} |")
        used += formulas
    where = ", ".join(f"`{symbol}` = `{meaning}`" for symbol, meaning in notation.meanings(*used).items())
    return "\n".join([*lines, "", f"{where}.", ""])


def grid_table() -> str:
    """Return one line for each formula of the second page, with its code where that is one expression."""
    lines = ["| name | formula | code |", "|---|---|---|"]
    for name, formula in vars(grids).items():
        if not isinstance(formula, FunctionType) or formula.__module__ != grids.__name__:
            continue
        said = " ".join((formula.__doc__ or "").split())
        only_returns = len(ast.parse(inspect.getsource(formula)).body[0].body) == 2  # type: ignore[attr-defined]
        code = f"`{notation.text(formula)}`" if only_returns else ""
        lines.append(f"| {name} | {said} | {code} |")
    return "\n".join([*lines, ""])


def imports(file: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it, but for type checkers alone; `mm.MLP` is modules.py's."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    for node in nodes:  # which grows
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {_home(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mm":
            names.add(_home("manual_mlp", node.attr))
    return names


def _home(module: str, name: str) -> str:
    """Return the module that `from module import name` takes the name from."""
    path = ROOT / f"{module}.{name}".replace(".", "/")
    if path.with_suffix(".py").exists() or path.is_dir():
        return f"{module}.{name}"
    return getattr(mm, name).__module__ if module == "manual_mlp" else module


def house(folder: Path, package: str) -> str:
    """Return a Mermaid graph of the files and packages in a folder: an arrow for each import that no others imply."""
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    names -= {"__init__"}
    uses: dict[str, set[str]] = {name: set() for name in names}
    for file in folder.rglob("*.py"):
        user = file.relative_to(folder).parts[0].removesuffix(".py")
        for name in imports(file) if user in names else ():
            used = name.removeprefix(f"{package}.").split(".")[0]
            uses[user] |= {used} & names - {user} if name.startswith(f"{package}.") else set()

    TopologicalSorter(uses).prepare()  # raises CycleError, which names the circle

    def reached(name: str) -> set[str]:
        return uses[name].union(*map(reached, uses[name]))

    lines = []
    for name in sorted(names, key=lambda name: (len(reached(name)), name)):
        direct = uses[name] - set().union(*map(reached, uses[name]))
        lines += [f"    {name} --> {' & '.join(sorted(direct))}" if direct else f"    {name}"]
    return "\n".join(["```mermaid", "flowchart BT", *lines, "```", ""])


def proofs() -> str:
    """Return a table of the test files, each with what its docstring says that it asks."""
    lines = ["| file | what it asks |", "|---|---|"]
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        asks = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        lines.append(f"| `{file.stem}` | {' '.join(asks.split())} |")
    return "\n".join([*lines, ""])


# The pictures that the code of a page makes and the page shows.
PICTURES = {
    "README.md": ["flow.png"],
    "docs/curvature.md": ["largest_norms.png"],
    "docs/lecture.md": ["flow.gif", "boundary.png"],
}

# What stands between <!-- name --> and <!-- /name -->
PARTS: dict[str, Callable[[], str]] = {
    "formulas": formula_table,
    "grids": grid_table,
    "house": lambda: house(ROOT / "manual_mlp", "manual_mlp"),
    "proofs": proofs,
    "training": lambda: house(ROOT / "manual_mlp" / "training", "manual_mlp.training"),
}


def generated(name: str, folder: Path) -> str:
    """Return a page with its outputs and parts as code makes them now; run it in `folder`, which gets its pictures."""
    with chdir(folder):
        page = executed(PAGES[name].read_text(encoding="utf-8"), name)
    for part, make in PARTS.items():
        begin, end = f"<!-- {part} -->\n", f"<!-- /{part} -->\n"
        if begin in page:
            page = page.partition(begin)[0] + begin + make() + end + page.partition(end)[2]
    return page


def prepared(folder: Path) -> None:
    """Train what docs/running.md goes on with."""
    from manual_mlp.training.run import run
    from tests.configs import configured

    run(configured(folder / "runs" / "iris", "data=iris", "trainer.max_epochs=1"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        prepared(here)
        for name, path in PAGES.items():
            path.write_text(generated(name, here), encoding="utf-8")
            for picture in PICTURES.get(name, ()):  # which lie beside the pages
                os.replace(here / picture, ROOT / "docs" / picture)
