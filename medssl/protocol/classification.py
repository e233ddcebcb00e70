"""Classification under the protocol: one derived data set for all runs, measured on its probabilities."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from medssl.config import Settings
from medssl.data.probabilities import read_probabilities
from medssl.data.target_arrays import opened_npz
from medssl.data.target_files import read_targets
from medssl.data.target_table import NONE, SEPARATOR
from medssl.data.targets import Case as TargetCase
from medssl.data.targets import Targets, carried, draw_labelled
from medssl.errors import UsageError
from medssl.files import atomic_path, write_text
from medssl.protocol.division import Case, Division
from medssl.protocol.outcomes import Answers
from medssl.protocol.recipe import STRONG, DatasetSettings, PretrainingSettings
from medssl.protocol.tasks import Job, Result, digest, paired_method
from medssl.protocol.tempering import tempered_anew
from medssl.semisupervised.classification import semisupervise_classification
from medssl.training.checkpoint import find_checkpoint, load_checkpoint
from medssl.training.metrics import read_metrics
from medssl.transfer.classification import finetune_classification
from medssl.transfer.classification_run import UNCALIBRATED
from medssl.transfer.classification_settings import ClassificationSettings
from medssl.transfer.images import ImageOptions, volume_store

#: What `finetune_classification` takes beside `ClassificationSettings`.
_OF_IMAGES = ("patch_size", "fit", "spacing", "normalisation", "modality", "grey")
_NOT_OF_TRAINING = ("laterality", "augmentation", "trainer", "network")


class ClassificationTraining(Settings):
    """What all arms share; see `medssl.transfer.classification.finetune_classification`.

    Args:
        trainer: `single`, or `paired`: every arm, the controls too, trains by `medssl semisupervise`, on the labelled
            images and, where its method looks at them, on the rest of the pool without labels.
        network: Network of runs from scratch where no arm has a checkpoint.
        augmentation: `fine-tuning`, `strong` or `none`.
    """

    trainer: Literal["single", "paired"] = "single"
    network: str | None = None
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=16, ge=1)
    mode: str = "full"
    trained_stages: int = 2
    optimiser: str = "adamw"
    weight_decay: float = 0.01
    schedule: str = "warmup"
    layer_decay: float = 1.0
    dropout: float = 0.0
    stages: str | tuple[int, ...] = "all"
    pooling: str = "mean"
    balance: str = "none"
    smoothing: float = 0.0
    laterality: str = "forbid"
    augmentation: str = "fine-tuning"
    patch_size: tuple[int, ...] | None = None
    fit: str = "whole"
    spacing: str | tuple[float, ...] = "median"
    normalisation: str = "by-modality"
    modality: str | None = None
    grey: bool = False

    @model_validator(mode="after")
    def _as_fine_tuning_takes_it(self) -> ClassificationTraining:
        ClassificationSettings.model_validate(settings_of(self.model_dump()))
        return self


class Classification:
    """Labelled images: a CSV, a folder for each class, a .npz, or an INDEX or a STORE with a CSV of labels.

    Args:
        settings: Of the data set.
    """

    metrics: tuple[str, ...] = ("auroc", "aupr", "balanced_accuracy", "accuracy", "f1", "kappa")
    training_model: type[Settings] = ClassificationTraining

    def __init__(self, settings: DatasetSettings) -> None:
        self.settings = settings
        if settings.patient is not None:
            raise UsageError(f"{settings.path}: patients of a classification data set stand in the CSV's own column.")
        self.targets = read_targets(
            settings.path, labels=settings.targets, kind=settings.kind, classes=settings.classes
        )
        self.by_name = {case.name: case for case in self.targets.cases}

    def cases(self) -> list[Case]:
        """Return all cases."""
        given = self.targets.split_source == "given"
        last = "test" if self.targets.of("test") else "validation"
        return [
            Case(case.name, case.patient_key, min(carried(case), default=-1), given and case.split == last)
            for case in self.targets.cases
        ]

    def signature(self) -> str:
        """Return a hash of names, targets and patients."""
        return self.targets.digest()

    def labelled(self, division: Division, number: int, seed: int) -> list[str]:
        """Draw labelled cases of the pool, spread over the classes, as `--labelled` does; fewer are a part of more."""
        drawn = draw_labelled(self._derived(division), number, seed)
        return sorted(case.name for case in drawn.of("train"))

    def pool_store(
        self, names: Sequence[str], folder: Path, pretrain: PretrainingSettings, workers: int | None
    ) -> Path:
        """Return a store of the images of some cases."""
        if self.targets.source == "volumes" and not (self.settings.path / "volumes.parquet").is_file():
            raise UsageError(
                f"{self.settings.path} is a STORE, from which the validation images cannot be taken out: give its "
                "INDEX, or a checkpoint that was pretrained on other images."
            )
        cases = [dataclasses.replace(self.by_name[name], split="train") for name in names]
        options = ImageOptions(spacing=pretrain.spacing, workers=workers, quiet=True)
        store, _ = volume_store(self.targets.with_cases(cases), self.settings.path, folder / "images", options)
        return Path(store.folder)

    def train(self, job: Job) -> Result:
        """Fine-tune and measure selection and validation cases with the last checkpoint.

        For the run both are its validation images, which choose nothing but the temperature; that one is fitted anew,
        on the selection cases alone.
        """
        started = (job.folder / "run.json").is_file()
        if job.folder.exists() and not started:
            shutil.rmtree(job.folder)
        derived = self._derived(Division(job.pool, job.selection, job.validation, {}))
        dataset, labels = self._write(derived, job.cache)
        training = job.training.model_dump() | {
            name: value for name, value in job.changes.items() if name not in ("transfer_decoder", "semisupervised")
        }
        paired = training["trainer"] == "paired"
        if paired and training["augmentation"] == STRONG:
            # Of the labelled images alone: the method has views of its own of the others.
            training["augmentation"] = "fine-tuning"
        shared: dict[str, Any] = {
            "labels": labels,
            **self._kind,
            "labelled": job.labels,
            "ignore_unlabelled": True,
            "plans_from": job.plans_from,
            "network": training["network"] if job.checkpoint is None and job.plans_from is None else None,
            "cache": job.cache / "images",
            "device": job.device,
            "workers": job.workers,
            "resume": started,
            "quiet": True,
            "learning_rate": job.rate,
            "seed": job.seed,
            "select": "last",
            "val_every": training["steps"],
            **{name: training[name] for name in _OF_IMAGES},
            **settings_of(training),
        }
        if paired:
            method, own = paired_method(job)
            semisupervise_classification(method, dataset, job.checkpoint, job.folder, settings=own, **shared)
        elif "semisupervised" in job.changes:
            raise UsageError(f"arms.{job.arm}.semisupervised needs training.trainer: paired.")
        else:
            finetune_classification(dataset, job.checkpoint, job.folder, **shared)
        return self._result(job, derived, read_targets(dataset, labels=labels, **self._kind, ignore_unlabelled=True))

    def _derived(self, division: Division) -> Targets:
        """Return the pool as training cases and all else as validation, in an order that the data set decides."""
        parts = dict.fromkeys(division.pool, "train")
        parts |= dict.fromkeys((*division.selection, *division.validation), "validation")
        cases = [dataclasses.replace(case, split=parts[case.name]) for case in self.targets.cases if case.name in parts]
        return self.targets.with_cases(sorted(cases, key=lambda case: (case.split, case.row)))

    @property
    def _kind(self) -> dict[str, Any]:
        return {"kind": self.targets.kind, "classes": self.targets.classes}

    def _write(self, derived: Targets, folder: Path) -> tuple[Path, Path | None]:
        """Write a derived data set, the same for all runs, and return it with its CSV of labels where it has one."""
        stem = f"cases-{digest([derived.digest(), str(self.settings.path)])}"
        if derived.source == "npz":
            path = folder / f"{stem}.npz"
            if not path.is_file():
                _write_npz(path, self.settings.path, derived)
            return path, None
        path = folder / f"{stem}.csv"
        of_volumes = derived.source == "volumes"
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["volume_id" if of_volumes else "path", "label", "patient", "split"])
        for case in derived.cases:
            place = case.volume_id if case.path is None else str(case.path.resolve())
            names = [derived.classes[number] for number in carried(case)]
            writer.writerow([place, SEPARATOR.join(names) or NONE, case.patient_key, case.split])
        if not path.is_file():
            write_text(path, text.getvalue())
        return (self.settings.path, path) if of_volumes else (path, None)

    def _result(self, job: Job, derived: Targets, written: Targets) -> Result:
        ours = {
            theirs.name: case for theirs, case in zip(written.of("validation"), derived.of("validation"), strict=True)
        }
        # Those of probabilities.csv are calibrated in parts, by the targets of cases that are reported here.
        table = read_probabilities(job.folder / "validation" / UNCALIBRATED)
        cases = [ours[name] for name in table.cases]
        state = load_checkpoint(find_checkpoint(job.folder))["medssl"]
        place = {case.name: number for number, case in enumerate(cases)}
        rows = [[place[name] for name in part] for part in (job.selection, job.validation)]
        targets = derived.array(cases)
        values = tempered_anew(table.values, targets, self.targets.kind, 1.0, rows[0])
        answers = [
            Answers(self.targets.kind, self.targets.classes, part, values[chosen], targets[chosen])  # type: ignore[arg-type]
            for part, chosen in zip((job.selection, job.validation), rows, strict=True)
        ]
        times = [row["time"] for row in read_metrics(job.folder) if isinstance(row.get("time"), int | float)]
        return Result(
            selection=answers[0] if job.selection else None,
            validation=answers[1],
            plan=digest(json.loads(json.dumps([state[name] for name in ("architecture", "patch_size", "spacing_mm")]))),
            costs={"train_wall_s": float(max(times))} if times else {},
        )


def settings_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `ClassificationSettings` takes of the settings of training."""
    given = {name: value for name, value in training.items() if name not in (*_OF_IMAGES, *_NOT_OF_TRAINING)}
    augmentation = {"laterality": training["laterality"]}
    if training["augmentation"] == STRONG:
        augmentation["policy"] = str(resources.files("medssl.augmentation") / "policies" / "strong.yaml")
    elif training["augmentation"] not in ("fine-tuning", "none"):
        raise ValueError(f"augmentation takes fine-tuning, strong or none, got '{training['augmentation']}'")
    return {**given, "augment": training["augmentation"] != "none", "augmentation": augmentation}


def _write_npz(path: Path, source: Path, derived: Targets) -> None:
    content: dict[str, Any] = {}
    with opened_npz(source) as arrays:
        for split, prefix in (("train", "train"), ("validation", "val")):
            cases = derived.of(split)
            content[f"{prefix}_images"] = _images(arrays, cases)
            content[f"{prefix}_labels"] = derived.array(cases).reshape(len(cases), -1)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **content)


def _images(arrays: Any, cases: Sequence[TargetCase]) -> Any:
    """Return the images of some cases of a .npz in their order, each array read once."""
    found: dict[int, Any] = {}
    for name in sorted({case.array[0] for case in cases if case.array}):
        array = arrays[name]
        found |= {n: array[case.array[1]] for n, case in enumerate(cases) if case.array and case.array[0] == name}
    return np.stack([found[number] for number in range(len(cases))])
