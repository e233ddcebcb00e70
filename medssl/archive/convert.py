"""`medssl convert`: an archive becomes one NIfTI per accepted volume, beside its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.index import Run, opened
from medssl.archive.sandbox import VOLUME_LIMITS
from medssl.archive.stages import Stages
from medssl.archive.summary import IndexSummary
from medssl.archive.tasks import VolumeTask, load_planned
from medssl.archive.volume import Volume
from medssl.errors import InputRefused, MedsslError
from medssl.files import atomic_path
from medssl.progress import progress

ENDING = ".nii.gz"
_RGB_VECTOR = 2003


def convert(
    sources: Sequence[Path],
    out: Path,
    *,
    geometry: str = "strict",
    workers: int | None = None,
    key_file: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    executor: Executor | None = None,
) -> IndexSummary:
    """Write one NIfTI per accepted volume, named by its volume id; `out` is an index as well.

    Frames become the fourth dimension, colour becomes RGB24 (8 bit) or a vector of intent RGB (16 bit). The header
    carries grid and type only: no name, date or description.

    Args:
        sources: As in `index`.
        out: Folder for `<volume_id>.nii.gz`, `volumes.parquet`, `refused.parquet`, `related.parquet`, `index.json` and
            `private/`, which must never be shared.
        geometry: As in `index`.
        workers: As in `index`.
        key_file: As in `index`.
        resume: Continue or update `out`: only new volumes are written, those that are gone are removed.
        overwrite: Replace what is in `out`.
        quiet: Show no progress.
        executor: As in `index`; its machines must see `out` too.

    Returns:
        What came of the files.

    Raises:
        UsageError: If a source or an option cannot be used.
        MedsslError: If the output cannot be written.
    """
    with opened(sources, out, geometry, key_file, resume=resume, overwrite=overwrite) as run:
        stages = run.work(workers, executor, quiet)
        # Ids are final only after copies were found; what then cannot be written is settled once more.
        run.settle()
        if _write_all(run, stages, quiet):
            run.settle()
        _remove_stale(run)
        wanted = int(run.cache.one("SELECT COUNT(*) FROM volumes WHERE status = 'ok'"))
        return run.finish(converted=wanted)


@dataclass(frozen=True, slots=True)
class WriteTask:
    """A volume to be written.

    Attributes:
        volume: What to decode.
        target: Path of the NIfTI file.
    """

    volume: VolumeTask
    target: str


def write_volume(task: WriteTask) -> str:
    """Decode a volume and write it; return nothing, or why the disk did not take it.

    Raises:
        InputRefused: If the volume cannot be decoded.
    """
    volume = load_planned(task.volume)
    try:
        with atomic_path(Path(task.target)) as temporary:
            to_nifti(volume).to_filename(temporary)
    except InputRefused:
        raise
    except (MedsslError, OSError) as error:
        return str(error) if isinstance(error, MedsslError) else f"{task.target}: {error.strerror}"
    return ""


def to_nifti(volume: Volume) -> Any:
    """Return a volume as a nibabel image with nothing but grid and voxels in its header."""
    import nibabel

    array, affine = volume.array, volume.affine
    if volume.channels == "colour" and array.dtype == np.uint8:
        pixels = np.ascontiguousarray(array.transpose(3, 2, 1, 0))
        content: Any = pixels.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    elif volume.channels == "colour":
        content = array.transpose(3, 2, 1, 0)[:, :, :, None]
    elif volume.channels == "frames":
        content = array.transpose(3, 2, 1, 0)
    else:
        content = array[0].transpose(2, 1, 0)
    dtype = content.dtype
    # NIfTI-1 counts to 32767 in each direction.
    kind = nibabel.Nifti1Image if max(content.shape) < 2**15 else nibabel.Nifti2Image
    image = kind(content, affine, dtype=dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    if volume.channels == "colour" and array.dtype != np.uint8:
        image.header["intent_code"] = _RGB_VECTOR
    return image


def _write_all(run: Run, stages: Stages, quiet: bool) -> bool:
    """Write what is not there yet; tell whether a volume was refused on the way."""
    execute = run.cache.connection.execute
    execute("CREATE TABLE IF NOT EXISTS converted (final_id TEXT PRIMARY KEY, fingerprint TEXT)")
    total = int(run.cache.one("SELECT COUNT(*) FROM volumes WHERE status = 'ok'"))
    refused = False
    with progress("Writing NIfTI", total, quiet=quiet) as advance:
        for task, outcome in stages.map(write_volume, _tasks(run, stages, advance), VOLUME_LIMITS):
            if outcome.value:
                raise MedsslError(outcome.value)
            if outcome.code:
                refused = True
                execute(
                    "UPDATE volumes SET status = 'refused', code = ?, detail = ? WHERE fingerprint = ?",
                    (outcome.code, outcome.detail, task.volume.fingerprint),
                )
            else:
                name = Path(task.target).name.removesuffix(ENDING)
                execute("INSERT OR REPLACE INTO converted VALUES (?, ?)", (name, task.volume.fingerprint))
            run.cache.commit()
            advance()
    return refused


def _tasks(run: Run, stages: Stages, advance: Any) -> Iterator[WriteTask]:
    ids = "SELECT final_id FROM volumes WHERE fingerprint = ?"
    written = "SELECT fingerprint FROM converted WHERE final_id = ?"
    query = (
        "SELECT rowid, fingerprint, source, kind, plan FROM volumes WHERE status = 'ok' "
        "AND rowid > :after ORDER BY rowid LIMIT :size"
    )
    for task in stages.tasks_of(query):
        name = str(run.cache.one(ids, (task.fingerprint,)))
        target = run.out / f"{name}{ENDING}"
        if run.cache.one(written, (name,)) == task.fingerprint and target.is_file():
            advance()
            continue
        yield WriteTask(task, str(target.resolve()))


def _remove_stale(run: Run) -> None:
    execute = run.cache.connection.execute
    gone = execute(
        "SELECT final_id FROM converted WHERE final_id NOT IN (SELECT final_id FROM volumes WHERE status = 'ok')"
    ).fetchall()
    for (name,) in gone:
        (run.out / f"{name}{ENDING}").unlink(missing_ok=True)
        execute("DELETE FROM converted WHERE final_id = ?", (name,))
    for leftover in run.out.glob(f".*-*{ENDING}"):  # of a process that was killed
        leftover.unlink()
    run.cache.commit()
