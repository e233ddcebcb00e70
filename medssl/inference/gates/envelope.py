"""The ranges that training cases span, and how far outside of them a case lies.

The allowances are policy and not fitted: an axis may lie beyond the training cases by the factor `REVIEW` before a
person is asked, and by `REFUSE` before the case is out of the question. They are written into `gates.json`, where a
site can change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.archive.volume import IMAGE_MODALITY, UNKNOWN_MODALITY
from medssl.augmentation.policy import known_modality
from medssl.errors import UsageError
from medssl.inference.gates.measured import Measured
from medssl.inference.gates.verdict import Level, Reason

#: Factor beyond the training cases: up to the first accepted, up to the second a review, further refused.
REVIEW = {"spacing": 1.25, "extent": 1.5, "volume": 1.5}
REFUSE = {"spacing": 3.0, "extent": 5.0}
#: Part of the width of the training cases' range by which a percentile may lie outside of it.
INTENSITY_ALLOWANCE = 0.5
AXES = ("z", "y", "x")
Range = tuple[float, float]


@dataclass(frozen=True)
class Envelope:
    """What the training cases were like.

    Args:
        channels: Number of input channels.
        modality: DICOM's code, or None where nothing says.
        reorients: Whether the model's reader turns every volume to RAS+.
        orientations: Of the training cases; counts where the reader does not turn.
        volumetric: Whether no training case was a single slice.
        spacing_mm: Per axis (z, y, x) in the reader's axes.
        extent_mm: Per axis.
        raw: Whether stored intensities have a unit (CT in HU), so that they are compared.
        intensity: Per channel the range of each percentile: of stored intensities if `raw`, else of normalised ones.
        volumes_ml: Per label, of those training cases that have it.
        always: Labels that every training case has.
        parts: Per label, the most connected parts.
        cases: Number of training cases.
        allowances: Factors and parts by which a case may lie outside.
    """

    channels: int
    modality: str | None
    reorients: bool
    orientations: tuple[str, ...]
    volumetric: bool
    spacing_mm: tuple[Range, ...]
    extent_mm: tuple[Range, ...]
    raw: bool
    intensity: tuple[tuple[Range, ...], ...]
    volumes_ml: Mapping[str, Range]
    always: tuple[str, ...]
    parts: Mapping[str, int]
    cases: int
    allowances: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {**vars(self), "volumes_ml": dict(self.volumes_ml), "parts": dict(self.parts)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Envelope:
        """Return what `to_json` wrote."""

        def ranges(values: Sequence[Sequence[float]]) -> tuple[Range, ...]:
            return tuple((float(low), float(high)) for low, high in values)

        return cls(
            **{
                **content,
                "orientations": tuple(content["orientations"]),
                "spacing_mm": ranges(content["spacing_mm"]),
                "extent_mm": ranges(content["extent_mm"]),
                "intensity": tuple(ranges(channel) for channel in content["intensity"]),
                "volumes_ml": {name: (float(a), float(b)) for name, (a, b) in content["volumes_ml"].items()},
                "always": tuple(content["always"]),
            }
        )

    def of_image(self, found: Measured) -> list[Reason]:
        """Judge what is known before the network sees the case."""
        reasons = self._of_kind(found)
        if found.spacing_mm is not None:
            reasons += self._by_axis("spacing", found.spacing_mm, self.spacing_mm, "mm of voxel size")
        if found.extent_mm is not None:
            reasons += self._by_axis("extent", found.extent_mm, self.extent_mm, "mm of extent")
        if any(high - low <= 1e-6 * max(abs(high), 1.0) for low, _, high in found.raw):
            words = "nearly all voxels have one value"
            reasons.append(Reason("intensity_constant", "refused", words, "more than one value", words))
        if self.raw:
            reasons += self._intensity(found.raw, "")
        return reasons

    def of_input(self, found: Measured) -> list[Reason]:
        """Judge the network's input, where stored intensities have no unit."""
        return [] if self.raw else self._intensity(found.normalised, " after normalisation")

    def of_mask(self, found: Measured) -> list[Reason]:
        """Judge the mask."""
        reasons = []
        factor = self.allowances["review"]["volume"]
        for name, (low, high) in self.volumes_ml.items():
            volume = found.volumes_ml.get(name)
            if volume is None:
                continue
            if volume == 0:
                if name in self.always:
                    words = f"{name} was not found; every training case has it"
                    reasons.append(Reason("organ_not_found", "review", 0.0, (low / factor, None), words))
                continue
            reasons += _outside("volume_unlike", volume, (low, high), factor, None, f"{name}: ", "ml")
            most, parts = self.parts[name], found.parts.get(name, 0)
            if parts > most:
                words = f"{name} has {parts} parts, training cases have {most} at most"
                reasons.append(Reason("parts_unlike", "review", float(parts), (1.0, float(most)), words))
        return reasons

    def _of_kind(self, found: Measured) -> list[Reason]:
        reasons = []
        if found.raw and len(found.raw) != self.channels:
            words = f"{len(found.raw)} channels, the model takes {self.channels}"
            counts = (float(self.channels), float(self.channels))
            reasons.append(Reason("channel_count", "refused", float(len(found.raw)), counts, words))
        modality = _common(found.modality)
        known = modality not in (UNKNOWN_MODALITY, "")
        wrong = known and self.modality is not None and modality != self.modality
        if wrong or (modality == IMAGE_MODALITY != self.modality):
            kind = "a picture" if modality == IMAGE_MODALITY else modality
            words = f"{kind}, the model was trained on {self.modality or 'volumes'}"
            reasons.append(Reason("modality_unlike", "refused", modality, self.modality or "volumes", words))
        if self.volumetric and found.slices == 1:
            words = "a single slice, the model was trained on volumes"
            reasons.append(Reason("single_slice", "refused", 1.0, (2.0, None), words))
        if not self.reorients and found.orientation and found.orientation not in self.orientations:
            allowed = ", ".join(self.orientations)
            words = f"axes run {found.orientation}, training cases {allowed}, and this model does not turn them"
            reasons.append(Reason("orientation_unlike", "refused", found.orientation, allowed, words))
        return reasons

    def _by_axis(self, name: str, values: Sequence[float], ranges: Sequence[Range], unit: str) -> list[Reason]:
        review, refuse = self.allowances["review"][name], self.allowances["refuse"][name]
        return [
            reason
            for axis, value, allowed in zip(AXES, values, ranges, strict=True)
            for reason in _outside(f"{name}_unlike", value, allowed, review, refuse, f"{axis}: ", unit)
        ]

    def _intensity(self, channels: Sequence[Sequence[float]], what: str) -> list[Reason]:
        """Judge percentiles; refuse intensities whose whole range misses that of every training case."""
        reasons = []
        for number, (values, ranges) in enumerate(zip(channels, self.intensity, strict=False)):
            title = f"channel {number}: " if self.channels > 1 else ""
            widest = max(ranges[-1][1] - ranges[0][0], 1e-6)
            if values[-1] < ranges[0][0] or values[0] > ranges[-1][1]:
                text = f"{title}intensities from {values[0]:.4g} to {values[-1]:.4g}{what} lie wholly outside of "
                text += f"training's {ranges[0][0]:.4g} to {ranges[-1][1]:.4g}"
                whole = (ranges[0][0], ranges[-1][1])
                reasons.append(Reason("intensity_unlike", "refused", values[1], whole, text))
                continue
            for kind, value, (low, high) in zip(("0.5th", "50th", "99.5th"), values, ranges, strict=True):
                # The three ranges differ in width; a tenth of the whole keeps a narrow one from being a knife's edge.
                room = self.allowances["intensity"] * max(high - low, 0.1 * widest)
                if not low - room <= value <= high + room:
                    allowed = (low - room, high + room)
                    text = f"{title}the {kind} percentile of intensities{what} is {value:.4g}; accepted: "
                    text += f"{allowed[0]:.4g} to {allowed[1]:.4g}"
                    reasons.append(Reason("intensity_unlike", "review", value, allowed, text))
        return reasons


