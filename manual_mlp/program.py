"""A model read as a list of nodes over numbered slots, and steps 1 to 4 over that list, out of place.

Slot 0 is the input x. Node i reads slots and writes slot i + 1; the last slot is the prediction a^L. A slot that is
read twice adds up what comes back. Everything here is made of ordinary tensor operations, so it can be differentiated.
`plan.py` compiles the same list to in-place calls on kept buffers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from manual_mlp import checks, kernels, modules
from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.formulas import ACTIVATIONS, COSTS, Cost, Row
from manual_mlp.grid_rules import RULES, Convolve, GridRule, Normalise, Softmax
from manual_mlp.snapshot import hooks_of

Tensors = Sequence[Any]
"""All that a run reads: x, the parameters of all nodes (None for a missing bias), mask and 1 − p of each dropout."""


class Rule(Protocol):
    """A pair of pure formulas.

    names      the parameters that the node's owner holds
    saves      what backward reads: the node's "input" (a tuple, if it has several), its "output", or "nothing"
    forward    inputs, parameters ↦ output
    backward   g = ∂C/∂output, what it saves, its parameters, which gradients are wanted (inputs first)
               ↦ ∂C/∂input of each input, then ∂C/∂parameter of each parameter, None where not wanted
    """

    names: tuple[str, ...]
    saves: str

    def forward(self, *inputs_and_parameters: Any) -> Tensor: ...
    def backward(self, g: Tensor, saved: Any, *parameters: Any, needs: Sequence[bool]) -> tuple[Tensor | None, ...]: ...


class Node(NamedTuple):
    """One rule, the slots it reads, and the module that owns its parameters."""

    rule: Any
    reads: tuple[int, ...]
    owner: Any = None


class Affine:
    """z = a Wᵀ + b."""

    names, saves, title = ("weight", "bias"), "input", "affine"

    def forward(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return sheet.affine(a, weight, bias)

    def backward(
        self, delta: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        needs_a, needs_weight, needs_bias = needs
        return (
            sheet.grad_input(delta, weight) if needs_a else None,
            sheet.grad_weight(delta, a) if needs_weight else None,
            sheet.grad_bias(delta) if needs_bias else None,
        )


class Activate:
    """a = G(z), δ = g ⊙ G′(z): a row of the sheet with the values of its parameters."""

    names = ()

    def __init__(self, row: Row) -> None:
        self.row, (self.G, self.delta, *_) = row, kernels.kernel(row)
        self.saves = "output" if row.saves == "a" else "input"

    def forward(self, z: Tensor) -> Tensor:
        return self.G(z, *self.row.values)

    def backward(self, g: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return (self.delta(g, saved, *self.row.values),)


class Add:
    """z = Σ_k a^k."""

    names, saves, title = (), "nothing", "sum"

    def forward(self, *terms: Tensor) -> Tensor:
        return sheet.add(*terms)

    def backward(self, g: Tensor, saved: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return (g,) * len(needs)


class Drop:
    """a ⊙ m / (1 − p), with the mask m and the divisor as its parameters; without them a itself."""

    names, saves = (), "nothing"

    def __init__(self, module: nn.Dropout) -> None:
        self.module = module

    @property
    def p(self) -> float:
        """Return the probability with which it draws now, 0 for none."""
        checks.fraction("dropout probability", self.module.p)
        return self.module.p if self.module.training else 0.0

    def draw(self, n: int, width: int, device: torch.device) -> tuple[Tensor | None, float]:
        """Return the mask that functional.dropout draws, or None if it draws none, and 1 − p."""
        keep = 1 - self.p
        if keep == 1:
            return None, keep
        return kernels.draw_(torch.empty(n, width, dtype=torch.bool, device=device), keep), keep or 1.0

    def forward(self, a: Tensor, mask: Tensor | None = None, keep: float = 1.0) -> Tensor:
        return a if mask is None else sheet.dropout(a, mask, keep)

    def backward(self, g: Tensor, saved: None, *drawn: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return (self.forward(g, *drawn),)


@dataclass
class Layer:
    """One layer of the lecture: z^{l+1} = a^l W^lᵀ + b^l, a^{l+1} = G(z^{l+1}), and the dropout after it, if any.

    A sum of branches is a layer without weights, z^l = Σ_k a^k; so is a pool. A norm's weights are γ and β.

    z, a, out  the slots of z^l, of G(z^l), and of what the next layers read
    reads      the layers whose a it reads, 1 for the input
    rule       the name of what gives z: affine, sum, convolution, …
    affine     the module that owns W and b; None for a layer without weights
    row        G with its parameters' values
    """

    z: int
    a: int
    out: int
    reads: tuple[int, ...]
    rule: str
    affine: Any = None
    row: Row = ACTIVATIONS["identity"]
    dropout: Drop | None = None

    @property
    def weight(self) -> Tensor | None:
        return None if self.affine is None else self.affine.weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.affine is None else self.affine.bias

    @property
    def drops(self) -> bool:
        return self.dropout is not None and self.dropout.p > 0


class Program:
    """The nodes of a net, and what follows from how they read their slots.

    sources   for each parameter the dict that holds it, and its name there
    spans     for each node, the slice of a run's tensors that holds its parameters
    drawn     for each node, the slice that holds what it has drawn for the run, two values or none
    grids     the rules of `grid_rules.py` among the nodes: only this file, `network_loss` and the trace know them
    saved     for each node, the slots that its backward reads
    kept      the slots that forward stores; backward computes any other slot that it reads again
    freed     for each node, the slots that nobody reads after it
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = tuple(nodes)
        self.sources = [(node.owner._parameters, name) for node in nodes for name in node.rule.names]
        self.has_dropout = any(isinstance(node.rule, Drop) for node in nodes)
        self.grids = [node.rule for node in nodes if isinstance(node.rule, GridRule)]
        self.spans = _slices(1, [len(node.rule.names) for node in nodes])
        self.drawn = _slices(1 + len(self.sources), [2 * isinstance(node.rule, Drop | Normalise) for node in nodes])
        of = [{"input": node.reads, "output": (i,), "nothing": ()}[node.rule.saves] for i, node in enumerate(nodes, 1)]
        self.saved: list[tuple[int, ...]] = of
        self.kept = self._kept()
        last = {slot: i for i, node in enumerate(nodes) for slot in node.reads}
        self.freed = [[slot for slot in last if last[slot] == i and slot not in self.kept] for i in range(len(nodes))]
        self._wanted: dict[Any, list[bool]] = {}

    def _kept(self) -> set[int]:
        """Return the slots that steps 2 to 4 read, without those that G or a mask makes again from another."""
        kept = {0, len(self.nodes)} | {i for i, node in enumerate(self.nodes, 1) if node.rule.saves == "output"}

        def makes_again(slot: int) -> bool:
            rule, reads, _ = self.nodes[slot - 1]
            return isinstance(rule, Activate | Drop) and all(read in kept or makes_again(read) for read in reads)

        for slot in sorted({*chain.from_iterable(self.saved)} - kept):
            if not makes_again(slot):
                kept.add(slot)
        return kept

    @property
    def layers(self) -> dict[int, Layer]:
        """Return the layers by the sheet's l, from 2."""
        layers: dict[int, Layer] = {}
        of = {0: 1}  # the layer of each slot
        for i, (rule, reads, owner) in enumerate(self.nodes, start=1):
            if isinstance(rule, Affine | Add | GridRule):
                of[i], own = len(layers) + 2, owner if rule.names else None
                layers[of[i]] = Layer(i, i, i, tuple(of[slot] for slot in reads), rule.title, own)
                continue
            layer = layers[of.setdefault(i, of[reads[0]])]
            if isinstance(rule, Activate):
                layer.row, layer.a = rule.row, i
            else:
                layer.dropout = rule
            layer.out = i
        return layers

    @property
    def affine(self) -> list[Any]:
        """Return the owners of the weights, in order."""
        return [node.owner for node in self.nodes if isinstance(node.rule, Affine)]

    def parameters(self) -> list[Any]:
        """Return the parameters of all nodes in one list, None for a missing bias."""
        return [owner[name] for owner, name in self.sources]

    def widths(self, x: Tensor) -> list[int]:
        """Return the number of neurons of each slot; after a convolution, say, these are channels."""
        widths, parameters = [x.shape[1]], [x, *self.parameters()]
        for (rule, reads, _), span in zip(self.nodes, self.spans, strict=True):
            gives = isinstance(rule, Affine | Convolve)
            widths.append(len(parameters[span][0]) if gives else widths[reads[0]])
        return widths

    def draw(self, x: Tensor, drops: bool = True) -> list[Any]:
        """Return what the dropouts draw for such a batch, and the norms read, in order. drops=False: no dropout."""
        if not self.has_dropout and not self.grids:
            return []
        widths = self.widths(x)
        drawn = [
            rule.draw(len(x), widths[reads[0]], x.device) if drops or isinstance(rule, Normalise) else (None, 1.0)
            for rule, reads, _ in self.nodes
            if isinstance(rule, Drop | Normalise)
        ]
        return [*chain.from_iterable(drawn)]

    def _beside(self, i: int, tensors: Tensors) -> Sequence[Any]:
        """Return what the rule of a node reads beside its slots."""
        return *tensors[self.spans[i]], *tensors[self.drawn[i]]

    def observe(self, slots: Sequence[Any], tensors: Tensors) -> None:
        """Update the running statistics of the batch norms, as a call of the model does."""
        for node in self.nodes:
            if isinstance(node.rule, Normalise):
                node.rule.observe(self._value(node.reads[0], slots, tensors))

    def forward(self, tensors: Tensors, every: bool = False) -> list[Any]:
        """Step 1: return the slots; None for those that are not kept, unless every is True."""
        slots: list[Any] = [tensors[0]]
        for i, (rule, reads, _) in enumerate(self.nodes):
            slots.append(rule.forward(*[slots[slot] for slot in reads], *self._beside(i, tensors)))
            for slot in () if every else self.freed[i]:
                slots[slot] = None
        return slots

    def wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Return for each slot whether a gradient that is needed lies upstream of it."""
        key = tuple(needs)
        if key not in self._wanted:
            wanted = self._wanted[key] = [needs[0]]
            for (_, reads, _), span in zip(self.nodes, self.spans, strict=True):
                wanted.append(any(needs[span]) or any(wanted[slot] for slot in reads))
        return self._wanted[key]

    def backward(
        self,
        g: Tensor,
        slots: Sequence[Any],
        tensors: Tensors,
        needs: Sequence[bool],
        every: bool = False,
        step_4: bool = True,
    ) -> tuple[list[Any], list[Any]]:
        """Steps 2 to 4, from right to left: g = ∂C/∂a^L ↦ ∂C/∂slot of each slot, the gradients of x and the parameters.

        ∂C/∂z^l is δ^l. None stands for what nothing needs, and for slots that have been read, unless every is True.
        step_4=False leaves out the gradients of the parameters.
        """
        wanted, gradients = self.wanted(needs), [None] * len(needs)
        arrived: list[Any] = [None] * len(self.nodes) + [g]
        for i in range(len(self.nodes) - 1, -1, -1):
            (rule, reads, _), span, g = self.nodes[i], self.spans[i], arrived[i + 1]
            if not wanted[i + 1] or g is None:
                continue
            saved = [self._value(slot, slots, tensors) for slot in self.saved[i]]
            flags = [*[wanted[slot] for slot in reads], *(needed and step_4 for needed in needs[span])]
            read = self._beside(i, tensors)
            parts = rule.backward(g, saved[0] if len(saved) == 1 else saved, *read, needs=flags)
            for slot, part in zip(reads, parts):  # noqa: B905 # the gradients of the parameters follow
                if wanted[slot]:
                    arrived[slot] = part if arrived[slot] is None else arrived[slot] + part
            if rule.names:
                gradients[span] = parts[len(reads) :]
            if not every:
                arrived[i + 1] = None
        gradients[0] = arrived[0]
        return arrived, gradients

    def _value(self, slot: int, slots: Sequence[Any], tensors: Tensors) -> Tensor:
        """Return the value of a slot, computed again if it was not kept."""
        if slots[slot] is not None:
            return slots[slot]
        rule, reads, _ = self.nodes[slot - 1]
        return rule.forward(*[self._value(read, slots, tensors) for read in reads], *self._beside(slot - 1, tensors))


def _slices(start: int, lengths: Sequence[int]) -> list[slice]:
    """Return slices of these lengths, one after the other."""
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=start))]


# ---------------------------------------------------------------------------------------------------------------------
# A model as a program
# ---------------------------------------------------------------------------------------------------------------------

_AFFINE = (nn.Linear, modules.Affine)
_DROPOUT = (nn.Dropout, modules.Dropout)


def read(model: nn.Module, grids: bool = False) -> Program:
    """Return the program of an mm.MLP, or of nn.Sequentials and mm.Sums in each other.

    Inside are affine maps, activations and dropouts. Each activation follows an affine map or a Sum, or begins a
    branch; each dropout may follow an activation, too. Raises InputError for anything else in it, for what a call
    of the model would honour and a program does not (hooks, a replaced forward), and for layers that do not fit.
    grids: convolutions, pools, norms, softmax, nn.Flatten and nn.Unflatten may be inside, too.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model, an mm.MLP or an nn.Sequential; got {type(model).__name__}")
    reader = _Reader(grids)
    reader.read(model, "", 0)
    _check_widths(reader.nodes, reader.names)
    return Program(reader.nodes)


