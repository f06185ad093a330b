"""After training: a checkpoint tested, asked about new rows, loaded in plain torch, as torch's layers, exported."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from torch import nn

import manual_mlp as mm
from manual_mlp import InputError
from manual_mlp import formulas as sheet
from manual_mlp.training import run as training
from manual_mlp.training.module import MLPModule
from manual_mlp.training.predict import Predictor, predict_file
from manual_mlp.training.strategies import BACKPROP
from tests.configs import ROOT, configured

IRIS = load_iris(as_frame=True).data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on iris; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    training.run(configured(folder, "data=iris", "trainer.max_epochs=3"))
    return folder


@pytest.fixture
def predict(trained: Path, tmp_path: Path):
    """predict(frame or file, output) → the path of the predictions of `trained`."""

    def predicted(rows: pd.DataFrame | Path, output: str = "out.csv", checkpoint: Path = trained / "best.ckpt") -> Path:
        if isinstance(rows, pd.DataFrame):
            rows.to_csv(tmp_path / "new.csv", index=False)
            rows = tmp_path / "new.csv"
        words = ["task=predict", f"ckpt_path={checkpoint}", f"input='{rows}'", f"output='{tmp_path / output}'"]
        assert training.run(configured(tmp_path, *words)) is None
        return tmp_path / output

    return predicted


def probabilities(folder: Path, rows: np.ndarray) -> np.ndarray:
    """What the Lightning module says of standardised rows, by the config's own data module."""
    data = training.config.build(configured(folder, "data=iris").data)
    data.setup()
    scaled = (rows - np.array(data.feature_mean)) / np.array(data.feature_scale)
    module = MLPModule.load_from_checkpoint(folder / "best.ckpt", weights_only=True)
    with torch.no_grad():
        return sheet.probability(module(torch.tensor(scaled, dtype=torch.float32)), "quadratic").numpy()


class TestTest:
    def test_same_figures_as_in_training(self, trained: Path, tmp_path: Path, capsys) -> None:
        data = "data=iris"
        expected = training.run(configured(tmp_path, data, "trainer.max_epochs=3", "optimized_metric=test_loss"))
        words = [data, "task=test", f"ckpt_path={trained}/best.ckpt", "model.hidden=[99]"]  # the checkpoint knows
        assert training.run(configured(tmp_path, *words, "optimized_metric=test_loss")) == expected
        printed = capsys.readouterr().out
        assert "4-30-3" in printed
        assert "checkpoint of 2" in printed

    def test_other_rows_are_refused(self, trained: Path, tmp_path: Path) -> None:
        """With another seed, rows it was trained on would be among those it is tested on."""
        with pytest.raises(InputError, match=r"the rows, split and seed .* use task=predict for new rows"):
            training.run(configured(tmp_path, "data=iris", "task=test", f"ckpt_path={trained}/best.ckpt", "seed=1"))


