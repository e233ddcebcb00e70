"""The stages between finding files and the manifest: headers, series, volumes; each goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from medssl.archive.cache import TRANSIENT, Cache, compact
from medssl.archive.hints import hint_paths
from medssl.archive.keys import keys_of
from medssl.archive.private import KnownSource
from medssl.archive.pseudonym import Pseudonyms
from medssl.archive.sandbox import HEADER_LIMITS, VOLUME_LIMITS, Limits, Outcome, Pool, map_on_executor
from medssl.archive.tasks import FileFacts, FileTask, VolumeTask, measure_volume, plan_series, read_file
from medssl.progress import progress

_HEADERS_AT_ONCE = 64
_ROWS_PER_COMMIT = 1000


@dataclass
class Stages:
    """A run over the cache.

    Attributes:
        cache: What is known.
        sources: The sources by number.
        pseudonyms: Makes the keys.
        geometry: `strict` or `repair`.
        workers: Processes.
        executor: Where to work instead of in processes of this machine.
        quiet: Show no progress.
    """

    cache: Cache
    sources: dict[int, KnownSource]
    pseudonyms: Pseudonyms
    geometry: str
    workers: int
    executor: Executor | None = None
    quiet: bool = False
    headers_read: int = field(default=0, init=False)
    volumes_decoded: int = field(default=0, init=False)
    _pool: Pool | None = field(default=None, init=False)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def read_headers(self) -> None:
        """Read the headers of new and changed files."""
        total = int(self.cache.one("SELECT COUNT(*) FROM files WHERE state = '' AND run = ?", (self.cache.run,)))
        with progress("Reading headers", total, quiet=self.quiet) as advance:
            for task, outcome in self.map(read_file, self._files_to_read(), HEADER_LIMITS, _HEADERS_AT_ONCE):
                self._enter_header(task, outcome)
                self.headers_read += 1
                advance()
                if self.headers_read % _ROWS_PER_COMMIT == 0:
                    self.cache.commit()
        self.cache.commit()

    def plan(self) -> None:
        """Make volumes of series, and of image files."""
        for done, (task, outcome) in enumerate(self.map(_plan, self._series_to_plan(), VOLUME_LIMITS, 1), 1):
            self._enter_plan(task, outcome)
            if done % _ROWS_PER_COMMIT == 0:
                self.cache.commit()
        self.cache.commit()
        self._plan_images()

    def decode(self) -> None:
        """Decode and measure new volumes."""
        connection, run = self.cache.connection, self.cache.run
        transient = ", ".join(f"'{code}'" for code in TRANSIENT)
        connection.execute(f"UPDATE volumes SET status = '' WHERE status = 'refused' AND code IN ({transient})")
        total = int(self.cache.one("SELECT COUNT(*) FROM volumes WHERE status = '' AND run = ?", (run,)))
        with progress("Decoding volumes", total, quiet=self.quiet) as advance:
            for task, outcome in self.map(measure_volume, self._volumes_to_decode(), VOLUME_LIMITS, 1):
                values = (
                    ("refused", outcome.code, outcome.detail, "")
                    if outcome.code
                    else ("ok", "", "", compact(outcome.value))
                )
                connection.execute(
                    "UPDATE volumes SET status = ?, code = ?, detail = ?, measured = ? WHERE fingerprint = ?",
                    (*values, task.fingerprint),
                )
                self.volumes_decoded += 1
                advance()
                if self.volumes_decoded % 100 == 0:
                    self.cache.commit()
        self.cache.commit()

    def tasks_of(self, query: str) -> Iterator[VolumeTask]:
        """Yield what is needed to decode the volumes of a query.

        Args:
            query: Selects rowid, fingerprint, source, kind, plan; paged.
        """
        members = (
            "SELECT f.path, f.size, f.mtime FROM members m JOIN files f ON f.id = m.file "
            "WHERE m.fingerprint = ? ORDER BY m.position"
        )
        for _, fingerprint, source, kind, plan in self.cache.pages(query, size=50):
            files = tuple(self.cache.connection.execute(members, (fingerprint,)).fetchall())
            root = str(self.sources[source].source.root)
            yield VolumeTask(fingerprint, kind, root, plan, self.geometry, files)

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], limits: Limits, batch: int = 1
    ) -> Iterator[tuple[Any, Outcome]]:
        """Yield each item with what came of it, in processes with limits, here or where the executor is."""
        if self.executor is not None:
            flight = max(2, 2 * self.workers)
            return map_on_executor(self.executor, function, items, limits, batch=batch, in_flight=flight)
        if self._pool is None:
            self._pool = Pool(self.workers)
        return self._pool.map(function, items, limits=limits, batch=batch)

    def _files_to_read(self) -> Iterator[FileTask]:
        query = (
            f"SELECT id, source, path, size, mtime FROM files WHERE state = '' AND run = {self.cache.run} "
            "AND id > :after ORDER BY id LIMIT :size"
        )
        for number, source, path, size, mtime in self.cache.pages(query, size=2000):
            yield FileTask(number, str(self.sources[source].source.root), path, size, mtime)

    def _enter_header(self, task: FileTask, outcome: Outcome) -> None:
        execute = self.cache.connection.execute
        update = "UPDATE files SET state = ?, code = ?, detail = ?, series = ?, header = ?, grouped = '' WHERE id = ?"
        execute("DELETE FROM companions WHERE file = ?", (task.number,))
        if outcome.code:
            execute(update, ("refused", outcome.code, outcome.detail, "", "", task.number))
            return
        facts: FileFacts = outcome.value
        execute(update, (facts.state, facts.code, "", facts.series, facts.header, task.number))
        for companion in facts.companions:
            execute(
                "INSERT OR REPLACE INTO companions SELECT source, ?, id FROM files WHERE id = ?",
                (companion, task.number),
            )

    def _series_to_plan(self) -> Iterator[_SeriesTask]:
        connection, run = self.cache.connection, self.cache.run
        query = (
            "SELECT source, series FROM files WHERE state = 'dicom' AND run = ? AND (source, series) > (?, ?) "
            "GROUP BY source, series ORDER BY source, series LIMIT 200"
        )
        after: tuple[int, str] = (-1, "")
        while page := connection.execute(query, (run, *after)).fetchall():
            for source, series in page:
                rows = connection.execute(
                    "SELECT id, path, size, mtime FROM files "
                    "WHERE state = 'dicom' AND source = ? AND series = ? AND run = ? ORDER BY path",
                    (source, series, run),
                ).fetchall()
                signature = _digest(self.geometry, rows)
                known = self.cache.one("SELECT signature FROM series WHERE source = ? AND series = ?", (source, series))
                if known == signature:
                    self._keep_series(source, series)
                    continue
                headers = [
                    str(self.cache.one("SELECT header FROM files WHERE id = ?", (number,))) for number, *_ in rows
                ]
                root = str(self.sources[source].source.root)
                yield _SeriesTask(source, series, signature, root, self.geometry, headers)
            after = page[-1]

    def _keep_series(self, source: int, series: str) -> None:
        where = f"SET run = {self.cache.run} WHERE source = ? AND series = ?"
        self.cache.connection.execute(f"UPDATE series {where}", (source, series))
        self.cache.connection.execute(f"UPDATE volumes {where}", (source, series))

    def _enter_plan(self, task: _SeriesTask, outcome: Outcome) -> None:
        execute, run = self.cache.connection.execute, self.cache.run
        rows = execute(
            "SELECT path, id, size, mtime FROM files "
            "WHERE state = 'dicom' AND source = ? AND series = ? AND run = ? ORDER BY path",
            (task.source, task.series, run),
        ).fetchall()
        files = {path: (number, size, mtime) for path, number, size, mtime in rows}
        # What the plan does not mention would be lost: it is refused.
        verdicts = dict.fromkeys(files, ("refused", outcome.code or "decode_failed", outcome.detail or "not grouped"))
        plan = {"volumes": [], "related": [], "refused": []} if outcome.code else outcome.value
        verdicts.update({path: ("refused", code, detail) for path, code, detail in plan["refused"]})
        verdicts.update({path: ("related", kind, "") for path, kind in plan["related"]})
        for text, name in plan["volumes"]:
            values = json.loads(text)
            verdicts.update(dict.fromkeys(values["paths"], ("volume", "", "")))
            self._enter_volume(
                task.source, task.series, "dicom", text, values, name, [files[p] for p in values["paths"]]
            )
        for path, (number, _, _) in files.items():
            execute(
                "UPDATE files SET grouped = ?, group_code = ?, group_detail = ? WHERE id = ?", (*verdicts[path], number)
            )
        # Without an answer there is no signature: the next run asks again.
        signature = "" if outcome.code in TRANSIENT else task.signature
        execute("INSERT OR REPLACE INTO series VALUES (?, ?, ?, ?)", (task.source, task.series, signature, run))

    def _enter_volume(
        self,
        source: int,
        series: str,
        kind: str,
        text: str,
        values: dict[str, Any],
        name: list[str],
        files: list[tuple[int, int, int]],
        extra: Any = None,
    ) -> None:
        connection, run = self.cache.connection, self.cache.run
        stamps = [(size, mtime) for _, size, mtime in files]
        fingerprint = _digest(source, kind, self.geometry, text, stamps, extra)
        first = values["paths"][0]
        keys = keys_of(self.pseudonyms, self.sources[source].label, kind, values)
        volume_id = keys.volume(self.pseudonyms, name)
        connection.execute(
            "INSERT INTO volumes (fingerprint, source, series, first_path, kind, plan, run, volume_id, patient_key, "
            "study_key, series_key, person, facts, status, code, detail, measured) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', '', '', '') "
            "ON CONFLICT (fingerprint) DO UPDATE SET run = excluded.run, series = excluded.series",
            (
                fingerprint,
                source,
                series,
                first,
                kind,
                text,
                run,
                volume_id,
                keys.patient,
                keys.study,
                keys.series,
                compact(list(values.get("person", ()))),
                compact(keys.flags),
            ),
        )
        connection.executemany(
            "INSERT OR REPLACE INTO members VALUES (?, ?, ?)",
            [(fingerprint, position, number) for position, (number, _, _) in enumerate(files)],
        )

    def _plan_images(self) -> None:
        stat = "SELECT id, size, mtime FROM files WHERE source = ? AND path = ? AND run = ?"
        companions = (
            "SELECT f.id, f.size, f.mtime FROM companions c JOIN files f ON f.source = c.source AND f.path = c.path "
            "WHERE c.file = ? ORDER BY f.path"
        )
        query = (
            "SELECT id, source, path, size, mtime, header FROM files WHERE state = 'image' "
            f"AND run = {self.cache.run} AND id > :after ORDER BY id LIMIT :size"
        )
        execute = self.cache.connection.execute
        for done, (number, source, path, size, mtime, kind) in enumerate(self.cache.pages(query), 1):
            files = [(number, size, mtime), *execute(companions, (number,)).fetchall()]
            beside = [execute(stat, (source, name, self.cache.run)).fetchone() for name in hint_paths(path)]
            self._enter_volume(
                source, "", kind, path, {"paths": [path]}, [], files, [row[1:] for row in beside if row is not None]
            )
            if done % _ROWS_PER_COMMIT == 0:
                self.cache.commit()
        self.cache.commit()

    def _volumes_to_decode(self) -> Iterator[VolumeTask]:
        return self.tasks_of(
            "SELECT rowid, fingerprint, source, kind, plan FROM volumes WHERE status = '' "
            f"AND run = {self.cache.run} AND rowid > :after ORDER BY rowid LIMIT :size"
        )


@dataclass(frozen=True, slots=True)
class _SeriesTask:
    source: int
    series: str
    signature: str
    root: str
    geometry: str
    headers: list[str]


def _plan(task: _SeriesTask) -> dict[str, Any]:
    return plan_series((task.root, task.geometry, task.headers))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(compact(parts).encode()).hexdigest()
