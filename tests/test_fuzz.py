"""Damaged, hostile and odd files and overrides: read, or refused in one sentence, in bounded memory; none runs code.

Every input is a function of its number, so a find can be made again. `make test` tries a share, `make test-all` all.
"""

import gzip
import io
import json
import pickle
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from manual_mlp import InputError
from manual_mlp.training import readers, sources
from manual_mlp.training import run as training
from manual_mlp.training.config import check, explain
from manual_mlp.training.data import DataModule
from manual_mlp.training.readers import read_idx
from tests.audited import audit, read_curves
from tests.configs import ROOT, configured
from tests.test_data import idx_bytes

SHARE, ALL = 250, 10_000  # inputs for each reader
WORDS = [
    b"\0", b"\xff", b"\x80", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b",", b'"', b"\n", b"\r", b";",
    b"-", b"1e999", b"nan", b"inf", b"NA", b"True", b"9" * 30, b"|O", b"<U9", b"V0", b"(", b")", b"\xef\xbb\xbf",
]  # fmt: skip


def seeds(kind: str) -> list[bytes]:
    """Whole files to damage."""
    rng = np.random.default_rng(0)
    numbers, codes, names = rng.normal(size=24), rng.integers(0, 5, 24), np.array(list("pqr") * 8)
    if kind == "idx":
        whole = idx_bytes(rng.integers(0, 256, (12, 3, 2), dtype=np.uint8))
        return [whole, gzip.compress(whole), gzip.compress(whole, 0)]
    frame = pd.DataFrame({"a": numbers, "b": codes, "c": codes > 2, "y": names})
    if kind == "csv":
        text = frame.to_csv(index=False).encode()
        return [text, text.replace(b"\n", b"\r\n"), frame.assign(y=codes).to_csv(index=False).encode()]
    files = [io.BytesIO() for _ in range(3)]
    if kind == "npz":
        half = numbers.astype(np.float16)
        np.savez(files[0], a=numbers.reshape(24, 1), b=codes, y=names)
        np.savez_compressed(files[1], a=half, b=codes.astype(np.int8), y=codes)
        np.savez_compressed(files[2], a=numbers.reshape(2, 12).T, y=half[:12])
    else:
        for file, compression in zip(files, (None, "snappy", "gzip"), strict=True):
            frame.to_parquet(file, compression=compression)
    return [file.getvalue() for file in files]


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A bit or byte changed, a stretch left out, doubled, cut off or overwritten, an extreme number put in."""
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 3])):
        size, at, what = len(data), draw.randrange(len(data) + 1), draw.randrange(8)
        stretch = slice(at, at + draw.choice([1, 2, 4, 16, 64]))
        if what == 0 and size:
            data[at - 1] ^= 1 << draw.randrange(8)
        elif what == 1 and size:
            data[at - 1] = draw.randrange(256)
        elif what == 2:
            del data[stretch]
        elif what == 3:
            data[at:at] = draw.choice(WORDS)
        elif what == 4:
            word = draw.choice(WORDS)
            data[at : at + len(word)] = word
        elif what == 5:
            data[draw.randrange(size + 1) : 0] = data[stretch]
        elif what == 6:
            del data[at:]
        else:
            width = draw.choice([1, 2, 4, 8])
            number = draw.choice([0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1])
            data[at : at + width] = number.to_bytes(width, draw.choice(["big", "little"]))
    return bytes(data)


CELLS = ["1", "0", "2", "-3.5", "", "x", "1e40", "nan", '"q, r"', "True", " 7", "1e-50", "9" * 20, "ä", "None", '"']
PLAIN = ["f8", "f4", "f2", "g", "i1", "i8", "u8", "?"]
DTYPES = [*PLAIN, "U3", "S3", "c16", "M8[s]", "m8[s]", "V4", "U0", "O", "f8,i4", "3f8"]
COLUMNS = [
    pa.array(values * (60 // len(values)), type)
    for values, type in [
        ([1, 0, 3], None), ([1, None, 3], None), ([0.5, 1e300], None), (["p", None], None), (["p", "q"], None),
        ([[1], []], None), ([{"k": 1}], None), ([b"\xff", b"a"], None), ([True, None], None), ([None], None),
        ([1, 2], pa.date32()), ([1, None], pa.timestamp("ns", "UTC")), ([1, 2], pa.decimal128(9, 2)),
        ([1, 2], pa.duration("s")), ([0, 1], pa.int8()), (["p"], None), ([2**63, 1], pa.uint64()),
        ([1, 2], pa.dictionary(pa.int8(), pa.int64())), (["p", "q"], pa.dictionary(pa.int8(), pa.string())),
        ([np.float16(0.5)], pa.float16()), ([1, 2, 3], None),
    ]
]  # fmt: skip


def composed(kind: str, draw: random.Random) -> bytes:
    """A whole file of odd content."""
    names = draw.sample(["a", "b", "y", "", "y ", "ü", "n" * 300, "l\nl"], draw.randrange(1, 5))
    if draw.random() < 0.8 and "y" not in names:
        names.append("y")
    rows = draw.choice([0, 1, 7, 40, 40, 40])
    file = io.BytesIO()
    if kind == "idx":
        sizes = [draw.choice([0, 1, 2, 3, 40]) for _ in range(draw.choice([1, 2, 3, 3, 3, 4]))]
        return idx_bytes(np.zeros(sizes, draw.choice([np.uint8, np.uint8, np.int16])))
    if kind == "csv":
        cells = [CELLS[: draw.choice([3, 3, 3, 3, 3, 3, len(CELLS)])] for _ in names]
        table = [[name.replace("\n", "") for name in names]] + [[draw.choice(of) for of in cells] for _ in range(rows)]
        if draw.random() < 0.2:
            table[-1].append("8")
        separator, end = draw.choice([",", ",", ",", ";"]), draw.choice(["\n", "\r\n"])
        return end.join(separator.join(row) for row in table).encode()
    if kind == "npz":
        bits = np.random.default_rng(draw.randrange(2**32))
        arrays = {}
        for name in names:
            dtype = np.dtype(draw.choice(PLAIN if draw.random() < 0.7 else DTYPES))
            shape = draw.choice([(rows,)] * 9 + [(rows, 2), (rows, 2), (), (rows + 1,)])
            raw = bits.integers(0, 256, (*shape, max(1, dtype.itemsize)), dtype=np.uint8)
            plain = bits.integers(0, 3, shape)
            made = dtype.hasobject or dtype.subdtype or dtype.itemsize == 0 or draw.random() < 0.7
            arrays[name] = plain.astype(dtype) if made else raw.view(dtype)[..., 0]
        np.savez(file, **arrays)
    else:
        columns = [draw.choice(COLUMNS[:: draw.choice([1, 20])]).slice(0, rows) for _ in names]
        table = pa.table(columns, names)
        parquet.write_table(table, file)
    return file.getvalue()


def used(path: Path, draw: random.Random) -> None:
    """What the training does with a file."""
    if path.suffix == ".idx":
        read_idx(path, 3)
        return
    samples = sources.table(str(path), "y", draw.choice(sources.TASKS))
    data = DataModule("fuzz", lambda: samples, standardise=draw.random() < 0.5)
    data.setup()
    for rows in data.splits.values():
        assert rows.features.isfinite().all()
        assert rows.target.isfinite().all()


def check_sentence(error: InputError, path: Path) -> None:
    text = str(error).replace(str(path), "")
    assert text.startswith("expected ")
    lines = text.split("\n")
    assert len(lines) <= (1 if not text.startswith("expected a table without defects") else 23)  # 20, and a count
    assert all(len(line) < 2500 for line in lines), text  # the names of twenty columns, cut to a hundred letters each


@pytest.mark.parametrize("inputs", [SHARE, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["idx", "csv", "npz", "parquet"])
def test_readers(kind: str, inputs: int, tmp_path: Path) -> None:
    path, whole, outcomes = tmp_path / f"t.{kind}", seeds(kind), Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(inputs):
        draw = random.Random(number)
        path.write_bytes(damaged(draw.choice(whole), draw) if number % 2 else composed(kind, draw))
        try:
            used(path, draw)
            outcomes["read"] += 1
        except InputError as error:
            check_sentence(error, path)
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"input {number} of {kind}") from error
    print(f"{kind}: {dict(outcomes)}, 0 crashes")
    assert min(outcomes["read"], outcomes["refused"]) > inputs // 40  # both are reached
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB, of files below 64 KiB


def zeros(claimed: tuple[int, ...], held: int) -> bytes:
    """A gzipped IDX file of `held` bytes 0 whose header claims these sizes."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as unpacked:
        unpacked.write(bytes([0, 0, 8, len(claimed)]) + struct.pack(f">{len(claimed)}I", *claimed))
        for _ in range(held >> 20):
            unpacked.write(bytes(1 << 20))
    return file.getvalue()


