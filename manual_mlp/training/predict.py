"""Predict new rows. `Predictor` is plain torch; neither Lightning nor Hydra is imported here."""

import csv
import io
import logging
from collections.abc import Sequence
from os import PathLike
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manual_mlp.checkpoint import read_checkpoint, write_whole
from manual_mlp.ensemble import Members
from manual_mlp.errors import InputError, shown
from manual_mlp.formulas import probability
from manual_mlp.lenet import LeNet, net_of
from manual_mlp.modules import MLP, rebuilding, tensors_of
from manual_mlp.schema import described
from manual_mlp.training import preparation, readers
from manual_mlp.training.readers import MAX_BYTES, NUMBER, Table, brief, cut, listed, quoted

log = logging.getLogger(__name__)

ROWS = 10_000  # rows at a time


class Predictor(nn.Module):
    """Features as they stand in the data → P(class | x) of each class, or in a regression the target in its units.

    features (N, n_1) → (N, n_L). It standardises as training did, so it can be exported as one whole, to ONNX or by
    torch.export. `formulas.probability` defines P for each cost.
    class_names: of the columns of P, empty in a regression. feature_names: of the n_1 columns, if they had any.
    Several members of one training answer together, by their mean; `spread` says how far they differ.

    >>> import torch, manual_mlp as mm
    >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")  # of a run with data=iris
    >>> P = predictor(torch.tensor([[5.1, 3.5, 1.4, 0.2]], dtype=torch.float64))  # sepal and petal, in cm
    >>> predictor.class_names[P.argmax().item()], round(P.sum().item(), 4)
    ('setosa', 1.0)
    """

    mean: Tensor
    scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, net: MLP | LeNet | Members, content: dict[str, Any]) -> None:
        super().__init__()
        values, data = content["hyper_parameters"], content["DataModule"]
        self.net, self.loss = net, values["loss"]
        self.class_names: list[str] = list(values["class_names"])
        self.feature_names: list[str] = list(data["feature_names"])
        self.columns = preparation.from_plain(data, values["input_size"])
        self.target, self.key = data.get("target"), data.get("key")
        self.separator, self.decimal = data.get("separator"), data.get("decimal")
        self.register_buffer("mean", torch.tensor(data["feature_mean"] or [0.0], dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(data["feature_scale"] or [1.0], dtype=torch.float64))
        self.register_buffer("target_mean", torch.tensor(values["target_mean"], dtype=torch.float64))
        self.register_buffer("target_scale", torch.tensor(values["target_scale"], dtype=torch.float64))

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str]) -> "Predictor":
        """Make the predictor of a checkpoint. Raises InputError for other files, and for a perceptron's checkpoint.

        >>> import manual_mlp as mm
        >>> mm.Predictor.from_checkpoint("best.ckpt").class_names
        ['setosa', 'versicolor', 'virginica']
        """
        content = read_checkpoint(path)
        if "DataModule" not in content:
            raise InputError(f"expected a checkpoint that says how to prepare rows, but {path} does not; train anew")
        if content["hyper_parameters"]["output_activation"] == "threshold":
            raise InputError(
                f"expected a net whose answers are probabilities or numbers, but {path} holds a perceptron, which says "
                "0 or 1; take a run of model=mlp"
            )
        values = content["hyper_parameters"]
        with rebuilding(path):
            nets: list[Any] = [net_of(values) for _ in range(values.get("members", 1))]
            for k, net in enumerate(nets):
                net.load_state_dict(tensors_of(content, f"net.{k}." if len(nets) > 1 else "net."), assign=True)
            if len(nets) > 1:
                net = Members(nets, values["loss"], bool(values["class_names"]))
                net.load_state_dict(tensors_of(content))
                net.take_kept()
        return cls(net, content).eval()

    @property
    def _first(self) -> Any:
        """Return the net, of several the first."""
        return self.net[0] if isinstance(self.net, Members) else self.net

    def forward(self, features: Tensor) -> Tensor:
        """Return P of each class, or the target in its units: (N, n_1), or what `prepared` takes → (N, n_L)."""
        rows = features if isinstance(features, Tensor) else self.prepared(features)
        return self.interpreted(self.prediction(rows))

    def prepared(self, rows: Any) -> Tensor:
        """Return raw rows, a pandas DataFrame, as a tensor (N, n_1); also numbers in an array or lists.

        Raises InputError for columns that are missing, and for cells that don't fit.

        >>> import pandas, manual_mlp as mm
        >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")
        >>> rows = pandas.DataFrame([[5.1, 3.5, 1.4, 0.2]], columns=predictor.feature_names)
        >>> predictor.prepared(rows).shape
        torch.Size([1, 4])
        """
        if not hasattr(rows, "columns"):
            try:
                array = np.asarray(rows)
                if array.dtype.kind in "biuf" and array.dtype not in (np.float32, np.float64):
                    array = array.astype(float)  # another byte order, too
                return torch.as_tensor(np.ascontiguousarray(array))
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"expected numbers in rows of the same length, but got {type(rows).__name__} that is no such table "
                    f"({brief(error)}); pass raw rows as pandas.DataFrame(rows, columns=[…])"
                ) from error
        readers.check_names(Path("the rows"), map(str, rows.columns))
        columns = {str(name): readers.column(rows[name]) for name in rows.columns}
        features, said = self._features(Table(Path("the rows"), "rows", np.inf, columns, columns=columns))
        for sentence in said:
            log.warning(sentence)
        return torch.from_numpy(features)

    def _features(self, table: Table) -> tuple[np.ndarray, list[str]]:
        """Return the rows (N, n_1) and words about them. Without names of columns, all of the file's are features."""
        if not self.columns:
            codes, columns, defects = preparation.taken(table)
            defects += [(row, "a cell is empty") for row in np.flatnonzero(np.isnan(codes).any(1)).tolist()]
            defects += [(None, f"{quoted(column.name)} is text") for column in columns if column.kinds]
            table.refuse(defects)
            return codes, []
        for name in filter(None, (self.target, self.key)):
            if name not in table.columns and f"{name}[0]" in table.columns:
                raise InputError(
                    f"expected one value of {quoted(name)} for each row, but got several; mend it, or leave it out"
                )
        own = [column.name for column in self.columns]
        if missing := [name for name in own if name not in table.columns]:
            raise InputError(
                f"expected the {len(own)} columns that the net was trained on, in any order, but "
                f"{table.path.name} lacks {listed(missing)}; add {'it' if len(missing) == 1 else 'them'}"
                + (f", and separate the cells by {table.mark!r}, as in training" if len(table.columns) == 1 else "")
            )
        extra = [name for name in table.columns if name not in {*own, self.target, self.key}]
        for name in extra:
            del table.columns[name]
        codes, raw, defects = preparation.taken(table, self.columns)
        table.refuse(defects)
        said = preparation.new_kinds(codes, raw, self.columns)
        if extra:
            said.append(f"ignored {listed(extra)}: the net was trained without {'it' if len(extra) == 1 else 'them'}")
        return preparation.prepared(codes, raw, self.columns), said

    def prediction(self, features: Tensor) -> Tensor:
        """Return a^L (N, n_L) for features (N, n_1); the largest in a row is the class that accuracy counts.

        >>> import torch, manual_mlp as mm
        >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")  # of a run with data=iris
        >>> predictor.prediction(torch.tensor([[5.1, 3.5, 1.4, 0.2]], dtype=torch.float64)).argmax().item()
        0
        """
        return self.net(self.standardised(features))

    @torch.no_grad()
    def predict(self, rows: Any) -> np.ndarray:
        """Return the class of each row by its name, or in a regression the target in its units (N,) or (N, m).

        rows: as `forward` takes them. Raises InputError for rows that don't fit.

        >>> import manual_mlp as mm
        >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")  # of a run with data=iris
        >>> predictor.predict([[5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]])
        array(['setosa', 'virginica'], dtype='<U10')
        """
        prediction = self.prediction(rows if isinstance(rows, Tensor) else self.prepared(rows))
        if self.class_names:
            return np.array(self.class_names)[prediction.argmax(-1).numpy()]
        values = self.interpreted(prediction).numpy()
        return values[..., 0] if values.shape[-1] == 1 else values

    def spread(self, features: Tensor) -> Tensor:
        """Return the standard deviation of the members' answers (N, n_L), each in its unit; of a single net 0.

        >>> import torch, manual_mlp as mm
        >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")  # of a run with data=iris
        >>> predictor.spread(torch.tensor([[5.1, 3.5, 1.4, 0.2]], dtype=torch.float64)).tolist()
        [[0.0, 0.0, 0.0]]
        """
        scaled = self.standardised(features)
        if not isinstance(self.net, Members):
            return torch.zeros_like(self.interpreted(self.net(scaled)))
        return self.interpreted(self.net.each(scaled)).std(0)

    def standardised(self, features: Tensor) -> Tensor:
        """Return features (N, n_1) as the net takes them: standardised, as in training.

        >>> import torch, manual_mlp as mm
        >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")  # of a run with data=iris
        >>> predictor.standardised(predictor.mean[None]).tolist()  # the mean of the training part is 0
        [[0.0, 0.0, 0.0, 0.0]]
        """
        size, like = self._first.sizes[0], next(self._first.parameters())
        if not isinstance(features, Tensor) or features.is_complex() or features.shape[-1:] != (size,):
            named = f", of the columns {listed(self.feature_names)}" if self.feature_names else ""
            raise InputError(
                f"expected a tensor with {size} numbers in each row{named}, but got {described(features)}; correct the "
                "rows"
                + (", or pass raw rows as a pandas DataFrame" if named else " (.flatten(1) makes one of an image)")
            )
        return ((features.to(self.mean.dtype) - self.mean) / self.scale).to(like.dtype)

    def interpreted(self, prediction: Tensor) -> Tensor:
        """Return P of each class, or the target in its units, for a^L (N, n_L).

        >>> import torch, manual_mlp as mm
        >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")  # of a run with data=iris
        >>> P = predictor.interpreted(torch.tensor([[0.9, 0.2, 0.1]]))
        >>> P.argmax().item(), round(P.sum().item(), 4)
        (0, 1.0)
        """
        if self.class_names:
            return probability(prediction, self.loss)
        return prediction * self.target_scale + self.target_mean


