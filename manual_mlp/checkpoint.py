"""Checkpoints, with torch alone: written whole or not at all, and read as data, whoever wrote them.

`SCHEMA` declares what a checkpoint may hold. It is checked as the file is read: before a net is built, before anything
that the file names is looked for.
"""

import math
import os
import pickle
import pickletools
import random
import re
import reprlib
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.shapes import COUNTER, Shapes, declared

FORMAT = 2  # of what is written; 1, which names no format, is that of version 0.1
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
GLOBALS = {  # all that a checkpoint may name: tensors and the containers of plain values
    "collections OrderedDict",
    "collections Counter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in STORAGES),
}
DEEPEST = 30  # containers in containers; Lightning's own nest to 10
MOST_TIMES = 4  # as much memory as the file has bytes: some tensors stand in it once and are named several times


class Kind(NamedTuple):
    """A kind of plain value. words: what a sentence calls it."""

    words: str
    fits: Callable[[Any], bool]


def _whole(least: int, most: int = 2**53) -> Kind:
    return Kind(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def _number(words: str, fits: Callable[[float], bool]) -> Kind:
    return Kind(words, lambda value: type(value) in (int, float) and math.isfinite(value) and fits(value))


def _states(words: str, generator: Callable[[Any], object]) -> Kind:
    """Return the kind of states that a generator of random numbers takes: each is tried on one that nobody uses."""

    def fits(value: Any) -> bool:
        try:
            generator(value)
        except Exception:  # of any kind: each looks in its own way
            return False
        return True

    return Kind(words, fits)


def _counts(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_counts, value.values()))
    return all(map(_counts, value)) if type(value) is list else type(value) is bool or COUNT.fits(value)


def _plain(value: Any) -> bool:
    """Return True if a value holds no tensor: two tables with tensors in them can't be compared by ==."""
    if isinstance(value, dict | list | tuple):
        return all(map(_plain, value.values() if isinstance(value, dict) else value))
    return type(value) is not Tensor


def _metrics(value: Any) -> bool:
    """Return True for the text of a metrics.csv, in which all cells are numbers and no name is a formula."""
    if type(value) is not str or value == "":
        return value == ""
    header, *rows = value.split("\n")
    names, number = header.split(","), r"(?:-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf))?"
    row = re.compile(",".join(r"\d{1,15}" if name in ("epoch", "step") else number for name in names))
    named = all(re.match(r'\w[^"]*$', name) and name.isprintable() for name in names) and "epoch" in names
    return named and len(names) <= 200 and rows[-1:] == [""] and all(map(row.fullmatch, rows[:-1]))


def _numpy(value: Any) -> bool:
    """Return True for a state of NumPy's generator: NumPy itself looks at none, and reads beyond a key too short."""
    kinds = (Kind("", lambda name: name == "MT19937"), [BITS], _whole(0, 624), _whole(0, 1), NUMBER)
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        return False
    fits = not any(chain.from_iterable(_misfits(item, kind, "") for item, kind in zip(value, kinds, strict=True)))
    return fits and len(value[1]) == 624


def _cuda(value: Any) -> bool:
    """Return True for the state of a GPU's generator: a seed, and an offset that is a multiple of 4."""
    plain = type(value) is Tensor and value.dtype is torch.uint8 and value.shape == (16,)
    return plain and value[8].item() % 4 == 0


