"""Every `experiment=` preset in a short form, with what it is there to show."""

import csv
import itertools
import logging
import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from manual_mlp import InputError
from manual_mlp import formulas as sheet
from manual_mlp.plots import delta_by_layer
from manual_mlp.training import closing, sources
from manual_mlp.training import run as training
from manual_mlp.training.module import MLPModule
from manual_mlp.training.sweep import Run
from tests import deep_sigmoid
from tests.configs import CONF, ROOT, configured
from tests.test_data import idx_folder

SHORT = {  # overrides, and the least that the returned figure must reach; the others have tests of their own
    "logistic_neuron": (["trainer.max_epochs=5", "optimized_metric=test_accuracy"], 0.85),
    "xor": (["backprop=engine", "trainer.max_epochs=30", "optimized_metric=test_accuracy"], 0.97),
    "digits": (["backprop=engine", "trainer.max_epochs=3", "optimized_metric=test_accuracy"], 0.85),
    "regression": (["trainer.max_epochs=10", "optimized_metric=val_r2"], 0.1),
    "nielsen": (["data.source.folder=images", "data.val_size=50", "trainer.max_epochs=1"], 0.0),
    "nielsen_fashion": (["data.source.folder=images", "data.val_size=50", "trainer.max_epochs=1"], 0.0),
    "lenet": (["optimizer=adam", "trainer.max_epochs=3", "optimized_metric=test_accuracy"], 0.6),
}
SEEN = {  # how the presets above end
    "logistic_neuron": r"A straight boundary answers \d+\.?\d* % .* regression \d.*: .*line \(report=true draws it: D",
    "xor": r"The net answers [\d.]+ % .* about 75 % at best: the hidden layer separates XOR \(report=true draws",
    "digits": r"The net answers [89]\d.* beside 10\.\d+ % by a guess \(report=true draws it: Confusion matrix\)\.$",
    "regression": r"Of the variance of the test part the net explains \d.* %, better than always guessing the mean",
    "nielsen": r"The net answers \d.* %.* rightly, Nielsen's at its best 95\.42 %: not there yet \(report=true .*Worst",
    "nielsen_fashion": r"The net answers .*by a guess \(report=true draws it: Worst mistakes\)\.$",
    "lenet": r"guess\. The 2 convolutions have 918 weights, dense layers would have 30,720; δ of the first is \d\S* "
    r"of that of the last layer: so few learn to see \(report=true draws it: Flow of δ\)\.$",
}
OTHERS = {"linear_neuron", "perceptron", "perceptron_xor", "chain", "universal_approximator", "deep_sigmoid", "tabular"}
OTHERS |= {"perceptron_theorem", "pretraining", "residual", "batch_norm"}


def run(folder: Path, name: str, *overrides: str) -> float:
    return training.run(configured(folder, f"experiment={name}", *overrides))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """sweep(preset, *overrides): by train.py itself, which the preset makes sweep; the rows of its sweep.csv."""

    def run(name: str, *overrides: str) -> list[dict[str, str]]:
        where = [f"hydra.sweep.dir={tmp_path}", "trainer.enable_progress_bar=false"]
        monkeypatch.setattr(sys, "argv", ["train.py", f"experiment={name}", *where, *overrides])
        monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])  # which Hydra replaces
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert (tmp_path / "sweep.png").exists()
        with (tmp_path / "sweep.csv").open() as file:
            return list(csv.DictReader(file))

    return run


def test_every_preset_is_here_and_on_its_page_and_in_the_help() -> None:
    names = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    assert names == {*SHORT, *OTHERS}
    for text in ((ROOT / "docs" / "lecture.md").read_text(), (CONF / "config.yaml").read_text()):
        assert all(name in text for name in names)


@pytest.mark.parametrize("name", SHORT)
def test_reaches_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    idx_folder(tmp_path / "images")
    overrides, least = SHORT[name]
    assert run(tmp_path / "run", name, *overrides) >= least
    assert re.search(SEEN[name], ended(capsys.readouterr().out))


