"""The reader process: told which step to read into which slot of shared memory, says when it is done.

It is started as a program of its own, not forked: a fork of a process that runs CUDA and OpenMP threads may hang, and
`multiprocessing`'s spawn would run the user's script again. It imports no torch, so it starts in a fraction of a
second. It ends when its parent does, since the pipe of tasks closes then.
"""

from __future__ import annotations

import json
import mmap
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import blosc2

from medssl.data.dataset import BatchArrays, CropReader
from medssl.data.sampling import CropSettings
from medssl.errors import DataError, MedsslError
from medssl.preprocessing.store import Store


def main(tasks_descriptor: int, replies_descriptor: int, memory_descriptor: int) -> None:
    """Serve steps until the parent closes the pipe."""
    # A scheduler signals the whole job and Ctrl-C the whole terminal; the parent decides when reading ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    tasks = Connection(tasks_descriptor, writable=False)
    replies = Connection(replies_descriptor, readable=False)
    try:
        _serve(tasks, replies, memory_descriptor)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # noqa: BLE001 whatever went wrong is the parent's to raise, with its place
        _reply(replies, {"error": _described(error), "known": isinstance(error, MedsslError)})


def _serve(tasks: Connection, replies: Connection, memory_descriptor: int) -> None:
    start = json.loads(tasks.recv_bytes())
    reader = _open(start)
    slot_bytes = start["slot_bytes"]
    memory = mmap.mmap(memory_descriptor, slot_bytes * start["slots"])
    slots = [
        BatchArrays(*reader.layout(), memoryview(memory)[number * slot_bytes : (number + 1) * slot_bytes])
        for number in range(start["slots"])
    ]
    while True:
        task = json.loads(tasks.recv_bytes())
        try:
            reader.read(task["step"], slots[task["slot"]], part=start["part"], parts=start["parts"])
        except MedsslError as error:
            _reply(replies, {"step": task["step"], "error": str(error), "known": True})
        else:
            _reply(replies, {"step": task["step"]})


def _open(start: dict[str, Any]) -> CropReader:

    # One process is one thread: the number of processes is what the user chose.
    blosc2.set_nthreads(1)
    return CropReader(
        Store.open(Path(start["store"])),
        CropSettings.model_validate(start["settings"]),
        seed=start["seed"],
        split=start["split"],
        rank=start["rank"],
        world=start["world"],
    )


def _described(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    return "".join(traceback.format_exception(error))


def _reply(replies: Connection, content: dict[str, Any]) -> None:
    replies.send_bytes(json.dumps(content).encode())


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
