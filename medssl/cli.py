"""The command line: each verb parses, calls its Python twin, and says where the result is."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from medssl import __version__, registry
from medssl.errors import EXIT_FAILURE, EXIT_OK, MedsslError, UsageError

app = typer.Typer(
    name="medssl",
    help="Pretrain on an unlabelled hospital archive, fine-tune with few labels, predict. Research use only: not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
finetune_app = typer.Typer(
    help="Train a model on labelled cases, from a checkpoint or from scratch.", no_args_is_help=True
)
evaluate_app = typer.Typer(help="Measure predictions against references.", no_args_is_help=True)
list_app = typer.Typer(help="List what can be named.", no_args_is_help=True)
app.add_typer(finetune_app, name="finetune")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(list_app, name="list")

screen = Console()
errors = Console(stderr=True)

Sources = Annotated[list[Path], typer.Argument(help="Folders or files of the archive.", show_default=False)]
Out = Annotated[Path, typer.Option(help="Folder for the result.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what is in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
Geometry = Annotated[
    Literal["strict", "repair"],
    typer.Option(
        help="strict refuses irregular slices; repair resamples tilt and interpolates single gaps, and flags them."
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes; by default what the machine has.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        envvar="MEDSSL_KEY_FILE",
        help="Secret of the pseudonyms; by default one is made in OUT/private.",
        show_default=False,
    ),
]


def main() -> None:
    """Run the command line; an error a user can act on is one message and its exit code, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except MedsslError as error:
        errors.print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("Stopped. The same command with --resume goes on from here.")
        sys.exit(130)


def _version(value: bool) -> None:
    if value:
        screen.print(f"medssl {__version__} (research use only: not a medical device)")
        raise typer.Exit(EXIT_OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
) -> None:
    if verbose:
        logging.getLogger("medssl").setLevel(logging.INFO)


