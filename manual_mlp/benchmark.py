"""`python -m manual_mlp.benchmark`: µs per training step of the engine, the whole-net Function and the layers.

Honest by construction: all contenders of a case run interleaved in one process, on the same batch and one thread,
after a warm-up; medians stand beside their 20th and 80th percentiles, and the conditions above the table. A step is
zero_grad, prediction, cost, gradients and update by SGD. "products" is the floor: the step's matrix products alone.
"""

import argparse
import csv
import importlib
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import functional, modules
from manual_mlp.convert import convert
from manual_mlp.engine import BackpropEngine
from manual_mlp.errors import InputError
from manual_mlp.network import NetworkLoss

Step = Callable[[], Any]


@dataclass(frozen=True)
class Net:
    """Sizes of a sigmoid net with quadratic cost, and the rows of a batch."""

    name: str
    sizes: tuple[int, ...]
    rows: int


NETS = [
    Net("784-30-10, 10", (784, 30, 10), 10),
    Net("64-128-10, 64", (64, 128, 10), 64),
    Net("784-256-128-10, 64", (784, 256, 128, 10), 64),
    Net("784-512-512-10, 256", (784, 512, 512, 10), 256),
    Net("1024-1024-1024-1024-10, 512", (1024, 1024, 1024, 1024, 10), 512),
    Net("20 x 256-10, 128", (*[256] * 20, 10), 128),
]
LAYERS = [(16, 64, 64), (64, 256, 256), (256, 512, 512), (512, 1024, 1024)]
EPOCH_BATCHES = 32  # of train_epoch, whose time is divided by them


@dataclass(frozen=True)
class Row:
    """One line of the results: times in µs, kept in bytes."""

    case: str
    contender: str
    median: float
    low: float
    high: float
    to_eager: float
    to_products: float
    kept: int | None


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: each makes a step of its own net from the same weights and batch
# ---------------------------------------------------------------------------------------------------------------------


def plain_net(net: Net) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[module for i, o in pairwise(net.sizes) for module in (nn.Linear(i, o), nn.Sigmoid())])


