"""The command line: each verb parses, calls its Python twin, and says where the result is."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from medssl import __version__, registry
from medssl import options as o
from medssl.errors import EXIT_FAILURE, EXIT_OK, MedsslError, UsageError
from medssl.screen import complain, finish, say, show, table

app = typer.Typer(
    name="medssl",
    help="Pretrain on an unlabelled archive, fine-tune with few labels, predict. Research use only: no medical device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
finetune_app = typer.Typer(
    help="Train a model on labelled cases, from a checkpoint or from scratch.", no_args_is_help=True
)
evaluate_app = typer.Typer(help="Measure predictions against references.", no_args_is_help=True)
dataset_app = typer.Typer(help="Check and prepare public data sets.", no_args_is_help=True)
list_app = typer.Typer(help="List what can be named.", no_args_is_help=True)
app.add_typer(finetune_app, name="finetune")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(dataset_app, name="dataset")
app.add_typer(list_app, name="list")


def main() -> None:
    """Run the command line; an error a user can act on is one message and its exit code, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except MedsslError as error:
        complain(f"Error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("Stopped. The same command with --resume goes on from here.")
        sys.exit(130)


def _version(value: bool) -> None:
    if value:
        say(f"medssl {__version__} (research use only: not a medical device)")
        raise typer.Exit(EXIT_OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: o.Verbose = False,
) -> None:
    if verbose:
        logging.getLogger("medssl").setLevel(logging.INFO)


@app.command()
def index(
    sources: o.Sources,
    out: o.Out,
    geometry: o.Geometry = "strict",
    workers: o.Workers = None,
    key_file: o.KeyFile = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Index an archive: every file ends in a volume, as a related object, or refused with a code.

    Example: `medssl index /archive --out index`
    """
    from medssl.archive.index import index as run

    finish(
        run(
            sources,
            out,
            geometry=geometry,
            workers=workers,
            key_file=key_file,
            resume=resume,
            overwrite=overwrite,
            quiet=quiet,
        ),
        out,
        as_json,
    )


@app.command()
def convert(
    sources: o.Sources,
    out: o.Out,
    geometry: o.Geometry = "strict",
    workers: o.Workers = None,
    key_file: o.KeyFile = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write one NIfTI per accepted volume, named by its volume id.

    Example: `medssl convert /archive --out nifti --geometry repair`
    """
    from medssl.archive.convert import convert as run

    finish(
        run(
            sources,
            out,
            geometry=geometry,
            workers=workers,
            key_file=key_file,
            resume=resume,
            overwrite=overwrite,
            quiet=quiet,
        ),
        out,
        as_json,
    )


@dataset_app.command("prepare")
def dataset_prepare(
    name: o.DatasetName,
    source: o.Downloaded,
    out: o.Out,
    files: o.Files = "copy",
    partial: o.Partial = False,
    workers: o.Workers = None,
    key_file: o.KeyFile = None,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Check a public data set that you downloaded, list all that is wrong with it, and write it for training.

    Example: `medssl dataset prepare msd_task04_hippocampus --source Task04_Hippocampus --out hippocampus`
    """
    from medssl.archive.prepare import prepare_dataset as run

    result = run(
        name,
        source,
        out,
        files=files,
        partial=partial,
        workers=workers,
        key_file=key_file,
        overwrite=overwrite,
        quiet=quiet,
    )
    show(result, as_json)
    raise typer.Exit(result.exit_code)


@app.command()
def preprocess(
    index: o.Index,
    out: o.Out,
    select: o.Select = None,
    spacing: o.Spacing = "median",
    normalisation: o.Normalisation = "by-modality",
    codec: o.Codec = "lossless",
    workers: o.Workers = None,
    scheduler: o.Scheduler = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Orient, crop, resample and normalise the volumes of an INDEX into a store.

    Example: `medssl preprocess index --out store --select "modality = 'CT'" --spacing 1.5,1.5,1.5`
    """
    from medssl.preprocessing.run import preprocess as run

    finish(
        run(
            index,
            out,
            select=select,
            spacing=_spacing(spacing),
            normalisation=normalisation,
            codec=codec,
            workers=workers,
            scheduler=scheduler,
            resume=resume,
            overwrite=overwrite,
            quiet=quiet,
        ),
        out,
        as_json,
    )


@app.command()
def pretrain(
    store: o.Store,
    out: o.Out,
    method: o.Method = None,
    recipe: o.Recipe = None,
    overrides: o.Overrides = None,
    steps: o.RecipeSteps = None,
    device: o.Device = "auto",
    workers: o.Workers = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Pretrain an encoder without labels.

    Example: `medssl pretrain --method mae --store store --out run --set network=resenc-xs --steps 2000`
    """
    from medssl.pretraining.run import pretrain as run

    result = run(
        method,
        store,
        out,
        recipe=recipe,
        overrides=overrides or [],
        steps=steps,
        resume=resume,
        overwrite=overwrite,
        device=device,
        workers=workers,
        quiet=quiet,
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
        train_cases=_names(train_cases),
        validation_cases=_names(validation_cases),
        learning_rate=learning_rate,
        optimiser=optimiser,
        schedule=schedule,
        layer_decay=layer_decay,
        transfer_decoder=transfer_decoder,
        plans_from=plans_from,
        network=network,
        patch_size=_numbers(patch_size, int, "--patch-size"),
        batch_size=batch_size,
        spacing=_spacing(spacing) if spacing else None,
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
    fold: o.Fold = 0,
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
        classes=_names(classes),
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
        patch_size=_numbers(patch_size, int, "--patch-size"),
        fit=fit,
        spacing=_spacing(spacing),
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


@app.command()
def predict(
    model: o.Model,
    input: o.Input,
    out: o.Out,
    step_size: o.StepSize = 0.5,
    mirroring: o.Mirroring = None,
    memory_mb: o.MemoryMb = None,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Segment volumes, each mask on the grid of its source; or classify images, as a CSV of probabilities.

    Example: `medssl predict --model model --input /pacs/series --out masks`
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
            overwrite=overwrite,
            quiet=quiet,
        ),
        out,
        as_json,
    )


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
    dataset: o.ProbedImages = None,
    store: o.ProbedStore = None,
    out: o.OptionalOut = None,
    probes: o.Probes = "linear,knn,prototypes",
    labels: o.LabelsOf = None,
    kind: o.LearntKind = "auto",
    classes: o.Classes = None,
    folds: o.Folds = None,
    fold: o.Fold = 0,
    labelled: o.Labelled = None,
    shots: o.Shots = "1,2,5,10,20",
    steps: o.HeadSteps = 300,
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
    """What frozen features know of labels: linear, nearest neighbours, few-shot, and a segmentation probe.

    Example: `medssl evaluate probe run --dataset labels.csv --out probe`
    """
    if (dataset is None) == (store is None):
        raise UsageError("evaluate probe takes --dataset for images with classes, or --store for labels of voxels.")
    patch = _numbers(patch_size, int, "--patch-size")
    if store is not None:
        from medssl.evaluation.segmentation_probe import evaluate_segmentation_probe

        segmentation = evaluate_segmentation_probe(
            checkpoint, store, out, steps=steps, stages=_stages(stages), patch_size=patch, control=control, seed=seed,
            device=device, quiet=quiet,
        )  # fmt: skip
        show(segmentation, as_json)
        return
    from medssl.evaluation.probe import evaluate_probe as run
    from medssl.transfer.images import ImageOptions

    assert dataset is not None
    result = run(
        checkpoint,
        dataset,
        out,
        probes=_names(probes) or [],
        labels=labels,
        kind=kind,
        classes=_names(classes),
        folds=folds,
        fold=fold,
        labelled=labelled,
        shots=_numbers(shots, int, "--shots"),
        stages=_stages(stages),
        pooling=pooling,
        fit=fit,
        patch_size=patch,
        options=ImageOptions(_spacing(spacing), normalisation, modality, grey, quiet=quiet),
        cache=cache,
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
        stages=_stages(stages),
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
        stages=_stages(stages),
        pooling=pooling,
        most=most,
        untrained=untrained,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    show(result, as_json)


@app.command()
def embed(
    checkpoint: o.Encoder,
    store: o.Store,
    out: o.Out,
    stages: o.Stages = "all",
    pooling: o.Pooling = "mean",
    boxes: o.Boxes = "cover",
    split: o.WhichSplit = "all",
    untrained: o.Untrained = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a feature of each volume of a store to Parquet, for any tool; the report draws a map of them.

    Example: `medssl embed run --store store --out features`
    """
    from medssl.inference.embed import FEATURES, embed_store

    found = embed_store(
        checkpoint,
        store,
        out,
        stages=_stages(stages),
        pooling=pooling,
        boxes=boxes,
        split=split,
        untrained=untrained,
        seed=seed,
        device=device,
        overwrite=overwrite,
        quiet=quiet,
    )
    say(f"{len(found)} features of {found.features.shape[1]} numbers: {out / FEATURES}\nMap: medssl report {out}")


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


@app.command()
def export(
    run: o.Checkpoint,
    out: o.OutFile,
    format: o.Format = "nnunet",
    plans: o.Plans = None,
) -> None:
    """Write a checkpoint for another tool.

    Example: `medssl export run --format nnunet --out encoder.pth`
    """
    from medssl.transfer.export import export as write

    say(f"Written: {write(run, format, out, plans=plans)}")


@app.command("import")
def import_(
    file: o.ForeignCheckpoint,
    out: o.OutFile,
    as_json: o.AsJson = False,
) -> None:
    """Read another tool's checkpoint, say what became of each key, and refuse pickles.

    Example: `medssl import checkpoint_final.pth --out openmind.pt`
    """
    from medssl.transfer.importing import import_checkpoint

    show(import_checkpoint(file, out), as_json)


@app.command()
def report(run: o.Run) -> None:
    """Write one self-contained HTML page about a run.

    Example: `medssl report run`
    """
    from medssl.report.page import report as write

    say(f"Report: {write(run)}")


@app.command()
def preview(
    source: o.Previewed,
    out: o.OutFile,
    purpose: o.Purpose = "strong",
    patch_size: o.PatchSize = None,
    overrides: o.Overrides = None,
    draws: o.Draws = 5,
    seed: o.Seed = 0,
    quiet: o.Quiet = False,
) -> None:
    """Draw what an augmentation policy does to a volume of yours: the whole policy, then each transform alone.

    Example: `medssl preview /archive/patient/series --purpose contrastive --set modality=MR --out sheet.png`
    """
    from medssl.report.contact_sheet import contact_sheet

    sheet = contact_sheet(
        source,
        out,
        purpose=purpose,
        patch_size=_numbers(patch_size, int, "--patch-size"),
        overrides=overrides or [],
        draws=draws,
        seed=seed,
        quiet=quiet,
    )
    say(f"Contact sheet: {sheet}")


@list_app.command("methods")
def list_methods(as_json: o.AsJson = False) -> None:
    """Pretraining methods."""
    table("Methods", registry.METHODS.values(), as_json)


@list_app.command("networks")
def list_networks(as_json: o.AsJson = False) -> None:
    """Networks."""
    table("Networks", registry.NETWORKS.values(), as_json)


@list_app.command("policies")
def list_policies(as_json: o.AsJson = False) -> None:
    """Augmentation policies by purpose and modality."""
    from medssl.augmentation.policy import list_policies as policies

    table("Policies", policies(), as_json)


@list_app.command("datasets")
def list_datasets(as_json: o.AsJson = False) -> None:
    """Public data sets that `medssl dataset prepare` knows."""
    from medssl.archive.datasets import manifests

    table("Data sets", manifests().values(), as_json)


@list_app.command("codes")
def list_codes(as_json: o.AsJson = False) -> None:
    """Reason codes of refusals, related objects, repairs and flags, and what to do about each."""
    from medssl.archive.codes import CODES

    table("Codes", [asdict(code) for code in CODES.values()], as_json)


@app.command()
def doctor(
    model: o.AnyModel = None,
    as_json: o.AsJson = False,
) -> None:
    """Check this machine: libraries, decoders, devices, memory, and a model if one is given.

    Example: `medssl doctor --model model`
    """
    from medssl.doctor import examine

    findings = examine(model)
    table("Findings", findings, as_json)
    if any(finding.verdict == "broken" for finding in findings):
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def demo(
    out: o.DemoOut = Path("demo"),
    quick: o.Quick = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a phantom archive and take it through index, pretraining, fine-tuning, prediction and report.

    Example: `medssl demo --out demo`
    """
    from medssl.demo.run import demo as run

    run(out, quick=quick, overwrite=overwrite, quiet=quiet)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str | None, kind: type, option: str) -> Any:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes numbers with commas between them, got '{text}'.") from error


def _stages(text: str) -> Any:
    return text if text in ("all", "last") else _numbers(text, int, "--stages")


def _spacing(text: str) -> Any:
    return text if text in ("median", "native", "pretraining") else _numbers(text, float, "--spacing")
