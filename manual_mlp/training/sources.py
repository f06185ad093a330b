"""Make samples. `conf/data/*.yaml` names one of these functions in `source`; each returns `Samples`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn import datasets  # type: ignore[import-untyped]

from manual_mlp.errors import InputError
from manual_mlp.shell import install
from manual_mlp.training import preparation, readers
from manual_mlp.training.preparation import Column, Defects
from manual_mlp.training.readers import MAX_BYTES, quoted, read_idx

BUNDLED = ("digits", "iris", "wine", "breast_cancer", "diabetes")
TASKS = ("classification", "regression")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGIT_CLASSES = tuple("0123456789")
MNIST_TRAIN = 60000
MOST_DRAWN = 10**9


@dataclass(frozen=True)
class Samples:
    """Features and targets as they come, before any split or standardisation.

    features: (N, …), numbers. target: (N,) class indices 0 … len(class_names) − 1, or (N,) or (N, m) numbers.
    class_names: empty for regression. test: the official test set, (features, target), if there is one.
    feature_names: of the columns of features, if they have any.
    weight: (N,) how much each row counts in training, if that differs; not beside a test set.
    columns: of a table, whose features are numbers and codes of kinds, NaN for gaps, to be prepared once the training
        rows are known. reading: how new rows of it are read, as plain values. said: words for the summary.
    """

    features: np.ndarray
    target: np.ndarray
    class_names: tuple[str, ...] = ()
    test: tuple[np.ndarray, np.ndarray] | None = None
    feature_names: tuple[str, ...] = ()
    weight: np.ndarray | None = None
    columns: tuple[Column, ...] = ()
    reading: Mapping[str, str | None] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)


def bundled(name: str) -> Samples:
    """Load a data set of scikit-learn: digits (images scaled to [0, 1]), iris, wine, breast_cancer, diabetes."""
    if name not in BUNDLED:
        raise InputError(f"expected one of {', '.join(BUNDLED)}, but got {name!r}; correct data.source.name")
    bunch = getattr(datasets, f"load_{name}")()
    features = bunch.images / 16.0 if name == "digits" else bunch.data
    class_names = tuple(map(str, bunch.get("target_names", ())))
    feature_names = () if name == "digits" else tuple(bunch.feature_names)  # a pixel's name is its place
    return Samples(features, bunch.target, class_names, feature_names=feature_names)


def moons(samples: int, noise: float, seed: int) -> Samples:
    """Draw two interleaved half circles in the plane; `noise` is the standard deviation added to each point."""
    _generator(samples, noise, seed)
    features, target = datasets.make_moons(samples, noise=noise, random_state=seed)
    return Samples(features, target, ("upper", "lower"))


def xor(samples: int, noise: float, seed: int) -> Samples:
    """Draw points around the corners of the unit square; class 1 if exactly one coordinate is 1."""
    random = _generator(samples, noise, seed)
    corners = random.integers(0, 2, size=(samples, 2))
    features = corners + random.normal(0.0, noise, size=corners.shape)
    return Samples(features, corners[:, 0] ^ corners[:, 1], ("equal", "different"))


def halves(samples: int, noise: float, seed: int) -> Samples:
    """Draw points of a square that a slanted line cuts in two; each half is moved away by 0.02; then `noise` is added.

    Without noise a straight line separates the classes.
    """
    random = _generator(samples, noise, seed)
    points = random.uniform(-1.0, 1.0, size=(samples, 2))
    normal = np.array([0.6, 0.8])
    target = (points @ normal > 0.3).astype(np.int64)
    features = points + np.outer(0.02 * (2 * target - 1), normal) + random.normal(0.0, noise, size=points.shape)
    return Samples(features, target, ("below", "above"))


def line(samples: int, noise: float, seed: int) -> Samples:
    """y = 1 + 2 x plus noise, for x uniform in [−1, 1]; a regression."""
    random = _generator(samples, noise, seed)
    x = random.uniform(-1.0, 1.0, size=(samples, 1))
    return Samples(x, 1 + 2 * x + random.normal(0.0, noise, size=x.shape))


def sine(samples: int, noise: float, seed: int, frequency: float = 1.0) -> Samples:
    """y = sin(frequency · x) plus noise, for x uniform in [−π, π]; a regression."""
    random = _generator(samples, noise, seed)
    x = random.uniform(-np.pi, np.pi, size=(samples, 1))
    return Samples(x, np.sin(frequency * x) + random.normal(0.0, noise, size=x.shape))


def mnist(folder: str | None) -> Samples:
    """Load handwritten digits, 28 × 28, scaled to [0, 1]: 60,000 and the official test set of 10,000.

    They come from the IDX files in `folder`; if it is None, from openml.org by scikit-learn, which keeps them on disk.
    """
    if folder is not None:
        return _idx_folder(Path(folder), DIGIT_CLASSES)
    pixels, labels = _fetch_mnist()
    features, target = pixels.astype(np.float32).reshape(-1, 28, 28) / 255.0, labels.astype(np.int64)
    train, test = slice(MNIST_TRAIN), slice(MNIST_TRAIN, None)  # openml.org keeps the official order
    return Samples(features[train], target[train], DIGIT_CLASSES, (features[test], target[test]))


def fashion_mnist(folder: str) -> Samples:
    """Load photographs of clothes, 28 × 28, scaled to [0, 1], from IDX files: 60,000 and 10,000 for test."""
    hint = "on Debian and Ubuntu: apt-get install dataset-fashion-mnist, elsewhere put its four files into a folder"
    return _idx_folder(Path(folder), FASHION, hint)


def table(
    path: str,
    target: str | int,
    task: str,
    weight: str | int | None = None,
    drop: Sequence[str | int] = (),
    key: str | int | None = None,
    separator: str | None = None,
    decimal: str | None = None,
    max_bytes: float = MAX_BYTES,
) -> Samples:
    """Read your own CSV, TSV, NPZ or Parquet file, with text and gaps; labels may be text, numbers or booleans.

    weight: the column that says how much a row counts in training. drop: columns to leave out. key: the column that
        names a row; predictions bear it. None of them is a feature.
    separator, decimal: of a CSV file; by default a comma (a tab in .tsv) and a point.
    max_bytes: the largest decoded table: 8 bytes for a cell, text by its length, 10,000 for a column.
    """
    if task not in TASKS:
        raise InputError(f"expected data.source.task to be one of {', '.join(TASKS)}, but got {task!r}; correct it")
    given = {"target": target, "weight": weight, "key": key}
    own = {option: str(name) for option, name in given.items() if name is not None}  # a column may be called 3
    if len({*own.values()} | {*map(str, drop)}) < len(own) + len({*drop}):
        raise InputError(
            "expected data.source.target, weight, key and drop to name different columns, but got "
            f"{readers.listed([*own.values(), *map(str, drop)])}; correct them"
        )
    separator = "\t" if separator in ("tab", "\\t") else separator
    read = readers.Table(Path(path), "data.source.path", max_bytes, [*own.values()], [*map(str, drop)])
    read.separator, read.decimal, read.texts = separator, decimal, [own["key"]] if "key" in own else []
    read.labels = own["target"] if task == "classification" else None
    readers.read_table(read)
    rows, defects = read.rows, Defects()
    columns = {option: _taken(read, name, option) for option, name in own.items()}
    if task == "classification":
        classes, values = preparation.classes(columns["target"], own["target"])
        defects += [(row, f"{quoted(own['target'])} is empty") for row in np.flatnonzero(values < 0).tolist()]
    else:
        classes, values = (), _numbers(columns["target"], own["target"], defects)
    weights = _numbers(columns["weight"], own["weight"], defects) if "weight" in own else None
    codes, features, more = preparation.taken(read)
    if not features:
        raise InputError(
            f"expected a feature in {read.path.name}, but beside {readers.listed([*own.values(), *map(str, drop)])} "
            "there is no column; bring one, or drop less"
        )
    read.refuse([*defects, *more])
    read.allows(8 * rows * sum(len(column.names()) for column in features))
    said = {"left out": read.left_out_in_words}
    if "key" in own:
        repeats = len(preparation.distinct(columns["key"])[0]) < rows
        said["key"] = quoted(own["key"]) + ", which repeats" * repeats
    reading = {"target": own["target"], "key": own.get("key"), "separator": separator, "decimal": decimal}
    names = tuple(column.name for column in features)
    return Samples(codes, values, classes, None, names, weights, tuple(features), reading, said)


def _taken(table: readers.Table, name: str, option: str) -> np.ndarray:
    """Take a column out of the table."""
    columns = table.columns
    if name not in columns:
        raise InputError(
            f"expected data.source.{option} to name a column there is, but {table.path.name} has no {quoted(name)}; "
            f"its columns are {readers.listed([*columns])}; {readers.separated([*columns]) or 'name one of them'}"
        )
    if not len(columns[name]):
        raise InputError(f"expected rows in {table.path}, but the data is empty; check that it is the right file")
    return columns.pop(name)


def _idx_folder(folder: Path, class_names: tuple[str, ...], hint: str = "correct data.source.folder") -> Samples:
    if not folder.is_dir():
        raise InputError(f"expected a folder with IDX files, but there is none at {folder}; {hint}")
    train, test = _idx_pair(folder, "train"), _idx_pair(folder, "t10k")
    return Samples(*train, class_names, test)


def _idx_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_idx_path(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_idx_path(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
    return images.astype(np.float32) / 255.0, labels.astype(np.int64)


def _idx_path(folder: Path, name: str) -> Path:
    return next(filter(Path.exists, [folder / f"{name}.gz"]), folder / name)


def _fetch_mnist() -> tuple[np.ndarray, np.ndarray]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A network error occurred")  # the sentence below says it already
            return datasets.fetch_openml("mnist_784", version=1, as_frame=False, return_X_y=True)
    except ImportError as error:  # scikit-learn parses this file with pandas
        raise InputError(
            f"expected pandas for MNIST from openml.org, but it is missing; install it: {install('table')}"
        ) from error
    except OSError as error:
        raise InputError(
            f"expected to fetch MNIST from openml.org, but the network did not answer ({error}); "
            "put its four IDX files into a folder and name it in data.source.folder, or try data=fashion_mnist"
        ) from error


def _numbers(values: np.ndarray, name: str, defects: Defects) -> np.ndarray:
    """Return the numbers of a target or a weight; add the cells that are none."""
    found, wrong = preparation.numbers(values, name)
    if 2 * len(wrong) > len(values):
        raise InputError(
            f"expected numbers in {quoted(name)}, but got such as {readers.example(values)}; "
            "for classes set data.source.task=classification"
        )
    defects += wrong
    return found


def _generator(samples: int, noise: float, seed: int) -> np.random.Generator:
    if not 1 <= samples <= MOST_DRAWN:
        raise InputError(
            f"expected at least one sample and at most {MOST_DRAWN}, but data.source.samples is {samples}; change it"
        )
    if not 0 <= noise < np.inf:
        raise InputError(f"expected finite noise of at least 0, but data.source.noise is {noise}; change it")
    if not 0 <= seed < 2**32:
        raise InputError(f"expected a seed from 0 to 2**32 - 1, but data.source.seed is {seed}; choose another")
    return np.random.default_rng(seed)
