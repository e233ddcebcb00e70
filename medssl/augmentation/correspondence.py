"""Which voxel of one view shows what a voxel of another view shows, and how much two crops have in common.

Points are (z, y, x) with three components also in 2D, in voxels of a view or in mm from the volume's first voxel.
Nothing here makes the host wait for the device, and a sample's result does not depend on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.batch import View

# Parts of each correction that are applied when an elastic view is inverted. Where it stretches more than twofold,
# whole corrections would jump back and forth, and short ones are slow where it shrinks: with both by turns every
# stretch from 0 to 3.5 converges.
STEP_LENGTHS = (1.0, 0.4) * 8


def source_positions_mm(view: View) -> Tensor:
    """Return where in the volume each voxel of a view came from. Shape: (B, 3, Z, Y, X) or (B, 3, Y, X), float32."""
    affine = _affine(view, _all_voxels(view)).mT.reshape(-1, 3, *view.image.shape[2:])
    return affine if view.displacement_mm is None else affine + view.displacement_mm


def to_source_mm(view: View, voxels: Tensor) -> Tensor:
    """Return where in the volume points of a view came from; between voxels the deformation is interpolated.

    Args:
        view: B views.
        voxels: Points, also between voxels. Shape: (B, N, 3).

    Returns:
        Shape: (B, N, 3), float32.
    """
    affine = _affine(view, voxels.float())
    return affine if view.displacement_mm is None else affine + _displacement_at(view, voxels.float())


def to_view_voxels(view: View, positions_mm: Tensor) -> tuple[Tensor, Tensor]:
    """Return where positions of the volume are seen in a view; the inverse of `to_source_mm`.

    Exact for affine views. A deformation is inverted by repeated correction (a damped fixed-point iteration), which
    converges because it does not fold.

    Args:
        view: B views.
        positions_mm: Positions in mm from the volume's first voxel. Shape: (B, N, 3).

    Returns:
        Voxels of the view, shape (B, N, 3), float32; and whether each lies within the view's voxels, shape (B, N),
        bool. A position that the view does not show has no meaningful voxel.
    """
    inverse = _inverse(view.to_source_mm[:, :, :3])
    straight = _times(inverse, positions_mm.float() - view.to_source_mm[:, None, :, 3])
    voxels = straight
    if view.displacement_mm is not None:
        for length in STEP_LENGTHS:
            error = straight - _times(inverse, _displacement_at(view, voxels)) - voxels
            voxels = voxels + length * error
    return voxels, _within(voxels, view.image.shape[2:])


def match(view_a: View, view_b: View, points_in_a: Tensor) -> tuple[Tensor, Tensor]:
    """Return where view b shows what view a shows at given points.

    Args:
        view_a: B views.
        view_b: As many views of the same volumes.
        points_in_a: Voxels of view a, also between voxels. Shape: (B, N, 3).

    Returns:
        Voxels of view b, shape (B, N, 3), float32; and whether each lies within view b, shape (B, N), bool.
    """
    return to_view_voxels(view_b, to_source_mm(view_a, points_in_a))


def overlap_mask(view_a: View, view_b: View) -> Tensor:
    """Return which voxels of view a show tissue that view b shows too. Shape: as `view_a.inside`, bool."""
    found, within = match(view_a, view_b, _all_voxels(view_a))
    nearest = values_at(view_b.inside.float(), found, view_b.image.shape[2:], mode="nearest")
    seen = within & (nearest[:, 0] > 0.5)
    return view_a.inside & seen.reshape(view_a.inside.shape)


def overlap_fraction(view_a: View, view_b: View) -> Tensor:
    """Return the part of view a's voxels that view b shows too. Shape: (B,), float32."""
    mask = overlap_mask(view_a, view_b).flatten(1)
    return mask.sum(dim=1) / mask.shape[1]


def box_overlap(origin_mm: Tensor, size_mm: Tensor, base_origin_mm: Tensor, base_size_mm: Tensor) -> Tensor:
    """Return which part of the volume of axis-aligned crops lies in each of other crops.

    The label of VoCo (Wu et al., CVPR 2024), with the volume of the intersection in place of the area in the plane.
    Over bases that do not intersect each other, a crop's labels sum to one at most.

    Args:
        origin_mm: Lowest corner of each crop. Shape: (B, N, 3).
        size_mm: Extent of each crop, voxels times spacing. Shape: broadcasts to (B, N, 3).
        base_origin_mm: Lowest corner of each base. Shape: (B, M, 3).
        base_size_mm: Extent of each base. Shape: broadcasts to (B, M, 3).

    Returns:
        Volume of the intersection over the crop's. Shape: (B, N, M).
    """
    size = size_mm.expand_as(origin_mm)
    stop, base_stop = origin_mm + size, base_origin_mm + base_size_mm
    low = torch.maximum(origin_mm[:, :, None], base_origin_mm[:, None])
    high = torch.minimum(stop[:, :, None], base_stop[:, None])
    return ((high - low).clamp(min=0) / size[:, :, None]).prod(dim=3)


