"""The buffers of steps 1 to 3 over the whole net, made once for batches of one size.

The engine and `network_loss` take the steps in them: it binds its calls to the model's parameters, and updates those;
`network_loss` reads whatever parameters it is given, and makes its gradients new.
"""

from operator import attrgetter

import torch
from torch import Tensor

from manual_mlp import kernels
from manual_mlp.formulas import Cost
from manual_mlp.layers import Layer

SHAPE = attrgetter("shape")


class Stage:
    """One layer's buffers for N rows: z, a, δ (N, n_{l+1}); δ, work and mask are shared with other layers.

    by_columns  they lie column by column; not with a dropout, which draws row by row
    """

    def __init__(self, layer: Layer, n: int, like: Tensor, delta: Tensor, scratch: Tensor, bits: Tensor) -> None:
        outputs = layer.weight.shape[0]
        self.row, self.dropout = layer.row, layer.dropout
        self.by_columns = self.dropout is None and kernels.by_columns(like, n, outputs)

        def laid(flat: Tensor) -> Tensor:
            flat = flat[: n * outputs]
            return flat.view(outputs, n).t() if self.by_columns else flat.view(n, outputs)

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
    """The buffers for batches of N rows.

    prediction, delta   a^L and δ^L where the cost reads and writes them
    copied              they are apart from the last layer's: in the parameters' dtype and, for a softmax of each row,
                        row by row
    """

    def __init__(self, layers: list[Layer], cost: Cost, input: Tensor, dtype: torch.dtype | None = None) -> None:
        n, outputs = len(input), layers[-1].weight.shape[0]
        like = torch.empty(0, dtype=dtype or input.dtype, device=input.device)
        largest = n * max(layer.weight.shape[0] for layer in layers)
        # Of δ^{l+1} and δ^l alone are both read at once, and two buffers stay in the cache where one a layer would not.
        *deltas, scratch = (like.new_empty(largest) for _ in range(3))
        bits = like.new_empty(largest, dtype=torch.bool)
        self.stages = [Stage(layer, n, like, deltas[i % 2], scratch, bits) for i, layer in enumerate(layers)]
        self.ones = like.new_ones(n)
        last = self.stages[-1]
        self.copied = like.dtype != input.dtype or (last.by_columns and cost.logits)
        real = torch.empty(n, outputs, dtype=input.dtype, device=input.device) if self.copied else last.a
        self.prediction, self.delta = last.a, last.delta
        if self.copied:
            self.prediction, self.delta = torch.empty_like(real), torch.empty_like(real)
        self.cost = real.new_empty(())
        self.out = self.cost.view(1)
        self.cost_ = kernels.cost_kernel(cost).both(self.delta)
