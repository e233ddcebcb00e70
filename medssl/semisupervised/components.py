"""The largest connected part of each class, found on the device without the host waiting for it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def largest_components(classes: Tensor, count: int) -> Tensor:
    """Keep of each class above background its largest part, sample by sample; the rest becomes background.

    Voxels that touch by a face, an edge or a corner belong together. Of parts of one size, one is kept.

    Args:
        classes: Class of each voxel. Shape: (B, *spatial), int64, with two or three spatial axes.
        count: Number of classes with the background.

    Returns:
        Shape: (B, *spatial), int64.

    Raises:
        ValueError: If the shape or type does not fit.
    """
    if classes.ndim not in (3, 4) or classes.dtype != torch.int64:
        raise ValueError(
            f"Components need classes (B, Z, Y, X) or (B, Y, X) of int64, got {tuple(classes.shape)}, {classes.dtype}"
        )
    kept = torch.zeros_like(classes)
    for number in range(1, count):
        kept = torch.where(_largest(classes == number), number, kept)
    return kept


def _largest(mask: Tensor) -> Tensor:
    """Return the largest part of each mask. Shape: (B, *spatial), bool."""
    root = components(mask).flatten(1)
    inside = mask.flatten(1)
    voxels = torch.zeros_like(root).scatter_add_(1, root, inside.long())
    # The place of its root breaks a tie: of equal numbers a device may choose any, and another one next time.
    size = voxels * root.shape[1] + torch.arange(root.shape[1], device=root.device)
    return (inside & (root == size.argmax(dim=1, keepdim=True))).view_as(mask)


def components(mask: Tensor) -> Tensor:
    """Return for each voxel of a mask the number of one voxel of its part, the same for all of a part.

    Trees of voxels are hooked onto neighbouring trees with larger numbers and flattened (FastSV: Zhang, Azad and Hu,
    SIAM PP 2020). Each round joins many trees at once, so that few are needed: 16 for one line that winds through
    255 x 255 voxels. A fixed number of rounds takes the place of a look at the device whether all is done; on the CPU
    there is a look.

    Args:
        mask: Shape: (B, *spatial), bool.

    Returns:
        Shape: (B, *spatial), int64; a voxel outside the mask has its own number.
    """
    shape, inside = mask.shape, mask.flatten(1)
    voxels = inside.shape[1]
    parent = torch.arange(voxels, device=mask.device).expand_as(inside).contiguous()
    for _ in range(rounds_for(voxels)):
        before = parent
        grandparent = parent.gather(1, parent)
        near = _largest_near(torch.where(inside, grandparent, -1).view(shape)).flatten(1)
        near = torch.where(inside, near, grandparent)
        parent = parent.scatter_reduce(1, parent, near, "amax")
        parent = torch.maximum(parent, near)
        # There a look costs nothing, and a round does.
        if parent.device.type == "cpu" and torch.equal(parent, before):
            break
    return parent.view(shape)


def rounds_for(voxels: int) -> int:
    """Return how many rounds are computed on a device that is not looked at."""
    return 8 + math.ceil(math.log2(max(voxels, 2)))


def _largest_near(values: Tensor) -> Tensor:
    """Return the largest value of a voxel and its neighbours. Shape: (B, *spatial), int64."""
    pool = F.max_pool2d if values.ndim == 3 else F.max_pool3d
    # Whole numbers up to 2^24 are exact in float32; volumes have more voxels than that at times.
    dtype = torch.float32 if values[0].numel() < 2**24 else torch.float64
    return pool(values[:, None].to(dtype), 3, stride=1, padding=1)[:, 0].long()
