"""Pictures that compare the runs of a sweep."""

import csv
from collections.abc import Sequence
from math import isfinite, sqrt
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from manual_mlp.errors import InputError
from manual_mlp.plots.style import COLORS, MARKERS, PARTS, new_panels, short_names, styled
from manual_mlp.tables import words

MAX_TICKS = 8  # as many places as can be labelled one by one
HIGHEST = 40.0  # inches


@styled
def sweep_figure(sweep_csv: str | Path, settings: Sequence[str], metric: str, best: str = "") -> Figure:
    r"""Draw the figure `metric` of each run of a sweep against the settings that were swept.

    One number gives a curve: of train, val and `metric` (the validation curve). Any other setting, or several of them,
    give a bar for each run.

    sweep_csv: a row for each run, with the columns `run`, the settings, and figures such as val_loss, or empty cells.
    settings: the names of the settings. best: the run to mark.
    Raises: InputError if no run has the figure.

    >>> import manual_mlp as mm
    >>> with open("sweep.csv", "w") as file:
    ...     _ = file.write("run,optimizer.lr,val_loss\n0,0.1,0.5\n1,1.0,0.2\n")
    >>> mm.plots.sweep_figure("sweep.csv", ["optimizer.lr"], "val_loss", best="1").axes[0].get_xlabel()
    'optimizer.lr'
    """
    with Path(sweep_csv).open(newline="") as file:
        runs = [row for row in csv.DictReader(file) if row.get(metric)]
    if not runs:
        raise InputError(f"expected runs with {metric} in {sweep_csv}, but there are none; sweep again")
    places = _numbers([run[settings[0]] for run in runs]) if len(settings) == 1 else []
    if not places:
        return _bars(runs, settings, metric, best)
    figure, ((axes,),) = new_panels(1, 1, 3.2)
    columns = dict.fromkeys([*(f"{part}_{metric.partition('_')[2]}" for part in PARTS), metric])
    for column, marker in zip(columns, MARKERS, strict=False):
        points = sorted((place, float(run[column])) for place, run in zip(places, runs, strict=True) if run.get(column))
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=words(column))
    for place, run in zip(places, runs, strict=True):
        if run["run"] == best:
            axes.plot(place, float(run[metric]), "k*", markersize=11, label=f"best, run {best}", zorder=3)
    axes.set(xlabel=settings[0], ylabel=words(metric.partition("_")[2]))
    distinct = sorted({*places})
    if _even_in_logarithm(distinct):
        axes.set_xscale("log")
    if len(distinct) <= MAX_TICKS:
        axes.set_xticks(distinct, [f"{place:g}" for place in distinct])
        axes.minorticks_off()
    axes.legend()
    return figure


def _bars(runs: Sequence[dict[str, str]], settings: Sequence[str], metric: str, best: str) -> Figure:
    figure, ((axes,),) = new_panels(1, 1, min(HIGHEST, 1.0 + 0.25 * len(runs)))
    labels = [", ".join(short_names([run[name] for name in settings])) + f" ({run['run']})" for run in runs]
    colors = [COLORS[run["run"] == best] for run in runs]
    bars = axes.barh(labels, [float(run[metric]) for run in runs], color=colors)
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.margins(x=0.15, y=0.02)
    axes.invert_yaxis()
    axes.set(xlabel=words(metric))
    names = [name.rpartition(".")[2] for name in settings]
    figure.suptitle(", ".join(names) + " (run)", fontsize=9)  # at the side it would not fit
    return figure


def _numbers(cells: Sequence[str]) -> list[float]:
    """Return the places on an axis: 3 at 3, [16] at 16; none unless all cells are such."""
    try:
        numbers = [float(cell.removeprefix("[").removesuffix("]")) for cell in cells]
    except ValueError:
        return []
    return numbers if all(map(isfinite, numbers)) else []


def _even_in_logarithm(values: Sequence[float]) -> bool:
    """Return True if the middle value is nearer to the geometric mean of the ends than to the arithmetic one."""
    least, middle, greatest = values[0], median(values), values[-1]
    return least > 0 and abs(middle - sqrt(least * greatest)) < abs(middle - (least + greatest) / 2)
