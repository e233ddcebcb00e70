"""What is known of all volumes before the first is normalised: median voxel size, and intensities by modality."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.preprocessing.tissue import sample_above, tissue_threshold

#: Voxels of one volume that enter the intensities; every volume counts the same.
SAMPLED_VOXELS = 10_000
#: Volumes that enter them; more change the percentiles by less than one HU.
SAMPLED_VOLUMES = 500


def tissue_sample(channel: NDArray[Any], modality: str, name: str) -> NDArray[np.float32]:
    """Draw intensities of a channel's tissue; the same name draws the same ones.

    Args:
        channel: Before normalisation. Shape: (Z, Y, X).
        modality: DICOM's code.
        name: Seeds the draw.
    """
    places = sample_above(channel, tissue_threshold(channel, modality), SAMPLED_VOXELS, name)
    return channel[tuple(places.T)].astype(np.float32)


def intensities(samples: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Return the statistics of samples of many volumes under nnU-Net's names."""
    values = np.concatenate(list(samples)).astype(np.float64)
    low, median, high = (float(value) for value in np.percentile(values, [0.5, 50, 99.5]))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "median": median,
        "percentile_00_5": low,
        "percentile_99_5": high,
    }


def median_spacing(spacings_mm: Iterable[Sequence[float]]) -> tuple[float, float, float]:
    """Return the median voxel size (z, y, x) of volumes in canonical axes."""
    z, y, x = (float(value) for value in np.median(np.asarray(list(spacings_mm), dtype=np.float64), axis=0))
    # Seven digits: voxel sizes of one protocol differ behind them by rounding only.
    return float(f"{z:.7g}"), float(f"{y:.7g}"), float(f"{x:.7g}")


def chosen_for_intensities(ids: Sequence[str]) -> list[str]:
    """Return the volumes that are looked at for the intensities: all, or `SAMPLED_VOLUMES` by a hash of their ids."""
    ranked = sorted(ids, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
    return sorted(ranked[:SAMPLED_VOLUMES])
