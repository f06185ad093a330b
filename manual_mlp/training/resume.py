"""Handle `ckpt_path=…` on the command line: the run that wrote the checkpoint goes on, as configured, in its folder.

A run folder may come from anybody, so its content is data. It may choose among the shipped groups and give plain values
to shipped keys. All else could run code or reach other files: only the command line can decide that.
"""

import logging
import re
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import yaml  # type: ignore[import-untyped]
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Sweep, ValueType
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manual_mlp.errors import InputError
from manual_mlp.training.commands import command, override
from manual_mlp.training.config import keys_of, shipped

log = logging.getLogger(__name__)

MOST = 1 << 13  # letters in a folder's overrides: Hydra's parser takes seconds for more
WORD = re.compile(r"[\w+-]+")  # no path, no address, no interpolation
PLACE = re.compile(r"(path|dir|folder|filename|uri|input|output|offline)$")  # keys of paths


@dataclass(frozen=True)
class Word:
    """An override from a run folder. plain: a folder may decide it."""

    text: str
    key: str
    plain: bool


def with_its_own_overrides(arguments: list[str]) -> list[str]:
    """Add what the run of `ckpt_path` was started with to the arguments of a command line, which win.

    A run keeps its overrides in `.hydra/overrides.yaml`. To train on, its folder becomes the output folder, too; a
    checkpoint alone in another folder brings nothing. task=test takes what decides the data, task=predict nothing.
    Returns the flags, then the overrides. Raises InputError if the folder holds what only the user may decide.
    """
    parser = get_args_parser()
    parser.error = _wrong_flags  # type: ignore[method-assign] # argparse prints its usage and leaves the program
    args = parser.parse_intermixed_args(arguments)
    set_ones = {name: value for name, value in vars(args).items() if name != "overrides" and value not in (None, False)}
    flags = [_flag(name, value) for name, value in set_ones.items()]
    try:
        given = {word.key_or_group: word for word in _parser().parse_overrides(args.overrides)}
    except OverrideParseException:  # Hydra will say so
        return [*flags, *args.overrides]
    return [*flags, *_from_its_folder(args, flags, given), *args.overrides]


def read_overrides(text: str) -> list[Word]:
    """Return the overrides that the text of an overrides.yaml lists. Raises InputError if it is anything else."""
    try:
        if len(text) > MOST:
            raise ValueError(f"they have more than {MOST} letters")
        words = yaml.load(text, yaml.BaseLoader)  # makes lists and texts, and nothing else
        if not isinstance(words, list) or not all(isinstance(word, str) and "\0" not in word for word in words):
            raise ValueError("they are no list of texts")
        parsed = [(word, _parser().parse_override(word)) for word in words]
    except Exception as error:  # any exception: a reader fails on damage wherever it meets it
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"expected the overrides of a run, as Hydra writes them, but: {reason}; "
            "delete .hydra/overrides.yaml, and give what the run was started with beside ckpt_path"
        ) from error
    return [Word(word, override.key_or_group, _is_plain(override)) for word, override in parsed]


def _flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag}={value}"


