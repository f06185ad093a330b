"""What version 0.1 computed, to the bit: every way to train, and the checkpoints it wrote."""

from pathlib import Path

import pytest
import torch

from tests import golden

RECORDED, OF_CHECKPOINTS = golden.recorded(), golden.recorded(golden.OF_CHECKPOINTS)


def skip_elsewhere(content: dict) -> None:
    if reason := golden.elsewhere(content["machine"]):
        pytest.skip(reason)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("backprop", "dtype"), golden.groups())
def test_same_parameters_after_20_steps(backprop: str, dtype: str, every: int) -> None:
    """A third of the cells for each way and dtype, another third for the next one: each cell is trained some way."""
    skip_elsewhere(RECORDED)
    cells = golden.CELLS[golden.groups().index((backprop, dtype)) % every :: every]
    left_out = {cell.name for cell in golden.CELLS} - {cell.name for cell in cells}
    expected = {name: bits for name, bits in RECORDED[f"{backprop} {dtype}"].items() if name not in left_out}
    assert expected
    lines = golden.differences(expected, golden.computed(backprop, dtype, cells))
    assert not lines, f"{len(lines)} cells of {backprop} {dtype} differ:\n" + "\n".join(lines)


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
class TestCheckpointOf01:
    def test_predicts(self, name: str) -> None:
        expected, found = OF_CHECKPOINTS[name]["predicted"], golden.predicted(name)
        assert found.keys() == expected.keys()
        for who, numbers in expected.items():
            torch.testing.assert_close(torch.tensor(found[who]), torch.tensor(numbers), rtol=1e-5, atol=1e-6)
        if not golden.elsewhere(OF_CHECKPOINTS["machine"]):
            assert found == expected

    def test_goes_on(self, name: str, tmp_path: Path) -> None:
        sha = golden.resumed(name, tmp_path)
        skip_elsewhere(OF_CHECKPOINTS)
        assert sha == OF_CHECKPOINTS[name]["resumed"]
