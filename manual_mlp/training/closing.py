"""Write what a run says at its end: a summary of at most 60 columns, its files, the sentence that ends a preset.

A preset names its sentence by `closing`, such as `closing: xor`: what was to be seen, whether it was, and in which
picture; all from the run itself. A new one is a function of the run and an entry in CLOSINGS, or of the runs of a sweep
and an entry in SWEEPS.
"""

import csv
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Adam

from manual_mlp import tables
from manual_mlp.checkpoint import read_checkpoint
from manual_mlp.errors import shown
from manual_mlp.plots import delta_by_layer
from manual_mlp.tables import ERRORS
from manual_mlp.training.callbacks import Traced
from manual_mlp.training.data import DataModule
from manual_mlp.training.module import MLPModule
from manual_mlp.training.strategies import choose

WIDTH = 60
MARGIN = 0.05  # a net that got less of the way from the largest class's share to 100 % has learned nothing
IMBALANCED = 1.5  # times as many rows in the largest class as in the smallest are worth a line
FILES = (  # in a run's folder
    *("best.ckpt", "last.ckpt", "metrics.csv", "figures.json", "learning_curves.png", "report.html"),
    *("trace.md", "flow.png", "tensorboard", "train.log", ".hydra"),
)
CLOSE = 0.1  # of the spread around a line: two lines nearer than that are one
ALIKE = 0.05  # accuracies that differ by less are as good as each other
NIELSEN = 0.9542  # chapter 1, 784-30-10 at its best
IN_REPORT = "report.html, "
C = TypeVar("C", bound=L.Callback)


class Run(NamedTuple):
    """A run at its end.

    module: with the kept parameters, those of `epoch`, counted from 0. seconds: of the training; None if there was
    none. figures: by name, such as test_accuracy.
    """

    cfg: DictConfig
    module: MLPModule
    data: DataModule
    trainer: L.Trainer
    epoch: int
    seconds: float | None
    figures: Mapping[str, float]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run_dir)

    @property
    def accuracy(self) -> float:
        return self.figures["test_accuracy"]

    @property
    def classifies(self) -> bool:
        return bool(self.data.class_names)

    @property
    def is_perceptron(self) -> bool:
        return self.module.output_activation == "threshold"

    @property
    def mistakes(self) -> int | None:
        """Return how many mistakes a perceptron made from w = 0 on; None if metrics.csv lacks some of them."""
        path = self.folder / "metrics.csv"
        if not (self.is_perceptron and path.is_file() and self.trainer.limit_train_batches == 1):
            return None
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train_loss")]
        if [row["epoch"] for row in rows] != [*map(str, range(self.trainer.current_epoch))]:  # some lie elsewhere
            return None
        return sum(round(float(row["train_loss"]) * len(self.data.splits["train"])) for row in rows)

    @property
    def traced(self) -> Any:
        """Return the callback Traced, if there is one."""
        return self.callback(Traced)

    def callback(self, kind: type[C]) -> C | None:
        """Return the run's callback of a kind, if it has one."""
        return next((own for own in self.trainer.callbacks if isinstance(own, kind)), None)  # type: ignore[attr-defined]


def summary(run: Run, facts: Mapping[str, str]) -> str:
    """Return what was trained, how well, and what to try if that failed. facts: from `run_facts`."""
    figures, metric = run.figures, run.cfg.optimized_metric
    lines = [_wrapped(f"  {name:<12}", text) for name, text in facts.items()]
    lines += ["", _table({name: figures[name] for name in run.module.figure_names() if name in figures})]
    lines += [f"  {'returned':<12}{metric} {figures[metric]:.6g}"] if metric in figures else []
    return "\n".join(["", *lines, *_hint(run)])


