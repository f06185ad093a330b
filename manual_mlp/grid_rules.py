"""Convolution, pooling, norms and softmax as rules of a program: see `program.Rule`.

They apply the Functions of `grid_functions.py`, so that a second derivative of a program is not torch's either.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import functional, grid_functions, kernels, modules
from manual_mlp import grids as sheet
from manual_mlp.functions import Gradients, apply
from manual_mlp.grid_functions import INPUT, WEIGHT, Convolution


class GridRule:
    """A rule of one input, whose arguments are its module's at the time of the call.

    title         what a trace calls it
    keeps_width   whether as many numbers of a row go out as come in
    """

    names: tuple[str, ...] = ()
    saves = "input"
    title = ""
    keeps_width = False

    def __init__(self, module: Any) -> None:
        self.module = module


class Convolve(GridRule):
    """z = a ∗ W + b."""

    names, title = ("weight", "bias"), "convolution"

    def _places(self) -> tuple[Any, ...]:
        return self.module.stride, self.module.padding, self.module.dilation, self.module.groups

    def forward(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(a, weight, bias, *self._places())

    def backward(self, g: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Gradients:
        at, (needs_a, needs_weight, needs_bias) = functional.geometry(a, weight, *self._places()), needs
        return (
            apply(Convolution, INPUT, None, weight, g, None, at) if needs_a else None,
            apply(Convolution, WEIGHT, a, None, g, None, at) if needs_weight else None,
            kernels.conv_bias(g) if needs_bias else None,
        )


class Pool(GridRule):
    """A number for each window."""

    def _at(self, a: Tensor) -> sheet.Windows:
        of = self.module
        d = getattr(of, "dilation", 1)
        return functional.windows(a, of.kernel_size, of.stride, of.padding, d, of.ceil_mode)


class MaxPool(Pool):
    """The largest number of each window."""

    title = "max pool"

    def forward(self, a: Tensor) -> Tensor:
        return apply(grid_functions.Largest, a, self._at(a))[0]

    def backward(self, g: Tensor, a: Tensor, needs: Sequence[bool]) -> Gradients:
        at = self._at(a)
        return (apply(grid_functions.Picked, g, True, sheet.largest(a.detach(), at)[1], at),)


class MeanPool(Pool):
    """The mean of each window."""

    title = "mean pool"

    def _average(self, x: Tensor, transposed: bool, at: sheet.Windows) -> Tensor:
        of = self.module
        return apply(grid_functions.Average, x, transposed, None, at, of.count_include_pad, of.divisor_override)

    def forward(self, a: Tensor) -> Tensor:
        return self._average(a, False, self._at(a))

    def backward(self, g: Tensor, a: Tensor, needs: Sequence[bool]) -> Gradients:
        return (self._average(g, True, self._at(a)),)


class Reshape(GridRule):
    """The same numbers in other dimensions, as nn.Flatten and nn.Unflatten give them."""

    title = "reshape"

    def forward(self, a: Tensor) -> Tensor:
        return self.module(a)

    def backward(self, g: Tensor, a: Tensor, needs: Sequence[bool]) -> Gradients:
        return (g.reshape(a.shape),)


class Normalise(GridRule):
    """y = γ x̂ + β. Beside γ and β it reads what `draw` returns.

    last   how many dimensions of a row a layer norm takes; 0 for a batch norm
    """

    names, keeps_width = ("weight", "bias"), True

    @property
    def last(self) -> int:
        return len(getattr(self.module, "normalized_shape", ()))

    @property
    def title(self) -> str:  # type: ignore[override]
        """Return which numbers it normalises by."""
        if isinstance(self.module, nn.LayerNorm):
            return "layer norm"
        return "batch norm" if self.draw()[0] is None else "running norm"

    def draw(self, *_: Any) -> tuple[Tensor | None, float]:
        """Return a copy of the running statistics (2, C) if this run reads them, and ε."""
        of = self.module
        if self.last or of.training or of.running_mean is None:
            return None, of.eps
        return torch.stack([of.running_mean, of.running_var]), of.eps

    def forward(self, x: Tensor, weight: Any, bias: Any, given: Tensor | None, ε: float) -> Tensor:
        if self.last:
            return functional.layer_norm(x, self.module.normalized_shape, weight, bias, ε)
        m, s = (None, None) if given is None else given
        return functional.batch_norm(x, m, s, weight, bias, given is None, 0.0, ε)

    def backward(
        self, g: Tensor, x: Tensor, weight: Any, bias: Any, given: Tensor | None, ε: float, needs: Sequence[bool]
    ) -> Gradients:
        return grid_functions.norm_gradients(g, x, weight, self.last, ε, needs, given)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Update the running statistics of a batch norm as a call of it in training does."""
        of = self.module
        if not self.last and of.training and of.track_running_stats:
            κ = modules.counted(of)
            if x.numel():
                torch.native_batch_norm(x, None, None, of.running_mean, of.running_var, True, κ, of.eps)


class Softmax(GridRule):
    """a = softmax z along one dimension."""

    saves, keeps_width, title = "output", True, "softmax"

    def forward(self, z: Tensor) -> Tensor:
        return functional.softmax(z, self.module.dim)

    def backward(self, g: Tensor, a: Tensor, needs: Sequence[bool]) -> Gradients:
        return (grid_functions.softmax_delta(g, a, self.module.dim),)


RULES: dict[type[nn.Module], type[GridRule]] = {
    **{nn.Conv2d: Convolve, nn.MaxPool2d: MaxPool, nn.AvgPool2d: MeanPool},
    **{nn.Flatten: Reshape, nn.Unflatten: Reshape},
    **{nn.BatchNorm1d: Normalise, nn.BatchNorm2d: Normalise, nn.LayerNorm: Normalise, nn.Softmax: Softmax},
}
RULES |= {modules.OURS[plain]: rule for plain, rule in RULES.items() if plain in modules.OURS}
