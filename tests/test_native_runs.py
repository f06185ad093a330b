"""train.py on the native road: what a run says of its road, how it goes on, and what asks for no build."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from manual_mlp import InputError
from manual_mlp.checkpoint import read_checkpoint, write_whole
from manual_mlp.native import net as native_net
from manual_mlp.training import continuing
from manual_mlp.training import run as training
from manual_mlp.training.command_line import is_plain, read_overrides
from tests.configs import configured
from tests.test_native import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER or not hasattr(os, "getuid"), reason="no C compiler is installed")
ENGINE = ("data=iris", "data.batch_size=4", "trainer.precision=64-true", "backprop=engine")
WAYS = {
    "sgd": ["optimizer.lr=1.0"],
    "momentum": ["optimizer.lr=0.1", "optimizer.momentum=0.9"],
    "adam": ["optimizer=adam", "scheduler=step"],
    "adamw": ["optimizer=adamw", "model.loss=cross_entropy", "model.activation=gelu"],
    "members": ["members=3", "optimizer=adam"],
}
TORCH = ("trainer.max_steps=40", "trainer.max_epochs=-1")  # a training step takes one mini-batch


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configurations that runs leave, which only train.py itself has a folder for. No run draws its curves."""
    configurations: list[DictConfig] = []
    monkeypatch.setattr(continuing, "keep_configuration", configurations.append)
    monkeypatch.setattr(training, "learning_curves", lambda *_: None)
    return configurations


def run(folder: Path, *words: str, epochs: int = 1) -> dict[str, Any]:
    """Train, and return the last checkpoint."""
    training.run(configured(folder, *ENGINE, f"trainer.max_epochs={epochs}", *words))
    return read_checkpoint(folder / "last.ckpt")


def going_on(folder: Path) -> str:
    return f"ckpt_path='{folder / 'last.ckpt'}'"


def changed(folder: Path, **values: Any) -> None:
    """Put values at the first level of last.ckpt; None leaves one out."""
    content = torch.load(folder / "last.ckpt", weights_only=True) | values
    torch.save({name: value for name, value in content.items() if value is not None}, folder / "new")
    write_whole(folder / "last.ckpt", (folder / "new").read_bytes())


def no_build(monkeypatch: pytest.MonkeyPatch, reason: str = "") -> None:
    def library(*_: object) -> None:
        if reason:
            raise native_net.build.CantBuild(reason)
        pytest.fail("the compiler was asked for")

    monkeypatch.setattr(native_net.build, "library", library)


