"""The multi-layer perceptron for PyTorch, every derivative written by hand.

Importing the package brings nothing else, not even torch: the first name that is used does (PEP 562).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manual_mlp import functional as functional
    from manual_mlp import network as network
    from manual_mlp import plots as plots
    from manual_mlp import testing as testing
    from manual_mlp.conversion import convert as convert
    from manual_mlp.conversion import left_alone as left_alone
    from manual_mlp.conversion import revert as revert
    from manual_mlp.curvatures import curvature as curvature
    from manual_mlp.engine import BackpropEngine as BackpropEngine
    from manual_mlp.ensemble import EnsembleEngine as EnsembleEngine
    from manual_mlp.errors import InputError as InputError
    from manual_mlp.lenet import LeNet as LeNet
    from manual_mlp.modules import *  # noqa: F403
    from manual_mlp.perceptron import Perceptron as Perceptron
    from manual_mlp.pretraining import pretrain as pretrain
    from manual_mlp.tracing import Trace as Trace
    from manual_mlp.tracing import trace as trace
    from manual_mlp.training.predict import Predictor as Predictor

__version__ = "0.2.0"

# The submodule of each public name; every public class of modules.py is one, too.
_HOME = {
    **dict.fromkeys(("convert", "left_alone", "revert"), "conversion"),
    **dict.fromkeys(("Trace", "trace"), "tracing"),
    **{"BackpropEngine": "engine", "EnsembleEngine": "ensemble", "InputError": "errors", "Perceptron": "perceptron"},
    **{"LeNet": "lenet"},
    **{"Predictor": "training.predict", "curvature": "curvatures", "pretrain": "pretraining"},
}
_SUBMODULES = ("functional", "network", "plots", "testing")


def _classes() -> dict[str, Any]:
    """Return the public classes that modules.py defines."""
    modules = import_module("manual_mlp.modules")
    return {
        name: value
        for name, value in vars(modules).items()
        if isinstance(value, type) and value.__module__ == modules.__name__ and not name.startswith("_")
    }


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*_HOME, *_SUBMODULES, *_classes()])
    if not name.startswith("_"):
        if name in _HOME:
            return globals().setdefault(name, getattr(import_module(f"manual_mlp.{_HOME[name]}"), name))
        if name[0].islower() and find_spec(f"manual_mlp.{name}"):
            return import_module(f"manual_mlp.{name}")
        if name in (classes := _classes()):
            return globals().setdefault(name, classes[name])
    raise AttributeError(f"module 'manual_mlp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
