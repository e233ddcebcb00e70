"""Stores of any number of volumes for `growth.py`: a few files of voxels under many names, each with its own facts."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.preprocessing.store import Store, StoreWriter

#: Volumes that are really written; a file system may allow some 65,000 links to one file.
ORIGINALS = 4
SEED = 0
LINES = ("modality", "split", "shape", "spacing_mm", "has_label", "voxels_sha256")


def noisy_store(out: Path, volumes: int, edge: int) -> Store:
    """Write cubes of a smooth structure with noise, 512 voxels of foreground each."""
    writer = StoreWriter(out, {"codec": "lossless"})
    for number in range(volumes):
        rng = np.random.default_rng([SEED, number])
        place = np.linspace(0, 6, edge, dtype=np.float32) + np.float32(number)
        volume = np.sin(place)[:, None, None] + np.cos(place)[:, None] * np.sin(2 * place)
        volume = volume.astype(np.float32) + 0.1 * rng.standard_normal((edge,) * 3, dtype=np.float32)
        facts = {"spacing_mm": [1.0, 1.0, 1.0], "modality": "MR", "split": "train", "patient_key": f"{number}"}
        foreground = rng.integers(edge, size=(512, 3)).tolist()
        writer.add(f"v{number}", volume[None], {**facts, "background": float(volume.min()), "foreground": foreground})
    return writer.finish()


def many_volumes(out: Path, originals: Store, count: int) -> None:
    """Make a store of `count` volumes whose voxels are those of a few, and whose facts are files of their own."""
    out.mkdir()
    sources = [(originals.folder / f"{name}.b2nd", _facts(originals, name)) for name in originals.ids]
    rows = []
    for number in range(count):
        voxels, facts = sources[number % len(sources)]
        name = f"volume-{number:012d}"
        os.link(voxels, out / f"{name}.b2nd")
        # As text: to serialise 100,000 times would take longer than all that is measured.
        (out / f"{name}.json").write_text(facts.replace("PATIENT", f"{number:020d}"))
        line = {key: value for key, value in json.loads(facts).items() if key in LINES} if number < len(sources) else {}
        rows.append({**(line or rows[number % len(sources)]), "id": name, "patient_key": f"{number:020d}"})
    (out / "store.json").write_text(json.dumps({**originals.info, "volumes": rows}, indent=2, sort_keys=True))


def _facts(store: Store, name: str) -> str:
    facts = json.loads((store.folder / f"{name}.json").read_text())
    return json.dumps({**facts, "patient_key": "PATIENT"}, sort_keys=True)


def measure(folder: Path, workers: int, settings: CropSettings, batches: int) -> dict[str, Any]:
    """Open a store and read batches, as a run does; to be called in a process of its own."""
    torch.set_num_threads(1)
    before = anonymous_mb(os.getpid())
    start = time.perf_counter()
    store = Store.open(folder)
    opened = time.perf_counter()
    with CropLoader(store, settings, seed=SEED, workers=workers) as loader:
        iterator = loader.batches()
        next(iterator)
        first = time.perf_counter()
        table = anonymous_mb(os.getpid()) - before
        for _ in range(batches):
            next(iterator)
        last = time.perf_counter()
        readers = [anonymous_mb(process) for process in loader.reader_processes]
        return {
            "open s": round(opened - start, 4),
            "first batch s": round(first - opened, 4),
            "ms/batch": round(1e3 * (last - first) / batches, 3),
            "table MB": round(table, 1),
            "grown by MB": round(anonymous_mb(os.getpid()) - before, 1),
            "reader MB": round(max(readers), 1) if readers else None,
        }


def anonymous_mb(process: int) -> float:
    """Return the memory of a process that is its own, without the files it has mapped."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("workers", type=int)
    parser.add_argument("edge", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("batches", type=int)
    given = parser.parse_args()
    shape = CropSettings(patch_size=(given.edge,) * 3, batch_size=given.batch)
    print(json.dumps(measure(given.folder, given.workers, shape, given.batches)))
