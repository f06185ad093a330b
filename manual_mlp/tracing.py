"""Show one pass: z, a, δ and the gradients of every layer, in the order in which one works them out by hand."""

import functools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manual_mlp import checks, kernels, notation, tables
from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.grid_rules import Convolve, Pool
from manual_mlp.network import reading_of
from manual_mlp.program import Program, cost_of

WIDTH = 80
TITLES = ("given", "1. forward pass", "2. output error", "3. right to left", "4. gradients", "5. update")
SMALL = 6  # rows and neurons of a layer up to which the numbers themselves are printed
SATURATED = 0.01  # of the largest |G′|
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


class Written(NamedTuple):
    """z^l of a rule, what it sends back for δ^l, and its gradients; {W} and {b} are its own, if it has them."""

    z: str
    back: str
    weight: str = ""
    bias: str = "Σ {δ}"


SCALAR = Written("{W} · {a}", "{W} · {δ}", "{δ} · {a}", "{δ}")
_NORM = Written("{W} ⊙ norm({a})", "r P({W} ⊙ {δ})", "Σ {δ} ⊙ norm({a})")
WRITTEN = {  # by Layer.rule
    "affine": Written("{a} ({W})ᵀ", "{δ} {W}", "({δ})ᵀ {a}"),
    "sum": Written("{a}", "{δ}"),
    "convolution": Written("{a} ∗ {W}", "{δ} ∗ᵀ {W}", "{δ} ∗ {a}"),
    "max pool": Written("max({a})", "maxᵀ({δ})"),
    "mean pool": Written("mean({a})", "meanᵀ({δ})"),
    "reshape": Written("reshape({a})", "reshape({δ})"),
    "batch norm": _NORM,
    "layer norm": _NORM,
    "running norm": _NORM._replace(back="r {W} ⊙ {δ}"),
    "softmax": Written("softmax({a})", "{z} ⊙ ({δ} − Σ {δ} ⊙ {z})"),
}
LATEX: dict[Any, Any] = {
    **{"δ": r"\delta ", "∂": r"\partial ", "σ": r"\sigma ", "Σ": r"\sum ", "ŷ": r"\hat{y}", "½": r"\tfrac{1}{2} "},
    **{"⊙": r"\odot ", "·": r"\cdot ", "ᵀ": r"^{\top}", "−": "-", "′": "'", "‖": r"\|"},
    **{"γ": r"\gamma ", "β": r"\beta ", "∗": r"\ast "},
}


def up(index: int) -> str:
    """Return ² for 2."""
    return str(index).translate(str.maketrans("0123456789", SUPERSCRIPTS))


class Line(NamedTuple):
    """symbol = formula = value, as in z² = w¹ · a¹ + b¹ = 0.3; numbers: the formula with numbers in it, or ""."""

    symbol: str
    formula: str
    numbers: str
    value: Tensor


