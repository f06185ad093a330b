"""The modules beside torch's own: the same bits, the same initialisation, the same state_dict, the same training."""

import copy
import inspect
import itertools
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import manual_mlp as mm
from manual_mlp.formulas import ACTIVATIONS, Row
from tests.cases import ROWS, ours_of, rows

NAMES = list(ACTIVATIONS)


def seeded(make: object) -> nn.Module:
    torch.manual_seed(3)
    return make()  # type: ignore[operator]


def torch_net(sizes: list[int], activation: str, output_activation: str, dropout: float = 0.0) -> nn.Sequential:
    """nn.Sequential(nn.Linear, activation, nn.Linear, …), dropout beside the activation so that it shifts no key."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        last = len(layers) == 2 * (len(sizes) - 2)
        G = ACTIVATIONS[output_activation if last else activation].twin()
        layers += [nn.Linear(n_in, n_out), nn.Sequential(G, nn.Dropout(dropout)) if dropout and not last else G]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(64, 50), (1, 50), (4, 16, 50), (50,), (0, 50)], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["two_functions", "fused"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_affine_and_sigmoid_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], fused: bool, bias: bool) -> None:
    """Outputs and gradients of Affine, Sigmoid and their fusion are nn.Linear's and nn.Sigmoid's own bits."""
    theirs = seeded(lambda: nn.Sequential(nn.Linear(50, 40, bias), nn.Sigmoid())).to(dtype)
    if fused:
        ours = seeded(lambda: nn.Sequential(mm.AffineActivation(50, 40, "sigmoid", bias))).to(dtype)
    else:
        ours = seeded(lambda: nn.Sequential(mm.Affine(50, 40, bias), mm.Sigmoid())).to(dtype)
    x, g = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 40, dtype=dtype)
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        gradients = torch.autograd.grad(output, [leaf, *model.parameters()], g)
        results.append([output, *gradients])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@rows
def test_activation_modules(row: Row) -> None:
    """Each is its torch counterpart by type, signature, print, state and result; the fused layer takes it over."""
    ours, theirs = ours_of(row), row.twin()
    assert isinstance(ours, type(theirs))
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict()
    assert (type(ours).__doc__ or "").startswith("a = ")
    z = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(z), theirs(z), rtol=1e-12, atol=1e-12)
    fused = seeded(lambda: mm.AffineActivation(3, 2, ours, dtype=torch.float64))
    apart = seeded(lambda: nn.Linear(3, 2, dtype=torch.float64))
    torch.testing.assert_close(fused(z), theirs(apart(z)), rtol=1e-12, atol=1e-12)
    assert fused.row == row
    assert repr(fused.row.twin()) == repr(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_row_at_its_defaults(name: str) -> None:
    layers = [
        seeded(lambda given=given: mm.AffineActivation(3, 2, given)) for given in (name, ours_of(ACTIVATIONS[name]))
    ]
    x = torch.randn(5, 3)
    assert torch.equal(layers[0](x), layers[1](x))
    assert layers[0].activation == name


def test_the_identity_passes_everything() -> None:
    for value in (torch.ones(3, dtype=torch.complex64), torch.ones(3).long(), "text", None):
        assert mm.Identity()(value) is value
        assert mm.functional.identity(value) is value


def copies(module: nn.Module, folder: Path) -> Iterator[nn.Module]:
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    torch.save(module, folder / "module.pt")
    yield torch.load(folder / "module.pt", weights_only=False)


@rows
def test_modules_are_copied(row: Row, tmp_path: Path) -> None:
    """A module holds the name of its row, never the row: a lambda can't be pickled."""
    for module in (ours_of(row), mm.AffineActivation(3, 2, ours_of(row)), mm.MLP([3, 4, 2], ours_of(row), "identity")):
        x = torch.randn(5, 3)
        for other in copies(module, tmp_path):
            assert type(other) is type(module)
            assert torch.equal(other(x), module(x))
            assert repr(other) == repr(module)


