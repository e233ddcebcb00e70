"""One DICOM series, folder or set of files at once: for prediction and for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.archive.dicom.group import Geometry, group
from medssl.archive.dicom.header import read_header
from medssl.archive.dicom.model import DicomVolume
from medssl.archive.dicom.pixels import load
from medssl.archive.volume import Volume
from medssl.errors import InputRefused


@dataclass(frozen=True)
class SeriesVolume:
    """A decoded volume and where it came from.

    Attributes:
        volume: Voxels and place.
        source: Its files, in the order of the slices; private to the archive and to writers of DICOM.
    """

    volume: Volume
    source: DicomVolume


def plan_series(source: Path | Sequence[Path], geometry: Geometry = "strict") -> list[DicomVolume]:
    """Return the volumes that the files under a folder hold, not yet decoded.

    Args:
        source: A folder of any depth, one file, or files.
        geometry: As in `group`.

    Raises:
        InputRefused: If there is no volume; the most frequent reason is told.
    """
    paths = [source] if isinstance(source, Path) else list(source)
    files = sorted(file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    headers = []
    reasons: Counter[tuple[str, str]] = Counter()
    for file in files:
        try:
            headers.append(read_header(file))
        except InputRefused as refusal:
            reasons[refusal.code, refusal.detail] += 1
    result = group(headers, geometry)
    if not result.volumes:
        dicom = Counter((code, detail) for _, code, detail in result.refused)
        code, detail = next(iter((dicom or reasons).most_common(1)), (("not_an_image", "no DICOM image"), 0))[0]
        raise InputRefused(code, f"{detail} ({len(files)} files, no volume)")
    return result.volumes


def read_series(source: Path | Sequence[Path], geometry: Geometry = "strict") -> list[SeriesVolume]:
    """Read every volume under a folder.

    Args:
        source: A folder of any depth, one file, or files.
        geometry: As in `group`.

    Raises:
        InputRefused: If there is no volume, or one cannot be decoded.
    """
    return [SeriesVolume(load(plan), plan) for plan in plan_series(source, geometry)]
