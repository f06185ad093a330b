"""Convert torch.nn to manual_mlp and back, inside any model, in place.

To convert a layer is to give the same object our class. Parameters, hooks, names, mode and state_dict stay, because
they are never touched. The layer itself notes its former class, so `revert` needs nothing but the model.

Fusion leaves the layers where they are, too. An nn.Sequential that holds a Linear followed by an activation gets a
forward that computes such a pair as one node. Indexing, slicing and iterating return what they did before:
`model[0]` is the affine map alone and returns z, `model[1]` is the activation. A pair with a hook on either layer is
called layer by layer, whenever the hook is added, and fused again when it is removed.
"""

import dis
import functools
import inspect
import logging
import re
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from manual_mlp import functional, modules
from manual_mlp.errors import InputError
from manual_mlp.modules import ACTIVATION_MODULES, OURS

# A layer with such a name that can't be converted is reported. Quantised layers share nothing else with nn.Linear.
_NAMES = frozenset(plain.__name__ for plain in OURS) - {nn.Identity.__name__}
# The classes of torch.nn that compute something nonlinear, by file or name.
_FILES = "activation|adaptive|batchnorm|distance|instancenorm|normalization|rnn"
_NONLINEAR = re.compile(rf"torch\.nn\.modules\.(({_FILES})\.|pooling\.\w*(Max|LP)Pool)")
# The functions of torch with a formula here.
_FUNCTIONS = {"linear"} | {name for name in vars(functional) if name[0].islower() and name in vars(nn.functional)}
_FUNCTIONS -= {"torch"}
_WAS = "_class_before_convert"

logger = logging.getLogger(__name__)


def convert(model: nn.Module, filter: Callable[[nn.Module, str], bool] | None = None, fuse: bool = True) -> nn.Module:
    """Give every nn.Linear and activation of `model` our forward and backward, in place; return `model`.

    filter(module, qualified_name) chooses among the layers that could be converted; None takes them all.
    fuse: compute a Linear and the activation after it in an nn.Sequential as one node, if both are converted.
    The logger "manual_mlp.conversion" says how many layers were converted (info), and names the others that compute
    something, with the reason (warning); `left_alone` returns them. A function that a model's own forward calls, such
    as torch.relu, stays torch's. The warning names it; `mm.testing.assert_manual_backward` finds any.
    Raises InputError for a model that is no nn.Module and a filter that can't be called.

    >>> import torch, manual_mlp as mm
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    >>> keys, x = list(model.state_dict()), torch.randn(4, 2)
    >>> expected = model(x)
    >>> [type(layer).__module__ for layer in mm.convert(model)]
    ['manual_mlp.modules', 'manual_mlp.modules', 'manual_mlp.modules']
    >>> torch.allclose(model(x), expected), list(model.state_dict()) == keys
    (True, True)
    """
    _check_module("convert", model)
    if filter is not None and not callable(filter):
        raise InputError(f"expected a filter(module, qualified_name) -> bool; got {filter!r}: pass a function")
    layers = [(name, module) for name, module in model.named_modules() if _base(module) in OURS]
    layers = [(name, module) for name, module in layers if _obstacle(module) is None]
    # Ask the filter about all of them before any is changed, because it may raise.
    chosen = [module for name, module in layers if filter is None or filter(module, name)]
    for module in chosen:
        vars(module)[_WAS] = _base(module)
        _set_class(module, OURS[_base(module)])
    for module in model.modules():
        if fuse and _fusible(module):
            _set_class(module, _fusing(_base(module)))  # type: ignore[arg-type] # mypy: a class is not Hashable
    logger.info("converted %d of the %d layers with a formula here", len(chosen), len(layers))
    remaining = left_alone(model)
    for reason in dict.fromkeys(remaining.values()):
        names = [name or "the model itself" for name, why in remaining.items() if why == reason]
        logger.warning("left as it was: %s (%s)", ", ".join(names), reason)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: every layer and nn.Sequential gets the class it had. Return `model`.

    Layers that were ours before `convert` stay ours. Raises InputError for a model that is no nn.Module.

    >>> import torch, manual_mlp as mm
    >>> mm.revert(mm.convert(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())))[1].__class__
    <class 'torch.nn.modules.activation.Tanh'>
    """
    _check_module("revert", model)
    for module in model.modules():
        if _WAS in vars(module):
            _set_class(module, vars(module).pop(_WAS))
        elif isinstance(module, FusedSequential):
            _set_class(module, module.plain)
    return model


def left_alone(model: nn.Module) -> dict[str, str]:
    """Return qualified name → reason, for each layer of `model` that `convert` can't convert: it stays torch's.

    These are layers of a known kind that can't be converted faithfully, those without a formula here that have
    parameters of their own or compute something nonlinear, and those whose own forward calls torch.relu or the like.
    Raises InputError for a model that is no nn.Module.

    >>> import torch, manual_mlp as mm
    >>> mm.left_alone(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ELU(), torch.nn.Flatten()))
    {'1': 'there is no formula for torch.nn.ELU here'}
    """
    _check_module("left_alone", model)
    named = ((name, _obstacle(module) or _stays(module)) for name, module in model.named_modules())
    return {name: reason for name, reason in named if reason is not None and "parametrizations" not in name.split(".")}


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module to {function}; got {type(model).__name__}: pass the model itself")


# ---------------------------------------------------------------------------------------------------------------------
# One layer
# ---------------------------------------------------------------------------------------------------------------------


def _base(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; for a parametrized module, the class that was parametrized."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _obstacle(module: nn.Module) -> str | None:
    """Return the reason why a layer with a counterpart of ours can't be converted; None for any other module."""
    kind = _base(module)
    if issubclass(kind, tuple(OURS.values())) or not _NAMES.intersection(base.__name__ for base in kind.__mro__):
        return None
    if kind not in OURS:
        return f"a {kind.__module__}.{kind.__qualname__} may compute something else than torch.nn's own layer"
    if "forward" in vars(module) or type(module).forward is not kind.forward:
        return "its forward has been replaced"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"there is no formula for padding_mode={module.padding_mode!r} here"
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            return f"its {name} is no plain floating-point parameter"
    return None


