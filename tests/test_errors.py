# ruff: noqa: E501 -- a table, one row a mistake
"""Bad input gets one sentence: what was expected, what came, the likely fix. Data, files, config: elsewhere."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import manual_mlp as mm
from manual_mlp import functions
from manual_mlp.engine import BackpropEngine
from manual_mlp.network import network_loss

F = mm.functional
X, W, B = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
LOGITS = torch.randn(5, 4)


def engine() -> BackpropEngine:
    model = mm.MLP([3, 3])
    return BackpropEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))


MESSAGES: dict[str, tuple[Callable[[], object], str]] = {
    "feature count": (lambda: mm.Affine(3, 4)(torch.randn(5, 2)), r"last dimension is in_features=3; got shape \(5, 2\)"),
    "feature count fused": (lambda: mm.MLP([3, 4])(torch.randn(5, 2)), "last dimension is in_features=3"),
    "transposed": (lambda: mm.Affine(3, 4)(torch.randn(3, 5)), r"got shape \(3, 5\).*: transpose the input"),
    "scalar input": (lambda: mm.Affine(3, 4)(torch.tensor(1.0)), r"in_features=3; got shape \(\)"),
    "weight shape": (lambda: F.affine(X, B), r"shape \(out_features, in_features\); got shape \(4,\)"),
    "bias shape": (lambda: F.affine(X, W, B[:1]), r"bias of shape \(4,\), one for each output; got shape \(1,\)"),
    "bias dimensions": (lambda: F.affine(X, W, torch.randn(5, 4)), r"bias of shape \(4,\)"),
    "dtype mix": (
        lambda: mm.Affine(3, 4)(X.double()),
        r"one dtype for all tensors; got input torch.float64, weight torch.float32.*call .to\(torch.float32\)",
    ),
    "device mix": (lambda: mm.Affine(3, 4)(X.to("meta")), "one device for all tensors; got input meta, weight cpu"),
    "integer input": (lambda: mm.Affine(3, 4)(torch.ones(5, 3).long()), r"got torch.int64: call .float\(\)"),
    "complex input": (lambda: mm.Affine(3, 4)(X + 0j), "real floating-point input.*; got torch.complex64"),
    "complex layer": (lambda: F.affine(X + 0j, W + 0j), "real floating-point input.*; got torch.complex64"),
    "complex activation": (lambda: mm.Tanh()(X + 0j), "got torch.complex64: split it"),
    "complex loss": (lambda: mm.QuadraticLoss()(X + 0j, X + 0j), "real floating-point prediction"),
    "negative size": (lambda: mm.Affine(-1, 4), "in_features of at least 0, a whole number; got -1"),
    "negative size fused": (lambda: mm.AffineActivation(3, -2), "out_features of at least 0, a whole number; got -2"),
    "no neurons": (lambda: mm.MLP([3, 0, 1]), r"sizes\[1\] of at least 1, a whole number; got 0"),
    "fractional size": (lambda: mm.MLP([3, 2.5, 1]), r"sizes\[1\] of at least 1, a whole number; got 2.5"),
    "sizes in an array": (lambda: mm.Affine(torch.tensor(2.5), 1), r"in_features of at least 0, .*; got tensor\(2.5000\)"),
    "empty sizes": (lambda: mm.MLP([]), r"at least two sizes.*such as \[784, 30, 10\]; got \[\]"),
    "one size": (lambda: mm.MLP([3]), r"at least two sizes"),
    "unknown activation": (
        lambda: mm.MLP([3, 2], output_activation="sigmoyd"),
        "one of identity, sigmoid, tanh, relu, leaky_relu, softplus, silu, gelu, gelu_tanh; got 'sigmoyd'",
    ),
    "misspelt activation": (lambda: mm.MLP([3, 2, 1], "rellu"), r"; got 'rellu': did you mean 'relu'\?$"),
    "capital activation": (lambda: mm.MLP([3, 2, 1], "Relu"), r"; got 'Relu': did you mean 'relu'\?$"),
    "softmax output": (lambda: mm.MLP([3, 2], output_activation="softmax"), "take 'identity', because CrossEntropyLoss"),
    "softmax module": (lambda: mm.MLP([3, 2], output_activation=nn.LogSoftmax()), "take 'identity', because CrossE"),
    "linear output": (lambda: mm.MLP([3, 2], output_activation="linear"), "got 'linear': take 'identity'$"),
    "labels, quadratic": (
        lambda: mm.QuadraticLoss()(LOGITS, torch.zeros(5)),
        r"take CrossEntropyLoss .*, or torch.nn.functional.one_hot\(target.long\(\), 4\).to\(torch.float32\)$",
    ),
    "labels in a column": (
        lambda: mm.MSELoss()(LOGITS, torch.zeros(5, 1).long()),
        r"one_hot\(target.squeeze\(-1\).long\(\), 4\).to\(torch.float32\)$",
    ),
    "labels of an engine": (
        lambda: engine().step(X, torch.tensor([0, 1, 2, 0, 1])),
        r"got \(5,\) of torch.int64 on cpu: if these are class labels, .*loss='cross_entropy'.*one_hot\(target.long",
    ),
    "labels of network_loss": (
        lambda: network_loss(mm.MLP([3, 4]), X, torch.zeros(5), "mse"), r"if these are class labels, .*one_hot"
    ),
    "one output is no class": (lambda: mm.QuadraticLoss()(LOGITS[:, :1], B.new_zeros(5)), r"\.unsqueeze\(-1\) on the target$"),
    "not an activation": (lambda: mm.AffineActivation(3, 2, nn.Softmax(-1)), r"activation module, one of .*; got Softmax"),
    "activation class": (lambda: mm.MLP([3, 2, 1], nn.ReLU), r"activation module.*: call it, as in nn.ReLU\(\)"),
    "no activation": (lambda: mm.MLP([3, 2], None), "name of an activation or an activation module.*; got None"),
    "no name of a row": (lambda: mm.MLP([3, 2], output_activation="leaky_relu_in_z"), "got 'leaky_relu_in_z'"),
    "gelu's form": (lambda: F.gelu(X, "foo"), "approximate to be 'none' or 'tanh'; got 'foo'"),
    "sizes": (lambda: mm.MLP(3), "at least two sizes.*; got 3"),
    "ignored probabilities": (
        lambda: F.cross_entropy(LOGITS, LOGITS.softmax(1), ignore_index=1),
        "class indices beside ignore_index=1; got a probability for each class",
    ),
    "unknown parameter": (lambda: F.affine_activation(X, W, B, "tanh", beta=2), "'tanh' takes no parameters; got beta"),
    "activation list": (lambda: mm.MLP([3, 2, 1], ["tanh", "relu"]), "one activation for each of the 1 hidden layers"),
    "dropout of a net": (lambda: mm.MLP([3, 2, 1], dropout=1.5), "dropout probability between 0 and 1; got 1.5"),
    "dropout": (lambda: F.dropout(X, -0.1), "dropout probability between 0 and 1; got -0.1"),
    "target (N,) and (N, 1)": (
        lambda: mm.QuadraticLoss()(torch.randn(5, 1), torch.randn(5)),
        r"same shape; got \(5, 1\) and \(5,\), which would broadcast.*: call .unsqueeze\(-1\) on the target",
    ),
    "mse (N,) and (N, 1)": (lambda: mm.MSELoss()(torch.randn(5), torch.randn(5, 1)), r"unsqueeze\(-1\) on the pred"),
    "bce shapes": (lambda: mm.BCEWithLogitsLoss()(LOGITS, LOGITS[:1]), r"same shape; got \(5, 4\) and \(1, 4\)"),
    "target dtype": (lambda: mm.MSELoss()(X, X.double()), r"got target torch.float64, prediction torch.float32.*on the t"),
    "integer target": (lambda: mm.QuadraticLoss()(X, X.long()), "got target torch.int64, prediction torch.float32"),
    "target device": (lambda: mm.QuadraticLoss()(X, X.to("meta")), "one device for all tensors; got target meta"),
    "one-dimensional prediction": (
        lambda: mm.QuadraticLoss()(torch.randn(5), torch.randn(5)),
        r"prediction of shape \(N, outputs\); got \(5,\).*unsqueeze\(-1\) for one output",
    ),
    "class label too large": (
        lambda: mm.CrossEntropyLoss()(LOGITS, torch.tensor([0, 1, 2, 3, 4])),
        "class labels from 0 to 3; got labels from 0 to 4: renumber them from 0",
    ),
    "class label negative": (
        lambda: mm.CrossEntropyLoss(weight=torch.ones(4))(LOGITS, torch.tensor([0, 1, 2, 3, -1])),
        "got labels from -1 to 3",
    ),
    "class label smoothed": (
        lambda: mm.CrossEntropyLoss(label_smoothing=0.1)(LOGITS, torch.tensor([0, 1, 2, 3, 9])),
        "got labels from 0 to 9",
    ),
    "class labels as floats": (
        lambda: mm.CrossEntropyLoss()(LOGITS, torch.zeros(5)),
        r"class indices \(int64.*got torch.float32 of shape \(5,\): call .long\(\) on class indices",
    ),
    "class labels as a column": (
        lambda: mm.CrossEntropyLoss()(LOGITS, torch.zeros(5, 1).long()),
        r"got torch.int64 of shape \(5, 1\).*.squeeze\(-1\) on a column",
    ),
    "class weight": (lambda: mm.CrossEntropyLoss(weight=torch.ones(3))(LOGITS, torch.zeros(5).long()), r"weight \(classes,\)"),
    "logits of no dimension": (lambda: F.cross_entropy(torch.tensor(1.0), torch.tensor(0)), r"logits \(N, classes\)"),
    "label smoothing": (lambda: F.cross_entropy(LOGITS, torch.zeros(5).long(), label_smoothing=2), "between 0 and 1; got 2"),
    "array of NumPy": (lambda: F.sigmoid(X.numpy()), "a torch.Tensor as input of an activation; got ndarray: call torch.as"),
    "array as target": (lambda: F.mse_loss(X, X.numpy()), "a torch.Tensor as target; got ndarray"),
    "no target": (lambda: mm.QuadraticLoss()(X, None), "a torch.Tensor as target; got NoneType"),
    "lists into a net": (lambda: network_loss(mm.MLP([3, 2]), [[1]], [[2]]), "a torch.Tensor as input; got list"),
    "arrays into the engine": (lambda: engine().step(X.numpy(), X.numpy()), "a torch.Tensor as input; got ndarray"),
    "a DataLoader into the engine": (
        lambda: engine().train_epoch(DataLoader(TensorDataset(X, X))),  # type: ignore[arg-type, call-arg]
        "a torch.Tensor as input; got DataLoader: pass all rows, input and target, and a batch_size",
    ),
    "a DataLoader and a batch_size": (
        lambda: engine().train_epoch(DataLoader(TensorDataset(X, X)), 32),  # type: ignore[arg-type, call-arg]
        "a torch.Tensor as input; got DataLoader",
    ),
    "complex numbers into a Function": (
        lambda: functions.apply(functions.Sigmoid, torch.ones(2, dtype=torch.complex64, requires_grad=True)),
        "a real floating-point tensor; got torch.complex64",
    ),
    "lists into the engine": (lambda: engine().train_epoch([[1]], [[2]], 1), "a torch.Tensor as input; got list"),
    "nested rows into the engine": (
        lambda: engine().step(torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged), X),
        r"dense tensors; got a nested one as an input: join its rows",
    ),
    "no model": (lambda: network_loss("net", X, X), "a model, an mm.MLP or an nn.Sequential; got str"),
    "reduction": (lambda: F.mse_loss(X, X, "average"), "'none', 'mean' or 'sum'; got 'average'"),
    "weight with gradient": (
        lambda: F.binary_cross_entropy_with_logits(X, X, torch.ones(3, requires_grad=True)),
        r"weight without a gradient.*: call .detach\(\)",
    ),
    "weight shape of a cost": (
        lambda: F.binary_cross_entropy_with_logits(X, X, pos_weight=torch.ones(5)),
        r"pos_weight that broadcasts to the input's shape \(5, 3\); got \(5,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MESSAGES)
def test_one_sentence(what: str) -> None:
    """One line, no internals; caught as what torch would raise, or as a wrong value."""
    wrong, message = MESSAGES[what]
    with pytest.raises(mm.InputError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("expected") or "takes" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)


def test_nothing_broadcasts_in_silence() -> None:
    """Every pair of different shapes is refused by every cost that compares elements."""
    shapes = [(4,), (1, 4), (4, 1), (4, 4), (1, 4, 4)]
    for loss in (F.quadratic_loss, F.mse_loss, F.binary_cross_entropy_with_logits):
        for first in shapes:
            for second in shapes:
                if first != second:
                    with pytest.raises(mm.InputError):
                        loss(torch.randn(first), torch.randn(second))


def test_other_errors_pass() -> None:
    """An error that is not about the arguments is not put into words it does not deserve."""

    class Broken(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
            if func is nn.functional.linear:
                raise RuntimeError("out of memory")
            return super().__torch_function__(func, types, args, kwargs or {})

    with pytest.raises(RuntimeError, match="out of memory") as caught, torch.no_grad():
        F.affine(X.as_subclass(Broken), W)
    assert not isinstance(caught.value, mm.InputError)


def test_following_the_hint_for_labels_works() -> None:
    target = torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(mm.InputError) as refused:
        mm.QuadraticLoss()(LOGITS, target)
    mm.QuadraticLoss()(LOGITS, eval(str(refused.value).rpartition("or ")[2], {"torch": torch, "target": target}))
    mm.CrossEntropyLoss()(LOGITS, target)
