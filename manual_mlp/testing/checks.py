"""The checks: each asks one thing of a differentiable function that torch's own layers can do."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from manual_mlp.testing.graph import nodes_of, output_of

# gradcheck's own 1e-5 and 1e-3 pass a derivative that is 0.1 % wrong. A right one in float64 passes these.
TOLERANCES: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-6}
EXACT = 1e-12
_DENSE = torch.contiguous_format

FIRST, DETERMINISTIC = "first derivative", "deterministic"

Level = Literal["", "wrong", "unsafe", "unsupported"]
Inputs = tuple[Any, ...]
Tensors = Sequence[Tensor]
Found = tuple[float, str]
Measured = Found | None


class NotApplicableError(Exception):
    """The check does not apply; the message says why."""


class WrongError(Exception):
    """The check found a difference: message, worst error, where, and its level if it is not the check's own."""

    def __init__(self, message: str, error: float | None = None, where: str = "", level: Level = "") -> None:
        super().__init__(message)
        self.error, self.where, self.level = error, where, level


@dataclass(frozen=True)
class Subject:
    """A function of tensors, its inputs as float64 leaves (others as they are), and a function that it should equal."""

    name: str
    function: Callable[..., Any]
    values: Inputs
    reference: Callable[..., Any] | None = None
    compile: bool = False
    rows: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # of the checks that have run

    def inputs(self, dtype: torch.dtype = torch.float64) -> Inputs:
        """Return fresh, contiguous leaves with the same numbers."""
        return each(lambda v: v.detach().to(dtype).clone(memory_format=_DENSE).requires_grad_(), self.values)

    def __call__(self, *inputs: Any) -> Tensor:
        return output_of(self.function(*inputs))

    def run(self) -> list[Tensor]:
        """Return the output and the gradients."""
        inputs = self.inputs()
        return [self(*inputs), *_gradients(self, inputs)]

    @cached_property
    def unfit(self) -> tuple[str, str, Exception] | None:
        """Return the one check that can be asked, why no other can, and its failure; None for most functions."""
        try:
            first = self.run()
            for _ in range(20):  # two draws may be equal by chance
                _compare(self.run(), first, "result", 1e-9, 1e-9)
        except WrongError as wrong:
            return DETERMINISTIC, "the function is random: two runs on the same inputs differ", wrong
        except Exception as error:
            return FIRST, f"the backward raises {sentence(error)}", error
        return None


