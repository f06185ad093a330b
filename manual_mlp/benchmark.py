"""`python -m manual_mlp.benchmark`: µs per training step of the engine, the whole-net Function and the layers.

Honest by construction: all contenders of a case run interleaved in one process, on the same batch, one thread and one
core, after a warm-up; medians stand beside their 20th and 80th percentiles, and the conditions above the table. A ratio
is the median of the ratios within a round. A step is zero_grad, prediction, cost, gradients and update by SGD.
"products" is the floor: the step's matrix products alone. An epoch's time is divided by its batches.
"""

import argparse
import csv
import importlib
import importlib.util
import math
import operator
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # scikit-learn's own
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manual_mlp import functional, modules
from manual_mlp.conversion import convert
from manual_mlp.engine import BackpropEngine
from manual_mlp.errors import InputError
from manual_mlp.network import network_loss

Step = Callable[[], Any]


@dataclass(frozen=True)
class Net:
    """Sizes of a sigmoid net with quadratic cost, and the rows of a batch."""

    name: str
    sizes: tuple[int, ...]
    rows: int
    device: str = "cpu"


NETS = [
    Net("784-30-10, 10", (784, 30, 10), 10),
    Net("64-128-10, 64", (64, 128, 10), 64),
    Net("784-256-128-10, 64", (784, 256, 128, 10), 64),
    Net("784-512-512-10, 256", (784, 512, 512, 10), 256),
    Net("1024-1024-1024-1024-10, 512", (1024, 1024, 1024, 1024, 10), 512),
    Net("20 x 256-10, 128", (*[256] * 20, 10), 128),
]
LAYERS = [(16, 64, 64), (64, 128, 128), (64, 256, 256), (256, 512, 512), (512, 1024, 1024)]
WIDTHS = [64, 128, 256, 512, 1024, 2048, 4096]
EPOCH_BATCHES = 32  # of train_epoch, whose time is divided by them


@dataclass(frozen=True)
class Row:
    """One line of the results: times in µs; bytes of a step's new tensors, as `memory`."""

    case: str
    contender: str
    median: float
    low: float
    high: float
    to_eager: float
    to_products: float
    kept: int | None
    peak: int | None


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: each makes a step of its own net from the same weights and batch
# ---------------------------------------------------------------------------------------------------------------------


def plain_net(net: Net) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [module for i, o in pairwise(net.sizes) for module in (nn.Linear(i, o), nn.Sigmoid())]
    return nn.Sequential(*layers).to(net.device)


