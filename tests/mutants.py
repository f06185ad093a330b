# ruff: noqa: E501 -- tables, one row a mistake
"""Plants one mistake at a time into the package and runs the proofs on it: each must fail.

A mistake in a formula is a wrong row, cost, kernel or function of the sheet, put there before the rest of the package is
imported. One in what calls the formulas is a changed text, in a copy of the package.

`python -m tests.mutants` prints the mutants that survive, one a line; `0 2` takes every second, from the first. torch is
imported once; each mutant is a fork.
"""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import lightning.pytorch  # noqa: F401 -- imported before the fork, as torch is: some proofs import it
import pytest
import sklearn.datasets  # noqa: F401 -- and that
import sympy.parsing.sympy_parser  # noqa: F401 -- and that
import torch
import torch._dynamo  # which the first step of a torch.optim optimizer would import, in each fork
from torch import exp, expm1, where

from manual_mlp.formulas import Φ, end, softmax, σ, φ

ROOT = Path(__file__).resolve().parent.parent
# What most often notices comes first.
PROOFS = ("examples", "cases", "modules")


class Mistake(NamedTuple):
    """What changes the sheet and the kernels, before anything else has read them, and the proofs that must notice."""

    plant: Callable[[ModuleType, ModuleType], Any]
    proofs: tuple[str, ...] = PROOFS
    only: str = ""  # of their tests, those with this in the name


def row(name: str, *proofs: str, **wrong: Any) -> Mistake:
    """A row with a wrong formula; SymPy and mpmath notice by the row alone, whatever its kernel computes."""

    def plant(sheet: ModuleType, kernels: ModuleType) -> None:
        sheet.ACTIVATIONS[name] = replace(sheet.ACTIVATIONS[name], **wrong)

    return Mistake(plant, proofs or ("activations",), "" if proofs else name)


def kernel(name: str, saves: str, **wrong: Any) -> Mistake:
    """A wrong quicker form; the row is right."""

    def plant(sheet: ModuleType, kernels: ModuleType) -> None:
        kernels.KERNELS[name, saves] = kernels.KERNELS[name, saves]._replace(**wrong)

    return Mistake(plant, ("kernels",), name)


def cost(name: str, *proofs: str, **wrong: Any) -> Mistake:
    def plant(sheet: ModuleType, kernels: ModuleType) -> None:
        sheet.COSTS[name] = replace(sheet.COSTS[name], **wrong)

    return Mistake(plant, proofs or ("activations",), "" if proofs else f"proves and {name}")


def cost_kernel(name: str, **wrong: Any) -> Mistake:
    def plant(sheet: ModuleType, kernels: ModuleType) -> None:
        kernels.COST_KERNELS[name] = kernels.COST_KERNELS[name]._replace(**wrong)

    return Mistake(plant, ("kernels",), name)


def formula(name: str, wrong: Callable[[Any], Callable[..., Any]], *proofs: str, only: str = "") -> Mistake:
    """A function of the sheet, wrong as what `wrong` makes of the right one."""
    return Mistake(lambda sheet, kernels: setattr(sheet, name, wrong(getattr(sheet, name))), proofs or PROOFS, only)


def rule(kind: str, name: str, wrong: Callable[[Any], Callable[..., Any]], only: str = "") -> Mistake:
    """A rule of program.py with a wrong method, as what `wrong` makes of the right one."""

    def plant(sheet: ModuleType, kernels: ModuleType) -> None:
        of = getattr(import_module("manual_mlp.program"), kind)
        setattr(of, name, wrong(getattr(of, name)))

    return Mistake(plant, ("network", "program"), only)


def sigmoid_everywhere(wrong: Callable[..., Any]) -> Mistake:
    """The row, its kernel and the lesson's Functions alike: only torch's own bits say otherwise."""

    def plant(sheet: ModuleType, kernels: ModuleType) -> None:
        row("sigmoid", delta=wrong).plant(sheet, kernels)
        kernel("sigmoid", "a", delta=wrong).plant(sheet, kernels)
        kernels.sigmoid_delta = wrong

    return Mistake(plant, ("modules",))


