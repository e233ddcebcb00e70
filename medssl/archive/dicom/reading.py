"""Open a DICOM file: preamble or none, any transfer syntax, hostile lengths; only the wanted tags are kept."""

from __future__ import annotations

import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom import config
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from medssl.archive.dicom import tags as t
from medssl.errors import InputRefused

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
#: Transfer syntaxes whose pixels lie uncompressed in the file.
NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, EXPLICIT_BIG})

#: A classic header is 2 to 20 kB; one short read is then all an index costs.
FIRST_BYTES = 65536
#: What a deflated data set may grow to before its pixels.
MAX_INFLATED_HEADER = 64 * 2**20
_LONG = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})

WANTED = sorted(set(t.top_level()))

_pydicom_logger = logging.getLogger("pydicom")


@dataclass(frozen=True)
class Opened:
    """A file's elements up to its pixels.

    Attributes:
        dataset: The wanted elements.
        transfer_syntax: As declared, or as guessed where nothing is declared.
        size: Bytes of the file.
        pixel_tag: Tag of the pixels, 0 where there are none.
        pixel_length: Declared bytes of the pixels, -1 where undefined (compressed).
        pixel_available: Bytes from the pixels' start to the end of the (inflated) file; -1 where not known.
        media_class: SOP class that the file meta information names.
    """

    dataset: Dataset
    transfer_syntax: str
    size: int
    pixel_tag: int
    pixel_length: int
    pixel_available: int
    media_class: str = ""


