"""Tables are data: their names, labels and sizes, from a file through training to predictions."""

import csv
import io
import json
import re
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from manual_mlp import InputError, plots
from manual_mlp import formulas as sheet
from manual_mlp.errors import shown
from manual_mlp.training import run as training
from manual_mlp.training import sources
from manual_mlp.training.data import DataModule, check
from manual_mlp.training.predict import predict_file
from manual_mlp.training.readers import MAX_BYTES
from manual_mlp.training.sources import Samples
from tests.bombs import FILES, LIMIT, MIB
from tests.configs import ROOT, configured

FORMATS = ("csv", "npz", "parquet")
REPEATED = 8  # rows of each label
HOSTILE = ["\x1b[31mred", "a\tb", "\x9b2J", "b\u202egnp", "c\u2066d", "e\u2028f", "\x7f", "=1+1", "l\nl"]
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def values(column: object) -> list:
    """Python's own values; NumPy drops a NUL at the end of text."""
    return column if isinstance(column, list) and isinstance(column[0], str) else np.asarray(column).tolist()


def written(folder: Path, kind: str, columns: dict[str, object]) -> Path:
    """A table file of these columns, names and values as they are."""
    path = folder / f"t.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            cells = [[v.decode() if isinstance(v, bytes) else v for v in values(c)] for c in columns.values()]
            writer.writerows(zip(*cells, strict=True))
    elif kind == "npz":
        np.savez(path, **{name: np.asarray(column) for name, column in columns.items()})
    else:
        numbers = {
            name: np.asarray(column) for name, column in columns.items() if np.asarray(column).dtype.kind in "biuf"
        }
        parquet.write_table(pa.table({name: numbers.get(name, values(columns[name])) for name in columns}), path)
    return path


def with_header(folder: Path, kind: str, names: list[str]) -> Path:
    """A table of three rows of numbers with this row of names, whatever is in it."""
    path, rows = folder / f"t.{kind}", np.arange(3 * len(names)).reshape(3, -1)
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerow(names)
            csv.writer(file).writerows(rows.tolist())
    elif kind == "npz":
        with zipfile.ZipFile(path, "w") as archive:
            for name, column in zip(names, rows.T, strict=True):
                content = io.BytesIO()
                np.save(content, column)
                archive.writestr(f"{name}.npy", content.getvalue())
    else:
        parquet.write_table(pa.table([pa.array(column) for column in rows.T], names=names), path)
    return path


def labelled(path: Path, task: str = "classification", **options: object) -> Samples:
    return sources.table(str(path), "y", task, **options)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
class TestNames:
    @pytest.mark.parametrize(
        ("names", "sentence"),
        [
            (["a", "b", "y", "y"], "'y' comes twice; rename"),
            (["a", "a", "y"], "'a' comes twice; rename"),
            (["y", "a", "y", "b", "y"], "'y' comes twice; rename"),
            (["a", "a ", "y"], r"'a ' comes twice, also as 'a' \(white space, Unicode form\)"),
            (["a b", "a  b", "y"], "'a  b' comes twice, also as 'a b'"),
            (["a\u00a0b", "a b", "y"], r"'a b' comes twice, also as 'a\\xa0b'"),
            (["a", "a\u200b", "y"], r"'a\\u200b' comes twice, also as 'a'"),
            (["a", "a\t", "y"], r"'a\\t' comes twice, also as 'a'"),
            ([unicodedata.normalize(form, "é") for form in ("NFC", "NFD")] + ["y"], ".* comes twice, also as 'é'"),
            (["y", "y ", "a"], "'y ' comes twice, also as 'y'"),
        ],
    )
    def test_twice(self, tmp_path: Path, kind: str, names: list[str], sentence: str) -> None:
        with pytest.raises(InputError, match=f"expected columns of different names in t.{kind}, but {sentence}"):
            labelled(with_header(tmp_path, kind, names))

    @pytest.mark.parametrize(
        "names",
        [["y.1", "y"], ["a", "A", "y"], ["x2", "x²", "y"], ["a,b", 'a"b', "y"], ["a.b", "a", "y"], ["y.1", "a", "y"]],
    )
    def test_legitimate(self, tmp_path: Path, kind: str, names: list[str]) -> None:
        samples = labelled(with_header(tmp_path, kind, names))
        assert samples.feature_names == tuple(names[:-1])
        np.testing.assert_array_equal(samples.features, np.arange(3 * len(names)).reshape(3, -1)[:, :-1])

    @pytest.mark.parametrize(
        "index",
        ["Unnamed: 0", "__index_level_0__", "Unnamed: 0.1", "Unnamed: 12", "", " "],
        ids=lambda name: repr(name),
    )
    @pytest.mark.parametrize("place", [0, 2])
    def test_what_nobody_named_is_no_feature(self, tmp_path: Path, kind: str, index: str, place: int) -> None:
        names = ["a", "y"]
        names.insert(place, index)
        samples = labelled(with_header(tmp_path, kind, names))
        assert samples.feature_names == ("a",)
        name = index if index.strip() or kind != "csv" else f"Unnamed: {place}"
        assert samples.said["left out"] == f"'{name}': an index, or without a name"

    def test_unless_asked_for(self, tmp_path: Path, kind: str) -> None:
        path = with_header(tmp_path, kind, ["a", "Unnamed: 0", "__index_level_0__"])
        samples = sources.table(str(path), "Unnamed: 0", "regression", weight="__index_level_0__")
        assert samples.target.tolist() == [1, 4, 7]
        assert samples.weight.tolist() == [2, 5, 8]
        assert samples.said["left out"] == ""


