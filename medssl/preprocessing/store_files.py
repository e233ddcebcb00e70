"""The files of one volume in a store: how they are named, packed, written whole, and read back as facts."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError, MedsslError
from medssl.files import write_bytes
from medssl.preprocessing.codec import LOSSLESS, Encoding, encode

STORE_FILE = "store.json"
#: Settings of a store that is being written; what `--resume` compares.
UNFINISHED_FILE = "unfinished.json"
#: Volumes that could not be used, with their reason codes.
FAILED_FILE = "failed.json"
LABEL_SUFFIX = "_seg"
#: Kind of a store whose volumes share few files; see `packed`.
PACKED = "packed"
#: 1 had floats only; since 2 the facts of a volume name its codec.
SCHEMA_VERSION = 2
MAX_FOREGROUND = 512
#: Chunk and block edges. Decoding is by block, reading from disk by chunk: crops of 32 to 160 voxels touch few of both.
CHUNK, BLOCK = 64, 32
CHUNK_2D, BLOCK_2D = 512, 64
#: See `pipelines/benchmarks/results/store_reading.json` for the numbers behind these and the edges above.
COMPRESSOR, LEVEL, FILTER = blosc2.Codec.LZ4HC, 1, blosc2.Filter.NOFILTER
#: Columns of `store.json` that went into its hash and tell a reader nothing.
_HASHES = ("voxels_sha256", "facts_sha256")
_TABLE = ("modality", "patient_key", "split", "shape", "spacing_mm", "has_label", "voxels_sha256")
_SHARED = ("modality", "split", "patient_key", "shape", "spacing_mm")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class StoreEntry:
    """The facts of one volume.

    Attributes:
        id: Name of the volume in its store.
        number: Stable number of the volume: a function of its id only.
        shape: (C, Z, Y, X).
        spacing_mm: Voxel size (z, y, x).
        modality: DICOM's code, for example `CT` or `MR`.
        patient_key: Pseudonym of the patient.
        split: `train`, `validation` or `test`.
        background: Value of what lies outside the body, after normalisation; padding takes it. It went through the
            volume's codec, so that it equals what is read of voxels with that value.
        foreground: Voxels (z, y, x) drawn from the tissue with a fixed seed. Shape: (N, 3), N <= 512, int64.
        has_label: Whether there is a label.
        properties: Everything else that was written down, for example the original geometry.
    """

    id: str
    number: int
    shape: tuple[int, int, int, int]
    spacing_mm: tuple[float, float, float]
    modality: str
    patient_key: str
    split: str
    background: float
    foreground: NDArray[np.int64] = field(repr=False)
    has_label: bool
    properties: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def rescale(self) -> tuple[float, float]:
        """Intercept and slope from stored values to the unit of the modality (HU, SUVbw); NaN where not known.

        They are those of the first channel, and not known where another channel has others.
        """
        found = {(float(one["shift"]), float(one["scale"])) for one in self.properties.get("normalisation") or ()}
        return found.pop() if len(found) == 1 else (math.nan, math.nan)


def write_volume(
    out: Path,
    volume_id: str,
    array: NDArray[Any],
    properties: Mapping[str, Any],
    label: NDArray[Any] | None = None,
    codec: str = LOSSLESS,
) -> None:
    """Write one volume into a store's folder, its facts last; safe to call from several processes.

    Args:
        out: The store's folder.
        volume_id: Letters, digits, `.`, `_`, `+` and `-`.
        array: Normalised intensities. Shape: (C, Z, Y, X).
        properties: `spacing_mm` (z, y, x), `modality`, `patient_key`, `split`, `background`, `foreground`
            (N <= 512 rows z, y, x) and whatever else shall be kept; JSON-able.
        label: Classes, or None; always kept as they are. Shape: (Z, Y, X).
        codec: How the intensities are stored, a key of `codec.CODECS`.

    Raises:
        ValueError: If a shape, the id or a property does not fit.
        InputRefused: If the codec cannot hold a value.
    """
    if not can_name_a_volume(volume_id):
        raise ValueError(
            f"'{volume_id}' cannot name a volume: letters, digits and ._+- only, no {LABEL_SUFFIX} at the end"
        )
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"{volume_id}: a volume needs a non-empty (C, Z, Y, X) array, got {array.shape}")
    if label is not None and label.shape != array.shape[1:]:
        raise ValueError(f"{volume_id}: label has shape {label.shape}, the image {array.shape[1:]}")
    stored, encoding = encode(array, codec)
    digest = hashlib.sha256(stored.data)
    contents = {volume_id: compress(stored)}
    if label is not None:
        label = np.ascontiguousarray(label[None], dtype=np.int16)
        digest.update(label.data)
        contents[volume_id + LABEL_SUFFIX] = compress(label)
    facts = checked_facts(volume_id, properties, stored, encoding, label is not None, digest.hexdigest())
    facts["files"] = {stem: [len(content), zlib.crc32(content)] for stem, content in contents.items()}
    # Flushing each file would take longer than preprocessing a small volume: `StoreWriter.finish` flushes all, and what
    # a power cut took before that is found by its checksum.
    for stem, content in contents.items():
        write_bytes(out / f"{stem}.b2nd", content, durable=False)
    text = json.dumps(facts, indent=None, sort_keys=True, allow_nan=False)
    write_bytes(out / f"{volume_id}.json", text.encode(), durable=False)


def checked_facts(
    volume_id: str,
    properties: Mapping[str, Any],
    stored: NDArray[Any],
    encoding: Encoding,
    has_label: bool,
    voxels_sha256: str,
) -> dict[str, Any]:
    """Return what is written down of a volume; JSON-able.

    Raises:
        ValueError: If a property is missing or does not fit.
    """
    facts = {
        **properties,
        "schema_version": SCHEMA_VERSION,
        "shape": list(stored.shape),
        "dtype": stored.dtype.name,
        "codec": encoding.to_json(),
        "has_label": has_label,
        "voxels_sha256": voxels_sha256,
    }
    try:
        entry = entry_of(volume_id, facts)
    except KeyError as error:
        raise ValueError(f"{volume_id}: the property {error} is missing") from error
    if len(entry.foreground) > MAX_FOREGROUND:
        raise ValueError(f"{volume_id}: {len(entry.foreground)} foreground voxels, at most {MAX_FOREGROUND} are kept")
    facts["foreground"] = entry.foreground.tolist()
    facts["background"] = encoding.nearest(entry.background)
    return facts


def table_row(volume_id: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a volume in `store.json`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"id": volume_id, **{key: facts[key] for key in _TABLE}, "facts_sha256": digest}


def can_name_a_volume(volume_id: str) -> bool:
    """Tell whether a name is safe as a file's and means nothing else in a store."""
    reserved = f"{volume_id}.json" in (STORE_FILE, UNFINISHED_FILE, FAILED_FILE) or volume_id.endswith(LABEL_SUFFIX)
    return _SAFE_ID.fullmatch(volume_id) is not None and not reserved


