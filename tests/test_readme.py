"""The README and the pages: their Python is run as it stands, their commands are composed, their tables compared."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from packaging.specifiers import SpecifierSet
from PIL import Image, ImageSequence

from tests.readme import PAGES, PICTURES, ROOT, generated, prepared

TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
COMMANDS = [
    line.split("  #")[0].strip()
    for text in TEXTS.values()
    for code in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in code.replace("\\\n", "").splitlines()
    if line.strip() and not line.startswith("#")
]
TRAIN = [words for command in COMMANDS if "train.py" in (words := shlex.split(command))]


@pytest.mark.parametrize("name", PAGES)
def test_code_runs_and_output_is_as_code_makes_it(name: str, tmp_path: Path) -> None:
    """Each page as somebody would paste it into one session."""
    if "run.dir=runs/iris" in TEXTS[name]:
        prepared(tmp_path)
    assert generated(name, tmp_path) == TEXTS[name], "run `python -m tests.readme`"
    with Image.open(ROOT / "docs" / "flow.png") as image:
        drawn_by = image.info["Software"]
    for picture in PICTURES.get(name, ()) if matplotlib.__version__ in drawn_by else ():  # others draw other letters
        drawn, kept = frames(tmp_path / picture), frames(ROOT / "docs" / picture)
        assert drawn.shape == kept.shape
        assert np.abs(drawn - kept).mean() < 0.25, "run `python -m tests.readme`"  # of 255 shades


def frames(path: Path) -> np.ndarray:
    """Return the pixels of a picture, or of each picture of an animation."""
    with Image.open(path) as film:
        return np.array([np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(film)])


@pytest.mark.parametrize("command", TRAIN, ids=shlex.join)
def test_train_commands_compose(command: list[str]) -> None:
    overrides = [word for word in command[command.index("train.py") + 1 :] if not word.startswith("-")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("config", [re.sub(r"=([^\[,]*),.*", r"=\1", override) for override in overrides])


def test_options_of_modules_exist() -> None:
    """`python -m manual_mlp.benchmark --markdown`: the module is there, and its source names the option."""
    named = [shlex.split(command)[2:] for command in COMMANDS if command.startswith("python -m manual_mlp")]
    assert len(named) > 5
    for module, *words in named:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        path = Path(str(spec.origin))
        source = path.with_name("__main__.py") if path.name == "__init__.py" else path
        assert all(f'"{word}"' in source.read_text() for word in words if word.startswith("-")), (module, words)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", "\n".join(TEXTS.values())))
    named |= {word for command in COMMANDS if command.startswith("make") for word in command.split()[1:]}
    assert {"train", "test", "test-all"} <= named <= targets


def test_files_of_tests_exist() -> None:
    named = {word for command in COMMANDS for word in command.split() if word.startswith("tests/")}
    assert len(named) > 1
    assert not {name for name in named if not (ROOT / name).exists()}


def test_workflow_runs_make_test_on_each_declared_python() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]
    declared = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(99) if f"3.{minor}" in declared]
    assert job["steps"][-1]["run"].startswith("make test")


def test_the_second_command_works_after_the_first() -> None:
    """`make train` makes .venv and activates nothing, so the command after it names .venv's own Python."""
    first, second, *_ = COMMANDS
    assert first == "make train"
    assert second.startswith(".venv/bin/python train.py ")


def test_readme_is_short_and_names_every_page() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 220
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", TEXTS["README.md"]))
    assert linked == {name for name in PAGES if name.startswith("docs/")}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Files exist, and the page that a link names has that heading."""
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXTS[name]):
        if not target.startswith("http"):
            path = PAGES[name].parent / target if target else PAGES[name]
            assert path.exists(), target
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
            assert not heading or heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
