"""Each CT transform: identity at zero strength, each sample on its own, Hounsfield units, and its slow definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from medssl.augmentation import ct, ct_artefacts
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw
from medssl.errors import DataError

CLASSES = {
    one.name: one
    for one in (
        ct.HuWindow,
        ct.DoseNoise,
        ct.Kernel,
        ct.SliceThickness,
        ct_artefacts.BeamHardening,
        ct_artefacts.Metal,
    )
}
SHAPES = [(4, 2, 10, 14, 13), (4, 2, 16, 15)]
# One that has no effect on the images below, and one that changes all of them.
ZERO = {
    "hu_window": {"low": (-9e4, -9e4), "high": (9e4, 9e4)},
    "dose_noise": {"std": (0.0, 0.0)},
    "kernel": {"strength": (0.0, 0.0)},
    "slice_thickness": {"thickness_mm": (0.5, 2.0)},
    "beam_hardening": {"amplitude": (0.0, 0.0)},
    "metal": {"radius_mm": (0.0, 0.0)},
}
STRONG = {
    "hu_window": {"low": (-200.0, -100.0), "high": (100.0, 200.0)},
    "slice_thickness": {"thickness_mm": (5.0, 12.0)},
}
IN_HU = ("hu_window", "dose_noise", "beam_hardening", "metal")
INTERCEPT, SLOPE = 100.0, 400.0
SPACING = (2.0, 0.8, 0.7)


def images(shape, seed=0) -> torch.Tensor:
    """Return smooth noise about 100 HU, deviation 400 HU, in a corner of air at -1000 HU."""
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    image[..., :4, :5] = stored(-1000.0)
    return image


def stored(hu: float) -> float:
    return (hu - INTERCEPT) / SLOPE


def hounsfield(image: torch.Tensor) -> torch.Tensor:
    return INTERCEPT + SLOPE * image.double()


def facts_of(image, rescale=(INTERCEPT, SLOPE), modality="CT", spacing=SPACING) -> Facts:
    count = len(image)
    return Facts(
        (modality,) * count if isinstance(modality, str) else modality,
        torch.tensor([spacing], dtype=torch.float64).repeat(count, 1),
        tuple(image.shape[2:]),
        image.shape[1],
        None if rescale is None else torch.tensor([rescale]).repeat(count, 1),
    )


def build(name, **settings):
    transform = CLASSES[name]
    return transform({"CT": transform.settings_class(**{"probability": 1.0, **settings})})


def changed(name, image, seed=0, first=0, spacing=SPACING, **settings):
    transform = build(name, **settings)
    drawn = transform.draw(facts_of(image, spacing=spacing), Draw(seed, range(first, first + len(image))))
    return transform.apply(image, drawn), drawn


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_zero_strength_is_the_identity_bit_for_bit(name, shape):
    image = images(shape)
    for more in ({}, {"stretch": True}) if name == "hu_window" else ({},):
        result, _ = changed(name, image, **ZERO[name], **more)
        assert torch.equal(result, image)


@pytest.mark.parametrize("name", CLASSES)
def test_who_drew_nothing_keeps_every_bit_and_the_others_change(name):
    image = images((16, 2, 10, 14, 13))
    result, drawn = changed(name, image, probability=0.5, **STRONG.get(name, {}))
    assert 0 < drawn["active"].any(dim=1).sum() < 16
    for row, channel in np.ndindex(16, 2):
        same = torch.equal(result[row, channel], image[row, channel])
        assert same != bool(drawn["active"][row, channel])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_sample_is_changed_alike_alone_and_in_a_batch(name, shape):
    image = images(shape)
    for more in ({}, {"stretch": True}) if name == "hu_window" else ({},):
        settings = {"probability": 0.7, **STRONG.get(name, {}), **more}
        together, drawn = changed(name, image, **settings)
        for row in range(len(image)):
            alone, own = changed(name, image[row : row + 1], first=row, **settings)
            assert torch.equal(alone[0], together[row])
            assert all(torch.equal(own[key][0], drawn[key][row]) for key in drawn)


@pytest.mark.parametrize("name", CLASSES)
def test_the_same_draw_repeats_and_samples_have_parameters_of_their_own(name):
    image = images((1, 1, 12, 16, 16)).repeat(4, 1, 1, 1, 1)
    first, drawn = changed(name, image, **STRONG.get(name, {}))
    assert torch.equal(first, build(name).apply(image, drawn))
    assert len({tuple(row.flatten().tolist()) for row in first}) == 4


@pytest.mark.parametrize("name", CLASSES)
def test_input_dtype_and_device_are_kept(name):
    image = images((2, 1, 8, 8, 8)).double()
    before = image.clone()
    result, _ = changed(name, image, **STRONG.get(name, {}))
    assert torch.equal(image, before) and result.dtype == torch.float64 and result.shape == image.shape


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("hu", [-1000.0, 40.0])
def test_constant_images_and_single_voxels_stay_finite(name, hu):
    for shape in ((2, 1, 6, 6, 6), (2, 1, 1, 1, 1), (2, 1, 1, 5, 5), (2, 1, 5, 1, 1), (2, 1, 5, 5), (2, 1, 1, 1)):
        image = torch.full(shape, stored(hu))
        for more in ({}, {"stretch": True}) if name == "hu_window" else ({},):
            result, _ = changed(name, image, **more)
            assert torch.isfinite(result).all()
            if name in ("kernel", "slice_thickness"):
                assert torch.allclose(result, image, atol=1e-5)


@pytest.mark.parametrize("name", IN_HU)
@pytest.mark.parametrize("rescale", [None, (math.nan, math.nan), (0.0, 0.0), (0.0, -1.0)])
def test_an_unknown_rescale_is_an_error_that_names_transform_modality_and_remedy(name, rescale):
    image = images((2, 1, 4, 6, 6))
    with pytest.raises(DataError) as error:
        build(name).draw(facts_of(image, rescale), Draw(0, range(2)))
    for words in (f"transform {name}", "CT sample", "row 0", "medssl preprocess", f"`{name}: null`"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", CLASSES)
def test_other_modalities_need_no_rescale_and_are_never_changed(name):
    image = images((3, 1, 6, 8, 8))
    facts = facts_of(image, modality=("MR", "CT", "PT"))
    facts.rescale[0] = facts.rescale[2] = math.nan
    transform = build(name, **STRONG.get(name, {}))
    result = transform.apply(image, transform.draw(facts, Draw(0, range(3))))
    assert [torch.equal(after, before) for after, before in zip(result, image, strict=True)] == [True, False, True]
    assert not transform.fits("MR") and transform.fits("CT")


@pytest.mark.parametrize("name", ["kernel", "slice_thickness"])
def test_what_is_given_in_mm_only_needs_no_rescale(name):
    image = images((2, 1, 6, 8, 8))
    transform = build(name, **STRONG.get(name, {}))
    drawn = transform.draw(facts_of(image, rescale=None), Draw(0, range(2)))
    assert not torch.equal(transform.apply(image, drawn), image)


@pytest.mark.parametrize("name", CLASSES)
def test_two_channels_share_what_was_drawn(name):
    _, drawn = changed(name, images((3, 2, 6, 8, 8)))
    assert all(torch.equal(value[:, 0], value[:, 1]) for key, value in drawn.items() if key != "seed")


def test_windows_lie_in_their_range_and_nothing_leaves_them():
    image = images((64, 1, 4, 8, 8)) * 4
    result, drawn = changed("hu_window", image)
    low, high = hounsfield(drawn["low"]), hounsfield(drawn["high"])
    assert -1350.01 < low.min() < -1300 and -1050 < low.max() < -999.99
    assert 299.99 < high.min() < 350 and 950 < high.max() < 1000.01
    reference = hounsfield(image).numpy().clip(low.numpy()[..., None, None, None], high.numpy()[..., None, None, None])
    assert np.abs(hounsfield(result).numpy() - reference).max() < 1e-2


def test_a_stretched_window_keeps_the_range_of_the_image_and_the_order_of_values():
    image = images((4, 1, 6, 8, 8))
    result, drawn = changed("hu_window", image, stretch=True, **STRONG["hu_window"])
    for before, after, low, high in zip(image, result, drawn["low"], drawn["high"], strict=True):
        inside = before.numpy().clip(low.item(), high.item())
        slow = np.interp(inside, (low.item(), high.item()), (before.min().item(), before.max().item()))
        assert np.abs(after.numpy() - slow).max() < 1e-5
        assert after.min().item() == pytest.approx(before.min().item(), abs=1e-5)
        assert after.max().item() == pytest.approx(before.max().item(), abs=1e-5)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 24, 40, 40), (1, 1, 200, 200)])
def test_dose_noise_has_the_asked_deviation_in_hu_everywhere(correlation, shape):
    image = torch.full(shape, stored(40))
    result, _ = changed("dose_noise", image, std=(20, 20), correlation=(correlation, correlation))
    noise = (result - image)[0, 0]
    assert noise.std().item() == pytest.approx(20 / SLOPE, rel=0.03)
    assert abs(noise.mean().item()) < 0.05 * 20 / SLOPE
    border = torch.cat([noise[..., 0, :].flatten(), noise[..., 0].flatten(), noise[..., -1].flatten()])
    assert border.std().item() == pytest.approx(20 / SLOPE, rel=0.15)


def test_dose_noise_is_correlated_within_a_slice_as_drawn_and_not_across_slices():
    image = torch.zeros(1, 1, 30, 60, 60)
    noise = changed("dose_noise", image, std=(20, 20), correlation=(0.8, 0.8))[0][0, 0].numpy()
    response = gaussian_filter(np.eye(1, 41, 20)[0], 0.8, radius=3)
    expected = (response[1:] * response[:-1]).sum() / (response**2).sum()
    along = [np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]]
    along.append(np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1])
    assert along == pytest.approx([expected, expected], abs=0.02)
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.02


def test_channels_have_noise_of_their_own():
    noise = changed("dose_noise", torch.zeros(1, 2, 8, 16, 16), std=(20, 20))[0][0].flatten(1)
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.1


@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.7, 2.0])
@pytest.mark.parametrize("shape", [(1, 1, 3, 18, 20), (1, 1, 18, 20)])
def test_kernel_equals_scipy_in_the_plane_in_mm(strength, shape):
    image = images(shape)
    result, _ = changed("kernel", image, strength=(strength, strength), sigma_mm=(0.9, 0.9))
    sigma = (0.9 / SPACING[1], 0.9 / SPACING[2])
    radius = tuple(math.ceil(3 * one) for one in sigma)
    planes = image.numpy().astype(np.float64)[0, 0].reshape(-1, 18, 20)
    blurred = np.stack([gaussian_filter(plane, sigma, mode="mirror", radius=radius) for plane in planes])
    slow = planes + strength * (planes - blurred)
    assert np.abs(result[0, 0].numpy().reshape(-1, 18, 20) - slow).max() < 1e-5


def slow_average(image: np.ndarray, width: float) -> np.ndarray:
    """Average over a box of `width` slices by its overlap with each slice, of those that exist."""
    result = np.zeros_like(image)
    for middle in range(len(image)):
        overlap = [
            max(0.0, min(middle + width / 2, z + 0.5) - max(middle - width / 2, z - 0.5)) for z in range(len(image))
        ]
        result[middle] = np.tensordot(np.array(overlap) / sum(overlap), image, 1)
    return result


@pytest.mark.parametrize("thickness", [2.0, 3.1, 4.0, 6.0, 9.0, 40.0])
@pytest.mark.parametrize("slices", [1, 2, 9])
def test_thick_slices_equal_the_average_by_overlap(thickness, slices):
    image = images((1, 1, slices, 6, 7))
    result, _ = changed("slice_thickness", image, thickness_mm=(thickness, thickness))
    slow = slow_average(image[0, 0].double().numpy(), thickness / SPACING[0])
    assert np.abs(result[0, 0].numpy() - slow).max() < 1e-5


def test_three_slices_of_thickness_are_the_mean_of_three_slices():
    image = images((1, 1, 7, 4, 4))
    result, _ = changed("slice_thickness", image, thickness_mm=(3, 3), spacing=(1.0, 1.0, 1.0))
    assert torch.allclose(result[0, 0, 3], image[0, 0, 2:5].mean(dim=0), atol=1e-6)
    assert torch.allclose(result[0, 0, 0], image[0, 0, :2].mean(dim=0), atol=1e-6)


def test_a_thick_slice_changes_nothing_in_2d():
    image = images((2, 1, 9, 8))
    result, _ = changed("slice_thickness", image, thickness_mm=(9, 9))
    assert torch.equal(result, image)


def body_of(shape=(1, 1, 5, 40, 48)) -> torch.Tensor:
    """Return an elliptic body of water, off the middle, in air."""
    y, x = torch.meshgrid(torch.arange(shape[-2]), torch.arange(shape[-1]), indexing="ij")
    inside = ((y - 18) / 14) ** 2 + ((x - 26) / 19) ** 2 <= 1
    return torch.where(inside, stored(0), stored(-1000)).expand(shape).clone()


@pytest.mark.parametrize("shape", [(1, 1, 5, 40, 48), (1, 1, 40, 48)])
@pytest.mark.parametrize("amplitude", [30.0, -20.0])
def test_cupping_lowers_the_middle_of_the_body_by_the_amplitude(shape, amplitude):
    image = body_of(shape)
    result, _ = changed("beam_hardening", image, amplitude=(amplitude, amplitude))
    added = (hounsfield(result) - hounsfield(image))[0, 0].reshape(-1, 40, 48)[0]
    inside = image[0, 0].reshape(-1, 40, 48)[0] > stored(-500)
    assert torch.equal(result[image < stored(-500)], image[image < stored(-500)])
    assert added[inside].mean().abs() < 1e-3
    assert (added[18, 44] - added[18, 26]).item() == pytest.approx((18 / 19) ** 2 * amplitude, rel=0.03)
    assert (added[31, 26] - added[18, 26]).item() == pytest.approx((13 / 14) ** 2 * amplitude, rel=0.03)
    assert (added[inside].abs() <= abs(amplitude)).all()


def test_cupping_equals_its_definition():
    image = images((1, 1, 4, 11, 12))
    result, _ = changed("beam_hardening", image, amplitude=(25, 25))
    values = image[0, 0].double().numpy()
    where = np.argwhere(values > stored(-500))
    centre, variance = where.mean(axis=0), where.var(axis=0)
    square = [min(1.0, sum((p[a] - centre[a]) ** 2 / (4 * variance[a]) for a in (1, 2))) for p in where]
    slow = values.copy()
    for place, one in zip(where, square, strict=True):
        slow[tuple(place)] += 25 / SLOPE * (one - np.mean(square))
    assert np.abs(result[0, 0].numpy() - slow).max() < 1e-5


def test_air_alone_is_not_hardened_and_holds_no_metal():
    for shape in ((2, 1, 4, 8, 8), (2, 1, 8, 8)):
        image = torch.full(shape, stored(-990))
        for name in ("beam_hardening", "metal"):
            assert torch.equal(changed(name, image)[0], image)


def slow_metal(image: np.ndarray, drawn: dict[str, np.ndarray]) -> np.ndarray:
    """Put the ellipsoid and its streaks into a volume, voxel by voxel."""
    result = image.copy()
    depth, rows, columns = image.shape
    middle = int(drawn["place"][0] * depth)
    body = np.argwhere(image[middle] > drawn["body"])
    y0, x0 = body[int(drawn["place"][1] * len(body))]
    step_z, step_y, step_x = drawn["spacing"]
    for z, y, x in np.ndindex(depth, rows, columns):
        dz, dy, dx = (z - middle) * step_z, (y - y0) * step_y, (x - x0) * step_x
        if z != middle and abs(dz) > drawn["half_length"]:
            continue
        width = 1.0 if z == middle else math.sqrt(1 - (dz / drawn["half_length"]) ** 2)
        distance = math.hypot(dy, dx)
        streak = 0.0
        for angle, strength in zip(drawn["angle"], drawn["streak"], strict=True):
            beside = dy * math.cos(angle) - dx * math.sin(angle)
            streak += strength * math.exp(-(beside**2) / (2 * drawn["ray"] ** 2))
        before = image[z, y, x]
        value = before + width * math.exp(-distance / drawn["reach"]) * streak
        value = min(max(value, min(before, drawn["lowest"])), max(before, drawn["highest"]))
        solid = np.clip(0.5 + (drawn["radius"] * width - distance) / math.sqrt(step_y * step_x), 0, 1)
        result[z, y, x] = value + solid * (drawn["density"] - value)
    return result


@pytest.mark.parametrize("shape", [(3, 1, 9, 12, 14), (3, 1, 12, 14)])
def test_metal_equals_its_definition(shape):
    image = images(shape)
    result, drawn = changed("metal", image, streak=(2000, 4000))
    for row in range(3):
        own = {name: value[row, 0].double().numpy() for name, value in drawn.items() if name != "active"}
        volume = image[row, 0].double().numpy().reshape(-1, 12, 14)
        slow = slow_metal(volume, own)
        assert np.abs(result[row, 0].numpy().reshape(volume.shape) - slow).max() < 1e-4


def test_metal_is_bright_lies_in_the_body_and_is_short():
    image = body_of((40, 1, 9, 40, 48))
    result, drawn = changed("metal", image, length_mm=(6, 6), radius_mm=(2, 3))
    hu, body = hounsfield(result)[:, 0], image[:, 0] > stored(-500)
    for row in range(40):
        middle = int(drawn["place"][row, 0, 0] * 9)
        metal = (hu[row] >= 1999) & (hu[row] <= 3071.01)
        assert metal.any() and (metal & body[row]).sum() > 0.4 * metal.sum()
        slices = (result[row, 0] != image[row, 0]).flatten(1).any(dim=1).nonzero()[:, 0]
        assert slices.tolist() == list(range(max(0, middle - 1), min(8, middle + 1) + 1))
    assert hu.min() > -1024.01 and hu.max() < 3071.01


def test_metal_is_placed_evenly_over_the_body():
    body = torch.zeros(6, 7, dtype=torch.bool)
    body[2:4, 3:6] = True
    found = [ct_artefacts._voxel_of_body(body, (step + 0.5) / 60)[0].item() for step in range(60)]
    assert {place: found.count(place) for place in found} == dict.fromkeys(body.flatten().nonzero()[:, 0].tolist(), 10)
    # The largest fraction that can be drawn, and a number of voxels that rounds.
    many = torch.ones(999, 1001, dtype=torch.bool)
    assert ct_artefacts._voxel_of_body(many, 1 - 2.0**-24)[0] == many.numel() - 1


def test_metal_leaves_values_beyond_12_bits_as_they_were():
    image = body_of()
    image[..., 0, :4], image[..., 1, :4] = stored(-3000), stored(9000)
    result, _ = changed("metal", image, streak=(4000, 4000), radius_mm=(1, 1), reach_mm=(1000, 1000))
    assert (result[..., 0, :4] >= image[..., 0, :4]).all() and (result[..., 1, :4] <= image[..., 1, :4]).all()
    assert result.max() == stored(9000) and result.min() == stored(-3000)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hu_window", {"low": (-1000, -1350)}),
        ("hu_window", {"low": (-1000, 400)}),
        ("hu_window", {"high": (-1100, 400)}),
        ("hu_window", {"high": (300, math.nan)}),
        ("hu_window", {"high": (300, math.inf)}),
        ("dose_noise", {"std": (-1, 30)}),
        ("dose_noise", {"std": (30, 10)}),
        ("dose_noise", {"correlation": (0.5, 50)}),
        ("kernel", {"strength": (-2, 1)}),
        ("kernel", {"sigma_mm": (0.5, 50)}),
        ("slice_thickness", {"thickness_mm": (1, 500)}),
        ("beam_hardening", {"amplitude": (-30, 3000)}),
        ("metal", {"density": (500, 3000)}),
        ("metal", {"reach_mm": (0, 10)}),
        ("metal", {"radius_mm": (-1, 10)}),
        ("metal", {"probability": 1.2}),
        ("metal", {"radius": (2, 4)}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValidationError):
        build(name, **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CLASSES)
def test_the_host_never_waits_for_the_device(name):
    image = images((4, 1, 16, 20, 18)).cuda()
    transform = build(name, **STRONG.get(name, {}))
    drawn = transform.draw(facts_of(image), Draw(0, range(4)))
    transform.apply(image, drawn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        transform.apply(image, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
