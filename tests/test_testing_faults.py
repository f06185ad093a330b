"""The battery catches what it is for: one fault at a time in a right Function, and the check meant for it fails."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionMeta

from manual_mlp import testing

X, W = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """σ(x Wᵀ), the right one."""
    if x.is_complex():
        raise RuntimeError("complex tensors are not supported")
    return torch.sigmoid(x @ weight.t())


def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)
    ctx.save_for_forward(*inputs, output)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if g is None:
        return None, None
    x, weight, a = ctx.saved_tensors
    delta = g * (1 - a) * a
    needs_x, needs_weight = ctx.needs_input_grad
    return delta @ weight if needs_x else None, delta.t() @ x if needs_weight else None


def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None) -> Tensor:
    x, weight, a = ctx.saved_tensors
    z_t = torch.zeros_like(a)
    if x_t is not None:
        z_t = z_t + x_t @ weight.t()
    if weight_t is not None:
        z_t = z_t + x @ weight_t.t()
    return z_t * (1 - a) * a


RIGHT: dict[str, Any] = {
    "forward": forward,
    "setup_context": setup_context,
    "backward": backward,
    "jvp": jvp,
    "generate_vmap_rule": True,
}


def layer(**faults: Any) -> Callable[..., Tensor]:
    """The layer as a Function, with some rules replaced; autocast's casts around it."""
    rules = {name: rule if isinstance(rule, bool) else staticmethod(rule) for name, rule in (RIGHT | faults).items()}
    function = FunctionMeta("Layer", (Function,), rules)

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
            x, weight = x.bfloat16(), weight.bfloat16()
        return function.apply(x, weight)  # type: ignore[attr-defined]

    return apply


