"""nnU-Net's preprocessed folders as stores: the same arrays, with facts from the plans; its pickles are never read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError
from medssl.preprocessing.codec import Encoding
from medssl.preprocessing.store import Store
from medssl.preprocessing.store_files import LABEL_SUFFIX, MAX_FOREGROUND, StoreEntry, number_of
from medssl.preprocessing.tissue import sample_above, tissue_mask

#: nnU-Net pads with zero after normalisation.
NNUNET_BACKGROUND = 0.0
#: Of what is said here of a folder; it is part of its hash, by which an interrupted run knows its data.
SCHEMA_VERSION = 1
_HASHED_BYTES = 65536


def is_nnunet_folder(folder: Path) -> bool:
    """Tell whether a folder holds nnU-Net's blosc2 arrays."""
    return next(folder.glob("*.b2nd"), None) is not None


class NnunetStore(Store):
    """A folder such as `nnUNet_preprocessed/DatasetXXX/nnUNetPlans_3d_fullres`.

    Spacing comes from the plans, the modality from the channel names, the split from the first fold of
    `splits_final.json`. A case is its own patient. Voxels of the foreground are found on first use: nnU-Net keeps them
    in a pickle, and pickles run code.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        """Use `of_folder`."""
        super().__init__(folder, info)
        # Kept apart from the entries, of which a store keeps the latest only: finding them again reads a whole volume.
        self._voxels: dict[str, NDArray[Any]] = {}

    @staticmethod
    def of_folder(folder: Path) -> NnunetStore:
        """Open a folder for which `is_nnunet_folder` is true.

        Raises:
            DataError: If no plans beside or above the folder name its spacing.
        """
        plans, configuration = _plans_of(folder)
        spacing = [float(value) for value in configuration["spacing"]]
        modality = _modality(folder, configuration)
        validation = _validation_cases(folder)
        rows = []
        for path in sorted(folder.glob("*.b2nd")):
            case = path.stem
            if "__" in case or (case.endswith(LABEL_SUFFIX) and (folder / f"{_without_label(case)}.b2nd").exists()):
                continue
            rows.append(
                {
                    "id": case,
                    "shape": _shape_of(path),
                    "modality": modality,
                    "patient_key": case,
                    "split": "validation" if case in validation else "train",
                    "has_label": (folder / f"{case}{LABEL_SUFFIX}.b2nd").exists(),
                    "sample_sha256": _hash_sample(path),
                }
            )
        info = {
            "kind": "nnunet",
            "schema_version": SCHEMA_VERSION,
            # The 2D configuration names the two in-plane values only.
            "spacing": {"mode": "plans", "mm": spacing if len(spacing) == 3 else [1.0, *spacing]},
            "normalisation": {"schemes": configuration.get("normalization_schemes", [])},
            "fingerprint": plans.get("foreground_intensity_properties_per_channel", {}),
            "provenance": {"plans_name": plans.get("plans_name"), "dataset_name": plans.get("dataset_name")},
            "volumes": rows,
        }
        info["hash"] = hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
        return NnunetStore(folder, info)

    def _read_entry(self, volume_id: str) -> StoreEntry:
        facts = self._facts[volume_id]
        channels, depth, height, width = (int(size) for size in self._array(volume_id).shape)
        z, y, x = self.info["spacing"]["mm"]
        return StoreEntry(
            id=volume_id,
            number=number_of(volume_id),
            shape=(channels, depth, height, width),
            spacing_mm=(z, y, x),
            modality=facts["modality"],
            patient_key=facts["patient_key"],
            split=facts["split"],
            background=NNUNET_BACKGROUND,
            foreground=self._foreground(volume_id, (depth, height, width)),
            has_label=facts["has_label"],
            properties={"normalisation": _normalisation(self.info)},
        )

    def _foreground(self, volume_id: str, shape: tuple[int, int, int]) -> NDArray[np.int64]:
        if volume_id not in self._voxels:
            mask = tissue_mask(self.read(volume_id, (0, 0, 0), shape, channels=[0])[0])
            if self.has_label(volume_id):
                # -1 marks what nnU-Net found to be outside of the image's content.
                mask &= self._decode(volume_id, self._array(volume_id + LABEL_SUFFIX), (0,)) >= 0
            found = sample_above(mask, 0.5, MAX_FOREGROUND, volume_id)
            self._voxels[volume_id] = found.astype(np.min_scalar_type(max(shape)))
        return self._voxels[volume_id].astype(np.int64)

    def _encoding(self, volume_id: str) -> Encoding:
        return Encoding()  # nnU-Net's arrays are intensities, whatever their type

    def _clean_label(self, label: NDArray[np.int16]) -> NDArray[np.int16]:
        return np.maximum(label, 0)


def _normalisation(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Return how the channels were normalised where that can be undone: where all of them are CT.

    nnU-Net's other schemes take their figures from each image and write them nowhere.
    """
    schemes = info["normalisation"]["schemes"]
    if not schemes or any(scheme != "CTNormalization" for scheme in schemes):
        return []
    try:
        return [_ct_normalisation(info["fingerprint"][str(channel)]) for channel in range(len(schemes))]
    except (KeyError, TypeError, ValueError):
        return []