MISTAKES: dict[str, Mistake] = {
    "sign of ∂C/∂a": formula("grad_input", lambda right: lambda delta, weight: -right(delta, weight)),
    "∂C/∂W transposed": formula("grad_weight", lambda right: lambda delta, a: right(delta, a).t()),
    "bias sum forgotten": formula("grad_bias", lambda right: lambda delta: delta.reshape(-1, delta.shape[-1])[0]),
    "leading dimensions forgotten": formula("grad_weight", lambda right: lambda delta, a: delta.t() @ a),
    "1/N forgotten": formula("divisor", lambda right: lambda shape, reduction, *w: 1 if reduction == "samples" else right(shape, reduction, *w), "cases", only="quadratic"),
    "weighted mean divided by N": formula("divisor", lambda right: lambda shape, reduction, weight=None: right(shape, reduction), "cases", only="cross_entropy and weight and mean"),
    "sigmoid's G″": row("sigmoid", curvature=lambda a: a * (1 - a) * (1 - a)),
    "cross-entropy's H": cost("cross_entropy", H=lambda z, ŷ, v: softmax(z) * (v - (softmax(z) * v).sum(-1, keepdim=True))),
    "CD-1 without its reconstruction": formula("contrastive_divergence", lambda right: lambda v, *more: (*[2 * step for step in right(v, *more)[:3]], v), "pretraining", only="free_energy"),
    "G″ forgotten": formula("moved_delta", lambda right: lambda first, *more: first, "curvature", only="every_quantity"),
    "dropout not rescaled": formula("dropout", lambda right: lambda a, mask, keep: a * mask.to(a.dtype), "cases", only="dropout"),
    "Rosenblatt's sign": formula("perceptron_step", lambda right: lambda prediction, target, a, rate: right(target, prediction, a, rate)),
    "softplus of a cost with a kink at 0": formula("softplus", lambda right: lambda z: z.clamp(min=0) + torch.log1p(exp(-z.abs())), "cases", only="zero and bce_weights and mean"),
    "sigmoid 0.05 % off": row("sigmoid", delta=lambda g, a: (g * (1 - a)) * a * 1.0005),
    "sigmoid factor forgotten": row("sigmoid", delta=lambda g, a: g * (1 - a)),
    "sigmoid in another order": row("sigmoid", "kernels", delta=lambda g, a: g * ((1 - a) * a)),
    "sigmoid in another order everywhere": sigmoid_everywhere(lambda g, a: g * ((1 - a) * a)),
    "tanh not squared": row("tanh", delta=lambda g, a: g * (1 - a)),
    "tanh's G": row("tanh", G=lambda z: σ(z)),
    "relu at 0": row("relu", delta=lambda g, a: where(a < 0, 0, g)),
    "leaky_relu slope 0.05 % off": row("leaky_relu", delta=lambda g, a, s: where(a > 0, g, g * (s * 1.0005))),
    "leaky_relu in a for every slope": row("leaky_relu", when_z=None),
    "softplus in a for every threshold": row("softplus", when_z=None),
    "softplus threshold forgotten": row("softplus", delta=lambda g, a, β, t: where(β * a >= 1e9, g, g * -expm1(-β * a))),
    "softplus without β": row("softplus", delta=lambda g, a, β, t: where(β * a >= end(t), g, g * -expm1(-a))),
    "softplus in z without its edge": row("softplus", when_z=(lambda β, t: t < 20 or β == 0, lambda g, z, β, t: g * σ(β * z))),
    "silu's last term": row("silu", delta=lambda g, z: g * (σ(z) * (1 + z * (1 - 1.0005 * σ(z))))),
    "gelu's density": row("gelu", delta=lambda g, z: g * (Φ(z) + φ(z))),
    "gelu's options exchanged": row("gelu", options=(("approximate", "tanh"),))._replace(only="against_the_twin and gelu"),
    "gelu_tanh's cubic term": formula("du", lambda right: lambda z: (1 + z * z * (2 * 0.044715)) * 0.7978845608028654, "kernels"),
    "relu writes into g": kernel("relu", "a", delta=lambda g, a, many=0: g.masked_fill_(a <= 0, 0)),
    "gelu's tail": kernel("gelu", "z", delta=lambda g, z: g * ((1 + torch.erf(z * 0.7071067811865476)) / 2 + z * φ(z))),
    "leaky_relu of numbers alone": kernel("leaky_relu", "a", delta=lambda g, a, s: torch.sign(a).clamp_min_(s)),
    "tanh in place: a sign": kernel("tanh", "a", delta_=lambda g, a, z, work, mask: g.addcmul_(g, a * a)),
    "relu in place at 0": kernel("relu", "a", delta_=lambda g, a, z, work, mask, many=0: g.masked_fill_(a < 0, 0)),
    "silu into another buffer": kernel("silu", "z", G_=lambda z, out: torch.sigmoid(z, out=out)),
    "dropout forgotten on the way back": rule("Drop", "backward", lambda right: lambda self, g, saved, *mask, needs: (g,), "dropout"),
    "G′ forgotten": rule("Activate", "backward", lambda right: lambda self, g, saved, needs: (g,)),
    "∂C/∂b without δ": rule("Affine", "backward", lambda right: lambda self, *a, needs: (*right(self, *a, needs=needs)[:2], None)),
    "½ forgotten": cost("quadratic", C=lambda a, target: (a - target) ** 2),
    "½ forgotten in the sum": cost_kernel("quadratic", total_share=1.0),
    "δ of the cost with the other sign": cost("quadratic", delta=lambda a, target: target - a),
    "target's gradient with the prediction's sign": cost("mse", delta_target=lambda a, target: 2 * (a - target)),
    "bce: G′ not cancelled": cost("bce", delta=lambda z, target: (σ(z) - target) * σ(z) * (1 - σ(z))),
    "bce: the mean of the samples": cost("bce", "network", per="N"),
    "cross-entropy without Σ t": cost("cross_entropy", delta=lambda z, target: softmax(z) - target),
}  # fmt: skip

