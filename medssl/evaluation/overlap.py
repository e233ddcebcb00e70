"""Overlap and surface distances of two masks of one structure.

Dice (1945) and Jaccard (1912) count voxels. The surface of a mask is the set of its voxels that touch, by a face, a
voxel outside it (the outside of the image counts as outside); distances are Euclidean in mm between voxel centres,
exact for any spacing (Maurer et al., 2003, as in `scipy.ndimage.distance_transform_edt`). HD95 is the larger of the two
directed 95th percentiles; ASSD the mean of all distances in both directions (Heimann et al., 2009).

What an empty mask means (Reinke et al., Nature Methods 2024, "Understanding metric-related pitfalls"): with both masks
empty nothing can be measured, and every metric is undefined; with one of them empty Dice and Jaccard are 0 and the
distances are undefined. An undefined distance is never 0, which would be a perfect score: it is counted and reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

METRICS = ("dice", "jaccard", "hd95_mm", "assd_mm")
HIGHER_IS_BETTER = {"dice": True, "jaccard": True, "hd95_mm": False, "assd_mm": False}
Outcome = Literal["both", "missed", "spurious", "absent"]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """How well one structure of one case was found; NaN where a metric is undefined.

    Args:
        outcome: `both` masks hold it, it was `missed` (prediction empty), is `spurious` (reference empty), or `absent`
            from both.
        dice: In [0, 1].
        jaccard: In [0, 1].
        hd95_mm: 95th percentile of the surface distance.
        assd_mm: Average symmetric surface distance.
        volume_ml: Volume of the prediction.
        reference_ml: Volume of the reference.
    """

    outcome: Outcome
    dice: float
    jaccard: float
    hd95_mm: float
    assd_mm: float
    volume_ml: float
    reference_ml: float


def scores(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> Scores:
    """Compare two masks of one structure.

    Args:
        prediction: Shape: (Z, Y, X).
        reference: Shape: (Z, Y, X).
        spacing_mm: Voxel size in the arrays' axis order.

    Raises:
        ValueError: If the shapes differ.
    """
    if prediction.shape != reference.shape or len(spacing_mm) != reference.ndim:
        raise ValueError(f"masks of shape {prediction.shape} and {reference.shape} with spacing {tuple(spacing_mm)}")
    found, there = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    ml = math.prod(spacing_mm) / 1000.0
    volumes = {"volume_ml": found * ml, "reference_ml": there * ml}
    if not found and not there:
        return Scores("absent", math.nan, math.nan, math.nan, math.nan, **volumes)
    if not found or not there:
        return Scores("spurious" if found else "missed", 0.0, 0.0, math.nan, math.nan, **volumes)
    common = int(np.count_nonzero(prediction & reference))
    to_reference, to_prediction = surface_distances(prediction, reference, spacing_mm)
    hd95 = max(float(np.percentile(to_reference, 95)), float(np.percentile(to_prediction, 95)))
    assd = float((to_reference.sum() + to_prediction.sum()) / (to_reference.size + to_prediction.size))
    return Scores("both", 2 * common / (found + there), common / (found + there - common), hd95, assd, **volumes)


def surface_distances(a: Mask, b: Mask, spacing_mm: Sequence[float]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return distances in mm from each surface voxel of `a` to the surface of `b`, and the other way round.

    Args:
        a: Not empty. Shape: (Z, Y, X).
        b: Not empty. Shape: (Z, Y, X).
        spacing_mm: Voxel size in the arrays' axis order.
    """
    from scipy.ndimage import distance_transform_edt

    # Outside the box of both masks no surface lies, and distances between voxels inside do not depend on it.
    box = _box(a | b)
    surface_a, surface_b = surface(a)[box], surface(b)[box]
    from_b = distance_transform_edt(~surface_b, sampling=tuple(spacing_mm))
    from_a = distance_transform_edt(~surface_a, sampling=tuple(spacing_mm))
    return from_b[surface_a], from_a[surface_b]


def surface(mask: Mask) -> Mask:
    """Return the voxels of a mask that touch its outside by a face; axes of one voxel do not count as outside."""
    from scipy.ndimage import binary_erosion, generate_binary_structure

    box = _box(mask)
    inside = mask[box]
    thick = [side > 1 for side in mask.shape]
    faces = generate_binary_structure(mask.ndim, 1)
    # An image of one slice is two-dimensional: its only slice has no face towards above or below.
    for axis, is_thick in enumerate(thick):
        if not is_thick:
            faces = np.where(
                np.expand_dims(np.array([False, True, False]), [i for i in range(mask.ndim) if i != axis]), faces, False
            )
    edge = np.zeros_like(mask)
    edge[box] = inside & ~binary_erosion(inside, faces, border_value=0)
    return edge


def _box(mask: Mask) -> tuple[slice, ...]:
    ranges = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        ranges.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(ranges)
