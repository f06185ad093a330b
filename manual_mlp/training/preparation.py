"""Prepare the rows of a table for a net: fill the gaps, give each kind of text a column of 0 and 1, name the classes.

What is filled in, and which kinds there are, is fitted on the training rows by scikit-learn, and kept as plain values.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from manual_mlp.errors import InputError
from manual_mlp.shell import for_the_shell, listing, override
from manual_mlp.training.readers import LARGEST, Table, cut, example, listed, quoted

LARGEST_FLOAT = 2**53  # above it not every whole number has a float of its own
MOST_CLASSES, LONGEST_NAME = 10_000, 1000
WHOLE = re.compile("0|-?[1-9][0-9]*").fullmatch
MOST_KINDS = 50
COMMA = re.compile(r"[-+]?\d+,\d+").fullmatch  # a number with a decimal comma
MARK = "[,.'’ \\u00a0\\u2009\\u202f]"
THOUSANDS = re.compile(rf"[-+]?\d{{1,3}}({MARK})\d{{3}}(\1\d{{3}})*([.,]\d+)?").fullmatch  # such as 1,234.5
GAPS = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"}
GAPS |= {"NA", "NULL", "NaN", "None", "n/a", "nan", "null"}  # pandas' words, which mean a gap among numbers
Defects = list[tuple[int | None, str]]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    kinds: the texts that get a column of 0 and 1 each; empty for numbers. fill: what stands in the place of a gap, the
    median or the most frequent kind; None as long as nothing is fitted.
    """

    name: str
    kinds: tuple[str, ...] = ()
    fill: float | str | None = None

    def names(self) -> list[str]:
        """Return the names of the prepared columns."""
        return [f"{self.name}={kind}" for kind in self.kinds] or [self.name]


def from_plain(data: Mapping[str, Any], inputs: int) -> list[Column]:
    """Return the columns that a checkpoint keeps; of other data and of 0.1, which fill no gaps, by their names.

    Raises InputError if they contradict each other, or its inputs.
    """
    kept = data.get("columns", [{"name": name, "kinds": (), "fill": None} for name in data["feature_names"]])
    columns = [Column(value["name"], tuple(value["kinds"]), value["fill"]) for value in kept]
    fills = all(c.fill in c.kinds if c.kinds else not isinstance(c.fill, str) for c in columns)
    kinds = all(len({*c.kinds, ""}) == len(c.kinds) + 1 for c in columns)
    own = [column.name for column in columns]
    apart = len({*own}) == len(own) and not {data.get("target"), data.get("key")} & {*own}
    names = [name for column in columns for name in column.names()]
    if not (fills and kinds and apart and names == list(data["feature_names"]) and len(names) in (inputs, 0)):
        raise InputError(
            f"expected DataModule.columns in the checkpoint of a table to be columns that make {inputs} inputs, each "
            "with different kinds, one of these, or a number, for gaps, named as DataModule.feature_names says, and "
            f"none of them the target or the key, but got {quoted(kept)}; take it as train.py wrote it"
        )
    return columns


def taken(table: Table, trained: Sequence[Column] = ()) -> tuple[np.ndarray, list[Column], Defects]:
    """Take columns out of a table → (rows, n) numbers and codes of kinds, NaN for gaps; the columns; the defects.

    trained: those to take, numbers or text as in the training; by default all, as their cells are. Each number is there
    once. Raises InputError for columns of no simple values.
    """
    names = [column.name for column in trained] or [*table.columns]
    codes, columns = np.empty((table.rows, len(names))), list[Column]()
    defects, refused = Defects(), list[str]()
    for place, (name, like) in enumerate(zip_longest(names, trained)):
        codes[:, place], kinds, wrong = _coded_or_numbers(table.columns.pop(name), name, table.decimal, like)
        columns.append(Column(name, kinds))
        defects += wrong
        refused += [name] * any(row is None for row, _ in wrong)
    if refused:
        defects.append((None, f"to leave them out: {listing('data.source.drop', [*table.drop, *refused])}"))
    return codes, columns, defects


def new_kinds(codes: np.ndarray, raw: Sequence[Column], trained: Sequence[Column]) -> list[str]:
    """Return words about the kinds of text in new rows that the training did not know."""
    said = []
    for before, column, values in zip(raw, trained, codes.T, strict=True):
        own = {*column.kinds}
        if new := {code: kind for code, kind in enumerate(before.kinds) if kind not in own}:
            there = counted(int(np.isin(values, [*new]).sum()), "row")
            said.append(f"{quoted(column.name)} has {listed([*new.values()])} in {there}: none of the known kinds")
    return said


def fitted(columns: Sequence[Column], codes: np.ndarray) -> list[Column | None]:
    """Return the columns as fitted on training rows; None for one that is empty in all of them.

    Column by column: all at once take three times the memory of the rows, and in large tables twice the time.
    """
    from sklearn.impute import SimpleImputer  # type: ignore[import-untyped]
    from sklearn.preprocessing import OneHotEncoder  # type: ignore[import-untyped]

    made = list[Column | None]()
    for column, values in zip(columns, codes.T, strict=True):
        there = values[~np.isnan(values), None]
        if not len(there):
            made.append(None)
        elif column.kinds:
            kinds = tuple(column.kinds[int(code)] for code in OneHotEncoder().fit(there).categories_[0])
            fill = SimpleImputer(strategy="most_frequent").fit(there).statistics_.item()
            made.append(Column(column.name, kinds, column.kinds[int(fill)]))
        else:
            made.append(Column(column.name, (), SimpleImputer(strategy="median").fit(there).statistics_.item()))
    return made


