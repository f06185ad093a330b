"""A run that is killed, interrupted, starved of room, or misled; and what goes on from its checkpoints."""

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manual_mlp import InputError, checkpoint
from manual_mlp.checkpoint import read_checkpoint, write_whole
from manual_mlp.program import read
from manual_mlp.shell import python
from manual_mlp.training import run as training
from manual_mlp.training.module import MLPModule
from manual_mlp.training.strategies import BACKPROP, where_it_began
from tests.configs import ROOT, configured
from tests.killed import at

IRIS = ("data=iris", "trainer.max_epochs=3")


def killed(folder: Path, *words: str, more: str = "") -> None:
    command = [sys.executable, "-m", "tests.killed", str(folder), *words]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MORE": more})
    assert job.returncode == 0, job.stderr[-3000:]
    assert job.stdout.count("the same end") == sum(word.count(",") + 1 for word in words)


class TestKilled:
    def test_goes_on_to_the_same_end(self, tmp_path: Path) -> None:
        """Half-way through a checkpoint; between best and last; in the middle of an epoch."""
        killed(tmp_path, "layers=half:3,named:3,step:25", "network=step:25", "engine=step:7")

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", BACKPROP)
    def test_at_twenty_moments(self, tmp_path: Path, mode: str) -> None:
        times = [f"time:{moment / 13:.3f}" for moment in range(1, 13)]
        events = ["half:1", "half:2", "whole:4", "named:1", "named:6", "row:3", "row:9", "step:11+half:3+time:0.9"]
        killed(tmp_path, f"{mode}={','.join(times + events)}")

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", BACKPROP)
    @pytest.mark.parametrize(
        "more",
        [
            "+callbacks.last.every_n_train_steps=3",
            "trainer.max_epochs=-1 trainer.max_steps=40 data.batch_size=10",
            "callbacks=early_stopping callbacks.early_stopping.patience=1 optimizer.lr=0",
            "optimizer=sgd optimizer.momentum=0.9 optimizer.lr=0.5",
            "data=sine data.source.samples=100 model.dropout=0.1",
        ],
    )
    def test_whatever_the_options(self, tmp_path: Path, mode: str, more: str) -> None:
        killed(tmp_path, f"{mode}=half:3,named:3,time:0.7,end", more=more)


