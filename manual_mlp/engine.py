"""The fast training engine: steps 1 to 5 without autograd, in buffers allocated once, in the model's own parameters.

Every formula is the sheet's, in place. Plain SGD is done by the matrix product of step 4 itself, W := βW + α δᵀa, after
δ was taken through the old W; every other optimizer gets gradients in `.grad` and does its own `step()`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manual_mlp import formulas as sheet
from manual_mlp.errors import InputError
from manual_mlp.network import Layer, check_batch, cost_of, layers_of, sequences_of

_PLANS = 8  # kinds of batches whose buffers are kept
_CHUNK = 1 << 18  # numbers that train_epoch gathers at once: 1 MB of float32 stays in the cache

Rates = list[tuple[float, float]] | None
"""(β, α) of w := βw + α ∂C/∂w for each group of the optimizer; None if it takes the step itself."""
Pair = tuple[Tensor | None, Tensor | None]


@dataclass(slots=True)
class _Parameters:
    """One layer's W^l and b^l, detached, and so of the same memory.

    weight, weight_t, bias   what products read; rounded copies of W^l and b^l if mixed
    own, gradient            (W, b) and (∂C/∂W, ∂C/∂b), None where frozen, and the optimizer's groups of the two
    rounded                  (∂C/∂W, ∂C/∂b) as mixed products give them
    """

    weight: Tensor
    weight_t: Tensor
    bias: Tensor | None
    own: Pair
    gradient: Pair
    groups: tuple[int, int]
    master: Pair
    rounded: tuple[Tensor, Tensor] | None


class _Stage:
    """One layer's buffers for N rows: z, a, δ (N, n_{l+1}); work and mask are scratch, shared by all layers."""

    def __init__(self, layer: Layer, n: int, like: Tensor, scratch: Tensor, bits: Tensor) -> None:
        shape = (n, layer.weight.shape[0])
        self.parameters = layer.parameters
        self.G_, self.delta_ = sheet.in_place(layer.row)
        self.a, self.delta = like.new_empty(shape), like.new_empty(shape)
        self.saved_z = like.new_empty(shape) if layer.row.saves == "z" else None
        self.z = self.a if self.saved_z is None else self.saved_z
        self.delta_t = self.delta.t()
        self.work, self.mask = (flat[: math.prod(shape)].view(shape) for flat in (scratch, bits))
        self.linear = layer.row.name == "identity"
        self.dropout = layer.dropout
        if self.dropout is not None:
            self.drawn, self.scale, self.output = torch.empty_like(self.mask), self.a.clone(), self.a.clone()

    def draw(self) -> Tensor | None:
        """m / (1 − p), with the mask that functional.dropout draws; None without dropout."""
        if self.dropout is None or not self.dropout.training or self.dropout.p == 0:
            return None
        keep = 1 - self.dropout.p
        return self.scale.copy_(self.drawn.bernoulli_(keep)).div_(keep or 1.0)


