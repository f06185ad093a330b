"""`python -m manual_mlp.benchmark`: µs per training step of the engine, the whole-net Function and the layers.

Honest by construction: all contenders of a case run in turns in one process, on the same batch, one thread and one
core, after a warm-up; medians stand beside their 20th and 80th percentiles, and the conditions above the table. A ratio
is the median of the ratios within a round. A step is zero_grad, prediction, cost, gradients and update by SGD.
"products" is the floor: the step's matrix products alone. An epoch's time is divided by its batches.
"""

import argparse
import csv
import importlib
import math
import operator
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # scikit-learn's own
from torch import Tensor, nn
from torch.utils.benchmark import Timer, timer

from manual_mlp import functional, modules, tables
from manual_mlp.conversion import convert
from manual_mlp.engine import BackpropEngine
from manual_mlp.ensemble import EnsembleEngine
from manual_mlp.errors import InputError
from manual_mlp.network import network_loss
from manual_mlp.shell import while_read

Step = Callable[[], Any]
Times = dict[str, list[float]]
Optimizer = Callable[..., torch.optim.Optimizer]
Clocks = Mapping[str, Callable[[], float]]


class Case(NamedTuple):
    """A sigmoid net with quadratic cost, by its sizes, and the rows of a batch."""

    name: str
    sizes: tuple[int, ...]
    batch: int
    device: str = "cpu"


CASES = [
    Case("784-30-10, 10", (784, 30, 10), 10),
    Case("64-128-10, 64", (64, 128, 10), 64),
    Case("784-256-128-10, 64", (784, 256, 128, 10), 64),
    Case("784-512-512-10, 256", (784, 512, 512, 10), 256),
    Case("1024-1024-1024-1024-10, 512", (1024, 1024, 1024, 1024, 10), 512),
    Case("20 x 256-10, 128", (*[256] * 20, 10), 128),
]
EPOCHS = [  # of --epochs
    *CASES[:3],
    Case("64-30-10, 10", (64, 30, 10), 10),
    Case("2-8-1, 4", (2, 8, 1), 4),
    Case("96-200-200-5, 32", (96, 200, 200, 5), 32),
]
NETS = 16  # at once
LAYERS = [(16, 64, 64), (64, 128, 128), (64, 256, 256), (256, 512, 512), (512, 1024, 1024)]  # rows, inputs, neurons
WIDTHS = [64, 128, 256, 512, 1024, 2048, 4096]
EPOCH = 64  # batches; its time is divided by them


class Row(NamedTuple):
    """One line of the results: times in µs."""

    case: str
    contender: str
    median: float
    low: float
    high: float
    to_eager: float
    to_products: float


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: each makes a step of its own net from the same weights and batch
# ---------------------------------------------------------------------------------------------------------------------


def torch_net(case: Case) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [module for i, o in pairwise(case.sizes) for module in (nn.Linear(i, o), nn.Sigmoid())]
    return nn.Sequential(*layers).to(case.device)


def batch_of(case: Case, batches: int = 1) -> tuple[Tensor, Tensor]:
    given: Any = {"generator": torch.Generator().manual_seed(1), "device": "cpu"}  # the same numbers on each device
    x = torch.randn(case.batch * batches, case.sizes[0], **given)
    y = torch.rand(case.batch * batches, case.sizes[-1], **given)
    return x.to(case.device), y.to(case.device)


def autograd_step(
    model: nn.Module, cost: Callable[[Tensor, Tensor], Tensor], case: Case, make: Optimizer = torch.optim.SGD
) -> Step:
    """Return a step with cost(x, y) and torch's fused optimizer."""
    optimizer = make(model.parameters(), lr=0.01, fused=True)
    x, y = batch_of(case)

    def step() -> None:
        optimizer.zero_grad()
        cost(x, y).backward()
        optimizer.step()

    return step


