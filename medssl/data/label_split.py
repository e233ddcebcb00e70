"""Validation volumes for a store with masks that names none."""

from __future__ import annotations

import hashlib

from medssl.data.targets import VALIDATION_SHARE
from medssl.preprocessing.store import Store


def with_validation(store: Store) -> Store:
    """Return a store with masks to validate on: its own, else those of a fifth of the patients, by a hash of each.

    Of two patients or more at least one validates and one trains. Volumes of the split `test` stay there.
    """
    if any(store.has_label(name) for name in store.ids_of("validation")):
        return store
    patient_of = {
        name: str(store.row(name)["patient_key"])
        for name in store.ids
        if store.has_label(name) and store.row(name)["split"] != "test"
    }
    patients = sorted(set(patient_of.values()), key=_fraction)
    count = sum(_fraction(patient) < VALIDATION_SHARE for patient in patients)
    chosen = set(patients[: max(0, min(max(count, 1), len(patients) - 1))])
    return store.with_splits({name: "validation" if key in chosen else "train" for name, key in patient_of.items()})


def _fraction(patient_key: str) -> float:
    digest = hashlib.sha256(f"segmentation probe|{patient_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
