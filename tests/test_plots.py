"""What the pictures show: the data of what is drawn, not only that something is."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import manual_mlp as mm
from manual_mlp import InputError, plots

RNG = np.random.default_rng(0)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def small_trace(sizes: list[int], samples: int = 2) -> SimpleNamespace:
    """What a trace holds, with numbers of its own."""
    layers = range(1, len(sizes) + 1)
    weight = {layer: RNG.normal(size=(sizes[layer], sizes[layer - 1])) for layer in layers[:-1]}
    return SimpleNamespace(
        sizes=sizes,
        weight=weight,
        reads={layer: (layer - 1,) for layer in layers[1:]},
        rule=dict.fromkeys(layers[1:], "affine"),
        bias={layer: RNG.normal(size=sizes[layer]) for layer in layers[:-1]},
        a={layer: RNG.uniform(size=(samples, sizes[layer - 1])) for layer in layers},
        z={layer: RNG.normal(size=(samples, sizes[layer - 1])) for layer in layers[1:]},
        delta={layer: RNG.normal(size=(samples, sizes[layer - 1])) for layer in layers[1:]},
        grad_weight={layer: 100 + w for layer, w in weight.items()},
        new_weight={layer: w - 100 for layer, w in weight.items()},
        new_bias={layer: RNG.normal(size=sizes[layer]) for layer in layers[:-1]},
    )


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "residual net": lambda: mm.MLP([2, 3, 3, 1], residual=True),
    "residual block": lambda: nn.Sequential(mm.Residual(mm.Affine(2, 2), mm.Tanh(), mm.Affine(2, 2)), mm.Affine(2, 1)),
    "three branches": lambda: nn.Sequential(
        mm.Sum(mm.Affine(2, 2), mm.Affine(2, 2), mm.Identity()), mm.Tanh(), mm.Affine(2, 1)
    ),
}


def hidden(figure: Figure) -> list[tuple[str, str]]:
    """Return the texts that cover one another: numbers, titles, the legend."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    texts = [*(text for axes in figure.axes for text in [*axes.texts, axes.title]), *figure.legends[0].get_texts()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    pairs = itertools.combinations([(text, box) for text, box in boxes if box.width > 0], 2)
    return [(text, other) for (text, box), (other, of_other) in pairs if box.overlaps(of_other)]


