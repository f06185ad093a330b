"""mm.trace: its numbers against the lecture's closed form and autograd, and what it prints against its numbers."""

import json
import math
import re
from collections.abc import Callable

import pytest
import torch
from matplotlib.mathtext import MathTextParser
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp import formulas as sheet
from manual_mlp.formulas import Row
from manual_mlp.tracing import WIDTH, _latex, steepest
from tests.cases import rows

double = torch.float64
LOSSES = tuple(sheet.COSTS)


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=double)


def chain(activation: str = "sigmoid", output_activation: str = "sigmoid") -> mm.MLP:
    """The lecture's simple network: one neuron a layer, two hidden layers."""
    net = mm.MLP([1, 1, 1, 1], activation, output_activation, dtype=double)
    for parameter, value in zip(net.parameters(), (0.8, 0.1, -1.2, 0.3, 1.5, -0.4), strict=True):
        nn.init.constant_(parameter, value)
    return net


def test_the_lectures_chain() -> None:
    """Every number against the closed form of "Gradientenberechnung II" to "VI", in Python's own numbers."""
    (w1, b1, w2, b2, w3, b3), x, target, rate = (0.8, 0.1, -1.2, 0.3, 1.5, -0.4), 0.5, 1.0, 2.0
    G = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    slope = lambda z: G(z) * (1 - G(z))  # noqa: E731
    z2 = w1 * x + b1
    z3 = w2 * G(z2) + b2
    z4 = w3 * G(z3) + b3
    a2, a3, a4 = G(z2), G(z3), G(z4)
    # ∂C/∂w^{L−1} = (a^L − ŷ) G′(z^L) a^{L−1}, and upstream by the chain rule
    to_w3 = (a4 - target) * slope(z4) * a3
    to_w2 = (a4 - target) * slope(z4) * w3 * slope(z3) * a2
    to_w1 = (a4 - target) * slope(z4) * w3 * slope(z3) * w2 * slope(z2) * x
    deltas = {4: to_w3 / a3, 3: to_w2 / a2, 2: to_w1 / x}

    trace = mm.trace(chain(), tensor([x]), tensor([target]), lr=rate)
    expected = {
        "z": {2: z2, 3: z3, 4: z4},
        "a": {1: x, 2: a2, 3: a3, 4: a4},
        "slope": {2: slope(z2), 3: slope(z3), 4: slope(z4)},
        "delta": deltas,
        "weight": {1: w1, 2: w2, 3: w3},
        "bias": {1: b1, 2: b2, 3: b3},
        "grad_weight": {1: to_w1, 2: to_w2, 3: to_w3},
        "grad_bias": {1: deltas[2], 2: deltas[3], 3: deltas[4]},
        "new_weight": {1: w1 - rate * to_w1, 2: w2 - rate * to_w2, 3: w3 - rate * to_w3},
        "new_bias": {1: b1 - rate * deltas[2], 2: b2 - rate * deltas[3], 3: b3 - rate * deltas[4]},
    }
    assert trace.cost.item() == pytest.approx((a4 - target) ** 2 / 2, rel=1e-14)
    for name, values in expected.items():
        traced = getattr(trace, name)
        assert list(traced) == sorted(values), name
        for layer, value in values.items():
            assert traced[layer].numel() == 1
            assert traced[layer].item() == pytest.approx(value, rel=1e-13), (name, layer)


def test_the_tables_come_last() -> None:
    """Of single numbers they hold the numbers: the norm of W² = -1.2 would hide the sign."""
    text = str(mm.trace(chain(), [0.5], [1.0]))
    assert text.index("w² = -1.2") < text.index("5. update") < text.index("  l  from")
    assert re.search(r"^  2  -1.2 +0.3 +-0.02499", text, re.MULTILINE)
    assert re.search(r"^  3  2     affine  sigmoid  -0.44695 +0.39009 +-0.040147 +0 %$", text, re.MULTILINE)


