"""Read data files into NumPy arrays: IDX (the format of MNIST) and tables (CSV, TSV, NPZ, Parquet)."""

import csv
import gzip
import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import compress
from pathlib import Path
from typing import IO, Any
from unicodedata import normalize

import numpy as np

from manual_mlp.errors import InputError, shown
from manual_mlp.shell import for_the_shell, install, override

SHOWN = 20  # column names, or the like, in a message
LETTERS = 100  # letters of a file's own words in a message
LARGEST = np.finfo(np.float32).max
# Largest unpacked IDX file: a damaged header claims any size, and a gzip bomb grows a thousandfold.
MOST_BYTES, MOST_TIMES = 1 << 28, 100
MAX_BYTES = 1 << 31  # largest decoded table, unless the user says otherwise
COLUMN = 10_000  # bytes that are counted for a column itself
CELL = 64  # and for a text cut out of a line
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

    columns: (rows,) by name, in the order of the file: numbers, booleans, or text, as objects with None for an empty
        cell. An array (rows, n) of an NPZ file is n columns.
    left_out: columns that nobody named, such as the index that pandas writes, unless `wanted` names them.
    option: the key that a message names. drop: columns not to read. texts: columns of a CSV file that are text as it
        stands. labels: the one whose cells are class labels: text, too, unless all are written as numbers.
    separator, decimal: of a CSV file; by default a comma (a tab in .tsv) and a point.
    """

    path: Path
    option: str
    max_bytes: float
    wanted: Collection[str]
    drop: Collection[str] = ()
    texts: Collection[str] = ()
    labels: str | None = None
    separator: str | None = None
    decimal: str | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """The number of rows. Raises InputError if it is not that of every column."""
        rows = max(map(len, self.columns.values()), default=0)
        for name, values in self.columns.items():
            if len(values) != rows:
                raise InputError(f"expected {rows} rows in every column, but {quoted(name)} has {len(values)}; mend it")
        return rows

    @property
    def left_out_in_words(self) -> str:
        return f"{listed(self.left_out)}: an index, or without a name" if self.left_out else ""

    @property
    def mark(self) -> str:
        """The letter between two cells of a CSV file."""
        return self.separator or ("\t" if ".tsv" in self.path.name.lower()[-7:] else ",")

    def open(self) -> Any:
        """Open the file, unpacked."""
        return gzip.open(self.path) if self.path.suffix.lower() == ".gz" else self.path.open("rb")

    def lines(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows of a CSV file that are not blank, the header too, each with its line, counted from 1."""
        limit = csv.field_size_limit(2**31 - 1)  # of letters in a cell: max_bytes has been looked at
        try:
            with TextIOWrapper(self.open(), "utf-8-sig", newline="") as text:
                allowed = (line for line in text if self.allows(CELL * line.count(self.mark)))
                rows, line = csv.reader(allowed, delimiter=self.mark, skipinitialspace=True), 1
                for row in rows:
                    if len(row) > 1 or (row and row[0].strip()):
                        yield line, row
                    line = rows.line_num + 1
        finally:
            csv.field_size_limit(limit)

    def refuse(self, defects: Sequence[tuple[int | None, str]]) -> None:
        """Raise InputError with all defects in one list, by line of the file, if there are any. None: of no one row."""
        if not defects:
            return
        places: dict[str, list[int]] = {}
        for row, words in sorted(defects, key=lambda defect: (defect[0] is None, defect[0] or 0)):
            places.setdefault(words, []).extend([] if row is None else [row])
        lines, kind, end = list[int](), "row", " (counted from 0)"
        if self.path.name.lower().endswith(TEXT) and any(places.values()):
            lines, kind, end = [line for line, _ in self.lines()][1:], "line", ""
        said = []
        for words, rows in places.items():
            some = ", ".join(cut(rows, lambda row: str(lines[row] if lines else row)))
            said.append(f"{kind}{'s' * (len(rows) > 1)} {some}{end}: {words}" if rows else words)
        raise InputError(
            f"expected a table without defects, but {self.path.name} has:\n  " + "\n  ".join(cut(said)) + "\n"
            "correct the cells, or leave out the lines or columns"
        )

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
        if unknown := [name for name in self.drop if name not in names]:
            raise InputError(
                f"expected data.source.drop to name columns there are, but {self.path.name} has no {listed(unknown)}; "
                f"its columns are {listed(names)}; {separated(names) or 'name some of them'}"
            )
        nameless = [name for name in names if name not in self.wanted and (INDEX(name) or name in index)]
        self.left_out = [name for name in nameless if name not in self.drop]
        kept = [name not in nameless and name not in self.drop for name in names]
        check_names(self.path, compress(names, kept))
        return [*compress(range(len(names)), kept)]


