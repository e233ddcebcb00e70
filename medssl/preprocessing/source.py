"""Where volumes come from: an INDEX, an nnU-Net raw data set, or a folder that is indexed on the fly."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.volume import Volume, spacing_of
from medssl.errors import DataError, InputRefused, UsageError
from medssl.preprocessing.case import check_label
from medssl.preprocessing.orient import canonical, canonical_spacing
from medssl.preprocessing.store_files import can_name_a_volume

CHANNEL = re.compile(r"(.+)_(\d{4})")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")
Spacing = tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One volume to preprocess; small, and pickled to where the work is done.

    Attributes:
        volume_id: Its name in the store.
        modalities: One per channel, or one for all.
        patient_key: Pseudonym.
        split: `train`, `validation` or `test`.
        index: Folder of the INDEX, or empty.
        images: Files, one per channel, where there is no index.
        label: File of the label, or empty.
        label_values: What the label may hold, or None for anything.
        spacing_mm: Voxel size (z, y, x) in canonical axes, if known without opening a file.
    """

    volume_id: str
    modalities: tuple[str, ...]
    patient_key: str
    split: str
    index: str = ""
    images: tuple[str, ...] = ()
    label: str = ""
    label_values: tuple[int, ...] | None = None
    spacing_mm: Spacing | None = None


@dataclass(frozen=True)
class Source:
    """All volumes of a call, and what identifies them.

    Attributes:
        kind: `index` or `nnunet_raw`.
        hash: Changes when the volumes change.
        jobs: Sorted by id.
    """

    kind: str
    hash: str
    jobs: list[Job]


def open_source(path: Path, select: str | None, on_the_fly: Path, *, workers: int | None, quiet: bool) -> Source:
    """Find out what a path is and list its volumes.

    Args:
        path: An INDEX, an nnU-Net raw data set (a folder with imagesTr), or any folder of images.
        select: SQL condition over the columns of `volumes.parquet`.
        on_the_fly: Where a folder that is no index is indexed.
        workers: For indexing.
        quiet: For indexing.

    Raises:
        UsageError: If the path does not exist or the condition matches nothing.
        DataError: If there are no volumes.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder. Give an INDEX, an nnU-Net raw data set or a folder of images.")
    if (path / "volumes.parquet").is_file():
        source = _of_index(path, select)
    elif (path / "imagesTr").is_dir():
        source = _of_raw(path, select)
    else:
        from medssl.archive.index import index

        index([path], on_the_fly, workers=workers, resume=(on_the_fly / "index.json").is_file(), quiet=quiet)
        source = _of_index(on_the_fly, select)
    if not source.jobs:
        if select:
            raise UsageError(
                f"--select {select!r} matches no volume of {path}. Look at the columns of volumes.parquet."
            )
        raise DataError(f"{path} has no usable volume. Look at its refused.parquet for the reasons.")
    return source


def load(job: Job) -> tuple[Volume, Volume | None]:
    """Decode a volume and its label.

    Raises:
        InputRefused: With the reason's code.
    """
    if job.index:
        from medssl.archive.tasks import load_planned

        # Decoded in this process, which is itself one with limits.
        return load_planned(_open_index(job.index).task(job.volume_id)), None
    channels = [_read(Path(image)) for image in job.images]
    volume = channels[0] if len(channels) == 1 else _stack(channels)
    if not job.label:
        return volume, None
    return volume, check_label(volume, _read(Path(job.label)), job.label_values)


def spacing_of_file(path: str) -> Spacing:
    """Return the voxel size (z, y, x) of an image in canonical axes, from its header where that is enough.

    Raises:
        InputRefused: If the image cannot be used.
    """
    volume = _read(Path(path)) if not path.endswith((".nii", ".nii.gz")) else _nifti_header(path)
    _, affine = canonical(volume.array, volume.affine)
    return spacing_of(affine)


def _nifti_header(path: str) -> Volume:
    import nibabel

    try:
        image: Any = nibabel.load(path)
        # A broadcast zero has the header's shape and no voxels.
        shape = (1, *(int(size) for size in (*image.shape[:3], 1, 1)[:3][::-1]))
        affine = np.asarray(image.affine, np.float64)
    except (OSError, ValueError, EOFError, nibabel.filebasedimages.ImageFileError) as error:
        raise InputRefused("header_invalid", "the NIfTI header cannot be read") from error
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-18:
        raise InputRefused("affine_invalid", "the matrix of the NIfTI header is singular")
    return Volume(np.broadcast_to(np.uint8(0), shape), affine)


def _of_index(path: Path, select: str | None) -> Source:
    from medssl.archive.load import open_index

    rows = open_index(path).rows(select)
    jobs = [
        Job(
            volume_id=row["volume_id"],
            modalities=(row["modality"],),
            patient_key=row["patient_key"],
            split=row["split"],
            index=str(path.resolve()),
            spacing_mm=canonical_spacing(row["spacing_mm"], row["orientation"], row["shape"]),
        )
        for row in rows.iter_rows(named=True)
    ]
    content = json.loads((path / "index.json").read_text())
    return Source("index", str(content["hash"]), sorted(jobs, key=lambda job: job.volume_id))


@lru_cache(maxsize=1)
def _open_index(path: str) -> Any:
    from medssl.archive.load import open_index

    return open_index(Path(path))


def _of_raw(path: Path, select: str | None) -> Source:
    description = _description(path)
    names = description.get("channel_names") or description.get("modality") or {"0": "MR"}
    modalities = tuple("CT" if str(names[key]).upper() == "CT" else "MR" for key in sorted(names, key=int))
    values = _label_values(description.get("labels"))
    cases = _cases(path, description)
    jobs = []
    for case, (images, label) in cases.items():
        volume_id = _volume_id(case)
        jobs.append(
            Job(
                volume_id=volume_id,
                modalities=modalities,
                patient_key=volume_id,
                split="train",
                images=tuple(str(image) for image in images),
                label=str(label) if label is not None else "",
                label_values=values,
            )
        )
    jobs.sort(key=lambda job: job.volume_id)
    if select:
        jobs = _selected(jobs, select)
    digest = hashlib.sha256(json.dumps([modalities, values]).encode())
    for job in jobs:
        for file in (*job.images, job.label):
            size = Path(file).stat().st_size if file else 0
            digest.update(f"{job.volume_id}/{Path(file).name}/{size}\n".encode())
    return Source("nnunet_raw", digest.hexdigest(), jobs)


def _volume_id(case: str) -> str:
    """Return the case's name, or one like it where it cannot name a volume."""
    if can_name_a_volume(case):
        return case
    # Two names must not become one.
    return f"case{_UNSAFE.sub('_', case)}-{hashlib.sha256(case.encode()).hexdigest()[:8]}"


