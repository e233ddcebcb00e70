"""Every reason code of the archive: why an input is refused, what is only related, what is worth knowing of a volume.

The one documented list. A code is stable: tables, filters (`--select`) and reports of users rely on it. The README's
table is printed from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Group = Literal["refused", "related", "flag", "geometry", "gate"]


@dataclass(frozen=True)
class Code:
    """One reason code.

    Attributes:
        group: `refused`, `related`, `flag` (of an accepted volume), `geometry` (how its grid became regular) or `gate`
            (why a model's gates ask for a look at a case, or refuse it).
        code: The name, in lower case.
        meaning: What was found.
        remedy: What a person should do.
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
    # Files
    Code("refused", "dicom_invalid", "The file begins like DICOM but its elements cannot be read.", "Copy or export it again."),
    Code("refused", "deflated_too_large", "The deflated header or image grows past the limit.", "Export it uncompressed if it can be trusted."),
    Code("refused", "no_pixel_data", "An image object without pixels.", "Export it again from the PACS."),
    Code("refused", "unsupported_object", "A DICOM object that is neither an image of the body in rows and columns nor a known companion.", "Nothing, if it is none of interest."),
    Code("refused", "pixel_format_unsupported", "Bits, samples or colours of the pixels are not supported or contradict each other.", "Export it again as 8 or 16 bit grey or RGB."),
    Code("refused", "rescale_invalid", "Rescale slope or intercept is zero, infinite, or not a number.", "Export the image again."),
    # What makes one volume
    Code("refused", "position_missing", "A cross-sectional image without position or orientation in the patient.", "Export the original series from the PACS."),
    Code("refused", "position_invalid", "ImagePositionPatient or ImageOrientationPatient is not a set of finite numbers.", "Export the image again."),
    Code("refused", "orientation_invalid", "The direction cosines are not of unit length or not at right angles.", "Use --geometry repair for small deviations, or export it again."),
    Code("refused", "series_of_two_patients", "One series holds images of two patients.", "Correct patient IDs or series UIDs at the source."),
    Code("refused", "mixed_orientation", "Slices of another orientation lie in the series, too few to be a volume.", "Nothing, if they are localisers."),
    Code("refused", "mixed_size", "Slices of another number of rows and columns lie in the series, too few to be a volume.", "Export the series again if slices are missing."),
    Code("refused", "mixed_spacing", "Slices of another pixel spacing lie in the series, too few to be a volume.", "Export the series again if slices are missing."),
    Code("refused", "mixed_type", "Slices of another kind (image type, frame of reference, colours, acquisition) lie in the series, too few to be a volume.", "Nothing, if they are side products."),
    Code("refused", "too_few_slices", "Fewer slices than a volume needs (3; with --geometry repair 2 that lie close).", "Export the whole series, or use --geometry repair for two slices."),
    Code("refused", "single_position", "All images lie at one place (bolus tracking, a time series of one slice): not a volume.", "Nothing."),
    Code("refused", "position_repeated", "Several images with different pixels lie at one place and nothing tells consistently what sets them apart.", "Split the series by what distinguishes the images."),
    Code("refused", "incomplete_frame", "One time point, echo or direction of a series lacks slices that the others have.", "Export the whole series, or leave it out as is done here."),
    Code("refused", "missing_slices", "Slices are missing: some gaps are multiples of the slice distance.", "Export the whole series, or use --geometry repair for single gaps."),
    Code("refused", "varying_spacing", "The distance between slices changes along the series.", "Split the series where the distance changes."),
    Code("refused", "irregular_positions", "The slices do not lie along one straight line.", "Export the series again."),
    Code("refused", "gantry_tilt", "The slices are displaced sideways: gantry tilt.", "Use --geometry repair to resample."),
    Code("refused", "mosaic_invalid", "A Siemens mosaic whose number, distance or order of slices is unknown.", "Export it with its private elements (CSA header)."),
    Code("refused", "multiframe_invalid", "The frames of a multi-frame image lack their positions or do not match their number.", "Export it again."),
    # Quantities
    Code("refused", "suv_unavailable", "PET whose SUVbw cannot be computed without guessing (units, weight, dose, times, decay correction).", "Export it with these attributes."),
    Code("refused", "hu_unavailable", "CT whose values are not declared as Hounsfield units.", "Export the original reconstruction."),
    # Related objects
    Code("related", "dicomdir", "A DICOMDIR: the directory of a medium; the files it lists are read themselves.", ""),
    Code("related", "segmentation", "DICOM SEG.", ""),
    Code("related", "structure_set", "RTSTRUCT.", ""),
    Code("related", "structured_report", "DICOM SR.", ""),
    Code("related", "dose_report", "Radiation dose report.", ""),
    Code("related", "key_object", "Key object selection.", ""),
    Code("related", "presentation_state", "Presentation state.", ""),
    Code("related", "rt_dose", "Radiotherapy dose grid.", ""),
    Code("related", "rt_plan", "Radiotherapy plan or treatment record.", ""),
    Code("related", "rt_image", "Radiotherapy portal image.", ""),
    Code("related", "registration", "Spatial registration or fiducials.", ""),
    Code("related", "encapsulated_document", "PDF, CDA or another document inside DICOM.", ""),
    Code("related", "waveform", "ECG, audio or another waveform.", ""),
    Code("related", "parametric_map", "Parametric map or real-world value mapping.", ""),
    Code("related", "spectroscopy", "MR spectroscopy.", ""),
    Code("related", "raw_data", "Raw data of the scanner.", ""),
    Code("related", "secondary_capture", "A secondary capture or screenshot without a place in the patient.", ""),
    Code("related", "localiser", "A localiser, scout or topogram.", ""),
    Code("related", "duplicate_slice", "The same pixels as another file of the volume; one copy was used.", ""),
    Code("related", "other_object", "Another DICOM object without an image.", ""),
    # Flags
    Code("flag", "duplicates_dropped", "Copies of slices were left out.", ""),
    Code("flag", "copy_in_other_folder", "Images of this series lie in another folder too: each folder is a volume of its own.", "Leave one out with --select."),
    Code("flag", "series_partly_refused", "Other files of the same series were refused.", "See their codes in the table of refusals."),
    Code("flag", "series_split", "The series holds several volumes.", ""),
    Code("flag", "frames_by_number", "Only the instance numbers tell the frames apart.", "Check the order of the frames."),
    Code("flag", "padding_replaced", "Voxels outside the scanned field were set to the lowest plausible value.", ""),
    Code("flag", "monochrome1_inverted", "White and black were exchanged: MONOCHROME1.", ""),
    Code("flag", "monochrome1_kept", "MONOCHROME1, but the values are a physical quantity and were kept.", ""),
    Code("flag", "lossy_compression", "The pixels were compressed with loss.", ""),
    Code("flag", "burned_in_annotation", "The file declares text in its pixels, perhaps of the patient.", "Look at it before sharing."),
    Code("flag", "secondary_capture_source", "A derived series of secondary captures that have a place in the patient.", ""),
    Code("flag", "few_slices", "Only two slices.", "Leave it out with --select."),
    Code("flag", "position_jitter", "Slices lie slightly beside the regular grid, within tolerance.", ""),
    Code("flag", "orientation_orthonormalised", "Slightly wrong direction cosines were made orthonormal.", ""),
    Code("flag", "mosaic_normal_assumed", "The mosaic does not say in which direction its slices run; head-wards was taken.", "Check head and feet in a viewer."),
    Code("flag", "colour_to_grey", "The colour frames of a moving picture were turned into grey.", ""),
    Code("flag", "detector_spacing", "Pixel size at the detector or image plate, not in the patient.", ""),
    Code("flag", "hu_unspecified", "CT with a rescale type that does not name Hounsfield units.", "Check the values of air and water."),
    Code("flag", "suv_from_acquisition_time", "The series time lies after the acquisition; SUV uses the earliest acquisition time.", "Check the SUV if beds are missing."),
    # Geometry
    Code("geometry", "tilt_resampled", "Gantry tilt: each slice was shifted within its plane onto a grid with right angles.", ""),
    Code("geometry", "gap_interpolated", "Single missing slices were interpolated from their neighbours.", ""),
    Code("geometry", "tilt_resampled+gap_interpolated", "Both repairs.", ""),
    Code("geometry", "picture", "A 2D image.", ""),
)
# Found when a volume is preprocessed; they stand in the store's failed.json.
_PREPROCESSING: tuple[Code, ...] = (
    Code("refused", "no_content", "Nothing but air or zeros.", "Leave it out with --select."),
    Code("refused", "no_contrast", "All voxels of the content have one value: it cannot be normalised.", "Leave it out with --select."),
    Code("refused", "resampled_too_large", "The asked voxel size makes the volume too large.", "Ask for a larger --spacing, or use median or native."),
    Code("refused", "float16_overflow", "A value is larger than 65504, which --codec float16 cannot hold.", "Use --codec int16 or lossless, or another --normalisation."),
    Code("refused", "channels_differ", "The channel files of a case differ in shape or grid.", "Resample them to one grid."),
    Code("refused", "label_shape_differs", "The label has another shape than its image.", "Give the label that belongs to the image."),
    Code("refused", "label_grid_differs", "The label lies elsewhere than its image.", "Resample the label to the image's grid, or mend its matrix."),
    Code("refused", "label_values_unknown", "The label has values that dataset.json does not list.", 'Fix the mask, or add the value to "labels" (ignore: "ignore": VALUE).'),
    Code("refused", "label_name", "A mask of a structure that the data set's manifest does not name.", "Remove the file, or mend its name."),
    Code("refused", "label_value", "A mask holds a value that the data set's manifest does not list.", "Mend the mask, or leave the case out."),
    Code("refused", "channels", "A file of a prepared data set has other channels than its manifest says.", "Download the case again, or leave it out."),
    Code("refused", "grid", "Channels, or image and mask, of one case lie on different grids.", "Download the case again, or resample one to the other."),
)
# Found when a volume is segmented; they stand in predictions.json.
_PREDICTION: tuple[Code, ...] = (
    Code("refused", "channels_incomplete", "A case has other channels than the model takes.", "Name its files CASE_0000, CASE_0001, ... one per channel."),
    Code("refused", "name_taken", "Two files are the same case and channel.", "Remove or rename one."),
    Code("refused", "output_not_finite", "The network's output is not finite on this volume.", "Check the volume's intensities; if it is so everywhere, training diverged."),
    Code("refused", "source_not_dicom", "DICOM SEG was asked for, and the input is no DICOM series.", "Give the DICOM series, or use --format nifti."),
    Code("refused", "source_uids_missing", "The images lack identifiers (study, series, instance, frame of reference) by which a DICOM SEG names its source.", "Export the series again from the PACS with its identifiers, or use --format nifti."),
    Code("refused", "source_not_referable", "The grid of the volume is not that of one image per slice or of one multi-frame image (repaired geometry, mosaic, several multi-frame images, a picture).", "Use --format nifti, or send the series as classic single-frame or enhanced multi-frame images."),
    Code("refused", "seg_not_written", "No valid DICOM SEG can be written for this series: its headers break rules that a SEG must follow.", "Mend the headers, or use --format nifti."),
    Code("refused", "outside_training", "The model's gates refuse the case, and --gates enforce was asked for; each reason stands in gates.json.", "Check that it is the right series and model. To see the mask all the same use --gates report."),
    Code("flag", "mask_empty", "No voxel was labelled: the mask is empty, and a DICOM SEG holds all its frames, each without content.", "Check that the volume shows what the model looks for."),
)
# Found when a case is compared with what the model was trained on; they stand in gates.json.
_GATES: tuple[Code, ...] = (
    Code("gate", "channel_count", "The case has another number of channels than the model takes.", "Give one file per channel: CASE_0000, CASE_0001, ..."),
    Code("gate", "modality_unlike", "Another modality than the model was trained on, or a picture instead of a volume.", "Choose the series of the right modality."),
    Code("gate", "orientation_unlike", "The model's reader keeps the axes of the file, and no training case had these.", "Reorient the volume; `medssl convert` does."),
    Code("gate", "single_slice", "One slice, where the model was trained on volumes.", "Give the whole series."),
    Code("gate", "spacing_unlike", "The voxel size is outside of that of the training cases.", "Check the header; choose the series of the usual resolution."),
    Code("gate", "extent_unlike", "The volume shows less or more of the body than the training cases.", "Crop it as the training cases were cropped, or choose another series."),
    Code("gate", "intensity_unlike", "The intensities lie elsewhere than those of the training cases.", "Check contrast, sequence and rescaling; look at the image."),
    Code("gate", "intensity_constant", "Nearly all voxels have one value.", "Export the image again."),
    Code("gate", "embedding_far", "The network's own features of the case lie far from those of its training cases.", "Look at the image and the mask: organ, artefacts, contrast."),
    Code("gate", "members_disagree", "Mirrored predictions or folds disagree more than on validation cases.", "Look at the mask before it is used."),
    Code("gate", "organ_uncertain", "The network is less sure of the voxels it labelled than on validation cases.", "Look at the mask before it is used."),
    Code("gate", "organ_not_found", "A label that every training case has was not found.", "Look at the image: is the organ there?"),
    Code("gate", "volume_unlike", "The volume of a label is outside of that of the training cases.", "Look at the mask: is it whole, is it the organ?"),
    Code("gate", "parts_unlike", "A label falls into more parts than in any training case.", "Look at the mask for islands."),
    Code("gate", "not_read", "The case was refused before the gates could look at it.", "See its code in predictions.json."),
)
# Found when segmentations and structure sets of an archive become labels; they stand in labels.json.
_LABELS: tuple[Code, ...] = (
    Code("refused", "label_without_volume", "A segmentation or structure set names no series of which the index has a volume.", "Index the images it was drawn on with it, or loosen --select."),
    Code("refused", "label_of_several_volumes", "A segmentation or structure set names series that hold several volumes.", "Leave one of them with --select."),
    Code("refused", "label_other_patient", "A segmentation or structure set has another patient ID than its images.", "Correct the ID at the source; do not train on it before."),
    Code("refused", "label_names_patient", "The name of a segment or region holds the patient's name or ID: it would become the name of a label.", "Rename the region at the source."),
    Code("refused", "label_missing", "The case has no region for a label that others have: it may be absent or merely not drawn.", "Name fewer --labels, or use --missing background where not drawn means absent."),
    Code("refused", "label_repeated", "Two objects of one volume have a region of the same name: two readers or two versions.", "Leave one of them in the archive."),
    Code("refused", "label_image_unsuitable", "The volume is no image that a label can lie on: its geometry was repaired, or it has frames or colours.", "Draw the label on a series of its own, or index with --geometry strict."),
    Code("refused", "segments_overlap", "Two labels overlap, and a voxel can have one only.", "State which one wins with --priority, or name fewer --labels."),
    Code("refused", "segmentation_unsupported", "A DICOM SEG that is neither binary nor a label map.", "Export it as a binary segmentation."),
    Code("refused", "segmentation_invalid", "A DICOM SEG whose segments or frames contradict each other.", "Export it again."),
    Code("refused", "structure_set_invalid", "An RTSTRUCT whose regions contradict each other, or without a closed contour.", "Export it again with closed planar contours."),
    Code("refused", "contour_invalid", "A contour with fewer than three points, or with numbers that are not finite or not as many as declared.", "Export the structure set again."),
    Code("refused", "contour_off_slice", "A contour does not lie on a slice of its volume.", "Draw it on the slices of the series, or resample it there."),
)
# fmt: on

NOTHING_TO_DO = "Nothing: it is told for information."

CODES: dict[str, Code] = {
    entry.code: entry if entry.remedy else replace(entry, remedy=NOTHING_TO_DO)
    for entry in (
        *_FILES,
        *_CONTENT,
        *_RELATED,
        *_FLAGS,
        *_GEOMETRY,
        *_DICOM,
        *_PREPROCESSING,
        *_PREDICTION,
        *_GATES,
        *_LABELS,
    )
}


def codes_of(group: Group) -> list[Code]:
    """Return the codes of one group in the order of the list."""
    return [entry for entry in CODES.values() if entry.group == group]


def explain(code: str) -> str:
    """Return meaning and remedy of a code in one line, or the code itself if it is not in the list."""
    entry = CODES.get(code)
    if entry is None:
        return code
    return entry.meaning if entry.remedy == NOTHING_TO_DO else f"{entry.meaning} {entry.remedy}"
