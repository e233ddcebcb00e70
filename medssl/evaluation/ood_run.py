"""Out-of-distribution scores of a checkpoint on stores: the Python twin of `medssl evaluate ood`."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.policy import AugmentationSettings, known_modality, policy_for
from medssl.data.target_table import SEPARATOR
from medssl.errors import DataError, UsageError
from medssl.evaluation.ood import Detector, OodResult, separation
from medssl.evaluation.references import read_references
from medssl.files import write_json, write_text
from medssl.inference.embedding import Embeddings, embed
from medssl.inference.frozen import Frozen, load_frozen
from medssl.inference.model import resolve_device
from medssl.inference.views import changed_by
from medssl.inference.volumes import Volume, volumes_of_store
from medssl.networks.pooling import Pooling, Stages
from medssl.preprocessing.store import Store

logger = logging.getLogger(__name__)

KNOWN = "known (judged)"
#: Share of the patients that judge where the store names no validation volumes.
JUDGING_SHARE = 0.3
#: Near strangers: transforms of the catalogue at the strong end of what scanners do.
ARTEFACTS: dict[str, dict[str, Any]] = {
    "bias_field": {"strength": [0.5, 0.5]},
    "motion": {"moves": [2, 2]},
    "ghosting": {"intensity": [1.0, 1.0]},
    "spike": {"intensity": [0.2, 0.2]},
    "gibbs": {"cutoff": [0.5, 0.5]},
    "rician": {"std": [0.2, 0.2]},
    "metal": {},
    "beam_hardening": {"amplitude": [30.0, 30.0]},
    "dose_noise": {"std": [60.0, 60.0]},
    "kernel": {"strength": [1.0, 1.0]},
    "slice_thickness": {"thickness_mm": [5.0, 5.0]},
    "speckle": {"std": [0.3, 0.3]},
    "shadow": {"factor": [0.1, 0.1]},
    "depth_attenuation": {"mu": [0.5, 0.5]},
    "gain_compression": {"gain_db": [6.0, 6.0]},
    "noise": {"std": [0.3, 0.3]},
    "blur": {"sigma": [1.5, 1.5]},
    "low_resolution": {"zoom": [0.5, 0.5]},
}


def evaluate_ood(
    checkpoint: Path,
    inside: Path,
    outside: Sequence[Path] = (),
    out: Path | None = None,
    *,
    labels: Path | None = None,
    artefacts: bool = True,
    modality: str | None = None,
    stages: Stages = "all",
    pooling: Pooling = "mean",
    most: int = 500,
    untrained: bool = False,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> OodResult:
    """Measure how well scores on an encoder's features tell strange volumes from known ones.

    Scores are fitted on the training volumes of `inside` and judged on its validation and test volumes; where it names
    none, three tenths of its patients judge, chosen by a hash of each.

    Args:
        checkpoint: A RUN or a checkpoint file.
        inside: Store of the known kind.
        outside: Stores of strangers: another scanner, organ or modality.
        out: Folder for `ood.json` and `scores.csv`, or None.
        labels: CSV of volume ids and labels of `inside`: brings class means, energy and softmax.
        artefacts: Also take the judging volumes with artefacts of their modality as strangers.
        modality: Of all volumes of `inside`, for the artefacts; None believes the store.
        stages: Stages whose pooled features are used.
        pooling: `mean` or `mean+max`.
        most: Volumes of each set at most, evenly spaced among the sorted ids.
        untrained: Use the checkpoint's network with random weights.
        seed: Of random weights, artefacts and intervals.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quiet: Show no progress.

    Raises:
        UsageError: If there are no strangers, two sets have one name, or channels or modality do not fit.
        DataError: If too few volumes are known, or features are not numbers.
    """
    if not outside and not artefacts:
        raise UsageError("Name strangers with --out-of STORE, or leave the artefacts on.")
    names = [path.resolve().name for path in outside]
    if len(set(names)) != len(names):
        raise UsageError(f"Two stores of strangers are called {max(names, key=names.count)}: rename a folder.")
    frozen = load_frozen(checkpoint, untrained=untrained, seed=seed, device=resolve_device(device))
    known = Store.open(inside)
    fitting, judging = _divided(known, most)

    def look(volumes: Sequence[Volume], change: Any = None) -> Embeddings:
        found = embed(frozen, volumes, stages=stages, pooling=pooling, quiet=quiet, change=change)
        found.require_finite()
        return found

    fitted = look(fitting)
    targets = None if labels is None else _targets(labels, fitted.ids)
    detector = Detector(fitted.features.astype(np.float64), targets, fitted.patient_keys, seed)
    judged = look(judging)
    strangers: dict[str, Embeddings] = {}
    near: list[str] = []
    if artefacts:
        for name, change in _artefacts(frozen, judging, modality, seed).items():
            strangers[name] = look(judging, change)
            near.append(name)
    for name, path in zip(names, outside, strict=True):
        strangers[name] = look(volumes_of_store(Store.open(path), most=most))
    of_known = detector(judged.features.astype(np.float64))
    scores = {KNOWN: of_known} | {
        name: detector(found.features.astype(np.float64)) for name, found in strangers.items()
    }
    sets = {
        name: {
            score: separation(
                of_known[score],
                values,
                inside_patients=judged.patient_keys,
                outside_patients=found.patient_keys,
                seed=seed,
            )
            for score, values in scores[name].items()
        }
        for name, found in strangers.items()
    }
    ids = {KNOWN: judged.ids} | {name: found.ids for name, found in strangers.items()}
    result = OodResult(
        sets=sets,
        near=tuple(near),
        counts={"known (fitted)": len(fitted)} | {name: len(each) for name, each in ids.items()},
        scores={
            name: {score: dict(zip(ids[name], column.tolist(), strict=True)) for score, column in by_score.items()}
            for name, by_score in scores.items()
        },
        facts={**fitted.facts, "neighbours": detector.neighbours, "labelled": labels is not None, "seed": seed},
    )
    if out is not None:
        write_json(out / "ood.json", result.to_json())
        write_text(out / "scores.csv", _table(result))
    return result


def _divided(store: Store, most: int) -> tuple[list[Volume], list[Volume]]:
    """Return volumes to fit on and others to judge on; no patient is in both."""
    train = store.ids_of("train")
    judging = sorted(store.ids_of("validation") + store.ids_of("test"))
    if not judging:
        judging = [name for name in train if _fraction(str(store.row(name)["patient_key"])) < JUDGING_SHARE]
        train = sorted(set(train) - set(judging))
    if len(train) < 2 or not judging:
        raise DataError(
            f"The store of known volumes has {len(train)} to fit on and {len(judging)} of other patients to judge on: "
            "at least 2 and 1 are needed."
        )
    return tuple(volumes_of_store(store, ids=_thinned(names, most)) for names in (train, judging))  # type: ignore[return-value]


def _thinned(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[int(place)] for place in np.linspace(0, len(names) - 1, most).round()]


def _fraction(patient_key: str) -> float:
    digest = hashlib.sha256(f"ood|{patient_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _artefacts(frozen: Frozen, volumes: Sequence[Volume], modality: str | None, seed: int) -> dict[str, Any]:
    """Return the changes that make near strangers, by name; only those that fit every modality there is."""
    modalities = {modality} if modality is not None else {volume.modality for volume in volumes}
    try:
        known = {known_modality(name) for name in modalities}
    except UsageError as error:
        raise UsageError(
            f"{error} For the artefacts give --modality, or leave them out with --no-artefacts."
        ) from error
    changes = {}
    for name, settings in ARTEFACTS.items():
        kind = CATALOGUE.get(name)
        if kind is None or not all(kind.fits(each) for each in known):
            continue
        values = {**settings, "probability": 1.0}
        if "per_channel" in kind.settings_class.model_fields:
            values["per_channel"] = 1.0
        augmentation = AugmentationSettings(modality=modality, overrides={"intensity": {name: values}})
        policy = policy_for("none", known, frozen.patch_size, augmentation)
        changes[name] = changed_by(policy, frozen, seed)
    return changes


def _targets(labels: Path, ids: Sequence[str]) -> NDArray[np.int64]:
    known = read_references(labels)
    missing = [name for name in ids if name not in known or not known[name].label]
    if missing:
        raise DataError(f"{labels} has no label of {len(missing)} training volumes, for example {missing[0]}.")
    several = [name for name in ids if SEPARATOR in known[name].label]
    if several:
        raise DataError(f"{several[0]} has several labels; class means need one per volume.")
    classes = sorted({known[name].label for name in ids})
    if len(classes) < 2:
        raise DataError(f"All training volumes are of class {classes[0]}: leave --labels away, or label others.")
    return np.array([classes.index(known[name].label) for name in ids], np.int64)


def _table(result: OodResult) -> str:
    text = io.StringIO()
    columns = list(next(iter(result.scores.values())))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "volume_id", *columns])
    for name, by_score in result.scores.items():
        for volume in by_score[columns[0]]:
            writer.writerow([name, volume, *(f"{by_score[score][volume]:.9g}" for score in columns)])
    return text.getvalue()
