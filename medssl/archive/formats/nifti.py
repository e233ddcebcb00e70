"""NIfTI-1 and NIfTI-2, single files and pairs, either byte order, gzip or not (nifti1.h and nifti2.h of the DFWG)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl.archive.formats.common import (
    LARGEST_MM,
    SMALLEST_MM,
    Geometry,
    Layout,
    check_affine,
    check_bytes,
    check_dimensions,
    check_stored,
    check_vector,
    describe_affine,
    finish,
    is_gzip,
    read_head,
    read_voxels,
)
from medssl.archive.volume import Volume, spacing_of
from medssl.errors import InputRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LABEL, _SYMMETRIC, _DISPLACEMENT, _VECTOR, _RGB, _RGBA = 1002, 1005, 1006, 1007, 2003, 2004
_RGB24, _RGBA32 = 128, 2304
_UNITS = {"meter": 1000.0, "micron": 0.001}


@dataclass(frozen=True)
class _Header:
    fields: Any
    data: Path
    offset: int
    dtype: np.dtype[Any]
    layout: Layout


def check(path: Path) -> Layout:
    """Read and check the header.

    Raises:
        InputRefused: If header and file do not fit, or the image is of no supported kind.
    """
    return _read_header(path).layout


def read_affine(path: Path, geometry: Geometry = "strict") -> tuple[NDArray[np.float64], list[str]]:
    """Return the affine in mm and what is worth knowing of it, without reading voxels.

    Raises:
        InputRefused: If the header gives no usable one.
    """
    header = _read_header(path)
    return _affine(header.fields, header.layout.shape, geometry)


def load(path: Path, geometry: Geometry = "strict") -> Volume:
    """Read the image.

    Raises:
        InputRefused: If it cannot be used.
    """
    header = _read_header(path)
    affine, flags = _affine(header.fields, header.layout.shape, geometry)
    c, z, y, x = header.layout.shape
    channels: Any = "scalar" if c == 1 else "frames"
    intent = int(header.fields["intent_code"])
    if header.dtype.kind == "V" or (intent in (_RGB, _RGBA, _VECTOR) and c == 3):
        channels = "colour"
    if header.dtype.kind == "V":
        parts = len(header.dtype.names or ())
        pixels = read_voxels(header.data, header.offset, np.uint8, (z, y, x, parts))
        array = np.moveaxis(pixels[..., :3], -1, 0)
    else:
        stored = _stored_channels(header.fields, c)
        array = read_voxels(header.data, header.offset, header.dtype, (stored, z, y, x))[:c]
        array = _scaled(header.fields, array)
    if int(header.fields["datatype"]) == _RGBA32 or (c == 3 and _stored_channels(header.fields, c) == 4):
        flags.append("alpha_dropped")
    return finish(array, affine, geometry=geometry, channels=channels, flags=flags)


def _read_header(path: Path) -> _Header:
    import nibabel

    raw = read_head(path, 540)
    two = raw[4:7] in (b"n+2", b"ni2")
    kind = nibabel.Nifti2Header if two else nibabel.Nifti1Header
    size = 540 if two else 348
    if len(raw) < size:
        raise InputRefused("truncated", "the NIfTI header ends early")
    try:
        fields = kind(raw[:size], check=False)
        dtype = fields.get_data_dtype()
    except (nibabel.spatialimages.HeaderDataError, ValueError, KeyError) as error:
        raise InputRefused(
            "header_invalid", "the NIfTI header cannot be parsed, or its voxel type is unknown"
        ) from error
    pair = (raw[4:7] if two else raw[344:347]) in (b"ni1", b"ni2")
    data = _companion(path) if pair else path
    shape = _shape(fields, dtype)
    if dtype.kind not in "iufV" or (dtype.kind == "f" and dtype.itemsize > 8) or dtype.itemsize == 0:
        raise InputRefused("dtype_unsupported", f"voxels of type {dtype}")
    offset = _offset(fields, size, pair)
    stored = 1 if dtype.kind == "V" else _stored_channels(fields, shape[0])
    needed = check_bytes((stored, *shape[1:]), dtype.itemsize)
    check_stored(needed + offset, data.stat().st_size, deflated=is_gzip(data))
    _scaling(fields)
    related = "label_map" if int(fields["intent_code"]) == _LABEL else ""
    return _Header(fields, data, offset, dtype, Layout(shape, (data,) if pair else (), related))


def _shape(fields: Any, dtype: np.dtype[Any]) -> tuple[int, int, int, int]:
    dimensions = [int(size) for size in fields["dim"]]
    count = dimensions[0]
    if not 1 <= count <= 7:
        raise InputRefused("header_invalid", f"{count} dimensions")
    sizes = dimensions[1 : 1 + count]
    check_dimensions(sizes)
    x, y, z, frames, vector, *more = (*sizes, *([1] * (7 - count)))
    intent = int(fields["intent_code"])
    if any(size > 1 for size in more) or (frames > 1 and vector > 1) or (y == 1 and z == 1):
        raise InputRefused("dimensions_unsupported", f"dimensions {tuple(sizes)}")
    if intent == _VECTOR and vector > 1 and check_vector(vector, byte=dtype == np.uint8):
        return 3, z, y, x
    if intent in (_SYMMETRIC, _DISPLACEMENT) and vector > 1:
        raise InputRefused("dimensions_unsupported", f"a field of vectors or tensors (intent {intent}), not an image")
    if dtype.kind == "V":
        if frames * vector > 1:
            raise InputRefused("dimensions_unsupported", f"colour and dimensions {tuple(sizes)}")
        return 3, z, y, x
    if intent in (_RGB, _RGBA):
        if frames != 1 or vector != (3 if intent == _RGB else 4):
            raise InputRefused("dimensions_unsupported", f"colour (intent {intent}) and dimensions {tuple(sizes)}")
        return 3, z, y, x
    return frames * vector, z, y, x


def _stored_channels(fields: Any, channels: int) -> int:
    # Colours as vectors may come with opacity, which is dropped.
    return int(fields["dim"][5]) if channels == 3 and int(fields["dim"][5]) == 4 else channels


def _offset(fields: Any, size: int, pair: bool) -> int:
    offset = float(fields["vox_offset"])
    smallest = 0 if pair else size + 4
    if offset == 0 and not pair:
        return smallest
    if not math.isfinite(offset) or offset < smallest or offset != int(offset):
        raise InputRefused("header_invalid", f"vox_offset {offset:g}")
    return int(offset)


def _companion(path: Path) -> Path:
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    stem = name[:-4] if name.lower().endswith(".hdr") else name
    for ending in (".img", ".IMG", ".img.gz", ".IMG.gz"):
        candidate = path.with_name(stem + ending)
        if candidate.is_file() and candidate != path:
            return candidate
    raise InputRefused("companion_missing", "the .img file of a NIfTI pair is not beside its .hdr")


def _scaling(fields: Any) -> tuple[float, float] | None:
    """Return slope and intercept, or None where the stored values are meant.

    A slope of 0 means none (nifti1.h); nibabel writes NaN for none.
    """
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if math.isinf(slope) or (math.isfinite(slope) and slope != 0 and not math.isfinite(intercept)):
        raise InputRefused("scaling_invalid", f"slope {slope:g}, intercept {intercept:g}")
    return None if math.isnan(slope) or slope == 0 or (slope == 1 and intercept == 0) else (slope, intercept)


def _scaled(fields: Any, array: NDArray[Any]) -> NDArray[Any]:
    scaling = _scaling(fields)
    if scaling is None:
        return array
    result = np.empty(array.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for source, target in zip(array, result, strict=True):  # a frame at a time: float64 is twice as large
            target[...] = source.astype(np.float64) * scaling[0] + scaling[1]
    return result


def _affine(fields: Any, shape: tuple[int, int, int, int], geometry: Geometry) -> tuple[NDArray[np.float64], list[str]]:
    """Choose among sform, qform and pixdim: the sform unless it is unusable, as nibabel does, and say what differs."""
    flags: list[str] = []
    pixdim = _pixdim(fields, shape)
    sform, qform = _sform(fields), _qform(fields)
    has_sform, has_qform = int(fields["sform_code"]) > 0, int(fields["qform_code"]) > 0
    sform_fault = check_affine(sform) if sform is not None else "affine_invalid"
    qform_fault = check_affine(qform) if qform is not None else "affine_invalid"
    if has_sform and not sform_fault and sform is not None:
        affine = sform
        if has_qform and not qform_fault and qform is not None and _apart(sform, qform, shape):
            flags.append("qform_sform_differ")
    elif has_qform and not qform_fault and qform is not None and not _invalid(pixdim):
        affine = qform
        if has_sform:
            flags.append("qform_used")
    elif has_sform and sform is not None and sform_fault == "affine_sheared":
        affine = sform  # `finish` refuses or repairs it
    elif has_sform or has_qform:
        _refuse_pixdim(pixdim)
        raise InputRefused("affine_invalid", "neither sform nor qform of the NIfTI header can be used")
    else:
        _refuse_pixdim(pixdim)
        flags.append("orientation_unknown")
        affine = _base_affine(pixdim, shape)
    if _invalid(pixdim):
        # The matrix is whole, but the header contradicts it.
        if geometry == "strict":
            _refuse_pixdim(pixdim)
        flags.append("pixdim_differs")
    elif not np.allclose(pixdim[::-1], spacing_of(affine), rtol=0.01, atol=1e-3):
        flags.append("pixdim_differs")
    return _in_millimetres(fields, affine, flags), flags


def _pixdim(fields: Any, shape: tuple[int, int, int, int]) -> NDArray[np.float64]:
    pixdim = np.array(fields["pixdim"][1:4], np.float64)
    # The size of a voxel along an axis that has only one does not matter.
    single = np.array(shape[:0:-1]) == 1
    return np.where(single & ~(np.isfinite(pixdim) & (pixdim > 0)), 1.0, pixdim)


def _invalid(pixdim: NDArray[np.float64]) -> bool:
    return not (np.isfinite(pixdim) & (pixdim >= SMALLEST_MM * 1e-3)).all()


def _refuse_pixdim(pixdim: NDArray[np.float64]) -> None:
    if _invalid(pixdim):
        raise InputRefused("spacing_invalid", f"pixdim (x, y, z) = {tuple(float(size) for size in pixdim)}")


def _sform(fields: Any) -> NDArray[np.float64] | None:
    with np.errstate(all="ignore"):
        return np.array(fields.get_sform(), np.float64)


def _qform(fields: Any) -> NDArray[np.float64] | None:
    import nibabel

    try:
        with np.errstate(all="ignore"):
            return np.array(fields.get_qform(), np.float64)
    except (nibabel.spatialimages.HeaderDataError, ValueError):
        return None


def _base_affine(pixdim: NDArray[np.float64], shape: tuple[int, int, int, int]) -> NDArray[np.float64]:
    # As nibabel: x runs to the left, the origin is the centre.
    size = pixdim * (-1, 1, 1)
    affine = np.diag([*size, 1.0])
    affine[:3, 3] = -(np.array(shape[:0:-1]) - 1) / 2 * size
    return affine


def _apart(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, int, int, int]) -> bool:
    """Tell whether two affines put a corner of the volume more than half a voxel apart."""
    z, y, x = shape[1:]
    corners = np.array([(i, j, k, 1) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)], np.float64)
    distance = np.linalg.norm(corners @ (one - other).T, axis=1).max()
    return bool(distance > 0.5 * min(spacing_of(one)))


def _in_millimetres(fields: Any, affine: NDArray[np.float64], flags: list[str]) -> NDArray[np.float64]:
    try:
        factor = _UNITS.get(fields.get_xyzt_units()[0], 1.0)
    except (KeyError, ValueError):
        factor = 1.0
    if factor == 1.0:
        return affine
    flags.append("units_converted")
    converted = affine.copy()
    converted[:3] *= factor
    if max(spacing_of(converted)) > LARGEST_MM:
        raise InputRefused("spacing_invalid", f"{describe_affine(converted)} after conversion of the unit")
    return converted
