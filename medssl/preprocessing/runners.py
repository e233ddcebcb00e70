"""Where the work on volumes is done: local processes with limits, any executor, or a Dask cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

from medssl.archive.sandbox import Limits, Pool, map_on_executor
from medssl.archive.sandbox_worker import Outcome
from medssl.errors import MedsslError
from medssl.preprocessing.cluster import dask_executor
from medssl.preprocessing.worker import Task

#: Seconds that one volume may take, decoding included.
SECONDS_PER_VOLUME = 3600.0
SMALLEST_MEMORY_MB = 4096

Function = Callable[[Task], Any]


class Runner(Protocol):
    """Runs a function over tasks and yields each with its outcome as they complete."""

    def __call__(self, function: Function, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]: ...


@contextlib.contextmanager
def runner(workers: int | None, executor: Executor | None, scheduler: str | None) -> Iterator[Runner]:
    """Yield what runs functions over tasks.

    Args:
        workers: Processes on this machine; by default one per core.
        executor: Used in place of local processes.
        scheduler: Address of a Dask scheduler, or `local`.
    """
    count = max(1, len(os.sched_getaffinity(0)) if workers is None else workers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    limits = Limits(max(SMALLEST_MEMORY_MB, memory // count), SECONDS_PER_VOLUME)
    if scheduler is not None:
        with dask_executor(scheduler, count) as (remote, slots):
            yield lambda function, tasks: _on_executor(remote, function, tasks, limits, slots)
    elif executor is not None:
        yield lambda function, tasks: _on_executor(executor, function, tasks, limits, count)
    else:
        whole = Limits(max(SMALLEST_MEMORY_MB, memory), SECONDS_PER_VOLUME)
        with Pool(count, limits) as pool:
            yield lambda function, tasks: _on_pool(pool, function, tasks, whole)


def _on_pool(pool: Pool, function: Function, tasks: Sequence[Task], whole: Limits) -> Iterator[tuple[Task, Outcome]]:
    """Run on local processes; what needs more than its share of the memory is tried again alone, with all of it."""
    alone = []
    for task, outcome in pool.map(function, tasks):
        if outcome.code == "decode_memory" and whole.memory_mb > pool.limits.memory_mb:
            alone.append(task)
        else:
            yield task, outcome
    if alone:
        with Pool(1, whole) as single:
            yield from single.map(function, alone)


def _on_executor(
    executor: Executor, function: Function, tasks: Sequence[Task], limits: Limits, slots: int
) -> Iterator[tuple[Task, Outcome]]:
    work = map_on_executor(executor, function, tasks, limits, batch=1, in_flight=2 * slots)
    while True:
        try:
            done = next(work)
        except StopIteration:
            return
        except MedsslError:
            raise
        except Exception as error:  # a lost worker or connection: as many kinds of exceptions as there are executors
            raise MedsslError(
                f"The executor failed ({type(error).__name__}). Look at the logs of its workers, then run the same "
                "command with --resume: what is complete is kept."
            ) from error
        yield done
