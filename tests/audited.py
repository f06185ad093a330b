"""Checkpoints and run folders with one value changed, and what the program does with each, under an audit hook.

`python -m tests.audited FOLDER CHECKPOINTS OVERRIDES [PLANTED]` makes the inputs whose numbers two ranges such as 0:150
give, and prints a JSON of how they ended. Each input is a function of its number, so a find can be made again. The hook
sees what happens, whoever does it: files opened, removed and made, imports, code run, processes, sockets.
PLANTED: a name in `PLANTS`, protections to take away first.
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from torch import Tensor

import manual_mlp as mm
from manual_mlp import InputError, checkpoint, plots
from manual_mlp.training import command_line, continuing
from manual_mlp.training import run as training
from manual_mlp.training.callbacks import WholeFiles
from manual_mlp.training.command_line import with_its_own_overrides
from manual_mlp.training.config import explain
from manual_mlp.training.module import MLPModule
from manual_mlp.training.predict import Predictor
from tests.configs import ROOT, configured

RUNS = {  # real ones, small
    "adam": ["data=iris", "optimizer=adam", "scheduler=plateau", "callbacks=early_stopping"],
    "network": ["data=diabetes", "backprop=network", "optimizer=sgd", "optimizer.momentum=0.9", "scheduler=cosine"],
    "engine": ["data=iris", "backprop=engine", "optimizer=adamw", "scheduler=step", "scheduler.interval=step",
               "model.hidden=[5,4]", "model.activation=[relu,tanh]", "model.dropout=0.1", "model.loss=cross_entropy"],
    "perceptron": ["data=halves", "model=perceptron", "optimizer=sgd", "callbacks.best.monitor=train_loss"],
}  # fmt: skip
LENET = ["data=digits", "data.standardise=true", "model.channels=[2,3]", "model.kernel=3", "model.batch_norm=true"]
CHANGED = {  # what is configured otherwise where the run goes on
    "adam": ["scheduler.patience=7", "callbacks.early_stopping.patience=9"],
    "network": ["scheduler=plateau"],
    "engine": ["scheduler=cosine", "scheduler.interval=step"],
    "perceptron": ["callbacks.best.monitor=val_loss"],
    "lenet": ["callbacks.best.monitor=train_loss"],
}
SHARED = ["data.batch_size=150", "threads=1", "native=false"]
SECONDS = 30  # that one input may take

# ---------------------------------------------------------------------------------------------------------------------
# The hook
# ---------------------------------------------------------------------------------------------------------------------

FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "urllib.", "http.", "ftplib.", "pty.", "webbrowser.", "shutil.rmtree")
FORBIDDEN += ("exec", "compile", "import", "marshal.", "code.", "os.system", "os.exec", "os.fork")
FORBIDDEN += ("os.kill", "os.posix_spawn", "os.spawn", "os.startfile", "os.chmod", "os.chown", "os.symlink", "os.link")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "shutil.", "tempfile.")
LOOKS = ("os.listdir", "os.scandir", "glob.glob")
MAY_BE_READ = [ROOT, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev/null", "/usr"]


class Hook:
    """While `own` is set, records what happens outside of that folder, and anything that runs code or calls others.

    What runs from checkpoints as they are do, such as looking for the class of an optimizer, is learned before.
    """

    def __init__(self) -> None:
        self.own: str | None = None
        self.learns, self.usual = True, set[str]()
        self.readable = [os.path.realpath(path) for path in MAY_BE_READ]
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.own is None:
            return
        own, self.own = self.own, None  # what the hook does itself does not count
        try:
            if self.is_wrong(event, arguments, own):
                self.seen.append(f"{event} {arguments!r}"[:300])
                raise RuntimeError(f"the audit hook forbids {event} {arguments!r}"[:300])
        finally:
            self.own = own

    def is_wrong(self, event: str, arguments: tuple, own: str) -> bool:
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            return not self.inside(path, [own] if writes else [own, *self.readable])
        if event.startswith(LOOKS):
            return not self.inside(arguments[0], [own, *self.readable])
        if event == "compile" and is_formatted():
            return False
        if event == "os.kill" and arguments[1] == 0:  # it asks whether a process lives
            return False
        if event.startswith(FORBIDDEN):
            usual = f"{event} {arguments[0].co_qualname if event == 'exec' else arguments[0]}"
            self.usual |= {usual} if self.learns else set()
            return usual not in self.usual
        return event.startswith(CHANGES) and not all(
            self.inside(path, [own]) for path in arguments if isinstance(path, str | bytes | os.PathLike)
        )

    @staticmethod
    def inside(path: Any, folders: list[str]) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):  # a descriptor, which was a path before
            return True
        parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        real = os.path.join(os.path.realpath(parent), name)
        return any(real == folder or real.startswith(folder + os.sep) for folder in folders)


def is_formatted() -> bool:
    """Return True while Python formats a traceback for the log: it parses its own lines to mark a part of them."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename != traceback.__file__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


