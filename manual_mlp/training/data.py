"""The data module: it checks samples, splits and standardises them, and serves them in batches from memory."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from manual_mlp import checks
from manual_mlp.errors import InputError
from manual_mlp.training import preparation
from manual_mlp.training.readers import brief, check_numbers
from manual_mlp.training.sources import Samples

EVALUATION_BATCH = 1000  # without gradients larger batches cost nothing and save calls
Part = tuple[np.ndarray, ...]  # features, target, and the weights where there are any


class Rows(TensorDataset):
    """Tensors in memory. A batch is one `index_select` for each instead of a Python loop over rows."""

    def __init__(self, features: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        super().__init__(features, target, *(() if weight is None else (weight,)))
        self.features, self.target = features, target

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        rows = torch.tensor(indices)
        return tuple(tensor.index_select(0, rows) for tensor in self.tensors)


class Batches(DataLoader):
    """A DataLoader that knows how many batches of an epoch it has given, and can begin behind them."""

    given = skipped = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, self.skipped = self.skipped, 0
        for self.given, batch in enumerate(islice(super().__iter__(), skipped, None), start=skipped + 1):
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given, "batch_size": self.batch_size or 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the place in an epoch that a checkpoint was written in. Raises InputError if it does not fit."""
        given, size = state_dict["given"], state_dict["batch_size"]
        if size != self.batch_size and given * size < len(self.sampler):  # type: ignore[arg-type]
            raise InputError(
                f"expected training steps of {size} rows, as in the epoch that this checkpoint is in the middle of, "
                f"but got {self.batch_size}; go on with its own backprop, native, data.batch_size, "
                "callbacks.delta_flow.every and options of the trainer"
            )
        self.skipped = given if size == self.batch_size else 0


