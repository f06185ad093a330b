"""The Lightning module and a whole run: what is trained, logged, kept, and printed at the end."""

import csv
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, root_mean_squared_error
from torch import nn

import manual_mlp as mm
from manual_mlp import InputError
from manual_mlp.training import run as training
from manual_mlp.training.callbacks import Writer
from manual_mlp.training.closing import _table
from manual_mlp.training.module import MLPModule, resolve_output_activation
from manual_mlp.training.strategies import BACKPROP, INITIALISATIONS
from tests.configs import ROOT, configured


@pytest.fixture
def run(tmp_path: Path):
    """run(*overrides) trains and returns the metric; the run folder is tmp_path."""
    return lambda *overrides: training.run(configured(tmp_path, *overrides))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def logged(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """The figures that such a run writes, row by row, without Lightning's number of the step."""
    training.run(configured(folder, *overrides))
    return [{name: float(cell) for name, cell in row.items() if cell and name != "step"} for row in rows(folder)]


def figures(checkpoint: Path) -> dict[str, float]:
    return torch.load(checkpoint, weights_only=True)["figures"]


class TestMainJob:
    def test_default_reaches_95_percent(self, tmp_path: Path) -> None:
        """`python train.py` with nothing else, in a folder of its own."""
        job = subprocess.run([sys.executable, str(ROOT / "train.py")], cwd=tmp_path, capture_output=True, text=True)
        assert job.returncode == 0, job.stderr
        accuracy = re.search(r"test accuracy +([\d.]+) %", job.stdout)
        assert accuracy, job.stdout
        assert float(accuracy[1]) >= 95
        summary = job.stdout[job.stdout.index("  data  ") :]
        assert max(map(len, summary.splitlines())) <= 60
        assert len((job.stdout + job.stderr).encode()) < 5000  # nobody watches: no bar, a line an epoch
        lines = re.findall(r"^epoch (\d+): train cost \S+, val cost \S+, val accuracy \S+ %$", job.stdout, re.MULTILINE)
        assert lines == [str(epoch) for epoch in range(30)]
        assert job.stderr == ""
        assert not re.search("Warning|GPU available|Tip|deprecated", job.stdout + job.stderr)

        folder = tmp_path / re.search(r"files in (\S+)", summary)[1]
        for name in (
            "best.ckpt",
            "last.ckpt",
            "metrics.csv",
            "learning_curves.png",
            "report.html",
            "train.log",
            ".hydra",
        ):
            assert (folder / name).exists()
            assert name in summary
        log = (folder / "train.log").read_text()
        assert "max_epochs=30" in log  # Lightning's messages went there
        assert "litlogger" not in log
        assert "💡" not in log
        for name in ("best.ckpt", "last.ckpt"):
            assert str(tmp_path).encode() not in (folder / name).read_bytes()


class TestRun:
    @pytest.mark.parametrize("metric", ["val_loss", "val_accuracy", "test_accuracy", "train_loss"])
    def test_returns_the_metric(self, run, tmp_path: Path, metric: str) -> None:
        value = run("data=iris", "trainer.max_epochs=3", f"optimized_metric={metric}")
        logged = [float(row[metric]) for row in rows(tmp_path) if row[metric]]
        assert any(value == pytest.approx(other, rel=1e-6) for other in logged)

    def test_unknown_metric_is_told_before_training(self, run, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"but got val_acc; did you mean val_accuracy\?"):
            run("data=iris", "optimized_metric=val_acc")
        assert not (tmp_path / "metrics.csv").exists()

    def test_best_and_last_checkpoint(self, run, tmp_path: Path) -> None:
        run("data=diabetes", "trainer.max_epochs=12", "optimizer.lr=0.1")  # so large a step that it gets worse again
        losses = [float(row["val_loss"]) for row in rows(tmp_path) if row["val_loss"]]
        assert len(losses) == 12
        assert min(losses) < losses[-1]
        assert figures(tmp_path / "best.ckpt")["val_loss"] == pytest.approx(min(losses))
        assert figures(tmp_path / "last.ckpt")["val_loss"] == pytest.approx(losses[-1])

    def test_csv_has_each_figure_once_an_epoch(self, run, tmp_path: Path) -> None:
        run("data=iris", "trainer.max_epochs=4")
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert [int(row["epoch"]) for row in rows(tmp_path) if row[name]] == [0, 1, 2, 3]
        assert len([row for row in rows(tmp_path) if row["test_accuracy"]]) == 1

    @pytest.mark.parametrize("more", [[], ["members=3", "backprop=engine"], ["trainer.max_epochs=1"]])
    def test_csv_has_a_whole_row_an_epoch(self, run, tmp_path: Path, more: list[str]) -> None:
        """Training before validation before test, the test beside the epoch whose parameters were tested."""
        run("data=diabetes", "trainer.max_epochs=12", "optimizer.lr=0.1", *more)
        found = rows(tmp_path)
        assert [row["epoch"] for row in found] == [*map(str, range(len(found)))]
        names = [*found[0]]
        assert names[:3] == ["epoch", "step", "train_loss"]
        assert [name.partition("_")[0] for name in names[2:]] == sorted(
            (name.partition("_")[0] for name in names[2:]), key=["train", "val", "test"].index
        )
        assert all(row[name] for row in found for name in names if not name.startswith("test_"))
        (tested,) = (row for row in found if row["test_loss"])
        if not more:
            assert int(tested["epoch"]) == torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] < 11

    def test_csv_of_a_run_that_validates_more_often_and_logs_its_step(self, run, tmp_path: Path) -> None:
        """A figure that comes twice in an epoch has two rows; each row has its epoch, so that the run can go on."""
        words = ["data=iris", "+trainer.val_check_interval=0.5", "+callbacks.step.logging_interval=epoch"]
        words += ["+callbacks.step._target_=lightning.pytorch.callbacks.LearningRateMonitor"]
        run(*words, "trainer.max_epochs=3")
        expected = (tmp_path / "metrics.csv").read_text()
        assert [(row["epoch"], bool(row["train_loss"]), bool(row["lr-SGD"])) for row in rows(tmp_path)] == [
            (str(epoch), half == 1, half == 0) for epoch in range(3) for half in range(2)
        ]
        run(*words, "trainer.max_epochs=1", f"run_dir='{tmp_path}/a'")
        run(*words, "trainer.max_epochs=3", f"run_dir='{tmp_path}/a'", f"ckpt_path='{tmp_path}/a/last.ckpt'")
        assert (tmp_path / "a" / "metrics.csv").read_text() == expected

    def test_rows_of_an_older_version_become_one_an_epoch(self, tmp_path: Path) -> None:
        writer = Writer(str(tmp_path))
        writer.take("epoch,step,train_loss,val_loss\n0,9,,0.25\n0,9,0.5,\n1,19,,0.125\n")
        writer.log_metrics({"epoch": 1, "train_loss": 0.75}, 19)
        writer.save()
        expected = "epoch,step,train_loss,val_loss\n0,9,0.5,0.25\n1,19,0.75,0.125\n"
        assert (tmp_path / "metrics.csv").read_text() == expected

    def test_no_step_logs(self, run, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        in_step = []
        log, step = MLPModule.log, MLPModule._add
        monkeypatch.setattr(
            MLPModule, "log", lambda self, name, *a, **k: (calls.append(name), log(self, name, *a, **k))
        )

        def counted_step(self: MLPModule, *arguments: object) -> None:
            before = len(calls)
            step(self, *arguments)
            in_step.append(len(calls) - before)

        monkeypatch.setattr(MLPModule, "_add", counted_step)
        run("data=iris", "trainer.max_epochs=3")
        assert sum(in_step) == 0
        assert len(in_step) > 30
        assert len(calls) == 3 * 4 + 2  # train and val, loss and accuracy, three epochs; then test

    def test_same_seed_same_figures(self, run, tmp_path: Path) -> None:
        results = [run("data=iris", "trainer.max_epochs=3", "model.dropout=0.1", f"seed={seed}") for seed in (1, 1, 2)]
        assert results[0] == results[1] != results[2]

    def test_early_stopping(self, run, tmp_path: Path) -> None:
        run("data=iris", "callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=0.0")
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1

    def test_tensorboard_beside_csv(self, run, tmp_path: Path) -> None:
        run("data=iris", "logger=tensorboard", "trainer.max_epochs=1")
        assert list((tmp_path / "tensorboard").glob("events*"))
        assert (tmp_path / "metrics.csv").exists()

    def test_missing_tensorboard(self, run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
        monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
        with pytest.raises(InputError, match="-m pip install tensorboard"):
            run("data=iris", "logger=tensorboard")

    @pytest.mark.parametrize(
        "overrides",
        [
            ["~callbacks", "~logger", "trainer.enable_checkpointing=false"],
            ["trainer.enable_checkpointing=false"],
            ["trainer.fast_dev_run=true"],
            ["trainer.precision=64-true"],
            ["trainer.precision=bf16-mixed"],
            ["trainer.gradient_clip_val=0.5", "trainer.accumulate_grad_batches=2"],
            ["trainer.overfit_batches=1"],
            ["model.hidden=[]"],
            ["optimizer._target_=torch.optim.RMSprop", "optimizer.lr=0.01"],
            ["optimizer.momentum=0.9", "optimizer.lr=0.5"],
            *([f"optimizer._target_=torch.optim.{name}"] for name in ("RMSprop", "Rprop", "Adagrad", "NAdam", "LBFGS")),
            ["trainer.max_epochs=0"],
            ["trainer.limit_train_batches=0"],
            ["trainer.max_epochs=-1", "trainer.max_steps=5"],
            ["trainer.max_epochs=null", "trainer.max_steps=3"],
            ["trainer.limit_val_batches=0", "~callbacks", "optimized_metric=train_loss"],
        ],
    )
    def test_ordinary_options_work(self, run, capsys: pytest.CaptureFixture[str], overrides: list[str]) -> None:
        assert np.isfinite(run("data=iris", "trainer.max_epochs=1", *overrides))
        assert "test accuracy" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("overrides", "threads"), [([], 1), (["model.hidden=[800,800]"], 7), (["threads=null"], 7), (["threads=2"], 2)]
    )
    def test_threads(self, run, monkeypatch: pytest.MonkeyPatch, overrides: list[str], threads: int) -> None:
        """One for a small net; torch's default, here 7, for a large one, also after a small one in a sweep."""
        calls: list[int] = []
        monkeypatch.setattr(training, "TORCHS_THREADS", 7)
        monkeypatch.setattr(torch, "set_num_threads", calls.append)
        run("data=iris", "trainer.fast_dev_run=true", *overrides)
        assert calls == [threads]

    def test_lbfgs_with_all_rows_learns(self, run) -> None:
        overrides = ["optimizer._target_=torch.optim.LBFGS", "data.batch_size=200", "model.loss=cross_entropy"]
        assert run("data=iris", "trainer.max_epochs=5", "optimized_metric=test_accuracy", *overrides) > 0.9

    @pytest.mark.parametrize(
        ("overrides", "end"),
        [
            (["trainer.limit_val_batches=0"], r"optimized_metric=val_loss, but trainer.limit_val_batches is 0"),
            (
                ["trainer.max_epochs=0", "optimized_metric=train_loss"],
                r"optimized_metric=train_loss, but nothing was trained",
            ),
        ],
    )
    def test_metric_that_is_never_measured(self, run, overrides: list[str], end: str) -> None:
        with pytest.raises(InputError, match=f"expected a figure for {end}"):
            run("data=iris", *overrides)

    @pytest.mark.parametrize("task", ["classification", "regression"])
    def test_table_as_it_is(self, run, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
        x, path = np.random.default_rng(0).normal(size=(300, 2)), tmp_path / "a_name_that_is_long" / "table.csv"
        y = 1000 * (x[:, 0] - 2 * x[:, 1]) if task == "regression" else (x[:, 0] > x[:, 1]).astype(int)
        path.parent.mkdir()
        np.savetxt(path, np.column_stack([x, y]), delimiter=",", header="a,b,y", comments="")
        source = [f"data.source.path={path}", "data.source.target=y", f"data.source.task={task}"]
        metric = "test_r2" if task == "regression" else "test_accuracy"
        assert run("data=table", *source, f"optimized_metric={metric}", "trainer.max_epochs=10") > 0.9
        summary = capsys.readouterr().out
        assert "table.csv (210 train, 30 val, 60 test)" in summary
        assert re.search(rf"returned    {metric} 0\.9\d", summary)
        assert "hint" not in summary
        assert max(map(len, summary.partition("files in")[0].splitlines())) <= 60

    @pytest.mark.parametrize(
        ("overrides", "reason"),
        [
            (["data=iris", "model.activation=relu", "optimizer.lr=50"], "largest class gives 33.33 %"),
            (["data=sine", "optimizer=sgd", "optimizer.lr=1.6"], "guessing the mean gives r2 0"),
        ],
    )
    def test_failed_training_ends_with_a_hint(self, run, capsys, overrides: list[str], reason: str) -> None:
        run("trainer.max_epochs=2", *overrides)
        summary = capsys.readouterr().out
        lr = overrides[-1].partition("=")[2]
        assert reason in " ".join(summary.split())
        assert f"lower optimizer.lr (now {lr}) or use optimizer=adam" in " ".join(summary.split())

    def test_summary_of_extreme_figures_fits(self) -> None:
        for value in (-1.2345e-30, 1.2345e30, -0.00012345, -12345.678):
            lines = _table(dict.fromkeys(("train_loss", "test_loss", "test_rmse", "test_r2"), value)).splitlines()
            assert max(map(len, lines)) <= 60
            assert float(lines[0].split()[-1]) == pytest.approx(value, rel=0.03)

    def test_regression_in_the_units_of_the_target(self, run, tmp_path: Path, capsys) -> None:
        run("data=diabetes", "trainer.max_epochs=2")
        cfg = configured(tmp_path, "data=diabetes")
        data = training.config.build(cfg.data)
        data.setup()
        model = MLPModule.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
        scale, mean = data.target_scale[0], data.target_mean[0]
        with torch.no_grad():
            prediction = model(data.splits["test"].features).numpy() * scale + mean
        target = data.splits["test"].target.numpy() * scale + mean
        logged = rows(tmp_path)[-1]
        assert float(logged["test_rmse"]) == pytest.approx(root_mean_squared_error(target, prediction), rel=1e-4)
        assert float(logged["test_r2"]) == pytest.approx(r2_score(target, prediction), rel=1e-4)
        assert re.search(r"test rmse +\d+", capsys.readouterr().out)

    def test_test_figures_are_those_of_the_best_checkpoint(self, run, tmp_path: Path) -> None:
        accuracy = run("data=moons", "trainer.max_epochs=3", "optimized_metric=test_accuracy")
        data = training.config.build(configured(tmp_path, "data=moons").data)
        data.setup()
        model = MLPModule.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
        rows = data.splits["test"]
        assert accuracy == pytest.approx((model(rows.features).argmax(1) == rows.target).float().mean().item())

    def test_exploding_loss_stops(self, run) -> None:
        with pytest.raises(InputError, match=r"expected a finite loss, .* in epoch 0, .*it began in z³ .*optimizer.lr"):
            run("data=diabetes", "optimizer=sgd", "optimizer.lr=50")

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("model.activation=sigmod", r"one of identity, sigmoid, .*got 'sigmod'"),
            ("model.activation=[relu,relu]", r"one activation for each of the 1 hidden layers; got 2"),
            ("model.loss=crossentropy", r"model.loss to be one of quadratic, mse, bce, cross_entropy, but got 'cross"),
            ("model.initialisation=he", r"model.initialisation to be one of torch, glorot, nielsen, but got 'he'"),
            ("backprop=torch", r"backprop to be one of layers, network, engine, autograd, but got 'torch'"),
            ("model.hidden=[0]", r"positive whole numbers in model.hidden, but got \[0\]"),
            ("model.dropout=2", r"a dropout probability between 0 and 1; got 2"),
            ("optimizer.lr=-1", r"Invalid learning rate: -1; correct optimizer"),
            ("threads=0", r"threads to be auto, a whole number from 1 to 1024, or null, but got 0"),
            ("threads=many", r"threads to be auto, a whole number from 1 to 1024, or null, but got 'many'"),
            ("threads=100000", r"a whole number from 1 to 1024, or null, but got 100000"),
            (
                "optimizer._target_=builtins.print",
                r"optimizer._target_ to make an optimizer, but got None; name its class",
            ),
            ("trainer.accelerator=gpuu", r"Lightning's Trainer accepts, but: .*gpuu"),
            pytest.param(
                "trainer.accelerator=gpu",
                r"Lightning accepts, but: .*; trainer.accelerator=auto works without gpu",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
            ),
            ("trainer.max_epochs=-7", r"options that Lightning accepts, but: .*-7"),
            ("callbacks.best.monitor=val_acc", r"options that Lightning accepts, but: .*val_acc"),
        ],
    )
    def test_wrong_options(self, run, override: str, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            run("data=iris", "trainer.max_epochs=1", override)

    def test_more_processes_than_cores(self, run) -> None:
        with pytest.raises(InputError, match=r"trainer.devices of at most \d+, .* but got 999; lower it"):
            run("data=iris", "trainer.accelerator=cpu", "trainer.devices=999")


class TestBackprop:
    @pytest.mark.parametrize(
        "model",
        [
            ["model.loss=quadratic", "model.initialisation=nielsen", "model.hidden=[5,4]", "model.bias=false"],
            pytest.param(["model.loss=quadratic"], marks=pytest.mark.slow),
            pytest.param(
                ["model.loss=mse", "model.activation=tanh", "model.initialisation=glorot", "optimizer.lr=0.5"],
                marks=pytest.mark.slow,
            ),
            pytest.param(["model.loss=bce", "model.activation=relu", "optimizer.lr=0.5"], marks=pytest.mark.slow),
            [
                "model.loss=cross_entropy",
                "model.activation=[gelu_tanh,softplus]",
                "model.hidden=[6,5]",
                "optimizer=adam",
            ],
            ["model.loss=cross_entropy", "model.activation=silu", "model.dropout=0.2", "optimizer.lr=0.1"],
        ],
    )
    def test_all_give_the_same_figures(self, tmp_path: Path, model: list[str]) -> None:
        layers, *others = [
            logged(tmp_path / backprop, "data=iris", "trainer.max_epochs=4", f"backprop={backprop}", *model)
            for backprop in BACKPROP
        ]
        for other in others:
            assert other == [pytest.approx(row, rel=1e-4) for row in layers]

    @pytest.mark.parametrize("initialisation", INITIALISATIONS)
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_same_bits_to_begin_with_and_same_keys(self, initialisation: str, dropout: float) -> None:
        options = {"hidden": [3, 3], "activation": "tanh", "initialisation": initialisation, "dropout": dropout}
        nets = []
        for backprop in BACKPROP:
            torch.manual_seed(1)
            nets.append(MLPModule(4, 2, backprop=backprop, **options).net.state_dict())
        assert list(nets[0]) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
        for other in nets[1:]:
            torch.testing.assert_close(nets[0], other, rtol=0, atol=0)

    def test_twin_is_torch_alone(self) -> None:
        net = MLPModule(4, 2, "ab", hidden=[3], activation="gelu_tanh", dropout=0.1, backprop="autograd").net
        assert all(type(module).__module__.startswith("torch.nn") for module in net.modules())
        assert not isinstance(net[0], mm.Affine)
        assert len({frozenset(strategy.costs) for strategy in BACKPROP.values()}) == 1

    def test_checkpoints_interchange(self, tmp_path: Path) -> None:
        training.run(configured(tmp_path, "data=iris", "trainer.max_epochs=2"))
        x = torch.randn(5, 4)
        first, *others = (
            MLPModule.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True, backprop=backprop)(x)
            for backprop in BACKPROP
        )
        for other in others:
            torch.testing.assert_close(first, other)