def eager(case: Case, bfloat16: bool = False, compiled: bool = False, make: Optimizer = torch.optim.SGD) -> Step:
    """Return a step of nn.Linear and nn.Sigmoid. bfloat16: products by autocast."""
    model, loss = torch_net(case), nn.MSELoss()

    def cost(x: Tensor, y: Tensor) -> Tensor:
        if not bfloat16:
            return loss(model(x), y)
        with torch.autocast(case.device, torch.bfloat16):
            return loss(model(x).float(), y)

    return autograd_step(model, torch.compile(cost) if compiled else cost, case, make)


def by_layers(case: Case, fuse: bool) -> Step:
    model = modules.MLP(case.sizes, device=case.device) if fuse else convert(torch_net(case), fuse=False)
    return autograd_step(model, lambda x, y: functional.quadratic_loss(model(x), y), case)


def network(case: Case) -> Step:
    model = torch_net(case)
    return autograd_step(model, partial(network_loss, model), case)


def engine(case: Case, method: str = "step", make: Optimizer = torch.optim.SGD, **options: Any) -> Step:
    """Return a call of an engine's method."""
    model = torch_net(case)
    call = getattr(BackpropEngine(model, make(model.parameters(), lr=0.01), **options), method)
    return partial(call, *batch_of(case)) if method == "step" else partial(call, *batch_of(case, EPOCH), case.batch)


def products(case: Case) -> Step:
    """Return z = a Wᵀ + b, δ W and W := W + α δᵀ a for every layer, into tensors that are there, without autograd."""
    with torch.inference_mode(), torch.device(case.device):
        weights = [torch.randn(o, i) / math.sqrt(i) for i, o in pairwise(case.sizes)]
        biases = [torch.zeros(o) for o in case.sizes[1:]]
        a = [batch_of(case)[0]] + [torch.randn(case.batch, n) for n in case.sizes[1:]]
        z, delta = ([torch.randn(case.batch, n) for n in case.sizes] for _ in range(2))
        weights_t, delta_t = [weight.t() for weight in weights], [d.t() for d in delta]

    def step() -> None:
        with torch.inference_mode():
            for i in range(len(weights)):
                torch.addmm(biases[i], a[i], weights_t[i], out=z[i + 1])
            for i in range(len(weights) - 1, -1, -1):
                if i:
                    torch.mm(delta[i + 1], weights[i], out=z[i])
                weights[i].addmm_(delta_t[i + 1], a[i], alpha=1e-9)

    return step


def _jax_update(case: Case) -> tuple[Any, Any, Callable[..., Any]]:
    """Return jax, the parameters, and the function of them, x and y that returns them after a step."""
    jax = importlib.import_module("jax")
    parameters: Any = [jax.numpy.asarray(parameter.detach().numpy()) for parameter in torch_net(case).parameters()]

    def cost(parameters: Any, x: Any, y: Any) -> Any:
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            x = jax.nn.sigmoid(x @ weight.T + bias)
        return ((x - y) ** 2).sum() / (2 * len(x))

    def update(parameters: Any, x: Any, y: Any) -> Any:
        loss, gradients = jax.value_and_grad(cost)(parameters, x, y)
        return loss, jax.tree.map(lambda w, g: w - 0.01 * g, parameters, gradients)

    return jax, parameters, update


def jax_jit(case: Case) -> Step:
    jax, parameters, update = _jax_update(case)
    x, y = (jax.numpy.asarray(data.numpy()) for data in batch_of(case))
    update = jax.jit(update)

    def step() -> None:
        nonlocal parameters
        parameters = jax.block_until_ready(update(parameters, x, y))[1]

    return step


def jax_scan(case: Case, nets: int = 0) -> Step:
    """Return an epoch in random order, jitted as a whole; of so many nets by vmap, each in an order of its own."""
    jax, parameters, update = _jax_update(case)
    x, y = (jax.numpy.asarray(data.numpy()) for data in batch_of(case, EPOCH))

    def epoch(parameters: Any, key: Any) -> Any:
        order = jax.random.permutation(key, len(x)).reshape(EPOCH, case.batch)
        return jax.lax.scan(lambda p, rows: update(p, x[rows], y[rows])[::-1], parameters, order)

    if nets:
        parameters = [jax.numpy.stack([parameter] * nets) for parameter in parameters]
    run, key = jax.jit(jax.vmap(epoch) if nets else epoch), jax.random.key(0)

    def step() -> None:
        nonlocal parameters, key
        key, *own = jax.random.split(key, 1 + max(1, nets))
        parameters = jax.block_until_ready(run(parameters, jax.numpy.stack(own) if nets else own[0]))[0]

    return step


