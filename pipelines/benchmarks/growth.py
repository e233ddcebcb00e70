"""How does the cost grow with the crop, the batch, the reader processes and the number of volumes?

Command: `python pipelines/benchmarks/growth.py` (about four minutes; `--quick` takes seconds).

One thread. Augmentation is the fine-tuning policy for MR on the crops that the loader reads for it, margin included;
the same 16 samples with the same parameters are made at every size, so that the cost per voxel of the patch compares.
Reading is from an open store in memory, in this process. `workers` and `volumes` are measured in fresh processes: the
time to open the store, to the first batch (start of the readers included) and per batch after it, and memory that is
not files. The stores of many volumes have few files of voxels under many names, and each name its own facts, so their
voxels stay in the system's memory and what is left is the cost of there being many.

Flat is right per voxel, per batch, and for a batch of a large store once opened; opening may grow with the volumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import blosc2
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _common import RESULTS, print_table, write_results
from _growth_stores import ORIGINALS, SEED, many_volumes, noisy_store

from medssl.augmentation.policy import policy_for
from medssl.data.dataset import BatchArrays, CropReader
from medssl.data.draw import Draw
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.preprocessing.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
EDGES = (32, 48, 64, 96, 128, 160, 192)
BATCHES = (1, 2, 4, 8, 16)
WORKERS = (0, 1, 2, 3, 4)
VOLUMES = (100, 1_000, 10_000, 100_000)
SAMPLES, ROUNDS = 16, 3
#: Edge of the crops where something else grows, and of the volumes that the large stores consist of.
EDGE, SMALL = 64, 72
BATCH, STEPS = 4, 60


def main() -> None:
    """Measure each kind of growth, print the tables, write figures and results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    load = round(os.getloadavg()[0], 1)
    edges, batches, workers, volumes = (
        ((16, 24), (1, 2), (0, 1), (10, 40)) if options.quick else (EDGES, BATCHES, WORKERS, VOLUMES)
    )
    # Edge of the crop, batches, and how often: the first run meets files that are not in memory.
    shape = (16, 5, 1) if options.quick else (EDGE, STEPS, 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        large = noisy_store(folder / "large", 2, max(edges) + 32)
        small = noisy_store(folder / "small", ORIGINALS, SMALL)
        tables = {
            "crop": [per_voxel(large, size, 1) for size in edges],
            "batch": [per_voxel(large, shape[0], size) for size in batches],
            "workers": [{"workers": count, **in_fresh_process(large.folder, count, *shape)} for count in workers],
            "volumes": list(by_volumes(small, folder, volumes, shape)),
        }
    for title, rows in tables.items():
        print(f"\n{title}")
        print_table(rows)
    if not options.quick:
        draw(tables, RESULTS / "growth.png")
        payload = {"threads": 1, "load_average_at_start": load, **tables}
        print(f"Written: {write_results('growth', payload).relative_to(REPOSITORY)}")


def per_voxel(store: Store, edge: int, batch: int) -> dict[str, Any]:
    """Return nanoseconds per voxel of the patch: of reading it, and of augmenting what is read for it."""
    count = max(SAMPLES // batch, 1)
    voxels = count * batch * edge**3
    policy = policy_for("fine-tuning", {"MR"}, (edge,) * 3)
    settings = CropSettings(patch_size=(edge,) * 3, batch_size=batch)
    with_margin = CropSettings(patch_size=(edge,) * 3, batch_size=batch, read_size=policy.read_size)
    iterator = CropLoader(store, with_margin, seed=SEED).batches()
    reader = CropReader(store, settings, seed=SEED, split="all", rank=0, world=1)
    arrays = BatchArrays(*reader.layout())
    reading, augmenting = float("inf"), float("inf")
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        for step in range(count):
            reader.read(step, arrays)
        reading = min(reading, time.perf_counter() - start)
        seconds = 0.0
        for _ in range(count):
            content = next(iterator)
            start = time.perf_counter()
            policy.view(content, Draw(SEED, content.sample_index % SAMPLES))
            seconds += time.perf_counter() - start
        # The first round meets cold caches of the processor and of memory that was never used.
        augmenting = min(augmenting, seconds) if number else augmenting
    return {
        "crop": edge,
        "batch": batch,
        "read for it": "x".join(map(str, policy.read_size)),
        "reading ns/voxel": round(1e9 * reading / voxels, 2),
        "augmentation ns/voxel": round(1e9 * augmenting / voxels, 2),
        "reading ms/crop": round(1e3 * reading / (count * batch), 3),
        "augmentation ms/crop": round(1e3 * augmenting / (count * batch), 3),
    }


def by_volumes(
    originals: Store, folder: Path, counts: Iterable[int], shape: tuple[int, int, int]
) -> Iterable[dict[str, Any]]:
    """Yield what a store of each number of volumes costs, read in the process itself and by one reader process."""
    for count in counts:
        print(f"a store of {count} volumes ...", flush=True)
        place = folder / f"of_{count}"
        many_volumes(place, originals, count)
        here = in_fresh_process(place, 0, *shape)
        apart = in_fresh_process(place, 1, *shape)
        yield {
            "volumes": count,
            **{key: here[key] for key in ("open s", "first batch s", "ms/batch", "table MB", "grown by MB")},
            **{f"{key}, 1 worker": apart[key] for key in ("first batch s", "ms/batch", "reader MB")},
        }


def in_fresh_process(store: Path, workers: int, edge: int, steps: int, runs: int = 2) -> dict[str, Any]:
    """Return what `_growth_stores.measure` finds in a process of its own; the last of several runs counts."""
    command = [sys.executable, str(Path(__file__).with_name("_growth_stores.py")), str(store)]
    command += [str(value) for value in (workers, edge, BATCH, steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    found: dict[str, Any] = {}
    for _ in range(runs):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw one panel for each kind of growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
        ("crop", "edge of the crop", ("reading ns/voxel", "augmentation ns/voxel"), "ns per voxel"),
        ("batch", "crops per batch", ("reading ns/voxel", "augmentation ns/voxel"), "ns per voxel"),
        ("workers", "reader processes", ("ms/batch",), "ms per batch"),
        ("volumes", "volumes", ("ms/batch", "ms/batch, 1 worker"), "ms per batch"),
        ("volumes", "volumes", ("open s", "first batch s"), "s"),
        ("volumes", "volumes", ("table MB", "grown by MB", "reader MB, 1 worker"), "MB"),
    )
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.2), constrained_layout=True)
    for axis, (name, label, columns, unit) in zip(axes.flat, panels, strict=True):
        rows = tables[name]
        for column in columns:
            axis.plot([row[name] for row in rows], [row[column] for row in rows], "o-", markersize=3, label=column)
        axis.set(xlabel=label, ylabel=unit)
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
        if name == "volumes":
            axis.set_xscale("log")
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
