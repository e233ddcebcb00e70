"""A small store of smooth random volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.preprocessing.store import Store, StoreWriter


def make_store(
    out: Path, *, count: int = 4, validation: int = 1, shape: tuple[int, ...] = (1, 22, 26, 20), modality: str = "MR"
) -> Store:
    """Write a store of blobs, z-scored; the last `validation` volumes are for validation."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(out, {"spacing": {"mode": "median", "mm": [1, 1, 1]}, "normalisation": "by-modality"})
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape[1:]), indexing="ij"))
    for number in range(count):
        blobs = np.zeros(shape, dtype=np.float32)
        for channel in range(shape[0]):
            for _ in range(4):
                centre = rng.uniform(-0.4, 0.4, 3)[:, None, None, None]
                blobs[channel] += rng.uniform(-1, 1) * np.exp(-rng.uniform(4, 20) * ((grid - centre) ** 2).sum(axis=0))
        blobs = (blobs - blobs.mean()) / blobs.std()
        properties = {
            "spacing_mm": [1.0, 1.0, 1.0],
            "modality": modality,
            "patient_key": f"patient-{number}",
            "split": "validation" if number >= count - validation else "train",
            "background": float(blobs.min()),
            "foreground": np.argwhere(np.abs(blobs[0]) > 1)[:100].tolist(),
        }
        writer.add(f"volume-{number}", blobs.astype(np.float32), properties)
    return writer.finish()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes to train on, one to validate on."""
    return make_store(tmp_path_factory.mktemp("stores") / "store").folder
