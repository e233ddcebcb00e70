"""Masks hide exactly what was asked, in every sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medssl.augmentation.masking import block_mask, group_mask, hidden_blocks, random_mask
from medssl.data.draw import Draw


@pytest.mark.parametrize(
    ("shape", "block", "ratio"),
    [
        ((16, 16, 16), 4, 0.6),
        ((8, 24, 32), (2, 8, 8), 0.75),
        ((32, 32), 8, 0.65),
        ((28, 28), 7, 0.5),
        ((9, 9, 9), 1, 0.3),
    ],
)
def test_every_sample_hides_the_same_exact_number_of_whole_blocks(shape, block, ratio):
    mask = block_mask(Draw(0, range(5)), shape, block, ratio)
    edges = (block,) * len(shape) if isinstance(block, int) else block
    assert mask.shape == (5, 1, *shape) and mask.dtype == torch.bool
    blocks = math.prod(size // edge for size, edge in zip(shape, edges, strict=True))
    assert mask.flatten(1).sum(dim=1).tolist() == [round(ratio * blocks) * math.prod(edges)] * 5
    assert hidden_blocks(shape, block, ratio) == round(ratio * blocks)
    cut = mask[:, 0]
    for axis, edge in enumerate(edges, start=1):
        cut = cut.unfold(axis, edge, edge)
    inner = cut.flatten(1 + len(shape))
    assert torch.equal(inner.all(dim=-1), inner.any(dim=-1)), "a block is hidden whole or not at all"


@pytest.mark.parametrize("shape", [(20, 33, 30), (30, 21), (9, 9, 9)])
def test_an_image_that_is_no_multiple_of_the_block_is_covered_to_its_border(shape):
    all_hidden = block_mask(Draw(0, range(2)), shape, 8, 1.0)
    assert all_hidden.all() and all_hidden.shape == (2, 1, *shape)
    mask = block_mask(Draw(0, range(200)), shape, 8, 0.5)
    assert mask.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert mask.any(dim=0).all() and not mask.all(dim=0).any(), "every voxel is hidden in some samples, none in all"


def test_samples_differ_and_do_not_depend_on_their_batch():
    together = block_mask(Draw(4, [7, 8]), (16, 16), 4, 0.5)
    assert not torch.equal(together[0], together[1])
    assert torch.equal(block_mask(Draw(4, [8]), (16, 16), 4, 0.5)[0], together[1])


def test_nothing_and_everything_can_be_hidden():
    assert not block_mask(Draw(0, [0]), (8, 8), 4, 0.0).any()
    assert block_mask(Draw(0, [0]), (8, 8), 4, 1.0).all()


def test_a_block_so_large_that_nothing_would_be_hidden_is_named():
    with pytest.raises(ValueError, match=r"blocks of 8 divide an image of \(5, 5\) into 1.*smaller block"):
        block_mask(Draw(0, [0]), (5, 5), 8, 0.4)


@pytest.mark.parametrize(
    ("block", "ratio", "message"),
    [(0, 0.5, "positive edge"), ((4, 4, 4), 0.5, "one per axis"), (4, 1.5, "in \\[0, 1\\]")],
)
def test_masks_that_make_no_sense_are_named(block, ratio, message):
    with pytest.raises(ValueError, match=message):
        block_mask(Draw(0, [0]), (8, 8), block, ratio)


@pytest.mark.parametrize("shape", [(9, 10, 11), (13, 12), (1, 20, 20), (1, 1, 2)])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.75, 1.0])
def test_random_masks_hide_the_exact_number_of_voxels(shape, ratio):
    if shape == (1, 1, 2) and ratio in (0.2, 0.75):
        pytest.skip("of two voxels only none, one or both can be hidden")
    mask = random_mask(Draw(0, range(4)), shape, ratio)
    assert mask.shape == (4, 1, *shape) and mask.dtype == torch.bool
    assert mask.flatten(1).sum(dim=1).tolist() == [round(ratio * math.prod(shape))] * 4


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_random_masks_hide_every_voxel_as_often_and_apart_from_its_neighbours(ratio):
    mask = random_mask(Draw(1, range(2000)), (6, 8), ratio).float()[:, 0]
    assert (mask.mean(dim=0) - ratio).abs().max() < 0.05
    together = np.corrcoef(mask.flatten(1).T.numpy())
    assert np.abs(together - np.eye(48) - (np.eye(48) - 1) / 47).max() < 0.12


def test_random_masks_of_patches_hide_whole_patches():
    mask = random_mask(Draw(0, range(3)), (8, 12), 0.5, patch=4)
    assert torch.equal(mask, block_mask(Draw(0, range(3)), (8, 12), 4, 0.5))


@pytest.mark.parametrize("shape", [(20, 24, 22), (30, 28), (1, 30, 30)])
def test_group_masks_hide_what_was_drawn_and_no_more_than_one_box_above(shape):
    draw = Draw(5, range(30))
    hidden = group_mask(draw, shape, (0.5, 0.75), (0.05, 0.3)).flatten(1).sum(dim=1)
    asked = draw.child("fraction").uniform(0.5, 0.75).double() * math.prod(shape)
    largest = math.prod(max(1, int(0.3 * edge)) for edge in shape)
    assert (hidden >= asked).all() and (hidden - asked < largest).all()
    assert len(hidden.unique()) > 15


def test_group_masks_hide_boxes_and_not_single_voxels():
    mask = group_mask(Draw(0, range(4)), (24, 24, 24), (0.5, 0.5), (0.2, 0.3))[:, 0]
    alike = (mask[:, 1:] == mask[:, :-1]).float().mean()
    assert alike > 0.8


@pytest.mark.parametrize("part", [0.0, 0.999, 1.0])
def test_group_masks_of_any_ratio_end(part):
    mask = group_mask(Draw(0, range(3)), (16, 18, 20), (part, part), (0.1, 0.2))
    assert (mask.flatten(1).float().mean(dim=1) >= part).all() and (part > 0 or not mask.any())


@pytest.mark.parametrize(
    "make", [lambda draw: random_mask(draw, (12, 14, 10), 0.4), lambda draw: group_mask(draw, (12, 14, 10))]
)
def test_random_and_group_masks_differ_repeat_and_do_not_depend_on_their_batch(make):
    together = make(Draw(4, [7, 8]))
    assert not torch.equal(together[0], together[1])
    assert torch.equal(make(Draw(4, [8]))[0], together[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda draw: random_mask(draw, (8, 8), 1.2), "in \\[0, 1\\]"),
        (lambda draw: random_mask(draw, (8, 8), 0.001), "would hide 0"),
        (lambda draw: random_mask(draw, (8, 8), 0.5, patch=(4, 4, 4)), "one per axis"),
        (lambda draw: group_mask(draw, (8, 8), (0.7, 0.5)), "fraction is an ordered range"),
        (lambda draw: group_mask(draw, (8, 8), side=(0.5, 1.5)), "side is an ordered range"),
        (lambda draw: group_mask(draw, (99, 99, 99), side=(0.0, 0.02)), "random_mask"),
    ],
)
def test_random_and_group_masks_that_make_no_sense_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(Draw(0, [0]))
