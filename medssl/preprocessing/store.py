"""The volume store: normalised volumes that crops are read from without decoding the rest.

A store is a folder: `<volume_id>.b2nd` (blosc2, (C, Z, Y, X)), `<volume_id>_seg.b2nd` where there is a label,
`<volume_id>.json` with the facts of the volume, and `store.json` with what holds for all. Intensities are floats, or
integers that the facts turn into intensities (see `codec`). nnU-Net's preprocessed
folders have the same arrays and open as a store too. Needs numpy and blosc2 only, so that a bare GPU machine reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError, UsageError
from medssl.files import remove_leftovers, write_json
from medssl.preprocessing.codec import LOSSLESS, Encoding
from medssl.preprocessing.store_files import (
    LABEL_SUFFIX,
    MAX_FOREGROUND,
    PACKED,
    SCHEMA_VERSION,
    STORE_FILE,
    UNFINISHED_FILE,
    StoreEntry,
    entry_of,
    number_of,
    read_info,
    read_json,
    read_table,
    table_row,
    volume_is_complete,
    write_volume,
)
from medssl.preprocessing.tissue import sample_above

__all__ = ["Store", "StoreEntry", "StoreWriter", "number_of", "write_volume"]

#: Files that one reading process keeps open.
MAX_OPEN = 64
#: Volumes whose facts one reading process keeps, 19 KB each: those of 100,000 volumes would fill 2 GB. Reading them
#: again takes a fifth of a millisecond.
MAX_ENTRIES = 512


class Store:
    """Reads a folder of volumes; picklable, so that each reading process opens its own files."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        """Use `Store.open`."""
        self.folder = folder
        self.info = info
        self._facts: dict[str, dict[str, Any]] = {row["id"]: row for row in info["volumes"]}
        self.ids: list[str] = sorted(self._facts)
        self._entries: OrderedDict[str, StoreEntry] = OrderedDict()
        self._open_arrays: OrderedDict[str, Any] = OrderedDict()
        self._label_voxels: dict[str, NDArray[Any]] = {}

    @staticmethod
    def open(path: Path | str) -> Store:
        """Open a medssl store or an nnU-Net preprocessed configuration folder.

        Raises:
            UsageError: If the folder is neither, or is a store that was not finished.
            DataError: If `store.json` is damaged.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; --store needs a store. `medssl preprocess` makes one.")
        if (folder / STORE_FILE).is_file():
            info = read_table(folder / STORE_FILE)
            if info.get("kind") == PACKED:
                from medssl.preprocessing.packed import PackedStore

                return PackedStore.of_folder(folder, info)
            if info.get("kind") != "store" or info.get("schema_version", 0) > SCHEMA_VERSION:
                raise DataError(
                    f"{folder / STORE_FILE} is of schema {info.get('schema_version')}; this medssl reads up to "
                    f"{SCHEMA_VERSION}. Install the medssl that wrote it, or preprocess again."
                )
            return Store(folder, info)
        if (folder / UNFINISHED_FILE).is_file():
            raise UsageError(f"{folder} is a store that was not finished: run the same `medssl preprocess` --resume.")
        from medssl.preprocessing.nnunet_folder import NnunetStore, is_nnunet_folder

        if is_nnunet_folder(folder):
            return NnunetStore.of_folder(folder)
        raise UsageError(
            f"{folder} is no store: it has neither {STORE_FILE} nor nnU-Net's .b2nd files. "
            "`medssl preprocess` makes a store."
        )

    def __len__(self) -> int:
        return len(self.ids)

    def with_splits(self, splits: Mapping[str, str]) -> Store:
        """Return the same store with other splits of some volumes, for one that names none; nothing is written."""
        rows = [{**row, "split": splits.get(row["id"], row["split"])} for row in self._facts.values()]
        return type(self)(self.folder, {**self.info, "volumes": rows})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_arrays": OrderedDict(), "_entries": OrderedDict()}

    @property
    def hash(self) -> str:
        """Hash of all voxels, labels and facts; the same data preprocessed the same way has the same hash."""
        return str(self.info["hash"])

    def ids_of(self, split: str) -> list[str]:
        """Return the sorted ids of one split, or of all with `all`, without reading the facts of each volume."""
        return [name for name in self.ids if split in ("all", self._facts[name]["split"])]

    @property
    def modalities(self) -> set[str]:
        """The modalities of its volumes."""
        return {str(row["modality"]) for row in self._facts.values()}

    def row(self, volume_id: str) -> Mapping[str, Any]:
        """Return the line of a volume in the table of all: `shape`, `modality`, `patient_key`, `split`, `has_label`.

        Unlike `entry` it reads no file.

        Raises:
            UsageError: If there is none of that id.
        """
        self._require(volume_id)
        return self._facts[volume_id]

    def entry(self, volume_id: str) -> StoreEntry:
        """Return the facts of a volume.

        Raises:
            UsageError: If there is none of that id.
            DataError: If its file of facts is damaged.
        """
        if volume_id in self._entries:
            self._entries.move_to_end(volume_id)
            return self._entries[volume_id]
        self._require(volume_id)
        entry = self._entries[volume_id] = self._read_entry(volume_id)
        if len(self._entries) > MAX_ENTRIES:
            self._entries.popitem(last=False)
        return entry

    def read(
        self, volume_id: str, start: Sequence[int], stop: Sequence[int], channels: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Return a crop; only the blocks it touches are decoded.

        Args:
            volume_id: One of `ids`.
            start: First voxel (z, y, x).
            stop: Voxel behind the last (z, y, x).
            channels: Which channels; all by default.

        Returns:
            Normalised intensities. Shape: (C, z, y, x), float32.

        Raises:
            ValueError: If the crop does not lie inside the volume: padding is the caller's.
        """
        array = self._array(volume_id)
        box = self._box(volume_id, array.shape[1:], start, stop)
        if channels is None:
            crop = self._decode(volume_id, array, (slice(None), *box))
        else:
            crop = np.stack([self._decode(volume_id, array, (channel, *box)) for channel in channels])
        if crop.dtype.kind == "f":
            return crop.astype(np.float32, copy=False)
        return self._encoding(volume_id).decode(crop, channels)

    def read_label(self, volume_id: str, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.int16] | None:
        """Return the label of a crop, or None where the volume has none. Shape: (z, y, x), int16."""
        if not self.has_label(volume_id):
            return None
        array = self._array(volume_id + LABEL_SUFFIX)
        box = self._box(volume_id, array.shape[1:], start, stop)
        return self._clean_label(self._decode(volume_id, array, (0, *box)).astype(np.int16, copy=False))

    def has_label(self, volume_id: str) -> bool:
        """Tell whether a volume has a label."""
        return bool(self.row(volume_id)["has_label"])

    def label_voxels(self, volume_id: str) -> NDArray[np.int64]:
        """Return voxels (z, y, x) of the label's classes above 0, about equally many of each, drawn with a fixed seed.

        Reads the whole label the first time.

        Returns:
            Shape: (N, 3). Empty without label or where all of it is background.
        """
        if volume_id not in self._label_voxels:
            stop = self.row(volume_id)["shape"][1:]
            label = self.read_label(volume_id, (0, 0, 0), stop)
            classes = [] if label is None else [number for number in np.unique(label).tolist() if number > 0]
            each = MAX_FOREGROUND // max(len(classes), 1)
            found = [sample_above(label == number, 0.5, each, f"{volume_id}/{number}") for number in classes]
            voxels = np.concatenate(found) if found else np.empty((0, 3), dtype=np.int64)
            self._label_voxels[volume_id] = voxels.astype(np.min_scalar_type(max(stop)))
        return self._label_voxels[volume_id].astype(np.int64)

    def _read_entry(self, volume_id: str) -> StoreEntry:
        facts = read_json(self.folder / f"{volume_id}.json")
        try:
            return entry_of(volume_id, facts)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(volume_id, error) from error

    def _encoding(self, volume_id: str) -> Encoding:
        """Return what turns the integers of a volume into intensities."""
        try:
            encoding = Encoding.of_facts(self.entry(volume_id).properties)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(volume_id, error) from error
        if not encoding.step:
            raise self._damaged(volume_id, "the array holds integers and no codec is named")
        return encoding

    def _damaged(self, volume_id: str, what: object) -> DataError:
        return DataError(f"{self.folder / volume_id}.json is damaged ({what}). Preprocess again with --overwrite.")

    def _clean_label(self, label: NDArray[np.int16]) -> NDArray[np.int16]:
        return label

    def _array(self, stem: str) -> Any:
        if stem in self._open_arrays:
            self._open_arrays.move_to_end(stem)
            return self._open_arrays[stem]
        volume_id = stem.removesuffix(LABEL_SUFFIX) if stem not in self._facts else stem
        self._require(volume_id)
        path = self.folder / f"{stem}.b2nd"
        try:
            array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} cannot be opened ({error}). Copy the store again, or preprocess it again with --overwrite."
            ) from error
        self._open_arrays[stem] = array
        if len(self._open_arrays) > MAX_OPEN:
            self._open_arrays.popitem(last=False)
        return array

    def _decode(self, volume_id: str, array: Any, index: tuple[Any, ...]) -> NDArray[Any]:
        try:
            return np.asarray(array[index])
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"{volume_id} in {self.folder} cannot be decoded ({error}). Copy the store again or preprocess again."
            ) from error

    def _box(
        self, volume_id: str, shape: Sequence[int], start: Sequence[int], stop: Sequence[int]
    ) -> tuple[slice, slice, slice]:
        if any(not 0 <= a < b <= size for a, b, size in zip(start, stop, shape, strict=True)):
            raise ValueError(
                f"{volume_id}: crop {tuple(start)} to {tuple(stop)} is not inside a volume of {tuple(shape)}"
            )
        z, y, x = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        return z, y, x

    def _require(self, volume_id: str) -> None:
        if volume_id not in self._facts:
            raise UsageError(
                f"{self.folder} has no volume '{volume_id}'; it has {len(self.ids)}, see its {STORE_FILE}."
            )


class StoreWriter:
    """Writes a store volume by volume; a volume counts as there when its facts are, and they are written last."""

    def __init__(self, out: Path, info: Mapping[str, Any], resume: bool = False) -> None:
        """Start a store, or continue one that was begun with the same `info`.

        Args:
            out: Folder; created where it is missing.
            info: What holds for all volumes (spacing, normalisation, fingerprint, provenance); JSON-able.
            resume: Keep the volumes that are complete.

        Raises:
            UsageError: If `resume` meets a store that was begun with another `info`.
        """
        self.out = Path(out)
        self.info = json.loads(json.dumps(dict(info), allow_nan=False))
        self.out.mkdir(parents=True, exist_ok=True)
        # A finished store was flushed to disk; one that was cut off may have lost what its sizes do not show.
        self._verify = not (self.out / STORE_FILE).is_file()
        for name in (STORE_FILE, UNFINISHED_FILE):
            path = self.out / name
            if resume and path.is_file():
                before = read_info(path)
                differing = sorted(key for key in self.info if before.get(key) != self.info[key])
                if differing:
                    raise UsageError(
                        f"{self.out} was begun with other settings ({', '.join(differing)}). "
                        "Use --overwrite, or another --out."
                    )
        remove_leftovers(self.out)
        write_json(self.out / UNFINISHED_FILE, self.info)
        # A finished store that is continued counts as unfinished until finish() has run again.
        (self.out / STORE_FILE).unlink(missing_ok=True)

    def complete(self, volume_id: str) -> bool:
        """Tell whether a volume was written whole; its checksum is compared if the store was not finished."""
        return volume_is_complete(self.out, volume_id, verify=self._verify)

    def add(
        self,
        volume_id: str,
        array: NDArray[Any],
        properties: Mapping[str, Any],
        label: NDArray[Any] | None = None,
        codec: str = LOSSLESS,
    ) -> None:
        """Write one volume whole or not at all; see `write_volume`."""
        write_volume(self.out, volume_id, array, properties, label, codec)

    def finish(self) -> Store:
        """Write `store.json` over all complete volumes and return the store."""
        rows = []
        largest, squares, voxels = 0.0, 0.0, 0
        for path in sorted(self.out.glob("*.json")):
            if path.name in (STORE_FILE, UNFINISHED_FILE) or not volume_is_complete(self.out, path.stem):
                continue
            facts = read_json(path)
            rows.append(table_row(path.stem, facts))
            encoding, size = Encoding.of_facts(facts), math.prod(facts["shape"])
            largest = max(largest, encoding.largest_error)
            squares, voxels = squares + encoding.rms_error**2 * size, voxels + size
        rows.sort(key=lambda row: row["id"])
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        # A process that closes a handle of the lock it holds loses it; hidden names are no part of the store.
        for path in self.out.glob("[!.]*"):
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        content = {
            "kind": "store",
            "schema_version": SCHEMA_VERSION,
            **self.info,
            "codec_error": {"largest": largest, "rms": math.sqrt(squares / max(voxels, 1))},
            "volumes": rows,
            "hash": digest,
        }
        write_json(self.out / STORE_FILE, content)
        (self.out / UNFINISHED_FILE).unlink(missing_ok=True)
        return Store.open(self.out)
