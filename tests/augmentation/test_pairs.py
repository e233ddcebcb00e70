"""Pairs of views share the part of their volume that was asked for, and show the same anatomy there."""

from __future__ import annotations

import re

import pytest
import torch

from medssl.augmentation.pairs import overlapping_shifts, shift_for
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.draw import Draw
from medssl.errors import UsageError
from tests.augmentation.batches import make_batch, row_of

STILL = {
    "spatial": {
        "rotation": {"probability": 0},
        "scale": {"probability": 0},
        "mirror": {"probability": 0},
        "shift": 0.25,
    },
    "intensity": {},
}


def still_policy(patch, **spatial):
    overrides = {**STILL, "spatial": {**STILL["spatial"], **spatial}}
    return policy_for("none", ["MR"], patch, AugmentationSettings(overrides=overrides))


def shared(first, second, patch):
    return (1 - (first - second).abs() / torch.tensor(patch)).clamp(min=0).prod(dim=1)


@pytest.mark.parametrize("patch", [(16, 20, 18), (1, 20, 18), (1, 1, 64), (5, 6, 7)])
def test_overlaps_fill_the_asked_range_evenly_and_never_leave_it(patch):
    draw = Draw(0, range(600))
    reach = torch.floor(torch.tensor(patch) * 0.4 * (torch.tensor(patch) > 1)).repeat(600, 1)
    first, second = overlapping_shifts(draw, patch, reach, (0.35, 0.85))
    parts = shared(first, second, patch)
    assert parts.min() >= 0.35 and parts.max() <= 0.85
    assert parts.mean().item() == pytest.approx(0.6, abs=0.04)
    assert (first.abs() <= reach).all() and (second.abs() <= reach).all()
    moving = torch.tensor(patch) > 1
    assert ((first - second)[:, moving] > 0).any(dim=0).all() and ((first - second)[:, moving] < 0).any(dim=0).all()


def test_a_range_that_reaches_further_than_the_shift_starts_at_what_is_possible():
    first, second = overlapping_shifts(Draw(0, range(400)), (20, 20, 20), torch.full((400, 3), 2.0), (0.0, 1.0))
    parts = shared(first, second, (20, 20, 20))
    assert 0.51 < parts.min() < 0.6 and parts.max() > 0.95
    assert parts.mean().item() == pytest.approx((1 + 0.8**3) / 2, abs=0.03)


def test_shifts_do_not_depend_on_batch_mates_with_another_reach():
    reach = torch.tensor([[2.0, 2, 2], [8, 8, 8], [0, 4, 4]])
    together = overlapping_shifts(Draw(3, [5, 6, 7]), (20, 20, 20), reach, (0.5, 0.9))
    for row in range(3):
        alone = overlapping_shifts(Draw(3, [5 + row]), (20, 20, 20), reach[row : row + 1], (0.5, 0.9))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("patch", [(16, 20, 18), (20, 18)])
def test_a_pair_shows_the_same_voxels_where_its_boxes_intersect(patch):
    policy = still_policy(patch)
    batch = make_batch(policy.read_size, samples=6)
    first, second = policy.pair(batch, Draw(0, batch.sample_index), (0.4, 0.8))
    assert first.inside.all() and second.inside.all()
    three = (1,) * (3 - len(patch)) + patch
    apart = first.parameters["spatial"]["shift"] - second.parameters["spatial"]["shift"]
    parts = (1 - apart.abs() / torch.tensor(three)).prod(dim=1)
    assert ((parts >= 0.4) & (parts <= 0.8)).all() and len(parts.unique()) > 3
    for row in range(6):
        views = [view.image[row].reshape(-1, *three) for view in (first, second)]
        for axis, step in enumerate(apart[row].tolist(), start=1):
            edge = views[0].shape[axis] - abs(step)
            views = [views[0].narrow(axis, max(-step, 0), edge), views[1].narrow(axis, max(step, 0), edge)]
        assert torch.equal(*views)


