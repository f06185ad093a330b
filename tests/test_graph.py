"""Nets whose branches part and meet again: by every road the layers' bits forward, and autograd's gradients."""

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp import network
from manual_mlp.formulas import COSTS
from manual_mlp.network import LossPlan, network_loss, reading_of
from manual_mlp.plan import weigh
from manual_mlp.program import read
from manual_mlp.testing import assert_manual_backward, check_gradients, gradient_tests
from manual_mlp.tracing import one_pass

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
    return nn.Dropout(module.p) if isinstance(module, nn.Dropout) else mm.modules.activation_row(module).twin()


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
        for gradients in (gradients, one.gradients):
            summed = [torch.zeros_like(p) for p in parameters]  # a layer used twice has two gradients
            for p, gradient in zip(flat, gradients[1:], strict=True):
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
