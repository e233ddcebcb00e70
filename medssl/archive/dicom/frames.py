"""Planes at the same place: time points, echoes, b-values and phases become frames; nothing is told apart by luck."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medssl.archive.dicom.model import DicomHeader, Frame

#: Labels by which frames are told apart, in this order, if their values are the same at every place.
_EXACT = (
    "temporal",
    "echo_time",
    "echo_number",
    "inversion",
    "flip",
    "b_value",
    "gradient_x",
    "gradient_y",
    "gradient_z",
    "kvp",
    "cardiac_percent",
    "trigger",
    "trigger_delay",
    "frame_reference",
    "acquisition",
    "dimension_0",
    "dimension_1",
    "dimension_2",
    "dimension_3",
    "dimension_4",
    "acquisition_time",
    "content_time",
)
#: Labels whose rank tells frames apart: heart phases, and times and numbers that run frame by frame or place by place.
_RANKED = ("trigger", "trigger_delay", "acquisition", "acquisition_time", "content_time", "instance")
#: Order of the frames of a volume: as they were taken, echoes and phases before that.
_ORDER = (
    "temporal",
    "echo_time",
    "echo_number",
    "inversion",
    "cardiac_percent",
    "trigger",
    "frame_reference",
    "dimension_0",
    "dimension_1",
    "dimension_2",
    "dimension_3",
    "dimension_4",
    "acquisition",
)
#: Labels that split a series whose places are not all filled equally often.
_UNEQUAL = ("acquisition", "temporal", "echo_time", "b_value", "kvp", "trigger", "acquisition_time")


@dataclass(frozen=True, eq=False)
class Slot:
    """One plane of one file.

    Attributes:
        header: The file.
        frame: The plane.
        point: Position in LPS mm. Shape: (3,).
        labels: What may set it apart from others at its place.
    """

    header: DicomHeader
    frame: Frame
    point: NDArray[np.float64]
    labels: dict[str, float]


def slot_of(header: DicomHeader, frame: Frame) -> Slot:
    """Return the plane with labels of the file and of the frame."""
    labels = dict(frame.labels)
    # In one file the frames' own order stands for the instance number; it only breaks ties.
    labels["instance"] = labels.get("instance", 0.0) * 1e6 + frame.number
    return Slot(header, frame, np.asarray(frame.position, float), labels)


def places(slots: Sequence[Slot], normal: NDArray[np.float64], tolerance: float) -> list[list[Slot]]:
    """Return the planes by place, places ordered along the normal.

    Args:
        slots: Planes of one orientation.
        normal: Unit normal. Shape: (3,).
        tolerance: Distance in mm within which two planes are at one place.
    """
    along = np.array([slot.point @ normal for slot in slots])
    result: list[list[Slot]] = []
    heads: list[tuple[float, NDArray[np.float64]]] = []
    for index in np.argsort(along, kind="stable"):
        slot, height = slots[index], float(along[index])
        for number in range(len(heads) - 1, -1, -1):
            if height - heads[number][0] > tolerance:
                number = -1
                break
            if float(np.abs(slot.point - heads[number][1]).max()) <= tolerance:
                result[number].append(slot)
                break
        else:
            number = -1
        if number < 0:
            result.append([slot])
            heads.append((height, slot.point))
    return result


def equal_frames(by_place: Sequence[Sequence[Slot]]) -> tuple[list[list[Slot]], bool] | None:
    """Return the planes as frames (each one plane a place, in the order of places) where every place holds as many.

    Returns:
        The frames in their order and whether only the instance numbers told them apart; None if nothing does.
    """
    count = len(by_place[0])
    if any(len(group) != count for group in by_place):
        return None
    chosen: list[str] = []
    for name in _EXACT:
        if not all(name in slot.labels for group in by_place for slot in group):
            continue
        trial = [*chosen, name]
        if _same_everywhere(by_place, trial):
            if len(set(_labels(by_place[0], trial))) > len(set(_labels(by_place[0], chosen))):
                chosen = trial
            if len(set(_labels(by_place[0], chosen))) == count:
                break
    ordered = [sorted(group, key=lambda slot: _label(slot, chosen)) for group in by_place]
    by_number = False
    if len(set(_labels(by_place[0], chosen))) < count:
        classes = sorted(Counter(_labels(by_place[0], chosen)).items())
        for name in _RANKED:
            ranked = _rank(ordered, [size for _, size in classes], name)
            if ranked is not None:
                ordered, by_number = ranked, name == "instance"
                break
        else:
            return None
    frames = [[group[number] for group in ordered] for number in range(count)]
    return sorted(frames, key=lambda frame: _taken(frame, chosen)), by_number


def unequal_stacks(by_place: Sequence[Sequence[Slot]], least: int) -> list[list[Slot]] | None:
    """Return stacks of planes at distinct places, split by one label, where places are filled unequally often.

    Args:
        by_place: Planes by place.
        least: Planes that at least one stack must have.
    """
    slots = [slot for group in by_place for slot in group]
    most = max(len(group) for group in by_place)
    for name in _UNEQUAL:
        if not all(name in slot.labels for slot in slots):
            continue
        parts: dict[float, list[Slot]] = defaultdict(list)
        distinct = True
        for group in by_place:
            values = [slot.labels[name] for slot in group]
            distinct = distinct and len(set(values)) == len(values)
            for value, slot in zip(values, group, strict=True):
                parts[value].append(slot)
        if distinct and len(parts) <= 2 * most and max(len(part) for part in parts.values()) >= least:
            return [parts[value] for value in sorted(parts)]
    return None


def _label(slot: Slot, names: Sequence[str]) -> tuple[float, ...]:
    return tuple(round(slot.labels[name], 3) for name in names)


def _labels(group: Sequence[Slot], names: Sequence[str]) -> list[tuple[float, ...]]:
    return [_label(slot, names) for slot in group]


def _same_everywhere(by_place: Sequence[Sequence[Slot]], names: Sequence[str]) -> bool:
    first = sorted(_labels(by_place[0], names))
    return all(sorted(_labels(group, names)) == first for group in by_place[1:])


def _rank(ordered: Sequence[Sequence[Slot]], classes: Sequence[int], name: str) -> list[list[Slot]] | None:
    """Return each place's planes with equal labels ordered by one more value, if the value tells them apart everywhere.

    Heart phases may be ranked within each place. Anything else must run frame by frame (all of one frame before the
    next) or place by place, or its order would be an accident.
    """
    if not all(name in slot.labels for group in ordered for slot in group):
        return None
    result = [list(group) for group in ordered]
    start = 0
    for size in classes:
        part = [sorted(group[start : start + size], key=lambda slot: slot.labels[name]) for group in result]
        values = np.array([[slot.labels[name] for slot in group] for group in part])  # (places, frames)
        if (np.diff(values, axis=1) <= 0).any():
            return None
        frame_by_frame = bool((values[:, :-1].max(axis=0) < values[:, 1:].min(axis=0)).all())
        by_first = values[np.argsort(values[:, 0])]
        place_by_place = bool((by_first[:-1, -1] < by_first[1:, 0]).all())
        if not (frame_by_frame or (place_by_place and name != "acquisition") or name.startswith("trigger")):
            return None
        for group, sorted_part in zip(result, part, strict=True):
            group[start : start + size] = sorted_part
        start += size
    return result


def _taken(frame: Sequence[Slot], chosen: Sequence[str]) -> tuple[float, ...]:
    """Return what frames are ordered by: what the labels say, then when they were taken."""
    key = [min(slot.labels.get(name, 0.0) for slot in frame) for name in _ORDER]
    key.append(min(slot.labels.get("acquisition_time", 0.0) for slot in frame))
    first = min(slot.labels["instance"] for slot in frame)
    # The order of frames inside one file means nothing; numbers of files follow the acquisition.
    key.append(first if frame[0].header.frame_count == 1 else 0.0)
    key.extend(_label(frame[0], chosen))
    return (*key, first)
