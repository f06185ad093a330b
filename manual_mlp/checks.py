"""The sentences about a wrong tensor, size or option that several files need: each is written here once.

Most functions return nothing if all is well, and raise InputError otherwise. What torch checks anyway is asked only
after torch has refused.
"""

import functools
import math
import operator
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import accumulate, pairwise
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from manual_mlp.errors import InputError

P = ParamSpec("P")

# ---------------------------------------------------------------------------------------------------------------------
# Numbers and words
# ---------------------------------------------------------------------------------------------------------------------


def brief(value: object) -> str:
    """Return a value as Python writes it, cut to a part of a line: a tensor may have a million numbers."""
    return " ".join(reprlib.repr(value).split())


def count(name: str, value: Any, smallest: int = 1) -> int:
    """Return a whole number, given in any type of such (NumPy's too)."""
    try:
        number = -1 if isinstance(value, bool | Tensor) else operator.index(value)
    except TypeError:
        number = -1
    if number < smallest:
        raise InputError(f"expected {name} of at least {smallest}, a whole number; got {brief(value)}")
    return number


_NO_SOFTMAX = "'identity', because CrossEntropyLoss contains the softmax"
# The names that others give an activation, and the one here.
_MEANT = {"linear": "'identity'", "none": "'identity'", "swish": "'silu'", "logistic": "'sigmoid'"}
_MEANT |= dict.fromkeys(("softmax", "log_softmax", "logsoftmax"), _NO_SOFTMAX)


def meant(name: Any, known: Iterable[str]) -> str:
    """Return which of the known activations was likely meant, to follow a message; "" if none comes near."""
    lower = str(name).lower()
    close = get_close_matches(lower, list(known), n=1)
    if lower in _MEANT:
        return f": take {_MEANT[lower]}"
    return f": did you mean {close[0]!r}?" if close else ""


def positive(name: str, value: Any, optional: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and value > 0) and not (optional and value is None):
        raise InputError(f"expected a {name} above 0{', or None' * optional}; got {brief(value)}")


def hidden_layers(hidden: Sequence[int], residual: bool, batch_norm: bool) -> None:
    """Refuse layers that residual connections can't join, and a net without the layers that batch norm is for."""
    if residual and (len(hidden) < 2 or len({*hidden}) > 1):
        raise InputError(
            f"expected two or more hidden layers of one width for residual=True; got {list(hidden)}: "
            "a layer can only be added to one as wide, so make them equal, or leave residual out"
        )
    if batch_norm and not hidden:
        raise InputError(
            "expected a hidden layer for batch_norm=True; got none: the output layer is not normalised, so leave it out"
        )


def fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"expected a {name} between 0 and 1; got {value}")


