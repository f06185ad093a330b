"""Save what a run leaves while it trains: checkpoints that survive a kill at any moment, and metrics.csv.

After a kill a run goes on from its checkpoint as if nothing had happened.
"""

import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.plugins.io import TorchCheckpointIO

from manual_mlp.checkpoint import read_checkpoint, read_values, write_whole

log = logging.getLogger(__name__)

Content = dict[str, Any]
ORDER = ("epoch", "step", "train", "val", "test")  # of the columns, by the first word of their names
HANDED_BACK = ".temp.ckpt"  # the parameters alone, by a process of ddp_spawn


class WholeFiles(TorchCheckpointIO):
    """Writes files by `write_whole`, reads them by `read_checkpoint`, and removes only its own.

    So no file is ever half written, and the content of a file can run, fetch and delete nothing.
    """

    def __init__(self) -> None:
        self.folders: set[Path] = set()  # that this process has saved to

    def save_checkpoint(self, checkpoint: Content, path: Any, storage_options: Any = None) -> None:
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        self.folders.add(folder.resolve())
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(path, buffer.getvalue())  # a view in a traceback can crash Python 3.12 (cpython#111049)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> Content:
        return read_values(path) if Path(path).name == HANDED_BACK else read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one file, in a folder that this process has saved to. Lightning's own method removes any folder."""
        path = Path(path)
        if path.name != HANDED_BACK and path.parent.resolve() not in self.folders:
            log.info("%s is left alone: it is not a file of this run", path)
        elif is_plain_file(path):
            path.unlink()


def is_plain_file(path: str | Path) -> bool:
    """Return True for a file, but not for a link to one."""
    return os.path.isfile(path) and not os.path.islink(path)


class EpochCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves after the very last row of an epoch.

    Lightning's own saves before the epoch's training figures are logged, and before a plateau scheduler steps. A run
    that goes on from there would lack both. So this one waits for the next epoch, or the end.
    """

    _due = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        """Save in the middle of an epoch, if every_n_train_steps or train_time_interval says so."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, *arguments)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._due = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: the epoch is not over."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the best one into the run's own folder, so that a run can go on from there, too."""
        super().on_train_start(trainer, pl_module)
        best, own = self.best_model_path, str(Path(self.dirpath or "", os.path.basename(self.best_model_path)))
        if best not in ("", own):
            if trainer.is_global_zero:
                write_whole(own, Path(best).read_bytes())
            self.best_k_models = {own if path == best else path: score for path, score in self.best_k_models.items()}
            self.kth_best_model_path = own if self.kth_best_model_path == best else self.kth_best_model_path
            self.best_model_path = own

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_due(trainer, pl_module)

    def _save_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due:
            self._due = False
            with _at_the_end_of_its_epoch(trainer):
                super().on_train_epoch_end(trainer, pl_module)
                super().on_train_batch_end(trainer, pl_module, None, None, 0)  # if the last step was one to save

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, torch.Tensor]:
        """Return the figures; of several members, each of which keeps its own best epoch, the mean of these."""
        kept = getattr(trainer.lightning_module, "kept_figures", dict)
        return super()._monitor_candidates(trainer) | kept()

    def _should_save_on_train_epoch_end(self, trainer: L.Trainer) -> bool:
        return True


def without_folders(state: Content) -> Content:
    """Return the state of a ModelCheckpoint with the names of files, and no folder of this machine."""
    names = {key: os.path.basename(path) for key, path in state.items() if key.endswith("_model_path")}
    models = {os.path.basename(path): score for path, score in state["best_k_models"].items()}
    return {**state, **names, "best_k_models": models, "dirpath": "."}


def in_own_folder(state: Content, callback: ModelCheckpoint, checkpoint: Any) -> Content:
    """Return the state of a ModelCheckpoint, with paths only of files in the run's own folder.

    Only the last name of each path counts, and only if such a file lies in the callback's folder, or in the folder of
    the checkpoint, if the run goes on in a new one. So a run folder may be moved.
    """
    folders = [Path(folder) for folder in (callback.dirpath, checkpoint and Path(checkpoint).parent) if folder]

    def own(path: str) -> str:
        places = [str(folder / os.path.basename(path)) for folder in folders]
        return next(filter(is_plain_file, places), "")

    models = {own(path): score for path, score in state["best_k_models"].items() if own(path)}
    ranked = sorted(models, key=models.__getitem__, reverse=callback.mode == "max")
    best = ranked[0] if ranked else own(state["best_model_path"])
    return {
        **state,
        "dirpath": callback.dirpath,
        "best_k_models": models,
        "best_model_path": best,
        "best_model_score": models.get(best),
        "kth_best_model_path": ranked[-1] if ranked else "",
        "kth_value": models[ranked[-1]] if ranked else state["kth_value"],
        "last_model_path": own(state["last_model_path"]),
    }


@contextmanager
def _at_the_end_of_its_epoch(trainer: L.Trainer) -> Iterator[None]:
    """Return Lightning's progress as it was in on_train_epoch_end: from there it goes on without a gap."""
    loop = trainer.fit_loop
    now, loop.epoch_progress = loop.epoch_progress, deepcopy(loop.epoch_progress)
    counts: list[Any] = [loop.epoch_progress.total, loop.epoch_progress.current]
    for count in counts:
        count.ready = count.started = count.processed
        count.completed = count.processed - 1
    try:
        yield
    finally:
        loop.epoch_progress = now


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
