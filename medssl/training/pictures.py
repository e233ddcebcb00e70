"""Pictures of what a network sees and makes: mid-slices side by side."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.batch import Views
from medssl.preprocessing.orient import FLAT_MODALITIES

logger = logging.getLogger(__name__)

MOST_SAMPLES = 3
INCHES = 2.2
DOTS_PER_INCH = 100
_PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))


def pictures_of_views(views: Views) -> dict[str, Tensor]:
    """Return the images of views by name: the input, hidden voxels blanked, and the target where there is one."""
    images: dict[str, Tensor] = {}
    for number, view in enumerate(views, start=1):
        prefix = f"view {number}: " if len(views) > 1 else ""
        if view.target is not None and view.target is not view.image:
            images[f"{prefix}target"] = view.target
        images[f"{prefix}input"] = view.image
        if view.mask is not None:
            images[f"{prefix}visible"] = view.image.masked_fill(view.mask, float("nan"))
    return images


def draw_grid(
    images: Mapping[str, Tensor], spacing_mm: Sequence[float], title: str, *, modality: str = "MR"
) -> tuple[bytes, tuple[int, int]]:
    """Draw the mid-slices of some samples: a column per image, a row per sample and plane.

    The first channel is drawn, with the window of the first column, so that columns compare. Front and head are up and
    the patient's right is on the right, as the arrays lie; a picture keeps its first row on top. What is not a number
    is drawn blue.

    Args:
        images: Images of one batch by name. Shape of each: (B, C, Z, Y, X) or (B, C, Y, X).
        spacing_mm: Voxel size, (z, y, x).
        title: A line above.
        modality: Of the samples; see `FLAT_MODALITIES`.

    Returns:
        The picture as PNG, and its width and height in pixels.
    """
    from matplotlib.figure import Figure

    columns = {name: image.detach().float().cpu().numpy()[:MOST_SAMPLES, 0] for name, image in images.items()}
    rows = [cut for sample in range(len(next(iter(columns.values())))) for cut in _cuts(columns, sample, spacing_mm)]
    # Each row is as high as its slices are in the patient.
    shares = [float(np.clip(slices[0].shape[0] * aspect / slices[0].shape[1], 0.2, 3)) for _, slices, aspect in rows]
    width, height = INCHES * len(columns) + 0.3, INCHES * sum(shares) + 0.6
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    figure.suptitle(title, fontsize=9, y=1 - 0.08 / height, va="top")
    # Fixed margins: matplotlib's search for good ones takes longer than all the drawing.
    margins = {"left": 0.25 / width, "right": 1 - 0.05 / width, "bottom": 0.05 / height, "top": 1 - 0.5 / height}
    spaces = {"wspace": 0.03, "hspace": 0.03, "height_ratios": shares}
    axes = np.asarray(figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw={**margins, **spaces}))
    flat = next(iter(images.values())).ndim == 4 and modality in FLAT_MODALITIES
    origin: Literal["upper", "lower"] = "upper" if flat else "lower"
    for row, (line, (label, slices, aspect)) in enumerate(zip(axes, rows, strict=True)):
        low, high = _range(slices[0])
        for axis, name, content in zip(line, columns, slices, strict=True):
            axis.set_facecolor("tab:blue")
            axis.imshow(
                np.ma.masked_invalid(content), cmap="gray", vmin=low, vmax=high, origin=origin, aspect=aspect,
                interpolation="nearest",
            )  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=9)
        line[0].set_ylabel(label, fontsize=8)
    stream = io.BytesIO()
    # Without a date and a version in it, the same images give the same file.
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue(), (int(width * DOTS_PER_INCH), int(height * DOTS_PER_INCH))


def _cuts(
    columns: Mapping[str, NDArray[np.float32]], sample: int, spacing: Sequence[float]
) -> list[tuple[str, list[NDArray[np.float32]], float]]:
    first = next(iter(columns.values()))[sample]
    if first.ndim == 2:
        return [(f"{sample + 1}", [image[sample] for image in columns.values()], spacing[1] / spacing[2])]
    cuts = []
    for plane, axis in _PLANES:
        across = [number for number in range(3) if number != axis]
        slices = [np.take(image[sample], image[sample].shape[axis] // 2, axis=axis) for image in columns.values()]
        cuts.append((f"{sample + 1} {plane}", slices, spacing[across[0]] / spacing[across[1]]))
    return cuts


def _range(image: NDArray[np.float32]) -> tuple[float, float]:
    values = image[np.isfinite(image)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))
