"""The files of a classification RUN that say what was done: recipe, data, environment, transfer; no identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl.config import to_yaml
from medssl.data.targets import SPLITS, Targets
from medssl.files import sha256_of, write_json, write_text
from medssl.preprocessing.store import Store
from medssl.training.environment import describe_environment
from medssl.transfer.classifier_files import KIND, is_classification
from medssl.transfer.overlay import KeyReport
from medssl.transfer.source import Source

SCHEMA_VERSION = 1
RECIPE = "recipe.yaml"


def recipe_head(
    dataset: Path,
    labels: Path | None,
    checkpoint: Path | None,
    template: Source | None,
    plans_from: Path | None,
    network: str | None,
) -> dict[str, Any]:
    """Return what a recipe says of where a run starts."""
    return {
        "command": "medssl finetune classification",
        "dataset": str(dataset),
        "labels": None if labels is None else str(labels),
        "arm": "scratch" if checkpoint is None else "pretrained",
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "plans_from": None if plans_from is None else str(plans_from),
        "checkpoint_sha256": None if template is None else sha256_of(template.path),
        "network": network,
    }


def is_ours(out: Path) -> bool:
    """Whether a folder is a classification RUN."""
    return out.is_dir() and is_classification(out)


def target_kind(out: Path) -> str:
    """Return the kind of target that a classification RUN was trained on."""
    return str(json.loads((out / "run.json").read_text())["target_kind"])


def claim(out: Path, recipe: Mapping[str, Any]) -> None:
    """Say whose folder it is before anything else is in it, so that a run killed early can be replaced too."""
    if not (out / "run.json").is_file():
        _write_run(out, recipe, finished=False)


def write_start(
    out: Path, recipe: Mapping[str, Any], targets: Targets, channels: int, patch: tuple[int, ...], store: Store
) -> None:
    """Write what is known before the first step."""
    by_split = {split: targets.of(split) for split in SPLITS}
    write_json(
        out / "data.json",
        {
            "kind": targets.kind,
            "classes": list(targets.classes),
            "counts": {split: len(cases) for split, cases in by_split.items()},
            "classes_by_split": {split: targets.counts(cases) for split, cases in by_split.items()},
            "patients": {split: len({case.patient_key for case in cases}) for split, cases in by_split.items()},
            "split": targets.split_source,
            "channels": channels,
            "patch_size": list(patch),
            "modalities": sorted(store.modalities),
            "normalisation": store.info.get("normalisation"),
            "images_hash": store.hash,
            "targets_sha256": targets.digest(),
        },
    )
    write_json(out / "environment.json", describe_environment())
    _write_run(out, recipe, finished=False)
    text = "# Written by medssl finetune classification; every setting as it was used.\n" + to_yaml(recipe)
    write_text(out / RECIPE, text)


def write_end(out: Path, recipe: Mapping[str, Any]) -> None:
    """Mark the RUN as finished."""
    _write_run(out, recipe, finished=True)


def write_transfer(out: Path, source: Source | None, report: KeyReport | None) -> None:
    """Write what became of each key of the checkpoint."""
    if source is None or report is None:
        write_json(out / "transfer.json", {"checkpoint": None, "summary": "all weights start random"})
    else:
        content = {"checkpoint": source.path.name, "summary": report.summary(), **report.to_json()}
        write_json(out / "transfer.json", content)


def _write_run(out: Path, recipe: Mapping[str, Any], *, finished: bool) -> None:
    write_json(
        out / "run.json",
        {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "method": "finetune",
            "target_kind": recipe["kind"],
            "classes": list(recipe["classes"]),
            **{name: recipe[name] for name in ("arm", "mode", "steps", "seed")},
            "finished": finished,
        },
    )
