"""A program compiled, for batches of one shape, to calls in place on buffers that are made once.

`network_loss` hands the parameters to each run and gets new gradients. The engine binds them when it compiles, and
its sinks update them in step 4's own product. K nets of one shape are one more leading dimension of every tensor.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manual_mlp import kernels
from manual_mlp.formulas import Cost
from manual_mlp.program import Activate, Add, Affine, Drop, Program

Call = Callable[..., Any]
Operand = Tensor | int | None
"""A tensor that stays where it is, or the position of one in the list that each run gets; the input is number 0."""

_linear: Any = torch._C._nn.linear  # F.linear, whose stub does not know out=


Instruction = tuple[Call, tuple[int, ...], int | None]
"""A call, the positions of the run's tensors that it takes, and of the gradient that it returns, if it returns one.

Python unpacks an ordinary tuple almost three times as fast as a NamedTuple, and a step of a small net has a dozen.
"""


class Sink(NamedTuple):
    """The place where step 4 goes. A tensor becomes beta · to + alpha · product; a number is that of a new gradient.

    decay, rate   tensors instead of beta and a factor of alpha, because a CUDA graph would keep the numbers
    """

    to: Any
    beta: float = 0.0
    alpha: float = 1.0
    decay: Tensor | None = None
    rate: Tensor | None = None


class Plan:
    """The buffers for batches of N rows, and the calls of steps 1 to 4 on them.

    nets               () for one net; (K,) for K nets: then all shapes below begin with K
    slots              the buffer (N, n_l) of each slot; None for the input, which moves
    prediction, delta  a^L and δ^L as the cost reads and writes them
    up, down           the instructions of step 1, and of steps 2 to 4
    longest            each sample's gradient is shortened to this, in units of what step 4 multiplies; None: never
    """

    def __init__(
        self,
        program: Program,
        cost: Cost,
        input: Tensor,
        dtype: torch.dtype | None = None,
        nets: tuple[int, ...] = (),
        max_sample_norm: float | None = None,
    ) -> None:
        self.program, self.nets = program, nets
        self.like = torch.empty(0, dtype=dtype or input.dtype, device=input.device)
        self.n, self.rows, self.ones = len(input), math.prod(nets) * len(input), self.like.new_ones(len(input))
        self.widths = program.widths(input)
        # The sample's own gradient is N times its part in the batch's.
        of_sample = self.n * kernels.weights(cost, self.n, self.widths[-1])[1]
        self.longest = None if max_sample_norm is None else max_sample_norm / of_sample
        largest = self.rows * max(self.widths)
        self.scratch, self.bits = self.like.new_empty(largest), self.like.new_empty(largest, dtype=torch.bool)
        self.by_columns = self._layouts()
        self.slots: list[Any] = [None]
        for i in range(len(program.nodes)):
            self.slots.append(self._slot(i))
        drops = [i for i, node in enumerate(program.nodes, start=1) if isinstance(node.rule, Drop) and node.rule.p > 0]
        like = torch.empty_like
        self.masks = {i: (like(self.slots[i], dtype=torch.bool), like(self.slots[i])) for i in drops}
        self.flats = [self.like.new_empty(largest)]
        a, delta = self.slots[-1], self._laid(self.flats[0], len(program.nodes))
        # The cost works in the parameters' dtype, and its softmax wants the numbers of a row side by side.
        self.copied = self.like.dtype != input.dtype or (self.by_columns[-1] and cost.logits)
        # δ of a row that saves z writes over a.
        last = [rule for rule, _, _ in program.nodes if not isinstance(rule, Drop)][-1]
        self.copied |= isinstance(last, Activate) and last.saves == "input"
        self.prediction = torch.empty(a.shape, dtype=input.dtype, device=input.device) if self.copied else a
        self.delta = torch.empty_like(self.prediction) if self.copied else delta
        self.both = kernels.both(cost, self.delta)
        self.cost = self.prediction.new_empty(nets, dtype=kernels.sum_dtype(self.prediction.dtype))
        self.out = self.cost.view(-1)

    # -----------------------------------------------------------------------------------------------------------------
    # Buffers
    # -----------------------------------------------------------------------------------------------------------------

    def _layouts(self) -> list[bool]:
        """Return for each slot whether it lies column by column; not beside a dropout, which draws row by row.

        For K nets rows are faster.
        """
        nodes = self.program.nodes
        dropped = {slot for node in nodes if isinstance(node.rule, Drop) for slot in node.reads}
        for slot in range(len(nodes), 0, -1):
            rule, reads, _ = nodes[slot - 1]
            dropped |= set(reads) if slot in dropped and isinstance(rule, Activate) else set()
        columns = [False]
        for slot, (rule, reads, _) in enumerate(nodes, start=1):
            one_map = isinstance(rule, Affine) and not self.nets
            narrow = one_map and kernels.by_columns(self.like, self.n, self.widths[slot])
            follows = isinstance(rule, Activate | Add) and all(columns[read] for read in reads)
            columns.append(slot not in dropped and (narrow or follows))
        return columns

    def _laid(self, flat: Tensor, slot: int) -> Tensor:
        """Return the first numbers of a flat buffer as (N, n_l), in the layout of the slot."""
        n, width = self.n, self.widths[slot]
        flat = flat[: self.rows * width]
        return flat.view(width, n).t() if self.by_columns[slot] else flat.view(*self.nets, n, width)

    def _slot(self, i: int) -> Any:
        """Return the buffer that node i writes. G writes over z, if G′ is written in a and nobody else reads z."""
        rule, reads, _ = self.program.nodes[i]
        if isinstance(rule, Activate) and rule.saves == "output" and self._alone(i):
            return self.slots[reads[0]]
        return self._laid(self.like.new_empty(self.rows * self.widths[i + 1]), i + 1)

    def _alone(self, i: int) -> bool:
        """Return True if node i may write over the slot it reads: not the input, and nobody else reads it again."""
        nodes, slot = self.program.nodes, self.program.nodes[i].reads[0]
        others = [node for j, node in enumerate(nodes) if j != i and slot in node.reads]
        return slot > 0 and not others and nodes[slot - 1].rule.saves != "output"

    # -----------------------------------------------------------------------------------------------------------------
    # Instructions
    # -----------------------------------------------------------------------------------------------------------------

    def compile(self, operands: Sequence[Operand], sinks: Sequence[Sink | None]) -> None:
        """Make the instructions. operands: the input and all parameters; sinks: where their gradients go, or None."""
        nodes = self.program.nodes
        self.up: list[Instruction] = []
        self.down: list[Instruction] = []
        slots = [operands[0], *self.slots[1:]]
        for i in range(len(nodes)):
            self._step_1(i, slots, operands[self.program.spans[i]])
        self.wanted = self.program.wanted([sink is not None for sink in sinks])
        self.free = self.flats[1:]
        self.later: list[tuple[Tensor, Operand, Sequence[Sink | None], int, int]] = []
        self.arrived: dict[int, Tensor] = {len(nodes): self.flats[0]}
        if self.copied:
            self._emit(self.up, self.prediction.copy_, slots[-1])
            self._emit(self.down, self._laid(self.flats[0], len(nodes)).copy_, self.delta)
        for i in reversed(range(len(nodes))):
            if i + 1 in self.arrived:
                self._steps_2_to_4(i, slots, operands[self.program.spans[i]], sinks[self.program.spans[i]])
        if self.later:
            self._clip()
        if self.wanted[0]:
            self._emit(self.down, self._laid(self.arrived[0], 0).clone, place=0)

    def _emit(self, code: list[Instruction], call: Call, *operands: Operand, place: int | None = None) -> None:
        """Append an instruction with all its operands bound but those of the run, which come last."""
        fixed = [operand for operand in operands if isinstance(operand, Tensor)]
        feeds = tuple(operand for operand in operands if isinstance(operand, int))
        code.append((partial(call, *fixed) if fixed else call, feeds, place))

    def _step_1(self, i: int, slots: list[Operand], own: Sequence[Operand]) -> None:
        """z^{l+1} = a^l W^lᵀ + b^l, a^{l+1} = G(z^{l+1})."""
        rule, reads, _ = self.program.nodes[i]
        read, out = slots[reads[0]], self.slots[i + 1]
        if isinstance(rule, Affine):
            self._affine(read, own[0], own[1], out)
        elif isinstance(rule, Activate) and isinstance(read, Tensor):
            G_ = kernels.kernel(rule.row).G_
            if rule.saves == "output" and read is not out:
                self._emit(self.up, out.copy_, read)
                read = out
            to: Any = {"out": out} if rule.saves == "input" else {}
            self._emit(self.up, partial(G_, read, *rule.row.values, **to))
        elif i + 1 in self.masks:
            drawn, scale = self.masks[i + 1]
            self._emit(self.up, partial(_draw, drawn, scale, 1 - rule.p))
            self._emit(self.up, partial(torch.mul, scale, out=out), read)
        elif isinstance(rule, Add | Drop):
            self._add([slots[slot] for slot in reads], out)
        else:
            self._emit(self.up, lambda *ins: out.copy_(rule.forward(*ins)), *(slots[slot] for slot in reads))

    def _add(self, terms: list[Operand], out: Tensor) -> None:
        """z^l = Σ_k a^k. An instruction reads at most one operand that moves."""
        if len(terms) > 1 and not all(isinstance(term, int) for term in terms[:2]):
            first, second, *more = terms
            self._emit(self.up, partial(torch.add, out=out), *sorted((first, second), key=lambda t: isinstance(t, int)))
        else:
            first, *more = terms
            self._emit(self.up, out.copy_, first)
        for term in more:
            self._emit(self.up, out.add_, term)

    def _affine(self, a: Operand, weight: Any, bias: Any, z: Tensor) -> None:
        if isinstance(weight, int):
            self._emit(self.up, partial(_linear, out=z), a, weight, bias)
        elif bias is None:
            self._emit(self.up, partial(torch.bmm if self.nets else torch.mm, mat2=weight.mT, out=z), a)
        elif self.nets:
            rows = bias.unsqueeze(1).expand(z.shape)
            self._emit(self.up, partial(torch.baddbmm, rows, batch2=weight.mT, out=z), a)
        else:
            # On the CPU addmm would expand the bias at each call; on a GPU it adds a vector as it goes.
            rows = bias if z.is_cuda else bias.expand(z.shape)
            self._emit(self.up, partial(torch.addmm, rows, mat2=weight.t(), out=z), a)

    def _steps_2_to_4(self, i: int, slots: list[Operand], own: Sequence[Operand], sinks: Sequence[Sink | None]) -> None:
        """δ^l = g ⊙ G′(z^l); the product δ^{l+1} W^l that goes on to the left; the gradients."""
        rule, reads, _ = self.program.nodes[i]
        flat = self.arrived[i + 1]
        delta = self._laid(flat, i + 1)
        if isinstance(rule, Affine):
            if self.wanted[reads[0]]:
                self._step_3(delta, own[0], reads[0])
            if self.longest is None:
                self._steps_4(delta, slots[reads[0]], sinks, i + 1)
                self.free.append(flat)
            elif any(sink is not None for sink in sinks):
                self.later.append((delta, slots[reads[0]], sinks, i + 1, reads[0]))
            return
        # The form in place would overwrite a z that somebody else still reads.
        if isinstance(rule, Activate) and (rule.saves == "output" or self._alone(i)):
            delta_ = kernels.kernel(rule.row).delta_
            a, z = self.slots[i + 1], slots[reads[0]] if rule.saves == "input" else None
            # Step 4 has read a^l, so δ may use it as scratch. The prediction is read later.
            free = z is None and a is not self.slots[-1] and self.longest is None
            work, mask = a if free else self._laid(self.scratch, i + 1), self._laid(self.bits, i + 1)
            if z is not None and self.longest is not None:
                copy = self._laid(torch.empty_like(self.scratch), i + 1)
                self._emit(self.down, copy.copy_, a)
                a = copy
            self._emit(self.down, partial(delta_, delta, a, z, work, mask, *rule.row.values))
        elif i + 1 in self.masks:
            self._emit(self.down, delta.mul_, self.masks[i + 1][1])
        elif not isinstance(rule, Add | Drop):
            self._any_rule(i, delta, slots)
            self.free.append(flat)
            return
        self._part(flat, i + 1, reads)

    def _part(self, flat: Tensor, of: int, reads: Sequence[int]) -> None:
        """Give what arrived at a node's output to each slot that it reads, as often as it reads it.

        One of them keeps the buffer, and the others get copies, because each δ is made in place of its g.
        """
        g = self._laid(flat, of)
        wanted = [slot for slot in reads if self.wanted[slot]]
        fresh = [slot for slot in wanted if slot not in self.arrived and self.by_columns[slot] == self.by_columns[of]]
        keeps = min(fresh, default=None)
        for slot in (slot for slot in wanted if slot != keeps):
            into, more = self._into(slot)
            self._emit(self.down, into.add_ if more else into.copy_, g)
        if keeps is None:
            self.free.append(flat)
            return
        self.arrived[keeps] = flat
        if wanted.count(keeps) > 1:
            self._emit(self.down, partial(g.mul_, wanted.count(keeps)))

    def _into(self, slot: int) -> tuple[Tensor, bool]:
        """Return the buffer of ∂C/∂slot, and True if something has arrived there. In a chain two take turns."""
        first = slot not in self.arrived
        if first:
            if not self.free:
                self.flats.append(torch.empty_like(self.flats[0]))
                self.free.append(self.flats[-1])
            self.arrived[slot] = self.free.pop()
        return self._laid(self.arrived[slot], slot), not first

    def _step_3(self, delta: Tensor, weight: Operand, slot: int) -> None:
        """∂C/∂a^l = δ^{l+1} W^l, added to what has arrived there."""
        into, more = self._into(slot)
        multiply, add = (torch.bmm, torch.baddbmm) if self.nets else (torch.mm, torch.addmm)
        call = partial(add, into, delta, out=into) if more else partial(multiply, delta, out=into)
        self._emit(self.down, call, weight)

    def _steps_4(self, delta: Tensor, a: Operand, sinks: Sequence[Sink | None], slot: int) -> None:
        for of, sink in zip((self.ones, a), reversed(sinks), strict=True):
            if sink is not None:
                self._step_4(delta, of, sink, slot)

    def _clip(self) -> None:
        """δ_n := min(1, c/‖g_n‖) δ_n in every affine map, ‖g_n‖² = Σ_l ‖δ_n‖² (‖a_n‖² + 1), and step 4 after it.

        Each map waits in `later` for the norms of all: its δ, a and sinks, and the slots of δ and a.
        """
        exact = torch.float32 if self.like.dtype in kernels.ROUNDED else self.like.dtype
        of_delta, of_a, total, one = self.ones.new_ones(4, self.n, dtype=exact)
        work = self.scratch.to(exact)
        for k, (delta, a, (weight, bias), slot, read) in enumerate(self.later):
            self._row_norms(delta, self._laid(work, slot), of_delta)
            if weight is not None:
                self._row_norms(a, self._laid(work, read), of_a, *[] if bias is None else [one])
            add = partial(torch.mul, out=total) if k == 0 else total.addcmul_
            self._emit(self.down, add, of_delta, one if weight is None else of_a)
        self._emit(self.down, partial(kernels.clip_factor_, total, total.new_tensor(self.longest)))
        for delta, a, sinks, slot, _ in self.later:
            self._emit(self.down, delta.mul_, total.unsqueeze(1))
            self._steps_4(delta, a, sinks, slot)

    def _row_norms(self, x: Operand, work: Tensor, out: Tensor, *plus: Tensor) -> None:
        """out := ‖x_n‖² of each row, plus what may be added."""
        self._emit(self.down, partial(torch.square if out.dtype == self.like.dtype else _squares, out=work), x)
        self._emit(
            self.down, partial(torch.addmv if plus else torch.mv, out=out), *plus, work, out.new_ones(work.shape[1])
        )

    def _step_4(self, delta: Tensor, a: Operand, sink: Sink, slot: int) -> None:
        """∂C/∂W = δᵀ a, or ∂C/∂b = δᵀ 1, into its sink."""
        of_bias = a is self.ones
        if isinstance(sink.to, int):
            self._emit(self.down, partial(torch.mv if of_bias else torch.mm, delta.t()), a, place=sink.to)
            return
        if sink.decay is not None:
            self._emit(self.down, sink.to.mul_, sink.decay)
        if delta.dtype != sink.to.dtype or (self.nets and of_bias):  # of K nets, a product with 1 is slower
            rounded = delta.new_empty(sink.to.shape)
            product = partial(torch.sum, dim=-2) if of_bias else partial(torch.mm, delta.t())
            self._emit(self.down, partial(_add_rounded, sink, product, rounded), delta if of_bias else a)
            return
        if sink.rate is not None:
            work = self._laid(self.scratch, slot)
            self._emit(self.down, partial(torch.mul, delta, sink.rate, out=work))
            delta = work
        add = sink.to.addmv_ if of_bias else sink.to.baddbmm_ if self.nets else sink.to.addmm_
        decay: Any = {} if sink.beta == 1 else {"beta": sink.beta}
        self._emit(self.down, partial(add, delta.mT, alpha=sink.alpha, **decay), a)

    def _any_rule(self, i: int, delta: Tensor, slots: list[Operand]) -> None:
        """Steps 2 and 3 of a rule without parameters, by its own formulas."""
        rule, reads, _ = self.program.nodes[i]
        targets = [self._into(slot) if self.wanted[slot] else None for slot in reads]
        needs = [target is not None for target in targets]

        def call(*saved: Tensor) -> None:
            parts = rule.backward(delta, saved[0] if len(saved) == 1 else saved, needs=needs)
            for target, part in zip(targets, parts, strict=True):
                if target is not None:
                    into, more = target
                    into.add_(part) if more else into.copy_(part)

        self._emit(self.down, call, *(slots[slot] for slot in self.program.saved[i]))


def _squares(x: Tensor, out: Tensor) -> None:
    """out := x² of half precision in float32, because squares would be 0 or infinite."""
    out.copy_(x).mul_(out)


def _draw(drawn: Tensor, scale: Tensor, keep: float) -> None:
    """scale := m / (1 − p), with the mask that functional.dropout draws."""
    scale.copy_(kernels.draw_(drawn, keep)).div_(keep or 1.0)


def _add_rounded(sink: Sink, product: Call, rounded: Tensor, of: Tensor) -> None:
    """to := beta · to + alpha · rate · product(of), with the product alone in the compute_dtype."""
    product(of, out=rounded)
    if sink.beta == 0:
        sink.to.zero_()
    elif sink.beta != 1:
        sink.to.mul_(sink.beta)
    if sink.rate is None:
        sink.to.add_(rounded, alpha=sink.alpha)
    else:
        sink.to.addcmul_(rounded, sink.rate, value=sink.alpha)


def run(code: list[Instruction], tensors: Sequence[Any], gradients: list[Any]) -> None:
    """Execute instructions on the tensors of one run."""
    of = tensors.__getitem__
    for call, feeds, place in code:
        result = call(*map(of, feeds)) if feeds else call()  # half of them read nothing: 1 µs of a small net
        if place is not None:
            gradients[place] = result


Weighed = tuple[Cost, Tensor | float, Tensor | float]
"""A cost, and what C and ∂C/∂a^L are of its kernel's sums for batches of one shape."""


def weigh(cost: Cost, n: int, outputs: int, dtype: torch.dtype) -> Weighed:
    """Return them as numbers in half precision, which would round a tensor; as tensors otherwise, which are faster."""
    weights = kernels.weights(cost, n, outputs)
    if dtype in kernels.ROUNDED:
        return cost, *weights
    with torch.inference_mode(False):  # a validation may make it, and the training use it
        total, delta = torch.tensor(weights, dtype=dtype, device="cpu").unbind()
    return cost, total, delta
