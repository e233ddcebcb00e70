"""Whole images at one size: what a classifier is shown, and where it lies in the window that augmentation reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError, UsageError, unknown_name
from medssl.networks.architecture import Architecture

Fit = Literal["whole", "stretch", "crop"]
FITS: dict[str, str] = {
    "whole": "the whole image, shrunk where it is larger than the patch (y and x by one factor, z by its own) and "
    "never enlarged; the rest of the patch is background",
    "stretch": "the whole image, brought to exactly the patch along each axis",
    "crop": "the middle of the image at its own voxel size; the rest of the patch is background",
}
#: Largest edge of a patch that is chosen without being asked for, by dimensions.
LARGEST_EDGE = {2: 256, 3: 96}


def check_fit(name: str) -> None:
    """Refuse a way of fitting that does not exist.

    Raises:
        UsageError: With the known ones.
    """
    if name not in FITS:
        raise unknown_name("way to fit an image to the patch", name, FITS)


def choose_patch(shapes: Sequence[Sequence[int]], plan: Architecture, given: Sequence[int] | None) -> tuple[int, ...]:
    """Return the patch: what was given, else what just covers the median image, up to `LARGEST_EDGE`.

    Args:
        shapes: Images as they are stored, (Z, Y, X).
        plan: The network.
        given: Edges, or None.

    Raises:
        UsageError: If it does not fit the network.
        DataError: If the images have other dimensions than the network.
    """
    flat = [shape[0] == 1 for shape in shapes]
    if plan.dimensions == 3 and any(flat):
        raise DataError(
            f"{sum(flat)} of {len(flat)} images are single slices and the network is 3D: take a 2D network or "
            "checkpoint."
        )
    if plan.dimensions == 2 and not all(flat):
        raise DataError(
            f"{len(flat) - sum(flat)} of {len(flat)} images are volumes and the network is 2D: take a 3D network or "
            "checkpoint."
        )
    if given is None:
        middle = np.median(np.asarray(shapes), axis=0)[-plan.dimensions :]
        edges = [
            min(math.ceil(size / stride), max(LARGEST_EDGE[plan.dimensions] // stride, 1)) * stride
            for size, stride in zip(middle, plan.total_stride, strict=True)
        ]
        if all(edge == stride for edge, stride in zip(edges, plan.total_stride, strict=True)):
            edges = [2 * edge for edge in edges]
        given = edges
    patch = tuple(int(edge) for edge in given)
    try:
        plan.check_patch(patch)
    except UsageError as error:
        raise UsageError(f"--patch-size: {error}") from error
    return patch


def fit_image(
    image: NDArray[np.float32], spacing_mm: Sequence[float], patch: Sequence[int], window: Sequence[int], how: str
) -> tuple[NDArray[np.float32], tuple[float, float, float]]:
    """Return an image as large as a patch or window needs it, and its voxel size.

    Shrinking is linear after a Gaussian filter against aliasing (scikit-image's).

    Args:
        image: Shape: (C, Z, Y, X).
        spacing_mm: Voxel size (z, y, x).
        patch: What the network sees, (Z, Y, X).
        window: What augmentation reads around it, (Z, Y, X), not smaller than the patch.
        how: A key of `FITS`.
    """
    shape = image.shape[1:]
    if how == "crop":
        # Rounded up as in `place`: cut to the window and then to the patch, or to the patch at once, is the same.
        start = [max(-((edge - size) // 2), 0) for size, edge in zip(shape, window, strict=True)]
        box = tuple(slice(low, low + min(size, edge)) for low, size, edge in zip(start, shape, window, strict=True))
        return np.ascontiguousarray(image[(slice(None), *box)]), _three(spacing_mm)
    if how == "stretch":
        goal = tuple(patch)
    else:
        depth = min(1.0, patch[0] / shape[0])
        plane = min(1.0, patch[1] / shape[1], patch[2] / shape[2])
        factors = (depth, plane, plane)
        goal = tuple(max(1, round(size * factor)) for size, factor in zip(shape, factors, strict=True))
    if goal == shape:
        return image, _three(spacing_mm)
    new_spacing = [step * size / edge for step, size, edge in zip(spacing_mm, shape, goal, strict=True)]
    return np.stack([_resized(channel, goal) for channel in image]), _three(new_spacing)


def place(
    image: NDArray[np.float32], window: Sequence[int], background: float
) -> tuple[NDArray[np.float32], NDArray[np.int64], tuple[int, int, int]]:
    """Lay the middle of an image on the middle of a window.

    Args:
        image: Shape: (C, Z, Y, X).
        window: (Z, Y, X).
        background: Value around the image.

    Returns:
        The window (C, *window), start and stop of the image in it (3, 2), and the window's first voxel in the image
        (negative where it begins before the image).
    """
    first = [-((edge - size) // 2) for edge, size in zip(window, image.shape[1:], strict=True)]
    start = [max(-low, 0) for low in first]
    stop = [min(size - low, edge) for low, size, edge in zip(first, image.shape[1:], window, strict=True)]
    result = np.full((image.shape[0], *window), background, np.float32)
    inside = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
    source = tuple(slice(low + offset, high + offset) for low, high, offset in zip(start, stop, first, strict=True))
    result[(slice(None), *inside)] = image[(slice(None), *source)]
    return result, np.stack([start, stop], axis=1).astype(np.int64), (first[0], first[1], first[2])


def _resized(channel: NDArray[np.float32], goal: Sequence[int]) -> NDArray[np.float32]:
    from skimage.transform import resize

    smaller = any(edge < size for edge, size in zip(goal, channel.shape, strict=True))
    # scikit-image counts an axis of one slice as a dimension; without it a picture costs a third.
    flat = channel.shape[0] == 1 and goal[0] == 1
    values = channel[0] if flat else channel
    result = resize(
        values, goal[1:] if flat else goal, order=1, mode="edge", anti_aliasing=smaller, preserve_range=True
    ).astype(np.float32)
    return result[None] if flat else result


def _three(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    z, y, x = (float(step) for step in spacing_mm)
    return z, y, x
