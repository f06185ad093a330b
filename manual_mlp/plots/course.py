"""Pictures of the course of a training: its curves, the δ of each layer, distributions."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from manual_mlp.errors import InputError
from manual_mlp.plots.style import MARKERS, PARTS, array, by_layer, legend_above, legend_of_layers, new_panels, styled
from manual_mlp.tables import words


@styled
def learning_curves(metrics_csv: str | Path, kept: int | None = None) -> Figure:
    r"""Draw the cost and further figures against the epoch, train and val together, one panel each.

    metrics_csv: rows with a column `epoch` and columns such as train_loss, val_loss, val_accuracy; a cell may be empty.
    kept: the epoch whose parameters are kept, to mark it. rmse is left out beside r2, which draws the same curve.
    Raises: InputError if there is nothing to draw.

    >>> import manual_mlp as mm
    >>> with open("metrics.csv", "w") as file:
    ...     _ = file.write("epoch,train_loss,val_loss\n0,0.9,1.0\n1,0.5,0.7\n")
    >>> [line.get_label() for line in mm.plots.learning_curves("metrics.csv").axes[0].get_lines()]
    ['train', 'val']
    """
    curves = _read(Path(metrics_csv))
    kinds = sorted({name.partition("_")[2] for name in curves}, key=lambda kind: (kind != "loss", kind))
    kinds = [kind for kind in kinds if kind != "rmse" or "r2" not in kinds]
    if not kinds:
        raise InputError(
            f"expected columns such as train_loss and val_loss in {metrics_csv}, but there are none; train first"
        )
    figure, panels = new_panels(len(kinds), 1, 2.4, sharex=True)
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        for part, look in PARTS.items():
            points = curves.get(f"{part}_{kind}", {})
            if points:
                marker = "." if len(points) < 40 else ""
                axes.plot(list(points), list(points.values()), label=part, marker=marker, **look)
        if kept is not None:
            axes.axvline(kept, color="0.4", linestyle=":", linewidth=1, label=f"kept, epoch {kept}")
        axes.set(ylabel=words(kind))
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


@styled
def delta_flow(epochs: Sequence[float], norms: Mapping[int, Sequence[float]]) -> Figure:
    """Draw ‖δ^l‖ of each layer over the training, on a logarithmic scale: if the gradient vanishes, the lines part.

    epochs: the times of measuring. norms: {l: the norm each time}; a norm of 0 (dead neurons) leaves a gap.

    >>> import manual_mlp as mm
    >>> figure = mm.plots.delta_flow([0, 1, 2], {2: [1e-3, 2e-3, 4e-3], 3: [0.5, 0.4, 0.3]})
    >>> figure.axes[0].get_yscale(), figure.axes[0].get_xlabel()
    ('log', 'epoch')
    """
    figure, panels = new_panels(1, 1, 3.0)
    axes = panels[0, 0]
    for layer, color in by_layer(norms):
        values = np.asarray(norms[layer], dtype=float)
        axes.semilogy(epochs, np.where(values > 0, values, np.nan), color=color, label=rf"$\delta^{{{layer}}}$")
    axes.set(xlabel="epoch", ylabel=r"$\|\delta^l\|$ of a sample")
    legend_of_layers(figure, axes)
    return figure


@styled
def delta_by_layer(norms: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw ‖δ^l‖ against l, on a logarithmic scale, a line for each net. norms: {label: {l: norm}}.

    >>> import manual_mlp as mm
    >>> figure = mm.plots.delta_by_layer({"sigmoid": {2: 1e-4, 3: 1e-2}, "relu": {2: 0.1, 3: 0.2}})
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['sigmoid', 'relu']
    """
    figure, panels = new_panels(1, 1, 2.8 + 0.1 * len(norms))
    axes = panels[0, 0]
    for index, (label, layers) in enumerate(norms.items()):
        every = -(-len(layers) // 20)  # more marks would hide the lines
        marker = MARKERS[index % len(MARKERS)]
        axes.semilogy(list(layers), list(layers.values()), label=label, marker=marker, markevery=every)
    axes.set(xlabel="layer $l$", ylabel=r"$\|\delta^l\|$ of a sample")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, axes)
    return figure


@styled
def histograms(stages: Mapping[str, Any]) -> Figure:
    r"""Draw the distributions of z, a and |δ| in each layer, a column for each stage, {"before": …, "after": …}.

    Each stage has `.z`, `.a` and `.delta`, {l: array} each, as `mm.trace` gives. |δ| is on a logarithmic scale.

    >>> import torch, manual_mlp as mm
    >>> traced = mm.trace(mm.MLP([2, 3, 1]), torch.randn(50, 2), torch.zeros(50, 1))
    >>> [axes.get_xlabel() for axes in mm.plots.histograms({"before": traced}).axes]
    ['$z$', '$a$', '$|\\delta|$']
    """
    figure, panels = new_panels(3, len(stages), 1.6, sharex="row")
    figure.set_layout_engine("constrained", w_pad=0.1)  # or the labels 10⁻² and 10⁻¹⁰ of two panels touch
    for (name, stage), column in zip(stages.items(), panels.T, strict=True):
        column[0].set(title=name)
        for axes, letter in zip(column, ("z", "a", "delta"), strict=True):
            axes.set(xlabel=r"$|\delta|$" if letter == "delta" else f"${letter}$", yticks=[])
            values = {layer: array(value).ravel() for layer, value in getattr(stage, letter).items()}
            if letter == "delta":
                axes.set(xscale="log")
                values = {layer: np.abs(value[value != 0]) for layer, value in values.items()}
            elif letter == "a":
                values.pop(1, None)  # the input belongs to no neuron
            for layer, color in by_layer(values):
                _outline(axes, values[layer], letter == "delta", color=color, label=f"$l = {layer}$")
    legend_of_layers(figure, panels[0, -1])
    return figure


def _outline(axes: Axes, values: np.ndarray, logarithmic: bool, **look: Any) -> None:
    """Draw the outline of a histogram, its highest bin at 1."""
    if not len(values):
        return
    scaled = np.log10(values) if logarithmic else values
    counts, edges = np.histogram(scaled, bins=min(40, max(5, int(len(values) ** 0.5))))
    axes.stairs(counts / counts.max(), 10**edges if logarithmic else edges, linewidth=1.2, **look)
