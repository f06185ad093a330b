"""Nets whose branches part and meet again: by every road the layers' bits forward, and autograd's gradients."""

import copy
import pickle
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp import network
from manual_mlp.formulas import COSTS
from manual_mlp.network import LossPlan, network_loss
from manual_mlp.plan import weigh
from manual_mlp.program import read
from manual_mlp.testing import assert_manual_backward, check_gradients, gradient_tests
from manual_mlp.tracing import one_pass
from manual_mlp.training.module import MLPModule

double = torch.float64
ACTIVATIONS = [mm.Sigmoid, mm.Tanh, mm.ReLU, mm.LeakyReLU, mm.Softplus, mm.SiLU, mm.GELU]


class Branches(nn.Module):
    """The twin of mm.Sum in plain torch."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *more = (branch(x) for branch in self.branches)
        return sum(more, first)


def twin(module: nn.Module) -> nn.Module:
    """Return the same net in torch's own layers, on the same parameters."""
    if isinstance(module, mm.Sum):
        return Branches(*map(twin, module))
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*map(twin, module))
    if isinstance(module, mm.AffineActivation | nn.Linear):
        linear = nn.Linear(1, 1)
        linear.weight, linear.bias = module.weight, module.bias  # type: ignore[assignment]
        return nn.Sequential(linear, module.row.twin()) if isinstance(module, mm.AffineActivation) else linear
    if isinstance(module, nn.Dropout):
        return nn.Dropout(module.p).train(module.training)
    return mm.modules.activation_row(module).twin()


class Draw:
    """Random nets: Sums of identities, layers, chains and Sums, chains that begin with an activation, x + x."""

    def __init__(self, seed: int, tied: bool = True) -> None:
        torch.manual_seed(seed)
        self.pick = random.Random(seed)
        # Half of the nets get a plan in network_loss: those whose activations all save a.
        self.activations, self.tied = ACTIVATIONS[: self.pick.choice([5, 7])], tied

    def activation(self) -> nn.Module:
        return self.pick.choice(self.activations)()

    def layer(self, n: int, m: int) -> list[nn.Module]:
        bias = self.pick.random() < 0.8
        if self.pick.random() < 0.3:
            return [mm.AffineActivation(n, m, self.activation(), bias=bias, dtype=double)]
        affine = self.pick.choice([mm.Affine, nn.Linear])(n, m, bias=bias, dtype=double)
        return [affine, self.activation()] if self.pick.random() < 0.6 else [affine]

    def branch(self, n: int, m: int, depth: int) -> nn.Module:
        kinds = ["layer", "chain", "chain"] + ["sum"] * (depth > 0)
        kind = self.pick.choice(kinds + ["identity", "empty", "activation"] * (n == m))
        if kind in ("identity", "empty"):
            return mm.Identity() if kind == "identity" else nn.Sequential()
        if kind == "activation":
            return self.activation()
        return self.sum(n, m, depth - 1) if kind == "sum" else self.chain(n, m, depth if kind == "chain" else 0)

    def sum(self, n: int, m: int, depth: int) -> mm.Sum:
        branches = [self.branch(n, m, depth) for _ in range(self.pick.choice([1, 2, 2, 2, 3]))]
        return mm.Sum(*branches, *branches[: self.tied and self.pick.random() < 0.2])

    def chain(self, n: int, m: int, depth: int, begins: bool = False) -> nn.Sequential:
        layers = [self.activation()] if not begins and self.pick.random() < 0.3 else []
        for _ in range(self.pick.choice([0, 1, 1])):
            layers += self.layer(n, n := self.pick.choice([m, 5, 8]))
            if depth > 0:
                layers.append(joined := self.sum(n, n, depth - 1))
                layers += [self.activation()] if len(joined) > 1 and self.pick.random() < 0.5 else []
        return nn.Sequential(*layers, *self.layer(n, m))

    def net(self) -> nn.Module:
        chain = self.chain(4, 3, 2, begins=True)
        return mm.Sum(chain, self.branch(4, 3, 1)) if self.pick.random() < 0.3 else chain


