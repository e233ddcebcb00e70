"""Canonical axes: Z to superior, Y to anterior, X to right, by flips and permutation only, so that no voxel changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.archive.volume import IMAGE_MODALITY, orientation_of

#: Pictures and projections: they have no third axis, and their rows are to stay as a person looks at them.
FLAT_MODALITIES = frozenset(
    {IMAGE_MODALITY, "CR", "DX", "MG", "RF", "XA", "US", "IO", "PX", "XC", "ES", "GM", "SM", "OP"}
)


def canonical(
    array: NDArray[Any], affine: NDArray[np.float64], modality: str = "MR"
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Turn a volume so that its axes run as close as possible to superior, anterior and right.

    For NIfTI the result is that of nnU-Net's `NibabelIOWithReorient`. An oblique volume keeps its obliqueness in the
    affine. A single slice stays (C, 1, Y, X): it is not turned out of its plane, and a picture not at all.

    Args:
        array: Voxels; a view of them is returned. Shape: (C, Z, Y, X).
        affine: Maps (x, y, z) to RAS mm. Shape: (4, 4).
        modality: See `FLAT_MODALITIES`.

    Returns:
        The turned array and the affine of its axes.
    """
    axes, flipped = _turn(array.shape[1:], affine, modality)
    # `axes` and `flipped` speak of x, y, z; the array's axes are C, z, y, x.
    turned = array.transpose(0, *(3 - axis for axis in reversed(axes)))
    turned = turned[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in reversed(flipped)))]
    sizes = array.shape[:0:-1]
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flipped, strict=True)):
        change[old, new] = -1 if flip else 1
        change[old, 3] = sizes[old] - 1 if flip else 0
    return turned, affine @ change


def canonical_spacing(spacing_mm: Sequence[float], orientation: str, shape: Sequence[int]) -> tuple[float, ...]:
    """Return the voxel size (z, y, x) that a volume has after `canonical`, from an index's columns alone.

    Args:
        spacing_mm: Voxel size (z, y, x) as stored.
        orientation: Where x, y and z run as stored, for example `LPS`.
        shape: (..., Z, Y, X) as stored; a single slice is not turned.
    """
    if shape[-3] == 1 or len(orientation) != 3:
        return tuple(spacing_mm)
    by_world = {_world(letter): spacing_mm[2 - axis] for axis, letter in enumerate(orientation)}
    return tuple(by_world[world] for world in (2, 1, 0)) if len(by_world) == 3 else tuple(spacing_mm)


def _turn(
    shape: Sequence[int], affine: NDArray[np.float64], modality: str
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Return for the new x, y, z which old axis (x = 0) each is, and whether it is flipped."""
    as_stored = (0, 1, 2), (False, False, False)
    if shape[0] == 1 and modality in FLAT_MODALITIES:
        return as_stored
    directions = _directions(affine)
    axes, flipped = [0, 0, 0], [False, False, False]
    for old, (world, sign) in enumerate(directions):
        axes[world] = old
        flipped[world] = sign < 0
    if shape[0] == 1 and axes[2] != 2:
        return as_stored
    return (axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2])


def _directions(affine: NDArray[np.float64]) -> tuple[tuple[int, int], ...]:
    """Return for the stored x, y, z the direction of the patient (R = 0, A = 1, S = 2) and the sign."""
    return _directions_of(np.asarray(affine, np.float64).tobytes())


@lru_cache(maxsize=64)
def _directions_of(matrix: bytes) -> tuple[tuple[int, int], ...]:
    """Find the directions of a matrix once: the thousands of images of one file have the same."""
    from nibabel.orientations import io_orientation

    affine = np.frombuffer(matrix, np.float64).reshape(4, 4)
    found = io_orientation(affine)
    if np.isnan(found).any():
        letters = orientation_of(affine)
        return tuple((_world(letter), 1 if letter in "RAS" else -1) for letter in letters)
    return tuple((int(world), int(sign)) for world, sign in found)


def _world(letter: str) -> int:
    return next(number for number, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
