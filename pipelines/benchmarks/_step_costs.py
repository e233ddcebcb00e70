"""What a step costs beside another one in the same process: time in turns, and the rise of the peak of memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def in_process(program: str, *arguments: str, tiny: bool) -> dict[str, float]:
    """Run a program's `--measure` in a process of its own, one thread, and return the JSON that it prints last."""
    line = [sys.executable, program, "--measure", *arguments, *(["--tiny"] * tiny)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def beside(step: Callable[[], Any], control: Callable[[], Callable[[], Any]], turns: int) -> dict[str, float]:
    """Measure a step, then time it and the control's in turns, so that what else the machine does falls on both.

    Args:
        step: Takes one; nothing has been taken yet.
        control: Builds what the other one is taken with.
        turns: How often each is timed.

    Returns:
        `seconds` of the processor for the step, its median `ratio` to the control's, and `mebibytes` by which two steps
        raise the peak.
    """
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    other = control()
    other()
    took: list[tuple[float, float]] = []
    for _ in range(turns):
        took.append((_timed(step), _timed(other)))
    return {
        "seconds": round(statistics.median(mine for mine, _ in took), 3),
        "ratio": round(statistics.median(mine / theirs for mine, theirs in took), 2),
        "mebibytes": memory / 1024,
    }


def _timed(step: Callable[[], Any]) -> float:
    # Of the processor: with one thread it is the work, whatever else the machine does.
    began = time.process_time()
    step()
    return time.process_time() - began
