"""Checkpoints, with torch alone: written whole or not at all, and read as data, whoever wrote them.

`schema.SCHEMA` declares what a checkpoint may hold. It is checked as the file is read: before a net is built, before
anything that the file names is looked for.
"""

import os
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from manual_mlp.errors import InputError, first_line
from manual_mlp.schema import COUNT, described, misfits

FORMAT = 2  # of what is written; 1, which names no format, is that of version 0.1
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
GLOBALS = {  # all that a checkpoint may name: tensors and the containers of plain values
    "collections OrderedDict",
    "collections Counter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in STORAGES),
}
DEEPEST = 30  # containers in containers; Lightning's own nest to 10
MOST_TIMES = 4  # as much memory as the file has bytes: some tensors stand in it once and are named several times


def read_checkpoint(path: str | PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint written by train.py: tensors and plain values that fit `schema.SCHEMA`.

    Raises InputError for a file that is missing, damaged, foreign or of a newer format, that holds anything that could
    run code, or in which anything is not what it should be.
    """
    content = read_values(path, map_location)
    if not isinstance(content, dict) or not content.keys() >= {"hyper_parameters", "state_dict"}:
        raise InputError(
            f"expected a checkpoint that train.py wrote, but {path} holds something else; "
            "to load parameters of other programs use net.load_state_dict"
        )
    if COUNT.fits(content.get("format")) and content["format"] > FORMAT:
        raise InputError(
            f"expected a checkpoint of format {FORMAT} at most, but {path} is of format {content['format']}; it comes "
            "from a newer manual_mlp: update this one"
        )
    for where, words, value in islice(misfits(content), 1):
        raise InputError(
            f"expected {where} in the checkpoint {path} to be {words}, but got {described(value)}; "
            "take a checkpoint as train.py wrote it"
        )
    return content


def read_values(path: str | PathLike[str], map_location: Any = "cpu") -> Any:
    """Return the content of any file of ordinary tensors and plain values, whoever wrote it.

    It takes no more memory than some times the size of the file. Raises InputError as `read_checkpoint`.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(
            path
        ):  # reading a pipe or a device may never begin, or never end
            raise OSError(None, "it is not a file")
        with open(path, "rb") as file:
            _check_archive(file)
            content = torch.load(file, map_location=map_location, weights_only=True)
            return _Plain(os.fstat(file.fileno()).st_size).copy(content)
    except OSError as error:
        raise InputError(
            f"expected a checkpoint at {path}, but it can't be read ({error.strerror or error}); correct the path"
        ) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"expected a checkpoint of tensors and plain values, but {path} is none, or holds objects that could run "
            "code, none of which was run; take a checkpoint that train.py wrote"
        ) from error
    except Exception as error:  # of any kind: a reader trips over damage wherever it meets it
        raise InputError(
            f"expected a whole checkpoint, but {path} is damaged ({first_line(error):.100}); "
            "take another, such as best.ckpt or last.ckpt"
        ) from error


def _check_archive(file: IO[bytes]) -> None:
    """Raise if an archive is not as torch.save writes it: each record once, not compressed, its checksum right.

    Its pickle may name nothing but tensors and containers; nothing that it names has been looked for yet.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = {record.filename.lower() for record in records}
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if packed or len(names) < len(records) or len({name.partition("/")[0] for name in names}) != 1:
            raise zipfile.BadZipFile("torch.save writes records uncompressed, and each once")
        if sum(record.file_size for record in records) > size:
            raise zipfile.BadZipFile("its records are larger than the file")
        if len(pickles) != 1:
            raise zipfile.BadZipFile("it has no data.pkl, or several")
        damaged = archive.testzip()  # torch.load takes any bits for parameters
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if "GLOBAL" in operation.name and argument not in GLOBALS:
                raise pickle.UnpicklingError(argument)
    file.seek(0)
    if file.read(4) != b"PK\3\4":  # torch.load would read what stands before the archive
        raise zipfile.BadZipFile("something stands before its first record")
    file.seek(0)


class _Plain:
    """Copies what torch.load returned: plain containers, tensors that share no memory and carry nothing."""

    def __init__(self, size: int) -> None:
        self.values, self.bytes = size, MOST_TIMES * size

    def copy(self, value: Any, depth: int = 0) -> Any:
        self.values -= 1  # each stands in the file; one that is named again and again would be copied as often
        if depth > DEEPEST or self.values < 0:
            raise ValueError("its values contain each other")
        if isinstance(value, dict):
            items = {self._key(key): self.copy(item, depth + 1) for key, item in dict.items(value)}
            return Counter(items) if type(value) is Counter and all(map(COUNT.fits, items.values())) else items
        if type(value) in (list, tuple):
            return type(value)([self.copy(item, depth + 1) for item in value])
        if type(value) is Tensor:
            self.bytes -= value.numel() * value.element_size()
            if self.bytes < 0:
                raise ValueError("its tensors claim more than it holds")
            return value.detach().clone(memory_format=torch.contiguous_format)  # as a new net has its own
        if value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < 2**64):
            return value
        raise ValueError(f"it holds an unusual {type(value).__name__}")

    def _key(self, key: Any) -> Any:
        if type(key) not in (str, int):
            raise ValueError("a key is neither a text nor a whole number")
        return self.copy(key)


def write_whole(path: str | PathLike[str], content: bytes) -> None:
    """Write a file as a whole or not at all: beside it, flushed to the disk, and renamed.

    Raises OSError if that fails; what was there before is then still there. What a killed process left is removed.
    """
    path = Path(path)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("xb") as file:
        try:
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


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that have ended began to write beside a path: this file, or any checkpoint."""
    pattern = re.compile(rf"\.(?:{re.escape(path.name)}|.+\.ckpt)\.(\d+)\.part")
    for name in os.listdir(path.parent):
        match, left = pattern.fullmatch(name), path.with_name(name)
        if match and left.is_file() and not left.is_symlink() and not _lives(int(match[1])):
            left.unlink()


def _lives(process: int) -> bool:
    if os.name != "posix":  # os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return process != os.getpid()  # an ended process had the same number