HOOK = Hook()
INSTALLED: list[Hook] = []  # a process can't take it away again


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint with one value changed
# ---------------------------------------------------------------------------------------------------------------------


class Call:
    """Calls a function when unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def paths(folder: Path) -> list[str]:
    """Texts that a program might follow. The folder has a folder `sub`, beside it lies another, `beside`."""
    beside = folder.parent / "beside"
    return [
        f"{folder}/../beside", f"{folder}/sub", "sub", "../beside", f"{beside}", f"{beside}/kept.ckpt", "..", "/",
        "~", "", f"{folder}/../beside/kept.ckpt", f"file://{beside}", "http://127.0.0.1:9/best.ckpt", "https://host.invalid/x",
        "s3://bucket/x", "memory://x", f"zip://x::{beside}/kept.ckpt", "/dev/zero", "/etc/passwd", "best.ckpt",
        f"{folder}/metrics.csv", "/old/place/best.ckpt", "\\\\host\\share", "x" * 5000, "a\0b", "\x1b[31m", "\ud800",
    ]  # fmt: skip


def values(folder: Path, draw: random.Random) -> Any:
    """A value of any kind."""
    beside = folder.parent / "beside"
    whole = [0, 1, -1, 2, 3, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 2**70, 10**5000]
    parts = [0.0, 0.5, -1.0, 1e-300, 1e308, math.nan, math.inf, -math.inf]
    texts = ["abc", "sigmoid", "0", "-m", "=1+1", "__class__", "{0}", "%s", "val_loss", "\n", *paths(folder)]
    nothing = [None, True, False, [], (), {}, [[]], [None], {"a": 1}, {0: 0}, [1, 2, 3], ["a", "b", "c"], (1,)]
    tensors = [
        lambda: torch.tensor(0.5), lambda: torch.tensor(3), lambda: torch.zeros(0), lambda: torch.zeros(3),
        lambda: torch.full((3,), math.nan), lambda: torch.zeros(2, 2), lambda: torch.ones(2, dtype=torch.bool),
        lambda: torch.zeros(3, dtype=torch.float64), lambda: torch.zeros(3, dtype=torch.float16),
        lambda: torch.zeros(1).expand(10**5, 10**5), lambda: torch.zeros(5056, dtype=torch.uint8),
        lambda: torch.randint(0, 256, (5056,), dtype=torch.uint8), lambda: torch.zeros(3).to_sparse(),
        lambda: torch.zeros(2, dtype=torch.complex64), lambda: torch.zeros(10**6, 10**6, device="meta"),
        lambda: torch.nn.Parameter(torch.zeros(3)),
    ]  # fmt: skip
    others = [OrderedDict(a=1), Counter("aab"), b"abc", bytearray(3), {1, 2}, 1j, torch.Size([3]), torch.float64]
    others += [torch.device("cpu"), slice(1), range(3), Path("x"), ..., torch.nn.Linear(1, 1), InputError("x")]
    calls = [
        Call(os.system, f"touch {beside}/made"), Call(os.mkdir, f"{beside}/made"), Call(eval, "open('/etc/passwd')"),
        Call(shutil.rmtree, str(beside)), Call(__import__, "this"), Call(torch.load, f"{beside}/kept.ckpt"),
        Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"), Call(partial, os.remove, "x"),
        Call(os.kill, os.getpid(), signal.SIGTERM), Call(sys.exit, 0), Call(print, "run"), Call(bytearray, 10**9),
    ]  # fmt: skip
    value = draw.choice(draw.choice([whole, parts, texts, texts, nothing, tensors, tensors, others, calls]))
    return value() if value in tensors else copy.copy(value) if isinstance(value, list | dict) else value


def alike(value: Any, draw: random.Random) -> Any:
    """A value near another one."""
    if isinstance(value, Tensor):
        return draw.choice([
            value.double(), value.half(), value.long(), value[None], value.flatten(), value.flatten()[:-1], -value,
            value * math.nan if value.is_floating_point() else value + 1, value.flatten()[:1].expand(value.numel()),
            value.flatten().flip(0), torch.cat([value.flatten()] * 2), value.tolist(), torch.zeros_like(value),
        ]) if value.numel() else torch.zeros(1)  # fmt: skip
    if isinstance(value, bool) or value is None:
        return draw.choice([not value, int(bool(value)), str(value), [value]])
    if isinstance(value, int | float):
        return draw.choice([value + 1, -value, value * 10**6, float(value), str(value), [value], torch.tensor(value)])
    if isinstance(value, str):
        return draw.choice([value + "x", value[:-1], value[::-1], value.upper(), [value], value.encode(), value * 100])
    if isinstance(value, list | tuple):
        return draw.choice([value[:-1], value * 2, value[::-1], [value], dict(enumerate(value)), (*value, None), None])
    items = list(value.items())
    return draw.choice([items, list(value), [value], {**value, "more": 1}, dict(items[:-1])])


KEYS = [
    "hparams_type", "hparams_name", "module_arguments", "datamodule_hparams_name", "native_amp_scaling_state", "step",
    "optimizer", "get_lr", "__class__", "__dict__", "state_dict", "load_state_dict", "MixedPrecision", "dirpath", "f",
    "trainer", "hyper_parameters", "best_k_models", "epoch_loop", "params", "lr", "fused", "more", 0, 7, "a/b", "",
]  # fmt: skip


def places(tree: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container somewhere in a tree, the way to it being drawn, and a key of it."""
    while True:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(min(len(tree), 8)))
        below = tree[key]
        if not isinstance(below, dict | list) or not below or draw.random() < 0.1:
            return tree, key
        tree = below


