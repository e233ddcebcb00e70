"""What all file formats share: limits, checks of the grid, voxels that are not finite."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import numpy as np

from medssl.archive.volume import UNKNOWN_MODALITY, Channels, Volume, spacing_of
from medssl.errors import InputRefused

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

Geometry = Literal["strict", "repair"]

#: The most bytes that the voxels of one volume may need, as stored and as float32.
MAX_VOLUME_BYTES = 4 * 2**30
#: Deflate cannot shrink below one bit in 1032 (zlib's technical details).
MAX_DEFLATE_RATIO = 1032
#: Voxel sizes outside are a mistake of units or of the header.
SMALLEST_MM, LARGEST_MM = 1e-6, 500.0
# Axes that are off the right angle by more than this cosine put a corner of 512 voxels half a voxel off.
_SHEAR = 1e-3
_MOST_NOT_FINITE = 0.5


@dataclass(frozen=True)
class Layout:
    """What a header promises, checked.

    Attributes:
        shape: (C, Z, Y, X).
        companions: Other files that hold the voxels, absolute.
        related: Kind of related object, if the file is no image to learn from; else empty.
    """

    shape: tuple[int, int, int, int]
    companions: tuple[Path, ...] = ()
    related: str = ""


def check_dimensions(dimensions: Sequence[int]) -> None:
    """Refuse dimensions that no image has."""
    if not dimensions or any(size < 1 for size in dimensions):
        raise InputRefused("header_invalid", f"dimensions {tuple(dimensions)}")


def check_bytes(dimensions: Sequence[int], itemsize: int) -> int:
    """Return the bytes of the voxels, or refuse what exceeds the limit.

    Args:
        dimensions: All dimensions, channels included.
        itemsize: Bytes of a stored voxel.
    """
    voxels = math.prod(dimensions)
    if voxels * max(itemsize, 4) > MAX_VOLUME_BYTES:
        raise InputRefused(
            "too_large", f"dimensions {tuple(dimensions)} need {voxels * max(itemsize, 4) / 2**30:.1f} GiB, limit 4 GiB"
        )
    return voxels * itemsize


def check_stored(needed: int, available: int, *, deflated: bool) -> None:
    """Refuse a header that promises more than the file can hold.

    Args:
        needed: Bytes that the header promises.
        available: Bytes of the file behind the header.
        deflated: Whether they are gzip or zlib.
    """
    most = available * MAX_DEFLATE_RATIO if deflated else available
    if needed > most:
        raise InputRefused("truncated", f"the header promises {needed} bytes, the file holds at most {max(most, 0)}")


def check_vector(components: int, *, byte: bool) -> bool:
    """Tell whether an image marked as "vector" is colour; refuse it if it is likely a field of displacements.

    Programs mark everything with several numbers a voxel so: colours, echoes and displacements.

    Args:
        components: Numbers a voxel.
        byte: Whether they are unsigned bytes.
    """
    if components in (3, 4) and byte:
        return True
    if components in (2, 3):
        raise InputRefused("dimensions_unsupported", f"a field of vectors with {components} components, not an image")
    return False


def is_gzip(path: Path) -> bool:
    """Tell whether a file begins with gzip's magic."""
    with path.open("rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


def open_stream(path: Path) -> IO[bytes]:
    """Open a file that may be gzip; only what is read is unpacked."""
    return cast(IO[bytes], gzip.open(path, "rb") if is_gzip(path) else path.open("rb"))


def read_head(path: Path, size: int) -> bytes:
    """Return the first bytes of a file that may be gzip, fewer if there are not so many.

    Raises:
        InputRefused: If the gzip stream ends within them or is damaged.
    """
    try:
        with open_stream(path) as stream:
            return stream.read(size)
    except EOFError as error:
        raise InputRefused("truncated", "the gzip stream ends in the header") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputRefused("decode_failed", "the gzip stream is damaged") from error


def read_voxels(path: Path, offset: int, dtype: DTypeLike, shape: Sequence[int]) -> NDArray[Any]:
    """Read raw voxels from a file that may be gzip, in the machine's byte order.

    Args:
        path: The file.
        offset: Unpacked bytes before the first voxel.
        dtype: Stored type with its byte order.
        shape: Slowest axis first.

    Raises:
        InputRefused: If the stream ends early or is damaged.
    """
    kind = np.dtype(dtype)
    array = np.empty(tuple(shape), kind)
    target = memoryview(array.reshape(-1).view(np.uint8).data)
    try:
        with open_stream(path) as stream:
            skip(stream, offset)
            filled = 0
            while filled < len(target):
                count = stream.readinto(target[filled : filled + 2**24])  # type: ignore[attr-defined]
                if not count:
                    raise InputRefused("truncated", f"the voxels end after {filled} of {len(target)} bytes")
                filled += count
    except EOFError as error:
        raise InputRefused("truncated", "the gzip stream ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputRefused("decode_failed", "the gzip stream is damaged") from error
    return array if kind.isnative else array.byteswap(inplace=True).view(kind.newbyteorder("="))


def skip(stream: IO[bytes], count: int) -> None:
    """Read over `count` bytes, in pieces."""
    while count:
        piece = stream.read(min(count, 2**20))
        if not piece:
            raise InputRefused("truncated", "the file ends before its voxels")
        count -= len(piece)


def check_affine(affine: NDArray[np.float64]) -> str:
    """Return the code of what is wrong with an affine, or an empty string.

    Args:
        affine: Maps (x, y, z) to mm. Shape: (4, 4).

    Returns:
        `affine_invalid`, `spacing_invalid`, `affine_sheared` or empty.
    """
    if not np.isfinite(affine).all():
        return "affine_invalid"
    spacing = np.array(spacing_of(affine))
    if (spacing < SMALLEST_MM).any() or (spacing > LARGEST_MM).any():
        return "spacing_invalid"
    directions = affine[:3, :3] / spacing[::-1]
    if abs(np.linalg.det(directions)) < 1e-3:
        return "affine_invalid"
    return "affine_sheared" if np.abs(directions.T @ directions - np.eye(3)).max() > _SHEAR else ""


def finish(
    array: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    geometry: Geometry,
    channels: Channels,
    flags: Sequence[str] = (),
    modality: str = UNKNOWN_MODALITY,
) -> Volume:
    """Check the grid, repair it if that is asked for, and make the voxels finite numbers of an ordinary type.

    Args:
        array: Voxels. Shape: (C, Z, Y, X).
        affine: Maps (x, y, z) to RAS mm. Shape: (4, 4).
        geometry: What to do with a sheared grid.
        channels: What C means.
        flags: What was found so far.
        modality: DICOM's code, if known.

    Raises:
        InputRefused: If the affine cannot be used or most voxels are not finite.
    """
    affine = np.asarray(affine, np.float64)
    array, found = ordinary(array)
    code, repaired = check_affine(affine), "regular"
    if code == "affine_sheared" and geometry == "repair":
        from medssl.archive.formats.shear import resample_sheared

        array, affine = resample_sheared(array, affine, MAX_VOLUME_BYTES)
        repaired = "shear_resampled"
    elif code:
        raise InputRefused(code, describe_affine(affine))
    return Volume(array, affine, modality, channels, tuple(sorted({*flags, *found})), repaired)


def ordinary(array: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
    """Return voxels as integers or float32, all finite, and the flags of what was changed."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8), []
    if array.dtype.kind in "iu":
        if array.dtype.itemsize < 8:
            return np.ascontiguousarray(array), []
        fits = array.min() >= -(2**31) and array.max() < 2**31
        return array.astype(np.int32 if fits else np.float32), []
    if array.dtype.kind != "f":
        raise InputRefused("dtype_unsupported", f"voxels of type {array.dtype}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(array)
    bad = array.size - int(np.count_nonzero(finite))
    if not bad:
        return array, []
    if bad > _MOST_NOT_FINITE * array.size:
        raise InputRefused("not_finite", f"{100 * bad / array.size:.0f} % of the voxels are not finite")
    low, high = float(array[finite].min()), float(array[finite].max())
    return np.nan_to_num(array, copy=True, nan=low, posinf=high, neginf=low), ["non_finite_replaced"]


def describe_affine(affine: NDArray[np.float64]) -> str:
    """Return what is worth knowing of an affine that is refused."""
    z, y, x = spacing_of(affine)
    return f"voxel size {z:g} x {y:g} x {x:g} mm, determinant {float(np.linalg.det(affine[:3, :3])):g}"
