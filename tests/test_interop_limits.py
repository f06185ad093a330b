"""What torch's own tests find against a guest: here its layers do what torch's do, or stand on the list of limits.

A limit is real as long as the smallest custom Function, y = 2x, fails in the same way: each has that control, and its
cure. When torch mends one, its test fails, and the line goes.
"""

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functionalize, grad, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as torch_functional

import manual_mlp as mm
from manual_mlp import functional as F
from manual_mlp.network import network_loss

double = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "softplus": nn.Softplus,
    "silu": nn.SiLU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "identity": nn.Identity,
}  # fmt: skip
OURS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": mm.Sigmoid, "tanh": mm.Tanh, "relu": mm.ReLU, "leaky_relu": mm.LeakyReLU, "softplus": mm.Softplus,
    "silu": mm.SiLU, "gelu": mm.GELU, "gelu_tanh": lambda: mm.GELU("tanh"), "identity": mm.Identity,
}  # fmt: skip


class Twice(Function):
    """y = 2x: the smallest custom Function, with all that torch.func asks of one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 2


class Control(nn.Linear):
    """An nn.Linear with the smallest custom Function after it."""

    def forward(self, input: Tensor) -> Tensor:
        return Twice.apply(super().forward(input))  # type: ignore[no-any-return]


def raised(run: Callable[[], object]) -> str:
    """The type of what is raised, and the first words of its message; empty if nothing is."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:60]}"
    return ""


def a_sentence(error: mm.InputError) -> None:
    """Plain, and of what is wrong: two layers without numbers are not tied."""
    assert str(error).startswith("expected "), error
    assert "tied" not in str(error)


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(list(ours), list(theirs), **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Layers without neurons
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {"0 to 3": (0, 3), "3 to 0": (3, 0), "0 to 0": (0, 0)}
LAYERS = ("affine", "converted", *ACTIVATIONS)


def noted(make: Callable[[], nn.Module]) -> tuple[nn.Module, list[str], Tensor]:
    """A module, the warnings at its making, and the next random number."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = make()
    return module, [f"{warning.category.__name__}: {warning.message}" for warning in caught], torch.rand(())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_no_neurons(sizes: str, layer: str, bias: bool) -> None:
    """torch.nn.Linear takes 0, and warns: nn.AdaptiveLogSoftmaxWithLoss makes such layers."""
    inputs, outputs = SIZES[sizes]

    def theirs() -> nn.Module:
        linear = nn.Linear(inputs, outputs, bias, dtype=double)
        return nn.Sequential(linear, ACTIVATIONS[layer]()) if layer in ACTIVATIONS else linear

    def ours() -> nn.Module:
        if layer == "converted":
            return mm.convert(theirs())
        if layer == "affine":
            return mm.Affine(inputs, outputs, bias, dtype=double)
        return mm.AffineActivation(inputs, outputs, layer, bias, dtype=double)

    (mine, my_warnings, my_number), (other, their_warnings, their_number) = noted(ours), noted(theirs)
    assert my_warnings == their_warnings == ["UserWarning: Initializing zero-element tensors is a no-op"]
    assert my_number == their_number
    same(mine.parameters(), other.parameters())
    for shape in ((5,), (), (2, 3), (0,), (2, 0)):
        x = torch.randn(*shape, inputs, dtype=double, requires_grad=True)
        results = []
        for model in (mine, copy.deepcopy(mine), other):
            output = model(x)
            results.append([output, *torch.autograd.grad((output + 1).square().sum(), [x, *model.parameters()])])
            with torch.no_grad():
                results[-1].append(model(x))
        same(results[0], results[2])
        same(results[1], results[2])


@pytest.mark.parametrize("size", [-1, 2.0, "3", None], ids=str)
def test_what_is_no_size_is_refused(size: Any) -> None:
    for kind in (mm.Affine, mm.AffineActivation):
        for sizes in ((size, 3), (3, size)):
            with pytest.raises(mm.InputError, match="a whole number; got"):
                kind(*sizes)


@pytest.mark.parametrize("way", ["engine", "network"])
def test_a_net_with_a_layer_without_neurons(way: str) -> None:
    """It trains as by autograd, or is refused in a sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = nn.Sequential(mm.Affine(4, 0, dtype=double), mm.Tanh(), mm.AffineActivation(0, 3, dtype=double))
    twin = copy.deepcopy(ours)
    x, y = torch.randn(5, 4, dtype=double), torch.rand(5, 3, dtype=double)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, twin)]
    try:
        if way == "engine":
            mm.BackpropEngine(ours, optimizers[0]).step(x, y)
        else:
            network_loss(ours, x, y).backward()
            optimizers[0].step()
    except mm.InputError as error:
        a_sentence(error)
        return
    F.quadratic_loss(twin(x), y).backward()
    optimizers[1].step()
    same(ours.parameters(), twin.parameters())