def ended(printed: str) -> str:
    """Return the last paragraph, in one line."""
    return " ".join(printed.strip().rpartition("\n\n")[2].split())


def test_a_changed_preset_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own sentence would be about another net or other data."""
    run(tmp_path, "linear_neuron", "data=iris", "trainer.max_epochs=1")
    assert re.search(r"^The preset was changed\. The net answers \d.* by a guess\.$", ended(capsys.readouterr().out))


def test_unknown_closing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected closing to be one of chain, .*residual, but got 'x'"):
        training.run(configured(tmp_path, "data=line", "closing=x", "trainer.max_epochs=1"))


class TestPerceptron:
    @staticmethod
    def mistakes(folder: Path, *overrides: str) -> list[float]:
        training.run(configured(folder, *overrides))
        with (folder / "metrics.csv").open() as file:
            return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]

    def test_converges_where_a_line_separates(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        mistakes = self.mistakes(tmp_path, "experiment=perceptron")
        assert ended(capsys.readouterr().out) == (
            f"From epoch {mistakes.index(0)} on the rule makes no mistake: it converged, as the Convergence Theorem "
            "says (learning_curves.png)."
        )
        assert mistakes[0] > 0
        assert mistakes[-1] == 0
        first = mistakes.index(0)
        assert not any(mistakes[first:])  # an epoch without a mistake changes nothing
        module = MLPModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
        samples = sources.halves(400, 0.0, 0)
        scale = samples.features.std(0)
        normal = module.net.affine.weight[0] / torch.tensor(scale)  # of the line, in the units of the samples
        assert abs(normal[0] / normal[1] - 0.75) < 0.15

    def test_never_settles_on_xor(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        best = ["callbacks.best.monitor=val_loss", "callbacks.best.save_on_train_epoch_end=null"]
        mistakes = self.mistakes(tmp_path, "experiment=perceptron_xor", "trainer.max_epochs=10", *best)
        assert min(mistakes) > 0.2
        printed = capsys.readouterr().out
        assert "class_weight" not in printed  # the rule would refuse them
        assert re.search(r"^Even in its best epoch, \d+, .*mistakes on \d\d.* %.*never settles", ended(printed))

    def test_theorem(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made = self.mistakes(tmp_path, "experiment=perceptron_theorem", "trainer.max_epochs=20")
        rows = (
            r"^The rule made (\d+) mistakes and then no more, where the theorem allows \(R/γ\)² = (\d+): as the theorem"
        )
        told, most = map(int, re.findall(rows, ended(capsys.readouterr().out))[0])
        assert told == pytest.approx(280 * sum(made), abs=1e-3)  # train_loss is a float32
        assert 0 < told < most

    def test_theorem_on_other_rows(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name, more, said in (
            ("noise", "data.source.noise=0.3", r"^The rule made \d+ mistakes: no straight line separates these rows"),
            ("part", "trainer.limit_train_batches=2", r"^The preset was changed"),
            ("no_csv", "~logger", r"^The preset was changed"),
        ):
            training.run(configured(tmp_path / name, "experiment=perceptron_theorem", "trainer.max_epochs=2", more))
            assert re.search(said, ended(capsys.readouterr().out))

    def test_theorem_with_a_wrong_sign(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = sheet.perceptron_step
        monkeypatch.setattr(sheet, "perceptron_step", lambda y, target, a, rate: right(target, y, a, rate))
        easy = ["data.source.samples=30", "trainer.max_epochs=30"]
        training.run(configured(tmp_path, "experiment=perceptron_theorem", *easy))
        assert "which contradicts the theorem" in ended(capsys.readouterr().out)

    def test_is_the_rule(self, tmp_path: Path) -> None:
        """Sample by sample in the order of the batches, as `Perceptron.fit` does it."""
        cfg = configured(tmp_path, "experiment=perceptron", "trainer.max_epochs=1")
        data = training.config.build(cfg.data)
        training.run(cfg)
        data.setup()
        module = MLPModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
        neuron = training.config.build(cfg.model, _partial_=True)(2, 2, list(data.class_names)).net
        for features, target in data.train_dataloader():
            neuron.fit(features, target.float().unsqueeze(1), rate=1.0, max_epochs=1)
        torch.testing.assert_close(module.net.state_dict(), neuron.state_dict(), rtol=0, atol=0)

    def test_checkpoint_is_tested_but_predicts_no_probabilities(self, tmp_path: Path) -> None:
        trained = training.run(configured(tmp_path / "a", "experiment=perceptron", "trainer.max_epochs=2"))
        again = [f"ckpt_path={tmp_path / 'a' / 'best.ckpt'}", "experiment=perceptron"]
        assert training.run(configured(tmp_path / "b", "task=test", *again)) == trained
        (tmp_path / "new.csv").write_text("a,b\n0.9,0.9\n")
        with pytest.raises(InputError, match="holds a perceptron, which says 0 or 1; take a run of model=mlp"):
            training.run(configured(tmp_path / "c", "task=predict", *again, f"input={tmp_path / 'new.csv'}"))

    @pytest.mark.parametrize(
        "option", ["hidden=[3]", "+activation=relu", "+loss=mse", "+bias=false", "+dropout=0.5", "+l1=0.1"]
    )
    def test_options_of_other_nets_are_refused(self, tmp_path: Path, option: str) -> None:
        overrides = ["experiment=perceptron", option.replace("+", "+model.") if "+" in option else f"model.{option}"]
        name = option.strip("+").partition("=")[0]
        with pytest.raises(InputError, match=rf"expected a perceptron without model.{name}, .*; leave it out"):
            training.run(configured(tmp_path, *overrides))

    def test_another_model_does_not_become_one_by_its_output(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"without model.hidden, .* but got \(30,\)"):
            training.run(configured(tmp_path, "data=halves", "model.output_activation=threshold"))

    def test_rows_with_weights_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"whose rule knows no weights, but got weights; leave out data.class"):
            training.run(configured(tmp_path, "experiment=perceptron", "data.class_weight=balanced"))

    def test_one_process_only(self, tmp_path: Path) -> None:
        several = ["trainer.devices=2", "trainer.strategy=ddp_spawn", "trainer.accelerator=cpu"]
        with pytest.raises(InputError, match=r"one process for model=perceptron, .* but got DDPStrategy; set trainer"):
            training.run(configured(tmp_path, "experiment=perceptron", *several))

    def test_two_classes_only(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"two classes for a perceptron, .* but got 10; choose data=halves"):
            training.run(configured(tmp_path, "model=perceptron"))


def test_linear_neuron_is_least_squares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small steps lead to the line that NumPy finds at once, in the units of the data: y = 2 x + 1 and noise."""
    training.run(configured(tmp_path, "experiment=linear_neuron", "optimizer.lr=0.03", "trainer.max_epochs=50"))
    samples = sources.line(200, 0.3, 0)
    net = MLPModule.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True).net
    data = training.config.build(configured(tmp_path, "experiment=linear_neuron").data)
    data.setup()
    x, y = (tensor.flatten().double().numpy() for tensor in data.splits["train"][:])
    assert np.isin(x.astype(np.float32), samples.features.astype(np.float32)).all()
    slope, intercept = np.polyfit(x, y, 1)
    assert net[0].weight.item() == pytest.approx(slope, abs=0.02)
    assert net[0].bias.item() == pytest.approx(intercept, abs=0.02)
    assert ended(capsys.readouterr().out) == (
        f"y = {net[0].weight.item():.2f} x + {net[0].bias.item():.2f}; least squares {slope:.2f} x + {intercept:.2f}: "
        "the neuron found that line (report=true draws it: Fitted curve)."
    )


