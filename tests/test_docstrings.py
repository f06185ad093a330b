"""Each public docstring holds an example that runs, with a result that says something."""

import doctest
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import manual_mlp as mm
from manual_mlp.curvatures import Curvature

SUBMODULES = (mm.functional, mm.network, mm.plots, mm.testing)
RETURNED = {"Curvature": Curvature}  # by mm.curvature
# Public only to the files beside them.
INTERNAL = {f"functional.{name}" for name in ("apply_affine", "bound_row", "geometry", "name_and_values", "windows")}
INTERNAL |= {f"network.{name}" for name in ("Reading", "reading_of", "parameters_of", "LossPlan", "NetworkCost")}
INTERNAL |= {"functional.activation", "functional.apply_fused"}
FIXTURES = Path(__file__).parent / "fixtures"


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a submodule with what they name: what it exports, or what it defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", own):
        if not name.startswith("_"):
            yield f"{module.__name__.partition('.')[2]}.{name}", getattr(module, name)


def members(name: str, kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines, but torch's own hooks."""
    for member, value in vars(kind).items():
        function = next((getattr(value, of) for of in ("__func__", "fget", "func") if hasattr(value, of)), value)
        if not member.startswith("_") and inspect.isroutine(function) and member not in ("forward", "extra_repr"):
            yield f"{name}.{member}", function


OBJECTS: dict[str, Any] = {name: getattr(mm, name) for name in mm.__all__ if callable(getattr(mm, name))}
OBJECTS |= RETURNED
OBJECTS |= dict(pair for module in SUBMODULES for pair in public(module) if pair[0] not in INTERNAL)
OBJECTS |= dict(pair for name, value in OBJECTS.items() if isinstance(value, type) for pair in members(name, value))


@pytest.mark.parametrize("name", OBJECTS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in an empty folder beside a checkpoint, best.ckpt, of a small classifier."""
    shutil.copy(FIXTURES / "v0.1-classes.ckpt", tmp_path / "best.ckpt")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(OBJECTS[name].__doc__ or "", {}, name, None, None)
    assert any(example.want for example in test.examples), f"expected an example with a result in {name}"
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


MODULES = {name: kind for name, kind in OBJECTS.items() if isinstance(kind, type) and issubclass(kind, torch.nn.Module)}


@pytest.mark.parametrize("name", MODULES)
def test_forward_is_described(name: str) -> None:
    """`help(mm.QuadraticLoss.forward)` says what it returns and of which shapes, not what torch says of any module."""
    forward = MODULES[name].forward
    assert forward.__module__.startswith("manual_mlp.")
    first = (forward.__doc__ or "").splitlines()[0]
    assert first.startswith("Return ")
    assert re.search(r"\(…|\(N|of one shape", first)
