"""Settings of a classification run: what is trained, how fast, and what counts how much."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from medssl.augmentation.policy import AugmentationSettings
from medssl.config import Settings
from medssl.errors import UsageError
from medssl.networks.pooling import Pooling
from medssl.transfer.schedule import Schedule

Mode = Literal["linear", "partial", "full"]
Balance = Literal["none", "weights", "sampling"]
#: Peak rates of AdamW by mode; standardised features bear a larger one than a network.
RATES = {"linear": 1e-2, "partial": 1e-3, "full": 1e-3}
#: SGD with momentum 0.9 takes larger steps.
SGD_RATES = {"linear": 3e-2, "partial": 1e-2, "full": 1e-2}
#: Settings that a resumed run may change: they alter nothing that is computed.
FREE_ON_RESUME = frozenset({"dataset", "labels", "checkpoint", "plans_from", "cache", "workers", "device"})


class ClassificationSettings(Settings):
    """How a classifier is trained.

    Args:
        mode: `linear` trains the head on a frozen encoder, `partial` also the coarsest stages, `full` everything.
        trained_stages: Stages that `partial` trains.
        steps: Steps of the optimiser.
        val_every: Steps between two looks at all validation images; a checkpoint is written at each.
        batch_size: Images per step.
        learning_rate: Peak rate of the head; None takes what fits mode and optimiser.
        optimiser: `adamw`, or `sgd` with momentum 0.9.
        weight_decay: Of weights, not of norms and biases.
        schedule: A name of `medssl.transfer.schedule.NAMES`.
        warmup_fraction: Part of the run in which the rate rises.
        frozen_fraction: Part at the start in which the encoder stands still (sawtooth, frozen).
        layer_decay: Factor on the rate per level from the head down to the stem.
        dropout: Part of the pooled features that is dropped in training.
        stages: Stages that are pooled: `all`, `last`, or numbers.
        pooling: `mean` over space, or `mean+max`.
        balance: What is done about classes of unequal size: `none`; `weights` by the effective number of samples;
            `sampling` shows every class equally often.
        effective_beta: Beta of the effective number.
        smoothing: Part of the target that is spread over all classes; one class an image only.
        select: `last` takes the last checkpoint; `best` the one with the least validation loss.
        augment: Whether the policy `fine-tuning` changes training images.
        augmentation: What the user said of it.
        seed: Of everything random.
        precision: `auto` takes bf16 on CUDA and float32 elsewhere.
    """

    mode: Mode = "full"
    trained_stages: int = Field(default=2, ge=1)
    steps: int = Field(default=1000, ge=1)
    val_every: int = Field(default=100, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    optimiser: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: str = "warmup"
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    frozen_fraction: float = Field(default=0.2, ge=0, lt=1)
    layer_decay: float = 1.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    stages: Literal["all", "last"] | tuple[int, ...] = "all"
    pooling: Pooling = "mean"
    balance: Balance = "none"
    effective_beta: float = Field(default=0.999, ge=0, lt=1)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    select: Literal["last", "best"] = "last"
    augment: bool = True
    augmentation: AugmentationSettings = AugmentationSettings()
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "bf16", "float32"] = "auto"

    @property
    def frozen(self) -> int | None:
        """Stages that are trained, as `Classifier.freeze` takes them; None for all."""
        return {"linear": 0, "partial": self.trained_stages, "full": None}[self.mode]

    @property
    def rate(self) -> float:
        """Peak rate of the head."""
        return self.learning_rate or (RATES if self.optimiser == "adamw" else SGD_RATES)[self.mode]

    def make_schedule(self) -> Schedule:
        """Return the schedule, checked."""
        return Schedule(
            name=self.schedule,
            peak=self.rate,
            steps=self.steps,
            warmup_fraction=self.warmup_fraction,
            frozen_fraction=self.frozen_fraction,
            layer_decay=self.layer_decay,
        )


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        UsageError: Naming the first setting that differs.
    """
    for name, value in now.items():
        if name not in FREE_ON_RESUME and before.get(name) != value:
            raise UsageError(
                f"--resume: {name} is {value!r} now and was {before.get(name)!r} when {where} began. Use the same "
                "options, or another --out."
            )
