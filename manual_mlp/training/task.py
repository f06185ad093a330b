"""Steps that come before each task, and the task predict, which needs neither Lightning nor scikit-learn."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

from manual_mlp.errors import InputError
from manual_mlp.training.commands import for_the_shell, override
from manual_mlp.training.config import check, check_value, in_sweep
from manual_mlp.training.folder import keep_configuration

# Errors of a full disk, a quota, a lost folder or a lost right.
NAMES = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "EACCES", "EROFS")
NOT_WRITTEN = {getattr(errno, name) for name in NAMES}
PLAIN = ["task", "ckpt_path", "input", "output", "run_dir", "seed", "report", "optimized_metric"]


def predict(cfg: DictConfig) -> None:
    """Write a file of predictions for a file of new rows, and print where it is."""
    from manual_mlp.training.predict import predict_file  # brings torch
    from manual_mlp.training.readers import MAX_BYTES

    check(OmegaConf.masked_copy(cfg, PLAIN))
    max_bytes = OmegaConf.select(cfg, "data.source.max_bytes", default=MAX_BYTES)
    check_value(max_bytes, float, "data.source.max_bytes")
    check_places(cfg)
    with disk_in_words(cfg):
        print(*predict_file(given(cfg, "ckpt_path"), given(cfg, "input"), cfg.output, max_bytes), sep="\n")


def begin(cfg: DictConfig) -> None:
    """Keep the configuration of a task that can't be refused later, or that is to be compared with others."""
    if in_sweep() or (cfg.task != "train" and not Path(cfg.run_dir, ".hydra").exists()):
        keep_configuration(cfg)


def given(cfg: DictConfig, key: str) -> str:
    if cfg[key] is None:
        raise InputError(f"expected {key}=… for task={cfg.task}, but got none; name the file")
    return str(cfg[key])


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
