"""Pictures of the answers of a net, and of the weights of its first layer."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from manual_mlp.errors import InputError
from manual_mlp.plots.style import COLORS, MARKERS, WIDTH, legend_above, new_panels, short_names, styled

IN_A_LINE = 17  # characters above an image
MAX_NEURONS = 64  # with their weights shown as images
Predict = Callable[[np.ndarray], np.ndarray]


@styled
def confusion_matrix(target: np.ndarray, prediction: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw how often each class (row) was answered with each (column). target, prediction (N,): class indices.

    >>> import numpy as np, manual_mlp as mm
    >>> figure = mm.plots.confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), ["cat", "dog"])
    >>> figure.axes[0].get_images()[0].get_array().tolist()  # of two cats, one was taken for a dog
    [[1, 1], [0, 1]]
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # type: ignore[import-untyped]

    n = len(class_names)
    counts = confusion_matrix(target, prediction, labels=range(n))
    figure, panels = new_panels(1, 1, min(4.2, 1.8 + 0.4 * n))
    axes = panels[0, 0]
    axes.grid(False)
    ConfusionMatrixDisplay(counts, display_labels=short_names(class_names)).plot(
        ax=axes,
        cmap="Blues",
        colorbar=False,
        include_values=n <= 20,
        xticks_rotation="vertical" if max(map(len, class_names)) > 3 else "horizontal",
        text_kw={"fontsize": 9 if n <= 10 else 6},
    )
    axes.set(xlabel="prediction", ylabel="target")
    return figure


@styled
def worst_mistakes(
    images: np.ndarray, target: np.ndarray, scores: np.ndarray, class_names: Sequence[str], most: int = 12
) -> Figure:
    """Draw the wrongly answered images, the worst first: the true class had a much lower score than the answer.

    images (N, height, width), target (N,) class indices, scores (N, classes): the highest is the answer.
    Raises: InputError if every answer is right.

    >>> import numpy as np, manual_mlp as mm
    >>> images, scores = np.zeros((2, 8, 8)), np.array([[0.9, 0.1], [0.2, 0.8]])
    >>> figure = mm.plots.worst_mistakes(images, np.array([0, 0]), scores, ["8", "1"])
    >>> figure.axes[0].get_title("left")
    'predicted 1, is 8'
    """
    prediction = scores.argmax(1)
    rows = np.arange(len(target))
    behind = scores[rows, prediction] - scores[rows, target]
    worst = [row for row in np.argsort(-behind, kind="stable") if prediction[row] != target[row]][:most]
    if not worst:
        raise InputError("expected at least one mistake to draw, but every answer is right; draw something else")
    names = short_names(class_names)
    figure, panels = new_panels(-(-len(worst) // 4), 4, 1.4)
    for axes in panels.ravel():
        axes.set_axis_off()
    for axes, row in zip(panels.ravel(), worst, strict=False):
        axes.imshow(images[row], cmap="Greys")
        text = f"predicted {names[prediction[row]]}, is {names[target[row]]}"
        axes.set_title(textwrap.fill(text, IN_A_LINE), fontsize=7, loc="left")
    return figure


@styled
def first_layer_weights(
    weight: np.ndarray, image_shape: Sequence[int] = (), feature_names: Sequence[str] = ()
) -> Figure:
    """Draw W^1 (n_2, n_1): for each neuron an image of `image_shape`, or all of it as one table of colours.

    Orange is positive, purple negative, white 0. At most the first 64 neurons are shown.
    feature_names: of the n_1 columns, for the axis; left out if they are more than 64.

    >>> import numpy as np, manual_mlp as mm
    >>> figure = mm.plots.first_layer_weights(np.array([[1.0, -2.0, 0.0]]))
    >>> figure.axes[0].get_images()[0].get_clim()  # white is 0
    (-2.0, 2.0)
    """
    weight = drawn = weight[:MAX_NEURONS]
    if image_shape:
        (height, width), columns = image_shape, min(8, math.ceil(len(weight) ** 0.5))
        tiles = np.full((-(-len(weight) // columns) * columns, height + 1, width + 1), np.nan)  # with an edge each
        tiles[: len(weight), :-1, :-1] = weight.reshape(-1, height, width)
        drawn = np.block([[*line] for line in tiles.reshape(-1, columns, height + 1, width + 1)])
        # the bar of colours takes a fifth of the width
        figure, panels = new_panels(1, 1, 0.8 * max(1.2, WIDTH * len(drawn) / drawn.shape[1]))
        axes, aspect = panels[0, 0], "equal"
        axes.set_axis_off()
    else:
        figure, panels = new_panels(1, 1, min(6.0, 1.2 + 0.12 * len(weight)))
        axes, aspect = panels[0, 0], "auto"
        axes.grid(False)
        axes.set(xlabel="feature", ylabel="neuron")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if 0 < len(feature_names) <= MAX_NEURONS:
            axes.set(xlabel="")
            axes.set_xticks(range(len(feature_names)), short_names(feature_names), rotation="vertical", fontsize=7)
    limit = np.abs(weight).max() or 1.0
    image = axes.imshow(drawn, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect=aspect)
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    return figure


@styled
def decision_boundary(
    stages: Mapping[str, Predict],
    features: np.ndarray,
    target: np.ndarray,
    class_names: Sequence[str],
    feature_names: Sequence[str] = (),
) -> Figure:
    """Draw the net's answer at each place of the plane, and the samples; one panel for each stage of training.

    stages: {title: predict}, predict (M, 2) ↦ class indices (M,). features (N, 2), target (N,) class indices.

    >>> import numpy as np, manual_mlp as mm
    >>> x, target = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([0, 1])
    >>> stages = {"at the end": lambda points: (points[:, 0] > 0.5).astype(int)}
    >>> mm.plots.decision_boundary(stages, x, target, ["low", "high"]).axes[0].get_title()
    'at the end'
    """
    low, high = features.min(0), features.max(0)
    margin = 0.1 * (high - low)
    lines = [np.linspace(*limits, 150) for limits in zip(low - margin, high + margin, strict=True)]
    plane = np.stack(np.meshgrid(*lines), -1)
    columns = min(2, len(stages))
    rows = -(-len(stages) // columns)
    figure, panels = new_panels(rows, columns, (3.4 if columns == 1 else 1.5) + 0.8 / rows, sharex=True, sharey=True)
    n = len(class_names)
    colors = [COLORS[index % len(COLORS)] for index in range(n)]
    for axes in panels.ravel()[len(stages) :]:
        axes.set_visible(False)
        panels[-2, -1].tick_params(labelbottom=True)
    for axes, (title, predict) in zip(panels.ravel(), stages.items(), strict=False):
        # scikit-learn's DecisionBoundaryDisplay wants an estimator; its constructor changes from version to version
        answer = predict(plane.reshape(-1, 2)).reshape(plane.shape[:2])
        axes.contourf(*lines, answer, levels=np.arange(n + 1) - 0.5, cmap=ListedColormap(colors), alpha=0.25)
        for index, name in enumerate(short_names(class_names)):
            points, marker = features[target == index], MARKERS[index % len(MARKERS)]
            axes.scatter(*points.T, s=7, color=colors[index], marker=marker, linewidths=0, label=name)
        axes.set(title=title)
        axes.grid(False)
    first, second = short_names(feature_names) or ("$x_1$", "$x_2$")
    figure.supxlabel(first, fontsize=9)
    figure.supylabel(second, fontsize=9)
    legend_above(figure, panels[0, 0], min(n, 4))
    return figure


@styled
def fitted_curve(
    stages: Mapping[str, Predict], x: np.ndarray, target: np.ndarray, feature_names: Sequence[str] = ()
) -> Figure:
    """Draw the net's answer along its one input, a line for each stage, the last one strongest, over the samples.

    stages: {label: predict}, predict (M, 1) ↦ (M,). x (N,), target (N,).

    >>> import numpy as np, manual_mlp as mm
    >>> x = np.linspace(0, 1, 5)
    >>> figure = mm.plots.fitted_curve({"before": lambda x: 0 * x[:, 0], "after": lambda x: x[:, 0]}, x, x)
    >>> [line.get_label() for line in figure.axes[0].get_lines()]
    ['before', 'after']
    """
    figure, panels = new_panels(1, 1, 2.8 + 0.1 * len(stages))
    axes = panels[0, 0]
    axes.scatter(x, target, s=7, color="0.6", linewidths=0, label="samples")
    line = np.linspace(x.min(), x.max(), 400)
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, len(stages))) if len(stages) > 1 else COLORS[:1]
    for (label, predict), color in zip(stages.items(), shades, strict=True):
        axes.plot(line, predict(line[:, None]), color=color, label=label)
    axes.get_lines()[-1].set_linewidth(2.5)
    axes.set(xlabel=(short_names(feature_names) or ["$x$"])[0], ylabel="$y$")
    legend_above(figure, axes)
    return figure


@styled
def predicted_against_true(target: np.ndarray, prediction: np.ndarray) -> Figure:
    """Draw each sample of a regression at (prediction, target); on the line the net is right. Both (N,).

    >>> import numpy as np, manual_mlp as mm
    >>> axes = mm.plots.predicted_against_true(np.array([1.0, 2.0]), np.array([1.1, 1.9])).axes[0]
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('prediction', 'target')
    """
    from sklearn.metrics import PredictionErrorDisplay

    figure, panels = new_panels(1, 1, 3.6)
    look = {"s": 10, "color": COLORS[0], "alpha": 0.6, "linewidths": 0}
    PredictionErrorDisplay(y_true=target, y_pred=prediction).plot(
        panels[0, 0], kind="actual_vs_predicted", scatter_kwargs=look
    )
    panels[0, 0].set(xlabel="prediction", ylabel="target")
    for axis in (panels[0, 0].xaxis, panels[0, 0].yaxis):
        axis.set_major_locator(MaxNLocator(6))  # scikit-learn divides the range: -0.966, 0.045, …
    return figure
