"""The folder of a run: one training at a time writes to it, and its .hydra is the configuration of that one."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from manual_mlp.checkpoint import write_whole
from manual_mlp.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


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
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir, ".hydra")
    folder.mkdir(exist_ok=True)
    whole = HydraConfig.instance().cfg
    for name, content in {"config": cfg, "hydra": whole, "overrides": hydra.overrides.task}.items():
        write_whole(folder / f"{name}.yaml", OmegaConf.to_yaml(content).encode())
