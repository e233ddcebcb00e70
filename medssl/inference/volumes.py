"""Volumes and images that an encoder is shown, from a store or from memory, read box by box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medssl.errors import UsageError
from medssl.inference.tiles import Reader, Triple
from medssl.preprocessing.store import Store


@dataclass(frozen=True)
class Volume:
    """A volume or image that can be read box by box.

    Args:
        id: Its name in outputs, free of identity.
        shape: (C, Z, Y, X); an image has Z = 1.
        read: Returns its voxels from a first to behind a last one, (C, z, y, x).
        background: Value of padding.
        patient_key: Pseudonym of its patient, or empty.
        split: `train`, `validation`, `test`, or empty.
        modality: For example `MR`, or empty.
        spacing_mm: (z, y, x), or None.
        rescale: Intercept and slope to the modality's unit (HU, SUVbw); NaN where not known.
        tissue: Some voxels (z, y, x) of tissue, or None where that is not known. Shape: (N, 3).
    """

    id: str
    shape: tuple[int, int, int, int]
    read: Reader = field(repr=False)
    background: float = 0.0
    patient_key: str = ""
    split: str = ""
    modality: str = ""
    spacing_mm: tuple[float, ...] | None = None
    rescale: tuple[float, float] = (math.nan, math.nan)
    tissue: NDArray[np.int64] | None = field(default=None, repr=False)


def volumes_of_store(
    store: Store, *, split: str = "all", ids: Sequence[str] | None = None, most: int | None = None
) -> list[Volume]:
    """Return the volumes of a store.

    Args:
        store: The store.
        split: Only those of one split.
        ids: Only these, in this order.
        most: Of more than so many, so many evenly spaced in the sorted list.

    Raises:
        UsageError: If an id is not in the store, or the split is empty.
    """
    chosen = list(ids) if ids is not None else store.ids_of(split)
    if not chosen:
        raise UsageError(f"The store has no volume in the split '{split}'. Use --split all, or another store.")
    if most is not None and len(chosen) > most:
        chosen = [chosen[int(place)] for place in np.linspace(0, len(chosen) - 1, most).round()]
    return [_of_store(store, name) for name in chosen]


def volumes_of_arrays(
    images: NDArray[np.float32] | Sequence[NDArray[np.float32]],
    ids: Sequence[str],
    *,
    patient_keys: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    background: float = 0.0,
    modality: str = "",
) -> list[Volume]:
    """Return volumes that lie in memory, normalised as the encoder expects.

    Args:
        images: One each, (C, Z, Y, X) or (C, Y, X).
        ids: Their names.
        patient_keys: Pseudonym of each one's patient; by default its own name.
        splits: Split of each.
        background: Value of padding.
        modality: Of all.
    """
    found = []
    for row, (name, image) in enumerate(zip(ids, images, strict=True)):
        array = np.asarray(image, np.float32)
        array = array[:, None] if array.ndim == 3 else array
        found.append(
            Volume(
                id=str(name),
                shape=array.shape,
                read=_reader_of(array),
                background=background,
                patient_key=patient_keys[row] if patient_keys is not None else str(name),
                split=splits[row] if splits is not None else "",
                modality=modality,
            )
        )
    return found


def _of_store(store: Store, name: str) -> Volume:
    entry = store.entry(name)
    return Volume(
        id=name,
        shape=entry.shape,
        read=lambda start, stop: store.read(name, start, stop),
        background=entry.background,
        patient_key=entry.patient_key,
        split=entry.split,
        modality=entry.modality,
        spacing_mm=entry.spacing_mm,
        rescale=entry.rescale,
        tissue=entry.foreground,
    )


def _reader_of(array: NDArray[np.float32]) -> Reader:
    def read(start: Triple, stop: Triple) -> NDArray[np.float32]:
        return array[(slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))]

    return read
