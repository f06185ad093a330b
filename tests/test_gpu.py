"""`make gpu` without a GPU: it says so, tries its parts on the CPU, and keeps what it has measured."""

from pathlib import Path

import pytest
import torch

from tests import gpu


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA device; torch finds none"):
        gpu.main(["--output", str(tmp_path / "gpu.md")])
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(SystemExit, match=r"expected torch 2\.11 or newer; got 2\.10\.1"):
        gpu.main([])


def test_a_trial_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is in the file, though the time is over before the end."""
    monkeypatch.setattr(gpu, "missing", lambda *packages: list(packages))
    monkeypatch.setattr(gpu, "NETS", [((2, 3, 1), 4)])
    gpu.main(["--device", "cpu", "--seconds", "30", "--output", str(tmp_path / "gpu.md")])
    page = (tmp_path / "gpu.md").read_text()
    assert "no GPU: a trial on the CPU" in page
    assert "Not installed: lightning, hydra. Skipped: `train.py`" in page
    assert "skipped, because pytest is not installed: tests/test_guest_cuda.py" in page
    assert "skipped, because threadpoolctl is not installed: manual_mlp.benchmark --widths" in page
    assert "| 2-3-1, 4 | 64 |" in page
    gpu.main(["--device", "cpu", "--seconds", "1", "--output", str(tmp_path / "gpu.md")])
    assert (tmp_path / "gpu.md").read_text().count("skipped: the time was over") == 4


def test_a_command_that_fails_or_takes_too_long_is_told() -> None:
    assert "ended with 3" in gpu.called(["-c", "raise SystemExit(3)"], 60)
    assert "not over after 1 s" in gpu.called(["-c", "print('half', flush=True); import time; time.sleep(60)"], 1)