def predict_file(checkpoint: str, source: str, destination: str, max_bytes: float = MAX_BYTES) -> list[str]:
    """Write the predictions of a checkpoint for the rows of `source` (CSV, NPZ, Parquet) to `destination` (CSV, NPZ).

    CSV: a column `class` and one P(…) for each class; in a regression `prediction`. NPZ: arrays `class`,
    `probability` (N, classes) and `class_names`; in a regression `prediction` (N, m). From several members there is
    the standard deviation of each P or prediction, too: columns sd(…), or the array `sd`.
    Returns notes for the user, in sentences. Raises InputError for files that can't be read or written, columns that
    don't fit, and rows without a finite prediction.
    """
    suffix = Path(destination).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"expected output to end in {' or '.join(SUFFIXES)}, but got {destination}; rename it")
    predictor = Predictor.from_checkpoint(checkpoint)
    table = _read(Path(source), predictor, max_bytes)
    features, notes = predictor._features(table)
    if features.shape[1] != predictor._first.sizes[0]:
        raise InputError(
            f"expected {predictor._first.sizes[0]} numbers in each row, as the net was trained on, but {source} has "
            f"{features.shape[1]}; check that it is the right file"
        )
    with torch.inference_mode():
        scaled = predictor.standardised(torch.from_numpy(features))
        prediction = torch.cat([predictor.net(rows) for rows in scaled.split(ROWS)])
        values, names = predictor.interpreted(prediction), predictor.class_names
        spread = None
        if isinstance(predictor.net, Members):
            spread = torch.cat([predictor.spread(rows) for rows in torch.from_numpy(features).split(ROWS)]).numpy()
    finite = scaled.isfinite().all(1) & prediction.isfinite().all(1) & values.isfinite().all(1)
    if not finite.all():
        rows = ", ".join(cut((~finite).nonzero()[:, 0].tolist()))
        raise InputError(
            f"expected a finite prediction for each row, but in {Path(source).name} numbers far from the training's "
            f"lead to NaN or infinity in the rows {rows} (counted from 0); correct or remove them"
        )
    chosen = prediction.argmax(1).tolist() if names else []
    key = {predictor.key: table.columns[predictor.key]} if predictor.key in table.columns else {}
    if suffix == ".npz":  # text in an array is as wide as the longest
        table.allows(4 * len(features) * max((len(str(cell)) for cells in key.values() for cell in cells), default=0))
    score = _score(table, predictor, values.numpy(), chosen)  # may refuse the column: before anything is written
    try:
        write_whole(destination, SUFFIXES[suffix](values.numpy(), names, chosen, spread, key))
    except OSError as error:
        raise InputError(
            f"expected an output that can be written, but {destination} cannot ({error.strerror}); choose another"
        ) from error
    said = [f"predictions for {preparation.counted(len(features), 'row')} in {shown(relpath(destination))}"]
    said += [f"left out {table.left_out_in_words}"] if table.left_out else []
    said += notes
    repeats = sum(len(cells) - len(preparation.distinct(cells)[0]) for cells in key.values())
    if predictor.key is not None and not key:
        said.append(f"there is no {quoted(predictor.key)}: the predictions stand in the order of the rows")
    if repeats:
        said.append(f"{quoted(predictor.key)} repeats in {preparation.counted(repeats, 'row')}")
    said += score
    if suffix == ".csv" and (odd := list(filter(_is_odd, names))):
        said.append(
            f"caution: {listed(odd)} among the classes is in the file as it is; a spreadsheet runs what begins with "
            "= + - @ or a tab as a formula, a terminal obeys control characters"
        )
    return said


