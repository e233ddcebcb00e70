"""`medssl index`: an archive becomes a manifest in which every file is accounted for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medssl.archive.cache import Cache, disk_errors
from medssl.archive.find import Found, resolve_sources, walk
from medssl.archive.manifest import write_manifest
from medssl.archive.private import KnownSource, cache_path, enter_sources, is_index, locked, make_private
from medssl.archive.pseudonym import Pseudonyms, open_key
from medssl.archive.settle import settle
from medssl.archive.stages import Stages
from medssl.archive.summary import IndexSummary
from medssl.errors import MedsslError, UsageError, unknown_name
from medssl.files import prepare_output_folder, remove_leftovers, write_bytes
from medssl.progress import progress

GEOMETRIES = ("strict", "repair")


def index(
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
    """Index an archive: every file ends in a volume, as a related object, or refused with a code.

    Incremental: with `resume`, only new and changed files are read (by path, size and time of change) and only new
    volumes decoded; files that are gone vanish. Originals are never modified.

    Args:
        sources: Folders of any depth, or single files.
        out: The INDEX to write; `OUT/private` must never be shared.
        geometry: `strict` refuses irregular slices and sheared grids; `repair` makes them regular and says so.
        workers: Processes; by default as many as the machine gives this one.
        key_file: Secret of the pseudonyms; see `medssl.archive.pseudonym`.
        resume: Continue or update the index in `out`.
        overwrite: Replace the index in `out`; its key stays.
        quiet: Show no progress.
        executor: Where to work instead of in local processes, for example Dask's `Client.get_executor()`. Its machines
            must see the sources under the same paths.

    Returns:
        What came of the files.

    Raises:
        UsageError: If a source or an option cannot be used.
        MedsslError: If the output cannot be written.
    """
    with opened(sources, out, geometry, key_file, resume=resume, overwrite=overwrite) as run:
        run.work(workers, executor, quiet)
        run.settle()
        return run.finish()


class Run:
    """An index that is being written.

    Args:
        out: INDEX.
        cache: Its cache.
        sources: Those of this run, in order.
        pseudonyms: Makes the keys.
        geometry: `strict` or `repair`.
    """

    def __init__(
        self, out: Path, cache: Cache, sources: list[KnownSource], pseudonyms: Pseudonyms, geometry: str
    ) -> None:
        self.out = out
        self.cache = cache
        self.sources = {entry.number: entry for entry in sources}
        self.pseudonyms = pseudonyms
        self.geometry = geometry
        self.stages: Stages | None = None

    def work(self, workers: int | None, executor: Executor | None, quiet: bool) -> Stages:
        """Find, read, plan, decode."""
        with progress("Finding files", None, quiet=quiet) as advance:
            count = self.cache.add_found(_counted(self.sources.values(), advance))
        if not count:
            raise UsageError(
                f"There is no file in {', '.join(str(entry.source.path) for entry in self.sources.values())}. "
                "Check the path."
            )
        number = workers or len(os.sched_getaffinity(0))
        self.stages = Stages(self.cache, self.sources, self.pseudonyms, self.geometry, number, executor, quiet)
        self.stages.read_headers()
        self.stages.plan()
        self.stages.decode()
        return self.stages

    def settle(self) -> None:
        """Give every file its last word."""
        settle(self.cache, self.sources, self.pseudonyms)

    def finish(self, **more: Any) -> IndexSummary:
        """Write the manifest and return the counts."""
        content = write_manifest(self.out, self.cache, self.sources, self.pseudonyms, self.geometry)
        names = ("files", "volumes", "files_in_volumes", "related", "refused", "flags")
        return IndexSummary(
            out=self.out,
            headers_read=self.stages.headers_read if self.stages else 0,
            volumes_decoded=self.stages.volumes_decoded if self.stages else 0,
            **{name: content[name] for name in names},
            **more,
        )


@contextmanager
def opened(
    sources: Sequence[Path], out: Path, geometry: str, key_file: Path | None, *, resume: bool, overwrite: bool
) -> Iterator[Run]:
    """Check the options and open the index for writing; a full disk becomes an error with its remedy.

    Raises:
        UsageError: If a source or an option cannot be used.
    """
    if geometry not in GEOMETRIES:
        raise unknown_name("geometry policy", geometry, GEOMETRIES)
    found = resolve_sources(sources, out)
    with _write_errors(out):
        _prepare(out, resume=resume, overwrite=overwrite)
        private = make_private(out)
        with locked(out), disk_errors(private):
            remove_leftovers(out)
            pseudonyms = open_key(private, key_file)
            cache = Cache(cache_path(out), geometry)
            try:
                _check_key(cache, pseudonyms, out)
                run = Run(out, cache, enter_sources(out, found), pseudonyms, geometry)
                try:
                    yield run
                finally:
                    if run.stages is not None:
                        run.stages.close()
            finally:
                cache.close()


def _prepare(out: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and out.is_dir() and any(out.iterdir()) and not is_index(out):
        raise UsageError(f"{out} is not an index: there is nothing to --resume. Choose another --out.")
    key = out / "private" / "key"
    # A new key would give each patient a new name and side of the split.
    kept = key.read_bytes() if overwrite and not resume and key.is_file() and is_index(out) else None
    prepare_output_folder(out, resume=resume, overwrite=overwrite, owned=_may_be_removed)
    if kept is not None:
        make_private(out)
        write_bytes(key, kept)
        key.chmod(0o600)


def _may_be_removed(out: Path) -> bool:
    if not is_index(out):
        return False
    # An index in use is refused here, before anything is removed.
    with locked(out):
        return True


def _check_key(cache: Cache, pseudonyms: Pseudonyms, out: Path) -> None:
    known = cache.meta("key")
    if known is not None and known != pseudonyms.fingerprint:
        raise UsageError(
            f"{out} was made with another key: its pseudonyms would not match. Give the same --key-file (or "
            "MEDSSL_KEY_FILE), or use --overwrite."
        )
    cache.connection.execute("INSERT OR REPLACE INTO meta VALUES ('key', ?)", (pseudonyms.fingerprint,))
    cache.commit()


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == 28:
            free = shutil.disk_usage(out if out.exists() else out.parent).free
            raise MedsslError(
                f"No space left on the disk of {out} ({free} bytes free). Nothing half-written was kept; free some "
                "space and run the same command with --resume."
            ) from error
        if error.errno in (1, 13, 30):
            raise MedsslError(f"{out} cannot be written: {error.strerror}. Choose another --out.") from error
        raise


def _counted(sources: Any, advance: Any) -> Iterator[Found]:
    all_sources = [entry.source for entry in sources]
    for entry in sources:
        for found in walk(entry.source, entry.number, all_sources):
            yield found
            advance()
