"""Programs whose output nobody reads to its end: `program | head` ends quietly, with the shell's code for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import ROOT

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


def test_other_pipes_are_no_reason_to_be_quiet() -> None:
    code = "from manual_mlp.pipes import while_read\nwith while_read():\n    raise BrokenPipeError('of a worker')"
    job = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert job.returncode == 1
    assert "BrokenPipeError: of a worker" in job.stderr


def test_what_is_read_is_left_as_it_is() -> None:
    code = "from manual_mlp.pipes import while_read\nwith while_read():\n    print('all')"
    job = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (job.returncode, job.stdout, job.stderr) == (0, "all\n", "")
