"""The casts of torch.autocast, which torch makes for its own layers only."""

import torch
from torch import Tensor


def _device_type(tensor: Tensor) -> str:
    """Return the device whose autocast counts; torch has none for meta."""
    device = tensor.device.type
    return "cpu" if device == "meta" else device


def autocasting(tensor: Tensor) -> bool:
    """Return True if autocast is on for the tensor's device. Asks for any device first: naming the device is slow."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(_device_type(tensor))


def cast(tensor: Tensor) -> Tensor:
    """Return the tensor in autocast's dtype, as torch casts for a linear layer: floating point but not float64."""
    if not tensor.dtype.is_floating_point or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(_device_type(tensor)))