def by_autograd(model: nn.Module, x: Tensor, target: Tensor, loss: str) -> dict[str, list[Tensor]]:
    """z, a and δ of the layers of torch's own copy of the net, and the gradients of its parameters."""
    zs, activations, a = [], [], x
    for layer in model:
        if isinstance(layer, nn.Linear):
            if zs and len(activations) < len(zs):
                activations.append(a)
            a = layer(a)
            a.retain_grad()
            zs.append(a)
        else:
            a = layer(a)
            activations.append(a)
    if len(activations) < len(zs):
        activations.append(a)
    mm.functional.COSTS[loss](a, target).backward()
    return {
        "z": zs,
        "a": [x, *activations],
        "delta": [z.grad for z in zs],
        "grad_weight": [layer.weight.grad for layer in model if isinstance(layer, nn.Linear)],
        "grad_bias": [layer.bias.grad for layer in model if isinstance(layer, nn.Linear)],
    }


@pytest.mark.parametrize("loss", LOSSES)
@rows
def test_equals_autograd(row: Row, loss: str) -> None:
    make = row.twin
    model = nn.Sequential(nn.Linear(4, 5), make(), nn.Linear(5, 3), nn.Linear(3, 6), make(), nn.Linear(6, 3)).double()
    x, target = torch.randn(7, 4, dtype=double), torch.rand(7, 3, dtype=double)
    if loss == "cross_entropy":
        target = torch.randint(3, (7,))
    trace = mm.trace(model, x, target, loss)
    for name, values in by_autograd(model, x, target, loss).items():
        traced = getattr(trace, name)
        assert len(traced) == len(values)
        for mine, theirs in zip(traced.values(), values, strict=True):
            assert not mine.requires_grad
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(trace.cost, mm.functional.COSTS[loss](model(x), target), rtol=1e-12, atol=1e-12)
    for row, layer in zip((model[1], model[4]), (2, 4), strict=True):
        z = trace.z[layer].requires_grad_()
        (slope,) = torch.autograd.grad(row(z).sum(), z)
        torch.testing.assert_close(trace.slope[layer], slope, rtol=1e-12, atol=1e-12)


def test_converted_nested_and_without_bias() -> None:
    plain = nn.Sequential(
        nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh()), nn.Identity(), nn.Dropout(0.0), nn.Linear(3, 1)
    )
    x, target = torch.randn(4, 2), torch.randn(4, 1)
    before = mm.trace(plain, x, target)
    after = mm.trace(mm.convert(plain), x, target)
    assert before.to_dict() == after.to_dict()
    assert before.bias[1] is before.grad_bias[1] is before.new_bias[1] is None
    assert "b¹" not in str(before)
    assert "b²" in str(before)


def test_dropout_draws_what_training_draws() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x, target = torch.randn(5, 3, dtype=double), torch.randn(5, 2, dtype=double)
    torch.manual_seed(1)
    trace = mm.trace(mm.convert(model), x, target)
    torch.manual_seed(1)
    mm.QuadraticLoss()(model(x), target).backward()
    torch.testing.assert_close(trace.grad_weight[1], model[0].weight.grad, rtol=1e-12, atol=1e-12)
    assert (trace.a[2] == 0).any()
    assert "a² = tanh(z²) ⊙ m²/(1 − p)" in str(trace)
    assert "⊙ m²" not in str(mm.trace(model.eval(), x, target))


def test_a_list_and_one_sample() -> None:
    """x (n_1,) with ŷ (n_L,) or a class index is a batch of one; lists take the net's dtype."""
    net = mm.MLP([2, 3, 2], output_activation="identity", dtype=double)
    batch = mm.trace(net, tensor([0.5, -1.0]), tensor([1.0, 0.0]))
    assert batch.to_dict() == mm.trace(net, [0.5, -1], [1, 0]).to_dict()
    by_class = mm.trace(net, [0.5, -1], 1, "cross_entropy")
    assert by_class.to_dict() == mm.trace(net, [[0.5, -1]], [1], "cross_entropy").to_dict()
    assert torch.equal(by_class.target, tensor([0, 1]))


def test_is_a_copy() -> None:
    """Training goes on, the trace stays; and tracing changes nothing."""
    net = mm.MLP([2, 3, 1], dtype=double)
    x, target = torch.randn(4, 2, dtype=double), torch.rand(4, 1, dtype=double)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trace = mm.trace(net, x, target)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    kept = json.dumps(trace.to_dict())
    mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0)).step(x, target)
    x.zero_()
    assert json.dumps(trace.to_dict()) == kept
    stepped = next(iter(net.parameters()))
    torch.testing.assert_close(stepped, trace.new_weight[1], rtol=1e-12, atol=1e-12)


