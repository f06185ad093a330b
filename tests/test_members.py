"""Several nets in one training: `members=8 backprop=engine`, their checkpoints, what they say together, refusals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris

import manual_mlp as mm
from manual_mlp import formulas as sheet
from manual_mlp.checkpoint import read_checkpoint
from manual_mlp.ensemble import Members
from manual_mlp.training import run as training
from manual_mlp.training.module import MLPModule
from manual_mlp.training.predict import Predictor
from tests.configs import configured
from tests.test_resume import killed

MEMBERS = ("backprop=engine", "members=3")
IRIS = ("data=iris", "trainer.max_epochs=8", *MEMBERS)
K = 3


def data_of(folder: Path, *words: str) -> Any:
    data = training.config.build(configured(folder, *words).data)
    data.setup()
    return data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three members on iris, by a rate at which they go up and down; not to be written to."""
    folder = tmp_path_factory.mktemp("members")
    training.run(configured(folder, *IRIS, "optimizer.lr=9", "report=true"))
    return folder


def test_member_k_begins_as_the_net_of_seed_k(tmp_path: Path) -> None:
    module = training._module(cfg := configured(tmp_path, *IRIS, "seed=5"), training._data(cfg))
    for k in range(K):
        alone = training._module(one := configured(tmp_path, "data=iris", f"seed={5 + k}"), training._data(one))
        assert all(torch.equal(a, b) for a, b in zip(module.net[k].parameters(), alone.net.parameters(), strict=True))


def test_each_keeps_its_own_best_epoch(trained: Path) -> None:
    """The file that is kept holds for each member the parameters whose validation cost was its lowest."""
    best, last = (read_checkpoint(trained / f"{name}.ckpt") for name in ("best", "last"))
    epochs = best["state_dict"]["net.kept_epoch"]
    assert len(set(epochs.tolist())) > 1, "choose another rate: all members were best in one epoch"
    for name in ("kept", "kept_cost", "kept_epoch"):  # nothing got better after best.ckpt
        assert torch.equal(best["state_dict"][f"net.{name}"], last["state_dict"][f"net.{name}"])
    val = data_of(trained, "data=iris").splits["val"]
    y = torch.eye(3)[val.target]
    with torch.no_grad():
        costs = [mm.functional.quadratic_loss(_member(trained, k)(val.features), y) for k in range(K)]
    torch.testing.assert_close(torch.stack(costs), best["state_dict"]["net.kept_cost"])
    lowest = pd.read_csv(trained / "metrics.csv")["val_loss"].min()
    assert torch.stack(costs).mean() <= lowest + 1e-6
    assert best["callbacks"][next(key for key in best["callbacks"] if "val_loss" in key)]["best_model_score"] == (
        pytest.approx(best["state_dict"]["net.kept_cost"].mean().item())
    )


def _member(folder: Path, k: int) -> mm.MLP:
    return mm.MLP.from_checkpoint(folder / "best.ckpt", member=k)


