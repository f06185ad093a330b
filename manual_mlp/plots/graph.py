"""Pictures of a small net as a graph: its parameters, and the five steps of one sample through it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from manual_mlp.errors import InputError
from manual_mlp.plots.style import STYLE, WIDTH, array, new_panels, styled

MAX_DRAWN = 8  # neurons of a layer, and layers, of a net drawn as a graph
MAX_NUMBERS = 12  # on the lines between two layers; more would cover each other
POSITIVE, NEGATIVE = "#B35806", "#542788"  # the ends of PuOr
UNIT, APART = 0.55, WIDTH / 4  # inches from one neuron to the next, from layer to layer
ROUNDS = 50  # in which numbers move apart
SHARES = sorted(np.linspace(0.26, 0.66, 21), key=lambda share: abs(share - 0.46))  # of a line, for its number
PAPER: Any = {"facecolor": "white", "linewidth": 0, "pad": 1.5}  # behind a number on a line


@styled
def network(trace: Any) -> Figure:
    """Draw the net as a graph: lines with their W, orange if positive, purple if negative; neurons with their b.

    trace: from `mm.trace`. Raises: InputError for a net with more than 8 layers, or with more than 8 neurons in one.

    >>> import manual_mlp as mm
    >>> traced = mm.trace(mm.MLP([1, 1, 1]), [0.5], [1.0])
    >>> "$x_{1}$" in [text.get_text() for text in mm.plots.network(traced).axes[0].texts]
    True
    """
    figure, (axes,) = _graphs(trace, 1)
    axes.set_title("lines: $W^l$; neurons: $x$, then $b^l$")
    for layer, weight in trace.weight.items():
        _lines(axes, trace, layer, array(weight))
    inputs = {1: [f"$x_{{{index + 1}}}$" for index in range(trace.sizes[0])]}
    _neurons(axes, trace.sizes, inputs | {layer + 1: _numbers(b) for layer, b in trace.bias.items() if b is not None})
    return figure


@styled
def flow(trace: Any, sample: int = 0) -> Figure:
    """Draw one sample's way through a small net, a panel for each step: a^l forward, δ^l back, ∂C/∂W, new W.

    The neurons show the numbers that are known by then. The lines show the weights that the step multiplies with; in
    steps 4 and 5 they show its result for the whole batch. trace: from `mm.trace`. Raises: InputError as `network`.

    >>> import manual_mlp as mm
    >>> traced = mm.trace(mm.MLP([1, 1, 1]), [0.5], [1.0])
    >>> [axes.get_title().partition(":")[0] for axes in mm.plots.flow(traced).axes]
    ['forward', 'forward', 'backward', 'backward', 'gradients', 'update']
    """
    steps = list(_panels(trace, sample))
    figure, panels = _graphs(trace, len(steps))
    for axes, panel in zip(panels, steps, strict=True):
        _draw(axes, trace, panel)
    return figure


def animation(trace: Any, path: str | PathLike[str], sample: int = 0, seconds: float = 2.0) -> None:
    """Write the panels of `flow` one after another as a GIF, so many seconds each. Raises: InputError as `network`.

    >>> import pathlib, manual_mlp as mm
    >>> mm.plots.animation(mm.trace(mm.MLP([1, 1]), [0.5], [1.0]), "steps.gif")
    >>> pathlib.Path("steps.gif").read_bytes()[:6]
    b'GIF89a'
    """
    steps = list(_panels(trace, sample))
    film = PillowWriter(fps=1 / seconds)  # type: ignore[arg-type] # it takes fractions
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _graphs(trace, 1)
        with film.saving(figure, Path(path), dpi=100):
            for panel in steps:
                axes.clear()
                _empty(axes, trace)
                _draw(axes, trace, panel)
                film.grab_frame()


class Panel(NamedTuple):
    """A panel: its title, the numbers in the neurons by layer, those on the lines by layer, the lines' arrows.

    sums: the layers whose terms are drawn, too.
    """

    title: str
    neurons: dict[int, list[str]]
    lines: dict[int, Any]
    arrow: str = ""
    sums: Sequence[int] = ()


def _panels(trace: Any, sample: int) -> Iterator[Panel]:
    _check_size(trace)
    last = len(trace.sizes)
    a = {layer: _numbers(value[sample]) for layer, value in trace.a.items()}
    delta = {layer: _numbers(value[sample]) for layer, value in trace.delta.items()}
    for l, reads in trace.reads.items():  # noqa: E741 -- the lecture's letter
        z = " + ".join(_term(trace, l, f"a^{read}") for read in reads)
        title = rf"forward: $z^{l} = {z}$, $a^{l} = G(z^{l})$"
        yield Panel(title, {known: a[known] for known in range(1, l + 1)}, *_into(trace, [l], ">"))
    for l in range(last, 1, -1):  # noqa: E741
        readers = [reader for reader, reads in trace.reads.items() for read in reads if read == l]
        terms = " + ".join(_term(trace, reader, rf"\delta^{reader}", back=True) for reader in readers)
        incoming = (f"({terms})" if len(readers) > 1 else terms) or rf"\partial C/\partial a^{l}"
        title = rf"backward: $\delta^{l} = {incoming} \odot G'(z^{l})$"
        yield Panel(title, {known: delta[known] for known in range(l, last + 1)}, *_into(trace, readers, "<"))
    title = r"gradients: $\partial C/\partial W^l = \delta^{l+1} (a^l)^T$; neurons: $a^1$, then $\delta^l$"
    yield Panel(title, {1: a[1]} | delta, trace.grad_weight)
    biases = {layer + 1: _numbers(b) for layer, b in trace.new_bias.items() if b is not None}
    title = r"update: $W^l := W^l - LR \, \partial C/\partial W^l$; neurons: the new $b^l$"
    yield Panel(title, biases, trace.new_weight)


def _term(trace: Any, layer: int, of: str, back: bool = False) -> str:
    """Return what the rule of a layer makes of an a, or of its δ on the way back."""
    rule = trace.rule[layer]
    if rule == "affine":
        return f"(W^{layer - 1})^T {of}" if back else f"W^{layer - 1} {of} + b^{layer - 1}"
    name = rule.replace(" ", r"\ ")
    return of if rule == "sum" else rf"\mathrm{{{name}}}{'^T' * back}({of})"


def _into(trace: Any, layers: Sequence[int], arrow: str) -> tuple[dict[int, Any], str, list[int]]:
    """Return what such layers read, as a Panel draws it: the W, their arrows, the sums."""
    weights = {layer - 1: trace.weight[layer - 1] for layer in layers if layer - 1 in trace.weight}
    return weights, arrow, [layer for layer in layers if layer - 1 not in trace.weight]


def _draw(axes: Axes, trace: Any, panel: Panel) -> None:
    axes.set_title(panel.title)
    for layer, weight in panel.lines.items():
        _lines(axes, trace, layer, array(weight), panel.arrow)
    for layer in panel.sums:
        axes.add_collection(LineCollection(_ways(trace, layer), colors="0.3", linewidths=1.2, clip_on=False))
    _neurons(axes, trace.sizes, panel.neurons)


def _check_size(trace: Any) -> None:
    if grid := next((a.shape for a in trace.a.values() if a.ndim > 2), ()):
        raise InputError(f"expected layers of single neurons, but got a grid {tuple(grid)}; draw its histograms")
    if max(len(trace.sizes), *trace.sizes) > MAX_DRAWN:
        raise InputError(
            f"expected at most {MAX_DRAWN} layers of at most {MAX_DRAWN} neurons, to draw them with their numbers, but "
            f"got {'-'.join(map(str, trace.sizes))}; draw a smaller net, or its histograms"
        )


def _graphs(trace: Any, number: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, with all neurons empty: neuron i of layer l stands at (l, −i), around 0."""
    sizes = trace.sizes
    _check_size(trace)
    figure, panels = new_panels(number, 1, 0.7 + UNIT * max(sizes))
    figure.set_figwidth(max(WIDTH, APART * len(sizes)))
    for axes in panels[:, 0]:
        _empty(axes, trace)
    look = {"positive": POSITIVE, "negative": NEGATIVE}
    handles = [Line2D([], [], color=color, label=f"{sign}, the thicker the larger") for sign, color in look.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7)
    return figure, list(panels[:, 0])


