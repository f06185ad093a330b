"""The command line of a training: compose the configuration, run the task. `train.py --help` explains itself."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import hydra
from omegaconf import DictConfig, OmegaConf

from manual_mlp.pipes import is_watched, while_read
from manual_mlp.training.commands import command
from manual_mlp.training.config import CONF, in_sweep, one_sentence
from manual_mlp.training.folder import nothing_but_results
from manual_mlp.training.resume import with_its_own_overrides
from manual_mlp.training.task import predict

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us, instead of Hydra printing its own excerpt
OmegaConf.register_new_resolver("program", command, replace=True)  # for --help


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> float | None:
    # a sweep goes on; Comparison prints the sentence
    with while_read(), nullcontext() if in_sweep() else one_sentence():
        if cfg.task == "predict":
            predict(cfg)
            return None
        if not is_watched():
            os.environ.setdefault("TQDM_DISABLE", "1")  # Lightning's search for a step draws a bar of its own
        from manual_mlp.training.run import run  # Lightning takes seconds to import; --help need not wait for it

        return run(cfg)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the task of a command line, that of this process by default; leave the program if it is refused."""
    with while_read(), nothing_but_results(), one_sentence():
        sys.argv[1:] = with_its_own_overrides([*(sys.argv[1:] if arguments is None else arguments)])
        job()