def test_saturation() -> None:
    """|G′| below 1 % of its maximum: sigmoid beyond |z| = 5.98, relu where it is dead, of silu's 1.0998."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    x = tensor(0.0, 5.97, 5.99, -5.99).unsqueeze(1)
    assert mm.trace(net, x, torch.zeros_like(x)).saturation == {2: 0.5}
    net[1] = nn.ReLU()
    assert mm.trace(net, x, torch.zeros_like(x)).saturation == {2: 0.5}
    net[1] = nn.SiLU()
    assert steepest(sheet.ACTIVATIONS["silu"]) == pytest.approx(1.0998, abs=1e-4)
    assert steepest(sheet.ACTIVATIONS["sigmoid"]) == 0.25
    assert steepest(sheet.ACTIVATIONS["softplus"].bind(0.001, 20.0)) == pytest.approx(1)
    assert steepest(sheet.ACTIVATIONS["leaky_relu"].bind(3.0)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------

OPERATORS = {"·": "*", "−": "-", "½ ": "0.5*", ")²": ")**2", "σ": "sigmoid"}
FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "tanh": math.tanh,
    "softplus": lambda z: math.log(1 + math.exp(z)),
    "softmax": lambda z: 1.0,  # of one class
    "log_softmax": lambda z: 0.0,
    "Σ": lambda z: z,  # of one class
}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_line_of_the_chain_is_true(loss: str) -> None:
    """The expression with numbers in it, computed, is the value at the line's end: the texts of the costs are true."""
    net = chain("tanh", "identity" if sheet.COSTS[loss].logits else "sigmoid")
    checked = []
    for line in (
        line
        for _, step in mm.trace(net, [0.5], [1.0 if loss == "cross_entropy" else 0.7], loss, lr=0.5)._steps()
        for line in step
    ):
        expression = line.numbers
        for symbol, operator in OPERATORS.items():
            expression = expression.replace(symbol, operator)
        if re.search(r"\d", expression):
            value = eval(expression, {**FUNCTIONS})
            assert value == pytest.approx(line.value.item(), rel=1e-3, abs=1e-5), line  # of numbers of five digits
            checked.append(line.symbol)
    assert {"z²", "a²", "z⁴", "C", "δ⁴", "δ³", "δ²", "∂C/∂w³", "∂C/∂w¹", "new w³", "new b¹"} <= set(checked)


def test_order_of_the_chain() -> None:
    text = str(mm.trace(chain(), [0.5], [1.0]))
    symbols = re.findall(r"^   (\S+|new \S+) = ", text, re.MULTILINE)
    positions = [symbols.index(symbol) for symbol in ("z²", "a²", "z⁴", "C", "δ⁴", "δ³", "δ²", "∂C/∂w³", "new w¹")]
    assert positions == sorted(positions)
    assert "z² = w¹ · a¹ + b¹ = 0.8 · 0.5 + 0.1 = 0.5\n" in text
    assert "δ⁴ = (a⁴ − ŷ) · sigmoid′(z⁴) = (0.54615 − 1) · 0.24787 = -0.1125\n" in text


def test_han_and_kamber_as_printed() -> None:
    """Data Mining, the backpropagation example: the book's numbers are read off the printed trace."""
    net = mm.MLP([3, 2, 1], dtype=double)
    weights = {"0.weight": [[0.2, 0.4, -0.5], [-0.3, 0.1, 0.2]], "0.bias": [-0.4, 0.2]}
    net.load_state_dict(
        {name: torch.tensor(value) for name, value in {**weights, "2.weight": [[-0.3, -0.2]], "2.bias": [0.1]}.items()}
    )
    text = str(mm.trace(net, [1, 0, 1], [1], lr=0.9))
    for line in (
        "a² = sigmoid(z²) = [0.3318  0.525]",
        "δ³ = 1/N (a³ − ŷ) ⊙ sigmoid′(z³) = -0.13117",
        "δ² = (δ³ W²) ⊙ sigmoid′(z²) = [0.008725  0.006542]",
        "new W² = W² − LR · ∂C/∂W² = [-0.2608  -0.138]",
        "new W¹ = W¹ − LR · ∂C/∂W¹ =\n      [ 0.1921      0.4  -0.5079]\n      [-0.3059      0.1   0.1941]",
    ):
        assert line in text


