"""mm.curvature beside torch.func: each sample's gradient, norms, clipping, variance, GGN, KFAC, Hessian times v."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional as F

import manual_mlp as mm
from manual_mlp.curvatures import Curvature
from manual_mlp.formulas import COSTS, Row
from manual_mlp.network import reading_of
from tests.cases import ROWS, rows
from tests.test_graph import Draw, twin

double = torch.float64
Named = dict[str, Tensor]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quadratic": lambda a, y: (a - y).square().sum() / (2 * len(a)),
    "mse": lambda a, y: (a - y).square().mean(),  # torch's mse_loss can't be differentiated by jvp(grad)
    "bce": F.binary_cross_entropy_with_logits,
    "cross_entropy": F.cross_entropy,
}
CURVED = [row for row in ROWS if row.curvature is not None]


def net_of(row: Row, loss: str, generator: torch.Generator) -> nn.Sequential:
    """A net of torch's own layers: 1 to 4 of them, 1 to 6 wide, some without bias, some parameters frozen."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sizes = [draw(1, 7) for _ in range(draw(2, 6))]
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, draw(0, 4) > 0, dtype=double), row.twin()]
    net = nn.Sequential(*layers[: -1 if COSTS[loss].logits else None])
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=double)
        parameter.requires_grad_(draw(0, 6) > 0)
    net[0].weight.requires_grad_()
    return net


def batch_of(net: nn.Sequential, loss: str, generator: torch.Generator, n: int = 6) -> tuple[Tensor, Tensor]:
    outputs = [layer.out_features for layer in net if isinstance(layer, nn.Linear)][-1]
    x = torch.randn(n, net[0].in_features, generator=generator, dtype=double)
    if loss == "cross_entropy" and torch.randint(2, (), generator=generator):
        return x, torch.randint(outputs, (n,), generator=generator)
    return x, torch.rand(n, outputs, generator=generator, dtype=double)


class ByTorch:
    """The same quantities by torch.func."""

    def __init__(self, net: nn.Module, x: Tensor, target: Tensor, loss: str) -> None:
        self.net, self.x, self.target, self.loss = twin(net), x, target, LOSSES[loss]
        self.own = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
        names = {id(p): name for name, p in self.net.named_parameters()}
        self.names = {name: names[id(p)] for name, p in net.named_parameters()}

    def predict(self, own: Named, x: Tensor) -> Tensor:
        return functional_call(self.net, {self.names[name]: value for name, value in own.items()}, (x,))

    def cost(self, own: Named) -> Tensor:
        return self.loss(self.predict(own, self.x), self.target)

    def gradients(self) -> Named:
        def cost(own: Named, x: Tensor, target: Tensor) -> Tensor:
            return self.loss(self.predict(own, x[None]), target[None])

        return vmap(grad(cost), (None, 0, 0))(self.own, self.x, self.target)

    def hvp(self, v: Named) -> Named:
        return jvp(grad(self.cost), (self.own,), (v,))[1]

    def blocks(self) -> tuple[Named, Tensor]:
        """Return the Jacobian of each sample's prediction, and the second derivative of its cost by it."""

        def prediction(own: Named, x: Tensor) -> Tensor:
            return self.predict(own, x[None])[0]

        J = vmap(jacrev(prediction), (None, 0))(self.own, self.x)
        of_one = hessian(lambda a, y: self.loss(a[None], y[None]))
        return J, vmap(of_one)(self.net(self.x).detach(), self.target)


def assert_close(ours: Named, theirs: Named, tolerance: float = 1e-13) -> None:
    """Relative to the largest number in each tensor."""
    assert [*ours] == [*theirs]
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        error = (ours[name] - expected).abs().max().item()
        assert error <= tolerance * max(1.0, expected.abs().max().item()), (name, error)