class _Reader:
    """Nodes of the modules read so far, and the name of each one's module."""

    def __init__(self, grids: bool) -> None:
        self.grids = grids
        self.nodes: list[Node] = []
        self.names: list[str] = []

    def read(self, module: nn.Module, name: str, slot: int, begins: bool = False) -> int:
        """Append the nodes of a module that reads `slot`, and return the slot that it writes.

        begins: it is the first of a branch, and the slot is read by other branches, too.
        """
        _check_call(module, name)
        start = len(self.nodes)
        children = [(f"{name}.{key}" if name else key, child) for key, child in module._modules.items()]
        if isinstance(module, nn.Sequential):
            for of_child, child in children:
                slot = self.read(child, of_child, slot, begins and len(self.nodes) == start)  # type: ignore[arg-type]
            return slot
        if isinstance(module, modules.Sum):
            slots = [self.read(child, of_child, slot, begins=True) for of_child, child in children]  # type: ignore[arg-type]
            if not slots:
                raise InputError(f"expected a Sum with branches at {_place(name)}; got none: append one")
            return slots[0] if len(slots) == 1 else self._append(Node(Add(), tuple(slots)), name)
        before = Add() if begins else self.nodes[slot - 1].rule if slot else None
        for rule, owner in _rules(before, name, module, self.grids):
            if begins and not isinstance(rule, Affine):  # a copy: in place it would overwrite what others read
                slot = self._append(Node(Add(), (slot,)), name)
            begins = False
            slot = self._append(Node(rule, (slot,), owner), name)
        return slot

    def _append(self, node: Node, name: str) -> int:
        """Return the slot that the node writes."""
        self.nodes.append(node)
        self.names.append(name)
        return len(self.nodes)


