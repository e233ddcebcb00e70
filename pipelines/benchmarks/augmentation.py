"""How long does augmentation take on the CPU, ours and the peers', in one process run on the same crops?

Command: `python pipelines/benchmarks/augmentation.py` (about 20 minutes on one free core; `--quick` takes one).

Each transform that a peer has too is always applied, to image alone, or to image and label where it says so; the last
task is nnU-Net's default training policy with its own probabilities. Times are per sample; programs take turns, so
that a change of the machine's load meets all of them. Ours changes a batch at once, peers take one crop after the
other, as their loaders do. The rows of `closeness` compare results
where two programs define the same thing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _augmentation_closeness import closeness
from _augmentation_programs import (
    SHARED,
    Program,
    elastic_programs,
    intensity_programs,
    mirror_programs,
    policy_programs,
    spatial_programs,
)
from _common import RESULTS, print_table, write_results

# A figure is done after this many seconds of all programs together, but not before each has run `LEAST` times.
SECONDS, LEAST = 6.0, 3
# A sample in three is resampled by the policy: its mean needs many.
POLICY_SAMPLES = {64: 96, 96: 64, 160: 24}


def main() -> None:
    """Run the benchmark, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="crops of 32, one repeat")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per figure")
    parser.add_argument("--only", help="names of tasks, with commas")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch")
    parser.add_argument("--append", action="store_true", help="add to the results of other numbers of threads")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # Threads, batch and edges: everything on one thread, the middle size on two.
    grid = [(1, 1, (64, 96, 160)), (1, 8, (64, 96)), (2, 1, (96,)), (2, 8, (96,)), (1, 8, (160,))]
    if options.quick:
        grid, options.seconds = [(1, 2, (32,))], 0.0
    grid = [line for line in grid if line[0] in options.threads]
    wanted = None if options.only is None else set(options.only.split(","))
    rows: list[dict[str, Any]] = []
    for threads, batch, edges in grid:
        torch.set_num_threads(threads)
        for edge in edges:
            for task, make in tasks(edge, batch).items():
                if wanted is None or task in wanted:
                    rows += measured(task, edge, batch, threads, make(), options.seconds)
                    print_last(rows)
    torch.set_num_threads(1)
    close = closeness(32 if options.quick else 64)
    print_table(close)
    print_table(summary(rows))
    if not options.quick and wanted is None:
        if options.append:
            before = json.loads((RESULTS / "augmentation.json").read_text())["rows"]
            rows = [row for row in before if row["threads"] not in options.threads] + rows
        payload = {"load_average": os.getloadavg()[0], "seconds": options.seconds}
        write_results("augmentation", {**payload, "summary": summary(rows), "closeness": close, "rows": rows})


def tasks(edge: int, batch: int) -> dict[str, Any]:
    """Return what makes the programs of each task."""
    found: dict[str, Any] = {
        "rotation and scaling": lambda: spatial_programs(edge, batch, False),
        "rotation and scaling, with label": lambda: spatial_programs(edge, batch, True),
        "elastic": lambda: elastic_programs(edge, batch),
        "mirror": lambda: mirror_programs(edge, batch),
    }
    for name in SHARED:
        found[name] = lambda name=name: intensity_programs(name, edge, batch)
    found["nnU-Net's policy"] = lambda: policy_programs(edge, batch)
    return found


def measured(
    task: str, edge: int, batch: int, threads: int, programs: dict[str, Program], seconds: float
) -> list[dict[str, Any]]:
    """Time the programs in turns."""
    policy = task == "nnU-Net's policy"
    least = max(LEAST, POLICY_SAMPLES.get(edge, 8) // batch) if policy else LEAST
    if seconds == 0:
        least = 1
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program(0)
    began, number = time.perf_counter(), 0
    while number < least or (not policy and time.perf_counter() - began < seconds):
        number += 1
        for name, program in programs.items():
            start = time.perf_counter()
            program(number)
            times[name].append((time.perf_counter() - start) / batch)
    middle = statistics.fmean if policy else statistics.median
    ours = middle(times["medssl"])
    return [
        {
            "task": task,
            "edge": edge,
            "batch": batch,
            "threads": threads,
            "program": name,
            "ms per sample": round(1000 * middle(values), 3),
            "fastest ms": round(1000 * min(values), 3),
            "times medssl": round(middle(values) / ours, 2),
            "runs": len(values),
        }
        for name, values in times.items()
    ]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per task, the smallest and largest ratio of each peer's time to ours over sizes, batches and threads."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for program in dict.fromkeys(row["program"] for row in rows if row["task"] == task):
            if program != "medssl":
                ratios = [row["times medssl"] for row in rows if row["task"] == task and row["program"] == program]
                found.append({"task": task, "peer": program, "least": min(ratios), "most": max(ratios)})
    return found


def print_last(rows: list[dict[str, Any]]) -> None:
    """Show what was measured last."""
    last = rows[-1]
    chosen = [row for row in rows if all(row[key] == last[key] for key in ("task", "edge", "batch", "threads"))]
    ratios = ", ".join(f"{row['program']} {row['ms per sample']:g} ms ({row['times medssl']:g})" for row in chosen)
    print(f"{last['task']} {last['edge']}^3 x {last['batch']}, {last['threads']} threads: {ratios}", flush=True)


if __name__ == "__main__":
    main()
