"""What does a step of each pretraining method cost, in time and memory, relative to the masked autoencoder?

    python pipelines/benchmarks/methods.py [--only NAME ...]

Every registered method takes steps on resenc-xs with its defaults, float32, one thread, on the same synthetic volumes:
3D patches of 32 with batch 4, 2D patches of 64 with batch 8. Each method has a process of its own, which also runs the
masked autoencoder, in turns, so that what else the machine does falls on both. Memory is by how much two
steps of the method raise the process's peak. Takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

REPOSITORY = Path(__file__).resolve().parents[2]
CROPS = {2: ("[64,64]", 8), 3: ("[32,32,32]", 4)}
TURNS = 4


def main() -> None:
    """Run the benchmark, or one measurement of it in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs; nothing is written")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, dimensions, store = options.measure
        print(json.dumps(_measure(name, int(dimensions), Path(store), tiny=options.tiny)))
        return
    from _common import print_table, write_results
    from _synthetic_store import synthetic_store

    from medssl import registry

    rows = []
    of_mae: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        stores = {
            2: synthetic_store(Path(scratch) / "slices", volumes=8, shape=(8, 96, 96)),
            3: synthetic_store(Path(scratch) / "volumes", volumes=8, shape=(64, 72, 64)),
        }
        for name, entry in registry.METHODS.items():
            # The masked autoencoder is what the others are compared with.
            if options.only and name not in (*options.only, "mae"):
                continue
            for dimensions in entry.dimensions:
                folder = stores[dimensions].folder
                found = _in_process(name, dimensions, folder, options.tiny)
                row: dict[str, Any] = {"method": name, "dimensions": f"{dimensions}D"}
                row["step, s"], row["time / mae"] = found["seconds"], found["ratio"]
                of_mae.setdefault(dimensions, found["mebibytes"])
                row["memory / mae"] = round(found["mebibytes"] / of_mae[dimensions], 2)
                rows.append(row)
                print(row, flush=True)
    print_table(rows)
    if not (options.tiny or options.only):
        payload = {"network": "resenc-xs", "crops": {f"{key}D": value for key, value in CROPS.items()}, "rows": rows}
        print(f"Written: {write_results('methods', payload).relative_to(REPOSITORY)}")


def _in_process(name: str, dimensions: int, store: Path, tiny: bool) -> dict[str, float]:
    line = [sys.executable, __file__, "--measure", name, str(dimensions), str(store), *(["--tiny"] * tiny)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{name} in {dimensions}D ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _overrides(name: str, dimensions: int) -> tuple[str, ...]:
    patch, batch = CROPS[dimensions]
    return (f"method={name}", "network=resenc-xs", f"patch_size={patch}", f"batch_size={batch}", "workers=0")


def _measure(name: str, dimensions: int, folder: Path, *, tiny: bool) -> dict[str, float]:
    """Return the time of a step, its ratio to that of the masked autoencoder, and what two steps add to the peak."""
    import resource

    from _engines import parts_of

    from medssl.preprocessing.store import Store

    store = Store.open(folder)
    took: dict[str, list[float]] = {name: [], "mae": []}
    with parts_of(store, "cpu", _overrides(name, dimensions)) as ours:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        views = ours.seen()
        for _ in range(2):
            ours.step(views)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        with parts_of(store, "cpu", _overrides("mae", dimensions)) as mae:
            arms = {name: (ours, views), "mae": (mae, mae.seen())}
            arms["mae"][0].step(arms["mae"][1])
            for _ in range(1 if tiny else TURNS):
                for each, (parts, seen) in arms.items():
                    began = time.perf_counter()
                    parts.step(seen)
                    took[each].append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(took[name], took["mae"], strict=True))
    return {
        "seconds": round(statistics.median(took[name]), 3),
        "ratio": 1.0 if name == "mae" else round(ratio, 2),
        "mebibytes": memory / 1024,
    }


if __name__ == "__main__":
    main()
