"""torch.autograd.Functions of convolution, pooling, normalisation and softmax, from their formulas in `grids.py`.

As in `functions.py`, g is ∂C/∂(output), may be None, and is never written. A convolution is linear in each tensor that
it reads, so its backward applies the same Function in another role: no derivative of any order is torch's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manual_mlp import grids as sheet
from manual_mlp import kernels
from manual_mlp.functions import Gradients, ManualFunction, apply, define, linear, primals, save_all, sum_of, symmetric
from manual_mlp.grids import Dims, Geometry, Windows

# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------

INPUT, WEIGHT, OUTPUT = range(3)


class Convolution(ManualFunction):
    """The partial derivative of T(a, W, g) = Σ g · (a ∗ W) by one of the three, from the other two.  Saves these.

    role is the one that is missing, and None in its place: OUTPUT gives z = a ∗ W + b, INPUT gives ∂C/∂a from W and g,
    WEIGHT gives ∂C/∂W from a and g.
    """

    @staticmethod
    def forward(
        role: int, a: Tensor | None, weight: Tensor | None, g: Tensor | None, bias: Tensor | None, at: Geometry
    ) -> Tensor:
        if role == OUTPUT:
            return sheet.conv(a, weight, bias, at)  # type: ignore[arg-type]
        return sheet.conv_input(weight, g, at) if role == INPUT else kernels.conv_weight(a, g, at)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.role, *three, _, ctx.at = inputs
        ctx.shape = output.shape
        wanted = ctx.needs_input_grad[1:4]
        if not kernels.transforming():  # where vmap takes what is saved for both to be the same tensors
            three = [x if any(wanted[:i] + wanted[i + 1 :]) else None for i, x in enumerate(three)]
        save_all(ctx, *three)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return (None,) * 6
        three, wanted = ctx.saved_tensors, ctx.needs_input_grad
        gradients = [
            apply(Convolution, role, *_with(_with(three, ctx.role, g), role, None), None, ctx.at)
            if wanted[1 + role]
            else None
            for role in range(3)
        ]
        return None, *gradients, kernels.conv_bias(g) if wanted[4] else None, None

    @staticmethod
    def tangent(ctx: Any, _: None, *tangents: Any) -> Tensor:
        three, (*moving, bias_t, _) = primals(ctx), tangents
        return sum_of(
            *(
                apply(Convolution, ctx.role, *_with(three, i, x_t), None, ctx.at)
                for i, x_t in enumerate(moving)
                if x_t is not None
            ),
            None if bias_t is None else bias_t.view(-1, 1, 1).expand(ctx.shape),
        )


def _with(three: Sequence[Any], role: int, x: Tensor | None) -> list[Any]:
    return [x if i == role else other for i, other in enumerate(three)]


# ---------------------------------------------------------------------------------------------------------------------
# Pooling
# ---------------------------------------------------------------------------------------------------------------------


class Largest(ManualFunction):
    """a′ = the largest number of each window, the first of equals, and its place i.  Saves i."""

    @staticmethod
    def forward(a: Tensor, at: Windows) -> tuple[Tensor, Tensor]:
        return sheet.largest(a, at)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.at = inputs
        ctx.mark_non_differentiable(output[1])
        save_all(ctx, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None = None) -> Gradients:
        (i,) = ctx.saved_tensors
        return None if g is None else apply(Picked, g, True, i, ctx.at), None

    @staticmethod
    def tangent(ctx: Any, a_t: Tensor, *_: None) -> tuple[Tensor, None]:
        (i,) = primals(ctx)
        return apply(Picked, a_t, False, i, ctx.at), None


def _picked(x: Tensor, transposed: bool, i: Tensor, at: Windows) -> Tensor:
    return sheet.scatter(_float(x), i, at.size).to(x.dtype) if transposed else sheet.gather(x, i)


def _average(x: Tensor, transposed: bool, _: None, at: Windows, with_padding: bool, divisor: int | None) -> Tensor:
    return (_spread if transposed else sheet.average)(x, at, with_padding, divisor)


_spread = kernels.rounded_once(sheet.spread)
Picked = linear("Picked", "a′_p = a_{i(p)}; transposed, what p sends arrives at i(p).  Saves i.", _picked)
Average = linear("Average", "a′ = S a / D; transposed, Sᵀ (g / D).  Saves nothing.", _average)

# ---------------------------------------------------------------------------------------------------------------------
# Normalisation
# ---------------------------------------------------------------------------------------------------------------------


def _norm_function(name: str, doc: str, forward: Callable[..., Any], given: bool = False) -> type[ManualFunction]:
    """Return the Function x, γ, β, last, ε, … ↦ y, μ, r, and perhaps running statistics.  Saves x, γ, μ, r.

    last    how many dimensions of a row are a set, the last ones; 0 if each channel is a set
    given   whether m and s, its last arguments, stand for μ and v: then it returns y alone, and saves x, γ, m, s
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, ctx.last, ctx.ε, *more = inputs
        ctx.statistics = 0 if given else len(output) - 1
        save_all(ctx, x, weight, *(more if given else output[1:3]))

    def backward(ctx: Any, g: Tensor | None, *_: None) -> Gradients:
        x, weight, *saved = ctx.saved_tensors
        # If this may be differentiated, μ and r are computed again: as they were saved, they have no history.
        own = None if given or torch.is_grad_enabled() or kernels.transforming() else saved
        needs, constants = ctx.needs_input_grad[:3], saved if given else None
        gradients = norm_gradients(g, x, weight, ctx.last, ctx.ε, needs, constants, own)
        return *gradients, *(None for _ in ctx.needs_input_grad[3:])

    def tangent(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any) -> Any:
        x, weight, *saved = primals(ctx)
        y_t = _norm_tangent(x, weight, ctx.last, ctx.ε, saved if given else None, (x_t, weight_t, bias_t))
        # Nobody differentiates the statistics. Marked as such, they break jvp of vmap.
        return y_t if given else (y_t, *[torch.zeros_like(saved[0])] * ctx.statistics)

    return define(name, doc, forward, setup_context, backward, tangent)


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, last: int, ε: float, m: Tensor | None, s: Tensor | None, κ: float
) -> tuple[Tensor, ...]:
    m, s = None if m is None else m.clone(), None if s is None else s.clone()
    if x.numel() == 0:  # which the kernel refuses
        y, μ, r = x.clone(), x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    else:
        y, μ, r = torch.native_batch_norm(x, weight, bias, m, s, True, κ, ε)
    return (y, μ, r) if m is None or s is None else (y, μ, r, m, s)


