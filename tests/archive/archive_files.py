"""Small files of every kind, written for the tests of the archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

Array = np.ndarray


def voxels(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.int16) -> Array:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(dtype)


def write_nifti(path: Path, shape: tuple[int, ...] = (7, 6, 5), seed: int = 0, dtype: Any = np.int16) -> Path:
    """Write an oblique-free LPS image with unequal voxel sizes. `shape` is (x, y, z[, t])."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.8, -0.9, 2.5, 1.0])
    affine[:3, 3] = 10, 20, -30
    nib.save(nib.Nifti1Image(voxels(shape, seed, dtype), affine), path)
    return path


def patch(path: Path, offset: int, content: bytes) -> Path:
    """Overwrite bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


def write_series(
    folder: Path,
    *,
    slices: int = 4,
    patient: str = "P1",
    name: str = "Doe^Jane",
    birth: str = "19700101",
    series: str = "1.2.3.4",
    study: str = "1.2.3",
    seed: int = 0,
    size: int = 16,
    prefix: str = "I",
    **more: Any,
) -> list[Path]:
    """Write an axial CT series; `more` are attributes set on every file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series}.{number + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{prefix}{number:04d}"
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{series}.{number + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, f"{study}.9"
        ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient, name, birth, "F"
        ds.Modality, ds.ImageType, ds.InstanceNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], number + 1
        ds.BodyPartExamined = "CHEST"
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [0.7, 0.7], 2
        ds.Rows = ds.Columns = size
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        ds.PixelData = voxels((size, size), 100 * seed + number).tobytes()
        for keyword, value in more.items():
            setattr(ds, keyword, value)
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        paths.append(path)
    return paths
