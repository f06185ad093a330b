"""What a run leaves to look at: its pictures, drawn from the kept net and the data, and the report that holds them."""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.func import functional_call
from torch.optim import SGD, Optimizer

import manual_mlp as mm
from manual_mlp import plots, report
from manual_mlp.checkpoint import read_checkpoint
from manual_mlp.errors import InputError, shown
from manual_mlp.report import Picture
from manual_mlp.tracing import Trace
from manual_mlp.training.data import EVALUATION_BATCH, DataModule
from manual_mlp.training.flow import ROWS, DeltaFlow, as_net_takes
from manual_mlp.training.module import MLPModule

DRAWN = 1000  # rows of the test part, at most
STAGES = 6  # of the training, at most
Stages = dict[str, dict[str, Tensor]]
"""Parameters of the net in the course of its training, by title."""


def learning_curves(folder: Path) -> Picture | None:
    """What metrics.csv in the run folder holds, left there as learning_curves.png; None without that file."""
    if not (folder / "metrics.csv").is_file():
        return None
    figure = plots.learning_curves(folder / "metrics.csv")
    png = report.png(figure)
    (folder / "learning_curves.png").write_bytes(png)
    return Picture(
        "Learning curves", "What was measured in each epoch, in training and on the validation part.", figure, png
    )


def leave_report(
    cfg: DictConfig,
    module: MLPModule,
    data: DataModule,
    trainer: L.Trainer,
    checkpoint: str | None,
    epoch: int,
    curves: Picture | None,
    facts: Mapping[str, str],
    figures: Mapping[str, float],
) -> None:
    """Write report.html into the run folder, and give TensorBoard the pictures.

    checkpoint: the one that is kept, of `epoch`, or None where the module is as it is. facts, figures: the summary's.
    """
    if checkpoint:  # after a test in other processes (ddp_spawn) this one's module is another epoch's
        module.load_state_dict(read_checkpoint(checkpoint, module.device)["state_dict"])
    module.eval()  # no dropout in its answers; Lightning has left the mode of training
    flow = next((callback for callback in trainer.callbacks if isinstance(callback, DeltaFlow)), None)  # type: ignore[attr-defined]
    trace = _trace(module, data, flow.rows if flow else ROWS)
    pictures = [curves] if curves else []
    pictures += _answers(module, data, _stages(module, flow, epoch))
    pictures += _inside(data, flow, trace)
    title = f"{facts['data'].partition(' (')[0]}, {'-'.join(map(str, module.sizes))}"
    origin = {
        "command": _command(),
        "seed": f"{cfg.seed}, for the split, the order of the rows, the first parameters and dropout",
        "device": f"{trainer.strategy.root_device}, {torch.get_num_threads()} threads",
        "versions": report.versions(),
    }
    config = OmegaConf.to_yaml(cfg, resolve=True)
    step = "" if _is_plain(module.optimizer) else f"by {facts['optimizer']}"
    dropout = module.hparams["dropout"]
    remark = f"Dropout, in training after each hidden layer with p = {dropout}, is left out." if dropout else ""
    page = report.page(title, facts, figures, pictures, trace, step, remark, origin, config)
    (Path(cfg.run_dir) / "report.html").write_text(page, encoding="utf-8")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for picture in pictures:
                logger.experiment.add_figure(picture.title, picture.figure, trainer.global_step)
            logger.experiment.flush()


def _is_plain(optimizer: partial[Optimizer] | None) -> bool:
    """Whether it is gradient descent, without momentum and the like."""
    return optimizer is not None and optimizer.func is SGD and not any({**optimizer.keywords, "lr": 0}.values())


def _command() -> str:
    """What was typed; within another program there is no command line."""
    if not HydraConfig.initialized():
        return "manual_mlp.training.run.run(cfg), with the configuration below"
    return shlex.join(["python", "train.py", *HydraConfig.get().overrides.task])


def _trace(module: MLPModule, data: DataModule, rows: int) -> Trace | None:
    """Of the first rows of the training part; None where the net is of another kind, or has hooks."""
    train = data.splits["train"]
    try:
        return mm.trace(module.net, *as_net_takes(module, (train.features[:rows], train.target[:rows])), module.loss)
    except InputError:
        return None


def _stages(module: MLPModule, flow: DeltaFlow | None, epoch: int) -> Stages:
    """At most 6, from the first ones to those that are kept."""
    early = {passed: state for passed, state in (flow.snapshots if flow else {}).items() if passed <= epoch}
    chosen = sorted(early)[-(STAGES - 1) :]
    stages = {f"after {_epochs(passed)}": early[passed] for passed in chosen}
    return stages | {f"kept, after {_epochs(epoch + 1)}": module.net.state_dict()}


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number != 1)}"


@torch.no_grad()
def _answers(module: MLPModule, data: DataModule, stages: Stages) -> Iterator[Picture]:
    """What the net answers to the test part."""
    rows, like = data.splits["test"], next(module.parameters())
    prediction = torch.cat([module(part.to(like)) for part in rows.features.split(EVALUATION_BATCH)]).float()
    yield from (_classes if data.class_names else _curves)(module, data, stages, prediction)


