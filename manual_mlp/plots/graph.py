"""Pictures of a small net as a graph: its parameters, and the five steps of one sample through it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from manual_mlp.errors import InputError
from manual_mlp.plots.style import STYLE, WIDTH, array, new_panels, styled

MAX_DRAWN = 8  # neurons of a layer, and layers, of a net drawn as a graph
MAX_NUMBERS = 12  # on the lines between two layers; more would cover each other
POSITIVE, NEGATIVE = "#B35806", "#542788"  # the ends of PuOr
UNIT, APART = 0.55, 0.9  # inches from one neuron to the next, from layer to layer
SHARES = sorted(np.linspace(0.26, 0.66, 21), key=lambda share: abs(share - 0.46))  # of a line, for its number
PAPER: Any = {"facecolor": "white", "linewidth": 0, "pad": 0.6}  # behind a number on a line


@styled
def network(trace: Any) -> Figure:
    """Draw the net as a graph: lines with their W, orange if positive, purple if negative; neurons with their b.

    trace: from `mm.trace`. Raises: InputError for a net with more than 8 layers, or with more than 8 neurons in one.

    >>> import manual_mlp as mm
    >>> traced = mm.trace(mm.MLP([1, 1, 1]), [0.5], [1.0])
    >>> "$x_{1}$" in [text.get_text() for text in mm.plots.network(traced).axes[0].texts]
    True
    """
    figure, (axes,) = _graphs(trace.sizes, 1)
    for layer, weight in trace.weight.items():
        _lines(axes, trace.sizes, layer, array(weight))
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
    steps = list(_steps(trace, sample))
    figure, panels = _graphs(trace.sizes, len(steps))
    for axes, step in zip(panels, steps, strict=True):
        _draw(axes, trace.sizes, step)
    return figure


def animation(trace: Any, path: str | PathLike[str], sample: int = 0, seconds: float = 2.0) -> None:
    """Write the panels of `flow` one after another as a GIF, so many seconds each. Raises: InputError as `network`.

    >>> import pathlib, manual_mlp as mm
    >>> mm.plots.animation(mm.trace(mm.MLP([1, 1]), [0.5], [1.0]), "steps.gif")
    >>> pathlib.Path("steps.gif").read_bytes()[:6]
    b'GIF89a'
    """
    steps = list(_steps(trace, sample))
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _graphs(trace.sizes, 1)
        FigureCanvasAgg(figure)

        def show(step: Step) -> list[Artist]:
            axes.clear()
            _empty(axes, trace.sizes)
            _draw(axes, trace.sizes, step)
            return []

        film = FuncAnimation(figure, show, frames=steps, init_func=list, cache_frame_data=False)
        film.save(path, writer=PillowWriter(fps=1 / seconds), dpi=100)


class Step(NamedTuple):
    """A panel: its title, the numbers in the neurons by layer, those on the lines by layer, the lines' arrows."""

    title: str
    neurons: dict[int, list[str]]
    lines: dict[int, Any]
    arrow: str = ""


def _steps(trace: Any, sample: int) -> Iterator[Step]:
    last = len(trace.sizes)
    a = {layer: _numbers(value[sample]) for layer, value in trace.a.items()}
    delta = {layer: _numbers(value[sample]) for layer, value in trace.delta.items()}
    for l in range(2, last + 1):  # noqa: E741 -- the lecture's letter
        title = rf"forward: $z^{l} = W^{l - 1} a^{l - 1} + b^{l - 1}$, $a^{l} = G(z^{l})$"
        yield Step(title, {known: a[known] for known in range(1, l + 1)}, {l - 1: trace.weight[l - 1]}, ">")
    for l in range(last, 1, -1):  # noqa: E741
        incoming = rf"(W^{l})^T \delta^{l + 1}" if l < last else rf"\partial C/\partial a^{l}"
        title = rf"backward: $\delta^{l} = {incoming} \odot G'(z^{l})$"
        known = {known: delta[known] for known in range(l, last + 1)}
        yield Step(title, known, {l: trace.weight[l]} if l < last else {}, "<")
    title = r"gradients: $\partial C/\partial W^l = \delta^{l+1} (a^l)^T$; neurons: $a^1$, then $\delta^l$"
    yield Step(title, {1: a[1]} | delta, trace.grad_weight)
    biases = {layer + 1: _numbers(b) for layer, b in trace.new_bias.items() if b is not None}
    title = r"update: $W^l := W^l - LR \, \partial C/\partial W^l$; neurons: the new $b^l$"
    yield Step(title, biases, trace.new_weight)