def test_torchs_own_layer_without_neurons() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6], div_value=8.0).double()
    ours = mm.convert(copy.deepcopy(theirs))
    x, labels = torch.randn(6, 4, dtype=double), torch.arange(6)
    costs = [model(x, labels).loss for model in (ours, theirs)]
    same(costs[:1], costs[1:])
    gradients = [
        torch.autograd.grad(cost, [*model.parameters()], materialize_grads=True)
        for cost, model in zip(costs, (ours, theirs), strict=True)
    ]
    same(*gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Integers and bools
# ---------------------------------------------------------------------------------------------------------------------

WHOLE = {str(kind).removeprefix("torch."): kind
         for kind in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)}  # fmt: skip
VALUES = {"some": [0, 1, 1, 0, 3], "negative": [-2, -1, 0, 5], "none": [], "one": 1}


def answered(run: Callable[[], Tensor]) -> Tensor | None:
    """What comes; None if it is refused."""
    try:
        return run()
    except (RuntimeError, NotImplementedError):
        return None


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers(name: str, kind: str, default: torch.dtype) -> None:
    """What torch promotes is promoted, what it keeps is kept, and what it refuses is refused."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for values in VALUES.values():
            x = torch.tensor(values).to(WHOLE[kind])
            for input in (x, x.expand(2, *x.shape), torch.stack([x, x], -1)[..., 0]):
                expected = answered(lambda input=input: ACTIVATIONS[name]()(input))  # type: ignore[misc]
                if expected is None:
                    assert answered(lambda input=input: OURS[name]()(input)) is None  # type: ignore[misc]
                    continue
                output = OURS[name]()(input)
                assert (output.dtype, output.requires_grad) == (expected.dtype, False)
                torch.testing.assert_close(output, expected, rtol=1e-6 if default == torch.float32 else 1e-12, atol=0)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_in_place(kind: str) -> None:
    x = torch.tensor([-1, 0, 2]).to(WHOLE[kind])
    expected = answered(lambda: nn.ReLU(inplace=True)(x.clone()))
    mine = x.clone()
    output = answered(lambda: mm.ReLU(inplace=True)(mine))
    assert (output is None) == (expected is None)
    if expected is not None:
        assert output is mine
        same([mine], [expected])


@pytest.mark.parametrize("kind", WHOLE)
def test_dropout_of_whole_numbers(kind: str) -> None:
    """In training torch refuses them, in evaluation they pass."""
    x = torch.tensor([0, 1, 2]).to(WHOLE[kind])
    with pytest.raises(mm.InputError, match="floating-point"):
        mm.Dropout()(x)
    assert torch.equal(mm.Dropout().eval()(x), nn.Dropout().eval()(x))
    assert torch.equal(F.dropout(x, 0.0), torch_functional.dropout(x, 0.0, training=False))


@pytest.mark.parametrize("name", [name for name in OURS if name != "identity"])
def test_complex_numbers_stay_refused(name: str) -> None:
    with pytest.raises(mm.InputError, match="real and imaginary parts"):
        OURS[name]()(torch.ones(3, dtype=torch.complex64))


# ---------------------------------------------------------------------------------------------------------------------
# torch.func.functionalize: a limit
# ---------------------------------------------------------------------------------------------------------------------

Call = Callable[[Tensor], Tensor]
FUNCTIONALIZED: dict[str, Callable[[Call, Tensor], Any]] = {
    "functionalize": lambda f, x: functionalize(f)(x),
    "functionalize of vmap": lambda f, x: functionalize(vmap(f))(x.unsqueeze(1)),
    "functionalize of grad": lambda f, x: functionalize(grad(lambda x: f(x).sum()))(x),
    "grad of functionalize": lambda f, x: grad(lambda x: functionalize(f)(x).sum())(x),
    "functionalize, traced": lambda f, x: make_fx(functionalize(f))(x)(x),
    "functionalize, backward": lambda f, x: torch.autograd.grad(functionalize(f)(x.requires_grad_()).sum(), x)[0],
}


@pytest.mark.parametrize("how", FUNCTIONALIZED)
def test_functionalize_takes_no_custom_function(how: str) -> None:
    """NYI in torch for every autograd.Function; mm.revert and to_torch give what it takes."""
    run, x = FUNCTIONALIZED[how], torch.randn(5, 4)
    limit = "Functionalize rule for custom_function_call"
    net = mm.MLP([4, 3])
    converted = mm.convert(net.to_torch())
    for f in (Twice.apply, net, converted, mm.Sigmoid(), lambda x: F.mse_loss(x, torch.zeros_like(x))):
        with pytest.raises(RuntimeError, match=limit):
            run(f, x.clone())
    for cure in (net.to_torch(), mm.revert(converted)):
        torch.testing.assert_close(run(cure, x.clone()), run(net.to_torch(), x.clone()))


# ---------------------------------------------------------------------------------------------------------------------
# Nested tensors
# ---------------------------------------------------------------------------------------------------------------------

EARLY = torch.__version__ < "2.13"  # a TorchVersion, which compares numbers
RAGGED: dict[str, Callable[[], Tensor]] = {
    "jagged": lambda: torch.nested.nested_tensor(parts(2, 3), layout=torch.jagged),
    "jagged, of one row": lambda: torch.nested.nested_tensor(parts(1), layout=torch.jagged),
    "jagged, with none": lambda: torch.nested.nested_tensor(parts(2, 0, 1), layout=torch.jagged),
    "jagged, from values": lambda: torch.nested.nested_tensor_from_jagged(parts(7)[0], torch.tensor([0, 3, 7])),
    "jagged, of four dimensions": lambda: torch.nested.nested_tensor(
        [part.unsqueeze(1).expand(-1, 2, -1).contiguous() for part in parts(2, 3)], layout=torch.jagged
    ),
}


def parts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 4, dtype=double, generator=generator) for length in lengths]


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "affine": (lambda: mm.Affine(4, 3, dtype=double), lambda: nn.Linear(4, 3, dtype=double)),
    "affine without bias": (
        lambda: mm.Affine(4, 3, bias=False, dtype=double), lambda: nn.Linear(4, 3, bias=False, dtype=double)
    ),
    **{name: (OURS[name], ACTIVATIONS[name]) for name in OURS},
    **{
        f"affine + {name}": (
            lambda name=name: mm.AffineActivation(4, 3, name, dtype=double),  # type: ignore[misc]
            lambda name=name: nn.Sequential(nn.Linear(4, 3, dtype=double), ACTIVATIONS[name]()),  # type: ignore[misc]
        )
        for name in ("sigmoid", "relu", "gelu")
    },
    "converted": (
        lambda: mm.convert(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()),
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(),
    ),
    "MLP": (lambda: mm.MLP([4, 3, 2], dtype=double), lambda: mm.MLP([4, 3, 2], dtype=double).to_torch()),
    "dropout": (lambda: mm.Dropout(0.4), lambda: nn.Dropout(0.4)),
    "dropout of all": (lambda: mm.Dropout(1.0), lambda: nn.Dropout(1.0)),
}  # fmt: skip


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    ours, theirs = (make() for make in MODULES[name])
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(mine)
    return ours, theirs


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("ragged", RAGGED)
def test_jagged_tensors(name: str, ragged: str) -> None:
    """The values and gradients of torch's layer on the rows, side by side."""
    if EARLY and name == "leaky_relu":
        pytest.skip("torch 2.11 has no leaky_relu of a jagged tensor")
    ours, theirs = pair(name)
    results = []
    for model, nested in ((ours, True), (theirs, False)):
        x = RAGGED[ragged]()
        leaf = x.values().detach().clone().requires_grad_()
        input = torch.nested.nested_tensor_from_jagged(leaf, x.offsets()) if nested else leaf
        torch.manual_seed(1)
        output = model(input)
        assert output.is_nested == nested
        rows = output.values() if nested else output
        cost = (rows * torch.linspace(-1, 2, rows.numel(), dtype=double).view(rows.shape)).square().sum()
        first = torch.autograd.grad(cost, [leaf, *model.parameters()], create_graph=True)
        with torch.no_grad():
            torch.manual_seed(1)
            again = model(input)
        results.append([rows, *first, again.values() if nested else again])
    same(*results)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", MODULES)
