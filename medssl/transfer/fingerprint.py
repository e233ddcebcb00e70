"""nnU-Net's fingerprint of the cases that are used: spacings, shapes, intensities inside the labels; kept per case."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import DataError
from medssl.files import atomic_path, write_json
from medssl.progress import progress
from medssl.transfer.casecheck import check_case
from medssl.transfer.nnunet import nnunet_environment, reader_of
from medssl.transfer.raw import Case, RawDataset

# Intensities drawn per case. nnU-Net draws 1e8 over all cases; percentiles need far fewer, and small sets stay fast.
SAMPLES = 50_000
# A pool costs seconds to start (each process imports nnU-Net): only work that takes longer is spread.
SECONDS_WORTH_A_POOL = 20.0


def fingerprint(
    dataset: RawDataset, names: Sequence[str], folder: Path, *, workers: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Check cases and return what nnU-Net plans by.

    Only the given cases are looked at, so that nothing of a held-out label enters the plans.

    Args:
        dataset: The data set.
        names: Cases to look at.
        folder: Where results per case are kept and found again.
        workers: Processes; 0 works in this one; None decides by the time the first case takes.
        quiet: Show no progress.

    Returns:
        nnU-Net's `dataset_fingerprint.json`.

    Raises:
        DataError: If a case cannot be used (see `check_case`), or none has a labelled voxel.
    """
    cases = [dataset.cases[name] for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    pending = [case for case in cases if not _is_kept(dataset, case, folder)]
    for_each(_analyse, [(dataset, case, folder) for case in pending], "Checking cases", workers=workers, quiet=quiet)
    kept = [_read(case, folder) for case in cases]
    if all(samples.shape[1] == 0 for _, samples in kept):
        raise DataError(
            f"None of the {len(cases)} training cases has a labelled voxel. Choose cases that show the labels."
        )
    intensities = {}
    for channel in range(len(dataset.channel_names)):
        values = np.concatenate([samples[channel] for _, samples in kept])
        intensities[str(channel)] = _statistics(values)
    return {
        "spacings": [facts["spacing"] for facts, _ in kept],
        "shapes_after_crop": [facts["shape_after_crop"] for facts, _ in kept],
        "foreground_intensity_properties_per_channel": intensities,
        "median_relative_size_after_cropping": float(np.median([facts["relative_size"] for facts, _ in kept])),
    }


def for_each(
    function: Callable[..., None], arguments: Sequence[tuple[Any, ...]], title: str, *, workers: int | None, quiet: bool
) -> None:
    """Call a function for each tuple of arguments, here or in processes; the first error stops all.

    Args:
        function: Picklable.
        arguments: One tuple per call.
        title: What the progress is called.
        workers: Processes; 0 or 1 works here; None starts some if the first call shows that it pays.
        quiet: Show no progress.
    """
    if not arguments:
        return
    with progress(title, len(arguments), quiet=quiet) as advance:
        started = time.monotonic()
        rest: Iterable[tuple[Any, ...]] = arguments
        if workers is None:
            function(*arguments[0])
            advance()
            rest = arguments[1:]
            left = (time.monotonic() - started) * (len(arguments) - 1)
            workers = _processors() if left > SECONDS_WORTH_A_POOL else 0
        if workers <= 1:
            for values in rest:
                function(*values)
                advance()
            return
        # Spawned and not forked: this process may hold threads of torch and blosc2.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(function, *values) for values in rest]
            try:
                for future in as_completed(futures):
                    future.result()
                    advance()
            finally:
                pool.shutdown(cancel_futures=True)


def _processors() -> int:
    return min(len(os.sched_getaffinity(0)), 8)


def _analyse(dataset: RawDataset, case: Case, folder: Path) -> None:
    with nnunet_environment():
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

        check_case(dataset, case)
        shape, spacing, samples, _, relative = DatasetFingerprintExtractor.analyze_case(
            [str(path) for path in case.images], str(case.label), reader_of(dataset), SAMPLES
        )
    with atomic_path(folder / f"{case.name}.npy") as temporary, temporary.open("wb") as handle:
        np.save(handle, np.asarray([np.asarray(values, dtype=np.float32) for values in samples]))
    facts = {
        "signature": _signature(dataset, case),
        "spacing": [float(value) for value in spacing],
        "shape_after_crop": [int(value) for value in shape],
        "relative_size": float(relative),
    }
    write_json(folder / f"{case.name}.json", facts)


def _signature(dataset: RawDataset, case: Case) -> list[Any]:
    place = hashlib.sha256(str(dataset.folder.resolve()).encode()).hexdigest()[:16]
    return [case.signature, dataset.label_values, place, SAMPLES]


def _is_kept(dataset: RawDataset, case: Case, folder: Path) -> bool:
    path = folder / f"{case.name}.json"
    if not path.is_file() or not path.with_suffix(".npy").is_file():
        return False
    return bool(json.loads(path.read_text())["signature"] == json.loads(json.dumps(_signature(dataset, case))))


def _read(case: Case, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    facts = json.loads((folder / f"{case.name}.json").read_text())
    return facts, np.load(folder / f"{case.name}.npy", allow_pickle=False)


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "median": float(median),
        "std": float(values.std(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }
