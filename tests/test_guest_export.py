"""torch.export and ONNX, for inference: plain operators, the same numbers."""

import io
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import manual_mlp as mm

N = torch.export.Dim("N")


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    every = ["sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu", "gelu", nn.GELU("tanh"), nn.Softplus(2.0)]
    return {
        "mlp": mm.MLP([4, 5, 3]),
        "layers": nn.Sequential(mm.Affine(4, 5), mm.Sigmoid(), mm.Affine(5, 3), mm.Sigmoid()),
        "converted": mm.convert(nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.Sigmoid())),
        "every": mm.MLP([4, *[5] * len(every), 3], every, "identity", dropout=0.3),
    }


@pytest.fixture(params=nets())
def model(request: pytest.FixtureRequest) -> nn.Module:
    return nets()[request.param].eval()


@pytest.mark.parametrize("strict", [False, True])
def test_export(model: nn.Module, strict: bool) -> None:
    """A program for any number of rows, of torch's own operators only."""
    program = torch.export.export(model, (torch.randn(2, 4),), dynamic_shapes=({0: N},), strict=strict)
    for count in (2, 7):
        x = torch.randn(count, 4)
        assert torch.equal(program.module()(x), model(x))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in targets)
    assert "aten.linear.default" in targets


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # in torch 2.11
def test_exported_program_is_saved_and_loaded(model: nn.Module) -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(2, 4),), dynamic_shapes=({0: N},)), file)
    file.seek(0)
    x = torch.randn(7, 4)
    assert torch.equal(torch.export.load(file).module()(x), model(x))


def onnx_model(model: nn.Module) -> Any:
    program = torch.onnx.export(model, (torch.randn(2, 4),), dynamo=True, dynamic_shapes=({0: N},), verbose=False)
    assert program is not None
    return program.model_proto


# in the exporter itself
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_onnx(model: nn.Module) -> None:
    proto = onnx_model(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (2, 7):
        x = torch.randn(count, 4)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        # float32, and onnxruntime's own kernels for the transcendental functions
        torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layers", "converted"))]
)
def test_onnx_nodes_are_plain(name: str) -> None:
    proto = onnx_model(nets()[name].eval())
    assert [node.op_type for node in proto.graph.node] == ["Gemm", "Sigmoid", "Gemm", "Sigmoid"]
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}


# The check of a bias's shape is traced as the constant that it is; the others come from torch itself.
CONSTANT = pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")


@CONSTANT
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
def test_older_exporter() -> None:
    file = io.BytesIO()
    torch.onnx.export(nets()["mlp"].eval(), (torch.randn(2, 4),), file, dynamo=False)
    proto = onnx.load_from_string(file.getvalue())
    assert [node.op_type for node in proto.graph.node] == ["Gemm", "Sigmoid", "Gemm", "Sigmoid"]


@CONSTANT
def test_jit_trace() -> None:
    model = nets()["every"].eval()
    x = torch.randn(7, 4)
    with torch.no_grad():
        traced = torch.jit.trace(model, (torch.randn(2, 4),))
        assert torch.equal(traced(x), model(x))


def test_costs_are_exported() -> None:
    class Evaluated(nn.Module):
        def __init__(self, loss: nn.Module) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            return self.loss(z, target)

    z, target = torch.randn(5, 4), torch.randn(5, 4).softmax(-1)
    for loss in (mm.QuadraticLoss(), mm.MSELoss(), mm.BCEWithLogitsLoss(), mm.CrossEntropyLoss()):
        program = torch.export.export(Evaluated(loss), (z[:2], target[:2]), dynamic_shapes=({0: N}, {0: N}))
        torch.testing.assert_close(program.module()(z, target), loss(z, target))
