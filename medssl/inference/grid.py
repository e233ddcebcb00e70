"""The source's grid: how its voxels lie in the patient, and the way from the reader's axes back to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import InputRefused
from medssl.files import atomic_path

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """A voxel grid in the source's own axes.

    Args:
        shape: Number of voxels along the stored (x, y, z).
        affine: Maps voxel (x, y, z) to RAS mm. Shape: (4, 4), float64.
        stored_shape: The shape as the file has it: two numbers for a 2D image, perhaps a fourth of one.
        zooms: Voxel size in mm along (x, y, z) as the header says, or None to take it from the affine.
    """

    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    stored_shape: tuple[int, ...]
    zooms: tuple[float, float, float] | None = None

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def check(self) -> None:
        """Refuse a grid on which nothing can be placed.

        Raises:
            InputRefused: With `affine_invalid` or `spacing_invalid`.
        """
        if not np.isfinite(self.affine).all():
            raise InputRefused("affine_invalid", "the matrix has numbers that are not finite")
        spacing = np.linalg.norm(self.affine[:3, :3], axis=0)
        if not (spacing > 0).all():
            raise InputRefused("spacing_invalid", f"voxel size {tuple(float(side) for side in spacing)} mm")
        if abs(np.linalg.det(self.affine[:3, :3] / spacing)) < 1e-3:
            raise InputRefused("affine_invalid", "two axes of the matrix point the same way")
        if self.zooms is not None and not all(np.isfinite(side) and side > 0 for side in self.zooms):
            raise InputRefused("spacing_invalid", f"voxel size {self.zooms} mm in the header")

    def reader_shape(self, reorient: bool) -> tuple[int, int, int]:
        """Return (Z, Y, X) as nnU-Net's reader gives it: in RAS+ axes where it reorients, else in the stored ones."""
        x, y, z = self.shape
        if reorient:
            order = self._orientation()[:, 0].astype(int)
            sides = [0, 0, 0]
            for stored, canonical in enumerate(order):
                sides[canonical] = self.shape[stored]
            x, y, z = sides
        return z, y, x

    def reader_spacing(self, reorient: bool) -> tuple[float, float, float]:
        """Return the voxel size in mm, (z, y, x), with the very numbers that nnU-Net's nibabel readers see."""
        import nibabel

        nothing = np.broadcast_to(np.zeros((), np.uint8), self.shape)
        image = nibabel.Nifti1Image(nothing, self.affine)
        if self.zooms is not None:
            image.header.set_zooms(self.zooms)
        if reorient:
            image = image.as_reoriented(self._orientation())
        x, y, z = (float(side) for side in image.header.get_zooms()[:3])
        return z, y, x

    def stored_view(self, array: Array, reorient: bool) -> Array:
        """Return a view of a reader's array (Z, Y, X) in the stored axes (x, y, z), flips included."""
        from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

        turned = array.transpose(2, 1, 0)
        if not reorient:
            return turned
        back = ornt_transform(axcodes2ornt("RAS"), self._orientation())
        return np.asarray(apply_orientation(turned, back))

    def _orientation(self) -> Array:
        from nibabel.orientations import io_orientation

        return np.asarray(io_orientation(self.affine))


def write_mask(path: Path, mask: Array, grid: Grid, reorient: bool) -> None:
    """Write labels as NIfTI with the source's shape and affine, whole or not at all.

    Args:
        path: Ends in `.nii.gz`.
        mask: Shape: (Z, Y, X) in the reader's axes.
        grid: The source's grid.
        reorient: Whether the reader's axes are RAS+.
    """
    import nibabel

    stored = grid.stored_view(mask, reorient).reshape(grid.stored_shape[: max(2, len(grid.stored_shape))], order="F")
    image = nibabel.Nifti1Image(stored, grid.affine)
    image.set_sform(grid.affine, code="scanner")
    image.set_qform(grid.affine, code="scanner", strip_shears=True)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
