"""The README's generated table. `python -m tests.readme` writes it anew."""

from pathlib import Path

from manual_mlp.formulas import ACTIVATIONS, SYMBOLS

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- formulas -->\n", "<!-- /formulas -->\n"


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


def with_table(text: str) -> str:
    """The README with the table as the sheet has it now."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return before + START + formula_table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
