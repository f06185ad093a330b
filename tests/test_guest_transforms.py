"""torch.func: every Function under every transform, against its torch twin."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import manual_mlp as mm
from tests.cases import CASES, Case
from tests.grid_cases import GRIDS, PLAIN

Transform = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
# Two orders of the same operations on numbers of order 1: a few eps of float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


FIXED = ("affine-bias", "affine_sigmoid-bias", "affine_gelu-bias", "sigmoid", "mse_loss-mean")


def detached(case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    """The inputs of a case, as plain tensors; another seed permutes them."""
    inputs = tuple(tensor.detach() for tensor in case.inputs(torch.float64))
    return tuple(tensor.flatten().roll(seed).reshape(tensor.shape) for tensor in inputs)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A curved scalar of the function's output, so that its second derivative is none of a linear map."""
    return lambda *inputs: function(*inputs).square().sum()


def all_of(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.inputs(torch.float64))))


def name(transform: Transform) -> str:
    return transform.__name__


def orders(derivatives: int) -> list[Any]:
    """All of them; of the third derivative all but forward mode alone, which asks the most, are an exhaustive sweep."""
    sweep = [pytest.mark.slow] if derivatives == 3 else []
    mixed = [pytest.param(order, marks=sweep) for order in product((jacfwd, jacrev), repeat=derivatives)]
    return [(jacfwd,) * derivatives, *mixed[1:]]


def nested(order: tuple[Transform, ...], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The first of the transforms outermost."""
    for transform in reversed(order):
        function = transform(function)
    return function


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_jacobians(case: Case) -> None:
    inputs = detached(case)
    expected = jacrev(case.twin, all_of(case))(*inputs)
    same(jacrev(case.ours, all_of(case))(*inputs), expected)
    same(jacfwd(case.ours, all_of(case))(*inputs), expected)


@pytest.mark.parametrize("order", orders(2), ids=lambda order: "_".join(map(name, order)))
def test_hessians(case: Case, order: tuple[Transform, ...]) -> None:
    """In each order of the modes; with torch's own, forward over forward is 0 for any Function (pytorch#197867).

    The twin's is reverse over reverse, since torch's own forward over reverse of mse_loss fails (pytorch#123996).
    """
    first, *others = detached(case)
    same(
        nested(order, lambda x: scalar(case.ours)(x, *others))(first),
        nested((jacrev, jacrev), lambda x: scalar(case.twin)(x, *others))(first),
    )


def test_vmap(case: Case) -> None:
    """Over all inputs, and over each alone, in the last dimension."""
    inputs = detached(case)
    samples = [torch.stack([detached(case, seed)[i] for seed in range(3)]) for i in range(len(inputs))]
    same(vmap(case.ours)(*samples), torch.stack([case.ours(*sample) for sample in zip(*samples, strict=True)]))
    for i, batch in enumerate(samples):
        arguments = [batch.movedim(0, -1) if j == i else other for j, other in enumerate(inputs)]
        each = [case.ours(*(sample if j == i else other for j, other in enumerate(inputs))) for sample in batch]
        in_dims = tuple(-1 if j == i else None for j in range(len(inputs)))
        same(vmap(case.ours, in_dims=in_dims)(*arguments), torch.stack(each))


@pytest.mark.parametrize("case", [*(case for case in CASES if case.name in FIXED), *GRIDS], ids=str)
def test_vmap_inside_with_a_fixed_input(case: Case) -> None:
    """jvp and grad of vmap, in one input alone: the others are batched too, and have no tangent and no gradient."""
    inputs = detached(case)
    samples = [torch.stack([detached(case, seed)[i] for seed in range(3)]) for i in range(len(inputs))]
    for i, moving in enumerate(samples):

        def batched(x: Tensor, function: Callable[..., Tensor], i: int = i) -> Tensor:
            return vmap(function)(*samples[:i], x, *samples[i + 1 :])

        both = [partial(batched, function=function) for function in (case.ours, case.twin)]
        same(*(jvp(function, (moving,), (moving.flip(0),)) for function in both))
        same(*(grad(scalar(function))(moving) for function in both))


def test_per_sample_gradients(case: Case) -> None:
    inputs = detached(case)
    samples = [torch.stack([detached(case, seed)[i] for seed in range(3)]) for i in range(len(inputs))]
    same(*(vmap(grad(scalar(function), all_of(case)))(*samples) for function in (case.ours, case.twin)))


def test_third_derivative() -> None:
    """Of a(x) = σ(w x + b) in x: w³ σ′(1 − 6 σ′), with σ′ = a (1 − a)."""
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    weight, bias = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)

    def neuron(x: Tensor) -> Tensor:
        return mm.functional.affine_activation(x, weight, bias)

    a = neuron(x.detach())
    expected = weight**3 * (a * (1 - a)) * (1 - 6 * a * (1 - a))
    derivative = neuron(x)
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative, x, create_graph=True)
    same(derivative.detach(), expected)
    same(grad(grad(grad(lambda x: neuron(x.reshape(1, 1)).sum())))(x.detach().squeeze()), expected.squeeze())
    same(jacfwd(jacfwd(jacfwd(neuron)))(x.detach()).reshape(1, 1), expected)


@pytest.mark.parametrize("order", orders(3), ids=lambda order: "_".join(map(name, order)))
def test_third_derivatives_equal_the_twin(case: Case, order: tuple[Transform, ...]) -> None:
    """Along a line through the inputs, one number for each case, in each order of the modes."""
    inputs, direction = detached(case), detached(case, seed=1)

    def along(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: scalar(function)(*(x + t * d for x, d in zip(inputs, direction, strict=True)))

    start = torch.zeros((), dtype=torch.float64)
    twin = PLAIN.get(case.name, case.twin)
    ours, theirs = nested(order, along(case.ours))(start), nested((jacrev,) * 3, along(twin))(start)
    # sums of some hundred products, of order 10
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_forward_ad_by_hand() -> None:
    """Dual tensors without torch.func, as gradcheck's, through a whole net."""
    model, twin = nets()
    x, x_t = rows(), rows().flip(0)

    def tangent(model: nn.Module) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x_t))).tangent

    same(tangent(model), tangent(twin))


