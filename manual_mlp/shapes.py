"""Names and shapes of all tensors of a net, from the hyper-parameters that a checkpoint declares."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Shapes = dict[str, tuple[int, ...]]
COUNTER = "num_batches_tracked"  # of a batch norm, the one tensor of whole numbers
OF_NORM = ("weight", "bias", "running_mean", "running_var")


def size_after(image: Sequence[int], convolutions: int, kernel: int) -> list[int]:
    """Return (H, W) of an image after so many convolutions, each with a max pool of 2.

    As in LeNet-5 the first one is padded by zeros, to keep the image's size, and the others are not.
    """
    sides = list(image)
    for index in range(convolutions):
        q = 0 if index else kernel // 2
        sides = [(side + 2 * q - kernel + 1) // 2 for side in sides]
    return sides


def declared(values: Mapping[str, Any]) -> Shapes:
    """Return the names and shapes that a net of these hyper-parameters has in its state_dict, after `net.`."""
    sizes = [values["input_size"], *values["hidden"], values["output_size"]]
    if values["output_activation"] == "threshold":  # a perceptron
        return {"net.affine.weight": (1, sizes[0]), "net.affine.bias": (1,)}
    if channels := values.get("channels"):
        flat = channels[-1] * math.prod(size_after(values["image_shape"], len(channels), values["kernel"]))
        return _of_convolutions(values, channels) | _of_layers(values, [flat, *sizes[1:]], "net.mlp")
    shapes = _of_layers(values, sizes, "net")
    return shapes if (members := values.get("members", 1)) == 1 else _of_members(shapes, members)


def _of_convolutions(values: Mapping[str, Any], channels: Sequence[int]) -> Shapes:
    shapes: Shapes = {}
    kernel = values["kernel"]
    for index, (c_in, c_out) in enumerate(pairwise([1, *channels]), 1):
        where = f"net.convolutions.{index}"
        shapes |= _of_affine(f"{where}.0", (c_out, c_in, kernel, kernel), values)
        shapes |= _of_norm(f"{where}.1", c_out) if values.get("batch_norm") else {}
    return shapes


def _of_layers(values: Mapping[str, Any], sizes: list[int], where: str) -> Shapes:
    shapes: Shapes = {}
    for index, (n_in, n_out) in enumerate(pairwise(sizes)):
        hidden = index < len(sizes) - 2
        residual, normalised = hidden and index > 0 and values.get("residual"), hidden and values.get("batch_norm")
        block = f"{where}.{2 * index}{'.1' if residual else ''}"
        shapes |= _of_affine(f"{block}.0" if residual or normalised else block, (n_out, n_in), values, hidden)
        shapes |= _of_norm(f"{block}.1", n_out) if normalised else {}
    return shapes


def _of_affine(name: str, shape: tuple[int, ...], values: Mapping[str, Any], hidden: bool = True) -> Shapes:
    """Return those of W and b; before a norm there is no b."""
    has_bias = values["bias"] and not (hidden and values.get("batch_norm"))
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if has_bias else {})


def _of_norm(name: str, n: int) -> Shapes:
    return {f"{name}.{own}": (n,) for own in OF_NORM} | {f"{name}.{COUNTER}": ()}


def _of_members(shapes: Shapes, members: int) -> Shapes:
    """Return those of several nets, and of what each keeps of its best epoch."""
    each = {f"net.{k}{name.removeprefix('net')}": shape for k in range(members) for name, shape in shapes.items()}
    parameters = sum(map(math.prod, shapes.values()))
    return each | {"net.kept": (members, parameters), "net.kept_cost": (members,), "net.kept_epoch": (members,)}
