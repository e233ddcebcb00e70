"""Barlow Twins, its mixed regulariser, and VICReg."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.losses.decorrelation import barlow_twins, mixed_barlow, vicreg_terms
from tests.losses.conftest import TwoRanks
from tests.losses.references import Rows, mean, never_waits, random_rows

LOSSES = [barlow_twins, vicreg_terms, mixed_barlow]
Loss = Callable[..., Any]


def total(result: Tensor | dict[str, Tensor]) -> Tensor:
    return torch.stack(list(result.values())).sum() if isinstance(result, dict) else result


def batches(loss: Loss, dtype: torch.dtype = torch.float32, count: int = 6, width: int = 4) -> list[Tensor]:
    return [random_rows(seed, count, width, dtype) for seed in range(4 if loss is mixed_barlow else 2)]


def settings(loss: Loss) -> dict[str, Any]:
    return {"share": 0.3} if loss is mixed_barlow else {}


def columns(rows: Tensor) -> Rows:
    return [list(column) for column in zip(*rows.tolist(), strict=True)]


def standardised(rows: Tensor, eps: float = 1e-5) -> Rows:
    """Columns of mean 0 and, but for eps, variance 1."""
    result = []
    for column in columns(rows):
        centre = mean(column)
        spread = math.sqrt(mean((value - centre) ** 2 for value in column) + eps)
        result.append([(value - centre) / spread for value in column])
    return result


def correlation(left: Rows, right: Rows) -> Rows:
    return [[mean(x * y for x, y in zip(a, b, strict=True)) for b in right] for a in left]


def slow_barlow(first: Tensor, second: Tensor, weight: float) -> float:
    cross = correlation(standardised(first), standardised(second))
    width = range(len(cross))
    return sum((1 - cross[i][j]) ** 2 if i == j else weight * cross[i][j] ** 2 for i in width for j in width)


def slow_mixed(rows: list[Tensor], shares: list[float]) -> float:
    """The definition: correlations with the mixed image less the same mix of correlations, share by sample."""
    m, za, zb, zp = (standardised(row) for row in rows)
    from_a = [[share * x for share, x in zip(shares, column, strict=True)] for column in za]
    from_b = [[(1 - share) * x for share, x in zip(shares, column, strict=True)] for column in zp]
    result = 0.0
    for other in (za, zb):
        got, first, second = correlation(m, other), correlation(from_a, other), correlation(from_b, other)
        for i in range(len(m)):
            for j in range(len(m)):
                result += (got[i][j] - first[i][j] - second[i][j]) ** 2
    return result


def slow_vicreg(first: Tensor, second: Tensor) -> dict[str, float]:
    count, width = first.shape
    result = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0}
    for x, y in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
        result["invariance"] += (x - y) ** 2 / (count * width)
    for view in (columns(first), columns(second)):
        centred = [[value - mean(column) for value in column] for column in view]
        for i in range(width):
            for j in range(width):
                covariance = sum(x * y for x, y in zip(centred[i], centred[j], strict=True)) / (count - 1)
                if i == j:
                    result["variance"] += max(0.0, 1 - math.sqrt(covariance + 1e-4)) / width / 2
                else:
                    result["covariance"] += covariance**2 / width
    return result


def test_two_samples_cost_what_a_hand_computes() -> None:
    """Features are +1 and -1; the second feature of the second view is turned round."""
    first, second = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    value = barlow_twins(first, second, off_diagonal_weight=0.1, eps=0.0)
    assert value.item() == pytest.approx((0 + 4) + 0.1 * (1 + 1), rel=1e-6)
    assert mixed_barlow(second, first, second, second, share=1.0, eps=0.0).item() == pytest.approx(
        2 * (4 + 4), rel=1e-6
    )
    terms = vicreg_terms(first, second)
    assert terms["invariance"].item() == pytest.approx((0 + 4 + 0 + 4) / 4)
    assert terms["variance"].item() == 0
    assert terms["covariance"].item() == pytest.approx((2 * 2**2 + 2 * 2**2) / 2)


@pytest.mark.parametrize("weight", [0.005, 1.0])
def test_barlow_twins_equals_its_definition(weight: float) -> None:
    first, second = random_rows(0), random_rows(1)
    value = barlow_twins(first, second, off_diagonal_weight=weight)
    assert value.item() == pytest.approx(slow_barlow(first, second, weight), rel=1e-5)


@pytest.mark.parametrize("share", [0.3, torch.tensor(0.3), torch.linspace(0, 1, 6)], ids=["number", "scalar", "each"])
def test_the_mixed_regulariser_equals_its_definition(share: float | Tensor) -> None:
    rows = batches(mixed_barlow)
    shares = (share * torch.ones(6)).tolist()
    assert mixed_barlow(*rows, share=share).item() == pytest.approx(slow_mixed(rows, shares), rel=1e-4)


def test_vicreg_equals_its_definition() -> None:
    first, second = 0.8 * random_rows(0), 0.8 * random_rows(1)
    expected = slow_vicreg(first, second)
    assert expected["variance"] > 0
    assert {name: value.item() for name, value in vicreg_terms(first, second).items()} == pytest.approx(
        expected, rel=1e-5
    )


def test_features_of_mixed_images_that_are_the_mix_cost_nothing() -> None:
    """Where features are linear and the batch is its own mirror image, the mix of features is exact."""
    half = random_rows(0, 4, 3)
    first = torch.cat([half, -half])
    assert mixed_barlow(first, first, first, first, share=0.3, eps=0.0).item() == pytest.approx(0, abs=1e-8)
    assert mixed_barlow(first, first, first, -first, share=1.0, eps=0.0).item() == pytest.approx(0, abs=1e-8)
    assert mixed_barlow(first, first, first, -first, share=0.5, eps=0.0).item() > 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_order_of_samples_does_not_matter(loss: Loss) -> None:
    rows, order = batches(loss), torch.tensor([3, 1, 5, 0, 2, 4])
    value = total(loss(*rows, **settings(loss))).item()
    moved = total(loss(*(row[order] for row in rows), **settings(loss))).item()
    assert moved == pytest.approx(value, rel=1e-5)


def test_order_of_views_and_of_features_does_not_matter() -> None:
    first, second = random_rows(0), random_rows(1)
    for loss in (barlow_twins, vicreg_terms):
        value = total(loss(first, second)).item()
        assert total(loss(second, first)).item() == pytest.approx(value, rel=1e-5)
        assert total(loss(first.flip(1), second.flip(1))).item() == pytest.approx(value, rel=1e-5)


def test_scale_and_shift_of_a_feature_do_not_matter_to_barlow_twins() -> None:
    first, second = random_rows(0), random_rows(1)
    value = barlow_twins(first, second, eps=0.0).item()
    scale, shift = torch.tensor([1.0, 10.0, 0.1, 3.0]), torch.tensor([0.0, 5.0, -1.0, 2.0])
    assert barlow_twins(first * scale + shift, second, eps=0.0).item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_match_finite_differences(loss: Loss) -> None:
    rows = tuple(row.requires_grad_() for row in batches(loss, torch.float64, 4, 3))
    assert torch.autograd.gradcheck(lambda *given: total(loss(*given, **settings(loss))), rows)


def test_collapsed_rows_cost_what_each_loss_asks_for_a_constant() -> None:
    rows = torch.tensor([[1.0, -2.0, 0.5]]).expand(6, 3)
    assert barlow_twins(rows, rows).item() == pytest.approx(3)
    assert mixed_barlow(rows, rows, rows, rows, share=0.3).item() == 0
    terms = {name: value.item() for name, value in vicreg_terms(rows, rows).items()}
    assert terms == pytest.approx({"invariance": 0, "variance": 1 - math.sqrt(1e-4), "covariance": 0})


@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_feature_gives_no_nan(loss: Loss) -> None:
    rows = batches(loss)
    for row in rows:
        row[:, 1] = 2.0
        row.requires_grad_()
    total(loss(*rows, **settings(loss))).backward()
    assert all(row.grad is not None and torch.isfinite(row.grad).all() for row in rows)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_and_autocast_are_computed_in_float32(loss: Loss) -> None:
    rows = [row.bfloat16() for row in batches(loss)]
    value = total(loss(*rows, **settings(loss)))
    with torch.autocast("cpu", torch.bfloat16):
        cast = total(loss(*(row.float() for row in rows), **settings(loss)))
    assert value.dtype == cast.dtype == torch.float32
    assert value.item() == cast.item() == total(loss(*(row.float() for row in rows), **settings(loss))).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_equal_one_and_nothing_waits_for_the_device(loss: Loss, two_ranks: TwoRanks) -> None:
    two_ranks(loss, *batches(loss), **settings(loss))
    never_waits(loss, *batches(loss), **settings(loss))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("shape", "message"),
    [((6, 3), "batches of one shape"), ((6,), r"needs \(N, D\)"), ((1, 4), "at least 2 samples in the global batch")],
)
def test_unusable_batches_are_named(loss: Loss, shape: tuple[int, ...], message: str) -> None:
    rows = batches(loss)
    rows = [row[:1] for row in rows] if shape == (1, 4) else [torch.ones(shape), *rows[1:]]
    with pytest.raises(ValueError, match=message):
        loss(*rows, **settings(loss))


def test_unusable_shares_are_named() -> None:
    with pytest.raises(ValueError, match=r"one share or 6, got \(5,\)"):
        mixed_barlow(*batches(mixed_barlow), share=torch.ones(5))
