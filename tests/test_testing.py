"""The battery as a tool: reports, the pytest helper, the graph, the command line; and no false alarm."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

import manual_mlp as mm
from manual_mlp import testing
from manual_mlp.network import network_loss
from manual_mlp.testing import __main__ as command_line
from manual_mlp.testing.__main__ import main, package_subjects
from manual_mlp.testing.checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


TORCHS_OWN = {
    "linear": (torch_functional.linear, (random(5, 3), random(4, 3), random(4))),
    "sigmoid": (torch.sigmoid, (random(5, 4),)),
    "tanh": (torch.tanh, (random(5, 4),)),
    "softplus": (torch_functional.softplus, (random(5, 4),)),
    "layer_norm": (lambda x, w, b: torch_functional.layer_norm(x, (4,), w, b), (random(5, 4), random(4), random(4))),
    "transposed": (lambda x: x.t().sin().t().contiguous().t(), (random(4, 5).t(),)),
    "view": (lambda x, w: torch_functional.linear(x, w).transpose(0, 1), (random(5, 2, 3), random(4, 3))),
    "conv2d": (torch_functional.conv2d, (random(2, 2, 4, 4), random(3, 2, 2, 2), random(3))),
}


@pytest.mark.parametrize("name", TORCHS_OWN)
def test_no_false_alarm(name: str) -> None:
    function, inputs = TORCHS_OWN[name]
    report = testing.check_gradients(function, inputs, function, compile=name == "linear")
    report.raise_if_failed()
    assert len(report.rows) == len(CHECKS)


def test_every_row_of_the_sheet_is_a_subject() -> None:
    names = {subject.name for subject in package_subjects()}
    assert {f"affine + {name}" for name in mm.formulas.ACTIVATIONS} <= names


def test_a_module_and_its_parameters() -> None:
    """A module's parameters are inputs; a module is compared with another by its parameters' order.

    As many rows as hidden neurons: an empty batch is one of no rows, not of no neurons.
    """
    torch.manual_seed(0)
    net, twin = mm.MLP([3, 4, 2]), nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.Sigmoid())
    report = testing.check_gradients(net, random(4, 3), twin)
    report.raise_if_failed()
    assert report.name == "MLP"
    assert report["reference, second derivative"].outcome == "passed"
    assert report["tails"].outcome == "n/a"


def halved(x: Tensor) -> Tensor:
    """Its derivative is wrong by a factor: the half is not differentiated."""
    return x.sin() - (x / 2).sin().detach()


def test_report_reads_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a check; what failed says how far, where and why; nothing is wider than the terminal."""
    report = testing.check_gradients(halved, torch.tensor([0.1, 0.2, 3.0]))
    row = report["first derivative"]
    assert row.outcome == "failed"
    assert row.error is not None
    assert row.error > 0.1
    assert re.fullmatch(r"gradient 0 \[\d\]", row.where)
    for columns in (60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= columns
        assert lines[0].startswith("halved: Wrong: first derivative")
        outcomes = (" passed", " wrong", " unsafe", " unsupported", " n/a")
        assert sum(any(outcome in line for outcome in outcomes) for line in lines) >= len(CHECKS)
        assert "Usual cause:" in str(report)
    with pytest.raises(testing.GradientError, match=r"halved: \d+ checks failed") as caught:
        report.raise_if_failed()
    assert "first derivative" in str(caught.value)


test_sigmoid = testing.gradient_tests(mm.functional.sigmoid, lambda: (random(4, 3),), torch.sigmoid)


def test_pytest_helper_fails_and_skips() -> None:
    test = testing.gradient_tests(halved, lambda: torch.tensor([0.1, 0.2]))
    with pytest.raises(testing.GradientError):
        test("first derivative")
    with pytest.raises(pytest.skip.Exception, match="no reference"):
        test("reference")
    test("deterministic")


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (torch.sigmoid, (torch.ones(3).long(),), "floating-point tensor to differentiate"),
        (torch.sigmoid, None, "a tensor or a tuple of what the function takes; got None"),
        (torch.argmax, (torch.ones(3),), "returns a floating-point tensor"),
        (lambda x: x.detach(), (torch.ones(3),), "requires no gradient: is it detached"),
        (lambda x: x @ torch.ones(4), (torch.ones(3),), "to run on float64 copies of these inputs"),
        (torch.log, (torch.tensor([1.0, -1.0]),), "inputs where log is finite"),
        (torch.rsqrt, (torch.tensor([1.0, 0.0]),), "inputs where rsqrt is finite"),
    ],
)
def test_wrong_use(function: object, inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(mm.InputError, match=message):
        testing.check_gradients(function, inputs)  # type: ignore[arg-type]


class TestAssertManualBackward:
    x = torch.randn(5, 4)

    def test_ours_pass(self) -> None:
        for activation in ("sigmoid", "gelu", "softplus"):
            testing.assert_manual_backward(mm.MLP([4, 3, 2], activation, dropout=0.2), self.x)
        apart = nn.Sequential(mm.Affine(4, 3), mm.ReLU(), mm.Affine(3, 2))
        testing.assert_manual_backward(apart, self.x.unsqueeze(0))
        testing.assert_manual_backward(lambda x: mm.QuadraticLoss()(apart(x), torch.zeros(5, 2)), self.x)
        testing.assert_manual_backward(lambda x: apart(x.double().float()[:, [0, 1, 2, 3]].view(5, 1, 4)), self.x)

    @pytest.mark.parametrize(
        ("model", "node"),
        [
            (nn.Linear(4, 3), "AddmmBackward0"),
            (nn.Sequential(mm.Affine(4, 3), nn.Sigmoid()), "SigmoidBackward0"),
            (lambda x: nn.MSELoss()(mm.MLP([4, 2])(x), torch.zeros(5, 2)), "MseLossBackward0"),
            (lambda x: nn.CrossEntropyLoss()(mm.MLP([4, 2])(x), torch.zeros(5).long()), "LogSoftmaxBackward0"),
            (lambda x: mm.MLP([4, 4])(x).exp(), "ExpBackward0"),
        ],
    )
    def test_others_are_named(self, model: object, node: str) -> None:
        with pytest.raises(AssertionError, match=node):
            testing.assert_manual_backward(model, self.x)  # type: ignore[arg-type]

    def test_what_may_stay(self) -> None:
        net = mm.MLP([4, 4])
        with pytest.raises(AssertionError, match="AddBackward0"):
            testing.assert_manual_backward(lambda x: net(x) + x, self.x)
        testing.assert_manual_backward(lambda x: net(x) + x, self.x, allow=("AddBackward0",))

    def test_a_whole_net(self) -> None:
        testing.assert_manual_backward(lambda x: network_loss(mm.MLP([4, 3, 2]), x, torch.zeros(5, 2)), self.x)

    def test_no_graph(self) -> None:
        with pytest.raises(AssertionError, match="no graph at all"), torch.no_grad():
            testing.assert_manual_backward(mm.MLP([4, 4]), self.x)


class TestCommandLine:
    def test_on_a_users_function(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["torch:sigmoid", "--inputs", "tests.test_testing:make_inputs", "--reference", "torch:sigmoid"]
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("sigmoid: The derivative is right.\n")
        assert main(["tests.test_testing:halved", "--inputs", "tests.test_testing:make_inputs"]) == 1
        assert "Usual cause" in capsys.readouterr().out

    def test_what_is_not_supported_is_no_failure(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "100")
        arguments = ["tests.test_testing:WithoutJvp", "--inputs", "tests.test_testing:make_inputs"]
        assert main(arguments) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first == "WithoutJvp: The derivative is right. Not supported: forward mode; torch.func.jvp."

    def test_mistakes_are_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        for path in ("torch:sigmoyd", "nowhere:f", "torch"):
            assert main([path, "--inputs", "tests.test_testing:make_inputs"]) == 2
            assert "expected package.module:name" in capsys.readouterr().err

    @pytest.mark.parametrize("share", [12, pytest.param(1, marks=pytest.mark.slow)])
    def test_on_the_package(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], share: int
    ) -> None:
        """Every Function passes every check that applies to it: test_cases asks it of each, beside its twin."""
        subjects = package_subjects()[::share]
        monkeypatch.setattr(command_line, "package_subjects", lambda: subjects)
        assert main([]) == 0, capsys.readouterr().out
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"{len(subjects)} Functions, {len(CHECKS)} checks each: none failed"
        assert max(map(len, lines)) <= 80

    def test_as_a_program(self) -> None:
        """`python -m`, in a process of its own."""
        command = [sys.executable, "-m", "manual_mlp.testing", "torch:sigmoid", "--inputs", f"{__name__}:make_inputs"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


class WithoutJvp(torch.autograd.Function):
    """Right, and without forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * x.cos().conj()


class Cube(torch.autograd.Function):
    """Right, in the old style, its input kept on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.x = x
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * g * ctx.x**2


class OnceDifferentiable(torch.autograd.Function):
    """Right, and its backward refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * (x**2).conj()


class Broken(torch.autograd.Function):
    """Its backward always raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("not today")


class Noisy(torch.autograd.Function):
    """A random gradient behind a forward that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * g * x**2 * torch.rand_like(x)


class TestLevels:
    """What is wrong, unsafe or not supported, and what each means to somebody who asserts."""

    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    def test_a_right_function_in_the_old_style(self) -> None:
        report = testing.check_gradients(Cube, self.x, lambda x: x**3)
        right, unsafe, unsupported = report.verdict.removesuffix(".").split(". ")
        assert right == "The derivative is right"
        assert unsafe.startswith("Unsafe: saved tensors are guarded; saved tensors can be hooked")
        assert unsupported == "Not supported: forward mode; torch.func.grad; torch.func.jvp; torch.func.vmap"
        assert report["batched forward mode"].outcome == "n/a"
        with pytest.raises(testing.GradientError, match=r"Cube: \d checks failed") as caught:
            report.raise_if_failed()
        assert "torch.func" not in str(caught.value)

    def test_what_is_not_supported_is_no_failure(self) -> None:
        report = testing.check_gradients(WithoutJvp, self.x, torch.sin)
        assert report.verdict == "The derivative is right. Not supported: forward mode; torch.func.jvp."
        report.raise_if_failed()
        assert {row.level for row in report.failed} == {"unsupported"}

    def test_no_second_derivative(self) -> None:
        report = testing.check_gradients(OnceDifferentiable, self.x, lambda x: x**3)
        assert report["second derivative"].level == "unsupported"
        assert report["second derivative, strided"].outcome == "n/a"
        report.raise_if_failed()

    def test_what_builds_on_a_wrong_derivative_is_not_asked(self) -> None:
        """A second derivative that belongs to a wrong first one says nothing: NEWCOMER saw three rows pass."""
        report = testing.check_gradients(lambda x: x.sin() - (x / 1000).sin().detach(), self.x)
        assert report.verdict.startswith("Wrong: first derivative.")
        built = [name for name, check in CHECKS.items() if check.needs]
        assert {report[name].outcome for name in built} == {"n/a"}
        assert report["torch.func.grad"].outcome == "passed"

    def test_a_backward_that_raises(self) -> None:
        report = testing.check_gradients(Broken, self.x)
        assert report["first derivative"].level == "wrong"
        assert "not today" in report["first derivative"].seen
        assert {row.outcome for row in report.rows[1:]} == {"n/a"}
        assert "the backward raises RuntimeError: not today" in report["float32"].seen

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: torch_functional.dropout(x, 0.5),
            lambda x: x + torch.randn_like(x),
            lambda x: x * torch.rand(()),
            lambda x: torch_functional.rrelu(x - 5, training=True),
            lambda x: x.sin() if torch.rand(()) < 0.5 else -x.sin(),
            lambda x: x + x.sin() * (torch.rand(len(x), 1) < 0.9),  # stochastic depth
            nn.Dropout(),
            nn.Sequential(nn.Linear(2, 3), mm.Dropout(0.4), mm.Affine(3, 2)),
            Noisy,
        ],
    )
    def test_a_random_function(self, function: Any) -> None:
        """Its rows blame no sign."""
        torch.manual_seed(3)
        report = testing.check_gradients(function, self.x)
        text = "The derivative is not judged: the function is random: two runs on the same inputs differ."
        assert report.verdict == f"{text} Unsafe: deterministic."
        assert {row.outcome for row in report.rows if row.check != "deterministic"} == {"n/a"}
        with pytest.raises(testing.GradientError, match="fix their seed"):
            report.raise_if_failed()

    def test_a_fixed_seed_is_not_random(self) -> None:
        def dropout(x: Tensor) -> Tensor:
            mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            return mm.functional.dropout(x, 0.0) * mask.to(x.dtype) * 2

        testing.check_gradients(dropout, self.x).raise_if_failed()

    def test_the_pytest_helper(self) -> None:
        test_without_jvp = testing.gradient_tests(WithoutJvp, lambda: self.x)
        with pytest.raises(pytest.skip.Exception, match="unsupported: NotImplementedError"):
            test_without_jvp("forward mode")
        random = testing.gradient_tests(lambda x: x * torch.rand(()), lambda: self.x)
        with pytest.raises(pytest.skip.Exception, match="the function is random"):
            random("first derivative")
        with pytest.raises(testing.GradientError):
            random("deterministic")


def make_inputs() -> tuple[Tensor, ...]:
    return (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),)
