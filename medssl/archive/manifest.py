"""The manifest: three Parquet tables and `index.json`. The same input gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl import __version__
from medssl.archive.cache import Cache, batches, compact
from medssl.archive.private import KnownSource
from medssl.archive.pseudonym import Pseudonyms
from medssl.archive.settle import keys_of_header, person_conflicts, references_of_header
from medssl.archive.tasks import PERCENTILES
from medssl.files import atomic_path, sha256_of, write_json

if TYPE_CHECKING:
    import pyarrow

SCHEMA_VERSION = 1
TABLES = ("volumes", "refused", "related")
# A volume carries hundreds of paths: few at once keep the memory flat.
_ROWS_AT_ONCE = {"volumes": 512, "refused": 8192, "related": 8192}


def table_schema(name: str) -> pyarrow.Schema:
    """Return the columns of a table of the manifest."""
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    columns: dict[str, list[tuple[str, Any]]] = {
        "volumes": [
            ("volume_id", text),
            ("patient_key", text),
            ("study_key", text),
            ("series_key", text),
            ("source", pa.int32()),
            ("relative_paths", texts),
            ("modality", text),
            ("body_part", text),
            ("shape", pa.list_(pa.int32())),
            ("spacing_mm", pa.list_(pa.float64())),
            ("orientation", text),
            ("dtype", text),
            ("frames", pa.int32()),
            ("channels", text),
            *((column, pa.float64()) for column in PERCENTILES),
            ("flags", texts),
            ("geometry", text),
            ("split", text),
            ("content_hash", text),
        ],
        "refused": [
            ("source", pa.int32()),
            ("relative_path", text),
            ("series_key", text),
            ("code", text),
            ("detail", text),
        ],
        "related": [
            ("source", pa.int32()),
            ("relative_path", text),
            ("kind", text),
            ("patient_key", text),
            ("study_key", text),
            ("series_key", text),
            # Of a segmentation or structure set: what it was drawn on, as far as this index has it.
            ("referenced_series_keys", texts),
            ("volume_ids", texts),
        ],
    }
    return pa.schema(columns[name])


def write_manifest(
    out: Path, cache: Cache, sources: dict[int, KnownSource], pseudonyms: Pseudonyms, geometry: str
) -> dict[str, Any]:
    """Write the tables and `index.json`; return what the latter says.

    All tables are written before the first takes its name; `index.json`, with their hashes, comes last.

    Args:
        out: INDEX.
        cache: After `settle`.
        sources: By number.
        pseudonyms: Makes the keys.
        geometry: `strict` or `repair`.
    """
    rows = {
        "volumes": _volumes(cache, pseudonyms),
        "refused": _refused(cache, sources, pseudonyms),
        "related": _related(cache, sources, pseudonyms),
    }
    with ExitStack() as files:
        for name in TABLES:
            _write(files.enter_context(atomic_path(out / f"{name}.parquet")), name, rows[name])
    hashes = {f"{name}.parquet": sha256_of(out / f"{name}.parquet") for name in TABLES}
    content = {
        "schema_version": SCHEMA_VERSION,
        "tool": f"medssl {__version__}",
        "geometry": geometry,
        "key": pseudonyms.fingerprint,
        **counts(cache),
        "sha256": hashes,
        "hash": _hash(hashes),
    }
    write_json(out / "index.json", content)
    return content


def counts(cache: Cache) -> dict[str, Any]:
    """Return what came of the files, after `settle`."""
    execute = cache.connection.execute

    def by_name(query: str) -> dict[str, int]:
        return {str(name): int(count) for name, count in execute(query)}

    flags: dict[str, int] = {}
    for row in _volume_flags(cache):
        for flag in row:
            flags[flag] = flags.get(flag, 0) + 1
    return {
        "files": int(cache.one("SELECT COUNT(*) FROM files")),
        "files_in_volumes": int(cache.one("SELECT COUNT(*) FROM used")),
        "volumes": int(cache.one("SELECT COUNT(*) FROM volumes WHERE status = 'ok'")),
        "related": by_name("SELECT kind, COUNT(*) FROM related GROUP BY kind ORDER BY kind"),
        # A file that gives planes to a volume and others to none counts as used.
        "refused": by_name(
            "SELECT code, COUNT(*) FROM (SELECT file, MIN(code) AS code FROM refused "
            "WHERE file NOT IN (SELECT file FROM used) GROUP BY file) GROUP BY code ORDER BY code"
        ),
        "flags": dict(sorted(flags.items())),
    }


def _write(path: Path, name: str, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = table_schema(name)
    with pq.ParquetWriter(path, schema, compression="zstd", version="2.6", store_schema=False) as writer:
        for batch in batches(rows, _ROWS_AT_ONCE[name]):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _volumes(cache: Cache, pseudonyms: Pseudonyms) -> Iterator[dict[str, Any]]:
    conflicts, copies = person_conflicts(cache), _shared_content(cache)
    paths = (
        "SELECT f.path FROM members m JOIN files f ON f.id = m.file WHERE m.fingerprint = ? "
        "AND f.state IN ('dicom', 'image') ORDER BY m.position"
    )
    query = (
        "SELECT final_id, fingerprint, source, patient_key, study_key, series_key, facts, final_flags, measured "
        "FROM volumes WHERE status = 'ok' ORDER BY final_id"
    )
    for final_id, fingerprint, source, patient, study, series, facts, final_flags, measured in _stream(cache, query):
        values = json.loads(measured)
        flags = {*values["flags"], *json.loads(facts), *json.loads(final_flags)}
        flags |= {"patient_conflict"} if patient in conflicts else set()
        flags |= {"duplicate_voxels"} if values["content_hash"] in copies else set()
        yield {
            **values,
            "volume_id": final_id,
            "patient_key": patient,
            "study_key": study,
            "series_key": series,
            "source": source,
            "relative_paths": [path for (path,) in cache.connection.execute(paths, (fingerprint,))],
            "frames": values["shape"][0] if values["channels"] == "frames" else 1,
            "flags": sorted(flags),
            "split": pseudonyms.split(patient),
        }


def _volume_flags(cache: Cache) -> Iterator[set[str]]:
    conflicts, copies = person_conflicts(cache), _shared_content(cache)
    query = "SELECT patient_key, facts, final_flags, measured FROM volumes WHERE status = 'ok'"
    for patient, facts, final_flags, measured in _stream(cache, query):
        values = json.loads(measured)
        yield {
            *values["flags"],
            *json.loads(facts),
            *json.loads(final_flags),
            *(("patient_conflict",) if patient in conflicts else ()),
            *(("duplicate_voxels",) if values["content_hash"] in copies else ()),
        }


def _shared_content(cache: Cache) -> set[str]:
    query = (
        "SELECT json_extract(measured, '$.content_hash') AS content FROM volumes WHERE status = 'ok' "
        "GROUP BY content HAVING COUNT(*) > 1"
    )
    return {content for (content,) in cache.connection.execute(query)}


def _refused(cache: Cache, sources: dict[int, KnownSource], pseudonyms: Pseudonyms) -> Iterator[dict[str, Any]]:
    query = (
        "SELECT r.source, r.path, r.code, r.detail, f.header FROM refused r JOIN files f ON f.id = r.file "
        "ORDER BY r.source, r.path, r.code, r.detail"
    )
    for source, path, code, detail, header in _stream(cache, query):
        keys = keys_of_header(pseudonyms, sources, source, header or "")
        yield {"source": source, "relative_path": path, "series_key": keys.series, "code": code, "detail": detail}


def _related(cache: Cache, sources: dict[int, KnownSource], pseudonyms: Pseudonyms) -> Iterator[dict[str, Any]]:
    query = (
        "SELECT r.source, r.path, r.kind, f.header FROM related r JOIN files f ON f.id = r.file "
        "ORDER BY r.source, r.path, r.kind"
    )
    volumes = _volumes_of_series(cache)
    for source, path, kind, header in _stream(cache, query):
        keys = keys_of_header(pseudonyms, sources, source, header or "")
        drawn_on = [pair for uid in references_of_header(header or "") for pair in volumes.get(uid, ())]
        yield {
            "source": source,
            "relative_path": path,
            "kind": kind,
            "patient_key": keys.patient,
            "study_key": keys.study,
            "series_key": keys.series,
            "referenced_series_keys": sorted({key for key, _ in drawn_on}),
            "volume_ids": sorted({volume for _, volume in drawn_on}),
        }


def _volumes_of_series(cache: Cache) -> dict[str, list[tuple[str, str]]]:
    """Return series key and volume id by series UID, if there is an object that could refer to one."""
    kinds = "('segmentation', 'structure_set')"
    if not cache.one(f"SELECT COUNT(*) FROM related WHERE kind IN {kinds}"):
        return {}
    # A series with a UID is stored as "STUDY|SERIES".
    query = (
        "SELECT substr(series, instr(series, '|') + 1), series_key, final_id FROM volumes "
        "WHERE status = 'ok' AND kind = 'dicom'"
    )
    found: dict[str, list[tuple[str, str]]] = {}
    for uid, key, volume in _stream(cache, query):
        found.setdefault(uid, []).append((key, volume))
    return found


def _stream(cache: Cache, query: str) -> Iterator[tuple[Any, ...]]:
    # Nothing is written to the tables meanwhile: the cursor may stay open.
    yield from cache.connection.execute(query)


def _hash(hashes: dict[str, str]) -> str:
    import hashlib

    return hashlib.sha256(compact(hashes).encode()).hexdigest()
