"""The programs that `store_reading.py` compares: each writes float32 volumes and reads boxes of them back."""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import blosc2
import numpy as np

from medssl.preprocessing.codec import CODECS
from medssl.preprocessing.store import Store, StoreWriter

Box = tuple[slice, slice, slice]
Reader = Callable[[int, Box], np.ndarray]
#: What nnssl's rule gives for float32 and its patch of 160^3: a block that fits four fifths of 32 KiB of first-level
#: cache, a chunk about as large as its share of third-level cache.
NNSSL_BLOCK, NNSSL_CHUNK = (16, 16, 16), (80, 64, 64)
NNUNET_PATCH = (160, 160, 160)
ZARR_CHUNK = 64


class Program(Protocol):
    """One way to keep volumes."""

    name: str

    def write(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        """Write volumes (1, Z, Y, X), float32."""

    def open(self, folder: Path) -> Reader:
        """Return a function that reads a box of volume n as a new float32 array (1, z, y, x)."""


class Ours:
    """Our store with one codec."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.name = f"medssl {codec}"

    def write(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        writer = StoreWriter(folder, {"codec": self.codec})
        for number, array in enumerate(arrays):
            facts = {"spacing_mm": [1, 1, 1], "modality": "MR", "patient_key": f"{number}", "split": "train"}
            writer.add(f"v{number}", array, {**facts, "background": 0.0, "foreground": []}, codec=self.codec)
        writer.finish()

    def open(self, folder: Path) -> Reader:
        store = Store.open(folder)

        def read(number: int, box: Box) -> np.ndarray:
            return store.read(f"v{number}", [side.start for side in box], [side.stop for side in box])

        return read


class Blosc:
    """blosc2 files as nnssl and nnU-Net open them: memory mapped, one thread, open files kept."""

    def open(self, folder: Path) -> Reader:
        opened: dict[int, Any] = {}

        def read(number: int, box: Box) -> np.ndarray:
            if number not in opened:
                path = str(folder / f"v{number}.b2nd")
                opened[number] = blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})
            return opened[number][(slice(None), *box)]

        return read


class Nnssl(Blosc):
    """nnssl's settings: Zstandard, level 8."""

    name = "nnssl (zstd 8)"

    def write(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        for number, array in enumerate(arrays):
            blocks = (1, *(min(edge, size) for edge, size in zip(NNSSL_BLOCK, array.shape[1:], strict=True)))
            chunks = (1, *(min(edge, size) for edge, size in zip(NNSSL_CHUNK, array.shape[1:], strict=True)))
            settings = {"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1}
            path = str(folder / f"v{number}.b2nd")
            blosc2.asarray(array, urlpath=path, mode="w", chunks=chunks, blocks=blocks, cparams=settings)


class Nnunet(Blosc):
    """nnU-Net's own writer, with the filter that it chooses for each volume."""

    name = "nnU-Net 2.8.1 (lz4hc 5)"

    def __init__(self) -> None:
        from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

        self._rule, self._save = comp_blosc2_params, nnUNetDatasetBlosc2.save_case

    def write(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        for number, array in enumerate(arrays):
            blocks, chunks = self._rule(array.shape, NNUNET_PATCH)
            empty = np.zeros(array.shape, np.int8)
            self._save(array, empty, {}, str(folder / f"v{number}"), chunks=chunks, blocks=blocks)
            (folder / f"v{number}_seg.b2nd").unlink()
            (folder / f"v{number}.pkl").unlink()


class Npy:
    """Uncompressed, memory mapped."""

    name = "npy, memory map"

    def write(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        for number, array in enumerate(arrays):
            np.save(folder / f"v{number}.npy", array)

    def open(self, folder: Path) -> Reader:
        opened: dict[int, np.ndarray] = {}

        def read(number: int, box: Box) -> np.ndarray:
            if number not in opened:
                opened[number] = np.load(folder / f"v{number}.npy", mmap_mode="r")
            return np.array(opened[number][(slice(None), *box)])

        return read


class Nifti:
    """Compressed NIfTI, the part read through nibabel's `dataobj`."""

    name = "NIfTI, gzip"

    def __init__(self) -> None:
        import nibabel

        self._nibabel = nibabel

    def write(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        for number, array in enumerate(arrays):
            self._nibabel.save(self._nibabel.Nifti1Image(array[0].T, np.eye(4)), folder / f"v{number}.nii.gz")

    def open(self, folder: Path) -> Reader:
        opened: dict[int, Any] = {}

        def read(number: int, box: Box) -> np.ndarray:
            if number not in opened:
                opened[number] = self._nibabel.load(folder / f"v{number}.nii.gz").dataobj
            return np.ascontiguousarray(np.asarray(opened[number][box[::-1]], np.float32).T)[None]

        return read


class Zarr:
    """Zarr, version 3 of the format, chunks of 64^3, one file each."""

    def __init__(self, compressor: str) -> None:
        import zarr
        from zarr.codecs import BloscCodec

        self._zarr = zarr
        # One thread, as all others.
        zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
        self.name = f"zarr ({compressor})"
        lz4 = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=4)
        self._compressors: Any = "auto" if compressor == "default" else [lz4]

    def write(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        for number, array in enumerate(arrays):
            chunks = (1, *(min(ZARR_CHUNK, size) for size in array.shape[1:]))
            path = str(folder / f"v{number}.zarr")
            self._zarr.create_array(path, data=array, chunks=chunks, compressors=self._compressors)

    def open(self, folder: Path) -> Reader:
        opened: dict[int, Any] = {}

        def read(number: int, box: Box) -> np.ndarray:
            if number not in opened:
                opened[number] = self._zarr.open_array(str(folder / f"v{number}.zarr"), mode="r")
            return np.asarray(opened[number][(slice(None), *box)])

        return read


def programs() -> list[Program]:
    """Return all programs whose packages are installed, ours first."""
    found: list[Program] = [Ours(codec) for codec in CODECS]
    makers: list[Callable[[], Program]] = [
        Npy,
        Nnssl,
        Nnunet,
        Nifti,
        lambda: Zarr("default"),
        lambda: Zarr("blosc lz4"),
    ]
    for make in makers:
        try:
            found.append(make())
        except ImportError as error:
            warnings.warn(f"left out: {error}", stacklevel=1)
    return found


def files_of(folder: Path) -> list[Path]:
    """Return the files that hold voxels: everything but JSON beside arrays."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]


def drop_from_cache(folder: Path) -> float:
    """Ask the system to forget what it holds of the files of a folder.

    Nothing may have them mapped, and they must have been flushed to disk.

    Returns:
        The share of their pages that is still in memory.
    """
    kept, pages = 0, 0
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                found = _resident(descriptor)
                kept, pages = kept + sum(found), pages + len(found)
            finally:
                os.close(descriptor)
    return kept / max(pages, 1)


def _resident(descriptor: int) -> list[int]:
    """Return 1 or 0 for each page of a file: whether it is in memory."""
    size = os.fstat(descriptor).st_size
    if not size:
        return []
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as view:
        flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        content = np.frombuffer(view, np.uint8)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(size), flags)
        del content
    return [0 if failed else flag & 1 for flag in flags]
