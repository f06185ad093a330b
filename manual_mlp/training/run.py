"""Run what train.py was asked for, from the config to the summary."""

import inspect
import json
import logging
import os
import re
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, get_original_cwd
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateFinder, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from torch.optim import SGD, Optimizer
from torchmetrics import Metric

from manual_mlp.errors import InputError, shown
from manual_mlp.shell import command, override
from manual_mlp.training import config, continuing
from manual_mlp.training.callbacks import WholeFiles
from manual_mlp.training.closing import WIDTH, Run, closing, files, run_facts, summary
from manual_mlp.training.data import DataModule
from manual_mlp.training.folder import FIGURES, accepted, alone_in, check_places, disk_in_words, keep_configuration
from manual_mlp.training.module import MLPModule, read_training
from manual_mlp.training.pictures import learning_curves, leave_report
from manual_mlp.training.predict import predict_file
from manual_mlp.training.strategies import choose

log = logging.getLogger(__name__)

IRRELEVANT_ADVICE = (
    "does not have many workers",  # batches come from memory, workers would only copy them
    "could not find the monitored key",  # a run that ends before it was first validated; after that it is an error
    "is smaller than the logging interval",  # figures are logged once an epoch, however long it is
    "Experiment logs directory",  # a run folder holds Hydra's files before the logger comes
    "Checkpoint directory",
    "You requested to overfit but enabled",
    "callbacks used to create the checkpoint need to be provided",  # one with another figure begins anew
    "`isinstance(treespec, LeafSpec)` is deprecated",  # a matter between Lightning and torch
    "missing from font",  # a letter in a class name, shown as a box in the picture
)

TORCHS_THREADS = torch.get_num_threads()
MOST_THREADS = 1024  # more end the process in the middle of a product
SMALL_STEP = 5_000_000  # weights times rows: half a millisecond on one core, as much as Lightning takes for a step


def run(cfg: DictConfig) -> float | None:
    """Do what `task` says. Returns: the figure that `optimized_metric` names, None if the task does not measure it.

    train: train (with ckpt_path, go on), test, draw the curves, print the summary. test: the figures of a checkpoint.
    predict: a file of predictions for a file of new rows.
    """
    config.check(cfg)
    task = choose(cfg.task, {"train": _train, "test": _test, "predict": _predict}, "task")
    check_places(cfg)
    quieten()
    with in_words(cfg):
        if config.in_sweep() or (cfg.task != "train" and not Path(cfg.run_dir, ".hydra").exists()):
            keep_configuration(cfg)  # before what can still be refused, because a sweep compares that, too
        if cfg.task == "train" and config.in_sweep() and Path(cfg.run_dir).resolve() != _folder_of_this_run():
            raise InputError(
                f"expected each run of a sweep in a folder of its own, but got run_dir={cfg.run_dir}; leave it out, "
                "and choose the folder of all by hydra.sweep.dir=…"
            )
        return task(cfg)


def _folder_of_this_run() -> Path:
    return Path(HydraConfig.get().runtime.output_dir).resolve()


@contextmanager
def in_words(cfg: DictConfig) -> Iterator[None]:
    """Raise InputError for errors that an option, the disk or another process causes in other programs."""
    try:
        with disk_in_words(cfg):
            yield
    except InputError:
        raise
    except MisconfigurationException as error:  # Lightning's word for a wrong option
        given = cfg.trainer.accelerator
        fix = "correct them" if given in ("auto", "cpu") else f"trainer.accelerator=auto works without {given}"
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"expected options that Lightning accepts, but: {reason}; {fix}") from error
    except RuntimeError as error:
        if "without overflow" in str(error):  # torch could not make a number of its own out of it
            half = ", or take trainer.precision=32-true" if "Half" in str(error) or "BFloat16" in str(error) else ""
            raise InputError(
                f"expected numbers that the precision of the training can hold, but: {error}; lower optimizer.lr, or "
                f"what else is that large{half}"
            ) from error
        if "/gloo/" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        log.info("The words of torch:", exc_info=True)
        raise InputError(
            "expected all processes to live until the training ends, but another one has ended; what it had to say is "
            "printed above, or nothing if it was killed; go on with ckpt_path=…/last.ckpt"
        ) from error