def assert_close(ours: Any, theirs: Any, of: object) -> None:
    """A relative 1e-13 of each tensor, because a neuron's own δ may be a small difference of large terms."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm(), of


def check_roads(seed: int) -> None:
    draw = Draw(seed)
    net, n = draw.net(), draw.pick.choice([7, 40])  # narrow layers of 32 rows and more lie column by column
    plain, parameters = twin(net), list(net.parameters())
    x, target = torch.randn(n, 4, dtype=double, requires_grad=True), torch.randn(n, 3, dtype=double)
    y = plain(x)
    cost = (y - target).square().sum() / (2 * n)
    expected = torch.autograd.grad(cost, [x, *parameters])

    ours = net(x)
    assert torch.equal(ours, y), net
    assert_close(torch.autograd.grad(mm.QuadraticLoss()(ours, target), [x, *parameters]), expected, net)
    for kept in (network._KEPT, 0):  # with a plan, and without
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "_KEPT", kept)
            c, prediction = network.cost_and_prediction(net, x, target, "quadratic")
        assert n == 40 or torch.equal(prediction, y), net
        assert_close(torch.autograd.grad(c, [x, *parameters]), expected, net)
    program = read(net)
    flat, at = program.parameters(), {id(p): i for i, p in enumerate(parameters)}
    one = one_pass(program, x.detach(), target, "quadratic")
    assert torch.equal(one.slots[-1], y), net
    plan = LossPlan(program, [x, *flat], weigh(COSTS["quadratic"], n, 3, double), [p is not None for p in (x, *flat)])
    for _ in range(2):  # the second run finds the buffers as the first one left them
        with torch.no_grad():
            _, gradients = plan.gradients([x, *flat], target, None)
        for of_each in (gradients, one.gradients):
            summed = [torch.zeros_like(p) for p in parameters]  # a layer used twice has two gradients
            for p, gradient in zip(flat, of_each[1:], strict=True):
                if p is not None:
                    summed[at[id(p)]] += gradient
            assert_close(summed, expected[1:], net)


@pytest.mark.parametrize("seed", range(40))
def test_random_nets_by_every_road(seed: int) -> None:
    check_roads(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(40, 540, 50))
def test_500_random_nets_by_every_road(first: int) -> None:
    for seed in range(first, first + 50):
        check_roads(seed)


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------


def nested() -> mm.Sum:
    torch.manual_seed(0)
    inner = mm.Residual(mm.Tanh(), mm.Affine(3, 3, dtype=double))
    return mm.Sum(mm.Identity(), nn.Sequential(inner, mm.Sigmoid()), nn.Sequential(), mm.Affine(3, 3, dtype=double))


def rows() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=double),)


def test_sum_by_the_battery() -> None:
    """All that torch's own layers support."""
    assert not (report := check_gradients(nested(), rows(), twin(nested()), compile=True)).failed, str(report)


test_residual_by_the_battery = gradient_tests(mm.Residual(mm.Affine(3, 3, dtype=double), mm.Tanh()), rows)


def test_only_our_backward_is_in_the_graph() -> None:
    assert_manual_backward(nested(), rows()[0].requires_grad_())


def test_children_and_printing_are_those_of_a_module_list() -> None:
    block = mm.Residual(mm.Affine(3, 5), mm.Tanh(), mm.Affine(5, 3))
    listed = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))])
    assert block.state_dict().keys() == listed.state_dict().keys() == {*listed.state_dict()}
    assert repr(block).replace("Affine", "Linear") == repr(listed).replace("ModuleList", "Residual")
    assert type(block[1:]) is mm.Sum
    assert block[1:][0] is block[1]
    assert len(block) == 2
    x = torch.randn(2, 3)
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(again(x), block(x))
    block.append(mm.Identity())
    assert torch.equal(block(x), x + listed[1].requires_grad_(False)(x) * 0 + (block[1](x)) + x)


def test_one_branch_and_an_empty_chain_are_the_identity() -> None:
    x = torch.randn(2, 3)
    assert mm.Sum(mm.Identity())(x) is x
    assert mm.Sum(nn.Sequential())(x) is x
    doubled = x.clone().requires_grad_()
    mm.Sum(mm.Identity(), mm.Identity())(doubled).sum().backward()
    assert torch.equal(doubled.grad, torch.full_like(x, 2))


