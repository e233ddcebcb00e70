"""From an index, a file or a folder to voxels; everything is decoded in a process with limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.archive.cache import open_readonly
from medssl.archive.codes import explain
from medssl.archive.find import Source, absolute, walk
from medssl.archive.keys import keys_of
from medssl.archive.private import cache_path, read_sources
from medssl.archive.pseudonym import open_user_key
from medssl.archive.sandbox import HEADER_LIMITS, VOLUME_LIMITS, Limits, run_batch, run_limited
from medssl.archive.tasks import FileTask, VolumeTask, load_file_alone, load_planned, plan_series, read_file
from medssl.archive.volume import Volume
from medssl.errors import DataError, InputRefused, UsageError

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True)
class Index:
    """An index that was written by `medssl index` or `medssl convert`.

    Attributes:
        path: Its folder.
        info: Content of `index.json`.
    """

    path: Path
    info: dict[str, Any] = field(repr=False)

    def rows(self, select: str | None = None) -> polars.DataFrame:
        """Return the accepted volumes that meet a condition, ordered by volume id.

        Args:
            select: What stands behind WHERE in SQL, for example `modality = 'MR' AND body_part = 'BRAIN'`. Lists have
                polars' functions, for example `NOT array_contains(flags, 'few_values')`.

        Raises:
            UsageError: If the condition is no SQL or names an unknown column.
        """
        import polars

        table = polars.read_parquet(self.path / "volumes.parquet")
        if select is None or not select.strip():
            return table
        try:
            with polars.SQLContext(volumes=table, eager=True) as context:
                found = context.execute(f"SELECT * FROM volumes WHERE {select}")
        except polars.exceptions.PolarsError as error:
            first = str(error).splitlines()[0]
            raise UsageError(
                f'--select "{select}" cannot be used: {first}. Columns: {", ".join(table.columns)}.'
            ) from error
        if not isinstance(found, polars.DataFrame) or found.columns != table.columns:
            raise UsageError(f'--select "{select}" must be a condition only, as it stands behind WHERE in SQL.')
        return found.sort("volume_id")

    def refused(self) -> polars.DataFrame:
        """Return the table of refused files: source, relative_path, series_key, code, detail."""
        import polars

        return polars.read_parquet(self.path / "refused.parquet")

    def related(self) -> polars.DataFrame:
        """Return the table of related objects: source, relative_path, kind and keys."""
        import polars

        return polars.read_parquet(self.path / "related.parquet")

    def task(self, volume_id: str) -> VolumeTask:
        """Return what is needed to decode a volume; private to the archive.

        Raises:
            DataError: If the volume or the private folder is not there.
        """
        connection = open_readonly(cache_path(self.path))
        try:
            row = connection.execute(
                "SELECT fingerprint, source, kind, plan FROM volumes WHERE final_id = ? AND status = 'ok'", (volume_id,)
            ).fetchone()
            if row is None:
                raise DataError(f"{self.path} has no volume '{volume_id}'.")
            fingerprint, number, kind, plan = row
            files = connection.execute(
                "SELECT f.path, f.size, f.mtime FROM members m JOIN files f ON f.id = m.file WHERE m.fingerprint = ? "
                "ORDER BY m.position",
                (fingerprint,),
            ).fetchall()
        finally:
            connection.close()
        root = self._roots[number]
        if not root.is_dir():
            raise DataError(f"Source {number} of {self.path} is not where it was. Mount it there, or index it again.")
        return VolumeTask(fingerprint, kind, str(root), plan, self.info["geometry"], tuple(map(tuple, files)))

    def related_file(self, source: int, path: str) -> FileTask:
        """Return where a related object lies and how it was when it was indexed; private to the archive.

        Args:
            source: Its column `source`.
            path: Its column `relative_path`.

        Raises:
            DataError: If the index does not know it, or its source is not there.
        """
        connection = open_readonly(cache_path(self.path))
        try:
            row = connection.execute(
                "SELECT id, size, mtime FROM files WHERE source = ? AND path = ?", (source, path)
            ).fetchone()
        finally:
            connection.close()
        if row is None or source not in self._roots:
            raise DataError(f"{self.path} has lost a related object. Run `medssl index` on it with --resume.")
        return FileTask(row[0], str(self._roots[source]), path, row[1], row[2])

    @cached_property
    def _roots(self) -> dict[int, Path]:
        return {number: entry.source.root for number, entry in read_sources(self.path).items()}


def open_index(path: Path) -> Index:
    """Open an index.

    Raises:
        UsageError: If there is none.
        DataError: If it is damaged or was not finished.
    """
    if not (path / "index.json").is_file():
        unfinished = cache_path(path).is_file()
        raise UsageError(
            f"{path} is an index that was not finished: run `medssl index` on it with --resume."
            if unfinished
            else f"{path} is no index (no index.json): make one with `medssl index SOURCE --out {path}`."
        )
    try:
        info = json.loads((path / "index.json").read_text())
        expected = info["sha256"]["volumes.parquet"]
        with (path / "volumes.parquet").open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: run `medssl index` on it with --resume.") from error
    if found != expected:
        raise DataError(f"{path}: volumes.parquet is not the one index.json names. Run `medssl index` with --resume.")
    return Index(path, info)


def load_volume(index: Index, volume_id: str, limits: Limits = VOLUME_LIMITS) -> Volume:
    """Decode a volume of an index in a process with limits.

    Raises:
        InputRefused: If its files changed since, or it cannot be decoded.
        DataError: If the index does not know where it is.
    """
    volume = run_limited(load_planned, index.task(volume_id), limits)
    assert isinstance(volume, Volume)
    return volume


def read_volume(path: Path, geometry: str = "strict", limits: Limits = VOLUME_LIMITS) -> Volume:
    """Read one image file (NIfTI, NRRD, MetaImage, MGH, PNG, JPEG, TIFF, or a DICOM file that is a volume by itself).

    Raises:
        InputRefused: If it cannot be used, with its code.
        UsageError: If it does not exist.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist. Check the path.")
    volume = run_limited(load_file_alone, (str(path), geometry), limits)
    assert isinstance(volume, Volume)
    return volume