def changed(content: dict[str, Any], folder: Path, draw: random.Random) -> str:
    """Change one value of a checkpoint; a text, wherever it stands. Returns what was done."""
    place, key = places(content, draw)
    kind = draw.choice(["value", "value", "value", "alike", "alike", "drop", "add", "swap", "text", "text"])
    if kind == "text":
        old, new = draw.choice(sorted(_texts(content))), draw.choice(paths(folder))
        _replace(content, old, new)
        for state in content["callbacks"].values():  # so bad a score that the next one is better
            far = {name: torch.tensor(9.0) for name in state.get("best_k_models", ())}
            state.update({"best_k_models": far, "kth_value": torch.tensor(9.0)} if far else {})
        return f"{old!r} becomes {new!r}"
    if kind == "value":
        place[key] = values(folder, draw)
    elif kind == "alike":
        place[key] = alike(place[key], draw)
    elif kind == "drop":
        del place[key]
    elif kind == "add" and isinstance(place, dict):
        key = draw.choice(KEYS)
        place[key] = values(folder, draw)
    else:
        other, at = places(content, draw)
        place[key], other[at] = other[at], place[key]
    return f"{kind} at {key!r}"


def _texts(tree: Any) -> set[str]:
    if isinstance(tree, dict):
        return {text for pair in tree.items() for part in pair for text in _texts(part)}
    if isinstance(tree, list | tuple):
        return {text for part in tree for text in _texts(part)}
    return {tree} if isinstance(tree, str) and ("/" in tree or tree.endswith(".ckpt")) else set()


def _replace(tree: Any, old: str, new: str) -> None:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if value == old if isinstance(value, str) else False:
            tree[key] = new
        elif isinstance(value, dict | list):
            _replace(value, old, new)
        if key == old:
            tree[new] = tree.pop(old)


# ---------------------------------------------------------------------------------------------------------------------
# The overrides of a run folder with one value changed
# ---------------------------------------------------------------------------------------------------------------------