def quieten() -> None:
    """Send Lightning's messages to Hydra's log file instead of the terminal; drop advice that is not to the point."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for advice in IRRELEVANT_ADVICE:
        warnings.filterwarnings("ignore", message=f".*{re.escape(advice)}")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡")  # Lightning's, for its cloud


def _set_threads(threads: int | str | None, module: MLPModule, data: DataModule) -> None:
    """Give torch its threads. auto: one, if a step is so small that sharing it costs more than it gives.

    On a busy machine the threads of a step wait for each other, and it takes a hundred times as long.
    """
    if threads == "auto":
        products = data.batch_size * sum(parameter.numel() for parameter in module.parameters())
        threads = 1 if products < SMALL_STEP else None
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise InputError(
            f"expected threads to be auto, a whole number from 1 to {MOST_THREADS}, or null, but got {threads!r}; "
            "correct it"
        )
    torch.set_num_threads(threads or TORCHS_THREADS)


def _train(cfg: DictConfig) -> float:
    content = None if cfg.ckpt_path is None else read_training(cfg.ckpt_path)
    if content is not None:
        continuing.check_same_size(content, cfg.ckpt_path, cfg.model.get("hidden"))
    data = _data(cfg)
    module = _module(cfg, data)
    _check_last_batch(module, data)
    _set_threads(cfg.threads, module, data)
    if cfg.optimized_metric not in module.figure_names():
        hint = config.likely(cfg.optimized_metric, module.figure_names())
        raise InputError(f"expected optimized_metric to be a logged figure, but got {cfg.optimized_metric}; {hint}")
    continuation = continuing.Continuation(cfg)
    trainer = _trainer(cfg, continuation)
    if getattr(trainer, f"limit_{_part(cfg)}_batches") == 0:
        raise _not_logged(cfg, f"trainer.limit_{_part(cfg)}_batches is 0")
    if content is not None:
        continuation.check(content, cfg.ckpt_path, module, data)
    module.backprop.check(trainer)
    first = trainer.node_rank == trainer.local_rank == 0
    with alone_in(Path(cfg.run_dir)) if first else nullcontext():
        return _trained(cfg, data, module, trainer, content)


def _trained(
    cfg: DictConfig, data: DataModule, module: MLPModule, trainer: L.Trainer, content: dict[str, Any] | None
) -> float:
    """Train, from a checkpoint if its content is given; test, and leave files → the optimized metric."""
    started = time.perf_counter()
    with continuing.restoring(cfg.ckpt_path):
        interrupted = _interrupted(trainer, module, data, cfg.ckpt_path)
    seconds = time.perf_counter() - started + (content["continuation"].get("seconds", 0.0) if content else 0.0)
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # the processes of the training can't
        keep_configuration(cfg)
    idle = content is not None and trainer.global_step == content["global_step"] and not interrupted
    stopped = trainer.should_stop
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    if interrupted and best is None:
        raise InputError("expected at least one whole epoch to keep, but training was interrupted before; start again")
    kept = read_training(best, module.device) if best else None
    epoch, figures = (kept["epoch"], kept["figures"]) if kept else (trainer.current_epoch - 1, _numbers(trainer))
    for writer in continuing.csv_writers(trainer):
        writer.kept = epoch
    folder = Path(cfg.run_dir)
    curves = learning_curves(folder, epoch) if trainer.is_global_zero else None

    if _part(cfg) == "val" and cfg.optimized_metric not in figures:  # no epoch was completed
        trainer.validate(module, data, verbose=False)
        figures |= _numbers(trainer)
    if not config.in_sweep() or _part(cfg) == "test":  # of a sweep, the winner alone is tested, at its end
        with continuing.restoring(best):
            trainer.test(module, data, ckpt_path=best, verbose=False)
        figures |= _numbers(trainer)
    if module.members > 1:  # the figures of the kept epochs, of which each member has its own
        with continuing.restoring(best):
            trainer.validate(module, data, ckpt_path=best, verbose=False)
        figures |= _numbers(trainer)
    if trainer.is_global_zero:
        left = {"metric": cfg.optimized_metric, "epoch": epoch, "seconds": seconds, "figures": figures}
        (folder / FIGURES).write_text(json.dumps(left, indent=2))
        if kept:  # after a test in other processes (ddp_spawn) the module here has another epoch's parameters
            module.load_state_dict(kept["state_dict"])
            module.take_kept()
        ended = Run(cfg, module, data, trainer, epoch, seconds, figures)
        facts = run_facts(ended)
        print(summary(ended, facts))
        seen = closing(ended)
        if cfg.report:
            _report(ended, curves, facts | ({"seen": seen} if seen else {}))
        print(files(folder))
        if seen:
            print(textwrap.fill(shown(seen), WIDTH) + "\n")
        if idle:
            early = "the run had stopped early; to go on, raise callbacks.early_stopping.patience"
            print(f"nothing was trained: {early if stopped else 'the run is over; to go on, raise trainer.max_epochs'}")
    if interrupted:
        last = os.path.relpath(folder / "last.ckpt", get_original_cwd() if HydraConfig.initialized() else None)
        print(f"interrupted; to go on: {command(override('ckpt_path', last))}")
        sys.exit(128 + signal.SIGINT)
    if cfg.optimized_metric not in figures:
        raise _not_logged(cfg, "nothing was trained")
    return figures[cfg.optimized_metric]


def _test(cfg: DictConfig) -> float | None:
    return tested(cfg).get(cfg.optimized_metric)


def tested(cfg: DictConfig) -> dict[str, float]:
    """Test a checkpoint, and print its summary → all its figures."""
    content = read_training(config.file_of(cfg, "ckpt_path"))
    data = _data(cfg)
    continuing.check_same_rows(content, cfg.ckpt_path, data)
    module = MLPModule.load_from_checkpoint(cfg.ckpt_path, metrics=_metrics(cfg, data))
    _set_threads(cfg.threads, module, data)
    trainer = _trainer(cfg)
    with continuing.restoring(cfg.ckpt_path):
        trainer.test(module, data, ckpt_path=cfg.ckpt_path, verbose=False)
    figures = content["figures"] | _numbers(trainer)
    if trainer.is_global_zero:
        ended = Run(cfg, module, data, trainer, content["epoch"], None, figures)
        print(summary(ended, run_facts(ended)))
        print(files(Path(cfg.run_dir)))
        accepted()
    return figures


def _predict(cfg: DictConfig) -> None:
    print(*predict_file(**config.given_to_predict(cfg)), sep="\n")


def _data(cfg: DictConfig) -> DataModule:
    data: DataModule = config.build(cfg.data)
    L.seed_everything(cfg.seed, verbose=False)
    data.setup()
    return data


def _interrupted(trainer: L.Trainer, module: MLPModule, data: DataModule, checkpoint: str | None) -> bool:
    """Train → True if Ctrl-C ended it, upon which Lightning would leave the program. SIGTERM does leave it."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except SIGTERMException:  # Lightning would exit with the code of a success
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning has switched off
        return True
    return False


