"""End a sweep (`train.py -m …`): its best run is tested, and all are compared in a table, a CSV and a figure."""

import csv
import json
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from manual_mlp import tables
from manual_mlp.errors import shown
from manual_mlp.training.config import explain
from manual_mlp.training.folder import FIGURES

log = logging.getLogger(__name__)

WIDTH = 80
SHOWN = 30  # rows of a printed table
NARROWEST = 15  # columns in which settings are worth wrapping


class Run(NamedTuple):
    """One run of a sweep. settings: its overrides, as written. error: one sentence if it failed, else empty."""

    name: str
    settings: dict[str, str]
    metric: str
    figures: dict[str, float]
    error: str

    @property
    def value(self) -> float:
        return self.figures.get(self.metric, nan)

    @property
    def changed(self) -> str:
        """Return the settings in which the runs of a sweep differ, as in "seed=1, model.activation=relu"."""
        return ", ".join(f"{key}={value}" for key, value in self.settings.items())


class Comparison(Callback):
    """A callback that ends a sweep: it tests the best run, and compares all in a table, sweep.csv and sweep.png.

    No other run is tested: whoever chooses by the test part has no test left. A run's figures are read from its folder,
    because launchers may run it in another process or on another machine. A run that fails on a user error prints its
    message and is marked failed; the sweep continues.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.started = time.time() - 1  # older results in the same folder are another sweep's

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        if (sentence := explain(job_return._return_value)) is not None:
            print("Error: " + shown(sentence, keep="\n"), file=sys.stderr)
            path = Path(config.hydra.runtime.output_dir, FIGURES)
            kept = path.parent / ".hydra" / "overrides.yaml"  # without it the table would lack a run refused early
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(OmegaConf.to_yaml(config.hydra.overrides.task))
            path.write_text(json.dumps({"metric": config.optimized_metric, "figures": {}, "error": sentence}))
            job_return.return_value, job_return.status = None, JobStatus.COMPLETED  # Optuna drops a run without a value

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder, minimize = Path(config.hydra.sweep.dir), minimized(config)
        if order := ranked(read_runs(folder, self.started), minimize):
            _test(folder, order[0])
        runs = read_runs(folder, self.started)
        if len(runs) < 2:
            return
        order = ranked(runs, minimize)
        settings = list(dict.fromkeys(name for run in runs for name in run.settings))
        write_csv(folder / "sweep.csv", runs, settings)
        print(table(runs, order, min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)))
        files = "sweep.csv"
        if order and settings:
            from manual_mlp.plots import sweep_figure  # brings matplotlib, which a mistyped option need not wait for

            figure = sweep_figure(folder / "sweep.csv", settings, order[0].metric, order[0].name)
            figure.savefig(folder / "sweep.png", dpi=120)
            files += "  sweep.png"
        print(f"\nfiles in {config.hydra.sweep.dir}\n  {files}\n")
        if OmegaConf.select(config, "closing"):
            from manual_mlp.training.closing import closing_of_sweep  # brings Lightning

            print(textwrap.fill(closing_of_sweep(config.closing, folder, [run for run in runs if run in order]), WIDTH))
        if failed := sum(bool(run.error) for run in runs):
            sys.exit(f"Error: {failed} of the {len(runs)} runs failed; their reasons stand above and in sweep.csv")


def _test(folder: Path, best: Run) -> None:
    """Test a run by its kept checkpoint, as it was configured, and add to its figures.

    If the sweep was decided by a figure of the test, each run has been tested.
    """
    if best.metric.startswith("test_"):
        return
    from manual_mlp.training import run  # brings Lightning

    print(f"\nThe best run, {best.name}, is tested; the others are not:")
    own = folder / best.name
    run.quieten()
    logging.disable(logging.INFO)  # no file takes Lightning's messages now that the runs are over
    try:
        cfg = cast(DictConfig, OmegaConf.load(own / ".hydra" / "config.yaml"))
        cfg.task, cfg.run_dir, cfg.ckpt_path = "test", str(own), str(own / "best.ckpt")
        cfg.logger, cfg.callbacks, cfg.trainer.enable_progress_bar = {}, {}, False  # which would write to the folder
        with run.in_words(cfg):
            figures = run.tested(cfg)
    except Exception as error:  # of any kind: the runs are compared all the same
        sentence = explain(error)
        print(f"not tested: {shown(sentence or f'{type(error).__name__}: {error}', keep=chr(10))}")
        if sentence is None:
            log.error("The best run was not tested.", exc_info=True)
        return
    finally:
        logging.disable(logging.NOTSET)
    left = json.loads((own / FIGURES).read_text())
    (own / FIGURES).write_text(json.dumps({**left, "figures": left["figures"] | figures}, indent=2))


def read_runs(folder: Path, started: float = 0.0) -> list[Run]:
    """Return the runs under `folder` that began after `started` (seconds since 1970), numbered ones in their order.

    Settings that all runs share are left out.
    """
    runs = []
    for path in folder.rglob(".hydra/overrides.yaml"):
        if path.stat().st_mtime < started:
            continue
        found = path.parents[1] / FIGURES
        complete = found.exists() and found.stat().st_mtime >= started
        left = json.loads(found.read_text()) if complete else {"error": "it did not end"}
        left = {"metric": "", "figures": {}, "error": ""} | left
        words = (str(override).partition("=") for override in OmegaConf.load(path))
        settings, name = {key.lstrip("+"): value for key, _, value in words}, str(path.parents[1].relative_to(folder))
        runs.append(Run(name, settings, left["metric"], left["figures"], left["error"]))
    shared = set.intersection(*({*run.settings.items()} for run in runs)) if runs else set()
    runs.sort(key=lambda run: (not run.name.isdigit(), run.name.zfill(9)))
    return [run._replace(settings=dict(item for item in run.settings.items() if item not in shared)) for run in runs]


def ranked(runs: Sequence[Run], minimize: bool | None = None) -> list[Run]:
    """Return the runs that have a figure, the best first. minimize: by default, as the metric's name says."""
    finite = [run for run in runs if isfinite(run.value)]
    if minimize is None:
        minimize = any(run.metric.endswith(tables.ERRORS) for run in finite)
    return sorted(finite, key=lambda run: run.value if minimize else -run.value)


