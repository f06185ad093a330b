"""mm.convert and mm.revert: torch.nn to ours inside any model, and back to exactly what it was."""

import copy
import io
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import rtdl_revisiting_models as rtdl
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import manual_mlp as mm
from manual_mlp import functional
from manual_mlp.conversion import FusedSequential
from manual_mlp.functional import tanh as our_tanh
from manual_mlp.testing.checks import nodes_of

# The same formulas in another order of operations: a few eps of float64, on numbers of order 1.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Branches(nn.Module):
    """A model with all there is: nesting, a tie, a shared activation, a subclass, buffers, a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Tanh()
        self.body = nn.Sequential(nn.Linear(6, 5), shared, nn.Linear(5, 5), shared, nn.Dropout(0.0), nn.Linear(5, 6))
        self.norm = nn.BatchNorm1d(6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6, bias=False), nn.SiLU()) for _ in range(2)])
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.blocks[0][0].weight
        self.activation = nn.Softplus(beta=2.0)
        self.head = nn.Linear(6, 3)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.activation(self.tied(x)))


def branches() -> nn.Module:
    torch.manual_seed(0)
    return Branches().double()


def pair(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), activation or nn.Sigmoid(), nn.Linear(4, 2)).double()


def rows(features: int, count: int = 7) -> Tensor:
    return torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def output_and_gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs)
    torch.manual_seed(0)
    output = model(*inputs)
    wanted = [tensor for tensor in (*inputs, *model.parameters()) if tensor.requires_grad]
    return [output, *torch.autograd.grad(output.square().sum(), wanted, allow_unused=True, materialize_grads=True)]


def nodes(output: Tensor) -> list[str]:
    """The names of all nodes in a graph, each node once."""
    return [node.name() for node in nodes_of(output)]


def anatomy(model: nn.Module) -> list[Any]:
    """All that a model is: each module object with its class, attributes, tensors and hooks, in order."""

    def contents(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, contents(held)) for key, held in value.items()]
        return value if isinstance(value, str | int | float | bool | type | None) else id(value)

    return [
        (name, id(module), type(module), contents(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "pair": (pair, lambda: (rows(3),)),
    "branches": (branches, lambda: (rows(6),)),
    # in training: in evaluation its fast path never calls its layers
    "transformer": (
        lambda: nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation=nn.GELU(), batch_first=True, dtype=torch.float64
        ),
        lambda: (rows(8, 10).reshape(2, 5, 8),),
    ),
    # a package of models for tables that knows nothing of this one
    "rtdl_mlp": (
        lambda: rtdl.MLP(d_in=6, d_out=3, n_blocks=2, d_block=8, dropout=0.1).double(),
        lambda: (rows(6),),
    ),
    "rtdl_resnet": (
        lambda: rtdl.ResNet(
            d_in=6, d_out=2, n_blocks=2, d_block=8, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0
        ).double(),
        lambda: (rows(6),),
    ),
    "rtdl_transformer": (
        lambda: rtdl.FTTransformer(
            n_cont_features=3, cat_cardinalities=[4], d_out=1, **rtdl.FTTransformer.get_default_kwargs(n_blocks=1)
        ).double(),
        lambda: (rows(3), torch.tensor([[0], [3], [1], [1], [2], [0], [0]])),
    ),
}


@pytest.fixture(params=MODELS)
def example(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, inputs = MODELS[request.param]
    return make(), inputs()


@pytest.mark.parametrize("fuse", [True, False])
def test_computes_what_it_computed(example: tuple[nn.Module, tuple[Tensor, ...]], fuse: bool) -> None:
    model, inputs = example
    plain = copy.deepcopy(model)
    assert mm.convert(model, fuse=fuse) is model
    for ours, theirs in zip(output_and_gradients(model, *inputs), output_and_gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_revert_gives_back_exactly_the_model(example: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
    model, _ = example
    before = anatomy(model)
    mm.convert(model)
    assert anatomy(model) != before
    assert mm.revert(model) is model
    assert anatomy(model) == before


def test_backward_is_ours() -> None:
    names = nodes(mm.convert(branches())(rows(6)))
    assert not {"AddmmBackward0", "MmBackward0", "TBackward0", "TanhBackward0", "SiluBackward0"}.intersection(names)
    assert names.count("AffineTanhBackward") == 2
    assert names.count("AffineSiluBackward") == 2
    assert names.count("AffineBackward") == 3
    assert names.count("SoftplusBackward") == 1


def test_transformer_and_third_party_layers_are_ours() -> None:
    for name, expected in {
        "transformer": {"AffineBackward", "GeluBackward"},
        "rtdl_mlp": {"AffineReluBackward", "AffineBackward"},
        "rtdl_resnet": {"AffineReluBackward", "AffineBackward", "ReluBackward"},
        "rtdl_transformer": {"AffineBackward"},
    }.items():
        make, inputs = MODELS[name]
        model = mm.convert(make())
        assert expected <= set(nodes(model(*inputs())))


def test_evaluation_mode_is_the_same(example: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
    """Of the transformer it is torch's fast path, which reads the weights and calls no layer."""
    model, inputs = example
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        torch.testing.assert_close(mm.convert(model)(*inputs), expected, **EXACT)


