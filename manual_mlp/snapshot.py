"""The question "is this still what I was made from?", about everything that a call and a training step honour.

`network_loss` asks it about a model, the engine about a model and its optimizer, at each call but not between the
mini-batches of `train_epoch`. It takes one to three µs, so it compares lists that maps make.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, call
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.optim import optimizer as optimizers
from torch.utils.hooks import RemovableHandle

from manual_mlp import modules

_HOOKS = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
_TRAITS = attrgetter("shape", "requires_grad")
_GLOBAL_HOOKS = (
    *(of_all._global_forward_hooks, of_all._global_forward_pre_hooks),
    *(of_all._global_backward_hooks, of_all._global_backward_pre_hooks),
)


def _unhooked(step: Any) -> Any:
    """Return an optimizer's step without the profiler's hook, which torch adds with a class's first optimizer."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


_STEPS: dict[Any, Any] = {kind: _unhooked(kind.step) for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the dicts of a module's own hooks, and of those that torch calls for every module."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return *own, *_GLOBAL_HOOKS


def _reader(module: nn.Module, *names: str) -> Any:
    """Return what reads a module's class, these attributes, and the arguments of its activation."""
    arguments: Iterable[str] = ()
    if isinstance(module, modules.AffineActivation):
        arguments = "activation", "parameter_values"
    elif type(module) in modules.ACTIVATION_MODULES:
        arguments = set(getattr(module, "__constants__", ())) - {"inplace"}
    return attrgetter("__class__", *names, *arguments)


class Hooks:
    """The question whether there is a hook; it searches the dicts only when torch's counter of hooks has changed."""

    def __init__(self, find: Callable[[], Iterable[Any]]) -> None:
        self.find, self.found, self.settled, self.seen = find, False, -1, -1

    def any(self) -> bool:
        """Return True if one of the dicts that `find` returns holds a hook."""
        count = RemovableHandle.next_id
        if count != self.settled or self.found:
            self.found = any(self.find())
            # torch counts a hook before it stores it, perhaps in another thread: look once more at the next call.
            self.settled, self.seen = self.seen, count
        return self.found


class Snapshot:
    """Everything that a call of the model honours beside the values of its parameters, as it was when it was read.

    It holds what the model is made of, but not the model itself, so that the model can be collected.
    """

    def __init__(self, model: nn.Module) -> None:
        everything = list(model.modules())
        hooks = [hooks for module in everything for hooks in hooks_of(module)]
        self.hooks = Hooks(lambda: hooks)
        self.parents = [m._modules for m in everything if m._modules or isinstance(m, nn.Sequential | nn.ModuleList)]
        self.below = everything[1:]
        self.readers = [_reader(module, "__call__", "forward") for module in self.below]
        self.root = _reader(model)  # bound methods would hold the model
        self.state = self._state(model)

    def changed(self, model: nn.Module) -> bool:
        """Return True if the model has other modules, arguments of activations or forwards than it had, or hooks."""
        return self.hooks.any() or self._state(model) != self.state

    def _state(self, model: nn.Module) -> list[Any]:
        kind = type(model)
        return [
            *(self.root(model), kind.__call__, kind.forward, model.__dict__.get("forward")),
            *map(call, self.readers, self.below),
            *map(tuple, map(dict.values, self.parents)),
        ]


class Training:
    """Everything that an optimizer's step honours, as it was: parameters, their hooks, groups, the step itself.

    sources   for each parameter of the model the dict that holds it, and its name there. The groups hold no others, so
              no id that is compared is given anew.
    """

    def __init__(self, sources: Iterable[tuple[dict[str, Any], str]], optimizer: torch.optim.Optimizer) -> None:
        self.owners, self.names = zip(*sources, strict=True)
        self.owned: list[Any] = list(map(dict.get, self.owners, self.names))
        # The strides of a contiguous tensor follow from its shape.
        self.strides: Any = Tensor.is_contiguous if all(map(Tensor.is_contiguous, self.owned)) else Tensor.stride
        self.state = self._state(optimizer)
        own = vars(optimizer)
        of_optimizer = own["_optimizer_step_pre_hooks"], own["_optimizer_step_post_hooks"]
        everywhere = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
        self.hooks = Hooks(lambda: chain(of_optimizer, everywhere, *map(_HOOKS, self.owned)))

    def changed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return True if a parameter, a group's members or the optimizer's step is another one, or lies elsewhere."""
        return self._state(optimizer) != self.state

    def _state(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Return the optimizer's step, the parameters, where and how they lie, which are trained, and each group.

        `p.data = p.data[:2]` changes the shape, but not the address.
        """
        owned = self.owned
        state = [
            optimizer.step,
            *map(id, map(dict.get, self.owners, self.names)),
            *map(Tensor.data_ptr, owned),
            *map(_TRAITS, owned),
            *map(self.strides, owned),
        ]
        for group in optimizer.param_groups:
            state += None, *map(id, group["params"])
        return state

    def has_its_own_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return True if step is torch's of this class, or a scheduler's wrapper around it, which only counts calls."""
        step, of_class = vars(optimizer).get("step"), type(optimizer).step
        if step is None or (getattr(step, "__wrapped__", None) is of_class and hasattr(step, "_wrapped_by_lr_sched")):
            step = of_class
        return _unhooked(step) is _STEPS.get(type(optimizer))


def hooks_of_parameter(parameter: Tensor) -> tuple[list[Any], list[Any]]:
    """Return the hooks that autograd calls with a parameter's gradient, and after it has filled .grad."""
    before, after = _HOOKS(parameter)
    return list((before or {}).values()), list((after or {}).values())