def _in_another_process(modules: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    return [module(x).detach() for module in modules]


def test_modules_in_a_spawned_process() -> None:
    modules, x = [mm.AffineActivation(3, 2, ours_of(row)) for row in ROWS], torch.randn(5, 3)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_in_another_process, modules, x).result()
    for values, module in zip(found, modules, strict=True):
        assert torch.equal(values, module(x))


def test_the_activation_can_be_changed() -> None:
    """The forward reads it at each call, its parameters follow, and a wrong one is refused and changes nothing."""
    layer, linear = seeded(lambda: mm.AffineActivation(3, 2, nn.LeakyReLU(0.3))), seeded(lambda: nn.Linear(3, 2))
    x = torch.randn(5, 3)
    for given, twin, values in (
        ("relu", nn.ReLU(), ()),
        ("softplus", nn.Softplus(), (1.0, 20.0)),
        (nn.Softplus(2.0, 3.0), nn.Softplus(2.0, 3.0), (2.0, 3.0)),
        (mm.LeakyReLU(-0.2), nn.LeakyReLU(-0.2), (-0.2,)),
        ("leaky_relu", nn.LeakyReLU(), (0.01,)),
        (nn.GELU("tanh"), nn.GELU("tanh"), ()),
    ):
        layer.activation = given
        assert layer.parameter_values == values
        assert repr(layer.row.twin()) == repr(twin)
        torch.testing.assert_close(layer(x), twin(linear(x)))
        assert list(layer.children()) == []
        for wrong in ("sigmoyd", nn.ReLU, nn.Softmax(-1), None, 3):
            with pytest.raises(mm.InputError, match="name of an activation"):
                layer.activation = wrong
        assert layer.parameter_values == values
        torch.testing.assert_close(layer(x), twin(linear(x)))
    layer.parameter_values = ()
    net = mm.MLP([3, 4, 2])
    before = net(x)
    net[0].activation = "relu"
    assert not torch.equal(net(x), before)
    assert isinstance(net.to_torch()[1], nn.ReLU)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (), (2, 5)], ids=str)
