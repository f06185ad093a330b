"""Data files into NumPy arrays: IDX (the format of MNIST) and tables (CSV, NPZ, Parquet)."""

import gzip
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from manual_mlp.errors import InputError

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

GZIP_MAGIC = b"\x1f\x8b"
TABLE_SUFFIXES = (".csv", ".npz", ".parquet")
SHOWN = 20  # names in a message, of columns
LETTERS = 100  # of a file's own words in a message
LARGEST = np.finfo(np.float32).max
# What a file may unpack to: a damaged header claims any size, and a gzip bomb grows a thousandfold.
MOST_BYTES, MOST_TIMES = 1 << 28, 100


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    The file is a magic number (0, 0, the element type 8, the number of dimensions), the size of each dimension as a
    big-endian 32-bit integer, and the bytes themselves.

    Returns: uint8 array with `dimensions` axes (images have 3, labels 1).
    Raises: InputError if the file is missing, truncated, not what its header says, or a gzip bomb.
    """
    try:
        with _opened(path) as file:
            shape = _idx_shape(path, file.read(4 + 4 * dimensions), dimensions)
            expected = int(np.prod(shape, dtype=object))
            _check_unpacked(path, expected)
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


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        gzipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path)) if gzipped else path.open("rb")


def _idx_shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    magic = bytes([0, 0, 8, dimensions])
    if header[:4] != magic:
        raise InputError(
            f"expected an IDX file that begins with the magic number {magic.hex()}, but {path} begins with "
            f"{header[:4].hex() or 'nothing'}; check that images and labels are not mixed up and download it again"
        )
    if len(header) < 4 + 4 * dimensions:
        raise InputError(
            f"expected an IDX header of {4 + 4 * dimensions} bytes, but {path} ends after {len(header)}; "
            "download it again"
        )
    return struct.unpack(f">{dimensions}I", header[4:])


def _check_unpacked(path: Path, claimed: int) -> None:
    """Refuse, before any memory is taken, a file that claims to hold far more than its size allows."""
    most = max(MOST_BYTES, MOST_TIMES * path.stat().st_size)
    if claimed > most:
        raise InputError(
            f"expected a file that holds at most {most} bytes, given its size, but {path} claims {claimed}; "
            "it is damaged or made to fill the memory; if you trust it, write it again without compression"
        )


def read_table(path: Path, target: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read a table whose first row (CSV), array names (NPZ) or column names (Parquet) include `target`.

    In an NPZ file each array has one row per sample; all arrays but the target are features.

    Returns: features (N, n) float64, target (N,) as it stands in the file, and the names of the n columns.
    Raises: InputError if the file can't be read, lacks the target, or has a feature that isn't a number.
    """
    columns = read_columns(path, "data.source.path")
    if target not in columns:
        known = ", ".join(brief(name) for name in list(columns)[:SHOWN])
        known += f", … ({len(columns)} in all)" if len(columns) > SHOWN else ""
        separated = path.suffix.lower() == ".csv" and len(columns) == 1 and ";" in known
        fix = "is it separated by ;? separate it by commas" if separated else "name one of them in data.source.target"
        raise InputError(f"expected a target column {target!r} in {path.name}, but its columns are {known}; {fix}")
    labels = columns.pop(target)
    if labels.ndim != 1:
        raise InputError(f"expected one target value per row, but {target!r} has the shape {labels.shape}; split it up")
    if not len(labels):
        raise InputError(f"expected rows in {path}, but the data is empty; check that it is the right file")
    return _feature_matrix(columns, len(labels)), labels, column_names(columns)


def read_features(path: Path, names: Sequence[str], option: str) -> np.ndarray:
    """The columns `names` of a table, in this order → (N, n) float64; without names, all columns as they come.

    Raises: InputError as `read_table`, and for columns that are missing, or that nobody asked for.
    """
    columns = read_columns(path, option)
    there = column_names(columns)
    missing, extra = ([name for name in one if name not in other] for one, other in ((names, there), (there, names)))
    if names and (missing or extra):
        what = f"lacks {_listed(missing)}" if missing else f"has {_listed(extra)} as well"
        raise InputError(
            f"expected the {len(names)} columns that the net was trained on, in any order, but {path.name} {what}; "
            f"{'add' if missing else 'remove'} {'it' if len(missing or extra) == 1 else 'them'}"
        )
    rows = [values.shape[0] for values in columns.values() if values.ndim]
    features = _feature_matrix(columns, max(rows, default=0))
    return features[:, [there.index(name) for name in names]] if names else features


def read_columns(path: Path, option: str) -> dict[str, np.ndarray]:
    """The columns of a table by name. `option` is the key that a message tells to check."""
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise InputError(
            f"expected a table that ends in {', '.join(TABLE_SUFFIXES)}, but got {path.name}; "
            "convert it or give the file its proper ending"
        )
    if not path.is_file():
        raise InputError(f"expected a table file, but there is none at {path}; check {option}")
    return _read_columns(path, suffix)