def many(case: Case, **options: Any) -> Step:
    """Return an epoch of many nets by EnsembleEngine."""
    nets = [torch_net(case) for _ in range(NETS)]
    engine = EnsembleEngine(nets, [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets], **options)
    return partial(engine.train_epoch, *batch_of(case, EPOCH), case.batch)


def one_layer(case: Case, model: nn.Module) -> Step:
    """Return one layer forward and backward, with its input gradient."""
    x, g = torch.randn(case.batch, case.sizes[0], requires_grad=True), torch.randn(case.batch, case.sizes[1])

    def step() -> None:
        model.zero_grad()
        x.grad = None
        model(x).backward(g)

    return step


def sklearn_step(case: Case) -> Step:
    from sklearn.neural_network import MLPRegressor  # type: ignore[import-untyped]

    options: Any = {"activation": "logistic", "solver": "sgd", "momentum": 0, "alpha": 0, "batch_size": case.batch}
    model = MLPRegressor(hidden_layer_sizes=case.sizes[1:-1], **options)
    return partial(model.partial_fit, *(data.numpy() for data in batch_of(case)))


class Contender(NamedTuple):
    """Makes a step. batches: of a step.

    needs: a package, without which it is left out; it runs on the CPU alone.
    """

    make: Callable[[Case], Step]
    batches: int = 1
    needs: str = ""


CONTENDERS = {
    "eager torch": Contender(eager),
    "compile": Contender(partial(eager, compiled=True)),
    "2 Functions": Contender(partial(by_layers, fuse=False)),
    "fused": Contender(partial(by_layers, fuse=True)),
    "network": Contender(network),
    "step": Contender(engine),
    "epoch": Contender(partial(engine, method="train_batches", native=False), EPOCH),
    "eager, bf16": Contender(partial(eager, bfloat16=True)),
    "compile, bf16": Contender(partial(eager, bfloat16=True, compiled=True)),
    "step, bf16": Contender(partial(engine, compute_dtype=torch.bfloat16)),
    "JAX": Contender(jax_jit, needs="jax"),
    "sklearn": Contender(sklearn_step, needs="sklearn"),
    "products": Contender(products),
}
EPOCH_CONTENDERS = {
    "products": Contender(products),
    "step": Contender(partial(engine, native=False)),
    "train_epoch, torch": Contender(partial(engine, method="train_epoch", native=False), batches=EPOCH),
    "train_epoch, native": Contender(partial(engine, method="train_epoch", native=True), batches=EPOCH),
    "JAX scan": Contender(jax_scan, batches=EPOCH, needs="jax"),
    "Adam, eager": Contender(partial(eager, make=torch.optim.Adam)),
    "Adam, native": Contender(partial(engine, method="train_epoch", make=torch.optim.Adam, native=True), batches=EPOCH),
    "16 nets, torch": Contender(partial(many, native=False), batches=EPOCH * NETS),
    "16 nets, native": Contender(partial(many, native=True), batches=EPOCH * NETS),
    "16 nets, JAX vmap + scan": Contender(partial(jax_scan, nets=NETS), batches=EPOCH * NETS, needs="jax"),
}
LAYER_CONTENDERS = {
    "eager torch": Contender(lambda case: one_layer(case, torch_net(case))),
    "fused": Contender(lambda case: one_layer(case, modules.MLP(case.sizes))),
    "2 Functions": Contender(lambda case: one_layer(case, convert(torch_net(case), fuse=False))),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def timed(step: Step, batches: int, clock: Callable[[], float]) -> Callable[[], float]:
    """Return a call that returns µs for a batch: the mean of as many steps as take a few milliseconds."""
    calls = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads(), timer=clock)
    # each timeit begins with calls that bring its own data into the cache
    repeats = max(1, math.ceil(2e-3 / max(calls.timeit(3).mean, 1e-6)))
    return lambda: calls.timeit(repeats).mean * 1e6 / batches