def reduction(value: str) -> None:
    if value not in ("none", "mean", "sum"):
        raise InputError(f"expected a reduction of 'none', 'mean' or 'sum'; got {value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Any tensor
# ---------------------------------------------------------------------------------------------------------------------


def tensors(**named: object) -> None:
    """Refuse what is no tensor, such as an array of NumPy (a tracer's proxy has what a tensor has)."""
    for name, value in named.items():
        if not hasattr(value, "requires_grad"):
            fix = "call torch.as_tensor() on it"
            if isinstance(value, DataLoader):
                fix = "pass all rows, input and target, and a batch_size; BackpropEngine.step takes one batch"
            raise InputError(f"expected a torch.Tensor as {name}; got {type(value).__name__}: {fix}")


def rows_are_tensors(method: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Return the method, which looks at its rows first: for a DataLoader Python would miss a target."""

    @functools.wraps(method)
    def checked(*args: P.args, **options: P.kwargs) -> Tensor:
        if len(args) > 1:
            tensors(input=args[1])
        return method(*args, **options)

    return checked


def like(name: str, tensor: Tensor, of: Tensor, shape: Sequence[int | str], fix: str) -> None:
    """Refuse what is no dense tensor of this shape, in which a letter stands for any number, and of's dtype and device.

    name: with its article.
    """
    tensors(**{name: tensor})
    dense(**{name: tensor})
    sizes = zip(shape, tensor.shape, strict=False)
    fits = tensor.dim() == len(shape) and all(n == own or isinstance(n, str) for n, own in sizes)
    if not fits or (tensor.dtype, tensor.device) != (of.dtype, of.device):
        wanted = str((*shape,)).replace("'", "")
        raise InputError(
            f"expected {name} of shape {wanted} and {of.dtype} on {of.device}; "
            f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}: {fix}"
        )


def dense(**named: Tensor) -> None:
    for name, tensor in named.items():
        if tensor.is_nested:
            raise InputError(f"expected dense tensors; got a nested one as {name}: join its rows, as torch.cat does")
        if tensor.layout != torch.strided:
            raise InputError(f"expected dense tensors; got a sparse one as {name}: call .to_dense() on it")


def real(name: str, tensor: Tensor, whole: bool = False) -> None:
    """Refuse complex numbers, of which the backward formulas have no conjugates, and unless `whole` integers."""
    try:
        if tensor.dtype.is_floating_point or (whole and not tensor.dtype.is_complex):
            return
    except AttributeError:
        tensors(**{name: tensor})
        raise
    fix = "split it into its real and imaginary parts" if tensor.dtype.is_complex else "call .float() on it"
    raise InputError(f"expected a real floating-point {name}; got {tensor.dtype}: {fix}")


def jagged(args: Iterable[Any]) -> None:
    """Refuse nested tensors of the older layout, of which autograd can ask no sizes."""
    if any(isinstance(arg, Tensor) and arg.is_nested and arg.layout == torch.strided for arg in args):
        raise InputError(
            "expected a nested input of layout torch.jagged; got torch.strided, which no autograd.Function can return: "
            "make it by torch.nested.nested_tensor(…, layout=torch.jagged)"
        )


def one_kind(**named: Tensor | None) -> None:
    """Refuse tensors of several dtypes or devices; the last one is what the first should be moved to."""
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    for what in ("dtype", "device"):
        kinds = {name: getattr(tensor, what) for name, tensor in given.items()}
        if len(set(kinds.values())) > 1:
            came = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            first, *_, last = kinds
            raise InputError(f"expected one {what} for all tensors; got {came}: call .to({kinds[last]}) on the {first}")


def _of_shape(shape: tuple[int, ...], each: str, **named: Tensor | None) -> None:
    for name, values in named.items():
        if values is not None and (came := tuple(values.shape)) != shape:
            raise InputError(f"expected a {name} of shape {shape}, one for each {each}; got shape {came}")


def _weight_and_bias(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse what is not real, a bias of another shape, and several dtypes or devices."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            real(name, tensor)
    _of_shape((len(weight),), "output", bias=bias)
    one_kind(input=input, weight=weight, bias=bias)


def one_shape(terms: Sequence[Tensor]) -> None:
    """Refuse terms of several shapes, which would broadcast to something else."""
    if any(term.shape != terms[0].shape for term in terms):
        raise InputError(
            f"expected branches that give one shape; got {' and '.join(str(tuple(term.shape)) for term in terms)}: "
            "an identity beside layers needs as many outputs as inputs"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The affine map
# ---------------------------------------------------------------------------------------------------------------------


def affine(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.is_nested and input.layout == torch.strided:
        return  # it has no shape to speak of: what was raised before stands
    if weight.dim() != 2:
        raise InputError(f"expected a weight of shape (out_features, in_features); got shape {tuple(weight.shape)}")
    n_in = weight.shape[1]
    if input.dim() == 0 or input.shape[-1] != n_in:
        fix = "transpose the input" if n_in in input.shape else "flatten or select the features, or change in_features"
        raise InputError(
            f"expected an input whose last dimension is in_features={n_in}; got shape {tuple(input.shape)} "
            f"for a weight of shape {tuple(weight.shape)}: {fix}"
        )
    _weight_and_bias(input, weight, bias)


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


def samples(prediction: Tensor) -> None:
    """Refuse a prediction without a dimension of samples, whose 1/N would be lost."""
    if prediction.dim() < 2:
        raise InputError(
            f"expected a prediction of shape (N, outputs); got {tuple(prediction.shape)}, "
            "whose 1/N would be lost: call .unsqueeze(-1) for one output, .unsqueeze(0) for one sample"
        )


def same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        fix = "the target" if prediction.dim() > target.dim() else "the prediction"
        hint = f"call .unsqueeze(-1) on {fix}" if abs(prediction.dim() - target.dim()) == 1 else "reshape one of them"
        hint = _one_hot(prediction.shape, prediction.dtype, target) or hint
        raise InputError(
            f"expected prediction and target of the same shape; got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}, which would broadcast to something else: {hint}"
        )


def _one_hot(shape: Sequence[int], dtype: torch.dtype, target: Tensor) -> str:
    """Return what to do with class labels beside a prediction of this shape; "" if the target can't be labels."""
    *samples, classes = shape
    if classes == 1 or tuple(target.shape) not in ((*samples,), (*samples, 1)):
        return ""
    column = "" if target.dim() == len(samples) else ".squeeze(-1)"
    return (
        "if these are class labels, take CrossEntropyLoss (loss='cross_entropy'), "
        f"or torch.nn.functional.one_hot(target{column}.long(), {classes}).to({dtype})"
    )


def factor(name: str, weight: Tensor, prediction: Tensor) -> None:
    """Refuse a weight of a cost that is no constant beside the prediction, or would broadcast the prediction."""
    try:
        weight.expand(prediction.shape)
    except RuntimeError:
        raise InputError(
            f"expected a {name} that broadcasts to the input's shape {tuple(prediction.shape)}; "
            f"got {tuple(weight.shape)}"
        ) from None
    if weight.requires_grad:
        raise InputError(f"expected a {name} without a gradient, as torch takes it; got one with: call .detach() on it")
    one_kind(**{name: weight.to(prediction.dtype), "prediction": prediction})


def classes(z: Tensor, class_dim: int, weight: Tensor | None, target: Tensor, ignore_index: int) -> None:
    """Refuse logits without classes, and what is neither a probability for each class nor a class for each sample."""
    if z.dim() == 0 or (weight is not None and weight.shape != (z.shape[class_dim],)):
        came = f"{tuple(z.shape)}" + ("" if weight is None else f" with a weight of shape {tuple(weight.shape)}")
        raise InputError(f"expected logits (N, classes) and a weight (classes,); got {came}")
    if target.dtype.is_floating_point:
        fits = target.shape == z.shape
        if fits and ignore_index >= 0:
            raise InputError(
                f"expected class indices beside ignore_index={ignore_index}; got a probability for each class"
            )
    else:
        of_samples = (*z.shape[:class_dim], *z.shape[class_dim + 1 :])
        fits = target.dtype in (torch.int64, torch.uint8) and target.shape == of_samples
    if not fits:
        raise InputError(
            f"expected class indices (int64, the shape of the logits {tuple(z.shape)} without the classes) or "
            f"probabilities of the logits' shape and dtype; got {target.dtype} of shape {tuple(target.shape)}: "
            "call .long() on class indices, .squeeze(-1) on a column of them"
        )


def labels(target: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Refuse class labels out of range; other targets pass. On a GPU it waits for them."""
    if target.is_floating_point():
        return
    kept = target if ignore_index is None else target[target != ignore_index]
    if kept.numel() == 0 or (int(kept.min()) >= 0 and int(kept.max()) < classes):
        return
    raise InputError(
        f"expected class labels from 0 to {classes - 1}; got labels from {int(kept.min())} to {int(kept.max())}: "
        "renumber them from 0, or leave out what is to be ignored"
    )


# ---------------------------------------------------------------------------------------------------------------------
# A batch for a whole net
# ---------------------------------------------------------------------------------------------------------------------


def batch(weight: Tensor, outputs: int, input: Tensor, target: Tensor, loss: str) -> None:
    """Refuse an input (N, n_1) or a target that the first W^l and the cost can't take."""
    tensors(input=input, target=target)
    like("an input", input, weight, ("N", weight.shape[1]), "call .flatten(1) or .to() on it, to fit the first weight")
    real("input", input)
    target_of(outputs, input, target, loss)


def full_batch(weight: Tensor | None, outputs: int, input: Tensor, target: Tensor, loss: str) -> None:
    """Refuse a batch without rows, labels out of range (on a GPU it waits for these), and what `batch` refuses.

    weight: None for a net of grids, whose layers look at the input themselves.
    """
    tensors(input=input, target=target)
    if weight is not None:
        batch(weight, outputs, input, target, loss)
    if len(input) == 0:
        raise InputError("expected a batch with at least one row; got none, whose mean cost is NaN")
    batch_labels(outputs, target, loss)


def batch_labels(outputs: int, target: Tensor, loss: str) -> None:
    dense(target=target)
    if loss == "cross_entropy" and target.dim() == 1:
        labels(target, outputs)


def share_memory(parameters: Iterable[Tensor]) -> bool:
    """Return True if two parameters begin at one address, or a contiguous one reaches into another."""
    extents = sorted(
        (p.data_ptr(), p.data_ptr() + (p.nbytes if p.is_contiguous() else p.element_size()))
        for p in parameters
        if p.numel() > 0  # all empty ones lie at 0
    )
    return any(end > start for (_, end), (start, _) in pairwise(extents))


def own_parameters(model: nn.Module, parameters: Iterable[Tensor | None]) -> None:
    """Refuse parameters of which two layers share one."""
    times = Counter(parameters)
    for name, parameter in model.named_parameters():
        if times[parameter] > 1:
            raise InputError(
                f"expected layers with parameters of their own; got {name!r} twice, a tied one: give each layer its own"
            )


def order(rows: int, generator: Any) -> Tensor:
    """Return the rows in random order. Refuses what is no generator, such as a seed."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(
            f"expected a torch.Generator; got {type(generator).__name__}: torch.Generator().manual_seed(…) makes one"
        )
    return torch.randperm(rows, generator=generator, device=generator.device if generator else None)


def buffer(prediction: Tensor, shape: tuple[int, ...], input: Tensor, target: Tensor) -> None:
    """Refuse what can't be filled with the predictions: each number needs a place of its own."""
    like("a prediction", prediction, input, shape, "make it by input.new_empty")
    given = {data.untyped_storage().data_ptr() for data in (input, target)}
    shares = prediction.numel() > 0 and prediction.untyped_storage().data_ptr() in given
    steps = sorted((stride, size - 1) for stride, size in zip(prediction.stride(), shape, strict=True) if size > 1)
    reached = accumulate((stride * count for stride, count in steps), initial=0)  # by the dimensions before
    apart = all(stride > before for (stride, _), before in zip(steps, reached, strict=False))
    if prediction.requires_grad or shares or not apart:
        raise InputError(
            "expected a prediction with memory of its own, each number in a place of its own, and without a gradient; "
            "got one that shares memory or requires a gradient: make it by input.new_empty"
        )


def rows_of(prediction: Tensor, target: Tensor, loss: str) -> None:
    """Refuse a prediction that is no row of numbers for each sample, and a target that does not fit it."""
    like("a prediction", prediction, prediction, ("N", "outputs"), "put an nn.Flatten before the first affine map")
    target_of(prediction.shape[1], prediction, target, loss)


def target_of(outputs: int, input: Tensor, target: Tensor, loss: str) -> None:
    """Refuse a target that the cost can't take beside such rows."""
    dense(target=target)
    fix = _one_hot((len(input), outputs), input.dtype, target) or "reshape it, or call .to() on it"
    if loss == "cross_entropy":
        if (target.shape, target.dtype, target.device) == (input.shape[:1], torch.int64, input.device):
            return
        fix = f"reshape it, call .to() on it, or pass class indices ({len(input)},) of torch.int64"
    like("a target", target, input, (len(input), outputs), fix)


def trainable(parameters: Iterable[Tensor | None]) -> None:
    """Refuse parameters that were made in inference mode."""
    if any(parameter is not None and parameter.is_inference() for parameter in parameters):
        raise InputError(
            "expected parameters made outside torch.inference_mode, which can't be trained; got a model made inside: "
            "make the model before, or train a copy.deepcopy of it"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Grids and norms
# ---------------------------------------------------------------------------------------------------------------------


def padding_mode(value: str) -> None:
    if value != "zeros":
        fix = "apply torch.nn.functional.pad to the input before"
        raise InputError(f"expected padding_mode='zeros'; got {value!r}: {fix}")


def image(name: str, tensor: Tensor) -> None:
    if tensor.dim() not in (3, 4):
        raise InputError(f"expected an {name} of shape (N, C, H, W) or (C, H, W); got {tuple(tensor.shape)}")


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    image("input of a convolution", input)
    if input.shape[-3] == 0:
        raise InputError(f"expected at least one channel; got an input of shape {tuple(input.shape)}")
    if weight.dim() != 4 or input.shape[-3] != weight.shape[1] * groups:
        raise InputError(
            f"expected a weight of shape (out_channels, {input.shape[-3]} / groups, kernel, kernel) for an input of "
            f"shape {tuple(input.shape)} and groups={groups}; got {tuple(weight.shape)}"
        )
    _weight_and_bias(input, weight, bias)


def batch_norm(
    x: Tensor, m: Tensor | None, s: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, ε: float
) -> None:
    if x.dim() < 2:
        raise InputError(f"expected an input of shape (N, C, …) for a batch norm; got {tuple(x.shape)}")
    _of_shape((x.shape[1],), "channel", running_mean=m, running_var=s, weight=weight, bias=bias)
    if not training and (m is None or s is None):
        raise InputError("expected running_mean and running_var outside of training; got None: pass training=True")
    if ε < 0 or (training and ε == 0):
        raise InputError(f"expected a positive eps; got {ε}")
    if training and x.shape[0] * math.prod(x.shape[2:]) == 1:
        raise InputError(
            f"expected more than one number for each channel in training; got an input of shape {tuple(x.shape)}, "
            "whose variance is 0: pass more rows, call .eval(), or take a LayerNorm (under vmap each sample is a batch)"
        )


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    if not shape or x.shape[-len(shape) :] != shape:
        raise InputError(f"expected an input of shape (…, {', '.join(map(str, shape))}); got {tuple(x.shape)}")
    _of_shape(shape, "number of a row", weight=weight, bias=bias)
