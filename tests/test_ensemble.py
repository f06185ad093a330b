"""K nets at once beside K engines, one after another: to 1e-12 after 64 mini-batches; and what is refused."""

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp import engine as engine_module
from manual_mlp.cuda_graph import Launch
from manual_mlp.formulas import COSTS, Row
from tests.cases import rows

double = torch.float64
K = 3
Make = Callable[[Any, int], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters, k: torch.optim.SGD(parameters, lr=0.1 * (1 + k)),
    "decay": lambda parameters, k: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01 * k),
    "momentum": lambda parameters, k: torch.optim.SGD(parameters, lr=0.05, momentum=0.9 - 0.1 * k),
    "adam": lambda parameters, k: torch.optim.Adam(parameters, lr=1e-3 * (1 + k)),
    "adamw": lambda parameters, k: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1 * k),
}


def nets(loss: str = "quadratic", activation: Any = "sigmoid", bias: bool = True, count: int = K) -> list[Any]:
    last = "identity" if COSTS[loss].logits else "sigmoid"
    torch.manual_seed(0)
    return [mm.MLP([4, 6, 5, 3], activation, last, bias, dtype=double) for _ in range(count)]


def data(loss: str = "quadratic", n: int = 64 * 4, indices: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, width, generator=generator, dtype=double) for width in (4, 3))
    if loss == "cross_entropy":
        return x, y.argmax(1) if indices else y.softmax(1)
    return x, y.sigmoid()


def generators(count: int = K) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def assert_equal_training(models: list[Any], make: Make, x: Tensor, y: Tensor, loss: str, batch: int = 4) -> None:
    """Two epochs of K nets at once, and of K engines."""
    twins = copy.deepcopy(models)
    optimizers = [make(model.parameters(), k) for k, model in enumerate(models)]
    engines = [mm.BackpropEngine(m, make(m.parameters(), k), loss) for k, m in enumerate(twins)]
    ensemble, own, theirs = mm.EnsembleEngine(models, optimizers, loss), generators(), generators()
    for _ in range(2):
        costs = ensemble.train_epoch(x, y, batch, own)
        expected = [engine.train_epoch(x, y, batch, each) for engine, each in zip(engines, theirs, strict=True)]
        torch.testing.assert_close(costs, torch.stack(expected), rtol=1e-12, atol=1e-12)
    for model, twin in zip(models, twins, strict=True):
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("loss", COSTS)
def test_equals_separate_trainings(loss: str, make: Make) -> None:
    assert_equal_training(nets(loss), make, *data(loss), loss)


@rows
def test_every_row(row: Row) -> None:
    x, y = data(n=64)
    assert_equal_training(nets(activation=row.twin()), OPTIMIZERS["sgd"], x, y, "quadratic")


def test_class_indices_and_a_shorter_last_batch() -> None:
    assert_equal_training(nets("cross_entropy"), OPTIMIZERS["sgd"], *data("cross_entropy", 47, True), "cross_entropy")


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adam"]], ids=["sgd", "adam"])
def test_without_biases_with_frozen_layers_and_groups(make: Make) -> None:
    models = nets(bias=False)
    for model in models:
        model[0].weight.requires_grad_(False)
    frozen = [model[0].weight.clone() for model in models]
    assert_equal_training(models, lambda p, k: make([q for q in p if q.requires_grad], k), *data(), "quadratic")
    assert all(torch.equal(model[0].weight, before) for model, before in zip(models, frozen, strict=True))
    assert_equal_training(
        nets(), lambda p, k: torch.optim.SGD([{"params": [q], "lr": 0.1 + 0.1 * i} for i, q in enumerate(p)]),
        *data(), "quadratic",
    )  # fmt: skip


def test_a_net_of_torchs_layers_and_dropout_in_evaluation() -> None:
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double() for _ in range(K)]
    for model in models:
        model.eval()
    assert_equal_training(models, OPTIMIZERS["sgd"], *data(), "mse")


def test_dropout_draws_for_each_net() -> None:
    torch.manual_seed(0)
    one = mm.MLP([4, 50, 3], dropout=0.5, dtype=double)
    models = [copy.deepcopy(one) for _ in range(K)]
    ensemble = mm.EnsembleEngine(models, [torch.optim.SGD(m.parameters(), lr=1.0) for m in models])
    x, y = data(n=8)
    ensemble.train_epoch(x, y, 8, [torch.Generator().manual_seed(0) for _ in models])
    assert not torch.equal(models[0][0].weight, models[1][0].weight)
    models[1].eval()
    with pytest.raises(mm.InputError, match=r"same dropouts.*\.eval\(\) alike"):
        ensemble.train_epoch(x, y, 8)


