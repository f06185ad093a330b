"""The engine beside autograd and torch.optim: 100 steps to 1e-12; and what it notices, honours and refuses."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import manual_mlp as mm
from manual_mlp import engine as engine_module
from manual_mlp.engine import BackpropEngine
from manual_mlp.formulas import Row
from tests.cases import ROWS, rows

double = torch.float64
Optimizer = Callable[[Any], torch.optim.Optimizer]


def quadratic(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum() / (2 * len(prediction))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quadratic": quadratic,
    "mse": torch_functional.mse_loss,
    "bce": torch_functional.binary_cross_entropy_with_logits,
    "cross_entropy": torch_functional.cross_entropy,
}


def net(activation: Any = "sigmoid", loss: str = "quadratic", bias: bool = True) -> Any:
    """Ours, 4-5-6-3, the activation in every layer but before a logits cost."""
    last = activation if loss in ("quadratic", "mse") else "identity"
    sizes = [4, 5, 6, 3]
    layers = [mm.AffineActivation(i, o, "identity", bias, dtype=double) for i, o in itertools.pairwise(sizes)]
    for layer, chosen in zip(layers, (activation, activation, last), strict=True):
        layer.activation = chosen
    return nn.Sequential(*layers)


def torch_twin(ours: Any) -> nn.Sequential:
    """The same net of torch's own layers, with copies of the parameters."""
    layers: list[nn.Module] = []
    for layer in ours:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=double)
        linear.load_state_dict(layer.state_dict())
        layers += [linear, layer.row.twin()]
    return nn.Sequential(*layers)


def batches(loss: str = "quadratic", n: int = 7, count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, n, 4, generator=generator, dtype=double)
    y = torch.rand(count, n, 3, generator=generator, dtype=double)
    if loss == "cross_entropy":
        y = y / y.sum(-1, keepdim=True)
    return list(zip(x, y, strict=True))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def train_torch(model: nn.Module, optimizer: Any, data: Any, loss: str, steps: int, clip: float | None = None) -> Any:
    costs = []
    for step in range(steps):
        input, target = data[step % len(data)]
        optimizer.zero_grad()
        cost = LOSSES[loss](model(input), target)
        cost.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        costs.append(cost.detach())
    return torch.stack(costs)


def train_ours(engine: BackpropEngine, data: Any, steps: int) -> Tensor:
    return torch.stack([engine.step(*data[step % len(data)]) for step in range(steps)])


def assert_same(ours: nn.Module, twin: nn.Module, tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def compare(ours: Any, make: Optimizer, loss: str = "quadratic", clip: float | None = None, data: Any = None) -> None:
    """100 steps: the same costs, parameters and optimizer state."""
    twin = torch_twin(ours)
    mine, theirs = make(ours.parameters()), make(twin.parameters())
    data = data or batches(loss)
    costs = train_ours(BackpropEngine(ours, mine, loss, max_grad_norm=clip), data, 100)
    torch.testing.assert_close(costs, train_torch(twin, theirs, data, loss, 100, clip), rtol=1e-12, atol=1e-12)
    assert_same(ours, twin)
    states = mine.state_dict()["state"], theirs.state_dict()["state"]
    torch.testing.assert_close(*states, rtol=1e-11, atol=1e-12)


# Of many rows, with fewer than 16 neurons, the engine keeps its buffers column by column.
few_and_many = pytest.mark.parametrize("n", [7, 40])


@rows
@few_and_many
@pytest.mark.parametrize("loss", LOSSES)
def test_a_hundred_steps(row: Row, loss: str, n: int) -> None:
    compare(net(row.twin(), loss), sgd, loss, data=batches(loss, n))


OPTIMIZERS: dict[str, Optimizer] = {
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    "tensor_lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1, dtype=double)),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    compare(net("tanh"), OPTIMIZERS[name])


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_clipping(name: str) -> None:
    compare(net("relu"), OPTIMIZERS.get(name, sgd), clip=0.05)


def test_many_rows() -> None:
    """More elements of a − ŷ than a product of matrix and vector sums."""
    compare(net(), sgd, data=batches(n=1500, count=1))


@few_and_many
def test_without_bias(n: int) -> None:
    compare(net("sigmoid", bias=False), sgd, data=batches(n=n))


@few_and_many
def test_class_indices(n: int) -> None:
    data = [(x, torch.randint(0, 3, (len(x),))) for x, _ in batches(n=n)]
    compare(net("relu", loss="cross_entropy"), sgd, "cross_entropy", data=data)


def test_batches_of_several_sizes() -> None:
    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(count=9) + batches(count=3), range(1, 8), strict=False)]
    compare(net("tanh"), sgd, data=data)