def test_fits_80_columns_and_leaves_out_what_is_large() -> None:
    nets = {
        (784, 512, 512, 10): False,
        (6, 6, 6): True,
        (7, 2): False,
        (1,) * 40: True,
    }
    for sizes, small in nets.items():
        net = mm.MLP(list(sizes), "leaky_relu", "identity", dtype=double)
        for n in (1, 6, 7):
            x = 1e-7 * torch.randn(n, sizes[0], dtype=double)
            text = str(mm.trace(net, x, -1e5 * torch.rand(n, sizes[-1], dtype=double)))
            assert max(map(len, text.splitlines())) <= WIDTH
            assert ("forward pass" in text) == (small and n < 7)
            assert repr(mm.trace(net, x, x.new_zeros(n, sizes[-1])))


def test_markdown_and_latex() -> None:
    trace = mm.trace(chain(), [0.5], [1.0])
    markdown = trace.to_markdown()
    assert "| 2 | 1 | affine | sigmoid | 0.5 | 0.62246 | 0.011322 | 0 % |" in markdown
    assert {line.count("|") for line in markdown.splitlines() if line.startswith("|")} == {6, 9}
    assert markdown.count("```") == 2
    assert "```" not in mm.trace(mm.MLP([9, 1]), torch.zeros(1, 9), torch.zeros(1, 1)).to_markdown()

    latex = trace.to_latex()
    assert r"\delta ^{3} &= w^{3} \cdot  \delta ^{4} \cdot  \operatorname{sigmoid}'(z^{3}) = 1.5" in latex
    assert not re.search(r"[^\x00-\x7f]", latex)
    assert latex.count("{") == latex.count("}")
    parse = MathTextParser("path").parse
    for line in re.findall(r"^.*&= .*$", latex, re.MULTILINE):
        parse(f"${line.removesuffix(' ' + chr(92) * 2).replace('&', '').replace('tfrac', 'frac')}$")
    assert _latex("Σ −ŷ · log softmax(a³)") == r"\sum  -\hat{y} \cdot  \operatorname{log} \operatorname{softmax}(a^{3})"
    assert r"\begin{pmatrix}" in mm.trace(mm.MLP([2, 2]), [1, 0], [1, 0]).to_latex()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a convolution": (lambda: mm.trace(nn.Sequential(nn.Conv1d(1, 1, 1)), [[1.0]], [[1.0]]), "affine maps, each with"),
    "two activations": (
        lambda: mm.trace(nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Tanh()), [[1.0]], [[1.0]]),
        "got Tanh at '2'",
    ),
    "no module": (lambda: mm.trace(torch.relu, [[1.0]], [[1.0]]), "expected a model"),  # type: ignore[arg-type]
    "a layer twice": (lambda: mm.trace(nn.Sequential(*[nn.Linear(1, 1)] * 2), [[1.0]], [[1.0]]), "twice, a tied one"),
    "a loss": (lambda: mm.trace(nn.Linear(1, 1), [[1.0]], [[1.0]], "hinge"), "expected a loss, one of"),
    "logits": (lambda: mm.trace(mm.MLP([1, 1]), [[1.0]], [[1.0]], "bce"), "gives logits"),
    "no sample": (lambda: mm.trace(mm.MLP([1, 1]), torch.zeros(0, 1), torch.zeros(0, 1)), "at least one row"),
    "a shape": (lambda: mm.trace(mm.MLP([1, 1]), [[1.0, 2.0]], [[1.0]]), r"an input of shape \(N, 1\)"),
    "a dtype": (lambda: mm.trace(mm.MLP([1, 1]), tensor([1.0]), tensor([1.0])), r"\(N, 1\) and torch.float32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(mm.InputError, match=message):
        call()
