"""The ordinary comforts, each compared with torch's own: schedules, penalties, weights, metrics, the step's finder."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional import f1_score, mean_absolute_error

from manual_mlp import InputError
from manual_mlp.training import run as training
from manual_mlp.training.closing import _imbalance
from manual_mlp.training.module import MLPModule
from manual_mlp.training.sources import Samples
from manual_mlp.training.strategies import BACKPROP
from tests.configs import configured
from tests.test_data import module as data_of

QUICK = ["data=iris", "threads=1", "trainer.enable_checkpointing=false", "trainer.precision=64-true", "~logger"]


@pytest.fixture
def fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MLPModule]:
    """fitted(*overrides): the module as it is after training."""
    modules = []
    make = training._module
    monkeypatch.setattr(training, "_module", lambda *arguments: modules.append(make(*arguments)) or modules[-1])

    def fit(*overrides: str) -> MLPModule:
        training.run(configured(tmp_path, *QUICK, *overrides))
        return modules[-1]

    return fit


def parameters(module: MLPModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.net.named_parameters()}


class TestSchedules:
    @pytest.mark.parametrize("backprop", BACKPROP)
    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (["scheduler=step", "scheduler.step_size=1", "scheduler.gamma=0.5"], [1.0, 0.5, 0.25, 0.125]),
            (["scheduler=step", "scheduler.step_size=11", "scheduler.interval=step"], [1.0, 0.1, 0.01, 0.001]),
            (["scheduler=plateau", "scheduler.patience=0", "+scheduler.threshold=0.99"], [1.0, 1.0, 0.1, 0.01]),
        ],
    )
    def test_step_follows(
        self, fitted, monkeypatch: pytest.MonkeyPatch, backprop: str, overrides: list[str], expected: list[float]
    ) -> None:
        seen: list[float] = []
        monkeypatch.setattr(
            MLPModule, "on_train_epoch_start", lambda self: seen.append(self.optimizers().param_groups[0]["lr"])
        )
        fitted("optimizer.lr=1", "trainer.max_epochs=4", f"backprop={backprop}", *overrides)
        assert seen == pytest.approx(expected)

    def test_cosine_ends_at_the_last_epoch(self, fitted) -> None:
        module = fitted("scheduler=cosine", "trainer.max_epochs=2")
        assert module.lr_schedulers().T_max == 2
        assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            (["scheduler=step", "scheduler.interval=batch"], r"interval to be epoch or step, but got batch"),
            (["scheduler=step", "+scheduler.gama=1"], r"did you mean gamma\?"),
            (["scheduler=plateau", "scheduler.factor=2"], r"values that the scheduler takes, but: .*correct scheduler"),
            (["scheduler=plateau", "scheduler.monitor=val_acc"], r"options that Lightning accepts, but: .*val_acc"),
        ],
    )
    def test_mistakes(self, fitted, overrides: list[str], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            fitted("trainer.max_epochs=1", *overrides)


class TestPenalty:
    @pytest.mark.parametrize("backprop", ["layers", "network", "autograd"])
    def test_l1_is_the_derivative_of_the_penalty(self, fitted, backprop: str) -> None:
        """One step on all rows, from the same parameters, with and without: they differ by lr λ sign W."""
        options = ["data.batch_size=1000", "trainer.max_epochs=1", "optimizer.lr=0.5", f"backprop={backprop}"]
        start = parameters(fitted(*options, "optimizer.lr=0"))
        plain, penalised = parameters(fitted(*options)), parameters(fitted(*options, "model.l1=0.01"))
        for name, value in start.items():
            penalty = value.clone().requires_grad_()
            (0.01 * penalty.abs().sum() if value.ndim == 2 else 0 * penalty.sum()).backward()
            torch.testing.assert_close(plain[name] - penalised[name], 0.5 * penalty.grad, rtol=0, atol=1e-14)

    def test_engine_refuses_l1(self, fitted) -> None:
        with pytest.raises(InputError, match=r"model.l1=0 for backprop=engine, .* got 0.01; .* backprop=network"):
            fitted("model.l1=0.01", "backprop=engine")
        with pytest.raises(InputError, match=r"model.l1 of at least 0, but got -1"):
            fitted("model.l1=-1")


class TestGradients:
    @pytest.mark.parametrize("backprop", BACKPROP)
    def test_clipped(self, fitted, backprop: str) -> None:
        options = ["data.batch_size=1000", "trainer.max_epochs=1", "optimizer.lr=1", f"backprop={backprop}"]
        start = parameters(fitted(*options, "optimizer.lr=0"))
        end = parameters(fitted(*options, "trainer.gradient_clip_val=0.01"))
        moved = torch.cat([(end[name] - start[name]).flatten() for name in start]).norm().item()
        assert moved == pytest.approx(0.01, rel=1e-3)

    @pytest.mark.parametrize("backprop", ["layers", "network", "autograd"])
    def test_accumulated(self, fitted, backprop: str) -> None:
        """Two batches of 4 are one of 8; the 104 training rows are a multiple of both."""
        options = ["trainer.max_epochs=2", "data.val_size=15", "data.test_size=31", f"backprop={backprop}"]
        one = parameters(fitted(*options, "data.batch_size=8"))
        two = parameters(fitted(*options, "data.batch_size=4", "trainer.accumulate_grad_batches=2"))
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


WEIGHTED = {  # of a row: the cost by torch's own operations
    "quadratic": lambda a, y: (a - y).square().sum(1) / 2,
    "bce": lambda a, y: nn.functional.binary_cross_entropy_with_logits(a, y, reduction="none").mean(1),
    "cross_entropy": lambda a, y: nn.functional.cross_entropy(a, y, reduction="none"),
}


class TestWeights:
    @pytest.mark.parametrize(
        ("backprop", "loss"),
        [*((backprop, "cross_entropy") for backprop in BACKPROP),
         *((backprop, loss) for backprop in ("layers", "autograd") for loss in ("quadratic", "bce"))],
    )  # fmt: skip
    def test_cost_is_the_weighted_mean(self, fitted, backprop: str, loss: str) -> None:
        """The step on all rows is the one of torch's gradient of 1/N Σ w_n C_n, w of mean 1."""
        options = ["data.batch_size=1000", "trainer.max_epochs=1", f"model.loss={loss}", f"backprop={backprop}"]
        module = fitted(*options, "optimizer.lr=0")
        start = parameters(module)
        end = parameters(fitted(*options, "optimizer.lr=0.5", "data.class_weight=[1,2,5]"))
        rows = module.trainer.datamodule.splits["train"]
        weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[rows.target]
        module.load_state_dict({f"net.{name}": value for name, value in start.items()})
        prediction = module.net(rows.features.double())
        target = nn.functional.one_hot(rows.target, 3).double()
        (WEIGHTED[loss](prediction, target) * weight).mean().div(weight.mean()).backward()
        for name, parameter in module.net.named_parameters():
            torch.testing.assert_close(start[name] - end[name], 0.5 * parameter.grad, rtol=1e-6, atol=1e-8)

    def test_balanced_classes_count_alike(self) -> None:
        samples = Samples(np.arange(100.0)[:, None], (np.arange(100) < 20).astype(int), ("a", "b"))
        rows = data_of(samples, class_weight="balanced").splits["train"]
        _, target, weight = rows.__getitems__(list(range(len(rows))))
        assert weight.mean().item() == pytest.approx(1)
        assert weight[target == 0].sum().item() == pytest.approx(weight[target == 1].sum().item())
        assert len(rows[0]) == 3
        assert len(data_of(samples, class_weight="balanced").splits["val"][0]) == 2

    def test_column_of_a_table(self, tmp_path: Path, fitted) -> None:
        """Every second row counts, of mean 1 over the training part; the column is no feature."""
        lines = [f"{i},{i % 5},{3 * i},{float(i % 2)}" for i in range(60)]
        (tmp_path / "t.csv").write_text("\n".join(["a,b,y,count", *lines]))
        source = [f"data.source.path={tmp_path}/t.csv", "data.source.target=y", "data.source.task=regression"]
        module = fitted("data=table", *source, "data.source.weight=count", "trainer.max_epochs=1")
        rows = module.trainer.datamodule.splits["train"]
        assert rows.features.shape[1] == 2
        weight = rows.tensors[2]
        assert sorted(set(weight.tolist())) == pytest.approx([0, len(rows) / weight.bool().sum().item()])
        with pytest.raises(InputError, match=r"data.source.weight to name a column .* has no 'counts'"):
            fitted("data=table", *source, "data.source.weight=counts")

    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            (
                ["data.class_weight=balanced", "backprop=engine"],
                r"cross_entropy for weighted .*backprop=layers",
            ),
            (["data.class_weight=balanced", "model.loss=mse"], r"quadratic or bce or cross_entropy .* but got mse"),
            (["data.class_weight=[1,2]"], r"balanced or a number for each of 3 classes, but got \[1, 2\]"),
            (["data.class_weight=even"], r"balanced or a number for each of 3 classes, but got even"),
            (["data.class_weight=[1,-2,3]"], r"weights of at least 0, .* the least is -2 and the greatest 3"),
            (["data=diabetes", "data.class_weight=balanced"], r"class_weight to be null for a regression"),
        ],
    )
    def test_mistakes(self, fitted, overrides: list[str], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            fitted("trainer.max_epochs=1", *overrides)

    def test_imbalance_is_told(self) -> None:
        def told(small: int, loss: str = "quadratic", **options: object) -> str:
            target = (np.arange(100) < small).astype(int)
            data = data_of(Samples(np.arange(100.0)[:, None], target, ("many", "few")), **options)
            return _imbalance(data, MLPModule(1, 2, ("many", "few"), loss=loss, backprop="engine"))

        assert told(45) == ""
        advice = "80.0 % many, 20.0 % few, data.class_weight=balanced weights them equally"
        assert told(20, loss="cross_entropy") == advice
        assert told(20) == "80.0 % many, 20.0 % few"
        assert told(20, class_weight="balanced").endswith("20.0 % few, weighted by data.class_weight")


class TestMetrics:
    def test_of_classes(self, fitted, capsys) -> None:
        metric = ["+metrics.f1._target_=torchmetrics.F1Score", "+metrics.f1.average=macro"]
        module = fitted(*metric, "trainer.max_epochs=5", "optimized_metric=test_f1", "model.loss=cross_entropy")
        rows = module.trainer.datamodule.splits["test"]
        prediction = module.net(rows.features.to(next(module.parameters()))).argmax(1)
        expected = f1_score(prediction, rows.target, "multiclass", num_classes=3, average="macro").item()
        summary = capsys.readouterr().out
        assert float(re.search(r"returned +test_f1 ([\d.]+)", summary)[1]) == pytest.approx(expected, rel=1e-5)
        assert re.search(r"val f1 +0\.\d", summary)
        figures, _, _ = summary.partition("files in")  # a path may be of any length
        assert max(map(len, figures.splitlines())) <= 60

    def test_of_numbers_in_their_units(self, fitted) -> None:
        metric = "+metrics.mae._target_=torchmetrics.MeanAbsoluteError"
        module = fitted("data=diabetes", metric, "trainer.max_epochs=2")
        rows = module.trainer.datamodule.splits["test"]
        values = (module.net(rows.features.double()), rows.target.double())
        expected = mean_absolute_error(*(value * module.target_scale + module.target_mean for value in values))
        assert module.trainer.callback_metrics["test_mae"].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_mistakes(self, fitted) -> None:
        with pytest.raises(InputError, match=r"one number of metrics.c, but got 9; average them"):
            fitted("+metrics.c._target_=torchmetrics.ConfusionMatrix", "trainer.max_epochs=1")
        with pytest.raises(InputError, match=r"no torchmetrics.F1Scor; did you mean torchmetrics.F1Score\?"):
            fitted("+metrics.f1._target_=torchmetrics.F1Scor")


@pytest.mark.parametrize("backprop", BACKPROP)
def test_step_is_found(fitted, backprop: str, capsys) -> None:
    module = fitted("callbacks=lr_finder", "trainer.max_epochs=20", "data.batch_size=20", f"backprop={backprop}")
    assert 1e-4 < module.lr < 10
    assert module.lr != 5.0
    assert module.optimizers().param_groups[0]["lr"] == module.lr
    assert module.trainer.current_epoch == 20
    assert f"lr {module.lr}"[:7] in capsys.readouterr().out