def each(change: Callable[[Tensor], Tensor], values: Inputs) -> Inputs:
    """Return the values, with the floating-point tensors among them changed."""
    return tuple(change(value) if is_real(value) else value for value in values)


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def leaves(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(value for value in inputs if is_real(value) and value.requires_grad)


def _incoming(output: Tensor, seed: int = 1) -> Tensor:
    """Return an incoming gradient without symmetry."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return g.to(device=output.device, dtype=output.dtype)


def _gradients(function: Callable[..., Any], inputs: Inputs, g: Tensor | None = None) -> Tensors:
    """Return the gradients of <output, g> for the leaves; zeros for a leaf that the output does not depend on."""
    return _backward(output_of(function(*inputs)), inputs, g)


def _backward(output: Tensor, inputs: Inputs, g: Tensor | None = None, **more: Any) -> Tensors:
    g = _incoming(output) if g is None else g
    return torch.autograd.grad(output, leaves(inputs), g, materialize_grads=True, **more)


def _compare(actual: Tensors, expected: Tensors, what: str, rtol: float = EXACT, atol: float = EXACT) -> Found:
    """Return the worst error and its place; raise if it is beyond the tolerance anywhere."""
    worst, error, where = -torch.inf, 0.0, ""
    for number, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        if mine.shape != other.shape:
            raise WrongError(f"{what} {number} has shape {tuple(mine.shape)} instead of {tuple(other.shape)}")
        mine, other = mine.detach().double(), other.detach().double()
        same = (mine == other) | (mine.isnan() & other.isnan())
        errors = torch.where(same, 0, (mine - other).abs()).nan_to_num(torch.inf, torch.inf)
        beyond = errors - (atol + rtol * other.abs().nan_to_num())
        if beyond.numel() and beyond.max().item() > worst:
            place = beyond.argmax()
            index = ", ".join(str(int(i)) for i in torch.unravel_index(place, errors.shape))
            worst, error, where = beyond.max().item(), errors.flatten()[place].item(), f"{what} {number} [{index}]"
    if worst > 0:
        raise WrongError(f"{what}s differ by up to {error:.1e}", error, where)
    return error, where


def _first_derivative(subject: Subject) -> Measured:
    """Take central differences of <output, g> at each element, then gradcheck over the whole Jacobian."""
    inputs = subject.inputs()
    g = _incoming(subject(*inputs))
    numerical = [_central_differences(subject, inputs, leaf, g) for leaf in leaves(inputs)]
    measured = _compare(_gradients(subject, inputs, g), numerical, "gradient", TOLERANCES["rtol"], 1e-7)
    _gradcheck(gradcheck, subject)
    return measured


def _central_differences(subject: Subject, inputs: Inputs, leaf: Tensor, g: Tensor) -> Tensor:
    """∂<output, g>/∂leaf. With a step of 1e-5 truncation and rounding are both below 1e-9 for numbers of order 1."""
    step, slopes = 1e-5, torch.zeros_like(leaf)
    with torch.no_grad():
        for place in itertools.product(*map(range, leaf.shape)):
            here, ends = leaf[place].item(), []
            for side in (here + step, here - step):
                leaf[place] = side
                ends.append((subject(*inputs) * g).sum())
            leaf[place] = here
            slopes[place] = (ends[0] - ends[1]) / (2 * step)
    return slopes


def _gradcheck(check: Callable[..., bool], subject: Subject, **flags: bool) -> None:
    """Run gradcheck or gradgradcheck, with its message as a sentence. Errors of the function itself are raised."""
    off = dict.fromkeys(("check_undefined_grad", "check_grad_dtypes", "check_batched_grad"), False)
    inputs = subject.inputs()
    if check is gradgradcheck:
        _with_graph(subject(*inputs), inputs)
    try:
        check(subject, inputs, **TOLERANCES, **{**off, **flags})
    except GradcheckError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise WrongError(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """Return what an error says, with its type, without the matrices that gradcheck prints."""
    lines = [line.strip() for line in str(error).partition("numerical:")[0].splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines).removesuffix(',')[:240]}"


def _equals(derive: Callable[..., Tensors], what: str, subject: Subject) -> Measured:
    if subject.reference is None:
        raise NotApplicableError("no reference was given")
    expected = derive(subject.reference, subject.inputs())
    return _compare(derive(subject, subject.inputs()), expected, what)


def _second(function: Callable[..., Any], inputs: Inputs) -> Tensors:
    """Return the gradients of the squares of the first gradients and of the output, so that both orders meet."""
    output = output_of(function(*inputs))
    squares = sum((first.square().sum() for first in _with_graph(output, inputs)), output.square().sum())
    return torch.autograd.grad(squares, leaves(inputs), materialize_grads=True)


def _with_graph(output: Tensor, inputs: Inputs) -> Tensors:
    """Return gradients that can be differentiated again. Autograd passes by a node Error silently: find it."""
    gradients = _backward(output, inputs, _incoming(output).requires_grad_(), create_graph=True)
    if any(node.name() == "torch::autograd::Error" for gradient in gradients for node in nodes_of(gradient)):
        raise NotImplementedError("the backward is marked with @once_differentiable")
    return gradients


def _tails(subject: Subject) -> Measured:
    """Compare a componentwise function's derivative from −30 to 30, relative to itself, wherever there is one."""
    x = _argument(subject)
    points = torch.linspace(-30, 30, 601, dtype=torch.float64) + 0.01
    z = points[torch.arange(-(-len(points) // x.numel()) * x.numel()) % len(points)].view(-1, *x.shape)
    step = 1e-3
    try:
        with torch.no_grad():
            far_below, below, here, above, far_above = (
                torch.stack([subject(part) for part in z + shift * step]) for shift in (-1, -0.5, 0, 0.5, 1)
            )
    except Exception as error:
        raise NotApplicableError(f"it refuses numbers from -30 to 30: {sentence(error)}") from error
    slope, expected = _slopes(subject, z), (above - below) / step
    if subject.reference is None:
        # Ask nothing at a kink, whose two sides differ, or beside a pole, where nothing converges.
        jump = (far_above - 2 * here + far_below) - 4 * (above - 2 * here + below)
        blur = ((far_above - far_below) / (2 * step) - expected).abs() + jump.abs() / step
        rounding = 32 * torch.finfo(torch.float64).eps / step * (here.abs() + z.abs())
        asked = blur.isfinite() & (blur <= 0.1 * expected.abs() + rounding)
        tolerance = blur + 1e-6 * expected.abs() + rounding
    else:
        expected = _slopes(subject.reference, z)
        asked = here.isfinite() & expected.isfinite()
        tolerance = 1e-9 * expected.abs() + 1e-14
    if not asked.any():
        raise NotApplicableError("it has no derivative from -30 to 30")
    z, slope, expected, tolerance = (tensor[asked] for tensor in (z, slope, expected, tolerance))
    errors = (slope - expected).abs().nan_to_num(torch.inf)
    place = int((errors - tolerance).argmax())
    measured = errors[place].item(), f"z = {z[place]:.2f}"
    if errors[place] > tolerance[place]:
        raise WrongError(f"G′ is {slope[place]:.3e} instead of {expected[place]:.3e}", *measured)
    return measured


def _argument(subject: Subject) -> Tensor:
    """Return the one tensor of a componentwise function: if half of it stays, that half of the output stays."""
    given = leaves(subject.inputs())
    if len(given) != 1 or len(subject.values) != 1 or not given[0].numel():
        raise NotApplicableError("not a function of one tensor")
    x, before = given[0].detach(), subject(*given).detach()
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for stays in (chosen, ~chosen):
        after = subject(torch.where(stays, x, x + 1e-3)).detach()
        if after.shape != x.shape or not torch.equal(after[stays].nan_to_num(), before[stays].nan_to_num()):
            raise NotApplicableError("not a componentwise function")
    return x


def _slopes(function: Callable[..., Any], z: Tensor) -> Tensor:
    inputs = [part.clone().requires_grad_() for part in z]
    return torch.stack([_gradients(function, (part,), torch.ones_like(part))[0] for part in inputs])


def _of_leaves(subject: Subject) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the subject as a function of its floating-point tensors alone, and these, detached."""
    inputs = subject.inputs()

    def function(*values: Tensor) -> Tensor:
        left = iter(values)
        return subject(*each(lambda _: next(left), inputs))

    return function, tuple(leaf.detach() for leaf in leaves(inputs))


def _func_grad(subject: Subject) -> Measured:
    function, values = _of_leaves(subject)
    g = _incoming(function(*values))
    gradients = torch.func.grad(lambda *v: (function(*v) * g).sum(), tuple(range(len(values))))(*values)
    return _compare(gradients, _gradients(subject, subject.inputs(), g), "gradient")


def _func_jvp(subject: Subject) -> Measured:
    """<g, J t> = <Jᵀ g, t>: forward and reverse mode are adjoint. To 1e-9, because they sum in different orders."""
    function, values = _of_leaves(subject)
    tangents = tuple(_incoming(value, seed=number + 2) for number, value in enumerate(values))
    output, output_t, *_ = torch.func.jvp(function, values, tangents)
    g = _incoming(output)
    pairs = zip(_gradients(subject, subject.inputs(), g), tangents, strict=True)
    products = torch.stack([(gradient * tangent).sum() for gradient, tangent in pairs])
    return _compare([(g * output_t).sum()], [products.sum()], "adjoint product", 1e-9, 1e-9)


def _func_vmap(subject: Subject) -> Measured:
    """Compare per-sample gradients: vmap(grad) over two sets of inputs, and one set after the other."""
    function, values = _of_leaves(subject)
    gradient = torch.func.grad(lambda *v: function(*v).square().sum(), tuple(range(len(values))))
    halves = [value * 0.5 for value in values]
    batched = torch.func.vmap(gradient)(*map(torch.stack, zip(values, halves, strict=True)))
    return _compare(batched, [*map(torch.stack, zip(gradient(*values), gradient(*halves), strict=True))], "gradient")


def _strided_inputs(subject: Subject) -> Measured:
    plain, strided = subject.inputs(), each(_strided, subject.inputs())
    return _compare(_gradients(subject, strided), _gradients(subject, plain), "gradient")


def _strided(value: Tensor) -> Tensor:
    """Return the same numbers as every second element of a wider tensor."""
    return torch.stack([value.detach(), torch.full_like(value, torch.nan)], -1)[..., 0].requires_grad_()


def _strided_incoming(subject: Subject) -> Measured:
    inputs = subject.inputs()
    output = subject(*inputs)
    dims = list(reversed(range(output.dim())))
    forms = [
        torch.ones((), dtype=output.dtype).expand_as(output),
        _incoming(output.permute(dims)).permute(dims),
        _strided(_incoming(output)).detach(),
    ]
    pairs = ([_gradients(subject, inputs, given) for given in (g, g.clone(memory_format=_DENSE))] for g in forms)
    return max(_compare(strided, dense, "gradient") for strided, dense in pairs)


def _not_written(what: str, subject: Subject) -> Measured:
    """Compare the incoming gradient, or the inputs, with the same numbers drawn again: they must be as they were."""
    inputs = subject.inputs()
    g = _incoming(subject(*inputs))
    _gradients(subject, inputs, g)
    now, before = ([g], [_incoming(g)]) if what != "input" else (leaves(inputs), leaves(subject.inputs()))
    return _compare(now, before, what, 0, 0)


def _guarded(subject: Subject) -> Measured:
    """Overwrite what the backward reads before it runs: that must raise, or not matter."""
    expected = _gradients(subject, subject.inputs())
    for place in range(len(expected) + 1):
        inputs = subject.inputs()
        held = each(lambda v: v * 1, inputs)
        output = subject(*held)
        g, target = _incoming(output), [*filter(is_real, held), output][place]
        with torch.no_grad():
            target.mul_(3).add_(1)
        try:
            _compare(_backward(output, inputs, g), expected, "gradient", 1e-9, 1e-9)
        except WrongError as wrong:
            what = "output" if target is output else f"input {place}"
            raise WrongError(f"the {what} was overwritten unnoticed: {wrong}", wrong.error, wrong.where) from wrong
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error) and "modified inplace" not in str(error):
                raise
    return None


def _hooked(subject: Subject) -> Measured:
    inputs = subject.inputs()
    output = subject(*inputs)
    for node in nodes_of(output):
        for name, value in getattr(node, "__dict__", {}).items():
            if any(isinstance(part, Tensor) for part in (value if isinstance(value, tuple | list) else [value])):
                raise WrongError(f"{type(node).__name__} keeps a tensor as ctx.{name}", None, name)
    expected = _backward(output, inputs)
    inputs = subject.inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda saved: saved):
        output = subject(*inputs)
    return _compare(_backward(output, inputs), expected, "gradient")


def _unchanged_by(transform: Callable[..., Callable[..., Any]], subject: Subject) -> Measured:
    """Compare the gradients of the transformed function with those of the function."""
    transformed = transform(lambda *inputs: subject(*inputs))
    return _compare(_gradients(transformed, subject.inputs()), _gradients(subject, subject.inputs()), "gradient")


def _leaks(subject: Subject) -> Measured:
    """Run a forward without a backward: its output must be freed at once."""
    if weakref.ref(subject(*each(lambda v: v * 1, subject.inputs())))() is not None:
        raise WrongError("the output outlives its last reference")
    return None


def _frozen(subject: Subject) -> Measured:
    """Compare each gradient alone with all together: the same numbers, and fewer products if there are several."""
    inputs = subject.inputs()
    if len(leaves(inputs)) < 2:
        raise NotApplicableError("one input only")
    expected, products = _counted(subject, inputs)

    def all_but(free: Tensor) -> Inputs:
        return each(lambda v: v.detach().requires_grad_(v is free), inputs)

    alone, costs = zip(*(_counted(subject, all_but(leaf)) for leaf in leaves(inputs)), strict=True)
    measured = _compare([gradient for (gradient,) in alone], expected, "gradient")
    if products >= 2 and min(costs) >= products:
        raise WrongError(f"{products} matrix products for all gradients, and as many for each alone", level="unsafe")
    return measured


def _counted(subject: Subject, inputs: Inputs) -> tuple[Tensors, int]:
    """Return the gradients, and the number of matrix products that their backward took."""
    output = subject(*inputs)
    with _Products() as products:
        return _backward(output, inputs), products.count


class _Products(TorchDispatchMode):
    NAMES = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def _empty(subject: Subject) -> Measured:
    """Ask for N = 0: gradients of the right shapes, zero for an input without a batch dimension."""
    first = next(filter(is_real, subject.values))
    if first.dim() < 2:
        raise NotApplicableError("no batch dimension")
    try:
        return _without_rows(subject, [value is first for value in subject.values])
    except Exception:  # other inputs have as many rows, such as the target of a cost
        rows = [isinstance(v, Tensor) and v.shape[:1] == first.shape[:1] for v in subject.values]
        return _without_rows(subject, rows)


def _without_rows(subject: Subject, cut: list[bool]) -> Measured:
    values = tuple(v[:0] if empty else v for v, empty in zip(subject.values, cut, strict=True))
    inputs = Subject(subject.name, subject.function, values).inputs()
    return _compare(_gradients(subject, inputs), [*map(torch.zeros_like, leaves(inputs))], "gradient", 0, 0)


def _deterministic(subject: Subject) -> Measured:
    return _compare(subject.run(), subject.run(), "result", 0, 0)


def _threads(subject: Subject) -> Measured:
    inputs = subject.inputs()
    output = subject(*inputs)
    with ThreadPoolExecutor(1) as threads:
        there = threads.submit(_backward, output, inputs).result()
    return _compare(there, _gradients(subject, subject.inputs()), "gradient", 0, 0)


def _low_precision(subject: Subject, dtype: torch.dtype, roundings: int, autocast: bool = False) -> Measured:
    """Compare with a float64 run on the same numbers; gradients and output (not autocast's) must keep the dtype."""
    inputs = subject.inputs(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = subject(*inputs)
    g = _incoming(output)
    results = [*_backward(output, inputs, g), *([] if autocast else [output])]
    kept = leaves(inputs)[0].dtype
    if wrong := [result.dtype for result in results if result.dtype != kept]:
        raise WrongError(f"expected {kept} throughout; got {wrong[0]}", level="unsafe")
    exact = each(lambda v: v.detach().double().requires_grad_(), inputs)
    output = subject(*exact)
    expected = [*_backward(output, exact, g.double()), output][: len(results)]
    scale = max(1.0, *(result.abs().max().item() if result.numel() else 0.0 for result in expected))
    return _compare(results, expected, "result", 0, roundings * torch.finfo(dtype).eps * scale)


def _complex(subject: Subject) -> Measured:
    """Ask for complex numbers: they must be refused, or right."""
    inputs = each(lambda v: (v * (1 + 0.5j)).detach().requires_grad_(), subject.inputs())
    try:
        if subject(*inputs).requires_grad:
            gradcheck(subject, inputs, **TOLERANCES, check_undefined_grad=False)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, GradcheckError):
            raise WrongError(sentence(error)) from error
    return None


def _compiled(subject: Subject) -> Measured:
    if not subject.compile:
        raise NotApplicableError("not asked for: it takes seconds (compile=True)")
    torch.compiler.reset()
    return _unchanged_by(partial(torch.compile, fullgraph=True, backend="aot_eager"), subject)


@dataclass(frozen=True)
class Check:
    """One question: its function, and the usual cause of a failure.

    needs   the checks it builds on: without these a failure says nothing new, and a success misleads
    level, raised   the level of a difference, and of an exception: a right function may lack what is unsupported
    """

    run: Callable[[Subject], Measured]
    cause: str
    needs: tuple[str, ...] = ()
    level: Level = "wrong"
    raised: Level = "unsafe"


def _asks(check: Callable[..., bool], *flags: str) -> Callable[[Subject], Measured]:
    return lambda subject: _gradcheck(check, subject, **dict.fromkeys(flags, True))


_habit = partial(Check, level="unsafe")
_feature = partial(Check, raised="unsupported")
SECOND, FORWARD = "second derivative", "forward mode"
_checkpointed = partial(_unchanged_by, lambda function: partial(checkpoint, function, use_reentrant=False))
_BRANCHES = "data-dependent Python, or .item()."
_CONSTANT = "a result saved as if it were a constant, or a detach()."
_MEMORY = "a forward or backward that reads memory as if it were contiguous."
_UNCAST = "a custom Function is not on autocast's list: cast its inputs before apply."
_CANCELS = "a formula that cancels, or a constant of another dtype."
CHECKS = {
    FIRST: Check(_first_derivative, "a wrong sign, factor or transposition, an input that is ignored.", raised="wrong"),
    "undefined gradients": Check(_asks(gradcheck, "check_undefined_grad"), "g may be None in the backward.", (FIRST,)),
    "gradient dtypes": Check(_asks(gradcheck, "check_grad_dtypes"), "a backward in another dtype.", (FIRST,)),
    "batched gradients": _feature(_asks(gradcheck, "check_batched_grad"), _BRANCHES, (FIRST,)),
    FORWARD: _feature(_asks(gradcheck, "check_forward_ad"), "no jvp, or a term missing in it.", (FIRST,)),
    "batched forward mode": _feature(
        _asks(gradcheck, "check_forward_ad", "check_batched_forward_grad"), _BRANCHES, (FORWARD,)
    ),
    SECOND: _feature(_asks(gradgradcheck), _CONSTANT, (FIRST,)),
    "second derivative, strided": Check(_asks(gradgradcheck, "gen_non_contig_grad_outputs"), _MEMORY, (SECOND,)),
    "second derivative, batched": _feature(_asks(gradgradcheck, "check_batched_grad"), _BRANCHES, (SECOND,)),
    "forward over reverse": _feature(_asks(gradgradcheck, "check_fwd_over_rev"), "a lost tangent.", (SECOND, FORWARD)),
    "reference": Check(
        partial(_equals, lambda f, x: [output_of(f(*x))], "output"), "another formula, convention (1/N, ½) or argument."
    ),
    "reference, first derivative": Check(partial(_equals, _gradients, "gradient"), "a backward of another forward."),
    "reference, second derivative": _feature(partial(_equals, _second, "second derivative"), _CONSTANT, (FIRST,)),
    "tails": Check(_tails, "a formula that cancels, or a clamp, where gradcheck doesn't look.", (FIRST,)),
    "torch.func.grad": _feature(_func_grad, "no setup_context: a Function in the old style can't be transformed."),
    "torch.func.jvp": _feature(_func_jvp, "no jvp, or one that disagrees with the backward.", (FIRST,)),
    "torch.func.vmap": _feature(_func_vmap, "no vmap rule (generate_vmap_rule = True), or data-dependent Python."),
    "strided inputs": Check(_strided_inputs, _MEMORY),
    "strided incoming gradients": Check(_strided_incoming, _MEMORY),
    "incoming gradient is not written": _habit(partial(_not_written, "incoming gradient"), "an in-place write into g."),
    "inputs are not written": _habit(partial(_not_written, "input"), "an in-place write into an input."),
    "saved tensors are guarded": _habit(_guarded, "a tensor kept outside save_for_backward: overwritten unnoticed."),
    "saved tensors can be hooked": _habit(_hooked, "tensors on ctx as attributes: offloading, checkpoints miss them."),
    "checkpointing": Check(_checkpointed, "ctx.saved_tensors read twice, or a forward with a state."),
    "nothing leaks": _habit(_leaks, "the output on ctx as an attribute: a cycle that only the garbage collector ends."),
    "frozen inputs": Check(_frozen, "ctx.needs_input_grad is not read: a frozen weight costs its product too."),
    "empty batch": _feature(_empty, "a mean, maximum or reshape(-1, n) that has no meaning for no rows."),
    DETERMINISTIC: _habit(_deterministic, "random numbers (fix their seed), or memory that was not initialised."),
    "backward in another thread": Check(_threads, "state that lives in the thread of the forward."),
    # A few dozen roundings of numbers as large as the largest result.
    "float32": _feature(partial(_low_precision, dtype=torch.float32, roundings=64), _CANCELS),
    "bfloat16": _feature(partial(_low_precision, dtype=torch.bfloat16, roundings=8), _CANCELS),
    "autocast": _feature(partial(_low_precision, dtype=torch.bfloat16, roundings=16, autocast=True), _UNCAST),
    "complex": _habit(_complex, "products without conjugates: refuse complex tensors, or conjugate.", (FIRST,)),
    "torch.compile": _feature(_compiled, "what the compiler can't trace: a jvp, closures over objects, .item()."),
}