def test_groups_and_schedulers() -> None:
    """The learning rates are read at each step; a scheduler doesn't complain."""
    ours = net("tanh")
    twin = torch_twin(ours)

    def make(model: Any) -> Any:
        weights = [p for p in model.parameters() if p.dim() == 2]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 1]}]
        optimizer = torch.optim.SGD(groups, lr=0.2)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)

    (mine, my_schedule), (theirs, their_schedule) = make(ours), make(twin)
    engine = BackpropEngine(ours, mine)
    for _ in range(5):
        train_ours(engine, batches(), 4)
        my_schedule.step()
        train_torch(twin, theirs, batches(), "quadratic", 4)
        their_schedule.step()
    assert_same(ours, twin)
    assert mine.state_dict() == theirs.state_dict()


def test_class_labels_out_of_range() -> None:
    model = net("relu", loss="cross_entropy")
    engine = BackpropEngine(model, sgd(model.parameters()), "cross_entropy")
    before = copy.deepcopy(model.state_dict())
    x, y = batches()[0][0], torch.tensor([0, 1, 2, 3, 0, 1, 2])
    for wrong in (y, y - 1):
        with pytest.raises(mm.InputError, match="class labels from 0 to 2"):
            engine.step(x, wrong)
        with pytest.raises(mm.InputError, match="class labels from 0 to 2"):
            engine.train_epoch(x, wrong, 2)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def epoch_by_torch(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, batch_size: int, seed: int) -> Tensor:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    data = [(x[rows], y[rows]) for rows in order.split(batch_size)]
    costs = train_torch(model, optimizer, data, "quadratic", len(data))
    return (costs * torch.tensor([len(target) for _, target in data])).sum() / len(x)


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("rows", [3, 35, 33, 64])
def test_epochs(name: str, rows: int) -> None:
    """The order of randperm, a shorter last batch, the mean cost of all rows; also where one batch is not full."""
    x, y = torch.randn(rows, 4, dtype=double), torch.rand(rows, 3, dtype=double)
    ours = net("tanh")
    twin = torch_twin(ours)
    make = OPTIMIZERS.get(name, sgd)
    mine, theirs = make(ours.parameters()), make(twin.parameters())
    engine = BackpropEngine(ours, mine)
    for seed in range(3):
        cost = engine.train_epoch(x, y, 8, torch.Generator().manual_seed(seed))
        expected = epoch_by_torch(twin, theirs, x, y, 8, seed)
        torch.testing.assert_close(cost, expected, rtol=1e-12, atol=1e-12)
    assert_same(ours, twin)


def test_epochs_gathered_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_CHUNK", 70)  # two batches of 8 rows of 4
    test_epochs("sgd", 61)


def test_dropout_draws_the_layers_masks() -> None:
    ours = mm.MLP([4, 20, 20, 3], dropout=0.3, dtype=double)
    twin = copy.deepcopy(ours)
    torch.manual_seed(5)
    costs = train_ours(BackpropEngine(ours, sgd(ours.parameters())), batches(), 20)
    torch.manual_seed(5)
    expected = train_torch(twin, sgd(twin.parameters()), batches(), "quadratic", 20)
    torch.testing.assert_close(costs, expected, rtol=1e-12, atol=1e-12)
    assert_same(ours, twin)
    ours.eval(), twin.eval()
    train_ours(BackpropEngine(ours, sgd(ours.parameters())), batches(), 5)
    train_torch(twin, sgd(twin.parameters()), batches(), "quadratic", 5)
    assert_same(ours, twin)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("loss", "compute_dtype"), [("quadratic", None), ("bce", None), ("bce", torch.bfloat16)])
