"""Segmentation under the protocol: nnU-Net raw data sets, fine-tuned inside nnU-Net, measured per case."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medssl.config import Settings, merged
from medssl.errors import DataError, UsageError
from medssl.evaluation.overlap import METRICS
from medssl.evaluation.results import measure_run
from medssl.files import write_json
from medssl.preprocessing.run import preprocess
from medssl.protocol.division import Case, Division, draw
from medssl.protocol.outcomes import CaseValues
from medssl.protocol.recipe import DatasetSettings, PretrainingSettings
from medssl.protocol.tasks import Job, Result, digest, paired_method
from medssl.semisupervised.segmentation import semisupervise_segmentation
from medssl.training.checkpoint import load_checkpoint
from medssl.transfer.raw import RawDataset, read_dataset
from medssl.transfer.runfiles import files_hash
from medssl.transfer.segmentation import finetune_segmentation

#: Names that segmentation and classification share, as fine-tuning for segmentation calls them.
_AUGMENTATIONS = {"strong": "medssl-strong"}
#: Stands behind a metric of masks of which the largest connected part of each label was kept.
LARGEST = "_largest_part"


class SegmentationTraining(Settings):
    """What all arms share; see `medssl.transfer.segmentation.finetune_segmentation`.

    Args:
        trainer: `nnunet`, or `paired`: every arm, the controls too, trains by `medssl semisupervise`, on the labelled
            cases and, where its method looks at them, on the rest of the pool without labels.
        network: Network of runs from scratch where no arm has a checkpoint.
    """

    trainer: Literal["nnunet", "paired"] = "nnunet"
    network: str | None = None
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=2, ge=1)
    patch_size: tuple[int, ...] | None = None
    spacing: str | tuple[float, ...] | None = None
    optimiser: str = "auto"
    schedule: str = "warmup"
    layer_decay: float = 1.0
    laterality: str = "forbid"
    augmentation: str = "nnunet"


class Segmentation:
    """An nnU-Net raw data set.

    Args:
        settings: Of the data set.
    """

    metrics: tuple[str, ...] = ("dice", "jaccard")
    training_model: type[Settings] = SegmentationTraining

    def __init__(self, settings: DatasetSettings) -> None:
        self.settings = settings
        self.raw: RawDataset = read_dataset(settings.path)

    def cases(self) -> list[Case]:
        """Return the cases that have a mask."""
        given = self._given()
        return [
            Case(name, self._patient(name), given=name in given)
            for name, case in self.raw.cases.items()
            if case.label.is_file()
        ]

    def signature(self) -> str:
        """Return a hash of the names and sizes of all files."""
        return files_hash(self.raw, list(self.raw.cases))

    def labelled(self, division: Division, number: int, seed: int) -> list[str]:
        """Draw labelled cases of the pool; for one seed, fewer are a part of more."""
        return draw(division.pool, number, self.settings.split_seed, seed)

    def pool_store(
        self, names: Sequence[str], folder: Path, pretrain: PretrainingSettings, workers: int | None
    ) -> Path:
        """Return a store of the images of some cases, made of links to them; no label is in reach."""
        images, store = folder / "images", folder / "store"
        (images / "imagesTr").mkdir(parents=True, exist_ok=True)
        for name in names:
            for channel, image in enumerate(self.raw.cases[name].images):
                link = images / "imagesTr" / f"{name}_{channel:04d}{self.raw.file_ending}"
                link.unlink(missing_ok=True)
                link.symlink_to(image.resolve())
        content = {key: self.raw.content[key] for key in ("channel_names", "file_ending")}
        write_json(images / "dataset.json", content | {"numTraining": len(names)})
        preprocess(images, store, spacing=pretrain.spacing, resume=store.exists(), workers=workers, quiet=True)
        return store

    def train(self, job: Job) -> Result:
        """Fine-tune, predict selection and validation cases with the last checkpoint, and measure them."""
        started = (job.folder / "run.json").is_file()
        if job.folder.exists() and not started:
            # Killed before it said what it is.
            shutil.rmtree(job.folder)
        training = job.training
        assert isinstance(training, SegmentationTraining)
        shared: dict[str, Any] = {
            "plans_from": job.plans_from,
            "network": training.network if job.checkpoint is None and job.plans_from is None else None,
            "learning_rate": job.rate,
            "train_cases": job.train_cases,
            "validation_cases": [*job.selection, *job.validation],
            "seed": job.seed,
            "cache": job.cache,
            "device": job.device,
            "workers": job.workers,
            "resume": started,
            "quiet": True,
        }
        if training.trainer == "paired":
            _train_paired(self.settings.path, job, training, shared)
        else:
            _fine_tune(self.settings.path, job, training, shared)
        measured = measure_run(job.folder)
        largest = measure_run(job.folder, largest_component=True)
        values = {metric: measured.per_case(metric) for metric in METRICS}
        values |= {f"{metric}{LARGEST}": largest.per_case(metric) for metric in METRICS}
        return Result(
            selection=_part(values, job.selection) if job.selection else None,
            validation=_part(values, job.validation),
            plan=digest(json.loads((job.folder / "plans.json").read_text())),
            costs=_costs(job.folder),
        )

    def _patient(self, name: str) -> str:
        if self.settings.patient is None:
            return name
        found = re.fullmatch(self.settings.patient, name)
        if found is None:
            raise DataError(
                f"{name} does not match the expression for its patient, {self.settings.patient!r}. Mend `patient` in "
                "the recipe."
            )
        return found.group(1)

    def _given(self) -> set[str]:
        written = self.raw.folder / "splits_final.json"
        if self.settings.validation != "given":
            return set()
        try:
            return set(self.raw.select(json.loads(written.read_text())[0]["val"], str(written)))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"validation is given, and {written} does not say it ({error!r}). Give a number or names."
            ) from error


def _fine_tune(dataset: Path, job: Job, training: SegmentationTraining, shared: Mapping[str, Any]) -> None:
    if "semisupervised" in job.changes:
        raise UsageError(f"arms.{job.arm}.semisupervised needs training.trainer: paired.")
    own = training.model_dump(exclude={"trainer", "network"}) | {
        name: _AUGMENTATIONS.get(value, value) if name == "augmentation" else value
        for name, value in job.changes.items()
    }
    # One look, at the end, for the curve; nothing is chosen by it.
    finetune_segmentation(dataset, job.checkpoint, job.folder, val_every=own["steps"], val_batches=1, **own, **shared)


def _train_paired(dataset: Path, job: Job, training: SegmentationTraining, shared: Mapping[str, Any]) -> None:
    """Train by `medssl semisupervise`; the rest of the pool is what is not labelled."""
    method, settings = paired_method(job)
    if training.optimiser != "auto":
        settings = merged({"optimiser": {"name": training.optimiser}}, settings)
    used = {*job.train_cases, *job.selection, *job.validation}
    semisupervise_segmentation(
        method, dataset, job.checkpoint, job.folder, settings=settings, steps=training.steps,
        unlabelled_cases=[name for name in job.pool if name not in used], batch_size=training.batch_size,
        patch_size=training.patch_size, spacing=training.spacing, laterality=training.laterality,
        transfer_decoder=job.changes.get("transfer_decoder"), **shared,
    )  # fmt: skip


def _costs(run: Path) -> dict[str, float]:
    """Return seconds of training, and of the processor where the trainer counts them."""
    state = load_checkpoint(run / "fold_0" / "checkpoint_final.pth", numpy_scalars=True)["medssl"]
    if "elapsed_s" in state:
        return {"train_wall_s": float(state["elapsed_s"]), "train_cpu_s": float(state["cpu_s"])}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"train_wall_s": float(last["time"])}


def _part(values: Mapping[str, Mapping[str, Any]], cases: Sequence[str]) -> CaseValues:
    return CaseValues({metric: {case: column[case] for case in cases} for metric, column in values.items()})
