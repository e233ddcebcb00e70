"""MetaImage, .mha and .mhd (ITK's MetaIO documentation); positions are LPS millimetres."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medssl.archive.formats.common import Geometry, Layout
from medssl.archive.formats.itk import (
    TO_RAS,
    TextHeader,
    affine_of,
    expand,
    head_of,
    inside,
    integers,
    layout_of,
    numbers,
    read_image,
)
from medssl.archive.volume import Volume
from medssl.errors import InputRefused

_BYTES = {
    "MET_CHAR": 1,
    "MET_UCHAR": 1,
    "MET_SHORT": 2,
    "MET_USHORT": 2,
    "MET_INT": 4,
    "MET_UINT": 4,
    "MET_LONG": 8,
    "MET_ULONG": 8,
    "MET_LONG_LONG": 8,
    "MET_ULONG_LONG": 8,
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}


def check(path: Path, root: Path) -> Layout:
    """Read and check the header.

    Args:
        path: The header, or header and voxels in one.
        root: Folder that all voxels must lie in.

    Raises:
        InputRefused: If header and files do not fit.
    """
    return layout_of(_read_header(path, root), path)


def load(path: Path, root: Path, geometry: Geometry = "strict") -> Volume:
    """Read the image.

    Raises:
        InputRefused: If it cannot be used.
    """
    return read_image(path, _read_header(path, root), geometry)


def _read_header(path: Path, root: Path) -> TextHeader:
    fields, rest, end = _parse(head_of(path))
    count = integers(_need(fields, "NDims"), 1)[0]
    if count not in (2, 3, 4):
        raise InputRefused("dimensions_unsupported", f"{count} dimensions")
    sizes = integers(_need(fields, "DimSize"), count)
    kind = _need(fields, "ElementType").removesuffix("_ARRAY")
    if kind not in _BYTES:
        raise InputRefused("dtype_unsupported", "the MetaImage ElementType is no number")
    channels = integers(fields.get("ElementNumberOfChannels", "1"), 1)[0]
    flags = []
    spatial = min(count, 3)
    spacing_text = fields.get("ElementSpacing") or fields.get("ElementSize")
    if spacing_text is None:
        flags.append("spacing_unknown")
    spacing = numbers(spacing_text, count) if spacing_text else [1.0] * count
    if any(not np.isfinite(size) or size <= 0 for size in spacing[:spatial]):
        raise InputRefused("spacing_invalid", f"ElementSpacing {tuple(spacing)}")
    matrix_text = _first(fields, "TransformMatrix", "Rotation", "Orientation")
    if matrix_text is None or spatial == 2:
        flags.append("orientation_unknown")
    # Row i of the text is the direction of axis i.
    matrix = np.array(numbers(matrix_text, count * count)).reshape(count, count) if matrix_text else np.eye(count)
    origin = numbers(_first(fields, "Offset", "Position", "Origin") or " ".join(["0"] * count), count)
    columns = [(matrix[axis, :spatial] * spacing[axis]).tolist() for axis in range(spatial)]
    affine = affine_of(columns, origin[:spatial])
    if not np.isfinite(affine).all():
        raise InputRefused("affine_invalid", "TransformMatrix or Offset is not finite")
    if spatial == 3:
        affine = TO_RAS @ affine
    else:
        affine = np.diag([spacing[0], spacing[1], 1.0, 1.0])  # a picture: its rows stay as they stand
    frames = channels * (sizes[3] if count == 4 else 1)
    compressed = fields.get("CompressedData", "False").lower() in ("true", "1")
    text = fields.get("BinaryData", "True").lower() in ("false", "0")
    return TextHeader(
        sizes=tuple(sizes[:spatial]),
        frames=frames,
        itemsize=_BYTES[kind],
        affine=affine,
        flags=tuple(flags),
        colour=channels in (3, 4) and kind == "MET_UCHAR" and count < 4,
        compressed="deflated" if compressed else "text" if text else "raw",
        files=_files(_need(fields, "ElementDataFile"), rest, path, root, end, fields),
        label=False,
        reader="MetaImageIO",
    )


def _parse(head: bytes) -> tuple[dict[str, str], list[str], int]:
    """Return the fields, the lines behind the last one (names of a LIST), and where the voxels of LOCAL begin."""
    fields: dict[str, str] = {}
    position = 0
    while position < len(head):
        end = head.find(b"\n", position)
        end = len(head) if end < 0 else end
        name, equals, value = head[position:end].decode("latin-1").partition("=")
        position = end + 1
        if not equals:
            if name.strip():
                raise InputRefused("header_invalid", "a line of the MetaImage header has no '='")
            continue
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            listed = value.strip().upper().startswith("LIST")
            lines = head[position:].decode("latin-1").splitlines() if listed else []
            return fields, [line.strip() for line in lines if line.strip()], position
    raise InputRefused("truncated", "the MetaImage header has no ElementDataFile")


def _files(
    value: str, lines: list[str], path: Path, root: Path, end: int, fields: dict[str, str]
) -> tuple[tuple[Path, int], ...]:
    before = integers(fields.get("HeaderSize", "0"), 1)[0]
    if before < -1:
        raise InputRefused("header_invalid", f"HeaderSize {before}")
    words = value.split()
    if value.upper() in ("LOCAL", "LOCAL "):
        return ((path, end),)
    if words and words[0].upper() == "LIST":
        names = lines
    elif "%" in value and len(words) >= 3:
        first, last, step = integers(" ".join([*words[1:4], "1"][:3]), 3)
        names = expand(words[0], first, last, step)
    else:
        names = [value]
    if not names:
        raise InputRefused("header_invalid", "ElementDataFile names no file")
    return tuple((inside(name, path, root), max(before, 0)) for name in names)


def _need(fields: dict[str, str], name: str) -> str:
    if not fields.get(name):
        raise InputRefused("header_invalid", f"the MetaImage header has no {name}")
    return fields[name]


def _first(fields: dict[str, str], *names: str) -> str | None:
    return next((fields[name] for name in names if fields.get(name)), None)
