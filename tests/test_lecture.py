"""`python -m manual_mlp.lecture` from the first slide to the last: what it says is what its numbers say."""

import re
from pathlib import Path

import pytest

from manual_mlp import lecture
from tests.configs import CONF


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What is printed, and the folder with the pictures."""
    folder = tmp_path_factory.mktemp("lecture") / "new"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *text: printed.append(" ".join(map(str, text))))
        lecture.main([str(folder)])
    return "\n".join(printed), folder


def test_reads_well(pages: tuple[str, Path]) -> None:
    """80 columns but for the paths of pictures, the lecture's titles in its order, and three pictures."""
    text, folder = pages
    assert max(len(line) for line in text.splitlines() if not line.startswith("picture: ")) <= 80
    assert re.findall(r"^(.+)\n─+$", text, re.MULTILINE) == [
        "The smallest building block of an ANN: The Neuron",
        "Combining the Neurons to a Network",
        "History of ANNs",
        "Einfaches Modell eines MLP",
        "Gradientenberechnung",
        "Zusammenfassung",
        "Backpropagation für generelle MLPs",
        "Learnings!",
        "And on",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["flow.png", "network.png", "xor.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_goes_through_the_five_steps(pages: tuple[str, Path]) -> None:
    text, _ = pages
    steps = ["z² = w¹ · a¹ + b¹ = 0.8 · 0.5 + 0.1 = 0.5", "δ⁴ = ", "δ³ = ", "δ² = ", "∂C/∂w³ = δ⁴ · a³", "new w³ = "]
    positions = [text.index(step) for step in steps]
    assert positions == sorted(positions)


def test_the_neuron(pages: tuple[str, Path]) -> None:
    sums = re.search(r"z = (\(0\.5\).*) = (-0\.85)", pages[0])
    assert sums
    assert eval(sums[1].replace("·", "*")) == pytest.approx(float(sums[2]))


def test_the_gradient_is_the_nudges(pages: tuple[str, Path]) -> None:
    found = re.search(r"it changes by\s(\S+)\stimes\sas\smuch,\sand\s∂C/∂w¹ = (\S+)\.", pages[0])
    assert found
    assert float(found[1]) == pytest.approx(float(found[2]), abs=1e-8)


def test_what_learns_and_what_does_not(pages: tuple[str, Path]) -> None:
    text, _ = pages
    assert re.search(r"AND .* 0: converged", text)
    assert re.search(r"XOR .* never fewer than [1-4] in 100", text)
    before, after = map(float, re.search(r"C was (\d\.\d+)\sand is (\d\.\d+)", text).groups())  # type: ignore[union-attr]
    assert after < before
    costs = [float(row[1]) for row in re.findall(r"^ +(\d+)  (0\.\d{4})  ", text, re.MULTILINE)]
    assert costs == sorted(costs, reverse=True)
    assert len(costs) == 4
    assert costs[-1] < 0.001
    assert re.search(r"^ +2000 .* (0\.0\d)  (0\.9\d)  (0\.9\d)  (0\.0\d)$", text, re.MULTILINE)


def test_names_experiments_that_exist() -> None:
    for name in lecture.EXPERIMENTS:
        assert (CONF / "experiment" / f"{name}.yaml").exists()


def test_without_a_folder_no_picture(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lecture, "slides", lecture.chain)
    lecture.main([])
    printed = capsys.readouterr().out
    assert "picture:" not in printed
    assert "Gradientenberechnung" in printed
