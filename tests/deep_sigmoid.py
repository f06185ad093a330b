"""Deep sigmoid nets on digits: what each start of the weights, and each kind of net, comes to in the same training."""

from collections.abc import Callable
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import manual_mlp as mm

SIZES = [64, *[100] * 7, 10]


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator]:
    """Return 1437 images in [0, 1] and their labels to train on, 360 to test on, and the generator of the run."""
    generator = torch.Generator().manual_seed(1000 + seed)
    data, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(data), generator=generator)
    x, y = torch.tensor(data / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return x[:1437], y[:1437], x[1437:], y[1437:], generator


def nothing(net: mm.MLP, x: Tensor, generator: torch.Generator) -> None:
    """Torch's own initialisation."""


def glorot(net: mm.MLP, x: Tensor, generator: torch.Generator, gain: float = 1.0, centred: bool = False) -> None:
    """Glorot's normal initialisation. centred: b = −½ Σ W, so that z is 0 where every a is ½."""
    for layer in net:
        nn.init.xavier_normal_(layer.weight, gain, generator=generator)
        layer.bias.data = -layer.weight.data.sum(1) / 2 if centred else torch.zeros_like(layer.bias)


def centred(net: mm.MLP, x: Tensor, generator: torch.Generator) -> None:
    glorot(net, x, generator, 4.0, True)


def pretrained(net: mm.MLP, x: Tensor, generator: torch.Generator) -> None:
    mm.pretrain(net, x, generator=generator)


def shuffled(net: mm.MLP, x: Tensor, generator: torch.Generator) -> None:
    """The pretrained weights, at random places of their layer."""
    mm.pretrain(net, x, generator=generator)
    for layer in list(net)[:-1]:
        weight = layer.weight.data
        layer.weight.data = weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight)


def first_layer(net: mm.MLP, x: Tensor, generator: torch.Generator) -> None:
    """Pretraining of the first layer alone."""
    shallow = mm.MLP([*SIZES[:2], SIZES[-1]])
    mm.pretrain(shallow, x, generator=generator)
    net[0].load_state_dict(shallow[0].state_dict())


def accuracy(
    start: Callable[[mm.MLP, Tensor, torch.Generator], None],
    seed: int,
    lr: float = 0.1,
    activation: str = "sigmoid",
    epochs: int = 50,
) -> float:
    """Return the test accuracy in % after SGD in batches of 20 under the cross-entropy."""
    x, y, test_x, test_y, generator = split(seed)
    torch.manual_seed(seed)
    net = mm.MLP(SIZES, activation, "identity")
    assert [layer.in_features for layer in net] == [n for n, _ in pairwise(SIZES)]
    start(net, x, generator)
    engine = mm.BackpropEngine(net, torch.optim.SGD(net.parameters(), lr=lr), "cross_entropy")
    for _ in range(epochs):
        engine.train_epoch(x, y, 20, generator)
    return 100 * (net(test_x).argmax(1) == test_y).float().mean().item()


def learned(seed: int, hidden: list[int], epochs: int, adam: bool = False, **options: bool) -> float:
    """Return the test accuracy in % of a net with residual=True or batch_norm=True, or of a plain one.

    It is trained as one Function, by Adam with LR 0.003 or SGD with 0.1, which falls as a cosine, in batches of 20,
    under the cross-entropy.
    """
    x, y, test_x, test_y, generator = split(seed)
    torch.manual_seed(seed)
    net = mm.MLP([64, *hidden, 10], output_activation="identity", **options)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.003) if adam else torch.optim.SGD(parameters, lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(20):
            optimizer.zero_grad()
            mm.network.network_loss(net, x[rows], y[rows], "cross_entropy").backward()
            optimizer.step()
        schedule.step()
    return 100 * (net.eval()(test_x).argmax(1) == test_y).float().mean().item()
