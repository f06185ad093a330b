"""Convolutions before a multi-layer perceptron, as LeCun's LeNet-5 of 1998 has them."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

from torch import nn

from manual_mlp import checks, modules
from manual_mlp.errors import InputError
from manual_mlp.modules import MLP, _Chain, activation_module, in_torch, mlp_of, of_layers, restored


class LeNet(_Chain):
    """Convolutions, each with an activation and a max pool of 2, then an MLP: rows (N, H·W) → prediction (N, n_L).

    image_shape: (H, W) of the image that a row holds. channels: of each convolution. sizes: of the MLP's layers, the
    hidden ones and the output. LeNet-5 is LeNet((28, 28), [6, 16], [120, 84, 10], activation="tanh").
    kernel: its side; the first convolution is padded by zeros, to keep the image's size. batch_norm: after each
    convolution and hidden affine map. arguments: further ones of `MLP`, for its layers.
    Raises InputError as `MLP`, for no convolution, and for an image of which the convolutions leave nothing.

    >>> import torch, manual_mlp as mm
    >>> net = mm.LeNet((8, 8), [6, 16], [84, 10], kernel=3)
    >>> [tuple(layer[0].weight.shape) for layer in net.convolutions[1:-1]]
    [(6, 1, 3, 3), (16, 6, 3, 3)]
    >>> net(torch.zeros(5, 64)).shape, net.mlp.sizes
    (torch.Size([5, 10]), [16, 84, 10])
    """

    convolutions: nn.Sequential
    mlp: MLP

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int],
        sizes: Sequence[int],
        kernel: int = 5,
        activation: str | nn.Module = "sigmoid",
        bias: bool = True,
        batch_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
        **arguments: Any,
    ) -> None:
        image_shape, channels, kernel = _checked(image_shape, channels, kernel)
        layers: list[nn.Module] = [nn.Unflatten(1, (1, *image_shape))]
        for index, (n_in, n_out) in enumerate(pairwise([1, *channels])):
            padding, has_bias = 0 if index else kernel // 2, bias and not batch_norm
            conv = modules.Conv2d(n_in, n_out, kernel, padding=padding, bias=has_bias, device=device, dtype=dtype)
            norm = [modules.BatchNorm2d(n_out, device=device, dtype=dtype)] if batch_norm else []
            layers.append(nn.Sequential(conv, *norm, activation_module(activation), modules.MaxPool2d(2)))
        n_in = channels[-1] * math.prod(_size_after(image_shape, len(channels), kernel))
        arguments |= {"bias": bias, "batch_norm": batch_norm and len(sizes) > 1, "device": device, "dtype": dtype}
        mlp = MLP([n_in, *sizes], activation, **arguments)
        super().__init__(OrderedDict(convolutions=nn.Sequential(*layers, nn.Flatten()), mlp=mlp))
        self.sizes = [math.prod(image_shape), *sizes]

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str], map_location: Any = "cpu") -> "LeNet":
        """Return the net of a checkpoint that train.py wrote with `model.channels`, as `MLP.from_checkpoint` does.

        >>> import manual_mlp as mm
        >>> try:
        ...     mm.LeNet.from_checkpoint("best.ckpt")  # of a run with data=iris
        ... except mm.InputError as error:
        ...     print(error)
        expected an mm.LeNet in best.ckpt; got an mm.MLP: take mm.MLP.from_checkpoint
        """
        return restored(net_of, path, map_location, convolutions=True)

    def to_torch(self) -> nn.Sequential:
        """Return the net in torch's own layers: same keys, the same tensors as parameters.

        >>> import torch, manual_mlp as mm
        >>> net, x = mm.LeNet((4, 4), [2], [3, 1], kernel=3), torch.ones(1, 16)
        >>> theirs = net.to_torch()
        >>> type(theirs.convolutions[1][0]).__name__, torch.allclose(theirs(x), net(x))
        ('Conv2d', True)
        """
        (convolutions,) = in_torch([self.convolutions])
        theirs = OrderedDict(convolutions=convolutions, mlp=self.mlp.to_torch())
        return nn.Sequential(theirs).train(self.training)


def _size_after(image: Sequence[int], convolutions: int, kernel: int) -> list[int]:
    """Return (H, W) of an image after so many convolutions, each with a max pool of 2.

    As in LeNet-5 the first one is padded by zeros, to keep the image's size, and the others are not.
    """
    sides = list(image)
    for index in range(convolutions):
        q = 0 if index else kernel // 2
        sides = [(side + 2 * q - kernel + 1) // 2 for side in sides]
    return sides


def _checked(image_shape: Any, channels: Any, kernel: Any) -> tuple[list[int], list[int], int]:
    """Return them as whole numbers. Refuses rows that are no images, and images too small for the convolutions."""
    lists = all(isinstance(of, Sequence) for of in (image_shape, channels))
    if not lists or len(image_shape) != 2 or not channels:
        raise InputError(
            "expected images of (H, W) and the channels of one or more convolutions; "
            f"got {image_shape} and {channels}: take images, such as data=digits, or no channels"
        )
    image_shape = [checks.count("image_shape", side) for side in image_shape]
    channels = [checks.count("channels", number) for number in channels]
    kernel = checks.count("a kernel", kernel)
    if min(_size_after(image_shape, len(channels), kernel)) < 1:
        raise InputError(
            f"expected an image that {len(channels)} convolutions of {kernel}×{kernel}, each with a pool of 2, leave "
            f"something of; got {image_shape[0]}×{image_shape[1]}: take a smaller kernel or fewer channels"
        )
    return image_shape, channels, kernel


def net_of(values: Mapping[str, Any]) -> MLP | LeNet:
    """Make the net that these hyper-parameters of a training describe."""
    if not values.get("channels"):
        return mlp_of(values)
    sizes = [*values["hidden"], values["output_size"]]
    return LeNet(values["image_shape"], values["channels"], sizes, values["kernel"], **of_layers(values))
