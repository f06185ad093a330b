"""torch.autograd.Functions: each binds formulas of the sheet to autograd, and chooses what is saved and returned.

`Affine`, `Sigmoid` and `AffineSigmoid` are written out, because they are the lesson. The other activations come from
their rows: `ACTIVATION[name, saves]` alone, `AFFINE_ACTIVATION[name, saves]` fused with the affine map. Linear maps and
most costs come from theirs. Complex tensors are refused: no formula here has the conjugates that they need.

Call a Function by `apply(Function, *arguments)`. In every backward g is ∂C/∂(output). It may be None (undefined),
expanded or strided; a backward reads it and never writes to it. A tensor is saved only for a gradient that is needed.

torch itself can bypass these backwards (pytorch#193279, in torch 2.13): torch.compile(torch.func.grad(f)), like vjp and
jacrev, differentiates the forward and calls no custom backward. The numbers are right, but the formula is ATen's.
Compile f and call .backward() instead, or leave the transform uncompiled.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionMeta

from manual_mlp import checks, kernels
from manual_mlp import formulas as sheet
from manual_mlp.formulas import Cost, Row
from manual_mlp.kernels import sigmoid_delta

Gradients = tuple[Tensor | None, ...]


class ManualFunction(Function):
    """A Function with a forward-mode rule, `tangent`, and two ways to be called.

    direct    Function.apply without binding the signature
    dual      the same Function with `tangent` as its jvp; a class apart, because torch.compile can't trace a Function
              that defines a jvp (pytorch#180284)
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
    """Return `tangent` with forward mode on: without it, a tangent's own tangent is 0 (pytorch#197867)."""

    @functools.wraps(tangent)
    def evaluate(*args: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return tangent(*args)

    return evaluate


def primals(ctx: Any) -> tuple[Any, ...]:
    """Return the saved tensors without the tangents that they carry themselves at this level."""
    return tuple(None if saved is None else _primal(saved) for saved in ctx.saved_tensors)


def _primal(saved: Tensor) -> Tensor:
    if not _functorch.is_batchedtensor(saved):
        return forward_ad.unpack_dual(saved).primal
    # torch has no rule for unpack_dual under the vmap of a jvp(vmap(f)).
    inner = _primal(_functorch.get_unwrapped(saved))
    return _functorch._add_batch_dim(inner, _functorch.maybe_get_bdim(saved), _functorch.maybe_get_level(saved))


def apply(function: type[ManualFunction], *args: Any) -> Any:
    """Call Function.apply without binding its signature in Python, which takes longer than a small layer.

    Under a transform or a compiler this is the public `Function.apply`. Without a gradient mode, and in what
    torch.jit.trace records, it is the formula alone. Autocast is off in it: on a GPU autocast would cast single
    operations of a formula, and the backward would meet two dtypes.
    """
    if torch._C._is_any_autocast_enabled():
        with kernels.without_autocast(args):
            return _applied(function, *args)
    return _applied(function, *args)


def _applied(function: type[ManualFunction], *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return function.apply(*args) if _differentiated(args) else function.forward(*args)
    if kernels.transforming():
        return function.dual.apply(*args)
    if not torch.is_grad_enabled() or torch._C._is_tracing():
        return function.forward(*args)
    try:
        return function.direct(*args)
    except RuntimeError:
        checks.jagged(args)
        raise


def _differentiated(args: tuple[Any, ...]) -> bool:
    """Return True if a graph needs the backward.

    If none does, a plain call is what dynamo can trace with *values, and what an exported program should consist of.
    Inside a transform dynamo calls no custom backward, and asks a Function for wrong gradients (pytorch#193279).
    """
    exporting: bool = torch.compiler._is_exporting_flag  # dynamo of torch 2.11 reads is_exporting() as True always
    if exporting or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def save_all(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward and the tangent, and let a g that nobody sends be None. Refuses a complex one."""
    if tensors[0] is not None:
        checks.real("tensor", tensors[0], whole=True)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
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

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return None, None, None
        a, weight = ctx.saved_tensors
        return _affine_gradients(ctx, g, a, weight)

    @staticmethod
    def tangent(ctx: Any, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        a, weight = primals(ctx)
        return affine_tangent(a, weight, a_t, weight_t, bias_t)


def _own(z: Tensor) -> Tensor:
    """Return z as a non-view.

    Unless the input has two dimensions, F.linear returns a view. autograd forbids in-place writes to a view that a
    Function returns, and gives it no tangent.
    """
    if z.dim() == 2 or z.is_nested or torch.compiler.is_compiling():
        return z
    return torch.ops.aten._unsafe_view.default(z, z.shape)


def _save_affine(ctx: Any, a: Tensor, weight: Tensor, *also: Tensor) -> None:
    """Save a for ∂C/∂W and W for ∂C/∂a: a frozen weight keeps no input alive, a fixed input no weight."""
    needs_a, needs_weight, _ = ctx.needs_input_grad[:3]
    if kernels.transforming():  # vmap takes what is saved for the backward and for the tangent to be the same tensors
        needs_a = needs_weight = True
    checks.real("weight", weight, whole=True)
    save_all(ctx, a if needs_weight else None, weight if needs_a else None, *also)


def _affine_gradients(ctx: Any, delta: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """∂C/∂a = δ W, ∂C/∂W = δᵀ a, ∂C/∂b = Σ_N δ; None for those that nobody needs."""
    needs_a, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        _grad_input(delta, weight) if needs_a else None,
        sheet.grad_weight(_joined(delta), _joined(a)) if needs_weight else None,
        sheet.grad_bias(_joined(delta)) if needs_bias else None,
    )


def _grad_input(delta: Tensor, weight: Tensor) -> Tensor:
    is_vector = delta.dim() == 1  # torch gives a vector times a DTensor that is cut a wrong shape
    product = sheet.grad_input(delta.unsqueeze(0) if is_vector else delta, weight)
    return product.squeeze(0) if is_vector else product


def _joined(x: Tensor) -> Tensor:
    """Return the samples of a nested tensor in one tensor, any other as it is."""
    return x.values() if x.is_nested else x


def affine_tangent(
    a: Tensor, weight: Tensor, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None
) -> Tensor:
    """ż = ȧ Wᵀ + a Ẇᵀ + ḃ, the terms that are there."""
    return sum_of(
        None if a_t is None else sheet.affine(a_t, weight),
        None if weight_t is None else sheet.affine(a, weight_t),
        None if bias_t is None else bias_t.expand(*a.shape[:-1], -1),
    )


def sum_of(*terms: Tensor | None) -> Any:
    """Return the sum of the terms that are there, None if there are none."""
    there = [term for term in terms if term is not None]
    return sheet.add(*there) if there else None


class Sigmoid(ManualFunction):
    """a = 1/(1 + e^−z), componentwise.  Saves a."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return sheet.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        save_all(ctx, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        (a,) = ctx.saved_tensors
        return sigmoid_delta(g, a)

    @staticmethod
    def tangent(ctx: Any, z_t: Tensor) -> Tensor:
        (a,) = primals(ctx)
        return sigmoid_delta(z_t, a)


class AffineSigmoid(ManualFunction):
    """a^{l+1} = 1/(1 + e^−z), z = a Wᵀ + b: one layer of the lecture's network as one node.  Saves a, W and a^{l+1}."""

    @staticmethod
    def forward(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return sheet.sigmoid(sheet.affine(a, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        a, weight, _ = inputs
        _save_affine(ctx, a, weight, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return None, None, None
        a, weight, activation = ctx.saved_tensors
        delta = sigmoid_delta(g, activation)
        return _affine_gradients(ctx, delta, a, weight)

    @staticmethod
    def tangent(ctx: Any, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        a, weight, activation = primals(ctx)
        z_t = affine_tangent(a, weight, a_t, weight_t, bias_t)
        return sigmoid_delta(z_t, activation)


# ---------------------------------------------------------------------------------------------------------------------
# The other activations, from their rows
# ---------------------------------------------------------------------------------------------------------------------


def define(name: str, doc: str, forward: Callable[..., Any], *rules: Callable[..., Any]) -> type[ManualFunction]:
    """Return a Function made of its rules, by the metaclass, which names the graph's node after the class."""
    members: dict[str, Any] = {rule.__name__: staticmethod(rule) for rule in rules}
    members |= {"forward": staticmethod(forward), "__doc__": doc, "__module__": __name__}
    return FunctionMeta(name, (ManualFunction,), members)  # type: ignore


def symmetric(
    name: str, doc: str, G: Callable[..., Tensor], delta_of: Callable[..., Tensor], saves: str, inplace: bool = False
) -> type[ManualFunction]:
    """Return the Function z, *values ↦ a = G(z) with δ = G′(z) g, whose tangent is the same line: G′ is symmetric.

    inplace: z := G(z), for a G that saves "a", outside transforms.
    """

    def forward(z: Tensor, *values: Any) -> Tensor:
        return z.copy_(G(z, *values)) if inplace else G(z, *values)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, *ctx.values = inputs
        if inplace:
            ctx.mark_dirty(z)
        saved = z if saves == "z" else output
        save_all(ctx, saved)

    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        (saved,) = ctx.saved_tensors
        delta = None if g is None else delta_of(g, saved, *ctx.values)
        return delta, *(None for _ in ctx.values)

    def tangent(ctx: Any, z_t: Tensor, *_: None) -> Tensor:
        (saved,) = primals(ctx)
        return delta_of(z_t, saved, *ctx.values)

    return define(name, doc, forward, setup_context, backward, tangent)


def _activation_function(row: Row, inplace: bool = False) -> type[ManualFunction]:
    doc = f"a = G(z) of the row {row.name!r}, componentwise.  Saves {row.saves}."
    kernel = kernels.kernel(row)
    return symmetric(_title(row) + "_" * inplace, doc, kernel.G, kernel.delta, row.saves, inplace)


def _affine_activation_function(row: Row) -> type[ManualFunction]:
    """a^{l+1} = G(a Wᵀ + b) as one node. Saves a, W and what the row says.

    A row in z returns z as a second output, because a second derivative flows through the z that it saves.
    """
    (G, delta_of, *_), keeps_z = kernels.kernel(row), row.saves == "z"

    def forward(a: Tensor, weight: Tensor, bias: Tensor | None, *values: float) -> Tensor | tuple[Tensor, Tensor]:
        z = sheet.affine(a, weight, bias)
        activation = G(z, *values)
        return (activation, _own(z)) if keeps_z else activation

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, weight, _, *ctx.values = inputs
        _save_affine(ctx, a, weight, output[1] if keeps_z else output)

    def backward(ctx: Any, g: Tensor | None, g_z: Tensor | None = None) -> Gradients:
        a, weight, saved = ctx.saved_tensors
        # Only a second derivative sends something to z itself.
        delta = sum_of(None if g is None else delta_of(g, saved, *ctx.values), g_z)
        gradients = (None, None, None) if delta is None else _affine_gradients(ctx, delta, a, weight)
        return *gradients, *(None for _ in ctx.values)

    def tangent(ctx: Any, a_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None) -> Any:
        a, weight, saved = primals(ctx)
        z_t = affine_tangent(a, weight, a_t, weight_t, bias_t)
        activation_t = delta_of(z_t, saved, *ctx.values)
        return (activation_t, z_t) if keeps_z else activation_t

    doc = f"a^{{l+1}} = G(a Wᵀ + b) of the row {row.name!r}.  Saves a, W and {'z' if keeps_z else 'a^{l+1}'}."
    return define(f"Affine{_title(row)}", doc, forward, setup_context, backward, tangent)


def _title(row: Row) -> str:
    name = row.name if row.saves == sheet.ACTIVATIONS[row.name].saves else f"{row.name}_in_z"
    return "".join(word.capitalize() for word in name.split("_"))


# Each row in each letter that it can save. The identity alone needs no node; fused, it is the affine map.
_FORMS = {(row.name, row.saves): row for of in sheet.ACTIVATIONS.values() for row in of.forms if row.name != "identity"}
ACTIVATION = {form: _activation_function(row) for form, row in _FORMS.items()} | {("sigmoid", "a"): Sigmoid}
INPLACE = {form: _activation_function(row, inplace=True) for form, row in _FORMS.items() if row.saves == "a"}
AFFINE_ACTIVATION = {form: _affine_activation_function(row) for form, row in _FORMS.items()} | {
    ("identity", "a"): Affine,
    ("sigmoid", "a"): AffineSigmoid,
}


def fused(name: str, values: tuple[float, ...]) -> type[ManualFunction]:
    """Return the Function of an affine map and this activation."""
    return AFFINE_ACTIVATION[name, sheet.ACTIVATIONS[name].saves_with(*values)]


class Sum(ManualFunction):
    """Σ_k a^k of terms of one shape.  Saves nothing."""

    @staticmethod
    def forward(*terms: Tensor) -> Tensor:
        return sheet.add(*terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        return tuple(g if needed else None for needed in ctx.needs_input_grad)

    @staticmethod
    def tangent(ctx: Any, *terms_t: Tensor | None) -> Tensor:
        return sum_of(*terms_t)


def linear(name: str, doc: str, L: Callable[..., Tensor]) -> type[ManualFunction]:
    """Return the Function x, transposed, of, *values ↦ L x, or Lᵀ x: derivatives of every order are these two again.

    of: the tensor that L depends on, or None. It is all that is saved.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.transposed, of, *ctx.values = inputs
        save_all(ctx, of)

    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        (of,) = ctx.saved_tensors
        delta = None if g is None else apply(applied, g, not ctx.transposed, of, *ctx.values)
        return delta, *(None for _ in ctx.needs_input_grad[1:])

    def tangent(ctx: Any, x_t: Tensor, *_: None) -> Tensor:
        (of,) = primals(ctx)
        return apply(applied, x_t, ctx.transposed, of, *ctx.values)

    applied = define(name, doc, L, setup_context, backward, tangent)
    return applied


Dropout = linear(
    "Dropout",
    "a ⊙ m / (1 − p), which is its own transpose: a (…), mask m (…) bool, keep = 1 − p.  Saves m.",
    lambda a, transposed, mask, keep: sheet.dropout(a, mask, keep),
)


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


def _cost_function(title: str, cost: Cost) -> type[ManualFunction]:
    """C = Σ w C(a, ŷ) / divisor. prediction, target (…), weight broadcastable to it, *constants. Saves the tensors."""
    C, delta_of, target_delta_of = cost.C, cost.delta, cost.delta_target

    def forward(
        prediction: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *constants: Tensor
    ) -> Tensor:
        return sheet.reduce(_weighted(C(prediction, target, *constants), weight), reduction)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        prediction, target, weight, ctx.reduction, *constants = inputs
        save_all(ctx, prediction, target, weight, *constants)

    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        prediction, target, weight, *constants = ctx.saved_tensors
        nothing = (None,) * (2 + len(constants))
        if g is None:
            return None, None, *nothing
        share = _weighted(sheet.share(g, prediction.shape, ctx.reduction), weight)
        needs_prediction, needs_target, *_ = ctx.needs_input_grad
        return (
            delta_of(prediction, target, *constants) * share if needs_prediction else None,
            target_delta_of(prediction, target, *constants) * share if needs_target else None,
            *nothing,
        )

    def tangent(ctx: Any, prediction_t: Tensor | None, target_t: Tensor | None, *_: None) -> Tensor:
        prediction, target, weight, *constants = primals(ctx)
        elements_t = sum_of(
            None if prediction_t is None else delta_of(prediction, target, *constants) * prediction_t,
            None if target_t is None else target_delta_of(prediction, target, *constants) * target_t,
        )
        return sheet.reduce(_weighted(elements_t, weight), ctx.reduction)

    doc = f"C of the cost {cost.name!r}, reduced.  Saves prediction, target and weights."
    return define(title, doc, forward, setup_context, backward, tangent)


def _weighted(elements: Tensor, weight: Tensor | None) -> Tensor:
    return elements if weight is None else elements * weight


Quadratic = _cost_function("Quadratic", sheet.COSTS["quadratic"])
MeanSquares = _cost_function("MeanSquares", sheet.COSTS["mse"])
BinaryCrossEntropy = _cost_function("BinaryCrossEntropy", sheet.COSTS["bce"])
WeightedBinaryCrossEntropy = _cost_function("WeightedBinaryCrossEntropy", sheet.WEIGHTED_BCE)
_entropy = sheet.COSTS["cross_entropy"]


class CrossEntropy(ManualFunction):
    """C = −Σ_n Σ_c t_c log softmax(z)_c / divisor, t_c = w_c ((1 − ε) ŷ_c + ε/classes).  Saves the tensors.

    z (…, classes), class_weight (classes,) or None, smoothing ε. target: ŷ (…, classes), a probability for each class,
    with the divisor N in the mean; or class indices (…), whose onehot ŷ is, without the samples whose class is
    `ignored`, with the divisor Σ w_class.
    """

    @staticmethod
    def forward(
        z: Tensor, target: Tensor, class_weight: Tensor | None, ignored: int, smoothing: float, reduction: str
    ) -> Tensor:
        target, kept, counts = _samples(z, target, class_weight, ignored)
        if counts is not None and smoothing == 0:
            costs = sheet.cross_entropy_of_class(z, target) * counts
        else:
            costs = _entropy.C(z, _shares(z, target, class_weight, smoothing)).sum(-1)
        return sheet.reduce(_if_kept(costs, kept), reduction, counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ignored, ctx.smoothing, ctx.reduction = inputs
        save_all(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Gradients:
        if g is None:
            return (None,) * 6
        z, target, class_weight = ctx.saved_tensors
        target, kept, counts = _samples(z, target, class_weight, ctx.ignored)
        share = _if_kept(sheet.share(g, z.shape[:-1], ctx.reduction, counts), kept).unsqueeze(-1)
        needs_z, needs_target, *_ = ctx.needs_input_grad
        return (
            _entropy.delta(z, _shares(z, target, class_weight, ctx.smoothing)) * share if needs_z else None,
            _target_delta(z, target, class_weight, ctx.smoothing) * share if needs_target else None,
            *(None,) * 4,
        )

    @staticmethod
    def tangent(ctx: Any, z_t: Tensor | None, target_t: Tensor | None, *_: None) -> Tensor:
        z, target, class_weight = primals(ctx)
        target, kept, counts = _samples(z, target, class_weight, ctx.ignored)
        delta = _entropy.delta(z, _shares(z, target, class_weight, ctx.smoothing))
        costs_t = sum_of(
            None if z_t is None else (delta * z_t).sum(-1),
            None if target_t is None else (_target_delta(z, target, class_weight, ctx.smoothing) * target_t).sum(-1),
        )
        return sheet.reduce(_if_kept(costs_t, kept), ctx.reduction, counts)


def _samples(z: Tensor, target: Tensor, class_weight: Tensor | None, ignored: int) -> tuple[Tensor, Any, Any]:
    """Return class indices, 0 if ignored; which samples are kept; what each counts, w_class, in the mean."""
    if target.is_floating_point():
        return target, None, None
    kept = target != ignored
    target = torch.where(kept, target, 0).long()  # gather takes int64 only
    return target, kept, kept.to(z.dtype) if class_weight is None else kept * class_weight[target]


def _if_kept(values: Tensor, kept: Tensor | None) -> Tensor:
    """Return 0 for a sample that is ignored, even where its own value is infinite."""
    return values if kept is None else torch.where(kept, values, 0)


def _shares(z: Tensor, target: Tensor, class_weight: Tensor | None, smoothing: float) -> Tensor:
    target = target if target.is_floating_point() else sheet.onehot(z, target)
    return sheet.class_shares(target, class_weight, smoothing)


def _target_delta(z: Tensor, target: Tensor, class_weight: Tensor | None, smoothing: float) -> Tensor:
    """∂C/∂ŷ_c = −w_c (1 − ε) log softmax(z)_c."""
    return _weighted(_entropy.delta_target(z, target) * (1 - smoothing), class_weight)
