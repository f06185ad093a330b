"""The command line of a training: compose the configuration, run the task. `train.py --help` explains itself.

With `ckpt_path=…` the run that wrote the checkpoint goes on, as configured, in its folder. A run folder may come from
anybody, so its content is data. It may choose among the shipped groups and give plain values to shipped keys. All else
could run code or reach other files: only the command line can decide that.
"""

import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NoReturn

import hydra
import yaml  # type: ignore[import-untyped]
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Sweep, ValueType
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manual_mlp.errors import InputError, first_line
from manual_mlp.shell import command, is_watched, override, while_read
from manual_mlp.training.config import CONF, check, given_to_predict, in_sweep, keys_of, one_sentence, shipped
from manual_mlp.training.folder import check_places, disk_in_words, nothing_but_results

log = logging.getLogger(__name__)

MOST = 1 << 13  # letters in a folder's overrides: Hydra's parser takes seconds for more
WORD = re.compile(r"[\w+-]+")  # no path, no address, no interpolation
PLACE = re.compile(r"(path|dir|folder|filename|uri|input|output|offline)$")  # keys of paths
TO_PREDICT = ["task", "ckpt_path", "input", "output", "run_dir", "seed", "report", "optimized_metric"]

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us, instead of Hydra printing its own excerpt
OmegaConf.register_new_resolver("program", command, replace=True)  # for --help


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> float | None:
    # a sweep goes on; Comparison prints the sentence
    with while_read(), nullcontext() if in_sweep() else one_sentence():
        if cfg.task == "predict":
            from manual_mlp.training.predict import predict_file  # brings torch, but neither Lightning nor scikit-learn

            check(OmegaConf.masked_copy(cfg, TO_PREDICT))
            check_places(cfg)
            with disk_in_words(cfg):
                print(*predict_file(**given_to_predict(cfg)), sep="\n")
            return None
        if not is_watched():
            os.environ.setdefault("TQDM_DISABLE", "1")  # Lightning's search for a step draws a bar of its own
        from manual_mlp.training.run import run  # Lightning takes seconds to import; --help need not wait for it

        return run(cfg)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the task of a command line, that of this process by default; leave the program if it is refused."""
    with while_read(), nothing_but_results(), one_sentence():
        sys.argv[1:] = with_its_own_overrides([*(sys.argv[1:] if arguments is None else arguments)])
        job()


def with_its_own_overrides(arguments: list[str]) -> list[str]:
    """Add what the run of `ckpt_path` was started with to the arguments of a command line, which win.

    A run keeps its overrides in `.hydra/overrides.yaml`. To train on, its folder becomes the output folder, too; a
    checkpoint alone in another folder brings nothing. task=test takes plain values and what decides the data,
    task=predict nothing.
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


def read_overrides(text: str) -> list[Override]:
    """Return the overrides that the text of an overrides.yaml lists. Raises InputError if it is anything else."""
    try:
        if len(text) > MOST:
            raise ValueError(f"they have more than {MOST} letters")
        words = yaml.load(text, yaml.BaseLoader)  # makes lists and texts, and nothing else
        if not isinstance(words, list) or not all(isinstance(word, str) and "\0" not in word for word in words):
            raise ValueError("they are no list of texts")
        return [_parser().parse_override(word) for word in words]
    except Exception as error:  # any exception: a reader fails on damage wherever it meets it
        raise InputError(
            f"expected the overrides of a run, as Hydra writes them, but: {first_line(error):.100}; "
            "delete .hydra/overrides.yaml, and give what the run was started with beside ckpt_path"
        ) from error


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
    taken = {*given, "task", "ckpt_path"}
    own = [word for word in kept if word.key_or_group not in taken and not _is_replaced(word, given)]
    if task == "test":  # which takes what decides the data
        own = [word for word in own if is_plain(word) or re.match(r"(data|experiment|seed)\b", word.key_or_group)]
    words = [str(word.input_line) for word in own]
    refused = [str(word.input_line) for word in own if not is_plain(word)]
    more = _other_flags(folder, args) if task == "train" or refused else []
    if refused or any(flag.startswith("--config-name") for flag in more):
        raise InputError(
            f"expected the folder of {path} to choose shipped groups and plain values, but it asks for "
            f"{', '.join([*more, *refused])}; only you can decide that. To go on with it, if you trust it:\n"
            + command(*flags, *more, *words, *args.overrides)
        )
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


def _kept(folder: Path) -> list[Override] | None:
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


def is_plain(word: Override) -> bool:
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
    texts = [item for item in items if not isinstance(item, int | float | None)]
    return all(isinstance(text, str) and WORD.fullmatch(text) for text in texts)


def _is_replaced(word: Override, given: dict[str, Override]) -> bool:
    """Return True for a value of a choice that the command line replaces by another one without such a key."""
    key, groups = word.key_or_group, shipped()[0]
    group = key.partition(".")[0]
    if group not in given or group == key or group not in groups:
        return False
    choice = given[group].value()
    if choice is not None and choice not in groups[group]:  # not shipped: Hydra will look
        return False
    return key not in keys_of("config") | (keys_of(f"{group}/{choice}") if choice else {})
