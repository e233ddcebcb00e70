"""Large arrays that live in memory while they fit a budget, and in unlinked scratch files beyond it."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import MedsslError

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_MB = 2048
MEBIBYTE = 1 << 20


class Workspace:
    """Hands out arrays under one budget of working memory.

    The budget counts what depends on the volume: the image, its resampled copy, the window's accumulators, the mask.
    The temporaries of a slab may take a quarter of it on top, Python with torch and nnU-Net takes about 0.9 GB, and the
    network its activations of one tile. An array that would pass the budget is backed by a scratch file in `folder`;
    the file has no name, so it vanishes with the process, and `relax` keeps its pages out of the process's memory.

    Args:
        memory_mb: Budget in MiB, or None for 2048.
        folder: Where scratch files may be written.
    """

    def __init__(self, memory_mb: int | None, folder: Path) -> None:
        self.limit = (DEFAULT_MEMORY_MB if memory_mb is None else memory_mb) * MEBIBYTE
        self.folder = folder
        self.held = 0
        self._files: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an uninitialised C-contiguous array; give it back with `release` when it is no longer needed."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if size == 0 or self.held + size <= self.limit:
            self.held += size
            return np.empty(shape, dtype)
        logger.info(
            "%.0f MiB go to a scratch file: the budget of %.0f MiB is spent", size / MEBIBYTE, self.limit / MEBIBYTE
        )
        with tempfile.TemporaryFile(dir=self.folder) as scratch:
            try:
                # Without room set aside, a full disk would kill the process at some later write.
                os.posix_fallocate(scratch.fileno(), 0, size)
            except OSError as error:
                raise MedsslError(
                    f"No room for a scratch file of {size / MEBIBYTE:.0f} MiB in {self.folder} ({error.strerror}). "
                    "Free some space there, or raise --memory-mb."
                ) from error
            array = np.memmap(scratch, dtype=dtype, mode="r+", shape=tuple(int(side) for side in shape))
        self._files.add(array._mmap)  # type: ignore[attr-defined]
        return array

    def zeros(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return `empty` filled with zeros."""
        array = self.empty(shape, dtype)
        if not isinstance(array, np.memmap):
            array.fill(0)
        return array

    def release(self, array: npt.NDArray[Any]) -> None:
        """Take back the budget of an array of `empty` or `zeros` that is about to be dropped."""
        if not isinstance(array, np.memmap):
            self.held -= array.nbytes

    def relax(self) -> None:
        """Let go of the pages of scratch files that this process has touched; their content stays in the files."""
        for file in self._files:
            if not file.closed:
                file.madvise(mmap.MADV_DONTNEED)

    def fits(self, size: float) -> bool:
        """Tell whether `size` further bytes stay within the budget."""
        return self.held + size <= self.limit

    def rows(self, bytes_per_row: float, least: int = 1, share: float = 0.25) -> int:
        """Return how many rows of a slab may be worked on at a time.

        Args:
            bytes_per_row: What one row costs, temporaries included.
            least: Rows that are taken even if they pass the budget.
            share: Part of the whole budget that a slab may use.
        """
        return max(least, int(self.limit * share / max(bytes_per_row, 1.0)))
