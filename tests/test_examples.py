"""Published examples, worked by hand by somebody else: their printed digits are the tolerance."""

import math

import pytest
import torch
from torch import Tensor

import manual_mlp as mm
from manual_mlp import formulas as sheet

F = mm.functional


def tensor(*values: object) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def close(actual: Tensor, expected: object, tolerance: float) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= tolerance)


def mlp(*layers: tuple[object, object], output_activation: str = "sigmoid") -> mm.MLP:
    """A sigmoid net with these weights [out, in] and biases."""
    weights = [tensor(weight) for weight, _ in layers]
    sizes = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    net = mm.MLP(sizes, "sigmoid", output_activation, dtype=torch.float64)
    for index, (weight, bias) in enumerate(layers):
        net.load_state_dict({f"{2 * index}.weight": tensor(weight), f"{2 * index}.bias": tensor(bias)}, strict=False)
    return net


class TestHanKamber:
    """Han & Kamber, Data Mining: Concepts and Techniques, the backpropagation example; 3-2-1, LR 0.9."""

    x, target, rate = tensor([[1, 0, 1]]), tensor([[1]]), 0.9

    def net(self) -> mm.MLP:
        return mlp(([[0.2, 0.4, -0.5], [-0.3, 0.1, 0.2]], [-0.4, 0.2]), ([[-0.3, -0.2]], [0.1]))

    def deltas(self, update_first: bool = False) -> tuple[Tensor, Tensor]:
        """δ^3 and δ^2 by the sheet; with the mistake of updating W^2 before δ^2 is taken through it."""
        W1, b1, W2, b2 = (parameter.detach() for parameter in self.net().parameters())
        a2 = sheet.sigmoid(sheet.affine(self.x, W1, b1))
        a3 = sheet.sigmoid(sheet.affine(a2, W2, b2))
        delta3 = sheet.sigmoid_delta(sheet.quadratic_delta(a3, self.target), a3)
        if update_first:
            W2 = W2 - self.rate * sheet.grad_weight(delta3, a2)
        return delta3, sheet.sigmoid_delta(sheet.grad_input(delta3, W2), a2)

    def test_forward(self) -> None:
        net = self.net()
        assert close(net[0](self.x), [[0.332, 0.525]], 1e-3)
        assert close(net(self.x), [[0.474]], 1e-3)

    def test_deltas(self) -> None:
        """The book's error is target − output: δ with the other sign."""
        delta3, delta2 = self.deltas()
        assert close(-delta3, [[0.1312]], 1e-4)
        assert close(-delta2, [[-0.0087, -0.0065]], 1e-4)

    def test_one_step(self) -> None:
        net = self.net()
        mm.QuadraticLoss()(net(self.x), self.target).backward()
        torch.optim.SGD(net.parameters(), lr=self.rate).step()
        after = net.state_dict()
        assert close(after["2.weight"], [[-0.261, -0.138]], 1e-3)
        assert close(after["0.weight"], [[0.192, 0.4, -0.508], [-0.306, 0.1, 0.194]], 1e-3)
        assert close(after["2.bias"], [0.218], 1e-3)
        assert close(after["0.bias"], [-0.408, 0.194], 1e-3)

    def test_the_update_comes_last(self) -> None:
        """Step 5 before step 3 moves δ^2 by far more than rounding; the layers take the old weights."""
        _, right = self.deltas()
        _, wrong = self.deltas(update_first=True)
        net = self.net()
        mm.QuadraticLoss()(net(self.x), self.target).backward()
        torch.testing.assert_close(net[0].bias.grad, right[0], rtol=1e-12, atol=1e-12)
        assert (right - wrong).abs().max() > 1e-3
        assert not close(-wrong, [[-0.0087, -0.0065]], 1e-4)


def test_scikit_learn_fit() -> None:
    """scikit-learn, sklearn/neural_network/tests/test_mlp.py, test_fit: log-loss, L2 penalty 0.1 on the weights."""
    net = mlp(([[0.1, 0.3, 0.5], [0.2, 0.1, 0.0]], [0.1, 0.1]), ([[0.1, 0.2]], [1.0]), output_activation="identity")
    x, target = tensor([[0.6, 0.8, 0.7]]), tensor([[0.0]])
    prediction = net(x)
    assert close(net[0](x), [[0.6791786992, 0.5744425168]], 1e-9)
    assert close(torch.sigmoid(prediction), [[0.7654520219]], 1e-9)
    penalty = 0.05 * sum(layer.weight.square().sum() for layer in (net[0], net[1]))
    (mm.BCEWithLogitsLoss()(prediction, target) + penalty).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    after = net.state_dict()
    expected = [[0.097999271, 0.1957545467], [0.2956656947, 0.0960060623], [0.4938324829, -0.0026196955]]
    assert close(after["0.weight"].t(), expected, 1e-9)
    assert close(after["2.weight"], [[0.0470121291, 0.1540291814]], 1e-9)
    assert close(after["0.bias"], [0.0983321184, 0.0962575778], 1e-9)
    assert close(after["2.bias"], [0.9234547978], 1e-9)


