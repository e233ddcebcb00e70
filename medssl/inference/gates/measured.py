"""What the gates look at: plain numbers of a case, of the network's input, of its answer and of its mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.archive.volume import UNKNOWN_MODALITY, orientation_of
from medssl.inference.grid import Grid
from medssl.inference.source import Image

Array = NDArray[Any]
#: Low, middle and high percentile of intensities, as nnU-Net's fingerprint has them.
PERCENTILES = (0.5, 50.0, 99.5)
#: Voxels of a channel that percentiles are taken from, evenly spaced.
MOST_VOXELS = 1_000_000
#: Parts of a label below this share of its volume are specks and are not counted.
SPECK = 0.01
Triple = tuple[float, float, float]


@dataclass
class Measured:
    """What is known of a case so far; None where it was not measured.

    Args:
        spacing_mm: Voxel size in the axes of the model's reader, (z, y, x).
        extent_mm: Edges of the volume in those axes.
        slices: Voxels along the shortest axis.
        modality: DICOM's code, `IMAGE` for a picture, `OT` where the file does not say.
        orientation: Directions of the stored x, y, z, for example `LPS`.
        raw: Percentiles of the intensities as stored, per channel; CT in HU.
        normalised: Percentiles of the network's input, per channel.
        embedding: Pooled features. Shape: (W,).
        overlap: Mean pairwise Dice of the members' predictions.
        members: Number of these predictions.
        entropy: Mean entropy of the voxels of the predicted organ, 0 to 1.
        confidence: Their mean largest probability.
        volumes_ml: Volume of each label.
        parts: Connected parts of each label, specks left out.
    """

    spacing_mm: Triple | None = None
    extent_mm: Triple | None = None
    slices: int | None = None
    modality: str = UNKNOWN_MODALITY
    orientation: str = ""
    raw: list[Triple] = field(default_factory=list)
    normalised: list[Triple] = field(default_factory=list)
    embedding: NDArray[np.float64] | None = None
    overlap: float | None = None
    members: int = 1
    entropy: float | None = None
    confidence: float | None = None
    volumes_ml: dict[str, float] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)


def measure_image(image: Image) -> Measured:
    """Return what is known before preprocessing, which changes the array."""
    z, y, x = (side * step for side, step in zip(image.array.shape[1:], image.spacing, strict=True))
    return Measured(
        spacing_mm=image.spacing,
        extent_mm=(z, y, x),
        slices=min(image.array.shape[1:]),
        modality=image.modality,
        orientation=orientation_of(image.grid.affine),
        raw=percentiles_of(image.array),
    )


def percentiles_of(array: Array) -> list[Triple]:
    """Return the percentiles of each channel. Shape of the array: (C, Z, Y, X)."""
    found = []
    for channel in array:
        step = max(1, round((channel.size / MOST_VOXELS) ** (1 / 3)))
        low, middle, high = np.percentile(np.asarray(channel[::step, ::step, ::step], np.float32), PERCENTILES)
        found.append((float(low), float(middle), float(high)))
    return found


def measure_mask(
    mask: Array, grid: Grid, labels: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, float], dict[str, int]]:
    """Return the volume in millilitres and the number of connected parts of each label.

    Parts touch by faces, edges or corners. Those below a hundredth of the label's volume are not counted.

    Args:
        mask: Shape: (Z, Y, X).
        grid: Its grid.
        labels: Values that make up each label or region.
    """
    from scipy.ndimage import generate_binary_structure, label

    volumes, parts = {}, {}
    for name, values in labels.items():
        box = _box(mask, values)
        if box is None:
            volumes[name], parts[name] = 0.0, 0
            continue
        inside = np.isin(mask[box], values)
        numbered, _ = label(inside, generate_binary_structure(3, 3))
        sizes = np.bincount(numbered.ravel())[1:]
        volumes[name] = round(float(sizes.sum()) * grid.voxel_ml, 6)
        parts[name] = int((sizes >= SPECK * sizes.sum()).sum())
    return volumes, parts


def _box(mask: Array, values: tuple[int, ...]) -> tuple[slice, slice, slice] | None:
    """Return the box around some values; row by row, since a mask may lie in a scratch file."""
    along = [np.zeros(side, bool) for side in mask.shape]
    for row, plane in enumerate(mask):
        hits = np.isin(plane, values)
        along[0][row] = hits.any()
        along[1] |= hits.any(axis=1)
        along[2] |= hits.any(axis=0)
    if not along[0].any():
        return None
    z, y, x = (slice(int(hits.argmax()), len(hits) - int(hits[::-1].argmax())) for hits in along)
    return z, y, x
