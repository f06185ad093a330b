"""torch.compile in one graph, forward and backward, and our formulas in what it compiles."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import manual_mlp as mm
from tests.cases import CASES, Case, asks_again
from tests.grid_cases import GRIDS

# The compiled graph may add and multiply in another order: a few eps of float64, on numbers of order 1.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Recorder:
    """A backend that compiles nothing and keeps the graphs AOTAutograd makes: forward, and backward."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self.into(self.forward), bw_compiler=self.into(self.backward))

    @staticmethod
    def into(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    def derivative_operators(self) -> set[str]:
        """ATen's own derivatives among the operators of all graphs."""
        return {operator for operator in operators(self.forward + self.backward) if "backward" in operator}


def operators(graphs: list[torch.fx.GraphModule]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}


def net() -> nn.Module:
    torch.manual_seed(0)
    # each twice, since dynamo shares the symbols it makes of numbers
    activations = 2 * ["sigmoid", "tanh", "relu", "softplus", "silu", "gelu", nn.GELU("tanh"), nn.LeakyReLU(-0.2)]
    return mm.MLP([4, *[5] * len(activations), 3], activations, "identity", dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kind(case: Case) -> str:
    return case.name.split("-")[0].split("_of_")[0]


KINDS = sorted({kind(case) for case in CASES})
# A reduction is one code for all costs: compiled once. Every case, with dynamic shapes and with static ones, which ask
# for less, is an exhaustive sweep.
SHARED = ("-none", "-sum")
QUICK = [
    case for case in CASES if not asks_again(case) and (kind(case) == "mse_loss" or not case.name.endswith(SHARED))
]
# Other numbers in the same code.
SAME = (*(f"softplus+{numbers}" for numbers in ("0.5+1", "1+2", "2+25")), "leaky_relu+0.01", "leaky_relu+0.2")
# One code fuses all rows but the lesson's with the affine map: silu saves z, relu saves a, and both stand for the rest.
SAME += tuple(k for k in KINDS if k.startswith("affine_") and k not in ("affine_sigmoid", "affine_silu", "affine_relu"))


def outputs_and_gradients(run: Callable[[list[Any]], list[Tensor]], cases: list[Case]) -> list[Tensor]:
    inputs = [case.inputs(torch.float64) for case in cases]
    outputs = run(inputs)
    cost = torch.stack([output.square().sum() for output in outputs]).sum()
    return [*outputs, *torch.autograd.grad(cost, [tensor for each in inputs for tensor in each])]


@pytest.mark.parametrize(
    ("listed", "dynamic"),
    [
        (QUICK, True),
        pytest.param(CASES, True, marks=pytest.mark.slow),
        pytest.param(CASES, False, marks=pytest.mark.slow),
    ],
    ids=["quick", "dynamic", "static"],
)
@pytest.mark.parametrize(
    "kind_", [pytest.param(name, marks=[pytest.mark.slow] if name in SAME else []) for name in KINDS]
)
def test_every_case_in_one_graph(kind_: str, listed: list[Case], dynamic: bool) -> None:
    """All cases of one kind in one function: values and gradients as in eager, and no derivative of ATen's."""
    in_one_graph([case for case in listed if kind(case) == kind_], dynamic)


FIRST = ("-plain", "-rows", "-affine", "-last")  # the grid cases that run in `make test`, one of each function
ALONE = (*FIRST, "-general", "-running")  # one norm of a kind, because dynamic shapes take no two: see below


@pytest.mark.parametrize(
    ("ends", "dynamic"),
    [
        (FIRST, True),
        pytest.param(ALONE, True, marks=pytest.mark.slow),
        pytest.param(("",), False, marks=pytest.mark.slow),
    ],
    ids=["quick", "dynamic", "static"],
)
def test_grids_in_one_graph(ends: tuple[str, ...], dynamic: bool) -> None:
    """Convolution, pools, norms and softmax in one function."""
    in_one_graph([case for case in GRIDS if case.name.endswith(ends)], dynamic)


def test_a_default_number_in_two_dynamic_calls() -> None:
    """torch's fault from 2.12 on: y = k x fails as two norms with one default eps. Layers hold theirs, and work."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, k: float) -> Tensor:
            return x * k

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.k = inputs[1]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g * ctx.k, None

    def times(x: Tensor, k: float = 1e-5) -> Tensor:
        return Times.apply(x, k)

    x = torch.randn(5, 4, requires_grad=True)
    faulty = not torch.__version__.startswith("2.11")
    for function in (times, lambda x: mm.functional.layer_norm(x, (4,))) if faulty else ():
        compiled = torch.compile(lambda a: function(function(a)), fullgraph=True, dynamic=True, backend="aot_eager")  # noqa: B023
        with pytest.raises(Exception, match="lift_tracked_freevar_to_input"):
            compiled(x)
    layers = torch.compile(
        nn.Sequential(mm.LayerNorm(4), mm.LayerNorm(4)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    layers(x).sum().backward()


def in_one_graph(cases: list[Case], dynamic: bool) -> None:
    recorder = Recorder()

    def run(inputs: list[Any]) -> list[Tensor]:
        return [case.ours(*each) for case, each in zip(cases, inputs, strict=True)]

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=recorder.backend)
    torch.testing.assert_close(outputs_and_gradients(compiled, cases), outputs_and_gradients(run, cases), **EXACT)
    assert recorder.derivative_operators() == set()
    assert len(recorder.forward) == len(recorder.backward) == 1


def test_derivative_operators_are_seen() -> None:
    """What the test above would say of torch's own layers."""
    recorder = Recorder()
    compiled = torch.compile(nn.GELU(), fullgraph=True, backend=recorder.backend)
    compiled(torch.randn(3, requires_grad=True)).sum().backward()
    assert recorder.derivative_operators() == {"aten.gelu_backward.default"}


def rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, n, dtype=torch.float64, generator=generator) for n in (4, 3))