def test_cs231n_affine() -> None:
    """Stanford CS231n, assignment 1, affine_forward; its weights are [in, out]."""
    x = torch.linspace(-0.1, 0.5, 240, dtype=torch.float64).reshape(2, 120)
    weight = torch.linspace(-0.2, 0.3, 360, dtype=torch.float64).reshape(120, 3)
    bias = torch.linspace(-0.3, 0.1, 3, dtype=torch.float64)
    expected = [[1.49834967, 1.70660132, 1.91485297], [3.25553199, 3.5141327, 3.77273342]]
    assert close(F.affine(x, weight.t(), bias), expected, 1e-8)


def test_cs231n_sigmoid_neuron() -> None:
    """Stanford CS231n, lecture notes on backpropagation: σ(2 x₀ − 3 x₁ − 3)."""
    weight, bias, x = (
        values.requires_grad_() for values in (tensor([[2.0, -3.0]]), tensor([-3.0]), tensor([-1.0, -2.0]))
    )
    f = F.affine_activation(x, weight, bias, "sigmoid")
    grad_x, grad_weight, grad_bias = torch.autograd.grad(f.sum(), (x, weight, bias))
    assert close(f, [0.7310585786], 1e-9)
    assert close(grad_x, [0.3932239, -0.5898358], 1e-7)
    assert close(grad_weight, [[-0.1966119, -0.3932239]], 1e-7)
    assert close(grad_bias, [0.1966119], 1e-7)


def test_the_lectures_three_input_neuron() -> None:
    """z = x₁w₁ + x₂w₂ + x₃w₃, y = sigmoid(z)."""
    x, w = (0.5, -1.0, 2.0), (0.3, 0.8, -0.1)
    z = x[0] * w[0] + x[1] * w[1] + x[2] * w[2]
    assert F.affine(tensor(x), tensor([w])).item() == pytest.approx(z, abs=1e-15)
    y = F.affine_activation(tensor(x), tensor([w]), None, "sigmoid").item()
    assert y == pytest.approx(1 / (1 + math.exp(-z)), abs=1e-15)


def test_the_lectures_two_by_two_network() -> None:
    """w_{1,2} runs from x₁ to neuron 2: entry (2, 1) of W. Z = W X, and the lecture's δ and ∂C/∂w_{ij} = a_j δ_i."""
    w11, w12, w21, w22 = 0.1, 0.2, 0.3, 0.4
    x1, x2, t1, t2 = 1.5, -0.5, 1.0, 0.0
    layer = mm.AffineActivation(2, 2, "sigmoid", bias=False, dtype=torch.float64)
    layer.load_state_dict({"weight": tensor([[w11, w21], [w12, w22]])})
    prediction = layer(tensor([[x1, x2]]))
    z = (w11 * x1 + w21 * x2, w12 * x1 + w22 * x2)
    y = [1 / (1 + math.exp(-value)) for value in z]
    torch.testing.assert_close(prediction, tensor([y]), rtol=1e-12, atol=1e-12)
    mm.QuadraticLoss()(prediction, tensor([[t1, t2]])).backward()
    delta = [(y[0] - t1) * y[0] * (1 - y[0]), (y[1] - t2) * y[1] * (1 - y[1])]
    by_hand = tensor([[delta[0] * x1, delta[0] * x2], [delta[1] * x1, delta[1] * x2]])
    torch.testing.assert_close(layer.weight.grad, by_hand, rtol=1e-12, atol=1e-12)


class TestPerceptron:
    """Rosenblatt's rule converges on separable classes, and can't on XOR."""

    corners = tensor([[0, 0], [0, 1], [1, 0], [1, 1]])

    @pytest.mark.parametrize("target", [[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0]], ids=["and", "or", "nand"])
    def test_converges(self, target: list[int]) -> None:
        neuron = mm.Perceptron(2).double()
        mistakes = neuron.fit(self.corners, tensor(target).unsqueeze(-1))
        assert mistakes[-1] == 0
        assert len(mistakes) < 20
        assert torch.equal(neuron(self.corners).squeeze(-1), tensor(target))

    def test_one_step_by_hand(self) -> None:
        """From zero, x = (1, 1) with target 0 is answered 1: w := 0 + 0.5 (0 − 1) x."""
        neuron = mm.Perceptron(2).double()
        assert neuron.fit(tensor([[1, 1]]), tensor([[0]]), rate=0.5, max_epochs=1) == [1]
        assert torch.equal(neuron.affine.weight, tensor([[-0.5, -0.5]]))
        assert torch.equal(neuron.affine.bias, torch.tensor([-0.5], dtype=torch.float64))

    def test_xor_is_not_separable(self) -> None:
        mistakes = mm.Perceptron(2).double().fit(self.corners, tensor([0, 1, 1, 0]).unsqueeze(-1), max_epochs=200)
        assert len(mistakes) == 200
        assert min(mistakes) > 0

    def test_target_is_checked(self) -> None:
        with pytest.raises(mm.InputError, match="zeros and ones of shape"):
            mm.Perceptron(2).double().fit(self.corners, tensor([0, 1, 1, 2]).unsqueeze(-1))