def _classes(module: MLPModule, data: DataModule, stages: Stages, prediction: Tensor) -> Iterator[Picture]:
    x, target = _in_units(data), data.splits["test"].target.numpy()
    answer, names = prediction.argmax(1).cpu().numpy(), [shown(name) for name in data.class_names]
    yield Picture("Confusion matrix", _in_words(target, answer, names), plots.confusion_matrix(target, answer, names))
    if data.image_shape and (answer != target).any():
        scores = prediction.cpu().numpy()
        figure = plots.worst_mistakes(x.reshape(-1, *data.image_shape), target, scores, names)
        yield Picture("Worst mistakes", "Wrong answers whose own class was furthest behind, the worst first.", figure)
    if data.input_size == 2:
        figure = plots.decision_boundary(
            _functions(module, data, stages, lambda a: a.argmax(1)), x[:DRAWN], target[:DRAWN], names
        )
        text = "The class that is answered at each place, and rows of the test part."
        yield Picture("Decision boundary", text, figure)


def _curves(module: MLPModule, data: DataModule, stages: Stages, prediction: Tensor) -> Iterator[Picture]:
    target = module.in_units(data.splits["test"].target.to(prediction)).cpu().numpy()[:DRAWN]
    if data.input_size == data.output_size == 1:
        lines = _functions(module, data, stages, lambda a: module.in_units(a)[:, 0])
        figure = plots.fitted_curve(lines, _in_units(data)[:DRAWN, 0], target[:, 0])
        yield Picture("Fitted curve", "The net's answer along its input, and rows of the test part.", figure)
    figure = plots.predicted_against_true(target.ravel(), module.in_units(prediction).cpu().numpy()[:DRAWN].ravel())
    yield Picture("Prediction and target", "Rows of the test part; those on the line are predicted rightly.", figure)


def _in_units(data: DataModule) -> np.ndarray:
    """The features of the test part as they came, before they were standardised."""
    return data.splits["test"].features.numpy() * _scale(data) + _mean(data)


def _scale(data: DataModule) -> np.ndarray:
    return np.asarray(data.feature_scale or 1.0)


def _mean(data: DataModule) -> np.ndarray:
    return np.asarray(data.feature_mean or 0.0)


def _functions(
    module: MLPModule, data: DataModule, stages: Stages, read: Callable[[Tensor], Tensor]
) -> dict[str, plots.Predict]:
    """Of each stage, features in their units ↦ what `read` makes of the prediction."""

    def answers(state: Mapping[str, Tensor], x: np.ndarray) -> np.ndarray:
        like = next(module.parameters())
        parameters = {name: value.to(like) for name, value in state.items()}
        features = torch.as_tensor((x - _mean(data)) / _scale(data)).to(like)
        return read(functional_call(module.net, parameters, (features,)).float()).cpu().numpy()

    return {title: partial(answers, state) for title, state in stages.items()}


def _in_words(target: np.ndarray, answer: np.ndarray, class_names: Sequence[str]) -> str:
    """How many are right, and the most frequent mistake."""
    text = f"Of {len(target)} rows of the test part {(answer == target).sum()} are answered rightly."
    pairs = Counter(zip(target[answer != target].tolist(), answer[answer != target].tolist(), strict=True))
    for (own, given), times in pairs.most_common(1):
        text += f" The most frequent mistake, {times} times: {class_names[given]} for {class_names[own]}."
    return text


def _inside(data: DataModule, flow: DeltaFlow | None, trace: Trace | None) -> Iterator[Picture]:
    """Weights, and what flowed through the net."""
    if trace is None:
        return
    if max(len(trace.sizes), *trace.sizes) <= plots.MAX_DRAWN:
        text = "W on the lines, orange where positive, purple where negative, the thicker the larger; b in the neurons."
        yield Picture("The net", text, plots.network(trace))
    else:
        kind = "an image" if data.image_shape else "a row"
        figure = plots.first_layer_weights(trace.weight[1].float().cpu().numpy(), data.image_shape)
        text = f"W¹, {kind} for each neuron of layer 2; orange is positive, purple negative."
        yield Picture("First-layer weights", text, figure)
    if flow is None or not flow.epochs:
        return
    first, last = min(flow.norms), max(flow.norms)
    ratio = flow.norms[first][-1] / (flow.norms[last][-1] or math.nan)
    text = (
        f"‖δ‖ of a sample by layer, on the same {len(trace.target)} rows each time. At the end that of layer {first} "
        f"is {ratio:.3g} times that of layer {last}."
    )
    yield Picture("Flow of δ", text, plots.delta_flow(flow.epochs, flow.norms))
    text = (
        "z, a and |δ| of these rows before the first step, and with the parameters that are kept; the highest bin is 1."
    )
    yield Picture("Histograms", text, plots.histograms({"before": SimpleNamespace(**flow.first), "kept": trace}))
