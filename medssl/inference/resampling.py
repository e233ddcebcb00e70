"""nnU-Net's resampling, a part at a time.

nnU-Net resamples a whole volume at once in float64 (`skimage.transform.resize`, which is `scipy.ndimage.zoom` with
`grid_mode=True`): output voxel o samples the input at (o + 0.5) * n_in / n_out - 0.5, edges repeated. Linear
interpolation makes an output row from two input rows, so rows can be made as soon as these are known. Cubic splines
(Unser, 1999) reach further, but they are separable: first each slice in its plane, then all slices along axis 0, a
block of columns at a time. Both equal the whole up to the rounding of float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.inference.workspace import Workspace

EDGE = 12  # voxels by which scipy repeats an edge before it filters, so that the border does not ring
RELAX_EVERY = 32  # slices between two reliefs of the scratch files
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RowResampler:
    """How one channel goes from one grid to another by linear interpolation, rows being slices along axis 0.

    Args:
        shape_in: Input shape (Z, Y, X).
        shape_out: Output shape (Z, Y, X).
        separate_axis: The axis that nnU-Net resamples apart, by nearest neighbour, or None.
    """

    shape_in: tuple[int, int, int]
    shape_out: tuple[int, int, int]
    separate_axis: int | None = None

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """Return the half-open range of input rows that output rows [start, stop) depend on."""
        if self.separate_axis == 0:
            index = self.nearest_rows(0)[start:stop]
            return int(index.min()), int(index.max()) + 1
        first = math.floor(self._coordinate(0, start)) - 1
        last = math.ceil(self._coordinate(0, stop - 1)) + 1
        return max(0, first), min(self.shape_in[0], last + 1)

    def ready(self, available: int, start: int) -> int:
        """Return how far output rows can be made, from `start`, when input rows [0, available) are known."""
        if available >= self.shape_in[0]:
            return self.shape_out[0]
        stop = start
        while stop < self.shape_out[0] and self.needed(stop, stop + 1)[1] <= available:
            stop += 1
        return stop

    def apply(self, rows: Array, first: int, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Return output rows [start, stop).

        Products and sums are taken in scipy's order, so that nearly all rounding ties fall the same way, too.

        Args:
            rows: Input rows from `first` on, covering `needed(start, stop)`. Shape: (z, Y, X).
            first: Index of the first row of `rows` in the input.
            start: First output row.
            stop: One past the last output row.

        Returns:
            Shape: (stop - start, Y', X'), float64.
        """
        weights = [self._weights(axis) for axis in range(3)]
        weights[0] = [(index[start:stop] - first, weight[start:stop]) for index, weight in weights[0]]
        made = np.zeros((stop - start, *self.shape_out[1:]))
        for z, z_weight in weights[0]:
            along_z = rows[z].astype(np.float64) * z_weight[:, None, None]
            for y, y_weight in weights[1]:
                along_y = along_z[:, y] * y_weight[:, None]
                for x, x_weight in weights[2]:
                    made += along_y[:, :, x] * x_weight
        return made

    def _weights(self, axis: int) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]]:
        """Return the input index and weight of each output index: one pair for nearest neighbour, else two."""
        n_in, n_out = self.shape_in[axis], self.shape_out[axis]
        if axis == self.separate_axis or n_in == n_out:
            index = self.nearest_rows(axis)
            return [(index, np.ones(index.size))]
        centres = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
        below = np.floor(centres).astype(np.intp)
        t = centres - below
        return [(below, 1.0 - t), (np.minimum(below + 1, n_in - 1), t)]

    def nearest_rows(self, axis: int) -> npt.NDArray[np.intp]:
        """Return for each output index along `axis` the input index that nnU-Net's order 0 picks."""
        return _nearest(self.shape_in[axis], self.shape_out[axis])

    def _coordinate(self, axis: int, index: int) -> float:
        return (index + 0.5) * (self.shape_in[axis] / self.shape_out[axis]) - 0.5


@lru_cache(maxsize=8)
def _nearest(n_in: int, n_out: int) -> npt.NDArray[np.intp]:
    from scipy import ndimage

    if n_in == n_out:
        return np.arange(n_in)
    centres = (n_in / n_out) * (np.arange(n_out) + 0.5) - 0.5
    picked = ndimage.map_coordinates(np.arange(n_in, dtype=np.float64), centres[None], order=0, mode="nearest")
    return np.rint(picked).astype(np.intp)


@dataclass(frozen=True)
class Scheme:
    """What a plans file says about one resampling."""

    order: int
    order_z: int
    separate_axis: int | None
    by_rows: bool
    out_dtype: type | None

    @classmethod
    def of(cls, name: str, kwargs: dict[str, Any], current: Sequence[float], target: Sequence[float]) -> Scheme:
        """Read the scheme of one of nnU-Net's resampling functions.

        Args:
            name: The function's name in the plans.
            kwargs: Its keyword arguments in the plans.
            current: Spacing of the input in mm, (z, y, x).
            target: Spacing of the output in mm, (z, y, x).
        """
        from nnunetv2.configuration import ANISO_THRESHOLD
        from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

        if name == "resample_data_or_seg_to_shape":
            force, order, order_z = (
                kwargs.get("force_separate_z", False),
                kwargs.get("order", 3),
                kwargs.get("order_z", 0),
            )
            known, out_dtype = order in (1, 3) and not kwargs.get("is_seg", False), None
        elif name == "resample_torch_fornnunet":
            force, order, order_z = kwargs.get("force_separate_z"), 1, 0
            known = (
                kwargs.get("mode", "linear") == "linear"
                and kwargs.get("aniso_axis_mode", "nearest-exact") == "nearest-exact"
            )
            known, out_dtype = known and not kwargs.get("is_seg", False), np.float32
        else:
            return cls(0, 0, None, False, None)
        threshold = kwargs.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD)
        separate, axis = determine_do_sep_z_and_axis(force, current, target, threshold)
        return cls(order, order_z, int(axis) if separate else None, known and (not separate or order_z == 0), out_dtype)


