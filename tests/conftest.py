"""What every test shares: one thread and fixed seeds, so that a failure can be seen again."""

import pytest
import torch

from tests.cases import CASES, Case
from tests.grid_cases import GRIDS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[*CASES, *GRIDS], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Each Function beside its torch twin."""
    return request.param