def _empty(axes: Axes, trace: Any) -> None:
    sizes = trace.sizes
    axes.set_axis_off()
    axes.set(xlim=(0.6, len(sizes) + 0.4), ylim=(-max(sizes) / 2, max(sizes) / 2))
    for layer in trace.reads:
        axes.add_collection(LineCollection(_ways(trace, layer), colors="0.85", linewidths=0.8, clip_on=False))


def _ways(trace: Any, layer: int) -> list[np.ndarray]:
    """Return the lines (points, 2) into a layer: of W in the order of W.ravel(), of others from each term.

    A line that passes over layers is bent, to run between their neurons.
    """
    there, alone = _places(trace.sizes, layer), trace.rule[layer] != "affine"
    pairs = [
        (begin, end)
        for read in trace.reads[layer]
        for index, end in enumerate(there)
        for begin in (_places(trace.sizes, read)[index : index + 1] if alone else _places(trace.sizes, read))
    ]
    ways = []
    for begin, end in pairs:
        way = np.linspace(begin, end, 2 if end[0] - begin[0] == 1 else 41)
        share = np.linspace(0, 1, len(way))
        way[:, 1] += 2 * share * (1 - share) * np.sign(begin[1] or 1)  # away from the middle, half a neuron's distance
        ways.append(way)
    return ways


