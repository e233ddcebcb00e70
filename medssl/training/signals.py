"""Signals to a run: stop well, or save now.

SIGTERM and the first Ctrl-C let the step end, save, and end the process with 143 or 130. SIGUSR1 saves and goes on:
with `sbatch --signal=USR1@120` at most the last two minutes are lost, and it is a safe way to ask for a checkpoint. A
second Ctrl-C ends at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Signals:
    """Catches signals while a loop runs; the handlers before are put back at the end."""

    def __init__(self) -> None:
        self.save_asked = False
        self.stopped_by: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal that stopped the run, as shells count."""
        return 128 + (self.stopped_by or 0)

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; a run in another thread goes without.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_asked = True
        elif number == signal.SIGINT and self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stopped_by = number
