"""`python -m manual_mlp.lecture` from the first slide to the last: what it says is what its numbers say."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from manual_mlp import lecture
from tests.configs import CONF


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What is printed, and the folder with the pictures."""
    folder = tmp_path_factory.mktemp("lecture") / "new"
    with redirect_stdout(io.StringIO()) as printed:
        lecture.main([str(folder)])
    return printed.getvalue(), folder


def test_reads_well(pages: tuple[str, Path]) -> None:
    """80 columns but for the folder of pictures, the lecture's titles in its order, and four pictures."""
    text, folder = pages
    *lines, last = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert last == f"pictures in {folder}"
    assert re.findall(r"^(.+)\n─+$", text, re.MULTILINE) == [
        "Neural Networks – The essentials",
        "The smallest building block of an ANN: the neuron",
        "Combining the neurons to a network",
        "History of ANNs",
        "A simple MLP (Einfaches Modell eines MLP)",
        "Computing the gradients (Gradientenberechnung)",
        "Summary (Zusammenfassung)",
        "Backpropagation for MLPs in general (Backpropagation für generelle MLPs)",
        "Learnings",
        "Branches part and meet: the residual connection",
        "And on",
    ]
    assert "```" not in text
    assert sorted(path.name for path in folder.iterdir()) == [
        *("flow.gif", "flow.png", "network.png", "residual.png", "xor.png"),
    ]
    assert all(path.read_bytes().startswith((b"\x89PNG", b"GIF89a")) for path in folder.iterdir())


def test_goes_through_the_five_steps(pages: tuple[str, Path]) -> None:
    text, _ = pages
    steps = ["z² = w¹ · a¹ + b¹ = 0.8 · 0.5 + 0.1 = 0.5", "δ⁴ = ", "δ³ = ", "δ² = ", "∂C/∂w³ = δ⁴ · a³", "new w³ = "]
    positions = [text.index(step) for step in steps]
    assert positions == sorted(positions)


def test_delta_vanishes_in_the_chain_and_not_in_the_residual_net(pages: tuple[str, Path]) -> None:
    rows = re.findall(r"(?:sigmoid|tanh), gain \d(?:, residual)? +([-\d. ]+)10\^([-+.\d]+)", pages[0])
    # Measured with other draws: log₁₀ ‖δ^l‖ of the layers 2, 6, 11, 16 and 21, and the ratio of the first to the last.
    expected = [
        [-12.98, -10.43, -7.29, -4.12, -0.99, -11.99],
        [0.55, 0.40, 0.24, 0.11, 0.04, 0.51],
        [-5.00, -4.10, -3.09, -2.09, -1.11, -3.89],
        [0.55, 0.22, 0.00, -0.15, -0.26, 0.80],
        [-0.71, -0.36, -0.20, -0.09, -0.09, -0.63],
        [1.41, 1.06, 0.75, 0.51, 0.29, 1.11],
    ]
    found = [[*map(float, norms.split()), float(ratio)] for norms, ratio in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.2)


def test_the_neuron(pages: tuple[str, Path]) -> None:
    sums = re.search(r"z = (\(0\.5\).*) = (-0\.85)", pages[0])
    assert sums
    assert eval(sums[1].replace("·", "*")) == pytest.approx(float(sums[2]))


def test_the_gradient_is_its_definitions(pages: tuple[str, Path]) -> None:
    quotient, formula = re.findall(r"(?:2e-6|by the formula) += (\S+)", pages[0])
    assert float(quotient) == pytest.approx(float(formula), abs=1e-8)


def test_the_general_case_has_all_numbers(pages: tuple[str, Path]) -> None:
    """Whoever has pencil and paper can compute each step again: nothing that it needs is left out."""
    text = pages[0][pages[0].index("(Backpropagation für generelle MLPs)") :]
    symbols = ("x", "ŷ", "W¹", "b¹", "W²", "b²", "z²", "a²", "z³", "a³", "C", "δ³", "δ²", "∂C/∂W²", "∂C/∂b¹", "new W¹")
    positions = [text.index(f"\n      {symbol} =") for symbol in symbols]
    assert positions == sorted(positions)


def test_what_learns_and_what_does_not(pages: tuple[str, Path]) -> None:
    text, _ = pages
    assert re.search(r"AND .* 0: converged", text)
    assert re.search(r"XOR .* never fewer than [1-4] in 100", text)
    before, after = map(float, re.search(r"C was (\d\.\d+) and is (\d\.\d+)", text).groups())  # type: ignore[union-attr]
    assert after < before
    costs = [float(row[1]) for row in re.findall(r"^ +(\d+)  (0\.\d{4})  ", text, re.MULTILINE)]
    assert costs == sorted(costs, reverse=True)
    assert len(costs) == 4
    assert costs[-1] < 0.001
    assert re.search(r"^ +2000 .* (0\.0\d)  (0\.9\d)  (0\.9\d)  (0\.0\d)$", text, re.MULTILINE)


def test_names_experiments_that_exist(pages: tuple[str, Path]) -> None:
    names = re.findall(r"^- (\w+):", pages[0], re.MULTILINE)
    assert len(names) == 5
    assert all((CONF / "experiment" / f"{name}.yaml").exists() for name in names)


def test_without_a_folder_no_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lecture.main([])
    printed = capsys.readouterr().out
    assert "pictures in" not in printed
    assert "Gradientenberechnung" in printed
    assert not any(tmp_path.iterdir())


class TestExecuted:
    """A page is run in one session, and each output goes where it belongs."""

    def test_outputs(self) -> None:
        page = "```python\nx = 1\nprint(x)\n```\n\n```text\nold\n```\n```python\nprint(x + 1)\n```\n```text\n```\nz\n"
        assert lecture.executed(page) == page.replace("old", "1").replace("text\n```\nz", "text\n2\n```\nz")

    def test_a_text_block_without_code_stays(self) -> None:
        page = "```text\nkept\n```\n```python\nx = 1\n```\n```text\nkept\n```\n```bash\nrm -r x\n```\n"
        assert lecture.executed(page) == page

    def test_pictures_on_demand_alone(self) -> None:
        page = "```python picture\nprint(1)\n```\n```text\n0\n```\n"
        assert lecture.executed(page, pictures=False) == page
        assert "\n1\n" in lecture.executed(page)

    def test_an_error_names_the_line_of_the_page(self) -> None:
        with pytest.raises(ZeroDivisionError) as error:
            lecture.executed("one\n\n```python\nx = 0\n1 / x\n```\n", "page.md")
        assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == ("page.md", 5)
