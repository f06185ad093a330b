"""Several processes train what one would, on the joined batches, and every row is evaluated once."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from manual_mlp import InputError
from manual_mlp.training import data as data_module
from manual_mlp.training import run as training
from manual_mlp.training.callbacks import WholeFiles
from manual_mlp.training.data import DataModule
from tests.configs import ROOT, configured
from tests.test_data import module, numbered

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = str(ROOT / "train.py")
# 104 rows in 13 batches of 8 or of twice 4; the 15 and 31 that are evaluated can't be halved
OPTIONS = ["data=iris", "data.val_size=15", "data.test_size=31", "trainer.precision=64-true", "trainer.max_epochs=3"]
OPTIONS += ["threads=1", "trainer.enable_progress_bar=false"]
needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")


def results(folder: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The figures of a run and its last parameters."""
    parameters = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return json.loads((folder / "figures.json").read_text())["figures"], parameters


def assert_as_one_process(folder: Path, reference: Path, *options: str) -> None:
    training.run(configured(reference, *OPTIONS, "data.batch_size=8", *options))
    (figures, parameters), (expected_figures, expected) = results(folder), results(reference)
    torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-12)
    assert figures == pytest.approx(expected_figures, rel=1e-6)  # sums of float32


def started(folder: Path, command: list[str], *options: str) -> subprocess.Popen:
    command = [*command, *OPTIONS, "trainer=ddp", "data.batch_size=4", f"hydra.run.dir={folder}/two", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@needs_two_cores
def test_two_processes_are_one_with_the_joined_batch(tmp_path: Path) -> None:
    job = started(tmp_path, [sys.executable, TRAIN])
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert output.count("test accuracy") == 1
    assert_as_one_process(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@needs_two_cores
@pytest.mark.parametrize(
    "options", [["backprop=network"], ["model.dropout=0.0", "optimizer=adam", "backprop=autograd"]]
)
def test_torchrun(tmp_path: Path, options: list[str]) -> None:
    job = started(tmp_path, [*TORCHRUN, "--nproc-per-node=2", TRAIN], *options)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert_as_one_process(tmp_path / "two", tmp_path / "one", *options)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", "slurm"])
def test_two_nodes(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two "nodes" of one process each, both this machine; SLURM is what Lightning sees of it, its variables."""
    jobs = []
    for rank in range(2):
        command = [sys.executable, TRAIN]
        if by == "torchrun":
            command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
            command += ["--master-addr=127.0.0.1", "--master-port=29517", TRAIN]
        else:
            variables = {"JOB_ID": 7, "JOB_NAME": "train", "NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2, "LOCALID": 0}
            variables |= {"PROCID": rank, "NODEID": rank, "NODELIST": "127.0.0.1", "JOB_NODELIST": "127.0.0.1"}
            for name, value in variables.items():
                monkeypatch.setenv(f"SLURM_{name}", str(value))
            monkeypatch.setenv("MASTER_PORT", "29533")
        jobs.append(started(tmp_path, command, "trainer.num_nodes=2", "trainer.devices=1"))
    outputs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    monkeypatch.undo()
    assert_as_one_process(tmp_path / "two", tmp_path / "one")


def loaders(data: DataModule, part: str, processes: int) -> list[list[list[int]]]:
    """For each process its batches, each as the features of its rows."""
    found = []
    for rank in range(processes):
        data.trainer = SimpleNamespace(world_size=processes, global_rank=rank, lightning_module=None)
        found.append([batch[0][:, 0].int().tolist() for batch in getattr(data, f"{part}_dataloader")()])
    return found


class TestSharing:
    def test_batches_of_two_are_one_of_twice_the_size(self) -> None:
        one = loaders(module(numbered(), batch_size=10), "train", 1)[0]
        two = loaders(module(numbered(), batch_size=5), "train", 2)
        assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]

    def test_rows_that_cannot_be_shared_evenly_are_filled_up(self) -> None:
        data = module(numbered(), batch_size=5)
        rows = data.splits["train"].features[:, 0].int().tolist()
        parts = loaders(data, "train", 3)
        assert len({tuple(map(len, batches)) for batches in parts}) == 1
        flat = list(chain(*chain(*parts)))
        assert set(flat) == set(rows)
        assert len(flat) - len(rows) == -len(rows) % 3

    @pytest.mark.parametrize("part", ["val", "test"])
    @pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 1000])
    def test_every_row_is_evaluated_once(self, part: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data_module, "EVALUATION_BATCH", batch)
        for size in range(4, 16):
            data = module(numbered(), val_size=size, test_size=size)
            rows = data.splits[part].features[:, 0].int().tolist()
            for processes in (1, 2, 3, 4):
                parts = loaders(data, part, processes)
                assert sorted(chain(*chain(*parts))) == sorted(rows)
                assert len({len(batches) for batches in parts}) == 1

    def test_fewer_rows_than_processes(self) -> None:
        with pytest.raises(
            InputError, match=r"row of the val part for each of 5 processes, but got 4; raise data.val_"
        ):
            loaders(module(numbered(), val_size=4), "val", 5)


def test_spawned_processes_hand_their_parameters_back(tmp_path: Path) -> None:
    """In a file that is no checkpoint, by the plugin that writes and reads these."""
    parameters = torch.nn.Linear(3, 2).state_dict()
    WholeFiles().save_checkpoint(parameters, tmp_path / "some" / ".temp.ckpt")
    torch.testing.assert_close(WholeFiles().load_checkpoint(tmp_path / "some" / ".temp.ckpt"), parameters)


class TestSweeps:
    def test_script_launched_ddp_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training.config, "in_sweep", lambda: True)
        with pytest.raises(
            InputError, match=r"strategy=ddp runs this command line in 2; use trainer.strategy=ddp_spawn"
        ):
            training._trainer(configured(tmp_path, "trainer=ddp"))
        training._trainer(configured(tmp_path, "trainer=ddp", "trainer.devices=1"))
        training._trainer(configured(tmp_path, "trainer=ddp", "trainer.strategy=ddp_spawn"))

    @pytest.mark.slow
    @needs_two_cores
    def test_ddp_spawn_works(self, tmp_path: Path) -> None:
        command = [
            sys.executable,
            TRAIN,
            "-m",
            *OPTIONS,
            "trainer=ddp",
            "trainer.strategy=ddp_spawn",
            "data.batch_size=4",
        ]
        command += ["optimizer.lr=1,5", f"hydra.sweep.dir={tmp_path}"]
        job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert job.returncode == 0, job.stderr
        assert "sweep of 2 runs" in job.stdout
        assert_as_one_process(tmp_path / "1", tmp_path / "one", "optimizer.lr=5")
