"""Go on from a checkpoint: what a run takes from it, and what it does not believe.

A run that goes on ends as if nothing had happened. Settings come from its configuration, accumulated states from the
checkpoint, which holds the configuration of its run, too: a setting that differs now is honoured, or refused.
"""

import inspect
import json
import logging
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from pydoc import locate
from traceback import walk_tb
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manual_mlp.errors import InputError
from manual_mlp.schema import PLAIN, described, join
from manual_mlp.training.callbacks import EpochRows, in_own_folder, without_folders
from manual_mlp.training.data import Batches, DataModule
from manual_mlp.training.folder import accepted, keep_configuration
from manual_mlp.training.module import MLPModule, read_training, unfit

log = logging.getLogger(__name__)

Content = dict[str, Any]
# What may differ when a run goes on: how the same net is trained, and the names of its classes in another version.
FREE = ("backprop", "class_names")
OFF = {"residual": False, "batch_norm": False, "channels": [], "kernel": 5, "image_shape": []}  # where none was written
NEEDED = {"continuation", "optimizer_states", "lr_schedulers", "callbacks", "loops"}  # to go on
LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
OF_STATES = ("lightning.pytorch.trainer.connectors.checkpoint_connector", "torch.optim")  # modules
MOST_STEPS = 10**7  # that a new schedule takes at once, in about a minute
STEPS: tuple[str, ...] = ("data.batch_size", "data.class_weight", "trainer.precision", "trainer.limit_train_batches")
STEPS += ("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.accumulate_grad_batches")
SEEN = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # ReduceLROnPlateau's, about its figure


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


def _try_step(make: Any, parameters: list[torch.Tensor], state: Content) -> None:
    """Let an optimizer take a step from a state, on copies, with gradients of zero. Raises what that raises."""
    copies = [parameter.detach().clone().requires_grad_(parameter.requires_grad) for parameter in parameters]
    twin: Optimizer = make(copies)
    for parameter in copies:
        parameter.grad = torch.zeros_like(parameter)
    twin.load_state_dict(deepcopy(state))
    twin.step(lambda: 0.0)


@contextmanager
def restoring(path: str | None) -> Iterator[None]:
    """Raise InputError if a state of a checkpoint is not taken, at once or at a step, and log the traceback."""
    try:
        yield
    except (InputError, OSError, MemoryError, MisconfigurationException):
        raise
    except Exception as error:
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
        if path is None or not any(module.startswith(OF_STATES) for module in modules):
            raise
        log.info("The checkpoint was not taken.", exc_info=True)
        reason = f"{type(error).__name__}: {described(str(error))}"
        raise InputError(
            f"expected a checkpoint whose states fit this run, but with {path} it fails ({reason}); take "
            "another, such as best.ckpt or last.ckpt"
        ) from error