def test_layers_of_no_neurons(sizes: tuple[int, int], shape: tuple[int, ...]) -> None:
    """As torch's, with its warning: bits, shapes and gradients."""
    make = {
        "theirs": lambda: nn.Linear(*sizes),
        "ours": lambda: mm.Affine(*sizes),
        "fused": lambda: mm.AffineActivation(*sizes, "tanh"),
    }
    results = {}
    x = torch.randn(*shape, sizes[0])
    for name, layer in make.items():
        with pytest.warns(UserWarning, match="zero-element"):
            module = seeded(layer)
        leaf = x.clone().requires_grad_()
        output = module(leaf) if name == "fused" else module(leaf).tanh()
        results[name] = [output, *torch.autograd.grad(output.sum(), [leaf, *module.parameters()])]
    for name in ("ours", "fused"):
        for mine, theirs in zip(results[name], results["theirs"], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_activation_arguments_are_taken_over() -> None:
    z = torch.linspace(-3, 3, 13, dtype=torch.float64).unsqueeze(-1)
    for ours, theirs in (
        (mm.LeakyReLU(0.3), nn.LeakyReLU(0.3)),
        (mm.LeakyReLU(-0.3), nn.LeakyReLU(-0.3)),
        (mm.Softplus(beta=2.0, threshold=1.5), nn.Softplus(beta=2.0, threshold=1.5)),
        (mm.GELU("tanh"), nn.GELU("tanh")),
    ):
        torch.testing.assert_close(ours(z), theirs(z), rtol=1e-12, atol=1e-12)
        fused = mm.AffineActivation(1, 1, ours, bias=False, dtype=torch.float64)
        nn.init.ones_(fused.weight)
        torch.testing.assert_close(fused(z), theirs(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(ACTIVATIONS[name].twin(), "inplace")])
def test_inplace(name: str) -> None:
    """Written in place as torch's, and a leaf that requires a gradient is refused as torch refuses it."""
    ours, theirs = ours_of(ACTIVATIONS[name], inplace=True), type(ACTIVATIONS[name].twin())(inplace=True)
    leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    written = []
    for G in (ours, theirs):
        z = leaf * 2
        a = G(z)
        assert a.data_ptr() == z.data_ptr()
        written.append([a, *torch.autograd.grad(a.square().sum(), leaf)])
    for mine, other in zip(*written, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        ours(leaf)


def test_affine_is_a_linear() -> None:
    ours, theirs = seeded(lambda: mm.Affine(5, 3)), seeded(lambda: nn.Linear(5, 3))
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    assert repr(ours) == repr(theirs).replace("Linear", "Affine")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_mlp_and_torch_exchange_state(dropout: float) -> None:
    """Same seed, same bits; keys 0.weight, 2.weight, …, and load_state_dict in both directions."""
    sizes = [6, 5, 4, 3]
    ours = seeded(lambda: mm.MLP(sizes, dropout=dropout))
    theirs = seeded(lambda: torch_net(sizes, "sigmoid", "sigmoid"))
    assert list(ours.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    for source, sink in ((ours, theirs), (theirs, ours)):
        nn.init.normal_(source.state_dict()["2.weight"])
        sink.load_state_dict(source.state_dict())
        x = torch.randn(7, 6)
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("activation", "output_activation"), [(name, "identity") for name in NAMES] + [("sigmoid",) * 2]
)
def test_a_hundred_steps_follow_torch(activation: str, output_activation: str, dropout: float) -> None:
    """Training of MLP and of torch's layers, in float64, apart by at most 1e-12 at each step."""
    sizes = [4, 8, 6, 3]
    ours = seeded(lambda: mm.MLP(sizes, activation, output_activation, dropout=dropout, dtype=torch.float64))
    theirs = torch_net(sizes, activation, output_activation, dropout).double()
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    steps = []
    for model in (ours, theirs):
        generator.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        torch.manual_seed(7)
        for _ in range(100):
            x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
            target = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2] / 4, x[:, 3].tanh()], dim=1)
            prediction = model(x)
            mine = model is ours
            loss = mm.QuadraticLoss()(prediction, target) if mine else ((prediction - target) ** 2).sum() / 2 / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        steps.append(torch.stack(losses))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=1e-12)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    assert steps[0][-1] < steps[0][0]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_is_torchs_own_mask(p: float) -> None:
    """On the CPU: the same seed draws the same mask, and the gradient is that of torch's dropout, to the bit."""
    results = []
    for dropout in (mm.Dropout(p), nn.Dropout(p)):
        torch.manual_seed(5)
        a = torch.randn(40, 30, requires_grad=True)
        output = dropout(a)
        results.append([output, *torch.autograd.grad(output.square().sum(), a)])
        assert dropout.eval()(a) is a
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_one_activation_per_hidden_layer() -> None:
    net = mm.MLP([4, 3, 3, 2], ["tanh", mm.LeakyReLU(0.2)], "identity", bias=False)
    assert [layer.activation for layer in net] == ["tanh", "leaky_relu", "identity"]
    assert net[1].parameter_values == (0.2,)
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "2.weight", "4.weight"]


def test_sizes_of_any_whole_type() -> None:
    """NumPy's too."""
    sizes = np.array([4, 3, 2])
    assert mm.MLP(sizes).sizes == [4, 3, 2]
    assert mm.Affine(sizes[0], sizes[1]).weight.shape == (3, 4)


