"""Strategies of training: the same net, cost and data, differentiated and updated in several ways.

`backprop` chooses between four; a threshold neuron has its own. A strategy makes the net and, in training, the cost and
the prediction of each batch. Validation and test call the net itself, whatever the strategy.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from manual_mlp import functional
from manual_mlp.engine import BackpropEngine
from manual_mlp.ensemble import NO_GAIN, EnsembleEngine, Members, why_torch
from manual_mlp.errors import InputError
from manual_mlp.lenet import net_of
from manual_mlp.native.net import FEWEST
from manual_mlp.network import cost_and_prediction
from manual_mlp.perceptron import Perceptron
from manual_mlp.program import Program, read
from manual_mlp.tracing import up
from manual_mlp.training.data import DataModule

MOST_MEMBERS = 256
MOST_BATCHES = 128  # in a training step of the engine: enough to share Lightning's cost for a step;
MOST_NUMBERS = 1 << 20  # the 4 MB of their inputs stay in the cache,
MOST_PRODUCTS = 1 << 28  # and the progress bar moves several times a second
PARTS = 20  # of an epoch in C, at least as many as it has training steps, and so records of δ
PRECISIONS = {"32-true": None, "64-true": None, "bf16-true": None, "bf16-mixed": torch.bfloat16}  # to compute_dtype
INITIALISATIONS: dict[str, Callable[[Tensor], object]] = {
    "torch": lambda parameter: None,  # the layers have done it
    # weights uniform with variance 2 / (fan in + fan out), biases 0
    "glorot": lambda parameter: (nn.init.xavier_uniform_ if parameter.ndim > 1 else nn.init.zeros_)(parameter),
    "nielsen": nn.init.normal_,  # weights and biases from N(0, 1)
}


def choose(name: str, known: Mapping[str, Any], option: str) -> Any:
    """Return known[name], or raise an InputError that lists what is known."""
    if name not in known:
        raise InputError(f"expected {option} to be one of {', '.join(known)}, but got {name!r}; correct it")
    return known[name]


@torch.no_grad()
def where_it_began(program: Program, features: Tensor) -> str:
    """Return the first of what a pass computes that is not finite, in the sheet's letters; else what grows the most.

    The step before goes from right to left, as δ does, so the rightmost W^l that is not finite became so first. If all
    W^l are finite, the forward pass is followed from left to right.
    """
    for index, layer in reversed(program.layers.items()):
        if layer.weight is not None and not _finite(layer.weight, layer.bias):
            n_out, *n_in = layer.weight.shape
            size = f"{n_in[0]} to {n_out} neurons" if layer.rule == "affine" else layer.rule
            return f"W{up(index - 1)} ({size}), by the step before: δ{up(index)} overflowed"
    slots = program.forward([features, *program.parameters(), *program.draw(features, drops=False)], every=True)
    outs, growths = {1: features}, []
    for index, layer in program.layers.items():
        z, a, largest = slots[layer.z], slots[layer.a], max(outs[read].abs().max().item() for read in layer.reads)
        neurons = f"(n = {z.shape[1]}, {layer.row.name})"  # of a grid the channels
        if not _finite(z, a):
            return f"{'a' if _finite(z) else 'z'}{up(index)} {neurons}"
        reached = z.abs().max().item()
        where = f"z{up(index)} {neurons}: it reaches {reached:.1e} from an a{up(max(layer.reads))} of {largest:.1e}"
        growths.append((reached / max(largest, 1.0), where))
        outs[index] = slots[layer.out]
    return max(growths)[1]


def _finite(*tensors: Tensor | None) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)


def _within(first: int, last: int) -> str:
    batches = f"mini-batch {last}" if first == last else f"mini-batches {first} to {last}"
    return f"{batches} (backprop=layers trainer.accelerator=cpu names the layer)"


class ByLayers:
    """Derivatives by hand, in a Function for each layer. Autograd joins them, the optimizer takes the step.

    options: the hyper-parameters of the module.
    """

    costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = functional.COSTS
    trainer: Any = None
    native: bool | str = "auto"  # as BackpropEngine's
    began: str | None = None  # the road in the checkpoint that the training goes on from
    road: str | None = None  # the one of this training, "native" or "torch"; only the engine has two
    optimizer: Any = None
    weighted: ClassVar[Sequence[str]] = ("quadratic", "bce", "cross_entropy")  # costs that take (1/N) Σ w_n C_n

    def __init__(self, options: MutableMapping[str, Any]) -> None:
        self.options, self.loss = options, options["loss"]
        self.sizes = [options["input_size"], *options["hidden"], options["output_size"]]
        self.cost = choose(self.loss, self.costs, "model.loss")

    def make_net(self) -> Any:
        """Return the net, its parameters initialised."""
        initialise = choose(self.options["initialisation"], INITIALISATIONS, "model.initialisation")
        net = net_of(self.options)
        for layer in net.modules():  # norms keep γ = 1 and β = 0
            for parameter in layer.parameters(recurse=False) if not isinstance(layer, _BatchNorm) else ():
                initialise(parameter)
        return net

    def check(self, trainer: L.Trainer) -> None:
        """Raise InputError for options that can't be honoured, before other processes are started."""
        if self.options["batch_norm"]:
            _check_alone(trainer, "model.batch_norm=true")

    def check_weights(self) -> None:
        """Raise InputError if rows can't have weights."""
        if self.loss not in self.weighted:
            known = " or ".join(self.weighted)
            fix = " or take backprop=layers" if self.loss in ByLayers.weighted else ""
            wanted = f"expected model.loss={known} for weighted rows under backprop={self.options['backprop']}"
            raise InputError(f"{wanted}, but got {self.loss}; change it{fix}")

    def begin(self, net: nn.Module, optimizer: Optimizer) -> None:
        """Check once more, for callers that have not; keep what `train` needs. The module has set `trainer` before."""
        self.optimizer = optimizer
        if self.trainer is not None:  # without one, `configure_optimizers` was called by itself
            self.check(self.trainer)

    def choose_road(self) -> None:
        """Choose the road of the training that begins now, once: its bits follow from it."""

    def end(self) -> None:
        """Drop what can't be copied with the module."""
        self.trainer = self.optimizer = None

    def batches_per_step(self, net: nn.Module, trainer: L.Trainer, batch_size: int) -> int:
        """Return how many mini-batches of so many rows `train` gets at once."""
        return 1

    def train(self, net: nn.Module, features: Tensor, target: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, n_1), target as the cost takes it, weight (N,) → C with its history, and a^L (N, n_L)."""
        prediction = net(features)
        weights = (each.to(prediction).unsqueeze(-1).expand_as(prediction) for each in weight)
        return self.cost(prediction, target, *weights), prediction

    def evaluate(self, net: nn.Module, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return C and a^L of a batch in validation and test, whatever `train` does."""
        return ByLayers.train(self, net, features, target)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        loss.backward(*arguments, **options)

    def place(self, net: nn.Module, features: Tensor, step: int, looked_back: int) -> str:
        """Return the place where a loss diverged: step and layer if every step is looked at, else the mini-batches.

        net: as it was before training step `step`, with the rows `features`. looked_back: steps since the last look.
        """
        if looked_back == 1:
            return f"step {step}, and it began in {where_it_began(read(net, grids=True), features)}"
        return _within(max(0, step + 1 - looked_back), step)


