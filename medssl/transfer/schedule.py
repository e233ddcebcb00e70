"""Learning rates of fine-tuning as functions of the step: warm-up, sawtooth, frozen then unfrozen, poly, constant.

Sources: Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation" (CVPR 2025): linear warm-up of the
whole network at a tenth of the scratch rate, and the sawtooth that warms the decoder first; nnU-Net's poly decay with
exponent 0.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from medssl.errors import UsageError, unknown_name

NAMES = ("warmup", "sawtooth", "frozen", "poly", "constant")
OPTIMISERS = ("auto", "sgd", "adamw")
POLY_EXPONENT = 0.9
# Peak rates of SGD (momentum 0.99, Nesterov) in the references: a tenth of nnU-Net's for pretrained weights.
PRETRAINED_RATE = 1e-3
SCRATCH_RATE = 1e-2
# Best of 0.0005, 0.001 and 0.003 for 100 steps in every arm of pipelines/benchmarks/label_efficiency.py.
ADAMW_RATE = 3e-3
# With fewer steps nnU-Net's SGD does not leave the plateau where everything is background: hippocampus, 8 cases,
# 200 steps, any rate from 0.003 to 0.03: Dice 0; AdamW is past it after 100.
STEPS_FOR_SGD = 5000


def choose_optimiser(optimiser: str, steps: int) -> Literal["sgd", "adamw"]:
    """Return `sgd` or `adamw`; `auto` takes AdamW for runs too short for SGD.

    Raises:
        UsageError: If there is none of that name.
    """
    if optimiser not in OPTIMISERS:
        raise unknown_name("optimiser", optimiser, OPTIMISERS)
    if optimiser == "auto":
        return "adamw" if steps < STEPS_FOR_SGD else "sgd"
    return "adamw" if optimiser == "adamw" else "sgd"


def default_rate(optimiser: str, pretrained: bool) -> float:
    """Return the peak rate of an optimiser with or without pretrained weights."""
    if optimiser == "adamw":
        return ADAMW_RATE
    return PRETRAINED_RATE if pretrained else SCRATCH_RATE


@dataclass(frozen=True)
class Phase:
    """Where a schedule changes, in steps.

    Args:
        warm: Length of a linear warm-up of the whole network.
        head: Length of the first part, in which the encoder stands still.
    """

    warm: int
    head: int


@dataclass(frozen=True)
class Schedule:
    """Rates of a whole run.

    Args:
        name: One of `NAMES`.
        peak: Highest rate of the decoder.
        steps: Length of the run.
        warmup_fraction: Part of the run in which the rate of the whole network rises (references: 5 to 10 %).
        frozen_fraction: Part at the start in which the encoder stands still (sawtooth and frozen).
        layer_decay: Factor per level from the decoder down to the stem; 1 gives all layers one rate.
    """

    name: str
    peak: float
    steps: int
    warmup_fraction: float = 0.1
    frozen_fraction: float = 0.2
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise unknown_name("schedule", self.name, NAMES)
        if not self.peak > 0:
            raise UsageError(f"learning_rate must be positive, got {self.peak}.")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay must be in (0, 1], got {self.layer_decay}.")

    @property
    def phase(self) -> Phase:
        """Where this schedule changes."""
        head = round(self.frozen_fraction * self.steps) if self.name in ("sawtooth", "frozen") else 0
        warm = 0 if self.name in ("poly", "constant") else max(round(self.warmup_fraction * self.steps), 1)
        return Phase(warm, head)

    def encoder_stands_still(self, step: int) -> bool:
        """Whether the encoder is frozen at a step, counted from 0."""
        return step < self.phase.head

    def rates(self, step: int, depths: Mapping[str, int]) -> dict[str, float]:
        """Return the rate of each group of parameters.

        Args:
            step: The step about to be computed, from 0.
            depths: Levels between each group and the decoder, which has 0.
        """
        decoder, encoder = self._decoder(step), self._encoder(step)
        return {name: (encoder if depth else decoder) * self.layer_decay**depth for name, depth in depths.items()}

    def _decoder(self, step: int) -> float:
        warm, head = self.phase.warm, self.phase.head
        if self.name == "sawtooth":
            if step < head:
                # First tooth: up over its first half, down over its second, the decoder alone.
                half = max(head // 2, 1)
                return self.peak * ((step + 1) / half if step < half else _poly(step - half, max(head - half, 1)))
            return self._whole(step - head, self.steps - head, warm)
        if self.name == "frozen":
            rise = min(1.0, (step + 1) / warm)
            return self.peak * rise * _poly(max(step - warm, 0), self.steps - warm)
        return self._whole(step, self.steps, warm)

    def _encoder(self, step: int) -> float:
        warm, head = self.phase.warm, self.phase.head
        if step < head:
            return 0.0
        if self.name == "frozen":
            return self._decoder(step) * min(1.0, (step - head + 1) / warm)
        return self._decoder(step)

    def _whole(self, step: int, steps: int, warm: int) -> float:
        if self.name == "constant":
            return self.peak
        if step < warm:
            return self.peak * (step + 1) / warm
        return self.peak * _poly(step - warm, steps - warm)


def _poly(step: int, steps: int) -> float:
    return max(0.0, 1 - step / max(steps, 1)) ** POLY_EXPONENT


def group_of(name: str) -> str:
    """Return the group of a parameter's name: `decoder`, `stem` or `stage_N`."""
    parts = name.split(".")
    if parts[0] != "encoder":
        return "decoder"
    return "stem" if parts[1] == "stem" else f"stage_{parts[2]}"


def depths_of(network: nn.Module) -> dict[str, int]:
    """Return the groups of a U-Net's parameters and how many levels each lies below the decoder."""
    groups = list(dict.fromkeys(group_of(name) for name, _ in network.named_parameters()))
    stages = sorted((group for group in groups if group.startswith("stage_")), key=lambda group: int(group[6:]))
    depths = {stage: len(stages) - number for number, stage in enumerate(stages)}
    if "stem" in groups:
        depths["stem"] = len(stages) + 1
    if "decoder" in groups:
        depths["decoder"] = 0
    return {group: depths[group] for group in groups}