def read_table(table: Table) -> Table:
    """Read the CSV, TSV, NPZ or Parquet file of a table into its columns.

    Raises: InputError if the file can't be read, decodes to more than max_bytes, or has a column twice.
    """
    path = table.path
    read = next((READERS[end] for end in READERS if path.name.lower().endswith(end)), None)
    if read is None:
        raise InputError(
            f"expected a table that ends in {', '.join(READERS)}, but got {path.name}; convert it or rename it"
        )
    for option in ("separator", "decimal"):
        if len(getattr(table, option) or ",") != 1:
            raise InputError(
                f"expected one letter in data.source.{option}, but got {getattr(table, option)!r}; correct it"
            )
    if not path.is_file():
        what, fix = ("a folder", ", or write its parts into one file") if path.is_dir() else ("none", "")
        raise InputError(f"expected a table file, but there is {what} at {path}; check {table.option}{fix}")
    try:
        with table.open() as file:
            read(table, file)
    except (InputError, MemoryError):
        raise
    except ImportError as error:
        raise InputError(
            f"expected pandas and pyarrow, but they are not installed; install them: {install('table')}"
        ) from error
    except Exception as error:  # any exception: a parser fails on damage wherever it meets it
        raise _unreadable(path, error) from error
    return table


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


def _read_npz(table: Table, file: IO[bytes]) -> None:
    size, columns = 0, list[tuple[str, np.ndarray]]()
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        for place in table.places(names):
            size += COLUMN
            table.allows(size + archive.infolist()[place].file_size)
            with archive.open(archive.infolist()[place]) as array:
                version = np.lib.format.read_magic(array)
                shape, _, dtype = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))(array)
                width = max(1, math.prod(map(abs, shape[1:])))  # an empty array may claim many columns, too
                size += max(8, dtype.itemsize) * math.prod(shape) + COLUMN * (width - 1)
                table.allows(size)
                array.seek(0)
                values = np.lib.format.read_array(array, allow_pickle=False)  # a pickle could run code
                if dtype.kind == "U" and np.frombuffer(values.tobytes(), dtype.str[0] + "u4").max(initial=0) > 0x10FFFF:
                    raise ValueError(f"{quoted(names[place])} holds letters beyond Unicode")  # Python would fail later
                if dtype.kind == "f":
                    with np.errstate(all="ignore"):  # too large a long double becomes infinite, a signalling NaN quiet
                        values = np.multiply(values, 1.0, dtype=float)
                columns += _in_columns(names[place], np.atleast_1d(values), names[place] in table.wanted)
    check_names(table.path, (name for name, _ in columns))
    table.columns = dict(columns)


def _in_columns(name: str, values: np.ndarray, wanted: bool) -> list[tuple[str, np.ndarray]]:
    """Return an array (rows, n) as columns name[0], name[1] and so on; (rows,) keeps its name, (rows, 1) if wanted."""
    columns = values.reshape(len(values), math.prod(values.shape[1:])).T
    if values.ndim == 1 or (wanted and len(columns) == 1):
        return [(name, columns[0])]
    return [(f"{name}[{place}]", cells) for place, cells in enumerate(columns)]


