"""The four ways of `backprop` through Lightning: same figures and parameters, steps counted right, the rest refused."""

import copy
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from manual_mlp import BackpropEngine, InputError
from manual_mlp.training import end_to_end
from manual_mlp.training import run as training
from manual_mlp.training.module import MLPModule
from manual_mlp.training.strategies import MOST_BATCHES
from tests.configs import configured

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{advice}")
    for advice in ("does not have many workers", "LeafSpec", "validation_step", "smaller than the logging interval")
]
BATCH = 4  # iris: 27 mini-batches an epoch, the last one of a single row
EPOCHS = 3


def trained(folder: Path, *overrides: str) -> dict[str, Any]:
    """The last checkpoint of such a run on iris, in float64."""
    common = ["data=iris", f"data.batch_size={BATCH}", f"trainer.max_epochs={EPOCHS}", "trainer.precision=64-true"]
    training.run(configured(folder, *common, *overrides))
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_same_training(ours: dict[str, Any], layers: dict[str, Any]) -> None:
    """Parameters, figures, and what the optimizer keeps: a step taken twice would show in each."""
    for key in ("state_dict", "optimizer_states"):
        # Adam counts in the default dtype, which is float64 only where Lightning runs the engine.
        torch.testing.assert_close(ours[key], layers[key], rtol=1e-10, atol=1e-10, check_dtype=False)
    assert ours["figures"] == pytest.approx(layers["figures"], rel=1e-6)  # they are summed in float32


class TestSameTraining:
    @pytest.mark.parametrize(
        "options",
        [
            ["optimizer.lr=1.0", "optimizer.weight_decay=0.01", "model.dropout=0.3"],
            ["optimizer.lr=0.5", "optimizer.momentum=0.9", "+optimizer.nesterov=true"],
            ["optimizer=adam", "optimizer.weight_decay=0.1", "trainer.gradient_clip_val=0.05"],
            ["optimizer=adamw", "model.loss=cross_entropy", "model.activation=gelu"],
            ["optimizer=adam", "model.residual=true", "model.hidden=[5,5,5]", "model.dropout=0.3"],
            ["optimizer.lr=1.0", "trainer.gradient_clip_val=0.05"],
        ],
        ids=["sgd", "momentum", "adam", "adamw", "residual", "clipped"],
    )
    def test_engine_updates_as_the_optimizer(self, tmp_path: Path, options: list[str]) -> None:
        layers, engine = (trained(tmp_path / way, f"backprop={way}", *options) for way in ("layers", "engine"))
        assert_same_training(engine, layers)
        for state in engine["optimizer_states"][0]["state"].values():
            assert state.get("step", 27 * EPOCHS) == 27 * EPOCHS
        assert (layers["global_step"], engine["global_step"]) == (27 * EPOCHS, EPOCHS)  # one block an epoch

    def test_network_with_clipping_and_accumulation(self, tmp_path: Path) -> None:
        options = ["trainer.gradient_clip_val=0.05", "trainer.accumulate_grad_batches=2", "optimizer=adam"]
        layers, network = (trained(tmp_path / way, f"backprop={way}", *options) for way in ("layers", "network"))
        assert_same_training(network, layers)
        assert network["global_step"] == layers["global_step"]

    def test_several_blocks_an_epoch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("manual_mlp.training.strategies.MOST_BATCHES", 5)
        layers, engine = (trained(tmp_path / way, f"backprop={way}", "optimizer=adam") for way in ("layers", "engine"))
        assert_same_training(engine, layers)
        assert engine["global_step"] == 6 * EPOCHS

    @pytest.mark.parametrize(
        "option",
        [
            "trainer.max_steps=31",
            "trainer.limit_train_batches=5",
            "trainer.overfit_batches=3",
            "+trainer.val_check_interval=9",
        ],
    )
    def test_an_option_that_counts_counts_mini_batches(self, tmp_path: Path, option: str) -> None:
        layers, engine = (trained(tmp_path / way, f"backprop={way}", option) for way in ("layers", "engine"))
        assert_same_training(engine, layers)
        assert engine["global_step"] == layers["global_step"]

    def test_early_stopping_best_and_last(self, tmp_path: Path) -> None:
        options = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=20"]
        options += ["trainer.max_epochs=20"]
        layers, engine = (trained(tmp_path / way, f"backprop={way}", *options) for way in ("layers", "engine"))
        assert_same_training(engine, layers)
        best = [torch.load(tmp_path / way / "best.ckpt", weights_only=True)["epoch"] for way in ("layers", "engine")]
        assert layers["epoch"] == engine["epoch"] < 19
        assert best[0] == best[1] < layers["epoch"]

    def test_bfloat16_products(self, tmp_path: Path) -> None:
        options = ["trainer.precision=bf16-mixed", "model.loss=cross_entropy", "optimizer.lr=0.1"]
        layers, engine = (trained(tmp_path / way, f"backprop={way}", *options) for way in ("layers", "engine"))
        assert all(weight.dtype == torch.float32 for weight in engine["state_dict"].values())
        # Both round products to 8 bits, though not at the same places.
        assert engine["figures"]["val_loss"] == pytest.approx(layers["figures"]["val_loss"], rel=0.05)