@pytest.mark.parametrize("plain", [nn.Identity, nn.Sigmoid, nn.Tanh, nn.ReLU, nn.Softplus, nn.SiLU, nn.GELU])
def test_every_activation(plain: type[nn.Module]) -> None:
    model = pair(plain())
    mm.convert(model)
    assert type(model[1]) is getattr(mm, plain.__name__)
    assert isinstance(model[1], plain)


def test_arguments_of_activations_are_kept() -> None:
    for activation in (
        nn.LeakyReLU(0.3),
        nn.LeakyReLU(-0.3),
        nn.Softplus(2.0, 3.0),
        nn.GELU("tanh"),
        nn.ReLU(inplace=True),
        nn.SiLU(inplace=True),
    ):
        plain, model = pair(activation), mm.convert(pair(copy.deepcopy(activation)))
        for ours, theirs in zip(
            output_and_gradients(model, rows(3)), output_and_gradients(plain, rows(3)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# What stays
# ---------------------------------------------------------------------------------------------------------------------


def test_objects_names_modes_and_state_stay() -> None:
    model = branches().eval()
    model.body.train()
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    modes = {name: module.training for name, module in model.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    mm.convert(model)
    assert {name: id(module) for name, module in model.named_modules(remove_duplicate=False)} == modules
    assert {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)} == parameters
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs
    assert list(model.state_dict()) == keys
    assert model.tied.weight is model.blocks[0][0].weight
    branches().load_state_dict(model.state_dict())
    model.load_state_dict(branches().state_dict())


def test_dtype_and_device_stay() -> None:
    model = mm.convert(nn.Sequential(nn.Linear(3, 4, device="meta", dtype=torch.bfloat16), nn.Sigmoid()))
    output = model(torch.empty(2, 3, device="meta", dtype=torch.bfloat16))
    assert (output.shape, output.dtype, output.device.type) == ((2, 4), torch.bfloat16, "meta")


def test_an_optimizer_made_before_goes_on_working() -> None:
    def train(convert: bool) -> nn.Module:
        model = branches()
        optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], 0.05)
        for step in range(6):
            if convert and step == 2:
                mm.convert(model)
            if convert and step == 4:
                mm.revert(model)
            optimizer.zero_grad()
            model(rows(6)).square().sum().backward()
            optimizer.step()
        return model

    for ours, theirs in zip(train(True).parameters(), train(False).parameters(), strict=True):
        # Adam divides by the root of g², so an eps in a gradient near 0 grows
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_nothing_is_global() -> None:
    forward, other = nn.Linear.forward, pair()
    mm.convert(pair())
    assert nn.Linear.forward is forward
    assert [type(layer) for layer in other] == [nn.Linear, nn.Sigmoid, nn.Linear]
    assert nodes(other(rows(3)))[0] == "AddmmBackward0"


def test_convert_twice_and_revert_twice() -> None:
    model = branches()
    before = anatomy(model)
    mm.convert(mm.convert(model))
    mm.revert(mm.revert(model))
    assert anatomy(model) == before


def test_a_single_layer() -> None:
    layer = nn.Linear(3, 4)
    assert type(mm.convert(layer)) is mm.Affine
    assert type(mm.revert(layer)) is nn.Linear


def test_what_was_ours_before_stays_ours() -> None:
    model = nn.Sequential(mm.Affine(3, 4), mm.Sigmoid(), nn.Linear(4, 2), mm.MLP([2, 3, 1]))
    before = anatomy(model)
    assert type(mm.convert(model)[2]) is mm.Affine
    assert mm.left_alone(model) == {}
    mm.revert(model)
    assert anatomy(model) == before


def test_copies_and_pickles_are_converted_and_revert() -> None:
    model = mm.convert(branches())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded(model)):
        assert type(twin.body) is FusedSequential
        assert torch.equal(twin(rows(6)), model(rows(6)))
        mm.revert(twin)
        assert [type(module) for module in twin.modules()] == [type(module) for module in branches().modules()]
    assert type(model.body) is FusedSequential


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---------------------------------------------------------------------------------------------------------------------
# Fusion
# ---------------------------------------------------------------------------------------------------------------------


