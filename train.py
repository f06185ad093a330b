"""Train a multi-layer perceptron. `python train.py --help` explains itself."""

import os
import sys
from contextlib import nullcontext

import hydra
from omegaconf import DictConfig

from manual_mlp.pipes import while_read
from manual_mlp.training.config import in_sweep, one_sentence
from manual_mlp.training.resume import with_its_own_overrides

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us, instead of Hydra printing its own excerpt


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    with (
        while_read(),
        nullcontext() if in_sweep() else one_sentence(),
    ):  # a sweep goes on; Comparison prints the sentence
        from manual_mlp.training.run import run  # Lightning takes seconds to import; --help need not wait for it

        return run(cfg)


if __name__ == "__main__":
    with while_read(), one_sentence():
        sys.argv[1:] = with_its_own_overrides(sys.argv[1:])
        main()
