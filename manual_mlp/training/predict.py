"""Predictions for new rows. `Predictor` is plain torch; neither Lightning nor Hydra is imported here."""

import csv
import io
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manual_mlp.checkpoint import read_checkpoint, write_whole
from manual_mlp.errors import InputError
from manual_mlp.formulas import probability
from manual_mlp.modules import MLP
from manual_mlp.training.readers import read_features

SUFFIXES = (".csv", ".npz")
ROWS = 10_000  # at a time


class Predictor(nn.Module):
    """Features as they stand in the data → P(class | x) of each class, or in a regression the target in its units.

    features (N, n_1) → (N, n_L). Standardises as training did, so it can be exported as one whole, to ONNX or by
    torch.export. What P is under each cost says `formulas.probability`.
    class_names: of the columns of P, empty in a regression. feature_names: of the n_1 columns, where they had any.
    """

    mean: Tensor
    scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, net: MLP, content: dict[str, Any]) -> None:
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
        """Raises InputError for a file that is no whole checkpoint of train.py, and for a perceptron's."""
        content = read_checkpoint(path)
        if "DataModule" not in content:
            raise InputError(f"expected a checkpoint that tells how to prepare rows, but {path} does not; train anew")
        if content["hyper_parameters"]["output_activation"] == "threshold":
            raise InputError(
                f"expected a net whose answers are probabilities or numbers, but {path} holds a perceptron, which says "
                "0 or 1; take a run of model=mlp"
            )
        return cls(MLP.from_checkpoint(path), content).eval()

    def forward(self, features: Tensor) -> Tensor:
        return self.interpreted(self.prediction(features))

    def prediction(self, features: Tensor) -> Tensor:
        """a^L (N, n_L) for features (N, n_1); the largest of a row is the class that accuracy counts."""
        weight: Any = self.net[0].weight
        return self.net(((features - self.mean) / self.scale).to(weight.dtype))

    def interpreted(self, prediction: Tensor) -> Tensor:
        """P of each class, or the target in its units, of a^L (N, n_L)."""
        if self.class_names:
            return probability(prediction, self.loss)
        return prediction * self.target_scale + self.target_mean


def predict_file(checkpoint: str, source: str, destination: str) -> int:
    """Write the predictions of a checkpoint for the rows of `source` (CSV, NPZ, Parquet) to `destination` (CSV, NPZ).

    CSV: a column `class` and one P(…) for each class; in a regression `prediction`. NPZ: arrays `class`,
    `probability` (N, classes) and `class_names`; in a regression `prediction` (N, m).
    Returns the number of rows. Raises InputError for files that can't be read or written, and columns that don't fit.
    """
    if Path(destination).suffix.lower() not in SUFFIXES:
        raise InputError(f"expected output to end in {' or '.join(SUFFIXES)}, but got {destination}; rename it")
    predictor = Predictor.from_checkpoint(checkpoint)
    features = read_features(Path(source), predictor.feature_names, "input")
    if features.shape[1] != predictor.net.sizes[0]:
        raise InputError(
            f"expected {predictor.net.sizes[0]} numbers in each row, as the net was trained on, but {source} has "
            f"{features.shape[1]}; check that it is the right file"
        )
    with torch.inference_mode():
        parts = [predictor.prediction(rows) for rows in torch.from_numpy(features).split(ROWS)]
        prediction = torch.cat(parts)
        values = predictor.interpreted(prediction).numpy()
    arrays = {"prediction": values}
    if predictor.class_names:
        names = np.array(predictor.class_names, dtype=object if destination.lower().endswith(".csv") else None)
        arrays = {"class": names[prediction.argmax(1).numpy()], "probability": values, "class_names": names}
    content = _npz(arrays) if destination.lower().endswith(".npz") else _csv(arrays)
    try:
        write_whole(destination, content)
    except OSError as error:
        raise InputError(
            f"expected an output that can be written, but {destination} cannot ({error.strerror}); choose another"
        ) from error
    return len(features)


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _csv(arrays: dict[str, np.ndarray]) -> bytes:
    if "class" in arrays:
        header = ["class", *(f"P({name})" for name in arrays["class_names"])]
        columns = [arrays["class"], *arrays["probability"].T.astype(str)]  # as many digits as the type tells apart
    else:
        columns = [*arrays["prediction"].T.astype(str)]
        header = ["prediction"] if len(columns) == 1 else [f"prediction[{i}]" for i in range(len(columns))]
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(zip(*columns, strict=True))
    return file.getvalue().encode()
