"""Who and what an image file without a DICOM header belongs to, as far as its name tells."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

_ENDINGS: tuple[str, ...] = (
    ".nii.gz",
    ".nii",
    ".hdr.gz",
    ".hdr",
    ".nrrd",
    ".nhdr",
    ".mha",
    ".mhd",
    ".mgz",
    ".mgh.gz",
    ".mgh",
)
_ENDINGS += (".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff")
_SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_.]|$)")
_SESSION = re.compile(r"(?:^|[/_])(ses-[A-Za-z0-9]+)(?=[/_.]|$)")
#: OpenNeuro's number of a data set: OpenMind holds hundreds of them, each with its own `sub-01`.
_ACCESSION = re.compile(r"(?:^|/)(ds\d{6})(?=/)")
#: Folders of nnU-Net and of the Medical Segmentation Decathlon that hold masks, not images.
LABEL_FOLDERS = frozenset({"labelsTr", "labelsTs", "labelsVal", "labelsTest"})


@dataclass(frozen=True)
class FileIdentity:
    """Private identities of an image file.

    Attributes:
        patient: The subject of BIDS (`sub-...`), within its OpenNeuro data set (`ds000001/`) if it lies in one; else
            the folder, if its name has a number and the file's name begins with it (one folder per patient); else the
            name of the file without nnU-Net's channel number.
        study: The session of BIDS, else the patient.
        series: The path.
        known: Whether the patient is more than a guess.
    """

    patient: tuple[str, ...]
    study: tuple[str, ...]
    series: tuple[str, ...]
    known: bool


def identity_of(label: str, path: str) -> FileIdentity:
    """Return the identities of a file.

    Args:
        label: Name of the source: `sub-01` of two data sets are two people.
        path: Relative to the source.
    """
    subject, session = _SUBJECT.search(path), _SESSION.search(path)
    series = ("file", label, path)
    if subject:
        accession = _ACCESSION.search(path[: subject.start() + 1])
        person = ("subject", label, *(accession.groups() if accession else ()), subject.group(1))
        return FileIdentity(person, (*person, session.group(1) if session else ""), series, True)
    pure = PurePosixPath(path)
    stem = case_of(pure.name)
    parent = pure.parent.name
    folder = str(pure.parent)
    # A folder without a number is a class or a site ("benign/benign_12.png"), not a person.
    numbered = any(letter.isdigit() for letter in parent)
    grouped = numbered and stem.lower().startswith(parent.lower())
    patient: tuple[str, ...] = ("folder", label, folder) if grouped else ("file", label, folder, stem)
    return FileIdentity(patient, patient, series, False)


def stem_of(name: str) -> str:
    """Return a file name without the ending of an image format."""
    lower = name.lower()
    for ending in _ENDINGS:
        if lower.endswith(ending):
            return name[: -len(ending)]
    return name


def case_of(name: str) -> str:
    """Return a file name without ending and without nnU-Net's channel number (`_0000`)."""
    return re.sub(r"_\d{4}$", "", stem_of(name)) or stem_of(name)


def channel_of(name: str) -> str | None:
    """Return nnU-Net's channel number of a file name as in `channel_names` ("0"), or None."""
    match = re.search(r"_(\d{4})$", stem_of(name))
    return str(int(match.group(1))) if match else None


def is_label_file(path: str) -> bool:
    """Tell whether a file lies in a folder of masks, or is one of the masks that OpenMind keeps in `NAME__Data`."""
    pure = PurePosixPath(path)
    beside = pure.parent.name.endswith("__Data") and stem_of(pure.name).endswith("_mask")
    return beside or bool(LABEL_FOLDERS.intersection(pure.parts[:-1]))