def batch_of(net: Net, batches: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = net.rows * batches
    x = torch.randn(rows, net.sizes[0], generator=generator)
    return x, torch.rand(rows, net.sizes[-1], generator=generator)


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


def eager(net: Net) -> Step:
    model, loss = plain_net(net), nn.MSELoss()
    return autograd_step(model, lambda x, y: loss(model(x), y), net)


def compiled(net: Net) -> Step:
    model, loss = plain_net(net), nn.MSELoss()
    return autograd_step(model, torch.compile(lambda x, y: loss(model(x), y)), net)


def two_functions(net: Net) -> Step:
    model = convert(plain_net(net), fuse=False)
    return autograd_step(model, lambda x, y: functional.quadratic_loss(model(x), y), net)


def fused_layers(net: Net) -> Step:
    model = modules.MLP(net.sizes)
    return autograd_step(model, lambda x, y: functional.quadratic_loss(model(x), y), net)


def network(net: Net) -> Step:
    whole = NetworkLoss(plain_net(net))
    return autograd_step(whole, whole, net)


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


def products(net: Net) -> Step:
    """z = a Wᵀ + b, δ W and W := W + α δᵀ a of every layer, into tensors that are there, without an autograd."""
    with torch.inference_mode():
        weights = [torch.randn(o, i) / math.sqrt(i) for i, o in pairwise(net.sizes)]
        biases = [torch.zeros(o) for o in net.sizes[1:]]
        a = [batch_of(net)[0]] + [torch.randn(net.rows, n) for n in net.sizes[1:]]
        z, delta = ([torch.randn(net.rows, n) for n in net.sizes] for _ in range(2))
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
    "torch.compile": compiled,
    "two Functions a layer": two_functions,
    "fused layers": fused_layers,
    "network Function": network,
    "engine.step": engine_step,
    "engine.train_epoch": engine_epoch,
    "engine.step, bfloat16": engine_bfloat16,
    "JAX jit": jax_jit,
    "scikit-learn": sklearn_step,
    "products": products,
}
EXTRAS = {"JAX jit": "jax", "scikit-learn": "sklearn"}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """µs per call of each, measured in turns for about so many seconds in all; ten rounds at least."""
    repeats = {name: _repeats(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 10:
        for name, step in steps.items():
            step()  # brings its own data back into the cache
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return times


def _repeats(step: Step) -> int:
    """Calls that take a few milliseconds together; the first ones are the warm-up."""
    for _ in range(3):
        step()
    start = time.perf_counter()
    step()
    return max(1, math.ceil(2e-3 / max(time.perf_counter() - start, 1e-6)))


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(times, n=5)
    return statistics.median(times), cuts[0], cuts[-1]


def kept(step: Step) -> int:
    """Bytes that autograd keeps for backward in one step, beside the parameters; each memory counted once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and tensor.is_leaf) and not tensor._is_view():  # a view here is Wᵀ
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def measure(net: Net, names: Iterable[str], seconds: float) -> list[Row]:
    """One case: every contender that can be made here."""
    steps = {name: CONTENDERS[name](net) for name in names if _installed(name)}
    times = interleaved(steps, seconds)
    if "engine.train_epoch" in times:
        times["engine.train_epoch"] = [t / EPOCH_BATCHES for t in times["engine.train_epoch"]]
    middle = {name: statistics.median(values) for name, values in times.items()}
    autograd = ("eager torch", "two Functions a layer", "fused layers", "network Function")
    return [
        Row(
            net.name,
            name,
            *percentiles(values),
            middle[name] / middle.get("eager torch", math.nan),
            middle[name] / middle.get("products", math.nan),
            kept(steps[name]) if name in autograd else None,
        )
        for name, values in times.items()
    ]


def _installed(name: str) -> bool:
    return name not in EXTRAS or importlib.util.find_spec(EXTRAS[name]) is not None


def measure_layer(rows: int, n_in: int, n_out: int, seconds: float) -> list[Row]:
    """One layer forward and backward, input gradient included: fused and as two Functions, beside nn's two."""
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

    times = interleaved({name: step_of(layer) for name, layer in contenders.items()}, seconds)
    base = statistics.median(times["eager torch"])
    case = f"layer {rows} x {n_in} x {n_out}"
    return [
        Row(case, name, *percentiles(values), statistics.median(values) / base, math.nan, None)
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
    base = statistics.median(times[end_to_end.PLAIN])
    return [
        Row(" ".join(overrides), name, *percentiles(values), statistics.median(values) / base, math.nan, None)
        for name, values in times.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def conditions() -> str:
    """What the numbers depend on."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {_processor()}, "
        f"{torch.get_num_threads()} thread of {os.cpu_count()} cores, load {load}; float32, sigmoid, plain SGD"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def table(rows: list[Row]) -> str:
    lines = [
        "| case | contender | µs | 20 % | 80 % | / eager | / products | kept for backward |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        floor = "" if math.isnan(row.to_products) else f"{row.to_products:.2f}"
        eager = "" if math.isnan(row.to_eager) else f"{row.to_eager:.2f}"
        bytes_kept = "" if row.kept is None else f"{row.kept / 1024:.0f} KiB"
        times = " | ".join(f"{value:.1f}" for value in (row.median, row.low, row.high))
        lines.append(f"| {row.case} | {row.contender} | {times} | {eager} | {floor} | {bytes_kept} |")
    return "\n".join(lines)


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


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measures what the arguments choose, prints the table, and returns its rows."""
    parser = argparse.ArgumentParser(prog="python -m manual_mlp.benchmark", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", default="", help="only nets whose name contains this")
    parser.add_argument("--contenders", nargs="+", help=f"some of: {', '.join(CONTENDERS)}; all if left out")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    parser.add_argument("--layers", action="store_true", help="single layers instead of nets")
    parser.add_argument(
        "--end-to-end", action="store_true", help="whole trainings by train.py instead of nets; minutes"
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    names = options.contenders or list(CONTENDERS)
    if unknown := set(names) - CONTENDERS.keys():
        raise InputError(f"expected contenders among {', '.join(CONTENDERS)}; got {', '.join(sorted(unknown))}")
    nets = [net for net in NETS if options.nets in net.name]
    if not nets:
        raise InputError(f"expected --nets in one of {'; '.join(net.name for net in NETS)}; got {options.nets!r}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(conditions(), file=sys.stderr)
        rows = measure_training(options.seconds) if options.end_to_end else []
        for case in [] if options.end_to_end else LAYERS if options.layers else nets:
            new = (
                measure(case, names, options.seconds)
                if isinstance(case, Net)
                else measure_layer(*case, options.seconds)
            )
            rows += new
            print(f"{new[0].case} done", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    print(table(rows))
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        write_plot(rows, options.plot)
    return rows


if __name__ == "__main__":
    main()