def _wrong_flags(message: str) -> NoReturn:
    raise InputError(f"expected Hydra's flags and overrides of the form key=value, but: {message}; see --hydra-help")


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _from_its_folder(args: Namespace, flags: list[str], given: dict[str, Override]) -> list[str]:
    """Return what the folder of ckpt_path adds to the overrides that are given."""
    path, task = _value(given, "ckpt_path"), _value(given, "task") or "train"
    if path is None or task not in ("train", "test") or args.help or args.hydra_help or args.shell_completion:
        return []
    if args.experimental_rerun is not None:
        raise InputError(
            "expected --experimental-rerun without ckpt_path, because Hydra then ignores all overrides; leave out one"
        )
    folder = Path(path).parent
    try:
        kept = _kept(folder)
    except InputError:
        if task == "train":
            raise
        kept = None  # a test needs the data alone: without the right ones it will be refused
    if kept is None:
        return []
    own = [word for word in kept if word.key not in {*given, "task", "ckpt_path"} and not _is_replaced(word, given)]
    if task == "test":
        own = [word for word in own if word.plain or _decides_data(word)]
    refused = [word.text for word in own if not word.plain]
    more = _other_flags(folder, args) if task == "train" or refused else []
    if refused or any(flag.startswith("--config-name") for flag in more):
        raise InputError(
            f"expected the folder of {path} to choose shipped groups and plain values, but it asks for "
            f"{', '.join([*more, *refused])}; only you can decide that. To go on with it, if you trust it:\n"
            + command(*flags, *more, *(word.text for word in own), *args.overrides)
        )
    words = [word.text for word in own]
    if args.multirun:
        return words
    words += [] if "hydra.mode" in given else ["hydra.mode=RUN"]  # from a sweep that a preset began, this run alone
    if task == "test" or "hydra.run.dir" in given:
        return words
    link = next((file for file in [*folder.iterdir(), *(folder / ".hydra").iterdir()] if file.is_symlink()), None)
    if link:
        raise InputError(
            f"expected a run folder of files alone, but {link} leads elsewhere, and would be written to; "
            "put the file itself there, or choose another folder with hydra.run.dir=…"
        )
    return [*words, override("hydra.run.dir", folder)]


def _value(given: dict[str, Override], key: str) -> str | None:
    """Return the text of one override, with those interpolations resolved that need no configuration."""
    value = given[key].value() if key in given else None
    if isinstance(value, Sweep):
        raise InputError(
            f"expected one {key} beside ckpt_path, because each run has a configuration of its own, "
            f"but got {given[key].input_line}; start a command for each"
        )
    try:
        resolved = OmegaConf.create({key: value})[key]
    except OmegaConfBaseException as error:
        raise InputError(f"expected {key} to be a text, but got {value!r}; write it out") from error
    return None if resolved is None else str(resolved)


def _kept(folder: Path) -> list[Word] | None:
    """Return the overrides that the run of a folder was started with; None if it has not kept them."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        if not path.is_file():
            return None
        with path.open(encoding="utf-8") as file:
            return read_overrides(file.read(MOST + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected the overrides of a run, but {path} can't be read: {error}; mend it") from error
    except InputError as error:
        raise InputError(f"{error} ({path})") from error


def _other_flags(folder: Path, args: Namespace) -> list[str]:
    """Return the flags that gave the run other configurations than the shipped ones, without those given now."""
    path, found = folder / ".hydra" / "hydra.yaml", {}
    try:
        hydra = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)["hydra"]
        found["config_name"] = hydra["job"]["config_name"]
        for source in hydra["runtime"]["config_sources"]:
            if source["provider"] == "command-line":
                found["config_dir"] = source["path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError):
        log.info("No flags are known of the run in %s.", folder, exc_info=True)
    kept = {name: value for name, value in found.items() if isinstance(value, str) and value != "config"}
    return [_flag(name, value) for name, value in kept.items() if getattr(args, name) is None]


def _is_plain(word: Override) -> bool:
    """Return True if a folder may decide it: a shipped choice of a group, or numbers and words for a shipped key."""
    if word.type != OverrideType.CHANGE or word.package is not None or word.value_type != ValueType.ELEMENT:
        return False
    key, value = word.key_or_group, word.value()
    groups, keys = shipped()
    if key in groups:
        return value is None or value in groups[key]
    if key not in keys or PLACE.search(key):
        return False
    if keys[key]:
        return value is None
    if key.endswith("native") and value not in (False, "auto"):  # true asks for a build that auto would not
        return False
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, int | float) or _is_word(item) for item in items)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and WORD.fullmatch(value) is not None


def _decides_data(word: Word) -> bool:
    return re.match(r"(data|experiment|seed)\b", word.key) is not None


def _is_replaced(word: Word, given: dict[str, Override]) -> bool:
    """Return True for a value of a choice that the command line replaces by another one without such a key."""
    group = word.key.partition(".")[0]
    groups, _ = shipped()
    if group not in given or group == word.key or group not in groups:
        return False
    choice = given[group].value()
    if choice is not None and choice not in groups[group]:  # not shipped: Hydra will look
        return False
    return word.key not in keys_of("config") | (keys_of(f"{group}/{choice}") if choice else {})
