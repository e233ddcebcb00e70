"""Many small images in a few files: a store that is written at once, whole or not at all.

A file for each image, with another for its facts, costs more than preparing a small image does. Here all voxels lie in
`voxels.f32` one image after the other, the drawn tissue in `foreground.i32`, and the facts in `facts.jsonl`, a line
each; `store.json` says where each image begins. Neither compressed nor cut into blocks: for images that are read whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError, UsageError
from medssl.files import write_json
from medssl.preprocessing.codec import LOSSLESS, encode
from medssl.preprocessing.store import Store
from medssl.preprocessing.store_files import (
    MAX_FOREGROUND,
    PACKED,
    STORE_FILE,
    StoreEntry,
    can_name_a_volume,
    checked_facts,
    entry_of,
    table_row,
)

SCHEMA_VERSION = 1
VOXELS, FOREGROUND, FACTS = "voxels.f32", "foreground.i32", "facts.jsonl"
#: Up to so many bytes an image is small: beyond, its files cost less than what is done to it.
SMALL = 2**20


class PackedStore(Store):
    """Reads what `PackedWriter` wrote; its images have no labels of voxels."""

    @staticmethod
    def of_folder(folder: Path, info: dict[str, Any]) -> PackedStore:
        """Open a folder.

        Args:
            folder: The store.
            info: Its `store.json`.

        Raises:
            DataError: If it is of a newer kind, a file is not as long as it was, or a place of an image cannot be its.
        """
        if info.get("schema_version", 0) > SCHEMA_VERSION:
            raise DataError(
                f"{folder / STORE_FILE} is a packed store of schema {info['schema_version']}; this medssl reads up to "
                f"{SCHEMA_VERSION}. Install the medssl that wrote it, or prepare the images again."
            )
        files = info.get("files")
        if not isinstance(files, dict) or set(files) != {VOXELS, FOREGROUND, FACTS}:
            raise _damaged(folder, f'"files" must name {VOXELS}, {FOREGROUND} and {FACTS}')
        for name, size in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise DataError(f"{path} is missing or not {size} bytes long. Remove {folder} to have it made again.")
        _check_places(folder, info)
        return PackedStore(folder, info)

    def _read_entry(self, volume_id: str) -> StoreEntry:
        row = self._facts[volume_id]
        start, length = row["line"]
        first, count = row["tissue"]
        tissue = self._mapped(FOREGROUND, np.dtype("<i4"))[3 * first : 3 * (first + count)]
        try:
            facts = json.loads(self._mapped(FACTS, np.dtype(np.uint8))[start : start + length].tobytes())
            strange = [name for name in ("shape", "patient_key", "modality") if facts[name] != row[name]]
            if strange:
                raise ValueError(f"the {' and '.join(strange)} of {volume_id} differ from those in {STORE_FILE}")
            return entry_of(volume_id, {**facts, "foreground": tissue.reshape(-1, 3)})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.folder / FACTS} is damaged ({error}). Remove {self.folder} to have it made again."
            ) from error

    def _array(self, stem: str) -> Any:
        self._require(stem)
        row = self._facts[stem]
        voxels = self._mapped(VOXELS, np.dtype("<f4"))
        return voxels[row["first"] : row["first"] + math.prod(row["shape"])].reshape(row["shape"])

    def _decode(self, volume_id: str, array: Any, index: tuple[Any, ...]) -> NDArray[Any]:
        # A copy: what is read may be changed, the file may not.
        return np.array(array[index], dtype=np.float32)

    def _mapped(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if name not in self._open_arrays:
            path = self.folder / name
            # An empty file cannot be mapped.
            empty = path.stat().st_size == 0
            self._open_arrays[name] = np.empty(0, dtype) if empty else np.memmap(path, dtype, mode="r")
        found: NDArray[Any] = self._open_arrays[name]
        return found


def _check_places(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a table that does not give each part of each file to one image, in one order for all files.

    Raises:
        DataError: Naming what is wrong.
    """
    rows, sizes = info.get("volumes"), info["files"]
    named = ("id", "modality", "patient_key", "split", "has_label", "first")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(key in row for key in named) for row in rows
    ):
        raise _damaged(folder, f'"volumes" must be a list of rows with {", ".join(named)}, shape, tissue and line')
    if len({str(row["id"]) for row in rows}) != len(rows):
        raise _damaged(folder, "an id stands there twice")
    shapes = _whole_numbers(folder, rows, "shape", 4)
    # In floats first: as whole numbers a product that is too large may turn out as one that fits.
    if (shapes < 1).any() or (shapes.prod(axis=1, dtype=np.float64) > sizes[VOXELS]).any():
        raise _damaged(folder, f"a shape is not that of an image in {VOXELS}: it has 4 numbers, each 1 or more")
    first = _whole_numbers(folder, rows, "first", 1)
    spans = {
        VOXELS: (4, np.concatenate([first, shapes.prod(axis=1, keepdims=True)], axis=1)),
        FOREGROUND: (12, _whole_numbers(folder, rows, "tissue", 2)),
        FACTS: (1, _whole_numbers(folder, rows, "line", 2)),
    }
    order = np.argsort(first[:, 0], kind="stable")
    for name, (unit, span) in spans.items():
        start, length = span[order].T
        if (length < 0).any() or (length > sizes[name]).any():
            raise _damaged(folder, f"an image has less than nothing or more than all of {name}")
        stop = np.cumsum(length)
        wrong = np.flatnonzero(start != stop - length)
        if len(wrong):
            volume_id = rows[order[wrong[0]]]["id"]
            raise _damaged(folder, f"{volume_id} does not begin in {name} where the image before it ends")
        if unit * int(length.sum()) != sizes[name]:
            raise _damaged(
                folder, f"the images take {unit * int(length.sum())} bytes of {name}, which has {sizes[name]}"
            )


