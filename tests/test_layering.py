"""What may import what; what an import brings; what no backward may call."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "manual_mlp"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each layer imports only from the ones before it.
LAYERS = [
    ["errors", "shell", "cuda_graph", "tables"],
    ["formulas", "grids", "checks"],
    ["schema", "kernels", "notation"],
    ["checkpoint", "functions"],
    ["grid_functions"],
    ["functional"],
    ["modules"],
    ["conversion", "snapshot", "perceptron", "grid_rules", "lenet"],
    ["program"],
    ["plan", "native"],
    ["network"],
    ["engine", "pretraining", "curvatures", "testing", "tracing"],
    ["plots", "report", "ensemble"],
    ["training", "lecture"],
    ["benchmark"],
    ["__main__"],
]
ORDER = {name: index for index, names in enumerate(LAYERS) for name in names}
ONLY_TRAINING = {"lightning", "hydra", "omegaconf", "sklearn", "pandas", "torchmetrics"}
ALLOWED = {("benchmark", "sklearn"), ("plots", "sklearn")}  # a contender there, displays here


def imports(file: Path) -> list[str]:
    """The modules a file imports, in full, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names += [f"{module}.{alias.name}" if module == "manual_mlp" else module for alias in node.names]
    return names


def layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    name = layer(file)
    if name == "__init__":
        return  # the public face; what it brings is tested below
    assert name in ORDER, f"{name} has no layer yet: give it one in LAYERS"
    for imported in imports(file):
        if imported.startswith("manual_mlp."):
            other = imported.split(".")[1]
            assert other == name or ORDER.get(other, 99) < ORDER[name], f"{name} imports {imported}"
        top = imported.split(".")[0]
        if top in ONLY_TRAINING and name != "training":
            assert (name, top) in ALLOWED, f"{name} imports {imported}"


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_import_brings_nothing() -> None:
    assert run_python("import sys, manual_mlp as mm; print('torch' in sys.modules, mm.__version__)").startswith("False")


def test_the_first_name_brings_torch_and_nothing_heavier() -> None:
    heavy = ONLY_TRAINING | {"matplotlib", "pytest", "jax", "onnx"}
    code = "import sys, torch; before = set(sys.modules); import manual_mlp as mm; mm.MLP, mm.trace, mm.BackpropEngine"
    assert run_python(f"{code}; print({heavy} & sys.modules.keys() - before)") == "set()"


def test_each_public_name_after_each_submodule() -> None:
    """A submodule that bears a public function's name would replace it on import. Each fork starts without any."""
    code = """
import os, sys, torch, manual_mlp as mm
from importlib import import_module
from pkgutil import walk_packages
found = [module.name for module in walk_packages(mm.__path__, "manual_mlp.")]
names = [name for name in found if "training" not in name and "__main__" not in name]
for name in names:
    if (child := os.fork()) == 0:
        import_module(name)
        module = type(sys)
        wrong = [n for n in mm.__all__ if isinstance(getattr(mm, n), module) != (n in mm._SUBMODULES)]
        print(name, wrong, flush=True)
        os._exit(bool(wrong))
    assert os.waitpid(child, 0)[1] == 0, name
print(len(names))
"""
    assert int(run_python(code).splitlines()[-1]) > 20


def test_star_import_brings_the_public_names() -> None:
    code = "import manual_mlp as mm; from manual_mlp import *; print(all(n in globals() for n in mm.__all__), MLP)"
    assert run_python(code) == "True <class 'manual_mlp.modules.MLP'>"


# Everything that needs only torch, but for what measures: found, not listed, so that a new file can't escape.
BESIDE = {"__init__", "testing", "benchmark", "plots", "report", "training"}
CORE = [file for file in FILES if layer(file) not in BESIDE]
FORBIDDEN = {"grad", "backward", "vjp", "jvp", "vmap"}


@pytest.mark.parametrize("file", CORE, ids=layer)
def test_derivatives_are_hand_derived(file: Path) -> None:
    """No call of autograd's grad or backward, of torch.func, or of an ATen derivative operator."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            derivative = node.attr.endswith(("_backward", "_backward_data")) and node.attr != "save_for_backward"
            assert not derivative, f"line {node.lineno}: {node.attr}"
            operator = (
                ast.unparse(node.value) == "torch.ops.aten" and node.attr != "_unsafe_view"
            )  # which copies nothing
            assert not operator, f"line {node.lineno}: {ast.unparse(node)}"
            assert ast.unparse(node) != "torch.func", f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            ours = node.func.attr == "backward" and ast.unparse(node.func.value) in ("rule", "program")
            assert ours or node.func.attr not in FORBIDDEN, f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("page", ["formulas", "grids"])
def test_the_sheet_is_pure(page: str) -> None:
    """It imports torch and what the standard library has for numbers and tables, and nothing of torch's inside."""
    file = PACKAGE / f"{page}.py"
    assert set(imports(file)) <= {"math", "torch", "torch.nn", "collections.abc", "dataclasses", "typing"}
    text = file.read_text()
    inside = ("_C", "autograd", "requires_grad", "dtype in", "is_cuda", "is_cpu", "no_grad", "out=", "cache")
    for word in (*inside, "is_nested", "DTensor", "unsqueeze(0)"):
        assert word not in text.split('"""', 2)[2], word


@pytest.mark.parametrize(
    "file", [file for file in CORE if layer(file) not in ("formulas", "grids", "kernels")], ids=layer
)
def test_mathematics_stays_on_the_sheet(file: Path) -> None:
    """Only the sheet and its kernels call a componentwise function of torch: the other core files ask them."""
    componentwise = {"sigmoid", "tanh", "exp", "log1p", "expm1", "erf", "erfc", "softmax", "log_softmax", "square"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in componentwise:
            owner = ast.unparse(node.func.value)
            assert owner in ("sheet", "functional"), f"line {node.lineno}: {ast.unparse(node)}"
