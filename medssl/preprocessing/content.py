"""Where the content of a volume lies: the box of the body in CT, of what is not zero elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import InputRefused
from medssl.preprocessing.orient import FLAT_MODALITIES
from medssl.preprocessing.tissue import CT_AIR_HU

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
#: Share of exact zeros from which zero is taken for what a mask left outside, also where values are negative.
_MASKED_SHARE = 0.1


def content_box(array: NDArray[Any], modality: str, label: NDArray[Any] | None = None) -> Box:
    """Return start and stop of the content along z, y and x.

    CT: every voxel above `CT_AIR_HU`, table included. Pictures and projections: everything. All else: every voxel that
    is not zero in some channel, as in nnU-Net. A label always lies inside.

    Args:
        array: Before normalisation. Shape: (C, Z, Y, X).
        modality: DICOM's code.
        label: Shape: (Z, Y, X).

    Raises:
        InputRefused: `no_content` if nothing qualifies.
    """
    whole = tuple((0, size) for size in array.shape[1:])
    if modality in FLAT_MODALITIES and array.shape[1] == 1:
        return _as_box(whole)
    mask: NDArray[np.bool_] = np.zeros(array.shape[1:], dtype=np.bool_)
    for channel in array:
        mask |= channel > CT_AIR_HU if modality == "CT" else channel != 0
    if label is not None:
        mask |= label != 0
    # One plane of flags after the other: a reduction over two axes of the volume costs three times as much.
    plane = np.any(mask, axis=0)
    rows = mask.reshape(array.shape[1], -1)
    flags = (rows.any(axis=1), plane.any(axis=1), plane.any(axis=0))
    if not flags[0].any():
        what = f"no voxel is above {CT_AIR_HU:g} HU" if modality == "CT" else "all voxels are zero"
        raise InputRefused("no_content", what)
    found = []
    for line in flags:
        used = np.flatnonzero(line)
        found.append((int(used[0]), int(used[-1]) + 1))
    return _as_box(tuple(found))


def outside_value(channel: NDArray[Any], modality: str) -> float:
    """Return the value before normalisation of what lies outside the body.

    CT: air. Else zero, unless negative values show that zero is a value like others; then the darkest one.
    """
    if modality == "CT":
        return -1000.0
    low = float(channel.min())
    if low >= 0:
        return 0.0
    masked = np.count_nonzero(channel == 0) > _MASKED_SHARE * channel.size
    return 0.0 if masked else low


def _as_box(pairs: tuple[tuple[int, int], ...]) -> Box:
    z, y, x = pairs
    return z, y, x
