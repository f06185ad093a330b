"""Draw a net and its training. Each function returns a matplotlib Figure, for the caller to show or save.

All have one style. Its colours differ for the colour-blind and on a black and white printer: Okabe and Ito's for parts
and classes, each with a marker or dash of its own; viridis for layers; purple to orange for signs. A phone shows its
width without shrinking the text.
"""

from manual_mlp.plots.answers import (
    confusion_matrix,
    decision_boundary,
    first_layer_weights,
    fitted_curve,
    predicted_against_true,
    worst_mistakes,
)
from manual_mlp.plots.course import delta_by_layer, delta_flow, histograms, learning_curves
from manual_mlp.plots.graph import animation, flow, network
from manual_mlp.plots.sweeps import sweep_figure

__all__ = [
    "animation",
    "confusion_matrix",
    "decision_boundary",
    "delta_by_layer",
    "delta_flow",
    "first_layer_weights",
    "fitted_curve",
    "flow",
    "histograms",
    "learning_curves",
    "network",
    "predicted_against_true",
    "sweep_figure",
    "worst_mistakes",
]
