"""What a defective input really shows, and the judge that compares any reader's volumes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tests.archive.dicom import series as s

#: Voxels (x, y, z[, frames or colours]) and the affine from (x, y, z) to RAS mm.
Found = tuple[np.ndarray, np.ndarray]
#: Largest difference from the true value: 0.07 mm along the steepest axis.
TOLERANCE = 0.2
#: Synthetic values lie above this; lower ones are fill beside a resampled plane, or padding.
FILL = 60.0
#: Rec. 601 luma: the grey of a colour.
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Field:
    """Volumes whose voxels tell where they lie: each value is a linear function of its place in the patient.

    Attributes:
        slices: Slices of each volume that is there; none at all if whatever is read is wrong.
        frames: What is added to the value in each frame.
        scales: Factors of the value that are right; a PET is right in Bq/ml and in SUV.
        tolerance: Largest difference in units of the first scale.
    """

    slices: tuple[int, ...] = (12,)
    frames: tuple[float, ...] = (0.0,)
    scales: tuple[float, ...] = (1.0,)
    tolerance: float = TOLERANCE

    def judge(self, found: list[Found]) -> str:
        """Return `right` or `wrong`.

        A reader may give each frame as a volume of its own, and single slices that belong to no volume as they are.
        """
        if self.slices and 1 not in self.slices:
            found = [(array, affine) for array, affine in found if array.shape[2] > 1]
        counts = sorted(array.shape[2] for array, _ in found)
        if counts == sorted(self.slices):
            right = all(self._is_true(array, affine, self.frames) for array, affine in found)
        elif len(self.frames) > 1 and counts == sorted(self.slices * len(self.frames)):
            right = all(
                sum(self._is_true(array, affine, (frame,)) for array, affine in found) == len(self.slices)
                for frame in self.frames
            )
        else:
            right = False
        return "right" if right else "wrong"

    def _is_true(self, array: np.ndarray, affine: np.ndarray, frames: tuple[float, ...]) -> bool:
        array = array if array.ndim == 4 else array[..., None]
        if array.shape[3] != len(frames):
            return False
        x, y, z = np.indices(array.shape[:3])
        truth = s.field(np.stack([x, y, z], -1) @ affine[:3, :3].T + affine[:3, 3])
        return any(self._fits(array / scale, truth, frames) for scale in self.scales)

    def _fits(self, array: np.ndarray, truth: np.ndarray, frames: tuple[float, ...]) -> bool:
        first = array[..., 0]
        inside = (first > FILL) & (first > first.min())  # a resampled grid is filled up with its lowest value
        errors = [np.abs(array[..., n] - add - truth)[inside].max(initial=0) for n, add in enumerate(frames)]
        return bool(inside.mean() > 0.4 and max(errors) < self.tolerance)


@dataclass(frozen=True)
class Colours:
    """Pictures in colour without a place: right in colour, or in the grey of the colours.

    Attributes:
        pixels: The true picture or film. Shape: (frames, rows, columns, 3).
    """

    pixels: np.ndarray

    def judge(self, found: list[Found]) -> str:
        """Return `right` or `wrong`."""
        if len(found) != 1:
            return "wrong"
        array = np.squeeze(found[0][0])
        colours = np.squeeze(self.pixels.transpose(2, 1, 0, 3))  # (columns, rows[, frames], 3)
        grey = np.squeeze(self.pixels.transpose(2, 1, 0, 3)) @ LUMA
        return "right" if _equal(array, colours, 0) or _equal(array, grey, 1.0) else "wrong"


def _equal(array: np.ndarray, truth: np.ndarray, tolerance: float) -> bool:
    # Rows may run either way, as long as the picture is not turned: nothing says where it lies.
    views = (array, array[:, ::-1]) if array.ndim > 1 else (array,)
    return any(
        view.shape == truth.shape and np.abs(view - truth.astype(np.complex128)).max() <= tolerance for view in views
    )


@dataclass(frozen=True)
class Stored:
    """Numbers that are no image of the body: right as they stand.

    Attributes:
        array: The stored array. Shape: (x, y, z, ...).
    """

    array: np.ndarray

    def judge(self, found: list[Found]) -> str:
        """Return `right` or `wrong`."""
        same = len(found) == 1 and _equal(np.squeeze(found[0][0]), np.squeeze(self.array), 1e-6)
        return "right" if same else "wrong"


@dataclass(frozen=True)
class Defect:
    """One defective input.

    Attributes:
        name: What is wrong.
        write: Writes the files into a folder that it makes.
        strict: How ours ends under `--geometry strict`: `right`, or the code of the refusal.
        repair: The same under `--geometry repair`.
        truth: What the input shows.
        kind: A folder of DICOM files, or the one image file in the folder.
        flags: What ours must say of a volume that it accepts.
    """

    name: str
    write: Callable[[Path], object]
    strict: str = "right"
    repair: str = ""
    truth: Field | Colours | Stored = Field()
    kind: Literal["dicom", "image"] = "dicom"
    flags: tuple[str, ...] = ()

    def expected(self, geometry: str) -> str:
        """Return how ours ends under a policy."""
        return self.repair or self.strict if geometry == "repair" else self.strict


def series(make: Callable[[], Iterable[s.FileDataset]]) -> Callable[[Path], object]:
    """Return a writer of the data sets that a function makes."""
    return lambda folder: s.write(folder, map(_as_scanners_write, make()), name="{:03d}.dcm")


def _as_scanners_write(dataset: s.FileDataset) -> s.FileDataset:
    # dcm2niix evens out gaps and tilt of signed numbers only, and asks for these elements.
    dataset.PatientPosition, dataset.ProtocolName = "HFS", "defect"
    if dataset.BitsStored == 16 and np.frombuffer(dataset.PixelData, "<u2").max() < 2**15:
        dataset.PixelRepresentation = 1
    return dataset
