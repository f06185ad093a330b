"""The folder of a run: one training at a time writes to it, and its .hydra is the configuration of that one.

A run that is refused leaves no folder that it has made itself, nor does one whose result lies elsewhere. Files go one
by one, folders only if they are empty. Lost places and full disks end in a sentence.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

from manual_mlp.errors import InputError
from manual_mlp.shell import for_the_shell, override

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

FIGURES = "figures.json"  # what a run leaves for programs: {"metric": …, "figures": {name: value}, …}
# What a run has written before anything is trained.
FIRST = {Path(name) for name in (".lock", "train.log", "multirun.yaml")}
FIRST |= {Path(".hydra", f"{name}.yaml") for name in ("config", "hydra", "overrides")}
# Errors of a full disk, a quota, a lost folder or a lost right.
NAMES = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "EACCES", "EROFS")
NOT_WRITTEN = {getattr(errno, name) for name in NAMES}
_made: list[Path] = []  # the folders that this run makes, the innermost first


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a folder until the block ends, or the process, in whatever way.

    Raises InputError if another one is there, OSError if the folder can't be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise InputError(
            f"expected a folder that no other run writes to, but one trains in {folder} just now; "
            "wait for its end, or choose another folder with hydra.run.dir=…"
        ) from error
    except OSError:  # some file systems know no locks
        log.info("No lock keeps other runs out of %s.", folder, exc_info=True)
    try:
        yield
    finally:
        os.close(file)


def keep_configuration(cfg: DictConfig) -> None:
    """Write .hydra/*.yaml as Hydra would, but only now: Hydra writes it before the run is accepted.

    So a refused run changes nothing in the configuration of another run in the same folder.
    """
    from manual_mlp.checkpoint import write_whole  # brings torch, which a refused sweep need not wait for

    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    own = hydra.runtime.output_dir if hydra.mode == RunMode.MULTIRUN else cfg.run_dir
    folder = Path(own, ".hydra")
    if folder.is_symlink():
        raise InputError(f"expected a folder of its own for the run, but {folder} is a link; choose another run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    whole = HydraConfig.instance().cfg
    for name, content in {"config": cfg, "hydra": whole, "overrides": hydra.overrides.task}.items():
        write_whole(folder / f"{name}.yaml", OmegaConf.to_yaml(content).encode())


def check_places(cfg: DictConfig) -> None:
    """Raise InputError for a relative path that leads nowhere because Hydra has changed the working folder."""
    for key in ("ckpt_path", "input", "data.source.path", "data.source.folder"):
        path = OmegaConf.select(cfg, key)
        if HydraConfig.initialized() and HydraConfig.get().job.chdir and path and not os.path.exists(path):
            raise InputError(
                f"expected {key} to lead to a file, but there is no {path} in {os.getcwd()}, where the run looks "
                f"because of hydra.job.chdir=true; write {for_the_shell(override(key, Path(get_original_cwd(), path)))}"
            )


@contextmanager
def disk_in_words(cfg: DictConfig) -> Iterator[None]:
    """Raise InputError for errors of the disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        raise InputError(
            f"expected an output folder that can be written, but {error.filename or cfg.run_dir} can't be "
            f"({error.strerror}); make room, or bring the folder back: checkpoints already there are whole, go on from "
            "one with ckpt_path=…/last.ckpt"
        ) from error


class Made(Callback):
    """A callback that takes down which folders a run is about to make."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _take_down(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _take_down(config, "hydra.sweep.dir")


def accepted() -> None:
    """Forget the folders: the run has begun, and what it leaves is a result."""
    _made.clear()


@contextmanager
def nothing_but_results() -> Iterator[None]:
    """Remove the folders that a run has made if it has left no result in them; keep what a bug or a signal left."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            _remove(*_made)
        raise
    _remove(*_made)


def _take_down(config: DictConfig, key: str) -> None:
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)  # the folder's name may refer to it
    folder = Path(OmegaConf.select(config, key)).absolute()
    hydra.cfg = before
    _made[:] = [path for path in (folder, *folder.parents) if not path.exists()]


def _remove(*made: Path) -> None:
    """Remove a run's first files if there are no others and no other run is in their folder; then the empty folders."""
    if not made or not made[0].is_dir():
        return
    first, inner = {made[0] / path for path in FIRST}, sorted(made[0].rglob("*"), reverse=True)
    if not {path for path in inner if path.is_symlink() or not path.is_dir()} <= first:
        return
    try:
        with alone_in(made[0]):
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == made[0]:
                    handler.close()  # Windows removes no open file
            for path in first:
                path.unlink(missing_ok=True)
    except InputError:  # another run makes the same folder
        return
    for path in (*inner, *made):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