def batch_of(net: Net, batches: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = net.rows * batches
    x, y = (
        make(rows, n, generator=generator) for make, n in ((torch.randn, net.sizes[0]), (torch.rand, net.sizes[-1]))
    )
    return x.to(net.device), y.to(net.device)


def autograd_step(model: nn.Module, cost: Callable[[Tensor, Tensor], Tensor], net: Net) -> Step:
    """cost(x, y) and the fused SGD of torch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    x, y = batch_of(net)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = cost(x, y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def eager(net: Net, bfloat16: bool = False, compiled: bool = False) -> Step:
    """The cost of nn.Linear and nn.Sigmoid; bfloat16: products by autocast."""
    model, loss = plain_net(net), nn.MSELoss()

    def cost(x: Tensor, y: Tensor) -> Tensor:
        if not bfloat16:
            return loss(model(x), y)
        with torch.autocast(net.device, torch.bfloat16):
            return loss(model(x).float(), y)

    return autograd_step(model, torch.compile(cost) if compiled else cost, net)


def two_functions(net: Net) -> Step:
    model = convert(plain_net(net), fuse=False)
    return autograd_step(model, lambda x, y: functional.quadratic_loss(model(x), y), net)


def fused_layers(net: Net) -> Step:
    model = modules.MLP(net.sizes, device=net.device)
    return autograd_step(model, lambda x, y: functional.quadratic_loss(model(x), y), net)


def network(net: Net) -> Step:
    model = plain_net(net)
    return autograd_step(model, partial(network_loss, model), net)


def engine_of(net: Net, **arguments: Any) -> BackpropEngine:
    model = plain_net(net)
    return BackpropEngine(model, torch.optim.SGD(model.parameters(), lr=0.01), **arguments)


def engine_step(net: Net) -> Step:
    engine, (x, y) = engine_of(net), batch_of(net)
    return lambda: engine.step(x, y)


def engine_bfloat16(net: Net) -> Step:
    engine, (x, y) = engine_of(net, compute_dtype=torch.bfloat16), batch_of(net)
    return lambda: engine.step(x, y)


def engine_epoch(net: Net) -> Step:
    """A whole epoch of EPOCH_BATCHES batches, the gathering of their rows included."""
    engine, (x, y) = engine_of(net), batch_of(net, EPOCH_BATCHES)
    return lambda: engine.train_epoch(x, y, net.rows)


def engine_batches(net: Net) -> Step:
    """train_epoch's own loop over as many batches, their rows gathered before."""
    engine, (x, y) = engine_of(net), batch_of(net)
    rates = engine._rates()
    plan = engine._planned(x, y, rates)
    for data, chunk in zip((x, y), plan.chunk, strict=True):
        chunk.copy_(data.repeat(len(plan.batches), 1))
    batches = [plan.batches[index % len(plan.batches)] for index in range(EPOCH_BATCHES)]
    steps = list(zip(batches, torch.empty(EPOCH_BATCHES, device=net.device).split(1), strict=True))
    return lambda: engine._train(plan, steps, rates)


def products(net: Net) -> Step:
    """z = a Wᵀ + b, δ W and W := W + α δᵀ a of every layer, into tensors that are there, without an autograd."""
    with torch.inference_mode():
        on: Any = {"device": net.device}
        weights = [torch.randn(o, i, **on) / math.sqrt(i) for i, o in pairwise(net.sizes)]
        biases = [torch.zeros(o, **on) for o in net.sizes[1:]]
        a = [batch_of(net)[0]] + [torch.randn(net.rows, n, **on) for n in net.sizes[1:]]
        z, delta = ([torch.randn(net.rows, n, **on) for n in net.sizes] for _ in range(2))
        turned, delta_t = [weight.t() for weight in weights], [d.t() for d in delta]

    def step() -> None:
        with torch.inference_mode():
            for i in range(len(weights)):
                torch.addmm(biases[i], a[i], turned[i], out=z[i + 1])
            for i in range(len(weights) - 1, -1, -1):
                if i:
                    torch.mm(delta[i + 1], weights[i], out=z[i])
                weights[i].addmm_(delta_t[i + 1], a[i], alpha=1e-9)

    return step


def jax_jit(net: Net) -> Step:
    jax = importlib.import_module("jax")
    jnp = importlib.import_module("jax.numpy")

    weights = [layer.weight.detach().numpy() for layer in plain_net(net).children() if isinstance(layer, nn.Linear)]
    parameters = [(jnp.asarray(weight), jnp.zeros(len(weight))) for weight in weights]
    x, y = (jnp.asarray(data.numpy()) for data in batch_of(net))

    def cost(parameters: Any, x: Any, y: Any) -> Any:
        for weight, bias in parameters:
            x = jax.nn.sigmoid(x @ weight.T + bias)
        return ((x - y) ** 2).sum() / (2 * len(x))

    @jax.jit
    def update(parameters: Any, x: Any, y: Any) -> Any:
        loss, gradients = jax.value_and_grad(cost)(parameters, x, y)
        return loss, jax.tree.map(lambda w, g: w - 0.01 * g, parameters, gradients)

    def step() -> None:
        nonlocal parameters
        loss, parameters = update(parameters, x, y)
        jax.block_until_ready((loss, parameters))

    return step


def sklearn_step(net: Net) -> Step:
    from sklearn.neural_network import MLPRegressor  # type: ignore[import-untyped]

    x, y = (data.numpy() for data in batch_of(net))
    plain = {"solver": "sgd", "momentum": 0, "alpha": 0, "batch_size": net.rows}
    model = MLPRegressor(hidden_layer_sizes=net.sizes[1:-1], activation="logistic", **plain)
    return lambda: model.partial_fit(x, y)


CONTENDERS: dict[str, Callable[[Net], Step]] = {
    "eager torch": eager,
    "torch.compile": partial(eager, compiled=True),
    "two Functions a layer": two_functions,
    "fused layers": fused_layers,
    "network Function": network,
    "engine.step": engine_step,
    "engine.train_epoch": engine_epoch,
    "train_epoch, rows gathered": engine_batches,
    "eager torch, bfloat16": partial(eager, bfloat16=True),
    "torch.compile, bfloat16": partial(eager, bfloat16=True, compiled=True),
    "engine.step, bfloat16": engine_bfloat16,
    "JAX jit": jax_jit,
    "scikit-learn": sklearn_step,
    "products": products,
}
EXTRAS = {"JAX jit": "jax", "scikit-learn": "sklearn"}  # on the CPU, where installed
EPOCHS = ("engine.train_epoch", "train_epoch, rows gathered")
MEMORY = ("eager torch", "two Functions a layer", "fused layers", "network Function", "engine.step")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def interleaved(steps: dict[str, Step], seconds: float, device: str = "cpu") -> dict[str, list[float]]:
    """µs per call of each, measured in turns for about so many seconds in all; ten rounds at least."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    repeats = {name: _repeats(step, wait) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 10:
        for name, step in steps.items():
            step()  # brings its own data back into the cache
            wait()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            wait()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return times


def _nothing() -> None:
    """A CPU has done what it was called for."""


def _repeats(step: Step, wait: Step) -> int:
    """Calls that take a few milliseconds together; the first ones are the warm-up."""
    for _ in range(3):
        step()
    wait()
    start = time.perf_counter()
    step()
    wait()
    return max(1, math.ceil(2e-3 / max(time.perf_counter() - start, 1e-6)))


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(times, n=5)
    return statistics.median(times), cuts[0], cuts[-1]


class _Allocated(TorchDispatchMode):
    """Bytes of the tensors made under it that live at once: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(result)}.values():
            if storage._cdata not in given:
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def _freed(self, size: int) -> None:
        self.held -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory(step: Step) -> tuple[int, int]:
    """Bytes of a step's new tensors: what lives when the backward pass begins, and the most that lives at once.

    Buffers that were made once, and stay, are not among them.
    """
    step()
    begun: list[int] = []

    def unpack(tensor: Tensor) -> Tensor:
        begun.append(allocated.held)
        return tensor

    with _Allocated() as allocated, torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        step()
    return begun[0] if begun else 0, allocated.peak


