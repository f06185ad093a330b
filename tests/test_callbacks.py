"""The callback that records δ: what it records, that it changes nothing, and that its records survive a resume."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import manual_mlp as mm
from manual_mlp import InputError
from manual_mlp.training import callbacks
from manual_mlp.training import run as training
from manual_mlp.training.callbacks import DeltaFlow, signals
from manual_mlp.training.strategies import BACKPROP
from tests.configs import configured


def trained(folder: Path, *overrides: str, epochs: int = 2, resume: Path | None = None) -> tuple[L.Trainer, Any, Any]:
    """Trainer, module and data after so many epochs, without test or summary."""
    training.quieten()
    cfg = configured(folder, "data=iris", f"trainer.max_epochs={epochs}", *overrides)
    data = training.config.build(cfg.data)
    L.seed_everything(0, verbose=False)
    data.setup()
    module, trainer = training._module(cfg, data), training._trainer(cfg)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer, module, data


def records(trainer: L.Trainer) -> DeltaFlow:
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, DeltaFlow))
    return callback


@pytest.mark.parametrize("loss", ["quadratic", "mse", "bce", "cross_entropy"])
def test_signals_are_those_of_the_trace(tmp_path: Path, loss: str) -> None:
    """And their norm, of a sample, has neither the 1/N nor dropout in it."""
    overrides = [f"model.loss={loss}", "model.dropout=0.5", "model.hidden=[5,4]", "model.activation=[silu,tanh]"]
    trainer, module, data = trained(tmp_path, *overrides, "model.bias=false", epochs=1)
    features, target = data.splits["train"][:32]
    module.eval()
    trace = mm.trace(module.net, features, target if loss == "cross_entropy" else torch.eye(3)[target], loss)
    module.train()
    values = signals(module, (features, target))
    for letter in ("z", "a", "delta"):
        torch.testing.assert_close(values[letter], getattr(trace, letter), rtol=0, atol=0)
    of_samples = {layer: (32 * delta).square().sum(1).mean().sqrt().item() for layer, delta in trace.delta.items()}
    last = {layer: norms[-1] for layer, norms in records(trainer).norms.items()}
    assert last == pytest.approx(of_samples, rel=1e-5)


def test_when_it_records(tmp_path: Path) -> None:
    """Iris has 11 steps an epoch: records at the steps 0, 20, 40 and at the end."""
    trainer, _, _ = trained(tmp_path, "data.batch_size=10", epochs=4)
    callback = records(trainer)
    assert callback.epochs == pytest.approx([0, 20 / 11, 40 / 11, 4])
    assert {layer: len(norms) for layer, norms in callback.norms.items()} == {2: 4, 3: 4}
    assert {letter: list(values) for letter, values in callback.first.items()} == {
        "z": [2, 3],
        "a": [1, 2, 3],
        "delta": [2, 3],
    }
    assert callback.snapshots == {}


def test_the_engines_blocks_count_as_what_is_in_them(tmp_path: Path) -> None:
    """It takes an epoch of iris, 11 mini-batches, in one step of Lightning: so every second epoch is recorded."""
    trainer, _, _ = trained(tmp_path, "backprop=engine", epochs=5)
    assert trainer.num_training_batches == 1
    assert records(trainer).epochs == [0, 2, 4, 5]


@pytest.mark.parametrize("backprop", BACKPROP)
def test_it_changes_nothing(tmp_path: Path, backprop: str) -> None:
    """The same bits with and without it, dropout and the order of rows included."""
    overrides = [f"backprop={backprop}", "model.dropout=0.3", "data=moons", "data.batch_size=100"]
    bits = []
    for extra in (["callbacks.delta_flow.every=1"], ["~callbacks.delta_flow"]):
        _, module, _ = trained(tmp_path / extra[0], *overrides, *extra)
        bits.append(module.state_dict())
    torch.testing.assert_close(*bits, rtol=0, atol=0)


def test_long_training_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "RECORDS", 4)
    trainer, _, _ = trained(tmp_path, "callbacks.delta_flow.every=1", epochs=2)  # 22 steps: every, second, fourth …
    callback = records(trainer)
    assert [round(epoch * 11) for epoch in callback.epochs] == [0, 8, 16, 22]
    assert [len(norms) for norms in callback.norms.values()] == [4, 4]


def test_values_are_thinned() -> None:
    (kept,) = callbacks._thinned({2: torch.arange(2500.0).reshape(50, 50)}).values()
    assert kept.tolist() == list(range(0, 2500, 3))
    assert kept.untyped_storage().nbytes() == 4 * len(kept)


def test_snapshots_of_the_plane(tmp_path: Path) -> None:
    trainer, module, _ = trained(tmp_path, "data=xor", "data.batch_size=100", epochs=5)
    snapshots = records(trainer).snapshots
    assert list(snapshots) == [0, 1, 2, 4]
    assert snapshots[4].keys() == module.net.state_dict().keys()
    weights = [snapshot["0.weight"] for snapshot in snapshots.values()]
    assert all((old != new).any() for old, new in zip(weights, [*weights[1:], module.net[0].weight], strict=True))


def test_records_survive_a_resume(tmp_path: Path) -> None:
    overrides = ["data=xor", "data.batch_size=50", "callbacks.delta_flow.every=2"]
    whole, _, _ = trained(tmp_path / "whole", *overrides, epochs=4)
    trained(tmp_path / "first", *overrides, epochs=2)
    resumed, _, _ = trained(tmp_path / "first", *overrides, epochs=4, resume=tmp_path / "first" / "last.ckpt")
    expected, found = records(whole).state_dict(), records(resumed).state_dict()
    torch.testing.assert_close(found.pop("first"), expected.pop("first"), rtol=0, atol=0)
    torch.testing.assert_close(found.pop("snapshots"), expected.pop("snapshots"), rtol=0, atol=0)
    assert found == expected
    assert len(found["epochs"]) > 3


def test_silent_where_the_recursion_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = training._module

    def hooked(*arguments: Any) -> Any:
        module = make(*arguments)
        module.net[0].register_forward_hook(lambda *_: None)
        return module

    monkeypatch.setattr(training, "_module", hooked)
    trainer, _, _ = trained(tmp_path, epochs=1)
    assert records(trainer).epochs == []


def test_tensorboard_gets_norms_and_histograms(tmp_path: Path) -> None:
    trainer, _, _ = trained(tmp_path, "logger=tensorboard", epochs=4)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "histograms": 0}).Reload()
    norms = records(trainer).norms
    for layer in (2, 3):
        points = events.Scalars(f"norm of delta/{layer}")
        assert [point.step for point in points] == [0, 20, 40, 44]
        assert [point.value for point in points] == pytest.approx(norms[layer])
    assert {"z/2", "z/3", "a/1", "a/2", "a/3", "delta/2", "delta/3"} == set(events.Tags()["histograms"])
    first, last = events.Histograms("delta/2")
    assert (first.step, last.step) == (0, 44)
    assert first.histogram_value.num == 32 * 30  # rows and neurons
    assert first.histogram_value.max == pytest.approx(records(trainer).first["delta"][2].max().item())


@pytest.mark.parametrize("option", ["every", "rows"])
def test_wrong_options(option: str) -> None:
    with pytest.raises(InputError, match=r"every and rows to be 1 or more, but got .*raise them"):
        DeltaFlow(**{option: 0})
