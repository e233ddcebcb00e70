"""Opens one case: its channels as one float32 array in the axes of nnU-Net's reader, and its grid."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.archive.formats import nifti
from medssl.archive.sniff import Format, sniff
from medssl.archive.volume import UNKNOWN_MODALITY, Volume
from medssl.errors import InputRefused
from medssl.inference.grid import Grid
from medssl.inference.workspace import MEBIBYTE, Workspace

Array = npt.NDArray[Any]
READ_BYTES = 64 * MEBIBYTE


@dataclass(frozen=True)
class Channel:
    """One volume that can be read.

    Args:
        grid: Its grid.
        fill: Fills an array given in the stored axes (x, y, z).
        flags: Codes of what is worth knowing of it.
        modality: DICOM's code, `IMAGE` for a picture, `OT` where nothing says.
    """

    grid: Grid
    fill: Callable[[Array], None]
    flags: tuple[str, ...] = ()
    modality: str = UNKNOWN_MODALITY


@dataclass(frozen=True)
class Image:
    """A case in memory.

    Args:
        array: Shape: (C, Z, Y, X), float32, in the reader's axes.
        spacing: In mm, (z, y, x) of those axes.
        grid: The grid of the source.
        flags: Codes of what was mended.
        modality: Of its first channel.
    """

    array: Array
    spacing: tuple[float, float, float]
    grid: Grid
    flags: tuple[str, ...]
    modality: str = UNKNOWN_MODALITY


def open_file(path: Path) -> Channel:
    """Open one NIfTI, NRRD, MetaImage or MGH file.

    Raises:
        InputRefused: With a code of the archive's table.
    """
    try:
        kind = sniff(path)
    except OSError as error:
        raise InputRefused("unreadable", error.strerror or "cannot be read") from error
    if kind == "nifti":
        return _open_nifti(path)
    if kind == "dicom":
        raise InputRefused("not_an_image", "a single DICOM file among volumes: give its series' folder as --input")
    from medssl.archive.sandbox import run_limited

    return from_volume(run_limited(_load_file, (str(path), kind)))


def _load_file(task: tuple[str, Format]) -> Volume:
    """Decode a file; runs in a process with limits."""
    from medssl.archive.formats.read import load_file

    path = Path(task[0])
    return load_file(path, task[1], path.parent)


def from_volume(volume: Volume) -> Channel:
    """Wrap what the archive has read.

    Raises:
        InputRefused: If it has colours or frames.
    """
    if volume.channels != "scalar":
        raise InputRefused(
            "dimensions_unsupported", f"{volume.shape[0]} {volume.channels} where one value a voxel is needed"
        )
    voxels = volume.array[0].transpose(2, 1, 0)
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])

    def fill(target: Array) -> None:
        target[...] = voxels

    flags = volume.flags if volume.geometry == "regular" else (*volume.flags, volume.geometry)
    return Channel(Grid(shape, np.asarray(volume.affine, np.float64), shape), fill, flags, volume.modality)


def read_image(channels: Sequence[Channel], reorient: bool, workspace: Workspace) -> Image:
    """Read the channels of one case.

    Raises:
        InputRefused: If a channel lies on another grid, or its voxels cannot be read or are mostly not finite.
    """
    grid = channels[0].grid
    for number, channel in enumerate(channels):
        channel.grid.check()
        if channel.grid.shape != grid.shape or not np.allclose(channel.grid.affine, grid.affine, atol=1e-3):
            raise InputRefused(
                "channels_differ",
                f"channel {number}: {channel.grid.shape} voxels, channel 0: {grid.shape}, or their positions differ",
            )
    array = workspace.empty((len(channels), *grid.reader_shape(reorient)), np.float32)
    flags = {flag for channel in channels for flag in channel.flags}
    for target, channel in zip(array, channels, strict=True):
        channel.fill(grid.stored_view(target, reorient))
        workspace.relax()
        if _replace_not_finite(target):
            flags.add("non_finite_replaced")
    return Image(array, grid.reader_spacing(reorient), grid, tuple(sorted(flags)), channels[0].modality)


def _open_nifti(path: Path) -> Channel:
    import nibabel
    from nibabel.spatialimages import HeaderDataError

    # Header against file and limits, before anything is allocated.
    layout = nifti.check(path)
    if layout.shape[0] != 1:
        raise InputRefused("dimensions_unsupported", f"{layout.shape[0]} frames or colours where one value is needed")
    usable, flags = nifti.read_affine(path)
    try:
        image: Any = nibabel.load(path, mmap=False, keep_file_open=True)
        shape = tuple(int(side) for side in image.shape)
        affine = np.asarray(image.affine, np.float64)
        zooms = tuple(float(side) for side in image.header.get_zooms()[:3])
    except (
        nibabel.filebasedimages.ImageFileError,
        HeaderDataError,
        ValueError,
        OSError,
        EOFError,
        zlib.error,
    ) as error:
        raise InputRefused("header_invalid", _first_line(error)) from error
    if "qform_used" in flags:
        affine = usable
    solid = (*shape, 1)[:3]
    grid = Grid((solid[0], solid[1], solid[2]), affine, shape, (*zooms, 1.0)[:3])  # type: ignore[arg-type]

    def fill(target: Array) -> None:
        _fill_from_nifti(image, target)

    return Channel(grid, fill, tuple(flags))


def _fill_from_nifti(image: Any, target: Array) -> None:
    """Read a slab of slices at a time, scaled in float64 and stored in float32 as nnU-Net's reader does."""
    last = target.shape[2]
    step = max(1, READ_BYTES // max(1, 8 * target.shape[0] * target.shape[1]))
    flat = len(image.shape) == 2
    try:
        for start in range(0, last, step):
            part = slice(start, min(last, start + step))
            if flat:
                target[:, :, 0] = np.asarray(image.dataobj, np.float64)
            else:
                slab = np.asarray(image.dataobj[:, :, part], np.float64)
                target[:, :, part] = slab.reshape(target[:, :, part].shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputRefused("truncated", _first_line(error)) from error


def _replace_not_finite(voxels: Array) -> bool:
    """Replace NaN and -Inf by the smallest and +Inf by the largest finite value; tell whether there were any."""
    broken = sum(int(np.count_nonzero(~np.isfinite(row))) for row in voxels)
    if broken == 0:
        return False
    if 2 * broken > voxels.size:
        raise InputRefused("not_finite", f"{broken} of {voxels.size} voxels")
    finite = [row[np.isfinite(row)] for row in voxels]
    low = min(float(row.min()) for row in finite if row.size)
    high = max(float(row.max()) for row in finite if row.size)
    for row in voxels:
        np.nan_to_num(row, copy=False, nan=low, neginf=low, posinf=high)
    return True


def _first_line(error: BaseException) -> str:
    """Return an error's first line without any path in it."""
    import re

    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"['\"]?/\S+", "the file", line)[:200]