def test_a_line_in_standardised_units_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["data.standardise=true", "data.standardise_target=true"]
    for overrides in ([], again):
        training.run(configured(tmp_path / str(len(overrides)), "experiment=linear_neuron", *overrides))
        found, best = re.findall(r"([\d.]+) x \+ ([\d.]+)", ended(capsys.readouterr().out))
        assert [float(value) for value in found] == pytest.approx([2, 1], abs=0.15)
        assert [float(value) for value in best] == pytest.approx([1.93, 0.96], abs=0.01)


def test_chain_traces_the_step_that_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After one step the parameters are the "new" ones of the trace; C before and after are those of the sentence."""
    steps = ["trainer.max_steps=1", "trainer.max_epochs=1"]
    module = MLPModule.load_from_checkpoint
    for backprop in ("layers", "engine"):
        folder = tmp_path / backprop
        run(folder, "chain", f"backprop={backprop}", *(steps if backprop == "layers" else steps[1:]))
        printed = capsys.readouterr().out
        assert "1-1-1-1, quadratic cost, N = 1" in printed
        assert "δ² = w² · δ³ · sigmoid′(z²)" in (folder / "trace.md").read_text()
        assert (folder / "flow.png").read_bytes().startswith(b"\x89PNG")
        assert "trace.md" in printed[printed.index("files in") :]
        found = re.findall(r"new ([wb].) = .* = (-?[\d.]+)$", printed, re.MULTILINE)
        new = {name: float(value) for name, value in found}
        if backprop == "layers":
            after = module(folder / "last.ckpt", weights_only=True).net.parameters()
            names = ("w¹", "b¹", "w²", "b²", "w³", "b³")
            assert [new[name] for name in names] == pytest.approx([p.item() for p in after], rel=1e-4)
            first = new
        assert new == first
        before, then = re.findall(r"\((\d\.\d+), then (\d\.\d+)\)", ended(printed))[0]
        assert float(before) == pytest.approx(float(re.findall(r"N = 1: C = ([\d.]+)", printed)[0]), abs=1e-4)
        assert float(then) < float(before)


def test_chain_learns(tmp_path: Path) -> None:
    assert run(tmp_path, "chain", "backprop=engine", "trainer.max_epochs=15", "optimized_metric=val_r2") > 0.8


def test_rows_with_weights_are_traced_in_the_types_of_the_net(tmp_path: Path) -> None:
    overrides = ["data=iris", "data.class_weight=[1,2,3]", "model.loss=cross_entropy", "trainer.precision=64-true"]
    traced = "+callbacks.traced._target_=manual_mlp.training.callbacks.Traced"
    training.run(configured(tmp_path, *overrides, "trainer.max_epochs=1", "model.hidden=[3]", traced))
    assert (tmp_path / "trace.md").read_text().startswith("4-3-3, cross_entropy cost, N = 10")


def test_universal_approximator(sweep, capsys: pytest.CaptureFixture[str]) -> None:
    """Short: two widths, the wider one nearer to the curve."""
    narrow, wide = sweep(
        "universal_approximator", "model.hidden=[1],[16]", "backprop=engine", "trainer.max_epochs=30", "report=false"
    )
    assert float(wide["val_rmse"]) < 0.5 * float(narrow["val_rmse"])
    assert ended(capsys.readouterr().out) == (
        f"val_rmse falls from {float(narrow['val_rmse']):.3g} with model.hidden=[1] to {float(wide['val_rmse']):.3g} "
        "with model.hidden=[16]: the wider, the nearer (sweep.png)."
    )


def test_deep_sigmoid(sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Short: one epoch. δ vanishes through sigmoid layers, less so through relu, and hardly with Glorot's weights."""
    rows = sweep(
        "deep_sigmoid", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "data.test_size=1400", "report=false"
    )
    lost = {}
    for row in rows:
        content = torch.load(tmp_path / row["run"] / "last.ckpt", weights_only=True)
        norms = content["callbacks"]["DeltaFlow"]["norms"]
        lost[row["model.activation"], row["model.initialisation"]] = norms[10][0] / norms[2][0]
    order = [("sigmoid", "torch"), ("sigmoid", "glorot"), ("relu", "torch"), ("relu", "glorot")]
    assert all(lost[more] > 5 * lost[less] for more, less in itertools.pairwise(order))
    assert lost["sigmoid", "torch"] > 1e5
    assert lost["relu", "glorot"] < 100
    assert (tmp_path / "deltas.png").exists()
    assert re.search(
        r"^δ of the first layer is \de-\d+ of that of the last with model.activation=sigmoid, "
        r"model.initialisation=torch \(.*, and [\d.]+ with model.activation=relu, model.initialisation=glorot "
        r".*\(deltas.png\)\.$",
        ended(capsys.readouterr().out),
    )


