"""Fine-tuning for segmentation inside stock nnU-Net: raw data set and checkpoint in, nnU-Net model folder out."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medssl.errors import DataError, UsageError, unknown_name
from medssl.files import write_json
from medssl.lock import claimed_folder
from medssl.transfer import runfiles
from medssl.transfer.fingerprint import fingerprint
from medssl.transfer.laterality import check_policy, paired_labels
from medssl.transfer.plans import configuration_name, make_plans
from medssl.transfer.preprocessed import preprocess_cases
from medssl.transfer.raw import RawDataset, read_dataset
from medssl.transfer.running import resolve_device, run_trainer
from medssl.transfer.schedule import choose_optimiser, default_rate
from medssl.transfer.selection import Selection, select_cases
from medssl.transfer.settings import AUGMENTATIONS, Augmentation, TrainingSettings
from medssl.transfer.source import Source, load_source

logger = logging.getLogger(__name__)


def finetune_segmentation(
    dataset: Path,
    checkpoint: Path | None,
    out: Path,
    *,
    steps: int = 1000,
    val_every: int = 100,
    val_batches: int = 8,
    learning_rate: float | None = None,
    optimiser: str = "auto",
    schedule: str = "warmup",
    warmup_fraction: float = 0.1,
    frozen_fraction: float = 0.2,
    layer_decay: float = 1.0,
    transfer_decoder: bool | None = None,
    train_cases: Sequence[str] | None = None,
    validation_cases: Sequence[str] | None = None,
    labelled: int | None = None,
    seed: int = 0,
    network: str | None = None,
    plans_from: Path | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    spacing: Sequence[float] | str | None = None,
    device: str = "auto",
    workers: int | None = None,
    laterality: str = "forbid",
    augmentation: Augmentation = "nnunet",
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Train a segmentation model on the labelled cases of a raw data set.

    The last checkpoint is the model; nothing is selected on the validation cases. Given the same options, seed, number
    of threads and CPU, two runs are equal bit for bit, also when one of them was killed and resumed; on a GPU
    they are equal but for the order of floating-point sums.

    Args:
        dataset: nnU-Net raw folder, of any name; it is never changed.
        checkpoint: A pretraining RUN or a checkpoint file, or None for the scratch twin.
        out: The RUN, which is an nnU-Net model folder too.
        steps: Steps of the optimiser.
        val_every: Steps between two looks at the validation cases; a checkpoint is written at each.
        val_batches: Batches of each look.
        learning_rate: Peak rate; by default 3e-3 for AdamW; for SGD 1e-3, and 1e-2 from scratch, as in the references.
        optimiser: `sgd` (nnU-Net's), `adamw`, or `auto`: AdamW where the steps are too few for SGD.
        schedule: warmup, sawtooth, frozen, poly or constant.
        warmup_fraction: Part of the run in which the rate rises.
        frozen_fraction: Part at the start in which the encoder stands still (sawtooth, frozen).
        layer_decay: Factor on the rate per level from the decoder down to the stem; 1 is one rate for all.
        transfer_decoder: Take the decoder too; None does so where pretraining trained it.
        train_cases: Cases to learn from.
        validation_cases: Cases to look at; an empty list for none.
        labelled: Use only so many of the training cases, drawn by the seed.
        seed: Of everything random.
        network: Network of a run from scratch.
        plans_from: Checkpoint whose network, patch and spacing a run from scratch copies.
        patch_size: Edges of a crop; by default the pretraining's, cut to the median image.
        batch_size: Crops per step; 2 by default.
        spacing: `median` of the data set (default), `pretraining`, or millimetres (z, y, x).
        device: auto, cpu, cuda or cuda:N.
        workers: Processes that preprocess and make batches; 0 works in this process.
        laterality: Left-right mirroring: forbid, swap-labels or allow.
        augmentation: `nnunet` is nnU-Net's own, made by the workers; `medssl` our policy `fine-tuning` for the data
            set's modality, made on the device; `medssl-strong` our policy `strong`.
        cache: Folder for preprocessed data that several runs share; by default it lies in the RUN.
        resume: Continue the RUN from its last checkpoint.
        overwrite: Replace the RUN.
        quiet: Show no progress.

    Returns:
        The RUN: `dataset.json`, `plans.json`, `fold_0/checkpoint_final.pth`, `validation/<case>`, `transfer.json` (what
        became of each key) and the files of every RUN.

    Raises:
        UsageError: If options do not fit together.
        DataError: If the data set cannot be used; case, values and remedy are named.
        CheckpointError: If the checkpoint is damaged, unsafe or does not fit.
    """
    dataset, out = Path(dataset), Path(out)
    check_policy(laterality)
    if augmentation not in AUGMENTATIONS:
        raise unknown_name("augmentation", augmentation, AUGMENTATIONS)
    source = template_of(checkpoint, plans_from, network)
    raw = read_dataset(dataset)
    if laterality == "swap-labels":
        paired_labels(raw.content["labels"])
    selection = select_cases(
        raw, train_cases=train_cases, validation_cases=validation_cases, labelled=labelled, seed=seed
    )
    optimiser = choose_optimiser(optimiser, steps)
    chosen_rate = default_rate(optimiser, checkpoint is not None) if learning_rate is None else learning_rate
    target = resolve_device(device)
    settings = TrainingSettings(
        steps=steps, val_every=min(val_every, steps), val_batches=val_batches, learning_rate=chosen_rate,
        optimiser=optimiser, schedule=schedule, warmup_fraction=warmup_fraction, frozen_fraction=frozen_fraction,
        layer_decay=layer_decay, laterality=laterality, augmentation=augmentation, seed=seed,
        workers=runfiles.loader_workers(workers, target),
        checkpoint=None if checkpoint is None or source is None else source.path, transfer_decoder=transfer_decoder,
        train_cases=selection.train, validation_cases=selection.validation,
    )  # fmt: skip
    settings.make_schedule()
    if checkpoint is None and schedule in ("sawtooth", "frozen"):
        logger.warning("Schedule %s holds the encoder still at first; from scratch it is random there.", schedule)
    recipe = runfiles.recipe(
        raw, checkpoint, settings, source, network=network, plans_from=plans_from, patch_size=patch_size,
        batch_size=batch_size, spacing=spacing, cache=cache,
    )  # fmt: skip
    with claimed_folder(out, resume=resume, overwrite=overwrite, owned=runfiles.is_ours):
        runfiles.check_resumed(out, recipe)
        runfiles.write_claim(out, settings)
        preprocessed = (cache or out / "preprocessed") / raw.name
        try:
            plans = settle_plans(
                raw, selection, source, out, preprocessed, network, patch_size, batch_size, spacing, workers, quiet
            )
            configuration = next(iter(plans["configurations"]))
            everything = sorted({*selection.train, *selection.validation})
            data = preprocess_cases(raw, plans, configuration, everything, preprocessed, workers=workers, quiet=quiet)
        except (DataError, UsageError):
            if not resume:
                shutil.rmtree(out)
            raise
        runfiles.write_start(
            out, recipe, raw, selection, plans, configuration, preprocessed, settings, shared=cache is not None
        )
        run_trainer(out, plans, configuration, raw, settings, data, target, resume=resume, quiet=quiet)
        runfiles.write_end(out, settings)
    return out