class TestIndex:
    frame = pd.DataFrame({"a": [0.5, 1.5, 2.5], "y": ["p", "q", "p"]}, index=[7, 8, 9])

    def test_of_pandas_in_csv(self, tmp_path: Path) -> None:
        self.frame.to_csv(tmp_path / "t.csv")
        pd.read_csv(tmp_path / "t.csv").to_csv(tmp_path / "again.csv")
        for name, left_out in (("t.csv", 1), ("again.csv", 2)):
            samples = labelled(tmp_path / name)
            assert samples.feature_names == ("a",)
            assert samples.said["left out"].count("'Unnamed: 0'") == left_out

    @pytest.mark.parametrize("name", [None, "id"])
    def test_of_pandas_in_parquet(self, tmp_path: Path, name: str | None) -> None:
        self.frame.rename_axis(name).to_parquet(tmp_path / "t.parquet")
        samples = labelled(tmp_path / "t.parquet")
        assert samples.feature_names == ("a",)
        assert samples.said["left out"].startswith(f"'{name or '__index_level_0__'}': ")
        plain = parquet.read_table(tmp_path / "t.parquet").replace_schema_metadata(None)
        parquet.write_table(plain, tmp_path / "t.parquet")
        assert ("id" in labelled(tmp_path / "t.parquet").feature_names) == (
            name == "id"
        )  # then it is a column as others

    def test_trailing_separators(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("a,y,,\n1,p,,\n2,q,,\n")
        assert labelled(tmp_path / "t.csv").said["left out"].startswith("'Unnamed: 2', 'Unnamed: 3': ")


def test_blocks_of_an_npz_have_names_of_their_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", **{"x": np.ones((3, 2)), "x[1]": np.ones(3), "y": np.arange(3)})
    with pytest.raises(InputError, match=r"'x\[1\]' comes twice"):
        labelled(tmp_path / "t.npz")


# Labels, and the names of their classes in order; the same from each format.
LABELS: dict[str, tuple[list, list[str]]] = {
    "booleans": ([True, False], ["False", "True"]),
    "booleans in small letters": (["true", "false"], ["false", "true"]),
    "booleans and another": (["True", "False", "x"], ["False", "True", "x"]),
    "whole numbers": ([3, 10, -2], ["-2", "3", "10"]),
    "one of several bytes": ([2**53 + 1, 2**53, 2**53 + 2], [str(2**53 + i) for i in range(3)]),
    "beyond int64": ([np.uint64(2**63 + 1), np.uint64(2**63), np.uint64(5)], ["5", str(2**63), str(2**63 + 1)]),
    "floats": ([10.0, 1.0, 2.0, -0.0], ["0", "1", "2", "10"]),
    "numbers in text": (["10", "9", "-1", "0"], ["-1", "0", "9", "10"]),
    "numbers beyond 64 bits": (["9" * 30, "1" + "0" * 30, "7"], ["7", "9" * 30, "1" + "0" * 30]),
    "text": (["p", "q", "Q"], ["Q", "p", "q"]),
    "names of nothing": (["None", "NA", "null", "nan"], ["NA", "None", "nan", "null"]),
    "more names of nothing": (["NaN", "NULL", "<NA>", "N/A", "n/a", "p"], ["<NA>", "N/A", "NULL", "NaN", "n/a", "p"]),
    "leading zeros": (["007", "7", "07", "10"], ["007", "07", "10", "7"]),
    "signs": (["+7", "7", "-7"], ["+7", "-7", "7"]),
    "one that is no number": (["1", "2", "1.0", "x"], ["1", "1.0", "2", "x"]),
    "other writings of numbers": (["1_000", "1000", "٣", "0x10", "1e", "١"], ["0x10", "1000", "1_000", "1e", "١", "٣"]),
    "infinity beside text": (["inf", "nan", "x"], ["inf", "nan", "x"]),
    "letters with signs": (["é", "e\u0301", "ß", "😀"], ["e\u0301", "ß", "é", "😀"]),
    "separators": (["q, r", 'say "x"', "l\nl", "a;b", "\t"], ["\t", "a;b", "l\nl", "q, r", 'say "x"']),
    "formulas": (["=1+1", "@a", "+a"], ["+a", "=1+1", "@a"]),
    "control characters": (["\x1b[31m", "\x07", "\u202ex"], ["\x07", "\x1b[31m", "\u202ex"]),
    "long": (["p" * 1000, "q" * 999], ["p" * 1000, "q" * 999]),
    "bytes": ([b"p", "é".encode(), b"q"], ["p", "q", "é"]),
    "dates": (["2020-01-02", "2020-01-01"], ["2020-01-01", "2020-01-02"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a net with one input, of two classes."""
    folder = tmp_path_factory.mktemp("trained")
    labels = ["p", "q"] * 20
    path = written(folder, "csv", {"a": np.arange(40) % 7 * 0.5, "y": labels})
    words = ["data=table", f"data.source.path={path}", "data.source.target=y", "trainer.max_epochs=1"]
    training.run(configured(folder, *words))
    return folder / "last.ckpt"


def renamed(checkpoint: Path, names: list[str], path: Path) -> Path:
    """The checkpoint with other names of the classes, and as many outputs as there are names."""
    content = torch.load(checkpoint, weights_only=True)
    values, states = content["hyper_parameters"], content["state_dict"]
    values["class_names"], values["output_size"] = names, len(names)
    for name, value in states.items():
        if value.shape[:1] == (2,):
            states[name] = value[torch.arange(len(names)) % 2] + 0.01 * torch.randn(len(names), *value.shape[1:])
    if len(names) != 2:
        content["callbacks"] = {}  # records of the net as it was
    torch.save(content, path)
    return path


class TestLabels:
    @pytest.mark.parametrize("labels", LABELS)
    @pytest.mark.parametrize("kind", FORMATS)
    def test_same_classes_from_each_format(self, tmp_path: Path, kind: str, labels: str) -> None:
        values, names = LABELS[labels]
        rows = [value for value in values for _ in range(REPEATED)]
        samples = labelled(written(tmp_path, kind, {"a": np.arange(len(rows)), "y": rows}))
        assert samples.class_names == tuple(names)
        own = [value.decode() if isinstance(value, bytes) else value for value in rows]
        for row, index in enumerate(samples.target):
            assert names[index] == str(own[row] if type(own[row]) is not float else int(own[row]))

    @pytest.mark.parametrize("labels", LABELS)
    def test_names_come_back(self, tmp_path: Path, trained: Path, labels: str) -> None:
        names = LABELS[labels][1]
        checkpoint = renamed(trained, names, tmp_path / "x.ckpt")
        rows = written(tmp_path, "csv", {"a": np.linspace(-1e3, 1e3, 50)})
        predict_file(str(checkpoint), str(rows), str(tmp_path / "out.npz"))
        predict_file(str(checkpoint), str(rows), str(tmp_path / "out.csv"))
        with np.load(tmp_path / "out.npz") as arrays:
            assert arrays["class_names"].tolist() == names
            chosen = arrays["class"].tolist()
            assert chosen == [names[index] for index in arrays["probability"].argmax(1)]
        with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert header == ["class", *(f"P({name})" for name in names)]
        assert [row[0] for row in rows] == chosen

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            ("1\n1.0\n2\n 2.00", ("1", "2")),  # numbers, however they are written
            ("1 \n2\n 1", ("1", "2")),
            ("1\n1.0\nx\n2", ("1", "1.0", "2", "x")),
            ("True\nFALSE\ntrue", ("FALSE", "True", "true")),
            ("-0\n0\n1", ("0", "1")),
            ('"1"\n"2"\n"1"', ("1", "2")),
            ('"p\nq"\n"p ""q"""\np', ("p", "p\nq", 'p "q"')),
            ("1e3\n1000\n2", ("2", "1000")),
        ],
    )
    def test_in_csv_all_numbers_are_numbers(self, tmp_path: Path, content: str, names: tuple[str, ...]) -> None:
        rows = content.split("\n") if '"p' not in content else ['"p\nq"', '"p ""q"""', "p"]
        text = "a,y\n" + "".join(f"1,{row}\n" for row in rows)
        (tmp_path / "t.csv").write_text(text, newline="")
        assert labelled(tmp_path / "t.csv").class_names == names

    @pytest.mark.parametrize(
        ("kind", "values", "sentence"),
        [
            ("csv", ["p", "", "q"], "row 1"),
            ("csv", ["p", "  ", "q"], "row 1"),
            ("csv", [1, 2, "NA"], "row 2"),
            ("csv", [1.5, 2, "nan"], "numbers such as 1.5"),
            ("npz", ["p", "", "q"], "row 1"),
            ("npz", [1.0, np.nan, 2.0], "row 1"),
            ("parquet", ["p", None, "q"], "row 1"),
            ("parquet", ["p", "", "q"], "row 1"),
            ("parquet", [1, None, 2], "row 1"),
            ("parquet", [True, None, False], "row 1"),
            ("csv", ["p" * 1001, "q", "r"], "text of more than 1000 bytes, or with NUL in it: 'ppp"),
            ("npz", ["p" * 1001, "q", "r"], "text of more than 1000 bytes"),
            ("parquet", ["é" * 501, "q", "r"], "text of more than 1000 bytes"),
            ("parquet", ["p\0", "p", "q"], r"with NUL in it: 'p\\x00'"),
            ("npz", ["p\0q", "p", "q"], r"with NUL in it: 'p\\x00q'"),
            ("npz", [b"\xff", b"p", b"q"], "'utf-8' codec can't decode .*short text in UTF-8"),
            ("parquet", [b"\xff", b"p", b"q"], "'utf-8' codec can't decode .*short text in UTF-8"),
            ("npz", ["\ud800", "p", "q"], "'utf-8' codec can't encode .*short text in UTF-8"),
            ("npz", [1j, 2j, 3], "values such as 1j"),
            ("npz", np.array(["2020-01-01"] * 3, "M8[ns]"), "values such as 15778"),
            ("npz", [2.0**53, 1, 2], "numbers such as 9007199254740992.0"),
            ("csv", ["9007199254740993", "1.0", "2"], "numbers such as 9007199254740992.0"),
            ("csv", ["9007199254740993", "1.5", "2"], "numbers such as"),
            ("npz", [np.inf, 1, 2], "numbers such as inf"),
        ],
    )
    def test_what_is_no_label(self, tmp_path: Path, kind: str, values: object, sentence: str) -> None:
        path = written(tmp_path, kind, {"a": np.arange(3), "y": values})
        if sentence.startswith("row "):
            row = int(sentence[4:])
            place = f"line {row + 2}" if kind == "csv" else rf"row {row} \(counted from 0\)"
            sentence = f"a table without defects, but t.{kind} has:\n  {place}: 'y' is empty"
        else:
            sentence = f"in the target.*{sentence}"
        with pytest.raises(InputError, match=sentence):
            labelled(path)

    def test_nul_in_csv(self, tmp_path: Path) -> None:
        path = written(tmp_path, "csv", {"a": np.arange(3), "y": ["p\0", "p", "q"]})
        with pytest.raises(InputError, match="text with NUL bytes, perhaps UTF-16 or UTF-32; save it as UTF-8"):
            labelled(path)

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("code", [0x110000, 0x7FFFFFFF, 0xFFFFFFFF])
    def test_letters_beyond_unicode(self, tmp_path: Path, order: str, code: int) -> None:
        text = np.array([code, 112, 113], f"{order}u4").view(f"{order}U1")
        for columns in ({"a": np.arange(3), "y": text}, {"a": text, "y": np.arange(3)}):
            np.savez(tmp_path / "t.npz", **columns)
            with pytest.raises(InputError, match=r"reading failed \('[ay]' holds letters beyond Unicode\)"):
                labelled(tmp_path / "t.npz")

    def test_too_many(self, tmp_path: Path) -> None:
        path = written(tmp_path, "npz", {"a": np.arange(30_003), "y": np.arange(30_003) % 10_001})
        with pytest.raises(InputError, match=r"got 10001 different ones; .*task=regression"):
            labelled(path)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_regression_reads_the_same_numbers(self, tmp_path: Path, kind: str) -> None:
        values = [0.1, -1e-300, 1e22, 3.0, 2**53 + 2]
        samples = labelled(written(tmp_path, kind, {"a": np.arange(5), "y": values}), "regression")
        assert samples.target.tolist() == values

    def test_columns_of_one_column_are_taken_as_such(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", a=np.ones((4, 1)), w=np.arange(4.0)[:, None], y=np.array(["p", "q"] * 2)[:, None])
        samples = labelled(tmp_path / "t.npz", weight="w")
        assert samples.class_names == ("p", "q")
        assert samples.weight.tolist() == [0, 1, 2, 3]
        assert samples.feature_names == ("a[0]",)


def test_a_checkpoint_keeps_the_names_of_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 0.1 called booleans 0 and 1. A run that goes on from there calls them so to its end."""
    path = written(tmp_path, "csv", {"a": np.arange(60) % 7 * 0.5, "y": [True, False, True] * 20})
    words = ["data=table", f"data.source.path={path}", "data.source.target=y"]
    training.run(configured(tmp_path / "run", *words, "trainer.max_epochs=1"))
    checkpoint = renamed(tmp_path / "run" / "last.ckpt", ["0", "1"], tmp_path / "run" / "last.ckpt")
    training.run(configured(tmp_path / "run", *words, "trainer.max_epochs=2", f"ckpt_path={checkpoint}"))
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["class_names"] == ["0", "1"]
    assert re.search(r"classes +66.7 % 1, 33.3 % 0", capsys.readouterr().out)
    training.run(configured(tmp_path, *words, "task=test", f"ckpt_path={checkpoint}"))
    assert "66.7 % 1, 33.3 % 0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What tests/bombs.py says of each of its files."""
    words = [sys.executable, "-m", "tests.bombs", str(tmp_path_factory.mktemp("bombs"))]
    job = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    return {line["name"]: line for line in map(json.loads, job.stdout.splitlines())}


class TestSizes:
    @pytest.mark.parametrize("name", FILES)
    def test_memory(self, measured: dict[str, dict], name: str) -> None:
        """At most ten times the larger of a file and what it decodes to, beside 48 MiB that a process takes once."""
        found, decoded = measured[name], FILES[name][1]
        assert found["peak"] < 10 * max(found["bytes"], decoded) + 48 * MIB, found
        assert found["sentence"].startswith("expected ") or (decoded and not found["sentence"]), found
        if not decoded:
            assert re.search("bytes decoded|reading failed", found["sentence"]), found

    @pytest.mark.parametrize("kind", FORMATS)
    def test_the_bound_is_an_option(self, tmp_path: Path, kind: str) -> None:
        path = written(tmp_path, kind, {"a": np.arange(6000.0), "y": np.arange(6000) % 2})
        assert MAX_BYTES == 2 << 30
        assert len(labelled(path, max_bytes=250_000).target) == 6000
        with pytest.raises(
            InputError, match=rf"at most 50000 bytes decoded, but t.{kind} .*raise data.source.max_bytes"
        ):
            labelled(path, max_bytes=50_000)
        words = ["data=table", f"data.source.path={path}", "data.source.target=y", "data.source.max_bytes=5e4"]
        with pytest.raises(InputError, match="at most 50000 bytes decoded"):
            training.run(configured(tmp_path, *words))

    def test_of_a_file_to_predict(self, tmp_path: Path, trained: Path) -> None:
        rows = written(tmp_path, "csv", {"a": np.arange(6000.0)})
        with pytest.raises(InputError, match=r"at most 50000 bytes decoded, but t.csv may take \d+; split it"):
            predict_file(str(trained), str(rows), str(tmp_path / "out.csv"), max_bytes=50_000)
        words = ["data=table", "data.source.path=x", "data.source.target=y", "data.source.max_bytes=50000"]
        words += ["task=predict", f"ckpt_path={trained}", f"input={rows}", f"output={tmp_path}/out.csv"]
        with pytest.raises(InputError, match="at most 50000 bytes decoded"):
            training.run(configured(tmp_path, *words))

    def test_limit_of_the_bombs_is_below_what_they_claim(self) -> None:
        assert all(decoded < LIMIT for _, decoded in FILES.values())


class TestShown:
    @pytest.mark.parametrize(
        ("text", "safe"),
        [
            ("plain é 東京 😀", "plain é 東京 😀"),
            ("\t", r"\t"),
            ("\x1b[2J\x07", r"\x1b[2J\x07"),
            ("\x9b\x85\x7f", r"\x9b\x85\x7f"),
            ("\u202e\u2066\u2069\u200f", r"\u202e\u2066\u2069\u200f"),
            ("\u2028\u2029\n\r", r"\u2028\u2029\n\r"),
            ("\udcff\U000e0001", r"\udcff\U000e0001"),
        ],
    )
    def test_text(self, text: str, safe: str) -> None:
        assert shown(text) == safe
        assert shown(safe) == safe
        assert str(InputError(f"expected {text}")) == f"expected {shown(text, keep=chr(10))}"

    def test_every_message_of_a_table(self, tmp_path: Path) -> None:
        """With hostile names of the file, of its columns and of its classes."""
        folder = tmp_path / "f\x1b[31m\u202e"
        folder.mkdir()
        (folder / "a").mkdir()
        contents = [
            "\x1b[1m,\x1b[1m,y\n1,2,3\n", "\x1b[1m,z\n1,2\n", "\x1b[1m,y\nq\x9b,2\n", "a,y\n1,\n", "a,y\n1,2,3",
            "a,y\n1,\x1b\n1,\x1b\n", "a,y\n\x1b,\x1b\n", 'a,y\n"\x1b', "a\ty\n1\t2\n", "a,y\n1e99,1\n2,2", "", "\x1b\n",
        ]  # fmt: skip
        for content in contents:
            (folder / "\x1b]0;t.csv").write_text(content)
            for task in sources.TASKS:
                with pytest.raises(InputError) as refused:
                    check(labelled(folder / "\x1b]0;t.csv", task))
                assert not OBEYED.search(str(refused.value)), ascii(str(refused.value))
        for name in ("\x1b.csv", "a", "\x1b.txt"):
            with pytest.raises(InputError) as refused:
                labelled(folder / name)
            assert not OBEYED.search(str(refused.value))

    def test_a_tab_between_columns(self, tmp_path: Path) -> None:
        for mark, name in (("\t", r"\\t"), (";", ";"), ("|", r"\|")):
            (tmp_path / "t.csv").write_text(f"a{mark}y\n1{mark}2\n")
            with pytest.raises(InputError, match=rf"its columns are 'a{name}y'; is it separated by {name}\?"):
                labelled(tmp_path / "t.csv")

    @pytest.mark.parametrize("report", [True, False])
    def test_a_run(self, tmp_path: Path, capfd: pytest.CaptureFixture[str], report: bool) -> None:
        """From training with a report to predictions; matplotlib has no shape for these letters, and doesn't say so."""
        folder = tmp_path / "f\x1b[31m\u202e"
        rows = np.repeat(HOSTILE, REPEATED).tolist() + HOSTILE[:1] * 60
        columns = {"\x1b[32ma": np.arange(len(rows)) % 5 * 1.0, "c\u202e": np.arange(len(rows)) % 7, "y": rows}
        folder.mkdir()
        path = written(folder, "npz", columns)
        cfg = configured(folder, "data=table", "data.source.target=y", "trainer.max_epochs=1", f"report={report}")
        cfg.data.source.path = str(path)
        training.run(cfg)
        cfg = configured(folder, "task=predict", "output=''")
        del columns["y"]
        cfg.ckpt_path, cfg.input, cfg.output = (
            str(folder / "last.ckpt"),
            str(written(folder, "npz", columns)),
            f"{folder}/o.csv",
        )
        training.run(cfg)
        out, err = capfd.readouterr()
        assert not OBEYED.search(out + err), ascii(out + err)
        assert r"\x1b[31mred" in out
        assert "caution: " in out
        assert "=1+1" in out
        if report:
            page = (folder / "report.html").read_text()
            assert not OBEYED.search(page.replace("\t", "")), OBEYED.findall(page)
            assert r"\x1b[31mred" in page
        with (folder / "o.csv").open(newline="") as file:
            assert {row[0] for row in csv.reader(file)} <= {"class", *HOSTILE}

    @pytest.mark.parametrize(
        ("name", "warned"),
        [
            ("=1+1", 1),
            ("+a", 1),
            ("-a", 1),
            ("@a", 1),
            ("\ta", 1),
            ("\x1b", 1),
            ("a=1", 0),
            ("-1", 0),
            ("-1+1", 1),
            ("é", 0),
        ],
    )
    def test_caution(self, tmp_path: Path, trained: Path, name: str, warned: bool) -> None:
        checkpoint = renamed(trained, ["zz", name], tmp_path / "x.ckpt")
        rows = written(tmp_path, "csv", {"a": np.arange(3.0)})
        said = predict_file(str(checkpoint), str(rows), str(tmp_path / "out.csv"))
        assert any(sentence.startswith("caution: ") for sentence in said) == warned
        assert len(predict_file(str(checkpoint), str(rows), str(tmp_path / "out.npz"))) == 1

    @pytest.mark.parametrize("draw", [plots.confusion_matrix, plots.worst_mistakes])
    def test_pictures_have_a_shape_for_each_letter(self, draw) -> None:
        names, target = HOSTILE[:4], np.arange(8) % 4
        images = (np.ones((8, 2, 2)),) if draw is plots.worst_mistakes else ()
        answer = np.eye(4)[(target + 1) % 4] if images else (target + 1) % 4
        draw(*images, target, answer, names).savefig(io.BytesIO())  # a warning is an error here


class TestPredictions:
    def test_index_is_left_out_with_a_word(
        self, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pd.DataFrame({"a": [0.5, 1.5]}).to_csv(tmp_path / "new.csv")
        said = predict_file(str(trained), str(tmp_path / "new.csv"), str(tmp_path / "out.csv"))
        assert said[1:] == ["left out 'Unnamed: 0': an index, or without a name"]
        assert len(pd.read_csv(tmp_path / "out.csv")) == 2

    def test_in_the_summary(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pd.DataFrame({"a": np.arange(40) % 7, "y": [1, 2] * 20}).to_csv(tmp_path / "t.csv")
        words = ["data=table", f"data.source.path={tmp_path}/t.csv", "data.source.target=y", "trainer.max_epochs=1"]
        training.run(configured(tmp_path, *words))
        out = capsys.readouterr().out
        assert re.search(r"\n  left out +'Unnamed: 0': an index, or without a name\n", out)
        assert "  net         1-30-2" in out

    def test_a_checkpoint_that_has_learned_the_index_gets_it(self, tmp_path: Path, trained: Path) -> None:
        """As version 0.1 made them."""
        content = torch.load(trained, weights_only=True)
        content["DataModule"]["feature_names"] = ["Unnamed: 0"]
        del content["DataModule"]["columns"]
        torch.save(content, tmp_path / "x.ckpt")
        (tmp_path / "new.csv").write_text("Unnamed: 0\n0.5\n1.5\n")
        said = predict_file(str(tmp_path / "x.ckpt"), str(tmp_path / "new.csv"), str(tmp_path / "out.csv"))
        assert len(said) == 1

    @pytest.mark.parametrize("suffix", ["csv", "npz"])
    @pytest.mark.parametrize("scale", [1e-5, 1e-45])
    def test_rows_that_overflow_are_named(self, tmp_path: Path, trained: Path, suffix: str, scale: float) -> None:
        """Standardised they are beyond float32, or so large that the net's own sums are; sigmoids would hide both."""
        content = torch.load(trained, weights_only=True)
        content["DataModule"] |= {"feature_mean": [0.0], "feature_scale": [scale]}
        torch.save(content, tmp_path / "x.ckpt")
        values = np.array([0.0, 3e38, 0.0, -3e38]) if scale > 1e-40 else np.array([0.0, 1.0, 0.0, -1.0])
        rows = written(tmp_path, "csv", {"a": values})
        with pytest.raises(
            InputError, match=r"in t.csv .* lead to NaN or infinity in the rows 1, 3 \(counted from 0\)"
        ):
            predict_file(str(tmp_path / "x.ckpt"), str(rows), str(tmp_path / f"out.{suffix}"))
        assert not (tmp_path / f"out.{suffix}").exists()

    def test_infinite_predictions_of_finite_rows(self, tmp_path: Path) -> None:
        path = written(tmp_path, "csv", {"a": np.arange(40) % 7, "y": np.arange(40) * 1.0})
        words = ["data=table", f"data.source.path={path}", "data.source.target=y", "data.source.task=regression"]
        training.run(configured(tmp_path, *words, "trainer.max_epochs=1", "model.activation=relu", "optimizer.lr=0.01"))
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        for value in content["state_dict"].values():
            value.fill_(1.0)
        torch.save(content, tmp_path / "x.ckpt")
        rows = written(tmp_path, "npz", {"a": np.array([1.0, 1e38, 2.0])})
        with pytest.raises(InputError, match=r"in the rows 1 \(counted from 0\)"):
            predict_file(str(tmp_path / "x.ckpt"), str(rows), str(tmp_path / "out.csv"))

    @pytest.mark.parametrize("loss", sheet.COSTS)
    def test_probability_of_nan(self, loss: str) -> None:
        P = sheet.probability(torch.tensor([[torch.nan, 0.5], [0.5, 0.5]], dtype=torch.float64), loss)
        assert P[0].isnan().all()
        assert P[1].tolist() == [0.5, 0.5]


class TestFiles:
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_other_encodings(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "t.csv").write_text("a,y\n1,p\n2,q\n", encoding=encoding)
        sentence = "a CSV file in UTF-8, but t.csv is text with NUL bytes, perhaps UTF-16 or UTF-32; save it as UTF-8"
        with pytest.raises(InputError, match=sentence):
            labelled(tmp_path / "t.csv")

    def test_utf_8_with_its_mark(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("é,y\n1,p\n2,q\n", encoding="utf-8-sig")
        assert labelled(tmp_path / "t.csv").feature_names == ("é",)
        (tmp_path / "t.csv").write_text("é,y\n1,p\n2,q\n", encoding="latin-1")
        with pytest.raises(InputError, match=r"reading failed \('utf-8' codec can't decode .*; save it as UTF-8"):
            labelled(tmp_path / "t.csv")

    def test_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "t.parquet").mkdir()
        with pytest.raises(InputError, match=r"there is a folder at .*t.parquet; .*write its parts into one file"):
            labelled(tmp_path / "t.parquet")

    def test_cells_of_several_values(self, tmp_path: Path) -> None:
        parquet.write_table(
            pa.table({"y": [1, 2], "a": [[1.0], [2.0, 3.0]], "b": [{"c": 1}] * 2}), tmp_path / "t.parquet"
        )
        with pytest.raises(InputError, match=r"'a', 'b' has more than one value in a cell; split it into columns"):
            labelled(tmp_path / "t.parquet")

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_ends_of_lines_and_blank_lines(self, tmp_path: Path, end: str) -> None:
        (tmp_path / "t.csv").write_text(end.join(["", "", '"a\n1",y', "1,p", "", "2,q", ""]), newline="")
        samples = labelled(tmp_path / "t.csv")
        assert samples.feature_names == ("a\n1",)
        assert samples.features.tolist() == [[1], [2]]

    def test_row_groups_with_dictionaries_of_their_own(self, tmp_path: Path) -> None:
        labels = [f"c{i // 10}" for i in range(60)]
        table = pa.table({"y": pa.array(labels).dictionary_encode(), "a": np.arange(60), "b": [None, 1.0] * 30})
        parquet.write_table(table, tmp_path / "t.parquet", row_group_size=7)
        samples = labelled(tmp_path / "t.parquet")
        assert [samples.class_names[index] for index in samples.target] == labels
        data = DataModule("t", lambda: samples, standardise=False)
        data.setup()
        assert (data.splits["train"].features[:, 1] == 1).all()  # the gaps of b, too
