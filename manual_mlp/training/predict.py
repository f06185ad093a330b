"""Predict new rows. `Predictor` is plain torch; neither Lightning nor Hydra is imported here."""

import csv
import io
from os import PathLike
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manual_mlp.checkpoint import read_checkpoint, write_whole
from manual_mlp.errors import InputError, shown
from manual_mlp.formulas import probability
from manual_mlp.modules import MLP
from manual_mlp.training.members import Members
from manual_mlp.training.readers import MAX_BYTES, NUMBER, listed, read_features

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

    def __init__(self, net: MLP | Members, content: dict[str, Any]) -> None:
        super().__init__()
        values, data = content["hyper_parameters"], content["DataModule"]
        self.net, self.loss = net, values["loss"]
        self.class_names: list[str] = list(values["class_names"])
        self.feature_names: list[str] = list(data["feature_names"])
        numbers = {
            "mean": data["feature_mean"] or [0.0],
            "scale": data["feature_scale"] or [1.0],
            "target_mean": values["target_mean"],
            "target_scale": values["target_scale"],
        }
        for name, value in numbers.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

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
        if (members := values.get("members", 1)) == 1:
            return cls(MLP.from_checkpoint(path), content).eval()
        nets = [MLP.from_checkpoint(path, member=k) for k in range(members)]
        return cls(Members(nets, values["loss"], bool(values["class_names"])), content).eval()

    @property
    def _first(self) -> Any:
        """Return the net, of several the first."""
        return self.net[0] if isinstance(self.net, Members) else self.net

    def forward(self, features: Tensor) -> Tensor:
        return self.interpreted(self.prediction(features))

    def prediction(self, features: Tensor) -> Tensor:
        """Return a^L (N, n_L) for features (N, n_1); the largest in a row is the class that accuracy counts.

        >>> import torch, manual_mlp as mm
        >>> predictor = mm.Predictor.from_checkpoint("best.ckpt")  # of a run with data=iris
        >>> predictor.prediction(torch.tensor([[5.1, 3.5, 1.4, 0.2]], dtype=torch.float64)).argmax().item()
        0
        """
        return self.net(self.standardised(features))

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
        weight: Any = self._first[0].weight
        return ((features - self.mean) / self.scale).to(weight.dtype)

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
    features, left_out = read_features(Path(source), predictor.feature_names, max_bytes)
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
        rows = listed((~finite).nonzero()[:, 0].tolist()).replace("'", "")
        raise InputError(
            f"expected a finite prediction for each row, but in {Path(source).name} numbers far from the training's "
            f"lead to NaN or infinity in the rows {rows} (counted from 0); correct or remove them"
        )
    chosen = prediction.argmax(1).tolist() if names else []
    try:
        write_whole(destination, SUFFIXES[suffix](values.numpy(), names, chosen, spread))
    except OSError as error:
        raise InputError(
            f"expected an output that can be written, but {destination} cannot ({error.strerror}); choose another"
        ) from error
    said = [f"predictions for {len(features)} rows in {shown(relpath(destination))}"]
    said += [f"left out {listed(left_out)}: an index, or without a name"] if left_out else []
    odd = [name for name in names if _is_odd(name) and suffix == ".csv"]
    if odd:
        said.append(
            f"caution: {listed(odd)} among the classes is in the file as it is; a spreadsheet runs what begins with "
            "= + - @ or a tab as a formula, a terminal obeys control characters"
        )
    return said


def _is_odd(name: str) -> bool:
    return shown(name) != name or (name[:1] in ("=", "+", "-", "@") and not NUMBER(name))


def _npz(values: np.ndarray, names: list[str], chosen: list[int], spread: np.ndarray | None) -> memoryview:
    arrays = {"prediction": values}
    if names:
        arrays = {"class": np.array(names)[chosen], "probability": values, "class_names": np.array(names)}
    arrays |= {} if spread is None else {"sd": spread}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getbuffer()


def _csv(values: np.ndarray, names: list[str], chosen: list[int], spread: np.ndarray | None) -> memoryview:
    header = ["class", *(f"P({name})" for name in names)]
    if not names:
        header = ["prediction"] if values.shape[1] == 1 else [f"prediction[{i}]" for i in range(values.shape[1])]
    if spread is not None:
        header += [f"sd({name.removeprefix('P(').removesuffix(')')})" for name in header[bool(names) :]]
        values = np.concatenate([values, spread], 1)
    file = io.BytesIO()
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        columns = [*values[rows].T.astype(str)]  # as many digits as the type has
        labels = [[names[index] for index in chosen[rows]]] if names else []
        writer.writerows(zip(*labels, *columns, strict=True))
    text.detach()
    return file.getbuffer()


SUFFIXES = {".csv": _csv, ".npz": _npz}