_BY_LAYERS = "only its own layers run it (backprop=layers)"  # what a caller of trace or curvature can read, too
_GRID: Any = object()  # of a slot whose width no affine map says


def _check_widths(nodes: Sequence[Node], names: Sequence[str]) -> None:
    """Raise InputError for layers and branches that do not fit each other, and for a dropout on a grid."""
    places = [i for i, node in enumerate(nodes) if isinstance(node.rule, Affine)]
    if not places:
        raise InputError("expected a net with at least one affine layer; got none: add an mm.Affine or an nn.Linear")
    grids = [isinstance(node.rule, GridRule) and not node.rule.keeps_width for node in nodes]
    slot = nodes[places[0]].reads[0]
    while slot and not grids[slot - 1]:
        slot = nodes[slot - 1].reads[0]
    # The width of each slot; of the input by the first affine map, None if there is a grid before it.
    widths: list[Any] = [None if slot else nodes[places[0]].owner.weight.shape[1]]
    for (rule, reads, owner), name, is_grid in zip(nodes, names, grids, strict=True):
        if isinstance(rule, Drop) and widths[reads[0]] is _GRID:
            raise InputError(
                f"expected dropout after an affine map only; got one at {_place(name)} that follows a grid: "
                + _BY_LAYERS
            )
        known = [width for slot in reads if (width := widths[slot]) not in (None, _GRID)]
        known += [owner.weight.shape[1]] if isinstance(rule, Affine) else []
        if len({*known}) > 1 and isinstance(rule, Affine):
            raise InputError(
                f"expected a layer of in_features={known[0]} at {_place(name)}, as wide as what it reads; got {owner}"
            )
        if len({*known}) > 1:
            came = " and ".join(map(str, dict.fromkeys(known)))
            raise InputError(
                f"expected branches of one width in the Sum at {_place(name)}; got {came}: "
                "an identity beside layers needs as many outputs as inputs"
            )
        widths.append(_GRID if is_grid else len(owner.weight) if isinstance(rule, Affine) else widths[reads[0]])


