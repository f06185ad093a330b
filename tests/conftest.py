"""What every test shares: one thread and fixed seeds, so that a failure can be seen again."""

from collections.abc import Iterator

import pytest
import torch

from manual_mlp import engine
from tests.cases import CASES, Case
from tests.grid_cases import GRIDS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _torch_s_road(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave `native="auto"` on torch's road, which most tests are about; test_native… are about the other one."""
    with pytest.MonkeyPatch.context() as patch:
        if "test_native" not in request.module.__name__:
            patch.setattr(engine, "gains", lambda *_: False)
        yield


@pytest.fixture(params=[*CASES, *GRIDS], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Each Function beside its torch twin."""
    return request.param
