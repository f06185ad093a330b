"""Prepare the rows of a table for a net: fill the gaps, give each kind of text a column of 0 and 1, name the classes.

What is filled in, and which kinds there are, is fitted on the training rows by scikit-learn, and kept as plain values.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from manual_mlp.errors import InputError
from manual_mlp.training.commands import for_the_shell, listing, override
from manual_mlp.training.readers import LARGEST, Table, check_names, column_names, example, listed, quoted

LARGEST_FLOAT = 2**53  # above it not every whole number has a float of its own
MOST_CLASSES, LONGEST_NAME = 10_000, 1000
WHOLE = re.compile("0|-?[1-9][0-9]*").fullmatch
MOST_KINDS = 50
AT_ONCE = 64  # columns; an imputer copies them several times
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

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "kinds": list(self.kinds)}


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


def taken(table: Table, rows: int) -> tuple[np.ndarray, list[Column], Defects]:
    """Take all columns out of a table → (rows, n) numbers and codes of kinds, NaN for gaps; the columns; the defects.

    Each number is there once. Raises InputError for columns of other lengths, of the same name, of no simple values.
    """
    check_names(table.path, names := column_names(table.columns))
    codes, columns, defects = np.empty((rows, len(names))), list[Column](), Defects()
    refused: list[str] = []
    for name in list(table.columns):
        values = _checked(table.columns.pop(name), rows, name)
        place, kinds = len(columns), tuple[str, ...]()
        if values.dtype.kind in "biuf":
            block, wrong = values.reshape(rows, -1), Defects()
        else:
            block, kinds, wrong, words = _text_or_numbers(values, name, table.decimal)
            if words:
                defects.append((None, words))
                refused += [name]
        columns += [Column(names[place + index], kinds) for index in range(block.shape[1])]
        codes[:, place : len(columns)] = block
        defects += wrong + (_too_large(block, names[place : len(columns)]) if values.dtype.kind in "biuf" else [])
    if refused:
        defects.append((None, f"to leave them out: {listing('data.source.drop', [*table.drop, *refused])}"))
    return codes, columns, defects


def known(table: Table, rows: int, columns: Sequence[Column]) -> tuple[np.ndarray, list[str], Defects]:
    """Return `columns` of a table as `taken` does, −1 for a kind that is none of theirs; words about these; defects."""
    codes, said, defects = np.empty((rows, len(columns))), list[str](), Defects()
    flat = {name: table.columns[name] for name in table.columns if table.columns[name].ndim == 1}
    for name, values in table.columns.items():
        if values.ndim > 1:
            flat |= dict(zip(column_names({name: values}), values.reshape(len(values), -1).T, strict=True))
    for place, column in enumerate(columns):
        values = _checked(flat[column.name], rows, column.name)
        if column.kinds:
            found, kinds = _coded(values, column.name, defects)
            own = {kind: code for code, kind in enumerate(column.kinds)}
            codes[:, place] = _recoded(found[:, 0], [own.get(kind, -1) for kind in kinds])
            if new := [kind for kind in kinds if kind not in own]:
                count = int((codes[:, place] == -1).sum())
                said.append(
                    f"{quoted(column.name)} has {listed(new)} in {counted(count, 'row')}: none of the known kinds"
                )
        else:
            codes[:, place], wrong = numbers(values, column.name, gaps=column.fill is not None)
            defects += wrong
    return codes, said, defects


def fitted(columns: Sequence[Column], codes: np.ndarray) -> list[Column | None]:
    """Return the columns as fitted on training rows; None for one that is empty in all of them."""
    from sklearn.preprocessing import OneHotEncoder  # type: ignore[import-untyped]

    empty = np.array([np.isnan(column).all() for column in codes.T], dtype=bool)
    fills: dict[int, float] = {}
    for strategy, of_text in (("median", False), ("most_frequent", True)):
        places = [place for place, column in enumerate(columns) if bool(column.kinds) is of_text and not empty[place]]
        fills |= zip(places, _statistics(codes, places, strategy), strict=True)
    made: list[Column | None] = [None] * len(columns)
    for place, fill in fills.items():
        if kinds := columns[place].kinds:
            there = np.nan_to_num(codes[:, place : place + 1], nan=fill)
            (categories,) = OneHotEncoder().fit(there).categories_
            made[place] = Column(columns[place].name, tuple(kinds[int(code)] for code in categories), kinds[int(fill)])
        else:
            made[place] = Column(columns[place].name, (), fill)
    return made


def _statistics(codes: np.ndarray, places: Sequence[int], strategy: str) -> Iterator[float]:
    from sklearn.impute import SimpleImputer  # type: ignore[import-untyped]

    for start in range(0, len(places), AT_ONCE):
        yield from SimpleImputer(strategy=strategy).fit(codes[:, places[start : start + AT_ONCE]]).statistics_.tolist()


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
            found = _recoded(values, [own.get(kind, -1) for kind in before.kinds]) if before != column else values
            code = np.where(np.isnan(found), own[str(column.fill)], found).astype(np.int64)
            known = np.flatnonzero(code >= 0)
            rows[known, place + code[known]] = 1.0
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
        "numbers": ", ".join([f"{counted(plain, 'column')} without gaps"] * (plain > 0) + _some(numbers)),
        "text": ", ".join(_some(texts)),
        "empty": f"{listed(empty)} in all training rows, left out" if empty else "",
        "constant": f"{listed(constant)} in the training rows" if constant else "",
    }
    same = [raw[place].name for place in range(len(raw)) if not raw[place].kinds and _is_like_an_id(codes[:, place])]
    if same:
        advice = f"{listing('data.source.drop', same)} leaves {'it' if len(same) == 1 else 'them'} out"
        said["like an id"] = f"{listed(same)}, a whole number of its own in each row; {advice}"
    return said


def white_space(columns: Sequence[Column]) -> str:
    """Return words about kinds of text that differ from others, or from an empty cell, in white space alone."""
    odd = {c.name: [k for k in c.kinds if k != k.strip() and k.strip() in ("", *c.kinds)] for c in columns}
    told = [f"{quoted(name)} has {listed(kinds)}" for name, kinds in odd.items() if kinds]
    return f"{', '.join(told)}: kinds of their own, though nothing else sets them apart" if told else ""


def counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _some(said: list[str], most: int = 20) -> list[str]:
    return said[:most] + [f"… ({len(said)} in all)"] * (len(said) > most)


def _is_like_an_id(values: np.ndarray) -> bool:
    return len(values) >= 10 and bool((values == np.floor(values)).all()) and len(np.unique(values)) == len(values)


def _checked(values: np.ndarray, rows: int, name: str) -> np.ndarray:
    if values.shape[:1] != (rows,):
        raise InputError(
            f"expected {rows} rows in every column, but {quoted(name)} has the shape {values.shape}; mend it"
        )
    if values.dtype.kind not in "biufOSU" or (values.ndim > 1 and values.dtype.kind not in "biuf"):
        raise InputError(
            f"expected numbers or text in every feature column, but {quoted(name)} has values of the type "
            f"{values.dtype}; write them as numbers or leave it out"
        )
    return values


def _coded(values: np.ndarray, name: str, defects: Defects) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return codes (rows, 1) of the kinds, in order, NaN for a gap, and the kinds; add the defects."""
    found, indices = distinct(values)
    texts: list[str | None] = []
    for code, value in enumerate(found):
        try:
            texts.append(_text(value))
        except ValueError as error:
            texts.append(None)
            defects += [(row, f"{quoted(name)} holds {error}") for row in np.flatnonzero(indices == code).tolist()]
    kinds = tuple(sorted({kind for kind in texts if kind is not None}))
    place = {kind: float(code) for code, kind in enumerate(kinds)}
    codes = np.array([np.nan if kind is None else place[kind] for kind in texts], dtype=np.float64)
    return codes[indices][:, None], kinds


