"""What the protocol asks of a task, so that segmentation and classification run by the same rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from medssl.config import Settings
from medssl.protocol.division import Case, Division
from medssl.protocol.outcomes import Outcome
from medssl.protocol.recipe import STRONG, DatasetSettings, PretrainingSettings


@dataclass(frozen=True)
class Job:
    """One fine-tuning run.

    Args:
        dataset: Name of the data set.
        arm: Name of the arm.
        labels: Number of labelled cases.
        seed: Of training; the cases are drawn by it already.
        rate: Peak learning rate.
        train_cases: What it learns from.
        pool: What these were drawn from.
        selection: Cases that choose the rate.
        validation: Cases that are reported.
        checkpoint: Where the weights come from, or None for random ones.
        plans_from: Checkpoint that decides network, patch and spacing of a run from scratch.
        changes: What the arm does in another way; see `ArmSettings.changes`.
        settings: Of the data set.
        training: Settings of training that all arms share.
        folder: The RUN.
        cache: Folder of preprocessed data that runs of the data set share.
        device: As in `medssl finetune`.
        workers: As in `medssl finetune`.
    """

    dataset: str
    arm: str
    labels: int
    seed: int
    rate: float
    train_cases: tuple[str, ...]
    pool: tuple[str, ...]
    selection: tuple[str, ...]
    validation: tuple[str, ...]
    checkpoint: Path | None
    plans_from: Path | None
    changes: Mapping[str, Any]
    settings: DatasetSettings
    training: Settings
    folder: Path
    cache: Path
    device: str = "auto"
    workers: int | None = None

    @property
    def name(self) -> str:
        """Name of its folder and of its scores."""
        return f"{self.arm}_{self.labels:04d}_seed{self.seed}_rate{self.rate:g}"

    def identity(self) -> dict[str, Any]:
        """Return what decides its result but for the weights; a score of another identity is not taken for this one."""
        return {
            "task": self.settings.task,
            "train_cases": list(self.train_cases),
            "selection": list(self.selection),
            "validation": list(self.validation),
            "seed": self.seed,
            "rate": self.rate,
            "pretrained": self.checkpoint is not None,
            "changes": dict(self.changes),
            "training": self.training.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        selection: On the selection cases; None if there are none.
        validation: On the validation cases.
        plan: What the run was planned as (network, patch, spacing), to be the same in every arm.
        costs: Seconds and whatever else it took.
    """

    selection: Outcome | None
    validation: Outcome
    plan: Any
    costs: Mapping[str, float] = field(default_factory=dict)


Trainer = Callable[[Job], Result]


class Task(Protocol):
    """A data set of one task.

    Attributes:
        metrics: What a rate may be chosen by and arms tested in, the default first.
        training_model: Settings of training that all arms share.
    """

    metrics: tuple[str, ...]
    training_model: type[Settings]

    def cases(self) -> list[Case]:
        """Return the labelled cases."""
        ...

    def signature(self) -> str:
        """Return a hash that changes with the cases, their patients or what is true of them."""
        ...

    def labelled(self, division: Division, number: int, seed: int) -> list[str]:
        """Draw labelled cases of the pool; for one seed, fewer are a part of more."""
        ...

    def pool_store(
        self, names: Sequence[str], folder: Path, pretrain: PretrainingSettings, workers: int | None
    ) -> Path:
        """Return a store of the images of some cases, without their labels, made in a folder."""
        ...

    def train(self, job: Job) -> Result:
        """Train and measure."""
        ...


def digest(content: Any) -> str:
    """Return a short hash of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def paired_method(job: Job) -> tuple[str, dict[str, Any]]:
    """Return the semi-supervised method of a job with its settings; the controls' is `supervised`."""
    wanted = job.changes.get("semisupervised", {"method": "supervised", "settings": {}})
    settings = dict(wanted["settings"])
    if job.changes.get("augmentation") == STRONG:
        settings["labelled_policy"] = STRONG
    return str(wanted["method"]), settings
