"""One process at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medssl.errors import UsageError
from medssl.files import LOCK_FILE, check_output_folder, prepare_output_folder, remove_leftovers

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a folder; the kernel lets go of it when the process ends, however it ends.

    A POSIX record lock belongs to the process alone: children do not inherit it and cannot keep it after a kill. The
    process loses it as soon as it closes any handle of the file, so a folder is never locked twice within a process.

    Raises:
        UsageError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = _locked(path, folder)
    try:
        yield
    finally:
        if _is_file(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def claimed_folder(
    out: Path, *, resume: bool | None, overwrite: bool, owned: Callable[[Path], bool] | None = None
) -> Iterator[None]:
    """Prepare the output folder of a command and hold it: one that another process writes to is never touched.

    Args:
        out: As the other arguments, see `medssl.files.prepare_output_folder`.
        resume: Continue what is there; None for a command that cannot.
        overwrite: Remove what is there first.
        owned: Tells whether a folder was written by this command.

    Raises:
        UsageError: If another process writes to it, or it may not be continued or replaced.
    """
    if not (out / LOCK_FILE).exists():
        # Nothing, not even a lock, is put into a folder that is refused.
        check_output_folder(out, resume=resume, overwrite=overwrite, owned=owned)
    with run_lock(out):
        prepare_output_folder(out, resume=resume, overwrite=overwrite, owned=owned)
        remove_leftovers(out)
        yield


def _locked(path: Path, folder: Path) -> int:
    """Return an open handle of the lock, held where the disk can hold locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise UsageError(
                    f"Another process is writing to {folder}. Wait for it, stop it, or choose another --out."
                ) from error
            logger.warning(
                "The disk of %s cannot lock files (%s): start one run at a time.", folder.name, error.strerror
            )
            return descriptor
        if _is_file(descriptor, path):
            return descriptor
        # The process that held it ended and removed the file between our opening and our locking.
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
