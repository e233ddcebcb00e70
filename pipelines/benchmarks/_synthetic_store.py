"""A store of smooth random volumes, for benchmarks that must not depend on data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medssl.preprocessing.store import Store, StoreWriter


def synthetic_store(out: Path, *, volumes: int, shape: tuple[int, int, int], seed: int = 0) -> Store:
    """Write volumes of filtered noise, z-scored, one channel, 1 mm.

    Args:
        out: Folder of the store.
        volumes: How many.
        shape: (Z, Y, X).
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    writer = StoreWriter(out, {"spacing": {"mode": "median", "mm": [1, 1, 1]}, "normalisation": "by-modality"})
    for number in range(volumes):
        coarse = rng.standard_normal([-(-size // 4) for size in shape]).astype(np.float32)
        volume = coarse
        for axis, size in enumerate(shape):
            volume = np.repeat(volume, 4, axis=axis).take(range(size), axis=axis)
            volume = (volume + np.roll(volume, 2, axis=axis)) / 2
        volume = (volume - volume.mean()) / volume.std()
        properties = {
            "spacing_mm": [1.0, 1.0, 1.0],
            "modality": "MR",
            "patient_key": f"{number}",
            "split": "train",
            "background": float(volume.min()),
            "foreground": np.argwhere(volume > 1)[:512].tolist(),
        }
        writer.add(f"synthetic_{number:03d}", volume[None].astype(np.float32), properties)
    return writer.finish()
