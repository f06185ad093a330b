"""K nets of one training as one module: what each of them says, what they say together, and the best of each."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from manual_mlp.formulas import committee
from manual_mlp.modules import MLP, fill


class Members(nn.ModuleList):
    """features (N, n_1) ↦ the committee's prediction (N, n_L): the mean of P(class | x), or of the numbers.

    Beside the nets it holds the parameters of each at its best epoch by validation cost. In training the nets go on.

    kept        (K, number of parameters), each row as torch.nn.utils.parameters_to_vector lays them out
    kept_cost   (K,), infinite before the first validation
    kept_epoch  (K,), counted from 0
    """

    kept: Tensor
    kept_cost: Tensor
    kept_epoch: Tensor

    def __init__(self, nets: Sequence[MLP], loss: str, classes: bool) -> None:
        super().__init__(nets)
        self.loss, self.classes = loss, classes
        self.register_buffer("kept", torch.stack([parameters_to_vector(net.parameters()).detach() for net in nets]))
        self.register_buffer("kept_cost", self.kept.new_full((len(nets),), math.inf))
        self.register_buffer("kept_epoch", self.kept.new_zeros(len(nets)))

    def forward(self, features: Tensor) -> Tensor:
        return self.together(self.each(features))

    def each(self, features: Tensor) -> Tensor:
        """Return a^L of each net, (K, N, n_L)."""
        return torch.stack([net(features) for net in self])

    def together(self, predictions: Tensor) -> Tensor:
        """Return the committee's prediction for those of its members, (K, N, n_L) → (N, n_L)."""
        return committee(predictions, self.loss) if self.classes else predictions.mean(0)

    @torch.no_grad()
    def keep(self, costs: Tensor, epoch: int) -> None:
        """Keep the nets whose validation costs (K,) are their lowest ones."""
        for k in (costs < self.kept_cost).nonzero()[:, 0].tolist():
            self.kept[k] = parameters_to_vector(self[k].parameters())
            self.kept_cost[k], self.kept_epoch[k] = costs[k], epoch

    @torch.no_grad()
    def take_kept(self) -> None:
        """Give each net the parameters of its best epoch, if there was one."""
        for net, kept, cost in zip(self, self.kept, self.kept_cost, strict=True):
            if cost.isfinite():
                fill(net, kept)

    def best_epochs(self) -> str:
        """Return the epochs of the kept parameters, in words."""
        first, last = (int(end) for end in self.kept_epoch.aminmax())
        return str(first) if first == last else f"{first} to {last}"
