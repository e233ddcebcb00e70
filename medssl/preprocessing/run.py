"""`medssl preprocess`: an INDEX, an nnU-Net raw data set or a folder of images becomes a store."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive.codes import explain
from medssl.errors import EXIT_ALL_REFUSED, EXIT_OK, EXIT_SOME_REFUSED, MedsslError, UsageError
from medssl.files import write_json
from medssl.lock import claimed_folder
from medssl.preprocessing import worker
from medssl.preprocessing.case import Plan
from medssl.preprocessing.codec import LOSSLESS, check_codec
from medssl.preprocessing.normalise import check_scheme
from medssl.preprocessing.runners import Runner, runner
from medssl.preprocessing.source import Job, Source, open_source
from medssl.preprocessing.store import StoreWriter
from medssl.preprocessing.store_files import FAILED_FILE, STORE_FILE, UNFINISHED_FILE
from medssl.preprocessing.survey import Options, plan_of, store_info
from medssl.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessSummary:
    """What became of the volumes.

    Attributes:
        out: The store.
        volumes: Volumes in the store.
        kept: Those of them that were there before (`--resume`).
        failed: Volumes that cannot be used; they are in `failed.json`.
        codes: How many failed by reason code.
        spacing_mm: Target voxel size (z, y, x), or None for each volume's own.
        codec: How the intensities are stored.
        largest_error: Largest change of an intensity by the codec, in normalised intensities.
        rms_error: Root mean square of the changes.
        seconds: Wall-clock time.
    """

    out: Path
    volumes: int
    kept: int
    failed: int
    codes: dict[str, int] = field(default_factory=dict)
    spacing_mm: tuple[float, ...] | None = None
    codec: str = LOSSLESS
    largest_error: float = 0.0
    rms_error: float = 0.0
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 if all volumes are in the store, 3 if some failed, 4 if all did."""
        if not self.failed:
            return EXIT_OK
        return EXIT_SOME_REFUSED if self.volumes else EXIT_ALL_REFUSED

    def to_json(self) -> dict[str, Any]:
        """Return what a script needs."""
        return {
            "volumes": self.volumes,
            "kept": self.kept,
            "failed": self.failed,
            "codes": self.codes,
            "spacing_mm": None if self.spacing_mm is None else list(self.spacing_mm),
            "codec": self.codec,
            "largest_error": self.largest_error,
            "rms_error": self.rms_error,
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        size = "native" if self.spacing_mm is None else " x ".join(f"{edge:g}" for edge in self.spacing_mm) + " mm"
        lines = [f"{self.volumes} volumes, voxels (z, y, x) {size}, {self.seconds:.1f} s"]
        if self.kept:
            lines[0] += f", {self.kept} of them were there before"
        if self.codec != LOSSLESS:
            lines.append(
                f"Stored as {self.codec}: largest error {self.largest_error:.2g}, root mean square "
                f"{self.rms_error:.2g}, in units of the normalised image"
            )
        lines += [f"{count} failed: {code}. {explain(code)}" for code, count in self.codes.items()]
        if self.failed:
            lines.append(f"Each failed volume has a row in {FAILED_FILE}.")
        return "\n".join(lines)

    def __rich__(self) -> str:
        return str(self)


def preprocess(
    index: Path,
    out: Path,
    *,
    select: str | None = None,
    spacing: str | Sequence[float] = "median",
    normalisation: str = "by-modality",
    crop: bool = True,
    codec: str = LOSSLESS,
    workers: int | None = None,
    executor: Executor | None = None,
    scheduler: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> PreprocessSummary:
    """Make a store.

    The result does not depend on the number of workers or on where they run. A volume that cannot be used costs one
    row in `failed.json`.

    Args:
        index: An INDEX, an nnU-Net raw data set (imagesTr, labelsTr, dataset.json; labels come along), or a folder of
            images, which is first indexed into `OUT.index` beside the store.
        out: Folder of the store.
        select: SQL condition over the columns of `volumes.parquet`.
        spacing: Voxel size (z, y, x) in mm, `median` of all volumes, or `native`.
        normalisation: `by-modality`, or a key of `normalise.SCHEMES` for all.
        crop: Whether to crop to the content.
        codec: How the intensities are stored, a key of `codec.CODECS`; all but `lossless` change them a little, by
            how much stands in the facts of each volume and in `store.json`.
        workers: Processes on this machine; by default one per core.
        executor: Runs the work in place of local processes. Its machines must see the same files.
        scheduler: Address of a Dask scheduler, or `local` for a Dask cluster on this machine.
        resume: Keep the volumes that are complete.
        overwrite: Replace what is in `out`.
        quiet: Show no progress.

    Raises:
        UsageError: If an option does not fit.
        DataError: If there is nothing to preprocess.
        MedsslError: If the disk is full or a cluster fails; what is complete stays for `resume`.
    """
    index, out = Path(index), Path(out)
    if executor is not None and scheduler is not None:
        raise UsageError("Give an executor or a scheduler, not both.")
    if workers is not None and workers < 0:
        raise UsageError(f"--workers {workers}: give 0 or more.")
    options = check_options(spacing, normalisation, crop, codec, select)
    if out.resolve() == index.resolve():
        raise UsageError(f"--out {out} is the input; choose another folder for the store.")
    source = open_source(index, select, out.with_name(out.name + ".index"), workers=workers, quiet=quiet)
    return preprocess_source(
        source, out, options, workers=workers, executor=executor, scheduler=scheduler, resume=resume,
        overwrite=overwrite, quiet=quiet,
    )  # fmt: skip


def preprocess_source(
    source: Source,
    out: Path,
    options: Options,
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    scheduler: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> PreprocessSummary:
    """Make a store of volumes that are listed already; see `preprocess`.

    Args:
        source: The volumes.
        out: Folder of the store.
        options: What `check_options` returned.
        workers: Processes on this machine.
        executor: Runs the work in place of local processes.
        scheduler: Address of a Dask scheduler, or `local`.
        resume: Keep the volumes that are complete.
        overwrite: Replace what is in `out`.
        quiet: Show no progress.
    """
    started = time.monotonic()
    with (
        claimed_folder(out, resume=resume, overwrite=overwrite, owned=_is_store),
        runner(workers, executor, scheduler) as run,
    ):
        info = store_info(options, source, out, run, resume=resume, quiet=quiet)
        writer = StoreWriter(out, info, resume=resume)
        todo = _incomplete(source.jobs, writer, resume, quiet)
        failures = _process(todo, plan_of(info), out, run, quiet)
        write_json(out / FAILED_FILE, {"volumes": failures})
        volumes = len(source.jobs) - len(failures)
        error = writer.finish().info["codec_error"] if volumes else {"largest": 0.0, "rms": 0.0}
    return PreprocessSummary(
        out=out,
        volumes=volumes,
        kept=len(source.jobs) - len(todo),
        failed=len(failures),
        codes=dict(sorted(Counter(row["code"] for row in failures).items())),
        spacing_mm=info["spacing"]["mm"],
        codec=options.codec,
        largest_error=error["largest"],
        rms_error=error["rms"],
        seconds=time.monotonic() - started,
    )


def _incomplete(jobs: Sequence[Job], writer: StoreWriter, resume: bool, quiet: bool) -> list[Job]:
    """Return the volumes that are not in the store yet."""
    if not resume:
        return list(jobs)
    todo = []
    with progress("Checking what is there", len(jobs), quiet=quiet) as advance:
        for job in jobs:
            if not writer.complete(job.volume_id):
                todo.append(job)
            advance()
    return todo


def _process(jobs: Sequence[Job], plan: Plan, out: Path, run: Runner, quiet: bool) -> list[dict[str, str]]:
    """Preprocess the volumes and return a row for each that failed, sorted by id."""
    failures = []
    tasks = [worker.Task(job, plan, str(out)) for job in jobs]
    with progress("Preprocessing volumes", len(tasks), quiet=quiet) as advance:
        for task, outcome in run(worker.process, tasks):
            if outcome.value:
                raise MedsslError(outcome.value)
            if outcome.code:
                logger.info("%s failed: %s, %s", task.job.volume_id, outcome.code, outcome.detail)
                failures.append({"volume_id": task.job.volume_id, "code": outcome.code, "detail": outcome.detail})
            advance(1, f"{len(failures)} failed" if failures else "")
    return sorted(failures, key=lambda row: row["volume_id"])


def check_options(
    spacing: str | Sequence[float], normalisation: str, crop: bool, codec: str, select: str | None
) -> Options:
    """Return the options of a store, checked.

    Raises:
        UsageError: If one does not fit.
    """
    check_scheme(normalisation)
    check_codec(codec)
    if isinstance(spacing, str):
        if spacing not in ("median", "native"):
            raise UsageError(f"--spacing '{spacing}': give median, native, or millimetres as Z,Y,X such as 1.5,1,1.")
        return Options(spacing, None, normalisation, crop, codec, select)
    edges = tuple(float(edge) for edge in spacing)
    if len(edges) != 3 or not all(math.isfinite(edge) and edge > 0 for edge in edges):
        raise UsageError(f"--spacing {edges}: give three positive numbers of mm as Z,Y,X, median or native.")
    return Options("fixed", edges, normalisation, crop, codec, select)


def _is_store(out: Path) -> bool:
    return any((out / name).is_file() for name in (STORE_FILE, UNFINISHED_FILE))
