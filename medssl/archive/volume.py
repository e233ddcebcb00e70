"""The one form in which every image leaves `archive/`: voxels, affine and what is known about both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Channels = Literal["scalar", "frames", "colour"]
CHANNELS: tuple[str, ...] = get_args(Channels)

#: Modality of a volume file (NIfTI, NRRD, MHA, MGZ) that says nothing about its modality; DICOM's code for "other".
UNKNOWN_MODALITY = "OT"
#: Modality of PNG, JPEG and TIFF: a picture of unknown origin. Not a DICOM code.
IMAGE_MODALITY = "IMAGE"


@dataclass(frozen=True)
class Volume:
    """An image with its place in the patient.

    Attributes:
        array: Voxels, Shape: (C, Z, Y, X); a 2D image has Z = 1. CT in HU, PET in SUVbw, MR and images unitless.
        affine: World = affine @ (x, y, z, 1) in RAS millimetres for `array[c, z, y, x]`. Shape: (4, 4), float64.
            The axes are as stored, not reoriented. PNG, JPEG and ordinary TIFF have no orientation: their affine is
            diagonal and positive, so that reorientation leaves the rows as they stand.
        modality: DICOM's code (`CT`, `MR`, `PT`, `US`, ...), `OT` where unknown, `IMAGE` for PNG, JPEG and TIFF.
        channels: What C means: one value (`scalar`, C = 1), time points, echoes or directions (`frames`), or red,
            green and blue (`colour`, C = 3).
        flags: Quality flags, each a key of `medssl.archive.codes.CODES`, sorted.
        geometry: `regular`, or the code of the repair that made it so.
    """

    array: NDArray[np.generic]
    affine: NDArray[np.float64]
    modality: str = UNKNOWN_MODALITY
    channels: Channels = "scalar"
    flags: tuple[str, ...] = ()
    geometry: str = "regular"

    def __post_init__(self) -> None:
        """Refuse what no reader may produce.

        Raises:
            ValueError: If the shape, the affine or the kind of channels is impossible.
        """
        if self.array.ndim != 4 or 0 in self.array.shape:
            raise ValueError(f"a volume needs a non-empty (C, Z, Y, X) array, got {self.array.shape}")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError(f"a volume needs a finite 4 x 4 affine, got {self.affine.tolist()}")
        if self.channels not in CHANNELS:
            raise ValueError(f"channels must be one of {CHANNELS}, got '{self.channels}'")
        if (self.channels == "scalar" and self.array.shape[0] != 1) or (
            self.channels == "colour" and self.array.shape[0] != 3
        ):
            raise ValueError(f"'{self.channels}' does not fit {self.array.shape[0]} channels")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return (C, Z, Y, X)."""
        c, z, y, x = self.array.shape
        return c, z, y, x

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Return the distance of neighbouring voxels in mm along (z, y, x)."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """Return the patient direction in which x, y and z run, as three letters, for example `LPS`."""
        return orientation_of(self.affine)


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the voxel size (z, y, x) in mm of an affine that maps (x, y, z)."""
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return z, y, x


def orientation_of(affine: NDArray[np.float64]) -> str:
    """Return the direction in which x, y and z run in the patient, for example `RAS`.

    Each letter is used once: the axes are given to the patient's directions in the order of how well they align.

    Args:
        affine: Maps voxel (x, y, z) to RAS mm. Shape: (4, 4).
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    letters = ["", "", ""]
    free_axes, free_worlds = {0, 1, 2}, {0, 1, 2}
    while free_axes:
        # Ties are broken by the axis number, so that the answer does not depend on rounding of equal values.
        axis, world = max(
            ((a, w) for a in sorted(free_axes) for w in sorted(free_worlds)),
            key=lambda pair: round(abs(float(directions[pair[1], pair[0]])), 6),
        )
        letters[axis] = ("LR", "PA", "IS")[world][int(directions[world, axis] > 0)]
        free_axes.remove(axis)
        free_worlds.remove(world)
    return "".join(letters)