def resample_channel(
    channel: Array, shape_out: Sequence[int], scheme: Scheme, into: Array, workspace: Workspace
) -> None:
    """Resample one channel part by part into `into`, as nnU-Net's default function does it at once.

    Args:
        channel: Shape: (Z, Y, X).
        shape_out: (Z', Y', X').
        scheme: With `by_rows` true.
        into: Receives the result in its own data type. Shape: `shape_out`.
        workspace: Gives the array between the two passes, and says how large a part may be.
    """
    shape_in = (channel.shape[0], channel.shape[1], channel.shape[2])
    z, y, x = (int(side) for side in shape_out)
    if scheme.separate_axis is not None:
        _resample_separately(channel, (z, y, x), scheme, into)
    elif scheme.order > 1:
        _resample_cubic(channel, (z, y, x), into, workspace)
    else:
        resampler = RowResampler(shape_in, (z, y, x))
        ratio = max(1.0, shape_in[0] / z)
        step = workspace.rows(8.0 * (2 * ratio * shape_in[1] * shape_in[2] + y * (shape_in[2] + 3 * x)))
        for start in range(0, z, step):
            stop = min(z, start + step)
            low, high = resampler.needed(start, stop)
            into[start:stop] = resampler.apply(channel[low:high], low, start, stop)
            workspace.relax()


def _resample_cubic(channel: Array, shape_out: tuple[int, int, int], into: Array, workspace: Workspace) -> None:
    """Resample by cubic splines, the plane before axis 0, and clip to the range of the input as skimage does."""
    depth = channel.shape[0]
    flat = workspace.empty((depth, *shape_out[1:]), np.float64)
    for row in range(depth):
        flat[row] = _zoom_plane(channel[row], shape_out[1:])
        if row % RELAX_EVERY == 0:
            workspace.relax()
    low, high = _range(channel)
    columns = workspace.rows(8.0 * shape_out[2] * (3 * (depth + 2 * EDGE) + 3 * shape_out[0]))
    for start in range(0, shape_out[1], columns):
        part = slice(start, min(shape_out[1], start + columns))
        into[:, part] = np.clip(_cubic_along_rows(flat[:, part], shape_out[0]), low, high)
        workspace.relax()
    workspace.release(flat)


def _zoom_plane(plane: Array, shape_out: tuple[int, int]) -> Array:
    from scipy import ndimage

    if plane.shape == shape_out:
        return plane
    factors = [n_out / n_in for n_in, n_out in zip(plane.shape, shape_out, strict=True)]
    # In float64 from the start, as nnU-Net does it.
    return ndimage.zoom(plane.astype(np.float64), factors, order=3, mode="nearest", grid_mode=True)


def _cubic_along_rows(block: Array, n_out: int) -> Array:
    """Return a block resampled along axis 0 by cubic splines. Shape: (Z, Y, X) to (n_out, Y, X)."""
    from scipy import ndimage

    n_in = block.shape[0]
    if n_in == n_out:
        return block
    padded = np.pad(block, ((EDGE, EDGE), (0, 0), (0, 0)), mode="edge")
    coefficients = ndimage.spline_filter1d(padded, order=3, axis=0, output=np.float64, mode="nearest")
    centres = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5 + EDGE
    first = np.floor(centres).astype(np.intp)
    t = centres - first
    # The cubic B-spline at distances 1 + t, t, 1 - t and 2 - t.
    weights = ((1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6, t**3 / 6)
    made = np.zeros((n_out, *block.shape[1:]))
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        made += weight[:, None, None] * coefficients[first + offset]
    return made


def _resample_separately(channel: Array, shape_out: tuple[int, int, int], scheme: Scheme, into: Array) -> None:
    """Resample slice by slice with nnU-Net's own call, then by nearest neighbour along the coarse axis."""
    from skimage.transform import resize

    axis = scheme.separate_axis or 0
    shape_in = (channel.shape[0], channel.shape[1], channel.shape[2])
    index = RowResampler(shape_in, shape_out, axis).nearest_rows(axis)
    in_plane = tuple(side for position, side in enumerate(shape_out) if position != axis)
    target = np.moveaxis(into, axis, 0)
    source = np.moveaxis(channel, axis, 0)
    for picked in np.unique(index):
        plane = source[picked].astype(np.float64)
        target[index == picked] = resize(plane, in_plane, scheme.order, mode="edge", anti_aliasing=False)


def _range(channel: Array) -> tuple[float, float]:
    lows, highs = zip(*((float(row.min()), float(row.max())) for row in channel), strict=True)
    return min(lows), max(highs)
