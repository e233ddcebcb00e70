"""Real series for `archive_peers.py` and their judge; the synthetic cases are those of `tests/defects`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.defects.truth import Found


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
