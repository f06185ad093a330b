"""Golden values: the bits of the parameters after 20 steps, by each way to train, as they were before the redesign.

`python -m tests.golden` says which cells differ from golden.json; `--write` rewrites that file. Only public names are
used here, so that the cells outlive what is behind them.

A cell holds the SHA-256 of all parameters in order and, in float64, the sum of each parameter: where the order of a sum
has changed, the bits differ, but the sums agree to 1e-12.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manual_mlp as mm
from manual_mlp.network import network_loss

FILE = Path(__file__).with_name("golden.json")
FIXTURES = Path(__file__).with_name("fixtures")
OF_CHECKPOINTS = FIXTURES / "v0.1.json"
CHECKPOINTS = ("classes", "regression", "adam", "perceptron")
BACKPROP = ("layers", "network", "engine", "engine_adam", "engine_epoch", "autograd")
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
ACTIVATIONS = ("identity", "sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu", "gelu", "gelu_tanh")
COSTS = ("quadratic", "mse", "bce", "cross_entropy")
OURS = {
    "quadratic": mm.QuadraticLoss,
    "mse": mm.MSELoss,
    "bce": mm.BCEWithLogitsLoss,
    "cross_entropy": mm.CrossEntropyLoss,
}
TORCHS = {**OURS, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss, "cross_entropy": nn.CrossEntropyLoss}
STEPS = 20
WITHOUT_ADAM = tuple(name for name in BACKPROP if name != "engine_adam")
PLAIN = ("layers", "network", "engine", "autograd")
EXACT = ("float64", "float32")
MEASURE = 1e-12


@dataclass(frozen=True)
class Cell:
    """A net, a cost and batches. `rows` are so many that an epoch has four batches, the last one shorter.

    backprop, dtypes   for which the cell is recorded
    kind               of the model: an mm.MLP, nested nn.Sequentials, or torch's layers converted
    cut                whether two neurons of the first hidden layer are cut off after 12 of the steps
    """

    name: str
    activation: Any
    cost: str = "quadratic"
    output: Any = "identity"
    sizes: tuple[int, ...] = (5, 7, 31, 4)
    rows: int = 41
    batch: int = 12
    bias: bool = True
    dropout: float = 0.0
    kind: str = "mlp"
    cut: bool = False
    soft: bool = False
    sgd: dict[str, Any] = field(default_factory=dict)
    compute_dtype: torch.dtype | None = None
    backprop: tuple[str, ...] = BACKPROP
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")


def _cells() -> Iterator[Cell]:
    for activation in ACTIVATIONS:
        for cost in COSTS:  # the quadratic cost after the activation itself, the others after none
            output = activation if cost == "quadratic" else "identity"
            backprop = PLAIN if cost in ("mse", "bce") else BACKPROP
            yield Cell(f"{activation} {cost}", activation, cost, output, backprop=backprop, dtypes=tuple(DTYPES))
    wide: dict[str, Any] = {"sizes": (20, 64, 24, 10), "rows": 130, "batch": 40, "dtypes": EXACT}
    many = {**wide, "sizes": (20, 128, 24, 10)}
    yield Cell("wide sigmoid quadratic", "sigmoid", "quadratic", "sigmoid", **wide)
    yield Cell("wide relu cross_entropy", "relu", "cross_entropy", **wide)
    yield Cell("many relu mse", "relu", "mse", "sigmoid", **many)
    yield Cell("many leaky_relu quadratic", "leaky_relu", **many)
    yield Cell("dropout tanh quadratic", "tanh", output="sigmoid", dropout=0.3)
    yield Cell("dropout relu cross_entropy", "relu", "cross_entropy", dropout=0.3)
    yield Cell("without bias sigmoid quadratic", "sigmoid", output="sigmoid", bias=False)
    yield Cell("without bias gelu mse", "gelu", "mse", bias=False)
    yield Cell("cut tanh quadratic", "tanh", cut=True, backprop=WITHOUT_ADAM)
    yield Cell("cut silu cross_entropy", "silu", "cross_entropy", cut=True, backprop=WITHOUT_ADAM)
    yield Cell("soft sigmoid cross_entropy", "sigmoid", "cross_entropy", soft=True, dtypes=EXACT)
    yield Cell("relu and tanh mse", ["relu", "tanh"], "mse", "softplus")
    yield Cell("leaky_relu(-0.1) quadratic", mm.LeakyReLU(-0.1))
    yield Cell("leaky_relu(0.2) quadratic", mm.LeakyReLU(0.2), output=mm.LeakyReLU(0.2))
    yield Cell("softplus(2, 3) quadratic", mm.Softplus(2.0, 3.0), output=mm.Softplus(2.0, 3.0))
    sgd: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01}
    yield Cell("momentum sigmoid quadratic", "sigmoid", output="sigmoid", sgd=sgd, backprop=WITHOUT_ADAM)
    decay: dict[str, Any] = {"sgd": {"weight_decay": 0.01}, "backprop": WITHOUT_ADAM, "dtypes": EXACT}
    yield Cell("decay relu bce", "relu", "bce", **decay)
    yield Cell("nested quadratic", None, kind="nested", dtypes=EXACT)
    yield Cell("nested cross_entropy", None, "cross_entropy", kind="nested", dtypes=EXACT)
    yield Cell("converted quadratic", None, kind="converted", backprop=PLAIN[:-1], dtypes=EXACT)
    products: dict[str, Any] = {"compute_dtype": torch.bfloat16, "dtypes": ("float32",)}
    products["backprop"] = ("engine", "engine_adam", "engine_epoch")
    yield Cell("bfloat16 products sigmoid quadratic", "sigmoid", output="sigmoid", **products)
    yield Cell("bfloat16 products silu cross_entropy", "silu", "cross_entropy", **products)


CELLS = tuple(_cells())


def machine() -> dict[str, str]:
    """Return what the bits depend on: torch's version and capability, and the processor, for which MKL chooses too."""
    known = torch.cpu.get_capabilities()
    products = [name for name in ("avx512_bf16", "avx512_fp16", "amx_tile", "amx_fp16") if known.get(name)]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join([str(known.get("cpu_name", known["architecture"])), *products]),
    }


