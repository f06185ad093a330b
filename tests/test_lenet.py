"""Batch norm and convolutions in a training: by every way to train, and by every road that a checkpoint goes."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import manual_mlp as mm
from manual_mlp import InputError
from manual_mlp.training import run as training
from manual_mlp.training.callbacks import signals
from manual_mlp.training.module import MLPModule
from manual_mlp.training.predict import Predictor
from tests.configs import configured

SMALL = ("data=digits", "data.batch_size=200", "trainer.max_epochs=2", "model.hidden=[8,8]")
NETS = {
    "batch_norm": ("model.batch_norm=true",),
    "lenet": ("model.channels=[2,3]", "model.kernel=3", "model.activation=tanh", "model.loss=cross_entropy"),
    "all": ("model.channels=[2]", "model.batch_norm=true", "model.residual=true", "model.dropout=0.2"),
}
nets = pytest.mark.parametrize("net", NETS)
ROWS = load_digits().data[:7]


def run(folder: Path, net: str, *overrides: str) -> float | None:
    return training.run(configured(folder, *SMALL, *NETS[net], *overrides))


def content(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a run for each net; not to be written to."""
    folders = {net: tmp_path_factory.mktemp(net) for net in NETS}
    for net, folder in folders.items():
        run(folder, net, "optimized_metric=test_loss")
    return folders


@pytest.mark.parametrize("net", ["lenet", "all"])
def test_every_way_to_train_is_the_same_training(tmp_path: Path, net: str) -> None:
    """Parameters, running statistics, figures: by layers, as one Function, by autograd through torch's own layers."""
    ways = ("layers", "network", "autograd")
    for way in ways:
        run(tmp_path / way, net, f"backprop={way}", "trainer.precision=64-true", "trainer.max_epochs=1")
    ours, *others = (content(tmp_path / way) for way in ways)
    for other in others:
        torch.testing.assert_close(other["state_dict"], ours["state_dict"], rtol=1e-10, atol=1e-10)
        assert other["figures"] == pytest.approx(ours["figures"], rel=1e-6)  # they are summed in float32
    counters = [value.item() for name, value in ours["state_dict"].items() if "num_batches" in name]
    assert set(counters) == ({7} if net != "lenet" else set())  # 1257 rows by 200


@pytest.mark.parametrize("net", ["lenet", "all"])
def test_goes_on_to_the_same_bits(tmp_path: Path, trained: dict[str, Path], net: str) -> None:
    run(tmp_path / "first", net, "trainer.max_epochs=1")
    run(tmp_path / "rest", net, f"ckpt_path={tmp_path}/first/last.ckpt")
    torch.testing.assert_close(
        content(tmp_path / "rest")["state_dict"], content(trained[net])["state_dict"], rtol=0, atol=0
    )
    wrong = "model.batch_norm=false" if net != "lenet" else "model.channels=[2,4]"
    with pytest.raises(InputError, match=r"expected (batch_norm|channels|kernel) to be"):
        run(tmp_path / "wrong", net, f"ckpt_path={tmp_path}/first/last.ckpt", wrong)


@nets
def test_is_tested_and_predicts(tmp_path: Path, trained: dict[str, Path], net: str) -> None:
    best = trained[net] / "best.ckpt"
    figures = content(trained[net], "best")["figures"]
    tested = training.run(configured(tmp_path, *SMALL, "task=test", f"ckpt_path={best}", "optimized_metric=val_loss"))
    assert tested == figures["val_loss"]
    np.savez(tmp_path / "new.npz", images=ROWS.reshape(-1, 8, 8))
    words = ["task=predict", f"ckpt_path={best}", f"input={tmp_path}/new.npz", f"output={tmp_path}/out.csv"]
    training.run(configured(tmp_path, *words))
    table = pd.read_csv(tmp_path / "out.csv")
    module, predictor = MLPModule.load_from_checkpoint(best).eval(), mm.Predictor.from_checkpoint(best)
    with torch.no_grad():
        P = predictor(torch.tensor(ROWS))
        scaled = predictor.standardised(torch.tensor(ROWS))
        torch.testing.assert_close(predictor.prediction(torch.tensor(ROWS)), module(scaled))
    np.testing.assert_allclose(table.iloc[:, 1:].to_numpy(), P.numpy(), rtol=1e-6)
    assert not predictor.net.training


