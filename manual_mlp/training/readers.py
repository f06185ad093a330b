"""Read data files into NumPy arrays: IDX (the format of MNIST) and tables (CSV, NPZ, Parquet)."""

import csv
import gzip
import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from pathlib import Path
from typing import IO, Any
from unicodedata import normalize

import numpy as np

from manual_mlp.errors import InputError, shown
from manual_mlp.training.commands import install

SHOWN = 20  # column names in a message
LETTERS = 100  # letters of a file's own words in a message
LARGEST = np.finfo(np.float32).max
# Largest unpacked IDX file: a damaged header claims any size, and a gzip bomb grows a thousandfold.
MOST_BYTES, MOST_TIMES = 1 << 28, 100
MAX_BYTES = 1 << 31  # largest decoded table, unless the user says otherwise
COLUMN = 10_000  # bytes that are counted for a column itself
BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Columns that nobody named: a blank name, pandas' word for one, and the index that pandas keeps in a Parquet file.
INDEX = re.compile(r"\s*|Unnamed: \d+(\.\d+)*|__index_level_\d+__").fullmatch
# A label that is a number is written so. Others, such as 007 and +7, are text.
NUMBER = re.compile(r"\s*-?((0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?|inf)\s*", re.ASCII).fullmatch


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    The file is a magic number (0, 0, the element type 8, the number of dimensions), the size of each dimension as a
    big-endian 32-bit integer, and the bytes themselves.

    Returns: uint8 array with `dimensions` axes (images have 3, labels 1).
    Raises: InputError if the file is missing, truncated, not what its header says, or a gzip bomb.
    """
    size, magic = 4 + 4 * dimensions, bytes([0, 0, 8, dimensions])
    try:
        with path.open("rb") as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            head = file.read(size)
            if head[:4] != magic or len(head) < size:
                it = f"ends after {len(head)}" if head[:4] == magic else f"begins with {head[:4].hex() or 'nothing'}"
                raise InputError(
                    f"expected an IDX header of {size} bytes that begins with the magic number {magic.hex()}, but "
                    f"{path} {it}; check that images and labels are not mixed up and download it again"
                )
            shape = struct.unpack(f">{dimensions}I", head[4:])
            expected, most = math.prod(shape), max(MOST_BYTES, MOST_TIMES * path.stat().st_size)
            if expected > most:  # before any memory is taken
                raise InputError(
                    f"expected a file that holds at most {most} bytes, given its size, but {path} claims {expected}; "
                    "it is damaged or made to fill the memory; if you trust it, write it again without compression"
                )
            content = file.read(expected + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"expected a whole gzip file, but {path} is damaged ({error}); download it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) != expected:
        raise InputError(
            f"expected {expected} bytes after the header of {path}, which says {' x '.join(map(str, shape))}, "
            f"but there are {'more' if len(content) > expected else len(content)}; download it again"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


@dataclass
class Table:
    """The columns of a table file; while it is being read, also the bound on what it may decode to.

    columns: by name, in the order of the file: numbers, booleans, or text as objects, with None for an empty cell. An
        array of an NPZ file may have more axes than the rows.
    left_out: columns that nobody named, such as the index that pandas writes, unless `wanted` names them.
    option: the key that a message names.
    """

    path: Path
    option: str
    max_bytes: float
    wanted: Collection[str]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def allows(self, decoded: int) -> bool:
        """Return True, or raise InputError for too many bytes: 8 for a cell, text by its length, 10,000 a column."""
        if decoded > self.max_bytes:
            fix = "split it" if self.option == "input" else "if you trust it, raise data.source.max_bytes"
            raise InputError(
                f"expected at most {self.max_bytes:.0f} bytes decoded, but {self.path.name} may take {decoded}; {fix}"
            )
        return True

    def places(self, names: Sequence[str], index: Collection[object] = ()) -> list[int]:
        """Return the places of the columns to read among all `names` of the file. index: further names to leave out."""
        kept = [name in self.wanted or not (INDEX(name) or name in index) for name in names]
        self.left_out = [*compress(names, map(not_, kept))]
        check_names(self.path, compress(names, kept))
        return [*compress(range(len(names)), kept)]


def read_table(path: Path, option: str, max_bytes: float, wanted: Collection[str], labels: str | None = None) -> Table:
    """Read a CSV, NPZ or Parquet file.

    labels: the column of a CSV file whose cells are class labels: text as it stands, unless all are written as numbers.
    Raises: InputError if the file can't be read, decodes to more than max_bytes, or has a column twice.
    """
    suffix, table = path.suffix.lower(), Table(path, option, max_bytes, wanted)
    if suffix not in READERS:
        raise InputError(
            f"expected a table that ends in {', '.join(READERS)}, but got {path.name}; convert it or rename it"
        )
    if not path.is_file():
        what, fix = ("a folder", ", or write its parts into one file") if path.is_dir() else ("none", "")
        raise InputError(f"expected a table file, but there is {what} at {path}; check {option}{fix}")
    try:
        with path.open("rb") as file:
            READERS[suffix](table, file, labels)
    except (InputError, MemoryError):
        raise
    except ImportError as error:
        raise InputError(
            f"expected pandas and pyarrow, but they are not installed; install them: {install('table')}"
        ) from error
    except Exception as error:  # any exception: a parser fails on damage wherever it meets it
        raise _unreadable(path, error) from error
    return table


def read_features(path: Path, names: Sequence[str], max_bytes: float) -> tuple[np.ndarray, list[str]]:
    """Read the columns `names` of a table, or without names all of them.

    Returns: features (N, n) float64 in the order of `names`, and the names of columns that were left out.
    Raises: InputError as `read_table`, for numbers that don't fit, columns that are missing or that nobody asked for.
    """
    table = read_table(path, "input", max_bytes, {*names})
    there, wanted = column_names(table.columns), dict.fromkeys(names)
    place = {name: index for index, name in enumerate(there)}
    missing, extra = [name for name in names if name not in place], [name for name in there if name not in wanted]
    if names and (missing or extra):
        what = f"lacks {listed(missing)}; add" if missing else f"has {listed(extra)} as well; remove"
        raise InputError(
            f"expected the {len(names)} columns that the net was trained on, in any order, but {path.name} {what} "
            f"{'it' if len(missing or extra) == 1 else 'them'}"
        )
    features = matrix(table, max((len(values) for values in table.columns.values() if values.ndim), default=0))
    check_numbers("the features", features, there)
    return features[:, [place[name] for name in names or there]], table.left_out


def matrix(table: Table, rows: int) -> np.ndarray:
    """Return the columns side by side, (rows, n) float64, and take them out of the table: each number is there once.

    Raises: InputError for columns with other lengths, other values than numbers, or the same name.
    """
    columns, names = table.columns, column_names(table.columns)
    check_names(table.path, names)
    features, place = np.empty((rows, len(names))), 0
    for name in list(columns):
        values = columns.pop(name)
        if values.shape[:1] != (rows,):
            raise InputError(
                f"expected {rows} rows in every column, but {quoted(name)} has the shape {values.shape}; mend it"
            )
        if values.dtype.kind not in "biuf":
            raise InputError(
                f"expected numbers in every feature column, but {quoted(name)} has other values, such as "
                f"{example(values)}; encode it as numbers or remove it"
            )
        block = values.reshape(rows, -1)
        features[:, place : place + block.shape[1]] = block
        place += block.shape[1]
    return features


def column_names(columns: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return the names of all features; those in an array of several columns (NPZ) are name[0], name[1] and so on."""
    widths = {name: math.prod(values.shape[1:]) for name, values in columns.items()}
    return tuple(
        name if columns[name].ndim == 1 else f"{name}[{index}]" for name in columns for index in range(widths[name])
    )


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise InputError for a name that comes twice, also with other white space or in another form of Unicode."""
    seen: dict[str, str] = {}
    for name in names:
        letters = "".join(c for c in normalize("NFC", name) if c.isprintable() and c != " ") or name
        if letters in seen:
            also = "" if seen[letters] == name else f", also as {quoted(seen[letters])} (white space, Unicode form)"
            raise InputError(
                f"expected columns of different names in {path.name}, but {quoted(name)} comes twice{also}; rename one"
            )
        seen[letters] = name


def _read_npz(table: Table, file: IO[bytes], labels: str | None) -> None:
    size = 0
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        for place in table.places(names):
            size += COLUMN
            table.allows(size + archive.infolist()[place].file_size)
            with archive.open(archive.infolist()[place]) as array:
                version = np.lib.format.read_magic(array)
                shape, _, dtype = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))(array)
                size += max(8, dtype.itemsize) * math.prod(shape)
                table.allows(size)
                array.seek(0)
                values = np.lib.format.read_array(array, allow_pickle=False)  # a pickle could run code
                if dtype.kind == "U" and np.frombuffer(values.tobytes(), dtype.str[0] + "u4").max(initial=0) > 0x10FFFF:
                    raise ValueError(f"{quoted(names[place])} holds letters beyond Unicode")  # Python would fail later
                with np.errstate(all="ignore"):  # a long double too large for float64 becomes infinite
                    table.columns[names[place]] = values.astype(np.float64, copy=False) if dtype.kind == "f" else values


def _read_csv(table: Table, file: IO[bytes], labels: str | None) -> None:
    import pandas as pd  # type: ignore[import-untyped]

    table.allows(table.path.stat().st_size)
    rows, names = _count_lines(table.path, file), _header(table)
    table.allows(table.path.stat().st_size + len(names) * (8 * rows + COLUMN))
    places = table.places(names)
    # pandas gets numbers as names, or it would rename columns. With index_col=None it would call the first value of
    # a row that is too long an index, and shift the others; now it warns.
    options: Any = {"names": range(len(names)), "header": 0, "index_col": False, "skipinitialspace": True}
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frame = pd.read_csv(file, low_memory=False, **options)
    table.columns = {names[place]: _column(frame[place]) for place in places}
    if labels is not None and labels in table.columns:
        file.seek(0)
        place = names.index(labels)
        text = pd.read_csv(file, usecols=[place], dtype=str, keep_default_na=False, na_values=[""], **options)[place]
        words = text[frame[place].notna()].unique()
        if not (len(words) and all(map(NUMBER, words))):
            table.columns[labels] = _column(text)


def _count_lines(path: Path, file: IO[bytes]) -> int:
    """Return an upper bound of the lines of a CSV file. Raises InputError for text in UTF-16 and the like."""
    start, ends = file.read(4), {b"\n": 1, b"\r": 1}
    encoding = next((name for mark, name in BOMS.items() if start.startswith(mark)), "")
    file.seek(0)
    while not encoding and (block := file.read(1 << 20)):
        encoding = "text with NUL bytes, perhaps UTF-16" if b"\0" in block else ""
        ends = {end: count + block.count(end) for end, count in ends.items()}
    if encoding:
        raise InputError(f"expected a CSV file in UTF-8, but {path.name} is {encoding}; save it as UTF-8")
    return max(ends.values())


def _header(table: Table) -> list[str]:
    """Return the names in the first row that is not blank, as they are; a nameless one gets pandas' name."""
    with table.path.open(encoding="utf-8-sig", newline="") as text:
        lines = (line for line in text if table.allows(COLUMN * line.count(",")))
        for row in csv.reader(lines, skipinitialspace=True):
            if len(row) > 1 or (row and row[0].strip()):
                return [name if name.strip() else f"Unnamed: {place}" for place, name in enumerate(row)]
    raise ValueError("No columns to parse")


