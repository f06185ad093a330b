"""Train many nets at once: K nets of one shape are one more leading dimension of the engine's plan.

Small nets leave torch's products nearly empty: the calls take longer than the arithmetic. With K nets, each call does
the work of K. The parameters of all nets are copied into tensors (K, n_out, n_in) when an epoch begins, and back when
it ends, so each model keeps its own memory. If the optimizers are more than plain SGD, they take each step themselves.
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from manual_mlp import checks, kernels
from manual_mlp.engine import BackpropEngine, BoundPlan, inference, refuse_autocast
from manual_mlp.errors import InputError
from manual_mlp.formulas import committee
from manual_mlp.modules import MLP, fill
from manual_mlp.program import Activate, Drop

_PLANS = 8  # batch shapes whose buffers are kept
NO_GAIN = "native=auto takes C only from four mini-batches a call on, for small nets"


class EnsembleEngine:
    """Trains K nets at once on the same rows: `BackpropEngine` with one more dimension.

    models      K nets, as BackpropEngine takes them
    optimizers  an optimizer for each; rates, decay and state are each optimizer's own
    loss        as BackpropEngine's, the same for all
    native      as BackpropEngine's: in C one net follows another, in as many threads as torch.get_num_threads()

    On torch's road all nets share each product: they need the same layers and sizes, and one class of optimizer. In C
    they may differ in all but what the data demand, and "auto" takes them there wherever C covers them.

    It equals K engines that train one after another: it honours and refuses what they do. Dropout draws other masks
    than K engines would, and on torch's road all fill .grad if one does. Raises InputError for what an engine refuses.

    >>> import torch, manual_mlp as mm
    >>> nets = [mm.MLP([2, 3, 1]) for _ in range(3)]
    >>> optimizers = [torch.optim.SGD(net.parameters(), lr=lr) for net, lr in zip(nets, (0.0, 1.0, 5.0))]
    >>> engine = mm.EnsembleEngine(nets, optimizers)
    >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    >>> costs = torch.stack([engine.train_epoch(x, target, batch_size=1) for _ in range(200)])  # (epochs, nets)
    >>> (costs[-1] < 0.1 * costs[0]).tolist()  # the first net has LR 0
    [False, True, True]
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        loss: str = "quadratic",
        native: bool | str = "auto",
    ) -> None:
        models, optimizers = list(models), list(optimizers)
        if not models or len(models) != len(optimizers):
            raise InputError(
                f"expected at least one model, and an optimizer for each; got {len(models)} models and "
                f"{len(optimizers)} optimizers"
            )
        pairs = zip(models, optimizers, strict=True)
        self._engines = [BackpropEngine(*pair, loss, native=native) for pair in pairs]
        self._k, self._turn = len(models), threading.RLock()
        self._seen: list[Any] = []
        self._ask()

    @property
    def models(self) -> list[nn.Module]:
        """Return the nets, in their order.

        >>> import torch, manual_mlp as mm
        >>> nets = [mm.MLP([2, 3, 1]) for _ in range(3)]
        >>> engine = mm.EnsembleEngine(nets, [torch.optim.SGD(net.parameters(), lr=1.0) for net in nets])
        >>> engine.models == nets
        True
        """
        return [engine.model for engine in self._engines]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizer of each net.

        >>> import torch, manual_mlp as mm
        >>> nets = [mm.MLP([2, 3, 1]) for _ in range(3)]
        >>> engine = mm.EnsembleEngine(nets, [torch.optim.SGD(net.parameters(), lr=1.0) for net in nets])
        >>> [optimizer.param_groups[0]["lr"] for optimizer in engine.optimizers]
        [1.0, 1.0, 1.0]
        """
        return [engine.optimizer for engine in self._engines]

    @property
    def loss(self) -> str:
        """Return the name of the cost that all nets share.

        >>> import torch, manual_mlp as mm
        >>> nets = [mm.MLP([2, 3, 1]) for _ in range(3)]
        >>> engine = mm.EnsembleEngine(nets, [torch.optim.SGD(net.parameters(), lr=1.0) for net in nets])
        >>> engine.loss
        'quadratic'
        """
        return self._engines[0].loss

    @property
    def native(self) -> bool | str:
        """Return "auto", True or False, as given; it can be set.

        >>> import torch, manual_mlp as mm
        >>> nets = [mm.MLP([2, 3, 1]) for _ in range(3)]
        >>> engine = mm.EnsembleEngine(nets, [torch.optim.SGD(net.parameters(), lr=1.0) for net in nets])
        >>> engine.native = False
        >>> _ = engine.train_epoch(torch.zeros(4, 2), torch.zeros(4, 1), batch_size=2)
        >>> engine.native, engine.road
        (False, 'torch')
        """
        return self._engines[0].native

    @native.setter
    def native(self, native: bool | str) -> None:
        for engine in self._engines:
            engine.native = native

    @property
    def road(self) -> str:
        """Return the road that the last `train_epoch` took, "native" or "torch".

        >>> import torch, manual_mlp as mm
        >>> nets = [mm.MLP([2, 3, 1]) for _ in range(2)]
        >>> engine = mm.EnsembleEngine(nets, [torch.optim.SGD(net.parameters(), lr=1.0) for net in nets], native=False)
        >>> _ = engine.train_epoch(torch.zeros(4, 2), torch.zeros(4, 1), batch_size=2)
        >>> engine.road
        'torch'
        """
        return "native" if all(engine.road == "native" for engine in self._engines) else "torch"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.models, self.optimizers, self.loss, self.native)

    @checks.rows_are_tensors
    def train_epoch(
        self,
        input: Tensor,
        target: Tensor,
        batch_size: int,
        generators: Sequence[torch.Generator] | None = None,
        prediction: Tensor | None = None,
    ) -> Tensor:
        """One step of each net for each batch, each net in a random order of its own → mean C of all rows, (K,).

        Net k takes the rows in the order torch.randperm(N, generator=generators[k]); without generators torch's default
        one draws K orders. prediction (K, N, n_L) is filled with a^L of each row before its step. Otherwise as
        `BackpropEngine.train_epoch`.

        >>> import torch, manual_mlp as mm
        >>> nets = [mm.MLP([2, 3, 1]) for _ in range(3)]
        >>> optimizers = [torch.optim.SGD(net.parameters(), lr=lr) for net, lr in zip(nets, (0.0, 1.0, 5.0))]
        >>> engine = mm.EnsembleEngine(nets, optimizers)
        >>> x, target = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
        >>> prediction = torch.empty(3, 2, 1)
        >>> engine.train_epoch(x, target, batch_size=2, prediction=prediction).shape
        torch.Size([3])
        >>> torch.allclose(prediction[0], nets[0](x))  # before the step, which LR 0 has not changed
        True
        """
        with self._turn:
            self._ask()
            self._check(input, target, generators, prediction)
            batch_size = checks.count("a batch_size", batch_size)
            input, target = input.detach(), target.detach()
            # In C one net is worth a call where torch's road can't take all at once.
            native = all(
                engine._natively(input, target, batch_size=batch_size, gain=not self._unlike)
                for engine in self._engines
            )
            if not native:
                self._prepare()
            given = list(generators or [None] * self._k)  # type: ignore[list-item]
            orders = torch.stack([checks.order(len(input), generator) for generator in given])
            if native:
                return self._train_natively(input, target, batch_size, orders, prediction)
            whole = len(input) // batch_size * batch_size
            costs = [
                self._train_rows(input, target, n, orders[:, of].to(input.device), prediction)
                for n, of in ((batch_size, slice(whole)), (len(input) - whole, slice(whole, None)))
                if n and len(input[of])
            ]
            weight, _ = kernels.weights(self._cost, len(input), self._outputs)
            return (torch.cat(costs).sum(0) * weight).to(input.dtype)

    def _train_natively(self, input: Tensor, target: Tensor, n: int, orders: Tensor, prediction: Any) -> Tensor:
        """Train one net after another, which keeps each in the cache → their mean costs (K,)."""
        nets: list[Any] = [engine._native for engine in self._engines]

        def train(k: int) -> float:
            into = None if prediction is None else prediction[k]
            return self._engines[k]._train_natively(nets[k], input, target, n, orders[k], into)

        if (threads := min(self._k, torch.get_num_threads())) == 1:
            costs = [*map(train, range(self._k))]
        else:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    costs = [*pool.map(train, range(self._k))]
                except BaseException:  # Ctrl-C is heard here, while the threads train
                    pool.shutdown(wait=False, cancel_futures=True)
                    for net in nets:
                        net.stopped = True
                    raise
        return torch.tensor(costs, dtype=input.dtype, device=input.device)

    def _train_rows(self, input: Tensor, target: Tensor, n: int, orders: Tensor, prediction: Tensor | None) -> Tensor:
        """Train on whole batches of n rows, in the orders (K, rows) → the undivided costs (batches, K)."""
        by_batch = orders.view(self._k, -1, n).transpose(0, 1)  # (batches, K, n)
        costs = torch.empty(by_batch.shape[:2], dtype=kernels.sum_dtype(input.dtype), device=input.device)
        rates = self._rates()
        plan = self._planned(input[:n], target[:n], rates)
        self._load()
        try:
            batches = plan.gathered(input, target, by_batch.reshape(-1))
            for (x, y), out, rows in zip(batches, costs, by_batch, strict=True):
                with inference():
                    plan.run(x, y, out)
                    if prediction is not None:
                        prediction.scatter_(1, rows.unsqueeze(-1).expand_as(plan.prediction), plan.prediction)
                if not rates:
                    self._step_optimizers()
        finally:
            if rates:
                self._store()
        return costs

    # -----------------------------------------------------------------------------------------------------------------
    # What the ensemble was made from
    # -----------------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Let each engine ask whether its net has changed; compare the nets again if one has."""
        for engine in self._engines:
            engine._ask()
        seen = [engine._training for engine in self._engines]
        if seen != self._seen:  # another object for each net that was read again
            self._seen, self._stacked = [], False
            self._compare()
            if not self.native:
                self._prepare()
            self._seen = seen

    @torch.inference_mode(False)
    def _prepare(self) -> None:
        """Stack the nets, unless they are stacked. Raises InputError for nets that can't share a product."""
        if self._stacked:
            return
        if self._unlike:
            raise InputError(f"expected nets and optimizers of one kind, to share each product; got {self._unlike}")
        first = self._engines[0]
        if first._owned[0].dtype == torch.float16:
            raise InputError("expected nets in float32, float64 or bfloat16; got float16: call .float() on each")
        self._outputs, self._graphed = first._outputs, first._graphed
        self.compute_dtype = self.max_sample_norm = None
        self._program, self._cost, self._flat = first._program, first._cost, first._flat
        self._plans: dict[object, BoundPlan] = {}
        self._detached: list[Any] = [None if p is None else p.new_empty(self._k, *p.shape) for p in first._detached]
        self._gradients: dict[int, Tensor] = {}
        # Each parameter is a group of its own: the K optimizers may group theirs differently.
        self._group_of = range(len(self._detached))
        self._shapes_of_rates = [(self._k, *[1] * (1 if p is None else p.dim())) for p in first._detached]
        self._stacked = True

    def _compare(self) -> None:
        """Note how the nets differ. Raises InputError for nets that would train the same parameter."""
        if checks.share_memory(parameter for engine in self._engines for parameter in engine._owned):
            raise InputError("expected nets with parameters of their own; got the same in two: copy.deepcopy one")
        first, *others = map(_form, self._engines)
        self._unlike = next(
            (
                f"another {what} in net {k} than in net 0: train it by an engine of its own, or all in C "
                "(native=True says what stands against it)"
                for k, form in enumerate(others, start=1)
                for what in form
                if form[what] != first[what]
            ),
            "",
        )

    def _check(self, input: Any, target: Any, generators: Any, prediction: Any) -> None:
        for k, engine in enumerate(self._engines if self._unlike else self._engines[:1]):
            try:
                engine._check(input, target)
            except InputError as error:
                raise InputError(f"net {k}: {error}" if self._unlike else str(error)) from None
        if generators is not None and (not isinstance(generators, Sequence) or len(generators) != self._k):
            came = len(generators) if isinstance(generators, Sequence) else type(generators).__name__
            raise InputError(f"expected {self._k} generators, one for each net; got {came}")
        for engine in self._engines:
            if prediction is not None:
                checks.buffer(prediction, (self._k, len(input), engine._outputs), input, target)
            engine._check_own_memory(input, target, prediction)

    def _planned(self, input: Tensor, target: Tensor, rates: Any) -> BoundPlan:
        """Return the plan for K such batches."""
        refuse_autocast(input)
        dropouts = {tuple(rule.p for rule, _, _ in e._program.nodes if isinstance(rule, Drop)) for e in self._engines}
        if len(dropouts) > 1:
            raise InputError("expected nets with the same dropouts; got several: set p, .train() and .eval() alike")
        key = len(input), target.shape, target.dtype, *dropouts
        if key not in self._plans:
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = BoundPlan(self, input, target, (self._k,))
        self._plans[key].bind(rates)
        return self._plans[key]

    # -----------------------------------------------------------------------------------------------------------------
    # Parameters, gradients and step 5
    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _load(self) -> None:
        """Copy the parameters of the nets into the stacks."""
        for place, stack in enumerate(self._detached):
            if stack is not None:
                torch.stack([engine._detached[place] for engine in self._engines], out=stack)

    @torch.no_grad()
    def _store(self) -> None:
        """Copy the stacks into the parameters, those that are trained."""
        for place, parameter in enumerate(self._flat):
            if parameter is not None and parameter.requires_grad:
                own = [engine._flat[place] for engine in self._engines]
                torch._foreach_copy_(own, list(self._detached[place].unbind()))

    def _gradient(self, place: int) -> Tensor:
        """Return the stack whose slices become the .grad of a parameter of each net."""
        if place not in self._gradients:
            with torch.inference_mode(False):
                self._gradients[place] = torch.empty_like(self._detached[place])
            for engine, gradient in zip(self._engines, self._gradients[place], strict=True):
                engine._gradients[place] = gradient
                engine._note_memory()
        return self._gradients[place]

    def _rates(self) -> tuple[Any, ...]:
        """Return (β, α) for each parameter, a number for each net; (), if an optimizer takes the step itself."""
        of_nets = [engine._rates() for engine in self._engines]
        if not all(of_nets):
            return ()
        pairs = []
        for place in range(len(self._flat)):
            groups = [engine._group_of[place] for engine in self._engines]
            betas, alphas = zip(*(rates[group] for rates, group in zip(of_nets, groups, strict=True)), strict=True)
            pairs.append((1.0 if set(betas) == {1.0} else betas, alphas))
        return tuple(pairs)

    def _step_optimizers(self) -> None:
        for engine in self._engines:
            engine._give_gradients()
            engine._step_optimizer()
        self._load()


