"""What is kept for the backward: no more bytes than torch's own layers, by save_for_backward only, and no longer."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import manual_mlp as mm
from tests.cases import CASES, TORCHS, Case
from tests.grid_cases import PLAIN


def kept(function: Callable[..., Tensor], *inputs: Tensor) -> dict[int, int]:
    """Storage → bytes, of all that the graph of one call saves; each storage once."""
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # or its address might be given to the next
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return storages


def bytes_kept(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    return sum(kept(function, *inputs).values())


def rows() -> Tensor:
    return torch.randn(50, 40, requires_grad=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", TORCHS, ids=str)
def test_bytes_alone_fused_and_in_a_net(activation: nn.Module) -> None:
    def layers(*sizes: int) -> nn.Sequential:
        pairs = [(nn.Linear(n_in, n_out), activation) for n_in, n_out in pairwise(sizes)]
        return nn.Sequential(*[layer for pair in pairs for layer in pair])

    # a leaf can't be written in place
    alone = nn.Sequential(nn.Flatten(0), activation)
    for make in (lambda: alone, lambda: layers(40, 30), lambda: layers(40, 30, 20, 10)):
        theirs = bytes_kept(make(), rows() + 0)
        for fuse in (False, True):
            model = make()
            ours = bytes_kept(mm.convert(model, fuse=fuse), rows() + 0)
            mm.revert(model)
            assert ours <= theirs


@pytest.mark.parametrize("name", ["softplus", "leaky_relu"])
def test_a_chain_keeps_one_tensor_less_a_layer(name: str) -> None:
    """a is kept for the next layer anyway: where torch keeps z beside it, these do not."""
    plain = {"softplus": nn.Softplus(), "leaky_relu": nn.LeakyReLU()}[name]
    twin = nn.Sequential(nn.Linear(40, 30), plain, nn.Linear(30, 20), plain, nn.Linear(20, 10))
    model = mm.MLP([40, 30, 20, 10], name, "identity")
    assert bytes_kept(twin, rows()) - bytes_kept(model, rows()) == 4 * 50 * (30 + 20)
    assert len(kept(twin, rows())) - len(kept(model, rows())) == 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_bytes_of_costs(reduction: str) -> None:
    weight, classes, target = torch.rand(40), torch.randint(0, 40, (50,)), torch.rand(50, 40)
    calls: list[tuple[str, dict[str, Any], Tensor]] = [
        ("MSELoss", {}, target),
        ("BCEWithLogitsLoss", {}, target),
        ("BCEWithLogitsLoss", {"weight": weight, "pos_weight": weight}, target),
        *[
            ("CrossEntropyLoss", {"weight": w, "label_smoothing": smoothing}, labels)
            for w in (None, weight)
            for smoothing in (0.0, 0.1)
            for labels in (classes, target)
        ],
    ]
    for name, arguments, labels in calls:
        ours, theirs = (getattr(module, name)(reduction=reduction, **arguments) for module in (mm, nn))
        assert bytes_kept(ours, rows() + 0, labels) <= bytes_kept(theirs, rows() + 0, labels)


def test_bytes_of_dropout() -> None:
    assert bytes_kept(mm.Dropout(0.5), rows()) <= bytes_kept(nn.Dropout(0.5), rows())


# ---------------------------------------------------------------------------------------------------------------------
# Only what somebody needs, and only as long
# ---------------------------------------------------------------------------------------------------------------------


def addresses(*tensors: Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("make", [lambda: mm.Affine(40, 30), lambda: mm.AffineActivation(40, 30, "gelu")])
def test_frozen_layers_keep_only_what_is_needed(make: Callable[[], Any]) -> None:
    layer, x = make(), rows()
    fixed = x.detach()
    layer.weight.requires_grad_(False)
    assert addresses(fixed).isdisjoint(kept(layer, fixed))  # of x only the bias's gradient would ask
    assert addresses(x).isdisjoint(kept(layer, x))
    assert addresses(layer.weight) <= kept(layer, x).keys()
    layer.weight.requires_grad_(True)
    assert addresses(layer.weight).isdisjoint(kept(layer, fixed))
    assert addresses(fixed) <= kept(layer, fixed).keys()
    layer.requires_grad_(False)
    assert kept(layer, fixed) == {}


@contextmanager
def no_collector() -> Iterator[None]:
    """What dies inside dies by its reference count, not because the collector came by."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_frozen_weight_keeps_no_input_alive() -> None:
    layer = mm.AffineActivation(40, 30)
    layer.weight.requires_grad_(False)
    with no_collector():
        x = torch.randn(50, 40)
        before = weakref.ref(x)
        output = layer(x)
        del x
        assert before() is None
        assert output.requires_grad


