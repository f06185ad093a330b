"""The perceptron as a training run like any other, with figures and checkpoints, but Rosenblatt's rule for a step."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from manual_mlp.errors import InputError
from manual_mlp.perceptron import Perceptron
from manual_mlp.training.module import Batch, MLPModule


class TwoClasses(Perceptron):
    """A perceptron whose answer y stands in two columns, 1 − y and y, as the answers of other nets do."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return torch.cat([1 - y, y], -1)


class PerceptronModule(MLPModule):
    """One threshold neuron for two classes, learning w += LR (ŷ − y) x after each sample; see `Perceptron`.

    Its loss is the share of mistakes, in training each counted before its correction. LR is the optimizer's lr; the
    optimizer has nothing else to do, and counts the steps. Raises InputError where there are not two classes.
    """

    net: TwoClasses

    def __init__(
        self,
        input_size: int,
        output_size: int,
        class_names: Sequence[str] = (),
        target_mean: Sequence[float] = (),
        target_scale: Sequence[float] = (),
        optimizer: partial[Optimizer] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        if len(class_names) != 2:
            raise InputError(
                f"expected two classes for a perceptron, whose neuron answers 0 or 1, but got {len(class_names)}; "
                "choose data=halves, moons or xor"
            )
        super().__init__(
            input_size,
            output_size,
            class_names,
            hidden=(),
            output_activation="identity",
            optimizer=optimizer,
            scheduler=scheduler,
            metrics=metrics,
        )
        self.net, self.output_activation = TwoClasses(input_size), "threshold"
        self.sizes = [input_size, 1]
        self.hparams.update(backprop="none, Rosenblatt's rule", output_activation=self.output_activation)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if len(batch) > 2:
            raise InputError(
                "expected rows that count the same for model=perceptron, whose rule knows no weights, but got weights; "
                "leave out data.class_weight and data.source.weight"
            )
        features, target = batch
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        rows = zip(features, target.to(features).unsqueeze(-1), strict=True)
        y = torch.stack([self.net.learn(x, label, rate) for x, label in rows])
        prediction = torch.cat([1 - y, y], -1)
        loss = self.backprop.cost(prediction, self._as_cost_wants(target))
        self._add("train", loss, prediction, target)
        return loss

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        """There is no derivative."""