@pytest.mark.parametrize(
    ("loss", "dynamic"),
    [
        (mm.QuadraticLoss(), True),
        pytest.param(mm.MSELoss(), False, marks=pytest.mark.slow),
        pytest.param(mm.CrossEntropyLoss(), False, marks=pytest.mark.slow),
        pytest.param(mm.BCEWithLogitsLoss(), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_net_and_its_cost(loss: nn.Module, dynamic: bool) -> None:
    """A step on batches of several sizes: one graph for all of them where shapes are dynamic."""
    model, recorder = net(), Recorder()

    def cost(x: Tensor, target: Tensor) -> Tensor:
        return loss(model(x), target.softmax(-1))

    compiled = torch.compile(cost, fullgraph=True, dynamic=dynamic, backend=recorder.backend)
    for count in (6, 9, 7) if dynamic else (6, 9):
        ours, eager = (torch.autograd.grad(run(*rows(count)), [*model.parameters()]) for run in (compiled, cost))
        torch.testing.assert_close(ours, eager, **EXACT)
    assert recorder.derivative_operators() == set()
    assert len(recorder.backward) == (1 if dynamic else 2)


@pytest.mark.parametrize("model", [mm.MLP([4, 5, 3], "gelu"), pytest.param(net(), marks=pytest.mark.slow)], ids=len)
def test_inductor(model: nn.Module) -> None:
    """The compiler that torch.compile uses by default, static and dynamic shapes."""
    model = model.double()
    x, target = rows(6)
    expected = torch.autograd.grad(mm.functional.mse_loss(model(x), target), [*model.parameters()])
    compiled = torch.compile(model, fullgraph=True)
    for count in (9, 6):  # the second size makes shapes dynamic
        x, target = rows(count)
        gradients = torch.autograd.grad(mm.functional.mse_loss(compiled(x), target), [*model.parameters()])
    torch.testing.assert_close(gradients, expected, **EXACT)


def test_dropout_and_inplace_in_a_compiled_net() -> None:
    """A mask is drawn in the graph; an activation in place writes its input there too."""
    recorder = Recorder()

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        copy = z.clone()
        return mm.functional.dropout(z, 0.5), mm.functional.relu(copy, inplace=True) + copy

    z = torch.randn(50, dtype=torch.float64, requires_grad=True)
    dropped, doubled = torch.compile(run, fullgraph=True, backend=recorder.backend)(z)
    (slope,) = torch.autograd.grad(dropped.sum(), z, retain_graph=True)
    torch.testing.assert_close(dropped, z * slope, **EXACT)
    assert set(slope.tolist()) == {0.0, 2.0}
    torch.testing.assert_close(doubled, 2 * z.relu(), **EXACT)
    torch.testing.assert_close(torch.autograd.grad(doubled.sum(), z)[0], 2 * (z > 0).double(), **EXACT)


def test_autocast_in_a_compiled_net() -> None:
    model, twin = mm.MLP([4, 5, 3]), nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.Sigmoid())
    twin.load_state_dict(model.state_dict())
    x = torch.randn(6, 4)

    def run(model: nn.Module) -> list[Tensor]:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            output = compiled(x)
        return [output, *torch.autograd.grad(output.float().square().sum(), [*model.parameters()])]

    ours, theirs = run(model), run(twin)
    assert ours[0].dtype == torch.bfloat16
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


def test_wrong_shapes_are_told_in_the_compiled_graph() -> None:
    compiled = torch.compile(mm.Affine(4, 3), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"size|shape"):
        compiled(torch.randn(2, 5))


def test_no_grad_and_inference_mode() -> None:
    model = net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = rows(6)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), expected, **EXACT)
