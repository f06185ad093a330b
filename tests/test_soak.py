"""100,000 training steps by layers, by network_loss and by the engine: memory stays flat. -s shows the figures."""

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import manual_mlp as mm
from manual_mlp.engine import BackpropEngine
from manual_mlp.network import network_loss

SAMPLES = 20
PAGE = os.sysconf("SC_PAGE_SIZE")
Step = Callable[[Tensor, Tensor], object]


def resident() -> float:
    """MiB of memory that the process has now; on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())  # isinstance would ask proxies


def by_autograd(cost: Callable[..., Tensor]) -> Callable[[mm.MLP, torch.optim.Optimizer], Step]:
    def make(model: mm.MLP, optimizer: torch.optim.Optimizer) -> Step:
        def step(x: Tensor, target: Tensor) -> None:
            optimizer.zero_grad()
            cost(model, x, target).backward()
            optimizer.step()

        return step

    return make


WAYS: dict[str, Callable[[mm.MLP, torch.optim.Optimizer], Step]] = {
    "layers": by_autograd(lambda model, x, target: mm.functional.quadratic_loss(model(x), target)),
    "network": by_autograd(network_loss),
    "engine": lambda model, optimizer: BackpropEngine(model, optimizer).step,
}


def soak(way: str, steps: int) -> tuple[list[float], list[int], float]:
    """MiB and number of tensors at twenty times, and seconds. Batches of five sizes."""
    model = mm.MLP([16, 24, 8, 4], dropout=0.1)
    step = WAYS[way](model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5))
    x, target = torch.randn(50, 16), torch.rand(50, 4)
    memory, count, started = [], [], time.perf_counter()
    for number in range(1, steps + 1):
        rows = 10 + 10 * (number % 5)
        step(x[:rows], target[:rows])
        if number % (steps // SAMPLES) == 0:
            count.append(tensors())
            memory.append(resident())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return memory, count, time.perf_counter() - started


@pytest.fixture(autouse=True)
def _only_new_objects() -> Iterator[None]:
    """So that counting looks at what the soak makes alone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [200, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_is_flat(way: str, steps: int) -> None:
    """Not a tensor more and, after a quarter of the steps, less than 1 MiB, which is 14 bytes a step."""
    memory, count, seconds = soak(way, steps)
    memory, count = memory[SAMPLES // 4 :], count[SAMPLES // 4 :]
    print(f"\n{way}: {steps} steps in {seconds:.0f} s, from {memory[0]:.1f} to {memory[-1]:.1f} MiB")
    assert len(set(count)) == 1, count
    assert max(memory) - memory[0] < 1.0, memory
