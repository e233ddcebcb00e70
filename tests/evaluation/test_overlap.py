"""Overlap and surface distances against slow definitions, known values and a peer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.evaluation.overlap import scores, surface

SPACING = (3.0, 0.7, 1.1)


def slow_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels with a face neighbour outside the mask or outside the image, by plain loops."""
    found = []
    for voxel in itertools.product(*map(range, mask.shape)):
        if not mask[voxel]:
            continue
        for axis in range(mask.ndim):
            if mask.shape[axis] == 1:
                continue
            for step in (-1, 1):
                other = list(voxel)
                other[axis] += step
                if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                    found.append(voxel)
    return sorted(set(found))


def slow_distances(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    """Distance of each surface voxel of a to the nearest one of b, by comparing every pair."""

    def place(voxel: tuple[int, ...]) -> list[float]:
        return [index * step for index, step in zip(voxel, spacing, strict=True)]

    return [min(math.dist(place(p), place(q)) for q in slow_surface(b)) for p in slow_surface(a)]


def slow_percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between closest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def blobs(seed: int, shape: tuple[int, int, int] = (5, 8, 7)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.35, rng.random(shape) < 0.3


@pytest.mark.parametrize("seed", range(4))
def test_every_metric_equals_its_definition(seed: int) -> None:
    a, b = blobs(seed)
    got = scores(a, b, SPACING)
    there, back = slow_distances(a, b, SPACING), slow_distances(b, a, SPACING)
    common = sum(bool(x) and bool(y) for x, y in zip(a.flat, b.flat, strict=False))
    assert got.dice == pytest.approx(2 * common / (a.sum() + b.sum()))
    assert got.jaccard == pytest.approx(common / (a | b).sum())
    assert got.hd95_mm == pytest.approx(max(slow_percentile(there, 95), slow_percentile(back, 95)))
    assert got.assd_mm == pytest.approx((sum(there) + sum(back)) / (len(there) + len(back)))
    assert got.volume_ml == pytest.approx(a.sum() * 3.0 * 0.7 * 1.1 / 1000)


def test_surface_is_the_set_of_voxels_that_touch_the_outside() -> None:
    mask = np.zeros((7, 7, 7), bool)
    mask[1:6, 1:6, 0:6] = True
    assert sorted(map(tuple, np.argwhere(surface(mask)))) == slow_surface(mask)


def test_a_shift_along_one_axis_is_measured_in_its_own_millimetres() -> None:
    a = np.zeros((9, 9, 9), bool)
    a[4, 4, 4] = True
    for axis, millimetres in enumerate(SPACING):
        got = scores(np.roll(a, 2, axis), a, SPACING)
        assert got.hd95_mm == pytest.approx(2 * millimetres) and got.assd_mm == pytest.approx(2 * millimetres)


def test_equal_masks_are_perfect() -> None:
    a, _ = blobs(0)
    got = scores(a, a, SPACING)
    assert (got.dice, got.jaccard, got.hd95_mm, got.assd_mm, got.outcome) == (1.0, 1.0, 0.0, 0.0, "both")


def test_an_image_of_one_slice_is_measured_in_its_plane() -> None:
    a = np.zeros((1, 9, 9), bool)
    a[0, 2:7, 2:7] = True
    b = np.zeros_like(a)
    b[0, 4, 4] = True
    assert surface(a).sum() == 16  # the ring, not all 25
    assert scores(a, b, (5.0, 1.0, 1.0)).hd95_mm == pytest.approx(
        max(slow_percentile(slow_distances(a, b, (5, 1, 1)), 95), slow_percentile(slow_distances(b, a, (5, 1, 1)), 95))
    )


@pytest.mark.parametrize(("found", "there", "outcome"), [(True, False, "spurious"), (False, True, "missed")])
def test_one_empty_mask_is_zero_overlap_and_never_a_distance(found: bool, there: bool, outcome: str) -> None:
    mask, empty = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    got = scores(mask if found else empty, mask if there else empty, SPACING)
    assert (got.dice, got.jaccard, got.outcome) == (0.0, 0.0, outcome)
    assert math.isnan(got.hd95_mm) and math.isnan(got.assd_mm)


def test_two_empty_masks_measure_nothing() -> None:
    got = scores(np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool), SPACING)
    assert got.outcome == "absent"
    assert all(math.isnan(value) for value in (got.dice, got.jaccard, got.hd95_mm, got.assd_mm))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_metrics_do_not_depend_on_order_of_masks_or_flips_or_axes(seed: int) -> None:
    a, b = blobs(seed, (4, 5, 6))
    first = scores(a, b, SPACING)
    flipped = scores(a[::-1, :, ::-1], b[::-1, :, ::-1], SPACING)
    turned = scores(a.transpose(2, 0, 1), b.transpose(2, 0, 1), (SPACING[2], SPACING[0], SPACING[1]))
    swapped = scores(b, a, SPACING)
    for other in (flipped, turned, swapped):
        assert (other.dice, other.hd95_mm, other.assd_mm) == pytest.approx((first.dice, first.hd95_mm, first.assd_mm))
    assert first.jaccard == pytest.approx(first.dice / (2 - first.dice))


def test_distances_equal_monais() -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    a, b = np.zeros((2, 12, 14, 16), bool)
    a[2:9, 3:11, 4:12] = True
    b[4:10, 2:9, 5:14] = True
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (a, b)]
    hd95 = metrics.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=SPACING)
    assd = metrics.compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=SPACING)
    got = scores(a, b, SPACING)
    assert got.hd95_mm == pytest.approx(hd95.item(), rel=1e-5)
    assert got.assd_mm == pytest.approx(assd.item(), rel=1e-5)


def test_masks_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        scores(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), SPACING)
