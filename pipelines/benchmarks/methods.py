"""What does a step of each pretraining method cost, in time and memory, relative to the masked autoencoder?

    python pipelines/benchmarks/methods.py [--only NAME ...]

Every registered method takes steps on resenc-xs with its defaults, float32, one thread, on the same synthetic volumes:
3D patches of 32 with batch 4, 2D patches of 64 with batch 8. Each method has a process of its own, which also runs the
masked autoencoder, in turns, so that what else the machine does falls on both. Time is the
processor's. Memory is by how much two steps of the method raise the process's peak. Takes about ten minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
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
    from _step_costs import in_process
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
                found = in_process(__file__, name, str(dimensions), str(folder), tiny=options.tiny)
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


def _overrides(name: str, dimensions: int) -> tuple[str, ...]:
    patch, batch = CROPS[dimensions]
    return (f"method={name}", "network=resenc-xs", f"patch_size={patch}", f"batch_size={batch}", "workers=0")


def _measure(name: str, dimensions: int, folder: Path, *, tiny: bool) -> dict[str, float]:
    """Return the time of a step, its ratio to that of the masked autoencoder, and what two steps add to the peak."""
    from _engines import Parts, parts_of
    from _step_costs import beside

    from medssl.preprocessing.store import Store

    store = Store.open(folder)
    with ExitStack() as stack:

        def stepping(method: str) -> Callable[[], Any]:
            parts: Parts = stack.enter_context(parts_of(store, "cpu", _overrides(method, dimensions)))
            seen = parts.seen()
            return lambda: parts.step(seen)

        found = beside(stepping(name), lambda: stepping("mae"), 1 if tiny else TURNS)
    return found | {"ratio": 1.0} if name == "mae" else found


if __name__ == "__main__":
    main()
