"""What is written beside `ckpt_path` wins over the states in the checkpoint, or is refused in a sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from manual_mlp import InputError
from manual_mlp.checkpoint import read_checkpoint
from manual_mlp.training import run as training
from manual_mlp.training.module import MLPModule
from manual_mlp.training.strategies import BACKPROP
from tests.configs import configured

QUICK = ["data=iris", "threads=1", "optimizer.lr=1", "trainer.max_epochs=3"]
Trained = tuple[Path, list[float], DictConfig]  # its folder, the step at the start of each epoch, the configuration


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """The folders of runs that are over, by their overrides; not to be written to."""
    return {}


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch, kept) -> Callable[..., Trained]:
    """run(*overrides) trains in the folder r."""
    seen: list[float] = []
    monkeypatch.setattr(training, "learning_curves", lambda *arguments: None)
    monkeypatch.setattr(
        MLPModule, "on_train_epoch_start", lambda self: seen.append(self.optimizers().param_groups[0]["lr"])
    )

    def train(*overrides: str) -> Trained:
        seen.clear()
        cfg = configured(tmp_path / "r", *QUICK, *overrides)
        training.run(cfg)
        return tmp_path / "r", list(seen), cfg

    return train


@pytest.fixture
def before(run, kept, tmp_path: Path, tmp_path_factory) -> Callable[..., Path]:
    """before(*overrides): as run, but once for all tests → the folder r."""

    def train(*overrides: str) -> Path:
        if overrides not in kept:
            kept[overrides] = tmp_path_factory.mktemp("kept") / "r"
            run(*overrides)
            (tmp_path / "r").rename(kept[overrides])
        shutil.copytree(kept[overrides], tmp_path / "r", dirs_exist_ok=True)
        return tmp_path / "r"

    return train


@pytest.fixture
def on(run, tmp_path: Path) -> Callable[..., Trained]:
    """on(*overrides): as run, from the last checkpoint in r."""
    return lambda *overrides: run(f"ckpt_path={tmp_path}/r/last.ckpt", "trainer.max_epochs=6", *overrides)


def from_the_start(cfg: DictConfig, epochs: int, steps: int = 1) -> tuple[list[float], dict]:
    """The step at the start of each epoch, if the schedule is this one all the time, and the group of parameters."""
    optimizer = training._optimizer(cfg.optimizer, SimpleNamespace(default_lr=float))(
        [torch.nn.Parameter(torch.zeros(1))]
    )
    made = training._scheduler(cfg.get("scheduler"))
    schedule = made["scheduler"](optimizer) if made else None
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for _ in range(steps if schedule else 0):
            schedule.step()
    return found, optimizer.param_groups[0]


def content(folder: Path) -> dict:
    return read_checkpoint(folder / "last.ckpt")


def state(folder: Path, name: str) -> dict:
    """The state of the callback whose key begins with the name."""
    return next(value for key, value in content(folder)["callbacks"].items() if key.startswith(name))


COSINE, STEP = "scheduler=cosine", "scheduler=step"
ONE_CYCLE = ["scheduler=cosine", "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "~scheduler.T_max"]
ONE_CYCLE += ["scheduler.interval=step", "+scheduler.max_lr=1", "optimizer.momentum=0.5"]
MILESTONES = ["scheduler=step", "scheduler._target_=torch.optim.lr_scheduler.MultiStepLR", "~scheduler.step_size"]
CHANGES = {
    "longer": ([COSINE], [COSINE]),
    "T_max": ([COSINE, "scheduler.T_max=9"], [COSINE, "scheduler.T_max=4"]),
    "eta_min": ([COSINE, "scheduler.T_max=6"], [COSINE, "scheduler.T_max=6", "+scheduler.eta_min=0.5"]),
    "step_size": ([STEP, "scheduler.step_size=1"], [STEP, "scheduler.step_size=2"]),
    "gamma": ([STEP, "scheduler.step_size=1"], [STEP, "scheduler.step_size=1", "scheduler.gamma=0.5"]),
    "another": ([COSINE], [STEP, "scheduler.step_size=4"]),
    "now one": ([], [COSINE]),
    "none any more": ([STEP, "scheduler.step_size=1"], []),
    "no plateau any more": (["scheduler=plateau", "scheduler.patience=0", "+scheduler.threshold=10"], [COSINE]),
    "max_lr": (
        [*ONE_CYCLE, "+scheduler.total_steps=66"],
        [*ONE_CYCLE, "+scheduler.total_steps=70", "scheduler.max_lr=2", "+scheduler.div_factor=50"],
    ),
    "milestones": ([*MILESTONES, "+scheduler.milestones=[1,2]"], [*MILESTONES, "+scheduler.milestones=[2,4]"]),
    "the same": ([COSINE, "scheduler.T_max=6"], [COSINE, "scheduler.T_max=6"]),
}  # fmt: skip


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


QUICKLY = ("longer", "another", "none any more", "max_lr")


class TestSchedules:
    @pytest.mark.parametrize("change", [change if change in QUICKLY else slow(change) for change in CHANGES])
    def test_as_if_from_the_start(self, before, on, change: str) -> None:
        """The steps after the third epoch are those of a run that was never another one, to the bit."""
        then, now = CHANGES[change]
        before(*then)
        folder, found, cfg = on(*now)
        expected, group = from_the_start(cfg, 6, 11 if "interval=step" in str(now) else 1)
        assert found == expected[3:]
        of_folder = content(folder)["optimizer_states"][0]["param_groups"][0]
        assert {**of_folder, "params": None} == {**group, "params": None}

    @pytest.mark.parametrize("backprop", [name if name == "engine" else slow(name) for name in BACKPROP])
    def test_by_mini_batches(self, run, on, backprop: str) -> None:
        """The engine takes many of them in a training step."""
        options = [COSINE, "scheduler.interval=step", f"backprop={backprop}"]
        run(*options, "scheduler.T_max=33")
        _, found, cfg = on(*options, "scheduler.T_max=66")
        assert found == from_the_start(cfg, 6, 11)[0][3:]

    @pytest.mark.slow
    def test_two_changes(self, before, on) -> None:
        """What a run has become is what the next one goes on from."""
        before(COSINE)
        on(COSINE, "trainer.max_epochs=4")
        _, found, cfg = on(STEP, "scheduler.step_size=5")
        assert found == from_the_start(cfg, 6)[0][4:]

    @pytest.mark.parametrize("then", [[COSINE], *map(slow, ([COSINE, "scheduler.T_max=6"], [], [STEP]))])
    def test_checkpoint_of_01(self, before, on, then: list[str]) -> None:
        """It does not say what it was configured with; the schedule's state does."""
        path = before(*then) / "last.ckpt"
        old = torch.load(path, weights_only=True)
        del old["configured"]
        torch.save(old, path)
        _, found, cfg = on(COSINE)
        assert found == from_the_start(cfg, 6)[0][3:]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            slow([], [0.1, 0.01, 0.01, 0.001]),  # every second epoch, as none is better
            (["scheduler.patience=0"], [0.1, 0.01, 0.001, 0.0001]),
            slow(["scheduler.factor=0.5"], [0.1, 0.05, 0.05, 0.025]),
            slow(["+scheduler.min_lr=0.05"], [0.1, 0.05, 0.05, 0.05]),
            slow(["+scheduler.cooldown=9"], [0.1, 0.01, 0.01, 0.01]),
            slow(["scheduler.monitor=train_loss"], [0.1, 0.1, 0.01, 0.01]),  # of which it has seen nothing
            slow(["scheduler.mode=max"], [0.1, 0.1, 0.1, 0.01]),  # the first is then better than none
            slow(["+scheduler.threshold_mode=abs"], [0.1, 0.1, 0.1, 0.01]),
        ],
    )
    def test_plateau(self, before, on, change: list[str], expected: list[float]) -> None:
        """It keeps what it has seen and what it has done to the step, which was 0.1 in the third epoch."""
        options = ["scheduler=plateau", "+scheduler.threshold=10", "scheduler.patience=1"]
        before(*options)
        _, found, _ = on(*options, "trainer.max_epochs=7", *change)
        assert found == pytest.approx(expected)

    @pytest.mark.parametrize("then", [[], [STEP, "scheduler.step_size=1"]])
    def test_steps_that_nobody_has_counted(self, before, on, then: list[str]) -> None:
        before(*then)
        with pytest.raises(
            InputError, match=r"expected scheduler.interval to be (epoch|None), as in .*, but it is step"
        ):
            on(COSINE, "scheduler.interval=step")

    def test_too_short(self, before, on) -> None:
        before(*ONE_CYCLE, "+scheduler.total_steps=66")
        with pytest.raises(
            InputError, match=r"values that the scheduler takes, but: Tried to step 21 times.* scheduler"
        ):
            on(*ONE_CYCLE, "+scheduler.total_steps=20")