def test_one_net_is_an_ensemble_too_and_orders_come_from_the_default_generator() -> None:
    (model,), (twin,) = nets(count=1), nets(count=1)
    x, y = data()
    ensemble = mm.EnsembleEngine([model], [OPTIMIZERS["sgd"](model.parameters(), 0)])
    torch.manual_seed(7)
    cost = ensemble.train_epoch(x, y, 4)
    torch.manual_seed(7)
    expected = mm.BackpropEngine(twin, OPTIMIZERS["sgd"](twin.parameters(), 0)).train_epoch(x, y, 4)
    torch.testing.assert_close(cost, expected.view(1), rtol=1e-12, atol=1e-12)


def test_predictions_are_those_before_the_step() -> None:
    models, (x, y) = nets(), data(n=37)
    before = torch.stack([model(x) for model in models]).detach()
    ensemble = mm.EnsembleEngine(models, [torch.optim.SGD(m.parameters(), lr=0.0) for m in models])
    prediction = x.new_empty(K, 37, 3)
    ensemble.train_epoch(x, y, 8, None, prediction)
    torch.testing.assert_close(prediction, before, rtol=1e-12, atol=1e-12)


def test_each_net_keeps_its_memory_its_state_and_its_gradients() -> None:
    models = nets()
    addresses = [parameter.data_ptr() for model in models for parameter in model.parameters()]
    optimizers = [OPTIMIZERS["adam"](model.parameters(), k) for k, model in enumerate(models)]
    ensemble = mm.EnsembleEngine(models, optimizers)
    ensemble.train_epoch(*data(), 4)
    assert addresses == [parameter.data_ptr() for model in models for parameter in model.parameters()]
    assert models[0][0].weight.untyped_storage().nbytes() == 4 * 6 * 8
    assert optimizers[1].state[models[1][0].weight]["step"] == 64
    assert models[2][0].weight.grad.shape == (6, 4)
    assert (ensemble.models, ensemble.optimizers, ensemble.loss) == (models, optimizers, "quadratic")
    again = pickle.loads(pickle.dumps(ensemble))
    assert torch.equal(again.models[1][0].weight, models[1][0].weight)


