"""The benchmark runs, and says what it measured and where."""

import csv
import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

from manual_mlp import benchmark
from manual_mlp.errors import InputError

TINY = benchmark.Case("3-4-2, 5", (3, 4, 2), 5)
QUICK = [name for name in benchmark.CONTENDERS if "compile" not in name and name != "JAX"]


def test_every_contender_takes_a_step() -> None:
    for name in QUICK:
        step = benchmark.CONTENDERS[name].make(TINY)
        step()
        step()


def test_table_csv_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "CASES", [TINY])
    chosen = ["eager torch", "network", "step", "epoch", "products"]
    files = [f"--csv={tmp_path / 'a.csv'}", f"--plot={tmp_path / 'a.png'}"]
    rows = benchmark.main(["--seconds=0", *files, "--contenders", *chosen])
    printed = capsys.readouterr()
    assert "threads: 1" in printed.out
    assert torch.__version__ in printed.out
    assert printed.out.count("\n") == 3 + len(chosen)
    assert all(len(line) <= 120 for line in printed.out.splitlines()[2:])
    assert [row.contender for row in rows] == chosen
    for row in rows:
        assert 0 < row.low <= row.median <= row.high
        assert row.to_products > 0
    assert rows[0].to_eager == 1
    with (tmp_path / "a.csv").open() as file:
        assert [line["contender"] for line in csv.DictReader(file)] == chosen
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_readme_table_and_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "CASES", [TINY])
    monkeypatch.setattr(benchmark, "WIDTHS", [4, 8])
    chosen = ["eager torch", "step", "epoch", "products"]
    benchmark.main(["--seconds=0", "--markdown", "--contenders", *chosen])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[1:-1] == [
        f" {name} " for name in ("net, batch", "eager, µs", "step", "epoch", "step/products", "epoch/products")
    ]
    assert [len(line.split("|")) for line in lines[2:]] == [8, 8, 8]
    rows = benchmark.main(["--seconds=0", "--widths", f"--plot={tmp_path / 'w.png'}", "--contenders", *chosen])
    assert {"width 4 on cpu", "width 8 on cpu"} <= {row.case for row in rows}
    assert (tmp_path / "w.png").stat().st_size > 1000


def test_whole_trainings_in_a_line() -> None:
    """Contenders of a name that the nets' table doesn't have keep it."""
    times = {"low": 1.0, "high": 1.0, "to_products": math.nan}
    named = {"eager torch": 1.0, "train.py engine": 0.25}
    rows = [benchmark.Row("e", name, 300 * of, to_eager=of, **times) for name, of in named.items()]
    lines = benchmark.markdown(rows).splitlines()
    assert lines[0] == "| net, batch | eager, µs | train.py engine |"
    assert lines[2] == "| e | 300 | 0.25 |"


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    with benchmark.pinned(1):
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
    assert before == (torch.get_num_threads(), os.sched_getaffinity(0))


def test_single_layers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LAYERS", [(2, 3, 4)])
    rows = benchmark.main(["--seconds=0", "--layers"])
    assert [row.case for row in rows] == ["layer 2 x 3 x 4"] * 3
    assert all(math.isnan(row.to_products) for row in rows)
    assert "nan" not in capsys.readouterr().out
    rows = benchmark.main(["--seconds=0", "--layers", "--nets=2 x", "--contenders", "fused"])
    assert [row.contender for row in rows] == ["fused"]


def test_epochs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender by both clocks."""
    own = {name: of for name, of in benchmark.EPOCH_CONTENDERS.items() if "native" not in name and "JAX" not in name}
    monkeypatch.setattr(benchmark, "EPOCHS", [TINY])
    monkeypatch.setattr(benchmark, "EPOCH_CONTENDERS", own)
    rows = benchmark.main(["--seconds=0", "--epochs"])
    assert [row.case for row in rows] == ["3-4-2, 5, wall"] * len(own) + ["3-4-2, 5, CPU"] * len(own)
    assert all(row.median > 0 and row.to_products > 0 for row in rows)
    assert "16 nets, torch" in capsys.readouterr().out


def test_refused() -> None:
    with pytest.raises(InputError, match="expected contenders among"):
        benchmark.main(["--contenders", "abacus"])
    with pytest.raises(InputError, match="expected --nets in one of"):
        benchmark.main(["--nets", "7-7"])
    with pytest.raises(InputError, match=r"expected contenders among products; .*Got eager torch$"):
        benchmark.main(["--epochs", "--contenders", "eager torch"])
    with pytest.raises(SystemExit):
        benchmark.main(["--epochs", "--layers"])
    with pytest.raises(InputError, match="at least one of --threads"):
        benchmark.main(["--threads", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="expected a CUDA device"):
            benchmark.main(["--device", "cuda"])


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax() -> None:
    for make in (benchmark.jax_jit, benchmark.jax_scan, lambda case: benchmark.jax_scan(case, 3)):
        step = make(TINY)
        step()
        step()
