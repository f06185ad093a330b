"""Every Function, the whole net and the engine beside torch, in shapes, strides, dtypes and nets that hypothesis picks.

`make test` tries a share of the examples, the same each time; `make test-all` many more.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp.engine import BackpropEngine
from manual_mlp.formulas import COSTS
from manual_mlp.network import network_loss
from tests.cases import CASES, ROWS, Case, Sizes, cases_of, sampled
from tests.test_engine import LOSSES, assert_same, torch_twin

SHARE = settings(max_examples=8, derandomize=True, deadline=None, database=None)
ALL = settings(SHARE, max_examples=200)

cases = pytest.mark.parametrize("case", sampled(CASES))
small = st.integers(0, 4)
sizes = st.builds(Sizes, st.lists(small, max_size=3).map(tuple), inputs=small, outputs=st.integers(1, 4))
# What is rounded, in eps: a sum of at most 200 terms; torch rounds what the sheet keeps in float32, and the reverse.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 64 * 2**-23, torch.bfloat16: 8 * 2**-7}
LAYOUTS = ["contiguous", "transposed", "every other", "narrowed", "expanded"]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers (those of the first row, if expanded) in other strides."""
    tensor = tensor.detach()
    if tensor.dim() == 0 or layout == "contiguous":
        return tensor.clone()
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every other":
        return torch.stack([tensor, tensor + 1], -1).flatten(-2)[..., ::2]
    if layout == "narrowed":
        return torch.cat([tensor - 1, tensor, tensor + 1], -1).narrow(-1, tensor.shape[-1], tensor.shape[-1])
    return tensor[:1].expand_as(tensor) if len(tensor) else tensor.clone()


def largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return max(1.0, finite.abs().max().item()) if finite.numel() else 1.0


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float, magnitude: float = 1.0) -> None:
    """Relative to the largest entry, which dominates the error of a sum, or to a magnitude that cancels in it."""
    assert mine.shape == theirs.shape
    torch.testing.assert_close(
        mine.double(), theirs.double(), rtol=0, atol=tolerance * max(largest(theirs), magnitude), equal_nan=True
    )


def check_case(name: str, data: st.DataObject) -> None:
    """Value and gradients as the twin's in float64; shapes and dtypes of the inputs; nothing written; nothing extra."""
    case = cases_of(data.draw(sizes, "sizes"))[name]
    dtype = data.draw(st.sampled_from(list(TOLERANCES)), "dtype")
    scale = data.draw(st.sampled_from([1.0, 0.0, 1e-3, 6.0]), "scale")
    inputs = [laid_out(tensor * scale, data.draw(st.sampled_from(LAYOUTS))) for tensor in case.inputs(dtype)]
    needed = data.draw(st.lists(st.booleans(), min_size=len(inputs), max_size=len(inputs)).filter(any), "needed")
    exact = [tensor.double().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in inputs]
    before = [tensor.clone() for tensor in inputs]
    for tensor, needs in zip(inputs, needed, strict=True):
        tensor.requires_grad_(needs)

    # Products of two inputs may cancel; in float64 1e-12 leaves room for that.
    magnitude = 1.0 if dtype == torch.float64 else max(map(largest, exact)) ** 2
    output, twin = case.ours(*inputs), case.twin(*exact)
    assert output.dtype == dtype
    assert_close(output, twin, TOLERANCES[dtype], magnitude)
    g = laid_out(
        torch.linspace(-1, 2, output.numel(), dtype=dtype).reshape(output.shape), data.draw(st.sampled_from(LAYOUTS))
    )
    sent = g.clone()
    output.backward(g)
    theirs = torch.autograd.grad(twin, exact, g.double())

    assert torch.equal(g, sent)
    for tensor, needs, copied, gradient in zip(inputs, needed, before, theirs, strict=True):
        assert torch.equal(tensor, copied)
        assert (tensor.grad is not None) == needs
        if tensor.grad is not None:
            assert tensor.grad.dtype == dtype
            assert_close(tensor.grad, gradient, TOLERANCES[dtype], magnitude)