def test_a_subclass_is_not_its_activation() -> None:
    """Its forward may compute something else."""

    class Shifted(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    with pytest.raises(mm.InputError, match="got Shifted"):
        mm.AffineActivation(2, 3, Shifted())


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_in_place(p: float) -> None:
    a = torch.randn(20, 10, requires_grad=True)
    z = a * 1
    torch.manual_seed(1)
    dropped = mm.Dropout(p, inplace=True)(z)
    assert dropped.data_ptr() == z.data_ptr()
    torch.manual_seed(1)
    assert torch.equal(dropped, mm.Dropout(p)(a))
    (gradient,) = torch.autograd.grad(dropped.sum(), a)
    assert torch.equal(gradient, torch.autograd.grad(_dropped(a, p).sum(), a)[0])


def _dropped(a: torch.Tensor, p: float) -> torch.Tensor:
    torch.manual_seed(1)
    return nn.functional.dropout(a, p)


@pytest.mark.parametrize("loss", [mm.MSELoss(), mm.BCEWithLogitsLoss(), mm.QuadraticLoss()])
def test_float16_costs_do_not_overflow(loss: nn.Module) -> None:
    """The sum of 40,000 elements is beyond float16, their mean is not."""
    z = torch.randn(4096, 10).half() * 3
    exact = loss(z.double(), torch.zeros_like(z).double())
    # One rounding of the result.
    torch.testing.assert_close(loss(z, torch.zeros_like(z)).double(), exact, rtol=2e-3, atol=0)


def test_softplus_of_beta_zero() -> None:
    """a is infinite there, and torch's gradient a half."""
    for G in (mm.functional.softplus, nn.functional.softplus):
        z = torch.tensor([1.0], requires_grad=True)
        assert torch.autograd.grad(G(z, 0.0), z)[0].item() == 0.5


def test_linear_neuron() -> None:
    """No hidden layer and the identity: the lecture's linear neuron is nn.Linear."""
    net, linear = seeded(lambda: mm.MLP([3, 1], output_activation="identity")), seeded(lambda: nn.Linear(3, 1))
    x = torch.randn(5, 3)
    assert torch.equal(net(x), linear(x))


def test_quadratic_loss_is_the_lectures() -> None:
    """½, and 1/N over the samples: nn.MSELoss is 2/m of it."""
    prediction, target = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    quadratic = mm.QuadraticLoss()(prediction, target)
    torch.testing.assert_close(nn.MSELoss()(prediction, target), 2 / 3 * quadratic, rtol=1e-12, atol=1e-12)


def test_masked_logits() -> None:
    """A logit of −inf masks a class: the cost stays finite and its gradient is 0, as in torch."""
    z = torch.randn(4, 3, dtype=torch.float64)
    z[:, 1] = -torch.inf
    z.requires_grad_()
    target = torch.tensor([0, 2, 2, 0])
    ours, theirs = mm.CrossEntropyLoss()(z, target), nn.CrossEntropyLoss()(z, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (mm.MSELoss(), nn.MSELoss()),
        (mm.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()),
        (mm.CrossEntropyLoss(), nn.CrossEntropyLoss()),
        (mm.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum")),
        (mm.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
    ],
)
def test_empty_batch(ours: nn.Module, theirs: nn.Module) -> None:
    """N = 0 is no error: the cost is what torch's is, and the gradients are zero."""
    for loss in (ours, theirs):
        net = mm.MLP([4, 5, 3], output_activation="identity")
        cross = isinstance(loss, nn.CrossEntropyLoss)
        value = loss(net(torch.empty(0, 4)), torch.empty(0, dtype=torch.int64) if cross else torch.empty(0, 3))
        value.backward()
        assert value.isnan() or loss.reduction == "sum"
        assert all(not parameter.grad.any() for parameter in net.parameters())


def test_empty_batch_of_the_lectures_cost() -> None:
    net = mm.MLP([4, 5, 3])
    value = mm.QuadraticLoss()(net(torch.empty(0, 4)), torch.empty(0, 3))
    value.backward()
    assert value.isnan()
    assert all(not parameter.grad.any() for parameter in net.parameters())
