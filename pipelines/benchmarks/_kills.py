"""Processes that are killed at a moment, what they leave behind, and whether each file with a final name is whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import polars as pl
import torch
import yaml
from PIL import Image

from medssl.training.checkpoint import damage, load_checkpoint

#: Processes of a pool notice by their socket that the one that fed them is gone, when they are done with their input.
SECONDS_TO_END = 20.0


class Child:
    """Work in a forked process that leads a session of its own, so that all it starts can be found.

    Args:
        work: What it does; all imports have been made before the fork, so that it starts at once.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.process = os.fork()
        if self.process:
            return
        try:
            os.setsid()
            torch.set_num_threads(1)
            work()
        except BaseException:  # noqa: BLE001 whatever went wrong: the child must never return into the parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def wait(self, kill_after: float | None = None) -> bool:
        """Wait for the end and return whether it was killed before; only the process itself is, as by `kill -9 PID`.

        Raises:
            RuntimeError: If it failed.
        """
        deadline = None if kill_after is None else time.monotonic() + kill_after
        while True:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 0:
                    raise RuntimeError(f"a process ended with status {status}; see its message above")
                return False
            if deadline is not None and time.monotonic() >= deadline:
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                return True
            time.sleep(0.001)

    def survivors(self) -> list[int]:
        """Return the processes it started that live on after a while; they are ended then."""
        deadline = time.monotonic() + SECONDS_TO_END
        while left := _of_session(self.process):
            if time.monotonic() >= deadline:
                for process in left:
                    os.kill(process, signal.SIGKILL)
                return left
            time.sleep(0.05)
        return []


def found_apart(look: Callable[[], list[str]]) -> list[str]:
    """Return what a look at files finds, made in a process of its own.

    Readers of Parquet and Blosc start threads, and what is forked from a process with threads may hang for ever.
    """
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        Child(lambda: path.write_text(json.dumps(look()))).wait()
        found: list[str] = json.loads(path.read_text())
    return found


def _of_session(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name of the program stands in brackets and may hold blanks.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def broken_files(folder: Path) -> list[str]:
    """Return the files with a final name that are empty or cannot be read to their end.

    Names that begin with a dot are temporary. The cache of an index is a data base with a journal, and metrics are
    lines that are appended: both are meant to be continued.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        try:
            _read_whole(path)
        except Exception as error:  # noqa: BLE001 each reader has its own errors; any of them means the same here
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}")
    return found


def leftovers(folder: Path) -> list[str]:
    """Return temporary names that are still there."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob(".*") if path.is_file() and path.name != ".lock"
    )


def _read_whole(path: Path) -> None:
    if path.suffix in (".sqlite", ".jsonl", ".sqlite-wal", ".sqlite-shm", ".sqlite-journal") or path.name == "lock":
        return
    if "tfevents" in path.name:
        return
    if path.stat().st_size == 0:
        raise ValueError("empty")
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix in (".yaml", ".yml"):
        yaml.safe_load(path.read_text())
    elif path.suffix == ".parquet":
        pl.read_parquet(path)
    elif path.suffix == ".pth":
        if fault := damage(path):
            raise ValueError(fault)
        load_checkpoint(path, numpy_scalars=True)
    elif path.suffix == ".b2nd":
        blosc2.open(str(path), mode="r")[:]
    elif path.name.endswith(".nii.gz"):
        gzip.decompress(path.read_bytes())
        np.asarray(nibabel.load(path).dataobj)
    elif path.suffix == ".npy":
        np.load(path)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()


def same_weights(first: Path, second: Path) -> bool:
    """Compare all weights of two checkpoints bit by bit."""
    a, b = (load_checkpoint(path, numpy_scalars=True)["network_weights"] for path in (first, second))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def digest_of_masks(folder: Path) -> dict[str, str]:
    """Return a hash of voxels and grid of each mask by its name."""
    found = {}
    for path in sorted(folder.glob("*.nii.gz")):
        image = nibabel.load(path)
        content = np.asarray(image.dataobj).tobytes() + image.affine.tobytes()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found