FLAG = Kind("true or false", lambda value: type(value) is bool)
COUNT = _whole(0)
SIZE = _whole(1, 2**31)
BITS = _whole(0, 2**32 - 1)
ANY_NUMBER = Kind("a number", lambda value: type(value) is float or (type(value) is int and abs(value) <= 2**53))
NUMBER = _number("a finite number", lambda value: True)
POSITIVE = _number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = _number("a number of at least 0", lambda value: value >= 0)
SHARE = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
TENSOR = Kind("a tensor", lambda value: type(value) is Tensor)
SCORE = Kind("one number", lambda value: (type(value) is Tensor and value.dim() == 0) or ANY_NUMBER.fits(value))
SCORES = Kind("a number for each net", lambda value: SCORE.fits(value) or (type(value) is Tensor and value.dim() == 1))
TEXT = Kind("a text", lambda value: type(value) is str and not re.search("[\ud800-\udfff]", value))
NAME = Kind("a name", lambda value: type(value) is str and value.isprintable() and len(value) <= 1000)
LABEL = Kind("a text of at most 1000 letters", lambda value: TEXT.fits(value) and len(value) <= 1000)
PATH = Kind("a path", lambda value: type(value) is str)
NOTHING = Kind("null", lambda value: value is None)
ANYTHING = Kind("a plain value", lambda value: True)
PLAIN = Kind("made of numbers and texts alone", _plain)  # what is compared with this run's own, or printed
STATE = {(str, int): ANYTHING}
COUNTS = Kind("counts", _counts)
COST = Kind(f"one of {', '.join(sheet.COSTS)}", lambda value: type(value) is str and value in sheet.COSTS)

# Tables of key → kind. A key that ends in ? may be missing, a type stands for all other keys of that type; [kind] is a
# list, a tuple lists alternatives. What no table names has to be plain, and is not read.
HYPER_PARAMETERS = {
    "input_size": SIZE,
    "output_size": SIZE,
    "hidden": [SIZE],
    "activation": (NAME, [NAME]),
    "output_activation": NAME,
    "bias": FLAG,
    "dropout": SHARE,
    "residual?": FLAG,  # version 0.1 wrote none of these
    "batch_norm?": FLAG,
    "channels?": [SIZE],
    "kernel?": SIZE,
    "image_shape?": [SIZE],
    "class_names": [LABEL],
    "target_mean": [NUMBER],
    "target_scale": [POSITIVE],
    "loss": COST,
    "initialisation": NAME,
    "backprop": NAME,
    "l1": NOT_NEGATIVE,
    "members?": _whole(2, 256),
    str: PLAIN,
}
DATA: dict[Any, Any] = {
    "name": TEXT,
    "feature_names": [TEXT],
    "feature_mean": [NUMBER],
    "feature_scale": [POSITIVE],
    "fingerprint": COUNT,
    "columns?": [{"name": TEXT, "kinds": [LABEL], "fill": (NUMBER, LABEL)}],  # training.preparation's
    **dict.fromkeys(("target?", "key?", "separator?", "decimal?"), (TEXT, NOTHING)),
    str: PLAIN,
}
BEST = {  # of a ModelCheckpoint; training.checkpoints believes the file names in it, and no path
    "monitor": (NAME, NOTHING),
    "best_model_path": PATH,
    "best_model_score": (SCORE, NOTHING),
    "best_k_models": {str: SCORE},
    "current_score": (SCORE, NOTHING),
    "dirpath": (PATH, NOTHING),
    "kth_best_model_path": PATH,
    "kth_value": SCORE,
    "last_model_path": PATH,
    str: (SCORE, FLAG, NOTHING),
}
CALLBACKS = {  # by the first word of their key; others' states may hold no path
    "EpochCheckpoint": BEST,
    "ModelCheckpoint": BEST,
    "EarlyStopping": {"stopping_reason_message?": (TEXT, NOTHING), str: (SCORE, NOTHING)},
    "DeltaFlow": {
        "epochs": [NOT_NEGATIVE],
        "norms": {int: [ANY_NUMBER]},
        "first": {f"{letter}?": {int: TENSOR} for letter in ("z", "a", "delta")},
        "snapshots": {int: {str: TENSOR}},
        "steps": COUNT,
        "due": COUNT,
        "stride": _whole(1),
    },
}
RANDOM = {
    "torch": _states("a state of torch's generator", lambda state: torch.Generator().set_state(state)),
    "cuda": [Kind("a state of a GPU's generator", _cuda)],
    "numpy": Kind("a state of NumPy's generator", _numpy),
    "python": _states("a state of Python's generator", lambda state: random.Random().setstate(state)),
}
SCHEMA: dict[Any, Any] = {
    "format?": COUNT,
    "hyper_parameters": HYPER_PARAMETERS,
    "state_dict": {str: TENSOR},
    **dict.fromkeys(("epoch", "global_step"), COUNT),
    "pytorch-lightning_version": Kind(
        "a version from 2.0 on", lambda value: type(value) is str and bool(re.fullmatch(r"[2-9]\.\d+[\w.+]*", value))
    ),
    "DataModule?": DATA,
    "figures": {str: ANY_NUMBER},
    "optimizer": NAME,
    "road?": Kind("native or torch", lambda value: value in ("native", "torch", None)),
    "sums": {"loss": SCORES, "hits": SCORES, "rows": COUNT},
    "callbacks?": {str: STATE},
    "optimizer_states?": [{"state": {int: STATE}, "param_groups": [{"params": [COUNT], str: ANYTHING}]}],
    "lr_schedulers?": [
        {"last_epoch": COUNT, "num_bad_epochs?": COUNT, "cooldown_counter?": COUNT, "best?": SCORE, str: ANYTHING}
    ],
    "loops?": {
        "fit_loop": {
            "state_dict": {"combined_loader?": [{"given": COUNT, "batch_size": COUNT}], str: COUNTS},
            str: {str: COUNTS},
        },
        str: {str: {str: COUNTS}},
    },
    "continuation?": {
        "random": RANDOM,
        "rows": [Kind("the text of a metrics.csv", _metrics)],
        "stopped": FLAG,
        "seconds?": NOT_NEGATIVE,  # of the training so far
    },
    "configured?": {  # what training.precedence compares with what is configured where a run goes on
        "optimizer": {"lr?": (ANY_NUMBER, NAME, NOTHING), str: PLAIN},
        "scheduler": ({str: PLAIN}, NOTHING),
        "callbacks": {str: PLAIN},
        "steps?": {str: PLAIN},
        "changed?": [NAME],
    },
    str: ANYTHING,
}


