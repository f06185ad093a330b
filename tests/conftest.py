"""What every test shares: one thread, fixed seeds, torch's road, and nothing made twice that is not asked about."""

import copy
import functools
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from manual_mlp import engine
from tests.cases import CASES, Case, sampled
from tests.grid_cases import GRIDS

torch.set_num_threads(1)
# The tests are about the CPU, as `accelerator: auto` then is; `make gpu` names a GPU, and runs those that need one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_collection_finish() -> None:
    """Leave what all imports have made out of the garbage collector's walks, of which tests ask many."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(autouse=True, scope="module")
def _torch_s_road(request: pytest.FixtureRequest, _patch: pytest.MonkeyPatch) -> None:
    """Leave `native="auto"` on torch's road, which most tests are about; test_native… are about the other one."""
    if "test_native" not in request.module.__name__:
        _patch.setattr(engine, "gains", lambda *_: False)


# The tests that ask what a run's pictures show, and what a whole run leaves.
PAINTED = ("test_plots", "test_report", "test_sweep")


@pytest.fixture(autouse=True, scope="module")
def _unpainted(request: pytest.FixtureRequest, _patch: pytest.MonkeyPatch) -> None:
    """Have each run draw its curves, but only some paint them: painting takes a third of a short run's time."""
    report = sys.modules.get("manual_mlp.report")
    if report is not None and request.module.__name__.rpartition(".")[2] not in PAINTED:
        _patch.setattr(report, "png", lambda figure: b"\x89PNG\r\n\x1a\n")


@functools.cache
def _parsed(text: str) -> Any:
    return sys.modules["omegaconf"].OmegaConf.create(text)


@pytest.fixture(autouse=True, scope="module")
def _parsed_once(_patch: pytest.MonkeyPatch) -> None:
    """Parse a text of conf/ once, whoever composes it: that is half of the time which Hydra takes."""
    if omegaconf := sys.modules.get("omegaconf"):
        load = omegaconf.OmegaConf.load
        of = lambda file: copy.deepcopy(_parsed(file.read())) if hasattr(file, "read") else load(file)  # noqa: E731
        _patch.setattr(omegaconf.OmegaConf, "load", of)


@pytest.fixture(params=sampled([*CASES, *GRIDS]))
def case(request: pytest.FixtureRequest) -> Case:
    """Each Function beside its torch twin."""
    return request.param
