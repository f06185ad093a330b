"""The proofs prove something: each planted mistake makes them fail, and the package as it is does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, proofs_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("part", range(2))
def test_no_mutant_survives(part: int) -> None:
    """Run in a process of its own, because each mutant is a fork of it. Unmutated, the same tests pass in this run."""
    assert len(MUTANTS) >= 12
    result = subprocess.run(
        [sys.executable, "-m", "tests.mutants", str(part), "2"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split("\n") == ["", ""], f"these mutants survive:\n{result.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("proof", ["activations", "kernels", *proofs_of("formulas"), "network", "engine"])
def test_without_a_mistake_the_proofs_pass(proof: str, tmp_path: Path) -> None:
    """Run them as for a mutant: it is the mistake that they notice. It takes a minute: all proofs, each to its end."""
    nothing = f"Mistake(lambda *modules: None, ({proof!r},))"
    code = f"from tests.mutants import *; print(fails(ROOT, Path({str(tmp_path)!r}), {nothing}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout == "False\n", result.stdout + result.stderr[-3000:]
