"""The README's generated parts. `python -m tests.readme` writes them anew."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

from manual_mlp.formulas import ACTIVATIONS, SYMBOLS

README = Path(__file__).resolve().parent.parent / "README.md"


def formula_table() -> str:
    """One line for each row of the sheet."""
    lines = ["| name | G(z) | δ = g ⊙ G′ | keeps |", "|---|---|---|---|"]
    for name, row in ACTIVATIONS.items():
        parameters = "".join(f" {parameter}={default:g}" for parameter, default in row.parameters)
        keeps = "–" if name == "identity" else row.saves
        lines.append(f"| {name}{parameters} | `{row.G_text}` | `{row.delta_text}` | {keeps} |")
    where = ", ".join(f"`{symbol}` = `{meaning}`" for symbol, meaning in SYMBOLS.items())
    notes = (
        f"{where}. A row `…_in_z` is what the row above it becomes when a alone no longer tells on which side of the "
        "edge z was: a softplus threshold below 20, a negative slope."
    )
    return "\n".join([*lines, "", notes, ""])


def printed_trace(text: str) -> str:
    """What the README's own block with `print(trace)` prints."""
    (code,) = re.findall(r"^```python\n([^`]*print\(trace\)\n)```$", text, re.MULTILINE)
    with redirect_stdout(io.StringIO()) as out:
        exec("import torch\nimport manual_mlp as mm\n" + code, {})
    return f"```\n{out.getvalue()}```\n"


def generated(text: str) -> str:
    """The README with its generated parts as code makes them now."""
    for name, part in (("formulas", formula_table()), ("trace", printed_trace(text))):
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- /{name} -->\n")
        text = f"{before}<!-- {name} -->\n{part}<!-- /{name} -->\n{after}"
    return text


if __name__ == "__main__":
    README.write_text(generated(README.read_text()))