def _place(name: str) -> str:
    return repr(name or "the model itself")


def _check_call(module: nn.Module, name: str) -> None:
    """Raise InputError for what a call of the module would honour and a program does not."""
    if any(hooks_of(module)):
        raise InputError(
            f"expected layers without hooks, because none would be called; got one on {_place(name)}: remove it, "
            "or train with backprop=layers"
        )
    kind: Any = getattr(module, "plain", type(module))  # of a fused nn.Sequential, the class it was
    container = next((of for of in (modules._Chain, nn.Sequential, modules.Sum) if issubclass(kind, of)), kind)
    forward = _FORWARDS.get(kind, _FORWARDS.get(container, kind.forward))
    if "forward" in vars(module) or kind.forward is not forward or kind.__call__ is not _CALL:
        raise InputError(
            f"expected modules with the forward of torch.nn or manual_mlp; {name or 'the model'!r} has its own: "
            + _BY_LAYERS
        )


_LAYERS: tuple[Any, ...] = (*_AFFINE, *_DROPOUT, modules.AffineActivation, *modules.ACTIVATION_MODULES, *RULES)
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (*_LAYERS, nn.Sequential, modules._Chain, modules.Sum)}
_CALL = nn.Module.__call__


def _rules(before: Any, name: str, module: Any, grids: bool) -> list[tuple[Any, Any]]:
    """Return the rules of one module, each with the owner of its parameters. before: the rule that it follows."""
    kind = type(module)
    if kind in _AFFINE or kind is modules.AffineActivation:
        if not module._parameters.keys() >= {*Affine.names}:
            raise InputError(f"expected weight and bias of {name!r} as its parameters; got a buffer or an attribute")
        row = module.row if kind is modules.AffineActivation else ACTIVATIONS["identity"]
        return [(Affine(), module), *([] if row.name == "identity" else [(Activate(row), None)])]
    if kind in (nn.Identity, modules.Identity):
        return []
    if kind in RULES and grids and getattr(module, "padding_mode", "zeros") == "zeros":
        return [(RULES[kind](module), module)]
    if kind in modules.ACTIVATION_MODULES and isinstance(before, Affine | Add | GridRule):
        return [(Activate(modules.activation_row(module)), None)]
    if kind in _DROPOUT and isinstance(before, Affine | Activate | Add | Normalise):
        return [(Drop(module), None)]
    by_program = "mm.trace and mm.network.network_loss (backprop=network) run it"
    raise InputError(
        "expected affine maps, each with at most one activation and one dropout after it; "
        f"got {kind.__name__} at {_place(name)}: {by_program if kind in RULES and not grids else _BY_LAYERS}"
    )


def cost_of(loss: str, program: Program) -> Cost:
    """Return the row of a cost. Raises InputError for an unknown name, and for a logits cost after an activation."""
    if not isinstance(loss, str) or loss not in COSTS:
        raise InputError(f"expected a loss, one of {', '.join(COSTS)}; got {checks.brief(loss)}")
    last = next(node.rule for node in reversed(program.nodes) if not isinstance(node.rule, Drop))
    if COSTS[loss].logits and isinstance(last, Activate | Softmax):
        ends = last.row.name if isinstance(last, Activate) else "softmax"
        raise InputError(
            f"expected a net that gives logits, for the loss {loss!r}; got one that ends in {ends}, "
            'which would train wrongly: take output_activation="identity"'
        )
    return COSTS[loss]
