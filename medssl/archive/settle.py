"""After decoding: what only the whole index can tell (copies, conflicts of patients), and each file's last word."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from medssl.archive.cache import Cache
from medssl.archive.identity import stem_of
from medssl.archive.keys import Keys, dicom_keys
from medssl.archive.private import KnownSource
from medssl.archive.pseudonym import Pseudonyms

#: Text files that describe the image of the same name, as BIDS and dcm2niix write them.
SIDECARS = (".json", ".bval", ".bvec", ".tsv")
_IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".png", ".jpg", ".jpeg", ".tif", ".tiff")

_TABLES = """
DROP TABLE IF EXISTS temp.refused; DROP TABLE IF EXISTS temp.related; DROP TABLE IF EXISTS temp.used;
CREATE TEMP TABLE refused (source INTEGER, path TEXT, file INTEGER, code TEXT, detail TEXT);
CREATE TEMP TABLE related (source INTEGER, path TEXT, file INTEGER, kind TEXT);
CREATE TEMP TABLE used (file INTEGER PRIMARY KEY);
"""


def settle(cache: Cache, sources: dict[int, KnownSource], pseudonyms: Pseudonyms) -> None:
    """Drop what is gone, decide on copies, and fill the temporary tables `refused` and `related`.

    Args:
        cache: After decoding.
        sources: By number.
        pseudonyms: Names volumes anew that would share an id.
    """
    _forget(cache)
    _name(cache, sources, pseudonyms)
    execute = cache.connection.execute
    cache.connection.executescript(_TABLES)
    execute(
        "INSERT INTO used SELECT DISTINCT m.file FROM members m JOIN volumes v ON v.fingerprint = m.fingerprint "
        "WHERE v.status = 'ok'"
    )
    companion = "EXISTS (SELECT 1 FROM companions c WHERE c.source = files.source AND c.path = files.path)"
    execute(
        "INSERT INTO related SELECT source, path, id, CASE WHEN state = 'related' THEN code WHEN state = 'dicom' THEN "
        "group_code ELSE 'companion_file' END FROM files WHERE state = 'related' OR "
        f"(state = 'dicom' AND grouped = 'related') OR (state = 'refused' AND {companion})"
    )
    execute(
        "INSERT INTO refused SELECT source, path, id, CASE WHEN state = 'dicom' THEN group_code ELSE code END, "
        "CASE WHEN state = 'dicom' THEN group_detail ELSE detail END FROM files WHERE "
        f"(state = 'dicom' AND grouped = 'refused') OR (state = 'refused' AND NOT {companion})"
    )
    execute(
        "INSERT INTO refused SELECT DISTINCT f.source, f.path, f.id, v.code, v.detail FROM volumes v "
        "JOIN members m ON m.fingerprint = v.fingerprint JOIN files f ON f.id = m.file "
        "WHERE v.status = 'refused' AND f.state IN ('dicom', 'image')"
    )
    _find_sidecars(cache)
    cache.commit()


def person_conflicts(cache: Cache) -> set[str]:
    """Return the keys of patients whose ID is used with names, birth dates or sexes that contradict each other."""
    from medssl.archive.dicom.group import same_person

    conflicts: set[str] = set()
    persons: list[list[str]] = []
    current = ""
    query = (
        "SELECT DISTINCT patient_key, person FROM volumes WHERE status = 'ok' AND person != '[]' "
        "ORDER BY patient_key, person"
    )
    for patient, text in cache.connection.execute(query):
        if patient != current:
            current, persons = patient, []
        person = json.loads(text)
        if any(not same_person(person, other) for other in persons):
            conflicts.add(patient)
        persons.append(person)
    return conflicts


def _forget(cache: Cache) -> None:
    execute, run = cache.connection.execute, cache.run
    execute("DELETE FROM files WHERE run < ?", (run,))
    execute("DELETE FROM companions WHERE file NOT IN (SELECT id FROM files)")
    execute("DELETE FROM series WHERE run < ?", (run,))
    execute("DELETE FROM volumes WHERE run < ?", (run,))
    execute("DELETE FROM members WHERE fingerprint NOT IN (SELECT fingerprint FROM volumes)")
    cache.commit()


def _name(cache: Cache, sources: dict[int, KnownSource], pseudonyms: Pseudonyms) -> None:
    """Give each volume its final id; a series that lies in two places is a copy, or it is named by its source."""
    execute = cache.connection.execute
    execute("UPDATE volumes SET final_id = volume_id, final_flags = '[]'")
    execute("UPDATE volumes SET status = 'ok', code = '', detail = '' WHERE code = 'duplicate_volume'")
    shared = execute(
        "SELECT volume_id FROM volumes WHERE status = 'ok' GROUP BY volume_id HAVING COUNT(*) > 1 ORDER BY volume_id"
    ).fetchall()
    for (volume_id,) in shared:
        rows = execute(
            "SELECT fingerprint, source, first_path, json_extract(measured, '$.content_hash') FROM volumes "
            "WHERE volume_id = ? AND status = 'ok' ORDER BY source, first_path, fingerprint",
            (volume_id,),
        ).fetchall()
        seen: dict[str, str] = {}
        for position, (fingerprint, source, path, content) in enumerate(rows):
            if content in seen:
                query = (
                    "UPDATE volumes SET status = 'refused', code = 'duplicate_volume', detail = ? WHERE fingerprint = ?"
                )
                execute(query, (f"copy of {seen[content]}", fingerprint))
                continue
            if position:
                seen[content] = pseudonyms.of("volume", volume_id, sources[source].label, path)
                execute("UPDATE volumes SET final_id = ? WHERE fingerprint = ?", (seen[content], fingerprint))
            else:
                seen[content] = volume_id
        if len(seen) > 1:
            execute(
                "UPDATE volumes SET final_flags = '[\"series_in_two_sources\"]' WHERE volume_id = ? AND status = 'ok'",
                (volume_id,),
            )


def _find_sidecars(cache: Cache) -> None:
    execute = cache.connection.execute
    endings = " OR ".join(f"lower(path) LIKE '%{ending}'" for ending in SIDECARS)
    candidates = execute(
        f"SELECT rowid, source, path, file FROM refused WHERE code = 'not_an_image' AND ({endings})"
    ).fetchall()
    names = ", ".join("?" * len(_IMAGE_ENDINGS))
    for rowid, source, path, file in candidates:
        pure = PurePosixPath(path)
        stem = str(pure.with_name(stem_of(pure.name).removesuffix(pure.suffix)))
        beside = execute(
            f"SELECT 1 FROM files WHERE source = ? AND path IN ({names}) AND state IN ('image', 'related') LIMIT 1",
            (source, *(stem + ending for ending in _IMAGE_ENDINGS)),
        ).fetchone()
        if beside:
            execute("DELETE FROM refused WHERE rowid = ?", (rowid,))
            execute("INSERT INTO related VALUES (?, ?, ?, 'sidecar')", (source, path, file))


def references_of_header(header: str) -> tuple[str, ...]:
    """Return the UIDs of the series that a DICOM file was drawn on; none for another file.

    Args:
        header: JSON of its header, or another text.
    """
    if not header.startswith("["):
        return ()
    from medssl.archive.dicom.model import DicomHeader

    return DicomHeader.from_json(header).references


def keys_of_header(pseudonyms: Pseudonyms, sources: dict[int, KnownSource], source: int, header: str) -> Keys:
    """Return patient, study and series keys of a DICOM file; empty where nothing is known.

    Args:
        pseudonyms: Makes the keys.
        sources: By number.
        source: The file's source.
        header: JSON of its header, or another text.
    """
    if not header.startswith("["):
        return Keys()
    from medssl.archive.dicom.model import DicomHeader

    facts = DicomHeader.from_json(header)
    values = {name: getattr(facts, name) for name in ("patient_id", "issuer", "study_uid", "series_uid")}
    return dicom_keys(pseudonyms, sources[source].label, values, facts.path)
