"""The lecture "Neural Networks – The essentials" in numbers: `python -m manual_mlp.lecture [folder for pictures]`.

Only data and first weights are written down here; every number that is printed has been computed by this package.
"""

import argparse
import copy
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp import formulas as sheet
from manual_mlp import plots

WIDTH = 80
EXPERIMENTS = {
    "perceptron": "Rosenblatt's rule converges",
    "xor": "a hidden layer separates what it can't",
    "universal_approximator": "Cybenko: error against width",
    "deep_sigmoid": "δ vanishes on its way upstream",
    "nielsen": "handwritten digits",
}
CORNERS, XOR = [[0, 0], [0, 1], [1, 0], [1, 1]], [[0], [1], [1], [0]]


class Slide(NamedTuple):
    """title: the lecture's. text: paragraphs; those that begin with a blank are left as they are."""

    title: str
    text: list[str]
    pictures: Mapping[str, Callable[[], Any]] = MappingProxyType({})  # by file name

    def __str__(self) -> str:
        return "\n\n".join([f"{self.title}\n{'─' * len(self.title)}", *map(_wrapped, self.text)])


def slides() -> Iterator[Slide]:
    """The lecture, slide by slide."""
    yield neuron()
    yield network()
    yield history()
    yield from chain()
    yield general()
    yield learning()
    yield onwards()


def neuron() -> Slide:
    x, w = _tensor([0.5, -1.0, 2.0]), _tensor([0.3, 0.8, -0.1])
    z = sheet.affine(x, w)
    sums = " + ".join(f"({a:g}) · ({weight:g})" for a, weight in zip(x.tolist(), w.tolist(), strict=True))
    answers = {
        "linear neuron": ("y = z", z),
        "threshold neuron": ("y = 1 where z ≥ 0, else 0", sheet.threshold(z)),
        "logistic neuron": ("y = sigmoid(z)", sheet.sigmoid(z)),
    }
    return Slide(
        "The smallest building block of an ANN: The Neuron",
        [
            "A neuron weighs its inputs and adds them up, z = x₁ · w₁ + x₂ · w₂ + x₃ · w₃, the scalar product of two "
            "vectors:",
            f"   z = {sums} = {z.item():.4g}",
            "So far that is linear. Its activation makes of z what the neuron gives to others:",
            "\n".join(f"   {name:<18} {formula:<27} = {y.item():.4g}" for name, (formula, y) in answers.items()),
        ],
    )


def network() -> Slide:
    W, x = _tensor([[0.1, 0.3], [0.2, 0.4]]), _tensor([1.5, -1.0])
    z = sheet.affine(x, W)
    return Slide(
        "Combining the Neurons to a Network",
        [
            "Weight w₁,₂ runs from x₁ to neuron 2, so it stands in row 2, column 1 of W. All neurons at once are "
            "a matrix times a vector:",
            f"   W = {_rows(W)}   X = {_rows(x)}   Z = W X = {_rows(z)}\n   Y = sigmoid(Z) = {_rows(sheet.sigmoid(z))}",
            "A batch of N samples is a matrix with a sample in each row, as torch stores it: Z = X Wᵀ.",
        ],
    )


def history() -> Slide:
    corners = _tensor(CORNERS)
    mistakes = {}
    for name, target in (("AND", [[0], [0], [0], [1]]), ("XOR", XOR)):
        mistakes[name] = mm.Perceptron(2).double().fit(corners, _tensor(target), max_epochs=100)
    return Slide(
        "History of ANNs",
        [
            "Rosenblatt's perceptron learns by w += LR (ŷ − y) x, sample by sample, and needs no derivative. Its "
            "mistakes in each epoch over the four corners of a square:",
            f"   AND  {', '.join(map(str, mistakes['AND']))}: converged, as the Convergence Theorem (1962) says\n"
            f"   XOR  {', '.join(map(str, mistakes['XOR'][:8]))}, … and never fewer than {min(mistakes['XOR'])} "
            f"in {len(mistakes['XOR'])} epochs",
            "No straight line separates XOR (Minsky and Papert, 1969). A hidden layer does: but how do its weights "
            "learn, when nobody says what a hidden neuron should have answered?",
        ],
    )


def chain() -> Iterator[Slide]:
    """The simple network, one neuron a layer, through the five steps."""
    net = mm.MLP([1, 1, 1, 1], dtype=torch.float64)
    for parameter, value in zip(net.parameters(), (0.8, 0.1, -1.2, 0.3, 1.5, -0.4), strict=True):
        nn.init.constant_(parameter, value)
    trace = mm.trace(net, [0.5], [1.0])
    steps = list(trace.steps().values())
    yield Slide(
        "Einfaches Modell eines MLP",
        [
            "1 input neuron, 2 hidden layers of one neuron each, 1 output neuron. W^l and b^l lead from layer l to "
            "layer l + 1; z^l goes into the neuron of layer l, a^l comes out of it; y = a⁴, and ŷ is the true answer.",
            steps[0],
            "Step 1, the forward pass, keeps every z and a:",
            steps[1],
        ],
        {"network.png": lambda: plots.network(trace)},
    )
    yield Slide(
        "Gradientenberechnung",
        [
            'Wanted: ∂C/∂w, for every w. The strategy is to go "from right to left": the chain rule gives '
            "∂C/∂w³ = ∂C/∂a⁴ · ∂a⁴/∂z⁴ · ∂z⁴/∂w³ = (a⁴ − ŷ) · G′(z⁴) · a³. The first two factors are δ⁴. Step 2:",
            steps[2],
            "Step 3: upstream, each δ is the one to its right, times the weight between them, times G′. δ¹ is not "
            "needed, as no weight leads into the input.",
            steps[3],
            "Step 4: a gradient is δ downstream of the weight times a upstream of it.",
            steps[4],
            _nudged(net, trace),
        ],
        {"flow.png": lambda: plots.flow(trace)},
    )
    mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=trace.lr)).step(trace.a[1], trace.target)
    after = mm.trace(net, [0.5], [1.0])
    yield Slide(
        "Zusammenfassung",
        [
            "Step 5: w := w − LR · ∂C/∂w, after every δ was computed with the old weights.",
            steps[5],
            f"The same sample again: y was {trace.a[4].item():.4f} and is {after.a[4].item():.4f}, C was "
            f"{trace.cost.item():.4f} and is {after.cost.item():.4f}. Learning is nothing but these five steps, "
            "again and again.",
        ],
    )