def test_pretraining(sweep, capsys: pytest.CaptureFixture[str]) -> None:
    """Short: four smaller layers, and larger steps."""
    short = ["model.hidden=${repeat:60,4}", "optimizer.lr=0.5", "callbacks.pretrained.epochs_per_layer=0,6"]
    drawn, pretrained = sweep("pretraining", *short, "trainer.max_epochs=6", "report=false")
    assert float(drawn["val_accuracy"]) < 0.15
    assert float(pretrained["val_accuracy"]) > 0.4
    assert re.search(
        r"^δ of the first layer is 0\.000\d of that of the last with callbacks.pretrained.epochs_per_layer=0 \(.*, and "
        r"0\.0\d with \S*=6 \(.*: where δ vanishes, the net does not learn \(deltas\.png\)\.$",
        ended(capsys.readouterr().out),
    )


def test_a_pretrained_run_goes_on_without_pretraining_again(tmp_path: Path) -> None:
    short = [
        "experiment=pretraining",
        "model.hidden=[20]",
        "backprop=layers",
        "callbacks.pretrained.epochs_per_layer=1",
    ]
    whole, first, rest = (tmp_path / name for name in ("whole", "first", "rest"))
    training.run(configured(whole, *short, "trainer.max_epochs=2"))
    training.run(configured(first, *short, "trainer.max_epochs=1"))
    training.run(configured(rest, *short, "trainer.max_epochs=2", f"ckpt_path={first / 'last.ckpt'}"))
    nets = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, rest)]
    torch.testing.assert_close(*nets, rtol=0, atol=0)