def test_strided_nested_tensors_without_a_gradient(name: str) -> None:
    """Forward alone, what torch computes is computed, too."""
    ours, theirs = pair(name)
    with torch.no_grad():
        results = []
        for model in (theirs, ours):
            torch.manual_seed(1)
            x = torch.nested.nested_tensor(parts(2, 3), layout=torch.strided)
            results.append(answered(lambda model=model, x=x: model(x)))  # type: ignore[misc]
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None and results[1] is not None:
        same(results[1].unbind(), results[0].unbind())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", ["affine", "affine + relu", "MLP", "converted", "tanh", "gelu", "dropout"])
def test_strided_nested_tensors_take_no_custom_function(name: str) -> None:
    """Autograd asks a Function's output for its sizes, which that layout has none of; torch.jagged is the cure."""

    def backward(model: Callable[[Tensor], Tensor], layout: torch.layout) -> None:
        output = model(torch.nested.nested_tensor(parts(2, 3), layout=layout, requires_grad=True))
        torch.cat([part.flatten() for part in output.unbind()]).sum().backward()

    with pytest.raises(RuntimeError, match="doesn't support sizes"):
        backward(Twice.apply, torch.strided)
    with pytest.raises(mm.InputError, match=r"layout torch\.jagged; got torch\.strided"):
        backward(MODULES[name][0](), torch.strided)
    backward(nn.Linear(4, 3, dtype=double), torch.strided)
    backward(Twice.apply, torch.jagged)


