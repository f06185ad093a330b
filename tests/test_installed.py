"""The package installed: from a wheel, beside a clone, as editable, by way of an sdist; and its one command."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from sklearn.datasets import load_iris

from manual_mlp import __main__ as program
from manual_mlp.shell import EXTRAS, command, install
from manual_mlp.training import command_line, run
from tests.configs import ROOT, configured

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON = shlex.quote(sys.executable)
RUN = ["data=iris", "trainer.max_epochs=1", "report=false", "threads=1"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what is built, because building writes beside it."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("manual_mlp", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def built(kind: str, source: Path, folder: Path) -> Path:
    """The sdist or wheel that setuptools makes of a source, in a folder."""
    code = f"import setuptools.build_meta as meta; meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (made,) = folder.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return made


class Environment:
    """A new virtual environment with one installation. It finds all other packages where these tests find them."""

    def __init__(self, folder: Path, *what: str) -> None:
        self.bin, self.empty = folder / "venv" / "bin", folder / "empty"
        self.empty.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.bin.parent], check=True)
        others = sysconfig.get_path("purelib")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--no-deps", "--no-index"]
        env = {**os.environ, "PYTHONPATH": others}  # which has setuptools
        line = [*pip, "--no-build-isolation", *what]
        done = subprocess.run(line, capture_output=True, text=True, cwd=self.empty, env=env)
        assert done.returncode == 0, done.stderr
        (own,) = self.bin.parent.rglob("site-packages")
        (own / "zz_others.pth").write_text(others)  # searched last, and no .pth in it is obeyed

    def run(self, line: str, cwd: Path | None = None, code: int = 0) -> str:
        """What a shell line prints, from an empty folder."""
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
        job = subprocess.run(line, cwd=cwd or self.empty, env=env, capture_output=True, text=True, shell=True)
        assert job.returncode == code, job.stdout + job.stderr
        return job.stdout if code == 0 else job.stderr

    def trains(self, line: str = "manual-mlp", cwd: Path | None = None) -> None:
        assert "net         4-30-3" in self.run(f"{line} {' '.join(RUN)} hydra.run.dir=r", cwd)
        assert (cwd or self.empty).joinpath("r", "best.ckpt").is_file()

    def configuration(self, cwd: Path | None = None, line: str = "manual-mlp") -> Path:
        """The folder that Hydra reads."""
        return Path(re.findall(r"main \s*\| file://(\S+)", self.run(f"{line} --info searchpath", cwd))[0])


@pytest.mark.slow
class TestWays:
    def test_wheel(self, tmp_path: Path, clone: Path) -> None:
        there = Environment(tmp_path, str(built("wheel", clone, tmp_path)))
        shutil.rmtree(clone)
        there.trains()
        assert there.configuration().parts[-3:] == ("site-packages", "manual_mlp", "conf")
        assert "manual-mlp data=moons" in there.run("manual-mlp --help")
        assert "manual-mlp data=moons" in there.run(f"{there.bin / 'manual-mlp'} --help")
        assert "The essentials" in there.run("manual-mlp lecture")
        rows = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,.2\n"
        (there.empty / "new.csv").write_text(rows)
        assert "predictions for 1 row" in there.run(
            "manual-mlp predict ckpt_path=r/best.ckpt input=new.csv output=o.csv"
        )
        assert "checkpoint of 0" in there.run("manual-mlp test ckpt_path=r/best.ckpt data=iris threads=1")

    def test_no_conf_of_the_working_directory(self, tmp_path: Path, clone: Path) -> None:
        there = Environment(tmp_path, str(built("wheel", clone, tmp_path)))
        for place in ("conf", "manual_mlp/conf"):
            (there.empty / place).mkdir(parents=True)
            (there.empty / place / "config.yaml").write_text("task: mine\n")
        assert "task: train" in there.run("manual-mlp --cfg job")

    def test_a_printed_command_runs_when_pasted(self, tmp_path: Path, clone: Path) -> None:
        there = Environment(tmp_path, str(built("wheel", clone, tmp_path)))
        there.trains("manual-mlp '+metrics.f1={_target_: torchmetrics.F1Score, average: macro}'")
        for line in ("manual-mlp", "python -m manual_mlp", f"python '{clone / 'train.py'}'"):
            said = there.run(f"{line} ckpt_path=r/last.ckpt trainer.max_epochs=2", code=1)
            pasted = said.partition("if you trust it:\n")[2].strip()
            assert pasted.startswith(line.replace("'", ""))
            assert "F1Score" in there.run(f"{pasted} --cfg job")

    def test_wheel_beside_a_clone(self, tmp_path: Path, clone: Path) -> None:
        there = Environment(tmp_path, str(built("wheel", clone, tmp_path)))
        there.trains(cwd=clone)
        assert there.configuration(clone).parts[-3:] == ("site-packages", "manual_mlp", "conf")
        shutil.rmtree(clone / "r")
        there.trains("python train.py", clone)
        assert there.configuration(clone, "python train.py") == clone / "conf"

    def test_editable(self, tmp_path: Path, clone: Path) -> None:
        there = Environment(tmp_path, "--editable", str(clone))
        there.trains()
        assert there.configuration() == clone / "conf"

    def test_sdist_to_wheel(self, tmp_path: Path, clone: Path) -> None:
        sdist = built("sdist", clone, tmp_path)
        shutil.rmtree(clone)
        shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
        (source,) = (tmp_path / "unpacked").iterdir()
        assert (source / "conf" / "config.yaml").is_file()
        there = Environment(tmp_path, str(built("wheel", source, tmp_path)))
        shutil.rmtree(source)
        there.trains()


class TestProject:
    def test_every_package_is_listed(self) -> None:
        found = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("manual_mlp/**/__init__.py")}
        assert found | {"manual_mlp.conf"} == {*PROJECT["tool"]["setuptools"]["packages"]}
        assert PROJECT["tool"]["setuptools"]["package-dir"]["manual_mlp.conf"] == "conf"

    def test_what_extras_bring(self) -> None:
        """An error names packages that are published, not this one."""
        optional = PROJECT["project"]["optional-dependencies"]
        brought = {name: tuple(re.match(r"[\w-]+", word)[0] for word in optional[name]) for name in EXTRAS}  # type: ignore[index]
        assert brought == EXTRAS
        assert install("table").endswith("-m pip install pandas pyarrow")
        for path in [*ROOT.glob("manual_mlp/**/*.py"), *ROOT.glob("conf/**/*.yaml")]:
            assert "manual-mlp[" not in path.read_text()


class TestCommands:
    @pytest.mark.parametrize(
        ("words", "called", "given"),
        [
            (["train", "data=iris"], "training.command_line", ["data=iris"]),
            (["predict", "input=x"], "training.command_line", ["task=predict", "input=x"]),
            (["test"], "training.command_line", ["task=test"]),
            (["lecture", "pictures"], "lecture", ["pictures"]),
            (["battery", "--compile"], "testing.__main__", ["--compile"]),
            (["benchmark"], "benchmark", []),
            *(
                ([word], "training.command_line", [word])
                for word in ("-m", "--help", "~logger", "data=iris", "+a=1", "a.b=1")
            ),
            ([], "training.command_line", []),
        ],
    )
    def test_first_word(self, monkeypatch: pytest.MonkeyPatch, words: list[str], called: str, given: list[str]) -> None:
        calls = []
        fake = type("module", (), {"main": lambda arguments: calls.append(arguments)})
        monkeypatch.setattr(program, "import_module", lambda name: calls.append(name) or fake)
        monkeypatch.setattr(sys, "argv", ["manual-mlp", *words])
        assert program.main() is None
        assert calls == [f"manual_mlp.{called}", given]

    @pytest.mark.parametrize(("word", "fix"), [("predcit", "did you mean predict?"), ("iris", "the form key=value")])
    def test_another_word(self, monkeypatch: pytest.MonkeyPatch, word: str, fix: str) -> None:
        monkeypatch.setattr(sys, "argv", ["manual-mlp", word])
        with pytest.raises(SystemExit, match=rf"one of train, test, predict, .*, but got {word}; .*{re.escape(fix)}"):
            program.main()

    @pytest.mark.parametrize(
        ("called", "line", "shared"),
        [
            ("/x/bin/manual-mlp", "/x/bin/manual-mlp", "manual-mlp"),
            ("my code/train.py", f"{PYTHON} 'my code/train.py'", "python train.py"),
            ("/x/manual_mlp/__main__.py", f"{PYTHON} -m manual_mlp", "python -m manual_mlp"),
            ("/x/pytest", f"{PYTHON} train.py", "python train.py"),
        ],
    )
    def test_printed_as_it_was_called(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str, line: str, shared: str
    ) -> None:
        monkeypatch.setattr(sys, "argv", [called])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert command("a=1") == f"{line} a=1"
        assert command("a=1", shared=True) == f"{shared} a=1"
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/x/bin")
        assert command("a=1") == f"{line} a=1".replace(PYTHON, "python")


class TestStart:
    @pytest.mark.parametrize("words", [["--help"], ["optimzer.lr=1"], ["data=digit"], ["lr=0.1"], ["-m", "lr=1,2"]])
    def test_brings_no_torch(self, tmp_path: Path, words: list[str]) -> None:
        job = self.start(tmp_path, "torch", *words)
        assert ("Groups" in job.stdout) if words == ["--help"] else ("did you mean" in job.stderr)

    def test_a_prediction_brings_neither_lightning_nor_scikit_learn(self, tmp_path: Path) -> None:
        job = self.start(tmp_path, "lightning sklearn torchmetrics", "predict", "ckpt_path=none.ckpt", "input=new.csv")
        assert "expected a checkpoint at none.ckpt" in job.stderr

    def start(self, cwd: Path, without: str, *words: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.modules.update(dict.fromkeys({without.split()}))\n"
        code += "from manual_mlp.__main__ import main; main()"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        job = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, env=env)
        assert "Traceback" not in job.stderr
        assert [*cwd.iterdir()] == []
        return job


class TestRefused:
    """A refused run leaves no folder that it has made itself; what others have put there stays."""

    @pytest.fixture
    def refuse(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """refuse(*words): train.py's command line in tmp_path, which ends with a sentence."""

        def refuse(*words: str) -> None:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", ["train.py", *words])
            with pytest.raises(SystemExit, match="Error: expected "):
                command_line.main()

        return refuse

    @pytest.mark.parametrize(
        "words",
        [
            ["model.activation=rellu"],
            ["task=predict", "ckpt_path=none", "input=none", "hydra.run.dir=a/b"],
            ["task=test", "ckpt_path=none", "hydra.job.chdir=true"],
            ["data=table", "data.source.path=x.csv", "data.source.target=y"],
            ["-m", "model.hiden=[3],[4]"],
        ],
    )
    def test_leaves_nothing(self, tmp_path: Path, refuse, words: list[str]) -> None:
        refuse(*words)
        assert [*tmp_path.iterdir()] == []

    @pytest.mark.parametrize("many", [False, True])
    def test_predictions_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
        """Nothing is left beside the predictions: no log, no configuration, and no folder if they lie elsewhere."""
        run.run(configured(tmp_path / "r", "data=iris", "trainer.max_epochs=1", "report=false"))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "new.csv").write_text(f"{','.join(load_iris().feature_names)}\n5,3,4,1\n")
        before = {*tmp_path.rglob("*")}

        def predict(*words: str) -> set[str]:
            more = ["-m", "seed=0,1"] if many else []
            arguments = ["train.py", "task=predict", "ckpt_path=r/best.ckpt", "input=new.csv", *words, *more]
            monkeypatch.setattr(sys, "argv", arguments)
            command_line.main()
            return {path.name for path in {*tmp_path.rglob("*")} - before if path.is_file()}

        assert predict("output=p.csv") == {"p.csv"}
        assert {*tmp_path.iterdir()} == {tmp_path / name for name in ("r", "new.csv", "p.csv")}
        assert predict() - {"multirun.yaml"} == {"p.csv", "predictions.csv"}

    def test_leaves_what_was_there(self, tmp_path: Path, refuse) -> None:
        (tmp_path / "outputs").mkdir()
        refuse("task=predict", "ckpt_path=none", "input=none")
        assert [*tmp_path.rglob("*")] == [tmp_path / "outputs"]
        (tmp_path / "r" / ".hydra").mkdir(parents=True)
        (tmp_path / "r" / "mine.txt").touch()
        refuse("task=predict", "ckpt_path=none", "input=none", "hydra.run.dir=r")
        assert (tmp_path / "r" / "mine.txt").exists()
