"""Labels from an RTSTRUCT: closed planar contours on the slices of a volume, filled.

A voxel belongs to a contour if its centre lies inside or on the line. Contours of one region on one slice are combined
by exclusive or, so that a contour within another is a hole (PS3.3 C.8.8.6.3; CLOSEDPLANAR_XOR says the same); a keyhole
contour is filled by the even-odd rule, which is what it means. Slices between contours stay empty: nothing is made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.reading import open_header
from medssl.archive.dicom.regions import PLACE_TOLERANCE, LabelMap, label_text
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

_REGIONS, _NUMBER, _NAME = 0x30060020, 0x30060022, 0x30060026
_DRAWN, _DRAWN_NUMBER, _CONTOURS = 0x30060039, 0x30060084, 0x30060040
_KIND, _COUNT, _DATA = 0x30060042, 0x30060046, 0x30060050
_WANTED = [t.CHARACTER_SET, t.SOP_CLASS, t.MODALITY, _REGIONS, _DRAWN]
_CLOSED = frozenset(("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"))
#: Vertices are written with few decimals; what differs less is one place.
_DECIMALS = 3


@dataclass(frozen=True)
class StructureSet:
    """An RTSTRUCT whose regions were listed.

    Attributes:
        regions: Name and the contours' item of each region that has a closed contour; markers and lines are none.
    """

    regions: tuple[tuple[str, Tags], ...]

    @property
    def names(self) -> list[str]:
        """Return each name once."""
        return list(dict.fromkeys(name for name, _ in self.regions))


def open_structure_set(path: Path) -> StructureSet:
    """Read an RTSTRUCT; call it in a process with limits.

    Raises:
        InputRefused: If its regions cannot be told apart, or one mixes areas with lines or points.
    """
    header = Tags(open_header(path, _WANTED).dataset)
    names: dict[int, str] = {}
    for item in header.sequence(_REGIONS):
        number, name = item.integer(_NUMBER, ""), label_text(header, item, _NAME)
        if number is None or number in names or not name:
            raise InputRefused("structure_set_invalid", "a region without number or name, or a number given twice")
        names[number] = name
    regions = []
    for item in header.sequence(_DRAWN):
        number = item.integer(_DRAWN_NUMBER, "")
        kinds = {contour.text(_KIND).upper() for contour in item.sequence(_CONTOURS)}
        if not kinds & _CLOSED:
            continue
        if number not in names:
            raise InputRefused("structure_set_invalid", "contours of a region that is not described")
        if kinds - _CLOSED:
            raise InputRefused("structure_set_invalid", "a region of closed contours and of lines or points")
        regions.append((names[number], item))
    if not regions:
        raise InputRefused("structure_set_invalid", "no region with a closed contour")
    return StructureSet(tuple(regions))


def paint_structure_set(found: StructureSet, labels: LabelMap) -> None:
    """Paint the regions whose names the map has.

    Raises:
        InputRefused: If a contour is no polygon, or does not lie on a slice of the volume.
    """
    for name, item in found.regions:
        if name not in labels.names:
            continue
        planes: dict[int, NDArray[np.bool_]] = {}
        for contour in item.sequence(_CONTOURS):
            slice_number, filled = _filled(contour, labels)
            if slice_number in planes:
                planes[slice_number] ^= filled
            else:
                planes[slice_number] = filled
        for slice_number, mask in planes.items():
            labels.paint(name, labels.voxels[slice_number], mask)


def _filled(contour: Tags, labels: LabelMap) -> tuple[int, NDArray[np.bool_]]:
    """Return the slice that a contour lies on and the voxels in it. Shape: (Y, X)."""
    from skimage.draw import polygon

    values = np.array(contour.numbers(_DATA), np.float64)
    told = contour.integer(_COUNT, "")
    if values.size % 3 or values.size < 9 or not np.isfinite(values).all() or told not in (None, values.size // 3):
        raise InputRefused("contour_invalid", f"{values.size} coordinates, {told} points declared")
    points = np.c_[values.reshape(-1, 3), np.ones(values.size // 3)] @ labels.from_lps[:3].T
    z = points[:, 2]
    slice_number = int(np.rint(np.median(z)))
    beside = float(np.abs(z - slice_number).max())
    if not 0 <= slice_number < labels.voxels.shape[0] or beside > PLACE_TOLERANCE:
        raise InputRefused("contour_off_slice", f"{beside:.2f} of a slice distance beside slice {slice_number}")
    inner = labels.voxels.shape[1:]
    x, y = np.round(points[:, 0], _DECIMALS), np.round(points[:, 1], _DECIMALS)
    mask = np.zeros(inner, bool)
    mask[polygon(y, x, inner)] = True
    return slice_number, mask
