"""The rest of what torch's own layers can do: shapes, copies, ties, parametrizations, threads, devices, processes."""

import contextlib
import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

import manual_mlp as mm
from manual_mlp import functional as F
from manual_mlp.formulas import ACTIVATIONS
from manual_mlp.network import network_loss
from tests.cases import Case

# The same formulas, summed in another order: a few eps of float64 on numbers of order 1.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
NAMES = [name for name in ACTIVATIONS if name != "identity"]


def nets() -> tuple[nn.Module, nn.Module]:
    """Ours, with each activation, and torch's with the same weights."""
    torch.manual_seed(0)
    model = mm.MLP([4, *[5] * len(NAMES), 3], NAMES, "identity", dtype=torch.float64)
    layers = [layer for name in NAMES for layer in (nn.Linear(5, 5), ACTIVATIONS[name].twin())]
    layers[0] = nn.Linear(4, 5)
    twin = nn.Sequential(*layers, nn.Linear(5, 3)).double()
    twin.load_state_dict(model.state_dict())
    return model, twin


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6,)), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def output_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = model(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and strides
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (6,), (2, 3), (2, 0, 3), (1, 2, 1, 3, 2)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    model, twin = nets()
    x = torch.randn(*shape, 4, dtype=torch.float64)
    same(output_and_gradients(model, x), output_and_gradients(twin, x))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "narrowed": lambda x: torch.cat([x, x, x], -1)[:, 4:8],
    "stepped": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(6, 4),
    "flipped": lambda x: x.flip(0, 1),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_inputs_of_any_strides(strides: str) -> None:
    model, twin = nets()
    x = STRIDES[strides](rows())
    same(output_and_gradients(model, x), output_and_gradients(twin, x))


def test_empty_batch_of_costs() -> None:
    """NaN, and gradients of no rows, as torch's."""
    for ours, theirs in ((mm.MSELoss(), nn.MSELoss()), (mm.CrossEntropyLoss(), nn.CrossEntropyLoss())):
        z = torch.randn(0, 3, requires_grad=True)
        cost = ours(z, torch.rand(0, 3))
        assert cost.isnan()
        assert theirs(z, torch.rand(0, 3)).isnan()
        assert torch.autograd.grad(cost, z)[0].shape == (0, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_a_class_of_no_weight(reduction: str, smoothing: float) -> None:
    """Its samples count nothing in the mean; smoothed, the other classes' shares of them still cost."""
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    target = torch.tensor([0, 1, 2, -100, 0, 3])
    results = []
    for loss in (mm.CrossEntropyLoss, nn.CrossEntropyLoss):
        z = rows().requires_grad_()
        cost = loss(weight, reduction=reduction, label_smoothing=smoothing)(z, target)
        results.append([cost, *torch.autograd.grad(cost.sum(), z)])
    same(*results)


def test_cross_entropy_with_all_samples_ignored() -> None:
    z = rows().requires_grad_()
    cost = mm.functional.cross_entropy(z, torch.full((6,), -100))
    assert cost.isnan()
    assert torch.equal(torch.autograd.grad(cost, z)[0], torch.zeros(6, 4, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Copies, ties, parametrizations
# ---------------------------------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, twin = nets()
    other = copied(model)
    same(output_and_gradients(other, rows()), output_and_gradients(twin, rows()))
    with torch.no_grad():
        next(other.parameters()).zero_()
    same(output_and_gradients(model, rows()), output_and_gradients(twin, rows()))


def test_copies_of_losses_and_layers() -> None:
    for module in (mm.QuadraticLoss(), mm.CrossEntropyLoss(torch.ones(4)), mm.Dropout(0.3), mm.GELU("tanh")):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is type(module)
            assert repr(other) == repr(module)


def test_tied_weights() -> None:
    """The gradients of both places add up."""
    torch.manual_seed(0)
    model = nn.Sequential(mm.AffineActivation(4, 4), mm.AffineActivation(4, 4, "gelu")).double()
    twin = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.GELU()).double()
    model[1].weight = model[0].weight
    twin[2].weight = twin[0].weight
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.copy_(theirs)
    same(output_and_gradients(model, rows()), output_and_gradients(twin, rows()))


LAYERS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "affine": lambda: (mm.Affine(4, 5), nn.Linear(4, 5)),
    "fused": lambda: (mm.AffineActivation(4, 5, "gelu"), nn.Sequential(nn.Linear(4, 5), nn.GELU())),
}
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
    "prune_structured": lambda layer: prune.ln_structured(layer, "weight", amount=0.4, n=2, dim=0),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_parametrizations_and_pruning(layer: str, change: str) -> None:
    results = []
    model, twin = LAYERS[layer]()
    linear = twin if isinstance(twin, nn.Linear) else twin[0]
    linear.load_state_dict(model.state_dict())
    for whole, changed in ((model, model), (twin, linear)):
        whole.double()
        torch.manual_seed(0)  # spectral_norm draws its start vectors
        CHANGES[change](changed)
        results.append(output_and_gradients(whole, rows()))
    same(*results)


def test_the_hooks_of_modules_see_tensors() -> None:
    model = mm.MLP([4, 5, 3])
    seen: list[tuple[int, ...]] = []
    model[0].register_full_backward_hook(lambda module, gradients, g: seen.append((*g[0].shape,)))
    model[0].register_forward_hook(lambda module, inputs, output: seen.append((*output.shape,)))
    model(torch.randn(6, 4, requires_grad=True)).sum().backward()
    assert seen == [(6, 5), (6, 5)]


def test_slices_of_a_net() -> None:
    """As of an nn.Sequential, which can't make another MLP."""
    model, twin = nets()
    head, body = model[-1:], model[:-1]
    assert [type(part) for part in (head, body)] == [nn.Sequential] * 2
    assert list(body.state_dict()) == list(model.state_dict())[:-2]
    assert model[-1] is head[0]
    torch.testing.assert_close(head(body(rows())), twin(rows()), **EXACT)


def test_hooks_of_tensors_and_retain_grad() -> None:
    model, twin = nets()
    found = []
    for each in (model, twin):
        hidden = each[:2](rows()) if each is twin else each[0](rows())
        hidden.retain_grad()
        hidden.register_hook(lambda g: 2 * g)
        rest = each[2:] if each is twin else each[1:]
        rest(hidden).square().sum().backward()
        found.append([hidden.grad, next(each.parameters()).grad])
    same(*found)


# ---------------------------------------------------------------------------------------------------------------------
# Modes, threads, devices
# ---------------------------------------------------------------------------------------------------------------------


def test_backward_from_other_threads() -> None:
    model, twin = nets()
    cost = model(rows()).square().sum()
    thread = threading.Thread(target=cost.backward)
    thread.start()
    thread.join()
    twin(rows()).square().sum().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_forward_and_backward_in_many_threads() -> None:
    """One model, each thread with its own rows: as one after the other."""
    model, _ = nets()
    results: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        for _ in range(5):
            results[number] = output_and_gradients(model, rows() + number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert all(map(torch.equal, results[number], output_and_gradients(model, rows() + number)))


def test_anomaly_mode(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        case.ours(*inputs).sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


def test_meta_and_fake_tensors(case: Case) -> None:
    """Shapes and dtypes of outputs and gradients without any data."""
    inputs = case.inputs(torch.float32)
    output = case.ours(*inputs)

    def check(inputs: tuple[Tensor, ...]) -> None:
        result = case.ours(*inputs)
        assert (result.shape, result.dtype) == (output.shape, output.dtype)
        for tensor, gradient in zip(inputs, torch.autograd.grad(result.sum(), inputs), strict=True):
            assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)

    if not HOLDS_TENSORS.intersection(case.name.split("-")[0].split("_")):
        check(tuple(tensor.detach().to("meta").requires_grad_() for tensor in inputs))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        check(tuple(mode.from_tensor(tensor.detach()).requires_grad_() for tensor in inputs))


# cases that close over a mask, classes or weights on the CPU
HOLDS_TENSORS = {"dropout", "class", "weight", "weights"}


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "leaky_relu"])
def test_no_kept_tensor_beside_a_fake_one(activation: str) -> None:
    """In a mode that takes fake tensors alone, layers, network and costs; then again with real ones."""

    def train() -> Tensor:
        model, (x, y) = mm.MLP([4, 5, 3], activation), (torch.randn(6, 4), torch.rand(6, 3))
        for cost in (F.quadratic_loss(model(x), y), F.mse_loss(model(x), y), network_loss(model, x, y)):
            cost.backward()
        return model[0].weight.grad

    for mode in (FakeTensorMode(), contextlib.nullcontext(), FakeTensorMode(), contextlib.nullcontext()):
        with mode:
            gradient = train()
        assert gradient.shape == (5, 4)
    assert gradient.isfinite().all()


def test_a_net_on_meta() -> None:
    model = mm.MLP([4, 5, 3], "gelu", device="meta", dropout=0.5)
    model(torch.empty(6, 4, device="meta")).sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    empty = model.to_empty(device="cpu")
    assert empty(torch.randn(6, 4)).shape == (6, 3)


def test_inference_mode() -> None:
    model, twin = nets()
    with torch.inference_mode():
        output = model(rows())
        assert output.is_inference()
        torch.testing.assert_close(output, twin(rows()), **EXACT)
    same(output_and_gradients(model, rows()), output_and_gradients(twin, rows()))


def test_multi_grad_accumulation() -> None:
    """.grad is added to, and the incoming gradient may be the very same tensor for two outputs."""
    model, twin = nets()
    for each in (model, twin):
        for _ in range(3):
            each(rows()).sum().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def train(model: nn.Module, rank: int, ranks: int) -> list[Tensor]:
    """Two steps on the rank's share of the rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.tensor_split(rows(), ranks)[rank], torch.tensor_split(rows()[:, :3].sigmoid(), ranks)[rank]
    for _ in range(2):
        optimizer.zero_grad()
        mm.functional.quadratic_loss(model(x), target).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = DistributedDataParallel(nets()[0])
    torch.save(train(model, rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # tests/test_processes.py asks the same of a training in two processes
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two gloo processes, half of the rows each: the weights of one process with all of them."""
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    expected = train(nets()[0], 0, 1)
    for rank in range(2):
        same(torch.load(tmp_path / f"{rank}.pt"), expected)