def prepared(codes: np.ndarray, raw: Sequence[Column], columns: Sequence[Column | None]) -> np.ndarray:
    """Return rows as the net takes them, before they are standardised.

    raw: whose kinds the codes count. columns: the same, as fitted; None for one to leave out.
    """
    if all(column and not column.kinds for column in columns) and not np.isnan(codes).any():
        return codes
    rows, place = np.zeros((len(codes), sum(len(column.names()) for column in columns if column))), 0
    for before, column, values in zip(raw, columns, codes.T, strict=True):
        if column is None:
            continue
        if column.kinds:
            own = {kind: code for code, kind in enumerate(column.kinds)}
            new = np.array([*(own.get(kind, -1) for kind in before.kinds), own[str(column.fill)]])
            code = new[np.nan_to_num(values, nan=-1.0).astype(np.int64)]  # a gap takes the last one
            there = np.flatnonzero(code >= 0)
            rows[there, place + code[there]] = 1.0
        else:
            rows[:, place] = np.nan_to_num(values, nan=float(column.fill or 0))
        place += len(column.names())
    return rows


def words(
    raw: Sequence[Column], columns: Sequence[Column | None], codes: np.ndarray, train: np.ndarray
) -> dict[str, str]:
    """Return what was done to the columns of a table, for the summary. codes: all rows, train: the training's."""
    gaps = np.isnan(codes).sum(0).tolist()
    numbers, texts, empty, constant = list[str](), list[str](), list[str](), list[str]()
    for place, column in enumerate(columns):
        if column is None:
            empty.append(raw[place].name)
            continue
        fill = f"median {column.fill:.4g}" if isinstance(column.fill, float) else f"most frequent {quoted(column.fill)}"
        filled = f", {counted(gaps[place], 'gap')}: {fill}" if gaps[place] else ""
        if column.kinds:
            texts.append(f"{quoted(column.name)} ({counted(len(column.kinds), 'kind')}{filled})")
        elif filled:
            numbers.append(f"{quoted(column.name)} ({filled[2:]})")
        if (train[:, place] == train[0, place]).all():
            constant.append(column.name)
    plain = sum(column is not None and not column.kinds for column in columns) - len(numbers)
    said = {
        "numbers": ", ".join([f"{counted(plain, 'column')} without gaps"] * (plain > 0) + cut(numbers)),
        "text": ", ".join(cut(texts)),
        "empty": f"{listed(empty)} in all training rows, left out" if empty else "",
        "constant": f"{listed(constant)} in the training rows" if constant else "",
    }
    same = [raw[place].name for place in range(len(raw)) if not raw[place].kinds and _is_like_an_id(codes[:, place])]
    if same:
        advice = f"{listing('data.source.drop', same)} leaves {'it' if len(same) == 1 else 'them'} out"
        said["like an id"] = f"{listed(same)}, a whole number of its own in each row; {advice}"
    return said


def counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _is_like_an_id(values: np.ndarray) -> bool:
    return len(values) >= 10 and bool((values == np.floor(values)).all()) and len(np.unique(values)) == len(values)


def _coded(values: np.ndarray, name: str, defects: Defects) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return for each row the place of its kind, −1 for a gap, and the kinds in order; add the defects."""
    found, indices = distinct(values)
    texts = list[str | None]()
    for code, value in enumerate(found):
        try:
            texts.append(text(value))
        except ValueError as error:
            texts.append(None)
            defects += [(row, f"{quoted(name)} holds {error}") for row in np.flatnonzero(indices == code).tolist()]
    kinds, places = _ordered(texts, str)
    return places[indices], kinds


def _ordered(names: Sequence[str | None], order: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the different names in order, and the place of each name among them, −1 for None."""
    known = sorted({name for name in names if name is not None}, key=order)
    place = {name: index for index, name in enumerate(known)} | {None: -1}
    return tuple(known), np.array([place[name] for name in names], dtype=np.int64)


def white_space(columns: Sequence[Column]) -> str:
    """Return words about kinds of text that differ from others, or from an empty cell, in white space alone."""
    odd = {c.name: [k for k in c.kinds if k != k.strip() and k.strip() in ("", *c.kinds)] for c in columns}
    told = [f"{quoted(name)} has {listed(kinds)}" for name, kinds in odd.items() if kinds]
    return f"{', '.join(told)}: kinds of their own, though nothing else sets them apart" if told else ""


