"""The multi-layer perceptron for PyTorch, every derivative written by hand."""

from manual_mlp import functional, testing
from manual_mlp.convert import convert, left_alone, revert
from manual_mlp.engine import BackpropEngine
from manual_mlp.errors import InputError
from manual_mlp.modules import (
    GELU,
    MLP,
    Affine,
    AffineActivation,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    Dropout,
    Identity,
    LeakyReLU,
    MSELoss,
    QuadraticLoss,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from manual_mlp.perceptron import Perceptron
from manual_mlp.trace import Trace, trace

__version__ = "0.1.0"
__all__ = [
    "GELU",
    "MLP",
    "Affine",
    "AffineActivation",
    "BCEWithLogitsLoss",
    "BackpropEngine",
    "CrossEntropyLoss",
    "Dropout",
    "Identity",
    "InputError",
    "LeakyReLU",
    "MSELoss",
    "Perceptron",
    "QuadraticLoss",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
    "Trace",
    "convert",
    "functional",
    "left_alone",
    "revert",
    "testing",
    "trace",
]