def values_at(
    values: Tensor, voxels: Tensor, size: Sequence[int], *, mode: Literal["bilinear", "nearest"] = "bilinear"
) -> Tensor:
    """Return the values of a map at points of a view; gradients flow to the map.

    Args:
        values: Image or features of a view, at any resolution: a map with stride s has one value for s voxels.
            Shape: (B, C, ...).
        voxels: Points of the view, in voxels of the view. Shape: (B, N, 3).
        size: Spatial size of the view.
        mode: `bilinear` (linear along each axis) or `nearest`. Beyond the centre of the outermost value it continues.

    Returns:
        Shape: (B, C, N), float32 or wider.
    """
    count = len(size)
    values = values if values.dtype == torch.float64 else values.float()
    # From -1 at the outer face of the first voxel to 1 at that of the last: the same for every resolution.
    along = voxels[..., 3 - count :].unbind(dim=-1)
    axes = [(2 * axis + 1) / edge - 1 for axis, edge in zip(along, size, strict=True)]
    grid = torch.stack(axes[::-1], dim=-1).to(values.dtype)
    grid = grid.reshape(len(grid), *([1] * (count - 1)), -1, count)
    found = F.grid_sample(values, grid, mode=mode, padding_mode="border", align_corners=False)
    return found.flatten(2)


def carry(
    values_of_a: Tensor, view_a: View, view_b: View, *, mode: Literal["bilinear", "nearest"] = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Bring a map from view a to the voxels of view b, for example a prediction that is to be compared there.

    Args:
        values_of_a: Floating-point map of view a, at any resolution. Shape: (B, C, ...).
        view_a: Where the map comes from.
        view_b: Where it is wanted.
        mode: `bilinear` or `nearest`.

    Returns:
        The map on the voxels of view b, shape (B, C, *size of b); and where view a shows them, shape (B, 1, *size of
        b), bool. Elsewhere the map has no meaning.
    """
    size = view_b.image.shape[2:]
    found, within = match(view_b, view_a, _all_voxels(view_b))
    moved = values_at(values_of_a, found, view_a.image.shape[2:], mode=mode)
    return moved.reshape(*moved.shape[:2], *size), within.reshape(len(within), 1, *size)


def _all_voxels(view: View) -> Tensor:
    """Return the voxels of a view in order of memory. Shape: (B, N, 3), float32."""
    size = (1,) * (5 - view.image.ndim) + tuple(view.image.shape[2:])
    axes = [torch.arange(edge, device=view.image.device, dtype=torch.float32) for edge in size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)
    return grid.expand(len(view.image), -1, -1)


def _affine(view: View, voxels: Tensor) -> Tensor:
    return _times(view.to_source_mm[:, :, :3], voxels) + view.to_source_mm[:, None, :, 3]


def _times(matrix: Tensor, points: Tensor) -> Tensor:
    """Multiply points with their sample's matrix; spelled out, since a GPU's matrix units would round to 10 bits.

    Args:
        matrix: Shape: (B, 3, 3).
        points: Shape: (B, N, 3).

    Returns:
        Shape: (B, N, 3).
    """
    columns = zip(points.unbind(dim=2), matrix.unbind(dim=2), strict=True)
    z, y, x = (along[:, :, None] * column[:, None] for along, column in columns)
    return z + y + x


def _displacement_at(view: View, voxels: Tensor) -> Tensor:
    """Interpolate the elastic part of a view's map. Shape of the points and of the result: (B, N, 3)."""
    assert view.displacement_mm is not None
    return values_at(view.displacement_mm, voxels, view.image.shape[2:]).mT


def _inverse(matrix: Tensor) -> Tensor:
    """Invert 3 x 3 matrices by their cofactors: `torch.linalg.inv` makes the host wait. Shape: (B, 3, 3), float32."""
    a, b, c = matrix.double().unbind(dim=1)
    cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=2)
    return (cofactors / (a * cofactors[:, :, 0]).sum(dim=1)[:, None, None]).float()


def _within(voxels: Tensor, size: Sequence[int]) -> Tensor:
    """Tell which points lie within the outer faces of a view's voxels. Shape: (B, N), bool."""
    three = (1,) * (3 - len(size)) + tuple(size)
    # Faces belong to the view, also after rounding.
    inside = [(point >= -0.501) & (point <= edge - 0.499) for point, edge in zip(voxels.unbind(2), three, strict=True)]
    return inside[0] & inside[1] & inside[2]