def _text(value: Any) -> str | None:
    if isinstance(value, str | bytes):
        return text(value)
    if value is None or value != value:  # NaN
        return None
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value).removesuffix(" 00:00:00")  # of a date


def _recoded(codes: np.ndarray, new: Sequence[float]) -> np.ndarray:
    """Return new[code] for each code, NaN for NaN."""
    gaps = np.isnan(codes)
    return np.where(gaps, np.nan, np.array([*new, np.nan])[np.where(gaps, len(new), codes).astype(np.int64)])


def _text_or_numbers(
    values: np.ndarray, name: str, decimal: str | None
) -> tuple[np.ndarray, tuple[str, ...], Defects, str]:
    """Return codes (rows, 1) of kinds and the kinds, or numbers and none; the defects; why it is neither, or nothing.

    Text of too many kinds is taken for numbers if most of them are: then the others are defects.
    """
    defects = Defects()
    codes, kinds = _coded(values, name, defects)
    if kinds and (words := _written_otherwise(kinds, decimal)):
        return codes, kinds, defects, f"{quoted(name)} holds {words}"
    if len(kinds) <= MOST_KINDS and 2 * len(kinds) <= len(codes):
        return codes, kinds, defects, ""
    if 2 * sum(_number(kind) is None for kind in kinds) < len(kinds):
        found, defects = numbers(values, name, gaps=True)
        return found[:, None], (), defects, ""
    much = f"{counted(len(kinds), 'kind')} in {counted(len(codes), 'row')}"
    return codes, kinds, defects, f"{quoted(name)} is text of {much}, which are too many to learn from"


