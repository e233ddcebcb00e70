"""SupCon with any number of views, and contrast with weighted positives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.losses.contrast import nt_xent
from medssl.losses.supcon import supcon, supcon_of_views
from medssl.losses.weighted_contrast import position_weights, weighted_contrast
from tests.losses.conftest import TwoRanks
from tests.losses.references import Rows, dot, mean, never_waits, random_rows, unit

GROUPS = torch.tensor([0, 1, 0, 2, 1, 3])
POSITIONS = torch.tensor([0.0, 0.1, 0.15, 0.5, 0.6, 1.0])


def slow(rows: Rows, samples: list[int], weights: Tensor, temperature: float, known: list[bool] | None = None) -> float:
    """Row by row: the weighted mean over positives of minus the logarithm of their share of the exponentials."""
    losses = []
    for i, row in enumerate(rows):
        seen = []
        for j in range(len(rows)):
            doubtful = known is not None and not (known[samples[i]] and known[samples[j]])
            if j != i and not (doubtful and samples[i] != samples[j]):
                seen.append(j)
        powers = {j: math.exp(dot(row, rows[j]) / temperature) for j in seen}
        total, mass = 0.0, 0.0
        for j in seen:
            weight = weights[samples[i], samples[j]].item()
            total -= weight * math.log(powers[j] / sum(powers.values()))
            mass += weight
        losses.append(total / mass if mass else 0.0)
    return mean(losses)


def alike(groups: Tensor) -> Tensor:
    return (groups[:, None] == groups[None, :]).float()


def test_the_mean_over_positives_stands_outside_the_logarithm() -> None:
    """One group, two samples on one axis and one off it: by hand, and not what a sum inside would give."""
    features = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    value = supcon_of_views(features, temperature=1.0, groups=torch.zeros(3, dtype=torch.int64))
    on_axis = -(math.log(math.e / (math.e + 1)) + math.log(1 / (math.e + 1))) / 2
    assert value.item() == pytest.approx((2 * on_axis + math.log(2)) / 3, rel=1e-6)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_any_number_of_views_equals_the_definition(views: int) -> None:
    features = torch.stack([random_rows(seed) for seed in range(views)], dim=1)
    samples = [sample for sample in range(6) for _ in range(views)]
    value = supcon_of_views(features, temperature=0.3, groups=GROUPS)
    assert value.item() == pytest.approx(slow(unit(features.flatten(0, 1)), samples, alike(GROUPS), 0.3), rel=1e-5)


def test_order_of_views_and_samples_does_not_matter() -> None:
    features = torch.stack([random_rows(seed) for seed in range(3)], dim=1)
    order = torch.tensor([4, 2, 0, 1, 5, 3])
    value = supcon_of_views(features, temperature=0.3, groups=GROUPS).item()
    moved = supcon_of_views(features[order][:, [2, 0, 1]], temperature=0.3, groups=GROUPS[order])
    assert moved.item() == pytest.approx(value, rel=1e-5)


def test_two_views_without_groups_are_nt_xent() -> None:
    features = torch.stack([random_rows(0), random_rows(1)], dim=1)
    expected = nt_xent(features[:, 0], features[:, 1], temperature=0.3)
    assert supcon_of_views(features, temperature=0.3).item() == pytest.approx(expected.item(), rel=1e-5)


def test_collapsed_views_cost_the_logarithm_of_the_other_rows() -> None:
    value = supcon_of_views(torch.ones(4, 3, 5), temperature=0.1, groups=torch.tensor([0, 0, 1, 2]))
    assert value.item() == pytest.approx(math.log(11), rel=1e-5)


def test_a_row_without_positive_costs_nothing() -> None:
    assert supcon_of_views(random_rows(0)[:, None], temperature=0.1).item() == 0


def test_views_in_half_precision_are_computed_in_float32() -> None:
    features = torch.stack([random_rows(0), random_rows(1)], dim=1).bfloat16()
    value = supcon_of_views(features, temperature=0.01, groups=GROUPS)
    assert value.dtype == torch.float32
    assert value.item() == supcon_of_views(features.float(), temperature=0.01, groups=GROUPS).item()


def test_gradients_of_views_match_finite_differences() -> None:
    features = random_rows(0, 4, 6, torch.float64).reshape(4, 2, 3).requires_grad_()
    groups = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda z: supcon_of_views(z, temperature=0.5, groups=groups), (features,))


def test_views_of_two_ranks_equal_one_and_wait_for_nothing(two_ranks: TwoRanks) -> None:
    features = torch.stack([random_rows(seed) for seed in range(3)], dim=1)
    two_ranks(supcon_of_views, features, temperature=0.3, groups=GROUPS)
    never_waits(supcon_of_views, features, temperature=0.3, groups=GROUPS)


@pytest.mark.parametrize("shape", [(4, 3), (1, 1, 3)])
def test_unusable_views_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"SupCon needs \(N, V, D\) features"):
        supcon_of_views(torch.ones(shape), temperature=0.1)


def test_weights_of_zero_and_one_are_supcon() -> None:
    first, second = random_rows(0), random_rows(1)
    value = weighted_contrast(first, second, alike(GROUPS), temperature=0.3)
    assert value.item() == pytest.approx(supcon(first, second, temperature=0.3, groups=GROUPS).item(), rel=1e-6)


def test_a_half_positive_costs_half_as_much_as_its_partner() -> None:
    """Rows e1, e2 twice, weight 1/2 across: each anchor has a positive at cosine 1 and two of half weight at 0."""
    weights = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    value = weighted_contrast(torch.eye(2), torch.eye(2), weights, temperature=1.0)
    total = math.e + 2
    assert value.item() == pytest.approx((math.log(total / math.e) + math.log(total)) / 2, rel=1e-6)


@pytest.mark.parametrize("known", [None, [True, True, False, True, False, True]])
def test_weighted_contrast_equals_its_definition(known: list[bool] | None) -> None:
    first, second = random_rows(2), random_rows(3)
    weights = position_weights(POSITIONS, sigma=0.2)
    given = None if known is None else torch.tensor(known)
    value = weighted_contrast(first, second, weights, temperature=0.3, known=given)
    rows = unit(torch.cat([first, second]))
    assert value.item() == pytest.approx(slow(rows, [*range(6), *range(6)], weights, 0.3, known), rel=1e-5)


def test_order_of_samples_and_views_does_not_matter_to_weighted_contrast() -> None:
    first, second, order = random_rows(2), random_rows(3), torch.tensor([4, 2, 0, 1, 5, 3])
    weights = position_weights(POSITIONS, sigma=0.2)
    value = weighted_contrast(first, second, weights, temperature=0.3).item()
    moved = weighted_contrast(5 * second[order], first[order], weights[order][:, order], temperature=0.3)
    assert moved.item() == pytest.approx(value, rel=1e-5)


def test_gradients_of_weighted_contrast_match_finite_differences() -> None:
    first, second = (random_rows(seed, 4, 3, torch.float64).requires_grad_() for seed in (0, 1))
    weights = position_weights(POSITIONS[:4].double(), sigma=0.2)
    known = torch.tensor([True, True, True, False])
    assert torch.autograd.gradcheck(
        lambda a, b: weighted_contrast(a, b, weights, temperature=0.5, known=known), (first, second)
    )


def test_collapsed_rows_cost_the_logarithm_of_the_other_rows_whatever_the_weights() -> None:
    value = weighted_contrast(torch.ones(6, 3), torch.ones(6, 3), position_weights(POSITIONS, sigma=1), temperature=0.1)
    assert value.item() == pytest.approx(math.log(11), rel=1e-5)


def test_weighted_contrast_of_half_precision_is_computed_in_float32() -> None:
    first, second = random_rows(0).bfloat16(), random_rows(1).bfloat16()
    weights = position_weights(POSITIONS, sigma=0.2)
    value = weighted_contrast(first, second, weights, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        cast = weighted_contrast(first.float(), second.float(), weights, temperature=0.01)
    assert value.dtype == torch.float32
    assert value.item() == cast.item()
    assert math.isfinite(value.item())


def test_weighted_contrast_of_two_ranks_equals_one_and_waits_for_nothing(two_ranks: TwoRanks) -> None:
    keywords = {"weights": position_weights(POSITIONS, sigma=0.2), "temperature": 0.3, "known": POSITIONS < 0.55}
    two_ranks(weighted_contrast, random_rows(0), random_rows(1), **keywords)
    never_waits(weighted_contrast, random_rows(0), random_rows(1), **keywords)


def test_a_sample_of_unknown_position_learns_from_its_own_views_alone() -> None:
    first, second = random_rows(0), random_rows(1)
    known = torch.tensor([True] * 5 + [False])
    weights = position_weights(POSITIONS, sigma=0.2, known=known)
    value = weighted_contrast(first, second, weights, temperature=0.3, known=known)
    without = weighted_contrast(first[:5], second[:5], weights[:5, :5], temperature=0.3)
    assert value.item() == pytest.approx(without.item() * 5 / 6, rel=1e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"weights": torch.ones(4, 5)}, r"needs \(N, N\) weights, got \(4, 5\)"),
        ({"temperature": -1.0}, "temperature above 0"),
        ({"known": torch.ones(4)}, "'known' needs shape"),
        ({"first": torch.ones(5, 4)}, "batches of one shape"),
    ],
)
def test_unusable_weighted_batches_are_named(keywords: dict[str, object], message: str) -> None:
    usable = {"first": torch.ones(4, 4), "second": torch.ones(4, 4), "weights": torch.ones(4, 4), "temperature": 0.1}
    with pytest.raises(ValueError, match=message):
        weighted_contrast(**{**usable, **keywords})  # type: ignore[arg-type]


def test_weights_fall_with_distance_as_a_gaussian() -> None:
    weights = position_weights(torch.tensor([0.0, 0.3, 0.9]), sigma=0.3)
    expected = torch.tensor([[0, 1, 9], [1, 0, 4], [9, 4, 0]])
    torch.testing.assert_close(weights, torch.exp(-expected / 2))
    in_space = position_weights(torch.tensor([[0, 0, 0], [30, 40, 0]]), sigma=25.0)
    assert in_space[0, 1].item() == pytest.approx(math.exp(-2), rel=1e-6)


def test_unknown_positions_weigh_nothing_even_where_they_are_not_numbers() -> None:
    positions = torch.tensor([0.0, float("nan"), 0.0])
    weights = position_weights(positions, sigma=0.1, known=torch.tensor([True, False, True]))
    assert weights.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_unusable_positions_are_named() -> None:
    with pytest.raises(ValueError, match="sigma above 0, got 0"):
        position_weights(POSITIONS, sigma=0)
    with pytest.raises(ValueError, match=r"\(N,\) or \(N, P\), got \(1, 1, 1\)"):
        position_weights(torch.ones(1, 1, 1), sigma=1)
    with pytest.raises(ValueError, match="'known' needs shape"):
        position_weights(POSITIONS, sigma=1, known=torch.ones(2, dtype=torch.bool))
