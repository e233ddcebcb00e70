"""Dask as the executor of preprocessing: a scheduler's address, or a cluster on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor

from medssl.errors import UsageError

LOCAL = "local"
SECONDS_TO_CONNECT = 20


@contextlib.contextmanager
def dask_executor(scheduler: str, workers: int) -> Iterator[tuple[Executor, int]]:
    """Yield an executor on a Dask cluster and the number of its threads.

    Args:
        scheduler: `tcp://host:port`, or `local`.
        workers: Processes of a local cluster.

    Raises:
        UsageError: If Dask is not installed, nobody answers, or the cluster has no workers.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UsageError("--scheduler needs Dask: pip install 'medssl[cluster]'.") from error
    with contextlib.ExitStack() as stack:
        address: object = scheduler
        if scheduler == LOCAL:
            address = stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=40)
            )
        try:
            client = stack.enter_context(Client(address, timeout=SECONDS_TO_CONNECT))
        except (OSError, ValueError, TimeoutError) as error:
            raise UsageError(
                f"--scheduler {scheduler}: no Dask scheduler answers there ({type(error).__name__}). "
                "Give its address as tcp://host:port, or local."
            ) from error
        threads = sum(client.nthreads().values())
        if not threads:
            raise UsageError(
                f"--scheduler {scheduler}: the cluster has no workers. Start `dask worker {scheduler}` first."
            )
        # Not pure: a task is run again when it is asked for again. No retries: the sandbox has made its own.
        yield client.get_executor(pure=False, retries=0), threads