def general() -> Slide:
    trace = mm.trace(_xor_net(), CORNERS, XOR)
    shown = trace.steps()
    shapes = [
        f"   l = {layer}   a {_shape(trace.a[layer])}   δ {_shape(trace.delta[layer])}   "
        f"W^{layer - 1} {_shape(trace.weight[layer - 1])}   ∂C/∂W^{layer - 1} {_shape(trace.grad_weight[layer - 1])}"
        for layer in trace.delta
    ]
    return Slide(
        "Backpropagation für generelle MLPs",
        [
            "With more neurons the numbers become vectors, with N samples matrices of N rows. Nothing else changes: "
            "· between δ and G′ becomes ⊙, element by element, and δ · a the dyadic product, summed over the batch. "
            "XOR's four corners through a net of 2-2-1:",
            "\n".join(shapes),
            shown["2. output error"],
            shown["3. right to left"],
            shown["4. gradients"],
        ],
    )


def learning() -> Slide:
    """Steps 1 to 5, repeated by the engine."""
    net, seen, stages = _xor_net(), [], {}
    engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=5.0))
    for step in range(2001):
        if step in (0, 100, 500, 2000):
            trace = mm.trace(net, CORNERS, XOR)
            answers = "  ".join(f"{y:.2f}" for y in trace.a[3].flatten())
            seen.append(f"   {step:>5}  {trace.cost.item():.4f}  {answers}")
            stages[f"step {step}"] = _classes(net)
        engine.step(_tensor(CORNERS), _tensor(XOR))
    return Slide(
        "Learnings!",
        [
            "The five steps with LR = 5 on XOR, which the perceptron could not learn:",
            "    step       C  y of (0,0) (0,1) (1,0) (1,1)\n" + "\n".join(seen),
        ],
        {
            "xor.png": lambda: plots.decision_boundary(
                stages, _tensor(CORNERS).numpy(), _tensor(XOR).flatten().numpy(), ("equal", "different")
            )
        },
    )


def onwards() -> Slide:
    experiments = "\n".join(f"   experiment={name:<24}{what}" for name, what in EXPERIMENTS.items())
    return Slide("And on", ["The same lecture as training runs, each with its figure: python train.py …", experiments])


def _nudged(net: nn.Module, trace: mm.Trace) -> str:
    """The gradient of w¹ by its definition: how much C moves when w¹ does."""
    step, weight = 1e-6, next(net.parameters())
    costs = []
    for change in (step, -2 * step, step):
        with torch.no_grad():
            weight.add_(change)
        costs.append(mm.trace(net, trace.a[1], trace.target).cost.item())
    quotient = (costs[0] - costs[1]) / (2 * step)
    return (
        f"Is it true? Move w¹ by ±{step:g} and look at C: it changes by {quotient:.8f} times as much, and "
        f"∂C/∂w¹ = {trace.grad_weight[1].item():.8f}."
    )


def _xor_net() -> mm.MLP:
    net = mm.MLP([2, 2, 1], dtype=torch.float64)
    values = {"0.weight": [[1.0, -1.2], [-0.9, 1.1]], "0.bias": [0.1, -0.2], "2.weight": [[0.7, 0.8]], "2.bias": [-0.5]}
    net.load_state_dict({name: _tensor(value) for name, value in values.items()})
    return net


def _classes(net: nn.Module) -> Callable[[Any], Any]:
    """As the net is now: points (M, 2) ↦ classes (M,)."""
    now = copy.deepcopy(net)
    return lambda points: (now(_tensor(points)) > 0.5).long().flatten().numpy()


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _rows(values: Tensor) -> str:
    rows = values.tolist() if values.dim() == 2 else [values.tolist()]
    return ", ".join(f"[{'  '.join(f'{number:.4g}' for number in row)}]" for row in rows)


def _shape(values: Tensor) -> str:
    return f"({', '.join(map(str, values.shape))})"


def _wrapped(paragraph: str) -> str:
    return paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, WIDTH, break_on_hyphens=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m manual_mlp.lecture", description="The lecture, in numbers.")
    parser.add_argument("folder", type=Path, nargs="?", help="write the pictures to this folder")
    folder = parser.parse_args(arguments).folder
    for slide in slides():
        print(f"{slide}\n")
        for name, draw in slide.pictures.items() if folder else ():
            folder.mkdir(parents=True, exist_ok=True)
            draw().savefig(folder / name)
            print(f"picture: {folder / name}\n")


if __name__ == "__main__":
    main()
