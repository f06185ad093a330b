"""Decide what a run that goes on takes: settings from its configuration, accumulated states from the checkpoint.

A checkpoint holds the configuration of its run. A setting that differs now is honoured, or refused.
"""

import inspect
import json
import warnings
from functools import partial
from pydoc import locate
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manual_mlp.checkpoint import PLAIN
from manual_mlp.errors import InputError
from manual_mlp.training.checkpoints import check_same
from manual_mlp.training.data import DataModule
from manual_mlp.training.folder import accepted, keep_configuration
from manual_mlp.training.module import MLPModule, unfit

Content = dict[str, Any]
MOST_STEPS = 10**7  # that a new schedule takes at once, in about a minute
STEPS: tuple[str, ...] = ("data.batch_size", "data.class_weight", "trainer.precision", "trainer.limit_train_batches")
STEPS += ("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.accumulate_grad_batches")
SEEN = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # ReduceLROnPlateau's, about its figure


class Precedence(Callback):
    """A callback that keeps the configuration in checkpoints, and lets it win over the states in a checkpoint."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        here = OmegaConf.merge(cfg, {"run_dir": "."})  # a checkpoint holds no absolute path
        nodes = OmegaConf.select(here, "callbacks") or {}
        self.callbacks = {
            name: _plain(OmegaConf.to_container(node, resolve=True)) for name, node in nodes.items() if node
        }
        self.steps = {name: str(OmegaConf.select(cfg, name)) for name in STEPS}
        self.changed: list[str] = []  # settings of which earlier steps had others, so no one command gives this net
        self.old: Content | None = None  # the state of a schedule that has other settings now

    def configured(self, module: MLPModule) -> Content:
        """Return {"optimizer": …, "scheduler": … or None, "callbacks": {name: …}, …} as plain values."""
        assert module.optimizer is not None
        schedule = None
        if module.scheduler is not None:
            options = {name: value for name, value in module.scheduler.items() if name != "scheduler"}
            schedule = {"interval": "epoch", "monitor": None, **options, **_arguments(module.scheduler["scheduler"])}
        made = {"optimizer": _arguments(module.optimizer), "scheduler": schedule, "callbacks": self.callbacks}
        return {**made, "steps": self.steps, "changed": self.changed}

    def take_found_step(self, content: Content, path: str, module: MLPModule) -> None:
        """Set lr to the one that LearningRateFinder found. Raises InputError for a finder that has not searched."""
        for name in self._names(LearningRateFinder):
            then = content.get("configured", {"callbacks": {}})
            check_same(f"callbacks.{name}", then["callbacks"].get(name), self.callbacks[name], path)
            module.lr = then["optimizer"].get("lr")

    def check(self, content: Content, path: str, module: MLPModule, data: DataModule) -> None:
        """Raise InputError for settings that differ from a checkpoint's and can't be honoured any more."""
        then: Any = content.get("configured")
        now = self.configured(module)
        standardised = bool(content.get("DataModule", {}).get("feature_mean"))
        check_same("data.standardise", standardised, bool(data.feature_mean), path)
        for name, value in now["optimizer"].items() if then else ():
            check_same(f"optimizer.{name}", then["optimizer"].get(name), value, path)
        if now["scheduler"] and now["scheduler"]["interval"] == "step":  # nobody has counted steps for another one
            interval = then["scheduler"] and then["scheduler"].get("interval") if then else "step"
            check_same("scheduler.interval", interval if content["lr_schedulers"] else None, "step", path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Content) -> None:
        checkpoint["configured"] = self.configured(pl_module)  # type: ignore[arg-type]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Content) -> None:
        """Change the states that the callbacks and the schedule are about to take."""
        if trainer.state.fn != "fit":
            return
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

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.old is not None:
            _reschedule(trainer, pl_module, self.old)
            self.old = None
        pl_module.backprop.choose_road()  # may refuse
        if trainer.is_global_zero:  # nothing can be refused any more
            accepted()
            road = {"native": pl_module.backprop.road == "native"} if pl_module.backprop.road else {}  # the one taken
            keep_configuration(OmegaConf.merge(self.cfg, road))  # type: ignore[arg-type]

    def _names(self, kind: type[Callback]) -> list[str]:
        """Return the names of the callbacks of this kind."""
        classes = {name: locate(str(node.get("_target_"))) for name, node in self.callbacks.items()}
        return [name for name, found in classes.items() if inspect.isclass(found) and issubclass(found, kind)]


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