@pytest.mark.parametrize("n", [5, 40])
def test_batches_in_order_with_their_predictions(
    optimizer: Any, loss: str, compute_dtype: torch.dtype | None, n: int
) -> None:
    """train_batches is step after step, and gives what each step predicted before it."""
    ours = mm.MLP([4, 20, 3], output_activation="identity" if loss == "bce" else "sigmoid", dropout=0.3)
    twin = copy.deepcopy(ours)
    engines = [
        BackpropEngine(net, optimizer(net.parameters(), lr=0.1), loss, None, compute_dtype) for net in (ours, twin)
    ]
    rows = 3 * n + 2
    input, target = torch.randn(rows, 4), torch.rand(rows, 3)
    for engine in engines:  # without predictions, first
        torch.manual_seed(0)
        engine.train_batches(input, target, n)
    given, expected, costs = torch.empty(rows, 3), [], []
    torch.manual_seed(1)
    mean = engines[0].train_batches(input, target, n, given)
    torch.manual_seed(1)
    for x, y in zip(input.split(n), target.split(n), strict=True):
        state = torch.get_rng_state()
        expected.append(twin(x).detach())
        torch.set_rng_state(state)
        costs.append(engines[1].step(x, y) * len(x))
    assert_same(ours, twin)
    torch.testing.assert_close(mean, sum(costs) / rows)
    tolerance = 1e-6 if compute_dtype is None else 0.02  # 8 bits of mantissa
    torch.testing.assert_close(given, torch.cat(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", [[0], [1, 2], [2], ["bias"]])
def test_frozen_parameters_stay(frozen: list[Any]) -> None:
    """As autograd does, and as soon as they are frozen."""
    ours = net("tanh")
    twin = torch_twin(ours)
    mine, theirs = sgd(ours.parameters()), sgd(twin.parameters())
    engine = BackpropEngine(ours, mine)
    for model, step in ((ours, 1), (twin, 2)):
        for layer in frozen:
            part = model[0].bias if layer == "bias" else model[layer * step]
            part.requires_grad_(False)
    train_ours(engine, batches(), 20)
    train_torch(twin, theirs, batches(), "quadratic", 20)
    assert_same(ours, twin)


def test_gradients_and_costs_are_ordinary_tensors() -> None:
    """They clip, accumulate, save and differentiate; the model stays usable in autograd between steps."""
    model = net("tanh")
    engine = BackpropEngine(model, sgd(model.parameters()))
    x, y = batches()[0]
    costs = [engine.step(x, y), engine.compute_gradients(x, y), engine.train_epoch(x, y, 2)]
    assert not any(cost.is_inference() or cost.requires_grad or cost.dim() for cost in costs)
    twin = torch_twin(model)
    engine.compute_gradients(x, y)
    quadratic(twin(x), y).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        assert not mine.grad.is_inference()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    quadratic(model(x), y).backward()  # accumulates
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    copy.deepcopy(model.state_dict())
    cost = quadratic(model(x), y)
    engine.step(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cost.backward()


def test_a_plain_step_leaves_gradients_alone() -> None:
    model = net()
    engine = BackpropEngine(model, sgd(model.parameters()))
    engine.step(*batches()[0])
    assert all(parameter.grad is None for parameter in model.parameters())


@few_and_many
def test_nothing_is_allocated_but_the_cost(n: int) -> None:
    """In a step after the first: one result of one element, for every row and loss."""

    made: list[tuple[str, int]] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            known = {x.untyped_storage().data_ptr() for x in given}
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
                made.append((str(function), result.numel()))
            return result

    for row in ROWS:
        for loss in LOSSES if row.name == "sigmoid" else ["mse"]:
            model = net(row.twin(), loss)
            if row.name == "tanh":
                model.insert(1, nn.Dropout(0.3))
            engine = BackpropEngine(model, sgd(model.parameters()), loss)
            x, y = batches(loss, n)[0]
            engine.step(x, y)
            made.clear()
            with Count():
                engine.step(x, y)
            assert made == [("aten.mul.Tensor", 1)], f"{row.name}, {loss}"


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_resumed_training_continues_to_the_same_bits(name: str) -> None:
    make = OPTIMIZERS.get(name, sgd)
    model = net("tanh")
    engine = BackpropEngine(model, optimizer := make(model.parameters()))
    x, y = torch.randn(30, 4, dtype=double), torch.rand(30, 3, dtype=double)
    engine.train_epoch(x, y, 7, torch.Generator().manual_seed(1))
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    engine.train_epoch(x, y, 7, torch.Generator().manual_seed(2))
    resumed = net("tanh")
    again = BackpropEngine(resumed, other := make(resumed.parameters()))
    resumed.load_state_dict(checkpoint[0])
    other.load_state_dict(checkpoint[1])  # param_groups are others then
    again.train_epoch(x, y, 7, torch.Generator().manual_seed(2))
    assert_same(resumed, model, tolerance=0)
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_a_checkpoint_is_torchs() -> None:
    """Half by the engine, half by torch, with the same optimizer."""
    ours = net("tanh")
    twin = torch_twin(ours)
    mine, theirs = OPTIMIZERS["adam"](ours.parameters()), OPTIMIZERS["adam"](twin.parameters())
    train_ours(BackpropEngine(ours, mine), batches(), 10)
    train_torch(ours, mine, batches(), "quadratic", 10)
    train_torch(twin, theirs, batches(), "quadratic", 20)
    assert_same(ours, twin)


def test_parameters_loaded_and_moved_are_noticed() -> None:
    model, x, y = net("tanh"), *batches()[0]
    engine = BackpropEngine(model, sgd(model.parameters()))
    engine.step(x, y)
    model.load_state_dict(net("tanh").state_dict())  # in place
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # another memory
    twin = torch_twin(model)
    engine.step(x, y)
    train_torch(twin, sgd(twin.parameters()), [(x, y)], "quadratic", 1)
    assert_same(model, twin)
    model.float()
    with pytest.raises(mm.InputError, match=r"expected an input of shape .* and torch\.float32"):
        engine.step(x, y)
    assert engine.step(x.float(), y.float()).dtype == torch.float32


def test_a_parameter_cut_or_turned_in_place_is_noticed() -> None:
    """`.data` leaves the parameter the same object, and a part of it the same address."""
    model, x, y = mm.MLP([4, 5, 5, 3], dtype=double), *batches()[0]
    engine = BackpropEngine(model, sgd(model.parameters()))
    first, middle, _ = model
    numbers = torch.randn(50, dtype=double)

    def turn() -> None:
        middle.weight.data = middle.weight.data.t()

    def by_rows() -> None:
        middle.weight.data = numbers.as_strided((5, 5), (10, 1))

    def by_columns() -> None:
        middle.weight.data = numbers.as_strided((5, 5), (1, 10))

    def cut() -> None:
        first.weight.data, first.bias.data = first.weight.data[:2], first.bias.data[:2]
        middle.weight.data = middle.weight.data[:, :2]

    for change in (lambda: None, turn, by_rows, by_columns, cut):
        change()
        layers = copy.deepcopy(model)
        engine.step(x, y)
        train_torch(layers, sgd(layers.parameters()), [(x, y)], "quadratic", 1)
        assert_same(model, layers)


def test_a_changed_model_is_noticed() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.LeakyReLU()).double(), batches()[0]
    engine = BackpropEngine(model, sgd(model.parameters()))
    engine.step(x, y)
    model[3] = nn.LeakyReLU(0.7)
    expected = quadratic(model(x), y)
    torch.testing.assert_close(engine.step(x, y), expected.detach())


def test_a_refusal_is_no_consent() -> None:
    """A parameter that the optimizer does not know is refused at the next step too."""
    model, (x, y) = net("tanh"), batches()[0]
    engine = BackpropEngine(model, sgd(model.parameters()))
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
    for _ in range(2):
        with pytest.raises(mm.InputError, match="expected an optimizer over the model's parameters"):
            engine.step(x, y)


def test_a_bias_cut_alone_is_refused_before_anything_is_trained() -> None:
    model, (x, y) = net("tanh"), batches()[0]
    engine = BackpropEngine(model, sgd(model.parameters()))
    engine.step(x, y)
    model[0].bias.data = model[0].bias.data[:1]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mm.InputError, match=r"expected a bias of shape \(5,\)"):
        engine.step(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def replaced(model: Any) -> None:
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())


def assigned(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def removed(model: Any) -> None:
    del model[2]


@pytest.mark.parametrize("change", [replaced, assigned, removed])
def test_parameters_that_the_optimizer_does_not_have(change: Callable[[Any], None]) -> None:
    model = net("tanh")
    engine = BackpropEngine(model, sgd(model.parameters()))
    engine.step(*batches()[0])
    change(model)
    with pytest.raises(mm.InputError, match="an optimizer over the model's parameters"):
        engine.step(*batches()[0])


def tied() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def shared_memory() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize("make", [tied, shared_memory])
def test_tied_parameters_are_refused(make: Callable[[], Any]) -> None:
    model = make()
    with pytest.raises(mm.InputError, match="tied"):
        BackpropEngine(model, sgd(model.parameters()))


def test_refused() -> None:
    model, (x, y) = net(), batches()[0]
    parameters = list(model.parameters())

    def refuses(message: str, optimizer: Any = None, **arguments: Any) -> None:
        with pytest.raises(mm.InputError, match=message):
            BackpropEngine(model, optimizer or sgd(parameters), **arguments)

    refuses("SGD, Adam or AdamW; got RMSprop", torch.optim.RMSprop(parameters))
    refuses("all that require a gradient", sgd(parameters[:2]))
    refuses("and no others", sgd([*parameters, nn.Parameter(torch.ones(1))]))
    refuses("differentiable", torch.optim.SGD(parameters, lr=0.1, differentiable=True))
    refuses("a compute_dtype of torch.bfloat16 for float32", compute_dtype=torch.bfloat16)
    refuses("expected a loss, one of", loss="hinge")
    refuses("max_grad_norm", max_grad_norm=-1.0)
    engine = BackpropEngine(model, sgd(parameters))
    for wrong, message in (
        (x[:, :2], r"shape \(N, 4\)"),
        (x.float(), r"\(N, 4\) and torch.float64"),
        (x[:0], "target"),
    ):
        with pytest.raises(mm.InputError, match=message):
            engine.step(wrong, y)
    with pytest.raises(mm.InputError, match="at least one row"):
        engine.step(x[:0], y[:0])
    engine.step(x, y)
    with pytest.raises(mm.InputError, match=r"an input of shape .* and torch\.float64"):
        engine.step(x.float(), y)
    with pytest.raises(mm.InputError, match="a target of shape"):
        engine.step(x, y.float())
    with pytest.raises(mm.InputError, match="batch_size"):
        engine.train_epoch(x, y, 0)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(mm.InputError, match="autocast"):
        engine.step(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    """Gradients beside autograd's in float64, on the same numbers."""
    model = net("tanh").to(dtype)
    exact = torch_twin(net("tanh"))
    exact.load_state_dict(dict(zip(exact.state_dict(), model.double().state_dict().values(), strict=True)))
    model.to(dtype)
    x, y = (tensor.to(dtype) for tensor in batches(n=64)[0])
    engine = BackpropEngine(model, sgd(model.parameters()))
    cost = engine.compute_gradients(x, y)
    quadratic(exact(x.double()), y.double()).backward()
    assert cost.dtype == dtype
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        scale = max(1.0, theirs.grad.abs().max().item())
        assert (mine.grad.double() - theirs.grad).abs().max().item() <= 4 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("name", ["sgd", "decay", "adam"])
def test_bfloat16_products_with_float32_parameters(name: str) -> None:
    """Close to float32 training, and able to add updates that bfloat16 parameters would round away."""
    ours = mm.MLP([4, 32, 3], activation="tanh", output_activation="identity")
    twin = copy.deepcopy(ours)
    make = OPTIMIZERS.get(name, sgd)
    optimizer = make(ours.parameters())
    engine = BackpropEngine(ours, optimizer, compute_dtype=torch.bfloat16)
    data = [(x.float(), y.float()) for x, y in batches(n=64)]
    costs = train_ours(engine, data, 100)
    expected = train_torch(twin, make(twin.parameters()), data, "quadratic", 100)
    assert costs.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    torch.testing.assert_close(costs, expected, rtol=0.03, atol=0.003)
    for group in optimizer.param_groups:
        group["lr"] = 1e-7
    before = ours[0].weight.clone()
    engine.step(*data[0])
    assert not torch.equal(before, ours[0].weight)


@pytest.mark.parametrize("shape", [(1, 2), (4, 1)], ids=str)
def test_a_prediction_with_one_place_for_many_numbers_is_refused(shape: tuple[int, int]) -> None:
    net, (n, outputs) = mm.MLP([3, shape[1]]), shape
    with pytest.raises(mm.InputError, match="in a place of its own"):
        BackpropEngine(net, sgd(net.parameters())).train_batches(
            torch.randn(n, 3), torch.rand(n, outputs), 1, torch.empty(1, 1).expand(n, outputs)
        )


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "softplus", "leaky_relu", "relu", "tanh"])
def test_predictions_are_kept_from_what_step_2_writes_over(name: str) -> None:
    torch.manual_seed(0)
    net = mm.MLP([3, 4, 2], activation=name, output_activation=name, dtype=double)
    input, target = torch.randn(4, 3, dtype=double), torch.rand(4, 2, dtype=double)
    expected, prediction = net(input).detach(), torch.empty(4, 2, dtype=double)
    BackpropEngine(net, sgd(net.parameters())).train_batches(input, target, 4, prediction)
    assert torch.equal(prediction, expected)


@pytest.mark.parametrize("loss", ["quadratic", "mse"])
def test_a_float16_cost_is_finite_where_the_layers_are(loss: str) -> None:
    """Its sum is 80,000, beyond the largest float16; its mean is not."""
    net = nn.Sequential(nn.Linear(1, 1)).half()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    input, target = torch.zeros(2, 1, dtype=torch.float16), torch.full((2, 1), 200.0, dtype=torch.float16)
    expected = mm.functional.COSTS[loss](net(input), target).detach()
    engine = BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.0), loss)
    for cost in (
        mm.network.network_loss(net, input, target, loss).detach(),
        engine.step(input, target),
        engine.train_batches(input, target, 1),
    ):
        assert cost.dtype == torch.float16
        assert torch.equal(cost, expected)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_rows_of_an_epoch_that_require_a_gradient_or_hold_nothing(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 2)).double()
    engine = BackpropEngine(net, OPTIMIZERS.get(name, sgd)(net.parameters()))
    input = torch.randn(5, 3, dtype=double, requires_grad=True)
    assert engine.train_epoch(input, torch.rand(5, 2, dtype=double), 2) > 0
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.Sequential(nn.Linear(0, 2)).double()
    engine = BackpropEngine(net, OPTIMIZERS.get(name, sgd)(net.parameters()))
    assert engine.train_epoch(torch.empty(5, 0, dtype=double), torch.rand(5, 2, dtype=double), 2) > 0