class TestLearningCurves:
    def test_draws_what_the_csv_holds(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.csv"
        path.write_text(
            "epoch,train_loss,val_loss,val_accuracy,test_loss\n0,,2,0.5,\n0,3,,,\n1,,1,0.7,\n1,2,,,\n1,,,,9\n"
        )
        loss, accuracy = plots.learning_curves(path).axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in loss.get_lines()}
        assert lines == {"train": [[0, 3], [1, 2]], "val": [[0, 2], [1, 1]]}
        assert [line.get_xydata().tolist() for line in accuracy.get_lines()] == [[[0, 0.5], [1, 0.7]]]
        assert (loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_xlabel()) == ("cost", "accuracy", "epoch")

    def test_the_kept_epoch_is_marked(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.csv").write_text("epoch,train_loss\n0,3\n1,2\n2,1\n")
        (axes,) = plots.learning_curves(tmp_path / "metrics.csv", kept=1).axes
        assert axes.get_lines()[-1].get_xdata() == [1, 1]
        assert "kept, epoch 1" in [text.get_text() for text in axes.get_legend().get_texts()]

    def test_no_curve_is_drawn_twice(self, tmp_path: Path) -> None:
        """r2 is 1 − rmse² / the variance."""
        path = tmp_path / "metrics.csv"
        path.write_text("epoch,train_loss,val_loss,val_rmse,val_r2\n0,3,3,9,0.1\n1,2,2,4,0.5\n")
        assert [axes.get_ylabel() for axes in plots.learning_curves(path).axes] == ["cost", "r2"]
        path.write_text("epoch,val_rmse\n0,9\n1,4\n")
        assert [axes.get_ylabel() for axes in plots.learning_curves(path).axes] == ["rmse"]

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.csv").write_text("epoch,lr\n0,1\n")
        with pytest.raises(InputError, match=r"columns such as train_loss .*train first"):
            plots.learning_curves(tmp_path / "metrics.csv")


class TestFlow:
    def test_norms_by_layer(self) -> None:
        figure = plots.delta_flow([0, 0.5, 1], {3: [1, 2, 3], 2: [0.1, 0, 0.3]})
        (axes,) = figure.axes
        assert axes.get_yscale() == "log"
        drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        np.testing.assert_array_equal(drawn[r"$\delta^{3}$"], [[0, 1], [0.5, 2], [1, 3]])
        np.testing.assert_array_equal(drawn[r"$\delta^{2}$"], [[0, 0.1], [0.5, np.nan], [1, 0.3]])  # a gap for 0

    def test_legend_of_a_deep_net_is_short(self) -> None:
        figure = plots.delta_flow([0, 1], {layer: [1, 1] for layer in range(2, 42)})
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(labels) == 8
        assert (labels[0], labels[-1]) == (r"$\delta^{41}$", r"$\delta^{2}$")

    def test_histograms(self) -> None:
        before, after = small_trace([3, 5, 4], samples=50), small_trace([3, 5, 4], samples=50)
        after.delta[2][:] = 0  # all dead: nothing to draw on a logarithmic scale
        figure = plots.histograms({"before": before, "after": after})
        panels = np.array(figure.axes).reshape(3, 2)
        assert [axes.get_title() for axes in panels[0]] == ["before", "after"]
        assert [axes.get_xlabel() for axes in panels[:, 0]] == ["$z$", "$a$", r"$|\delta|$"]
        assert [[len(axes.patches) for axes in row] for row in panels] == [[2, 2], [2, 2], [2, 1]]
        counts, edges, _ = panels[0, 0].patches[0].get_data()
        expected, bins = np.histogram(before.z[2], bins=len(counts))
        np.testing.assert_allclose(counts, expected / expected.max())
        np.testing.assert_allclose(edges, bins)
        _, edges, _ = panels[2, 1].patches[0].get_data()
        size = np.abs(after.delta[3])
        np.testing.assert_allclose(edges[[0, -1]], [size.min(), size.max()])
        assert panels[2, 1].get_xscale() == "log"


class TestAnswers:
    def test_confusion_matrix(self) -> None:
        target, prediction = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
        figure = plots.confusion_matrix(target, prediction, ["a", "b", "$x^2$ and more than fits"])
        (image,) = figure.axes[0].get_images()
        assert image.get_array().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == ["a", "b", r"\$x^2\$ and mor…"]  # text, not a formula
        assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("target", "prediction")

    def test_class_without_samples_keeps_its_row(self) -> None:
        figure = plots.confusion_matrix(np.array([0, 2]), np.array([0, 2]), ["a", "b", "c"])
        assert figure.axes[0].get_images()[0].get_array().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]

    def test_worst_mistakes_come_first(self) -> None:
        images, target = RNG.uniform(size=(4, 2, 3)), np.array([0, 0, 1, 1])
        scores = np.array([[0.4, 0.6], [0.9, 0.1], [0.9, 0.1], [0.6, 0.5]])  # right but for 0, 2 and 3: by .2, .8, .1
        figure = plots.worst_mistakes(images, target, scores, ["zero", "one"], most=2)
        drawn = [axes.get_images()[0].get_array() for axes in figure.axes[:2]]
        np.testing.assert_array_equal(drawn, images[[2, 0]])
        titles = [axes.get_title("left") for axes in figure.axes]
        assert titles == ["predicted zero,\nis one", "predicted one, is\nzero", "", ""]

    def test_no_mistake_to_draw(self) -> None:
        with pytest.raises(InputError, match="at least one mistake"):
            plots.worst_mistakes(np.zeros((1, 2, 2)), np.array([1]), np.array([[0, 1]]), ["a", "b"])

    def test_weights_as_images(self) -> None:
        weight = RNG.normal(size=(5, 6))
        (image,) = plots.first_layer_weights(weight, (2, 3)).axes[0].get_images()
        tiles = image.get_array().filled(np.nan)
        assert tiles.shape == (2 * 3, 3 * 4)  # 2 rows of 3 tiles, each with an edge
        np.testing.assert_array_equal(tiles[0:2, 8:11], weight[2].reshape(2, 3))
        np.testing.assert_array_equal(tiles[3:5, 4:7], weight[4].reshape(2, 3))
        assert np.isnan(tiles[3:, 8:]).all()
        assert np.isnan(tiles[2]).all()
        assert image.get_clim() == (-np.abs(weight).max(), np.abs(weight).max())

    def test_images_of_weights_leave_no_empty_band(self) -> None:
        figure = plots.first_layer_weights(RNG.normal(size=(30, 64)), (8, 8))
        FigureCanvasAgg(figure).draw()
        assert figure.axes[0].get_window_extent().height > 0.9 * figure.bbox.height

    def test_weights_as_a_table(self) -> None:
        weight = RNG.normal(size=(70, 6))
        (image,) = plots.first_layer_weights(weight).axes[0].get_images()
        np.testing.assert_array_equal(image.get_array(), weight[:64])
        axes = plots.first_layer_weights(weight, feature_names=list("abcdef")).axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == list("abcdef")

    def test_decision_boundary(self) -> None:
        features = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
        target = np.array([0, 0, 1, 2])
        stages = {"start": lambda x: np.zeros(len(x)), "end": lambda x: (x[:, 1] > 0.5) * (1 + (x[:, 0] > 0.5))}
        figure = plots.decision_boundary(stages, features, target, ["a", "b", "c"])
        assert [axes.get_title() for axes in figure.axes] == ["start", "end"]
        named = plots.decision_boundary(stages, features, target, ["a", "b", "c"], ["width", "height"])
        assert (named.get_supxlabel(), named.get_supylabel()) == ("width", "height")
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
        filled, *samples = figure.axes[1].collections
        for index, points in enumerate(samples):
            np.testing.assert_array_equal(points.get_offsets(), features[target == index])
        # of the contour, the paths that hold a point tell what is answered there
        for x, answer in (([0.2, 0.2], 0), ([0.9, 0.1], 0), ([0.2, 0.9], 1), ([0.9, 0.9], 2)):
            holds = [bool(len(path)) and path.contains_point(x) for path in filled.get_paths()]
            assert holds == [answer == index for index in range(3)]

    def test_three_stages_hide_the_fourth_panel(self) -> None:
        stages = dict.fromkeys("abc", lambda x: np.zeros(len(x)))
        axes = plots.decision_boundary(stages, RNG.normal(size=(4, 2)), np.array([0, 1, 0, 1]), ["a", "b"]).axes
        assert [panel.get_visible() for panel in axes] == [True, True, True, False]

    def test_fitted_curve(self) -> None:
        x, target = RNG.uniform(-1, 1, 20), RNG.normal(size=20)
        figure = plots.fitted_curve({"old": lambda x: 0 * x[:, 0], "new": lambda x: x[:, 0] ** 2}, x, target)
        (samples,) = figure.axes[0].collections
        np.testing.assert_array_equal(samples.get_offsets(), np.column_stack([x, target]))
        old, new = figure.axes[0].get_lines()
        np.testing.assert_array_equal(new.get_ydata(), np.asarray(new.get_xdata()) ** 2)
        assert (new.get_xdata()[0], new.get_xdata()[-1]) == (x.min(), x.max())
        assert new.get_linewidth() > old.get_linewidth()

    def test_the_legend_covers_no_curve(self) -> None:
        stages = {f"after {n} epochs": (lambda x, n=n: x[:, 0] * n) for n in range(6)}
        layers = {f"activation=sigmoid, initialisation={n}": {2: 10.0**-n, 20: 10.0**n} for n in range(6)}
        for figure in (plots.fitted_curve(stages, *RNG.normal(size=(2, 20))), plots.delta_by_layer(layers)):
            FigureCanvasAgg(figure).draw()
            (legend,) = figure.legends
            assert legend.get_window_extent().y0 >= figure.axes[0].get_window_extent().y1
            assert 0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= figure.bbox.width

    def test_predicted_against_true(self) -> None:
        target, prediction = RNG.normal(size=9), RNG.normal(size=9)
        axes = plots.predicted_against_true(target, prediction).axes[0]
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.column_stack([prediction, target]))
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "target")

    def test_its_ticks_are_round(self) -> None:
        axes = plots.predicted_against_true(np.array([-0.966, 3.079]), np.array([-0.9, 2.7])).axes[0]
        assert all(abs(tick - round(tick, 1)) < 1e-9 for tick in (*axes.get_xticks(), *axes.get_yticks()))


