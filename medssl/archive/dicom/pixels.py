"""The voxels of a planned volume: decoded, rescaled slice by slice, repaired."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medssl.archive.dicom.decode import StoredFrames
from medssl.archive.dicom.header import read_header
from medssl.archive.dicom.kinds import QUANTITIES
from medssl.archive.dicom.model import DicomHeader, DicomVolume, Frame
from medssl.archive.volume import Volume
from medssl.errors import InputRefused

AIR_HU = -1024
#: Rec. 601 luma, as in DICOM's own YBR_FULL.
_LUMA = np.array([0.299, 0.587, 0.114])
Voxels = NDArray[np.generic]


def load(volume: DicomVolume, root: Path | None = None) -> Volume:
    """Decode a volume.

    Call it in a process with limits (`medssl.archive.sandbox`): decoders meet hostile input here.

    Args:
        volume: From `group`.
        root: Folder that the paths are relative to.

    Raises:
        InputRefused: If a file has changed since it was indexed, or cannot be decoded.
        OSError: If a file cannot be read.
    """
    wanted: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, (file, number) in enumerate(volume.slices):
        if file >= 0:
            wanted[file][number].append(place)
    paths = [Path(path) if root is None else root / path for path in volume.paths]
    headers = [_header_again(path, volume) for path in paths]
    numbers = _Numbers.of(volume, headers)
    rows, columns = volume.stored_size
    colour = volume.channels == "colour"
    planes: Voxels = np.zeros((len(volume.slices), rows, columns, *((3,) if colour else ())), numbers.dtype)
    padded: dict[int, NDArray[np.intp]] = {}
    flags = set(volume.flags)
    for file, (path, header) in enumerate(zip(paths, headers, strict=True)):
        source = StoredFrames.open(path, header)
        for number, image in _planes(source, header):
            for place in wanted[file].get(number, ()):
                frame = header.frames[0] if header.picture else header.frames[number]
                value, mask = numbers.apply(image, source, header, frame, flags)
                if value.shape != planes.shape[1:]:
                    raise InputRefused("decode_failed", f"a plane of {value.shape} instead of {planes.shape[1:]}")
                planes[place] = value
                if mask is not None:
                    padded[place] = mask
    _fill_padding(planes, padded, volume.modality, flags)
    frames = planes.reshape(-1, len(volume.slices) // _frame_count(volume), *planes.shape[1:])
    array = _repair(frames, volume)
    if colour:
        array = np.moveaxis(array[0], -1, 0)
    if array.dtype == np.int32 and array.min() >= -32768 and array.max() <= 32767:
        array = array.astype(np.int16)
    if not colour and array.dtype.kind == "f" and not np.isfinite(array).all():
        array = _finite(array)
        flags.add("non_finite_replaced")
    return Volume(
        array=np.ascontiguousarray(array),
        affine=np.array(volume.affine, np.float64),
        modality=volume.modality,
        channels=volume.channels,  # type: ignore[arg-type]
        flags=tuple(sorted(flags)),
        geometry=volume.geometry,
    )


class _Numbers:
    """How stored numbers become values: one type for the whole volume, slope and intercept for each plane."""

    def __init__(self, dtype: np.dtype, scale: float, quantity: bool, colour: bool, grey: bool, plain: bool) -> None:
        self.dtype = dtype
        self._scale = scale
        self._quantity = quantity
        self._colour = colour
        self._grey = grey
        self._plain = plain

    @classmethod
    def of(cls, volume: DicomVolume, headers: list[DicomHeader]) -> _Numbers:
        """Choose the type: as stored where nothing is rescaled, an integer where slopes and intercepts are integers."""
        quantity = volume.modality in QUANTITIES
        if headers[0].colour:
            deep = any(header.bits_allocated > 8 for header in headers)
            grey = volume.channels != "colour"
            dtype = np.dtype(np.uint16 if deep else np.uint8)
            return cls(dtype, 1.0, quantity, True, grey, False)
        frames = [frame for header in headers for frame in header.frames]
        plain = volume.scale == 1 and all(frame.slope == 1 and frame.intercept == 0 for frame in frames)
        wide = max(header.bits_allocated for header in headers)
        if any(header.bits_allocated == 64 for header in headers):
            return cls(np.dtype(np.float64), volume.scale, quantity, False, False, False)
        whole = all(frame.slope == int(frame.slope) and frame.intercept == int(frame.intercept) for frame in frames)
        if volume.scale != 1 or not whole:
            return cls(np.dtype(np.float32), volume.scale, quantity, False, False, False)
        low = min(_extreme(header, frame, min) for header in headers for frame in header.frames)
        high = max(_extreme(header, frame, max) for header in headers for frame in header.frames)
        signed = any(header.signed for header in headers)
        for name in ("uint8", "int16", "uint16", "int32") if wide == 8 and not signed else ("int16", "uint16", "int32"):
            if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
                return cls(np.dtype(name), 1.0, quantity, False, False, plain)
        return cls(np.dtype(np.float64 if wide == 32 else np.float32), 1.0, quantity, False, False, False)

    def apply(
        self, image: Voxels, source: StoredFrames, header: DicomHeader, frame: Frame, flags: set[str]
    ) -> tuple[Voxels, NDArray[np.intp] | None]:
        """Return the values of one plane, and the flat indices of its padding where there is any."""
        if self._colour:
            if image.ndim != 3:
                raise InputRefused("decode_failed", "colours expected")
            return (_like(self.dtype, image.astype(np.float64) @ _LUMA) if self._grey else image), None
        if image.ndim != 2:
            raise InputRefused("decode_failed", "one value per pixel expected")
        mask = _padding(image, header)
        if header.photometric == "MONOCHROME1":
            if self._quantity:
                flags.add("monochrome1_kept")
            else:
                flags.add("monochrome1_inverted")
                image = _inverted(image, header)
        mapped = source.modality_table(image)
        if mapped is not None:
            return mapped.astype(self.dtype), mask
        if self._plain:
            return image.astype(self.dtype, copy=False), mask
        value = image.astype(np.float64) * frame.slope + frame.intercept
        return (value * self._scale).astype(self.dtype), mask


def _header_again(path: Path, volume: DicomVolume) -> DicomHeader:
    header = read_header(path)
    same = (header.rows, header.columns) == volume.stored_size and header.series_uid == volume.series_uid
    if header.problem or header.related or not same:
        raise InputRefused("changed_while_read", "a file is not what it was when it was indexed")
    return header


def _planes(source: StoredFrames, header: DicomHeader) -> Iterator[tuple[int, Voxels]]:
    if not header.tiles:
        yield from enumerate(source.frames())
        return
    image = next(source.frames())
    rows, columns = header.rows, header.columns
    if image.shape != (rows * header.tiles, columns * header.tiles):
        raise InputRefused("decode_failed", f"a mosaic of {image.shape}")
    for frame in header.frames:
        down, across = divmod(frame.number, header.tiles)
        yield frame.number, image[down * rows : (down + 1) * rows, across * columns : (across + 1) * columns]


def _stored_range(header: DicomHeader) -> tuple[int, int]:
    bits = header.bits_stored
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if header.signed else (0, 2**bits - 1)


def _extreme(header: DicomHeader, frame: Frame, which: object) -> float:
    low, high = _stored_range(header)
    values = low * frame.slope + frame.intercept, high * frame.slope + frame.intercept
    return min(values) if which is min else max(values)


def _inverted(image: Voxels, header: DicomHeader) -> Voxels:
    """Return the image with white and black exchanged over the range of its stored bits."""
    low, high = _stored_range(header)
    turned: Voxels = np.subtract(low + high, image.astype(np.int64)).astype(image.dtype)
    return turned


def _padding(image: Voxels, header: DicomHeader) -> NDArray[np.intp] | None:
    if header.padding is None:
        return None
    if header.padding_limit is None:
        mask = image == header.padding
    else:
        low, high = sorted((header.padding, header.padding_limit))
        mask = (image >= low) & (image <= high)  # type: ignore[operator]
    return np.flatnonzero(mask) if mask.any() else None


def _fill_padding(planes: Voxels, padded: dict[int, NDArray[np.intp]], modality: str, flags: set[str]) -> None:
    """Give voxels outside the scanned field the lowest plausible value; padding inside the plausible range stays.

    The lowest plausible value is that of air in CT, elsewhere the smallest value of the other voxels.
    """
    if not padded or planes.ndim != 3:
        return
    size = planes[0].size
    if modality == "CT":
        low, high = float(AIR_HU), 3 * 32768.0
    low_seen, high_seen = math.inf, -math.inf
    for place in range(len(planes)):
        values = planes[place].reshape(-1)
        rest = np.delete(values, padded[place]) if place in padded else values
        if rest.size:
            low_seen, high_seen = min(low_seen, float(rest.min())), max(high_seen, float(rest.max()))
    if not math.isfinite(low_seen):
        return
    if modality != "CT":
        low, high = low_seen, high_seen
    else:
        high = max(high_seen, low)
    for place, where in padded.items():
        flat = planes[place].reshape(size)
        values = flat[where].astype(np.float64)
        # Zero is a common padding of MR, below all tissue: already the value of an empty background.
        outside = (values < low) & (values != 0) | (values > high)
        if modality == "CT":
            outside = (values < low) | (values > high)
        if outside.any():
            flat[where[outside]] = low
            flags.add("padding_replaced")


def _frame_count(volume: DicomVolume) -> int:
    return 1 if volume.channels == "colour" else volume.shape[0]


def _repair(frames: Voxels, volume: DicomVolume) -> Voxels:
    """Return frames (C, Z, Y, X[, 3]) with tilt resampled and missing planes interpolated."""
    result = frames
    if volume.shifts:
        rows, columns = volume.shape[2:]
        empty = AIR_HU if volume.modality == "CT" and frames.ndim == 4 else frames.min()
        result = np.full((*frames.shape[:2], rows, columns, *frames.shape[4:]), empty, frames.dtype)
        for frame in range(frames.shape[0]):
            for number, (x, y) in enumerate(volume.shifts):
                result[frame, number] = shifted(frames[frame, number], x, y, (rows, columns), float(empty))
    for place, (file, _) in enumerate(volume.slices):
        if file < 0:
            frame, number = divmod(place, frames.shape[1])
            before, after = result[frame, number - 1].astype(np.float64), result[frame, number + 1].astype(np.float64)
            result[frame, number] = _like(result.dtype, (before + after) / 2)
    return result


def shifted(plane: Voxels, x: float, y: float, size: tuple[int, int], empty: float) -> Voxels:
    """Return a plane moved by a part of a voxel onto a larger grid, linearly interpolated.

    Args:
        plane: Shape: (Y, X) or (Y, X, 3).
        x: Column of the new grid on which the plane's first column comes to lie.
        y: The same for rows.
        size: Rows and columns of the new grid.
        empty: Value outside the plane.
    """
    moved = _moved(_moved(plane.astype(np.float64), y, size[0], 0, empty), x, size[1], 1, empty)
    return _like(plane.dtype, moved)


def _moved(plane: NDArray[np.float64], offset: float, length: int, axis: int, empty: float) -> NDArray[np.float64]:
    source = np.arange(length) - offset
    lower = np.floor(source + 1e-9).astype(int)
    part = np.clip(source - lower, 0, 1)
    part = np.where(part < 1e-6, 0.0, part)
    count = plane.shape[axis]
    upper = np.where(part > 0, lower + 1, lower)
    inside = (lower >= 0) & (upper < count)
    shape = [1] * plane.ndim
    shape[axis] = length
    weight = part.reshape(shape)
    low = np.take(plane, np.clip(lower, 0, count - 1), axis=axis)
    high = np.take(plane, np.clip(upper, 0, count - 1), axis=axis)
    return np.where(inside.reshape(shape), low * (1 - weight) + high * weight, empty)


def _like(dtype: np.dtype, values: NDArray[np.float64]) -> Voxels:
    return np.rint(values).astype(dtype) if dtype.kind in "ui" else values.astype(dtype)


def _finite(array: Voxels) -> Voxels:
    good = np.isfinite(array)
    if 2 * int(good.sum()) < array.size:
        raise InputRefused("not_finite", "most voxels are not finite")
    return np.nan_to_num(array, nan=array[good].min(), posinf=array[good].max(), neginf=array[good].min())