@pytest.fixture
def run(tmp_path: Path):
    """run(*overrides) trains and returns the metric; the run folder is tmp_path."""
    return lambda *overrides: training.run(configured(tmp_path, *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    training.run(configured(folder, *IRIS))
    return folder


class TestGoesOn:
    def test_further_than_it_was_to(self, run, tmp_path: Path) -> None:
        run("data=iris", "trainer.max_epochs=4", "model.dropout=0.1")
        expected = (tmp_path / "metrics.csv").read_text()
        shutil.rmtree(tmp_path)
        run("data=iris", "trainer.max_epochs=2", "model.dropout=0.1")
        run("data=iris", "trainer.max_epochs=4", "model.dropout=0.1", f"ckpt_path={tmp_path}/last.ckpt")
        assert (tmp_path / "metrics.csv").read_text() == expected

    def test_schedule_that_watches_the_figures(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lightning's own checkpoints of an epoch miss the last step of such a schedule."""
        make = MLPModule.configure_optimizers

        def with_plateau(self: MLPModule) -> dict:
            optimizer = make(self)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

        monkeypatch.setattr(MLPModule, "configure_optimizers", with_plateau)
        run("data=iris", "trainer.max_epochs=4")
        expected = (tmp_path / "metrics.csv").read_text()
        shutil.rmtree(tmp_path)
        run("data=iris", "trainer.max_epochs=2")
        run("data=iris", "trainer.max_epochs=4", f"ckpt_path={tmp_path}/last.ckpt")
        assert (tmp_path / "metrics.csv").read_text() == expected

    def test_in_a_folder_that_was_moved(self, run, finished: Path, tmp_path: Path) -> None:
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        run("data=iris", "trainer.max_epochs=4", f"ckpt_path={tmp_path}/last.ckpt")
        (state,) = (
            state for state in read_checkpoint(tmp_path / "last.ckpt")["callbacks"].values() if state.get("monitor")
        )
        assert state["best_model_path"] == "best.ckpt"
        assert {*state["best_k_models"]} == {"best.ckpt"}
        for name in ("best.ckpt", "last.ckpt"):
            content = (tmp_path / name).read_bytes()
            assert str(tmp_path).encode() not in content
            assert str(finished).encode() not in content

    def test_keeps_the_best_of_before(self, run, tmp_path: Path) -> None:
        """A checkpoint names no folder, and yet a later, worse epoch does not replace the best one."""
        run("data=diabetes", "trainer.max_epochs=12", "optimizer.lr=0.1")
        best = (tmp_path / "best.ckpt").read_bytes()
        assert read_checkpoint(tmp_path / "best.ckpt")["epoch"] < 11
        run("data=diabetes", "trainer.max_epochs=13", "optimizer.lr=0.1", f"ckpt_path='{tmp_path}/last.ckpt'")
        assert (tmp_path / "best.ckpt").read_bytes() == best

    def test_time_of_the_whole(self, run, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        run(*IRIS)
        path = tmp_path / "last.ckpt"
        content = torch.load(path, weights_only=True)
        assert 0 < content["continuation"]["seconds"] < 600
        content["continuation"]["seconds"] = 1000.0
        torch.save(content, path)
        run("data=iris", "trainer.max_epochs=4", f"ckpt_path='{path}'")
        seconds = float(re.findall(r"best \d of 0 to 3, in ([\d.]+) s", capsys.readouterr().out)[-1])
        assert 1000 < seconds < 1600
        assert 1000 < read_checkpoint(path)["continuation"]["seconds"] < 1600

    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            (["model.hidden=[7]"], r"expected hidden to be \[30\], as in .*last.ckpt, but it is \[7\]; leave out"),
            (["model.activation=relu"], "expected activation to be sigmoid"),
            (["optimizer.lr=0.7"], "expected the optimizer to be SGD, lr 5.0, as in .* but it is SGD, lr 0.7"),
            (["optimizer=adam"], "expected the optimizer to be SGD, lr 5.0"),
            (["data=wine"], "expected input_size to be 4"),
            (["seed=1"], "expected the rows, split and seed that .*last.ckpt was trained with, but iris gives other"),
            (["data.val_size=0.2"], "expected the rows, split and seed"),
            (["trainer.max_epochs=1"], "options that Lightning accepts, but: You restored a checkpoint"),
        ],
    )
    def test_contradictions(self, run, finished: Path, overrides: list[str], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            run(*IRIS, f"ckpt_path={finished}/last.ckpt", *overrides)

    def test_another_way_back(self, run, finished: Path) -> None:
        """The net and its optimizer are the same, whoever differentiates."""
        run("data=iris", "trainer.max_epochs=4", f"ckpt_path={finished}/last.ckpt", "backprop=engine")

    @pytest.mark.slow
    def test_train_py(self, tmp_path: Path) -> None:
        def train(*arguments: str) -> str:
            command = [sys.executable, str(ROOT / "train.py"), *arguments]
            job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert job.returncode == 0, job.stderr
            return job.stdout

        train(*IRIS, "model.hidden=[5]", "hydra.run.dir=a", "trainer.enable_progress_bar=false")
        assert "of 0 to 4" in train("ckpt_path=a/last.ckpt", "trainer.max_epochs=5")
        assert "4-5-3" in train("ckpt_path=a/last.ckpt", "task=test")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "outputs"]


class TestFaults:
    def test_interrupted(self, run, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(MLPModule, "training_step", at(25, interrupt, MLPModule.training_step))
        with pytest.raises(SystemExit) as end:
            run(*IRIS)
        assert end.value.code == 130
        printed = capsys.readouterr().out
        assert "best 1 of 0 to 1" in printed
        assert "test accuracy" in printed
        assert f"interrupted; to go on: {python()} train.py ckpt_path=" in printed
        assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] == 1

    def test_interrupted_before_anything_was_kept(self, run, monkeypatch) -> None:
        monkeypatch.setattr(MLPModule, "training_step", at(3, interrupt, MLPModule.training_step))
        with pytest.raises(InputError, match="one whole epoch to keep, but training was interrupted before"):
            run(*IRIS)

    def test_full_disk(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoint.os, "fsync", at(9, full, os.fsync))  # last.ckpt for the third time
        with pytest.raises(InputError, match=r"output folder that can be written, but .* \(No space left on device\)"):
            run(*IRIS)
        assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] == 1
        assert not list(tmp_path.glob(".*part"))

    def test_lost_folder(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lose = at(25, lambda *_: tmp_path.rename(tmp_path.with_name("lost")), MLPModule.training_step)
        monkeypatch.setattr(MLPModule, "training_step", lose)
        with pytest.raises(InputError, match=r"folder that can be written, but .* \(No such file or directory\)"):
            run(*IRIS)
        assert read_checkpoint(tmp_path.with_name("lost") / "last.ckpt")["epoch"] == 1

    @pytest.mark.parametrize("mode", BACKPROP)
    def test_diverged(self, run, mode: str) -> None:
        """The last layer's weights are thrown far away by the first step, and the others stay."""
        place = "mini-batches 0 to 1 .backprop=layers " if mode == "engine" else "step 0, and it began in z³ "
        sentence = rf"loss, of 1e\+09 at most, .* epoch 1, {place}.*; lower optimizer.lr \(now 500"
        with pytest.raises(InputError, match=sentence):
            run("data=diabetes", "optimizer=sgd", "optimizer.lr=500.0", "data.batch_size=200", f"backprop={mode}")

    @pytest.mark.parametrize(
        ("options", "batches"),
        [([], "es 0 to 30"), (["data.batch_size=1"], "es 0 to 127"), (["trainer.max_steps=9"], " 3")],
    )
    def test_diverged_amid_the_engines_many_steps(self, run, options: list[str], batches: str) -> None:
        """They are one step of Lightning, so the sentence names them all, and the way to the layer."""
        common = ["data=diabetes", "optimizer=sgd", "optimizer.lr=20.0", "data.batch_size=10", "backprop=engine"]
        with pytest.raises(InputError, match=rf"epoch 0, mini-batch{batches} \(backprop=layers .* names the layer"):
            run(*common, *options)

    @pytest.mark.parametrize(
        ("options", "advice"),
        [
            ([], r"lower optimizer.lr \(now 500\), or clip the gradients with trainer.gradient_clip_val=1"),
            (["data.standardise=false"], r"lower .*, or set data.standardise=true, or clip .*_clip_val=1"),
            (["trainer.gradient_clip_val=1e30"], r"lower optimizer.lr \(now 500\)"),
        ],
    )
    def test_only_what_is_not_done_yet_is_advised(self, run, options: list[str], advice: str) -> None:
        with pytest.raises(InputError, match=rf"; {advice}$"):
            run("data=diabetes", "optimizer=sgd", "optimizer.lr=500", "data.batch_size=200", *options)

    def test_where_it_began(self) -> None:
        module, x = MLPModule(4, 3, hidden=[5, 6], activation="relu"), torch.rand(7, 4)
        program = read(module.net)
        layers = [*program.layers.values()]

        def after(layer: int, value: float) -> str:
            with torch.no_grad():
                kept = layers[layer].weight[0, 0].clone()
                layers[layer].weight[0, 0] = value
                place = where_it_began(program, x)
                layers[layer].weight[0, 0] = kept
            return place

        assert after(1, float("nan")).startswith("W² (5 to 6 neurons), by the step before: δ³")
        assert after(0, float("inf")).startswith("W¹")
        assert after(0, 1e20).startswith("z² (n = 5, relu): it reaches")
        assert where_it_began(program, x * float("inf")).startswith("z² (n = 5")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


class TestUntrusted:
    @pytest.mark.parametrize(
        "write",
        [
            lambda path: path.write_bytes(pickle.dumps(Bomb())),
            lambda path: torch.save(Bomb(), path),
            lambda path: torch.save({"state_dict": {}, "hyper_parameters": Bomb()}, path),
            lambda path: torch.save(torch.nn.Linear(2, 2), path),
            lambda path: torch.save({"state_dict": {}}, path),
            lambda path: torch.save(torch.ones(3), path),
            lambda path: path.write_text("hello"),
            lambda path: path.write_bytes(b""),
            lambda path: path.mkdir(),
            lambda path: None,
        ],
    )
    @pytest.mark.parametrize("task", ["train", "test", "predict"])
    def test_refused(self, run, tmp_path: Path, monkeypatch, write, task: str) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "x.ckpt")
        with pytest.raises(InputError, match=r"expected a .*checkpoint.*x\.ckpt"):
            run(*IRIS, f"task={task}", f"ckpt_path={tmp_path}/x.ckpt", "input=x.csv")
        assert not Path("exploded").exists()

    def test_any_damage_is_noticed(self, finished: Path, tmp_path: Path) -> None:
        """A bit turned over anywhere, or the end lost."""
        whole, path = (finished / "last.ckpt").read_bytes(), tmp_path / "x.ckpt"
        expected = read_checkpoint(finished / "last.ckpt")
        noticed = 0
        places = range(7, len(whole), len(whole) // 60)
        for place in places:
            for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]):
                path.write_bytes(content)
                try:
                    same = read_checkpoint(path)
                except InputError:
                    noticed += 1
                else:  # padding between the records
                    assert same["figures"] == expected["figures"]
                    torch.testing.assert_close(same["state_dict"], expected["state_dict"], rtol=0, atol=0)
        assert noticed > 1.5 * len(places)


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_whole(path, b"before")
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, memoryview(b"after"))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