def npz(shape: tuple[int, ...], held: int, dtype: str = "<f8") -> bytes:
    """An NPZ file of `held` bytes 0 whose array claims this shape."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("y.npy", "w") as array:
        np.lib.format.write_array_header_1_0(array, {"descr": dtype, "fortran_order": False, "shape": shape})
        for _ in range(held >> 20):
            array.write(bytes(1 << 20))
    return file.getvalue()


def equal_rows(rows: int) -> bytes:
    """A Parquet file of a few hundred bytes with this many rows."""
    file = io.BytesIO()
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([1.0]))
    parquet.write_table(pa.table({"y": column}), file)
    return file.getvalue()


MOST, MANY = 1 << 24, 17 << 20  # the limit in these tests, and a little more
CLAIMS = {
    "t.idx": lambda: b"\0\0\x08\x03" + b"\xff" * 12,
    "bomb.idx": lambda: zeros((MANY >> 16, 256, 256), MANY),
    "longer.idx": lambda: zeros((1, 1, 1), MANY),
    "claim.npz": lambda: npz((1 << 60,), 0),
    "negative.npz": lambda: npz((-1,), 0),
    "overflow.npz": lambda: npz((1 << 62, 1 << 62), 0),
    "nothing.npz": lambda: npz((1 << 60,), 0, "|V0"),
    "bomb.npz": lambda: npz((MANY // 8,), MANY),
    "bomb.parquet": lambda: equal_rows(MANY // 8),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_checked_before_memory_is_taken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small files that claim from 17 MiB to more than any machine has."""
    assert readers.MOST_BYTES == 256 << 20
    monkeypatch.setattr(readers, "MOST_BYTES", MOST)
    path = tmp_path / name
    path.write_bytes(CLAIMS[name]())
    assert readers.MOST_TIMES * path.stat().st_size < MANY
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refused:
            read_idx(path, 3) if path.suffix == ".idx" else sources.table(str(path), "y", "regression", max_bytes=MOST)
        check_sentence(refused.value, path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    """From an NPZ or a lone array named so, from a pickle so named, from metadata of Arrow and of pandas."""
    gone_off = tmp_path / "gone off"
    load = pickle.dumps(Bomb(gone_off))
    objects = np.array([Bomb(gone_off)], dtype=object)
    np.savez(tmp_path / "a.npz", x=objects, y=np.ones(1))
    np.savez(tmp_path / "b.npz", x=np.ones(1), y=objects)
    with (tmp_path / "c.npz").open("wb") as file:
        np.save(file, objects)
    for ending in ("csv", "npz", "parquet"):
        (tmp_path / f"d.{ending}").write_bytes(load)
    kind = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": load}
    field = pa.field("x", pa.int64(), metadata=kind)
    for name, schema in (("e", pa.schema([field, ("y", pa.int64())])), ("f", pa.schema([field], {"pandas": load}))):
        table = pa.table([pa.array([1, 2])] * len(schema), schema=schema)
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    files = sorted(path for path in tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        try:
            sources.table(str(path), "y", "regression")
        except InputError as error:
            check_sentence(error, path)
    assert not gone_off.exists()
    pickle.loads(load)
    assert gone_off.exists()  # the load was live


OVERRIDES = [
    "seed=1", "backprop=engine", "threads=2", "optimized_metric=test_loss", "task=test", "report=false", "data=wine",
    "data.batch_size=7", "data.val_size=0.2", "data.standardise=false", "data.class_weight=[1,2,3]", "model=perceptron",
    "model.hidden=[5,4]", "model.activation=relu", "model.dropout=0.5", "model.l1=1e-4", "optimizer=adam",
    "optimizer.lr=0.1", "optimizer._target_=torch.optim.Rprop", "scheduler=cosine", "trainer.max_epochs=3",
    "trainer.precision=null", "callbacks=early_stopping", "~logger", "+metrics.f1._target_=torchmetrics.F1Score",
    "experiment=xor", "hydra.job.name=x", "trainer.profiler='simple'", "data.source.path=a.csv", "ckpt_path=x.ckpt",
]  # fmt: skip
VALUES = [
    "", "null", "true", "-1", "1e999", "nan", "abc", "[]", "{}", "[1,{a:2}]", "${seed}", "${x}", "???", "'", "é", "1,2",
    "range(1,3)", "{_target_:os.getcwd}", "0x10", "9" * 40, "a=b", "\\", "${oc.env:NOWHERE}", "[[[", "[1,null]",
]  # fmt: skip


def mistyped(draw: random.Random) -> list[str]:
    """One to three overrides, some with another value, key or group, some with characters changed."""
    chosen = draw.sample(OVERRIDES, draw.randint(1, 3))
    key, _, value = draw.choice(chosen).partition("=")
    other = draw.choice(OVERRIDES).partition("=")
    chosen[-1] = draw.choice(
        [
            f"{key}={draw.choice(VALUES)}",
            f"{key}{draw.choice(['.x', 's', '[0]', '@a', '/b'])}={value}",
            f"{draw.choice(['+', '++', '~'])}{key}={value}",
            f"{key}={other[2]}",
            damaged(chosen[-1].encode(), draw).decode(errors="ignore").replace("\0", ""),
        ]
    )
    return chosen


def sentence_for(folder: Path, overrides: list[str]) -> str | None:
    """What train.py says of them; None where it would go on."""
    try:
        check(configured(folder, *overrides))
    except Exception as error:
        return explain(error) or repr(error)
    return None


@pytest.mark.parametrize("inputs", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_overrides(inputs: int, tmp_path: Path) -> None:
    """Each is composed and checked, or ends in one sentence; nothing that a `_target_` names has been called."""
    outcomes = Counter[str]()
    for number in range(inputs):
        overrides = mistyped(random.Random(number))
        told = sentence_for(tmp_path, overrides)
        assert told is None or told.startswith("expected "), (number, overrides, told)
        outcomes["refused" if told else "composed"] += 1
    print(f"overrides: {dict(outcomes)}, 0 crashes")
    assert min(outcomes["composed"], outcomes["refused"]) > inputs // 40


CHECKPOINTS, FOLDERS = 3000, 2000
SAMPLE = 40, 30


def check_audited(found: dict) -> None:
    """Nothing happened that should not, and both ends were reached."""
    print(found["outcomes"])
    assert found["finds"] == []
    assert found["left"] == ["beside/kept.ckpt"]
    assert found["memory"] < 200  # MiB, of files below 64 KiB
    ends = {f"{made} {end}" for made in ("checkpoint_of", "overrides_of") for end in ("taken", "refused")}
    assert found["outcomes"].keys() == ends


def audited(*words: object) -> dict:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.audited", *map(str, words)]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[-3000:]
    return json.loads(job.stdout)


def test_foreign_checkpoints_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None runs code, touches a file outside of its folder, opens a socket, or ends in a traceback."""
    monkeypatch.setattr(training, "learning_curves", read_curves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_audited(audit(tmp_path, *map(range, SAMPLE), ["adam", "perceptron"]))


def test_pages_state_the_counts() -> None:
    page, readme = (path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "trust.md", ROOT / "README.md"))
    assert f"{CHECKPOINTS:,} checkpoints and {FOLDERS:,} run folders" in page
    assert f"{SAMPLE[0]} and {SAMPLE[1]}" in page
    assert f"{CHECKPOINTS:,} and {FOLDERS:,}" in readme


@pytest.mark.slow
def test_thousands_of_foreign_checkpoints_and_folders(tmp_path: Path) -> None:
    check_audited(audited(tmp_path, f"0:{CHECKPOINTS}", f"0:{FOLDERS}"))


@pytest.mark.slow
def test_foreign_checkpoints_of_norms_and_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "learning_curves", read_curves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_audited(audit(tmp_path, range(300), range(60), ["lenet"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "checkpoints", "folders", "events"),
    [
        ("paths", 250, 0, {"open", "shutil.rmtree"}),
        ("objects", 200, 0, {"os.mkdir", "os.system", "shutil.rmtree", "os.kill"}),
        ("overrides", 0, 250, {"import"}),
    ],
)
def test_planted_faults_are_found(
    tmp_path: Path, planted: str, checkpoints: int, folders: int, events: set[str]
) -> None:
    """One of these events is seen; which one depends on what the inputs of these numbers name."""
    found = audited(tmp_path, f"0:{checkpoints}", f"0:{folders}", planted)
    assert events & {event.split()[0] for find in found["finds"] for event in find["seen"]}
