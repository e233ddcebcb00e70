"""Masks that hide part of a view from the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.augmentation.boxes import draw_cover
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


def random_mask(
    draw: Draw,
    spatial_shape: Sequence[int],
    ratio: float,
    patch: int | Sequence[int] = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Hide voxels, or patches of a regular grid, each as likely as any other and the same number in every sample.

    Single voxels are chosen on the device from a seed per sample, so that CPU and CUDA choose others; patches are
    chosen by `block_mask`.

    Args:
        draw: Stream of the batch.
        spatial_shape: (Z, Y, X) or (Y, X).
        ratio: Part that is hidden, rounded to a whole number of voxels or patches.
        patch: Edge of a patch in voxels, one number or one per axis; 1 hides single voxels.
        device: Where the mask is returned.

    Returns:
        True where the input is hidden. Shape: (B, 1, *spatial_shape), bool.

    Raises:
        ValueError: As in `block_mask`.
    """
    sizes = [int(size) for size in spatial_shape]
    edges = [patch] * len(sizes) if isinstance(patch, int) else list(patch)
    voxels = math.prod(sizes)
    hidden = round(ratio * voxels)
    if edges != [1] * len(sizes) or not 0 <= ratio <= 1 or (0 < ratio < 1 and hidden in (0, voxels)):
        return block_mask(draw, sizes, patch, ratio, device)
    where = torch.device(device)
    # The fewer of the hidden and the visible voxels are picked.
    picked = min(hidden, voxels - hidden)
    mask = torch.full((len(draw), voxels), hidden > picked, dtype=torch.bool, device=where)
    for row, seed in zip(mask, draw.integers(0, 2**62).tolist(), strict=True):
        numbers = torch.rand(voxels, generator=torch.Generator(device=where).manual_seed(seed), device=where)
        row.index_fill_(0, numbers.topk(picked, sorted=False).indices, hidden == picked)
    return mask.reshape(len(draw), 1, *sizes)


def group_mask(
    draw: Draw,
    spatial_shape: Sequence[int],
    ratio: tuple[float, float] = (0.5, 0.75),
    side: tuple[float, float] = (0.05, 0.3),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Hide random boxes until a drawn part of the image is covered (Atito et al., GMML, 2022).

    Args:
        draw: Stream of the batch.
        spatial_shape: (Z, Y, X) or (Y, X).
        ratio: Range of the part that is hidden, drawn per sample.
        side: Range of the boxes' sides as part of the image's edge, drawn for each box and axis.
        device: Where the mask is returned.

    Returns:
        True where the input is hidden: at least the drawn part, and less than it without the last box. Shape:
        (B, 1, *spatial_shape), bool.

    Raises:
        ValueError: If a range is not ordered or not in [0, 1], or the boxes are too small to cover an image one by one.
    """
    return to_device(draw_cover(draw, spatial_shape, ratio, side)[:, None], torch.device(device))
