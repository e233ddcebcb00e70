"""Unsharp masking equals its definition, keeps the range, and treats each sample on its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from medssl.augmentation.sharpen import Sharpen, SharpenSettings
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw

SHAPES = [(4, 2, 7, 9, 11), (4, 2, 13, 11)]


def images(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def changed(image, first=0, seed=0, modality="MR", **settings):
    transform = Sharpen({"MR": SharpenSettings(**{"probability": 1.0, **settings})})
    facts = Facts((modality,) * len(image), torch.ones(len(image), 3), tuple(image.shape[2:]), image.shape[1])
    drawn = transform.draw(facts, Draw(seed, range(first, first + len(image))))
    return transform.apply(image, drawn), drawn


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep_range", [True, False])
def test_zero_strength_is_the_identity_bit_for_bit(shape, keep_range):
    image = images(shape)
    assert torch.equal(changed(image, strength=(0.0, 0.0), keep_range=keep_range)[0], image)


def test_a_blur_of_no_width_leaves_no_detail_to_add():
    image = images((2, 1, 8, 8))
    assert torch.equal(changed(image, sigma=(0.0, 0.0))[0], image)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep_range", [True, False])
def test_sharpening_adds_the_difference_to_the_blurred_image(shape, keep_range):
    image = images(shape)
    result, drawn = changed(image, keep_range=keep_range)
    for row, channel in np.ndindex(shape[:2]):
        one = image[row, channel].double().numpy()
        sigma = drawn["sigma"][row, channel].tolist()
        blurred = gaussian_filter(one, sigma, mode="mirror", radius=[math.ceil(3 * value) for value in sigma])
        slow = one + float(drawn["strength"][row, channel]) * (one - blurred)
        slow = slow.clip(one.min(), one.max()) if keep_range else slow
        assert np.abs(result[row, channel].numpy() - slow).max() < 1e-5


def test_edges_get_steeper_and_the_range_is_kept_unless_freed():
    image = torch.zeros(1, 1, 5, 20)
    image[..., 9] = 0.3
    image[..., 10] = 0.7
    image[..., 11:] = 1
    kept, _ = changed(image)
    free, _ = changed(image, keep_range=False)
    assert (kept[..., 10] - kept[..., 9] > image[..., 10] - image[..., 9]).all()
    assert kept.min() == 0 and kept.max() == 1
    assert free.min() < 0 and free.max() > 1
    assert torch.allclose(free.mean(), image.mean(), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_is_changed_alike_alone_and_in_a_batch(shape):
    image = images(shape)
    together, drawn = changed(image, probability=0.7, per_channel=0.6)
    assert 0 < drawn["active"].sum() < drawn["active"].numel()
    for row in range(len(image)):
        alone, own = changed(image[row : row + 1], first=row, probability=0.7, per_channel=0.6)
        assert torch.equal(alone[0], together[row])
        assert all(torch.equal(own[key][0], drawn[key][row]) for key in drawn)


def test_modalities_that_keep_and_that_free_the_range_share_a_batch():
    image = images((2, 1, 12, 12))
    settings = {"MR": SharpenSettings(probability=1), "US": SharpenSettings(probability=1, keep_range=False)}
    transform = Sharpen(settings)
    drawn = transform.draw(Facts(("MR", "US"), torch.ones(2, 3), (12, 12), 1), Draw(0, range(2)))
    result = transform.apply(image, drawn)
    assert result[0].max() == image[0].max() and result[0].min() == image[0].min()
    assert result[1].max() > image[1].max() and result[1].min() < image[1].min()


def test_the_same_draw_repeats_and_samples_and_channels_differ():
    image = images((1, 1, 16, 16)).repeat(3, 2, 1, 1)
    result, _ = changed(image)
    assert torch.equal(result, changed(image)[0])
    assert len({tuple(one.flatten().tolist()) for one in result.flatten(0, 1)}) == 6


def test_input_dtype_and_shape_are_kept():
    image = images((2, 1, 8, 8, 8)).double()
    before = image.clone()
    result, _ = changed(image)
    assert torch.equal(image, before) and result.dtype == torch.float64 and result.shape == image.shape


@pytest.mark.parametrize("shape", [(2, 1, 6, 6, 6), (2, 1, 1, 1, 1), (2, 1, 1, 5, 5), (2, 1, 1, 1)])
def test_constant_images_and_single_voxels_are_kept(shape):
    image = torch.full(shape, 3.0)
    assert torch.equal(changed(image)[0], image)
    assert torch.allclose(changed(image, keep_range=False)[0], image, atol=1e-5)


def test_a_modality_without_settings_is_never_changed():
    image = images((3, 1, 6, 6))
    result, drawn = changed(image, modality="CT")
    assert not drawn["active"].any() and torch.equal(result, image)


@pytest.mark.parametrize(
    "settings", [{"strength": (1.0, 0.1)}, {"strength": (-1, 0)}, {"sigma": (0.5, 50)}, {"alpha": 1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        SharpenSettings(**settings)
