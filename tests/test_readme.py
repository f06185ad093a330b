"""What the README says is run: its Python as it stands, its commands composed, its generated parts compared."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from manual_mlp.training import run as training
from tests.configs import configured
from tests.readme import README, generated

TEXT = README.read_text()
ROOT = README.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip() and not line.startswith("#")
]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as somebody would paste them into one session."""
    monkeypatch.chdir(tmp_path)
    training.run(configured(tmp_path / "runs" / "iris", "data=iris", "trainer.max_epochs=1"))  # as the page says before
    assert len(PYTHON) >= 2
    exec(compile("\n".join(PYTHON), str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python train.py")])
def test_train_commands_compose(command: str) -> None:
    overrides = [word for word in shlex.split(command)[2:] if not word.startswith("-")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("config", [re.sub(r"=([^\[,]*),.*", r"=\1", override) for override in overrides])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for command in COMMANDS if command.startswith("make") for word in command.split()[1:]}
    assert named
    assert named <= targets


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_generated_parts_are_as_code_makes_them() -> None:
    assert generated(TEXT) == TEXT, "run `python -m tests.readme`"