def test_nothing_leaks_under_a_transform() -> None:
    """torch.func makes classes, which are cycles: gone when the collector came by, which is slow, so once for all."""
    references = {}
    for case in CASES:
        inputs = tuple(tensor.detach() for tensor in case.inputs(torch.float64))
        references |= {(case.name, index): weakref.ref(tensor) for index, tensor in enumerate(inputs)}
        torch.func.grad(lambda *tensors, case=case: case.ours(*tensors).sum())(*inputs)
        torch.func.jvp(case.ours, inputs, inputs)
        del inputs
    gc.collect()
    assert [key for key, reference in references.items() if reference() is not None] == []


def test_backward_frees_what_was_saved(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    output = case.ours(*inputs)
    if not kept(case.ours, *inputs):  # an average pool, which reads nothing
        return
    torch.autograd.grad(output.sum(), inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output.sum(), inputs)


# ---------------------------------------------------------------------------------------------------------------------
# In place, and torch's tools for saved tensors
# ---------------------------------------------------------------------------------------------------------------------


def test_an_output_can_be_changed_where_torchs_can() -> None:
    """An affine map's z is not saved: x += … after it is common. Of any dimensions, and by an in-place activation."""
    for shape in ((40,), (5, 40), (2, 3, 40)):
        for change in (lambda z: z.mul_(2), nn.ReLU(inplace=True), mm.ReLU(inplace=True), mm.SiLU(inplace=True)):
            layer, x = mm.Affine(40, 30), torch.randn(shape)
            twin = nn.Linear(40, 30)
            twin.load_state_dict(layer.state_dict())
            ours, theirs = (
                torch.autograd.grad(change(each(x)).square().sum(), [*each.parameters()]) for each in (layer, twin)
            )
            torch.testing.assert_close(ours, theirs)


def test_activations_in_place_on_a_view() -> None:
    """As torch's: the base sees it, and the gradient goes through it."""
    for activation in TORCHS:
        if not getattr(activation, "inplace", False):
            continue
        ours, theirs = mm.convert(type(activation)(inplace=True)), type(activation)(inplace=True)
        results = []
        for each in (ours, theirs):
            x = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()
            base = x * 1
            each(base[:, 1:4])
            results.append([base, *torch.autograd.grad(base.square().sum(), x)])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_checkpoint_of_a_net_keeps_only_its_input() -> None:
    model = mm.MLP([40, 30, 20, 10], "gelu")
    x = rows()
    storages = kept(lambda x: checkpoint(model, x, use_reentrant=False), x)
    assert storages.keys() - {0} <= addresses(x, *model.parameters())  # torch 2.11 keeps places without memory, too


def test_retained_graph_and_second_derivative(case: Case) -> None:
    """The same gradients from a graph that is used twice, and used to differentiate again."""
    inputs = case.inputs(torch.float64)
    output = case.ours(*inputs)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    for mine, theirs in zip(first, again, strict=True):
        if case.name in PLAIN:  # a norm: μ and r are taken again from x, because what was saved has no history
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(mine, theirs)