def _read_csv(table: Table, file: IO[bytes]) -> None:
    import pandas as pd  # type: ignore[import-untyped]

    size, rows = _measured(table, file)
    names = _header(table)
    table.allows(size + len(names) * (8 * rows + COLUMN))
    places = table.places(names)
    # pandas gets numbers as names, or it would rename columns. With index_col=None it would call the first value of
    # a row that is too long an index, and shift the others; now it warns.
    options: Any = {"names": range(len(names)), "header": 0, "index_col": False, "skipinitialspace": True}
    options |= {"sep": table.mark, "decimal": table.decimal or "."}
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            frame = pd.read_csv(file, low_memory=False, **options)
        except (pd.errors.ParserWarning, pd.errors.ParserError) as error:
            if hint := separated(names):  # decimal commas make cells, too
                raise InputError(
                    f"expected several columns in {table.path.name}, but its first line is {listed(names)}; {hint}"
                ) from error
            counts = [len(cells) for _, cells in table.lines()]
            more = [(row, n) for row, n in enumerate(counts, -1) if n > len(names)]
            table.refuse([(row, f"{n} cells instead of {len(names)}") for row, n in more])
            if "EOF inside string" in str(error):  # all from there on is one cell
                table.refuse([(len(counts) - 2, "a quotation mark opens here and never closes")])
            raise
    read = {place: column(frame[place]) for place in places if frame[place].dtype.kind in "biuf"}
    del frame  # two copies of a text are too many
    if again := [place for place in places if place not in read or names[place] in (*table.texts, table.labels)]:
        file.seek(0)  # in text only an empty cell is a gap
        cells = pd.read_csv(file, usecols=again, dtype=str, keep_default_na=False, na_values=[""], **options)
        for place in again:
            label = place in read and names[place] == table.labels
            words = cells[place][~np.isnan(read[place])].unique() if label else ()  # NA among numbers is a gap
            if not (len(words) and all(map(NUMBER, words))):
                read[place] = column(cells.pop(place))
    table.columns = {names[place]: read[place] for place in places}


def _measured(table: Table, file: IO[bytes]) -> tuple[int, int]:
    """Return the unpacked bytes of a CSV file, and an upper bound of its lines.

    Raises InputError for text in UTF-16 and the like.
    """
    ends, size = {b"\n": 1, b"\r": 1}, 0
    while block := file.read(1 << 20):
        size += len(block)
        table.allows(size)
        if b"\0" in block:
            raise InputError(
                f"expected a CSV file in UTF-8, but {table.path.name} is text with NUL bytes, perhaps UTF-16 or "
                "UTF-32; save it as UTF-8"
            )
        ends = {end: count + block.count(end) for end, count in ends.items()}
    return size, max(ends.values())


def _header(table: Table) -> list[str]:
    """Return the names in the first row that is not blank, as they are; a nameless one gets pandas' name."""
    for _, row in table.lines():
        return [name if name.strip() else f"Unnamed: {place}" for place, name in enumerate(row)]
    raise ValueError("No columns to parse")


def _read_parquet(table: Table, file: IO[bytes]) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    about = parquet.read_metadata(file)  # the open file, not the path: pyarrow would take names of folders for columns
    schema = about.schema.to_arrow_schema()
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    fields = [schema.field(place) for place in table.places(schema.names, index)]
    names = [field.name for field in fields]
    if nested := [field.name for field in fields if pa.types.is_nested(field.type)]:
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
    table.columns = {name: column(whole.column(name).to_pandas()) for name in names}


def column(series: Any) -> np.ndarray:
    """Return numbers and booleans, with NaN for a missing number; else objects, with None for a missing one."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_complex_dtype(series):
        values = series.to_numpy()
        return values if values.dtype.kind != "O" else series.to_numpy(np.float64, na_value=np.nan)  # pandas' own NA
    if pd.api.types.infer_dtype(series, skipna=True) == "decimal":
        return series.to_numpy(np.float64, na_value=np.nan)
    try:
        codes, found = pd.factorize(series)  # each distinct text is there once
    except TypeError as error:
        raise InputError(
            f"expected one value in each cell, but {quoted(series.name)} has lists or tables; split it into columns"
        ) from error
    return np.array([*found, None], dtype=object)[codes]


TEXT = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
READERS = dict.fromkeys(TEXT, _read_csv) | {".npz": _read_npz, ".parquet": _read_parquet}


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


def cut(items: Sequence[Any], word: Callable[[Any], str] = str) -> list[str]:
    """Return items in words; of many the first ones, and how many there are."""
    return [*map(word, items[:SHOWN]), *[f"… ({len(items)} in all)"] * (len(items) > SHOWN)]


def listed(names: Sequence[str]) -> str:
    """Return names out of a file, for a message."""
    return ", ".join(cut(names, quoted))


def separated(names: Sequence[str]) -> str:
    """Return the question about another separator if the one name of a file holds a mark, else nothing."""
    mark = next((mark for mark in ",;\t|" if len(names) == 1 and mark in names[0]), "")
    fix = override("data.source.separator", "tab" if mark == "\t" else mark)
    return f"is it separated by {mark}? set {for_the_shell(fix)}" if mark else ""


def quoted(name: object) -> str:
    return f"'{brief(name)}'"


def brief(words: object) -> str:
    """Return words out of a file as `shown`, cut to the length of a message."""
    text = shown(str(words)[: LETTERS + 1])
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}…"
