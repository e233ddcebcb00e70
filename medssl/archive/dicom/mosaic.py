"""Siemens mosaics: all slices of one time point as tiles of one image (layout as dcm2niix and nibabel describe it)."""

from __future__ import annotations

import math
import struct
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.model import Frame
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

_MAX_CSA_ELEMENTS = 1024
_MAX_CSA_ITEMS = 4096


@dataclass(frozen=True)
class Mosaic:
    """Planes of a mosaic.

    Attributes:
        frames: One for each tile that holds a slice.
        tiles: Tiles in a row (and rows of tiles).
        rows: Rows of one tile.
        columns: Columns of one tile.
        normal_assumed: The direction of the slices was not told.
    """

    frames: tuple[Frame, ...]
    tiles: int
    rows: int
    columns: int
    normal_assumed: bool


def is_mosaic(image_type: tuple[str, ...], header: Tags) -> bool:
    """Tell whether the file says that it is a mosaic."""
    return "MOSAIC" in image_type or (
        header.text(t.SIEMENS_CREATOR) == "SIEMENS MR HEADER" and (header.integer(t.MOSAIC_COUNT) or 0) > 1
    )


def mosaic_frames(header: Tags, base: Frame, rows: int, columns: int, between: float | None) -> Mosaic:
    """Return the slices of a mosaic with their own positions.

    ImagePositionPatient of a mosaic is where the corner would lie if the whole image were one slice centred on the
    first one, so half of the surplus is added along both axes.

    Args:
        header: The top level of the file.
        base: Position, orientation and spacing as the file gives them.
        rows: Rows of the whole image.
        columns: Columns of the whole image.
        between: Spacing between slices in mm.

    Raises:
        InputRefused: If number, distance or direction of the slices cannot be told.
    """
    csa = read_csa(header.binary(t.CSA_IMAGE)) if header.text(t.CSA_CREATOR) == "SIEMENS CSA HEADER" else {}
    count = _count(header, csa)
    if len(base.position) != 3 or len(base.orientation) != 6 or len(base.spacing) != 2:
        raise InputRefused("mosaic_invalid", "no position, orientation or pixel spacing")
    if not all(math.isfinite(part) for part in (*base.position, *base.orientation, *base.spacing)):
        raise InputRefused("position_invalid", "a position, direction or spacing that is no number")
    if between is None or not math.isfinite(between) or between <= 0:
        raise InputRefused("mosaic_invalid", "the distance of the slices is not told")
    tiles = math.ceil(math.sqrt(count))
    if rows % tiles or columns % tiles:
        raise InputRefused("mosaic_invalid", f"{rows} x {columns} do not divide into {tiles} x {tiles} tiles")
    tile_rows, tile_columns = rows // tiles, columns // tiles
    row, column = np.array(base.orientation[:3]), np.array(base.orientation[3:])
    normal, assumed = _normal(csa, row, column)
    corner = (
        np.array(base.position)
        + row * base.spacing[1] * (columns - tile_columns) / 2
        + column * base.spacing[0] * (rows - tile_rows) / 2
    )
    frames = tuple(
        replace(base, number=index, position=tuple(float(part) for part in corner + normal * between * index))
        for index in range(count)
    )
    return Mosaic(frames, tiles, tile_rows, tile_columns, assumed)


def csa_diffusion(header: Tags) -> tuple[float | None, tuple[float, ...]]:
    """Return b-value and gradient of a Siemens image whose CSA header has them."""
    if header.text(t.CSA_CREATOR) != "SIEMENS CSA HEADER":
        return None, ()
    csa = read_csa(header.binary(t.CSA_IMAGE))
    value = csa.get("B_value", ())
    return (value[0] if value else None), csa.get("DiffusionGradientDirection", ())


def read_csa(content: bytes) -> dict[str, tuple[float, ...]]:
    """Return the numeric elements of a Siemens CSA header in its SV10 form; empty where it is none or damaged.

    Args:
        content: Value of (0029,1010).
    """
    if content[:4] != b"SV10" or len(content) < 16:
        return {}
    result: dict[str, tuple[float, ...]] = {}
    try:
        (count,) = struct.unpack_from("<I", content, 8)
        position = 16
        for _ in range(min(count, _MAX_CSA_ELEMENTS)):
            name = content[position : position + 64].split(b"\0")[0].decode("latin-1")
            (items,) = struct.unpack_from("<i", content, position + 76)
            position += 84
            values: list[float] = []
            for _ in range(min(max(items, 0), _MAX_CSA_ITEMS)):
                (length,) = struct.unpack_from("<i", content, position + 4)
                position += 16
                if length < 0 or position + length > len(content):
                    return result
                text = content[position : position + length].split(b"\0")[0].strip()
                if text:
                    with suppress(ValueError):
                        values.append(float(text))
                position += (length + 3) // 4 * 4
            result[name] = tuple(values)
    except struct.error:
        return result
    return result


def _count(header: Tags, csa: dict[str, tuple[float, ...]]) -> int:
    count = None
    if header.text(t.SIEMENS_CREATOR) == "SIEMENS MR HEADER":
        count = header.integer(t.MOSAIC_COUNT)
    if count is None and csa.get("NumberOfImagesInMosaic"):
        count = int(csa["NumberOfImagesInMosaic"][0])
    if count is None or not 1 <= count <= 4096:
        raise InputRefused("mosaic_invalid", "the number of slices is not told")
    return count


def _normal(csa: dict[str, tuple[float, ...]], row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, bool]:
    cross = np.cross(row, column)
    told = csa.get("SliceNormalVector", ())
    if len(told) == 3 and np.isfinite(told).all():
        agreement = float(np.dot(told, cross))
        if abs(abs(agreement) - 1) > 0.01:
            raise InputRefused("mosaic_invalid", "the direction of the slices is not at right angles to them")
        return cross * math.copysign(1.0, agreement), False
    # Transverse stacks run head-wards on these scanners; for others either direction occurs.
    if abs(cross[2]) < math.cos(math.radians(45)):
        raise InputRefused("mosaic_invalid", "the direction of the slices is not told")
    return cross, True
