"""Rosenblatt's theorem (1962): on separable rows at most (R/γ)² mistakes (Novikoff's bound), which are reached."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import manual_mlp as mm
from manual_mlp import formulas as sheet
from manual_mlp.training.closing import most_mistakes as bound

double = torch.float64
Rows = tuple[Tensor, Tensor]
MOST = 3000  # mistakes that a test waits for


@st.composite
def separable(draw: st.DrawFn) -> Rows:
    """Return rows of whole numbers, on which every sum is exact, and targets that some plane separates."""
    n, width = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    numbers = st.integers(-6, 6)
    x = torch.tensor(draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=n, max_size=n)))
    plane = torch.tensor(draw(st.lists(numbers, min_size=width + 1, max_size=width + 1)))
    side = x @ plane[:-1] + plane[-1]
    assume((side != 0).all())
    return x.to(double), (side > 0).to(double).unsqueeze(1)


def mistakes(x: Tensor, target: Tensor, most: float) -> int:
    """Return how many mistakes the perceptron makes until it makes none, or more than `most`."""
    # An epoch that is not the last makes at least one.
    made = mm.Perceptron(x.shape[1]).to(double).fit(x, target, max_epochs=int(most) + 2)
    return sum(made) if made[-1] == 0 else int(most) + 1


def hold(rows: Rows) -> None:
    largest = bound(*rows)
    assume(largest <= MOST)
    assert mistakes(*rows, largest) <= largest + 1e-6  # the last digits of R/γ


@settings(max_examples=50, deadline=None, derandomize=True)
@given(separable())
def test_the_bound_holds(rows: Rows) -> None:
    hold(rows)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(separable())
def test_the_bound_holds_on_a_thousand_sets(rows: Rows) -> None:
    hold(rows)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(separable(), st.sampled_from([0.5, 2.0, 8.0]))
def test_the_rate_changes_no_mistake(rows: Rows, rate: float) -> None:
    """From w = 0, LR only scales w."""
    assume(bound(*rows) <= 300)
    runs = [mm.Perceptron(rows[0].shape[1]).to(double).fit(*rows, rate=LR, max_epochs=302) for LR in (1.0, rate)]
    assert runs[0] == runs[1]


def tight(n: int) -> Rows:
    """Rows e_1 … e_n without a bias in their way: the last column is its 1, and every target is 0."""
    return torch.eye(n, dtype=double), torch.zeros(n, 1, dtype=double)


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_equality_in_the_tight_case(n: int) -> None:
    """n rows at right angles, w = 0: each is a mistake once, because y = 1 at z = 0. R = 1, γ = 1/√n: n mistakes.

    The rule itself, without a bias, whose 1 would join the rows.
    """
    x, target = tight(n)
    w, made = torch.zeros(1, n, dtype=double), 0
    for row, wanted in zip(x.repeat(3, 1), target.repeat(3, 1), strict=True):
        prediction = sheet.threshold(sheet.affine(row, w))
        made += int((prediction != wanted).sum())
        w = w + sheet.perceptron_step(prediction, wanted, row, 1.0)[0]
    γ = (-(x @ w.t()) / w.norm()).min().item()
    assert made == n == pytest.approx((1 / γ) ** 2, rel=1e-12)


def test_xor_never_settles() -> None:
    """It cycles, and w does not grow (Minsky and Papert, 1969)."""
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=double)
    neuron = mm.Perceptron(2).to(double)
    made = neuron.fit(x, torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=double), max_epochs=500)
    assert min(made) > 0
    assert neuron.affine.weight.norm() < 3


def test_the_wrong_sign_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With += (y − ŷ) it runs away from what it should learn: the tests above would fail."""
    right: Callable[..., tuple[Tensor, Tensor]] = sheet.perceptron_step
    monkeypatch.setattr(sheet, "perceptron_step", lambda y, target, a, rate: right(target, y, a, rate))
    x, target = torch.tensor([[2.0], [-3.0]], dtype=double), torch.tensor([[1.0], [0.0]], dtype=double)
    largest = bound(x, target)
    assert largest < 10
    assert mistakes(x, target, largest) > largest
    with pytest.raises(AssertionError):
        test_equality_in_the_tight_case(4)