def compare(net: nn.Module, x: Tensor, target: Tensor, loss: str) -> None:
    ours, theirs = mm.curvature(net, x, target, loss), ByTorch(net, x, target, loss)
    gradients = theirs.gradients()
    assert_close(ours.gradients, gradients)
    norms = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
    assert_close({"norms": ours.norms}, {"norms": norms})
    assert_close(ours.variance, {name: g.var(0, correction=0) for name, g in gradients.items()})
    trace = sum(g.var(0).sum() for g in gradients.values())
    square = sum(g.mean(0).square().sum() for g in gradients.values()) - trace / len(x)
    if abs(square) > 0.1 * trace:  # or it cancels
        torch.testing.assert_close(ours.noise_scale, trace / square, rtol=1e-12, atol=0)
    c = norms.median().item() or 1.0
    shorter = [1.0 if norm <= c else c / norm for norm in norms.tolist()]
    assert_close(ours.clipped(c), {name: sum(map(Tensor.mul, g, shorter)) / len(x) for name, g in gradients.items()})
    J, H = theirs.blocks()
    diagonal = {name: torch.einsum("nk...,nkl,nl...->...", j, H, j) / len(x) for name, j in J.items()}
    assert_close(ours.ggn_diagonal(), diagonal)
    v = {name: torch.randn_like(own) for name, own in theirs.own.items()}
    # In the tail torch's G″ of gelu_tanh is off by 1.3e-15, the sheet's by 2e-16, and R{z} multiplies it by hundreds.
    tanh = any(isinstance(layer, nn.GELU) and layer.approximate == "tanh" for layer in net)
    assert_close(ours.hvp(v), theirs.hvp(v), 1e-12 if tanh else 1e-13)


@rows
@pytest.mark.parametrize("loss", LOSSES)
def test_every_quantity(row: Row, loss: str) -> None:
    generator = torch.Generator().manual_seed(len(row.name) + len(loss))
    net = net_of(row, loss, generator)
    compare(net, *batch_of(net, loss, generator), loss)


@pytest.mark.slow
@rows
@pytest.mark.parametrize("loss", LOSSES)
def test_a_hundred_nets(row: Row, loss: str) -> None:
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        net = net_of(row, loss, generator)
        compare(net, *batch_of(net, loss, generator), loss)


def check_sums(seed: int) -> None:
    """Nested sums; gradients grow with every branch, so all is compared relative to the largest number."""
    draw = Draw(seed, tied=False)
    net, loss = draw.net(), draw.pick.choice(["quadratic", "mse"])
    parameters = list(net.parameters())
    draw.pick.choice(parameters).requires_grad_(len(parameters) < 3)
    compare(net, torch.randn(6, 4, dtype=double), torch.rand(6, 3, dtype=double), loss)


@pytest.mark.parametrize("seed", range(8))
def test_sums(seed: int) -> None:
    check_sums(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(8, 208, 50))
def test_200_nets_of_sums(first: int) -> None:
    for seed in range(first, first + 50):
        check_sums(seed)


# ---------------------------------------------------------------------------------------------------------------------
# KFAC, Lanczos
# ---------------------------------------------------------------------------------------------------------------------


def small(loss: str, n: int, activation: str = "tanh") -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = mm.MLP([3, 4, 4, 2], activation, "identity", dtype=double)
    return net, torch.randn(n, 3, dtype=double), torch.rand(n, 2, dtype=double)


def blocks(net: nn.Module, x: Tensor, target: Tensor, loss: str) -> dict[str, Tensor]:
    """Return the block of the generalised Gauss-Newton matrix of each layer's (W, b), rows of W side by side."""
    J, H = ByTorch(net, x, target, loss).blocks()
    found = {}
    for name, j in J.items():
        if name.endswith("weight"):
            with_bias = torch.cat([j, J[name.replace("weight", "bias")].unsqueeze(-1)], -1).flatten(2)
            found[name] = torch.einsum("nkp,nkl,nlq->pq", with_bias, H, with_bias) / len(x)
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_kfac_is_exact_for_one_sample(loss: str) -> None:
    net, x, target = small(loss, 1)
    factors = mm.curvature(net, x, target, loss).kfac()
    assert_close({name: torch.kron(B, A) for name, (A, B) in factors.items()}, blocks(net, x, target, loss))


def test_kfac_is_exact_for_a_linear_net() -> None:
    """B does not depend on the sample then (Dangel et al., 2025)."""
    net, x, target = small("quadratic", 11, "identity")
    factors = mm.curvature(net, x, target).kfac()
    assert_close({name: torch.kron(B, A) for name, (A, B) in factors.items()}, blocks(net, x, target, "quadratic"))


