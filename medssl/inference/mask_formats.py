"""The forms in which masks are written: NIfTI, or DICOM SEG beside the series they were made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medssl.errors import UsageError, unknown_name
from medssl.inference.cases import Case
from medssl.inference.dicom_seg import ENDING, Algorithm, SourceImages, described, write_seg
from medssl.inference.grid import Grid, write_mask
from medssl.inference.model import SegmentationModel
from medssl.inference.segment_codes import SegmentCodes, read_codes

FORMATS = ("nifti", "dicom-seg")
ALGORITHM = "medssl predict"
#: Writes a mask (Z, Y, X in the reader's axes, RAS+ or not) of a grid into a folder and returns the file's name.
Write = Callable[[Path, np.ndarray[Any, Any], Grid, bool], str]


class MaskFormat(Protocol):
    """One form of masks."""

    def check(self, cases: Sequence[Case], where: Path) -> None:
        """Raise `UsageError` if none of the cases can be written."""

    def facts(self, model: SegmentationModel) -> dict[str, Any]:
        """Return what `predictions.json` says of the form."""

    def writer(self, case: Case, model: SegmentationModel) -> Write:
        """Return what writes the mask of a case; raise `InputRefused` before anything is predicted in vain."""


class Nifti:
    """`<case>.nii.gz` with shape and affine of the source."""

    def check(self, cases: Sequence[Case], where: Path) -> None:
        """Every case can be written."""

    def facts(self, model: SegmentationModel) -> dict[str, Any]:
        """Return nothing: labels and values stand there already."""
        return {}

    def writer(self, case: Case, model: SegmentationModel) -> Write:
        """Return what writes the mask of a case."""

        def write(out: Path, mask: np.ndarray[Any, Any], grid: Grid, reorient: bool) -> str:
            name = f"{case.name}.nii.gz"
            write_mask(out / name, mask, grid, reorient)
            return name

        return write


@dataclass(frozen=True)
class DicomSeg:
    """`<case>.dcm`, a binary DICOM SEG.

    Args:
        codes: Tables of codes for labels.
        empty_frames: Write also frames without content.
    """

    codes: SegmentCodes
    empty_frames: bool = False

    def check(self, cases: Sequence[Case], where: Path) -> None:
        """Refuse an input of which nothing is a DICOM series.

        Raises:
            UsageError: If there is none.
        """
        if cases and not any(case.series is not None and case.series.task.kind == "dicom" for case in cases):
            raise UsageError(
                f"--format dicom-seg needs DICOM series, and {where} holds none: a SEG belongs to a patient's study. "
                "Give the folder of the series, or use --format nifti."
            )

    def facts(self, model: SegmentationModel) -> dict[str, Any]:
        """Return the codes of the labels; `known` is false where a name is in no table."""
        return {"segments": described(list(model.label_values), self.codes)}

    def writer(self, case: Case, model: SegmentationModel) -> Write:
        """Return what writes the SEG of a case.

        Raises:
            InputRefused: If a SEG cannot refer to its images.
        """
        source = SourceImages.of(case.series)
        algorithm = Algorithm(ALGORITHM, model.sha256)

        def write(out: Path, mask: np.ndarray[Any, Any], grid: Grid, reorient: bool) -> str:
            name = f"{case.name}{ENDING}"
            write_seg(
                out / name,
                grid.stored_view(mask, reorient).transpose(2, 1, 0),
                grid.affine,
                source,
                model.label_values,
                self.codes,
                algorithm,
                empty_frames=self.empty_frames,
            )
            return name

        return write


def mask_format(name: str, codes: Path | None = None, empty_frames: bool = False) -> MaskFormat:
    """Return a form of masks by its name.

    Raises:
        UsageError: If there is no such form, an option belongs to another one, or the file of codes cannot be used.
    """
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS)
    if name == "dicom-seg":
        return DicomSeg(read_codes(codes), empty_frames)
    if codes is not None or empty_frames:
        raise UsageError("--codes and --empty-frames are for DICOM: add --format dicom-seg.")
    return Nifti()
