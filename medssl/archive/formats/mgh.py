"""FreeSurfer's MGH and MGZ: big-endian, version 1, header of 284 bytes (FreeSurfer wiki, FsTutorial/MghFormat)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medssl.archive.formats.common import (
    Geometry,
    Layout,
    check_bytes,
    check_dimensions,
    check_stored,
    finish,
    is_gzip,
    read_head,
    read_voxels,
)
from medssl.archive.volume import Volume
from medssl.errors import InputRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OFFSET = 284
_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}


def check(path: Path) -> Layout:
    """Read and check the header.

    Raises:
        InputRefused: If header and file do not fit.
    """
    return _read_header(path)[0]


def load(path: Path, geometry: Geometry = "strict") -> Volume:
    """Read the image.

    Raises:
        InputRefused: If it cannot be used.
    """
    layout, dtype, affine, known = _read_header(path)
    array = read_voxels(path, _OFFSET, dtype, layout.shape)
    return finish(
        array,
        affine,
        geometry=geometry,
        channels="scalar" if layout.shape[0] == 1 else "frames",
        flags=() if known else ("orientation_unknown",),
    )


def _read_header(path: Path) -> tuple[Layout, str, NDArray[np.float64], bool]:
    raw = read_head(path, _OFFSET)
    if len(raw) < _OFFSET:
        raise InputRefused("truncated", "the MGH header ends early")
    version, x, y, z, frames, kind, _, good_ras = struct.unpack_from(">7ih", raw)
    if version != 1 or kind not in _TYPES:
        raise InputRefused("dtype_unsupported", f"MGH version {version}, voxel type {kind}")
    check_dimensions((x, y, z, frames))
    dtype = _TYPES[kind]
    needed = check_bytes((frames, z, y, x), np.dtype(dtype).itemsize)
    check_stored(needed + _OFFSET, path.stat().st_size, deflated=is_gzip(path))
    layout = Layout((frames, z, y, x))
    if not good_ras:
        # The format's default: coronal slices, 1 mm (x to the left, y to inferior, z to anterior).
        columns, spacing, centre = np.array([(-1, 0, 0), (0, 0, 1), (0, -1, 0)], np.float64), np.ones(3), np.zeros(3)
    else:
        numbers = np.array(struct.unpack_from(">15f", raw, 30), np.float64)
        # Stored column by column: direction of x, of y, of z; then the centre.
        spacing, columns, centre = numbers[:3], numbers[3:12].reshape(3, 3).T, numbers[12:]
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise InputRefused("spacing_invalid", f"voxel size (x, y, z) = {tuple(float(size) for size in spacing)}")
    affine = np.eye(4)
    affine[:3, :3] = columns * spacing
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array([x, y, z]) / 2)
    return layout, dtype, affine, bool(good_ras)