def read_checkpoint(path: str | PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint written by train.py: tensors and plain values that fit `SCHEMA`.

    Raises InputError for a file that is missing, damaged, foreign or of a newer format, that holds anything that could
    run code, or in which anything is not what it should be.
    """
    content = read_values(path, map_location)
    if not isinstance(content, dict) or not content.keys() >= {"hyper_parameters", "state_dict"}:
        raise InputError(
            f"expected a checkpoint that train.py wrote, but {path} holds something else; "
            "to load parameters of other programs use net.load_state_dict"
        )
    if COUNT.fits(content.get("format")) and content["format"] > FORMAT:
        raise InputError(
            f"expected a checkpoint of format {FORMAT} at most, but {path} is of format {content['format']}; it comes "
            "from a newer manual_mlp: update this one"
        )
    misfits = chain(_misfits(content, SCHEMA, ""), _of_callbacks(content), _of_sizes(content))
    for where, words, value in islice(misfits, 1):
        raise InputError(
            f"expected {where} in the checkpoint {path} to be {words}, but got {described(value)}; "
            "take a checkpoint as train.py wrote it"
        )
    return content


Misfit = tuple[str, str, Any]  # where, what it should be, what it is


def _misfits(value: Any, kind: Any, where: str) -> Iterator[Misfit]:
    """Give what in a value does not fit its kind, a table or a list of kinds."""
    if isinstance(kind, Kind):
        if not kind.fits(value):
            yield where, kind.words, value
    elif isinstance(kind, tuple):
        if all(any(_misfits(value, option, where)) for option in kind):
            yield where, " or ".join(map(_in_words, kind)), value
    elif isinstance(kind, list) and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _misfits(item, kind[0], f"{where}[{index}]")
    elif isinstance(kind, dict) and isinstance(value, dict):
        yield from _misfits_by_key(value, kind, where)
    else:
        yield where, _in_words(kind), value


def _misfits_by_key(values: dict, table: dict, where: str) -> Iterator[Misfit]:
    named = {key.removesuffix("?"): kind for key, kind in table.items() if isinstance(key, str)}
    for key in (key for key in table if isinstance(key, str) and not key.endswith("?") and key not in values):
        yield join(where, key), "there", None
    for key, value in values.items():
        others = (kind for types, kind in table.items() if not isinstance(types, str) and isinstance(key, types))
        kind = named.get(key) or next(others, Kind("left out", lambda value: False))
        yield from _misfits(value, kind, join(where, key))


def _in_words(kind: Any) -> str:
    return kind.words if isinstance(kind, Kind) else "a list" if isinstance(kind, list) else "a table"


def join(where: str, key: Any) -> str:
    """Return the place of a key in a message: dotted, and escaped where it is no ordinary name."""
    name = key if isinstance(key, str) and re.fullmatch(r"[\w.-]+", key) else described(key)
    return f"{where}.{name}" if where else name


class _Described(reprlib.Repr):
    def repr_NoneType(self, value: None, level: int) -> str:
        return "none"

    def repr_Tensor(self, value: Tensor, level: int) -> str:
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"


_DESCRIBED = _Described()
_DESCRIBED.maxstring = _DESCRIBED.maxother = 60
described = _DESCRIBED.repr
"""A value as a message describes it: short, a tensor by its shape."""


def _of_callbacks(content: dict[str, Any]) -> Iterator[Misfit]:
    for key, state in content.get("callbacks", {}).items():
        where = join("callbacks", key)
        known = CALLBACKS.get(key.partition("{")[0])
        yield from _misfits(state, known, where) if known else _paths(state, where)


def _paths(value: Any, where: str) -> Iterator[Misfit]:
    """Give the texts in a state that a program might take for a path or an address."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(key, where)
            yield from _paths(item, join(where, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _paths(item, f"{where}[{index}]")
    elif isinstance(value, str) and (set(value) & {"/", "\\", "~"} or value in (".", "..")):
        yield where, "without a path", value


def _of_sizes(content: dict[str, Any]) -> Iterator[Misfit]:
    """Give what does not have the size that the hyper-parameters declare."""
    values, data = content["hyper_parameters"], content.get("DataModule", {})
    inputs, outputs = values["input_size"], values["output_size"]
    targets = {0} if values.get("class_names") else {outputs} if data else {0, outputs}
    lengths = {
        "activation": (values, {len(values["hidden"])}),
        "class_names": (values, {0, outputs}),
        **dict.fromkeys(("target_mean", "target_scale"), (values, targets)),
        **dict.fromkeys(("feature_names", "feature_mean"), (data, {0, inputs})),
        "feature_scale": (data, {len(data.get("feature_mean", ()))}),
    }
    for name, (table, sizes) in lengths.items():
        value = table.get(name)
        if isinstance(value, list | tuple) and len(value) not in sizes:
            yield name, f"a list of {' or '.join(map(str, sorted(sizes)))}", value
    if values.get("members", 1) > 1 and (values.get("channels") or values.get("batch_norm")):
        yield "members", "left out for a net with norms or convolutions", values["members"]
    if values.get("channels"):
        sides, kernel = values.get("image_shape", ()), values.get("kernel", 0)
        if len(sides) != 2 or math.prod(sides) != inputs or not kernel:
            yield "image_shape", f"height and width of {inputs} numbers, beside a kernel", sides
            return
    net = {name: tensor for name, tensor in content["state_dict"].items() if not name.startswith("scores.")}
    yield from _of_shapes(net, shapes := declared(values), "state_dict")
    flow = content.get("callbacks", {}).get("DeltaFlow", {})
    for passed, state in flow.get("snapshots", {}).items():
        named = {f"net.{name}": tensor for name, tensor in state.items()}
        yield from _of_shapes(named, shapes, f"callbacks.DeltaFlow.snapshots.{passed}")


def _of_shapes(net: dict[str, Tensor], shapes: Shapes, where: str) -> Iterator[Misfit]:
    for name in sorted(shapes.keys() | net.keys()):
        shape, tensor, counts = shapes.get(name), net.get(name), name.endswith(COUNTER)
        fits = tensor is not None and (tensor.dtype is torch.int64 if counts else tensor.is_floating_point())
        if shape is None or tensor is None or tensor.shape != shape or not fits:
            words = "left out" if shape is None else "a whole number" if counts else f"parameters of shape {shape}"
            yield join(where, name), words, tensor
    types = sorted({str(tensor.dtype) for name, tensor in net.items() if not name.endswith(COUNTER)})
    if len(types) != 1:
        yield where, "parameters of one dtype", types


def read_values(path: str | PathLike[str], map_location: Any = "cpu") -> Any:
    """Return the content of any file of ordinary tensors and plain values, whoever wrote it.

    It takes no more memory than some times the size of the file. Raises InputError as `read_checkpoint`.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            _check_archive(file)
            content = torch.load(file, map_location=map_location, weights_only=True)
            return _Plain(os.fstat(file.fileno()).st_size).copy(content)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"expected a checkpoint at {path}, but it can't be read ({error.strerror or error}); correct the path"
        ) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"expected a checkpoint of tensors and plain values, but {path} is none, or holds objects that could run "
            "code, none of which was run; take a checkpoint that train.py wrote"
        ) from error
    except Exception as error:  # of any kind: a reader trips over damage wherever it meets it
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"expected a whole checkpoint, but {path} is damaged ({reason}); "
            "take another, such as best.ckpt or last.ckpt"
        ) from error


def _open_regular(path: str, flags: int) -> int:
    """Open a file, but no device and no pipe: reading some of these never begins, or never ends."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "it is not a file")
    return descriptor


def _check_archive(file: IO[bytes]) -> None:
    """Raise if an archive is not as torch.save writes it: each record once, not compressed, its checksum right.

    Its pickle may name nothing but tensors and containers; nothing that it names has been looked for yet.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = {record.filename.lower() for record in records}
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if packed or len(names) < len(records) or len({name.partition("/")[0] for name in names}) != 1:
            raise zipfile.BadZipFile("torch.save writes records uncompressed, and each once")
        if sum(record.file_size for record in records) > size:
            raise zipfile.BadZipFile("its records are larger than the file")
        if len(pickles) != 1:
            raise zipfile.BadZipFile("it has no data.pkl, or several")
        damaged = archive.testzip()  # torch.load takes any bits for parameters
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if "GLOBAL" in operation.name and argument not in GLOBALS:
                raise pickle.UnpicklingError(argument)
    file.seek(0)
    if file.read(4) != b"PK\3\4":  # torch.load would read what stands before the archive
        raise zipfile.BadZipFile("something stands before its first record")
    file.seek(0)


class _Plain:
    """Copies what torch.load returned: plain containers, tensors that share no memory and carry nothing."""

    def __init__(self, size: int) -> None:
        self.values, self.bytes = size, MOST_TIMES * size

    def copy(self, value: Any, depth: int = 0) -> Any:
        self.values -= 1  # each stands in the file; one that is named again and again would be copied as often
        if depth > DEEPEST or self.values < 0:
            raise ValueError("its values contain each other")
        if isinstance(value, dict):
            items = {self._key(key): self.copy(item, depth + 1) for key, item in dict.items(value)}
            return Counter(items) if type(value) is Counter and all(map(COUNT.fits, items.values())) else items
        if type(value) in (list, tuple):
            return type(value)([self.copy(item, depth + 1) for item in value])
        if type(value) is Tensor:
            self.bytes -= value.numel() * value.element_size()
            if self.bytes < 0:
                raise ValueError("its tensors claim more than it holds")
            return value.detach().clone()
        if value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < 2**64):
            return value
        raise ValueError(f"it holds an unusual {type(value).__name__}")

    def _key(self, key: Any) -> Any:
        if type(key) not in (str, int):
            raise ValueError("a key is neither a text nor a whole number")
        return self.copy(key)


def write_whole(path: str | PathLike[str], content: bytes | memoryview) -> None:
    """Write a file as a whole or not at all: beside it, flushed to the disk, and renamed.

    Raises OSError if that fails; what was there before is then still there. What a killed process left is removed.
    """
    path = Path(path)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that have ended began to write beside a path: this file, or any checkpoint."""
    pattern = re.compile(rf"\.(?:{re.escape(path.name)}|.+\.ckpt)\.(\d+)\.part")
    for name in os.listdir(path.parent):
        match, left = pattern.fullmatch(name), path.with_name(name)
        if match and stat.S_ISREG(os.lstat(left).st_mode) and not _lives(int(match[1])):
            left.unlink()


def _lives(process: int) -> bool:
    if os.name != "posix":  # os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return process != os.getpid()  # an ended process had the same number