@app.command()
def index(
    sources: Sources,
    out: Out,
    geometry: Geometry = "strict",
    workers: Workers = None,
    key_file: KeyFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Index an archive: every file ends in a volume, as a related object, or refused with a code.

    Example: `medssl index /archive --out index`
    """
    from medssl.archive.index import index as run

    _finish(
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
    sources: Sources,
    out: Out,
    geometry: Geometry = "strict",
    workers: Workers = None,
    key_file: KeyFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one NIfTI per accepted volume, named by its volume id.

    Example: `medssl convert /archive --out nifti --geometry repair`
    """
    from medssl.archive.convert import convert as run

    _finish(
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
def preprocess(
    index: Annotated[
        Path, typer.Argument(help="An INDEX, an nnU-Net raw data set, or a folder of NIfTI files.", show_default=False)
    ],
    out: Out,
    select: Annotated[
        str | None, typer.Option(help="SQL condition on the INDEX: \"modality = 'MR' AND body_part = 'BRAIN'\".")
    ] = None,
    spacing: Annotated[str, typer.Option(help="median, native, or millimetres as Z,Y,X: 1.5,1,1.")] = "median",
    normalisation: Annotated[str, typer.Option(help="by-modality, or the name of one scheme for all.")] = "by-modality",
    workers: Workers = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler, or local.", show_default=False)
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Orient, crop, resample and normalise the volumes of an INDEX into a store.

    Example: `medssl preprocess index --out store --select "modality = 'CT'" --spacing 1.5,1.5,1.5`
    """
    from medssl.preprocessing.run import preprocess as run

    _finish(
        run(
            index,
            out,
            select=select,
            spacing=_spacing(spacing),
            normalisation=normalisation,
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
    store: Annotated[Path, typer.Option(help="A store, or an nnU-Net preprocessed folder.", show_default=False)],
    out: Out,
    method: Annotated[
        str | None,
        typer.Option(help="See `medssl list methods`; by default what the recipe names, else mae.", show_default=False),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of settings.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, a.b=c; may be repeated.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimiser.", show_default=False)] = None,
    device: Device = "auto",
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
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
    screen.print(f"Checkpoint: {result}\nLook at it: medssl report {out}", highlight=False, soft_wrap=True)


@finetune_app.command("segmentation")
def finetune_segmentation(
    dataset: Annotated[
        Path, typer.Option(help="nnU-Net raw folder: imagesTr, labelsTr, dataset.json.", show_default=False)
    ],
    checkpoint: Annotated[
        str,
        typer.Option(help="A pretraining RUN, a checkpoint file, or none for the scratch twin.", show_default=False),
    ],
    out: Out,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 1000,
    val_every: Annotated[int, typer.Option(min=1, help="Steps between two looks at the validation cases.")] = 100,
    labelled: Annotated[
        int | None, typer.Option(min=1, help="Use only so many labelled cases.", show_default=False)
    ] = None,
    train_cases: Annotated[
        str | None, typer.Option(help="Names of training cases, with commas.", show_default=False)
    ] = None,
    validation_cases: Annotated[
        str | None, typer.Option(help="Names of validation cases, with commas.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak rate; by default what fits the schedule and checkpoint.", show_default=False),
    ] = None,
    schedule: Annotated[str, typer.Option(help="warmup, sawtooth, frozen, poly or constant.")] = "warmup",
    transfer_decoder: Annotated[
        bool | None,
        typer.Option(
            "--transfer-decoder/--encoder-only",
            help="By default the decoder comes along where it was pretrained.",
            show_default=False,
        ),
    ] = None,
    plans_from: Annotated[
        Path | None, typer.Option(help="Checkpoint whose plans a scratch twin copies.", show_default=False)
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Network of a run from scratch; see `medssl list networks`.", show_default=False)
    ] = None,
    patch_size: Annotated[str | None, typer.Option(help="Voxels as Z,Y,X.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Crops per step.", show_default=False)] = None,
    spacing: Annotated[str | None, typer.Option(help="median, or millimetres as Z,Y,X.", show_default=False)] = None,
    laterality: Annotated[
        Literal["forbid", "swap-labels", "allow"],
        typer.Option(help="Left-right mirroring: forbid it, swap the labels of paired organs, or allow it."),
    ] = "forbid",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = "auto",
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
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
        schedule=schedule,
        transfer_decoder=transfer_decoder,
        plans_from=plans_from,
        network=network,
        patch_size=_numbers(patch_size, int, "--patch-size"),
        batch_size=batch_size,
        spacing=_spacing(spacing) if spacing else None,
        laterality=laterality,
        seed=seed,
        device=device,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    screen.print(f"Model: {out}\nLook at it: medssl report {out}", highlight=False, soft_wrap=True)


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="A segmentation RUN.", show_default=False)],
    input: Annotated[Path, typer.Option(help="A NIfTI file, a folder of them, or a DICOM series.", show_default=False)],
    out: Out,
    step_size: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Step of the sliding window as a part of the patch.")
    ] = 0.5,
    mirroring: Annotated[
        bool | None,
        typer.Option(
            "--mirroring/--no-mirroring", help="By default where the model's policy allows it.", show_default=False
        ),
    ] = None,
    memory_mb: Annotated[
        int | None, typer.Option(min=256, help="Memory that accumulating the result may take.", show_default=False)
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Segment volumes; each mask lies on the grid of its source.

    Example: `medssl predict --model model --input /pacs/series --out masks`
    """
    from medssl.inference.predict import predict as run

    _finish(
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
    predictions: Annotated[Path, typer.Option(help="Folder of masks, or a segmentation RUN.", show_default=False)],
    references: Annotated[
        Path, typer.Option(help="Folder of reference masks, or an nnU-Net raw data set.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json and cases.csv.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Dice, Jaccard, HD95 and ASSD in mm, per label and case, with bootstrap intervals.

    Example: `medssl evaluate segmentation --predictions masks --references Task04/labelsTr --out scores`
    """
    from medssl.evaluation.segmentation import evaluate_segmentation as run

    result = run(predictions, references, out)
    _show(result, as_json)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Two or more segmentation RUNs, the first is the baseline.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Compare runs case by case: paired differences with intervals.

    Example: `medssl compare scratch pretrained`
    """
    from medssl.evaluation.compare import compare as run

    _show(run(runs), as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A pretraining RUN or a checkpoint file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write.", show_default=False)],
    format: Annotated[Literal["nnunet", "nnssl", "safetensors"], typer.Option(help="Who shall read it.")] = "nnunet",
    plans: Annotated[
        Path | None, typer.Option(help="nnU-Net plans the file shall fit (--format nnunet).", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint for another tool.

    Example: `medssl export run --format nnunet --out encoder.pth`, then `nnUNetv2_train ... -pretrained_weights encoder.pth`
    """
    from medssl.transfer.export import export as write

    screen.print(f"Written: {write(run, format, out, plans=plans)}", highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An nnssl, OpenMind or nnU-Net checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Read another tool's checkpoint, say what became of each key, and refuse pickles.

    Example: `medssl import checkpoint_final.pth --out openmind.pt`
    """
    from medssl.transfer.importing import import_checkpoint

    _show(import_checkpoint(file, out), as_json)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A RUN.", show_default=False)]) -> None:
    """Write one self-contained HTML page about a run.

    Example: `medssl report run`
    """
    from medssl.report.page import report as write

    screen.print(f"Report: {write(run)}", highlight=False, soft_wrap=True)


@list_app.command("methods")
def list_methods(as_json: AsJson = False) -> None:
    """Pretraining methods."""
    _table("Methods", registry.METHODS.values(), as_json)


@list_app.command("networks")
def list_networks(as_json: AsJson = False) -> None:
    """Networks."""
    _table("Networks", registry.NETWORKS.values(), as_json)


@app.command()
def doctor(
    model: Annotated[
        Path | None, typer.Option(help="A RUN or checkpoint to load and verify.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: libraries, decoders, devices, memory, and a model if one is given.

    Example: `medssl doctor --model model`
    """
    from medssl.doctor import examine

    findings = examine(model)
    _table("Findings", findings, as_json)
    if any(finding.verdict == "broken" for finding in findings):
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer patients and steps: shows that it runs, not what it can do.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a phantom archive and take it through index, pretraining, fine-tuning, prediction and report.

    Example: `medssl demo --out demo`
    """
    from medssl.demo.run import demo as run

    run(out, quick=quick, overwrite=overwrite, quiet=quiet)


def _finish(summary: Any, out: Path, as_json: bool) -> None:
    _show(summary, as_json)
    if not as_json:
        screen.print(f"Result: {out}", highlight=False, soft_wrap=True)
    raise typer.Exit(summary.exit_code)


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result.to_json(), indent=2) + "\n")
    else:
        screen.print(result, highlight=False)


def _table(title: str, entries: Any, as_json: bool) -> None:
    rows = [entry.row() for entry in entries]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table(title=title)
    for name in rows[0] if rows else ():
        table.add_column(name)
    for row in rows:
        table.add_row(
            *(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) for value in row.values())
        )
    screen.print(table)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str | None, kind: type, option: str) -> Any:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes numbers with commas between them, got '{text}'.") from error


def _spacing(text: str) -> Any:
    return text if text in ("median", "native") else _numbers(text, float, "--spacing")
