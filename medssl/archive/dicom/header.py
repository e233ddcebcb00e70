"""One file's header: what it is, whose series it belongs to, where its planes lie, whether its sizes are honest."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.enhanced import add_gradient, clock, enhanced_frames
from medssl.archive.dicom.kinds import (
    PICTURES,
    body_part_of,
    is_secondary_capture,
    is_whole_slide,
    modality_of,
    related_kind,
)
from medssl.archive.dicom.model import DicomHeader, Frame
from medssl.archive.dicom.mosaic import csa_diffusion, is_mosaic, mosaic_frames
from medssl.archive.dicom.pet import read_pet
from medssl.archive.dicom.reading import NATIVE, Opened, open_header
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

#: Decoded bytes that one file may ask for.
MAX_FILE_BYTES = 8 * 2**30
#: Pixels of one plane; the largest radiographs have some 50 million.
MAX_PLANE_PIXELS = 2**28
#: PackBits cannot shrink below 2 bytes for 128.
_RLE = "1.2.840.10008.1.2.5"
_RLE_RATIO = 64
#: Series that one segmentation or structure set belongs to; an honest one names a handful.
_MOST_REFERENCES = 64
_LOSSY_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81, 91, 203))
_PHOTOMETRIC = {
    1: frozenset(("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")),
    3: frozenset(("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")),
}


def read_header(path: Path) -> DicomHeader:
    """Read one DICOM file up to its pixels.

    A file of a known series that cannot be used comes back with its `problem`, so that the rest of the series is
    marked; `group` refuses it.

    Args:
        path: Any file.

    Raises:
        InputRefused: If it is no DICOM file, or its series cannot be told.
        OSError: If it cannot be read.
    """
    try:
        opened = open_header(path)
        return _header(path, opened)
    except (InputRefused, OSError):
        raise
    except Exception as error:  # noqa: BLE001  (damaged nested elements raise many kinds; each costs one row)
        raise InputRefused("dicom_invalid", type(error).__name__) from None


def _header(path: Path, opened: Opened) -> DicomHeader:
    header = Tags(opened.dataset)
    sop_class = header.text(t.SOP_CLASS) or opened.media_class
    modality_text = header.text(t.MODALITY).upper()
    related = related_kind(sop_class, modality_text)
    if not (related or sop_class or modality_text or t.ROWS in header):
        raise InputRefused("not_an_image", "no SOP class, modality or rows")
    facts: dict[str, object] = {
        "path": str(path),
        "size": opened.size,
        "modality": modality_of(modality_text),
        "sop_class": sop_class,
        "sop_uid": header.text(t.SOP_INSTANCE),
        "series_uid": header.text(t.SERIES_UID),
        "study_uid": header.text(t.STUDY_UID),
        "frame_uid": header.text(t.FRAME_OF_REFERENCE),
        "patient_id": header.text(t.PATIENT_ID),
        "issuer": header.text(t.ISSUER),
        "person": _person(header),
        "transfer_syntax": opened.transfer_syntax,
        "series_number": header.integer(t.SERIES_NUMBER),
        "body_part": body_part_of(header.text(t.BODY_PART)),
    }
    image_type = tuple(part.upper() for part in header.texts(t.IMAGE_TYPE))
    if not related and "LOCALIZER" in image_type:
        related = "localiser"
    if related:
        return DicomHeader(related=related, references=_references(header, related), **facts)  # type: ignore[arg-type]
    if is_whole_slide(sop_class):
        return DicomHeader(problem=("unsupported_object", "whole-slide microscopy"), **facts)  # type: ignore[arg-type]
    try:
        facts.update(pixel_format(header, opened))
        facts.update(_planes(header, facts, image_type))
        return DicomHeader(**facts)  # type: ignore[arg-type]
    except InputRefused as refusal:
        problem = (refusal.code, refusal.detail)
    if is_secondary_capture(sop_class) and not header.numbers(t.POSITION):
        return DicomHeader(**{**_identity(facts), "related": "secondary_capture"})  # type: ignore[arg-type]
    return DicomHeader(**{**_identity(facts), "problem": problem})  # type: ignore[arg-type]


_IDENTITY = (
    "path",
    "size",
    "modality",
    "sop_class",
    "sop_uid",
    "series_uid",
    "study_uid",
    "frame_uid",
    "patient_id",
    "issuer",
    "person",
    "transfer_syntax",
    "series_number",
    "body_part",
)


def _identity(facts: dict[str, object]) -> dict[str, object]:
    return {name: facts[name] for name in _IDENTITY}


def _references(header: Tags, related: str) -> tuple[str, ...]:
    """Return the UIDs of the series that a segmentation or structure set names, each once and in order."""
    if related == "segmentation":
        items = header.sequence(t.REFERENCED_SERIES)
    elif related == "structure_set":
        items = [
            series
            for frame in header.sequence(t.RT_FRAMES)
            for study in frame.sequence(t.RT_STUDIES)
            for series in study.sequence(t.RT_SERIES)
        ]
    else:
        return ()
    found = dict.fromkeys(item.text(t.SERIES_UID) for item in items)
    return tuple(uid for uid in found if uid)[:_MOST_REFERENCES]


def pixel_format(header: Tags, opened: Opened) -> dict[str, object]:
    """Return the pixels' format after checking it against itself, the limit and the size of the file.

    Raises:
        InputRefused: If it contradicts itself or asks for too much.
    """
    rows, columns = header.integer(t.ROWS), header.integer(t.COLUMNS)
    if not opened.pixel_tag:
        raise InputRefused("no_pixel_data", f"{rows} x {columns} pixels are declared")
    if not rows or not columns or rows < 1 or columns < 1:
        raise InputRefused("header_invalid", f"{rows} rows, {columns} columns")
    samples = header.integer(t.SAMPLES) or 1
    photometric = header.text(t.PHOTOMETRIC).upper() or ("MONOCHROME2" if samples == 1 else "")
    allocated = header.integer(t.BITS_ALLOCATED)
    if opened.pixel_tag != t.PIXEL_DATA:
        allocated = 32 if opened.pixel_tag == t.FLOAT_PIXELS else 64
    stored = header.integer(t.BITS_STORED) or allocated or 0
    high = header.integer(t.HIGH_BIT)
    high = stored - 1 if high is None else high
    frames = header.integer(t.FRAMES, "") if t.FRAMES in header and header.text(t.FRAMES) else 1
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise InputRefused("pixel_format_unsupported", f"bits allocated {allocated}, stored {stored}, high bit {high}")
    if photometric not in _PHOTOMETRIC.get(samples, ()):
        raise InputRefused("pixel_format_unsupported", f"{samples} samples per pixel do not go with the colour space")
    if frames is None or not 1 <= frames <= 1_000_000:
        raise InputRefused("multiframe_invalid", "the number of frames is no sensible integer")
    bits = rows * columns * samples * frames * allocated
    if photometric == "YBR_FULL_422" and opened.transfer_syntax in NATIVE:
        bits = bits * 2 // 3
    expected = math.ceil(bits / 8)
    if expected > MAX_FILE_BYTES or rows * columns > MAX_PLANE_PIXELS:
        raise InputRefused("too_large", f"{frames} x {rows} x {columns} pixels need {expected} bytes")
    _check_length(opened, expected)
    flags = set()
    if header.text(t.LOSSY) == "01" or opened.transfer_syntax in _LOSSY_SYNTAXES:
        flags.add("lossy_compression")
    if header.text(t.BURNED_IN).upper() == "YES":
        flags.add("burned_in_annotation")
    signed = header.integer(t.SIGNED) == 1
    kind = "SS" if signed else "US"
    return {
        "rows": rows,
        "columns": columns,
        "samples": samples,
        "photometric": photometric,
        "bits_allocated": allocated,
        "bits_stored": stored,
        "high_bit": high,
        "signed": signed,
        "frame_count": frames,
        "padding": header.integer(t.PADDING, kind),
        "padding_limit": header.integer(t.PADDING_LIMIT, kind),
        "pixel_length": opened.pixel_length,
        "flags": tuple(sorted(flags)),
    }


def _check_length(opened: Opened, expected: int) -> None:
    native = opened.transfer_syntax in NATIVE
    if native and opened.pixel_length < 0:
        raise InputRefused("header_invalid", "uncompressed pixels of undefined length")
    length = opened.pixel_length
    available = opened.pixel_available
    if available >= 0 and (native or length >= 0) and available < min(length, expected if native else length):
        raise InputRefused("truncated", f"{available} bytes of pixels, {expected} expected")
    if native and length < expected:
        raise InputRefused("truncated", f"{length} bytes of pixels, {expected} expected")
    if opened.transfer_syntax == _RLE and available >= 0 and available * _RLE_RATIO < expected:
        raise InputRefused("truncated", f"{available} bytes of run-length pixels cannot hold {expected}")
    if not native and 0 <= available < 16:
        raise InputRefused("truncated", f"{available} bytes of compressed pixels")


def _planes(header: Tags, facts: dict[str, object], image_type: tuple[str, ...]) -> dict[str, object]:
    """Return everything about the place, the kind and the labels of the file's planes."""
    modality, sop_class = str(facts["modality"]), str(facts["sop_class"])
    count, rows, columns = int(str(facts["frame_count"])), int(str(facts["rows"])), int(str(facts["columns"]))
    flags = set(facts["flags"])  # type: ignore[call-overload]
    slope, intercept = header.number(t.SLOPE), header.number(t.INTERCEPT)
    thickness, between = _positive(header.number(t.SLICE_THICKNESS)), _positive(header.number(t.BETWEEN_SLICES))
    base = Frame(
        number=0,
        position=header.numbers(t.POSITION),
        orientation=header.numbers(t.ORIENTATION),
        spacing=header.numbers(t.SPACING),
        slope=1.0 if slope is None else slope,
        intercept=0.0 if intercept is None else intercept,
        # A CT without a rescale type is in HU by definition; one without slope and intercept is not.
        unit=(header.text(t.RESCALE_TYPE).upper() or "HU") if slope is not None and intercept is not None else "",
        kind="\\".join(image_type),
        labels=tuple(_labels(header).items()),
    )
    result: dict[str, object] = {"thickness": thickness, "between": between, "kernel": header.text(t.KERNEL)}
    enhanced = t.PER_FRAME_GROUPS in header
    if is_mosaic(image_type, header) and not enhanced and count == 1 and facts["samples"] == 1:
        mosaic = mosaic_frames(header, base, rows, columns, between)
        result.update(tiles=mosaic.tiles, rows=mosaic.rows, columns=mosaic.columns)
        frames = mosaic.frames
        if mosaic.normal_assumed:
            flags.add("mosaic_normal_assumed")
    elif enhanced:
        frames = enhanced_frames(header, count, base)
    else:
        frames = (base,)
    placed = all(frame.position and frame.orientation for frame in frames) and (enhanced or count == 1)
    if not placed:
        _check_unplaced(modality, sop_class, count, enhanced, header, facts)
        spacing, found = _picture_spacing(header, base)
        flags.update(found)
        frames = (Frame(0, spacing=spacing, slope=base.slope, intercept=base.intercept, kind=base.kind),)
        result["picture"] = True
    elif is_secondary_capture(sop_class):
        flags.add("secondary_capture_source")
    if any(frame.slope == 0 or not math.isfinite(frame.slope + frame.intercept) for frame in frames):
        raise InputRefused("rescale_invalid", "slope or intercept is zero or not finite")
    if modality == "CT" and facts["samples"] == 1:
        flags.update(_check_hounsfield(header, frames))
    if modality == "PT":
        result["pet"] = read_pet(header, {frame.unit for frame in frames} if enhanced else None)
    return {**result, "frames": frames, "flags": tuple(sorted(flags))}