def _report(*arguments: Any) -> None:
    """Leave a report. If that fails, say so in a sentence, and in full in the log file: the run is whole without it."""
    try:
        leave_report(*arguments)
    except Exception as error:
        log.info("The report failed.", exc_info=True)
        reason = f"{type(error).__name__}: {shown(error)}"
        print(f"\n  no report: {reason} (train.log says where; the rest of the run is complete)")


def _part(cfg: DictConfig) -> str:
    """Return train, val or test: the part on which the optimized metric is measured."""
    return cfg.optimized_metric.partition("_")[0]


def _not_logged(cfg: DictConfig, reason: str) -> InputError:
    return InputError(
        f"expected a figure for optimized_metric={cfg.optimized_metric}, but {reason}; change the one or the other"
    )


def _module(cfg: DictConfig, data: DataModule) -> MLPModule:
    module = config.build(cfg.model, _partial_=True)(
        input_size=data.input_size,
        output_size=data.output_size,
        class_names=list(data.class_names),
        target_mean=data.target_mean,
        target_scale=data.target_scale,
        image_shape=data.image_shape,
        metrics=_metrics(cfg, data),
        scheduler=_scheduler(cfg.get("scheduler")),
    )
    module.optimizer = _optimizer(cfg.optimizer, module)
    return module


