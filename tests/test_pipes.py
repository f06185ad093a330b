"""Piped output: a line an epoch instead of a bar; `program | head` ends quietly, with the shell's code for it."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from manual_mlp.training import callbacks
from manual_mlp.training import run as training
from tests.configs import ROOT, configured

TRAIN = [sys.executable, str(ROOT / "train.py")]
SHORT = ["data=iris", "trainer.max_epochs=2", "report=false", "trainer.enable_progress_bar=false"]
PROGRAMS = {
    "--help": [*TRAIN, "--help"],
    "lecture": [sys.executable, "-m", "manual_mlp.lecture"],
}
SLOW = {
    "--cfg": [*TRAIN, "--cfg", "job"],
    "train": [*TRAIN, *SHORT],
    "bar": [*TRAIN, *SHORT, "trainer.enable_progress_bar=true"],
    "report": [*TRAIN, *SHORT, "report=true"],
    "sweep": [*TRAIN, "-m", *SHORT, "optimizer.lr=1,2"],
    "bar of a sweep": [*TRAIN, "-m", *SHORT, "optimizer.lr=1,2", "trainer.enable_progress_bar=true"],
    "test": [*TRAIN, *SHORT, "task=test", "ckpt_path=last.ckpt"],
    "info": [*TRAIN, "--info=all"],
    "benchmark": [sys.executable, "-m", "manual_mlp.benchmark", "--help"],
    "testing": [sys.executable, "-m", "manual_mlp.testing", "--help"],
}


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stdout", "stderr too"])
@pytest.mark.parametrize("name", [*PROGRAMS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_ends_quietly(tmp_path: Path, name: str, both: bool) -> None:
    """No one reads from the beginning on."""
    if name == "test":
        subprocess.run([*TRAIN, *SHORT, "hydra.run.dir=."], cwd=tmp_path, check=True, capture_output=True)
    command = (PROGRAMS | SLOW)[name]
    errors = subprocess.STDOUT if both else subprocess.PIPE
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as job:
        assert job.stdout
        job.stdout.close()
        said = job.stderr.read() if job.stderr else ""
    assert (job.returncode, said) == (141, "")


class TestProgress:
    def test_lines(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["trainer.enable_progress_bar=true", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"]
        training.run(configured(tmp_path, "data=line", *words))
        said = capsys.readouterr()
        lines = [line.split(": ") for line in said.out.splitlines() if line.startswith("epoch ")]
        figures = ["train cost", "train cost, val cost, val r2", "train cost"]
        for epoch, (line, names) in enumerate(zip(lines, figures, strict=True)):
            assert line[0] == f"epoch {epoch}"
            assert [figure.rpartition(" ")[0] for figure in line[1].split(", ")] == names.split(", ")
        assert said.err == ""

    def test_none_if_switched_off(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        training.run(configured(tmp_path, "data=line", "trainer.max_epochs=1"))
        assert "epoch 0:" not in capsys.readouterr().out

    @pytest.mark.parametrize("watched", [True, False])
    def test_bars_go_to_stderr(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], watched: bool
    ) -> None:
        monkeypatch.setattr(callbacks, "is_watched", lambda: watched)
        bar = callbacks.Progress()
        bar._trainer = SimpleNamespace(sanity_checking=False, state=SimpleNamespace(fn="fit"))
        for made in (bar.init_train_tqdm(), bar.init_validation_tqdm(), bar.init_test_tqdm()):
            made.refresh()
            said = capsys.readouterr()
            assert (said.out, bool(said.err)) == ("", watched)
            made.close()

    @pytest.mark.parametrize(("stdout", "stderr"), [(True, True), (True, False), (False, True), (False, False)])
    def test_watched_where_both_are_terminals(self, stdout: bool, stderr: bool) -> None:
        terminal, pipe = pty.openpty(), os.pipe()
        written = [terminal[1] if there else pipe[1] for there in (stdout, stderr)]
        code = "import sys; from manual_mlp.shell import is_watched; sys.exit(is_watched())"
        job = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=written[0], stderr=written[1])
        for descriptor in (*terminal, *pipe):
            os.close(descriptor)
        assert job.returncode == (stdout and stderr)


def test_other_pipes_are_no_reason_to_be_quiet() -> None:
    code = "from manual_mlp.shell import while_read\nwith while_read():\n    raise BrokenPipeError('of a worker')"
    job = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert job.returncode == 1
    assert "BrokenPipeError: of a worker" in job.stderr


def test_what_is_read_is_left_as_it_is() -> None:
    code = "from manual_mlp.shell import while_read\nwith while_read():\n    print('all')"
    job = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (job.returncode, job.stdout, job.stderr) == (0, "all\n", "")
