"""The pictures of a run, drawn from the kept net and the data, and the report that holds them."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from sklearn.inspection import permutation_importance  # type: ignore[import-untyped]
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, r2_score  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

import manual_mlp as mm
from manual_mlp import plots, report
from manual_mlp.errors import InputError, shown
from manual_mlp.report import Picture
from manual_mlp.shell import command, from_here
from manual_mlp.tracing import Trace, up
from manual_mlp.training.callbacks import ROWS, DeltaFlow
from manual_mlp.training.closing import Run
from manual_mlp.training.config import in_sweep
from manual_mlp.training.continuing import Continuation
from manual_mlp.training.data import EVALUATION_BATCH, DataModule
from manual_mlp.training.module import MLPModule

FEW = 20  # classes and columns with a line or a figure of their own
DRAWN = 1000  # rows of the test part, at most
STAGES, SEEN = 6, 0.02  # of the training, at most; how far its answers are from those of any other stage, at least
Stages = dict[str, dict[str, Tensor]]
"""Parameters of the net in the course of its training, by title."""


def learning_curves(folder: Path, kept: int) -> Picture | None:
    """Draw metrics.csv of the run folder, and leave learning_curves.png there; return None without that file."""
    if not (folder / "metrics.csv").is_file():
        return None
    figure = plots.learning_curves(folder / "metrics.csv", kept)
    (folder / "learning_curves.png").write_bytes(report.png(figure))
    text = "What was measured in each epoch: in training a mean over the epoch, on the validation part after it."
    return Picture("Learning curves", text, figure)


def leave_report(run: Run, curves: Picture | None, facts: Mapping[str, str]) -> None:
    """Write report.html into the run folder, and give TensorBoard the pictures. facts: the summary's."""
    cfg, module, data, trainer = run.cfg, run.module, run.data, run.trainer
    module.eval()  # no dropout in its answers: Lightning has left it in training mode
    flow, went_on = run.callback(DeltaFlow), run.callback(Continuation)
    trace = _trace(module, data, flow.rows if flow else ROWS)
    pictures = [curves] if curves else []
    answers = _Answers(module, data, _stages(module, flow, run.epoch))
    pictures += [*(answers.to_classes() if data.class_names else answers.to_numbers()), *_inside(data, flow, trace)]
    origin = {
        "command": _command(),
        "seed": f"{cfg.seed}, for the split, the order of the rows, the first parameters and dropout",
        "device": f"{trainer.strategy.root_device}, {torch.get_num_threads()} threads",
        "versions": report.versions(),
    }
    if went_on and went_on.changed:
        names = ", ".join(dict.fromkeys(went_on.changed))
        origin["but"] = f"the run went on with other values of {names}, so the command gives another net"
    title = f"{facts['data'].partition(' (')[0]}, {'-'.join(map(str, module.sizes))}"
    optimizer, dropout = module.optimizer, module.hparams["dropout"]
    plain = optimizer and optimizer.func is SGD and not any({**optimizer.keywords, "lr": 0}.values())
    step = "" if plain else f"by {facts['optimizer']}"
    remark = f"The formulas are those of member 0 of {module.members}. " if module.members > 1 else ""
    remark += f"Dropout, in training after each hidden layer with p = {dropout}, is left out." if dropout else ""
    config = _shareable(OmegaConf.to_yaml(cfg, resolve=True), cfg.run_dir)
    facts = {**facts, **answers.by_class(), **answers.importance()}
    page = report.page(title, facts, run.figures, pictures, trace, step, remark, origin, config)
    (run.folder / "report.html").write_text(page, encoding="utf-8")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for picture in pictures:
                logger.experiment.add_figure(picture.title, picture.figure, trainer.global_step)
            logger.experiment.flush()


def _shareable(config: str, folder: str) -> str:
    """Return the configuration without the folders of this machine: of an absolute path its name is left."""
    return re.sub(r"(?<![\w.:/$}])/(?:[^\s'\"/]+/)*([^\s'\"/]+)", r"…/\1", config.replace(str(folder), "."))


def _command() -> str:
    """Return what gives this net from nothing. Within another program there is no command line."""
    if not HydraConfig.initialized():
        return "manual_mlp.training.run.run(cfg), with the configuration below"
    hydra = HydraConfig.get()
    own = [word for word in hydra.overrides.task if not word.startswith("ckpt_path=")]
    alone = ["hydra.mode=RUN"] if hydra.sweeper.get("params") else []  # of a preset that sweeps, this run
    return command(*(from_here(word, hydra.runtime.cwd) for word in own), *alone, shared=True)


