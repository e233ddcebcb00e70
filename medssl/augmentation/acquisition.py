"""How an image was sampled: slices thicker than the voxels they were brought to."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from medssl.augmentation.intensity import Range
from medssl.augmentation.mirror import AXES, Axis
from medssl.augmentation.transform import Facts, Parameters, Transform, TransformSettings, ranges_are_ordered, to_device
from medssl.data.draw import Draw


class AnisotropySettings(TransformSettings):
    """Coarser sampling along one axis.

    Args:
        axes: The axis is drawn among these; `z` does not exist in 2D.
        factor: How many times coarser the sampling becomes. TorchIO's range.
        thickness_mm: Thickness of the slices, instead of `factor`; where the voxels are as thick already, nothing
            happens. CT is read at 1 to 5 mm, 2D MR at 3 to 6 mm.
        down: `average`: a slice is the mean over its thickness; `nearest`: it is the plane in its middle.
    """

    axes: tuple[Axis, ...] = Field(default=AXES, min_length=1)
    factor: Range = (1.5, 5.0)
    thickness_mm: Range | None = None
    down: Literal["average", "nearest"] = "average"

    _ordered = field_validator("factor")(ranges_are_ordered)

    @field_validator("factor")
    @classmethod
    def _coarser(cls, value: Range) -> Range:
        if value[0] < 1 or value[1] > 32:
            raise ValueError(f"factor says how many times coarser the sampling becomes, in [1, 32]; got {value}")
        return value

    @field_validator("thickness_mm")
    @classmethod
    def _positive(cls, value: Range | None) -> Range | None:
        if value is not None:
            ranges_are_ordered(value)
            if value[0] <= 0:
                raise ValueError(f"a thickness in mm is positive, got {value}")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> AnisotropySettings:
        if self.thickness_mm is not None and "factor" in self.model_fields_set:
            raise ValueError("give factor or thickness_mm, not both")
        return self


class Anisotropy(Transform[AnisotropySettings]):
    """Thick slices along one axis, brought back to the original grid linearly (Billot et al., MICCAI 2020; TorchIO).

    All channels of a sample share the axis and the thickness. The slices lie evenly about the middle of the image.
    Where TorchIO takes the nearest plane, the default here is the mean over the slice, as a scanner measures it.
    """

    name: ClassVar[str] = "anisotropy"
    settings_class = AnisotropySettings
    neutral: ClassVar[tuple[str, float]] = ("factor", 1.0)
    family: ClassVar[str] = "acquisition"

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `factor` (B, C); `axis` (B, C), counted among the spatial axes; `nearest` (B, C), bool."""
        flat = 3 - len(facts.size)
        settings = [self.by_modality.get(modality) for modality in facts.modality]
        may = torch.tensor([[s is not None and axis in s.axes for axis in AXES[flat:]] for s in settings])
        axis = torch.where(may, rng.child("axis").uniform(0, 1, (len(facts.size),)), -1.0).argmax(dim=1)
        spacing = facts.spacing_mm[torch.arange(len(facts)), axis + flat].tolist()
        ranges = [_factors(s, step) for s, step in zip(settings, spacing, strict=True)]
        low, high = torch.tensor(ranges).unbind(dim=1)
        factor = low + (high - low) * rng.child("factor").uniform(0, 1)
        # Thinner slices than the voxels cannot be shown, and an axis of one voxel cannot be coarser.
        possible = may.any(dim=1) & (torch.tensor(facts.size)[axis] > 1)
        factor = torch.where(possible, factor, 1.0).clamp(min=1)
        nearest = torch.tensor([s is not None and s.down == "nearest" for s in settings])
        return {
            name: value[:, None].repeat(1, facts.channels)
            for name, value in {"factor": factor, "axis": axis, "nearest": nearest}.items()
        }

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Go there and back; the coarse images differ in size, so each channel goes alone."""
        drawn = zip(values["axis"].tolist(), values["factor"].tolist(), values["nearest"].tolist(), strict=True)
        for channel, (axis, factor, nearest) in zip(channels, drawn, strict=True):
            channel.copy_(thick_slices(channel, axis, factor, nearest=nearest))
        return channels


def thick_slices(image: Tensor, axis: int, factor: float, *, nearest: bool = False) -> Tensor:
    """Return an image as if it had been acquired in thick slices.

    Args:
        image: Shape: any.
        axis: Along which the slices follow each other.
        factor: Thickness and distance of the slices in voxels, 1 or more.
        nearest: Take the plane in the middle of each slice instead of the mean over its thickness.

    Returns:
        New memory. Shape: as the image.
    """
    edge = image.shape[axis]
    count = math.ceil(edge / factor - 1e-6)
    centre = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * factor + (edge - 1) / 2
    # Half an index is rounded away from the middle on both sides, so that a mirrored image gives a mirrored result.
    coarse = _taken(image, axis, _mirrored_round(centre, edge)) if nearest else _averaged(image, axis, centre, factor)
    if count == 1:
        return coarse.expand_as(image).clone()
    position = ((torch.arange(edge, dtype=torch.float64) - centre[0]) / factor).clamp(0, count - 1)
    lower = position.floor().clamp(max=count - 2)
    above = _taken(coarse, axis, lower + 1)
    return _taken(coarse, axis, lower).lerp_(above, _along(position - lower, image, axis))


def _averaged(image: Tensor, axis: int, centre: Tensor, thickness: float) -> Tensor:
    """Return the means over slices; the outermost plane of the image continues beyond it."""
    low, high = centre - thickness / 2, centre + thickness / 2
    first = (low + 0.5 + 1e-6).floor()
    total: Tensor | None = None
    for step in range(math.ceil(thickness) + 1):
        plane = first + step
        part = (torch.minimum(high, plane + 0.5) - torch.maximum(low, plane - 0.5)).clamp(min=0) / thickness
        if bool((part > 1e-6).any()):
            share = _taken(image, axis, plane) * _along(part, image, axis)
            total = share if total is None else total.add_(share)
    assert total is not None
    return total


def _factors(settings: AnisotropySettings | None, spacing_mm: float) -> Range:
    if settings is None:
        return 1.0, 1.0
    if settings.thickness_mm is None:
        return settings.factor
    return settings.thickness_mm[0] / spacing_mm, settings.thickness_mm[1] / spacing_mm


def _mirrored_round(centre: Tensor, edge: int) -> Tensor:
    middle = (edge - 1) / 2
    away = centre - middle
    return torch.where(away < 0, (centre - 0.5).ceil(), (centre + 0.5).floor())


def _taken(image: Tensor, axis: int, planes: Tensor) -> Tensor:
    index = planes.long().clamp(0, image.shape[axis] - 1)
    return image.index_select(axis, to_device(index, image.device))


def _along(values: Tensor, image: Tensor, axis: int) -> Tensor:
    shape = [1] * image.ndim
    shape[axis] = -1
    return to_device(values.reshape(shape), image.device, image.dtype)
