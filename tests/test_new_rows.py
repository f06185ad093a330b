"""One row and one export make a new activation everywhere: Mish, and ELU with its alpha, are added to a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import ROOT

ROWS = """\
    Row("mish", lambda z: z * tanh(softplus(z)),
        lambda g, z: g * (tanh(softplus(z)) + z * σ(z) * (1 - tanh(softplus(z)) ** 2)), "z", nn.Mish),
    # For α ≥ 0 a and z have the same sign.
    Row("elu", lambda z, α: where(z > 0, z, α * expm1(z)), lambda g, a, α: where(a > 0, g, g * (a + α)), "a", nn.ELU,
        parameters=(("alpha", 1.0),), tail=(-8, 40),
        when_z=(lambda α: α < 0, lambda g, z, α: where(z > 0, g, g * α * exp(z)))),
"""
EXPORTS = '''\
class Mish(_Activation, nn.Mish, row="mish"):
    """a = z tanh(softplus(z)), δ = g (t + z σ(z)(1 − t²)), t = tanh(softplus(z))."""


class ELU(_Activation, nn.ELU, row="elu"):
    """a = z where z > 0, else α (e^z − 1); δ = g, or g (a + α)."""


'''
USED = """
import copy, inspect, pickle, sys
import torch
from torch import nn
import manual_mlp as mm
from manual_mlp import functional as F, network
from manual_mlp.formulas import ACTIVATIONS
from manual_mlp.lecture import executed
from tests.cases import ROWS
from tests.readme import formula_table

torch.set_num_threads(1)
assert " | – | z |" in formula_table()
NEW = [row for row in ROWS if row.name in ("mish", "elu")]
assert [row.name for row in NEW] == ["mish", "elu", "elu"], NEW
NEW.append(ACTIVATIONS["elu"].bind(-0.3))
assert [row.saves for row in NEW] == ["z", "a", "a", "z"]
assert inspect.signature(mm.ELU) == inspect.signature(nn.ELU)
assert str(inspect.signature(F.elu)) == "(input, alpha=1.0, inplace=False)"
assert isinstance(mm.Mish(), nn.Mish) and "softplus" in mm.Mish.__doc__ and "Mish" in mm.__all__
table = formula_table()
assert "| mish | `z * tanh(softplus(z))` |" in table and "elu, α = alpha = 1" in table and "elu where α < 0" in table

EXACT = {"rtol": 1e-12, "atol": 1e-12}
for row in NEW:
    torch.manual_seed(0)
    x, target = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    given = dict(row.parameters)
    module = getattr(mm, type(row.twin()).__name__)(**given)
    torch.testing.assert_close(module(x), row.twin()(x), **EXACT)
    torch.testing.assert_close(getattr(F, row.name)(x.clone(), *given.values(), True), row.twin()(x), **EXACT)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x), **EXACT)
    torch.testing.assert_close(module(x.float()), row.twin()(x.float()))
    assert module(x.bfloat16()).dtype == torch.bfloat16

    twin = nn.Sequential(nn.Linear(3, 4), row.twin(), nn.Linear(4, 2)).double()
    converted = mm.convert(copy.deepcopy(twin))
    assert type(converted[1]) is type(module) and not mm.left_alone(converted)
    nets = [mm.MLP([3, 4, 2], module, "identity", dtype=torch.float64), converted, copy.deepcopy(twin)]
    nets[0].load_state_dict(twin.state_dict())
    mm.testing.assert_manual_backward(nets[0], x)
    assert type(nets[0].to_torch()[1]) is row.module
    assert nets[0].to_torch()[1].extra_repr() == row.twin().extra_repr()

    of = mm.curvature(nets[2], x, target)  # but for its G″, which they have not
    assert of.norms.shape == (7,) and list(of.kfac()) == ["0.weight", "2.weight"] and of.ggn_diagonal()
    try:
        of.hvp(of.variance)
        raise AssertionError("hvp without G″")
    except mm.InputError as error:
        assert repr(row.name) in str(error), error

    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (*nets, twin)]
    cost = ((twin(x) - target) ** 2).sum() / 2 / len(x)
    cost.backward()
    expected = [p.grad for p in twin.parameters()]
    for net in nets[:2]:
        found = torch.autograd.grad(mm.QuadraticLoss()(net(x), target), [*net.parameters()])
        torch.testing.assert_close(list(found), expected, **EXACT)
    for net in nets:
        found = torch.autograd.grad(network.network_loss(net, x, target), [*net.parameters()])
        torch.testing.assert_close(list(found), expected, **EXACT)
        trace = mm.trace(net, x, target)
        assert trace.activation[2] == row.name
        torch.testing.assert_close([trace.grad_weight[1], trace.grad_bias[2]], [expected[0], expected[3]], **EXACT)
    step = mm.BackpropEngine(nets[0], optimizers[0]).step(x, target)
    torch.testing.assert_close(step, cost.detach(), **EXACT)
    optimizers[-1].step()
    for mine, theirs in zip(nets[0].parameters(), twin.parameters()):
        torch.testing.assert_close(mine, theirs, **EXACT)
    assert type(mm.revert(converted)[1]) is row.module
torch.testing.assert_close(mm.MLP([3, 2], output_activation="mish")(x.float()).shape, (7, 2))
print("used", flush=True)

import runpy
sys.argv = "train.py model.activation=mish data=iris trainer.max_epochs=1 report=false hydra.run.dir=out".split()
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with one row and one class statement more for each, and nothing else changed."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("manual_mlp", "tests", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name, before, text in (("formulas", ")}\n# fmt: on\n\nsigmoid,", ROWS), ("modules", "class Dropout(", EXPORTS)):
        file = folder / "manual_mlp" / f"{name}.py"
        source = file.read_text(encoding="utf-8")
        assert source.count(before) == 1
        file.write_text(source.replace(before, text + before), encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout


def test_used_in_each_place(copied: Path) -> None:
    """Layer, functional, mm.Name, fused, convert, to_torch, network_loss, engine, trace, formula table; train.py."""
    used, trained = run(copied, "-c", USED).split("used\n")
    assert not used
    assert "4-30-3, mish" in trained


def test_the_proofs_ask_them(copied: Path) -> None:
    """SymPy, mpmath, the twin, the kernels, finite differences: from the rows, without a word about them.

    At 0 torch's second derivative of ELU is that of the other side than its first.
    """
    proofs = [f"tests/test_{name}.py" for name in ("activations", "kernels", "cases", "modules")]
    chosen = "(mish or elu+1 or elu+2) and not (zero and elu) and not nobias and not three_dimensions"
    out = run(copied, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *proofs)
    assert int(out.splitlines()[-1].split(" passed")[0]) > 80, out
