"""A training run as one page of HTML that needs nothing beside itself: no network, no other file, no script."""

import base64
import html
import io
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from manual_mlp import formulas as sheet
from manual_mlp.tracing import SUPERSCRIPTS, TITLES, Trace

PACKAGES = ("manual-mlp", "torch", "lightning", "hydra-core", "numpy", "scikit-learn", "matplotlib")
LARGEST_SVG = 100_000  # bytes; a picture of more lines than that is smaller as PNG
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Picture:
    """A figure with its title, and in a sentence what is seen on it, for those who read and those who listen."""

    title: str
    text: str
    figure: Figure
    png: bytes = b""  # where it has been rendered already


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
    """The page. All text is escaped, so none of it can become markup.

    facts: name and value, such as "net" and "64-30-10". figures: by part and kind, such as test_accuracy.
    trace: of the net, for its formulas; None for a net that has none. step: what takes the gradients, in words; "" for
    w := w − LR · ∂C/∂w. remark: what else there is to say of the formulas.
    origin: name and value of what leads to the same run again. config: the resolved configuration.
    """
    sections = [
        _section("The run", _list(facts) + _table_of(figures)),
        _section("Pictures", f'<div class="pictures">{"".join(map(_picture, pictures))}</div>') if pictures else "",
        _section("The formulas of this net", _formulas(trace, step, remark)) if trace else "",
        _section("How to get it again", _list(origin) + f"<h3>Configuration</h3><pre>{_text(config)}</pre>"),
    ]
    return PAGE.format(title=_text(title), style=STYLE, body="\n".join(sections))


def versions() -> str:
    """Python's and the packages', in one line."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a copy that was never installed, or an optional one
            continue
    return ", ".join(found)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _text(text: object) -> str:
    return html.escape(str(text))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _list(items: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in items.items()) + "</dl>"


def _table_of(figures: Mapping[str, float]) -> str:
    """A row for each kind, a column for each part."""
    kinds = list(dict.fromkeys(name.partition("_")[2] for name in figures))
    rows = []
    for kind in kinds:
        cells = [figures.get(f"{part}_{kind}") for part in PARTS]
        texts = ["–" if v is None else f"{100 * v:.2f} %" if kind == "accuracy" else f"{v:.4g}" for v in cells]
        rows.append(f'<tr><th scope="row">{_text(kind)}</th>{"".join(f"<td>{text}</td>" for text in texts)}</tr>')
    head = "".join(f'<th scope="col">{part}</th>' for part in PARTS)
    return (
        f'<table class="figures"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        if rows
        else ""
    )


def _picture(picture: Picture) -> str:
    kind, content = ("png", picture.png) if picture.png else _rendered(picture.figure)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    width, height = picture.figure.get_size_inches() * 100
    return (
        f'<figure><h3>{_text(picture.title)}</h3><img src="{source}" alt="{_text(picture.text)}" '
        f'width="{width:.0f}" height="{height:.0f}"><figcaption>{_text(picture.text)}</figcaption></figure>\n'
    )


def _rendered(figure: Figure) -> tuple[str, bytes]:
    """Lines as SVG, which stays sharp in print; images, and pictures of many points, as PNG."""
    if not any(axes.images for axes in figure.axes):
        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "manual_mlp"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        if len(buffer.getvalue()) <= LARGEST_SVG:
            return "svg+xml", buffer.getvalue()
    return "png", png(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The formulas with this net's sizes
# ---------------------------------------------------------------------------------------------------------------------


def _formulas(trace: Trace, step: str, remark: str) -> str:
    """The five steps as a table of formula and shape, and each G that occurs in them with its δ."""
    parts = []
    for title, lines in trace.formulas():
        rows = [f"<tr><td>{_formula(*line[:2])}</td><td>{_shape(*line[::2])}</td></tr>" for line in lines]
        if step and title == TITLES[-1]:
            rows = [f'<tr><td colspan="2">{_text(step)}</td></tr>']
        head = f'<tr><th colspan="2" scope="rowgroup">{title}</th></tr>'
        parts += [f"<tbody>{head}{''.join(rows)}</tbody>"] if rows else []
    activations = [sheet.ACTIVATIONS[name] for name in dict.fromkeys(trace.activation.values())]
    used = [(f"{row.name}(z)", row.G_text) for row in activations]
    used += [(f"g ⊙ {row.name}′(z)", row.delta_text) for row in activations]
    used += [(name, meaning) for name, meaning in sheet.SYMBOLS.items() if any(name[:2] in text for _, text in used)]
    cells = [f"<tr><td>{_text(name)}</td><td><code>{_text(text)}</code></td></tr>" for name, text in used]
    head = '<tr><th colspan="2" scope="rowgroup">activations</th></tr>'
    note = f"N is the number of rows in a batch, m = {trace.sizes[-1]} the number of outputs. {_text(remark)}"
    return f'<p>{note}</p><table class="formulas">{"".join(parts)}<tbody>{head}{"".join(cells)}</tbody></table>'


def _formula(symbol: str, formula: str) -> str:
    """With the raised digits and ᵀ of the trace as <sup>."""
    text = _text(f"{symbol} = {formula}" if formula else symbol)
    text = re.sub(
        f"[{SUPERSCRIPTS}]+", lambda m: f"<sup>{''.join(str(SUPERSCRIPTS.index(c)) for c in m[0])}</sup>", text
    )
    return text.replace("ᵀ", "<sup>T</sup>")


def _shape(symbol: str, value: Tensor) -> str:
    """(N, n) of what has a row for each sample."""
    sizes = [str(size) for size in value.shape]
    if sizes and symbol[0] not in "Wwb∂n":
        sizes[0] = "N"
    return f"({', '.join(sizes)})" if sizes else "a number"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --soft: #2a2c30; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 64rem; margin: auto; padding: 1rem; }
h1, dd, pre, code { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .75rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 0 1rem; }
dt, thead th, th[scope=rowgroup] { opacity: .7; }
dd { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; font-weight: normal; }
th[scope=rowgroup] { padding-top: .8rem; }
tr { border-bottom: 1px solid var(--line); }
.figures { white-space: nowrap; }
.formulas { width: 100%; max-width: 34rem; }
.formulas td:first-child { font-family: "Latin Modern Math", "Cambria Math", "STIX Two Math", Georgia, serif; }
sup { line-height: 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
img { display: block; width: 100%; max-width: 34rem; height: auto; background: white; border-radius: 4px; }
figcaption { font-size: .875rem; margin-top: .25rem; }
pre, code { font: .8125rem/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: .75rem; border-radius: 4px; white-space: pre-wrap; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .pictures { grid-template-columns: 1fr 1fr; }
  figure, tr, dl { break-inside: avoid; }
  h2, h3, th[scope=rowgroup] { break-after: avoid; }
  pre { padding: 0; background: none; columns: 2; }
}
"""