@pytest.mark.parametrize("way", [way if way == "adamw" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_same_training_by_both_roads(tmp_path: Path, way: str, kept: list[DictConfig]) -> None:
    native, torchs = (run(tmp_path / word, f"native={word}", *WAYS[way]) for word in ("auto", "false"))
    assert [native["road"], torchs["road"]] == ["native", "torch"]
    assert [cfg.native for cfg in kept] == [True, False]
    for key in ("state_dict", "optimizer_states"):  # GELU's and the sums' rounding, grown by 54 steps
        torch.testing.assert_close(native[key], torchs[key], rtol=1e-9, atol=1e-10, check_dtype=False)
    assert native["figures"] == pytest.approx(torchs["figures"], rel=1e-6)  # they are summed in float32


@pytest.mark.parametrize("way", ["momentum", "members", pytest.param("adam", marks=pytest.mark.slow)])
def test_goes_on_to_the_same_bits(tmp_path: Path, way: str) -> None:
    whole = run(tmp_path / "whole", *WAYS[way], epochs=2)
    run(tmp_path / "halves", *WAYS[way])
    halves = run(tmp_path / "halves", *WAYS[way], going_on(tmp_path / "halves"), epochs=2)
    assert [whole["road"], halves["road"]] == ["native", "native"]
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(halves[key], whole[key], rtol=0, atol=0)


def test_the_cuts_change_no_bit_of_a_run(tmp_path: Path) -> None:
    """Blocks of 20, the last one too small for auto by itself, of 5 and of 1 mini-batch; with a pause in an epoch."""
    middle = ["callbacks.delta_flow.every=5", "+callbacks.last.every_n_train_steps=8", "+callbacks.last.save_top_k=-1"]
    whole = run(tmp_path / "whole", *WAYS["momentum"], epochs=2)
    training.run(configured(tmp_path, *ENGINE, *WAYS["momentum"], *middle, "callbacks.last.filename='{step}'"))
    from_there = [*middle[:1], f"ckpt_path='{tmp_path}/step=8.ckpt'"]
    counted = ["callbacks.delta_flow=null", "native=true", "trainer.max_steps=54"]
    for name, words in {"middle": from_there, "counted": counted}.items():
        now = run(tmp_path / name, *WAYS["momentum"], *words, epochs=2)
        assert now["road"] == "native"
        assert now["global_step"] > whole["global_step"]
        torch.testing.assert_close(now["state_dict"], whole["state_dict"], rtol=0, atol=0)
    with pytest.raises(InputError, match=r"expected training steps of 20 rows, .* but got 80; go on with its own"):
        run(tmp_path, *WAYS["momentum"], from_there[1], epochs=2)


@pytest.mark.parametrize(
    ("words", "steps"), [([], 6), (["callbacks.delta_flow.every=1"], 21), (["callbacks.delta_flow.every=200"], 1)]
)
def test_records_of_delta_in_an_epoch_of_105_mini_batches(tmp_path: Path, words: list[str], steps: int) -> None:
    last = run(tmp_path, "data.batch_size=1", *words)
    assert [last["road"], last["global_step"], len(last["callbacks"]["DeltaFlow"]["epochs"])] == [
        "native",
        steps,
        steps,
    ]


@pytest.mark.parametrize("members", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_in_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: int) -> None:
    """Ctrl-C comes after the first call of C in the second epoch."""
    words = [*WAYS["adam"], f"members={members}", "data.batch_size=2"]
    whole, train, calls = run(tmp_path / "whole", *words, epochs=2), native_net.NativeNet.train, iter(range(100))

    def interrupted(*rows: Any) -> float:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train(*rows)

    monkeypatch.setattr(native_net.NativeNet, "train", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path, *words, epochs=2)
    now = run(tmp_path, *words, going_on(tmp_path), epochs=2)
    torch.testing.assert_close(now["state_dict"], whole["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CC", "false", "false failed"),
        ("CC", "cc -O0 --nonsense", "nonsense"),
        ("XDG_CACHE_HOME", "{}", "not a folder that only you can enter"),
    ],
)
def test_no_compiler_is_one_line_in_the_log(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
    reason: str,
) -> None:
    (tmp_path / "manual_mlp").mkdir()
    (tmp_path / "manual_mlp").chmod(0o777)
    monkeypatch.setattr(native_net.build, "_libraries", {})
    monkeypatch.setenv(variable, value.format(tmp_path))
    caplog.set_level("INFO", "manual_mlp.engine")
    assert run(tmp_path)["road"] == "torch"
    (said,) = [record.getMessage() for record in caplog.records if record.name == "manual_mlp.engine"]
    assert re.fullmatch(f"torch's road, not the native one: .*{reason}.*", said)
    with pytest.raises(InputError, match=f"C covers; .*{reason}.*: take native=False"):
        run(tmp_path, "native=true")


def test_a_native_run_whose_steps_are_counted_from_now_on(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match=r"takes C only from four mini-batches a call on, .*; set native=true"):
        run(tmp_path, going_on(tmp_path), *TORCH)
    assert run(tmp_path, going_on(tmp_path), *TORCH, "native=true")["global_step"] == 40


@pytest.mark.parametrize("words", [["native=false"], list(TORCH)], ids=["false", "auto declines"])
def test_no_build_because_a_checkpoint_says_native(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    run(tmp_path, "native=false")
    changed(tmp_path, road="native")
    before = (tmp_path / "last.ckpt").read_bytes()
    no_build(monkeypatch)
    with pytest.raises(InputError, match="expected the native road, on which the run began, but native"):
        run(tmp_path, going_on(tmp_path), *words, epochs=2)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_refused_where_its_road_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    no_build(monkeypatch, "no C compiler is installed")
    with pytest.raises(InputError, match="native road, on which the run began, but no C compiler is installed; start"):
        run(tmp_path, going_on(tmp_path), epochs=2)
    with pytest.raises(InputError, match="expected a training that C covers; no C compiler"):
        run(tmp_path / "new", "native=true")
    assert run(tmp_path / "other")["road"] == "torch"
    layers = [*ENGINE, "backprop=layers", "trainer.max_epochs=2", going_on(tmp_path)]
    training.run(configured(tmp_path, *layers))  # another backprop is free to choose, as it was


@pytest.mark.parametrize("road_then", [pytest.param("torch", marks=pytest.mark.slow), None], ids=["torch", "of 0.1"])
def test_a_run_of_torch_s_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road_then: str | None) -> None:
    whole = run(tmp_path / "whole", "native=false", epochs=2)["state_dict"]
    run(tmp_path, "native=false")
    changed(tmp_path, road=road_then)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "copy.ckpt")
    with pytest.raises(InputError, match=r"expected the torch road, .* but native is true; leave out native"):
        run(tmp_path, "native=true", going_on(tmp_path), epochs=2)
    no_build(monkeypatch)
    now = run(tmp_path, f"ckpt_path='{tmp_path / 'copy.ckpt'}'", epochs=2)
    assert now["road"] == "torch"
    torch.testing.assert_close(now["state_dict"], whole, rtol=0, atol=0)


