"""Greedy pretraining of a deep sigmoid net, layer by layer, as Hinton, Osindero and Teh did in 2006."""

from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import checks
from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.kernels import autocasting
from manual_mlp.network import parameters_of, reading_of

_START, _DECAY = 0.01, 2e-4  # the standard deviation of W at the start, and λ of −λW
_MOMENTUM, _EARLY_MOMENTUM, _EARLY = 0.9, 0.5, 5  # and in how many first epochs it is the smaller one


@torch.no_grad()
def pretrain(
    net: nn.Module,
    x: Tensor,
    epochs: int = 30,
    lr: float = 0.05,
    batch_size: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Give each hidden layer of a sigmoid net weights that model its input, by contrastive divergence, CD-1.

    net  an mm.MLP or nn.Sequential whose hidden layers are sigmoid. Their W and b are drawn and learnt anew, from the
         first to the last: each learns to reconstruct what the layers below make of x. The output layer stays as it is
    x    (N, n_1), numbers from 0 to 1; no targets

    → the mean of (v − v₁)² of each hidden layer in each epoch, (layers, epochs): the error of the reconstructions.
    Momentum is 0.5 in the first five epochs and 0.9 then, weight decay 2e-4; W starts from N(0, 0.01²), biases from 0.
    The bias of the input, c, is no part of the net and is dropped. Train the net on targets afterwards.

    Raises InputError for a net that is no such chain, for an x outside of [0, 1] or of another shape or dtype, and for
    a learning rate at which a layer's numbers become infinite: then its weights are lost.

    >>> import torch, manual_mlp as mm
    >>> net = mm.MLP([4, 3, 2])
    >>> x = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).repeat(50, 1)
    >>> errors = mm.pretrain(net, x, lr=0.5)
    >>> errors.shape, bool(errors[0, -1] < 0.1 * errors[0, 0])  # it has learnt both patterns
    (torch.Size([1, 30]), True)
    """
    layers = _hidden_layers(net)
    checks.positive("learning rate lr", lr)
    batch_size, epochs = checks.count("a batch_size", batch_size), checks.count("epochs", epochs)
    weight = layers[0].weight
    checks.full_batch(weight, weight.shape[1], x, x, "quadratic")  # it is what is reconstructed, too
    if autocasting(x):
        raise InputError("pretrain ignores autocast: leave its context")
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != x.device.type):
        came = generator.device if isinstance(generator, torch.Generator) else type(generator).__name__
        raise InputError(f"expected a torch.Generator on {x.device}, where x is, or None; got {came}: make one there")
    if x.is_meta:
        raise InputError("expected numbers in x; got a tensor on meta, which holds none: make net and x on a device")
    if x.isnan().any():
        raise InputError("expected a number in each place of x; got NaN: fill the gaps first, as with torch.nan_to_num")
    if not ((x >= 0) & (x <= 1)).all():
        raise InputError(
            f"expected an x in [0, 1], because it stands for probabilities; got {x.min():g} to {x.max():g}: scale it, "
            "as in (x - x.min()) / (x.max() - x.min())"
        )
    errors = []
    for layer in layers:
        errors.append(_pretrain_layer(layer, x, epochs, lr, batch_size, generator))
        if not errors[-1].isfinite().all():
            raise InputError(
                f"expected a learning rate lr at which W stays finite; got {lr}, which diverged: take less"
            )
        x = sheet.sigmoid(sheet.affine(x, layer.weight, layer.bias))  # probabilities, not samples, go up
    return torch.stack(errors)


def _hidden_layers(net: nn.Module) -> list[Any]:
    """Return the owners of the hidden layers' W and b. Raises InputError for a net that is no sigmoid chain."""
    program = reading_of(net).program
    hidden, layers, flat = program.affine[:-1], program.layers.values(), parameters_of(net, program)
    if not hidden:
        raise InputError("expected a net with a hidden layer; got none: the output layer learns from targets alone")
    kinds = [layer.row.name if layer.rule == "affine" else layer.rule for layer in layers]
    if "sum" in kinds:
        raise InputError("expected a chain of layers; got a net with sums, whose layers model no single input")
    for i, kind in enumerate(kinds[:-1], start=1):
        if kind != "sigmoid":
            raise InputError(
                f"expected sigmoid hidden layers, because σ(z) is the probability of a unit; hidden layer {i} has "
                f"{kind}: take activation='sigmoid'"
            )
    if any(layer.drops for layer in layers):
        raise InputError("expected a net that draws no dropout, as pretraining has none; call .eval() before it")
    checks.own_parameters(net, flat)
    checks.trainable(flat)
    owned = [p for layer in hidden for p in layer.parameters()]
    if len({(p.dtype, p.device) for p in owned}) > 1:
        raise InputError("expected hidden layers of one dtype on one device: call .to() with both on the net")
    if not all(p.requires_grad for p in owned):
        raise InputError("expected hidden layers that may change; got a frozen one: call requires_grad_() on the net")
    return hidden


def _pretrain_layer(
    layer: Any, x: Tensor, epochs: int, lr: float, batch_size: int, generator: torch.Generator | None
) -> Tensor:
    """Learn W and b in place. Return the error of the reconstructions in each epoch, (epochs,)."""
    weight, bias = layer.weight, layer.bias
    weight.normal_(0, _START, generator=generator)
    c = x.new_zeros(x.shape[1])
    learnt = [weight, c] if bias is None else [weight, c, bias.zero_()]
    velocities = [torch.zeros_like(own) for own in learnt]
    errors = x.new_zeros(epochs)
    for epoch in range(epochs):
        momentum = _EARLY_MOMENTUM if epoch < _EARLY else _MOMENTUM
        for rows in torch.randperm(len(x), generator=generator, device=x.device).split(batch_size):
            v = x[rows]
            drawn = torch.rand(len(v), len(weight), generator=generator, dtype=x.dtype, device=x.device)
            of_weight, of_bias, of_c, v_1 = sheet.contrastive_divergence(v, weight, bias, c, drawn)
            steps = of_weight - _DECAY * weight, of_c, of_bias
            for own, velocity, step in zip(learnt, velocities, steps, strict=False):
                own.add_(velocity.mul_(momentum).add_(step, alpha=lr))
            errors[epoch] += (v - v_1).pow(2).sum() / x.numel()
    return errors
