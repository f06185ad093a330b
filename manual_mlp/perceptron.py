"""The threshold neuron of McCulloch and Pitts, and the rule by which Rosenblatt's perceptron learns."""

import torch
from torch import Tensor, nn

from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.modules import Affine


class Perceptron(nn.Module):
    """y = 1 where W x + b ≥ 0, else 0: n_out neurons without hidden layer, learning w += LR (ŷ − y) x.

    input (…, in_features) → (…, out_features), of zeros and ones. Starts from W = 0, b = 0, Rosenblatt's own choice.
    On linearly separable classes `fit` converges (Perceptron Convergence Theorem, 1962); on XOR it can't (Minsky and
    Papert, 1969).

    >>> import torch, manual_mlp as mm
    >>> mm.Perceptron(2)(torch.tensor([[1.0, -1.0]])).item()  # W x + b = 0, which is ≥ 0
    1.0
    """

    def __init__(self, in_features: int, out_features: int = 1) -> None:
        super().__init__()
        self.affine = Affine(in_features, out_features).requires_grad_(False)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return y = 1 where W x + b ≥ 0, else 0: input x (…, in_features) → (…, out_features)."""
        return sheet.threshold(self.affine(input))

    @torch.no_grad()
    def fit(self, input: Tensor, target: Tensor, rate: float = 1.0, max_epochs: int = 100) -> list[int]:
        """Learn by Rosenblatt's rule, sample by sample, until an epoch makes no mistake.

        input (N, in_features), target (N, out_features) of zeros and ones → the number of mistakes in each epoch;
        the last is 0 if it converged. Raises InputError for another target, or shapes that do not fit.

        >>> import torch, manual_mlp as mm
        >>> corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
        >>> mm.Perceptron(2).fit(corners, torch.tensor([[0.0], [0], [0], [1]]))  # AND: a line separates it
        [2, 3, 3, 2, 1, 0]
        >>> min(mm.Perceptron(2).fit(corners, torch.tensor([[0.0], [1], [1], [0]])))  # XOR: none does
        3
        """
        if target.shape != (len(input), self.affine.out_features) or not ((target == 0) | (target == 1)).all():
            raise InputError(
                f"expected a target of zeros and ones of shape ({len(input)}, {self.affine.out_features}); "
                f"got shape {tuple(target.shape)}: threshold neurons answer 0 or 1, one column for each"
            )
        mistakes: list[int] = []
        while len(mistakes) < max_epochs and (not mistakes or mistakes[-1] > 0):
            wrong = [not torch.equal(self.learn(x, y, rate), y) for x, y in zip(input, target, strict=True)]
            mistakes.append(sum(wrong))
        return mistakes

    @torch.no_grad()
    def learn(self, x: Tensor, target: Tensor, rate: float = 1.0) -> Tensor:
        """Learn one sample: x (in_features,), target (out_features,) → the answer before the step, (out_features,).

        >>> import torch, manual_mlp as mm
        >>> neuron = mm.Perceptron(2)
        >>> neuron.learn(torch.tensor([1.0, 2.0]), torch.tensor([0.0])).item()  # 1 instead of 0, so w −= x
        1.0
        >>> neuron.affine.weight.tolist(), neuron.affine.bias.tolist()
        ([[-1.0, -2.0]], [-1.0])
        """
        prediction = sheet.threshold(self.affine(x))
        step_weight, step_bias = sheet.perceptron_step(prediction, target, x, rate)
        self.affine.weight.add_(step_weight)
        self.affine.bias.add_(step_bias)
        return prediction
