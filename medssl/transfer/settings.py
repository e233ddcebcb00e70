"""Settings of a fine-tuning run, from the caller or from a file that an environment variable names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from medssl.config import Settings, check_settings, read_yaml
from medssl.transfer.schedule import PRETRAINED_RATE, Schedule

# Names a YAML file for the trainer when plain `nnUNetv2_train ... -tr medSSLTrainer` runs it.
VARIABLE = "MEDSSL_FINETUNE"
Augmentation = Literal["nnunet", "medssl", "medssl-strong"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)
#: Policies of those that are made on the device.
PURPOSES = {"medssl": "fine-tuning", "medssl-strong": "strong"}


class TrainingSettings(Settings):
    """What the trainer does; the defaults are nnU-Net's own length of 1000 x 250 steps.

    Args:
        steps: Steps of the optimiser.
        val_every: Steps between two looks at the validation cases; a checkpoint is written at each.
        val_batches: Batches of each look.
        learning_rate: Peak rate.
        schedule: A name of `medssl.transfer.schedule.NAMES`.
        warmup_fraction: Part of the run in which the rate rises.
        frozen_fraction: Part at the start in which the encoder stands still (sawtooth, frozen).
        layer_decay: Factor on the rate per level from the decoder down to the stem.
        optimiser: `sgd` is nnU-Net's, with Nesterov's momentum; `adamw` needs some hundred steps fewer to leave the
            plateau where everything is background.
        momentum: Of SGD.
        weight_decay: Of either.
        laterality: Left-right mirroring: forbid, swap-labels or allow.
        augmentation: `nnunet` is nnU-Net's own, in the workers; `medssl` our policy `fine-tuning`, on the device;
            `medssl-strong` our policy `strong`.
        seed: Of everything random.
        workers: Processes that make batches; 0 makes them in the training process.
        checkpoint: Pretrained weights, or None.
        transfer_decoder: Take the decoder too; None does so where pretraining trained it.
        train_cases: Cases to learn from; None leaves the choice to nnU-Net's split.
        validation_cases: Cases to look at.
    """

    steps: int = Field(default=250_000, ge=1)
    val_every: int = Field(default=250, ge=1)
    val_batches: int = Field(default=50, ge=1)
    learning_rate: float = PRETRAINED_RATE
    schedule: str = "warmup"
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    frozen_fraction: float = Field(default=0.2, ge=0, lt=1)
    layer_decay: float = 1.0
    optimiser: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.99, ge=0, lt=1)
    weight_decay: float = Field(default=3e-5, ge=0)
    laterality: str = "forbid"
    augmentation: Augmentation = "nnunet"
    seed: int = 0
    workers: int = Field(default=0, ge=0)
    checkpoint: Path | None = None
    transfer_decoder: bool | None = None
    train_cases: list[str] | None = None
    validation_cases: list[str] | None = None

    def make_schedule(self) -> Schedule:
        """Return the schedule, checked."""
        return Schedule(
            name=self.schedule,
            peak=self.learning_rate,
            steps=self.steps,
            warmup_fraction=self.warmup_fraction,
            frozen_fraction=self.frozen_fraction,
            layer_decay=self.layer_decay,
        )


def settings_from_environment() -> TrainingSettings:
    """Return the settings of the file that `MEDSSL_FINETUNE` names, or the defaults."""
    path = os.environ.get(VARIABLE)
    if not path:
        return TrainingSettings()
    return check_settings(TrainingSettings, read_yaml(Path(path)), path)
