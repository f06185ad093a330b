"""Declare what a checkpoint may hold: `SCHEMA`."""

import json
import math
import random
import re
import reprlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manual_mlp import formulas as sheet

Misfit = tuple[str, str, Any]  # where, what it should be, what it is
COUNTER = "num_batches_tracked"  # of a batch norm, the one tensor of whole numbers


class Kind(NamedTuple):
    """A kind of plain value. words: what a sentence calls it."""

    words: str
    fits: Callable[[Any], bool]


def _whole(least: int, most: int = 2**53) -> Kind:
    return Kind(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def _number(words: str, fits: Callable[[float], bool]) -> Kind:
    return Kind(words, lambda value: type(value) in (int, float) and math.isfinite(value) and fits(value))


def _taken(words: str, take: Callable[[Any], object]) -> Kind:
    """Return the kind of values that a function takes without an exception."""

    def fits(value: Any) -> bool:
        try:
            take(value)
        except Exception:  # of any kind: each looks in its own way
            return False
        return True

    return Kind(words, fits)


def _counts(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_counts, value.values()))
    return all(map(_counts, value)) if type(value) is list else type(value) is bool or COUNT.fits(value)


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
PLAIN = _taken("made of numbers and texts alone", json.dumps)  # no tensors: == of two would be no truth value
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
BEST = {  # of a ModelCheckpoint; training.callbacks makes the rest anew, and believes no path
    "best_model_path": PATH,
    "best_k_models": {str: SCORE},
    "kth_value": SCORE,
    "last_model_path": PATH,
    str: ANYTHING,
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
        "stride": COUNT,
    },
}
RANDOM = {
    "torch": _taken("a state of torch's generator", lambda state: torch.Generator().set_state(state)),
    "cuda": [Kind("a state of a GPU's generator", _cuda)],
    "numpy": Kind("a state of NumPy's generator", _numpy),
    "python": _taken("a state of Python's generator", lambda state: random.Random().setstate(state)),
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
            str: COUNTS,
        },
        str: COUNTS,
    },
    "continuation?": {
        "random": RANDOM,
        "rows": [Kind("the text of a metrics.csv", _metrics)],
        "stopped": FLAG,
        "seconds?": NOT_NEGATIVE,  # of the training so far
    },
    "configured?": {  # what training.continuing compares with what is configured where a run goes on
        "optimizer": {"lr?": (ANY_NUMBER, NAME, NOTHING), str: PLAIN},
        "scheduler": ({str: PLAIN}, NOTHING),
        "callbacks": {str: PLAIN},
        "steps?": {str: PLAIN},
        "changed?": [NAME],
    },
    str: ANYTHING,
}


def misfits(content: dict[str, Any]) -> Iterator[Misfit]:
    """Give what in the content of a checkpoint is not what it should be."""
    yield from _misfits(content, SCHEMA, "")
    yield from _of_callbacks(content)
    yield from _of_sizes(content)


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
    members = values.get("members", 1)
    for name, total in content["sums"].items():
        if isinstance(total, Tensor) and total.shape not in ((), (members,) if members > 1 else ()):
            yield f"sums.{name}", "one number" + f", or one for each of {members} nets" * (members > 1), total
    if values.get("channels"):
        sides, kernel = values.get("image_shape", ()), values.get("kernel", 0)
        if len(sides) != 2 or math.prod(sides) != inputs or not kernel:
            yield "image_shape", f"height and width of {inputs} numbers, beside a kernel", sides
    layers = members * (len(values["hidden"]) + len(values.get("channels", ())) + 1)
    if layers > len(content["state_dict"]):
        yield "state_dict", f"the parameters of {layers} layers", content["state_dict"]
    net = {name: tensor for name, tensor in content["state_dict"].items() if not name.startswith("scores.")}
    for name, tensor in net.items():
        if not (tensor.dtype is torch.int64 if name.endswith(COUNTER) else tensor.is_floating_point()):
            yield join("state_dict", name), "a whole number" if name.endswith(COUNTER) else "parameters", tensor
    types = sorted({str(tensor.dtype) for name, tensor in net.items() if not name.endswith(COUNTER)})
    if len(types) != 1:
        yield "state_dict", "parameters of one dtype", types
    shapes = {name: tensor.shape for name, tensor in net.items()}
    for passed, state in content.get("callbacks", {}).get("DeltaFlow", {}).get("snapshots", {}).items():
        if {f"net.{name}": tensor.shape for name, tensor in state.items()} != shapes:
            yield f"callbacks.DeltaFlow.snapshots.{passed}", "tensors of the names and shapes in state_dict", state
