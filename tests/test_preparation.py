"""Raw tables: gaps, text, keys and defects, from the file to predictions of new raw rows."""

import copy
import csv
import gzip
import random
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import manual_mlp as mm
from manual_mlp import InputError
from manual_mlp.training import preparation, sources
from manual_mlp.training import run as training
from manual_mlp.training.continuing import NEEDED
from manual_mlp.training.data import DataModule
from manual_mlp.training.predict import predict_file
from manual_mlp.training.sources import Samples
from tests.configs import configured

VALUES: list = [
    None,
    True,
    -1,
    0,
    3,
    2**62,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "x" * 2000,
    "\x1b[31m",
    "Rome",
    "age",
]
VALUES += [[], [[]], [1.0], ["a", "a"], {}, {"a": 1}, (), torch.zeros(2), 1 + 2j]


def leaves(values: object, place: tuple = ()) -> Iterator[tuple]:
    """The place of each value in dicts and lists."""
    if place:
        yield place
    if isinstance(values, dict | list):
        for key in values if isinstance(values, dict) else range(len(values)):
            yield from leaves(values[key], (*place, key))


def people(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    """Two numbers and two texts, with gaps, and a label that depends on them."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "id": [f"{number:05}" for number in range(rows)],
            "age": draw.normal(40, 10, rows).round(1),
            "city": draw.choice(["Rome", "Oslo", "Bern"], rows),
            "visits": draw.integers(0, 9, rows).astype(float),
            "plan": draw.choice(["a", "None"], rows),
        }
    )
    frame["churn"] = np.where(frame.age / 40 + (frame.city == "Rome") > 1.3, "yes", "no")
    frame.loc[draw.random(rows) < 0.1, "age"] = np.nan
    frame.loc[draw.random(rows) < 0.1, "city"] = None
    return frame


def written(path: Path, frame: pd.DataFrame, **options: object) -> Path:
    frame.to_csv(path, index=False, **options)
    return path


def read(path: Path, target: str = "churn", task: str = "classification", **options: object) -> Samples:
    return sources.table(str(path), target, task, **options)


def module(samples: Samples, **options: object) -> DataModule:
    data = DataModule("t", lambda: samples, **options)
    data.setup()
    return data


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on raw rows."""
    folder = tmp_path_factory.mktemp("run")
    words = [
        f"data.source.path={written(folder / 't.csv', people())}",
        "data.source.target=churn",
        "trainer.max_epochs=2",
    ]
    training.run(configured(folder, "data=table", *words, "data.source.key=id"))
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> mm.Predictor:
    return mm.Predictor.from_checkpoint(run / "best.ckpt")


class TestFitted:
    def test_as_scikit_learn_on_the_training_rows(self, tmp_path: Path) -> None:
        samples = read(written(tmp_path / "t.csv", people()), drop=["id"])
        data = module(samples, standardise=False)
        frame = people().drop(columns=["id", "churn"])
        numbers, texts = ["age", "visits"], ["city", "plan"]
        one_hot = make_pipeline(
            SimpleImputer(strategy="most_frequent", missing_values=None),
            OneHotEncoder(handle_unknown="ignore", sparse_output=False),
        )
        twin = ColumnTransformer([("n", SimpleImputer(strategy="median"), numbers), ("t", one_hot, texts)])
        rows = {}  # of each part, found by what is split with them
        numbered = Samples(np.arange(200.0)[:, None], samples.target, samples.class_names)
        for name, part in module(numbered, standardise=False).splits.items():
            rows[name] = part.features[:, 0].int().numpy()
        frame = frame.astype(object).where(frame.notna(), None)
        frame[numbers] = frame[numbers].astype(float)
        twin.fit(frame.iloc[rows["train"]])
        assert data.feature_names == ("age", "city=Bern", "city=Oslo", "city=Rome", "visits", "plan=None", "plan=a")
        for name, part in data.splits.items():
            expected = twin.transform(frame.iloc[rows[name]])[:, [0, 2, 3, 4, 1, 5, 6]]
            np.testing.assert_array_equal(part.features.numpy(), expected.astype(np.float32))

    def test_nothing_of_the_other_parts(self) -> None:
        """A kind, and a value, that only other rows have."""
        columns = [preparation.Column("city", ("Bern", "Oslo", "Rome")), preparation.Column("x")]
        train = np.array([[0, 1.0], [2, 3.0], [2, np.nan], [np.nan, 100.0]])
        fitted = preparation.fitted(columns, train)
        assert fitted == [preparation.Column("city", ("Bern", "Rome"), "Rome"), preparation.Column("x", (), 3.0)]
        rows = preparation.prepared(np.array([[1, 7.0], [np.nan, np.nan]]), columns, fitted)
        assert rows.tolist() == [[0, 0, 7], [0, 1, 3]]

    def test_numbers_without_gaps_stay_as_they_are(self) -> None:
        codes = np.arange(8.0).reshape(4, 2)
        columns = [preparation.Column("a"), preparation.Column("b")]
        assert preparation.prepared(codes, columns, preparation.fitted(columns, codes)) is codes

    def test_split_seed(self, tmp_path: Path) -> None:
        samples = read(written(tmp_path / "t.csv", people()), drop=["id"])
        one, same, other = (module(samples, seed=seed, split_seed=split) for seed, split in ((0, 5), (1, 5), (0, None)))
        assert one.fingerprint == same.fingerprint != other.fingerprint
        assert other.fingerprint == module(samples).fingerprint


class TestGaps:
    """Empty cells, NaN and pandas' words among numbers; in text only empty cells."""

    @pytest.mark.parametrize("word", ["", "NA", "nan", "NaN", "null", "None", "N/A", "#N/A", "<NA>", "-nan"])
    def test_among_numbers(self, tmp_path: Path, word: str) -> None:
        samples = read(text(tmp_path / "t.csv", "a,churn\n" + f"1,p\n{word},q\n3,p\n" * 4))
        assert samples.columns == (preparation.Column("a"),)
        assert np.isnan(samples.features[:, 0]).tolist() == [False, True, False] * 4

    @pytest.mark.parametrize("word", ["NA", "None", "nan", "null"])
    def test_among_text(self, tmp_path: Path, word: str) -> None:
        samples = read(text(tmp_path / "t.csv", "a,churn\n" + f"x,p\n{word},q\n,p\n" * 4))
        assert samples.columns[0].kinds == tuple(sorted(["x", word]))
        assert np.isnan(samples.features[:, 0]).sum() == 4

    @pytest.mark.parametrize("kind", ["npz", "parquet"])
    def test_of_other_files(self, tmp_path: Path, kind: str) -> None:
        columns = {"a": [1.0, np.nan, 2.0] * 4, "b": ["x", "", "y"] * 4, "c": [True, False, True] * 4}
        frame = pd.DataFrame(columns | {"churn": ["p", "q", "p"] * 4})
        path = tmp_path / f"t.{kind}"
        if kind == "npz":
            np.savez(path, **{name: np.array(frame[name].tolist()) for name in frame})
        else:
            frame.replace({"b": {"": None}}).to_parquet(path)
        samples = read(path)
        assert [column.kinds for column in samples.columns] == [(), ("x", "y"), ()]
        assert np.isnan(samples.features).sum(0).tolist() == [4, 4, 0]

    def test_a_column_that_is_empty_in_all_training_rows(self, tmp_path: Path) -> None:
        frame = people().assign(nothing=np.nan, one=7)
        data = module(read(written(tmp_path / "t.csv", frame), drop=["id"]))
        assert "nothing" not in data.feature_names
        assert data.said["empty"] == "'nothing' in all training rows, left out"
        assert data.said["constant"] == "'one' in the training rows"
        only = text(tmp_path / "u.csv", "a,churn\n" + ",p\n,q\n" * 20)
        with pytest.raises(InputError, match="a feature that some training row has, but all are empty"):
            module(read(only))


class TestDefects:
    def test_one_list_by_line(self, tmp_path: Path) -> None:
        """Lines of the file: after a blank line, and a cell of two lines."""
        rows = [f"{number},{'pq'[number % 2]},1,2" for number in range(20)]
        lines = ["1,p,1,2", "", '2,"q', 'r",1,2', "3,p,1,inf", *rows, "3,,1,2", "4,p,x,2", "oh,p,,"]
        content = "\n".join(["a,churn,w,b", *lines])
        with pytest.raises(InputError) as refused:
            read(text(tmp_path / "t.csv", content), weight="w")
        assert str(refused.value).split("\n") == [
            "expected a table without defects, but t.csv has:",
            "  line 6: 'b' holds inf, which is not finite, or above 3.4e+38: rescale it",
            "  line 27: 'churn' is empty",
            "  line 28: 'w' holds 'x', which is not a number",
            "  line 29: 'w' is empty",
            "  line 29: 'a' holds 'oh', which is not a number",
            "correct the cells, or leave out the lines or columns",
        ]

    def test_rows_that_are_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="lines 3, 5: 3 cells instead of 2\n"):
            read(text(tmp_path / "t.csv", "a,churn\n1,p\n1,p,9\n2,q\n3,q,8\n"))

    @pytest.mark.parametrize("rows", [102, 400])
    def test_text_of_too_many_kinds(self, tmp_path: Path, rows: int) -> None:
        frame = pd.DataFrame({"my name": [f"n{number % 51}" for number in range(rows)], "x": range(rows)})
        frame["few"], frame["churn"] = "a", ["p", "q"] * (rows // 2)
        with pytest.raises(InputError) as refused:
            read(written(tmp_path / "t.csv", frame), drop=["few"])
        assert f"'my name' is text of 51 kinds in {rows} rows" in str(refused.value)
        assert """\"data.source.drop=[few,'my name']\"""" in str(refused.value)
        frame["my name"] = [f"n{number % 50}" for number in range(rows)]
        assert len(read(written(tmp_path / "t.csv", frame)).columns[0].kinds) == 50

    def test_text_that_differs_in_more_than_half_of_the_rows(self, tmp_path: Path) -> None:
        for distinct, accepted in ((10, True), (11, False)):
            names = [f"n{number % distinct}" for number in range(20)]
            path = written(tmp_path / "t.csv", pd.DataFrame({"a": names, "churn": ["p", "q"] * 10}))
            if accepted:
                assert len(read(path).columns[0].kinds) == 10
            else:
                with pytest.raises(InputError, match="'a' is text of 11 kinds in 20 rows"):
                    read(path)

    def test_a_gap_in_the_target_is_a_defect(self, tmp_path: Path) -> None:
        for task, cells in (("classification", ["p", "", "q"]), ("regression", ["1", "", "2"])):
            with pytest.raises(InputError, match="line 3: 'y' is empty"):
                read(text(tmp_path / "t.csv", "a,y\n" + "".join(f"1,{cell}\n" for cell in cells)), "y", task)

    def test_of_new_rows(self, tmp_path: Path, run: Path) -> None:
        frame = people(30).astype({"age": object})
        frame.loc[4, "age"] = "old"
        with pytest.raises(InputError, match="line 6: 'age' holds 'old', which is not a number"):
            predict_file(str(run / "best.ckpt"), str(written(tmp_path / "new.csv", frame)), str(tmp_path / "o.csv"))


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "separator", "options"),
        [
            ("t.tsv", "\t", {}),
            ("t.TSV", "\t", {}),
            ("t.csv", ";", {"separator": ";"}),
            ("t.csv", "\t", {"separator": "tab"}),
            ("t.csv", "|", {"separator": "|"}),
            ("t.csv.gz", ",", {}),
            ("t.tsv.gz", "\t", {}),
            ("t.csv.gz", ";", {"separator": ";"}),
        ],
    )
    def test_separators(self, tmp_path: Path, name: str, separator: str, options: dict) -> None:
        expected = read(written(tmp_path / "plain.csv", people()), key="id")
        content = people().to_csv(index=False, sep=separator).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        samples = read(tmp_path / name, key="id", **options)
        np.testing.assert_array_equal(samples.features, expected.features)
        assert samples.columns == expected.columns

    def test_decimal_comma(self, tmp_path: Path) -> None:
        path = written(tmp_path / "t.csv", people(), sep=";", decimal=",")
        with pytest.raises(
            InputError, match=r"'age' holds numbers with marks in them, .* decimal one, set \"data.source.decimal=','\""
        ):
            read(path, separator=";", drop=["id"])
        samples = read(path, separator=";", decimal=",", drop=["id"])
        np.testing.assert_array_equal(samples.features[:, 0], people().age)

    @pytest.mark.parametrize("drop", [[], ["id"]])
    @pytest.mark.parametrize(("mark", "fix"), [(";", "';'"), ("\t", "tab"), ("|", "'|'")])
    def test_the_hint_works(self, tmp_path: Path, mark: str, fix: str, drop: list[str]) -> None:
        path = written(tmp_path / "t.csv", people(), sep=mark)
        with pytest.raises(InputError, match=r"is it separated by (.|\\t)\? set") as refused:
            read(path, drop=drop)
        assert fix.strip("'") in str(refused.value).rpartition("set ")[2]

    @pytest.mark.parametrize("options", [{"separator": ""}, {"separator": ", "}, {"decimal": ".,"}])
    def test_no_letter(self, tmp_path: Path, options: dict) -> None:
        path = written(tmp_path / "t.csv", people())
        if options == {"separator": ""}:
            assert read(path, drop=["id"], **options).columns
            return
        with pytest.raises(InputError, match=r"expected one letter in data\.source"):
            read(path, **options)

    def test_a_packed_file_is_bounded_as_it_is_unpacked(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a,churn\n" + b"1,p\n" * 1_000_000))
        with pytest.raises(InputError, match="at most 1000000 bytes decoded"):
            read(tmp_path / "t.csv.gz", max_bytes=1e6)

    def test_so_is_what_text_becomes(self, tmp_path: Path) -> None:
        rows = 2000
        frame = pd.DataFrame({f"c{c}": [f"{i % 50}x" for i in range(rows)] for c in range(3)})
        path = written(tmp_path / "t.csv", frame.assign(churn=["p", "q"] * (rows // 2)))
        with pytest.raises(InputError, match=f"at most 300000 bytes decoded, but t.csv may take {8 * rows * 150}"):
            read(path, max_bytes=300_000)

    def test_damaged_gzip(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a,churn\n1,p\n" * 99)[:-9])
        with pytest.raises(InputError, match=r"reading failed .*check that the file is whole"):
            read(tmp_path / "t.csv.gz")


class TestColumns:
    def test_key_and_drop(self, tmp_path: Path) -> None:
        samples = read(written(tmp_path / "t.csv", people()), key="id", drop=["visits", "plan"])
        assert samples.feature_names == ("age", "city")
        assert samples.said["key"] == "'id'"
        repeated = pd.concat([people(), people()])
        assert read(written(tmp_path / "t.csv", repeated), key="id").said["key"] == "'id', which repeats"

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"key": "nope"}, "data.source.key to name a column there is, but t.csv has no 'nope'"),
            ({"key": "churn"}, "to name different columns"),
            ({"drop": ["churn"]}, "to name different columns"),
            ({"drop": ["age", "age"]}, None),
            (
                {"drop": ["nope"]},
                "data.source.drop to name columns there are, but t.csv has no 'nope'; its columns are 'id'",
            ),
            ({"key": "id", "drop": ["id"]}, "to name different columns"),
        ],
    )
    def test_wrong_ones(self, tmp_path: Path, options: dict, sentence: str | None) -> None:
        path = written(tmp_path / "t.csv", people())
        if sentence is None:
            assert "age" not in read(path, **{"key": "id", **options}).feature_names
            return
        with pytest.raises(InputError, match=sentence):
            read(path, **options)

    def test_like_an_id(self, tmp_path: Path) -> None:
        frame = people().assign(number=range(7, 207))
        data = module(read(written(tmp_path / "t.csv", frame), drop=["id"]))
        assert data.said["like an id"].startswith(
            "'number', a whole number of its own in each row; 'data.source.drop=[number]'"
        )
        assert "number" in data.feature_names  # it is said, and left to the user

    def test_in_the_summary_and_the_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [f"data.source.path={written(tmp_path / 't.csv', people())}", "data.source.target=churn", "report=true"]
        training.run(configured(tmp_path, "data=table", *words, "data.source.key=id", "trainer.max_epochs=1"))
        said = " ".join(capsys.readouterr().out.split())
        gaps = people().isna().sum()
        age = f"1 column without gaps, 'age' ({gaps.age} gaps: median "
        city = f"'city' (3 kinds, {gaps.city} gaps: most frequent '"
        page = (tmp_path / "report.html").read_text().replace("&#39;", "'")
        for expected in (age, city, "key 'id'"):
            assert expected in said
        assert age in page
        assert city in page


class TestPredict:
    def predict(self, tmp_path: Path, run: Path, frame: pd.DataFrame, name: str = "o.csv") -> list[str]:
        path = written(tmp_path / "new.csv", frame)
        return predict_file(str(run / "best.ckpt"), str(path), str(tmp_path / name))

    def test_raw_rows_with_key_and_label(self, tmp_path: Path, run: Path) -> None:
        frame = people(50, seed=1)[["churn", "plan", "id", "city", "visits", "age"]]
        said = self.predict(tmp_path, run, frame)
        with (tmp_path / "o.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["id", "class", "P(no)", "P(yes)"]
        assert [row[0] for row in rows] == frame.id.tolist()  # 00007 as it was read
        hits = np.mean([row[1] == label for row, label in zip(rows, frame.churn, strict=True)])
        assert said[1:] == [f"accuracy {100 * hits:.2f} % over 50 rows with 'churn'"]

    def test_words(self, tmp_path: Path, run: Path) -> None:
        frame = people(50).assign(more=1, other="x").drop(columns="id")
        frame.loc[[3, 9], "city"] = "Paris"
        frame.loc[7, "churn"] = "perhaps"
        frame.loc[8, "churn"] = None
        said = self.predict(tmp_path, run, frame)
        assert said[1] == "'city' has 'Paris' in 2 rows: none of the known kinds"
        assert said[2] == "ignored 'more', 'other': the net was trained without them"
        assert said[3] == "there is no 'id': the predictions stand in the order of the rows"
        assert said[4].endswith("over 49 rows with 'churn'")
        assert said[5] == "'perhaps' among them is none of the classes, and counts as wrong"
        assert len(said) == 6

    def test_repeated_key_and_npz(self, tmp_path: Path, run: Path) -> None:
        frame = people(20).drop(columns="churn")
        frame.loc[5, "id"] = frame.loc[6, "id"]
        said = self.predict(tmp_path, run, frame, "o.npz")
        assert said[1:] == ["'id' repeats in 1 row"]
        with np.load(tmp_path / "o.npz") as arrays:
            assert arrays["id"].tolist() == frame.id.tolist()

    def test_missing_column(self, tmp_path: Path, run: Path) -> None:
        with pytest.raises(
            InputError, match=r"the 4 columns .* in any order, but new.csv lacks 'city', 'plan'; add them"
        ):
            self.predict(tmp_path, run, people(9).drop(columns=["city", "plan"]))

    def test_columns_of_gaps_alone(self, tmp_path: Path, run: Path) -> None:
        self.predict(tmp_path, run, people(9).assign(age=np.nan, city=None))
        assert pd.read_csv(tmp_path / "o.csv").notna().all(axis=None)

    def test_separator_and_decimal_of_the_training(self, tmp_path: Path) -> None:
        path = written(tmp_path / "t.csv", people(), sep=";", decimal=",")
        words = [f"data.source.path={path}", "data.source.target=visits", "data.source.task=regression"]
        words += ["data.source.separator=';'", "data.source.decimal=','", "data.source.drop=[id,churn]"]
        training.run(configured(tmp_path, "data=table", *words, "trainer.max_epochs=1", "optimizer.lr=0.01"))
        said = predict_file(str(tmp_path / "best.ckpt"), str(path), str(tmp_path / "o.csv"))
        assert said[1] == "ignored 'id', 'churn': the net was trained without them"
        assert said[2].startswith("rmse ")
        assert said[2].endswith(" over 200 rows with 'visits'")

    def test_predictor_of_raw_rows(self, tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
        predictor, frame = mm.Predictor.from_checkpoint(run / "best.ckpt"), people(30, seed=2)
        self.predict(tmp_path, run, frame)
        P = predictor(frame)
        table = pd.read_csv(tmp_path / "o.csv")
        np.testing.assert_array_equal(P.detach().numpy(), table[["P(no)", "P(yes)"]].to_numpy(np.float32))
        x = predictor.prepared(frame)
        assert x.shape == (30, 7)
        assert predictor.feature_names[1] == "city=Bern"
        program = torch.export.export(predictor, (x[:2],), dynamic_shapes=({0: torch.export.Dim("N")},))
        assert torch.equal(program.module()(x), P)
        with caplog.at_level("WARNING"):
            predictor(frame.assign(city="Paris", more=1).drop(columns=["id", "churn"]))
        assert [r.getMessage() for r in caplog.records if r.name == "manual_mlp.training.predict"] == [
            "'city' has 'Paris' in 30 rows: none of the known kinds",
            "ignored 'more': the net was trained without it",
        ]
        with pytest.raises(InputError, match=r"7 numbers in each row, of the columns 'age', .* pandas DataFrame"):
            predictor([[1.0]])
        with pytest.raises(InputError, match="the rows lacks 'city'"):
            predictor(frame.drop(columns="city"))


class TestPredictor:
    """What is given to it in Python fits, or is refused in a sentence that names the columns."""

    @pytest.mark.parametrize(
        "rows",
        [torch.zeros(2, 10), torch.zeros(2, 1), torch.tensor(1.0), torch.zeros(2, 7, dtype=torch.complex64)],
    )
    def test_other_tensors(self, predictor: mm.Predictor, rows: torch.Tensor) -> None:
        for answer in (predictor, predictor.prediction, predictor.spread, predictor.predict):
            sentence = (
                "7 numbers in each row, of the columns 'age', 'city=Bern', .*, but got a tensor of shape .*pandas"
            )
            with pytest.raises(InputError, match=sentence):
                answer(rows)

    @pytest.mark.parametrize(
        "rows", [None, [["a"] * 7], [[1.0], [1.0, 2.0]], [], [[1.0] * 6], np.zeros((2, 8)), np.array([[None] * 7])]
    )
    def test_other_things(self, predictor: mm.Predictor, rows: object) -> None:
        with pytest.raises(InputError, match=r"^expected .*numbers in .*DataFrame"):
            predictor.predict(rows)
        for answer in (predictor.prediction, predictor.spread, predictor.standardised):
            with pytest.raises(InputError, match=r"^expected a tensor with 7 numbers in each row"):
                answer(rows)

    @pytest.mark.parametrize(
        ("column", "cells"),
        [
            ("visits", pd.array([None, 1] * 6, dtype="Int64")),
            ("visits", pd.array([None, True] * 6, dtype="boolean")),
            ("visits", pd.arrays.SparseArray([np.nan, 1.0] * 6)),
            ("visits", [None, "1"] * 6),
            ("visits", [None, Decimal(1)] * 6),
            ("city", pd.array([None, "Rome"] * 6, dtype="string")),
            ("city", pd.Categorical([None, "Rome"] * 6)),
        ],
    )
    def test_kinds_of_columns(self, predictor: mm.Predictor, column: str, cells: object) -> None:
        plain = [None, "Rome" if column == "city" else 1.0] * 6
        frames = (people(12).assign(**{column: values}) for values in (cells, plain))
        assert torch.equal(*map(predictor.prepared, frames))

    @pytest.mark.parametrize("cells", [[[1]] * 12, [{}] * 12, ["x"] * 12, [1j] * 12, [pd.Timestamp("2024-01-01")] * 12])
    def test_cells_that_are_no_numbers(self, predictor: mm.Predictor, cells: list) -> None:
        with pytest.raises(InputError, match="'visits' h"):
            predictor.predict(people(12).assign(visits=cells))

    def test_a_name_that_comes_twice(self, predictor: mm.Predictor) -> None:
        with pytest.raises(InputError, match="different names in the rows, but 'id' comes twice"):
            predictor(pd.concat([people(12)] * 2, axis=1))

    def test_predict(self, predictor: mm.Predictor, tmp_path: Path, run: Path) -> None:
        frame = people(30, seed=2)
        predict_file(str(run / "best.ckpt"), str(written(tmp_path / "n.csv", frame)), str(tmp_path / "o.csv"))
        expected = pd.read_csv(tmp_path / "o.csv")["class"].tolist()
        assert predictor.predict(frame).tolist() == expected
        rows = predictor.prepared(frame)
        for numbers in (rows, rows.numpy(), rows.tolist()):
            assert predictor.predict(numbers).tolist() == expected
        assert predictor.predict(rows[0]) == expected[0]
        assert predictor.predict(rows[:0]).tolist() == []
        ones = torch.ones(2, 7)
        assert torch.equal(predictor(ones.bool()), predictor(ones))


class TestUnplanned:
    """Files that nobody planned: each is read as it is meant, or refused by its line."""

    @pytest.mark.parametrize(
        ("cell", "sentence"),
        [
            (lambda i: f'"1,{100 + i % 5}.5"', "numbers with marks in them, such as '1,100.5': write them without"),
            (
                lambda i: f'"1,{100 + i}"',
                "'1,100': if .* decimal one, set \"data.source.decimal=','\"; else write them",
            ),
            (lambda i: f"1\u00a0{100 + i}", "numbers with marks in them"),
            (lambda i: "x" * 200_000 if i == 3 else "k", "line 5: 't' holds text of more than 1000 bytes"),
            (lambda i: '"k' if i == 5 else "k", "line 7: a quotation mark opens here and never closes"),
            (lambda i: f'"{"a" if i == 20 else i * 0.5}\n"', r"line 42: 't' holds 'a\\n', which is not a number"),
        ],
    )
    def test_refused(self, tmp_path: Path, cell, sentence: str) -> None:
        content = "".join(f"{i},{cell(i)},{'ab'[i % 2]}\n" for i in range(40))
        with pytest.raises(InputError, match=sentence):
            module(read(text(tmp_path / "t.csv", f"n,t,churn\n{content}")))

    @pytest.mark.parametrize("cell", [lambda i: 10**25 + i, lambda i: Decimal(i) / 4, lambda i: Decimal(i % 3)])
    def test_numbers_that_are_no_floats(self, tmp_path: Path, cell) -> None:
        """They were taken for text, even for text of as many kinds as rows."""
        frame = pd.DataFrame({"t": [cell(i) for i in range(40)], "churn": ["a", "b"] * 20})
        paths = [written(tmp_path / "t.csv", frame)]
        if isinstance(cell(0), Decimal):
            frame.to_parquet(tmp_path / "t.parquet")
            paths.append(tmp_path / "t.parquet")
        for path in paths:
            samples = read(path)
            assert samples.columns[0].kinds == ()
            np.testing.assert_array_equal(samples.features[:, 0], [float(cell(i)) for i in range(40)])

    def test_white_space_is_told(self, tmp_path: Path) -> None:
        content = "".join(
            f"{i / 3},{('x', 'x ', 'y', chr(34) + ' ' + chr(34))[i % 4]},{('a ', 'a', 'b')[i % 3]}\n" for i in range(60)
        )
        said = module(read(text(tmp_path / "t.csv", f"n,t,churn\n{content}"))).said
        assert said["white space"].startswith("'t' has ' ', 'x ', 'churn' has 'a ': kinds of their own")

    def test_decimal_commas_of_another_separator(self, tmp_path: Path) -> None:
        """They make more cells than the first line has, in every line."""
        path = text(tmp_path / "t.csv", "n;m;churn\n" + "1,5;2,5;a\n2,5;3,5;b\n" * 20)
        with pytest.raises(
            InputError, match=r"first line is 'n;m;churn'; is it separated by ;\? set \"data.source.sep"
        ):
            read(path)

    def test_no_feature(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"a feature in t.csv, but beside 'churn', 'n' there is no column"):
            read(text(tmp_path / "t.csv", "n,churn\n" + "1,a\n2,b\n" * 20), drop=["n"])

    def test_bytes(self, tmp_path: Path) -> None:
        pd.DataFrame({"c": [b"x", b"\xff"] * 20, "churn": ["a", "b"] * 20}).to_parquet(tmp_path / "t.parquet")
        with pytest.raises(InputError, match=r"'c' holds bytes that are no text .'utf-8' codec can't"):
            read(tmp_path / "t.parquet")

    def test_new_rows_with_another_separator(self, tmp_path: Path, run: Path) -> None:
        path = written(tmp_path / "n.csv", people(12), sep=";")
        with pytest.raises(
            InputError, match=r"lacks 'age', .*; add them, and separate the cells by ',', as in training"
        ):
            predict_file(str(run / "best.ckpt"), str(path), str(tmp_path / "o.csv"))


def test_members_and_a_key(tmp_path: Path) -> None:
    """The spread of several nets stands beside each prediction, behind the key, in both kinds of files."""
    words = [f"data.source.path={written(tmp_path / 't.csv', people())}", "data=table", "data.source.key=id"]
    words += ["members=3", "backprop=engine", "trainer.max_epochs=1", "report=false"]
    new = str(written(tmp_path / "n.csv", people(12, seed=2)))
    for name, more in {"churn": (), "visits": ("data.source.task=regression",)}.items():
        training.run(configured(tmp_path / name, *words, f"data.source.target={name}", *more))
        path = tmp_path / name / "best.ckpt"
        predict_file(str(path), new, str(tmp_path / "o.csv"))
        predict_file(str(path), new, str(tmp_path / "o.npz"))
        table, arrays = pd.read_csv(tmp_path / "o.csv", dtype={"id": str}), np.load(tmp_path / "o.npz")
        assert table["id"].tolist() == arrays["id"].tolist() == people(12)["id"].tolist()
        predictor = mm.Predictor.from_checkpoint(path)
        spread = predictor.spread(predictor.prepared(people(12, seed=2))).detach().numpy()
        names = ["sd(no)", "sd(yes)"] if name == "churn" else ["sd(prediction)"]
        np.testing.assert_allclose(table[names].to_numpy(), spread, rtol=1e-5)  # float32, in other batches
        np.testing.assert_allclose(arrays["sd"], spread, rtol=1e-5)
        assert spread.min() > 0


class TestCheckpoint:
    def test_holds_plain_values(self, run: Path) -> None:
        data = torch.load(run / "best.ckpt", weights_only=True)["DataModule"]
        assert (data["target"], data["key"], data["separator"], data["decimal"]) == ("churn", "id", None, None)
        assert [column["name"] for column in data["columns"]] == ["age", "city", "visits", "plan"]
        assert data["columns"][1]["kinds"] == ["Bern", "Oslo", "Rome"]
        assert data["columns"][1]["fill"] in data["columns"][1]["kinds"]

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            ((2, "name"), "age"), ((1, "kinds"), ["Bern", "Rome", "Rome"]), ((1, "kinds"), ["", "Oslo", "Rome"]),
            ("key", "age"), ("target", "city"), ("feature_names", []), ("feature_names", ["age"] * 7),
            ((0, "fill"), "Rome"), ((0, "fill"), float("nan")), ((0, "fill"), None), ((1, "fill"), "Paris"),
            ((1, "fill"), 3.0),
            ((1, "kinds"), ["Bern", "Oslo"]), ((1, "kinds"), "Rome"),
            ((1, "kinds"), ["Bern", "Oslo", "x" * 1001]), ((1, "kinds"), []), ((0, "name"), 3),
            ((), None), ((), [[]]), ("target", 3), ("key", []), ("separator", 3), ("decimal", []),
        ],
    )  # fmt: skip
    def test_refuses_others(self, tmp_path: Path, run: Path, place: tuple, value: object) -> None:
        content = torch.load(run / "best.ckpt", weights_only=True)
        data = content["DataModule"]
        if place == ():
            data["columns"] = value
        elif isinstance(place, str):
            data[place] = value
        else:
            data["columns"][place[0]][place[1]] = value
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(InputError, match=r"expected DataModule\.\w+.* in the checkpoint .* to be "):
            mm.Predictor.from_checkpoint(tmp_path / "x.ckpt")

    @pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_one_value_changed(self, tmp_path: Path, run: Path, many: bool) -> None:
        """Each leaf of what prepares rows, by a value of each kind: it predicts, or is refused in a sentence."""
        content = torch.load(run / "best.ckpt", weights_only=True)
        content = {name: value for name, value in content.items() if name not in NEEDED}
        new = written(tmp_path / "n.csv", people(3, seed=2))
        ends = Counter[str]()
        cases = [(place, value) for place in leaves(content["DataModule"]) for value in VALUES]
        for place, value in cases if many else random.Random(0).sample(cases, 150):
            other = copy.deepcopy(content)
            holder = other["DataModule"]
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            torch.save(other, tmp_path / "x.ckpt")
            try:
                predict_file(str(tmp_path / "x.ckpt"), str(new), str(tmp_path / "o.csv"))
                mm.Predictor.from_checkpoint(tmp_path / "x.ckpt").predict(people(3, seed=2))
                ends["taken"] += 1
            except InputError as error:
                plain = str(error).startswith("expected ") and len(str(error)) < 3000
                ends["refused" if plain else f"{place}={value}: {error}"] += 1
        assert ends.keys() == {"taken", "refused"}

    def test_goes_on(self, tmp_path: Path) -> None:
        words = [f"data.source.path={written(tmp_path / 't.csv', people())}", "data.source.target=churn", "data=table"]
        words += ["data.source.drop=[id]"]
        training.run(configured(tmp_path / "a", *words, "trainer.max_epochs=1"))
        training.run(configured(tmp_path / "a", *words, "trainer.max_epochs=2", f"ckpt_path={tmp_path}/a/last.ckpt"))
        training.run(configured(tmp_path / "b", *words, "trainer.max_epochs=2"))
        states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in "ab"]
        assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