def test_a_run_of_0_1_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Its training steps take as many mini-batches as they did then, and not as many as in C."""
    middle = [
        "+callbacks.last.every_n_train_steps=1",
        "+callbacks.last.save_top_k=-1",
        "callbacks.last.filename='{step}'",
    ]
    training.run(configured(tmp_path, *ENGINE, "data=digits", "native=false", *middle))
    (tmp_path / "step=1.ckpt").rename(tmp_path / "last.ckpt")
    changed(tmp_path, road=None)
    now, whole = (
        run(tmp_path, "data=digits", *words)["state_dict"] for words in ([going_on(tmp_path)], ["native=false"])
    )
    torch.testing.assert_close(now, whole, rtol=0, atol=0)


def test_a_run_by_layers_may_go_on_natively(tmp_path: Path) -> None:
    assert run(tmp_path, "backprop=layers")["road"] is None
    assert run(tmp_path, going_on(tmp_path), epochs=2)["road"] == "native"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["backprop=layers"], "expected backprop=engine for native=true"),
        (["data=halves", "model=perceptron", "callbacks.best.monitor=train_loss"], "expected backprop=engine"),
        (["trainer.gradient_clip_val=1"], "max_grad_norm clips the gradients: take native=False"),
        (["model.dropout=0.1"], "dropout draws"),
    ],
)
def test_true_says_why_it_can_t(tmp_path: Path, words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        run(tmp_path, "native=true", *words)


@pytest.mark.parametrize(
    "words",
    [TORCH, ["model.hidden=[300]"], ["trainer.gradient_clip_val=1"], ["scheduler=step", "scheduler.interval=step"]],
    ids=["steps counted", "wide", "clipped", "schedule by step"],
)
def test_auto_leaves_it_to_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run(tmp_path, *words)["road"] == "torch"
    assert "engine (torch)" in capsys.readouterr().out


def test_the_summary_says_native(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "callbacks=lr_finder")["road"] == "native"  # the search, which counts steps, was torch's
    assert "engine (native)" in capsys.readouterr().out


def test_a_road_is_a_word(tmp_path: Path) -> None:
    run(tmp_path, "native=false")
    changed(tmp_path, road="/bin/sh")
    with pytest.raises(InputError, match=r"expected road in the checkpoint .* to be native or torch"):
        run(tmp_path, going_on(tmp_path), epochs=2)


def test_a_folder_can_t_ask_for_a_build() -> None:
    for word in ("native=false", "native=auto", "model.native=false"):
        assert is_plain(*read_overrides(f"- {word}"))
    for word in ("native=true", "model.native=true", "native='true'", "native=1", "native=[true]", "native=null"):
        (read,) = read_overrides(f'- "{word}"')
        assert not is_plain(read)
