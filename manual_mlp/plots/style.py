"""The style that all pictures share, and what several of them draw."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manual_mlp.errors import shown

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
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Return the function, drawing in the common style; that of the caller stays as it is."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def new_panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure of the common width and its (rows, columns) axes. height: of a row, in inches."""
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def short_names(class_names: Sequence[str]) -> list[str]:
    """Return names that are short enough for a tick, have a shape for each letter, and are never read as a formula."""
    short = (name if len(name) <= 14 else f"{name[:13]}…" for name in map(shown, class_names))
    return [name.replace("$", r"\$") for name in short]


def array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values)


def by_layer(values: Mapping[int, Any]) -> list[tuple[int, Any]]:
    """Return each l with its colour, from dark to bright, without the pale end that is invisible on paper."""
    return list(zip(sorted(values), matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(values))), strict=True))


def legend_of_layers(figure: Figure, axes: Axes) -> None:
    """Draw the legend of the layers beside the panels, the last layer on top, at most 8 of them."""
    handles, labels = axes.get_legend_handles_labels()
    shown = sorted({round(index) for index in np.linspace(len(labels) - 1, 0, min(8, len(labels)))}, reverse=True)
    figure.legend([handles[index] for index in shown], [labels[index] for index in shown], loc="outside right upper")


def legend_above(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Draw the legend above the panels, where it covers no curve, in as many columns as fit."""
    legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    if columns > 1 and legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        figure.set_figheight(figure.get_figheight() + 0.17 * len(legend.texts) / columns / (columns - 1))
        legend_above(figure, axes, columns - 1)
