"""Whether planes form a regular grid, and which repair makes them one.

All positions are LPS millimetres as DICOM gives them; a plane's place along the stack is its position projected on the
normal. Nothing here looks at instance numbers or file names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medssl.errors import InputRefused

Array = NDArray[np.float64]

#: Fewest planes of a volume; two are taken under repair where they lie close.
MIN_SLICES = 3
_MAX_SLICES = 20_000
#: Planes may lie this far beside the grid: written positions are rounded to 0.1 mm by some systems.
_ALONG_MM, _ALONG_PART, _ALONG_MOST = 0.06, 0.01, 0.1
#: Sideways drift over the whole stack that stays below what a voxel can show, in pixels.
_DRIFT_PIXELS = 0.25
_SIDEWAYS_MM = 0.05
_UNIT_STRICT, _UNIT_REPAIR = 2e-3, 0.05
#: Widest distance of two lone slices, in mm, where the file does not tell their spacing.
_TWO_SLICES_MM = 20.0


@dataclass(frozen=True)
class Grid:
    """A regular grid for a stack of planes.

    Attributes:
        order: For each output slice, the index of its plane; -1 is interpolated between its neighbours.
        affine: Maps (x, y, z) to RAS mm. Shape: (4, 4).
        spacing_mm: (z, y, x).
        size: Rows and columns of the output.
        shifts: Offset (x, y) in voxels of each output slice on the grid; empty if none is displaced.
        geometry: `regular` or the repair's code.
        flags: Quality flags.
    """

    order: tuple[int, ...]
    affine: Array
    spacing_mm: tuple[float, float, float]
    size: tuple[int, int]
    shifts: tuple[tuple[float, float], ...]
    geometry: str
    flags: tuple[str, ...]


def axes_of(orientation: Sequence[float], *, repair: bool) -> tuple[Array, bool]:
    """Return the unit directions of x (along a row), y (down a column) and z (their cross product) as rows.

    Args:
        orientation: ImageOrientationPatient.
        repair: Take larger deviations from right angles.

    Returns:
        The directions, shape (3, 3), and whether they had to be changed beyond rounding.

    Raises:
        InputRefused: If they are not finite, not of unit length or not at right angles.
    """
    values = np.asarray(orientation, float)
    if values.shape != (6,) or not np.isfinite(values).all():
        raise InputRefused("position_invalid", "the orientation is not six finite numbers")
    row, column = values[:3], values[3:]
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    error = max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(row @ column)))
    if error > (_UNIT_REPAIR if repair else _UNIT_STRICT) or min(lengths) < 0.5:
        raise InputRefused(
            "orientation_invalid", f"lengths {lengths[0]:.4f}, {lengths[1]:.4f}, product {float(row @ column):.4f}"
        )
    # Symmetric (Loewdin) orthonormalisation turns both directions by the same least amount.
    left, _, right = np.linalg.svd(np.stack([row, column]), full_matrices=False)
    row, column = left @ right
    return np.stack([row, column, np.cross(row, column)]), error > _UNIT_STRICT


def check_spacing(spacing: Sequence[float]) -> tuple[float, float]:
    """Return the distance of rows and of columns in mm.

    Raises:
        InputRefused: If one is missing, zero, negative or not finite.
    """
    if len(spacing) != 2:
        raise InputRefused("spacing_invalid", "no pixel spacing")
    if not all(math.isfinite(part) and part > 0 for part in spacing):
        raise InputRefused("spacing_invalid", "pixel spacing is zero, negative or not finite")
    return float(spacing[0]), float(spacing[1])


def tolerance_along(step: float) -> float:
    """Return how far a plane may lie beside its place, in mm, on a grid of this step."""
    return min(max(_ALONG_MM, _ALONG_PART * step), _ALONG_MOST * step)


def fit_grid(
    positions: Array,
    axes: Array,
    spacing: tuple[float, float],
    size: tuple[int, int],
    *,
    repair: bool,
    told_distance: float | None = None,
) -> Grid:
    """Return the grid of planes at distinct places.

    Args:
        positions: Centre of the first voxel of each plane, LPS mm. Shape: (N, 3).
        axes: From `axes_of`. Shape: (3, 3).
        spacing: Distance of rows and of columns in mm.
        size: Rows and columns.
        repair: Interpolate single gaps, resample tilt, take two slices.
        told_distance: Spacing between slices, or thickness, as the files tell it.

    Raises:
        InputRefused: If there is no regular grid and no repair.
    """
    along = positions @ axes[2]
    order = np.argsort(along, kind="stable")
    positions, along = positions[order], along[order]
    _check_count(along, repair, told_distance)
    steps = np.diff(along)
    step, counts = _multiples(steps)
    gaps = [number for number, count in enumerate(counts) if count > 1]
    missing = sum(count - 1 for count in counts)
    if gaps:
        _check_gaps(gaps, counts, repair)
        step = float((along[-1] - along[0]) / (len(along) - 1 + missing))
    flags = set()
    places = np.concatenate([[0], np.cumsum(counts)])
    start = float(along[0])
    beside = float(np.abs(along - start - places * step).max())
    if beside > 1e-3 * step:
        # Rounded positions: the line through all of them errs less than the one through the two ends.
        step, start = (float(value) for value in np.polyfit(places, along, 1))
        beside = float(np.abs(along - start - places * step).max())
        flags.add("position_jitter")
    if beside > tolerance_along(step):
        raise InputRefused("varying_spacing", f"slices lie up to {beside:.3f} mm beside a grid of {step:.4f} mm")
    sideways, tilted = _sideways(positions, along, axes, spacing, repair)
    full_order: list[int] = []
    full_shift: list[Array] = []
    for number, plane in enumerate(order):
        if number:
            for part in range(1, counts[number - 1]):
                weight = part / counts[number - 1]
                full_order.append(-1)
                full_shift.append(sideways[number - 1] * (1 - weight) + sideways[number] * weight)
        full_order.append(int(plane))
        full_shift.append(sideways[number])
    origin, rows, columns = positions[0] + axes[2] * (start - float(along[0])), size[0], size[1]
    shifts: tuple[tuple[float, float], ...] = ()
    if tilted:
        offsets = np.array(full_shift)
        offsets -= offsets.min(axis=0)
        origin = origin + axes[:2].T @ (sideways.min(axis=0) - sideways[0])
        pixels = offsets / np.array([spacing[1], spacing[0]])
        columns += math.ceil(round(float(pixels[:, 0].max()), 6))
        rows += math.ceil(round(float(pixels[:, 1].max()), 6))
        shifts = tuple((float(x), float(y)) for x, y in pixels)
    repairs = [code for code, done in (("tilt_resampled", tilted), ("gap_interpolated", bool(gaps))) if done]
    return Grid(
        order=tuple(full_order),
        affine=affine_ras(axes, (step, *spacing), origin),
        spacing_mm=(step, *spacing),
        size=(rows, columns),
        shifts=shifts,
        geometry="+".join(repairs) or "regular",
        flags=tuple(sorted(flags | ({"few_slices"} if len(along) < MIN_SLICES else set()))),
    )


def affine_ras(axes: Array, spacing: tuple[float, float, float], origin: Array) -> Array:
    """Return the matrix from (x, y, z) to RAS mm.

    Args:
        axes: Directions of x, y and z in LPS as rows. Shape: (3, 3).
        spacing: (z, y, x) in mm.
        origin: Centre of the first voxel in LPS mm. Shape: (3,).
    """
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * spacing[2]
    affine[:3, 1] = axes[1] * spacing[1]
    affine[:3, 2] = axes[2] * spacing[0]
    affine[:3, 3] = origin
    affine[:2] *= -1
    return affine + 0.0  # no negative zeros


def _check_count(along: Array, repair: bool, told_distance: float | None) -> None:
    count = len(along)
    if count > _MAX_SLICES:
        raise InputRefused("too_large", f"{count} slices")
    if count < 2 or (count < MIN_SLICES and not repair):
        raise InputRefused("too_few_slices", f"{count} slice{'s' if count != 1 else ''}")
    if count < MIN_SLICES:
        distance = float(along[1] - along[0])
        if distance > (2 * told_distance if told_distance else _TWO_SLICES_MM):
            raise InputRefused("too_few_slices", f"2 slices, {distance:.1f} mm apart")


def _multiples(steps: Array) -> tuple[float, list[int]]:
    """Return the distance of neighbouring slices and how many of it each step is.

    Raises:
        InputRefused: If the steps are no multiples of one distance, or most are.
    """
    base = float(np.sort(steps)[(len(steps) - 1) // 2])  # the lower median: a true step even if half are gaps
    if base <= 0:
        raise InputRefused("position_repeated", "two slices at one place")
    counts = [max(1, round(float(step / base))) for step in steps]
    worst = max(abs(float(step) - count * base) for step, count in zip(steps, counts, strict=True))
    single = steps[np.array(counts) == 1]
    base_fit = float(single.mean())
    if worst > 2 * tolerance_along(base) or 2 * len(single) <= len(steps):
        raise InputRefused("varying_spacing", f"distances from {float(steps.min()):.3f} to {float(steps.max()):.3f} mm")
    return base_fit, counts


def _check_gaps(gaps: list[int], counts: list[int], repair: bool) -> None:
    missing = sum(count - 1 for count in counts)
    text = f"{missing} of {len(counts) + 1 + missing} slices missing in {len(gaps)} place{'s' if len(gaps) > 1 else ''}"
    if not repair:
        raise InputRefused("missing_slices", text)
    adjacent = any(second - first == 1 for first, second in pairwise(gaps))
    if max(counts) > 2 or adjacent or len(gaps) > max(1, len(counts) // 10):
        raise InputRefused("missing_slices", f"{text}; only single slices, at most a tenth of them, are interpolated")


def _sideways(
    positions: Array, along: Array, axes: Array, spacing: tuple[float, float], repair: bool
) -> tuple[Array, bool]:
    """Return the displacement (x, y) in mm of each plane within its plane, and whether it is a tilt."""
    sideways = (positions - positions[0]) @ axes[:2].T
    total = sideways[-1]
    line = np.outer((along - along[0]) / (along[-1] - along[0]), total)
    beside = float(np.abs(sideways - line).max())
    allowed = max(_SIDEWAYS_MM, _DRIFT_PIXELS * min(spacing))
    drift = float(np.linalg.norm(total))
    if beside > (_SIDEWAYS_MM if drift > allowed else allowed):
        raise InputRefused("irregular_positions", f"slices lie up to {beside:.3f} mm beside a straight line")
    if drift <= allowed:
        return np.zeros_like(sideways), False
    angle = math.degrees(math.atan2(drift, float(along[-1] - along[0])))
    if not repair:
        raise InputRefused("gantry_tilt", f"{angle:.2f} degrees")
    if angle > 45:
        raise InputRefused("irregular_positions", f"slices run at {angle:.1f} degrees to their normal")
    return line, True
