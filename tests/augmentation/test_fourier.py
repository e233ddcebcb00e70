"""Styles by low frequencies: equal to a transform of all frequencies, phase kept, partners fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from medssl.augmentation.fourier import BatchStyle, FourierMix, box_of, low_spectrum
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw

SHAPES = [(4, 2, 10, 12, 11), (4, 2, 12, 15), (4, 1, 1, 12, 20)]
BOTH = [FourierMix, BatchStyle]


def images(shape, seed=0) -> torch.Tensor:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return image + torch.arange(len(image)).reshape(-1, *([1] * (len(shape) - 1)))


def facts_of(image, modality=None, spacing=None) -> Facts:
    modality = modality or ("MR",) * len(image)
    spacing = torch.ones(len(image), 3) if spacing is None else torch.tensor(spacing)
    return Facts(modality, spacing.double(), tuple(image.shape[2:]), image.shape[1])


def build(transform, **settings):
    chosen = transform.settings_class(**{"probability": 1.0, "ratio": (0.1, 0.25), **settings})
    return transform({"MR": chosen, "CT": chosen})


def changed(transform, image, seed=0, modality=None, spacing=None, **settings):
    built = build(transform, **settings)
    drawn = built.draw(facts_of(image, modality, spacing), Draw(seed, range(len(image))))
    return built.apply(image, drawn), drawn


def in_box(size, ratio):
    """Return where the spectrum is mixed: frequencies of no more than `ratio` cycles per voxel along each axis."""
    inside = np.ones(size, dtype=bool)
    for axis, edge in enumerate(size):
        near = np.abs(np.fft.fftfreq(edge)) <= ratio + 1e-6
        inside &= near.reshape([-1 if other == axis else 1 for other in range(len(size))])
    return inside


def slow_mix(own, other, ratio, weight):
    own, other = own.double().numpy(), other.double().numpy()
    own_spectrum, other_spectrum = np.fft.fftn(own), np.fft.fftn(other)
    amplitude = (1 - weight) * np.abs(own_spectrum) + weight * np.abs(other_spectrum)
    mixed = amplitude * np.exp(1j * np.angle(own_spectrum))
    origin = (0,) * own.ndim
    mixed[origin] = (1 - weight) * own_spectrum[origin] + weight * other_spectrum[origin]
    spectrum = np.where(in_box(own.shape, ratio), mixed, own_spectrum)
    return np.fft.ifftn(spectrum).real


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", BOTH)
def test_the_result_equals_a_full_fft(transform, shape):
    image = images(shape)
    result, drawn = changed(transform, image)
    for row, channel in np.ndindex(*shape[:2]):
        other = int(drawn["partner"][row])
        slow = image[row, channel].numpy()
        if drawn["active"][row, channel]:
            ratio, weight = float(drawn["ratio"][row, channel]), float(drawn["weight"][row, channel])
            slow = slow_mix(image[row, channel], image[other, channel], ratio, weight)
        assert np.abs(result[row, channel].numpy() - slow).max() < 2e-5


@pytest.mark.parametrize("size", [(10, 12, 11), (7, 30), (1, 9, 8), (1, 1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25])
def test_low_coefficients_equal_those_of_numpy(size, ratio):
    image = images((1, 1, *size)).double()[0, 0]
    box = box_of(size, ratio)
    order = [[*range(b + 1), *range(-1, -b - 1, -1)] for b in box]
    assert np.allclose(low_spectrum(image, box).numpy(), np.fft.fftn(image.numpy())[np.ix_(*order)], atol=1e-9)


@pytest.mark.parametrize("transform", BOTH)
def test_phase_is_kept_and_what_lies_outside_the_box_is_untouched(transform):
    image = images((3, 1, 12, 14, 13)).double() + 5
    result, drawn = changed(transform, image, weight=(0.5, 1.0))
    for row in range(3):
        before, after = np.fft.fftn(image[row, 0].numpy()), np.fft.fftn(result[row, 0].numpy())
        inside = in_box(image.shape[2:], float(drawn["ratio"][row, 0]))
        assert np.allclose(np.angle(after / before), 0, atol=1e-6)
        assert np.allclose(after[~inside], before[~inside], atol=1e-8)
        moved = np.abs(np.abs(after) - np.abs(before))[inside].max() > 0.1
        assert moved == bool(drawn["active"][row, 0])


def test_the_mean_is_mixed_as_asked_whatever_its_sign():
    image = images((2, 1, 8, 8, 8)) - torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1, 1)
    result, _ = changed(FourierMix, image, ratio=(0.0, 0.0), weight=(0.25, 0.25))
    means = image.mean(dim=(1, 2, 3, 4))
    expected = 0.75 * means + 0.25 * means.flip(0)
    assert torch.allclose(result.mean(dim=(1, 2, 3, 4)), expected, atol=1e-5)
    shift = (result - image).flatten(1)
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-6), "only the mean has frequency 0"


@pytest.mark.parametrize("transform", BOTH)
def test_zero_weight_is_the_identity_bit_for_bit(transform):
    image = images((4, 2, 9, 10, 8))
    result, drawn = changed(transform, image, weight=(0.0, 0.0))
    assert torch.equal(result, image) and not drawn["active"].any()


@pytest.mark.parametrize("transform", BOTH)
def test_who_drew_nothing_keeps_every_bit_and_the_others_change(transform):
    image = images((12, 2, 8, 8, 8))
    result, drawn = changed(transform, image, probability=0.5)
    assert 0 < drawn["active"].any(dim=1).sum() < 12
    for row, channel in np.ndindex(12, 2):
        assert torch.equal(result[row, channel], image[row, channel]) != bool(drawn["active"][row, channel])


def test_a_result_depends_on_the_sample_its_partner_and_its_draw_only():
    image = images((5, 1, 10, 12, 11))
    result, drawn = changed(FourierMix, image)
    row, other = 3, int(drawn["partner"][3])
    pair = {"partner": torch.tensor([1, 0]), "active": torch.tensor([[True], [False]])}
    pair |= {name: drawn[name][[row, other]] for name in ("ratio", "weight")}
    alone = build(FourierMix).apply(image[[row, other]], pair)
    assert torch.equal(alone[0], result[row]) and torch.equal(alone[1], image[other])


def test_partners_lend_what_they_were_before_they_changed():
    image = images((2, 1, 8, 9, 10))
    result, drawn = changed(FourierMix, image, weight=(1.0, 1.0), ratio=(0.2, 0.2))
    assert drawn["partner"].tolist() == [1, 0]
    for row in range(2):
        slow = slow_mix(image[row, 0], image[1 - row, 0], 0.2, 1.0)
        assert np.abs(result[row, 0].numpy() - slow).max() < 1e-5


def test_partners_share_modality_and_voxel_size_and_are_all_met():
    image = images((6, 1, 8, 8, 8))
    modality = ("MR", "CT", "MR", "MR", "MR", "CT")
    spacing = [[1.0, 1.0, 1.0], [1.0] * 3, [1.0, 1.0, 1.05], [1.0, 1.2, 1.0], [1.05, 1.0, 1.0], [2.0] * 3]
    met = [set() for _ in range(6)]
    for seed in range(40):
        drawn = build(FourierMix).draw(facts_of(image, modality, spacing), Draw(seed, range(6)))
        assert drawn["active"][:, 0].tolist() == [True, False, True, False, True, False]
        for row in (0, 2, 4):
            met[row].add(int(drawn["partner"][row]))
    assert [met[row] for row in (0, 2, 4)] == [{2, 4}, {0, 4}, {0, 2}]


def test_the_slice_distance_does_not_matter_in_2d():
    image = images((2, 1, 8, 8))
    drawn = build(FourierMix).draw(facts_of(image, spacing=[[1.0, 1.0, 1.0], [5.0, 1.0, 1.0]]), Draw(0, range(2)))
    assert drawn["active"].all()


@pytest.mark.parametrize("transform", BOTH)
def test_a_batch_without_fit_partners_is_left_alone(transform):
    for image, spacing in ((images((1, 1, 6, 6)), None), (images((2, 1, 6, 6)), [[float("nan")] * 3] * 2)):
        result, drawn = changed(transform, image, spacing=spacing)
        assert torch.equal(result, image) and not drawn["active"].any()


def test_batch_style_gives_one_style_per_modality_and_leaves_its_source_alone():
    image = images((8, 1, 10, 10, 10))
    modality = ("MR", "CT") * 4
    sources = set()
    for seed in range(12):
        result, drawn = changed(BatchStyle, image, seed=seed, modality=modality, ratio=(0.05, 0.2))
        for group in (slice(0, None, 2), slice(1, None, 2)):
            source = set(drawn["partner"][group].tolist())
            assert len(source) == 1 and len(drawn["ratio"][group].unique()) == 1
            assert torch.equal(result[list(source)], image[list(source)])
            sources |= source
            assert drawn["active"][group].sum() == 3
    assert len(sources) == 8, "every image lends its style at some time"


def test_batch_style_makes_the_low_amplitudes_of_all_equal():
    image = images((4, 1, 12, 12, 12)).double()
    result, drawn = changed(BatchStyle, image, ratio=(0.2, 0.2))
    inside = in_box(image.shape[2:], 0.2)
    amplitudes = [np.abs(np.fft.fftn(one[0].numpy()))[inside] for one in result]
    assert all(np.allclose(amplitudes[0], other, rtol=1e-6) for other in amplitudes[1:])


@pytest.mark.parametrize("value", [0.0, 3.3, -1000.0])
@pytest.mark.parametrize("transform", BOTH)
def test_constant_images_take_the_mean_and_no_structure(transform, value):
    image = torch.cat([torch.full((1, 1, 9, 10, 8), value), images((1, 1, 9, 10, 8))])
    lent = 0
    for seed in range(6):
        result, drawn = changed(transform, image, seed=seed, weight=(1.0, 1.0))
        if drawn["active"][0]:
            lent += 1
            assert torch.allclose(result[0], image[1].mean().expand_as(result[0]), atol=1e-4 + 1e-6 * abs(value))
    assert lent > 0


@pytest.mark.parametrize("transform", BOTH)
def test_a_voxel_that_is_not_a_number_does_not_spread(transform):
    image = images((3, 1, 8, 8, 8))
    image[1, 0, 2, 3, 4] = float("nan")
    result, _ = changed(transform, image)
    assert torch.isnan(result).sum() == 1 and torch.isnan(result[1, 0, 2, 3, 4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_and_dtype_are_kept_and_half_precision_is_computed_in_float32(dtype):
    image = images((2, 1, 16, 16, 16)).to(dtype)
    before = image.clone()
    result, _ = changed(FourierMix, image, weight=(1.0, 1.0))
    wide, _ = changed(FourierMix, image.double(), weight=(1.0, 1.0))
    assert torch.equal(image, before) and result.dtype == dtype
    assert (result.double() - wide).abs().max() <= torch.finfo(dtype).eps * wide.abs().max() + 1e-12


def test_autocast_does_not_reach_the_transform():
    image = images((2, 1, 16, 16, 16))
    plain, _ = changed(FourierMix, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = changed(FourierMix, image)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("transform", BOTH)
def test_single_voxels_and_slices_stay_finite(transform):
    for shape in ((2, 1, 1, 1, 1), (2, 1, 1, 5, 5), (2, 1, 1, 1)):
        result, _ = changed(transform, images(shape))
        assert torch.isfinite(result).all()


@pytest.mark.parametrize(
    "settings", [{"ratio": (0.1, 0.3)}, {"ratio": (0.1, 0.05)}, {"weight": (-0.1, 1.0)}, {"weight": (0.5, 1.5)}]
)
@pytest.mark.parametrize("transform", BOTH)
def test_settings_out_of_range_are_refused(transform, settings):
    with pytest.raises(ValidationError):
        build(transform, **settings)
