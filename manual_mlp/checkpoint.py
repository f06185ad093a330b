"""What training keeps, with torch alone: read so that nothing in a file can run code, written whole or not at all."""

import os
import pickle
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from manual_mlp.errors import InputError

KEYS = ("input_size", "output_size", "hidden", "activation", "output_activation", "bias", "dropout")


def read_checkpoint(path: str | PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint written by train.py: tensors and plain values, by `torch.load(weights_only=True)`.

    Raises InputError for a file that is missing, damaged, foreign, or holds anything that could run code.
    """
    content = read_values(path, map_location)
    values = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(values, dict) or not values.keys() >= {*KEYS} or not isinstance(content.get("state_dict"), dict):
        raise InputError(
            f"expected a checkpoint that train.py wrote, but {path} holds something else; "
            "to load parameters of other programs use net.load_state_dict"
        )
    return content


def read_values(path: str | PathLike[str], map_location: Any = "cpu") -> Any:
    """The same of any file of tensors and plain values, whoever wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load takes any bits for parameters
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise InputError(
            f"expected a checkpoint at {path}, but it can't be read ({error.strerror or error}); correct ckpt_path"
        ) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"expected a checkpoint of tensors and plain values, but {path} is none, or holds objects that could run "
            "code, none of which was run; take a checkpoint that train.py wrote"
        ) from error
    except Exception as error:  # of any kind: a reader trips over damage wherever it meets it
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"expected a whole checkpoint, but {path} is damaged ({reason}); "
            "take another, such as best.ckpt or last.ckpt"
        ) from error


def write_whole(path: str | PathLike[str], content: bytes | memoryview) -> None:
    """Write a file as a whole or not at all: beside it, flushed to the disk, and renamed.

    Raises OSError if that fails; what was there before is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)