class TestPredict:
    def test_csv(self, predict, trained: Path) -> None:
        table = pd.read_csv(predict(IRIS[IRIS.columns[::-1]]))  # columns go by their names
        assert list(table) == ["class", "P(setosa)", "P(versicolor)", "P(virginica)"]
        P = table.iloc[:, 1:].to_numpy(np.float32)
        np.testing.assert_array_equal(P, probabilities(trained, IRIS.to_numpy()))
        np.testing.assert_allclose(P.sum(1), 1, rtol=1e-6)  # float32
        assert list(table["class"]) == [["setosa", "versicolor", "virginica"][i] for i in P.argmax(1)]
        assert (table["class"] == load_iris().target_names[load_iris().target]).mean() > 0.7

    @pytest.mark.parametrize("suffix", ["npz", "parquet"])
    def test_other_files(self, predict, tmp_path: Path, suffix: str) -> None:
        if suffix == "npz":
            np.savez(tmp_path / "new.npz", **{name: IRIS[name] for name in IRIS})
        else:
            IRIS.to_parquet(tmp_path / "new.parquet")
        with np.load(predict(tmp_path / f"new.{suffix}", "out.npz")) as arrays:
            table = pd.read_csv(predict(IRIS))
            assert arrays["class_names"].tolist() == ["setosa", "versicolor", "virginica"]
            np.testing.assert_array_equal(arrays["probability"], table.iloc[:, 1:].to_numpy(np.float32))
            assert arrays["class"].tolist() == table["class"].tolist()

    def test_regression_in_the_units_of_the_target(self, predict, tmp_path: Path) -> None:
        run = tmp_path / "run"
        training.run(configured(run, "data=diabetes", "optimizer=adam", "optimizer.lr=0.02", "trainer.max_epochs=8"))
        table = pd.read_csv(predict(load_diabetes(as_frame=True).data, checkpoint=run / "best.ckpt"))
        assert list(table) == ["prediction"]
        assert np.corrcoef(table["prediction"], load_diabetes().target)[0, 1] > 0.65
        assert abs(table["prediction"].mean() - load_diabetes().target.mean()) < 10

    def test_images_without_names_of_columns(self, predict, tmp_path: Path) -> None:
        run, images = tmp_path / "run", np.random.default_rng(0).random((5, 8, 8))
        training.run(configured(run, "data=digits", "trainer.max_epochs=1", "data.batch_size=100"))
        np.savez(tmp_path / "new.npz", images=images)
        assert pd.read_csv(predict(tmp_path / "new.npz", checkpoint=run / "last.ckpt")).shape == (5, 11)
        np.savez(tmp_path / "new.npz", images=images[:, 1:])
        with pytest.raises(InputError, match=r"expected 64 numbers in each row, .* but .*new.npz has 56"):
            predict(tmp_path / "new.npz", checkpoint=run / "last.ckpt")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda rows: rows.iloc[:, 1:], r"the 4 columns .* but new.csv lacks 'sepal length \(cm\)'; add it"),
            (lambda rows: rows.assign(**{"petal width (cm)": "x"}), r"lines 2, 3, .*: 'petal width \(cm\)' holds 'x'"),
            (lambda rows: rows.assign(**{"petal width (cm)": np.nan}), r"lines 2, 3, .*: 'petal width .* is empty"),
        ],
    )
    def test_columns_that_do_not_fit(self, predict, change, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            predict(change(IRIS))

    def test_files_that_do_not_work(self, predict, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"output to end in \.csv or \.npz, but got .*out\.txt"):
            predict(IRIS, "out.txt")
        with pytest.raises(InputError, match=r"there is none at .*nowhere\.csv; check input"):
            predict(tmp_path / "nowhere.csv")
        with pytest.raises(InputError, match=r"an output that can be written, but .*No such file.*choose another"):
            predict(IRIS, "nowhere/out.csv")
        for missing in (["input=x.csv"], [f"ckpt_path={trained}/best.ckpt"]):
            with pytest.raises(InputError, match=r"expected (ckpt_path|input)=… for task=predict, but got none"):
                training.run(configured(tmp_path, "task=predict", *missing))
        with pytest.raises(InputError, match="expected task to be one of train, test, predict, but got 'tset'"):
            training.run(configured(tmp_path, "task=tset"))


def test_probability_of_each_cost() -> None:
    z = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -4.0, -0.0]], dtype=torch.float64)
    s = 1 / (1 + (-z).exp())
    expected = {
        "cross_entropy": z.exp() / z.exp().sum(1, keepdim=True),
        "bce": s / s.sum(1, keepdim=True),
        "quadratic": torch.tensor([[1 / 1.5, 0, 0.5 / 1.5], [1 / 3] * 3], dtype=torch.float64),
        "mse": torch.tensor([[1 / 1.5, 0, 0.5 / 1.5], [1 / 3] * 3], dtype=torch.float64),
    }
    assert expected.keys() == sheet.COSTS.keys()
    for loss, P in expected.items():
        torch.testing.assert_close(sheet.probability(z, loss), P, rtol=1e-15, atol=0)


class TestPlainTorch:
    @pytest.mark.parametrize("backprop", BACKPROP)
    def test_same_net_whoever_trained_it(self, tmp_path: Path, backprop: str) -> None:
        overrides = ["model.activation=[relu,gelu_tanh]", "model.hidden=[6,5]", "model.loss=cross_entropy"]
        overrides += ["model.dropout=0.3", "trainer.precision=64-true", "trainer.max_epochs=1", f"backprop={backprop}"]
        training.run(configured(tmp_path, "data=iris", *overrides))
        content = torch.load(tmp_path / "best.ckpt", weights_only=True)
        module = MLPModule(**content["hyper_parameters"]).eval().double()
        module.load_state_dict(content["state_dict"])
        net, x = mm.MLP.from_checkpoint(tmp_path / "best.ckpt"), torch.randn(7, 4, dtype=torch.float64)
        assert torch.equal(net(x), module(x))
        twin = net.to_torch()
        assert torch.equal(twin(x), module(x))
        assert twin.state_dict().keys() == net.state_dict().keys()
        assert all(type(layer).__module__.startswith("torch.nn") for layer in twin.modules())

    def test_every_activation_in_torch_s_layers(self) -> None:
        every = ["sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu", "gelu", "gelu_tanh"]
        every += [nn.Softplus(2.0), nn.Softplus(1.0, 3.0), nn.LeakyReLU(-0.1), nn.LeakyReLU(0.2)]
        net, x = mm.MLP([4, *[5] * len(every), 3], every, "identity", dropout=0.3), torch.randn(9, 4)
        twin = net.to_torch()
        assert twin.training
        assert torch.equal(twin.eval()(x), net.eval()(x))
        assert twin[0].weight is net[0].weight

    def test_without_hydra_or_lightning(self, trained: Path) -> None:
        program = (
            "import sys\n"
            "for name in ('hydra', 'omegaconf', 'lightning', 'sklearn', 'torchmetrics'): sys.modules[name] = None\n"
            "import torch, manual_mlp as mm\n"
            "from manual_mlp.training.predict import Predictor\n"
            f"print(mm.MLP.from_checkpoint({str(trained / 'best.ckpt')!r})(torch.zeros(1, 4)).shape)\n"
            f"print(Predictor.from_checkpoint({str(trained / 'best.ckpt')!r})(torch.zeros(1, 4)).shape)\n"
        )
        job = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert job.stdout.split("\n")[:2] == ["torch.Size([1, 3])"] * 2, job.stderr

    def test_parameters_that_do_not_fit(self, trained: Path, tmp_path: Path) -> None:
        content = torch.load(trained / "best.ckpt", weights_only=True)
        torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], "hidden": [7]}}, tmp_path / "x.ckpt")
        sentence = r"the parameters of this net in .*x\.ckpt, but size mismatch for 2.weight: .*\[3, 7\]"
        with pytest.raises(InputError, match=sentence):
            mm.MLP.from_checkpoint(tmp_path / "x.ckpt")
        del content["DataModule"]
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(InputError, match="says how to prepare rows"):
            Predictor.from_checkpoint(tmp_path / "x.ckpt")