def _layer_norm(x: Tensor, weight: Any, bias: Any, last: int, ε: float) -> tuple[Tensor, ...]:
    return torch.native_layer_norm(x, x.shape[x.dim() - last :], weight, bias, ε)


def _running_norm(x: Tensor, weight: Any, bias: Any, last: int, ε: float, m: Tensor, s: Tensor) -> Tensor:
    return torch.native_batch_norm(x, weight, bias, m, s, False, 0.0, ε)[0] if x.numel() else x.clone()


BatchNorm = _norm_function(
    "BatchNorm",
    """y = γ x̂ + β over the set of each channel, μ, r, and the running statistics m and s after this batch.

    x (N, C, …), γ, β, m, s (C,) or None.  Saves x, γ, μ, r.
    """,
    _batch_norm,
)
LayerNorm = _norm_function(
    "LayerNorm", "y = γ x̂ + β over the set of each row, and μ, r.  Saves x, γ, μ, r.", _layer_norm
)


RunningNorm = _norm_function(
    "RunningNorm",
    "y = γ (x − m) ρ + β, ρ = 1/√(s + ε): m and s, the running statistics, are given.  Saves x, γ, m, s.",
    _running_norm,
    given=True,
)


def _sets(x: Tensor, last: int) -> tuple[Dims, Dims]:
    """Return the dimensions of the rows, over which ∂C/∂γ sums, and those of a set, over which μ and v are means."""
    dims = tuple(range(x.dim()))
    if last > 0:
        return dims[:-last], dims[-last:]
    of_channel = dims[:1] + dims[2:]
    return of_channel, of_channel


def _along(values: Tensor | None, x: Tensor, last: int) -> Any:
    """Return values (C,) so that they broadcast along the channels of x, if these are the sets."""
    return values if values is None or last > 0 or x.dim() == 2 else values.view(-1, *(1,) * (x.dim() - 2))


def _float(x: Tensor | None) -> Any:
    return x.float() if x is not None and x.dtype in kernels.ROUNDED else x


def _normalised(x: Tensor, last: int, ε: float, given: Any, own: Any = None) -> tuple[Tensor, Tensor, Dims | None]:
    """Return x̂, r and the dimensions of a set, None if μ and r are given numbers; as `norm_gradients`."""
    over = None if given is not None else _sets(x, last)[1]
    if over is None:
        μ, s = (_along(of, x, last) for of in given)
        r = sheet.reciprocal(s, ε)
    elif own is not None:
        μ, r = (_along(of, x, last) for of in own)
    else:
        μ, r = sheet.moments(_float(x), over, ε)
    return sheet.normalised(_float(x), _float(μ), _float(r)), _float(r), over


def norm_gradients(
    g: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    last: int,
    ε: float,
    needs: Sequence[bool],
    given: Any = None,
    own: Any = None,
) -> Gradients:
    """∂C/∂x, ∂C/∂γ, ∂C/∂β; evaluated in float32 for half precision, and rounded once.

    given: the statistics m and s; else own: μ and r of the sets, which are computed again if they are None.
    """
    if g is None:
        return None, None, None
    (x̂, r, over), (rows, _) = _normalised(x, last, ε, given, own), _sets(x, last)
    g, γ = _float(g), _float(_along(weight, x, last))
    gradients: tuple[Any, ...]
    if over == rows and kernels.plain(g):  # batch norm in training, whose sets are the channels
        gradients = kernels.channel_gradients(g, x̂, r, γ, over, needs[0])
    else:
        gradients = (
            sheet.norm_input(g, x̂, r, γ, over) if needs[0] else None,
            sheet.norm_weight(g, x̂, rows) if needs[1] else None,
            sheet.norm_bias(g, rows) if needs[2] else None,
        )
    wanted = zip(gradients, needs, (x, weight, g), strict=True)
    return tuple(of.to(like.dtype) if need and like is not None else None for of, need, like in wanted)  # type: ignore[union-attr]


def _norm_tangent(x: Tensor, weight: Tensor | None, last: int, ε: float, given: Any, tangents: Sequence[Any]) -> Tensor:
    """ẏ = γ r P ẋ + γ̇ x̂ + β̇, the terms that are there."""
    x_t, *of_channels = tangents
    x̂, r, over = _normalised(x, last, ε, given)
    γ, weight_t, bias_t = (_along(of, x, last) for of in (weight, *of_channels))
    return sum_of(
        None if x_t is None else sheet.scaled(sheet.norm_input(_float(x_t), x̂, r, None, over), γ, None),
        None if weight_t is None else sheet.scaled(x̂, weight_t, None),
        None if bias_t is None else bias_t.expand_as(x),
    ).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------------------------------

softmax_delta = kernels.rounded_once(sheet.softmax_delta)


Softmax = symmetric("Softmax", "a = softmax z along one dimension.  Saves a.", sheet.softmax, softmax_delta, "a")