def words(folder: Path) -> list[str]:
    """Overrides that a folder may hold, many of which only the user may decide."""
    beside = folder.parent / "beside"
    return [
        "data=wine", "data=nowhere", "data=/etc/passwd", "data=table", "data.source.path=http://[::1]/",
        "data.source._target_=builtins.eval", f"data.source.path={beside}/kept.csv", "data.batch_size=7", "seed=-1",
        "data.seed=[1]", "model.hidden=[7]", "model.hidden=[999999999]", "model._target_=os.system", "seed=1",
        "native=true", "model.native=auto",
        "backprop=engine", "model.activation=${oc.decode:'[relu]'}", "optimizer=adam",
        "optimizer._target_=torch.optim.Rprop", "threads=2", "+optimizer.more=1", "optimizer.lr=1,2",
        "+callbacks.e._target_=sympy.sympify", "experiment=xor", "report=true",
        "+callbacks.e.a='__import__(\"os\").system(\"touch x\")'", "+metrics.f._target_=torchmetrics.F1Score",
        "metrics={a:{_target_:os.getcwd}}", f"callbacks.best.dirpath={beside}", "callbacks.best.filename='../x'",
        "callbacks.lr_finder.min_lr=1", "~logger", "trainer.max_epochs=2", "trainer.precision=64-true",
        "trainer.profiler=simple", "trainer.logger._target_=os.system", f"trainer.default_root_dir={beside}",
        f"logger.csv.save_dir={beside}", "logger.mlflow.tracking_uri=http://127.0.0.1:9",
        f"run_dir={beside}", "input=/etc/passwd", "output=${oc.env:HOME}/x.csv", "task=predict",
        "ckpt_path=/etc/passwd", f"hydra.run.dir={beside}", "hydra.mode=MULTIRUN", "hydra.job.chdir=true",
        f"hydra.searchpath=[{beside}]", "hydra/launcher=joblib", "hydra.job.env_set.PYTHONSTARTUP=x",
        "hydra.output_subdir=../../beside", "hydra.callbacks.c._target_=os.system",
    ]  # fmt: skip


DOCUMENTS = [
    "5", "a: 1", "- [1]", "- {_target_: os.getcwd}", "- &a [*a]", "[" * 400, "- a=" + "[" * 1200, "- a=" + "9" * 5000,
    "- !!python/object/apply:os.system [touch x]", "- !!python/name:os.system", "- !include /etc/passwd", "", "\x00",
    '- "a=\\0"', "- data=iris\n" * 2000, "%YAML 9.9\n---\n- a=1\n...\n-", "- data=iris\n---\n- data=wine\n",
]  # fmt: skip
VALUES = [
    "",
    "null",
    "nan",
    "[]",
    "{}",
    "[1,{a:2}]",
    "${seed}",
    "???",
    "'",
    "a=b",
    "[[[",
    "{_target_:os.getcwd}",
    "1e999",
]
FLAGS = """hydra:
  job: {config_name: config}
  runtime:
    config_sources: [{path: hydra.conf, schema: pkg, provider: hydra}, {path: conf, schema: file, provider: main}]
"""


def damaged(text: bytes, draw: random.Random) -> bytes:
    """A text with some characters left out, and others in their place."""
    at = draw.randrange(len(text))
    other = draw.choice(
        [b"", b"\n", b"'", b"[", b"$", b"\xff", b"=", b"/", b": ", b"- ", b"&a", b"+", b"\0", b"{", b"!!"]
    )
    return text[:at] + other + text[at + draw.choice([0, 1, 1, 2, 9]) :]


def text_of(own: list[str], folder: Path, draw: random.Random) -> bytes:
    """The text of an overrides.yaml with one word, one key, one value or some characters changed."""
    own = [*own]
    at, kind = draw.randrange(len(own)), draw.choice(["word", "word", "word", "key", "value", "bytes", "document"])
    key, _, value = own[at].partition("=")
    if kind == "document":
        return draw.choice(DOCUMENTS).encode(errors="surrogatepass")
    if kind == "word":
        own.insert(at, draw.choice(words(folder)))
    elif kind == "key":
        own[at] = draw.choice(
            [f"+{own[at]}", f"++{own[at]}", f"~{key}", f"{key}._target_=os.getcwd", f"{key}@a={value}"]
        )
    elif kind == "value":
        own[at] = f"{key}={draw.choice([*VALUES, *paths(folder)])}"
    text = yaml.safe_dump(own).encode(errors="surrogatepass")
    return damaged(text, draw) if kind == "bytes" else text