def _is_odd(name: str) -> bool:
    return shown(name) != name or (name[:1] in ("=", "+", "-", "@") and not NUMBER(name))


def _read(path: Path, predictor: Predictor, max_bytes: float) -> Table:
    """Read a file of new rows, as the table of the training was read."""
    own = [column.name for column in predictor.columns]
    table = Table(path, "input", max_bytes, [*own, *filter(None, (predictor.target, predictor.key))])
    table.texts = [column.name for column in predictor.columns if column.kinds] + [predictor.key]
    table.labels = predictor.target if predictor.class_names else None
    table.separator, table.decimal = predictor.separator, predictor.decimal
    return readers.read_table(table)


def _score(table: Table, predictor: Predictor, values: np.ndarray, chosen: Sequence[int]) -> list[str]:
    """Return the accuracy, or in a regression the root of the mean squared error, if the rows bring their targets."""
    if predictor.target not in table.columns:
        return []
    truth, new = table.columns[predictor.target], list[str]()
    if predictor.class_names:
        names, codes = preparation.classes(truth, predictor.target)
        own = predictor.class_names  # before 0.2 a date had its midnight
        names = tuple(f"{name} 00:00:00" if f"{name} 00:00:00" in own else name for name in names)
        new, there = [name for name in names if name not in predictor.class_names], codes >= 0
        each = np.array([*names, None])[codes] == np.array(predictor.class_names, dtype=object)[chosen]
    else:
        numbers, _ = preparation.numbers(truth, predictor.target)
        each, there = (values[:, 0] - numbers) ** 2, np.isfinite(numbers) & (values.shape[1] == 1)
    if not there.any():
        return []
    mean, rows = each[there].mean(), preparation.counted(int(there.sum()), "row")
    score = f"accuracy {100 * mean:.2f} %" if predictor.class_names else f"rmse {np.sqrt(mean):.4g}"
    said = [f"{score} over {rows} with {quoted(predictor.target)}"]
    return said + [f"{listed(new)} among them is none of the classes, and counts as wrong"] * bool(new)