def test_kfac_is_the_mean_over_labels() -> None:
    """With labels drawn from the net's own prediction, the mean of δ δᵀ goes to B."""
    net, x, _ = small("cross_entropy", 5)
    _, B = mm.curvature(net, x, torch.zeros(5, dtype=torch.int64), "cross_entropy").kfac()["0.weight"]
    mean = torch.zeros_like(B)
    for k in range(2):
        delta = mm.curvature(net, x, torch.full((5,), k), "cross_entropy").gradients["0.bias"]
        mean += torch.einsum("n,ni,nj->ij", net(x).softmax(1)[:, k].detach(), delta, delta) / 5
    torch.testing.assert_close(mean, B, rtol=1e-12, atol=1e-15)


def lanczos(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return the eigenvalues of a symmetric matrix from its products with vectors."""
    torch.manual_seed(0)
    Q, alpha, beta = torch.zeros(size, size, dtype=double), torch.zeros(size, dtype=double), torch.zeros(size - 1)
    beta, q = beta.double(), nn.functional.normalize(torch.randn(size, dtype=double), dim=0)
    for k in range(size):
        Q[k] = q
        w = product(q)
        alpha[k] = q @ w
        for _ in range(2):  # full reorthogonalisation
            w = w - Q[: k + 1].t() @ (Q[: k + 1] @ w)
        if k + 1 < size:
            beta[k] = w.norm()
            if beta[k] < 1e-10:  # an invariant subspace: go on with a new vector outside of it
                beta[k], w = 0.0, torch.randn(size, dtype=double)
                for _ in range(2):
                    w = w - Q[: k + 1].t() @ (Q[: k + 1] @ w)
            q = w / w.norm()
    return torch.linalg.eigvalsh(alpha.diag() + beta.diag(1) + beta.diag(-1))


def test_the_spectrum_by_lanczos() -> None:
    """497 parameters: the eigenvalues from our products are those of torch.func.hessian."""
    torch.manual_seed(0)
    net = mm.MLP([8, 20, 12, 5], "tanh", "identity", dtype=double)
    x, target = torch.randn(30, 8, dtype=double), torch.randint(5, (30,))
    ours, theirs = mm.curvature(net, x, target, "cross_entropy"), ByTorch(net, x, target, "cross_entropy")
    shapes = {name: own.shape for name, own in theirs.own.items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def named(flat: Tensor) -> Named:
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    flat = torch.cat([own.flatten() for own in theirs.own.values()])
    exact = torch.linalg.eigvalsh(hessian(lambda flat: theirs.cost(named(flat)))(flat))
    found = lanczos(lambda v: torch.cat([part.flatten() for part in ours.hvp(named(v)).values()]), sum(sizes))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The object itself, and what is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_it_keeps_what_it_was_made_of() -> None:
    """Training on, and writing into the batch, changes nothing in it."""
    net, x, target = small("quadratic", 5)
    before = mm.curvature(net, x, target)
    kept = mm.curvature(net, x, target)
    expected = before.hvp(before.clipped(1.0)), before.norms
    engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0))
    engine.step(x, target)
    x.zero_()
    target.zero_()
    torch.testing.assert_close((kept.hvp(kept.clipped(1.0)), kept.norms), expected, rtol=0, atol=0)
    assert repr(kept) == "Curvature(quadratic cost, N = 5, 46 parameters)"


def test_it_changes_nothing() -> None:
    net, x, target = small("quadratic", 5)
    before = copy.deepcopy(net.state_dict())
    of = mm.curvature(net, x.requires_grad_(), target)
    for value in (of.norms, *of.gradients.values(), *of.hvp(of.variance).values(), *of.ggn_diagonal().values()):
        assert not value.requires_grad
    of.gradients["0.bias"].zero_()
    torch.testing.assert_close(of.gradients["0.bias"].mean(0), mm.curvature(net, x, target).clipped(1e9)["0.bias"])
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in net.parameters())


def test_a_gradient_of_zero() -> None:
    """A perfect prediction has a norm of 0, and is not divided by it."""
    net, x, _ = small("quadratic", 5)
    of = mm.curvature(net, x, net(x).detach())
    assert of.norms.eq(0).all()
    assert all(value.eq(0).all() for value in (*of.clipped(1.0).values(), *of.variance.values()))


def test_variance_is_never_negative() -> None:
    """Of equal samples it is a rounding error, of either sign."""
    net, x, target = small("quadratic", 1)
    of = mm.curvature(net, x.expand(7, 3), target.expand(7, 2))
    assert all((value >= 0).all() and value.max() < 1e-15 for value in of.variance.values())


def test_norms_whose_squares_float32_does_not_hold() -> None:
    net, x = nn.Sequential(nn.Linear(2, 1, bias=False)), torch.tensor([[3e20, 0.0]])
    nn.init.ones_(net[0].weight)
    of = mm.curvature(net, x, torch.tensor([[3e20 - 1e16]]))
    torch.testing.assert_close(of.norms, of.gradients["0.weight"][:, 0, 0])  # about 3e36
    torch.testing.assert_close(of.clipped(2.0)["0.weight"], torch.tensor([[2.0, 0.0]]))


def test_half_precision() -> None:
    """bfloat16: two digits of the same numbers."""
    net, x, target = small("quadratic", 5)
    exact = mm.curvature(net, x, target)
    ours = mm.curvature(copy.deepcopy(net).bfloat16(), x.bfloat16(), target.bfloat16())
    v = exact.clipped(1.0)
    pairs = [(ours.norms, exact.norms), (ours.noise_scale, exact.noise_scale)]
    found, expected = ours.hvp({name: value.bfloat16() for name, value in v.items()}), exact.hvp(v)
    pairs += [(found[name], value) for name, value in expected.items()]
    for mine, value in pairs:
        assert mine.dtype == torch.bfloat16
        assert (mine - value).norm() < 0.1 * value.norm()  # 8 bits, through three layers


def test_a_row_without_a_second_derivative() -> None:
    """It works everywhere else, and hvp refuses it by its name."""
    net, x, target = small("quadratic", 5, "silu")
    whole = mm.curvature(net, x, target)
    v = whole.clipped(1.0)
    for node in reading_of(net).program.nodes:
        if hasattr(node.rule, "row"):
            node.rule.row = replace(node.rule.row, curvature=None)
    of = mm.curvature(net, x, target)
    torch.testing.assert_close(of.ggn_diagonal(), whole.ggn_diagonal(), rtol=0, atol=0)
    torch.testing.assert_close((of.norms, of.variance, of.kfac()), (whole.norms, whole.variance, whole.kfac()))
    with pytest.raises(mm.InputError, match="'silu'; its row on the sheet has no curvature, G″"):
        of.hvp(v)


def test_a_whole_number_as_g_double_prime() -> None:
    """G = z² of a row of one's own has G″ = 2, which is no tensor, and not 0 either."""
    (net, x, target), found = small("quadratic", 5, "silu"), []
    v = mm.curvature(net, x, target).clipped(1.0)
    for bend in (lambda z: 2, lambda z: torch.full_like(z, 2.0), lambda z: 0):
        for node in reading_of(net).program.nodes:
            if hasattr(node.rule, "row"):
                node.rule.row = replace(node.rule.row, curvature=bend)
        found.append(mm.curvature(net, x, target).hvp(v))
    assert_close(found[0], found[1])
    assert not torch.allclose(found[0]["0.weight"], found[2]["0.weight"])


def test_a_cost_without_a_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, target = small("quadratic", 5)
    monkeypatch.setitem(COSTS, "quadratic", replace(COSTS["quadratic"], H=None, root=None))
    of = mm.curvature(net, x, target)
    assert of.norms.shape == (5,)
    for ask in (of.ggn_diagonal, of.kfac, lambda: of.hvp(of.clipped(1.0))):
        with pytest.raises(mm.InputError, match="second derivative of the cost 'quadratic'"):
            ask()


def tied() -> nn.Module:
    net = mm.MLP([3, 3, 3, 2], dtype=double)
    net[1].weight = net[0].weight
    return net


def frozen() -> nn.Module:
    return mm.MLP([3, 2], dtype=double).requires_grad_(False)


LINEAR = (3, 2)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        "BatchNorm1d at '1' joins the rows of a batch",
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "got LayerNorm"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(3, 2)), "got Conv2d"),
    "tied": (tied, "'0.weight' twice, a tied one"),
    "used twice": (lambda: nn.Sequential(*[nn.Linear(3, 3)] * 2, nn.Linear(3, 2)), "got '0.weight' twice"),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)), r"call .eval\(\)"),
    "frozen": (frozen, "all are frozen"),
    "a function": (lambda: torch.tanh, "expected a model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name: str) -> None:
    make, message = REFUSED[name]
    torch.manual_seed(0)
    model = make().double() if isinstance(make(), nn.Module) else make()
    with pytest.raises(mm.InputError, match=message):
        mm.curvature(model, torch.randn(5, 3, dtype=double), torch.rand(5, 2, dtype=double))


BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "time axis": ({"x": torch.zeros(5, 7, 3, dtype=double)}, "with a time axis"),
    "one sample": ({"x": torch.zeros(3, dtype=double)}, r"expected an input of shape \(N, 3\)"),
    "width": ({"x": torch.zeros(5, 4, dtype=double)}, r"expected an input of shape \(N, 3\)"),
    "dtype": ({"x": torch.zeros(5, 3)}, "float64"),
    "complex": ({"x": torch.zeros(5, 3, dtype=torch.complex128)}, "torch.float64 on cpu; got .* of torch.complex128"),
    "no tensor": ({"x": [[0.0] * 3]}, "expected a torch.Tensor as x; got list"),
    "target": ({"target": torch.zeros(5, 3, dtype=double)}, r"expected a target of shape \(5, 2\)"),
    "no sample": ({"x": torch.zeros(0, 3, dtype=double), "target": torch.zeros(0, 2, dtype=double)}, "at least one"),
    "loss": ({"loss": "huber"}, "got 'huber'"),
    "a list as loss": ({"loss": ["quadratic"]}, r"got \['quadratic'\]"),
    "an ignored label": (
        {"target": torch.tensor([0, 1, -100, 0, 1]), "loss": "cross_entropy"},
        "expected class labels from 0 to 1; got labels from -100",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_refused_batches(name: str) -> None:
    changed, message = BATCHES[name]
    net, x, target = small("quadratic", 5)
    with pytest.raises(mm.InputError, match=message):
        mm.curvature(net, **({"x": x, "target": target} | changed))


@pytest.mark.parametrize("ask", [mm.curvature, mm.trace, mm.network.network_loss])
def test_a_complex_net(ask: Callable[..., Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64))
    x, target = torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(5, 2, dtype=torch.complex64)
    with pytest.raises(mm.InputError, match=r"expected a real floating-point input; got torch\.complex64"):
        ask(net, x, target)


def test_a_logits_cost_after_an_activation() -> None:
    with pytest.raises(mm.InputError, match="gives logits"):
        mm.curvature(mm.MLP([3, 2]), torch.zeros(5, 3), torch.zeros(5, 2), "bce")


def test_autocast() -> None:
    net, x, target = small("quadratic", 5)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(mm.InputError, match="autocast"):
        mm.curvature(net, x, target)


def test_refused_arguments() -> None:
    net, x, target = small("quadratic", 5)
    of: Curvature = mm.curvature(net, x, target)
    v = of.clipped(1.0)
    for wrong, message in (
        ([*v.values()], "a dict with a tensor for each of 0.weight, 0.bias"),
        ({**v, "x": v["0.bias"]}, "got 0.weight"),
        ({name: value for name, value in v.items() if name != "0.bias"}, "got 0.weight"),
        ({**v, "0.bias": v["0.bias"][:2]}, r"of shape \(4,\)"),
        ({**v, "0.bias": v["0.bias"].float()}, "float32"),
        ({**v, "0.bias": 1.0}, "a torch.Tensor as"),
        ({**v, "0.bias": v["0.bias"].to_sparse()}, "sparse one as v"),
    ):
        with pytest.raises(mm.InputError, match=message):
            of.hvp(wrong)
    for c in (0, -1.0, math.nan, None, "1", True, [torch.zeros(1000), 1.0], torch.zeros(9, 1)):
        with pytest.raises(mm.InputError, match="largest norm c above 0") as caught:
            of.clipped(c)
        assert len(str(caught.value)) < 120
        assert "\n" not in str(caught.value)
    with pytest.raises(mm.InputError, match="at least two samples"):
        _ = mm.curvature(net, x[:1], target[:1]).noise_scale


def test_dropout_that_draws_nothing() -> None:
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2), nn.Dropout(0.0)]
    net = nn.Sequential(*layers).double().eval()
    torch.manual_seed(0)
    compare(net, torch.randn(5, 3, dtype=double), torch.rand(5, 2, dtype=double), "quadratic")