class Both(Function):
    """y = 2x and z = 3x: the smallest custom Function of two outputs."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x * 2, x * 3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_z: Tensor) -> Tensor:  # type: ignore[override]
        return g * 2 + g_z * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_compiled_jagged_tensors_take_no_custom_function_of_two_outputs() -> None:
    """A fused layer that saves z has two; the affine map and its activation as two layers are the cure."""

    def backward(model: Callable[[Tensor], Tensor]) -> Tensor:
        def run(leaf: Tensor) -> Tensor:
            return model(torch.nested.nested_tensor_from_jagged(leaf, torch.tensor([0, 3, 7]))).values().sum()

        torch.compiler.reset()
        leaf = parts(7)[0].requires_grad_()
        torch.compile(run, backend="aot_eager")(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    for model in (lambda x: Both.apply(x)[0], MODULES["affine + gelu"][0]()):
        with pytest.raises(RuntimeError, match="is not tracked"):
            backward(model)
    _, plain = pair("affine + gelu")
    unfused = nn.Sequential(mm.Affine(4, 3, dtype=double), mm.GELU())
    unfused.load_state_dict(plain.state_dict())
    same([backward(unfused)], [backward(plain)])
    backward(MODULES["affine + sigmoid"][0]())


# ---------------------------------------------------------------------------------------------------------------------
# Tools that look a layer up by its exact type: a limit
# ---------------------------------------------------------------------------------------------------------------------


def quantized(model: nn.Module, kinds: Any) -> list[str]:
    """The layers of a quantized copy that are."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = quantize_dynamic(copy.deepcopy(model), kinds)
    return [
        name for name, module in copied.named_modules() if type(module).__module__.endswith("dynamic.modules.linear")
    ]


