"""How fast are random crops read, how many bytes do they take, and how exact are they?

Command: `python pipelines/benchmarks/store_reading.py [--data FOLDER]` (about four minutes; `--quick` takes seconds).

Our store with each of its codecs, an uncompressed memory map, blosc2 with nnssl's and with nnU-Net's settings, gzipped
NIfTI and Zarr hold the same float32 volumes: synthetic ones, smooth with noise, and left atria as acquired and
resampled to 0.5 mm. All read the same random crops on one thread, in turns, so that a change of the machine's load
meets all of them; every crop becomes a new float32 array. A crop is cut where a volume is smaller.

`warm`: files are open and in memory. `cold`: before each crop the volumes' files are closed and the system is asked to
drop their pages (POSIX_FADV_DONTNEED); opening the file counts. It is warmer than a disk that was never read, whose own
cache stays. `still cached` says which share of the pages the system kept nevertheless.

The second table compares settings of blosc2 for what the store keeps: MR and CT as acquired, whose values are few, and
resampled. The best of several rounds counts, in processor time; `relative` is the geometric mean over the volumes of
the ratio to the store's own settings.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import blosc2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import _blosc_parameters
from _blosc_parameters import random_box
from _common import print_table, write_results
from _reading_programs import Box, Program, Reader, drop_from_cache, files_of, programs

from medssl.archive.index import index
from medssl.preprocessing.run import preprocess
from medssl.preprocessing.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
EDGES = (96, 160)
VOLUMES, CROPS, ROUNDS, COLD_CROPS = 2, 8, 5, 6
#: Seconds of one crop beyond which a program reads only the first few.
SLOW, SLOW_CROPS = 0.1, 2


def main() -> None:
    """Write with every program, read in turns, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(os.environ.get("MEDSSL_DATA", REPOSITORY.parent / "shared/data"))
    parser.add_argument("--data", type=Path, default=beside, help="folder of left_atrium, hippocampus and dicom")
    parser.add_argument("--quick", action="store_true", help="tiny synthetic volumes only; writes no results")
    options = parser.parse_args()
    blosc2.set_nthreads(1)
    load = round(os.getloadavg()[0], 1)
    edges = (16, 24) if options.quick else EDGES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.quick:
            volumes = {"synthetic": [synthetic(40, seed) for seed in range(VOLUMES)]}
            single = {"synthetic": volumes["synthetic"][0]}
        else:
            volumes = {"synthetic": [synthetic(200, seed) for seed in range(VOLUMES)], **atria(options.data, folder)}
            single = {**one_of_each(options.data, folder)}
        for name, arrays in volumes.items():
            rows += compare(name, arrays, edges, folder / "programs" / name.replace(" ", "_"))
    print_table(rows)
    parameters = _blosc_parameters.measure(single, edges, quick=options.quick) if single else []
    shown = ("stored", "crop", "compressor", "level", "shuffled", "split", "chunk", "block")
    relative = ("decode ns/voxel relative", "bytes/voxel relative")
    print_table([{key: row[key] for key in (*shown, *relative)} for row in parameters])
    if not options.quick:
        payload = {"threads": 1, "load_average_at_start": load, "reading": rows, "parameters": parameters}
        print(f"Written: {write_results('store_reading', payload).relative_to(REPOSITORY)}")


def compare(name: str, arrays: list[np.ndarray], edges: tuple[int, ...], folder: Path) -> list[dict[str, Any]]:
    """Return a row per program and crop size."""
    print(f"{name}: {len(arrays)} volumes of {' x '.join(map(str, arrays[0].shape[1:]))} ...", flush=True)
    voxels = sum(array.size for array in arrays)
    found: dict[str, dict[str, Any]] = {}
    todo = programs()
    for program in todo:
        place = folder / program.name.replace(" ", "_")
        place.mkdir(parents=True)
        start = time.process_time()
        program.write(place, arrays)
        found[program.name] = {
            "write ns/voxel": round(1e9 * (time.process_time() - start) / voxels, 1),
            "bytes/voxel": round(sum(path.stat().st_size for path in files_of(place)) / voxels, 3),
        }
    # Pages that were never written to disk cannot be dropped.
    os.sync()
    rows = []
    for edge in edges:
        measured = read_in_turns(todo, arrays, edge, folder)
        fastest = {kind: measured[todo[0].name][kind] for kind in ("warm ms", "cold ms")}
        rows += [
            {
                "volumes": name,
                "crop": edge,
                "program": program.name,
                "crops/s warm": round(1e3 / measured[program.name]["warm ms"], 1),
                "crops/s cold": round(1e3 / measured[program.name]["cold ms"], 1),
                **{
                    f"{kind[:4]} / lossless": round(measured[program.name][kind] / fastest[kind], 2) for kind in fastest
                },
                **found[program.name],
                "largest error": measured[program.name]["error"],
                "still cached": round(measured[program.name]["cached"], 3),
            }
            for program in todo
        ]
    return rows


