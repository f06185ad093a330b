"""A loss that is no number any more, or too large to come back: in which layer it began, and what to try."""

import torch
from torch import Tensor, nn

from manual_mlp.errors import InputError
from manual_mlp.program import Program, read
from manual_mlp.tracing import up

EXPLODED = 1e9  # targets are standardised or 0 and 1, so a loss starts near 1
EVERY = 50  # steps between two looks on a device that would have to wait for the number


def diverged(loss: float, net: nn.Module, features: Tensor, place: str, lr: object, since: int = 1) -> InputError:
    """What to tell about a step whose loss is NaN or above EXPLODED.

    net: as it was before the step. features (N, n_1), of the batch. place: of the step, in words. lr: as the optimizer
    was given it, None for its own. since: the steps since the loss was last looked at.
    """
    now = "" if lr is None else f" (now {lr})"
    return InputError(
        f"expected a finite loss, of {EXPLODED:.0e} at most, but in {place} it is {loss:.3g}, and it began in "
        f"{where_it_began(read(net), features, since)}; lower optimizer.lr{now}, set data.standardise=true, or "
        "clip the gradients with trainer.gradient_clip_val=1"
    )


@torch.no_grad()
def where_it_began(program: Program, features: Tensor, since: int = 1) -> str:
    """The first of what a pass computes that is not finite, in the sheet's letters; if all is, what grows the most.

    A W^l that is not finite was made so by the step before, from the right to the left, as δ goes: the rightmost is
    the first; several steps, though, carry it everywhere. Otherwise the forward pass is followed, from left to right.
    """
    layers = program.layers
    sizes = [layers[0].weight.shape[1], *(len(layer.weight) for layer in layers)]
    damaged = [index for index, layer in enumerate(layers, start=1) if not _finite(layer.weight, layer.bias)]
    if damaged and since > 1:
        return f"one of the last {since} steps; backprop=layers trainer.accelerator=cpu tells the layer"
    if damaged:
        last = damaged[-1]
        neurons = f"{sizes[last - 1]} to {sizes[last]} neurons"
        return f"W{up(last)} ({neurons}), by the step before: δ{up(last + 1)} overflowed"
    slots, before, growths = program.forward(features, program.by_node(program.parameters()), every=True), features, []
    for index, layer in enumerate(layers, start=2):
        z, a, largest = slots[layer.z], slots[layer.a], before.abs().max().item()
        neurons = f"(n = {sizes[index - 1]}, {layer.row.name})"
        if not _finite(z, a):
            return f"{'a' if _finite(z) else 'z'}{up(index)} {neurons}"
        reached = z.abs().max().item()
        where = f"z{up(index)} {neurons}: it reaches {reached:.1e} from an a{up(index - 1)} of {largest:.1e}"
        growths.append((reached / max(largest, 1.0), where))
        before = slots[layer.out]
    return max(growths)[1]


def _finite(*tensors: Tensor | None) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)
