"""Write small DICOM series whose voxels tell where they lie: every value is a linear function of its place.

`field` gives the true value at any point of the patient; a volume is right, in order, position, spacing, orientation
and rescale at once, if each voxel has the value of the point to which the affine maps it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from medssl.archive.volume import Volume

CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"
MR_CLASS = "1.2.840.10008.5.1.4.1.1.4"
PET_CLASS = "1.2.840.10008.5.1.4.1.1.128"
ENHANCED_CT_CLASS = "1.2.840.10008.5.1.4.1.1.2.1"
ENHANCED_MR_CLASS = "1.2.840.10008.5.1.4.1.1.4.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
ROWS, COLUMNS, SPACING = 12, 16, (0.9, 1.3)
SLOPE, INTERCEPT = 0.1, -1024.0
#: Half of the stored values' step.
QUANTUM = SLOPE / 2 + 1e-3


def field(points: np.ndarray) -> np.ndarray:
    """Return the value at points in RAS mm. Shape: (..., 3) to (...)."""
    return points @ np.array([1.0, 2.0, 3.0]) + 20.0


def uid(*parts: object) -> str:
    """Return the same UID for the same parts."""
    return generate_uid(entropy_srcs=[str(part) for part in parts])


def tilted(degrees: float) -> tuple[float, ...]:
    """Return axial directions turned about the x axis."""
    angle = np.radians(degrees)
    return (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(np.sin(angle)))


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """Return the direction in which slices follow each other."""
    return np.cross(orientation[:3], orientation[3:])


def plane_values(
    position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float], rows: int, columns: int
) -> np.ndarray:
    """Return the true values of one plane. Shape: (rows, columns)."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    y, x = np.mgrid[:rows, :columns]
    points = np.array(position) + x[..., None] * spacing[1] * row + y[..., None] * spacing[0] * column
    return field(points * np.array([-1, -1, 1]))


def stored(values: np.ndarray, slope: float = SLOPE, intercept: float = INTERCEPT) -> np.ndarray:
    """Return what a file stores for values."""
    return np.rint((values - intercept) / slope)


