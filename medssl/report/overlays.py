"""Slices of a case in three planes with contours of reference and prediction, as a radiologist expects them.

Axial slices are seen from below, coronal ones from the front: the patient's right is on the left of the picture, and
letters say so. Pixels keep the patient's proportions. Contours are vector paths at the border of the voxels' centres,
so that they stay sharp at any zoom and can be switched off on the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.inference.source import open_file

MARGIN_MM = 25.0
MOST_PIXELS = 420
# Bright against grey values, one per label, in the order of the labels.
LABEL_COLOURS = ("#ffd23f", "#3fc1ff", "#ff6b9d", "#7dff6b", "#ff9b42", "#c58bff", "#52f2d4", "#f25252")
Array = npt.NDArray[Any]

# plane: the axis cut, the axes across and down the picture, whether they are flipped, and the letters
# left, right, top, bottom. Arrays are (Z, Y, X) with Z to superior, Y to anterior, X to right.
PLANES = (
    ("axial", 0, 2, 1, "R", "L", "A", "P"),
    ("coronal", 1, 2, 0, "R", "L", "S", "I"),
    ("sagittal", 2, 1, 0, "A", "P", "S", "I"),
)


@dataclass(frozen=True)
class Overlay:
    """One slice with contours.

    Args:
        plane: Its name.
        svg: Inline markup.
        alt: What it shows.
        caption: Plane and position.
    """

    plane: str
    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Aligned:
    """A volume in canonical axes.

    Args:
        array: Shape: (Z, Y, X), RAS+ reversed.
        spacing_mm: (z, y, x).
    """

    array: Array
    spacing_mm: tuple[float, float, float]


def load_aligned(path: Path) -> Aligned:
    """Read one volume into canonical axes.

    Raises:
        InputRefused: If it cannot be read.
    """
    channel = open_file(path)
    channel.grid.check()
    array = np.zeros(channel.grid.reader_shape(True), np.float32)
    channel.fill(channel.grid.stored_view(array, True))
    return Aligned(array, channel.grid.reader_spacing(True))


def overlays(
    image: Aligned, prediction: Array | None, reference: Array, labels: Mapping[str, Sequence[int]]
) -> list[Overlay]:
    """Return the three planes through the slices that hold most of the labels.

    Args:
        image: The image.
        prediction: Labels on the same grid, or None. Shape: (Z, Y, X).
        reference: Labels on the same grid. Shape: (Z, Y, X).
        labels: Values of each label or region by name; the order gives the colours.
    """
    known = [value for values in labels.values() for value in values]
    there = np.isin(reference, known)
    anything = there if there.any() else (np.isin(prediction, known) if prediction is not None else there)
    low, high = _window(image.array)
    box = _box(anything, image.spacing_mm)
    flat = [side == 1 for side in image.array.shape]
    made = []
    for plane, cut, across, down, *letters in PLANES:
        if flat[across] or flat[down]:
            continue
        position = _best_slice(anything, cut)
        picture = _plane(image.array, cut, position, across, down, box)
        grey = (np.clip((picture - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
        width, height = (picture.shape[1] * image.spacing_mm[across], picture.shape[0] * image.spacing_mm[down])
        paths = []
        for source, mask in (("reference", reference), ("prediction", prediction)):
            if mask is None:
                continue
            cropped = _plane(mask, cut, position, across, down, box)
            for number, values in enumerate(labels.values()):
                line = _outline(np.isin(cropped, values), image.spacing_mm[down], image.spacing_mm[across])
                if line:
                    paths.append(
                        f'<path class="{source}" stroke="{LABEL_COLOURS[number % len(LABEL_COLOURS)]}" d="{line}"/>'
                    )
        where = f"slice {position + 1} of {image.array.shape[cut]}"
        alt = f"{plane} {where} with contours of {', '.join(labels)}; {letters[0]} is on the left, {letters[2]} on top."
        made.append(Overlay(plane, _svg(grey, width, height, paths, letters, alt), alt, f"{plane}, {where}"))
    return made


def _plane(array: Array, cut: int, position: int, across: int, down: int, box: Sequence[tuple[int, int]]) -> Array:
    """Return one slice with rows from top (anterior or superior) to bottom and columns as the letters say."""
    parts: list[Any] = [slice(low, high) for low, high in box]
    parts[cut] = position
    # Rows run down `down`, columns along `across`; the remaining axes keep their order, so `down` may come second.
    slab = array[tuple(parts)]
    if down > across:
        slab = slab.T
    # Both directions are turned: superior, anterior up; the patient's right (or front) on the left.
    return np.ascontiguousarray(slab[::-1, ::-1])


def _best_slice(labels: Array, cut: int) -> int:
    """Return the slice with the most labelled voxels, the middle one if there are none; of equals the central one."""
    counts = labels.sum(axis=tuple(axis for axis in range(3) if axis != cut))
    if counts.max() == 0:
        return int(labels.shape[cut] // 2)
    best = np.flatnonzero(counts == counts.max())
    return int(best[len(best) // 2])


def _box(labels: Array, spacing: Sequence[float]) -> list[tuple[int, int]]:
    """Return the part to show: the labels and a margin around them, or everything where there are none."""
    if not labels.any():
        return [(0, side) for side in labels.shape]
    box = []
    for axis, side in enumerate(labels.shape):
        hits = np.flatnonzero(labels.any(axis=tuple(other for other in range(3) if other != axis)))
        extent = (hits[-1] + 1 - hits[0]) * spacing[axis]
        margin = int(np.ceil(max(MARGIN_MM, 0.35 * extent) / spacing[axis]))
        box.append((max(0, int(hits[0]) - margin), min(side, int(hits[-1]) + 1 + margin)))
    return box


def _window(image: Array) -> tuple[float, float]:
    step = max(1, image.size // 2_000_000)
    sample = image.reshape(-1)[::step]
    sample = sample[np.isfinite(sample)]
    inside = sample[sample != sample.min()] if sample.size else sample
    if inside.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(inside, (1, 99.5))
    return float(low), float(high)


def _outline(mask: Array, row_mm: float, column_mm: float) -> str:
    """Return the outline of a mask as SVG path data in mm, along the borders between voxel centres."""
    from skimage.measure import find_contours

    if not mask.any():
        return ""
    commands = []
    for line in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        points = [(round((x - 0.5) * column_mm, 2), round((y - 0.5) * row_mm, 2)) for y, x in line]
        commands.append("M" + "L".join(f"{x:g},{y:g}" for x, y in points))
    return "".join(commands)


def _svg(grey: Array, width: float, height: float, paths: Sequence[str], letters: Sequence[str], alt: str) -> str:
    from PIL import Image

    picture = Image.fromarray(grey, mode="L")
    shrink = MOST_PIXELS / max(picture.size)
    if shrink < 1:
        picture = picture.resize((max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    # Letters and lines keep their size on screen whatever the field of view is.
    unit = max(width, height) / 100
    marks = "".join(
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{5.5 * unit:.2f}" text-anchor="{anchor}">{letter}</text>'
        for letter, x, y, anchor in (
            (letters[0], 1.5 * unit, height / 2 + 2 * unit, "start"),
            (letters[1], width - 1.5 * unit, height / 2 + 2 * unit, "end"),
            (letters[2], width / 2, 6 * unit, "middle"),
            (letters[3], width / 2, height - 2 * unit, "middle"),
        )
    )
    return (
        f'<svg class="slice" viewBox="0 0 {width:.2f} {height:.2f}" role="img" aria-label="{escape(alt, quote=True)}">'
        f'<image href="data:image/png;base64,{data}" width="{width:.2f}" height="{height:.2f}" '
        f'preserveAspectRatio="none"/>{"".join(paths)}'
        f'<g class="letters" stroke-width="{0.9 * unit:.2f}">{marks}</g></svg>'
    )