def _stays(module: nn.Module) -> str | None:
    """Return the reason why a layer without a formula of ours stays torch's; None if ours, or if nothing is lost."""
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    ours = _base(module) in OURS or any(kind.startswith("manual_mlp.") for kind in kinds)
    if called := [] if ours else _called(module):
        return f"its forward calls {', '.join(called)} itself; mm.testing.assert_manual_backward finds what is torch's"
    parameters = parametrize.is_parametrized(module) or next(module.parameters(recurse=False), None) is not None
    if ours or not (parameters or any(map(_NONLINEAR.match, kinds))):
        return None
    kind = _base(module)
    if kind.__module__.startswith("torch.nn.modules."):
        return f"there is no formula for torch.nn.{kind.__name__} here"
    return f"there is no formula for the forward of {kind.__module__}.{kind.__qualname__}"


def _called(module: nn.Module) -> list[str]:
    """Return the names of functions with a formula here that a module's own forward calls, as far as its code says.

    Those of ours are left out, by whatever name, and so are modules inside.
    """
    forward = inspect.getattr_static(type(module), "forward", None)
    if type(module).__module__.startswith("torch.nn.") or not inspect.isfunction(forward):  # none of TorchScript
        return []
    inside = {part for name, _ in module.named_modules() for part in name.split(".")}
    value, called = None, {}
    for step in dis.get_instructions(forward):
        name, is_global = step.argval, step.opname == "LOAD_GLOBAL"
        if not is_global and step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            continue
        value = (forward.__globals__ if is_global else vars(value) if isinstance(value, ModuleType) else {}).get(name)
        if name in _FUNCTIONS - inside and not str(getattr(value, "__module__", "")).startswith("manual_mlp."):
            called[name] = value
    return [*called]


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Set module.__class__ = kind; if parametrize gave the module a class of its own, such a class derived from kind.

    It is a new class each time, because copies of a parametrized module share theirs.
    """
    if parametrize.is_parametrized(module):
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    module.__class__ = kind


# ---------------------------------------------------------------------------------------------------------------------
# Pairs in an nn.Sequential
# ---------------------------------------------------------------------------------------------------------------------


class FusedSequential(nn.Sequential):
    """The nn.Sequential with a forward that computes an affine map and the activation after it as one node."""

    plain: ClassVar[type[nn.Sequential]] = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        fused = False
        for layer, following in pairwise([*self, None]):
            if fused:  # this layer is the activation of the pair before
                fused = False
            elif fused := _is_pair(layer, following) and _bare(layer) and _bare(following):
                name, values = modules.name_and_values(following)
                input = functional.apply_fused(name, values, input, layer.weight, layer.bias)
            else:
                input = layer(input)
        return input

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the former class: pickle can't find a class made at run time by its name."""
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _unpickled, (self.plain,), *state


@functools.cache
def _fusing(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class that fuses, for nn.Sequential or a class derived from it."""
    if plain is nn.Sequential:
        return FusedSequential
    return type(f"Fused{plain.__name__}", (FusedSequential, plain), {"plain": plain, "__module__": __name__})


def _unpickled(plain: type[nn.Module]) -> nn.Module:
    kind = _fusing(plain)  # type: ignore[arg-type]
    return kind.__new__(kind)


def _is_pair(affine: Any, activation: Any) -> bool:
    kind = type(activation)
    return type(affine) is modules.Affine and kind in ACTIVATION_MODULES and kind not in OURS


def _fusible(module: nn.Module) -> bool:
    """Return True if it has a pair and calls its layers one after the other, by nn.Sequential's own forward."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    return "forward" not in vars(module) and any(_is_pair(*neighbours) for neighbours in pairwise(module))


def _bare(module: nn.Module) -> bool:
    """Return True if calling the module calls its class's forward, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or module._compiled_call_impl or "forward" in module.__dict__ or _has_any_global_hook())
