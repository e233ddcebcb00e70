"""What of a volume is tissue: a threshold by modality, and voxels drawn above it with a fixed seed. Numpy only."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: HU above which something is body and not air; lung parenchyma lies at -950 to -700.
CT_AIR_HU = -900.0
_BINS = 256
#: Values looked at for a threshold: a regular grid of about this many voxels.
_SAMPLED = 65_536
#: Rounds of drawing before the whole volume is searched.
_SEARCHED = 16


def otsu_threshold(values: NDArray[Any]) -> float:
    """Return the threshold that best separates two groups of values (Otsu, IEEE Trans. SMC 1979).

    Args:
        values: Finite numbers, of any shape.

    Returns:
        Values above it belong to the brighter group; the one value where all are equal.
    """
    flat = np.asarray(values, dtype=np.float32).ravel()
    low, high = float(flat.min()), float(np.quantile(flat, 0.999))
    if high <= low:
        return low
    # Counting places is four times as fast as numpy's histogram.
    places = ((flat - np.float32(low)) * np.float32(_BINS / (high - low))).astype(np.int32).clip(0, _BINS - 1)
    counts = np.bincount(places, minlength=_BINS)
    edges = np.linspace(low, high, _BINS + 1)
    centers = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)[:-1].astype(np.float64)
    total = float(counts.sum())
    mass = np.cumsum(counts * centers)
    mean_below = mass[:-1] / np.maximum(weight, 1)
    mean_above = (mass[-1] - mass[:-1]) / np.maximum(total - weight, 1)
    between = weight * (total - weight) * (mean_below - mean_above) ** 2
    # Where no value lies between the groups, many thresholds are as good: the middle one is the safest.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-6))
    return float(edges[best[0] + 1] + edges[best[-1] + 1]) / 2


def tissue_threshold(image: NDArray[Any], modality: str = "MR") -> float:
    """Return the value above which a voxel counts as tissue.

    Args:
        image: One channel before normalisation (any range where `modality` is not `CT`). Shape: (Z, Y, X).
        modality: `CT` takes the fixed threshold in HU, everything else half of Otsu's distance from air, which is zero
            or, where values are negative, the darkest one. Otsu alone would take muscle for air where fat is bright,
            and would split the tissue where there is no air at all.
    """
    if modality == "CT":
        return CT_AIR_HU
    sample = subsample(image)
    low = min(0.0, float(sample.min()))
    return low + (otsu_threshold(sample) - low) / 2


def tissue_mask(image: NDArray[Any], modality: str = "MR") -> NDArray[np.bool_]:
    """Return where a channel shows tissue; everywhere if nothing is above the threshold. Shape: (Z, Y, X)."""
    mask = np.asarray(image > tissue_threshold(image, modality))
    return mask if mask.any() else np.ones(image.shape, dtype=bool)


def subsample(image: NDArray[Any]) -> NDArray[Any]:
    """Return a regular grid of voxels, few enough to sort."""
    step = max(1, int(np.ceil((image.size / _SAMPLED) ** (1 / image.ndim))))
    return image[tuple(slice(None, None, step if size > step else 1) for size in image.shape)]


def sample_above(image: NDArray[Any], threshold: float, count: int, name: str) -> NDArray[np.int64]:
    """Draw voxels above a threshold without repetition; the same name draws the same ones.

    No mask of the volume is made: voxels are drawn anywhere and kept if they are above, which is fast and small as long
    as tissue is not rare.

    Args:
        image: Shape: (Z, Y, X).
        threshold: See `tissue_threshold`.
        count: How many at most.
        name: Seeds the draw.

    Returns:
        Sorted coordinates (z, y, x). Shape: (N, 3), 0 <= N <= count.
    """
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    rng = np.random.Generator(np.random.Philox(key=key))
    found = np.empty(0, dtype=np.int64)
    if image.size > _SEARCHED * count:
        for _ in range(_SEARCHED):
            drawn = rng.integers(0, image.size, size=2 * count)
            above = image[np.unravel_index(drawn, image.shape)] > threshold
            # The first of each, in the order drawn: sorting here would favour the start of the volume.
            found = np.concatenate([found, drawn[above]])
            found = found[np.sort(np.unique(found, return_index=True)[1])]
            if found.size >= count:
                break
    if found.size < count:
        places = np.flatnonzero(image > threshold)
        found = rng.choice(places, size=min(count, places.size), replace=False)
    found = np.sort(found[:count])
    return np.stack(np.unravel_index(found, image.shape), axis=1).astype(np.int64)
