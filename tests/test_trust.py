"""Checkpoints from somebody else: what is believed of them, and that nothing else happens."""

import copy
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import manual_mlp as mm
from manual_mlp import InputError, checkpoint
from manual_mlp.checkpoint import FORMAT, read_checkpoint, write_whole
from manual_mlp.training import run as training
from manual_mlp.training.callbacks import EpochCheckpoint, WholeFiles, in_own_folder
from manual_mlp.training.module import MLPModule
from manual_mlp.training.predict import Predictor
from manual_mlp.training.strategies import BACKPROP
from tests.configs import configured
from tests.killed import outcome

RUN = ("data=iris", "data.batch_size=50", "trainer.max_epochs=2", "optimizer=adam", "scheduler=plateau")
FIXTURES = Path(__file__).with_name("fixtures")


@pytest.fixture(scope="module", autouse=True)
def _without_pictures() -> Iterator[None]:
    """To save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "learning_curves", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; not to be written to."""
    folder = tmp_path_factory.mktemp("original")
    training.run(configured(folder, *RUN))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it, beside which a folder `victim` lies."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "kept").touch()
    return Path(shutil.copytree(original, tmp_path / "run"))


def go_on(folder: Path, *overrides: str) -> float | None:
    words = (*RUN, "trainer.max_epochs=4", f"ckpt_path={folder}/last.ckpt", *overrides)
    return training.run(configured(folder, *words))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the content of last.ckpt."""
    content = torch.load(folder / "last.ckpt", weights_only=True)
    change(content)
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def state_of_best(content: dict[str, Any]) -> dict[str, Any]:
    (state,) = (state for state in content["callbacks"].values() if state.get("monitor"))
    return state


def names(path: str) -> Callable[[dict[str, Any]], None]:
    """Let a checkpoint name this path as the best one, which the next one beats."""

    def change(content: dict[str, Any]) -> None:
        far = torch.tensor(9.0)
        state = state_of_best(content)
        state.update(best_model_path=path, kth_best_model_path=path, best_k_models={path: far})
        state.update(best_model_score=far, kth_value=far, last_model_path=path)

    return change


class TestPaths:
    @pytest.mark.parametrize("path", ["{folder}/../victim", "victim", "http://[::1]/best.ckpt"])
    @pytest.mark.parametrize("more", [[], ["callbacks.best._target_=lightning.pytorch.callbacks.ModelCheckpoint"]])
    def test_is_not_removed(self, folder: Path, path: str, more: list[str]) -> None:
        """Neither by our callback nor by Lightning's own, which removes what it believes to be the old best one."""
        (folder / "victim").mkdir()
        (folder / "victim" / "kept").touch()
        if more:
            training.run(configured(folder, *RUN, *more))
        before = everything(folder.parent)
        rewrite(folder, names(path.format(folder=folder)))
        go_on(folder, *more)
        assert before <= everything(folder.parent)
        state = state_of_best(read_checkpoint(folder / "last.ckpt"))
        assert {state["best_model_path"], *state["best_k_models"]} == {"best.ckpt"}

    @pytest.mark.parametrize(
        "path",
        ["{folder}/../victim/kept", "{folder}/victim", "../victim", "kept", "..", ".", "", "~", "/", "https://host/x.ckpt",
         "file://{folder}/../victim", "s3://bucket/x.ckpt", "{folder}/link", "folder", "\0", "x" * 9999, "\x1b[31m",
         "\ud800", "best.ckpt/", "\\best.ckpt"],
    )  # fmt: skip
    def test_is_not_believed(self, folder: Path, path: str) -> None:
        (folder / "folder").mkdir()
        (folder / "link").symlink_to(folder / "best.ckpt")
        content = torch.load(folder / "last.ckpt", weights_only=True)
        names(path.format(folder=folder))(content)
        callback = EpochCheckpoint(folder, monitor="val_loss")
        state = in_own_folder(state_of_best(content), callback, folder / "last.ckpt")
        assert (state["best_model_path"], state["kth_best_model_path"], state["last_model_path"]) == ("", "", "")
        assert state["best_k_models"] == {}
        assert state["dirpath"] == callback.dirpath

    def test_best_of_a_folder_that_was_moved_is_kept(self, folder: Path) -> None:
        far = torch.tensor(-9.0)  # none beats it
        rewrite(
            folder, lambda content: state_of_best(content)["best_k_models"].update({str(folder / "best.ckpt"): far})
        )
        before, moved = (folder / "best.ckpt").read_bytes(), folder.rename(folder.with_name("moved"))
        go_on(moved)
        assert (moved / "best.ckpt").read_bytes() == before
        assert state_of_best(read_checkpoint(moved / "last.ckpt"))["best_model_path"] == "best.ckpt"

    def test_best_beside_the_checkpoint_is_kept_in_new_folders(self, folder: Path, tmp_path: Path) -> None:
        """Also in one after another."""
        far = torch.tensor(-9.0)
        rewrite(folder, lambda content: state_of_best(content).update(best_k_models={"/old/best.ckpt": far}))
        before, last = (folder / "best.ckpt").read_bytes(), folder
        for name, epochs in ("new", 4), ("newer", 5):
            words = (*RUN, f"trainer.max_epochs={epochs}", f"ckpt_path={last}/last.ckpt")
            last = tmp_path / name
            training.run(configured(last, *words))
            assert state_of_best(read_checkpoint(last / "last.ckpt"))["best_k_models"] == {"best.ckpt": far}
            assert (last / "best.ckpt").read_bytes() == before

    @pytest.mark.parametrize("lost", ["best.ckpt", "other.ckpt"])
    def test_best_ones_that_are_lost(self, folder: Path, lost: str) -> None:
        """Of several kept ones some; what is derived from them follows."""
        shutil.copy(folder / "best.ckpt", folder / "other.ckpt")
        callback = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2)
        callback.best_k_models = {
            f"/old/{name}": torch.tensor(s) for name, s in (("best.ckpt", 1.0), ("other.ckpt", 2.0))
        }
        callback.kth_best_model_path = "/old/other.ckpt"
        (folder / lost).unlink()
        state = in_own_folder(callback.state_dict(), callback, folder / "last.ckpt")
        left = str(folder / ({"best.ckpt", "other.ckpt"} - {lost}).pop())
        assert state["best_k_models"].keys() == {left}
        assert state["best_model_path"] == state["kth_best_model_path"] == left
        assert state["best_model_score"] == state["kth_value"]

    def test_best_of_another_run(self, folder: Path) -> None:
        shutil.copy(FIXTURES / "v0.1-classes.ckpt", folder / "best.ckpt")
        with pytest.raises(InputError, match=r"expected \w+ to be .*, as in .*best\.ckpt, but it is"):
            go_on(folder)

    def test_state_of_an_unknown_callback(self, folder: Path) -> None:
        rewrite(folder, lambda content: content["callbacks"].update(Mine={"file": ["a", {"b": "/etc/passwd"}]}))
        with pytest.raises(InputError, match=r"callbacks\.Mine\.file\[1\]\.b .* without a path, but got '/etc/passwd'"):
            read_checkpoint(folder / "last.ckpt")


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_removes_one_file_of_its_own_folder(tmp_path: Path) -> None:
    files, mine = WholeFiles(), tmp_path / "mine"
    files.save_checkpoint({}, mine / "a.ckpt")
    files.save_checkpoint({}, mine / "b.ckpt")
    (mine / "folder").mkdir()
    (mine / "link").symlink_to(mine / "b.ckpt")
    (tmp_path / "other").touch()
    for path in (
        mine / "folder",
        mine / "link",
        mine,
        tmp_path / "other",
        mine / ".." / "other",
        "http://x/a.ckpt",
        "",
    ):
        before = everything(tmp_path)
        files.remove_checkpoint(path)
        assert everything(tmp_path) == before
    files.remove_checkpoint(mine / "gone.ckpt")
    files.remove_checkpoint(str(mine / "a.ckpt"))
    assert not (mine / "a.ckpt").exists()