def base(series: str = "1", modality: str = "CT", **overrides: Any) -> FileDataset:
    """Return a data set without pixels and place."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = {"CT": CT_CLASS, "PT": PET_CLASS}.get(modality, MR_CLASS)
    dataset.Modality = modality
    dataset.PatientID, dataset.PatientName = "P1", "Doe^Jane"
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "F"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid("series", series)
    dataset.FrameOfReferenceUID = uid("frame of reference")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SeriesNumber = 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    for name, value in overrides.items():
        put(dataset, name, value)
    return dataset


def put(dataset: Dataset, name: str, value: Any) -> None:
    """Set an element, or remove it where the value is None."""
    if value is None:
        if name in dataset:
            del dataset[name]
    else:
        setattr(dataset, name, value)


def image(
    position: Sequence[float],
    number: int,
    *,
    orientation: Sequence[float] = AXIAL,
    spacing: Sequence[float] = SPACING,
    rows: int = ROWS,
    columns: int = COLUMNS,
    slope: float = SLOPE,
    intercept: float = INTERCEPT,
    add: float = 0.0,
    series: str = "1",
    modality: str = "CT",
    **overrides: Any,
) -> FileDataset:
    """Return one slice whose values are those of its place, plus `add`."""
    dataset = base(series, modality)
    dataset.SOPInstanceUID = uid("image", series, number, *position, add)
    dataset.InstanceNumber = number
    dataset.Rows, dataset.Columns = rows, columns
    dataset.PixelSpacing = list(spacing)
    dataset.ImagePositionPatient = [round(float(part), 6) for part in position]
    dataset.ImageOrientationPatient = [float(part) for part in orientation]
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    values = plane_values(position, orientation, spacing, rows, columns) + add
    dataset.PixelData = stored(values, slope, intercept).astype("<u2").tobytes()
    for name, value in overrides.items():
        put(dataset, name, value)
    return dataset


def stack(
    count: int = 12,
    *,
    step: float = 2.0,
    origin: Sequence[float] = (-10.0, -20.0, 30.0),
    orientation: Sequence[float] = AXIAL,
    direction: Sequence[float] | None = None,
    **settings: Any,
) -> list[FileDataset]:
    """Return the slices of a regular series; `direction` other than the normal tilts the gantry."""
    along = normal_of(orientation) if direction is None else np.asarray(direction, float)
    return [
        image(np.array(origin) + along * step * number, number + 1, orientation=orientation, **settings)
        for number in range(count)
    ]


def enhanced(
    planes: Iterable[FileDataset], change: Callable[[Dataset, int], None] | None = None, **overrides: Any
) -> FileDataset:
    """Return planes as one enhanced multi-frame image, frames in the given order.

    Args:
        planes: Slices from `image`.
        change: Called with each per-frame item and its number, to add or damage groups.
        **overrides: Elements of the top level.
    """
    planes = list(planes)
    first = planes[0]
    dataset = base(modality=first.Modality)
    dataset.SOPClassUID = ENHANCED_CT_CLASS if first.Modality == "CT" else ENHANCED_MR_CLASS
    dataset.SeriesInstanceUID, dataset.SOPInstanceUID = first.SeriesInstanceUID, uid("enhanced", first.SOPInstanceUID)
    dataset.InstanceNumber, dataset.NumberOfFrames = 1, len(planes)
    dataset.Rows, dataset.Columns = first.Rows, first.Columns
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = first.PixelSpacing
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([orientation])
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    items = []
    for number, plane in enumerate(planes):
        item, content, place, rescale = Dataset(), Dataset(), Dataset(), Dataset()
        content.FrameAcquisitionNumber = 1
        place.ImagePositionPatient = plane.ImagePositionPatient
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = (
            plane.RescaleSlope,
            plane.RescaleIntercept,
            "HU",
        )
        item.FrameContentSequence, item.PlanePositionSequence = Items([content]), Items([place])
        item.PixelValueTransformationSequence = Items([rescale])
        if change is not None:
            change(item, number)
        items.append(item)
    dataset.PerFrameFunctionalGroupsSequence = Items(items)
    dataset.PixelData = b"".join(plane.PixelData for plane in planes)
    for name, value in overrides.items():
        put(dataset, name, value)
    return dataset


def csa_header(**numbers: Sequence[float]) -> bytes:
    """Return a Siemens CSA header (SV10) with numeric elements."""
    content = b"SV10\4\3\2\1" + struct.pack("<II", len(numbers), 77)
    for name, values in numbers.items():
        content += name.encode().ljust(64, b"\0") + struct.pack("<i4siii", len(values), b"FD\0\0", 4, len(values), 77)
        for value in values:
            text = f"{value:.8f}".encode() + b"\0"
            content += struct.pack("<4i", len(text), len(text), 77, len(text)) + text.ljust(
                -(-len(text) // 4) * 4, b"\0"
            )
    return content


def mosaic(planes: Sequence[FileDataset], *, time: int = 1, normal: Sequence[float] | None, step: float) -> FileDataset:
    """Return slices as one Siemens mosaic; `normal` None leaves the CSA header out."""
    first, count = planes[0], len(planes)
    tiles = int(np.ceil(np.sqrt(count)))
    rows, columns = first.Rows, first.Columns
    canvas = np.zeros((rows * tiles, columns * tiles), "<u2")
    for number, plane in enumerate(planes):
        down, across = divmod(number, tiles)
        canvas[down * rows : (down + 1) * rows, across * columns : (across + 1) * columns] = np.frombuffer(
            plane.PixelData, "<u2"
        ).reshape(rows, columns)
    result = image(first.ImagePositionPatient, time, orientation=first.ImageOrientationPatient, modality="MR")
    row, column = np.array(first.ImageOrientationPatient[:3]), np.array(first.ImageOrientationPatient[3:])
    corner = (
        np.array(first.ImagePositionPatient)
        - row * SPACING[1] * (columns * tiles - columns) / 2
        - column * SPACING[0] * (rows * tiles - rows) / 2
    )
    result.ImagePositionPatient = [float(part) for part in corner]
    result.SOPInstanceUID = uid("mosaic", time)
    result.Rows, result.Columns = canvas.shape
    result.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    result.SpacingBetweenSlices, result.AcquisitionNumber = step, time
    result.PixelData = canvas.tobytes()
    block = result.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0A, "US", count)
    if normal is not None:
        block = result.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", csa_header(SliceNormalVector=normal, NumberOfImagesInMosaic=[count]))
    return result


def write(folder: Path, datasets: Iterable[FileDataset], *, name: str = "{:03d}", preamble: bool = True) -> list[Path]:
    """Write data sets as files without extension and return their paths; without preamble the file meta goes too."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, dataset in enumerate(datasets):
        path = folder / name.format(number)
        dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or UID("1.2")
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or UID("1.2.3")
        dcmwrite(path, dataset, enforce_file_format=True)
        if not preamble:
            content = path.read_bytes()
            path.write_bytes(content[content.index(b"\x08\x00\x08\x00CS") :])
        paths.append(path)
    return paths


def world_error(volume: Volume, channel: int = 0, add: float = 0.0) -> float:
    """Return the largest difference of a volume from the true values at the places its affine gives."""
    z, y, x = np.mgrid[: volume.shape[1], : volume.shape[2], : volume.shape[3]]
    points = np.stack([x, y, z], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return float(np.abs(volume.array[channel] - field(points) - add).max())
