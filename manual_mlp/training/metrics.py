"""Write metrics.csv: a row for each epoch, however often Lightning logs in it."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

ORDER = ("epoch", "step", "train", "val", "test")  # of the columns, by the first word of their names


class EpochRows(CSVLogger):
    """Lightning's CSVLogger with one row for each epoch. A figure that comes a second time in it begins another row."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = Writer(self.log_dir)
        return self._experiment


class Writer(ExperimentWriter):
    """The writer of the file.

    kept: once the training is over, the epoch whose parameters are kept. What is measured with them joins its row.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics: list[Any] = []  # rows to come; a run that went on brings cells as text
        self.rows: list[dict[str, Any]] = []
        self.lines: list[str] = []  # the first rows, as they are written
        self.kept: int | None = None

    def take(self, text: str) -> None:
        """Begin with the rows of the run that this one goes on from."""
        rows = csv.DictReader(io.StringIO(text))
        self.metrics = [{name: cell for name, cell in row.items() if cell} for row in rows]
        self.save()

    def save(self) -> None:
        """Write what has been logged. A row without an epoch, as of LearningRateMonitor, takes that of the next one."""
        waiting, self.metrics = self.metrics, []
        for row in waiting:
            self.metrics.append(row)
            if "epoch" in row:
                for own in self.metrics:
                    self._add({**own, "epoch": int(row["epoch"] if self.kept is None else self.kept)})
                self.metrics = []
        if not self.rows:
            return
        self.lines += [_line(row.get(name, "") for name in self.metrics_keys) for row in self.rows[len(self.lines) :]]
        part = Path(self.metrics_file_path + ".part")
        part.write_text(_line(self.metrics_keys) + "".join(self.lines), encoding="utf-8")
        part.replace(self.metrics_file_path)

    def _add(self, row: dict[str, Any]) -> None:
        places = (at for at in reversed(range(len(self.rows))) if self.rows[at]["epoch"] == row["epoch"])
        at = next(places, len(self.rows))
        own = self.rows[at] if at < len(self.rows) else {}
        if self.kept is None and own.keys() & row.keys() - {"epoch", "step"}:
            at, own = len(self.rows), {}
        self.rows[at : at + 1] = [{**row, **own}]
        names = sorted(dict.fromkeys([*self.metrics_keys, *row]), key=_place)
        del self.lines[at if names == self.metrics_keys else 0 :]
        self.metrics_keys = names


def _place(name: str) -> int:
    first = name.partition("_")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER)


def _line(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