# ---------------------------------------------------------------------------------------------------------------------
# A whole net
# ---------------------------------------------------------------------------------------------------------------------


def rows() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    twin = nn.Sequential(
        nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 3), nn.Sigmoid()
    ).double()
    model = mm.MLP([4, 5, 5, 3], ["gelu", "softplus"], "sigmoid", dtype=torch.float64)
    model.load_state_dict(twin.state_dict())
    return model, twin


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def cost(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda weights: mm.functional.quadratic_loss(functional_call(model, weights, (x,)), target)


def test_functional_call() -> None:
    model, twin = nets()
    halved = {name: parameter / 2 for name, parameter in parameters(model).items()}
    same(functional_call(model, halved, (rows(),)), functional_call(twin, halved, (rows(),)))
    x, target = rows(), rows()[:, :3].sigmoid()
    same(grad(cost(model, x, target))(halved), grad(cost(twin, x, target))(halved))


def test_per_sample_gradients_of_a_net_sum_to_the_batch() -> None:
    model, twin = nets()
    x, target = rows(), rows()[:, :3].sigmoid()

    def one(model: nn.Module) -> Callable[..., Any]:
        def sample_cost(weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
            return cost(model, x.unsqueeze(0), target.unsqueeze(0))(weights)

        return vmap(grad(sample_cost), in_dims=(None, 0, 0))

    ours = one(model)(parameters(model), x, target)
    same(ours, one(twin)(parameters(twin), x, target))
    batch = grad(cost(model, x, target))(parameters(model))
    same({name: each.mean(0) for name, each in ours.items()}, batch)


def test_hessian_of_a_net() -> None:
    model, twin = nets()
    x, target = rows(), rows()[:, :3].sigmoid()
    expected = hessian(cost(twin, x, target))(parameters(twin))
    same(hessian(cost(model, x, target))(parameters(model)), expected)


def test_ensemble() -> None:
    """vmap over stacked weights, as torch.func.stack_module_state makes them."""
    models = [mm.MLP([4, 5, 3], dtype=torch.float64) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    x = rows()
    outputs = vmap(lambda weights: functional_call(models[0], weights, (x,)))(stacked)
    same(outputs, torch.stack([model(x) for model in models]))


def test_dropout_under_vmap() -> None:
    """Masks drawn for each sample, or one for all, as the caller says; and its gradient reuses the mask."""
    x = rows()

    def kept_and_slope(a: Tensor) -> tuple[Tensor, Tensor]:
        slope, output = torch.func.vjp(lambda a: mm.functional.dropout(a, 0.5), a)[::-1]
        return output, slope(torch.ones_like(a))[0]

    for randomness in ("same", "different"):
        output, slope = vmap(kept_and_slope, randomness=randomness)(x)
        same(output, x * slope)
        assert (slope[0] == slope).all().item() == (randomness == "same")


def test_transforms_inside_no_grad() -> None:
    """torch.func differentiates what it is asked to, also where the surroundings do not."""
    model, _ = nets()
    expected = grad(lambda x: model(x).sum())(rows())
    with torch.no_grad():
        same(grad(lambda x: model(x).sum())(rows()), expected)


@pytest.mark.parametrize("loss", [mm.QuadraticLoss(), mm.MSELoss(), mm.BCEWithLogitsLoss(), mm.CrossEntropyLoss()])
def test_forward_over_reverse_of_costs(loss: nn.Module) -> None:
    """torch's own mse_loss fails here: "ZeroTensors are immutable" (pytorch#123996)."""
    z, target = rows(), rows().sigmoid()
    target = target / target.sum(-1, keepdim=True)
    v = rows().flip(1)
    _, product = jvp(grad(lambda z: loss(z, target)), (z,), (v,))
    whole = hessian(lambda z: loss(z, target))(z).reshape(24, 24) @ v.flatten()
    same(product.flatten(), whole)


def test_every_case_is_here() -> None:
    """The transforms above run over the whole list, and the list holds each kind."""
    kinds = ("affine-", "affine_", "sigmoid", "dropout", "quadratic", "mse", "bce", "cross_entropy")
    assert all(any(case.name.startswith(kind) for case in CASES) for kind in kinds)
