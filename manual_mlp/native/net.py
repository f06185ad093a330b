"""The native road: whole mini-batches in one call of C, which holds no GIL, for chains of layers on the CPU.

A call takes as many mini-batches as take about 50 ms, so that Ctrl-C is heard. Where an epoch is cut changes no bit.
"""

import ctypes
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_double, c_long, c_void_p
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp.formulas import Cost
from manual_mlp.native import build
from manual_mlp.native.c_code import Compiled, NotInC, compiled, of_the_sheet
from manual_mlp.program import Drop, Layer, Program

SECONDS = 0.05  # of one call
# `auto`: where the benchmark shows a gain
FEWEST, WIDEST, WIDEST_INPUT, LARGEST = 4, 256, 1024, 256  # mini-batches; neurons; inputs; rows of a mini-batch
PLAIN, MOMENTUM, ADAM = range(3)
DTYPES = {torch.float32: (), torch.float64: ("-DDOUBLE",)}
STATES = {PLAIN: (), MOMENTUM: ("momentum_buffer",), ADAM: ("exp_avg", "exp_avg_sq")}


class CantRun(Exception):
    """The native road doesn't cover this, for the reason that it says."""


class _Parameter(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("value", "gradient", "first", "second", "steps", "wide_steps")),
        *((name, c_long) for name in ("trained", "flag")),
        *((name, c_double) for name in ("rate", "decay", "beta1", "beta2", "eps")),
        ("at", c_void_p * 4),
    )


class _Call(Structure):
    _fields_ = (("formula", c_void_p), ("values", c_void_p))


class _Layer(Structure):
    _fields_ = (
        *((name, c_long) for name in ("inputs", "outputs")),
        *((name, _Call) for name in ("G", "delta")),
        ("saves_z", c_long),
        *((name, _Parameter) for name in ("W", "b")),
        *((name, c_void_p) for name in ("z", "a", "transposed", "rows")),
    )


class _Net(Structure):
    _fields_ = (
        ("layers", POINTER(_Layer)),
        *((name, c_long) for name in ("count", "kind", "per_element", "row_by_row")),
        *((name, _Call) for name in ("C", "delta")),
        ("total", c_double),
        ("room", c_void_p * 7),
    )


def covers(optimizer: torch.optim.Optimizer) -> int:
    """Return the kind of an optimizer's step now. Raises CantRun."""
    groups, name = optimizer.param_groups, type(optimizer).__name__
    for group in groups:
        for option in ("maximize", "amsgrad", "capturable", "dampening"):
            if group.get(option):
                raise CantRun(f"{name} has {option}={group[option]}")
        if any(isinstance(rate, Tensor) for rate in (group["lr"], group["weight_decay"], *group.get("betas", ()))):
            raise CantRun(f"{name} has a rate in a tensor")
    if not isinstance(optimizer, torch.optim.SGD):
        return ADAM
    kinds = {MOMENTUM if group["momentum"] else PLAIN for group in groups}
    if len(kinds) > 1:
        raise CantRun("some groups of the optimizer have momentum, and others none")
    return kinds.pop()


def gains(widths: list[int], rows: int, batch_size: int) -> bool:
    """Return True where the benchmark shows the native road ahead."""
    few = rows < FEWEST * batch_size or batch_size > LARGEST
    return not few and max(widths[1:]) <= WIDEST and widths[0] <= WIDEST_INPUT


def _chain(program: Program) -> list[Layer]:
    """Return the layers of a chain of affine maps. Raises CantRun for another net."""
    for index, layer in program.layers.items():
        if layer.reads != (index - 1,) or layer.rule != "affine":
            raise CantRun("the net is no chain of affine maps")
    return [*program.layers.values()]


