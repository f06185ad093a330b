"""mm.pretrain: CD-1 beside the gradient of the free energy and the exact likelihood; a deep sigmoid net that learns."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import manual_mlp as mm
from manual_mlp import formulas as sheet
from tests import deep_sigmoid

double = torch.float64


def machine(n: int, n_in: int = 4, n_out: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return v, W, b, c."""
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(n, n_in, generator=generator, dtype=double)
    parameters = [torch.randn(shape, generator=generator, dtype=double) for shape in ((n_out, n_in), (n_out,), (n_in,))]
    return v, *parameters


def free_energy(v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """F(v) = −v c − Σ softplus(v Wᵀ + b): P(v) is proportional to e^−F."""
    return -v @ c - F.softplus(F.linear(v, W, b)).sum(-1)


def test_the_step_is_the_gradient_of_the_free_energy() -> None:
    """ΔW = −∂/∂W mean(F(v) − F(v₁)) with v₁ held, and Δb, Δc alike."""
    v, *parameters = machine(11)
    drawn = torch.rand(11, 3, dtype=double)
    *steps, v_1 = sheet.contrastive_divergence(v, *parameters, drawn)
    leaves = [parameter.requires_grad_() for parameter in parameters]
    difference = (free_energy(v, *leaves) - free_energy(v_1.detach(), *leaves)).mean()
    for step, gradient in zip(steps, torch.autograd.grad(difference, leaves), strict=True):
        torch.testing.assert_close(step, -gradient, rtol=0, atol=1e-15)


def test_against_the_likelihood_by_enumeration() -> None:
    """All 16 images of 4 pixels: the exact gradient of log P, which CD-1 approximates and a long chain reaches."""
    W, b, c = (own / 2 for own in machine(1)[1:])
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=double)
    generator = torch.Generator().manual_seed(0)
    data = every[torch.tensor([3, 3, 5, 9, 12, 14])]
    P = (-free_energy(every, W, b, c)).softmax(0)

    def statistics(v: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("n,nj,ni->ji", weights, sheet.sigmoid(F.linear(v, W, b)), v)

    exact = statistics(data, torch.full((6,), 1 / 6, dtype=double)) - statistics(every, P)
    v = data.repeat(40_000, 1)
    by_one, *_, v_1 = sheet.contrastive_divergence(v, W, b, c, torch.rand(len(v), 3, generator=generator, dtype=double))

    def error(step: Tensor) -> float:
        return ((step - exact).norm() / exact.norm()).item()

    assert 0.05 < error(by_one) < 0.5  # the data are far from what the machine believes
    assert F.cosine_similarity(by_one.flatten(), exact.flatten(), 0) > 0.9
    up, chain = sheet.sigmoid(F.linear(v, W, b)), v_1
    for _ in range(30):  # Gibbs sampling: v₁ as pixels, drawn
        chain = (torch.rand(chain.shape, generator=generator, dtype=double) < chain).double()
        drawn = torch.rand(len(v), 3, generator=generator, dtype=double)
        *_, chain = sheet.contrastive_divergence(chain, W, b, c, drawn)
    chain = (torch.rand(chain.shape, generator=generator, dtype=double) < chain).double()
    long = (up.t() @ v - sheet.sigmoid(F.linear(chain, W, b)).t() @ chain) / len(v)
    assert error(long) < 0.02  # of 240,000 chains


def test_one_epoch_by_hand() -> None:
    """The loop: momentum, decay, start and draws, and what the second layer sees."""
    x = torch.rand(7, 4, dtype=double)
    net = mm.MLP([4, 3, 5, 2], dtype=double)
    last = copy.deepcopy(net[-1].state_dict())
    errors = mm.pretrain(net, x, epochs=6, lr=0.1, batch_size=3, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for layer, n_in, n_out, row in ((net[0], 4, 3, errors[0]), (net[1], 3, 5, errors[1])):
        W = torch.empty(n_out, n_in, dtype=double).normal_(0, 0.01, generator=generator)
        b, c = torch.zeros(n_out, dtype=double), torch.zeros(n_in, dtype=double)
        velocity = [torch.zeros_like(own) for own in (W, b, c)]
        for epoch in range(6):
            total = 0.0
            for index in torch.randperm(7, generator=generator).split(3):
                v = x[index]
                h = torch.sigmoid(v @ W.t() + b)
                s = (torch.rand(len(v), n_out, generator=generator, dtype=double) < h).double()
                v_1 = torch.sigmoid(s @ W + c)
                h_1 = torch.sigmoid(v_1 @ W.t() + b)
                steps = (h.t() @ v - h_1.t() @ v_1) / len(v) - 2e-4 * W, (h - h_1).mean(0), (v - v_1).mean(0)
                momentum = 0.9 if epoch > 4 else 0.5
                velocity = [momentum * old + 0.1 * step for old, step in zip(velocity, steps, strict=True)]
                W, b, c = (own + step for own, step in zip((W, b, c), velocity, strict=True))
                total += (v - v_1).square().sum().item()
            assert row[epoch].item() == pytest.approx(total / (7 * n_in), rel=1e-12)
        torch.testing.assert_close((layer.weight.data, layer.bias.data), (W, b), rtol=1e-12, atol=1e-14)
        x = torch.sigmoid(x @ W.t() + b)
    torch.testing.assert_close(net[-1].state_dict(), last, rtol=0, atol=0)
    assert errors.shape == (2, 6)


def test_without_bias_and_in_a_sequential() -> None:
    """The weights alone are learnt; torch's layers are taken, too, and dropout that draws nothing."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3, bias=False), nn.Sigmoid(), nn.Dropout(0.0), nn.Linear(3, 2), nn.Tanh()]
    net, x = nn.Sequential(*layers).double(), torch.rand(50, 4, dtype=double)
    errors = mm.pretrain(net, x, epochs=20, generator=torch.Generator().manual_seed(0))
    assert errors[0, -1] < errors[0, 0]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_one_of_seven_layers_learns_in_twenty_epochs() -> None:
    """Pretraining takes the net off the ground: 20 epochs of both, one seed. `make test-all` asks ten seeds in full."""
    assert deep_sigmoid.accuracy(deep_sigmoid.nothing, 0, epochs=20) <= 15
    assert deep_sigmoid.accuracy(quickly, 0, epochs=20) >= 90


def quickly(net: mm.MLP, x: Tensor, generator: torch.Generator) -> None:
    mm.pretrain(net, x, epochs=10, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_seven_layers(seed: int) -> None:
    """At least 95 % with, at most 15 % without; neither shuffled weights nor the first layer alone do it."""
    assert deep_sigmoid.accuracy(deep_sigmoid.pretrained, seed) >= 95
    assert deep_sigmoid.accuracy(deep_sigmoid.nothing, seed) <= 15
    assert deep_sigmoid.accuracy(deep_sigmoid.first_layer, seed) <= 15
    assert deep_sigmoid.accuracy(deep_sigmoid.shuffled, seed) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_it_solved_a_problem_of_initialisation(seed: int) -> None:
    """With larger weights and centred biases, or another activation, it learns without pretraining."""
    assert deep_sigmoid.accuracy(deep_sigmoid.centred, seed) >= 90
    assert deep_sigmoid.accuracy(deep_sigmoid.nothing, seed, activation="tanh") >= 90
    assert deep_sigmoid.accuracy(deep_sigmoid.nothing, seed, activation="relu") >= 85
    assert deep_sigmoid.accuracy(deep_sigmoid.glorot, seed) <= 15


def tied() -> nn.Module:
    net = mm.MLP([4, 4, 4, 2], dtype=double)
    net[1].weight = net[0].weight
    return net


def frozen() -> nn.Module:
    net = mm.MLP([4, 3, 2], dtype=double)
    net[0].bias.requires_grad_(False)
    return net


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return mm.MLP([4, 3, 2], dtype=double)


def of_two_dtypes() -> nn.Module:
    net = mm.MLP([4, 3, 3, 2], dtype=double)
    net[1].float()
    return net


NETS: dict[str, tuple[Callable[[], Any], str]] = {
    "tanh": (lambda: mm.MLP([4, 3, 2], "tanh", dtype=double), "hidden layer 1 has tanh: take activation='sigmoid'"),
    "no activation": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3), nn.Linear(3, 2)).double(),
        "hidden layer 2 has identity",
    ),
    "sum": (
        lambda: nn.Sequential(mm.Affine(4, 4), mm.Sigmoid(), mm.Residual(mm.Affine(4, 4))).double(),
        "a net with sums",
    ),
    "complex": (lambda: mm.MLP([4, 3, 2], dtype=torch.complex128), "complex128"),
    "no hidden layer": (lambda: mm.MLP([4, 2], dtype=double), "with a hidden layer"),
    "dropout": (lambda: mm.MLP([4, 3, 2], dropout=0.5, dtype=double), "draws no dropout"),
    "tied": (tied, "'0.weight' twice, a tied one"),
    "frozen": (frozen, "frozen"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(3, 2)), "Conv2d"),
    "no net": (lambda: torch.tanh, "expected a model"),
    "inference": (made_for_inference, "made outside torch.inference_mode"),
    "two dtypes": (of_two_dtypes, "hidden layers of one dtype"),
}


@pytest.mark.parametrize("name", NETS)
def test_refused_nets(name: str) -> None:
    make, message = NETS[name]
    with pytest.raises(mm.InputError, match=message):
        mm.pretrain(make(), torch.rand(5, 4, dtype=double))


GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "below 0": ({"x": torch.full((5, 4), -0.1, dtype=double)}, r"expected an x in \[0, 1\].* got -0.1 to -0.1"),
    "above 1": ({"x": torch.full((5, 4), 16.0, dtype=double)}, r"expected an x in \[0, 1\].* got 16 to 16"),
    "NaN": ({"x": torch.full((5, 4), torch.nan, dtype=double)}, "got NaN: fill the gaps"),
    "width": ({"x": torch.rand(5, 3, dtype=double)}, r"shape \(N, 4\)"),
    "images": ({"x": torch.rand(5, 2, 2, dtype=double)}, r".flatten\(1\)"),
    "dtype": ({"x": torch.rand(5, 4)}, "float64"),
    "no rows": ({"x": torch.rand(0, 4, dtype=double)}, "at least one row"),
    "complex": ({"x": torch.rand(5, 4, dtype=torch.complex128)}, "torch.float64 on cpu; got .* of torch.complex128"),
    "list": ({"x": [[0.5] * 4]}, "torch.Tensor as input"),
    "epochs": ({"epochs": 0}, "epochs of at least 1"),
    "batch_size": ({"batch_size": 2.5}, "a batch_size of at least 1"),
    "lr": ({"lr": 0.0}, "learning rate lr above 0"),
    "a switch as epochs": ({"epochs": True}, "epochs of at least 1, a whole number; got True"),
    "a switch as batch_size": ({"batch_size": True}, "a batch_size of at least 1, a whole number; got True"),
    "a switch as lr": ({"lr": True}, "learning rate lr above 0; got True"),
    "sparse": ({"x": torch.eye(4, dtype=double).to_sparse()}, r"sparse one as an input: call .to_dense\(\)"),
    "a seed": ({"generator": 3}, "expected a torch.Generator on cpu, where x is, or None; got int"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_refused_arguments(name: str) -> None:
    """Nothing has changed then."""
    given, message = GIVEN[name]
    net = mm.MLP([4, 3, 2], dtype=double)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(mm.InputError, match=message):
        mm.pretrain(net, **({"x": torch.rand(5, 4, dtype=double)} | given))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_refused_surroundings() -> None:
    net, x = mm.MLP([4, 3, 2]), torch.rand(5, 4)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(mm.InputError, match="autocast: leave its context"):
        mm.pretrain(net, x)
    with pytest.raises(mm.InputError, match="on meta, which holds none"):
        mm.pretrain(mm.MLP([4, 3, 2], device="meta"), x.to("meta"))
    with pytest.raises(mm.InputError, match="lr at which W stays finite; got inf, which diverged"):
        mm.pretrain(net, x, lr=math.inf)


def test_what_draws() -> None:
    """The same generator or seed gives the same bits, however x lies; a generator leaves torch's own alone."""
    x, found = torch.rand(7, 4), []
    for columns, seeded, batch_size in ((False, False, 3), (True, False, 3), (False, True, 3), (False, True, 3)):
        net, generator = mm.MLP([4, 3, 2]).eval(), torch.Generator().manual_seed(1)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        mm.pretrain(net, x.t().clone().t() if columns else x, 2, 0.1, batch_size, None if seeded else generator)
        assert torch.equal(before, torch.get_rng_state()) != seeded
        found.append(net[0].weight)
    torch.testing.assert_close(found[1:], found[:1] * 3, rtol=0, atol=0)
    for rows, batch_size in ((1, 20), (7, 1000)):  # one sample, and a batch larger than x
        assert mm.pretrain(mm.MLP([4, 3, 2]), x[:rows], 1, batch_size=batch_size).isfinite().all()