def test_the_rest_of_the_two_views_is_drawn_apart_and_per_sample():
    policy = policy_for("contrastive", ["MR"], (12, 12, 12))
    batch = make_batch(policy.read_size, samples=8)
    first, second = policy.pair(batch, Draw(0, batch.sample_index), (0.3, 0.8))
    assert not torch.equal(*(view.parameters["spatial"]["angle_degrees"] for view in (first, second)))
    row = row_of(batch, 5)
    alone = policy.pair(row, Draw(0, row.sample_index), (0.3, 0.8))
    assert torch.equal(alone[1].image[0], second.image[5])


def test_the_shift_setting_makes_the_read_large_enough_for_the_largest_displacement():
    for shift in (0.1, 0.25, 0.5):
        policy = still_policy((16, 20, 18), shift=shift)
        assert policy.read_size == tuple(edge + 2 * int(shift * edge) for edge in (16, 20, 18))
        least = float(torch.tensor([1 - 2 * int(shift * edge) / edge for edge in (16, 20, 18)]).prod())
        batch = make_batch(policy.read_size, samples=4)
        first, second = policy.pair(batch, Draw(0, batch.sample_index), (least, least + 0.1))
        assert first.inside.all() and second.inside.all()


def test_a_shift_of_the_size_that_was_read_is_never_exceeded_by_rounding():
    policy = still_policy((100, 100), shift=0.29)
    batch = make_batch(policy.read_size, samples=2)
    first, second = policy.pair(batch, Draw(0, batch.sample_index), (0.3, 0.5))
    assert first.inside.all() and second.inside.all()


def test_shift_for_tells_the_smallest_setting_that_an_overlap_needs():
    assert shift_for(0.5, (96, 96, 96)) == 0.11
    for overlap, patch in ((0.3, (1000, 1000, 1000)), (0.5, (1, 1000, 1000))):
        exact = (1 - overlap ** (1 / sum(edge > 1 for edge in patch))) / 2
        assert exact <= shift_for(overlap, patch) < exact + 0.011


@pytest.mark.parametrize("patch", [(96, 96, 96), (16, 20, 18), (1, 33, 40), (9, 10, 12), (1, 1, 64), (2, 100, 100)])
@pytest.mark.parametrize("overlap", [(0.38, 0.5), (0.1, 0.6), (0.0, 0.2)])
def test_the_shift_that_an_error_advises_is_enough(patch, overlap):
    edges = torch.tensor(patch, dtype=torch.float64)
    draw = Draw(0, range(4))
    with pytest.raises(UsageError, match=r"Raise spatial\.shift to 0\.\d\d or more") as caught:
        overlapping_shifts(draw, patch, torch.zeros(4, 3), overlap)
    advised = float(re.search(r"shift to (0\.\d\d)", str(caught.value))[1])
    reach = torch.floor(advised * edges * (edges > 1)).repeat(4, 1)
    first, second = overlapping_shifts(draw, patch, reach, overlap)
    assert (shared(first, second, patch) <= overlap[1]).all()


def test_unusable_pairs_are_named_with_a_remedy():
    policy = still_policy((16, 20, 18), shift=0.1)
    batch = make_batch(policy.read_size)
    draw = Draw(0, batch.sample_index)
    with pytest.raises(UsageError, match=r"at least 0\.\d+ of their volume .*Raise spatial\.shift to 0\.2"):
        policy.pair(batch, draw, (0.1, 0.2))
    with pytest.raises(UsageError, match=r"narrower than one voxel of the patch \(16, 20, 18\)"):
        policy.pair(batch, draw, (0.7, 0.71))
    with pytest.raises(UsageError, match=r"0 <= low <= high <= 1; got \(0\.9, 0\.5\)"):
        policy.pair(batch, draw, (0.9, 0.5))
    with pytest.raises(UsageError, match=r"crops are \(16, 20, 18\) voxels; .*needs \(18, 24, 20\).*read_size"):
        policy.pair(make_batch((16, 20, 18)), draw, (0.7, 0.9))
