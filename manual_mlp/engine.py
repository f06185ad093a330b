"""The fast training engine: steps 1 to 5 without autograd, in buffers allocated once, in the model's own parameters.

Every formula is the sheet's, in place. Plain SGD is done by the matrix product of step 4 itself, W := βW + α δᵀa, after
δ was taken through the old W; every other optimizer gets gradients in `.grad` and does its own `step()`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import kernels
from manual_mlp.cuda_graph import Launch
from manual_mlp.errors import InputError
from manual_mlp.functional import autocasting, check_tensors
from manual_mlp.layers import Layer, cost_of, layers_of, weigh
from manual_mlp.network import check_batch, check_labels, net_of
from manual_mlp.plan import SHAPE, Plan, Stage

_PLANS = 8  # kinds of batches whose buffers are kept
_TRAINED = attrgetter("requires_grad")
_CHUNK = 1 << 18  # numbers that train_epoch gathers at once: 1 MB of float32 stays in the cache
_BATCHES = 256  # batches in it at most: each is a view, and of tiny ones there would be a quarter of a million

# torch.inference_mode, less its Python, which takes 1 µs of a step.
_inference = partial(getattr(torch._C, "_InferenceMode", torch.inference_mode), True)

Rates = tuple[tuple[float, float], ...]
"""(β, α) of w := βw + α ∂C/∂w for each group of the optimizer; (), where it takes the step itself."""
Pair = tuple[Tensor | None, Tensor | None]
Call = Callable[..., Any]


@dataclass(slots=True)
class _Parameters:
    """One layer's (W^l, b^l), detached, and so of the same memory; None where missing.

    own, gradient   the parameters and their .grad, None where frozen too; groups: the optimizer's
    read            what products read: the parameters or, if mixed, copies of them in compute_dtype
    """

    both: tuple[Tensor, Tensor | None]
    own: Pair
    gradient: Pair
    read: tuple[Tensor, Tensor | None]
    groups: tuple[int, int]


class _Plan(Plan):
    """The plan with steps 4 and 5, and the rows that `train_epoch` gathers.

    Buffers are made in inference mode: autograd then keeps no books on them. The calls are made once for the
    optimizer's rates and the dropouts that draw.

    On CUDA they are launched as one graph. It would bake in addresses and numbers: so input and target are copied to
    fixed memory, and the rates lie in tensors.
    """

    def __init__(self, engine: "BackpropEngine", input: Tensor, target: Tensor) -> None:
        self.engine, n, mixed = engine, len(input), engine.compute_dtype is not None
        self.fixed, layers = engine._fixed, engine._layers
        outputs = layers[-1].weight.shape[0]
        _, self.total_weight, _ = weigh(engine._cost, n, outputs, input.dtype)
        _, self.delta_weight = kernels.weights(engine._cost, n, outputs)
        with torch.inference_mode():
            super().__init__(layers, engine._cost, input, engine.compute_dtype)
            self.input = self.ones.new_empty(input.shape) if mixed or self.fixed else None
            self.target = torch.empty_like(target) if self.fixed else None
            self.rates = [(self.cost.new_empty(()), self.cost.new_empty(())) for _ in engine._groups]
        batches = min(max(1, _CHUNK // (n * input.shape[1])), _BATCHES)
        self.chunk = [data.new_empty(batches * n, *data.shape[1:]) for data in (input, target)]
        self.batches = list(zip(*(data.split(n) for data in self.chunk), strict=True))
        self.made_for: object = None
        self.held: Rates = ()

    def gathered(self, input: Tensor, target: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of `order`, which are whole batches, batch by batch."""
        n = len(self.ones)
        for rows in order.split(len(self.batches) * n):
            for data, chunk in zip((input, target), self.chunk, strict=True):
                torch.index_select(data, 0, rows, out=chunk[: len(rows)])
            yield from self.batches[: len(rows) // n]

    def in_order(self, input: Tensor, target: Tensor, prediction: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows as they come, batch by batch; whoever asks for the next one has run the last one."""
        batches = zip(input.split(len(self.ones)), target.split(len(self.ones)), strict=True)
        if prediction is None:
            yield from batches
            return
        for batch, a in zip(batches, prediction.split(len(self.ones)), strict=True):
            yield batch
            a.copy_(self.kept)

    def run(self, input: Tensor, target: Tensor, out: Tensor) -> None:
        """The five steps, in inference mode; out (1,) := C / total_weight."""
        if self.input is not None:
            self.input.copy_(input)
        if self.target is not None:
            self.target.copy_(target)
            self.launch()
            if out is not self.out:
                out.copy_(self.out)
            return
        for call in self.first:
            call(input)
        for call in self.forward:
            call()
        self.cost_(self.prediction, target, out)
        for call in self.backward:
            call()
        for call in self.last:
            call(input)

    def _run_fixed(self) -> None:
        """The same on input, target and cost that stay where they are."""
        for call in self.forward:
            call()
        self.cost_(self.prediction, self.target, self.out)  # type: ignore[arg-type]
        for call in self.backward:
            call()

    def make(self, rates: Rates, drops: list[float]) -> None:
        """The calls for these rates and dropouts, unless they are there: first and last read an input that moves."""
        if self.fixed and rates != self.held:
            self._hold(rates)
        kind = (tuple(beta != 1 for beta, _ in rates) if self.fixed else rates), drops
        if self.made_for == kind:
            return
        self.made_for = kind
        self.first: list[Call] = []
        self.forward: list[Call] = []
        self.backward: list[Call] = []
        self.last: list[Call] = []
        with torch.inference_mode():
            inputs = [self.input]
            for p, stage, drop in zip(self.engine._parameters, self.stages, drops, strict=True):
                if self.engine.compute_dtype is not None:
                    pairs = zip(p.read, p.both, strict=True)
                    self.forward += [partial(c.copy_, own) for c, own in pairs if c is not None and own is not None]
                inputs.append(self._step_1(stage, inputs[-1], *p.read, drop))
            a = inputs.pop()
            assert a is not None
            if self.copied:
                self.forward.append(partial(self.prediction.copy_, a))
                self.backward.append(partial(self.stages[-1].delta.copy_, self.delta))
            else:
                self.prediction = a
            self.kept = self.prediction
            if self.engine._keeps and not self.copied and self.stages[-1].row.name != "identity":
                self.kept = torch.empty_like(a)  # step 2 overwrites a^L
                self.forward.append(partial(self.kept.copy_, a))
            for layer in range(len(self.stages) - 1, self.engine._first - 1, -1):
                weight, _ = self.engine._parameters[layer].read
                self._steps_2_and_3(layer, weight if layer > self.engine._first else None, drops[layer])
                self._steps_4_and_5(layer, inputs[layer], rates)
        if self.target is not None:
            self.launch = Launch(self._run_fixed, self.ones.device)

    def _hold(self, rates: Rates) -> None:
        self.held = rates
        with torch.inference_mode():
            for tensors, numbers in zip(self.rates, rates, strict=False):
                for tensor, number in zip(tensors, numbers, strict=True):
                    tensor.fill_(number)

    def _step_1(self, stage: Stage, a: Tensor | None, weight: Tensor, bias: Tensor | None, drop: float) -> Tensor:
        """z^{l+1} = a^l W^lᵀ + b^l, a^{l+1} = G(z^{l+1}) → a^{l+1}. None as a^l is the input."""
        product: Call = torch.mm
        if bias is not None:  # expanded here, not by addmm at each call; but a GPU's addmm adds a vector as it goes
            rows = bias if self.fixed and not stage.by_columns else bias.expand(stage.z.shape)
            product = partial(torch.addmm, rows.t() if stage.by_columns else rows)
        affine: Call
        if stage.by_columns:
            affine = partial(product, weight, out=stage.z.t())
            self.first.append(lambda a: affine(a.t())) if a is None else self.forward.append(partial(affine, a.t()))
        else:
            affine = partial(product, mat2=weight.t(), out=stage.z)
            self.first.append(affine) if a is None else self.forward.append(partial(affine, a))
        if stage.row.name != "identity":
            G_, _ = kernels.in_place(stage.row)
            out = {} if stage.saved_z is None else {"out": stage.a}
            self.forward.append(partial(G_, stage.z, *stage.row.values, **out))
        if drop:
            self.forward += [stage.draw, partial(torch.mul, stage.a, stage.scale, out=stage.dropped)]
        return stage.dropped if drop else stage.a

    def _steps_2_and_3(self, layer: int, weight: Tensor | None, drop: float) -> None:
        """δ^{l+1} = g ⊙ G′(z^{l+1}), and what arrives at the layer before, δ^{l+1} W^l, unless W^l is None."""
        stage = self.stages[layer]
        if drop:
            self.backward.append(partial(stage.delta.mul_, stage.scale))
        if stage.row.name != "identity":
            _, delta_ = kernels.in_place(stage.row)
            scratch = stage.work, stage.mask
            self.backward.append(partial(delta_, stage.delta, stage.a, stage.saved_z, *scratch, *stage.row.values))
        if weight is not None:
            self.backward.append(partial(torch.mm, stage.delta, weight, out=self.stages[layer - 1].delta))

    def _steps_4_and_5(self, layer: int, a: Tensor | None, rates: Rates) -> None:
        """w := βw + α ∂C/∂w, with rates; without, ∂C/∂w into its own buffer."""
        p, stage = self.engine._parameters[layer], self.stages[layer]
        mixed = self.engine.compute_dtype is not None
        for index, to in enumerate(p.own if rates else p.gradient):
            if to is None:
                continue
            group = p.groups[index]
            beta, alpha = rates[group] if rates else (0.0, 1.0)
            delta_t, rate = stage.delta_t, None
            if self.fixed and rates:
                decay, rate = self.rates[group]
                if beta != 1:
                    self.backward.append(partial(to.mul_, decay))
                if not mixed:
                    self.backward.append(partial(torch.mul, stage.delta, rate, out=stage.work))
                    delta_t = stage.work.t()
                beta, alpha = 1.0, 1.0
            alpha *= self.delta_weight
            call: Call
            if mixed:
                product = partial(torch.mm, delta_t) if index == 0 else partial(torch.sum, dim=0)
                call = partial(_add_rounded, to, product, stage.delta.new_empty(to.shape), beta, alpha, rate)
            else:
                decays: Any = {} if beta == 1 else {"beta": beta}
                call = partial(to.addmm_ if index == 0 else to.addmv_, delta_t, alpha=alpha, **decays)
            ones = stage.delta if mixed else self.ones
            of = a if index == 0 else ones
            if of is None:
                self.last.append(call)
            else:
                self.backward.append(partial(call, of))


def _add_rounded(
    to: Tensor, product: Call, rounded: Tensor, beta: float, alpha: float, rate: Tensor | None, of: Tensor
) -> None:
    """to := β to + α · rate · product(of), the product in the compute_dtype, the rest in the dtype of `to`."""
    product(of, out=rounded)
    if beta == 0:
        to.zero_()
    elif beta != 1:
        to.mul_(beta)
    if rate is None:
        to.add_(rounded, alpha=alpha)
    else:
        to.addcmul_(rounded, rate, value=alpha)


class BackpropEngine:
    """Trains `model` by the δ formulas, in place: no graph, and nothing allocated in a step but the cost it returns.

    model      an mm.MLP or nn.Sequential that `network.layers_of` takes; its own parameters are trained
    optimizer  a torch.optim.SGD, Adam or AdamW over them; its param_groups are read at each step, its state is torch's
    loss       "quadratic", "mse", "bce" or "cross_entropy": the functions of `functional.COSTS` with their defaults
    max_grad_norm   clips the gradients, as torch.nn.utils.clip_grad_norm_
    compute_dtype   torch.bfloat16: products and activations in it; parameters, cost and update in float32

    A plain SGD's step leaves .grad alone; otherwise .grad is filled, in tensors that the next step overwrites.
    Raises InputError for a model, optimizer, loss or batch that it can't train faithfully.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: str = "quadratic",
        max_grad_norm: float | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.max_grad_norm, self.compute_dtype = max_grad_norm, compute_dtype
        self._fixed = self._keeps = False
        if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise InputError(f"expected a torch.optim.SGD, Adam or AdamW; got {type(optimizer).__name__}")
        if any(group["differentiable"] for group in optimizer.param_groups):
            raise InputError("expected an optimizer without differentiable=True, since the engine keeps no graph")
        if max_grad_norm is not None and not (isinstance(max_grad_norm, int | float) and max_grad_norm > 0):
            raise InputError(f"expected a max_grad_norm above 0, or None; got {max_grad_norm!r}")
        self._prepare()

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """One training step: input (N, n_1), target (N, n_L) or class indices (N,) → C before the step, a scalar."""
        rates = self._rates()
        cost = self._pass(input, target, rates)
        if not rates:
            self._step_optimizer()
        return cost

    def compute_gradients(self, input: Tensor, target: Tensor) -> Tensor:
        """Steps 1 to 4: fills the parameters' .grad (it does not add to it) → C. Arguments as `step`."""
        return self._pass(input, target, ())

    def train_epoch(
        self, input: Tensor, target: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """One step for each batch of the rows in random order, the last one shorter if need be → mean C of all rows.

        The order is torch.randperm(N, generator=generator). Learning rates are read once, at the start.
        """
        self._check(input, target)
        order = torch.randperm(len(input), generator=generator, device=generator.device if generator else None)
        return self._train_rows(input, target, batch_size, order.to(input.device), None)

    def train_batches(self, input: Tensor, target: Tensor, batch_size: int, prediction: Tensor | None = None) -> Tensor:
        """`train_epoch` on the rows in the order in which they come.

        prediction (N, n_L) is filled with a^L of each batch before its step.
        """
        self._check(input, target)
        if prediction is not None and not self._keeps:
            self._keeps = True
            self._plans.clear()
        return self._train_rows(input, target, batch_size, None, prediction)

    def _pass(self, input: Tensor, target: Tensor, rates: Rates) -> Tensor:
        """Steps 1 to 4, or to 5 given rates → C, an ordinary tensor."""
        plan = self._planned(input, target, rates)
        try:
            with _inference():
                plan.run(input, target, plan.out)
        except (IndexError, RuntimeError):
            self._check(input, target)
            raise
        if not rates:
            self._give_gradients()
        return torch.mul(plan.cost, plan.total_weight)

    def _train_rows(
        self, input: Tensor, target: Tensor, batch_size: int, order: Tensor | None, prediction: Tensor | None
    ) -> Tensor:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"expected a batch_size of at least 1; got {batch_size!r}")
        rates, whole = self._rates(), len(input) // batch_size * batch_size
        costs = torch.empty(math.ceil(len(input) / batch_size), dtype=input.dtype, device=input.device)
        outs = costs.split(1)
        for n, of, out in ((batch_size, slice(whole), outs), (len(input) - whole, slice(whole, None), outs[-1:])):
            if n and len(input[of]):
                plan = self._planned(input[:n], target[:n], rates)
                if order is None:
                    batches = plan.in_order(input[of], target[of], None if prediction is None else prediction[of])
                else:
                    batches = plan.gathered(input, target, order[of])
                self._train(plan, zip(batches, out, strict=False), rates)
        return costs.sum() * kernels.weights(self._cost, len(input), self._layers[-1].weight.shape[0])[0]

    def _train(self, plan: _Plan, batches: Iterable[tuple[tuple[Tensor, Tensor], Tensor]], rates: Rates) -> None:
        """A step for each (input, target), out; out := the cost, undivided."""
        if rates:
            with torch.inference_mode():
                for (input, target), out in batches:
                    plan.run(input, target, out)
            return
        for (input, target), out in batches:
            with _inference():
                plan.run(input, target, out)
            self._give_gradients()
            self._step_optimizer()

    # -----------------------------------------------------------------------------------------------------------------
    # Parameters, optimizer and plans
    # -----------------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Reads the model and the optimizer, and checks that they belong together."""
        self._net = net_of(self.model)
        self._layers = self._net.layers
        self._cost = cost_of(self.loss, self._layers)
        self._no_drops = [0.0] * len(self._layers)
        self._groups = self.optimizer.param_groups
        self._plans: dict[object, _Plan] = {}
        try:
            owned = [(of, name) for of in self._net.owners for name in ("weight", "bias") if of[name] is not None]
        except KeyError:
            layers_of(self.model)  # a parametrization is refused by name
            raise
        self._owners, self._names = zip(*owned, strict=True)
        self._owned = [of[name] for of, name in owned]
        # Of contiguous tensors the strides follow from the shape.
        self._lie: Call = Tensor.is_contiguous if all(map(Tensor.is_contiguous, self._owned)) else Tensor.stride
        # On CUDA a step is one graph.
        self._fixed = self._fixed or self._owned[0].is_cuda
        group_of = {id(parameter): i for i, group in enumerate(self._groups) for parameter in group["params"]}
        self._check_parameters(group_of)
        self._parameters = [self._read(layer, group_of) for layer in self._layers]
        trained = [layer for layer, p in enumerate(self._parameters) if p.own != (None, None)]
        self._first = trained[0]
        self._gradients = [
            (parameter, gradient)
            for layer, p in zip(self._layers, self._parameters, strict=True)
            for parameter, gradient in zip((layer.weight, layer.bias), p.gradient, strict=True)
            if parameter is not None and gradient is not None
        ]
        self._state = self._state_now()  # last: after a refusal the next step asks again

    def _read(self, layer: Layer, group_of: dict[int, int]) -> _Parameters:
        """One layer's tensors, made outside inference mode: gradients and parameters are ordinary ones."""
        weight, bias = layer.weight, layer.bias
        both = weight.detach(), None if bias is None else bias.detach()
        own = both[0] if weight.requires_grad else None, both[1] if bias is not None and bias.requires_grad else None
        gradient = _empty(own[0]), _empty(own[1])
        read = both
        if self.compute_dtype is not None:
            read = both[0].to(self.compute_dtype), None if both[1] is None else both[1].to(self.compute_dtype)
        return _Parameters(both, own, gradient, read, (group_of.get(id(weight), 0), group_of.get(id(bias), 0)))

    def _check_parameters(self, group_of: dict[int, int]) -> None:
        parameters = self._owned
        trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        first = parameters[0]
        if any(p.dtype != first.dtype or p.device != first.device or not p.is_floating_point() for p in parameters):
            raise InputError("expected parameters of one floating-point dtype on one device: call model.to() with both")
        for layer in self._layers:
            if layer.bias is not None and layer.bias.shape != layer.weight.shape[:1]:
                raise InputError(
                    f"expected a bias of shape {tuple(layer.weight.shape[:1])}, a number for each row of the weight; "
                    f"got {tuple(layer.bias.shape)} in {layer.affine}: cut both alike"
                )
        if len({parameter.data_ptr() for parameter in parameters}) < len(parameters):
            raise InputError("expected layers with parameters of their own; got tied ones: train them by their layers")
        if self.compute_dtype is not None and (self.compute_dtype, first.dtype) != (torch.bfloat16, torch.float32):
            raise InputError(
                "expected a compute_dtype of torch.bfloat16 for float32 parameters, or None; "
                f"got {self.compute_dtype} for {first.dtype}"
            )
        if not trained or not trained <= group_of.keys() or not group_of.keys() <= {id(p) for p in parameters}:
            raise InputError(
                "expected an optimizer over the model's parameters, all that require a gradient and no others; "
                "got another set: make the optimizer after the model has its final parameters"
            )

    def _planned(self, input: Tensor, target: Tensor, rates: Rates) -> _Plan:
        """The plan for such a batch; made anew, with all checks, after anything it was made from has changed."""
        if self._changed():
            self._prepare()
        try:
            autocast = autocasting(input)
            kind: object = input.shape, target.shape, target.dtype
        except AttributeError:
            check_tensors(input=input, target=target)
            raise
        if autocast:
            raise InputError("expected no autocast around the engine: it would not take part; use compute_dtype")
        # A wrong dtype or device of the input is torch's to notice, before anything is written; a copy notices nothing.
        if self._fixed or self.compute_dtype is not None:
            kind = kind, input.dtype, input.device, target.device
        plan = self._plans.get(kind)
        if plan is None:
            self._check(input, target)
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[kind] = _Plan(self, input, target)
        plan.make(rates, [layer.drops for layer in self._layers] if self._net.drops else self._no_drops)
        self._plan = plan
        return plan

    def _changed(self) -> bool:
        groups = self.optimizer.param_groups is not self._groups
        return groups or self._state_now() != self._state or self._net.changed()

    def _state_now(self) -> list[Any]:
        """Which parameters the layers have, where and how they lie, and which are trained; by maps, which are quick.

        `.data` can make a parameter a part of itself, at the same address.
        """
        owned = self._owned
        return [
            *map(id, map(dict.get, self._owners, self._names)),
            *map(Tensor.data_ptr, owned),
            *map(SHAPE, owned),
            *map(self._lie, owned),
            *map(_TRAINED, owned),
        ]

    def _rates(self) -> Rates:
        """Of a plain SGD: w := (1 − LR λ) w − LR ∂C/∂w."""
        optimizer = self.optimizer
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if type(optimizer) is not torch.optim.SGD or self.max_grad_norm is not None or hooks:
            return ()
        if self._fixed and self._owned[0].dtype in kernels.ROUNDED:  # a rate in a tensor would be rounded too
            return ()
        rates = []
        for group in optimizer.param_groups:
            lr = group["lr"]
            if group["momentum"] != 0 or group["maximize"] or isinstance(lr, Tensor):
                return ()
            rates.append((1.0 - lr * group["weight_decay"], -lr))
        optimizer._opt_called = True  # type: ignore[attr-defined] # what a scheduler asks about
        return tuple(rates)

    def _give_gradients(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def _step_optimizer(self) -> None:
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([parameter for parameter, _ in self._gradients], self.max_grad_norm)
        self.optimizer.step()

    def _check(self, input: Tensor, target: Tensor) -> None:
        """Raises InputError for a batch that does not fit, or is empty, or has labels out of range."""
        check_tensors(input=input, target=target)
        check_batch(self._layers[0].weight, len(self._layers[-1].weight), input, target, self.loss)
        if len(input) == 0:
            raise InputError("expected a batch with at least one row; got none, whose mean cost is no number")
        check_labels(len(self._layers[-1].weight), target, self.loss)


def _empty(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.empty_like(like)
