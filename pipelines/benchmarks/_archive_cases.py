"""Cases of `archive_peers.py`: defective series that carry their own truth, real series, and their judges."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.archive.dicom import series as s

#: Voxels (x, y, z[, frames or colours]) and the affine from (x, y, z) to RAS mm.
Found = tuple[np.ndarray, np.ndarray]
#: Largest difference from the true value: 0.07 mm along the steepest axis.
TOLERANCE = 0.2
#: Synthetic values lie above this; lower ones are fill beside a resampled plane.
FILL = 60.0


@dataclass(frozen=True)
class Synthetic:
    """A defective series whose voxels tell where they lie."""

    name: str
    make: Callable[[], list[Any]]
    slices: tuple[int, ...] = (12,)
    frames: tuple[float, ...] = (0.0,)

    def write(self, folder: Path) -> None:
        s.write(folder, self.make(), name="{:03d}.dcm")

    def judge(self, found: list[Found]) -> str:
        """Return `right` or `wrong`."""
        counts = sorted(array.shape[2] for array, _ in found)
        right = counts == sorted(self.slices) and all(self._is_true(array, affine) for array, affine in found)
        return "right" if right else "wrong"

    def _is_true(self, array: np.ndarray, affine: np.ndarray) -> bool:
        array = array if array.ndim == 4 else array[..., None]
        if array.shape[3] != len(self.frames):
            return False
        x, y, z = np.indices(array.shape[:3])
        truth = s.field(np.stack([x, y, z], -1) @ affine[:3, :3].T + affine[:3, 3])
        inside = array[..., 0] > FILL
        errors = [np.abs(array[..., n] - add - truth)[inside].max(initial=0) for n, add in enumerate(self.frames)]
        return bool(inside.mean() > 0.5 and max(errors) < TOLERANCE)


@dataclass(frozen=True)
class Real:
    """A series of the data folder, with an expected volume or without."""

    name: str
    folder: Path
    truth: Path | None = None
    volumes: int = 1

    def judge(self, found: list[Found]) -> str:
        """Return `right` or `wrong`."""
        if len(found) != self.volumes:
            return "wrong"
        if self.truth is not None and all(_equal(one, self.truth) for one in found):
            return "right"
        return "right" if _every_pixel_at_its_place(found, self.folder) else "wrong"


def _without(number: int) -> list[Any]:
    return [dataset for index, dataset in enumerate(s.stack()) if index != number]


def _shuffled() -> list[Any]:
    slices = s.stack()
    for dataset, number in zip(slices, np.random.default_rng(0).permutation(12), strict=True):
        dataset.InstanceNumber = int(number) + 1
    return slices


def _jitter() -> list[Any]:
    slices = s.stack()
    for dataset, offset in zip(slices, np.random.default_rng(0).uniform(-0.01, 0.01, 12), strict=True):
        x, y, z = (float(part) for part in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y, round(z + offset, 4)]
    return slices


def _slopes() -> list[Any]:
    return [s.image((-10, -20, 30 + 2.0 * n), n + 1, slope=0.02 * (n + 1), intercept=-1024.0) for n in range(12)]


def _times() -> list[Any]:
    slices = []
    for time in range(3):
        for dataset in s.stack(6, modality="MR", add=50.0 * time):
            dataset.TemporalPositionIdentifier = dataset.AcquisitionNumber = time + 1
            dataset.InstanceNumber = time * 6 + dataset.InstanceNumber
            slices.append(dataset)
    return slices


def _uneven() -> list[Any]:
    heights = [0, 2, 4, 6, 8, 10, 15, 20, 25, 30, 35, 40]
    return [s.image((-10, -20, 30.0 + height), number + 1) for number, height in enumerate(heights)]


def _scrambled_frames() -> list[Any]:
    planes = s.stack()
    return [s.enhanced([planes[number] for number in np.random.default_rng(0).permutation(12)])]


def _padded_copy() -> list[Any]:
    copy = s.stack()[5]
    copy.SOPInstanceUID, copy.InstanceNumber = s.uid("again"), 13
    return [*s.stack(), copy]


def _two_patients() -> list[Any]:
    return s.stack(6) + s.stack(6, origin=(-10, -20, 42), PatientID="P2", PatientName="Roe^Richard")


SYNTHETIC = [
    Synthetic("clean", s.stack),
    Synthetic("one slice missing", lambda: _without(6)),
    Synthetic("one slice twice", _padded_copy),
    Synthetic("other image at one place", lambda: [*s.stack(), s.image((-10, -20, 40), 13, add=7.0)], slices=()),
    Synthetic("instance numbers shuffled", _shuffled),
    Synthetic("gantry tilt 15 degrees", lambda: s.stack(orientation=s.tilted(15), direction=(0, 0, 1))),
    Synthetic("spacing 2 then 5 mm", _uneven, slices=()),
    Synthetic(
        "sagittal localizer inside", lambda: [*s.stack(11), s.image((3, 4, 5), 77, orientation=s.SAGITTAL)], (11,)
    ),
    Synthetic("slope of each slice", _slopes),
    Synthetic("jitter 0.01 mm", _jitter),
    Synthetic("two slices", lambda: s.stack(2), slices=(2,)),
    Synthetic(
        "three series in a folder",
        lambda: [d for n in "123" for d in s.stack(8, series=n, SeriesNumber=int(n))],
        (8, 8, 8),
    ),
    Synthetic("two orientations, one series", lambda: [*s.stack(6), *s.stack(5, orientation=s.CORONAL)], (5, 6)),
    Synthetic("another size inside", lambda: [*s.stack(), s.image((-10, -20, 54), 77, rows=10)]),
    Synthetic("three time points", _times, slices=(6,), frames=(0.0, 50.0, 100.0)),
    Synthetic("enhanced, frames scrambled", _scrambled_frames),
    Synthetic("mosaic", lambda: [s.mosaic(s.stack(7, modality="MR"), normal=(0, 0, 1), step=2.0)], slices=(7,)),
    Synthetic("zero pixel spacing", lambda: s.stack(PixelSpacing=[0, 0]), slices=()),
    Synthetic("blank UIDs", lambda: s.stack(SOPInstanceUID="", SOPClassUID="", SeriesInstanceUID="")),
    Synthetic("two patients in one series", _two_patients, slices=()),
]


def real_cases(data: Path) -> list[Real]:
    """Return every real series; `failing` ones without an expected volume may be repaired or refused."""
    root = data / "dicom"
    cases = []
    for truth in sorted(root.rglob("*_ground_truth.nii.gz")):
        folder = truth.with_name(truth.name.replace("_ground_truth.nii.gz", ""))
        cases.append(Real(str(folder.relative_to(root)), folder, truth))
    for name in ("gantrytilting/001", "notavolume/001", "sliceincrement/001", "sliceorientation/001"):
        volumes = 2 if name.startswith("sliceorientation") else 1
        cases.append(Real(f"failing/{name}", root / "failing" / name, volumes=volumes))
    for name in ("agfa_enhanced", "brain_mr_study", "ct_jpeg2000"):
        volumes = 4 if name == "brain_mr_study" else 1
        cases.append(Real(name, root / name, volumes=volumes))
    return [case for case in cases if case.folder.is_dir()]


def files_of(folder: Path) -> list[Path]:
    """Return the DICOM files under a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".gz", ".nrrd"))