def _description(path: Path) -> dict[str, Any]:
    file = path / "dataset.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no JSON ({error}). Mend it, or remove it to go without labels' names.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} does not hold a JSON object. See nnU-Net's documentation of dataset.json.")
    return content


def _label_values(labels: Any) -> tuple[int, ...] | None:
    """Return every value that `labels` of dataset.json lists, regions included."""
    if not isinstance(labels, Mapping):
        return None
    values: set[int] = set()
    for value in labels.values():
        values.update(int(one) for one in (value if isinstance(value, list | tuple) else [value]))
    return tuple(sorted(values))


def _cases(path: Path, description: Mapping[str, Any]) -> dict[str, tuple[list[Path], Path | None]]:
    listed = description.get("dataset")
    if isinstance(listed, Mapping):
        return {
            str(case): ([path / file for file in files["images"]], path / files["label"] if "label" in files else None)
            for case, files in listed.items()
        }
    ending = str(description.get("file_ending") or ".nii.gz")
    found: dict[str, list[tuple[str, Path]]] = {}
    for file in sorted((path / "imagesTr").iterdir()):
        if not file.name.endswith(ending) or file.name.startswith("."):
            continue
        stem = file.name[: -len(ending)]
        match = CHANNEL.fullmatch(stem)
        case, channel = (match[1], match[2]) if match else (stem, "0000")
        found.setdefault(case, []).append((channel, file))
    cases: dict[str, tuple[list[Path], Path | None]] = {}
    for case, files in found.items():
        label = path / "labelsTr" / f"{case}{ending}"
        cases[case] = ([file for _, file in sorted(files)], label if label.is_file() else None)
    if not cases:
        raise DataError(
            f"{path / 'imagesTr'} holds no file that ends in {ending}. Name images CASE_0000{ending}, or mend "
            "file_ending in dataset.json."
        )
    return cases


def _selected(jobs: Sequence[Job], select: str) -> list[Job]:
    import polars

    columns = {
        "volume_id": [job.volume_id for job in jobs],
        "patient_key": [job.patient_key for job in jobs],
        "modality": [job.modalities[0] for job in jobs],
        "split": [job.split for job in jobs],
        "has_label": [bool(job.label) for job in jobs],
    }
    try:
        with polars.SQLContext(volumes=polars.DataFrame(columns)) as context:
            kept = context.execute(f"SELECT volume_id FROM volumes WHERE {select}", eager=True)
    except polars.exceptions.PolarsError as error:
        raise UsageError(
            f"--select {select!r} is no SQL condition ({error}). Columns: {', '.join(columns)}."
        ) from error
    ids = set(kept["volume_id"])
    return [job for job in jobs if job.volume_id in ids]


def _read(path: Path) -> Volume:
    if path.name.endswith((".nii", ".nii.gz")):
        from medssl.archive.formats import nifti

        return nifti.load(path)
    from medssl.archive.load import read_volume

    return read_volume(path)


def _stack(channels: Sequence[Volume]) -> Volume:
    first = channels[0]
    for other in channels[1:]:
        if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-2):
            raise InputRefused(
                "channels_differ", f"channels have shapes {[one.shape[1:] for one in channels]} or grids that differ"
            )
    array = np.concatenate([one.array.astype(np.float32, copy=False) for one in channels])
    flags = tuple(sorted({flag for one in channels for flag in one.flags}))
    return Volume(array, first.affine, first.modality, "frames", flags, first.geometry)
