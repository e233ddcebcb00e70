"""A small synthetic store, for tests of everything that reads one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medssl.preprocessing.store import Store, StoreWriter

BACKGROUND = -1.5


def make_store(
    folder: Path,
    n: int = 4,
    shape: tuple[int, int, int] = (24, 40, 32),
    labels: bool = False,
    seed: int = 0,
    channels: int = 1,
    modality: str = "MR",
) -> Store:
    """Write `n` volumes of an ellipsoid body with brighter blobs in it; the last one is of the validation split.

    Args:
        folder: Where; created.
        n: Number of volumes, named `volume_00` and so on.
        shape: (Z, Y, X) of the first volume; the others are up to 3 voxels larger. Z = 1 gives 2D images.
        labels: Write the blobs as label classes 1 and 2.
        seed: Of all that is random.
        channels: Number of channels.
        modality: Of all volumes.
    """
    writer = StoreWriter(folder, {"spacing": {"mode": "native", "mm": None}, "normalisation": "synthetic"})
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        size = tuple(edge + (number % 4 if edge > 1 else 0) for edge in shape)
        grid = np.stack(
            np.meshgrid(*(np.linspace(-1, 1, edge) if edge > 1 else np.zeros(1) for edge in size), indexing="ij")
        )
        body = (grid**2).sum(axis=0) < 0.9
        label = np.zeros(size, np.int16)
        for value in (1, 2):
            center = rng.uniform(-0.4, 0.4, size=(3, 1, 1, 1)) * (np.array(shape) > 1).reshape(3, 1, 1, 1)
            label[((grid - center) ** 2).sum(axis=0) < 0.08] = value
        image = np.where(body, 0.2 * rng.standard_normal(size) + label, BACKGROUND)
        inside = np.argwhere(body)
        writer.add(
            f"volume_{number:02d}",
            np.stack([image * (1 + channel) for channel in range(channels)]).astype(np.float32),
            {
                "spacing_mm": [1.0, 0.75, 0.75],
                "modality": modality,
                "patient_key": f"patient_{number // 2:02d}",
                "split": "validation" if number == n - 1 and n > 1 else "train",
                "background": BACKGROUND,
                "foreground": inside[rng.choice(len(inside), min(64, len(inside)), replace=False)].tolist(),
            },
            label if labels else None,
        )
    return writer.finish()