def _npz(
    values: np.ndarray, names: list[str], chosen: list[int], spread: np.ndarray | None, key: dict[str, np.ndarray]
) -> bytes:
    arrays = {"prediction": values}
    if names:
        arrays = {"class": np.array(names)[chosen], "probability": values, "class_names": np.array(names)}
    arrays |= {} if spread is None else {"sd": spread}
    for name, cells in key.items():
        arrays[name] = (
            np.array(["" if cell is None else str(cell) for cell in cells]) if cells.dtype == object else cells
        )
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _csv(
    values: np.ndarray, names: list[str], chosen: list[int], spread: np.ndarray | None, key: dict[str, np.ndarray]
) -> bytes:
    answers = names or (
        ["prediction"] if values.shape[1] == 1 else [f"prediction[{i}]" for i in range(values.shape[1])]
    )
    header = ["class", *(f"P({name})" for name in names)] if names else [*answers]
    if spread is not None:
        header += [f"sd({name})" for name in answers]
        values = np.concatenate([values, spread], 1)
    file = io.BytesIO()
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*key, *header])
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        columns = [*values[rows].T.astype(str)]  # as many digits as the type has
        own = [[names[index] for index in chosen[rows]]] if names else []
        writer.writerows(zip(*(cells[rows] for cells in key.values()), *own, *columns, strict=True))
    text.detach()
    return file.getvalue()


SUFFIXES = {".csv": _csv, ".npz": _npz}
