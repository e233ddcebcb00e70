"""Write one series as DICOM files, slice by slice, as a scanner would."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from medssl.demo.phantom import Grid

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0])
TRANSFER_SYNTAXES = {"explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian, "rle": RLELossless}


@dataclass(frozen=True)
class Header:
    """What the files of one series say apart from their pixels.

    Args:
        seed: Seed of the archive; part of every UID.
        patient: Number of the patient.
        study: Number of the study of this patient.
        series: Number of the series in its study.
        modality: "CT" or "MR".
        description: Series description.
        station: Name of the scanner.
        encoding: A key of `TRANSFER_SYNTAXES`.
        stored_offset: Added to the values before they are stored; the rescale intercept is its negative.
        padding: Value outside the field of view, or None.
        tilt_degrees: Tilt of the gantry.
        echo_ms: Echo time of an MR series.
        preamble: Whether the files have DICOM's preamble and meta group.
    """

    seed: int
    patient: int
    study: int
    series: int
    modality: str
    description: str
    station: str
    encoding: str = "explicit"
    stored_offset: int = 0
    padding: int | None = None
    tilt_degrees: float = 0.0
    echo_ms: float = 10.0
    preamble: bool = True

    def uid(self, *what: int | str) -> UID:
        """Return a UID that is a function of the seed and of what it names."""
        return generate_uid(entropy_srcs=["medssl demo", str(self.seed), *map(str, what)])

    @property
    def study_uid(self) -> UID:
        """UID of the study."""
        return self.uid("study", self.patient, self.study)

    @property
    def series_uid(self) -> UID:
        """UID of the series."""
        return self.uid("series", self.patient, self.study, self.series)

    @property
    def accession(self) -> str:
        """A name for the study's folder that says nothing about the patient."""
        return hashlib.sha256(f"{self.seed}|{self.patient}|{self.study}".encode()).hexdigest()[:8].upper()

    def as_series(self, series: int, description: str) -> Header:
        """Return the header of another series of the study."""
        return replace(self, series=series, description=description)


def slice_datasets(header: Header, where: Grid, pixels: np.ndarray) -> list[FileDataset]:
    """Return one data set per slice, in the grid's order.

    Args:
        header: What the series says.
        where: The grid, one affine for all slices; it may be sheared by a tilt.
        pixels: Values before the stored offset. Shape: (Z, Y, X), an integer type.
    """
    affine = LPS_FROM_RAS @ where.affine[:3]
    spacing = np.linalg.norm(affine[:, :3], axis=0)
    across, down = affine[:, 0] / spacing[0], affine[:, 1] / spacing[1]
    normal = np.cross(across, down)
    stored_type = np.int16 if header.modality == "CT" and header.stored_offset == 0 else np.uint16
    datasets = []
    for number, plane in enumerate(pixels):
        position = affine[:, 3] + number * affine[:, 2]
        dataset = new_dataset(
            header, CTImageStorage if header.modality == "CT" else MRImageStorage, header.uid(header.series_uid, number)
        )
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if header.modality == "CT" else "M"]
        dataset.FrameOfReferenceUID = header.uid("frame", header.patient, header.study)
        dataset.PositionReferenceIndicator = ""
        dataset.InstanceNumber = number + 1
        dataset.AcquisitionNumber = 1
        dataset.ImagePositionPatient = [round(float(value), 4) for value in position]
        dataset.ImageOrientationPatient = [round(float(value), 6) for value in (*across, *down)]
        dataset.SliceLocation = round(float(position @ normal), 4)
        dataset.PixelSpacing = [round(float(spacing[1]), 6), round(float(spacing[0]), 6)]
        dataset.SliceThickness = round(float(abs(affine[:, 2] @ normal)), 4)
        _modality_module(dataset, header)
        put_pixels(dataset, (plane.astype(np.int32) + header.stored_offset).astype(stored_type))
        datasets.append(dataset)
    return datasets


def new_dataset(header: Header, sop_class: UID, sop_uid: UID) -> FileDataset:
    """Return a data set with patient, study, series and equipment, and its meta group."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = sop_uid
    meta.TransferSyntaxUID = TRANSFER_SYNTAXES["explicit" if header.encoding == "rle" else header.encoding]
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = sop_uid
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = f"Phantom^Number{header.patient:04d}"
    dataset.PatientID = f"PH{header.patient:05d}"
    dataset.IssuerOfPatientID = "MEDSSL DEMO"
    dataset.PatientBirthDate = f"{1935 + header.patient * 7 % 60}0{1 + header.patient % 9}15"
    dataset.PatientSex = "MF"[header.patient % 2]
    dataset.StudyInstanceUID = header.study_uid
    for event in ("Study", "Series", "Acquisition", "Content"):
        setattr(dataset, f"{event}Date", f"2024{1 + header.patient % 9:02d}11")
        setattr(dataset, f"{event}Time", f"10{header.series % 60:02d}00")
    dataset.StudyID = str(header.study)
    dataset.AccessionNumber = header.accession
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "Trunk"
    dataset.SeriesInstanceUID = header.series_uid
    dataset.SeriesNumber = header.series
    dataset.SeriesDescription = header.description
    dataset.Modality = header.modality
    dataset.BodyPartExamined = "ABDOMEN"
    dataset.PatientPosition = "HFS"
    dataset.Manufacturer = "medssl phantom works"
    dataset.StationName = header.station
    dataset.ManufacturerModelName = header.station
    return dataset


def put_pixels(dataset: Dataset, plane: np.ndarray) -> None:
    """Store a plane (Y, X) of grey values or (Y, X, 3) of colours, with the tags that describe it."""
    dataset.Rows, dataset.Columns = plane.shape[:2]
    dataset.SamplesPerPixel = 1 if plane.ndim == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if plane.ndim == 2 else "RGB"
    if plane.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * plane.dtype.itemsize
    dataset.BitsStored = dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(plane.dtype.kind == "i")
    dataset.PixelData = np.ascontiguousarray(plane).tobytes()
    dataset["PixelData"].VR = "OW" if plane.dtype.itemsize == 2 else "OB"


def save(dataset: FileDataset, path: Path, header: Header) -> None:
    """Write a data set in the series' encoding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if header.encoding == "rle" and "PixelData" in dataset:
        dataset.compress(RLELossless, generate_instance_uid=False)
    if header.preamble:
        dataset.save_as(path, enforce_file_format=True)
        return
    options: dict[str, Any] = {"implicit_vr": True, "little_endian": True, "enforce_file_format": False}
    bare = Dataset(dataset)
    bare.save_as(path, **options)


def _modality_module(dataset: Dataset, header: Header) -> None:
    if header.modality == "CT":
        dataset.RescaleIntercept = -header.stored_offset
        dataset.RescaleSlope = 1
        dataset.RescaleType = "HU"
        dataset.KVP = 120
        dataset.WindowCenter, dataset.WindowWidth = 40, 400
        if header.tilt_degrees:
            dataset.GantryDetectorTilt = header.tilt_degrees
        if header.padding is not None:
            dataset.add_new(
                "PixelPaddingValue", "SS" if header.stored_offset == 0 else "US", header.padding + header.stored_offset
            )
        return
    dataset.ScanningSequence = "SE"
    dataset.SequenceVariant = "NONE"
    dataset.MRAcquisitionType = "2D"
    dataset.EchoTime = header.echo_ms
    dataset.RepetitionTime = 600 if header.echo_ms < 30 else 3500
    dataset.MagneticFieldStrength = 1.5
