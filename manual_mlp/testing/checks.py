"""The checks: each asks one thing of a differentiable function that torch's own layers can do."""

import gc
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from manual_mlp.errors import InputError
from manual_mlp.testing.report import FAILED, NOT_APPLICABLE, PASSED, Row

# gradcheck's own 1e-5 and 1e-3 pass a derivative that is 0.1 % wrong; a right one in float64 passes these.
TOLERANCES: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-6}
EXACT = 1e-12

Inputs = tuple[Any, ...]


class _NotApplicableError(Exception):
    """The check does not apply; the message says why."""


class _WrongError(Exception):
    """The check found a difference: message, worst error, where."""

    def __init__(self, message: str, error: float | None = None, where: str = "") -> None:
        super().__init__(message)
        self.error, self.where = error, where


@dataclass(frozen=True)
class Subject:
    """A function of tensors, its inputs as float64 leaves (others as they are), and a function it should equal."""

    name: str
    function: Callable[..., Any]
    values: Inputs
    reference: Callable[..., Any] | None = None
    compile: bool = False

    def inputs(self, dtype: torch.dtype = torch.float64) -> Inputs:
        """Fresh leaves of the same numbers, contiguous."""
        fresh = torch.contiguous_format
        return tuple(
            value.detach().to(dtype).clone(memory_format=fresh).requires_grad_() if is_real(value) else value
            for value in self.values
        )

    def __call__(self, *inputs: Any) -> Tensor:
        return output_of(self.function(*inputs))


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def output_of(result: Any) -> Tensor:
    """The differentiable tensor of a result: itself, or the first of several."""
    outputs = result if isinstance(result, tuple | list) else [result]
    for output in outputs:
        if is_real(output) or (isinstance(output, Tensor) and output.is_complex()):
            return output
    raise InputError(f"expected a function that returns a floating-point tensor; got {type(result).__name__}")


def nodes_of(output: Tensor) -> list[Any]:
    """Every node of the graph behind an output."""
    seen: dict[int, Any] = {}
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in seen:
            seen[id(node)] = node
            waiting += [before for before, _ in node.next_functions]
    return list(seen.values())


