"""Resampling to another voxel size: cubic B-splines as one small matrix per axis.

Interpolating with cubic B-splines (prefilter, then evaluation; Unser, IEEE Signal Processing Magazine 1999) is linear
and separable. For one axis it is a matrix of new size x old size whose rows decay by 0.27 per voxel, so a volume is
resampled by three matrix products over narrow bands, in float32. The values are those of nnU-Net
(`skimage.transform.resize` of order 3, edges repeated, no smoothing, clipped to the range of the input) up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

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
#: Shares of classes that differ by less are equal: rounding must not decide a tie.
_TIE = 1e-6


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
    """Resample classes: each is interpolated linearly as a mask, and the one with the largest share wins.

    As in nnU-Net: of equal shares the nearest old voxel's class is taken if it is among them, else the smallest. Only
    the box around each class is computed; what the classes leave over is the background's share.

    Args:
        label: Shape: (Z, Y, X).
        shape: New (z, y, x).
        separate_axis: As in `resample_image`.
    """
    shape = tuple(shape)
    if label.shape == shape:
        return label
    out = np.zeros(shape, dtype=label.dtype)
    classes = classes_of(label)
    if not classes:
        return out
    whole = _reach(label != 0, shape)
    nearest = label[
        np.ix_(*(_nearest(old, new)[part] for old, new, part in zip(label.shape, shape, whole, strict=True)))
    ]
    winner = out[whole]
    best, total, share_of_nearest = (np.zeros(winner.shape, dtype=np.float32) for _ in range(3))
    for value in classes:
        mask = label == value
        target = _reach(mask, shape)
        share = _share(mask, shape, target, separate_axis)
        here = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(target, whole, strict=True))
        winner[here][share > best[here] + _TIE] = value
        np.maximum(best[here], share, out=best[here])
        total[here] += share
        is_nearest = nearest[here] == value
        share_of_nearest[here][is_nearest] = share[is_nearest]
    background = 1 - total
    winner[background >= best - _TIE] = 0
    share_of_nearest[nearest == 0] = background[nearest == 0]
    tied = share_of_nearest >= np.maximum(best, background) - _TIE
    winner[tied] = nearest[tied]
    return out


def _share(
    mask: NDArray[np.bool_], shape: Sequence[int], target: tuple[slice, ...], separate_axis: int | None
) -> NDArray[np.float32]:
    """Return which share of each new voxel of a box a mask has, by linear interpolation."""
    source, weights = [], []
    for axis, part in enumerate(target):
        if mask.shape[axis] == shape[axis]:
            source.append(part)
            weights.append(np.empty(0))
            continue
        positions = _positions(mask.shape[axis], shape[axis])[part].clip(0, mask.shape[axis] - 1)
        # The two neighbours of every new voxel of the box must be read as they are.
        start, stop = int(positions[0]), min(int(positions[-1]) + 2, mask.shape[axis])
        source.append(slice(start, stop))
        weights.append(positions - start)
    share = mask[tuple(source)].astype(np.float32)
    for axis, positions in enumerate(weights):
        if mask.shape[axis] == shape[axis]:
            continue
        if axis == separate_axis:
            index = _nearest(mask.shape[axis], shape[axis])[target[axis]] - source[axis].start
            share = np.take(share, index, axis=axis)
        else:
            share = _linear(share, positions, axis)
    return share


def classes_of(label: NDArray[Any]) -> list[Any]:
    """Return the values of a label except 0, ascending; the background, most of it, is not sorted."""
    return list(np.unique(label[label != 0]))


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
        result = np.take(result, _nearest(channel.shape[separate_axis], shape[separate_axis]), axis=separate_axis)
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


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """Return the old voxel that is nearest to each new one; of two equally near ones the later."""
    return np.clip(np.floor(_positions(old, new) + 0.5).astype(np.int64), 0, old - 1)


def _reach(mask: NDArray[np.bool_], shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """Return the box of new voxels to which a mask can contribute."""
    box = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        ratio = shape[axis] / mask.shape[axis]
        start = max(0, int(np.floor((used[0] - 0.5) * ratio - 0.5)))
        stop = min(shape[axis], int(np.ceil((used[-1] + 1.5) * ratio + 0.5)))
        box.append(slice(start, stop))
    return box[0], box[1], box[2]
