"""Labels from a DICOM SEG: its frames are laid on the volume by their place, whatever their order and number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.decode import StoredFrames
from medssl.archive.dicom.geometry import axes_of, check_spacing
from medssl.archive.dicom.header import pixel_format
from medssl.archive.dicom.model import DicomHeader
from medssl.archive.dicom.reading import Opened, open_header
from medssl.archive.dicom.regions import LabelMap, label_text
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

_KIND, _SEGMENTS, _NUMBER, _LABEL, _TYPE = 0x00620001, 0x00620002, 0x00620004, 0x00620005, 0x0062000F
_IDENTIFICATION, _REFERENCED, _MEANING = 0x0062000A, 0x0062000B, 0x00080104
_WANTED = sorted({*t.top_level(), t.CHARACTER_SET, _KIND, _SEGMENTS})
_MOST_SEGMENTS = 65535


@dataclass(frozen=True)
class SegmentationObject:
    """A DICOM SEG whose header was read.

    Attributes:
        path: The file.
        segments: Label by segment number; several segments may have one label.
        label_map: Whether pixels are segment numbers (a LABELMAP SEG) and not one segment's mask.
        opened: Its elements up to the pixels.
    """

    path: Path
    segments: dict[int, str]
    label_map: bool
    opened: Opened

    @property
    def names(self) -> list[str]:
        """Return each label once."""
        return list(dict.fromkeys(self.segments.values()))


def open_segmentation(path: Path) -> SegmentationObject:
    """Read the header of a SEG; call it in a process with limits.

    Raises:
        InputRefused: If it is fractional, or its segments cannot be told apart.
    """
    opened = open_header(path, _WANTED)
    header = Tags(opened.dataset)
    kind = header.text(_KIND).upper()
    if kind not in ("BINARY", "LABELMAP"):
        raise InputRefused("segmentation_unsupported", "fractional segments" if kind == "FRACTIONAL" else "its type")
    items = header.sequence(_SEGMENTS)
    segments: dict[int, str] = {}
    for item in items:
        number = item.integer(_NUMBER)
        coded = item.item(_TYPE)
        name = label_text(header, item, _LABEL) or (label_text(header, coded, _MEANING) if coded else "")
        background = kind == "LABELMAP" and number == 0
        if number is None or number in segments or not (name or background):
            raise InputRefused("segmentation_invalid", "a segment without number or name, or a number given twice")
        if not background:
            segments[number] = name
    if not segments or len(segments) > _MOST_SEGMENTS:
        raise InputRefused("segmentation_invalid", f"{len(segments)} segments")
    return SegmentationObject(path, segments, kind == "LABELMAP", opened)


def paint_segmentation(found: SegmentationObject, labels: LabelMap) -> None:
    """Paint the segments whose labels the map has.

    Args:
        found: From `open_segmentation`.
        labels: The map; frames without any of its labels are not looked at.

    Raises:
        InputRefused: If a frame does not lie on the map's grid, or cannot be decoded.
    """
    header = Tags(found.opened.dataset)
    facts: dict[str, Any] = pixel_format(header, found.opened)
    if facts["samples"] != 1 or facts["bits_allocated"] > 16:
        raise InputRefused("pixel_format_unsupported", f"a mask of {facts['bits_allocated']} bits")
    places = _places(header, facts["frame_count"], found.label_map)
    size = (facts["rows"], facts["columns"])
    image = DicomHeader(
        str(found.path), transfer_syntax=found.opened.transfer_syntax, **{**facts, "padding": None, "flags": ()}
    )
    wanted = {number: name for number, name in found.segments.items() if name in labels.names}
    for frame, place in zip(StoredFrames.open(found.path, image).frames(), places, strict=True):
        number, geometry = place
        if not found.label_map and number not in found.segments:
            raise InputRefused("segmentation_invalid", f"a frame of segment {number}, which is not described")
        for segment, name in wanted.items():
            if not found.label_map and segment != number:
                continue
            mask = frame == segment if found.label_map else frame != 0
            if not mask.any():
                continue
            view, (rows, columns), whole = labels.plane(*geometry, size)
            inner = mask[rows, columns]
            if not whole and int(inner.sum()) != int(mask.sum()):
                raise InputRefused("label_grid_differs", "it reaches beyond the volume")
            labels.paint(name, view, inner)


_Geometry = tuple[Any, Any, Any, tuple[float, float]]


def _places(header: Tags, count: int, label_map: bool) -> list[tuple[int, _Geometry]]:
    """Return segment number and geometry (position, row, column, spacing) of each frame."""
    shared = header.item(t.SHARED_GROUPS)
    items = header.sequence(t.PER_FRAME_GROUPS)
    if len(items) != count:
        raise InputRefused("multiframe_invalid", f"{count} frames, places of {len(items)}")
    places = []
    for item in items:
        number = 0
        if not label_map:
            told = _group(item, shared, _IDENTIFICATION)
            referenced = told.integer(_REFERENCED) if told else None
            if referenced is None:
                raise InputRefused("segmentation_invalid", "a frame of no segment")
            number = referenced
        position = _numbers(item, shared, t.PLANE_POSITION, t.POSITION)
        orientation = _numbers(item, shared, t.PLANE_ORIENTATION, t.ORIENTATION)
        if len(position) != 3 or not np.isfinite(position).all():
            raise InputRefused("position_missing", "a frame without position")
        axes, _ = axes_of(orientation, repair=False)
        spacing = check_spacing(_numbers(item, shared, t.PIXEL_MEASURES, t.SPACING))
        places.append((number, (np.array(position), axes[0], axes[1], spacing)))
    return places


def _group(item: Tags, shared: Tags | None, tag: int) -> Tags | None:
    return item.item(tag) or (shared.item(tag) if shared is not None else None)


def _numbers(item: Tags, shared: Tags | None, group: int, tag: int) -> Sequence[float]:
    found = _group(item, shared, group)
    return found.numbers(tag) if found is not None else ()
