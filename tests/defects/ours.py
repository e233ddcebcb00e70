"""How medssl reads a case of the corpus: the same way for the tests and for the comparison with other readers."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from medssl.archive.formats.common import Geometry
from medssl.archive.volume import Volume
from tests.defects.truth import Found


def read(folder: Path, kind: str, geometry: str) -> list[Volume]:
    """Read a folder of DICOM files, or the image file in it.

    Raises:
        InputRefused: If there is no volume.
    """
    from medssl.archive.dicom.series import read_series
    from medssl.archive.formats.read import check_file, load_file
    from medssl.archive.sniff import sniff

    if kind == "dicom":
        return [one.volume for one in read_series(folder, cast("Geometry", geometry))]
    path = image_file(folder)
    check_file(path, sniff(path), folder)
    return [load_file(path, sniff(path), folder, cast("Geometry", geometry))]


def image_file(folder: Path) -> Path:
    """Return the one image file in a folder."""
    return next(path for path in sorted(folder.iterdir()) if path.is_file())


def as_found(volume: Volume) -> Found:
    """Return voxels and affine as the judges take them."""
    array = np.transpose(volume.array, (3, 2, 1, 0))
    return array if array.shape[3] > 1 else array[..., 0], volume.affine