def _trace(module: MLPModule, data: DataModule, rows: int) -> Trace | None:
    """Trace the first rows of the training part; return None if the net is of another kind, or has hooks."""
    train = data.splits["train"]
    for layer in module.one_net.modules():  # the formulas of the training, but for dropout
        layer.train(not isinstance(layer, nn.Dropout))
    try:
        return mm.trace(module.one_net, *module.as_net_takes(train.features[:rows], train.target[:rows]), module.loss)
    except InputError:
        return None
    finally:
        module.eval()


def _stages(module: MLPModule, flow: DeltaFlow | None, epoch: int) -> Stages:
    """Return all stages that are known: that before the training first, the kept one last."""
    early = {at: state for at, state in sorted(flow.snapshots.items()) if at <= epoch} if flow else {}
    stages = {f"after {_epochs(at)}" if at else "before training": state for at, state in early.items()}
    return stages | {f"kept, after {_epochs(epoch + 1)}": module.net.state_dict()}


def _telling(stages: dict[str, plots.answers.Predict], x: np.ndarray) -> dict[str, plots.answers.Predict]:
    """Return at most 6 stages: the first, the last, and others whose answers at x differ most from all chosen."""
    answers = {title: predict(x) for title, predict in stages.items()}
    titles = list(answers)
    scale = np.ptp(answers[titles[-1]]) or 1.0

    def news(title: str) -> float:
        apart = [np.abs(answers[title] - answers[other]) for other in chosen]
        return min(float((gap != 0).mean() if gap.dtype.kind == "i" else gap.mean() / scale) for gap in apart)

    chosen = {titles[0], titles[-1]}
    while len(chosen) < min(STAGES, len(titles)) and news(best := max(titles, key=news)) > SEEN:
        chosen.add(best)
    return {title: stages[title] for title in titles if title in chosen}


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number != 1)}"


