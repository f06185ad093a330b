"""What `backprop` chooses between: the same net, cost and data, differentiated and updated in four ways.

A strategy makes the net, and in training the cost and the prediction of each batch. Validation and test go through the
net's ordinary forward, whatever the strategy.
"""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

import manual_mlp as mm
from manual_mlp import functional
from manual_mlp.errors import InputError
from manual_mlp.network import cost_and_prediction
from manual_mlp.training.data import DataModule
from manual_mlp.training.divergence import EXPLODED
from manual_mlp.training.nets import choose

if TYPE_CHECKING:
    from manual_mlp.training.module import MLPModule

MOST_BATCHES = 128  # of a training step of the engine: Lightning's cost for a step is then shared well enough,
MOST_NUMBERS = 1 << 20  # the 4 MB of their inputs stay in the cache,
MOST_PRODUCTS = 1 << 28  # and the progress bar moves several times a second
PRECISIONS = {"32-true": None, "64-true": None, "bf16-true": None, "bf16-mixed": torch.bfloat16}  # to compute_dtype


class Layers:
    """Derivatives by hand in a Function for each layer; autograd joins them, the optimizer takes the step."""

    make_net: ClassVar[Callable[..., nn.Module]] = mm.MLP
    costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = functional.COSTS
    # of rows with weights (N, 1): (1/N) Σ w_n C_n. Cross-entropy takes them in its target, whatever the strategy.
    weighted_costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = {
        "quadratic": functional.quadratic_loss,
        "bce": functional.binary_cross_entropy_with_logits,
    }

    def __init__(self, loss: str) -> None:
        self.loss, self.cost = loss, choose(loss, self.costs, "model.loss")

    def check(self, trainer: L.Trainer) -> None:
        """Raises InputError for options of the trainer that can't be honoured: before other processes are started."""

    def begin(self, module: "MLPModule", optimizer: Optimizer) -> None:
        """Called once the optimizer is there; checks the trainer once more, for those who call it by themselves."""

    def end(self) -> None:
        """Called when the training is over."""

    def batches_per_step(self, module: "MLPModule", batch_size: int) -> int:
        """How many mini-batches of so many rows `train` gets at once."""
        return 1

    def train(self, module: "MLPModule", features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, n_1), target as the cost takes it → C, with its history, and the prediction a^L (N, n_L)."""
        prediction = module.net(features)
        return self.cost(prediction, target), prediction

    def train_weighted(
        self, module: "MLPModule", features: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `train`, for rows that count by their weight (N,). Raises InputError where the cost can't be weighted."""
        if self.loss not in self.weighted_costs:
            known = " or ".join([*self.weighted_costs, "cross_entropy"])
            fix = " or take backprop=layers" if self.loss in Layers.weighted_costs else ""
            raise InputError(
                f"expected model.loss={known} for weighted rows under backprop={module.hparams['backprop']}, "
                f"but got {self.loss}; change it{fix}"
            )
        prediction = module.net(features)
        return self.weighted_costs[self.loss](prediction, target, weight.unsqueeze(-1).to(prediction)), prediction

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        loss.backward(*arguments, **options)

    def rewind(self, module: "MLPModule", features: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """After `train` gave a loss that diverged: the mini-batch where, and how many steps may lie since.

        The net is then as it was before that step.
        """
        return features, 1


class Network(Layers):
    """Net and cost as one Function, its gradients by the δ recursion; the optimizer takes the step."""

    weighted_costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = {}

    def train(self, module: "MLPModule", features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return cost_and_prediction(module.net, features, target, self.loss)


class Engine(Layers):
    """`mm.BackpropEngine`: no graph, several mini-batches in a training step, so that Lightning's cost is paid rarely.

    Lightning calls optimizer.step(closure) once for a training step, and the closure `train`, which updates the
    parameters. Lightning then sets the gradients to None, `backward` does nothing, and the optimizer finds nothing left
    to do: the step is counted, with all that Lightning makes of it, and nothing is updated twice. (Lightning's manual
    optimization would do the same, but refuses clipping, and leaves schedules and their monitors to the module.)
    """

    weighted_costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = {}
    engine: mm.BackpropEngine | None = None
    before: tuple[list[Tensor], dict[str, Any], Tensor] | None = None  # the last training step, where looking is free

    def check(self, trainer: L.Trainer) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise InputError(
                "expected one process for backprop=engine, whose gradients no other process would see, "
                f"but got {type(trainer.strategy).__name__}; set trainer.devices=1 trainer.strategy=auto, "
                "or take backprop=network"
            )
        if trainer.precision not in PRECISIONS:
            raise InputError(
                f"expected trainer.precision to be one of {', '.join(PRECISIONS)} for backprop=engine, "
                f"but got {trainer.precision}; choose one of them, or take backprop=network"
            )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise InputError(
                "expected gradients to be clipped by their norm for backprop=engine, but got "
                "trainer.gradient_clip_algorithm=value; leave it out, or take backprop=network"
            )
        _check_accumulation(trainer)

    def begin(self, module: "MLPModule", optimizer: Optimizer) -> None:
        trainer = module.trainer
        self.check(trainer)
        if module.l1:
            raise InputError(
                "expected model.l1=0 for backprop=engine, which takes the step of the cost alone, "
                f"but got {module.l1}; leave it out, or take backprop=network"
            )
        clip, compute_dtype = trainer.gradient_clip_val or None, PRECISIONS[trainer.precision]
        try:
            self.engine = mm.BackpropEngine(module.net, optimizer, self.loss, clip, compute_dtype)
        except InputError as error:
            raise InputError(f"{error}; or take backprop=network") from None

    def end(self) -> None:
        self.engine = None  # it can't be copied with the module, and is of no further use

    def batches_per_step(self, module: "MLPModule", batch_size: int) -> int:
        """One where an option counts batches or steps, so that it counts what it says; else up to MOST_BATCHES."""
        trainer, parameters = module.trainer, sum(parameter.numel() for parameter in module.parameters())
        shares = trainer.limit_train_batches, trainer.val_check_interval
        counted = any(not isinstance(share, float) or share != 1 for share in shares)
        counted |= trainer.max_steps != -1 or bool(trainer.min_steps)
        counted |= trainer.overfit_batches > 0  # type: ignore[attr-defined] # Lightning sets it
        counted |= any(config.frequency != 1 for config in trainer.lr_scheduler_configs if config.interval == "step")
        rows = min(MOST_NUMBERS // module.sizes[0], MOST_PRODUCTS // parameters)
        return 1 if counted else max(1, min(MOST_BATCHES, rows // batch_size))

    def train(self, module: "MLPModule", features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        assert self.engine is not None
        _check_accumulation(module.trainer)  # a callback may change it at any time
        data = module.trainer.datamodule  # type: ignore[attr-defined] # Lightning sets it
        self.size = size = data.batch_size if isinstance(data, DataModule) else len(features)
        if features.is_cpu and len(features) > size:
            parameters = [parameter.detach().clone() for parameter in module.net.parameters()]
            self.before = parameters, copy.deepcopy(self.engine.optimizer.state_dict()), torch.get_rng_state()
        schedules = [config.scheduler for config in module.trainer.lr_scheduler_configs if _counts_batches(config)]
        prediction = features.new_empty(len(features), module.sizes[-1])
        parts = [part.split(size if schedules else len(features)) for part in (features, target, prediction)]
        total = torch.zeros((), device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            for index, (x, y, a) in enumerate(zip(*parts, strict=True)):
                for scheduler in schedules if index else ():  # Lightning advances them after the last mini-batch only
                    module.lr_scheduler_step(scheduler, None)
                total = total + self.engine.train_batches(x, y, size, a) * len(x)
        return total / len(features), prediction

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        """Nothing is left to do."""

    def rewind(self, module: "MLPModule", features: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """Takes the mini-batches of the training step again, one by one."""
        if len(features) <= self.size:
            return features, 1
        if self.before is None or self.engine is None:
            return features, MOST_BATCHES
        parameters, optimizer, random = self.before
        _put(module.net, parameters)
        self.engine.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(random)
        for x, y in zip(features.split(self.size), target.split(self.size), strict=True):
            parameters = [parameter.detach().clone() for parameter in module.net.parameters()]
            if not self.engine.step(x, y).item() <= EXPLODED:
                _put(module.net, parameters)
                return x, 1
        return features, MOST_BATCHES  # a schedule changed the step in between


@torch.no_grad()
def _put(net: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(net.parameters(), values, strict=True):
        parameter.copy_(value)


def _counts_batches(config: Any) -> bool:
    return config.interval == "step" and not config.reduce_on_plateau


def _check_accumulation(trainer: L.Trainer) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            "expected trainer.accumulate_grad_batches=1 for backprop=engine, whose every mini-batch is a step, "
            f"but got {trainer.accumulate_grad_batches}; raise data.batch_size instead, or take backprop=network"
        )


def torch_mlp(
    sizes: list[int], activation: str | list[str], output_activation: str, bias: bool = True, dropout: float = 0.0
) -> nn.Sequential:
    """The twin of `manual_mlp.MLP` in torch's own layers: same arguments, same state_dict keys, same initial bits."""
    return mm.MLP(sizes, activation, output_activation, bias, dropout).to_torch()


def torch_quadratic_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The quadratic cost (1/N) Σ_N Σ_i ½ (a_i − ŷ_i)² as torch operations, for autograd to differentiate."""
    return nn.functional.mse_loss(prediction, target, reduction="sum") / (2 * len(prediction))


def torch_weighted_quadratic_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The same of weighted rows: (1/N) Σ_N w Σ_i ½ (a_i − ŷ_i)²."""
    return (weight * nn.functional.mse_loss(prediction, target, reduction="none")).sum() / (2 * len(prediction))


class Autograd(Layers):
    """The same net in torch's own layers, differentiated by torch."""

    weighted_costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = {
        "quadratic": torch_weighted_quadratic_loss,
        "bce": nn.functional.binary_cross_entropy_with_logits,
    }

    make_net = staticmethod(torch_mlp)
    costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = {
        "quadratic": torch_quadratic_loss,
        "mse": nn.functional.mse_loss,
        "bce": nn.functional.binary_cross_entropy_with_logits,
        "cross_entropy": nn.functional.cross_entropy,
    }


BACKPROP: dict[str, type[Layers]] = {"layers": Layers, "network": Network, "engine": Engine, "autograd": Autograd}
