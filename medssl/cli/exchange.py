"""Verbs for other tools, for the eye, and for a first look."""

from __future__ import annotations

from pathlib import Path

import typer

from medssl import options as o
from medssl.cli.apps import app
from medssl.cli.parsing import numbers
from medssl.errors import EXIT_FAILURE
from medssl.screen import say, show, table


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
        patch_size=numbers(patch_size, int, "--patch-size"),
        overrides=overrides or [],
        draws=draws,
        seed=seed,
        quiet=quiet,
    )
    say(f"Contact sheet: {sheet}")


@app.command()
def doctor(
    model: o.AnyModel = None,
    sha256: o.ModelHash = None,
    as_json: o.AsJson = False,
) -> None:
    """Check this machine: libraries, decoders, devices, memory, folders, and a model if one is given.

    Ends with 0 if medssl can work here, be it with limits, and with 1 if a finding is `broken`.

    Example: `medssl doctor --model model`
    """
    from medssl.doctor import examine

    findings = examine(model, sha256)
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