def _ct_normalisation(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "scheme": "fingerprint",
        "shift": float(properties["mean"]),
        # nnU-Net's own floor of what it divides by.
        "scale": max(float(properties["std"]), 1e-8),
        "low": float(properties["percentile_00_5"]),
        "high": float(properties["percentile_99_5"]),
    }


def _without_label(stem: str) -> str:
    return stem.removesuffix(LABEL_SUFFIX)


def _plans_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plans and the configuration whose data lie in `folder`."""
    candidates = sorted({*folder.glob("*.json"), *folder.parent.glob("*.json")})
    for path in candidates:
        plans = _json_object(path)
        configurations = plans.get("configurations")
        if not isinstance(configurations, dict):
            continue
        for name in configurations:
            configuration = _resolve(configurations, name)
            if configuration.get("data_identifier") == folder.name and "spacing" in configuration:
                return plans, configuration
    raise DataError(
        f"{folder}: no plans beside or above it name the spacing of '{folder.name}'. Keep the folder inside its "
        "DatasetXXX folder of nnUNet_preprocessed, where the plans lie, or preprocess the images with medssl."
    )


def _resolve(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration together with what it inherits."""
    chain: list[dict[str, Any]] = []
    seen: set[str] = set()
    while name in configurations and name not in seen:
        seen.add(name)
        chain.append(configurations[name])
        name = configurations[name].get("inherits_from", "")
    return {key: value for part in reversed(chain) for key, value in part.items()}


def _modality(folder: Path, configuration: dict[str, Any]) -> str:
    names = _json_object(folder.parent / "dataset.json").get("channel_names", {})
    if not isinstance(names, dict) or not names:
        return "CT" if "CTNormalization" in configuration.get("normalization_schemes", []) else "MR"
    return "CT" if str(next(iter(names.values()))).upper() == "CT" else "MR"


def _validation_cases(folder: Path) -> set[str]:
    path = folder.parent / "splits_final.json"
    try:
        splits = json.loads(path.read_text())
        return {str(case) for case in splits[0]["val"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _shape_of(path: Path) -> list[int]:
    try:
        return [int(size) for size in blosc2.open(str(path), mode="r", mmap_mode="r").shape]
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no blosc2 array ({error}). Preprocess the data set again with nnU-Net.") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _hash_sample(path: Path) -> str:
    """Hash size, head and tail of a file: enough to notice other data, cheap enough for every start of a run."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(_HASHED_BYTES)
        handle.seek(max(0, size - _HASHED_BYTES))
        return hashlib.sha256(size.to_bytes(8, "little") + head + handle.read()).hexdigest()
