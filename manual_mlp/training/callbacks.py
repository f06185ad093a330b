"""Callbacks that show a net at work: δ recorded, a traced step, pretraining, and how far it is."""

import copy
import math
import sys
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from manual_mlp import plots
from manual_mlp.errors import InputError
from manual_mlp.network import reading_of
from manual_mlp.pretraining import pretrain
from manual_mlp.shell import is_watched
from manual_mlp.tables import figure, words
from manual_mlp.tracing import one_pass, trace

Values = dict[str, dict[int, Tensor]]
"""z, a and δ of a pass, indexed by the sheet's l: {"z": {2: (N, n_2), …}, "a": {1: …}, "delta": {2: …}}."""

STATE = ("epochs", "norms", "first", "snapshots", "steps", "due", "stride")
ROWS = 32
KEPT = 1000  # values of z, a and δ of each layer in the first record
RECORDS = 500  # more say nothing more: then every second one is dropped, and the next ones come half as often
SHOWN = ("val_loss", "val_accuracy", "val_r2")
HISTOGRAMS = 10  # TensorBoard gets them with every tenth record
INPUTS, PARAMETERS = 2, 10_000  # up to which the net's answers can be drawn, so that its snapshots are kept


class DeltaFlow(L.Callback):
    """A callback that records what `plots` draws, by the recursion and on the same rows each time.

    every: mini-batches from one record to the next. rows: how many of the training part, its first ones.

    epochs      of each record, such as 1.5 in the middle of the second epoch
    norms       {l: ‖δ^l‖ of each record} for one sample: the root of the mean square over the rows, without the 1/N
    first       z, a and δ of the first record, at most 1000 values each
    snapshots   {epochs passed: state_dict} after 0, 1, 2, 4, 8, … epochs, for small nets with at most two inputs

    All of it is plain data in the checkpoint. It draws no random numbers and changes nothing: with and without it a run
    gives the same bits. Dropout is left out. A net that the recursion cannot read is not recorded.
    Needs a data module with `splits`. TensorBoard gets the norms, and histograms with every tenth record.
    """

    def __init__(self, every: int = 20, rows: int = ROWS) -> None:
        if min(every, rows) < 1:
            given = f"{every}, {rows}"
            raise InputError(f"expected DeltaFlow's every and rows to be 1 or more, but got {given}; raise them")
        self.every, self.rows = every, rows
        self.epochs: list[float] = []
        self.norms: dict[int, list[float]] = {}
        self.first: Values = {}
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.steps, self.due, self.stride = 0, 0, 1
        self.fits = True

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.fits = stage == "fit"
        pl_module.backprop.every = self.every

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fits:  # a test restores the best checkpoint, and its records end earlier
            vars(self).update(state_dict)
            self.due = min(self.due, self.steps + self.every * self.stride)  # the checkpoint had a smaller `every`

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        if batch_idx == 0:
            self._keep_snapshot(trainer.current_epoch, pl_module)
        if self.steps >= self.due:
            self._record(trainer, pl_module, trainer.current_epoch + batch_idx / trainer.num_training_batches)
            self.due = self.steps + self.every * self.stride
        self.steps += -(-len(batch[0]) // trainer.datamodule.batch_size)  # type: ignore[attr-defined] # the engine takes many at once

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record the end, too: after the last checkpoint, so that a run that goes on from there does not contain it."""
        if trainer.is_global_zero and self.epochs:
            self._record(trainer, pl_module, trainer.current_epoch, histograms=True)

    def _record(self, trainer: L.Trainer, module: Any, epoch: float, histograms: bool = False) -> None:
        try:
            values = signals(module, trainer.datamodule.splits["train"][: self.rows])  # type: ignore[attr-defined]
        except InputError:  # another kind of net, or hooks in it
            return
        self.first = self.first or {letter: _thinned(values[letter]) for letter in values}
        if len(self.epochs) == RECORDS:
            self.stride *= 2
            self.epochs = self.epochs[::2]
            self.norms = {layer: norms[::2] for layer, norms in self.norms.items()}
        self.epochs.append(epoch)
        norms = torch.stack([delta.float().norm() for delta in values["delta"].values()]) * len(values["a"][1]) ** 0.5
        for layer, norm in zip(values["delta"], norms.tolist(), strict=True):
            self.norms.setdefault(layer, []).append(norm)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._show(logger.experiment, trainer.global_step, values, histograms)

    def _show(self, tensorboard: Any, step: int, values: Values, histograms: bool) -> None:
        for layer, norms in self.norms.items():
            tensorboard.add_scalar(f"norm of delta/{layer}", norms[-1], step)
        shown = values if histograms or len(self.epochs) % HISTOGRAMS == 1 else {}
        for letter, layer in ((letter, layer) for letter, layers in shown.items() for layer in layers):
            tensorboard.add_histogram(f"{letter}/{layer}", values[letter][layer], step, bins=64)

    def _keep_snapshot(self, epoch: int, module: Any) -> None:
        """Keep the parameters after 0, 1, 2, 4, … epochs: for these alone epoch & (epoch − 1) is 0."""
        state = module.net.state_dict()
        small = module.sizes[0] <= INPUTS and sum(map(torch.numel, state.values())) <= PARAMETERS
        if small and epoch & (epoch - 1) == 0:
            self.snapshots[epoch] = {name: value.cpu().clone() for name, value in state.items()}


@torch.no_grad()
def signals(module: Any, batch: tuple[Tensor, Tensor]) -> Values:
    """Return z, a and δ of an MLPModule on a batch of its data module, without dropout, as `mm.trace` gives them.

    Raises InputError as `program.read`.
    """
    program, (features, target) = reading_of(module.one_net, grids=True).program, module.as_net_takes(*batch)
    one = one_pass(program, features, target, module.loss, program.draw(features, drops=False))
    layers = program.layers
    return {
        "z": {index: one.slots[layer.z] for index, layer in layers.items()},
        "a": {1: features} | {index: one.slots[layer.out] for index, layer in layers.items()},
        "delta": {index: one.arrived[layer.z] for index, layer in layers.items()},
    }


def _thinned(values: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return at most KEPT values of each layer, evenly spaced. Copies: a checkpoint writes all the memory of a view."""
    flat = {layer: value.flatten() for layer, value in values.items()}
    return {layer: value[:: -(-len(value) // KEPT)].float().cpu().clone() for layer, value in flat.items()}


class Traced(L.Callback):
    """A callback that prints `mm.trace` of the first mini-batch, just before the training makes this step.

    It leaves trace.md and flow.png in the run folder. Step 5 is plain SGD's, with the optimizer's lr as LR; weights of
    rows are left out. rows: of the mini-batch; costs: C of it before this step and after it.
    """

    rows = 0
    costs = (math.nan, math.nan)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > 0 or not trainer.is_global_zero:
            return
        first = [part[: trainer.datamodule.batch_size] for part in batch]  # type: ignore[attr-defined] # the engine takes many at once
        x, target = pl_module.as_net_takes(*first)
        traced = trace(pl_module.one_net, x, target, pl_module.loss, trainer.optimizers[0].param_groups[0]["lr"])
        stepped = copy.deepcopy(pl_module.one_net).requires_grad_(False)
        new = [(traced.new_weight[layer], traced.new_bias[layer]) for layer in traced.weight]
        for parameter, value in zip(stepped.parameters(), filter(lambda v: v is not None, chain(*new)), strict=True):
            parameter.copy_(value)
        self.rows, after = len(x), trace(stepped, x, target, pl_module.loss)
        self.costs = traced.cost.item(), after.cost.item()
        folder = Path(trainer.default_root_dir)
        (folder / "trace.md").write_text(traced.to_markdown() + "\n")
        plots.flow(traced).savefig(folder / "flow.png")
        print(f"\n{traced}\n")


class Pretrained(L.Callback):
    """A callback that gives the net's hidden layers their start by `mm.pretrain`, before the first step.

    epochs_per_layer: of each hidden one; 0 leaves the net as it was drawn.
    A run that goes on from a checkpoint is left alone.
    """

    def __init__(self, epochs_per_layer: int = 30, lr: float = 0.05, batch_size: int = 20) -> None:
        self.epochs, self.lr, self.batch_size = epochs_per_layer, lr, batch_size

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step > 0 or self.epochs == 0:
            return
        if pl_module.members > 1:
            raise InputError(f"expected one net to pretrain, but got members={pl_module.members}; leave members out")
        x = trainer.datamodule.splits["train"].features  # type: ignore[attr-defined]
        first = next(pl_module.net.parameters())
        generator = torch.Generator(first.device).manual_seed(torch.initial_seed())  # the same in each process
        pretrain(pl_module.net, x.to(first), self.epochs, self.lr, self.batch_size, generator)


class Progress(TQDMProgressBar):
    """Lightning's bar, on stderr, if somebody watches; else one short line an epoch on stdout.

    A line comes when the next epoch begins, because only then Lightning has the figures of the training.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        self.watched = is_watched()
        super().__init__(refresh_rate)
        if not self.watched:
            self.disable()
        self.ended: int | None = None  # epoch
        self.validated = False

    def init_train_tqdm(self) -> Any:
        with redirect_stdout(sys.stderr):  # it writes to what is stdout now
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Any:
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def init_test_tqdm(self) -> Any:
        with redirect_stdout(sys.stderr):
            return super().init_test_tqdm()

    def on_train_epoch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        self._print(trainer)
        super().on_train_epoch_start(trainer, *arguments)

    def on_validation_end(self, *arguments: Any) -> None:
        self.validated = True
        super().on_validation_end(*arguments)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ended = trainer.current_epoch
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, *arguments: Any) -> None:
        self._print(arguments[0])
        super().on_train_end(*arguments)

    def _print(self, trainer: L.Trainer) -> None:
        """Print the line of the epoch that has ended, if any."""
        names, found = ["train_loss", *(SHOWN if self.validated else ())], trainer.callback_metrics
        figures = [f"{words(name)} {figure(name, found[name].item())}" for name in names if name in found]
        if self.ended is not None and trainer.is_global_zero and not self.watched:
            print(f"epoch {self.ended}: {', '.join(figures)}", flush=True)
        self.ended, self.validated = None, False
