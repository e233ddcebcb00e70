"""Progress on long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Tells the bar that work was done."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int | None, *, quiet: bool = False) -> Iterator[Advance]:
    """Show how far a piece of work is; everything goes to standard error, so that output stays readable by scripts.

    Args:
        title: What is being done.
        total: How many units there are, or None if that is not known.
        quiet: Show nothing.
    """
    if quiet:
        yield lambda count=1, note="": None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda count=1, note="": bar.update(task, advance=count, note=note)
    else:
        yield from _lines(title, total)


def _lines(title: str, total: int | None) -> Iterator[Advance]:
    done = 0
    last_note = ""
    spoken = time.monotonic()
    of_total = "" if total is None else f"/{total}"

    def say() -> None:
        sys.stderr.write(f"{title}: {done}{of_total}{' ' + last_note if last_note else ''}\n")
        sys.stderr.flush()

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, spoken, last_note
        done += count
        last_note = note or last_note
        if time.monotonic() - spoken >= SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            say()

    yield advance
    say()
