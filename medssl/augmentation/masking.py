"""Masks that hide part of a view from the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.augmentation.transform import to_device
from medssl.data.draw import Draw


def block_mask(
    draw: Draw,
    spatial_shape: Sequence[int],
    block: int | Sequence[int],
    ratio: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Hide whole blocks of a regular grid, the same number in every sample (He et al., CVPR 2022).

    Where the image is no multiple of the block, the grid is centred, so that the blocks cut by the border are the
    outer ones on both sides; a cut block counts as one block.

    Args:
        draw: Stream of the batch; each sample has its own mask.
        spatial_shape: (Z, Y, X) or (Y, X).
        block: Edge of a block in voxels, one number or one per axis.
        ratio: Part of the blocks that is hidden; rounded to a whole number of blocks.
        device: Where the mask is returned.

    Returns:
        True where the input is hidden. Shape: (B, 1, *spatial_shape), bool.

    Raises:
        ValueError: If the ratio is not in [0, 1], the block does not fit the number of axes, or is so large
            that nothing or everything would be hidden.
    """
    sizes = [int(size) for size in spatial_shape]
    edges = [int(block)] * len(sizes) if isinstance(block, int) else [int(edge) for edge in block]
    if len(edges) != len(sizes) or min(edges) < 1:
        raise ValueError(
            f"block {block} does not fit an image of {len(sizes)} axes: give one positive edge, or one per axis"
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is the hidden part of the blocks, in [0, 1]; got {ratio}")
    counts = [math.ceil(size / edge) for size, edge in zip(sizes, edges, strict=True)]
    order = draw.permutation(math.prod(counts))
    hidden = hidden_blocks(sizes, edges, ratio)
    if 0 < ratio < 1 and hidden in (0, math.prod(counts)):
        raise ValueError(
            f"blocks of {block} divide an image of {tuple(sizes)} into {math.prod(counts)}; a ratio of {ratio} would "
            f"hide {hidden} of them. Use a smaller block."
        )
    mask = torch.zeros(order.shape, dtype=torch.bool)
    mask.scatter_(1, order[:, :hidden], True)
    mask = to_device(mask.reshape(len(draw), 1, *counts), torch.device(device))
    for axis, (size, edge, count) in enumerate(zip(sizes, edges, counts, strict=True), start=2):
        before = (count * edge - size) // 2
        mask = mask.repeat_interleave(edge, dim=axis).narrow(axis, before, size)
    return mask.contiguous()


def hidden_blocks(spatial_shape: Sequence[int], block: int | Sequence[int], ratio: float) -> int:
    """Return how many blocks `block_mask` hides in each sample."""
    edges = [block] * len(spatial_shape) if isinstance(block, int) else block
    return round(ratio * math.prod(math.ceil(size / edge) for size, edge in zip(spatial_shape, edges, strict=True)))
