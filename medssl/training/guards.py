"""Guards that stop a run with a named cause instead of letting it burn hours."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field

from medssl.config import Settings
from medssl.errors import TrainingStopped


class GuardSettings(Settings):
    """When a run is stopped.

    Args:
        least_std: A health figure whose name ends in `std` below this is a collapse: all samples get one feature.
        patience: Checks in a row that must be bad. 0 switches the guard off.
    """

    least_std: float = Field(default=1e-4, ge=0)
    patience: int = Field(default=3, ge=0)


def check_finite(values: Mapping[str, float], step: int, rate: float) -> None:
    """Stop on a loss or gradient that is not a number.

    Args:
        values: Means since the last check, by name.
        step: Steps that are done.
        rate: Current learning rate.

    Raises:
        TrainingStopped: Naming what is not finite, where, and what helps.
    """
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise TrainingStopped(
            f"{', '.join(broken)} became NaN or infinite in the steps up to {step} (learning rate {rate:.2g}); the "
            "weights are lost, the last checkpoint is from before. Lower optimiser.learning_rate, raise "
            "schedule.warmup_steps, lower clip_gradient, or try --set precision=float32; if it happens at once, look "
            "at views.png for a volume with wild intensities."
        )


class CollapseGuard:
    """Counts bad health checks in a row."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.bad: dict[str, int] = {}

    def check(self, health: Mapping[str, float], step: int) -> None:
        """Look at the figures of one health check.

        Raises:
            TrainingStopped: If one has been below the limit `patience` times in a row.
        """
        if self.settings.patience == 0:
            return
        for name, value in health.items():
            if not name.endswith("std"):
                continue
            # `not >=` also counts NaN as bad.
            self.bad[name] = self.bad.get(name, 0) + 1 if not value >= self.settings.least_std else 0
            if self.bad[name] >= self.settings.patience:
                raise TrainingStopped(
                    f"Collapse: {name} is {value:.2g} at step {step}, below {self.settings.least_std:.2g} for "
                    f"{self.bad[name]} checks in a row: all samples get the same feature. Lower the learning rate or "
                    "raise the batch size; --set guards.patience=0 switches this guard off."
                )