def column_names(columns: dict[str, np.ndarray]) -> tuple[str, ...]:
    """A name for each feature: of an array of several columns (NPZ), name[0], name[1], …"""
    widths = {name: int(np.prod(values.shape[1:])) for name, values in columns.items()}
    return tuple(
        name if columns[name].ndim == 1 else f"{name}[{index}]" for name in columns for index in range(widths[name])
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(brief(name)) for name in names[:SHOWN]) + (
        f", … ({len(names)} in all)" if len(names) > SHOWN else ""
    )


def _read_columns(path: Path, suffix: str) -> dict[str, np.ndarray]:
    read = {".csv": _read_csv, ".npz": _read_npz, ".parquet": _read_parquet}[suffix]
    try:
        return read(path)
    except InputError:
        raise
    except ImportError as error:  # pandas itself, or pyarrow, with which it reads Parquet
        raise InputError(
            f"expected pandas and pyarrow for reading {path.name}, but they are not installed; "
            "install them with: pip install 'manual-mlp[table]'"
        ) from error
    except Exception as error:  # of any kind: a parser trips over damage wherever it meets it
        raise _unreadable(path, error) from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        with zipfile.ZipFile(file) as archive:
            _check_unpacked(path, sum(member.file_size for member in archive.infolist()))
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:  # a pickle in a data file could run any code
            columns = {name: arrays[name] for name in arrays.files}
    for name, values in columns.items():
        if not isinstance(values, np.ndarray) or values.dtype.itemsize == 0:
            raise InputError(
                f"expected nothing but arrays in {path}, but {brief(name)} is none; write it with numpy.savez"
            )
    return columns


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    import pandas as pd

    with warnings.catch_warnings():
        # A row with more values than there are names: pandas would call the first one an index, and shift the others.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return _columns(path, pd.read_csv(path, index_col=False, low_memory=False, skipinitialspace=True))


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    import pandas as pd
    from pyarrow import parquet  # type: ignore[import-untyped]

    with path.open("rb") as file:  # not the path: pyarrow would take names of its folders for columns
        about = parquet.read_metadata(file)
        _check_unpacked(path, 8 * about.num_rows * about.num_columns)  # a run of equal values takes no space
        return _columns(path, pd.read_parquet(file))


def _columns(path: Path, frame: "pd.DataFrame") -> dict[str, np.ndarray]:
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"expected columns of different names in {path}, but {brief(twice)} comes twice; rename one")
    return {str(name): _column(frame[name]) for name in frame.columns}


def _column(series: "pd.Series") -> np.ndarray:
    """Numbers as float64 with NaN for what is missing; else objects with None, for `read_table` to judge."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_complex_dtype(series):
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    return series.to_numpy(dtype=object, na_value=None)


def _feature_matrix(columns: dict[str, np.ndarray], rows: int) -> np.ndarray:
    for name, values in columns.items():
        if values.shape[:1] != (rows,):
            raise InputError(
                f"expected {rows} rows in every column, as in the target, but {brief(name)!r} has the shape "
                f"{values.shape}; remove it or mend it"
            )
        if values.dtype.kind not in "biuf":
            raise InputError(
                f"expected numbers in every feature column, but {brief(name)!r} has other values, such as "
                f"{example(values)}; encode it as numbers or remove it"
            )
        check_numbers(f"column {brief(name)!r}", values)
    blocks = [as_float64(values).reshape(rows, -1) for values in columns.values()]
    return np.concatenate(blocks, axis=1) if blocks else np.empty((rows, 0))


def as_float64(values: np.ndarray) -> np.ndarray:
    """Numbers of any kind; a long double too large for float64 becomes infinite, which `check_numbers` refuses."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values, dtype=np.float64)


def check_numbers(name: str, values: np.ndarray) -> None:
    """Raise InputError for NaN, infinities and what float32, in which a net is trained, can't hold."""
    fits = np.abs(values) <= LARGEST
    if not fits.all():
        place = tuple(np.argwhere(~fits)[0])
        raise InputError(
            f"expected finite numbers of at most {LARGEST:.1e}, but {name} holds {values[place]} in row {place[0]} "
            "(counted from 0); remove the row, fill the gap or rescale the numbers"
        )


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"expected a file at {path}, but there is none; check the path")
    reason = brief(error) or type(error).__name__
    return InputError(
        f"expected a readable {path.suffix.lstrip('.') or 'IDX'} file at {path}, but reading failed ({reason}); "
        "check that the file is whole and of this kind"
    )


def example(values: np.ndarray) -> str:
    """The first value, for a message."""
    return brief(repr(values.ravel()[:1].tolist())[1:-1])


def brief(words: object) -> str:
    """Words out of a file, on one line and of no more than a message bears."""
    text = " ".join(str(words).split())
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}…"