def _check_last_batch(module: MLPModule, data: DataModule) -> None:
    rows, size = len(data.splits["train"]), data.batch_size
    if module.hparams["batch_norm"] and (rows % size == 1 or size == 1):
        raise InputError(
            f"expected two or more rows in each mini-batch for model.batch_norm=true, but {rows} rows leave one for "
            f"the last of {size}; take another data.batch_size"
        )


def _metrics(cfg: DictConfig, data: DataModule) -> dict[str, Metric]:
    """Make metrics of torchmetrics, by name; one for classes is given their number."""
    given = {"task": "multiclass", "num_classes": len(data.class_names)} if data.class_names else {}
    return _built(cfg, "metrics", Metric, given)


def _scheduler(node: DictConfig | None) -> dict[str, Any] | None:
    """Return Lightning's part of the configuration, and the rest as a partial that takes the optimizer."""
    if node is None:
        return None
    options = cast(dict, OmegaConf.to_container(node, resolve=True))
    lightnings = {key: options.pop(key) for key in config.SCHEDULE if key in options}
    if lightnings.get("interval", "epoch") not in ("epoch", "step"):
        raise InputError(f"expected scheduler.interval to be epoch or step, but got {node.interval}; correct it")
    return {**lightnings, "scheduler": config.build(OmegaConf.create(options))}


def _optimizer(node: DictConfig, module: MLPModule) -> partial[Optimizer]:
    options = config.optimizer_options(cast(dict, OmegaConf.to_container(node, resolve=True)))
    optimizer = config.build(OmegaConf.create(options))
    if optimizer.func is SGD:
        optimizer.keywords.setdefault("lr", module.default_lr())
    return optimizer


def _built(cfg: DictConfig, group: str, kind: Any, given: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Make what the keys of a group name, with what is `given` as far as it takes it; null leaves one out."""
    made = {}
    for name, node in (cfg.get(group) or {}).items():
        if node is None:
            continue
        known = inspect.signature(get_object(node._target_)).parameters
        arguments = {key: value for key, value in (given or {}).items() if key in known and key not in node}
        made[str(name)] = thing = config.build(node, **arguments)
        if not isinstance(thing, kind):
            raise InputError(
                f"expected {group}.{name}._target_ to make a {kind.__name__}, but got {thing!r}; name its class, or "
                f"leave it out with {group}.{name}=null"
            )
    return made


def _trainer(cfg: DictConfig, continuation: continuing.Continuation | None = None) -> L.Trainer:
    callbacks = [*_built(cfg, "callbacks", Callback).values()]
    unwanted: tuple[type, ...] = () if cfg.trainer.enable_progress_bar else (ProgressBar,)
    unwanted += () if cfg.trainer.enable_checkpointing else (Checkpoint,)
    unwanted += () if cfg.ckpt_path is None else (LearningRateFinder,)  # it has searched before the first step
    callbacks = [callback for callback in callbacks if not isinstance(callback, unwanted)]
    callbacks += [continuation or continuing.Continuation(cfg)]  # the last one: it sets the random states
    logger = [*_built(cfg, "logger", Logger).values()]
    try:
        plugins = [WholeFiles()]
        trainer = config.build(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=logger, plugins=plugins)
    except ValueError as error:
        raise InputError(
            f"expected options that Lightning's Trainer accepts, but: {error}; correct trainer.*"
        ) from error
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:  # it would hang
        raise InputError(
            f"expected trainer.devices of at most {cores}, as the CPU has that many cores, "
            f"but got {cfg.trainer.devices}; lower it"
        )
    by_script = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
    if config.in_sweep() and by_script and trainer.world_size > 1:
        raise InputError(  # each process would begin the whole sweep again
            f"expected a sweep (-m) in one process, but trainer.strategy={cfg.trainer.strategy} runs this command line "
            f"in {trainer.world_size}; use trainer.strategy=ddp_spawn or trainer.devices=1"
        )
    return trainer


def _numbers(trainer: L.Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items()}
