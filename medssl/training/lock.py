"""One process at a time in a RUN."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medssl.errors import UsageError

logger = logging.getLogger(__name__)

NAME = ".lock"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a RUN; the kernel lets go of it when the process ends, however it ends.

    A POSIX record lock belongs to the process alone: children do not inherit it and cannot keep it after a kill.

    Raises:
        UsageError: If another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UsageError(
                    f"Another process is writing to {run}. Wait for it, stop it, or choose another --out."
                ) from error
            logger.warning("The disk of %s cannot lock files (%s): start one run at a time.", run.name, error.strerror)
        yield
    finally:
        os.close(descriptor)
