"""`python -m manual_mlp.testing`: run the battery on this package, or on `package.module:function`."""

import argparse
import dataclasses
import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_mlp import formulas, functional, functions
from manual_mlp.errors import InputError
from manual_mlp.shell import while_read
from manual_mlp.testing.battery import check_gradients, lines, report_of
from manual_mlp.testing.checks import CHECKS, Subject


def package_subjects() -> list[Subject]:
    """Return the Functions that chains are made of: each row alone and fused, the affine map, dropout, the costs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight, bias, prediction, target = draw(5, 3), draw(4, 3), draw(4), draw(5, 4), draw(5, 4)
    subjects = [Subject("affine", functional.affine, (x, weight, bias))]
    for (name, saves), function in functions.AFFINE_ACTIVATION.items():
        row = formulas.ACTIVATIONS[name]
        label = name if saves == row.saves else f"{name} in {saves}"
        if (name, saves) in functions.ACTIVATION:
            alone = functools.partial(functions.apply, functions.ACTIVATION[name, saves])
            subjects.append(Subject(label, alone, (prediction, *row.values)))
        fused = functools.partial(functional.apply_affine, function)
        subjects.append(Subject(f"affine + {label}", fused, (x, weight, bias, *row.values)))
    classes = torch.tensor([0, 3, 1, 1, 2])
    return [
        *subjects,
        Subject("dropout", functools.partial(functions.apply, functions.Dropout), (prediction, prediction > -0.5, 0.7)),
        *(Subject(f"cost {name}", cost, (prediction, target)) for name, cost in functional.COSTS.items()),
        Subject("cost cross_entropy of classes", functional.cross_entropy, (prediction, classes)),
    ]


def _imported(path: str) -> Any:
    """Return the object that `package.module:name` names. Raise InputError if there is none."""
    module, _, name = path.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"expected package.module:name of something that can be imported; got {path!r}: {error}"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the battery on the package, or on what the arguments name; return the exit status: 1 if a failure counts."""
    parser = argparse.ArgumentParser(prog="python -m manual_mlp.testing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("function", nargs="?", help="package.module:function of yours; without it, those of chains")
    parser.add_argument("--inputs", help="package.module:make_inputs, which makes the inputs, or is the inputs")
    parser.add_argument("--reference", help="package.module:function that yours must equal")
    parser.add_argument("--compile", action="store_true", help="ask torch.compile too (seconds for each function)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are small, and idle threads cost more than they give
    try:
        if options.function is None:
            return _whole_package(options.compile)
        if options.inputs is None:
            parser.error("expected --inputs package.module:make_inputs beside the function")
        reference = _imported(options.reference) if options.reference else None
        inputs = _imported(options.inputs)
        inputs = inputs() if callable(inputs) else inputs
        report = check_gradients(_imported(options.function), inputs, reference, compile=options.compile)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(report)
    return int(bool(report.counted()))


def _whole_package(compile: bool) -> int:
    """Print a line for each Function, and the rows that failed."""
    reports = []
    for subject in package_subjects():
        reports.append(report_of(dataclasses.replace(subject, compile=compile)))
        print(f"{subject.name:<34} {reports[-1].totals()}", flush=True)
        for line in lines(reports[-1].failed, 80):
            print(line)
    failed = sum(bool(report.failed) for report in reports)
    print(f"{len(reports)} Functions, {len(CHECKS)} checks each: {failed or 'none'} failed")
    return int(failed > 0)


if __name__ == "__main__":
    with while_read():
        sys.exit(main())
