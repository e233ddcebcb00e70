"""What a DICOM object that is derived from a volume copies from its source: identifiers, patient and study, geometry.

The one place where identity leaves `archive/`: into a DICOM object of the same patient and study, and nothing else.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from medssl.archive.dicom.header import read_header
from medssl.archive.dicom.model import DicomVolume
from medssl.archive.dicom.reading import open_header, quiet
from medssl.archive.find import absolute
from medssl.archive.tasks import VolumeTask
from medssl.errors import InputRefused

#: Type 1 in the derived object, or what its viewers find the source by.
_IDENTIFIERS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_PATIENT_AND_STUDY = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
)
#: Type 2: present, perhaps without a value.
_MAY_BE_EMPTY = frozenset(_PATIENT_AND_STUDY) - {"IssuerOfPatientID", "PatientAge", "StudyDescription"}
_IMAGE = (
    "Modality",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "PositionReferenceIndicator",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
    "NumberOfFrames",
)
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_GEOMETRY = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence")
_WANTED = ("SpecificCharacterSet", *_IDENTIFIERS, *_PATIENT_AND_STUDY, *_IMAGE, *_GROUPS)
_TAGS = sorted(tag for name in _WANTED if (tag := tag_for_keyword(name)) is not None)
_FORMS = {
    "PatientSex": re.compile(r"[MFO]"),
    "PatientAge": re.compile(r"\d{3}[DWMY]"),
    "StudyTime": re.compile(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?"),
}


def read_reference(task: VolumeTask) -> list[str]:
    """Return the images that an object derived from a volume names as its source; call it in a process with limits.

    Values of a wrong form (a date that is none, a sex other than M, F or O) are left empty, as the standard wants.

    Args:
        task: The volume; every slice of it must be an image or a frame of one multi-frame image.

    Returns:
        DICOM JSON of each slice's image in the order of z, or of the one multi-frame image. Text is Unicode.

    Raises:
        InputRefused: With `source_not_dicom`, `source_uids_missing` or `source_not_referable`.
    """
    if task.kind != "dicom":
        raise InputRefused("source_not_dicom", f"a file of the format {task.kind}")
    plan = DicomVolume.from_json(task.plan)
    root = Path(task.root)
    if plan.geometry != "regular" or any(file < 0 for file, _ in plan.slices):
        raise InputRefused("source_not_referable", f"the geometry is {plan.geometry}: its grid is not the source's")
    if plan.channels != "scalar":
        raise InputRefused("source_not_referable", f"{plan.shape[0]} {plan.channels}")
    paths = [absolute(root, path) for path in plan.paths]
    headers = [read_header(path) for path in paths]
    if any(header.tiles for header in headers):
        raise InputRefused("source_not_referable", "the slices are tiles of a mosaic")
    multi = any(header.frame_count > 1 or header.frames[0].number for header in headers)
    if multi and len(paths) > 1:
        raise InputRefused("source_not_referable", f"the slices lie in {len(paths)} multi-frame images")
    if len(set(plan.slices)) != len(plan.slices):
        raise InputRefused("source_not_referable", "one image gives several slices")
    images = [_image(path) for path in paths]
    return [images[0]] if multi else [images[file] for file, _ in plan.slices]


def _image(path: Path) -> str:
    opened = open_header(path, _TAGS)
    try:
        with quiet():
            image = _copied(opened.dataset)
            missing = [name for name in _IDENTIFIERS if not str(image.get(name, "") or "").strip()]
            text: str = image.to_json()
    except Exception as error:  # noqa: BLE001  (damaged elements raise many kinds, whose messages quote values)
        raise InputRefused("dicom_invalid", type(error).__name__) from None
    if missing:
        raise InputRefused("source_uids_missing", f"no {', '.join(missing)}")
    return text


def _copied(source: Dataset) -> Dataset:
    image = Dataset()
    for name in (*_IDENTIFIERS, *_PATIENT_AND_STUDY, *_IMAGE):
        value = source.get(name)
        if value is None or str(value).strip() == "":
            if name in _MAY_BE_EMPTY:
                setattr(image, name, "")
            continue
        setattr(image, name, value if _has_form(name, str(value)) else "")
    for name in _GROUPS:
        if name in source:
            setattr(image, name, [_geometry(item) for item in source[name].value])
    return image


def _geometry(item: Dataset) -> Dataset:
    kept = Dataset()
    for name in _GEOMETRY:
        if name in item:
            setattr(kept, name, item[name].value)
    return kept


def _has_form(name: str, value: str) -> bool:
    if name in ("PatientBirthDate", "StudyDate"):
        try:
            return len(value) == 8 and bool(date(int(value[:4]), int(value[4:6]), int(value[6:])))
        except ValueError:
            return False
    form = _FORMS.get(name)
    return form is None or form.fullmatch(value) is not None
