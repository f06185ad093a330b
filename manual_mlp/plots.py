"""Pictures of training. Each function returns a matplotlib Figure and leaves showing or saving it to the caller."""

import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from manual_mlp.errors import InputError

PARTS = {"train": "C0", "val": "C1"}


def learning_curves(metrics_csv: str | Path) -> Figure:
    """Loss and further figures against the epoch, train and val together, one panel each.

    metrics_csv: rows with a column `epoch` and columns such as train_loss, val_loss, val_accuracy; a cell may be empty.
    Raises: InputError if there is nothing to draw.
    """
    curves = _read(Path(metrics_csv))
    kinds = sorted({name.partition("_")[2] for name in curves}, key=lambda kind: (kind != "loss", kind))
    if not kinds:
        raise InputError(
            f"expected columns such as train_loss and val_loss in {metrics_csv}, but there are none; train first"
        )
    figure = Figure(figsize=(5 * len(kinds), 3.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for part, color in PARTS.items():
            points = curves.get(f"{part}_{kind}", {})
            if points:
                axes.plot(
                    points.keys(), points.values(), color=color, label=part, marker="." if len(points) < 40 else ""
                )
        axes.set(xlabel="epoch", ylabel=kind)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _read(path: Path) -> dict[str, dict[int, float]]:
    """{name: {epoch: value}} for the columns of train and val."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name.partition("_")[0] in PARTS:
                    curves[name][int(row["epoch"])] = float(cell)
    return curves
