"""Runs that are killed and continued, forked off one process that has imported everything.

`python -m tests.killed FOLDER MODE=MOMENT,… …` runs to the end, then kills a run at every moment given, goes on from
last.ckpt, and compares what is left with the run that was never killed. A moment is `event:count`, or `time:share` of
the time that the whole run took, or `end`, where nobody kills it. MORE holds more overrides.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch.loggers import CSVLogger

from manual_mlp import checkpoint
from manual_mlp.training import run as training
from manual_mlp.training import strategies
from manual_mlp.training.module import MLPModule
from tests.configs import configured

RUN = ["data=iris", "trainer.max_epochs=4", "model.dropout=0.2", "optimizer=adam", "threads=1"]
EXTRA = {"engine": ["data.batch_size=2"]}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(file: int) -> None:
    os.ftruncate(file, os.fstat(file).st_size // 2)
    die()


def at(count: int, before: Callable[..., None], function: Callable) -> Callable:
    """The function, but at its call number `count` the other one first."""
    calls = iter(range(1, sys.maxsize))

    def counted(*arguments: object, **options: object) -> object:
        if next(calls) == count:
            before(*arguments)
        return function(*arguments, **options)

    return counted


def arm(event: str, count: int) -> None:
    """Kill this process at the count-th training step, row logged, or checkpoint: half or wholly written, or named."""
    if event == "step":
        MLPModule.training_step = at(count, die, MLPModule.training_step)
    elif event == "row":
        CSVLogger.save = at(count, die, CSVLogger.save)
    elif event == "half":
        checkpoint.os.fsync = at(2 * count - 1, half_written, os.fsync)
    elif event == "whole":
        checkpoint.os.fsync = at(2 * count - 1, die, os.fsync)
    elif event == "named":
        checkpoint.os.fsync = at(2 * count, die, os.fsync)


def forked(folder: Path, overrides: list[str], moment: str = "", duration: float = 0.0) -> tuple[int, float]:
    """Run in a process of its own, to its end or to the moment → its status, and the seconds it took."""
    event, _, count = moment.partition(":")
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if count and event != "time":
                arm(event, int(count))
            training.run(configured(folder, *overrides))
            status = 0
        finally:
            os._exit(status)
    if event == "time":
        time.sleep(float(count) * duration)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], time.perf_counter() - started


def outcome(folder: Path) -> list[object]:
    """What a run leaves: its figures, its parameters and the optimizer's state, bit for bit."""
    left: list[object] = [(folder / "metrics.csv").read_bytes()]
    for name in ("best.ckpt", "last.ckpt"):
        content = checkpoint.read_checkpoint(folder / name)
        left.append([content["epoch"], content["figures"], _bytes(content["state_dict"])])
        left.append(_bytes(content["optimizer_states"]))
        left.append(_bytes(content["continuation"]["random"]))
    return left


def _bytes(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bytes(item) for key, item in value.items()}
    return [_bytes(item) for item in value] if isinstance(value, list | tuple) else value


def main(folder: Path, mode: str, moments: list[str]) -> None:
    """Kill, go on and compare, once for each moment; where a moment is `a+b`, go on once more after b."""
    overrides = [*RUN, f"backprop={mode}", *EXTRA.get(mode, []), *shlex.split(os.environ.get("MORE", ""))]
    status, duration = forked(folder / mode / "whole", overrides)
    assert status == 0
    expected = outcome(folder / mode / "whole")
    for moment in moments:
        place = folder / mode / moment
        for part in moment.split("+"):
            status, _ = forked(place, going_on(place, overrides), part, duration)
            came = status == 0 if part == "end" else part.startswith("time") or os.WIFSIGNALED(status)
            assert came, f"{mode} {moment}: never came"
        status, _ = forked(place, going_on(place, overrides))
        assert status == 0, f"{mode}, killed at {moment}: can't go on"
        assert outcome(place) == expected, f"{mode}, killed at {moment}: another end"
        print(f"{mode} {moment}: the same end", flush=True)


def going_on(folder: Path, overrides: list[str]) -> list[str]:
    last = folder / "last.ckpt"
    return [*overrides, f"ckpt_path='{last}'"] if last.exists() else overrides


if __name__ == "__main__":
    torch.set_num_threads(1)
    strategies.MOST_BATCHES = 16  # of the engine's training step, so that an epoch has several
    training.learning_curves = lambda *given: SimpleNamespace(savefig=lambda *arguments, **options: None)
    for words in sys.argv[2:]:
        one, _, moments_of_it = words.partition("=")
        main(Path(sys.argv[1]), one, moments_of_it.split(","))