def interleaved(calls: Mapping[str, Callable[[], float]], seconds: float, least: int = 10) -> Times:
    """Return what each returns, called in turns for about so many seconds in all; so many rounds at least."""
    times: Times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            times[name].append(call())
    return times


def results(case: str, times: Times) -> list[Row]:
    """Return a row for each contender. A ratio is the median of those within a round, which no slow minute changes."""
    rows = []
    for name, values in times.items():
        median, cuts = statistics.median, statistics.quantiles(values, n=5)
        bases = (times.get(base) for base in ("eager torch", "products"))
        ratios = [median(map(operator.truediv, values, base)) if base else math.nan for base in bases]
        rows.append(Row(case, name, median(values), cuts[0], cuts[-1], *ratios))
    return rows


def measure(case: Case, contenders: Mapping[str, Contender], seconds: float, clocks: Clocks) -> list[Row]:
    """Measure every contender that can be made here, by each clock in lines of its own."""
    torch.compiler.reset()  # after eight nets torch.compile would give up, and run them as they are
    here = {n: c for n, c in contenders.items() if not c.needs or (case.device == "cpu" and find_spec(c.needs))}
    if not here:
        raise InputError(f"expected a contender that runs here; got {'; '.join(contenders)}: install what it needs")
    steps, rows = {name: contender.make(case) for name, contender in here.items()}, []
    for name, clock in clocks.items():
        calls = {n: timed(step, here[n].batches, clock) for n, step in steps.items()}
        rows += results(case.name + name, interleaved(calls, seconds / len(clocks)))
    return rows