def test_an_interrupt_while_calls_are_bound_leaves_no_old_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mm.MLP([3, 2], dtype=double)
    optimizer = sgd(net.parameters())
    engine = BackpropEngine(net, optimizer)
    input, target = torch.randn(4, 3, dtype=double), torch.rand(4, 2, dtype=double)
    engine.step(input, target)
    optimizer.param_groups[0]["lr"] = 0.0
    before = net[0].weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr(engine_module.BoundPlan, "compile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step(input, target)
    engine.step(input, target)
    assert torch.equal(net[0].weight, before)


def test_repr_says_net_optimizer_cost_and_options() -> None:
    net = mm.MLP([4, 3, 2])
    assert repr(BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.5))) == (
        "BackpropEngine(MLP 4-3-2, SGD(lr=0.5), loss='quadratic')"
    )
    net = nn.Sequential(nn.Linear(4, 2))
    adam = torch.optim.Adam([{"params": [net[0].weight]}, {"params": [net[0].bias], "lr": 0.2}], lr=0.1)
    assert repr(BackpropEngine(net, adam, "mse", max_grad_norm=1.0)) == (
        "BackpropEngine(Sequential of 10 parameters, Adam(lr=0.1, lr=0.2), loss='mse', max_grad_norm=1.0)"
    )


def test_a_lone_layer_is_read_anew() -> None:
    """The model itself may be the layer whose activation changes, or whose slope."""
    x, y = torch.randn(5, 4), torch.rand(5, 2)
    layer = mm.AffineActivation(4, 2, "tanh")
    engine = BackpropEngine(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for name in ("tanh", "sigmoid", "relu"):
        layer.activation = name
        expected = mm.functional.quadratic_loss(layer(x), y).item()
        assert engine.step(x, y).item() == pytest.approx(expected, rel=1e-6)  # float32
