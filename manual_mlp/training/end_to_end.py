"""Time whole trainings for the benchmark: each backprop of `train.py`, a plain loop of torch, Lightning alone."""

import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from manual_mlp import functional
from manual_mlp.modules import MLP
from manual_mlp.training.config import CONF, build
from manual_mlp.training.data import DataModule
from manual_mlp.training.run import FIGURES, quieten, run
from manual_mlp.training.strategies import BACKPROP

EXPERIMENT = ("experiment=nielsen_fashion", "trainer.max_epochs=5")
PLAIN, LIGHTNING = "eager torch", "Lightning alone"


def trainings(*overrides: str) -> tuple[int, dict[str, Callable[[], float]]]:
    """Return the number of steps, and by name a call that trains anew and returns the seconds of the training alone.

    overrides: for train.py's config, with sigmoids, the quadratic cost and plain SGD.
    """
    cfg = _config(*overrides)
    data: DataModule = build(cfg.data)
    data.setup()
    steps = cfg.trainer.max_epochs * -(-len(data.splits["train"]) // data.batch_size)
    each: dict[str, Callable[[], float]] = {PLAIN: partial(_plain, cfg, data), LIGHTNING: partial(_alone, cfg, data)}
    each |= {f"train.py {name}": partial(_train_py, *overrides, f"backprop={name}") for name in BACKPROP}
    return steps, each


def _config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["threads=1", "report=false", *overrides])


def _train_py(*overrides: str) -> float:
    """Train with all that a run does: progress bar, figures, validation, checkpoints, CSV; time no reading of data."""
    with TemporaryDirectory() as folder, (Path(folder) / "terminal").open("w") as terminal:
        with redirect_stdout(terminal):
            run(_config(*overrides, f"run_dir='{folder}'"))
        return json.loads((Path(folder) / FIGURES).read_text())["seconds"]


def _plain(cfg: DictConfig, data: DataModule) -> float:
    """Take the same steps and nothing else: no figures, no validation, no files."""
    torch.set_num_threads(cfg.threads)
    net = MLP([data.input_size, *cfg.model.hidden, data.output_size]).to_torch()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    features, target = data.splits["train"].features, torch.eye(data.output_size)[data.splits["train"].target]
    # nn.MSELoss is 2/m times the quadratic cost, so m/2 times the learning rate gives the same step
    loss = nn.MSELoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=cfg.optimizer.lr * data.output_size / 2, fused=True)
    started = time.perf_counter()
    for _ in range(cfg.trainer.max_epochs):
        for rows in torch.randperm(len(features)).split(data.batch_size):
            optimizer.zero_grad()
            loss(net(features.index_select(0, rows)), target.index_select(0, rows)).backward()
            optimizer.step()
    return time.perf_counter() - started


class _Alone(L.LightningModule):
    """The layers and the quadratic cost: `backprop=layers` without figures, validation and files."""

    def __init__(self, cfg: DictConfig, data: DataModule) -> None:
        super().__init__()
        self.net = MLP([data.input_size, *cfg.model.hidden, data.output_size])
        self.targets, self.lr = torch.eye(data.output_size), cfg.optimizer.lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        features, target = batch
        return functional.quadratic_loss(self.net(features), self.targets[target])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def _alone(cfg: DictConfig, data: DataModule) -> float:
    """Take the same steps with a Trainer that has everything off."""
    quieten()
    torch.set_num_threads(cfg.threads)
    trainer = L.Trainer(max_epochs=cfg.trainer.max_epochs, accelerator="cpu", barebones=True)
    module = _Alone(cfg, data)
    started = time.perf_counter()
    trainer.fit(module, data.train_dataloader())
    return time.perf_counter() - started
