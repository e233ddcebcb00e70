"""Contrast of points by their distance in mm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.losses.voxel_contrast import pairs_by_distance, voxel_contrast
from tests.losses.references import dot, mean, random_rows, unit

COUNT = 8
#: Two volumes; in the first some points lie near each other, the last one is not valid.
PLACES = [[0, 0, 0], [1, 0, 0], [4, 0, 0], [30, 0, 0], [0, 0, 0], [0, 1, 0], [0, 20, 0], [0, 20, 0]]
GIVEN: dict[str, Any] = {
    "positions_mm": torch.tensor(PLACES, dtype=torch.float32),
    "groups": torch.tensor([5, 5, 5, 5, 7, 7, 7, 7]),
    "valid": torch.tensor([True] * 7 + [False]),
    "positive_mm": 1.5,
    "ignore_radius_mm": 6.0,
    "temperature": 0.3,
}


def slow(first: Tensor, second: Tensor, given: dict[str, Any], other_volumes: bool = True) -> float:
    """The definition, anchor by anchor in plain Python and with exponentials."""
    places, groups, valid = given["positions_mm"].tolist(), given["groups"].tolist(), given["valid"].tolist()
    costs = []
    for anchors, others in ((unit(first), unit(second)), (unit(second), unit(first))):
        for i in range(len(anchors)):
            positives, negatives = [], 0.0
            for j in range(len(others)):
                together, distance = groups[i] == groups[j], math.dist(places[i], places[j])
                power = math.exp(dot(anchors[i], others[j]) / given["temperature"])
                if not valid[j]:
                    continue
                if together and distance <= given["positive_mm"]:
                    positives.append(power)
                elif (together and distance >= given["ignore_radius_mm"]) or (not together and other_volumes):
                    negatives += power
            if valid[i]:
                costs.append(mean(-math.log(power / (power + negatives)) for power in positives))
    return mean(costs)


@pytest.mark.parametrize("other_volumes", [True, False])
def test_it_equals_its_definition(other_volumes: bool) -> None:
    first, second = random_rows(0, COUNT), random_rows(1, COUNT)
    value = voxel_contrast(first, second, **GIVEN, other_volumes=other_volumes).item()
    assert value == pytest.approx(slow(first, second, GIVEN, other_volumes), rel=1e-5)


def test_two_far_points_cost_what_a_hand_computes() -> None:
    rows = torch.eye(2)
    far = {"positions_mm": torch.tensor([[0.0, 0, 0], [9, 0, 0]]), "groups": torch.tensor([1, 1])}
    value = voxel_contrast(rows, 2 * rows, **far, positive_mm=0, ignore_radius_mm=5, temperature=1.0)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)


def test_collapsed_embeddings_cost_the_logarithm_of_one_and_the_negatives() -> None:
    rows = torch.ones(COUNT, 3)
    _, negative = pairs_by_distance(
        GIVEN["positions_mm"], GIVEN["groups"], positive_mm=1.5, ignore_radius_mm=6.0, valid=GIVEN["valid"]
    )
    expected = mean(math.log(1 + count) for count in negative.sum(dim=1)[:7].tolist())
    assert voxel_contrast(rows, rows, **GIVEN).item() == pytest.approx(expected, rel=1e-5)


def test_points_are_positive_ignored_or_negative_by_their_distance_in_mm() -> None:
    positive, negative = pairs_by_distance(
        GIVEN["positions_mm"], GIVEN["groups"], positive_mm=1.5, ignore_radius_mm=6.0, valid=GIVEN["valid"]
    )
    assert positive[0].tolist() == [True, True] + [False] * 6
    assert negative[0].tolist() == [False, False, False, True, True, True, True, False]
    assert not positive[7].any() and not negative[7].any()
    assert torch.equal(positive, positive.T) and torch.equal(negative, negative.T)


def test_at_a_radius_of_nothing_each_point_is_its_own_positive_however_far_from_the_origin() -> None:
    places = 1000 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    positive, negative = pairs_by_distance(
        places, torch.zeros(50, dtype=torch.int64), positive_mm=0, ignore_radius_mm=0
    )
    assert torch.equal(positive, torch.eye(50, dtype=torch.bool)) and torch.equal(negative, ~positive)


def test_what_an_ignored_or_invalid_point_looks_like_does_not_matter() -> None:
    first, second = random_rows(0, COUNT), random_rows(1, COUNT)
    value = voxel_contrast(first, second, **GIVEN).item()
    spoilt = second.clone()
    spoilt[7] = 100 * first[0]
    assert voxel_contrast(first, spoilt, **GIVEN).item() == pytest.approx(value, rel=1e-6)
    ignored = {"positions_mm": torch.tensor([[0.0, 0, 0], [3, 0, 0]]), "groups": torch.tensor([1, 1])}
    radii = {"positive_mm": 1.0, "ignore_radius_mm": 5.0, "temperature": 0.5}
    assert voxel_contrast(first[:2], second[:2], **ignored, **radii).item() == 0


def test_order_of_points_and_of_views_and_length_of_rows_do_not_matter() -> None:
    first, second = random_rows(0, COUNT), random_rows(1, COUNT)
    value = voxel_contrast(first, second, **GIVEN).item()
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    moved = GIVEN | {name: GIVEN[name][order] for name in ("positions_mm", "groups", "valid")}
    assert voxel_contrast(7 * second[order], first[order], **moved).item() == pytest.approx(value, rel=1e-5)


def test_gradients_match_finite_differences() -> None:
    first, second = (random_rows(seed, COUNT, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: voxel_contrast(a, b, **GIVEN), (first, second))


def test_bfloat16_gives_a_finite_loss_in_float32() -> None:
    value = voxel_contrast(random_rows(0, COUNT).bfloat16(), random_rows(1, COUNT).bfloat16(), **GIVEN)
    assert value.dtype == torch.float32 and torch.isfinite(value)


def test_low_temperatures_do_not_overflow_and_a_batch_without_points_costs_nothing() -> None:
    first, second = random_rows(0, COUNT).requires_grad_(), random_rows(1, COUNT).requires_grad_()
    assert torch.isfinite(voxel_contrast(first, second, **(GIVEN | {"temperature": 1e-4})))
    nothing = voxel_contrast(first, second, **(GIVEN | {"valid": torch.zeros(COUNT, dtype=torch.bool)}))
    nothing.backward()
    assert nothing.item() == 0 and first.grad is not None and first.grad.abs().sum() == 0


def test_two_ranks_compute_what_one_does(two_ranks) -> None:
    two_ranks(voxel_contrast, random_rows(0, COUNT), random_rows(1, COUNT), **GIVEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature above 0"),
        ({"positive_mm": 7.0}, "positive_mm <= ignore_radius_mm"),
        ({"positions_mm": torch.zeros(COUNT, 2)}, "positions of shape"),
        ({"positions_mm": torch.zeros(4, 3), "groups": torch.zeros(4, dtype=torch.int64), "valid": None}, "each of 8"),
        ({"groups": torch.zeros(COUNT)}, "integer group"),
        ({"valid": torch.ones(COUNT)}, "'valid' of shape"),
    ],
)
def test_unusable_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        voxel_contrast(random_rows(0, COUNT), random_rows(1, COUNT), **(GIVEN | change))
