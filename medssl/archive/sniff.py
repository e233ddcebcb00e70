"""What a file is, told by its first bytes and never by its name."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Literal

from medssl.errors import InputRefused

Format = Literal["dicom", "nifti", "nrrd", "metaimage", "mgh", "png", "jpeg", "tiff"]

# A NIfTI-2 header has 540 bytes; a tar has its magic at 257, DICOM at 128.
_HEAD = 1024

_ARCHIVES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x1f\x9d", "compress"),
)
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "PDF"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"\x89HDF", "HDF5"),
    (b"CDF\x01", "NetCDF"),
    (b"\x93NUMPY", "NumPy array"),
    (b"SQLite format 3", "SQLite"),
    (b"PAR1", "Parquet"),
    (b"<?xml", "XML"),
    (b"<!DOCTYPE", "HTML"),
    (b"MZ", "program"),
    (b"\x7fELF", "program"),
    (b"{", "JSON or text"),
)


def sniff(path: Path) -> Format:
    """Return the format of a file.

    Args:
        path: A regular file.

    Raises:
        InputRefused: If it is empty, packed, or no format that is read here.
        OSError: If it cannot be read.
    """
    with path.open("rb") as handle:
        head = handle.read(_HEAD)
        size = handle.seek(0, 2)
    if not head:
        raise InputRefused("empty_file", "0 bytes")
    if head[:2] == b"\x1f\x8b":
        return _inside_gzip(head)
    found = sniff_bytes(head, size)
    if found is not None:
        return found
    for magic, name in _ARCHIVES:
        if head.startswith(magic):
            raise InputRefused("archive_not_opened", name)
    if head[257:262] == b"ustar":
        raise InputRefused("archive_not_opened", "tar")
    for magic, name in _OTHERS:
        if head.lstrip().startswith(magic):
            raise InputRefused("not_an_image", name)
    raise InputRefused("not_an_image", "unknown content")


def sniff_bytes(head: bytes, size: int | None) -> Format | None:
    """Return the format that the first bytes of a file belong to, or None.

    Args:
        head: The first 1024 bytes, fewer if the file is shorter.
        size: Bytes of the file, or None where it is not known (inside gzip).

    Raises:
        InputRefused: If it is ANALYZE, or nearly NIfTI with a wrong magic.
    """
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return "tiff"
    if re.match(rb"NRRD000\d", head):
        return "nrrd"
    if _is_nifti(head, size):
        return "nifti"
    if re.match(rb"\s*(ObjectType|NDims|Comment|ObjectSubType)\s*=", head) and re.search(rb"NDims\s*=\s*\d", head):
        return "metaimage"
    if _is_mgh(head):
        return "mgh"
    if _is_bare_dicom(head, size):
        return "dicom"
    return None


def _inside_gzip(head: bytes) -> Format:
    try:
        # At most 1 kB is made, whatever the stream would grow to.
        inner = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
    except zlib.error as error:
        raise InputRefused("truncated", "damaged gzip stream") from error
    found = sniff_bytes(inner, None) if inner else None
    if found in ("nifti", "mgh"):
        return found
    raise InputRefused("archive_not_opened", "gzip" if found is None else f"gzip of {found}")


def _is_nifti(head: bytes, size: int | None) -> bool:
    for order in "<>":
        if len(head) >= 4:
            (header_size,) = struct.unpack_from(order + "i", head)
            if header_size == 540 and head[4:7] in (b"n+2", b"ni2"):
                return True
            if header_size == 348:
                if head[344:347] in (b"n+1", b"ni1"):
                    return True
                if len(head) < 348:
                    raise InputRefused("truncated", "the NIfTI header ends early")
                _refuse_near_nifti(head, size, order)
            if header_size == 540:
                raise InputRefused("header_invalid", "NIfTI-2 header size but not its magic")
    return False


def _refuse_near_nifti(head: bytes, size: int | None, order: str) -> None:
    dimensions = struct.unpack_from(order + "8h", head, 40)
    if not 1 <= dimensions[0] <= 7:
        raise InputRefused("header_invalid", f"NIfTI header size but not its magic, {dimensions[0]} dimensions")
    # ANALYZE keeps header and voxels apart; its header is little more than 348 bytes.
    if size is not None and size <= 512:
        raise InputRefused("analyze_format", "ANALYZE 7.5 header")
    raise InputRefused("header_invalid", "NIfTI header size but not its magic; ANALYZE or damaged")


def _is_mgh(head: bytes) -> bool:
    if len(head) < 284:
        return False
    version, x, y, z, frames, kind = struct.unpack_from(">6i", head)
    good_ras = struct.unpack_from(">h", head, 28)[0]
    return version == 1 and min(x, y, z, frames) > 0 and kind in (0, 1, 3, 4, 10) and good_ras in (0, 1)


_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)


def _is_bare_dicom(head: bytes, size: int | None) -> bool:
    """Tell whether the file begins with DICOM elements at once: no preamble, and groups 0002 or 0008 that make sense.

    Four elements in ascending order whose lengths stay small are asked for: text files do not look like this.
    """
    if len(head) < 24:
        return False
    for order in "<>":
        position, last, seen = 0, -1, 0
        while position + 8 <= len(head) and seen < 4:
            group, element = struct.unpack_from(order + "HH", head, position)
            tag = group << 16 | element
            if tag <= last or group not in (0x0002, 0x0008):
                break
            vr = head[position + 4 : position + 6]
            if vr in _VRS:
                long_form = vr in (
                    b"OB",
                    b"OD",
                    b"OF",
                    b"OL",
                    b"OV",
                    b"OW",
                    b"SQ",
                    b"UC",
                    b"UN",
                    b"UR",
                    b"UT",
                    b"SV",
                    b"UV",
                )
                if long_form and position + 12 > len(head):
                    break
                offset = 12 if long_form else 8
                length = struct.unpack_from(
                    order + ("I" if long_form else "H"), head, position + offset - (4 if long_form else 2)
                )[0]
            else:
                offset, length = 8, struct.unpack_from(order + "I", head, position + 4)[0]
            if length == 0xFFFFFFFF:  # a sequence of undefined length ends what can be checked here
                return seen >= 2
            if length > 4096 or (size is not None and position + offset + length > size):
                break
            last, seen, position = tag, seen + 1, position + offset + length
        if seen >= 4 or (seen >= 2 and position > len(head) - 8):
            return True
    return False
