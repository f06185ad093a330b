"""The fast training engine: steps 1 to 5 without autograd, in buffers allocated once, in the model's own parameters.

Plain SGD is done by the matrix product of step 4 itself, W := βW + α δᵀa, after δ was taken through the old W. Every
other optimizer gets gradients in `.grad` and does its own `step()`.
"""

import inspect
import logging
import math
import threading
from bisect import bisect
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import checks, kernels
from manual_mlp.cuda_graph import Launch
from manual_mlp.errors import InputError
from manual_mlp.functional import autocasting
from manual_mlp.native.net import CantRun, NativeNet, gains
from manual_mlp.network import parameters_of, reading_of
from manual_mlp.plan import Plan, Sink, weigh
from manual_mlp.program import Drop, cost_of
from manual_mlp.snapshot import Training, hooks_of_parameter

_PLANS = 8  # batch shapes whose buffers are kept
_CHUNK = 1 << 18  # numbers that train_epoch gathers at once: 1 MB of float32 stays in the cache
_BATCHES = 256  # batches in it at most, because each is a view


# torch.inference_mode without its Python wrapper (1 µs per step).
inference = partial(getattr(torch._C, "_InferenceMode", torch.inference_mode), True)

log = logging.getLogger(__name__)

Rates = tuple[tuple[float, float], ...]
"""(β, α) of w := βw + α ∂C/∂w for each group of the optimizer; (), if the optimizer takes the step itself."""