def measure(net: Net, names: Iterable[str], seconds: float) -> list[Row]:
    """One case: every contender that can be made here."""
    torch.compiler.reset()  # after eight nets torch.compile would give up, and run them as they are
    steps = {name: CONTENDERS[name](net) for name in names if _possible(name, net.device)}
    bytes_of = {name: memory(step) for name, step in steps.items() if name in MEMORY}
    times = interleaved(steps, seconds, net.device)
    for name in times.keys() & set(EPOCHS):
        times[name] = [t / EPOCH_BATCHES for t in times[name]]
    return [
        Row(
            net.name,
            name,
            *percentiles(values),
            ratio(values, times.get("eager torch")),
            ratio(values, times.get("products")),
            *bytes_of.get(name, (None, None)),
        )
        for name, values in times.items()
    ]


def ratio(times: list[float], to: list[float] | None) -> float:
    """The median of the ratios within a round, which a machine that slows down for a while leaves alone."""
    return math.nan if to is None else statistics.median(map(operator.truediv, times, to))


def _possible(name: str, device: str) -> bool:
    if name not in EXTRAS:
        return True
    return device == "cpu" and importlib.util.find_spec(EXTRAS[name]) is not None


def measure_layer(sizes: tuple[int, int, int], seconds: float) -> list[Row]:
    """One layer forward and backward, input gradient included: fused and as two Functions, beside nn's two."""
    rows, n_in, n_out = sizes
    plain = nn.Sequential(nn.Linear(n_in, n_out), nn.Sigmoid())
    contenders = {
        "eager torch": plain,
        "fused layers": modules.AffineActivation(n_in, n_out),
        "two Functions a layer": nn.Sequential(modules.Affine(n_in, n_out), modules.Sigmoid()),
    }

    def step_of(layer: nn.Module) -> Step:
        x, g = torch.randn(rows, n_in, requires_grad=True), torch.randn(rows, n_out)

        def step() -> None:
            layer.zero_grad()
            x.grad = None
            layer(x).backward(g)

        return step

    steps = {name: step_of(layer) for name, layer in contenders.items()}
    bytes_of = {name: memory(step) for name, step in steps.items()}
    times = interleaved(steps, seconds)
    case = f"layer {rows} x {n_in} x {n_out}"
    return [
        Row(case, name, *percentiles(values), ratio(values, times["eager torch"]), math.nan, *bytes_of[name])
        for name, values in times.items()
    ]


