"""Checkpoints that survive a kill at any moment, and from which a run goes on as if nothing had happened."""

import csv
import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from manual_mlp.checkpoint import read_values, write_whole
from manual_mlp.errors import InputError
from manual_mlp.training.data import Batches, DataModule
from manual_mlp.training.module import MLPModule

FREE = ("backprop", "initialisation")  # what may differ when a run goes on: the same net, trained another way


class WholeFiles(TorchCheckpointIO):
    """Writes files by `write_whole`, reads them by `read_values`: never half of one, never anyone's code.

    Not checkpoints alone: the processes of ddp_spawn hand their parameters back in a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(path, buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return read_values(path, "cpu")


class EpochCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves when an epoch is over to its last row.

    Lightning's own saves before the epoch's training figures are logged and before a plateau scheduler has made its
    step: both would be missing from a run that goes on from there. So this one waits for the next epoch, or the end.
    """

    _due = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        """In the middle of an epoch, if every_n_train_steps or train_time_interval says so."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, *arguments)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._due = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the epoch is not over."""

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

    def _should_save_on_train_epoch_end(self, trainer: L.Trainer) -> bool:
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Paths follow a run folder that has been moved or copied to where this run has its own."""
        old, new = str(state_dict["dirpath"]), str(self.dirpath)

        def here(path: str) -> str:
            moved = path.replace(old, new, 1)
            return moved if os.path.exists(moved) else path

        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        state = {**state_dict, **{name: here(state_dict[name]) for name in names}, "dirpath": self.dirpath}
        state["best_k_models"] = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state)


@contextmanager
def _at_the_end_of_its_epoch(trainer: L.Trainer) -> Iterator[None]:
    """Lightning's count as it stood in on_train_epoch_end, which is the place from which it goes on without a gap."""
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


class Continuation(Callback):
    """Keeps in a checkpoint what Lightning leaves out: the random states, the rows of metrics.csv, an early stop."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        rows = [Path(writer.metrics_file_path) for writer in _csv_writers(trainer)]
        checkpoint["continuation"] = {
            "random": random_states(),
            "rows": [path.read_text() if path.exists() else "" for path in rows],
            "stopped": trainer.should_stop,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The rows come from the checkpoint: the logger has deleted the file, and later rows will be logged again."""
        if trainer.state.fn != "fit":
            return
        self.loaded = checkpoint["continuation"]
        for writer, rows in zip(_csv_writers(trainer), self.loaded["rows"], strict=False):
            if rows:
                write_whole(writer.metrics_file_path, rows.encode())
                writer.metrics_keys = next(csv.reader(io.StringIO(rows)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Just before the first step, after all that might draw a number."""
        if self.loaded:
            set_random_states(self.loaded["random"])
            trainer.should_stop |= self.loaded["stopped"] and bool(trainer.early_stopping_callbacks)
            self.loaded = {}
        if trainer.fit_loop.restarted_on_epoch_end:
            _begin_next_epoch(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What Lightning does by itself, but for a run that had reached max_steps already: its last epoch is over."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed


def _begin_next_epoch(trainer: L.Trainer) -> None:
    """What Lightning does by itself, but under max_steps, where it would go through the last epoch's end again."""
    loop = trainer.fit_loop
    loop._restarting = False
    loop.epoch_loop.restarting = False  # and of the loops in it
    loop.reset_restart_stage()
    loop.epoch_progress.increment_completed()
    if isinstance(trainer.train_dataloader, Batches):
        trainer.train_dataloader.skipped = 0


def _csv_writers(trainer: L.Trainer) -> list[Any]:
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def random_states() -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """What `random_states` returned; those of GPUs where as many are there."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])


def check_same_rows(content: dict[str, Any], path: str, data: DataModule) -> None:
    """Raise InputError if a checkpoint was trained on other rows than `data` has, or on another split of them."""
    if content.get("DataModule", {}).get("fingerprint") != data.fingerprint:
        raise InputError(
            f"expected the rows, split and seed that {path} was trained with, but {data.name} gives other ones; "
            "give the same data.* and seed, or use task=predict for new rows"
        )


def check_same_training(content: dict[str, Any], path: str, module: MLPModule) -> None:
    """Raise InputError if a checkpoint has another net, cost or optimizer than `module`, or can't be continued."""
    then, now = content["hyper_parameters"], dict(module.hparams)
    facts = {name: (then.get(name), now[name]) for name in now if name not in FREE}
    facts["the optimizer"] = (content.get("optimizer"), module.optimizer_in_words())
    for name, (before, after) in facts.items():
        if before != after:
            raise InputError(
                f"expected {name} to be {_short(before)}, as in {path}, but it is {_short(after)}; "
                "leave out what differs, or start a new run without ckpt_path"
            )
    if not content.keys() >= {"continuation", "optimizer_states", "loops"}:
        raise InputError(f"expected all that a run needs to go on, but {path} holds parameters alone; use last.ckpt")


def _short(value: object) -> str:
    return shorten(str(value), 100, placeholder=" …")