def _whole_numbers(folder: Path, rows: list[dict[str, Any]], column: str, width: int) -> NDArray[np.int64]:
    """Return a column of whole numbers. Shape: (rows, width)."""
    try:
        found = np.array([row[column] for row in rows] or np.empty((0, width), np.int64))
    except (KeyError, ValueError, OverflowError):
        found = np.empty(0)
    if found.dtype != np.int64 or found.shape not in ((len(rows), width), (len(rows),) if width == 1 else ()):
        raise _damaged(folder, f"not every image has {width} whole number{'s' * (width > 1)} as {column}")
    return found.reshape(len(rows), width)


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"{folder / STORE_FILE} is damaged: {what}. Remove {folder} to have it made again.")


class PackedWriter:
    """Writes a packed store beside its place and moves it there when it is whole.

    Use it as a context: what an error or a signal cut short is removed, what a kill left is removed by the next writer
    in the folder. Only one process may write in a folder at a time.

    Args:
        out: The store; must not exist.
        info: What holds for all images; JSON-able.
    """

    def __init__(self, out: Path, info: Mapping[str, Any]) -> None:
        self.out, self.info = out, json.loads(json.dumps(dict(info), allow_nan=False))
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{PACKED}-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._folder = out.with_name(f".{PACKED}-{uuid.uuid4().hex}")
        self._folder.mkdir()
        self._files = {name: (self._folder / name).open("wb") for name in (VOXELS, FOREGROUND, FACTS)}
        self._rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._voxels = self._tissue = 0

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._files.values():
            handle.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, volume_id: str, array: NDArray[Any], properties: Mapping[str, Any]) -> None:
        """Write one image.

        Args:
            volume_id: Its name, as for `store_files.write_volume`.
            array: Shape: (C, Z, Y, X).
            properties: As for `store_files.write_volume`.

        Raises:
            ValueError: If the name is taken or cannot name a volume, or a shape or property does not fit.
        """
        if volume_id in self._rows or not can_name_a_volume(volume_id):
            raise ValueError(f"'{volume_id}' cannot name an image here: it is taken, or has unsafe letters")
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(f"{volume_id}: an image needs a non-empty (C, Z, Y, X) array, got {array.shape}")
        stored, encoding = encode(array, LOSSLESS)
        tissue = np.asarray(properties["foreground"], "<i4").reshape(-1, 3)
        if len(tissue) > MAX_FOREGROUND:
            raise ValueError(f"{volume_id}: {len(tissue)} foreground voxels, at most {MAX_FOREGROUND} are kept")
        # The tissue is most of what is written down: as text it would take longer than everything else.
        digest = hashlib.sha256(stored.data)
        digest.update(tissue.tobytes())
        facts = checked_facts(volume_id, {**properties, "foreground": []}, stored, encoding, False, digest.hexdigest())
        row = table_row(volume_id, facts)
        del facts["foreground"]
        line = json.dumps(facts, sort_keys=True, allow_nan=False).encode() + b"\n"
        places = {"first": self._voxels, "tissue": [self._tissue, len(tissue)]}
        self._rows[volume_id] = row, {**places, "line": [self._files[FACTS].tell(), len(line)]}
        self._files[VOXELS].write(np.ascontiguousarray(stored, "<f4").data)
        self._files[FOREGROUND].write(tissue.tobytes())
        self._files[FACTS].write(line)
        self._voxels, self._tissue = self._voxels + stored.size, self._tissue + len(tissue)

    def finish(self) -> Store:
        """Flush everything to disk, move the store to its place, and return it.

        Raises:
            UsageError: If there is something in its place that is no store.
        """
        rows = [self._rows[name] for name in sorted(self._rows)]
        # Not over the places in the files: the same images have the same hash, in whatever order they were added.
        digest = hashlib.sha256(json.dumps([row for row, _ in rows], sort_keys=True).encode()).hexdigest()
        for handle in self._files.values():
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        content = {
            "kind": PACKED,
            "schema_version": SCHEMA_VERSION,
            **self.info,
            "files": {name: (self._folder / name).stat().st_size for name in self._files},
            "volumes": [{**row, **places} for row, places in rows],
            "hash": digest,
        }
        write_json(self._folder / STORE_FILE, content)
        if self.out.exists():
            raise UsageError(f"{self.out} exists and is not a store that was finished: remove it.")
        self._folder.replace(self.out)
        return Store.open(self.out)
