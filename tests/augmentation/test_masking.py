"""Masks hide exactly what was asked, in every sample."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.augmentation.masking import block_mask, hidden_blocks
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