def test_what_changes_between_epochs_is_honoured() -> None:
    """A parameter elsewhere, a loaded state, another rate, a hook, a frozen layer."""
    models, (x, y) = nets(), data()
    twins = copy.deepcopy(models)
    optimizers = [OPTIMIZERS["sgd"](m.parameters(), k) for k, m in enumerate(models)]
    others = [OPTIMIZERS["sgd"](m.parameters(), k) for k, m in enumerate(twins)]
    ensemble = mm.EnsembleEngine(models, optimizers)
    engines = [mm.BackpropEngine(*pair) for pair in zip(twins, others, strict=True)]
    called: list[int] = []

    def elsewhere(net: Any, optimizer: Any) -> None:
        net[0].weight.data = net[0].weight.data * 0.9

    def load(net: Any, optimizer: Any) -> None:
        net.load_state_dict({name: 0.5 * value for name, value in net.state_dict().items()})

    def rate(net: Any, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    def hook(net: Any, optimizer: Any) -> None:
        net[1].bias.register_hook(lambda gradient: called.append(1) or 2 * gradient)

    def freeze(net: Any, optimizer: Any) -> None:
        net[2].requires_grad_(False)
        optimizer.param_groups[0]["params"] = [p for p in net.parameters() if p.requires_grad]

    for change in (elsewhere, load, rate, hook, freeze):
        for net, optimizer in zip([*models, *twins], [*optimizers, *others], strict=True):
            change(net, optimizer)
        costs = ensemble.train_epoch(x, y, 8, generators())
        expected = [engine.train_epoch(x, y, 8, g) for engine, g in zip(engines, generators(), strict=True)]
        torch.testing.assert_close(costs, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert len(called) == 2 * 2 * K * 32
    models[1][1].bias.requires_grad_(False)
    trained = [p for p in models[1].parameters() if p.requires_grad]
    optimizers[1].param_groups[0]["params"] = trained
    with pytest.raises(mm.InputError, match="another set of frozen parameters in net 1 than in net 0"):
        ensemble.train_epoch(x, y, 8)


def test_the_tape_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: everything that changes lies in tensors, and the calls are launched from one place."""
    launched: list[int] = []
    monkeypatch.setattr(Launch, "__call__", lambda self: launched.append(1) or self.calls())
    original = mm.BackpropEngine._prepare

    def graphed(self: Any) -> None:
        self._graphed = True
        original(self)

    monkeypatch.setattr(mm.BackpropEngine, "_prepare", graphed)
    assert_equal_training(nets(), OPTIMIZERS["decay"], *data(), "quadratic")
    assert launched


def test_an_error_in_an_epoch_leaves_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    models, (x, y) = nets(), data()
    before = models[0][0].weight.clone()
    ensemble, count = mm.EnsembleEngine(models, [torch.optim.SGD(m.parameters(), 0.1) for m in models]), iter(range(9))
    run = engine_module.BoundPlan.run

    def interrupted(self: Any, *arguments: Any) -> None:
        if next(count) == 5:
            raise KeyboardInterrupt
        run(self, *arguments)

    monkeypatch.setattr(engine_module.BoundPlan, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensemble.train_epoch(x, y, 4)
    assert not torch.equal(before, models[0][0].weight)


def test_threads_take_turns() -> None:
    models, (x, y) = nets(), data()
    ensemble = mm.EnsembleEngine(models, [torch.optim.SGD(m.parameters(), 0.1) for m in models])
    costs: list[Tensor] = []
    threads = [threading.Thread(target=lambda: costs.append(ensemble.train_epoch(x, y, 4))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.stack(costs).isfinite().all()
    assert len(costs) == 3


def other(count: int = K, **changed: Any) -> list[Any]:
    """The nets, the last of which differs."""
    options: dict[str, Any] = {"sizes": [4, 6, 5, 3], "dtype": double}
    return [mm.MLP(**options) for _ in range(count - 1)] + [mm.MLP(**{**options, **changed})]


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        (lambda: other(sizes=[4, 7, 5, 3]), "in net 2 than in net 0: train it by an engine of its own"),
        (lambda: other(activation="tanh"), "another list of layers in net 2"),
        (lambda: other(bias=False), "another list of sizes in net 2"),
        (lambda: other(dtype=torch.float32), "another dtype or device in net 2"),
        (lambda: [mm.MLP([4, 3]).half() for _ in range(K)], "got float16: call"),
        (lambda: [nets()[0]] * K, "the same in two: copy.deepcopy one"),
        (lambda: [], "at least one model, and an optimizer for each; got 0 models"),
    ],
)
def test_refused_nets(models: Callable[[], list[Any]], sentence: str) -> None:
    made = models()
    with pytest.raises(mm.InputError, match=sentence):
        mm.EnsembleEngine(made, [torch.optim.SGD(model.parameters(), 0.1) for model in made], native=False)


def test_nets_that_differ_are_refused_where_c_does_not_take_them() -> None:
    """In an epoch, because until then C may take them; nothing is trained, and no number is drawn."""
    models, (x, y) = other(sizes=[4, 7, 5, 3]), data()
    ensemble = mm.EnsembleEngine(models, [torch.optim.SGD(m.parameters(), 0.1) for m in models])
    models[1][0].bias.register_hook(lambda gradient: gradient)
    before, drawn = copy.deepcopy(models[0][0].weight), torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(mm.InputError, match="another list of sizes in net 2 than in net 0"):
            ensemble.train_epoch(x, y, 4)
    assert torch.equal(models[0][0].weight, before)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("native", [True, False])
def test_memory_that_two_share_is_refused(native: bool) -> None:
    """Parameters that overlap, in two nets or in one, and predictions that later steps would read as rows."""

    def engine_of(*models: Any) -> Any:
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
        return mm.EnsembleEngine(models, optimizers, native=native)

    models, buffer, (x, y) = nets(), torch.zeros(100, dtype=double), data()
    models[0][0].weight.data, models[2][0].weight.data = buffer[:24].view(6, 4), buffer[30:54].view(6, 4)
    engine_of(*models)  # side by side
    models[1][0].weight.data = buffer[4:28].view(6, 4)
    with pytest.raises(mm.InputError, match="parameters of their own"):
        engine_of(*models)
    models[0][0].bias.data = buffer[20:26]
    with pytest.raises(mm.InputError, match="got tied ones"):
        engine_of(models[0])
    many, said = engine_of(*nets()), x.new_empty(K, len(x), 3)
    for given, target, of in ((x, said[0], said), (x, y, [*said])):
        with pytest.raises(mm.InputError, match=r"a prediction with memory of its own|Tensor as a prediction"):
            many.train_epoch(given, target, 4, prediction=of)
    alone = mm.MLP([4, 6, 4], dtype=double)
    by = mm.BackpropEngine(alone, torch.optim.SGD(alone.parameters(), 0.1), native=native)
    with pytest.raises(mm.InputError, match="a prediction with memory of its own"):
        by.train_batches(x, x.clone(), 4, x)


def test_seeds_are_no_generators() -> None:
    models, (x, y) = nets(), data()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
    with pytest.raises(mm.InputError, match=r"expected a torch\.Generator; got int: .*manual_seed"):
        mm.EnsembleEngine(models, optimizers).train_epoch(x, y, 4, [1, 2, 3])  # type: ignore[list-item]
    with pytest.raises(mm.InputError, match=r"expected a torch\.Generator; got int"):
        mm.BackpropEngine(models[0], optimizers[0]).train_epoch(x, y, 4, 1)  # type: ignore[arg-type]


def test_refused_optimizers() -> None:
    models = nets()
    mixed = [torch.optim.SGD(models[0].parameters(), 0.1), *(torch.optim.Adam(m.parameters()) for m in models[1:])]
    with pytest.raises(mm.InputError, match="another class of optimizer in net 1"):
        mm.EnsembleEngine(models, mixed, native=False)
    joint = torch.optim.SGD(itertools.chain(*(model.parameters() for model in models)), 0.1)
    with pytest.raises(mm.InputError, match="an optimizer over the model's parameters"):
        mm.EnsembleEngine(models, [joint] * K)
    with pytest.raises(mm.InputError, match="3 models and 1 optimizers"):
        mm.EnsembleEngine(models, mixed[:1])


def test_refused_batches() -> None:
    models, (x, y) = nets(), data()
    ensemble = mm.EnsembleEngine(models, [torch.optim.SGD(m.parameters(), 0.1) for m in models])
    with pytest.raises(mm.InputError, match=r"an input of shape \(N, 4\)"):
        ensemble.train_epoch(x[:, :3], y, 4)
    with pytest.raises(mm.InputError, match="batch_size of at least 1"):
        ensemble.train_epoch(x, y, 0)
    with pytest.raises(mm.InputError, match="expected 3 generators, one for each net; got 2"):
        ensemble.train_epoch(x, y, 4, generators(2))
    with pytest.raises(mm.InputError, match="rows with memory of their own"):
        ensemble.train_epoch(models[1][0].weight.detach(), y[:6], 4)
    with pytest.raises(mm.InputError, match=r"a prediction of shape \(3, 256, 3\)"):
        ensemble.train_epoch(x, y, 4, prediction=x.new_empty(2, len(x), 3))
    with pytest.raises(mm.InputError, match="a prediction of shape"):
        ensemble.train_epoch(x, y, 4, prediction=x.new_empty(K, 5, 3))
    with pytest.raises(mm.InputError, match="each number in a place of its own"):
        ensemble.train_epoch(x, y, 4, prediction=x.new_empty(1, len(x), 3).expand(K, -1, -1))
    with pytest.raises(mm.InputError, match="expected 3 generators, one for each net; got Generator"):
        ensemble.train_epoch(x, y, 4, torch.Generator())  # type: ignore[arg-type]
    with torch.autocast("cpu"), pytest.raises(mm.InputError, match="ignores autocast"):
        ensemble.train_epoch(x, y, 4)
    models[1][0].register_forward_hook(lambda *_: None)
    with pytest.raises(mm.InputError, match="hooks"):
        ensemble.train_epoch(x, y, 4)


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adam"]], ids=["sgd", "adam"])
def test_residual_nets(make: Make) -> None:
    models = [
        nn.Sequential(
            nn.Linear(4, 4), mm.Sum(nn.Identity(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 3)
        ).double()
        for _ in range(K)
    ]
    twins = copy.deepcopy(models)
    x, y = data()
    ensemble = mm.EnsembleEngine(models, [make(m.parameters(), k) for k, m in enumerate(models)])
    costs = ensemble.train_epoch(x, y, 4, generators())
    engines = [mm.BackpropEngine(m, make(m.parameters(), k)) for k, m in enumerate(twins)]
    expected = [engine.train_epoch(x, y, 4, g) for engine, g in zip(engines, generators(), strict=True)]
    torch.testing.assert_close(costs, torch.stack(expected), rtol=1e-12, atol=1e-12)
    for mine, other in zip(nn.ModuleList(models).parameters(), nn.ModuleList(twins).parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