def looked_up(model: nn.Module, kinds: Any) -> list[str]:
    """As Captum's DeepLift looks for its rules: torch's classes alone have one."""
    rules = kinds or {nn.Linear, nn.Sigmoid, nn.ReLU}
    return [name for name, module in model.named_modules() if type(module) in rules]


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines
                    and "fbgemm" not in torch.backends.quantized.supported_engines, reason="no engine")  # fmt: skip
@pytest.mark.parametrize("tool", [quantized, looked_up])
@pytest.mark.parametrize("kinds", [None, {nn.Linear}], ids=["by default", "by class"])
def test_tools_that_ask_for_the_exact_type(tool: Callable[[nn.Module, Any], list[str]], kinds: Any) -> None:
    """They pass by our layers, as by any subclass, in silence; mm.revert and to_torch give torch's."""
    plain = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    net = mm.MLP([4, 3, 2], output_activation="identity")
    converted = mm.convert(copy.deepcopy(plain))
    assert tool(plain, kinds)
    for model in (nn.Sequential(Control(4, 3)), converted, net):
        assert tool(model, kinds) == []
    for model in (mm.revert(converted), net.to_torch()):
        assert tool(model, kinds) == tool(plain, kinds)


# ---------------------------------------------------------------------------------------------------------------------
# torch.jit.trace
# ---------------------------------------------------------------------------------------------------------------------

TRACED: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    **{name: lambda name=name: pair(name) for name in MODULES if "dropout" not in name},  # type: ignore[misc]
    "dropout, evaluated": lambda: (mm.MLP([4, 3, 2], dropout=0.5, dtype=double).eval(),) * 2,
    "fused": lambda: (mm.convert(nn.Sequential(nn.Linear(4, 3), nn.GELU()).double()),) * 2,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("mode", ["traced", "traced without a gradient"])
def test_torch_jit_trace(name: str, mode: str) -> None:
    """A program of plain operators, as of torch's layers: it is checked, saved, loaded, and takes other batches."""
    ours, theirs = TRACED[name]()
    with torch.set_grad_enabled(mode == "traced"):
        traced = torch.jit.trace(ours, (torch.randn(5, 4, dtype=double),))
    assert "PythonOp" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    results = []
    for model in (loaded, theirs):
        x = torch.randn(7, 4, dtype=double, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = model(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])])
    same(*results)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_tracing_ends() -> None:
    """After it the graph holds our nodes again."""
    net = mm.MLP([4, 3])
    torch.jit.trace(net, (torch.randn(5, 4),))
    mm.testing.assert_manual_backward(net, torch.randn(5, 4))


# ---------------------------------------------------------------------------------------------------------------------
# DTensor
# ---------------------------------------------------------------------------------------------------------------------

gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")


@pytest.fixture(scope="module")
def _one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def placed(tensor: Tensor, placement: str) -> Tensor:
    """A DTensor over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    place = {"rows": Shard(0), "columns": Shard(tensor.dim() - 1), "whole": Replicate()}[placement]
    return distribute_tensor(tensor, init_device_mesh("cpu", (dist.get_world_size(),)), [place])


SHAPES = {"of one dimension": (4,), "of two dimensions": (6, 4), "of three dimensions": (2, 6, 4)}
PLACED = [name for name in MODULES if "dropout" not in name]


def by_dtensor(name: str, shape: str) -> None:
    """Values and gradients of torch's layer on ordinary tensors, for every way to cut weights and input."""
    torch.manual_seed(0)  # in every process
    ours, theirs = pair(name)
    leaf = torch.randn(SHAPES[shape], dtype=double, generator=torch.Generator().manual_seed(0))
    x = leaf.clone().requires_grad_()
    expected = theirs(x)
    weighed = torch.linspace(-1, 2, expected.numel(), dtype=double).view(expected.shape)
    gradients = torch.autograd.grad((expected * weighed).sum(), [x, *theirs.parameters()])
    for weights in ("whole", "rows", "columns"):
        for inputs in ("whole", "rows", "columns"):
            model: Any = copy.deepcopy(ours)
            for module in model.modules():
                for key, value in list(module._parameters.items()):
                    if value is not None:
                        cut = placed(value.detach(), "whole" if value.dim() == 1 and weights == "columns" else weights)
                        module.register_parameter(key, nn.Parameter(cut))
            x = placed(leaf, inputs).requires_grad_()
            output = model(x)
            mine = torch.autograd.grad((output * placed(weighed, "whole")).sum(), [x, *model.parameters()])
            same([full(tensor) for tensor in (output, *mine)], [expected, *gradients])


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@gloo
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("shape", SHAPES)
def test_dtensor(name: str, shape: str) -> None:
    if EARLY and name == "softplus":
        pytest.skip("torch 2.11 has no threshold of a DTensor")
    by_dtensor(name, shape)