ROADS: dict[str, Callable[[Path], object]] = {
    "resume": lambda path: go_on(path.parent),
    "test": lambda path: training.run(configured(path.parent, *RUN, "task=test", f"ckpt_path={path}")),
    "predict": lambda path: training.run(
        configured(path.parent, *RUN, "task=predict", f"ckpt_path={path}", f"input={path.parent}/metrics.csv")
    ),
    "MLP": mm.MLP.from_checkpoint,
    "Predictor": Predictor.from_checkpoint,
    "MLPModule": MLPModule.load_from_checkpoint,
}


def doubled(times: int) -> list:
    """2 ** times values in a few bytes."""
    return [] if times == 0 else 2 * [doubled(times - 1)]


def nested(times: int) -> list:
    return [] if times == 0 else [nested(times - 1)]


FLOW = {"epochs": [], "norms": {}, "first": {}, "snapshots": {1: {"0.weight": torch.zeros(7, 7)}}}
FLOW |= {"steps": 0, "due": 0, "stride": 1}
VALUES: list[tuple[str, Any, str]] = [
    ("hyper_parameters/hidden", "abc", "a list, but got 'abc'"),
    ("hyper_parameters/hidden", [40_000, 20_000], "parameters of this net in .* size mismatch for .*20000"),
    ("hyper_parameters/hidden", [2**70], "is damaged"),
    ("hyper_parameters/input_size", True, "a whole number from 1"),
    ("hyper_parameters/output_size", 10**9, r"a list of 0 or 1000000000, but got \['setosa', 'versicolor', "),
    ("hyper_parameters/class_names", ["a"], r"class_names .* a list of 0 or 3, but got \['a'\]"),
    ("hyper_parameters/class_names", ["a", "b", "\ud800"], "a text of at most 1000 letters"),
    ("hyper_parameters/class_names", ["a", "b", "c" * 1001], "a text of at most 1000 letters, but got 'ccc"),
    ("hyper_parameters/activation", "\x1b[31m", r"a name or a list, but got '\\x1b\[31m'"),
    ("hyper_parameters/activation", ["relu", "relu"], "activation .* a list of 1, but got"),
    ("hyper_parameters/activation", "sinh", "sinh"),
    ("hyper_parameters/loss", "hinge", "one of quadratic, mse, bce, cross_entropy, but got 'hinge'"),
    ("hyper_parameters/dropout", float("nan"), "a number from 0 to 1, but got nan"),
    ("hyper_parameters/target_scale", [1.0], r"target_scale .* a list of 0, but got \[1.0\]"),
    ("DataModule/feature_mean", [1.0, 2.0], "feature_mean .* a list of 0 or 4"),
    ("DataModule/feature_scale", [1.0, 1.0, 1.0, 0.0], r"feature_scale\[3\] .* a number above 0, but got 0.0"),
    ("DataModule/fingerprint", -1, "a whole number from 0"),
    ("state_dict/net.0.weight", torch.zeros(30, 4, dtype=torch.int32), "to be parameters, but got .*int32"),
    ("state_dict/net.0.weight", torch.zeros(30, 4, dtype=torch.float64), "one dtype, but got .*float32"),
    ("state_dict/net.9.weight", torch.zeros(2), r"parameters of this net in .*Unexpected key\(s\) .* \"9.weight\""),
    ("figures", 5, "a table, but got 5"),
    ("figures/val_loss", "0.5", "a number, but got '0.5'"),
    ("sums/hits", torch.ones(3), "sums.hits .* one number, but got a tensor of shape"),
    ("sums/rows", -1, "sums.rows .* a whole number from 0"),
    ("epoch", None, "epoch .* a whole number from 0 .*, but got none"),
    ("callbacks", [], "a table, but got"),
    ("callbacks/EarlyStopping", 5, "a table, but got 5"),
    ("callbacks/DeltaFlow", FLOW, "snapshots.1 .* tensors of the names and shapes in state_dict"),
    ("optimizer_states", {}, "a list, but got"),
    ("optimizer_states", [{"state": {}}], r"optimizer_states\[0\].param_groups .* there, but got none"),
    ("lr_schedulers", ["abc"], "a table, but got 'abc'"),
    ("lr_schedulers/0/last_epoch", "abc", r"lr_schedulers\[0\].last_epoch .* a whole number from 0"),
    ("lr_schedulers/0/best", [1.0], "one number"),
    ("loops/fit_loop/epoch_progress/current/ready", 0.5, "counts"),
    ("continuation/random/torch", torch.zeros(5056, dtype=torch.uint8), "a state of torch's generator"),
    ("continuation/random/numpy", ["MT19937", [0] * 624, 625, 0, 0.0], "a state of NumPy's generator"),
    ("continuation/random/numpy", 5, "a state of NumPy's generator"),
    ("continuation/random/cuda", [torch.zeros(16)], "a state of a GPU's generator"),
    ("continuation/random/python", (3, tuple([0] * 624 + [999]), None), "a state of Python's generator"),
    ("continuation/rows", ["epoch,val_loss\n0,=1+1\n"], "the text of a metrics.csv"),
    ("continuation/rows", ["epoch,=1+1\n0,1\n"], "the text of a metrics.csv"),
    ("continuation/rows", ["epoch,val_loss\n,1\n"], "the text of a metrics.csv"),
    ("continuation/rows", ["step,val_loss\n0,1\n"], "the text of a metrics.csv"),
    ("pytorch-lightning_version", "1.9.0", "a version from 2.0 on, but got '1.9.0'"),
    ("configured/optimizer/lr", torch.ones(3), "a number or a name or null, but got a tensor"),
    ("configured/optimizer/betas", [0.9, torch.ones(3)], r"configured.optimizer.betas .* numbers and texts alone"),
    ("configured/scheduler", torch.ones(2), "configured.scheduler .* a table or null, but got a tensor"),
    ("configured/scheduler/patience", torch.ones(2), "configured.scheduler .* a table or null, but got {'class'"),
    ("configured/callbacks/best", {"mode": [torch.ones(2)]}, "configured.callbacks.best .* numbers and texts alone"),
    ("hyper_parameters/initialisation_scale", torch.ones(2), "numbers and texts alone"),
    ("DataModule/more", {"a": [torch.ones(2)]}, "DataModule.more .* numbers and texts alone"),
    ("figures/val_loss", -(2**63) - 1, "a number, but got -9223372036854775809"),
    ("format", FORMAT + 1, f"format {FORMAT} at most, but .* is of format {FORMAT + 1}; .* newer"),
    ("format", "2", "a whole number from 0"),
    ("more", doubled(25), "is damaged .its values contain each other"),
    ("more", nested(100), "is damaged .its values contain each other"),
    ("more", torch.zeros(1).expand(10**6, 10**6), "is damaged .its tensors claim more"),
    ("more", torch.zeros(3).to_sparse(), "objects that could run code, none of which was run"),
    ("more", torch.zeros(3, dtype=torch.complex64), "objects that could run code"),
    ("more", torch.empty(10**6, 10**6, device="meta"), "objects that could run code"),
    ("more", torch.nn.Parameter(torch.zeros(3)), "objects that could run code"),
    ("more", bytearray(3), "objects that could run code"),
    ("more", {1, 2}, "objects that could run code"),
    ("more", torch.device("cuda"), "objects that could run code"),
    ("more", {("a", 1): 2}, "a key is neither"),
]  # fmt: skip
OF_RESUME: list[tuple[str, Any, str]] = [
    ("optimizer_states/0/state/0/exp_avg", torch.zeros(7), r"fit this run, .*last\.ckpt it fails .RuntimeError"),
    ("optimizer_states/0/state/0/step", "abc", "fit this run, but with .* it fails .ValueError"),
    ("optimizer_states/0/state", {0: {"momentum_buffer": torch.zeros(30, 4)}}, "fit this run, .* it fails .KeyError"),
    ("optimizer_states/0/param_groups/0/lr", "abc", r"param_groups\[0\].lr .* this run's own, 0.003"),
    ("optimizer_states/0/param_groups/0/params", [0, 1], "this run's own"),
    ("optimizer_states", [], "optimizer_states .* this run's own"),
    ("lr_schedulers/0/factor", "abc", r"lr_schedulers\[0\].factor .* this run's own, 0.1, but got 'abc'"),
    ("loops/fit_loop/epoch_progress", {}, "it fails .KeyError"),
    ("loops/fit_loop/epoch_progress/total/ready", False, "total.ready .* this run's own, 0, but got False"),
    ("continuation", None, "continuation in the checkpoint .* a table, but got none"),
]  # fmt: skip