class TestTabular:
    @pytest.mark.parametrize(
        ("target", "task", "loss"),
        [("churn", "classification", "cross_entropy"), ("visits", "regression", "quadratic")],
    )
    def test_has_the_right_cost(self, tmp_path: Path, target: str, task: str, loss: str) -> None:
        words = [f"data.source.path={written(tmp_path / 't.csv', people())}", f"data.source.target={target}"]
        words += [f"data.source.task={task}", "data.source.key=id", "trainer.max_epochs=2", "experiment=tabular"]
        training.run(configured(tmp_path, *words))
        content = torch.load(tmp_path / "best.ckpt", weights_only=True)
        assert content["hyper_parameters"]["loss"] == loss
        assert content["hyper_parameters"]["hidden"] == [64, 32]
        assert "Adam" in content["optimizer"]

    @pytest.mark.slow
    def test_learns(self, tmp_path: Path) -> None:
        """The label is a function of age and city, but for gaps in both."""
        frame = people(2000).assign(age=lambda frame: frame.age.fillna(40.0))
        words = [f"data.source.path={written(tmp_path / 't.csv', frame)}", "data.source.target=churn"]
        words += ["data.source.key=id", "experiment=tabular", "optimized_metric=test_accuracy"]
        assert training.run(configured(tmp_path, *words)) > 0.85