# A changed text: file, the right text (which must occur just once), the wrong one, and the proof to begin with where
# the first ones are known to pass; or that proof alone, and which of its tests.
TEXTS: dict[str, tuple[str, ...]] = {
    "wrong layer's activation": (
        "functions",
        "        delta = sigmoid_delta(g, activation)\n        return _affine_gradients(ctx, delta, a, weight)",
        "        delta = sigmoid_delta(g, activation)\n        return _affine_gradients(ctx, delta, activation, weight)",
    ),
    "needs_input_grad of the input ignored": ("functions", "if needs_a else None,\n        sheet", "if True else None,\n        sheet"),
    "needs_input_grad of the bias ignored": ("functions", "sheet.grad_bias(_joined(delta)) if needs_bias", "sheet.grad_bias(_joined(delta)) if True"),
    "tangent of the weight forgotten": ("functions", "None if weight_t is None else sheet.affine(a, weight_t)", "None", "cases", "battery and affine-bias"),
    "second derivative lost at z": ("functions", "delta_of(g, saved, *ctx.values), g_z)", "delta_of(g, saved, *ctx.values))", "cases", "affine_silu"),
    "undefined gradient not expected": (
        "functions",
        "delta = None if g is None else delta_of(g, saved, *ctx.values)\n        return delta, *",
        "delta = delta_of(g, saved, *ctx.values)\n        return delta, *",
        "cases",
        "battery and sigmoid-inplace",
    ),
    "program: what arrives does not add up": ("program", "part if arrived[slot] is None else arrived[slot] + part", "part"),
    "program: another node's slots": ("program", "for slot in self.saved[i]]", "for slot in self.saved[i - 1]]"),
    "program: a slot that is needed is freed": ("program", " and slot not in self.kept]", "]"),
    "network: second derivative of constants": ("network", "if torch.is_grad_enabled() or not slots:", "if not slots:", "network", "second_derivatives"),
    "network: g forgotten": ("network", "if g.item() != 1:", "if False:", "network", "retained"),
    "network: a given gradient given again": ("network", "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", "network", "retained"),
    "network: 1/N forgotten": ("network", "        self.delta.mul_(self.delta_weight)\n", ""),
    "network: a cut parameter": ("network", " or _shapes(tensors) != plan.shapes", "", "network", "cut"),
    "plan: what arrives does not add up": ("plan", "partial(add, into, delta, out=into) if more else ", ""),
    "plan: one δ in the place of the next": ("plan", "self.arrived[slot] = self.free.pop()", "self.arrived[slot] = self.flats[0]"),
    "plan: the prediction is written over": ("plan", "z is None and a is not self.slots[-1]", "z is None", "engine", "predictions"),
    "plan: G over a z that is read again": ("plan", 'rule.saves == "output" and self._alone(i):', 'rule.saves == "output" and reads[0] > 0:'),
    "plan: W before δ": (
        "plan",
        "            if self.wanted[reads[0]]:\n                self._step_3(delta, own[0], reads[0])\n",
        "            through, self.down = self.down, []\n            if self.wanted[reads[0]]:\n                self._step_3(delta, own[0], reads[0])\n            through, self.down = self.down, through\n            self.late = [*getattr(self, 'late', []), *through]\n            if i == 0:\n                self.down += self.late\n",
    ),
    "plan: two branches share the δ of a sum": ("plan", "self._emit(self.down, into.add_ if more else into.copy_, g)", "self.arrived[slot] = flat", "graph", "frozen"),
    "plan: x + x with one g": ("plan", "if wanted.count(keeps) > 1:", "if False:", "program", "thrice or input"),
    "plan: G over an a that is read again": ("plan", ' and nodes[slot - 1].rule.saves != "output"', "", "program", "tanh"),
    "program: a branch begins without a copy": ("program", "if begins and not isinstance(rule, Affine):", "if False:", "graph", "trace"),
    "program: an identity branch is another slot": ("program", "child, of_child, slot, begins=True) for", "child, of_child, len(self.nodes), begins=True) for", "graph", "frozen"),
    "a sum that gives g to its first branch alone": ("functions", "return tuple(g if needed else None for needed in ctx.needs_input_grad)", "return g, *(None for _ in ctx.needs_input_grad[1:])", "graph", "road"),
    "snapshot: a cut parameter": ("snapshot", 'attrgetter("shape", "requires_grad")', 'attrgetter("requires_grad")', "engine", "cut"),
    "snapshot: a frozen parameter": ("snapshot", 'attrgetter("shape", "requires_grad")', 'attrgetter("shape")', "honoured", "frozen"),
    "snapshot: a parameter turned at its place": ("snapshot", " if all(map(Tensor.is_contiguous, self.owned)) else Tensor.stride", "", "engine", "turned"),
    "snapshot: a layer moved to another parent": ("snapshot", "*map(tuple, map(dict.values, self.parents)),", "*chain.from_iterable(map(dict.values, self.parents)),", "network", "moved"),
    "snapshot: a parameter moved to another group": ("snapshot", '        for group in optimizer.param_groups:\n            state += None, *map(id, group["params"])\n', '        state += sorted(id(p) for group in optimizer.param_groups for p in group["params"])\n', "honoured", "group and step"),
    "snapshot: groups that have exchanged their parameters": ("snapshot", 'state += None, *map(id, group["params"])', 'state += None, len(group["params"])', "honoured", "group and step"),
    "snapshot: a replaced forward": ("snapshot", '_reader(module, "__call__", "forward")', '_reader(module, "__call__")', "honoured", "forward and first"),
    "snapshot: another activation": ("snapshot", 'arguments = "activation", "parameter_values"', "arguments = ()", "honoured", "activation and first"),
    "plan: a that step 4 still reads is scratch": ("plan", " and a is not self.slots[-1] and self.longest is None", " and a is not self.slots[-1]", "sample_norm", "optimizers"),
    "plan: z's form overwrites a": ("plan", "            if z is not None and self.longest is not None:", "            if False:", "sample_norm", "every_row and silu"),
    "plan: the bias is not in a sample's norm": ("plan", "*[] if bias is None else [one]", "*[]", "sample_norm", "optimizers"),
    "plan: the sample's own gradient": ("plan", "of_sample = self.n * kernels", "of_sample = kernels", "sample_norm", "optimizers"),
    "curvatures: δ V forgotten": ("curvatures", "needs = needs[0] and V is not None, ", "needs = False, ", "curvature", "every_quantity"),
    "curvatures: a column of √H": ("curvatures", "root * self._share**0.5", "root * self._share", "curvature", "every_quantity"),
    "engine: 1/N forgotten": ("engine", "self.delta_weight = kernels.weights(engine._cost, self.n, self.widths[-1])[1]", "self.delta_weight = 1.0"),
    "engine: sign of the step": ("engine", "-lr))\n", "lr))\n"),
    "engine: weight decay forgotten": ("engine", "(1.0 - lr * group[\"weight_decay\"], -lr)", "(1.0, -lr)", "engine", "decay or groups"),
    "engine: a frozen parameter's old gradient": ("engine", "parameter.grad = None  # or", "pass  # or", "honoured", "frozen"),
    "engine: hooks of parameters": ("engine", " or self._training.hooks.any()", "", "honoured"),
    "another initialisation": ("modules", "nn.Linear.reset_parameters(self)", "nn.init.xavier_uniform_(self.weight)", "modules"),
    "keys shifted by dropout": ("modules", "self.add_module(str(2 * index), nn.Sequential", "self.add_module(str(len(self)), nn.Sequential", "modules", "exchange_state"),
}  # fmt: skip
MUTANTS = [*MISTAKES, *TEXTS]


