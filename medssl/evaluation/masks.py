"""Finds pairs of predicted and reference masks and reads them on one grid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import DataError, InputRefused, UsageError
from medssl.inference.cases import ENDINGS
from medssl.inference.source import open_file

MASK_ENDINGS = (*ENDINGS, ".png", ".tif", ".tiff")
Labels = dict[str, tuple[int, ...]]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Mask:
    """Labels and their grid.

    Args:
        labels: Shape: (Z, Y, X), int32, axes as stored.
        affine: Maps voxel (x, y, z) to RAS mm. Shape: (4, 4).
    """

    labels: Array
    affine: npt.NDArray[np.float64]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size, (z, y, x)."""
        x, y, z = (float(side) for side in np.linalg.norm(self.affine[:3, :3], axis=0))
        return z, y, x


def mask_files(folder: Path) -> dict[str, Path]:
    """Return the masks of a folder by case name; a single file is a case of its own name.

    Pictures (PNG, TIFF) count too; they know no voxel size, so that a distance of 1 mm is one pixel there.

    Raises:
        UsageError: If the folder does not exist.
        DataError: If two files have one name.
    """
    if not folder.exists():
        raise UsageError(f"{folder} does not exist.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        ending = next((ending for ending in MASK_ENDINGS if path.name.lower().endswith(ending)), None)
        if ending is None or path.name.startswith(".") or path.is_dir():
            continue
        name = path.name[: -len(ending)]
        if name in files:
            raise DataError(f"{folder}: {files[name].name} and {path.name} are the same case. Remove one.")
        files[name] = path
    return files


def read_mask(path: Path) -> Mask:
    """Read a mask; its values must be integers.

    Raises:
        DataError: If the file cannot be read or holds other numbers.
    """
    try:
        channel = open_file(path)
        channel.grid.check()
        x, y, z = channel.grid.shape
        voxels = np.empty((z, y, x), np.float32)
        channel.fill(voxels.transpose(2, 1, 0))
    except InputRefused as error:
        raise DataError(f"{path} cannot be read as a mask: {error}. Replace the file.") from error
    labels = np.rint(voxels).astype(np.int32) if np.isfinite(voxels).all() else None
    if labels is None or not np.array_equal(labels, voxels):
        raise DataError(
            f"{path.name}: a mask must hold whole numbers, this one holds {_odd_value(voxels):.6g}. "
            "If these are probabilities, threshold them first."
        )
    return Mask(labels, channel.grid.affine)


def require_same_grid(case: str, prediction: Mask, reference: Mask) -> None:
    """Refuse masks whose voxels do not lie at the same places, within a tenth of a voxel.

    Raises:
        DataError: That names both grids and the remedy.
    """
    remedy = "Evaluate masks as `medssl predict` writes them, or resample the prediction onto the reference's grid."
    if prediction.labels.shape != reference.labels.shape:
        raise DataError(
            f"{case}: the prediction has {prediction.labels.shape[::-1]} voxels (x, y, z), the reference "
            f"{reference.labels.shape[::-1]}. {remedy}"
        )
    z, y, x = reference.labels.shape
    corners = np.array([[i, j, k, 1.0] for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)]).T
    apart = np.linalg.norm((prediction.affine @ corners - reference.affine @ corners)[:3], axis=0).max()
    if not apart <= 0.1 * min(reference.spacing_mm):
        raise DataError(
            f"{case}: prediction and reference lie {apart:.3g} mm apart: affine {_rows(prediction.affine)} against "
            f"{_rows(reference.affine)}. {remedy}"
        )


def require_known(case: str, which: str, mask: Mask, labels: Labels, ignore: int | None) -> None:
    """Refuse label values that no label has.

    Raises:
        DataError: That names the values.
    """
    known = {0, *(value for values in labels.values() for value in values)} | (
        {ignore} if ignore is not None else set()
    )
    found = set(np.unique(mask.labels).tolist())
    if not found <= known:
        raise DataError(
            f"{case}: the {which} has values {sorted(found)}; known are {sorted(known)}. "
            "Fix the mask, or name all labels in dataset.json."
        )


def find_labels(
    labels: Mapping[str, int | Sequence[int]] | None, predictions: Path, references: Path
) -> tuple[Labels | None, int | None]:
    """Return the labels to evaluate and the value to ignore.

    Args:
        labels: As given by the user: a value, or the values of a region, by name.
        predictions: Folder of predictions.
        references: Folder of references; `dataset.json` is looked for in it, beside it and with the predictions.

    Returns:
        Labels by name, or None where nothing names them; the ignored value, if any.
    """
    if labels is not None:
        return _foreground(labels), None
    for folder in (references, references.parent, predictions, predictions.parent):
        path = folder / "dataset.json"
        if path.is_file():
            try:
                content = json.loads(path.read_text())["labels"]
                return _foreground(content), content.get("ignore")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f'{path}: "labels" must map names to numbers or lists of them.') from error
    return None, None


def _foreground(labels: Mapping[str, int | Sequence[int]]) -> Labels:
    named: Labels = {}
    for name, value in labels.items():
        values = tuple(int(each) for each in value) if isinstance(value, Sequence) else (int(value),)
        if name not in ("background", "ignore") and values != (0,):
            named[str(name)] = values
    return named


def _odd_value(voxels: Array) -> float:
    odd = voxels[~(voxels == np.rint(voxels))]
    return float(odd[0])


def _rows(affine: npt.NDArray[np.float64]) -> str:
    return str(np.round(affine[:3], 4).tolist())