def read_any(path: Path, geometry: str = "strict", limits: Limits = VOLUME_LIMITS) -> list[Volume]:
    """Read every volume of one file or of the DICOM series and image files under a folder.

    Raises:
        InputRefused: If there is no usable volume; the first reason is told.
        UsageError: If the path does not exist.
    """
    found = find_series(path, geometry)
    if not found.series:
        _, code, detail = found.refused[0] if found.refused else ("", "not_an_image", "no file")
        raise InputRefused(code, f"{detail}. {explain(code)}")
    return [series.load(limits) for series in found.series]


@dataclass(frozen=True)
class SeriesFound:
    """A volume under a folder, not yet decoded.

    Attributes:
        name: The id that `medssl index` gives it with the same key: free of identity, the same each time.
        task: What is needed to decode it; private to the archive.
    """

    name: str
    task: VolumeTask = field(repr=False)

    def load(self, limits: Limits = VOLUME_LIMITS) -> Volume:
        """Decode it in a process with limits.

        Raises:
            InputRefused: If it cannot be decoded.
        """
        volume = run_limited(load_planned, self.task, limits)
        assert isinstance(volume, Volume)
        return volume

    @property
    def files(self) -> list[Path]:
        """Return its files in the order of the slices; paths may name the patient."""
        return [absolute(Path(self.task.root), path) for path, _, _ in self.task.files]


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        series: Volumes, ordered by the path of their first file.
        refused: Relative path, code and detail of what cannot be used.
        related: Relative path and kind of objects that are no volumes.
    """

    series: list[SeriesFound]
    refused: list[tuple[str, str, str]]
    related: list[tuple[str, str]]


def find_series(path: Path, geometry: str = "strict") -> Found:
    """Find the volumes of a file or folder without making an index.

    Args:
        path: A DICOM series, a folder of any depth, or an image file.
        geometry: `strict` or `repair`.

    Raises:
        UsageError: If the path does not exist.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist. Check the path.")
    source = Source(path) if path.is_dir() else Source(path.parent, path.name)
    root = str(source.root)
    refused: list[tuple[str, str, str]] = []
    related: list[tuple[str, str]] = []
    planned: list[_Planned] = []
    tasks: list[FileTask] = []
    for found in walk(source, 0):
        if found.code:
            refused.append((found.path, found.code, found.detail))
        else:
            tasks.append(FileTask(len(tasks), root, found.path, found.size, found.mtime_ns))
    stamps = {task.path: (task.path, task.size, task.mtime_ns) for task in tasks}
    companions: set[str] = set()
    series: dict[str, list[str]] = {}
    for task, outcome in sorted(run_batch(read_file, tasks, HEADER_LIMITS), key=lambda pair: pair[0].number):
        if outcome.code:
            refused.append((task.path, outcome.code, outcome.detail))
        elif outcome.value.state == "dicom":
            series.setdefault(outcome.value.series, []).append(outcome.value.header)
        elif outcome.value.state == "related":
            related.append((task.path, outcome.value.code))
        else:
            companions.update(outcome.value.companions)
            kind = outcome.value.header
            task_of_file = VolumeTask("", kind, root, task.path, geometry, (stamps[task.path],))
            planned.append(({"paths": [task.path]}, [], task_of_file))
    for headers in series.values():
        plan = run_limited(plan_series, (root, geometry, headers), HEADER_LIMITS)
        refused.extend(plan["refused"])
        related.extend(plan["related"])
        for text, name in plan["volumes"]:
            values = json.loads(text)
            files = tuple(stamps[one] for one in values["paths"])
            task_of_volume = VolumeTask("", "dicom", root, text, geometry, files)
            planned.append((values, name, task_of_volume))
    related.extend((path, "companion_file") for path, _, _ in refused if path in companions)
    return Found(
        _named(planned, source.root.name),
        sorted(row for row in refused if row[0] not in companions),
        sorted(related),
    )


_Planned = tuple[dict[str, Any], list[str], VolumeTask]


def _named(planned: Sequence[_Planned], label: str) -> list[SeriesFound]:
    pseudonyms = open_user_key()
    return [
        SeriesFound(keys_of(pseudonyms, label, task.kind, values).volume(pseudonyms, name), task)
        for values, name, task in sorted(planned, key=lambda entry: (entry[0]["paths"][0], entry[1]))
    ]
