"""Show how far a training is: a bar on a terminal, else one line an epoch."""

import sys
from contextlib import redirect_stdout
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from manual_mlp.pipes import is_watched
from manual_mlp.tables import figure, words

SHOWN = ("val_loss", "val_accuracy", "val_r2")


class Progress(TQDMProgressBar):
    """Lightning's bar, on stderr, if somebody watches; else one short line an epoch on stdout.

    A line comes when the next epoch begins, because only then Lightning has the figures of the training.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate)
        self.watched = is_watched()
        self.ended: int | None = None  # epoch
        self.validated = False

    @property
    def is_enabled(self) -> bool:
        return self.watched and super().is_enabled

    @property
    def is_disabled(self) -> bool:
        return not self.is_enabled

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
