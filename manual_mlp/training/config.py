"""The configuration: what is shipped, and each mistake in a sentence: what was expected, what came, the likely fix."""

import inspect
import signal
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from pydoc import locate
from traceback import walk_tb
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from manual_mlp.errors import InputError, first_line, shown
from manual_mlp.shell import for_the_shell, install, override

PACKAGE = Path(__file__).parents[1]
# A wheel carries it in the package. In a clone, and installed from one as editable, it lies beside the package.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
WORDS[type(None)] = "null"
PLURALS: dict[Any, str] = {int: " of whole numbers", float: " of numbers", str: " of texts"}
SCHEDULE = ("interval", "monitor")  # Lightning's part of `scheduler`; the rest belongs to its class
# Values of the first level: no `_target_` declares them.
ROOT: dict[str, Any] = {"seed": int, "report": bool, "optimized_metric": str, "closing": str | None, "layers": int}
# model.hidden=${repeat:30,8} is [30, 30, 30, 30, 30, 30, 30, 30]
OmegaConf.register_new_resolver("repeat", lambda value, times: [value] * times, replace=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the program with one sentence and exit code 1 if the mistake is the user's; bugs keep their traceback."""
    try:
        yield
    except BrokenPipeError:  # `while_read` ends the program
        raise
    except (
        HydraException, OmegaConfBaseException, OSError, ValueError, TypeError, RuntimeError, MemoryError
    ) as error:  # fmt: skip
        sentence = explain(error)
        if sentence is None:
            raise
        sys.exit("Error: " + shown(sentence, keep="\n"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def in_sweep() -> bool:
    """Return True if this run is one of several that Hydra starts (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def explain(error: Exception) -> str | None:
    """Return one sentence about a mistake of the user, None for any other error."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        quoted = f", for Hydra and the shell: {for_the_shell(override(key, value))}" if key and equals else ""
        return f"expected an override of the form key=value, but got {error.override!r}; mend it or quote it{quoted}"
    if isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, OmegaConfBaseException):
        return _unknown_key(error.__cause__)
    if isinstance(error, MissingMandatoryValue):
        return f"expected a value for {error.full_key}, but got none; add {error.full_key}=… to the command"
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return (
            f"expected a net and data that fit into memory, but: {first_line(error)}; make them or the batches smaller"
        )
    if isinstance(error, OmegaConfBaseException):
        return f"expected a configuration that can be resolved, but {first_line(error)}; correct it"
    return _before_the_job(error)


def check(cfg: DictConfig) -> None:
    """Raise InputError if a value is missing, unknown to its `_target_`, or not of the type this declares."""
    node = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(node, dict)
    for key in ROOT.keys() & node.keys():
        check_value(node[key], ROOT[key], key)
    if "optimizer" in node:
        node["optimizer"] = optimizer_options(node["optimizer"])
    if node.get("scheduler"):
        node["scheduler"] = {key: value for key, value in node["scheduler"].items() if key not in SCHEDULE}
    for group in ("callbacks", "logger", "metrics"):
        nodes = node.get(group) or {}
        for name, value in nodes.items() if isinstance(nodes, dict) else [("NAME", nodes)]:
            if value is not None and not (isinstance(value, dict) and "_target_" in value):
                raise InputError(
                    f"expected {group}.{name} to have a _target_, or to be null, but got {value!r}; "
                    f"name a class in {group}.{name}._target_"
                )
    _check_node(node, path="")


def optimizer_options(node: dict) -> dict:
    """Return `optimizer` without lr=auto, which the run resolves, and without zeros that its class does not know.

    So a class that is set by `optimizer._target_` alone does not fail on sgd.yaml's momentum=0.
    """
    known = inspect.signature(_locate(node.get("_target_"), "optimizer")).parameters
    return {
        key: value
        for key, value in node.items()
        if (key, value) != ("lr", "auto") and (key in known or key.startswith("_") or value != 0)
    }


def file_of(cfg: DictConfig, key: str) -> str:
    """Return the file that a task needs."""
    if cfg[key] is None:
        raise InputError(f"expected {key}=… for task={cfg.task}, but got none; name the file")
    return str(cfg[key])


def given_to_predict(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of predict.predict_file."""
    most = OmegaConf.select(cfg, "data.source.max_bytes")
    check_value(most, float | None, "data.source.max_bytes")
    files = {"checkpoint": file_of(cfg, "ckpt_path"), "source": file_of(cfg, "input"), "destination": cfg.output}
    return files if most is None else {**files, "max_bytes": most}


def build(node: DictConfig, **arguments: object) -> Any:
    """Instantiate a config node, with plain lists and dicts. Raises what the constructor raised."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, ModuleNotFoundError):
            extra = next((name for name in ("wandb", "mlflow") if name in node["_target_"].lower()), "tensorboard")
            raise InputError(
                f"expected the package that {node['_target_']} needs, but it is not installed ({error.__cause__}); "
                f"install it, for a logger with: {install(extra)}"
            ) from error
        raise


def likely(name: str, known: Iterable[object]) -> str:
    """Return the likely fix for a mistyped name: the closest known one, else all of them."""
    names = [str(other) for other in known]
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}" if names else "leave it out"


def _check_node(node: object, path: str) -> None:
    if isinstance(node, list):
        for index, value in enumerate(node):
            _check_node(value, f"{path}[{index}]")
    elif isinstance(node, dict):
        if "_target_" in node:
            _check_arguments(node, path)
        for key, value in node.items():
            _check_node(value, f"{path}.{key}" if path else str(key))


def _check_arguments(node: dict, path: str) -> None:
    target = _locate(node["_target_"], path)
    parameters = inspect.signature(target).parameters
    hints = _hints(target)
    for key in ("_partial_", "_recursive_"):
        check_value(node.get(key, False), bool, f"{path}.{key}")
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in node.keys() - {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}:
        if key not in parameters:
            if open_ended:
                continue
            raise InputError(
                f"expected an argument of {node['_target_']}, but got {path}.{key}; {likely(key, parameters)}"
            )
        default = parameters[key].default
        if node[key] != default or isinstance(node[key], bool) != isinstance(default, bool):  # False == 0
            check_value(node[key], hints.get(key, Any), f"{path}.{key}")


def check_value(value: object, hint: Any, path: str) -> None:
    if not fits(value, hint):
        raise InputError(f"expected {path} to be {_in_words(hint)}, but got {value!r}; correct its value")


def _hints(target: Any) -> dict[str, Any]:
    """Return the declared types; none if a library imports their names for type checkers alone, as WandbLogger does."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:
        return {}


def _locate(target: object, path: str) -> Any:
    if not isinstance(target, str) or not target:
        raise InputError(
            f"expected {path}._target_ to name a class or function, but got {target!r}; write it as in torch.optim.Adam"
        )
    found = locate(target)
    if not callable(found):
        module, _, name = target.rpartition(".")
        close = get_close_matches(name, dir(locate(module)), n=1) if module else []
        hint = f"did you mean {module}.{close[0]}?" if close else "check its spelling, and that it is installed"
        raise InputError(f"expected {path}._target_ to name a class or function, but there is no {target}; {hint}")
    return found


def fits(value: object, hint: Any) -> bool:
    """Return True if a plain value from a config may be passed for a declared `hint`. A dict may become any object."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(value, dict):
        return hint not in WORDS or "_target_" in value
    if hint is Any:
        return True
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    if isinstance(value, int) and abs(value) >= 2**63:  # too large for any tensor
        return False
    if hint is float:
        return isinstance(value, int | float)
    if origin in (list, tuple, Sequence, Iterable):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    return isinstance(value, hint) if inspect.isclass(hint) else origin is None


def _in_words(hint: Any) -> str:
    """Return what may be written in a config for `hint`, without the classes that only code can make."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            words += [str(choice) for choice in get_args(option)]
        elif get_origin(option) in (list, tuple, Sequence, Iterable):
            words.append("a list" + PLURALS.get(get_args(option)[0], ""))
        elif option in WORDS:
            words.append(WORDS[option])
    return " or ".join(dict.fromkeys(words)) or str(hint)


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:  # not from an override
        return "expected --config-name and --config-path to lead to a configuration, but there is none; leave them out"
    needs_extra = group.startswith("hydra/") and name in ("joblib", "optuna")
    hint = f"install it with: {install('sweep')}" if needs_extra else likely(name, error.options or ())
    return f"expected a known choice for {group}, but got {group}={name}; {hint}"


def _unknown_key(error: OmegaConfBaseException) -> str:
    key = str(error.full_key)
    parent = key.rpartition(".")[0]
    names = [name for name in error.parent_node or () if name != "hydra" and not str(name).startswith("_")]
    where = f"a key of {parent}" if parent else "a group or a key"
    hint = _elsewhere(key) or likely(key, [f"{parent}.{name}" if parent else name for name in names])
    return f"expected {where}, but got {key}; {hint}"


def _elsewhere(mistyped: str) -> str:
    """Return a hint at the keys that end as a mistyped one of the first level does; nothing if there are none."""
    keys = [key for key, has_own in shipped()[1].items() if not has_own and "." in key]
    ends = {key.rpartition(".")[2] for key in keys}
    first = {key.partition(".")[0] for key in shipped()[1]}
    close = get_close_matches(mistyped, ends, n=1, cutoff=0.7) if "." not in mistyped else []
    if not close or (close[0] != mistyped and get_close_matches(mistyped, first)):
        return ""
    found = [key for key in keys if key.rpartition(".")[2] == close[0]]
    return f"did you mean {' or '.join(found)}?"


def _before_the_job(error: Exception) -> str | None:
    """Return a sentence for an error of Hydra's own code, which reads the command line and makes the output folder."""
    modules = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
    if modules & {"manual_mlp.training.run", "manual_mlp.training.predict"}:
        return None
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError):
        return (
            f"expected an output folder that can be written, but {cause.filename} cannot ({cause.strerror}); "
            "choose another with hydra.run.dir=… (hydra.sweep.dir=… in a sweep)"
        )
    if "Got NoneType" in str(error):  # Hydra does not say which group
        return "expected the name of a choice for each group, but got null; leave a group out with ~, as in ~logger"
    if "Ambiguous value" in str(error):  # a list without brackets, or a sweep without -m
        several = first_line(error).split("'")[1]
        return f"expected one value, but got several in {several}; write [1,2] for a list, or add -m for a sweep"
    if isinstance(error, HydraException):  # whose further lines name the fix
        lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
        return f"expected flags and overrides that fit the configuration, but: {'; '.join(lines)}"
    if isinstance(error, ValueError | TypeError) and "hydra._internal.defaults_list" in modules:
        return (
            f"expected the name of a choice for each group, but: {first_line(error)}; write it as in data=iris, or "
            "leave the group out as in ~logger"
        )
    if type(error) is ValueError:
        return f"expected flags and overrides that fit the configuration, but: {first_line(error)}"
    return None


@cache
def shipped() -> tuple[dict[str, list[str]], dict[str, bool]]:
    """Return {group: its choices}, and {key: True if it has keys of its own} over all files of conf/."""
    groups: dict[str, list[str]] = {}
    keys: dict[str, bool] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        name = path.relative_to(CONF).with_suffix("").as_posix()
        group, _, choice = name.rpartition("/")
        if group:
            groups.setdefault(group, []).append(choice)
        keys |= keys_of(name)
    return groups, keys


def keys_of(name: str) -> dict[str, bool]:
    """Return {key: True if it has keys of its own} for a file of conf/ and those of its group that it includes."""
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    group = name.rpartition("/")[0]
    package = "" if "@package _global_" in text else group
    keys = dict(_flat(tree, package and f"{package}."))
    for default in tree.get("defaults", ()):
        if group and isinstance(default, str):
            keys |= keys_of(f"{group}/{default}")
    return keys


def _flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, bool]]:
    for name, value in tree.items():
        if not name.startswith("_") and name != "defaults" and prefix + name != "hydra":
            yield prefix + name, isinstance(value, dict)
            if isinstance(value, dict):
                yield from _flat(value, f"{prefix}{name}.")
