"""NRRD with attached or detached voxels (teem.sourceforge.net/nrrd/format.html)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medssl.archive.formats.common import Geometry, Layout, check_vector
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
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(
        ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"), 4
    ),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), 8),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double"), 8),
}
_ENCODINGS: dict[str, Literal["raw", "deflated", "text"]] = {
    "raw": "raw",
    "gzip": "deflated",
    "gz": "deflated",
    "ascii": "text",
    "text": "text",
    "txt": "text",
}
#: Sign of each axis of a named space against RAS.
_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_NO_IMAGE_KINDS = ("covariant-vector", "normal", "complex", "point", "gradient", "quaternion")
_RANGE_KINDS = (
    "list",
    "vector",
    "rgb-color",
    "rgba-color",
    "hsv-color",
    "xyz-color",
    "stub",
    "scalar",
    "none",
    "4-color",
    "3-color",
)
_MILLIMETRES = {"mm": 1.0, "millimeter": 1.0, "um": 1e-3, "cm": 10.0, "m": 1000.0}


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
    fields, lines, end = _parse(head_of(path))
    count = integers(_need(fields, "dimension"), 1)[0]
    if not 2 <= count <= 4:
        raise InputRefused("dimensions_unsupported", f"{count} dimensions")
    sizes = integers(_need(fields, "sizes"), count)
    kind = " ".join(_need(fields, "type").lower().split())
    if kind not in _BYTES:
        raise InputRefused("dtype_unsupported", "the NRRD type is no number")
    encoding = _need(fields, "encoding").lower()
    if encoding not in _ENCODINGS:
        raise InputRefused("compression_unsupported", "the NRRD encoding is not raw, gzip or text")
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * count
    if len(kinds) != count:
        raise InputRefused("header_invalid", f"{len(kinds)} kinds for {count} dimensions")
    spatial, colour = _spatial_axes(fields, kinds, count)
    frames = int(np.prod([size for axis, size in enumerate(sizes) if axis not in spatial], dtype=object))
    if "vector" in kinds:
        colour |= check_vector(frames, byte=kind in ("uchar", "unsigned char", "uint8", "uint8_t"))
    affine, flags = _affine(fields, spatial, count)
    return TextHeader(
        sizes=tuple(sizes[axis] for axis in spatial),
        frames=frames,
        itemsize=_BYTES[kind],
        affine=affine,
        flags=tuple(flags),
        colour=colour and frames in (3, 4),
        compressed=_ENCODINGS[encoding],
        files=_files(fields, lines, path, root, end),
        label=any(re.match(r"segment\d+_id", name) for name in fields),
        reader="NrrdImageIO",
    )


def _spatial_axes(fields: dict[str, str], kinds: list[str], count: int) -> tuple[list[int], bool]:
    """Return the axes of the grid, and whether the other one is colour."""
    directions = _vectors(fields["space directions"], count) if "space directions" in fields else None
    spatial, colour = [], False
    for axis, kind in enumerate(kinds):
        if kind in _NO_IMAGE_KINDS or re.match(r"\d+d-", kind):
            raise InputRefused(
                "dimensions_unsupported", "an axis holds vectors or complex numbers: a field, not an image"
            )
        colour |= kind in ("rgb-color", "rgba-color")
        if kind not in _RANGE_KINDS and (directions is None or directions[axis] is not None):
            spatial.append(axis)
    if len(spatial) == 4:
        spatial = [0, 1, 2]  # the last one is time
    if len(spatial) not in (2, 3) or count - len(spatial) > 1:
        raise InputRefused("dimensions_unsupported", f"{len(spatial)} axes of space among {count}")
    return spatial, colour


def _affine(fields: dict[str, str], spatial: list[int], count: int) -> tuple[NDArray[np.float64], list[str]]:
    flags: list[str] = []
    space = fields.get("space", "").lower()
    size = len(spatial)
    if "space directions" in fields:
        vectors = _vectors(fields["space directions"], count)
        columns = [vectors[axis] or [] for axis in spatial]
        if any(len(column) != len(columns[0]) or len(column) < size for column in columns):
            raise InputRefused("header_invalid", "space directions do not fit the dimensions")
        columns = [column[:3] for column in columns]
    else:
        spacing = _spacings(fields, count)
        if spacing is None:
            flags.append("spacing_unknown")
        columns = [list(row) for row in np.diag([(spacing or [1.0] * count)[axis] for axis in spatial])]
    lengths = np.linalg.norm(np.array(columns, np.float64), axis=1)
    if not np.isfinite(lengths).all() or (lengths <= 0).any():
        raise InputRefused("spacing_invalid", f"voxel size (x, y, z) = {tuple(float(length) for length in lengths)}")
    factor = _unit(fields)
    if factor != 1.0:
        flags.append("units_converted")
    if size == 2:
        flags.append("orientation_unknown")
        return np.diag([*(lengths * factor), 1.0, 1.0]), flags
    origin_text = re.findall(r"\(([^)]*)\)", fields.get("space origin", ""))
    origin = numbers(origin_text[0])[:3] if origin_text else [0.0] * 3  # a fourth one is time
    if len(origin) != 3:
        raise InputRefused("header_invalid", f"space origin of {len(origin)} numbers")
    signs = _SPACES.get(space.removesuffix("-time"))
    if signs is None or "space directions" not in fields:
        flags.append("orientation_unknown")
    affine = affine_of(columns, origin)
    if not np.isfinite(affine).all():
        raise InputRefused("affine_invalid", "space directions or space origin are not finite")
    affine[:3] *= factor
    # Without a named space ITK takes the numbers as LPS.
    return (TO_RAS if signs is None else np.diag([*signs, 1.0])) @ affine, flags


def _spacings(fields: dict[str, str], count: int) -> list[float] | None:
    if "spacings" not in fields:
        return None
    return numbers(fields["spacings"], count)


def _unit(fields: dict[str, str]) -> float:
    names = {name.strip().lower() for name in re.findall(r'"([^"]*)"', fields.get("space units", ""))} - {""}
    if len(names) > 1 or (names and next(iter(names)) not in _MILLIMETRES):
        return 1.0
    return _MILLIMETRES[next(iter(names))] if names else 1.0


def _vectors(text: str, count: int) -> list[list[float] | None]:
    parts = re.findall(r"none|\([^)]*\)", text)
    if len(parts) != count:
        raise InputRefused("header_invalid", f"{len(parts)} space directions for {count} dimensions")
    return [None if part == "none" else numbers(part[1:-1]) for part in parts]


def _parse(head: bytes) -> tuple[dict[str, str], list[str], int]:
    """Return the fields and key/value pairs in lower case, the lines behind a LIST, and where attached voxels begin."""
    fields: dict[str, str] = {}
    position = head.find(b"\n") + 1
    while 0 < position < len(head):
        end = head.find(b"\n", position)
        end = len(head) if end < 0 else end
        line = head[position:end].decode("latin-1").strip()
        position = end + 1
        if not line:
            return fields, [], position
        if line.startswith("#"):
            continue
        name, colon, value = line.partition(":")
        if not colon:
            raise InputRefused("header_invalid", "a line of the NRRD header has no ':'")
        name = _ALIASES.get(name.strip().lower(), name.strip().lower())
        fields[name] = value.removeprefix("=").strip()
        if name == "data file" and fields[name].upper().startswith("LIST"):
            return fields, [part for part in head[position:].decode("latin-1").splitlines() if part.strip()], position
    if "data file" in fields:
        return fields, [], len(head)
    raise InputRefused("truncated", "the NRRD header does not end")


_ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}


def _files(fields: dict[str, str], lines: list[str], path: Path, root: Path, end: int) -> tuple[tuple[Path, int], ...]:
    skipped = integers(fields.get("byte skip", "0"), 1)[0]
    if skipped < -1 or integers(fields.get("line skip", "0"), 1)[0] < 0:
        raise InputRefused("header_invalid", "byte skip or line skip is negative")
    value = fields.get("data file")
    if value is None:
        return ((path, end + max(skipped, 0)),)
    words = value.split()
    if words and words[0].upper() == "LIST":
        names = [line.strip() for line in lines]
    elif "%" in words[0] and len(words) >= 4:
        names = expand(words[0], *integers(" ".join(words[1:4]), 3))
    else:
        names = [value]
    if not names:
        raise InputRefused("header_invalid", "data file names no file")
    return tuple((inside(name, path, root), max(skipped, 0)) for name in names)


def _need(fields: dict[str, str], name: str) -> str:
    if not fields.get(name):
        raise InputRefused("header_invalid", f"the NRRD header has no {name}")
    return fields[name]
