"""A grid whose axes are not at right angles, resampled to the nearest one whose axes are."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl.archive.volume import spacing_of
from medssl.errors import InputRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray


def resample_sheared(
    array: NDArray[Any], affine: NDArray[np.float64], most_bytes: int
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Resample linearly onto the right-angled grid nearest to the sheared one; outside is the smallest value.

    The new axes are the orthogonal factor of the old ones' polar decomposition: no rotation is nearer in the
    least-squares sense (Higham, SIAM J. Sci. Stat. Comput. 1986). The voxel sizes stay.

    Args:
        array: Voxels. Shape: (C, Z, Y, X).
        affine: Maps (x, y, z) to mm; not singular. Shape: (4, 4).
        most_bytes: Limit of the result.

    Returns:
        Voxels of the new grid, in the old type, and its affine.
    """
    from scipy.ndimage import affine_transform

    spacing = np.array(spacing_of(affine))[::-1]
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    axes = (left @ right) * spacing
    extent = np.array(array.shape[:0:-1], np.float64)
    corners = np.array(list(itertools.product(*((-0.5, size - 0.5) for size in extent))))
    # Corners of the old grid in steps of the new axes.
    placed = np.linalg.solve(axes, affine[:3, :3] @ corners.T)
    low, high = placed.min(axis=1) + 0.5, placed.max(axis=1) - 0.5
    size = np.maximum(np.ceil(high - low - 1e-6).astype(int) + 1, 1)
    if int(array.shape[0]) * int(np.prod(size, dtype=object)) * 4 > most_bytes:
        raise InputRefused("too_large", f"resampling the sheared grid needs {tuple(int(n) for n in size)} voxels")
    result_affine = np.eye(4)
    result_affine[:3, :3] = axes
    result_affine[:3, 3] = affine[:3, 3] + axes @ low
    to_old = np.linalg.inv(affine) @ result_affine
    # scipy indexes (z, y, x): both sides of the map are turned round.
    matrix, offset = to_old[:3, :3][::-1, ::-1], to_old[:3, 3][::-1]
    shape = tuple(int(n) for n in size[::-1])
    result = np.empty((array.shape[0], *shape), array.dtype)
    for channel, target in zip(array, result, strict=True):
        moved = affine_transform(
            channel.astype(np.float32), matrix, offset, shape, order=1, mode="constant", cval=float(channel.min())
        )
        target[...] = np.rint(moved) if array.dtype.kind in "iu" else moved
    return result, result_affine