@dataclass(frozen=True, repr=False)
class Trace:
    """All that one pass computed, in containers indexed by the sheet's l, from 1 for the input to L for the prediction.

    z, delta, slope      z^l, δ^l = ∂C/∂z^l, G′(z^l), (N, n_l), l = 2 … L; δ includes the 1/N of the cost
    a                    a^l, (N, n_l), l = 1 … L, after the dropout of that layer, if it draws
    weight, bias         W^l (n_{l+1}, n_l) and b^l (n_{l+1},) or None, copies, l = 1 … L−1
    grad_weight, grad_bias   ∂C/∂W^l and ∂C/∂b^l
    new_weight, new_bias     W^l − LR ∂C/∂W^l and b^l − LR ∂C/∂b^l
    saturation           the share of the N n_l values of |G′(z^l)| below 1 % of its maximum over all z
    activation, drops    G's name, and whether dropout drew a mask, l = 2 … L
    reads                the layers whose a a layer reads, l = 2 … L: (l − 1,) in a chain
    rule                 the name of what gives z^l: affine, sum, convolution, max pool, batch norm, …, l = 2 … L
    cost                 C, a scalar tensor; target: ŷ, class indices as rows of 0 and 1

    A sum of branches is a layer z^l = Σ_k a^k without weights, and so is a pool. In a graph W^l and b^l lead to layer
    l+1 from the layer that it reads. W^l of a convolution are its kernels; W^l and b^l of a norm are its γ and β.

    `print` gives the numbers step by step, if no layer and no batch is larger than 6; then two tables, of shapes,
    norms and saturation.

    >>> import torch, manual_mlp as mm
    >>> net = mm.MLP([1, 1], activation="identity", output_activation="identity")
    >>> for parameter in net.parameters():
    ...     _ = torch.nn.init.constant_(parameter, 0.5)
    >>> traced = mm.trace(net, [2.0], [1.0], lr=0.1)
    >>> traced.z[2].item(), traced.delta[2].item(), traced.grad_weight[1].item()  # ∂C/∂W = δ a
    (1.5, 0.5, 1.0)
    >>> round(traced.new_weight[1].item(), 4)  # 0.5 − 0.1 · 1
    0.4
    """

    sizes: list[int]
    loss: str
    lr: float
    cost: Tensor
    target: Tensor
    activation: dict[int, str]
    drops: dict[int, bool]
    reads: dict[int, tuple[int, ...]]
    rule: dict[int, str]
    z: dict[int, Tensor] = field(default_factory=dict)
    a: dict[int, Tensor] = field(default_factory=dict)
    slope: dict[int, Tensor] = field(default_factory=dict)
    delta: dict[int, Tensor] = field(default_factory=dict)
    saturation: dict[int, float] = field(default_factory=dict)
    weight: dict[int, Tensor] = field(default_factory=dict)
    bias: dict[int, Tensor | None] = field(default_factory=dict)
    grad_weight: dict[int, Tensor] = field(default_factory=dict)
    grad_bias: dict[int, Tensor | None] = field(default_factory=dict)
    new_weight: dict[int, Tensor] = field(default_factory=dict)
    new_bias: dict[int, Tensor | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as numbers, lists and dicts, for json.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], activation="identity", output_activation="identity")
        >>> for parameter in net.parameters():
        ...     _ = torch.nn.init.constant_(parameter, 0.5)
        >>> mm.trace(net, [2.0], [1.0]).to_dict()["delta"]
        {2: [[0.5]]}
        """

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return value.tolist() if isinstance(value, Tensor) else value

        return {name: plain(value) for name, value in vars(self).items()}

    def steps(self) -> dict[str, str]:
        """Return the text of each step by its title, "given" to "5. update"; none if the net or batch is too large.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], activation="identity", output_activation="identity")
        >>> for parameter in net.parameters():
        ...     _ = torch.nn.init.constant_(parameter, 0.5)
        >>> print(mm.trace(net, [2.0], [1.0]).steps()["4. gradients"])
           ∂C/∂w¹ = δ² · a¹ = 0.5 · 2 = 1
           ∂C/∂b¹ = δ² = 0.5
        """
        return {title: self._text_step(title, lines) for title, lines in self._steps()}

    def __str__(self) -> str:
        printed = map(tables.text, self._tables())
        return "\n\n".join([textwrap.fill(self._title(), WIDTH), *self._titled_steps(), *printed])

    __repr__ = __str__

    def to_markdown(self) -> str:
        """Return the same with the steps as a block of text and the tables in Markdown.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], activation="identity", output_activation="identity")
        >>> for parameter in net.parameters():
        ...     _ = torch.nn.init.constant_(parameter, 0.5)
        >>> print(mm.trace(net, [2.0], [1.0]).to_markdown().splitlines()[0])
        1-1, quadratic cost, N = 1: C = 0.125
        """
        steps = "\n\n".join(self._titled_steps())
        return "\n\n".join(
            [self._title()] + [f"```text\n{steps}\n```"] * bool(steps) + [*map(tables.markdown, self._tables())]
        )

    _repr_markdown_ = to_markdown  # what a notebook shows

    def to_latex(self) -> str:
        r"""Return for small nets an align* environment, and arrays; for amsmath, MathJax and KaTeX.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], activation="identity", output_activation="identity")
        >>> for parameter in net.parameters():
        ...     _ = torch.nn.init.constant_(parameter, 0.5)
        >>> print(*[line for line in mm.trace(net, [2.0], [1.0]).to_latex().split("\n") if line[:2] == "C "])
        C &= \tfrac{1}{2}  (a^{2} - \hat{y})^{2} = \tfrac{1}{2}  (1.5 - 1)^{2} = 0.125 \\
        """
        arrays = [f"\\[\n{tables.latex(_latex_cells(table))}\n\\]" for table in self._tables()]
        lines = []
        for title, step in self._steps():
            lines.append(rf"&\textbf{{{title}}}")
            lines += [rf"{_latex(line.symbol)} &= {' = '.join(_latex_sides(line))}" for line in step]
        body = " \\\\\n".join(lines)
        return "\n".join([f"\\begin{{align*}}\n{body}\n\\end{{align*}}"] * bool(lines) + arrays)

    def formulas(self) -> list[tuple[str, list[tuple[str, str, Any]]]]:
        """Return the givens and the five steps, by title: (symbol, formula, value) of all that each computes.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], activation="identity", output_activation="identity")
        >>> for parameter in net.parameters():
        ...     _ = torch.nn.init.constant_(parameter, 0.5)
        >>> mm.trace(net, [2.0], [1.0]).formulas()[4][1][0][:2]  # of step 4, the first line without its value
        ('∂C/∂w¹', 'δ² · a¹')
        """
        return list(zip(TITLES, self._formulas(), strict=True))

    # The tables and the steps, which the three forms share

    def _title(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, {self.loss} cost, N = {len(self.a[1])}: C = {self.cost.item():.5g}"

    def _tables(self) -> list[list[list[str]]]:
        """Return a row for each layer and for each W: what gives it, shapes and norms; of single numbers themselves."""
        bar, cell = ("", _value) if self._is_scalar else ("‖", _norm)

        def shape(values: Tensor) -> list[str]:
            return [_shape(values)] if bar else []

        headers = (f"{bar}{letter}^l{bar}" for letter in "zaδ")
        neurons = [["l", "from", "rule", *["shape"] * bool(bar), "G", *headers, "saturated"]]
        for layer, a in self.a.items():
            readings = " + ".join(map(str, self.reads.get(layer, ())))
            G = self.activation.get(layer, "") + " + dropout" * self.drops.get(layer, False)
            cells = map(cell, (self.z.get(layer), a, self.delta.get(layer)))
            saturated = f"{100 * self.saturation[layer]:.3g} %" if layer > 1 else ""
            neurons.append([str(layer), readings, self.rule.get(layer, ""), *shape(a), G, *cells, saturated])
        headers = (f"{bar}{letter}^l{bar}" for letter in ("W", "b", "∂C/∂W", "∂C/∂b"))
        weights = [["l", *["shape"] * bool(bar), *headers]]
        for layer, W in self.weight.items():
            cells = map(cell, (W, self.bias[layer], self.grad_weight[layer], self.grad_bias[layer]))
            weights.append([str(layer), *shape(W), *cells])
        return [neurons, weights]

    def _steps(self) -> list[tuple[str, list[Line]]]:
        """Return the five steps with their numbers; none if the net or batch is too large, or there are grids."""
        if max(len(self.a[1]), *self.sizes) > SMALL or any(a.dim() > 2 for a in self.a.values()):
            return []
        known: dict[str, Tensor] = {"LR": torch.tensor(self.lr, dtype=torch.float64)}
        steps: list[tuple[str, list[Line]]] = []
        for title, part in self.formulas():
            step = []
            for symbol, formula, value in part:
                numbers = _substituted(formula, known) if self._is_scalar else ""
                step.append(Line(symbol, formula, numbers, value))
                known[symbol] = value
            steps += [(title, step)] if step else []
        return steps

    @property
    def _is_scalar(self) -> bool:
        """Return True for one sample through one neuron a layer: numbers, as the lecture first writes the formulas."""
        return len(self.a[1]) == 1 and {*self.sizes} == {1} and self._is_dense and not any(self.drops.values())

    @property
    def _is_dense(self) -> bool:
        """Return True for a net of affine maps and sums alone."""
        return {*self.rule.values()} <= {"affine", "sum"}

    def _formulas(self) -> Iterator[list[tuple[str, str, Any]]]:
        """Yield the parts of `formulas`, without their titles."""
        scalar, last = self._is_scalar, len(self.sizes)
        biases = {layer: bias for layer, bias in self.bias.items() if bias is not None}
        given = [("x", "", self.a[1]), ("ŷ", "", self.target)]
        for layer, weight in self.weight.items():
            w, b = self._own(layer + 1)
            given += [(w, "", weight)] + ([(b, "", biases[layer])] if layer in biases else [])
        yield given

        forward = [("a¹", "x", self.a[1])]
        for layer, reads in self.reads.items():
            terms = " + ".join(self._written(layer, "z", a=f"a{up(read)}") for read in reads)
            terms += f" + {self._own(layer)[1]}" if layer - 1 in biases else ""
            if self._error(layer) == "g":
                forward.append((f"a{up(layer)}", terms, self.a[layer]))
                continue
            forward.append((f"z{up(layer)}", terms, self.z[layer]))
            forward.append((f"a{up(layer)}", self._G(layer) + self._mask(layer), self.a[layer]))
        cost = sheet.COSTS[self.loss]
        share = "" if scalar else f"1/{cost.per if cost.per == 'N' else '(N m)'} "
        text, delta_text = (notation.written(formula, f"a{up(last)}") for formula in (cost.C, cost.delta))
        yield [*forward, ("C", (f"{share}Σ " if share else "") + text, self.cost)]

        yield self._delta_lines(last, share + delta_text)
        yield [line for layer in range(last - 1, 1, -1) for line in self._delta_lines(layer, self._arriving(layer))]

        gradients: list[Any] = []
        updates: list[Any] = []
        for layer in reversed(self.weight):
            w, b = self._own(layer + 1)
            a = f"a{up(self.reads[layer + 1][0])}"
            gradients.append((f"∂C/∂{w}", self._written(layer + 1, "weight", a=a), self.grad_weight[layer]))
            updates.append((f"new {w}", f"{w} − LR · ∂C/∂{w}", self.new_weight[layer]))
            if layer in biases:
                gradients.append((f"∂C/∂{b}", self._written(layer + 1, "bias"), self.grad_bias[layer]))
                updates.append((f"new {b}", f"{b} − LR · ∂C/∂{b}", self.new_bias[layer]))
        yield gradients
        yield updates

    def _own(self, layer: int) -> tuple[str, str]:
        """Return the symbols of the weight and the bias that give z^l."""
        w, b = ("γ", "β") if "norm" in self.rule[layer] else ("w" if self._is_scalar else "W", "b")
        return w + up(layer - 1), b + up(layer - 1)

    def _written(self, layer: int, part: str, a: str = "") -> str:
        """Return a formula of the rule that gives z^l. part: of `Written`."""
        is_scalar = self._is_scalar and self.rule[layer] == "affine"
        formula = getattr(SCALAR if is_scalar else WRITTEN[self.rule[layer]], part)
        formula = formula if layer - 1 in self.weight else formula.replace("{W} ⊙ ", "")
        return formula.format(a=a, W=self._own(layer)[0], z=f"z{up(layer)}", δ=f"{self._error(layer)}{up(layer)}")

    def _arriving(self, layer: int) -> str:
        """Return ∂C/∂a^l: a term for each time that a layer reads a^l."""
        readers = [reader for reader, reads in self.reads.items() for read in reads if read == layer]
        text = " + ".join(self._written(reader, "back") for reader in readers)
        return text if len(readers) == 1 and (self._is_scalar or " " not in text) else f"({text})"

    def _error(self, layer: int) -> str:
        """Return the letter of ∂C/∂z^l: δ; g for a sum that nothing follows, whose z^l is a^l itself."""
        plain = self.rule[layer] == "sum" and self.activation[layer] == "identity" and not self.drops[layer]
        return "g" if plain else "δ"

    def _delta_lines(self, layer: int, incoming: str) -> list[tuple[str, str, Any]]:
        """Return G′(z^l), unless it is 1, and δ^l, which is made of it and of ∂C/∂a^l."""
        delta, value = f"{self._error(layer)}{up(layer)}", self.delta[layer]
        incoming += self._mask(layer)
        if self.activation[layer] == "identity":
            return [(delta, incoming, value)]
        slope = self._G(layer, "′")
        return [(slope, "", self.slope[layer]), (delta, f"{incoming} {'·' if self._is_scalar else '⊙'} {slope}", value)]

    def _G(self, layer: int, prime: str = "") -> str:
        G, z = self.activation[layer], f"z{up(layer)}"
        return z if G == "identity" else f"{G}{prime}({z})"

    def _mask(self, layer: int) -> str:
        return f" ⊙ m{up(layer)}/(1 − p)" if self.drops[layer] else ""

    def _titled_steps(self) -> list[str]:
        return [f"{title}\n{text}" for title, text in self.steps().items()]

    def _text_step(self, title: str, lines: list[Line]) -> str:
        if self._is_scalar and title == "given":
            items = ",  ".join(f"{line.symbol}~=~{_number(line.value.item())}" for line in lines)
            return textwrap.fill(items, WIDTH, initial_indent="   ", subsequent_indent="   ").replace("~", " ")
        return "\n".join(map(_text_line, lines))


# ---------------------------------------------------------------------------------------------------------------------
# Lines and tables as text, Markdown, LaTeX
# ---------------------------------------------------------------------------------------------------------------------


def _number(value: float, digits: int = 5) -> str:
    return f"{value + 0.0:.{digits}g}"  # −0 as 0


def _numbers(value: Tensor) -> list[list[str]]:
    """Return its rows; a matrix or vector in four digits, so that six numbers fit into a line."""
    rows = (value if value.dim() == 2 else value.reshape(1, -1)).tolist()
    return [[_number(number, 5 if value.numel() == 1 else 4) for number in row] for row in rows]


def _value(values: Tensor | None) -> str:
    return "" if values is None else _number(values.item())


def _norm(values: Tensor | None) -> str:
    return "" if values is None else f"{values.norm().item():.4g}"


def _shape(values: Tensor) -> str:
    return str(tuple(values.shape))


def _substituted(formula: str, known: dict[str, Tensor]) -> str:
    """Return the formula with numbers for its symbols; negative ones that follow something are in parentheses."""
    symbols = "|".join(re.escape(symbol) for symbol in sorted(known, key=len, reverse=True))
    pattern = rf"(?<![A-Za-z])(?:{symbols})(?![A-Za-z])"
    numbers = {symbol: _number(value.item()) for symbol, value in known.items()}
    text = re.sub(pattern, lambda m: f"({numbers[m[0]]})" if numbers[m[0]][0] == "-" else numbers[m[0]], formula)
    return re.sub(r"(?<=\()\((-[^()]*)\)(?=\))|^\((-[^()]*)\)", lambda m: m[1] or m[2], text)


def _text_line(line: Line) -> str:
    sides = [line.symbol, *(side for side in (line.formula, line.numbers) if side)]
    rows = _numbers(line.value)
    if len(rows) == 1:
        value = rows[0][0] if len(rows[0]) == 1 else f"[{'  '.join(rows[0])}]"
        text = "   " + " = ".join(sides if value == sides[-1] else [*sides, value])
        if len(text) <= WIDTH:
            return text
        if line.numbers:  # a sum of several readers' terms
            return f"   {line.symbol} = {line.formula}\n      = {line.numbers} = {value}"
    width = max(len(number) for row in rows for number in row)
    table = ["      [" + "  ".join(f"{number:>{width}}" for number in row) + "]" for row in rows]
    return "\n".join(["   " + " = ".join(sides) + " =", *table])


def _latex(text: str) -> str:
    """Return a formula in LaTeX: words as operators, superscripts as exponents, letters as commands."""
    text = re.sub(r"[A-Za-z_]{2,}", lambda m: rf"\operatorname{{{m[0]}}}".replace("_", r"\_"), text)
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda m: "^{" + "".join(str(SUPERSCRIPTS.index(c)) for c in m[0]) + "}", text)
    return text.translate(str.maketrans(LATEX))


def _latex_sides(line: Line) -> list[str]:
    sides, rows = [_latex(side) for side in (line.formula, line.numbers) if side], _numbers(line.value)
    if line.value.numel() == 1:
        return sides if rows[0][0] in sides else [*sides, rows[0][0]]
    return [*sides, tables.latex(rows, "pmatrix")]


def _latex_cells(table: list[list[str]]) -> Iterator[list[str]]:
    """Yield the header as formulas, then rows in which words are text."""
    header, *rows = table
    words = ("saturated", "from", "rule")
    yield [rf"\text{{{cell}}}" if cell in words else _latex(cell).replace("^l", "^{l}") for cell in header]
    for row in rows:
        yield [rf"\text{{{cell}}}" if cell[:1].isalpha() else cell.replace("%", r"\%") for cell in row]


# ---------------------------------------------------------------------------------------------------------------------
# The pass itself
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def trace(
    model: nn.Module, x: Tensor | Sequence, target: Tensor | Sequence, loss: str = "quadratic", lr: float = 1.0
) -> Trace:
    """Return z, a, δ and the gradients of every layer of one pass, by the recursion; the model stays as it is.

    model   what `program.read` takes: an mm.MLP, or nn.Sequentials and mm.Sums of affine maps, activations, dropouts,
            convolutions, pools, norms and softmax; a batch norm in training takes the statistics of x
    x       (N, n_1) or (N, C, H, W), or one sample, (n_1,) or (C, H, W); a list becomes a tensor
    target  (N, n_L), or class indices (N,) for "cross_entropy"; for one sample (n_L,) or ()
    loss    "quadratic", "mse", "bce" or "cross_entropy"; lr: the LR of the step that `new_weight` shows

    Raises InputError for another net, a shared weight, hooks, an unknown loss, a logits cost after an
    activation, and for an x or target with another shape, dtype or device, or without a sample.

    >>> import torch, manual_mlp as mm
    >>> net = mm.MLP([1, 1], activation="identity", output_activation="identity")
    >>> for parameter in net.parameters():
    ...     _ = torch.nn.init.constant_(parameter, 0.5)
    >>> print(mm.trace(net, [2.0], [1.0]).steps()["2. output error"])  # z² = 0.5 · 2 + 0.5
       δ² = (a² − ŷ) = (1.5 − 1) = 0.5
    """
    program = reading_of(model, grids=True).program
    layers = program.layers
    weights = [layer.weight for layer in layers.values() if layer.weight is not None]
    checks.own_parameters(model, weights)
    x, target = _batch(x, target, weights[0], loss, 3 if isinstance(program.nodes[0].rule, Convolve | Pool) else 1)
    checks.full_batch(None if program.grids else weights[0], len(weights[-1]), x, target, loss)
    one = one_pass(program, x, target, loss, program.draw(x))

    result = Trace(
        sizes=[x.shape[1], *(one.slots[layer.z].shape[1] for layer in layers.values())],
        loss=loss,
        lr=lr,
        cost=one.cost,
        target=(sheet.onehot(one.slots[-1], target) if target.dim() == 1 else target).clone(),
        activation={index: layer.row.name for index, layer in layers.items()},
        drops={index: layer.drops for index, layer in layers.items()},
        reads={index: layer.reads for index, layer in layers.items()},
        rule={index: layer.rule for index, layer in layers.items()},
    )
    result.a[1] = x.clone()
    for index, layer in layers.items():
        z, a, row = one.slots[layer.z], one.slots[layer.a], layer.row
        result.z[index], result.delta[index] = z.clone(), one.arrived[layer.z].clone()
        result.a[index] = one.slots[layer.out].clone()
        result.slope[index] = kernels.kernel(row).delta(torch.ones_like(z), a if row.saves == "a" else z, *row.values)
        flat = result.slope[index].abs() < SATURATED * steepest(row)
        result.saturation[index] = flat.double().mean().item()
        if layer.weight is None:
            continue
        result.weight[index - 1] = layer.weight.clone()
        result.bias[index - 1] = None if layer.bias is None else layer.bias.clone()
        grad_weight, grad_bias = one.gradients[program.spans[layer.z - 1]]
        result.grad_weight[index - 1], result.grad_bias[index - 1] = grad_weight, grad_bias
        result.new_weight[index - 1] = layer.weight - lr * grad_weight
        result.new_bias[index - 1] = None if layer.bias is None else layer.bias - lr * grad_bias
    return result


class Pass(NamedTuple):
    """C, the slots of a program, ∂C/∂slot for each, and the gradients of x and the parameters."""

    cost: Tensor
    slots: list[Any]
    arrived: list[Any]
    gradients: list[Any]


def one_pass(program: Program, x: Tensor, target: Tensor, loss: str, masks: Sequence[Any] = ()) -> Pass:
    """Steps 1 to 4 of one batch, every slot kept.

    masks: what `program.draw` returned. Raises InputError as `program.cost_of`, and for an x that the layers refuse.
    """
    cost, tensors = cost_of(loss, program), [x, *program.parameters(), *masks]
    try:
        slots = program.forward(tensors, every=True)
    except InputError:
        raise
    except RuntimeError as error:
        reason = f"{tuple(x.shape)} of {x.dtype}: {str(error).splitlines()[0]}"
        raise InputError(f"expected an input that fits the layers; got {reason}") from error
    checks.rows_of(slots[-1], target, loss)
    total_weight, delta_weight = kernels.weights(cost, *slots[-1].shape)
    g = kernels.COST_KERNELS[cost.name].delta(slots[-1], target) * delta_weight
    needs = [True, *(tensor is not None for tensor in tensors[1 : 1 + len(program.sources)])]
    arrived, gradients = program.backward(g, slots, tensors, needs, every=True)
    return Pass((kernels.total(cost, slots[-1], target) * total_weight).to(g.dtype), slots, arrived, gradients)


def _batch(x: Any, target: Any, like: Tensor, loss: str, of_one: int) -> tuple[Tensor, Tensor]:
    """Return lists as tensors, and one sample, which has so many dimensions, as a batch of one."""
    if not isinstance(x, Tensor):
        x = torch.tensor(x, dtype=like.dtype, device=like.device)
    if not isinstance(target, Tensor):
        target = torch.tensor(target, device=like.device)
        indices = loss == "cross_entropy" and not target.is_floating_point() and target.dim() < 2
        target = target if indices else target.to(like.dtype)
    return (x, target) if x.dim() != of_one else (x.unsqueeze(0), target.unsqueeze(0))


@functools.cache
def steepest(row: sheet.Row) -> float:
    """Return the maximum of |G′(z)| over z, found on a grid that is fine at 0 and reaches a million."""
    positive = torch.logspace(-3, 6, 9001, dtype=torch.float64)
    z = torch.cat([-positive, positive.new_zeros(1), positive])
    saved = z if row.saves == "z" else row.G(z, *row.values)
    return row.delta(torch.ones_like(z), saved, *row.values).abs().max().item()