EARLY = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=10"]


class TestCallbacks:
    @pytest.mark.parametrize(
        ("change", "epochs"),
        [
            ([], 0),
            slow(["trainer.max_epochs=9"], 0),
            (["callbacks.early_stopping.patience=4"], 3),  # one has been no better
            (["callbacks.early_stopping.patience=20", "callbacks.early_stopping.min_delta=0"], 4),
            slow(["callbacks.early_stopping.min_delta=0", "optimizer.lr=1"], 4),  # each is better
            slow(["callbacks.early_stopping.monitor=train_loss"], 2),  # of which it has seen nothing
            slow(["+callbacks.early_stopping.stopping_threshold=100"], 1),
            slow(["~callbacks.early_stopping"], 4),
        ],
    )
    def test_early_stopping(self, before, on, capsys, change: list[str], epochs: int) -> None:
        """It had stopped after the second epoch."""
        assert content(before(*EARLY, "trainer.max_epochs=6"))["epoch"] == 1
        capsys.readouterr()
        folder, found, _ = on(*EARLY, *change)
        assert len(found) == epochs
        said = "nothing was trained: the run had stopped early; to go on, raise callbacks.early_stopping.patience"
        assert (said in " ".join(capsys.readouterr().out.split())) is (epochs == 0)
        if epochs and "~" not in change[0]:
            early = next(word.partition("patience=")[2] for word in [*change, "patience=1"] if "patience=" in word)
            assert state(folder, "EarlyStopping")["patience"] == int(early)

    def test_stricter_than_then(self, before, on) -> None:
        options = ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=10"]
        before(*options, "callbacks.early_stopping.patience=5")
        assert len(on(*options, "callbacks.early_stopping.patience=2")[1]) == 1

    def test_a_run_that_is_over(self, before, on, capsys) -> None:
        before()
        on("trainer.max_epochs=3")
        assert "nothing was trained: the run is over; to go on, raise trainer.max_epochs" in capsys.readouterr().out

    def test_best_of_another_figure(self, before, on) -> None:
        before()
        folder, _, _ = on("callbacks.best.monitor=train_loss", "callbacks.best.mode=max")
        kept = state(folder, "EpochCheckpoint{'monitor': 'train_loss'")
        worst = max(
            content(folder)["figures"]["train_loss"], read_checkpoint(folder / "best.ckpt")["figures"]["train_loss"]
        )
        assert kept["best_model_score"] == pytest.approx(worst)

    @pytest.mark.parametrize(
        ("then", "now"), [(3, 1), slow(1, 3), *(slow(*pair) for pair in ((3, 2), (-1, 2), (3, -1), (2, 0)))]
    )
    def test_number_of_the_best(self, before, on, then: int, now: int) -> None:
        options = [r"callbacks.best.filename='{epoch}'"]
        folder = before(*options, f"+callbacks.best.save_top_k={then}")
        kept = state(folder, "EpochCheckpoint{'monitor': 'val_loss'")["best_k_models"]
        assert len(kept) == (3 if then == -1 else then)
        on(*options, f"+callbacks.best.save_top_k={now}")
        found = state(folder, "EpochCheckpoint{'monitor': 'val_loss'")
        assert len(found["best_k_models"]) == (len(kept) + 3 if now == -1 else now)
        if now > 0:
            scores = sorted(score.item() for score in found["best_k_models"].values())
            assert found["kth_value"] == scores[-1]
            assert found["best_model_score"] == scores[0]
        forgotten = sorted(kept, key=kept.__getitem__)[now:] if now >= 0 else []
        assert all((folder / Path(path).name).exists() for path in forgotten)  # no file is deleted for it

    @pytest.mark.slow
    def test_records_of_the_flow(self, before, on) -> None:
        before("callbacks.delta_flow.every=1000")
        folder, _, _ = on("callbacks.delta_flow.every=5")
        assert state(folder, "DeltaFlow")["epochs"] == pytest.approx(
            [0, 38 / 11, 43 / 11, 48 / 11, 53 / 11, 58 / 11, 63 / 11]
        )

    def test_found_step(self, before, on, run) -> None:
        """It is found once: a run that goes on ends like one that was never interrupted."""
        options = ["callbacks=lr_finder", "optimizer.lr=auto", "data.batch_size=20"]
        found = content(before(*options))["configured"]["optimizer"]["lr"]
        folder, seen, _ = on(*options)
        assert seen == [found] * 3
        assert found != 5.0
        went_on = content(folder)["state_dict"]
        shutil.rmtree(folder)
        folder, _, _ = run("data.batch_size=20", f"optimizer.lr={found}", "trainer.max_epochs=6")
        torch.testing.assert_close(content(folder)["state_dict"], went_on, rtol=0, atol=0)
        shutil.rmtree(folder)
        before(*options)
        for change in (["callbacks.lr_finder.min_lr=0.01"], ["callbacks.lr_finder.num_training_steps=50"]):
            with pytest.raises(InputError, match=r"expected callbacks.lr_finder to be \{.*\}, as in .*, but it is"):
                on(*options, *change)

    def test_finder_amid_a_run(self, before, on) -> None:
        before()
        with pytest.raises(InputError, match=r"expected callbacks.lr_finder to be None, as in"):
            on("callbacks=lr_finder")


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "name"),
        [
            (["optimizer.lr=2"], "the optimizer"),
            slow(["optimizer.momentum=0.9"], "the optimizer"),
            slow(["optimizer.weight_decay=0.1"], "the optimizer"),
            slow(["+optimizer.nesterov=true", "optimizer.momentum=0.9"], "the optimizer"),
            slow(["+optimizer.maximize=true"], "the optimizer"),
            slow(["optimizer=adam", "optimizer.lr=1"], "the optimizer"),
            (["model.initialisation=glorot"], "initialisation"),
            (["data.standardise=false"], "data.standardise"),
        ],
    )
    def test_of_sgd(self, before, on, change: list[str], name: str) -> None:
        before()
        with pytest.raises(InputError, match=f"expected {name} to be .*, as in .*last.ckpt, but it is"):
            on(*change)

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            slow(["+optimizer.betas=[0.5,0.9]"], "the optimizer"),
            slow(["+optimizer.eps=0.1"], "the optimizer"),
            slow(["+optimizer.amsgrad=true"], "the optimizer"),
            (["~optimizer.weight_decay"], "optimizer.weight_decay"),  # torch's own is 0.01
            slow(["+optimizer.eps=0"], "optimizer.eps"),
        ],
    )
    def test_of_adamw(self, before, on, change: list[str], name: str) -> None:
        """Zeros too, which the words of an optimizer leave out."""
        options = ["optimizer=adamw", "optimizer.weight_decay=0"]
        before(*options)
        with pytest.raises(InputError, match=f"expected {name} to be .*, as in .*last.ckpt, but it is"):
            on(*options, *change)

    @pytest.mark.parametrize("damage", [5, *map(slow, ({}, {"optimizer": 3, "scheduler": None, "callbacks": {}}))])
    def test_damaged(self, before, on, damage: object) -> None:
        path = before() / "last.ckpt"
        torch.save({**torch.load(path, weights_only=True), "configured": damage}, path)
        with pytest.raises(InputError, match=r"expected configured.* in the checkpoint .*last.ckpt to be"):
            on()

    def test_no_absolute_path_is_kept(self, before, tmp_path: Path) -> None:
        assert str(tmp_path.parent) not in str(content(before())["configured"])
