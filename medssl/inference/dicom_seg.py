"""Masks as DICOM SEG: binary, on the grid of the source, each frame naming the image it belongs to.

A SEG belongs to a patient's study. It therefore carries what its source says of patient and study: it is the only
output of medssl that does, and is meant for the archive where the source lies. Names of files, tables, logs and
messages stay free of it.

highdicom (Bridge et al., Journal of Digital Imaging 2022) builds the file in memory, beside the mask and outside
`--memory-mb`: for a volume of which every voxel is labelled 1.5 bytes a voxel with one label, 4.5 with ten, and 20 with
ten regions that overlap (tracemalloc, 120 x 256 x 256 voxels).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl import __version__
from medssl.archive.dicom.reference import read_reference
from medssl.archive.load import SeriesFound
from medssl.archive.sandbox import run_limited
from medssl.errors import InputRefused
from medssl.files import atomic_path
from medssl.inference.segment_codes import Concept, SegmentCode, SegmentCodes

Array = npt.NDArray[Any]
ENDING = ".dcm"
SERIES_DESCRIPTION = "RESEARCH USE - not for diagnosis"
#: High, so as not to meet a number that the scanner gave within the study.
SERIES_NUMBER = 1000


@dataclass(frozen=True)
class Algorithm:
    """Who made a mask.

    Args:
        name: Of the algorithm, at most 64 characters.
        sha256: SHA-256 of each checkpoint file of the model, by fold.
    """

    name: str
    sha256: Mapping[str, str]

    @property
    def model_hash(self) -> str:
        """The checkpoint's SHA-256; of several folds the SHA-256 over theirs in order of the folds."""
        hashes = [digest for _, digest in sorted(self.sha256.items())]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def version(self) -> str:
        """Version of medssl and the beginning of the model's hash; the whole hash does not fit into DICOM's field."""
        return f"{__version__}+model.{self.model_hash[:16]}"


@dataclass(frozen=True)
class SourceImages:
    """The images that a mask's frames refer to.

    Args:
        images: pydicom data sets without pixels: one for each slice in the order of z, or one multi-frame image.
    """

    images: tuple[Any, ...]

    @classmethod
    def of(cls, series: SeriesFound | None) -> SourceImages:
        """Read the headers of a series in a process with limits.

        Raises:
            InputRefused: If it is no DICOM series, or one that a SEG cannot refer to.
        """
        from pydicom.dataset import Dataset

        if series is None:
            raise InputRefused("source_not_dicom", "no DICOM series")
        return cls(tuple(Dataset.from_json(text) for text in run_limited(read_reference, series.task)))

    @property
    def multi_frame(self) -> bool:
        """Whether it is one multi-frame image."""
        return len(self.images) == 1 and "PerFrameFunctionalGroupsSequence" in self.images[0]


