"""Outputs that appear whole or not at all, and the rule for output folders that are not empty."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medssl.errors import MedsslError, UsageError

#: What a command holds while it writes into a folder; see `medssl.lock`.
LOCK_FILE = ".lock"
#: Names of `atomic_path` while a file is being written.
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}-.+")


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place.

    A reader sees the old file or the whole new one. On an error the temporary file is removed. A full disk is
    reported with the place and the remedy.

    Args:
        path: Where the finished file shall stand. Its folder is created.
        durable: Flush it to disk before it is renamed. Without, the file is whole for every process that looks, but
            may be lost with the machine's power; for many small files whose loss is noticed otherwise.

    Raises:
        MedsslError: If the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffixes stay at the end: SimpleITK and nibabel choose the format by them.
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MedsslError(
                f"No space left on the disk of {path.parent} while writing {path.name}. Nothing half-written was kept; "
                "free some space and run the same command with --resume, or with --overwrite where it has no --resume."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` to `path` whole or not at all; see `atomic_path`."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path` whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON with sorted keys, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal string."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def prepare_output_folder(
    out: Path, *, resume: bool | None, overwrite: bool, owned: Callable[[Path], bool] | None = None
) -> None:
    """Create `out`, or check that what it holds may be continued or replaced.

    Args:
        out: The output folder of a command.
        resume: Continue what is there; None for a command that cannot.
        overwrite: Remove what is there first.
        owned: Tells whether a folder was written by this command; `overwrite` never removes another.

    Raises:
        UsageError: If the folder is not empty and neither option is given, if both are, or if `overwrite` would
            remove a folder that this command did not write.
    """
    check_output_folder(out, resume=resume, overwrite=overwrite, owned=owned)
    out.mkdir(parents=True, exist_ok=True)
    entries = [path for path in out.iterdir() if path.name != LOCK_FILE]
    # A command that was killed before its first file was whole leaves nothing but temporary names.
    unused = [path for path in entries if _LEFTOVER.fullmatch(path.name)]
    for path in entries if overwrite else unused if len(unused) == len(entries) else []:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed, below a folder that this process holds.

    A folder below with a lock of its own is left to the command that takes it: another one may be writing there.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(place, name) / LOCK_FILE).exists()]
        for name in names:
            if _LEFTOVER.fullmatch(name):
                Path(place, name).unlink(missing_ok=True)


def check_output_folder(
    out: Path, *, resume: bool | None, overwrite: bool, owned: Callable[[Path], bool] | None = None
) -> None:
    """Raise what `prepare_output_folder` would raise, and change nothing."""
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other: choose one.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --out needs a folder.")
    if not out.is_dir() or all(path.name == LOCK_FILE or _LEFTOVER.fullmatch(path.name) for path in out.iterdir()):
        return
    if overwrite:
        if owned is not None and not owned(out):
            raise UsageError(
                f"{out} was not written by this command; --overwrite does not remove it. Choose another --out."
            )
    elif not resume:
        go_on = "" if resume is None else "--resume to continue it, "
        raise UsageError(f"{out} is not empty. Use {go_on}--overwrite to replace it, or another --out.")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