class _Clamped(io.BytesIO):
    """A file of which no read asks for more than is there: a forged length then cannot allocate gigabytes."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        super().__init__()
        self._handle = handle
        self._size = size

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._handle.tell(), 0)
        return self._handle.read(left if size is None or size < 0 else min(size, left))

    def seek(self, position: int, whence: int = 0) -> int:
        return self._handle.seek(position, whence)

    def tell(self) -> int:
        return self._handle.tell()


def open_header(path: Path, wanted: Sequence[int] = WANTED) -> Opened:
    """Read the wanted elements in front of the pixels.

    Args:
        path: Any file.
        wanted: Tags to keep.

    Raises:
        InputRefused: If it is no DICOM file or its elements cannot be read.
        OSError: If the file cannot be read.
    """
    with path.open("rb", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size == 0:
            raise InputRefused("empty_file", "0 bytes")
        head = handle.read(min(size, FIRST_BYTES)) or b""
        start, syntax, media_class = _start(head)
        if syntax == DEFLATED:
            content, whole_content = _inflate(head[start:], handle, MAX_INFLATED_HEADER)
            opened = _parse(
                io.BytesIO(content), syntax, size, len(content) if whole_content else -1, wanted, media_class
            )
            if not opened.pixel_tag and not whole_content:
                raise InputRefused("deflated_too_large", f"the header grows past {MAX_INFLATED_HEADER} bytes")
            return opened
        if size > len(head):
            try:
                buffer = io.BytesIO(head)
                buffer.seek(start)
                opened = _parse(buffer, syntax, size, size, wanted, media_class)
                if opened.pixel_tag:
                    return opened
            except InputRefused:
                pass  # an element reaches past the first bytes: read on from the file itself
            with path.open("rb") as whole:
                whole.seek(start)
                return _parse(_Clamped(whole, size), syntax, size, size, wanted, media_class)
        buffer = io.BytesIO(head)
        buffer.seek(start)
        return _parse(buffer, syntax, size, size, wanted, media_class)


def open_pixels(path: Path, wanted: Sequence[int], limit: int) -> tuple[Dataset, str]:
    """Read elements including the pixels.

    Args:
        path: A file whose header was accepted.
        wanted: Tags to keep, those of the pixels among them.
        limit: What a deflated data set may grow to, in bytes.

    Raises:
        InputRefused: As `open_header`.
    """
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        head = handle.read(min(size, FIRST_BYTES))
        start, syntax, _ = _start(head)
        stream: BinaryIO
        if syntax == DEFLATED:
            content, complete = _inflate(head[start:], handle, limit)
            if not complete:
                raise InputRefused("deflated_too_large", f"grows past {limit} bytes")
            stream = io.BytesIO(content)
        else:
            handle.seek(start)
            stream = _Clamped(handle, size)
        return _read(stream, syntax, wanted, None), syntax


def _parse(stream: BinaryIO, syntax: str, size: int, end: int, wanted: Sequence[int], media_class: str) -> Opened:
    found: dict[str, int] = {}

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag < t.FLOAT_PIXELS:
            return False
        if tag in (t.PIXEL_DATA, t.FLOAT_PIXELS, t.DOUBLE_PIXELS):
            found.update(tag=tag, length=-1 if length == 0xFFFFFFFF else length, long=int(vr in _LONG))
        return True

    dataset = _read(stream, syntax, wanted, at_pixels)
    available = -1
    if found and end >= 0:
        available = end - stream.tell() - (12 if found["long"] else 8)
    return Opened(dataset, syntax, size, found.get("tag", 0), found.get("length", 0), available, media_class)


def _read(stream: BinaryIO, syntax: str, wanted: Sequence[int], stop: Callable[..., bool] | None) -> Dataset:
    implicit = syntax == IMPLICIT_LITTLE
    little = syntax != EXPLICIT_BIG
    try:
        with quiet():
            dataset = read_dataset(stream, implicit, little, stop_when=stop, specific_tags=list(wanted))
            dataset.set_original_encoding(implicit, little)
            return dataset
    except MemoryError:
        raise InputRefused("too_large", "an element of the header does not fit into memory") from None
    except Exception as error:  # noqa: BLE001  (pydicom raises many kinds on damaged files; each costs one row)
        # The message may quote a value, and a value may name a patient: only the kind of error is told.
        raise InputRefused("dicom_invalid", type(error).__name__) from None


def _start(head: bytes) -> tuple[int, str, str]:
    """Return where the data set begins, its transfer syntax and SOP class, reading the group 0002 if there is one."""
    position = 132 if head[128:132] == b"DICM" else 0
    syntax = media_class = ""
    group_two = head[position : position + 2]
    if position == 0 and group_two not in (b"\x02\x00", b"\x08\x00", b"\x00\x08", b"\x00\x00"):
        raise InputRefused("not_an_image", "no DICOM prefix, nor a group 0008 at the start")
    while head[position : position + 2] == b"\x02\x00" and position + 8 <= len(head):
        element, vr = struct.unpack_from("<H2s", head, position + 2)
        if vr.isalpha() and vr.isupper():
            long = vr.decode() in _LONG
            if long and position + 12 > len(head):
                break
            length = struct.unpack_from("<I" if long else "<H", head, position + (8 if long else 6))[0]
            value = position + (12 if long else 8)
        else:
            length, value = struct.unpack_from("<I", head, position + 4)[0], position + 8
        if element in (0x0002, 0x0010):
            text = head[value : value + length].decode("latin-1").strip(" \0")
            syntax, media_class = (text, media_class) if element == 0x0010 else (syntax, text)
        position = value + length
    if position + 8 > len(head):
        raise InputRefused("truncated" if position else "not_an_image", "the file ends in its first elements")
    return position, syntax or _guess(head[position : position + 6]), media_class


def _guess(first: bytes) -> str:
    """Return the transfer syntax that the first six bytes of a data set look like."""
    explicit = first[4:6].isalpha() and first[4:6].isupper()
    if first[0] == 0 and first[1] != 0:
        return EXPLICIT_BIG
    return EXPLICIT_LITTLE if explicit else IMPLICIT_LITTLE


def _inflate(head: bytes, handle: BinaryIO, limit: int) -> tuple[bytes, bool]:
    """Return at most `limit` bytes of a deflated data set, and whether that is all of it."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = bytearray()
    block = head
    try:
        while block and not inflater.eof:
            content += inflater.decompress(block, limit - len(content) + 1)
            if len(content) > limit:
                return bytes(content[:limit]), False
            block = inflater.unconsumed_tail or handle.read(FIRST_BYTES)
    except zlib.error:
        raise InputRefused("dicom_invalid", "damaged deflate stream") from None
    return bytes(content), True


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom, which quotes values in its warnings: those may name a patient. Problems come back as codes."""
    before = _pydicom_logger.disabled
    _pydicom_logger.disabled = True
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        _pydicom_logger.disabled = before
