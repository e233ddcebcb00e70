"""A small nnU-Net raw data set, for tests of preprocessing."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (30, 26, 18)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write an array of axes (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.2, 2.0, 1.0]) if affine is None else affine), path)
    return path


def make_raw(folder: Path, n: int = 4, channel: str = "MR", labels: bool = True, seed: int = 0) -> Path:
    """Write `n` cases named case_0 and so on: a bright ellipsoid in the dark, with two classes in it."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij"))
    body = (grid**2).sum(axis=0) < 0.8
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        label = (((grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(axis=0) < 0.2).astype(np.uint8)
        label[15:] *= 2
        if channel == "CT":
            image = np.where(body, 40.0 + 60.0 * label + rng.normal(0, 10, SHAPE), -1000).astype(np.int16)
        else:
            image = np.where(body, 200.0 + 100.0 * label + rng.normal(0, 10, SHAPE), 0).astype(np.float32)
        write_nifti(folder / "imagesTr" / f"case_{number}_0000.nii.gz", image)
        if labels:
            write_nifti(folder / "labelsTr" / f"case_{number}.nii.gz", label)
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": channel},
                "labels": {"background": 0, "left": 1, "right": 2},
                "numTraining": n,
                "file_ending": ".nii.gz",
            }
        )
    )
    return folder
