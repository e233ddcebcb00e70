"""Regression of a target's direction: BYOL and SimSiam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medssl.losses.cosine import byol, cosine_regression, negative_cosine, simsiam
from tests.losses.conftest import TwoRanks
from tests.losses.references import dot, mean, never_waits, random_rows, unit

Symmetric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SYMMETRIC = [byol, simsiam]


def slow_cosine(left: Tensor, right: Tensor) -> float:
    return mean(dot(x, y) for x, y in zip(unit(left), unit(right), strict=True))


def test_right_and_straight_angles_cost_what_a_hand_computes() -> None:
    prediction = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    target = torch.tensor([[5.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    assert cosine_regression(prediction, target).item() == pytest.approx((0 + 2 + 4) / 3)
    assert negative_cosine(prediction, target).item() == pytest.approx((-1 + 0 + 1) / 3)


def test_regression_is_the_squared_distance_of_unit_rows() -> None:
    first, second = random_rows(0), random_rows(1)
    squares = mean(
        sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in zip(unit(first), unit(second), strict=True)
    )
    assert cosine_regression(first, second).item() == pytest.approx(squares, rel=1e-5)
    assert negative_cosine(first, second).item() == pytest.approx(-slow_cosine(first, second), rel=1e-5)


def test_each_view_predicts_the_other_views_target() -> None:
    p_a, p_b, t_a, t_b = (random_rows(seed) for seed in range(4))
    crossed = slow_cosine(p_a, t_b) + slow_cosine(p_b, t_a)
    assert byol(p_a, p_b, t_a, t_b).item() == pytest.approx(4 - 2 * crossed, rel=1e-5)
    assert simsiam(p_a, p_b, t_a, t_b).item() == pytest.approx(-crossed / 2, rel=1e-5)


@pytest.mark.parametrize("loss", SYMMETRIC)
def test_order_of_samples_and_of_views_and_length_of_rows_do_not_matter(loss: Symmetric) -> None:
    p_a, p_b, t_a, t_b = (random_rows(seed) for seed in range(4))
    value = loss(p_a, p_b, t_a, t_b).item()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = loss(p_a[order], p_b[order], t_a[order], t_b[order]).item()
    assert (moved, loss(p_b, p_a, t_b, t_a).item()) == pytest.approx((value, value), rel=1e-5)
    assert loss(2 * p_a, p_b / 3, 5 * t_a, t_b / 7).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", SYMMETRIC)
def test_gradients_of_predictions_match_finite_differences(loss: Symmetric) -> None:
    p_a, p_b = (random_rows(seed, 3, 4, torch.float64).requires_grad_() for seed in (0, 1))
    t_a, t_b = (random_rows(seed, 3, 4, torch.float64) for seed in (2, 3))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, t_a, t_b), (p_a, p_b))


@pytest.mark.parametrize("loss", SYMMETRIC)
def test_targets_get_no_gradient(loss: Symmetric) -> None:
    p_a, p_b, t_a, t_b = (random_rows(seed).requires_grad_() for seed in range(4))
    loss(p_a, p_b, t_a, t_b).backward()
    assert p_a.grad is not None and p_b.grad is not None
    assert t_a.grad is None and t_b.grad is None


def test_collapsed_rows_reach_the_lowest_value() -> None:
    rows = torch.tensor([[1.0, -2.0, 0.5]]).expand(6, 3)
    assert byol(rows, rows, rows, rows).item() == pytest.approx(0, abs=1e-6)
    assert simsiam(rows, rows, rows, rows).item() == pytest.approx(-1, rel=1e-6)


@pytest.mark.parametrize("loss", SYMMETRIC)
def test_a_row_of_zeros_gives_no_nan(loss: Symmetric) -> None:
    prediction = torch.zeros(2, 3).requires_grad_()
    loss(prediction, prediction, torch.ones(2, 3), torch.zeros(2, 3)).backward()
    assert prediction.grad is not None and torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize("loss", SYMMETRIC)
def test_half_precision_is_computed_in_float32(loss: Symmetric) -> None:
    rows = [random_rows(seed).bfloat16() for seed in range(4)]
    value = loss(*rows)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(*(row.float() for row in rows))
    assert value.dtype == torch.float32
    assert value.item() == cast.item() == loss(*(row.float() for row in rows)).item()


@pytest.mark.parametrize("loss", SYMMETRIC)
def test_two_ranks_equal_one_and_nothing_waits_for_the_device(loss: Symmetric, two_ranks: TwoRanks) -> None:
    p_a, p_b, t_a, t_b = (random_rows(seed) for seed in range(4))
    names = ("target_a", "target_b") if loss is byol else ("projection_a", "projection_b")
    targets = dict(zip(names, (t_a, t_b), strict=True))
    two_ranks(loss, p_a, p_b, **targets)
    never_waits(loss, p_a, p_b, **targets)


@pytest.mark.parametrize("loss", SYMMETRIC)
@pytest.mark.parametrize("shape", [(5, 4), (6, 3), (6,)])
def test_unusable_batches_are_named(loss: Symmetric, shape: tuple[int, ...]) -> None:
    rows = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"needs \(N, D\) batches of one shape"):
        loss(rows, rows, torch.ones(shape), rows)
