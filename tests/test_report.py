"""The page a run leaves: what it holds, that it needs nothing else, that text stays text, that it can't cost a run."""

import base64
import csv
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import manual_mlp as mm
from manual_mlp import report
from manual_mlp.report import Picture
from manual_mlp.training import pictures
from manual_mlp.training import run as training
from tests.configs import CONF, configured

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags must be closed in the order in which they were opened. Collects what a reader and a browser see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def text(self) -> str:
        """In words with single blanks between them; raised digits are part of their word."""
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def figure(points: int = 3) -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(np.random.default_rng(0).normal(size=points), ".")
    return figure


def make_page(**options: object) -> str:
    trace = mm.trace(mm.MLP([3, 5, 4, 2], activation=["silu", "tanh"], bias=False), torch.rand(7, 3), torch.rand(7, 2))
    arguments = {
        "title": "data, 3-5-4-2",
        "facts": {"net": "3-5-4-2"},
        "figures": {"train_loss": 0.123456, "test_loss": 2e-9, "test_accuracy": 0.98765},
        "pictures": [Picture("Line", "a line", figure())],
        "trace": trace,
        "step": "",
        "remark": "",
        "origin": {"seed": "0"},
        "config": "seed: 0\n",
    }
    return report.page(**(arguments | options))


class TestPage:
    def test_needs_nothing_else(self) -> None:
        page = make_page()
        sources = [attributes["src"] for attributes in Page(page).all("img")]
        assert sources
        assert all(source.startswith("data:image/") for source in sources)
        assert not re.search(r"<(script|link|iframe|object)|@import|url\(|href=|https?://", page)

    def test_no_text_becomes_markup(self) -> None:
        page = make_page(
            title=EVIL,
            facts={EVIL: EVIL},
            figures={f"test_{EVIL}": 1.0},
            pictures=[Picture(EVIL, EVIL, figure())],
            origin={EVIL: EVIL},
            config=EVIL,
        )
        found = Page(page)
        assert "script" not in {tag for tag, _ in found.tags}
        assert found.text().count("alert('x')") == 10  # title, facts, picture, origin: two each; kind, config
        assert found.all("img")[0]["alt"] == EVIL
        assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)

    def test_figures_as_a_table(self) -> None:
        text = Page(make_page()).text()
        assert "train val test cost 0.1235 – 2e-09 accuracy – – 98.77 %" in text

    def test_formulas_with_this_nets_sizes(self) -> None:
        text = Page(make_page()).text()
        for formula in (
            "W 1 (5, 3)",
            "z 2 = a 1 (W 1 ) T (N, 5)",
            "a 4 = sigmoid(z 4 ) (N, 2)",
            "δ 4 = 1/N (a 4 − ŷ) ⊙ sigmoid′(z 4 ) (N, 2)",
            "δ 2 = (δ 3 W 2 ) ⊙ silu′(z 2 ) (N, 5)",
            "∂C/∂W 1 = (δ 2 ) T a 1 (5, 3)",
            "m = 2 the number of outputs",
            "tanh(z) tanh(z)",
            "g ⊙ silu′(z) g * (σ(z) * (1 + z * (1 - σ(z))))",
            "σ(z) 1 / (1 + exp(-z))",
        ):
            assert formula in text
        assert "b 1" not in text  # a net without biases
        assert "Φ" not in text

    def test_another_step_than_the_lectures(self) -> None:
        assert "5. update new W 3 = W 3 − LR · ∂C/∂W 3 (2, 4)" in Page(make_page()).text()
        text = Page(make_page(step="by Adam, lr <1>", remark="Without dropout.")).text()
        assert "5. update by Adam, lr <1> activations" in text
        assert "LR" not in text
        assert "2 the number of outputs. Without dropout. given" in text

    def test_a_net_without_formulas(self) -> None:
        page = make_page(trace=None, pictures=[])
        assert "The formulas of this net" not in page
        assert "Pictures" not in page

    def test_pictures_are_in_the_page(self) -> None:
        (image,) = Page(make_page(pictures=[Picture("a", "b", figure(3))])).all("img")
        head, _, content = image["src"].partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content)[:5] == b"\x89PNG\r"

    def test_same_picture_same_bytes(self) -> None:
        assert make_page() == make_page()

    def test_versions(self) -> None:
        assert re.match(r"Python 3\.\d+\.\d+, .*torch 2\.", report.versions())


def run(folder: Path, *overrides: str) -> Page:
    training.run(configured(folder, "report=true", "trainer.max_epochs=2", *overrides))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def titles(page: Page) -> list[str]:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figure") == tags.count("img")
    return [text for text in page.texts if text in PICTURES]


PICTURES = {
    *("Learning curves", "Confusion matrix", "Worst mistakes", "Decision boundary", "Fitted curve"),
    *("Prediction and target", "First-layer weights", "The net", "Flow of δ", "Histograms"),
}
INSIDE = ["First-layer weights", "Flow of δ", "Histograms"]