def test_figures_are_those_of_the_kept_nets(trained: Path) -> None:
    """Mean and spread over the members, the committee's own, in figures.json and in the report."""
    figures = pd.read_json(trained / "figures.json", typ="series")["figures"]
    test = data_of(trained, "data=iris").splits["test"]
    with torch.no_grad():
        predictions = torch.stack([_member(trained, k)(test.features) for k in range(K)])
    costs = torch.stack([mm.functional.quadratic_loss(a, torch.eye(3)[test.target]) for a in predictions])
    hits = (predictions.argmax(-1) == test.target).float().mean(-1)
    together = sheet.probability(predictions, "quadratic").mean(0).argmax(-1)
    expected = {
        "test_loss": costs.mean(),
        "test_spread_loss": costs.std(),
        "test_accuracy": hits.mean(),
        "test_spread_accuracy": hits.std(),
        "test_committee_accuracy": (together == test.target).float().mean(),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    page = (trained / "report.html").read_text()
    assert "spread accuracy" in page
    assert "3, best epochs" in page
    assert "member 0 of 3" in page


def test_predictions_are_the_mean_with_its_spread(trained: Path, tmp_path: Path) -> None:
    rows = load_iris(as_frame=True).data
    rows.to_csv(tmp_path / "new.csv", index=False)
    data = data_of(trained, "data=iris")
    x = torch.tensor((rows.to_numpy() - data.feature_mean) / data.feature_scale, dtype=torch.float32)
    with torch.no_grad():
        p = torch.stack([sheet.probability(_member(trained, k)(x), "quadratic") for k in range(K)])
    words = ["task=predict", f"ckpt_path={trained / 'best.ckpt'}", f"input='{tmp_path / 'new.csv'}'"]
    for suffix in ("csv", "npz"):
        training.run(configured(tmp_path, *words, f"output='{tmp_path / f'out.{suffix}'}'"))
    table = pd.read_csv(tmp_path / "out.csv")
    names = data.class_names
    assert list(table) == ["class", *(f"P({name})" for name in names), *(f"sd({name})" for name in names)]
    np.testing.assert_allclose(table[[f"P({name})" for name in names]], p.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table[[f"sd({name})" for name in names]], p.std(0), rtol=1e-4, atol=1e-6)
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_allclose(arrays["sd"], p.std(0), rtol=1e-4, atol=1e-6)
    assert [names[i] for i in p.mean(0).argmax(-1)] == list(table["class"])


@pytest.mark.parametrize("loss", sheet.COSTS)
def test_the_committee_says_the_mean_probability(loss: str) -> None:
    z = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = sheet.probability(z, loss).mean(0)
    torch.testing.assert_close(sheet.probability(sheet.committee(z, loss), loss), mean, rtol=1e-12, atol=1e-14)


def test_a_regression_gives_mean_and_standard_deviation(tmp_path: Path) -> None:
    training.run(configured(tmp_path, "experiment=regression", *MEMBERS, "trainer.max_epochs=2"))
    rows = load_diabetes(as_frame=True).data.head(20)
    rows.to_csv(tmp_path / "new.csv", index=False)
    words = ["task=predict", f"ckpt_path={tmp_path / 'best.ckpt'}", f"input='{tmp_path / 'new.csv'}'"]
    training.run(configured(tmp_path, *words))
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert list(table) == ["prediction", "sd(prediction)"]
    predictor = Predictor.from_checkpoint(tmp_path / "best.ckpt")
    x = torch.tensor(rows.to_numpy())
    with torch.no_grad():
        each = predictor.net.each(predictor.standardised(x)) * predictor.target_scale + predictor.target_mean
    np.testing.assert_allclose(table["prediction"], each.mean(0)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(table["sd(prediction)"], each.std(0)[:, 0], rtol=1e-3)


def test_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    words = (*IRIS, "optimizer=adam", "optimizer.lr=0.02")
    training.run(configured(tmp_path / "whole", *words, "trainer.max_epochs=3"))
    training.run(configured(tmp_path / "half", *words, "trainer.max_epochs=1"))
    more = ("trainer.max_epochs=3", f"ckpt_path={tmp_path / 'half/last.ckpt'}")
    training.run(configured(tmp_path / "rest", *words, *more))
    whole, rest = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "rest"))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, rest["state_dict"][name]), name
    assert whole["figures"] == rest["figures"]


@pytest.mark.slow
def test_goes_on_to_the_same_end_after_a_kill(tmp_path: Path) -> None:
    killed(tmp_path, "engine=half:3,named:3,step:7", more="members=3 optimizer=adam optimizer.lr=0.01")


def test_a_schedule_and_early_stopping_reach_each_member(tmp_path: Path) -> None:
    words = ("scheduler=step", "scheduler.step_size=1", "scheduler.gamma=0.5", "scheduler.interval=step")
    training.run(configured(tmp_path, *IRIS, "trainer.max_epochs=2", "optimizer.momentum=0.5", *words))
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 5.0 * 0.5 ** (2 * 11)
    assert len(content["optimizer_states"][0]["state"]) == K * 4
    early = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=0")
    training.run(configured(tmp_path / "early", *IRIS, *early))
    assert read_checkpoint(tmp_path / "early/last.ckpt")["epoch"] == 1


