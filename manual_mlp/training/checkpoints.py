"""Checkpoints that survive a kill at any moment, and from which a run goes on as if nothing had happened."""

import io
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.optim import Optimizer

from manual_mlp.checkpoint import described, join, read_checkpoint, read_values, write_whole
from manual_mlp.errors import InputError
from manual_mlp.training.data import Batches, DataModule
from manual_mlp.training.metrics import EpochRows
from manual_mlp.training.module import MLPModule

log = logging.getLogger(__name__)

# What may differ when a run goes on: how the same net is trained, and the names of its classes in another version.
FREE = ("backprop", "class_names")
OFF = {"residual": False, "batch_norm": False, "channels": [], "kernel": 5, "image_shape": []}  # where none was written
NEEDED = {"continuation", "optimizer_states", "lr_schedulers", "callbacks", "loops"}  # to go on
LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
OF_STATES = ("lightning.pytorch.trainer.connectors.checkpoint_connector", "torch.optim")  # modules
HANDED_BACK = ".temp.ckpt"  # the parameters alone, by a process of ddp_spawn


class WholeFiles(TorchCheckpointIO):
    """Writes files by `write_whole`, reads them by `read_checkpoint`, and removes only its own.

    So no file is ever half written, and the content of a file can run, fetch and delete nothing.
    """

    def __init__(self) -> None:
        self.folders: set[Path] = set()  # that this process has saved to

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        self.folders.add(folder.resolve())
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with buffer.getbuffer() as content:
            write_whole(path, content)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
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