def test_indexing_and_slicing_return_what_they_did() -> None:
    plain, model = pair(), mm.convert(pair())
    assert len(model) == 3
    assert [type(layer) for layer in model] == [mm.Affine, mm.Sigmoid, mm.Affine]
    for part in (slice(0, 1), slice(0, 2), slice(1, 3)):
        x = rows(3 if part.start == 0 else 4)
        torch.testing.assert_close(model[part](x), plain[part](x), **EXACT)
    torch.testing.assert_close(model[0](rows(3)), plain[0](rows(3)), **EXACT)


def test_layers_put_in_and_taken_out_later() -> None:
    model = mm.convert(pair())
    model[1] = nn.Tanh()
    model.append(nn.Sigmoid())
    assert [name for name in nodes(model(rows(3))) if name.startswith(("Affine", "Tanh", "Sigmoid"))] == [
        "SigmoidBackward0",
        "AffineBackward",
        "TanhBackward0",
        "AffineBackward",
    ]
    del model[3]
    mm.convert(model)
    assert "AffineTanhBackward" in nodes(model(rows(3)))


def test_fuse_false_keeps_each_layer_a_node() -> None:
    model = mm.convert(pair(), fuse=False)
    assert type(model) is nn.Sequential
    assert "AffineBackward" in nodes(model(rows(3)))
    assert "SigmoidBackward" in nodes(model(rows(3)))


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "forward_pre": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "full_backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "full_backward_pre": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "global_forward": lambda _, hook: nn.modules.module.register_module_forward_hook(hook),
    "global_backward": lambda _, hook: nn.modules.module.register_module_full_backward_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("before", [True, False])
def test_a_hook_on_either_layer_is_called_whenever_it_is_added(kind: str, index: int, before: bool) -> None:
    model = pair()
    seen: list[nn.Module] = []
    if not before:
        mm.convert(model)
    handle = HOOKS[kind](model[index], lambda layer, *_: seen.append(layer))
    try:
        output = mm.convert(model)(rows(3).requires_grad_())
        output.sum().backward()
    finally:
        handle.remove()
    assert model[index] in seen
    assert "AffineSigmoidBackward" not in nodes(output)
    assert "AffineSigmoidBackward" in nodes(model(rows(3)))


def test_a_hook_sees_z() -> None:
    model = mm.convert(pair())
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    model(rows(3))
    torch.testing.assert_close(seen[0], pair()[0](rows(3)), **EXACT)


def test_a_layer_whose_forward_is_replaced_later_is_called() -> None:
    model = mm.convert(pair())
    model[1].forward = torch.zeros_like
    torch.testing.assert_close(model(rows(3)), model[2].bias.expand(7, 2), **EXACT)


def test_a_shared_activation_is_fused_at_each_place() -> None:
    model = mm.convert(branches())
    assert nodes(model.body(rows(6))).count("AffineTanhBackward") == 2


class Named(nn.Sequential):
    """Derived from nn.Sequential, without a forward of its own."""

    def features(self) -> int:
        return self[0].out_features