class DataModule(L.LightningDataModule):
    """Splits what `source` gives into train, val and test (stratified by class) and serves batches of it.

    name: what to call the data in reports. source: called once, returns `Samples`.
    val_size, test_size: a share of all rows (float) or a number of rows (int), as in scikit-learn's
        `train_test_split`. Samples that bring an official test set keep it: test_size is None then.
    standardise: shift and scale each feature to mean 0 and variance 1 over the training part.
    standardise_target: the same for regression targets; `target_mean` and `target_scale` lead back to their units.
    seed: fixes the split and, with the epoch, the order of the rows. split_seed: fixes the split instead.
    class_weight: how much the rows of each class count in the training cost, in the order of the classes; "balanced":
        all classes the same, as scikit-learn's. It multiplies the weights of the rows, if they bring any. The weights
        are scaled to a mean of 1; validation and test count each row once.

    After `setup`: splits (name -> `Rows`, features (N, input_size) float32; target (N,) class indices or
    (N, output_size) float32), input_size, output_size, class_names (empty for regression), feature_names (empty where
    they have none; of a table those of the prepared columns), columns (of a table, as fitted), said (what was done to
    them), image_shape (empty but for images), feature_mean and feature_scale (empty without standardise), fingerprint
    (of the rows as split).
    """

    def __init__(
        self,
        name: str,
        source: Callable[[], Samples],
        batch_size: int = 10,
        val_size: float | int = 0.1,
        test_size: float | int | None = 0.2,
        standardise: bool = False,
        seed: int = 0,
        split_seed: int | None = None,
        class_weight: str | Sequence[float] | None = None,
        standardise_target: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= batch_size < 2**31:
            raise InputError(f"expected data.batch_size of at least 1 and below 2**31, but got {batch_size}; change it")
        self.split_seed = seed if split_seed is None else split_seed
        for number in (seed, self.split_seed):
            if not 0 <= number < 2**32:
                raise InputError(
                    f"expected a seed from 0 to 2**32 - 1, as NumPy takes, but got {number}; choose another"
                )
        for option, size in (("val_size", val_size), ("test_size", test_size)):
            if size is not None and not (0 < size < 1 or (isinstance(size, int) and size > 0)):
                raise InputError(
                    f"expected data.{option} to be a share between 0 and 1 or a whole number of rows, but got {size}; "
                    "correct it"
                )
        self.name, self.source = name, source
        self.standardise, self.standardise_target = standardise, standardise_target
        self.batch_size, self.seed = batch_size, seed
        self.val_size, self.test_size, self.class_weight = val_size, test_size, class_weight
        self.splits: dict[str, Rows] = {}
        self.feature_mean: list[float] = []
        self.feature_scale: list[float] = []
        self.target_mean: list[float] = []
        self.target_scale: list[float] = []
        self.columns: list[preparation.Column] = []
        self.said: dict[str, str] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load, check, split and standardise; once, however often Lightning calls it."""
        if self.splits:
            return
        samples = self.source()
        check(samples)
        self.class_names, self.feature_names = samples.class_names, samples.feature_names
        self.reading, self.said = samples.reading, dict(samples.said)
        self.image_shape = samples.features.shape[1:] if samples.features.ndim == 3 else ()
        parts = self._split(samples)
        if samples.columns:
            parts = self._prepared(parts, samples)
        del samples  # the parts are copies
        self.fingerprint = _fingerprint(parts)
        inputs = self._inputs({name: part[0] for name, part in parts.items()})
        targets = self._targets({name: part[1] for name, part in parts.items()})
        weights = {"train": self._weights(*parts["train"][1:])}
        self.splits = {name: Rows(inputs[name], targets[name], weights.get(name)) for name in parts}
        self.input_size = self.splits["train"].features.shape[1]

    def _prepared(self, parts: dict[str, Part], samples: Samples) -> dict[str, Part]:
        """Return the parts of a table with its gaps filled and its text as numbers, as fitted on the training part."""
        raw, train = samples.columns, parts["train"][0]
        columns = preparation.fitted(raw, train)
        self.said |= preparation.words(raw, columns, samples.features, train)
        classes = preparation.Column(samples.reading["target"] or "", samples.class_names)
        self.said["white space"] = preparation.white_space([*raw, classes])
        self.columns = [column for column in columns if column]
        if not self.columns:
            raise InputError("expected a feature that some training row has, but all are empty; name another target")
        self.feature_names = tuple(name for column in self.columns for name in column.names())
        return {name: (preparation.prepared(part[0], raw, columns), *part[1:]) for name, part in parts.items()}

    def _weights(self, target: np.ndarray, weight: np.ndarray | None = None) -> Tensor | None:
        """Return the weights (N,), with mean 1; None if every row counts the same."""
        if self.class_weight is not None:
            weight = self._class_weights(target)[target] * (1.0 if weight is None else weight)
        if weight is None:
            return None
        if not (weight >= 0).all() or not weight.any():
            raise InputError(
                "expected weights of at least 0, and of more for some training row, but the least is "
                f"{weight.min():g} and the greatest {weight.max():g}; correct data.class_weight or the column"
            )
        return _tensor(weight / weight.mean())

    def _class_weights(self, target: np.ndarray) -> np.ndarray:
        """Return the weights (classes,) that the option gives."""
        given, classes = self.class_weight, len(self.class_names)
        if not classes or (given != "balanced" if isinstance(given, str) else len(given or ()) != classes):
            wanted = f"balanced or a number for each of {classes} classes" if classes else "null for a regression"
            raise InputError(f"expected data.class_weight to be {wanted}, but got {given}; correct it")
        return np.asarray(given if not isinstance(given, str) else 1 / np.bincount(target, minlength=classes).clip(1))

    def _split(self, samples: Samples) -> dict[str, Part]:
        rest, size, features = np.arange(len(samples.target)), self.val_size, samples.features
        taken: dict[str, np.ndarray] = {}
        if samples.test is None:
            rest, taken["test"] = self._carve(rest, self.test_size, "test", samples)
            if isinstance(size, float):  # a share of all rows, not of those that the test part has left
                size = round(size * len(samples.target))
        elif self.test_size is not None:
            raise InputError(
                f"expected data.test_size=null, as {self.name} has an official test set, but got {self.test_size}; "
                "leave it out"
            )
        taken["train"], taken["val"] = self._carve(rest, size, "val", samples)
        values = [v for v in (features.reshape(len(features), -1), samples.target, samples.weight) if v is not None]
        parts = {name: tuple(value[rows] for value in values) for name, rows in taken.items()}
        if samples.test is not None:
            parts["test"] = (samples.test[0].reshape(len(samples.test[0]), -1), samples.test[1])
        return {name: parts[name] for name in ("train", "val", "test")}

    def _carve(self, rows: np.ndarray, size: float | None, name: str, samples: Samples) -> list[np.ndarray]:
        """Take `size` of the rows away; return those that are left, and those taken."""
        if size is None:
            raise InputError(
                f"expected a number in data.{name}_size, as {self.name} has no {name} set of its own; give it one"
            )
        labels = samples.target[rows] if samples.class_names else None
        try:
            indices = train_test_split(rows, test_size=size, random_state=self.split_seed, stratify=labels)
        except ValueError as error:  # scikit-learn's reason is right, but knows nothing of our options
            smallest = "" if labels is None else f", {np.bincount(labels)[labels].min()} in the smallest class"
            raise InputError(
                f"expected enough rows for a {name} part of {size}, but there are {len(rows)}{smallest} "
                f"({shorten(str(error), 160, placeholder=' …').rstrip('.')}); "
                f"bring more rows or change data.{name}_size"
            ) from error
        if min(map(len, indices)) < 2:
            raise InputError(
                f"expected at least 2 rows in each part, but {name} and the rest got {len(indices[1])} and "
                f"{len(indices[0])}; bring more rows or change data.{name}_size"
            )
        return indices

    def _inputs(self, features: dict[str, np.ndarray]) -> dict[str, Tensor]:
        if not self.standardise:
            return {name: _tensor(values) for name, values in features.items()}
        scaler = StandardScaler().fit(features["train"])
        self.feature_mean, self.feature_scale = scaler.mean_.tolist(), scaler.scale_.tolist()
        return {name: _scaled(scaler, f"the {name} features", values) for name, values in features.items()}

    def _targets(self, targets: dict[str, np.ndarray]) -> dict[str, Tensor]:
        self.output_size = len(self.class_names)
        if self.class_names:
            return {name: torch.as_tensor(target, dtype=torch.int64) for name, target in targets.items()}
        columns = {name: target.reshape(len(target), -1) for name, target in targets.items()}
        scaler = StandardScaler().fit(columns["train"])
        if (columns["train"] == columns["train"][0]).all(0).any():
            self.said["target"] = "constant in the training rows: there is nothing to learn"
        if not self.standardise_target:
            scaler.mean_, scaler.scale_ = np.zeros_like(scaler.mean_), np.ones_like(scaler.scale_)
        self.target_mean, self.target_scale = scaler.mean_.tolist(), scaler.scale_.tolist()
        self.output_size = len(self.target_mean)
        return {name: _scaled(scaler, f"the {name} target", column) for name, column in columns.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how to prepare new rows, and how to know these ones again."""
        values = {name: getattr(self, name) for name in ("feature_mean", "feature_scale", "fingerprint")}
        values |= {"name": Path(str(self.name)).name, "feature_names": list(self.feature_names)}
        if self.columns:
            values |= self.reading
            values["columns"] = [vars(column) | {"kinds": list(column.kinds)} for column in self.columns]
        return values

    def train_dataloader(self) -> DataLoader:
        """Batches of `batch_size` rows in an order made from (seed, epoch) alone; several at once if the module asks.

        Each of P processes serves every P-th row of that order. So their batches together are the batches of one
        process with P · batch_size. If P does not divide the rows, the first ones are served again at the end.
        """
        rows = self.splits["train"]
        sampler: DistributedSampler = DistributedSampler(rows, *self._processes(), shuffle=True, seed=self.seed)
        module: Any = self.trainer.lightning_module if self.trainer else None
        several = module.batches_per_step(self.batch_size) if hasattr(module, "batches_per_step") else 1
        return _loader(rows, self.batch_size * several, sampler)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def _evaluation(self, part: str) -> DataLoader:
        """Serve every row once. Every process gets the same number of batches, because DDP synchronises at each."""
        rows, (processes, rank) = self.splits[part], self._processes()
        if len(rows) < processes:
            raise InputError(
                f"expected at least one row of the {part} part for each of {processes} processes, but got {len(rows)}; "
                f"raise data.{part}_size or lower trainer.devices"
            )
        sampler = UnrepeatedDistributedSampler(rows, num_replicas=processes, rank=rank, shuffle=False)
        batch = EVALUATION_BATCH
        while len(rows) % processes and len(rows) // processes % batch == 0:  # one more row would make one more batch
            batch += 1
        return _loader(rows, batch, sampler)

    def _processes(self) -> tuple[int, int]:
        """Return how many processes there are, and the number of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


def check(samples: Samples) -> None:
    """Raise InputError if samples are empty, of unequal number, of one class, not finite, or labelled out of range."""
    if len(samples.class_names) == 1:
        raise InputError(
            f"expected at least two classes, but every row is of the class {brief(samples.class_names[0])}; "
            "bring rows of another one or change the target"
        )
    _check_part(samples)
    if samples.weight is not None:
        check_numbers("the weight", samples.weight)
    if samples.test is not None:
        _check_part(Samples(*samples.test, samples.class_names))
        if samples.test[0].shape[1:] != samples.features.shape[1:]:
            raise InputError(
                f"expected test samples of the shape {samples.features.shape[1:]}, as the others, "
                f"but they have {samples.test[0].shape[1:]}; check that the files belong together"
            )


def _check_part(part: Samples) -> None:
    features, target, classes = part.features, part.target, len(part.class_names)
    if len(features) != len(target):
        raise InputError(
            f"expected one target per sample, but there are {len(features)} samples (images) and {len(target)} targets "
            "(labels); check that the two belong together"
        )
    if features.size == 0:
        raise InputError(f"expected samples with features, but the data is empty, of shape {features.shape}; check it")
    if not part.columns:  # a table has refused its defects
        check_numbers("the features", features, part.feature_names)
    check_numbers("the target", target)
    if classes:
        checks.labels(torch.as_tensor(target), classes)


def _scaled(scaler: StandardScaler, name: str, values: np.ndarray) -> Tensor:
    scaled = scaler.transform(values)
    check_numbers(f"{name}, standardised by the training part,", scaled)
    return _tensor(scaled)


def _loader(rows: Rows, batch_size: int, sampler: DistributedSampler) -> Batches:
    """Make batches with a generator of their own: an iterator draws a number, which must not disturb dropout's."""
    return Batches(rows, batch_size, sampler=sampler, collate_fn=tuple, generator=torch.Generator())


def _fingerprint(parts: dict[str, Part]) -> int:
    """Return a checksum of all rows, in the order of their parts."""
    code = 0
    for values in (values for part in parts.values() for values in part):
        code = zlib.crc32(np.ascontiguousarray(values).data, code)
    return code


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32)
