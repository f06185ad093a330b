"""Gradients of each sample, and curvature, from δ and a of one batch. The rules of the program compute it all.

Letters: δ_n = ∂C_n/∂z_n of the sample's own cost, where C = (1/N) Σ_n C_n; a_n is the input of the same affine map.
R{x} is the derivative of x along a direction v of the parameters (Pearlmutter, 1994).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manual_mlp import checks
from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.functional import autocasting
from manual_mlp.functions import affine_tangent, sum_of
from manual_mlp.network import parameters_of, reading_of
from manual_mlp.program import Activate, Affine, Drop, Program, cost_of

Named = dict[str, Tensor]


class Map(NamedTuple):
    """One affine map: the names of its weight and bias, None for what is missing or frozen; δ and a of each sample."""

    weight: str | None
    bias: str | None
    delta: Tensor
    a: Tensor


class Curvature:
    """Gradients of each sample and second derivatives of one batch, computed when they are asked for.

    Every dict has the names of `model.named_parameters()`, without frozen parameters. N samples:

    gradients       {name: (N, …)}: the gradient of each sample's own cost C_n; their mean is the batch's gradient
    norms           (N,): ‖g_n‖ over all parameters, from vectors alone
    variance        {name: …}: (1/N) Σ_n g_n² − G², G = (1/N) Σ_n g_n
    noise_scale     a scalar: tr Σ/|G|², both estimated without bias; of very few samples it may be negative
    clipped(c)      {name: …}: (1/N) Σ_n min(1, c/‖g_n‖) g_n
    ggn_diagonal()  {name: …}: the diagonal of (1/N) Σ_n J_nᵀ H_n J_n, exactly
    kfac()          {weight: (A, B)}: its block of the same matrix is about B ⊗ A
    hvp(v)          {name: …}: the Hessian of C times v

    It holds copies of the batch and of the parameters, so what is trained later does not change it.

    >>> import torch, manual_mlp as mm
    >>> mm.curvature(mm.MLP([2, 3, 1]), torch.zeros(5, 2), torch.zeros(5, 1))
    Curvature(quadratic cost, N = 5, 13 parameters)
    """

    def __init__(
        self, program: Program, names: list[str | None], tensors: list[Any], target: Tensor, loss: str
    ) -> None:
        self._program, self._names, self._tensors, self._cost = program, names, tensors, cost_of(loss, program)
        self._needs = [False, *(name is not None for name in names)]
        self._slots = program.forward(tensors, every=True)
        self._n, outputs = self._slots[-1].shape
        self._target = sheet.onehot(self._slots[-1], target) if target.dim() == 1 else target.clone()
        # C_n is this share of what the sheet's formulas sum over the outputs of a sample.
        self._share = 1.0 if self._cost.per == "N" else 1 / outputs

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor, needed in zip(self._tensors, self._needs, strict=False) if needed)
        return f"Curvature({self._cost.name} cost, N = {self._n}, {count} parameters)"

    @property
    @torch.no_grad()
    def gradients(self) -> Named:
        """Return the gradient of each sample's own cost: {name: (N, …)}.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> of.gradients["0.weight"].tolist()  # w x_n²
        [[[1.0]], [[4.0]]]
        """
        found: Named = {}
        for weight, bias, delta, a in self._maps:
            if weight is not None:
                found[weight] = sheet.sample_gradients(delta, a)
            if bias is not None:
                found[bias] = delta.clone()
        return self._in_order(found)

    @cached_property
    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return ‖g_n‖ of each sample over all parameters: (N,). The squares are in float64, or float32 would overflow.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> of.norms.tolist()
        [1.0, 4.0]
        """
        squares = [
            sheet.squared_norms(delta.double())
            * ((0 if weight is None else sheet.squared_norms(a.double())) + (bias is not None))
            for weight, bias, delta, a in self._maps
        ]
        return torch.stack(squares).sum(0).sqrt().to(self._slots[-1].dtype)

    @property
    @torch.no_grad()
    def variance(self) -> Named:
        """Return (1/N) Σ_n g_n² − G² of each parameter: {name: …}.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> of.variance["0.weight"].tolist()  # (1 + 16) / 2 − 2.5²
        [[2.25]]
        """
        found: dict[Any, Tensor] = {}
        for weight, bias, delta, a in self._maps:
            found |= dict(zip((weight, bias), sheet.variances(delta, a), strict=True))
        return self._in_order(found)

    @property
    @torch.no_grad()
    def noise_scale(self) -> Tensor:
        """Return tr Σ/|G|², both estimated without bias: a scalar.

        Raises InputError for one sample.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> of.noise_scale.item()  # 4.5 / (2.5² − 4.5 / 2)
        1.125
        """
        if self._n < 2:
            raise InputError("expected at least two samples for a noise scale, because one has no variance; got one")
        trace, square = (
            torch.stack([of.sum() for of in parts]).sum()
            for parts in (self.variance.values(), (g * g for g in self._means(self._maps).values()))
        )
        return sheet.noise_scale(trace * (self._n / (self._n - 1)), square, self._n)

    @torch.no_grad()
    def clipped(self, c: float) -> Named:
        """Return the mean of the samples' gradients, each shortened to the length c at most: {name: …}.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> of.clipped(2.0)["0.weight"].tolist()  # (1 + 2) / 2
        [[1.5]]
        """
        checks.positive("largest norm c", c)
        factor = sheet.clip_factor(self.norms, c).unsqueeze(1)
        return self._means(of._replace(delta=factor * of.delta) for of in self._maps)

    @torch.no_grad()
    def ggn_diagonal(self) -> Named:
        """Return the diagonal of the generalised Gauss-Newton matrix, (1/N) Σ_k (S_k ⊙ S_k)ᵀ (a ⊙ a): {name: …}.

        It takes n_L passes of steps 2 and 3. Raises InputError for a cost without its second derivative.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> of.ggn_diagonal()["0.weight"].tolist()  # the mean of x²
        [[2.5]]
        """
        total: Named = {}
        for maps in self._roots():
            for name, part in self._means(of._replace(delta=of.delta * of.delta, a=of.a * of.a) for of in maps).items():
                total[name] = total[name] + part if name in total else part
        return total

    @torch.no_grad()
    def kfac(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A = (1/N) Σ_n (a, 1)(a, 1)ᵀ and B = (1/N) Σ_n Σ_k S_k S_kᵀ of each weight: {name: (A, B)}.

        A has no row for a bias that is missing or frozen. Passes and errors as `ggn_diagonal`.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> A, B = of.kfac()["0.weight"]
        >>> A.tolist(), B.tolist()
        ([[2.5]], [[1.0]])
        """
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for maps in self._roots():
            for weight, bias, S, a in maps:
                if weight is None:
                    continue
                part, _ = self._step_4(S, S, True, False)
                if weight not in factors:
                    inputs = torch.cat([a, a.new_ones(len(a), bias is not None)], 1)
                    factors[weight] = self._step_4(inputs, inputs, True, False)[0], part
                else:
                    factors[weight][1].add_(part)
        return factors

    @torch.no_grad()
    def hvp(self, v: Named) -> Named:
        """Return the Hessian of C times v, for v = {name: …} of the parameters' shapes: {name: …}.

        Raises InputError for other names, shapes or dtypes, for a row without G″, by its name, and for a cost without
        its second derivative.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([1, 1], output_activation="identity", bias=False)
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> of = mm.curvature(net, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))  # C_n = ½ (w x_n)²
        >>> of.hvp({"0.weight": torch.tensor([[2.0]])})["0.weight"].tolist()  # 2.5 · 2
        [[5.0]]
        """
        if self._cost.H is None:
            raise _no_second_derivative("cost", self._cost.name, "H")
        for rule, _, _ in self._program.nodes:
            if isinstance(rule, Activate) and rule.row.curvature is None:
                raise _no_second_derivative("activation", rule.row.name, "curvature, G″")
        direction, found = self._direction(v), dict[str, Tensor]()
        moved = self._moved(direction)
        # R{∂C/∂slot} of each slot, from right to left.
        arrived: list[Any] = [None] * len(self._slots)
        arrived[-1] = self._cost.H(self._slots[-1], self._target, moved[-1]) * self._share
        for i in reversed(range(len(self._program.nodes))):
            if arrived[i + 1] is not None:
                parts = self._moved_back(i, arrived[i + 1], moved, direction, found)
                for slot, part in zip(self._program.nodes[i].reads, parts, strict=True):
                    if part is not None and self._wanted[slot]:
                        arrived[slot] = part if arrived[slot] is None else arrived[slot] + part
        return self._in_order(found)

    # -----------------------------------------------------------------------------------------------------------------
    # What several of them need
    # -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def _wanted(self) -> list[bool]:
        return self._program.wanted(self._needs)

    @cached_property
    def _arrived(self) -> list[Any]:
        """Return ∂C_n/∂slot of each sample for each slot."""
        return self._steps_2_and_3(self._cost.delta(self._slots[-1], self._target) * self._share)

    def _steps_2_and_3(self, g: Tensor) -> list[Any]:
        program = self._program
        arrived, _ = program.backward(g, self._slots, self._tensors, self._needs, every=True, step_4=False)
        return arrived

    @property
    def _maps(self) -> list[Map]:
        return self._maps_of(self._arrived)

    def _maps_of(self, arrived: list[Any]) -> list[Map]:
        """Return the affine maps with a parameter that is trained."""
        maps = []
        for i, (rule, reads, _) in enumerate(self._program.nodes):
            if isinstance(rule, Affine) and any(self._needs[self._program.spans[i]]):
                weight, bias = self._names_of(i)
                maps.append(Map(weight, bias, arrived[i + 1], self._slots[reads[0]]))
        return maps

    def _names_of(self, i: int) -> list[str | None]:
        span = self._program.spans[i]
        return self._names[span.start - 1 : span.stop - 1]

    def _roots(self) -> Iterator[list[Map]]:
        """Yield for each output k the maps with S_k: S^L = √H along k, S^l = (S^{l+1} W) ⊙ G′."""
        if self._cost.root is None:
            raise _no_second_derivative("cost", self._cost.name, "root")
        prediction = self._slots[-1]
        for unit in torch.eye(prediction.shape[1], dtype=prediction.dtype, device=prediction.device):
            root = self._cost.root(prediction, self._target, unit.expand_as(prediction))
            yield self._maps_of(self._steps_2_and_3(root * self._share**0.5))

    def _step_4(self, delta: Tensor, a: Tensor, weight: bool, bias: bool) -> list[Any]:
        """Return (1/N) δᵀ a and (1/N) Σ_n δ_n, None for what is not wanted."""
        rule: Any = Affine()
        parts = rule.backward(delta, a, None, None, needs=(False, weight, bias))[1:]
        return [None if part is None else part / self._n for part in parts]

    def _means(self, maps: Iterable[Map]) -> Named:
        """Return step 4 of each map by the names of its parameters."""
        found: dict[Any, Tensor] = {}
        for weight, bias, delta, a in maps:
            parts = self._step_4(delta, a, weight is not None, bias is not None)
            found |= dict(zip((weight, bias), parts, strict=True))
        return self._in_order(found)

    def _in_order(self, found: dict[Any, Tensor]) -> Named:
        return {name: found[name] for name in self._names if name is not None}

    # -----------------------------------------------------------------------------------------------------------------
    # R{x}
    # -----------------------------------------------------------------------------------------------------------------

    def _direction(self, v: Named) -> list[Any]:
        """Return v in the order of the run's tensors: None for x, a missing bias and what is frozen."""
        trained = [name for name in self._names if name is not None]
        if not isinstance(v, dict) or v.keys() != {*trained}:
            came = ", ".join(map(str, v)) if isinstance(v, dict) else type(v).__name__
            raise InputError(f"expected a dict with a tensor for each of {', '.join(trained)}; got {came or 'no name'}")
        for name, own in zip(self._names, self._tensors[1:], strict=True):
            if name is not None:
                checks.like(f"v[{name!r}]", v[name], own, own.shape, "make it by torch.randn_like of the parameter")
        return [None, *(None if name is None else v[name] for name in self._names)]

    def _moved(self, direction: list[Any]) -> list[Any]:
        """Return R{slot} of each slot, None where it is 0: R{z} = R{a} Wᵀ + a Vᵀ + v, R{a} = R{z} ⊙ G′."""
        moved: list[Any] = [None]
        for i, (rule, reads, _) in enumerate(self._program.nodes):
            span, ins = self._program.spans[i], [moved[slot] for slot in reads]
            if isinstance(rule, Affine):
                a, (weight, _) = self._slots[reads[0]], self._tensors[span]
                moved.append(affine_tangent(a, weight, ins[0], *direction[span]))
            elif isinstance(rule, Activate) and ins[0] is not None:
                moved.append(rule.backward(ins[0], self._saved(i), needs=())[0])
            else:  # a sum, or a dropout that draws nothing
                moved.append(sum_of(*ins))
        return moved

    def _moved_back(
        self, i: int, arriving: Tensor, moved: list[Any], direction: list[Any], found: Named
    ) -> Sequence[Tensor | None]:
        """Return R{∂C/∂slot} of each slot that node i reads, from that of its output; R{∂C/∂w} goes to found."""
        (rule, reads, _), span = self._program.nodes[i], self._program.spans[i]
        slot, g, wanted = reads[0], self._arrived[i + 1], [self._wanted[slot] for slot in reads]
        if isinstance(rule, Affine):
            # R{δ W} = R{δ} W + δ V, R{δᵀ a} = R{δ}ᵀ a + δᵀ R{a}
            W, V = self._tensors[span][0], direction[span][0]
            needs = *wanted, *self._needs[span]
            first = rule.backward(arriving, self._slots[slot], W, None, needs=needs)
            needs = needs[0] and V is not None, needs[1] and moved[slot] is not None, False
            second = rule.backward(g, moved[slot], V, None, needs=needs)
            parts = [*map(sum_of, first, second)]
            for name, part in zip(self._names_of(i), parts[1:], strict=True):
                if name is not None:
                    found[name] = part / self._n
            return parts[:1]
        if isinstance(rule, Activate):
            (delta,) = rule.backward(arriving, self._saved(i), needs=wanted)
            second_derivative: Any = rule.row.curvature
            bend = second_derivative(self._saved(i), *rule.row.values)
            if moved[slot] is None or (isinstance(bend, int) and bend == 0):
                return (delta,)
            return (sheet.moved_delta(delta, g, bend, moved[slot]),)
        return rule.backward(arriving, None, needs=wanted)

    def _saved(self, i: int) -> Tensor:
        return self._slots[self._program.saved[i][0]]