def run_facts(run: Run) -> dict[str, str]:
    """Return what was trained on what, by name."""
    module, data = run.module, run.data
    rows = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    lr = module.optimizer and module.optimizer.keywords.get("lr")
    facts = {
        "data": f"{Path(str(data.name)).name} ({rows})",
        **data.said,
        "classes": _imbalance(data, module) if data.class_names else "",
        "net": "-".join(map(str, module.sizes)) + f", {_activations(module)}",
        "members": f"{module.members}, best epochs {module.net.best_epochs()}" if module.members > 1 else "",
        "parameters": f"{sum(parameter.numel() for parameter in module.parameters()):,}",
        "cost": "share of mistakes" if run.is_perceptron else module.loss,
        "optimizer": f"none, LR {lr}" if run.is_perceptron else module.optimizer_in_words() if module.optimizer else "",
        "scheduler": module.scheduler["scheduler"].func.__name__ if module.scheduler else "",
        "backprop": str(module.hparams["backprop"]) + (f" ({road})" if (road := module.backprop.road) else ""),
        "epochs": _epochs(run),
    }
    return {name: shown(text) for name, text in facts.items() if text}


def files(folder: Path) -> str:
    """List the files in the run's folder; nothing if there are none."""
    names = [name for name in FILES if (folder / name).exists()]
    where = os.path.relpath(folder)
    heading = f"files in {shown(folder if where.startswith('..') else where)}"
    return "\n".join(["", heading, _wrapped("  ", "  ".join(names)), ""]) if names else ""


def _epochs(run: Run) -> str:
    if run.seconds is None:
        return f"checkpoint of {run.epoch}"
    last = run.trainer.current_epoch - 1  # not known where the training ran in processes that have ended (ddp_spawn)
    text = f"best {run.epoch}" if run.epoch >= 0 else "none completed"
    return text + (f" of 0 to {last}" if last >= run.epoch >= 0 else "") + f", in {run.seconds:.1f} s"


def _imbalance(data: DataModule, module: MLPModule) -> str:
    """Return the shares of the largest and the smallest training class; nothing if they are about equal."""
    counts = data.splits["train"].target.bincount(minlength=len(data.class_names))
    (most, greatest), (least, smallest) = (getattr(counts, end)(0) for end in ("max", "min"))
    if most < IMBALANCED * least:
        return ""
    ends = ((most, greatest), (least, smallest))
    shares = [f"{100 * n / counts.sum():.1f} % {data.class_names[i]}" for n, i in ends]
    if data.class_weight:
        shares.append("weighted by data.class_weight")
    elif module.loss in module.backprop.weighted:
        shares.append("data.class_weight=balanced weights them equally")
    return ", ".join(shares)


def _activations(module: MLPModule) -> str:
    hidden = module.hparams["activation"]
    names = hidden if isinstance(hidden, str) else "-".join(hidden)
    words = [names] * (len(module.sizes) > 2) + ["residual"] * bool(module.hparams["residual"])
    words += ["batch norm"] * module.hparams["batch_norm"]
    if channels := module.hparams["channels"]:
        kernel = module.hparams["kernel"]
        words.append(f"convolutions {'-'.join(map(str, channels))} of {kernel}×{kernel}")
    return ", ".join([*words, f"output {module.output_activation}"])


def _hint(run: Run) -> list[str]:
    """Return what to try if the training failed; nothing if it did not."""
    module = run.module
    if run.classifies:
        share = _guess(run, "train")
        failed = run.figures.get("train_accuracy", 1.0) < share + MARGIN * (1 - share)
        reason = f"always guessing the largest class gives {100 * share:.2f} %"
    else:
        failed, reason = run.figures.get("val_r2", 0.0) < 0, "always guessing the mean gives r2 0"
    if not failed or module.optimizer is None:
        return []
    advice = module.lower_lr() + ("" if module.optimizer.func is Adam else " or use optimizer=adam")
    if run.is_perceptron:
        advice = "if no straight line separates the classes, use model=mlp"
    return ["", _wrapped("  ", f"hint: {reason}; {advice}")]


def _table(figures: dict[str, float]) -> str:
    """Return a line for each part, such as train cost and train accuracy; more lines where 60 columns are too few."""
    cells: dict[str, list[str]] = {}
    for name, value in figures.items():
        cells.setdefault(name.partition("_")[0], []).extend((tables.words(name), tables.figure(name, value)))
    printed = ""
    for most in range(max(map(len, cells.values()), default=0), 0, -2):
        rows = [part[at : at + most] for part in cells.values() for at in range(0, len(part), most)]
        printed = tables.text([row + [""] * (most - len(row)) for row in rows], gap=" ")
        if tables.width(printed) <= WIDTH:
            break
    return printed


