"""Small files that could fill the memory. `python -m tests.bombs FOLDER` reads each in a process of its own.

It prints a line of JSON for each: name, bytes of the file, bytes that it decodes to, peak of the memory beyond what the
interpreter and its packages take, and the sentence that refused it, if one did.
"""

import io
import json
import os
import resource
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from manual_mlp import InputError
from manual_mlp.training import sources

MIB = 1 << 20
LIMIT = 20 * MIB  # data.source.max_bytes here
ROWS = 40_000


def npz(**arrays: tuple[tuple[int, ...], str, int]) -> bytes:
    """An NPZ file of arrays of zeros, each with the shape and type that it claims and the MiB that it has."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, dtype, held) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, {"descr": dtype, "fortran_order": False, "shape": shape})
                for _ in range(held):
                    array.write(bytes(MIB))
    return file.getvalue()


def long_header() -> bytes:
    """An NPZ file whose array has a header of 30 MiB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("y.npy", "w") as array:
        array.write(b"\x93NUMPY\x02\x00" + (30 * MIB).to_bytes(4, "little"))
        for _ in range(30):
            array.write(b" " * MIB)
    return file.getvalue()


def columnar(columns: dict[str, object], **options: object) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, compression="zstd", **options)
    return file.getvalue()


def often(text: str, rows: int) -> pa.Array:
    """A text that is there once and comes in every row, beside another one."""
    return pa.DictionaryArray.from_arrays(pa.array(np.arange(rows) % 2, pa.int32()), pa.array([text, "q"]))


def different(rows: int) -> pd.DataFrame:
    """Short texts, no two alike: the most memory for the least bytes."""
    return pd.DataFrame({"s": [f"{row:x}" for row in range(rows)], "y": np.arange(rows) % 2})


def numbers(rows: int) -> pd.DataFrame:
    return pd.DataFrame({f"c{i}": np.arange(rows) * 0.5 for i in range(10)} | {"y": np.arange(rows) % 3})


def written(frame: pd.DataFrame, suffix: str) -> bytes:
    if suffix == "csv":
        return frame.to_csv(index=False).encode()
    file = io.BytesIO()
    if suffix == "npz":
        np.savez(file, **{name: np.array(frame[name].tolist()) for name in frame})
    else:
        frame.to_parquet(file)
    return file.getvalue()


# Name: what makes the file, and the bytes that it decodes to; 0 where it is to be refused before.
Files = dict[str, tuple[Callable[[], bytes], int]]
FILES: Files = {
    "text of a dictionary.parquet": (lambda: columnar({"y": often("x" * 2 * MIB, 1000), "a": np.ones(1000)}), 2 * MIB),
    "feature of a dictionary.parquet": (
        lambda: columnar({"s": often("x" * 2 * MIB, 1000), "y": np.ones(1000)}),
        2 * MIB,
    ),
    "text of many rows.parquet": (lambda: columnar({"y": often("x" * MIB, MIB), "a": np.ones(MIB)}), 17 * MIB),
    "long texts.parquet": (lambda: columnar({"y": ["x" * MIB] * 50, "a": np.ones(50)}, use_dictionary=False), 0),
    "equal numbers.parquet": (lambda: columnar({"y": np.zeros(5 * MIB), "a": np.zeros(5 * MIB)}), 0),
    "lists.parquet": (lambda: columnar({"y": [1, 2], "a": [np.zeros(2 * MIB)] * 2}), 0),
    "one long label.csv": (lambda: b"a,y\n1," + b"p" * 20_000 + b"\n" + b"1,q\n2,r\n" * 5000, 100_000),
    "commas.csv": (lambda: b"," * 5 * MIB + b"\n1\n", 0),
    "names.csv": (lambda: ",".join(map(str, range(30_000))).encode() + b",y\n1\n", 0),
    "short rows.csv": (lambda: ",".join(map(str, range(5000))).encode() + b",y\n" + b"1\n" * 10_000, 0),
    "quoted line ends.csv": (lambda: b'a,y\n"' + b"\n" * 2 * MIB + b'",1\n', 0),
    "zeros.npz": (lambda: npz(y=((10 * MIB,), "<f8", 80)), 0),
    "small zeros.npz": (lambda: npz(y=((20 * MIB,), "|i1", 20)), 0),
    "many arrays.npz": (lambda: npz(**dict.fromkeys("abcdefgh", ((MIB // 4,), "<f8", 2)), y=((MIB,), "<f8", 8)), 0),
    "no rows of many columns.npz": (lambda: npz(y=((6,), "<f8", 0), a=((0, 10**12), "<f8", 0)), 0),
    "claimed.npz": (lambda: npz(y=((MIB,), "<f8", 1)), 0),
    "claimed text.npz": (lambda: npz(y=((MIB,), "<U1000000", 1)), 0),
    "claimed beyond all.npz": (lambda: npz(y=((1 << 60,), "<f8", 0), a=((-1,), "<f8", 0)), 0),
    "header.npz": (long_header, 0),
}
for kind in ("csv", "npz", "parquet"):
    FILES[f"different.{kind}"] = (partial(lambda kind: written(different(ROWS), kind), kind), ROWS * (8 + 8 + 8))
    FILES[f"numbers.{kind}"] = (partial(lambda kind: written(numbers(ROWS), kind), kind), ROWS * 11 * 8)


def used(path: Path) -> str:
    try:
        sources.table(str(path), "y", "classification", max_bytes=LIMIT)
    except InputError as error:
        return str(error)
    return ""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measured(path: Path) -> dict[str, object]:
    """The peak and the sentence of a process that does nothing else, and that may take at most 2 GiB more."""
    read, write = os.pipe()
    if os.fork() == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2048 * MIB, size + 2048 * MIB))
        before = resident()
        try:
            sentence = used(path)
        except BaseException as error:
            sentence = f"CRASH {error!r}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        os.write(write, json.dumps({"peak": peak, "sentence": sentence}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as result:
        text = result.read()
    os.wait()
    return json.loads(text)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for suffix in ("csv", "npz", "parquet"):  # what a first use loads and keeps is not the file's
        path = folder / f"first.{suffix}"
        path.write_bytes(written(numbers(60), suffix))
        assert not used(path)
    for name, (make_file, _) in FILES.items():  # in processes of their own as well: the peak of this one is inherited
        if os.fork() == 0:
            (folder / name).write_bytes(make_file())
            os._exit(0)
        os.wait()
        print(
            json.dumps({"name": name, "bytes": (folder / name).stat().st_size, **measured(folder / name)}), flush=True
        )
