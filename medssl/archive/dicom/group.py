"""Headers to volumes: each file of a series ends in a volume, among the related objects, or refused with a code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Literal

from medssl.archive.dicom.duplicates import folder_copies, split_duplicates
from medssl.archive.dicom.kinds import PICTURES, is_secondary_capture
from medssl.archive.dicom.model import DicomHeader, DicomVolume
from medssl.archive.dicom.picture import plan_picture
from medssl.archive.dicom.stack import Family, Plan, families, solve
from medssl.errors import InputRefused

Geometry = Literal["strict", "repair"]


@dataclass
class GroupResult:
    """Where each file went.

    Attributes:
        volumes: Accepted volumes.
        related: Path and kind of objects that are no volumes.
        refused: Path, code and detail of files that are in no volume.
    """

    volumes: list[DicomVolume] = field(default_factory=list)
    related: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)


def group(headers: Sequence[DicomHeader], geometry: Geometry = "strict", root: Path | None = None) -> GroupResult:
    """Group the files of one or several series into volumes.

    Args:
        headers: From `read_header`; all files of a series must be given together.
        geometry: `strict` refuses what is no regular grid; `repair` resamples tilt, interpolates single gaps and takes
            two slices.
        root: Folder that the headers' paths are relative to; files are opened only to compare suspected copies.

    Returns:
        Every header's path in exactly one place, in an order that does not depend on that of `headers`.
    """
    result = GroupResult()
    series: dict[str, list[DicomHeader]] = defaultdict(list)
    for header in headers:
        if header.related:
            result.related.append((header.path, header.related))
        else:
            series[header.series_key].append(header)
    for key in sorted(series):
        _series(sorted(series[key], key=lambda header: header.path), geometry == "repair", root, result)
    result.volumes.sort(key=lambda volume: (volume.series_key, volume.paths, volume.slices))
    result.related.sort()
    result.refused.sort()
    return result


def same_person(first: Sequence[str], second: Sequence[str]) -> bool:
    """Tell whether two images can be of one person, by the digests of birth date, sex and name.

    Facts that are absent contradict nothing. Equal birth dates outweigh different names (marriage); different names
    count where a birth date is missing, unless they share a part.

    Args:
        first: `person` of one header.
        second: `person` of another.
    """
    if not first or not second:
        return True
    if first[0] and second[0]:
        return first[0] == second[0]
    if first[1] and second[1] and first[1] != second[1]:
        return False
    names_first, names_second = set(first[2:]), set(second[2:])
    return not names_first or not names_second or bool(names_first & names_second)


def _series(headers: list[DicomHeader], repair: bool, root: Path | None, result: GroupResult) -> None:
    if _two_patients(headers):
        detail = f"{len(headers)} images of one series differ in patient ID or person"
        result.refused.extend((header.path, "series_of_two_patients", detail) for header in headers)
        return
    usable, copies = split_duplicates([header for header in headers if not header.problem], root)
    parts = folder_copies(usable, copies)
    if parts is None:
        _one_copy(headers, usable, copies, repair, result)
        return
    whole = next(iter(parts.values()))
    for header in headers:
        if not any(header.path in paths for paths in parts.values()):
            folder = str(PurePath(header.path).parent)
            parts.get(folder, whole).add(header.path)  # a file that cannot be used marks the rest of its folder
    for paths in parts.values():
        part = [header for header in headers if header.path in paths]
        usable, copies = split_duplicates([header for header in part if not header.problem], root)
        known = len(result.volumes)
        _one_copy(part, usable, copies, repair, result)
        result.volumes[known:] = [
            _with_flags(volume, {*volume.flags, "copy_in_other_folder"}) for volume in result.volumes[known:]
        ]


def _one_copy(
    headers: Sequence[DicomHeader],
    usable: Sequence[DicomHeader],
    copies: list[tuple[DicomHeader, DicomHeader]],
    repair: bool,
    result: GroupResult,
) -> None:
    refused: dict[str, tuple[str, str]] = {header.path: _problem(header) for header in headers if header.problem}
    volumes: list[DicomVolume] = []
    plans, leftovers = _plan_stacks([header for header in usable if not header.picture], repair)
    for plan in plans:
        try:
            volumes.append(plan.volume())
        except InputRefused as refusal:
            leftovers.extend((header, refusal.code, refusal.detail) for header in plan.headers)
    by_path: dict[str, tuple[DicomHeader, str, str]] = {}
    for header, code, detail in leftovers:
        by_path.setdefault(header.path, (header, code, detail))
    in_volume = {path for volume in volumes for path in volume.paths}
    single = [header for header in usable if header.picture]
    # One image file may give planes to a volume and others to none: it counts as used.
    partly = any(path in in_volume for path in by_path)
    for path, (header, code, detail) in by_path.items():
        if path in in_volume:
            continue
        if header.modality in PICTURES and code in ("too_few_slices", "single_position", "mixed_orientation"):
            single.append(header)  # a picture that happens to tell its place
        elif is_secondary_capture(header.sop_class) and code in ("too_few_slices", "mixed_orientation", "mixed_size"):
            result.related.append((path, "secondary_capture"))
        else:
            refused[path] = (code, detail)
    for header in single:
        try:
            volumes.append(plan_picture(header))
        except InputRefused as refusal:
            refused[header.path] = (refusal.code, refusal.detail)
    _finish(volumes, copies, refused, partly, result)


def _finish(
    volumes: list[DicomVolume],
    copies: list[tuple[DicomHeader, DicomHeader]],
    refused: dict[str, tuple[str, str]],
    partly: bool,
    result: GroupResult,
) -> None:
    """Add the volumes with what is known of the whole series, and the files that are in none of them."""
    copied_from = {original.path for _, original in copies}
    stacks = [volume for volume in volumes if volume.geometry != "picture"]
    for volume in volumes:
        flags = set(volume.flags)
        if copied_from.intersection(volume.paths):
            flags.add("duplicates_dropped")
        if volume.geometry != "picture":
            if refused or partly:
                flags.add("series_partly_refused")
            if len(stacks) > 1:
                flags.add("series_split")
        result.volumes.append(_with_flags(volume, flags))
    result.refused.extend((path, code, detail) for path, (code, detail) in refused.items())
    for copy, original in copies:
        if original.path in refused:
            result.refused.append((copy.path, *refused[original.path]))
        else:
            result.related.append((copy.path, "duplicate_slice"))


def _plan_stacks(headers: list[DicomHeader], repair: bool) -> tuple[list[Plan], list[tuple[DicomHeader, str, str]]]:
    plans: list[Plan] = []
    leftovers: list[tuple[DicomHeader, str, str]] = []
    found, invalid = families(headers, repair=repair)
    leftovers.extend(invalid)
    largest = max(found, key=lambda family: len(family.slots), default=None)
    for family in found:
        accepted, rejected = solve(family, repair=repair)
        plans.extend(accepted)
        for slots, code, detail in rejected:
            if code == "too_few_slices" and largest is not None and family is not largest:
                code, detail = _odd_one(family, largest, len(found), code, detail)
            leftovers.extend(
                (header, code, detail) for header in {slot.header.path: slot.header for slot in slots}.values()
            )
    if largest is not None and len(found) > 1:
        leftovers = [_odd_leftover(entry, found, largest) for entry in leftovers]
    return plans, leftovers


def _odd_one(family: Family, largest: Family, count: int, code: str, detail: str) -> tuple[str, str]:
    """Return the code of a few slices beside others of their series: what sets them apart is what is worth telling."""
    for name, apart in (
        ("mixed_orientation", family.differs_in_orientation(largest)),
        ("mixed_size", family.size != largest.size),
        ("mixed_spacing", family.differs_in_spacing(largest)),
        ("mixed_type", True),
    ):
        if apart:
            return name, f"{detail}; the series has {count} kinds of slices"
    return code, detail


def _odd_leftover(
    entry: tuple[DicomHeader, str, str], found: Sequence[Family], largest: Family
) -> tuple[DicomHeader, str, str]:
    """If even the largest kind is too small, the mixture is the reason for all of them."""
    header, code, detail = entry
    if code != "too_few_slices" or not any(slot.header is header for slot in largest.slots):
        return entry
    others = [family for family in found if family is not largest]
    code, detail = _odd_one(largest, max(others, key=lambda family: len(family.slots)), len(found), code, detail)
    return header, code, detail


def _two_patients(headers: Sequence[DicomHeader]) -> bool:
    identities = {(header.issuer, header.patient_id) for header in headers if header.patient_id}
    if len({patient_id for _, patient_id in identities}) > 1:
        return True
    if len({issuer for issuer, _ in identities if issuer}) > 1:
        return True
    persons = sorted({header.person for header in headers})
    return any(
        not same_person(first, second) for number, first in enumerate(persons) for second in persons[number + 1 :]
    )


def _problem(header: DicomHeader) -> tuple[str, str]:
    code, detail = header.problem
    return code, detail


def _with_flags(volume: DicomVolume, flags: set[str]) -> DicomVolume:
    return replace(volume, flags=tuple(sorted(flags)))