class Continuation(Callback):
    """A callback that keeps in a checkpoint what Lightning leaves out, and decides what a run takes from one.

    Left out are the random states, the rows of metrics.csv, an early stop, the time of the run, and its configuration,
    which wins over the states in a checkpoint.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        here = OmegaConf.merge(cfg, {"run_dir": "."})  # a checkpoint holds no absolute path
        nodes = OmegaConf.select(here, "callbacks") or {}
        self.callbacks = {
            name: _plain(OmegaConf.to_container(node, resolve=True)) for name, node in nodes.items() if node
        }
        self.steps = {name: str(OmegaConf.select(cfg, name)) for name in STEPS}
        self.changed: list[str] = []  # settings of which earlier steps had others, so no one command gives this net
        self.content: Content = {}  # of the checkpoint that the run goes on from, until it does
        self.old: Content | None = None  # the state of a schedule that has other settings now
        self.began = time.perf_counter()

    def configured(self, module: MLPModule) -> Content:
        """Return {"optimizer": …, "scheduler": … or None, "callbacks": {name: …}, …} as plain values."""
        assert module.optimizer is not None
        schedule = None
        if module.scheduler is not None:
            options = {name: value for name, value in module.scheduler.items() if name != "scheduler"}
            schedule = {"interval": "epoch", "monitor": None, **options, **_arguments(module.scheduler["scheduler"])}
        made = {"optimizer": _arguments(module.optimizer), "scheduler": schedule, "callbacks": self.callbacks}
        return {**made, "steps": self.steps, "changed": self.changed}

    def check(self, content: Content, path: str, module: MLPModule, data: DataModule) -> None:
        """Raise InputError for what differs from a checkpoint's and can't be honoured any more.

        Sets lr to the one that LearningRateFinder found, and the names of the classes to those of the checkpoint.
        """
        then: Any = content.get("configured")
        for name in self._names(LearningRateFinder):
            check_same(f"callbacks.{name}", then and then["callbacks"].get(name), self.callbacks[name], path)
            module.lr = then["optimizer"].get("lr")
        check_same_training(content, path, module)
        now = self.configured(module)
        standardised = bool(content.get("DataModule", {}).get("feature_mean"))
        check_same("data.standardise", standardised, bool(data.feature_mean), path)
        for name, value in now["optimizer"].items() if then else ():
            check_same(f"optimizer.{name}", then["optimizer"].get(name), value, path)
        if now["scheduler"] and now["scheduler"]["interval"] == "step":  # nobody has counted steps for another one
            interval = then["scheduler"] and then["scheduler"].get("interval") if then else "step"
            check_same("scheduler.interval", interval if content["lr_schedulers"] else None, "step", path)
        check_same_rows(content, path, data)
        module.class_names = module.hparams["class_names"] = list(data.class_names)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise InputError for a folder in the place of a checkpoint, which Lightning might remove with all in it."""
        folders = {str(callback.dirpath) for callback in trainer.checkpoint_callbacks if hasattr(callback, "dirpath")}
        for path in (path for folder in sorted(folders) for path in Path(folder).glob("*.ckpt")):
            if stage == "fit" and path.is_dir():
                raise InputError(
                    f"expected checkpoints to be files, but {path} is a folder; move it, or choose another run folder"
                )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Content) -> None:
        rows = [Path(writer.metrics_file_path) for writer in csv_writers(trainer)]
        checkpoint["configured"] = self.configured(pl_module)
        checkpoint["continuation"] = {
            "random": random_states(),
            "rows": [path.read_text() if path.exists() else "" for path in rows],
            "stopped": trainer.should_stop,
            "seconds": time.perf_counter() - self.began,
        }
        states = checkpoint["callbacks"]
        for key in (callback.state_key for callback in trainer.checkpoint_callbacks):
            states |= {key: without_folders(states[key])} if "best_model_path" in states.get(key, ()) else {}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Content) -> None:
        """Believe only those states that have a place in this run, and only paths in its own folder.

        The rows come from the checkpoint, because the logger has deleted the file. Later rows will be logged again. The
        time of the run goes on, too.
        """
        goes_on = trainer.state.fn == "fit"
        if goes_on:
            self._let_settings_win(trainer, pl_module, checkpoint)
        self._check_callbacks(trainer, pl_module, checkpoint["callbacks"])
        loops = {name: getattr(trainer, name).state_dict() for name in LOOPS}
        checkpoint["loops"] = of_same_form(checkpoint.get("loops", {}), loops, "loops")
        if not goes_on:
            return
        self.content, kept = checkpoint, checkpoint["continuation"]
        self.began -= kept.get("seconds", 0.0)  # versions before 0.2 kept none
        for writer, rows in zip(csv_writers(trainer), kept["rows"], strict=False):
            writer.take(rows)

    def _let_settings_win(self, trainer: L.Trainer, pl_module: Any, checkpoint: Content) -> None:
        """Change the states that the callbacks and the schedule are about to take."""
        then, now, states = checkpoint.get("configured"), self.configured(pl_module), checkpoint["lr_schedulers"]
        stopping = self._names(EarlyStopping)
        differs = then is not None and any(then["callbacks"].get(name) != self.callbacks[name] for name in stopping)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state:
                _keep_the_best(callback, state)
            elif state:
                differs |= _configure(callback, state) and isinstance(callback, EarlyStopping)
        if differs:  # another rule decided the stop
            checkpoint["continuation"]["stopped"] = False
        if then:
            before = then.get("steps", self.steps)
            self.changed = [*then.get("changed", ()), *(name for name in STEPS if before.get(name) != self.steps[name])]
        if not _same_schedule(then, now, pl_module, states):
            self.changed += ["scheduler"]
            self.old = states[0] if states else {}
            if then and (then["scheduler"] or {}).get("monitor") != (now["scheduler"] or {}).get("monitor"):
                self.old = {**self.old, "mode": None}  # it has seen another figure
            checkpoint["lr_schedulers"] = []

    def _check_callbacks(self, trainer: L.Trainer, pl_module: Any, states: Content) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # Lightning sets it
            key = callback.state_key
            if key not in states:
                continue
            if isinstance(callback, ModelCheckpoint):
                states[key] = in_own_folder(states[key], callback, trainer.ckpt_path)
                best = states[key]["best_model_path"]
                if best and trainer.state.fn == "fit":  # the run may be measured by it at its end
                    check_same_net(read_training(best), best, pl_module)
            if trainer.state.fn == "fit":
                states[key] = of_same_form(states[key], callback.state_dict(), join("callbacks", key))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the states that Lightning now gives to the optimizers and schedules it has made."""
        content = self.content
        if not content:
            return
        own = [{**optimizer.state_dict(), "state": {}} for optimizer in trainer.optimizers]
        content["optimizer_states"] = of_same_form(content["optimizer_states"], own, "optimizer_states")
        for state in content["optimizer_states"]:
            _try_step(pl_module.optimizer, list(pl_module.parameters()), state)
        schedules = content["lr_schedulers"]
        for index, (config, state) in enumerate(zip(trainer.lr_scheduler_configs, schedules, strict=False)):
            fresh = config.scheduler.state_dict()
            known = {name: value for name, value in state.items() if name in fresh}  # more would become attributes
            schedules[index] = of_same_form(known, fresh, f"lr_schedulers[{index}]")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Set the random states just before the first step, after everything that might draw a number."""
        if self.old is not None:
            _reschedule(trainer, pl_module, self.old)
            self.old = None
        pl_module.backprop.choose_road()  # may refuse
        if trainer.is_global_zero:  # nothing can be refused any more
            accepted()
            road = {"native": pl_module.backprop.road == "native"} if pl_module.backprop.road else {}  # the one taken
            keep_configuration(OmegaConf.merge(self.cfg, road))  # type: ignore[arg-type]
        if self.content:
            kept, self.content = self.content["continuation"], {}
            set_random_states(kept["random"])
            trainer.should_stop |= kept["stopped"] and bool(trainer.early_stopping_callbacks)
        if trainer.fit_loop.restarted_on_epoch_end:
            _begin_next_epoch(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the last epoch as over. Lightning does so itself, except if the run had reached max_steps already."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed

    def _names(self, kind: type[Callback]) -> list[str]:
        """Return the names of the callbacks of this kind."""
        classes = {name: locate(str(node.get("_target_"))) for name, node in self.callbacks.items()}
        return [name for name, found in classes.items() if inspect.isclass(found) and issubclass(found, kind)]


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


def random_states() -> Content:
    """Return the states of torch's, NumPy's and Python's generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: Content) -> None:
    """Set what `random_states` returned; the states of GPUs only if there are as many."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])


def _arguments(made: partial) -> Content:
    """Return {"class": …} and all arguments that a partial gives it, with the defaults."""
    parameters = inspect.signature(made.func).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    return {"class": f"{made.func.__module__}.{made.func.__qualname__}", **_plain({**defaults, **made.keywords})}


def _plain(values: Any) -> Any:
    """Return values as in JSON: texts, numbers, lists and dicts; for anything else its type."""
    return json.loads(json.dumps(values, default=lambda value: type(value).__qualname__))


def _configure(callback: Callback, state: Content) -> bool:
    """Put a callback's arguments of now into its state; return True if they differ from the old ones."""
    names = state.keys() & inspect.signature(type(callback)).parameters.keys() & vars(callback).keys()
    given = {name: getattr(callback, name) for name in names}
    differs = not all(_is(state[name], value) for name, value in given.items())
    state.update(given)
    return differs


def _keep_the_best(callback: ModelCheckpoint, state: Content) -> None:
    """Leave at most the callback's save_top_k checkpoints in the state. The files stay where they are."""
    scores = state["best_k_models"]
    if 0 <= callback.save_top_k < len(scores):
        ranked = sorted(scores, key=scores.__getitem__, reverse=callback.mode == "max")
        state["best_k_models"] = {path: scores[path] for path in ranked[: callback.save_top_k]}


def _same_schedule(then: Content | None, now: Content, module: MLPModule, states: list[Content]) -> bool:
    if then is not None:
        return then["scheduler"] == now["scheduler"]
    if module.scheduler is None or not states:
        return module.scheduler is None and not states
    given = module.scheduler["scheduler"].keywords  # version 0.1 has kept them in the schedule's state alone
    return all(_is(states[0].get(name), value) for name, value in given.items())


def _is(then: object, now: object) -> bool:
    """Return True if a value of a state, which may hold tensors, is the configured one."""
    return PLAIN.fits(then) and then == now


def _reschedule(trainer: L.Trainer, module: MLPModule, old: Content) -> None:
    """Put the schedule that is configured now in the place of another, whose state was `old`.

    It goes on as if it had been there from the start: made anew, it takes as many steps. A schedule that watches a
    figure can't do so, because earlier figures are gone: it keeps what the old one has seen, and the old one's LR.
    """
    (optimizer,) = trainer.optimizers
    made = module.scheduler["scheduler"] if module.scheduler else None
    watches = made is not None and inspect.isclass(made.func) and issubclass(made.func, ReduceLROnPlateau)
    if not (watches and "num_bad_epochs" in old):
        for group in optimizer.param_groups:
            for name in group.keys() - optimizer.defaults.keys() - {"params", "param_names"}:
                del group[name]  # the old schedule's
            group.update(optimizer.defaults)
    if made is None or module.scheduler is None:
        return
    schedule: LRScheduler = made(optimizer)
    if watches:
        if all(name in old and old[name] == getattr(schedule, name) for name in ("mode", "threshold_mode")):
            vars(schedule).update({name: old[name] for name in SEEN if name in old})
    else:
        steps = old["last_epoch"] if module.scheduler.get("interval") == "step" else trainer.current_epoch
        if steps > MOST_STEPS:
            raise InputError(
                f"expected at most {MOST_STEPS:,} steps after which another schedule goes on, but the checkpoint "
                f"claims {steps:,}; leave out what differs in scheduler, or start a new run without ckpt_path"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # before optimizer.step
            try:
                for _ in range(steps):
                    schedule.step()
            except ValueError as error:
                raise unfit("scheduler", error) from error
    trainer.lr_scheduler_configs[0].scheduler = schedule


def check_same_rows(content: Content, path: str, data: DataModule) -> None:
    """Raise InputError if a checkpoint was trained on other rows than `data` has, or on another split of them.

    The classes keep the names that they have in the checkpoint: 0.1 called the boolean ones 0 and 1.
    """
    if content.get("DataModule", {}).get("fingerprint") != data.fingerprint:
        raise InputError(
            f"expected the rows, split and seed that {path} was trained with, but {data.name} gives other ones; "
            "give the same data.* and seed, or use task=predict for new rows"
        )
    data.class_names = tuple(content["hyper_parameters"]["class_names"])


def check_same_training(content: Content, path: str, module: MLPModule) -> None:
    """Raise InputError if a checkpoint has another net, cost or optimizer than `module`, or can't be continued."""
    check_same_net(content, path, module)
    check_same("the optimizer", content["optimizer"], module.optimizer_in_words(), path)
    if not content.keys() >= NEEDED:
        raise InputError(f"expected all that a run needs to go on, but {path} holds parameters alone; use last.ckpt")


def check_same_net(content: Content, path: str, module: MLPModule) -> None:
    """Raise InputError if a checkpoint has another net or cost than `module`."""
    then, now = {**OFF, **content["hyper_parameters"]}, dict(module.hparams)
    check_same("members", then.get("members", 1), module.members, path)
    for name in now:
        if name not in FREE:
            check_same(name, then.get(name), now[name], path)


def check_same_size(content: Content, path: str, hidden: Any) -> None:
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
