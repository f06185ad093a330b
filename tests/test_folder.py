"""A run's folder: one training at a time, and what it was configured with; what goes wrong around it, in words."""

import errno
import logging
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from manual_mlp import InputError
from manual_mlp.shell import python
from manual_mlp.training import folder as folders
from manual_mlp.training import run as training
from manual_mlp.training.command_line import with_its_own_overrides
from manual_mlp.training.folder import alone_in
from manual_mlp.training.module import MLPModule
from tests.configs import CONF, ROOT, configured
from tests.killed import at

SHORT = ["data=iris", "threads=1", "trainer.max_epochs=1"]
QUIET = ["report=false", "trainer.enable_progress_bar=false"]
NAMES = {  # {group: {callback or logger: a choice that has it}}
    group: {
        name: path.stem
        for path in sorted((CONF / group).glob("*.yaml"))
        for name in sorted(yaml.safe_load(path.read_text()).keys() - {"defaults"})
    }
    for group in ("callbacks", "logger")
}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., object]]:
    """train(*words): train.py in tmp_path → what it exits with, None at its ordinary end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "learning_curves", lambda *arguments: None)

    def call(*words: str) -> object:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *words, *QUIET])
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield call
    for handler in {*root.handlers} - {*handlers}:  # Hydra's
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / ".hydra").iterdir()}


class TestAlone:
    def test_second_is_refused(self, tmp_path: Path) -> None:
        with alone_in(tmp_path):
            with pytest.raises(InputError, match=r"no other run writes to, but one trains in .*; wait for its end, or"):
                training.run(configured(tmp_path, *SHORT))
            assert not (tmp_path / "metrics.csv").exists()
            with alone_in(tmp_path / "elsewhere"):
                pass
        with alone_in(tmp_path):
            pass

    def test_the_lock_dies_with_its_process(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with alone_in(tmp_path):
                os.write(write, b"locked")
                time.sleep(60)
            os._exit(0)
        try:
            assert os.read(read, 6) == b"locked"
            with pytest.raises(InputError, match="one trains in"), alone_in(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with alone_in(tmp_path):
            pass

    def test_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_only(path: object, *arguments: object) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(folders.os, "open", read_only)
        with pytest.raises(InputError, match=r"output folder that can be written, but .* \(Read-only file system\)"):
            training.run(configured(tmp_path, *SHORT))

    def test_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
        def unknown(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(folders.fcntl, "flock", unknown)
        with caplog.at_level("INFO"), alone_in(tmp_path):
            assert "No lock keeps other runs out" in caplog.text

    def test_nothing_is_written_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / ".lock").symlink_to(tmp_path / "victim")
        with pytest.raises(OSError, match="symbolic"), alone_in(tmp_path / "r"):
            pass
        assert not (tmp_path / "victim").exists()

    @pytest.mark.slow
    def test_two_programs(self, train, tmp_path: Path) -> None:
        command = [sys.executable, str(ROOT / "train.py"), *QUIET, "data=iris", "hydra.run.dir=r"]
        with subprocess.Popen([*command, "trainer.max_epochs=100000", "data.batch_size=1"], cwd=tmp_path) as first:
            while not (tmp_path / "r" / "last.ckpt").exists():
                time.sleep(0.1)
            before = kept(tmp_path / "r")
            for words in (["data=iris", "hydra.run.dir=r", "seed=1"], ["ckpt_path=r/last.ckpt"]):
                assert str(train(*words)).startswith("Error: expected a folder that no other run writes to")
            rows = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n1,2,3,4\n"
            (tmp_path / "x.csv").write_text(rows)
            for task in ("test", "predict"):  # elsewhere
                assert train(f"task={task}", "ckpt_path=r/best.ckpt", "input=x.csv") is None
            assert kept(tmp_path / "r") == before
            first.kill()
        assert train("ckpt_path=r/last.ckpt", "trainer.max_steps=1") is None


class TestConfiguration:
    def test_says_what_was_done(self, train, tmp_path: Path) -> None:
        """Refused runs leave it; one that goes on writes its own; tests elsewhere have one, too."""
        assert train(*SHORT, "hydra.run.dir=r") is None
        first = kept(tmp_path / "r")
        assert set(first) == {"config.yaml", "hydra.yaml", "overrides.yaml"}
        assert yaml.safe_load(first["overrides.yaml"])[:3] == SHORT
        refused = [
            ["ckpt_path=r/last.ckpt", "model.hidden=[7]"],
            ["ckpt_path=r/last.ckpt", "optimizer.lr=9"],
            ["ckpt_path=r/last.ckpt", "scheduler=cosine", "scheduler.interval=step"],
            ["hydra.run.dir=r", "data=iris", "model.hidden=[0]"],
            ["hydra.run.dir=r", "data=iris", "trainer.max_epochs=abc"],
        ]
        for words in refused:
            assert str(train(*words)).startswith("Error: expected ")
        assert train("ckpt_path=r/best.ckpt", "task=test", "hydra.run.dir=r") is None
        assert kept(tmp_path / "r") == first
        assert train("ckpt_path=r/last.ckpt", "trainer.max_epochs=2", "callbacks.delta_flow.every=7") is None
        config = yaml.safe_load(kept(tmp_path / "r")["config.yaml"])
        assert (config["trainer"]["max_epochs"], config["callbacks"]["delta_flow"]["every"]) == (2, 7)
        assert train("ckpt_path=r/best.ckpt", "task=test", "hydra.run.dir=t") is None
        assert yaml.safe_load(kept(tmp_path / "t")["config.yaml"])["task"] == "test"

    def test_is_beside_the_checkpoints(self, train, tmp_path: Path) -> None:
        """Also under a run_dir of the user's own: to go on from it must not mean the default settings."""
        assert train(*SHORT, "run_dir=own", "backprop=engine") is None
        assert yaml.safe_load(kept(tmp_path / "own")["config.yaml"])["backprop"] == "engine"
        end = str(train("ckpt_path=own/last.ckpt", "trainer.max_epochs=2"))
        assert "it asks for run_dir=own; only you can decide that" in end
        assert train(*with_its_own_overrides(shlex.split(end.rpartition("\n")[2])[2:])) is None
        assert torch.load(tmp_path / "own" / "last.ckpt", weights_only=True)["epoch"] == 1

    def test_runs_of_a_sweep_lie_in_its_folder(self, train, tmp_path: Path, capsys) -> None:
        end = train("-m", *SHORT, "hydra.sweep.dir=s", "run_dir=a,b")
        assert "2 of the 2 runs failed" in str(end)
        assert "each run of a sweep in a folder of its own, but got run_dir=a; leave it out" in capsys.readouterr().err

    def test_sweep(self, train, tmp_path: Path) -> None:
        """Its runs do not lock each other out, and one that is refused stands in the table."""
        end = train("-m", *SHORT, "hydra.sweep.dir=s", "model.hidden=[3],[0]")
        assert "1 of the 2 runs failed" in str(end)
        assert (tmp_path / "s" / "sweep.csv").read_text().count("\n") == 3

    @pytest.mark.slow
    def test_sweep_of_runs_that_go_on(self, train, tmp_path: Path) -> None:
        assert train(*SHORT, "hydra.run.dir=r", "model.hidden=[3]") is None
        assert train("-m", "ckpt_path=r/last.ckpt", "trainer.max_epochs=2,3", "hydra.sweep.dir=t") is None
        assert yaml.safe_load(kept(tmp_path / "t" / "1")["config.yaml"])["model"]["hidden"] == [3]

    @pytest.mark.slow
    def test_one_run_of_a_sweep_goes_on_alone(self, train, tmp_path: Path) -> None:
        """Its preset would begin the whole sweep again."""
        words = ["experiment=deep_sigmoid", "model.hidden=[3]", "trainer.max_epochs=1", "data=iris"]
        assert train(*words, "hydra.sweep.dir=s") is None
        assert train("ckpt_path=s/1/last.ckpt", "trainer.max_epochs=2") is None
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
        assert torch.load(tmp_path / "s" / "1" / "last.ckpt", weights_only=True)["epoch"] == 1

    def test_paths_from_a_changed_working_folder(self, train, tmp_path: Path) -> None:
        for words in (
            ["data=table", "data.source.path=my.csv", "data.source.target=y"],
            ["task=test", "ckpt_path=it is/last.ckpt"],
            ["task=predict", "ckpt_path=last.ckpt", "input=x"],
            ["data=mnist", "data.source.folder=images"],
        ):
            end = str(train("hydra.job.chdir=true", "hydra.run.dir=a b", *words))
            assert f"in {tmp_path}/a b, where the run looks because of hydra.job.chdir=true; write " in end
            (word,) = shlex.split(end.partition("; write ")[2])
            assert word.partition("=")[2].strip("'").startswith(str(tmp_path))

    def test_command_to_go_on(self, train, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        """It is printed for Hydra and the shell, and from the folder in which train.py was called."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(MLPModule, "training_step", at(15, interrupt, MLPModule.training_step))
        end = train("data=iris", "hydra.job.chdir=true", r"hydra.run.dir='a \'b\' (1), $c=d'")
        assert end == 130
        line = capsys.readouterr().out.partition("to go on: ")[2].partition("\n")[0]
        words = shlex.split(line)
        assert words[:2] == [python(), str(ROOT / "train.py")]
        assert "data=iris" in with_its_own_overrides(words[2:])


class TestLeftOut:
    @pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in NAMES.items() for name in names])
    def test_null_is_no_callback_and_no_logger(self, tmp_path: Path, group: str, name: str) -> None:
        choice = NAMES[group][name]
        words = [f"{group}={choice}", f"{group}.{name}=null", "trainer.enable_progress_bar=true"]
        cfg = configured(tmp_path, *words)
        training.config.check(cfg)
        trainer = training._trainer(cfg)
        assert None not in trainer.callbacks
        assert None not in trainer.loggers

    @pytest.mark.parametrize(
        "words", [["callbacks.delta_flow=null"], ["logger.csv=null"], ["callbacks.best=null", "callbacks.last=null"]]
    )
    def test_runs_without(self, tmp_path: Path, words: list[str]) -> None:
        assert training.run(configured(tmp_path, *SHORT, *words)) > 0

    def test_metrics(self, tmp_path: Path) -> None:
        words = ["+metrics.f1._target_=torchmetrics.F1Score", "+metrics.none=null"]
        cfg = configured(tmp_path, *SHORT, *words)
        training.config.check(cfg)
        assert list(training._metrics(cfg, training._data(cfg))) == ["f1"]

    @pytest.mark.parametrize(
        ("word", "sentence"),
        [
            ("callbacks.best=5", "callbacks.best to have a _target_, or to be null, but got 5; name a class"),
            ("+callbacks.x={a:1}", r"callbacks.x to have a _target_, or to be null, but got \{'a': 1\}"),
            ("+callbacks.x=word", "callbacks.x to have a _target_, or to be null, but got 'word'"),
            ("logger.csv=true", "logger.csv to have a _target_, or to be null, but got True"),
            ("+metrics.f1=F1Score", "metrics.f1 to have a _target_, or to be null, but got 'F1Score'"),
            ("+callbacks.x._target_=builtins.print", r"callbacks.x._target_ to make a Callback, but got None; name"),
            (
                "+logger.x._target_=builtins.print",
                r"logger.x._target_ to make a Logger, .* leave it out with logger.x=null",
            ),
            ("+metrics.x._target_=builtins.print", "metrics.x._target_ to make a Metric, but got None"),
        ],
    )
    def test_other_things(self, tmp_path: Path, word: str, sentence: str) -> None:
        with pytest.raises(InputError, match=f"expected {sentence}"):
            training.run(configured(tmp_path, *SHORT, word))


class TestWords:
    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["optimizer.lr=1e300"], r"type float without overflow; lower optimizer.lr, or what else is that large$"),
            (["optimizer.lr=1e300", "backprop=engine"], "type float without overflow"),
            (["optimizer.lr=1e5", "trainer.precision=16-true"], r"Half without overflow; .*precision=32-true"),
        ],
    )
    def test_too_large_for_the_precision(self, tmp_path: Path, words: list[str], sentence: str) -> None:
        with pytest.raises(
            InputError, match=f"expected numbers that the precision of the training can hold, .*{sentence}"
        ):
            training.run(configured(tmp_path, *SHORT, *words))

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_diverging_engine(self, tmp_path: Path, precision: str) -> None:
        words = [
            "data=diabetes",
            "optimizer=sgd",
            "optimizer.lr=1e6",
            "backprop=engine",
            f"trainer.precision={precision}",
        ]
        with pytest.raises(
            InputError, match=r"expected a finite loss, .* lower optimizer.lr \(now 1000000.0\), or clip"
        ):
            training.run(configured(tmp_path, *words))

    def test_lost_process(self, tmp_path: Path) -> None:
        words = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"
        with (
            pytest.raises(InputError, match="expected all processes to live until the training ends, but another one"),
            training.in_words(configured(tmp_path)),
        ):
            raise RuntimeError(words)
        with pytest.raises(RuntimeError, match="a bug"), training.in_words(configured(tmp_path)):
            raise RuntimeError("a bug")
        with pytest.raises(InputError, match="of a folder"), training.in_words(configured(tmp_path)):
            raise InputError("of a folder /gloo/ without overflow")

    @pytest.mark.slow
    @pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")
    @pytest.mark.parametrize("victim", ["the first", "the second"])
    def test_lost_process_of_two(self, tmp_path: Path, victim: str) -> None:
        command = [sys.executable, str(ROOT / "train.py"), *QUIET, "data=digits", "trainer=ddp", "threads=1"]
        command += ["trainer.max_epochs=100000", "hydra.run.dir=r"]
        with (tmp_path / "said").open("w") as said:
            first = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said)
        while not (tmp_path / "r" / "last.ckpt").exists():
            time.sleep(0.1)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(first.pid if victim == "the first" else int(children[0]), signal.SIGKILL)
        assert first.wait() in (1, -signal.SIGKILL)
        time.sleep(3)
        text = (tmp_path / "said").read_text()
        assert text.startswith(
            "Error: expected all processes to live until the training ends, but another one has ended"
        )
        assert text.count("\n") == 1
