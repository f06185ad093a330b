"""The pages of the documentation, and their parts that code makes. `python -m tests.readme` writes these anew."""

import os
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

from manual_mlp.formulas import ACTIVATIONS, SYMBOLS
from manual_mlp.lecture import PAGE, executed

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), PAGE]}


def formula_table() -> str:
    """Return one line for each row of the sheet."""
    lines = ["| name | G(z) | δ = g ⊙ G′ | keeps |", "|---|---|---|---|"]
    for name, row in ACTIVATIONS.items():
        parameters = "".join(f" {parameter}={default:g}" for parameter, default in row.parameters)
        keeps = "–" if name == "identity" else row.saves
        lines.append(f"| {name}{parameters} | `{row.G_text}` | `{row.delta_text}` | {keeps} |")
    where = ", ".join(f"`{symbol}` = `{meaning}`" for symbol, meaning in SYMBOLS.items())
    notes = (
        f"{where}. A row `…_in_z` replaces the row above it when a alone does not show on which side of the edge z "
        "was: for a softplus threshold below 20, for a negative slope."
    )
    return "\n".join([*lines, "", notes, ""])


PARTS: dict[str, Callable[[], str]] = {"formulas": formula_table}  # between <!-- name --> and <!-- /name -->


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
            if name == "README.md":  # whose picture lies beside the pages
                os.replace(here / "flow.png", ROOT / "docs" / "flow.png")
