"""Small labelled images whose class can be told: where a bright ball lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from medssl.transfer.classification import finetune_classification


def toy_image(label: int, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return noise with a ball that is small (0) or large (1), or of a size between for further classes; uint8."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(edge) for edge in shape), indexing="ij"), axis=-1)
    centre = np.array(shape) / 2 + rng.uniform(-1, 1, len(shape))
    inside = np.linalg.norm(grid - centre, axis=-1) < min(shape) * (0.15 + 0.2 * label)
    return np.clip(rng.normal(60, 8, shape) + 90 * inside, 0, 255).astype(np.uint8)


def write_npz(path: Path, *, train: int = 24, validation: int = 12, edge: int = 16, classes: int = 2) -> Path:
    """Write a file like MedMNIST's."""
    arrays = {}
    for name, count, first in (("train", train, 0), ("val", validation, 1000), ("test", 4, 2000)):
        labels = np.arange(count) % classes
        arrays[f"{name}_images"] = np.stack(
            [toy_image(int(label), first + number, (edge, edge)) for number, label in enumerate(labels)]
        )
        arrays[f"{name}_labels"] = labels[:, None]
    np.savez(path, **arrays)
    return path


def write_volumes(folder: Path, count: int = 12, edge: int = 16) -> Path:
    """Write NIfTI volumes and a CSV of their labels; two volumes of each patient."""
    (folder / "scans").mkdir(parents=True)
    lines = ["path,label,patient,split"]
    for number in range(count):
        label = number // 2 % 2
        image = toy_image(label, number, (edge,) * 3).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.diag([1.0, 1.0, 1.5, 1.0])), folder / "scans" / f"{number}.nii.gz")
        split = "train" if number < count * 2 // 3 else "val"
        lines.append(f"scans/{number}.nii.gz,{('small', 'large')[label]},patient{number // 2},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def write_pictures(folder: Path, count: int = 10, edge: int = 20) -> Path:
    """Write a folder of PNG images for each class, in colour."""
    for label, name in enumerate(("large", "small")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            grey = toy_image(1 - label, 100 * label + number, (edge, edge))
            Image.fromarray(np.stack([grey] * 3, axis=-1)).save(folder / name / f"{number}.png")
    return folder


def finetune(dataset: Path, out: Path, checkpoint: Path | None = None, **options: Any) -> Path:
    """A short run on the CPU; from scratch with the smallest network."""
    given = {"steps": 4, "val_every": 2, "batch_size": 4, "device": "cpu", "quiet": True, "workers": 1}
    if checkpoint is None and "plans_from" not in options:
        given["network"] = "resenc-xs"
    return finetune_classification(dataset, checkpoint, out, **{**given, **options})
