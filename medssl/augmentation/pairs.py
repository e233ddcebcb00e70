"""Two crops of one read whose boxes overlap by a drawn part of their volume, reached by whole-voxel shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.augmentation.spatial import Spatial
from medssl.augmentation.transform import Facts
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.errors import UsageError


def pair_shifts(
    spatial: Spatial, batch: Batch, facts: Facts, draw: Draw, overlap: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Draw the shifts of a pair of views within what the policy's `spatial.shift` allows and the batch holds.

    Args:
        spatial: Whose shift setting bounds the displacement, and whose patch is cut.
        batch: Crops.
        facts: Of the batch's views.
        draw: Stream of the pair.
        overlap: Smallest and largest volume of the intersection, relative to the patch's.

    Returns:
        Shifts of the first and the second view, in voxels. Shapes: (B, 3), int64.

    Raises:
        UsageError: If the range makes no sense or is out of reach, or the crops are too small to shift a patch in.
    """
    patch = (1,) * (3 - len(spatial.patch_size)) + spatial.patch_size
    read = (1,) * (3 - batch.dimensions) + tuple(batch.image.shape[2:])
    reach = spatial.reach(facts)
    shifts = overlapping_shifts(draw, patch, reach, overlap)
    needed = tuple(int(edge + 2 * more) for edge, more in zip(patch, reach.amax(dim=0).tolist(), strict=True))
    if any(edge < need for edge, need in zip(read, needed, strict=True)):
        raise UsageError(
            f"The crops are {read} voxels; a pair of patches of {patch} with the policy's shifts needs {needed}. Read "
            "crops of the policy's read_size, or lower spatial.shift."
        )
    return shifts


def overlapping_shifts(
    draw: Draw, patch: Sequence[int], reach: Tensor, overlap: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Draw how two patches are shifted from the middle of what was read, to either side.

    The overlap is drawn evenly from its range and the direction of the displacement evenly over its axes. Along that
    direction, one voxel at a time, the displacement is taken that comes nearest to the drawn overlap.

    Args:
        draw: Stream of the pair.
        patch: Size of the views, (Z, Y, X).
        reach: Largest shift of a view along each axis, in whole voxels. Shape: (B, 3).
        overlap: Smallest and largest volume of the intersection, relative to the patch's.

    Returns:
        Shifts of the first and the second view. Shapes: (B, 3), int64.

    Raises:
        UsageError: If the range is not within [0, 1], too narrow for whole voxels, or out of reach.
    """
    reach = reach.long()
    _check(patch, reach, overlap)
    low, high = overlap
    edges = torch.tensor(patch, dtype=torch.float64)
    least = _least_overlap(edges, reach).clamp(min=low)
    wanted = least + (high - least) * draw.child("overlap").uniform(0, 1)
    # Exponential numbers make the shares of the axes uniform on their simplex.
    shares = -torch.log1p(-draw.child("direction").uniform(0, 1, (3,)).double()).clamp(max=-1e-6)
    signs = 1 - 2 * draw.child("sign").happens(0.5, (3,)).long()

    # Moving along the direction, axis i passes to its k-th voxel at the time (k - 1/2) / (share * edge).
    farthest = 2 * int(reach.max())
    step = torch.arange(1, farthest + 1)
    time = (step - 0.5) / (shares * edges)[:, :, None]
    # What is out of reach comes last: there the overlap is smaller than any that is wanted.
    order = torch.where(step <= 2 * reach[:, :, None], time, math.inf).flatten(1).argsort(dim=1, stable=True)
    moves = torch.nn.functional.one_hot(order // max(farthest, 1), 3)
    path = torch.cat([torch.zeros(len(draw), 1, 3, dtype=torch.int64), moves.cumsum(dim=1)], dim=1)
    shared = (1 - path / edges).clamp(min=0).prod(dim=2)
    fits = (shared >= low - 1e-12) & (shared <= high + 1e-12)
    distance = torch.where(fits, (shared - wanted[:, None]).abs(), math.inf)
    displacement = signs * path[torch.arange(len(draw)), distance.argmin(dim=1)]
    first = torch.div(displacement, 2, rounding_mode="floor")
    return first, first - displacement


def shift_for(overlap: float, patch: Sequence[int]) -> float:
    """Return the smallest setting `shift`, in hundredths, with which two views can overlap by no more than this.

    Views are shifted by whole voxels, so that a small patch needs more than the overlap alone would.

    Args:
        overlap: Volume of the intersection, relative to the patch's.
        patch: Size of the views, (Z, Y, X).

    Returns:
        0.01 to 1; 1 for a patch of one voxel, which is not shifted.
    """
    edges = torch.tensor(patch, dtype=torch.float64)
    tried = torch.arange(1, 101, dtype=torch.float64) / 100
    reach = torch.floor(tried[:, None] * edges * (edges > 1))
    enough = tried[_least_overlap(edges, reach) <= overlap]
    return float(enough[0]) if len(enough) else 1.0


def _check(patch: Sequence[int], reach: Tensor, overlap: tuple[float, float]) -> None:
    low, high = overlap
    if not 0 <= low <= high <= 1:
        raise UsageError(f"overlap is a range of volumes relative to the patch, 0 <= low <= high <= 1; got {overlap}.")
    edges = torch.tensor(patch, dtype=torch.float64)
    least = _least_overlap(edges, reach)
    if bool((least > high).any()):
        raise UsageError(
            f"Two views overlap by at least {float(least.max()):.2f} of their volume with this policy; asked for were "
            f"{low:g} to {high:g}. Raise spatial.shift to {shift_for(high, patch):.2f} or more, which also makes "
            "read_size larger."
        )
    # A step along one axis changes the overlap by one voxel of its edge at most.
    coarsest = min((edge for edge, far in zip(patch, reach.amax(dim=0).tolist(), strict=True) if far > 0), default=0)
    if high < 1 and coarsest and high - low < 1 / coarsest:
        raise UsageError(
            f"The overlap {low:g} to {high:g} is narrower than one voxel of the patch {tuple(patch)}: make it at least "
            f"{1 / coarsest:.3f} wide."
        )


def _least_overlap(edges: Tensor, reach: Tensor) -> Tensor:
    return (1 - 2 * reach / edges).clamp(min=0).prod(dim=1)
