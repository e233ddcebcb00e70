"""Planes of one series into stacks: what belongs together, what is a frame of what, which grid they lie on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from medssl.archive.dicom.frames import Slot, equal_frames, places, slot_of, unequal_stacks
from medssl.archive.dicom.geometry import MIN_SLICES, Array, Grid, axes_of, check_spacing, fit_grid
from medssl.archive.dicom.model import DicomHeader, DicomVolume
from medssl.archive.dicom.pet import suv_scale
from medssl.errors import InputRefused

#: Decoded bytes of one volume.
MAX_VOLUME_BYTES = 16 * 2**30
#: Direction cosines and spacings that differ less are one orientation, one spacing.
_SAME_DIRECTION = 2e-3
_SAME_SPACING = 1e-3
_SAME_PLACE_MM = 0.01
Rejected = list[tuple[list[Slot], str, str]]
Leftover = list[tuple[DicomHeader, str, str]]


@dataclass(frozen=True, eq=False)
class Family:
    """Planes of one series that agree in everything that one grid needs.

    Attributes:
        slots: The planes.
        axes: Directions of x, y, z in LPS as rows. Shape: (3, 3).
        spacing: Distance of rows and of columns in mm.
        size: Rows and columns.
        flags: From making the directions orthonormal.
    """

    slots: list[Slot]
    axes: Array
    spacing: tuple[float, float]
    size: tuple[int, int]
    flags: tuple[str, ...]

    def differs_in_orientation(self, other: Family) -> bool:
        """Tell whether the planes point elsewhere."""
        return bool(np.abs(self.axes - other.axes).max() > _SAME_DIRECTION)

    def differs_in_spacing(self, other: Family) -> bool:
        """Tell whether the pixels have another size."""
        return not np.allclose(self.spacing, other.spacing, rtol=_SAME_SPACING)

    def part(self, slots: list[Slot]) -> Family:
        """Return the family with only some planes."""
        return Family(slots, self.axes, self.spacing, self.size, self.flags)

    def grid(self, slots: Sequence[Slot], *, repair: bool) -> Grid:
        """Return the grid of planes at distinct places.

        Raises:
            InputRefused: If there is none.
        """
        header = slots[0].header
        return fit_grid(
            np.array([slot.point for slot in slots]),
            self.axes,
            self.spacing,
            self.size,
            repair=repair,
            told_distance=header.between or header.thickness,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """A volume to be: its frames on one grid.

    Attributes:
        family: Where the planes come from.
        frames: Each frame's planes, in the order that `grid.order` counts.
        grid: Of every frame.
        flags: Quality flags.
    """

    family: Family
    frames: list[list[Slot]]
    grid: Grid
    flags: tuple[str, ...]

    @property
    def headers(self) -> list[DicomHeader]:
        """Return each file once."""
        return list({slot.header.path: slot.header for frame in self.frames for slot in frame}.values())

    def volume(self) -> DicomVolume:
        """Return the plan in plain types.

        Raises:
            InputRefused: If it is too large, or a PET whose SUV cannot be known.
        """
        headers = self.headers
        first = headers[0]
        scale, found = suv_scale(headers) if first.modality == "PT" and not first.colour else (1.0, ())
        paths = {header.path: number for number, header in enumerate(headers)}
        slices = tuple(
            (paths[frame[plane].header.path], frame[plane].frame.number) if plane >= 0 else (-1, -1)
            for frame in self.frames
            for plane in self.grid.order
        )
        colour = first.colour
        if colour and len(self.frames) > 1:
            raise InputRefused("dimensions_unsupported", f"{len(self.frames)} coloured frames of a volume")
        shape = (3 if colour else len(self.frames), len(self.grid.order), *self.grid.size)
        if np.prod(shape, dtype=float) * max(2, first.bits_allocated // 8) > MAX_VOLUME_BYTES:
            raise InputRefused("too_large", f"{' x '.join(str(length) for length in shape)} voxels")
        flags = {flag for header in headers for flag in header.flags}
        flags.update(self.flags, self.grid.flags, self.family.flags, found)
        return DicomVolume(
            paths=tuple(paths),
            slices=slices,
            shape=shape,
            affine=tuple(tuple(float(value) for value in row) for row in self.grid.affine),
            spacing_mm=self.grid.spacing_mm,
            modality=first.modality,
            channels="colour" if colour else "frames" if len(self.frames) > 1 else "scalar",
            geometry=self.grid.geometry,
            flags=tuple(sorted(flags)),
            body_part=next((header.body_part for header in headers if header.body_part), ""),
            shifts=self.grid.shifts,
            scale=scale,
            stored_size=self.family.size,
            patient_id=first.patient_id,
            issuer=first.issuer,
            person=first.person,
            study_uid=first.study_uid,
            series_uid=first.series_uid,
            frame_uid=first.frame_uid,
            series_key=first.series_key,
        )


def families(headers: Sequence[DicomHeader], *, repair: bool) -> tuple[list[Family], Leftover]:
    """Split the planes of one series by what no volume can mix: size, colours, frame of reference, directions, spacing.

    Args:
        headers: Images with a place in the patient.
        repair: Accept direction cosines that are slightly off.
    """
    known = {header.frame_uid for header in headers if header.frame_uid}
    only = next(iter(known)) if len(known) == 1 else ""
    exact: dict[tuple[object, ...], list[Slot]] = defaultdict(list)
    leftovers: Leftover = []
    for header in headers:
        key = (header.modality, header.rows, header.columns, header.colour, header.tiles > 0, header.frame_uid or only)
        for frame in header.frames:
            if len(frame.position) != 3 or not np.isfinite(frame.position).all():
                leftovers.append((header, "position_invalid", "the position is not three finite numbers"))
            else:
                exact[key].append(slot_of(header, frame))
    result: list[Family] = []
    for slots in exact.values():
        clusters: list[Family] = []
        checked: dict[tuple[tuple[float, ...], tuple[float, ...]], Family | InputRefused] = {}
        for slot in slots:
            told = (slot.frame.orientation, slot.frame.spacing)
            if told not in checked:
                checked[told] = _cluster(slot, clusters, repair)
            home = checked[told]
            if isinstance(home, InputRefused):
                leftovers.append((slot.header, home.code, home.detail))
            else:
                home.slots.append(slot)
        result.extend(clusters)
    return [family for family in result if family.slots], leftovers


def _cluster(slot: Slot, clusters: list[Family], repair: bool) -> Family | InputRefused:
    try:
        axes, changed = axes_of(slot.frame.orientation, repair=repair)
        spacing = check_spacing(slot.frame.spacing)
    except InputRefused as refusal:
        return refusal
    size = (slot.header.rows, slot.header.columns)
    candidate = Family([], axes, spacing, size, ("orientation_orthonormalised",) if changed else ())
    for family in clusters:
        if not (family.differs_in_orientation(candidate) or family.differs_in_spacing(candidate)):
            return family
    clusters.append(candidate)
    return candidate


#: What makes planes different images, in the order in which it is tried.
_KINDS: tuple[Callable[[Slot], str], ...] = (
    lambda slot: slot.frame.kind,
    lambda slot: slot.header.kernel,
    lambda slot: slot.frame.stack,
    lambda slot: slot.header.sop_class,
)
_STACK = 2


def solve(family: Family, *, repair: bool, tried: int = 0) -> tuple[list[Plan], Rejected]:
    """Return the volumes of a family, and planes that are in none with the reason.

    Args:
        family: Planes that agree in size, spacing and directions.
        repair: Repair geometry where that is possible.
        tried: How many of the kinds have been tried to split it.
    """
    by_place = places(family.slots, family.axes[2], min(_SAME_PLACE_MM, 0.05 * min(family.spacing)))
    repeated = len(by_place) < len(family.slots)
    if not repeated:
        try:
            return [Plan(family, [family.slots], family.grid(family.slots, repair=False), ())], []
        except InputRefused as refusal:
            reason = refusal
    for number in range(tried, len(_KINDS)):
        parts = _split(family, _KINDS[number])
        explains = _explains(_KINDS[number], by_place)
        if len(parts) > 1 and (explains or _strays(parts) or _are_stacks(number, parts)):
            plans: list[Plan] = []
            rejected: Rejected = []
            for part in parts:
                accepted, refused = solve(part, repair=repair, tried=number + 1)
                plans.extend(accepted)
                rejected.extend(refused)
            if explains or plans:
                return plans, [_odd_kind(entry, bool(plans)) for entry in rejected]
    if repeated:
        return _frames(family, by_place, repair)
    if repair:
        try:
            return [Plan(family, [family.slots], family.grid(family.slots, repair=True), ())], []
        except InputRefused as refusal:
            reason = refusal
    return [], [(family.slots, reason.code, reason.detail)]


def _split(family: Family, kind: Callable[[Slot], str]) -> list[Family]:
    parts: dict[str, list[Slot]] = defaultdict(list)
    for slot in family.slots:
        parts[kind(slot)].append(slot)
    return [family.part(parts[name]) for name in sorted(parts)]


def _strays(parts: Sequence[Family]) -> bool:
    """Tell whether a few odd planes lie beside one stack: splitting anything else could pass gaps off as spacing."""
    sizes = sorted(len(part.slots) for part in parts)
    return sizes[-1] >= MIN_SLICES and all(size < MIN_SLICES for size in sizes[:-1])


def _explains(kind: Callable[[Slot], str], by_place: Sequence[Sequence[Slot]]) -> bool:
    """Tell whether images at one place differ in kind: a kind that merely alternates along the stack splits nothing."""
    return any(len({kind(slot) for slot in group}) > 1 for group in by_place)


def _are_stacks(number: int, parts: Sequence[Family]) -> bool:
    """Tell whether parts are declared stacks, one after the other along the normal."""
    if number != _STACK:
        return False
    ranges = []
    for part in parts:
        along = [float(slot.point @ part.axes[2]) for slot in part.slots]
        ranges.append((min(along), max(along)))
    ranges.sort()
    return all(first[1] < second[0] for first, second in pairwise(ranges))


def _odd_kind(entry: tuple[list[Slot], str, str], beside_volume: bool) -> tuple[list[Slot], str, str]:
    slots, code, detail = entry
    return (slots, "mixed_type", detail) if code == "too_few_slices" and beside_volume else entry


def _frames(family: Family, by_place: list[list[Slot]], repair: bool) -> tuple[list[Plan], Rejected]:
    """Return volumes of planes that share places."""
    if len(by_place) == 1:
        return [], [(family.slots, "single_position", f"{len(family.slots)} images at one place")]
    equal = equal_frames(by_place)
    if equal is not None:
        frames, by_number = equal
        return _frames_on_grid(family, frames, repair, ("frames_by_number",) if by_number else ())
    stacks = unequal_stacks(by_place, MIN_SLICES)
    if stacks is not None:
        return _overlapping(family, stacks, by_place, repair)
    most = max(len(group) for group in by_place)
    return [], [
        (
            family.slots,
            "position_repeated",
            f"{len(family.slots)} images at {len(by_place)} places, up to {most} at one",
        )
    ]


def _frames_on_grid(
    family: Family, frames: list[list[Slot]], repair: bool, flags: tuple[str, ...]
) -> tuple[list[Plan], Rejected]:
    try:
        grid = family.grid(frames[0], repair=repair)
    except InputRefused as refusal:
        return [], [([slot for frame in frames for slot in frame], refusal.code, refusal.detail)]
    return [Plan(family, frames, grid, flags)], []


def _overlapping(
    family: Family, stacks: list[list[Slot]], by_place: list[list[Slot]], repair: bool
) -> tuple[list[Plan], Rejected]:
    """Return volumes of stacks that cover different places; those with equal places are frames of one volume."""
    number_of = {id(slot): number for number, group in enumerate(by_place) for slot in group}
    bundles: dict[tuple[int, ...], list[list[Slot]]] = defaultdict(list)
    for stack in stacks:
        ordered = sorted(stack, key=lambda slot: number_of[id(slot)])
        bundles[tuple(number_of[id(slot)] for slot in ordered)].append(ordered)
    plans: list[Plan] = []
    rejected: Rejected = []
    for covered, frames in sorted(bundles.items()):
        slots = [slot for frame in frames for slot in frame]
        whole = [other for places_, other in bundles.items() if set(covered) < set(places_)]
        if not whole:
            accepted, refused = _frames_on_grid(family, frames, repair, ())
            plans.extend(accepted)
            rejected.extend(refused)
        elif max(len(other) for other in whole) > 1:
            rejected.append((slots, "incomplete_frame", f"{len(covered)} of {len(by_place)} slices"))
        else:
            detail = f"{len(covered)} places hold a second image"
            return [], [(family.slots, "position_repeated", detail)]
    return plans, rejected