def check_words(given: list[str], taken: list[str], own: Path) -> None:
    """Assert that what a folder added is a plain value for a plain key, or its own folder."""
    for word in [word for word in taken if word not in given]:
        key, _, value = word.partition("=")
        if key == "hydra.run.dir":
            assert os.path.realpath(value.strip("'")) == os.path.realpath(own), word
        else:
            assert re.fullmatch(r"(hydra\.mode|(?!hydra)[\w.]+)", key), word
            assert not re.search(r"_target_|[/\\$~:()!*{}]|\.\.", value), word


# ---------------------------------------------------------------------------------------------------------------------
# What the program does with it
# ---------------------------------------------------------------------------------------------------------------------


class Base:
    """A finished run, and the configurations of what may follow from its checkpoint."""

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.kept, self.folder = name, place / name, place / "run"
        self.words = words = [*RUNS.get(name, LENET), *SHARED]
        training.run(configured(self.folder, *words, "trainer.max_epochs=1"))
        self.folder.rename(self.kept)  # to be copied back, once for each input
        (self.kept / ".hydra").mkdir()
        (self.kept / "sub").mkdir()
        (self.kept / "sub" / "kept").touch()
        self.content = (self.kept / "last.ckpt").read_bytes()
        inputs = torch.load(io.BytesIO(self.content), weights_only=True)["DataModule"]
        names = inputs["feature_names"] or [f"x{index}" for index in range(len(inputs["feature_mean"]))]
        (self.kept / "rows.csv").write_text("\n".join([",".join(names)] + 3 * [",".join("1" for _ in names)]) + "\n")
        self.tasks = {
            task: configured(self.folder, *words, *more, f"ckpt_path={self.folder}/last.ckpt")
            for task, more in {
                "train": ["trainer.max_epochs=2"],
                "change": ["trainer.max_epochs=2", *CHANGED[name]],
                "test": ["task=test"],
                "predict": ["task=predict", f"input={self.folder}/rows.csv"],
            }.items()
        }

    def follow(self, task: str) -> None:
        """Do what a user does with a checkpoint: by train.py, and in a program."""
        path = self.folder / "last.ckpt"
        training.run(OmegaConf.create(self.tasks[task]))
        if task == "predict":
            kind: Any = mm.LeNet if "model.kernel=3" in self.words else mm.MLP
            kind.from_checkpoint(path)
            Predictor.from_checkpoint(path)
            MLPModule.load_from_checkpoint(path)


def checkpoint_of(number: int, bases: list[Base]) -> tuple[Callable[[], None], str]:
    """Write input `number` → what to do with it, and what was changed."""
    draw, base = random.Random(number), bases[number % len(bases)]
    torch.manual_seed(number)
    shutil.rmtree(base.folder, ignore_errors=True)
    shutil.copytree(base.kept, base.folder)
    content = torch.load(io.BytesIO(base.content), weights_only=True)
    what = changed(content, base.folder, draw)
    torch.save(content, base.folder / "last.ckpt")
    return partial(base.follow, draw.choice(["train", "train", "change", "test", "predict"])), what


def overrides_of(number: int, bases: list[Base]) -> tuple[Callable[[], None], str]:
    """Write the overrides of input `number` → what to do with them, and what they are."""
    draw, base = random.Random(number), bases[number % len(bases)]
    shutil.rmtree(base.folder, ignore_errors=True)
    shutil.copytree(base.kept, base.folder)
    text, hydra = text_of([*base.words, "trainer.max_epochs=1"], base.folder, draw), FLAGS.encode()
    (base.folder / ".hydra" / "overrides.yaml").write_bytes(text)
    (base.folder / ".hydra" / "hydra.yaml").write_bytes(damaged(hydra, draw) if draw.random() < 0.2 else hydra)
    given = [
        f"ckpt_path={base.folder}/last.ckpt",
        *draw.choice([["trainer.max_epochs=2"], ["task=test"], ["task=predict"]]),
    ]
    runs = draw.random() < 0.15

    def do() -> None:
        taken = with_its_own_overrides(given)
        check_words(given, taken, base.folder)
        if runs and "task=predict" not in given:
            shipped = [word for word in taken if not word.startswith("hydra.")]
            try:
                training.run(configured(base.folder, *shipped, "trainer.max_epochs=2", "threads=1", "report=false"))
            except Exception as error:
                raise InputError(explain(error) or repr(error)) from error

    return do, repr(text[:300])