def leaves(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(value for value in inputs if is_real(value) and value.requires_grad)


def _incoming(output: Tensor, seed: int = 1) -> Tensor:
    """An incoming gradient without symmetry."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return g.to(device=output.device, dtype=output.dtype)


def _gradients(
    function: Callable[..., Any], inputs: Inputs, g: Tensor | None = None, **more: Any
) -> tuple[Tensor, ...]:
    """The gradients of <output, g> with respect to the leaves; zeros where the output does not depend on one."""
    output = output_of(function(*inputs))
    g = _incoming(output) if g is None else g
    return torch.autograd.grad(output, leaves(inputs), g, materialize_grads=True, **more)


def _compare(
    actual: Sequence[Tensor], expected: Sequence[Tensor], what: str, rtol: float = EXACT, atol: float = EXACT
) -> tuple[float, str]:
    """The worst error and where it is; raises if it is beyond the tolerance anywhere."""
    worst, error, where = -torch.inf, 0.0, ""
    for number, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        if mine.shape != other.shape:
            raise _WrongError(f"{what} {number} has shape {tuple(mine.shape)} instead of {tuple(other.shape)}")
        if mine.numel() == 0:
            continue
        mine, other = mine.detach().double(), other.detach().double()
        same = (mine == other) | (mine.isnan() & other.isnan())
        errors = torch.where(same, 0, (mine - other).abs()).nan_to_num(torch.inf, torch.inf)
        beyond = errors - (atol + rtol * other.abs().nan_to_num())
        if beyond.max().item() > worst:
            place = beyond.argmax()
            index = ", ".join(str(int(i)) for i in torch.unravel_index(place, errors.shape))
            worst, error, where = beyond.max().item(), errors.flatten()[place].item(), f"{what} {number} [{index}]"
    if worst > 0:
        raise _WrongError(f"{what}s differ by up to {error:.1e}", error, where)
    return error, where


Measured = tuple[float, str] | None
CHECKS: dict[str, tuple[Callable[[Subject], Measured], str]] = {}
FIRST = "first derivative"
SECOND = "second derivative"


def _check(name: str, cause: str) -> Callable[[Callable[[Subject], Measured]], Callable[[Subject], Measured]]:
    """Registers a check under its name, with what usually causes its failure."""

    def register(run: Callable[[Subject], Measured]) -> Callable[[Subject], Measured]:
        CHECKS[name] = (run, cause)
        return run

    return register


@_check(FIRST, "a wrong sign, factor or transposition in the backward formula, or an output that it ignores.")
def _first_derivative(subject: Subject) -> Measured:
    """Central differences of <output, g> at each element, then gradcheck over the whole Jacobian."""
    inputs = subject.inputs()
    g = _incoming(subject(*inputs))
    numerical = [_central_differences(subject, inputs, leaf, g) for leaf in leaves(inputs)]
    measured = _compare(_gradients(subject, inputs, g), numerical, "gradient", TOLERANCES["rtol"], 1e-7)
    _gradcheck(subject)
    return measured


def _central_differences(subject: Subject, inputs: Inputs, leaf: Tensor, g: Tensor) -> Tensor:
    """∂<output, g>/∂leaf. With a step of 1e-5 truncation and rounding are both below 1e-9 for numbers of order 1."""
    step, slopes = 1e-5, torch.zeros_like(leaf)
    with torch.no_grad():
        flat, target = leaf.view(-1), slopes.view(-1)
        for index in range(flat.numel()):
            here = flat[index].item()
            ends = []
            for side in (here + step, here - step):
                flat[index] = side
                ends.append((subject(*inputs) * g).sum())
            flat[index] = here
            target[index] = (ends[0] - ends[1]) / (2 * step)
    return slopes


def _gradcheck(subject: Subject, check: Callable[..., bool] = gradcheck, **flags: bool) -> None:
    """gradcheck or gradgradcheck with its message as a sentence; what fails without the flags is another row's."""
    error = _complaint(subject, check, **flags)
    if error is None:
        return
    if flags and _complaint(subject, check):
        raise _NotApplicableError("the derivative is wrong without it already") from error
    raise _WrongError(sentence(error)) from error


def _complaint(subject: Subject, check: Callable[..., bool], **flags: bool) -> Exception | None:
    off = dict.fromkeys(("check_undefined_grad", "check_grad_dtypes", "check_batched_grad"), False)
    try:
        check(subject, subject.inputs(), **TOLERANCES, **{**off, **flags})
    except Exception as error:
        return error
    return None


def sentence(error: BaseException) -> str:
    """The first line of an error that says something, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:240]}"


def _flagged(name: str, cause: str, check: Callable[..., bool], **flags: bool) -> None:
    def run(subject: Subject) -> Measured:
        _gradcheck(subject, check, **flags)
        return None

    CHECKS[name] = (run, cause)


_flagged(
    "undefined gradients",
    "the backward uses g without asking whether it is None.",
    gradcheck,
    check_undefined_grad=True,
)
_flagged(
    "gradient dtypes", "the backward computes in another dtype than its input has.", gradcheck, check_grad_dtypes=True
)
_flagged("batched gradients", "data-dependent Python, or .item(), in the backward.", gradcheck, check_batched_grad=True)
_flagged("forward mode", "no jvp, or a term missing in it.", gradcheck, check_forward_ad=True)
_flagged(
    "batched forward mode", "data-dependent Python in the jvp.", gradcheck,
    check_forward_ad=True, check_batched_forward_grad=True,
)  # fmt: skip
CHECKS[SECOND] = (
    lambda subject: _gradcheck(subject, gradgradcheck),
    "an intermediate result saved for the backward as if it were a constant, or a backward that detaches.",
)
_flagged(
    "second derivative, strided",
    "a backward that assumes contiguous gradients.",
    gradgradcheck,
    gen_non_contig_grad_outputs=True,
)
_flagged("second derivative, batched", "data-dependent Python in the backward.", gradgradcheck, check_batched_grad=True)
_flagged("forward over reverse", "saved tensors that lose their tangent.", gradgradcheck, check_fwd_over_rev=True)


@_check("reference", "another formula, convention (1/N, ½) or argument than the reference has.")
def _reference(subject: Subject) -> Measured:
    return _against_reference(subject, lambda function, inputs: [output_of(function(*inputs))], "output")


@_check("reference, first derivative", "a backward that does not belong to this forward.")
def _reference_first(subject: Subject) -> Measured:
    return _against_reference(subject, _gradients, "gradient")


@_check("reference, second derivative", "an intermediate result saved as if it were a constant.")
def _reference_second(subject: Subject) -> Measured:
    return _against_reference(subject, _second, "second derivative")


def _against_reference(subject: Subject, derive: Callable[..., Sequence[Tensor]], what: str) -> Measured:
    if subject.reference is None:
        raise _NotApplicableError("no reference was given")
    expected = derive(subject.reference, subject.inputs())
    return _compare(derive(subject, subject.inputs()), expected, what)


def _second(function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    """The gradients of the first gradients' squares and of the output's, so that both orders meet."""
    output = output_of(function(*inputs))
    first = torch.autograd.grad(output, leaves(inputs), _incoming(output), create_graph=True, materialize_grads=True)
    squares = sum((gradient.square().sum() for gradient in first), output.square().sum())
    return torch.autograd.grad(squares, leaves(inputs), materialize_grads=True)


@_check("tails", "a formula that cancels, or a clamp, where the function saturates: gradcheck can't see it there.")
def _tails(subject: Subject) -> Measured:
    """A componentwise function's derivative from −30 to 30, relative to itself."""
    given = leaves(subject.inputs())
    if len(given) != 1 or len(subject.values) != 1 or subject(*given).shape != given[0].shape:
        raise _NotApplicableError("not a componentwise function of one tensor")
    base = subject(*given).detach()
    moved = given[0].detach().clone()
    moved.view(-1)[0] += 1
    if not torch.equal(base.flatten()[1:], subject(moved).detach().flatten()[1:]):
        raise _NotApplicableError("not a componentwise function")
    z = torch.linspace(-30, 30, 121, dtype=torch.float64) + 0.01
    (slope,) = _gradients(subject, (z.clone().requires_grad_(),), torch.ones_like(z))
    if subject.reference is not None:
        (expected,) = _gradients(subject.reference, (z.clone().requires_grad_(),), torch.ones_like(z))
        return _compare([slope], [expected], "slope", 1e-9, 1e-14)
    step = 1e-3
    with torch.no_grad():
        above, below = subject(z + step), subject(z - step)
    numerical = (above - below) / (2 * step)
    # Truncation, relative to the slope around; and the rounding of what was subtracted, itself perhaps a difference.
    around = torch.nn.functional.max_pool1d(numerical.abs()[None], 3, 1, 1)[0]
    rounding = 4 * torch.finfo(torch.float64).eps / step * (above.abs() + z.abs())
    beyond = ((slope - numerical).abs() - rounding - 1e-4 * around).nan_to_num(torch.inf)
    place = int(beyond.argmax())
    error, where = (slope - numerical).abs()[place].item(), f"z = {z[place].item():.2f}"
    if beyond[place] > 0:
        raise _WrongError(f"G′ is {slope[place].item():.3e} instead of {numerical[place].item():.3e}", error, where)
    return error, where


@_check("torch.func.grad", "no setup_context: a Function in the old style can't be transformed.")
def _func_grad(subject: Subject) -> Measured:
    inputs = subject.inputs()
    places = [index for index, value in enumerate(inputs) if is_real(value)]
    g = _incoming(subject(*inputs)).detach()
    plain = tuple(value.detach() if is_real(value) else value for value in inputs)
    gradients = torch.func.grad(lambda *values: (subject(*values) * g).sum(), tuple(places))(*plain)
    return _compare(gradients, _gradients(subject, inputs, g), "gradient")


@_check("torch.func.jvp", "no jvp, or one that disagrees with the backward.")
def _func_jvp(subject: Subject) -> Measured:
    """<g, J t> = <Jᵀ g, t>: forward and reverse mode are adjoint. To 1e-9, since they sum in different orders."""
    inputs = subject.inputs()
    given = leaves(inputs)
    tangents = tuple(_incoming(leaf, seed=number + 2) for number, leaf in enumerate(given))

    def of_leaves(*values: Tensor) -> Tensor:
        left = iter(values)
        return subject(*(next(left) if is_real(value) else value for value in inputs))

    forward = torch.func.jvp(of_leaves, tuple(leaf.detach() for leaf in given), tangents)
    output, output_t = forward[0], forward[1]
    g = _incoming(output)
    reverse = _gradients(subject, inputs, g)
    products = [(gradient * tangent).sum() for gradient, tangent in zip(reverse, tangents, strict=True)]
    return _compare([(g * output_t).sum()], [sum(products, torch.zeros(()).double())], "adjoint product", 1e-9, 1e-9)


@_check("torch.func.vmap", "no vmap rule (generate_vmap_rule = True), or data-dependent Python.")
def _func_vmap(subject: Subject) -> Measured:
    """Per-sample gradients: vmap(grad) over two sets of inputs against one after the other."""
    inputs = subject.inputs()
    places = tuple(index for index, value in enumerate(inputs) if is_real(value))
    sets = [tuple(v.detach() * s if is_real(v) else v for v in inputs) for s in (1.0, 0.5)]
    stacked = tuple(
        torch.stack([first, second]) if is_real(first) else first for first, second in zip(*sets, strict=True)
    )
    gradient = torch.func.grad(lambda *values: subject(*values).square().sum(), places)
    dims = tuple(0 if is_real(value) else None for value in inputs)
    batched = torch.func.vmap(gradient, dims)(*stacked)
    single = [torch.stack(pair) for pair in zip(*(gradient(*values) for values in sets), strict=True)]
    return _compare(batched, single, "gradient")


@_check("strided inputs", "a forward or backward that reads memory as if it were contiguous.")
def _strided_inputs(subject: Subject) -> Measured:
    plain, strided = subject.inputs(), tuple(_strided(value) for value in subject.inputs())
    return _compare(_gradients(subject, strided), _gradients(subject, plain), "gradient")


def _strided(value: Any) -> Any:
    """The same numbers, every second element of a wider tensor."""
    if not is_real(value):
        return value
    wide = torch.stack([value.detach(), torch.full_like(value, torch.nan)], -1)
    return wide[..., 0].requires_grad_()


@_check(
    "strided incoming gradients",
    "a backward that reads g as if it were contiguous: sum sends it expanded, cat narrowed.",
)
def _strided_incoming(subject: Subject) -> Measured:
    inputs = subject.inputs()
    output = subject(*inputs)
    dims = list(reversed(range(output.dim())))
    forms = [
        torch.ones((), dtype=output.dtype).expand_as(output),
        _incoming(output.permute(dims)).permute(dims),
        _strided(_incoming(output)).detach(),
    ]
    measured = []
    for g in forms:
        contiguous = g.clone(memory_format=torch.contiguous_format)
        measured.append(_compare(_gradients(subject, inputs, g), _gradients(subject, inputs, contiguous), "gradient"))
    return max(measured)


@_check("incoming gradient is not written", "an in-place operation on g in the backward: somebody else holds it too.")
def _incoming_not_written(subject: Subject) -> Measured:
    inputs = subject.inputs()
    g = _incoming(subject(*inputs))
    before = g.clone()
    _gradients(subject, inputs, g)
    return _compare([g], [before], "incoming gradient", 0, 0)


@_check("inputs are not written", "an in-place operation on an input, in the forward or the backward.")
def _inputs_not_written(subject: Subject) -> Measured:
    inputs = subject.inputs()
    before = [leaf.detach().clone() for leaf in leaves(inputs)]
    _gradients(subject, inputs)
    return _compare(leaves(inputs), before, "input", 0, 0)


@_check("saved tensors are guarded", "a tensor kept outside save_for_backward: it can be overwritten unnoticed.")
def _guarded(subject: Subject) -> Measured:
    """What the backward reads is overwritten before it runs: that must raise, or not matter."""
    expected = _gradients(subject, subject.inputs())
    for place in [*(index for index, value in enumerate(subject.values) if is_real(value)), None]:
        inputs = subject.inputs()
        held = tuple(value * 1 if is_real(value) else value for value in inputs)
        output = subject(*held)
        g = _incoming(output)
        with torch.no_grad():
            (output if place is None else held[place]).mul_(3).add_(1)
        try:
            gradients = torch.autograd.grad(output, leaves(inputs), g, materialize_grads=True)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error) and "modified inplace" not in str(error):
                raise
            continue
        what = "output" if place is None else f"input {place}"
        try:
            _compare(gradients, expected, "gradient", 1e-9, 1e-9)
        except _WrongError as wrong:
            raise _WrongError(f"the {what} was overwritten unnoticed: {wrong}", wrong.error, wrong.where) from wrong
    return None