def _check_unplaced(
    modality: str, sop_class: str, count: int, enhanced: bool, header: Tags, facts: dict[str, object]
) -> None:
    if is_secondary_capture(sop_class):
        raise InputRefused("position_missing", "secondary capture")
    if modality in PICTURES and not enhanced:
        return
    if count > 1:
        raise InputRefused("multiframe_invalid", f"{count} frames without positions")
    raise InputRefused("position_missing", "no ImagePositionPatient or ImageOrientationPatient")


def _check_hounsfield(header: Tags, frames: tuple[Frame, ...]) -> set[str]:
    units = {frame.unit for frame in frames}
    if "" in units and t.MODALITY_LUT not in header:
        raise InputRefused("hu_unavailable", "no rescale slope and intercept")
    if units - {"", "HU", "HU_MOD", "US"}:
        raise InputRefused("hu_unavailable", "the rescale type is no Hounsfield unit")
    return {"hu_unspecified"} if "US" in units or "" in units else set()


def _picture_spacing(header: Tags, base: Frame) -> tuple[tuple[float, ...], set[str]]:
    """Return the pixel size of a 2D image and flags; 1 mm where nothing is told."""
    flags = {"orientation_unknown"}
    for spacing, flag in (
        (base.spacing, ""),
        (header.numbers(t.NOMINAL_SPACING), ""),
        (header.numbers(t.IMAGER_SPACING), "detector_spacing"),
        (_ultrasound_spacing(header), ""),
    ):
        if len(spacing) == 2:
            if not all(math.isfinite(part) and part > 0 for part in spacing):
                raise InputRefused("spacing_invalid", "pixel spacing is zero, negative or not finite")
            return spacing, flags | ({flag} if flag else set())
    return (1.0, 1.0), flags | {"spacing_unknown"}