def fit_envelope(
    training: Sequence[Measured],
    *,
    channels: int,
    modality: str | None,
    reorients: bool,
    raw: bool,
) -> Envelope:
    """Return what training cases span.

    Args:
        training: Images and inputs of the training cases, with volumes and parts of their labels.
        channels: Number of input channels.
        modality: DICOM's code, or None.
        reorients: Whether the model's reader turns every volume.
        raw: Whether stored intensities have a unit.
    """

    def span(values: Callable[[Measured], Any]) -> tuple[Range, ...]:
        table = np.asarray([values(case) for case in training], np.float64)
        return tuple((float(a), float(b)) for a, b in zip(table.min(axis=0), table.max(axis=0), strict=True))

    names = list(training[0].volumes_ml)
    volumes = {name: [case.volumes_ml[name] for case in training if case.volumes_ml[name] > 0] for name in names}
    return Envelope(
        channels=channels,
        modality=modality,
        reorients=reorients,
        orientations=tuple(sorted({case.orientation for case in training})),
        volumetric=all((case.slices or 1) > 1 for case in training),
        spacing_mm=span(lambda case: case.spacing_mm),
        extent_mm=span(lambda case: case.extent_mm),
        raw=raw,
        intensity=tuple(
            span(lambda case, number=number: (case.raw if raw else case.normalised)[number])  # type: ignore[misc]
            for number in range(channels)
        ),
        volumes_ml={name: (min(found), max(found)) for name, found in volumes.items() if found},
        always=tuple(name for name, found in volumes.items() if len(found) == len(training)),
        parts={name: max(case.parts[name] for case in training) for name in names},
        cases=len(training),
        allowances={"review": dict(REVIEW), "refuse": dict(REFUSE), "intensity": INTENSITY_ALLOWANCE},
    )


def _common(modality: str) -> str:
    """Return the name under which kinds of one modality are alike, for example of the codes of X-ray images."""
    try:
        return known_modality(modality)
    except UsageError:
        return modality


def _outside(
    code: str, value: float, allowed: Range, review: float, refuse: float | None, title: str, unit: str
) -> list[Reason]:
    low, high = allowed
    level: Level | None = None
    if not low / review <= value <= high * review:
        level = "review"
    if refuse is not None and not low / refuse <= value <= high * refuse:
        level = "refused"
    if level is None:
        return []
    words = f"{title}{value:.4g} {unit}; accepted: {low / review:.4g} to {high * review:.4g}"
    return [Reason(code, level, float(value), (low / review, high * review), words)]