class ByNetwork(ByLayers):
    """Net and cost as one Function, with gradients by the δ recursion. The optimizer takes the step."""

    weighted = ("cross_entropy",)  # in its target

    def train(self, net: nn.Module, features: Tensor, target: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        return cost_and_prediction(net, features, target, self.loss)


class ByEngine(ByLayers):
    """`BackpropEngine`: no graph, and several mini-batches in a training step, because Lightning's step is expensive.

    Lightning calls optimizer.step(closure) once for a training step, and the closure `train`, which updates the
    parameters. Lightning then sets the gradients to None, `backward` does nothing, and the optimizer finds nothing left
    to do: the step is counted, with all that Lightning makes of it, and nothing is updated twice. (Lightning's manual
    optimization would do the same, but refuses clipping, and leaves schedules and their monitors to the module.)
    """

    weighted = ("cross_entropy",)
    nets: tuple[int, ...] = ()
    engine: Any = None
    several = size = 1  # mini-batches in a training step, rows in a mini-batch
    every = 20  # mini-batches between two looks of a callback at the net

    def check(self, trainer: L.Trainer) -> None:
        _check_alone(trainer, "backprop=engine", ", or take backprop=network")
        rules = [f"model.{name}={self.options[name]}" for name in ("batch_norm", "channels") if self.options[name]]
        odd, precisions = trainer.precision not in PRECISIONS, f"trainer.precision to be one of {', '.join(PRECISIONS)}"
        by_value = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
        clipping = by_value and "trainer.gradient_clip_algorithm=value"
        batches = trainer.accumulate_grad_batches if trainer.accumulate_grad_batches != 1 else 0
        for got, wanted, reason, fix in (
            (" ".join(rules), "affine maps and activations alone", "which knows no other rules", "leave it out"),
            (odd and trainer.precision, precisions, "which computes in these", "choose one of them"),
            (clipping, "gradients to be clipped by their norm", "which knows no other way", "leave it out"),
            (batches, "trainer.accumulate_grad_batches=1", "whose every mini-batch is a step", "raise data.batch_size"),
            (self.options["l1"], "model.l1=0", "which takes the step of the cost alone", "leave it out"),
        ):
            if got:
                wanted = f"expected {wanted} for backprop=engine, {reason}"
                raise InputError(f"{wanted}, but got {got}; {fix}, or take backprop=network")

    def begin(self, net: nn.Module, optimizer: Optimizer) -> None:
        super().begin(net, optimizer)
        clip, compute_dtype = self.trainer.gradient_clip_val or None, PRECISIONS[self.trainer.precision]
        try:
            self.engine = BackpropEngine(net, optimizer, self.loss, clip, compute_dtype, self.native)
        except InputError as error:
            raise InputError(f"{error}; or take backprop=network") from None

    def choose_road(self) -> None:
        """Take C where the options say so and it can be; from a checkpoint the road that it began on, or none.

        A checkpoint that says native asks for no build which the options alone would not.
        """
        reason = self._why_torch()
        self.road = "torch" if reason else "native"
        if self.began not in (None, self.road):
            fix = "set native=true" if self.native == "auto" else "leave out native"
            if self.native == "auto" and reason != NO_GAIN:
                fix = "start a new run without ckpt_path, or take backprop=network"
            raise InputError(
                f"expected the {self.began} road, on which the run began, but {reason or 'native is true'}; {fix}"
            )

    def _why_torch(self) -> str:
        """Set the engine on its road → why that is torch's; nothing if it is C, which is compiled now."""
        size, rows = self._sizes()
        count = size if self._schedules() else min(self.several * size, rows)
        began_there = self.began == "torch" and self.native is not True
        self.engine.native = self.native
        reason = "the training began there" if began_there else why_torch(self.engine, count, size)
        self.engine.native = not reason
        return reason

    def _sizes(self) -> tuple[int, int]:
        """Return the rows of a mini-batch and of an epoch, as far as they are known."""
        data = self.trainer.datamodule
        return (data.batch_size, len(data.splits["train"])) if isinstance(data, DataModule) else (1, 1)

    def _schedules(self) -> list[Any]:
        """Return what lowers LR after each mini-batch."""
        return [c for c in self.trainer.lr_scheduler_configs if c.interval == "step" and not c.reduce_on_plateau]

    def end(self) -> None:
        super().end()
        self.engine = None

    def batches_per_step(self, net: nn.Module, trainer: L.Trainer, batch_size: int) -> int:
        """Return 1 if an option counts batches or steps, so that it counts what it says; else at most MOST_BATCHES.

        In C, whose steps are short, it is a PART of the epoch, or what lies between two looks of a callback.
        """
        shares = trainer.limit_train_batches, trainer.val_check_interval
        counted = any(not isinstance(share, float) or share != 1 for share in shares)
        counted |= trainer.max_steps != -1 or bool(trainer.min_steps)
        counted |= trainer.overfit_batches > 0  # type: ignore[attr-defined] # Lightning sets it
        counted |= any(config.frequency != 1 for config in trainer.lr_scheduler_configs if config.interval == "step")
        parameters = sum(parameter.numel() for parameter in net.parameters())
        rows = min(MOST_NUMBERS // self.sizes[0], MOST_PRODUCTS // parameters)
        self.several = 1 if counted else max(1, min(MOST_BATCHES, rows // batch_size))
        if not (counted or self.nets or self.engine is None or self._why_torch()):  # several nets draw orders in a step
            part = -(-self._sizes()[1] // batch_size) // PARTS
            self.several = max(1, min(max(part, self.every, FEWEST), 2 * rows // batch_size))
        return self.several

    def train(self, net: nn.Module, features: Tensor, target: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        self.check(self.trainer)  # a callback may change an option at any time
        data = self.trainer.datamodule
        self.size = size = data.batch_size if isinstance(data, DataModule) else len(features)
        configs = self._schedules()
        prediction = features.new_empty(*self.nets, len(features), self.sizes[-1])
        rows = size if configs else len(features)
        parts = [features.split(rows), target.split(rows), prediction.split(rows, -2)]
        total = torch.zeros(self.nets, device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            for index, (x, y, a) in enumerate(zip(*parts, strict=True)):
                for config in configs if index else ():  # Lightning advances them after the last mini-batch only
                    self.trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
                total = total + self._take(x, y, a) * len(x)
        return total / len(features), prediction

    def _take(self, features: Tensor, target: Tensor, prediction: Tensor) -> Tensor:
        """Take a step for each mini-batch of these rows, and fill prediction → mean C."""
        return self.engine.train_batches(features, target, self.size, prediction)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        """Do nothing: `train` has taken the step."""

    def place(self, net: nn.Module, features: Tensor, step: int, looked_back: int) -> str:
        last = step * self.several - (-len(features) // self.size) - 1
        return _within(max(0, step + 1 - looked_back) * self.several, last)


class ByEnsemble(ByEngine):
    """`EnsembleEngine`: K nets from seeds of their own, which follow the run's; each draws orders of its own.

    The trainer has one optimizer over all parameters, which checkpoints and schedules know. Each net gets one of the
    same class that shares its state and its settings.
    """

    def __init__(self, options: MutableMapping[str, Any]) -> None:
        super().__init__(options)
        self.nets = (options["members"],)

    def make_net(self) -> Any:
        nets, seed = [super().make_net()], torch.initial_seed()
        for member in range(1, *self.nets):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + member)
                nets.append(super().make_net())
        return Members(nets, self.loss, bool(self.options["class_names"]))

    def check(self, trainer: L.Trainer) -> None:
        super().check(trainer)
        finder = any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        for wanted, given, fix in (
            ("no callbacks=lr_finder", finder, "search with members=1"),
            ("trainer.gradient_clip_val=null", trainer.gradient_clip_val, "leave it out"),
            ("trainer.precision=32-true or 64-true", trainer.precision not in ("32-true", "64-true"), "choose one"),
        ):
            if given:
                raise InputError(f"expected {wanted} for members={self.nets[0]}, which share each product; {fix}")

    def begin(self, net: Any, optimizer: Optimizer) -> None:
        ByLayers.begin(self, net, optimizer)
        (whole,) = optimizer.param_groups
        kind: Any = type(optimizer)
        own = [kind([{**whole, "params": list(member.parameters())}]) for member in net]
        try:
            self.engine = EnsembleEngine(list(net), own, self.loss, self.native)
        except InputError as error:
            raise InputError(f"{error}; or take members=1") from None

    def evaluate(self, net: Any, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        predictions = net.each(features)
        return torch.stack([self.cost(prediction, target) for prediction in predictions]), predictions

    def _take(self, features: Tensor, target: Tensor, prediction: Tensor) -> Tensor:
        (whole,) = self.optimizer.param_groups
        for own in self.engine.optimizers:  # a checkpoint or a schedule may have changed them
            own.state = self.optimizer.state
            own.param_groups[0].update({name: value for name, value in whole.items() if name != "params"})
        return self.engine.train_epoch(features, target, self.size, prediction=prediction)


def _check_alone(trainer: L.Trainer, learner: str, otherwise: str = "") -> None:
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        wanted, got = f"one process for {learner}, whose steps no other would see", type(trainer.strategy).__name__
        raise InputError(f"expected {wanted}, but got {got}; set trainer.devices=1 trainer.strategy=auto{otherwise}")


def torch_quadratic_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """(1/N) Σ_N w Σ_i ½ (a_i − ŷ_i)² as torch operations, for autograd to differentiate."""
    squares: Any = nn.functional.mse_loss  # torch's stubs do not know its weight
    return squares(prediction, target, reduction="sum", weight=weight) / (2 * len(prediction))


class ByAutograd(ByLayers):
    """The same net in torch's own layers, with the same state_dict keys and initial bits. torch differentiates it."""

    costs: ClassVar[Mapping[str, Callable[..., Tensor]]] = {
        "quadratic": torch_quadratic_loss,
        "mse": nn.functional.mse_loss,
        "bce": nn.functional.binary_cross_entropy_with_logits,
        "cross_entropy": nn.functional.cross_entropy,
    }

    def make_net(self) -> Any:
        return super().make_net().to_torch()

    def place(self, net: nn.Module, features: Tensor, step: int, looked_back: int) -> str:
        if self.options["residual"]:  # a sum of torch's own can't be read
            return _within(max(0, step + 1 - looked_back), step)
        return super().place(net, features, step, looked_back)


class TwoClasses(Perceptron):
    """A perceptron whose answer y stands in two columns, 1 − y and y, as the answers of other nets do."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return torch.cat([1 - y, y], -1)


class ByRosenblatt(ByLayers):
    """One threshold neuron for two classes, learning w += LR (ŷ − y) x after each sample; see `Perceptron`.

    Its loss is the share of mistakes, in training each counted before its correction. LR is the optimizer's lr; the
    optimizer has nothing else to do, and counts the steps.
    """

    fixed: ClassVar[Mapping[str, object]] = {
        **{"hidden": (), "activation": "sigmoid", "initialisation": "torch", "loss": "quadratic"},
        **{"bias": True, "dropout": 0.0, "residual": False, "l1": 0.0, "batch_norm": False, "channels": []},
    }
    weighted = ()

    def __init__(self, options: MutableMapping[str, Any]) -> None:
        options.update(backprop="none, Rosenblatt's rule", hidden=tuple(options["hidden"]))
        super().__init__(options)
        self.sizes = [options["input_size"], 1]
        if (classes := len(options["class_names"])) != 2:
            neuron, fix = "a perceptron, whose neuron answers 0 or 1", "choose data=halves, moons or xor"
            raise InputError(f"expected two classes for {neuron}, but got {classes}; {fix}")
        for name, given in ((name, options[name]) for name, value in self.fixed.items() if options[name] != value):
            rule, fix = "which Rosenblatt's rule can't honour", "leave it out, or take another model.output_activation"
            raise InputError(f"expected a perceptron without model.{name}, {rule}, but got {given}; {fix}")

    def make_net(self) -> Any:
        return TwoClasses(self.sizes[0])

    def check_weights(self) -> None:
        raise InputError(
            "expected rows that count the same for model=perceptron, whose rule knows no weights, but got weights; "
            "leave out data.class_weight and data.source.weight"
        )

    def check(self, trainer: L.Trainer) -> None:
        _check_alone(trainer, "model=perceptron")

    def train(self, net: Any, features: Tensor, target: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.optimizer.param_groups[0]["lr"]
        y = torch.stack([net.learn(x, label, rate) for x, label in zip(features, target[:, 1:], strict=True)])
        prediction = torch.cat([1 - y, y], -1)
        return self.cost(prediction, target), prediction

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        """Do nothing: there is no derivative."""


BACKPROP = {"layers": ByLayers, "network": ByNetwork, "engine": ByEngine, "autograd": ByAutograd}


def strategy(options: MutableMapping[str, Any]) -> ByLayers:
    """Return the strategy that a module's hyper-parameters name, for its net, cost and way to train."""
    members = options.get("members", 1)
    if not 1 <= members <= MOST_MEMBERS:
        raise InputError(f"expected members from 1 to {MOST_MEMBERS}, but got {members}; correct it")
    threshold = options["output_activation"] == "threshold"
    if members > 1 and (threshold or options["backprop"] != "engine"):
        given = "a perceptron" if threshold else f"backprop={options['backprop']}"
        raise InputError(f"expected backprop=engine and model=mlp for members={members}, but got {given}; change it")
    if threshold:
        return ByRosenblatt(options)
    if members > 1:
        return ByEnsemble(options)
    return choose(options["backprop"], BACKPROP, "backprop")(options)
