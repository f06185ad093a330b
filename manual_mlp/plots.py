"""Draw a net and its training. Each function returns a matplotlib Figure, for the caller to show or save.

All have one style. Its colours differ for the colour-blind and on a black and white printer: Okabe and Ito's for parts
and classes, each with a marker or dash of its own; viridis for layers; purple to orange for signs. A phone shows its
width without shrinking the text.
"""

import csv
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from manual_mlp.errors import InputError, shown

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = "o^sDvPX*"
PARTS = {"train": {"color": COLORS[0]}, "val": {"color": COLORS[1], "linestyle": "--"}}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "savefig.dpi": 150,
}
WIDTH = 4.2  # inches
MAX_NEURONS = 64  # with their weights shown as images
MAX_DRAWN = 8  # neurons of a layer, and layers, of a net drawn as a graph
MAX_NUMBERS = 12  # on the lines between two layers; more would cover each other
POSITIVE, NEGATIVE = "#B35806", "#542788"  # the ends of PuOr
PAPER: Any = {"facecolor": "white", "linewidth": 0, "pad": 0.6}  # behind a number on a line
MAX_LINES = 8  # as many as a legend explains
MAX_TICKS = 8  # as many places as can be labelled one by one
Predict = Callable[[np.ndarray], np.ndarray]
P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def _panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure of the common width and its (rows, columns) axes. height: of a row, in inches."""
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# How the training went
# ---------------------------------------------------------------------------------------------------------------------


@_styled
def learning_curves(metrics_csv: str | Path) -> Figure:
    """Draw loss and further figures against the epoch, train and val together, one panel each.

    metrics_csv: rows with a column `epoch` and columns such as train_loss, val_loss, val_accuracy; a cell may be empty.
    Raises: InputError if there is nothing to draw.
    """
    curves = _read(Path(metrics_csv))
    kinds = sorted({name.partition("_")[2] for name in curves}, key=lambda kind: (kind != "loss", kind))
    if not kinds:
        raise InputError(
            f"expected columns such as train_loss and val_loss in {metrics_csv}, but there are none; train first"
        )
    figure, panels = _panels(len(kinds), 1, 2.4, sharex=True)
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        for part, look in PARTS.items():
            points = curves.get(f"{part}_{kind}", {})
            if points:
                marker = "." if len(points) < 40 else ""
                axes.plot(list(points), list(points.values()), label=part, marker=marker, **look)
        axes.set(ylabel=kind)
        axes.legend()
    panels[-1, 0].set(xlabel="epoch")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _read(path: Path) -> dict[str, dict[int, float]]:
    """Return {name: {epoch: value}} for the columns of train and val."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and str(name).partition("_")[0] in PARTS:
                    try:
                        curves[name][int(row["epoch"])] = float(cell)
                    except (KeyError, TypeError, ValueError) as error:
                        raise InputError(f"expected numbers in {path}, and a column epoch, but got {error}") from error
    return curves


@_styled
def delta_flow(epochs: Sequence[float], norms: Mapping[int, Sequence[float]]) -> Figure:
    """Draw ‖δ^l‖ of each layer over the training, on a logarithmic scale: if the gradient vanishes, the lines part.

    epochs: the times of measuring. norms: {l: the norm each time}; a norm of 0 (dead neurons) leaves a gap.
    """
    figure, panels = _panels(1, 1, 3.0)
    axes = panels[0, 0]
    for layer, color in _by_layer(norms):
        values = np.asarray(norms[layer], dtype=float)
        axes.semilogy(epochs, np.where(values > 0, values, np.nan), color=color, label=rf"$\delta^{{{layer}}}$")
    axes.set(xlabel="epoch", ylabel=r"$\|\delta^l\|$ of a sample")
    _legend_of_layers(figure, axes)
    return figure


