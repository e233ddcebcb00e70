"""What a worker process does with one volume; importable by name, so that any executor can run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medssl.errors import InputRefused, MedsslError
from medssl.preprocessing.case import Plan, one_per_channel, prepare
from medssl.preprocessing.fingerprint import tissue_sample
from medssl.preprocessing.normalise import scheme_of
from medssl.preprocessing.source import Job, Spacing, load, spacing_of_file
from medssl.preprocessing.store_files import write_volume


@dataclass(frozen=True)
class Task:
    """A volume, what to do, and where to write."""

    job: Job
    plan: Plan
    out: str


#: Intensities of the tissue of a volume's channels.
Samples = list[NDArray[np.float32]]


def process(task: Task) -> str:
    """Preprocess and write one volume.

    Returns:
        Empty, or the message of a failure of the machine (a full disk, say) that the next volume would meet too.

    Raises:
        InputRefused: If the volume cannot be used.
    """
    try:
        volume, label = load(task.job)
        prepared = prepare(volume, task.plan, name=task.job.volume_id, modalities=task.job.modalities, label=label)
        facts = {**prepared.facts, "patient_key": task.job.patient_key, "split": task.job.split}
        try:
            out, name = Path(task.out), task.job.volume_id
            write_volume(out, name, prepared.array, facts, prepared.label, task.plan.codec)
        except OSError as error:
            return (
                f"{task.out} cannot be written: {error.strerror}. Check permissions and disk, then run with --resume."
            )
    except InputRefused:
        raise
    except MedsslError as error:
        return str(error)
    return ""


def sample(task: Task) -> dict[str, Samples]:
    """Sample the tissue of one volume, by modality, for those that are normalised by the fingerprint."""
    volume, _ = load(task.job)
    modalities = one_per_channel(task.job.modalities, volume)
    samples: dict[str, Samples] = {}
    for number, (channel, modality) in enumerate(zip(volume.array, modalities, strict=False)):
        if scheme_of(task.plan.normalisation, modality) == "fingerprint":
            name = f"{task.job.volume_id}/{number}"
            samples.setdefault(modality, []).append(tissue_sample(channel, modality, name))
    return samples


def spacing(task: Task) -> Spacing:
    """Return the voxel size (z, y, x) in canonical axes."""
    return task.job.spacing_mm or spacing_of_file(task.job.images[0])