def _draw(axes: Axes, sizes: Sequence[int], step: Step) -> None:
    axes.set_title(step.title)
    for layer, weight in step.lines.items():
        _lines(axes, sizes, layer, array(weight), step.arrow)
    _neurons(axes, sizes, step.neurons)


def _graphs(sizes: Sequence[int], number: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, with all neurons empty: neuron i of layer l stands at (l, −i), around 0."""
    if max(len(sizes), *sizes) > MAX_DRAWN:
        raise InputError(
            f"expected at most {MAX_DRAWN} layers of at most {MAX_DRAWN} neurons, to draw them with their numbers, but "
            f"got {'-'.join(map(str, sizes))}; draw a smaller net, or its histograms"
        )
    figure, panels = new_panels(number, 1, 0.7 + UNIT * max(sizes))
    figure.set_figwidth(max(WIDTH, APART * len(sizes)))
    for axes in panels[:, 0]:
        _empty(axes, sizes)
    look = {"positive": POSITIVE, "negative": NEGATIVE}
    handles = [Line2D([], [], color=color, label=f"{sign}, the thicker the larger") for sign, color in look.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7)
    return figure, list(panels[:, 0])


def _empty(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0.6, len(sizes) + 0.4), ylim=(-max(sizes) / 2, max(sizes) / 2))
    for layer in range(1, len(sizes)):
        axes.add_collection(LineCollection(_ends(sizes, layer), colors="0.85", linewidths=0.8))


def _ends(sizes: Sequence[int], layer: int) -> list[np.ndarray]:
    """Return the ends of the lines of W^l, in the order of W^l.ravel(): (2, 2) each."""
    here, there = _places(sizes, layer), _places(sizes, layer + 1)
    return [np.array([begin, end]) for end in there for begin in here]


def _places(sizes: Sequence[int], layer: int) -> list[tuple[float, float]]:
    n = sizes[layer - 1]
    return [(layer, (n - 1) / 2 - index) for index in range(n)]


def _lines(axes: Axes, sizes: Sequence[int], layer: int, weight: np.ndarray, arrow: str = "") -> None:
    """Draw the lines of W^l: coloured by sign, as thick as |W^l|, with arrows, and with numbers if they are few."""
    weights, ends = weight.ravel(), _ends(sizes, layer)
    colors = [POSITIVE if w >= 0 else NEGATIVE for w in weights]
    widths = 0.8 + 2.5 * np.abs(weights) / (np.abs(weights).max() or 1.0)
    axes.add_collection(LineCollection(ends, colors=colors, linewidths=widths))
    texts = [_short(weight) for weight in weights] if len(ends) <= MAX_NUMBERS else []
    for text, (x, y) in zip(texts, _apart(axes, ends, texts), strict=True):
        axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=PAPER)
    for (begin, end), color in zip(ends, colors, strict=True):
        if arrow:
            x, y = begin + 0.74 * (end - begin)
            axes.scatter([x], [y], marker=arrow, s=22, color=color, zorder=2)


def _apart(axes: Axes, ends: Sequence[np.ndarray], texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Yield a place on each line for its text, where it covers none of those before, or as far from them as can be."""
    low, high = axes.get_xlim()
    inches = np.array([axes.figure.get_figwidth() / (high - low), UNIT])
    placed: list[tuple[np.ndarray, float]] = []
    for (begin, end), text in zip(ends, texts, strict=False):
        width = 0.1 + 0.06 * len(text)

        def room(place: np.ndarray, width: float = width) -> float:
            sizes = [((width + other) / 2, 0.17) for _, other in placed]
            gaps = [np.abs(place - at) * inches / size for (at, _), size in zip(placed, sizes, strict=True)]
            return min(map(max, gaps), default=9.0)

        places = [begin + share * (end - begin) for share in SHARES]
        best = next((place for place in places if room(place) >= 1), max(places, key=room))
        placed.append((best, width))
        yield best


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