class TestGraph:
    def test_network(self) -> None:
        trace = small_trace([2, 3, 1])
        (axes,) = plots.network(trace).axes
        numbers = [plots.graph._short(w) for layer in (1, 2) for w in trace.weight[layer].ravel()]
        biases = [plots.graph._short(b) for layer in (1, 2) for b in trace.bias[layer]]
        assert axes.get_title() == "lines: $W^l$; neurons: $x$, then $b^l$"
        assert texts(axes.figure) == [*numbers, "$x_{1}$", "$x_{2}$", *biases]
        strong = [c for c in axes.collections if isinstance(c, LineCollection)][2:]
        for layer, lines in zip((1, 2), strong, strict=True):
            weight = trace.weight[layer]
            signs = [plots.graph.POSITIVE.lower() if w >= 0 else plots.graph.NEGATIVE.lower() for w in weight.ravel()]
            assert [to_hex(color) for color in lines.get_colors()] == signs
            order = np.argsort(np.abs(weight.ravel()))
            assert (np.diff(np.array(lines.get_linewidths())[order]) > 0).all()
        # W^1_{31} leads from neuron 1 of layer 1 to neuron 3 of layer 2
        (begin, end) = strong[0].get_segments()[4]
        assert (begin.tolist(), end.tolist()) == ([1, 0.5], [2, -1])

    def test_flow_step_by_step(self) -> None:
        trace = small_trace([2, 2, 1])
        panels = plots.flow(trace, sample=1).axes
        a = {layer: [plots.graph._short(v) for v in trace.a[layer][1]] for layer in (1, 2, 3)}
        delta = {layer: [plots.graph._short(v) for v in trace.delta[layer][1]] for layer in (2, 3)}
        weight = {layer: [plots.graph._short(v) for v in trace.weight[layer].ravel()] for layer in (1, 2)}
        gradient = {layer: [plots.graph._short(v) for v in trace.grad_weight[layer].ravel()] for layer in (1, 2)}
        new = {layer: [plots.graph._short(v) for v in trace.new_weight[layer].ravel()] for layer in (1, 2)}
        biases = {layer: [plots.graph._short(v) for v in trace.new_bias[layer]] for layer in (1, 2)}
        assert [[text.get_text() for text in axes.texts] for axes in panels] == [
            [*weight[1], *a[1], *a[2]],
            [*weight[2], *a[1], *a[2], *a[3]],
            delta[3],
            [*weight[2], *delta[2], *delta[3]],
            [*gradient[1], *gradient[2], *a[1], *delta[2], *delta[3]],
            [*new[1], *new[2], *biases[1], *biases[2]],
        ]
        titles = ["forward", "forward", "backward", "backward", "gradients", "update"]
        assert [axes.get_title().split(":")[0] for axes in panels] == titles
        legend = [text.get_text() for text in panels[0].figure.legends[0].get_texts()]
        assert legend == ["positive, the thicker the larger", "negative, the thicker the larger"]

    # The nets of the presets that are drawn as graphs, and others of their kind.
    @pytest.mark.parametrize(
        "sizes",
        [
            *([2, 4, 2], [3, 3, 3, 3]),
            *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ([1, 1, 1, 1], [1, 8, 1], [3, 4, 3])),
            *(pytest.param(few, marks=pytest.mark.slow) for few in ([1, 1], [2, 2], [1, 2, 1], [1, 4, 1])),
        ],
    )
    def test_no_text_hides_another(self, sizes: list[int]) -> None:
        for _ in range(2):
            trace = small_trace(sizes)
            assert not hidden(plots.network(trace))
            assert not hidden(plots.flow(trace))

    @pytest.mark.parametrize("name", GRAPHS)
    def test_no_text_hides_another_in_a_graph(self, name: str) -> None:
        """Lines that pass over a layer have their numbers beside its neurons, and beside those of its own lines."""
        torch.manual_seed(0)
        net = GRAPHS[name]().apply(lambda layer: [nn.init.normal_(p) for p in layer.parameters(recurse=False)])
        trace = mm.trace(net, torch.randn(1, 2), torch.rand(1, 1))
        assert not hidden(plots.network(trace))
        assert not hidden(plots.flow(trace))

    def test_animation_has_a_frame_for_each_panel(self, tmp_path: Path) -> None:
        trace = small_trace([1, 1, 1])
        plots.animation(trace, tmp_path / "steps.gif")
        with Image.open(tmp_path / "steps.gif") as film:
            assert film.n_frames == len(plots.flow(trace).axes) == 6  # type: ignore[attr-defined]
            assert film.info["duration"] == 2000

    def test_a_net_whose_branches_meet(self, tmp_path: Path) -> None:
        """A residual block: its panels, its lines, and one frame of the film for each."""
        torch.manual_seed(0)
        layers = mm.Affine(2, 3), mm.Tanh(), mm.Residual(mm.Affine(3, 3), mm.Tanh()), mm.Affine(3, 1)
        trace = mm.trace(torch.nn.Sequential(*layers), [0.5, -1.0], [1.0])
        panels = plots.flow(trace).axes
        titles = [axes.get_title() for axes in panels]
        assert titles[2] == "forward: $z^4 = a^2 + a^3$, $a^4 = G(z^4)$"
        assert titles[7] == r"backward: $\delta^2 = ((W^2)^T \delta^3 + \delta^4) \odot G'(z^2)$"
        assert [text.get_text() for text in panels[2].texts][-3:] == plots.graph._numbers(trace.a[4][0])
        drawn = [
            c for c in panels[2].collections if isinstance(c, LineCollection) and to_hex(c.get_color()[0]) == "#4c4c4c"
        ]
        ends = [(way[0].tolist(), way[-1].tolist()) for lines in drawn for way in lines.get_segments()]
        assert ends == [([read, y], [4, y]) for read in (2, 3) for y in (1, 0, -1)]
        plots.animation(trace, tmp_path / "steps.gif")
        with Image.open(tmp_path / "steps.gif") as film:
            assert film.n_frames == len(panels) == 10  # type: ignore[attr-defined]
            frames = []
            for place in range(film.n_frames):  # type: ignore[attr-defined]
                film.seek(place)
                frames.append(film.convert("RGB").tobytes())
        assert len({*frames}) == 10

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.15, ".15"), (-0.0042, "-.0042"), (-4.2e-5, "-4e-5"), (-0.0, "0"), (-1.25, "-1.2"), (1234.5, "1.2e3")],
    )
    def test_numbers_fit_into_a_neuron(self, value: float, text: str) -> None:
        assert plots.graph._short(value) == text

    def test_too_large(self) -> None:
        with pytest.raises(InputError, match=r"at most 8 layers of at most 8 neurons, .* but got 9-2; draw a smaller"):
            plots.network(small_trace([9, 2]))


def test_no_figure_is_left_to_pyplot_and_the_style_stays_ours(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    before, figures = dict(matplotlib.rcParams), pyplot.get_fignums()  # those of a page that was run before
    draw: list[Callable[[], Figure]] = [
        lambda: plots.confusion_matrix(np.array([0, 1]), np.array([1, 1]), ["a", "b"]),
        lambda: plots.predicted_against_true(np.arange(3), np.arange(3)),
        lambda: plots.flow(small_trace([1, 1, 1])),
    ]
    for index, function in enumerate(draw):
        function().savefig(tmp_path / f"{index}.svg")
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == before
