"""`INDEX/private/`: where the sources are, the key, the cache. Readable by its owner only, and never to be shared."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medssl.archive.find import Source
from medssl.errors import DataError, UsageError
from medssl.files import write_json, write_text

_README = """This folder must never be shared: it holds the key of the pseudonyms, paths and DICOM identifiers.
Without it the index can be read and filtered, but no voxels can be loaded and it cannot be continued.
"""


@dataclass(frozen=True)
class KnownSource:
    """A source with the number and name it keeps for the life of the index.

    Attributes:
        number: Value of the manifest's column `source`.
        label: Name that makes files of two data sets differ; the folder's own name where that is enough.
        source: Where it is.
    """

    number: int
    label: str
    source: Source


def private_folder(index: Path) -> Path:
    """Return the private folder of an index."""
    return index / "private"


def cache_path(index: Path) -> Path:
    """Return the cache of an index."""
    return private_folder(index) / "cache.sqlite"


def make_private(index: Path) -> Path:
    """Create the private folder."""
    folder = private_folder(index)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not (folder / "README").exists():
        write_text(folder / "README", _README)
    return folder


def is_index(folder: Path) -> bool:
    """Tell whether a folder was written by `medssl index` or `medssl convert`."""
    private = private_folder(folder)
    if (folder / "index.json").is_file() or any(
        (private / name).is_file() for name in ("README", "key", "cache.sqlite")
    ):
        return True
    # Killed before the first file was whole: nothing is there but a private folder with temporary names.
    return (
        folder.is_dir()
        and private.is_dir()
        and [entry.name for entry in folder.iterdir()] == [private.name]
        and all(entry.name.startswith(".") for entry in private.iterdir())
    )


def read_sources(index: Path) -> dict[int, KnownSource]:
    """Return the sources that an index knows, by number.

    Raises:
        DataError: If the list is damaged.
    """
    path = private_folder(index) / "sources.json"
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {
            entry["number"]: KnownSource(entry["number"], entry["label"], Source(Path(entry["root"]), entry["only"]))
            for entry in entries
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged. Run `medssl index` again with --overwrite.") from error


def enter_sources(index: Path, sources: Sequence[Source]) -> list[KnownSource]:
    """Give each source its number and label; those of an earlier run keep theirs."""
    known = read_sources(index)
    by_path = {entry.source.path: entry for entry in known.values()}
    result = []
    for source in sources:
        entry = by_path.get(source.path)
        if entry is None:
            labels = {other.label for other in known.values()}
            entry = KnownSource(max(known, default=-1) + 1, _label(source, labels), source)
            known[entry.number] = entry
        result.append(entry)
    write_json(
        private_folder(index) / "sources.json",
        [
            {"number": entry.number, "label": entry.label, "root": str(entry.source.root), "only": entry.source.only}
            for _, entry in sorted(known.items())
        ],
    )
    return result


@contextmanager
def locked(index: Path) -> Iterator[None]:
    """Keep a second run off the index.

    Raises:
        UsageError: If another process writes it.
    """
    with (private_folder(index) / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"Another process writes {index}: wait until it has ended, or choose another --out."
            ) from error
        yield


def _label(source: Source, taken: set[str]) -> str:
    # Text of a path may hold bytes that are not UTF-8; the label only has to be the same each time.
    parts = [os.fsencode(part).decode("utf-8", "backslashreplace") for part in source.root.parts]
    for count in range(1, len(parts) + 1):
        label = "/".join(parts[-count:])
        if label not in taken:
            return label
    return f"{'/'.join(parts)}#{len(taken)}"