def _wrapped(indent: str, text: str) -> str:
    filled = partial(textwrap.fill, break_on_hyphens=False, break_long_words=False)
    return filled(text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _signed(number: float) -> str:
    return f"{'−' if number < 0 else '+'} {abs(number):.2f}"


def _score(run: Run) -> str:
    """Compare with the answer that needs no net: the largest class, or the mean."""
    if not run.classifies:
        r2 = run.figures["test_r2"]
        beaten = "better than" if r2 > 0 else "no better than"
        return f"Of the variance of the test part the net explains {_percent(r2)}, {beaten} always guessing the mean"
    guess = _guess(run)
    beaten = "beside" if run.accuracy > guess else "no more than"
    return f"The net answers {_percent(run.accuracy)} of the test part rightly, {beaten} {_percent(guess)} by a guess"


def _guess(run: Run, part: str = "test") -> float:
    """Return the share of the largest class in a part."""
    return run.data.splits[part].target.bincount().max().item() / len(run.data.splits[part])


def _line(run: Run) -> str:
    """Compare the line of a linear neuron with that of least squares, both in the units of the data."""
    data, (w, b) = run.data, (p.item() for p in run.module.one_net.parameters())
    (mean,), (scale,) = data.feature_mean or [0.0], data.feature_scale or [1.0]
    (target_mean,), (target_scale,) = data.target_mean, data.target_scale
    rows = data.splits["train"]
    x, y = rows.features.numpy().ravel() * scale + mean, rows.target.numpy().ravel() * target_scale + target_mean
    slope = target_scale * w / scale
    intercept = target_mean + target_scale * b - slope * mean
    best = np.polyfit(x, y, 1)
    apart, spread = (np.linalg.norm(line - np.polyval(best, x)) for line in (slope * x + intercept, y))
    lines = f"y = {slope:.2f} x {_signed(intercept)}; least squares {best[0]:.2f} x {_signed(best[1])}: "
    return lines + ("the neuron found that line" if apart < CLOSE * spread else "the neuron is not there yet")


def _logistic(run: Run) -> str:
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    parts = (run.data.splits["train"], run.data.splits["test"])
    train, test = ((rows.features.numpy(), rows.target.numpy()) for rows in parts)
    best = LogisticRegression().fit(*train).score(*test)
    text = f"A straight boundary answers {_percent(run.accuracy)} of the test part rightly, scikit-learn's logistic "
    alike = abs(run.accuracy - best) < ALIKE
    return f"{text}regression {_percent(best)}: " + ("about the same line" if alike else "not the same line")


def _perceptron(run: Run) -> str:
    mistakes = run.figures["train_loss"]
    if mistakes == 0:
        return f"From epoch {run.epoch} on the rule makes no mistake: it converged, as the Convergence Theorem says"
    text = f"Even in its best epoch, {run.epoch}, the rule makes mistakes on {_percent(mistakes)} of the rows: "
    ends = _allowed_mistakes(run) < math.inf
    return text + ("it has not converged" if ends else "no straight line separates them, so it never settles")


def _allowed_mistakes(run: Run) -> float:
    rows = run.data.splits["train"]
    return most_mistakes(rows.features, rows.target[:, None])


def most_mistakes(x: Tensor, target: Tensor) -> float:
    """Return (R/γ)² of the rows (x, 1), after which a perceptron makes no mistake; inf if no plane separates them.

    x (N, n_1), target (N, 1) of zeros and ones. w is the point of the hull of ±(x, 1) that is nearest to 0. Any w that
    separates the rows gives a valid bound; this one gives the smallest.
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    signed = torch.cat([x, torch.ones_like(x[:, :1])], 1).double() * (2 * target - 1)
    R = signed.norm(dim=1).max()
    system = torch.cat([signed.t() / R, torch.ones(1, len(x))]).numpy()
    w = signed.t() @ torch.from_numpy(nnls(system, [0.0] * x.shape[1] + [0.0, 1.0])[0])
    γ = (signed @ (w / w.norm())).min()
    return (R / γ).item() ** 2 if γ > 0 else math.inf


def _perceptron_theorem(run: Run) -> str:
    most = _allowed_mistakes(run)
    text = f"The rule made {run.mistakes} mistakes"
    if most == math.inf:
        return f"{text}: no straight line separates these rows, so the theorem promises no end"
    end = "and then no more" if run.figures["train_loss"] == 0 else "so far"
    held = "as the theorem says" if (run.mistakes or 0) <= most else "which contradicts the theorem"
    return f"{text} {end}, where the theorem allows (R/γ)² = {most:.0f}: {held}"


def _xor(run: Run) -> str:
    hidden = "-".join(map(str, run.module.sizes[1:-1]))
    seen = "the hidden layer separates" if run.accuracy > 0.95 else "the hidden layer does not separate"
    text = f"The net answers {_percent(run.accuracy)} of the test part rightly, a straight line about 75 % at best: "
    return text + f"{seen} XOR" if hidden else text + "without a hidden layer XOR stays unsolved"


def _chain(run: Run) -> str:
    before, after = run.traced.costs
    rows = "row" if run.traced.rows == 1 else f"{run.traced.rows} rows"
    moved = "lowered" if after < before else "did not lower"
    text = f"The traced first step {moved} C of its {rows} ({before:.4f}, then {after:.4f})"
    return f"{text}; at the end the curve explains {_percent(run.figures['val_r2'])} of the variance"


def _nielsen(run: Run) -> str:
    text = f"The net answers {_percent(run.accuracy)} of the test part rightly, Nielsen's at its best "
    return f"{text}{_percent(NIELSEN)}: " + ("as announced" if run.accuracy > NIELSEN - 0.01 else "not there yet")


def _lenet(run: Run) -> str:
    """Count the weights that convolutions share, and those of dense layers between the same numbers."""
    image, *blocks, _ = run.module.one_net.eval().convolutions
    a, dense = image(run.data.splits["test"].features[:1].to(next(run.module.parameters()))), 0
    for block in blocks:
        dense += a.numel() * block[0](a).numel()
        a = block(a)
    shared = sum(block[0].weight.numel() for block in blocks)
    norms = {layer: values[-1] for layer, values in recorded(run.folder).items() if layer > 2}  # 2 is the image itself
    reached = f"; δ of the first is {_share(norms):.2g} of that of the last layer" if norms else ""
    text = f"{_score(run)}. The {len(blocks)} convolutions have {shared:,} weights, dense layers would have {dense:,}"
    learned = run.accuracy > _guess(run) + ALIKE
    return f"{text}{reached}: " + ("so few learn to see" if learned else "this training does not show that they learn")


class Closing(NamedTuple):
    """A sentence, the picture that shows the same, and the runs that it fits: a preset can be changed."""

    sentence: Callable[[Run], str]
    picture: str
    fits: Callable[[Run], bool]


CLOSINGS = {
    "chain": Closing(_chain, "flow.png", lambda run: run.traced is not None and not run.classifies),
    "digits": Closing(_score, f"{IN_REPORT}Confusion matrix", lambda run: run.classifies),
    "lenet": Closing(
        _lenet, f"{IN_REPORT}Flow of δ", lambda run: run.classifies and bool(run.module.hparams["channels"])
    ),
    "linear_neuron": Closing(_line, f"{IN_REPORT}Fitted curve", lambda run: run.module.sizes == [1, 1]),
    "logistic_neuron": Closing(
        _logistic, f"{IN_REPORT}Decision boundary", lambda run: run.classifies and len(run.module.sizes) == 2
    ),
    "nielsen": Closing(_nielsen, f"{IN_REPORT}Worst mistakes", lambda run: run.classifies),
    "nielsen_fashion": Closing(_score, f"{IN_REPORT}Worst mistakes", lambda run: run.classifies),
    "perceptron": Closing(_perceptron, "learning_curves.png", lambda run: run.is_perceptron),
    "perceptron_theorem": Closing(_perceptron_theorem, "learning_curves.png", lambda run: run.mistakes is not None),
    "regression": Closing(_score, f"{IN_REPORT}Prediction and target", lambda run: not run.classifies),
    "xor": Closing(_xor, f"{IN_REPORT}Decision boundary", lambda run: run.classifies and not run.is_perceptron),
}


def _approximator(folder: Path, runs: Sequence[Any]) -> str:
    """Compare the first width with the one that came nearest to the curve."""
    first, last = runs[0], min(runs, key=lambda run: run.value)
    if len(runs) < 2 or first.settings.keys() != {"model.hidden"} or not first.metric.endswith(ERRORS):
        return ""
    text = f"{first.metric} falls from {first.value:.3g} with {first.changed} to {last.value:.3g} with {last.changed}: "
    seen = "the wider, the nearer" if last.value < first.value / 2 else "no width has met the curve yet"
    return f"{text}{seen} (sweep.png)."


def first_norms(folder: Path, run: Any) -> dict[int, float]:
    """Return {l: ‖δ^l‖} before the first step of a run of a sweep, as DeltaFlow has recorded it; {} if it has not."""
    return {layer: values[0] for layer, values in recorded(folder / run.name).items()}


def recorded(folder: Path) -> dict[int, list[float]]:
    """Return {l: ‖δ^l‖ of each record} of the run in a folder; {} if DeltaFlow was not there."""
    path = folder / "last.ckpt"
    states = read_checkpoint(path)["callbacks"] if path.is_file() else {}
    return states.get("DeltaFlow", {"norms": {}})["norms"]


def _share(norms: Mapping[int, float]) -> float:
    """Return what is left of δ at the first layer, as a share of that at the last."""
    return norms[min(norms)] / (norms[max(norms)] or math.nan)


def _vanishing(folder: Path, runs: Sequence[Any]) -> str:
    """Compare, of the deepest nets, the one whose δ shrinks most on its way to the first layer and that of the least.

    Leaves deltas.png: ‖δ^l‖ before the first step against l, for each run that has recorded it.
    """
    norms = {run.name: first_norms(folder, run) for run in runs}
    if any(norms.values()):
        drawn = {run.changed: norms[run.name] for run in runs if norms[run.name]}
        delta_by_layer(drawn).savefig(folder / "deltas.png")
    depths = [int(run.settings.get("layers", 0)) for run in runs]
    deepest = max(depths, key=lambda depth: (depths.count(depth) > 1, depth))
    runs = [run for run, depth in zip(runs, depths, strict=True) if depth == deepest]
    if len(runs) < 2 or not all("val_accuracy" in run.figures and norms[run.name] for run in runs):
        return ""
    most, least = (end(runs, key=lambda run: _share(norms[run.name])) for end in (min, max))
    shares = [_share(norms[run.name]) for run in (most, least)]
    accuracies = [run.figures["val_accuracy"] for run in (most, least)]
    first, second = (
        f"with {shown(run.changed)} (accuracy {_percent(accuracy)})"
        for run, accuracy in zip((most, least), accuracies, strict=True)
    )
    learned = shares[0] < shares[1] and accuracies[0] < accuracies[1] - ALIKE
    part = f"{shares[0]:.1g}" if shares[0] else "0 (in float32)"
    text = f"δ of the first layer is {part} of that of the last {first}, and {shares[1]:.1g} {second}: "
    seen = "where δ vanishes, the net does not learn" if learned else "this training does not show more"
    return f"{text}{seen} (deltas.png)."


# Each ends a sweep with its sentence and the picture that shows the same, or with "" if its runs can't be compared so.
SWEEPS: dict[str, Callable[[Path, Sequence[Any]], str]] = {
    "universal_approximator": _approximator,
    **dict.fromkeys(("batch_norm", "deep_sigmoid", "pretraining", "residual"), _vanishing),
}


def closing_of_sweep(name: str | None, folder: Path, runs: Sequence[Any]) -> str:
    """Return the sentence of a preset that sweeps; "" for none, or if the preset was changed so that it doesn't fit.

    A preset about δ also leaves deltas.png in the folder.
    runs: those with a figure, in their order, each with `name`, `settings`, `changed`, `metric`, `value` and `figures`.
    """
    return SWEEPS[name](folder, runs) if name in SWEEPS and runs else ""


def closing(run: Run) -> str:
    """Return the sentence of a preset with its picture; "" for none."""
    name = run.cfg.closing
    if name is None or name in SWEEPS or not {"test_accuracy", "test_r2"} & run.figures.keys():
        return ""
    chosen = choose(name, CLOSINGS | SWEEPS, "closing")
    if not chosen.fits(run):
        return f"The preset was changed. {_score(run)}."
    where = chosen.picture if run.cfg.report else chosen.picture.replace(IN_REPORT, "report=true draws it: ")
    return f"{chosen.sentence(run)} ({where})."