def volume_is_complete(out: Path, volume_id: str, *, verify: bool = False) -> bool:
    """Tell whether the facts of a volume are there and its arrays are as the facts say.

    Args:
        out: The store's folder.
        volume_id: The volume.
        verify: Read the arrays and compare their checksums, not only their sizes.
    """
    try:
        files = read_json(out / f"{volume_id}.json")["files"]
        for stem, (size, checksum) in files.items():
            path = out / f"{stem}.b2nd"
            if path.stat().st_size != size or (verify and zlib.crc32(path.read_bytes()) != checksum):
                return False
    except (OSError, MedsslError, KeyError, AttributeError, TypeError, ValueError):
        return False
    return True


def number_of(volume_id: str) -> int:
    """Return the stable number of a volume: 63 bits of a hash of its id."""
    return int.from_bytes(hashlib.blake2b(volume_id.encode(), digest_size=8).digest(), "little") >> 1


def compress(array: NDArray[Any]) -> bytes:
    """Return an array as the content of a blosc2 file, cut so that a crop decodes little else."""
    flat = array.shape[1] == 1
    edges = [(CHUNK_2D if flat else CHUNK), (BLOCK_2D if flat else BLOCK)]
    chunks, blocks = ((1, *(min(edge, size) for size in array.shape[1:])) for edge in edges)
    parameters = blosc2.CParams(codec=COMPRESSOR, clevel=LEVEL, filters=[FILTER], typesize=array.itemsize, nthreads=1)
    packed = blosc2.asarray(array, chunks=chunks, blocks=blocks, cparams=parameters)
    return bytes(packed.to_cframe())


def entry_of(volume_id: str, facts: Mapping[str, Any]) -> StoreEntry:
    channels, depth, height, width = (int(size) for size in facts["shape"])
    z, y, x = (float(size) for size in facts["spacing_mm"])
    known = ("shape", "spacing_mm", "modality", "patient_key", "split", "background", "foreground", "has_label")
    return StoreEntry(
        id=volume_id,
        number=number_of(volume_id),
        shape=(channels, depth, height, width),
        spacing_mm=(z, y, x),
        modality=str(facts["modality"]),
        patient_key=str(facts["patient_key"]),
        split=str(facts["split"]),
        background=float(facts["background"]),
        foreground=np.asarray(facts["foreground"], dtype=np.int64).reshape(-1, 3),
        has_label=bool(facts["has_label"]),
        properties={key: value for key, value in facts.items() if key not in known},
    )


def read_table(path: Path) -> dict[str, Any]:
    """Return the content of `store.json` in half the memory: equal values become one object, hashes go.

    A reader process of a store of 100,000 volumes would otherwise hold 100 MB of it.

    Raises:
        DataError: If the file is damaged, or an id would name files outside the store.
    """
    shared: dict[Any, Any] = {}

    def shrunk(row: dict[str, Any]) -> dict[str, Any]:
        if "id" not in row:
            return row
        if not isinstance(row["id"], str) or Path(row["id"]).name != row["id"] or row["id"] in ("", ".."):
            raise DataError(
                f"{path} lists a volume whose id is no plain file name: it would be read outside the store. "
                "Get a fresh copy of the store from whom you trust, or preprocess again."
            )
        for column in _HASHES:
            row.pop(column, None)
        for column in _SHARED:
            if (value := row.get(column)) is not None:
                row[column] = shared.setdefault(tuple(value) if isinstance(value, list) else value, value)
        return row

    # The collector would look at all rows again and again while they grow in number: a third of the time.
    was_on = gc.isenabled()
    gc.disable()
    try:
        return read_json(path, shrunk)
    finally:
        if was_on:
            gc.enable()


def read_info(path: Path) -> dict[str, Any]:
    """Return what a store says of all its volumes, in the words of the newest schema."""
    info = read_json(path)
    if info.get("schema_version", 1) == 1 and info.get("dtype") == "float32":
        info.setdefault("codec", LOSSLESS)
    return info


def read_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a file's JSON object; `change` is called with each object in it and returns what takes its place."""
    try:
        content = json.loads(path.read_text(), object_hook=change)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Preprocess again with --overwrite.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold a JSON object. Preprocess again with --overwrite.")
    return content
