"""Verbs that measure what a model is worth."""

from __future__ import annotations

from medssl import options as o
from medssl.cli.apps import app, evaluate_app
from medssl.cli.parsing import names, numbers, spacing_of, stages_of
from medssl.screen import say, show


@evaluate_app.command("segmentation")
def evaluate_segmentation(
    predictions: o.Predictions,
    references: o.References,
    out: o.OptionalOut = None,
    as_json: o.AsJson = False,
) -> None:
    """Dice, Jaccard, HD95 and ASSD in mm, per label and case, with bootstrap intervals.

    Example: `medssl evaluate segmentation --predictions masks --references Task04/labelsTr --out scores`
    """
    from medssl.evaluation.segmentation import evaluate_segmentation as run

    result = run(predictions, references, out)
    show(result, as_json)


@evaluate_app.command("classification")
def evaluate_classification(
    predictions: o.Probabilities,
    references: o.TrueLabels = None,
    out: o.OptionalOut = None,
    kind: o.TargetKind = "auto",
    split: o.OnlySplit = None,
    common_cases: o.CommonCases = False,
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
) -> None:
    """AUROC, AUPR, decisions, kappa and calibration of a table of probabilities, with bootstrap intervals.

    Example: `medssl evaluate classification --predictions probabilities.csv --references labels.csv --out scores`
    """
    from medssl.evaluation.classification import evaluate_classification as run

    result = run(predictions, references, out, kind=kind, split=split, common_cases=common_cases, seed=seed)
    show(result, as_json)


@evaluate_app.command("probe")
def evaluate_probe(
    checkpoint: o.Encoder,
    dataset: o.ProbedImages,
    out: o.OptionalOut = None,
    probes: o.Probes = "linear,knn,prototypes",
    labels: o.LabelsOf = None,
    kind: o.LearntKind = "auto",
    classes: o.Classes = None,
    folds: o.Folds = None,
    fold: o.Fold = 0,
    labelled: o.Labelled = None,
    shots: o.Shots = "1,2,5,10,20",
    stages: o.Stages = "all",
    pooling: o.Pooling = "mean",
    fit: o.Fit = "whole",
    patch_size: o.PatchSize = None,
    spacing: o.Spacing = "median",
    normalisation: o.Normalisation = "by-modality",
    modality: o.Modality = None,
    grey: o.Grey = False,
    cache: o.Cache = None,
    control: o.Control = True,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """What frozen features know of labels of images: linear, nearest neighbours and few-shot.

    Example: `medssl evaluate probe run --dataset labels.csv --out probe`
    """
    from medssl.evaluation.probe import evaluate_probe as run
    from medssl.transfer.images import ImageOptions

    result = run(
        checkpoint,
        dataset,
        out,
        probes=names(probes) or [],
        labels=labels,
        kind=kind,
        classes=names(classes),
        folds=folds,
        fold=fold,
        labelled=labelled,
        shots=numbers(shots, int, "--shots"),
        stages=stages_of(stages),
        pooling=pooling,
        fit=fit,
        patch_size=numbers(patch_size, int, "--patch-size"),
        options=ImageOptions(spacing_of(spacing), normalisation, modality, grey, quiet=quiet),
        cache=cache,
        control=control,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    show(result, as_json)


@evaluate_app.command("segmentation-probe")
def evaluate_segmentation_probe(
    checkpoint: o.Encoder,
    store: o.ProbedStore,
    out: o.OptionalOut = None,
    steps: o.HeadSteps = 300,
    stages: o.Stages = "all",
    patch_size: o.PatchSize = None,
    control: o.Control = True,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """What frozen features know of labels of voxels: Dice of a 1x1 head on the stages.

    Example: `medssl evaluate segmentation-probe run --store labelled --out probe`
    """
    from medssl.evaluation.segmentation_probe import evaluate_segmentation_probe as run

    result = run(
        checkpoint,
        store,
        out,
        steps=steps,
        stages=stages_of(stages),
        patch_size=numbers(patch_size, int, "--patch-size"),
        control=control,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    show(result, as_json)


@evaluate_app.command("quality")
def evaluate_quality(
    checkpoint: o.Encoder,
    store: o.Store,
    out: o.OptionalOut = None,
    split: o.WhichSplit = "all",
    most: o.MostVolumes = 256,
    views: o.Views = 4,
    purpose: o.ViewPurpose = "contrastive",
    stages: o.Stages = "last",
    pooling: o.Pooling = "mean",
    control: o.Control = True,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Quality of features without labels, and whether they collapsed and why.

    Example: `medssl evaluate quality run --store store`
    """
    from medssl.evaluation.quality import evaluate_quality as run

    result = run(
        checkpoint,
        store,
        out,
        split=split,
        most=most,
        views=views,
        purpose=purpose,
        stages=stages_of(stages),
        pooling=pooling,
        control=control,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    show(result, as_json)


@evaluate_app.command("ood")
def evaluate_ood(
    checkpoint: o.Encoder,
    inside: o.Inside,
    outside: o.Outside = None,
    out: o.OptionalOut = None,
    labels: o.VolumeLabels = None,
    artefacts: o.Artefacts = True,
    modality: o.Modality = None,
    stages: o.Stages = "all",
    pooling: o.Pooling = "mean",
    most: o.MostVolumes = 500,
    untrained: o.Untrained = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """How well features tell strange volumes from known ones: artefacts, other scanners, organs, modalities.

    Example: `medssl evaluate ood run --in hippocampus --out-of atrium --out ood`
    """
    from medssl.evaluation.ood_run import evaluate_ood as run

    result = run(
        checkpoint,
        inside,
        outside or [],
        out,
        labels=labels,
        artefacts=artefacts,
        modality=modality,
        stages=stages_of(stages),
        pooling=pooling,
        most=most,
        untrained=untrained,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    show(result, as_json)


@app.command()
def compare(
    runs: o.Runs,
    common_cases: o.CommonCases = False,
    as_json: o.AsJson = False,
) -> None:
    """Compare runs case by case: paired differences with intervals.

    Example: `medssl compare scratch pretrained`
    """
    from medssl.evaluation.compare import compare as run

    show(run(runs, common_cases=common_cases), as_json)


@app.command()
def protocol(
    out: o.Out,
    recipe: o.ProtocolRecipe = None,
    overrides: o.Overrides = None,
    device: o.Device = "auto",
    workers: o.Workers = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare pretrainings under equal terms: arms x numbers of labels x seeds, with a scratch twin; can be resumed.

    Example: `medssl protocol --recipe pipelines/protocol_hippocampus.yaml --out protocols/hippocampus`
    """
    from medssl.protocol.run import protocol as run

    result = run(
        recipe,
        out,
        overrides=overrides or [],
        device=device,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    show(result, as_json)
    if not as_json:
        say(f"Tables and curves: {out / 'report.html'}")
