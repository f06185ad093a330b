"""Sweeps: every run in its folder, and a table, a CSV and a figure that compare them."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from math import nan
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from manual_mlp import InputError
from manual_mlp.plots import sweep_figure
from manual_mlp.training.sweep import Comparison, Run, ranked, read_runs, table, write_csv
from tests.configs import ROOT


def made(values: Mapping[tuple[str, ...], float], *names: str, metric: str = "val_loss") -> list[Run]:
    """Runs with these settings and figures; NaN for one that failed."""
    runs = []
    for number, (settings, value) in enumerate(values.items()):
        figures = {metric: value, "train_loss": value / 2} if value == value else {}
        error = "" if figures else "it broke"
        runs.append(Run(str(number), dict(zip(names, settings, strict=True)), metric, figures, error))
    return runs


def drawn(folder: Path, runs: list[Run]) -> Figure:
    settings = list(runs[0].settings)
    write_csv(folder / "sweep.csv", runs, settings)
    return sweep_figure(folder / "sweep.csv", settings, runs[0].metric, ranked(runs)[0].name)


def test_a_best_run_that_cannot_be_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs are compared all the same, and one that failed ends the sweep with an error."""
    for number, left in enumerate(({"figures": {"val_loss": 1.0}}, {"error": "it broke"})):
        folder = tmp_path / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- optimizer.lr={number}")
        (folder / "figures.json").write_text(json.dumps({"metric": "val_loss", **left}))
    comparison = Comparison()
    comparison.started = 0.0
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "closing": None})
    with pytest.raises(SystemExit, match="1 of the 2 runs failed"):
        comparison.on_multirun_end(config)
    said = capsys.readouterr().out
    assert "not tested: FileNotFoundError" in said or "not tested: expected" in said
    assert "sweep of 2 runs" in said
    assert (tmp_path / "sweep.csv").exists()


def test_whole_sweep(tmp_path: Path) -> None:
    """From the command line: runs go on after one that fails, and are compared."""
    command = [sys.executable, str(ROOT / "train.py"), "-m", "data=iris", "optimizer.lr=1,-1,2", "threads=1"]
    command += ["trainer.max_epochs=1", f"hydra.sweep.dir={tmp_path}", "trainer.enable_progress_bar=false"]
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert job.stdout.count("test accuracy") == 1, job.stderr  # the winner's
    assert re.search(r"The best run, [02], is tested; the others are not:\n\n  data  ", job.stdout)
    assert job.stderr.splitlines() == [
        "Error: expected values that the optimizer takes, but: Invalid learning rate: -1; correct optimizer.*",
        "Error: 1 of the 3 runs failed; their reasons stand above and in sweep.csv",
    ]
    assert job.returncode == 1
    comparison = job.stdout[job.stdout.index("sweep of 3 runs (* best val_loss)") :].splitlines()
    assert [line.split()[: line.startswith("*") + 2] for line in comparison[2:6]] in (
        [["run", "lr"], ["*", "0", "1"], ["1", "-1"], ["2", "2"]],
        [["run", "lr"], ["0", "1"], ["1", "-1"], ["*", "2", "2"]],
    )
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(bool(row["test_loss"]) for row in rows) == [False, False, True]
    for row in (rows[0], rows[2]):
        figures = json.loads((tmp_path / row["run"] / "figures.json").read_text())["figures"]
        assert {name: float(row[name]) for name in figures} == figures
    assert rows[0]["val_loss"] != rows[2]["val_loss"]
    assert rows[1]["val_loss"] == ""
    assert "Invalid learning rate" in rows[1]["error"]
    assert (tmp_path / "sweep.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["joblib", "optuna"])
def test_other_launcher_and_sweeper(tmp_path: Path, how: str) -> None:
    """What the extra `sweep` brings; a run that fails is told there too."""
    options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "optimizer.lr=1,-1,2"]
    if how == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        options = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "optimizer.lr=choice(1,-1)"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", "data=iris", "threads=1", "trainer.max_epochs=1", *options]
    job = subprocess.run([*command, f"hydra.sweep.dir={tmp_path}"], cwd=tmp_path, capture_output=True, text=True)
    assert "sweep of 3 runs (* best val_loss)" in job.stdout, job.stderr
    assert job.stderr.count("Error: expected values that the optimizer takes") == job.stdout.count("  failed")
    assert (tmp_path / "sweep.png").exists()


class TestTable:
    def test_fits_and_marks_the_best(self) -> None:
        values = {("0.0123456789012345", "relu"): 0.5, ("2", "tanh"): 0.25, ("3", "relu"): nan}
        runs = made(values, "optimizer.lr", "model.activation")
        lines = table(runs, ranked(runs)).splitlines()
        assert lines[3:] == [
            "  run  lr       activation  val_loss  train_loss",
            "  0    0.01235  relu        0.5       0.25",
            "* 1    2        tanh        0.25      0.125",
            "  2    3        relu        failed",
        ]
        assert max(map(len, table(runs, ranked(runs), 44).splitlines())) <= 44

    def test_narrow_window_wraps_settings(self) -> None:
        runs = made({("0.1", "relu"): 0.5, ("2", "tanh"): 0.25}, "optimizer.lr", "model.activation")
        lines = table(runs, ranked(runs), 33).splitlines()
        assert lines[4:6] == ["  0    lr=0.1,          0.5", "       activation=relu"]
        assert max(map(len, lines)) <= 33

    def test_settings_of_the_same_name_are_told_apart(self) -> None:
        runs = made({("1", "2"): 1.0, ("2", "2"): 2.0}, "seed", "data.seed")
        assert "seed  data.seed" in table(runs, ranked(runs))

    def test_of_many_the_best(self) -> None:
        runs = made({(str(seed),): 1 / (1 + seed) for seed in range(50)}, "seed")
        lines = table(runs, ranked(runs)).splitlines()
        assert lines[1] == "sweep of 50 runs, the best 30 (* best val_loss)"
        assert lines[4].startswith("* 49 ")
        assert len(lines) == 34

    def test_what_a_terminal_would_obey_is_shown(self) -> None:
        runs = made({("\x1b[31m",): 1.0, ("2",): 2.0}, "seed")
        assert "\\x1b[31m" in table(runs, ranked(runs))

    @pytest.mark.parametrize(
        ("metric", "minimize", "best"),
        [("val_loss", None, 0.2), ("test_rmse", None, 0.2), ("val_accuracy", None, 0.7), ("val_r2", None, 0.7),
         ("val_accuracy", True, 0.2), ("val_loss", False, 0.7)],
    )  # fmt: skip
    def test_what_is_better(self, metric: str, minimize: bool | None, best: float) -> None:
        runs = made({("1",): 0.2, ("2",): nan, ("3",): 0.7}, "seed", metric=metric)
        assert [run.value for run in ranked(runs, minimize)] == sorted([0.2, 0.7], key=lambda value: abs(value - best))