def elsewhere(recorded: dict[str, str]) -> str:
    """Return in words why the bits can't be compared here; nothing if they can."""
    here = machine()
    if all(recorded[name] == value for name, value in here.items()):
        return ""
    place = "torch {torch} on capability {capability} ({processor})"
    return f"golden values were recorded with {place.format(**recorded)}; this is {place.format(**here)}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, and leave the number of threads and the random state as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def digest(parameters: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the bytes of all parameters in order."""
    sha = hashlib.sha256()
    for parameter in parameters:
        sha.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def computed(backprop: str, dtype: str, cells: Sequence[Cell] = CELLS) -> dict[str, str]:
    """Train the cells of a way and a dtype → for each the SHA-256 and, in float64, the sums of its parameters."""
    found = {}
    with one_thread():
        for cell in cells:
            if backprop in cell.backprop and dtype in cell.dtypes:
                parameters = list(trained(cell, backprop, DTYPES[dtype]).parameters())
                assert all(bool(parameter.isfinite().all()) for parameter in parameters), cell.name
                sums = [float(parameter.detach().sum()).hex() for parameter in parameters] if dtype == "float64" else []
                found[cell.name] = " ".join([digest(parameters), *sums])
    return found


def differences(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return a line for each cell that differs, is new or is gone."""
    lines = []
    for name in {**recorded, **found}:
        before, after = recorded.get(name), found.get(name)
        if before is None or after is None:
            lines.append(f"{name}: {'new' if before is None else 'gone'}")
        elif before != after:
            lines.append(f"{name}: {_how(before.split()[1:], after.split()[1:])}")
    return lines


def _how(before: list[str], after: list[str]) -> str:
    if not before or len(before) != len(after):
        return "other bits"
    pairs = [(float.fromhex(then), float.fromhex(now)) for then, now in zip(before, after, strict=True)]
    most = max(abs(then - now) / max(1.0, abs(then)) for then, now in pairs)
    return f"other bits, but sums within {MEASURE}" if most <= MEASURE else f"sums differ by up to {most:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# The models, the batches and the ways to train
# ---------------------------------------------------------------------------------------------------------------------


def trained(cell: Cell, backprop: str, dtype: torch.dtype) -> nn.Module:
    """Return the cell's model after 20 steps."""
    torch.manual_seed(1)
    model = _model(cell, backprop).to(dtype)
    input, target = _batches(cell, dtype)
    step = _epoch(cell, backprop, model)
    for epoch in range(STEPS // 4):
        if cell.cut and epoch == 3:
            _cut(model)
        step(input, target, epoch)
    return model


def _model(cell: Cell, backprop: str) -> nn.Module:
    theirs = backprop == "autograd" or cell.kind == "converted"
    n1, n2, n3, n4 = cell.sizes
    if cell.kind == "mlp":
        model = mm.MLP(cell.sizes, cell.activation, cell.output, cell.bias, cell.dropout)
        return model.to_torch() if theirs else model
    affine, tanh, relu = (nn.Linear, nn.Tanh, nn.ReLU) if theirs else (mm.Affine, mm.Tanh, mm.ReLU)
    last = nn.Sequential(relu(), affine(n3, n4))
    nested = nn.Sequential(nn.Sequential(affine(n1, n2), tanh()), affine(n2, n3), last)
    if cell.kind == "converted":
        mm.convert(nested)
    return nested


def _batches(cell: Cell, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(2), "dtype": torch.float64}
    input = torch.randn(cell.rows, cell.sizes[0], **draw).to(dtype)
    target = torch.rand(cell.rows, cell.sizes[-1], **draw)
    if cell.cost == "bce":
        target = target.round()
    elif cell.cost == "cross_entropy":
        target = target / target.sum(1, keepdim=True) if cell.soft else target.argmax(1)
    return input, target.to(dtype) if target.is_floating_point() else target


def _epoch(cell: Cell, backprop: str, model: nn.Module) -> Any:
    """Return a function of input, target and the epoch that takes four steps."""
    adam = backprop == "engine_adam"
    parameters = model.parameters()
    optimizer = torch.optim.Adam(parameters, 0.01) if adam else torch.optim.SGD(parameters, 0.1, **cell.sgd)
    take: Callable[[Tensor, Tensor], Tensor]
    if backprop.startswith("engine"):
        clip = 0.5 if adam else None
        engine = mm.BackpropEngine(model, optimizer, cell.cost, clip, cell.compute_dtype, native=False)
        if backprop == "engine_epoch":
            return lambda input, target, epoch: engine.train_epoch(
                input, target, cell.batch, torch.Generator().manual_seed(3 + epoch)
            )
        take = engine.step
    else:
        cost = (TORCHS if backprop == "autograd" else OURS)[cell.cost]()

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = network_loss(model, x, y, cell.cost) if backprop == "network" else cost(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        take = step

    def four(input: Tensor, target: Tensor, epoch: int) -> None:
        for x, y in zip(input.split(cell.batch), target.split(cell.batch), strict=True):
            take(x, y)

    return four


def _cut(model: nn.Module) -> None:
    """Cut two neurons off the first hidden layer: their rows of W¹ and b¹, their columns of W²."""
    weight, bias, after, *_ = model.parameters()
    for parameter in (weight, bias, after):
        parameter.grad = None
    weight.data, bias.data, after.data = weight.data[:-2].clone(), bias.data[:-2].clone(), after.data[:, :-2].clone()


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoints of version 0.1: the last.ckpt of runs of two epochs by train.py, whose words are beside them
# ---------------------------------------------------------------------------------------------------------------------


def net_of(name: str, path: Path) -> nn.Module:
    """Return the net that a checkpoint holds, in evaluation mode."""
    if name != "perceptron":
        return mm.MLP.from_checkpoint(path)
    from manual_mlp.training.module import MLPModule  # Lightning takes seconds to import

    return MLPModule.load_from_checkpoint(path, weights_only=True).net.eval()


def predicted(name: str) -> dict[str, list[list[float]]]:
    """Return what the net of a checkpoint says of three rows and, but of the perceptron, what its Predictor says."""
    from manual_mlp.training.predict import Predictor

    path = FIXTURES / f"v0.1-{name}.ckpt"
    net = net_of(name, path)
    inputs = next(net.parameters()).shape[1]
    rows = torch.arange(3 * inputs, dtype=torch.float64).sub(inputs).div(inputs).view(3, inputs)
    with one_thread(), torch.no_grad():
        found = {"net": net(rows.float()).tolist()}
        if name != "perceptron":
            found["predictor"] = Predictor.from_checkpoint(path)(rows + 2).tolist()
    return found


def resumed(name: str, folder: Path) -> str:
    """Train a checkpoint for one more epoch, as train.py does in its run's folder → the SHA-256 of its parameters."""
    from manual_mlp.training.command_line import with_its_own_overrides
    from manual_mlp.training.run import run
    from tests.configs import configured

    (folder / ".hydra").mkdir()
    shutil.copy(FIXTURES / f"v0.1-{name}.overrides.yaml", folder / ".hydra" / "overrides.yaml")
    for checkpoint in ("last.ckpt", "best.ckpt"):  # the best one was the last, or another becomes it
        shutil.copy(FIXTURES / f"v0.1-{name}.ckpt", folder / checkpoint)
    words = with_its_own_overrides([f"ckpt_path='{folder}/last.ckpt'", "trainer.max_epochs=3"])
    with one_thread():
        run(configured(folder, *(word for word in words if not word.startswith("hydra."))))
    return digest(net_of(name, folder / "last.ckpt").parameters())


def of_checkpoints() -> dict[str, Any]:
    """Return the machine and, for each checkpoint, what it predicts and its parameters after one more epoch."""
    content: dict[str, Any] = {"machine": machine()}
    for name in CHECKPOINTS:
        with tempfile.TemporaryDirectory() as folder:
            content[name] = {"predicted": predicted(name), "resumed": resumed(name, Path(folder))}
    return content


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def groups() -> list[tuple[str, str]]:
    """Return all pairs of a way and a dtype, but Adam's with float16, in which its ε of 1e-8 is 0."""
    pairs = [(backprop, dtype) for backprop in BACKPROP for dtype in DTYPES]
    return [pair for pair in pairs if pair != ("engine_adam", "float16")]


def recorded(file: Path = FILE) -> dict[str, Any]:
    """Return the content of golden.json: the machine, and for "layers float64" etc. the value of each cell."""
    return json.loads(file.read_text())


def written(content: dict[str, Any]) -> str:
    """Return the content as JSON with a line for each cell."""
    parts = [f'"machine": {json.dumps(content["machine"])}']
    for name, cells in content.items():
        if name != "machine":
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in cells.items())
            parts.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Print which cells differ from golden.json, and rewrite it if told to."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite golden.json with the values of today's code")
    parser.add_argument("--write-checkpoints", action="store_true", help="rewrite fixtures/v0.1.json alone")
    options = parser.parse_args()
    if options.write_checkpoints:
        OF_CHECKPOINTS.write_text(json.dumps(of_checkpoints(), indent=1) + "\n")
        return
    write = options.write
    before: dict[str, Any] = recorded() if FILE.exists() else {"machine": machine()}
    if reason := elsewhere(before["machine"]):
        print(reason)
    content: dict[str, Any] = {"machine": machine()}
    changed = cells = 0
    for backprop, dtype in groups():
        name = f"{backprop} {dtype}"
        content[name] = computed(backprop, dtype)
        lines = differences(before.get(name, {}), content[name])
        print(*(f"{name} {line}" for line in lines), sep="\n", end="\n" if lines else "")
        changed, cells = changed + len(lines), cells + len(content[name])
    print(f"{changed} of {cells} cells differ" + ("; golden.json is rewritten" if write else ""))
    if write:
        FILE.write_text(written(content))


if __name__ == "__main__":
    main()
