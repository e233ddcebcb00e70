"""What is known of each file and volume, in SQLite: runs continue where they stopped, and memory stays flat.

A file is known by (source, path) and is read again only if its size or time of change differ. Lies in `INDEX/private/`:
it holds paths and DICOM identifiers.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medssl.archive.find import Found
from medssl.errors import DataError, MedsslError

#: Raised whenever what is stored, or how volumes are made, changes: an older cache is then read anew.
SCHEMA = 2
#: Verdicts that may differ next time though the file is the same.
TRANSIENT = ("unreadable", "vanished", "changed_while_read", "decode_crashed", "decode_timeout", "decode_memory")

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY, source INTEGER, path TEXT, size INTEGER, mtime INTEGER, run INTEGER,
    state TEXT, code TEXT, detail TEXT,      -- state: '' (to be read), dicom, image, related, refused
    series TEXT, header TEXT,
    grouped TEXT, group_code TEXT, group_detail TEXT,  -- what became of a DICOM file: volume, related, refused
    UNIQUE (source, path));
CREATE INDEX IF NOT EXISTS files_by_series ON files (source, series, path) WHERE state = 'dicom';
CREATE INDEX IF NOT EXISTS files_to_read ON files (id) WHERE state = '';
CREATE TABLE IF NOT EXISTS companions (source INTEGER, path TEXT, file INTEGER, PRIMARY KEY (source, path, file))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS series (
    source INTEGER, series TEXT, signature TEXT, run INTEGER, PRIMARY KEY (source, series)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS volumes (
    fingerprint TEXT PRIMARY KEY, source INTEGER, series TEXT, first_path TEXT, kind TEXT, plan TEXT, hints TEXT,
    run INTEGER, volume_id TEXT, patient_key TEXT, study_key TEXT, series_key TEXT, person TEXT, facts TEXT,
    status TEXT, code TEXT, detail TEXT, measured TEXT, final_id TEXT, final_flags TEXT);  -- status: '', ok, refused
CREATE INDEX IF NOT EXISTS volumes_to_decode ON volumes (source, first_path) WHERE status = '';
CREATE INDEX IF NOT EXISTS volumes_by_series ON volumes (source, series);
CREATE INDEX IF NOT EXISTS volumes_by_id ON volumes (final_id);
CREATE TABLE IF NOT EXISTS members (
    fingerprint TEXT, position INTEGER, file INTEGER, PRIMARY KEY (fingerprint, position)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS members_by_file ON members (file);
"""


class Cache:
    """The table of files, series and volumes of one index.

    Args:
        path: The SQLite file.
        geometry: `strict` or `repair`; remembered for those who load volumes.
    """

    def __init__(self, path: Path, geometry: str) -> None:
        with disk_errors(path.parent):
            self.connection = self._open(path)
            if self.meta("schema") not in (None, str(SCHEMA)):
                self.connection.close()
                path.unlink()
                self.connection = self._open(path)
            self.run = int(self.meta("run") or 0) + 1
            for name, value in (("schema", str(SCHEMA)), ("geometry", geometry), ("run", str(self.run))):
                self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))
            self.connection.commit()

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(path)
            # A killed process leaves a journal that the next one rolls back; only a power cut could hurt, and then
            # the cache is made anew.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            path.unlink()  # damaged: all of it can be read again
            return Cache._open(path)
        return connection

    def close(self) -> None:
        """Write and close."""
        self.connection.close()

    def commit(self) -> None:
        """Make what was written so far survive a crash."""
        self.connection.commit()

    def meta(self, name: str) -> str | None:
        """Return a remembered setting."""
        row = self.connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def one(self, query: str, values: Sequence[Any] = ()) -> Any:
        """Return the first column of the first row."""
        row = self.connection.execute(query, values).fetchone()
        return None if row is None else row[0]

    def add_found(self, found: Iterable[Found]) -> int:
        """Enter what the walk found; what is known and unchanged keeps its verdict. Return the count."""
        count = 0
        transient = ", ".join(f"'{code}'" for code in TRANSIENT)
        keep = (
            f"(size = excluded.size AND mtime = excluded.mtime AND excluded.state = '' AND code NOT IN ({transient}))"
        )
        query = (
            "INSERT INTO files (source, path, size, mtime, run, state, code, detail, series, header, grouped) "
            f"VALUES (?, ?, ?, ?, {self.run}, ?, ?, ?, '', '', '') ON CONFLICT (source, path) DO UPDATE SET "
            + ", ".join(f"{name} = CASE WHEN {keep} THEN {name} ELSE excluded.{name} END" for name in _KEPT)
            + ", size = excluded.size, mtime = excluded.mtime, run = excluded.run"
        )
        for batch in batches(found, 2000):
            rows = [
                (f.source, f.path, f.size, f.mtime_ns, "refused" if f.code else "", f.code, f.detail) for f in batch
            ]
            self.connection.executemany(query, rows)
            count += len(rows)
            self.commit()
        return count

    def pages(self, query: str, size: int = 500) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query page by page; unlike with an open cursor the table may be written in between.

        Args:
            query: Has `:after` and `:size`; ordered by its first column, a number that grows from 0.
            size: Rows a page.
        """
        after = -1
        while rows := self.connection.execute(query, {"after": after, "size": size}).fetchall():
            yield from rows
            after = rows[-1][0]


_KEPT = ("state", "code", "detail", "series", "header", "grouped")


def open_readonly(path: Path) -> sqlite3.Connection:
    """Open the cache of a finished index for reading.

    Raises:
        DataError: If it is not there.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is missing: the index was copied without its private folder, and only that knows where the voxels "
            "are. Use the index where it was made, or run `medssl index` here."
        )
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn SQLite's words for a full or read-only disk into an error with its remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "full" in text:
            raise MedsslError(
                f"No space left on the disk of {folder}. What was read so far is kept; free some space and run the "
                "same command with --resume."
            ) from error
        if "readonly" in text or "unable to open" in text:
            raise MedsslError(
                f"{folder} cannot be written: {text}. Check permissions or choose another --out."
            ) from error
        raise MedsslError(f"The cache in {folder} cannot be used: {text}. Run again with --overwrite.") from error


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of at most `size` items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def compact(content: Any) -> str:
    """Return JSON without blanks, keys sorted."""
    return json.dumps(content, separators=(",", ":"), sort_keys=True)


def close_quietly(cache: Cache | None) -> None:
    """Close a cache on the way out of a failure."""
    if cache is not None:
        with contextlib.suppress(sqlite3.Error):
            cache.close()