def ended(do: Callable[[], None], own: Path) -> str:
    """Do it under the hook → taken, refused, or a traceback."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    HOOK.own = os.path.realpath(own)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            do()
        return "taken"
    except InputError as error:
        text = str(error)
        plain = text.startswith("expected ") and len(text) < 20_000 and not set(text) & {"\x1b", "\0"}
        return "refused" if plain else f"no plain sentence: {text!r}"
    except BaseException:
        HOOK.own = None
        return traceback.format_exc(limit=-4)
    finally:
        HOOK.own = None
        signal.alarm(0)


def believe_paths() -> None:
    """S2, S3: take the paths of a checkpoint as they stand, and let Lightning remove what they name."""
    continuing.Continuation._check_callbacks = lambda *_: None
    WholeFiles.remove_checkpoint = TorchCheckpointIO.remove_checkpoint


def believe_overrides() -> None:
    """S1: take whatever a folder holds."""
    command_line.is_plain = lambda word: True
    globals()["check_words"] = lambda *_: None


def believe_objects() -> None:
    """Let torch make what a file names."""
    checkpoint._check_archive = lambda file: file.seek(0)
    load = torch.load
    torch.load = lambda *arguments, **options: load(*arguments, **{**options, "weights_only": False})


PLANTS = {"paths": believe_paths, "overrides": believe_overrides, "objects": believe_objects}


COUNTED = ("taken", "refused")


def read_curves(folder: Path, *kept: int) -> None:
    """Read what the program draws, and leave out the drawing, which takes longer than all else."""
    plots.course._read(folder / "metrics.csv")


def audit(place: Path, of_checkpoints: range, of_overrides: range, runs: Iterable[str], planted: str = "") -> dict:
    """Make these inputs from these runs → how many ended how, what should not have happened, and what it cost."""
    if HOOK not in INSTALLED:
        sys.addaudithook(HOOK)
        INSTALLED.append(HOOK)
    outcomes, finds = Counter[str](), []
    (place / "beside").mkdir()
    (place / "beside" / "kept.ckpt").touch()
    with contextlib.redirect_stdout(io.StringIO()):
        bases = [Base(name, place) for name in runs]
    HOOK.learns = True
    str(InputError("\x1b"))  # escaped by a codec that is imported then
    for base in bases:
        for task in base.tasks:
            shutil.copytree(base.kept, base.folder, dirs_exist_ok=True)
            end = ended(partial(base.follow, task), base.folder)
            assert end == "taken" or (task, base.name) == ("predict", "perceptron"), end
    for number in range(-20, 0):  # what Hydra imports
        ended(overrides_of(number, bases)[0], place / "run")
    assert not HOOK.seen, HOOK.seen
    HOOK.learns = False
    PLANTS.get(planted, lambda: None)()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for make, number in [*((checkpoint_of, n) for n in of_checkpoints), *((overrides_of, n) for n in of_overrides)]:
        do, changes = make(number, bases)
        end = ended(do, place / "run")
        outcomes[f"{make.__name__} {end if end in COUNTED else 'wrong'}"] += 1
        if HOOK.seen or end not in COUNTED:
            finds.append({"number": number, "changes": changes, "seen": HOOK.seen, "end": end})
            HOOK.seen = []
    left = sorted(str(path.relative_to(place)) for path in (place / "beside").rglob("*"))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return {"outcomes": outcomes, "finds": finds, "left": left, "memory": memory}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    training.learning_curves = read_curves
    numbers = [range(*map(int, words.split(":"))) for words in sys.argv[2:4]]
    print(json.dumps(audit(Path(sys.argv[1]).resolve(), *numbers, RUNS, *sys.argv[4:])))