def _read_parquet(table: Table, file: IO[bytes], labels: str | None) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    about = parquet.read_metadata(file)  # the open file, not the path: pyarrow would take names of folders for columns
    schema = about.schema.to_arrow_schema()
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    fields = [schema.field(place) for place in table.places(schema.names, index)]
    names = [column.name for column in fields]
    if nested := [column.name for column in fields if pa.types.is_nested(column.type)]:
        raise ValueError(f"{listed(nested)} has more than one value in a cell; split it into columns")
    # Each column says it, too, but pyarrow ends the process if it meets damage there.
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    size = sum(max(8 * group.num_rows * len(schema), group.total_byte_size) for group in groups)
    table.allows(size + COLUMN * len(schema))
    # Text stays a dictionary of distinct texts: a long one in many rows would fill the memory.
    source, parts, size = parquet.ParquetFile(file, metadata=about, read_dictionary=names), [], 0
    for number in range(len(groups)):
        parts.append(source.read_row_group(number, names, use_threads=False))
        size += parts[-1].nbytes
        table.allows(size)
    whole = pa.concat_tables(parts) if parts else schema.empty_table()
    table.columns = {name: _column(whole.column(name).to_pandas()) for name in names}


def _column(series: Any) -> np.ndarray:
    """Return numbers and booleans, with NaN for a missing number; else objects, with None for a missing one."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_complex_dtype(series):
        return series.to_numpy()
    codes, found = pd.factorize(series)  # each distinct text is there once
    return np.array([*found, None], dtype=object)[codes]


READERS = {".csv": _read_csv, ".npz": _read_npz, ".parquet": _read_parquet}


def check_numbers(name: str, values: np.ndarray, columns: Sequence[str] = ()) -> None:
    """Raise InputError for NaN, infinities and what float32, in which a net is trained, can't hold.

    columns: the names of the columns of `values`, if they have any.
    """
    if values.size and not (values.min() >= -LARGEST and values.max() <= LARGEST):  # NaN is neither
        place = tuple(np.argwhere(~(np.abs(values) <= LARGEST))[0])
        name = f"column {quoted(columns[place[1]])}" if columns else name
        raise InputError(
            f"expected finite numbers of at most {LARGEST:.1e}, but {name} holds {values[place]} in row {place[0]} "
            "(counted from 0); remove the row, fill the gap or rescale the numbers"
        )


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"expected a file at {path}, but there is none; check the path")
    reason = brief(" ".join(str(error).split())) or type(error).__name__
    whole = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "check that the file is whole"
    return InputError(
        f"expected a readable {path.suffix.lstrip('.') or 'IDX'} file at {path}, but reading failed ({reason}); "
        f"{whole} and of this kind"
    )


def example(values: np.ndarray) -> str:
    """Return the first value, for a message."""
    return brief(repr(values.ravel()[:1].tolist())[1:-1])


def listed(names: Sequence[str]) -> str:
    """Return names out of a file, for a message."""
    return ", ".join(map(quoted, names[:SHOWN])) + (f", … ({len(names)} in all)" if len(names) > SHOWN else "")


def quoted(name: object) -> str:
    return f"'{brief(name)}'"


def brief(words: object) -> str:
    """Return words out of a file as `shown`, cut to the length of a message."""
    text = shown(str(words)[: LETTERS + 1])
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}…"
