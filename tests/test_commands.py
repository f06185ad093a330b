"""`ckpt_path` on the command line: what a run folder may decide, what only the user may, and the commands printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from manual_mlp import InputError
from manual_mlp.errors import shown
from manual_mlp.shell import command, override, python
from manual_mlp.training.command_line import MOST, PLACE, WORD, is_plain, read_overrides, with_its_own_overrides
from manual_mlp.training.config import shipped
from tests.configs import CONF, ROOT, configured

PARSE = OverridesParser.create().parse_overrides
PLAIN = [
    "data=iris", "experiment=xor", "scheduler=null", "optimizer.lr=2", "optimizer.lr=1e-3", "optimizer.lr=auto",
    "model.hidden=[30,20]", "model.hidden=[]", "model.activation=[relu,tanh]", "trainer.precision=bf16-mixed",
    "model.loss=cross_entropy", "callbacks.delta_flow=null", "logger.csv=null", "data.source.noise=0.3", "seed=7",
    "trainer.max_epochs=-1", "data.class_weight=[1,2.5]", "data.class_weight=balanced", "data.name='iris'",
    "data.source.target='Größe'", "report=false", "trainer.gradient_clip_val=null", "threads=2", "logger=tensorboard",
]  # fmt: skip
REFUSED = [
    "+callbacks.e._target_=sympy.sympify", "optimizer._target_=torch.optim.Rprop", "~logger", "~callbacks.delta_flow",
    "+metrics.f1._target_=torchmetrics.F1Score", "++seed=1", "+seed=1", "hydra.run.dir=/tmp", "hydra.mode=MULTIRUN",
    "hydra/launcher=joblib", "experiment=mine", "data=mine", "modle=mlp", "model.hiden=3", "model@data=mlp",
    "data.name=${oc.env:HOME}", "seed=${seed}", "optimizer.lr=1,2", "seed=range(1,3)", "seed=choice(1,2)",
    "data=glob(*)",
    "data.source={_target_:os.system,command:ls}", "model.hidden=[{a:1}]", "model.hidden=[[1]]", "callbacks=[default]",
    "data.source.path=my.csv", "data.source.path=word", "data.source.path=/etc/passwd", "data.source.folder=images",
    "data.source._partial_=false", "data.source.target=../up", "data.name=http://host/x", "run_dir=there", "output=o",
    "ckpt_path=x", "callbacks.best.dirpath=there", "callbacks.best.filename=x", "logger.csv.save_dir=there",
    "trainer.default_root_dir=there", "logger.mlflow.tracking_uri=there", "logger.wandb.offline=false", "input=new",
    "callbacks.best=7", "data.source=word", "data.source.target='petal length (cm)'", "data=", "optimizer.lr=''",
    "defaults=x", "data.name='\x1b[31m'", "model.loss='a b'", "=3", "_target_=x", "model._target_=x",
]  # fmt: skip


def folder_of(path: Path, *overrides: str) -> str:
    """A run folder with these overrides, and its last checkpoint's `ckpt_path=…`."""
    (path / ".hydra").mkdir(parents=True, exist_ok=True)
    (path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides), allow_unicode=False))
    return override("ckpt_path", path / "last.ckpt")


def printed(error: pytest.ExceptionInfo) -> list[str]:
    """The words of the command that an error ends with, as a shell splits them, without python and train.py."""
    return read_by_shell(str(error.value).partition("\n")[2], "/bin/sh")[1:]


def read_by_shell(line: str, shell: str) -> list[str]:
    """What python would be given."""
    assert line.isprintable()
    if "$(" not in line:
        return shlex.split(line)[1:]
    echo = "import sys; sys.stdout.buffer.write('\\0'.join(sys.argv[1:]).encode(errors='surrogateescape'))"
    line = shlex.join([sys.executable, "-c", echo]) + line.removeprefix(python())
    job = subprocess.run(line, shell=True, executable=shell, capture_output=True, check=True)
    return job.stdout.decode(errors="surrogateescape").split("\0")