@gloo
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("fuse", [True, False])
def test_tensor_parallel(fuse: bool) -> None:
    """A converted model is parallelised as torch's; a fused layer of ours is refused, since it is no nn.Linear."""
    tensor_parallel(fuse)


def tensor_parallel(fuse: bool) -> None:
    torch.manual_seed(0)  # in every process
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).double()
    ours = parallelize_module(mm.convert(copy.deepcopy(plain), fuse=fuse), mesh, plan)
    x = torch.randn(5, 4, dtype=double, generator=torch.Generator().manual_seed(0))
    results = [
        [model(x), *torch.autograd.grad(model(x).square().sum(), [*model.parameters()])] for model in (ours, plain)
    ]
    same([full(tensor) for tensor in results[0]], results[1])
    net = mm.MLP([4, 6, 2])
    with pytest.raises(NotImplementedError, match=r"only support nn\.Linear"):
        parallelize_module(net, mesh, plan)
    with pytest.raises(NotImplementedError, match=r"only support nn\.Linear"):
        parallelize_module(nn.Sequential(nn.Module()), mesh, {"0": ColwiseParallel()})
    parallelize_module(net.to_torch(), mesh, plan)


@gloo
@pytest.mark.usefixtures("_one_process")
def test_fully_sharded() -> None:
    """FSDP2: a layer's DTensors are gathered before its forward."""
    from torch.distributed.fsdp import fully_shard

    ours = mm.MLP([4, 6, 2], "gelu", dtype=double)
    theirs = ours.to_torch()
    for model in (ours, theirs):
        for layer in (*model.children(), model):
            if [*layer.parameters()]:
                fully_shard(layer)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.linspace(-1, 1, 20, dtype=double).view(5, 4)).square().sum().backward()
        optimizer.step()
    same([full(parameter) for parameter in ours.parameters()], [full(parameter) for parameter in theirs.parameters()])


@gloo
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("way", ["engine", "network"])
def test_whole_nets_of_dtensors(way: str) -> None:
    """As by autograd, or a refusal in a sentence."""
    ours = mm.MLP([4, 3], dtype=double)
    twin = copy.deepcopy(ours)
    for name, value in list(ours[0]._parameters.items()):
        ours[0].register_parameter(name, nn.Parameter(placed(value.detach(), "whole")))
    x, y = torch.randn(6, 4, dtype=double), torch.rand(6, 3, dtype=double)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, twin)]
    try:
        if way == "engine":
            mm.BackpropEngine(ours, optimizers[0]).step(placed(x, "whole"), placed(y, "whole"))
        else:
            network_loss(ours, placed(x, "whole"), placed(y, "whole")).backward()
            optimizers[0].step()
    except mm.InputError as error:
        a_sentence(error)
        return
    F.quadratic_loss(twin(x), y).backward()
    optimizers[1].step()
    same([full(parameter) for parameter in ours.parameters()], twin.parameters())


