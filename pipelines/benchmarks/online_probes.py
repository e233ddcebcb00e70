"""What part of a pretraining's time do its online probes take?

    python pipelines/benchmarks/online_probes.py [--data FOLDER]

Steps of the recipe of the hippocampus and looks of its probes take turns on one engine; the share is that of one look
among the steps between two of them, at the recipe's default interval. `quality` looks at 32 crops, which is what every
run does; the other rows add labels (anterior against posterior volume above its median, 64 images to learn from and 64
to be measured on) and masks. The store is made of the hippocampus data where MEDSSL_DATA or --data has them, else of
synthetic volumes without masks. Goal: at most 3 %. `processor` is the same share of the process's own processor time,
which other work on the machine disturbs less. Takes less than three minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "pipelines" / "hippocampus_mae.yaml"
#: Volumes of the store: enough for 64 images of either split.
VOLUMES = 140
GOAL = 0.03
STEPS, LOOKS = 4, 1


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    beside = Path(os.environ.get("MEDSSL_DATA", REPOSITORY.parent / "shared/data"))
    parser.add_argument("--data", type=Path, default=beside)
    parser.add_argument("--seconds", type=float, default=30.0, help="of measurement per row")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs; nothing is written")
    options = parser.parse_args()
    import torch
    from _common import print_table, write_results

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store, data = _store(options.data, Path(scratch), tiny=options.tiny)
        labels = _labels(store, Path(scratch))
        kinds: dict[str, tuple[str, ...]] = {"quality": ("probes.kinds=[]",)}
        if labels is not None:
            given = f"probes.labels={labels}"
            kinds["quality, labels"] = (given,)
            kinds["quality, labels, masks"] = (given, "probes.kinds=[linear,knn,prototypes,segmentation]")
        for name, overrides in kinds.items():
            rows.append({"probes": name, **_measure(store, overrides, 0.1 if options.tiny else options.seconds)})
            print(rows[-1], flush=True)
    print_table(rows)
    worst = max(row["share"] for row in rows)
    print(f"The probes take {worst:.1%} of the time at most; goal {GOAL:.0%}.")
    if not options.tiny:
        payload = {
            "data": data, "recipe": RECIPE.name, "threads": 1, "goal": GOAL, "rows": rows,
            "load_average_at_end": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        path = write_results("online_probes", payload)
        print(f"Written: {path.relative_to(REPOSITORY)}")


def _store(data: Path, scratch: Path, *, tiny: bool) -> tuple[Any, str]:
    """Return a store with masks and what it is made of; without the data, one without masks."""
    import json
    import shutil

    from _synthetic_store import synthetic_store

    from medssl.preprocessing.run import preprocess
    from medssl.preprocessing.store import Store

    source = data / "hippocampus"
    if tiny or not (source / "imagesTr").is_dir():
        return synthetic_store(scratch / "store", volumes=4, shape=(36, 50, 36)), "synthetic, 1 mm"
    some = scratch / "hippocampus"
    masks = sorted((source / "labelsTr").iterdir())[:VOLUMES]
    for part in ("imagesTr", "labelsTr"):
        (some / part).mkdir(parents=True)
    for mask in masks:
        shutil.copy(mask, some / "labelsTr" / mask.name)
        for image in (source / "imagesTr").glob(f"{mask.name.split('.')[0]}_*"):
            shutil.copy(image, some / "imagesTr" / image.name)
    content = json.loads((source / "dataset.json").read_text())
    (some / "dataset.json").write_text(json.dumps({**content, "numTraining": len(masks)}))
    preprocess(some, scratch / "store", spacing=(1.0, 1.0, 1.0), workers=1, quiet=True)
    return Store.open(scratch / "store"), f"hippocampus, {len(masks)} volumes at 1 mm"


def _labels(store: Any, scratch: Path) -> Path | None:
    """Write whether the first label's part of all labelled voxels is above the median; half of the volumes validate."""
    if not all(store.has_label(name) for name in store.ids):
        return None
    parts = {}
    for name in store.ids:
        mask = store.read_label(name, (0, 0, 0), store.entry(name).shape[1:])
        parts[name] = float((mask == 1).sum() / max((mask > 0).sum(), 1))
    middle = statistics.median(parts.values())
    lines = ["volume_id,label,patient,split"]
    lines += [
        f"{name},{int(part > middle)},{store.row(name)['patient_key']},{('train', 'validation')[number % 2]}"
        for number, (name, part) in enumerate(parts.items())
    ]
    (scratch / "labels.csv").write_text("\n".join(lines) + "\n")
    return scratch / "labels.csv"


def _measure(store: Any, overrides: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Return the times of one set of probes."""
    from _engines import parts_of

    from medssl.config import read_yaml
    from medssl.pretraining.probes import read_probes

    recipe = [f"{name}={value}" for name, value in _flat(read_yaml(RECIPE))]
    with parts_of(store, "cpu", (*recipe, "workers=0", *overrides)) as parts:
        began = time.perf_counter()
        probes = read_probes(parts.settings, store, parts.policy, parts.loader.channels, None)
        reading = time.perf_counter() - began
        views = parts.seen()
        kinds: dict[str, tuple[Callable[[], Any], int]] = {
            "step": (lambda: parts.step(views), STEPS), "look": (lambda: probes(parts.engine, 0), LOOKS),
        }  # fmt: skip
        for work, _ in kinds.values():
            work()
        turns = []
        began = time.perf_counter()
        while len(turns) < 3 or time.perf_counter() - began < seconds:
            turns.append({kind: _timed(*kinds[kind]) for kind in sorted(kinds, reverse=len(turns) % 2 == 1)})
    every = int(parts.settings.probes.every or 0)
    step, look = ([statistics.median(turn[kind][k] for turn in turns) for k in (0, 1)] for kind in ("step", "look"))
    return {
        "every": every,
        "step ms": round(1000 * step[0], 1),
        "look ms": round(1000 * look[0], 1),
        "share": round(look[0] / (every * step[0] + look[0]), 4),
        "processor": round(look[1] / (every * step[1] + look[1]), 4),
        "read once s": round(reading, 1),
        "turns": len(turns),
    }


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(before + name, value)]
    return found


def _timed(work: Callable[[], Any], times: int) -> tuple[float, float]:
    """Return seconds, by the clock and of the processor, of one call."""
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times, (time.process_time() - cpu) / times


if __name__ == "__main__":
    main()
