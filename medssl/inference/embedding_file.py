"""Features as a Parquet file: a row per volume, the numbers as one column of fixed length, the facts beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import DataError
from medssl.files import atomic_path
from medssl.inference.embedding import Embeddings

SCHEMA_VERSION = 1
_KEY = b"medssl"
_TEXTS = {"id": "ids", "patient_key": "patient_keys", "split": "splits", "modality": "modalities",
          "label": "labels"}  # fmt: skip


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write `id`, `patient_key`, `split`, `modality` and `features` (float32, W numbers), whole or not at all.

    Where labels are known there is a column `label` too. The file's own metadata hold under `medssl` the names of the W
    numbers and what made them, as JSON; any reader of Parquet opens it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = embeddings.features.shape[1]
    flat = pa.array(np.ascontiguousarray(embeddings.features).ravel(), pa.float32())
    columns: dict[str, Any] = {
        name: pa.array(list(values), pa.string())
        for name, attribute in _TEXTS.items()
        if (values := getattr(embeddings, attribute))
    }
    columns["features"] = pa.FixedSizeListArray.from_arrays(flat, width)
    about = {"schema_version": SCHEMA_VERSION, "names": list(embeddings.names), "facts": embeddings.facts}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(about, sort_keys=True).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_embeddings(path: Path) -> Embeddings:
    """Read what `write_embeddings` wrote.

    Raises:
        DataError: If it cannot be read or has no features.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        column = table.column("features").combine_chunks()
        features = column.values.to_numpy(zero_copy_only=False).reshape(len(table), -1)
        texts = {
            attribute: tuple(table.column(name).to_pylist()) if name in table.column_names else ()
            for name, attribute in _TEXTS.items()
        }
    except (OSError, KeyError, ValueError, AttributeError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} holds no features of `medssl embed`: {type(error).__name__}: {error}.") from error
    return Embeddings(
        features=features.astype(np.float32),
        names=tuple(about.get("names", ())),
        facts=dict(about.get("facts", {})),
        **texts,
    )
