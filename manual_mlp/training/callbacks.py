"""Everything that Lightning calls in the course of a run: it saves what the run leaves, and shows a net at work.

Checkpoints survive a kill at any moment, and after it a run goes on as if nothing had happened. metrics.csv has a row
for each epoch. Further callbacks record δ, trace a step, pretrain the net, and print how far the training is.
"""

import csv
import io
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from manual_mlp import plots
from manual_mlp.checkpoint import read_checkpoint, read_values, write_whole
from manual_mlp.errors import InputError
from manual_mlp.network import reading_of
from manual_mlp.pretraining import pretrain
from manual_mlp.shell import is_watched
from manual_mlp.tables import figure, words
from manual_mlp.tracing import one_pass, trace

log = logging.getLogger(__name__)

Content = dict[str, Any]
ORDER = ("epoch", "step", "train", "val", "test")  # of the columns, by the first word of their names
HANDED_BACK = ".temp.ckpt"  # the parameters alone, by a process of ddp_spawn
Values = dict[str, dict[int, Tensor]]
"""z, a and δ of a pass, indexed by the sheet's l: {"z": {2: (N, n_2), …}, "a": {1: …}, "delta": {2: …}}."""

STATE = ("epochs", "norms", "first", "snapshots", "steps", "due", "stride")
ROWS = 32
KEPT = 1000  # values of z, a and δ of each layer in the first record
RECORDS = 500  # more say nothing more: then every second one is dropped, and the next ones come half as often
SHOWN = ("val_loss", "val_accuracy", "val_r2")
HISTOGRAMS = 10  # TensorBoard gets them with every tenth record
INPUTS, PARAMETERS = 2, 10_000  # up to which the net's answers can be drawn, so that its snapshots are kept


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


