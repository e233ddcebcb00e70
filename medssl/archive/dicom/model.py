"""Plain-typed facts of DICOM files and of the volumes made of them; all of it stays inside `archive/`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any

Vector = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """One image plane of a file.

    Attributes:
        number: Index of the frame or mosaic tile in its file, from 0.
        position: Centre of the first voxel in LPS mm; empty where absent.
        orientation: Direction cosines of a row, then of a column; empty where absent.
        spacing: Distance of rows, then of columns, in mm; empty where absent.
        slope: Rescale slope.
        intercept: Rescale intercept.
        unit: What the rescaled values are (`HU`, `US` for unspecified, ...); empty where no rescale is given.
        kind: Image type of the frame: frames of different kinds are different volumes.
        stack: Stack ID of an enhanced image.
        labels: What may set frames at one place apart: name to number.
    """

    number: int
    position: Vector = ()
    orientation: Vector = ()
    spacing: Vector = ()
    slope: float = 1.0
    intercept: float = 0.0
    unit: str = ""
    kind: str = ""
    stack: str = ""
    labels: tuple[tuple[str, float], ...] = ()

    def with_label(self, name: str, value: float) -> Frame:
        """Return the frame with one more label."""
        return replace(self, labels=(*self.labels, (name, value)))


@dataclass(frozen=True, slots=True)
class Pet:
    """What SUVbw is computed from. Times are intervals in seconds, never dates.

    Attributes:
        units: `BQML`, `GML`, `CNTS`, ...
        suv_type: `BW` and others where units are g/ml.
        correction: `START`, `ADMIN` or `NONE`.
        corrected: Attenuation and decay are corrected.
        factor: Grams of body weight per becquerel injected; 0 where unknown.
        half_life: Seconds; 0 where unknown.
        series_after_injection: Start of the series after the injection; None where unknown.
        acquisition_after_injection: Start of this image's acquisition after the injection; None where unknown.
    """

    units: str
    suv_type: str
    correction: str
    corrected: bool
    factor: float
    half_life: float
    series_after_injection: float | None
    acquisition_after_injection: float | None


@dataclass(frozen=True, slots=True)
class DicomHeader:
    """What grouping and decoding need of one file.

    Attributes:
        path: As given to `read_header`.
        related: Kind of an object that is no volume, else empty.
        problem: Code and detail of what forbids the file to be used, else empty.
        person: Digests of birth date, sex and parts of the name, only to tell two patients with one ID apart.
        picture: A 2D image or moving picture without a place in the patient.
        tiles: Tiles in a row of a mosaic; 0 for an ordinary image.
        pixel_length: Declared bytes of the pixels, -1 if compressed.
        references: UIDs of the series that a segmentation or structure set belongs to.
    """

    path: str
    size: int = 0
    related: str = ""
    problem: tuple[str, ...] = ()
    modality: str = "OT"
    sop_class: str = ""
    sop_uid: str = ""
    series_uid: str = ""
    study_uid: str = ""
    frame_uid: str = ""
    patient_id: str = ""
    issuer: str = ""
    person: tuple[str, ...] = ()
    transfer_syntax: str = ""
    series_number: int | None = None
    rows: int = 0
    columns: int = 0
    samples: int = 1
    photometric: str = ""
    bits_allocated: int = 16
    bits_stored: int = 16
    high_bit: int = 15
    signed: bool = False
    frame_count: int = 1
    padding: int | None = None
    padding_limit: int | None = None
    thickness: float | None = None
    between: float | None = None
    kernel: str = ""
    body_part: str = ""
    picture: bool = False
    tiles: int = 0
    pixel_length: int = 0
    flags: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    pet: Pet | None = None
    frames: tuple[Frame, ...] = ()

    @property
    def series_key(self) -> str:
        """Return the text by which the files of one series sort together.

        The patient is left out on purpose: a series with images of two patients must be seen as one to be refused.
        Where the series UID is blank, the folder and what describes a series take its place.
        """
        if self.series_uid:
            return f"{self.study_uid}|{self.series_uid}"
        folder = str(PurePath(self.path).parent)
        return f"{self.study_uid}|?|{self.patient_id}|{folder}|{self.modality}|{self.series_number}"

    @property
    def colour(self) -> bool:
        """Tell whether the pixels are colours once decoded."""
        return self.samples == 3 or self.photometric == "PALETTE COLOR"

    def to_json(self) -> str:
        """Return the header as compact JSON."""
        values: list[Any] = [getattr(self, name) for name in _HEADER_FIELDS]
        values[-2] = None if self.pet is None else [getattr(self.pet, name) for name in _PET_FIELDS]
        values[-1] = [[getattr(frame, name) for name in _FRAME_FIELDS] for frame in self.frames]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> DicomHeader:
        """Return the header that `to_json` wrote."""
        values = json.loads(text)
        pet, frames = values[-2], values[-1]
        facts: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in zip(_HEADER_FIELDS[:-2], values[:-2], strict=True)
        }
        planes = tuple(_frame(frame) for frame in frames)
        return cls(**facts, pet=None if pet is None else Pet(*pet), frames=planes)


_HEADER_FIELDS = tuple(field.name for field in fields(DicomHeader))
_FRAME_FIELDS = tuple(field.name for field in fields(Frame))
_PET_FIELDS = tuple(field.name for field in fields(Pet))


def _frame(values: list[Any]) -> Frame:
    number, position, orientation, spacing, slope, intercept, unit, kind, stack, labels = values
    return Frame(
        number,
        tuple(position),
        tuple(orientation),
        tuple(spacing),
        slope,
        intercept,
        unit,
        kind,
        stack,
        tuple((name, value) for name, value in labels),
    )


@dataclass(frozen=True)
class DicomVolume:
    """A volume as planned from headers: which planes of which files, on which grid.

    Attributes:
        paths: Files in the order of first use.
        slices: For each (c, z), c slowest: index into `paths` and frame number; (-1, -1) is interpolated.
        shape: (C, Z, Y, X) of the result.
        affine: Rows of the 4 x 4 matrix from (x, y, z) to RAS mm.
        spacing_mm: (z, y, x).
        channels: `scalar`, `frames` or `colour`.
        geometry: `regular`, `picture` or a repair.
        flags: Known before decoding; decoding may add some.
        shifts: Offset in voxels (x, y) of each slice on a tilt-resampled grid; empty otherwise.
        scale: Factor on the rescaled values: SUVbw per Bq/ml, 1 elsewhere.
        stored_size: Rows and columns of the stored planes.
    """

    paths: tuple[str, ...]
    slices: tuple[tuple[int, int], ...]
    shape: tuple[int, int, int, int]
    affine: tuple[tuple[float, ...], ...]
    spacing_mm: tuple[float, float, float]
    modality: str
    channels: str
    geometry: str
    flags: tuple[str, ...] = ()
    body_part: str = ""
    shifts: tuple[tuple[float, float], ...] = ()
    scale: float = 1.0
    stored_size: tuple[int, int] = (0, 0)
    patient_id: str = ""
    issuer: str = ""
    person: tuple[str, ...] = ()
    study_uid: str = ""
    series_uid: str = ""
    frame_uid: str = ""
    series_key: str = ""

    @property
    def frames(self) -> int:
        """Return the number of time points, echoes or directions; 1 for a colour image."""
        return self.shape[0] if self.channels == "frames" else 1

    def to_json(self) -> str:
        """Return the plan as compact JSON."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> DicomVolume:
        """Return the plan that `to_json` wrote."""
        return cls(**{name: _tuples(value) for name, value in json.loads(text).items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