class Doubling(nn.Sequential):
    """Derived from nn.Sequential, with one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


def test_a_sequential_by_another_name_is_fused() -> None:
    model = Named(OrderedDict(first=nn.Linear(3, 4), second=nn.Sigmoid()))
    mm.convert(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, Named)
        assert twin.features() == 4
        assert twin.state_dict().keys() == {"first.weight", "first.bias"}
        assert nodes(twin(rows(3).float()))[0] == "AffineSigmoidBackward"
        assert type(mm.revert(twin)) is Named


def test_a_forward_of_its_own_is_not_replaced() -> None:
    torch.manual_seed(0)
    model = Doubling(nn.Linear(3, 4), nn.Sigmoid()).double()
    expected = model(rows(3))
    mm.convert(model)
    assert type(model) is Doubling
    assert "AffineBackward" in nodes(model(rows(3)))
    torch.testing.assert_close(model(rows(3)), expected, **EXACT)
    replaced = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())
    replaced.forward = lambda input: input
    assert type(mm.convert(replaced)) is nn.Sequential


# ---------------------------------------------------------------------------------------------------------------------
# filter, and what is left alone
# ---------------------------------------------------------------------------------------------------------------------


def test_filter_chooses_by_module_and_name() -> None:
    asked: list[str] = []

    def filter(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return isinstance(module, nn.Linear) and name != "head"

    model = mm.convert(branches(), filter=filter)
    assert asked == [name for name, module in branches().named_modules() if type(module) in mm_counterparts()]
    assert type(model.head) is nn.Linear
    assert type(model.tied) is mm.Affine
    assert type(model.activation) is nn.Softplus
    assert type(model.body) is nn.Sequential


def mm_counterparts() -> set[type[nn.Module]]:
    plain = {nn.Linear, nn.Identity, nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.Softplus, nn.SiLU, nn.GELU}
    return plain | {nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.Softmax}


def test_a_filter_that_raises_changes_nothing() -> None:
    model = branches()
    before = anatomy(model)

    def filter(module: nn.Module, name: str) -> bool:
        if name == "head":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        mm.convert(model, filter=filter)
    assert anatomy(model) == before


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)


class Quantised(nn.Module):
    """What shares only its name with nn.Linear."""


Quantised.__name__ = Quantised.__qualname__ = "Linear"


def with_forward(layer: nn.Module) -> nn.Module:
    layer.forward = torch.zeros_like
    return layer


def parametrized(kind: type[nn.Linear]) -> nn.Module:
    return parametrizations.weight_norm(kind(3, 4))


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Clamped(3, 4), "test_convert.Clamped may compute"),
    "lazy": (lambda: nn.LazyLinear(4), "LazyLinear may compute"),
    "quantised": (lambda: torch.ao.nn.quantized.Linear(3, 4), "quantized.modules.linear.Linear may compute"),
    "dynamic": (lambda: torch.ao.nn.quantized.dynamic.Linear(3, 4), "dynamic.modules.linear.Linear may compute"),
    "third_party": (Quantised, "Linear may compute"),
    "complex": (lambda: nn.Linear(3, 4, dtype=torch.complex64), "its weight is no plain floating-point parameter"),
    "replaced_forward": (lambda: with_forward(nn.Linear(3, 4)), "its forward has been replaced"),
    "replaced_activation": (lambda: with_forward(nn.ReLU()), "its forward has been replaced"),
    "parametrized_subclass": (lambda: parametrized(Clamped), "test_convert.Clamped may compute"),
    "relu6": (lambda: type("Leaky", (nn.LeakyReLU,), {})(), "Leaky may compute"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # in torch's own quantised layers
@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_and_reported_by_name(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = LEFT_ALONE[case]
    layer = make()
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 3), odd=layer))
    before = anatomy(layer)
    with caplog.at_level(logging.WARNING, "manual_mlp.conversion"):
        mm.convert(model)
    assert anatomy(layer) == before
    assert type(model.first) is mm.Affine
    assert list(mm.left_alone(model)) == ["odd"]
    assert reason in mm.left_alone(model)["odd"]
    (record,) = caplog.records
    assert record.getMessage() == f"left as it was: odd ({mm.left_alone(model)['odd']})"


def test_nothing_to_report_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(), nn.AvgPool1d(1), nn.Linear(3, 1))
    mm.convert(model, filter=lambda module, name: name != "4")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_attention_keeps_its_projection(caplog: pytest.LogCaptureFixture) -> None:
    """nn.MultiheadAttention reads out_proj's weight and never calls it."""
    model = mm.convert(nn.TransformerEncoderLayer(8, 2, 16))
    assert list(mm.left_alone(model))[:2] == ["self_attn", "self_attn.out_proj"]
    assert "self_attn.out_proj" in caplog.text


class Scaled(nn.Module):
    """A layer of somebody's own, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))
        self.inner = nn.Sequential(nn.Linear(3, 3))


NO_FORMULA: dict[str, Callable[[], nn.Module]] = {
    "nonlinear": nn.ELU,
    "of_a_subclass": type("Steep", (nn.ELU,), {}),
    "maximum": lambda: nn.FractionalMaxPool2d(2, 2),
    "normalised": lambda: nn.LocalResponseNorm(2),
    "recurrent": lambda: nn.LSTM(3, 3),
    "parameters": lambda: nn.Embedding(3, 3),
    "parametrized": lambda: parametrizations.weight_norm(nn.ConvTranspose1d(3, 3, 1, bias=False)),
    "own": Scaled,
}


@pytest.mark.parametrize("case", NO_FORMULA)
def test_layers_without_a_formula_are_named(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """A layer that stays torch's is named if it has parameters or is nonlinear; another one is as good as ours."""
    layer = NO_FORMULA[case]()
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 3), flat=nn.Flatten(), pool=nn.AvgPool1d(1), odd=layer))
    with caplog.at_level(logging.INFO, "manual_mlp.conversion"):
        mm.convert(model)
    assert list(mm.left_alone(model)) == ["odd"]
    assert "no formula for " in mm.left_alone(model)["odd"]
    said, left = (record.getMessage() for record in caplog.records)
    taken = 2 if case == "own" else 1
    assert said == f"converted {taken} of the {taken} layers with a formula here"
    assert left == f"left as it was: odd ({mm.left_alone(model)['odd']})"