def test_several_nets_are_not_pretrained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected one net to pretrain, but got members=2; leave members out"):
        training.run(configured(tmp_path, "experiment=pretraining", "members=2", "trainer.max_epochs=1"))


def test_residual(sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Short: fewer layers."""
    rows = sweep("residual", "layers=2,12", "data.batch_size=20", "trainer.max_epochs=3", "report=false")
    accuracy = {(row["layers"], row["model.residual"].lower()): float(row["val_accuracy"]) for row in rows}
    assert accuracy["12", "false"] < 0.15
    assert accuracy["12", "true"] > 0.3
    assert (tmp_path / "deltas.png").exists()
    assert re.search(
        r"^δ of the first layer is \de-\d+ of that of the last with layers=12, model.residual=False \(.*, and "
        r"[\d.]+ with layers=\d+, model.residual=True \(.*: where δ vanishes, the net does not learn \(deltas.png\)\.$",
        ended(capsys.readouterr().out),
    )


def test_lenet_that_does_not_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    run(tmp_path / "a", "lenet", *short, "callbacks.delta_flow=null")
    assert re.search(r"dense layers would have 30,720: this training does not show", ended(capsys.readouterr().out))
    run(tmp_path / "b", "lenet", *short, "model.channels=[]")
    assert ended(capsys.readouterr().out).startswith("The preset was changed.")


def test_batch_norm(sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Short: fewer epochs."""
    plain, normalised = (
        float(row["val_accuracy"]) for row in sweep("batch_norm", "trainer.max_epochs=3", "report=false")
    )
    assert plain < 0.15 < 0.3 < normalised
    assert (tmp_path / "deltas.png").exists()
    assert re.search(
        r"^δ of the first layer is \de-\d+ of that of the last with model.batch_norm=False \(.*, and [\d.]+ with "
        r"model.batch_norm=True \(.*: where δ vanishes, the net does not learn \(deltas\.png\)\.$",
        ended(capsys.readouterr().out),
    )


def test_a_batch_norm_that_does_not_learn(sweep, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("batch_norm", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "report=false")
    assert ended(capsys.readouterr().out).endswith(
        "with model.batch_norm=True (accuracy 10 %): this training does not show more (deltas.png)."
    )


def swept(**figures: float) -> list[Run]:
    """Return runs as `closing_of_sweep` takes them: {the settings' values, separated by _: accuracy}."""
    known = {"true": "model.batch_norm", "false": "model.batch_norm"}
    names = [known.get(next(iter(figures)).removeprefix("e"), "callbacks.pretrained.epochs_per_layer")]
    names = ["layers", "model.residual"] if "_" in next(iter(figures)) else names
    settings = [dict(zip(names, key.removeprefix("e").split("_"), strict=True)) for key in figures]
    values = figures.values()
    return [
        Run(str(i), s, "val_loss", {"val_accuracy": v, "val_loss": 1.0}, "")
        for i, (s, v) in enumerate(zip(settings, values, strict=True))
    ]


@pytest.mark.parametrize(
    ("name", "runs", "said"),
    [
        ("residual", swept(e9_false=0.1, e9_true=0.9), "=9, model.residual=false .*=true .*: where δ vanishes"),
        ("residual", swept(e9_false=0.1, e9_true=0.12), "this training does not show more"),
        (
            "residual",
            swept(e3_false=0.1, e3_true=0.9, e9_true=0.9),
            "=3, model.residual=false .*=3, .*=true .*: where δ",
        ),
        ("batch_norm", swept(efalse=0.1, etrue=0.9), "is 1e-05 .*norm=false .* 0.5 with .*norm=true .*δ vanishes"),
        ("batch_norm", swept(etrue=0.1, efalse=0.9), "is 1e-05 .*norm=true .* 0.5 with .*norm=false .*δ vanishes"),
        ("pretraining", swept(e10=0.9, e0=0.1), "is 1e-05 .*layer=0 .* 0.5 with .*layer=10 .*where δ vanishes"),
        ("pretraining", swept(e0=0.9, e10=0.9), "this training does not show more"),
    ],
)
def test_sentences_of_sweeps_say_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, runs: list[Run], said: str
) -> None:
    learned = {run.name: run.figures["val_accuracy"] > 0.5 for run in runs}
    monkeypatch.setattr(closing, "first_norms", lambda folder, run: {2: 0.5 if learned[run.name] else 1e-5, 3: 1.0})
    assert re.search(said, closing.closing_of_sweep(name, tmp_path, runs))


def test_a_changed_sweep_has_no_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset's own would be about accuracies, about δ or about an error, of which these runs have none."""
    runs, widths = swept(e0=0.1, e10=0.9), [{"model.hidden": "[1]"}, {"model.hidden": "[4]"}]
    assert closing.closing_of_sweep("pretraining", tmp_path, runs) == ""
    monkeypatch.setattr(closing, "first_norms", lambda folder, run: {2: 0.5, 3: 1.0})
    assert closing.closing_of_sweep("pretraining", tmp_path, runs)
    numbers = [run._replace(figures={"val_r2": 0.5, "val_loss": 1.0}) for run in runs]
    assert closing.closing_of_sweep("pretraining", tmp_path, numbers) == ""
    for metric, said in (("val_loss", True), ("val_r2", False)):
        runs = [Run(str(i), width, metric, {metric: 1.0 + i}, "") for i, width in enumerate(widths)]
        assert bool(closing.closing_of_sweep("universal_approximator", tmp_path, runs)) == said


def test_a_sweep_without_records_or_with_a_failed_run_ends_in_words(
    sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra would turn a KeyError of a callback into a warning, which is an error here."""
    short = ["model.hidden=[3]", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "report=false"]
    sweep("deep_sigmoid", *short, "model.initialisation=torch", "callbacks.delta_flow=null")
    assert not (tmp_path / "deltas.png").exists()
    drawn = []
    monkeypatch.setattr(closing, "delta_by_layer", lambda norms: drawn.append([*norms]) or delta_by_layer(norms))
    with pytest.raises(SystemExit, match="1 of the 2 runs failed"):
        sweep("deep_sigmoid", *short, "model.initialisation=torch", "model.activation=relu,nope")
    assert drawn == [["model.activation=relu"]]
    assert (tmp_path / "deltas.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["residual", "layers=2", "model.residual=0,1"], "expected model.residual to be true or false, but got 0"),
        pytest.param(["residual", "layers=2,3", "data=diabetes", "model.loss=quadratic"], "", marks=pytest.mark.slow),
        (["deep_sigmoid", "model.initialisation=torch", "data=diabetes", "model.loss=quadratic"], ""),
        pytest.param(["pretraining", "seed=0,1", "callbacks.delta_flow=null"], "", marks=pytest.mark.slow),
        (["pretraining", "data=iris"], "expected an x in [0, 1], because it stands for probabilities"),
    ],
)
def test_a_sweep_that_was_changed_ends_in_words(
    sweep, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """No sentence of the preset's that these runs do not show, and no traceback."""
    short = ["model.hidden=[3,3]", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "report=false"]
    with pytest.raises(SystemExit, match="runs failed") if said else nullcontext():
        sweep(*words, *short[words[0] == "residual" :])
    text = capsys.readouterr()
    assert (said in text.err) if said else (text.err == "")
    assert "δ of the first layer" not in text.out


def test_delta_by_layer_draws_each_run() -> None:
    figure = delta_by_layer({"sigmoid": {2: 1e-4, 3: 1e-2}, "relu": {2: 0.1, 3: 0.2}})
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[1e-4, 1e-2], [0.1, 0.2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sigmoid", "relu"]


@pytest.mark.slow
def test_universal_approximator_in_full(sweep) -> None:
    """Error against width: it falls until 16 neurons, where the curve is met to a tenth of its spread."""
    errors = [float(row["val_rmse"]) for row in sweep("universal_approximator")]
    assert len(errors) == 6
    assert errors[4] < 0.1
    assert all(wider < 1.05 * narrower for narrower, wider in itertools.pairwise(errors[:5]))


@pytest.mark.slow
def test_deep_sigmoid_in_full(sweep) -> None:
    """Only where δ arrives does the net learn."""
    rows = sweep("deep_sigmoid")
    learned = {(row["model.activation"], row["model.initialisation"]): float(row["val_accuracy"]) for row in rows}
    assert learned.pop(("relu", "glorot")) > 0.5
    assert max(learned.values()) < 0.2


@pytest.mark.slow
def test_pretraining_in_full(sweep) -> None:
    drawn, pretrained = (float(row["val_accuracy"]) for row in sweep("pretraining"))
    assert drawn < 0.15
    assert pretrained > 0.8


@pytest.mark.slow
def test_batch_norm_in_full(sweep) -> None:
    plain, normalised = (float(row["val_accuracy"]) for row in sweep("batch_norm"))
    assert plain < 0.15
    assert normalised > 0.93


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_seven_layers_learn_by_batch_norm(seed: int) -> None:
    plain, normalised = (deep_sigmoid.learned(seed, [100] * 7, 30, batch_norm=there) for there in (False, True))
    print(f"seed {seed}: {plain:.1f} % without batch norm, {normalised:.1f} % with it")
    assert plain <= 15
    assert normalised >= 95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_layers_learn_by_residual_connections(seed: int) -> None:
    plain, residual = (deep_sigmoid.learned(seed, [30] * 100, 20, adam=True, residual=there) for there in (False, True))
    print(f"seed {seed}: {plain:.1f} % in a chain, {residual:.1f} % with residual connections")
    assert plain <= 15
    assert residual >= 90


@pytest.mark.slow
def test_lenet_in_full(tmp_path: Path) -> None:
    assert run(tmp_path, "lenet", "optimized_metric=test_accuracy") > 0.93


@pytest.mark.slow
def test_residual_in_full(sweep) -> None:
    """Chains of 20 and of 100 layers stay at chance; with connections both depths learn."""
    accuracy = {(row["layers"], row["model.residual"].lower()): float(row["val_accuracy"]) for row in sweep("residual")}
    assert max(accuracy["20", "false"], accuracy["100", "false"]) < 0.15
    assert min(accuracy["20", "true"], accuracy["100", "true"]) > 0.8