class TestRun:
    def test_digits(self, tmp_path: Path) -> None:
        page = run(tmp_path, "data=digits", "model.dropout=0.3")  # which the test leaves out, and so must the page
        assert titles(page) == ["Learning curves", "Confusion matrix", "Worst mistakes", *INSIDE]
        with (tmp_path / "metrics.csv").open() as file:
            accuracy = float(list(csv.DictReader(file))[-1]["test_accuracy"])
        recalls = re.findall(r"recall ([\d.]+) %, (\d+) test rows", page.text())
        assert sum(int(rows) for _, rows in recalls) == 360
        right = sum(round(float(recall) / 100 * int(rows)) for recall, rows in recalls)
        assert right == round(360 * accuracy)
        for fact in ("64-30-10, sigmoid", "1257 train", "SGD, lr 5.0", "max_epochs: 2", "seed: 0", "Python 3."):
            assert fact in page.text()
        assert all(attributes["alt"] for attributes in page.all("img"))
        assert (tmp_path / "report.html").stat().st_size < 1_500_000
        assert (tmp_path / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (["data=xor", "model.hidden=[3]"], ["Confusion matrix", "Decision boundary", "The net", *INSIDE[1:]]),
            (["data=sine", "model.dropout=0.1"], ["Fitted curve", "Prediction and target", *INSIDE]),
            (["data=diabetes", "~callbacks.delta_flow"], ["Prediction and target", "First-layer weights"]),
            pytest.param(
                ["data=iris", "trainer.precision=64-true"], ["Confusion matrix", *INSIDE], marks=pytest.mark.slow
            ),
        ],
    )
    def test_other_data(self, tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
        assert titles(run(tmp_path, *overrides)) == ["Learning curves", *expected]

    def test_the_step_and_dropout_are_told(self, tmp_path: Path) -> None:
        text = run(tmp_path, "data=iris", "optimizer=adam", "model.dropout=0.1").text()
        assert "5. update by Adam, lr 0.003 activations" in text
        assert "after each hidden layer with p = 0.1, is left out. given" in text
        assert "a 2 = sigmoid(z 2 ) (N, 30)" in text  # without its mask

    def test_without_anything_beside(self, tmp_path: Path) -> None:
        page = run(tmp_path, "data=iris", "~callbacks", "~logger", "trainer.enable_checkpointing=false")
        assert titles(page) == ["Confusion matrix", "First-layer weights"]

    def test_flow_reaches_the_end_though_the_best_epoch_is_kept(self, tmp_path: Path, monkeypatch) -> None:
        drawn = []
        draw = pictures.plots.delta_flow
        monkeypatch.setattr(pictures.plots, "delta_flow", lambda *given: (drawn.append(given), draw(*given))[1])
        run(tmp_path, "data=diabetes", "trainer.max_epochs=12", "optimizer.lr=0.1")
        ((epochs, norms),) = drawn
        assert epochs[-1] == 12
        assert {len(values) for values in norms.values()} == {len(epochs)}
        assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] < 11

    def test_a_run_that_went_on_shows_the_same(self, tmp_path: Path) -> None:
        overrides = ["data=xor", "data.batch_size=50", "model.hidden=[2]"]
        whole = run(tmp_path / "whole", *overrides, "trainer.max_epochs=5")
        training.run(configured(tmp_path / "parts", *overrides, "trainer.max_epochs=3"))
        parts = run(tmp_path / "parts", *overrides, "trainer.max_epochs=5", f"ckpt_path='{tmp_path}/parts/last.ckpt'")
        assert parts.all("img") == whole.all("img")  # pictures and what is said of them, to the last byte

    def test_a_run_that_went_on_otherwise_says_so(self, tmp_path: Path) -> None:
        """No command gives a net whose first steps had other settings than its last ones."""
        said = []
        for epochs, more in (
            (1, []),
            (2, ["data.batch_size=20", "scheduler=cosine"]),
            (3, ["scheduler=cosine"]),
        ):
            words = ["data=iris", *more, f"trainer.max_epochs={epochs}"]
            page = run(tmp_path, *words, *[f"ckpt_path='{tmp_path}/last.ckpt'"] * (epochs > 1))
            said += re.findall(r"but the run went on with other values of (.*), so the command gives", page.text())
        assert said == ["data.batch_size, scheduler"] * 2

    def test_names_of_a_table_are_only_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a<b>.csv"
        rows = [(x, EVIL if x > 0 else "$ordinary^$") for x in np.random.default_rng(0).normal(size=100)]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("x", "class"), *rows])
        page = run(tmp_path, "data=table", f"data.source.path='{path}'", "data.source.target=class", "optimizer.lr=0")
        assert "script" not in {tag for tag, _ in page.tags}
        assert EVIL in page.text()  # in the lines of the classes
        assert page.texts.count("a<b>.csv, 1-30-2") == 2

    def test_report_false(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        training.run(configured(tmp_path, "data=iris", "trainer.max_epochs=1", "report=false"))
        assert not (tmp_path / "report.html").exists()
        assert (tmp_path / "learning_curves.png").exists()
        assert "report.html" not in capsys.readouterr().out

    def test_a_report_that_fails_loses_nothing(self, tmp_path: Path, monkeypatch, capsys, caplog) -> None:
        def fail(*_: object) -> Figure:
            raise RuntimeError("no ink")

        monkeypatch.setattr(pictures.plots, "confusion_matrix", fail)
        caplog.set_level("INFO")
        overrides = ["data=iris", "trainer.max_epochs=1", "optimized_metric=test_loss", "report=true"]
        value = training.run(configured(tmp_path, *overrides))
        out = capsys.readouterr().out
        assert f"test_loss {value:.6g}" in out
        assert out.index("test_loss") < out.index("no report: RuntimeError: no ink") < out.index("files in")
        assert "RuntimeError: no ink" in caplog.text  # the traceback, in train.log

    def test_the_command(self) -> None:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", ["data=iris", "model.hidden=[3,4]", "+note='a b'"], return_hydra_config=True)
        assert "configuration below" in pictures._command()
        HydraConfig.instance().set_config(cfg)
        try:
            assert pictures._command() == """python train.py data=iris 'model.hidden=[3,4]' "+note='a b'\""""
        finally:
            HydraConfig.instance().cfg = None

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["data=iris", "ckpt_path=r/last.ckpt", "trainer.max_epochs=9"], ["data=iris", "trainer.max_epochs=9"]),
            (["data=table", "data.source.path={here}/my.csv"], ["data=table", "data.source.path=my.csv"]),
            (["data=table", "data.source.path='{here}/my data (1).csv'"], ["data.source.path='my data (1).csv'"]),
            (["experiment=deep_sigmoid", "model.activation=relu"], ["hydra.mode=RUN"]),
        ],
    )
    def test_the_command_of_other_runs(
        self, tmp_path: Path, monkeypatch, words: list[str], expected: list[str]
    ) -> None:
        """Of one that went on: from nothing. With a path: from the working folder. Of a preset that sweeps: alone."""
        monkeypatch.chdir(tmp_path)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [word.format(here=tmp_path) for word in words], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
        line = shlex.split(pictures._command())
        assert line[:2] == ["python", "train.py"]
        assert line[-len(expected) :] == expected
        assert str(tmp_path) not in " ".join(line)
        assert not any(word.startswith("ckpt_path") for word in line)

    def test_tensorboard_gets_the_pictures(self, tmp_path: Path) -> None:
        page = run(tmp_path, "data=iris", "logger=tensorboard")
        seen = []
        for file in (tmp_path / "tensorboard").glob("events*"):
            seen += EventAccumulator(str(file), {"images": 0}).Reload().Tags()["images"]
        assert sorted(seen) == sorted(titles(page))


