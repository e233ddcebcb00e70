"""Thick slices: the mean over what they cover, nothing where the voxels are as thick, and every sample on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from medssl.augmentation.acquisition import Anisotropy, AnisotropySettings, thick_slices
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw

SHAPES = [(6, 2, 12, 14, 13), (6, 2, 14, 13)]


def images(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def changed(image, spacing=(1.0, 1.0, 1.0), first=0, modality="MR", **settings):
    transform = Anisotropy({"MR": AnisotropySettings(**{"probability": 1.0, **settings})})
    count = len(image)
    facts = Facts(
        (modality,) * count, torch.tensor([spacing]).double().repeat(count, 1), image.shape[2:], image.shape[1]
    )
    drawn = transform.draw(facts, Draw(0, range(first, first + count)))
    return transform.apply(image, drawn), drawn


def slow_thick_slices(line: np.ndarray, factor: float) -> np.ndarray:
    """One line: slices by fine summation over sub-voxels, then linear interpolation between slice centres."""
    edge, fine = len(line), 1000
    count = int(np.ceil(edge / factor))
    start = (edge - count * factor) / 2
    centres, means = [], []
    for number in range(count):
        low = start + number * factor
        at = low + (np.arange(fine) + 0.5) / fine * factor
        means.append(line[np.clip(np.floor(at), 0, edge - 1).astype(int)].mean())
        centres.append(low + factor / 2 - 0.5)
    return np.interp(np.arange(edge), centres, means)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.5, 2.0, 3.3, 5.0, 40.0])
def test_slices_are_means_over_their_thickness_brought_back_linearly(axis, factor):
    image = images((9, 12, 15))
    result = thick_slices(image, axis, factor).movedim(axis, 0).flatten(1)
    lines = image.movedim(axis, 0).flatten(1).numpy()
    for number in range(0, lines.shape[1], 7):
        assert np.abs(result[:, number].numpy() - slow_thick_slices(lines[:, number], factor)).max() < 2e-2


def test_nearest_planes_equal_torchio_where_its_grid_has_the_same_middle():
    torchio = pytest.importorskip("torchio")
    image = images((12, 8, 8))
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=image[None]))
    theirs = torchio.RandomAnisotropy(axes=0, downsampling=(3, 3))(subject).image.data[0]
    ours = thick_slices(image, 0, 3.0, nearest=True)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_constant_keeps_its_value_a_ramp_its_slope_and_a_volume_its_mean():
    assert torch.allclose(thick_slices(torch.full((10, 4), 3.0), 0, 3.7), torch.tensor(3.0))
    ramp = torch.arange(24.0)[:, None].repeat(1, 3)
    assert torch.allclose(thick_slices(ramp, 0, 3.0)[2:-2], ramp[2:-2], atol=1e-5)
    image = images((48, 20, 20))
    for factor in (2.0, 4.0):
        assert thick_slices(image, 0, factor).mean().item() == pytest.approx(image.mean().item(), abs=0.01)


@pytest.mark.parametrize("nearest", [True, False])
def test_a_mirrored_image_gives_the_mirrored_result(nearest):
    for edge, factor in ((13, 2.5), (13, 3.0), (13, 4.4), (12, 2.0)):
        image = images((edge, 6))
        mirrored = thick_slices(image.flip(0), 0, factor, nearest=nearest)
        assert torch.allclose(mirrored, thick_slices(image, 0, factor, nearest=nearest).flip(0), atol=1e-5)


def test_only_the_drawn_axis_is_changed():
    image = torch.arange(14.0)[:, None].repeat(1, 13).reshape(1, 1, 14, 13)
    result, _ = changed(image, axes=("x",), factor=(4, 4))
    assert torch.equal(result, image)
    result, _ = changed(image + torch.randn(1, 1, 14, 1), axes=("y",), factor=(4, 4))
    assert torch.allclose(result, result[..., :1].expand_as(result))


@pytest.mark.parametrize("shape", SHAPES)
def test_axes_are_drawn_among_the_allowed_ones(shape):
    flat = 5 - len(shape)
    _, drawn = changed(images((64, 1, *shape[2:])), axes=("z", "x"))
    assert set(drawn["axis"].flatten().tolist()) == ({0, 2} if flat == 0 else {1})
    _, drawn = changed(images((64, 1, *shape[2:])))
    assert len(set(drawn["axis"].flatten().tolist())) == len(shape) - 2


def test_an_axis_that_images_do_not_have_leaves_them_alone():
    image = images((4, 1, 14, 13))
    result, drawn = changed(image, axes=("z",))
    assert torch.equal(result, image) and not drawn["active"].any()


def test_channels_of_a_sample_share_what_was_drawn_and_samples_differ():
    _, drawn = changed(images((32, 3, 8, 8, 8)))
    assert (drawn["factor"] == drawn["factor"][:, :1]).all() and (drawn["axis"] == drawn["axis"][:, :1]).all()
    assert len(drawn["factor"][:, 0].unique()) == 32
    assert drawn["factor"].min() >= 1.5 and drawn["factor"].max() <= 5


def test_a_thickness_in_mm_is_relative_to_the_voxels_along_the_axis():
    image = images((50, 1, 8, 8, 8))
    _, drawn = changed(image, spacing=(1.5, 0.5, 0.5), axes=("z",), thickness_mm=(3.0, 6.0))
    assert 2 <= drawn["factor"].min() < 2.2 and 3.8 < drawn["factor"].max() <= 4
    _, drawn = changed(image, spacing=(1.5, 0.5, 0.5), axes=("y",), thickness_mm=(3.0, 6.0))
    assert drawn["factor"].min() >= 6 and drawn["factor"].max() <= 12
    _, drawn = changed(image[:, :, 0], spacing=(9.0, 0.5, 2.0), axes=("x",), thickness_mm=(3.0, 4.0))
    assert drawn["factor"].min() >= 1.5 and drawn["factor"].max() <= 2


def test_voxels_as_thick_as_the_slices_keep_every_bit():
    image = images((8, 1, 8, 8, 8))
    result, drawn = changed(image, spacing=(5.0, 1.0, 1.0), axes=("z",), thickness_mm=(3.0, 5.0))
    assert torch.equal(result, image) and not drawn["active"].any()
    result, _ = changed(image, factor=(1.0, 1.0))
    assert torch.equal(result, image)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_is_changed_alike_alone_and_in_a_batch_and_others_keep_every_bit(shape):
    image = images(shape)
    before = image.clone()
    together, drawn = changed(image, probability=0.6)
    assert torch.equal(image, before)
    assert 0 < drawn["active"][:, 0].sum() < len(image)
    for row in range(len(image)):
        alone, _ = changed(image[row : row + 1], first=row, probability=0.6)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(together[row], image[row]) != bool(drawn["active"][row, 0])


def test_dtype_is_kept_and_thin_constant_or_modality_without_settings_are_safe():
    result, _ = changed(images((2, 1, 8, 8, 8)).double())
    assert result.dtype == torch.float64
    for shape in ((2, 1, 1, 1, 1), (2, 1, 1, 5, 5), (2, 1, 2, 1, 1)):
        result, _ = changed(torch.full(shape, 3.0))
        assert torch.allclose(result, torch.full(shape, 3.0), atol=1e-5)
    image = images((4, 1, 8, 8))
    result, drawn = changed(image, modality="CT")
    assert torch.equal(result, image) and not drawn["active"].any()


@pytest.mark.parametrize(
    "settings",
    [
        {"factor": (0.5, 2.0)},
        {"factor": (3.0, 2.0)},
        {"factor": (1.0, 100.0)},
        {"thickness_mm": (0.0, 2.0)},
        {"thickness_mm": (3.0, 2.0)},
        {"thickness_mm": (3.0, 5.0), "factor": (1.0, 2.0)},
        {"axes": ()},
        {"axes": ("w",)},
        {"down": "median"},
        {"downsampling": (1, 2)},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        AnisotropySettings(probability=1, **settings)
