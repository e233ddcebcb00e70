"""Where the unlabelled images of a segmentation come from, and what speaks against them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from medssl.errors import DataError, UsageError
from medssl.files import sha256_of
from medssl.preprocessing.store import Store
from medssl.preprocessing.store_files import STORE_FILE
from medssl.transfer.augmenting import modality_of
from medssl.transfer.raw import NIFTI, Case, RawDataset
from medssl.transfer.selection import Selection

logger = logging.getLogger(__name__)

#: Largest relative difference between two spacings that count as one.
_SAME_SPACING = 0.01


def is_store(path: Path) -> bool:
    """Tell whether a path is a STORE of `medssl preprocess`."""
    return (path / STORE_FILE).is_file()


def unlabelled_cases(
    raw: RawDataset, selection: Selection, folder: Path | None, names: Sequence[str] | None = None
) -> dict[str, Case]:
    """Return the images to learn from without labels; none of their masks is in reach.

    Args:
        raw: The labelled data set.
        selection: Its cases that are learnt from with labels, and those that are looked at.
        folder: A folder of NIfTI images, flat or as `imagesTr` below it; None takes the data set's other cases.
        names: Of these only those named.

    Returns:
        Cases by a name that says nothing of the file's. Images that are among the labelled ones are left out with a
        warning.

    Raises:
        UsageError: If there is none, or one of them is a validation case.
        DataError: If the channels of a case are not those of the data set.
    """
    if folder is None:
        used = {*selection.train, *selection.validation}
        wanted = list(raw.cases) if names is None else raw.select(names, "unlabelled_cases")
        found = {name: raw.cases[name].images for name in wanted if name not in used}
        if not found:
            raise UsageError(
                "There are no unlabelled images: every case of the data set is used with its label. Name a folder or "
                "STORE with --unlabelled, or label fewer cases with --labelled or --train-cases."
            )
    else:
        found = _images_of(folder, len(raw.channel_names))
        found = _not_known(found, raw, selection, folder)
    missing = raw.folder / "labelsTr" / ".unlabelled"
    cases = {}
    for name, images in sorted(found.items()):
        neutral = "u" + hashlib.sha256(name.encode()).hexdigest()[:16]
        cases[neutral] = Case(neutral, images, missing)
    return cases


def check_store(store: Store, raw: RawDataset, spacing_mm: Sequence[float]) -> None:
    """Refuse a STORE whose volumes are not like those of the data set.

    Args:
        store: Of the unlabelled volumes.
        raw: The labelled data set.
        spacing_mm: Voxel size of its plans, 2 or 3 numbers.

    Raises:
        UsageError: If modality, voxel size or channels differ.
    """
    wanted = modality_of(dict(enumerate_names(raw)))
    if store.modalities != {wanted}:
        raise UsageError(
            f"{store.folder} holds {', '.join(sorted(store.modalities))}, the data set {wanted}: predictions on other "
            "modalities are no pseudo-labels. Preprocess with --select \"modality = '" + wanted + "'\"."
        )
    for name in store.ids:
        channels = int(store.row(name)["shape"][0])
        if channels != len(raw.channel_names):
            raise UsageError(f"{store.folder}: {name} has {channels} channels, the data set {len(raw.channel_names)}.")
        found = store.entry(name).spacing_mm[3 - len(spacing_mm) :]
        if any(abs(a - b) > _SAME_SPACING * b for a, b in zip(found, spacing_mm, strict=True)):
            shown = ",".join(f"{value:g}" for value in spacing_mm)
            raise UsageError(
                f"{store.folder}: {name} has voxels of {[round(value, 3) for value in found]} mm (z, y, x), the plans "
                f"of the data set {list(spacing_mm)}. Preprocess with --spacing {shown}, or give the images' folder."
            )
    logger.info("The store's normalisation is medssl's, the labelled images' nnU-Net's: look at views.png.")


def enumerate_names(raw: RawDataset) -> list[tuple[str, str]]:
    """Return number and name of each channel, as `dataset.json` has them."""
    return [(str(number), name) for number, name in enumerate(raw.channel_names)]


def _images_of(folder: Path, channels: int) -> dict[str, tuple[Path, ...]]:
    if not folder.is_dir():
        raise UsageError(f"--unlabelled {folder} is no folder: give NIfTI images, an nnU-Net raw folder or a STORE.")
    images = folder / "imagesTr" if (folder / "imagesTr").is_dir() else folder
    files = sorted(path for path in images.iterdir() if path.name.lower().endswith(NIFTI) and path.name[0] != ".")
    if not files:
        raise UsageError(f"--unlabelled {images} holds no .nii or .nii.gz: `medssl convert` writes them from DICOM.")
    groups: dict[str, dict[int, Path]] = {}
    for path in files:
        stem = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        name, channel = (match.group(1), int(match.group(2))) if match else (stem, 0)
        groups.setdefault(name, {})[channel] = path
    for name, parts in groups.items():
        if sorted(parts) != list(range(channels)):
            raise DataError(
                f"{images}: {name} has the channels {sorted(parts)}, the data set needs {list(range(channels))}. Name "
                "files CASE_0000.nii.gz, CASE_0001.nii.gz, ... or remove the case."
            )
    return {name: tuple(parts[channel] for channel in range(channels)) for name, parts in groups.items()}


def _not_known(
    found: dict[str, tuple[Path, ...]], raw: RawDataset, selection: Selection, folder: Path
) -> dict[str, tuple[Path, ...]]:
    """Leave out what is labelled; refuse what is looked at."""
    known = {}
    for part, names in (("labelled", selection.train), ("validation", selection.validation)):
        for name in names:
            known[_content(raw.cases[name].images[0])] = (part, name)
    sizes = {size for size, _ in known}
    rest = {}
    for name, images in found.items():
        # Only a file of the same size can be the same: an archive is not read whole.
        same_size = images[0].stat().st_size in sizes
        part, case = known.get(_content(images[0]), ("", "")) if same_size else ("", "")
        if part == "validation":
            raise UsageError(
                f"--unlabelled {folder} holds the validation case {case} ({images[0].name}): what is measured must not "
                "be learnt from. Remove it from the folder."
            )
        if part == "labelled":
            logger.warning("%s is the labelled case %s too: it is left out of the unlabelled images.", name, case)
        else:
            rest[name] = images
    if not rest:
        raise UsageError(f"--unlabelled {folder} holds labelled cases only: nothing is left to learn from.")
    return rest


def _content(path: Path) -> tuple[int, str]:
    return path.stat().st_size, sha256_of(path)


def dataset_of(cases: dict[str, Case], raw: RawDataset) -> RawDataset:
    """Return a data set of the unlabelled cases alone, with the description of the labelled one."""
    return dataclasses.replace(raw, cases=cases)
