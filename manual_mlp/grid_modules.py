"""The counterpart of torch.nn for grids and norms: each is torch's class with another forward, as in `modules.py`."""

from typing import Any

import torch
from torch import Tensor, nn

from manual_mlp import checks, grid_functional


class Conv2d(nn.Conv2d):
    """z_{n,o,p} = Σ_{c,k} a_{n,c,sp+dk−q} W_{o,c,k} + b_o: an nn.Conv2d whose forward and backward are ours.

    input (N, in_channels, H, W) or (in_channels, H, W) → (N, out_channels, H′, W′) or (out_channels, H′, W′).
    Same names, shapes, initialisation and state_dict as nn.Conv2d. Raises InputError for a padding_mode other than
    "zeros", and from forward as `functional.conv2d`.

    >>> import torch, manual_mlp as mm
    >>> layer = mm.Conv2d(1, 6, kernel_size=5, padding=2)
    >>> layer(torch.rand(8, 1, 28, 28)).shape, list(layer.state_dict())
    (torch.Size([8, 6, 28, 28]), ['weight', 'bias'])
    """

    def reset_parameters(self) -> None:
        """Draw the parameters as nn.Conv2d does, in whose __init__ it comes last.

        >>> import torch, manual_mlp as mm
        >>> layer = mm.Conv2d(4, 8, kernel_size=5)
        >>> layer.reset_parameters()
        >>> bool(layer.weight.abs().max() <= 1 / (4 * 5 * 5) ** 0.5)  # uniform within 1/√(what a neuron reads)
        True
        """
        checks.padding_mode(self.padding_mode)
        super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return z_{n,o,p} = Σ_{c,k} a_{n,c,sp+dk−q} W_{o,c,k} + b_o: (N, C, H, W) → (N, out_channels, H′, W′)."""
        checks.padding_mode(self.padding_mode)
        places = self.stride, self.padding, self.dilation, self.groups
        return grid_functional.conv2d(input, self.weight, self.bias, *places)


class MaxPool2d(nn.MaxPool2d):
    """The largest number of each window, the first of equals; δ goes where it came from. Arguments as nn.MaxPool2d.

    >>> import torch, manual_mlp as mm
    >>> mm.MaxPool2d(2)(torch.tensor([[[1.0, 5.0, 0.0, 7.0], [4.0, 2.0, 0.0, 0.0]]]))
    tensor([[[5., 7.]]])
    """

    def forward(self, input: Tensor) -> Any:
        """Return a_{n,c,p} = max_k input_{n,c,sp+dk−q}: (N, C, H, W) → (N, C, H′, W′), with return_indices also k."""
        places: Any = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        return grid_functional.max_pool2d(input, *places)


class AvgPool2d(nn.AvgPool2d):
    """The mean of each window; δ spreads evenly over it. Arguments as nn.AvgPool2d.

    >>> import torch, manual_mlp as mm
    >>> mm.AvgPool2d(2)(torch.tensor([[[1.0, 5.0, 0.0, 8.0], [4.0, 2.0, 0.0, 0.0]]]))
    tensor([[[3., 2.]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return a_{n,c,p} = mean_k input_{n,c,sp+k−q}: (N, C, H, W) → (N, C, H′, W′)."""
        places: Any = self.kernel_size, self.stride, self.padding, self.ceil_mode
        divisor: Any = self.count_include_pad, self.divisor_override
        return grid_functional.avg_pool2d(input, *places, *divisor)


def counted(norm: Any) -> float:
    """Count one more batch of a batch norm, and return κ, the share that it has in the running statistics."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean of all batches so far
            return 1 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


@torch.no_grad()
def track(norm: Any, x: Tensor) -> None:
    """Update the running statistics of a batch norm, as a call in training does."""
    κ = counted(norm)
    if x.numel():
        torch.native_batch_norm(x, None, None, norm.running_mean, norm.running_var, True, κ, norm.eps)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """γ x̂ + β over the set of each channel; in evaluation by the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """Return γ x̂ + β, x̂ = (input − μ)/√(v + ε), μ and v of each channel: (N, num_features, …) → the same shape."""
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats
        κ = counted(self) if tracks else 0.0
        m, s = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        training = self.training or (m is None and s is None)
        return grid_functional.batch_norm(input, m, s, self.weight, self.bias, training, κ, self.eps)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """γ x̂ + β, x̂ = (x − μ)/√(v + ε) over the rows of each channel; δ = γ r (g − mean g − x̂ mean(g x̂)).

    input (N, num_features) or (N, num_features, places). Arguments, buffers and state_dict as nn.BatchNorm1d; the
    running variance is unbiased, v is not. Raises InputError as `functional.batch_norm`.

    >>> import torch, manual_mlp as mm
    >>> layer = mm.BatchNorm1d(1, eps=1e-12)
    >>> layer(torch.tensor([[1.0], [3.0]])).flatten().tolist(), layer.running_mean
    ([-1.0, 1.0], tensor([0.2000]))
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """γ x̂ + β, x̂ = (x − μ)/√(v + ε) over the rows and places of each channel: input (N, num_features, H, W).

    Else as `BatchNorm1d`.

    >>> import torch, manual_mlp as mm
    >>> mm.BatchNorm2d(1, eps=1e-12)(torch.tensor([[[[1.0, 3.0]]]])).flatten().tolist()
    [-1.0, 1.0]
    """


class LayerNorm(nn.LayerNorm):
    """γ ⊙ x̂ + β, x̂ = (x − μ)/√(v + ε) over the last dimensions of each row; δ = r P(γ g). Arguments as nn.LayerNorm.

    >>> import torch, manual_mlp as mm
    >>> mm.LayerNorm(2, eps=1e-12)(torch.tensor([[1.0, 3.0], [10.0, 50.0]])).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return γ ⊙ x̂ + β, x̂ = (input − μ)/√(v + ε): (…, normalized_shape) → the same shape."""
        return grid_functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Softmax(nn.Softmax):
    """a = e^z / Σ_c e^z along `dim`; δ = (g − Σ_c g a) a. A cost of logits holds it already: don't put both.

    >>> import torch, manual_mlp as mm
    >>> mm.Softmax(dim=1)(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return a = e^z / Σ_c e^z along `dim` of the input z: (…) → (…)."""
        return grid_functional.softmax(input, self.dim, _stacklevel=5)


_KINDS = (Conv2d, MaxPool2d, AvgPool2d, BatchNorm1d, BatchNorm2d, LayerNorm, Softmax)
OURS: dict[type[nn.Module], type[nn.Module]] = {kind.__bases__[-1]: kind for kind in _KINDS}  # torch's class to ours
