"""What every test shares: one thread and fixed seeds, so that a failure can be seen again."""

import pytest
import torch

from manual_mlp import engine
from tests.cases import CASES, Case
from tests.grid_cases import GRIDS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _torch_s_road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave `native="auto"` on torch's road, which most tests are about; test_native is about the other one."""
    if not request.module.__name__.endswith("test_native"):
        monkeypatch.setattr(engine, "gains", lambda *_: False)


@pytest.fixture(params=[*CASES, *GRIDS], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Each Function beside its torch twin."""
    return request.param