def template_of(checkpoint: Path | None, plans_from: Path | None, network: str | None) -> Source | None:
    """Return the checkpoint that decides the network, or None if a name does."""
    if checkpoint is not None:
        if network is not None or plans_from is not None:
            raise UsageError(
                "--network and --plans-from are for a run from scratch (--checkpoint none); the checkpoint "
                "decides the network."
            )
        return load_source(Path(checkpoint))
    if (network is None) == (plans_from is None):
        raise UsageError(
            "A run from scratch needs either --plans-from CHECKPOINT (the twin of a fine-tuned run) or --network NAME."
        )
    return load_source(Path(plans_from)) if plans_from is not None else None


def settle_plans(
    raw: RawDataset,
    selection: Selection,
    source: Source | None,
    out: Path,
    preprocessed: Path,
    network: str | None,
    patch_size: Sequence[int] | None,
    batch_size: int | None,
    spacing: Sequence[float] | str | None,
    workers: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """Return the RUN's plans: those that it has already, else new ones for its training cases."""
    written = out / "plans.json"
    if written.is_file() and (out / "recipe.yaml").is_file():
        plans: dict[str, Any] = json.loads(written.read_text())
        return plans
    facts = fingerprint(raw, selection.train, preprocessed / "fingerprint", workers=workers, quiet=quiet)
    # Validation cases are checked as strictly, but what is planned does not depend on them.
    if selection.validation:
        fingerprint(raw, selection.validation, preprocessed / "fingerprint", workers=workers, quiet=quiet)
    architecture = source.architecture if source is not None else runfiles.named_architecture(network, facts)
    plans = make_plans(
        raw,
        facts,
        architecture,
        patch_size=patch_size,
        wanted_patch=source.patch_size if source is not None else None,
        batch_size=2 if batch_size is None else batch_size,
        spacing=_target_spacing(spacing, source),
    )
    write_json(out / "dataset_fingerprint.json", facts)
    assert configuration_name(architecture.dimensions) in plans["configurations"]
    return plans


def _target_spacing(spacing: Sequence[float] | str | None, source: Source | None) -> Sequence[float] | None:
    if spacing is None or spacing == "median":
        return None
    if spacing == "pretraining":
        if source is None or source.spacing_mm is None:
            raise UsageError(
                "spacing pretraining: the checkpoint was trained at the images' own spacing. Use median, or "
                "millimetres as Z,Y,X."
            )
        return source.spacing_mm
    if isinstance(spacing, str):
        raise UsageError(
            f"spacing takes median, pretraining or millimetres as Z,Y,X, got '{spacing}'. nnU-Net always "
            "resamples to one spacing."
        )
    return spacing
