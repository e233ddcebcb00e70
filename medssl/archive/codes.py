"""Every reason code of the archive: why an input is refused, what is only related, what is worth knowing of a volume.

The one documented list. A code is stable: tables, filters (`--select`) and reports of users rely on it. The README's
table is printed from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["refused", "related", "flag", "geometry"]


@dataclass(frozen=True)
class Code:
    """One reason code.

    Attributes:
        group: `refused`, `related`, `flag` (of an accepted volume) or `geometry` (how its grid became regular).
        code: The name, in lower case.
        meaning: What was found.
        remedy: What a person should do, if anything.
    """

    group: Group
    code: str
    meaning: str
    remedy: str


# fmt: off
# ruff: noqa: E501  (a table: one row, one line)
_FILES = (
    Code("refused", "empty_file", "The file has no bytes.", "Copy it again from where it came."),
    Code("refused", "unreadable", "The file or folder may not be read.", "Give the reading user permission, then run again with --resume."),
    Code("refused", "special_file", "A socket, pipe or device, not a file.", "Remove it from the archive."),
    Code("refused", "broken_link", "A symbolic link whose target does not exist.", "Remove the link or mount what it points to."),
    Code("refused", "symlink_loop", "A symbolic link to a folder that contains it.", "Nothing is lost: the folder itself was read. Remove the link."),
    Code("refused", "linked_twice", "A symbolic link to something that is read at its own place.", "Nothing is lost: it was read there."),
    Code("refused", "changed_while_read", "Size or time of the file changed while it was read.", "Wait until the transfer has ended, then run again with --resume."),
    Code("refused", "vanished", "The file was removed while the archive was read.", "Run again with --resume."),
    Code("refused", "not_an_image", "The content is no image format that medssl reads.", "Nothing, if it is no image. Otherwise convert it to DICOM or NIfTI."),
    Code("refused", "archive_not_opened", "A zip, tar, gzip or other packed archive; these are never unpacked here.", "Unpack it in a safe place and give that folder."),
    Code("refused", "analyze_format", "ANALYZE 7.5: it does not say which side is left.", "Convert it to NIfTI with a tool that knows its orientation."),
)

_CONTENT = (
    Code("refused", "truncated", "The file is shorter than its header says.", "Copy it again from where it came."),
    Code("refused", "header_invalid", "The header contradicts itself or its format.", "Repair or export the file again."),
    Code("refused", "too_large", "The header asks for more than the limit of one volume.", "Crop or split the image."),
    Code("refused", "dimensions_unsupported", "Not a 2D or 3D image, nor a series of such frames.", "Split it into images of up to three dimensions."),
    Code("refused", "dtype_unsupported", "The voxels are complex numbers or of another type that is no intensity.", "Export magnitude images."),
    Code("refused", "spacing_invalid", "A voxel size is zero, negative, infinite or not a number.", "Set the true voxel size in the header."),
    Code("refused", "affine_invalid", "The matrix from voxels to the patient is singular or not finite.", "Set the true matrix in the header."),
    Code("refused", "affine_sheared", "The voxel axes are not at right angles.", "Use --geometry repair to resample, or export an unsheared image."),
    Code("refused", "scaling_invalid", "Slope or intercept of the intensities is infinite or contradictory.", "Export the image again."),
    Code("refused", "not_finite", "Most voxels are not finite numbers.", "Export the image again."),
    Code("refused", "companion_missing", "The header names a data file that is not there.", "Put header and data side by side."),
    Code("refused", "companion_outside", "The header names a data file outside its source folder.", "Put header and data side by side in the source folder."),
    Code("refused", "pages_differ", "The pages of the file differ in size or type: not a stack.", "Save each page as a file of its own."),
    Code("refused", "compression_unsupported", "The compression of the pixels cannot be decoded.", "Save the image with a common lossless compression."),
    Code("refused", "decode_failed", "The pixels could not be decoded.", "Check the file with a viewer; copy or export it again."),
    Code("refused", "decode_crashed", "The decoder crashed on this input; it ran in a process of its own.", "Check the file with a viewer; copy or export it again."),
    Code("refused", "decode_timeout", "The decoder did not end within its time limit.", "Check the file with a viewer; copy or export it again."),
    Code("refused", "decode_memory", "Decoding needs more memory than the limit.", "Use a machine with more memory, or crop or split the image."),
    Code("refused", "duplicate_volume", "The same volume was accepted from another source folder.", "Nothing is lost."),
)

_RELATED = (
    Code("related", "companion_file", "The data file that belongs to a header file.", ""),
    Code("related", "sidecar", "A text file (JSON, bval, bvec, TSV) that describes the image of the same name.", ""),
    Code("related", "label_map", "A segmentation in an image format: a label, not an image to learn from.", ""),
)

_FLAGS = (
    Code("flag", "orientation_unknown", "The file does not say how the voxels lie in the patient; the format's default was taken.", "Leave such volumes out with --select if sides matter."),
    Code("flag", "spacing_unknown", "The file does not say the voxel size; 1 mm was taken.", "Leave such volumes out with --select, or use --spacing native."),
    Code("flag", "spacing_from_resolution", "The pixel size is the picture's print resolution.", "Check that it is physical."),
    Code("flag", "qform_sform_differ", "NIfTI qform and sform disagree; the sform was taken.", "Check left and right in a viewer."),
    Code("flag", "qform_used", "The NIfTI sform is sheared or singular; the qform was taken.", "Check the position in a viewer."),
    Code("flag", "pixdim_differs", "NIfTI pixdim and the matrix give different voxel sizes; the matrix was taken.", "Check the voxel size."),
    Code("flag", "units_converted", "The spatial unit was metre or micrometre; converted to mm.", ""),
    Code("flag", "non_finite_replaced", "Some voxels were not finite; NaN and -Inf became the smallest finite value, +Inf the largest.", "Check the image."),
    Code("flag", "constant", "All voxels have one value.", "Leave it out with --select."),
    Code("flag", "few_values", "Integers with at most 32 different values: perhaps a label map.", "Leave it out with --select if it is one."),
    Code("flag", "alpha_dropped", "The transparency channel was dropped.", ""),
    Code("flag", "palette_expanded", "The palette was expanded to colours or grey values.", ""),
    Code("flag", "exif_rotated", "The picture was turned as its EXIF orientation says.", ""),
    Code("flag", "stack_of_pages", "The pages of the file were stacked along z.", "Check that they are slices."),
    Code("flag", "first_picture_only", "The file holds several pictures; the first is used.", ""),
    Code("flag", "patient_unknown", "No patient ID: the patient key stems from the study, the folder or the file name.", "Check that the split keeps patients apart."),
    Code("flag", "patient_conflict", "One patient ID is used with different names, birth dates or sexes: perhaps two patients.", "Correct the IDs at the source."),
    Code("flag", "duplicate_voxels", "Another volume of this index has exactly the same voxels.", "Check that both are of one patient, or leave one out."),
    Code("flag", "series_in_two_sources", "The same series lies in two source folders with different content.", "Check which one is complete."),
)

_GEOMETRY = (
    Code("geometry", "regular", "The grid is regular as stored.", ""),
    Code("geometry", "shear_resampled", "The sheared grid was resampled to one with right angles.", ""),
)

# What is special to DICOM; kept apart so that the two lists can grow on their own.
_DICOM: tuple[Code, ...] = (
)
# fmt: on

CODES: dict[str, Code] = {entry.code: entry for entry in (*_FILES, *_CONTENT, *_RELATED, *_FLAGS, *_GEOMETRY, *_DICOM)}


def codes_of(group: Group) -> list[Code]:
    """Return the codes of one group in the order of the list."""
    return [entry for entry in CODES.values() if entry.group == group]


def explain(code: str) -> str:
    """Return meaning and remedy of a code in one line, or the code itself if it is not in the list."""
    entry = CODES.get(code)
    return code if entry is None else f"{entry.meaning} {entry.remedy}".strip()
