"""Pictures that compare the runs of a sweep."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manual_mlp.errors import InputError
from manual_mlp.plots.style import COLORS, MARKERS, PARTS, new_panels, styled
from manual_mlp.tables import words

MAX_LINES = 8  # as many as a legend explains
MAX_TICKS = 8  # as many places as can be labelled one by one


@styled
def sweep_figure(sweep_csv: str | Path, settings: Sequence[str], metric: str, best: str = "") -> Figure:
    r"""Draw the figure `metric` of each run of a sweep against the settings that were swept.

    If one number was swept: train, val and `metric` (the validation curve). If a number and other settings: a line for
    each combination of these. If they are more than a legend explains: a panel for each setting. If nothing numeric was
    swept: bars. Runs that differ in the seed alone are drawn as their mean, with a band from least to greatest.

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
    places = {name: _positions([run[name] for run in runs]) for name in settings}
    x = max(settings, key=lambda name: (bool(places[name]), name != "seed", len(set(places[name]))))
    if not places[x]:
        return _bars(runs, settings, metric, best)
    others = [name for name in settings if name not in (x, "seed")]
    labels = [", ".join(f"{_end(name)} {run[name]}" for name in others) for run in runs]
    panels = [x] if len(set(labels)) <= MAX_LINES else settings
    figure, rows = new_panels(len(panels), 1, 3.2 if len(panels) == 1 else 2.4, sharey=True)
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
                _curve(axes, at, [run.get(column, "") for run in runs], words(column))
        for place, run in zip(at, runs, strict=True):
            if run["run"] == best:
                axes.plot(place, float(run[metric]), "k*", markersize=11, label=f"best, run {best}", zorder=3)
        lengths = any("," in run[name] for run in runs) and places[name]
        y = words(metric if others else metric.partition("_")[2])
        axes.set(xlabel=f"length of {name}" if lengths else name, ylabel=y)
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
    figure, ((axes,),) = new_panels(1, 1, 1.0 + 0.25 * len(runs))
    labels = [", ".join(run[name] for name in settings) + f" ({run['run']})" for run in runs]
    colors = [COLORS[run["run"] == best] for run in runs]
    bars = axes.barh(labels, [float(run[metric]) for run in runs], color=colors)
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(xlabel=words(metric))
    figure.suptitle(", ".join(map(_end, settings)) + " (run)", fontsize=9)  # at the side it would not fit
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
