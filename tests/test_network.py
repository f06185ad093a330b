"""Net and cost as one node: the layers' figures, first and second derivatives, transforms, memory, refusals."""

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.hooks import RemovableHandle

import manual_mlp as mm
from manual_mlp import functional as F
from manual_mlp import network
from manual_mlp.formulas import COSTS, Row
from manual_mlp.network import NetworkLoss, cost_and_prediction, network_loss, reading_of
from tests.cases import rows

double = torch.float64


@pytest.fixture(params=["at once", "in two passes"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything by gradients made in the forward pass, and again as large batches are, without buffers kept."""
    if request.param == "in two passes":
        monkeypatch.setattr(network, "_KEPT", 0)
    return str(request.param)


TOLERANCES = {"atol": 1e-8, "rtol": 1e-6}


def net(activation: Any = "sigmoid", logits: bool = False, bias: bool = True) -> nn.Module:
    """4-5-3, the activation in both layers, or in the first alone."""
    model = mm.MLP([4, 5, 3], output_activation="identity", bias=bias, dtype=double)
    for layer in model[:1] if logits else model:
        layer.activation = activation
    return model


def batch(loss: str = "quadratic", n: int = 6) -> tuple[Tensor, Tensor]:
    target = torch.rand(n, 3, dtype=double)
    return torch.randn(n, 4, dtype=double), target / target.sum(-1, keepdim=True) if loss == "cross_entropy" else target


def gradients(cost: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(cost, list(model.parameters())))


@rows
@pytest.mark.parametrize("loss", COSTS)
def test_equal_to_the_layers(row: Row, loss: str) -> None:
    model = net(row.twin(), COSTS[loss].logits)
    input, target = batch(loss)
    ours, layers = network_loss(model, input, target, loss), F.COSTS[loss](model(input), target)
    torch.testing.assert_close(ours, layers, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(ours, model), gradients(layers, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives(bias: bool) -> None:
    """By finite differences, input and parameters: a second derivative is of the same recursion, never of less."""
    model = net("tanh", bias=bias)
    input, target = batch()
    names, values = zip(*model.named_parameters(), strict=True)

    def cost(x: Tensor, *parameters: Tensor) -> Tensor:
        for name, parameter in zip(names, parameters, strict=True):
            module, attribute = name.split(".")
            model.get_submodule(module)._parameters[attribute] = parameter
        return network_loss(model, x, target)

    inputs = (input.requires_grad_(), *(value.detach().clone().requires_grad_() for value in values))
    assert gradcheck(cost, inputs, **TOLERANCES)
    assert gradgradcheck(cost, inputs, **TOLERANCES)


@rows
def test_second_derivatives_of_every_row(row: Row) -> None:
    model = net(row.twin())
    input, target = batch()

    def second(cost: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(cost, list(model.parameters()), create_graph=True)
        return gradients(sum((g.square().sum() for g in first), cost), model)

    ours = second(network_loss(model, input, target))
    for mine, theirs in zip(ours, second(F.quadratic_loss(model(input), target)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@rows
def test_batched_gradients(row: Row) -> None:
    model, (input, target) = net(row.twin()), batch()
    cost, weights = network_loss(model, input, target), list(model.parameters())
    g = torch.tensor([1.0, 2.0, -3.0], dtype=double)
    batched = torch.autograd.grad(cost, weights, g, retain_graph=True, is_grads_batched=True)
    for mine, one in zip(batched, torch.autograd.grad(cost, weights), strict=True):
        torch.testing.assert_close(mine, torch.stack([one * factor for factor in g]))


def test_one_node_for_any_optimizer_with_clipping_and_accumulation() -> None:
    ours, data = net("relu"), [batch() for _ in range(4)]
    theirs = copy.deepcopy(ours)
    first = network_loss(ours, *data[0])  # torch 2.11 lets a node go with its tensor
    node = first.grad_fn
    assert node is not None
    assert {type(of).__name__ for of, _ in node.next_functions} == {"NoneType", "AccumulateGrad"}
    for model, cost in ((ours, network_loss), (theirs, lambda model, x, y: F.quadratic_loss(model(x), y))):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for step, (input, target) in enumerate(data * 5):
            cost(model, input, target).backward()
            if step % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_scaled_retained_and_accumulated() -> None:
    model, (input, target) = net(), batch()
    once = gradients(network_loss(model, input, target), model)
    cost = network_loss(model, input, target)
    (cost * 3).backward(retain_graph=True)
    cost.backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 4)


def test_transforms_and_autocast_fall_back_to_the_layers() -> None:
    model, (input, target) = net(), batch()
    by_layers = F.quadratic_loss(model(input), target)
    jacobian = torch.func.grad(lambda x: network_loss(model, x, target))(input)
    expected = torch.func.grad(lambda x: F.quadratic_loss(model(x), target))(input)
    torch.testing.assert_close(jacobian, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network_loss(model, input, target), by_layers)
    target = target.clone().requires_grad_()
    (to_target,) = torch.autograd.grad(network_loss(model, input, target), target)
    (expected,) = torch.autograd.grad(F.quadratic_loss(model(input), target), target)
    torch.testing.assert_close(to_target, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        tangent = torch.autograd.forward_ad.unpack_dual(network_loss(model, dual, target.detach())).tangent
    torch.testing.assert_close(tangent, (expected_input(model, input, target.detach()) * torch.ones_like(input)).sum())


def expected_input(model: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    input = input.clone().requires_grad_()
    return torch.autograd.grad(network_loss(model, input, target), input)[0]


def test_only_what_is_needed() -> None:
    """A frozen bottom takes no product; a frozen top lets δ through; without any gradient there is no node."""
    model, (input, target) = net(), batch()
    model[0].requires_grad_(False)
    mine = torch.autograd.grad(network_loss(model, input, target), list(model[1].parameters()))
    theirs = torch.autograd.grad(F.quadratic_loss(model(input), target), list(model[1].parameters()))
    torch.testing.assert_close(mine, theirs)
    model.requires_grad_(False)
    assert not network_loss(model, input, target).requires_grad
    torch.testing.assert_close(
        expected_input(model, input, target),
        torch.autograd.grad(F.quadratic_loss(model(x := input.clone().requires_grad_()), target), x)[0],
    )


def test_dropout_draws_the_layers_masks() -> None:
    model = mm.MLP([4, 30, 30, 3], dropout=0.4, dtype=double)
    input, target = batch()
    torch.manual_seed(3)
    ours = network_loss(model, input, target)
    torch.manual_seed(3)
    layers = F.quadratic_loss(model(input), target)
    torch.testing.assert_close(ours, layers, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, model), gradients(layers, model), rtol=1e-12, atol=1e-12)
    model.eval()
    torch.testing.assert_close(network_loss(model, input, target), F.quadratic_loss(model(input), target))


def test_prediction_beside_the_cost() -> None:
    model, (input, target) = mm.MLP([4, 30, 3], dropout=0.4, dtype=double), batch()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.manual_seed(3)
            cost, prediction = cost_and_prediction(model, input, target, "quadratic")
            torch.manual_seed(3)
            torch.testing.assert_close(prediction, model(input).detach(), rtol=1e-12, atol=1e-12)
            assert cost.requires_grad
            assert not prediction.requires_grad


def kept(cost: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, in tensors of its own."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cost()
    return sum(sizes.values())


def test_gradients_are_new_each_time() -> None:
    """Of another batch, of a second backward, of another thread: none is in the place of one given before."""
    model, data = net(), [batch() for _ in range(8)]
    expected = [gradients(F.quadratic_loss(model(x), y), model) for x, y in data]
    costs = [network_loss(model, x, y) for x, y in data]
    ours = [torch.autograd.grad(cost, list(model.parameters()), retain_graph=True) for cost in costs]
    again = [gradients(cost, model) for cost in costs]
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(lambda of: gradients(network_loss(model, *of), model), data * 25))
    for found in (ours, again, *(threads[i : i + 8] for i in range(0, 200, 8))):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(list(mine), theirs, rtol=1e-12, atol=1e-14)
    for first, second in zip(ours, again, strict=True):
        assert all(torch.equal(one, other) and one is not other for one, other in zip(first, second, strict=True))


def test_the_prediction_stays_as_it_was() -> None:
    model, data = net(), [batch() for _ in range(2)]
    predictions = [cost_and_prediction(model, x, y, "quadratic")[1] for x, y in data]
    for (x, _), prediction in zip(data, predictions, strict=True):
        torch.testing.assert_close(prediction, model(x).detach(), rtol=1e-12, atol=1e-14)


def test_a_parameter_cut_or_turned_in_place_is_noticed() -> None:
    """`.data` leaves the parameter the same object, and a part of it the same address."""
    model, (input, target) = mm.MLP([4, 5, 5, 3], dtype=double), batch()

    def same() -> None:
        ours, layers = network_loss(model, input, target), F.quadratic_loss(model(input), target)
        torch.testing.assert_close(ours, layers, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(ours, model), gradients(layers, model), rtol=1e-12, atol=1e-12)

    same()
    model[1].weight.data = model[1].weight.data.t()
    same()
    model[0].weight.data, model[0].bias.data = model[0].weight.data[:2], model[0].bias.data[:2]
    model[1].weight.data = model[1].weight.data[:, :2]
    same()


def test_parameters_are_not_kept() -> None:
    """Neither when others take their place, nor when torch swaps or moves them; and a graph behind one is let go."""
    model, (input, target) = net(), batch()
    network_loss(model, input, target).backward()
    old = weakref.ref(model[0].weight)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    gc.collect()
    assert old() is None
    network_loss(model, input, target).backward()
    model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    behind = torch.ones(5, 4, dtype=double, requires_grad=True)
    between = behind * 2
    given, other = {"model.0.weight": between * 1.0}, weakref.ref(between)
    torch.func.functional_call(NetworkLoss(model), given, (input, target)).backward()
    del between, given
    gc.collect()
    assert other() is None


def test_a_parameter_in_another_order_at_the_same_address() -> None:
    model, (input, target), numbers = net(), batch(n=40), torch.randn(200, dtype=double)
    for weight, bias in (
        (numbers.as_strided((5, 4), (4, 2)), numbers[:5]),
        (numbers.as_strided((5, 4), (1, 20)), numbers[:10:2]),
        (torch._neg_view(numbers[:20].view(5, 4)), numbers[:5]),
    ):
        model[0].weight.data, model[0].bias.data = weight, bias
        torch.testing.assert_close(network_loss(model, input, target), F.quadratic_loss(model(input), target))


def test_a_plan_made_in_inference_mode_or_of_fake_tensors() -> None:
    model, (input, target) = net(), batch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        network_loss(model, input, target)
    cost = network_loss(model, input, target)
    assert type(cost) is Tensor
    expected = gradients(cost, model)
    cost = network_loss(model, input, target)
    gradients_of(cost, model)
    reading_of(model).plans.clear()
    with torch.inference_mode():
        again = gradients_of(cost, model)
    for mine in (again, gradients(network_loss(model, input, target), model)):
        torch.testing.assert_close(list(mine), expected)


def gradients_of(cost: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(cost, list(model.parameters()), retain_graph=True)


def test_a_parametrization_is_refused_by_name() -> None:
    model, (input, target) = net(), batch()
    network_loss(model, input, target)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(mm.InputError, match="ParametrizedAffineActivation at '0'"):
        network_loss(model, input, target)


def test_kinds_of_batches_beyond_those_kept() -> None:
    model = net()
    for _ in range(2):
        for n in range(1, 12):
            input, target = batch(n=n)
            ours, layers = network_loss(model, input, target), F.quadratic_loss(model(input), target)
            torch.testing.assert_close(gradients(ours, model), gradients(layers, model), rtol=1e-12, atol=1e-12)
    assert len(reading_of(model).plans) <= 4


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_keeps_less_than_torch(name: str) -> None:
    plain = {"silu": nn.SiLU, "gelu": nn.GELU}[name]
    model = nn.Sequential(nn.Linear(8, 64), plain(), nn.Linear(64, 64), plain(), nn.Linear(64, 2))
    input, target = torch.randn(512, 8), torch.randn(512, 2)
    ours = kept(lambda: network_loss(model, input, target, "mse"))
    theirs = kept(lambda: nn.functional.mse_loss(model(input), target))
    hidden = 512 * 64 * 4
    assert ours <= theirs - 2 * hidden + 4096  # z of both hidden layers, and not a


def test_notices_what_changes() -> None:
    """Another layer, another slope, a parameter replaced: the next call is of the model as it is."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 3)).double()
    input, target = batch()

    def same() -> None:
        torch.testing.assert_close(network_loss(model, input, target), F.quadratic_loss(model(input), target))

    same()
    model[1].negative_slope = 0.5
    same()
    model[1] = nn.Tanh()
    same()
    model[2].weight = nn.Parameter(torch.ones(3, 5, dtype=double))
    same()
    model.append(nn.Sigmoid())
    same()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(mm.InputError, match="without hooks"):
        network_loss(model, input, target)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_is_noticed_whenever_it_comes(kind: str) -> None:
    """After hooks of other modules too; and its removal."""
    model, (input, target) = net(), batch()
    engine = mm.BackpropEngine(model, torch.optim.SGD(model.parameters()))

    def train() -> None:
        network_loss(model, input, target)
        engine.step(input, target)

    def hook(module: nn.Module) -> RemovableHandle:
        return getattr(module, f"register_{kind}_hook")(lambda *_: None)  # type: ignore[no-any-return]

    train()
    hook(nn.Linear(1, 1))
    train()
    handle = hook(model[1])
    for function in (engine.step, partial(network_loss, model)):
        for _ in range(2):
            with pytest.raises(mm.InputError, match="without hooks"):
                function(input, target)
    handle.remove()
    train()


def test_a_layer_moved_or_added_within_nested_sequentials_is_noticed() -> None:
    """Also where all children, one after another, stay the same; and to a Sequential that was empty."""
    inner = nn.Sequential(nn.Linear(5, 5))
    model = nn.Sequential(inner, nn.Linear(5, 5)).double()
    engine = mm.BackpropEngine(model, torch.optim.SGD(model.parameters(), lr=0.0))
    input, target = torch.randn(4, 5, dtype=double), torch.rand(4, 5, dtype=double)

    def same() -> None:
        expected = F.quadratic_loss(model(input), target)
        torch.testing.assert_close(network_loss(model, input, target), expected)
        torch.testing.assert_close(engine.step(input, target), expected.detach())

    same()
    inner.insert(0, model.pop(1))
    same()
    inner.insert(1, nn.Tanh())
    same()
    empty = nn.Sequential()
    model.append(empty)
    same()
    empty.append(nn.Tanh())
    same()


def test_a_batch_checked_once_is_checked_again_when_something_else_comes() -> None:
    """First under inference mode, as in a validation, then a second derivative; then nothing that is not the same."""
    model, (input, target) = net(), batch()
    with torch.inference_mode():
        expected = network_loss(model, input, target)
    (first,) = torch.autograd.grad(network_loss(model, input, target), model[0].weight, create_graph=True)
    first.square().sum().backward()
    torch.testing.assert_close(network_loss(model, input, target), expected)
    for other in (batch(n=2), batch()):
        torch.testing.assert_close(network_loss(model, *other), F.quadratic_loss(model(other[0]), other[1]))
    model.float()
    with pytest.raises(mm.InputError, match=r"expected an input of shape .* and torch\.float32"):
        network_loss(model, input, target)
    model.double()
    model[1].weight = nn.Parameter(torch.ones(1, 5, dtype=double))
    model[1].bias = nn.Parameter(torch.ones(1, dtype=double))
    with pytest.raises(mm.InputError, match=r"a target of shape \(6, 1\)"):
        network_loss(model, input, target)


@pytest.mark.parametrize("loss", COSTS)
def test_the_mean_of_nothing_is_no_number(loss: str) -> None:
    model, nothing = net(logits=True), batch(loss, n=0)
    cost = network_loss(model, *nothing, loss)
    torch.testing.assert_close(cost, F.COSTS[loss](model(nothing[0]), nothing[1]), equal_nan=True)
    assert cost.isnan()
    assert not any(gradient.any() for gradient in gradients(cost, model))  # nothing adds to 0


def test_a_model_is_not_kept_alive() -> None:
    model, (input, target) = net(), batch()
    network_loss(model, input, target)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_parameter_changed_in_between_is_refused() -> None:
    model, (input, target) = net(), batch()
    cost = network_loss(model, input, target)
    with torch.no_grad():
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cost.backward()


def test_module_and_converted_models() -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Sequential(nn.Dropout(0.0), nn.Identity(), nn.Linear(5, 3)))
    input, target = (tensor.float() for tensor in batch())
    expected = F.quadratic_loss(plain(input), target)
    torch.testing.assert_close(NetworkLoss(plain)(input, target), expected)
    torch.testing.assert_close(NetworkLoss(mm.convert(plain))(input, target), expected)
    assert [layer.row.name for layer in reading_of(plain).program.layers.values()] == ["sigmoid", "identity"]
    lone = nn.Linear(4, 3)
    torch.testing.assert_close(network_loss(lone, input, target), F.quadratic_loss(lone(input), target))
    assert reading_of(lone).program.layers[2].affine is lone


class Own(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "empty": (nn.Sequential, "at least one affine layer"),
    "other": (lambda: nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3)), "got GroupNorm at '1'"),
    "activation first": (lambda: nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3)), "got Sigmoid at '0'"),
    "two activations": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Tanh()), "got Tanh at '2'"),
    "dropout first": (lambda: nn.Sequential(nn.Dropout(), nn.Linear(4, 3)), "got Dropout at '0'"),
    "sizes": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), "in_features=3 at '1'"),
    "own forward": (lambda: Own(nn.Linear(4, 3)), "has its own"),
    "no sequence": (lambda: nn.Conv1d(1, 1, 1), "got Conv1d at 'the model itself'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(mm.InputError, match=message):
        NetworkLoss(make())


def test_refused_losses_and_batches() -> None:
    model, (input, target) = net(logits=True), batch()
    labels = torch.tensor([0, 1, 2, 3, 0, -1])
    with pytest.raises(mm.InputError, match="class labels from 0 to 2; got labels from -1 to 3"):
        network_loss(model, input, labels, "cross_entropy")
    model = net()
    for loss, message in (("hinge", "expected a loss, one of"), ("bce", "gives logits")):
        with pytest.raises(mm.InputError, match=message):
            network_loss(model, input, target, loss)
    for wrong, right, message in (
        (input[:, :3], target, r"an input of shape \(N, 4\)"),
        (input.float(), target, "an input of shape .* and torch.float64"),
        (input, target[:, :1], r"a target of shape \(6, 3\)"),
        (input, target.float(), r"\(6, 3\) and torch.float64"),
    ):
        with pytest.raises(mm.InputError, match=message):
            network_loss(model, wrong, right)


def test_dropout_of_everything_draws_nothing() -> None:
    """Like torch's, so that the masks after it are the same."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(1.0), nn.Linear(8, 8), nn.Dropout(0.5)).double()
    x, target = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 8, dtype=torch.float64)
    costs = []
    for cost in (
        lambda: mm.functional.quadratic_loss(net(x), target),
        lambda: network_loss(net, x, target),
        lambda: mm.functional.quadratic_loss(mm.convert(copy.deepcopy(net))(x), target),
        lambda: mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.0)).step(x, target),
    ):
        torch.manual_seed(0)
        costs.append(cost().detach())
    for cost in costs:
        torch.testing.assert_close(cost, costs[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("kept", ["engine", "itself"])
def test_a_model_that_holds_itself_is_collected(kept: str) -> None:
    net = mm.MLP([2, 3, 1])
    network_loss(net, torch.randn(4, 2), torch.rand(4, 1)).backward()
    net.kept = (  # type: ignore[assignment]
        mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.1)) if kept == "engine" else [net]
    )
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


def test_a_dropout_whose_p_is_no_probability() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[1].p = -0.1
    with pytest.raises(mm.InputError, match="dropout probability"):
        network_loss(net, torch.randn(5, 3), torch.rand(5, 2))
    with pytest.raises(mm.InputError, match="dropout probability"):
        mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.1)).step(torch.randn(5, 3), torch.rand(5, 2))


def test_logits_behind_an_activation_and_a_dropout_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid(), nn.Dropout(0.5))
    with pytest.raises(mm.InputError, match="ends in sigmoid"):
        network_loss(net, torch.randn(5, 3), torch.rand(5, 2), "bce")
