"""The process that decodes: memory and time are limited, and whatever happens in it costs one input.

Started by `medssl.archive.sandbox` as `python -m medssl.archive.sandbox_worker SOCKET`. It is started afresh (no fork,
so no lock of another thread is inherited) and never imports the caller's `__main__`.
"""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from medssl.errors import InputRefused

#: Exceptions after which the process is thrown away: its memory may be torn.
_FATAL = (MemoryError, SystemError)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one input.

    Attributes:
        value: What the function returned.
        code: Empty, or the reason code of the failure.
        detail: What happened, without any text of the input.
        spent: Whether the process must not be used again.
    """

    value: Any = None
    code: str = ""
    detail: str = ""
    spent: bool = False


def attempt(function: Callable[[Any], Any], item: Any) -> Outcome:
    """Call a function and turn whatever it raises into a code.

    Messages of libraries may quote the file's content or path: only the exception's type and the place are kept.
    """
    try:
        return Outcome(function(item))
    except InputRefused as error:
        return Outcome(code=error.code, detail=error.detail)
    except _FATAL as error:
        return Outcome(code="decode_memory", detail=_place(error), spent=True)
    except OSError as error:
        return Outcome(code=_code_of(error), detail=f"{error.strerror or type(error).__name__}")
    except RecursionError as error:
        return Outcome(code="decode_failed", detail=_place(error))
    except Exception as error:  # noqa: BLE001 - any failure of any decoder is the input's, and costs one row
        memory = "alloc" in str(error).lower()  # SimpleITK reports exhausted memory as RuntimeError
        return Outcome(code="decode_memory" if memory else "decode_failed", detail=_place(error), spent=memory)
    except BaseException as error:  # noqa: BLE001 - Rust panics (pyo3 PanicException) are not Exceptions
        return Outcome(code="decode_crashed", detail=_place(error), spent=True)


def send(connection: Connection, content: Any) -> None:
    """Send an object; arrays travel beside the pickle, so that they are copied once."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    raws = [buffer.raw() for buffer in buffers]
    connection.send_bytes(pickle.dumps((head, [raw.nbytes for raw in raws])))
    for raw in raws:
        if raw.nbytes:
            connection.send_bytes(raw)


def receive(connection: Connection) -> Any:
    """Receive what `send` sent.

    Raises:
        EOFError: If the other side has gone.
    """
    head, sizes = pickle.loads(connection.recv_bytes())  # noqa: S301 - our own process, same user
    buffers = []
    for size in sizes:
        buffer = bytearray(size)
        if size:
            connection.recv_bytes_into(buffer)
        buffers.append(buffer)
    return pickle.loads(head, buffers=buffers)  # noqa: S301 - our own process, same user


def main(descriptor: int) -> None:
    """Serve batches until the other side hangs up."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside compiled code
    connection = Connection(descriptor)
    while True:
        try:
            function, items, memory_mb, seconds = receive(connection)
        except EOFError:
            return
        _limit_memory(memory_mb)
        outcomes = []
        for item in items:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            outcomes.append(attempt(function, item))
            signal.setitimer(signal.ITIMER_REAL, 0)
            if outcomes[-1].spent:
                break
        try:
            send(connection, outcomes)
        except MemoryError:
            send(connection, [Outcome(code="decode_memory", detail="result", spent=True)])
            return
        if outcomes and outcomes[-1].spent:
            return


def _limit_memory(memory_mb: int) -> None:
    # The soft limit: a header may cost less than a volume, in one process.
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _code_of(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "vanished"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ESTALE):
        return "unreadable"
    if error.errno == errno.ENOMEM:
        return "decode_memory"
    return "decode_failed"


if __name__ == "__main__":
    # Imported under its true name: what is pickled must not belong to `__main__`.
    from medssl.archive import sandbox_worker

    sandbox_worker.main(int(sys.argv[1]))
    os._exit(0)  # no exit handlers of decoders: they may hang or crash