class TestCommand:
    @settings(max_examples=80, deadline=None)
    @given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12))
    @example("${a}")
    @example("\\${a}\\")
    @example("null")
    @example('it\'s "$HOME" (1), [2]=3 ~ {4:5} \\')
    def test_hydra_reads_the_text_again(self, text: str) -> None:
        (word,) = PARSE([override("key", text)])
        assert OmegaConf.create({"key": word.value()}).key == text

    def test_any_shell_reads_the_words_again(self) -> None:
        texts = [
            "a b",
            "it's",
            '"',
            "$HOME",
            "`id`",
            "(1)",
            "a,b=c",
            "~",
            "*",
            "!!",
            "a\\nb",
            "\\",
            "ä€\u00a0\u202e",
            ";&|<>",
            "#",
        ]
        texts += ["\x1b[31m", "line\nline\n", "\t\x07'%s%b\\0101\\", "-n", "${a}", "\udcff"]
        words = [override("key", text) for text in texts]
        for shell in ("/bin/sh", "/bin/bash"):
            if os.path.exists(shell):
                assert read_by_shell(command(*words), shell) == ["train.py", *words]

    def test_named_as_it_was_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["my code/train.py"])
        assert command("a=1") == f"{python()} 'my code/train.py' a=1"


class TestFolder:
    """What a folder may decide."""

    @pytest.mark.parametrize("text", PLAIN)
    def test_plain(self, tmp_path: Path, text: str) -> None:
        given_now = folder_of(tmp_path, text)
        assert with_its_own_overrides([given_now]) == [text, "hydra.mode=RUN", f"hydra.run.dir={tmp_path}", given_now]

    @pytest.mark.parametrize("text", REFUSED)
    def test_refused(self, tmp_path: Path, text: str) -> None:
        """It is shown in a whole command, with which the run goes on."""
        given_now = folder_of(tmp_path, "data=iris", text)
        if text == "ckpt_path=x":  # the command line has another one
            assert text not in with_its_own_overrides([given_now])
            return
        with pytest.raises(InputError, match="only you can decide that") as error:
            with_its_own_overrides(["trainer.max_epochs=4", given_now])
        assert shown(text) in str(error.value).partition("\n")[0]
        assert printed(error) == ["data=iris", text, "trainer.max_epochs=4", given_now]
        accepted = with_its_own_overrides(printed(error))
        assert accepted[-4:] == printed(error)
        assert all(word.startswith("hydra.") for word in accepted[:-4])

    @pytest.mark.parametrize("text", REFUSED)
    def test_test_and_predict_need_none(self, tmp_path: Path, text: str) -> None:
        given_now = folder_of(tmp_path, "data=iris", "optimizer.lr=2", text)
        assert with_its_own_overrides([given_now, "task=predict"]) == [given_now, "task=predict"]
        (word,) = read_overrides(yaml.safe_dump([text]))
        if word.key_or_group.startswith(("data", "exp", "seed")):
            with pytest.raises(InputError, match="only you can decide"):
                with_its_own_overrides([given_now, "task=test"])
        else:
            words = with_its_own_overrides([given_now, "task=test"])
            assert words == ["data=iris", "optimizer.lr=2", "hydra.mode=RUN", given_now, "task=test"]

    def test_every_shipped_place_is_known(self) -> None:
        """A new key of conf/ whose value is a file, a folder or an address has a name that says so."""
        assert set(shipped()[0]) == {path.name for path in CONF.iterdir() if path.is_dir()}
        values = re.compile(r"^ *(\w+): .*(/[a-z]|run_dir)", re.MULTILINE)
        for path in (path for path in CONF.rglob("*.yaml") if path.name != "config.yaml"):
            assert [name for name, _ in values.findall(path.read_text()) if not PLACE.search(name)] == []

    @settings(max_examples=80, deadline=None)
    @given(st.text(max_size=60) | st.lists(st.text(max_size=20)).map(lambda words: yaml.safe_dump(words)))
    def test_any_text(self, text: str) -> None:
        try:
            words = read_overrides(text)
        except InputError:
            return
        groups, keys = shipped()
        for word in words:
            if is_plain(word):
                (again,) = PARSE([word.input_line])
                key, value = again.key_or_group, again.value()
                items = value if isinstance(value, list) else [value]
                assert word.input_line.startswith(f"{key}=")
                assert key in groups or (key in keys and not any(part.startswith("_") for part in key.split(".")))
                assert all(not isinstance(item, str) or WORD.fullmatch(item) for item in items)

    @pytest.mark.parametrize(
        "text",
        [
            "5", "a: 1", "- [1]", "- {a: 1}", "- &a [*a]", "[" * 400, "- a=" + "[" * 1200, "- a=" + "9" * 5000,
            '- "\\U99999999"',
            "- !!python/object/apply:os.system [touch x]", '- "a=\\0"', "- 'a'", "\x00", "- a=1\n" * MOST,
            "- a=sort(range(0,1000000000000))x", "%YAML 9.9\n---\n- a=1\n...\n-", "",
        ],
    )  # fmt: skip
    def test_damage(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(InputError, match=r"expected the overrides of a run, as Hydra writes them, but: .+; delete"):
            read_overrides(text)
        given_now = folder_of(tmp_path)
        (tmp_path / ".hydra" / "overrides.yaml").write_text(text)
        assert with_its_own_overrides(["task=test", given_now]) == ["task=test", given_now]
        with pytest.raises(InputError, match=r"overrides\.yaml"):
            with_its_own_overrides([given_now])

    def test_not_utf_8_or_no_file(self, tmp_path: Path) -> None:
        given_now = folder_of(tmp_path)
        (tmp_path / ".hydra" / "overrides.yaml").write_bytes(b"- a\xff")
        with pytest.raises(InputError, match=r"overrides.yaml can't be read: .*utf-8"):
            with_its_own_overrides([given_now])
        (tmp_path / ".hydra" / "overrides.yaml").unlink()
        os.mkfifo(tmp_path / ".hydra" / "overrides.yaml")  # would never come to its end
        assert with_its_own_overrides([given_now]) == [given_now]

    @pytest.mark.parametrize("name", ["train.log", ".hydra/config.yaml", ".hydra", "figures.json"])
    def test_links_are_not_followed(self, tmp_path: Path, name: str) -> None:
        folder_of(tmp_path / "elsewhere")
        given_now = (
            folder_of(tmp_path / "run") if name != ".hydra" else override("ckpt_path", tmp_path / "run" / "last.ckpt")
        )
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / Path(name).name)
        with pytest.raises(InputError, match=f"a run folder of files alone, but .*{name} leads elsewhere"):
            with_its_own_overrides([given_now])
        assert with_its_own_overrides([given_now, "task=test"])[-1] == "task=test"

    def test_other_configurations(self, tmp_path: Path) -> None:
        given_now = folder_of(tmp_path, "experiment=mine")
        runtime = {"config_sources": [{"path": "/my conf", "schema": "file", "provider": "command-line"}]}
        hydra = {"hydra": {"job": {"config_name": "config"}, "runtime": runtime}}
        (tmp_path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
        with pytest.raises(InputError) as error:
            with_its_own_overrides([given_now])
        assert printed(error) == ["--config-dir=/my conf", "experiment=mine", given_now]
        with pytest.raises(InputError) as error:
            with_its_own_overrides([given_now, "--config-dir", "other"])
        assert printed(error) == ["--config-dir=other", "experiment=mine", given_now]
        folder_of(tmp_path)  # nothing came from there
        assert with_its_own_overrides([given_now])[-1] == given_now
        hydra["hydra"]["job"]["config_name"] = "mine"
        (tmp_path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
        with pytest.raises(InputError, match="asks for --config-name=mine, --config-dir=/my conf"):
            with_its_own_overrides([given_now])
        assert with_its_own_overrides([given_now, "-cn", "mine"])[0] == "--config-name=mine"


class TestGiven:
    """What the command line gives wins."""

    def test_in_its_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "a 'b' (1), $c=d"
        given_now = folder_of(path, "data=iris", "optimizer.lr=2", "task=train", "ckpt_path=old.ckpt")
        data, _, folder, *last = with_its_own_overrides(["optimizer.lr=3", given_now])
        assert (data, last) == ("data=iris", ["optimizer.lr=3", given_now])
        (where,) = PARSE([folder])
        assert where.key_or_group == "hydra.run.dir"
        assert OmegaConf.create({"dir": where.value()}).dir == str(path)

    def test_refused_ones_given_anew(self, tmp_path: Path) -> None:
        given_now = folder_of(tmp_path, "data=table", "data.source.path=my.csv", "data.source.target=y")
        words = with_its_own_overrides(["data.source.path=other.csv", given_now])
        assert words[:2] == ["data=table", "data.source.target=y"]
        assert words[-2:] == ["data.source.path=other.csv", given_now]

    def test_another_choice_drops_the_values_of_the_old_one(self, tmp_path: Path) -> None:
        own = ["scheduler=cosine", "scheduler.T_max=5", "callbacks.best.monitor=train_loss", "logger.csv.name=x"]
        given_now = folder_of(tmp_path, *own)
        assert with_its_own_overrides([given_now])[:4] == own
        assert with_its_own_overrides(["scheduler=step", given_now])[:2] == own[2:]
        assert "callbacks.best.monitor=train_loss" in with_its_own_overrides(["callbacks=early_stopping", given_now])
        assert not set(own[:2] + own[3:]) & set(with_its_own_overrides(["~scheduler", "~logger", given_now]))
        assert set(own[1:]) <= set(with_its_own_overrides(["scheduler=mine", given_now]))

    @pytest.mark.parametrize("alone", [["data=iris"], ["ckpt_path=nowhere/last.ckpt"], ["not an override"], []])
    def test_nothing_to_add(self, alone: list[str]) -> None:
        assert with_its_own_overrides(alone) == alone

    def test_interpolation_in_the_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder_of(tmp_path / "r", "data=iris")
        monkeypatch.setenv("RUNS", str(tmp_path))
        assert with_its_own_overrides(["ckpt_path=${oc.env:RUNS}/r/last.ckpt"])[0] == "data=iris"
        with pytest.raises(InputError, match=r"expected ckpt_path to be a text, but got '\$\{seed\}'"):
            with_its_own_overrides(["ckpt_path=${seed}"])

    def test_several(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"expected one ckpt_path .*; start a command for each"):
            with_its_own_overrides(["-m", "ckpt_path=a/last.ckpt,b/last.ckpt"])
        with pytest.raises(InputError, match="expected one task beside ckpt_path"):
            with_its_own_overrides(["-m", "task=test,train", folder_of(tmp_path)])


FLAGS = [
    ["--config-dir", "my"], ["--config-dir=my"], ["-cd", "my"], ["-cn", "other"], ["--config-name=other"], ["-cp", "c"],
    ["-m"], ["--multirun"], ["--cfg", "job"], ["-c", "all"], ["--cfg=job", "--resolve", "-p", "data"], ["-r"],
    ["--info=config"], ["--multi"],
]  # fmt: skip


class TestFlags:
    @pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_stay_what_they_are(self, tmp_path: Path, flags: list[str], place: int) -> None:
        """Before, between or behind the overrides; Hydra's parser then finds the same flags, and all overrides."""
        given_now = ["seed=1", folder_of(tmp_path, "data=iris")]
        words = with_its_own_overrides([*given_now[:place], *flags, *given_now[place:]])
        found, alone = get_args_parser().parse_args(words), get_args_parser().parse_args(flags)
        folder = [] if alone.multirun else ["hydra.mode=RUN", f"hydra.run.dir={tmp_path}"]
        assert found.overrides == ["data=iris", *folder, *given_now]
        assert {**vars(found), "overrides": []} == vars(alone)

    @pytest.mark.parametrize("flag", ["--help", "--hydra-help", "-sc"])
    def test_that_start_no_run(self, tmp_path: Path, flag: str) -> None:
        given_now = folder_of(tmp_path, "~logger")
        assert with_its_own_overrides([given_now, flag])[1:] == [given_now]

    def test_rerun(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--experimental-rerun without ckpt_path, because Hydra then ignores"):
            with_its_own_overrides(["--experimental-rerun", "x.pickle", folder_of(tmp_path)])

    @pytest.mark.parametrize("flags", [["--cgf", "job"], ["--cfg", "jobs"], ["--config-dir"], ["--info", "data=iris"]])
    def test_mistyped(self, flags: list[str]) -> None:
        with pytest.raises(InputError, match=r"expected Hydra's flags and overrides .*; see --hydra-help"):
            with_its_own_overrides(flags)


def test_pasted_command_shows_the_configuration_of_the_run(tmp_path: Path) -> None:
    """Through a shell, from a folder whose name needs every kind of quotes."""
    path = tmp_path / "a 'b' (1), $c=d \"${e}\""
    given_now = folder_of(path, "data=table", f"data.source.path='{tmp_path}/it is, (1).csv'", "data.source.target=y")
    with pytest.raises(InputError) as error:
        with_its_own_overrides(["--cfg=job", "--resolve", "--package=data.source", given_now, "hydra.run.dir=."])
    line = str(error.value).partition("\n")[2]
    job = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    shown = yaml.safe_load(job.stdout)
    assert (shown["path"], shown["target"]) == (f"{tmp_path}/it is, (1).csv", "y")


def test_what_is_refused_is_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of a test has nothing of it."""
    monkeypatch.chdir(tmp_path)
    given_now = folder_of(
        tmp_path / "x", "data=iris", "+callbacks.e._target_=sympy.sympify", "+callbacks.e.a='touch()'"
    )
    cfg = configured(tmp_path, *with_its_own_overrides(["task=test", given_now])[:-3])
    assert "e" not in cfg.callbacks
    assert cfg.data.name == "iris"
