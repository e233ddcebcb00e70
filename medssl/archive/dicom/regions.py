"""Named regions drawn on a volume become one label map: overlaps are settled by a stated order, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

Array = NDArray[np.float64]
#: A plane of pixels belongs to a slice if it lies this part of a voxel beside it at most; half a voxel is another grid.
PLACE_TOLERANCE = 0.2
#: What rows and columns of a plane may drift from the volume's over their whole length, in voxels.
DRIFT_TOLERANCE = 0.2


class LabelMap:
    """A label map that is being painted.

    Args:
        shape: (Z, Y, X) of the volume.
        affine: Maps voxel (x, y, z) of the volume to RAS mm. Shape: (4, 4).
        names: Labels; the first has the value 1.
        priority: Labels of which the earlier wins where two overlap; any of them wins over one that is not listed.
    """

    def __init__(
        self, shape: tuple[int, int, int], affine: Array, names: Sequence[str], priority: Sequence[str] = ()
    ) -> None:
        self.names = list(names)
        self.voxels = np.zeros(shape, np.uint8 if len(names) < 256 else np.uint16)
        #: World of DICOM (LPS mm) to voxel (x, y, z).
        self.from_lps = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
        last = len(priority)
        self._rank = np.array(
            [last + 1, *(priority.index(name) if name in priority else last for name in names)], np.int64
        )
        self._unlisted = last

    def paint(self, name: str, view: NDArray[np.generic], mask: NDArray[np.bool_]) -> None:
        """Give the voxels of a mask a label.

        Args:
            name: The label.
            view: Part of `voxels`, of the mask's shape.
            mask: Where the region is.

        Raises:
            InputRefused: If it overlaps another label and no order is stated for the two.
        """
        value = self.names.index(name) + 1
        rank = self._rank[value]
        there = np.asarray(view)[mask]
        others = (there != 0) & (there != value)
        tied = others & (self._rank[there] == rank) & (rank == self._unlisted)
        if tied.any():
            other = self.names[int(there[tied][0]) - 1]
            raise InputRefused("segments_overlap", f"'{other}' and '{name}' share {int(tied.sum())} voxels of a slice")
        view[mask] = np.where(others & (self._rank[there] < rank), there, value)

    def plane(
        self, position: Array, row: Array, column: Array, spacing: tuple[float, float], size: tuple[int, int]
    ) -> tuple[NDArray[np.generic], tuple[slice, slice], bool]:
        """Return the voxels that the pixels of a plane are.

        Args:
            position: Centre of the plane's first pixel in LPS mm. Shape: (3,).
            row: Direction in which a row runs, of unit length. Shape: (3,).
            column: Direction in which a column runs.
            spacing: Distance of rows and of columns in mm.
            size: Rows and columns.

        Returns:
            A view of `voxels`, shape (rows, columns) of the part inside the volume; the plane's pixels in it; and
            whether that is the whole plane.

        Raises:
            InputRefused: If the pixels are no voxels of the volume.
        """
        corner = self.from_lps @ [*position, 1.0]
        steps = np.stack([self.from_lps[:3, :3] @ (column * spacing[0]), self.from_lps[:3, :3] @ (row * spacing[1])])
        axes = np.abs(steps).argmax(1)
        exact = np.zeros((2, 3))
        exact[[0, 1], axes] = np.sign(steps[[0, 1], axes])
        drift = np.abs((steps - exact) * np.array(size)[:, None]).max()
        first = np.rint(corner[:3])
        beside = np.abs(corner[:3] - first).max()
        if axes[0] == axes[1] or not drift <= DRIFT_TOLERANCE or not beside <= PLACE_TOLERANCE:
            raise InputRefused("label_grid_differs", "its pixels lie beside the voxels, or are of another size")
        sides = self.voxels.shape[::-1]
        where: list[int | slice] = [int(value) for value in first]
        pixels: list[slice] = []
        for number, axis in enumerate(axes):
            step, start, side = int(exact[number, axis]), int(first[axis]), sides[axis]
            low = max(0, -start) if step > 0 else max(0, start - side + 1)
            high = min(size[number], side - start) if step > 0 else min(size[number], start + 1)
            high = max(low, high)
            pixels.append(slice(low, high))
            if high == low:
                where[axis] = slice(0, 0)
            else:
                ends = start + step * low, start + step * (high - 1)
                where[axis] = slice(min(ends), max(ends) + 1)
        through = 3 - int(axes.sum())
        inside = 0 <= first[through] < sides[through]
        if not inside:
            where[through], pixels = 0, [slice(0, 0), slice(0, 0)]
            where[axes[0]] = where[axes[1]] = slice(0, 0)
        view = self.voxels.transpose(2, 1, 0)[tuple(where)]
        if axes[0] > axes[1]:
            view = view.T
        view = view[:: int(exact[0, axes[0]]), :: int(exact[1, axes[1]])]
        whole = inside and all(part == slice(0, length) for part, length in zip(pixels, size, strict=True))
        return view, (pixels[0], pixels[1]), whole


def label_text(header: Tags, item: Tags, tag: int) -> str:
    """Return a text of one of the object's items with single blanks, in the object's own character set.

    Args:
        header: The object's top level, which tells the character set.
        item: Where the text stands.
        tag: Which text.
    """
    text = item.text(tag)
    if "ISO_IR 192" in header.text(t.CHARACTER_SET):
        with suppress(UnicodeError):  # `Tags` reads each byte as a character
            text = text.encode("latin-1").decode("utf-8")
    return " ".join(text.split())


def check_names(names: Sequence[str], patient_name: str, patient_id: str) -> None:
    """Refuse names of regions that name the patient: they become the labels of a data set.

    Raises:
        InputRefused: If one does; it is not quoted.
    """
    words = {"".join(filter(str.isalnum, word)).casefold() for word in patient_name.replace("^", " ").split()}
    words |= {"".join(filter(str.isalnum, patient_id)).casefold()}
    words = {word for word in words if len(word) >= 3}
    for number, name in enumerate(names, 1):
        told = {"".join(filter(str.isalnum, word)).casefold() for word in name.replace("_", " ").split()}
        if words & told or any(len(word) >= 5 and word in name.casefold() for word in words):
            raise InputRefused("label_names_patient", f"region {number} of {len(names)}")
