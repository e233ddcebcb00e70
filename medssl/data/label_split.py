"""Validation volumes for a store with masks that names none."""

from __future__ import annotations

import hashlib

from medssl.data.targets import VALIDATION_SHARE
from medssl.preprocessing.store import Store


def with_validation(store: Store) -> Store:
    """Return a store with masks to validate on: its own, else those of a fifth of the patients, by a hash of each."""
    if any(store.has_label(name) for name in store.ids_of("validation")):
        return store
    names = [name for name in store.ids if store.has_label(name)]
    chosen = {name for name in names if _fraction(str(store.row(name)["patient_key"])) < VALIDATION_SHARE}
    return store.with_splits({name: "validation" if name in chosen else "train" for name in names})


def _fraction(patient_key: str) -> float:
    digest = hashlib.sha256(f"segmentation probe|{patient_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
