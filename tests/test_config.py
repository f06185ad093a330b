"""The configuration: every option composes, --help is complete, and each mistake ends in one sentence."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from manual_mlp import InputError
from manual_mlp.training.config import build, check, explain, fits, one_sentence
from tests.configs import CONF, ROOT, configured
from tests.test_data import idx_folder

OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
NEEDED = {
    "data=table": ["data.source.path=table.csv", "data.source.target=y"],
    "data=fashion_mnist": ["data.source.folder=images", "data.val_size=50"],
    "data=mnist": ["data.source.folder=images", "data.val_size=50"],
    # the engine wants a trainer to begin with
    "experiment=nielsen": ["data.source.folder=images", "data.val_size=50", "backprop=layers"],
    "experiment=nielsen_fashion": ["data.source.folder=images", "data.val_size=50", "backprop=layers"],
    "experiment=pretraining": ["backprop=layers"],
    "experiment=residual": ["backprop=layers"],
    "experiment=tabular": ["data.source.path=table.csv", "data.source.target=y"],
    "model=perceptron": ["data=halves"],
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `images` of IDX files and a file `table.csv`, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    idx_folder(tmp_path / "images")
    lines = [f"{i},{i % 7},{'yes' if i % 2 else 'no'}" for i in range(60)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,y", *lines]))


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run train.py's own code with a command line; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return exit.value.code


class TestGroups:
    @pytest.mark.usefixtures("inputs")
    @pytest.mark.parametrize("option", OPTIONS)
    def test_option_composes_and_builds(self, tmp_path: Path, option: str) -> None:
        cfg = configured(tmp_path, option, *NEEDED.get(option, []))
        check(cfg)
        if option in ("logger=wandb", "logger=mlflow"):
            pytest.importorskip(option.partition("=")[2])
        from manual_mlp.training import run

        data = build(cfg.data)
        data.setup()
        module = run._module(cfg, data)
        assert module.configure_optimizers()
        run._trainer(cfg)

    @pytest.mark.usefixtures("inputs")
    def test_experiment_sets_what_it_says(self, tmp_path: Path) -> None:
        for name, data in (("nielsen", "mnist"), ("nielsen_fashion", "fashion_mnist")):
            cfg = configured(tmp_path, f"experiment={name}")
            assert cfg.data.name == data
            assert (cfg.model.hidden, cfg.model.initialisation, cfg.optimizer.lr) == ([30], "nielsen", 3.0)
            assert (cfg.data.batch_size, cfg.trainer.max_epochs, cfg.data.val_size) == (10, 30, 10000)
            assert cfg.optimizer._target_ == "torch.optim.SGD"

    def test_command_line_wins(self, tmp_path: Path) -> None:
        cfg = configured(tmp_path, "experiment=regression", "optimizer=sgd", "model.hidden=[7]", "seed=5")
        assert cfg.optimizer._target_ == "torch.optim.SGD"
        assert cfg.model.hidden == [7]
        assert cfg.data.seed == 5

    def test_default_is_plain_gradient_descent_with_step_5(self, tmp_path: Path) -> None:
        cfg = configured(tmp_path)
        assert (cfg.data.name, cfg.model.hidden, cfg.model.loss) == ("digits", [30], "quadratic")
        assert self.optimizer(cfg) == {"class": torch.optim.SGD, "lr": 5.0, "momentum": 0.0, "weight_decay": 0.0}
        assert cfg.trainer.accelerator == "auto"

    @pytest.mark.parametrize(
        ("overrides", "lr"),
        [
            (["model.hidden=[]"], 5.0),
            (["model.hidden=[5,4]", "model.activation=[sigmoid,sigmoid]"], 5.0),
            (["model.activation=relu"], 0.1),
            (["model.hidden=[5,4]", "model.activation=[sigmoid,tanh]"], 0.1),
            (["model.loss=mse"], 0.1),
            (["model.loss=mse", "optimizer.lr=3"], 3),
            (["data=diabetes", "optimizer=sgd"], 0.1),
            (["data=diabetes"], 0.003),
        ],
    )
    def test_step_follows_activations_cost_and_task(self, tmp_path: Path, overrides: list[str], lr: float) -> None:
        assert self.optimizer(configured(tmp_path, *overrides))["lr"] == lr

    def test_another_class_has_its_own_defaults(self, tmp_path: Path) -> None:
        rprop = "optimizer._target_=torch.optim.Rprop"
        assert self.optimizer(configured(tmp_path, rprop)) == {"class": torch.optim.Rprop}
        assert self.optimizer(configured(tmp_path, rprop, "optimizer.lr=1"))["lr"] == 1
        with pytest.raises(InputError, match=r"argument of torch.optim.Rprop, but got optimizer.momentum"):
            check(configured(tmp_path, rprop, "optimizer.momentum=0.9"))

    def optimizer(self, cfg: DictConfig) -> dict[str, Any]:
        """What a run makes its optimizer of."""
        from manual_mlp.training import run

        check(cfg)
        data = build(cfg.data)
        data.setup()
        made = run._module(cfg, data).optimizer
        return {"class": made.func, **made.keywords}


class TestHelp:
    def test_is_one_screen_and_complete(self) -> None:
        job = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
        assert job.returncode == 0
        lines = job.stdout.splitlines()
        assert len(lines) <= 40
        assert max(len(line) for line in lines if "train.py" not in line) <= 80
        assert sum("train.py" in line for line in lines) == 4  # which begin as this Python was called
        words = set(re.sub("[,;:]", " ", job.stdout).split())
        for group, name in (option.split("=") for option in OPTIONS):
            assert group in words
            assert name in words


class TestSentences:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["model.hiden=[3]"], "expected a key of model, but got model.hiden; did you mean model.hidden?"),
            (["trainer.max_epoch=3"], "a key of trainer, but got trainer.max_epoch; did you mean trainer.max_epochs?"),
            (["data.source.nme=x"], "a key of data.source, but got data.source.nme; did you mean data.source.name?"),
            (["modle=mlp"], "expected a group or a key, but got modle; did you mean model?"),
            (["modle.hidden=[3]"], "expected a group or a key, but got modle; did you mean model?"),
            (["sead=3"], "did you mean seed?"),
            (["lr=0.1"], "expected a group or a key, but got lr; did you mean optimizer.lr?"),
            (["hidden=[5]"], "got hidden; did you mean model.hidden?"),
            (["batch_size=32"], "got batch_size; did you mean data.batch_size?"),
            (["epochs=3"], "got epochs; did you mean trainer.max_epochs?"),
            (["nonsense=3"], "got nonsense; known are task, ckpt_path, "),
            (
                ["experiment=nope"],
                "got experiment=nope; known are batch_norm, chain, deep_sigmoid, digits, lenet, linear_neuron, ",
            ),
            (["data=digit"], "expected a known choice for data, but got data=digit; did you mean digits?"),
            (["optimizer=sdg"], "did you mean sgd?"),
            (["model.hidden=[3"], "an override of the form key=value, but got 'model.hidden=[3'"),
            (["input=my data (1).csv"], """quote it, for Hydra and the shell: "input='my data (1).csv'\""""),
            (["lr"], "an override of the form key=value, but got 'lr'"),
            (["seed=1,2"], "expected one value, but got several in seed=1,2; write [1,2] for a list, or add -m"),
            (["+seed=1"], "An item is already at 'seed'; Either remove + prefix: 'seed=1'"),
            (["~nope"], "'nope' does not exist"),
            (["logger=null"], "the name of a choice for each group, but got null; leave a group out with ~"),
            (["callbacks=null"], "the name of a choice for each group, but got null; leave a group out with ~"),
            (["data=[iris,1]"], "the name of a choice for each group, but: argument of type 'int' is not iterable"),
            (["=3"], "Got int; write it as in data=iris"),
            (["-m", "--cfg", "job"], "flags and overrides that fit the configuration, but: Only one of"),
            (["--resolve", "data=iris"], "flags and overrides that fit the configuration, but: The --resolve flag"),
            (
                ["hydra.job_logging.version=5"],
                "flags and overrides that fit the configuration, but: Unsupported version",
            ),
            (["metrics=3"], "metrics.NAME to have a _target_, or to be null, but got 3; name a class in metrics"),
            (["--config-name=foo"], "--config-name and --config-path to lead to a configuration, but there is none"),
            (["--config-dir=/nowhere"], "overrides that fit the configuration, but: Additional config directory"),
            pytest.param(
                ["-m", "hydra/sweeper=optuna"],
                "-m pip install hydra-joblib-launcher hydra-optuna-sweeper",
                marks=pytest.mark.skipif(find_spec("optuna") is not None, reason="it is installed"),
            ),
            (["-m", "model.hiden=[3],[4]"], "did you mean model.hidden?"),
        ],
    )
    def test_mistyped_override(self, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str) -> None:
        message = main(monkeypatch, *arguments)
        assert message.startswith("Error: expected ")
        assert sentence in message
        assert "\n" not in message

    def test_output_folder_that_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("in the way")
        for key in ("hydra.run.dir", "-m hydra.sweep.dir"):
            arguments = f"{key}={tmp_path}/file/folder".split()
            message = main(monkeypatch, *arguments)
            assert "expected an output folder that can be written" in message
            assert "hydra.run.dir=…" in message

    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            (["trainer.max_epochs=abc"], r"trainer.max_epochs to be a whole number or null, but got 'abc'"),
            (["trainer.max_epochs=1.5"], r"trainer.max_epochs to be a whole number or null, but got 1.5"),
            (["trainer.precision=17"], r"trainer.precision to be 64 or 32 .* but got 17"),
            (["seed=x"], r"expected seed to be a whole number, but got 'x'"),
            (["seed={a:1}"], r"expected seed to be a whole number, but got \{'a': 1\}"),
            (["data.batch_size={}"], r"data.batch_size to be a whole number, but got \{\}"),
            (["data.source._partial_=1"], r"data.source._partial_ to be true or false, but got 1"),
            (["data._target_=json"], r"data._target_ to name a class or function, but there is no json"),
            (["data.batch_size=ten"], r"data.batch_size to be a whole number, but got 'ten'"),
            (["model.residual=0"], r"model.residual to be true or false, but got 0; correct"),  # not even its default
            (["model.bias=1"], r"model.bias to be true or false, but got 1; correct"),
            (["model.l1=false"], r"model.l1 to be a number, but got False; correct"),
            (["data.standardise=maybe"], r"data.standardise to be true or false, but got 'maybe'"),
            (["optimized_metric=3"], r"optimized_metric to be text, but got 3"),
            (["model.hidden=30"], r"model.hidden to be a list of whole numbers, but got 30"),
            (["model.hidden=[3.5]"], r"model.hidden to be a list of whole numbers, but got \[3.5\]"),
            (["model.activation=3"], r"model.activation to be text or a list of texts, but got 3"),
            (["model.dropout=high"], r"model.dropout to be a number, but got 'high'"),
            (["optimizer.lr=" + "9" * 30], r"optimizer.lr to be .*a number.*, but got 999"),
            (["optimizer.lr=fast"], r"optimizer.lr to be a number, but got 'fast'"),
            (["callbacks=early_stopping", "callbacks.early_stopping.patience=x"], r"patience to be a whole number"),
            (
                ["+trainer.precison=16"],
                r"an argument of lightning.Trainer, but got trainer.precison; did you mean prec",
            ),
            (["+optimizer.momentun=0.9"], r"did you mean momentum\?"),
            (["optimizer._target_=torch.optim.SDG"], r"no torch.optim.SDG; did you mean torch.optim.SGD\?"),
            (["optimizer._target_=torchh.SGD"], r"no torchh.SGD; check its spelling"),
        ],
    )
    def test_wrong_value(self, tmp_path: Path, overrides: list[str], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            check(configured(tmp_path, *overrides))

    def test_targets_whose_types_cannot_be_read(self, tmp_path: Path) -> None:
        node = {"_target_": "torch.optim.lr_scheduler.CyclicLR", "_partial_": True, "base_lr": 0.1}
        check(OmegaConf.create({"scheduler": node}))
        with pytest.raises(InputError, match=r"did you mean base_lr\?"):
            check(OmegaConf.create({"scheduler": {**node, "bas_lr": 1}}))

    def test_a_constructor_that_refuses(self) -> None:
        node = {"_target_": "manual_mlp.training.callbacks.DeltaFlow", "every": 0}
        with pytest.raises(InputError, match=r"^expected DeltaFlow's every and rows to be 1 or more, but got 0, 32"):
            build(OmegaConf.create(node))

    def test_missing_value(self, tmp_path: Path) -> None:
        with pytest.raises(MissingMandatoryValue) as missing:
            check(configured(tmp_path, "data=table"))
        assert explain(missing.value) == (
            "expected a value for data.source.path, but got none; add data.source.path=… to the command"
        )

    def test_whole_program(self, tmp_path: Path) -> None:
        """From the command line: one line on stderr, exit code 1, no traceback."""
        command = [sys.executable, str(ROOT / "train.py"), "trainer.max_epochs=abc"]
        job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert job.returncode == 1
        assert job.stderr == (
            "Error: expected trainer.max_epochs to be a whole number or null, but got 'abc'; correct its value\n"
        )

    @pytest.mark.slow
    def test_a_bug_keeps_its_traceback(self, tmp_path: Path) -> None:
        (tmp_path / "broken.py").write_text("def source():\n    raise KeyError('a bug')\n")
        command = [sys.executable, str(ROOT / "train.py"), "data.source._target_=broken.source", "~data.source.name"]
        environment = {**os.environ, "PYTHONPATH": "."}
        job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert job.returncode == 1
        assert "Traceback" in job.stderr
        assert "KeyError: 'a bug'" in job.stderr

    def test_bugs_pass_through(self) -> None:
        for error in (ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug"), InstantiationException("a bug")):
            with pytest.raises(type(error)), one_sentence():
                _raise_in_job(error)
        for error in (
            MemoryError(),
            MemoryError("Unable to allocate"),
            RuntimeError("can't allocate memory: you tried"),
        ):
            with (
                pytest.raises(SystemExit, match="Error: expected a net and data that fit into memory, but"),
                one_sentence(),
            ):
                _raise_in_job(error)
        with pytest.raises(SystemExit, match="Error: what, and why"), one_sentence():
            raise InputError("what, and why")


def _raise_in_job(error: Exception) -> None:
    """Raise as if from the module that runs the job."""
    exec("raise error", {"__name__": "manual_mlp.training.run", "error": error})


class TestTypes:
    @pytest.mark.parametrize(
        ("value", "hint", "expected"),
        [
            (1, int, True), (True, int, False), (1, bool, False), (1, float, True), ("1", float, False),
            (None, int | None, True), (None, int, False), ("a", Literal["a", "b"], True), ("c", Literal["a"], False),
            ([1, 2], list[int], True), ([1, "a"], Sequence[int], False), ("ab", Sequence[str], False),
            (["a"], str | Sequence[str], True), ("x", Path, True), ("x", float | np.ndarray, False),
            ({"_target_": "x"}, np.ndarray, True), ([0.9, 0.99], tuple[float, float], True), (object(), Any, True),
        ],
    )  # fmt: skip
    def test_fits(self, value: object, hint: Any, expected: bool) -> None:
        assert fits(value, hint) is expected