def _ultrasound_spacing(header: Tags) -> tuple[float, ...]:
    """Return the pixel size of the 2D regions of an ultrasound image, if they agree."""
    found = set()
    for region in header.sequence(t.US_REGIONS):
        if region.integer(t.US_FORMAT) != 1:
            continue
        if region.integer(t.US_UNITS_X) != 3 or region.integer(t.US_UNITS_Y) != 3:  # 3: centimetres
            return ()
        x, y = region.number(t.US_DELTA_X, "FD"), region.number(t.US_DELTA_Y, "FD")
        if x is None or y is None:
            return ()
        found.add((round(abs(y) * 10, 6), round(abs(x) * 10, 6)))
    return found.pop() if len(found) == 1 else ()


def _labels(header: Tags) -> dict[str, float]:
    """Return what may set images at one place apart."""
    siemens = header.text(t.SIEMENS_CREATOR) == "SIEMENS MR HEADER"
    values: dict[str, float | None] = {
        "temporal": header.number(t.TEMPORAL),
        "echo_time": header.number(t.ECHO_TIME),
        "echo_number": header.number(t.ECHO_NUMBER),
        "inversion": header.number(t.INVERSION_TIME),
        "flip": header.number(t.FLIP_ANGLE),
        "kvp": header.number(t.KVP),
        "b_value": header.number(t.B_VALUE, "FD"),
        "trigger": header.number(t.TRIGGER_TIME),
        "trigger_delay": header.number(t.TRIGGER_DELAY, "FD"),
        "frame_reference": header.number(t.FRAME_REFERENCE_TIME),
        "acquisition": header.number(t.ACQUISITION_NUMBER),
        "acquisition_time": clock(header.text(t.ACQUISITION_TIME) or header.text(t.ACQUISITION_DATETIME)[8:]),
        "content_time": clock(header.text(t.CONTENT_TIME)),
        "instance": header.number(t.INSTANCE_NUMBER),
    }
    direction = header.numbers(t.GRADIENT, "FD")
    if values["b_value"] is None and siemens:
        values["b_value"] = header.number(t.SIEMENS_B)
        direction = direction or header.numbers(t.SIEMENS_GRADIENT, "FD")
        if values["b_value"] is None:
            values["b_value"], direction = csa_diffusion(header)
    if values["b_value"] is None and header.text(t.GE_CREATOR) == "GEMS_PARM_01":
        value = header.number(t.GE_B)
        values["b_value"] = None if value is None or not math.isfinite(value) else value % 100_000
        direction = tuple(part for tag in t.GE_ACQUISITION_GRADIENT for part in header.numbers(tag))
    if values["b_value"] is None and header.text(t.PHILIPS_CREATOR).startswith("Philips Imaging DD 001"):
        values["b_value"] = header.number(t.PHILIPS_B, "FL")
    labels = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    add_gradient(labels, direction)
    return labels


def _positive(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _person(header: Tags) -> tuple[str, ...]:
    """Return digests of birth date, sex and the parts of the name: equal for equal persons, of no other use."""
    birth = "".join(character for character in header.text(t.BIRTH_DATE) if character.isdigit())
    name = header.text(t.PATIENT_NAME).split("=")[0].casefold()
    words = "".join(character if character.isalnum() else " " for character in name).split()
    facts = [f"b{birth}" if len(birth) == 8 else "", f"s{header.text(t.SEX).upper()[:1]}"]
    facts += sorted({f"n{word}" for word in words})
    return tuple(
        fact[:1] + hashlib.blake2s(fact.encode(), digest_size=4).hexdigest() if len(fact) > 1 else "" for fact in facts
    )
