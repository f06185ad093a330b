"""The benchmark runs, and says what it measured and where."""

import csv
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from manual_mlp import benchmark
from manual_mlp.errors import InputError

TINY = benchmark.Net("3-4-2, 5", (3, 4, 2), 5)
QUICK = [name for name in benchmark.CONTENDERS if name not in ("torch.compile", "JAX jit")]


def test_every_contender_takes_a_step() -> None:
    for name in QUICK:
        step = benchmark.CONTENDERS[name](TINY)
        step()
        step()


def test_table_csv_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "NETS", [TINY])
    chosen = ["eager torch", "network Function", "engine.step", "engine.train_epoch", "products"]
    files = [f"--csv={tmp_path / 'a.csv'}", f"--plot={tmp_path / 'a.png'}"]
    rows = benchmark.main(["--seconds=0", *files, "--contenders", *chosen])
    printed = capsys.readouterr()
    assert "1 thread" in printed.err
    assert torch.__version__ in printed.err
    assert printed.out.count("\n") == 2 + len(chosen)
    assert [row.contender for row in rows] == chosen
    for row in rows:
        assert 0 < row.low <= row.median <= row.high
        assert row.to_products > 0
    assert rows[0].to_eager == 1
    assert rows[1].kept is not None
    with (tmp_path / "a.csv").open() as file:
        assert [line["contender"] for line in csv.DictReader(file)] == chosen
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_single_layers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LAYERS", [(2, 3, 4)])
    rows = benchmark.main(["--seconds=0", "--layers"])
    assert [row.case for row in rows] == ["layer 2 x 3 x 4"] * 3
    assert all(math.isnan(row.to_products) for row in rows)
    assert "nan" not in capsys.readouterr().out


def test_refused() -> None:
    with pytest.raises(InputError, match="expected contenders among"):
        benchmark.main(["--contenders", "abacus"])
    with pytest.raises(InputError, match="expected --nets in one of"):
        benchmark.main(["--nets", "7-7"])


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax() -> None:
    benchmark.jax_jit(TINY)()