def _written_otherwise(kinds: Sequence[str], decimal: str | None) -> str:
    """Return how numbers are written, and the fix, if all kinds are numbers with a comma, or with marks in them."""
    such = f"such as {quoted(kinds[0])}"
    comma = decimal != "," and all(map(COMMA, kinds))
    fix = for_the_shell(override("data.source.decimal", ","))
    if all(map(THOUSANDS, kinds)):
        also = f", or set {fix} if the comma is the decimal one" if comma else ""
        return f"numbers with a mark between thousands, {such}: write them without it, names with a letter{also}"
    return f"numbers with a decimal comma, {such}: set {fix}" if comma else ""


def numbers(values: np.ndarray, name: str, gaps: bool = False) -> tuple[np.ndarray, Defects]:
    """Return a column of numbers, NaN for gaps, and the cells that are none. gaps: True if these may be empty."""
    defects, found = Defects(), np.empty(len(values))
    if values.dtype.kind in "biuf":
        found[:] = values
    else:
        codes, kinds = _coded(values, name, defects)
        read = [_number(kind) for kind in kinds]
        found[:] = _recoded(codes[:, 0], [np.nan if number is None else number for number in read])
        wrong = {code for code, number in enumerate(read) if number is None}
        defects += _holds(codes[:, 0], kinds, wrong, name)
    refused = {row for row, _ in defects}
    if not gaps:
        empty = [row for row in np.flatnonzero(np.isnan(found)).tolist() if row not in refused]
        defects += [(row, f"{quoted(name)} is empty") for row in empty]
    return found, defects + _too_large(found[:, None], [name])


def _holds(codes: np.ndarray, kinds: Sequence[str], wrong: set[int], name: str) -> Defects:
    rows = np.flatnonzero(np.isin(codes, [*wrong])).tolist()
    return [(row, f"{quoted(name)} holds {quoted(kinds[int(codes[row])])}, which is not a number") for row in rows]


def _number(kind: str) -> float | None:
    """Return the number that a text is, NaN for a word that means a gap, None for other text."""
    if kind in GAPS or kind.lower() in ("true", "false"):
        return np.nan if kind in GAPS else float(kind.lower() == "true")
    try:
        return None if "_" in kind else float(kind)
    except ValueError:
        return None


def _too_large(block: np.ndarray, names: Sequence[str]) -> Defects:
    """Return the cells that float32, in which a net is trained, can't hold."""
    if not block.size or (np.nanmin(block, initial=0) >= -LARGEST and np.nanmax(block, initial=0) <= LARGEST):
        return []
    wrong = np.argwhere(~(np.abs(block) <= LARGEST) & ~np.isnan(block)).tolist()
    limit = f"which is not finite, or above {LARGEST:.1e}: rescale it"
    return [(row, f"{quoted(names[place])} holds {block[row, place]}, {limit}") for row, place in wrong]


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
