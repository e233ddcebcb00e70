"""One volume from its decoded voxels to what the store holds: orient, crop, normalise, resample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.archive.volume import Volume, spacing_of
from medssl.errors import InputRefused
from medssl.preprocessing.codec import LOSSLESS
from medssl.preprocessing.content import Box, content_box, outside_value
from medssl.preprocessing.normalise import Normalisation, fit, scheme_of
from medssl.preprocessing.orient import canonical
from medssl.preprocessing.resample import classes_of, coarse_axis, resample_image, resample_label, resampled_shape
from medssl.preprocessing.store_files import MAX_FOREGROUND
from medssl.preprocessing.tissue import sample_above, tissue_threshold

#: The most bytes that one resampled volume may have: a voxel size given in metres must not fill the memory.
MAX_BYTES = 8 * 2**30
#: Corners of image and label may lie this part of a voxel apart.
_GRID_TOLERANCE = 0.1


@dataclass(frozen=True)
class Plan:
    """What is done to every volume.

    Attributes:
        spacing_mm: Target (z, y, x), or None to keep each volume's own.
        normalisation: `by-modality` or a key of `normalise.SCHEMES`.
        fingerprint: Intensities by modality, for the scheme `fingerprint`.
        crop: Whether to crop to the content.
        codec: How the intensities are stored, a key of `codec.CODECS`.
    """

    spacing_mm: tuple[float, float, float] | None
    normalisation: str
    fingerprint: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    crop: bool = True
    codec: str = LOSSLESS


@dataclass(frozen=True)
class Prepared:
    """What is written of a volume.

    Attributes:
        array: Shape: (C, Z, Y, X).
        label: Shape: (Z, Y, X), or None.
        facts: Geometry, normalisation, background and foreground; JSON-able.
    """

    array: NDArray[np.float32]
    label: NDArray[np.int16] | None
    facts: dict[str, Any]


def prepare(
    volume: Volume, plan: Plan, *, name: str, modalities: Sequence[str] = (), label: Volume | None = None
) -> Prepared:
    """Prepare one volume.

    Args:
        volume: As decoded.
        plan: What is done to every volume.
        name: Seeds the draw of foreground voxels.
        modalities: One per channel, or one for all; the volume's own by default.
        label: On the volume's grid, checked by `check_label`.

    Raises:
        InputRefused: If it cannot be used, with the reason's code.
    """
    modalities = one_per_channel(modalities, volume)
    array, affine = canonical(volume.array, volume.affine, modalities[0])
    classes = None if label is None else canonical(label.array, volume.affine, modalities[0])[0][0]
    # Seven digits: what lies behind them is rounding of the header's matrix.
    spacing = tuple(float(f"{edge:.7g}") for edge in spacing_of(affine))
    original = {"shape": list(array.shape[1:]), "spacing_mm": list(spacing), "affine": affine.tolist()}
    whole = tuple((0, size) for size in array.shape[1:])
    box: Box = content_box(array, modalities[0], classes) if plan.crop else (whole[0], whole[1], whole[2])
    inside = tuple(slice(start, stop) for start, stop in box)
    outside = outside_value(array[0], modalities[0])
    # A new array in any case: what follows works in place and in one pass through memory.
    cropped = np.array(array[(slice(None), *inside)], dtype=np.float32, order="C")
    if not all(math.isfinite(channel.min()) and math.isfinite(channel.max()) for channel in cropped):
        raise InputRefused("not_finite", "some voxels are not finite")

    target = spacing if plan.spacing_mm is None else plan.spacing_mm
    shape = resampled_shape(cropped.shape[1:], spacing, target)
    if math.prod(shape) * cropped.shape[0] * 4 > MAX_BYTES:
        raise InputRefused("resampled_too_large", f"{shape} voxels of {target} mm, limit {MAX_BYTES >> 30} GiB")
    thresholds = [tissue_threshold(one, modality) for one, modality in zip(cropped, modalities, strict=True)]
    applied = _normalise(cropped, thresholds, volume.channels == "colour", modalities, plan)
    separate = coarse_axis(spacing, target)
    resampled = resample_image(cropped, shape, separate_axis=separate)
    del cropped
    foreground = sample_above(resampled[0], applied[0].of(thresholds[0]), MAX_FOREGROUND, name)
    new_label = None
    if classes is not None:
        kept = np.ascontiguousarray(classes[inside], dtype=np.int16)
        new_label = resample_label(kept, shape, separate_axis=separate)
    facts = {
        # A single slice has no voxel size to change across.
        "spacing_mm": [own if size == 1 else goal for own, goal, size in zip(spacing, target, shape, strict=True)],
        "affine": _affine_of_grid(affine, box, shape).tolist(),
        "original": original,
        "crop": [list(pair) for pair in box],
        "normalisation": [one.to_json() for one in applied],
        "background": applied[0].of(outside),
        "foreground": foreground.tolist(),
        "channels": volume.channels,
        "flags": list(volume.flags),
        "geometry": volume.geometry,
        "modality": modalities[0],
        "channel_modalities": list(modalities),
    }
    return Prepared(resampled, new_label, facts)


def one_per_channel(modalities: Sequence[str], volume: Volume) -> tuple[str, ...]:
    """Return a modality for each channel of a volume, given one for each, one for all, or none."""
    known = tuple(modalities) or (volume.modality,)
    return known * volume.shape[0] if len(known) == 1 else known


def check_label(volume: Volume, label: Volume, known: Sequence[int] | None) -> Volume:
    """Return a label as whole numbers, or refuse it.

    Args:
        volume: The image.
        label: Its label, as decoded.
        known: The values that `dataset.json` lists, or None.

    Raises:
        InputRefused: If shape, grid or values do not fit.
    """
    if label.shape != (1, *volume.shape[1:]):
        raise InputRefused(
            "label_shape_differs", f"label (z, y, x) {label.shape[1:]}, image {volume.shape[1:]}, as stored"
        )
    corners = np.array([(i, j, k, 1) for i in (0, 1) for j in (0, 1) for k in (0, 1)], np.float64)
    corners[:, :3] *= np.array(volume.shape[:0:-1]) - 1
    apart = float(np.linalg.norm(corners @ (volume.affine - label.affine).T, axis=1).max())
    if apart > _GRID_TOLERANCE * min(volume.spacing_mm):
        raise InputRefused("label_grid_differs", f"corners of image and label lie {apart:.3g} mm apart")
    values = classes_of(label.array)
    if any(value != np.round(value) or not -(2**15) <= value < 2**15 for value in values):
        raise InputRefused("label_values_unknown", "the label has values that are no whole numbers of 16 bits")
    unknown = [] if known is None else sorted({int(value) for value in values} - set(known))
    if unknown:
        raise InputRefused(
            "label_values_unknown", f"label has values {_few(unknown)}; dataset.json knows {_few(sorted(known or ()))}"
        )
    return Volume(label.array.astype(np.int16), label.affine, label.modality)


def _normalise(
    array: NDArray[np.float32], thresholds: Sequence[float], colour: bool, modalities: Sequence[str], plan: Plan
) -> list[Normalisation]:
    """Normalise in place; the colours of a picture share one scale, so that they stay colours."""
    count = array.shape[0]
    applied: list[Normalisation] = []
    for start in range(0, count, count if colour else 1):
        group = slice(start, count if colour else start + 1)
        modality = modalities[start]
        scheme = scheme_of(plan.normalisation, modality)
        if scheme == "fingerprint" and modality not in plan.fingerprint:
            raise InputRefused("no_content", f"no tissue was found in the volumes of modality {modality}")
        found = fit(list(array[group]), thresholds[group], scheme, modality, plan.fingerprint)
        for channel in array[group]:
            found.apply(channel)
            applied.append(found)
    return applied


def _affine_of_grid(affine: NDArray[np.float64], box: Box, shape: Sequence[int]) -> NDArray[np.float64]:
    """Return the affine of the stored grid: it spans the extent of the crop, voxel edge to voxel edge."""
    change = np.eye(4)
    for axis, ((start, stop), size) in enumerate(zip(reversed(box), reversed(list(shape)), strict=True)):
        ratio = (stop - start) / size
        change[axis, axis] = ratio
        change[axis, 3] = start + (ratio - 1) / 2
    return affine @ change


def _few(values: Sequence[int]) -> str:
    return "{" + ", ".join(str(value) for value in values[:10]) + (", ..." if len(values) > 10 else "") + "}"
