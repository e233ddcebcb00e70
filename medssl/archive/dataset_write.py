"""The files that `medssl dataset prepare` writes: nnU-Net raw data, images by class, and the tables of cases."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medssl.archive.dataset_cases import CaseTask, write_case
from medssl.archive.dataset_files import Content, FoundCase
from medssl.archive.datasets import Manifest
from medssl.archive.find import absolute
from medssl.archive.sandbox import Pool
from medssl.errors import MedsslError
from medssl.files import atomic_path, write_json, write_text
from medssl.progress import progress

TABLE = "cases.csv"
CLASSES = "labels.csv"


def write_nnunet(
    entry: Manifest,
    whole: Mapping[str, FoundCase],
    tasks: Mapping[str, CaseTask],
    out: Path,
    pool: Pool,
    *,
    hardlink: bool,
    quiet: bool,
) -> None:
    """Write an nnU-Net raw data set.

    Args:
        entry: The manifest.
        whole: Cases without a problem.
        tasks: What is needed to decode each.
        out: The folder.
        pool: Processes.
        hardlink: Link what needs no change.
        quiet: Show no progress.

    Raises:
        MedsslError: If a file changed since it was checked, or the disk did not take it.
    """

    def targets() -> Iterator[CaseTask]:
        for name, case in whole.items():
            images, masks = folders_of(case)
            yield replace(
                tasks[name],
                image_target=str((out / images / name).resolve()),
                mask_target=str((out / masks / name).resolve()) if case.masks else "",
                hardlink=hardlink,
            )

    with progress("Writing cases", len(whole), quiet=quiet) as advance:
        for task, outcome in pool.map(write_case, targets()):
            if outcome.code or outcome.value:
                raise MedsslError(
                    outcome.value
                    or f"{task.name} changed since it was checked ({outcome.code}: {outcome.detail}). "
                    "Run the same command with --overwrite."
                )
            advance()
    flat = entry.dimensions == 2
    content: dict[str, object] = {
        "name": entry.name,
        "description": entry.title,
        "reference": entry.paper,
        "licence": entry.licence.name,
        "channel_names": {str(number): channel for number, channel in enumerate(entry.channels)},
        "labels": entry.labels,
        "numTraining": sum(folders_of(case)[0] == "imagesTr" for case in whole.values()),
        "file_ending": ".png" if flat else ".nii.gz",
    }
    write_json(
        out / "dataset.json", content if flat else {**content, "overwrite_image_reader_writer": "NibabelIOWithReorient"}
    )


def folders_of(case: FoundCase) -> tuple[str, str]:
    """Return the folders of a case's images and masks in an nnU-Net raw data set."""
    if case.part.split == "test":
        return "imagesTs", "labelsTs"
    return ("imagesTr", "labelsTr") if case.masks else ("imagesUnlabelled", "")


def write_files(content: Content, whole: Mapping[str, FoundCase], root: Path, out: Path, *, hardlink: bool) -> None:
    """Copy or link images into a folder for each class, or an .npz as it is.

    Raises:
        MedsslError: If a file cannot be linked, or the disk is full.
    """
    for case in whole.values():
        source = absolute(root, case.images[0])
        target = out / image_path(case) if content.layout.writes == "images" else out / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if hardlink:
            try:
                os.link(source, target)
            except OSError as error:
                raise MedsslError(f"{source} cannot be linked ({error.strerror}): use --files copy.") from error
        else:
            with atomic_path(target, durable=False) as temporary:
                shutil.copyfile(source, temporary)


def image_path(case: FoundCase) -> str:
    """Return where an image of a class is written, relative to the output."""
    return f"images/{case.label_class}/{case.name}{Path(case.images[0]).suffix}"


def write_tables(entry: Manifest, content: Content, whole: Mapping[str, FoundCase], out: Path) -> None:
    """Write `cases.csv`, and `labels.csv` where the layout tells a class.

    Patients are named as the public set names them; where names do not tell, each case is its own.
    """
    listing = {name: split for split, names in entry.split.lists.items() for name in names}
    rest = "train" if listing else ""
    rows = []
    for case in whole.values():
        labelled = bool(case.masks or case.label_class)
        literature = listing.get(case.name, listing.get(case.patient, rest if labelled else ""))
        rows.append([case.name, case.patient, case.part.split, literature])
    _write_csv(out / TABLE, ["case", "patient", "split", "literature_split"], rows)
    if any(case.label_class for case in whole.values()):
        ending = ".png" if entry.dimensions == 2 else ".nii.gz"
        paths = [
            image_path(case) if content.layout.writes == "images" else f"{folders_of(case)[0]}/{name}_0000{ending}"
            for name, case in whole.items()
        ]
        table = [[path, case.label_class, case.patient] for path, case in zip(paths, whole.values(), strict=True)]
        _write_csv(out / CLASSES, ["path", "label", "patient"], table)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
