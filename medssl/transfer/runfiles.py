"""The files of a segmentation RUN that say what was done: recipe, data, environment, split."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from medssl.config import to_yaml
from medssl.errors import UsageError
from medssl.files import sha256_of, write_json, write_text
from medssl.networks.architecture import Architecture, architecture
from medssl.training.environment import describe_environment
from medssl.transfer.raw import RawDataset
from medssl.transfer.selection import Selection
from medssl.transfer.settings import TrainingSettings
from medssl.transfer.source import Source

SCHEMA_VERSION = 1
# What may differ between a run and its continuation: how fast the work is done, and where files lie; what they hold is
# compared by its hash.
_FREE_ON_RESUME = ("workers", "cache", "dataset", "checkpoint", "plans_from")


def loader_workers(workers: int | None, device: torch.device) -> int:
    """Return how many processes make batches; on a CPU they would only take cores from the training."""
    if workers is not None:
        return workers
    return min(max(len(os.sched_getaffinity(0)) - 1, 0), 8) if device.type == "cuda" else 0


def named_architecture(name: str | None, fingerprint: dict[str, Any]) -> Architecture:
    """Return the architecture of a network's name, 2D where the images are single slices."""
    depth = np.median([shape[0] for shape in fingerprint["shapes_after_crop"]])
    return architecture(str(name), 2 if depth <= 1 else 3)


def recipe(
    raw: RawDataset, checkpoint: Path | None, settings: TrainingSettings, source: Source | None, **options: Any
) -> dict[str, Any]:
    """Return everything that decides a run, resolved."""
    values = settings.model_dump(mode="json", exclude={"checkpoint"})
    used = [*(settings.train_cases or []), *(settings.validation_cases or [])]
    return {
        "command": "medssl finetune segmentation",
        "dataset": str(raw.folder),
        "files_sha256": files_hash(raw, used),
        "arm": "scratch" if checkpoint is None else "pretrained",
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "checkpoint_sha256": None if source is None else sha256_of(source.path),
        **{name: _plain(value) for name, value in options.items()},
        **values,
    }


def check_resumed(out: Path, wanted: dict[str, Any]) -> None:
    """Refuse to continue a RUN with other settings.

    Raises:
        UsageError: Naming the first setting that differs.
    """
    path = out / "recipe.yaml"
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text())
    for name, value in wanted.items():
        if name not in _FREE_ON_RESUME and before.get(name) != value:
            raise UsageError(
                f"--resume: {name} is {value!r} now and was {before.get(name)!r} when {out} began. Use the same "
                "options, "
                "or another --out."
            )


def is_ours(out: Path) -> bool:
    """Whether a folder is a segmentation RUN."""
    path = out / "run.json"
    return path.is_file() and json.loads(path.read_text()).get("kind") == "segmentation"


def write_start(
    out: Path,
    wanted: dict[str, Any],
    raw: RawDataset,
    selection: Selection,
    plans: dict[str, Any],
    configuration: str,
    preprocessed: Path,
    settings: TrainingSettings,
    *,
    shared: bool,
    method: str = "finetune",
) -> None:
    """Write what is known before the first step."""
    write_json(out / "plans.json", plans)
    write_json(out / "dataset.json", raw.content)
    split = [{"train": selection.train, "val": selection.validation}]
    write_json(out / "splits_final.json", split)
    settings_ = plans["configurations"][configuration]
    write_json(
        out / "data.json",
        {
            "dataset": raw.name,
            "labels": raw.content["labels"],
            "channels": raw.channel_names,
            "counts": {"train": len(selection.train), "validation": len(selection.validation), "cases": len(raw.cases)},
            "train_cases": selection.train,
            "validation_cases": selection.validation,
            "spacing_mm": settings_["spacing"],
            "patch_size": settings_["patch_size"],
            "normalisation": settings_["normalization_schemes"],
            "files_sha256": wanted["files_sha256"],
        },
    )
    write_json(out / "environment.json", describe_environment())
    write_json(
        out / "validation" / "references.json",
        {
            "folder": str(raw.folder),
            "cases": {
                name: {
                    "label": os.path.relpath(raw.cases[name].label, raw.folder),
                    "images": [os.path.relpath(path, raw.folder) for path in raw.cases[name].images],
                }
                for name in selection.validation
            },
        },
    )
    if not shared:
        # With these, plain nnUNetv2_train finds everything below RUN/preprocessed.
        for name, content in ((plans["plans_name"], plans), ("dataset", raw.content), ("splits_final", split)):
            write_json(preprocessed / f"{name}.json", content)
    _write_run(out, settings, method, finished=False)
    text = f"# Written by {wanted['command']}; every setting as it was used.\n" + to_yaml(wanted)
    write_text(out / "recipe.yaml", text)


def write_claim(out: Path, settings: TrainingSettings, method: str = "finetune") -> None:
    """Say whose folder it is before anything else is in it, so that a run killed early can be replaced too."""
    if not (out / "run.json").is_file():
        _write_run(out, settings, method, finished=False)


def write_end(out: Path, settings: TrainingSettings, method: str = "finetune") -> None:
    """Mark the RUN as finished."""
    _write_run(out, settings, method, finished=True)


def _write_run(out: Path, settings: TrainingSettings, method: str, *, finished: bool) -> None:
    write_json(
        out / "run.json",
        {
            "kind": "segmentation",
            "schema_version": SCHEMA_VERSION,
            "method": method,
            "arm": "scratch" if settings.checkpoint is None else "pretrained",
            "steps": settings.steps,
            "seed": settings.seed,
            "finished": finished,
        },
    )


def files_hash(raw: RawDataset, names: Sequence[str]) -> str:
    """Return a hash of the names and sizes of the files of some cases."""
    digest = hashlib.sha256()
    for name in sorted(names):
        for file, size, _ in raw.cases[name].signature:
            digest.update(f"{file}|{size}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