def _form(engine: BackpropEngine) -> dict[str, Any]:
    """Return all in which the nets must agree, by its name."""
    flat = engine._flat
    return {
        "list of layers": [
            (type(rule), reads, (rule.row.name, rule.row.values) if isinstance(rule, Activate) else None)
            for rule, reads, _ in engine._program.nodes
        ],
        "list of sizes": [None if p is None else p.shape for p in flat],
        "dtype or device": (engine._owned[0].dtype, engine._owned[0].device),
        "set of frozen parameters": [p is not None and p.requires_grad for p in flat],
        "class of optimizer": type(engine.optimizer),
    }


def why_torch(engine: BackpropEngine | EnsembleEngine, rows: int, batch_size: int) -> str:
    """Return why calls of so many rows take torch's road; nothing if they run in C, which is compiled now.

    Raises InputError if native=True can't be.
    """
    if not engine.native:
        return "native is false"
    for each in engine._engines if isinstance(engine, EnsembleEngine) else [engine]:
        with each._turn:
            each._ask()
            if each._natively(torch.empty(1).expand(rows), batch_size=batch_size) is None:
                return each._said or NO_GAIN
    return ""


class Members(nn.ModuleList):
    """features (N, n_1) ↦ the committee's prediction (N, n_L): the mean of P(class | x), or of the numbers.

    Beside the nets it holds the parameters of each at its best epoch by validation cost. In training the nets go on.

    kept        (K, number of parameters), each row as torch.nn.utils.parameters_to_vector lays them out
    kept_cost   (K,), infinite before the first validation
    kept_epoch  (K,), counted from 0
    """

    kept: Tensor
    kept_cost: Tensor
    kept_epoch: Tensor

    def __init__(self, nets: Sequence[MLP], loss: str, classes: bool) -> None:
        super().__init__(nets)
        self.loss, self.classes = loss, classes
        self.register_buffer("kept", torch.stack([parameters_to_vector(net.parameters()).detach() for net in nets]))
        self.register_buffer("kept_cost", self.kept.new_full((len(nets),), math.inf))
        self.register_buffer("kept_epoch", self.kept.new_zeros(len(nets)))

    def forward(self, features: Tensor) -> Tensor:
        return self.together(self.each(features))

    def each(self, features: Tensor) -> Tensor:
        """Return a^L of each net, (K, N, n_L)."""
        return torch.stack([net(features) for net in self])

    def together(self, predictions: Tensor) -> Tensor:
        """Return the committee's prediction for those of its members, (K, N, n_L) → (N, n_L)."""
        return committee(predictions, self.loss) if self.classes else predictions.mean(0)

    @torch.no_grad()
    def keep(self, costs: Tensor, epoch: int) -> None:
        """Keep the nets whose validation costs (K,) are their lowest ones."""
        for k in (costs < self.kept_cost).nonzero()[:, 0].tolist():
            self.kept[k] = parameters_to_vector(self[k].parameters())
            self.kept_cost[k], self.kept_epoch[k] = costs[k], epoch

    @torch.no_grad()
    def take_kept(self) -> None:
        """Give each net the parameters of its best epoch, if there was one."""
        for net, kept, cost in zip(self, self.kept, self.kept_cost, strict=True):
            if cost.isfinite():
                fill(net, kept)

    def best_epochs(self) -> str:
        """Return the epochs of the kept parameters, in words."""
        first, last = (f"{end.item():g}" for end in self.kept_epoch.aminmax())
        return first if first == last else f"{first} to {last}"