def _at(way: np.ndarray, share: float) -> np.ndarray:
    """Return the point of a line at this share of its length."""
    return np.array([np.interp(share, np.linspace(0, 1, len(way)), way[:, axis]) for axis in (0, 1)])


def _places(sizes: Sequence[int], layer: int) -> list[tuple[float, float]]:
    n = sizes[layer - 1]
    return [(layer, (n - 1) / 2 - index) for index in range(n)]


def _lines(axes: Axes, trace: Any, layer: int, weight: np.ndarray, arrow: str = "") -> None:
    """Draw the lines of W^l: coloured by sign, as thick as |W^l|, with arrows, and with numbers if they are few."""
    weights, ways = weight.ravel(), _ways(trace, layer + 1)
    colors = [POSITIVE if w >= 0 else NEGATIVE for w in weights]
    widths = 0.8 + 2.5 * np.abs(weights) / (np.abs(weights).max() or 1.0)
    axes.add_collection(LineCollection(ways, colors=colors, linewidths=widths))
    texts = [_short(weight) for weight in weights] if len(ways) <= MAX_NUMBERS else []
    for text, (x, y) in zip(texts, _apart(axes, trace.sizes, ways, texts) if texts else (), strict=True):
        axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=PAPER)
    if arrow:
        x, y = np.transpose([_at(way, 0.74) for way in ways])
        axes.scatter(x, y, marker=arrow, s=22, color=colors, zorder=2)


def _apart(axes: Axes, sizes: Sequence[int], ways: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """Return a place on each line for its text, where it covers no other and no neuron, as far as there is room.

    They begin in the middle of their lines. Then those that cover others move away, round by round.
    """
    there = [(text.get_position(), text.get_text()) for text in axes.texts]
    there += [(place, "-.002") for layer in range(1, len(sizes) + 1) for place in _places(sizes, layer)]
    low, high = axes.get_xlim()
    inches = np.array([axes.figure.get_figwidth() / (high - low), UNIT])  # type: ignore[union-attr]
    size = np.array([[0.12 + 0.06 * len(text), 0.19] for text in [*texts, *(text for _, text in there)]])
    way = np.array([[_at(way, share) for share in SHARES] for way, _ in zip(ways, texts, strict=False)]) * inches
    at = np.array([*(places[0] for places in way), *(np.array(place) * inches for place, _ in there)]).reshape(-1, 2)

    def room(index: int, places: np.ndarray) -> np.ndarray:
        gaps = np.abs(places[:, None] - at) / ((size[index] + size) / 2)
        gaps[:, index] = 9
        return gaps.max(2).min(1)

    for _ in range(ROUNDS):
        covered = [index for index in range(len(way)) if room(index, at[[index]]) < 1]
        for index in covered:
            rooms = np.minimum(room(index, way[index]), 1)
            at[index] = way[index][rooms.argmax()]
        if not covered:
            break
    return at[: len(way)] / inches


def _neurons(axes: Axes, sizes: Sequence[int], texts: Mapping[int, Sequence[str]]) -> None:
    """Draw all neurons, with a text in those of the layers in `texts`."""
    for layer in range(1, len(sizes) + 1):
        places = _places(sizes, layer)
        edge = "black" if layer in texts else "0.7"
        x, y = np.transpose(places)
        axes.scatter(x, y, s=600, facecolor="white", edgecolor=edge, zorder=3)
        for place, text in zip(places, texts.get(layer, ()), strict=False):
            axes.text(*place, text, ha="center", va="center", fontsize=7, zorder=4)


def _numbers(values: Any) -> list[str]:
    return [_short(value) for value in array(values)]


def _short(value: float) -> str:
    """Return two digits in at most six characters, which fit into a neuron: .15, -.0042, -4e-5."""
    text = f"{value + 0.0:.2g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"
    return re.sub(r"^(-?)0\.", r"\1.", text.replace("e-0", "e-").replace("e+0", "e"))