class BoundPlan(Plan):
    """A plan whose calls are bound to the model's parameters, with the rows that `train_epoch` gathers.

    Buffers are made in inference mode, so that autograd keeps no books on them. On CUDA the calls are launched as one
    graph, which keeps addresses and numbers: so input and target are copied to memory that stays, and rates lie in
    tensors.
    """

    def __init__(self, engine: Any, input: Tensor, target: Tensor, nets: tuple[int, ...] = ()) -> None:
        self.engine, self.batches = engine, []  # type: ignore[var-annotated]
        self.bound_for: object = None
        graphed, dtype = engine._graphed, engine.compute_dtype
        self.rates_lie_in_tensors = graphed or nets != ()  # a graph would keep numbers; K nets have K rates
        with torch.inference_mode():
            super().__init__(engine._program, engine._cost, input, dtype, nets, engine.max_sample_norm)
            self.input = self.like.new_empty(*nets, *input.shape) if graphed or dtype is not None else None
            self.target = target.new_empty(*nets, *target.shape) if graphed else None
            self.rates = [(self.cost.new_empty(of), self.cost.new_empty(of)) for of in engine._shapes_of_rates]
        _, self.total_weight, _ = weigh(engine._cost, self.n, self.widths[-1], input.dtype)
        self.delta_weight = kernels.weights(engine._cost, self.n, self.widths[-1])[1]
        self.rounds_to = None if self.cost.dtype == input.dtype else input.dtype

    def gathered(self, input: Tensor, target: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows of `order`, which are whole batches, batch by batch."""
        if not self.batches:
            count = min(max(1, _CHUNK // (self.rows * max(1, input.shape[1]))), _BATCHES)
            with torch.inference_mode(False):  # Adam's steps fill it outside of inference mode
                self.chunk = [data.new_empty(count * self.rows, *data.shape[1:]) for data in (input, target)]
            batches = [data.view(count, *self.nets, self.n, *data.shape[1:]) for data in self.chunk]
            self.batches = list(zip(*batches, strict=True))
        for rows in order.split(len(self.batches) * self.rows):
            for data, chunk in zip((input, target), self.chunk, strict=True):
                torch.index_select(data, 0, rows, out=chunk[: len(rows)])
            yield from self.batches[: len(rows) // self.rows]

    def in_order(self, input: Tensor, target: Tensor, prediction: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows as they come, batch by batch. Whoever asks for the next one has run the last one."""
        for start in range(0, len(input), self.n):
            rows = slice(start, start + self.n)
            yield input[rows], target[rows]
            if prediction is not None:
                prediction[rows] = self.prediction

    def run(self, input: Tensor, target: Tensor, out: Tensor) -> None:
        """The five steps, in inference mode; out (1,) := C / total_weight."""
        if self.input is not None:
            self.input.copy_(input)
        if self.target is None:
            self.steps(input, target, out)
            return
        self.target.copy_(target)
        self.launch()
        out.copy_(self.out)

    def steps(self, input: Any, target: Tensor, out: Tensor) -> None:
        for call, fed in self.forward:
            call(input) if fed else call()
        self.both(self.prediction, target, out)
        for call, fed in self.backward:
            call(input) if fed else call()

    def bind(self, rates: Any) -> None:
        """Make the calls for these rates, unless they are there. For K nets they are lists of K numbers."""
        own, numbers = self.engine._detached, rates
        if self.rates_lie_in_tensors:
            numbers = tuple(beta != 1 for beta, _ in rates)
            with torch.inference_mode():
                for tensor, number in zip(chain(*self.rates), chain(*rates), strict=False):
                    if isinstance(number, tuple):
                        tensor.copy_(torch.tensor(number, dtype=torch.float64).view(tensor.shape))
                    else:
                        tensor.fill_(number)
        if self.bound_for == numbers:
            return
        self.bound_for = None  # until all of it is done
        with torch.inference_mode():
            read = [p if p is None or p.dtype == self.like.dtype else p.to(self.like.dtype) for p in own]
            sinks = [self._sink(place, rates) for place in range(len(own))]
            self.compile([0 if self.input is None else self.input, *read], [None, *sinks])
        copies = [(copy, p) for copy, p in zip(read, own, strict=True) if copy is not None and copy is not p]
        self.up[:0] = [(partial(copy.copy_, p), (), None) for copy, p in copies]
        # Pairs are what Python unpacks fastest: the call, and if it reads the moving input.
        self.forward = [(call, feeds != ()) for call, feeds, _ in self.up]
        self.backward = [(call, feeds != ()) for call, feeds, _ in self.down]
        self.bound_for = numbers
        if self.target is not None:
            self.launch = Launch(partial(self.steps, None, self.target, self.out), self.ones.device)

    def _sink(self, place: int, rates: Rates) -> Sink | None:
        """Return where step 4 of a parameter goes: None for a frozen or missing one."""
        engine, to = self.engine, self.engine._detached[place]
        if to is None or not engine._flat[place].requires_grad:
            return None
        if not rates:
            return Sink(engine._gradient(place), alpha=self.delta_weight)
        group = engine._group_of[place]
        beta, alpha = rates[group]
        if not self.rates_lie_in_tensors:
            return Sink(to, beta, alpha * self.delta_weight)
        decay, rate = self.rates[group]
        return Sink(to, 1.0, self.delta_weight, decay if beta != 1 else None, rate)


def refuse_autocast(input: Tensor) -> None:
    if autocasting(input):
        raise InputError(
            "the engine ignores autocast: leave its context, or pass compute_dtype=torch.bfloat16 to the engine"
        )


class BackpropEngine:
    """Trains `model` by the δ formulas, in place: no graph, and nothing allocated in a step but the cost it returns.

    model      an mm.MLP or nn.Sequential that `program.read` takes; its own parameters are trained
    optimizer  a torch.optim.SGD, Adam or AdamW over them; its param_groups are read at each step, its state is torch's
    loss       "quadratic", "mse", "bce" or "cross_entropy": the functions of `functional.COSTS` with their defaults
    max_grad_norm   clips the gradients, as torch.nn.utils.clip_grad_norm_
    compute_dtype   torch.bfloat16: products and activations in it; parameters, cost and update in float32
    native          train_epoch and train_batches in C, compiled once: "auto" where that is faster and possible, True
                    (with step) or False. `road` says what ran last. The roads' bits differ, by 1e-12 in float64
    max_sample_norm   clips the gradient of each sample's own cost, over all trained parameters, before their mean is
                      taken; max_grad_norm clips that mean, and weight decay and momentum come after both

    A plain SGD's step leaves .grad alone; otherwise .grad is filled, in tensors that the next step overwrites. Hooks on
    parameters and on the optimizer are called, as are a scheduler's. If threads share an engine, they take turns.
    Raises InputError for a model, optimizer, loss or batch that it can't train faithfully.

    >>> import torch, manual_mlp as mm
    >>> net = mm.MLP([2, 3, 1])
    >>> engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0))
    >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    >>> costs = [engine.step(x, target).item() for _ in range(500)]
    >>> costs[-1] < 0.1 * costs[0]
    True
    """

    _native: NativeNet | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: str = "quadratic",
        max_grad_norm: float | None = None,
        compute_dtype: torch.dtype | None = None,
        native: bool | str = "auto",
        max_sample_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss, self.native = model, optimizer, loss, native
        self.max_grad_norm, self.max_sample_norm, self.compute_dtype = max_grad_norm, max_sample_norm, compute_dtype
        self._road, self._said, self._graphed, self._turn = "torch", "", False, threading.RLock()
        self._prepare()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in inspect.signature(type(self)).parameters)

    @property
    def road(self) -> str:
        """Return the road of the last `train_epoch`, `train_batches` or native `step`: "native" or "torch".

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([2, 3, 1])
        >>> engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0), native=False)
        >>> _ = engine.train_epoch(torch.zeros(4, 2), torch.zeros(4, 1), batch_size=2)
        >>> engine.road
        'torch'
        """
        return self._road

    def __repr__(self) -> str:
        """Return the net, the optimizer with its rates, the cost, and the options that are not at their default."""
        sizes = "-".join(map(str, getattr(self.model, "sizes", ())))
        net = sizes or f"of {sum(p.numel() for p in self.model.parameters()):,} parameters"
        rates = ", ".join(dict.fromkeys(f"lr={group['lr']}" for group in self.optimizer.param_groups))
        _, _, *options = inspect.signature(type(self)).parameters.values()
        shown = [f"{o.name}={v!r}" for o in options if (v := getattr(self, o.name)) != o.default or o.name == "loss"]
        words = [f"{type(self.model).__name__} {net}", f"{type(self.optimizer).__name__}({rates})", *shown]
        return f"{type(self).__name__}({', '.join(words)})"

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """One training step: input (N, n_1), target (N, n_L) or class indices (N,) → C before the step, a scalar.

        It runs in C only with native=True, because the first call may build the code.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([2, 3, 1])
        >>> engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0))
        >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
        >>> before = mm.QuadraticLoss()(net(x), target)
        >>> torch.allclose(engine.step(x, target), before), bool(mm.QuadraticLoss()(net(x), target) < before)
        (True, True)
        """
        with self._turn:
            self._ask()
            if self.native and self.native != "auto":
                self._check(input, target)
                return self._train_rows(input, target, len(input), None, None)
            rates = self._rates()
            cost = self._pass(input, target, rates)
            if not rates:
                self._step_optimizer()
        return cost

    def compute_gradients(self, input: Tensor, target: Tensor) -> Tensor:
        """Steps 1 to 4: fills the parameters' .grad (it does not add to it) → C. Arguments as `step`.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([2, 3, 1])
        >>> engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0))
        >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
        >>> _ = engine.compute_gradients(x, target)
        >>> expected = torch.autograd.grad(mm.QuadraticLoss()(net(x), target), list(net.parameters()))
        >>> all(torch.allclose(p.grad, gradient) for p, gradient in zip(net.parameters(), expected))
        True
        """
        with self._turn:
            self._ask()
            return self._pass(input, target, ())

    @checks.rows_are_tensors
    def train_epoch(
        self, input: Tensor, target: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """One step for each batch of the rows in random order, the last one shorter if need be → mean C of all rows.

        The order is torch.randperm(N, generator=generator). Learning rates are read once, at the start.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([2, 3, 1])
        >>> engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0))
        >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
        >>> costs = [engine.train_epoch(x, target, batch_size=1).item() for _ in range(200)]  # two steps each
        >>> costs[-1] < 0.1 * costs[0]
        True
        """
        with self._turn:
            self._ask()
            self._check(input, target)
            order = checks.order(len(input), generator)
            return self._train_rows(input, target, batch_size, order.to(input.device), None)

    @checks.rows_are_tensors
    def train_batches(self, input: Tensor, target: Tensor, batch_size: int, prediction: Tensor | None = None) -> Tensor:
        """`train_epoch` on the rows in the order in which they come.

        prediction (N, n_L) is filled with a^L of each batch before its step.

        >>> import torch, manual_mlp as mm
        >>> net = mm.MLP([2, 3, 1])
        >>> engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=1.0))
        >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
        >>> first, prediction = net(x[:1]).item(), torch.empty(2, 1)
        >>> _ = engine.train_batches(x, target, batch_size=1, prediction=prediction)
        >>> abs(prediction[0].item() - first) < 1e-6  # what the net answered before the first of the two steps
        True
        """
        with self._turn:
            self._ask()
            self._check(input, target)
            if prediction is not None:
                checks.buffer(prediction, (len(input), self._outputs), input, target)
            return self._train_rows(input, target, batch_size, None, prediction)

    def _pass(self, input: Tensor, target: Tensor, rates: Rates) -> Tensor:
        """Steps 1 to 4, or to 5 given rates → C, an ordinary tensor."""
        plan = self._planned(input, target, rates)
        try:
            if bisect(self._memory, input.data_ptr()) % 2:
                input = input.clone()  # steps 4 and 5 would change it before they have read all of it
            with inference():
                plan.run(input, target, plan.out)
        except (AttributeError, IndexError, RuntimeError, TypeError):
            self._check(input, target)
            raise
        if not rates:
            self._give_gradients()
        cost = plan.cost * plan.total_weight
        return cost if plan.rounds_to is None else cost.to(plan.rounds_to)

    def _train_rows(
        self, input: Tensor, target: Tensor, batch_size: int, order: Tensor | None, prediction: Tensor | None
    ) -> Tensor:
        batch_size = checks.count("a batch_size", batch_size)
        self._check_own_memory(input, target, prediction)
        input, target = (x if type(x) is Tensor and not x.requires_grad else x.detach() for x in (input, target))
        native = self._natively(input, target, batch_size=batch_size)
        if native is not None:
            cost = self._train_natively(native, input, target, batch_size, order, prediction)
            return torch.tensor(cost, dtype=input.dtype, device=input.device)
        rates, whole = self._rates(), len(input) // batch_size * batch_size
        dtype = kernels.sum_dtype(input.dtype)
        costs = torch.empty(math.ceil(len(input) / batch_size), dtype=dtype, device=input.device)
        outs = costs.split(1)
        for n, of, out in ((batch_size, slice(whole), outs), (len(input) - whole, slice(whole, None), outs[-1:])):
            if n and len(input[of]):
                plan = self._planned(input[:n], target[:n], rates)
                if order is None:
                    batches = plan.in_order(input[of], target[of], None if prediction is None else prediction[of])
                else:
                    batches = plan.gathered(input, target, order[of])
                self._train(plan, zip(batches, out, strict=False), rates)
        mean = costs.sum() * kernels.weights(self._cost, len(input), self._outputs)[0]
        return mean if dtype == input.dtype else mean.to(input.dtype)

    def _natively(self, *data: Tensor, batch_size: int, gain: bool = True) -> NativeNet | None:
        """Return the net that takes these mini-batches in C, or None. Raises InputError if native=True can't be.

        gain: "auto" takes C only where that is faster, not wherever it can.
        """
        self._road = "torch"
        if not self.native or (gain and self.native == "auto" and not gains(self._widths, len(data[0]), batch_size)):
            return None
        refuse_autocast(data[0])
        try:
            net = self._covered(data)
        except CantRun as error:
            if self.native != "auto":
                raise InputError(f"expected a training that C covers; {error}: take native=False") from None
            if self._said != str(error):
                log.info("torch's road, not the native one: %s", error)
            self._said = str(error)
            return None
        self._road = "native"
        return net

    def _train_natively(self, net: NativeNet, *rows: Any) -> float:
        """Train on these rows, as NativeNet.train → their mean cost."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined] # what a scheduler asks about
        cost = net.train(*rows)
        if net.kind:
            self._give_gradients()
        return cost

    def _covered(self, data: Iterable[Tensor]) -> NativeNet:
        """Return the net for C with the rates of now. Raises CantRun."""
        if self._native is None:  # what changes these makes the engine prepare again
            reasons = (
                (self.max_grad_norm is not None, "max_grad_norm clips the gradients"),
                (self.max_sample_norm is not None, "max_sample_norm clips each sample's gradient"),
                (self.compute_dtype is not None, "compute_dtype is torch.bfloat16"),
                (self._graphed, "a step is one CUDA graph"),
                (not self._training.has_its_own_step(self.optimizer), "the optimizer's step is replaced"),
            )
            if found := [reason for wrong, reason in reasons if wrong]:
                raise CantRun(found[0])
            self._native = NativeNet(self._program, self._cost, self.optimizer)
        if self._training.hooks.any():
            raise CantRun("the optimizer or a parameter has a hook")
        if {*map(type, data)} != {Tensor}:
            raise CantRun("the data is of a class of its own")
        self._native.bind(self._gradient_of)
        return self._native

    def _train(self, plan: BoundPlan, batches: Iterable[tuple[tuple[Tensor, Tensor], Tensor]], rates: Rates) -> None:
        """Take a step for each (input, target), out; out := the cost, undivided."""
        if rates:
            run = plan.run
            with torch.inference_mode():
                for (input, target), out in batches:
                    run(input, target, out)
            return
        for (input, target), out in batches:
            with inference():
                plan.run(input, target, out)
            self._give_gradients()
            self._step_optimizer()

    # -----------------------------------------------------------------------------------------------------------------
    # What the engine was made from
    # -----------------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def _prepare(self) -> None:
        """Read the model and the optimizer, and check that they belong together."""
        self._stale = True  # after a refusal the next step asks again
        optimizer, clip = self.optimizer, self.max_grad_norm
        if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise InputError(f"expected a torch.optim.SGD, Adam or AdamW; got {type(optimizer).__name__}")
        if any(group["differentiable"] for group in optimizer.param_groups):
            raise InputError("expected an optimizer without differentiable=True, because the engine keeps no graph")
        if self.native not in ("auto", True, False):
            raise InputError(f'expected native to be "auto", True or False; got {self.native!r}')
        checks.positive("max_grad_norm", clip, optional=True)
        checks.positive("max_sample_norm", self.max_sample_norm, optional=True)
        self._reading, self._native = reading_of(self.model), None
        self._program = program = self._reading.program
        self._cost = cost_of(self.loss, program)
        self._plans: dict[object, BoundPlan] = {}
        self._gradients: dict[int, Tensor] = {}
        self._flat = parameters_of(self.model, program)
        self._places = [place for place, parameter in enumerate(self._flat) if parameter is not None]
        self._training = Training([program.sources[place] for place in self._places], optimizer)
        self._owned = self._training.owned
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._check_parameters(group_of)
        self._group_of = [group_of.get(id(parameter), 0) for parameter in self._flat]
        self._detached: list[Any] = [None if parameter is None else parameter.detach() for parameter in self._flat]
        self._shapes_of_rates: list[tuple[int, ...]] = [()] * len(optimizer.param_groups)
        self._outputs = len(self._flat[-2])
        self._widths = [self._owned[0].shape[1], *(len(owner.weight) for owner in self._program.affine)]
        self._graphed = self._graphed or self._owned[0].is_cuda  # on CUDA a step is one graph
        self._note_memory()
        # Step 4 does the update itself. A rate in a tensor of half precision would be rounded.
        rounded = self._graphed and self._owned[0].dtype in kernels.ROUNDED
        plain = type(optimizer) is torch.optim.SGD and self._training.has_its_own_step(optimizer)
        self._updates = plain and clip is None and not rounded
        self._stale = False

    def _check_parameters(self, group_of: dict[int, int]) -> None:
        owned, first = self._owned, self._owned[0]
        checks.trainable(owned)
        for parameter in owned:
            if (kind := type(parameter.detach())) is not Tensor:
                raise InputError(f"expected ordinary parameters; got a {kind.__name__}: train them by their layers")
        trained = {id(parameter) for parameter in owned if parameter.requires_grad}
        if any(p.dtype != first.dtype or p.device != first.device or not p.is_floating_point() for p in owned):
            raise InputError("expected parameters of one floating-point dtype on one device: call model.to() with both")
        for layer in self._program.affine:
            if layer.bias is not None and layer.bias.shape != layer.weight.shape[:1]:
                raise InputError(
                    f"expected a bias of shape {tuple(layer.weight.shape[:1])}, a number for each row of the weight; "
                    f"got {tuple(layer.bias.shape)} in {layer}: cut both alike"
                )
        if checks.share_memory(owned):
            raise InputError("expected layers with parameters of their own; got tied ones: train them by their layers")
        if self.compute_dtype is not None and (self.compute_dtype, first.dtype) != (torch.bfloat16, torch.float32):
            raise InputError(
                "expected a compute_dtype of torch.bfloat16 for float32 parameters, or None; "
                f"got {checks.brief(self.compute_dtype)} for {first.dtype}"
            )
        if not trained or not trained <= group_of.keys() or not group_of.keys() <= {id(p) for p in owned}:
            raise InputError(
                "expected an optimizer over the model's parameters, all that require a gradient and no others; "
                "got another set: make the optimizer after the model has its final parameters"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_"):
            super().__setattr__("_stale", True)

    def _ask(self) -> None:
        """Read model and optimizer again, if they are not what the plans were made from."""
        if self._stale or self._training.changed(self.optimizer) or self._reading.snapshot.changed(self.model):
            self._prepare()

    def _planned(self, input: Tensor, target: Tensor, rates: Rates) -> BoundPlan:
        """Return the plan for such a batch; a new one is checked."""
        try:
            refuse_autocast(input)
            key: object = input.shape, target.shape, target.dtype
        except (AttributeError, RuntimeError):  # no tensor, or a nested one, whose shape can't be asked
            checks.tensors(input=input, target=target)
            checks.dense(input=input, target=target)
            raise
        # torch notices a wrong dtype or device of the input before anything is written; a copy notices nothing.
        if self._graphed or self.compute_dtype is not None:
            key = key, input.dtype, input.device, target.device
        if self._program.has_dropout:
            key = key, tuple(node.rule.p for node in self._program.nodes if isinstance(node.rule, Drop))
        plan = self._plans.get(key)
        if plan is None:
            self._check(input, target)
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[key] = BoundPlan(self, input, target)
        if plan.bound_for != rates:  # asked here, too: the call takes 1 µs
            plan.bind(rates)
        return plan

    def _check_own_memory(self, *tensors: Tensor | None) -> None:
        if any(tensor is not None and bisect(self._memory, tensor.data_ptr()) % 2 for tensor in tensors):
            raise InputError(
                "expected rows with memory of their own; they share that of a parameter or its .grad: .clone() them"
            )

    def _check(self, input: Tensor, target: Tensor) -> None:
        """Raise InputError for a batch that does not fit, or is empty, or has labels out of range."""
        checks.full_batch(self._owned[0], self._outputs, input, target, self.loss)

    # -----------------------------------------------------------------------------------------------------------------
    # Step 5
    # -----------------------------------------------------------------------------------------------------------------

    def _rates(self) -> Rates:
        """Return (β, α) for each group of a plain SGD: w := (1 − LR λ) w − LR ∂C/∂w."""
        optimizer = self.optimizer
        if not self._updates or self._training.hooks.any():  # a hook needs the gradient itself
            return ()
        rates = []
        for group in optimizer.param_groups:
            lr = group["lr"]
            if group["momentum"] != 0 or group["maximize"] or not isinstance(lr, (float, int)):
                return ()
            rates.append((1.0 - lr * group["weight_decay"], -lr))
        optimizer._opt_called = True  # type: ignore[attr-defined] # what a scheduler asks about
        return tuple(rates)

    def _gradient_of(self, parameter: Tensor) -> Tensor:
        return self._gradient(next(place for place, own in enumerate(self._flat) if own is parameter))

    def _gradient(self, place: int) -> Tensor:
        """Return the tensor that becomes the .grad of a parameter; plain SGD needs none."""
        if place not in self._gradients:
            with torch.inference_mode(False):
                self._gradients[place] = torch.empty_like(self._detached[place])
            self._note_memory()
        return self._gradients[place]

    def _note_memory(self) -> None:
        """Note where the memory of the parameters and their gradients begins and ends, in turn.

        An address lies in it if an odd number of these lie at or before it.
        """
        storages = [tensor.untyped_storage() for tensor in (*self._owned, *self._gradients.values())]
        self._memory: list[int] = []
        for start, end in sorted((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages):
            if self._memory and start <= self._memory[-1]:  # of one storage, or of two that touch
                self._memory[-1] = max(self._memory[-1], end)
            else:
                self._memory += start, end

    def _give_gradients(self) -> None:
        """Fill .grad, and call the hooks that autograd would call."""
        for parameter, place in zip(self._owned, self._places, strict=True):
            if not parameter.requires_grad:
                parameter.grad = None  # or the optimizer would go on with what lies there
                continue
            gradient, (before, after) = self._gradients[place], hooks_of_parameter(parameter)
            for hook in before:
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
            parameter.grad = gradient
            for hook in after:
                hook(parameter)

    def _step_optimizer(self) -> None:
        if self.max_grad_norm is not None:
            trained = [parameter for parameter in self._owned if parameter.requires_grad]
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        self.optimizer.step()
