"""Resampling to another voxel size: cubic B-splines as one small matrix per axis.

Interpolating with cubic B-splines (prefilter, then evaluation; Unser, IEEE Signal Processing Magazine 1999) is linear
and separable. For one axis it is a matrix of new size x old size whose rows decay by 0.27 per voxel, so a volume is
resampled by three matrix products over narrow bands, in float32. The values are those of nnU-Net
(`skimage.transform.resize` of order 3, edges repeated, no smoothing, clipped to the range of the input) up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: Ratio of the largest to the smallest voxel edge from which nnU-Net resamples the coarse axis on its own.
ANISOTROPY = 3.0
#: Voxels repeated at each end before the prefilter: what scipy, and with it nnU-Net, does for repeated edges.
_PADDED = 12
#: Rows of one band of the matrix: enough for the matrix product to run at full speed.
_BAND_ROWS = 64
#: Weights left out of a band; together they change a value by less than float32's rounding.
_NEGLIGIBLE = 1e-8


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]
) -> tuple[int, int, int]:
    """Return the shape (z, y, x) that keeps the extent; an axis of one voxel stays one."""
    sizes = [
        1 if size == 1 else max(1, round(old / new * size))
        for size, old, new in zip(shape, spacing_mm, target_mm, strict=True)
    ]
    return sizes[0], sizes[1], sizes[2]


def coarse_axis(spacing_mm: Sequence[float], target_mm: Sequence[float]) -> int | None:
    """Return the axis that is too coarse to interpolate across, or None (nnU-Net's rule).

    It is the one axis with the largest edge of the old grid, or else of the new one, if that edge is more than
    `ANISOTROPY` times the smallest.
    """
    for edges in (spacing_mm, target_mm):
        if max(edges) / min(edges) > ANISOTROPY:
            coarse = [axis for axis, edge in enumerate(edges) if edge == max(edges)]
            return coarse[0] if len(coarse) == 1 else None
    return None


def resample_image(
    image: NDArray[np.float32], shape: Sequence[int], *, separate_axis: int | None = None
) -> NDArray[np.float32]:
    """Resample channels to a shape over the same extent.

    Args:
        image: Finite values. Shape: (C, Z, Y, X).
        shape: New (z, y, x).
        separate_axis: Axis along which the nearest slice is taken, see `coarse_axis`; each slice then keeps its own
            range of values. None interpolates along all axes.

    Returns:
        Shape: (C, *shape), float32.
    """
    image = np.ascontiguousarray(image, dtype=np.float32)
    if image.shape[1:] == tuple(shape):
        return image
    out = np.empty((image.shape[0], *shape), dtype=np.float32)
    for target, channel in zip(out, image, strict=True):
        target[...] = _resample_channel(channel, tuple(shape), separate_axis)
    return out


def resample_label(
    label: NDArray[np.int16], shape: Sequence[int], *, separate_axis: int | None = None
) -> NDArray[np.int16]:
    """Resample classes: each class linearly as a mask, taken where it covers half (nnU-Net's way).

    A class with a higher number wins where two cover exactly half; only the box around a class is computed.

    Args:
        label: Shape: (Z, Y, X).
        shape: New (z, y, x).
        separate_axis: As in `resample_image`.
    """
    shape = tuple(shape)
    if label.shape == shape:
        return label
    out = np.zeros(shape, dtype=label.dtype)
    for value in np.unique(label):
        if value == 0:
            continue
        mask = label == value
        source, target = zip(*(_reach(mask, shape, axis) for axis in range(3)), strict=True)
        soft = mask[source].astype(np.float32)
        for axis in range(3):
            positions = _positions(label.shape[axis], shape[axis])[target[axis]] - source[axis].start
            if axis == separate_axis:
                nearest = np.clip(np.floor(positions + 0.5).astype(np.int64), 0, soft.shape[axis] - 1)
                soft = np.take(soft, nearest, axis=axis)
            elif label.shape[axis] != shape[axis]:
                soft = _linear(soft, positions, axis)
        # Rounding must not decide a tie: an exact half belongs to the class.
        out[target][soft >= 0.5 - 1e-6] = value
    return out


def _resample_channel(
    channel: NDArray[np.float32], shape: tuple[int, ...], separate_axis: int | None
) -> NDArray[np.float32]:
    axes = [axis for axis in range(3) if axis != separate_axis and channel.shape[axis] != shape[axis]]
    over = tuple(axis for axis in range(3) if axis != separate_axis)
    low = channel.min(axis=over, keepdims=True)
    high = channel.max(axis=over, keepdims=True)
    result = channel
    # The axis that shrinks most goes first: less is left for the others.
    for axis in sorted(axes, key=lambda axis: shape[axis] / channel.shape[axis]):
        result = _apply(result, shape[axis], axis)
    if axes:
        np.clip(result, low, high, out=result)
    if separate_axis is not None and channel.shape[separate_axis] != shape[separate_axis]:
        positions = _positions(channel.shape[separate_axis], shape[separate_axis])
        nearest = np.clip(np.floor(positions + 0.5).astype(np.int64), 0, channel.shape[separate_axis] - 1)
        result = np.take(result, nearest, axis=separate_axis)
    return result


def _apply(volume: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    """Multiply one axis with its spline matrix, band by band."""
    shape = list(volume.shape)
    shape[axis] = size
    out = np.empty(shape, dtype=np.float32)
    for rows, columns, weights in _bands(volume.shape[axis], size):
        if axis == 0:
            depth = volume.shape[0]
            np.matmul(weights, volume.reshape(depth, -1)[columns], out=out.reshape(size, -1)[rows])
        elif axis == 1:
            np.matmul(weights, volume[:, columns], out=out[:, rows])
        else:
            width = volume.shape[2]
            out.reshape(-1, size)[:, rows] = volume.reshape(-1, width)[:, columns] @ weights.T
    return out


@lru_cache(maxsize=32)
def _bands(old: int, new: int) -> list[tuple[slice, slice, NDArray[np.float32]]]:
    """Return the spline matrix of an axis as bands: output rows, input columns, weights."""
    matrix = _spline_matrix(old, new)
    bands = []
    for start in range(0, new, _BAND_ROWS):
        rows = slice(start, min(start + _BAND_ROWS, new))
        used = np.flatnonzero((np.abs(matrix[rows]) > _NEGLIGIBLE).any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((rows, columns, np.ascontiguousarray(matrix[rows, columns], dtype=np.float32)))
    return bands


def _spline_matrix(old: int, new: int) -> NDArray[np.float64]:
    """Return the matrix that interpolates `old` values at `new` positions with cubic B-splines. Shape: (new, old)."""
    from scipy.ndimage import spline_filter1d

    padded = np.pad(np.eye(old), ((0, 0), (_PADDED, _PADDED)), mode="edge")
    # One row per unit input: its B-spline coefficients.
    coefficients = spline_filter1d(padded, order=3, axis=1, mode="nearest")
    positions = _positions(old, new) + _PADDED
    first = np.floor(positions).astype(np.int64) - 1
    t = positions - np.floor(positions)
    weights = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    matrix: NDArray[np.float64] = np.zeros((new, old))
    for k, weight in enumerate(weights):
        matrix += weight[:, None] * coefficients[:, first + k].T
    return matrix


def _positions(old: int, new: int) -> NDArray[np.float64]:
    """Return where the centres of the new voxels lie on the old grid, both grids spanning the same extent."""
    return (np.arange(new, dtype=np.float64) + 0.5) * (old / new) - 0.5


def _linear(volume: NDArray[np.float32], positions: NDArray[np.float64], axis: int) -> NDArray[np.float32]:
    last = volume.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    lower = np.minimum(np.floor(positions).astype(np.int64), max(last - 1, 0))
    broadcast = [1, 1, 1]
    broadcast[axis] = len(positions)
    weight = (positions - lower).astype(np.float32).reshape(broadcast)
    below = np.take(volume, lower, axis=axis)
    above = np.take(volume, np.minimum(lower + 1, last), axis=axis)
    return below + weight * (above - below)


def _reach(mask: NDArray[np.bool_], shape: Sequence[int], axis: int) -> tuple[slice, slice]:
    """Return the old and new indices of an axis between which a mask can matter, with a voxel around it."""
    others = tuple(other for other in range(3) if other != axis)
    used = np.flatnonzero(mask.any(axis=others))
    size = mask.shape[axis]
    start, stop = max(0, int(used[0]) - 1), min(size, int(used[-1]) + 2)
    ratio = shape[axis] / size
    first = max(0, int(np.floor(start * ratio)) - 1)
    last = min(shape[axis], int(np.ceil(stop * ratio)) + 1)
    # The new voxels reach beyond the box; their neighbours there must be read as they are.
    low = max(0, int(np.floor(first / ratio)) - 1)
    high = min(size, int(np.ceil(last / ratio)) + 1)
    return slice(low, high), slice(first, last)
