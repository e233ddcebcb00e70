"""What `hippocampus_classification.py` learns from: a target made of the masks, the division, and one store."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medssl.files import write_text
from medssl.preprocessing.run import check_options, preprocess_source
from medssl.preprocessing.source import open_source

#: The division of `label_efficiency.py` and `protocol_hippocampus.yaml`.
SPLIT_SEED = 20_240
ANTERIOR, POSTERIOR = 1, 2


@dataclasses.dataclass(frozen=True)
class Target:
    """Which cases validate, and the label of each.

    Args:
        median: Ratio of anterior to posterior volume that divides the training cases in two.
        labels: By case, 1 where its own ratio is above.
        validating: Cases that validate; all others train.
    """

    median: float
    labels: Mapping[str, int]
    validating: frozenset[str]

    def split(self, case: str) -> str:
        """Return the split of a case."""
        return "validation" if case in self.validating else "train"

    def of(self, split: str) -> list[str]:
        """Return the cases of a split, sorted."""
        return sorted(case for case in self.labels if self.split(case) == split)

    def write(self, path: Path) -> None:
        """Write the CSV that `finetune classification` and `evaluate probe` read."""
        lines = [f"{case},{label},{self.split(case)}" for case, label in self.labels.items()]
        write_text(path, "\n".join(["volume_id,label,split", *lines]) + "\n")


def ratios_of(data: Path) -> dict[str, float]:
    """Return anterior voxels by posterior ones of each case; voxels of one case have one size."""
    found = {}
    for path in sorted((data / "labelsTr").glob("*.nii.gz")):
        image: Any = nibabel.load(path)
        mask = np.asarray(image.dataobj)
        found[path.name.removesuffix(".nii.gz")] = float((mask == ANTERIOR).sum() / (mask == POSTERIOR).sum())
    if not found:
        raise SystemExit(f"{data} has no masks in labelsTr. Set MEDSSL_DATA.")
    return found


def divide(cases: Sequence[str], validation: int) -> frozenset[str]:
    """Return the cases that validate."""
    names = sorted(cases)
    if len(names) < 2 * validation:
        raise SystemExit(f"{len(names)} cases are too few to validate on {validation} of them.")
    return frozenset(names[index] for index in np.random.default_rng(SPLIT_SEED).permutation(len(names))[:validation])


def target_of(ratios: Mapping[str, float], validation: int) -> Target:
    """Return the target; its median is that of the training cases alone."""
    validating = divide(list(ratios), validation)
    middle = float(np.median([ratio for case, ratio in ratios.items() if case not in validating]))
    return Target(middle, {case: int(ratio > middle) for case, ratio in ratios.items()}, validating)


def make_store(data: Path, out: Path, target: Target) -> Path:
    """Make the store of all cases, masks too, with the division: pretraining reads the training volumes alone."""
    # `preprocess` has every case of such a folder train.
    source = open_source(data, None, out.with_name("index"), workers=0, quiet=True)
    jobs = [
        dataclasses.replace(job, split=target.split(job.volume_id))
        for job in source.jobs
        if job.volume_id in target.labels
    ]
    options = check_options((1.0, 1.0, 1.0), "by-modality", True, "lossless", None)
    source = dataclasses.replace(source, jobs=jobs)
    preprocess_source(source, out, options, workers=0, resume=out.exists(), quiet=True)
    return out
