"""Train a multi-layer perceptron. `python train.py --help` explains itself."""

import os

import hydra
from omegaconf import DictConfig

from manual_mlp.training.config import one_sentence

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us, instead of Hydra printing its own excerpt


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    with one_sentence():
        from manual_mlp.training.run import run  # Lightning takes seconds to import; --help need not wait for it

        return run(cfg)


if __name__ == "__main__":
    with one_sentence():
        main()