def test_a_single_layer_is_passed_through() -> None:
    assert [type(node.rule).__name__ for node in read(mm.Sum(mm.Affine(3, 3))).nodes] == ["Affine"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: mm.Sum(), r"one or more modules as branches, such as mm.Sum\(a, b\); got none"),
        (lambda: mm.Sum([mm.Identity()]), "as branches, .*; got list"),
        (lambda: mm.Residual(mm.Affine(3, 1))(torch.rand(2, 3)), r"one shape; got \(2, 3\) and \(2, 1\): an identity"),
        (lambda: mm.Sum(mm.Identity(), mm.Identity())(2), "torch.Tensor as term 0; got int"),
        (lambda: read(mm.Residual(mm.Affine(3, 1))), "one width in the Sum at 'the model itself'; got 3 and 1: an"),
        (lambda: read(nn.Sequential(mm.Affine(3, 4), mm.Sum(mm.Affine(4, 2), mm.Affine(4, 5)))), "at '1'; got 2 and 5"),
        (lambda: read(mm.Sum(mm.Affine(3, 4), mm.Affine(5, 4))), "in_features=3 at '1', as .*5"),
        (lambda: read(nn.Sequential(mm.Affine(3, 4), mm.Residual(mm.Affine(3, 4)))), "in_features=4 at '1.1.0', .*3"),
        (lambda: read(mm.Sum(mm.Identity(), mm.Tanh())), "at least one affine layer"),
        (lambda: read(nn.Sequential(mm.Affine(3, 3), mm.Residual(nn.Softmax(1)))), "got Softmax at '1.1.0'"),
        (lambda: read(nn.Sequential(mm.Affine(3, 3), mm.Residual(mm.Tanh(), mm.Tanh()))), "got Tanh at '1.1.1'"),
    ],
)  # fmt: skip
def test_refusals(make: Any, sentence: str) -> None:
    with pytest.raises(mm.InputError, match=sentence):
        make()


def test_a_sum_that_has_lost_its_branches_is_refused() -> None:
    net = nn.Sequential(mm.Affine(3, 3), mm.Sum(mm.Identity()))
    network_loss(net, torch.rand(2, 3), torch.rand(2, 3))
    del net[1][0]
    for call in (lambda: net(torch.rand(2, 3)), lambda: network_loss(net, torch.rand(2, 3), torch.rand(2, 3))):
        with pytest.raises(mm.InputError, match="got none: a"):
            call()


def test_under_autocast_the_sum_has_the_dtype_that_torch_gives_it() -> None:
    block, x = mm.Residual(mm.Affine(3, 3)), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = block(x), twin(block)(x)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    (a,), (b,) = (torch.autograd.grad(y.sum(), x) for y in (ours, theirs))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# The whole net: engine, plans, frozen layers, what changes inside a branch
# ---------------------------------------------------------------------------------------------------------------------