def test_the_first_stage_is_before_the_training() -> None:
    net = SimpleNamespace(state_dict=dict)
    flow = SimpleNamespace(snapshots={at: {} for at in (0, 1, 2, 64)})
    titles = list(pictures._stages(SimpleNamespace(net=net), flow, 55))  # type: ignore[arg-type]
    assert titles == ["before training", "after 1 epoch", "after 2 epochs", "kept, after 56 epochs"]


@pytest.mark.parametrize("classes", [True, False])
def test_no_two_stages_look_alike(classes: bool) -> None:
    """The answers change while c is 0 to 5, and no more after it: the panels show where they change, at most six."""
    x, read = np.linspace(0, 1, 100)[:, None], (np.rint if classes else np.asarray)
    kind = int if classes else float
    answers = [lambda x, c=c: read(c * x[:, 0]).astype(kind) for c in [0, 1, 2, 3, 4, *[5] * 7]]
    stages = {str(c): answer for c, answer in enumerate(answers)}
    assert list(pictures._telling(stages, x)) == ["0", "1", "2", "3", "4", "11"]
    constant = {str(c): answers[0] for c in range(9)}
    assert list(pictures._telling(constant, x)) == ["0", "8"]
    assert list(pictures._telling({"kept": answers[1]}, x)) == ["kept"]


def test_a_run_of_a_sweep_looks_at_no_test_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "in_sweep", lambda: True)
    text = run(tmp_path, "data=iris").text()
    assert re.search(r"precision [\d.]+ %, recall [\d.]+ %, 5 validation rows", text)
    assert "accuracy lost on the validation part" in text
    assert "rows of the test part" not in text
    assert "test rows" not in text


def test_classes_columns_and_no_folder(tmp_path: Path) -> None:
    """A line for each class, the columns by importance; a reader learns nothing of this machine's folders."""
    training.run(configured(tmp_path / "run", "data=iris", "report=true", "trainer.max_epochs=20"))
    page = (tmp_path / "run" / "report.html").read_text()
    for name in ("setosa", "versicolor", "virginica"):
        assert re.search(rf"<dt>class {name}</dt><dd>precision [\d.]+ %, recall [\d.]+ %, 10 test rows</dd>", page)
    listed = re.search(r"<dt>importance</dt><dd>(.*?): accuracy lost on the test part", page)
    assert listed
    values = [float(value) for value in re.findall(r"(-?\d\.\d+)(?:,|$)", listed[1])]
    assert len(values) == 4
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.1
    assert str(tmp_path) not in page
    assert str(tmp_path.parent) not in page
