"""2D images and moving pictures without a place in the patient: radiographs, ultrasound, angiography."""

from __future__ import annotations

from medssl.archive.dicom.geometry import check_spacing
from medssl.archive.dicom.model import DicomHeader, DicomVolume


def plan_picture(header: DicomHeader) -> DicomVolume:
    """Return the plan of one 2D image; the frames of a moving picture become channels, grey if they are coloured.

    The affine is diagonal and positive, as for PNG and JPEG, so that reorientation leaves the rows as they stand.

    Raises:
        InputRefused: If the pixel spacing is invalid.
    """
    spacing = check_spacing(header.frames[0].spacing)
    moving = header.picture and header.frame_count > 1
    flags = set(header.flags)
    if moving and header.colour:
        flags.add("colour_to_grey")
    if not header.picture:
        flags.add("orientation_unknown")
    channels = "frames" if moving else "colour" if header.colour else "scalar"
    count = header.frame_count if moving else 3 if header.colour else 1
    return DicomVolume(
        paths=(header.path,),
        slices=tuple((0, number) for number in range(header.frame_count if moving else 1)),
        shape=(count, 1, header.rows, header.columns),
        affine=(
            (spacing[1], 0.0, 0.0, 0.0),
            (0.0, spacing[0], 0.0, 0.0),
            (0.0, 0.0, 1.0, 0.0),
            (0.0, 0.0, 0.0, 1.0),
        ),
        spacing_mm=(1.0, *spacing),
        modality=header.modality,
        channels=channels,
        geometry="picture",
        flags=tuple(sorted(flags)),
        body_part=header.body_part,
        stored_size=(header.rows, header.columns),
        patient_id=header.patient_id,
        issuer=header.issuer,
        person=header.person,
        study_uid=header.study_uid,
        series_uid=header.series_uid,
        frame_uid=header.frame_uid,
        series_key=header.series_key,
    )