def put(content: Any, place: str, value: Any) -> None:
    *way, last = (int(name) if name.isdigit() else name for name in place.split("/"))
    for name in way:
        content = content[name]
    content[last] = value


@pytest.mark.parametrize(("place", "value", "sentence"), VALUES, ids=range(len(VALUES)))
def test_crafted_values_end_in_a_sentence(
    original: Path, tmp_path: Path, place: str, value: Any, sentence: str
) -> None:
    """By each road, before any of them does anything else."""
    shutil.copy(original / "last.ckpt", tmp_path)
    path = rewrite(tmp_path, lambda content: put(content, place, value))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("MLP", "Predictor", "MLPModule"):
        with pytest.raises(InputError, match=f"^expected .*{sentence}"):
            ROADS[name](path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("road", ["resume", "test", "predict"])
def test_crafted_values_by_each_task(folder: Path, road: str) -> None:
    path = rewrite(folder, lambda content: put(content, "hyper_parameters/hidden", [40_000, 20_000]))
    with pytest.raises(InputError, match=r"^expected the parameters of this net in .* size mismatch for .*20000"):
        ROADS[road](path)


@pytest.mark.parametrize(("place", "value", "sentence"), OF_RESUME, ids=range(len(OF_RESUME)))
def test_states_that_do_not_fit_the_run(folder: Path, place: str, value: Any, sentence: str) -> None:
    rewrite(folder, lambda content: put(content, place, value))
    with pytest.raises(InputError, match=f"^expected .*{sentence}"):
        go_on(folder)


COMPARED: list[tuple[str, Any, str]] = [
    ("configured/optimizer/lr", "\x1b[31m" * 100, "configured.optimizer.lr .* a number or a name or null"),
    ("configured/optimizer/lr", "x" * 1000, "optimizer.lr to be x+ …, as in .*, but it is 0.003"),
    ("configured/optimizer/betas", {"a": ["\x1b[31m"]}, r"optimizer.betas to be .*\\x1b\[31m.*, as in"),
    ("lr_schedulers/0/last_epoch", 2**50, "at most 10,000,000 steps .* claims 1,125,899,906,842,624"),
]


@pytest.mark.parametrize(("place", "value", "sentence"), COMPARED, ids=range(len(COMPARED)))
def test_what_is_compared_is_shown_short_and_escaped(folder: Path, place: str, value: Any, sentence: str) -> None:
    rewrite(folder, lambda content: put(content, place, value))
    changed = ("scheduler=step", "scheduler.interval=step") if place.startswith("lr_") else ()
    if changed:
        rewrite(folder, lambda content: content["configured"]["scheduler"].update(interval="step"))
    with pytest.raises(InputError, match=f"^expected .*{sentence}") as caught:
        go_on(folder, *changed)
    assert len(str(caught.value)) < 700
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("way", ["without a figure", "of 0.1"])
def test_odd_states_of_another_schedule(folder: Path, way: str) -> None:
    """A plateau that has kept no best figure; a file of 0.1, whose settings stand in the state of the schedule."""

    def change(content: dict[str, Any]) -> None:
        state = content["lr_schedulers"][0]
        if way == "of 0.1":
            del content["configured"]
            state.update(patience=torch.ones(2))
        else:
            del state["best"], state["cooldown_counter"]

    rewrite(folder, change)
    go_on(folder, "scheduler.patience=7")


def test_arguments_are_those_of_the_schema(original: Path, tmp_path: Path) -> None:
    """A checkpoint gives none that only a program gives."""
    shutil.copy(original / "last.ckpt", tmp_path)
    odd = {"self": 1, "metrics": {"x": 1}, "optimizer": "abc", "scheduler": 5}
    path = rewrite(tmp_path, lambda content: content["hyper_parameters"].update(odd))
    module = MLPModule.load_from_checkpoint(path)
    assert (module.optimizer, module.scheduler, module.measured) == (None, None, [])


def test_many_classes_take_no_square_of_memory(tmp_path: Path) -> None:
    """A file of 2 MB may declare them, with a bias each; a matrix of them would take 10 GB."""
    module = MLPModule(1, 50_000, class_names=list(map(str, range(50_000))), hidden=[])
    assert sum(buffer.numel() for buffer in module.buffers()) == 50_000


@pytest.mark.parametrize("more", [[], ["+callbacks.best.save_last=link"]])
def test_a_folder_in_the_place_of_a_checkpoint(folder: Path, more: list[str]) -> None:
    """Lightning would remove it to make a link."""
    (folder / "best.ckpt").unlink()
    (folder / "best.ckpt").mkdir()
    (folder / "best.ckpt" / "kept").touch()
    with pytest.raises(InputError, match=r"checkpoints to be files, but .*best\.ckpt is a folder"):
        go_on(folder, *more)
    assert (folder / "best.ckpt" / "kept").exists()


def test_parameters_alone_do_not_go_on(folder: Path) -> None:
    rewrite(folder, lambda content: content.pop("loops"))
    with pytest.raises(InputError, match=r"all that a run needs to go on, but .*last\.ckpt holds parameters alone"):
        go_on(folder)


def test_attributes_of_a_schedule_are_not_made(folder: Path) -> None:
    rewrite(folder, lambda content: content["lr_schedulers"][0].update(step=5, get_last_lr="x", optimizer=None))
    go_on(folder)


@pytest.mark.parametrize("state", [{"step_size": 0}, {"gamma": 1e308, "last_epoch": 2**50, "step_size": 1}])
def test_schedule_that_fails_at_a_step(tmp_path: Path, state: dict[str, float]) -> None:
    words = ("scheduler=step", "scheduler.step_size=1")
    training.run(configured(tmp_path, *RUN, *words))
    rewrite(tmp_path, lambda content: content["lr_schedulers"][0].update(state))
    with pytest.raises(InputError, match=r"states fit this run, but with .*last\.ckpt it fails \('?\w+Error"):
        go_on(tmp_path, *words)


class TestArchives:
    """Files that zipfile or torch would read, but torch.save did not write."""

    def packed(self, path: Path, *more: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path) as archive:
            records = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in (*records, *more):
                archive.writestr(name, content)

    def named_twice(self, path: Path) -> None:
        """A second record that lies where the first one does, and takes no room in the file."""
        with zipfile.ZipFile(path, "a") as archive:
            twin = copy.copy(max(archive.infolist(), key=lambda record: record.file_size))
            twin.filename += "2"
            archive.filelist.append(twin)
            archive._didModify = True

    def without_pickle(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("last/version", b"3")

    @pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
    @pytest.mark.parametrize(
        "change",
        [
            lambda self, path: self.packed(path, compression=zipfile.ZIP_DEFLATED),
            lambda self, path: self.packed(path, ("last/data.pkl", b"N.")),
            lambda self, path: self.packed(path, ("last/DATA.pkl", b"N.")),
            lambda self, path: self.packed(path, ("other/data.pkl", b"N.")),
            lambda self, path: path.write_bytes(b"\x80\x02N." + path.read_bytes()),
            lambda self, path: self.named_twice(path),
            lambda self, path: self.without_pickle(path),
            lambda self, path: (path.unlink(), os.mkfifo(path)),
            lambda self, path: (path.unlink(), path.symlink_to("/dev/zero")),
        ],
    )
    def test_refused(self, folder: Path, change: Callable[[object, Path], object]) -> None:
        change(self, folder / "last.ckpt")
        with pytest.raises(InputError, match=r"^expected a .*checkpoint.*last\.ckpt"):
            read_checkpoint(folder / "last.ckpt")

    def test_written_anew_as_it_was(self, folder: Path) -> None:
        self.packed(folder / "last.ckpt")
        read_checkpoint(folder / "last.ckpt")


def test_nothing_is_attached_to_what_was_read(folder: Path) -> None:
    """No attribute of a container, no memory that two tensors share."""

    def change(content: dict[str, Any]) -> None:
        content["state_dict"]._metadata = content["state_dict"].copy = 5
        content["more"] = [content["state_dict"]["net.0.bias"], content["state_dict"]["net.0.bias"][:3]]

    content = read_checkpoint(rewrite(folder, change))
    assert type(content["state_dict"]) is dict
    tensors: list[Tensor] = [content["state_dict"]["net.0.bias"], *content["more"]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 3
    go_on(folder)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.ckpt")), ids=lambda path: path.stem)
def test_checkpoints_of_01(path: Path, original: Path) -> None:
    assert "format" not in read_checkpoint(path)
    assert read_checkpoint(original / "last.ckpt")["format"] == FORMAT


class TestLeftovers:
    def dead(self) -> int:
        return int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))

    def test_of_a_killed_process_are_removed(self, tmp_path: Path) -> None:
        left = tmp_path / f".last.ckpt.{self.dead()}.part"
        mine = tmp_path / f".last.ckpt.{os.getpid()}.part"  # by a process that had this number
        others = [
            tmp_path / f".last.ckpt.{os.getppid()}.part",  # which lives
            tmp_path / f".metrics.csv.{self.dead()}.part",  # of another file
            tmp_path / f"last.ckpt.{self.dead()}.part",
            tmp_path / ".last.ckpt.1e9.part",
        ]
        best = tmp_path / f".best.ckpt.{self.dead()}.part"  # which may never be written again
        for path in (left, mine, best, *others):
            path.touch()
        (tmp_path / f".last.ckpt.{self.dead()}1.part").mkdir()
        (tmp_path / f".last.ckpt.{self.dead()}2.part").symlink_to(others[0])
        before = everything(tmp_path)
        write_whole(tmp_path / "last.ckpt", b"whole")
        assert everything(tmp_path) == before - {left, mine, best} | {tmp_path / "last.ckpt"}

    def test_a_link_in_its_place_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_text("kept")
        (tmp_path / f".x.{os.getpid()}.part").symlink_to(tmp_path / "victim")
        with pytest.raises(FileExistsError):
            write_whole(tmp_path / "x", b"new")
        assert (tmp_path / "victim").read_text() == "kept"

    def test_a_process_of_another_user_lives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(checkpoint.os, "kill", forbidden)
        assert checkpoint._lives(1)


@pytest.mark.parametrize("backprop", BACKPROP)
def test_float64_goes_on_to_the_same_bits(tmp_path: Path, backprop: str) -> None:
    words = [*RUN, "trainer.precision=64-true", "model.hidden=[5]", f"backprop={backprop}", "data.batch_size=20"]
    training.run(configured(tmp_path / "whole", *words, "trainer.max_epochs=4"))
    training.run(configured(tmp_path / "parts", *words))
    training.run(
        configured(tmp_path / "parts", *words, "trainer.max_epochs=4", f"ckpt_path={tmp_path}/parts/last.ckpt")
    )
    content = read_checkpoint(tmp_path / "parts" / "last.ckpt")
    assert content["optimizer_states"][0]["state"][0]["exp_avg"].dtype == torch.float64
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
