"""Verbs that use a model: masks, classes, features, points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from medssl import options as o
from medssl.cli.apps import app
from medssl.cli.parsing import names, numbers, spacing_of, stages_of
from medssl.errors import UsageError
from medssl.screen import finish, say, show


@app.command()
def predict(
    model: o.Model,
    input: o.Input,
    out: o.Out,
    step_size: o.StepSize = 0.5,
    mirroring: o.Mirroring = None,
    memory_mb: o.MemoryMb = None,
    format: o.MaskFormat = "nifti",
    codes: o.SegmentCodes = None,
    empty_frames: o.EmptyFrames = False,
    gates: o.GatesMode = "report",
    name_map: o.NameMap = None,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Segment volumes, each mask on the grid of its source; or classify images, as a CSV of probabilities.

    Example: `medssl predict --model model --input /pacs/series --out masks`

    Example: `medssl predict --model model --input /pacs/series --out segs --format dicom-seg`
    """
    from medssl.inference.predict import predict as run

    finish(
        run(
            model,
            input,
            out,
            device=device,
            step_size=step_size,
            mirroring=mirroring,
            memory_mb=memory_mb,
            format=format,
            codes=codes,
            empty_frames=empty_frames,
            gates=gates,
            name_map=name_map,
            overwrite=overwrite,
            quiet=quiet,
        ),
        out,
        as_json,
    )


@app.command()
def calibrate(
    run: o.CalibratedRun,
    dataset: o.TrainedOn = None,
    train_cases: o.TrainCases = None,
    validation_cases: o.ValidationCases = None,
    flag_rate: o.FlagRate = 0.05,
    modality: o.Modality = None,
    step_size: o.StepSize = 0.5,
    mirroring: o.Mirroring = None,
    memory_mb: o.MemoryMb = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write the input gates of a segmentation RUN: what its cases are like, and how sure it is of unseen ones.

    Example: `medssl calibrate model`
    """
    from medssl.inference.gates.calibration import calibrate as run_it

    result = run_it(
        run,
        dataset=dataset,
        train_cases=names(train_cases),
        validation_cases=names(validation_cases),
        flag_rate=flag_rate,
        modality=modality,
        step_size=step_size,
        mirroring=mirroring,
        memory_mb=memory_mb,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    show(result, as_json)
    if not as_json:
        say(f"Gates: {result.path}")


@app.command()
def embed(
    context: typer.Context,
    checkpoint: o.Encoder,
    out: o.Out,
    store: o.OptionalStore = None,
    dataset: o.EmbeddedImages = None,
    labels: o.LabelsOf = None,
    stages: o.Stages = "all",
    pooling: o.Pooling = "mean",
    boxes: o.Boxes = "cover",
    split: o.WhichSplit = "all",
    fit: o.Fit = "whole",
    patch_size: o.PatchSize = None,
    spacing: o.Spacing = "median",
    normalisation: o.Normalisation = "by-modality",
    modality: o.Modality = None,
    grey: o.Grey = False,
    cache: o.Cache = None,
    untrained: o.Untrained = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a feature of each volume or image to Parquet, for any tool; the report draws a map of them.

    --store covers each volume with boxes; --dataset takes what `finetune classification` takes (a CSV of paths, also
    without labels, a folder per class, a MedMNIST .npz) and brings whole images to the patch: --fit and what follows.

    Example: `medssl embed run --store store --out features`
    """
    from medssl.inference.embed import FEATURES, embed_images, embed_store
    from medssl.transfer.images import ImageOptions

    shared: dict[str, Any] = {
        "stages": stages_of(stages),
        "pooling": pooling,
        "split": split,
        "untrained": untrained,
        "seed": seed,
        "device": device,
        "overwrite": overwrite,
        "quiet": quiet,
    }
    if (store is None) == (dataset is None):
        raise UsageError("Give --store or --dataset, one of them.")
    given, other = ("--store", "--dataset") if dataset is None else ("--dataset", "--store")
    of_images = ("labels", "fit", "patch_size", "spacing", "normalisation", "modality", "grey", "cache")
    idle = _typed(context, of_images if dataset is None else ("boxes",))
    if idle:
        raise UsageError(f"{', '.join(idle)} only count with {other}: leave them away with {given}.")
    if store is not None:
        found = embed_store(checkpoint, store, out, boxes=boxes, **shared)
    elif dataset is not None:
        found = embed_images(
            checkpoint,
            dataset,
            out,
            labels=labels,
            fit=fit,
            patch_size=numbers(patch_size, int, "--patch-size"),
            options=ImageOptions(spacing_of(spacing), normalisation, modality, grey, quiet=quiet),
            cache=cache,
            **shared,
        )
    say(f"{len(found)} features of {found.features.shape[1]} numbers: {out / FEATURES}\nMap: medssl report {out}")


def _typed(context: typer.Context, parameters: Sequence[str]) -> list[str]:
    """Return the options among some that stand on the command line, also where they give the default."""
    sources = {name: context.get_parameter_source(name) for name in parameters}
    return [
        "--" + name.replace("_", "-") for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]


@app.command()
def match(
    model: o.VoxelModel,
    source: o.MatchFrom,
    target: o.MatchTo,
    point: o.Points = None,
    points: o.PointsFile = None,
    units: o.PointUnits = "mm",
    modality: o.VolumeModality = None,
    out: o.OptionalJson = None,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Find points of one volume in another by what the anatomy around them looks like.

    Example: `medssl match run --from a.nii.gz --to b.nii.gz --point 12.5,-30,44`
    """
    from medssl.inference.match import match as run

    given = points if points is not None else [numbers(text, float, "--point") for text in point or []]
    if points is not None and point:
        raise UsageError("Give --point or --points, not both.")
    show(
        run(model, source, target, given, units=units, modality=modality, out=out, device=device, quiet=quiet),
        as_json,
    )
