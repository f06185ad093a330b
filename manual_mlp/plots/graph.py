"""Pictures of a small net as a graph: its parameters, and the five steps of one sample through it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from manual_mlp.errors import InputError
from manual_mlp.plots.style import array, new_panels, styled

MAX_DRAWN = 8  # neurons of a layer, and layers, of a net drawn as a graph
MAX_NUMBERS = 12  # on the lines between two layers; more would cover each other
POSITIVE, NEGATIVE = "#B35806", "#542788"  # the ends of PuOr
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
    """Draw one sample's way through a small net, a panel for each step: a^2 … a^L forward, δ^L … δ^2 back, ∂C/∂W.

    The neurons show the numbers that are known by then. The lines show the weights that the step multiplies with; at
    the end they show its result for the whole batch. trace: from `mm.trace`. Raises: InputError as `network`.

    >>> import manual_mlp as mm
    >>> traced = mm.trace(mm.MLP([1, 1, 1]), [0.5], [1.0])
    >>> [axes.get_title().partition(":")[0] for axes in mm.plots.flow(traced).axes]
    ['forward', 'forward', 'backward', 'backward', 'gradients']
    """
    sizes, last = trace.sizes, len(trace.sizes)
    a = {layer: _numbers(value[sample]) for layer, value in trace.a.items()}
    delta = {layer: _numbers(value[sample]) for layer, value in trace.delta.items()}
    figure, panels = _graphs(sizes, 2 * last - 1)
    for axes, layer in zip(panels, range(2, last + 1), strict=False):
        axes.set_title(
            rf"forward: $z^{layer} = W^{layer - 1} a^{layer - 1} + b^{layer - 1}$, $a^{layer} = G(z^{layer})$"
        )
        _lines(axes, sizes, layer - 1, array(trace.weight[layer - 1]), ">")
        _neurons(axes, sizes, {known: a[known] for known in range(1, layer + 1)})
    for axes, layer in zip(panels[last - 1 :], range(last, 1, -1), strict=False):
        incoming = rf"(W^{layer})^T \delta^{layer + 1}" if layer < last else rf"\partial C/\partial a^{layer}"
        axes.set_title(rf"backward: $\delta^{layer} = {incoming} \odot G'(z^{layer})$")
        if layer < last:
            _lines(axes, sizes, layer, array(trace.weight[layer]), "<")
        _neurons(axes, sizes, {known: delta[known] for known in range(layer, last + 1)})
    panels[-1].set_title(r"gradients: $\partial C/\partial W^l = \delta^{l+1} (a^l)^T$")
    for layer, gradient in trace.grad_weight.items():
        _lines(panels[-1], sizes, layer, array(gradient))
    _neurons(panels[-1], sizes, {1: a[1]} | delta)
    return figure


def _graphs(sizes: Sequence[int], number: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, with all neurons empty: neuron i of layer l stands at (l, −i), around 0."""
    if max(len(sizes), *sizes) > MAX_DRAWN:
        raise InputError(
            f"expected at most {MAX_DRAWN} layers of at most {MAX_DRAWN} neurons, to draw them with their numbers, but "
            f"got {'-'.join(map(str, sizes))}; draw a smaller net, or its histograms"
        )
    figure, panels = new_panels(number, 1, 0.7 + 0.5 * max(sizes))
    for axes in panels[:, 0]:
        axes.set_axis_off()
        axes.set(xlim=(0.6, len(sizes) + 0.4), ylim=(-max(sizes) / 2, max(sizes) / 2))
        for layer in range(1, len(sizes)):
            axes.add_collection(LineCollection(_ends(sizes, layer), colors="0.85", linewidths=0.8))
    return figure, list(panels[:, 0])


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
    for index, (begin, end) in enumerate(ends):
        # so that the numbers of lines that leave one neuron stand apart
        share = 0.42 if len(ends) == 1 else 0.28 + 0.14 * (index // sizes[layer - 1] % 3)
        x, y = begin + share * (end - begin)
        if len(ends) <= MAX_NUMBERS:
            axes.text(x, y, _short(weights[index]), ha="center", va="center", fontsize=7, bbox=PAPER)
        if arrow:
            x, y = begin + 0.74 * (end - begin)
            axes.scatter([x], [y], marker=arrow, s=22, color=colors[index], zorder=2)


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
