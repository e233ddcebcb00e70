"""Rising curves: they keep order and range, cut off nothing, and equal their definitions and MONAI's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.transforms import RandHistogramShift
from pydantic import ValidationError
from scipy.optimize import brentq

from medssl.augmentation.curves import KNOTS, Bezier, BezierSettings, HistogramShift, bezier_table, looked_up
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw

SHAPES = [(4, 2, 7, 9, 11), (4, 2, 13, 11)]
every = pytest.mark.parametrize("kind", [Bezier, HistogramShift])


def images(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def facts_of(image) -> Facts:
    return Facts(("MR",) * len(image), torch.ones(len(image), 3), tuple(image.shape[2:]), image.shape[1])


def changed(kind, image, first=0, seed=0, **settings):
    transform = kind({"MR": kind.settings_class(**{"probability": 1.0, **settings})})
    drawn = transform.draw(facts_of(image), Draw(seed, range(first, first + len(image))))
    return transform.apply(image, drawn), drawn


def slow_bezier(x, points):
    """Solve the cubic for each value on its own."""

    def at(t, axis):
        return 3 * (1 - t) ** 2 * t * points[0][axis] + 3 * (1 - t) * t**2 * points[1][axis] + t**3

    return np.array([at(brentq(lambda t, value=value: at(t, 0) - value, 0, 1, xtol=1e-14), 1) for value in x])


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_strength_is_the_identity_bit_for_bit(kind, shape):
    image = images(shape)
    assert torch.equal(changed(kind, image, strength=0.0)[0], image)


@every
def test_a_small_strength_is_a_small_change(kind):
    image = images((4, 1, 12, 12))
    result, _ = changed(kind, image, strength=1e-4)
    assert 0 < (result - image).abs().max() < 1e-3


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_order_and_range_of_each_channel_are_kept(kind, shape):
    image = images(shape)
    for seed in range(20):
        result, _ = changed(kind, image, seed=seed)
        flat, before = result.flatten(2), image.flatten(2)
        assert torch.allclose(flat.amin(dim=2), before.amin(dim=2), atol=1e-6)
        assert torch.allclose(flat.amax(dim=2), before.amax(dim=2), atol=1e-6)
        assert (flat <= before.amax(dim=2, keepdim=True)).all() and (flat >= before.amin(dim=2, keepdim=True)).all()
        rising = flat.gather(2, before.argsort(dim=2)).diff(dim=2)
        assert (rising >= -1e-6).all()


@every
def test_values_of_a_normalised_image_below_0_and_above_1_are_not_cut_off(kind):
    image = images((20, 1, 40, 40))
    result, _ = changed(kind, image)
    low, high = (
        torch.stack([getattr(one, name)(dim=1) for one in image.flatten(1)[:, None]]) for name in ("amin", "amax")
    )
    at_an_end = ((result.flatten(1) - low).abs() < 1e-6) | ((result.flatten(1) - high).abs() < 1e-6)
    # A curve may be flat near an end, but one that cuts at 0 and 1 takes two thirds of the voxels.
    assert at_an_end.float().mean() < 0.05
    assert len(result.unique()) > 0.9 * len(image.unique())


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_is_changed_alike_alone_and_in_a_batch(kind, shape):
    image = images(shape)
    together, drawn = changed(kind, image, probability=0.7, per_channel=0.6)
    assert 0 < drawn["active"].sum() < drawn["active"].numel()
    for row in range(len(image)):
        alone, own = changed(kind, image[row : row + 1], first=row, probability=0.7, per_channel=0.6)
        assert torch.equal(alone[0], together[row])
        assert all(torch.equal(own[key][0], drawn[key][row]) for key in drawn)


@every
def test_the_same_draw_repeats_and_samples_and_channels_differ(kind):
    image = images((1, 1, 16, 16)).repeat(3, 2, 1, 1)
    result, _ = changed(kind, image)
    assert torch.equal(result, changed(kind, image)[0])
    assert len({tuple(one.flatten().tolist()) for one in result.flatten(0, 1)}) == 6


@every
def test_input_dtype_and_shape_are_kept(kind):
    image = images((2, 1, 8, 8, 8)).double()
    before = image.clone()
    result, _ = changed(kind, image)
    assert torch.equal(image, before) and result.dtype == torch.float64 and result.shape == image.shape


@every
@pytest.mark.parametrize("shape", [(2, 1, 6, 6, 6), (2, 1, 1, 1, 1), (2, 1, 1, 5, 5), (2, 1, 1, 1)])
def test_constant_images_and_single_voxels_are_kept(kind, shape):
    image = torch.full(shape, 3.0)
    assert torch.equal(changed(kind, image)[0], image)


@every
def test_a_voxel_that_is_not_finite_harms_no_other_sample(kind):
    image = images((2, 1, 8, 8))
    expected = changed(kind, image)[0][1]
    image[0, 0, 4, 4] = math.nan
    result, _ = changed(kind, image)
    assert result[0, 0, 4, 4].isnan() and torch.equal(result[1], expected)


@every
def test_modalities_whose_numbers_have_a_unit_are_refused(kind):
    assert not any(kind.fits(name) for name in ("CT", "PT", "NM"))
    assert all(kind.fits(name) for name in ("MR", "US", "XR", "IMAGE"))


def test_bezier_equals_the_solved_cubic():
    image = images((6, 1, 9, 9))
    result, drawn = changed(Bezier, image, strength=0.8)
    diagonal = np.array([[1, 1], [2, 2]]) / 3
    for before, after, points in zip(image, result, drawn["points"][:, 0].double().numpy(), strict=True):
        low, high = float(before.min()), float(before.max())
        unit = ((before.double() - low) / (high - low)).clamp(0, 1).flatten().numpy()
        slow = low + (high - low) * slow_bezier(unit, diagonal + 0.8 * (points - diagonal))
        assert np.abs(after.flatten().numpy() - slow).max() < 2e-3


@pytest.mark.parametrize(
    "points", [[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 1], [0, 1]]]
)
def test_a_curve_at_the_edge_of_what_can_be_drawn_still_rises_from_0_to_1(points):
    table = bezier_table(torch.tensor([points], dtype=torch.float64), KNOTS)[0]
    assert table[0] == 0 and table[-1] == 1 and table.isfinite().all() and (table.diff() >= 0).all()


def test_control_points_fill_the_unit_square():
    image = torch.zeros(500, 1, 1, 1)
    points = Bezier({"MR": BezierSettings()}).draw(facts_of(image), Draw(0, range(500)))["points"].reshape(-1, 2)
    cells = (points * 3).long()
    share = torch.bincount(cells[:, 0] * 3 + cells[:, 1], minlength=9) / len(points)
    assert torch.allclose(share, torch.full((9,), 1 / 9), atol=0.04)


def test_a_table_is_read_as_linear_interpolation():
    table = torch.tensor([0.0, 0.1, 0.15, 0.8, 1.0], dtype=torch.float64)
    x = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:5] = torch.linspace(0, 1, 5)
    assert (
        np.abs(looked_up(x.clone(), table).numpy() - np.interp(x.numpy(), np.linspace(0, 1, 5), table.numpy())).max()
        < 1e-12
    )


@pytest.mark.parametrize("points", [3, 10, 17])
def test_histogram_shift_equals_monai_with_the_same_points(points):
    image = images((3, 1, 9, 10, 8))
    result, drawn = changed(HistogramShift, image, points=(points, points))
    for row in range(3):
        peer = RandHistogramShift(points, prob=1.0)
        peer.reference_control_points = np.linspace(0, 1, points)
        peer.floating_control_points = drawn["to"][row, 0].numpy()
        assert torch.allclose(result[row], torch.as_tensor(peer(image[row], randomize=False)), atol=1e-4)


def test_points_are_displaced_as_often_and_as_far_as_monai_displaces_them():
    ours = changed(HistogramShift, images((3000, 1, 1, 1)), points=(6, 6))[1]["to"][:, 0].numpy()
    peer = RandHistogramShift(6, prob=1.0)
    peer.set_random_state(0)
    theirs = []
    for _ in range(3000):
        peer.randomize()
        theirs.append(peer.floating_control_points)
    theirs = np.stack(theirs)
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 0.015
    assert np.abs(ours.std(axis=0) - theirs.std(axis=0)).max() < 0.01
    assert np.abs(np.corrcoef(ours[:, 1:5].T) - np.corrcoef(theirs[:, 1:5].T)).max() < 0.08


def test_each_sample_has_a_number_of_points_of_its_own():
    image = images((200, 1, 4, 4))
    result, drawn = changed(HistogramShift, image, points=(3, 5))
    assert set(drawn["count"].flatten().tolist()) == {3, 4, 5}
    for to, count in zip(drawn["to"].flatten(0, 1), drawn["count"].flatten().tolist(), strict=True):
        assert to[0] == 0 and to[count - 1] == 1 and (to[count:] == 1).all() and (to.diff() >= 0).all()
        assert (to[1 : count - 1] < 1).all()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Bezier, {"strength": 1.5}),
        (Bezier, {"invert": 0.5}),
        (HistogramShift, {"points": (2, 10)}),
        (HistogramShift, {"points": (10, 5)}),
        (HistogramShift, {"points": (10, 1000)}),
        (HistogramShift, {"strength": -0.1}),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings):
    with pytest.raises(ValidationError):
        kind.settings_class(**settings)
