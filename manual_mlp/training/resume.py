"""`ckpt_path=…` on the command line: the run that wrote the checkpoint goes on, as it was configured, in its folder."""

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf


def with_its_own_overrides(arguments: list[str]) -> list[str]:
    """Add what the run of `ckpt_path` was started with to the arguments of a command line, which win.

    A run keeps its overrides in `.hydra/overrides.yaml`. To train on, its folder becomes the output folder, too; a
    checkpoint alone in another folder brings nothing. task=predict needs nothing but the checkpoint.
    """
    parse = OverridesParser.create().parse_overrides
    try:
        words = parse([word for word in arguments if not word.startswith("-")])
    except OverrideParseException:  # Hydra will say so
        return arguments
    given = {override.key_or_group: override.value() for override in words}
    path, task = given.get("ckpt_path"), given.get("task", "train")
    kept = Path(str(path)).parent / ".hydra" / "overrides.yaml"
    if path is None or task == "predict" or not kept.is_file():
        return arguments
    own = [str(word) for word in OmegaConf.load(kept)]
    keys = [override.key_or_group for override in parse(own)]
    added = [word for word, key in zip(own, keys, strict=True) if key not in given and key != "task"]
    if task == "train" and "hydra.run.dir" not in given:
        folder = str(kept.parent.parent).replace("'", r"\'")
        added.append(f"hydra.run.dir='{folder}'")
    return [*added, *arguments]
