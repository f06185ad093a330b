"""Where samples come from. `conf/data/*.yaml` names one of these functions in `source`; each returns `Samples`."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn import datasets  # type: ignore[import-untyped]

from manual_mlp.errors import InputError
from manual_mlp.training.readers import as_float64, brief, example, read_idx, read_table

TASKS = ("classification", "regression")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGIT_CLASSES = tuple("0123456789")
MNIST_TRAIN = 60000
MOST_DRAWN = 10**9
LARGEST_LABEL = 2**53  # from here on not every whole number has a float of its own


@dataclass(frozen=True)
class Samples:
    """Features and targets as they come, before any split or standardisation.

    features: (N, …), numbers. target: (N,) class indices 0 … len(class_names) − 1, or (N,) or (N, m) numbers.
    class_names: empty for regression. test: the official test set, (features, target), where there is one.
    feature_names: of the columns of features, where they have any.
    weight: (N,) how much each counts in training, where that differs; not beside a test set.
    """

    features: np.ndarray
    target: np.ndarray
    class_names: tuple[str, ...] = ()
    test: tuple[np.ndarray, np.ndarray] | None = None
    feature_names: tuple[str, ...] = ()
    weight: np.ndarray | None = None


def bundled(name: str) -> Samples:
    """What scikit-learn brings along: digits (images scaled to [0, 1]), iris, wine, breast_cancer, diabetes."""
    loaders = {
        "digits": datasets.load_digits,
        "iris": datasets.load_iris,
        "wine": datasets.load_wine,
        "breast_cancer": datasets.load_breast_cancer,
        "diabetes": datasets.load_diabetes,
    }
    if name not in loaders:
        raise InputError(f"expected one of {', '.join(loaders)}, but got {name!r}; correct data.source.name")
    bunch = loaders[name]()
    features = bunch.images / 16.0 if name == "digits" else bunch.data
    class_names = tuple(map(str, bunch.get("target_names", ())))
    feature_names = () if name == "digits" else tuple(bunch.feature_names)  # pixels go by their place
    return Samples(features, bunch.target, class_names, feature_names=feature_names)


def moons(samples: int, noise: float, seed: int) -> Samples:
    """Two interleaved half circles in the plane; `noise` is the standard deviation added to each point."""
    _check_drawn(samples, noise, seed)
    features, target = datasets.make_moons(samples, noise=noise, random_state=seed)
    return Samples(features, target, ("upper", "lower"))


def xor(samples: int, noise: float, seed: int) -> Samples:
    """Points around the corners of the unit square; the class says whether exactly one coordinate is 1."""
    _check_drawn(samples, noise, seed)
    random = np.random.default_rng(seed)
    corners = random.integers(0, 2, size=(samples, 2))
    features = corners + random.normal(0.0, noise, size=corners.shape)
    return Samples(features, corners[:, 0] ^ corners[:, 1], ("equal", "different"))


def halves(samples: int, noise: float, seed: int) -> Samples:
    """A square cut in two by a slanted line, the halves moved 0.02 away from it each; then `noise` added to the points.

    Without noise a straight line separates the classes.
    """
    _check_drawn(samples, noise, seed)
    random = np.random.default_rng(seed)
    points = random.uniform(-1.0, 1.0, size=(samples, 2))
    normal = np.array([0.6, 0.8])
    target = (points @ normal > 0.3).astype(np.int64)
    features = points + np.outer(0.02 * (2 * target - 1), normal) + random.normal(0.0, noise, size=points.shape)
    return Samples(features, target, ("below", "above"))


def line(samples: int, noise: float, seed: int) -> Samples:
    """y = 1 + 2 x plus noise, for x uniform in [−1, 1]; a regression."""
    _check_drawn(samples, noise, seed)
    random = np.random.default_rng(seed)
    x = random.uniform(-1.0, 1.0, size=(samples, 1))
    return Samples(x, 1 + 2 * x + random.normal(0.0, noise, size=x.shape))


def sine(samples: int, noise: float, seed: int, frequency: float = 1.0) -> Samples:
    """y = sin(frequency · x) plus noise, for x uniform in [−π, π]; a regression."""
    _check_drawn(samples, noise, seed)
    random = np.random.default_rng(seed)
    x = random.uniform(-np.pi, np.pi, size=(samples, 1))
    return Samples(x, np.sin(frequency * x) + random.normal(0.0, noise, size=x.shape))


def mnist(folder: str | None) -> Samples:
    """Handwritten digits, 28 × 28, scaled to [0, 1]: 60,000 and the official test set of 10,000.

    From the IDX files in `folder`, or where it is None through scikit-learn from openml.org (kept on disk afterwards).
    """
    if folder is not None:
        return _idx_folder(Path(folder), DIGIT_CLASSES)
    pixels, labels = _fetch_mnist()
    features, target = pixels.astype(np.float32).reshape(-1, 28, 28) / 255.0, labels.astype(np.int64)
    train, test = slice(MNIST_TRAIN), slice(MNIST_TRAIN, None)  # openml.org keeps the official order
    return Samples(features[train], target[train], DIGIT_CLASSES, (features[test], target[test]))


def fashion_mnist(folder: str) -> Samples:
    """Photographs of clothes, 28 × 28, scaled to [0, 1], from the IDX files in `folder`: 60,000 and 10,000 for test."""
    hint = "on Debian and Ubuntu: apt-get install dataset-fashion-mnist, elsewhere put its four files into a folder"
    return _idx_folder(Path(folder), FASHION_CLASSES, hint)


def table(path: str, target: str | int, task: str, weight: str | int | None = None) -> Samples:
    """Your own CSV, NPZ or Parquet file; labels may be text or numbers (see `readers.read_table`).

    weight: the column that says how much a row counts in training; it is not a feature.
    """
    if task not in TASKS:
        raise InputError(f"expected data.source.task to be one of {', '.join(TASKS)}, but got {task!r}; correct it")
    target = str(target)  # a column may be called 3
    features, values, feature_names = read_table(Path(path), target)
    weights = None
    if weight is not None:
        if str(weight) not in feature_names:
            raise InputError(
                f"expected data.source.weight to name a column beside the target, but {path} has no {str(weight)!r}; "
                "correct it"
            )
        column = feature_names.index(str(weight))
        features, weights = np.delete(features, column, axis=1), features[:, column]
        feature_names = feature_names[:column] + feature_names[column + 1 :]
    if task == "regression":
        return Samples(features, _numbers(values, target), feature_names=feature_names, weight=weights)
    names, indices = np.unique(_labels(values, target), return_inverse=True)
    return Samples(features, indices, tuple(map(str, names)), feature_names=feature_names, weight=weights)


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
    gzipped = folder / f"{name}.gz"
    return gzipped if gzipped.exists() else folder / name


def _fetch_mnist() -> tuple[np.ndarray, np.ndarray]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A network error occurred")  # the sentence below says it once
            return datasets.fetch_openml("mnist_784", version=1, as_frame=False, return_X_y=True)
    except ImportError as error:  # scikit-learn parses this file with pandas
        raise InputError(
            "expected pandas for reading MNIST from openml.org, but it is not installed; "
            "install it with: pip install 'manual-mlp[table]'"
        ) from error
    except OSError as error:
        raise InputError(
            f"expected to fetch MNIST from openml.org, but the network did not answer ({error}); "
            "put its four IDX files into a folder and name it in data.source.folder, or try data=fashion_mnist"
        ) from error


def _numbers(values: np.ndarray, target: str) -> np.ndarray:
    if values.dtype.kind not in "biuf":
        raise InputError(
            f"expected numbers in the target {target!r} of a regression, but got such as {example(values)}; "
            "for classes set data.source.task=classification"
        )
    return as_float64(values)


def _labels(values: np.ndarray, target: str) -> np.ndarray:
    """Class labels: whole numbers (also written 1.0) as integers, everything else as text."""
    kind = values.dtype.kind
    if kind not in "biufOSU" or (kind == "O" and any(isinstance(value, np.ndarray | list | dict) for value in values)):
        raise InputError(
            f"expected text or whole numbers as class labels in the target {target!r}, but got such as "
            f"{example(values)}; encode them"
        )
    missing = np.array([value is None or value != value for value in values], dtype=bool)  # NaN differs from itself
    if missing.any():
        raise InputError(
            f"expected a class label in every row, but {target!r} has none in row {missing.argmax()} (counted from 0); "
            "remove the row or give it a label"
        )
    if kind in "OSU":
        return _text(values, target)
    if kind == "f":
        values = as_float64(values)
        wrong = values[(values != np.round(values)) | (np.abs(values) > LARGEST_LABEL)]
        if len(wrong):
            raise InputError(
                f"expected class labels in the target {target!r}, but got numbers such as {wrong[0]}; "
                "for a regression set data.source.task=regression"
            )
        return values.astype(np.int64)
    return values


def _text(values: np.ndarray, target: str) -> np.ndarray:
    try:
        text = values.astype(str)
        "".join(text.tolist()).encode()
    except ValueError as error:  # bytes that are no text, half a surrogate
        raise InputError(
            f"expected class labels in the target {target!r} that are text, but they are not ({brief(error)}); "
            "write them in UTF-8"
        ) from error
    return text


def _check_drawn(samples: int, noise: float, seed: int) -> None:
    if not 1 <= samples <= MOST_DRAWN:
        raise InputError(
            f"expected at least one sample and at most {MOST_DRAWN}, but data.source.samples is {samples}; change it"
        )
    if not 0 <= noise < np.inf:
        raise InputError(f"expected finite noise of at least 0, but data.source.noise is {noise}; change it")
    if not 0 <= seed < 2**32:
        raise InputError(f"expected a seed from 0 to 2**32 - 1, but data.source.seed is {seed}; choose another")
