"""`make gpu`, or `python tests/gpu.py`: every CUDA test, then the figures of a GPU's table, in under 8 minutes.

It takes the Python and the torch (2.11 or newer) that run it, and installs nothing. What needs a missing package is
skipped by name. `--device cpu` tries the same script without a GPU. The table goes to --output as Markdown.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import manual_mlp as mm  # noqa: E402

LONGEST = 470  # seconds for all of it
TESTS = ("tests/test_guest_cuda.py", "tests/test_guest_amp.py")
CONTENDERS = ("eager torch", "compile", "step", "epoch", "eager, bf16", "step, bf16", "products")
NETS = (((64, 30, 10), 10), ((64, 128, 10), 64), ((784, 256, 128, 10), 64))
COUNTS = (1, 16, 64)
PARTS: dict[str, tuple[float, Callable[[argparse.Namespace, float], str]]] = {}  # by name: share of the time, and it


def missing(*packages: str) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def called(words: list[str], seconds: float) -> str:
    """Return what a command of this Python says, and how it ended."""
    command = [sys.executable, *words]
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONPATH": str(ROOT)}  # tests hide a GPU unless named
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"")[-4000:].decode(errors="replace")
        return f"{said}\nnot over after {seconds:.0f} s: python {' '.join(words)}".strip()
    end = "" if done.returncode == 0 else f"\n\nended with {done.returncode}:\n{done.stderr[-2000:]}"
    return done.stdout[-4000:].strip() + end


def tests(options: argparse.Namespace, seconds: float) -> str:
    """Run the CUDA tests; on the CPU they skip themselves."""
    if lacking := missing("pytest"):
        return f"skipped, because {lacking[0]} is not installed: {', '.join(TESTS)}"
    words = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-W", "default", *TESTS, "-k", "cuda"]
    return "```text\n" + called(words, seconds) + "\n```"


def steps(options: argparse.Namespace, seconds: float) -> str:
    """Measure a step of each net: eager, torch.compile, the engine's graph in float32 and bfloat16."""
    if lacking := missing("threadpoolctl"):
        return f"skipped, because {lacking[0]} is not installed: manual_mlp.benchmark"
    words = ["-m", "manual_mlp.benchmark", "--device", options.device, "--seconds", f"{seconds / 15:.1f}"]
    return "```text\n" + called([*words, "--contenders", *CONTENDERS], seconds) + "\n```"


def widths(options: argparse.Namespace, seconds: float) -> str:
    """Measure wider and wider nets, on the CPU and the GPU."""
    if lacking := missing("threadpoolctl"):
        return f"skipped, because {lacking[0]} is not installed: manual_mlp.benchmark --widths"
    words = ["-m", "manual_mlp.benchmark", "--widths", "--threads", str(torch.get_num_threads())]
    words += ["--seconds", f"{seconds / 40:.1f}", "--contenders", "eager torch", "step"]
    return "```text\n" + called(words, seconds) + "\n```"


def many(options: argparse.Namespace, seconds: float) -> str:
    """Measure K nets at once by batched products: µs for each net and step, and to one net's `engine.step`."""
    lines = ["| net, batch | nets | µs for each net and step | / engine.step |", "|---|--:|--:|--:|"]
    end, count = time.monotonic() + min(seconds, 60), len(NETS) if options.device == "cuda" else 1
    for sizes, batch in NETS[:count]:
        for k in COUNTS:
            if time.monotonic() < end:
                own, one = _times(sizes, batch, k, options.device)
                lines.append(f"| {'-'.join(map(str, sizes))}, {batch} | {k} | {own:.2f} | {own / one:.2f} |")
    return "\n".join(lines)


def _times(sizes: tuple[int, ...], batch: int, k: int, device: str) -> tuple[float, float]:
    """Return µs for each net and step of an epoch of 64 mini-batches, and µs of one net's step; the least of 5."""
    nets = [mm.MLP(sizes, device=device) for _ in range(k)]
    together = mm.EnsembleEngine(nets, [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets], native=False)
    net = mm.MLP(sizes, device=device)
    alone = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=0.1), native=False)
    x, y = torch.randn(64 * batch, sizes[0], device=device), torch.rand(64 * batch, sizes[-1], device=device)

    def epoch() -> None:
        together.train_epoch(x, y, batch)

    def single() -> None:
        for start in range(0, 64 * batch, batch):
            alone.step(x[start : start + batch], y[start : start + batch])

    least = [float("inf")] * 2
    for turn in range(7):
        for place, call in enumerate((epoch, single)):
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            if turn > 1:  # the first ones warm up, and capture the graphs
                least[place] = min(least[place], time.perf_counter() - began)
    return least[0] / 64 / k * 1e6, least[1] / 64 * 1e6


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


PARTS |= {"CUDA tests": (0.35, tests), "steps": (0.5, steps), "many nets": (1.0, many), "widths": (1.0, widths)}


def sections(options: argparse.Namespace) -> Iterator[str]:
    card = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU: a trial on the CPU"
    yield f"# {card}\n\ntorch {torch.__version__}, Python {sys.version.split()[0]}."
    if lacking := missing("lightning", "hydra"):
        yield f"Not installed: {', '.join(lacking)}. Skipped: `train.py` and `manual_mlp.training`."
    began, limit = time.monotonic(), options.seconds
    for name, (share, part) in PARTS.items():
        left = limit - (time.monotonic() - began)
        yield f"## {name}\n\n" + (part(options, share * left) if left > 5 else "skipped: the time was over")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=LONGEST, help=f"for all of it, {LONGEST} at most")
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    options = parser.parse_args(arguments)
    options.seconds = min(options.seconds, LONGEST)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        sys.exit(f"Error: expected torch 2.11 or newer; got {torch.__version__}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("Error: expected a CUDA device; torch finds none: try the script with --device cpu")
    page = ""
    for section in sections(options):
        print(section, flush=True)
        page += section + "\n\n"
        options.output.write_text(page, encoding="utf-8")  # what was measured is kept, whatever comes next


if __name__ == "__main__":
    main()