class _Answers:
    """Yield the net's answers to the test part, in a sweep to the validation part, now and at earlier stages."""

    @torch.no_grad()
    def __init__(self, module: MLPModule, data: DataModule, stages: Stages) -> None:
        self.module, self.data, self.stages, self.like = module, data, stages, next(module.parameters())
        self.mean, self.scale = np.asarray(data.feature_mean or 0.0), np.asarray(data.feature_scale or 1.0)
        part, self.part = ("val", "validation") if in_sweep() else ("test", "test")  # a sweep tests its winner alone
        self.features, self.target = data.splits[part].features, data.splits[part].target
        self.x = self.features.numpy() * self.scale + self.mean  # as they came, before they were standardised
        parts = self.features.split(EVALUATION_BATCH)
        self.prediction = torch.cat([module(part.to(self.like)) for part in parts]).float()

    def by_stage(self, read: Callable[[Tensor], Tensor]) -> dict[str, plots.answers.Predict]:
        """Return for each telling stage: features in their units ↦ what `read` makes of the prediction."""

        @torch.no_grad()
        def answers(state: Mapping[str, Tensor], x: np.ndarray) -> np.ndarray:
            parameters = {name: value.to(self.like) for name, value in state.items()}
            features = torch.as_tensor((x - self.mean) / self.scale).to(self.like)
            return read(functional_call(self.module.net, parameters, (features,)).float()).cpu().numpy()

        return _telling({title: partial(answers, state) for title, state in self.stages.items()}, self.x[:DRAWN])

    def by_class(self) -> dict[str, str]:
        """Return precision and recall of each class, a line each, if they are few."""
        names = self.data.class_names
        if not 0 < len(names) <= FEW:
            return {}
        answer, labels = self.prediction.argmax(1).cpu().numpy(), range(len(names))
        found = precision_recall_fscore_support(self.target.numpy(), answer, labels=labels, zero_division=0.0)
        text = "precision {:.1f} %, recall {:.1f} %, {} {} rows"
        return {
            f"class {shown(name)}": text.format(100 * precision, 100 * recall, rows, self.part)
            for name, precision, recall, _, rows in zip(names, *found, strict=True)
        }

    def importance(self) -> dict[str, str]:
        """Return how much worse the net answers if a column is permuted, the most first."""
        names, target = self.data.feature_names, self.target[:DRAWN].numpy()
        if not 0 < len(names) <= plots.answers.MAX_NEURONS:
            return {}
        score, metric = (accuracy_score, "accuracy") if self.data.class_names else (r2_score, "r2")

        @torch.no_grad()
        def scored(_: object, x: np.ndarray, y: np.ndarray) -> float:
            answer = self.module(torch.as_tensor(x).to(self.like)).float().cpu()
            return float(score(y, answer.argmax(1) if self.data.class_names else answer))

        features, trained = self.features[:DRAWN].numpy(), SimpleNamespace(fit=self.module)
        found = permutation_importance(trained, features, target, scoring=scored, random_state=0)
        order = np.argsort(-found.importances_mean, kind="stable")
        listed = ", ".join(f"{shown(names[place])} {found.importances_mean[place]:.3f}" for place in order[:FEW])
        return {"importance": f"{listed}: {metric} lost on the {self.part} part if the column is permuted"}

    def to_classes(self) -> Iterator[Picture]:
        data, target, answer = self.data, self.target.numpy(), self.prediction.argmax(1).cpu().numpy()
        names = [shown(name) for name in data.class_names]
        text = f"Rows of the {self.part} part: how many of each class got which answer."
        yield Picture("Confusion matrix", text, plots.confusion_matrix(target, answer, names))
        if data.image_shape and (answer != target).any():
            images, scores = self.x.reshape(-1, *data.image_shape), self.prediction.cpu().numpy()
            text = "Wrong answers, the worst first: the true class had a much lower score."
            yield Picture("Worst mistakes", text, plots.worst_mistakes(images, target, scores, names))
        if data.input_size == 2:
            regions = self.by_stage(lambda a: a.argmax(1))
            text = f"The net's answer at each place, and rows of the {self.part} part."
            figure = plots.decision_boundary(regions, self.x[:DRAWN], target[:DRAWN], names, data.feature_names)
            yield Picture("Decision boundary", text, figure)

    def to_numbers(self) -> Iterator[Picture]:
        values, in_units = (self.target.to(self.prediction), self.prediction), self.module.in_units
        target, answer = (in_units(rows[:DRAWN]).cpu().numpy() for rows in values)
        if self.data.input_size == self.data.output_size == 1:
            lines = self.by_stage(lambda a: in_units(a)[:, 0])
            text = f"The net's answer along its input, and rows of the {self.part} part."
            figure = plots.fitted_curve(lines, self.x[:DRAWN, 0], target[:, 0], self.data.feature_names)
            yield Picture("Fitted curve", text, figure)
        text = f"Rows of the {self.part} part; those on the line are predicted rightly."
        yield Picture("Prediction and target", text, plots.predicted_against_true(target.ravel(), answer.ravel()))


def _inside(data: DataModule, flow: DeltaFlow | None, trace: Trace | None) -> Iterator[Picture]:
    """Yield the weights, and what flowed through the net."""
    if trace is None:
        return
    is_small = max(len(trace.sizes), *trace.sizes) <= plots.graph.MAX_DRAWN
    if is_small and all(a.dim() == 2 for a in trace.a.values()):
        units = "in standardised units" if data.feature_mean else "in the units of the data"
        text = f"W on the lines, orange where positive, purple where negative, {units}; b in the neurons."
        yield Picture("The net", text, plots.network(trace))
    else:
        first = min(trace.weight)
        weight, shape = trace.weight[first].float().cpu(), data.image_shape
        kind = "an image" if shape else "a row"
        each = f"{kind} for each neuron"
        if weight.dim() > 2:
            each, shape = "a kernel for each channel", weight.shape[2:]
        text = f"W{up(first)}, {each} of layer {first + 1}; orange is positive, purple negative."
        figure = plots.first_layer_weights(weight.flatten(1).numpy(), shape, data.feature_names)
        yield Picture("First-layer weights", text, figure)
    if flow is None or not flow.epochs:
        return
    text = f"‖δ‖ of a sample by layer, on the same {len(trace.target)} rows each time."
    yield Picture("Flow of δ", text, plots.delta_flow(flow.epochs, flow.norms))
    text = "z, a, |δ| of these rows before the first step, and with the parameters that are kept; the highest bin is 1."
    yield Picture("Histograms", text, plots.histograms({"before": SimpleNamespace(**flow.first), "kept": trace}))
