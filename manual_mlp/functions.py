"""torch.autograd.Functions: each binds formulas of the sheet to autograd, and says what is saved and what is returned.

`Affine`, `Sigmoid` and `AffineSigmoid` are written out, since they are the lesson. The other activations come from
their rows: `ACTIVATION[name]` alone, `AFFINE_ACTIVATION[name]` fused with the affine map. All costs follow.

Call a Function by `apply(Function, *arguments)`. In every backward g = ∂C/∂(output), and may be None (undefined),
expanded or strided: it is read, never written. Tensors are saved only for a gradient that somebody needs.

One way around these backwards is torch's own (pytorch#193279, in torch 2.13): torch.compile(torch.func.grad(f)), and
vjp or jacrev alike, differentiate the forward and call no custom backward. The numbers are right, the formula ATen's.
Compile f and call .backward() instead, or leave the transform uncompiled.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionMeta

from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.formulas import ACTIVATIONS, Activation

Gradients = tuple[Tensor | None, ...]


class ManualFunction(Function):
    """A Function with a forward-mode rule, `tangent`, and two ways to be called.

    direct    Function.apply without binding the signature
    dual      the same Function with `tangent` as its jvp; apart, since torch.compile can't trace a Function that
              defines a jvp (pytorch#180284)
    """

    generate_vmap_rule = True
    direct: ClassVar[Callable[..., Any]]
    dual: ClassVar[type[Function]]
    tangent: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls.direct = super(Function, cls).apply  # type: ignore[misc]
        if "tangent" in vars(cls):
            rules = dict(vars(cls)) | {"jvp": staticmethod(_nesting(cls.tangent)), "generate_vmap_rule": True}
            cls.dual = FunctionMeta(cls.__name__, (Function,), rules)  # type: ignore[assignment]


def _nesting(tangent: Callable[..., Any]) -> Callable[..., Any]:
    """`tangent` with forward mode on. Torch has it off here, and a tangent's own tangent is 0 (pytorch#197867)."""

    @functools.wraps(tangent)
    def evaluate(*args: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return tangent(*args)

    return evaluate


def _primals(ctx: Any) -> tuple[Any, ...]:
    """What a tangent reads: the saved tensors, less the tangents they carry themselves at this level."""
    return tuple(None if saved is None else forward_ad.unpack_dual(saved).primal for saved in ctx.saved_tensors)


def apply(function: type[ManualFunction], *args: Any) -> Any:
    """Function.apply, without its cost: binding the signature in Python takes longer than a small layer.

    Under a transform or a compiler the public `Function.apply` does the work; without any gradient mode the formula is
    called alone.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args) if _differentiated(args) else function.forward(*args)
    if sheet.transforming():
        return function.dual.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return function.direct(*args)


def _differentiated(args: tuple[Any, ...]) -> bool:
    """Whether a graph needs the backward. Without it dynamo fails on a forward that takes *parameters, and an exported
    program, which is for inference, would not be of plain operators."""
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _refuse_complex(tensor: Tensor) -> None:
    if tensor.dtype.is_complex:
        raise InputError(
            f"expected a real tensor; got {tensor.dtype}, and the backward formulas have no conjugates: "
            "split it into its real and imaginary parts"
        )


def _save_all(ctx: Any, first: Tensor, *more: Tensor | None) -> None:
    _refuse_complex(first)
    ctx.save_for_backward(first, *more)
    ctx.save_for_forward(first, *more)
    ctx.set_materialize_grads(False)


# ---------------------------------------------------------------------------------------------------------------------
# The lesson, longhand
# ---------------------------------------------------------------------------------------------------------------------


class Affine(ManualFunction):
    """z = a Wᵀ + b.  a (…, n_in), weight (n_out, n_in), bias (n_out,) or None → z (…, n_out).  Saves a and W."""

    @staticmethod
    def forward(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _own(sheet.affine(a, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        a, weight, _ = inputs
        _save_affine(ctx, a, weight)
        ctx.save_for_forward(a, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return None, None, None
        a, weight = ctx.saved_tensors
        return _affine_gradients(ctx, g, a, weight)

    @staticmethod
    def tangent(ctx: Any, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        a, weight = _primals(ctx)
        return _affine_tangent(a, weight, a_t, weight_t, bias_t)


def _own(z: Tensor) -> Tensor:
    """z, but no view, which torch's affine map returns of other than two dimensions: autograd lets no view that a
    Function returns be written in place, and gives it no tangent."""
    if z.dim() == 2 or torch.compiler.is_compiling():
        return z
    return torch.ops.aten._unsafe_view.default(z, z.shape)


def _save_affine(ctx: Any, a: Tensor, weight: Tensor, *also: Tensor) -> None:
    """∂C/∂W needs a, ∂C/∂a needs W: a frozen weight keeps no input alive, a fixed input no weight."""
    needs_a, needs_weight, _ = ctx.needs_input_grad[:3]
    _refuse_complex(weight)
    ctx.save_for_backward(a if needs_weight else None, weight if needs_a else None, *also)
    ctx.set_materialize_grads(False)


def _affine_gradients(ctx: Any, delta: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """∂C/∂a = δ W, ∂C/∂W = δᵀ a, ∂C/∂b = Σ_N δ: those that are needed."""
    needs_a, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        sheet.grad_input(delta, weight) if needs_a else None,
        sheet.grad_weight(delta, a) if needs_weight else None,
        sheet.grad_bias(delta) if needs_bias else None,
    )


def _affine_tangent(
    a: Tensor, weight: Tensor, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None
) -> Tensor:
    """ż = ȧ Wᵀ + a Ẇᵀ + ḃ, the terms that are there."""
    z_t = None
    if a_t is not None:
        z_t = sheet.affine(a_t, weight)
    if weight_t is not None:
        z_t = sheet.affine(a, weight_t) if z_t is None else z_t + sheet.affine(a, weight_t)
    if bias_t is not None:
        z_t = bias_t.expand(*a.shape[:-1], -1) if z_t is None else z_t + bias_t
    assert z_t is not None  # autograd calls it only when some tangent is there
    return z_t


class Sigmoid(ManualFunction):
    """a = 1/(1 + e^−z), componentwise.  Saves a."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return sheet.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        _save_all(ctx, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        (a,) = ctx.saved_tensors
        return sheet.sigmoid_delta(g, a)

    @staticmethod
    def tangent(ctx: Any, z_t: Tensor) -> Tensor:
        (a,) = _primals(ctx)
        return sheet.sigmoid_delta(z_t, a)


class AffineSigmoid(ManualFunction):
    """a^{l+1} = 1/(1 + e^−z), z = a Wᵀ + b: one layer of the lecture's network as one node.  Saves a, W and a^{l+1}."""

    @staticmethod
    def forward(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return sheet.sigmoid(sheet.affine(a, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        a, weight, _ = inputs
        _save_affine(ctx, a, weight, output)
        ctx.save_for_forward(a, weight, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return None, None, None
        a, weight, activation = ctx.saved_tensors
        delta = sheet.sigmoid_delta(g, activation)
        return _affine_gradients(ctx, delta, a, weight)

    @staticmethod
    def tangent(ctx: Any, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        a, weight, activation = _primals(ctx)
        z_t = _affine_tangent(a, weight, a_t, weight_t, bias_t)
        return sheet.sigmoid_delta(z_t, activation)


# ---------------------------------------------------------------------------------------------------------------------
# The other activations, from their rows
# ---------------------------------------------------------------------------------------------------------------------


def _define(name: str, doc: str, **rules: Any) -> type[ManualFunction]:
    """A Function from its rules. Made by the metaclass, since that names the graph's node after the class."""
    members = {rule: staticmethod(function) for rule, function in rules.items()}
    return FunctionMeta(name, (ManualFunction,), members | {"__doc__": doc, "__module__": __name__})  # type: ignore


def _plus(delta: Tensor | None, g_z: Tensor | None) -> Tensor | None:
    """δ and what arrives at z itself, which is something only in a second derivative."""
    if delta is None or g_z is None:
        return g_z if delta is None else delta
    return delta + g_z


def _parts(row: Activation) -> tuple[Callable[..., Tensor], Callable[..., Tensor], bool]:
    """G, delta and whether z is kept: plain functions, since torch.compile can't look into a row from a closure."""
    return row.G, row.delta, row.saves == "z"


def _activation_function(row: Activation) -> type[ManualFunction]:
    """a = G(z), componentwise."""
    G, delta_of, keeps_z = _parts(row)

    def forward(z: Tensor, *parameters: float) -> Tensor:
        return G(z, *parameters)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, *ctx.parameters = inputs
        saved = z if keeps_z else output
        _save_all(ctx, saved)

    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        (saved,) = ctx.saved_tensors
        delta = None if g is None else delta_of(g, saved, *ctx.parameters)
        return delta, *(None for _ in ctx.parameters)

    def tangent(ctx: Any, z_t: Tensor, *_: None) -> Tensor:
        (saved,) = _primals(ctx)
        return delta_of(z_t, saved, *ctx.parameters)

    doc = f"a = {row.G_text}, componentwise.  Saves {row.saves}."
    return _define(_title(row), doc, forward=forward, setup_context=setup_context, backward=backward, tangent=tangent)


def _inplace_function(row: Activation) -> type[ManualFunction]:
    """z := G(z) for a row in a, outside transforms. (A row in z has to keep a copy: `functional` makes it.)"""
    G, delta_of, _ = _parts(row)

    def forward(z: Tensor, *parameters: float) -> Tensor:
        return z.copy_(G(z, *parameters))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, *ctx.parameters = inputs
        ctx.mark_dirty(z)
        _save_all(ctx, output)

    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        (a,) = ctx.saved_tensors
        delta = None if g is None else delta_of(g, a, *ctx.parameters)
        return delta, *(None for _ in ctx.parameters)

    doc = f"z := {row.G_text}, componentwise, in place.  Saves a."
    return _define(_title(row) + "_", doc, forward=forward, setup_context=setup_context, backward=backward)


def _affine_activation_function(row: Activation) -> type[ManualFunction]:
    """a^{l+1} = G(a Wᵀ + b) as one node. Saves a, W and what the row says.

    A row in z returns z as a second output: only so does a second derivative flow through the z it saves.
    """
    G, delta_of, keeps_z = _parts(row)

    def forward(a: Tensor, weight: Tensor, bias: Tensor | None, *parameters: float) -> Tensor | tuple[Tensor, Tensor]:
        z = sheet.affine(a, weight, bias)
        activation = G(z, *parameters)
        return (activation, _own(z)) if keeps_z else activation

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, weight, _, *ctx.parameters = inputs
        saved = output[1] if keeps_z else output
        _save_affine(ctx, a, weight, saved)
        ctx.save_for_forward(a, weight, saved)

    def backward(ctx: Any, g: Tensor | None, g_z: Tensor | None = None) -> Gradients:
        a, weight, saved = ctx.saved_tensors
        delta = _plus(None if g is None else delta_of(g, saved, *ctx.parameters), g_z)
        gradients = (None, None, None) if delta is None else _affine_gradients(ctx, delta, a, weight)
        return *gradients, *(None for _ in ctx.parameters)

    def tangent(ctx: Any, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None) -> Any:
        a, weight, saved = _primals(ctx)
        z_t = _affine_tangent(a, weight, a_t, weight_t, bias_t)
        activation_t = delta_of(z_t, saved, *ctx.parameters)
        return (activation_t, z_t) if keeps_z else activation_t

    doc = f"a^{{l+1}} = {row.G_text}, z = a Wᵀ + b.  Saves a, W and {'z' if keeps_z else 'a^{l+1}'}."
    rules = {"forward": forward, "setup_context": setup_context, "backward": backward, "tangent": tangent}
    return _define(f"Affine{_title(row)}", doc, **rules)


def _title(row: Activation) -> str:
    return "".join(word.capitalize() for word in row.name.split("_"))


# The identity alone needs no node, and fused it is the affine map.
_NONLINEAR = {name: row for name, row in ACTIVATIONS.items() if name != "identity"}
ACTIVATION = {name: _activation_function(row) for name, row in _NONLINEAR.items()} | {"sigmoid": Sigmoid}
INPLACE = {name: _inplace_function(row) for name, row in _NONLINEAR.items() if row.saves == "a"}
AFFINE_ACTIVATION = {name: _affine_activation_function(row) for name, row in _NONLINEAR.items()} | {
    "identity": Affine,
    "sigmoid": AffineSigmoid,
}


class Dropout(ManualFunction):
    """a ⊙ m / (1 − p): a (…), mask m (…) bool, keep = 1 − p.  Saves m."""

    @staticmethod
    def forward(a: Tensor, mask: Tensor, keep: float) -> Tensor:
        return sheet.dropout(a, mask, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, mask, ctx.keep = inputs
        _save_all(ctx, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        (mask,) = ctx.saved_tensors
        return None if g is None else sheet.dropout(g, mask, ctx.keep), None, None

    @staticmethod
    def tangent(ctx: Any, a_t: Tensor, mask_t: None, keep_t: None) -> Tensor:
        (mask,) = _primals(ctx)
        return sheet.dropout(a_t, mask, ctx.keep)


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


def _sum_of(*terms: Tensor | None) -> Tensor:
    """The terms that are there."""
    first, *more = (term for term in terms if term is not None)
    return sum(more, first)


class Quadratic(ManualFunction):
    """C = Σ w scale · ½ (a − ŷ)² / divisor.  prediction, target (…, n_L), weight broadcastable to it.  Saves all.

    scale 1 and divisor N: the lecture's cost. scale 2: torch.nn.MSELoss.
    """

    @staticmethod
    def forward(prediction: Tensor, target: Tensor, weight: Tensor | None, scale: float, reduction: str) -> Tensor:
        elements = sheet.quadratic(prediction, target)
        return sheet.reduce(_weighted(elements if scale == 1 else scale * elements, weight), reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.reduction = inputs
        _save_all(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return (None,) * 5
        prediction, target, weight = ctx.saved_tensors
        g = g if ctx.scale == 1 else g * ctx.scale
        share = _weighted(sheet.share(g, prediction.shape, ctx.reduction), weight)
        delta = sheet.quadratic_delta(prediction, target) * share
        needs_prediction, needs_target, *_ = ctx.needs_input_grad
        return delta if needs_prediction else None, -delta if needs_target else None, None, None, None

    @staticmethod
    def tangent(ctx: Any, prediction_t: Tensor | None, target_t: Tensor | None, *_: None) -> Tensor:
        prediction, target, weight = _primals(ctx)
        difference_t = _sum_of(prediction_t, None if target_t is None else -target_t)
        elements_t = ctx.scale * sheet.quadratic_delta(prediction, target) * difference_t
        return sheet.reduce(_weighted(elements_t, weight), ctx.reduction)


class BinaryCrossEntropy(ManualFunction):
    """C = Σ w (softplus(z) − ŷ z) / divisor.  z, target (…), weight and pos_weight broadcastable to it.  Saves all."""

    @staticmethod
    def forward(z: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str) -> Tensor:
        return sheet.reduce(_weighted(sheet.binary_cross_entropy(z, target, pos_weight), weight), reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction = inputs
        _save_all(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return None, None, None, None, None
        z, target, weight, pos_weight = ctx.saved_tensors
        share = _weighted(sheet.share(g, z.shape, ctx.reduction), weight)
        needs_z, needs_target, *_ = ctx.needs_input_grad
        return (
            sheet.binary_cross_entropy_delta(z, target, pos_weight) * share if needs_z else None,
            sheet.binary_cross_entropy_delta_target(z, pos_weight) * share if needs_target else None,
            *(None, None, None),
        )

    @staticmethod
    def tangent(ctx: Any, z_t: Tensor | None, target_t: Tensor | None, *_: None) -> Tensor:
        z, target, weight, pos_weight = _primals(ctx)
        elements_t = _sum_of(
            None if z_t is None else sheet.binary_cross_entropy_delta(z, target, pos_weight) * z_t,
            None if target_t is None else sheet.binary_cross_entropy_delta_target(z, pos_weight) * target_t,
        )
        return sheet.reduce(_weighted(elements_t, weight), ctx.reduction)


def _weighted(elements: Tensor, weight: Tensor | None) -> Tensor:
    return elements if weight is None else elements * weight


class CrossEntropyOfClass(ManualFunction):
    """C = −Σ_n Σ_c t_c log softmax(z)_c / divisor, over the samples whose class is not `ignored`.

    t_c = w_c ((1 − ε) onehot_c + ε/classes), so −w_class log softmax(z)_class if ε = 0; mean: divisor Σ w_class.
    z (…, classes), target (…) class indices, class_weight (classes,) or None, smoothing ε.  Saves the tensors.
    """

    @staticmethod
    def forward(
        z: Tensor, target: Tensor, class_weight: Tensor | None, ignored: int, smoothing: float, reduction: str
    ) -> Tensor:
        target, kept, counts = _samples(z, target, class_weight, ignored)
        if smoothing == 0:
            costs = sheet.cross_entropy_of_class(z, target) * counts
        else:
            costs = sheet.cross_entropy(z, sheet.class_shares(sheet.onehot(z, target), class_weight, smoothing))
        # 0 for a sample that is ignored, even where its own cost is infinite
        return sheet.reduce(torch.where(kept, costs, 0), reduction, counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ignored, ctx.smoothing, ctx.reduction = inputs
        _save_all(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return (None,) * 6
        z, target, class_weight = ctx.saved_tensors
        target, kept, counts = _samples(z, target, class_weight, ctx.ignored)
        share = torch.where(kept, sheet.share(g, target.shape, ctx.reduction, counts), 0)
        delta, factor = _delta_of_class(z, target, class_weight, counts, ctx.smoothing)
        return delta * (share if factor is None else share * factor).unsqueeze(-1), *(None,) * 5

    @staticmethod
    def tangent(ctx: Any, z_t: Tensor, *_: None) -> Tensor:
        z, target, class_weight = _primals(ctx)
        target, kept, counts = _samples(z, target, class_weight, ctx.ignored)
        delta, factor = _delta_of_class(z, target, class_weight, counts, ctx.smoothing)
        costs_t = (delta * z_t).sum(-1)
        costs_t = costs_t if factor is None else costs_t * factor
        return sheet.reduce(torch.where(kept, costs_t, 0), ctx.reduction, counts)


def _samples(z: Tensor, target: Tensor, class_weight: Tensor | None, ignored: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample: its class, 0 if it is ignored; whether it is kept; what it counts, w_class, in the mean."""
    kept = target != ignored
    target = torch.where(kept, target, 0).long()  # gather takes int64 only
    return target, kept, kept.to(z.dtype) if class_weight is None else kept * class_weight[target]


def _delta_of_class(
    z: Tensor, target: Tensor, class_weight: Tensor | None, counts: Tensor, smoothing: float
) -> tuple[Tensor, Tensor | None]:
    """δ of each sample, and the weight of the sample where δ does not hold it already."""
    if smoothing == 0:
        return sheet.cross_entropy_delta_of_class(z, target), counts
    return sheet.cross_entropy_delta(z, sheet.class_shares(sheet.onehot(z, target), class_weight, smoothing)), None


class CrossEntropy(ManualFunction):
    """C = −Σ_n Σ_c t_c log softmax(z)_c / divisor, t_c = w_c ((1 − ε) ŷ_c + ε/classes); mean: divisor N.

    z and target (…, classes), a probability for each class; class_weight (classes,) or None; smoothing ε.  Saves the
    tensors.
    """

    @staticmethod
    def forward(z: Tensor, target: Tensor, class_weight: Tensor | None, smoothing: float, reduction: str) -> Tensor:
        return sheet.reduce(sheet.cross_entropy(z, sheet.class_shares(target, class_weight, smoothing)), reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.smoothing, ctx.reduction = inputs
        _save_all(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return (None,) * 5
        z, target, class_weight = ctx.saved_tensors
        share = sheet.share(g, z.shape[:-1], ctx.reduction).unsqueeze(-1)
        needs_z, needs_target, *_ = ctx.needs_input_grad
        shares = sheet.class_shares(target, class_weight, ctx.smoothing)
        return (
            sheet.cross_entropy_delta(z, shares) * share if needs_z else None,
            sheet.cross_entropy_delta_target(z, class_weight, ctx.smoothing) * share if needs_target else None,
            *(None, None, None),
        )

    @staticmethod
    def tangent(ctx: Any, z_t: Tensor | None, target_t: Tensor | None, *_: None) -> Tensor:
        z, target, class_weight = _primals(ctx)
        shares = sheet.class_shares(target, class_weight, ctx.smoothing)
        costs_t = _sum_of(
            None if z_t is None else (sheet.cross_entropy_delta(z, shares) * z_t).sum(-1),
            None
            if target_t is None
            else (sheet.cross_entropy_delta_target(z, class_weight, ctx.smoothing) * target_t).sum(-1),
        )
        return sheet.reduce(costs_t, ctx.reduction)
