"""Sources, readers, splits and batches: what the data module promises, and a sentence for each way to be wrong."""

import gzip
import struct
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris

from manual_mlp import InputError
from manual_mlp.training import sources
from manual_mlp.training.data import DataModule, check
from manual_mlp.training.readers import read_idx
from manual_mlp.training.sources import Samples


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(path: Path, array: np.ndarray) -> Path:
    content = idx_bytes(array.astype(np.uint8))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def idx_folder(folder: Path, ending: str = ".gz", train: int = 200, test: int = 50) -> Path:
    """A small folder as Fashion-MNIST's: 28 x 28 images of noise, labels 0 … 9 in turn."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", random.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", np.arange(count) % 10)
    return folder


def module(samples: Samples, **options: object) -> DataModule:
    data = DataModule("test", lambda: samples, **options)
    data.setup()
    return data


def numbered(rows: int = 100, classes: int = 4) -> Samples:
    """Row i has the feature i, so that rows can be told apart; classes are of unequal size."""
    target = np.minimum(np.arange(rows) // 10, classes - 1)
    return Samples(np.arange(rows, dtype=float)[:, None], target, tuple(map(str, range(classes))))


def classes(path: Path, **options: object) -> Samples:
    return sources.table(str(path), "y", "classification", **options)


def column(data: DataModule, split: str) -> list[int]:
    return data.splits[split].features[:, 0].int().tolist()


class TestIdx:
    @pytest.mark.parametrize("ending", ["", ".gz"])
    @pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (0, 28, 28)])
    def test_round_trip(self, tmp_path: Path, shape: tuple[int, ...], ending: str) -> None:
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        result = read_idx(write_idx(tmp_path / f"file{ending}", array), len(shape))
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, array)

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (gzip.compress(idx_bytes(np.zeros((9, 9, 9), np.uint8)), mtime=0)[:-12], "a whole gzip file.*download it"),
            (gzip.compress(b"abc", mtime=0)[:-1] + b"x", "expected a whole gzip file"),
            (b"\x1f\x8b\x08" + bytes(range(40)), "expected a whole gzip file"),
            (idx_bytes(np.zeros(5, np.uint8)), "magic number 00000803.*begins with 00000801.*mixed up"),
            (b"\x00\x00\x0d\x03" + bytes(12), "magic number 00000803.*begins with 00000d03"),
            (b"", "begins with nothing"),
            (b"\x00\x00\x08\x03\x00\x00", "header of 16 bytes.*ends after 6"),
            (
                idx_bytes(np.zeros((2, 3, 4), np.uint8))[:-1],
                "expected 24 bytes after the header.*says 2 x 3 x 4.*there are 23",
            ),
            (idx_bytes(np.zeros((2, 3, 4), np.uint8)) + b"x", "expected 24 bytes.*there are more"),
            (b"\x00\x00\x08\x03" + b"\xff" * 12 + b"x", "at most 268435456 bytes, .* claims 792.*; it is damaged or"),
        ],
    )
    def test_damage_is_told(self, tmp_path: Path, content: bytes, sentence: str) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            read_idx(tmp_path / "file", 3)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"expected a file at .*nothing.gz, but there is none"):
            read_idx(tmp_path / "nothing.gz", 3)


class TestImages:
    @pytest.mark.parametrize("ending", ["", ".gz"])
    @pytest.mark.parametrize("source", [sources.mnist, sources.fashion_mnist])
    def test_official_test_set_is_kept(self, tmp_path: Path, source, ending: str) -> None:
        samples = source(str(idx_folder(tmp_path, ending)))
        data = module(samples, val_size=40, test_size=None)
        assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 160, "val": 40, "test": 50}
        assert (data.input_size, data.output_size) == (784, 10)
        test = data.splits["test"].features
        np.testing.assert_array_equal(test.reshape(50, 28, 28), samples.test[0])
        assert test.min() == 0
        assert test.max() == 1
        assert data.splits["val"].target.bincount().tolist() == [4] * 10

    def test_installed_fashion_mnist_folder_is_the_default(self) -> None:
        from omegaconf import OmegaConf

        conf = OmegaConf.load(Path(__file__).parents[1] / "conf" / "data" / "fashion_mnist.yaml")
        assert conf.source.folder == "/usr/share/datasets/fashion-mnist"

    def test_missing_folder_names_the_package(self) -> None:
        with pytest.raises(InputError, match=r"none at /nowhere; .*apt-get install dataset-fashion-mnist"):
            sources.fashion_mnist("/nowhere")

    def test_missing_file_in_folder(self, tmp_path: Path) -> None:
        (idx_folder(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(InputError, match=r"expected a file at .*t10k-labels-idx1-ubyte, but there is none"):
            sources.mnist(str(tmp_path))

    def test_unequal_counts(self, tmp_path: Path) -> None:
        write_idx(idx_folder(tmp_path) / "train-labels-idx1-ubyte.gz", np.zeros(199))
        with pytest.raises(InputError, match=r"200 samples \(images\) and 199 targets \(labels\)"):
            check(sources.mnist(str(tmp_path)))

    def test_unequal_images(self, tmp_path: Path) -> None:
        write_idx(idx_folder(tmp_path) / "t10k-images-idx3-ubyte.gz", np.zeros((50, 27, 28)))
        with pytest.raises(InputError, match=r"test samples of the shape \(28, 28\), .* but they have \(27, 28\)"):
            check(sources.mnist(str(tmp_path)))

    def test_label_out_of_range(self, tmp_path: Path) -> None:
        write_idx(idx_folder(tmp_path) / "t10k-labels-idx1-ubyte.gz", np.arange(50) % 11)
        with pytest.raises(InputError, match=r"labels from 0 to 9; got labels from 0 to 10"):
            check(sources.mnist(str(tmp_path)))

    def test_test_size_beside_an_official_test_set(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"data.test_size=null, as test has an official test set, but got 0.3"):
            module(sources.mnist(str(idx_folder(tmp_path))), test_size=0.3)

    def test_mnist_from_openml(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pixels, labels = np.tile(np.arange(30.0)[:, None], 784), np.array([str(i % 10) for i in range(30)])
        monkeypatch.setattr(sources.datasets, "fetch_openml", lambda *_, **__: (pixels, labels))
        monkeypatch.setattr(sources, "MNIST_TRAIN", 20)
        samples = sources.mnist(None)
        assert samples.features.shape == (20, 28, 28)
        np.testing.assert_allclose(samples.test[0][:, 0, 0], np.arange(20, 30) / 255, rtol=1e-6)
        np.testing.assert_array_equal(samples.test[1], np.arange(10))

    @pytest.mark.parametrize(
        ("error", "sentence"),
        [
            (URLError("no route"), "the network did not answer .*IDX files into a folder.*data=fashion_mnist"),
            (ImportError("pandas"), "expected pandas .* -m pip install pandas pyarrow"),
        ],
    )
    def test_mnist_out_of_reach(self, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
        def fetch(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(sources.datasets, "fetch_openml", fetch)
        with pytest.raises(InputError, match=sentence):
            sources.mnist(None)


class TestTables:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "kind": ["x", "y", "x"], "size": [1.0, 2.0, 2.5]})

    def write(self, path: Path, frame: pd.DataFrame) -> Path:
        if path.suffix == ".npz":
            arrays = {str(name): np.array(frame[name].tolist()) for name in frame}
            np.savez(path, **arrays)
        elif path.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path)
        return path

    @pytest.mark.parametrize("name", ["t.csv", "t.npz", "t.parquet"])
    def test_classification(self, tmp_path: Path, name: str) -> None:
        path = self.write(tmp_path / name, self.frame.drop(columns="size"))
        samples = sources.table(str(path), "kind", "classification")
        np.testing.assert_array_equal(samples.features, [[1, 0.5], [2, 1.5], [3, 2.5]])
        assert samples.class_names == ("x", "y")
        assert samples.target.tolist() == [0, 1, 0]

    @pytest.mark.parametrize("name", ["t.csv", "t.npz", "t.parquet"])
    def test_regression(self, tmp_path: Path, name: str) -> None:
        path = self.write(tmp_path / name, self.frame.drop(columns="kind"))
        samples = sources.table(str(path), "size", "regression")
        assert samples.class_names == ()
        np.testing.assert_array_equal(samples.target, [1, 2, 2.5])

    def test_whole_numbers_are_classes_however_written(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "t.csv", pd.DataFrame({"x": [1, 2, 3], "y": [7.0, 3.0, 7.0]}))
        assert sources.table(str(path), "y", "classification").class_names == ("3", "7")

    def test_endings_in_capitals_and_columns_named_by_numbers(self, tmp_path: Path) -> None:
        for ending in ("CSV", "NPZ", "Parquet"):
            path = tmp_path / f"t.{ending}"
            self.write(tmp_path / "t.csv", pd.DataFrame({"1": [0.5, 1.5], "3": [7, 8]}))
            self.write(tmp_path / f"t.{ending.lower()}", pd.DataFrame({"1": [0.5, 1.5], "3": [7, 8]})).rename(path)
            assert sources.table(str(path), 3, "classification").class_names == ("7", "8")

    def test_npz_blocks_are_flattened(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", images=np.arange(12).reshape(3, 2, 2), more=np.ones(3), y=np.arange(3))
        samples = classes(tmp_path / "t.npz")
        assert samples.features.shape == (3, 5)
        assert samples.feature_names == ("images[0]", "images[1]", "images[2]", "images[3]", "more")
        assert samples.target.tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("content", "target", "task", "sentence"),
        [
            ("a,y\n1,0\ntwo,1\n", "y", "classification", r"'a' is text of 2 kinds in 2 rows.*\n.*drop=\[a\]'"),
            ("a,y\n1,0\n2,1\n", "z", "classification", "target to name .*csv has no 'z'; its columns are 'a', 'y'"),
            ("a,y\n1,0\n2,1\n", "y", "clustering", "one of classification, regression, but got 'clustering'"),
            ("a,y\n1,p\n2,q\n", "y", "regression", "numbers in 'y', .*task=classification"),
            ("a,y\n1,0.5\n2,1\n", "y", "classification", "class labels in the target 'y'.*task=regression"),
            ("a,y\n1,inf\n2,1\n", "y", "classification", "class labels in the target 'y'"),
            ("a,y\n1,p\n2,\n", "y", "classification", "without defects, but t.csv has:\n  line 3: 'y' is empty\n"),
            ("a,y\n1,0\n2,\n", "y", "classification", "without defects, but t.csv has:\n  line 3: 'y' is empty\n"),
            ("a;y\n1;0\n2;1\n", "y", "classification", "its columns are 'a;y'; is it separated by ;"),
            (",".join(map(str, range(99))), "y", "classification", r"are '0', '1', .{,120}, … \(99 in all\); name"),
            ("", "y", "classification", "expected a readable csv file .*No columns"),
            ('a,y\n"1,0\n', "y", "classification", "line 2: a quotation mark opens here and never closes"),
            (
                "a,y\n1,2,3\n4,5,6\n",
                "y",
                "classification",
                "lines 2, 3: 3 cells instead of 2",
            ),
            (
                "a,y\n1,1e300\n1,2\n",
                "y",
                "classification",
                "class labels in the target 'y', but got numbers such as 1e",
            ),
            ("a,y\n", "y", "regression", "the data is empty"),
        ],
    )
    def test_mistakes_in_csv(self, tmp_path: Path, content: str, target: str, task: str, sentence: str) -> None:
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(InputError, match=sentence):
            sources.table(str(tmp_path / "t.csv"), target, task)

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("a,b,y\n1,2,0\n1,-inf,1\n", "line 3: 'b' holds -inf, which is not finite"),
            ("a,y\n1,0\n1e300,1\n", "line 3: 'a' holds 1e\\+300, .* above 3.4e\\+38: rescale it"),
            ("a,y\n1,p\n2,p\n", "expected at least two classes, but every row is of the class p"),
            ("a,y\n", "the data is empty"),
            ("y\n0\n1\n", "expected a feature in t.csv, but beside 'y' there is no column"),
        ],
    )
    def test_gaps_and_emptiness(self, tmp_path: Path, content: str, sentence: str) -> None:
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(InputError, match=sentence):
            check(sources.table(str(tmp_path / "t.csv"), "y", "classification"))

    def test_gap_in_a_regression_target(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("a,y\n1,0.5\n1,\n")
        with pytest.raises(InputError, match="line 3: 'y' is empty"):
            check(sources.table(str(tmp_path / "t.csv"), "y", "regression"))

    @pytest.mark.parametrize("name", ["t.csv", "t.npz", "t.parquet"])
    def test_foreign_bytes(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(bytes(range(128, 256)))
        with pytest.raises(InputError, match=f"expected a readable {name[2:]} file"):
            classes(tmp_path / name)

    @pytest.mark.parametrize(
        ("arrays", "sentence"),
        [
            (
                {"x": np.ones(3), "y": np.ones((3, 2))},
                r"target to name a column there is, .* no 'y'; .* are 'x', 'y\[0\]', 'y\[1\]'",
            ),
            ({"x": np.ones(4), "y": np.ones(3)}, "expected 4 rows in every column, but 'y' has 3"),
            ({"x": np.array(1.0), "y": np.ones(3)}, "expected 3 rows in every column, but 'x' has 1"),
            ({"x": np.array(["p", "q", "r"]), "y": np.ones(3)}, "'x' is text of 3 kinds in 3 rows"),
            ({"x": np.ones(3, "U"), "y": np.ones((3, 0))}, "target to name a column there is, .* no 'y'"),
            ({"x": np.ones((3, 1)), "x[0]": np.ones(3), "y": np.ones(3)}, r"different names .* 'x\[0\]' comes twice"),
            ({"x": np.ones(3) * 1j, "y": np.ones(3)}, "numbers or text in every .*, but 'x' .* complex128"),
        ],
    )
    def test_mistakes_in_npz(self, tmp_path: Path, arrays: dict, sentence: str) -> None:
        np.savez(tmp_path / "t.npz", **arrays)
        with pytest.raises(InputError, match=sentence):
            classes(tmp_path / "t.npz")

    def test_npz_never_runs_a_pickle(self, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple:
                return (Path.touch, (tmp_path / "went off",))

        np.savez(tmp_path / "t.npz", x=np.array([Bomb()], dtype=object), y=np.ones(1))
        with pytest.raises(InputError, match=r"expected a readable npz file"):
            classes(tmp_path / "t.npz")
        assert not (tmp_path / "went off").exists()

    def test_missing_file_and_unknown_ending(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"expected a table file, but there is none at .*data.source.path"):
            classes(tmp_path / "t.csv")
        with pytest.raises(InputError, match=r"ends in .csv, .tsv, .csv.gz, .tsv.gz, .npz, .parquet, but got t.xlsx"):
            classes(tmp_path / "t.xlsx")

    def test_missing_pandas(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.write(tmp_path / "t.csv", self.frame)
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(InputError, match="-m pip install pandas pyarrow"):
            classes(path)


class TestSources:
    @pytest.mark.parametrize("name", ["digits", "iris", "wine", "breast_cancer", "diabetes"])
    def test_bundled(self, name: str) -> None:
        samples = sources.bundled(name)
        check(samples)
        assert bool(samples.class_names) == (name != "diabetes")

    def test_digits_are_scaled(self) -> None:
        images = sources.bundled("digits").features
        assert images.shape == (1797, 8, 8)
        assert (images.min(), images.max()) == (0, 1)

    def test_unknown_name(self) -> None:
        with pytest.raises(InputError, match=r"one of digits, iris, .* but got 'titanic'"):
            sources.bundled("titanic")

    @pytest.mark.parametrize("source", [sources.moons, sources.halves, sources.xor, sources.line, sources.sine])
    def test_drawn_data_follow_the_seed(self, source) -> None:
        one, same, other = (source(samples=50, noise=0.1, seed=seed) for seed in (0, 0, 1))
        check(one)
        np.testing.assert_array_equal(one.features, same.features)
        assert (one.features != other.features).any()
        with pytest.raises(
            InputError, match=r"at least one sample and at most 1000000000, but data.source.samples is 0"
        ):
            source(samples=0, noise=0.1, seed=0)
        for wrong in ({"samples": 10**12}, {"noise": np.inf}, {"noise": np.nan}, {"seed": -1}, {"seed": 2**32}):
            with pytest.raises(InputError, match=f"but data.source.{next(iter(wrong))} is"):
                source(**{"samples": 50, "noise": 0.1, "seed": 0} | wrong)
        with pytest.raises(InputError, match=r"noise of at least 0, but data.source.noise is -1"):
            source(samples=50, noise=-1, seed=0)

    def test_xor_is_xor(self) -> None:
        samples = sources.xor(samples=100, noise=0.0, seed=0)
        np.testing.assert_array_equal(samples.target, samples.features[:, 0] != samples.features[:, 1])


class TestSplits:
    def test_every_row_lands_in_one_part(self) -> None:
        data = module(numbered(), val_size=0.1, test_size=0.2)
        parts = [column(data, name) for name in ("train", "val", "test")]
        assert [len(part) for part in parts] == [70, 10, 20]
        assert sorted(chain(*parts)) == list(range(100))

    def test_classes_keep_their_shares(self) -> None:
        data = module(sources.bundled("digits"))
        whole = np.bincount(sources.bundled("digits").target) / 1797
        for rows in data.splits.values():
            assert np.abs(rows.target.bincount().numpy() - whole * len(rows)).max() <= 1

    def test_seed_decides(self) -> None:
        one, same, other = (module(numbered(), seed=seed) for seed in (3, 3, 4))
        assert column(one, "test") == column(same, "test") != column(other, "test")

    def test_setup_runs_once(self) -> None:
        calls = []
        data = DataModule("test", lambda: calls.append(1) or numbered())
        data.setup("fit")
        data.setup("test")
        assert calls == [1]

    @pytest.mark.parametrize(
        ("samples", "options", "sentence"),
        [
            (Samples(np.ones((9, 1)), np.array([0] * 8 + [1]), ("a", "b")), {}, "test part .* 1 in the smallest class"),
            (Samples(np.ones((9, 1)), np.array([0] * 7 + [1] * 2), ("a", "b")), {}, "smallest class .*bring more rows"),
            (numbered(), {"test_size": 2}, "expected enough rows for a test part of 2, but there are 100"),
            (numbered(), {"test_size": 100}, "change data.test_size"),
            (
                Samples(np.arange(200.0)[:, None], np.arange(200), tuple(map(str, range(200)))),
                {"test_size": 0.5},
                "expected enough rows for a test part of 0.5, but there are 200, 1 in the smallest class .{,180}bring",
            ),
            (numbered(), {"val_size": 0}, "data.val_size to be a share between 0 and 1 or a whole number .* but got 0"),
            (numbered(), {"test_size": 1.5}, "data.test_size to be a share between 0 and 1 .* but got 1.5"),
            (numbered(), {"test_size": -3}, "data.test_size to be a share between 0 and 1 .* but got -3"),
            (numbered(), {"test_size": None}, "a number in data.test_size, as test has no test set of its own"),
            (Samples(np.ones((1, 1)), np.ones(1)), {}, "expected enough rows for a test part"),
            (
                Samples(np.ones((8, 1)), np.ones(8)),
                {"val_size": 1},
                "at least 2 rows in each part, but val and the rest got 1 and",
            ),
            (Samples(np.ones((0, 1)), np.ones(0)), {}, "the data is empty"),
            (Samples(np.ones((5, 0)), np.ones(5)), {}, "the data is empty"),
            (Samples(np.ones((5, 1)), np.array([0, 1, 2, -1, 0]), ("a", "b", "c")), {}, "got labels from -1 to 2"),
        ],
    )
    def test_what_cannot_be_split(self, samples: Samples, options: dict, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            module(samples, **options)

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 10**30}, {"seed": -1}, {"seed": 2**32}])
    def test_options_out_of_range(self, options: dict) -> None:
        with pytest.raises(InputError, match=r"expected .*but got"):
            DataModule("test", numbered, **options)


class TestStandardisation:
    def test_a_constant_target_is_told(self) -> None:
        target = np.random.default_rng(0).normal(size=(40, 2))
        assert "target" not in module(Samples(target, target)).said
        target[:, 1] = 7.0
        told = module(Samples(target, target), standardise_target=False).said["target"]
        assert told == "constant in the training rows: there is nothing to learn"

    def test_is_fitted_on_the_training_part_alone(self) -> None:
        raw, data = (module(sources.bundled("iris"), standardise=value) for value in (False, True))
        train = raw.splits["train"].features.double()
        mean, deviation = train.mean(0), train.std(0, correction=0)
        for name, rows in data.splits.items():
            expected = (raw.splits[name].features.double() - mean) / deviation
            torch.testing.assert_close(rows.features.double(), expected, rtol=0, atol=1e-5)
        assert abs(data.splits["test"].features.mean()) > 1e-3  # it was not fitted on these

    def test_what_it_throws_beyond_float32_is_told(self) -> None:
        features = np.zeros((40, 1))
        features[sorted(column(module(Samples(np.arange(40.0)[:, None], np.arange(40))), "test"))[0]] = 1e30
        features[1::2] += 1e-30
        with pytest.raises(InputError, match=r"the test features, standardised by the training part, holds"):
            module(Samples(features, np.arange(40)), standardise=True)

    def test_constant_features_stay_finite(self) -> None:
        samples = Samples(np.ones((40, 2)), np.arange(40) % 2, ("a", "b"))
        assert module(samples, standardise=True).splits["train"].features.eq(0).all()

    def test_regression_targets_lead_back_to_their_units(self) -> None:
        data = module(sources.bundled("diabetes"))
        assert data.splits["train"].target.shape == (len(data.splits["train"]), 1)
        assert abs(data.splits["train"].target.mean()) < 1e-6
        back = [rows.target * data.target_scale[0] + data.target_mean[0] for rows in data.splits.values()]
        np.testing.assert_allclose(np.sort(torch.cat(back)[:, 0]), np.sort(load_diabetes().target), rtol=1e-5)

    def test_several_targets(self) -> None:
        data = module(Samples(np.random.rand(50, 3), np.random.rand(50, 2)))
        assert (data.output_size, len(data.target_mean)) == (2, 2)


class TestBatches:
    def batches(self, data: DataModule, epoch: int) -> list[list[int]]:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [features[:, 0].int().tolist() for features, _ in loader]

    def test_each_row_once_and_a_shorter_last_batch(self) -> None:
        data = module(numbered(), batch_size=32)
        batches = self.batches(data, 0)
        assert [len(batch) for batch in batches] == [32, 32, 6]
        assert sorted(chain(*batches)) == sorted(column(data, "train"))

    def test_order_follows_seed_and_epoch(self) -> None:
        one, same, other = (module(numbered(), seed=seed) for seed in (0, 0, 1))
        self.batches(one, 0)
        torch.rand(5)  # the global generator has no say
        assert self.batches(one, 1) == self.batches(same, 1) != self.batches(same, 0)
        assert self.batches(one, 1) != self.batches(other, 1)

    def test_processes_share_the_rows(self) -> None:
        data, parts = module(numbered(), batch_size=5), []
        for rank in range(2):
            data.trainer = SimpleNamespace(world_size=2, global_rank=rank, lightning_module=None)
            parts += chain(*self.batches(data, 0))
        assert sorted(parts) == sorted(column(data, "train"))

    def test_a_batch_is_its_rows(self) -> None:
        rows = module(sources.bundled("iris")).splits["train"]
        features, target = rows.__getitems__([5, 0, 5])
        for position, index in enumerate([5, 0, 5]):
            assert (features[position] == rows[index][0]).all()
            assert target[position] == rows[index][1]
        assert features.dtype == torch.float32
        assert target.dtype == torch.int64

    def test_evaluation_keeps_the_order(self) -> None:
        data = module(numbered())
        features, _ = next(iter(data.test_dataloader()))
        assert features[:, 0].int().tolist() == column(data, "test")

    def test_source_may_be_a_partial(self) -> None:
        data = DataModule("iris", partial(sources.bundled, "iris"))
        data.setup()
        assert data.class_names == tuple(load_iris().target_names)