class TestModule:
    def make(self, **options: object) -> MLPModule:
        return MLPModule(4, 3, class_names=["a", "b", "c"], **options)

    @pytest.mark.parametrize(
        ("loss", "classification", "expected"),
        [("quadratic", True, "sigmoid"), ("mse", True, "identity"), ("bce", True, "identity"),
         ("cross_entropy", True, "identity"), ("quadratic", False, "identity"), ("mse", False, "identity")],
    )  # fmt: skip
    def test_auto_output_activation(self, loss: str, classification: bool, expected: str) -> None:
        assert resolve_output_activation("auto", loss, classification) == expected

    @pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
    def test_logits_cost_after_another_output_is_refused(self, loss: str) -> None:
        with pytest.raises(InputError, match=f"output_activation=identity under {loss}, .* but got sigmoid"):
            self.make(loss=loss, output_activation="sigmoid")
        with pytest.raises(InputError, match=f"quadratic or mse for a regression, but got {loss}"):
            MLPModule(4, 1, loss=loss)

    def test_initialisations(self) -> None:
        torch.manual_seed(0)
        nielsen, glorot = (MLPModule(400, 300, hidden=[200], initialisation=name) for name in ("nielsen", "glorot"))
        for parameter in nielsen.parameters():
            assert abs(parameter.mean()) < 0.2
            assert parameter.std().item() == pytest.approx(1, abs=0.15)
        weight, bias = glorot.net[0].weight, glorot.net[0].bias
        assert weight.abs().max() <= (6 / 600) ** 0.5
        assert weight.std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.02)
        assert (bias == 0).all()

    def test_optimizer_is_needed_for_training_only(self) -> None:
        with pytest.raises(InputError, match=r"expected an optimizer for training"):
            self.make().configure_optimizers()
        optimizer = self.make(optimizer=partial(torch.optim.SGD, lr=0.1)).configure_optimizers()
        assert optimizer.param_groups[0]["lr"] == 0.1

    def test_targets_become_one_hot_for_all_but_cross_entropy(self) -> None:
        target = torch.tensor([2, 0])
        assert self.make(loss="quadratic").as_cost_takes(target).tolist() == [[0, 0, 1], [1, 0, 0]]
        assert self.make(loss="cross_entropy").as_cost_takes(target) is target

    def test_cost_is_the_quadratic_cost(self) -> None:
        module, x, target = self.make(), torch.randn(7, 4), torch.randint(0, 3, (7,))
        expected = 0.5 * (module(x) - nn.functional.one_hot(target, 3)).square().sum() / 7
        torch.testing.assert_close(module.training_step((x, target), 0), expected)

    @pytest.mark.slow  # tests/test_predict.py asks it without Lightning, too
    def test_checkpoint_loads_without_hydra(self, tmp_path: Path) -> None:
        training.run(configured(tmp_path, "data=iris", "trainer.max_epochs=1", "model.activation=[relu]"))
        program = (
            "import sys, torch; sys.modules['hydra'] = sys.modules['omegaconf'] = None\n"
            "from manual_mlp.training.module import MLPModule\n"
            f"module = MLPModule.load_from_checkpoint({str(tmp_path / 'best.ckpt')!r}, weights_only=True)\n"
            "print(module(torch.zeros(1, 4)).shape)\n"
        )
        job = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert job.stdout.strip() == "torch.Size([1, 3])", job.stderr

    def test_hyperparameters_are_plain(self, tmp_path: Path) -> None:
        training.run(configured(tmp_path, "data=iris", "trainer.max_epochs=1"))
        saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["hyper_parameters"]
        assert "optimizer" not in saved
        for value in saved.values():
            assert type(value) in (int, float, str, bool, list), value
