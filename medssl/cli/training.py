"""Verbs that train, and the one that tells how fast they are."""

from __future__ import annotations

from pathlib import Path

from medssl import options as o
from medssl.cli.apps import app, finetune_app
from medssl.cli.parsing import names, numbers, spacing_of
from medssl.screen import say, show


@app.command()
def pretrain(
    store: o.Store,
    out: o.Out,
    method: o.Method = None,
    recipe: o.Recipe = None,
    overrides: o.Overrides = None,
    steps: o.RecipeSteps = None,
    continue_from: o.ContinueFrom = None,
    device: o.Device = "auto",
    workers: o.Workers = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Pretrain an encoder without labels.

    metrics.jsonl also gets label-free quality (quality/...) now and then, and with `--set probes.labels=labels.csv`
    what a linear head, nearest neighbours and prototypes make of the features of labelled images (probe/...).

    Example: `medssl pretrain --method mae --store store --out run --set network=resenc-xs --steps 2000`
    """
    from medssl.pretraining.run import pretrain as run
    from medssl.transfer.probe_images import read_labelled

    result = run(
        method,
        store,
        out,
        recipe=recipe,
        overrides=overrides or [],
        steps=steps,
        continue_from=continue_from,
        resume=resume,
        overwrite=overwrite,
        device=device,
        workers=workers,
        quiet=quiet,
        read_labelled=read_labelled,
    )
    say(f"Checkpoint: {result}\nLook at it: medssl report {out}")


@app.command()
def bench(
    store: o.Store,
    method: o.Method = None,
    recipe: o.Recipe = None,
    overrides: o.Overrides = None,
    device: o.Device = "auto",
    workers: o.Workers = None,
    seconds: o.Seconds = 20.0,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure reading, augmentation and training on this machine and store, and say which of them limits and why.

    Example: `medssl bench --store store --recipe recipe.yaml --workers 2`
    """
    from medssl.pretraining.bench import bench as run

    result = run(
        store,
        method=method,
        recipe=recipe,
        overrides=overrides or [],
        device=device,
        workers=workers,
        seconds=seconds,
        quiet=quiet,
    )
    show(result, as_json)


@finetune_app.command("segmentation")
def finetune_segmentation(
    dataset: o.Dataset,
    checkpoint: o.StartFrom,
    out: o.Out,
    steps: o.Steps = 1000,
    val_every: o.ValEvery = 100,
    labelled: o.Labelled = None,
    train_cases: o.TrainCases = None,
    validation_cases: o.ValidationCases = None,
    learning_rate: o.LearningRate = None,
    optimiser: o.Optimiser = "auto",
    schedule: o.Schedule = "warmup",
    layer_decay: o.LayerDecay = 1.0,
    transfer_decoder: o.TransferDecoder = None,
    plans_from: o.PlansFrom = None,
    network: o.Network = None,
    patch_size: o.PatchSize = None,
    batch_size: o.BatchSize = None,
    spacing: o.TargetSpacing = None,
    cache: o.Cache = None,
    laterality: o.Laterality = "forbid",
    augmentation: o.Augmentation = "nnunet",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    workers: o.Workers = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Fine-tune for segmentation inside stock nnU-Net; the result is a valid nnU-Net model folder.

    Example: `medssl finetune segmentation --dataset Task04 --checkpoint run --out model --steps 1000`
    """
    from medssl.transfer.segmentation import finetune_segmentation as run

    run(
        dataset,
        None if checkpoint == "none" else Path(checkpoint),
        out,
        steps=steps,
        val_every=val_every,
        labelled=labelled,
        train_cases=names(train_cases),
        validation_cases=names(validation_cases),
        learning_rate=learning_rate,
        optimiser=optimiser,
        schedule=schedule,
        layer_decay=layer_decay,
        transfer_decoder=transfer_decoder,
        plans_from=plans_from,
        network=network,
        patch_size=numbers(patch_size, int, "--patch-size"),
        batch_size=batch_size,
        spacing=spacing_of(spacing) if spacing else None,
        cache=cache,
        laterality=laterality,
        augmentation=augmentation,
        seed=seed,
        device=device,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    say(f"Model: {out}\nLook at it: medssl report {out}")


@finetune_app.command("classification")
def finetune_classification(
    dataset: o.LabelledImages,
    checkpoint: o.StartFrom,
    out: o.Out,
    labels: o.LabelsOf = None,
    kind: o.LearntKind = "auto",
    classes: o.Classes = None,
    folds: o.Folds = None,
    fold: o.OneFold = None,
    labelled: o.Labelled = None,
    ignore_unlabelled: o.IgnoreUnlabelled = False,
    mode: o.Mode = "full",
    trained_stages: o.TrainedStages = 2,
    steps: o.Steps = 1000,
    val_every: o.ValEvery = 100,
    batch_size: o.BatchSize = None,
    learning_rate: o.LearningRate = None,
    schedule: o.Schedule = "warmup",
    layer_decay: o.LayerDecay = 1.0,
    balance: o.Balance = "none",
    select: o.SelectCheckpoint = "last",
    network: o.Network = None,
    plans_from: o.PlansFrom = None,
    patch_size: o.PatchSize = None,
    fit: o.Fit = "whole",
    spacing: o.Spacing = "median",
    normalisation: o.Normalisation = "by-modality",
    modality: o.Modality = None,
    grey: o.Grey = False,
    laterality: o.Mirrored = "forbid",
    overrides: o.Overrides = None,
    cache: o.Cache = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    workers: o.Workers = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Fine-tune for classification of whole images, 2D or 3D; splits are by patient.

    --folds 5 trains five classifiers, RUNs below --out that --resume goes on with: the metrics are of out-of-fold
    probabilities, folds.json has those of each fold, and `medssl predict --model OUT` averages the five.

    Example: `medssl finetune classification --dataset labels.csv --checkpoint run --out model --steps 1000`
    """
    from medssl.evaluation.classification import evaluate_classification as measure
    from medssl.transfer.classification import finetune_classification as run
    from medssl.transfer.classification_files import target_kind

    run(
        dataset,
        None if checkpoint == "none" else Path(checkpoint),
        out,
        labels=labels,
        kind=kind,
        classes=names(classes),
        folds=folds,
        fold=fold,
        labelled=labelled,
        ignore_unlabelled=ignore_unlabelled,
        mode=mode,
        trained_stages=trained_stages,
        steps=steps,
        val_every=val_every,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        layer_decay=layer_decay,
        balance=balance,
        select=select,
        network=network,
        plans_from=plans_from,
        patch_size=numbers(patch_size, int, "--patch-size"),
        fit=fit,
        spacing=spacing_of(spacing),
        normalisation=normalisation,
        modality=modality,
        grey=grey,
        laterality=laterality,
        overrides=overrides or [],
        cache=cache,
        seed=seed,
        device=device,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    show(measure(out, None, out / "validation", kind=target_kind(out)), as_json)
    if not as_json:
        say(f"Model: {out}\nLook at it: medssl report {out}")