@_check(
    "saved tensors can be hooked", "tensors kept on ctx as attributes: hooks, offloading and checkpointing miss them."
)
def _hooked(subject: Subject) -> Measured:
    inputs = subject.inputs()
    output = subject(*inputs)
    for node in nodes_of(output):
        for name, value in getattr(node, "__dict__", {}).items():
            if any(isinstance(part, Tensor) for part in (value if isinstance(value, tuple | list) else [value])):
                raise _WrongError(f"{type(node).__name__} keeps a tensor as ctx.{name}", None, name)
    expected = torch.autograd.grad(output, leaves(inputs), _incoming(output), materialize_grads=True)
    inputs = subject.inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda saved: saved):
        output = subject(*inputs)
    gradients = torch.autograd.grad(output, leaves(inputs), _incoming(output), materialize_grads=True)
    return _compare(gradients, expected, "gradient")


@_check("checkpointing", "ctx.saved_tensors read twice, or a forward that is not a function of its inputs.")
def _checkpointing(subject: Subject) -> Measured:
    def checkpointed(*inputs: Any) -> Tensor:
        return checkpoint(subject, *inputs, use_reentrant=False)

    return _compare(_gradients(checkpointed, subject.inputs()), _gradients(subject, subject.inputs()), "gradient")


@_check("nothing leaks", "the output kept on ctx as an attribute: a cycle that only the garbage collector ends.")
def _leaks(subject: Subject) -> Measured:
    """A forward that is never followed by a backward frees its output at once."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        output = subject(*(value * 1 if is_real(value) else value for value in subject.inputs()))
        held = weakref.ref(output)
        del output
        if held() is not None:
            raise _WrongError("the output outlives its last reference")
    finally:
        if enabled:
            gc.enable()
    return None


@_check("frozen inputs", "ctx.needs_input_grad is not read: a frozen weight costs its matrix product all the same.")
def _frozen(subject: Subject) -> Measured:
    """Each gradient alone is the same as together, and costs fewer products where there are several."""
    inputs = subject.inputs()
    if len(leaves(inputs)) < 2:
        raise _NotApplicableError("one input only")
    expected, products = _counted(subject, inputs)
    alone, costs = [], []
    for leaf in leaves(inputs):
        frozen = tuple(v.detach().requires_grad_(v is leaf) if is_real(v) else v for v in inputs)
        if not subject(*frozen).requires_grad:
            raise _WrongError("the output requires no gradient when one input alone does")
        gradients, cost = _counted(subject, frozen)
        alone.append(gradients[0])
        costs.append(cost)
    measured = _compare(alone, expected, "gradient")
    if products >= 2 and min(costs) >= products:
        raise _WrongError(f"{products} matrix products for all gradients, and as many for each alone")
    return measured


def _counted(subject: Subject, inputs: Inputs) -> tuple[tuple[Tensor, ...], int]:
    """The gradients, and the matrix products their backward took."""
    output = subject(*inputs)
    with _Products() as products:
        gradients = torch.autograd.grad(output, leaves(inputs), _incoming(output), materialize_grads=True)
    return gradients, products.count


class _Products(TorchDispatchMode):
    NAMES = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


@_check("empty batch", "a mean, maximum or reshape(-1, n) that has no meaning for no rows.")
def _empty(subject: Subject) -> Measured:
    """N = 0 gives gradients of the right shapes, zero for what has no batch dimension."""
    first = next((value for value in subject.values if is_real(value)), None)
    if first is None or first.dim() < 2:
        raise _NotApplicableError("no batch dimension")
    try:
        return _without_rows(subject, [value is first for value in subject.values])
    except Exception:  # other inputs have its rows too, as the target of a cost has
        rows = [isinstance(v, Tensor) and v.shape[:1] == first.shape[:1] for v in subject.values]
        return _without_rows(subject, rows)


def _without_rows(subject: Subject, cut: list[bool]) -> Measured:
    values = tuple(v[:0] if empty else v for v, empty in zip(subject.values, cut, strict=True))
    inputs = Subject(subject.name, subject.function, values).inputs()
    gradients = _gradients(subject, inputs)
    return _compare(gradients, [torch.zeros_like(leaf) for leaf in leaves(inputs)], "gradient", 0, 0)


@_check("deterministic", "random numbers, or memory that was not initialised.")
def _deterministic(subject: Subject) -> Measured:
    inputs = subject.inputs()
    first, again = ([subject(*inputs), *_gradients(subject, inputs)] for _ in range(2))
    return _compare(again, first, "result", 0, 0)


@_check("backward in another thread", "state that lives in the thread of the forward.")
def _threads(subject: Subject) -> Measured:
    inputs = subject.inputs()
    output = subject(*inputs)
    g = _incoming(output)
    with ThreadPoolExecutor(1) as threads:
        there = threads.submit(torch.autograd.grad, output, leaves(inputs), g, materialize_grads=True).result()
    return _compare(there, _gradients(subject, subject.inputs(), g), "gradient", 0, 0)


def _low_precision(dtype: torch.dtype, factor: float) -> Callable[[Subject], Measured]:
    def run(subject: Subject) -> Measured:
        """Output and gradients keep the dtype, and a float64 run on the same numbers is near."""
        inputs = subject.inputs(dtype)
        output = subject(*inputs)
        g = _incoming(output)
        results = [output, *torch.autograd.grad(output, leaves(inputs), g, materialize_grads=True)]
        wrong = [str(result.dtype) for result in results if result.dtype != dtype]
        if wrong:
            raise _WrongError(f"expected {dtype} throughout; got {wrong[0]}")
        exact = tuple(v.detach().double().requires_grad_() if is_real(v) else v for v in inputs)
        expected = [subject(*exact), *_gradients(subject, exact, g.double())]
        scale = max(1.0, *(result.abs().max().item() if result.numel() else 0.0 for result in expected))
        return _compare(results, expected, "result", 0, factor * torch.finfo(dtype).eps * scale)

    return run


# A few dozen roundings of numbers as large as the largest result.
for _dtype, _factor in ((torch.float32, 64), (torch.bfloat16, 8)):
    CHECKS[str(_dtype).removeprefix("torch.")] = (
        _low_precision(_dtype, _factor),
        "a constant of another dtype in the formula, or a formula that cancels.",
    )


@_check("autocast", "a custom Function is not on autocast's list: cast its inputs before apply.")
def _autocast(subject: Subject) -> Measured:
    """Under bfloat16 autocast float32 leaves get finite float32 gradients, near the float64 ones."""
    inputs = subject.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = subject(*inputs)
    g = _incoming(output)
    gradients = torch.autograd.grad(output, leaves(inputs), g, materialize_grads=True)
    exact = tuple(v.detach().double().requires_grad_() if is_real(v) else v for v in inputs)
    expected = _gradients(subject, exact, g.double())
    if any(gradient.dtype != torch.float32 for gradient in gradients):
        raise _WrongError("a float32 input got a gradient of another dtype")
    scale = max(1.0, *(gradient.abs().max().item() if gradient.numel() else 0.0 for gradient in expected))
    return _compare(gradients, expected, "gradient", 0, 16 * torch.finfo(torch.bfloat16).eps * scale)


@_check("complex", "products without conjugates: refuse complex tensors, or conjugate.")
def _complex(subject: Subject) -> Measured:
    """Refused, or right."""
    inputs = tuple((v * (1 + 0.5j)).detach().requires_grad_() if is_real(v) else v for v in subject.inputs())
    try:
        output = subject(*inputs)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not output.requires_grad:
        return None
    try:
        gradcheck(subject, inputs, **TOLERANCES, check_undefined_grad=False)
    except RuntimeError as error:
        if "not implemented" in str(error) or "not support" in str(error):
            return None
        raise _WrongError(sentence(error)) from error
    return None


@_check("torch.compile", "something the compiler can't trace: a jvp on the Function, closures over objects, .item().")
def _compiled(subject: Subject) -> Measured:
    if not subject.compile:
        raise _NotApplicableError("not asked for: it takes seconds (compile=True)")
    torch.compiler.reset()
    compiled = torch.compile(lambda *inputs: subject(*inputs), fullgraph=True, backend="aot_eager")
    return _compare(_gradients(compiled, subject.inputs()), _gradients(subject, subject.inputs()), "gradient")


def run(name: str, subject: Subject) -> Row:
    """One check as a row: whatever it raises is the row's failure."""
    check, cause = CHECKS[name]
    try:
        error, where = check(subject) or (None, "")
    except _NotApplicableError as reason:
        return Row(name, NOT_APPLICABLE, str(reason))
    except _WrongError as wrong:
        return Row(name, FAILED, str(wrong), wrong.error, wrong.where, cause)
    except Exception as failure:
        return Row(name, FAILED, sentence(failure), None, "", cause)
    return Row(name, PASSED, "", error, where)