def test_going_on_another_way(tmp_path: Path) -> None:
    """After an epoch, yes; in the middle of one the blocks of the engine would not begin where the layers stopped."""
    options = ["optimizer=adam", "+callbacks.last.every_n_train_steps=10"]
    trained(tmp_path, "trainer.max_epochs=2", *options)
    with pytest.raises(InputError, match=r"training steps of 4 rows, .* but got 512; go on with its own backprop"):
        trained(tmp_path, f"ckpt_path={tmp_path / 'last.ckpt'}", "backprop=engine", *options)

    trained(tmp_path / "whole", "trainer.max_epochs=2", "optimizer=adam")
    for way in ("layers", "engine"):
        (tmp_path / way).mkdir()
        shutil.copy(tmp_path / "whole" / "last.ckpt", tmp_path / way / "before.ckpt")
    layers, engine = (
        trained(tmp_path / way, f"ckpt_path={tmp_path / way / 'before.ckpt'}", f"backprop={way}", "optimizer=adam")
        for way in ("layers", "engine")
    )
    assert_same_training(engine, layers)
    assert layers["global_step"] == 27 * 3


class Scheduled(MLPModule):
    """With a schedule: what a config gives it is tested elsewhere."""

    def __init__(self, make: Any, options: dict[str, Any], **arguments: Any) -> None:
        super().__init__(4, 3, "abc", hidden=[5], **arguments)
        self.make, self.options = make, options

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler: LRScheduler = self.make(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.options}}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (partial(OneCycleLR, max_lr=2.0, total_steps=27 * EPOCHS + 1), {"interval": "step"}),
        (partial(StepLR, step_size=3, gamma=0.5), {"interval": "step", "frequency": 4}),
        (partial(StepLR, step_size=1, gamma=0.5), {"interval": "epoch"}),
        (partial(ReduceLROnPlateau, patience=0, threshold=10.0), {"interval": "epoch", "monitor": "val_loss"}),
    ],
    ids=["step", "every fourth step", "epoch", "plateau"],
)
def test_schedules(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    ends = []
    for way in ("layers", "engine"):
        torch.manual_seed(0)
        optimizer = partial(torch.optim.SGD, lr=1.0)
        module = Scheduled(make, options, backprop=way, optimizer=optimizer)
        cfg = configured(tmp_path / way, "data=iris", f"data.batch_size={BATCH}", f"trainer.max_epochs={EPOCHS}")
        training._trainer(cfg).fit(module, training.config.build(cfg.data))
        ends.append((module.net.state_dict(), module.trainer.optimizers[0].param_groups[0]["lr"]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    assert ends[0][1] != 1.0


class TestOutsideTrainPy:
    """MLPModule with a Trainer and a DataLoader of one's own."""

    def fit(self, backprop: str, **options: Any) -> MLPModule:
        torch.manual_seed(0)
        rows = TensorDataset(torch.randn(30, 4), torch.randint(0, 3, (30,)))
        module = MLPModule(4, 3, "abc", backprop=backprop, optimizer=partial(torch.optim.Adam, lr=0.01))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet, **options)
        trainer.fit(module, DataLoader(rows, batch_size=7))
        return module

    def test_a_batch_is_a_step(self) -> None:
        layers, engine = self.fit("layers"), self.fit("engine")
        torch.testing.assert_close(engine.state_dict(), layers.state_dict(), rtol=1e-5, atol=1e-6)
        assert engine.trainer.global_step == layers.trainer.global_step == 2 * 5
        pickle.dumps(engine.net)
        copy.deepcopy(engine.backprop)

    def test_accumulation_by_a_callback_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"accumulate_grad_batches=1 for backprop=engine, .* but got 2"):
            self.fit("engine", callbacks=[GradientAccumulationScheduler({1: 2})])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.devices=2", "trainer.strategy=ddp_spawn"], r"one process .* but got DDPStrategy; set trainer.devic"),
        (["trainer.precision=16-true"], r"precision to be one of 32-true, .* but got 16-true; .*backprop=network"),
        (["trainer.accumulate_grad_batches=2"], r"accumulate_grad_batches=1 .* but got 2; raise data.batch_size"),
        (["trainer.gradient_clip_val=1", "+trainer.gradient_clip_algorithm=value"], r"by their norm .*=value; leave"),
        (["optimizer._target_=torch.optim.RMSprop"], r"SGD, Adam or AdamW; got RMSprop; or take backprop=network"),
    ],
)
def test_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], sentence: str
) -> None:
    monkeypatch.setattr(BackpropEngine, "step", None)
    with pytest.raises(InputError, match=sentence):
        trained(tmp_path, "backprop=engine", "trainer.accelerator=cpu", *overrides)


def test_a_block_is_bounded() -> None:
    def block(batch_size: int, inputs: int, *hidden: int) -> int:
        module = MLPModule(inputs, 10, "abcdefghij", hidden=hidden, backprop="engine")
        module.trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
        return module.batches_per_step(batch_size)

    assert block(10, 784, 30) == MOST_BATCHES
    assert 1 < block(64, 784, 256, 128) < MOST_BATCHES  # of 0.6 ms each
    assert block(512, 1024, 1024, 1024, 1024) == 1
    assert block(1000, 784, 1) == 1  # 3 MB of inputs each


def test_end_to_end_benchmark_trains_the_same_steps() -> None:
    overrides = ["data=iris", "trainer.max_epochs=1", "optimizer.lr=1.0", f"data.batch_size={BATCH}"]
    steps, trainings = end_to_end.trainings(*overrides)
    assert steps == 27
    assert [name.split()[-1] for name in trainings] == ["torch", "alone", "layers", "network", "engine", "autograd"]
    assert all(0 < trainings[name]() < 60 for name in ("eager torch", "Lightning alone", "train.py engine"))
