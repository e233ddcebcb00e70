"""The annotator's work: label maps on the grids of converted images, as an nnU-Net raw data set."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from medssl.demo.archive import ARCHIVE, Truth
from medssl.demo.phantom import Grid, body, labels
from medssl.files import atomic_path, write_json

#: What the demo asks an annotator for.
TASK = {"liver": 1, "spleen": 2, "kidney_right": 3, "kidney_left": 4}
ENDING = ".nii.gz"


@dataclass(frozen=True)
class Case:
    """One image that gets a label.

    Args:
        name: Its name in the data set.
        image: A NIfTI file; only its grid is looked at.
        patient: Number of the patient it shows.
        breath_mm: The breath at which it was scanned.
        tree: The tree its DICOM files lie in.
        file: Path of one of them in that tree.
    """

    name: str
    image: Path
    patient: int
    breath_mm: float
    tree: str = ""
    file: str = ""


def converted_cases(nifti: Path, truths: Sequence[Truth]) -> list[Case]:
    """Find the CT volumes of known patients among what `medssl convert` wrote.

    Args:
        nifti: Output of `convert`.
        truths: What the phantom's hospital knows.

    Returns:
        One case per volume, by tree and patient.
    """
    from medssl.archive.load import open_index

    # Folders of studies have names of their own, so a relative path tells the tree too.
    known = {file: truth for truth in truths if truth.modality == "CT" for file in truth.files}
    cases = []
    for row in open_index(nifti).rows("modality = 'CT'").iter_rows(named=True):
        file = row["relative_paths"][0]
        truth = known.get(file)
        if truth is None:
            continue
        image = nifti / f"{row['volume_id']}{ENDING}"
        cases.append(Case(f"{truth.tree}_{truth.patient:02d}", image, truth.patient, truth.breath_mm, truth.tree, file))
    return sorted(cases, key=lambda case: (case.tree, case.patient))


def choose_training(cases: Sequence[Case], count: int) -> list[Case]:
    """Choose patients of the archive to be labelled, from both sites in turn."""
    by_site: dict[str, list[Case]] = {}
    for case in cases:
        if case.tree == ARCHIVE:
            by_site.setdefault(case.file.split("/", 1)[0], []).append(case)
    turns = zip_longest(*(by_site[site] for site in sorted(by_site)))
    return [case for turn in turns for case in turn if case is not None][:count]


def write_dataset(out: Path, cases: Sequence[Case], seed: int) -> Path:
    """Write cases with their labels as an nnU-Net raw data set.

    Args:
        out: Folder of the data set.
        cases: What to label; training and validation cases alike.
        seed: Seed of the archive.

    Returns:
        `out`.
    """
    (out / "imagesTr").mkdir(parents=True)
    for case in cases:
        shutil.copyfile(case.image, out / "imagesTr" / f"{case.name}_0000{ENDING}")
        write_label(out / "labelsTr" / f"{case.name}{ENDING}", case, seed)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **TASK},
        "numTraining": len(cases),
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "description": "Drawn by medssl demo: no person is shown",
        "licence": "CC0-1.0",
    }
    write_json(out / "dataset.json", content)
    return out


def write_label(path: Path, case: Case, seed: int) -> None:
    """Draw the organs of a case's patient on its image's grid, through the image's own affine."""
    import nibabel as nib

    image: Any = nib.load(case.image)
    where = Grid(tuple(image.shape[2::-1]), np.asarray(image.affine, np.float64))
    mask = labels(body(seed, case.patient), where, breath_mm=case.breath_mm, organs=TASK)
    label = nib.Nifti1Image(np.ascontiguousarray(mask.transpose(2, 1, 0)), image.affine)
    label.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(label, temporary)