def without_folders(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a ModelCheckpoint with the names of files, and no folder of this machine."""
    names = {key: os.path.basename(path) for key, path in state.items() if key.endswith("_model_path")}
    models = {os.path.basename(path): score for path, score in state["best_k_models"].items()}
    return {**state, **names, "best_k_models": models, "dirpath": "."}


def in_own_folder(state: dict[str, Any], callback: ModelCheckpoint, checkpoint: Any) -> dict[str, Any]:
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


def of_same_form(given: Any, own: Any, where: str) -> Any:
    """Return a state if it is of the same types, lengths and shapes as this run's own state before any training.

    If the run's own is null or empty, any plain value will do. Raises InputError for another form.
    """
    if own is None or (isinstance(own, dict | list) and not own):
        return given
    if isinstance(own, dict) and not isinstance(own, Counter) and isinstance(given, dict):
        return given | {key: of_same_form(given[key], own[key], join(where, key)) for key in own.keys() & given.keys()}
    if isinstance(own, list | tuple) and type(given) is type(own) and len(given) == len(own):
        return type(own)(of_same_form(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(given, own, strict=True)))
    tensors = isinstance(own, torch.Tensor) and isinstance(given, torch.Tensor) and own.shape == given.shape
    numbers = {type(given), type(own)} <= {int, float}
    others = type(given) is type(own) and not isinstance(own, list | tuple | torch.Tensor)
    if tensors or numbers or others:
        return given
    raise InputError(
        f"expected {where} in the checkpoint to be as this run's own, {described(own)}, but got "
        f"{described(given)}; take a checkpoint of the same optimizer, scheduler and callbacks"
    )


def _check_step(make: Any, parameters: list[torch.Tensor], state: dict[str, Any]) -> None:
    """Raise InputError if an optimizer can't take a step from a state. Try it on copies, with gradients of zero."""
    copies = [parameter.detach().clone().requires_grad_(parameter.requires_grad) for parameter in parameters]
    twin: Optimizer = make(copies)
    for parameter in copies:
        parameter.grad = torch.zeros_like(parameter)
    try:
        twin.load_state_dict(deepcopy(state))
        twin.step(lambda: 0.0)
    except Exception as error:  # any exception: each optimizer fails in its own way
        raise InputError(
            f"expected optimizer_states in the checkpoint to fit the parameters, but {type(twin).__name__} can't take "
            f"a step from them ({_reason(error)}); take another checkpoint"
        ) from error


@contextmanager
def restoring(path: str | None) -> Iterator[None]:
    """Raise InputError if a state of a checkpoint is not taken, and log the traceback.

    Some fail only at a step of the optimizer or the schedule.
    """
    try:
        yield
    except (InputError, OSError, MemoryError, MisconfigurationException):
        raise
    except Exception as error:
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
        if path is None or not any(module.startswith(OF_STATES) for module in modules):
            raise
        log.info("The checkpoint was not taken.", exc_info=True)
        raise InputError(
            f"expected a checkpoint whose states fit this run, but with {path} it fails ({_reason(error)}); take "
            "another, such as best.ckpt or last.ckpt"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {described(str(error))}"


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


class Continuation(Callback):
    """Keeps in a checkpoint what Lightning leaves out: the random states, the rows of metrics.csv, an early stop."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.content: dict[str, Any] = {}
        self.began = time.perf_counter()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise InputError for a folder in the place of a checkpoint, which Lightning might remove with all in it."""
        folders = {str(callback.dirpath) for callback in trainer.checkpoint_callbacks if hasattr(callback, "dirpath")}
        for path in (path for folder in sorted(folders) for path in Path(folder).glob("*.ckpt")):
            if stage == "fit" and path.is_dir():
                raise InputError(
                    f"expected checkpoints to be files, but {path} is a folder; move it, or choose another run folder"
                )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        rows = [Path(writer.metrics_file_path) for writer in csv_writers(trainer)]
        checkpoint["continuation"] = {
            "random": random_states(),
            "rows": [path.read_text() if path.exists() else "" for path in rows],
            "stopped": trainer.should_stop,
            "seconds": time.perf_counter() - self.began,
        }
        states = checkpoint["callbacks"]
        for key in (callback.state_key for callback in trainer.checkpoint_callbacks):
            states |= {key: without_folders(states[key])} if "best_model_path" in states.get(key, ()) else {}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Believe only those states that have a place in this run, and only paths in its own folder.

        The rows come from the checkpoint, because the logger has deleted the file. Later rows will be logged again. The
        time of the run goes on, too.
        """
        self._check_callbacks(trainer, pl_module, checkpoint["callbacks"])
        loops = {name: getattr(trainer, name).state_dict() for name in LOOPS}
        checkpoint["loops"] = of_same_form(checkpoint.get("loops", {}), loops, "loops")
        if trainer.state.fn != "fit":
            return
        self.content = checkpoint
        self.loaded = checkpoint["continuation"]
        self.began -= self.loaded.get("seconds", 0.0)  # versions before 0.2 kept none
        for writer, rows in zip(csv_writers(trainer), self.loaded["rows"], strict=False):
            writer.take(rows)

    def _check_callbacks(self, trainer: L.Trainer, pl_module: Any, states: dict[str, Any]) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # Lightning sets it
            key = callback.state_key
            if key not in states:
                continue
            if isinstance(callback, ModelCheckpoint):
                states[key] = in_own_folder(states[key], callback, trainer.ckpt_path)
                best = states[key]["best_model_path"]
                if best and trainer.state.fn == "fit":  # the run may be measured by it at its end
                    check_same_net(read_checkpoint(best), best, pl_module)
            if trainer.state.fn == "fit":
                states[key] = of_same_form(states[key], callback.state_dict(), join("callbacks", key))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the states that Lightning now gives to the optimizers and schedules it has made."""
        content, self.content = self.content, {}
        if not content:
            return
        own = [{**optimizer.state_dict(), "state": {}} for optimizer in trainer.optimizers]
        content["optimizer_states"] = of_same_form(content["optimizer_states"], own, "optimizer_states")
        for state in content["optimizer_states"]:
            _check_step(pl_module.optimizer, list(pl_module.parameters()), state)
        schedules = content["lr_schedulers"]
        for index, (config, state) in enumerate(zip(trainer.lr_scheduler_configs, schedules, strict=False)):
            fresh = config.scheduler.state_dict()
            known = {name: value for name, value in state.items() if name in fresh}  # more would become attributes
            schedules[index] = of_same_form(known, fresh, f"lr_schedulers[{index}]")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the random states just before the first step, after everything that might draw a number."""
        if self.loaded:
            set_random_states(self.loaded["random"])
            trainer.should_stop |= self.loaded["stopped"] and bool(trainer.early_stopping_callbacks)
            self.loaded = {}
        if trainer.fit_loop.restarted_on_epoch_end:
            _begin_next_epoch(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the last epoch as over. Lightning does so itself, except if the run had reached max_steps already."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed


def _begin_next_epoch(trainer: L.Trainer) -> None:
    """Begin the next epoch. Lightning does so itself, except under max_steps: it would end the last one again."""
    loop = trainer.fit_loop
    loop._restarting = False
    loop.epoch_loop.restarting = False  # and those of the loops in it
    loop.reset_restart_stage()
    loop.epoch_progress.increment_completed()
    if isinstance(trainer.train_dataloader, Batches):
        trainer.train_dataloader.skipped = 0


def csv_writers(trainer: L.Trainer) -> list[Any]:
    """Return what writes the run's metrics.csv; nothing in a process that does not write."""
    loggers = trainer.loggers if trainer.is_global_zero else ()
    return [logger.experiment for logger in loggers if isinstance(logger, EpochRows)]


def random_states() -> dict[str, Any]:
    """Return the states of torch's, NumPy's and Python's generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set what `random_states` returned; the states of GPUs only if there are as many."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])


def check_same_rows(content: dict[str, Any], path: str, data: DataModule) -> None:
    """Raise InputError if a checkpoint was trained on other rows than `data` has, or on another split of them.

    The classes keep the names that they have in the checkpoint: 0.1 called the boolean ones 0 and 1.
    """
    if content.get("DataModule", {}).get("fingerprint") != data.fingerprint:
        raise InputError(
            f"expected the rows, split and seed that {path} was trained with, but {data.name} gives other ones; "
            "give the same data.* and seed, or use task=predict for new rows"
        )
    data.class_names = tuple(content["hyper_parameters"]["class_names"])


def check_same_training(content: dict[str, Any], path: str, module: MLPModule) -> None:
    """Raise InputError if a checkpoint has another net, cost or optimizer than `module`, or can't be continued."""
    check_same_net(content, path, module)
    check_same("the optimizer", content["optimizer"], module.optimizer_in_words(), path)
    if not content.keys() >= NEEDED:
        raise InputError(f"expected all that a run needs to go on, but {path} holds parameters alone; use last.ckpt")


def check_same_net(content: dict[str, Any], path: str, module: MLPModule) -> None:
    """Raise InputError if a checkpoint has another net or cost than `module`."""
    then, now = {**OFF, **content["hyper_parameters"]}, dict(module.hparams)
    check_same("members", then.get("members", 1), module.members, path)
    for name in now:
        if name not in FREE:
            check_same(name, then.get(name), now[name], path)


def check_same_size(content: dict[str, Any], path: str, hidden: Any) -> None:
    """Raise InputError if a checkpoint has other hidden layers than a net that is not built yet."""
    if hidden is not None:
        check_same("hidden", list(content["hyper_parameters"]["hidden"]), list(hidden), path)


def check_same(name: str, before: object, after: object, path: str) -> None:
    if before != after:
        raise InputError(
            f"expected {name} to be {_short(before)}, as in {path}, but it is {_short(after)}; "
            "leave out what differs, or start a new run without ckpt_path"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]} …"