def measure_training(seconds: float, *overrides: str) -> list[Row]:
    """`train.py` beside a plain loop, whole trainings in turns, three of each at least; µs per step."""
    from manual_mlp.training import end_to_end  # which brings Lightning and Hydra

    overrides = overrides or end_to_end.EXPERIMENT
    steps, trainings = end_to_end.trainings(*overrides)
    times: dict[str, list[float]] = {name: [] for name in trainings}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[end_to_end.PLAIN]) < 3:
        for name, train in trainings.items():
            times[name].append(train() / steps * 1e6)
    case, plain = " ".join(overrides), times[end_to_end.PLAIN]
    return [
        Row(case, name, *percentiles(values), ratio(values, plain), math.nan, None, None)
        for name, values in times.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """So many threads for torch and for NumPy's BLAS, and with one thread one core, which binds JAX's threads too."""
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
    """What the numbers depend on."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    card = f"{torch.cuda.get_device_name()}, " if cuda else ""
    return (
        f"{card}torch {torch.__version__}, Python {platform.python_version()}, {_processor()}, "
        f"threads: {torch.get_num_threads()}, cores: {os.cpu_count()}, load {load}; float32, sigmoid, plain SGD"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def table(rows: list[Row]) -> str:
    """All that was measured, a line for each contender of each case."""
    head = ("contender", "µs", "20 %", "80 %", "/ eager", "/ products", "kept", "peak")
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        lines += ["", f"{case:26}" + "".join(f"{name:>11}" for name in head[1:])]
        for row in rows:
            if row.case == case:
                times = [f"{value:.1f}" for value in (row.median, row.low, row.high)]
                cells = [*times, _digits(row.to_eager), _digits(row.to_products), _size(row.kept), _size(row.peak)]
                lines.append(f"{row.contender:26}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines[1:])


def _digits(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.2f}"


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} B"


SHORT = {
    "torch.compile": "compile",
    "two Functions a layer": "2 Functions",
    "fused layers": "fused",
    "network Function": "network",
    "engine.step": "step",
    "train_epoch, rows gathered": "epoch",
    "engine.step, bfloat16": "bf16",
    "JAX jit": "JAX",
    "scikit-learn": "sklearn",
}


def markdown(rows: list[Row]) -> str:
    """A line for each case: eager torch in µs, the others relative to it, the engine also to the bare products."""
    short = SHORT | {row.contender: row.contender for row in rows if row.contender not in CONTENDERS}  # of trainings
    names = [name for name in short if any(row.contender == name for row in rows)]
    floor = [name for name in ("engine.step", "train_epoch, rows gathered") if name in names]
    head = ["net, batch", "eager, µs", *(short[name] for name in names), *(f"{short[n]}/products" for n in floor)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for case in dict.fromkeys(row.case for row in rows):
        of = {row.contender: row for row in rows if row.case == case}
        eager_time = f"{of['eager torch'].median:.0f}" if "eager torch" in of else ""
        cells = [_digits(of[name].to_eager) if name in of else "" for name in names]
        lines.append([case, eager_time, *cells, *(_digits(of[name].to_products) for name in floor)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_plot(rows: list[Row], path: Path) -> None:
    """Bars of time relative to eager torch, a group for each case."""
    from matplotlib.figure import Figure

    cases, contenders = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("case", "contender"))
    figure = Figure(figsize=(2 + 1.6 * len(cases), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(contenders)
    for index, contender in enumerate(contenders):
        of = {row.case: row.to_eager for row in rows if row.contender == contender}
        places = [place + (index - len(contenders) / 2 + 0.5) * width for place, case in enumerate(cases) if case in of]
        axes.bar(places, [of[case] for case in cases if case in of], width, label=contender)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_ylabel("time / eager torch")
    axes.set_xticks(range(len(cases)), cases, rotation=20, fontsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path)


def write_sweep(rows: list[Row], path: Path) -> None:
    """µs of a step over the width of the net, a line for each contender and device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for device in dict.fromkeys(row.case.split()[-1] for row in rows):
        of = [row for row in rows if row.case.endswith(device)]
        for contender in dict.fromkeys(row.contender for row in of):
            points = [(int(row.case.split()[1]), row.median) for row in of if row.contender == contender]
            axes.loglog(*zip(*points, strict=True), marker="o", label=f"{contender}, {device}")
    axes.set_xlabel("neurons of each hidden layer")
    axes.set_ylabel("µs for a step")
    axes.legend(fontsize=7)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measures what the arguments choose, prints the table, and returns its rows."""
    options = _options(arguments)
    rows: list[Row] = []
    with pinned(options.threads):
        stated = conditions(options.device == "cuda" or (options.widths and torch.cuda.is_available()))
        print(stated, file=sys.stderr)
        for case in _cases(options):
            rows += case()
            print(f"{rows[-1].case} done", file=sys.stderr)
    print(f"{stated}.\n\n{markdown(rows) if options.markdown else table(rows)}")
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        (write_sweep if options.widths else write_plot)(rows, options.plot)
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m manual_mlp.benchmark", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", default="", help="only nets whose name contains this")
    parser.add_argument("--contenders", nargs="+", help=f"some of: {'; '.join(CONTENDERS)}. All if left out")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", action="store_true", help="single layers instead of nets, on the CPU")
    parser.add_argument("--end-to-end", action="store_true", help="whole trainings by train.py, on the CPU; minutes")
    parser.add_argument("--widths", action="store_true", help="wider and wider nets, on the CPU and, if there, on CUDA")
    parser.add_argument("--markdown", action="store_true", help="a line for each case, as in the README")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    if unknown := set(options.contenders or ()) - CONTENDERS.keys():
        raise InputError(f"expected contenders among {'; '.join(CONTENDERS)}. Got {'; '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("expected a CUDA device for --device cuda; torch finds none: leave --device out")
    if not any(options.nets in net.name for net in NETS):
        raise InputError(f"expected --nets in one of {'; '.join(net.name for net in NETS)}; got {options.nets!r}")
    if options.threads < 1:
        raise InputError(f"expected at least one of --threads; got {options.threads}")
    return options


def _cases(options: argparse.Namespace) -> list[Callable[[], list[Row]]]:
    seconds, names = options.seconds, options.contenders or list(CONTENDERS)
    if options.end_to_end:
        return [partial(measure_training, seconds)]
    if options.layers:
        return [partial(measure_layer, sizes, seconds) for sizes in LAYERS]
    nets = [replace(net, device=options.device) for net in NETS if options.nets in net.name]
    if options.widths:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        nets = [Net(f"width {n} on {device}", (n, n, n, 10), 256, device) for device in devices for n in WIDTHS]
    return [partial(measure, net, names, seconds) for net in nets]


if __name__ == "__main__":
    main()
