"""Ultrasound: the fan is kept bit for bit, and each transform equals its definition written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from medssl.augmentation.transform import Facts
from medssl.augmentation.ultrasound import (
    RAYLEIGH_MEAN,
    RAYLEIGH_STD,
    DepthAttenuation,
    GainCompression,
    Shadow,
    Speckle,
    speckle_field,
)
from medssl.data.draw import Draw

SHAPES = [(4, 3, 7, 9, 11), (4, 3, 13, 11)]
BLACK = -1.5
ZERO = {
    Speckle: {"std": (0.0, 0.0)},
    DepthAttenuation: {"mu": (0.0, 0.0)},
    Shadow: {"factor": (1.0, 1.0)},
    GainCompression: {"gain_db": (0.0, 0.0), "range_db": (0.0, 0.0)},
}
every = pytest.mark.parametrize("kind", ZERO)


def fan(shape) -> torch.Tensor:
    """True inside of beams that run apart with depth."""
    y, x = torch.meshgrid(torch.linspace(0, 1, shape[-2]), torch.linspace(-0.5, 0.5, shape[-1]), indexing="ij")
    return (x.abs() < 0.25 + 0.2 * y).expand(shape)


def pictures(shape, seed=0) -> torch.Tensor:
    """Grey values of at least 0.5 above black in a fan, the same in all channels; black around it."""
    u = torch.rand((shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(seed))
    return torch.where(fan(shape), BLACK + 0.5 + 3 * u, BLACK)


def changed(kind, image, first=0, seed=0, background=BLACK, **settings):
    transform = kind({"US": kind.settings_class(**{"probability": 1.0, **settings})})
    black = None if background is None else torch.full((len(image),), background)
    size = tuple(image.shape[2:])
    facts = Facts(("US",) * len(image), torch.ones(len(image), 3), size, image.shape[1], background=black)
    drawn = transform.draw(facts, Draw(seed, range(first, first + len(image))))
    return transform.apply(image, drawn), drawn


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_strength_is_the_identity_bit_for_bit(kind, shape):
    image = pictures(shape)
    assert torch.equal(changed(kind, image, **ZERO[kind])[0], image)


@every
@pytest.mark.parametrize("background", [BLACK, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_outside_of_the_fan_every_bit_is_kept_and_inside_grey_values_change(kind, shape, background):
    image = pictures(shape)
    # What JPEG leaves in a black border.
    image[..., 0, 0] += 0.02
    wide = {"width": (0.3, 0.5)} if kind is Shadow else {}
    result, _ = changed(kind, image, background=background, **wide)
    outside = ~fan(shape)
    assert torch.equal(result[outside].view(torch.int32), image[outside].view(torch.int32))
    assert ((result != image) & fan(shape)).flatten(1).any(dim=1).all()


@every
@pytest.mark.parametrize("background", [BLACK + 1.5, math.inf, -math.inf, math.nan])
def test_a_background_that_is_a_placeholder_is_not_taken_for_black(kind, background):
    image = pictures((4, 3, 13, 11))
    expected, _ = changed(kind, image)
    assert torch.equal(changed(kind, image, background=background)[0], expected)


@every
def test_all_channels_of_a_grey_picture_stay_equal(kind):
    result, drawn = changed(kind, pictures((6, 3, 13, 11)), probability=0.5)
    assert torch.equal(result[:, 0], result[:, 1]) and torch.equal(result[:, 0], result[:, 2])
    assert 0 < drawn["active"].sum() < 18


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_is_changed_alike_alone_and_in_a_batch(kind, shape):
    image = pictures(shape)
    together, drawn = changed(kind, image, probability=0.7)
    for row in range(len(image)):
        alone, own = changed(kind, image[row : row + 1], first=row, probability=0.7)
        assert torch.equal(alone[0], together[row])
        assert all(torch.equal(own[key][0], drawn[key][row]) for key in drawn)


@every
@pytest.mark.parametrize("background", [BLACK, None])
def test_the_same_draw_repeats_and_samples_differ(kind, background):
    image = pictures((1, 1, 16, 16)).repeat(4, 1, 1, 1)
    result, drawn = changed(kind, image, background=background)
    again, _ = changed(kind, image, background=background)
    assert torch.equal(result, again)
    assert len({tuple(row.flatten().tolist()) for row in result}) == 4
    assert not any(value.is_floating_point() and value.isnan().any() for value in drawn.values())


@every
def test_input_dtype_and_shape_are_kept(kind):
    image = pictures((2, 1, 8, 8, 8)).double()
    before = image.clone()
    result, _ = changed(kind, image)
    assert torch.equal(image, before) and result.dtype == torch.float64 and result.shape == image.shape


@every
@pytest.mark.parametrize("shape", [(2, 1, 6, 6, 6), (2, 1, 1, 1, 1), (2, 1, 1, 5, 5), (2, 1, 1, 1)])
def test_constant_images_without_known_background_are_kept_and_else_stay_finite(kind, shape):
    image = torch.full(shape, 3.0)
    assert torch.equal(changed(kind, image, background=None)[0], image)
    assert changed(kind, image)[0].isfinite().all()


@every
def test_a_voxel_that_is_not_finite_is_passed_on_and_harms_no_other_sample(kind):
    image = pictures((2, 1, 8, 8))
    expected = changed(kind, image)[0][1]
    image[0, 0, 4, 4] = math.nan
    result, _ = changed(kind, image)
    assert result[0, 0, 4, 4].isnan() and torch.equal(result[1], expected)


@every
def test_policies_refuse_other_modalities(kind):
    assert kind.fits("US") and not any(kind.fits(name) for name in ("MR", "CT", "XR", "IMAGE"))


@pytest.mark.parametrize(("size", "grain"), [((64, 64), (0.5, 1.5)), ((24, 28, 26), (0.7, 1.0, 1.4))])
def test_speckle_has_mean_1_and_its_deviation_up_to_the_border(size, grain):
    fields = torch.stack(
        [speckle_field(torch.empty(size), grain, seed) for seed in range(400 if len(size) == 2 else 40)]
    )
    assert fields.mean().abs() < 0.01
    assert fields.std().item() == pytest.approx(1, abs=0.01)
    border = torch.cat([fields.select(axis, end).flatten() for axis in range(1, len(size) + 1) for end in (0, -1)])
    assert border.mean().abs() < 0.03
    assert border.std().item() == pytest.approx(1, abs=0.03)


def test_speckle_multiplies_by_a_positive_factor_of_mean_1():
    image = torch.full((3, 1, 40, 40, 40), 2.0)
    result, drawn = changed(Speckle, image, background=0.0, grain=(0.5, 0.5))
    factor = result.flatten(1) / 2
    assert torch.allclose(factor.mean(dim=1), torch.ones(3), atol=0.01)
    assert torch.allclose(factor.std(dim=1), drawn["std"][:, 0], rtol=0.03)
    assert (factor > 0).all()


def test_speckle_follows_the_distribution_of_rayleigh():
    field = speckle_field(torch.empty(200, 200), (0.0, 0.0), 5).flatten().numpy()
    amplitude = field * RAYLEIGH_STD + RAYLEIGH_MEAN
    assert stats.kstest(amplitude, stats.rayleigh.cdf).pvalue > 0.01


def test_speckle_grain_is_the_width_of_the_point_spread_along_each_axis():
    grain = (2.0, 1.0)
    field = speckle_field(torch.empty(600, 600, dtype=torch.float64), grain, 0) * RAYLEIGH_STD + RAYLEIGH_MEAN
    intensity = field.square() - field.square().mean()
    for axis, sigma in enumerate(grain):
        for lag in (1, 2, 3):
            shifted = intensity.narrow(axis, lag, 600 - lag) * intensity.narrow(axis, 0, 600 - lag)
            # The intensity's correlation is the square of the echo's, a Gaussian of sqrt(2) the point spread.
            expected = math.exp(-(lag**2) / (4 * sigma**2)) ** 2
            assert (shifted.mean() / intensity.square().mean()).item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("probe", ["first", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_depth_attenuation_is_exponential_from_the_probe(shape, probe):
    image = pictures(shape)
    result, drawn = changed(DepthAttenuation, image, probe=probe)
    slow = image.double().numpy().copy()
    rows = shape[-2]
    inside = fan(shape).numpy()
    for index in np.ndindex(slow.shape):
        if inside[index]:
            row = index[-2] if probe == "first" else rows - 1 - index[-2]
            slow[index] = BLACK + (slow[index] - BLACK) * math.exp(-float(drawn["mu"][index[0], 0]) * row / (rows - 1))
    assert np.abs(result.numpy() - slow).max() < 1e-5
    assert (drawn["mu"] < 0).any() and (drawn["mu"] > 0).any()


def slow_shadow(image, drawn, probe, softness):
    slow = image.double().numpy().copy()
    rows, columns = slow.shape[-2:]
    inside = fan(image.shape).numpy()
    for index in np.ndindex(slow.shape):
        if not inside[index]:
            continue
        one = {name: drawn[name][index[0], 0].tolist() for name in ("factor", "end", "width", "spread")}
        depth = (index[-2] if probe == "first" else rows - 1 - index[-2]) / (rows - 1)
        at_probe = ((index[-1] + 0.5) / columns - 0.5) / (1 + one["spread"] * depth)
        at_end = at_probe * (1 + one["spread"])
        for factor, end, width in zip(one["factor"], one["end"], one["width"], strict=True):
            into = min(max((1 - abs(at_end - end) / (width / 2)) / softness, 0), 1)
            slow[index] = BLACK + (slow[index] - BLACK) * (1 - (1 - factor) * (3 * into**2 - 2 * into**3))
    return slow


@pytest.mark.parametrize("probe", ["first", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shadow_equals_its_definition(shape, probe):
    image = pictures(shape)
    result, drawn = changed(Shadow, image, probe=probe, width=(0.2, 0.6), softness=0.4)
    assert np.abs(result.numpy() - slow_shadow(image, drawn, probe, 0.4)).max() < 1e-5


def test_shadows_darken_between_their_factor_and_nothing_and_leave_the_rest():
    image = pictures((16, 1, 64, 64))
    result, drawn = changed(Shadow, image, factor=(0.2, 0.2), width=(0.2, 0.3), count=(1, 1))
    left = ((result - BLACK) / (image - BLACK))[fan(image.shape)]
    assert left.min().item() == pytest.approx(0.2, abs=1e-3) and left.max() <= 1
    assert (result == image).float().mean() > 0.5
    assert (drawn["factor"][:, 0, 1] == 1).all()


def test_one_and_two_shadows_are_drawn_equally_often():
    _, drawn = changed(Shadow, pictures((1000, 1, 2, 2)))
    assert (drawn["factor"][:, 0, 1] == 1).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_shadow_of_parallel_beams_is_a_stripe_and_of_a_fan_grows_with_depth():
    image = torch.ones(8, 1, 50, 400)
    for spread, ratio in ((0.0, 1.0), (1.0, 0.5)):
        result, drawn = changed(Shadow, image, background=0.0, spread=(spread, spread), width=(0.2, 0.2), count=(1, 1))
        inner = drawn["end"][:, 0, 0].abs() < 0.4
        assert inner.any()
        dark = (result < 0.999)[inner, 0].sum(dim=2).double() / 400
        assert torch.allclose(dark[:, -1], torch.tensor(0.2).double(), atol=0.02)
        assert torch.allclose(dark[:, 0] / dark[:, -1], torch.tensor(ratio).double(), atol=0.1)


def test_gain_compression_equals_its_definition():
    image = pictures((3, 1, 13, 11))
    result, drawn = changed(GainCompression, image, displayed_db=50.0)
    for row in range(3):
        gain, change = (float(value) for value in drawn["change_db"][row, 0])
        natural = math.log(10) / 20
        before, after = 50 * natural, (50 + change) * natural
        high = float(image[row].max())
        for index in np.ndindex(13, 11):
            value = float(image[row, 0][index])
            unit = (value - BLACK) / (high - BLACK)
            amplitude = 10 ** (gain / 20) * math.expm1(before * unit) / math.expm1(before)
            shown = min(1, math.log1p(math.expm1(after) * amplitude) / after)
            assert float(result[row, 0][index]) == pytest.approx(BLACK + shown * (high - BLACK), abs=1e-4)


def test_gain_compression_keeps_order_black_and_range():
    image = pictures((40, 1, 24, 24))
    result, _ = changed(GainCompression, image)
    flat, before = result.flatten(1), image.flatten(1)
    assert (flat.gather(1, before.argsort(dim=1)).diff(dim=1) >= 0).all()
    assert (flat.amin(dim=1) == BLACK).all() and (flat.amax(dim=1) <= before.amax(dim=1)).all()


def test_more_gain_brightens_and_a_smaller_dynamic_range_hardens():
    ramp = torch.linspace(0, 1, 101).reshape(1, 1, 1, 101)
    brighter, _ = changed(GainCompression, ramp, background=0.0, gain_db=(6, 6), range_db=(0, 0))
    # 6 of 60 dB, far enough from black.
    assert brighter[0, 0, 0, 60].item() == pytest.approx(0.7, abs=0.01)
    harder, _ = changed(GainCompression, ramp, background=0.0, gain_db=(0, 0), range_db=(-15, -15))
    assert (harder[..., 80] - harder[..., 70]).item() == pytest.approx(0.1 * 60 / 45, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Speckle, {"std": (0.3, 0.1)}),
        (Speckle, {"std": (0.1, 0.6)}),
        (Speckle, {"grain": (0.5, 20)}),
        (DepthAttenuation, {"mu": (-9, 0.5)}),
        (DepthAttenuation, {"probe": "top"}),
        (Shadow, {"count": (0, 2)}),
        (Shadow, {"factor": (0.5, 1.5)}),
        (Shadow, {"width": (0.0, 0.2)}),
        (Shadow, {"spread": (-1, 0)}),
        (Shadow, {"softness": 0}),
        (GainCompression, {"range_db": (-20, 0)}),
        (GainCompression, {"gain": (0, 3)}),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings):
    with pytest.raises(ValidationError):
        kind.settings_class(**settings)