@pytest.fixture(scope="module", params=["iris", "diabetes"])
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("exported")
    training.run(configured(folder, f"data={request.param}", "trainer.max_epochs=2"))
    return Predictor.from_checkpoint(folder / "best.ckpt")


class TestExported:
    def test_a_list_is_rows_too(self, predictor: Predictor) -> None:
        ones = torch.ones(1, predictor.net.sizes[0], dtype=torch.float64)
        assert torch.equal(predictor(ones.tolist()), predictor(ones))
        for odd in (np.ones(ones.shape)[:, ::-1], np.ones(ones.shape, ">f8"), np.ones(ones.shape, np.longdouble)):
            assert torch.equal(predictor(odd), predictor(ones))
        with pytest.raises(InputError, match=r"expected a tensor with \d+ numbers in each row.* but got .* \(1, 2\)"):
            predictor([[1.0, 2.0]])

    def test_export(self, predictor: Predictor) -> None:
        """As it stands: rows as in the data, P(class | x) or the target's own units."""
        x = torch.randn(7, predictor.net.sizes[0], dtype=torch.float64)
        program = torch.export.export(predictor, (x[:2],), dynamic_shapes=({0: torch.export.Dim("N")},))
        assert torch.equal(program.module()(x), predictor(x))

    @pytest.mark.parametrize("predictor", ["iris"], indirect=True)
    @pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
    def test_onnx(self, predictor: Predictor, tmp_path: Path) -> None:
        x = torch.randn(7, predictor.net.sizes[0], dtype=torch.float64)
        program = torch.onnx.export(
            predictor, (x[:2],), dynamo=True, dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False
        )
        program.save(tmp_path / "net.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        # float32, and onnxruntime's own kernel for the sigmoid
        torch.testing.assert_close(torch.from_numpy(output), predictor(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_columns_of_an_npz_that_stand_alone(tmp_path: Path, task: str) -> None:
    """Arrays (N, 1) answer and name rows of the file itself as they did in training; other shapes are refused."""
    classes = task == "classification"
    arrays = {"x": np.random.default_rng(0).normal(size=(60, 2)), "k": np.arange(60)[:, None]}
    arrays["y"] = np.array(["p", "q"] * 30)[:, None] if classes else np.arange(60.0)[:, None]
    np.savez(tmp_path / "t.npz", **arrays)
    words = [f"data.source.path={tmp_path}/t.npz", "data.source.target=y", f"data.source.task={task}"]
    training.run(configured(tmp_path, "data=table", *words, "data.source.key=k", "trainer.max_epochs=1"))

    def predicted(**arrays: np.ndarray) -> list[str]:
        np.savez(tmp_path / "n.npz", **arrays)
        return predict_file(str(tmp_path / "best.ckpt"), str(tmp_path / "n.npz"), str(tmp_path / "o.csv"))

    assert predicted(**arrays)[1].startswith("accuracy 50.00 % over 60" if classes else "rmse ")
    assert predicted(x=arrays["x"][:0])[0].startswith("predictions for 0 rows")
    for name in "ky":
        with pytest.raises(InputError, match=f"expected 60 rows in every column, but '{name}' has 9"):
            predicted(**{**arrays, name: arrays[name][:9, 0]})
        with pytest.raises(InputError, match=f"expected one value of '{name}' for each row, but got several"):
            predicted(**{**arrays, name: np.repeat(arrays[name], 2, 1)})
