"""nnU-Net's resampling, a slab of rows at a time.

nnU-Net resamples a whole volume at once in float64 (`skimage.transform.resize`, which is `scipy.ndimage.zoom` with
`grid_mode=True`): output voxel o samples the input at (o + 0.5) * n_in / n_out - 0.5, edges repeated. An output row
depends on few input rows: two for linear interpolation, and for cubic splines on those within the reach of the
prefilter, whose impulse response falls by 0.268 a voxel (Unser, 1999), so that 32 rows leave 1e-18 of it. Each slab
therefore equals the rows of the whole up to the rounding of float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

SPLINE_HALO = 32  # rows beyond which the cubic prefilter cannot be seen in float64
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RowResampler:
    """How one channel goes from one grid to another, rows being slices along axis 0.

    Args:
        shape_in: Input shape (Z, Y, X).
        shape_out: Output shape (Z, Y, X).
        order: Spline order within the resampled axes: 0, 1 or 3.
        separate_axis: The axis that nnU-Net resamples apart, by nearest neighbour, or None.
    """

    shape_in: tuple[int, int, int]
    shape_out: tuple[int, int, int]
    order: int
    separate_axis: int | None = None

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """Return the half-open range of input rows that output rows [start, stop) depend on."""
        if self.separate_axis == 0:
            index = self.nearest_rows(0)[start:stop]
            return int(index.min()), int(index.max()) + 1
        halo = SPLINE_HALO if self.order > 1 else 1
        first = math.floor(self._coordinate(0, start)) - halo
        last = math.ceil(self._coordinate(0, stop - 1)) + halo
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

        Args:
            rows: Input rows from `first` on, covering `needed(start, stop)`. Shape: (z, Y, X).
            first: Index of the first row of `rows` in the input.
            start: First output row.
            stop: One past the last output row.

        Returns:
            Shape: (stop - start, Y', X'), float64, not clipped.
        """
        from scipy import ndimage

        low, high = self.needed(start, stop)
        slab = np.asarray(rows[low - first : high - first], dtype=np.float64)
        ratio = [n_in / n_out for n_in, n_out in zip(self.shape_in, self.shape_out, strict=True)]
        offset = [0.5 * r - 0.5 for r in ratio]
        offset[0] = self._coordinate(0, start) - low
        shape = [stop - start, self.shape_out[1], self.shape_out[2]]
        if self.separate_axis is not None:
            index = self.nearest_rows(self.separate_axis)
            index = index[start:stop] - low if self.separate_axis == 0 else index
            slab = np.take(slab, index, axis=self.separate_axis)
            ratio[self.separate_axis], offset[self.separate_axis] = 1.0, 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # scipy reminds of a change of 2016 in what a 1-D matrix means
            return ndimage.affine_transform(slab, ratio, offset, tuple(shape), order=self.order, mode="nearest")

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
            known, out_dtype = order in (0, 1, 3) and not kwargs.get("is_seg", False), None
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
    channel: Array,
    shape_out: Sequence[int],
    scheme: Scheme,
    into: Array,
    slab_rows: Callable[[float, int], int],
) -> None:
    """Resample one channel slab by slab into `into`, as nnU-Net's default function does it at once.

    Args:
        channel: Shape: (Z, Y, X).
        shape_out: (Z', Y', X').
        scheme: With `by_rows` true.
        into: Receives the result in its own data type. Shape: `shape_out`.
        slab_rows: `Workspace.rows`.
    """
    shape_in = (channel.shape[0], channel.shape[1], channel.shape[2])
    z, y, x = (int(side) for side in shape_out)
    if scheme.separate_axis is not None:
        _resample_separately(channel, (z, y, x), scheme, into)
        return
    resampler = RowResampler(shape_in, (z, y, x), scheme.order)
    # skimage clips a cubic result to the range of its input; a linear one cannot leave it.
    bounds = _range(channel) if scheme.order > 1 else None
    cost = 8.0 * (3 * max(1.0, shape_in[0] / z) * shape_in[1] * shape_in[2] + 2 * y * x)
    step = slab_rows(cost, 8)
    for start in range(0, z, step):
        stop = min(z, start + step)
        low, high = resampler.needed(start, stop)
        made = resampler.apply(channel[low:high], low, start, stop)
        into[start:stop] = made if bounds is None else np.clip(made, *bounds, out=made)


def _resample_separately(channel: Array, shape_out: tuple[int, int, int], scheme: Scheme, into: Array) -> None:
    """Resample slice by slice with nnU-Net's own call, then by nearest neighbour along the coarse axis."""
    from skimage.transform import resize

    axis = scheme.separate_axis or 0
    shape_in = (channel.shape[0], channel.shape[1], channel.shape[2])
    index = RowResampler(shape_in, shape_out, scheme.order, axis).nearest_rows(axis)
    in_plane = tuple(side for position, side in enumerate(shape_out) if position != axis)
    target = np.moveaxis(into, axis, 0)
    source = np.moveaxis(channel, axis, 0)
    for picked in np.unique(index):
        plane = source[picked].astype(np.float64)
        target[index == picked] = resize(plane, in_plane, scheme.order, mode="edge", anti_aliasing=False)


def _range(channel: Array) -> tuple[float, float]:
    lows, highs = zip(*((float(row.min()), float(row.max())) for row in channel), strict=True)
    return min(lows), max(highs)