class _Plan:
    """The buffers for batches of N rows, made in inference mode: autograd then keeps no books on them."""

    def __init__(self, engine: "BackpropEngine", n: int, input: Tensor, target: Tensor) -> None:
        layers = engine._layers
        outputs = layers[-1].weight.shape[0]
        largest = n * max(layer.weight.shape[0] for layer in layers)
        with torch.inference_mode():
            like = torch.empty(0, dtype=engine.compute_dtype or input.dtype, device=input.device)
            scratch, bits = like.new_empty(largest), like.new_empty(largest, dtype=torch.bool)
            self.stages = [_Stage(layer, n, like, scratch, bits) for layer in layers]
            self.ones = like.new_ones(n)
            # What the cost reads and writes is in the parameters' dtype.
            self.column = torch.empty(n, 1, dtype=input.dtype, device=input.device)
            self.delta, self.work = self.stages[-1].delta, self.stages[-1].work
            self.input = self.prediction = None
            if engine.compute_dtype is not None:
                self.input = like.new_empty(n, input.shape[1])
                self.prediction, self.delta, self.work = (self.column.new_empty(n, outputs) for _ in range(3))
        self.total_weight = engine._cost.total_weight(n, outputs)
        self.delta_weight = engine._cost.delta_weight(n, outputs)
        batches = max(1, _CHUNK // (n * input.shape[1]))
        self.chunk = [
            torch.empty(batches * n, *data.shape[1:], dtype=data.dtype, device=data.device) for data in (input, target)
        ]
        self.batches = list(zip(*(data.split(n) for data in self.chunk), strict=True))

    def gathered(self, input: Tensor, target: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of `order`, which are whole batches, batch by batch."""
        n = len(self.ones)
        for rows in order.split(len(self.batches) * n):
            for data, chunk in zip((input, target), self.chunk, strict=True):
                torch.index_select(data, 0, rows, out=chunk[: len(rows)])
            yield from self.batches[: len(rows) // n]


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
        if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise InputError(f"expected a torch.optim.SGD, Adam or AdamW; got {type(optimizer).__name__}")
        self._prepare()

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """One training step: input (N, n_1), target (N, n_L) or class indices (N,) → C before the step, a scalar."""
        plan, rates = self._planned(input, target), self._rates()
        cost = self._pass(plan, input, target, rates)
        if rates is None:
            self._step_optimizer()
        return cost

    def compute_gradients(self, input: Tensor, target: Tensor) -> Tensor:
        """Steps 1 to 4: fills the parameters' .grad (it does not add to it) → C. Arguments as `step`."""
        return self._pass(self._planned(input, target), input, target, None)

    def train_epoch(
        self, input: Tensor, target: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """One step for each batch of the rows in random order, the last one shorter if need be → mean C of all rows.

        The order is torch.randperm(N, generator=generator). Learning rates are read once, at the start.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"expected a batch_size of at least 1; got {batch_size!r}")
        check_batch(self._layers, input, target, self.loss)
        self._check_labels(target)
        order = torch.randperm(len(input), generator=generator, device=generator.device if generator else None)
        order, rates = order.to(input.device), self._rates()
        costs = torch.empty(math.ceil(len(input) / batch_size), dtype=input.dtype, device=input.device)
        outs = iter(costs.unbind())
        whole = len(input) // batch_size * batch_size
        for rows, n in ((order[:whole], batch_size), (order[whole:], len(input) - whole)):
            if len(rows):
                plan = self._planned(input[:n], target[:n])
                self._train(plan, plan.gathered(input, target, rows), outs, rates)
        return costs.sum() * self._cost.total_weight(len(input), self._layers[-1].weight.shape[0])

    # -----------------------------------------------------------------------------------------------------------------
    # The five steps
    # -----------------------------------------------------------------------------------------------------------------

    def _pass(self, plan: _Plan, input: Tensor, target: Tensor, rates: Rates) -> Tensor:
        """Steps 1 to 4, or to 5 given rates → C, an ordinary tensor."""
        cost = torch.empty((), dtype=input.dtype, device=input.device)
        try:
            with torch.inference_mode():
                self._recursion(plan, input, target, cost, rates)
                cost.mul_(plan.total_weight)
        except (IndexError, RuntimeError):
            self._check_labels(target)
            raise
        if rates is None:
            self._give_gradients()
        return cost

    def _train(
        self, plan: _Plan, batches: Iterator[tuple[Tensor, Tensor]], outs: Iterator[Tensor], rates: Rates
    ) -> None:
        """A step for each batch; its cost, undivided, goes into the next of outs."""
        if rates is not None:
            with torch.inference_mode():
                for input, target in batches:
                    self._recursion(plan, input, target, next(outs), rates)
            return
        for input, target in batches:
            with torch.inference_mode():
                self._recursion(plan, input, target, next(outs), None)
            self._give_gradients()
            self._step_optimizer()

    def _recursion(self, plan: _Plan, input: Tensor, target: Tensor, out: Tensor, rates: Rates) -> None:
        """The five steps, in inference mode; out := C / total_weight."""
        a, scales = self._round(plan, input), []
        inputs: list[Tensor] = []
        for p, stage in zip(self._parameters, plan.stages, strict=True):
            inputs.append(a)
            if p.bias is None:
                torch.mm(a, p.weight_t, out=stage.z)
            else:
                torch.addmm(p.bias, a, p.weight_t, out=stage.z)
            if not stage.linear:
                stage.G_(stage.z, stage.a, *stage.parameters)
            scales.append(stage.draw())
            a = stage.a if scales[-1] is None else torch.mul(stage.a, scales[-1], out=stage.output)
        prediction = a if plan.prediction is None else plan.prediction.copy_(a)
        self._cost.both_(prediction, target, plan.delta, plan.work, plan.column, out)
        if plan.prediction is not None:
            stage.delta.copy_(plan.delta)
        first = self._first
        for layer in range(len(inputs) - 1, first - 1, -1):
            p, stage = self._parameters[layer], plan.stages[layer]
            if (scale := scales[layer]) is not None:
                stage.delta.mul_(scale)
            if not stage.linear:
                stage.delta_(stage.delta, stage.a, stage.saved_z, stage.work, stage.mask, *stage.parameters)
            if layer > first:
                torch.mm(stage.delta, p.weight, out=plan.stages[layer - 1].delta)
            self._write(p, stage, inputs[layer], plan, rates)

    def _round(self, plan: _Plan, input: Tensor) -> Tensor:
        """a^1; if mixed, it and all parameters rounded to compute_dtype."""
        if plan.input is None:
            return input
        for p in self._parameters:
            for copy, master in zip((p.weight, p.bias), p.master, strict=True):
                if copy is not None and master is not None:
                    copy.copy_(master)
        return plan.input.copy_(input)

    def _write(self, p: _Parameters, stage: _Stage, a: Tensor, plan: _Plan, rates: Rates) -> None:
        """Steps 4 and 5, w := βw + α ∂C/∂w, or step 4 alone, ∂C/∂w into its buffer."""
        weight, bias = p.gradient if rates is None else p.own
        beta, alpha = (0.0, 1.0) if rates is None else rates[p.groups[0]]
        if p.rounded is not None:
            torch.mm(stage.delta_t, a, out=p.rounded[0])
            torch.sum(stage.delta, 0, out=p.rounded[1])
            _add(weight, p.rounded[0], beta, alpha * plan.delta_weight)
        elif weight is not None:
            weight.addmm_(stage.delta_t, a, beta=beta, alpha=alpha * plan.delta_weight)
        if bias is None:
            return
        if rates is not None:
            beta, alpha = rates[p.groups[1]]
        if p.rounded is not None:
            _add(bias, p.rounded[1], beta, alpha * plan.delta_weight)
        else:
            bias.addmv_(stage.delta_t, plan.ones, beta=beta, alpha=alpha * plan.delta_weight)

    # -----------------------------------------------------------------------------------------------------------------
    # Parameters, optimizer and plans
    # -----------------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Reads the model and the optimizer, and checks that they belong together."""
        self._layers = layers_of(self.model)
        self._cost = cost_of(self.loss, self._layers)
        self._groups = self.optimizer.param_groups
        self._plans: dict[object, _Plan] = {}
        owned = [(layer.affine._parameters, name) for layer in self._layers for name in ("weight", "bias")]
        self._watched = [
            (of, name, parameter, parameter.data_ptr(), parameter.requires_grad)
            for of, name in owned
            if (parameter := of[name]) is not None
        ]
        self._modules = [(module, tuple(module._modules.values())) for module in sequences_of(self.model)]
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

    def _read(self, layer: Layer, group_of: dict[int, int]) -> _Parameters:
        """One layer's tensors, made outside inference mode: gradients and parameters are ordinary ones."""
        own = _trained(layer.weight), _trained(layer.bias)
        gradient = _like(own[0]), _like(own[1])
        groups = group_of.get(id(layer.weight), 0), group_of.get(id(layer.bias), 0)
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        master, rounded = (weight, bias), None
        if self.compute_dtype is not None:
            weight, bias = weight.to(self.compute_dtype), None if bias is None else bias.to(self.compute_dtype)
            rounded = (torch.empty_like(weight), weight.new_empty(len(weight)))
        return _Parameters(weight, weight.t(), bias, own, gradient, groups, master, rounded)

    def _check_parameters(self, group_of: dict[int, int]) -> None:
        parameters = [watched[2] for watched in self._watched]
        trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        first = parameters[0]
        if any(p.dtype != first.dtype or p.device != first.device or not p.is_floating_point() for p in parameters):
            raise InputError("expected parameters of one floating-point dtype on one device: call model.to() with both")
        if len({pointer for *_, pointer, _ in self._watched}) < len(parameters):
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

    def _planned(self, input: Tensor, target: Tensor) -> _Plan:
        """The plan for such a batch; made anew, with all checks, after anything it was made from has changed."""
        if self._changed():
            self._prepare()
        if torch.is_autocast_enabled(input.device.type):
            raise InputError("expected no autocast around the engine: it would not take part; use compute_dtype")
        kind = (input.shape, target.shape, input.dtype, target.dtype, input.device, target.device)
        plan = self._plans.get(kind)
        if plan is None:
            check_batch(self._layers, input, target, self.loss)
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[kind] = _Plan(self, len(input), input, target)
        return plan

    def _changed(self) -> bool:
        for of, name, parameter, pointer, trained in self._watched:
            same = of.get(name) is parameter and parameter.data_ptr() == pointer
            if not same or parameter.requires_grad is not trained:
                return True
        modules = any(tuple(module._modules.values()) != children for module, children in self._modules)
        return modules or self.optimizer.param_groups is not self._groups

    def _rates(self) -> Rates:
        """Of a plain SGD, w := (1 − LR λ) w − LR ∂C/∂w; None for anything more."""
        optimizer = self.optimizer
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if type(optimizer) is not torch.optim.SGD or self.max_grad_norm is not None or hooks:
            return None
        rates = []
        for group in optimizer.param_groups:
            lr = group["lr"]
            if group["momentum"] != 0 or group["maximize"] or not isinstance(lr, float | int):
                return None
            rates.append((1.0 - lr * group["weight_decay"], -lr))
        optimizer._opt_called = True  # type: ignore[attr-defined] # what a scheduler asks about
        return rates

    def _give_gradients(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def _step_optimizer(self) -> None:
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([parameter for parameter, _ in self._gradients], self.max_grad_norm)
        self.optimizer.step()

    def _check_labels(self, target: Tensor) -> None:
        classes = self._layers[-1].weight.shape[0]
        if self.loss == "cross_entropy" and target.dim() == 1 and len(target):
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= classes:
                raise InputError(
                    f"expected class labels from 0 to {classes - 1}; got labels from {low} to {high}: "
                    "renumber them, or leave out the rows to be ignored"
                )


def _trained(parameter: Tensor | None) -> Tensor | None:
    return parameter.detach() if parameter is not None and parameter.requires_grad else None


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)


def _add(to: Tensor | None, gradient: Tensor, beta: float, alpha: float) -> None:
    """to := β to + α gradient, of another dtype."""
    if to is not None:
        to.zero_() if beta == 0 else to.mul_(beta)
        to.add_(gradient, alpha=alpha)