def with_delta(delta_of: Callable[[Tensor, Tensor], Tensor], **more: Any) -> Callable[..., Tensor]:
    """The layer with another δ in its backward."""

    def wrong(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if g is None:
            return None, None
        x, weight, a = ctx.saved_tensors
        delta = delta_of(g, a)
        needs_x, needs_weight = ctx.needs_input_grad
        return delta @ weight if needs_x else None, delta.t() @ x if needs_weight else None

    return layer(backward=wrong, **more)


def transposed(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if g is None:
        return None, None
    x, weight, a = ctx.saved_tensors
    delta = g * (1 - a) * a
    return delta @ weight, (x.t() @ delta).reshape(weight.shape)


def ignores_needs(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if g is None:
        return None, None
    x, weight, a = ctx.saved_tensors
    delta = g * (1 - a) * a
    return delta @ weight, delta.t() @ x


def loses_frozen(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """With one input frozen the other's gradient is forgotten too."""
    if g is None or not all(ctx.needs_input_grad):
        return None, None
    return backward(ctx, g)


def unmaterialised(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight, a = ctx.saved_tensors
    delta = g * (1 - a) * a
    return delta @ weight, delta.t() @ x


def writes_g(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if g is None:
        return None, None
    x, weight, a = ctx.saved_tensors
    delta = g.mul_(1 - a) * a
    return delta @ weight, delta.t() @ x


def writes_input(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    gradients = backward(ctx, g)
    if g is not None:
        ctx.saved_tensors[0].detach().mul_(0.5)
    return gradients


def on_ctx(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """The output and the inputs as attributes."""
    ctx.x, ctx.weight, ctx.a = *inputs, output
    ctx.save_for_forward(*inputs, output)
    ctx.set_materialize_grads(False)


def from_ctx(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if g is None:
        return None, None
    delta = g * (1 - ctx.a) * ctx.a
    needs_x, needs_weight = ctx.needs_input_grad
    return delta @ ctx.weight if needs_x else None, delta.t() @ ctx.x if needs_weight else None


def detaching(g: Tensor, a: Tensor) -> Tensor:
    """First derivatives are right, second ones take a for a constant."""
    a = a.detach()
    return g * (1 - a) * a


def slightly_off(g: Tensor, a: Tensor) -> Tensor:
    """Too little for finite differences to see."""
    return g * (1 - a) * a * (1 + 1e-10)


def tangent_lost(g: Tensor, a: Tensor) -> Tensor:
    """The saved tensor without its tangent: only forward over reverse notices."""
    a = forward_ad.unpack_dual(a).primal
    return g * (1 - a) * a


def clamped(g: Tensor, a: Tensor) -> Tensor:
    a = a.clamp(1e-7, 1 - 1e-7)
    return g * (1 - a) * a


def contiguous_only(g: Tensor, a: Tensor) -> Tensor:
    """Reads the memory of g as if it lay in order."""
    flat = torch.as_strided(
        g, (min(g.numel(), 1 + sum(s * (n - 1) for s, n in zip(g.stride(), g.shape, strict=True))),), (1,)
    )
    flat = torch.cat([flat, flat.new_zeros(a.numel())])[: a.numel()]
    return flat.reshape(a.shape) * (1 - a) * a


def jvp_one_term(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None) -> Tensor:
    return jvp(ctx, x_t, None)


def python_branch(g: Tensor, a: Tensor) -> Tensor:
    """Asks the numbers, which a batched gradient can't tell."""
    return g * (1 - a) * a if g.sum().item() == g.sum().item() else g


class Memory:
    """A state beside the Function."""

    calls = 0


def drifting(g: Tensor, a: Tensor) -> Tensor:
    Memory.calls += 1
    return g * (1 - a) * a * (1 + 1e-14 * Memory.calls)


def strided_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Wrong for an input that is a view into wider memory."""
    right = forward(x, weight)
    return right if x.is_contiguous() else right * 1.001


def no_empty(x: Tensor, weight: Tensor) -> Tensor:
    return forward(x - x.mean(0).nan_to_num() * 0 if len(x) else x / x.amax(), weight)


def conjugates_forgotten(x: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(x @ weight.t())


def float32_inside(x: Tensor, weight: Tensor) -> Tensor:
    return forward(x, weight) + torch.zeros(1, dtype=torch.float32) if x.dtype == torch.bfloat16 else forward(x, weight)


def two_minus(x: Tensor, weight: Tensor) -> Tensor:
    """Cancels: in low precision nothing is left."""
    return (forward(x, weight) + 1e4) - 1e4


def not_casting(x: Tensor, weight: Tensor) -> Tensor:
    """apply without autocast's casts around it: the backward mixes dtypes."""
    rules = {name: rule if rule is True else staticmethod(rule) for name, rule in RIGHT.items()}
    return FunctionMeta("Layer", (Function,), rules).apply(x, weight)  # type: ignore[attr-defined]


def old_style() -> Callable[..., Tensor]:
    class Old(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
            a = forward(x, weight)
            ctx.save_for_backward(x, weight, a)
            return a

        backward = staticmethod(ignores_needs)  # type: ignore[assignment]

    return Old.apply


def wrong_dtype(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    gradients = backward(ctx, g)
    return tuple(None if gradient is None else gradient.to(torch.complex128) for gradient in gradients)  # type: ignore[return-value]


def wrong_shape(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    grad_x, grad_weight = backward(ctx, g)
    return grad_x, None if grad_weight is None else grad_weight.t()


def other_thread(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("made in another thread")
    return backward(ctx, g)


# fault: the layer with it, the check that must fail, the function it should equal if the check needs one
right = layer()
FAULTS: dict[str, tuple[Callable[..., Tensor], str, Callable[..., Tensor] | None]] = {
    "sign": (with_delta(lambda g, a: -g * (1 - a) * a), "first derivative", None),
    "0.05 % off": (with_delta(lambda g, a: g * (1 - a) * a * 1.0005), "first derivative", None),
    "0.001 % off": (with_delta(lambda g, a: g * (1 - a) * a * 1.00001), "first derivative", None),
    "missing factor": (with_delta(lambda g, a: g * a), "first derivative", None),
    "weight gradient transposed": (layer(backward=transposed), "first derivative", None),
    "weight gradient of the wrong shape": (layer(backward=wrong_shape), "first derivative", None),
    "undefined gradient": (layer(backward=unmaterialised), "undefined gradients", None),
    "gradient of another dtype": (layer(backward=wrong_dtype), "first derivative", None),
    "python branch": (with_delta(python_branch), "batched gradients", None),
    "no jvp": (layer(jvp=Function.jvp), "forward mode", None),
    "jvp with one term": (layer(jvp=jvp_one_term), "forward mode", None),
    "jvp against the backward": (layer(jvp=jvp_one_term), "torch.func.jvp", None),
    "no vmap rule": (layer(generate_vmap_rule=False), "torch.func.vmap", None),
    "old style": (old_style(), "torch.func.grad", None),
    "second derivative lost": (with_delta(detaching), "second derivative", None),
    "tangent of a saved tensor lost": (with_delta(tangent_lost), "forward over reverse", None),
    "another convention": (lambda x, w: right(x, w) * 2, "reference", right),
    "backward of another forward": (with_delta(slightly_off), "reference, first derivative", right),
    "second derivative of another": (with_delta(detaching), "reference, second derivative", right),
    "reads g as contiguous": (with_delta(contiguous_only), "strided incoming gradients", None),
    "reads x as contiguous": (layer(forward=strided_forward), "strided inputs", None),
    "writes into g": (layer(backward=writes_g), "incoming gradient is not written", None),
    "writes into its input": (layer(backward=writes_input), "inputs are not written", None),
    "tensors on ctx": (layer(setup_context=on_ctx, backward=from_ctx), "saved tensors can be hooked", None),
    "tensors on ctx, overwritten": (layer(setup_context=on_ctx, backward=from_ctx), "saved tensors are guarded", None),
    "output on ctx": (layer(setup_context=on_ctx, backward=from_ctx), "nothing leaks", None),
    "needs_input_grad ignored": (layer(backward=ignores_needs), "frozen inputs", None),
    "needs_input_grad misread": (layer(backward=loses_frozen), "frozen inputs", None),
    "no rows": (layer(forward=no_empty), "empty batch", None),
    "different each time": (with_delta(drifting), "deterministic", None),
    "bound to a thread": (layer(backward=other_thread), "backward in another thread", None),
    "float32 inside": (float32_inside, "bfloat16", None),
    "cancellation": (two_minus, "float32", None),
    "autocast": (not_casting, "autocast", None),
    "complex without conjugates": (layer(forward=conjugates_forgotten), "complex", None),
}  # fmt: skip


def test_the_right_layer_passes() -> None:
    """So that what fails below is the fault."""
    report = testing.check_gradients(right, (X, W), lambda x, weight: torch.sigmoid(x @ weight.t()))
    report.raise_if_failed()
    assert sum(row.outcome == "passed" for row in report.rows) >= 30


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_fault_is_caught(fault: str) -> None:
    function, check, reference = FAULTS[fault]
    row = testing.battery.run(check, testing.checks.Subject(fault, function, (X, W), reference))
    assert row.outcome == "failed", f"{fault}: {check} {row.outcome}: {row.seen}"
    assert row.seen
    assert "tensor([" not in row.seen  # the matrices of gradcheck
    assert row.cause
    assert row.level == LEVELS.get(fault, "wrong")


# The level of each fault that is not wrong.
LEVELS = {
    **dict.fromkeys(
        ["no jvp", "no vmap rule", "old style", "python branch", "no rows", "autocast"], "unsupported"
    ),
    **dict.fromkeys(
        ["undefined gradient", "writes into g", "writes into its input", "tensors on ctx", "output on ctx",
         "tensors on ctx, overwritten", "complex without conjugates",
         "needs_input_grad ignored", "different each time", "bound to a thread", "float32 inside"],
        "unsafe",
    ),
}  # fmt: skip


def componentwise(G: Callable[..., Tensor], slope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """G with a derivative of its own, as a Function."""
    rules = {
        "forward": lambda x: G(x),
        "setup_context": lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        "backward": lambda ctx, g: g * slope(ctx.saved_tensors[0]),
    }
    members = {name: staticmethod(rule) for name, rule in rules.items()} | {"generate_vmap_rule": True}
    return FunctionMeta("Componentwise", (Function,), members).apply  # type: ignore[attr-defined, no-any-return]


def guarded_log(x: Tensor) -> Tensor:
    if bool((x <= 0).any()):
        raise ValueError("expected x > 0")
    return x.log()


def reciprocal_at(c: float) -> Callable[[Tensor], Tensor]:
    """Its pole lies on, or beside, a point that is asked."""
    return lambda x: 1 / (x - c)


# Right functions that have no derivative somewhere from −30 to 30, and inputs where they have one.
LIMITED: dict[str, tuple[Callable[..., Tensor], list[float]]] = {
    **{name: (getattr(torch, name), [0.3, 0.7]) for name in
       ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "asin", "acos", "atanh", "logit", "reciprocal", "lgamma",
        "digamma", "erfinv", "tan", "abs", "floor", "frac", "sinc")},
    **{name: (getattr(torch.special, name), [0.3, 0.7]) for name in ("entr", "ndtri", "log_ndtr")},
    "acosh": (torch.acosh, [1.3, 2.7]),
    "1/x²": (lambda x: x**-2, [0.3, 0.7]),
    "√|x|": (lambda x: x.abs().sqrt(), [0.3, 0.7]),
    "x log x": (lambda x: torch.special.xlogy(x, x), [0.3, 0.7]),
    "log |x|": (lambda x: x.abs().log(), [0.3, 0.7]),
    "√(1 − x²)": (lambda x: (1 - x * x).sqrt(), [0.3, 0.7]),
    "exp x²": (lambda x: (x * x).exp(), [0.3, 0.7]),
    "exp exp x": (lambda x: x.exp().exp(), [0.3, 0.7]),
    "pole on a point": (reciprocal_at(0.51), [0.3, 0.7]),
    "pole beside a point": (reciprocal_at(0.51 + 1e-4), [0.3, 0.7]),
    "pole near a point": (reciprocal_at(0.51 + 3e-3), [0.3, 0.7]),
    "kink on a point": (lambda x: torch.relu(x - 0.51), [0.3, 0.7]),
    "kink beside a point": (lambda x: torch.relu(x - 0.51 - 3e-4), [0.3, 0.7]),
    "jump beside a point": (lambda x: x + (x - 0.51 - 3e-4).sign(), [0.3, 0.7]),
    "hardshrink": (torch.nn.functional.hardshrink, [0.3, 0.7]),
    "hardswish": (torch.nn.functional.hardswish, [0.3, 0.7]),
    "softplus, threshold 2": (lambda x: torch.nn.functional.softplus(x, 1.0, 2.01), [0.3, 0.7]),
    "refuses": (guarded_log, [0.3, 0.7]),
    "far away": (lambda x: (x - 100).sqrt(), [100.3, 100.7]),
    "of this shape only": (lambda x: x.sin() * torch.tensor([1.0, 2.0], dtype=x.dtype), [0.3, 0.7]),
    "wild": (lambda x: (1e5 * x * x).sin(), [1e-3, 2e-3]),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("reference", [False, True])
def test_tails_of_a_limited_domain(name: str, reference: bool) -> None:
    """A right function isn't blamed where it has no derivative (pytorch#76780)."""
    function, x = LIMITED[name]
    subject = testing.checks.Subject(name, function, (torch.tensor(x),), function if reference else None)
    row = testing.battery.run("tails", subject)
    assert row.outcome in ("passed", "n/a"), f"{row.seen} at {row.where}"
    assert row.outcome == ("n/a" if name in ("refuses", "far away", "wild") else "passed")


@pytest.mark.parametrize("name", ["log", "sqrt", "asin", "acosh", "logit", "reciprocal", "lgamma"])
def test_a_limited_domain_passes_the_whole_battery(name: str) -> None:
    function = getattr(torch, name)
    x = torch.tensor([[1.3, 1.7], [2.2, 3.1]] if name == "acosh" else [[0.3, 0.7], [0.2, 0.4]])
    report = testing.check_gradients(function, x, function)
    assert not report.failed, str(report)
    assert report["tails"].outcome == "passed"


@pytest.mark.parametrize(
    ("G", "slope", "x"),
    [
        (torch.log, lambda x: 1 / x.clamp(min=0.1), [0.3, 0.7]),
        (torch.log, lambda x: torch.where(x > 20, 0.05, 1 / x), [0.3, 0.7]),
        (torch.sqrt, lambda x: 0.5 / (x + 1e-3 * (x > 25)).sqrt(), [0.3, 0.7]),
        (torch.sqrt, lambda x: 0.5 / x.clamp(min=0.02).sqrt(), [0.3, 0.7]),
        (torch.asin, lambda x: (1 - x * x).clamp(min=0.2).rsqrt(), [0.3, 0.7]),
        (torch.acosh, lambda x: (x * x - 1).clamp(min=0.1).rsqrt(), [1.3, 2.7]),
        (torch.logit, lambda x: 1 / (x * (1 - x)).clamp(min=0.02), [0.3, 0.7]),
        (torch.reciprocal, lambda x: -1 / (x * x).clamp(max=400), [0.3, 0.7]),
        (torch.reciprocal, lambda x: torch.where(x < -9, 1 / x**2, -1 / x**2), [0.3, 0.7]),
        (torch.lgamma, lambda x: torch.where(x > 12, x.log(), x.digamma()), [0.3, 0.7]),
        (torch.tan, lambda x: 1 + x.tan().clamp(-30, 30) ** 2, [0.3, 0.7]),
        (torch.exp, lambda x: x.exp() * (1 + 1e-5 * (x > 5)), [0.3, 0.7]),
        (torch.tanh, lambda x: 1 - x.tanh().clamp(-1 + 1e-6, 1 - 1e-6) ** 2, [0.3, 0.7]),
        (torch.relu, lambda x: (x > 0) * (x < 6.0), [0.3, 0.7]),
        (lambda x: torch.where(x > 0, x.sqrt(), 0), lambda x: 0.5 / x.sqrt(), [0.3, 0.7]),  # NaN where it is 0
    ],
)
def test_a_wrong_tail_is_caught_in_a_limited_domain(
    G: Callable[..., Tensor], slope: Callable[..., Tensor], x: list[float]
) -> None:
    subject = testing.checks.Subject("wrong", componentwise(G, slope), (torch.tensor(x),))
    assert testing.battery.run("first derivative", subject).outcome == "passed"
    row = testing.battery.run("tails", subject)
    assert (row.outcome, row.level) == ("failed", "wrong")
    assert row.where.startswith("z = ")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(),
        lambda x: x.flip(0).cumsum(0).flip(0),
        lambda x: x.cumsum(0),
        lambda x: x + x[[1, 0, 3, 2]],
        lambda x: x.sort().values,
        lambda x: x / x.norm(),
        lambda x: x * x[2],
    ],
)
def test_tails_ask_componentwise_functions_alone(function: Callable[..., Tensor]) -> None:
    x = torch.tensor([0.4, 0.1, 0.9, 0.2])
    assert testing.battery.run("tails", testing.checks.Subject("mixes", function, (x,))).outcome == "n/a"


def test_tail_is_caught() -> None:
    """Where gradcheck sees nothing: a clamp that matters only beyond z = 16."""
    right_rules = {
        "forward": lambda z: torch.sigmoid(z),
        "setup_context": lambda ctx, inputs, output: ctx.save_for_backward(output),
        "backward": lambda ctx, g: clamped(g, ctx.saved_tensors[0]),
        "generate_vmap_rule": True,
    }
    function = FunctionMeta(
        "Clamped", (Function,), {k: v if v is True else staticmethod(v) for k, v in right_rules.items()}
    )
    report = testing.check_gradients(function, torch.randn(6, dtype=torch.float64))
    assert report["first derivative"].outcome == "passed"
    assert report["tails"].outcome == "failed"
    assert report["tails"].where.startswith("z = ")


def test_the_compiler_is_asked() -> None:
    """A Function with a jvp can't be traced (pytorch#180284): this fails when torch has mended it."""
    report = testing.check_gradients(right, (X, W), compile=True)
    assert report["torch.compile"].outcome == "failed"


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) + 2 >= 20
    caught = {check for _, check, _ in FAULTS.values()} | {"tails", "torch.compile"}
    flags_of_the_same = {
        "gradient dtypes", "batched forward mode", "second derivative, strided", "second derivative, batched",
        "checkpointing",
    }  # fmt: skip
    assert caught | flags_of_the_same == set(testing.checks.CHECKS)
