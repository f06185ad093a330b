"""Steps 1 to 3 over the whole net in place: buffers made once for batches of one size, and lists of calls on them.

Whoever plans adds step 4, and where its gradients go: the engine into the parameters, `network_loss` into new tensors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from manual_mlp import formulas as sheet
from manual_mlp.formulas import Cost
from manual_mlp.layers import Layer

Call = Callable[..., Any]
_SHAPE = attrgetter("shape")


def places(parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Any]:
    """Where parameters lie, and how: what calls that are bound to them have taken for given.

    `.data` can make a parameter a part of itself, at the same address.
    """
    return [*map(Tensor.data_ptr, parameters), *map(_SHAPE, weights), *map(Tensor.stride, parameters)]


class Stage:
    """One layer's buffers for N rows: z, a, δ (N, n_{l+1}); δ, work and mask are shared with other layers.

    turned  they lie column by column; not with a dropout, which draws row by row
    """

    def __init__(self, layer: Layer, n: int, like: Tensor, delta: Tensor, scratch: Tensor, bits: Tensor) -> None:
        outputs = layer.weight.shape[0]
        self.row, self.parameters, self.dropout = layer.row, layer.parameters, layer.dropout
        self.turned = self.dropout is None and sheet.turned(like, n, outputs)

        def laid(flat: Tensor) -> Tensor:
            flat = flat[: n * outputs]
            return flat.view(outputs, n).t() if self.turned else flat.view(n, outputs)

        self.a, self.delta = laid(like.new_empty(n * outputs)), laid(delta)
        self.saved_z = laid(like.new_empty(n * outputs)) if layer.row.saves == "z" else None
        self.z = self.a if self.saved_z is None else self.saved_z
        self.delta_t = self.delta.t()
        self.work, self.mask = laid(scratch), laid(bits)
        if self.dropout is not None:
            self.drawn, self.scale, self.dropped = (torch.empty_like(of) for of in (self.mask, self.a, self.a))

    def draw(self) -> None:
        """scale := m / (1 − p), with the mask that functional.dropout draws."""
        assert self.dropout is not None
        keep = 1 - self.dropout.p
        self.scale.copy_(self.drawn.bernoulli_(keep)).div_(keep or 1.0)


class Plan:
    """The buffers for batches of N rows, and the calls on them.

    first, last         take the input
    forward, backward   what is between; the cost is called between the two
    copied              the cost has a prediction and a δ^L of its own: they are in the parameters' dtype and, where it
                        takes a softmax of each row, row by row
    """

    def __init__(self, layers: list[Layer], cost: Cost, input: Tensor, dtype: torch.dtype | None = None) -> None:
        n, outputs = len(input), layers[-1].weight.shape[0]
        self.cost_ = cost.both_
        like = torch.empty(0, dtype=dtype or input.dtype, device=input.device)
        largest = n * max(layer.weight.shape[0] for layer in layers)
        # Of δ^{l+1} and δ^l alone are both read at once, and two buffers stay in the cache where one a layer would not.
        *deltas, scratch = (like.new_empty(largest) for _ in range(3))
        bits = like.new_empty(largest, dtype=torch.bool)
        self.stages = [Stage(layer, n, like, deltas[i % 2], scratch, bits) for i, layer in enumerate(layers)]
        self.ones = like.new_ones(n)
        last = self.stages[-1]
        self.copied = like.dtype != input.dtype or (last.turned and cost.logits)
        real = torch.empty(n, outputs, dtype=input.dtype, device=input.device) if self.copied else last.a
        self.prediction, self.delta = last.a, last.delta
        if self.copied:
            self.prediction, self.delta = torch.empty_like(real), torch.empty_like(real)
        self.work, self.column = torch.empty_like(real), real.new_empty(n, 1)
        self.cost = real.new_empty(())
        self.out = self.cost.view(1)
        laid = self.delta if self.delta.is_contiguous() else last.delta_t
        self.flat = laid.view(1, -1), laid.view(-1)

    def clear(self) -> None:
        """No calls yet."""
        self.first: list[Call] = []
        self.forward: list[Call] = []
        self.backward: list[Call] = []
        self.last: list[Call] = []

    def step_1(
        self, stage: Stage, a: Tensor | None, weight: Tensor, bias: Tensor | None, drop: float | bool = False
    ) -> Tensor:
        """z^{l+1} = a^l W^lᵀ + b^l, a^{l+1} = G(z^{l+1}) → a^{l+1}. None as a^l is the input."""
        column = bias.unsqueeze(1) if bias is not None and stage.turned else bias
        product: Call = torch.mm if column is None else partial(torch.addmm, column)
        affine: Call
        if stage.turned:
            affine = partial(product, weight, out=stage.z.t())
            self.first.append(lambda a: affine(a.t())) if a is None else self.forward.append(partial(affine, a.t()))
        else:
            affine = partial(product, mat2=weight.t(), out=stage.z)
            self.first.append(affine) if a is None else self.forward.append(partial(affine, a))
        if stage.row.name != "identity":
            G_, _ = sheet.in_place(stage.row)
            out = {} if stage.saved_z is None else {"out": stage.a}
            self.forward.append(partial(G_, stage.z, *stage.parameters, **out))
        if drop:
            self.forward += [stage.draw, partial(torch.mul, stage.a, stage.scale, out=stage.dropped)]
        return stage.dropped if drop else stage.a

    def to_cost(self, a: Tensor) -> None:
        """a^L to where the cost reads it, and δ^L from where it leaves it."""
        if self.copied:
            self.forward.append(partial(self.prediction.copy_, a))
            self.backward.append(partial(self.stages[-1].delta.copy_, self.delta))
        else:
            self.prediction = a

    def steps_2_and_3(self, layer: int, weight: Tensor | None, drop: float | bool = False) -> None:
        """δ^{l+1} = g ⊙ G′(z^{l+1}), and what arrives at the layer before, δ^{l+1} W^l, unless W^l is None."""
        stage = self.stages[layer]
        if drop:
            self.backward.append(partial(stage.delta.mul_, stage.scale))
        if stage.row.name != "identity":
            _, delta_ = sheet.in_place(stage.row)
            work = stage.a if stage.saved_z is None else stage.work
            self.backward.append(
                partial(delta_, stage.delta, stage.a, stage.saved_z, work, stage.mask, *stage.parameters)
            )
        if weight is not None:
            self.backward.append(partial(torch.mm, stage.delta, weight, out=self.stages[layer - 1].delta))
