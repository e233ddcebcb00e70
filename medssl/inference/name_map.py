"""Which mask was made of which input files: written only where the user asks for it, since paths may name patients."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from medssl.errors import UsageError
from medssl.files import write_text
from medssl.inference.cases import Case


def check_name_map(file: Path | None, out: Path) -> None:
    """Refuse a table that would lie among the outputs, which tell nothing about patients.

    Raises:
        UsageError: If it would, or if it is a folder.
    """
    if file is None:
        return
    if file.is_dir():
        raise UsageError(f"--name-map {file} is a folder: name a CSV file.")
    if out.resolve() in file.resolve().parents:
        raise UsageError(
            f"--name-map {file} lies in --out: paths of inputs may name patients, and nothing in --out does. "
            "Write it elsewhere."
        )


def write_name_map(file: Path, cases: Sequence[Case], masks: Mapping[str, str], input: Path) -> None:
    """Write a CSV with a row for each input file: `mask`, `case`, `input`.

    `case` is the volume id of a DICOM series; `input` is relative to `--input`, or to its folder if that is a file.
    A case that was refused has no mask.

    Args:
        file: The CSV.
        cases: What there was to predict.
        masks: File name of each case's mask.
        input: What was given as `--input`.
    """
    root = input if input.is_dir() else input.parent
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["mask", "case", "input"])
    for case in cases:
        if case.series is None:
            paths = list(case.source)
        else:
            paths = [os.path.relpath(path, root) for path in case.series.files]
        for path in paths:
            writer.writerow([masks.get(case.name, ""), case.name, path])
    write_text(file, text.getvalue())
