"""Write a training run as one page of HTML that needs nothing beside itself: no network, no other file, no script."""

import base64
import io
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from torch import Tensor

from manual_mlp import formulas as sheet
from manual_mlp import notation, tables
from manual_mlp.errors import shown
from manual_mlp.tracing import SUPERSCRIPTS, TITLES, Trace

PACKAGES = ("manual-mlp", "torch", "lightning", "hydra-core", "numpy", "scikit-learn", "matplotlib")
TEMPLATE = Path(__file__).parent / "templates" / "report.html"
PARTS = ("train", "val", "test")


class Picture(NamedTuple):
    """A figure with its title, and a sentence that says what is seen on it."""

    title: str
    text: str
    figure: Figure

    def source(self) -> str:
        """Return the picture as a data: address."""
        return f"data:image/png;base64,{base64.b64encode(png(self.figure)).decode()}"


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def page(
    title: str,
    facts: Mapping[str, str],
    figures: Mapping[str, float],
    pictures: Sequence[Picture],
    trace: Trace | None,
    step: str,
    remark: str,
    origin: Mapping[str, str],
    config: str,
) -> str:
    """Return the page. The template escapes all text, so none of it can become markup.

    facts: name and value, such as "net" and "64-30-10". figures: by part and kind, such as test_accuracy.
    trace: of the net, for its formulas; None for a net that has none. step: what takes the gradients, in words; "" for
    w := w − LR · ∂C/∂w. remark: what else there is to say about the formulas.
    origin: name and value of what leads to the same run again. config: the resolved configuration.
    """
    kinds = dict.fromkeys(name.partition("_")[2] for name in figures)
    rows = {kind: [tables.figure(kind, figures.get(f"{part}_{kind}")) or "–" for part in PARTS] for kind in kinds}
    steps, outputs = (list(_steps(trace, step)), trace.sizes[-1]) if trace else ([], 0)
    given = {"title": title, "facts": facts, "remark": remark, "origin": origin, "config": config, "pictures": pictures}
    templates = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    templates.finalize = lambda value: shown(value, keep="\n") if type(value) is str else value  # names out of files
    template = templates.from_string(TEMPLATE.read_text(encoding="utf-8"))
    rows = {tables.words(kind): cells for kind, cells in rows.items()}
    return template.render(given, figures=rows, parts=PARTS, steps=steps, outputs=outputs)


def versions() -> str:
    """Return Python's version and the packages', in one line."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a copy that was never installed, or an optional one
            continue
    return ", ".join(found)


def _steps(trace: Trace, step: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each step's title with its formulas and shapes, then each G of the net with its δ."""
    for title, lines in trace.formulas():
        rows: list[tuple[str, str]] = [(_formula(*line[:2]), _shape(*line[::2])) for line in lines]
        if rows:
            yield title, [(step, "")] if step and title == TITLES[-1] else rows
    activations = [sheet.ACTIVATIONS[name] for name in dict.fromkeys(trace.activation.values())]
    used = [(f"{row.name}(z)", notation.text(row.G)) for row in activations]
    used += [(f"g ⊙ {row.name}′(z)", notation.text(row.delta)) for row in activations]
    used += notation.meanings(*(formula for row in activations for formula in (row.G, row.delta))).items()
    used += [(letter, name) for row in activations for name, letter in notation.letters(row).items()]
    yield "activations", [(name, Markup("<code>{}</code>").format(text)) for name, text in used]


def _formula(symbol: str, formula: str) -> Markup:
    """Return the formula with the raised digits and ᵀ of the trace as <sup>."""
    text = str(escape(f"{symbol} = {formula}" if formula else symbol)).replace("ᵀ", "<sup>T</sup>")
    digits = str.maketrans(SUPERSCRIPTS, "0123456789")
    return Markup(re.sub(f"[{SUPERSCRIPTS}]+", lambda raised: f"<sup>{raised[0].translate(digits)}</sup>", text))


def _shape(symbol: str, value: Tensor) -> str:
    """Return the shape in parentheses, with N for the rows of a batch."""
    sizes = [str(size) for size in value.shape]
    if sizes and symbol[0] not in "Wwbγβ∂n":
        sizes[0] = "N"
    return f"({', '.join(sizes)})" if sizes else "a number"
