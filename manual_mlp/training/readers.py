"""Data files into NumPy arrays: IDX (the format of MNIST) and tables (CSV, NPZ, Parquet)."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manual_mlp.errors import InputError

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

GZIP_MAGIC = b"\x1f\x8b"
TABLE_SUFFIXES = (".csv", ".npz", ".parquet")
SHOWN = 20  # names in a message, of columns
LARGEST = float(np.finfo(np.float32).max)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    The file is a magic number (0, 0, the element type 8, the number of dimensions), the size of each dimension as a
    big-endian 32-bit integer, and the bytes themselves.

    Returns: uint8 array with `dimensions` axes (images have 3, labels 1).
    Raises: InputError if the file is missing, truncated, or not what its header says.
    """
    content = _decompressed(path)
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise InputError(
            f"expected an IDX file that begins with the magic number {magic.hex()}, but {path} begins with "
            f"{content[:4].hex() or 'nothing'}; check that images and labels are not mixed up and download it again"
        )
    if len(content) < header:
        raise InputError(
            f"expected an IDX header of {header} bytes, but {path} ends after {len(content)}; download it again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise InputError(
            f"expected {expected} bytes in {path}, as its header says (sizes {' x '.join(map(str, shape))}), "
            f"but it holds {len(content)}; download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _decompressed(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"expected a whole gzip file, but {path} is damaged ({error}); download it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_table(path: Path, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a table whose first row (CSV), array names (NPZ) or column names (Parquet) include `target`.

    In an NPZ file each array has one row per sample; all arrays but the target are features.

    Returns: features (N, n) float64 and target (N,) as it stands in the file.
    Raises: InputError if the file can't be read, lacks the target, or has a feature that isn't a number.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise InputError(
            f"expected a table that ends in {', '.join(TABLE_SUFFIXES)}, but got {path.name}; "
            "convert it or give the file its proper ending"
        )
    if not path.is_file():
        raise InputError(f"expected a table file, but there is none at {path}; check data.source.path")
    columns = _read_npz(path) if suffix == ".npz" else _read_frame(path, suffix)
    if target not in columns:
        known = ", ".join(list(columns)[:SHOWN]) + (f", … ({len(columns)} in all)" if len(columns) > SHOWN else "")
        separated = suffix == ".csv" and len(columns) == 1 and ";" in known
        fix = "is it separated by ;? separate it by commas" if separated else "name one of them in data.source.target"
        raise InputError(f"expected a target column {target!r} in {path.name}, but its columns are {known}; {fix}")
    labels = columns.pop(target)
    if labels.ndim != 1:
        raise InputError(f"expected one target value per row, but {target!r} has the shape {labels.shape}; split it up")
    return _feature_matrix(columns, len(labels)), labels


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:  # a pickle in a data file could run any code
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error


def _read_frame(path: Path, suffix: str) -> dict[str, np.ndarray]:
    try:
        import pandas as pd

        frame = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    except ImportError as error:  # pandas itself, or pyarrow, with which it reads Parquet
        raise InputError(
            f"expected pandas and pyarrow for reading {path.name}, but they are not installed; "
            "install them with: pip install 'manual-mlp[table]'"
        ) from error
    except (ValueError, OSError) as error:  # pandas' parser errors and undecodable text are ValueErrors
        raise _unreadable(path, error) from error
    return {str(name): _column(frame[name]) for name in frame.columns}


def _column(series: "pd.Series") -> np.ndarray:
    """Numbers as float64 with NaN for what is missing; everything else as it is, for `read_table` to judge."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_complex_dtype(series):
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    return series.to_numpy(dtype=object)


def _feature_matrix(columns: dict[str, np.ndarray], rows: int) -> np.ndarray:
    if not rows:  # an empty column has no type to judge
        return np.empty((0, len(columns)))
    for name, values in columns.items():
        if values.shape[:1] != (rows,):
            raise InputError(
                f"expected {rows} rows in every column, as in the target, but {name!r} has the shape {values.shape}; "
                "remove it or mend it"
            )
        if values.dtype.kind not in "biuf":
            example = values.ravel()[0] if values.size else ""
            raise InputError(
                f"expected numbers in every feature column, but {name!r} has other values, such as {example!r}; "
                "encode it as numbers or remove it"
            )
        check_numbers(f"column {name!r}", values)
    blocks = [np.asarray(values, dtype=np.float64).reshape(rows, -1) for values in columns.values()]
    return np.concatenate(blocks, axis=1) if blocks else np.empty((rows, 0))


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
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(
        f"expected a readable {path.suffix.lstrip('.') or 'IDX'} file at {path}, but reading failed ({reason}); "
        "check that the file is whole and of this kind"
    )
