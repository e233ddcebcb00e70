"""The one door to image files that are not DICOM."""

from __future__ import annotations

from pathlib import Path

from medssl.archive.formats.common import Geometry, Layout
from medssl.archive.sniff import Format
from medssl.archive.volume import Volume


def check_file(path: Path, kind: Format, root: Path) -> Layout:
    """Check the header of an image file against the file.

    Args:
        path: The file.
        kind: Its format, as `sniff` told it.
        root: Source folder: no voxels are read from outside.

    Raises:
        InputRefused: If the image cannot be used.
    """
    from medssl.archive.formats import images, metaimage, mgh, nifti, nrrd

    match kind:
        case "nifti":
            return nifti.check(path)
        case "mgh":
            return mgh.check(path)
        case "nrrd":
            return nrrd.check(path, root)
        case "metaimage":
            return metaimage.check(path, root)
        case "png" | "jpeg" | "tiff":
            return images.check(path)
    raise ValueError(f"{kind} is not read here")


def load_file(path: Path, kind: Format, root: Path, geometry: Geometry = "strict") -> Volume:
    """Read an image file.

    Args:
        path: The file.
        kind: Its format, as `sniff` told it.
        root: Source folder: no voxels are read from outside.
        geometry: What to do with a sheared grid.

    Raises:
        InputRefused: If the image cannot be used.
    """
    from medssl.archive.formats import images, metaimage, mgh, nifti, nrrd

    match kind:
        case "nifti":
            return nifti.load(path, geometry)
        case "mgh":
            return mgh.load(path, geometry)
        case "nrrd":
            return nrrd.load(path, root, geometry)
        case "metaimage":
            return metaimage.load(path, root, geometry)
        case "png" | "jpeg" | "tiff":
            return images.load(path, geometry)
    raise ValueError(f"{kind} is not read here")
