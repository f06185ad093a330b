"""Check that all nodes in the graph of a model are this package's."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from manual_mlp.errors import InputError

# Accumulation, views, copies and casts: they compute nothing.
_COMPUTES_NOTHING = """
AccumulateGrad Alias AsStrided Clone Copy CopySlices Detach Diagonal Expand Flatten Movedim Narrow Permute Reshape
ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose ToCopy Unbind Unfold UnsafeView Unsqueeze View
"""
ALLOWED = frozenset(_COMPUTES_NOTHING.split())


def output_of(result: Any) -> Tensor:
    """Return the differentiable tensor of a result: itself, or the first of several."""
    outputs = result if isinstance(result, tuple | list) else [result]
    for output in outputs:
        if isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex()):
            return output
    raise InputError(f"expected a function that returns a floating-point tensor; got {type(result).__name__}")


def nodes_of(output: Tensor) -> list[Any]:
    """Return every node of the graph behind an output."""
    seen: dict[int, Any] = {}
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in seen:
            seen[id(node)] = node
            waiting += [before for before, _ in node.next_functions]
    return list(seen.values())


def _is_ours(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", object).__module__.split(".")[0] == "manual_mlp"


def _operation(name: str) -> str:
    """Return View for ViewBackward0."""
    return name.rstrip("0123456789").removesuffix("Backwards").removesuffix("Backward")


def assert_manual_backward(model: Callable[..., Any], x: Any, allow: Collection[str] = ()) -> None:
    """Fail if any node of the graph of model(x) is not one of this package's.

    x: the input, or a tuple of inputs. Accumulation, views, copies and casts are allowed, and the nodes named in
    `allow`, such as "AddBackward0" for a residual connection. Raises AssertionError, listing the others.

    >>> import torch, manual_mlp as mm
    >>> mm.testing.assert_manual_backward(mm.MLP([2, 1]), torch.ones(1, 2))  # passes silently
    >>> try:
    ...     mm.testing.assert_manual_backward(torch.nn.Linear(2, 1), torch.ones(1, 2))
    ... except AssertionError as error:
    ...     print("AddmmBackward0" in str(error))
    True
    """
    output = output_of(model(*x) if isinstance(x, tuple) else model(x))
    nodes = nodes_of(output)
    if not nodes:
        raise AssertionError(
            "expected a graph of manual_mlp's nodes; the output has no graph at all: is grad mode off?"
        )
    names = {node.name().split("::")[-1] for node in nodes if not _is_ours(node)}
    foreign = sorted(name for name in names if name not in allow and _operation(name) not in ALLOWED)
    if foreign:
        compiled = any(name in ("CompiledFunctionBackward", "ApplyTemplateBackward") for name in foreign)
        raise AssertionError(
            f"expected every affine map, activation and cost to be manual_mlp's; the graph has {', '.join(foreign)}: "
            + ("ask before torch.compile" if compiled else "convert the model, or name what may stay in allow=(…)")
        )
