# ruff: noqa: E501 -- a table, one row a mistake
"""Plants one mistake at a time into a copy of the package and runs the proofs on it: each must fail.

`python -m tests.mutants` prints the mutants that survive, one a line; `0 4` takes every fourth, from the first. torch is
imported once; each mutant is a fork.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import sympy.parsing.sympy_parser  # noqa: F401 -- imported before the fork, as torch is
import torch
import torch._dynamo  # which the first step of a torch.optim optimizer would import, in each fork

ROOT = Path(__file__).resolve().parent.parent
# What most often notices comes first.
PROOFS = ["examples", "twins", "modules", "activations", "gradients"]

# What is planted: file, the right text (which must occur just once), the wrong one, and the proof to begin with where
# the first ones are known to pass.
MUTANTS: dict[str, tuple[str, ...]] = {
    "sign of ∂C/∂a": ("formulas", "return torch.mm(delta, weight) if", "return -torch.mm(delta, weight) if"),
    "∂C/∂W transposed": ("formulas", "torch.mm(rows(delta).t(), rows(a))", "torch.mm(rows(delta).t(), rows(a)).t()"),
    "bias sum forgotten": ("formulas", "rows(delta).sum(0)", "rows(delta)[0]"),
    "leading dimensions forgotten": ("formulas", "torch.mm(rows(delta).t(), rows(a))", "torch.mm(delta.t(), a)"),
    "1/N forgotten": ("formulas", "        return math.prod(shape[:-1])", "        return 1"),
    "½ forgotten": ("formulas", "* number(0.5, prediction)", "* number(1, prediction)"),
    "δ of the cost turned round": ("formulas", "    return prediction - target", "    return target - prediction"),
    "sigmoid 0.05 % off": ("formulas", "return (g * (number(1, a) - a)) * a", "return (g * (1 - a)) * a * 1.0005"),
    "sigmoid factor forgotten": ("formulas", "return (g * (number(1, a) - a)) * a", "return g * (1 - a)"),
    "sigmoid in another order": ("formulas", "return (g * (number(1, a) - a)) * a", "return g * ((1 - a) * a)", "modules"),
    "tanh not squared": ("formulas", "return g * (number(1, a) - a * a)", "return g * (1 - a)"),
    "relu at 0": ("formulas", "torch.where(a <= zero, zero, g)", "torch.where(a < zero, zero, g)"),
    "relu writes into g": ("formulas", "torch.where(a <= zero, zero, g)", "g.masked_fill_(a <= 0, 0)"),
    "relu of many at 0": ("formulas", "torch.le(a, number(0, a), out=work)", "torch.lt(a, number(0, a), out=work)"),
    "leaky_relu slope 0.05 % off": ("formulas", "g * negative_slope)", "g * (negative_slope * 1.0005))"),
    "leaky_relu of numbers alone": ("formulas", "clamp_min_(negative_slope).mul_(g)", "clamp_min_(negative_slope)"),
    "a tangent takes relu's bits": ("formulas", "return not transforming() and not is", "return not is"),
    "softplus threshold forgotten": ("formulas", "torch.where(z * beta > threshold, g,", "torch.where(z < -1e9, g,"),
    "softplus without β": ("formulas", "F.threshold(a * -beta,", "F.threshold(-a,"),
    "silu's last term": ("formulas", "(one + z * (one - s))", "(one + z * (one - s * 1.0005))"),
    "gelu's tail": ("formulas", "torch.erfc(z * number(-0.7071067811865476, z)) * number(0.5, z)", "(1 + torch.erf(z * 0.7071067811865476)) / 2", "activations"),
    "gelu_tanh's cubic term": ("formulas", "slope = (one + square * number(3 * cubic, z))", "slope = (one + square * number(2 * cubic, z))"),
    "formula text": ("formulas", '"g*(1 - a**2)"', '"g*(1 - a)**2"', "activations"),
    "bce: G′ not cancelled": (
        "formulas",
        "        return torch.sigmoid(z) - target\n",
        "        return (torch.sigmoid(z) - target) * torch.sigmoid(z) * (1 - torch.sigmoid(z))\n",
    ),
    "softplus of a cost with a kink at 0": ("formulas", "F.softplus(z, 1.0, 40.0)", "z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))"),
    "cross-entropy without Σ t": ("formulas", " * shares.sum(-1, keepdim=True) - shares", " - shares"),
    "weighted mean divided by N": (
        "formulas",
        "return math.prod(shape) if weight is None else weight.sum()",
        "return math.prod(shape)",
    ),
    "dropout not rescaled": ("formulas", "(mask.to(a.dtype) / keep)", "mask.to(a.dtype)"),
    "Rosenblatt's sign": ("formulas", "rate * (target - prediction)", "rate * (prediction - target)"),
    "wrong layer's activation": (
        "functions",
        "        delta = sheet.sigmoid_delta(g, activation)\n        return _affine_gradients(ctx, delta, a, weight)",
        "        delta = sheet.sigmoid_delta(g, activation)\n        return _affine_gradients(ctx, delta, activation, weight)",
    ),
    "needs_input_grad of the input ignored": ("functions", "if needs_a else None,\n        sheet", "if True else None,\n        sheet"),
    "needs_input_grad of the bias ignored": ("functions", "sheet.grad_bias(delta) if needs_bias", "sheet.grad_bias(delta) if True"),
    "target's gradient with the prediction's sign": ("functions", "-delta if needs_target", "delta if needs_target"),
    "tangent of the weight forgotten": ("functions", "z_t + sheet.affine(a, weight_t)", "z_t", "gradients"),
    "second derivative lost at z": ("functions", "    return delta + g_z\n", "    return delta\n"),
    "undefined gradient not expected": (
        "functions",
        "delta = None if g is None else delta_of(g, saved, *ctx.parameters)\n        return delta, *",
        "delta = delta_of(g, saved, *ctx.parameters)\n        return delta, *",
        "gradients",
    ),
    "recursion: wrong layer's δ": ("network", "delta = delta_of(delta, saved[layer])", "delta = delta_of(delta, saved[layer - 1])"),
    "recursion: wrong layer's δ in place": ("network", "delta_(delta, saved[layer], None", "delta_(delta, saved[layer - 1], None"),
    "recursion: next layer's weight": ("network", "delta = sheet.grad_input(delta, weights[layer])", "delta = sheet.grad_input(delta, weights[layer - 1])"),
    "recursion: dropout forgotten on the way back": ("network", "                delta = _dropped(delta, masks[layer])\n", "                pass\n"),
    "recursion: second derivative of constants": ("network", "if torch.is_grad_enabled() or not saved:", "if not saved:"),
    "at once: the layer before's weight": ("network", "torch.mm(delta, weights[layer], out", "torch.mm(delta, weights[layer - 1], out"),
    "at once: g forgotten": ("network", "                gradient.mul_(g)\n", "                pass\n"),
    "at once: a given gradient given again": ("network", "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients"),
    "at once: 1/N forgotten": ("network", "        self.delta.mul_(self.delta_weight)\n", ""),
    "at once: a cut parameter": ("network", " or list(map(SHAPE, weights)) != plan.shapes", ""),
    "engine: a cut parameter": ("engine", "            *map(SHAPE, owned),\n", ""),
    "engine: a parameter turned at its place": (
        "engine",
        " if all(map(Tensor.is_contiguous, self._owned)) else Tensor.stride",
        "",
    ),
    "a layer moved to another parent": ("network", "*map(len, self.parents), ", ""),
    "plan: one δ in the place of the next": ("plan", "deltas[i % 2]", "deltas[0]"),
    "engine: W before δ": (
        "engine",
        "if layer > self.engine._first else None, drops[layer])\n                self._steps_4_and_5(layer, inputs[layer], rates)",
        "if layer > self.engine._first else None, drops[layer])\n                through = [self.backward.pop()] if layer > self.engine._first else []\n                self._steps_4_and_5(layer, inputs[layer], rates)\n                self.backward += through",
    ),
    "engine: the layer before's weight": (
        "engine",
        "                weight, _ = self.engine._parameters[layer].read\n",
        "                weight, _ = self.engine._parameters[layer - 1].read\n",
    ),
    "engine: 1/N forgotten": ("engine", "self.delta_weight = engine._cost.delta_weight(n, outputs)", "self.delta_weight = 1.0"),
    "engine: sign of the step": ("engine", "-lr))\n", "lr))\n"),
    "engine: weight decay forgotten": ("engine", "(1.0 - lr * group[\"weight_decay\"], -lr)", "(1.0, -lr)"),
    "another initialisation": ("modules", "nn.Linear.reset_parameters(self)", "nn.init.xavier_uniform_(self.weight)", "modules"),
    "keys shifted by dropout": ("modules", "self.add_module(str(2 * index), layer)", "self.add_module(str(len(self)), layer)"),
}  # fmt: skip


def plant(folder: Path, file: str, right: str, wrong: str) -> None:
    """A copy of package and tests in folder, with one text replaced."""
    shutil.copytree(ROOT / "manual_mlp", folder / "manual_mlp")
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "manual_mlp" / f"{file}.py"
    text = path.read_text()
    assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times in {file}.py: mend the mutant"
    path.write_text(text.replace(right, wrong))


def fails(folder: Path, file: str, first: str | None = None) -> bool:
    """Whether the proofs notice: pytest's exit code 1, in a fork of this process, on the package in folder."""
    if file in ("network", "engine"):
        names = [file]
    elif file == "plan":
        names = ["engine", "network"]
    else:  # the proofs of the activations read the sheet alone
        names = [name for name in PROOFS if name != "activations" or file == "formulas"]
    proofs = [f"tests/test_{name}.py" for name in sorted(names, key=lambda name: name != first)]
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        for name in [name for name in sys.modules if name.split(".")[0] in ("manual_mlp", "tests")]:
            del sys.modules[name]
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT), 1)
        # Whether it fails is all that is asked: no rewritten asserts, and no plugins, which take longer than the proofs.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        os._exit(pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *proofs]))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1), f"pytest ended with {code}:\n{(folder / 'log').read_text()[-3000:]}"
    return code == 1


def survivors(mutants: dict[str, tuple[str, ...]]) -> list[str]:
    torch.set_num_threads(1)
    alive = []
    for name, (file, right, wrong, *first) in mutants.items():
        with tempfile.TemporaryDirectory() as folder:
            plant(Path(folder), file, right, wrong)
            if not fails(Path(folder), file, *first):
                alive.append(name)
    return alive


if __name__ == "__main__":
    first, every = map(int, sys.argv[1:] or (0, 1))
    print("\n".join(survivors(dict(list(MUTANTS.items())[first::every]))))