def _no_second_derivative(kind: str, name: str, field: str) -> InputError:
    return InputError(
        f"expected the second derivative of the {kind} {name!r}; its row on the sheet has no {field}: give it one"
    )


@torch.no_grad()
def curvature(model: nn.Module, x: Tensor, target: Tensor, loss: str = "quadratic") -> Curvature:
    """Return the gradients of each sample and the second derivatives of one batch, as `Curvature` says: lazily.

    model   an mm.MLP or an nn.Sequential of affine maps and activations, and sums of such chains; dropout in eval mode
    x       (N, n_1), target (N, n_L) or class indices (N,) for "cross_entropy", loss: as `network_loss` takes them

    Raises InputError for batch norm and any other layer, by name, for tied weights, active dropout, a time axis in x,
    a model without a parameter that requires a gradient, and as `network_loss` for a batch or loss that does not fit.

    >>> import torch, manual_mlp as mm
    >>> net = mm.MLP([2, 3, 1])
    >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    >>> of = mm.curvature(net, x, target)
    >>> {name: tuple(gradient.shape) for name, gradient in of.gradients.items()}
    {'0.weight': (3, 3, 2), '0.bias': (3, 3), '2.weight': (3, 1, 3), '2.bias': (3, 1)}
    >>> mm.QuadraticLoss()(net(x), target).backward()
    >>> torch.allclose(of.gradients["0.weight"].mean(0), net[0].weight.grad)
    True
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"expected samples that do not depend on each other; {type(module).__name__} at {name!r} joins the "
                "rows of a batch, so a sample has no gradient of its own: leave it out"
            )
    program = reading_of(model).program
    if any(isinstance(rule, Drop) and rule.p > 0 for rule, _, _ in program.nodes):
        raise InputError("expected a model that draws no dropout, so that it is one net; call .eval()")
    flat = parameters_of(model, program)
    names = _check_parameters(model, flat)
    checks.tensors(x=x, target=target)
    checks.dense(x=x, target=target)
    if x.dim() > 2:
        raise InputError(
            f"expected x of shape (N, features); got {tuple(x.shape)}: with a time axis a sample's gradient is a sum "
            "of products, whose norm is no product of norms; call .flatten(0, 1) if each step is a sample of its own"
        )
    if autocasting(x):
        raise InputError("curvature ignores autocast: leave its context")
    first, *_, last = *program.affine, program.affine[-1]
    checks.full_batch(first.weight, len(last.weight), x, target, loss)
    own = [None if parameter is None else parameter.detach().clone() for parameter in flat]
    return Curvature(program, names, [x.detach().clone(), *own], target.detach(), loss)


def _check_parameters(model: nn.Module, flat: list[Any]) -> list[str | None]:
    """Return the name of each parameter, None for a missing or frozen one. Refuse tied ones."""
    checks.own_parameters(model, flat)  # a norm of a tied one would add products of both places
    if len({(parameter.dtype, parameter.device) for parameter in flat if parameter is not None}) > 1:
        raise InputError("expected parameters of one dtype on one device: call model.to() with both")
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [None if p is None or not p.requires_grad else name_of[id(p)] for p in flat]
    if not any(names):
        raise InputError("expected a parameter that requires a gradient; all are frozen: call requires_grad_()")
    return names
