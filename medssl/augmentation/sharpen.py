"""Unsharp masking."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from medssl.augmentation.intensity import PerChannel, Range, blur_along, limit_
from medssl.augmentation.transform import Facts, Parameters, Transform, broadcast, ranges_are_ordered
from medssl.data.draw import Draw


class SharpenSettings(PerChannel):
    """Unsharp masking.

    Args:
        strength: How much of the detail is added.
        sigma: What counts as detail: standard deviation of the Gaussian in voxels, drawn for each channel and axis.
        keep_range: Clip to the range that the channel had, so that edges get no values which no tissue has.
    """

    strength: Range = (0.1, 1.0)
    sigma: Range = (0.5, 1.0)
    keep_range: bool = True

    _ordered = field_validator("strength", "sigma")(ranges_are_ordered)

    @field_validator("strength", "sigma")
    @classmethod
    def _small(cls, value: Range) -> Range:
        if value[0] < 0 or value[1] > 8:
            raise ValueError(f"strength is a factor and sigma in voxels, both in [0, 8]; got {value}")
        return value


class Sharpen(Transform[SharpenSettings]):
    """Add the difference to the image's own Gaussian blur: image + strength * (image - blurred).

    The strengths are those of nnU-Net's DA5 trainer, whose difference is a Laplacian over one voxel.
    """

    name: ClassVar[str] = "sharpen"
    settings_class = SharpenSettings
    neutral: ClassVar[tuple[str, float]] = ("strength", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `strength` (B, C) and `sigma` (B, C, D); `keep_range` (B, C) is the setting."""
        keeps = self.per_sample(facts, lambda settings: settings.keep_range) > 0
        return {
            "strength": self.uniform(facts, rng, "strength", (facts.channels,)),
            "sigma": self.uniform(facts, rng, "sigma", (facts.channels, len(facts.size))),
            "keep_range": keeps[:, None].repeat(1, facts.channels),
        }

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Blur, add the difference, clip."""
        blurred = channels
        for axis in range(channels.ndim - 1):
            blurred = blur_along(blurred, axis + 1, values["sigma"][:, axis])
        strength = broadcast(values["strength"], channels)
        result = torch.addcmul(channels, channels - blurred, strength)
        keeps = values["keep_range"]
        if not bool(keeps.any()):
            return result
        flat = channels.flatten(1)
        free = broadcast(torch.where(keeps, 0.0, math.inf), channels.flatten(1)[:, 0]).reshape_as(strength)
        low = flat.amin(dim=1).reshape_as(strength) - free
        high = flat.amax(dim=1).reshape_as(strength) + free
        return limit_(result, low, high)