class Calls(nn.Module):
    """A net whose own forward calls functions, one of them as a method; `tanh` is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tanh = nn.Linear(2, 2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softmax(torch.relu(self.tanh(self.first(x))).sigmoid(), -1)


def test_functions_that_a_forward_calls_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "manual_mlp")  # another test may have asked for more
    model = mm.convert(nn.Sequential(Calls(), nn.Flatten()))
    reason = "its forward calls softmax, relu, sigmoid itself; mm.testing.assert_manual_backward finds what is torch's"
    assert mm.left_alone(model) == {"0": reason}
    assert caplog.messages == [f"left as it was: 0 ({reason})"]
    with pytest.raises(AssertionError, match="ReluBackward"):
        mm.testing.assert_manual_backward(model, torch.randn(3, 2))


class CallsOurs(nn.Module):
    """A net whose own forward calls functions of ours, and a `linear` that is a module two levels inside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return mm.functional.softmax(functional.relu(our_tanh(self.block.linear(x))), -1)


def test_functions_of_ours_that_a_forward_calls_are_not_named() -> None:
    model = mm.convert(CallsOurs())
    assert mm.left_alone(model) == {}
    mm.testing.assert_manual_backward(model, torch.randn(3, 2))


def test_a_scripted_model_is_no_reason_to_fail() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Flatten()))
    assert mm.convert(scripted) is scripted
    assert mm.left_alone(scripted) == {}


def test_what_the_filter_keeps_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "manual_mlp.conversion"):
        mm.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), filter=lambda module, name: name == "0")
    assert [record.getMessage() for record in caplog.records] == ["converted 1 of the 2 layers with a formula here"]


def test_nets_of_ours_have_nothing_left() -> None:
    assert mm.left_alone(nn.Sequential(mm.MLP([2, 3, 1], dropout=0.5), mm.Perceptron(2))) == {}


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_converted(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = pair()
    norm(model[0])
    plain = copy.deepcopy(model)
    mm.convert(model)
    assert isinstance(model[0], mm.Affine)
    assert type(plain[0]).__bases__ == (nn.Linear,)  # a copy shares its class with the original
    for ours, theirs in zip(output_and_gradients(model, rows(3)), output_and_gradients(plain, rows(3)), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert "AffineBackward" in nodes(model(rows(3)))
    assert model.state_dict().keys() == plain.state_dict().keys()
    mm.revert(model)
    assert type(model[0]).__bases__ == (nn.Linear,)
    assert type(model[0]).__name__ == type(plain[0]).__name__
    assert vars(model[0]).keys() == vars(plain[0]).keys()
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


def test_parametrized_and_freed_while_converted() -> None:
    model = mm.convert(pair())
    parametrizations.weight_norm(model[0])
    mm.revert(model)
    assert type(model[0]).__bases__ == (nn.Linear,)
    mm.convert(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is mm.Affine
    assert type(mm.revert(model)[0]) is nn.Linear


def test_pruned_before_and_after() -> None:
    def pruned(convert_first: bool) -> nn.Module:
        model = pair()
        if convert_first:
            mm.convert(model)
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        return mm.convert(model)

    plain = pair()
    prune.l1_unstructured(plain[0], "weight", amount=0.5)
    for model in (pruned(True), pruned(False)):
        for mine, theirs in zip(
            output_and_gradients(model, rows(3)), output_and_gradients(plain, rows(3)), strict=True
        ):
            torch.testing.assert_close(mine, theirs, **EXACT)
        prune.remove(model[0], "weight")
        assert "AffineSigmoidBackward" in nodes(model(rows(3)))


@pytest.mark.parametrize("function", [mm.convert, mm.revert, mm.left_alone])
def test_not_a_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(mm.InputError, match=r"expected an nn.Module to .*; got Tensor"):
        function(torch.zeros(3))


def test_not_a_filter() -> None:
    with pytest.raises(mm.InputError, match="expected a filter"):
        mm.convert(pair(), filter="head")  # type: ignore[arg-type]


def test_a_compiled_model_notices() -> None:
    """Compiled in place before: the next call compiles what the model is now."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    model = branches()
    model.compile(backend=backend, fullgraph=True)
    expected = output_and_gradients(model, rows(6))
    mm.convert(model)
    for ours, theirs in zip(output_and_gradients(model, rows(6)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert ["autograd_function_apply" in code for code in graphs] == [False, True]