def test_tested_and_loaded_again(trained: Path, tmp_path: Path) -> None:
    figures = pd.read_json(trained / "figures.json", typ="series")["figures"]
    words = ("data=iris", "task=test", f"ckpt_path={trained / 'best.ckpt'}", "optimized_metric=test_loss")
    assert training.run(configured(tmp_path, *words)) == pytest.approx(figures["test_loss"])
    module = MLPModule.load_from_checkpoint(trained / "best.ckpt")
    assert isinstance(module.net, Members)
    assert len(module.net) == K


def test_without_validation_the_last_parameters_are_kept(tmp_path: Path) -> None:
    words = ("trainer.limit_val_batches=0", "optimized_metric=test_loss", "callbacks.best=null", "trainer.max_epochs=1")
    training.run(configured(tmp_path, *IRIS, *words))
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert content["state_dict"]["net.kept_cost"].tolist() == [math.inf] * K
    net = mm.MLP.from_checkpoint(tmp_path / "last.ckpt", member=1)
    assert torch.equal(net[0].weight, content["state_dict"]["net.1.0.weight"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("backprop=layers",), "expected backprop=engine and model=mlp for members=3, but got backprop=layers"),
        (("backprop=network",), "but got backprop=network"),
        (("backprop=autograd",), "but got backprop=autograd"),
        (("model=perceptron", "data=halves"), "but got a perceptron"),
        (("callbacks=lr_finder",), "expected no callbacks=lr_finder for members=3"),
        (("trainer=ddp", "trainer.devices=2"), "one process for backprop=engine"),
        (("trainer.gradient_clip_val=1",), "expected trainer.gradient_clip_val=null for members=3"),
        (("trainer.precision=bf16-mixed",), "expected trainer.precision=32-true or 64-true for members=3"),
        (("members=0",), "expected members from 1 to 256, but got 0"),
        (("members=257",), "expected members from 1 to 256, but got 257"),
        (("optimizer._target_=torch.optim.RMSprop",), "or take members=1"),
        (("members=two",), "expected model.members to be a whole number"),
    ],
)
def test_refused(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(mm.InputError, match=sentence):
        training.run(configured(tmp_path, *IRIS, *words))


def test_a_member_has_to_be_named(trained: Path, tmp_path: Path) -> None:
    for member in (None, 3, -1):
        with pytest.raises(mm.InputError, match=r"a member from 0 to 2 .*; got member="):
            mm.MLP.from_checkpoint(trained / "best.ckpt", member=member)
    words = (f"ckpt_path={trained / 'last.ckpt'}", "members=2", "trainer.max_epochs=9", "optimizer.lr=9")
    with pytest.raises(mm.InputError, match="expected members to be 3, as in"):
        training.run(configured(tmp_path, *IRIS, *words))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content["hyper_parameters"].update(members=4),
        lambda content: content["hyper_parameters"].pop("members"),
        lambda content: content["state_dict"].pop("net.kept"),
        lambda content: content["state_dict"].update({"net.kept": torch.zeros(3, 5)}),
        lambda content: content["hyper_parameters"].update(members=10**6),
        lambda content: content["state_dict"].pop("net.2.0.weight"),
    ],
)
def test_a_spoilt_checkpoint_is_refused(trained: Path, tmp_path: Path, spoil: Any) -> None:
    content = read_checkpoint(trained / "best.ckpt")
    spoil(content)
    torch.save(content, tmp_path / "spoilt.ckpt")
    with pytest.raises(mm.InputError, match=r"in the checkpoint|the parameters of this net"):
        Predictor.from_checkpoint(tmp_path / "spoilt.ckpt")
