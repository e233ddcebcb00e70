"""Painting hides what was asked, fills within the image's own values, and shuffling keeps every voxel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medssl.augmentation.painting import fill, in_painting, local_shuffle, out_painting
from medssl.data.draw import Draw

SIZES = [(20, 24, 30), (24, 30), (1, 24, 30)]


def images(size, samples=3, channels=2, seed=0) -> torch.Tensor:
    """Return values around 40 to 60: far from 0 and 1, so that foreign values are seen."""
    image = torch.rand((samples, channels, *size), generator=torch.Generator().manual_seed(seed))
    return 40 + 10 * image + 10 * torch.arange(channels).reshape(-1, *([1] * len(size)))


@pytest.mark.parametrize("size", SIZES)
def test_in_painting_hides_a_few_boxes_of_a_sixth_to_a_third_inside_the_image(size):
    masks = in_painting(Draw(0, range(200)), size)
    assert masks.shape == (200, 1, *size) and masks.dtype == torch.bool
    assert not masks.flatten(1).all(dim=1).any() and masks.flatten(1).any(dim=1).all()
    low = np.prod([max(1, int(edge / 6)) for edge in size])
    high = np.prod([max(1, int(edge / 3)) for edge in size])
    hidden = masks.flatten(1).sum(dim=1)
    assert low <= hidden.min() and hidden.max() <= 5 * high
    for axis, edge in enumerate(size):
        if edge > 1:
            used = masks.movedim(axis + 2, 0).flatten(1).any(dim=1)
            assert not used[:3].any() and not used[-3:].any() and used[3:-3].all()


def test_one_box_of_in_painting_is_one_box():
    for mask in in_painting(Draw(0, range(30)), (20, 24, 30), count=(1, 1)):
        found = ndimage.find_objects(mask[0].numpy().astype(int))
        sides = [part.stop - part.start for part in found[0]]
        assert len(found) == 1 and np.prod(sides) == int(mask.sum())
        assert all(int(edge / 6) <= side <= int(edge / 3) for side, edge in zip(sides, (20, 24, 30), strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_out_painting_shows_a_union_of_boxes_and_hides_the_border(size):
    masks = out_painting(Draw(0, range(100)), size)
    shown = (~masks).flatten(1).sum(dim=1)
    low = np.prod([max(1, int(edge * 3 / 7 + 1e-6)) for edge in size])
    assert shown.min() >= low and masks.flatten(1).any(dim=1).all()
    for axis, edge in enumerate(size):
        if edge > 1:
            along = masks.movedim(axis + 2, 0).flatten(1)
            assert along[:3].all() and along[-3:].all()


@pytest.mark.parametrize("paint", [in_painting, out_painting])
def test_painted_samples_differ_repeat_and_do_not_depend_on_their_batch(paint):
    together = paint(Draw(4, [7, 8]), (20, 24, 30))
    assert not torch.equal(together[0], together[1])
    assert torch.equal(paint(Draw(4, [8]), (20, 24, 30))[0], together[1])


def mask_of(size, samples=3) -> torch.Tensor:
    return in_painting(Draw(9, range(samples)), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["noise", "uniform", "zero", "mean", "alien", "background"])
def test_only_hidden_voxels_change_and_they_hold_what_was_asked(how, size):
    image, mask = images(size), mask_of(size)
    before = image.clone()
    background = torch.tensor([-1.0, -2.0, -3.0])
    partner = torch.tensor([2, 0, 1])
    result = fill(image, mask, how, Draw(0, range(3)), background=background, partner=partner)
    assert torch.equal(image, before) and result.dtype == image.dtype
    for row, channel in np.ndindex(3, 2):
        hidden, own, new = mask[row, 0], image[row, channel], result[row, channel]
        assert torch.equal(new[~hidden], own[~hidden])
        inside, seen = new[hidden], own[~hidden]
        if how == "zero":
            assert (inside == 0).all()
        elif how == "background":
            assert (inside == background[row]).all()
        elif how == "alien":
            assert torch.equal(inside, image[partner[row], channel][hidden])
        elif how == "mean":
            assert torch.allclose(inside, seen.mean().expand_as(inside), atol=1e-4)
        else:
            assert len(inside.unique()) > 0.9 * len(inside) > 3
        if how == "uniform":
            assert seen.min() <= inside.min() and inside.max() <= seen.max()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-900.0, 150.0)])
def test_noise_and_uniform_have_the_moments_and_the_range_of_the_visible_image(mean, std):
    image = mean + std * torch.randn(2, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 24, 24, 24, dtype=torch.bool)
    mask[..., 12:] = True
    # What is hidden tells nothing to the fill.
    image[..., 12:] += 50 * std
    noise, uniform = (fill(image, mask, how, Draw(0, range(2)))[..., 12:].flatten(1) for how in ("noise", "uniform"))
    assert torch.allclose(noise.mean(dim=1), torch.tensor(mean), atol=0.04 * std)
    assert torch.allclose(noise.std(dim=1), torch.tensor(std), rtol=0.03)
    low, high = image[..., :12].flatten(1).amin(dim=1), image[..., :12].flatten(1).amax(dim=1)
    assert (uniform.amin(dim=1) >= low).all() and (uniform.amax(dim=1) <= high).all()
    assert torch.allclose(uniform.mean(dim=1), (low + high) / 2, atol=0.03 * std * 8)
    assert torch.allclose(uniform.amax(dim=1) - uniform.amin(dim=1), high - low, rtol=0.01)


@pytest.mark.parametrize("size", [(40, 41, 42), (24, 30), (1, 24, 30)])
@pytest.mark.parametrize("how", ["noise", "uniform", "mean"])
def test_a_sample_is_filled_alike_alone_and_in_a_batch(how, size):
    image, mask = images(size), mask_of(size)
    together = fill(image, mask, how, Draw(1, range(3)))
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(fill(image[one], mask[one], how, Draw(1, [row]))[0], together[row])


@pytest.mark.parametrize("how", ["noise", "uniform", "mean"])
def test_samples_wholly_hidden_or_wholly_shown_stay_finite(how):
    image = images((4, 5, 6), samples=2)
    mask = torch.stack([torch.ones(1, 4, 5, 6), torch.zeros(1, 4, 5, 6)]).bool()
    result = fill(image, mask, how, Draw(0, range(2)))
    assert (result[0] == 0).all()
    assert torch.equal(result[1], image[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["noise", "uniform", "zero", "mean", "alien", "background"])
def test_dtype_is_kept_by_every_fill(how, dtype):
    image, mask = images((12, 12, 12)).to(dtype), mask_of((12, 12, 12))
    result = fill(image, mask, how, Draw(0, range(3)), background=torch.zeros(3))
    assert result.dtype == dtype and torch.isfinite(result).all()


def test_fills_that_make_no_sense_are_named():
    image, mask, draw = images((6, 6, 6)), mask_of((6, 6, 6)), Draw(0, range(3))
    with pytest.raises(ValueError, match=r"is bool \(3, 1, 6, 6, 6\), got torch.float32"):
        fill(image, mask.float(), "zero")
    with pytest.raises(ValueError, match="is bool"):
        fill(image, mask[:2], "zero")
    with pytest.raises(ValueError, match=r"how is one of noise, uniform.*got 'black'"):
        fill(image, mask, "black")
    with pytest.raises(ValueError, match="needs a draw"):
        fill(image, mask, "noise")
    with pytest.raises(ValueError, match="pass background"):
        fill(image, mask, "background", draw)
    with pytest.raises(ValueError, match="shows it"):
        fill(image, mask, "alien", partner=torch.tensor([1, 0, 2]))
    with pytest.raises(ValueError, match="3 samples, the draw has 2"):
        fill(image, mask, "noise", Draw(0, range(2)))
    with pytest.raises(ValueError, match="side is an ordered range"):
        in_painting(draw, (6, 6), side=(0.5, 0.2))


@pytest.mark.parametrize("size", [(30, 40, 35), (40, 35), (1, 40, 35)])
def test_shuffling_keeps_every_voxel_and_moves_none_further_than_a_window(size):
    number = torch.arange(np.prod(size), dtype=torch.float64).reshape(size)
    image = torch.stack([number, number + 0.5]).repeat(3, 1, *([1] * len(size)))
    before = image.clone()
    result = local_shuffle(image, Draw(0, range(3)), side=0.1)
    assert torch.equal(image, before)
    for row in range(3):
        assert torch.equal(result[row].flatten(1).sort(dim=1).values, image[row].flatten(1)), "none lost or doubled"
        assert torch.equal(result[row, 1], result[row, 0] + 0.5), "channels move together"
        source = np.stack(np.unravel_index(result[row, 0].long().numpy(), size))
        moved = np.abs(source - np.indices(size)).reshape(len(size), -1).max(axis=1)
        largest = [max(1, edge // 10) for edge in size]
        assert (moved <= np.array(largest) - 1).all() and moved.max() > 0


def test_windows_are_shuffled_as_often_as_asked_and_every_order_is_met():
    size = (60, 60)
    number = torch.arange(3600.0).reshape(1, 1, *size).repeat(40, 1, 1, 1)
    for fraction in (0.0, 0.5, 1.0):
        result = local_shuffle(number, Draw(0, range(40)), fraction=fraction)
        moved = (result != number).float().mean()
        assert moved.item() == pytest.approx(0.88 * fraction, abs=0.06)
    steps = (result - number).flatten().unique()
    assert len(steps) > 100, "voxels move by all distances within a window"


def test_shuffling_keeps_local_means():
    image = torch.arange(64.0).reshape(1, 1, 64, 1, 1).expand(1, 1, 64, 64, 64).contiguous()
    result = local_shuffle(image, Draw(0, [0]), fraction=1.0)
    assert (result - image).abs().max() <= 5 and (result != image).float().mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shuffled_samples_differ_repeat_and_do_not_depend_on_their_batch(dtype):
    image = images((30, 32, 34), samples=1).repeat(2, 1, 1, 1, 1).to(dtype)
    together = local_shuffle(image, Draw(4, [7, 8]))
    assert together.dtype == dtype and not torch.equal(together[0], together[1])
    assert torch.equal(local_shuffle(image[1:], Draw(4, [8]))[0], together[1])


def test_shuffles_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match=r"image of \(9, 9\) have one voxel.*raise side"):
        local_shuffle(torch.zeros(1, 1, 9, 9), Draw(0, [0]))
    with pytest.raises(ValueError, match="side lies in"):
        local_shuffle(torch.zeros(1, 1, 9, 9), Draw(0, [0]), side=0.0)
    with pytest.raises(ValueError, match="draw has 2"):
        local_shuffle(torch.zeros(1, 1, 90, 90), Draw(0, [0, 1]))