class TestReadRuns:
    def write(self, folder: Path, name: str, *overrides: str, value: float | None = None) -> None:
        (folder / name / ".hydra").mkdir(parents=True)
        (folder / name / ".hydra" / "overrides.yaml").write_text("\n".join(f"- {override}" for override in overrides))
        if value is not None:
            content = {"metric": "val_loss", "figures": {"val_loss": value}}
            (folder / name / "figures.json").write_text(json.dumps(content))

    def test_order_shared_settings_and_unfinished(self, tmp_path: Path) -> None:
        self.write(tmp_path, "10", "+a=1", "b=[1,2]", value=2.0)
        self.write(tmp_path, "9", "+a=1", "b=x", value=1.0)
        self.write(tmp_path, "deep/er", "+a=1", "~c")
        runs = read_runs(tmp_path)
        assert [(run.name, run.settings, run.value) for run in runs[:2]] == [
            ("9", {"b": "x"}, 1.0),
            ("10", {"b": "[1,2]"}, 2.0),
        ]
        assert (runs[2].name, runs[2].settings, runs[2].error) == ("deep/er", {"~c": ""}, "it did not end")

    def test_earlier_sweep_in_the_same_folder(self, tmp_path: Path) -> None:
        self.write(tmp_path, "0", "a=1", value=2.0)
        later = (tmp_path / "0" / "figures.json").stat().st_mtime + 1
        assert read_runs(tmp_path, later) == []


class TestFigure:
    def test_one_number_gives_the_validation_curve(self, tmp_path: Path) -> None:
        (axes,) = drawn(tmp_path, made({("0.01",): 1.0, ("1",): 0.5, ("0.1",): 2.0, ("9",): nan}, "optimizer.lr")).axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        assert lines == {
            "train cost": [[0.01, 0.5], [0.1, 1.0], [1, 0.25]],
            "val cost": [[0.01, 1.0], [0.1, 2.0], [1, 0.5]],
            "best, run 1": [[1, 0.5]],
        }
        assert axes.get_xscale() == "log"

    def test_several_settings_give_bars(self, tmp_path: Path) -> None:
        """A value that is too long for a label is cut; the number of the run tells its bar from others."""
        hidden = [f"[{','.join(['64'] * count)}]" for count in (20, 100)]
        values = {(h, a, s): len(h) + int(s) for h, a, s in product(hidden, ["relu", "silu"], "01")}
        (axes,) = drawn(tmp_path, made(values, "model.hidden", "model.activation", "seed")).axes
        assert [bar.get_width() for bar in axes.patches] == list(values.values())
        assert axes.get_yticklabels()[5].get_text() == "[64,64,64,64,…, relu, 1 (5)"

    def test_many_runs_fit_into_a_picture(self, tmp_path: Path) -> None:
        values = {(str(i), "ab"[i % 2]): 1.0 for i in range(200)}
        figure = drawn(tmp_path, made(values, "optimizer.lr", "model.activation"))
        assert figure.get_figheight() * 120 < 2**16  # the most that Agg draws

    def test_no_text_is_cut_off(self, tmp_path: Path) -> None:
        """That of the axes too, if few bars leave a low picture."""
        values = {("sigmoid", "torch"): 1.0, ("relu", "glorot"): 0.5}
        figure = drawn(tmp_path, made(values, "model.activation", "model.initialisation"))
        FigureCanvasAgg(figure).draw()
        width, height = figure.canvas.get_width_height()
        (axes,) = figure.axes
        found = [*figure.texts, *axes.texts, axes.xaxis.label, *axes.get_yticklabels()]
        boxes = {text.get_text(): text.get_window_extent() for text in found}
        assert "activation, initialisation (run)" in boxes
        assert not [text for text, box in boxes.items() if min(*box.p0, width - box.x1, height - box.y1) < 0]

    def test_no_number_gives_bars(self, tmp_path: Path) -> None:
        (axes,) = drawn(tmp_path, made({("relu",): 1.0, ("tanh",): 0.5}, "model.activation")).axes
        assert [bar.get_width() for bar in axes.patches] == [1.0, 0.5]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["relu (0)", "tanh (1)"]

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        write_csv(tmp_path / "sweep.csv", made({("1",): nan}, "seed"), ["seed"])
        with pytest.raises(InputError, match=r"expected runs with val_loss in .*sweep.csv"):
            sweep_figure(tmp_path / "sweep.csv", ["seed"], "val_loss")
