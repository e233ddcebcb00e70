"""Each intensity transform: identity at zero strength, each sample on its own, and what it is defined to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.intensity import blur_along
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw

SHAPES = [(4, 2, 10, 12, 11), (4, 2, 12, 11)]
ZERO = {
    "noise": {"std": (0.0, 0.0)},
    "blur": {"sigma": (0.0, 0.0)},
    "brightness": {"factor": (1.0, 1.0)},
    "contrast": {"factor": (1.0, 1.0)},
    "low_resolution": {"zoom": (1.0, 1.0)},
    "gamma_inverted": {"exponent": (1.0, 1.0)},
    "gamma": {"exponent": (1.0, 1.0)},
}


def images(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def facts_of(image, modality="MR") -> Facts:
    return Facts((modality,) * len(image), torch.ones(len(image), 3), tuple(image.shape[2:]), image.shape[1])


def build(name, **settings):
    transform = CATALOGUE[name]
    return transform({"MR": transform.settings_class(**{"probability": 1.0, **settings})})


def changed(name, image, seed=0, first=0, **settings):
    transform = build(name, **settings)
    drawn = transform.draw(facts_of(image), Draw(seed, range(first, first + len(image))))
    return transform.apply(image, drawn), drawn


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ZERO)
def test_zero_strength_is_the_identity_bit_for_bit(name, shape):
    image = images(shape)
    result, _ = changed(name, image, **ZERO[name])
    assert torch.equal(result, image)


@pytest.mark.parametrize("name", ZERO)
def test_who_drew_nothing_keeps_every_bit_and_the_others_change(name):
    image = images((16, 2, 40, 4, 4))
    result, drawn = changed(name, image, probability=0.5)
    assert 0 < drawn["active"].any(dim=1).sum() < 16
    for row, channel in np.ndindex(16, 2):
        same = torch.equal(result[row, channel], image[row, channel])
        assert same != bool(drawn["active"][row, channel])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ZERO)
def test_a_sample_is_changed_alike_alone_and_in_a_batch(name, shape):
    image = images(shape)
    together, drawn = changed(name, image, probability=0.7)
    for row in range(len(image)):
        alone, own = changed(name, image[row : row + 1], first=row, probability=0.7)
        assert torch.equal(alone[0], together[row])
        assert all(torch.equal(own[key][0], drawn[key][row]) for key in drawn)


@pytest.mark.parametrize("name", ZERO)
def test_the_same_draw_repeats_and_samples_have_parameters_of_their_own(name):
    image = images((1, 1, 24, 8, 8)).repeat(4, 1, 1, 1, 1)
    first, drawn = changed(name, image, **{"per_channel": 1.0} if name in ("blur", "low_resolution") else {})
    again = build(name).apply(image, drawn)
    assert torch.equal(first, again)
    assert len({tuple(row.flatten().tolist()) for row in first}) == 4


@pytest.mark.parametrize("name", ZERO)
def test_input_dtype_and_device_are_kept(name):
    image = images((2, 1, 8, 8, 8)).double()
    before = image.clone()
    result, _ = changed(name, image)
    assert torch.equal(image, before) and result.dtype == torch.float64 and result.shape == image.shape


@pytest.mark.parametrize("name", ZERO)
def test_constant_images_and_single_voxels_stay_finite(name):
    for shape in ((2, 1, 6, 6, 6), (2, 1, 1, 1, 1), (2, 1, 1, 5, 5)):
        result, _ = changed(name, torch.full(shape, 3.0))
        assert torch.isfinite(result).all()
        if name not in ("noise", "brightness"):
            assert torch.allclose(result, torch.full(shape, 3.0), atol=1e-5)


def test_a_modality_without_settings_is_never_changed():
    transform = build("noise")
    image = images((8, 1, 4, 4))
    drawn = transform.draw(facts_of(image, "CT"), Draw(0, range(8)))
    assert not drawn["active"].any() and torch.equal(transform.apply(image, drawn), image)


def test_noise_has_its_standard_deviation():
    image = torch.zeros(2, 1, 32, 32, 32)
    result, drawn = changed("noise", image, std=(0.05, 0.3))
    assert torch.allclose(result.flatten(1).std(dim=1), drawn["std"][:, 0], rtol=0.03)
    assert result.mean().abs() < 0.01


def test_blur_equals_scipy():
    image = images((1, 14, 15, 16))
    result = image
    for axis, sigma in enumerate((0.5, 0.8, 1.0)):
        result = blur_along(result, axis + 1, torch.tensor([sigma]))
    slow = gaussian_filter(image[0].numpy(), (0.5, 0.8, 1.0), mode="mirror", radius=(2, 3, 3))
    assert np.abs(result[0].numpy() - slow).max() < 1e-5


def test_blur_keeps_the_mean_of_a_constant_and_lowers_the_variance():
    result, _ = changed("blur", images((2, 1, 16, 16, 16)), per_channel=1.0)
    assert (result.flatten(1).std(dim=1) < 0.9).all()


def test_brightness_multiplies_each_channel():
    image = images((3, 2, 4, 4))
    result, drawn = changed("brightness", image)
    assert torch.allclose(result, image * drawn["factor"][:, :, None, None])


def test_contrast_keeps_mean_and_range():
    image = images((4, 1, 12, 12, 12))
    result, drawn = changed("contrast", image)
    assert (result.flatten(1).amax(dim=1) <= image.flatten(1).amax(dim=1)).all()
    assert (result.flatten(1).amin(dim=1) >= image.flatten(1).amin(dim=1)).all()
    factor = drawn["factor"][:, 0]
    inner = result.flatten(1).std(dim=1, correction=0) / image.flatten(1).std(dim=1, correction=0)
    assert torch.allclose(inner, factor, rtol=0.03)


@pytest.mark.parametrize("name", ["gamma", "gamma_inverted"])
def test_gamma_restores_mean_and_deviation_and_keeps_order(name):
    image = images((4, 1, 10, 10, 10))
    result, drawn = changed(name, image, exponent=(0.7, 1.5))
    flat, before = result.flatten(1), image.flatten(1)
    assert torch.allclose(flat.mean(dim=1), before.mean(dim=1), atol=1e-4)
    assert torch.allclose(flat.std(dim=1), before.std(dim=1), rtol=1e-3)
    assert (flat.gather(1, before.argsort(dim=1)).diff(dim=1) >= -1e-6).all()
    skew = ((flat - flat.mean(1, True)) ** 3).mean(1) - ((before - before.mean(1, True)) ** 3).mean(1)
    bends_up = (drawn["exponent"][:, 0] > 1) == (name == "gamma")
    assert ((skew > 0) == bends_up).all()


@pytest.mark.parametrize("zoom", [0.5, 0.63, 0.9, 1.0])
def test_low_resolution_equals_interpolation_there_and_back(zoom):
    image = images((1, 1, 17, 20, 23))
    size = [round(zoom * edge) for edge in image.shape[2:]]
    slow = F.interpolate(F.interpolate(image, size, mode="nearest-exact"), image.shape[2:], mode="trilinear")
    result, _ = changed("low_resolution", image, zoom=(zoom, zoom), per_channel=1.0)
    assert torch.allclose(result, slow, atol=1e-5)


def test_factors_are_below_one_as_often_as_above():
    image = torch.zeros(2000, 1, 1, 1)
    drawn = build("gamma").draw(facts_of(image), Draw(0, range(2000)))["exponent"]
    assert 0.7 <= drawn.min() < 0.71 and 1.49 < drawn.max() <= 1.5
    assert (drawn < 1).float().mean().item() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("noise", {"std": (0.2, 0.1)}),
        ("blur", {"sigma": (0.5, 50)}),
        ("low_resolution", {"zoom": (0.5, 1.5)}),
        ("gamma", {"exponent": (0.0, 1.0)}),
        ("gamma", {"probability": 1.2}),
        ("gamma", {"exponents": (0.7, 1.5)}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValidationError):
        build(name, **settings)
