"""The Lightning module: a net, a cost, and figures that are summed as tensors and logged once an epoch."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanSquaredError, Metric, MetricCollection, R2Score

from manual_mlp import formulas
from manual_mlp.checkpoint import FORMAT, read_checkpoint
from manual_mlp.errors import InputError
from manual_mlp.training.backprop import BACKPROP
from manual_mlp.training.divergence import EVERY, EXPLODED, diverged
from manual_mlp.training.nets import LOGIT_COSTS, build_net, choose

Batch = tuple[Tensor, ...]  # features, target, and in training perhaps the weight of each row


class MLPModule(L.LightningModule):
    """Trains an MLP for classification (class_names given) or regression.

    All hyper-parameters but `optimizer`, `scheduler` and `metrics` are plain values, so a checkpoint loads with
    `weights_only=True`.
    backprop: a name in `BACKPROP`: who differentiates and who takes the step.
    output_activation: a name, or "auto": sigmoid for classification under the quadratic cost, identity otherwise.
    target_mean, target_scale: lead from standardised regression targets back to their units.
    l1: λ of a penalty λ Σ |W| over all weights, whose gradient joins the cost's; the logged loss is without it.
    optimizer: a functools.partial that makes the optimizer from the parameters; only training needs it.
    scheduler: what Lightning calls an lr_scheduler_config, its "scheduler" a partial that takes the optimizer.
    metrics: further figures of val and test, by name. In classification they get P(class | x) and the class indices,
        in regression prediction and target in the units of the target.

    Logs train_loss, val_loss, test_loss; in classification train_accuracy, val_accuracy, test_accuracy; in regression,
    in the units of the target, val_rmse, test_rmse, and val_r2, test_r2.
    """

    classes: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        class_names: Sequence[str] = (),
        target_mean: Sequence[float] = (),
        target_scale: Sequence[float] = (),
        hidden: Sequence[int] = (30,),
        activation: str | Sequence[str] = "sigmoid",
        output_activation: str = "auto",
        initialisation: str = "torch",
        loss: str = "quadratic",
        bias: bool = True,
        dropout: float = 0.0,
        l1: float = 0.0,
        backprop: str = "layers",
        optimizer: partial[Optimizer] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise InputError(f"expected positive whole numbers in model.hidden, but got {list(hidden)}; correct it")
        if l1 < 0:
            raise InputError(f"expected model.l1 of at least 0, but got {l1}; correct it")
        self.save_hyperparameters(ignore=["optimizer", "scheduler", "metrics"])
        self.optimizer, self.scheduler = optimizer, scheduler
        self.class_names, self.loss, self.l1 = class_names, loss, l1
        self.backprop = choose(backprop, BACKPROP, "backprop")(loss)
        self.sizes = [input_size, *hidden, output_size]
        self.output_activation = resolve_output_activation(output_activation, loss, bool(class_names))
        self.hparams["output_activation"] = self.output_activation  # who reads a checkpoint need not resolve it
        self.net = build_net(
            self.backprop.make_net,
            initialisation,
            sizes=self.sizes,
            activation=activation if isinstance(activation, str) else list(activation),
            output_activation=self.output_activation,
            bias=bias,
            dropout=dropout,
        )
        self.register_buffer("classes", torch.arange(output_size), persistent=False)
        self.register_buffer("target_mean", torch.tensor(target_mean), persistent=False)
        self.register_buffer("target_scale", torch.tensor(target_scale), persistent=False)
        self.figures_before: dict[str, float] = {}  # of the run that this one goes on from
        self.sums = {stage: Sums() for stage in ("train", "val", "test")}
        # what a mean over the rows cannot give; the metrics follow the module to its device
        names: dict[str, Any] = {**({} if class_names else _regression_scores()), **(metrics or {})}
        self.measured = list(names)
        stages = ("val", "test") if names else ()
        self.scores = nn.ModuleDict({stage: MetricCollection(names).clone() for stage in stages})

    def forward(self, features: Tensor) -> Tensor:
        """features: (N, input_size). Returns: prediction (N, output_size)."""
        return self.net(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features, target, *weight = batch
        wanted = self._as_cost_wants(target)
        if weight and self.loss == "cross_entropy":  # −Σ t log softmax(z) with t = w ŷ is w times the row's cost
            wanted, weight = self._one_hot(target) * weight.pop().unsqueeze(-1), []
        train = self.backprop.train_weighted if weight else self.backprop.train
        loss, prediction = train(self, features, wanted, *weight)
        self._add("train", loss, prediction, target)
        if (loss.is_cpu or batch_idx % EVERY == 0 or self.trainer.is_last_batch) and not loss.item() <= EXPLODED:
            lr = self.optimizer.keywords.get("lr") if self.optimizer else None
            features, since = self.backprop.rewind(self, features, wanted)
            since *= 1 if loss.is_cpu else EVERY
            raise diverged(loss.item(), self.net, features, f"epoch {self.current_epoch}, step {batch_idx}", lr, since)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        self.backprop.backward(loss, *arguments, **options)

    def batches_per_step(self, batch_size: int) -> int:
        """How many mini-batches of so many rows a training step takes at once."""
        return self.backprop.batches_per_step(self, batch_size)

    def setup(self, stage: str) -> None:
        """Take on the trainer's precision before a checkpoint is restored: float64 must not pass through float32."""
        self.trainer.precision_plugin.convert_module(self)

    def teardown(self, stage: str) -> None:
        self.backprop.end()

    def on_train_epoch_end(self) -> None:
        self._log_figures("train")

    def on_validation_epoch_end(self) -> None:
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        self._log_figures("test")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """A checkpoint tells its own figures."""
        checkpoint["format"] = FORMAT
        measured = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        checkpoint["figures"] = self.figures_before | measured
        checkpoint["optimizer"] = self.optimizer_in_words()
        checkpoint["sums"] = vars(self.sums["train"])  # not empty in the middle of an epoch

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = "cpu", **arguments: Any) -> "MLPModule":  # type: ignore[override]
        """Make the module of a checkpoint that `read_checkpoint` has checked. arguments: of the class, beside its own.

        Raises InputError as `read_checkpoint`.
        """
        arguments.pop("weights_only", None)  # always
        content = read_checkpoint(checkpoint_path, map_location)
        known = inspect.signature(cls.__init__).parameters
        own = {name: value for name, value in content["hyper_parameters"].items() if name in known}
        module = cls(**{**own, **arguments})
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
        return module

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.figures_before = checkpoint["figures"]
        vars(self.sums["train"]).update(checkpoint["sums"])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self.net.parameters():
            if self.l1 and parameter.ndim == 2 and parameter.grad is not None:  # not for biases
                parameter.grad += formulas.l1_gradient(parameter.detach(), self.l1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.optimizer is None:
            raise InputError("expected an optimizer for training, but got none; pass MLPModule(..., optimizer=...)")
        try:
            optimizer = self.optimizer(self.parameters())
        except (TypeError, ValueError) as error:  # torch's own words for a wrong value are clear
            raise unfit("optimizer", error) from error
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"expected optimizer._target_ to make an optimizer, but got {optimizer!r}; name its class")
        self.backprop.begin(self, optimizer)
        if self.scheduler is None:
            return optimizer
        try:
            schedule = self.scheduler["scheduler"](optimizer)
        except (TypeError, ValueError) as error:
            raise unfit("scheduler", error) from error
        return cast(
            OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": {**self.scheduler, "scheduler": schedule}}
        )

    @property
    def lr(self) -> float:
        """The optimizer's step, for Lightning's LearningRateFinder to set."""
        assert self.optimizer is not None
        return self.optimizer.keywords["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        assert self.optimizer is not None
        self.optimizer.keywords["lr"] = value

    def optimizer_in_words(self) -> str:
        """Its name and what it was given that is not zero, false or null."""
        if self.optimizer is None:
            return "none"
        name = getattr(self.optimizer.func, "__name__", repr(self.optimizer.func))
        return ", ".join([name, *(f"{key} {value}" for key, value in self.optimizer.keywords.items() if value)])

    def plain_step(self) -> float:
        """The step for plain gradient descent: a large one where sigmoids and the quadratic cost keep δ small."""
        hidden = self.hparams["activation"]
        names = {self.output_activation, *([hidden] if isinstance(hidden, str) else hidden)}
        return 5.0 if self.loss == "quadratic" and names == {"sigmoid"} else 0.1

    def figure_names(self) -> list[str]:
        """What is logged, by name."""
        trained = ["loss", "accuracy"] if self.class_names else ["loss"]
        evaluated = [*trained, *self.measured]
        kinds = {"train": trained, "val": evaluated, "test": evaluated}
        return [f"{stage}_{kind}" for stage, names in kinds.items() for kind in names]

    def _evaluate(self, stage: str, batch: Batch) -> None:
        features, target = batch
        prediction = self.net(features)
        self._add(stage, self.backprop.cost(prediction, self._as_cost_wants(target)), prediction, target)

    def _add(self, stage: str, loss: Tensor, prediction: Tensor, target: Tensor) -> None:
        self.sums[stage].add(loss, prediction, target if self.class_names else None)
        if stage in self.scores:
            self._scores(stage).update(*self._as_metrics_want(prediction.detach().float(), target))

    def _as_cost_wants(self, target: Tensor) -> Tensor:
        """Class indices become rows of 0 and 1, except for cross-entropy, which takes indices."""
        return self._one_hot(target) if self.class_names and self.loss != "cross_entropy" else target

    def _one_hot(self, target: Tensor) -> Tensor:
        """(N,) class indices → (N, classes) of 0 and 1."""
        return (target.unsqueeze(-1) == self.classes).to(self.target_mean.dtype)

    def _as_metrics_want(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.class_names:
            return formulas.probability(prediction, self.loss), target
        return self._in_units(prediction), self._in_units(target)

    def _in_units(self, values: Tensor) -> Tensor:
        return values.detach().float() * self.target_scale + self.target_mean

    def _scores(self, stage: str) -> MetricCollection:
        return cast(MetricCollection, self.scores[stage])

    def _log_figures(self, stage: str) -> None:
        figures = self.sums[stage].means(self.trainer.strategy.reduce)
        self.sums[stage] = Sums()
        if stage in self.scores:
            figures |= self._scores(stage).compute()
            self._scores(stage).reset()
        for kind, value in figures.items():
            if value.numel() != 1:
                raise InputError(f"expected one number of metrics.{kind}, but got {value.numel()}; average them")
            shown = stage == "val" and kind in ("accuracy", "r2")  # more does not fit beside the bar
            self.log(f"{stage}_{kind}", value, prog_bar=shown, sync_dist=True)


class Sums:
    """Loss and hits of an epoch, summed as tensors: no step waits for a number, no step logs."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.hits: Tensor | int = 0
        self.rows = 0

    def add(self, loss: Tensor, prediction: Tensor, labels: Tensor | None) -> None:
        """loss: (), mean over the batch. prediction: (N, output_size). labels: (N,) class indices, or None."""
        self.loss = self.loss + loss.detach().float() * len(prediction)
        self.rows += len(prediction)
        if labels is not None:
            self.hits = self.hits + (prediction.detach().argmax(1) == labels).sum()

    def means(self, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Means per row over all processes; `reduce` is the strategy's."""
        loss = torch.as_tensor(self.loss)
        totals = torch.stack([loss, torch.as_tensor(self.hits).to(loss), loss.new_tensor(self.rows)])
        loss, hits, rows = reduce(totals, reduce_op="sum")
        return {"loss": loss / rows} | ({"accuracy": hits / rows} if isinstance(self.hits, Tensor) else {})


def unfit(name: str, error: Exception) -> InputError:
    """Return what to tell of values that torch's optimizer or scheduler, as it says itself, does not take."""
    return InputError(f"expected values that the {name} takes, but: {error}; correct {name}.*")


def _regression_scores() -> dict[str, Metric]:
    return {"rmse": MeanSquaredError(squared=False), "r2": R2Score()}


def resolve_output_activation(name: str, loss: str, classification: bool) -> str:
    """Resolve "auto", and refuse pairs of cost, output and task that would train wrongly without a sound."""
    if loss in LOGIT_COSTS and not classification:
        raise InputError(f"expected model.loss quadratic or mse for a regression, but got {loss}, which is for classes")
    if name == "auto":
        return "sigmoid" if classification and loss == "quadratic" else "identity"
    if loss in LOGIT_COSTS and name != "identity":
        raise InputError(
            f"expected model.output_activation=identity under {loss}, which takes logits, but got {name}; "
            "set it to identity or auto"
        )
    return name
