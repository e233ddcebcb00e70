"""The parent's side of the reader processes: starts them, hands out steps, notices when one dies.

Batches travel through memory that is shared by descriptor (`memfd_create`), not through `/dev/shm`, which has 64 MB in
a container by default: four crops of 160^3 would end a run there with a bus error. Pipes carry a few bytes per step.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from multiprocessing.connection import Connection, wait
from typing import Any

from medssl.data.dataset import BatchArrays
from medssl.data.sampling import Triple
from medssl.errors import DataError, MedsslError

logger = logging.getLogger(__name__)

SECONDS_TO_SAY_THAT_READING_IS_SLOW = 60.0
SECONDS_TO_END = 5.0


class ReaderPool:
    """Reader processes that share every step: each fills its part of the batch's rows.

    Args:
        start: What `medssl.data.worker` needs to open its reader, without its part.
        workers: How many processes.
        layout: Arguments of `BatchArrays`.
        slots: Batches that can be on their way at once.

    Raises:
        MedsslError: If the memory for the batches cannot be had.
    """

    def __init__(
        self, start: dict[str, Any], *, workers: int, layout: tuple[int, int, Triple, bool], slots: int
    ) -> None:
        self.slots = slots
        slot_bytes = BatchArrays.bytes_needed(*layout)
        descriptor = _shared_memory(slot_bytes * slots)
        try:
            self._memory = mmap.mmap(descriptor, slot_bytes * slots)
            self._members = [
                _Member({**start, "part": part, "parts": workers, "slots": slots, "slot_bytes": slot_bytes}, descriptor)
                for part in range(workers)
            ]
        finally:
            os.close(descriptor)
        view = memoryview(self._memory)
        self._arrays = [
            BatchArrays(*layout, view[number * slot_bytes : (number + 1) * slot_bytes]) for number in range(slots)
        ]
        self._outstanding: dict[int, set[int]] = {}
        self._errors: dict[int, MedsslError] = {}
        self._finalizer = weakref.finalize(self, _end, self._members)

    @property
    def process_ids(self) -> list[int]:
        """Ids of the reader processes."""
        return [member.process.pid for member in self._members]

    def submit(self, step: int) -> None:
        """Ask for a step; it goes to slot `step % slots`, which must be free."""
        self._outstanding[step] = set(range(len(self._members)))
        for member in self._members:
            try:
                member.tasks.send_bytes(json.dumps({"step": step, "slot": step % self.slots}).encode())
            except BrokenPipeError:
                self._receive(member, step)
                raise self._death(member, step) from None

    def ready(self, step: int) -> bool:
        """Tell whether a step is there, without waiting."""
        self._take_replies(step, timeout=0)
        return not self._outstanding[step]

    def wait(self, step: int) -> BatchArrays:
        """Wait for a step and return its arrays; they stay valid until the slot is submitted again.

        Raises:
            DataError: If a volume could not be read.
            MedsslError: If a reader process died.
        """
        while self._outstanding[step]:
            if not self._take_replies(step, timeout=SECONDS_TO_SAY_THAT_READING_IS_SLOW):
                logger.warning("still waiting for the readers of step %d: is the store's disk slow or gone?", step)
        del self._outstanding[step]
        if step in self._errors:
            raise self._errors.pop(step)
        return self._arrays[step % self.slots]

    def drain(self) -> None:
        """Wait for every step that was asked for and forget it."""
        for step in list(self._outstanding):
            while self._outstanding[step]:
                self._take_replies(step, timeout=SECONDS_TO_SAY_THAT_READING_IS_SLOW)
        self._outstanding.clear()
        self._errors.clear()

    def close(self) -> None:
        """End the reader processes."""
        self._finalizer()

    def _take_replies(self, step: int, timeout: float) -> bool:
        waiting = [self._members[number] for number in self._outstanding[step]]
        if not waiting:
            return True
        connections = wait([member.replies for member in waiting], timeout)
        for member in waiting:
            if member.replies in connections:
                self._receive(member, step)
        return bool(connections)

    def _receive(self, member: _Member, step: int) -> None:
        try:
            reply = json.loads(member.replies.recv_bytes())
        except (EOFError, OSError):
            raise self._death(member, step) from None
        if "step" not in reply:
            raise (DataError if reply["known"] else MedsslError)(reply["error"])
        self._outstanding[reply["step"]].discard(self._members.index(member))
        if "error" in reply:
            self._errors[reply["step"]] = DataError(reply["error"])

    def _death(self, member: _Member, step: int) -> MedsslError:
        try:
            code = member.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        else:
            how = f"ended with exit code {code}; its own message stands above"
        number = self._members.index(member) + 1
        return MedsslError(
            f"Reader process {number} of {len(self._members)} {how} around step {step}. SIGKILL mostly means that "
            "memory ran out: use fewer --workers or a smaller crop or batch, then continue the run with --resume."
        )


class _Member:
    """One reader process and the two pipes to it."""

    def __init__(self, start: dict[str, Any], memory: int) -> None:
        tasks_read, tasks_write = os.pipe()
        replies_read, replies_write = os.pipe()
        environment = {
            **os.environ,
            # The child must find the same packages, however the parent came to them.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # noqa: PTH109
            "OMP_NUM_THREADS": "1",
            "BLOSC_NTHREADS": "1",
        }
        command = [sys.executable, "-P", "-m", "medssl.data.worker"]
        descriptors = (tasks_read, replies_write, memory)
        self.process = subprocess.Popen(
            [*command, *map(str, descriptors)], pass_fds=descriptors, env=environment, stdin=subprocess.DEVNULL
        )
        os.close(tasks_read)
        os.close(replies_write)
        self.tasks = Connection(tasks_write, readable=False)
        self.replies = Connection(replies_read, writable=False)
        self.tasks.send_bytes(json.dumps(start).encode())


def _shared_memory(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("medssl-batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        raise MedsslError(
            f"{size / 2**20:.0f} MB of shared memory for batches on their way cannot be had ({error.strerror}): use "
            "--workers 0 or a smaller crop or batch."
        ) from error
    return descriptor


def _end(members: list[_Member]) -> None:
    for member in members:
        member.tasks.close()
        member.replies.close()
    for member in members:
        try:
            member.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            member.process.kill()
            member.process.wait()
