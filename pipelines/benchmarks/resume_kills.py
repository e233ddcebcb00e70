"""Does a pretraining that is killed and resumed end with the weights of one that was not?

python pipelines/benchmarks/resume_kills.py

Runs a pretraining on the CPU without interruption, then `--kills` times more: each is killed with SIGKILL at a random
moment between its start and its end, resumed from whatever it left, and compared bit by bit: all weights and all rows
of metrics. Half of them read crops in this process, half with two reader processes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _common import print_table, write_results
from _synthetic_store import synthetic_store

from medssl.pretraining.mae import MaskedAutoencoder  # imported before the forks, so that each starts at once
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import FOLDER, find_checkpoint, load_checkpoint, step_of
from medssl.training.metrics import read_metrics

SETTINGS = (
    "patch_size=[16,32,16]", "batch_size=4", "mask.block=4", "log_every=1", "save_every=5", "health_every=10",
    "pictures_every=0", "optimiser.name=adamw", "schedule.name=cosine", "schedule.warmup_steps=5", "ema=0.99",
)  # fmt: skip
CLOCK = {"time", "steps_per_second", "waiting_for_data"}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        store = synthetic_store(Path(scratch) / "store", volumes=4, shape=(24, 40, 24)).folder
        whole = Path(scratch) / "whole"
        started = time.monotonic()
        in_child(lambda: start(store, whole, options.steps, workers=0))
        seconds = time.monotonic() - started
        rows = [
            trial(store, Path(scratch) / f"run_{number}", whole, options.steps, 2 * (number % 2), seconds, rng)
            for number in range(options.kills)
        ]
    print_table(rows)
    equal = sum(row["weights"] == "equal" and row["metrics"] == "equal" for row in rows)
    print(f"\n{equal} of {len(rows)} killed and resumed runs equal the uninterrupted one in every weight and metric")
    print(write_results("resume_kills", {"uninterrupted_seconds": seconds, "steps": options.steps, "trials": rows}))
    if equal < len(rows):
        sys.exit(1)


def start(store: Path, out: Path, steps: int, workers: int, *, resume: bool = False) -> None:
    """Begin a pretraining, or go on with what a killed one left, be it nothing."""
    pretrain(
        "mae", store, out, overrides=SETTINGS, steps=steps, device="cpu", workers=workers, quiet=True, resume=resume
    )


def trial(
    store: Path, out: Path, whole: Path, steps: int, workers: int, seconds: float, rng: random.Random
) -> dict[str, Any]:
    """Kill one run at a random moment, resume it, and compare it with the whole one."""
    moment = rng.uniform(0, seconds)
    while not in_child(lambda: start(store, out, steps, workers), kill_after=moment):
        # It was faster than the uninterrupted one and ended first: that is no kill.
        shutil.rmtree(out)
        moment = rng.uniform(0, seconds)
    logged = read_metrics(out)
    saved = sorted((out / FOLDER).glob("step_*.pth"))
    in_child(lambda: start(store, out, steps, workers, resume=True))
    return {
        "killed after (s)": round(moment, 2),
        "readers": workers,
        "steps logged": logged[-1]["step"] if logged else 0,
        "steps saved": step_of(saved[-1]) if saved else 0,
        "weights": "equal" if same_weights(out, whole) else "DIFFER",
        "metrics": "equal" if same_metrics(out, whole) else "DIFFER",
    }


def in_child(work: Callable[[], object], kill_after: float | None = None) -> bool:
    """Run `work` in a process of its own and return whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        except Exception:  # noqa: BLE001 whatever went wrong: the child must never return into the parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 0:
                raise RuntimeError(f"a pretraining ended with status {status}; see its message above")
            return False
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.002)


def same_weights(first: Path, second: Path) -> bool:
    """Compare all weights bit by bit."""
    a, b = (load_checkpoint(find_checkpoint(run))["network_weights"] for run in (first, second))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def same_metrics(first: Path, second: Path) -> bool:
    """Compare all rows of metrics but for the clock."""
    a, b = ([{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(run)] for run in (first, second))
    return a == b


if __name__ == "__main__":
    assert MaskedAutoencoder is not None
    main()
