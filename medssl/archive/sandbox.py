"""Run functions on untrusted input in processes with limits: a crash, a hang or a bomb costs one input.

`run_limited` for a single call, `Pool` for many. The function must be importable by name from a module; it is given one
item and its result travels back.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, TypeVar

from medssl.archive.sandbox_worker import Outcome, receive, send
from medssl.errors import InputRefused, MedsslError

ItemT = TypeVar("ItemT")

# Given to the process on top of its own limits, before it is killed from outside.
_GRACE_SECONDS = 20.0
_IDLE_KEPT = 2


def _machine_memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


@dataclass(frozen=True)
class Limits:
    """What one input may cost.

    Attributes:
        memory_mb: Address space of the process in MiB, its libraries included.
        seconds: Wall-clock time per input.
    """

    memory_mb: int = 6144
    seconds: float = 300.0


#: Reading a header: a deflated data set of 1 MB grows to 2 GB and must not.
HEADER_LIMITS = Limits(memory_mb=1536, seconds=60.0)
#: Decoding a volume: 4 GiB of voxels are the most that `formats` accepts; copies are made on the way.
VOLUME_LIMITS = Limits(memory_mb=min(12288, max(2048, _machine_memory_mb())), seconds=600.0)


class _Worker:
    """One process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        # Threads of numerical libraries reserve address space and gain nothing: the parallelism is in the processes.
        for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
            environment[f"{name}_NUM_THREADS"] = "1"
        environment["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
        environment["MALLOC_ARENA_MAX"] = "2"
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "medssl.archive.sandbox_worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        self.connection = Connection(ours.detach())
        self.used = False
        self.items: list[Any] = []
        self.deadline = float("inf")

    def start(self, function: Callable[[Any], Any], items: list[Any], limits: Limits) -> bool:
        """Give the process a batch; tell whether it took it."""
        self.items = items
        self.deadline = time.monotonic() + limits.seconds * len(items) + _GRACE_SECONDS
        try:
            send(self.connection, (function, items, limits.memory_mb, limits.seconds))
        except OSError:
            return False
        return True

    def result(self) -> list[Outcome] | None:
        """Return the outcomes, or None if the process died over the batch."""
        try:
            outcomes: list[Outcome] = receive(self.connection)
        except (EOFError, OSError):
            return None
        return outcomes

    def verdict(self) -> Outcome:
        """End the dead process and say why it died."""
        late = time.monotonic() >= self.deadline
        if late:
            self.process.kill()
        status = self.close()
        if late or status == -signal.SIGALRM:
            return Outcome(code="decode_timeout", detail="time limit")
        if status is not None and status < 0:
            return Outcome(code="decode_crashed", detail=signal.Signals(-status).name)
        return Outcome(code="decode_crashed", detail=f"exit status {status}")

    def close(self) -> int | None:
        """Hang up, wait a moment, kill if need be; return the exit status."""
        self.connection.close()
        try:
            return self.process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Pool:
    """Several processes that take batches of inputs.

    Args:
        workers: How many.
        limits: What one input may cost, unless `map` is told otherwise.
    """

    def __init__(self, workers: int, limits: Limits = VOLUME_LIMITS) -> None:
        self.workers = max(1, workers)
        self.limits = limits
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._busy.values():
            worker.process.kill()
        for worker in (*self._idle, *self._busy.values()):
            worker.close()
        self._idle, self._busy = [], {}

    def map(
        self, function: Callable[[ItemT], Any], items: Iterable[ItemT], *, batch: int = 1, limits: Limits | None = None
    ) -> Iterator[tuple[ItemT, Outcome]]:
        """Yield each item with its outcome, in the order of completion.

        Args:
            function: Importable function of one item.
            items: Drawn as processes become free, so that they need not fit into memory.
            batch: Items sent at once. If a process dies over a batch, its items are tried again one by one.
            limits: What one input may cost; by default the pool's.
        """
        source = iter(items)
        again: deque[list[ItemT]] = deque()
        while True:
            while len(self._busy) < self.workers:
                chunk = again.popleft() if again else list(islice(source, batch))
                if not chunk:
                    break
                self._start(function, chunk, limits or self.limits)
            if not self._busy:
                return
            for worker in self._ready():
                yield from self._finish(worker, again)

    def _start(self, function: Callable[[Any], Any], chunk: list[Any], limits: Limits) -> None:
        for _ in range(3):
            worker = self._idle.pop() if self._idle else _Worker()
            if worker.start(function, chunk, limits):
                self._busy[worker.connection] = worker
                return
            worker.close()
        raise MedsslError(
            "Decoding processes cannot be started: check memory and process limits (ulimit) of this user."
        )

    def _ready(self) -> list[_Worker]:
        next_deadline = min(worker.deadline for worker in self._busy.values())
        ready = wait(list(self._busy), timeout=max(0.0, next_deadline - time.monotonic()))
        workers = [self._busy[connection] for connection in ready if isinstance(connection, Connection)]
        now = time.monotonic()
        return workers or [worker for worker in self._busy.values() if worker.deadline <= now]

    def _finish(self, worker: _Worker, again: deque[list[ItemT]]) -> Iterator[tuple[ItemT, Outcome]]:
        del self._busy[worker.connection]
        outcomes = worker.result() if time.monotonic() < worker.deadline else None
        if outcomes is None:
            verdict = worker.verdict()
            if len(worker.items) > 1:
                again.extend([item] for item in worker.items)
            else:
                yield worker.items[0], verdict
            return
        done = len(outcomes)
        if outcomes and outcomes[-1].spent:
            # Earlier inputs may have eaten the memory: a used process's word is not the last one.
            if outcomes[-1].code == "decode_memory" and worker.used | (done > 1):
                done -= 1
            again.extend([item] for item in worker.items[done:])
            worker.close()
        else:
            worker.used = True
            self._idle.append(worker)
        yield from zip(worker.items[:done], outcomes[:done], strict=True)


def run_limited(function: Callable[[ItemT], Any], item: ItemT, limits: Limits = VOLUME_LIMITS) -> Any:
    """Return `function(item)`, computed in a process with limits.

    The process is kept for the next call. Safe to call from threads and from processes that were forked.

    Raises:
        InputRefused: If the function refused the input, failed, crashed, hung or needed too much.
    """
    pool = _borrow()
    try:
        outcomes = [outcome for _, outcome in pool.map(function, [item], limits=limits)]
    except BaseException:
        pool.close()
        raise
    _give_back(pool)
    if outcomes[0].code:
        raise InputRefused(outcomes[0].code, outcomes[0].detail)
    return outcomes[0].value


def run_batch(function: Callable[[ItemT], Any], items: list[ItemT], limits: Limits) -> list[tuple[ItemT, Outcome]]:
    """Run a batch in a limited process of this machine; what a cluster's worker is sent."""
    pool = _borrow()
    try:
        result = list(pool.map(function, items, limits=limits, batch=len(items)))
    except BaseException:
        pool.close()
        raise
    _give_back(pool)
    return result


def map_on_executor(
    executor: Executor,
    function: Callable[[ItemT], Any],
    items: Iterable[ItemT],
    limits: Limits,
    *,
    batch: int,
    in_flight: int,
) -> Iterator[tuple[ItemT, Outcome]]:
    """Do as `Pool.map` on any executor, for example Dask's; the limits hold on its machines."""
    source = iter(items)
    pending: set[Future[list[tuple[ItemT, Outcome]]]] = set()
    while True:
        while len(pending) < in_flight and (chunk := list(islice(source, batch))):
            pending.add(executor.submit(run_batch, function, chunk, limits))
        if not pending:
            return
        done, pending = wait_for_futures(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield from future.result()


_kept: list[Pool] = []
_lock = threading.Lock()


def _borrow() -> Pool:
    with _lock:
        return _kept.pop() if _kept else Pool(1)


def _give_back(pool: Pool) -> None:
    with _lock:
        _kept.append(pool)
        surplus = _kept.pop(0) if len(_kept) > _IDLE_KEPT else None
    if surplus is not None:
        surplus.close()


def _close_kept() -> None:
    with _lock:
        pools, _kept[:] = list(_kept), []
    for pool in pools:
        pool.close()


def _forget_kept() -> None:
    # A forked child shares the sockets with its parent: it closes its copies and starts processes of its own.
    global _lock
    _lock = threading.Lock()
    for pool in _kept:
        for worker in pool._idle:
            with contextlib.suppress(OSError):
                worker.connection.close()
    _kept.clear()


atexit.register(_close_kept)
os.register_at_fork(after_in_child=_forget_kept)
