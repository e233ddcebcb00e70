"""Normalisation by modality, always as y = (clip(x, low, high) - shift) / scale, so that it is recorded and undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import InputRefused, UsageError, unknown_name
from medssl.preprocessing.tissue import subsample

BY_MODALITY = "by-modality"
#: Modalities whose values mean the same in every scanner: they share one scale, that of the fingerprint.
QUANTITATIVE = frozenset({"CT", "PT"})
#: Modalities normalised over the tissue only; the share of air in the field of view must not matter.
WITH_AIR = frozenset({"MR", "OT"})
SCHEMES: dict[str, str] = {
    "zscore-foreground": "mean 0 and standard deviation 1 in the tissue; the default of MR",
    "zscore": "mean 0 and standard deviation 1 in the whole content, as nnU-Net's ZScoreNormalization; pictures",
    "fingerprint": "clip to 0.5 and 99.5 % of all volumes' tissue, then their mean and standard deviation, as nnU-Net's"
    " CTNormalization; the default of CT and PET",
    "window:LOW:HIGH": "clip to a window and map it to -1 .. 1, for example window:-160:240 for soft tissue in CT",
    "unit": "0.5 and 99.5 % of the volume to 0 .. 1",
    "none": "values as they are",
}
#: Relative spread below which a volume counts as constant.
_FLAT = 1e-7
_PART = 65_536


@dataclass(frozen=True)
class Normalisation:
    """How one channel was normalised.

    Attributes:
        scheme: A key of `SCHEMES`.
        low: Smallest value kept, or None.
        high: Largest value kept, or None.
        shift: Subtracted.
        scale: Divided by.
    """

    scheme: str
    low: float | None
    high: float | None
    shift: float
    scale: float

    def apply(self, channel: NDArray[np.float32]) -> None:
        """Normalise a channel in place."""
        if self.low is not None or self.high is not None:
            np.clip(channel, self.low, self.high, out=channel)
        if self.shift:
            channel -= np.float32(self.shift)
        if self.scale != 1:
            channel *= np.float32(1 / self.scale)

    def of(self, value: float) -> float:
        """Return a single value after normalisation."""
        low = -np.inf if self.low is None else self.low
        high = np.inf if self.high is None else self.high
        return (min(max(value, low), high) - self.shift) / self.scale

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def check_scheme(name: str) -> None:
    """Refuse a scheme that does not exist.

    Raises:
        UsageError: With the known ones.
    """
    if name.startswith("window:"):
        _window(name)
    elif name != BY_MODALITY and (name not in SCHEMES or ":" in name):
        raise unknown_name("normalisation", name, [BY_MODALITY, *SCHEMES])


def scheme_of(name: str, modality: str) -> str:
    """Return the scheme that a channel of a modality gets when the user asked for `name`."""
    if name != BY_MODALITY:
        return name
    if modality in QUANTITATIVE:
        return "fingerprint"
    return "zscore-foreground" if modality in WITH_AIR else "zscore"


def fit(
    channels: Sequence[NDArray[np.float32]],
    thresholds: Sequence[float],
    scheme: str,
    modality: str,
    fingerprint: Mapping[str, Mapping[str, float]],
) -> Normalisation:
    """Find the normalisation of channels that share one, such as the colours of a picture.

    Args:
        channels: Cropped to the content, finite. Shape of each: (Z, Y, X).
        thresholds: Of each channel's tissue, see `tissue_threshold`.
        scheme: A key of `SCHEMES`.
        modality: DICOM's code.
        fingerprint: By modality: `mean`, `std`, `percentile_00_5`, `percentile_99_5`.

    Raises:
        InputRefused: `no_contrast` if all values are equal.
    """
    if scheme == "none":
        return Normalisation(scheme, None, None, 0.0, 1.0)
    if scheme.startswith("window:"):
        low, high = _window(scheme)
        return Normalisation(scheme, low, high, (low + high) / 2, (high - low) / 2)
    if all(channel.min() == channel.max() for channel in channels):
        raise InputRefused("no_contrast", f"all voxels of the content have the value {float(channels[0].flat[0]):g}")
    if scheme == "fingerprint":
        known = fingerprint[modality]
        low, high = float(known["percentile_00_5"]), float(known["percentile_99_5"])
        return Normalisation(scheme, low, high, float(known["mean"]), max(float(known["std"]), 1e-8))
    if scheme == "unit":
        low, high = (
            float(q) for q in np.quantile(np.concatenate([subsample(c).ravel() for c in channels]), [0.005, 0.995])
        )
        if high <= low:
            low, high = min(float(c.min()) for c in channels), max(float(c.max()) for c in channels)
        return Normalisation(scheme, low, high, low, high - low)
    parts: list[NDArray[np.float32]] = list(channels)
    if scheme == "zscore-foreground":
        tissue = [channel[channel > limit] for channel, limit in zip(channels, thresholds, strict=True)]
        # Two values, one of them air, leave a constant foreground: then the whole content is normalised.
        if all(part.size for part in tissue) and any(part.min() < part.max() for part in tissue):
            parts = tissue
    mean, std = mean_and_std(parts)
    if not std > _FLAT * max(abs(mean), 1e-30):
        raise InputRefused("no_contrast", f"standard deviation {std:g} around {mean:g}")
    return Normalisation(scheme, None, None, mean, std)


def mean_and_std(parts: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """Return mean and standard deviation of all values of all parts, summed in pieces so that no copy is made."""
    count = sum(part.size for part in parts)
    mean = sum(float(part.sum(dtype=np.float64)) for part in parts) / count
    squares = 0.0
    for part in parts:
        flat = part.reshape(-1)
        for start in range(0, flat.size, _PART):
            piece = flat[start : start + _PART] - np.float32(mean)
            squares += float(np.dot(piece, piece))
    return mean, float(np.sqrt(squares / count))


def _window(name: str) -> tuple[float, float]:
    try:
        _, low, high = name.split(":")
        limits = float(low), float(high)
    except ValueError as error:
        raise UsageError(f"--normalisation {name}: a window is window:LOW:HIGH, such as window:-160:240.") from error
    if not (np.isfinite(limits).all() and limits[0] < limits[1]):
        raise UsageError(f"--normalisation {name}: LOW must be less than HIGH and both finite.")
    return limits