@cases
@SHARE
@given(data=st.data())
def test_function(case: Case, data: st.DataObject) -> None:
    check_case(case.name, data)


@pytest.mark.slow
@cases
@ALL
@given(data=st.data())
def test_function_at_length(case: Case, data: st.DataObject) -> None:
    check_case(case.name, data)


@st.composite
def nets(draw: st.DrawFn) -> tuple[nn.Sequential, str]:
    """A net of ours, 1 to 4 layers of 1 to 5 neurons, any rows and frozen parameters, and a cost that it may have."""
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    loss = draw(st.sampled_from(list(COSTS)))
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        bias = draw(st.booleans())
        layer = mm.AffineActivation(width, next_width, "identity", bias, dtype=torch.float64)
        if len(layers) < len(widths) - 2 or not COSTS[loss].logits:
            layer.activation = draw(st.sampled_from(ROWS)).twin()
        for parameter in layer.parameters():
            parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
        layers.append(layer)
    layers[-1].weight.requires_grad_()
    return nn.Sequential(*layers), loss


def check_net(drawn: tuple[nn.Sequential, str], data: st.DataObject) -> None:
    """network_loss, compute_gradients and five steps as autograd and torch.optim on torch's own layers."""
    net, loss = drawn
    twin, stepping = torch_twin(net), copy.deepcopy(net)
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        theirs.requires_grad_(mine.requires_grad)
    batches = [batch(net, loss, data) for _ in range(2)]

    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    engine = BackpropEngine(net, sgd(net), loss)
    for x, target in batches:
        before = x.clone(), target.clone()
        expected = LOSSES[loss](twin(x), target)
        gradients = torch.autograd.grad(expected, trained)
        cost = network_loss(net, x, target, loss)
        found = torch.autograd.grad(cost, [parameter for parameter in net.parameters() if parameter.requires_grad])
        assert_close(cost, expected, 1e-12)
        assert_close(engine.compute_gradients(x, target), expected, 1e-12)
        filled = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
        for mine, his, theirs in zip(found, filled, gradients, strict=True):
            assert_close(mine, theirs, 1e-12)
            assert his is not None
            assert_close(his, theirs, 1e-12)
        assert torch.equal(x, before[0])
        assert torch.equal(target, before[1])

    engine, optimizer = BackpropEngine(stepping, sgd(stepping), loss), sgd(twin)
    for step in range(5):
        x, target = batches[step % 2]
        optimizer.zero_grad()
        expected = LOSSES[loss](twin(x), target)
        expected.backward()
        optimizer.step()
        assert_close(engine.step(x, target), expected, 1e-11)  # as close as the parameters it starts from
    assert_same(stepping, twin, 1e-11)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.01)


def batch(net: nn.Sequential, loss: str, data: st.DataObject) -> tuple[Tensor, Tensor]:
    """1 to 9 rows in any layout; a target between 0 and 1, of class indices or probabilities for cross-entropy."""
    rows, outputs = data.draw(st.integers(1, 9), "rows"), net[-1].out_features
    x = torch.randn(rows, net[0].in_features, dtype=torch.float64) * data.draw(st.sampled_from([1.0, 0.0, 5.0]))
    target = torch.rand(rows, outputs, dtype=torch.float64)
    if loss == "cross_entropy":
        target = torch.softmax(target, 1) if data.draw(st.booleans()) else torch.randint(outputs, (rows,))
    layouts = st.sampled_from(LAYOUTS)
    return laid_out(x, data.draw(layouts)), laid_out(target, data.draw(layouts))


@settings(SHARE, max_examples=60)
@given(drawn=nets(), data=st.data())
def test_net(drawn: tuple[nn.Sequential, str], data: st.DataObject) -> None:
    check_net(drawn, data)


@pytest.mark.slow
@settings(SHARE, max_examples=5000)
@given(drawn=nets(), data=st.data())
def test_net_at_length(drawn: tuple[nn.Sequential, str], data: st.DataObject) -> None:
    check_net(drawn, data)