@nets
def test_in_python(trained: dict[str, Path], net: str) -> None:
    kind, other = (mm.LeNet, mm.MLP) if net != "batch_norm" else (mm.MLP, mm.LeNet)
    restored = kind.from_checkpoint(trained[net] / "last.ckpt")
    expected = content(trained[net])["state_dict"]
    torch.testing.assert_close({f"net.{name}": value for name, value in restored.state_dict().items()}, expected)
    assert restored.sizes == [64, 8, 8, 10]
    theirs, x = restored.to_torch(), torch.randn(5, 64)
    assert not [m for m in theirs.modules() if type(m).__module__.startswith("manual_mlp")]
    assert theirs.state_dict().keys() == restored.state_dict().keys()
    assert all(ours is torchs for ours, torchs in zip(restored.parameters(), theirs.parameters(), strict=True))
    for training_mode in (False, True):
        outputs = []
        for model in (restored.train(training_mode), theirs.train(training_mode)):
            torch.manual_seed(0)
            outputs.append(model(x))
        torch.testing.assert_close(*outputs)
    with pytest.raises(InputError, match=rf"expected an mm\.{other.__name__} .*: take mm\.{kind.__name__}\.from_ch"):
        other.from_checkpoint(trained[net] / "last.ckpt")


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_is_exported(tmp_path: Path, trained: dict[str, Path]) -> None:
    predictor, rows = Predictor.from_checkpoint(trained["all"] / "best.ckpt"), torch.tensor(ROWS, dtype=torch.float32)
    expected = predictor(rows).detach()
    shapes = ({0: torch.export.Dim("N")},)
    program = torch.onnx.export(predictor, (rows,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-6)  # float32, in another order


@pytest.mark.parametrize("net", ["batch_norm", "lenet"])
def test_leaves_a_report(tmp_path: Path, net: str) -> None:
    run(tmp_path, net, "report=true", "trainer.max_epochs=1", "callbacks.delta_flow.every=2")
    page = (tmp_path / "report.html").read_text()
    assert all(title in page for title in ("Flow of δ", "Histograms", "First-layer weights", "Confusion matrix"))
    assert ("W², a kernel for each channel of layer 3" in page) == (net != "batch_norm")
    assert ("W¹, an image for each neuron of layer 2" in page) == (net == "batch_norm")
    assert ("r P(γ<sup>2</sup> ⊙ δ<sup>3</sup>)" in page) == (net == "batch_norm")
    assert ("∗" in page) == (net != "batch_norm")
    norms = content(tmp_path)["callbacks"]["DeltaFlow"]["norms"]
    assert set(map(len, norms.values())) == {4}


@nets
def test_records_are_those_of_a_trace_and_change_nothing(tmp_path: Path, trained: dict[str, Path], net: str) -> None:
    run(tmp_path, net, "callbacks.delta_flow=null")
    torch.testing.assert_close(content(tmp_path)["state_dict"], content(trained[net])["state_dict"], rtol=0, atol=0)
    module = MLPModule.load_from_checkpoint(trained[net] / "last.ckpt").train()
    before = copy.deepcopy(module.state_dict())
    features, target = torch.randn(20, 64), torch.arange(20) % 10
    values = signals(module, (features, target))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    for layer in module.net.modules():
        layer.train(not isinstance(layer, nn.Dropout))
    trace = mm.trace(module.net, *module.as_net_takes(features, target), module.loss)
    for letter in ("z", "a", "delta"):
        torch.testing.assert_close(values[letter], getattr(trace, letter), rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        *(((4,), [2], [3]), ((4, 4), [], [3]), ((4, 4), [2.5], [3]), ((4, 4), [2], [3], 2.5), ((4, 4), [2], [])),
        *((28, [6], [3]), ((8, 8), 6, [3]), ("88", [6], [3]), ((8, 8), None, [3])),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match=r"expected (images of|at least two sizes|.* of at least 1, a whole number)"):
        mm.LeNet(*arguments)


def test_norms_of_convolutions_alone() -> None:
    net = mm.LeNet((4, 4), [2], [3], kernel=3, batch_norm=True)
    assert [type(layer).__name__ for layer in net.modules() if "Norm" in type(layer).__name__] == ["BatchNorm2d"]


@pytest.mark.parametrize("initialisation", ["glorot", "nielsen"])
def test_an_initialisation_leaves_norms_alone(initialisation: str) -> None:
    options = {"channels": [2], "kernel": 3, "image_shape": (4, 4), "batch_norm": True, "hidden": [3]}
    net = MLPModule(16, 2, ["a", "b"], initialisation=initialisation, **options).net
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 2
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    assert all(p.abs().sum() > 0 for name, p in net.named_parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("model.batch_norm=true", "backprop=engine"), "batch_norm=True; leave it out, or take backprop=network"),
        (("model.channels=[2]", "backprop=engine"), r"channels=\[2\]; leave it out, or take backprop=network"),
        (("model.batch_norm=true", "backprop=engine", "members=2"), "or take backprop=network"),
        (("model.channels=[2,2]", "model.kernel=5"), "leave something of; got 8×8: take a smaller kernel"),
        (("model.channels=[0]",), "channels of at least 1, a whole number; got 0"),
        (("model.channels=[2]", "model.kernel=0"), "a kernel of at least 1, a whole number; got 0"),
        (("model.channels=[2]", "data=iris"), "take images, such as data=digits"),
        (("model.channels=[2]", "model.activation=[tanh,tanh]"), "the name of an activation"),
        (("model.batch_norm=true", "data.batch_size=1"), "two or more rows in each mini-batch"),
        (("model.batch_norm=true", "data.batch_size=628"), "1257 rows leave one for the last of 628"),
        (("model.batch_norm=true", "trainer.devices=2", "trainer.strategy=ddp"), "one process for model.batch_norm"),
        (("model.batch_norm=true", "model.hidden=[]"), "a hidden layer for batch_norm"),
        (("model=perceptron", "+model.batch_norm=true", "data=xor"), "a perceptron without model.batch_norm"),
        (("model=perceptron", "+model.channels=[2]", "data=xor"), "a perceptron without model.channels"),
    ],
)
def test_refused(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    sizes = () if "model=perceptron" in words else ("model.hidden=[8,8]",)
    with pytest.raises(InputError, match=sentence):
        training.run(configured(tmp_path, "data=digits", *sizes, *words))


def _without(name: str) -> Any:
    return lambda content: content["state_dict"].pop(name)


NOT_OF_IT = r"expected the parameters of this net in|take mm\.(LeNet|MLP)\.from_checkpoint"
CRAFTED = {
    "image": (lambda c: c["hyper_parameters"].update(image_shape=[4, 8]), "image_shape"),
    "no image": (lambda c: c["hyper_parameters"].pop("image_shape"), "image_shape"),
    "three sides": (lambda c: c["hyper_parameters"].update(image_shape=[8, 8, 1]), "image_shape"),
    "no kernel": (lambda c: c["hyper_parameters"].pop("kernel"), "image_shape"),
    "kernel": (lambda c: c["hyper_parameters"].update(kernel=2**31), NOT_OF_IT),
    "channels": (lambda c: c["hyper_parameters"].update(channels=[2**31]), NOT_OF_IT),
    "many channels": (
        lambda c: c["hyper_parameters"].update(channels=[2] * 99),
        "state_dict in .* the parameters of 102 layers",
    ),
    "no channels": (lambda c: c["hyper_parameters"].update(channels=[]), NOT_OF_IT),
    "text": (lambda c: c["hyper_parameters"].update(channels="ab"), "hyper_parameters.channels"),
    "no norm": (lambda c: c["hyper_parameters"].update(batch_norm=False), NOT_OF_IT),
    "number": (lambda c: c["hyper_parameters"].update(batch_norm=1), "hyper_parameters.batch_norm"),
    "no variance": (_without("net.convolutions.1.1.running_var"), NOT_OF_IT),
    "counter": (
        lambda c: c["state_dict"].update({"net.mlp.0.1.num_batches_tracked": torch.tensor(1.5)}),
        "num_batches_tracked in the checkpoint .* to be a whole number",
    ),
    "counters": (
        lambda c: c["state_dict"].update({"net.mlp.0.1.num_batches_tracked": torch.tensor([1, 2])}),
        NOT_OF_IT,
    ),
    "integers": (
        lambda c: c["state_dict"].update({"net.mlp.0.1.running_mean": torch.zeros(8, dtype=torch.int64)}),
        "running_mean in the checkpoint .* to be parameters",
    ),
    "members": (
        lambda c: c["hyper_parameters"].update(members=2, backprop="engine"),
        r"expected (a member from 0 to 1|the parameters of this net)|take mm\.LeNet\.from_checkpoint",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_checkpoints_end_in_a_sentence(tmp_path: Path, trained: dict[str, Path], name: str) -> None:
    change, sentence = CRAFTED[name]
    crafted = content(trained["all"])
    change(crafted)
    torch.save(crafted, path := tmp_path / "crafted.ckpt")
    for read in (mm.LeNet.from_checkpoint, mm.MLP.from_checkpoint, Predictor.from_checkpoint):
        with pytest.raises(InputError, match=sentence):
            read(path)
    with pytest.raises(InputError, match=sentence):
        MLPModule.load_from_checkpoint(path)


def test_a_loss_that_diverges_names_the_layer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"and it began in (z|a|W)[²³⁴⁵⁶⁷⁸]"):
        run(tmp_path, "lenet", "optimizer.lr=1e30", "model.activation=relu", "model.loss=mse")


def test_snapshots_of_a_small_net_with_norms(tmp_path: Path) -> None:
    words = ["data=moons", "model.batch_norm=true", "trainer.max_epochs=1", "report=true", "data.batch_size=50"]
    training.run(configured(tmp_path, *words))
    snapshots = content(tmp_path)["callbacks"]["DeltaFlow"]["snapshots"]
    assert {"0.1.running_mean", "0.1.num_batches_tracked"} <= snapshots[0].keys()
    assert "Decision boundary" in (tmp_path / "report.html").read_text()
