"""A checkpoint that is saved over itself and killed in the middle: plain `torch.save` against `save_checkpoint`."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _kills import Child, leftovers

from medssl.training.checkpoint import load_checkpoint, save_checkpoint

ENTRIES = 32


def torch_save(path: Path, content: dict[str, Any]) -> None:
    """Save in place, as nnU-Net and nnssl do."""
    torch.save(content, path)


WRITERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "torch.save in place": torch_save,
    "medssl": save_checkpoint,
}


def content_of(step: int, megabytes: int) -> dict[str, Any]:
    """Return a checkpoint whose every tensor tells its step."""
    size = megabytes * 2**20 // 4 // ENTRIES
    return {"network_weights": {f"layer_{n}": torch.full((size,), float(step)) for n in range(ENTRIES)}}


def save_trials(scratch: Path, kills: int, megabytes: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return a row per writer: what a process killed at a random moment of its second save left."""
    old, new = content_of(1, megabytes), content_of(2, megabytes)
    rows = []
    for name, write in WRITERS.items():
        tally = dict.fromkeys(("old state", "new state", "unreadable", "absent"), 0)
        folder = scratch / "saves"
        seconds = _seconds(folder / "step_00000001.pth", old, new, write)
        litter = 0
        while sum(tally.values()) < kills:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            path = folder / "step_00000001.pth"
            write(path, old)
            if _killed_in(path, new, write, rng.uniform(0, seconds)):
                tally[_found(path)] += 1
                litter += len(leftovers(folder))
        shutil.rmtree(folder)
        rows.append(
            {
                "writer": name, "kills": kills, **tally, "last good state lost": tally["unreadable"] + tally["absent"],
                "temporary files left": litter, "seconds of one save": round(seconds, 3),
            }
        )  # fmt: skip
    return rows


def _seconds(path: Path, old: dict[str, Any], new: dict[str, Any], write: Callable[..., None]) -> float:
    path.parent.mkdir(exist_ok=True)
    write(path, old)
    started = time.monotonic()
    write(path, new)
    return time.monotonic() - started


def _killed_in(path: Path, new: dict[str, Any], write: Callable[..., None], after: float) -> bool:
    """Save in a process, kill it so long after the save began, and return whether it was before its end."""
    ours, theirs = os.pipe()

    def work() -> None:
        os.write(theirs, b"!")
        write(path, new)

    child = Child(work)
    os.read(ours, 1)
    killed = child.wait(after)
    os.close(ours)
    os.close(theirs)
    return killed


def _found(path: Path) -> str:
    if not path.is_file():
        return "absent"
    try:
        weights = load_checkpoint(path)["network_weights"]
    except Exception:  # noqa: BLE001 each kind of damage has its own error; any of them means that it is lost
        return "unreadable"
    values = {float(value) for tensor in weights.values() for value in tensor.unique()}
    if len(weights) != ENTRIES or values not in ({1.0}, {2.0}):
        return "unreadable"
    return "old state" if values == {1.0} else "new state"
