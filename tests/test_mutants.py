"""The proofs prove something: each planted mistake makes them fail, and the package as it is does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, TEXTS, proofs_of

ROOT = Path(__file__).resolve().parent.parent
PARTS = 3


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_no_mutant_survives(part: int) -> None:
    """Run in a process of its own, because each mutant is a fork of it. Unmutated, the same tests pass in this run."""
    assert len(MUTANTS) >= 12 * PARTS
    words = [sys.executable, "-m", "tests.mutants", str(part), str(PARTS)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split("\n") == ["", ""], f"these mutants survive:\n{result.stdout}"


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_a_mistake_is_there_once(name: str) -> None:
    file, right, *_ = TEXTS[name]
    assert (ROOT / "manual_mlp" / f"{file}.py").read_text(encoding="utf-8").count(right) == 1


@pytest.mark.slow
@pytest.mark.parametrize("proof", ["activations", "kernels", *proofs_of("formulas"), "network", "engine"])
def test_without_a_mistake_the_proofs_pass(proof: str, tmp_path: Path) -> None:
    """Run them as for a mutant: it is the mistake that they notice. It takes a minute: all proofs, each to its end."""
    nothing = f"Mistake(lambda *modules: None, ({proof!r},))"
    code = f"from tests.mutants import *; print(fails(ROOT, Path({str(tmp_path)!r}), {nothing}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout == "False\n", result.stdout + result.stderr[-3000:]