def plant(folder: Path, file: str, right: str, wrong: str) -> None:
    """Copy package and tests to folder, with one text replaced."""
    shutil.copytree(ROOT / "manual_mlp", folder / "manual_mlp")
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "manual_mlp" / f"{file}.py"
    text = path.read_text()
    assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times in {file}.py: mend the mutant"
    path.write_text(text.replace(right, wrong))


def proofs_of(file: str, first: str = "") -> list[str]:
    """The proofs of a file, with `first` before the others."""
    names = {
        "program": ["program", "network"],
        "plan": ["program", "engine"],
        "network": ["network"],
        "snapshot": ["engine", "network", "honoured"],
        "engine": ["engine", "honoured"],
    }.get(file, list(PROOFS))
    return sorted(names, key=lambda name: name != first)


def fails(package: Path, folder: Path, mistake: Mistake) -> bool:
    """Whether the proofs notice: pytest's exit code 1, in a fork of this process; its output goes to folder."""
    child = os.fork()
    if child == 0:
        os.chdir(package)
        sys.path[:0] = [str(package)]
        for name in [name for name in sys.modules if name.split(".")[0] in ("manual_mlp", "tests")]:
            del sys.modules[name]
        os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT), 1)
        mistake.plant(import_module("manual_mlp.formulas"), import_module("manual_mlp.kernels"))
        # Whether it fails is all that is asked: no rewritten asserts, and no plugins, which take longer than the proofs.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        proofs = [f"tests/test_{name}.py" for name in mistake.proofs]
        only = ["-k", mistake.only] if mistake.only else []
        os._exit(pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *only, *proofs]))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1), f"pytest ended with {code}:\n{(folder / 'log').read_text()[-3000:]}"
    return code == 1


def noticed(name: str) -> bool:
    """Whether the proofs notice the mutant of this name."""
    with tempfile.TemporaryDirectory() as folder:
        if name in MISTAKES:
            return fails(ROOT, Path(folder), MISTAKES[name])
        file, right, wrong, *first = TEXTS[name]
        plant(Path(folder), file, right, wrong)
        proofs, only = ((first[0],), first[1]) if len(first) == 2 else (tuple(proofs_of(file, *first)), "")
        return fails(Path(folder), Path(folder), Mistake(lambda *modules: None, proofs, only))


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # pytest collects garbage at its end: without this each fork walks, and copies, all that torch has made
    first, every = map(int, sys.argv[1:] or (0, 1))
    print("\n".join(name for name in MUTANTS[first::every] if not noticed(name)))