def read_in_turns(
    todo: list[Program], arrays: list[np.ndarray], edge: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Return milliseconds per crop, warm and cold, the largest error and the share of pages that stayed cached."""
    rng = np.random.default_rng(edge)
    boxes = [(number % len(arrays), random_box(arrays[0].shape[1:], edge, rng)) for number in range(CROPS)]
    boxes = [(number, random_box(arrays[number].shape[1:], edge, rng)) for number, _ in boxes]
    places = {program.name: folder / program.name.replace(" ", "_") for program in todo}
    readers: dict[str, Reader] = {program.name: program.open(places[program.name]) for program in todo}
    errors, slow = dict.fromkeys(readers, 0.0), set()
    for name, read in readers.items():
        for crop, (number, box) in enumerate(boxes):
            if name in slow and crop >= SLOW_CROPS:
                continue
            seconds, values = _timed(read, number, box)
            difference = np.abs(values.astype(np.float64) - arrays[number][(slice(None), *box)])
            errors[name] = max(errors[name], float(difference.max()))
            if seconds > SLOW:
                slow.add(name)
    warm: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(ROUNDS):
        for crop, (number, box) in enumerate(boxes):
            for name, read in readers.items():
                if name not in slow or (crop < SLOW_CROPS and turn == 0):
                    warm[name].append(_timed(read, number, box)[0])
    # Mapped files keep their pages.
    readers.clear()
    del read
    gc.collect()
    cold: dict[str, list[float]] = {name: [] for name in warm}
    cached: dict[str, list[float]] = {name: [] for name in warm}
    for crop, (number, box) in enumerate(boxes[:COLD_CROPS]):
        for program in todo:
            if program.name in slow and crop >= SLOW_CROPS:
                continue
            read = program.open(places[program.name])
            cached[program.name].append(drop_from_cache(places[program.name]))
            cold[program.name].append(_timed(read, number, box)[0])
            del read
            gc.collect()
    return {
        name: {
            "warm ms": 1e3 * statistics.median(warm[name]),
            "cold ms": 1e3 * statistics.median(cold[name]),
            "error": errors[name],
            "cached": statistics.fmean(cached[name]),
        }
        for name in warm
    }


def _timed(read: Reader, number: int, box: Box) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    values = read(number, box)
    return time.perf_counter() - start, values


def synthetic(edge: int, seed: int) -> np.ndarray:
    """Return a smooth volume with noise of a tenth of its spread, z-scored. Shape: (1, edge, edge, edge)."""
    rng = np.random.default_rng(seed)
    volume = rng.standard_normal((6, 6, 6))
    for axis in range(3):
        place = np.linspace(0, volume.shape[axis] - 1, edge)
        below = np.minimum(place.astype(int), volume.shape[axis] - 2)
        part = (place - below).reshape([-1 if axis == other else 1 for other in range(3)])
        volume = volume.take(below, axis) * (1 - part) + volume.take(below + 1, axis) * part
    volume += 0.1 * volume.std() * rng.standard_normal(volume.shape)
    return ((volume - volume.mean()) / volume.std()).astype(np.float32)[None]


def atria(data: Path, folder: Path) -> dict[str, list[np.ndarray]]:
    """Return left atria as acquired and resampled, normalised as `medssl preprocess` does."""
    raw = raw_part(data / "left_atrium", folder / "atria", VOLUMES)
    if raw is None:
        return {}
    return {
        "left atrium, as acquired": prepared(raw, folder / "acquired", "native"),
        "left atrium, 0.5 mm": prepared(raw, folder / "fine", (0.5, 0.5, 0.5)),
    }


def one_of_each(data: Path, folder: Path) -> dict[str, np.ndarray]:
    """Return one volume each of several kinds, for the settings of blosc2."""
    found: dict[str, np.ndarray] = {}
    atrium = raw_part(data / "left_atrium", folder / "atrium", 1)
    if atrium is not None:
        found["left atrium 0.625 mm"] = prepared(atrium, folder / "native", "native")[0]
        found["left atrium 1.25 mm"] = prepared(atrium, folder / "coarse", (1.25, 1.25, 1.25))[0]
        found["left atrium 0.5 mm"] = prepared(atrium, folder / "finer", (0.5, 0.5, 0.5))[0]
    hippocampus = raw_part(data / "hippocampus", folder / "hippocampus", 1)
    if hippocampus is not None:
        found["hippocampus 1 mm"] = prepared(hippocampus, folder / "hippocampi", "native")[0]
    series = data / "dicom" / "ct_jpeg2000"
    if series.is_dir():
        index([series], folder / "index", workers=1, quiet=True)
        found["CT 2 x 0.98 mm"] = prepared(folder / "index", folder / "ct", "native")[0]
        found["CT 1.5 mm"] = prepared(folder / "index", folder / "fine_ct", (1.5, 1.5, 1.5))[0]
    return found


def raw_part(dataset: Path, folder: Path, count: int) -> Path | None:
    """Return an nnU-Net raw data set of the first cases of another, linked; None if that is not there."""
    if not (dataset / "imagesTr").is_dir():
        print(f"{dataset} is not there: left out")
        return None
    (folder / "imagesTr").mkdir(parents=True)
    for image in sorted((dataset / "imagesTr").iterdir())[:count]:
        (folder / "imagesTr" / image.name).symlink_to(image.resolve())
    description = {**json.loads((dataset / "dataset.json").read_text()), "numTraining": count}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def prepared(source: Path, out: Path, spacing: Any) -> list[np.ndarray]:
    """Return the volumes that `medssl preprocess` makes. Shape of each: (1, Z, Y, X)."""
    with ThreadPoolExecutor(1) as executor:
        preprocess(source, out, spacing=spacing, executor=executor, quiet=True)
    store = Store.open(out)
    return [store.read(name, (0, 0, 0), store.entry(name).shape[1:])[:1] for name in store.ids]


if __name__ == "__main__":
    main()