def _coded_or_numbers(
    values: np.ndarray, name: str, decimal: str | None, like: Column | None
) -> tuple[np.ndarray, tuple[str, ...], Defects]:
    """Return codes of kinds and the kinds, or numbers and none; the defects, of no one row if it is neither.

    like: the column in the training, if there was one. Text of too many kinds is taken for numbers if most of them are:
    then the others are defects.
    """
    if values.dtype.kind not in "biufOSU":
        raise InputError(
            f"expected numbers or text in every feature column, but {quoted(name)} has values of the type "
            f"{values.dtype}; write them as numbers or leave it out"
        )
    if not like.kinds if like else values.dtype.kind in "biuf":
        found, defects = numbers(values, name, gaps=like is None or like.fill is not None)
        return found, (), defects
    defects = Defects()
    places, kinds = _coded(values, name, defects)
    codes = np.where(places < 0, np.nan, places)
    if like:
        return codes, kinds, defects
    if kinds and (words := _written_otherwise(kinds, decimal)):
        return codes, kinds, [*defects, (None, f"{quoted(name)} holds {words}")]
    if len(kinds) <= MOST_KINDS and 2 * len(kinds) <= len(codes):
        return codes, kinds, defects
    if 2 * sum(_number(kind) is None for kind in kinds) < len(kinds):
        found, defects = numbers(values, name, gaps=True)
        return found, (), defects
    much = f"text of {counted(len(kinds), 'kind')} in {counted(len(codes), 'row')}"
    return codes, kinds, [*defects, (None, f"{quoted(name)} is {much}, which are too many to learn from")]


def _written_otherwise(kinds: Sequence[str], decimal: str | None) -> str:
    """Return how numbers are written, and the fix, if all kinds are numbers with a comma, or with marks in them."""
    comma = decimal != "," and all(map(COMMA, kinds))
    if not comma and not all(map(THOUSANDS, kinds)):
        return ""
    fix = for_the_shell(override("data.source.decimal", ","))
    return (
        f"numbers with marks in them, such as {quoted(kinds[0])}: "
        + f"if the comma is the decimal one, set {fix}; else " * comma
        + "write them without marks, and names with a letter"
    )


def numbers(values: np.ndarray, name: str, gaps: bool = False) -> tuple[np.ndarray, Defects]:
    """Return a column of numbers, NaN for gaps, and the cells that are none. gaps: True if these may be empty."""
    defects = Defects()
    if values.dtype.kind in "biuf":
        found = values.astype(np.float64)
    else:
        places, kinds = _coded(values, name, defects)
        read = [_number(kind) for kind in kinds]
        found = np.array([*read, None], dtype=np.float64)[places]  # None, also for a gap, becomes NaN
        wrong = np.flatnonzero(np.array([*(number is None for number in read), False])[places]).tolist()
        defects += [(row, f"{quoted(name)} holds {quoted(kinds[places[row]])}, which is not a number") for row in wrong]
    refused = {row for row, _ in defects}
    if not gaps:
        empty = [row for row in np.flatnonzero(np.isnan(found)).tolist() if row not in refused]
        defects += [(row, f"{quoted(name)} is empty") for row in empty]
    wrong = np.flatnonzero(np.abs(found) > LARGEST).tolist()
    limit = f"which is not finite, or above {LARGEST:.1e}: rescale it"
    return found, defects + [(row, f"{quoted(name)} holds {found[row]}, {limit}") for row in wrong]


def _number(kind: str) -> float | None:
    """Return the number that a text is, NaN for a word that means a gap, None for other text."""
    if kind in GAPS or kind.lower() in ("true", "false"):
        return np.nan if kind in GAPS else float(kind.lower() == "true")
    try:
        return None if "_" in kind else float(kind)
    except ValueError:
        return None


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
        floats = [value for value in found if isinstance(value, float) and not np.isnan(value)]
        if odd := [value for value in floats if not value.is_integer() or abs(value) >= LARGEST_FLOAT]:
            raise ValueError(f"numbers such as {odd[0]}")
        labels = [text(value) for value in found]
    except ValueError as error:
        raise InputError(
            f"expected class labels in the target {quoted(target)}, but got {error}; write them as whole numbers or "
            "short text in UTF-8; for a regression set data.source.task=regression"
        ) from error
    whole = all(WHOLE(name) for name in labels if name is not None)
    names, places = _ordered(labels, int if whole else str)
    return names, places[indices]


def distinct(values: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """Return the different values, and for each row the index of its own."""
    if values.dtype.kind != "O":
        found, indices = np.unique(values, return_inverse=True)
        return found.tolist(), indices
    codes = {value: code for code, value in enumerate(dict.fromkeys(values.tolist()))}
    # text keeps its hash: a long one in many rows costs no time
    return [*codes], np.fromiter(map(codes.__getitem__, values.tolist()), dtype=np.int64, count=len(values))


def text(value: Any) -> str | None:
    """Return a cell as text, None if it is empty. Raises ValueError for one that is too long, or no UTF-8."""
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        written = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are no text ({error})") from error
    if not isinstance(value, str | bytes):
        written = written.removesuffix(" 00:00:00")  # of a date
    if len(written.encode()) > LONGEST_NAME or "\0" in written:
        raise ValueError(f"text of more than {LONGEST_NAME} bytes, or with NUL in it: {quoted(written)}")
    return written or None
