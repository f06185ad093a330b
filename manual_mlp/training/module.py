"""The Lightning module: a net, a cost, and figures that are summed as tensors and logged once an epoch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanSquaredError, Metric, MetricCollection, R2Score
from torchmetrics.classification import MulticlassAccuracy

from manual_mlp import formulas as sheet
from manual_mlp.checkpoint import FORMAT, read_checkpoint
from manual_mlp.errors import InputError
from manual_mlp.modules import rebuilding, tensors_of
from manual_mlp.schema import HYPER_PARAMETERS
from manual_mlp.training.strategies import choose, strategy

Batch = tuple[Tensor, ...]  # features, target, and in training perhaps the weight of each row
STAGES = ("train", "val", "test")
EXPLODED = 1e9  # targets are standardised, or 0 and 1, so a loss begins near 1
LOOK_EVERY = 50  # steps between two looks at the loss on a GPU: each look makes it wait


class MLPModule(L.LightningModule):
    """An MLP in training, for classification (class_names given) or regression.

    All hyper-parameters but `optimizer`, `scheduler` and `metrics` are plain values, so a checkpoint loads with
    `weights_only=True`.
    backprop: a name in `BACKPROP`: who differentiates and who takes the step.
    loss: a name in the sheet's COSTS, or "auto": cross_entropy for classification, quadratic for regression.
    output_activation: a name, or "auto": sigmoid for classification under the quadratic cost, identity otherwise.
        "threshold" makes a perceptron of two classes, without hidden layers, that learns by Rosenblatt's rule.
    target_mean, target_scale: lead from standardised regression targets back to their units.
    channels, kernel: of convolutions before the hidden layers, as `LeNet` takes them; image_shape: of their input.
    members: nets that are trained at once under backprop=engine, each from a seed of its own.
    native: under backprop=engine, the road through C, as in `BackpropEngine`; chosen once, where a training begins.
    l1: λ of a penalty λ Σ |W| over all weights, whose gradient joins the cost's; the logged loss is without it.
    optimizer: a functools.partial that makes the optimizer from the parameters; only training needs it.
    scheduler: what Lightning calls an lr_scheduler_config, its "scheduler" a partial that takes the optimizer.
    metrics: further figures for val and test, by name. In classification they get P(class | x) and the class indices,
        in regression the prediction and the target in its units.

    Logs train_loss, val_loss, test_loss; in classification train_accuracy, val_accuracy, test_accuracy; in regression,
    in the units of the target, val_rmse, test_rmse, and val_r2, test_r2. With several members loss and accuracy are
    their means, beside spread_loss and spread_accuracy, the standard deviations; all further figures, with
    committee_accuracy, are those of their mean answer.
    """

    classes: Tensor
    target_mean: Tensor
    target_scale: Tensor
    scores: Any

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
        residual: bool = False,
        batch_norm: bool = False,
        channels: Sequence[int] = (),
        kernel: int = 5,
        image_shape: Sequence[int] = (),
        l1: float = 0.0,
        backprop: str = "layers",
        members: int = 1,
        native: bool | Literal["auto"] = "auto",
        optimizer: partial[Optimizer] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise InputError(f"expected positive whole numbers in model.hidden, but got {list(hidden)}; correct it")
        if l1 < 0:
            raise InputError(f"expected model.l1 of at least 0, but got {l1}; correct it")
        if loss == "auto":
            loss = "cross_entropy" if class_names else "quadratic"
        self.members = members  # kept among the hyper-parameters only if there are several, as in older checkpoints
        self.save_hyperparameters(ignore=["optimizer", "scheduler", "metrics", "native", *["members"] * (members == 1)])
        self.hparams["loss"] = loss  # the one that was meant
        self.hparams.update(channels=list(channels), image_shape=list(image_shape) if channels else [])
        self.optimizer: Any = optimizer
        self.scheduler, self.class_names, self.loss, self.l1 = scheduler, class_names, loss, l1
        self.output_activation = resolve_output_activation(output_activation, loss, bool(class_names))
        self.hparams["output_activation"] = self.output_activation  # a reader of the checkpoint need not resolve it
        self.backprop = strategy(self.hparams)
        if native is True and self.hparams["backprop"] != "engine":
            given = self.hparams["backprop"]
            raise InputError(f"expected backprop=engine for native=true, but got {given}; leave out native")
        self.backprop.native = native
        self.sizes, self.net = self.backprop.sizes, self.backprop.make_net()
        self.register_buffer("classes", torch.arange(output_size), persistent=False)
        self.register_buffer("target_mean", torch.tensor(target_mean), persistent=False)
        self.register_buffer("target_scale", torch.tensor(target_scale), persistent=False)
        self.figures_before: dict[str, float] = {}  # of the run that this one goes on from
        self.sums: dict[str, dict[str, Any]] = {stage: _nothing() for stage in STAGES}
        # Figures that are no mean over the rows. As modules, the metrics follow this one to its device.
        own: dict[str, Metric] = {} if class_names else {"rmse": MeanSquaredError(squared=False), "r2": R2Score()}
        if class_names and members > 1:
            own = {"committee_accuracy": MulticlassAccuracy(len(class_names), average="micro")}
        names: dict[str, Any] = {**own, **(metrics or {})}
        self.measured = list(names)
        self.scores = nn.ModuleDict({stage: MetricCollection(names).clone() for stage in STAGES[1:] if names})

    def forward(self, features: Tensor) -> Tensor:
        """features (N, input_size) → prediction (N, output_size)."""
        return self.net(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features, target, *weight = batch
        wanted = self.as_cost_takes(target)
        if weight:
            self.backprop.check_weights()
        if weight and self.loss == "cross_entropy":  # −Σ t log softmax(z) with t = w ŷ is w times the row's cost
            wanted = self._one_hot(target) * weight.pop().unsqueeze(-1)
        loss, prediction = self.backprop.train(self.net, features, wanted, *weight)
        self._add("train", loss, prediction, target)
        self._check_loss(loss, features, batch_idx)
        return loss if loss.dim() == 0 else loss.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        self.backprop.backward(loss, *arguments, **options)

    def batches_per_step(self, batch_size: int) -> int:
        """Return how many mini-batches of so many rows a training step takes at once."""
        return self.backprop.batches_per_step(self.net, self.trainer, batch_size)

    def setup(self, stage: str) -> None:
        """Take on the trainer's precision before a checkpoint is restored: float64 must not pass through float32."""
        self.trainer.precision_plugin.convert_module(self)
        self.backprop.trainer = self.trainer

    def teardown(self, stage: str) -> None:
        self.backprop.end()

    def on_train_start(self) -> None:
        self.backprop.choose_road()

    def on_train_epoch_end(self) -> None:
        self._log_figures("train")

    def on_validation_epoch_end(self) -> None:
        sums = self.sums["val"]
        if self.members > 1 and self.trainer.state.fn == "fit":
            self.net.keep(sums["loss"] / sums["rows"], self.current_epoch)
        self._log_figures("val")

    def on_test_start(self) -> None:
        self.take_kept()

    def take_kept(self) -> None:
        """Give each of several members the parameters of its best epoch."""
        if self.members > 1:
            self.net.take_kept()

    def kept_figures(self) -> dict[str, Tensor]:
        """Return what a checkpoint that keeps the best of each member is judged by; nothing for one net."""
        return {"val_loss": self.net.kept_cost.mean()} if self.members > 1 else {}

    @property
    def one_net(self) -> Any:
        """Return the net, of several the first."""
        return self.net[0] if self.members > 1 else self.net

    def on_test_epoch_end(self) -> None:
        self._log_figures("test")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Store the current figures in the checkpoint."""
        checkpoint["format"] = FORMAT
        measured = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        checkpoint["figures"] = self.figures_before | measured
        checkpoint["optimizer"] = self.optimizer_in_words()
        checkpoint["road"] = self.backprop.road
        checkpoint["sums"] = self.sums["train"]  # not empty in the middle of an epoch

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = "cpu", **arguments: Any) -> "MLPModule":  # type: ignore[override]
        """Make the module of a checkpoint. arguments: those of the class win. Raises InputError as `read_training`."""
        arguments.pop("weights_only", None)  # always
        content = read_training(checkpoint_path, map_location)
        module = cls(**{**_arguments(content), **arguments})
        module.on_load_checkpoint(content)
        module.net.load_state_dict(tensors_of(content))
        return module

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.figures_before = checkpoint["figures"]
        self.sums["train"] = {**_nothing(), **checkpoint["sums"]}
        self.backprop.began = checkpoint.get("road", "torch")  # before this word there was no other

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self.net.parameters():
            if self.l1 and parameter.ndim > 1 and parameter.grad is not None:  # not for biases and norms
                parameter.grad += sheet.l1_gradient(parameter.detach(), self.l1)

    def configure_optimizers(self) -> Any:
        if self.optimizer is None:
            raise InputError("expected an optimizer for training, but got none; pass MLPModule(..., optimizer=...)")
        optimizer = _made("optimizer", self.optimizer, self.parameters())
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"expected optimizer._target_ to make an optimizer, but got {optimizer!r}; name its class")
        self.backprop.begin(self.net, optimizer)
        if self.scheduler is None:
            return optimizer
        schedule = _made("scheduler", self.scheduler["scheduler"], optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {**self.scheduler, "scheduler": schedule}}

    @property
    def lr(self) -> float:
        """Return LR, which Lightning's LearningRateFinder sets."""
        return self.optimizer.keywords["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer.keywords["lr"] = value

    def optimizer_in_words(self) -> str:
        """Return the optimizer's name, and its arguments that are not zero, false or null."""
        if self.optimizer is None:
            return "none"
        name = getattr(self.optimizer.func, "__name__", repr(self.optimizer.func))
        return ", ".join([name, *(f"{key} {value}" for key, value in self.optimizer.keywords.items() if value)])

    def lower_lr(self) -> str:
        """Return the advice to lower the optimizer's step, and what it is now."""
        lr = self.optimizer and self.optimizer.keywords.get("lr")
        return "lower optimizer.lr" + ("" if lr is None else f" (now {lr})")

    def default_lr(self) -> float:
        """Return LR for plain gradient descent: large where sigmoids and the quadratic cost keep δ small."""
        hidden = self.hparams["activation"]
        names = {self.output_activation, *([hidden] if isinstance(hidden, str) else hidden)}
        return 5.0 if self.loss == "quadratic" and names == {"sigmoid"} else 0.1

    def figure_names(self) -> list[str]:
        """Return the names of what is logged."""
        trained = ["loss", "accuracy"] if self.class_names else ["loss"]
        trained += [f"spread_{kind}" for kind in trained if self.members > 1]
        return [f"{stage}_{kind}" for stage in STAGES for kind in trained + self.measured * (stage != "train")]

    def as_net_takes(self, features: Tensor, target: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of the data module as net and cost take them, without weights: device, dtype, classes one-hot."""
        features = features.to(next(self.net.parameters()))
        target = self.as_cost_takes(target.to(features.device))
        return features, target.to(features) if target.is_floating_point() else target

    def as_cost_takes(self, target: Tensor) -> Tensor:
        """Return class indices as rows of 0 and 1, except for cross-entropy, which takes indices."""
        return self._one_hot(target) if self.class_names and self.loss != "cross_entropy" else target

    def in_units(self, values: Tensor) -> Tensor:
        """Return standardised predictions or targets of a regression in the units of the target."""
        return values.detach().float() * self.target_scale + self.target_mean

    def _one_hot(self, target: Tensor) -> Tensor:
        """Return class indices (N,) as rows (N, classes) of 0 and 1."""
        return (target.unsqueeze(-1) == self.classes).to(self.target_mean.dtype)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        features, target = batch
        cost, prediction = self.backprop.evaluate(self.net, features, self.as_cost_takes(target))
        self._add(stage, cost, prediction, target)

    def _add(self, stage: str, loss: Tensor, prediction: Tensor, target: Tensor) -> None:
        """Add a batch to the sums of an epoch. They are tensors: no step waits for a number, no step logs."""
        sums, prediction = self.sums[stage], prediction.detach()
        sums["loss"] = sums["loss"] + loss.detach().float() * len(target)
        sums["rows"] += len(target)
        if self.class_names:
            sums["hits"] = sums["hits"] + (prediction.argmax(-1) == target).sum(-1)
        if stage in self.scores and self.members > 1:
            prediction = self.net.together(prediction)
        if stage in self.scores and self.class_names:
            self.scores[stage].update(sheet.probability(prediction.float(), self.loss), target)
        elif stage in self.scores:
            self.scores[stage].update(self.in_units(prediction), self.in_units(target))

    def _check_loss(self, loss: Tensor, features: Tensor, step: int) -> None:
        """Raise InputError if the loss is NaN or has exploded: say where, and what to try that is not done already."""
        looked_back, loss = 1 if loss.is_cpu else LOOK_EVERY, loss if loss.dim() == 0 else loss.max()
        if (step % looked_back and not self.trainer.is_last_batch) or loss.item() <= EXPLODED:
            return
        advice = [self.lower_lr()]
        if not getattr(self.trainer.datamodule, "standardise", True):  # type: ignore[attr-defined] # Lightning sets it
            advice.append("set data.standardise=true")
        if not self.trainer.gradient_clip_val:
            advice.append("clip the gradients with trainer.gradient_clip_val=1")
        place = self.backprop.place(self.net, features, step, looked_back)
        got = f"{loss.item():.3g} in epoch {self.current_epoch}, {place}"
        raise InputError(f"expected a finite loss, of {EXPLODED:.0e} at most, but got {got}; {', or '.join(advice)}")

    def _log_figures(self, stage: str) -> None:
        sums, self.sums[stage] = self.sums[stage], _nothing()
        like = torch.as_tensor(sums["loss"])
        totals = torch.stack([torch.as_tensor(value).to(like).expand_as(like) for value in sums.values()])
        loss, hits, rows = self.trainer.strategy.reduce(totals, reduce_op="sum")  # over all processes
        figures = {"loss": loss / rows} | ({"accuracy": hits / rows} if isinstance(sums["hits"], Tensor) else {})
        if self.members > 1:
            spreads = {f"spread_{kind}": value.std() for kind, value in figures.items()}
            figures = {kind: value.mean() for kind, value in figures.items()} | spreads
        if stage in self.scores:
            figures |= self.scores[stage].compute()
            self.scores[stage].reset()
        for kind, value in figures.items():
            if value.numel() != 1:
                raise InputError(f"expected one number of metrics.{kind}, but got {value.numel()}; average them")
            shown = stage == "val" and kind in ("accuracy", "r2")  # more would not fit beside the bar
            self.log(f"{stage}_{kind}", value, prog_bar=shown, sync_dist=True)


def read_training(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint whose tensors are those of the net that it describes.

    Raises InputError as `read_checkpoint`, and for other tensors, before memory is taken for the net.
    """
    content = read_checkpoint(path, map_location)
    with rebuilding(path):
        MLPModule(**_arguments(content)).net.load_state_dict(tensors_of(content), assign=True)
    return content


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the module that a checkpoint gives; none that only a program gives."""
    known = {str(name).removesuffix("?") for name in HYPER_PARAMETERS}
    return {name: value for name, value in content["hyper_parameters"].items() if name in known}


def unfit(name: str, error: Exception) -> InputError:
    """Return an InputError that quotes why torch's optimizer or scheduler refuses its values."""
    return InputError(f"expected values that the {name} takes, but: {error}; correct {name}.*")


def resolve_output_activation(name: str, loss: str, classification: bool) -> str:
    """Resolve "auto", and refuse pairs of cost, output and task that would train wrongly and silently."""
    takes_logits = choose(loss, sheet.COSTS, "model.loss").logits
    if takes_logits and not classification:
        raise InputError(f"expected model.loss quadratic or mse for a regression, but got {loss}, which is for classes")
    if name == "auto":
        return "sigmoid" if classification and loss == "quadratic" else "identity"
    if takes_logits and name != "identity":
        wanted = f"expected model.output_activation=identity under {loss}, which takes logits"
        raise InputError(f"{wanted}, but got {name}; set it to identity or auto")
    return name


def _nothing() -> dict[str, Any]:
    """Return sums over no rows: zeros."""
    return {"loss": 0.0, "hits": 0, "rows": 0}


def _made(name: str, make: Callable[..., Any], argument: Any) -> Any:
    try:
        return make(argument)
    except (TypeError, ValueError) as error:  # torch's own words for a wrong value are clear
        raise unfit(name, error) from error
