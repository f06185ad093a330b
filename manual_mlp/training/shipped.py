"""The shipped configuration: where it lies, its groups, their choices and all keys."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

PACKAGE = Path(__file__).parents[1]
# A wheel carries it in the package. In a clone, and installed from one as editable, it lies beside the package.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())


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
        if not name.startswith("_") and prefix + name not in ("defaults", "hydra") and name != "defaults":
            yield prefix + name, isinstance(value, dict)
            if isinstance(value, dict):
                yield from _flat(value, f"{prefix}{name}.")
