"""Callbacks of single experiments of the lecture: a traced step, and a sweep's δ drawn together."""

from pathlib import Path
from typing import Any

import lightning as L
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from manual_mlp.checkpoint import read_checkpoint
from manual_mlp.plots import delta_by_layer, flow
from manual_mlp.tracing import trace
from manual_mlp.training.flow import DeltaFlow
from manual_mlp.training.sweep import read_runs


class Traced(L.Callback):
    """A callback that prints `mm.trace` of the first training sample, before the first step.

    It leaves trace.md and flow.png in the run folder. Step 5 uses the optimizer's lr as LR, as plain SGD would.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        features, target = trainer.datamodule.splits["train"][:1]  # type: ignore[attr-defined] # Lightning sets it
        device, lr = pl_module.device, trainer.optimizers[0].param_groups[0]["lr"]
        target = pl_module.as_cost_takes(target.to(device))
        traced = trace(pl_module.net, features.to(device), target, pl_module.loss, lr)
        folder = Path(trainer.default_root_dir)
        (folder / "trace.md").write_text(traced.to_markdown() + "\n")
        flow(traced).savefig(folder / "flow.png")
        print(f"\n{traced}\n")


class DeltaByLayer(Callback):
    """A callback that draws deltas.png at the end of a sweep: ‖δ^l‖ against l before the first step, for each run."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        norms = {}
        for run in read_runs(folder):
            content = read_checkpoint(folder / run.name / "last.ckpt")
            recorded = content["callbacks"][DeltaFlow.__qualname__]["norms"]
            norms[", ".join(run.settings.values())] = {layer: values[0] for layer, values in recorded.items()}
        delta_by_layer(norms).savefig(folder / "deltas.png")
        print(f"\npicture of δ by layer: {folder / 'deltas.png'}")
