"""The names of classes: what a cell of the target stands for."""

import re
from typing import Any

import numpy as np

from manual_mlp.errors import InputError
from manual_mlp.training.readers import example, quoted

LARGEST_FLOAT = 2**53  # above it not every whole number has a float of its own
MOST_CLASSES, LONGEST_NAME = 10_000, 1000
WHOLE = re.compile("0|-?[1-9][0-9]*").fullmatch


def classes(values: np.ndarray, target: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the classes in order, and for each row the index of its class, −1 where it has none.

    Whole numbers (also 1.0) and booleans are named as in Python and ordered by size; so is text that is all whole
    numbers. Other text stays as it is.
    """
    try:
        if values.dtype.kind not in "biufOSU":
            raise ValueError(f"values such as {example(values)}")
        found, indices = distinct(values)
        if len(found) > MOST_CLASSES:
            raise ValueError(f"{len(found)} different ones")
        labels = [label(value) for value in found]
    except ValueError as error:
        raise InputError(
            f"expected class labels in the target {quoted(target)}, but got {error}; write them as whole numbers or "
            "short text in UTF-8; for a regression set data.source.task=regression"
        ) from error
    known = {name for name in labels if name is not None}
    order: Any = int if all(not isinstance(name, str) or WHOLE(name) for name in known) else str
    names = sorted(known, key=order)
    place = {name: index for index, name in enumerate(names)} | {None: -1}
    return tuple(map(str, names)), np.array([place[name] for name in labels], dtype=np.int64)[indices]


def distinct(values: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """Return the different values, and for each row the index of its own."""
    if values.dtype.kind != "O":
        found, indices = np.unique(values, return_inverse=True)
        return found.tolist(), indices
    codes = {value: code for code, value in enumerate(dict.fromkeys(values.tolist()))}
    # text keeps its hash: a long one in many rows costs no time
    return [*codes], np.fromiter(map(codes.__getitem__, values.tolist()), dtype=np.int64, count=len(values))


def label(value: Any) -> bool | int | str | None:
    """Return the label that a value stands for; None if it is missing. Raises ValueError with the kind of value."""
    if isinstance(value, float):
        if not np.isnan(value) and (not value.is_integer() or abs(value) >= LARGEST_FLOAT):
            raise ValueError(f"numbers such as {value}")
        return None if np.isnan(value) else int(value)
    if not isinstance(value, str | bytes):
        return value if isinstance(value, int | None) else str(value)  # a date
    return text(value)


def text(value: str | bytes) -> str | None:
    """Return a text as str, None if it is empty. Raises ValueError for one that is too long, or no UTF-8."""
    try:
        decoded = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are no text ({error})") from error
    if len(decoded.encode()) > LONGEST_NAME or "\0" in decoded:
        raise ValueError(f"text of more than {LONGEST_NAME} bytes, or with NUL in it: {quoted(decoded)}")
    return decoded or None
