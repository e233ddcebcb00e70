"""Settings of the loop, whatever the method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medssl.config import Settings
from medssl.training.guards import GuardSettings
from medssl.training.optimisers import OptimiserSettings
from medssl.training.schedules import ScheduleSettings

#: Settings that a resumed run may change: they alter neither the weights nor the training's own rows of metrics.jsonl.
FREE_ON_RESUME = frozenset({"workers", "save_minutes", "save_every", "keep", "pictures_every", "probes"})


class TrainingSettings(Settings):
    """How the loop runs.

    Args:
        steps: Steps of the optimiser.
        seed: Fixes the weights at the start and, with the sample index, every random choice.
        optimiser: Which optimiser, and its numbers.
        schedule: How the learning rate moves.
        accumulate: Batches whose gradients are averaged before one step of the optimiser.
        clip_gradient: Largest norm of the gradient; None does not clip.
        ema: Decay of a running average of the weights, which is then what is exported; None keeps none.
        weights: Factor of each term of the loss, by name; 1 for those not named.
        precision: `auto` takes `bf16` on CUDA and `float32` elsewhere; on a processor with AVX-512 BF16, `bf16` halves
            the time of a step. Losses are in float32 always.
        memory_format: Order of weights and images in memory: `contiguous`, or `channels_last`, which puts the channels
            of a voxel side by side. `auto` takes `contiguous`, and `channels_last` where a network is compiled on CUDA:
            not compiled, the instance norms of nnU-Net's networks turn their input round and back. Checkpoints are
            contiguous always.
        compile: Compile the forward of the network when it is first called, which takes minutes and is meant for long
            runs on CUDA. Where it fails, the run goes on without it and says so.
        devices: GPUs, or processes on a CPU, that train together.
        workers: Processes that read crops; None takes what the machine has to spare.
        guards: When a run is stopped.
        log_every: Steps between rows of metrics.jsonl; the only times the device is waited for.
        health_every: Steps between looks at the method's health; a multiple of log_every is cheapest.
        validate_every: Steps between validations on the store's validation volumes; 0 for none.
        validation_batches: Batches of a validation, the same each time.
        pictures_every: Steps between pictures; 0 for none.
        save_minutes: Minutes between checkpoints.
        save_every: Steps between checkpoints; whichever comes first.
        keep: Checkpoints that are kept.
    """

    steps: int = Field(default=1000, ge=1)
    seed: int = Field(default=0, ge=0)
    optimiser: OptimiserSettings = OptimiserSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    accumulate: int = Field(default=1, ge=1)
    clip_gradient: float | None = Field(default=12.0, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    weights: dict[str, float] = {}
    precision: Literal["auto", "bf16", "float32"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: bool = False
    devices: int = Field(default=1, ge=1)
    workers: int | None = Field(default=None, ge=0)
    guards: GuardSettings = GuardSettings()
    log_every: int = Field(default=10, ge=1)
    health_every: int = Field(default=100, ge=1)
    validate_every: int = Field(default=0, ge=0)
    validation_batches: int = Field(default=4, ge=1)
    pictures_every: int = Field(default=1000, ge=0)
    save_minutes: float = Field(default=10.0, gt=0)
    save_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=3, ge=1)
