"""What must be known of all volumes before the first is written: target voxel size and intensities."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medssl
from medssl.errors import DataError
from medssl.preprocessing import worker
from medssl.preprocessing.case import Plan
from medssl.preprocessing.fingerprint import chosen_for_intensities, intensities, median_spacing
from medssl.preprocessing.normalise import scheme_of
from medssl.preprocessing.runners import Runner
from medssl.preprocessing.source import Job, Source
from medssl.preprocessing.store_files import STORE_FILE, UNFINISHED_FILE, read_info
from medssl.progress import progress


@dataclass(frozen=True)
class Options:
    """What the user asked for, checked.

    Attributes:
        spacing: `median`, `native` or `fixed`.
        spacing_mm: Voxel size (z, y, x) where it is fixed.
        normalisation: `by-modality` or a key of `normalise.SCHEMES`.
        crop: Whether to crop to the content.
        codec: A key of `codec.CODECS`.
        select: SQL condition, or None.
    """

    spacing: str
    spacing_mm: tuple[float, ...] | None
    normalisation: str
    crop: bool
    codec: str
    select: str | None


def store_info(
    options: Options, source: Source, out: Path, run: Runner, *, resume: bool, quiet: bool
) -> dict[str, Any]:
    """Return what `store.json` says of all volumes; the volumes are looked at only for what the options ask for.

    Where a store of the same options over the same volumes was begun, its figures are taken: they are the same, and
    finding them again would cost a pass over all volumes.
    """
    settings: dict[str, Any] = {
        "normalisation": options.normalisation,
        "crop": options.crop,
        "codec": options.codec,
        "provenance": {
            "source": source.kind,
            "source_hash": source.hash,
            "selection": options.select,
            "volumes_selected": len(source.jobs),
            "tool": f"medssl {medssl.__version__}",
        },
    }
    fixed = None if options.spacing_mm is None else list(options.spacing_mm)
    before = _info_before(out) if resume else {}
    if all(before.get(key) == value for key, value in settings.items()):
        earlier = before["spacing"]
        if earlier["mode"] == options.spacing and (fixed is None or earlier["mm"] == fixed):
            return {**settings, "spacing": earlier, "fingerprint": before["fingerprint"]}
    tasks = [worker.Task(job, Plan(None, options.normalisation), str(out)) for job in source.jobs]
    target = list(_median(tasks, run, quiet)) if options.spacing == "median" else fixed
    fingerprint = {"intensities": _intensities(tasks, options.normalisation, run, quiet)}
    return {**settings, "spacing": {"mode": options.spacing, "mm": target}, "fingerprint": fingerprint}


def plan_of(info: Mapping[str, Any]) -> Plan:
    """Return what is done to every volume of a store with this information."""
    target = info["spacing"]["mm"]
    return Plan(
        None if target is None else (target[0], target[1], target[2]),
        info["normalisation"],
        info["fingerprint"]["intensities"],
        info["crop"],
        info["codec"],
    )


def _median(tasks: Sequence[worker.Task], run: Runner, quiet: bool) -> tuple[float, float, float]:
    known = [task.job.spacing_mm for task in tasks if task.job.spacing_mm is not None]
    unknown = [task for task in tasks if task.job.spacing_mm is None]
    if unknown:
        with progress("Reading voxel sizes", len(unknown), quiet=quiet) as advance:
            for _, outcome in run(worker.spacing, unknown):
                if not outcome.code:
                    known.append(outcome.value)
                advance()
    if not known:
        raise DataError("No volume says its voxel size. Give one with --spacing Z,Y,X or use --spacing native.")
    return median_spacing(known)


def _intensities(
    tasks: Sequence[worker.Task], normalisation: str, run: Runner, quiet: bool
) -> dict[str, dict[str, float]]:
    wanted = [task for task in tasks if _needs_intensities(task.job, normalisation)]
    chosen = set(chosen_for_intensities([task.job.volume_id for task in wanted]))
    found: dict[str, list[tuple[str, worker.Samples]]] = {}
    if chosen:
        with progress("Sampling intensities", len(chosen), quiet=quiet) as advance:
            for task, outcome in run(worker.sample, [task for task in wanted if task.job.volume_id in chosen]):
                for modality, samples in (outcome.value or {}).items():
                    found.setdefault(modality, []).append((task.job.volume_id, samples))
                advance()
    statistics = {}
    for modality, rows in sorted(found.items()):
        # By id, not by time of completion: a sum depends on its order.
        parts = [part for _, samples in sorted(rows, key=lambda row: row[0]) for part in samples if part.size]
        if parts:
            statistics[modality] = intensities(parts)
    return statistics


def _needs_intensities(job: Job, normalisation: str) -> bool:
    return any(scheme_of(normalisation, modality) == "fingerprint" for modality in job.modalities)


def _info_before(out: Path) -> dict[str, Any]:
    for name in (UNFINISHED_FILE, STORE_FILE):
        with contextlib.suppress(DataError):
            content = read_info(out / name)
            if {"spacing", "fingerprint"} <= content.keys():
                return content
    return {}
