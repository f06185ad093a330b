"""Write the few lines that end a run: what was trained, how well, where the files lie. At most 60 columns."""

import os
import textwrap
from functools import partial
from pathlib import Path

import lightning as L
from torch.optim import Adam

from manual_mlp import tables
from manual_mlp.errors import shown
from manual_mlp.training.data import DataModule
from manual_mlp.training.module import MLPModule
from manual_mlp.training.readers import listed, quoted

WIDTH = 60
IMBALANCED = 1.5  # times as many rows in the largest class as in the smallest are worth a line
MARGIN = 0.05  # a net that got less of the way from the largest class's share to 100 % has learned nothing
FILES = (  # in a run's folder
    *("best.ckpt", "last.ckpt", "metrics.csv", "figures.json", "learning_curves.png", "report.html"),
    *("trace.md", "flow.png", "tensorboard", "train.log", ".hydra"),
)


def summary(module: MLPModule, data: DataModule, facts: dict[str, str], figures: dict[str, float], metric: str) -> str:
    """Return the lines. facts: from `run_facts`. figures: by name, such as test_accuracy. metric: the returned one."""
    lines = [_wrapped(f"  {name:<12}", text) for name, text in facts.items()]
    lines += ["", _table({name: figures[name] for name in module.figure_names() if name in figures})]
    lines += [f"  {'returned':<12}{metric} {figures[metric]:.6g}"] if metric in figures else []
    return "\n".join(["", *lines, *_hint(module, data, figures)])


def run_facts(
    module: MLPModule, data: DataModule, trainer: L.Trainer, epoch: int, seconds: float | None
) -> dict[str, str]:
    """Return what was trained on what, by name. epoch: the one whose parameters are kept, counted from 0.

    seconds: of the training; None if there was none.
    """
    rows = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    threshold, lr = module.output_activation == "threshold", module.optimizer and module.optimizer.keywords.get("lr")
    facts = {
        "data": f"{Path(str(data.name)).name} ({rows})",
        "left out": f"{listed(data.left_out)}: an index, or without a name" if data.left_out else "",
        **data.said,
        "key": _key(data),
        "classes": _imbalance(data, module) if data.class_names else "",
        "net": "-".join(map(str, module.sizes)) + f", {_activations(module)}",
        "members": f"{module.members}, best epochs {module.net.best_epochs()}" if module.members > 1 else "",
        "parameters": f"{sum(parameter.numel() for parameter in module.parameters()):,}",
        "cost": "share of mistakes" if threshold else module.loss,
        "optimizer": f"none, LR {lr}" if threshold else module.optimizer_in_words() if module.optimizer else "",
        "scheduler": module.scheduler["scheduler"].func.__name__ if module.scheduler else "",
        "backprop": str(module.hparams["backprop"]) + (f" ({road})" if (road := module.backprop.road) else ""),
        "epochs": _epochs(epoch, trainer.current_epoch - 1, seconds),
    }
    return {name: shown(text) for name, text in facts.items() if text}


def _key(data: DataModule) -> str:
    if not data.raw or data.raw.key is None:
        return ""
    return quoted(data.raw.key) + ", which repeats" * data.raw.repeated


def files(folder: Path) -> str:
    """List the files in the run's folder; nothing if there are none."""
    names = [name for name in FILES if (folder / name).exists()]
    where = os.path.relpath(folder)
    heading = f"files in {shown(folder if where.startswith('..') else where)}"
    return "\n".join(["", heading, _wrapped("  ", "  ".join(names)), ""]) if names else ""


def _epochs(epoch: int, last: int, seconds: float | None) -> str:
    if seconds is None:
        return f"checkpoint of {epoch}"
    text = f"best {epoch}" if epoch >= 0 else "none completed"
    # last is not known where the training ran in processes that have ended (ddp_spawn)
    return text + (f" of 0 to {last}" if last >= epoch >= 0 else "") + f", in {seconds:.1f} s"


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


def _hint(module: MLPModule, data: DataModule, figures: dict[str, float]) -> list[str]:
    """Return what to try if the training failed; nothing if it did not."""
    if data.class_names:
        share = data.splits["train"].target.bincount().max().item() / len(data.splits["train"])
        failed = figures.get("train_accuracy", 1.0) < share + MARGIN * (1 - share)
        reason = f"always guessing the largest class gives {100 * share:.2f} %"
    else:
        failed, reason = figures.get("val_r2", 0.0) < 0, "always guessing the mean gives r2 0"
    if not failed or module.optimizer is None:
        return []
    advice = module.lower_lr() + ("" if module.optimizer.func is Adam else " or use optimizer=adam")
    if module.output_activation == "threshold":
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