def _equal(found: Found, truth: Path) -> bool:
    import nibabel

    image = nibabel.load(truth)
    expected = np.asanyarray(image.dataobj)
    if expected.dtype.names:
        expected = np.stack([expected[name] for name in "RGB"], -1)
    one = nibabel.as_closest_canonical(nibabel.Nifti1Image(found[0].astype(np.float64), found[1]))
    two = nibabel.as_closest_canonical(nibabel.Nifti1Image(expected.astype(np.float64), image.affine))
    return (
        one.shape == two.shape
        and np.allclose(one.affine, two.affine, atol=2e-3)
        and np.allclose(one.dataobj, two.dataobj, rtol=1e-5, atol=1e-4)
    )


def _every_pixel_at_its_place(found: list[Found], folder: Path) -> bool:
    """Tell whether each stored plane is found in a volume where it lies, better than one pixel beside that place."""
    from pydicom import dcmread

    frames = 0
    for path in files_of(folder):
        dataset = dcmread(path)
        if dataset.SamplesPerPixel > 1:
            return False  # colours are only compared with an expected volume
        groups = dataset.get("PerFrameFunctionalGroupsSequence")
        pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
        for number, plane in enumerate(pixels):
            place = groups[number].PlanePositionSequence[0] if groups else dataset
            shared = dataset.get("SharedFunctionalGroupsSequence", [{}])[0]
            layers = [groups[number], shared] if groups else []
            directions = next(
                (g.PlaneOrientationSequence[0] for g in layers if "PlaneOrientationSequence" in g), dataset
            )
            measures = next((g.PixelMeasuresSequence[0] for g in layers if "PixelMeasuresSequence" in g), dataset)
            scale = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
            orientation = np.array(directions.ImageOrientationPatient, float)
            y, x = np.indices(plane.shape)
            points = np.array(place.ImagePositionPatient, float) + (
                x[..., None] * orientation[:3] * float(measures.PixelSpacing[1])
                + y[..., None] * orientation[3:] * float(measures.PixelSpacing[0])
            )
            values = plane * scale[0] + scale[1]
            frames += 1
            if not any(_is_there(one, points * [-1, -1, 1], values) for one in found):
                return False
    return frames > 0


def _is_there(found: Found, points: np.ndarray, values: np.ndarray) -> bool:
    from scipy.ndimage import map_coordinates

    array, affine = found
    if abs(np.linalg.det(affine)) < 1e-12:
        return False  # an affine that maps every voxel onto a plane
    inverse = np.linalg.inv(affine)
    places = points @ inverse[:3, :3].T + inverse[:3, 3]
    axis = int(np.argmin(np.ptp(places.reshape(-1, 3), axis=0)))
    beside = np.eye(3)[[other for other in range(3) if other != axis]]
    for volume in np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None]:
        errors = []
        for offset in (np.zeros(3), *beside, *-beside):
            at = np.moveaxis(places + offset, -1, 0)
            sampled = map_coordinates(volume.astype(np.float64), at, order=1, mode="nearest")
            errors.append(float(np.sqrt(np.mean((sampled - values) ** 2))))
        if np.abs(places[..., axis] - np.rint(places[..., axis])).max() < 0.05 and errors[0] < 0.8 * min(errors[1:]):
            return True
    return False
