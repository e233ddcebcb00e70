"""Verbs from an archive to a store."""

from __future__ import annotations

import typer

from medssl import options as o
from medssl.cli.apps import app, dataset_app
from medssl.cli.parsing import names, spacing_of
from medssl.screen import finish, show


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


@dataset_app.command("from-index")
def dataset_from_index(
    index: o.LabelledIndex,
    out: o.Out,
    labels: o.LabelNames = None,
    priority: o.LabelPriority = None,
    missing: o.MissingLabels = "refuse",
    select: o.Select = None,
    workers: o.Workers = None,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write the volumes of an INDEX that have a DICOM SEG or RTSTRUCT as an nnU-Net raw data set.

    Example: `medssl dataset from-index index --out liver --labels Liver`
    """
    from medssl.archive.label_dataset import dataset_from_index as run

    result = run(
        index,
        out,
        labels=names(labels),
        priority=names(priority),
        missing=missing,
        select=select,
        workers=workers,
        overwrite=overwrite,
        quiet=quiet,
    )
    finish(result, out, as_json)


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
            spacing=spacing_of(spacing),
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