def _library(dtype: torch.dtype, needed: list[Compiled]) -> ctypes.CDLL:
    codes = of_the_sheet() | {each.name: each.code for each in needed}
    source = Path(__file__).with_name("epoch.c").read_text(encoding="utf-8")
    try:
        found = build.library(source.replace("//FORMULAS//", "\n".join(codes.values())), DTYPES[dtype])
    except build.CantBuild as error:
        raise CantRun(str(error)) from None
    found.place.restype = c_long
    found.place.argtypes = [c_void_p, c_long, c_void_p]
    words: dict[str, Any] = {"p": c_void_p, "n": c_long}
    found.train.argtypes = [words[letter] for letter in "ppnpnpppnnnnn"]  # pointers and numbers
    return found


class NativeNet:
    """A net, its cost and its optimizer as the C code takes them."""

    def __init__(self, program: Program, cost: Cost, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.cannot, self.kind = optimizer, "", PLAIN
        self.drops = [node.rule for node in program.nodes if isinstance(node.rule, Drop)]
        self.bound: list[dict[str, Any]] = []
        try:
            self._read(_chain(program), cost)
        except CantRun as error:
            self.cannot = str(error)

    def _read(self, layers: list[Layer], cost: Cost) -> None:
        like: Any = layers[0].weight
        if like.dtype not in DTYPES or not like.is_cpu:
            raise CantRun(f"the parameters are {like.dtype} on {like.device}")
        self.layers = (_Layer * len(layers))()
        self.parameters: list[tuple[_Parameter, Any]] = []
        for to, layer in zip(self.layers, layers, strict=True):
            self.parameters += [(to.W, layer.weight)] + [(to.b, layer.bias)] * (layer.bias is not None)
        owned = [p for _, p in self.parameters]
        if any(type(p) is not nn.Parameter or not p.is_contiguous() or p.numel() == 0 for p in owned):
            raise CantRun("a parameter is not contiguous, empty, or of a class of its own")
        self.trained = [p for p in owned if p.requires_grad]
        self.like, self.kept = like.detach(), []  # type: ignore[var-annotated]
        rows = [layer.row for layer in layers]
        try:
            pairs = [(compiled(r.G, *r.values, inputs=1), compiled(r.delta, *r.values, inputs=2)) for r in rows]
            of_cost = compiled(cost.C, inputs=2), compiled(cost.delta, inputs=2)
        except NotInC as error:
            raise CantRun(f"a formula calls what the C code doesn't have: {error}") from None
        self.library = _library(like.dtype, [*chain.from_iterable(pairs), *of_cost])
        self.net = _Net(self.layers, len(layers))
        for to, layer, row, pair in zip(self.layers, layers, rows, pairs, strict=True):
            to.outputs, to.inputs = layer.weight.shape  # type: ignore[union-attr]
            to.saves_z = row.saves == "z"
            if row.name != "identity":
                to.G, to.delta = map(self._call, pair)
        self.net.C, self.net.delta = map(self._call, of_cost)
        self.net.row_by_row = any(formula.by_row for formula in of_cost)
        self.net.per_element = 1 if cost.per == "N" else self.layers[-1].outputs
        self.run, self.address = self.library.train, ctypes.byref(self.net)
        self.placed, products = 0, sum(layer.inputs * layer.outputs for layer in self.layers)
        self.seconds = products * 6 / 2e9  # of one row, until the first call has been timed

    def _call(self, formula: Compiled) -> _Call:
        values = torch.tensor(formula.values or (0.0,), dtype=self.like.dtype, device="cpu")
        self.kept.append(values)
        return _Call(ctypes.cast(getattr(self.library, formula.name), c_void_p), values.data_ptr())

    def bind(self, gradient_of: Callable[[Tensor], Tensor]) -> None:
        """Hand over the rates and the optimizer's state, which begins at 0. Raises CantRun."""
        if self.cannot or any(drop.p > 0 for drop in self.drops):
            raise CantRun(self.cannot or "dropout draws")
        self.stopped = False
        groups = [group | {"params": None} for group in self.optimizer.param_groups]
        if groups == self.bound and self.kind == PLAIN:
            return
        self.kind = self.net.kind = covers(self.optimizer)
        self.bound, self.placed = [], 0 if groups != self.bound else self.placed  # other averages take other room
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for to, parameter in self.parameters:
            to.value, to.trained = parameter.data_ptr(), parameter.requires_grad
            to.gradient = to.first = to.second = None
            if not parameter.requires_grad:
                continue
            group = group_of[id(parameter)]
            to.rate, to.decay = float(group["lr"]), float(group["weight_decay"])
            if self.kind == PLAIN:  # w := decay w + rate ∂C/∂w
                to.rate, to.decay = -to.rate, 1.0 - to.rate * to.decay
                continue
            to.gradient = gradient_of(parameter).data_ptr()
            to.first, to.second = (*(average.data_ptr() for average in self._averages(parameter)), None)[:2]
            if self.kind == MOMENTUM:
                to.beta1, to.flag = float(group["momentum"]), group["nesterov"]
            else:
                (to.beta1, to.beta2), to.eps = group["betas"], group["eps"]
                to.flag = group.get("decoupled_weight_decay", False)
                steps = self._steps(parameter, group)
                to.steps, to.wide_steps = None, None
                setattr(to, "steps" if steps.dtype == torch.float32 else "wide_steps", steps.data_ptr())

        self.bound = groups

    def _averages(self, parameter: Tensor) -> Iterator[Tensor]:
        """Yield the optimizer's averages of a parameter; new ones are 0."""
        state = self.optimizer.state[parameter]
        for name in STATES[self.kind]:
            if state.get(name) is None:
                with torch.inference_mode(False):
                    state[name] = torch.zeros_like(parameter.detach())
            average = state[name]
            alike = [(t.shape, t.dtype, t.device) for t in (average, parameter)]
            if alike[0] != alike[1] or not average.is_contiguous():
                raise CantRun(f"the optimizer's {name} has another shape, strides, dtype or device than its parameter")
            yield average

    def _steps(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the number of steps that Adam has taken for a parameter, a tensor."""
        state, wide = self.optimizer.state[parameter], torch.get_default_dtype() == torch.float64
        if "step" not in state:
            dtype = torch.float64 if wide and not group["fused"] else torch.float32
            with torch.inference_mode(False):
                state["step"] = torch.zeros((), dtype=dtype, device="cpu")
        step = state["step"]
        if not isinstance(step, Tensor) or not step.is_cpu or step.dtype not in DTYPES:
            raise CantRun("the optimizer counts its steps in no float tensor on the CPU")
        return step

    def train(
        self, input: Tensor, target: Tensor, batch_size: int, order: Tensor | None, prediction: Tensor | None
    ) -> float:
        """Take a step for each mini-batch → the mean cost of all rows. Another thread may set `stopped`."""
        input, target, rows, net, done = _rows(input), _rows(target), len(input), self.net, 0
        order = None if order is None else order.contiguous()
        batch_size, net.total = min(batch_size, rows), 0.0
        self._place(batch_size)
        x, y, picked, into = (None if of is None else of.data_ptr() for of in (input, target, order, prediction))
        given = (
            *(self.address, x, input.stride(0)),
            *((None, 0, y) if target.dim() == 1 else (y, target.stride(0), None)),
            *(picked, into, *((0, 0) if prediction is None else prediction.stride())),
        )
        try:
            while done < rows and not self.stopped:
                count = min(max(1, int(SECONDS / (self.seconds * batch_size))) * batch_size, rows - done)
                begun = perf_counter()
                self.run(*given, done, done + count, batch_size)
                self.seconds = (perf_counter() - begun) / count
                done += count
        finally:
            torch.autograd.graph.increment_version(self.trained)
        return net.total / (rows * net.per_element)

    def _place(self, n: int) -> None:
        """Make room for mini-batches of n rows."""
        if n != self.placed:
            numbers = self.library.place(self.address, n, None) + 16
            self.room = torch.zeros(numbers, dtype=self.like.dtype, device="cpu")
            start = self.room.data_ptr()
            self.library.place(self.address, n, start + -start % 64)
            self.placed = n


def _rows(data: Tensor) -> Tensor:
    """Return the data with the numbers of a row side by side."""
    data = data.resolve_neg()
    return data if data.stride(-1) == 1 or data.shape[-1] == 1 else data.contiguous()