def write_seg(
    path: Path,
    mask: Array,
    affine: npt.NDArray[np.float64],
    source: SourceImages,
    labels: Mapping[str, tuple[int, ...]],
    codes: SegmentCodes,
    algorithm: Algorithm,
    *,
    empty_frames: bool = False,
) -> None:
    """Write labels as a binary DICOM SEG, whole or not at all.

    Every label is described, also one without a voxel. A mask without any voxel gets all frames, each empty, since a
    DICOM image cannot be without frames.

    Args:
        path: Ends in `.dcm`.
        mask: Labels on the source's stored grid. Shape: (Z, Y, X), unsigned integers.
        affine: Maps voxel (x, y, z) to RAS mm. Shape: (4, 4).
        source: Images of the slices.
        labels: Values of the mask that make up each segment, by name; values may belong to several.
        codes: Tables of codes.
        algorithm: Who made the mask.
        empty_frames: Write a frame for each segment and slice, also where it is empty.

    Raises:
        InputRefused: If no valid SEG can be made of the source's headers.
        MedsslError: If the disk is full.
        ValueError: If the mask's slices are not those of the source.
    """
    if not source.multi_frame and len(source.images) != mask.shape[0]:
        raise ValueError(f"a mask of {mask.shape[0]} slices does not belong to {len(source.images)} images")
    with _silent(), atomic_path(path) as temporary:
        try:
            _build(mask, affine, source, labels, codes, algorithm, empty_frames).save_as(
                temporary, enforce_file_format=True
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  (highdicom and pydicom raise many kinds, and quote values)
            raise InputRefused("seg_not_written", type(error).__name__) from None


def _build(
    mask: Array,
    affine: npt.NDArray[np.float64],
    source: SourceImages,
    labels: Mapping[str, tuple[int, ...]],
    codes: SegmentCodes,
    algorithm: Algorithm,
    empty_frames: bool,
) -> Any:
    from highdicom.seg import Segmentation
    from pydicom.uid import generate_uid

    pixels = _segments(mask, labels)
    segmentation = Segmentation(
        source_images=_with_distances(source, affine),
        pixel_array=_volume(pixels, affine, source) if source.multi_frame else pixels,
        segmentation_type="BINARY",
        segment_descriptions=_descriptions(list(labels), codes, algorithm),
        series_instance_uid=generate_uid(prefix=None),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="medssl",
        manufacturer_model_name="medssl predict",
        software_versions=__version__,
        device_serial_number=algorithm.model_hash,
        content_label="SEGMENTATION",
        content_description=SERIES_DESCRIPTION,
        omit_empty_frames=bool(pixels.any()) and not empty_frames,
        series_description=SERIES_DESCRIPTION,
        specific_character_set="ISO_IR 192",
    )
    for name in ("IssuerOfPatientID", "StudyDescription"):
        if name in source.images[0]:
            setattr(segmentation, name, source.images[0][name].value)
    return segmentation


@contextmanager
def _silent() -> Iterator[None]:
    """Keep pydicom and highdicom from logging or warning of values, which name the patient."""
    from medssl.archive.dicom.reading import quiet

    loud = logging.getLogger("highdicom")
    before = loud.level
    loud.setLevel(logging.CRITICAL + 1)  # holds for the loggers below it, which `disabled` would not
    try:
        with quiet():
            yield
    finally:
        loud.setLevel(before)


def described(labels: Sequence[str], codes: SegmentCodes) -> dict[str, dict[str, Any]]:
    """Return for each label what it is called in codes, in plain types."""
    found = {}
    for label in labels:
        code = codes.of(label)
        parts = {"category": code.category, "type": code.type, "side": code.side}
        found[label] = {
            **{name: None if part is None else list(vars(part).values()) for name, part in parts.items()},
            "known": code.known,
        }
    return found


def _segments(mask: Array, labels: Mapping[str, tuple[int, ...]]) -> Array:
    """Return segment numbers (Z, Y, X) where no value is in two segments, else one plane for each: (Z, Y, X, S)."""
    members = [value for values in labels.values() for value in values]
    kind = np.uint8 if len(labels) < 256 else np.uint16
    if len(set(members)) == len(members):
        numbers = np.zeros(max(int(mask.max()), *members) + 1, kind)
        for number, values in enumerate(labels.values(), 1):
            numbers[list(values)] = number
        return np.ascontiguousarray(numbers[mask])
    return np.stack([np.isin(mask, values) for values in labels.values()], -1).astype(np.uint8)


def _volume(pixels: Array, affine: npt.NDArray[np.float64], source: SourceImages) -> Any:
    """Place the pixels by the grid itself: a multi-frame image may list its frames in any order."""
    from highdicom import ChannelDescriptor, Volume

    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    lps = lps[:, [2, 1, 0, 3]]  # highdicom counts slice, row, column
    channels: Any = {ChannelDescriptor("SegmentNumber"): range(1, pixels.shape[3] + 1)} if pixels.ndim == 4 else None
    return Volume(
        pixels,
        lps,
        "PATIENT",
        frame_of_reference_uid=str(source.images[0].FrameOfReferenceUID),
        channels=channels,
    )


def _with_distances(source: SourceImages, affine: npt.NDArray[np.float64]) -> list[Any]:
    """Return the images with slices as far apart as they lie, whatever they say; as thick as told, if it is told.

    highdicom copies both into the SEG.
    """
    if source.multi_frame:
        return list(source.images)
    between = round(float(np.linalg.norm(affine[:3, 2])), 6)
    images = [copy(image) for image in source.images]
    for image in images:
        image.SpacingBetweenSlices = between
        image.SliceThickness = image.get("SliceThickness") or between
    return images


def _descriptions(labels: Sequence[str], codes: SegmentCodes, algorithm: Algorithm) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes as standard

    made_by = AlgorithmIdentificationSequence(
        name=algorithm.name,
        family=standard.cid7162.ArtificialIntelligence,
        version=algorithm.version,
        source="medssl",
        parameters={"sha256": algorithm.model_hash, **{f"sha256 {k}": v for k, v in sorted(algorithm.sha256.items())}},
    )
    result = []
    for number, label in enumerate(labels, 1):
        code = codes.of(label)
        description = SegmentDescription(
            segment_number=number,
            segment_label=label.replace("\\", "/")[:64],
            segmented_property_category=_coded(code.category),
            segmented_property_type=_coded(code.type),
            algorithm_type="AUTOMATIC",
            algorithm_identification=made_by,
        )
        _add_side(description, code)
        result.append(description)
    return result


def _add_side(description: Any, code: SegmentCode) -> None:
    if code.side is not None:
        item = description.SegmentedPropertyTypeCodeSequence[0]
        item.SegmentedPropertyTypeModifierCodeSequence = [_coded(code.side)]


def _coded(concept: Concept) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(concept.value, concept.scheme, concept.meaning)