def minimized(config: DictConfig) -> bool | None:
    """Return what Optuna's direction says; None for another sweeper."""
    direction = OmegaConf.select(config, "hydra.sweeper.direction")
    return direction and getattr(direction, "name", direction) == "minimize"


def write_csv(path: Path, runs: Sequence[Run], settings: Sequence[str]) -> None:
    """Write one row for each run: its name, its settings, all its figures, its error."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *settings, *_figures(runs), "error"], restval="")
        writer.writeheader()
        writer.writerows({"run": run.name, **run.settings, **run.figures, "error": run.error} for run in runs)


def table(runs: Sequence[Run], order: Sequence[Run], width: int = WIDTH) -> str:
    """Return a line for each run: settings, the metric, then as many other figures as fit in `width` columns.

    `*` marks the best. order: the runs as `ranked`; if there are very many, only the best are shown. Settings that are
    too wide for a column each share one.
    """
    metric = next((run.metric for run in runs if run.metric), "")
    many, best = len(runs) > SHOWN and order, order[0] if order else None
    rows = order[:SHOWN] if many else runs
    first = ["  run", *(f"{'*' if run is best else ' '} {run.name}" for run in rows)]
    values = [metric, *("failed" if run.error else tables.figure(metric, run.value) for run in rows)]
    columns = [first, *_settings(rows, width - _width([first, values])), values]
    others = [name for part in ("val", "test", "train") for name in _figures(runs) if name.startswith(part)]
    for name in (name for name in others if name != metric):
        cells = [name, *(tables.figure(name, run.figures.get(name)) for run in rows)]
        columns += [cells] * (_width([*columns, cells]) <= width)
    title = f"sweep of {len(runs)} runs" + (f", the best {len(rows)}" if many else "")
    return "\n".join(["", title + (f" (* best {metric})" if best else ""), "", _printed(columns)])


def _figures(runs: Sequence[Run]) -> dict[str, None]:
    return dict.fromkeys(name for run in runs for name in run.figures)


def _settings(runs: Sequence[Run], width: int) -> list[list[str]]:
    """Return a column for each setting; if that is too wide, one column for all of them, wrapped."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    last = [name.rpartition(".")[2] for name in names]
    short = {name: name if last.count(end) > 1 else end for name, end in zip(names, last, strict=True)}
    columns = [[short[name], *(_digits(run.settings.get(name, "")) for run in runs)] for name in names]
    if _width(columns) <= width:
        return columns
    texts = [", ".join(f"{short[name]}={_digits(value)}" for name, value in run.settings.items()) for run in runs]
    return [["settings", *("\n".join(textwrap.wrap(text, max(width, NARROWEST))) for text in texts)]]


def _digits(value: str) -> str:
    """Return a number in four digits, which are enough to compare: Optuna draws 17."""
    try:
        return min(value, f"{float(value):.4g}", key=len)
    except ValueError:
        return shown(value)


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Return the width of a printed table and of the gap before its next column."""
    return tables.width(_printed(columns)) + 2


def _printed(columns: Sequence[Sequence[str]]) -> str:
    return tables.text(zip(*columns, strict=True), indent="")