class DeltaFlow(L.Callback):
    """A callback that records what `plots` draws, by the recursion and on the same rows each time.

    every: mini-batches from one record to the next. rows: how many of the training part, its first ones.

    epochs      of each record, such as 1.5 in the middle of the second epoch
    norms       {l: ‖δ^l‖ of each record} for one sample: the root of the mean square over the rows, without the 1/N
    first       z, a and δ of the first record, at most 1000 values each
    snapshots   {epochs passed: state_dict} after 0, 1, 2, 4, 8, … epochs, for small nets with at most two inputs

    All of it is plain data in the checkpoint. It draws no random numbers and changes nothing: with and without it a run
    gives the same bits. Dropout is left out. A net that the recursion cannot read is not recorded.
    Needs a data module with `splits`. TensorBoard gets the norms, and histograms with every tenth record.
    """

    def __init__(self, every: int = 20, rows: int = ROWS) -> None:
        if min(every, rows) < 1:
            given = f"{every}, {rows}"
            raise InputError(f"expected DeltaFlow's every and rows to be 1 or more, but got {given}; raise them")
        self.every, self.rows = every, rows
        self.epochs: list[float] = []
        self.norms: dict[int, list[float]] = {}
        self.first: Values = {}
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.steps, self.due, self.stride = 0, 0, 1
        self.fits = True

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.fits = stage == "fit"
        pl_module.backprop.every = self.every

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fits:  # a test restores the best checkpoint, and its records end earlier
            vars(self).update(state_dict)
            self.due = min(self.due, self.steps + self.every * self.stride)  # the checkpoint had a smaller `every`

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        if batch_idx == 0:
            self._keep_snapshot(trainer.current_epoch, pl_module)
        if self.steps >= self.due:
            self._record(trainer, pl_module, trainer.current_epoch + batch_idx / trainer.num_training_batches)
            self.due = self.steps + self.every * self.stride
        self.steps += -(-len(batch[0]) // trainer.datamodule.batch_size)  # type: ignore[attr-defined] # the engine takes many at once

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record the end, too: after the last checkpoint, so that a run that goes on from there does not contain it."""
        if trainer.is_global_zero and self.epochs:
            self._record(trainer, pl_module, trainer.current_epoch, histograms=True)

    def _record(self, trainer: L.Trainer, module: Any, epoch: float, histograms: bool = False) -> None:
        try:
            values = signals(module, trainer.datamodule.splits["train"][: self.rows])  # type: ignore[attr-defined]
        except InputError:  # another kind of net, or hooks in it
            return
        self.first = self.first or {letter: _thinned(values[letter]) for letter in values}
        if len(self.epochs) == RECORDS:
            self.stride *= 2
            self.epochs = self.epochs[::2]
            self.norms = {layer: norms[::2] for layer, norms in self.norms.items()}
        self.epochs.append(epoch)
        norms = torch.stack([delta.float().norm() for delta in values["delta"].values()]) * len(values["a"][1]) ** 0.5
        for layer, norm in zip(values["delta"], norms.tolist(), strict=True):
            self.norms.setdefault(layer, []).append(norm)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._show(logger.experiment, trainer.global_step, values, histograms)

    def _show(self, tensorboard: Any, step: int, values: Values, histograms: bool) -> None:
        for layer, norms in self.norms.items():
            tensorboard.add_scalar(f"norm of delta/{layer}", norms[-1], step)
        shown = values if histograms or len(self.epochs) % HISTOGRAMS == 1 else {}
        for letter, layer in ((letter, layer) for letter, layers in shown.items() for layer in layers):
            tensorboard.add_histogram(f"{letter}/{layer}", values[letter][layer], step, bins=64)

    def _keep_snapshot(self, epoch: int, module: Any) -> None:
        """Keep the parameters after 0, 1, 2, 4, … epochs: for these alone epoch & (epoch − 1) is 0."""
        state = module.net.state_dict()
        small = module.sizes[0] <= INPUTS and sum(map(torch.numel, state.values())) <= PARAMETERS
        if small and epoch & (epoch - 1) == 0:
            self.snapshots[epoch] = {name: value.cpu().clone() for name, value in state.items()}


@torch.no_grad()
def signals(module: Any, batch: tuple[Tensor, Tensor]) -> Values:
    """Return z, a and δ of an MLPModule on a batch of its data module, without dropout, as `mm.trace` gives them.

    Raises InputError as `program.read`.
    """
    program, (features, target) = reading_of(module.one_net, grids=True).program, module.as_net_takes(*batch)
    one = one_pass(program, features, target, module.loss, program.draw(features, drops=False))
    layers = program.layers
    return {
        "z": {index: one.slots[layer.z] for index, layer in layers.items()},
        "a": {1: features} | {index: one.slots[layer.out] for index, layer in layers.items()},
        "delta": {index: one.arrived[layer.z] for index, layer in layers.items()},
    }


def _thinned(values: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return at most KEPT values of each layer, evenly spaced. Copies: a checkpoint writes all the memory of a view."""
    flat = {layer: value.flatten() for layer, value in values.items()}
    return {layer: value[:: -(-len(value) // KEPT)].float().cpu().clone() for layer, value in flat.items()}


class Traced(L.Callback):
    """A callback that prints `mm.trace` of the first mini-batch, just before the training makes this step.

    It leaves trace.md and flow.png in the run folder. Step 5 is plain SGD's, with the optimizer's lr as LR; weights of
    rows are left out. rows: of the mini-batch; costs: C of it before this step and after it.
    """

    rows = 0
    costs = (math.nan, math.nan)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > 0 or not trainer.is_global_zero:
            return
        first = [part[: trainer.datamodule.batch_size] for part in batch]  # type: ignore[attr-defined] # the engine takes many at once
        x, target = pl_module.as_net_takes(*first)
        traced = trace(pl_module.one_net, x, target, pl_module.loss, trainer.optimizers[0].param_groups[0]["lr"])
        stepped = deepcopy(pl_module.one_net).requires_grad_(False)
        new = [(traced.new_weight[layer], traced.new_bias[layer]) for layer in traced.weight]
        for parameter, value in zip(stepped.parameters(), filter(lambda v: v is not None, chain(*new)), strict=True):
            parameter.copy_(value)
        self.rows, after = len(x), trace(stepped, x, target, pl_module.loss)
        self.costs = traced.cost.item(), after.cost.item()
        folder = Path(trainer.default_root_dir)
        (folder / "trace.md").write_text(traced.to_markdown() + "\n")
        plots.flow(traced).savefig(folder / "flow.png")
        print(f"\n{traced}\n")


class Pretrained(L.Callback):
    """A callback that gives the net's hidden layers their start by `mm.pretrain`, before the first step.

    epochs_per_layer: of each hidden one; 0 leaves the net as it was drawn.
    A run that goes on from a checkpoint is left alone.
    """

    def __init__(self, epochs_per_layer: int = 30, lr: float = 0.05, batch_size: int = 20) -> None:
        self.epochs, self.lr, self.batch_size = epochs_per_layer, lr, batch_size

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step > 0 or self.epochs == 0:
            return
        if pl_module.members > 1:
            raise InputError(f"expected one net to pretrain, but got members={pl_module.members}; leave members out")
        x = trainer.datamodule.splits["train"].features  # type: ignore[attr-defined]
        first = next(pl_module.net.parameters())
        generator = torch.Generator(first.device).manual_seed(torch.initial_seed())  # the same in each process
        pretrain(pl_module.net, x.to(first), self.epochs, self.lr, self.batch_size, generator)


class Progress(TQDMProgressBar):
    """Lightning's bar, on stderr, if somebody watches; else one short line an epoch on stdout.

    A line comes when the next epoch begins, because only then Lightning has the figures of the training.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        self.watched = is_watched()
        super().__init__(refresh_rate)
        if not self.watched:
            self.disable()
        self.ended: int | None = None  # epoch
        self.validated = False

    def init_train_tqdm(self) -> Any:
        with redirect_stdout(sys.stderr):  # it writes to what is stdout now
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Any:
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def init_test_tqdm(self) -> Any:
        with redirect_stdout(sys.stderr):
            return super().init_test_tqdm()

    def on_train_epoch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        self._print(trainer)
        super().on_train_epoch_start(trainer, *arguments)

    def on_validation_end(self, *arguments: Any) -> None:
        self.validated = True
        super().on_validation_end(*arguments)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ended = trainer.current_epoch
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, *arguments: Any) -> None:
        self._print(arguments[0])
        super().on_train_end(*arguments)

    def _print(self, trainer: L.Trainer) -> None:
        """Print the line of the epoch that has ended, if any."""
        names, found = ["train_loss", *(SHOWN if self.validated else ())], trainer.callback_metrics
        figures = [f"{words(name)} {figure(name, found[name].item())}" for name in names if name in found]
        if self.ended is not None and trainer.is_global_zero and not self.watched:
            print(f"epoch {self.ended}: {', '.join(figures)}", flush=True)
        self.ended, self.validated = None, False
