"""One volume with its segmentations and structure sets: names read, labels laid on its grid, both written as NIfTI.

Everything here runs in a process with limits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medssl.archive.find import absolute
from medssl.archive.tasks import FileTask, VolumeTask, load_planned
from medssl.errors import InputRefused, MedsslError
from medssl.files import atomic_path

if TYPE_CHECKING:
    from medssl.archive.dicom.regions import LabelMap
    from medssl.archive.dicom.segmentation import SegmentationObject
    from medssl.archive.dicom.structure_set import StructureSet

KINDS = ("segmentation", "structure_set")


@dataclass(frozen=True)
class LabelObject:
    """A segmentation or structure set of an index.

    Attributes:
        kind: `segmentation` or `structure_set`.
        file: Where it lies, as it was when it was indexed.
        key: Its series key: what it is called in tables.
    """

    kind: str
    file: FileTask
    key: str


@dataclass(frozen=True)
class LabelledTask:
    """A volume to be written with its labels.

    Attributes:
        name: The case.
        volume: The image.
        objects: What was drawn on it.
        labels: Names in the order of their values, from 1.
        priority: See `LabelMap`.
        image_target: Path of the image.
        label_target: Path of the label map.
    """

    name: str
    volume: VolumeTask
    objects: tuple[LabelObject, ...]
    labels: tuple[str, ...]
    priority: tuple[str, ...]
    image_target: str
    label_target: str


@dataclass(frozen=True)
class Written:
    """What came of a case.

    Attributes:
        voxels: Number of voxels of each label.
        problem: Why the disk did not take it, or empty.
    """

    voxels: dict[str, int]
    problem: str = ""


def read_names(found: LabelObject) -> list[str]:
    """Return the names of an object's regions.

    Raises:
        InputRefused: If they name the patient, or the object cannot be used.
    """
    return _open(found).names


def write_labelled(task: LabelledTask) -> Written:
    """Write image and label map of a case.

    Raises:
        InputRefused: If an object does not fit its volume.
    """
    from medssl.archive.convert import to_nifti
    from medssl.archive.dicom.regions import LabelMap

    _check_volume(task.volume)
    _check_patient(task)
    volume = load_planned(task.volume)
    _, z, y, x = volume.shape
    labels = LabelMap((z, y, x), volume.affine, task.labels, task.priority)
    for found in task.objects:
        _paint(found, labels)
    counts = Counter(dict(enumerate(np.bincount(labels.voxels.reshape(-1), minlength=len(task.labels) + 1).tolist())))
    mask = replace(volume, array=labels.voxels[None])
    try:
        for content, target in ((volume, task.image_target), (mask, task.label_target)):
            with atomic_path(Path(target), durable=False) as temporary:
                to_nifti(content).to_filename(temporary)
    except (MedsslError, OSError) as error:
        Path(task.image_target).unlink(missing_ok=True)
        problem = str(error) if isinstance(error, MedsslError) else f"{task.image_target}: {error.strerror}"
        return Written({}, problem)
    return Written({name: counts[value] for value, name in enumerate(task.labels, 1)})


def _open(found: LabelObject) -> SegmentationObject | StructureSet:
    from medssl.archive.dicom import tags as t
    from medssl.archive.dicom.reading import open_header
    from medssl.archive.dicom.regions import check_names
    from medssl.archive.dicom.segmentation import open_segmentation
    from medssl.archive.dicom.structure_set import open_structure_set
    from medssl.archive.dicom.tags import Tags
    from medssl.archive.tasks import check_unchanged

    path = absolute(Path(found.file.root), found.file.path)
    check_unchanged(path, found.file.size, found.file.mtime_ns)
    opened = open_segmentation(path) if found.kind == "segmentation" else open_structure_set(path)
    header = Tags(open_header(path, [t.PATIENT_NAME, t.PATIENT_ID]).dataset)
    check_names(opened.names, header.text(t.PATIENT_NAME), header.text(t.PATIENT_ID))
    return opened


def _paint(found: LabelObject, labels: LabelMap) -> None:
    from medssl.archive.dicom.segmentation import SegmentationObject, paint_segmentation
    from medssl.archive.dicom.structure_set import paint_structure_set

    opened = _open(found)
    if isinstance(opened, SegmentationObject):
        paint_segmentation(opened, labels)
    else:
        paint_structure_set(opened, labels)


def _check_volume(task: VolumeTask) -> None:
    from medssl.archive.dicom.model import DicomVolume

    plan = DicomVolume.from_json(task.plan)
    if plan.channels != "scalar" or plan.geometry != "regular":
        raise InputRefused("label_image_unsuitable", f"{plan.shape[0]} {plan.channels}, geometry {plan.geometry}")


def _check_patient(task: LabelledTask) -> None:
    """Refuse an object of another patient; a blank ID contradicts nothing."""
    from medssl.archive.dicom import tags as t
    from medssl.archive.dicom.model import DicomVolume
    from medssl.archive.dicom.reading import open_header
    from medssl.archive.dicom.tags import Tags

    patient = DicomVolume.from_json(task.volume.plan).patient_id
    for found in task.objects:
        path = absolute(Path(found.file.root), found.file.path)
        told = Tags(open_header(path, [t.PATIENT_ID]).dataset).text(t.PATIENT_ID)
        if told and patient and told != patient:
            raise InputRefused("label_other_patient", f"of {len(task.objects)} objects")
