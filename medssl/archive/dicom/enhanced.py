"""Planes of enhanced multi-frame images, from the shared and per-frame functional groups (PS3.3 C.7.6.16)."""

from __future__ import annotations

import math
from dataclasses import replace

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.model import Frame
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

#: Dimensions that say where a frame lies, not what sets it apart from others at the same place.
_SPATIAL_POINTERS = frozenset((t.STACK_ID, t.IN_STACK, t.POSITION, t.ORIENTATION, 0x00201041, 0x00209301))


def enhanced_frames(header: Tags, count: int, base: Frame) -> tuple[Frame, ...]:
    """Return the planes of an enhanced image in the order of the file.

    Args:
        header: The top level of the file.
        count: Declared number of frames.
        base: What the top level says; functional groups go before it.

    Raises:
        InputRefused: If the number of functional groups is not the number of frames.
    """
    shared = header.item(t.SHARED_GROUPS)
    per_frame = header.sequence(t.PER_FRAME_GROUPS)
    if len(per_frame) != count:
        raise InputRefused("multiframe_invalid", f"{count} frames, {len(per_frame)} functional groups")
    dimensions = [
        int(pointer) if pointer is not None else 0
        for pointer in (_pointer(item) for item in header.sequence(t.DIMENSION_INDEX))
    ]
    common = _apply(base, shared, dimensions) if shared is not None else base
    return tuple(
        replace(_apply(common, item, dimensions), number=number).with_label("frame", float(number))
        for number, item in enumerate(per_frame)
    )


def _apply(base: Frame, groups: Tags, dimensions: list[int]) -> Frame:
    labels = dict(base.labels)
    changes: dict[str, object] = {}
    if plane := groups.item(t.PLANE_POSITION):
        changes["position"] = plane.numbers(t.POSITION)
    if plane := groups.item(t.PLANE_ORIENTATION):
        changes["orientation"] = plane.numbers(t.ORIENTATION)
    if measures := groups.item(t.PIXEL_MEASURES):
        changes["spacing"] = measures.numbers(t.SPACING)
    if transformation := groups.item(t.VALUE_TRANSFORMATION):
        slope, intercept = transformation.number(t.SLOPE), transformation.number(t.INTERCEPT)
        changes["slope"] = 1.0 if slope is None else slope
        changes["intercept"] = 0.0 if intercept is None else intercept
        changes["unit"] = transformation.text(t.RESCALE_TYPE).upper() or "US"
    if mapping := groups.item(t.REAL_WORLD):
        changes.update(_real_world(mapping))
    for sequence in (t.MR_FRAME_TYPE, t.CT_FRAME_TYPE, t.PET_FRAME_TYPE):
        if kind := groups.item(sequence):
            parts = (*kind.texts(t.FRAME_TYPE_TAG), kind.text(t.COMPLEX_COMPONENT))
            changes["kind"] = "\\".join(part for part in parts if part)
    if content := groups.item(t.FRAME_CONTENT):
        changes["stack"] = content.text(t.STACK_ID) or base.stack
        _label(labels, "temporal", content.number(t.TEMPORAL_INDEX, "UL"))
        _label(labels, "acquisition", content.number(t.FRAME_ACQUISITION_NUMBER, "US"))
        _label(labels, "acquisition_time", clock(content.text(t.FRAME_ACQUISITION_DATETIME)[8:]))
        _label(labels, "cardiac_percent", content.number(t.CARDIAC_PERCENT, "FD"))
        for number, (pointer, value) in enumerate(
            zip(dimensions, content.numbers(t.DIMENSION_VALUES, "UL"), strict=False)
        ):
            if pointer not in _SPATIAL_POINTERS:
                labels[f"dimension_{number}"] = value
    if echo := groups.item(t.MR_ECHO):
        _label(labels, "echo_time", echo.number(t.ECHO_TIME_EFFECTIVE, "FD"))
    if cardiac := groups.item(t.CARDIAC_SYNC):
        _label(labels, "trigger", cardiac.number(t.TRIGGER_DELAY, "FD"))
    if diffusion := groups.item(t.MR_DIFFUSION):
        _label(labels, "b_value", diffusion.number(t.B_VALUE, "FD"))
        if direction := diffusion.item(t.GRADIENT_SEQUENCE):
            add_gradient(labels, direction.numbers(t.GRADIENT, "FD"))
    if kernel := groups.item(t.CT_KERNEL_SEQUENCE):
        changes["kind"] = f"{changes.get('kind', base.kind)}\\{kernel.text(t.KERNEL)}"
    changes["labels"] = tuple(labels.items())
    return replace(base, **changes)  # type: ignore[arg-type]


def _real_world(mapping: Tags) -> dict[str, object]:
    """Return slope, intercept and unit of a mapping to the units that PET needs; nothing for other units."""
    units = mapping.item(t.MEASUREMENT_UNITS)
    unit = {"Bq/ml": "BQML", "{SUVbw}g/ml": "GML", "g/ml{SUVbw}": "GML"}.get(units.text(t.CODE_VALUE) if units else "")
    slope, intercept = mapping.number(t.REAL_WORLD_SLOPE, "FD"), mapping.number(t.REAL_WORLD_INTERCEPT, "FD")
    if unit is None or slope is None or intercept is None:
        return {}
    return {"slope": slope, "intercept": intercept, "unit": unit}


def add_gradient(labels: dict[str, float], direction: tuple[float, ...]) -> None:
    """Add a diffusion gradient's direction to the labels, if it is one."""
    if len(direction) == 3 and all(math.isfinite(part) for part in direction):
        for axis, part in zip("xyz", direction, strict=True):
            labels[f"gradient_{axis}"] = round(part, 4)


def clock(text: str) -> float | None:
    """Return the seconds of the day of a DICOM time (HHMMSS.FFFFFF), None where it is none."""
    digits = text.strip().replace(":", "")
    for cut in "+-":
        digits = digits.split(cut)[0]
    whole, _, fraction = digits.partition(".")
    if len(whole) not in (2, 4, 6) or not whole.isdigit() or (fraction and not fraction.isdigit()):
        return None
    whole = whole.ljust(6, "0")
    seconds = int(whole[:2]) * 3600 + int(whole[2:4]) * 60 + int(whole[4:6])
    return seconds + (float(f"0.{fraction}") if fraction else 0.0)


def _label(labels: dict[str, float], name: str, value: float | None) -> None:
    if value is not None and math.isfinite(value):
        labels[name] = value


def _pointer(item: Tags) -> int | None:
    numbers = item.numbers(t.DIMENSION_POINTER, "AT")
    if len(numbers) == 2:
        return int(numbers[0]) << 16 | int(numbers[1])
    return None if not numbers or not math.isfinite(numbers[0]) else int(numbers[0])