def two_processes(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name in PLACED if not EARLY else set(PLACED) - {"softplus"}:
        for shape in SHAPES:
            by_dtensor(name, shape)
    for fuse in (True, False):
        tensor_parallel(fuse)
    dist.barrier()
    dist.destroy_process_group()


@gloo
@pytest.mark.slow
def test_dtensor_in_two_processes(tmp_path: Path) -> None:
    mp.spawn(two_processes, (str(tmp_path / "store"),), nprocs=2)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile of a torch.func transform
# ---------------------------------------------------------------------------------------------------------------------

COMPILED: dict[str, Callable[[Call, Tensor], Callable[[Tensor], Any]]] = {
    "grad": lambda f, x: grad(lambda x: f(x).sum()),
    "vjp": lambda f, x: lambda x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jacrev": lambda f, x: jacrev(lambda x: f(x).sum(0)),
    "jvp": lambda f, x: lambda x: jvp(f, (x,), (torch.ones_like(x),)),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sum())),
    "grad of grad": lambda f, x: grad(lambda x: grad(lambda x: f(x).square().sum())(x).square().sum()),
}


class Reads(Function):
    """y = w x, the smallest Function that asks, as torch's notes recommend, which gradients are needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return x * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return g * weight if needs_x else None, (g * x).sum() if needs_weight else None


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


QUICK = [("affine + gelu", "grad", "trained"), ("affine + gelu", "grad", "fixed"), ("MLP", "jvp", "trained"),
         ("affine", "vmap of grad", "trained")]  # fmt: skip
EVERY = [(name, how, parameters) for name in ("affine", "affine + sigmoid", "affine + gelu", "converted", "gelu", "MLP")
         for how in COMPILED for parameters in ("trained", "fixed")]  # fmt: skip


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(("name", "how", "parameters"), QUICK)
def test_compiled_transforms(name: str, how: str, parameters: str) -> None:
    """The numbers are right, and the formula ATen's: inside a transform dynamo differentiates the forward."""
    compiled_transform(name, how, parameters)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
def test_all_compiled_transforms() -> None:
    for values in EVERY:
        torch.compiler.reset()
        compiled_transform(*values)


def compiled_transform(name: str, how: str, parameters: str) -> None:
    ours, theirs = pair(name)
    ours.requires_grad_(parameters == "trained")
    x = torch.randn(5, 4, dtype=double)
    run = COMPILED[how]
    results = [torch.compile(run(ours, x), fullgraph=True, backend="eager")(x), run(theirs, x)(x)]
    same(*(result if isinstance(result, tuple) else [result] for result in results))


@pytest.mark.usefixtures("_fresh")
def test_the_compiler_passes_wrong_needs_to_a_custom_function() -> None:
    """Why none is called there: this fails when torch has mended it."""
    weight, x = nn.Parameter(torch.tensor(3.0)), torch.ones(2)
    gradient = grad(lambda x: Reads.apply(x, weight).sum())
    assert gradient(x).tolist() == [3.0, 3.0]
    assert torch.compile(gradient, fullgraph=True, backend="eager")(x).tolist() == [0.0, 0.0]
    doubled = torch.compile(grad(lambda x: Thrice.apply(x).sum()), fullgraph=True, backend="eager")
    assert doubled(x).tolist() == [2.0, 2.0]  # pytorch#193279: the backward, which says 3, is not called


class Thrice(Twice):
    """y = 2x, with a backward that says 3, to see who is asked."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("road", ["eager", "export", "make_fx", "jit.trace", "compile"])
def test_who_notices_atens_derivative(road: str) -> None:
    """What is exported or traced is a program of plain operators; assert_manual_backward names them."""
    net, x = mm.MLP([4, 3], "gelu"), torch.randn(5, 4)
    makes: dict[str, Callable[[], Any]] = {
        "eager": lambda: net,
        "export": lambda: torch.export.export(net, (x,)).module(),
        "make_fx": lambda: make_fx(net)(x),
        "jit.trace": lambda: torch.jit.trace(net, (x,)),
        "compile": lambda: torch.compile(net, backend="aot_eager"),
    }
    model = makes[road]()
    if road == "eager":
        mm.testing.assert_manual_backward(model, x)
        return
    with pytest.raises(AssertionError, match="SigmoidBackward0" if "compile" not in road else "before torch.compile"):
        mm.testing.assert_manual_backward(model, x)