def measure_training(seconds: float) -> list[Row]:
    """Measure `train.py` beside a plain loop: whole trainings in turns, µs for a step."""
    from manual_mlp.training.end_to_end import EXPERIMENT, trainings  # which brings Lightning and Hydra

    steps, trains = trainings(*EXPERIMENT)
    calls = {name: (lambda train=train: train() / steps * 1e6) for name, train in trains.items()}
    return results(" ".join(EXPERIMENT), interleaved(calls, seconds, least=3))


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Give torch and NumPy's BLAS so many threads, and a single thread one core, which binds JAX's threads too."""
    before = torch.get_num_threads()
    cores: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(threads)
    if threads == 1 and cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)
        if cores:
            os.sched_setaffinity(0, cores)


def conditions(cuda: bool) -> str:
    """Return what the numbers depend on."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    card, cpuinfo = f"{torch.cuda.get_device_name()}, " if cuda else "", Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    processor = named[1].strip() if named else platform.processor() or platform.machine()
    versions = f"{card}torch {torch.__version__}, Python {platform.python_version()}, {processor}"
    threads = f"threads: {torch.get_num_threads()}, cores: {os.cpu_count()}, load {load}"
    return f"{versions}, {threads}; float32, sigmoid, plain SGD"


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Return the rows by case and contender."""
    cases = dict.fromkeys(row.case for row in rows)
    return {case: {row.contender: row for row in rows if row.case == case} for case in cases}


def table(rows: list[Row]) -> str:
    """Return all that was measured, a line for each contender of each case."""
    lines: list[list[str]] = []
    for case, of in by_case(rows).items():
        lines += [[""] * 6] * bool(lines) + [[case, "µs", "20 %", "80 %", "/ eager", "/ products"]]
        for row in of.values():
            times = [f"{value:.1f}" for value in (row.median, row.low, row.high)]
            lines.append([row.contender, *times, _digits(row.to_eager), _digits(row.to_products)])
    return tables.text(lines, align="lrrrrr", indent="", gap="   ")


def _digits(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.2f}"


def markdown(rows: list[Row]) -> str:
    """Return a line for each case: eager torch in µs, the others relative to it; step and epoch also to products."""
    names = dict.fromkeys(row.contender for row in rows if row.contender not in ("eager torch", "products"))
    floor = [name for name in ("step", "epoch") if name in names]
    lines = [["net, batch", "eager, µs", *names, *(f"{name}/products" for name in floor)]]
    for case, of in by_case(rows).items():
        eager_time = f"{of['eager torch'].median:.0f}" if "eager torch" in of else ""
        cells = [_digits(of[name].to_eager) if name in of else "" for name in names]
        lines.append([case, eager_time, *cells, *(_digits(of[name].to_products) for name in floor)])
    return tables.markdown(lines, align="l" + "r" * (len(lines[0]) - 1))


def write_plot(rows: list[Row], path: Path) -> None:
    """Draw µs of a step, case by case: a line for each contender, and for each device of --widths."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        case, _, device = row.case.partition(" on ")
        lines.setdefault(f"{row.contender} {device}", []).append((case, row.median))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set(ylabel="µs for a step", yscale="log")
    axes.tick_params("x", rotation=20, labelsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure what the arguments choose, print the table, and return its rows."""
    options = _options(arguments)
    measures, rows = _measures(options), list[Row]()
    with pinned(options.threads):
        stated = conditions(options.device == "cuda" or (options.widths and torch.cuda.is_available()))
        print(stated, file=sys.stderr)
        for measured in measures:
            rows += measured()
            print(f"{rows[-1].case} done", file=sys.stderr)
    print(f"{stated}.\n\n{markdown(rows) if options.markdown else table(rows)}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
    if options.plot:
        write_plot(rows, options.plot)
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m manual_mlp.benchmark", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", default="", help="only nets whose name contains this")
    parser.add_argument("--contenders", nargs="+", help=f"some of: {'; '.join(CONTENDERS)}. All if left out")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the nets of the table run")
    parser.add_argument("--threads", type=int, default=1, help="of torch and NumPy; one thread gets one core")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--layers", action="store_true", help="single layers instead of nets, on the CPU")
    what.add_argument("--epochs", action="store_true", help="epochs in C, by torch and by JAX's scan, and many nets")
    what.add_argument("--end-to-end", action="store_true", help="whole trainings by train.py, on the CPU; minutes")
    what.add_argument("--widths", action="store_true", help="wider and wider nets, on the CPU and, if there, on CUDA")
    parser.add_argument("--markdown", action="store_true", help="a line for each case, as in the README")
    parser.add_argument("--csv", type=Path, help="write all that was measured to this file")
    parser.add_argument("--plot", type=Path, help="draw the times into this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("expected a CUDA device for --device cuda; torch finds none: leave --device out")
    if options.threads < 1:
        raise InputError(f"expected at least one of --threads; got {options.threads}")
    return options


def _measures(options: argparse.Namespace) -> list[Callable[[], list[Row]]]:
    """Return a call for each case that was chosen."""
    if options.end_to_end:
        if options.nets or options.contenders:
            raise InputError("expected --end-to-end alone, because --nets and --contenders choose nets; leave them out")
        return [partial(measure_training, options.seconds)]
    cases, contenders = [case._replace(device=options.device) for case in CASES], CONTENDERS
    clocks = {"": timer}  # it waits for a GPU
    if options.epochs:
        cases, contenders = EPOCHS, EPOCH_CONTENDERS
        clocks = {", wall": time.perf_counter, ", CPU": time.process_time}
    elif options.layers:
        cases, contenders = [Case(f"layer {n} x {i} x {o}", (i, o), n) for n, i, o in LAYERS], LAYER_CONTENDERS
    elif options.widths:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        cases = [Case(f"width {n} on {device}", (n, n, n, 10), 256, device) for device in devices for n in WIDTHS]
    names = "; ".join(case.name for case in cases)
    if not (cases := [case for case in cases if options.nets in case.name]):
        raise InputError(f"expected --nets in one of {names}; got {options.nets!r}")
    if unknown := set(options.contenders or ()) - contenders.keys():
        raise InputError(f"expected contenders among {'; '.join(contenders)}. Got {'; '.join(sorted(unknown))}")
    chosen = {name: contenders[name] for name in options.contenders or contenders}
    return [partial(measure, case, chosen, options.seconds, clocks) for case in cases]


if __name__ == "__main__":
    with while_read():
        main()