def blocks(**options: Any) -> nn.Sequential:
    """A relu beside an identity, an activation at a branch's start, a Sum in a Sum, a sum as the last layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.Tanh(), mm.Residual(nn.Linear(6, 6), mm.ReLU())),
        mm.Residual(mm.Tanh(), nn.Linear(6, 8), mm.Residual(mm.Sigmoid(), nn.Linear(8, 8)), mm.ReLU(), nn.Linear(8, 6)),
        *(mm.ReLU(), mm.Sum(nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 5), mm.SiLU(), nn.Linear(5, 3)))),
    ).to(double)  # fmt: skip


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(n, m, generator=generator, dtype=double) for m in (4, 3))  # type: ignore[return-value]


@pytest.mark.parametrize("n", [12, 40])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_100_steps_of_the_engine_are_autograds(optimizer: Any, n: int) -> None:
    ours, theirs = blocks(), blocks()
    plain = twin(theirs)
    engine, theirs_optimizer = mm.BackpropEngine(ours, optimizer(ours.parameters())), optimizer(theirs.parameters())
    x, target = batch(n)
    for _ in range(100):
        cost = engine.step(x, target)
        theirs_optimizer.zero_grad()
        expected = (plain(x) - target).square().sum() / (2 * n)
        expected.backward()
        theirs_optimizer.step()
        torch.testing.assert_close(cost, expected.detach(), rtol=1e-12, atol=0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_an_epoch_of_the_engine_takes_the_same_steps() -> None:
    ours, theirs = blocks(), blocks()
    engines = [mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.05)) for net in (ours, theirs)]
    x, target = batch(40)
    engines[0].train_batches(x, target, 16)
    for start in (0, 16, 32):
        engines[1].step(x[start : start + 16], target[start : start + 16])
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def gradients_of(net: nn.Module, x: Tensor, target: Tensor) -> list[Any]:
    """Return .grad of every parameter by network_loss, after comparing it with the engine's and autograd's."""
    found = []
    for by in ("autograd", "network", "engine"):
        net.zero_grad()
        if by == "engine":
            trained = [p for p in net.parameters() if p.requires_grad]
            mm.BackpropEngine(net, torch.optim.SGD(trained, lr=0.1)).compute_gradients(x, target)
        else:
            cost = network_loss(net, x, target) if by == "network" else mm.QuadraticLoss()(twin(net)(x), target)
            cost.backward()
        found.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    for ours in found[1:]:
        for a, b in zip(ours, found[0], strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 1e-13 * b.norm()
    return found[0]


@pytest.mark.parametrize("frozen", [["0"], ["0", "2", "3.1.1"], ["3"], ["3.1.4", "5.0"], ["0", "2", "3", "5.1"]])
def test_frozen_layers(frozen: list[str]) -> None:
    """The recursion ends at the lowest layer that is trained, which may lie inside a branch."""
    net = blocks()
    for name in frozen:
        net.get_submodule(name).requires_grad_(False)
    assert sum(gradient is None for gradient in gradients_of(net, *batch())) > 1


def test_dropout_belongs_to_its_branch() -> None:
    net = nn.Sequential(nn.Linear(4, 6), mm.Residual(nn.Linear(6, 6), mm.Tanh(), mm.Dropout(0.5)), nn.Linear(6, 3))
    net.insert(1, mm.Residual(mm.Dropout(0.4), nn.Linear(6, 6)))
    net.to(double)
    x, target = batch()
    costs, gradients = [], []
    for by in ("network", "twin", "engine"):
        torch.manual_seed(1)  # all of them draw the same masks
        if by == "engine":
            engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.1))
            costs.append(engine.compute_gradients(x, target))
            gradients.append([p.grad for p in net.parameters()])
        else:
            cost = network_loss(net, x, target) if by == "network" else mm.QuadraticLoss()(net(x), target)
            gradients.append(torch.autograd.grad(cost, list(net.parameters())))
            costs.append(cost.detach())
    for cost, of_all in zip(costs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(cost, costs[0], rtol=1e-13, atol=0)
        assert_close(of_all, gradients[0], by)
    net.eval()
    gradients_of(net, x, target)  # one that draws nothing hands its slot on


def test_changes_inside_a_branch_are_seen() -> None:
    net, (x, target) = blocks(), batch()
    engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.0))
    engine.step(x, target)
    hook = net[2][1][0].register_forward_hook(lambda *_: None)
    for call in (lambda: network_loss(net, x, target), lambda: engine.step(x, target)):
        with pytest.raises(mm.InputError, match=r"hooks.*'2\.1\.0'"):
            call()
    hook.remove()
    net[2].forward = lambda x: x
    with pytest.raises(mm.InputError, match=r"forward.*'2' has its own"):
        network_loss(net, x, target)
    del net[2].forward
    net[2].append(mm.Identity())
    torch.testing.assert_close(engine.step(x, target), mm.QuadraticLoss()(net(x), target).detach(), rtol=1e-13, atol=0)
    net[2][1][1] = mm.Sigmoid()
    gradients_of(net, x, target)


def test_a_layer_used_twice() -> None:
    layer, (x, target) = mm.Affine(4, 4, dtype=double), batch()
    net = nn.Sequential(layer, mm.Residual(layer, mm.Tanh()), mm.Affine(4, 3, dtype=double))
    cost = network_loss(net, x, target)
    ours = torch.autograd.grad(cost, list(net.parameters()))
    theirs = torch.autograd.grad(mm.QuadraticLoss()(twin(net)(x), target), list(net.parameters()))
    assert_close(ours, theirs, net)
    with pytest.raises(mm.InputError, match="got tied ones"):
        mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(mm.InputError, match=r"'0\.weight' twice, a tied one"):
        mm.trace(net, x, target)


@pytest.mark.parametrize("loss", COSTS)
def test_every_cost_after_a_sum(loss: str) -> None:
    net, (x, target) = blocks(), batch()
    target = target.softmax(1)
    ours = torch.autograd.grad(network_loss(net, x, target, loss), list(net.parameters()))
    theirs = torch.autograd.grad(mm.functional.COSTS[loss](twin(net)(x), target), list(net.parameters()))
    assert_close(ours, theirs, net)


def test_second_derivatives_through_a_whole_net() -> None:
    net, (x, target) = blocks(), batch()
    x.requires_grad_()
    second = []
    for cost in (network_loss(net, x, target), mm.QuadraticLoss()(twin(net)(x), target)):
        (first,) = torch.autograd.grad(cost, x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), list(net.parameters()), allow_unused=True))
    assert_close(*([g for g in of if g is not None] for of in second), net)


def test_by_columns_and_by_rows_meet() -> None:
    """Ten outputs of 40 rows lie column by column; the input beside them lies row by row."""
    torch.manual_seed(0)
    net = nn.Sequential(mm.Residual(nn.Linear(10, 10), mm.Tanh()), mm.Residual(mm.ReLU(), nn.Linear(10, 10))).to(double)
    x, target = torch.randn(2, 40, 10, dtype=double)
    gradients_of(net, x, target)


def test_many_nets_at_once() -> None:
    alone = [blocks() for _ in range(3)]
    for net in alone:
        for parameter in net.parameters():
            nn.init.normal_(parameter, 0, 0.3)
    together = copy.deepcopy(alone)
    x, target = batch(24)
    ensemble = mm.EnsembleEngine(together, [torch.optim.SGD(net.parameters(), lr=0.05) for net in together])
    ensemble.train_epoch(x, target, 8, [torch.Generator().manual_seed(k) for k in range(3)])
    for k, net in enumerate(alone):
        engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.05))
        engine.train_epoch(x, target, 8, torch.Generator().manual_seed(k))
        for a, b in zip(net.parameters(), together[k].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# MLP(residual=True), conversion, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_a_residual_mlp_is_made_of_residual_blocks() -> None:
    net = mm.MLP([4, 6, 6, 6, 3], ["tanh", "relu", "silu"], "identity", dropout=0.2, residual=True).eval()
    first, _, second, third, last = net.children()
    assert [type(block) for block in (second, third)] == [mm.Residual] * 2
    assert [second[1][0].activation, third[1][0].activation] == ["relu", "silu"]
    x = torch.randn(5, 4)
    a = first(x)
    a = a + second[1][0](a)
    assert torch.equal(net(x), last(a + third[1][0](a)))
    assert {*net.state_dict()} == {f"{key}.{of}" for key in ("0", "2.1.0", "4.1.0", "6") for of in ("weight", "bias")}


def test_a_residual_mlp_in_torchs_layers() -> None:
    net, x = mm.MLP([4, 6, 6, 6, 3], "tanh", dropout=0.5, residual=True), torch.randn(50, 4, requires_grad=True)
    theirs = net.to_torch()
    assert not any(type(module).__module__.startswith("manual_mlp") for module in theirs.modules())
    assert [*theirs.state_dict()] == [*net.state_dict()]
    assert all(a is b for a, b in zip(net.parameters(), theirs.parameters(), strict=True))
    gradients = []
    for model in (net, theirs, pickle.loads(pickle.dumps(theirs))):
        torch.manual_seed(0)
        y = model(x)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    for ours, torchs, again in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs)
        assert torch.equal(torchs, again)
    with pytest.raises(AssertionError, match="AddBackward0"):
        assert_manual_backward(theirs, x)


@pytest.mark.parametrize("sizes", [[4, 6, 3], [4, 6, 5, 3], [4, 3]])
def test_hidden_layers_that_cant_be_added(sizes: list[int]) -> None:
    for make in (lambda: mm.MLP(sizes, residual=True), lambda: MLPModule(4, 3, hidden=sizes[1:-1], residual=True)):
        with pytest.raises(mm.InputError, match=re.escape(f"residual=True; got {sizes[1:-1]}: a layer can only")):
            make()


def test_convert_and_revert_reach_into_branches() -> None:
    torch.manual_seed(0)
    joined = mm.Sum(nn.Linear(6, 3), nn.Linear(6, 3))
    net = nn.Sequential(nn.Linear(4, 6), mm.Residual(nn.Linear(6, 6), nn.Tanh()), joined)
    x = torch.randn(5, 4)
    kinds, y = [*map(type, net.modules())], net(x)
    mm.convert(net)
    assert torch.equal(net(x), y)
    assert_manual_backward(net, x)
    assert mm.left_alone(net) == {}
    rules = " ".join(type(node.rule).__name__ for node in read(net).nodes)
    assert rules == "Affine Affine Activate Add Affine Affine Add"
    assert [*map(type, mm.revert(net).modules())] == kinds


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def test_trace_names_each_consumers_term() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(mm.Affine(2, 3), mm.Tanh(), mm.Residual(mm.Affine(3, 3), mm.Sigmoid()), mm.Affine(3, 1))
    text = str(mm.trace(net, [[1.0, 2.0]], [[0.5]]))
    assert re.search(r"\n  l  from   rule .*\n  1   .*\n  2  1 .*\n  3  2 .*\n  4  2 \+ 3  sum .*\n  5  4 ", text)
    for line in ("a⁴ = a² + a³ = [", "z⁵ = a⁴ (W⁴)ᵀ + b⁴ =", "g⁴ = (δ⁵ W⁴) = [", "δ³ = g⁴ ⊙ sigmoid′(z³) ="):
        assert f"   {line}" in text
    assert "   δ² = (δ³ W² + g⁴) ⊙ tanh′(z²) = [" in text
    assert "W³" not in text


def test_trace_of_numbers_puts_them_into_the_sums() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(mm.Affine(1, 1), mm.Residual(mm.Tanh(), mm.Affine(1, 1)), mm.Sum(mm.Identity(), mm.Identity()))
    of = mm.trace(net, [1.0], [0.5])
    text, g = str(of), f"{of.delta[6].item():.5g}"
    assert f"z³ = a² = {of.a[2].item():.5g}\n" in text  # a branch that begins with an activation has a layer for it
    assert f"g⁵ = (g⁶ + g⁶) = (({g}) + ({g})) = {of.delta[5].item():.5g}" in text
    assert "δ² = (δ³ + g⁵) = (" in text
    assert of.to_dict()["reads"] == {2: (1,), 3: (2,), 4: (3,), 5: (2, 4), 6: (5, 5)}


def test_traced_numbers_are_autograds() -> None:
    net, (x, target) = blocks(), batch()
    of = mm.trace(net, x, target)
    expected = gradients_of(net, x, target)
    gradients = [g for layer in of.weight for g in (of.grad_weight[layer], of.grad_bias[layer])]
    assert_close(gradients, expected, net)
    for layer, reads in of.reads.items():
        if layer - 1 not in of.weight:
            assert torch.equal(of.z[layer], sum((of.a[read] for read in reads[1:]), of.a[reads[0]]))


def test_trace_of_a_branch_without_weights() -> None:
    """Its activation reads the input itself, so no parameter lies upstream of its δ."""
    net = mm.Sum(mm.Tanh(), mm.Affine(2, 2)).double()
    x, target = torch.randn(3, 2, dtype=double), torch.rand(3, 2, dtype=double)
    trace = mm.trace(net, x, target)
    layer = next(index for index, activation in trace.activation.items() if activation == "tanh")
    expected = (net(x) - target) / 3 * (1 - x.tanh() ** 2)
    torch.testing.assert_close(trace.delta[layer], expected, rtol=1e-12, atol=1e-12)


def test_pictures_draw_the_lines_of_a_sum() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(mm.Affine(2, 3), mm.Tanh(), mm.Residual(mm.Affine(3, 3), mm.Sigmoid()), mm.Affine(3, 1))
    traced = mm.trace(net, [[1.0, 2.0]], [[0.5]])
    (axes,) = mm.plots.network(traced).axes
    grey, coloured = axes.collections[:4], axes.collections[4:7]
    assert [len(lines.get_paths()) for lines in grey] == [6, 9, 6, 3]
    assert [len(lines.get_paths()) for lines in coloured] == [6, 9, 3]
    skip = grey[2].get_segments()[0]  # from neuron 1 of layer 2 over layer 3 to layer 4, half a neuron's distance up
    assert (*skip[0], *skip[-1]) == (2, 1, 4, 1)
    assert skip[:, 1].max() == 1.5
    titles = [axes.get_title() for axes in mm.plots.flow(traced).axes]
    assert "forward: $z^4 = a^2 + a^3$, $a^4 = G(z^4)$" in titles
    assert r"backward: $\delta^2 = ((W^2)^T \delta^3 + \delta^4) \odot G'(z^2)$" in titles
    assert "forward: $z^5 = W^4 a^4 + b^4$, $a^5 = G(z^5)$" in titles
