"""Hostile files, built in code: bombs, liars, slips."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, RLELossless

from medssl.archive.tasks import FileTask, read_file
from medssl.errors import InputRefused
from tests.archive.archive_files import patch, write_nifti
from tests.archive.dicom import series as s

MEGABYTE = 2**20


def deflate_bomb(folder: Path, megabytes: int, *, in_header: bool) -> Path:
    """Write a deflated DICOM file whose header or pixels unfold to so many megabytes of zeros."""
    dataset = s.stack(1)[0]
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = s.write(folder, [dataset])[0]
    content = path.read_bytes()
    start = 132 + 12 + struct.unpack_from("<I", content, 140)[0]
    inner = zlib.decompressobj(-15).decompress(content[start:])
    place = inner.index(b"\x20\x00\x0d\x00" if in_header else b"\xe0\x7f\x10\x00")
    group, element, kind = (0x0019, 0x1099, b"UN") if in_header else (0x7FE0, 0x0010, b"OW")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(inner[:place] + struct.pack("<HH2sHI", group, element, kind, 0, megabytes * MEGABYTE))
    for _ in range(megabytes):
        packed += packer.compress(bytes(MEGABYTE))
    path.write_bytes(content[:start] + packed + packer.flush())
    return path


def gzip_bomb(path: Path, megabytes: int, *, told: bool) -> Path:
    """Write a NIfTI in gzip that unfolds to so many megabytes; `told`: its header asks for more."""
    plain = write_nifti(path.with_name("plain.nii"))
    if told:
        patch(plain, 40, struct.pack("<4h", 3, 1024, 1024, 900))
    with gzip.open(path, "wb", 9) as stream:
        stream.write(plain.read_bytes())
        for _ in range(megabytes):
            stream.write(bytes(MEGABYTE))
    plain.unlink()
    return path


def nested(folder: Path, depth: int, *, ended: bool) -> Path:
    """Write a DICOM file with sequences inside sequences, ended one by one or all by the end of the file."""
    content = s.write(folder, s.stack(1))[0].read_bytes()
    place = content.index(b"\xe0\x7f\x10\x00")
    opening = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    closing = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path = folder / "000"
    path.write_bytes(content[:place] + opening * depth + (closing * depth if ended else b"") + content[place:])
    return path


def fragments(folder: Path, lie: str) -> Path:
    """Write RLE slices whose fragments do not fit: `long`, `short`, `none`, `offsets` or `cut`."""
    slices = s.stack(4)
    for dataset in slices:
        dataset.compress(RLELossless, encoding_plugin="pydicom")
    for path in s.write(folder, slices):
        content = bytearray(path.read_bytes())
        pixels = content.index(b"\xe0\x7f\x10\x00") + 12
        table = struct.unpack_from("<I", content, pixels + 4)[0]
        first = pixels + 8 + table  # the item of the first fragment
        if lie == "long":
            content[first + 4 : first + 8] = struct.pack("<I", 0x7FFFFFFF)
        elif lie == "short":
            content[first + 4 : first + 8] = struct.pack("<I", 10)
        elif lie == "none":
            content[first:] = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        elif lie == "offsets":
            offsets = struct.pack("<HHI3I", 0xFFFE, 0xE000, 12, 0xFFFFFFF0, 7, 0)
            content[pixels:first] = offsets
        else:
            del content[first + 40 :]
        path.write_bytes(content)
    return folder


def unknown_codec(folder: Path) -> Path:
    """Write slices in a transfer syntax that nobody knows."""
    slices = s.stack(4)
    for dataset in slices:
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        dataset.file_meta.TransferSyntaxUID = UID("1.2.3.4.5.6.7")
    s.write(folder, slices)
    return folder


def slips(folder: Path) -> list[Path]:
    """Write packed archives whose members would leave the folder, are links or devices, or are bombs."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "slip.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../owned.txt", "owned")
        archive.writestr("/tmp/owned-by-medssl-test.txt", "owned")
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb", bytes(64 * MEGABYTE))
    for name, mode in (("slip.tar", "w"), ("slip.tar.gz", "w:gz"), ("slip.tar.bz2", "w:bz2")):
        with tarfile.open(folder / name, mode) as archive:
            for member, kind in (("../../owned.txt", tarfile.REGTYPE), ("/owned", tarfile.REGTYPE)):
                _add(archive, member, kind, b"owned")
            _add(archive, "link", tarfile.SYMTYPE, b"", linkname="/etc/passwd")
            _add(archive, "hard", tarfile.LNKTYPE, b"", linkname="../../../etc/passwd")
            _add(archive, "device", tarfile.CHRTYPE, b"", devmajor=1, devminor=5)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(16 * MEGABYTE))
    with zipfile.ZipFile(folder / "nested.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(50):
            archive.writestr(f"{number}.zip", inner.getvalue())
    return sorted(folder.iterdir())


def _add(archive: tarfile.TarFile, name: str, kind: bytes, content: bytes, **more: Any) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content)
    for key, value in more.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def poisoned_array(path: Path, target: Path) -> None:
    """Write a .npy of objects, which numpy can only read by unpickling."""
    np.save(path, np.array([RunsCode(target)], dtype=object), allow_pickle=True)


def file_task(path: Path) -> FileTask:
    """Return the task of reading a file's header."""
    status = path.stat()
    return FileTask(0, str(path.parent), path.name, status.st_size, status.st_mtime_ns)


def end_and_peak(task: FileTask) -> tuple[str, float]:
    """Return the code with which a header ends, and the largest memory of this process in MiB."""
    try:
        read_file(task)
        code = ""
    except InputRefused as refusal:
        code = refusal.code
    # ru_maxrss would count the process that started this one as well.
    return code, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
