"""How much longer does a step of pretraining on the CPU take with real input than with input that is there already?

    python pipelines/benchmarks/pretraining_step.py [--data FOLDER]

A masked autoencoder on resenc-xs (patch 48, batch 4, float32) takes steps on views that lie in memory, and steps that
read their crops from a store and augment them, in turns of a few steps each, so that what else the machine does falls
on both. The store is made of the left atrium data at 1.25 mm where MEDSSL_DATA or --data has them, else of synthetic
volumes. Goal: at most 1.1 times as long. `processor` is the ratio of the training process's own processor time, which
other work on the machine disturbs less; with a worker it leaves out the reading, which runs beside. Takes less than
five minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

REPOSITORY = Path(__file__).resolve().parents[2]
SPACING_MM = (1.25, 1.25, 1.25)
VOLUMES = 8
GOAL = 1.1
# Steps of each kind in one turn.
STEPS = 2
LEAST_TURNS = 3
# Threads of torch and reader processes of each arm.
ARMS = ((1, 0), (1, 1), (2, 0), (2, 1))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    beside = Path(os.environ.get("MEDSSL_DATA", REPOSITORY.parent / "shared/data"))
    parser.add_argument("--data", type=Path, default=beside)
    parser.add_argument("--seconds", type=float, default=50.0, help="of measurement per row")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs; nothing is written")
    options = parser.parse_args()
    import torch
    from _common import print_table, write_results

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    patch, batch = (16, 2) if options.tiny else (48, 4)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store, data = _store(options.data, Path(scratch), tiny=options.tiny)
        for threads, workers in ARMS:
            if threads > cores:
                continue
            torch.set_num_threads(threads)
            row = _measure(store, patch, batch, workers, 0.1 if options.tiny else options.seconds)
            rows.append({"threads": threads, **row})
            print(rows[-1], flush=True)
    print_table(rows)
    worst = max(row["real / fixed"] for row in rows)
    print(f"Real input makes a step {worst:.3f} times as long at most; goal {GOAL}.")
    if not options.tiny:
        payload = {
            "data": data, "network": "resenc-xs", "patch": patch, "batch": batch, "goal": GOAL, "rows": rows,
            "load_average_at_end": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        path = write_results("pretraining_step", payload)
        print(f"Written: {path.relative_to(REPOSITORY)}")


def _store(data: Path, scratch: Path, *, tiny: bool) -> tuple[Any, str]:
    """Return a store and what it is made of."""
    from _synthetic_store import synthetic_store

    from medssl.preprocessing.run import preprocess
    from medssl.preprocessing.store import Store

    source = data / "left_atrium"
    if tiny or not (source / "imagesTr").is_dir():
        shape = (24, 28, 24) if tiny else (96, 112, 96)
        return synthetic_store(scratch / "store", volumes=2 if tiny else VOLUMES, shape=shape), "synthetic, 1 mm"
    some = scratch / "left_atrium"
    (some / "imagesTr").mkdir(parents=True)
    for image in sorted((source / "imagesTr").iterdir())[:VOLUMES]:
        shutil.copy(image, some / "imagesTr" / image.name)
    preprocess(some / "imagesTr", scratch / "store", spacing=SPACING_MM, workers=1, quiet=True)
    return Store.open(scratch / "store"), f"left atrium, {VOLUMES} volumes at {SPACING_MM[0]} mm"


def _measure(store: Any, patch: int, batch: int, workers: int, seconds: float) -> dict[str, Any]:
    """Return the times of one arm."""
    from _engines import parts_of

    from medssl.data.loader import STEPS_AHEAD

    overrides = (
        "network=resenc-xs", f"patch_size={[patch] * 3}", f"batch_size={batch}", "mask.block=4", f"workers={workers}",
    )  # fmt: skip
    with parts_of(store, "cpu", overrides) as parts:
        real = parts.seen()
        fixed = itertools.repeat(next(real))
        for views in (fixed, real):
            parts.step(views)
        turns = []
        began = time.perf_counter()
        while len(turns) < LEAST_TURNS or time.perf_counter() - began < seconds:
            kinds = {"fixed": fixed, "real": real}
            turn = {}
            # The order changes: neither kind always comes first.
            for kind in sorted(kinds, reverse=len(turns) % 2 == 1):
                if kind == "real" and workers:
                    # The workers went on reading meanwhile: what they had ready is used up before the clock starts.
                    for _ in range(STEPS_AHEAD):
                        parts.step(real)
                turn[kind] = _timed(lambda views=kinds[kind]: parts.step(views), STEPS)
            turns.append(turn)
        batches = parts.loader.batches(10_000)
        ready = next(batches)
        reading = _timed(lambda: next(batches), 10)
        augmentation = _timed(lambda: parts.engine.views(ready), 10)
    wall, processor = ([turn["real"][k] / turn["fixed"][k] for turn in turns] for k in (0, 1))
    return {
        "workers": workers,
        "fixed ms": round(1000 * statistics.median(turn["fixed"][0] for turn in turns), 1),
        "real ms": round(1000 * statistics.median(turn["real"][0] for turn in turns), 1),
        "real / fixed": round(statistics.median(wall), 3),
        "least": round(min(wall), 3),
        "most": round(max(wall), 3),
        "processor": round(statistics.median(processor), 3),
        "reading ms": round(1000 * reading[0], 1),
        "augmentation ms": round(1000 * augmentation[0], 1),
        "turns": len(turns),
    }


def _timed(work: Callable[[], Any], times: int) -> tuple[float, float]:
    """Return seconds, by the clock and of the processor, of one call."""
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times, (time.process_time() - cpu) / times


if __name__ == "__main__":
    main()