@_styled
def delta_by_layer(norms: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw ‖δ^l‖ against l, on a logarithmic scale, a line for each net. norms: {label: {l: norm}}."""
    figure, panels = _panels(1, 1, 3.2)
    axes = panels[0, 0]
    for index, (label, layers) in enumerate(norms.items()):
        axes.semilogy(list(layers), list(layers.values()), label=label, marker=MARKERS[index % len(MARKERS)])
    axes.set(xlabel="layer $l$", ylabel=r"$\|\delta^l\|$ of a sample")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


@_styled
def histograms(stages: Mapping[str, Any]) -> Figure:
    """Draw the distributions of z, a and |δ| in each layer, a column for each stage, {"before": …, "after": …}.

    Each stage has `.z`, `.a` and `.delta`, {l: array} each, as `mm.trace` gives. |δ| is on a logarithmic scale.
    """
    figure, panels = _panels(3, len(stages), 1.6, sharex="row")
    for (name, stage), column in zip(stages.items(), panels.T, strict=True):
        column[0].set(title=name)
        for axes, letter in zip(column, ("z", "a", "delta"), strict=True):
            axes.set(xlabel=r"$|\delta|$" if letter == "delta" else f"${letter}$", yticks=[])
            values = {layer: _array(value).ravel() for layer, value in getattr(stage, letter).items()}
            if letter == "delta":
                axes.set(xscale="log")
                values = {layer: np.abs(value[value != 0]) for layer, value in values.items()}
            elif letter == "a":
                values.pop(1, None)  # the input belongs to no neuron
            for layer, color in _by_layer(values):
                _steps(axes, values[layer], letter == "delta", color=color, label=f"$l = {layer}$")
    _legend_of_layers(figure, panels[0, -1])
    return figure


def _steps(axes: Axes, values: np.ndarray, logarithmic: bool, **look: Any) -> None:
    """Draw the outline of a histogram, its highest bin at 1."""
    if not len(values):
        return
    scaled = np.log10(values) if logarithmic else values
    counts, edges = np.histogram(scaled, bins=min(40, max(5, int(len(values) ** 0.5))))
    axes.stairs(counts / counts.max(), 10**edges if logarithmic else edges, linewidth=1.2, **look)


def _by_layer(values: Mapping[int, Any]) -> list[tuple[int, Any]]:
    """Return each l with its colour, from dark to bright, without the pale end that is invisible on paper."""
    return list(zip(sorted(values), matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(values))), strict=True))


def _legend_of_layers(figure: Figure, axes: Axes) -> None:
    """Draw the legend of the layers beside the panels, the last layer on top, at most 8 of them."""
    handles, labels = axes.get_legend_handles_labels()
    shown = sorted({round(index) for index in np.linspace(len(labels) - 1, 0, min(8, len(labels)))}, reverse=True)
    figure.legend([handles[index] for index in shown], [labels[index] for index in shown], loc="outside right upper")


# ---------------------------------------------------------------------------------------------------------------------
# What the net answers
# ---------------------------------------------------------------------------------------------------------------------


@_styled
def confusion_matrix(target: np.ndarray, prediction: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw how often each class (row) was answered with each (column). target, prediction (N,): class indices."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # type: ignore[import-untyped]

    n = len(class_names)
    counts = confusion_matrix(target, prediction, labels=range(n))
    figure, panels = _panels(1, 1, 4.2)
    axes = panels[0, 0]
    axes.grid(False)
    ConfusionMatrixDisplay(counts, display_labels=_names(class_names)).plot(
        ax=axes,
        cmap="Blues",
        colorbar=False,
        include_values=n <= 20,
        xticks_rotation="vertical" if max(map(len, class_names)) > 3 else "horizontal",
        text_kw={"fontsize": 9 if n <= 10 else 6},
    )
    axes.set(xlabel="prediction", ylabel="target")
    return figure


@_styled
def worst_mistakes(
    images: np.ndarray, target: np.ndarray, scores: np.ndarray, class_names: Sequence[str], most: int = 12
) -> Figure:
    """Draw the wrongly answered images, the worst first: the true class had a much lower score than the answer.

    images (N, height, width), target (N,) class indices, scores (N, classes): the highest is the answer.
    Raises: InputError if every answer is right.
    """
    prediction = scores.argmax(1)
    rows = np.arange(len(target))
    behind = scores[rows, prediction] - scores[rows, target]
    worst = [row for row in np.argsort(-behind, kind="stable") if prediction[row] != target[row]][:most]
    if not worst:
        raise InputError("expected at least one mistake to draw, but every answer is right; draw something else")
    names, columns = _names(class_names), 4
    figure, axes = _tiles(len(worst), columns, 1.35)
    for place, row in enumerate(worst):
        x, y = place % columns, place // columns * 1.35
        axes.imshow(images[row], cmap="Greys", extent=(x, x + 0.94, y + 1.3, y + 0.36))
        axes.text(x, y + 0.32, f"{names[prediction[row]]}\nis {names[target[row]]}", fontsize=8)
    return figure


@_styled
def first_layer_weights(weight: np.ndarray, image_shape: Sequence[int] = ()) -> Figure:
    """Draw W^1 (n_2, n_1): for each neuron an image of `image_shape`, or all of it as one table of colours.

    Orange is positive, purple negative, white 0. At most the first 64 neurons are shown.
    """
    weight = weight[:MAX_NEURONS]
    if not image_shape:
        figure, panels = _panels(1, 1, min(6.0, 1.2 + 0.12 * len(weight)))
        axes, tiles = panels[0, 0], weight
        axes.set(xlabel="feature", ylabel="neuron")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(False)
    else:
        columns = min(8, int(np.ceil(len(weight) ** 0.5)))
        height, width = image_shape
        figure, axes = _tiles(len(weight), columns, (height + 1) / (width + 1))
        tiles = np.full((-(-len(weight) // columns) * (height + 1), columns * (width + 1)), np.nan)
        for index, row in enumerate(weight):
            top, left = index // columns * (height + 1), index % columns * (width + 1)
            tiles[top : top + height, left : left + width] = row.reshape(height, width)
    limit = np.abs(weight).max() or 1.0
    place = {"extent": (*axes.get_xlim(), *axes.get_ylim())} if image_shape else {"aspect": "auto"}
    image = axes.imshow(tiles, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest", **place)
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    return figure


@_styled
def decision_boundary(
    stages: Mapping[str, Predict], features: np.ndarray, target: np.ndarray, class_names: Sequence[str]
) -> Figure:
    """Draw the net's answer at each place of the plane, and the samples; one panel for each stage of training.

    stages: {title: predict}, predict (M, 2) ↦ class indices (M,). features (N, 2), target (N,) class indices.
    """
    low, high = features.min(0), features.max(0)
    margin = 0.1 * (high - low)
    lines = [np.linspace(*limits, 150) for limits in zip(low - margin, high + margin, strict=True)]
    plane = np.stack(np.meshgrid(*lines), -1)
    columns = min(2, len(stages))
    rows = -(-len(stages) // columns)
    figure, panels = _panels(rows, columns, (3.4 if columns == 1 else 1.5) + 0.8 / rows, sharex=True, sharey=True)
    n = len(class_names)
    colors = [COLORS[index % len(COLORS)] for index in range(n)]
    for axes in panels.ravel()[len(stages) :]:
        axes.set_visible(False)
        panels[-2, -1].tick_params(labelbottom=True)
    for axes, (title, predict) in zip(panels.ravel(), stages.items(), strict=False):
        # scikit-learn's DecisionBoundaryDisplay wants an estimator; its constructor changes from version to version
        answer = predict(plane.reshape(-1, 2)).reshape(plane.shape[:2])
        axes.contourf(*lines, answer, levels=np.arange(n + 1) - 0.5, cmap=ListedColormap(colors), alpha=0.25)
        for index, name in enumerate(_names(class_names)):
            points, marker = features[target == index], MARKERS[index % len(MARKERS)]
            axes.scatter(*points.T, s=7, color=colors[index], marker=marker, linewidths=0, label=name)
        axes.set(title=title)
        axes.grid(False)
    figure.supxlabel("$x_1$", fontsize=9)
    figure.supylabel("$x_2$", fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(n, 4))
    return figure


@_styled
def fitted_curve(stages: Mapping[str, Predict], x: np.ndarray, target: np.ndarray) -> Figure:
    """Draw the net's answer along its one input, a line for each stage, the last one strongest, over the samples.

    stages: {label: predict}, predict (M, 1) ↦ (M,). x (N,), target (N,).
    """
    figure, panels = _panels(1, 1, 3.2)
    axes = panels[0, 0]
    axes.scatter(x, target, s=7, color="0.6", linewidths=0, label="samples")
    line = np.linspace(x.min(), x.max(), 400)
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, len(stages))) if len(stages) > 1 else COLORS[:1]
    for (label, predict), color in zip(stages.items(), shades, strict=True):
        axes.plot(line, predict(line[:, None]), color=color, label=label)
    axes.get_lines()[-1].set_linewidth(2.5)
    axes.set(xlabel="$x$", ylabel="$y$")
    axes.legend()
    return figure


@_styled
def predicted_against_true(target: np.ndarray, prediction: np.ndarray) -> Figure:
    """Draw each sample of a regression at (prediction, target); on the line the net is right. Both (N,)."""
    from sklearn.metrics import PredictionErrorDisplay

    figure, panels = _panels(1, 1, 3.6)
    look = {"s": 10, "color": COLORS[0], "alpha": 0.6, "linewidths": 0}
    PredictionErrorDisplay(y_true=target, y_pred=prediction).plot(
        panels[0, 0], kind="actual_vs_predicted", scatter_kwargs=look
    )
    panels[0, 0].set(xlabel="prediction", ylabel="target")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# A small net as a graph
# ---------------------------------------------------------------------------------------------------------------------


@_styled
def network(trace: Any) -> Figure:
    """Draw the net as a graph: lines with their W, orange if positive, purple if negative; neurons with their b.

    trace: from `mm.trace`. Raises: InputError for a net with more than 8 layers, or with more than 8 neurons in one.
    """
    figure, (axes,) = _graphs(trace.sizes, 1)
    for layer, weight in trace.weight.items():
        _lines(axes, trace.sizes, layer, _array(weight))
    inputs = {1: [f"$x_{{{index + 1}}}$" for index in range(trace.sizes[0])]}
    _neurons(axes, trace.sizes, inputs | {layer + 1: _numbers(b) for layer, b in trace.bias.items() if b is not None})
    return figure


@_styled
def flow(trace: Any, sample: int = 0) -> Figure:
    """Draw one sample's way through a small net, a panel for each step: a^2 … a^L forward, δ^L … δ^2 back, ∂C/∂W.

    The neurons show the numbers that are known by then. The lines show the weights that the step multiplies with; at
    the end they show its result for the whole batch. trace: from `mm.trace`. Raises: InputError as `network`.
    """
    sizes, last = trace.sizes, len(trace.sizes)
    a = {layer: _numbers(value[sample]) for layer, value in trace.a.items()}
    delta = {layer: _numbers(value[sample]) for layer, value in trace.delta.items()}
    figure, panels = _graphs(sizes, 2 * last - 1)
    for axes, layer in zip(panels, range(2, last + 1), strict=False):
        axes.set_title(
            rf"forward: $z^{layer} = W^{layer - 1} a^{layer - 1} + b^{layer - 1}$, $a^{layer} = G(z^{layer})$"
        )
        _lines(axes, sizes, layer - 1, _array(trace.weight[layer - 1]), ">")
        _neurons(axes, sizes, {known: a[known] for known in range(1, layer + 1)})
    for axes, layer in zip(panels[last - 1 :], range(last, 1, -1), strict=False):
        incoming = rf"(W^{layer})^T \delta^{layer + 1}" if layer < last else rf"\partial C/\partial a^{layer}"
        axes.set_title(rf"backward: $\delta^{layer} = {incoming} \odot G'(z^{layer})$")
        if layer < last:
            _lines(axes, sizes, layer, _array(trace.weight[layer]), "<")
        _neurons(axes, sizes, {known: delta[known] for known in range(layer, last + 1)})
    panels[-1].set_title(r"gradients: $\partial C/\partial W^l = \delta^{l+1} (a^l)^T$")
    for layer, gradient in trace.grad_weight.items():
        _lines(panels[-1], sizes, layer, _array(gradient))
    _neurons(panels[-1], sizes, {1: a[1]} | delta)
    return figure


def _graphs(sizes: Sequence[int], number: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, with all neurons empty: neuron i of layer l stands at (l, −i), around 0."""
    if max(len(sizes), *sizes) > MAX_DRAWN:
        raise InputError(
            f"expected at most {MAX_DRAWN} layers of at most {MAX_DRAWN} neurons, to draw them with their numbers, but "
            f"got {'-'.join(map(str, sizes))}; draw a smaller net, or its histograms"
        )
    figure, panels = _panels(number, 1, 0.7 + 0.5 * max(sizes))
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
    return [_short(value) for value in _array(values)]


def _short(value: float) -> str:
    """Return two digits in at most six characters, which fit into a neuron: .15, -.0042, -4e-5."""
    text = f"{value + 0.0:.2g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"
    return re.sub(r"^(-?)0\.", r"\1.", text.replace("e-0", "e-").replace("e+0", "e"))


def _tiles(number: int, columns: int, height: float) -> tuple[Figure, Axes]:
    """Return a figure for tiles of width 1 and the given height. They share one pair of axes: faster than many."""
    rows = -(-number // columns)
    figure, panels = _panels(1, 1, max(1.2, rows * height * WIDTH / columns))
    axes = panels[0, 0]
    axes.set_axis_off()
    axes.set(xlim=(0, columns), ylim=(rows * height, 0))
    return figure, axes


def _names(class_names: Sequence[str]) -> list[str]:
    """Return names that are short enough for a tick, have a shape for each letter, and are never read as a formula."""
    short = (name if len(name) <= 14 else f"{name[:13]}…" for name in map(shown, class_names))
    return [name.replace("$", r"\$") for name in short]


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values)


# ---------------------------------------------------------------------------------------------------------------------
# What a sweep compares
# ---------------------------------------------------------------------------------------------------------------------


@_styled
def sweep_figure(sweep_csv: str | Path, settings: Sequence[str], metric: str, best: str = "") -> Figure:
    """Draw the figure `metric` of each run of a sweep against the settings that were swept.

    If one number was swept: train, val and `metric` (the validation curve). If a number and other settings: a line for
    each combination of these. If they are more than a legend explains: a panel for each setting. If nothing numeric was
    swept: bars. Runs that differ in the seed alone are drawn as their mean, with a band from least to greatest.

    sweep_csv: a row for each run, with the columns `run`, the settings, and figures such as val_loss, or empty cells.
    settings: the names of the settings. best: the run to mark.
    Raises: InputError if no run has the figure.
    """
    with Path(sweep_csv).open(newline="") as file:
        runs = [row for row in csv.DictReader(file) if row.get(metric)]
    if not runs:
        raise InputError(f"expected runs with {metric} in {sweep_csv}, but there are none; sweep again")
    places = {name: _positions([run[name] for run in runs]) for name in settings}
    x = max(settings, key=lambda name: (bool(places[name]), name != "seed", len(set(places[name]))))
    if not places[x]:
        return _bars(runs, settings, metric, best)
    others = [name for name in settings if name not in (x, "seed")]
    labels = [", ".join(f"{_end(name)} {run[name]}" for name in others) for run in runs]
    panels = [x] if len(set(labels)) <= MAX_LINES else settings
    figure, rows = _panels(len(panels), 1, 3.2 if len(panels) == 1 else 2.4, sharey=True)
    for axes, name in zip(rows[:, 0], panels, strict=True):
        at: Sequence = places[name] or [run[name] for run in runs]
        if len(panels) > 1:
            axes.plot(at, [float(run[metric]) for run in runs], "o", alpha=0.6)
        elif others:
            for label in dict.fromkeys(labels):
                own = [index for index, other in enumerate(labels) if other == label]
                _curve(axes, [at[index] for index in own], [runs[index][metric] for index in own], label)
        else:
            for column in dict.fromkeys([*(f"{part}_{metric.partition('_')[2]}" for part in PARTS), metric]):
                _curve(axes, at, [run.get(column, "") for run in runs], column)
        for place, run in zip(at, runs, strict=True):
            if run["run"] == best:
                axes.plot(place, float(run[metric]), "k*", markersize=11, label=f"best, run {best}", zorder=3)
        lengths = any("," in run[name] for run in runs) and places[name]
        axes.set(xlabel=f"length of {name}" if lengths else name, ylabel=metric if others else metric.partition("_")[2])
        if places[name] and _even_in_logarithm(places[name]):
            axes.set_xscale("log")
        if places[name] and len(set(places[name])) <= MAX_TICKS:
            axes.set_xticks(sorted(set(places[name])), [f"{place:g}" for place in sorted(set(places[name]))])
            axes.minorticks_off()
    if len(panels) == 1:
        axes.legend()
    return figure


def _curve(axes: Axes, at: Sequence[float], cells: Sequence[str], label: str) -> None:
    """Draw a line through the means at each place and a band from least to greatest; nothing without a filled cell."""
    values: dict[float, list[float]] = defaultdict(list)
    for place, cell in zip(at, cells, strict=True):
        if cell:
            values[place].append(float(cell))
    if values:
        x = sorted(values)
        marker = MARKERS[len(axes.get_lines()) % len(MARKERS)] if len(x) < 40 else ""
        (line,) = axes.plot(x, [fmean(values[place]) for place in x], marker=marker, markersize=4, label=label)
        least, greatest = ([edge(values[place]) for place in x] for edge in (min, max))
        axes.fill_between(x, least, greatest, color=line.get_color(), alpha=0.2, linewidth=0)


def _bars(runs: Sequence[dict[str, str]], settings: Sequence[str], metric: str, best: str) -> Figure:
    figure, ((axes,),) = _panels(1, 1, 1.0 + 0.25 * len(runs))
    labels = [", ".join(run[name] for name in settings) + f" ({run['run']})" for run in runs]
    colors = [COLORS[run["run"] == best] for run in runs]
    bars = axes.barh(labels, [float(run[metric]) for run in runs], color=colors)
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(xlabel=metric, ylabel=", ".join(map(_end, settings)) + " (run)")
    return figure


def _end(name: str) -> str:
    """Return lr for optimizer.lr."""
    return name.rpartition(".")[2]


def _positions(values: Sequence[str]) -> list[float]:
    """Return places on an axis: 3 at 3, [16] at 16, lists of different lengths at their length; [] if none."""
    lists = [[cell for cell in value.strip("[]").split(",") if cell] for value in values]
    if len({len(cells) for cells in lists}) == len(set(values)) > 1:
        return [float(len(cells)) for cells in lists]
    try:
        numbers = [float(cell) for (cell,) in lists]
    except ValueError:
        return []
    return numbers if all(map(isfinite, numbers)) else []


def _even_in_logarithm(values: Sequence[float]) -> bool:
    """Return True if the middle value is nearer to the geometric mean of the ends than to the arithmetic one."""
    least, middle, greatest = min(values), median(sorted(set(values))), max(values)
    return least > 0 and abs(middle - sqrt(least * greatest)) < abs(middle - (least + greatest) / 2)
