"""The verb that learns from labelled and unlabelled images at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medssl import options as o
from medssl.cli.apps import app
from medssl.cli.parsing import names, numbers, spacing_of
from medssl.screen import say


@app.command()
def semisupervise(
    dataset: o.Dataset,
    out: o.Out,
    method: o.SemiMethod = "mean-teacher",
    unlabelled: o.Unlabelled = None,
    checkpoint: o.SemiStartFrom = "none",
    labelled: o.Labelled = None,
    steps: o.RecipeSteps = None,
    recipe: o.Recipe = None,
    overrides: o.Overrides = None,
    train_cases: o.TrainCases = None,
    validation_cases: o.ValidationCases = None,
    learning_rate: o.LearningRate = None,
    transfer_decoder: o.TransferDecoder = None,
    plans_from: o.PlansFrom = None,
    network: o.Network = None,
    patch_size: o.PatchSize = None,
    batch_size: o.BatchSize = None,
    spacing: o.TargetSpacing = None,
    cache: o.Cache = None,
    laterality: o.Laterality = "forbid",
    seed: o.RecipeSeed = None,
    device: o.Device = "auto",
    workers: o.Workers = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Learn from a few labelled and many unlabelled images: segmentation of an nnU-Net data set, or classification.

    Without --unlabelled, the training cases that --labelled leaves over are used without their labels.
    `medssl list semisupervised` names the methods; `supervised` is the control under the same conditions.

    Example: `medssl semisupervise --method mean-teacher --dataset Task04 --labelled 8 --network resenc-xs --out run`
    """
    origin = None if checkpoint == "none" else Path(checkpoint)
    shared: dict[str, Any] = {
        "unlabelled": unlabelled,
        "labelled": labelled,
        "steps": steps,
        "recipe": recipe,
        "overrides": overrides or [],
        "learning_rate": learning_rate,
        "plans_from": plans_from,
        "network": network,
        "patch_size": numbers(patch_size, int, "--patch-size"),
        "batch_size": batch_size,
        "cache": cache,
        "laterality": laterality,
        "seed": seed,
        "device": device,
        "workers": workers,
        "resume": resume,
        "overwrite": overwrite,
        "quiet": quiet,
    }
    if (dataset / "dataset.json").is_file():
        from medssl.semisupervised.segmentation import semisupervise_segmentation

        semisupervise_segmentation(
            method, dataset, origin, out, train_cases=names(train_cases), validation_cases=names(validation_cases),
            transfer_decoder=transfer_decoder, spacing=spacing_of(spacing) if spacing else None, **shared,
        )  # fmt: skip
    else:
        from medssl.semisupervised.classification import semisupervise_classification

        if spacing:
            shared["spacing"] = spacing_of(spacing)
        semisupervise_classification(method, dataset, origin, out, **shared)
    say(f"Model: {out}\nLook at it: medssl report {out}")
