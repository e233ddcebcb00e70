"""The phantom's hospital: two sites with their scanners, patients, studies and series, written as DICOM.

`write_archive` writes two trees under its folder: `archive`, what a hospital would hand over, and `new_patients`, whom
pretraining never sees. `truth.json` beside them tells which patient each file shows, so that labels can be drawn.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medssl.demo.appearance import CtLook, MrLook
from medssl.demo.defects import write_defects
from medssl.demo.phantom import Grid, body, ct, grid, mr
from medssl.demo.shapes import generator, rotation_matrix
from medssl.demo.slices import Header, save, slice_datasets
from medssl.files import write_json
from medssl.progress import progress

ARCHIVE, NEW_PATIENTS = "archive", "new_patients"
# Columns are the directions of the image's columns, rows and slices, RAS.
AXIAL = np.diag([-1.0, -1.0, 1.0])
CORONAL = np.array([[-1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, -1.0, 0.0]])


@dataclass(frozen=True)
class Size:
    """How large the hospital is.

    Args:
        ct_patients: Patients with a CT study.
        mr_patients: Patients with an MR study; half of them have a CT study too.
        new_patients: Patients with a CT study who come later.
        defects: Whether broken series and foreign files are strewn in.
    """

    ct_patients: int = 26
    mr_patients: int = 10
    new_patients: int = 8
    defects: bool = True


HOSPITAL = Size()
QUICK = Size(ct_patients=6, mr_patients=2, new_patients=3)


@dataclass(frozen=True)
class SeriesPlan:
    """One series that will be scanned.

    Args:
        header: What its files say.
        where: Its grid.
        look: The scanner's settings.
        tree: `ARCHIVE` or `NEW_PATIENTS`.
        folder: Folder inside the tree.
    """

    header: Header
    where: Grid
    look: CtLook | MrLook
    tree: str
    folder: str

    def pixels(self) -> np.ndarray:
        """Scan the patient. Shape: (Z, Y, X)."""
        person = body(self.header.seed, self.header.patient)
        number = 100 * self.header.study + self.header.series
        if isinstance(self.look, CtLook):
            return ct(person, self.where, self.look, number)
        return mr(person, self.where, self.look, number)


@dataclass(frozen=True)
class Truth:
    """Which patient a series shows.

    Args:
        tree: `ARCHIVE` or `NEW_PATIENTS`.
        patient: Number of the patient.
        modality: "CT" or "MR".
        breath_mm: The breath at which it was scanned.
        files: Paths relative to the tree.
    """

    tree: str
    patient: int
    modality: str
    breath_mm: float
    files: tuple[str, ...]


def write_archive(
    out: Path, *, seed: int = 0, size: Size = HOSPITAL, workers: int | None = None, quiet: bool = False
) -> list[Truth]:
    """Scan every patient and write the archive.

    Args:
        out: Folder that gets `archive`, `new_patients` and `truth.json`.
        seed: The same seed gives the same files.
        size: How large the hospital is.
        workers: Processes; by default two, or one on a single core. 0 works in this process.
        quiet: Show no progress.

    Returns:
        One entry per series that is whole.
    """
    plans = plan_series(seed, size)
    workers = min(2, os.cpu_count() or 1) if workers is None else workers
    truths: list[Truth] = []
    pool: Executor | nullcontext[None] = ProcessPoolExecutor(workers) if workers else nullcontext()
    with pool as executor, progress("Scanning phantoms", len(plans), quiet=quiet) as advance:
        roots = [out] * len(plans)
        written: Iterable[Truth] = (executor.map if executor else map)(write_series, plans, roots)
        for truth in written:
            truths.append(truth)
            advance()
    if size.defects:
        write_defects(out / ARCHIVE, seed)
    write_json(out / "truth.json", [_as_json(truth) for truth in truths])
    return truths


def write_series(plan: SeriesPlan, out: Path) -> Truth:
    """Scan one series and write its files; names and instance numbers do not tell the order of the slices."""
    header = plan.header
    datasets = slice_datasets(header, plan.where, plan.pixels())
    order = generator("order", header.seed, header.patient, header.study, header.series).permutation(len(datasets))
    files = []
    for number, dataset in zip(order, datasets, strict=True):
        if header.station.startswith("ALPHA"):
            name = f"IM{1000 * header.series + int(number):06d}"
        else:
            dataset.InstanceNumber = int(number) + 1
            name = f"{header.series:02d}/{str(dataset.SOPInstanceUID)[-20:]}"
        files.append(f"{plan.folder}/{name}")
        save(dataset, out / plan.tree / files[-1], header)
    return Truth(plan.tree, header.patient, header.modality, plan.look.breath_mm, tuple(files))


def plan_series(seed: int, size: Size) -> list[SeriesPlan]:
    """Return every series of the hospital; patients are numbered from 0, new ones come last."""
    last_ct = size.ct_patients
    first_mr = last_ct - size.mr_patients // 2
    known = first_mr + size.mr_patients
    plans = [_ct_plan(seed, patient, ARCHIVE) for patient in range(last_ct)]
    for patient in range(first_mr, known):
        plans += _mr_plans(seed, patient)
    return plans + [_ct_plan(seed, patient, NEW_PATIENTS) for patient in range(known, known + size.new_patients)]


def _ct_plan(seed: int, patient: int, tree: str) -> SeriesPlan:
    rng = generator("ct scan", seed, patient)
    breath, centre = float(rng.normal(0, 4)), np.array([*rng.normal(0, 5, 2), rng.normal(-32, 8)])
    if patient % 5 < 3:  # Site A: finer, quieter, feet to head.
        header = Header(seed, patient, 1, 2, "CT", "Abdomen portal venous", "ALPHA CT 64", stored_offset=1024)
        where = grid((36, 80, 80), (7.0, 4.8, 4.8), AXIAL, centre)
        look = CtLook(noise_hu=12, breath_mm=breath)
        return SeriesPlan(header, where, look, tree, f"site_a/2024/{header.accession}")
    # Site B: coarser, noisier, head to feet, a round field of view with padding, compressed.
    header = Header(seed, patient, 1, 3, "CT", "ABD/PELV +C", "BETA CT 16", encoding="rle", padding=-2000)
    directions = AXIAL * np.array([1.0, 1.0, -1.0])
    where = grid((30, 70, 70), (8.0, 5.5, 5.5), directions, centre)
    look = CtLook(noise_hu=22, blur_mm=2.4, breath_mm=breath, field_of_view_mm=380.0)
    return SeriesPlan(header, where, look, tree, f"site_b/{header.accession[:2]}/{header.accession}")


def _mr_plans(seed: int, patient: int) -> list[SeriesPlan]:
    rng = generator("mr scan", seed, patient)
    centre = np.array([*rng.normal(0, 4, 2), rng.normal(-40, 8)])
    breaths = rng.normal(0, 5, 2)
    plans = []
    at_a = patient % 2 == 0
    for number, sequence in enumerate(("t1", "t2" if at_a else "t2_fat_suppressed"), start=1):
        header = Header(
            seed, patient, 2, number, "MR", sequence.replace("_", " "), "ALPHA MR 1.5" if at_a else "BETA MR 1.5",
            encoding="implicit", echo_ms=9.0 if sequence == "t1" else 92.0, preamble=at_a,
        )  # fmt: skip
        shading, gain = float(rng.uniform(0.2, 0.4)), 1100.0 if at_a else 520.0
        look = MrLook(sequence, 0.02 if at_a else 0.03, shading, 0.04, gain, float(breaths[number - 1]))
        if at_a and number == 2:
            where = grid((28, 64, 72), (8.0, 4.8, 4.8), CORONAL, centre)
        else:
            # Each technician tilts the slab a little differently.
            turn = rotation_matrix(rng.normal(0, 6 if at_a else 14, 3)).astype(np.float64)
            where = grid((32, 64, 72), (7.5, 5.0, 5.0), turn @ AXIAL, centre)
        site = "site_a/2024" if at_a else f"site_b/{header.accession[:2]}"
        plans.append(SeriesPlan(header, where, look, ARCHIVE, f"{site}/{header.accession}"))
    return plans


def _as_json(truth: Truth) -> dict[str, object]:
    return {
        "tree": truth.tree,
        "patient": truth.patient,
        "modality": truth.modality,
        "breath_mm": truth.breath_mm,
        "files": list(truth.files),
    }
