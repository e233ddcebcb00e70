"""Learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from medssl.config import Settings


class ScheduleSettings(Settings):
    """How the learning rate moves.

    Args:
        name: `poly` falls as (1 - t)^power (nnU-Net), `cosine` along half a cosine, `constant` not at all, `infinite`
            falls along a cosine to a plateau, stays there so that a run can be prolonged, and goes to `final` at the
            end (Singh et al., 2025).
        warmup_steps: Steps of linear rise from (almost) zero.
        power: Exponent of `poly`.
        final: Rate at the end, as a part of the peak; `poly` always ends at 0.
        plateau: Rate of the plateau of `infinite`, as a part of the peak.
        cooldown: Part of the run after which `infinite` reaches its plateau.
        anneal: Last part of the run in which `infinite` goes from the plateau to `final`.
        continued: Whether the run goes on from the plateau of another: `infinite` then starts on it.
    """

    name: Literal["poly", "cosine", "constant", "infinite"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)
    power: float = Field(default=0.9, gt=0)
    final: float = Field(default=0.0, ge=0, le=1)
    plateau: float = Field(default=0.3, gt=0, le=1)
    cooldown: float = Field(default=0.3, gt=0, lt=1)
    anneal: float = Field(default=0.2, gt=0, lt=1)
    continued: bool = False


def rate_factor(schedule: ScheduleSettings, step: int, total: int) -> float:
    """Return the learning rate of a step as a part of its peak.

    Args:
        schedule: How it moves.
        step: The step that is about to be computed, from 0.
        total: Steps of the whole run.
    """
    on_plateau = schedule.name == "infinite" and schedule.continued
    warmup = 0 if on_plateau else min(schedule.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    fraction = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule.name == "poly":
        return float((1 - fraction) ** schedule.power)
    if schedule.name == "cosine":
        return _cosine(1.0, schedule.final, fraction)
    if schedule.name == "infinite":
        if fraction < schedule.cooldown and not on_plateau:
            return _cosine(1.0, schedule.plateau, fraction / schedule.cooldown)
        if fraction < 1 - schedule.anneal:
            return schedule.plateau
        return _cosine(schedule.plateau, schedule.final, (fraction - 1 + schedule.anneal) / schedule.anneal)
    return 1.0


def end_of_plateau(schedule: ScheduleSettings, total: int) -> int | None:
    """Return the steps after which `infinite` begins to anneal, None for other schedules."""
    if schedule.name != "infinite":
        return None
    warmup = 0 if schedule.continued else min(schedule.warmup_steps, total)
    return warmup + int((total - warmup) * (1 - schedule.anneal))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
